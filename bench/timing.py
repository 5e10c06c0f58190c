"""Time of short operations: providers in turn, caches emptied, every sample kept.

Three clocks, never mixed in one row:

    events   CUDA events around a call, the L2 cache overwritten before it: device time plus what the host fails to hide
    graph    a CUDA graph that replays the call, the L2 cache overwritten before each: device time alone
    wall     torch.utils.benchmark on a CPU: threads as torch has them, warmed up, garbage collection off

What is timed is made by a function without arguments: work that belongs to the call but not to its time, such as the
forward pass of a backward pass, happens there, on the stream on which the call will run.
"""

from __future__ import annotations

import abc
import contextlib
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from bench.record import CONTROL, Row, machine_state

Call = Callable[[], object]
Maker = Callable[[], Call]

MIN_ROUNDS, MAX_ROUNDS = 5, 50
METHOD = {
    "events": "CUDA events around one call, L2 overwritten before it, providers in turn",
    "graph": "ten calls in a CUDA graph, L2 overwritten before each, less the same graph without the calls, over ten",
    "wall": "torch.utils.benchmark, a sample of at least 5 ms after two calls of warm-up, providers in turn, "
    "freed memory kept by malloc",
    "interval": f"p50 of {MIN_ROUNDS} to {MAX_ROUNDS} rounds; p20 and p80 beside it; every sample in the report",
}
_IN_GRAPH = 10
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_WALL_SAMPLE = 5e-3


@dataclass
class Measured:
    """Samples of one clock. seconds: by provider, sample i of each from round i; failed: provider -> why not.

    host: median seconds that the host needs to issue a call ("events" only). state: the machine, before and after.
    """

    clock: str
    seconds: dict[str, tuple[float, ...]] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    state: dict[str, float] = field(default_factory=dict)

    def rows(self, kind: str, params: dict[str, Any], metrics: Callable[[str, float], dict[str, float]]) -> list[Row]:
        """A row for each provider, those that failed included. metrics: (provider, median seconds) -> its metrics."""
        rows = []
        for provider, samples in self.seconds.items():
            found = self.state if provider == CONTROL else metrics(provider, statistics.median(samples))
            if provider in self.host and provider != CONTROL:
                found = {**found, "host_ms": self.host[provider] * 1e3}
            rows.append(Row(kind, params, provider, self.clock, samples, found))
        return rows + [Row(kind, params, provider, self.clock, error=text) for provider, text in self.failed.items()]


def clocks(device: torch.device) -> tuple[str, ...]:
    """The clocks of a device."""
    return ("events", "graph") if device.type == "cuda" else ("wall",)


def why(error: Exception) -> str:
    """An exception in a line, for a report: what a provider cannot do is a result."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def measure(makers: Mapping[str, Maker], device: torch.device, clock: str, *, seconds: float = 0.5) -> Measured:
    """Times each provider for about `seconds`, by turns, so that a drifting clock hits all alike; one more provider,
    "control", is timed among them. What cannot be made or run is in `failed`, and the others go on.
    """
    kinds: dict[str, Callable[[torch.device], _Timer]] = {"events": _Events, "graph": _Graph, "wall": _Wall}
    timer = kinds[clock](device)
    measured = Measured(clock)
    samples: dict[str, list[float]] = {}
    ready: dict[str, Callable[[], float]] = {}
    for name, maker in {**makers, CONTROL: lambda: control(device)}.items():
        try:
            ready[name], host = timer.prepare(maker)
        except Exception as error:
            measured.failed[name] = why(error)
            continue
        samples[name] = []
        if host is not None:
            measured.host[name] = host
    before = machine_state(device)
    budget, rounds, started = seconds * len(ready), 0, time.perf_counter()
    while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and time.perf_counter() - started < budget):
        timer.new_round()
        for name, sample in [*ready.items()]:
            try:
                samples[name].append(sample())
            except Exception as error:
                measured.failed[name] = why(error)
                del ready[name], samples[name]
        rounds += 1
    after = machine_state(device)
    measured.state = {key: (before[key] + after[key]) / 2 for key in before.keys() & after.keys()}
    measured.seconds = {name: tuple(values) for name, values in samples.items()}
    return measured


def control(device: torch.device) -> Call:
    """A copy and a matrix product that never change: the machine's own speed at the time."""
    elements, n = (2**25, 2048) if device.type == "cuda" else (2**20, 256)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    source = torch.randn(elements, device=device)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    target, c = torch.empty_like(source), torch.empty_like(a)

    def call() -> None:
        target.copy_(source)
        torch.mm(a, b, out=c)

    return call


class _Timer(abc.ABC):
    """prepare: maker -> (a function that takes one sample in seconds, host seconds or None)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def new_round(self) -> None:  # noqa: B027 - only graphs have something to do
        """Before each round."""

    @abc.abstractmethod
    def prepare(self, maker: Maker) -> tuple[Callable[[], float], float | None]: ...


def _keep_memory() -> None:
    """Has glibc keep what is freed: else each large tensor is new pages, whose price depends on who else runs."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)):
            mallopt(option, value)


class _Wall(_Timer):
    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        _keep_memory()

    def prepare(self, maker: Maker) -> tuple[Callable[[], float], float | None]:
        timer = Timer("call()", globals={"call": maker()}, num_threads=torch.get_num_threads())
        number = max(1, int(_WALL_SAMPLE / timer.timeit(1).mean))
        return lambda: timer.timeit(number).mean, None


class _Cuda(_Timer):
    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.start, self.stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # larger than the L2 cache of any GPU so far (126 MB on a B200)
        self.flush: Tensor = torch.empty(256 * 2**20, dtype=torch.int8, device=device)

    def between_events(self, call: Call) -> float:
        self.start.record()
        call()
        self.stop.record()
        self.stop.synchronize()
        return self.start.elapsed_time(self.stop) / 1e3


class _Events(_Cuda):
    def prepare(self, maker: Maker) -> tuple[Callable[[], float], float | None]:
        call = maker()
        for _ in range(3):
            call()
        issue = []
        for _ in range(MIN_ROUNDS):
            torch.cuda.synchronize(self.device)
            started = time.perf_counter()
            call()
            issue.append(time.perf_counter() - started)

        def sample() -> float:
            self.flush.zero_()
            return self.between_events(call)

        return sample, statistics.median(issue)


class _Graph(_Cuda):
    """One stream for everything: a backward pass runs on the stream of its forward pass, and must be captured there."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.stream = torch.cuda.Stream(device)
        self.empty = self._capture(lambda: None)
        self.flushes = 0.0

    def _capture(self, call: Call) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            for _ in range(_IN_GRAPH):
                self.flush.zero_()
                call()
        return graph

    def new_round(self) -> None:
        self.flushes = self.between_events(self.empty.replay)

    def prepare(self, maker: Maker) -> tuple[Callable[[], float], float | None]:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            call = maker()
            for _ in range(3):
                call()
        torch.cuda.synchronize(self.device)
        graph = self._capture(call)
        return lambda: max(self.between_events(graph.replay) - self.flushes, 1e-9) / _IN_GRAPH, None
