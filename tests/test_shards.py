"""Token shards: the layout that others read, one row over many files, what is refused, and where a run may get them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import resource
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from commands import exit_code

from model import cli
from model.cli import LiveLine, UserError
from model.data import __main__ as data_command
from model.data import corpus, get_batch, load, open_source, prepare, shards, verify
from model.data.shards import BadShard, Shard, Tokens, Writer
from model.tokenizer import GPT2Tokenizer, gpt2_encoding

TEXT = "It was a dark night; the wind\nblew, and nobody's lamp burned.\n\n  Naïve 🙂 1815!\n" * 40


def shard_bytes(ids, magic=20240520, version=1, kind="H", tokens=None) -> bytes:
    """A shard as llm.c writes it, put together without the code under test."""
    header = [magic, version, len(ids) if tokens is None else tokens] + [0] * 253
    return struct.pack("<256i", *header) + struct.pack(f"<{len(ids)}{kind}", *ids)


def write(path: Path, ids, **header) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(shard_bytes(ids, **header))
    return path


def opened(*paths: Path) -> Tokens:
    return Tokens([Shard.open(path) for path in paths])


# A shard


def test_a_written_shard_is_what_llm_c_writes(tmp_path):
    for name, dtype, ids, header in [
        ("small", "<u2", [5, 0, 65535, 1, 50256], {}),
        ("large", "<u4", [5, 0, 65536, 1, 2**32 - 1], {"magic": 20240801, "version": 7, "kind": "I"}),
    ]:
        with contextlib.closing(Writer(tmp_path, name, np.dtype(dtype), shard_tokens=2)) as writer:
            writer.write(np.array(ids[:1], np.uint32))
            writer.write(np.array([], np.uint32))
            writer.write(np.array(ids[1:], np.uint32))
        assert [path.name for path in writer.paths] == [f"{name}_{i:06d}.bin" for i in range(3)]
        for path, part in zip(writer.paths, (ids[:2], ids[2:4], ids[4:]), strict=True):
            assert path.read_bytes() == shard_bytes(part, **header)
        assert opened(*writer.paths)[:].tolist() == ids


def test_no_ids_make_no_shard(tmp_path):
    with contextlib.closing(Writer(tmp_path, "train", np.dtype("<u2"), shard_tokens=3)) as writer:
        writer.write(np.arange(3))
    assert [path.name for path in tmp_path.iterdir()] == ["train_000000.bin"]
    contextlib.closing(Writer(tmp_path, "val", np.dtype("<u2"), shard_tokens=3)).__exit__(None, None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["train_000000.bin"]


def test_a_shard_whose_writer_was_killed_is_none(tmp_path):
    writer = Writer(tmp_path, "train", np.dtype("<u2"), shard_tokens=10)
    writer.write(np.arange(5))
    writer._file.flush()
    with pytest.raises(BadShard, match="its magic number is 0"):
        Shard.open(writer.paths[0])
    writer.close()
    assert Shard.open(writer.paths[0]).tokens == 5


BAD = {
    "magic": (shard_bytes([1, 2], magic=20240522), "its magic number is 20240522"),
    "raw": (bytes(range(256)) * 8, r"its magic number is \d+, that of a shard is 20240520 or 20240801"),
    "version": (shard_bytes([1, 2], version=2), "version 2, this project reads 1"),
    "version of uint32": (shard_bytes([1, 2], magic=20240801, version=1, kind="I"), "version 1, this project reads 7"),
    "too short": (shard_bytes([1, 2], tokens=3), "1,028 bytes instead of 1,030 for the 3 ids of its header"),
    "too long": (shard_bytes([1, 2], tokens=1), "1,028 bytes"),
    "negative": (shard_bytes([1, 2], tokens=-1), "the -1 ids of its header"),
    "width": (shard_bytes([1, 2], magic=20240801, version=7), "instead of 1,032"),
    "no ids": (shard_bytes([]), "it is empty"),
    "no bytes": (b"", "it has 0 bytes"),
    "half a header": (shard_bytes([])[:1000], "it has 1,000 bytes"),
    "vocabulary": (shard_bytes([1, 50257, 2]), "has the id 50,257, outside the vocabulary of 50,257"),
}


@pytest.fixture
def fineweb(tmp_path) -> Path:
    """A folder as modded-nanogpt has it, of three training shards and one for validation."""
    folder = tmp_path / "fineweb"
    ids = np.random.default_rng(1).integers(0, 50257, 450).tolist()
    for number in range(3):
        write(folder / f"fineweb_train_{number + 1:06d}.bin", ids[number * 100 : number * 100 + 100])
    write(folder / "fineweb_val_000000.bin", ids[300:])
    return folder


@pytest.mark.parametrize("kind", [*BAD, "folder", "dangling"])
def test_bad_shard_is_named_and_skipped_on_request(tmp_path, fineweb, capsys, kind):
    bad = fineweb / "fineweb_train_000002.bin"
    bad.unlink()
    if kind == "folder":
        bad.mkdir()
        reason = "cannot be read"
    elif kind == "dangling":
        bad.symlink_to(tmp_path / "nowhere.bin")
        reason = "it is missing"
    else:
        content, reason = BAD[kind]
        bad.write_bytes(content)
    with pytest.raises(UserError, match=reason) as error:
        open_source(fineweb, tmp_path / "run", "gpt2")
    assert str(bad) in str(error.value)
    assert "--skip-bad-shards" in str(error.value)
    assert len(str(error.value).splitlines()) <= 2
    assert not (tmp_path / "run").exists()

    data = open_source(fineweb, tmp_path / "run", "gpt2", skip_bad_shards=True)
    left = capsys.readouterr().err
    assert left.startswith(f"skipped: {bad}: ")
    assert left.count("\n") == 1
    assert len(data.train) == 200
    assert [Path(entry["path"]).name[-5] for entry in data.meta["train"]["shards"]] == ["1", "3"]
    # a skipped shard stays skipped, whatever becomes of it: a resumed run sees the same data
    if bad.is_file():
        write(bad, range(100))
    assert len(load(tmp_path / "run").train) == 200


def test_an_unreadable_shard_is_bad(tmp_path, fineweb, monkeypatch):
    # root reads every file, so the error is made here
    real = Path.open

    def failing(self, *args, **kwargs):
        if self.name == "fineweb_train_000003.bin":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(BadShard, match=r"fineweb_train_000003\.bin is a bad shard: it cannot be read \(Permission"):
        open_source(fineweb, tmp_path / "run", "gpt2")


def test_a_split_with_bad_shards_only_is_refused(tmp_path, fineweb):
    (fineweb / "fineweb_val_000000.bin").write_bytes(b"")
    with pytest.raises(UserError, match="no shard for validation"):
        open_source(fineweb, tmp_path / "run", "gpt2", skip_bad_shards=True)


def test_scan_reads_all_of_a_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_BLOCK_BYTES", 64)
    ids = [*gpt2_encoding().encode_ordinary(TEXT), 50256]
    path = write(tmp_path / "a.bin", ids)
    tokenizer = GPT2Tokenizer()
    read = []
    found = shards.scan(path, np.array([len(tokenizer.decode_bytes([i])) for i in range(50257)]), read.append)
    assert found == {
        "tokens": len(ids),
        "bytes": len(TEXT.encode()),
        "largest_id": 50256,
        "size": path.stat().st_size,
        "mtime_ns": path.stat().st_mtime_ns,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    assert sum(read) == path.stat().st_size - 1024
    # the first id of a later block counts as well
    write(path, [0] * 32 + [60000] + [0] * 31)
    with pytest.raises(BadShard, match="60,000"):
        shards.scan(path, np.ones(50257, np.int64))


def test_a_shard_cut_while_it_is_scanned_is_bad(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_BLOCK_BYTES", 64)
    path = write(tmp_path / "a.bin", range(10_000))  # more than Python reads ahead
    with pytest.raises(BadShard, match="changed while it was being read"):
        shards.scan(path, np.ones(50257, np.int64), lambda n: os.truncate(path, 1024 + 101))


# One row over many shards


@pytest.fixture
def row(tmp_path) -> tuple[Tokens, np.ndarray]:
    """Shards of 1, 2, 5 and 1 ids, and the same ids as an array."""
    ids = np.array([7, 1, 65535, 3, 9, 0, 2, 8, 4])
    parts = np.split(ids, [1, 3, 8])
    paths = [write(tmp_path / f"{number}.bin", part.tolist()) for number, part in enumerate(parts)]
    return opened(*paths), ids


def test_slices_across_borders(row):
    tokens, ids = row
    assert len(tokens) == len(ids)
    for start in [None, *range(-11, 12)]:
        for stop in [None, *range(-11, 12)]:
            part = tokens[start:stop]
            assert part.dtype == np.uint16
            assert part.tolist() == ids[start:stop].tolist()
    with pytest.raises(ValueError, match="step"):
        tokens[::2]


def test_rows_across_borders(row):
    tokens, ids = row
    for length in range(1, len(ids) + 1):
        starts = np.arange(len(ids) - length + 1)[::-1]
        rows = tokens.rows(starts, length)
        assert rows.dtype == np.int64
        assert rows.tolist() == [ids[start : start + length].tolist() for start in starts]
    assert tokens.rows(np.array([], np.int64), 3).shape == (0, 3)
    for start in (-1, 7):
        with pytest.raises(IndexError):
            tokens.rows(np.array([0, start]), 3)


def test_no_shards_are_an_empty_row():
    tokens = Tokens([])
    assert len(tokens) == 0
    assert tokens[:].tolist() == tokens[3:5].tolist() == []


def test_both_widths_in_one_row(tmp_path):
    narrow = write(tmp_path / "0.bin", [1, 2])
    wide = write(tmp_path / "1.bin", [70000, 3], magic=20240801, version=7, kind="I")
    tokens = opened(narrow, wide)
    assert tokens[:].tolist() == [1, 2, 70000, 3]
    assert tokens[:2].dtype == np.uint32


def test_what_is_read_may_be_written_to(row):
    tokens, ids = row
    tokens[:][:] = 0
    tokens.rows(np.array([0]), 9)[:] = 0
    assert tokens[:].tolist() == ids.tolist()
    with pytest.raises(ValueError, match="read-only"):
        tokens.shards[2].map()[0] = 1


def test_files_are_opened_when_they_are_needed(row, monkeypatch):
    tokens, _ = row
    mapped = []
    real = Shard.map
    monkeypatch.setattr(Shard, "map", lambda shard: mapped.append(shard.path.stem) or real(shard))
    tokens[4:7]
    assert mapped == ["2"]
    tokens[0:9]
    tokens[0:9]
    assert sorted(mapped) == ["0", "1", "2", "3"]


def test_the_working_directory_may_change(tmp_path, monkeypatch):
    write(tmp_path / "0.bin", [1, 2])
    monkeypatch.chdir(tmp_path)
    tokens = opened(Path("0.bin"))
    monkeypatch.chdir("/")
    assert tokens[:].tolist() == [1, 2]


def test_threads_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_MAX_MAPPED", 2)  # files are mapped and dropped all the time
    ids = np.random.default_rng(2).integers(0, 50000, 1000)
    paths = [write(tmp_path / f"{i:02d}.bin", ids[50 * i : 50 * i + 50].tolist()) for i in range(20)]
    tokens = opened(*paths)

    def read(seed: int) -> bool:
        starts = np.random.default_rng(seed).integers(0, 900, 50)
        return bool((tokens.rows(starts, 100) == ids[starts[:, None] + np.arange(100)]).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(16)))


def test_more_shards_than_a_process_may_open_files(tmp_path):
    paths = [write(tmp_path / f"{i:03d}.bin", [i, 0, i]) for i in range(400)]
    tokens = opened(*paths)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (300 + used, limits[1]))
    try:
        assert tokens[:].tolist() == [x for i in range(400) for x in (i, 0, i)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_shard_changed_after_its_check_is_named(tmp_path):
    path = write(tmp_path / "0.bin", range(5000))
    tokens = opened(path)
    os.truncate(path, 2000)
    with pytest.raises(UserError, match=r"0\.bin was changed while it was in use"):
        tokens[:10]
    # another file of the same size in its place
    tokens = opened(write(path, range(5000)))
    os.utime(write(tmp_path / "new.bin", range(5000)), ns=(1, 1))
    (tmp_path / "new.bin").replace(path)
    with pytest.raises(UserError, match=r"0\.bin was changed while it was in use"):
        tokens[:10]
    path.unlink()
    with pytest.raises(FileNotFoundError) as error:
        tokens[:10]
    assert cli.explain(error.value) == f"no such file or folder: {path}"


def test_more_data_than_memory(tmp_path):
    """34 GB of ids, most of them holes in sparse files: what is drawn from the far end is read, and no more."""
    count = shards.MAX_TOKENS
    paths = [tmp_path / f"{number}.bin" for number in range(8)]
    for path in paths:
        write(path, [], tokens=count)
        os.truncate(path, 1024 + 2 * count)
    end = np.arange(1000, dtype="<u2") + 1
    with paths[-1].open("r+b") as file:
        file.seek(-2 * len(end), os.SEEK_END)
        file.write(end.tobytes())
    unit = 1 if sys.platform == "darwin" else 1024  # bytes in a unit of ru_maxrss
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    tokens = opened(*paths)
    assert len(tokens) == 8 * count > 1.7e10
    rows = tokens.rows(len(tokens) - 1000 - np.arange(50), 1000)
    assert rows[0].tolist() == end.tolist()
    assert rows[49].tolist() == [0] * 49 + end[:951].tolist()
    for step in range(20):
        get_batch(tokens, context=1024, seed=1, step=step, rows=range(16))
    starts = tokens.rows(np.array([count - 500, 5 * count]), 1000)  # offsets beyond 32 bits, and a border
    assert not starts.any()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before < 200e6


# Where a run gets its shards


def never(*args, **kwargs):
    raise AssertionError("a file was read that should have been trusted")


def test_a_folder_of_shards_is_used_where_it_lies(tmp_path, fineweb, monkeypatch):
    write(fineweb / "._fineweb_train_000001.bin", [])  # macOS leaves such files
    write(fineweb / "hellaswag.bin", [], magic=20240522)
    data = open_source(fineweb, tmp_path / "run" / "data", "gpt2")
    assert sorted(path.name for path in (tmp_path / "run" / "data").iterdir()) == ["meta.json", "tokenizer.json"]
    paths = sorted(fineweb.glob("fineweb_*.bin"))
    contents = [np.frombuffer(path.read_bytes()[1024:], "<u2").tolist() for path in paths]
    assert data.train[:].tolist() == [i for content in contents[:3] for i in content]
    assert data.val[:].tolist() == contents[3]
    assert (data.tokenizer.name, data.folder) == ("gpt2", tmp_path / "run" / "data")
    assert (data.meta["train"]["tokens"], data.meta["val"]["tokens"]) == (300, 150)
    assert data.meta["val"]["bytes"] == len(data.tokenizer.decode_bytes(contents[3]))
    entries = data.meta["train"]["shards"] + data.meta["val"]["shards"]
    for path, content, entry in zip(paths, contents, entries, strict=True):
        stat = path.stat()
        assert (entry["path"], entry["largest_id"], entry["tokens"]) == (str(path), max(content), len(content))
        assert (entry["size"], entry["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns)
        assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(shards, "scan", never)
    assert load(tmp_path / "run" / "data").meta == data.meta


def test_a_single_shard_has_its_validation_beside_it(tmp_path, fineweb):
    data = open_source(fineweb / "fineweb_train_000002.bin", tmp_path / "run", "gpt2")
    assert (len(data.train), len(data.val)) == (100, 150)
    assert [Path(entry["path"]).name for entry in data.meta["train"]["shards"]] == ["fineweb_train_000002.bin"]
    with pytest.raises(UserError, match=r"fineweb_val_000000\.bin is named as training and as validation data"):
        open_source(fineweb / "fineweb_val_000000.bin", tmp_path / "other", "gpt2")


def test_incomplete_folder_of_shards_is_refused(tmp_path, fineweb):
    with pytest.raises(UserError, match="give --tokenizer gpt2"):
        open_source(fineweb, tmp_path / "run", "char")
    write(fineweb / "train_and_val.bin", [1])
    with pytest.raises(UserError, match=r"train_and_val\.bin is named as training and as validation"):
        open_source(fineweb, tmp_path / "run", "gpt2")
    (fineweb / "train_and_val.bin").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "scan", never)  # refused before hours of reading
        for split, kind in (("val", "validation"), ("train", "training")):
            folder = tmp_path / f"no-{split}"
            folder.mkdir()
            for path in fineweb.iterdir():
                if split not in path.name:
                    (folder / path.name).write_bytes(path.read_bytes())
            with pytest.raises(UserError, match=f"no shard for {kind}"):
                open_source(folder, tmp_path / "run", "gpt2")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
def test_ids_without_a_header_are_no_shards(tmp_path, fineweb, tokenizer):
    """nanoGPT's folder of data: the ids may be of any tokenizer."""
    folder = tmp_path / "nanogpt"
    folder.mkdir()
    (folder / "input.txt").write_text(TEXT)
    for name in ("train.bin", "val.bin"):
        (folder / name).write_bytes(np.arange(2000, dtype="<u2").tobytes())
    for source in (folder, folder / "train.bin"):
        with pytest.raises(UserError, match=r"train\.bin has no header, as nanoGPT's: give the text .* input\.txt"):
            open_source(source, tmp_path / "run", tokenizer)
    assert not (tmp_path / "run").exists()


