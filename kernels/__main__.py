"""python -m kernels: what this machine runs and why. python -m kernels check: prove the kernels right on it."""

import argparse
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import _proof
from ._dispatch import device_problem
from ._registry import Case, all_specs
from ._triton import HAS_TRITON, INTERPRET, triton


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _mib(n: int) -> str:
    return f"{n / 2**20:,.0f} MiB"


def describe() -> list[str]:
    """A few lines: device, versions, the backend that "auto" picks and the reason."""
    device = _device()
    lines = [
        f"python {platform.python_version()} on {platform.system()} {platform.machine()}, torch {torch.__version__}"
    ]
    lines[0] += f", triton {triton.__version__}" if HAS_TRITON else ", no triton"
    if device.type == "cuda":
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            lines.append(
                f"cuda:{i} {p.name}, compute capability {p.major}.{p.minor}, {p.multi_processor_count} "
                f"multiprocessors, {_mib(p.total_memory)}"
            )
    else:
        lines.append(f"no CUDA device; CPU with {torch.get_num_threads()} threads")
    problem = device_problem(device.type, 0 if device.type == "cuda" else None)
    if INTERPRET:
        lines.append("TRITON_INTERPRET=1: the kernels are interpreted, one program after the other, by NumPy")
    if device.type == "cuda":
        lines.append("backend auto picks: " + (f"eager, because {problem}" if problem else "triton"))
    else:
        lines.append("backend auto picks: eager, because there is no CUDA device")
    lines.append(f"kernels: {', '.join(all_specs())}")
    return lines


def _progress(done: int, total: int, started: float, what: str) -> None:
    """One live line on a terminal, nothing where there is none: the table at the end says it all."""
    if sys.stderr.isatty():
        elapsed = time.perf_counter() - started
        eta = elapsed / done * (total - done) if done else 0.0
        print(
            f"\r\x1b[K{done}/{total}  {elapsed:.0f} s, {eta:.0f} s to go  {what}", end="", file=sys.stderr, flush=True
        )


