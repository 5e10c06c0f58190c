"""What the device can do: the roofs by which an operator is judged, measured and not read off a data sheet.

    copy      seconds to move a number of bytes, half of them read and half written, by one copy
    product   floating-point operations per second of one square matrix product, by dtype

No call that moves b bytes and computes f operations of products is expected to end before

    floor(b, f) = max(copy(b), f / product)

(Williams, Waterman, Patterson 2009, "Roofline".) The copy is looked up by size: a small one costs its launch, a middle
one stays in a cache of a CPU. The operands are random numbers: a GPU draws less power and is faster on zeros.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from bench import timing
from kernels._registry import dtype_name

_SMALLEST_COPY, _LARGEST_COPY = 2**16, {"cuda": 2**30, "cpu": 2**28}  # bytes moved
_SIDES = {"cuda": (2048, 4096, 8192), "cpu": (256, 512, 1024)}  # of the matrices
_LONGEST = 0.2  # seconds that a product may take: float16 is a hundred times slower than float32 on some CPUs


@dataclass(frozen=True)
class Roofs:
    copy: dict[int, float]  # bytes moved -> seconds
    flops: dict[str, float]  # name of a dtype -> FLOP/s
    float32: str = "highest"  # precision of the float32 products, as torch.set_float32_matmul_precision names it

    def as_dict(self) -> dict[str, Any]:
        """The roofs as the method of a report keeps them."""
        return {"copy": {str(size): s for size, s in self.copy.items()}, "flops": self.flops, "float32": self.float32}

    def floor(self, bytes_moved: float, flops: float, dtype: torch.dtype) -> float:
        """Seconds below which no call is expected. A product in a dtype that was not measured is not counted."""
        rate = self.flops.get(dtype_name(dtype))
        return max(self._copy_seconds(bytes_moved), flops / rate if rate else 0.0)

    def _copy_seconds(self, size: float) -> float:
        """Linear in logarithms between two sizes; the time of the smallest below it; above, in proportion."""
        sizes = sorted(self.copy)
        if size <= sizes[0] or size >= sizes[-1]:
            nearest = sizes[0] if size <= sizes[0] else sizes[-1]
            return self.copy[nearest] * max(1.0, size / sizes[-1])
        low, high = next(pair for pair in itertools.pairwise(sizes) if pair[1] >= size)
        share = math.log(size / low) / math.log(high / low)
        return self.copy[low] * (self.copy[high] / self.copy[low]) ** share


def measure(device: torch.device, dtypes: Iterable[torch.dtype], *, seconds: float = 0.05) -> Roofs:
    """Measure the roofs of a device: about `seconds` for each size of a copy and of a product.

    By the clock that shows the device alone, where there is one. The shortest sample counts, and a size that took
    longer than a larger one gets the time of that one. Sizes that do not fit in memory are skipped, and dtypes without
    a product.
    """
    sizes = [_SMALLEST_COPY]
    while sizes[-1] < _LARGEST_COPY[device.type]:
        sizes.append(4 * sizes[-1])
    copies = _shortest({str(size): _copy(size, device) for size in sizes}, device, seconds)
    copy = {size: min(s for other, s in copies.items() if int(other) >= size) for size in map(int, copies)}
    flops = {dtype_name(dtype): rate for dtype in dtypes if (rate := _product_rate(dtype, device, seconds))}
    # torch.get_float32_matmul_precision raises where the setting was made by its newer name.
    return Roofs(copy, flops, "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest")


def _product_rate(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """FLOP/s of the best size; 0 where none can be measured."""
    best = 0.0
    for side in _SIDES[device.type]:
        work = 2 * side**3
        if best and work / best > _LONGEST:
            break
        for took in _shortest({"product": _product(side, dtype, device)}, device, seconds).values():
            best = max(best, work / took)
    return best


def _shortest(makers: dict[str, timing.Maker], device: torch.device, seconds: float) -> dict[str, float]:
    measured = timing.measure(makers, device, timing.clocks(device)[-1], seconds=seconds)
    return {name: min(measured.seconds[name]) for name in makers if name in measured.seconds}


def _copy(size: int, device: torch.device) -> timing.Maker:
    def make() -> timing.Call:
        source = torch.randn(size // 8, device=device)  # float32: half of the bytes
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return make


def _product(side: int, dtype: torch.dtype, device: torch.device) -> timing.Maker:
    def make() -> timing.Call:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=out)

    return make
