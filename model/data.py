"""Text -> token files -> batches.

    data = prepare(Path("Book"), Path("runs/a/data"), "gpt2")        # or load(folder) for one that was prepared before
    idx, targets = get_batch(data.train, context=1024, batch_size=8, seed=1, step=0)
    for idx, targets in windows(data.val, context=1024, batch_size=8): ...

A token folder holds train.bin and val.bin (ids as little-endian uint16, or uint32 for a vocabulary of more than 65,536
ids, nothing else), tokenizer.json, and meta.json, which says what they are. The first part of each document goes to
train, the rest to val, so no text is in both. The end-of-text id stands between documents, not after the last.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import secrets
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from model import books
from model.cli import UserError
from model.tokenizer import FILE as TOKENIZER_FILE
from model.tokenizer import PIECE, Tokenizer, build_tokenizer, load_tokenizer, pieces

FORMAT = 1
SPLITS = ("train", "val")
_META_FILE = "meta.json"
_DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_FILES = {_META_FILE, TOKENIZER_FILE, *(f"{split}.bin" for split in SPLITS)}


@dataclass(frozen=True, eq=False)
class TokenData:
    """An open token folder.

    train, val: (tokens,) uint16 or uint32, read-only, mapped from the files (an empty split is an empty array).
    meta: what meta.json holds:
        format        version of this layout
        dtype         "uint16" | "uint32"
        val_fraction  as given to `prepare`
        sources       [{"path", "characters"}]: the documents in order, the path relative to the corpus folder;
                      characters after `books.clean`
        train, val    {"tokens", "bytes", "sha256"} each; bytes: UTF-8 length of the text behind the tokens (the
                      end-of-text ids between documents stand for no text), sha256: of the .bin file
    """

    folder: Path
    tokenizer: Tokenizer
    train: np.ndarray
    val: np.ndarray
    meta: dict[str, Any]


def prepare(source: Path, folder: Path, tokenizer: str | Tokenizer, *, val_fraction: float = 0.1) -> TokenData:
    """Encode a text file, or the *.txt files of a folder, into the token folder `folder`, and open it.

    tokenizer: "char" or "gpt2", or a ready one. The first int(characters * (1 - val_fraction)) characters of each
    document, counted after `books.clean`, are train, the rest is val. The text is read twice (to count, and to encode)
    in bounded memory. An older token folder of that name is replaced; `folder` appears only when it is complete, and
    what a killed run leaves is called `<folder>.incomplete-...` and may be deleted.
    """
    if not 0 <= val_fraction <= 1:
        raise UserError(f"val_fraction is {val_fraction}: give the share of the text for validation, from 0 to 1")
    source, folder = Path(source), Path(folder).resolve()
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= _FILES):
        raise UserError(f"{folder} exists and is not a token folder: choose another name, or remove it")
    paths = books.documents(source)
    tokenizer, documents, n_bytes = _survey(paths, tokenizer)

    tag = secrets.token_hex(4)
    partial = folder.with_name(f"{folder.name}.incomplete-{tag}")
    partial.mkdir(parents=True)
    try:
        dtype = "uint16" if tokenizer.n_vocab <= 1 << 16 else "uint32"
        texts = _split_documents(documents, 1 - val_fraction)
        files = _write_tokens(texts, tokenizer, partial, _DTYPES[dtype], n_bytes)
        tokenizer.save(partial)
        root = source if source.is_dir() else source.parent
        sources = [{"path": path.relative_to(root).as_posix(), "characters": n} for path, n in documents]
        meta = {"format": FORMAT, "dtype": dtype, "val_fraction": val_fraction, "sources": sources, **files}
        (partial / _META_FILE).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
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
    return load(folder)


def load(folder: Path) -> TokenData:
    """Open a token folder; the sizes of its files are checked against meta.json (for their content see `verify`)."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / _META_FILE).read_bytes())
        version, dtype = meta["format"], _DTYPES.get(meta["dtype"])
        counts = {split: int(meta[split]["tokens"]) for split in SPLITS}
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is not a token folder: it has no {_META_FILE}; prepare the text again") from None
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(f"{folder / _META_FILE} is damaged: prepare the text again") from None
    if version != FORMAT or dtype is None:
        raise UserError(f"{folder} has format {version!r}, this version reads {FORMAT}: prepare the text again")
    tokens: dict[str, np.ndarray] = {}
    for split, n in counts.items():
        path = folder / f"{split}.bin"
        size = path.stat().st_size if path.is_file() else None
        if size != n * dtype.itemsize:
            found = "it is missing" if size is None else f"it has {size:,}"
            raise UserError(f"{path} should have {n * dtype.itemsize:,} bytes, but {found}: prepare the text again")
        tokens[split] = np.memmap(path, dtype, mode="r") if n else np.empty(0, dtype)  # an empty file cannot be mapped
    return TokenData(folder, load_tokenizer(folder), tokens["train"], tokens["val"], meta)