def test_run_folder_never_replaces_its_shards(tmp_path, fineweb):
    prepare(text_file(tmp_path), tmp_path / "tokens", "gpt2")
    for source in (tmp_path / "tokens", tmp_path / "tokens" / "train_000000.bin"):
        with pytest.raises(UserError, match="where the shards lie"):
            open_source(source, tmp_path / "tokens", "gpt2")
    verify(tmp_path / "tokens")
    with pytest.raises(UserError, match="not a token folder"):
        open_source(fineweb, fineweb, "gpt2")


def text_file(folder: Path, text: str = TEXT) -> Path:
    path = folder / "text.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_prepared_folder_is_used_where_it_lies(tmp_path, monkeypatch):
    made = prepare(text_file(tmp_path), tmp_path / "tokens", "char", shard_tokens=1000)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shards, "scan", never)  # its SHA-256 are known
    data = open_source(Path("tokens"), tmp_path / "run", "char")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["meta.json", "tokenizer.json"]
    monkeypatch.chdir("/")
    data = load(tmp_path / "run")
    assert data.train[:].tolist() == made.train[:].tolist()
    assert data.val[:].tolist() == made.val[:].tolist()
    assert data.tokenizer.chars == made.tokenizer.chars
    assert {**data.meta, "train": 0, "val": 0} == {**made.meta, "train": 0, "val": 0}
    assert data.meta["val"]["bytes"] == made.meta["val"]["bytes"]
    # and such a folder again
    assert open_source(tmp_path / "run", tmp_path / "second", "char").meta == data.meta
    with pytest.raises(UserError, match="was made with --tokenizer char, not gpt2"):
        open_source(tmp_path / "tokens", tmp_path / "other", "gpt2")


