"""Greedy generation from random prompts: reading the prompt and writing on, for all with the same weights.

    eager          our model and its KVCache, PyTorch's operators
    triton         the same, our kernels
    triton+graph   the same, one token's step as a CUDA graph that feeds itself
    hf             generate of transformers' GPT2LMHeadModel
    hf_static      the same with cache_implementation="static", which it compiles; CUDA only

Weights are cast to the precision asked for, once and before. In each round a provider writes 1 token, then N + 1. The
first time is the row of phase "prefill", whose tokens_per_s counts the prompt's; the second less the first is "decode",
of N tokens.

The gate: the N + 1 ids must be those of eager. Where a sequence leaves eager's, both tokens must have been as likely as
rounding leaves open: see `_check`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench import peer_models
from bench.record import CONTROL, Row, dtype_name
from bench.timing import Call, Maker, Measured, clocks, measure, why
from kernels import use_backend
from kernels._dispatch import Backend
from kernels._proof import OUTPUT_FACTOR, budget
from model.cli import UserError
from model.config import PRESETS, GPTConfig
from model.generate import prepare_for_decoding
from model.gpt import GPT
from model.kv_cache import KVCache

PROVIDERS = ("eager", "triton", "triton+graph", "hf", "hf_static")
Write = Callable[[int], Tensor]  # how many tokens -> their ids, (B, that many) int64


@dataclass(frozen=True)
class _Task:
    """What all providers of a batch size do: continue `prompt`, (B, P) int64, by `tokens` + 1 ids."""

    model: GPT
    prompt: Tensor
    tokens: int


class _Refused(Exception):
    """A provider that must not be timed; the message is the whole reason."""


def run(
    device: torch.device,
    preset: str,
    batches: Sequence[int],
    prompt: int,
    tokens: int,
    dtype: torch.dtype,
    missing: dict[str, str],
    *,
    providers: Sequence[str] | None = None,
    seconds: float = 5.0,
    overrides: Mapping[str, Any] | None = None,
) -> Iterator[list[Row]]:
    """Two lists of rows per batch size, prefill and decode of the same rounds.

    prompt, tokens: how many, together at most n_positions. missing: is told who cannot run here, and why. overrides:
    fields of the preset's GPTConfig. UserError for what makes no model or does not fit it.
    """
    try:
        config = replace(PRESETS[preset], **(overrides or {}))
    except ValueError as error:
        raise UserError(f"{preset} cannot be changed so: {error}") from None
    if prompt + tokens > config.n_positions:
        raise UserError(
            f"a prompt of {prompt} tokens and {tokens} more do not fit the {config.n_positions} positions of {preset}"
        )
    names = []
    for name in providers or PROVIDERS:
        if reason := _absent(name, device, config):
            missing[name] = reason
        else:
            names.append(name)
    model = _model(config, dtype, device)
    for batch in batches:
        drawn = torch.randint(config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(1))
        params = {"preset": preset, "batch": batch, "prompt": prompt, "tokens": tokens}
        params["dtype"] = dtype_name(dtype)
        yield from _group(_Task(model, drawn.to(device), tokens), names, params, seconds)


def _absent(name: str, device: torch.device, config: GPTConfig) -> str | None:
    """Why a provider cannot run here, in words, or None."""
    if (name.startswith("triton") or name == "hf_static") and device.type != "cuda":
        return "needs a CUDA device"
    return peer_models.unlike_transformers(config) if name.startswith("hf") else None


def _model(config: GPTConfig, dtype: torch.dtype, device: torch.device) -> GPT:
    """Random weights in which blocks outweigh the embeddings.

    As initialised, a tied head mostly repeats the token that it has just read, and the ids would prove nothing of what
    attention and the cache do. A product here doubles the size of what it is given, at any width.
    """
    torch.manual_seed(0)
    model = GPT(config, dtype=dtype)
    with torch.no_grad():
        for weight in model.transformer.h.parameters():
            if weight.ndim == 2:
                weight.normal_(0.0, 2.0 * weight.shape[1] ** -0.5)
    return prepare_for_decoding(model.to(device, dtype).eval())


def _group(task: _Task, names: Sequence[str], params: dict[str, Any], seconds: float) -> Iterator[list[Row]]:
    """The rows of one batch size, a list for each phase."""
    expected = _Ours(task, "eager")(task.tokens + 1)
    makers: dict[str, Maker] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            write = _writer(name, task)
            _check(task.model, task.prompt, expected, write(task.tokens + 1))
        except _Refused as error:
            failed[name] = str(error)
        except Exception as error:
            failed[name] = why(error)
        else:
            for calls, tokens in zip(_calls(name), (1, task.tokens + 1), strict=True):
                makers[calls] = functools.partial(_call, write, tokens)
    device = task.prompt.device
    measured = measure(makers, device, clocks(device)[0], seconds=seconds / 2)
    batch, read = task.prompt.shape
    for (phase, part), tokens in zip(_phases(measured, names, failed).items(), (read, task.tokens), strict=True):
        yield part.rows("generate", params | {"phase": phase}, functools.partial(_metrics, batch * tokens))


def _call(write: Write, tokens: int) -> Call:
    return lambda: write(tokens)


def _calls(name: str) -> tuple[str, str]:
    """What is timed of a provider: the first token, and all of them."""
    return f"{name}, 1 token", f"{name}, N + 1 tokens"


def _metrics(tokens: int, provider: str, median: float) -> dict[str, float]:
    return {"tokens_per_s": tokens / median}


def _phases(measured: Measured, names: Sequence[str], failed: Mapping[str, str]) -> dict[str, Measured]:
    """prefill: the samples of the first token; decode: what all tokens took beyond it, round by round."""
    prefill, decode = (Measured(measured.clock, failed=dict(failed), state=measured.state) for _ in range(2))
    for name in names:
        first, whole = _calls(name)
        if text := measured.failed.get(first) or measured.failed.get(whole):
            prefill.failed[name] = decode.failed[name] = text
        if text or name in failed:
            continue
        prefill.seconds[name] = measured.seconds[first]
        rest = tuple(b - a for a, b in zip(measured.seconds[first], measured.seconds[whole], strict=True))
        if min(rest) > 0:
            decode.seconds[name] = rest
        else:
            decode.failed[name] = "in one round all tokens took less time than the first: write more of them"
        if first in measured.host:
            prefill.host[name] = measured.host[first]
            decode.host[name] = measured.host[whole] - measured.host[first]
    for part in (prefill, decode):
        if CONTROL in measured.seconds:
            part.seconds[CONTROL] = measured.seconds[CONTROL]
    return {"prefill": prefill, "decode": decode}


# --- who writes -------------------------------------------------------------------------------------------------------


def _writer(name: str, task: _Task) -> Write:
    if name.startswith("hf"):
        return _theirs(task, "static" if name == "hf_static" else None)
    ours = _Ours(task, "eager" if name == "eager" else "triton")
    if name == "triton+graph":
        ours.capture()
    return ours


class _Ours:
    """Our model's greedy continuation of a batch. The ids stay on the device, and no step waits for one."""

    def __init__(self, task: _Task, backend: Backend) -> None:
        B, P = task.prompt.shape
        self.model, self.prompt, self.backend = task.model, task.prompt, backend
        dtype, device = task.model.dtype, task.prompt.device
        self.cache = KVCache(task.model.config, B, P + task.tokens, dtype=dtype, device=device)
        self.token = torch.empty((B, 1), dtype=torch.int64, device=device)  # the last one written
        self.text = torch.empty((B, P + task.tokens + 1), dtype=torch.int64, device=device)
        self.step: Call = self._step

    @torch.inference_mode()
    def __call__(self, tokens: int) -> Tensor:
        """(B, tokens) ids; the next call overwrites them."""
        with use_backend(self.backend):
            self._begin()
            for _ in range(tokens - 1):
                self.step()
        return self.text[:, self.prompt.shape[1] :][:, :tokens]

    def _begin(self) -> None:
        self.cache.length = 0
        self.cache.lengths.zero_()
        self._read(self.prompt)

    def _step(self) -> None:
        self._read(self.token)

    def _read(self, idx: Tensor) -> None:
        """Reads the ids that follow those in the cache, (B, T), and writes the likeliest next one."""
        logits, _ = self.model(idx, logits="last", cache=self.cache)  # (B, 1, V)
        self.token.copy_(logits.argmax(-1))
        self.text.index_copy_(1, self.cache.positions[-1:] + 1, self.token)

    @torch.inference_mode()
    def capture(self) -> None:
        """From now on a step is the replay of one CUDA graph, which finds its place by the cache's lengths."""
        device = self.prompt.device
        stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), use_backend(self.backend):
            self(2)  # compiles what a step launches
            self._begin()
            torch.cuda.synchronize(device)
            with torch.cuda.graph(graph, stream=stream):
                self._step()
        torch.cuda.current_stream(device).wait_stream(stream)
        self.step = graph.replay


