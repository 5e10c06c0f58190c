"""Every registered operator on its bench cases: ours beside whoever else computes it, in turn, in one process.

Modes: "forward" without gradients; "backward", of a forward pass that is not timed and whose graph is kept; "both". An
operator without gradients has its forward pass only. A loss is taken as the last operator: the gradient that comes to
it is 1; any other gets random numbers.

Nothing wrong is timed: a kernel must pass its proof (kernels/_proof.py), and anyone else's function must agree with
the eager path in float32 on the very inputs on which it will be timed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as autograd_config

from bench import memory, peers, timing
from bench.record import CONTROL, Row, dtype_name
from bench.roofline import Roofs
from kernels import _proof
from kernels._registry import Case, KernelSpec, all_specs

MODES = ("forward", "backward", "both")
Gate = Callable[[KernelSpec, torch.dtype], str]

_CPU_SHARE, _CPU_FLOPS = 64, 2**34


def case_text(case: Case) -> str:
    """A case as reports show it: ``B=64 H=12 T=1024 D=64``."""
    return " ".join(f"{k}={v}" for k, v in case.items() if k != "why")


def cpu_case(spec: KernelSpec, case: Case) -> Case | None:
    """A bench case cut down for a CPU, None where that is not enough.

    The leading size of an operator that trains is divided by 64, and halved until its products are at most 2^34
    operations, forward and backward together: a second at most.
    """
    lead = next(iter(case))
    size = max(1, case[lead] // _CPU_SHARE) if spec.grads else case[lead]
    while size > 1 and sum(spec.flops({**case, lead: size})) > _CPU_FLOPS:
        size //= 2
    cut = {**case, lead: size}
    return cut if sum(spec.flops(cut)) <= _CPU_FLOPS else None


def cases(spec: KernelSpec, device: torch.device) -> list[Case]:
    """What is timed of an operator on a device, the most telling first."""
    if device.type == "cuda":
        return list(spec.bench_cases)
    cut = [cpu_case(spec, case) for case in spec.bench_cases]
    return [case for i, case in enumerate(cut) if case is not None and case not in cut[:i]]


def red(spec: KernelSpec, dtype: torch.dtype, device: torch.device) -> str:
    """Why a kernel must not be timed, or "": its proof on all its cases, here and now."""
    try:
        wrong = sum(not row.passed for case in spec.cases for row in _proof.prove(spec, case, dtype, device))
    except Exception as error:
        return f"not timed: its proof ends in {timing.why(error)}"
    return f"not timed: {wrong} comparisons with float64 fail (python -m kernels check)" if wrong else ""


def groups(
    device: torch.device, dtypes: Sequence[torch.dtype], ops: Collection[str], modes: Collection[str], *, quick: bool
) -> int:
    """How many lists of rows `run` yields, where nothing fails."""
    count = 0
    for spec in all_specs().values():
        if spec.name in ops:
            chosen = cases(spec, device)[: 1 if quick else None]
            count += len(chosen) * sum(bool(spec.grads) or mode == "forward" for mode in modes)
    return count * len(dtypes) * len(timing.clocks(device))


def run(
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    ops: Collection[str] | None,
    missing: dict[str, str],
    roofs: Roofs,
    *,
    providers: Collection[str] | None = None,
    modes: Collection[str] = MODES,
    seconds: float = 0.5,
    quick: bool = False,
    skip_first: bool = False,
    gate: Gate | None = None,
) -> Iterator[list[Row]]:
    """Yields a list of rows for each group, an operator on a case in a dtype and mode by a clock, as it is measured.

    ops, providers: None for all. quick: the first case of each operator; skip_first: all but it. seconds: for each
    provider of a group. gate: why a kernel may not be timed, `red` if it is not given; asked where Triton runs.
    missing: filled with the providers that cannot run here, and why. What fails gives a row without a time, once for
    the same reason.
    """
    gate = gate or (lambda spec, dtype: red(spec, dtype, device))
    for spec in all_specs().values():
        if ops is not None and spec.name not in ops:
            continue
        chosen = cases(spec, device)
        chosen = chosen[:1] if quick else chosen[1:] if skip_first else chosen
        for dtype in dtypes if chosen else ():
            found = peers.providers(spec, device, missing, providers)
            if "triton" in found and (reason := gate(spec, dtype)):
                yield [Row("kernels", {"op": spec.name, "dtype": dtype_name(dtype)}, "triton", error=reason)]
                del found["triton"]
            wanted = [mode for mode in MODES if mode in modes and (spec.grads or mode == "forward")]
            for case in chosen if found else ():  # without a name for it, a case is gone before the next one is drawn
                yield from _Case(spec, case, dtype, device, found, roofs, seconds).run(wanted)


def _params(spec: KernelSpec, case: str, dtype: torch.dtype, mode: str) -> dict[str, Any]:
    return {"op": spec.name, "case": case, "dtype": dtype_name(dtype), "mode": mode}


@dataclass
class _Case:
    """One operator on one case in one dtype: its inputs, those who compute it, and what was said of them."""

    spec: KernelSpec
    case: Case
    dtype: torch.dtype
    device: torch.device
    found: dict[str, peers.Function]
    roofs: Roofs
    seconds: float
    said: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.inputs = self.spec.inputs(self.case, self.dtype, self.device)

    def run(self, modes: list[str]) -> Iterator[list[Row]]:
        wrong = {gradients: self._wrong(gradients) for gradients in {mode != "forward" for mode in modes}}
        for mode in modes:
            refused = wrong[mode != "forward"]
            params = _params(self.spec, case_text(self.case), self.dtype, mode)
            if rows := self._once([Row("kernels", params, name, error=error) for name, error in refused.items()]):
                yield rows
            makers = {name: self._maker(name, fn, mode) for name, fn in self.found.items() if name not in refused}
            peaks: dict[str, float] = {}
            torch.compiler.reset()  # or the shapes of all cases would add up to more than it compiles a function for
            self._free()
            for clock in timing.clocks(self.device) if makers else ():
                measured = self._measure(makers, mode, clock)
                if mode != "backward" and not peaks:
                    peaks = {name: self._peak_mib(makers[name]) for name in measured.seconds if name != CONTROL}
                if rows := self._once(self._rows(measured, mode, peaks)):
                    yield rows

    def _wrong(self, gradients: bool) -> dict[str, str]:
        """Provider -> why it may not be timed. Ours are not asked: the kernel has its proof, the others are the eager
        path itself.
        """
        asked = [name for name in self.found if name not in peers.OURS]
        if not asked:
            return {}
        try:
            exact = {name: _in_float32(x) for name, x in self.inputs.items()}
            truth, incoming = _proof.evaluate(self.spec, exact, None, "eager"), None
            if gradients:
                incoming = dict(zip(truth, self._incoming(truth.values()), strict=True))
                truth = _proof.evaluate(self.spec, exact, incoming, "eager")
        except Exception as error:
            return {name: f"not checked, eager in float32 gives no result: {timing.why(error)}" for name in asked}
        wrong = {}
        for name in asked:
            try:
                reason = peers.disagreement(self.spec, self.found[name], self.inputs, incoming, truth)
            except Exception as error:  # what a peer cannot do is a result
                reason = timing.why(error)
            if reason:
                wrong[name] = reason
        return wrong

    def _incoming(self, outputs: Iterable[Tensor]) -> list[Tensor]:
        """The gradient that comes to each output, the same for every provider."""
        generator = torch.Generator(self.device).manual_seed(0)
        return [
            torch.randn(y.shape, generator=generator, device=y.device).to(y) if y.ndim else torch.ones_like(y)
            for y in outputs
        ]

    def _maker(self, provider: str, fn: peers.Function, mode: str) -> timing.Maker:
        def make() -> timing.Call:
            given = dict(self.inputs)
            if (self.spec.name, provider) in peers.OVERWRITES:
                given = {name: x.clone() if isinstance(x, Tensor) else x for name, x in given.items()}
            if mode == "forward":

                def forward() -> object:
                    with torch.no_grad():
                        return fn(**given)

                return forward
            differentiable = (name for name in self.spec.grads if given[name] is not None)
            leaves = {name: given[name].detach().requires_grad_() for name in differentiable}
            given |= leaves
            wanted = list(leaves.values())
            outputs = fn(**given)
            incoming = self._incoming(outputs if isinstance(outputs, tuple) else (outputs,))
            if mode == "both":
                return lambda: torch.autograd.grad(fn(**given), wanted, incoming)
            return lambda: torch.autograd.grad(outputs, wanted, incoming, retain_graph=True)

        return make

    def _measure(self, makers: dict[str, timing.Maker], mode: str, clock: str) -> timing.Measured:
        # A compiled backward pass, also one out of torch's cache on disk, may overwrite what the forward pass saved for
        # it: not where it is to run again.
        with autograd_config.patch(donated_buffer=mode != "backward"):  # type: ignore[attr-defined]
            return timing.measure(makers, self.device, clock, seconds=self.seconds)

    def _peak_mib(self, maker: timing.Maker) -> float:
        call = maker()
        call()
        return memory.peak(call, self.device) / 2**20

    def _rows(self, measured: timing.Measured, mode: str, peaks: dict[str, float]) -> list[Row]:
        if measured.seconds.keys() <= {CONTROL}:
            measured.seconds.clear()
        moved = _of_mode(self.spec.bytes_moved(self.case, self.dtype), mode)
        work = _of_mode(self.spec.flops(self.case), mode)
        floor = self.roofs.floor(moved, work, self.dtype)

        def metrics(provider: str, seconds: float) -> dict[str, float]:
            found = {"gb_per_s": moved / seconds / 1e9, "floor": floor / seconds, "floor_ms": floor * 1e3}
            found |= {"bytes": moved, "flops": work}
            if work:
                found["tflop_per_s"] = work / seconds / 1e12
            if provider in peaks:
                found["peak_mib"] = peaks[provider]
            return found

        return measured.rows("kernels", _params(self.spec, case_text(self.case), self.dtype, mode), metrics)

    def _once(self, rows: list[Row]) -> list[Row]:
        """The rows without what was said before: a provider fails in each mode and by each clock for one reason."""
        new = [row for row in rows if not row.error or (row.provider, row.error) not in self.said]
        self.said |= {(row.provider, row.error) for row in rows}
        return new

    def _free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _of_mode(pair: tuple[int, int], mode: str) -> int:
    """Of (forward, backward) what a mode does."""
    return {"forward": pair[0], "backward": pair[1], "both": sum(pair)}[mode]


def _in_float32(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
