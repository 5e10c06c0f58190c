"""Text to token ids and back.

    python -m model.tokenizer train corpus.txt --vocab-size 4096 --out vocabulary     # then --tokenizer vocabulary

A tokenizer is saved as one JSON file, `tokenizer.json`, and read by `load_tokenizer`. TOKENIZERS lists the kinds:

    char     one id for each character of the text that it was built from
    gpt2     byte-pair encoding with GPT-2's 50,257 ids (Radford et al. 2019)
    bpe:N    byte-pair encoding with N ids, trained on the text (Sennrich et al. 2016) by Hugging Face's tokenizers

Byte pairs are merged by tiktoken, within the pieces into which GPT-2's pattern splits a text.

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import tiktoken
import tyro

from model.cli import LiveLine, UserError, run
from model.files import write_atomic

FILE = "tokenizer.json"
FORMAT = 1
MAX_VOCAB = 1_000_000

PIECE = (
    1 << 17
)  # characters in one of `pieces`: enough to hide the cost of a call, few enough to keep every thread busy
LONGEST_PIECE = 1 << 18  # without a good place to cut; 500,000 spaces overflow the stack of tiktoken's regex engine


class Tokenizer(ABC):
    """Text <-> token ids 0 .. n_vocab - 1.

    Every tokenizer guarantees what `pieces` relies on: for any a that ends with a non-space character and any b that
    begins with a space, tab or newline, encode(a + b) == encode(a) + encode(b). Encoding is thread-safe.
    """

    kind: ClassVar[str]
    learns: ClassVar[bool] = False  # whether `build` must see the training text alone
    n_vocab: int  # ids, including the end-of-text id
    eot_id: int  # end of text: n_vocab - 1
    _bytes: list[bytes]  # UTF-8 of each id

    @property
    def name(self) -> str:
        """What --tokenizer takes for it."""
        return self.kind

    @classmethod
    def build(cls, texts: Iterable[str], size: str = "") -> Tokenizer:
        """A tokenizer for these texts, which need not be read. size: what follows the colon of a name."""
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
        fields = {"format": FORMAT, "name": self.kind, **self.fields()}
        write_atomic(folder / FILE, json.dumps(fields, indent=2) + "\n")


class CharTokenizer(Tokenizer):
    """One id per character, in code point order, and the end-of-text id after the last."""

    kind = "char"

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
    def build(cls, texts: Iterable[str], size: str = "") -> CharTokenizer:
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
    """Byte-level BPE: any text has ids, and the end-of-text id comes after the tokens."""

    def __init__(self, tokens: Sequence[bytes], encoding: tiktoken.Encoding) -> None:
        self.n_vocab, self.eot_id = len(tokens) + 1, len(tokens)
        self._bytes = [*tokens, b""]
        self._encoding = encoding

    def encode(self, text: str) -> list[int]:
        return [i for piece in pieces([text]) for i in self._encoding.encode_ordinary(piece)]

    def merges(self) -> list[tuple[bytes, bytes]]:
        """The pair that each token beyond the single bytes is merged from, in order of their ids."""
        ranks = {token: rank for rank, token in enumerate(self._bytes[: self.eot_id])}
        return [_last_pair(token, ranks) for token in ranks if len(token) > 1]


class GPT2Tokenizer(BytePairTokenizer):
    """GPT-2's vocabulary, in which 50256 is the end-of-text id."""

    kind = "gpt2"

    def __init__(self) -> None:
        super().__init__(_read_vocabulary(), gpt2_encoding())


class TrainedTokenizer(BytePairTokenizer):
    """A vocabulary that was trained on a text. tokenizer.json has its tokens in GPT-2's printable alphabet of bytes."""

    kind = "bpe"
    learns = True

    def __init__(self, tokens: Sequence[bytes]) -> None:
        """tokens: the 256 bytes in any order, then what they are merged to. ValueError for anything else."""
        ranks = {token: rank for rank, token in enumerate(tokens)}
        if len(ranks) != len(tokens) or sorted(tokens[:256]) != [bytes([i]) for i in range(256)]:
            raise ValueError("the tokens must be the 256 bytes, then longer ones, each once")
        for token, rank in ranks.items():
            halves = ((token[:i], token[i:]) for i in range(1, len(token)))
            if rank >= 256 and not any(max(ranks.get(a, rank), ranks.get(b, rank)) < rank for a, b in halves):
                raise ValueError(f"{token!r} is not made of two tokens before it")
        super().__init__(tokens, tiktoken.Encoding("bpe", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens={}))

    @property
    def name(self) -> str:
        return f"bpe:{self.n_vocab}"

    @classmethod
    def build(cls, texts: Iterable[str], size: str = "") -> TrainedTokenizer:
        """Train on these texts. size: ids in all, at least 257, the bytes and the end-of-text id."""
        if not (size.isdecimal() and 257 <= int(size) <= MAX_VOCAB):
            raise UserError(f"--tokenizer bpe:{size}: give a number of ids from 257 to {MAX_VOCAB:,}, such as bpe:2048")
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # here: only training needs it

        trained = Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # splits by GPT-2's pattern
        trainer = trainers.BpeTrainer(
            vocab_size=int(size) - 1, min_frequency=2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )  # fmt: skip
        trained.train_from_iterator(texts, trainer)
        vocabulary = trained.get_vocab()
        if len(vocabulary) < int(size) - 1:
            most = len(vocabulary) + 1
            raise UserError(
                f"--tokenizer bpe:{size}: the training text has pairs for {most:,} ids only: give bpe:{most}"
            )
        return cls([_from_printable(token) for token in sorted(vocabulary, key=vocabulary.__getitem__)])

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> TrainedTokenizer:
        return cls([_from_printable(token) for token in fields["tokens"]])

    def fields(self) -> dict[str, Any]:
        return {"tokens": [printable(token) for token in self._bytes[: self.eot_id]]}