def test_a_prepared_folder_without_validation_is_refused(tmp_path):
    prepare(text_file(tmp_path), tmp_path / "tokens", "char", val_fraction=0)
    with pytest.raises(UserError, match="no shard for validation"):
        open_source(tmp_path / "tokens", tmp_path / "run", "char")


def test_a_damaged_shard_of_a_prepared_folder(tmp_path, capsys):
    made = prepare(text_file(tmp_path), tmp_path / "tokens", "char", shard_tokens=1000).train[:]
    damage(tmp_path / "tokens" / "train_000001.bin")
    with pytest.raises(UserError, match=r"train_000001\.bin is a bad shard: its SHA-256 has changed"):
        open_source(tmp_path / "tokens", tmp_path / "run", "char")
    data = open_source(tmp_path / "tokens", tmp_path / "run", "char", skip_bad_shards=True)
    assert "train_000001.bin" in capsys.readouterr().err
    assert len(data.train) == data.meta["train"]["tokens"] == len(made) - 1000
    assert data.train[900:1100].tolist() == [*made[900:1000], *made[2000:2100]]


def test_text_is_encoded_into_the_run(tmp_path):
    path = text_file(tmp_path)
    data = open_source(path, tmp_path / "run", "char")
    assert data.tokenizer.decode(data.train[:]) + data.tokenizer.decode(data.val[:]) == TEXT
    path.unlink()
    assert load(tmp_path / "run").train[:].tolist() == data.train[:].tolist()


