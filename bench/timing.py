"""Time of short operations: providers in turn, caches overwritten, every sample kept.

Three clocks, never mixed in one row:

    events   CUDA events around a call, the L2 cache overwritten before it: device time plus what the host fails to hide
    graph    a CUDA graph that replays the call, the L2 cache overwritten before each: device time alone
    wall     torch.utils.benchmark on a CPU: threads as torch has them, warmed up, garbage collection off

A maker, a function without arguments, makes the call that is timed, on the stream on which it will run. What is not
part of the time, such as the forward pass of a backward pass, happens there; so does the proof: it raises Refused for a
call that must not be timed. A call may have `refresh()`, called before each sample, where it gives its inputs other
numbers, and `verify()`, called after the last one, which raises Refused if what was timed was wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from bench.record import CONTROL, Row, machine_state
from kernels._launch import capturing, on_stream

Call = Callable[[], object]
Maker = Callable[[], Call]

MIN_ROUNDS, MAX_ROUNDS = 5, 50
METHOD = {
    "events": "CUDA events around one call, L2 overwritten before it, providers in turn",
    "graph": "ten calls in a CUDA graph, L2 overwritten before each, less the same graph without the calls, over ten",
    "wall": "torch.utils.benchmark, a sample of at least 5 ms after two calls of warm-up, providers in turn, "
    "freed memory kept by malloc",
    "interval": f"p50 of {MIN_ROUNDS} to {MAX_ROUNDS} rounds, with p20 and p80; every sample in the report",
}
_IN_GRAPH = 10
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_WALL_SAMPLE = 5e-3


class Refused(Exception):
    """A provider that must not be timed; the message is the whole reason."""


def error_line(error: Exception) -> str:
    """An exception in one line, for a report: what a provider cannot do is a result."""
    message = next(iter(str(error).strip().splitlines()), "")
    return message if isinstance(error, Refused) else f"{type(error).__name__}: {message}"[:160]


@dataclass
class Measured:
    """Samples of one clock, by provider."""

    clock: str
    seconds: dict[str, tuple[float, ...]] = field(default_factory=dict)  # sample i of each is from round i
    host: dict[str, float] = field(default_factory=dict)  # median seconds to issue a call, "events" only
    failed: dict[str, str] = field(default_factory=dict)  # why
    state: dict[str, float] = field(default_factory=dict)  # of the machine: the mean of before and after

    def rows(self, kind: str, params: dict[str, Any], metrics: Callable[[str, float], dict[str, float]]) -> list[Row]:
        """A row for each provider, those that failed included. metrics: (provider, median seconds) -> its metrics."""
        rows = []
        for provider, samples in self.seconds.items():
            values = self.state if provider == CONTROL else metrics(provider, statistics.median(samples))
            if provider in self.host and provider != CONTROL:
                values = {**values, "host_ms": self.host[provider] * 1e3}
            rows.append(Row(kind, params, provider, self.clock, samples, values))
        return rows + [Row(kind, params, provider, self.clock, error=text) for provider, text in self.failed.items()]


def clocks(device: torch.device) -> tuple[str, ...]:
    return ("events", "graph") if device.type == "cuda" else ("wall",)


def measure(makers: Mapping[str, Maker], device: torch.device, clock: str, *, seconds: float = 0.5) -> Measured:
    """Time each provider and the control for about `seconds`, in turn, so that a drifting clock affects all alike.

    In another order each round: what a call leaves behind, such as heat, meets each of the others.
    """
    kinds: dict[str, type[_Timer]] = {"events": _Events, "graph": _Graph, "wall": _Timer}
    timer, measured = kinds[clock](device), Measured(clock)
    samples: dict[str, list[float]] = {}
    ready: dict[str, Callable[[], float]] = {}
    calls: dict[str, Call] = {}

    def made(name: str, maker: Maker) -> Call:
        return calls.setdefault(name, maker())

    for name, maker in {**makers, CONTROL: lambda: control(device)}.items():
        try:
            ready[name], host = timer.prepare(functools.partial(made, name, maker))
        except Exception as error:
            measured.failed[name] = error_line(error)
            continue
        samples[name] = []
        if host is not None:
            measured.host[name] = host
    before = machine_state(device)
    budget, rounds, started = seconds * len(ready), 0, time.perf_counter()
    while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and time.perf_counter() - started < budget):
        timer.new_round()
        for name in random.Random(rounds).sample([*ready], len(ready)):  # none always follows the same one
            try:
                _ask(calls.get(name), "refresh")
                samples[name].append(ready[name]())
            except Exception as error:
                measured.failed[name] = error_line(error)
                del ready[name], samples[name]
        rounds += 1
    for name in [*ready]:
        try:
            _ask(calls.get(name), "verify")
        except Exception as error:
            measured.failed[name] = error_line(error)
            del samples[name]
    after = machine_state(device)
    measured.state = {key: (before[key] + after[key]) / 2 for key in before.keys() & after.keys()}
    measured.seconds = {name: tuple(values) for name, values in samples.items()}
    return measured


def _ask(call: Call | None, what: str) -> None:
    method = getattr(call, what, None)
    if method is not None:
        method()
        if torch.cuda.is_initialized():  # nothing of it is left to hide the launches of what is timed next
            torch.cuda.synchronize()


def control(device: torch.device) -> Call:
    """A copy and a matrix product that never change: the speed of the machine at the time."""
    elements, n, dtype = (2**25, 2048, torch.bfloat16) if device.type == "cuda" else (2**20, 256, torch.float32)
    source = torch.randn(elements, device=device)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    target, c = torch.empty_like(source), torch.empty_like(a)

    def call() -> None:
        target.copy_(source)
        torch.mm(a, b, out=c)

    return call


@contextlib.contextmanager
def _without_waiting() -> Iterator[None]:
    """Refused for what makes the host wait for the device: in a capture it would spoil more than its own graph."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        raise Refused("cannot be captured in a CUDA graph: it makes the host wait for the device") from error
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Partial:
    """A call whose beginning is not timed: `run(start)` calls `start()` where its time begins, once per call."""

    def __init__(self, run: Callable[[Call], object], device: torch.device) -> None:
        self.run, self.device = run, device
        self.lead_ins: list[tuple[Any, Any, float]] = []  # CUDA events or None, and host seconds: one entry per call

    def __call__(self) -> None:
        first, began = self._event(), time.perf_counter()
        self.run(lambda: self.lead_ins.append((first, self._event(), time.perf_counter() - began)))

    def _event(self) -> Any:
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _lead_in(call: Call, calls: int = 1) -> tuple[float, float]:
    """Seconds of the last calls that are not timed, per call, on the device and on the host. The device is idle."""
    if not isinstance(call, Partial):
        return 0.0, 0.0
    last = call.lead_ins[-calls:]
    call.lead_ins.clear()
    host = sum(host for *_, host in last) / calls
    device = sum(a.elapsed_time(b) for a, b, _ in last) / 1e3 / calls if call.device.type == "cuda" else host
    return device, host


