"""A kernel is timed by code that it could deceive: what is done so that it does not.

Before each sample its inputs, or in a backward pass the incoming gradients, get other numbers in the same memory, so
that no result of an earlier call is right. Two results that follow one another must lie in different memory, and not in
that of an input. The result of the last timed call is compared with the eager path in float32, which is computed
afterwards. A time below half of the device's floor is not believed. The kernel shares a process with the clock all the
same: against somebody who replaces the clock only reading the file helps.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.peers import BOUNDS
from bench.timing import Call, Measured, Refused
from kernels import _proof
from kernels._registry import Case, KernelSpec

# As peers.BOUNDS, of the largest error and the largest number: rounding stays below it, a skipped row does not.
_WORST = {torch.float32: 2e-2, torch.float16: 5e-2, torch.bfloat16: 5e-2}
_BELIEVED = 0.5  # of the floor: a copy, which sets it, is not the fastest way to read


class Watched:
    """A call of a kernel that keeps its last two results. mode: that of `bench.kernels`."""

    def __init__(
        self, spec: KernelSpec, call: Call, inputs: dict[str, Any], incoming: Sequence[Tensor], mode: str
    ) -> None:
        self.spec, self.call, self.inputs, self.incoming, self.mode = spec, call, inputs, incoming, mode
        self.results: deque[Any] = deque(maxlen=2)
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self) -> object:
        self.results.append(self.call())
        return self.results[-1]

    def refresh(self) -> None:
        """Other numbers, as far as nothing has been computed from them yet."""
        self._refuse_shared()
        with torch.no_grad():
            _proof.stir([*self.incoming, *(self.inputs.values() if self.mode != "backward" else ())], self.generator)

    def verify(self) -> None:
        """Refused unless the last result is right."""
        self._refuse_shared()
        got = self._named(self.results[-1])
        exact = {name: in_float32(x) for name, x in self.inputs.items()}
        outputs = self.spec.outputs
        incoming = dict(zip(outputs, map(in_float32, self.incoming), strict=True)) if self.incoming else None
        truth = _proof.evaluate(self.spec, exact, incoming, "eager")
        for name, y in got.items():
            t = truth[name].float()
            difference = y.float() - t
            error = max(
                (difference.norm() / t.norm()).item() / BOUNDS[y.dtype],
                (difference.abs().max() / t.abs().max()).item() / _WORST[y.dtype],
            )
            if t.any() and not error <= 1:  # so that NaN is wrong
                raise Refused(f"what was timed is wrong: {name} is off by {error:.2g} times what is allowed")

    def _named(self, result: Any) -> dict[str, Tensor]:
        tensors = result if isinstance(result, tuple) else (result,)
        names = self.spec.outputs
        if self.mode != "forward":
            names = tuple(f"d{name}" for name in self.spec.grads if self.inputs[name] is not None)
        return dict(zip(names, tensors, strict=True))

    def _refuse_shared(self) -> None:
        if not self.results:
            return
        others: dict[str, Any] = {"an input": self.inputs, "an incoming gradient": dict(enumerate(self.incoming))}
        if len(self.results) > 1:
            others["the result of the call before"] = self._named(self.results[0])
        try:
            _proof.refuse_shared(self._named(self.results[-1]), others)
        except _proof.Refused as error:
            raise Refused(f"not timed: {error}") from error


def refuse_impossible(measured: Measured, floor: float, mode: str) -> None:
    """Takes a kernel's time out if the device cannot have done the work in it. floor: seconds.

    Not of a backward pass alone, whose work may have been done in the forward pass.
    """
    samples = measured.seconds.get("triton")
    if samples and mode != "backward" and statistics.median(samples) < _BELIEVED * floor:
        took = statistics.median(samples) * 1e3
        del measured.seconds["triton"]
        measured.failed["triton"] = (
            f"not believed: {took:.2g} ms, and the device takes {floor * 1e3:.2g} ms for the work"
        )


def bytes_moved(spec: KernelSpec, case: Case, inputs: dict[str, Any]) -> tuple[int, int]:
    """(forward, backward) bytes that must cross memory, as the spec says, or else those of the tensors themselves."""
    given = [x for x in inputs.values() if isinstance(x, Tensor)]
    if spec.bytes_moved is not None:
        return spec.bytes_moved(case, next(x.dtype for x in given if x.is_floating_point()))
    read = sum(x.numel() * x.itemsize for x in given)
    wrote = sum(y.numel() * y.itemsize for y in _proof.evaluate(spec, inputs, None, "eager").values())
    gradients = sum(inputs[name].numel() * inputs[name].itemsize for name in spec.grads if inputs[name] is not None)
    return read + wrote, read + wrote + gradients


def in_float32(x: Any) -> Any:
    """A floating-point tensor in float32, anything else as it is."""
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
