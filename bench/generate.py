"""Greedy generation from random prompts: reading the prompt, then decoding, for all with the same weights.

    eager          our model and its KVCache, PyTorch's operators
    triton         the same, our kernels
    triton+graph   the same, one token's step as a CUDA graph that feeds itself
    hf             generate of transformers' GPT2LMHeadModel
    hf_static      the same with cache_implementation="static", which it compiles; CUDA only

Weights are cast to the precision once, before. In each round a provider writes 1 token, which is the phase "prefill",
whose tokens_per_s counts those of the prompt; and N + 1 tokens, of which the phase "decode" times the last N. Each
is proven first: the N + 1 ids must be those of eager, up to rounding (`_check`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench import command, peer_models
from bench.record import CONTROL, Report, Row, dtype_name
from bench.timing import Call, Measured, Partial, Refused, clocks, measure
from kernels import use_backend
from kernels._backend import Backend
from kernels._proof import OUTPUT_FACTOR, budget
from model.cli import UserError
from model.config import PRESETS, GPTConfig
from model.decoder import Decoder
from model.gpt import GPT
from model.quantize import prepare
from model.sampling import Sampling

PROVIDERS = ("eager", "triton", "triton+graph", "hf", "hf_static")
# (how many tokens, a function to call once the first of them is written) -> their ids, (B, that many) int64
Write = Callable[[int, Call], Tensor]


@dataclass(frozen=True)
class _Task:
    """What all providers of a batch size do: continue `prompt`, (B, P) int64, by `tokens` + 1 ids."""

    model: GPT
    prompt: Tensor
    tokens: int


@dataclass(frozen=True)
class Generate(command.Timed):
    """Tokens per second of reading a prompt and of decoding, and those of Hugging Face's generate."""

    preset: str = "gpt2"  # Model preset; its weights are random, the same for all.
    batch: tuple[int, ...] = (1, 8, 64)  # Sequences at a time.
    prompt: int = 512  # Tokens of the prompt.
    tokens: int = 64  # Tokens to generate.
    dtype: command.Dtype | None = None  # Precision; bfloat16 on a GPU and float32 on a CPU by default.

    def check(self) -> None:
        command.require_model(self.preset, self.batch)
        command.pick("provider", self.provider, PROVIDERS)
        command.require_positive(seconds=self.seconds, prompt=self.prompt, tokens=self.tokens)
        limit, both = PRESETS[self.preset].n_positions, self.prompt + self.tokens
        if both > limit:
            has = f"the preset {self.preset} has {limit} positions"
            raise UserError(f"--prompt and --tokens are {both} together, and {has}: ask for less")

    def total(self, device: torch.device) -> int:
        return 2 * len(self.batch)

    def groups(self, device: torch.device, report: Report) -> Iterator[list[Row]]:
        """Yield two lists of rows per batch size, prefill and decode of the same rounds."""
        config, dtype = PRESETS[self.preset], command.dtype_of(self.dtype, device)
        names = peer_models.available(self.provider or PROVIDERS, device, config, report.missing)
        model = _model(config, dtype, device)
        for batch in self.batch:
            drawn = torch.randint(config.vocab_size, (batch, self.prompt), generator=torch.Generator().manual_seed(1))
            params = {"preset": self.preset, "batch": batch, "prompt": self.prompt, "tokens": self.tokens}
            params["dtype"] = dtype_name(dtype)
            yield from _group(_Task(model, drawn.to(device), self.tokens), names, params, self.seconds)


def _model(config: GPTConfig, dtype: torch.dtype, device: torch.device) -> GPT:
    """Random weights in which blocks outweigh the embeddings: a product doubles the size of what it is given.

    As initialised, a tied head mostly repeats the token just read, which would prove nothing about the cache.
    """
    torch.manual_seed(0)
    model = GPT(config, dtype=dtype)
    with torch.no_grad():
        for weight in model.transformer.h.parameters():
            if weight.ndim == 2:
                weight.normal_(0.0, 2.0 * weight.shape[1] ** -0.5)
    return prepare(model.to(device, dtype).eval())


