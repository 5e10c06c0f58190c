"""Files that come from anywhere, read without trust: JSON, safetensors, and pickles of weights.

They are data, never code. A tensor is read only when asked for, so a caller can compare its shape with what it expects
first, and what is read is no more than the file holds. Links out of the folder are refused. Every error is a UserError
of one or two printable lines that names the file.
"""

from __future__ import annotations

import json
import math
import os
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model import files
from model.cli import UserError

SMALL, LARGE = 1 << 20, 1 << 24  # bytes that a JSON file may have: settings and headers, vocabularies
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # of weights that can be read
_LFS = b"version https://git-lfs"


def read_json(folder: Path, name: str, limit: int = SMALL) -> dict[str, Any]:
    """The object in a JSON file of at most `limit` bytes."""
    try:
        content = json.loads(read(folder, name, limit))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{folder / name} is not a JSON object: is the folder complete?")
    return content


def read(folder: Path, name: str, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes."""
    path = inside(folder, name)
    if (size := path.stat().st_size) > limit:
        raise UserError(f"{path} has {size:,} bytes, and such a file has at most {limit:,}: is it the right one?")
    return path.read_bytes()


def has(folder: Path, name: str) -> bool:
    """Whether there is anything of this name, such as a link to nothing, which must not be taken for absence."""
    return os.path.lexists(folder / name)


def inside(folder: Path, name: str) -> Path:
    """folder/name, a file in the folder. A link may lead to the blobs of Hugging Face's cache, where snapshots lie."""
    path, home = folder / name, folder.resolve()
    homes = (home, home.parent.parent / "blobs") if home.parent.name == "snapshots" else (home,)
    try:
        real = path.resolve()
    except (OSError, RuntimeError, ValueError):  # a link to itself, no name of a file
        real = Path()
    if Path(name).name != name or not any(real.is_relative_to(home) for home in homes):
        raise UserError(f"{quote(str(path))} leads out of the folder: put a copy of that file there instead")
    if not os.path.lexists(real):
        raise UserError(f"{folder} has no {name}: is it complete?")
    if not real.is_file():
        raise UserError(f"{path} is not a file")
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise UserError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in that folder")
    return path


def clean(text: object) -> str:
    """Foreign text, such as an error with names from a file, as one short printable line."""
    return textwrap.shorten("".join(c if c.isprintable() else " " for c in str(text)), 200, placeholder=" ...")


def quote(value: object) -> str:
    """A foreign value in a message."""
    return clean(repr(value)[:100])


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file, before it is read: `read` gives a copy, and takes as much memory as `shape` says."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (self.dtype.itemsize if isinstance(self.dtype, torch.dtype) else 0)

    def check_dtype(self, name: str) -> None:
        """UserError if it cannot be read. name: of the tensor."""
        if self.dtype not in DTYPES.values():
            raise UserError(f"{self.path}: {clean(name)} is {quote(self.dtype)}: convert it to float32 or 16 bits")


def stamp(path: Path) -> tuple[int, int]:
    """What tells whether a file has changed: its size in bytes, and when it was written, in ns."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def tensors(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of a safetensors file, or of a file of torch.save, by name."""
    return _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)


def _safetensors(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of a safetensors file. The library checks its header: lengths, offsets, overlaps, dtypes.

    They are read here: the library would map the file, which kills the process where a file is cut meanwhile.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > SMALL:
                raise ValueError(f"a header of {length:,} bytes")
            header = json.loads(file.read(length))
        with files.named_errors(path), safe_open(path, "np"):
            pass
    except (SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a complete safetensors file: {clean(error)}") from None
    for name, entry in header.items():
        if name != "__metadata__":
            shape, dtype = tuple(entry["shape"]), DTYPES.get(entry["dtype"], entry["dtype"])
            start = 8 + length + entry["data_offsets"][0]
            yield name, StoredTensor(path, shape, dtype, partial(_from_file, path, shape, dtype, start))


def _from_file(path: Path, shape: tuple[int, ...], dtype: torch.dtype, start: int) -> Tensor:
    n = math.prod(shape) * dtype.itemsize
    data = np.fromfile(path, np.uint8, n, offset=start)
    if data.size < n:
        raise UserError(f"{path} has changed while it was read: wait until the folder is complete")
    return torch.from_numpy(data).view(dtype).view(shape)


def _pickled(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of a file of torch.save, which is a pickle: only numbers are taken from it, nothing is executed."""
    try:
        is_zip = zipfile.is_zipfile(path)  # else it is older than 2020
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("it is compressed")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise ValueError("no tensors by name")
        for name, t in state.items():
            if not isinstance(t, Tensor) or t.layout != torch.strided or t.device.type != "cpu":
                raise ValueError(f"{quote(name)} is not a tensor of numbers")
            if t.numel() * t.itemsize > t.untyped_storage().nbytes():
                raise ValueError(f"{quote(name)} has fewer numbers than its shape says")
    except Exception as error:  # a hostile pickle can raise anything
        reason = clean(str(error).partition("\n")[0])
        raise UserError(f"{path} does not hold weights alone, nothing of it was executed: {reason}") from None
    for name, t in state.items():
        yield name, StoredTensor(path, tuple(t.shape), t.dtype, t.clone)
