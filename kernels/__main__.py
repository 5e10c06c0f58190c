"""python -m kernels: what this machine runs and why. python -m kernels check: prove the kernels right on it."""

import argparse
import os
import platform
import sys
import time
import warnings
from typing import NoReturn

import torch

from . import _proof
from ._dispatch import device_problem
from ._registry import all_specs
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


def _case_text(case) -> str:
    return " ".join(f"{k}={v}" for k, v in case.items() if k != "why")


def check(ops: list[str], dtypes: list[torch.dtype], device: torch.device) -> int:
    """Proves the kernels on a device, prints a table of error over allowed error; 0 if all hold, 1 if one does not."""
    specs = all_specs()
    jobs = [(specs[name], case, dtype) for name in ops for dtype in dtypes for case in specs[name].cases]
    table: dict[tuple[str, str, str], _proof.Row] = {}  # the worst row per kernel, dtype and result
    failures, count, started = [], 0, time.perf_counter()
    for done, (spec, case, dtype) in enumerate(jobs):
        _progress(done, len(jobs), started, f"{spec.name} {_case_text(case)}")
        try:
            rows = list(_proof.prove(spec, case, dtype, device))
        except Exception as error:  # a kernel that cannot run is a failed proof, and the others still get theirs
            failures.append(f"{spec.name} {_case_text(case)} {dtype}: {type(error).__name__}: {error}")
            continue
        for row in rows:
            count += 1
            key = (row.kernel, str(dtype).removeprefix("torch."), row.name)
            if key not in table or not row.ratio <= table[key].ratio:
                table[key] = row
            if not row.passed:
                failures.append(
                    f"{row.kernel} {_case_text(case)} {dtype}: {row.name} is off by {row.error:.3e}, "
                    f"allowed {row.allowed:.3e}"
                )
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    print(f"{'kernel':<18} {'dtype':<9} {'result':<8} {'error':>10} {'allowed':>10} {'ratio':>6}  worst case")
    for (kernel, dtype_name, name), row in table.items():
        result = name if name == "y" else f"d{name}"
        print(
            f"{kernel:<18} {dtype_name:<9} {result:<8} {row.error:>10.2e} {row.allowed:>10.2e} {row.ratio:>6.2f}"
            f"  {_case_text(row.case)}"
        )
    for failure in failures:
        print(f"FAILED {failure}")
    verdict = f"{len(failures)} FAILED" if failures else "all within the rule"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, interpreted"
    print(f"{count} comparisons with float64 on {where} in {time.perf_counter() - started:.0f} s: {verdict}")
    return 1 if failures else 0


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
    dtypes = ["float32", "float16"] if INTERPRET else ["float32", "float16", "bfloat16"]
    if INTERPRET and "bfloat16" in (args.dtype or []):
        print("error: bfloat16 is silently wrong in Triton's interpreter: prove it on a GPU", file=sys.stderr)
        return 2
    print("\n".join(describe()), flush=True)
    # NumPy remarks on the infinities that pass through interpreted kernels by intent
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
    return check(args.op, [getattr(torch, name) for name in args.dtype or dtypes], device)


if __name__ == "__main__":
    sys.exit(main())
