"""python -m kernels: what this machine runs and why. python -m kernels check: prove the kernels right on it."""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import NoReturn

import torch

from ._backend import device_problem
from ._check import check, describe
from ._dispatch import kernel_problem
from ._foreign import judges, replaced
from ._machine import this_device
from ._proof import trial
from ._registry import all_specs, load_spec
from ._triton import HAS_TRITON, INTERPRET


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    sub = commands.add_parser("check", help="prove every kernel on this machine against float64")
    sub.add_argument("file", nargs="?", type=Path, help="Python file with a kernel of your own: only that is proven")
    sub.add_argument("--op", nargs="+", choices=list(all_specs()), help="kernels to prove; default: all")
    sub.add_argument(
        "--dtype", nargs="+", choices=["float32", "float16", "bfloat16"], help="default: all that run here"
    )
    sub.add_argument("--quick", action="store_true", help="one case a kernel and one dtype: seconds, not minutes")
    sub.add_argument("--json", type=Path, metavar="FILE", help="also write every comparison to this file")
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


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 fine, 1 a kernel is wrong, 2 the check cannot run."""
    args = _parse(argv)
    if args.command is None:
        print("\n".join(describe()), flush=True)
        return _compile_all()
    device = this_device()
    problem = device_problem(device.type, 0 if device.type == "cuda" else None)
    if problem is not None and HAS_TRITON and device.type == "cpu":
        # Triton reads the variable when it is imported: start again with it set.
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # a busy machine: see model/__init__.py
        os.execv(sys.executable, [sys.executable, "-m", "kernels", *(sys.argv[1:] if argv is None else argv)])
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
    result = check(
        args.op or list(specs), [getattr(torch, name) for name in names], device, specs=specs, quick=args.quick
    )
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
