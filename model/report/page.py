"""What became of a run, as a page to look at while it trains and afterwards.

    python -m model.report runs/tiny                   # writes runs/tiny/report.html
    python -m model.report runs/tiny runs/tiny-2       # lays runs over each other: runs/compare.html

The page needs nothing else, no network and no other file. It is made of config.json, metrics.jsonl, samples.jsonl and
sample.txt of the run.
"""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from model.cli import UserError
from model.evaluate import perplexity
from model.report import charts
from model.report.charts import Mark, num
from model.report.history import History, clock, read, steps
from model.training import options
from model.training.flops import parameters
from model.training.run_folder import METRICS

PAGE, SAMPLE = "report.html", "sample.txt"  # in the folder of a run
RELOAD_S = 30
PATIENCE_S = 300.0
MOST_BANDS, MOST_VALIDATIONS, MOST_SKIPPED, MOST_SAMPLES = 60, 200, 200, 40


class Figure(NamedTuple):
    """A chart and its caption. drawings: of one chart, for screens of different widths."""

    title: str
    drawings: list[Markup]


# --- charts ----------------------------------------------------------------------------------------------------------


def _figures(of: History) -> list[Figure]:
    """What there is to draw: the loss, its second half, and each of the other columns that has a value."""
    loss = [of.curve("loss", "curve raw"), of.curve("loss", "curve smooth", smooth=True)]
    loss.append(of.curve("val_loss", "curve between"))
    skipped = _skipped(of)
    more: dict[str, Any] = {"x_label": "steps", "marks": [*_validations(of), *skipped], "bands": _bands(of, "loss")}
    made = [Figure("Loss, nats per token", charts.drawings("Loss", loss, wide=True, **more))]
    if len(of.rows("loss")) >= 20:
        half = charts.drawings("Loss, second half", loss, since=of.done / 2, **more)
        made.append(Figure("Loss, second half of the steps so far", half))
    for name, title in (("lr", "Learning rate"), ("tok_per_s", "Tokens per second"), ("peak_mib", "Peak memory, MiB")):
        drawings = charts.drawings(
            title, [of.curve(name, "curve line")], x_label="steps", bands=_bands(of, name), zero=True
        )
        made.append(Figure(title, drawings))
    norm = [of.curve("grad_norm", "curve line")]
    more = {"x_label": "steps", "marks": skipped, "bands": _bands(of, "grad_norm"), "log": True}
    made.insert(
        -2, Figure("Gradient norm before clipping, logarithmic", charts.drawings("Gradient norm", norm, **more))
    )
    return [figure for figure in made if figure.drawings]


def _bands(of: History, name: str) -> list[tuple[float, str]]:
    return [(float(of.columns["step"][row]), of.describe(row, name)) for row in of.thinned(name, MOST_BANDS)]


def _validations(of: History) -> list[Mark]:
    """A dot a measurement, and a ring for the best, which may not be among those that are shown."""
    shown = [(row, "mark validation", "", 2.5) for row in of.thinned("val_loss", MOST_VALIDATIONS)]
    shown += [] if of.best_row is None else [(of.best_row, "mark best", "lowest: ", 5.5)]
    at = of.columns
    return [
        Mark(float(at["step"][row]), float(at["val_loss"][row]), "circle", kind, word + of.describe(row, "val_loss"), r)
        for row, kind, word, r in shown
    ]


def _skipped(of: History) -> list[Mark]:
    """A mark where the count of skipped steps grows, of neighbours that would cover each other only one."""
    found = of.rows("skipped")
    more = np.diff(of.columns["skipped"][found], prepend=0.0)
    marks: dict[int, Mark] = {}
    for row, n in zip(found[more > 0].tolist(), more[more > 0].tolist(), strict=True):
        step = float(of.columns["step"][row])
        words = f"{steps(n)} skipped up to {of.describe(row, 'loss', 'grad_norm')}"
        marks.setdefault(int(step * MOST_SKIPPED / max(of.done, 1)), Mark(step, None, "down", "mark skipped", words))
    return list(marks.values())


# --- words -----------------------------------------------------------------------------------------------------------


def _glance(of: History) -> list[tuple[str, str]]:
    """The few figures that a reader looks for first: (figure, what it is)."""
    found = [(f"{of.done:,}", f"of {steps(of.steps)} done, {100 * of.done // of.steps} %")]
    if (loss := of.last("loss")) is not None:
        found.append((f"{loss:.4f}", f"loss now; smoothed {charts.smooth(of.values('loss'), of.reach)[-1]:.4f}"))
    if of.best is not None:
        step, best = of.best
        found.append(
            (f"{best:.4f}", f"best validation loss, of step {step:,}; a perplexity of {num(perplexity(best))}")
        )
    if (rate := of.last("tok_per_s")) is not None:
        found.append((num(rate), "tokens/s"))
    if (mfu := of.last("mfu")) is not None:
        found.append((f"{100 * mfu:.1f} %", "MFU, of the peak of the device"))
    if (peak := of.most("peak_mib")) is not None:
        found.append((f"{peak:,.0f} MiB", "peak memory"))
    if (elapsed := of.last("elapsed_s")) is not None:
        found.append((clock(elapsed), "of training"))
    if (eta := _eta_s(of)) is not None:
        found.append((clock(eta), f"to go, for {steps(of.steps - of.done)}"))
    if skipped := of.last("skipped"):
        found.append((f"{skipped:,.0f}", f"step{'s' if skipped != 1 else ''} skipped"))
    return found


