"""Memory: what a call needs at its highest, and what a training step was predicted to need beside what it takes."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bench.record import Row, dtype_name
from bench.timing import why
from kernels import use_backend
from kernels._dispatch import device_problem
from kernels._triton import INTERPRET
from model.config import PRESETS, GPTConfig
from model.gpt import GPT
from model.training import memory as step_memory
from model.training import optim
from model.training.memory import Backend
from model.training.parallel import World
from model.training.step import Guard, Step

Call = Callable[[], Tensor]
MIB, GIB = 2**20, 2**30
BACKENDS: tuple[Backend, ...] = ("eager", "triton")
ON_CPU = 8 * GIB  # a step that needs more takes a CPU minutes


def peak(call: Callable[[], object], device: torch.device) -> int:
    """Bytes of device memory that `call` needs at its highest, above what was allocated when it began.

    What torch's allocator hands out, its result included; not what a library takes beside it. What a first call sets up
    once counts too: call once before. On a CPU the profiler must be free, and the release of a tensor that was there
    before is not seen, so a call that drops old tensors before it makes new ones is given too high a number.
    """
    return levels(call, device)[0]


def levels(call: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """`peak`, and what is left of it at the end: the result and what hangs on it, such as a loss's graph."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        return torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would announce itself on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()  # noqa: F841  # alive to the end
    events = [*_allocations(profiler.profiler.kineto_results.experimental_event_tree())]
    live: dict[int, int] = {}
    now = highest = 0
    for _, address, size in sorted(events, key=lambda event: event[0]):
        if size > 0:
            live[address] = size
            now += size
            highest = max(highest, now)
        else:  # counts for what this call took: of an address it knew before, the profiler can hold a wrong size
            now -= live.pop(address, 0)
    return highest, now


def _allocations(nodes: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """(nanoseconds, address, bytes; negative: a release) of every allocation on the CPU below these profiler nodes."""
    for node in nodes:
        if node.tag.name == "Allocation" and node.extra_fields.device.type == "cpu":
            yield node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size
        yield from _allocations(node.children)


def training_step(module: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Call:
    """A step as all benchmarks take it: forward, backward, gradients clipped to norm 1, update -> the loss."""

    def step() -> Tensor:
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


def step_peak(
    config: GPTConfig,
    batch: int,
    context: int,
    dtype: torch.dtype,
    backend: Backend,
    device: torch.device,
    *,
    micro_steps: int = 1,
    optimizer: Literal["adamw", "muon"] = "adamw",
    ema: bool = False,
    recompute: bool = False,
) -> int:
    """Bytes of a step of training at its highest, what lives before it included: parameters, their copies and average,
    the optimizer's state, tokens.
    """
    model = GPT(config, dtype).to(device)
    model.keep_working_weights()
    model.recompute = recompute
    optimizers = optim.build(model, kind=optimizer, betas=(0.9, 0.95), weight_decay=0.1)
    average = optim.EMA(model, 0.999) if ema else None
    world = World(0, 1, 0, device)
    step = Step(model, model, optimizers, Guard(device), world, grad_clip=1.0, seed=0, ema=average)
    idx = torch.randint(config.vocab_size, (micro_steps, batch, context), device=device)
    targets = idx.roll(-1, 2)

    held = [*model.parameters(), *model.buffers(), idx, targets, *(average.tensors.values() if average else ())]
    held += optim.optimizer_state(optimizers, model).values()
    with use_backend(backend):
        step(idx, targets, step=1, lr=6e-4)  # what compiles and what libraries set up once
        return sum(t.nbytes for t in held) + peak(lambda: step(idx, targets, step=2, lr=6e-4), device)


def run(
    device: torch.device,
    preset: str,
    batches: Sequence[int],
    context: int,
    dtype: torch.dtype,
    missing: dict[str, str],
) -> Iterator[list[Row]]:
    """Rows of kind "memory", a list for each batch: a training step without dropout, eager and triton.

    metrics, in MiB: the parts of step_memory.Memory, predicted_mib, and peak_mib of a step that was run: where the
    backend can run and the prediction fits the free memory (and 8 GiB of a CPU's). missing: is told why triton has no
    peak; its prediction is then for a GPU of 64 GiB or more.
    """
    config = _without_dropout(preset)
    reason = (
        "Triton's interpreter keeps tensors that a GPU gives back"
        if INTERPRET
        else device_problem(device.type, device.index)
    )
    if reason:
        missing.setdefault("triton", f"predicted, not run: {reason}")
    here = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    for batch in batches:
        rows = []
        for backend in BACKENDS:
            runs = backend == "eager" or not reason
            card: dict[str, Any] = {"card": here} if runs else {}
            needs = step_memory.memory(config, batch, context, dtype, backend, **card)
            metrics = {**parts(needs), "predicted_mib": needs.peak / MIB}
            error = ""
            if runs and needs.peak < _free(device):
                try:
                    metrics["peak_mib"] = step_peak(config, batch, context, dtype, backend, device) / MIB
                except Exception as failure:  # out of memory, most likely: it is this row's result
                    error = why(failure)
            params = {"preset": preset, "batch": batch, "context": context, "dtype": dtype_name(dtype)}
            rows.append(Row("memory", params, backend, metrics=metrics, error=error))
        yield rows


def parts(needs: step_memory.Memory) -> dict[str, float]:
    """The parts of a prediction as metrics, in MiB; without those that such a step does not have."""
    return {f"{name}_mib": size / MIB for name, size in vars(needs).items() if size}


def fits(
    preset: str, context: int, dtype: torch.dtype, cards_gib: Sequence[int] = (6, 8, 12, 16, 24, 40, 80)
) -> list[tuple[int, Mapping[str, int]]]:
    """(GiB of a card, the largest batch of each backend that is predicted to fit it), dropout left out."""
    config = _without_dropout(preset)
    return [
        (gib, {backend: step_memory.largest_batch(config, context, dtype, backend, gib * GIB) for backend in BACKENDS})
        for gib in cards_gib
    ]


def _without_dropout(preset: str) -> GPTConfig:
    return replace(PRESETS[preset], embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)


def _free(device: torch.device) -> int:
    """Bytes that a measurement may take."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        available = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    except OSError:  # not Linux: what most machines have
        return ON_CPU
    return min(ON_CPU, int(available[1]) * 1024) if available else ON_CPU
