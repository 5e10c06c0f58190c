"""The text of ids as they come: whole characters, and no stop string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.cli import UserError
from model.generate import TextStream, stream_text
from model.tokenizer import GPT2Tokenizer


class Bytes:
    """A tokenizer whose ids are bytes: every cut is possible."""

    def decode_bytes(self, ids) -> bytes:
        return bytes(ids)


@given(st.text())
def test_no_piece_breaks_a_character(text):
    pieces = list(stream_text(text.encode(), Bytes()))
    assert pieces == list(text)  # one piece per character, each when its last byte came


@given(st.lists(st.integers(0, 255)))
def test_bytes_that_are_not_utf8_stream_as_they_decode(ids):
    assert "".join(stream_text(ids, Bytes())) == bytes(ids).decode("utf-8", errors="replace")


def test_gpt2_tokens_that_end_inside_a_character():
    tokenizer = GPT2Tokenizer()
    text = "naïve 🦊🦊 日本語 — “quoted”"
    ids = tokenizer.encode(text)
    assert any("\ufffd" in tokenizer.decode([i]) for i in ids)  # there are such tokens
    pieces = list(stream_text(ids, tokenizer))
    assert "".join(pieces) == text and len(pieces) > 5


def test_unfinished_character_is_replaced():
    assert list(stream_text([*b"a", *"🦊".encode()[:2]], Bytes())) == ["a", "\ufffd"]


def test_text_comes_as_early_as_it_is_complete():
    drawn = []
    fox = "🦊".encode()
    stream = stream_text((drawn.append(b) or b for b in (*b"a", *fox, *b"b")), Bytes())
    assert [(next(stream), len(drawn)) for _ in range(3)] == [("a", 1), ("🦊", 5), ("b", 6)]


# --- stop strings


def up_to_a_stop(text: str, stops: list[str]) -> str:
    """Character by character: the text before the stop string that is complete first."""
    for n in range(len(text) + 1):
        if complete := [stop for stop in stops if text[:n].endswith(stop)]:
            return text[: n - max(map(len, complete))]
    return text


@given(st.text("abé", max_size=12), st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_a_stop_string(text, stops):
    """At any tokens: here each byte is one. Nothing is held back but what may become a stop string."""
    stream, shown, fed = TextStream(Bytes(), stops), "", b""
    for byte in text.encode():
        shown, fed = shown + stream.feed(byte), fed + bytes([byte])
        if not stream.stopped:
            held = fed.decode(errors="ignore").removeprefix(shown)
            possible = [held[i:] for i in range(len(held)) if any(stop.startswith(held[i:]) for stop in stops)]
            assert held == max(possible, key=len, default="")
    assert shown + stream.end() == up_to_a_stop(text, stops)


class Words:
    """A tokenizer of these tokens."""

    def __init__(self, *tokens: str) -> None:
        self.tokens = tokens

    def decode_bytes(self, ids) -> bytes:
        return "".join(self.tokens[i] for i in ids).encode()


@pytest.mark.parametrize(
    ("tokens", "stops", "pieces"),
    [
        (["one ", "T", "HE END two"], ["THE END"], ["one "]),
        (["one THE E", "N"], ["THE END"], ["one ", "THE EN"]),  # it never came
        (["one THE E", "Nough"], ["THE END"], ["one ", "THE ENough"]),
        (["abcd"], ["abcd", "bc"], ["a"]),  # the first to be complete
        (["a", "b", "c"], ["c", "ab"], []),
        (["aab"], ["ab"], ["a"]),
        (["xaa", "ab"], ["aab"], ["x", "a"]),
    ],
)
def test_stop_strings_across_tokens(tokens, stops, pieces):
    drawn = []
    ids = (drawn.append(i) or i for i in range(len(tokens)))
    assert list(stream_text(ids, Words(*tokens), stops)) == pieces


def test_no_id_is_asked_for_after_a_stop_string():
    ids = iter(range(4))
    assert list(stream_text(ids, Words("a", "b", "c", "d"), ["b"])) == ["a"]
    assert next(ids) == 2


def test_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="a stop string must not be empty"):
        TextStream(Bytes(), ["x", ""])
