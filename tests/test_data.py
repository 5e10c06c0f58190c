"""Token folders: what is in them, what is refused, what survives a kill."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from model import tokenizer as tk
from model.cli import UserError
from model.data import books, get_batch, load, prepare, shards, verify
from model.data.shards import Writer
from model.tokenizer import CharTokenizer, GPT2Tokenizer

ROOT = Path(__file__).parents[1]
TEXT = "It was a dark night; the wind\nblew, and nobody's lamp burned.\n\n  Naïve 🙂 1815!\n" * 40


def write_corpus(folder: Path, **texts: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_bytes(text.encode())
    return folder


@pytest.fixture
def small_pieces(monkeypatch):
    """Many pieces from a small text: the seams between them are where ids could go wrong."""
    monkeypatch.setattr(tk, "PIECE", 64)
    monkeypatch.setattr(tk, "LONGEST_PIECE", 256)
    monkeypatch.setattr(books, "_BLOCK", 50)


# What prepare writes


@pytest.mark.parametrize("n", [1, 2, 9, 10, 11, 1003, 1115])
def test_char_split_is_90_percent_of_the_characters(tmp_path, n, small_pieces):
    text = TEXT[:n]
    data = prepare(write_corpus(tmp_path / "c", a=text) / "a.txt", tmp_path / "tokens", "char")
    assert (len(data.train), len(data.val)) == (int(0.9 * n), n - int(0.9 * n))
    assert data.tokenizer.chars == "".join(sorted(set(text)))
    assert data.tokenizer.decode(data.train[:]) + data.tokenizer.decode(data.val[:]) == text


def test_gpt2_ids_are_those_of_the_whole_text(tmp_path, small_pieces):
    data = prepare(write_corpus(tmp_path / "c", a=TEXT) / "a.txt", tmp_path / "tokens", "gpt2")
    encode = tk.gpt2_encoding().encode_ordinary
    n = int(0.9 * len(TEXT))
    assert data.train[:].tolist() == encode(TEXT[:n])
    assert data.val[:].tolist() == encode(TEXT[n:])


@pytest.mark.parametrize("name", ["char", "gpt2"])
def test_end_of_text_stands_between_documents_only(tmp_path, name, small_pieces):
    source = write_corpus(
        tmp_path / "c", b="Second document.\n" * 10, a="First <|endoftext|>\n" * 10, c="Third.\n" * 10
    )
    data = prepare(source, tmp_path / "tokens", name)
    eot = data.tokenizer.eot_id
    texts = [(source / f"{x}.txt").read_text() for x in "abc"]
    for tokens, part in ((data.train, slice(0, 0.9)), (data.val, slice(0.9, 1))):
        documents = [t[int(part.start * len(t)) : int(part.stop * len(t))] for t in texts]
        expected = [i for document in documents for i in [*data.tokenizer.encode(document), eot]][:-1]
        assert tokens[:].tolist() == expected
        assert expected.count(eot) == 2


def test_short_document_leaves_no_gap_in_a_split(tmp_path):
    # one character: nothing of it is train, so no end of text stands there for it
    data = prepare(write_corpus(tmp_path / "c", a="aaaaaaaaaa", b="b", c="cccccccccc"), tmp_path / "tokens", "char")
    eot = data.tokenizer.eot_id
    assert data.train[:].tolist() == [0] * 9 + [eot] + [2] * 9
    assert data.val[:].tolist() == [0, eot, 1, eot, 2]
    # the same for the first document
    data = prepare(write_corpus(tmp_path / "d", a="a", b="bbbbbbbbbb", c="cccccccccc"), tmp_path / "tokens", "char")
    assert data.train[:].tolist() == [1] * 9 + [eot] + [2] * 9


@pytest.mark.parametrize(("val_fraction", "n_train"), [(0, 1000), (0.25, 750), (1, 0)])
def test_val_fraction(tmp_path, val_fraction, n_train):
    source = write_corpus(tmp_path / "c", a=TEXT[:1000])
    data = prepare(source, tmp_path / "tokens", "char", val_fraction=val_fraction)
    assert (len(data.train), len(data.val)) == (n_train, 1000 - n_train)
    assert data.meta["val_fraction"] == val_fraction
    verify(tmp_path / "tokens")


@pytest.mark.parametrize("val_fraction", [-0.1, 1.1, float("nan")])
def test_val_fraction_out_of_range(tmp_path, val_fraction):
    with pytest.raises(UserError, match="val_fraction"):
        prepare(write_corpus(tmp_path / "c", a="text"), tmp_path / "tokens", "char", val_fraction=val_fraction)


def test_gutenberg_files_are_cleaned(tmp_path):
    book = (
        "\ufeffHeader\r\n*** START OF THE PROJECT GUTENBERG EBOOK A ***\r\n\r\nThe text\r\nof it.\r\n\r\n"
        "*** END OF THE PROJECT GUTENBERG EBOOK A ***\r\nFooter\r\n"
    )
    data = prepare(write_corpus(tmp_path / "c", a=book), tmp_path / "tokens", "char", val_fraction=0)
    assert data.tokenizer.decode(data.train[:]) == "The text\nof it.\n"


def test_meta_and_files(tmp_path):
    source = write_corpus(tmp_path / "c", b="é" * 10, a="\ufeffab\r\n" * 5)
    write_corpus(source / "sub", c="xyz" * 10)
    folder = tmp_path / "tokens"
    data = prepare(source, folder, "char", shard_tokens=40)
    names = {"train": ["train_000000.bin", "train_000001.bin"], "val": ["val_000000.bin"]}
    assert sorted(p.name for p in folder.iterdir()) == ["meta.json", "tokenizer.json", *names["train"], *names["val"]]
    meta = json.loads((folder / "meta.json").read_text())
    assert meta == data.meta == load(folder).meta
    assert meta["format"] == 2
    # a byte-order mark counts at the beginning of a file only, as Unicode has it
    assert meta["sources"] == [
        {"path": "a.txt", "characters": 19},
        {"path": "b.txt", "characters": 10},
        {"path": "sub/c.txt", "characters": 30},
    ]
    for split in ("train", "val"):
        tokens = getattr(data, split)
        assert meta[split]["tokens"] == len(tokens)
        assert meta[split]["bytes"] == len(data.tokenizer.decode(tokens[:]).encode())
        assert [entry["path"] for entry in meta[split]["shards"]] == names[split]
        for entry in meta[split]["shards"]:
            content = (folder / entry["path"]).read_bytes()
            assert entry["size"] == len(content) == 1024 + 2 * entry["tokens"]
            assert entry["mtime_ns"] == (folder / entry["path"]).stat().st_mtime_ns
            assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert [entry["tokens"] for entry in meta["train"]["shards"]] == [40, 15]


@pytest.mark.parametrize("name", ["char", "gpt2"])
@pytest.mark.parametrize("shard_tokens", [1, 7, 1000])
def test_shards_do_not_change_the_tokens(tmp_path, name, shard_tokens, small_pieces):
    source = write_corpus(tmp_path / "c", a=TEXT[:300], b=TEXT[300:500])
    whole = prepare(source, tmp_path / "whole", name)
    cut = prepare(source, tmp_path / "cut", name, shard_tokens=shard_tokens)
    for split in ("train", "val"):
        assert getattr(cut, split)[:].tolist() == getattr(whole, split)[:].tolist()
        assert cut.meta[split]["bytes"] == whole.meta[split]["bytes"]


def test_large_vocabulary_takes_uint32(tmp_path):
    alphabet = "".join(map(chr, range(0x10000, 0x10000 + 0x10000)))  # 65,536 characters and the end of text
    data = prepare(write_corpus(tmp_path / "c", a=alphabet), tmp_path / "tokens", "char", val_fraction=0)
    assert data.train.dtype == np.uint32
    assert data.train[:].tolist() == list(range(0x10000))
    idx, targets = get_batch(data.train, context=4, seed=0, step=0, rows=range(64))
    assert (targets == idx + 1).all()
    assert targets.max() > 40_000

    alphabet = alphabet[:-1]
    assert prepare(write_corpus(tmp_path / "c", a=alphabet), tmp_path / "tokens", "char").train.dtype == np.uint16


def test_a_ready_tokenizer_is_used_as_it_is(tmp_path):
    tokenizer = CharTokenizer("abcdefgh")
    data = prepare(write_corpus(tmp_path / "c", a="hgfedcbaaa"), tmp_path / "tokens", tokenizer)
    assert data.train[:].tolist() == [7, 6, 5, 4, 3, 2, 1, 0, 0]
    assert data.tokenizer.chars == "abcdefgh"
    with pytest.raises(UserError, match="'x'"):
        prepare(write_corpus(tmp_path / "c", a="abcx"), tmp_path / "other", tokenizer)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(books, "_READ_BYTES", 1 << 16)
    monkeypatch.setattr(tk, "PIECE", 1 << 14)
    monkeypatch.setattr(books, "_BLOCK", 1 << 14)
    monkeypatch.setattr(shards, "_BLOCK_BYTES", 1 << 16)
    text = "".join(f"line {i} of a long text\n" for i in range(4000))
    path = write_corpus(tmp_path / "c", a=text) / "a.txt"
    prepare(path, tmp_path / "tokens", "char")  # imports and caches
    peaks = []
    for copies in (10, 40):  # 0.9 and 3.7 MB
        path.write_text(text * copies)
        tracemalloc.start()
        prepare(path, tmp_path / "tokens", "char")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1e6


# A folder is there whole or not at all


class Failing(CharTokenizer):
    """Encodes a few pieces and then fails as told."""

    def __init__(self, chars, error):
        super().__init__(chars)
        self.error = error
        self.calls = 0

    def encode_array(self, text):
        self.calls += 1
        if self.calls > 20:
            raise self.error
        return super().encode_array(text)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), UserError("no")])
def test_failed_prepare_keeps_the_old_folder(tmp_path, small_pieces, error):
    source = write_corpus(tmp_path / "c", a=TEXT)
    prepare(source, tmp_path / "tokens", "char", val_fraction=0.5)
    before = (tmp_path / "tokens" / "train_000000.bin").read_bytes()
    for folder in ("tokens", "new"):
        with pytest.raises(type(error)):
            prepare(source, tmp_path / folder, Failing(TEXT, error))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "tokens"]
    assert (tmp_path / "tokens" / "train_000000.bin").read_bytes() == before
    verify(tmp_path / "tokens")


def test_a_killed_prepare_leaves_nothing_that_looks_whole(tmp_path):
    source = write_corpus(tmp_path / "c", a=TEXT)
    script = """
