"""Token folders: a text, or shards of tokens, made ready to train on.

A token folder holds tokenizer.json, meta.json and shards (model/data/shards.py) train_000000.bin, ..., val_000000.bin,
...; or only the first two if the shards lie elsewhere. The first part of each document is train, the rest val, so no
text is in both. The end-of-text id separates documents; there is none after the last.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model import bpe, files
from model.cli import LiveLine, UserError
from model.data import books, shards
from model.data.shards import BadShard, Shard, Tokens
from model.tokenizer import FILE as TOKENIZER_FILE
from model.tokenizer import Tokenizer, build_tokenizer, describe, is_called, load_tokenizer, pieces, trained_size

FORMAT = 2
SPLITS = ("train", "val")
SHARD_TOKENS = 100_000_000  # as in modded-nanogpt
_META_FILE = "meta.json"
_ENTRY = {"path", "tokens", "bytes", "largest_id", "size", "mtime_ns", "sha256"}  # of a shard in meta.json
_NAMES = re.compile(rf"(train|val)(_\d{{6}})?\.bin|{re.escape(_META_FILE)}|{re.escape(TOKENIZER_FILE)}")
_Piece = tuple[int, str, str]  # number of the document, split, text


@dataclass(frozen=True, eq=False)
class TokenData:
    """An open token folder.

    train, val: the ids of each split; `val` may be empty.
    meta: the content of meta.json:
        format        version of this layout
        train, val    {"tokens", "bytes", "shards"} each; bytes: UTF-8 length of the text, without end-of-text ids;
                      shards: [{"path", "tokens", "bytes", "largest_id", "size", "mtime_ns", "sha256"}], with an
                      absolute path for a shard that lies elsewhere
        val_fraction, sources    of `prepare`, if it made the shards: [{"path", "characters"}] for each document, the
                      path relative to the corpus folder, characters after `books.clean`
    """

    folder: Path
    tokenizer: Tokenizer
    train: Tokens
    val: Tokens
    meta: dict[str, Any]


def open_source(source: Path, folder: Path, tokenizer: str, *, skip_bad_shards: bool = False) -> TokenData:
    """Make `folder` the token folder of a run that trains on `source`, and open it.

    source is one of
        a text file, or a folder of .txt files: `prepare` encodes it into `folder`, so the run has its own copy;
        a token folder: its shards are used where they lie, and `tokenizer` must be the one they were made with;
        a folder of shards of llm.c or modded-nanogpt, *train*.bin and *val*.bin, or one such file with *val*.bin next
            to it: used where they lie; `tokenizer` must be "gpt2".
    Shards are read once. UserError names a bad one; with skip_bad_shards it is skipped, with a line on stderr.
    """
    source, folder = Path(source), Path(folder).resolve()
    _refuse_other_folders(folder)
    meta: dict[str, Any] = {}
    if (source / _META_FILE).is_file():
        meta = _read_meta(source)
        builder = load_tokenizer(source)
        if not is_called(builder, tokenizer):
            raise UserError(f"{source} was made with --tokenizer {builder.name}, not {tokenizer}: give that one")
        here = source.absolute()
        entries = {s: [{**entry, "path": str(here / entry["path"])} for entry in meta[s]["shards"]] for s in SPLITS}
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
    entries = {split: _check_shards(folder, entries[split], builder, skip=skip_bad_shards) for split in SPLITS}
    _refuse_missing(entries, source)  # all of a split may be bad
    with files.new_folder(folder) as partial:
        _write_meta(partial, builder, meta, entries)
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

    tokenizer: what `build_tokenizer` takes, or a ready one. The first int(characters * (1 - val_fraction)) characters
    of each document, after `books.clean`, are train. shard_tokens: at most so many ids in a shard. The text is read
    twice (to count, and to encode), for bpe:N once more in between (to learn from the training part), in bounded
    memory. `folder` replaces an older token folder and appears only when it is complete; a killed run leaves
    `<folder>.incomplete-...`, which may be deleted.
    """
    if not 0 <= val_fraction <= 1:
        raise UserError(f"val_fraction is {val_fraction}: give the share of the text for validation, from 0 to 1")
    if not 1 <= shard_tokens <= shards.MAX_TOKENS:
        raise UserError(f"shard_tokens is {shard_tokens}: give a number from 1 to {shards.MAX_TOKENS:,}")
    source, folder = Path(source), Path(folder).resolve()
    _refuse_other_folders(folder)
    paths = books.documents(source)
    tokenizer, documents, n_bytes = _survey(paths, tokenizer)
    if isinstance(tokenizer, str):
        tokenizer = _train_tokenizer(tokenizer, documents, 1 - val_fraction)
    with files.new_folder(folder) as partial:
        texts = _split_documents(documents, 1 - val_fraction)
        written = _write_tokens(texts, tokenizer, partial, shard_tokens, n_bytes)
        entries = {s: _check_shards(partial, [{"path": path.name} for path in written[s]], tokenizer) for s in SPLITS}
        root = source if source.is_dir() else source.parent
        sources = [{"path": path.relative_to(root).as_posix(), "characters": n} for path, n in documents]
        _write_meta(partial, tokenizer, {"val_fraction": val_fraction, "sources": sources}, entries)
    return load(folder)


