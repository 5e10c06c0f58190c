"""Text to token ids and back.

A tokenizer is known by its name, kept as one JSON file (`tokenizer.json`, never pickle) and found again by
`load_tokenizer`. Two are here, and TOKENIZERS is where another kind is added:

    char   one id for each character of the text that it was built from
    gpt2   byte-pair encoding with GPT-2's 50,257 ids (Radford et al. 2019), computed by tiktoken

The last id of each is the end-of-text id, which stands between documents. It is never the result of encoding: the
characters `<|endoftext|>` in a text are text. It stands for no text either, so it decodes to "".

GPT-2's vocabulary lies beside this file, compressed (OpenAI, MIT; see assets/LICENSE-gpt2-vocabulary.txt); nothing is
downloaded. `pack_vocabulary` makes that asset from the published .tiktoken file.
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

FILE = "tokenizer.json"
FORMAT = 1

# Characters in one piece of `pieces`: long enough to hide the cost of a call, short enough to keep every thread busy.
PIECE = 1 << 17
# Longest piece where no good place for a cut comes. More would overflow the stack of tiktoken's regex engine, which
# panics on a run of white space somewhere between 0.5 and 1 million characters.
LONGEST_PIECE = 1 << 18


class Tokenizer(ABC):
    """Text <-> token ids 0 .. n_vocab - 1.

    Every tokenizer keeps this promise, on which `pieces` rests: for any a and b where a ends with a non-space character
    and b begins with a space, tab or newline, encode(a + b) == encode(a) + encode(b). Encoding changes no state, so
    several threads may do it at once.
    """

    name: ClassVar[str]
    n_vocab: int  # ids, the end-of-text id among them
    eot_id: int  # end of text: n_vocab - 1

    @classmethod
    @abstractmethod
    def build(cls, texts: Iterable[str]) -> Tokenizer:
        """A tokenizer for these texts; one that is the same for all texts need not read them."""

    @classmethod
    @abstractmethod
    def from_fields(cls, fields: dict[str, Any]) -> Tokenizer:
        """The inverse of `fields`. KeyError, TypeError or ValueError where they are not what `fields` gave."""

    @abstractmethod
    def fields(self) -> dict[str, Any]:
        """What tokenizer.json has to hold beside the name; values that JSON can carry."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`, all of it taken as ordinary text. UserError names a character that has no id."""

    def encode_array(self, text: str) -> np.ndarray:
        """The same ids as `encode`, as a 1-D array of uint32."""
        return np.array(self.encode(text), dtype=np.uint32)

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of `ids`; one id may stand for a part of a character. UserError names an id out of range."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8, such as a character cut in two, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Write tokenizer.json into `folder`, which is made if it is missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        fields = {"format": FORMAT, "name": self.name, **self.fields()}
        (folder / FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

    def _checked(self, ids: Iterable[int]) -> list[int]:
        ids = [int(i) for i in ids]
        if wrong := sorted({i for i in ids if not 0 <= i < self.n_vocab}):
            raise UserError(
                f"token ids outside the {self.name} vocabulary of {self.n_vocab:,} ids: {_some(map(str, wrong))}\n"
                "use the tokenizer that these ids were made with"
            )
        return ids


class CharTokenizer(Tokenizer):
    """One id for each character, in code point order, and the end-of-text id after the last."""

    name = "char"

    def __init__(self, chars: Iterable[str]) -> None:
        """chars: the alphabet, in any order, repeats allowed; any text will do."""
        self.chars = "".join(sorted(set(chars)))
        self.n_vocab = len(self.chars) + 1
        self.eot_id = len(self.chars)
        self._bytes = [c.encode("utf-8", "surrogatepass") for c in self.chars] + [b""]
        # id of each code point up to the largest in the alphabet; the last row stands for every one above it
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
            raise ValueError("chars are not sorted and different")
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
                "leave them out, build the tokenizer from text that has them, or use gpt2, which takes any text"
            )
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join([self._bytes[i] for i in self._checked(ids)])


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE: any text has ids, and 50256 is the end-of-text id."""

    name = "gpt2"
    n_vocab = 50257
    eot_id = 50256

    def __init__(self) -> None:
        self._encoding = gpt2_encoding()
        self._bytes = [*_read_vocabulary(), b""]

    @classmethod
    def build(cls, texts: Iterable[str]) -> GPT2Tokenizer:
        return cls()

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> GPT2Tokenizer:
        return cls()

    def fields(self) -> dict[str, Any]:
        return {}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in pieces([text]):
            ids += self._encoding.encode_ordinary(piece)
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join([self._bytes[i] for i in self._checked(ids)])


# Every kind of tokenizer by its name: the one place that has to know a new one.
TOKENIZERS: dict[str, type[Tokenizer]] = {kind.name: kind for kind in (CharTokenizer, GPT2Tokenizer)}


def build_tokenizer(name: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer called `name`, made for `texts`."""
    if name not in TOKENIZERS:
        raise UserError(f"unknown tokenizer {name!r}: choose one of {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name].build(texts)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote into `folder`."""
    path = Path(folder) / FILE
    try:
        fields = json.loads(path.read_bytes())
        if fields["format"] != FORMAT or fields["name"] not in TOKENIZERS:
            raise UserError(
                f"{path}: format {fields['format']!r}, tokenizer {fields['name']!r} is unknown here\n"
                f"this version reads format {FORMAT} with one of {', '.join(TOKENIZERS)}"
            )
        return TOKENIZERS[fields["name"]].from_fields(fields)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} holds no tokenizer: there is no {FILE} in it") from None
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is damaged or not one of ours: take it from a backup, or make it again") from None


