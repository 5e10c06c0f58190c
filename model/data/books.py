"""Text files of a corpus: find them, decode them, strip Project Gutenberg's header and footer.

`read` (bytes -> text), `clean` (text -> the work alone) and `blocks` (both) are streams that hold about a megabyte,
whatever the size of the file.
"""

from __future__ import annotations

import codecs
import io
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from model.cli import UserError

_READ_BYTES = 1 << 20
_BLOCK = 1 << 17  # characters
_TEXT_NAME = r"(?!readme\.txt)[^.].*\.txt"
# Longest header or footer in characters; Project Gutenberg's have about 1,000 and 19,000. Also the longest line that is
# held in memory.
_MARGIN = 1 << 16
_START = re.compile(r"\s*\*\*\*\s*START OF TH(?:E|IS) PROJECT GUTENBERG E(?:BOOK|TEXT)", re.IGNORECASE)
_END = re.compile(r"\s*\*\*\*\s*END OF TH(?:E|IS) PROJECT GUTENBERG E(?:BOOK|TEXT)", re.IGNORECASE)


def documents(source: Path) -> list[Path]:
    """The text files of a corpus: `source` itself if it is a file, else every *.txt under that folder, sorted.

    In a folder, README files and names that begin with a dot are skipped. Links to folders are followed, and no folder
    is read twice.
    """
    source = Path(source)
    if source.is_file():
        return [source]
    if not source.exists():
        raise UserError(f"no such file or folder: {source}\ngive the path of a text file, or of a folder of .txt files")
    if not source.is_dir():
        raise UserError(f"{source} is neither a file nor a folder: save the text in a file first, as it is read twice")

    def fail(error: OSError) -> None:
        raise error  # os.walk would skip a folder that it cannot read

    paths, seen = [], set()
    for folder, subfolders, names in os.walk(source, onerror=fail, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        # Links last and in order: of a folder and a link to it beside it, the folder names the files.
        subfolders[:] = sorted(
            (name for name in subfolders if not name.startswith(".")),
            key=lambda name: (os.path.islink(os.path.join(folder, name)), name),
        )
        paths += [Path(folder, name) for name in names if re.fullmatch(_TEXT_NAME, name, re.IGNORECASE)]
    paths = sorted(path for path in paths if path.is_file())
    if not paths:
        raise UserError(f"no .txt file in the folder {source}: put text files there, or give the path of one")
    return paths


def read(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in parts of at most about a million characters.

    UserError names a file that is not text (it has a NUL byte) or not UTF-8 (with the offset of the first bad byte).
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # of `data` in the file
    with open(path, "rb") as file:
        while True:
            data = file.read(_READ_BYTES)
            if offset == 0 and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UserError(f"{path} is UTF-16, not UTF-8\n{_iconv('UTF-16', path)}")
            if (nul := data.find(b"\0")) >= 0:
                raise UserError(f"{path} is not a text file: it has a NUL byte at offset {offset + nul:,}")
            pending = len(decoder.getstate()[0])  # bytes of a character that the last part split
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                where = f"byte 0x{error.object[error.start]:02x} at offset {offset - pending + error.start:,}"
                raise UserError(f"{path} is not UTF-8: {where}\n{_iconv('WINDOWS-1252', path)}") from None
            if not data:
                return
            offset += len(data)
            yield text


def _iconv(encoding: str, path: Path) -> str:
    return f"convert it first, for example: iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > utf8.txt"


def clean(lines: Iterable[str]) -> Iterator[str]:
    """Text without a byte-order mark, CR line ends and Project Gutenberg's header and footer.

    lines: the text in any parts. Yields lines that end with "\\n" (the last one may not; one of more than 65,536
    characters may come in several parts).

    The header is everything up to the line `*** START OF THE PROJECT GUTENBERG EBOOK ... ***`, if that line lies within
    the first 65,536 characters. The footer begins with the line `*** END OF THE ...` and lasts to the end of the text,
    or to the next START line in joined files; if neither comes within 65,536 characters, it is text. Blank lines next
    to a header or footer are part of it. A text without these two lines keeps every other character.
    """
    outside = True  # inside a possible header or footer: `held`, of `size` characters
    ended = False  # `held` begins with an END line
    held: list[str] = []
    size = 0
    blank: list[str] = []  # blank lines in a work, dropped if a footer follows
    trim = False  # right after a START line
    wrapped = False  # the START line lacks its closing asterisks: a long title continues on the next line
    for line in _lines(lines):
        if wrapped:
            wrapped = False
            if line.rstrip().endswith("***"):
                continue
        if outside and _START.match(line):
            if ended:
                yield "\n"  # between two works in one file
            outside, trim, wrapped = False, True, not line.rstrip().endswith("***")
        elif outside and (ended or not _END.match(line)):
            held.append(line)
            size += len(line)
            if size > _MARGIN:
                yield from held
                outside = False
        elif outside:  # the END line of a work without a header
            while held and held[-1].isspace():
                held.pop()
            yield from held
            ended, held, size = True, [line], len(line)
        elif line.isspace() and max(len(line), len(blank)) < 1000:  # a run of white space must not fill the memory
            if not trim:
                blank.append(line)
        elif "***" in line and _END.match(line):
            outside, ended, held, size = True, True, [*blank, line], len(line)
            blank.clear()
        else:
            trim = False
            yield from blank
            blank.clear()
            yield line
    yield from blank
    if outside and not ended:
        yield from held


def blocks(path: Path) -> Iterator[str]:
    """The clean text of a file in parts of about 131,072 characters, which cost less than its lines one by one."""
    block = io.StringIO()
    for line in clean(read(path)):
        block.write(line)
        if block.tell() >= _BLOCK:
            yield block.getvalue()
            block = io.StringIO()
    if block.tell():
        yield block.getvalue()


def _lines(parts: Iterable[str]) -> Iterator[str]:
    """The lines of a text in parts; line ends become "\\n", and a byte-order mark is dropped."""
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    mark, rest = "\ufeff", ""
    for part in parts:
        if text := newlines.decode(part):
            text, mark = text.removeprefix(mark), ""
        lines = io.StringIO(rest + text).readlines()
        rest = lines.pop() if lines and not lines[-1].endswith("\n") and len(lines[-1]) < _MARGIN else ""
        yield from lines
    if rest := rest + newlines.decode("", final=True):
        yield rest


class Work(NamedTuple):
    """The counts of one file, after `clean`."""

    chapters: int
    characters: int
    words: int


_CHAPTER = re.compile(r"\s*chapter\s+\w", re.IGNORECASE)


def survey(path: Path) -> Work:
    """Count one file. A chapter begins with a line such as `CHAPTER IV.` after a blank line, unless several such lines
    follow each other, as in a table of contents."""
    chapters = characters = words = 0
    after_blank, heading = True, False  # heading: the previous line may begin a chapter
    for line in clean(read(path)):
        characters += len(line)
        words += len(line.split())
        is_chapter = _CHAPTER.match(line) is not None
        chapters += heading and not is_chapter
        heading = is_chapter and after_blank
        after_blank = line.isspace()
    return Work(chapters + heading, characters, words)
