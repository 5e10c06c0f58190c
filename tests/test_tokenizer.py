"""Tokenizers: ids against an independent BPE, round trips, the packaged vocabulary, and what is refused."""

from __future__ import annotations

import base64
import itertools
import json
import lzma
import socket

import numpy as np
import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from model import tokenizer as tk
from model.cli import UserError
from model.tokenizer import CharTokenizer, GPT2Tokenizer, build_tokenizer, load_tokenizer, pieces

# Characters at which GPT-2's pattern, Python and Unicode may disagree about what is a space, a letter or a digit.
TRICKY_CHARACTERS = " \n\t\r\x0b\x1c\x85\xa0\u3000'sré1²!-中🙂\u0301"
TRICKY = st.text(st.sampled_from(TRICKY_CHARACTERS), max_size=60)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


# GPT-2's own, from encoder.py of its release
PATTERN = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


@pytest.fixture(scope="module")
def gpt2() -> GPT2Tokenizer:
    return GPT2Tokenizer()


def reference_bpe(text: str) -> list[int]:
    """GPT-2's encoding from its definition: split by the pattern, then merge the pair of lowest rank until none is."""
    ranks = {token: rank for rank, token in enumerate(tk._read_vocabulary())}
    ids = []
    for word in PATTERN.findall(text):
        parts = [bytes([b]) for b in word.encode()]
        while pairs := [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]:
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


# GPT-2


def test_gpt2_known_ids(gpt2):
    assert (gpt2.n_vocab, gpt2.eot_id) == (50257, 50256)
    assert gpt2.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert gpt2.encode("") == []


def test_gpt2_end_of_text_is_ordinary_text(gpt2):
    ids = gpt2.encode("a<|endoftext|>b")
    assert gpt2.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    assert gpt2.eot_id not in ids
    assert gpt2.decode(ids) == "a<|endoftext|>b"
    assert gpt2.decode([gpt2.eot_id]) == ""


@settings(deadline=None)
@given(text=TRICKY | ANY_TEXT)
def test_gpt2_equals_the_definition_and_round_trips(gpt2, text):
    ids = gpt2.encode(text)
    assert ids == reference_bpe(text)
    assert gpt2.decode(ids) == text
    assert b"".join(gpt2.decode_bytes([i]) for i in ids) == text.encode()


def test_gpt2_contractions(gpt2):
    text = "it's can't they're I've I'm he'll she'd 's't're've'm'll'd O'Neill's ' s 'S"
    assert gpt2.encode(text) == reference_bpe(text)


def test_gpt2_part_of_a_character(gpt2):
    ids = gpt2.encode("🙂")
    assert len(ids) > 1
    assert gpt2.decode(ids[:1]) == "\ufffd"
    assert gpt2.decode_bytes(ids) == "🙂".encode()


@pytest.mark.parametrize("run", [" ", "\n", "a", "中"])
def test_gpt2_takes_a_million_characters_without_a_cut(gpt2, run):
    # tiktoken alone panics on a run of white space of this length
    text = run * 1_000_000 + "x"
    assert gpt2.decode(gpt2.encode(text)) == text


