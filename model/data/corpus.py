"""Text -> token shards -> batches.

    python -m model.data prepare Book tokens --tokenizer gpt2       # a text, or a folder of them, into a token folder
    python -m model.data show tokens                                # what is in it, every shard checked

    data = open_source(Path("Book"), Path("runs/a/data"), "gpt2")   # or load(folder), once it is there
    idx, targets = get_batch(data.train, context=1024, seed=1, step=0, rows=range(8))
    loader = Loader(data.train, context=1024, seed=1, first_step=0, rows=range(64), micro_batch=8, device="cuda")
    for idx, targets in windows(data.val, context=1024, batch_size=8): ...

A token folder holds tokenizer.json, meta.json, and shards (model/shards.py) train_000000.bin, ..., val_000000.bin, ...;
or only the first two, where the shards lie elsewhere. The first part of each document goes to train, the rest to val,
so no text is in both. The end-of-text id stands between documents, not after the last.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import secrets
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.cli import UserError
from model.data import books, shards
from model.data.shards import BadShard, Shard, Tokens
from model.tokenizer import FILE as TOKENIZER_FILE
from model.tokenizer import PIECE, Tokenizer, build_tokenizer, load_tokenizer, pieces

FORMAT = 2
SPLITS = ("train", "val")
SHARD_TOKENS = 100_000_000  # as many as modded-nanogpt has in a shard
_META_FILE = "meta.json"
_ENTRY = {"path", "tokens", "bytes", "largest_id", "size", "mtime_ns", "sha256"}  # of a shard in meta.json
_NAMES = re.compile(rf"(train|val)(_\d{{6}})?\.bin|{re.escape(_META_FILE)}|{re.escape(TOKENIZER_FILE)}")


@dataclass(frozen=True, eq=False)
class TokenData:
    """An open token folder.

    train, val: the ids of each split; `val` may be empty.
    meta: what meta.json holds:
        format        version of this layout
        train, val    {"tokens", "bytes", "shards"} each; bytes: UTF-8 length of the text behind the tokens (the
                      end-of-text id stands for no text); shards: [{"path", "tokens", "bytes", "largest_id", "size",
                      "mtime_ns", "sha256"}], the path absolute for a shard that lies elsewhere
        val_fraction  as given to `prepare`
        sources       [{"path", "characters"}]: the documents in order, the path relative to the corpus folder;
                      characters after `books.clean`
    The last two are missing where the shards were not made by `prepare`.
    """

    folder: Path
    tokenizer: Tokenizer
    train: Tokens
    val: Tokens
    meta: dict[str, Any]


def open_source(source: Path, folder: Path, tokenizer: str, *, skip_bad_shards: bool = False) -> TokenData:
    """Make `folder` the token folder of a run that learns from `source`, and open it.

    source is one of
        a text file, or a folder of .txt files: encoded into `folder` by `prepare`. The run has its own copy then, and
            what becomes of the text later does not matter to it;
        a token folder: its shards are used where they lie, and `tokenizer` has to be the one that it was made with;
        a folder of shards of llm.c or modded-nanogpt, where *train*.bin are for training and *val*.bin for validation,
            or one such file, which has *val*.bin beside it: used where they lie; `tokenizer` has to be "gpt2".
    Shards are read once, for their SHA-256 and largest id. UserError names a bad one; with skip_bad_shards it is left
    out, and a line on stderr says so.
    """
    source, folder = Path(source), Path(folder).resolve()
    _refuse_other_folders(folder)
    meta: dict[str, Any] = {}
    if (source / _META_FILE).is_file():
        meta = _read_meta(source)
        builder = load_tokenizer(source)
        if builder.name != tokenizer:
            raise UserError(f"{source} was made with --tokenizer {builder.name}, not {tokenizer}: give that one")
        entries = {
            split: [{**entry, "path": str((source / entry["path"]).absolute())} for entry in meta[split]["shards"]]
            for split in SPLITS
        }
    elif paths := _find_shards(source):
        if tokenizer != "gpt2":
            raise UserError(f"{source} holds shards of GPT-2's ids: give --tokenizer gpt2, or the text itself")
        builder = build_tokenizer(tokenizer, ())
        entries = {split: [{"path": str(path.absolute())} for path in paths[split]] for split in SPLITS}
    else:
        return prepare(source, folder, tokenizer)
    if folder in (source.resolve(), source.resolve().parent):
        raise UserError(f"{folder} is where the shards lie: choose another folder for the run")
    _refuse_missing(entries, source)
    entries = {split: _checked(folder, found, builder, skip=skip_bad_shards) for split, found in entries.items()}
    _refuse_missing(entries, source)  # all of a split may be bad
    with _replacing(folder) as partial:
        builder.save(partial)
        _write_meta(partial, {**meta, **{split: _total(found) for split, found in entries.items()}})
    return load(folder)


def prepare(
    source: Path,
    folder: Path,
    tokenizer: str | Tokenizer,
    *,
    val_fraction: float = 0.1,
    shard_tokens: int = SHARD_TOKENS,
) -> TokenData:
    """Encode a text file, or the *.txt files of a folder, into the token folder `folder`, and open it.

    tokenizer: "char" or "gpt2", or a ready one. The first int(characters * (1 - val_fraction)) characters of each
    document, counted after `books.clean`, are train, the rest is val; a shard holds at most shard_tokens ids. The text
    is read twice (to count, and to encode) in bounded memory. An older token folder of that name is replaced; `folder`
    appears only when it is complete, and what a killed run leaves is called `<folder>.incomplete-...` and may be
    deleted.
    """
    if not 0 <= val_fraction <= 1:
        raise UserError(f"val_fraction is {val_fraction}: give the share of the text for validation, from 0 to 1")
    if not 1 <= shard_tokens <= shards.MAX_TOKENS:
        raise UserError(f"shard_tokens is {shard_tokens}: give a number from 1 to {shards.MAX_TOKENS:,}")
    source, folder = Path(source), Path(folder).resolve()
    _refuse_other_folders(folder)
    paths = books.documents(source)
    tokenizer, documents, n_bytes = _survey(paths, tokenizer)
    with _replacing(folder) as partial:
        texts = _split_documents(documents, 1 - val_fraction)
        written = _write_tokens(texts, tokenizer, partial, shard_tokens, n_bytes)
        tokenizer.save(partial)
        splits = {
            split: _total(_checked(partial, [{"path": path.name} for path in paths], tokenizer))
            for split, paths in written.items()
        }
        root = source if source.is_dir() else source.parent
        sources = [{"path": path.relative_to(root).as_posix(), "characters": n} for path, n in documents]
        _write_meta(partial, {**splits, "val_fraction": val_fraction, "sources": sources})
    return load(folder)


def load(folder: Path) -> TokenData:
    """Open a token folder, its shards unchanged since they were first read.

    One of the size and time of change that meta.json has is taken for unchanged; any other is read, and UserError names
    the file where its SHA-256 differs.
    """
    return _load(Path(folder), trust=True)


def verify(folder: Path) -> TokenData:
    """`load`, with the SHA-256 of every shard computed."""
    return _load(Path(folder), trust=False)


# Token folders


def _load(folder: Path, *, trust: bool) -> TokenData:
    meta = _read_meta(folder)
    tokenizer = load_tokenizer(folder)
    entries = {split: meta[split]["shards"] for split in SPLITS}
    try:
        _checked(folder, [*entries["train"], *entries["val"]], tokenizer, trust=trust)
        train, val = (Tokens([Shard.open(folder / entry["path"]) for entry in entries[split]]) for split in SPLITS)
    except BadShard as bad:
        raise UserError(
            f"{bad.path} is not what it was when {folder} was made: {bad.reason}\n"
            "put the file back as it was; or prepare the text again, and start a new run"
        ) from None
    return TokenData(folder, tokenizer, train, val, meta)


def _read_meta(folder: Path) -> dict[str, Any]:
    """The content of meta.json, with all that is asked of it here."""
    path = folder / _META_FILE
    try:
        meta = json.loads(path.read_bytes())
        if (version := meta["format"]) != FORMAT:
            raise UserError(f"{folder} has format {version!r}, this version reads {FORMAT}: prepare the text again")
        for split in SPLITS:
            entries = meta[split]["shards"]
            for name in ("tokens", "bytes"):
                if sum(entry[name] for entry in entries) != meta[split][name]:
                    raise ValueError(name)
            if not all(entry.keys() >= _ENTRY and isinstance(entry["path"], str) for entry in entries):
                raise ValueError("shards")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is not a token folder: it has no {_META_FILE}; prepare the text again") from None
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path} is damaged: prepare the text again") from None
    return meta


def _write_meta(folder: Path, content: dict[str, Any]) -> None:
    (folder / _META_FILE).write_text(json.dumps({"format": FORMAT, **content}, indent=2) + "\n", encoding="utf-8")


def _total(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """What meta.json says about a split of these shards."""
    return {**{name: sum(entry[name] for entry in entries) for name in ("tokens", "bytes")}, "shards": entries}


def _checked(
    folder: Path, entries: list[dict[str, Any]], tokenizer: Tokenizer, *, trust: bool = True, skip: bool = False
) -> list[dict[str, Any]]:
    """The entries of meta.json for these shards, the shards read by a thread for each core.

    entries: as in meta.json, or {"path"} alone for a shard that was never read. trust: do not read those that still
    have the size and time of their entry. skip: leave bad ones out, where BadShard is raised otherwise; one whose
    SHA-256 is not that of its entry is bad as well.
    """
    files = [_size_and_time(folder / entry["path"]) for entry in entries]
    is_known = [
        trust and file == (entry.get("size"), entry.get("mtime_ns")) for file, entry in zip(files, entries, strict=True)
    ]
    if all(is_known):
        return entries
    id_bytes = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.n_vocab)], np.uint8)
    new_bytes = sum(size for (size, _), known in zip(files, is_known, strict=True) if not known)
    progress = _Progress("checking shards", new_bytes)

    def check(entry: dict[str, Any], known: bool) -> dict[str, Any] | BadShard:
        if known:
            return entry
        path = folder / entry["path"]
        try:
            found = shards.scan(path, id_bytes, progress.advance)
            if entry.get("sha256", found["sha256"]) != found["sha256"]:
                raise BadShard(path, "its SHA-256 is another one, so its content was replaced or damaged")
        except BadShard as bad:
            if not skip:
                raise
            return bad
        return {"path": entry["path"], **found}

    try:
        with ThreadPoolExecutor(_n_threads()) as pool:
            results = list(pool.map(check, entries, is_known))
    finally:
        progress.close()
    for result in results:
        if isinstance(result, BadShard):
            print(f"left out: {result.path}: {result.reason}", file=sys.stderr)
    return [result for result in results if not isinstance(result, BadShard)]


def _size_and_time(path: Path) -> tuple[int, int | None]:
    """Bytes, and nanoseconds of the last change; (0, None) where there is no such file."""
    try:
        stat = path.stat()
    except OSError:
        return 0, None
    return stat.st_size, stat.st_mtime_ns


def _find_shards(source: Path) -> dict[str, list[Path]] | None:
    """The shards that `source` stands for, by their names; None where it is neither one nor a folder of them."""
    is_shard = source.is_file() and source.suffix == ".bin"
    folder = source.parent if is_shard else source
    found = {split: sorted(p for p in folder.glob(f"*{split}*.bin") if p.name[0] != ".") for split in SPLITS}
    if is_shard:
        found["train"] = [source]
    elif not any(found.values()):
        return None
    if both := set(found["train"]) & set(found["val"]):
        raise UserError(f"{min(both)} would be training and validation data at once, by its name: choose another name")
    return found


def _refuse_missing(entries: dict[str, list[dict[str, Any]]], source: Path) -> None:
    for split, kind in zip(SPLITS, ("training", "validation"), strict=True):
        if not entries[split]:
            raise UserError(f"{source} has no shard for {kind}: at least one whose name has {split!r} in it is needed")


def _refuse_other_folders(folder: Path) -> None:
    """UserError where `folder` holds what is not ours to replace."""
    if folder.exists() and not (folder.is_dir() and all(_NAMES.fullmatch(path.name) for path in folder.iterdir())):
        raise UserError(f"{folder} exists and is not a token folder: choose another name, or remove it")


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` in the end; after an error nothing of it is left."""
    tag = secrets.token_hex(4)
    partial = folder.with_name(f"{folder.name}.incomplete-{tag}")
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            old = folder.with_name(f"{folder.name}.replaced-{tag}")
            folder.rename(old)
            partial.rename(folder)
            shutil.rmtree(old)
        else:
            partial.rename(folder)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:  # write() does not say which file it was
            error.filename = str(folder)
        shutil.rmtree(partial, ignore_errors=True)
        raise


