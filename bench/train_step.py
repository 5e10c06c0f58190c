"""A whole training step of a GPT: forward, backward, gradients clipped to norm 1, fused AdamW.

All start from the same weights, take the same batch of random tokens, drop nothing, and share the optimizer:

    plain          PyTorch's operators, attention as a textbook writes it (SDPA's math backend)
    eager          PyTorch's operators, attention by the SDPA backend that it picks
    compile        torch.compile of eager, forward and backward
    +attention     eager with our attention
    +layer_norm    and our LayerNorms
    +gelu          and our GELU
    triton         and our loss: all operators are ours
    triton+graph   the same, the optimizer included, as one CUDA graph
    trainer        the step of train.py: that, with weights kept in the activations' dtype, clipping inside the
                   optimizer, and guards; on a CPU eager and without a graph
    hf             GPT2LMHeadModel of transformers, attention by SDPA
    hf+liger       the same with Liger's LayerNorm and fused linear cross-entropy
    nanogpt        the model.py of a nanoGPT checkout

Weights are float32 for all, and no loss is scaled. In 16 bits ours keeps all activations in that dtype, the residual
stream among them; the last three run under torch.autocast, as their users run them, which keeps residual stream and
LayerNorm in float32.

The gate: three losses. The first must be that of the first provider of the group, and so must what two updates take
off it, which proves gradients and optimizer; the third one of triton+graph comes from the graph.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import peer_models
from bench.memory import peak, training_step
from bench.record import CONTROL, Row, dtype_name
from bench.timing import Call, Maker, Measured, clocks, measure
from kernels import use_backend
from model.cli import UserError
from model.config import PRESETS, GPTConfig
from model.gpt import GPT
from model.training import flops
from model.training import memory as step_memory
from model.training.optim import adamw, build
from model.training.parallel import World
from model.training.step import Guard, Step

LADDER = ("plain", "eager", "compile", "+attention", "+layer_norm", "+gelu", "triton", "triton+graph", "trainer")
PROVIDERS = (*LADDER, "hf", "hf+liger", "nanogpt")
_OURS = {"+attention": 1, "+layer_norm": 3, "+gelu": 4}  # how many of the operators below run on Triton
_OPERATORS = ("causal_attention", "layer_norm", "add_layer_norm", "bias_gelu")
_PREDICTED: dict[str, step_memory.Backend] = {"eager": "eager", "triton": "triton", "triton+graph": "triton"}
# Relative, for the first loss and for its fall. Rounding alone differs by 2e-5 and 2e-3 in 16 bits.
_TOLERANCE = {torch.float32: (1e-5, 1e-3), torch.bfloat16: (1e-3, 2e-2), torch.float16: (1e-3, 2e-2)}
_MIB = 2**20


@dataclass(frozen=True)
class _Task:
    """What all providers of a group do."""

    config: GPTConfig
    batch: int
    context: int
    dtype: torch.dtype
    device: torch.device
    nanogpt: Path | None

    def tokens(self) -> tuple[Tensor, Tensor]:
        """(batch, context) random ids, and their successors as targets."""
        generator = torch.Generator().manual_seed(1)
        idx = torch.randint(self.config.vocab_size, (self.batch, self.context), generator=generator).to(self.device)
        return idx, idx.roll(-1, 1)

    def memory(self, backend: step_memory.Backend, **options: Any) -> step_memory.Memory:
        card = torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else 0
        return step_memory.memory(self.config, self.batch, self.context, self.dtype, backend, card=card, **options)


@dataclass
class _Proof:
    """What was found out before the clock started, by provider."""

    losses: dict[str, list[float]] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)


class _Refused(Exception):
    """A provider that must not be timed; the message is the whole reason."""


def run(
    device: torch.device,
    preset: str,
    batches: Sequence[int],
    context: int,
    dtype: torch.dtype,
    missing: dict[str, str],
    *,
    providers: Sequence[str] | None = None,
    seconds: float = 5.0,
    nanogpt: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Iterator[list[Row]]:
    """A list of rows per batch size: each provider that runs here, and why the others failed.

    missing: is told who cannot run here, and why. nanogpt: folder of a checkout. overrides: fields of the preset's
    GPTConfig. UserError if they make no model. Metrics of a row: tokens_per_s, mfu where the device's peak is known,
    the memory of one step in MiB, measured (by part) and predicted, and interleaved: 1 where all providers of the group
    were timed by turns, 0 where they did not fit in memory together and were timed one after another.
    """
    try:
        config = replace(PRESETS[preset], **(overrides or {}), embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)
    except ValueError as error:
        raise UserError(f"{preset} cannot be changed so: {error}") from None
    changed = {name: value for name, value in (overrides or {}).items() if value != getattr(PRESETS[preset], name)}
    names = []
    for name in providers or PROVIDERS:
        if reason := _absent(name, device, config, nanogpt):
            missing[name] = reason
        else:
            names.append(name)
    for batch in batches:
        yield _group(
            _Task(config, batch, context, dtype, device, nanogpt), names, {"preset": preset, **changed}, seconds
        )


def _absent(name: str, device: torch.device, config: GPTConfig, nanogpt: Path | None) -> str | None:
    """Why a provider cannot run here, in words, or None."""
    if (name.startswith(("+", "triton")) or name == "hf+liger") and device.type != "cuda":
        return "needs a CUDA device"
    if name == "nanogpt":
        return None if nanogpt else "no folder of a nanoGPT checkout was given"
    if name == "hf+liger" and (reason := peer_models.absent("liger_kernel")):
        return reason
    return peer_models.unlike_transformers(config) if name.startswith("hf") else None


def _group(task: _Task, names: Sequence[str], model: dict[str, Any], seconds: float) -> list[Row]:
    """The rows of one batch size. model: the parameters that name it."""
    proof = _Proof()
    makers = {name: functools.partial(_prepare, name, task, proof) for name in names}
    measured, together = _measure(makers, task, seconds)
    peak_flops = flops.peak_flops(task.device, task.dtype)

    def metrics(provider: str, median: float) -> dict[str, float]:
        found = {"tokens_per_s": task.batch * task.context / median, "interleaved": float(together)}
        if peak_flops:
            found["mfu"] = flops.mfu(found["tokens_per_s"], task.config, task.context, peak_flops)
        return found | proof.metrics[provider]

    params = {**model, "batch": task.batch, "context": task.context, "dtype": dtype_name(task.dtype)}
    rows = measured.rows("train", params, metrics)
    return [replace(row, error=row.error.removeprefix("_Refused: ")) for row in rows]


def _measure(makers: Mapping[str, Maker], task: _Task, seconds: float) -> tuple[Measured, bool]:
    """Times the providers by turns, or one after another where memory is short; and whether it was by turns."""
    clock = clocks(task.device)[0]  # a step is many launches: what the host fails to hide is part of it
    if _fit_together(task, len(makers)):
        with contextlib.suppress(torch.OutOfMemoryError):
            measured = measure(makers, task.device, clock, seconds=seconds)
            if not any("OutOfMemoryError" in text for text in measured.failed.values()):
                return measured, True
    whole, control = Measured(clock), tuple[float, ...]()
    for name, maker in makers.items():
        part = measure({name: maker}, task.device, clock, seconds=seconds)
        control += part.seconds.pop(CONTROL, ())
        whole.seconds |= part.seconds
        whole.host |= part.host
        whole.failed |= part.failed
        whole.state |= part.state
    if control:
        whole.seconds[CONTROL] = control
    return whole, False


def _fit_together(task: _Task, providers: int) -> bool:
    """Whether half of the free memory has room for the states of all and two working sets, as a graph keeps its own.

    The other half is for what is not predicted: attention with all its probabilities, other people's models.
    """
    if task.device.type != "cuda":
        return True
    _tidy(task.device)
    need = task.memory("eager")
    state = need.parameters + need.optimizer
    return providers * state + 2 * (need.peak - state) <= torch.cuda.mem_get_info(task.device)[0] / 2


def _tidy(device: torch.device) -> None:
    """Gives back what the provider before left, a failed one too."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- one provider ----------------------------------------------------------------------------------------------------