# A resumed run


def damage(path: Path, keep_time: bool = False) -> None:
    """One bit of it, of the same size."""
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + (0 if keep_time else 1_000_000)))


@pytest.mark.parametrize("name", ["fineweb_train_000002.bin", "fineweb_val_000000.bin"])
def test_a_replaced_shard_is_refused_by_name(tmp_path, fineweb, name):
    open_source(fineweb, tmp_path / "run", "gpt2")
    damage(fineweb / name)
    with pytest.raises(UserError, match=r"not what it was .* its SHA-256 has changed") as error:
        load(tmp_path / "run")
    assert str(error.value).startswith(str(fineweb / name))
    assert "--skip-bad-shards" not in str(error.value)  # the data of a run stays what it is
    assert len(str(error.value).splitlines()) == 2
    write(fineweb / name, range(90))
    with pytest.raises(UserError, match=f"{name} is not what it was"):
        load(tmp_path / "run")
    (fineweb / name).unlink()
    with pytest.raises(UserError, match=f"{name} is not what it was .* it is missing\n"):
        load(tmp_path / "run")


def test_touched_shard_is_accepted_after_reading(tmp_path, fineweb, monkeypatch):
    open_source(fineweb, tmp_path / "run", "gpt2")
    touched = fineweb / "fineweb_train_000002.bin"
    os.utime(touched, ns=(1, 1))
    read = []
    real = shards.scan
    monkeypatch.setattr(shards, "scan", lambda path, *rest: read.append(path) or real(path, *rest))
    assert len(load(tmp_path / "run").train) == 300
    assert read == [touched]