# Preparing


def _survey(paths: list[Path], tokenizer: str | Tokenizer) -> tuple[Tokenizer, list[tuple[Path, int]], int]:
    """First pass: build the tokenizer if need be, count each document's characters, and all UTF-8 bytes."""
    documents = []
    progress = _Progress("reading", sum(path.stat().st_size for path in paths))

    def texts() -> Iterator[str]:
        for path in paths:
            characters = 0
            for text in _blocks(path):
                characters += len(text)
                progress.advance(_utf8_length(text))
                yield text
            if not characters:
                raise UserError(f"{path} has no text, or only a Gutenberg header and footer: fill it, or take it away")
            documents.append((path, characters))

    stream = texts()
    if isinstance(tokenizer, str):
        tokenizer = build_tokenizer(tokenizer, stream)
    for _ in stream:  # what the tokenizer did not need to see has to be counted all the same
        pass
    progress.close()
    return tokenizer, documents, progress.done


def _blocks(path: Path) -> Iterator[str]:
    """The clean text of a file in parts of about PIECE characters: the lines of a book one by one would cost more."""
    block: list[str] = []
    size = 0
    for line in books.clean(books.read(path)):
        block.append(line)
        size += len(line)
        if size >= PIECE:
            yield "".join(block)
            block, size = [], 0
    if block:
        yield "".join(block)


