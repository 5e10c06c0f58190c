"""Byte-pair vocabularies (Sennrich et al. 2016): learning one, the pair that makes each token, tokens in print.

A vocabulary is a sequence of tokens, bytes each, by id: the 256 bytes, then tokens that are each made of two before it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from model.cli import LiveLine, clock

if TYPE_CHECKING:
    import tokenizers

MAX_TOKEN_BYTES = 128  # of GPT-2's longest token; a line of a thousand dashes must not become one
MAX_WORD_BYTES = 1024  # in training, a longer one is cut: the time grows with the square of its length
# More text hardly changes a vocabulary, and costs time (1 to 2 MB/s on a core) and memory (by its different words).
MAX_TRAINING_CHARACTERS = 100_000_000

# GPT-2's printable form of a byte: itself if it is visible in Latin-1, else a character from U+0100 on, in order. The
# ids of the 256 bytes, in GPT-2 and in what is learned here, are in the order of these characters.
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [b for b in range(256) if b not in _VISIBLE]
_PRINTABLE = {b: chr(b) for b in _VISIBLE} | {b: chr(0x100 + i) for i, b in enumerate(_HIDDEN)}
_BYTES = {char: b for b, char in _PRINTABLE.items()}


def to_printable(token: bytes) -> str:
    """A token as in GPT-2's vocab.json, a visible character for each byte: "Ġthe" for b" the"."""
    return "".join(map(_PRINTABLE.__getitem__, token))


def from_printable(token: str) -> bytes:
    """The inverse of to_printable; KeyError for a character that stands for no byte."""
    return bytes(map(_BYTES.__getitem__, token))


@functools.lru_cache(maxsize=8)
def merges(tokens: tuple[bytes, ...]) -> tuple[tuple[bytes, bytes], ...]:
    """The pair that makes each token after the 256 bytes. ValueError for what is no vocabulary.

    The pair is what is left of a token's bytes when the tokens before it have been merged. If that is a pair for every
    token, merging any neighbours that together are a token (tiktoken) and merging these pairs alone (Hugging Face,
    llama.cpp) give the same ids for every text. For in both, merges happen in the order of the ids, from left to right,
    so what lies between two places that no token crosses is merged as if it stood alone. Let neighbours x and y be
    token t together. Right before the turn of t its pair stood in their place; if that was not x and y, it was merged
    at that turn, and x and y were never there. A learned vocabulary is of this kind by the same argument.
    """
    if {*tokens[:256]} != {bytes([b]) for b in range(256)}:
        raise ValueError("the first 256 tokens must be the 256 bytes")
    if max(map(len, tokens)) > MAX_TOKEN_BYTES:
        raise ValueError(f"a token has more than {MAX_TOKEN_BYTES} bytes")
    ranks = {token: rank for rank, token in enumerate(tokens[:256])}
    pairs = []
    for rank, token in enumerate(tokens[256:], 256):
        pair = merge(token, ranks)
        if len(pair) != 2:
            raise ValueError(f"token {rank} is not made of two tokens before it")
        pairs.append((pair[0], pair[1]))
        ranks[token] = rank
    return tuple(pairs)


def merge(word: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """BPE by its definition: merge the neighbours that make the token of lowest rank, until none make a token."""
    parts = [bytes([b]) for b in word]
    while len(parts) > 1:
        rank, i = min((ranks.get(a + b, math.inf), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
        if rank == math.inf:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def sample(texts: Iterable[str], characters: int) -> Iterator[str]:
    """Every k-th of `texts`, which have so many characters in all: at most about MAX_TRAINING_CHARACTERS of them."""
    return itertools.islice(texts, 0, None, max(math.ceil(characters / MAX_TRAINING_CHARACTERS), 1))


def learn(texts: Iterable[str], n_tokens: int) -> list[bytes]:
    """A vocabulary of n_tokens, or fewer if too few pairs occur twice. The same texts give the same one.

    Each text is split into words by itself, by GPT-2's pattern.
    """
    vocabulary = _train(texts, n_tokens).get_vocab()
    return [from_printable(token) for token in sorted(vocabulary, key=vocabulary.__getitem__)]


def _train(texts: Iterable[str], n_tokens: int) -> tokenizers.Tokenizer:
    import tokenizers  # here: nothing else needs it
    from tokenizers import models, pre_tokenizers, trainers

    n_read, start = 0, time.monotonic()

    def counted() -> Iterator[str]:
        nonlocal n_read
        for text in texts:
            n_read += len(text)
            yield text

    def status() -> str:
        elapsed = clock(time.monotonic() - start)
        return f"learning {n_tokens:,} tokens from {n_read / 1e6:,.1f} million characters, {elapsed}"

    words = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's pattern and printable form
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(length=MAX_WORD_BYTES)])
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens,
        min_frequency=2,
        initial_alphabet=list(_BYTES),
        max_token_length=MAX_TOKEN_BYTES + 1,  # exclusive
        show_progress=False,
    )
    with _all_cores(), _reporting(status):
        tokenizer.train_from_iterator(counted(), trainer)
    tokenizer.pre_tokenizer = words
    return tokenizer


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """Let tokenizers use every core now, and be silent in processes that are forked later."""
    name = "TOKENIZERS_PARALLELISM"
    is_set_by_user = name in os.environ
    os.environ.setdefault(name, "true")
    try:
        yield
    finally:
        if not is_set_by_user:
            os.environ[name] = "false"


@contextlib.contextmanager
def _reporting(status: Callable[[], str], after_s: float = 2) -> Iterator[None]:
    """Show `status()` on stderr while the block runs. tokenizers cannot be asked how far it is."""
    done = threading.Event()

    def report() -> None:
        wait = after_s
        with LiveLine(stderr=True) as line:
            while not done.wait(wait):
                if line.is_live:
                    line.update(status())
                else:
                    print(status(), file=sys.stderr, flush=True)
                wait = 1 if line.is_live else 10

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
