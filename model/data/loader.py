"""Tokens -> batches: random windows for a training step, read ahead by threads, and windows in order for evaluation."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from model.cli import UserError
from model.data.shards import Tokens


def get_batch(tokens: Tokens, *, context: int, seed: int, step: int, rows: range) -> tuple[Tensor, Tensor]:
    """Random windows: idx and the tokens that follow, targets, both (len(rows), context) int64 on the CPU.

    rows: which of the windows of the step, numbered from 0. The result depends on the arguments alone, so step k has
    the same batch in every run, resumed or not, whole or split into micro-steps and processes. A window starts at any
    of the len(tokens) - context places where each of its tokens has a next one, with equal probability. The generator
    is counter-based (Philox; Salmon et al. 2011): seed is the key (0 to 2**128 - 1), step the counter.
    """
    drawn = torch.from_numpy(_draw(tokens, context, seed, step, rows))
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def _draw(tokens: Tokens, context: int, seed: int, step: int, rows: range) -> np.ndarray:
    """(len(rows), context + 1) int64."""
    places = len(tokens) - context
    if places < 1:
        raise UserError(
            f"{len(tokens):,} tokens are too few for a context of {context:,}: {context + 1:,} are needed\n"
            "give more text, or choose a smaller context"
        )
    # random_raw, not Generator.integers: only the former is guaranteed to be the same in every version of numpy
    words = np.random.Philox(key=seed, counter=int(step) << 64).random_raw(rows.stop)  # uint64; 2**66 words per step
    starts = words[rows.start : rows.stop : rows.step] % places  # uniform to within places / 2**64
    return tokens.rows(starts.astype(np.int64), context + 1)


class Loader:
    """Iterate over the batches from first_step on, read ahead: idx, targets, (A, B, T) int64 each.

    rows: which of the windows of a step are drawn here (see `get_batch`), A * B of them in order; B: micro_batch,
    T: context. `num_workers` threads build whole steps in host memory. `next` raises the error of the step it returns,
    again on every call. The threads never call CUDA, which could break the capture of a CUDA graph in another thread.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        context: int,
        seed: int,
        first_step: int,
        rows: range,
        micro_batch: int,
        device: str | torch.device,
        num_workers: int = 2,
    ) -> None:
        if len(rows) % micro_batch:
            raise ValueError(f"{len(rows)} rows are not a whole number of micro-steps of {micro_batch}")
        self.tokens, self.context, self.seed, self.rows = tokens, context, seed, rows
        self.device = torch.device(device)
        self._shape = (2, len(rows) // micro_batch, micro_batch, context)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="loader")
        self._steps = itertools.count(first_step)
        self._ahead: deque[Future[Tensor]] = deque()
        for _ in range(2 * num_workers):
            self._read_ahead()

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """idx, targets of the next step on the device, ready for what the current stream does next."""
        batch = self._ahead[0].result()
        self._ahead.popleft()
        self._read_ahead()
        if self._stream is not None:
            # A stream of its own: the copy overlaps with the kernels of earlier steps, which are still queued.
            with torch.cuda.stream(self._stream):
                batch = batch.to(self.device, non_blocking=True)
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            batch.record_stream(current)  # the stream that allocated it must not reuse it before this one is done
        return batch[0], batch[1]

    def close(self) -> None:
        """Stop reading ahead, without waiting for a thread that is reading."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _read_ahead(self) -> None:
        # PyTorch's cache reuses pinned memory only after the copy from it is done.
        batch = torch.empty(self._shape, dtype=torch.int64, pin_memory=self._stream is not None)
        self._ahead.append(self._pool.submit(self._read, next(self._steps), batch))

    def _read(self, step: int, batch: Tensor) -> Tensor:
        drawn = _draw(self.tokens, self.context, self.seed, step, self.rows)
        # numpy copies: torch would start threads of its own
        idx, targets = batch.view(2, len(self.rows), self.context).numpy()
        idx[:], targets[:] = drawn[:, :-1], drawn[:, 1:]
        return batch


def windows(
    tokens: Tokens | np.ndarray, context: int, batch_size: int, most: int | None = None, stride: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """`tokens` in order for evaluation: (idx, targets), int64 on the CPU, up to batch_size windows of `context`.

    Every token but the first is a target exactly once; most: only so many windows, spread evenly over the text. The
    last window is padded with id 0 and target -100, which the loss ignores; the last batch may have fewer rows.

    stride: tokens from the start of a window to that of the next, 1 to context (the default: no overlap). The first
    window has all of its targets, each later one its last `stride` and -100 before them.
    """
    stride = context if stride is None else stride
    n = count_windows(len(tokens), context, stride)
    chosen = np.arange(min(n, most or n)) * n // min(n, most or n)
    batches = (chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size))
    return (_window_batch(tokens, numbers.tolist(), context, stride) for numbers in batches)


def count_windows(n_tokens: int, context: int, stride: int) -> int:
    """The windows of `windows`. UserError for fewer than 2 tokens or a stride outside 1 to context."""
    if n_tokens < 2:
        raise UserError(f"{n_tokens} tokens are too few to evaluate on: at least 2 are needed; give more text")
    if not 1 <= stride <= context:
        raise UserError(f"stride must be 1 to the context of {context:,} tokens, got {stride:,}")
    return 1 + -(-max(n_tokens - 1 - context, 0) // stride)


def _window_batch(tokens: Tokens | np.ndarray, numbers: list[int], context: int, stride: int) -> tuple[Tensor, Tensor]:
    idx = np.zeros((len(numbers), context), dtype=np.int64)
    targets = np.full((len(numbers), context), -100, dtype=np.int64)
    for row, number in enumerate(numbers):
        ids = tokens[number * stride : number * stride + context + 1]
        first = context - stride if number else 0  # targets before it are those of earlier windows
        idx[row, : len(ids) - 1], targets[row, first : len(ids) - 1] = ids[:-1], ids[first + 1 :]
    return torch.from_numpy(idx), torch.from_numpy(targets)
