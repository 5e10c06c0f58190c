"""Text to token ids and back.

A tokenizer is saved as one JSON file, `tokenizer.json`, and read by `load_tokenizer`. TOKENIZERS lists the kinds:

    char   one id for each character of the text that it was built from
    gpt2   byte-pair encoding with GPT-2's 50,257 ids (Radford et al. 2019), computed by tiktoken

The last id of each is the end-of-text id, which separates documents. Encoding never returns it (the characters
`<|endoftext|>` in a text are text), and it decodes to "".

GPT-2's vocabulary is in assets/ (OpenAI, MIT; see assets/LICENSE-gpt2-vocabulary.txt); nothing is downloaded.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import json
import lzma
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tiktoken

from model.cli import UserError
from model.files import write_atomic

FILE = "tokenizer.json"
FORMAT = 1

PIECE = (
    1 << 17
)  # characters in one of `pieces`: enough to hide the cost of a call, few enough to keep every thread busy
LONGEST_PIECE = 1 << 18  # without a good place to cut; 500,000 spaces overflow the stack of tiktoken's regex engine


class Tokenizer(ABC):
    """Text <-> token ids 0 .. n_vocab - 1.

    Every tokenizer guarantees what `pieces` relies on: for any a that ends with a non-space character and any b that
    begins with a space, tab or newline, encode(a + b) == encode(a) + encode(b). Encoding is thread-safe.
    """

    name: ClassVar[str]
    n_vocab: int  # ids, including the end-of-text id
    eot_id: int  # end of text: n_vocab - 1
    _bytes: list[bytes]  # UTF-8 of each id

    @classmethod
    def build(cls, texts: Iterable[str]) -> Tokenizer:
        """A tokenizer for these texts; one that does not depend on them need not read them."""
        return cls()

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Tokenizer:
        """The inverse of `fields`. KeyError, TypeError or ValueError for anything else."""
        return cls()

    def fields(self) -> dict[str, Any]:
        """The content of tokenizer.json besides the name, JSON-serialisable."""
        return {}

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`, with no special tokens. UserError names a character that has no id."""

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as an array, (n,) uint32."""
        return np.array(self.encode(text), dtype=np.uint32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of `ids`; an id may be a part of a character. UserError names an id out of range."""
        ids = [int(i) for i in ids]
        if wrong := sorted({i for i in ids if not 0 <= i < self.n_vocab}):
            outside = f"outside the {self.name} vocabulary of {self.n_vocab:,} ids: {_some(map(str, wrong))}"
            raise UserError(f"token ids {outside}\nuse the tokenizer that made these ids")
        return b"".join([self._bytes[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8, such as a part of a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Write tokenizer.json into `folder`, which is created if it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        fields = {"format": FORMAT, "name": self.name, **self.fields()}
        write_atomic(folder / FILE, json.dumps(fields, indent=2) + "\n")


class CharTokenizer(Tokenizer):
    """One id per character, in code point order, and the end-of-text id after the last."""

    name = "char"

    def __init__(self, chars: Iterable[str]) -> None:
        """chars: the alphabet in any order, with or without repeats, such as a text."""
        self.chars = "".join(sorted(set(chars)))
        self.n_vocab = len(self.chars) + 1
        self.eot_id = len(self.chars)
        self._bytes = [c.encode("utf-8", "surrogatepass") for c in self.chars] + [b""]
        # id of each code point up to the largest in the alphabet; the last entry is for all above it
        points = _code_points(self.chars)
        self._ids = np.full(int(points.max(initial=0)) + 2, self.n_vocab, dtype=np.uint32)  # n_vocab: no id
        self._ids[points] = np.arange(len(self.chars), dtype=np.uint32)

    @classmethod
    def build(cls, texts: Iterable[str]) -> CharTokenizer:
        seen = np.zeros(0x110000, dtype=bool)  # every Unicode code point
        for text in texts:
            seen[_code_points(text)] = True
        return cls(map(chr, np.flatnonzero(seen)))

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> CharTokenizer:
        tokenizer = cls(fields["chars"])
        if tokenizer.chars != fields["chars"]:
            raise ValueError("chars must be sorted and unique")
        return tokenizer

    def fields(self) -> dict[str, Any]:
        return {"chars": self.chars}

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        ids = self._ids[np.minimum(_code_points(text), len(self._ids) - 1)]
        if ids.size and ids.max() == self.n_vocab:
            unknown = (f"{c!r} (U+{ord(c):04X})" for c in sorted(set(text) - set(self.chars)))
            raise UserError(
                f"not in this tokenizer's alphabet of {len(self.chars)} characters: {_some(unknown)}\n"
                "remove them, build the tokenizer from text that has them, or use gpt2, which takes any text"
            )
        return ids


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE: any text has ids, and 50256 is the end-of-text id."""

    name = "gpt2"
    n_vocab = 50257
    eot_id = 50256

    def __init__(self) -> None:
        self._encoding = gpt2_encoding()
        self._bytes = [*_read_vocabulary(), b""]

    def encode(self, text: str) -> list[int]:
        return [i for piece in pieces([text]) for i in self._encoding.encode_ordinary(piece)]


# Every kind of tokenizer by its name; a new one is added here.
TOKENIZERS: dict[str, type[Tokenizer]] = {kind.name: kind for kind in (CharTokenizer, GPT2Tokenizer)}


def build_tokenizer(name: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer called `name`, built for `texts`."""
    if name not in TOKENIZERS:
        raise UserError(f"unknown tokenizer {name!r}: choose one of {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name].build(texts)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote into `folder`."""
    path = folder / FILE
    try:
        fields = json.loads(path.read_bytes())
        if fields["format"] != FORMAT or fields["name"] not in TOKENIZERS:
            unknown = f"format {fields['format']!r}, tokenizer {fields['name']!r} is unknown here"
            known = f"this version reads format {FORMAT} with one of {', '.join(TOKENIZERS)}"
            raise UserError(f"{path}: {unknown}\n{known}")
        return TOKENIZERS[fields["name"]].from_fields(fields)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} has no tokenizer: there is no {FILE} in it") from None
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is damaged or not one of ours: restore it from a backup, or make it again") from None


_CUT = re.compile(r"(?<=\S)[ \t\n]")


def pieces(texts: Iterable[str]) -> Iterator[str]:
    r"""Split a text that comes in parts into pieces that can be encoded one by one; joined they are the whole text.

    A cut is right before a space, tab or newline that follows a non-space character. No match of GPT-2's pattern runs
    from a non-space character into white space, so the cut is a boundary in the whole text, and the matches on either
    side are those of the whole text: only `\s+(?!\S)` looks beyond what it matches, and on the left each run of white
    space is followed, within the piece, by a non-space character. Python's \S excludes every character with Unicode's
    White_Space property (and U+001C to U+001F, after which there is never a cut).

    Without a cut within LONGEST_PIECE characters the piece ends there, to bound the memory; a few ids around that place
    may differ from those of the whole text.
    """
    text = ""
    for part in texts:
        text += part
        start = 0
        while len(text) - start >= PIECE and (cut := _cut(text, start)):
            yield text[start:cut]
            start = cut
        text = text[start:]
    if text:
        yield text


def _cut(text: str, start: int) -> int:
    """Where the piece of `text` that begins at `start` should end; 0 if more text is needed to tell."""
    goal = start + PIECE
    for begin in (goal - 1000, start):  # nearly always there is a cut within the last 1000 characters
        places = [match.start() for match in _CUT.finditer(text, max(begin, start + 1), goal)]
        if places:
            return places[-1]
    if match := _CUT.search(text, goal, start + LONGEST_PIECE):
        return match.start()
    return start + LONGEST_PIECE if len(text) - start >= LONGEST_PIECE else 0


def _code_points(text: str) -> np.ndarray:
    """The code point of each character, 1-D uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _some(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# GPT-2's vocabulary

_VOCABULARY = Path(__file__).parent / "assets" / "gpt2-vocabulary.xz"
# of r50k_base.tiktoken as published: a line of base64 and rank for each token
_VOCABULARY_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
_N_RANKS = 50256
# How GPT-2 splits text before byte pairs are merged, from encoder.py of its release.
_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@functools.cache
def gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's encoding, built from the packaged vocabulary: no network and no cache folder."""
    return tiktoken.Encoding(
        "gpt2",
        pat_str=_PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(_read_vocabulary())},
        special_tokens={"<|endoftext|>": _N_RANKS},
        explicit_n_vocab=_N_RANKS + 1,
    )


@functools.cache
def _read_vocabulary(asset: Path = _VOCABULARY) -> tuple[bytes, ...]:
    """The bytes of each token by rank. The asset, xz-compressed: their lengths, one byte each, then the tokens."""
    try:
        packed = lzma.decompress(asset.read_bytes())
    except lzma.LZMAError:
        packed = b""
    ends = itertools.accumulate(packed[:_N_RANKS], initial=_N_RANKS)
    tokens = tuple(packed[start:end] for start, end in itertools.pairwise(ends))
    text = b"".join(b"%b %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))
    if hashlib.sha256(text).hexdigest() != _VOCABULARY_SHA256:
        raise UserError(f"GPT-2's vocabulary {asset} is damaged: restore that file, or install the package again")
    return tokens
