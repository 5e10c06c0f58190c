"""What the commands of `python -m bench` share: options, their checks, and a report that grows while it is measured."""

from __future__ import annotations

import functools
import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import rich.progress
import torch
from rich.console import Console

from bench import report as pages
from bench import timing
from bench.record import CONTROL, Report, Row
from kernels._proof import trial
from kernels._registry import KernelSpec, load_spec
from model.cli import UserError
from model.config import PRESETS
from model.files import write_atomic

T = TypeVar("T")
Dtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Measurement(ABC):
    """A command that measures, prints each row and writes a report."""

    out: Path | None = None  # Report to write, such as runs/kernels.json; none by default.

    def check(self) -> None:  # noqa: B027  # most refuse nothing
        """Raise UserError for options that make no sense."""

    @abstractmethod
    def total(self, device: torch.device) -> int:
        """The number of groups, where nothing fails."""

    @abstractmethod
    def groups(self, device: torch.device, report: Report) -> Iterator[list[Row]]:
        """Yield a list of rows for each group, as it is measured. report: gets who is missing, and the method."""

    def main(self) -> None:
        self.measure()

    def measure(self) -> Report:
        """Print each row, and write the report after each group."""
        self.check()
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        report = start_report(device, self.out)
        for rows in tracked(self.groups(device, report), self.total(device)):
            for row in rows:
                if row.provider != CONTROL:
                    print(pages.line(row), flush=True)
            report.rows += rows
            if self.out:
                report.write(self.out)
        for name, reason in report.missing.items():
            print(f"not here: {name}: {reason}")
        if self.out:
            report.write(self.out)
            print(f"report: {self.out}  (python -m bench report {self.out})")
        return report


@dataclass(frozen=True)
class Timed(Measurement):
    """A measurement of time."""

    provider: tuple[str, ...] = ()  # Providers to time, such as "eager"; by default, all that run here.
    seconds: float = 5.0  # Time spent on each provider of a group, or 50 rounds of it.


def start_report(device: torch.device, out: Path | None) -> Report:
    """An empty report with its command and clocks. UserError if `out` exists."""
    require_new(out)
    report = Report.start(device)
    report.method |= {"command": typed(sys.argv[1:])}
    report.method |= {name: timing.METHOD[name] for name in (*timing.clocks(device), "interval")}
    return report


def write_pages(reports: list[Report], out: Path) -> None:
    """Write report.md and report.html into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "report.md", pages.markdown(reports))
    write_atomic(out / "report.html", pages.html(reports))


def typed(args: list[str]) -> str:
    """The command that was typed, without the paths of this machine."""
    words = ["python", "-m", "bench"]
    for before, word in zip(["", *args], args, strict=False):
        if not {word, before} & {"--out", "--runs"}:
            words.append("nanoGPT" if before == "--nanogpt" else Path(word).name if before == "--data" else word)
    return shlex.join(words)


def tracked(items: Iterable[T], total: int) -> Iterable[T]:
    """The items, with a progress bar on a terminal."""
    hidden = not sys.stdout.isatty()
    return rich.progress.track(items, "", total=total, console=Console(soft_wrap=True), transient=True, disable=hidden)


def pick(what: str, names: Iterable[str], known: Iterable[str]) -> list[str]:
    """The names, all that are known where there are none. UserError for one that is not known."""
    known = list(known)
    for name in names:
        if name not in known:
            raise UserError(f"there is no {what} {name!r}: choose from {', '.join(known)}")
    return list(names) or known


@functools.cache  # the file is run once
def own_kernel(path: Path) -> KernelSpec:
    """The kernel that a file declares. UserError if there is none, or none that could be proven."""
    try:
        spec = load_spec(path)
        trial(spec, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return spec


def require_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"--{name} must be above 0, got {value:g}")


def require_model(preset: str, batch: Iterable[int], context: int | None = None) -> None:
    """UserError unless the preset exists and takes such batches."""
    pick("preset", (preset,), PRESETS)
    limit = PRESETS[preset].n_positions
    if min(batch, default=0) < 1:
        raise UserError("--batch must be at least 1")
    if context is not None and not 0 < context <= limit:
        raise UserError(f"--context must lie in 1 to {limit} for the preset {preset}, got {context}")


def require_new(out: Path | None) -> None:
    if out is not None and out.exists():
        raise UserError(f"{out} exists: name another file, or move that one away")


def dtype_of(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of a name; bfloat16 on a GPU and float32 on a CPU for None."""
    return getattr(torch, name or ("bfloat16" if device.type == "cuda" else "float32"))
