"""The check of `python -m kernels check`: every kernel, in every family of cases, against float64 on this machine."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import _machine, _tables
from ._backend import device_problem
from ._machine import this_device
from ._proof import FAMILIES, Comparison, Refused, prove_family
from ._registry import KernelSpec, all_specs, case_text, dtype_name


class NothingCompared(RuntimeError):
    """A check without a single comparison has proven nothing."""


def describe() -> list[str]:
    """What this machine runs, and why, line by line."""
    problem = device_problem("cuda", 0) if this_device().type == "cuda" else None
    tables = _tables.describe(this_device()) if this_device().type == "cuda" else ()
    return [*_machine.describe(problem), *tables, f"kernels: {', '.join(all_specs())}"]


@dataclass(frozen=True)
class CheckResult:
    """What `check` measured.

    failures: one line for each comparison that failed and each case that could not run; failed: the (kernel, dtype)
    pairs that they belong to; skipped: the number of cases that there was no time for.
    """

    comparisons: list[Comparison]
    failures: list[str]
    failed: set[tuple[str, torch.dtype]]
    skipped: int
    seconds: float
    where: str

    def line(self) -> str:
        """The result in one line."""
        result = f"{len(self.failures)} FAILED" if self.failures else "all within the rule"
        result += f"; no time for {self.skipped} cases" if self.skipped else ""
        return f"{len(self.comparisons)} comparisons with float64 on {self.where} in {self.seconds:.0f} s: {result}"

    def table(self) -> list[str]:
        """Per kernel and dtype the largest error / allowed error of each family of cases, and where it was."""
        lines = [f"{'kernel':<22} {'dtype':<9}" + "".join(f"{name:>9}" for name in FAMILIES) + "  closest to its limit"]
        groups: dict[tuple[str, torch.dtype], list[Comparison]] = {}
        for comparison in self.comparisons:
            groups.setdefault((comparison.kernel, comparison.case_dtype), []).append(comparison)
        for kernel, dtype in sorted(groups, key=lambda group: group[0]):  # dtypes in the order of the check
            group = groups[kernel, dtype]
            worst = [max((c for c in group if c.family == name), key=_severity, default=None) for name in FAMILIES]
            cells = "".join(
                f"{'-' if c is None else format(c.ratio, '.2f' if c.ratio < 1e4 else '.1e'):>9}" for c in worst
            )
            top = max(group, key=_severity)
            lines.append(f"{kernel:<22} {dtype_name(dtype):<9}{cells}  {top.name}: {case_text(top.case)}")
        return lines

    def report(self) -> list[str]:
        """The table, the first failures and the result."""
        more = len(self.failures) - 20
        failures = [f"FAILED {line}" for line in self.failures[:20]] + ([f"and {more} more"] if more > 0 else [])
        return [*self.table(), *failures, self.line()]

    def as_dict(self) -> dict[str, Any]:
        """The whole check, JSON-serialisable; schema 1."""
        rows = [
            {**asdict(c), "case": dict(c.case), "dtype": dtype_name(c.dtype), "case_dtype": dtype_name(c.case_dtype),
             "passed": c.passed}
            for c in self.comparisons
        ]  # fmt: skip
        return {
            "schema": 1, "environment": describe(), "verdict": self.line(), "passed": not self.failures,
            "failures": self.failures, "left_out": self.skipped, "rows": rows,
        }  # fmt: skip


def _severity(comparison: Comparison) -> float:
    """The ratio, NaN being worse than any number."""
    return float("inf") if comparison.ratio != comparison.ratio else comparison.ratio


@contextlib.contextmanager
def progress_bar(total: int) -> Iterator[Callable[[int, str], None]]:
    """A bar with the time left, on a terminal only. The function yielded adds so many done, and shows what is next."""
    columns = (MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    text = TextColumn("{task.description}")
    with Progress(*columns, text, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda done, text: progress.update(task, advance=done, description=text)


def check(
    ops: list[str],
    dtypes: list[torch.dtype],
    device: torch.device,
    *,
    specs: Mapping[str, KernelSpec] | None = None,
    quick: bool = False,
    out_of_time: Callable[[], bool] = lambda: False,
) -> CheckResult:
    """Prove kernels on a device in every family of cases, with a progress bar on a terminal.

    specs: where the names in ops are found, the registry by default. quick: only the first case of each kernel.
    out_of_time: asked before each case; the rest is skipped once it returns True, which is why a family goes through
    all kernels before the next one starts.
    NothingCompared if there was no comparison, and no case that could not run.
    """
    specs = all_specs() if specs is None else specs
    jobs = [
        (specs[name], dtype, family, case)
        for family in FAMILIES
        for dtype in dtypes
        for name in ops
        for case in (specs[name].cases[:1] if quick else specs[name].cases)
    ]
    comparisons: list[Comparison] = []
    failures: list[str] = []
    failed: set[tuple[str, torch.dtype]] = set()
    skipped, started = 0, time.perf_counter()
    with progress_bar(len(jobs)) as advance:
        for done, (spec, dtype, family, case) in enumerate(jobs):
            if out_of_time():
                skipped = len(jobs) - done
                break
            job = f"{spec.name} {dtype_name(dtype)} {family}"
            advance(min(done, 1), f"{job} {case_text(case)}")
            try:
                results = list(prove_family(family, spec, case, dtype, device))
            except Exception as error:  # a kernel that cannot run has failed, and the others still get their turn
                kind = "refused" if isinstance(error, Refused) else type(error).__name__
                wrong = [f"{job} {case_text(case)}: {kind}: {error}"]
            else:
                comparisons += results
                wrong = [
                    f"{job} {case_text(c.case)}: {c.name} is off by {c.error:.3e}, allowed {c.allowed:.3e}"
                    for c in results
                    if not c.passed
                ]
            failures += wrong
            failed |= {(spec.name, dtype)} if wrong else set()
    if not (comparisons or failures):
        why = "there was no time for a case" if skipped else "no kernel has a case"
        raise NothingCompared(f"nothing was compared, so nothing is proven: {why}")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, interpreted"
    return CheckResult(comparisons, failures, failed, skipped, time.perf_counter() - started, where)
