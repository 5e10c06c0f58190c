"""Time of short operations: providers in turn, caches emptied, medians with their spread."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the 20th, 50th and 80th percentile of `runs` calls."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    runs: int


def measure(
    calls: Mapping[str, Callable[[], object]], device: torch.device, *, seconds: float = 0.5, warm_up: int = 3
) -> dict[str, Timing]:
    """Times each call for about `seconds`, the calls taking turns so that a drifting clock hits all alike.

    On a CUDA device by events around each call, the L2 cache overwritten before it: what is measured is device time
    plus what the host fails to hide. On a CPU by the wall clock.
    """
    for call in calls.values():
        for _ in range(warm_up):
            call()
    clock = _CudaClock(device) if device.type == "cuda" else _WallClock()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    spent = 0.0
    while spent < seconds * len(calls) or min(map(len, samples.values())) < 5:
        started = time.perf_counter()
        for name, call in calls.items():
            samples[name].append(clock.time_ms(call))
        spent += time.perf_counter() - started
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float]) -> Timing:
    ordered = sorted(values)
    fifths = statistics.quantiles(ordered, n=5, method="inclusive")
    return Timing(fifths[0], statistics.median(ordered), fifths[3], len(ordered))


class _WallClock:
    def time_ms(self, call: Callable[[], object]) -> float:
        started = time.perf_counter()
        call()
        return (time.perf_counter() - started) * 1e3


class _CudaClock:
    def __init__(self, device: torch.device) -> None:
        self.start, self.stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # larger than the L2 cache of any GPU so far (126 MB on a B200)
        self.flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device)

    def time_ms(self, call: Callable[[], object]) -> float:
        self.flush.zero_()
        self.start.record()
        call()
        self.stop.record()
        self.stop.synchronize()
        return self.start.elapsed_time(self.stop)