def verify(folder: Path) -> TokenData:
    """`load`, and read every token file to compare its SHA-256 with meta.json. UserError names a damaged file."""
    data = load(folder)
    for split in SPLITS:
        tokens: np.ndarray = getattr(data, split)
        if hashlib.sha256(tokens.data).hexdigest() != data.meta[split].get("sha256"):
            raise UserError(f"{data.folder / f'{split}.bin'} is damaged (its SHA-256 is wrong): prepare the text again")
    return data


def get_batch(tokens: np.ndarray, *, context: int, batch_size: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Random windows: idx and the tokens that follow, targets, both (batch_size, context) int64 on the CPU.

    A pure function of its arguments, so step k has the same batch in every run, resumed or not. Each window begins at
    any of the len(tokens) - context places where every one of its tokens has a next one, all equally likely. The
    generator is counter-based (Philox; Salmon et al. 2011): seed is the key (0 to 2**128 - 1), step the counter.
    Data-parallel ranks and micro-steps draw different batches by taking different steps.
    """
    places = len(tokens) - context
    if places < 1:
        raise UserError(
            f"{len(tokens):,} tokens are too few for a context of {context:,}: {context + 1:,} are needed\n"
            "give more text, or choose a smaller context"
        )
    # random_raw and not Generator.integers: numpy promises the former to stay the same in every version
    words = np.random.Philox(key=seed, counter=int(step) << 64).random_raw(batch_size)  # uint64; 2**66 words per step
    starts = (words % places).astype(np.int64)  # off an even draw by places / 2**64 at most
    rows = sliding_window_view(np.asarray(tokens), context + 1)[starts]  # (batch_size, context + 1), a copy
    return torch.from_numpy(rows[:, :-1].astype(np.int64)), torch.from_numpy(rows[:, 1:].astype(np.int64))


def windows(tokens: np.ndarray, context: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All of `tokens` in order for evaluation: (idx, targets), int64 on the CPU, up to batch_size rows of `context`.

    Every token but the first is a target exactly once. The last window is filled up with id 0 and target -100, which
    the loss ignores; the last batch may have fewer rows.
    """
    if len(tokens) < 2:
        raise UserError(f"{len(tokens)} tokens are too few to evaluate on: at least 2 are needed; give more text")
    n, size = len(tokens) - 1, batch_size * context  # targets in all, and in a full batch
    return (_window_batch(tokens, start, min(start + size, n), context) for start in range(0, n, size))


def _window_batch(tokens: np.ndarray, start: int, stop: int, context: int) -> tuple[Tensor, Tensor]:
    """The windows of which tokens[start:stop] are the inputs."""
    n_rows = -(-(stop - start) // context)
    idx = np.zeros(n_rows * context, dtype=np.int64)
    targets = np.full(n_rows * context, -100, dtype=np.int64)
    idx[: stop - start] = tokens[start:stop]
    targets[: stop - start] = tokens[start + 1 : stop + 1]
    return torch.from_numpy(idx.reshape(n_rows, context)), torch.from_numpy(targets.reshape(n_rows, context))


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
    texts: Iterable[tuple[int, str, str]], tokenizer: Tokenizer, folder: Path, dtype: np.dtype, n_bytes: int
) -> dict[str, dict[str, Any]]:
    """Encode into the .bin files; for each split what meta.json says about it."""
    progress = _Progress("encoding", n_bytes)
    last = dict.fromkeys(SPLITS, -1)  # number of the document that was written last
    with contextlib.ExitStack() as files:
        files.callback(progress.close)
        writers = {split: _Writer(files.enter_context(open(folder / f"{split}.bin", "wb")), dtype) for split in SPLITS}
        for (number, split, text), ids in _encoded(texts, tokenizer):
            if last[split] not in (-1, number):
                writers[split].write(np.array([tokenizer.eot_id]), 0)
            last[split] = number
            length = _utf8_length(text)
            writers[split].write(ids, length)
            progress.advance(length)
    return {
        split: {"tokens": writer.tokens, "bytes": writer.bytes, "sha256": writer.sha256.hexdigest()}
        for split, writer in writers.items()
    }


class _Writer:
    """A token file being written."""

    def __init__(self, file: BinaryIO, dtype: np.dtype) -> None:
        self.file, self.dtype = file, dtype
        self.tokens = self.bytes = 0
        self.sha256 = hashlib.sha256()

    def write(self, ids: np.ndarray, n_bytes: int) -> None:
        """ids: (n,) of any integer type, standing for n_bytes of UTF-8 text."""
        data = ids.astype(self.dtype).tobytes()
        self.file.write(data)
        self.sha256.update(data)
        self.tokens += len(ids)
        self.bytes += n_bytes


def _encoded(
    texts: Iterable[tuple[int, str, str]], tokenizer: Tokenizer
) -> Iterator[tuple[tuple[int, str, str], np.ndarray]]:
    """Each text with its ids, in order, encoded by a thread for each core and only a few pieces ahead."""
    n_threads = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    waiting: deque[tuple[tuple[int, str, str], Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(n_threads) as pool:
        for text in texts:
            waiting.append((text, pool.submit(tokenizer.encode_array, text[2])))
            if len(waiting) > 2 * n_threads:
                done, ids = waiting.popleft()
                yield done, ids.result()
        for done, ids in waiting:
            yield done, ids.result()


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

    def advance(self, n_bytes: int) -> None:
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
