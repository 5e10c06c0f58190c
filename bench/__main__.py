"""python -m bench: measure kernels, training, its time to a loss, and generation on this machine; compare reports."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bench import command, report
from bench.compare import Compare
from bench.generate import Generate
from bench.gpu import Gpu
from bench.kernels import Kernels
from bench.memory import Memory
from bench.quality import Quality
from bench.record import read_reports
from bench.static import Static
from bench.train_step import Train
from bench.trend import Trend
from model import cli
from model.files import write_atomic


@dataclass(frozen=True)
class Show:
    """Reports as Markdown, on standard output or, with one self-contained HTML page, in a folder."""

    files: tyro.conf.Positional[tuple[Path, ...]]  # Reports, or folders that hold some.
    out: Path | None = None  # Folder for report.md and report.html.
    readme: Path | None = None  # Markdown file whose tables between <!-- bench ... --> markers are rewritten.
    format: Literal["markdown", "github-action-benchmark"] = "markdown"  # Of standard output; the latter is JSON.

    def main(self) -> None:
        if not self.files:
            raise cli.UserError("name at least one report: python -m bench report FILE ...")
        reports = read_reports(self.files)
        if self.readme:
            folder = self.readme.resolve().parent
            named = {Path(os.path.relpath(file.resolve(), folder)).as_posix(): r for file, r in reports.items()}
            write_atomic(self.readme, report.update_readme(self.readme.read_text(), report.readme_tables(named)))
            print(f"wrote the tables of {self.readme}")
        if self.out:
            command.write_pages([*reports.values()], self.out)
            print(f"{self.out / 'report.md'} and {self.out / 'report.html'}")
        elif not self.readme:
            shown = [*reports.values()]
            as_json = self.format == "github-action-benchmark"
            print(json.dumps(report.action_entries(shown), indent=1) if as_json else report.markdown(shown))


Shown = Annotated[Show, tyro.conf.subcommand("report")]
Command = Kernels | Train | Quality | Generate | Memory | Static | Gpu | Shown | Compare | Trend


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    cli.run(lambda chosen: chosen.main(), Command, prog="python -m bench", argv=argv)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