def test_a_moved_folder_is_named(tmp_path, fineweb):
    open_source(fineweb, tmp_path / "run", "gpt2")
    fineweb.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"there is no folder {fineweb}: was it moved"):
        load(tmp_path / "run")
    fineweb.symlink_to(tmp_path / "elsewhere")
    load(tmp_path / "run")


def test_a_token_folder_of_its_own_may_be_moved(tmp_path):
    ids = open_source(text_file(tmp_path), tmp_path / "run" / "data", "char").train[:].tolist()
    (tmp_path / "run").rename(tmp_path / "other")
    assert load(tmp_path / "other" / "data").train[:].tolist() == ids


def test_verify_reads_what_load_trusts(tmp_path, fineweb):
    open_source(fineweb, tmp_path / "run", "gpt2")
    damage(fineweb / "fineweb_train_000003.bin", keep_time=True)
    load(tmp_path / "run")
    with pytest.raises(UserError, match=r"fineweb_train_000003\.bin is not what it was"):
        verify(tmp_path / "run")


def test_long_checks_tell_the_time_left(tmp_path, fineweb, monkeypatch, capsys):
    clock = iter(range(0, 10_000, 5))
    monkeypatch.setattr(corpus, "LiveLine", functools.partial(LiveLine, clock=lambda: next(clock)))
    open_source(fineweb, tmp_path / "run", "gpt2")
    assert "checking shards " in capsys.readouterr().err


