"""Runs laid over each other on one page: losses over steps, tokens and time, a table, and how their options differ."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from model.report import charts
from model.report.charts import NONE, Mark, num
from model.report.history import AXES, History, clock, count
from model.training.flops import parameters

MOST_MARKS = 60  # of a run in a chart
_IMPLIED = ("n_positions", "embd_pdrop", "resid_pdrop", "attn_pdrop")  # of a model: context and dropout say the same


class Figure(NamedTuple):
    """A chart and its caption. by_axis: its drawings over steps, tokens and time."""

    title: str
    by_axis: list[tuple[str, list[Markup]]]


class Row(NamedTuple):
    """A run in the table."""

    name: str
    cells: list[str]
    is_best: bool


def names(folders: Sequence[Path]) -> list[str]:
    """What different runs are called side by side: the end of their paths, as long as tells them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for n in range(1, max(map(len, parts)) + 1):
        found = ["/".join(part[-n:]) for part in parts]
        if len(set(found)) == len(found):
            break
    return found


def _kind(i: int) -> str:
    """The classes of the i-th run: its colour, and its dashes, as nothing is told by colour alone."""
    return f"run{i % 5} dash{i % 4}"


def _key(i: int, name: str) -> Markup:
    """The line and the symbol of the i-th run."""
    canvas = charts.Canvas(name, "its line and its symbol", 34, "key")
    canvas.curve([(1, 7), (33, 7)], f"curve {_kind(i)}")
    canvas.dot(charts.SHAPES[i % 5], 17, 7, f"mark run{i % 5}")
    return Markup(canvas.done(14))


def _figures(runs: list[History]) -> list[Figure]:
    made = [
        _over(runs, "Validation loss, nats per token", "val_loss", wide=True),
        _over(runs, "Training loss, smoothed", "loss", wide=True),
        _over(runs, "Validation loss, second half", "val_loss", half=True),
        _over(runs, "Learning rate", "lr"),
        _over(runs, "Tokens per second", "tok_per_s"),
    ]
    return [figure for figure in made if figure.by_axis]


def _over(runs: list[History], title: str, name: str, *, wide: bool = False, half: bool = False) -> Figure:
    """A column of all runs over each axis. half: only the later half of the longest."""
    by_axis = []
    for axis in AXES:
        label, unit = _axis(axis, max(of.most(axis) or 0.0 for of in runs))
        drawn = [
            of.curve(name, f"curve {_kind(i)}", axis, unit=unit, smooth=name == "loss") for i, of in enumerate(runs)
        ]
        since = max((c.x[-1] for c in drawn if len(c.x)), default=0.0) / 2 if half else 0.0
        zero = name in ("lr", "tok_per_s")
        marks = _marks(runs, name, axis, unit) if name == "val_loss" else []
        if drawings := charts.drawings(title, drawn, x_label=label, marks=marks, since=since, wide=wide, zero=zero):
            by_axis.append((axis, drawings))
    return Figure(title, by_axis)


def _marks(runs: list[History], name: str, axis: str, unit: float) -> list[Mark]:
    marks = []
    for i, of in enumerate(runs):
        for row in of.thinned(name, MOST_MARKS, axis):
            x, y = float(of.columns[axis][row]) / unit, float(of.columns[name][row])
            marks.append(
                Mark(x, y, charts.SHAPES[i % 5], f"mark run{i % 5}", f"{of.name}: {of.describe(row, name)}", 3.0)
            )
    return marks


def _axis(name: str, most: float) -> tuple[str, float]:
    """What stands under an axis that goes to `most`, and what its values are divided by."""
    if name == "step":
        return "steps", 1.0
    if name == "tokens":
        return next(((f"{w} tokens", s) for s, w in ((1e9, "billion"), (1e6, "million")) if most >= s), ("tokens", 1.0))
    units = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
    return next((f"{word} of training", size) for size, word in units if most >= 2 * size or size == 1.0)


def _table(runs: list[History]) -> tuple[list[str], list[Row]]:
    """Head and rows, without the columns in which nothing stands."""
    head = ["best validation loss", "of step", "last validation loss", "training loss, smoothed", "steps", "tokens"]
    head += ["tokens/s, median", "time", "peak MiB", "parameters"]
    rows = [_cells(of) for of in runs]
    keep = [i for i in range(len(head)) if any(cells[i] != NONE for cells in rows)]
    lowest = min((of.best[1] for of in runs if of.best), default=math.nan)
    made = [
        Row(of.name, [cells[i] for i in keep], of.best is not None and of.best[1] == lowest)
        for of, cells in zip(runs, rows, strict=True)
    ]
    return [head[i] for i in keep], made


def _cells(of: History) -> list[str]:
    loss, rates = of.values("loss"), of.values("tok_per_s")
    val, tokens, elapsed, peak = of.last("val_loss"), of.last("tokens"), of.last("elapsed_s"), of.most("peak_mib")
    return [
        f"{of.best[1]:.4f}" if of.best else NONE,
        f"{of.best[0]:,}" if of.best else NONE,
        NONE if val is None else f"{val:.4f}",
        f"{charts.smooth(loss, of.reach)[-1]:.4f}" if len(loss) else NONE,
        f"{of.done:,}" if of.done >= of.steps else f"{of.done:,} of {of.steps:,}",
        NONE if tokens is None else count(tokens),
        num(float(np.median(rates))) if len(rates) else NONE,
        NONE if elapsed is None else clock(elapsed),
        NONE if peak is None else f"{peak:,.0f}",
        f"{parameters(of.model):,}",
    ]


def _differences(runs: list[History]) -> list[tuple[str, list[str]]]:
    """Options, and facts of the model, in which the runs differ: (name, a value a run)."""
    each = [{**{k: v for k, v in of.model.to_dict().items() if k not in _IMPLIED}, **of.options} for of in runs]
    every = dict.fromkeys(name for values in each for name in values)
    found = [(name, [str(values.get(name, NONE)) for values in each]) for name in every]
    return [(name, values) for name, values in found if len(set(values)) > 1]


def html(runs: list[History]) -> str:
    """The page; runs in the order in which they are shown, with names that tell them apart."""
    head, rows = _table(runs)
    return charts.page(
        Path(__file__).with_name("compare.html.jinja"),
        axes=AXES,
        keys=[_key(i, of.name) for i, of in enumerate(runs)],
        figures=_figures(runs),
        head=head,
        rows=rows,
        differences=_differences(runs),
        folders=" ".join(shlex.quote(str(of.folder)) for of in runs),
    )
