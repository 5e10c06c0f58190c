"""Multiple choice: which of several endings of a text a model finds the most likely.

A file has one question a line, as JSON:

    {"ctx": "She opened the door", "endings": ["and went out.", "to the ceiling."], "label": 0}

ctx and ending are joined by a space. HellaSwag's own lines (Zellers et al. 2019), which have ctx_a and ctx_b and mostly
activity_label, are joined and cleaned as EleutherAI's lm-evaluation-harness does it, so the two accuracies are its:

    acc         the ending with the largest sum of log p(token | tokens before it)
    acc_norm    the ending with the largest such sum divided by the number of its characters

Where ctx and ending are longer than the model's context, the beginning of ctx is dropped.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.cli import UserError
from model.gpt import GPT, IGNORE_INDEX
from model.tokenizer import Tokenizer

MAX_LOGITS = 1 << 26  # of one batch: 256 MiB in float32


@dataclass(frozen=True)
class Question:
    """endings: what may follow `context`, after a space; label: the number of the right one, from 0."""

    context: str
    endings: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Choice:
    """An ending as the model reads it. ids: (n,) context and ending; the last n_scored of them are the ending."""

    ids: np.ndarray
    n_scored: int


@dataclass(frozen=True)
class Accuracy:
    """Shares of the questions, see the top of the file, and their standard errors."""

    questions: int
    acc: float
    acc_norm: float

    def __str__(self) -> str:
        """`acc 0.2892 ± 0.0045 | acc_norm 0.3114 ± 0.0046`."""
        values = {"acc": self.acc, "acc_norm": self.acc_norm}
        return " | ".join(f"{name} {share:.4f} ± {self._stderr(share):.4f}" for name, share in values.items())

    def _stderr(self, share: float) -> float:
        """Of the mean of `questions` zeros and ones; nan for a single one."""
        return math.sqrt(share * (1 - share) / (self.questions - 1)) if self.questions > 1 else math.nan


def read_questions(path: Path) -> Iterator[tuple[int, Question]]:
    """Yield (line number, question); empty lines are skipped. UserError names a line that is no question."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, _parse(json.loads(line.rstrip()))
                except _BadQuestion as error:
                    raise UserError(f"{path}, line {number}: {error}\n{_FORM}") from None
                except json.JSONDecodeError as error:
                    reason = f"it is not JSON ({error.msg} at column {error.colno})"
                    raise UserError(f"{path}, line {number}: {reason}\n{_FORM}") from None
                except (ValueError, RecursionError):  # a number of thousands of digits is a ValueError
                    raise UserError(f"{path}, line {number}: it is not JSON in UTF-8\n{_FORM}") from None


_FORM = 'a line is {"ctx": "some text", "endings": ["one", "another"], "label": 0}'


class _BadQuestion(Exception):
    """JSON, but no question."""


def _parse(fields: Any) -> Question:
    if not isinstance(fields, dict):
        raise _BadQuestion("it is not a JSON object")
    endings, label = fields.get("endings"), fields.get("label")
    if not isinstance(endings, list) or len(endings) < 2:
        raise _BadQuestion("it has no list of at least two endings")
    clean = _clean if "ctx_a" in fields else str
    texts = [clean(ending) if isinstance(ending, str) else "" for ending in endings]
    if "" in texts:
        raise _BadQuestion(f"ending {texts.index('')} is empty or not a string")
    context = _context(fields)
    if not context.strip():
        raise _BadQuestion("its ctx is empty or missing")
    if isinstance(label, str) and label.isdecimal():  # as in Hugging Face's copy of HellaSwag
        label = int(label)
    if type(label) is not int or not 0 <= label < len(texts):
        expected = f"its label must be 0 to {len(texts) - 1}, the number of the right ending"
        raise _BadQuestion(f"{expected}, got {repr(label)[:40]}")
    return Question(context, tuple(texts), label)


def _context(fields: dict[str, Any]) -> str:
    names = ("activity_label", "ctx_a", "ctx_b") if "ctx_a" in fields else ("ctx",)
    values = [fields.get(name, "") for name in names]
    if not all(isinstance(value, str) for value in values):
        return ""
    if len(values) == 1:
        return values[0]
    activity, first, second = values
    return _clean((f"{activity}: " if activity else "") + f"{first} {second.capitalize()}")


