"""Books as they come: find the text files, decode them, take Project Gutenberg's wrapping off.

    python -m model.books list [FOLDER]     # the works in FOLDER (default: Book) with chapters, characters and words

A file goes through `read` (bytes -> text) and `clean` (text -> the work alone); both are streams that hold about a
megabyte, whatever the size of the file.
"""

from __future__ import annotations

import codecs
import io
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from model.cli import UserError, run

_READ_BYTES = 1 << 20

# Characters, from the beginning of the file or from an END line, that may be dropped at once as Project Gutenberg's
# words. Theirs are about 1,000 before a work and 19,000 after it. It also limits the length of a line in memory.
_MARGIN = 1 << 16
_START = re.compile(r"\s*\*\*\*\s*START OF TH(?:E|IS) PROJECT GUTENBERG E(?:BOOK|TEXT)", re.IGNORECASE)
_END = re.compile(r"\s*\*\*\*\s*END OF TH(?:E|IS) PROJECT GUTENBERG E(?:BOOK|TEXT)", re.IGNORECASE)


def documents(source: Path) -> list[Path]:
    """The text files of a corpus: `source` itself if it is a file, else every *.txt under that folder, sorted.

    In a folder, README files and whatever has a name that begins with a dot are passed over.
    """
    source = Path(source)
    if source.is_file():
        return [source]
    if not source.exists():
        raise UserError(f"no such file or folder: {source}\ngive the path of a text file, or of a folder of .txt files")
    if not source.is_dir():
        raise UserError(f"{source} is neither a file nor a folder: save the text in a file first, it is read twice")
    found = []
    for folder, subfolders, files in os.walk(source, onerror=_raise):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(folder, name) for name in files if _is_text_name(name)]
    if not (found := sorted(path for path in found if path.is_file())):
        raise UserError(f"no .txt file in the folder {source}: put text files there, or give the path of one")
    return found


def _is_text_name(name: str) -> bool:
    stem, suffix = os.path.splitext(name.lower())
    return suffix == ".txt" and stem != "readme" and not name.startswith(".")


def _raise(error: OSError) -> None:
    raise error  # os.walk would pass over a folder that it cannot read


def read(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in parts of about a million characters at most.

    UserError names the file where it is not text (it has a NUL byte) or not UTF-8 (with the offset of the first byte).
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
            pending = len(decoder.getstate()[0])  # bytes of a character that the last part cut in two
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                where = offset - pending + error.start
                wrong = error.object[error.start]
                raise UserError(
                    f"{path} is not UTF-8: byte 0x{wrong:02x} at offset {where:,}\n{_iconv('WINDOWS-1252', path)}"
                ) from None
            if not data:
                return
            offset += len(data)
            yield text


def _iconv(encoding: str, path: Path) -> str:
    return f"convert it first, for example: iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > utf8.txt"


def clean(lines: Iterable[str]) -> Iterator[str]:
    """Text without a byte-order mark, CR line ends and Project Gutenberg's header and footer.

    lines: the text in order, as lines or in any other parts. Yields lines that end with "\\n" (the last one may not;
    a line of more than 65,536 characters may come in several parts).

    The header is everything up to the line `*** START OF THE PROJECT GUTENBERG EBOOK ... ***`, if that line lies within
    the first 65,536 characters; further down it is text. The footer begins with the line `*** END OF THE ...` and lasts
    to the end of the text, or to the next START line where files were joined; if neither comes within 65,536
    characters, it was no footer and it stays. Only whole lines count, so a work may speak of Project Gutenberg. Blank
    lines next to a header or footer go with it. A text without these two lines keeps every other character.
    """
    outside = True  # in what may be a header or a footer: `held`, of `size` characters
    ended = False  # `held` begins with an END line
    held: list[str] = []
    size = 0
    blank: list[str] = []  # blank lines in a work, which are not part of it if a footer comes next
    trim = False  # right behind a START line
    wrapped = False  # the START line lacks its closing asterisks: a long title goes on in the next line
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
        elif outside:  # the END line of a work whose header is gone
            while held and held[-1].isspace():
                held.pop()
            yield from held
            ended, held, size = True, [line], len(line)
        elif line.isspace() and max(len(line), len(blank)) < 1000:  # no run of white space may fill the memory
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


def _lines(parts: Iterable[str]) -> Iterator[str]:
    """The lines of a text that comes in any parts; line ends become "\\n", and a byte-order mark is dropped."""
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    first = True
    rest = ""
    for part in parts:
        text = newlines.decode(part)
        if first and text:
            text = text.removeprefix("\ufeff")
            first = False
        lines = io.StringIO(rest + text).readlines()
        rest = lines.pop() if lines and not lines[-1].endswith("\n") and len(lines[-1]) < _MARGIN else ""
        yield from lines
    if rest := rest + newlines.decode("", final=True):
        yield rest


@dataclass(frozen=True)
class Work:
    """What a file of Book/ holds, counted after `clean`."""

    path: Path
    chapters: int
    characters: int
    words: int


_CHAPTER = re.compile(r"\s*chapter\s+\w", re.IGNORECASE)


def survey(path: Path) -> Work:
    """Count the chapters, characters and words of one file.

    A chapter begins with a line such as `CHAPTER IV.` after a blank line; a table of contents, which has several such
    lines in a row, does not count.
    """
    chapters = characters = words = 0
    after_blank, heading = True, False  # heading: the line before this one may begin a chapter
    for line in clean(read(path)):
        characters += len(line)
        words += len(line.split())
        is_chapter = _CHAPTER.match(line) is not None
        chapters += heading and not is_chapter
        heading = is_chapter and after_blank
        after_blank = line.isspace()
    return Work(path, chapters + heading, characters, words)


@dataclass(frozen=True)
class BooksConfig:
    """List the works in a folder of text files with their chapters, characters and words."""

    command: Positional[Literal["list"]]
    folder: Positional[Path] = Path("Book")
    """folder of .txt files"""


def main(config: BooksConfig) -> None:
    """Print one line for each work, and their sum."""
    works = [survey(path) for path in documents(config.folder)]
    total = Work(
        path=config.folder,
        chapters=sum(work.chapters for work in works),
        characters=sum(work.characters for work in works),
        words=sum(work.words for work in works),
    )
    root = config.folder if config.folder.is_dir() else config.folder.parent
    names = [str(work.path.relative_to(root)) for work in works] + [f"{len(works)} in all"]
    width = max(map(len, names))
    print(f"{'work':{width}}  chapters   characters        words")
    for name, work in zip(names, [*works, total], strict=True):
        print(f"{name:{width}}  {work.chapters:8,}  {work.characters:11,}  {work.words:11,}")


if __name__ == "__main__":
    run(main, BooksConfig, prog="python -m model.books")
