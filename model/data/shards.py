"""Token shards on disk, in the layout of llm.c and modded-nanogpt, and a view of many as one sequence of ids.

    256 little-endian int32: magic number, version, number of ids, zeros        1,024 bytes
    the ids, uint16 (magic 20240520, version 1) or uint32 (20240801, 7)         2 or 4 bytes each

The magic numbers are those of llm.c's dev/data/data_common.py. A shard holds fewer than 2**31 ids.
"""

from __future__ import annotations

import functools
import hashlib
import mmap
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from model import files
from model.cli import UserError

HEADER_BYTES = 1024
MAX_TOKENS = 2**31 - 1
# magic number: version, type of the ids
_KINDS: dict[int, tuple[int, np.dtype]] = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
_BLOCK_BYTES = 1 << 20
# A mapped file keeps a descriptor open, and many systems allow a process 1,024 of them.
_MAX_MAPPED = 256


class BadShard(UserError):
    """A shard that cannot be used, and why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is a bad shard: {reason}\nput a good copy there, or skip it: --skip-bad-shards")
        self.path, self.reason = path, reason


@dataclass(frozen=True)
class Shard:
    """A shard whose header fits the file."""

    path: Path
    tokens: int
    dtype: np.dtype
    size_and_time: tuple[int, int]  # bytes, and nanoseconds of the last change

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Read the header. BadShard if the file is missing, cannot be read, or is not a shard."""
        try:
            with path.open("rb") as file:
                header = file.read(HEADER_BYTES)
                stat = os.fstat(file.fileno())
        except FileNotFoundError:
            moved = "" if path.parent.exists() else f" (there is no folder {path.parent}: was it moved?)"
            raise BadShard(path, f"it is missing{moved}") from None
        except OSError as error:
            raise BadShard(path, f"it cannot be read ({error.strerror or error})") from None
        size = stat.st_size
        if len(header) < HEADER_BYTES:
            raise BadShard(path, f"it has {size:,} bytes, the header alone has {HEADER_BYTES:,}")
        magic, version, tokens = np.frombuffer(header, "<i4", count=3).tolist()
        if magic not in _KINDS:
            raise BadShard(path, f"its magic number is {magic}, that of a shard is {' or '.join(map(str, _KINDS))}")
        known_version, dtype = _KINDS[magic]
        if version != known_version:
            raise BadShard(path, f"its header has version {version}, this project reads {known_version}")
        if tokens == 0:
            raise BadShard(path, "it is empty")
        if size != (expected := HEADER_BYTES + tokens * dtype.itemsize):
            raise BadShard(path, f"it has {size:,} bytes instead of {expected:,} for the {tokens:,} ids of its header")
        return cls(path.absolute(), tokens, dtype, (size, stat.st_mtime_ns))

    def map(self) -> np.ndarray:
        """(tokens,) ids, read-only; the file stays open as long as the array exists."""
        with self.path.open("rb") as file:
            stat = os.fstat(file.fileno())
            if (stat.st_size, stat.st_mtime_ns) != self.size_and_time:
                advice = "resume the run: that compares its content with what it was"
                raise UserError(f"{self.path} was changed while it was in use\n{advice}")
            with files.named_errors(self.path):
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):  # not on Windows
            mapped.madvise(mmap.MADV_RANDOM)  # else a page fault reads up to megabytes around the page
        return np.frombuffer(mapped, self.dtype, self.tokens, HEADER_BYTES)


