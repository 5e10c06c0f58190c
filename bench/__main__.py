"""python -m bench: measure kernels, training and generation on this machine, and compare reports of it."""

import datetime
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from bench import compare as comparison
from bench import generate, gpu, memory, peers, report, roofline, static, timing, train_step
from bench import kernels as kernel_bench
from bench.record import CONTROL, Report, Row, commit_info, machine_info
from kernels._dispatch import device_problem
from kernels._registry import all_specs
from model import cli
from model.config import PRESETS

Dtype = Literal["bfloat16", "float16", "float32"]
Mode = Literal["forward", "backward", "both"]


@dataclass(frozen=True)
class Kernels:
    """Every kernel on its bench cases beside PyTorch's operators and those of other libraries."""

    op: tuple[str, ...] = ()
    """Kernels to time; all of them where none is named."""
    dtype: tuple[Dtype, ...] = ()
    """Precisions; bfloat16 on a GPU and float32 on a CPU where none is named."""
    mode: tuple[Mode, ...] = ("forward", "backward", "both")
    """Passes to time."""
    provider: tuple[str, ...] = ()
    """Who is timed, "eager" for instance; all that run here where none is named."""
    seconds: float = 0.5
    """Time spent on each provider of a case, mode and clock, or 50 rounds of it."""
    quick: bool = False
    """Only the first bench case of each kernel."""
    out: Path | None = None
    """Report to write, such as runs/kernels.json; none is written where it is left out."""


@dataclass(frozen=True)
class Train:
    """Whole training steps, from plain attention in eager PyTorch to everything on, beside Hugging Face's model."""

    preset: str = "gpt2"
    """Model preset."""
    batch: tuple[int, ...] = (4, 16, 64)
    """Sequences a step."""
    context: int | None = None
    """Tokens a sequence; the preset's own length where it is left out."""
    dtype: Dtype | None = None
    """Precision of the activations; bfloat16 on a GPU and float32 on a CPU where it is left out."""
    vocab_size: int | None = None
    """Tokens that the model knows; the preset's where it is left out."""
    bias: bool = True
    """Biases in linear layers and LayerNorm, as GPT-2 has them."""
    provider: tuple[str, ...] = ()
    """Who is timed; all that run here where none is named."""
    nanogpt: Path | None = None
    """Folder of a nanoGPT checkout, to be timed in the same rounds."""
    seconds: float = 5.0
    """Time spent on each provider, or 50 rounds of it."""
    out: Path | None = None
    """Report to write; none is written where it is left out."""


@dataclass(frozen=True)
class Generate:
    """Tokens a second of reading a prompt and of writing on, beside Hugging Face's generate."""

    preset: str = "gpt2"
    """Model preset; its weights are random, the same for all."""
    batch: tuple[int, ...] = (1, 8, 64)
    """Sequences at a time."""
    prompt: int = 512
    """Tokens of the prompt."""
    tokens: int = 64
    """Tokens that are written."""
    dtype: Dtype | None = None
    """Precision; bfloat16 on a GPU and float32 on a CPU where it is left out."""
    provider: tuple[str, ...] = ()
    """Who is timed; all that run here where none is named."""
    seconds: float = 5.0
    """Time spent on each provider, or 50 rounds of it."""
    out: Path | None = None
    """Report to write; none is written where it is left out."""


@dataclass(frozen=True)
class Memory:
    """What a training step needs, predicted and measured, and the largest batch that fits common cards."""

    preset: str = "gpt2"
    """Model preset."""
    batch: tuple[int, ...] = (4, 16, 32, 64)
    """Sequences a step."""
    context: int | None = None
    """Tokens a sequence; the preset's own length where it is left out."""
    dtype: Dtype = "bfloat16"
    """Precision of the activations."""
    out: Path | None = None
    """Report to write; none is written where it is left out."""


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
    """JSON file to write; none is written where it is left out."""


@dataclass(frozen=True)
class Gpu:
    """Proof and measurements on this machine's GPU inside a budget, in one folder: what `make gpu` runs."""

    minutes: float = 8.0
    """What is left out to keep it is named, the least important first."""
    out: Path | None = None
    """Folder for report.json, report.md, report.html and check.json; runs/gpu-<date>-<time> where it is left out."""


@dataclass(frozen=True)
class Show:
    """Reports as Markdown, on standard output or, beside one self-contained HTML page, in a folder."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Reports, or folders that hold some."""
    out: Path | None = None
    """Folder for report.md and report.html."""
    readme: Path | None = None
    """Markdown file whose tables between <!-- bench ... --> markers are written anew."""


@dataclass(frozen=True)
class Compare:
    """What got slower, faster or fatter from one report to another. Exit code 1 if anything is worse."""

    a: tyro.conf.Positional[Path]
    """The report before, or a folder of several runs; a file of pytest-benchmark will do."""
    b: tyro.conf.Positional[Path]
    """The report after, or a folder of several runs."""
    threshold: float = 5.0
    """Smallest change of time that counts, in percent."""
    provider: tuple[str, ...] = ()
    """Only these; all of them where none is named."""
    across_devices: bool = False
    """Compare reports of different devices all the same."""