_CUT = re.compile(r"(?<=\S)[ \t\n]")


def pieces(texts: Iterable[str]) -> Iterator[str]:
    r"""Cut a text that comes in parts into pieces that can be encoded one by one; joined they are the whole text.

    A cut lies right before a space, tab or newline that follows a non-space character. Every alternative of GPT-2's
    pattern matches either white space only, or non-space characters after at most one leading space, so no match runs
    from a non-space character into white space: the cut is a boundary in the whole text. The matches on either side
    are those of the whole text as well. To the left, only `\s+(?!\S)` and `\s+$` look beyond what they match, and each
    run of white space there is followed, within the piece, by a non-space character. To the right, no alternative
    looks back. Python's \S leaves out every character that Unicode calls White_Space (and four more, U+001C to U+001F,
    so that there is never a cut after one of these).

    Where no cut comes within LONGEST_PIECE characters, the piece ends there: the text stays the same, and the ids may
    differ from those of the whole text in the few tokens around that place. So memory stays bounded.
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
    """Where the piece of `text` that begins at `start` should end; 0 if that takes more text."""
    goal = start + PIECE
    for begin in (goal - 1000, start):  # nearly always the last cut lies within the last 1000 characters
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
_VOCABULARY_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # of r50k_base.tiktoken
_N_RANKS = 50256
# How GPT-2 splits text before the byte pairs are merged: contractions; letters, numbers or other marks with at most one
# space before them; white space. From encoder.py of the GPT-2 release.
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


def pack_vocabulary(tiktoken_file: Path, asset: Path = _VOCABULARY) -> None:
    """Make the packaged vocabulary from r50k_base.tiktoken, also known as whisper/assets/gpt2.tiktoken.

        python -c "from model.tokenizer import pack_vocabulary; pack_vocabulary('gpt2.tiktoken')"

    A .tiktoken file has a line of base64 and rank for each token, in rank order. The asset is the xz-compressed
    length of each token, one byte each, followed by the bytes of all tokens.
    """
    text = Path(tiktoken_file).read_bytes()
    if hashlib.sha256(text).hexdigest() != _VOCABULARY_SHA256:
        raise UserError(f"{tiktoken_file} is not GPT-2's vocabulary: its SHA-256 must be {_VOCABULARY_SHA256}")
    tokens = [base64.b64decode(line.split()[0]) for line in text.splitlines()]
    Path(asset).write_bytes(lzma.compress(bytes(map(len, tokens)) + b"".join(tokens), preset=9 | lzma.PRESET_EXTREME))


@functools.cache
def _read_vocabulary(asset: Path = _VOCABULARY) -> tuple[bytes, ...]:
    """The bytes of each token by rank, checked: written as .tiktoken text they have the published SHA-256."""
    try:
        packed = lzma.decompress(asset.read_bytes())
    except lzma.LZMAError:
        packed = b""
    ends = np.cumsum(np.frombuffer(packed[:_N_RANKS], dtype=np.uint8), dtype=np.int64) + _N_RANKS
    bounds = [_N_RANKS, *ends.tolist()]
    tokens = tuple(packed[start:end] for start, end in itertools.pairwise(bounds))
    text = b"".join(b"%b %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))
    if hashlib.sha256(text).hexdigest() != _VOCABULARY_SHA256:
        raise UserError(f"GPT-2's vocabulary {asset} is damaged: restore that file, or install the package again")
    return tokens