class _Timer:
    """The clock "wall"."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cpu":
            _keep_memory()

    def new_round(self) -> None: ...

    def prepare(self, maker: Maker) -> tuple[Callable[[], float], float | None]:
        """Maker -> a function that takes one sample in seconds, and the host's seconds, None if they are the same."""
        call = maker()
        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        number = max(1, int(_WALL_SAMPLE / timer.timeit(1).mean))
        return lambda: timer.timeit(number).mean - _lead_in(call, number)[0], None


def _keep_memory() -> None:
    """Make glibc keep freed memory: else each large tensor is new pages, whose cost depends on the machine's load."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)):
            mallopt(option, value)


class _Events(_Timer):
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

    def prepare(self, maker: Maker) -> tuple[Callable[[], float], float | None]:
        call, issue = maker(), []
        for _ in range(3):
            call()
        for _ in range(MIN_ROUNDS):
            torch.cuda.synchronize(self.device)
            started = time.perf_counter()
            call()
            issued = time.perf_counter() - started
            torch.cuda.synchronize(self.device)
            issue.append(issued - _lead_in(call)[1])

        def sample() -> float:
            self.flush.zero_()
            return self.between_events(call) - _lead_in(call)[0]

        return sample, statistics.median(issue)


class _Graph(_Events):
    """One stream for everything: a backward pass runs on the stream of its forward pass, and must be captured there."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.stream = torch.cuda.Stream(device)
        self.empty = self._capture(lambda: None)
        self.flushes = 0.0

    def _capture(self, call: Call) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, self.stream):
            for _ in range(_IN_GRAPH):
                self.flush.zero_()
                call()
        return graph

    def new_round(self) -> None:
        self.flushes = self.between_events(self.empty.replay)

    def prepare(self, maker: Maker) -> tuple[Callable[[], float], float | None]:
        with on_stream(self.stream):
            call = maker()
            for _ in range(2):
                call()
            with _without_waiting():
                call()
        torch.cuda.synchronize(self.device)
        graph = self._capture(call)
        return lambda: max(self.between_events(graph.replay) - self.flushes, 1e-9) / _IN_GRAPH, None
