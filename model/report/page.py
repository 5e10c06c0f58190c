"""The page of a run: curves, samples and options, in one file that needs no network.

python -m model.report runs/first-run            # writes runs/first-run/report.html
python -m model.report runs/first-run runs/big   # compares runs: runs/compare.html
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

import numpy as np

from model.cli import UserError, clock
from model.evaluate import perplexity
from model.files import write_atomic
from model.report import charts
from model.report.charts import Key, Mark, num
from model.report.history import History, abbreviate, plural, read
from model.report.pages import Figure, figure, page
from model.training import options
from model.training.flops import parameters
from model.training.run_folder import METRICS, resume_command

PAGE, EXPLORE, SAMPLE = "report.html", "explore.html", "sample.txt"  # in the folder of a run
_GOAL = ("reached", "step", "tokens", "elapsed_s")  # of the row that has reached --until-loss
MOST_BANDS, MOST_VALIDATIONS, MOST_SKIPPED, MOST_SAMPLES = 60, 200, 200, 40


def _loss(run: History) -> tuple[list[charts.Curve], dict[str, Any]]:
    """Training and validation loss over the steps: arguments of `charts.curves`."""
    drawn = [run.curve("loss", "curve raw"), run.curve("loss", "curve smooth", smooth=True)]
    drawn.append(run.curve("val_loss", "curve between"))
    skipped = _skipped(run)
    keys = [Key("training", curve="raw"), Key("training, smoothed", curve="smooth")]
    if run.best:
        keys += [Key("validation", "circle", "mark validation", "between"), Key("lowest", "circle", "mark best")]
    keys += [Key("skipped steps", "down", "mark skipped")] if skipped else []
    marks = [*_validations(run), *skipped]
    return drawn, {"x_label": "steps", "marks": marks, "keys": keys, "bands": _bands(run, "loss")}


def _figures(run: History) -> list[Figure]:
    """The loss, its second half, and each other column that has a value."""
    loss, style = _loss(run)
    figures = [figure("Loss", loss, caption="Loss, nats per token", wide=True, **style)]
    if len(run.rows("loss")) >= 20:
        late = style | {"since": run.done / 2, "keys": ()}
        figures.append(figure("Loss, second half", loss, caption="Loss, second half of the steps so far", **late))
    norm = {"caption": "Gradient norm before clipping, logarithmic", "marks": _skipped(run), "log": True}
    titles = {"lr": "Learning rate", "grad_norm": "Gradient norm", "tok_per_s": "Tokens per second"}
    for name, title in (titles | {"peak_mib": "Peak memory, MiB"}).items():
        style = norm if name == "grad_norm" else {"zero": True}
        drawn = [run.curve(name, "curve line")]
        figures.append(figure(title, drawn, x_label="steps", bands=_bands(run, name), **style))
    return [figure for figure in figures if figure.svg]


def _bands(run: History, name: str) -> list[tuple[float, str]]:
    return [(float(run.columns["step"][row]), run.describe(row, name)) for row in run.thinned(name, MOST_BANDS)]


def _validations(run: History) -> list[Mark]:
    """A dot for each measurement, and a ring around the best, which thinning may have dropped."""
    rows = [(row, "mark validation", "", 2.5) for row in run.thinned("val_loss", MOST_VALIDATIONS)]
    rows += [] if run.best_row is None else [(run.best_row, "mark best", "lowest: ", 5.5)]
    x, y = run.columns["step"].tolist(), run.columns["val_loss"].tolist()
    return [Mark(x[i], y[i], "circle", kind, word + run.describe(i, "val_loss"), r) for i, kind, word, r in rows]


def _skipped(run: History) -> list[Mark]:
    """A mark where the number of skipped steps grows; of marks that would overlap only the first."""
    rows = run.rows("skipped")
    growth = np.diff(run.columns["skipped"][rows], prepend=0.0)
    marks: dict[int, Mark] = {}
    for row, n in zip(rows[growth > 0].tolist(), growth[growth > 0].tolist(), strict=True):
        step = float(run.columns["step"][row])
        tip = f"{plural(n, 'step')} skipped up to {run.describe(row, 'loss', 'grad_norm')}"
        marks.setdefault(int(step * MOST_SKIPPED / max(run.done, 1)), Mark(step, None, "down", "mark skipped", tip))
    return list(marks.values())


def _highlights(run: History) -> list[tuple[str, str]]:
    """The main figures: (value, meaning)."""
    if not len(run):
        return []
    highlights = [(f"{run.done:,}", f"of {plural(run.steps, 'step')} done, {100 * run.done // run.steps} %")]
    if (loss := run.last("loss")) is not None:
        highlights.append((f"{loss:.4f}", f"loss now; smoothed {charts.smooth(run.values('loss'), run.reach)[-1]:.4f}"))
    if run.best is not None:
        step, best = run.best
        words = f"best validation loss, at step {step:,}; perplexity {num(perplexity(best))}"
        highlights.append((f"{best:.4f}", words))
    for row in run.rows("reached", "elapsed_s").tolist():
        goal, at, tokens, seconds = (float(run.columns[name][row]) for name in _GOAL)
        words = f"to a validation loss of {goal:g}, at step {at:,.0f}, on {abbreviate(tokens)} tokens"
        highlights.append((clock(seconds), words))
    skipped = run.last("skipped")
    for value, show, meaning in (
        (run.last("tok_per_s"), num, "tokens/s"),
        (run.last("mfu"), "{:.1%}".format, "MFU, of the peak of the device"),
        (run.most("peak_mib"), "{:,.0f} MiB".format, "peak memory"),
        (run.last("elapsed_s"), clock, "of training"),
        (_eta_s(run), clock, f"to go, for {plural(run.steps - run.done, 'step')}"),
        (skipped or None, "{:,.0f}".format, f"step{'s' if skipped != 1 else ''} skipped"),
    ):
        if value is not None:
            highlights.append((show(value).replace("%", " %"), meaning))
    return highlights


def _eta_s(run: History) -> float | None:
    """Seconds to the last step at the pace of the last tenth of the rows, evaluations and checkpoints included."""
    if run.is_finished:
        return None
    rows = run.rows("elapsed_s")
    if len(rows) > 1:
        ends = rows[[-max(2, len(rows) // 10), -1]]
        done, seconds = (float(np.diff(run.columns[name][ends])[0]) for name in ("step", "elapsed_s"))
        if done > 0 and seconds > 0:
            return (run.steps - run.done) * seconds / done
    step_ms = run.last("step_ms")
    return None if step_ms is None else (run.steps - run.done) * step_ms / 1e3


def _progress(run: History) -> str:
    at = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.last_row))
    step = f"{'finished, ' if run.is_finished else ''}step {run.done:,} of {run.steps:,}"
    return f"As of {at}: {step if len(run) else 'no metrics yet'}."


def _commands(run: History) -> list[tuple[str, str]]:
    """What can be done next: (purpose, command)."""
    folder, page_file = shlex.quote(str(run.folder)), shlex.quote(str(run.folder / EXPLORE))
    more = " --until-loss 0" * run.at_goal + f" --steps {2 * run.steps}" * (run.done >= run.steps)
    return [
        ("train longer" if more else "resume after a stop", resume_command(run.folder) + more),
        ("generate text with the best weights", f"python -m model.generate {folder}"),
        ("run them in a browser, and look inside", f"python -m model.explore {folder} {page_file}"),
        ("evaluate them on all of the validation text", f"python -m model.evaluate {folder}"),
        ("compare with another run", f"python -m model.report {folder} OTHER"),
    ]


def _notes(run: History) -> list[str]:
    """Warnings about the data of the page."""
    notes = [f"{plural(run.damaged, 'line')} of {METRICS} could not be read: skipped."] if run.damaged else []
    steps = run.columns["step"][np.isfinite(run.columns["lr"]) & ~np.isfinite(run.columns["loss"])]
    if len(steps):
        rows = f"{plural(len(steps), 'row')} of {METRICS} without a finite loss"
        notes.append(f"{rows}, first at step {steps[0]:,.0f}: not in the curve.")
    return notes


def _samples(run: History) -> tuple[list[tuple[str, str]], int]:
    """(heading, text), newest first, evenly spread if there are many; and how many were skipped."""
    keep = np.unique(np.linspace(0, len(run.samples) - 1, min(MOST_SAMPLES, len(run.samples))).round().astype(int))
    shown = [(f"step {run.samples[i][0]:,}", run.samples[i][1]) for i in reversed(keep)]
    if (final := run.folder / SAMPLE).exists():
        shown.insert(0, ("at the end", final.read_text(encoding="utf-8", errors="replace").strip()))
    return shown, len(run.samples) - len(keep)


def _options(run: History) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(name, value) of the options that differ from the preset, if it is known, and of the others."""
    try:
        preset = options.preset(str(run.options.get("preset"))).run_options()
    except (UserError, OSError):  # the user's own file, and it is gone
        preset = {}
    differs = {option: preset[option] for option, value in run.options.items() if preset.get(option, value) != value}
    changed = [(option, f"{run.options[option]} (preset: {default})") for option, default in differs.items()]
    rest = [(option, str(value)) for option, value in run.options.items() if option not in differs]
    return changed, [*rest, *((f"model: {key}", str(value)) for key, value in run.model.to_dict().items())]


def html(run: History) -> str:
    """The page of a run."""
    samples, samples_skipped = _samples(run)
    changed, rest = _options(run)
    return page(
        Path(__file__).with_name("report.html.jinja"), name=run.name, progress=_progress(run), figures=_figures(run),
        about=f"{parameters(run.model):,} parameters, preset {run.options.get('preset', 'unknown')}",
        highlights=_highlights(run), notes=_notes(run), samples=samples, samples_skipped=samples_skipped,
        changed=changed, rest=rest, commands=_commands(run), explore=EXPLORE if (run.folder / EXPLORE).exists() else "",
    )  # fmt: skip


def svg(run: History) -> str:
    """Training and validation loss as an SVG file; empty if there are none."""
    drawn, style = _loss(run)
    return charts.curves(f"Loss of {run.name}, nats per token", drawn, width=charts.PICTURE, **style)


def write(run: Path) -> Path:
    """Write run/report.html atomically. UserError where the folder holds no run or no metrics."""
    path = run / PAGE
    write_atomic(path, html(read(run)))
    return path
