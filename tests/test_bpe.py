"""Trained byte-pair vocabularies: ids against Hugging Face's tokenizers, what they learn from, what is refused."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import regex
import tokenizers
from commands import exit_code
from hypothesis import given, settings
from hypothesis import strategies as st

from model import bpe
from model import tokenizer as tk
from model.cli import UserError
from model.data import books, corpus, open_source, prepare
from model.tokenizer import GPT2Tokenizer, TrainedTokenizer, build_tokenizer, load_tokenizer, pieces

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "Latin": "The keeper of the lighthouse wrote 3 letters in 97; he'd sealed them, but none was sent. Café, naïve!\n",
    "Cyrillic": "Смотритель маяка написал три письма в 1897 году; он запечатал их, но так и не отправил.\n",
    "Greek": "Κάποιος φαροφύλακας έγραψε τρία γράμματα το 1897· τα σφράγισε, μα ποτέ δεν τα έστειλε.\n",
    "Arabic": "كتب حارس المنارة ثلاث رسائل عام ١٨٩٧، وختمها، لكنه لم يرسلها قط.\n",
    "Japanese": "灯台守は1897年に三通の手紙を書いた。封はしたが、「送る」ことはなかった。\n",
    "marks": "x = a[i] + b[i]  # 🙂🙂 👩‍🚀\n\n\n    return -1.5e-07 ------------\t\t\n",
}
TEXT = "".join(SCRIPTS.values()) * 3 + "aaaaaaaa aaaa ababab abcabc cabcab bcbc ------ ----\n" * 5
RUNS = [char * n for char in ("a", "-", " ", "\n", "abc", "é", "中") for n in (2, 3, 5, 8, 31, 64, 500, 2000)]
# Characters of Unicode 12, whose classes every library here knows, and the seams of GPT-2's pattern
ANY_TEXT = st.text(
    st.sampled_from(" \n\t\r\x0b\x1c\x85\xa0\u3000'saré1²!-abc中🙂\u0301") | st.characters(max_codepoint=0x4FF)
)
PATTERN = regex.compile(tk._PATTERN)


@pytest.fixture(scope="module")
def trained() -> tokenizers.Tokenizer:
    """Hugging Face's own tokenizer, as it is after training."""
    return bpe._train([TEXT], 499)


@pytest.fixture(scope="module")
def tokenizer() -> TrainedTokenizer:
    return TrainedTokenizer.train([TEXT], 500)


def hugging_face(tokens, merges) -> tokenizers.Tokenizer:
    """Hugging Face's tokenizer made of a vocabulary and its pairs, as an export would make it."""
    vocabulary = {bpe.to_printable(token): i for i, token in enumerate(tokens)}
    model = tokenizers.models.BPE(vocabulary, [(bpe.to_printable(a), bpe.to_printable(b)) for a, b in merges])
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return made


@pytest.fixture(scope="module")
def exported(tokenizer) -> tokenizers.Tokenizer:
    return hugging_face(tokenizer.tokens, tokenizer.merges())


# Ids