def _split_documents(documents: list[tuple[Path, int]], train_fraction: float) -> Iterator[tuple[int, str, str]]:
    """Second pass: (number of the document, split, piece of its text), in order, ready to be encoded."""
    for number, (path, characters) in enumerate(documents):
        parts = _split(path, characters, int(characters * train_fraction))
        for split, group in itertools.groupby(parts, key=lambda part: part[0]):
            for text in pieces(text for _, text in group):
                yield number, split, text


def _split(path: Path, characters: int, n_train: int) -> Iterator[tuple[str, str]]:
    """(split, text): the first n_train characters of a document are train, the rest is val."""
    seen = 0
    for text in _blocks(path):
        cut = max(n_train - seen, 0)
        seen += len(text)
        if text[:cut]:
            yield "train", text[:cut]
        if text[cut:]:
            yield "val", text[cut:]
    if seen != characters:
        raise UserError(f"{path} changed while it was being read: prepare it again when nothing writes to it")


def _write_tokens(
    texts: Iterable[tuple[int, str, str]], tokenizer: Tokenizer, folder: Path, shard_tokens: int, n_bytes: int
) -> dict[str, list[Path]]:
    """Encode into shards; the paths of each split."""
    dtype = np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")
    progress = _Progress("encoding", n_bytes)
    last = dict.fromkeys(SPLITS, -1)  # number of the document that was written last
    with contextlib.ExitStack() as stack:
        stack.callback(progress.close)
        writers = {
            split: stack.enter_context(contextlib.closing(shards.Writer(folder, split, dtype, shard_tokens)))
            for split in SPLITS
        }
        for (number, split, text), ids in _encoded(texts, tokenizer):
            if last[split] not in (-1, number):
                writers[split].write(np.array([tokenizer.eot_id]))
            last[split] = number
            writers[split].write(ids)
            progress.advance(_utf8_length(text))
    return {split: writer.paths for split, writer in writers.items()}


