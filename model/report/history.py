"""The metrics, samples and options that a run has written. A line that a crash has cut is skipped and counted."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from model.cli import UserError, clock
from model.config import GPTConfig
from model.report import charts
from model.report.charts import Curve, num
from model.training.run_folder import CONFIG, METRICS, SAMPLES

# skipped (steps) and elapsed_s are counted from the beginning of the run; reached: the --until-loss that ended it there
COLUMNS = (
    "step", "tokens", "loss", "val_loss", "lr", "grad_norm", "step_ms", "tok_per_s", "mfu", "peak_mib", "skipped",
    "reached", "elapsed_s",
)  # fmt: skip
AXES = {"step": "steps", "tokens": "tokens", "elapsed_s": "time"}
LARGE = {"billion": 1e9, "million": 1e6}
_LARGEST, _SMALLEST = 1e30, 1e-30  # magnitudes beyond are invalid, or count as 0: a chart could not hold them


@dataclass(frozen=True, eq=False)
class History:
    """The content of a run folder.

    columns: name -> (rows,) float64, ordered by step, NaN for missing values. damaged: number of unreadable lines.
    samples: (step, text), in the order written. last_row: when the last row was written, seconds since 1970.
    """

    folder: Path
    name: str
    options: dict[str, Any]
    model: GPTConfig
    columns: dict[str, np.ndarray]
    damaged: int
    samples: list[tuple[int, str]]
    last_row: float

    def __len__(self) -> int:
        return len(self.columns["step"])

    @property
    def steps(self) -> int:
        """The number of steps the run will have; an estimate, as long as --minutes has not set it."""
        if steps := self.options["steps"]:
            return steps
        pace = self.done / (self.last("elapsed_s") or math.inf)
        return max(self.done + 1, round(pace * 60 * self.options["minutes"]))

    @property
    def done(self) -> int:
        return int(self.columns["step"][-1]) if len(self) else 0

    @property
    def at_goal(self) -> bool:
        """Whether the run has ended at --until-loss."""
        rows, goal = self.rows("val_loss"), _number(self.options.get("until_loss"))
        if not len(rows) or self.columns["step"][rows[-1]] < self.done:
            return False
        return bool(goal > 0 and self.columns["val_loss"][rows[-1]] <= goal)

    @property
    def is_finished(self) -> bool:
        return self.done >= self.steps or self.at_goal

    def rows(self, name: str, x: str = "step") -> np.ndarray:
        """Indices of the rows that have both values, in the order of x."""
        rows = np.flatnonzero(np.isfinite(self.columns[name]) & np.isfinite(self.columns[x]))
        return rows[np.argsort(self.columns[x][rows], kind="stable")]

    def values(self, name: str) -> np.ndarray:
        """The values of a column without the missing ones, ordered by step."""
        return self.columns[name][self.rows(name)]

    def last(self, name: str) -> float | None:
        return float(values[-1]) if len(values := self.values(name)) else None

    def most(self, name: str) -> float | None:
        return float(values.max()) if len(values := self.values(name)) else None

    @cached_property
    def best_row(self) -> int | None:
        """The row of the lowest validation loss, the first of equals."""
        rows = self.rows("val_loss")
        return int(rows[self.columns["val_loss"][rows].argmin()]) if len(rows) else None

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and value of the lowest validation loss."""
        row = self.best_row
        return None if row is None else (int(self.columns["step"][row]), float(self.columns["val_loss"][row]))

    def seconds_to(self, loss: float) -> float | None:
        """Seconds of training up to the first validation loss of at most `loss`."""
        rows = self.rows("val_loss", "elapsed_s")
        rows = rows[self.columns["val_loss"][rows] <= loss]
        return float(self.columns["elapsed_s"][rows[0]]) if len(rows) else None

    @property
    def reach(self) -> int:
        """Neighbours on either side that smoothing averages over: in all a fiftieth of the curve."""
        return min(len(self.rows("loss")) // 100, 500)

    def thinned(self, name: str, most: int, x: str = "step") -> list[int]:
        """At most `most` of the rows with both values, evenly spread and including the last."""
        rows = self.rows(name, x)
        return rows[np.unique(np.linspace(len(rows) - 1, 0, min(most, len(rows))).round().astype(int))].tolist()

    def curve(self, name: str, kind: str, x: str = "step", *, unit: float = 1.0, smooth: bool = False) -> Curve:
        """One column over another, which is divided by `unit`; gradient norms of 0 are skipped."""
        rows = self.rows(name, x)
        if name == "grad_norm":
            rows = rows[self.columns[name][rows] > 0]
        y = self.columns[name][rows]
        return Curve(self.columns[x][rows] / unit, charts.smooth(y, self.reach) if smooth else y, kind, self.name)

    def describe(self, row: int, *names: str) -> str:
        """The values of a row: ``step 1,200, 1.23 million tokens, 12:30, loss 3.2110``."""
        at = {name: float(self.columns[name][row]) for name in (*AXES, *names)}
        return ", ".join(_WORDS[name](value) for name, value in at.items() if math.isfinite(value))


_WORDS = {
    "step": lambda v: f"step {v:,.0f}", "tokens": lambda v: f"{abbreviate(v)} tokens", "elapsed_s": lambda v: clock(v),
    "loss": lambda v: f"loss {v:.4f}", "val_loss": lambda v: f"validation loss {v:.4f}",
    "lr": lambda v: f"learning rate {v:.3g}", "grad_norm": lambda v: f"gradient norm {num(v)}",
    "tok_per_s": lambda v: f"{num(v)} tokens/s", "peak_mib": lambda v: f"{num(v)} MiB",
}  # fmt: skip


def abbreviate(value: float) -> str:
    """``12.3 million``; below a million, all digits."""
    word, size = next(((w, s) for w, s in LARGE.items() if value >= s), ("", 1.0))
    return f"{num(value / size)} {word}" if word else f"{value:,.0f}"


def plural(n: float, word: str) -> str:
    return f"{n:,.0f} {word}{'s' if n != 1 else ''}"


def read(folder: Path, name: str | None = None) -> History:
    """Read a run folder. Raises UserError where there is no run, its configuration is damaged, or it has no metrics."""
    path = folder / CONFIG
    try:
        content = json.loads(path.read_bytes())
        options, model = dict(content["train"]), GPTConfig.from_dict(content["model"])
        if type(options["steps"]) is not int or options["steps"] < (0 if _number(options.get("minutes")) > 0 else 1):
            raise ValueError("steps")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} holds no run: there is no {CONFIG} in it") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} is damaged, or of another version of this project") from None
    path = folder / METRICS
    if not path.exists():
        raise UserError(f"{folder} has no {METRICS}: did the run begin?")
    columns, damaged = _columns(path)
    rows = [row for row in _lines(folder / SAMPLES) if row and _number(row.get("step")) >= 0]
    samples = [(int(row["step"]), row["text"]) for row in rows if isinstance(row.get("text"), str)]
    last_row = path.stat().st_mtime
    return History(folder, name or folder.resolve().name, options, model, columns, damaged, samples, last_row)


def _columns(path: Path) -> tuple[dict[str, np.ndarray], int]:
    """The rows of metrics.jsonl by column, and the number of damaged lines.

    A row that a later one with a lower step supersedes, as after a resume from an earlier checkpoint, is skipped.
    """
    values, damaged = array("d"), 0
    for row in _lines(path):
        numbers = [math.nan] if row is None else [_number(row.get(name)) for name in COLUMNS]
        if numbers[0] >= 0:
            values.extend(numbers)
        else:
            damaged += 1
    table = np.array(values).reshape(-1, len(COLUMNS))
    lowest_to_come = np.minimum.accumulate(table[::-1, 0])[::-1]
    return dict(zip(COLUMNS, table[table[:, 0] <= lowest_to_come].T.copy(), strict=True)), damaged


def _lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """The rows of a JSONL file, None for a damaged line; nothing if there is no file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield row if isinstance(row, dict) else None


def _number(value: object) -> float:
    if not isinstance(value, (int, float)) or not abs(value) < _LARGEST:
        return math.nan
    return float(value) if abs(value) > _SMALLEST else 0.0
