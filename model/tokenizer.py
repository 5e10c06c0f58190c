"""Text to token ids and back.

    python -m model.tokenizer train Book --vocab-size 2048      # a byte-pair vocabulary of one's own

A tokenizer is saved as one JSON file, `tokenizer.json`, and read by `load_tokenizer`. TOKENIZERS lists the kinds:

    char     one id for each character of the text that it was built from
    gpt2     byte-pair encoding (BPE) with GPT-2's 50,257 ids (Radford et al. 2019)
    bpe:N    byte-pair encoding with N ids, learned from a text

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
import shlex
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tiktoken
import tyro

from model import bpe
from model.cli import LiveLine, UserError, run
from model.files import names, write_atomic

FILE = "tokenizer.json"
FORMAT = 1
MIN_VOCAB = 258  # 256 bytes, one pair, end of text
MAX_VOCAB = 1_000_000  # four times the largest in use

PIECE = (
    1 << 17
)  # characters in one of `pieces`: enough to hide the cost of a call, few enough to keep every thread busy
LONGEST_PIECE = 1 << 18  # without a good place to cut; 500,000 spaces overflow the stack of tiktoken's regex engine


class Tokenizer(ABC):
    """Text <-> token ids 0 .. n_vocab - 1.

    Every tokenizer guarantees what `pieces` relies on: for any a that ends with a non-space character and any b that
    begins with a space, tab or newline, encode(a + b) == encode(a) + encode(b). Encoding is thread-safe.
    """

    name: str  # what --tokenizer takes
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

    def equals(self, other: Tokenizer) -> bool:
        """Whether both give the same ids to every text."""
        return (self.name, self.fields()) == (other.name, other.fields())

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


class BytePairTokenizer(Tokenizer):
    """Byte-level BPE, computed by tiktoken: any text has ids. GPT-2's pattern splits it into words first."""

    def __init__(self, tokens: tuple[bytes, ...], encoding: tiktoken.Encoding) -> None:
        """tokens: the bytes of each id but the end-of-text id."""
        self.tokens = tokens
        self.n_vocab, self.eot_id = len(tokens) + 1, len(tokens)
        self._encoding = encoding
        self._bytes = [*tokens, b""]

    def encode(self, text: str) -> list[int]:
        return [i for piece in pieces([text]) for i in self._encoding.encode_ordinary(piece)]

    def merges(self) -> tuple[tuple[bytes, bytes], ...]:
        """The pair of tokens that makes each token after the 256 bytes, in the order of the ids.

        For libraries whose BPE is a list of pairs; `bpe.merges` says why they give the same ids.
        """
        return bpe.merges(self.tokens)


class GPT2Tokenizer(BytePairTokenizer):
    """GPT-2's vocabulary of 50,257 ids; 50256 is the end-of-text id."""

    name = "gpt2"

    def __init__(self) -> None:
        super().__init__(_read_vocabulary(), gpt2_encoding())


class TrainedTokenizer(BytePairTokenizer):
    """A vocabulary that was learned from a text: the 256 bytes, pairs in the order they were learned, end of text."""

    def __init__(self, tokens: Iterable[bytes]) -> None:
        """tokens: the bytes of each id but the end-of-text id. ValueError for what cannot have been learned."""
        tokens = tuple(tokens)
        if not bpe.merges(tokens):
            raise ValueError("there is no pair")
        self.name = f"bpe:{len(tokens) + 1}"
        super().__init__(tokens, _tiktoken_encoding(self.name, tokens))

    @classmethod
    def train(cls, texts: Iterable[str], n_vocab: int) -> TrainedTokenizer:
        """Learn from `texts`, see `bpe.learn`: fewer than n_vocab ids where fewer pairs occur twice in them.

        UserError if no pair does.
        """
        tokens = bpe.learn(texts, n_vocab - 1)
        if len(tokens) + 1 < MIN_VOCAB:
            raise UserError(f"bpe:{n_vocab}: no pair of characters occurs twice in this text: give more text")
        return cls(tokens)

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> TrainedTokenizer:
        tokenizer = cls(map(bpe.from_printable, fields["tokens"]))
        if tokenizer.fields()["tokens"] != fields["tokens"]:
            raise ValueError("tokens must be a list of strings")
        return tokenizer

    def fields(self) -> dict[str, Any]:
        return {"tokens": [bpe.to_printable(token) for token in self.tokens]}


# Every kind of tokenizer by its name, "bpe" for "bpe:N"; a new one is added here.
TOKENIZERS: dict[str, type[Tokenizer]] = {"char": CharTokenizer, "gpt2": GPT2Tokenizer, "bpe": TrainedTokenizer}