def _encoded(
    texts: Iterable[tuple[int, str, str]], tokenizer: Tokenizer
) -> Iterator[tuple[tuple[int, str, str], np.ndarray]]:
    """Each text with its ids, in order, encoded by a thread for each core and only a few pieces ahead."""
    n_threads = _n_threads()
    waiting: deque[tuple[tuple[int, str, str], Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(n_threads) as pool:
        for text in texts:
            waiting.append((text, pool.submit(tokenizer.encode_array, text[2])))
            if len(waiting) > 2 * n_threads:
                done, ids = waiting.popleft()
                yield done, ids.result()
        for done, ids in waiting:
            yield done, ids.result()


def _n_threads() -> int:
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


class _Progress:
    """Progress of long work on stderr, with the time left.

    Silent for the first two seconds; then one line that is rewritten on a terminal, else a line every ten seconds.
    """

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, max(total, 1), 0
        self.start = time.monotonic()
        self.next = self.start + 2
        self.rewrite = sys.stderr.isatty()
        self.shown = False
        self.lock = threading.Lock()

    def advance(self, n_bytes: int) -> None:
        """n_bytes more are done; any thread may say so."""
        with self.lock:
            self._advance(n_bytes)

    def _advance(self, n_bytes: int) -> None:
        self.done += n_bytes
        now = time.monotonic()
        if now < self.next:
            return
        self.next = now + (0.2 if self.rewrite else 10)
        rate = self.done / (now - self.start)  # bytes/s
        left = max(self.total - self.done, 0) / rate
        line = (
            f"{self.label}: {min(self.done / self.total, 1):.0%} of {self.total / 1e6:,.0f} MB"
            f" | {rate / 1e6:.1f} MB/s | {left // 60:.0f}:{left % 60:02.0f} left"
        )
        print(f"\r{line:<70}" if self.rewrite else line, end="" if self.rewrite else "\n", file=sys.stderr, flush=True)
        self.shown = True

    def close(self) -> None:
        if self.shown and self.rewrite:
            print(f"\r{'':70}\r", end="", file=sys.stderr, flush=True)