# The command


def call(*args) -> int:
    return exit_code(data_command.main, data_command.Command, *args)


def test_prepare_and_show(tmp_path, capsys):
    folder = tmp_path / "tokens"
    assert call("prepare", text_file(tmp_path), folder, "--tokenizer", "char", "--shard-tokens", 1000) == 0
    data = load(folder)
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["val_fraction"] == 0.1
    assert [entry["tokens"] for entry in meta["train"]["shards"][:-1]] == [1000] * (len(data.train) // 1000)
    printed = capsys.readouterr().out
    assert "tokenizer char" in printed
    assert f"{len(data.train):,} tokens" in printed
    assert f"{meta['val']['bytes']:,} bytes of text  1 shard\n" in printed
    assert "SHA-256" not in printed

    assert call("show", folder) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(printed)
    assert "every shard has the SHA-256" in shown
    damage(folder / "train_000002.bin", keep_time=True)
    assert call("show", folder) == 2
    assert "train_000002.bin" in capsys.readouterr().err


def test_prepare_encodes_for_gpt2_where_nothing_else_is_said(tmp_path, capsys):
    assert call("prepare", text_file(tmp_path), tmp_path / "tokens", "--val-fraction", 0.5) == 0
    assert load(tmp_path / "tokens").tokenizer.name == "gpt2"
    open_source(tmp_path / "tokens", tmp_path / "run", "gpt2")
    capsys.readouterr()
    assert call("show", tmp_path / "run") == 0
    assert f"in {tmp_path / 'tokens'}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["show", "missing"], "not a token folder"),
        (["prepare", "missing.txt", "tokens"], "no such file or folder"),
        (["prepare", "text.txt", "tokens", "--shard-tokens", 0], "shard_tokens is 0"),
        (["prepare", "text.txt", "tokens", "--shard-tokens", 2**31], "from 1 to 2,147,483,647"),
        (["prepare", "text.txt", "tokens", "--tokenizer", "words"], "unknown tokenizer 'words'"),
    ],
)
def test_command_refuses_bad_input(tmp_path, monkeypatch, capsys, args, message):
    text_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert call(*args) == 2
    assert message in capsys.readouterr().err