def build_tokenizer(name: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer `name`: char, gpt2 or bpe:N, built for `texts`; or the path of a folder with a saved one.

    texts: read by char and bpe:N only; see `bpe.learn`.
    """
    if (n_vocab := trained_size(name)) is not None:
        return TrainedTokenizer.train(texts, n_vocab)
    if name in TOKENIZERS:
        return TOKENIZERS[name].build(texts)
    if (saved := _saved_tokenizer(name)) is not None:
        return saved
    raise UserError(f"unknown tokenizer {name!r}: choose char, gpt2, bpe:N, or the folder of a trained one")


def trained_size(name: str) -> int | None:
    """N if `name` is bpe:N, which learns from the training part of a text alone; else None. UserError for a bad N."""
    kind, _, size = name.partition(":")
    if kind != "bpe":
        return None
    if not re.fullmatch("[1-9][0-9]{0,8}", size) or not MIN_VOCAB <= int(size) <= MAX_VOCAB:
        sizes = f"a number from {MIN_VOCAB} (the bytes, one pair, end of text) to {MAX_VOCAB:,}"
        raise UserError(f"{name!r} is not a byte-pair vocabulary size: after bpe: give {sizes}, such as bpe:2048")
    return int(size)


def describe(tokenizer: Tokenizer, name: str) -> str:
    """How many ids it has, and why, if they are fewer than the bpe:N that was asked for."""
    fewer = tokenizer.n_vocab < (trained_size(name) or 0)
    return f"{tokenizer.n_vocab:,} ids" + f" instead of {name}, as no other pair occurs twice in this text" * fewer


def is_called(tokenizer: Tokenizer, name: str) -> bool:
    """Whether `name`, as build_tokenizer takes it, means this tokenizer: it is its name, or where an equal one is."""
    if name == tokenizer.name or name in TOKENIZERS or trained_size(name) is not None:
        return name == tokenizer.name
    saved = _saved_tokenizer(name)
    return saved is not None and saved.equals(tokenizer)


def _saved_tokenizer(name: str) -> Tokenizer | None:
    """The tokenizer in the folder `name`, or in the file `name`; None if there is no such path."""
    path = Path(name)
    return load_tokenizer(path.parent if path.name == FILE else path) if path.exists() else None


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote into `folder`."""
    path = folder / FILE
    try:
        fields = json.loads(path.read_bytes())
        kind = fields["name"].partition(":")[0]
        if fields["format"] != FORMAT or kind not in TOKENIZERS:
            unknown = f"format {fields['format']!r}, tokenizer {fields['name']!r} is unknown here"
            known = f"this version reads format {FORMAT} with one of {', '.join(TOKENIZERS)}"
            raise UserError(f"{path}: {unknown}\n{known}")
        tokenizer = TOKENIZERS[kind].from_fields(fields)
        if tokenizer.name != fields["name"]:
            raise ValueError("it has another number of tokens than its name says")
        return tokenizer
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} has no tokenizer: there is no {FILE} in it") from None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
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


def _tiktoken_encoding(name: str, tokens: Sequence[bytes]) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        name,
        pat_str=_PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={"<|endoftext|>": len(tokens)},
        explicit_n_vocab=len(tokens) + 1,
    )


@functools.cache
def gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's encoding, built from the packaged vocabulary: no network and no cache folder."""
    return _tiktoken_encoding("gpt2", _read_vocabulary())


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


# The command


@dataclass(frozen=True)
class TokenizerConfig:
    """Learn a byte-pair vocabulary from the whole of some texts, and save it for --tokenizer DIR."""

    command: tyro.conf.Positional[Literal["train"]]
    files: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILES")]]
    """text files, or folders of .txt files"""
    vocab_size: int
    """number of ids, with the 256 bytes and the end of text"""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """new folder for tokenizer.json; without it bpe-N"""


def main(cfg: TokenizerConfig) -> None:
    from model.data import books  # here, as model.data imports this module

    name = f"bpe:{cfg.vocab_size}"
    trained_size(name)  # refuses a size that cannot be
    out = cfg.out or Path(name.replace(":", "-"))
    if out.exists() and not (out.is_dir() and not names(out)):
        raise UserError(f"{out} exists: choose another folder with --out, or remove it")
    paths = list(dict.fromkeys(path for source in cfg.files for path in books.documents(source)))
    if not paths:
        raise UserError("nothing to learn from: give text files, or folders of them")
    size = sum(path.stat().st_size for path in paths)

    def texts() -> Iterator[str]:
        return (text for path in paths for text in pieces(books.blocks(path)))

    tokenizer = build_tokenizer(name, bpe.sample(texts(), size))
    n_tokens = n_bytes = 0
    with LiveLine("encoding", size, is_bytes=True, stderr=True) as progress:
        for text in texts():
            n_tokens += len(tokenizer.encode(text))
            n_bytes += (encoded := len(text.encode()))
            progress.advance(encoded)
    tokenizer.save(out)
    print(f"{out / FILE}: {describe(tokenizer, name)}; {n_bytes / n_tokens:.2f} bytes per token on {n_bytes:,} bytes")
    print(f"use it: python train.py --tokenizer {shlex.quote(str(out))}")


if __name__ == "__main__":
    run(main, TokenizerConfig, prog="python -m model.tokenizer")