@pytest.mark.parametrize("name", SCRIPTS)
def test_ids_of_scripts_are_those_of_hugging_face(tokenizer, trained, exported, name):
    text = SCRIPTS[name]
    assert tokenizer.encode(text) == trained.encode(text).ids == exported.encode(text).ids
    assert len(tokenizer.encode(text)) < len(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_of_runs_are_those_of_hugging_face(tokenizer, trained, exported):
    for text in [*RUNS, TEXT[::-1], ""]:
        assert tokenizer.encode(text) == trained.encode(text).ids == exported.encode(text).ids


def test_ids_of_all_bytes_are_those_of_hugging_face(tokenizer, trained):
    draw = random.Random(1)
    for _ in range(200):
        text = bytes(draw.choices(range(256), k=40)).decode("latin-1")
        assert tokenizer.encode(text) == trained.encode(text).ids


@settings(deadline=None, max_examples=200)
@given(text=ANY_TEXT)
def test_any_text_equals_the_definition_and_round_trips(tokenizer, trained, text):
    ids = tokenizer.encode(text)
    ranks = {token: rank for rank, token in enumerate(tokenizer.tokens)}
    assert ids == [ranks[part] for word in PATTERN.findall(text) for part in bpe.merge(word.encode(), ranks)]
    assert ids == trained.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == text.encode()


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_unicode_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_pairs_of_small_alphabets_agree():
    """Where many tokens can be made in several ways: every vocabulary of random words, every word of the letters."""
    words = ["".join(word) for n in range(1, 8) for word in itertools.product("ab", repeat=n)]
    for seed in range(20):
        draw = random.Random(seed)
        text = " ".join("".join(draw.choices("ab", weights=[2, 1], k=draw.randint(1, 12))) for _ in range(60))
        tokens = bpe.learn([text], 280)
        theirs = hugging_face(tokens, bpe.merges(tuple(tokens)))
        ours = TrainedTokenizer(tokens)
        assert [ours.encode(word) for word in words] == [found.ids for found in theirs.encode_batch(words)]


def test_merges_are_those_that_were_trained(tokenizer, trained):
    merges = json.loads(trained.to_str())["model"]["merges"]
    assert [(bpe.to_printable(a), bpe.to_printable(b)) for a, b in tokenizer.merges()] == [tuple(m) for m in merges]
    assert len(merges) == 499 - 256


def test_merges_of_gpt2_are_the_published_ones():
    tokens = tk._read_vocabulary()[:3000]
    merges = bpe.merges(tokens)
    assert merges[:4] == ((b" ", b"t"), (b" ", b"a"), (b"h", b"e"), (b"i", b"n"))
    theirs = hugging_face(tokens, merges)
    ours = TrainedTokenizer(tokens)
    for text in [*SCRIPTS.values(), *RUNS]:
        assert ours.encode(text) == theirs.encode(text).ids


@settings(deadline=None, max_examples=100)
@given(parts=st.lists(ANY_TEXT, max_size=6), size=st.integers(1, 20))
def test_pieces_encode_to_the_ids_of_the_whole(tokenizer, parts, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tk, "PIECE", size)
        cut = list(pieces(parts))
    assert [i for piece in cut for i in tokenizer.encode(piece)] == tokenizer.encode("".join(parts))


def test_end_of_text_is_ordinary_text(tokenizer):
    assert (tokenizer.name, tokenizer.n_vocab, tokenizer.eot_id) == ("bpe:500", 500, 499)
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eot_id not in ids
    assert tokenizer.decode([*ids, tokenizer.eot_id]) == "a<|endoftext|>b"


# Training


def test_same_text_gives_the_same_vocabulary_in_any_process(tokenizer):
    code = "import sys; from model import bpe; print(*map(bytes.hex, bpe.learn(sys.stdin.read().split('\\0'), 499)))"
    parts = "\0".join(reversed(list(pieces(TEXT.splitlines(keepends=True)))))
    for parallel in ("true", "false"):
        env = os.environ | {"TOKENIZERS_PARALLELISM": parallel, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
        done = subprocess.run([sys.executable, "-c", code], input=parts, env=env, capture_output=True, text=True)
        assert [bytes.fromhex(token) for token in done.stdout.split()] == list(tokenizer.tokens), done.stderr


def test_bytes_have_the_ids_of_gpt2(tokenizer):
    assert tokenizer.tokens[:256] == tk._read_vocabulary()[:256]


def test_training_reads_only_the_training_part(tmp_path):
    for name, word in (("one", "qxqx"), ("two", "zvzv")):
        (tmp_path / f"{name}.txt").write_text("low lower lowest\n" * 60 + f"{word}\n" * 300)
    for n_vocab, fraction, expected in ((264, 0.6, set()), (268, 0.0, set("qxzv"))):
        made = prepare(tmp_path, tmp_path / "tokens", f"bpe:{n_vocab}", val_fraction=fraction).tokenizer
        assert set("qxzv") & set(b"".join(made.tokens[256:]).decode()) == expected


def test_words_do_not_cross_documents(tmp_path):
    for name in "abcdefgh":
        (tmp_path / f"{name}.txt").write_text("qo no no")
    tokens = prepare(tmp_path, tmp_path / "tokens", "bpe:259", val_fraction=0).tokenizer.tokens
    assert not [token for token in tokens if b"oq" in token]


def test_sample_takes_every_kth_text(monkeypatch):
    monkeypatch.setattr(bpe, "MAX_TRAINING_CHARACTERS", 100)
    assert list(bpe.sample(map(str, range(10)), 100)) == [*"0123456789"]
    assert list(bpe.sample(map(str, range(10)), 101)) == [*"02468"]
    assert list(bpe.sample(map(str, range(10)), 1000)) == ["0"]


def test_prepare_samples_a_large_text(tmp_path, monkeypatch):
    monkeypatch.setattr(tk, "PIECE", 50)
    monkeypatch.setattr(books, "_BLOCK", 50)
    (tmp_path / "a.txt").write_text(TEXT)
    seen = []
    monkeypatch.setattr(corpus, "build_tokenizer", lambda name, texts: seen.append(list(texts)) or GPT2Tokenizer())
    for most in (10**6, len(TEXT) // 3):
        monkeypatch.setattr(bpe, "MAX_TRAINING_CHARACTERS", most)
        prepare(tmp_path / "a.txt", tmp_path / "tokens", "bpe:300", val_fraction=0)
    assert "".join(seen[0]) == TEXT
    assert seen[1] == seen[0][::4]


@pytest.mark.parametrize(
    "text", ["a" * 300_000, "-" * 300_000, " " * 300_000 + "x", "".join(random.Random(0).choices("ab", k=100_000))]
)
def test_long_words_train_in_bounded_time(text):
    """Without the cut, one word of 300,000 letters takes minutes."""
    tokens = bpe.learn(pieces([text]), 280)
    assert max(map(len, tokens)) <= bpe.MAX_TOKEN_BYTES


def test_error_of_the_text_is_raised_as_it_is():
    def texts(error):
        yield "some text"
        raise error

    for error in (UserError("bad"), KeyboardInterrupt(), OSError(5, "Input/output error", "a.txt")):
        with pytest.raises(type(error)) as caught:
            bpe.learn(texts(error), 300)
        assert caught.value is error


@pytest.mark.parametrize("own", [None, "false", "true"])
def test_setting_for_all_cores_is_of_the_user_first(monkeypatch, own):
    name = "TOKENIZERS_PARALLELISM"
    monkeypatch.delenv(name, raising=False)
    if own:
        monkeypatch.setenv(name, own)
    with bpe._all_cores():
        assert os.environ[name] == (own or "true")
    assert os.environ[name] == (own or "false")


@pytest.mark.parametrize("is_live", [True, False])
def test_progress_is_shown_while_it_works(monkeypatch, capsys, is_live):
    shown = threading.Event()

    class Line(bpe.LiveLine):
        def update(self, text):
            assert is_live and "learning" in text
            shown.set()

    def status():
        if not is_live:
            shown.set()
        return "learning"

    monkeypatch.setattr(bpe, "LiveLine", lambda **options: setattr(line := Line(**options), "is_live", is_live) or line)
    with bpe._reporting(status, after_s=0):
        assert shown.wait(30)
    assert ("learning" in capsys.readouterr().err) is not is_live


# Names


@pytest.mark.parametrize(
    "size", ["", "x", "0", "257", "-300", "+300", "3.5", "1e4", "2,048", "0300", " 300", "1000001", "9" * 30, "²"]
)
def test_size_that_cannot_be_is_refused_before_reading(tmp_path, size):
    def texts():
        raise AssertionError("read")
        yield

    with pytest.raises(UserError, match=r"give a number from 258 .* such as bpe:2048") as caught:
        build_tokenizer(f"bpe:{size}", texts())
    assert len(str(caught.value).splitlines()) <= 2
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="give a number from 258"):
        prepare(tmp_path / "a.txt", tmp_path / "tokens", f"bpe:{size}")


def test_size_beyond_the_text_gives_what_there_is(tmp_path, capsys):
    largest = build_tokenizer("bpe:900000", [TEXT])
    assert build_tokenizer(largest.name, [TEXT]).equals(largest)
    (tmp_path / "a.txt").write_text(TEXT)
    made = prepare(tmp_path / "a.txt", tmp_path / "tokens", "bpe:900000", val_fraction=0.0).tokenizer
    assert made.equals(largest)
    assert (
        f"vocabulary: {made.n_vocab:,} ids instead of bpe:900000, as no other pair occurs twice in this text"
        in capsys.readouterr().out
    )
    for text in ([], ["abc"]):
        with pytest.raises(UserError, match=r"bpe:300: no pair of characters occurs twice in this text: give more"):
            build_tokenizer("bpe:300", text)


def test_saved_tokenizer_is_named_by_its_path(tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "mine"), "mine", "mine/tokenizer.json"):
        assert build_tokenizer(name, ()).equals(tokenizer)
    for name in ("nothing", "mine/other.json", "words"):
        with pytest.raises(
            UserError, match=r"unknown tokenizer .* choose char, gpt2, bpe:N, or the folder of a trained"
        ):
            build_tokenizer(name, ())
    with pytest.raises(UserError, match="has no tokenizer"):
        build_tokenizer(str(tmp_path), ())


def test_token_folder_is_opened_by_name_and_by_path(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    made = prepare(tmp_path / "a.txt", tmp_path / "tokens", "bpe:300")
    made.tokenizer.save(tmp_path / "same")
    build_tokenizer("bpe:300", ["other words, other pairs " * 9 + TEXT[::-1]]).save(tmp_path / "other")
    for i, name in enumerate(["bpe:300", "tokens", "tokens/tokenizer.json", "same"]):
        name = name if ":" in name else str(tmp_path / name)
        opened = open_source(tmp_path / "tokens", tmp_path / f"run{i}", name)
        assert opened.tokenizer.equals(made.tokenizer)
        assert opened.train[:].tolist() == made.train[:].tolist()
    for name in ("bpe:301", "char", "gpt2", "nothing", str(tmp_path / "other")):
        with pytest.raises(UserError, match=rf"was made with --tokenizer bpe:300, not {name}: give that one"):
            open_source(tmp_path / "tokens", tmp_path / "run", name)


# Saved


def test_tokens_can_be_read_in_the_file(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    assert (fields["format"], fields["name"]) == (1, "bpe:500")
    assert len(fields["tokens"]) == 499
    assert {"Ċ", "Ġthe", "Ġ------", "aaaa"} <= set(fields["tokens"])
    assert load_tokenizer(tmp_path).tokens == tokenizer.tokens


def test_printable_form_is_that_of_hugging_face():
    assert set(bpe._BYTES) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    every = bytes(range(256))
    assert bpe.from_printable(bpe.to_printable(every)) == every
    assert bpe.to_printable(b" the\n") == "ĠtheĊ"


DAMAGE = {
    "one token less": lambda tokens: tokens[:-1],
    "one token more": lambda tokens: [*tokens, tokens[300] + tokens[301]],
    "a byte missing": lambda tokens: [*tokens[1:], tokens[300] + tokens[301]],
    "a byte twice": lambda tokens: [tokens[1], *tokens[1:]],
    "a byte among the pairs": lambda tokens: [*tokens[:255], *tokens[256:], tokens[255]],
    "a token twice": lambda tokens: [*tokens[:-1], tokens[300]],
    "an empty token": lambda tokens: [*tokens[:-1], ""],
    "a token of three": lambda tokens: [*tokens[:-1], "qzj"],
    "a token before its parts": lambda tokens: [*tokens[:256], *reversed(tokens[256:])],
    "a character outside the alphabet": lambda tokens: [*tokens[:-1], "中"],
    "a number": lambda tokens: [*tokens[:-1], 7],
    "a list": lambda tokens: [*tokens[:-1], list(tokens[-1])],
    "text": lambda tokens: "".join(tokens),
    "an object": lambda tokens: {token: i for i, token in enumerate(tokens)},
    "bytes alone": lambda tokens: tokens[:256],
    "nothing": lambda tokens: [],
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_vocabulary_is_refused(tokenizer, tmp_path, damage):
    tokens = DAMAGE[damage](tokenizer.fields()["tokens"])
    (tmp_path / "tokenizer.json").write_text(json.dumps({"format": 1, "name": "bpe:500", "tokens": tokens}))
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged or not one of ours") as caught:
        load_tokenizer(tmp_path)
    assert len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (["cd", "ab", "abc", "de"], "abcde"),  # abc + de, but cd is merged first
        (["a" * 2**n for n in range(1, 8)], "a" * 256),
    ],
    ids=["merges pass by it", "too long"],
)
def test_token_that_no_training_makes_is_refused(good, bad):
    tokens = (*(bytes([b]) for b in range(256)), *map(str.encode, good))
    assert len(bpe.merges(tokens)) == len(good)
    with pytest.raises(ValueError):
        bpe.merges((*tokens, bad.encode()))


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "bpe"},
        {"name": "bpe:501"},
        {"name": "bpe:0500"},
        {"name": "char"},
        {"name": 7},
        {"name": "bpe:257", "tokens": [*bpe._BYTES]},
    ],
)
def test_vocabulary_of_another_name_is_refused(tokenizer, tmp_path, fields):
    content = {"format": 1, "tokens": tokenizer.fields()["tokens"], **fields}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="damaged or not one of ours"):
        load_tokenizer(tmp_path)