def is_headless(path: Path) -> bool:
    """Whether a file that can be read has something else than a magic number at its beginning."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError:
        return False
    return bool(magic) and int.from_bytes(magic, "little") not in _KINDS


def scan(path: Path, id_bytes: np.ndarray, advance: Callable[[int], None] = lambda n_bytes: None) -> dict[str, Any]:
    """Read all of a shard -> {"tokens", "bytes", "largest_id", "size", "mtime_ns", "sha256"}.

    id_bytes: (vocabulary,) integers, the UTF-8 length of each id; "bytes" is their sum. advance: called with the bytes
    read since the last call. BadShard if an id is outside the vocabulary, or the file cannot be read to its end.
    """
    shard = Shard.open(path)
    sha256 = hashlib.sha256()
    tokens = n_bytes = largest = 0
    try:
        with path.open("rb") as file:
            sha256.update(file.read(HEADER_BYTES))
            while block := file.read(_BLOCK_BYTES):
                sha256.update(block)
                ids = np.frombuffer(block, shard.dtype, count=len(block) // shard.dtype.itemsize)
                largest = max(largest, int(ids.max(initial=0)))
                if largest >= len(id_bytes):
                    raise BadShard(path, f"it has the id {largest:,}, outside the vocabulary of {len(id_bytes):,} ids")
                n_bytes += int(id_bytes[ids].sum(dtype=np.int64))
                tokens += len(ids)
                advance(len(block))
    except OSError as error:
        raise BadShard(path, f"it cannot be read ({error.strerror or error})") from None
    if tokens != shard.tokens:
        raise BadShard(path, "it changed while it was being read")
    size, mtime_ns = shard.size_and_time  # from before the content was read: any later write changes the time
    return {
        "tokens": tokens, "bytes": n_bytes, "largest_id": largest, "size": size, "mtime_ns": mtime_ns,
        "sha256": sha256.hexdigest(),
    }  # fmt: skip


class Writer:
    """Write ids as the shards FOLDER/SPLIT_000000.bin, ... of at most shard_tokens ids each.

    No ids make no shard. The header is written last, so a shard cut short by a kill is not a valid one.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int) -> None:
        """dtype: <u2 or <u4. shard_tokens: 1 to MAX_TOKENS."""
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.paths: list[Path] = []
        self._magic, (self._version, self._dtype) = next(kind for kind in _KINDS.items() if kind[1][1] == dtype)
        self._file: BinaryIO | None = None
        self._tokens = 0  # written to that file

    def write(self, ids: np.ndarray) -> None:
        """ids: (n,) of any integer type."""
        while len(ids):
            if self._file is None:
                self.paths.append(self.folder / f"{self.split}_{len(self.paths):06d}.bin")
                self._file, self._tokens = self.paths[-1].open("wb"), 0
                self._file.write(bytes(HEADER_BYTES))
            part, ids = np.split(ids, [self.shard_tokens - self._tokens])
            self._file.write(part.astype(self._dtype).tobytes())
            self._tokens += len(part)
            if self._tokens == self.shard_tokens:
                self.close()

    def close(self) -> None:
        """Finish the last shard."""
        if self._file is not None:
            with self._file as file:
                self._file = None
                file.seek(0)
                file.write(np.array([self._magic, self._version, self._tokens], "<i4").tobytes())


class Tokens:
    """The ids of several shards as one read-only sequence, memory-mapped on first use. Any thread may read it."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = tuple(shards)
        self.dtype = np.result_type(np.uint16, *(shard.dtype for shard in shards))
        self._ends = list(accumulate(shard.tokens for shard in shards))  # of each shard, in the sequence
        self._map = functools.lru_cache(_MAX_MAPPED)(lambda number: self.shards[number].map())

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, where: slice) -> np.ndarray:
        """A copy of tokens[start:stop], (n,) uint16 or uint32."""
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise ValueError(f"a slice of tokens must have step 1, got {step}")
        ids = np.empty(max(stop - start, 0), self.dtype)
        self._copy(start, ids)
        return ids

    def rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """tokens[start : start + length] for each of `starts`, (n,) integers -> (n, length) int64.

        IndexError for a row that is not entirely within the tokens.
        """
        if len(starts) and (starts.min() < 0 or starts.max() + length > len(self)):
            raise IndexError(f"rows of {length:,} ids at {starts.min():,} to {starts.max():,} of {len(self):,}")
        rows = np.empty((len(starts), length), np.int64)
        for start, row in zip(starts.tolist(), rows, strict=True):
            self._copy(start, row)
        return rows

    def _copy(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with the ids from `start` on."""
        number = bisect_right(self._ends, start)
        filled = 0
        while filled < len(out):
            offset = start + filled - self._ends[number]  # below zero: counted from the end of the shard
            ids = self._map(number)[offset:][: len(out) - filled]
            out[filled : filled + len(ids)] = ids
            filled += len(ids)
            number += 1
