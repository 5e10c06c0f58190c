"""Files and folders that appear whole or not at all.

Each is written under a temporary name next to its place and renamed. `durable` also flushes it and its folder to the
disk: after a power cut either the old or the new content is there. A crash leaves a file whose name begins with
`.tmp-`, or a folder with `.incomplete-` in its name or the temporary name that the caller chose.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from model.cli import UserError

TEMPORARY = ".tmp-"
_CLUTTER = {".DS_Store", "Thumbs.db", "desktop.ini"}  # of file managers, in folders that they have shown


def names(folder: Path) -> list[str]:
    """What a folder holds, without what file managers leave there."""
    return [path.name for path in folder.iterdir() if path.name not in _CLUTTER]


def refuse_existing(folder: Path) -> None:
    """Raise UserError unless `folder` is missing, or is empty and can be replaced."""
    if folder.exists() and not (folder.is_dir() and not names(folder)):
        raise UserError(f"{folder} exists and is not an empty folder: choose another, or remove it")
    refuse_fixed(folder)


def refuse_fixed(folder: Path) -> None:
    """Raise UserError for a folder whose place `new_folder` could not take: that would fail after all the work."""
    if folder.exists() and (os.path.samefile(folder, ".") or os.path.ismount(os.path.realpath(folder))):
        raise UserError(f"{folder} is the current folder or where a disk is mounted: choose a new folder in it")


@contextlib.contextmanager
def new_file(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield the path of a new file to write; it takes the place of `path` at the end, or is removed after an error.

    The caller flushes it. An error leaves the old content of `path`; an OSError without a file name is given `path`.
    """
    # The process id: the trainer and a user's command may write the same page at the same time.
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        with named_errors(path):
            yield temporary
            os.replace(temporary, path)
        if durable:
            fsync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, data: bytes | str, *, durable: bool = False) -> None:
    """Replace the content of `path`; str is encoded as UTF-8.

    On an error the old content stays, and the OSError names the file.
    """
    with new_file(path, durable=durable) as temporary:
        write_file(temporary, data, durable=durable)


def write_file(path: Path, data: bytes | str, *, durable: bool = False) -> None:
    """Write a file in place: for one in a folder that is itself renamed when complete."""
    with named_errors(path), path.open("wb") as file:
        file.write(data if isinstance(data, bytes) else data.encode("utf-8", "replace"))
        if durable:
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def new_folder(path: Path, temporary: Path | None = None, *, durable: bool = False) -> Iterator[Path]:
    """Yield the new folder `temporary` to fill; it is renamed to `path` at the end, or removed after an error.

    The caller flushes the files in it. A folder at `path`, or where that links to, is replaced; a crash in between
    leaves the old one as `temporary` with `-old` behind its name. OSErrors without a file name are given that of
    `path`. temporary: on the same disk, and not there yet; by default `path` with `.incomplete-...` behind its name.
    """
    path = Path(os.path.realpath(path))
    temporary = temporary or path.with_name(f"{path.name}.incomplete-{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    old = temporary.with_name(f"{temporary.name}-old")
    try:
        with named_errors(path):
            yield temporary
        if durable:
            fsync_folder(temporary)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if durable:
        fsync_folder(path.parent)
    if old.exists():
        shutil.rmtree(old)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Windows cannot open a folder, and its file system needs no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with named_errors(folder):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with named_errors(path), path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Give an OSError the name of the file: write() and fsync() do not say which one it was."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
