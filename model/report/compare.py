"""Several runs compared on one page: losses over steps, tokens and time, a table, and their different options."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from model.cli import clock
from model.report import charts
from model.report.charts import NONE, SHAPES, Curve, Key, Mark
from model.report.history import AXES, LARGE, History, abbreviate
from model.report.pages import Cell, Figure, Table, cell, figure, page, table
from model.training.flops import parameters

MOST_MARKS = 60  # of a run in a chart
_IMPLIED = ("n_positions", "embd_pdrop", "resid_pdrop", "attn_pdrop")  # by the context and the dropout of the run


def names(folders: Sequence[Path]) -> list[str]:
    """Names of different runs: the shortest ends of their paths that are unique."""
    parts = [folder.resolve().parts for folder in folders]
    ends = (["/".join(part[-n:]) for part in parts] for n in count(1))
    return next(names for names in ends if len(set(names)) == len(names))


def _key(i: int, run: History) -> Key:
    """Colour, dashes and symbol of the i-th run: colour alone would not do for all readers."""
    return Key(run.name, SHAPES[i % 5], f"mark run{i % 5}", f"run{i % 5} dash{i % 4}")


def _name(i: int, run: History) -> Markup:
    canvas = charts.Canvas(run.name, "its line and its symbol", 34, "key")
    canvas.key(_key(i, run), 1, 7)
    return Markup(canvas.done(14)) + run.name


def _figures(runs: list[History]) -> list[Figure]:
    figures = [
        _by_axis(runs, "Validation loss, nats per token", "val_loss", wide=True),
        _by_axis(runs, "Training loss, smoothed", "loss", wide=True),
        _by_axis(runs, "Validation loss, second half", "val_loss", half=True),
        _by_axis(runs, "Learning rate", "lr", zero=True),
        _by_axis(runs, "Tokens per second", "tok_per_s", zero=True),
    ]
    return [figure for figure in figures if figure.svg]


def _by_axis(runs: list[History], title: str, name: str, *, half: bool = False, **more: Any) -> Figure:
    """A column of all runs, drawn over each axis; the page shows one. half: the later half of the longest run."""
    drawings = []
    for axis in AXES:
        drawn, style = over(runs, name, axis)
        since = max((c.x[-1] for c in drawn if len(c.x)), default=0.0) / 2 if half else 0.0
        if svg := figure(title, drawn, since=since, **style, **more).svg:
            drawings.append(Markup('<div class="over over-{}">{}</div>').format(axis, svg))
    return Figure(title, Markup("").join(drawings), wide="wide" in more)


def over(runs: list[History], name: str, axis: str = "step") -> tuple[list[Curve], dict[str, Any]]:
    """A column of all runs over an axis: arguments of `charts.curves`."""
    label, unit = _axis(axis, max(run.most(axis) or 0.0 for run in runs))
    drawn, marks = [], []
    for i, run in enumerate(runs):
        key = _key(i, run)
        drawn.append(run.curve(name, f"curve {key.curve}", axis, unit=unit, smooth=name == "loss"))
        for row in run.thinned(name, MOST_MARKS, axis) if name == "val_loss" else ():
            x, y = float(run.columns[axis][row]) / unit, float(run.columns[name][row])
            marks.append(Mark(x, y, key.shape, key.kind, f"{run.name}: {run.describe(row, name)}", 3.0))
    return drawn, {"x_label": label, "marks": marks}


def _axis(name: str, most: float) -> tuple[str, float]:
    """The label and the unit of an axis up to `most`."""
    if name == "step":
        return "steps", 1.0
    if name == "tokens":
        return next(((f"{word} tokens", size) for word, size in LARGE.items() if most >= size), ("tokens", 1.0))
    units = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
    return next((f"{word} of training", size) for size, word in units if most >= 2 * size or size == 1.0)


def _results(runs: list[History]) -> Table:
    """The results of each run; the lowest validation loss is marked."""
    lowest, common = min((run.best[1] for run in runs if run.best), default=math.nan), _common_loss(runs)
    loss, integer = "{:.4f}".format, "{:,.0f}".format
    rows = []
    for i, run in enumerate(runs):
        losses, rates = run.values("loss"), run.values("tok_per_s")
        step, best = run.best or (None, None)
        mark, tip = ("win", "the lowest of all") if best == lowest else ("", "")
        rows.append({
            "run": Cell(_name(i, run)),
            "best validation loss": replace(cell(best, loss), mark=mark, tip=tip),
            "of step": cell(step, integer),
            "last validation loss": cell(run.last("val_loss"), loss),
            "training loss, smoothed": cell(charts.smooth(losses, run.reach)[-1] if len(losses) else None, loss),
            "steps": Cell(f"{run.done:,}" + (f" of {run.steps:,}" if run.done < run.steps else ""), run.done),
            "tokens": cell(run.last("tokens"), abbreviate),
            f"time to {common:.2f}": cell(run.seconds_to(common), clock),
            "tokens/s, median": cell(float(np.median(rates)) if len(rates) else None),
            "time": cell(run.last("elapsed_s"), clock),
            "peak MiB": cell(run.most("peak_mib"), integer),
            "parameters": cell(parameters(run.model), integer),
        })  # fmt: skip
    return table("Runs", {head: [row[head] for row in rows] for head in rows[0]})


def _common_loss(runs: list[History]) -> float:
    """The lowest validation loss, in hundredths, that every run has reached; NaN if the losses are not comparable."""
    comparable = len(runs) > 1 and all(run.best for run in runs) and len({run.model.vocab_size for run in runs}) == 1
    return math.ceil(100 * max(run.best[1] for run in runs if run.best)) / 100 if comparable else math.nan


def _differences(runs: list[History]) -> Table:
    """Options of the run and of the model in which the runs differ."""
    each = [{**{k: v for k, v in run.model.to_dict().items() if k not in _IMPLIED}, **run.options} for run in runs]
    rows = []
    for name in dict.fromkeys(name for values in each for name in values):
        row = [str(values.get(name, NONE)) for values in each]
        if len(set(row)) > 1:
            rows.append(tuple(Cell(text) for text in (name, *row)))
    return Table("Different options", ["option", *(run.name for run in runs)], rows, len(runs) + 1)


def html(runs: list[History]) -> str:
    """The page; runs in display order, with unique names."""
    return page(
        Path(__file__).with_name("compare.html.jinja"), axes=AXES, names=[_name(i, run) for i, run in enumerate(runs)],
        figures=_figures(runs), results=_results(runs), differences=_differences(runs),
        folders=" ".join(shlex.quote(str(run.folder)) for run in runs),
    )  # fmt: skip


def svg(runs: list[History]) -> str:
    """The validation losses as an SVG file; empty if there are none."""
    drawn, style = over(runs, "val_loss")
    keys = [_key(i, run) for i, run in enumerate(runs)]
    return charts.curves("Validation loss, nats per token", drawn, keys=keys, width=charts.PICTURE, **style)
