"""python -m model.report: the page of a run, or of several runs compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from model.cli import UserError, run
from model.files import write_atomic
from model.report import compare, page
from model.report.history import read

File = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]


@dataclass(frozen=True)
class ReportConfig:
    """Write the page of a run, or a page that compares several runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]  # folders of training runs
    out: File = None  # the page; default: RUN/report.html, or runs/compare.html for several runs
    svg: File = None  # write only the chart of the loss, of several runs of the validation loss, as an SVG file


def main(cfg: ReportConfig) -> None:
    folders = list({folder.resolve(): folder for folder in cfg.runs}.values())
    if not folders:
        raise UserError("which run? give its folder, such as runs/first-run, or several to compare them")
    runs = [read(folder, name) for folder, name in zip(folders, compare.names(folders), strict=True)]
    alone = len(runs) == 1
    if cfg.svg:
        path, content = cfg.svg, page.svg(runs[0]) if alone else compare.svg(runs)
        if not content:
            raise UserError("there is no loss to draw yet")
    elif alone:
        path, content = cfg.out or folders[0] / page.PAGE, page.html(runs[0])
    else:
        path, content = cfg.out or Path("runs") / "compare.html", compare.html(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)
    print(path)


if __name__ == "__main__":
    run(main, ReportConfig, prog="python -m model.report")