def load(folder: Path, *, trust: bool = True) -> TokenData:
    """Open a token folder. UserError names a shard that has changed since it was first read.

    trust: a shard with the size and modification time in meta.json counts as unchanged; any other is read.
    """
    folder = Path(folder)
    meta = _read_meta(folder)
    tokenizer = load_tokenizer(folder)
    entries = {split: meta[split]["shards"] for split in SPLITS}
    try:
        _check_shards(folder, [*entries["train"], *entries["val"]], tokenizer, trust=trust)
        train, val = (Tokens([Shard.open(folder / entry["path"]) for entry in entries[split]]) for split in SPLITS)
    except BadShard as bad:
        advice = "put the file back as it was; or prepare the text again, and start a new run"
        raise UserError(f"{bad.path} is not what it was when {folder} was made: {bad.reason}\n{advice}") from None
    return TokenData(folder, tokenizer, train, val, meta)


def verify(folder: Path) -> TokenData:
    """`load`, after computing the SHA-256 of every shard."""
    return load(folder, trust=False)


# Token folders


def _read_meta(folder: Path) -> dict[str, Any]:
    """The content of meta.json, validated."""
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
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise UserError(f"{path} is damaged: prepare the text again") from None
    return meta


def _write_meta(
    folder: Path, tokenizer: Tokenizer, meta: dict[str, Any], entries: dict[str, list[dict[str, Any]]]
) -> None:
    """Write tokenizer.json, and meta.json: `meta` with the shards of each split and their sums in place of its own."""
    tokenizer.save(folder)
    totals = {s: {name: sum(entry[name] for entry in entries[s]) for name in ("tokens", "bytes")} for s in SPLITS}
    splits = {split: {**totals[split], "shards": entries[split]} for split in SPLITS}
    content = {"format": FORMAT, **splits} | meta | splits
    files.write_file(folder / _META_FILE, json.dumps(content, indent=2) + "\n")


def _check_shards(
    folder: Path, entries: list[dict[str, Any]], tokenizer: Tokenizer, *, trust: bool = True, skip: bool = False
) -> list[dict[str, Any]]:
    """Read shards, with a thread per core -> their entries of meta.json.

    entries: {"path"} alone for a shard that was never read. trust: do not read those that still have the size and time
    of their entry. BadShard for a bad one, or one whose SHA-256 has changed; with `skip` it is skipped instead.
    """
    stats = [_size_and_time(folder / entry["path"]) for entry in entries]
    is_known = [trust and stat == (e.get("size"), e.get("mtime_ns")) for stat, e in zip(stats, entries, strict=True)]
    if all(is_known):
        return entries
    id_bytes = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.n_vocab)], np.uint8)
    n_bytes = sum(size for (size, _), known in zip(stats, is_known, strict=True) if not known)

    def check(entry: dict[str, Any], known: bool) -> dict[str, Any] | None:
        if known:
            return entry
        path = folder / entry["path"]
        try:
            content = shards.scan(path, id_bytes, progress.advance)
            if entry.get("sha256", content["sha256"]) != content["sha256"]:
                raise BadShard(path, "its SHA-256 has changed, so its content was replaced or damaged")
        except BadShard as bad:
            if not skip:
                raise
            print(f"skipped: {path}: {bad.reason}", file=sys.stderr)
            return None
        return {"path": entry["path"], **content}

    with _progress("checking shards", n_bytes) as progress, ThreadPoolExecutor(_n_threads()) as pool:
        return [entry for entry in pool.map(check, entries, is_known) if entry is not None]


def _size_and_time(path: Path) -> tuple[int, int | None]:
    """Bytes, and nanoseconds of the last change; (0, None) if there is no such file."""
    try:
        stat = path.stat()
    except OSError:
        return 0, None
    return stat.st_size, stat.st_mtime_ns


def _find_shards(source: Path) -> dict[str, list[Path]] | None:
    """The shards of each split; None if `source` is neither a shard nor a folder of them.

    UserError if they are all ids alone, as nanoGPT writes them, which may be of any tokenizer.
    """
    is_shard = source.is_file() and source.suffix == ".bin"
    folder = source.parent if is_shard else source
    paths = {split: sorted(p for p in folder.glob(f"*{split}*.bin") if p.name[0] != ".") for split in SPLITS}
    if is_shard:
        paths["train"] = [source]
    elif not any(paths.values()):
        return None
    if both := set(paths["train"]) & set(paths["val"]):
        raise UserError(f"{min(both)} is named as training and as validation data: choose another name")
    found = sorted({*paths["train"], *paths["val"]})
    if all(map(shards.is_headless, found)):
        raise UserError(f"{found[0]} has no header, as nanoGPT's: give the text that it was made of, such as input.txt")
    return paths