def test_gpt2_needs_no_network_and_no_cache(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("the network or tiktoken's registry was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    encoding = tk.gpt2_encoding.__wrapped__()
    assert encoding.n_vocab == 50257
    assert list(tmp_path.iterdir()) == []


# The packaged vocabulary


def test_vocabulary_is_small_complete_and_licensed():
    asset = tk._VOCABULARY
    assert asset.stat().st_size <= 250_000
    tokens = tk._read_vocabulary()
    assert len(set(tokens)) == 50256
    assert {bytes([b]) for b in range(256)} <= set(tokens)
    assert "MIT License" in (asset.parent / "LICENSE-gpt2-vocabulary.txt").read_text()


def test_asset_is_the_published_vocabulary_packed():
    """How the asset is made from r50k_base.tiktoken, whose SHA-256 _read_vocabulary compares."""
    lines = (f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tk._read_vocabulary()))
    tokens = [base64.b64decode(line.split()[0]) for line in lines]
    packed = lzma.compress(bytes(map(len, tokens)) + b"".join(tokens), preset=9 | lzma.PRESET_EXTREME)
    assert packed == tk._VOCABULARY.read_bytes()


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "other"])
def test_damaged_vocabulary_is_refused_by_name(tmp_path, damage):
    data = bytearray(tk._VOCABULARY.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    asset = tmp_path / "vocabulary.xz"
    asset.write_bytes(
        {"flipped": data, "truncated": data[:-5], "empty": b"", "other": tk.lzma.compress(b"abc")}[damage]
    )
    with pytest.raises(UserError, match=r"vocabulary\.xz is damaged"):
        tk._read_vocabulary(asset)


# Cutting a text into pieces


def test_pieces_are_cut_only_between_words_of_the_pattern(monkeypatch):
    # stronger than equal ids, which may be equal by luck of the vocabulary
    monkeypatch.setattr(tk, "PIECE", 1)  # a cut at every good place
    n_cuts = 0
    for middle in map("".join, itertools.product(TRICKY_CHARACTERS, repeat=3)):
        cut = list(pieces([f"x{middle}y"]))
        assert [word for piece in cut for word in PATTERN.findall(piece)] == PATTERN.findall(f"x{middle}y"), cut
        n_cuts += len(cut) - 1
    assert n_cuts > 1000


@settings(deadline=None, max_examples=300)
@given(parts=st.lists(TRICKY, max_size=8), size=st.integers(1, 20))
def test_pieces_encode_to_the_ids_of_the_whole_text(parts, size):
    whole = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tk, "PIECE", size)
        patch.setattr(tk, "LONGEST_PIECE", 10_000)  # longer than any run here, so every cut is a good one
        cut = list(pieces(parts))
    encode = tk.gpt2_encoding().encode_ordinary
    assert "".join(cut) == whole
    assert [i for piece in cut for i in encode(piece)] == encode(whole)


@settings(deadline=None, max_examples=300)
@given(parts=st.lists(TRICKY, max_size=8), size=st.integers(1, 20))
def test_pieces_are_bounded_and_complete(parts, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tk, "PIECE", size)
        patch.setattr(tk, "LONGEST_PIECE", 2 * size)
        cut = list(pieces(parts))
    assert "".join(cut) == "".join(parts)
    assert all(0 < len(piece) <= 2 * size for piece in cut)


def test_pieces_have_their_size_and_come_early(monkeypatch):
    monkeypatch.setattr(tk, "PIECE", 5000)
    monkeypatch.setattr(tk, "LONGEST_PIECE", 10_000)
    taken = []

    def texts():
        for i in range(100):
            taken.append(i)
            yield "some words\n" * 100

    first = next(pieces(texts()))
    assert 4900 < len(first) <= 5000
    assert len(taken) < 10


# Characters


def test_char_ids_are_sorted_with_eot_last():
    tokenizer = CharTokenizer("banana\n")
    assert tokenizer.chars == "\nabn"
    assert (tokenizer.n_vocab, tokenizer.eot_id) == (5, 4)
    assert tokenizer.encode("ban\n") == [2, 1, 3, 0]
    assert tokenizer.decode([2, 1, 3, 4, 0]) == "ban\n"
    assert tokenizer.decode_bytes([4]) == b""


@given(text=ANY_TEXT)
def test_char_round_trips(text):
    tokenizer = CharTokenizer(text)
    ids = tokenizer.encode(text)
    assert ids == [sorted(set(text)).index(c) for c in text]
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == text.encode()


@pytest.mark.parametrize("char", ["z", "é", "🙂", "\udcff", "\x00"])
def test_char_names_what_is_not_in_its_alphabet(char):
    with pytest.raises(UserError, match=rf"U\+{ord(char):04X}"):
        CharTokenizer("abc é🙂".replace(char, "")).encode(f"ab{char}c")