def test_tokenizer_of_hugging_face_is_refused(trained, tmp_path):
    trained.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="damaged or not one of ours"):
        load_tokenizer(tmp_path)


# The command


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """A function from arguments of the command to (exit code, stdout, stderr), called in a folder with a corpus."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    (tmp_path / "b.txt").write_text("fnord fnord fnord\n" * 20)

    return lambda *argv: (exit_code(tk.main, tk.TokenizerConfig, *argv), *capsys.readouterr())


def test_command_trains_on_all_of_the_files(call, tmp_path):
    code, out, err = call("train", "texts", "b.txt", "texts/a.txt", "--vocab-size", 400, "--out", "my bpe")
    assert (code, err) == (0, "")
    made = load_tokenizer(tmp_path / "my bpe")
    text = TEXT + "fnord fnord fnord\n" * 20
    assert made.name == "bpe:400" and b" fnord" in made.tokens
    assert not any(b"\r" in token for token in made.tokens[256:])
    size = len(text.encode())
    ratio = size / (len(made.encode(TEXT)) + len(made.encode("fnord fnord fnord\n" * 20)))
    assert out == (
        f"my bpe/tokenizer.json: 400 ids; {ratio:.2f} bytes per token on {size:,} bytes\n"
        "use it: python train.py --tokenizer 'my bpe'\n"
    )
    assert prepare(tmp_path / "texts", tmp_path / "tokens", "my bpe").tokenizer.equals(made)


def test_command_names_its_folder_by_the_size(call, tmp_path):
    assert call("train", "texts", "--vocab-size", 300)[0] == 0
    assert load_tokenizer(tmp_path / "bpe-300").n_vocab == 300
    code, _, err = call("train", "texts", "--vocab-size", 300)
    assert (code, err) == (2, "error: bpe-300 exists: choose another folder with --out, or remove it\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train texts --vocab-size 257", "give a number from 258"),
        ("train texts --vocab-size many", "many"),
        ("train texts", "--vocab-size"),
        ("train --vocab-size 300", "give text files"),
        ("train missing --vocab-size 300", "no such file or folder: missing"),
        ("train texts --vocab-size 300 --out b.txt", "b.txt exists"),
        ("train texts --vocab-size 300 --out texts", "texts exists"),
        ("train bad.txt --vocab-size 300", "bad.txt is not UTF-8"),
        ("learn texts --vocab-size 300", "learn"),
    ],
)
def test_command_refuses_in_two_lines(call, tmp_path, arguments, message):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    code, out, err = call(*arguments.split())
    assert (code, out) == (2, "")
    assert message in err and len(err.splitlines()) <= 2
    assert not (tmp_path / "bpe-300").exists()


@pytest.mark.slow
def test_module_is_the_command(call, tmp_path):
    argv = [sys.executable, "-W", "error", "-m", "model.tokenizer", "train", "texts", "--vocab-size", "300"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120)
    assert done.returncode == 0 and "300 ids" in done.stdout, done.stderr