def _case_text(case: Case) -> str:
    return " ".join(f"{k}={v}" for k, v in case.items() if k != "why")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Verdict:
    """What a check found. failures: one line for each comparison that failed and each case that could not run;
    red: the (kernel, dtype) that they are of; left_out: cases that there was no time for.
    """

    rows: list[_proof.Row]
    failures: list[str]
    red: set[tuple[str, torch.dtype]]
    left_out: int
    seconds: float
    where: str

    def line(self) -> str:
        """The verdict in one line."""
        result = f"{len(self.failures)} FAILED" if self.failures else "all within the rule"
        result += f"; no time for {self.left_out} cases" if self.left_out else ""
        return f"{len(self.rows)} comparisons with float64 on {self.where} in {self.seconds:.0f} s: {result}"

    def table(self) -> list[str]:
        """Per kernel and dtype the largest error / allowed error of each family of cases, and where it was."""
        families = list(_proof.FAMILIES)
        lines = [f"{'kernel':<22} {'dtype':<9}" + "".join(f"{name:>9}" for name in families) + "  closest to its limit"]
        groups: dict[tuple[str, str], list[_proof.Row]] = {}
        for row in self.rows:
            groups.setdefault((row.kernel, _dtype_name(row.case_dtype)), []).append(row)
        for (kernel, dtype), rows in sorted(
            groups.items(), key=lambda item: item[0][0]
        ):  # dtypes as they were asked for
            # NaN is worse than any number
            key = lambda row: float("inf") if row.ratio != row.ratio else row.ratio  # noqa: E731
            worst = [max((r for r in rows if r.family == name), key=key, default=None) for name in families]
            cells = "".join(f"{'-' if row is None else format(row.ratio, '.2f'):>9}" for row in worst)
            top = max(rows, key=key)
            lines.append(f"{kernel:<22} {dtype:<9}{cells}  {top.name}: {_case_text(top.case)}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """The whole check as JSON takes it; schema 1."""
        rows = [
            {**asdict(row), "case": dict(row.case), "dtype": _dtype_name(row.dtype),
             "case_dtype": _dtype_name(row.case_dtype), "passed": row.passed}
            for row in self.rows
        ]  # fmt: skip
        return {
            "schema": 1, "environment": describe(), "verdict": self.line(), "passed": not self.failures,
            "failures": self.failures, "left_out": self.left_out, "rows": rows,
        }  # fmt: skip


def check(
    ops: list[str],
    dtypes: list[torch.dtype],
    device: torch.device,
    *,
    quick: bool = False,
    over: Callable[[], bool] = lambda: False,
) -> Verdict:
    """Proves kernels on a device, in every family of cases. quick: the first case of each kernel alone. over: asked
    before each case; once it says True the rest is left out, which is why every kernel has its turn in a family first.
    """
    specs = all_specs()
    jobs = [
        (specs[name], dtype, family, case)
        for family in _proof.FAMILIES
        for dtype in dtypes
        for name in ops
        for case in (specs[name].cases[:1] if quick else specs[name].cases)
    ]
    rows: list[_proof.Row] = []
    failures: list[str] = []
    red: set[tuple[str, torch.dtype]] = set()
    left_out, started = 0, time.perf_counter()
    for done, (spec, dtype, family, case) in enumerate(jobs):
        if over():
            left_out = len(jobs) - done
            break
        what = f"{spec.name} {_dtype_name(dtype)} {family} {_case_text(case)}"
        _progress(done, len(jobs), started, what)
        try:
            found = list(_proof.prove_family(family, spec, case, dtype, device))
        except Exception as error:  # a kernel that cannot run is a failed proof, and the others still get theirs
            wrong = [f"{what}: {type(error).__name__}: {error}"]
        else:
            rows += found
            wrong = [
                f"{row.kernel} {_dtype_name(dtype)} {family} {_case_text(row.case)}: {row.name} is off by "
                f"{row.error:.3e}, allowed {row.allowed:.3e}"
                for row in found
                if not row.passed
            ]
        failures += wrong
        if wrong:
            red.add((spec.name, dtype))
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, interpreted"
    return Verdict(rows, failures, red, left_out, time.perf_counter() - started, where)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 fine, 1 a kernel is wrong, 2 it cannot run here."""
    parser = _Parser(prog="python -m kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    sub = commands.add_parser("check", help="prove every kernel on this machine against float64")
    sub.add_argument("--op", nargs="+", choices=list(all_specs()), default=list(all_specs()), help="kernels to prove")
    sub.add_argument(
        "--dtype", nargs="+", choices=["float32", "float16", "bfloat16"], help="default: all that run here"
    )
    sub.add_argument("--quick", action="store_true", help="one case a kernel and one dtype: seconds, not minutes")
    sub.add_argument("--json", type=Path, metavar="FILE", help="also write every comparison to this file")
    args = parser.parse_args(argv)
    if args.command is None:
        print("\n".join(describe()))
        return 0
    device = _device()
    problem = device_problem(device.type, 0 if device.type == "cuda" else None)
    if problem is not None and HAS_TRITON and device.type == "cpu":
        # Interpretation must be asked for before Triton is imported: start over with it.
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "kernels", *(sys.argv[1:] if argv is None else argv)])
    if problem is not None:
        print(f"error: the kernels cannot run here: {problem}", file=sys.stderr)
        return 2
    dtypes = ["float32", "float16"] if INTERPRET else ["bfloat16", "float16", "float32"]
    if INTERPRET and "bfloat16" in (args.dtype or []):
        print("error: bfloat16 is silently wrong in Triton's interpreter: prove it on a GPU", file=sys.stderr)
        return 2
    print("\n".join(describe()), flush=True)
    # NumPy remarks on the infinities that pass through interpreted kernels by intent
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
    chosen = args.dtype or (dtypes[:1] if args.quick else dtypes)
    verdict = check(args.op, [getattr(torch, name) for name in chosen], device, quick=args.quick)
    if args.json is not None:
        try:
            args.json.write_text(json.dumps(verdict.as_dict(), indent=1))
        except OSError as error:
            print(f"error: cannot write {args.json}: {error.strerror}", file=sys.stderr)
            return 2
    shown = verdict.failures[:20]
    more = len(verdict.failures) - len(shown)
    print("\n".join([*verdict.table(), *(f"FAILED {line}" for line in shown), *([f"and {more} more"] if more else [])]))
    print(verdict.line())
    return 1 if verdict.failures else 0


if __name__ == "__main__":
    sys.exit(main())