def _eta_s(of: History) -> float | None:
    """Seconds to the last step at the pace of the last tenth of the rows, evaluations and checkpoints included."""
    if of.done >= of.steps:
        return None
    found = of.rows("elapsed_s")
    if len(found) > 1:
        ends = found[[-max(2, len(found) // 10), -1]]
        done, seconds = (float(np.diff(of.columns[name][ends])[0]) for name in ("step", "elapsed_s"))
        if done > 0 and seconds > 0:
            return (of.steps - of.done) * seconds / done
    step_ms = of.last("step_ms")
    return None if step_ms is None else (of.steps - of.done) * step_ms / 1e3


def _patience_s(of: History) -> float:
    """The age of the last row at which a run that is not finished counts as stopped.

    The page is written with each measurement, so while the run goes on it may be as old as the time between two.
    """
    step_ms, every = of.last("step_ms"), of.options.get("eval_every")
    apart = every * step_ms / 1e3 if step_ms and isinstance(every, int) else 0.0
    measured = of.columns["elapsed_s"][of.rows("val_loss", "elapsed_s")][-2:]
    return max(PATIENCE_S, 2 * apart, *(2 * np.diff(measured)).tolist())


def _state(of: History, now: float) -> tuple[str, str]:
    """("running" | "stopped" | "finished", a sentence)."""
    if of.done >= of.steps:
        return "finished", f"Finished, all {steps(of.steps)}."
    if now - of.last_row > _patience_s(of):
        at = time.strftime("%Y-%m-%d %H:%M", time.localtime(of.last_row))
        return "stopped", f"Stopped at step {of.done:,} of {of.steps:,}: no new row since {at}."
    where = f"at step {of.done:,} of {of.steps:,}" if len(of) else "no row of metrics yet"
    return "running", f"Running, {where}. This page loads itself again every {RELOAD_S} seconds."


def _commands(of: History) -> list[tuple[str, str]]:
    """How to go on: (what for, command)."""
    folder = shlex.quote(str(of.folder))
    finished = of.done >= of.steps
    go_on = f"python train.py --resume {folder}" + (f" --steps {2 * of.steps}" if finished else "")
    return [
        ("more steps" if finished else "go on after a stop", go_on),
        ("text by the best weights", f"python -m model.generate {folder}"),
        ("their loss on all of the validation text", f"python -m model.evaluate {folder}"),
        ("beside another run", f"python -m model.report {folder} OTHER"),
    ]


def _notes(of: History) -> list[str]:
    """What a reader must know about the data of the page."""
    found = []
    if of.damaged:
        found.append(f"{of.damaged:,} line{'s' if of.damaged != 1 else ''} of {METRICS} could not be read: left out.")
    no_loss = np.isfinite(of.columns["lr"]) & ~np.isfinite(of.columns["loss"])
    if no_loss.any():
        first = of.columns["step"][no_loss][0]
        rows = f"{no_loss.sum():,} row{'s' if no_loss.sum() != 1 else ''}"
        found.append(f"{rows} of {METRICS} without a finite loss, first at step {first:,.0f}: left out of the curve.")
    return found


def _samples(of: History) -> tuple[list[tuple[str, str]], int]:
    """(heading, text), the newest first, evenly spread if there are many; and how many were left out."""
    keep = np.unique(np.linspace(0, len(of.samples) - 1, min(MOST_SAMPLES, len(of.samples))).round().astype(int))
    chosen = [(f"step {of.samples[i][0]:,}", of.samples[i][1]) for i in reversed(keep)]
    if (final := of.folder / SAMPLE).exists():
        chosen.insert(0, ("at the end", final.read_text(encoding="utf-8", errors="replace").strip()))
    return chosen, len(of.samples) - len(keep)


def _options(of: History) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(name, value) of what differs from the preset, if that can be told, and of the rest."""
    try:
        preset = options.run_options(options.preset(str(of.options.get("preset"))))
    except (UserError, OSError):  # a file of the user's own that has gone
        preset = {}
    changed, rest = [], []
    for option, value in of.options.items():
        if option in preset and preset[option] != value:
            changed.append((option, f"{value} (preset: {preset[option]})"))
        else:
            rest.append((option, str(value)))
    return changed, [*rest, *((f"model: {key}", str(value)) for key, value in of.model.to_dict().items())]


# --- the page and the command ----------------------------------------------------------------------------------------


def html(of: History, now: float) -> str:
    """The page of a run. now: seconds since 1970, for the age of its last row."""
    state, words = _state(of, now)
    samples, left_out = _samples(of)
    changed, rest = _options(of)
    return charts.page(
        Path(__file__).with_name("report.html.jinja"),
        name=of.name,
        state=state,
        words=words,
        about=f"{parameters(of.model):,} parameters, preset {of.options.get('preset', 'unknown')}",
        last_row_ms=round(of.last_row * 1e3),
        patience_ms=round(_patience_s(of) * 1e3),
        reload_ms=RELOAD_S * 1000,
        glance=_glance(of) if len(of) else [],
        figures=_figures(of),
        notes=_notes(of),
        samples=samples,
        left_out=left_out,
        changed=changed,
        rest=rest,
        commands=_commands(of),
    )


def write(run: Path) -> Path:
    """Write run/report.html whole, or leave the old one. Damaged rows are left out.

    Raises UserError where the folder holds no run or no metrics, OSError where it cannot be written to.
    """
    return write_page(run / PAGE, html(read(run), time.time()))


def write_page(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # the trainer and a user may write at the same time
    try:
        temporary.write_bytes(text.encode("utf-8", "replace"))  # a sample may hold half of a surrogate pair
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
