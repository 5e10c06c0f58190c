"""Books: what is taken off a Gutenberg file, what never is, which files are read, and which are refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.cli import UserError, run
from model.data import __main__ as data_main
from model.data import books
from model.data.books import clean, documents, read, survey

START = "*** START OF THE PROJECT GUTENBERG EBOOK A BOOK ***\n"
END = "*** END OF THE PROJECT GUTENBERG EBOOK A BOOK ***\n"
HEADER = "The Project Gutenberg eBook of A Book\n\nTitle: A Book\n\n"
FOOTER = "\nUpdated editions will replace the previous one.\nSTART: FULL LICENSE\n"


def cleaned(text: str) -> str:
    return "".join(clean([text]))


# Cleaning


def test_header_and_footer_include_neighbouring_blank_lines():
    assert cleaned(HEADER + START + "\n \n\nCHAPTER I.\n\nText.\n\n\n" + END + FOOTER) == "CHAPTER I.\n\nText.\n"


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (
            "*** START OF THIS PROJECT GUTENBERG EBOOK A BOOK ***\n",
            "*** END OF THIS PROJECT GUTENBERG EBOOK A BOOK ***\n",
        ),
        ("***START OF THE PROJECT GUTENBERG EBOOK A BOOK***\n", "***END OF THE PROJECT GUTENBERG EBOOK A BOOK***\n"),
        (START, " " * 12 + END),
        ("*** START OF THE PROJECT GUTENBERG EBOOK A VERY LONG\nTITLE ***\n", END),
        ("*** Start of the Project Gutenberg eBook A Book ***\n", END.rstrip()),
    ],
)
def test_forms_of_the_two_lines(start, end):
    assert cleaned(HEADER + start + "Text.\n" + end) == "Text.\n"


def test_start_line_without_closing_asterisks_costs_no_text():
    assert cleaned("*** START OF THE PROJECT GUTENBERG EBOOK A BOOK\nText.\nMore.\n") == "Text.\nMore.\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n  leading and trailing blank lines stay\n\n\n",
        "no line end",
        "I got it from Project Gutenberg, a library.\n*** \nThe Project Gutenberg eBook of A Book\n",
        "see the line *** START OF THE PROJECT GUTENBERG EBOOK A BOOK *** there\nText.\n",
        "see the line *** END OF THE PROJECT GUTENBERG EBOOK A BOOK *** there\nText.\n",
        "form\x0cfeed, \x1c, \x85 and \u2028 are not line ends\n",
    ],
)
def test_a_text_without_the_two_lines_is_unchanged(text):
    assert cleaned(text) == text
    assert "".join(clean(text.splitlines(keepends=True))) == text


def test_only_one_of_the_two_lines():
    assert cleaned(HEADER + START + "\nText.\n\n") == "Text.\n\n"
    assert cleaned("\nText.\n\n" + END + FOOTER) == "\nText.\n"


def test_start_line_far_into_a_text_is_text():
    text = "A line of a long essay on file formats.\n" * 2000 + START + "More.\n"
    assert len(text) > books._MARGIN
    assert cleaned(text) == text


def test_end_line_before_long_text_is_text():
    body = "Text.\n\n" + END + "A line of a long essay on file formats.\n" * 2000
    assert cleaned(HEADER + START + body) == body
    assert cleaned(HEADER + START + body + "\n" + END + FOOTER) == body


def test_works_joined_in_one_file_are_all_kept():
    book = "\ufeff" + HEADER + START + "\nWork %d.\n\n" + END + FOOTER
    assert cleaned("".join(book % i for i in range(3))) == "Work 0.\n\nWork 1.\n\nWork 2.\n"


def test_byte_order_mark_and_line_ends():
    assert cleaned("\ufeffone\r\ntwo\rthree\n\r\n") == "one\ntwo\nthree\n\n"
    assert list(clean(["\ufeffone\r", "\ntwo\r", "three\r"])) == ["one\n", "two\n", "three\n"]
    assert cleaned("a\ufeffb") == "".join(clean(["a", "\ufeffb"])) == "a\ufeffb"
    assert cleaned(("\ufeff" + HEADER + START + "Text.\n" + END).replace("\n", "\r\n")) == "Text.\n"


LINES = st.sampled_from(["Text.\n", "\n", "  \n", "*** \n", "a\r\n", "b\r", START, END, HEADER, "no end"])


@given(lines=st.lists(LINES, max_size=12), cuts=st.lists(st.integers(0, 300), max_size=8))
def test_result_does_not_depend_on_the_parts(lines, cuts):
    text = "".join(lines)
    bounds = [0, *sorted(cuts), len(text)]
    parts = [text[a:b] for a, b in itertools.pairwise(bounds)]
    assert "".join(clean(parts)) == cleaned(text)
    assert list(clean(parts)) == list(clean([text]))


@pytest.mark.parametrize("line", ["x" * 100, "x" * 99 + "\n", " " * 99 + "\n", "\n"])
def test_cleaning_streams(line):
    # whatever the lines are, the first text comes out long before the last goes in
    taken = 0

    def parts():
        nonlocal taken
        yield HEADER + START + "Text.\n"
        for _ in range(20_000):
            taken += 1
            yield line

    stream = clean(parts())
    assert next(stream) == "Text.\n"
    next(stream)
    assert taken * len(line) <= 2 * books._MARGIN + 2000 * len(line)


# Files


def test_documents_of_a_folder(tmp_path):
    names = ["b.txt", "a.TXT", "sub/c.txt", "sub/deep/a.txt"]
    passed_over = ["README.txt", "readme.md", "notes.md", ".hidden.txt", ".git/x.txt", "picture.png", "sub/ReadMe.txt"]
    for name in names + passed_over:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "folder.txt").mkdir()
    assert [str(path.relative_to(tmp_path)) for path in documents(tmp_path)] == sorted(names)


def test_documents_follow_links_to_folders_once(tmp_path):
    corpus, other = tmp_path / "corpus", tmp_path / "other"
    for path in (corpus / "real/a.txt", other / "b.txt"):
        path.parent.mkdir(parents=True)
        path.write_text("x")
    for name, target in (("link", other), ("again", other), ("a", corpus / "real"), ("real/loop", corpus)):
        (corpus / name).symlink_to(target, target_is_directory=True)
    assert [str(path.relative_to(corpus)) for path in documents(corpus)] == ["again/b.txt", "real/a.txt"]


def test_documents_of_a_file_is_that_file(tmp_path):
    (tmp_path / "README.md").write_text("x")
    assert documents(tmp_path / "README.md") == [tmp_path / "README.md"]


def test_documents_refuses(tmp_path):
    with pytest.raises(UserError, match=r"no such file or folder.*missing"):
        documents(tmp_path / "missing")
    with pytest.raises(UserError, match=r"no \.txt file"):
        documents(tmp_path)
    with pytest.raises(UserError, match="neither a file nor a folder"):
        documents(Path("/dev/null"))


def test_read_joins_split_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(books, "_READ_BYTES", 3)
    (tmp_path / "a.txt").write_text("naïve 🙂 中文", encoding="utf-8")
    assert "".join(read(tmp_path / "a.txt")) == "naïve 🙂 中文"


@pytest.mark.parametrize("size", [2, 7, 1 << 20])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"0123456789\0", r"NUL byte at offset 10\b"),
        ("text".encode("utf-16"), "UTF-16"),
        ("na\u00efve caf\u00e9".encode("latin-1"), r"byte 0xef at offset 2\b"),
        ("\u00e9\u00e9\u00e9\u00e9".encode() + b"\xe9 x", r"byte 0xe9 at offset 8\b"),
        ("ok 🙂".encode()[:-1], r"byte 0xf0 at offset 3\b"),
    ],
)
def test_read_names_the_file_and_the_place(tmp_path, monkeypatch, data, message, size):
    monkeypatch.setattr(books, "_READ_BYTES", size)
    (tmp_path / "odd.txt").write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        list(read(tmp_path / "odd.txt"))
    assert "odd.txt" in str(error.value)
    assert ("iconv" in str(error.value)) == ("NUL" not in message)
    assert len(str(error.value).splitlines()) <= 2


# The list

BOOK = """A Book

