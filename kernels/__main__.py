"""What this machine runs and why; check: prove the kernels right on it; tune: choose their launch options on its GPU.

`python -m kernels` in the repository, `gpt2-kernels` from a wheel.
"""

import argparse
import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import NoReturn

import torch

from . import _tables
from . import _tune as _tuner
from ._backend import device_problem
from ._check import NothingCompared, check, describe
from ._dispatch import kernel_problem
from ._foreign import judges, replaced
from ._launch import arch_of, sm_count
from ._machine import gpu_problem, this_device
from ._machine_code import ARCHITECTURES
from ._proof import trial
from ._registry import all_specs, load_spec
from ._triton import HAS_TRITON, INTERPRET

_DTYPES = ["float32", "float16", "bfloat16"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog=f"python -m {__package__}",
        description="Without a command, or by `info`: what this machine runs and why.",
        epilog="Benchmarks, and what the kernels compile to without a GPU, are in the repository: python -m bench",
    )
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("info", help="what this machine runs and why")
    sub = commands.add_parser("check", help="prove every kernel on this machine against float64")
    sub.add_argument("file", nargs="?", type=Path, help="Python file with a kernel of your own: only that is proven")
    sub.add_argument("--op", nargs="+", choices=list(all_specs()), help="kernels to prove; default: all")
    sub.add_argument("--dtype", nargs="+", choices=_DTYPES, help="default: all that run here")
    sub.add_argument("--quick", action="store_true", help="one case a kernel and one dtype: seconds, not minutes")
    sub.add_argument("--json", type=Path, metavar="FILE", help="also write every comparison to this file")
    tune = commands.add_parser("tune", help="choose launch options by measuring them on this GPU")
    tune.add_argument("--op", nargs="+", choices=list(all_specs()), default=list(all_specs()), help="kernels to tune")
    tune.add_argument("--dtype", nargs="+", choices=_DTYPES, default=["bfloat16"], help="default: bfloat16")
    tune.add_argument("--quick", action="store_true", help="about two minutes: fewer candidates, cases and rounds")
    tune.add_argument("--any-bits", action="store_true", help="also options with which results round differently")
    tune.add_argument("--out", type=Path, metavar="FILE", help="also write the table to this file, to send in")
    what = "measure nothing: how many candidates their compiled code for sm_<ARCH> leaves, such as 90"
    tune.add_argument("--dry-run", type=int, choices=ARCHITECTURES, metavar="ARCH", help=what)
    return parser.parse_args(argv)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _compile_all() -> int:
    """Where there is a GPU that runs Triton: compile every kernel for it, and say which do not."""
    if this_device().type == "cuda" and device_problem("cuda", 0) is None:
        for name in all_specs():
            problem = kernel_problem(name, torch.bfloat16, 0)
            print(f"{name:<22} {f'eager: {problem}' if problem else 'triton'}", flush=True)
    return 0


def _tune(args: argparse.Namespace, device: torch.device, problem: str | None) -> int:
    """Measure on this GPU, write the table, and say what came of it."""
    if INTERPRET or not HAS_TRITON:
        return _fail("tune compiles the kernels: " + ("unset TRITON_INTERPRET" if INTERPRET else str(problem)))
    if args.dry_run is None and (problem is not None or device.type != "cuda"):
        why = problem if device.type == "cuda" else gpu_problem() or "torch finds no CUDA device"
        return _fail(f"tune measures on an NVIDIA GPU: {why}")
    if args.out is not None and args.out.exists():
        return _fail(f"{args.out} exists: name another file, or move that one away")
    arch, sms = (args.dry_run, 132) if args.dry_run else (arch_of(device), sm_count(device))
    targets = _tuner.survey(args.op, [getattr(torch, name) for name in args.dtype], arch, sms, quick=args.quick)
    if not targets:
        print("there is nothing to choose: these kernels declare no other launch options")
        return 0
    if args.dry_run:
        _tuner.dry_run(targets, arch, sms)
        return 0
    print("\n".join(describe()), flush=True)
    machine = _tuner.Machine(torch.device("cuda", torch.cuda.current_device()))
    path = _tables.user_file(machine.gpu)
    try:
        result = _tuner.tune(machine, targets, path, quick=args.quick, any_bits=args.any_bits)
        if args.out is not None:
            shutil.copyfile(path, args.out)
    except OSError as error:
        return _fail(f"cannot write {error.filename or path}: {error.strerror}; KERNELS_TABLES names another folder")
    print("\n".join(result.report()))
    return 130 if result.problem == "interrupted" else 1 if result.problem else 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 fine, 1 a kernel is wrong, 2 the check cannot run."""
    args = _parse(argv)
    if args.command in (None, "info"):
        print("\n".join(describe()), flush=True)
        return _compile_all()
    device = this_device()
    problem = device_problem(device.type, 0 if device.type == "cuda" else None)
    if args.command == "tune":
        return _tune(args, device, problem)
    if problem is not None and HAS_TRITON and device.type == "cpu":
        # Triton reads the variable when it is imported: start again with it set.
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # a busy machine: see model/__init__.py
        os.execv(sys.executable, [sys.executable, "-m", __package__, *(sys.argv[1:] if argv is None else argv)])
    if problem is not None:
        return _fail(f"the kernels cannot run here: {problem}")
    if INTERPRET and "bfloat16" in (args.dtype or []):
        return _fail("bfloat16 is silently wrong in Triton's interpreter: prove it on a GPU")
    specs, before = all_specs(), judges(__package__ or "")
    if args.file is not None:
        try:
            spec = load_spec(args.file)
            launched = trial(spec, device)
        except ValueError as error:
            return _fail(f"{args.file}: {error}")
        specs = {spec.name: spec}
    print("\n".join(describe()), flush=True)
    if args.file is not None:
        print(f"{spec.name} of {args.file} launches {', '.join(launched)}", flush=True)
    # NumPy warns about the infinities that pass through interpreted kernels by design.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
    default = ["float32", "float16"] if INTERPRET else ["bfloat16", "float16", "float32"]
    names = args.dtype or (default[:1] if args.quick else default)
    dtypes = [getattr(torch, name) for name in names]
    try:
        result = check(args.op or list(specs), dtypes, device, specs=specs, quick=args.quick)
    except NothingCompared as error:
        return _fail(str(error))
    if name := replaced(before):
        return _fail(f"{args.file} replaces {name}, on which the check relies")
    if args.json is not None:
        try:
            args.json.write_text(json.dumps(result.as_dict(), indent=1))
        except OSError as error:
            return _fail(f"cannot write {args.json}: {error.strerror}")
    print("\n".join(result.report()))
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
