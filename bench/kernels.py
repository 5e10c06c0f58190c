"""Every registered operator on its bench cases: ours and whoever else computes it, in turn, in one process.

Modes: "forward" without gradients; "backward", of a forward pass that is not timed and whose graph is kept; "both". The
incoming gradient of a loss is 1; that of any other operator is random.

Nothing wrong is timed: a kernel must pass its proof (kernels/_proof.py), and anyone else's function must agree with
the eager path in float32 on the very inputs on which it will be timed. The kernel itself finds other numbers in its
inputs before each sample, and its last timed result is compared too (`bench.watch`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from torch._functorch import config as autograd_config

from bench import command, memory, peers, roofline, timing, watch
from bench.record import CONTROL, Report, Row
from bench.roofline import Roofs
from kernels import _proof
from kernels._foreign import judges, replaced
from kernels._registry import Case, KernelSpec, all_specs, case_text, dtype_name
from kernels._tables import untuned
from model.cli import UserError

Mode = Literal["forward", "backward", "both"]
MODES: tuple[Mode, ...] = ("forward", "backward", "both")
Gate = Callable[[KernelSpec, torch.dtype], str]

_CPU_SHARE, _CPU_FLOPS = 64, 2**34


def cpu_case(spec: KernelSpec, case: Case) -> Case | None:
    """A bench case whose leading size is divided by 64, if the operator trains, and halved until its products take at
    most 2^34 operations, about a second on a CPU; None where that is not enough."""
    lead = next(iter(case))
    size = max(1, case[lead] // _CPU_SHARE) if spec.grads else case[lead]
    while size > 1 and sum(spec.flops({**case, lead: size})) > _CPU_FLOPS:
        size //= 2
    cut = {**case, lead: size}
    return cut if sum(spec.flops(cut)) <= _CPU_FLOPS else None


def cases(spec: KernelSpec, device: torch.device) -> list[Case]:
    """The cases to time of an operator on a device, the most telling first."""
    chosen = spec.bench_cases or spec.cases
    if device.type == "cuda":
        return list(chosen)
    cut = [cpu_case(spec, case) for case in chosen]
    return [case for i, case in enumerate(cut) if case is not None and case not in cut[:i]]


def proof_failure(spec: KernelSpec, dtype: torch.dtype, device: torch.device) -> str:
    """Why a kernel must not be timed, or "": its proof on all its cases, here and now."""
    try:
        passed = [row.passed for case in spec.cases for row in _proof.prove(spec, case, dtype, device)]
    except Exception as error:
        return f"not timed: its proof ends in {timing.error_line(error)}"
    if not passed:
        return "not timed: its proof compares nothing"
    wrong = passed.count(False)
    return f"not timed: {wrong} comparisons with float64 fail (python -m kernels check)" if wrong else ""


@dataclass(frozen=True)
class Kernels(command.Timed):
    """Every kernel on its bench cases, with PyTorch's operators and those of other libraries."""

    file: tyro.conf.Positional[Path | None] = None  # Python file with a kernel of your own: only that is timed.
    op: tuple[str, ...] = ()  # Kernels to time; all of them by default.
    dtype: tuple[command.Dtype, ...] = ()  # Precisions; bfloat16 on a GPU and float32 on a CPU by default.
    mode: tuple[Mode, ...] = MODES  # Passes to time.
    seconds: float = 0.5  # Time spent on each provider of a case, mode and clock, or 50 rounds of it.
    quick: bool = False  # Only the first bench case of each kernel.

    def check(self) -> None:
        if self.file:
            command.own_kernel(self.file)
        command.pick("kernel", self.op, all_specs())
        command.pick("provider", self.provider, peers.known_providers())
        command.require_positive(seconds=self.seconds)

    def total(self, device: torch.device) -> int:
        part = slice(1 if self.quick else None)
        count = sum(len(self._modes(spec)) * len(cases(spec, device)[part]) for spec in self._specs())
        return count * max(1, len(self.dtype)) * len(timing.clocks(device))

    def groups(self, device: torch.device, report: Report) -> Iterator[list[Row]]:
        roofs = roofline.measure(device, self._dtypes(device))
        report.method |= {"roofs": roofs.as_dict(), "peers": peers.NOTES}
        before = judges("kernels", "bench")
        yield from self.run(device, report, roofs, part=slice(1 if self.quick else None))
        if self.file and (name := replaced(before)):
            raise UserError(f"{self.file} replaces {name}, on which its timing relies: do not trust the times above")

    def _specs(self) -> list[KernelSpec]:
        if self.file:
            return [command.own_kernel(self.file)]
        return [spec for name, spec in all_specs().items() if not self.op or name in self.op]

    def _modes(self, spec: KernelSpec) -> list[Mode]:
        return [mode for mode in MODES if mode in self.mode and (spec.grads or mode == "forward")]

    def _dtypes(self, device: torch.device) -> list[torch.dtype]:
        return [command.dtype_of(name, device) for name in self.dtype or (None,)]

    def run(
        self, device: torch.device, report: Report, roofs: Roofs, *, part: slice, gate: Gate | None = None
    ) -> Iterator[list[Row]]:
        """Yield a list of rows for each group: an operator on a case in a dtype and mode by a clock.

        part: of each operator's cases. gate: why a kernel may not be timed, `proof_failure` by default. What fails
        gives a row without a time, once for the same reason.
        """
        gate = gate or functools.partial(proof_failure, device=device)
        for spec in self._specs():
            chosen = cases(spec, device)[part]
            for dtype in self._dtypes(device) if chosen else ():
                functions = peers.providers(spec, device, report.missing, self.provider)
                if "triton" in functions and (reason := gate(spec, dtype)):
                    yield [Row("kernels", {"op": spec.name, "dtype": dtype_name(dtype)}, "triton", error=reason)]
                    del functions["triton"]
                    functions.pop("untuned", None)
                for case in chosen if functions else ():  # without a name, a case is freed before the next is drawn
                    yield from _Case(spec, case, dtype, device, functions, roofs, self.seconds).run(self._modes(spec))


