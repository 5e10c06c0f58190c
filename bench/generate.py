"""Greedy generation from random prompts: reading the prompt, then decoding, for all with the same weights.

    eager          our model and its KVCache, PyTorch's operators
    triton         the same, our kernels
    triton+graph   the same, one token's step as a CUDA graph that feeds itself
    hf             generate of transformers' GPT2LMHeadModel
    hf_static      the same with cache_implementation="static", which it compiles; CUDA only
    int8, ...      --weights: ours, its weights in that form (model/quantize.py), by what runs on the device by default

Weights are cast to the precision once, before; weights_mib is what they take then, of ours. In each round a provider
writes 1 token, which is the phase "prefill", whose tokens_per_s counts those of the prompts; and N + 1 tokens, of which
the phase "decode" times the last N. Each is proven first: the N + 1 ids must be those of eager, up to rounding
(`_check`); with --weights, what the same weights find likeliest in the whole text, read at once (`_check_likeliest`).

--ragged: prompts of a quarter up to all of P tokens, in one batch; Hugging Face's are padded on the left.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bench import command, peer_models
from bench.record import CONTROL, Report, Row
from bench.timing import Call, Measured, Partial, Refused, clocks, measure
from kernels import use_backend
from kernels._backend import Backend
from kernels._proof import OUTPUT_FACTOR, budget
from kernels._registry import dtype_name
from model.cli import UserError
from model.config import PRESETS, GPTConfig
from model.decoder import Decoder
from model.gpt import GPT
from model.quantize import Weights, avoid_amx, prepare, weight_bytes
from model.sampling import Sampling

PROVIDERS = ("eager", "triton", "triton+graph", "hf", "hf_static")
# (how many tokens, a function to call once the first of them is written) -> their ids, (B, that many) int64
Write = Callable[[int, Call], Tensor]


@dataclass(frozen=True)
class _Task:
    """What all providers of a batch size do: continue `prompt`, (B, P) int64, by `tokens` + 1 ids.

    lengths: of prompts that are padded on the right; None: all are P. low: the models of --weights.
    """

    model: GPT
    prompt: Tensor
    tokens: int
    lengths: list[int] | None = None
    low: Mapping[str, GPT] = field(default_factory=dict)

    def texts(self) -> list[Tensor]:
        """The prompts without padding."""
        B, P = self.prompt.shape
        return [row[:length] for row, length in zip(self.prompt, self.lengths or [P] * B, strict=True)]


@dataclass(frozen=True)
class Generate(command.Timed):
    """Tokens per second of reading a prompt and of decoding, and those of Hugging Face's generate."""

    preset: str = "gpt2"  # Model preset; its weights are random, the same for all.
    batch: tuple[int, ...] = (1, 8, 64)  # Sequences at a time.
    prompt: int = 512  # Tokens of the prompt.
    tokens: int = 64  # Tokens to generate.
    ragged: bool = False  # Prompts of different lengths, a quarter up to all of --prompt.
    weights: tuple[Weights, ...] = ()  # Also time our model with weights in these formats; int8 turns AMX off on a CPU.
    dtype: command.Dtype | None = None  # Precision; bfloat16 on a GPU and float32 on a CPU by default.

    def check(self) -> None:
        command.require_model(self.preset, self.batch)
        command.pick("provider", self.provider, PROVIDERS)
        command.require_positive(seconds=self.seconds, prompt=self.prompt, tokens=self.tokens)
        limit, both = PRESETS[self.preset].n_positions, self.prompt + self.tokens
        if both > limit:
            has = f"the preset {self.preset} has {limit} positions"
            raise UserError(f"--prompt and --tokens are {both} together, and {has}: reduce one of them")

    def total(self, device: torch.device) -> int:
        return 2 * len(self.batch)

    def groups(self, device: torch.device, report: Report) -> Iterator[list[Row]]:
        """Yield two lists of rows per batch size, prefill and decode of the same rounds."""
        config, dtype = PRESETS[self.preset], command.dtype_of(self.dtype, device)
        names = peer_models.available(self.provider or PROVIDERS, device, config, report.missing)
        if "int8" in self.weights and device.type == "cpu":
            avoid_amx()  # as model.generate does
        model = _model(config, dtype, device)
        low: dict[str, GPT] = {weights: _model(config, torch.float32, device, weights) for weights in self.weights}
        for batch in self.batch:
            drawn = torch.randint(config.vocab_size, (batch, self.prompt), generator=torch.Generator().manual_seed(1))
            params = {"preset": self.preset, "batch": batch, "prompt": self.prompt, "tokens": self.tokens}
            params["dtype"] = dtype_name(dtype)
            if self.ragged:
                params["prompts"] = "ragged"
            lengths = _ragged(batch, self.prompt) if self.ragged else None
            task = _Task(model, drawn.to(device), self.tokens, lengths, low)
            yield from _group(task, [*names, *low], params, self.seconds)