def _prepare(provider: str, task: _Task, proof: _Proof) -> Call:
    """A provider's step, ready to be timed: its losses are those of the others and its memory is known."""
    _tidy(task.device)
    module, loss = _model(provider, task)
    if provider == "trainer":
        plain_step, optimizer = _trainer(module, task)
    else:
        optimizer = adamw(module, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
        plain_step = training_step(module, optimizer, loss)

    def step() -> Tensor:
        with _backend(provider, task.device):
            return plain_step()

    if provider == "triton+graph":
        losses, call, highest = _three_steps_in_a_graph(step, task.device)
    else:
        losses, call, highest = _three_steps(step, task.device)
    if provider == "trainer":  # the fourth step is captured, where there is a graph
        highest = max(highest, peak(step, task.device))
    _check(provider, [value.item() for value in losses], task.dtype, proof)
    with _backend(provider, task.device):
        parts = _parts(module, loss)
    parts["optimizer"] = _bytes(t for state in optimizer.state.values() for t in state.values())
    before = parts["parameters"] + parts["optimizer"] + _bytes(task.tokens())
    parts["peak"] = before + highest
    parts["workspace"] = parts["peak"] - parts["parameters"] - parts["optimizer"] - parts["activations"]
    if backend := _PREDICTED.get(provider):
        parts["predicted"] = task.memory(backend).peak
    elif provider == "trainer":
        graph = task.device.type == "cuda"
        parts["predicted"] = task.memory("triton" if graph else "eager", graph=graph).peak
    proof.metrics[provider] = {f"{name}_mib": size / _MIB for name, size in parts.items()}
    return call


def _model(provider: str, task: _Task) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The provider's model with the weights of all, and the loss of the batch as a function without arguments."""
    torch.manual_seed(0)
    model = GPT(task.config, dtype=task.dtype).to(task.device)
    idx, targets = task.tokens()
    if provider in LADDER:
        if provider == "compile":
            torch.compiler.reset()  # a step compiles for its own shapes, not for whatever ran before
        ours = torch.compile(model) if provider == "compile" else model
        return model, lambda: ours(idx, targets)[1]
    if provider == "nanogpt":
        assert task.nanogpt is not None
        theirs, forward = peer_models.nanogpt(model, task.nanogpt), peer_models.nanogpt_loss
    else:
        theirs, forward = peer_models.transformers_gpt2(model), peer_models.transformers_loss
    if provider == "hf+liger":
        peer_models.give_liger_norms(theirs)
        forward = peer_models.liger_loss

    def loss() -> Tensor:
        with peer_models.autocast(task.device, task.dtype):
            return forward(theirs, idx, targets)

    return theirs, loss


def _trainer(model: nn.Module, task: _Task) -> tuple[Callable[[], Tensor], torch.optim.Optimizer]:
    """The step of train.py on one process, and its optimizer."""
    assert isinstance(model, GPT)
    model.keep_working_weights()
    (optimizer,) = build(model, kind="adamw", betas=(0.9, 0.95), weight_decay=0.1)
    world, guard = World(0, 1, 0, task.device), Guard(task.device, scaled=task.dtype == torch.float16)
    graph = task.device.type == "cuda"
    step = Step(model, model, [optimizer], guard, world, grad_clip=1.0, seed=0, graph=graph)
    idx, targets = (x[None] for x in task.tokens())
    numbers = itertools.count(1)

    def run() -> Tensor:
        step(idx, targets, step=next(numbers), lr=1e-4)
        return step.loss.clone()

    if not graph:
        return run, optimizer
    stream = torch.cuda.Stream(task.device)  # a graph cannot be captured on the default stream

    def run_beside() -> Tensor:
        stream.wait_stream(torch.cuda.current_stream(task.device))
        with torch.cuda.stream(stream):
            loss = run()
        torch.cuda.current_stream(task.device).wait_stream(stream)
        return loss

    return run_beside, optimizer


@contextlib.contextmanager
def _backend(provider: str, device: torch.device) -> Iterator[None]:
    """How the operators run for a provider."""
    on_gpu = provider == "trainer" and device.type == "cuda"
    everywhere = "triton" if provider.startswith("triton") or on_gpu else "eager"
    some = {name: "triton" for name in _OPERATORS[: _OURS.get(provider, 0)]}
    attention = sdpa_kernel(SDPBackend.MATH) if provider == "plain" else contextlib.nullcontext()
    with use_backend(everywhere, **some), attention:  # type: ignore[arg-type]
        yield


def _three_steps(step: Callable[[], Tensor], device: torch.device) -> tuple[list[Tensor], Call, int]:
    """The losses of three steps, the call that will be timed, and the bytes that a step needs at its highest."""
    losses = [step(), step()]
    highest = peak(lambda: losses.append(step()), device)
    return losses, step, highest


def _three_steps_in_a_graph(step: Callable[[], Tensor], device: torch.device) -> tuple[list[Tensor], Call, int]:
    """The same; the third step is the first replay, and what it needs is what the capture took."""
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        losses = [step(), step()]
    torch.cuda.synchronize(device)

    def capture() -> None:
        with torch.cuda.graph(graph, stream=stream):
            losses.append(step())

    highest = peak(capture, device)
    graph.replay()
    return losses, graph.replay, highest


def _check(provider: str, losses: list[float], dtype: torch.dtype, proof: _Proof) -> None:
    """_Refused unless the losses are those of the first provider that got here."""
    reference, (first, _, third) = next(iter(proof.losses.items()), (provider, losses))
    value, fall = _TOLERANCE[dtype]
    same = abs(losses[0] - first) <= value * abs(first)
    same_fall = abs((losses[0] - losses[2]) - (first - third)) <= fall * abs(first - third)
    if not (same and same_fall):  # NaN is never the same
        raise _Refused(
            f"computes another loss: {losses[0]:.5f}, after two steps {losses[2]:.5f}; "
            f"{reference} has {first:.5f} and {third:.5f}"
        )
    proof.losses[provider] = losses


def _parts(module: nn.Module, loss: Callable[[], Tensor]) -> dict[str, int]:
    """Bytes of the parameters, of what autograd keeps for the backward pass, and of the gradients."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        value = loss()
    value.backward()
    parts = {
        "parameters": _bytes((*module.parameters(), *module.buffers())),
        "gradients": _bytes(p.grad for p in module.parameters() if p.grad is not None),
        "activations": sum(kept.values()),
    }
    module.zero_grad(set_to_none=True)
    return parts


def _bytes(tensors: Any) -> int:
    return sum(t.nbytes for t in tensors)