Contents

 CHAPTER I.   One
 CHAPTER II.  Two

CHAPTER I.
One

It was chapter three of the story.

CHAPTER II.

Two words
CHAPTER is not a heading in the middle of a paragraph.
"""


def test_survey_counts(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeff" + HEADER + START + BOOK + END, encoding="utf-8")
    work = survey(tmp_path / "a.txt")
    assert (work.chapters, work.characters, work.words) == (2, len(BOOK), len(BOOK.split()))


def test_a_heading_in_the_last_line_counts(tmp_path):
    (tmp_path / "a.txt").write_text("Text.\n\nChapter 2")
    assert survey(tmp_path / "a.txt").chapters == 1


def test_list_command(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(BOOK)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("Chapter 1\n\nHello.\n")
    run(data_main.main, data_main.Command, prog="data", argv=["list", str(tmp_path)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    n, words = len(BOOK), len(BOOK.split())
    assert rows[0] == ["work", "chapters", "characters", "words"]
    assert rows[1:] == [
        ["a.txt", "2", str(n), str(words)],
        ["sub/b.txt", "1", "18", "3"],
        ["2", "in", "all", "3", str(n + 18), str(words + 3)],
    ]


def test_list_command_refuses_bad_input(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(data_main.main, data_main.Command, prog="data", argv=["list", str(tmp_path / "missing")])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("error: no such file or folder")
