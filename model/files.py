"""Files and folders that appear whole or not at all.

A file is written under a temporary name in its own folder and renamed. `durable` also flushes the file and the folder
to the disk: after a power cut either the old or the new content is there. A crash leaves only names that begin with
`.tmp-`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = ".tmp-"


def write_atomic(path: Path, data: bytes | str, *, durable: bool = False) -> None:
    """Replace the content of `path`; str is encoded as UTF-8.

    On an error the old content stays, and the OSError names the file.
    """
    # The process id: the trainer and a user's command may write the same page at the same time.
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        write_file(temporary, data, durable=durable)
        with named_errors(path):
            os.replace(temporary, path)
        if durable:
            fsync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_file(path: Path, data: bytes | str, *, durable: bool = False) -> None:
    """Write a file in place: for one in a folder that is itself renamed when complete."""
    with named_errors(path), path.open("wb") as file:
        file.write(data if isinstance(data, bytes) else data.encode("utf-8", "replace"))
        if durable:
            file.flush()
            os.fsync(file.fileno())


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
    with path.open("rb") as file:
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