@dataclass
class _Case:
    """One operator on one case in one dtype, those who compute it, and the errors reported so far."""

    spec: KernelSpec
    case: Case
    dtype: torch.dtype
    device: torch.device
    functions: dict[str, peers.Function]
    roofs: Roofs
    seconds: float
    reported: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.inputs = self.spec.inputs(self.case, self.dtype, self.device)
        self.moved = watch.bytes_moved(self.spec, self.case, self.inputs)

    def run(self, modes: Sequence[str]) -> Iterator[list[Row]]:
        wrong = {gradients: self._wrong(gradients) for gradients in {mode != "forward" for mode in modes}}
        for mode in modes:
            refused = wrong[mode != "forward"]
            if rows := self._once(self._rows(timing.Measured("", failed=refused), mode, {})):
                yield rows
            chosen = {name: fn for name, fn in self.functions.items() if name not in refused}
            makers = {name: self._maker(name, fn, mode) for name, fn in chosen.items()}
            peaks: dict[str, float] = {}
            torch.compiler.reset()  # or the shapes of all cases would exceed its limit of compilations per function
            memory.free_bytes(self.device)
            for clock in timing.clocks(self.device) if makers else ():
                # A compiled backward pass, also one from torch's cache on disk, may overwrite what the forward pass
                # saved for it: not where it is to run again.
                with autograd_config.patch(donated_buffer=mode != "backward"):  # type: ignore[attr-defined]
                    measured = timing.measure(makers, self.device, clock, seconds=self.seconds)
                watch.refuse_impossible(measured, self._floor(mode), mode)
                if mode != "backward" and not peaks:
                    peaks = {name: self._peak_mib(makers[name]) for name in measured.seconds if name != CONTROL}
                if rows := self._once(self._rows(measured, mode, peaks)):
                    yield rows

    def _wrong(self, gradients: bool) -> dict[str, str]:
        """Provider -> why it may not be timed. Not of ours: the kernel has its proof, the others are the eager path."""
        asked = [name for name in self.functions if name not in peers.OURS]
        if not asked:
            return {}
        try:
            exact = {name: watch.in_float32(x) for name, x in self.inputs.items()}
            truth, incoming = _proof.evaluate(self.spec, exact, None, "eager"), None
            if gradients:
                incoming = dict(zip(truth, _incoming([*truth.values()]), strict=True))
                truth = _proof.evaluate(self.spec, exact, incoming, "eager")
        except Exception as error:
            return dict.fromkeys(asked, f"not checked, eager in float32 gives no result: {timing.error_line(error)}")
        wrong = {}
        for name in asked:
            try:
                reason = peers.disagreement(self.spec, self.functions[name], self.inputs, incoming, truth)
            except Exception as error:  # what a peer cannot do is a result
                reason = timing.error_line(error)
            if reason:
                wrong[name] = reason
        return wrong

    def _maker(self, provider: str, fn: peers.Function, mode: str) -> timing.Maker:
        copies = (self.spec.name, provider) in peers.OVERWRITES
        if provider != "untuned":
            watched = provider == "triton"
            return lambda: make_call(self.spec, self.inputs, fn, mode, copies=copies, watched=watched)

        def make_untuned() -> timing.Call:  # the backward pass, too
            with untuned():
                call = make_call(self.spec, self.inputs, fn, mode)
            return untuned()(call)

        return make_untuned

    def _floor(self, mode: str) -> float:
        return self.roofs.floor(_of_mode(*self.moved, mode), _of_mode(*self.spec.flops(self.case), mode), self.dtype)

    def _peak_mib(self, maker: timing.Maker) -> float:
        call = maker()
        call()
        return memory.peak(call, self.device) / memory.MIB

    def _rows(self, measured: timing.Measured, mode: str, peaks: dict[str, float]) -> list[Row]:
        if measured.seconds.keys() <= {CONTROL}:
            measured.seconds.clear()
        params = {"op": self.spec.name, "case": case_text(self.case), "dtype": dtype_name(self.dtype), "mode": mode}
        moved, work, floor = _of_mode(*self.moved, mode), _of_mode(*self.spec.flops(self.case), mode), self._floor(mode)

        def metrics(provider: str, seconds: float) -> dict[str, float]:
            values = {"gb_per_s": moved / seconds / 1e9}
            values |= {"floor": floor / seconds, "floor_ms": floor * 1e3} if floor else {}
            values |= {"bytes": moved, "flops": work} | ({"tflop_per_s": work / seconds / 1e12} if work else {})
            return values | ({"peak_mib": peaks[provider]} if provider in peaks else {})

        return measured.rows("kernels", params, metrics)

    def _once(self, rows: list[Row]) -> list[Row]:
        """The rows without errors reported before: a provider fails in each mode and by each clock for one reason."""
        new = [row for row in rows if not row.error or (row.provider, row.error) not in self.reported]
        self.reported |= {(row.provider, row.error) for row in rows}
        return new


