"""What a run wrote down, read for those who show it: rows, samples, options.

    history = read(Path("runs/tiny"))
    history.columns["loss"][history.rows("loss")]  # (n,) float64, in the order of the steps

A line that cannot be read, such as one that a crash has cut in two, is left out and counted.
"""

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

from model.cli import UserError
from model.config import GPTConfig
from model.report import charts
from model.report.charts import Curve, num
from model.training.run_folder import CONFIG, METRICS, SAMPLES

# skipped (steps left out) and elapsed_s are counted from the beginning of the run
COLUMNS = (
    "step", "tokens", "loss", "val_loss", "lr", "grad_norm", "step_ms", "tok_per_s", "mfu", "peak_mib", "skipped",
    "elapsed_s",
)  # fmt: skip
AXES = {"step": "steps", "tokens": "tokens", "elapsed_s": "time"}
_LARGEST, _SMALLEST = 1e30, 1e-30  # what lies beyond is no measurement or nothing, and no chart could hold it


@dataclass(frozen=True, eq=False)
class History:
    """What the folder of a run holds.

    name: what it is called on a page. options, model: of config.json. columns: name -> (rows,) float64, NaN where a
    value was not measured or is no number; steps in order. damaged: lines that could not be read. samples: (step, text)
    as they were written. last_row: when the last row was written, in seconds since 1970.
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
        """Steps that the run is to have."""
        return self.options["steps"]

    @property
    def done(self) -> int:
        return int(self.columns["step"][-1]) if len(self) else 0

    def rows(self, name: str, x: str = "step") -> np.ndarray:
        """Indices of the rows that have both values, in the order of x."""
        found = np.flatnonzero(np.isfinite(self.columns[name]) & np.isfinite(self.columns[x]))
        return found[np.argsort(self.columns[x][found], kind="stable")]

    def values(self, name: str) -> np.ndarray:
        """The values of a column that are there, in the order of the steps."""
        return self.columns[name][self.rows(name)]

    def last(self, name: str) -> float | None:
        return float(found[-1]) if len(found := self.values(name)) else None

    def most(self, name: str) -> float | None:
        return float(found.max()) if len(found := self.values(name)) else None

    @cached_property
    def best_row(self) -> int | None:
        """The row of the lowest validation loss, the first of equals."""
        found = self.rows("val_loss")
        return int(found[self.columns["val_loss"][found].argmin()]) if len(found) else None

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and value of the lowest validation loss."""
        row = self.best_row
        return None if row is None else (int(self.columns["step"][row]), float(self.columns["val_loss"][row]))

    @property
    def reach(self) -> int:
        """Neighbours on either side over which the loss is smoothed: the fiftieth part of the curve in all."""
        return min(len(self.rows("loss")) // 100, 500)

    def thinned(self, name: str, most: int, x: str = "step") -> list[int]:
        """At most so many of the rows with both values, spread evenly, the last of them always."""
        found = self.rows(name, x)
        return found[np.unique(np.linspace(len(found) - 1, 0, min(most, len(found))).round().astype(int))].tolist()

    def curve(self, name: str, kind: str, x: str = "step", *, unit: float = 1.0, smooth: bool = False) -> Curve:
        """One column over another, which is divided by `unit`. Of a gradient norm what a logarithm has a place for."""
        found = self.rows(name, x)
        if name == "grad_norm":
            found = found[self.columns[name][found] > 0]
        y = self.columns[name][found]
        return Curve(self.columns[x][found] / unit, charts.smooth(y, self.reach) if smooth else y, kind, self.name)

    def describe(self, row: int, *names: str) -> str:
        """What stands in a row: ``step 1,200, 1.23 million tokens, 12:30, loss 3.2110``."""
        at = {name: float(self.columns[name][row]) for name in (*AXES, *names)}
        return ", ".join(_WORDS[name](value) for name, value in at.items() if math.isfinite(value))


_WORDS = {
    "step": lambda v: f"step {v:,.0f}", "tokens": lambda v: f"{count(v)} tokens", "elapsed_s": lambda v: clock(v),
    "loss": lambda v: f"loss {v:.4f}", "val_loss": lambda v: f"validation loss {v:.4f}",
    "lr": lambda v: f"learning rate {v:.3g}", "grad_norm": lambda v: f"gradient norm {num(v)}",
    "tok_per_s": lambda v: f"{num(v)} tokens/s", "peak_mib": lambda v: f"{num(v)} MiB",
}  # fmt: skip


def clock(seconds: float) -> str:
    """m:ss or h:mm:ss"""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def count(value: float) -> str:
    """A large number in few characters: ``12.3 million``."""
    size, word = next(((s, w) for s, w in ((1e9, " billion"), (1e6, " million")) if value >= s), (1.0, ""))
    return f"{num(value / size) if word else f'{value:,.0f}'}{word}"


def steps(n: float) -> str:
    return f"{n:,.0f} step{'s' if n != 1 else ''}"


def read(folder: Path, name: str | None = None) -> History:
    """Raises UserError where there is no run, where its configuration is damaged, and where it has no metrics."""
    path = folder / CONFIG
    try:
        content = json.loads(path.read_bytes())
        options, model = dict(content["train"]), GPTConfig.from_dict(content["model"])
        if type(options["steps"]) is not int or options["steps"] < 1:
            raise ValueError("steps")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} holds no run: there is no {CONFIG} in it") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} is damaged, or of another version of this project") from None
    path = folder / METRICS
    if not path.exists():
        raise UserError(f"{folder} has no {METRICS}: did the run begin?")
    columns, damaged = _columns(path)
    samples = [
        (int(row["step"]), row["text"])
        for row in _lines(folder / SAMPLES)
        if row is not None and isinstance(row.get("text"), str) and _number(row.get("step")) >= 0
    ]
    last_row = path.stat().st_mtime
    return History(folder, name or folder.resolve().name, options, model, columns, damaged, samples, last_row)


def _columns(path: Path) -> tuple[dict[str, np.ndarray], int]:
    """The rows of metrics.jsonl by column, and the number of lines that are none.

    A row after which the steps begin again at a lower one belongs to a past that was given up, and is left out.
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
    """The rows of a JSONL file, None for a line that is none; nothing where there is no file."""
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
