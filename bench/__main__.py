"""python -m bench: measure the kernels and the training step on this machine, or read what the kernels compile to."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from bench import kernels as kernel_bench
from bench import report, static, train_step
from kernels import __main__ as kernels_command
from kernels._dispatch import device_problem
from kernels._registry import all_specs
from model import cli
from model.config import PRESETS

Dtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Kernels:
    """Every kernel on its bench cases beside PyTorch's operator, eager and compiled."""

    op: tuple[str, ...] = ()
    """Kernels to time; all of them where none is named."""
    dtype: tuple[Dtype, ...] = ("bfloat16",)
    """Precisions to time."""
    seconds: float = 0.5
    """Time spent on each provider of a case."""
    quick: bool = False
    """Only the first bench case of each kernel."""
    out: Path | None = None
    """Folder for the report, kernels.json; none is written where it is left out."""


@dataclass(frozen=True)
class Train:
    """Whole training steps: eager, compiled, and with our kernels."""

    preset: str = "gpt2"
    """Model preset."""
    batch: tuple[int, ...] = (4, 16, 64)
    """Sequences a step."""
    context: int | None = None
    """Tokens a sequence; the preset's own length where it is left out."""
    dtype: Dtype = "bfloat16"
    """Precision of the activations."""
    seconds: float = 5.0
    """Time spent on each provider."""
    out: Path | None = None
    """Folder for the report, train.json; none is written where it is left out."""


@dataclass(frozen=True)
class Static:
    """What the kernels compile to, for architectures that need not be here. Uses no GPU; exit code 1 on a problem."""

    arch: tuple[int, ...] = (80, 90, 100)
    """Compute capabilities, times ten."""
    op: tuple[str, ...] = ()
    """Kernels to compile; all of them where none is named."""
    dtype: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")
    """Precisions to compile."""
    bench_only: bool = False
    """Only the shapes of the benchmarks, not those of the tests."""
    out: Path | None = None
    """Folder for the report, static.json; none is written where it is left out."""


@dataclass(frozen=True)
class Gpu:
    """Proof and measurements on this machine's GPU, in one folder: what `make gpu` runs."""

    out: Path = Path("runs/gpu")
    """Folder for the reports: kernels.json, train.json, environment.json."""
    quick: bool = False
    """One case a kernel and one batch size."""


Command = (
    Annotated[Kernels, tyro.conf.subcommand("kernels")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Static, tyro.conf.subcommand("static")]
    | Annotated[Gpu, tyro.conf.subcommand("gpu")]
)


def _ops(names: tuple[str, ...]) -> list[str]:
    known = list(all_specs())
    for name in names:
        if name not in known:
            raise cli.UserError(f"there is no kernel {name!r}: choose from {', '.join(known)}")
    return list(names) or known


def _gpu(what: str) -> torch.device:
    problem = (
        device_problem("cuda", 0)
        if torch.cuda.is_available()
        else "torch finds no CUDA device (see `python -m kernels`)"
    )
    if problem:
        raise cli.UserError(f"{what} needs an NVIDIA GPU of compute capability 8.0 or newer: {problem}")
    return torch.device("cuda", 0)


def _device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _kernels(config: Kernels) -> None:
    device = _gpu("timing the kernels")
    rows = []
    dtypes = [getattr(torch, name) for name in config.dtype]
    for row in kernel_bench.run(device, dtypes, _ops(config.op), seconds=config.seconds, quick=config.quick):
        print(report.kernel_line(row), flush=True)
        rows.append(row.as_dict())
        if config.out:  # after every row: a kill loses nothing
            report.write(config.out / "kernels.json", "kernels", device, rows)


def _train(config: Train) -> None:
    if config.preset not in PRESETS:
        raise cli.UserError(f"there is no preset {config.preset!r}: choose from {', '.join(PRESETS)}")
    context = config.context or PRESETS[config.preset].n_positions
    if not 0 < context <= PRESETS[config.preset].n_positions or min(config.batch, default=0) < 1:
        limit = PRESETS[config.preset].n_positions
        raise cli.UserError(
            f"--batch must be at least 1 and --context from 1 to {limit} for the preset {config.preset}"
        )
    device = _device()
    rows = []
    dtype = getattr(torch, config.dtype)
    for row in train_step.run(device, config.preset, list(config.batch), context, dtype, config.seconds):
        print(report.train_line(row), flush=True)
        rows.append(row.as_dict())
        if config.out:
            report.write(config.out / "train.json", "train", device, rows)


def _static(config: Static) -> None:
    for arch in config.arch:
        if arch not in static.ARCHITECTURES:
            raise cli.UserError(f"--arch {arch} is not known: choose from {', '.join(map(str, static.ARCHITECTURES))}")
    rows: list[static.StaticRow] = []
    dtypes = [getattr(torch, name) for name in config.dtype]
    with cli.LiveLine() as line:
        for done, total, found in static.survey(config.arch, dtypes, _ops(config.op), bench_only=config.bench_only):
            rows += found
            if line.is_live:
                line.update(f"compiled {done}/{total}  {found[-1].kernel} sm_{found[-1].arch} {found[-1].dtype}")
    print(report.STATIC_HEAD)
    for row in sorted(rows, key=lambda r: (r.kernel, r.arch, r.dtype, r.config)):
        print(report.static_line(row))
    problems = sum(bool(r.problem) for r in rows)
    print(f"{len(rows)} compiled kernels, {problems} with a problem")
    if config.out:
        report.write(config.out / "static.json", "static", torch.device("cpu"), [static.as_dict(r) for r in rows])
    if problems:
        sys.exit(1)


def _everything(config: Gpu) -> None:
    device = _gpu("make gpu")
    started = time.perf_counter()
    config.out.mkdir(parents=True, exist_ok=True)
    print("\n".join(kernels_command.describe()), flush=True)
    dtypes = [torch.float32, torch.float16, torch.bfloat16]
    verdict = kernels_command.check(list(all_specs()), dtypes, device)
    print("\n".join([*verdict.table(), verdict.line()]), flush=True)
    (config.out / "check.json").write_text(json.dumps(verdict.as_dict(), indent=1) + "\n")
    _kernels(Kernels(quick=config.quick, out=config.out))
    _train(Train(batch=(4,) if config.quick else (4, 16, 64), out=config.out))
    (config.out / "environment.json").write_text(json.dumps(report.environment(device), indent=1) + "\n")
    print(f"reports in {config.out} after {time.perf_counter() - started:.0f} s")
    if verdict.failures:
        sys.exit(1)


def _main(command: Command) -> None:
    handlers = {Kernels: _kernels, Train: _train, Static: _static, Gpu: _everything}
    handlers[type(command)](command)  # type: ignore[operator]


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    cli.run(_main, Command, prog="python -m bench", argv=argv)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