def _group(task: _Task, names: Sequence[str], params: dict[str, Any], seconds: float) -> Iterator[list[Row]]:
    """Yield the rows of one batch size, a list for each phase."""
    device, (batch, read) = task.prompt.device, task.prompt.shape
    expected = _Ours(task, "eager")(task.tokens + 1)

    @functools.cache  # a provider is prepared once, for both phases
    def proven(name: str) -> Write:
        write = _writer(name, task)
        _check(task.model, task.prompt, expected, write(task.tokens + 1, _nothing))
        return write

    def make(name: str, phase: str) -> Call:
        write = proven(name)
        if phase == "prefill":
            return lambda: write(1, _nothing)
        return Partial(lambda start: write(task.tokens + 1, start), device)

    tokens = {"prefill": batch * read, "decode": batch * task.tokens}
    makers = {f"{name} {phase}": functools.partial(make, name, phase) for name in names for phase in tokens}
    measured = measure(makers, device, clocks(device)[0], seconds=seconds / 2)
    for phase, count in tokens.items():
        rate = functools.partial(lambda count, _, median: {"tokens_per_s": count / median}, count)
        yield _phase(measured, phase).rows("generate", params | {"phase": phase}, rate)


def _nothing() -> None: ...


def _phase(measured: Measured, phase: str) -> Measured:
    """What was measured of one phase, by provider."""

    def of(values: dict[str, Any]) -> dict[str, Any]:
        own = {name: value for name, value in values.items() if name.endswith((phase, CONTROL))}
        return {name.removesuffix(f" {phase}"): value for name, value in own.items()}

    return replace(measured, seconds=of(measured.seconds), host=of(measured.host), failed=of(measured.failed))


def _writer(name: str, task: _Task) -> Write:
    if name.startswith("hf"):
        return _theirs(task, "static" if name == "hf_static" else None)
    return _Ours(task, "eager" if name == "eager" else "triton", graph=name == "triton+graph")


class _Ours:
    """Our model's greedy continuation of a batch. The ids stay on the device, and no step waits for one."""

    def __init__(self, task: _Task, backend: Backend, *, graph: bool = False) -> None:
        B, P = task.prompt.shape
        self.prompt, self.backend = task.prompt, backend
        self.decoder = Decoder(task.model, B, P + task.tokens, sampling=Sampling(temperature=0), graph=graph)
        self.ids = torch.empty((B, task.tokens + 1), dtype=torch.int64, device=task.prompt.device)

    def __call__(self, tokens: int, after_first: Call = _nothing) -> Tensor:
        """(B, tokens) ids; the next call overwrites them."""
        with use_backend(self.backend):
            self.decoder.prefill(self.prompt)
            self.ids[:, 0] = self.decoder.draw()
            after_first()
            for n in range(1, tokens):
                self.ids[:, n] = self.decoder.step()
        return self.ids[:, :tokens]


def _theirs(task: _Task, cache: str | None) -> Write:
    """generate of transformers, with the cache that it calls by this name, its own choice for None."""
    model: Any = peer_models.transformers_gpt2(task.model).eval()
    mask, unfinished = torch.ones_like(task.prompt), torch.zeros_like(task.prompt[:, 0], dtype=torch.bool)

    def write(tokens: int, after_first: Call = _nothing) -> Tensor:
        def look(ids: Tensor, scores: Any, **options: Any) -> Tensor:  # called after each token: is the text complete?
            if ids.shape[1] == task.prompt.shape[1] + 1:
                after_first()
            return unfinished

        ids = model.generate(
            task.prompt, attention_mask=mask, do_sample=False, use_cache=True, cache_implementation=cache,
            max_new_tokens=tokens, min_new_tokens=tokens, stopping_criteria=[look],
        )  # fmt: skip
        return ids[:, task.prompt.shape[1] :]

    return write


def _check(model: GPT, prompt: Tensor, expected: Tensor, ids: Tensor) -> None:
    """Raise Refused unless each sequence of ids is expected's, or departs where rounding leaves both tokens possible.

    prompt: (B, P); expected, ids: (B, N), expected by `model` under the eager backend. Where they part, the exact
    logits of both tokens may differ by twice what kernels/_proof.py grants an output; what follows is not compared.
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
            where = f"token {n} of sequence {b} is {ids[b, n]} and not {expected[b, n]}"
            reason = f"whose logit is {gap:.2g} away; rounding explains {allowed:.2g}"
            raise Refused(f"writes another text: {where}, {reason}")


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