def make_call(
    spec: KernelSpec,
    inputs: dict[str, Any],
    fn: peers.Function,
    mode: str,
    *,
    copies: bool = False,
    watched: bool = False,
) -> timing.Call:
    """A call of an operator's function in a mode. copies: on inputs of its own. watched: as a `watch.Watched`."""
    given = {name: x.clone() if copies and isinstance(x, Tensor) else x for name, x in inputs.items()}
    if mode == "forward":
        forward = torch.no_grad()(fn)
        call: timing.Call = lambda: forward(**given)  # noqa: E731
        return watch.Watched(spec, call, inputs, [], mode) if watched else call
    leaves = {name: given[name].detach().requires_grad_() for name in spec.grads if given[name] is not None}
    given |= leaves
    wanted = list(leaves.values())
    outputs = fn(**given)
    incoming = _incoming(outputs if isinstance(outputs, tuple) else (outputs,))
    if mode == "both":
        call = lambda: torch.autograd.grad(fn(**given), wanted, incoming)  # noqa: E731
    else:
        call = lambda: torch.autograd.grad(outputs, wanted, incoming, retain_graph=True)  # noqa: E731
    return watch.Watched(spec, call, inputs, incoming, mode) if watched else call


def _incoming(outputs: Sequence[Tensor]) -> list[Tensor]:
    """The incoming gradient of each output, the same for every provider: random, 1 for a loss."""
    generator = torch.Generator(outputs[0].device).manual_seed(0)
    random = (torch.randn(y.shape, generator=generator, device=y.device).to(y) for y in outputs)
    return [r if y.ndim else torch.ones_like(y) for r, y in zip(random, outputs, strict=True)]


def _of_mode(forward: int, backward: int, mode: str) -> int:
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]