import os, signal, sys
from pathlib import Path
from model import data, tokenizer

class Killing(tokenizer.CharTokenizer):
    def save(self, folder):  # the token files are written, meta.json is not
        os.kill(os.getpid(), signal.SIGKILL)

data.prepare(Path(sys.argv[1]), Path(sys.argv[2]), Killing(Path(sys.argv[1], "a.txt").read_text()))
"""
    folder = tmp_path / "tokens"
    done = subprocess.run([sys.executable, "-c", script, str(source), str(folder)], cwd=ROOT, timeout=120)
    assert done.returncode == -9
    assert not folder.exists()
    left = [path for path in tmp_path.iterdir() if path.name != "c"]
    assert [path.name.startswith("tokens.incomplete-") for path in left] == [True]
    with pytest.raises(UserError, match="not a token folder"):
        load(left[0])
    assert len(prepare(source, folder, "char").train) == int(0.9 * len(TEXT))


def test_prepare_again_replaces_the_folder(tmp_path):
    prepare(write_corpus(tmp_path / "c", a=TEXT), tmp_path / "tokens", "char")
    old = load(tmp_path / "tokens")
    old_ids = old.train[:]
    data = prepare(write_corpus(tmp_path / "c", a="abab" * 10), tmp_path / "tokens", "gpt2")
    assert (data.tokenizer.name, load(tmp_path / "tokens").tokenizer.name) == ("gpt2", "gpt2")
    assert old.train[:].tolist() == old_ids.tolist()  # an open one stays what it was
    with pytest.raises(UserError, match=r"val_000000\.bin was changed while it was in use"):
        old.val[:]  # not read so far
    assert data.tokenizer.decode(data.train[:]) == "abab" * 9
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "tokens"]


def test_prepare_again_replaces_a_folder_of_another_form(tmp_path):
    folder = tmp_path / "tokens"
    folder.mkdir()
    for name in ("train.bin", "val.bin", "tokenizer.json"):  # what an older version of this project left
        (folder / name).write_bytes(b"abcd")
    (folder / "meta.json").write_text('{"format": 1, "dtype": "uint16"}')
    with pytest.raises(UserError, match="format 1, this version reads 2: prepare the text again"):
        load(folder)
    prepare(write_corpus(tmp_path / "c", a=TEXT), folder, "char")
    assert sorted(p.name for p in folder.iterdir()) == [
        "meta.json",
        "tokenizer.json",
        "train_000000.bin",
        "val_000000.bin",
    ]


def test_prepare_into_an_empty_or_a_deep_folder(tmp_path):
    source = write_corpus(tmp_path / "c", a=TEXT)
    (tmp_path / "empty").mkdir()
    prepare(source, tmp_path / "empty", "char")
    prepare(source, tmp_path / "run" / "a" / "data", "char")
    verify(tmp_path / "empty")
    verify(tmp_path / "run" / "a" / "data")


def test_prepare_replaces_only_token_folders(tmp_path):
    source = write_corpus(tmp_path / "c", a=TEXT)
    (tmp_path / "file").write_text("mine")
    for folder in (source, tmp_path / "file"):
        with pytest.raises(UserError, match="not a token folder"):
            prepare(source, folder, "char")
    assert (tmp_path / "file").read_text() == "mine"
    assert (source / "a.txt").read_bytes() == TEXT.encode()


def test_what_file_managers_leave_is_replaced_too(tmp_path):
    folder = tmp_path / "tokens"
    for text in ("abab", "baba"):
        prepare(write_corpus(tmp_path / "c", a=text * 10), folder, "char")
        for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
            (folder / name).write_bytes(b"x")
    assert load(folder).tokenizer.decode(load(folder).train[:]).startswith("baba")


# Refusals


def test_prepare_refuses_a_folder_that_cannot_be_replaced(tmp_path, monkeypatch):
    source = write_corpus(tmp_path / "c", a=TEXT)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "empty")
    with pytest.raises(UserError, match="empty is the current folder or where a disk is mounted"):
        prepare(source, tmp_path / "empty", "char")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UserError, match="choose a new folder in it"):
        prepare(source, Path("."), "char")


def test_prepare_refuses_bad_text_by_name(tmp_path):
    source = write_corpus(tmp_path / "c", good="text")
    for content, message in [
        (b"", r"bad\.txt has no text"),
        (b"\xef\xbb\xbf", r"bad\.txt has no text"),
        (
            b"*** START OF THE PROJECT GUTENBERG EBOOK A ***\n\n*** END OF THE PROJECT GUTENBERG EBOOK A ***\n",
            r"bad\.txt has no text",
        ),
        (b"PNG\0\1", r"bad\.txt is not a text file"),
        (b"caf\xe9", r"bad\.txt is not UTF-8: byte 0xe9 at offset 3"),
    ]:
        (source / "bad.txt").write_bytes(content)
        with pytest.raises(UserError, match=message) as error:
            prepare(source, tmp_path / "tokens", "gpt2")
        assert len(str(error.value).splitlines()) <= 2
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_prepare_refuses_bad_arguments(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        prepare(tmp_path / "missing", tmp_path / "tokens", "char")
    source = write_corpus(tmp_path / "c")
    with pytest.raises(UserError, match=r"no \.txt file"):
        prepare(source, tmp_path / "tokens", "char")
    with pytest.raises(UserError, match="unknown tokenizer 'words'"):
        prepare(write_corpus(source, a="text"), tmp_path / "tokens", "words")


def test_file_changed_while_it_is_read_is_refused(tmp_path):
    source = write_corpus(tmp_path / "c", a="some text")

    class Appending(CharTokenizer):
        @classmethod
        def build(cls, texts):
            tokenizer = super().build(texts)
            (source / "a.txt").write_text("some text some more")
            return tokenizer

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=r"a\.txt changed"):
        patch.setitem(tk.TOKENIZERS, "char", Appending)
        prepare(source, tmp_path / "tokens", "char")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.fixture
def folder(tmp_path) -> Path:
    prepare(write_corpus(tmp_path / "c", a=TEXT), tmp_path / "tokens", "char")
    return tmp_path / "tokens"


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"format": 2}', "\x00\xff", "[" * 200_000], ids=len)
def test_load_refuses_a_damaged_meta(folder, content):
    (folder / "meta.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"meta\.json is damaged"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "format 3"),
        ({"train": {"tokens": "many"}}, "damaged"),
        ({"train": {"tokens": float("inf")}}, "damaged"),
        ({"train": {"tokens": -1}}, "damaged"),
        ({"train": {"bytes": 7}}, "damaged"),
        ({"train": {"shards": []}}, "damaged"),
        ({"val": {"shards": None}}, "damaged"),
        ({"val": {"shards": [{"tokens": 320, "bytes": 352}]}}, "damaged"),
        ({"val": {"shards": ["val_000000.bin"]}}, "damaged"),
        ({"val": {"path": 5}}, "damaged"),
        ({"val": {"sha256": None}}, "damaged"),
    ],
)
def test_load_refuses_a_meta_that_is_not_ours(folder, change, message):
    meta = json.loads((folder / "meta.json").read_text())
    for split in ("train", "val"):
        if split not in change:
            continue
        if change[split].keys() & {"path", "sha256"}:  # of a shard; None: taken away
            entry = {**meta[split]["shards"][0], **change[split]}
            change = {split: {"shards": [{name: value for name, value in entry.items() if value is not None}]}}
        change = {split: {**meta[split], **change[split]}}
    (folder / "meta.json").write_text(json.dumps({**meta, **change}))
    with pytest.raises(UserError, match=message):
        load(folder)


@pytest.mark.parametrize("name", ["train_000000.bin", "val_000000.bin"])
@pytest.mark.parametrize("damage", ["one byte less", "one token more", "empty", "missing"])
def test_load_refuses_a_token_file_of_the_wrong_size(folder, name, damage):
    content = (folder / name).read_bytes()
    if damage == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(
            {"one byte less": content[:-1], "one token more": content + b"\0\0", "empty": b""}[damage]
        )
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        load(folder)


def test_load_refuses_what_is_not_a_token_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file", tmp_path / "missing"):
        with pytest.raises(UserError, match="not a token folder"):
            load(path)


@pytest.mark.parametrize("name", ["train_000000.bin", "val_000000.bin"])
def test_verify_finds_one_wrong_bit(folder, name):
    verify(folder)
    path = folder / name
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[1024 + (len(content) - 1024) // 4 * 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    load(folder)
    with pytest.raises(UserError, match=rf"{name[:-4]}\.bin is not what it was .* its SHA-256 has changed"):
        verify(folder)


def test_gpt2_text_is_counted_too(tmp_path):
    data = prepare(write_corpus(tmp_path / "c", a=TEXT, b="x"), tmp_path / "tokens", GPT2Tokenizer())
    assert [source["characters"] for source in data.meta["sources"]] == [len(TEXT), 1]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    def full(self, ids):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Writer, "write", full)
    (tmp_path / "text.txt").write_text("some text\n" * 10)
    with pytest.raises(OSError) as caught:
        prepare(tmp_path / "text.txt", tmp_path / "tokens", "char")
    assert caught.value.filename == str(tmp_path / "tokens")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_shard_that_cannot_be_mapped_is_named(folder, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(shards.mmap, "mmap", fail)
    with pytest.raises(OSError) as caught:
        load(folder).train[:]
    assert caught.value.filename == str(folder / "train_000000.bin")