# Every kind of tokenizer; a new one is added here.
TOKENIZERS: dict[str, type[Tokenizer]] = {
    tokenizer.kind: tokenizer for tokenizer in (CharTokenizer, GPT2Tokenizer, TrainedTokenizer)
}


def build_tokenizer(name: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer called `name`, built for `texts`: "char", "gpt2", "bpe:N", or a folder in which one was saved."""
    if (kind := tokenizer_kind(name)) is not None:
        return kind.build(texts, name.partition(":")[2])
    if Path(name).exists():
        return load_tokenizer(Path(name) if Path(name).is_dir() else Path(name).parent)
    raise UserError(f"unknown tokenizer {name!r}: choose char, gpt2, bpe:N, or the folder of a trained one")


def tokenizer_kind(name: str) -> type[Tokenizer] | None:
    """The class that builds the tokenizer called `name`; None if it is no name of a kind."""
    kind, colon, _ = name.partition(":")
    return None if bool(colon) != (kind == TrainedTokenizer.kind) else TOKENIZERS.get(kind)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote into `folder`. UserError if it is missing or damaged."""
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
    except (AttributeError, KeyError, TypeError, ValueError):
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


# Byte pairs


def _last_pair(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that are left when `token` is encoded by the tokens of lower rank."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


_VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_HIDDEN = [i for i in range(256) if i not in _VISIBLE]
_PRINTABLE = {i: chr(i) for i in _VISIBLE} | {i: chr(256 + n) for n, i in enumerate(_HIDDEN)}
_BYTES = {char: i for i, char in _PRINTABLE.items()}


def printable(token: bytes) -> str:
    """A token in the alphabet of GPT-2's vocab.json: a visible character for each byte, "Ġthe" for b" the"."""
    return "".join(_PRINTABLE[i] for i in token)


def _from_printable(token: str) -> bytes:
    return bytes(_BYTES[char] for char in token)


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


# Training one


@dataclass(frozen=True)
class Train:
    """Train a byte-pair vocabulary on text files, for --tokenizer FOLDER of train.py and model.data."""

    files: tyro.conf.Positional[tuple[Path, ...]]  # text files, or folders of .txt files
    vocab_size: int = 4096  # ids, the 256 bytes and the end-of-text id included
    out: Path = Path("vocabulary")  # folder for tokenizer.json


Command = Annotated[Train, tyro.conf.subcommand("train")] | Annotated[None, tyro.conf.Suppress]


def main(command: Train) -> None:
    from model.data import books  # here, as it imports this module

    if not command.files:
        raise UserError("name at least one text file: python -m model.tokenizer train FILE ...")
    if (command.out / FILE).exists():
        raise UserError(f"{command.out} holds a tokenizer already: choose another folder with --out")
    paths = [path for source in command.files for path in books.documents(source)]
    n_bytes = 0

    def texts() -> Iterator[str]:
        nonlocal n_bytes
        for path in paths:
            for text in pieces(books.clean(books.read(path))):
                n_bytes += len(text.encode())
                progress.advance(len(text.encode()))
                yield text

    with LiveLine("reading", sum(path.stat().st_size for path in paths), is_bytes=True, stderr=True) as progress:
        tokenizer = TrainedTokenizer.build(texts(), str(command.vocab_size))
    tokenizer.save(command.out)
    print(f"{command.out / FILE}: {tokenizer.n_vocab:,} ids, trained on {n_bytes:,} bytes")
    print(f"use it with --tokenizer {command.out}")


if __name__ == "__main__":
    run(main, Command, prog="python -m model.tokenizer")  # type: ignore[arg-type]