def _ragged(batch: int, prompt: int) -> list[int]:
    """Lengths of `batch` prompts, from the longest down to a quarter of it."""
    return torch.linspace(prompt, max(1, prompt // 4), batch).round().int().tolist()


def _model(config: GPTConfig, dtype: torch.dtype, device: torch.device, weights: Weights | None = None) -> GPT:
    """Random weights in which blocks outweigh the embeddings: a product doubles the size of what it is given.

    As initialised, a tied head mostly repeats the token just read, which would prove nothing about the cache.
    """
    torch.manual_seed(0)
    model = GPT(config, dtype=dtype)
    with torch.no_grad():
        for weight in model.transformer.h.parameters():
            if weight.ndim == 2:
                weight.normal_(0.0, 2.0 * weight.shape[1] ** -0.5)
    return prepare(model.to(device, dtype).eval(), weights)


def _group(task: _Task, names: Sequence[str], params: dict[str, Any], seconds: float) -> Iterator[list[Row]]:
    """Yield the rows of one batch size, a list for each phase."""
    device, batch = task.prompt.device, len(task.prompt)
    expected = _Ours(task, "eager")(task.tokens + 1)

    @functools.cache  # a provider is prepared once, for both phases
    def proven(name: str) -> Write:
        write = _writer(name, task)
        ids = write(task.tokens + 1, _nothing)
        if name in task.low:
            _check_likeliest(task.low[name], task.model, task.texts(), ids)
        else:
            _check(task.model, task.texts(), expected, ids)
        return write

    def make(name: str, phase: str) -> Call:
        write = proven(name)
        if phase == "prefill":
            return lambda: write(1, _nothing)
        return Partial(lambda start: write(task.tokens + 1, start), device)

    tokens = {"prefill": sum(map(len, task.texts())), "decode": batch * task.tokens}
    makers = {f"{name} {phase}": functools.partial(make, name, phase) for name in names for phase in tokens}
    measured = measure(makers, device, clocks(device)[0], seconds=seconds / 2)
    for phase, count in tokens.items():
        figures = functools.partial(_figures, task, count)
        yield _phase(measured, phase).rows("generate", params | {"phase": phase}, figures)


def _figures(task: _Task, tokens: int, name: str, median: float) -> dict[str, float]:
    model = None if name.startswith("hf") else task.low.get(name, task.model)
    weights = {} if model is None else {"weights_mib": weight_bytes(model) / 2**20}
    return {"tokens_per_s": tokens / median, **weights}


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
    if name in task.low:
        return _Ours(replace(task, model=task.low[name]), "auto", graph=task.prompt.is_cuda)
    return _Ours(task, "eager" if name == "eager" else "triton", graph=name == "triton+graph")


class _Ours:
    """Our model's greedy continuation of a batch. The ids stay on the device, and no step waits for one."""

    def __init__(self, task: _Task, backend: Backend, *, graph: bool = False) -> None:
        B, P = task.prompt.shape
        self.prompt, self.lengths, self.backend = task.prompt, task.lengths, backend
        self.decoder = Decoder(task.model, B, P + task.tokens, sampling=Sampling(temperature=0), graph=graph)
        self.ids = torch.empty((B, task.tokens + 1), dtype=torch.int64, device=task.prompt.device)

    def __call__(self, tokens: int, after_first: Call = _nothing) -> Tensor:
        """(B, tokens) ids; the next call overwrites them."""
        with use_backend(self.backend):
            self.decoder.prefill(self.prompt, self.lengths)
            self.ids[:, 0] = self.decoder.draw()
            after_first()
            for n in range(1, tokens):
                self.ids[:, n] = self.decoder.step()
        return self.ids[:, :tokens]


def _theirs(task: _Task, cache: str | None) -> Write:
    """generate of transformers, with the cache that it calls by this name, its own choice for None."""
    model: Any = peer_models.transformers_gpt2(task.model).eval()
    texts, (B, P) = task.texts(), task.prompt.shape
    prompt, mask = torch.zeros_like(task.prompt), torch.zeros_like(task.prompt)
    for b, text in enumerate(texts):
        prompt[b, P - len(text) :], mask[b, P - len(text) :] = text, 1
    unfinished = torch.zeros(B, dtype=torch.bool, device=prompt.device)

    def write(tokens: int, after_first: Call = _nothing) -> Tensor:
        def look(ids: Tensor, scores: Any, **options: Any) -> Tensor:  # called after each token: is the text complete?
            if ids.shape[1] == P + 1:
                after_first()
            return unfinished

        ids = model.generate(
            prompt, attention_mask=mask, do_sample=False, use_cache=True, cache_implementation=cache,
            max_new_tokens=tokens, min_new_tokens=tokens, stopping_criteria=[look],
        )  # fmt: skip
        return ids[:, P:]

    return write


def _check(model: GPT, prompts: Sequence[Tensor], expected: Tensor, ids: Tensor) -> None:
    """Raise Refused unless each sequence of ids is expected's, or departs where rounding leaves both tokens possible.

    prompts: B of (T,); expected, ids: (B, N), expected by `model` under the eager backend. Where they part, the exact
    logits of both tokens may differ by twice what kernels/_proof.py grants an output; what follows is not compared.
    """
    parted = (ids != expected).any(1).nonzero().flatten().tolist()
    exact_model = _exact(model) if parted else model
    for b in parted:
        n = int((ids[b] != expected[b]).nonzero()[0])
        text = torch.cat([prompts[b], expected[b, :n]])
        exact, eager = _logits(exact_model, text)[-1], _logits(model, text)[-1]
        gap = (exact[expected[b, n]] - exact[ids[b, n]]).abs().item()
        allowed = 2 * budget(exact, eager, OUTPUT_FACTOR)
        if not gap <= allowed:
            where = f"token {n} of sequence {b} is {ids[b, n]} and not {expected[b, n]}"
            reason = f"whose logit is {gap:.2g} away; rounding explains {allowed:.2g}"
            raise Refused(f"writes another text: {where}, {reason}")


def _check_likeliest(low: GPT, model: GPT, prompts: Sequence[Tensor], ids: Tensor) -> None:
    """Raise Refused unless each of the ids, (B, N), is the likeliest where `low` reads the text at once, or all but.

    Its logit may be below the highest by twice what kernels/_proof.py grants an output, the error of `low` being that
    against the exact logits of `model`, whose weights it has in fewer bits.
    """
    exact_model: GPT | None = None
    for b, (prompt, new) in enumerate(zip(prompts, ids, strict=True)):
        text = torch.cat([prompt, new[:-1]])
        logits = _logits(low, text)[len(prompt) - 1 :]  # (N, V)
        gap = logits.amax(1) - logits.gather(1, new[:, None])[:, 0]
        if gap.any():
            exact_model = exact_model or _exact(model)
            exact = _logits(exact_model, text)[len(prompt) - 1 :]
            allowed, n = 2 * budget(exact, logits, OUTPUT_FACTOR), int(gap.argmax())
            if not gap[n].item() <= allowed:
                what = f"token {n} of sequence {b} has a logit {gap[n].item():.2g} below the highest"
                raise Refused(f"writes another text: {what}; rounding explains {allowed:.2g}")


def _exact(model: GPT) -> GPT:
    """The same weights in a precision beyond the model's."""
    exact = copy.deepcopy(model)
    exact.dtype = torch.float64 if model.dtype == torch.float32 else torch.float32
    return exact.to(exact.dtype)


@torch.inference_mode()
def _logits(model: GPT, text: Tensor) -> Tensor:
    """(T,) ids -> (T, V) logits."""
    with use_backend("eager"):
        logits, _ = model(text[None])
    assert logits is not None
    return logits[0]