def test_char_names_only_a_few_of_many():
    with pytest.raises(UserError, match="and 21 more") as error:
        CharTokenizer("").encode("abcdefghijklmnopqrstuvwxyz")
    assert len(str(error.value).splitlines()) <= 2


# Every kind


@pytest.mark.parametrize("name", ["char", "gpt2", "bpe:259"])
class TestEveryTokenizer:
    text = "A first line, it's 1 of 2.\nA second line: naïve 🙂\n"

    def test_build_takes_a_stream_of_texts(self, name):
        tokenizer = build_tokenizer(name, iter(self.text.splitlines(keepends=True)))
        assert tokenizer.name == name
        assert tokenizer.eot_id == tokenizer.n_vocab - 1
        assert tokenizer.decode(tokenizer.encode(self.text)) == self.text

    def test_encode_array(self, name):
        tokenizer = build_tokenizer(name, [self.text])
        ids = tokenizer.encode_array(self.text)
        assert ids.dtype == np.uint32
        assert ids.shape == (len(tokenizer.encode(self.text)),)
        assert ids.tolist() == tokenizer.encode(self.text)
        assert tokenizer.encode_array("").shape == (0,)
        assert tokenizer.decode(ids.astype(np.uint16)) == self.text

    def test_saved_as_json_and_loaded(self, name, tmp_path):
        tokenizer = build_tokenizer(name, [self.text])
        tokenizer.save(tmp_path / "made" / "on the way")
        loaded = load_tokenizer(tmp_path / "made" / "on the way")
        assert type(loaded) is type(tokenizer)
        assert (loaded.n_vocab, loaded.eot_id) == (tokenizer.n_vocab, tokenizer.eot_id)
        assert loaded.encode(self.text) == tokenizer.encode(self.text)
        assert [path.name for path in (tmp_path / "made" / "on the way").iterdir()] == ["tokenizer.json"]
        assert json.loads((tmp_path / "made" / "on the way" / "tokenizer.json").read_text())["name"] == name

    @pytest.mark.parametrize("wrong", [-1, "n_vocab", 10**12])
    def test_names_an_id_outside_the_vocabulary(self, name, wrong):
        tokenizer = build_tokenizer(name, [self.text])
        wrong = tokenizer.n_vocab if wrong == "n_vocab" else wrong
        for decode in (tokenizer.decode, tokenizer.decode_bytes):
            with pytest.raises(UserError, match=f": {wrong}\n"):
                decode([0, wrong, 1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no tokenizer"),
        ("", "damaged"),
        ("{", "damaged"),
        ("[]", "damaged"),
        ("\x00\xff", "damaged"),
        ("[" * 200_000, "damaged"),
        ('{"version": "1.0", "model": {}}', "damaged or not one of ours"),
        ('{"format": 1, "name": ["char"]}', "damaged"),
        ('{"format": 1, "name": "char"}', "damaged"),
        ('{"format": 1, "name": "char", "chars": 3}', "damaged"),
        ('{"format": 1, "name": "char", "chars": "ba"}', "damaged"),
        ('{"format": 1, "name": "words"}', "'words' is unknown"),
        ('{"format": 2, "name": "char", "chars": "ab"}', "format 2"),
    ],
)
def test_load_refuses_by_name(tmp_path, content, message):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_load_of_a_file_or_nothing(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "nothing"):
        with pytest.raises(UserError, match="has no tokenizer"):
            load_tokenizer(path)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="choose char, gpt2, bpe:N, or the folder of a trained one"):
        build_tokenizer("words", [])


def test_a_registered_kind_is_built_and_loaded(monkeypatch, tmp_path):
    class Shouting(CharTokenizer):
        name = "shouting"

        def encode_array(self, text):
            return super().encode_array(text.upper())

    monkeypatch.setitem(tk.TOKENIZERS, "shouting", Shouting)
    build_tokenizer("shouting", ["ABC"]).save(tmp_path)
    assert load_tokenizer(tmp_path).decode([0, 1, 2]) == "ABC"
    assert load_tokenizer(tmp_path).encode("abc") == [0, 1, 2]
