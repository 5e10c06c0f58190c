"""python -m model.report: the page of a run, or one page that lays several runs over each other."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from model.cli import UserError, run
from model.report import compare
from model.report.history import read
from model.report.page import PAGE, html, write_page

Out = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]


@dataclass(frozen=True)
class ReportConfig:
    """Write the page of a run, or one page that lays several runs over each other."""

    runs: tyro.conf.Positional[tuple[Path, ...]]  # folders of training runs
    out: Out = None  # the page; without it RUN/report.html, and for several runs runs/compare.html


def main(cfg: ReportConfig) -> None:
    folders = list({folder.resolve(): folder for folder in cfg.runs}.values())
    if not folders:
        raise UserError("which run? give its folder, such as runs/tiny, or several to lay them over each other")
    if len(folders) == 1:
        print(write_page(cfg.out or folders[0] / PAGE, html(read(folders[0]), time.time())))
    else:
        found = [read(folder, name) for folder, name in zip(folders, compare.names(folders), strict=True)]
        print(write_page(cfg.out or Path("runs") / "compare.html", compare.html(found)))


if __name__ == "__main__":
    run(main, ReportConfig, prog="python -m model.report")