def _theirs(task: _Task, cache: str | None) -> Write:
    """generate of transformers, with the cache that it calls by this name, its own choice for None."""
    model: Any = peer_models.transformers_gpt2(task.model).eval()
    mask = torch.ones_like(task.prompt)

    def write(tokens: int) -> Tensor:
        ids = model.generate(
            task.prompt, attention_mask=mask, do_sample=False, use_cache=True, cache_implementation=cache,
            max_new_tokens=tokens, min_new_tokens=tokens,
        )  # fmt: skip
        return ids[:, task.prompt.shape[1] :]

    return write


# --- the gate ---------------------------------------------------------------------------------------------------------


def _check(model: GPT, prompt: Tensor, expected: Tensor, ids: Tensor) -> None:
    """_Refused unless each sequence of ids is expected's, or leaves it where rounding leaves both tokens open.

    prompt: (B, P); expected, ids: (B, N) its continuations, expected by `model` under the eager backend. Where they
    part, the exact logits of both tokens must lie so close that neither side need have erred by more than
    kernels/_proof.py grants an output. What follows in that sequence is another text by right, and is not looked at.
    """
    parted = (ids != expected).any(1).nonzero().flatten().tolist()
    exact_model = _exact(model) if parted else model
    for b in parted:
        n = int((ids[b] != expected[b]).nonzero()[0])
        text = torch.cat([prompt[b], expected[b, :n]])
        exact, eager = _logits(exact_model, text), _logits(model, text)
        gap = (exact[expected[b, n]] - exact[ids[b, n]]).abs().item()
        allowed = 2 * budget(exact, eager, OUTPUT_FACTOR)
        if not gap <= allowed:
            raise _Refused(
                f"writes another text: token {n} of sequence {b} is {ids[b, n]} and not {expected[b, n]}, "
                f"whose logit is {gap:.2g} away; rounding explains {allowed:.2g}"
            )


def _exact(model: GPT) -> GPT:
    """The same weights in a precision beyond the model's."""
    exact = copy.deepcopy(model)
    exact.dtype = torch.float64 if model.dtype == torch.float32 else torch.float32
    return exact.to(exact.dtype)


@torch.inference_mode()
def _logits(model: GPT, text: Tensor) -> Tensor:
    """(T,) ids -> (V,) logits of the next."""
    with use_backend("eager"):
        logits, _ = model(text[None], logits="last")
    assert logits is not None
    return logits[0, 0]
