"""Memory: the peak of a call, and that of a training step, predicted and measured."""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bench import command
from bench.record import Report, Row
from bench.timing import error_line
from kernels import use_backend
from kernels._backend import device_problem
from kernels._registry import dtype_name
from kernels._triton import INTERPRET
from model.config import PRESETS, GPTConfig
from model.gpt import GPT
from model.lora import LoraConfig, add
from model.training import optim
from model.training.memory import Backend, MemoryModel
from model.training.parallel import World
from model.training.step import Guard, Step

Call = Callable[[], Tensor]
MIB, GIB = 2**20, 2**30
BACKENDS: tuple[Backend, ...] = ("eager", "triton")
ON_CPU = 8 * GIB  # a step that needs more takes a CPU minutes


def peak(call: Callable[[], object], device: torch.device) -> int:
    """Peak bytes of device memory of `call`, above what was allocated when it began.

    Counts what torch's allocator hands out, the result included, and not what a library allocates itself. What a first
    call sets up once counts too: call once before. On a CPU the profiler must be free, and the release of a tensor that
    existed before is not seen: of a call that drops old tensors before it makes new ones the peak is too high.
    """
    return levels(call, device)[0]


def levels(call: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """`peak`, and what is left at the end: the result and what it keeps alive, such as a loss's graph."""
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
        else:  # what this call allocated: the profiler can hold a wrong size of an address that it knew before
            now -= live.pop(address, 0)
    return highest, now


def _allocations(nodes: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """(nanoseconds, address, bytes; negative: a release) of every allocation on the CPU below these profiler nodes."""
    for node in nodes:
        if node.tag.name == "Allocation" and node.extra_fields.device.type == "cpu":
            yield node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size
        yield from _allocations(node.children)


def training_step(module: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Call:
    """The step that all benchmarks take: forward, backward, gradients clipped to norm 1, update -> the loss."""

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
    lora: LoraConfig | None = None,
) -> int:
    """Peak bytes of a training step, what exists before it included: parameters, their copies and average, the
    optimizer's state, tokens."""
    model = (GPT(config, dtype) if lora is None else add(GPT(config, dtype), lora)).to(device)
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


@dataclass(frozen=True)
class Memory(command.Measurement):
    """What a training step needs, predicted and measured, and the largest batch that fits common cards."""

    preset: str = "gpt2"  # Model preset; without its dropout.
    batch: tuple[int, ...] = (4, 16, 32, 64)  # Sequences per step.
    context: int | None = None  # Tokens per sequence; the preset's own length by default.
    dtype: command.Dtype = "bfloat16"  # Precision of the activations.

    def check(self) -> None:
        command.require_model(self.preset, self.batch, self.context)

    def total(self, device: torch.device) -> int:
        return len(self.batch)

    def main(self) -> None:
        super().main()
        print(f"largest batch of {self.task()[1]} tokens that should fit:")
        for gib, batches in self.fits():
            print(f"  {gib:>3} GiB  " + "  ".join(f"{backend} {batch}" for backend, batch in batches.items()))

    def task(self) -> tuple[GPTConfig, int, torch.dtype]:
        """The model, tokens per sequence, and dtype."""
        config = replace(PRESETS[self.preset], embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)
        return config, self.context or config.n_positions, getattr(torch, self.dtype)

    def groups(self, device: torch.device, report: Report) -> Iterator[list[Row]]:
        """Yield rows of kind "memory", eager and triton, a list for each batch.

        metrics, in MiB: the parts of a predicted Memory, predicted_mib, and, where the backend can run and the free
        memory suffices, peak_mib. Without a peak, the prediction of triton is for a GPU of 64 GiB or more.
        """
        config, context, dtype = self.task()
        interpreted = "Triton's interpreter keeps tensors that a GPU frees"
        if reason := interpreted if INTERPRET else device_problem(device.type, device.index):
            report.missing.setdefault("triton", f"predicted, not run: {reason}")
        for batch in self.batch:
            params = {"preset": self.preset, "batch": batch, "context": context, "dtype": dtype_name(dtype)}
            rows = []
            for backend in BACKENDS:
                runs = backend == "eager" or not reason
                card: dict[str, Any] = {"card": card_bytes(device)} if runs else {}
                needs, error = MemoryModel(config, context, dtype, backend, **card).predict(batch), ""
                metrics = {f"{name}_mib": size / MIB for name, size in vars(needs).items() if size}
                metrics["predicted_mib"] = needs.peak / MIB
                if runs and needs.peak < free_bytes(device):
                    try:
                        metrics["peak_mib"] = step_peak(config, batch, context, dtype, backend, device) / MIB
                    except Exception as failure:  # out of memory, most likely: it is this row's result
                        error = error_line(failure)
                rows.append(Row("memory", params, backend, metrics=metrics, error=error))
            yield rows

    def fits(self, cards_gib: Sequence[int] = (6, 8, 12, 16, 24, 40, 80)) -> list[tuple[int, Mapping[str, int]]]:
        """(GiB of a card, the largest batch of each backend that is predicted to fit it)."""
        models = {backend: MemoryModel(*self.task(), backend) for backend in BACKENDS}
        return [(gib, {name: m.largest_batch(gib * GIB) for name, m in models.items()}) for gib in cards_gib]


def card_bytes(device: torch.device) -> int:
    """The memory of a GPU; 0 for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def free_bytes(device: torch.device) -> int:
    """Free what no tensor uses, and return the bytes that a measurement may take; on a CPU at most ON_CPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo").read_text() if sys.platform == "linux" else ""
    available = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo, re.M)
    return min(ON_CPU, int(available[1]) * 1024) if available else ON_CPU