def _clean(text: str) -> str:
    """What lm-evaluation-harness makes of HellaSwag's texts, whose brackets come from WikiHow's headings."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def encode(question: Question, tokenizer: Tokenizer, n_positions: int) -> list[Choice]:
    """One Choice of at most n_positions + 1 ids for each ending. UserError for an ending that leaves no context."""
    text = question.context.rstrip()  # GPT-2's tokens begin with a space, they do not end with one
    n_context = len(tokenizer.encode(text))
    choices = []
    for number, ending in enumerate(question.endings):
        ids = tokenizer.encode_array(f"{text}{question.context[len(text) :]} {ending}")
        n_scored = len(ids) - n_context
        if n_scored > n_positions:
            raise UserError(f"ending {number} has {n_scored:,} tokens and the model's context is {n_positions:,}")
        choices.append(Choice(ids[-n_positions - 1 :], n_scored))
    return choices


def load(path: Path, tokenizer: Tokenizer, n_positions: int) -> tuple[list[Question], list[Choice]]:
    """All questions of a file, and the choices of all in order. UserError names the line that the model cannot read."""
    questions: list[Question] = []
    choices: list[Choice] = []
    for number, question in read_questions(path):
        try:
            choices += encode(question, tokenizer, n_positions)
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        questions.append(question)
    if not questions:
        raise UserError(f"{path} has no questions: {_FORM}")
    return questions, choices


@torch.no_grad()
def log_probs(
    model: GPT,
    choices: Sequence[Choice],
    *,
    batch_size: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> np.ndarray:
    """(len(choices),) float64: the log-probability, in nats, of each ending after its context.

    Choices of similar length share a batch of at most `batch_size`, and of MAX_LOGITS logits. advance: called with the
    number of tokens read since the last call. The model must be in evaluation mode.
    """
    device = model.transformer.ln_f.weight.device
    sums = np.empty(len(choices))
    for numbers in _batches(choices, batch_size, model.config.vocab_size):
        idx, targets = _pad([choices[number] for number in numbers])
        logits, _ = model(idx.to(device))  # (B, T, V)
        assert logits is not None
        row, column = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
        wanted = targets[row, column].to(device)
        losses = F.cross_entropy(logits[row.to(device), column.to(device)].float(), wanted, reduction="none")
        sums[numbers] = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, row, -losses.double().cpu())
        advance(sum(len(choices[number].ids) for number in numbers))
    return sums


def _batches(choices: Sequence[Choice], batch_size: int, V: int) -> Iterator[list[int]]:
    """The numbers of the choices of each batch, the longest first: what does not fit the memory fails at once."""
    order = sorted(range(len(choices)), key=lambda number: -len(choices[number].ids))
    start = 0
    while start < len(order):
        rows = max(1, min(batch_size, MAX_LOGITS // (len(choices[order[start]].ids) * V)))
        yield order[start : start + rows]
        start += rows


def _pad(choices: Sequence[Choice]) -> tuple[Tensor, Tensor]:
    """idx, targets: (B, T) int64; after the end of a choice idx is 0, which no token before it sees, targets -100."""
    T = max(len(choice.ids) for choice in choices) - 1
    idx = np.zeros((len(choices), T), dtype=np.int64)
    targets = np.full((len(choices), T), IGNORE_INDEX, dtype=np.int64)
    for row, choice in enumerate(choices):
        n = len(choice.ids) - 1
        idx[row, :n] = choice.ids[:-1]
        targets[row, n - choice.n_scored : n] = choice.ids[-choice.n_scored :]
    return torch.from_numpy(idx), torch.from_numpy(targets)


def accuracy(questions: Sequence[Question], sums: np.ndarray) -> Accuracy:
    """sums: the log-probabilities of all endings, in order. Of equally likely ones the first is taken."""
    right, right_norm, start = 0, 0, 0
    for question in questions:
        own = sums[start : start + len(question.endings)]
        characters = np.array([len(ending) for ending in question.endings])
        right += int(own.argmax()) == question.label
        right_norm += int((own / characters).argmax()) == question.label
        start += len(own)
    return Accuracy(len(questions), right / len(questions), right_norm / len(questions))