def _refuse_missing(entries: dict[str, list[dict[str, Any]]], source: Path) -> None:
    for split, kind in zip(SPLITS, ("training", "validation"), strict=True):
        if not entries[split]:
            raise UserError(f"{source} has no shard for {kind}: it needs one with {split!r} in its name")


def _refuse_other_folders(folder: Path) -> None:
    """UserError if `folder` is anything but a token folder, which alone may be replaced."""
    if folder.exists() and not (folder.is_dir() and all(map(_NAMES.fullmatch, files.names(folder)))):
        raise UserError(f"{folder} exists and is not a token folder: choose another name, or remove it")
    files.refuse_fixed(folder)


def _progress(label: str, n_bytes: int) -> LiveLine:
    return LiveLine(label, max(n_bytes, 1), is_bytes=True, stderr=True)


# Preparing


def _survey(paths: list[Path], tokenizer: str | Tokenizer) -> tuple[str | Tokenizer, list[tuple[Path, int]], int]:
    """First pass: build the tokenizer if need be, and count each document's characters and all UTF-8 bytes.

    The name of a tokenizer that is yet to be trained is returned as it is: the counts tell what it may learn from.
    """
    documents: list[tuple[Path, int]] = []

    def texts() -> Iterator[str]:
        for path in paths:
            characters = 0
            for text in books.blocks(path):
                characters += len(text)
                progress.advance(len(text.encode()))
                yield text
            if not characters:
                raise UserError(f"{path} has no text, or only a Gutenberg header and footer: add text, or remove it")
            documents.append((path, characters))

    with _progress("reading", sum(path.stat().st_size for path in paths)) as progress:
        stream = texts()
        if isinstance(tokenizer, str) and trained_size(tokenizer) is None:
            tokenizer = build_tokenizer(tokenizer, stream)
        deque(stream, maxlen=0)  # counts what the tokenizer did not need to see
    return tokenizer, documents, int(progress.done)


def _train_tokenizer(name: str, documents: list[tuple[Path, int]], train_fraction: float) -> Tokenizer:
    """The pass of a tokenizer that is learned: from the training part of each document."""
    texts = (text for _, split, text in _split_documents(documents, train_fraction) if split == "train")
    size = sum(int(characters * train_fraction) for _, characters in documents)
    tokenizer = build_tokenizer(name, bpe.sample(texts, size))
    if tokenizer.name != name:
        print(f"vocabulary: {describe(tokenizer, name)}")
    return tokenizer


def _split_documents(documents: list[tuple[Path, int]], train_fraction: float) -> Iterator[_Piece]:
    """Second pass: the documents in order, in pieces that can be encoded one by one."""
    for number, (path, characters) in enumerate(documents):
        parts = _split(path, characters, int(characters * train_fraction))
        for split, group in itertools.groupby(parts, key=lambda part: part[0]):
            for text in pieces(text for _, text in group):
                yield number, split, text


def _split(path: Path, characters: int, n_train: int) -> Iterator[tuple[str, str]]:
    """(split, text): the first n_train characters of a document are train, the rest is val."""
    seen = 0
    for text in books.blocks(path):
        cut = max(n_train - seen, 0)
        seen += len(text)
        if text[:cut]:
            yield "train", text[:cut]
        if text[cut:]:
            yield "val", text[cut:]
    if seen != characters:
        raise UserError(f"{path} changed while it was being read: prepare it again when nothing writes to it")


def _write_tokens(
    texts: Iterator[_Piece], tokenizer: Tokenizer, folder: Path, shard_tokens: int, n_bytes: int
) -> dict[str, list[Path]]:
    """Encode into shards -> the paths of each split."""
    dtype = np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")
    writers = {split: shards.Writer(folder, split, dtype, shard_tokens) for split in SPLITS}
    last = dict.fromkeys(SPLITS, -1)  # number of the document that was written last
    with _progress("encoding", n_bytes) as progress, closing(writers["train"]), closing(writers["val"]):
        for (number, split, text), ids in _encoded(texts, tokenizer):
            if last[split] not in (-1, number):
                writers[split].write(np.array([tokenizer.eot_id]))
            last[split] = number
            writers[split].write(ids)
            progress.advance(len(text.encode()))
    return {split: writer.paths for split, writer in writers.items()}


def _encoded(texts: Iterator[_Piece], tokenizer: Tokenizer) -> Iterator[tuple[_Piece, np.ndarray]]:
    """Each piece with its ids, in order, encoded by a thread for each core and only a few pieces ahead."""
    n_threads = _n_threads()
    with ThreadPoolExecutor(n_threads) as pool:
        tasks = ((piece, pool.submit(tokenizer.encode_array, piece[2])) for piece in texts)
        waiting = deque(itertools.islice(tasks, 2 * n_threads))
        while waiting:
            piece, ids = waiting.popleft()
            yield piece, ids.result()
            waiting.extend(itertools.islice(tasks, 1))


def _n_threads() -> int:
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