Command = (
    Annotated[Kernels, tyro.conf.subcommand("kernels")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Memory, tyro.conf.subcommand("memory")]
    | Annotated[Static, tyro.conf.subcommand("static")]
    | Annotated[Gpu, tyro.conf.subcommand("gpu")]
    | Annotated[Show, tyro.conf.subcommand("report")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
)


def _pick(what: str, names: tuple[str, ...], known: list[str]) -> list[str]:
    for name in names:
        if name not in known:
            raise cli.UserError(f"there is no {what} {name!r}: choose from {', '.join(known)}")
    return list(names) or known


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise cli.UserError(f"--{name} must be above 0, got {value:g}")


def _context(preset: str, context: int | None, batch: tuple[int, ...]) -> int:
    _pick("preset", (preset,), list(PRESETS))
    limit = PRESETS[preset].n_positions
    if min(batch, default=0) < 1:
        raise cli.UserError("--batch must be at least 1")
    if context is not None and not 0 < context <= limit:
        raise cli.UserError(f"--context must lie in 1 to {limit} for the preset {preset}, got {context}")
    return context or limit


def _device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    return getattr(torch, name or ("bfloat16" if device.type == "cuda" else "float32"))


def _new(out: Path | None) -> None:
    if out is not None and out.exists():
        raise cli.UserError(f"{out} exists: name another file, or move that one away")


def _command(args: list[str]) -> str:
    """What was typed, without the paths of this machine."""
    words = ["python", "-m", "bench"]
    for before, word in zip(["", *args], args, strict=False):
        if word != "--out" and before != "--out":
            words.append("nanoGPT" if before == "--nanogpt" else word)
    return shlex.join(words)


class _Run:
    """A report that is printed and written as it is measured."""

    def __init__(self, device: torch.device, out: Path | None) -> None:
        _new(out)
        self.report, self.out = Report.start(device), out
        self.report.method |= {"command": _command(sys.argv[1:])}
        self.report.method |= {name: timing.METHOD[name] for name in (*timing.clocks(device), "interval")}

    def collect(self, groups: Iterator[list[Row]], total: int) -> None:
        """Prints each row, writes after each group, and says in the end who is missing. total: groups to come."""
        started = time.monotonic()
        with cli.LiveLine() as live:
            for done, rows in enumerate(groups, 1):
                for row in rows:
                    if row.provider != CONTROL:
                        live.print(report.line(row))
                self.report.rows += rows
                if self.out:
                    self.report.write(self.out)
                if live.is_live:
                    eta = (time.monotonic() - started) / done * max(total - done, 0)
                    live.update(f"{done}/{total} groups, eta {int(eta) // 60}:{int(eta) % 60:02d}")
        for name, why in self.report.missing.items():
            print(f"not here: {name}: {why}")
        if self.out:
            self.report.write(self.out)
            print(f"report: {self.out}  (python -m bench report {self.out})")


def _kernels(config: Kernels) -> None:
    ops = _pick("kernel", config.op, list(all_specs()))
    providers = _pick("provider", config.provider, peers.known_providers())
    _positive(seconds=config.seconds)
    device = _device()
    run = _Run(device, config.out)
    dtypes = [_dtype(name, device) for name in config.dtype or (None,)]
    roofs = roofline.measure(device, dtypes)
    run.report.method |= {"roofs": roofs.as_dict(), "peers": peers.NOTES}
    run.collect(
        kernel_bench.run(
            device, dtypes, ops, run.report.missing, roofs, providers=providers, modes=config.mode,
            seconds=config.seconds, quick=config.quick,
        ),
        total=kernel_bench.groups(device, dtypes, ops, config.mode, quick=config.quick),
    )  # fmt: skip


def _train(config: Train) -> None:
    context = _context(config.preset, config.context, config.batch)
    providers = _pick("provider", config.provider, list(train_step.PROVIDERS))
    _positive(seconds=config.seconds)
    if config.nanogpt is not None and not (config.nanogpt / "model.py").is_file():
        raise cli.UserError(f"{config.nanogpt} is no checkout of nanoGPT: it has no model.py")
    device = _device()
    run = _Run(device, config.out)
    overrides = {"bias": config.bias} | ({} if config.vocab_size is None else {"vocab_size": config.vocab_size})
    run.collect(
        train_step.run(
            device, config.preset, list(config.batch), context, _dtype(config.dtype, device), run.report.missing,
            providers=providers, seconds=config.seconds, nanogpt=config.nanogpt, overrides=overrides,
        ),
        total=len(config.batch),
    )  # fmt: skip


def _generate(config: Generate) -> None:
    _context(config.preset, None, config.batch)
    providers = _pick("provider", config.provider, list(generate.PROVIDERS))
    _positive(seconds=config.seconds, prompt=config.prompt, tokens=config.tokens)
    limit = PRESETS[config.preset].n_positions
    if config.prompt + config.tokens > limit:
        raise cli.UserError(
            f"--prompt and --tokens are {config.prompt + config.tokens} together, and the preset {config.preset} has "
            f"{limit} positions: ask for less"
        )
    device = _device()
    run = _Run(device, config.out)
    run.collect(
        generate.run(
            device, config.preset, list(config.batch), config.prompt, config.tokens, _dtype(config.dtype, device),
            run.report.missing, providers=providers, seconds=config.seconds,
        ),
        total=2 * len(config.batch),
    )  # fmt: skip


def _memory(config: Memory) -> None:
    context = _context(config.preset, config.context, config.batch)
    device, dtype = _device(), getattr(torch, config.dtype)
    run = _Run(device, config.out)
    rows = memory.run(device, config.preset, list(config.batch), context, dtype, run.report.missing)
    run.collect(rows, total=len(config.batch))
    print(f"largest batch of {context} tokens that should fit:")
    for gib, batches in memory.fits(config.preset, context, dtype):
        print(f"  {gib:>3} GiB  " + "  ".join(f"{backend} {batch}" for backend, batch in batches.items()))


def _static(config: Static) -> None:
    for arch in config.arch:
        if arch not in static.ARCHITECTURES:
            raise cli.UserError(f"--arch {arch} is not known: choose from {', '.join(map(str, static.ARCHITECTURES))}")
    ops = _pick("kernel", config.op, list(all_specs()))
    _new(config.out)
    rows: list[static.StaticRow] = []
    dtypes = [getattr(torch, name) for name in config.dtype]
    with cli.LiveLine() as line:
        for done, total, found in static.survey(config.arch, dtypes, ops, bench_only=config.bench_only):
            rows += found
            if line.is_live:
                line.update(f"compiled {done}/{total}  {found[-1].kernel} sm_{found[-1].arch} {found[-1].dtype}")
    print(static.HEAD)
    for row in sorted(rows, key=lambda r: (r.kernel, r.arch, r.dtype, r.config)):
        print(static.line(row))
    problems = sum(bool(r.problem) for r in rows)
    print(f"{len(rows)} compiled kernels, {problems} with a problem")
    if config.out:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        origin = {"machine_info": machine_info(torch.device("cpu")), "commit_info": commit_info()}
        config.out.write_text(json.dumps({**origin, "rows": [static.as_dict(row) for row in rows]}, indent=1) + "\n")
    if problems:
        sys.exit(1)


def _gpu_device() -> torch.device:
    problem = (
        device_problem("cuda", 0)
        if torch.cuda.is_available()
        else "torch finds no CUDA device (see `python -m kernels`)"
    )
    if problem:
        raise cli.UserError(f"make gpu needs an NVIDIA GPU of compute capability 8.0 or newer: {problem}")
    return torch.device("cuda", 0)


def _everything(config: Gpu) -> None:
    _positive(minutes=config.minutes)
    device = _gpu_device()
    out = config.out or Path("runs") / f"gpu-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    run = _Run(device, out / "report.json")
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    budget = gpu.Budget(config.minutes)
    verdict = gpu.everything(device, run.report, out, budget, say=lambda text: print(text, flush=True))
    _write_pages([run.report], out)
    print("\n".join(gpu.summary(run.report, verdict)))
    print(f"reports in {out} after {time.monotonic() - started:.0f} s")
    if verdict.failures:
        sys.exit(1)


def _write_pages(reports: list[Report], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(report.markdown(reports))
    (out / "report.html").write_text(report.html(reports))


def _read(paths: tuple[Path, ...]) -> dict[Path, Report]:
    files = []
    for path in paths:
        found = sorted(p for p in path.rglob("*.json") if p.name != "check.json") if path.is_dir() else [path]
        if not found:
            raise cli.UserError(f"there is no report in {path}: write one with `python -m bench kernels --out FILE`")
        files += found
    return {file: Report.read(file) for file in files}


def _show(config: Show) -> None:
    if not config.files:
        raise cli.UserError("name at least one report: python -m bench report FILE ...")
    reports = _read(config.files)
    if config.readme:
        folder = config.readme.resolve().parent
        named = {Path(os.path.relpath(file.resolve(), folder)).as_posix(): found for file, found in reports.items()}
        text = report.update_readme(config.readme.read_text(), report.readme_tables(named))
        config.readme.write_text(text)
        print(f"wrote the tables of {config.readme}")
    if config.out:
        _write_pages([*reports.values()], config.out)
        print(f"{config.out / 'report.md'} and {config.out / 'report.html'}")
    elif not config.readme:
        print(report.markdown([*reports.values()]))


def _compare(config: Compare) -> None:
    _positive(threshold=config.threshold)
    a, b = ([*_read((path,)).values()] for path in (config.a, config.b))
    threshold = config.threshold / 100
    result = comparison.compare(
        a, b, threshold=threshold, providers=config.provider, across_devices=config.across_devices
    )
    print(comparison.text(a, b, result, threshold=threshold))
    if result.regressed:
        sys.exit(1)


def _main(command: Command) -> None:
    handlers = {
        Kernels: _kernels, Train: _train, Generate: _generate, Memory: _memory, Static: _static, Gpu: _everything,
        Show: _show, Compare: _compare,
    }  # fmt: skip
    handlers[type(command)](command)  # type: ignore[operator]


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    cli.run(_main, Command, prog="python -m bench", argv=argv)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
