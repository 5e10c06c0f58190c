"""A profiler trace of a few steps, and a record of every allocation: each an option of the trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

SKIP, STEPS = 5, 3  # steps before the trace begins (they compile and allocate), and steps in it
TRACE, SNAPSHOT = "trace.json.gz", "memory.pickle"


@contextlib.contextmanager
def trace(folder: Path, *, wanted: bool) -> Iterator[Callable[[], None]]:
    """Record steps SKIP + 1 to SKIP + STEPS into RUN/trace.json.gz. Yields what is to be called after each step."""
    if not wanted:
        yield lambda: None
        return
    from torch.profiler import ProfilerActivity, profile, schedule

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()

    def write(profiler: profile) -> None:
        profiler.export_chrome_trace(str(folder / TRACE))
        print(f"trace of {STEPS} steps: {folder / TRACE}, for https://ui.perfetto.dev or chrome://tracing", flush=True)

    plan = schedule(wait=SKIP - 1, warmup=1, active=STEPS, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write, record_shapes=True) as profiler:
        yield profiler.step


@contextlib.contextmanager
def memory_snapshot(folder: Path, *, wanted: bool) -> Iterator[None]:
    """Record allocations on the GPU into RUN/memory.pickle, also when memory runs out."""
    if not wanted:
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=200_000)
    try:
        yield
    finally:
        torch.cuda.memory._dump_snapshot(str(folder / SNAPSHOT))
        torch.cuda.memory._record_memory_history(enabled=None)
        print(f"allocations: {folder / SNAPSHOT}, for https://pytorch.org/memory_viz", flush=True)
