"""Reports of two versions on one device: what got slower, faster or needs more memory, beyond the noise.

    ratio = median(B) / median(A)       of the times, and again of the times over the control's in the same round

Each median has a distribution-free interval from its order statistics (the binomial one: David and Nagaraja, "Order
Statistics", 2003, section 7.1). A row has changed where both ratios' whole intervals lie beyond the threshold and the
ratio exceeds the largest change of the control, which never changes, in any group. As two processes differ by more than
their samples show, a side may be several runs: an interval then reaches from the lowest to the highest of them.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from bench import command
from bench import report as pages
from bench.record import CONTROL, Report, Row, read_reports
from model.cli import UserError
from model.report.pages import Cell, Table

Reports = Sequence[Report]  # the runs of a side
Key = tuple[str, str, str]
Verdict = Literal["slower", "faster", "same", "unclear"]
CONFIDENCE = 0.99  # of one median's interval
FATTER = 0.01  # memory is counted, not sampled: a hundredth is a change
_FATTER_MIB = 1.0


@dataclass(frozen=True)
class Compare:
    """What got slower, faster or fatter from one report to another. Exit code 1 if anything is worse."""

    a: tyro.conf.Positional[Path]  # The report before, or a folder of several runs.
    b: tyro.conf.Positional[Path]  # The report after, or a folder of several runs.
    threshold: float = 5.0  # Smallest change of time that counts, in percent.
    provider: tuple[str, ...] = ()  # Only these; all of them by default.
    across_devices: bool = False  # Compare reports of different devices too.
    format: Literal["text", "markdown", "json"] = "text"  # Markdown is what a pull request shows.

    def main(self) -> None:
        command.require_positive(threshold=self.threshold)
        a, b = ([*read_reports([path]).values()] for path in (self.a, self.b))
        threshold, across = self.threshold / 100, self.across_devices
        result = compare(a, b, threshold=threshold, providers=self.provider, across_devices=across)
        show = {"text": text, "markdown": markdown, "json": as_json}[self.format]
        print(show(a, b, result, threshold=threshold))
        if result.regressed:
            sys.exit(1)


@dataclass(frozen=True)
class Change:
    """A row of both reports."""

    row: Row
    ratio: float  # B's median time over A's
    low: float  # low to high is the interval of the ratio
    high: float
    drift: float  # the ratio of the control, 1 without one
    before: float  # ms
    after: float
    verdict: Verdict
    memory: tuple[float, float] | None = None  # peak MiB before and after, where measured

    @property
    def fatter(self) -> bool:
        before, after = self.memory or (0.0, 0.0)
        return after > before * (1 + FATTER) and after > before + _FATTER_MIB


@dataclass(frozen=True)
class Comparison:
    changes: list[Change]
    lost: list[tuple[Row, str]]  # rows with a time in A, and their errors in B
    only_a: int
    only_b: int
    noise: float = 0.0  # the largest change of the control, 0.1 for 10 %

    def of(self, verdict: str) -> list[Change]:
        """The changes with a verdict, the largest first."""
        chosen = [change for change in self.changes if change.verdict == verdict]
        return sorted(chosen, key=lambda change: -abs(math.log(change.ratio)))

    @property
    def fatter(self) -> list[Change]:
        return [change for change in self.changes if change.fatter]

    @property
    def regressed(self) -> bool:
        return bool(self.of("slower") or self.fatter or self.lost)


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Two samples between which the median lies with CONFIDENCE; the extremes where there are too few for that."""
    ordered, n = sorted(samples), len(samples)
    tails = itertools.accumulate(math.comb(n, k) / 2**n for k in range(n))  # P(at most k samples lie below the median)
    k = max(1, sum(2 * tail <= 1 - CONFIDENCE for tail in tails))
    return ordered[k - 1], ordered[n - k]


Samples = Sequence[Sequence[float]]  # of each run of a side


def _middle(side: Samples) -> float:
    return statistics.median(statistics.median(run) for run in side)


def _interval(a: Samples, b: Samples) -> tuple[float, float]:
    """The interval of b's median over a's that follows from those of all runs."""
    (low_a, high_a), (low_b, high_b) = (zip(*map(median_interval, side), strict=True) for side in (a, b))
    return min(low_b) / max(high_a), max(high_b) / min(low_a)


def _relative(rows: list[Row], controls: list[Row]) -> Samples:
    """The times over the control's, round by round."""
    pairs = zip(rows, controls, strict=True)
    return [[t / c for t, c in zip(row.seconds, control.seconds, strict=False)] for row, control in pairs]


def _change(a: list[Row], b: list[Row], control_a: list[Row], control_b: list[Row], threshold: float) -> Change:
    """Rows of one key, a run each, and the controls of the same runs, or none."""
    times = [[row.seconds for row in rows] for rows in (a, b, control_a, control_b)]
    before, after = _middle(times[0]), _middle(times[1])
    low, high = _interval(times[0], times[1])
    intervals, drift = [(low, high)], 1.0
    if len(control_a) == len(a) and len(control_b) == len(b):
        drift = _middle(times[3]) / _middle(times[2])
        intervals.append(_interval(_relative(a, control_a), _relative(b, control_b)))
    verdict: Verdict = "unclear"
    if min(sum(map(len, side)) for side in times[:2]) == 1:
        pass  # one time has no spread
    elif all(low > 1 + threshold for low, _ in intervals):
        verdict = "slower"
    elif all(high < 1 / (1 + threshold) for _, high in intervals):
        verdict = "faster"
    elif any(1 / (1 + threshold) <= low and high <= 1 + threshold for low, high in intervals):
        verdict = "same"
    peaks = [[row.metrics["peak_mib"] for row in rows if "peak_mib" in row.metrics] for rows in (a, b)]
    memory = (min(peaks[0]), min(peaks[1])) if all(peaks) else None
    return Change(b[0], after / before, low, high, drift, 1e3 * before, 1e3 * after, verdict, memory)


def compare(
    a: Reports, b: Reports, *, threshold: float = 0.05, providers: Sequence[str] = (), across_devices: bool = False
) -> Comparison:
    """Compare two versions, each by one run or more. threshold: the smallest change of time that counts, 0.05 for 5 %.
    UserError for reports of different devices, unless across_devices, and for reports without a common row."""
    devices = sorted({report.device for report in (*a, *b)})
    if len(devices) > 1 and not across_devices:
        raise UserError(
            f"the reports are of different devices: {'; '.join(devices)}\n"
            f"that compares machines, not versions: give --across-devices if you want that"
        )
    rows_a, rows_b = _timed(a), _timed(b)
    errors = [row for report in b for row in report.rows if row.error]

    def wanted(key: Key) -> bool:
        return key[2] != CONTROL and (not providers or key[2] in providers)

    changes, lost, only_a = [], [], 0
    for key, rows in rows_a.items():
        if not wanted(key):
            continue
        control = (*key[:2], CONTROL)
        if key in rows_b:
            controls = rows_a.get(control, []), rows_b.get(control, [])
            changes.append(_change(rows, rows_b[key], *controls, threshold))
        elif error := next((e.error for e in errors if _is_of(e, rows[0])), ""):
            lost.append((rows[0], error))
        else:
            only_a += 1
    if not changes and not lost:
        raise UserError("the reports have no measurement in common: compare reports of the same command and options")
    noise = math.expm1(max((abs(math.log(change.drift)) for change in changes), default=0.0))
    for i, change in enumerate(changes):
        if change.verdict in ("slower", "faster") and abs(math.log(change.ratio)) < math.log1p(noise):
            changes[i] = replace(change, verdict="unclear")
    return Comparison(changes, lost, only_a, sum(wanted(key) and key not in rows_a for key in rows_b), noise)


def _timed(reports: Reports) -> dict[Key, list[Row]]:
    """Rows with a time, by key: one of each report that has it."""
    timed: dict[Key, list[Row]] = {}
    for row in itertools.chain.from_iterable(report.rows for report in reports):
        if row.seconds:
            timed.setdefault(row.key, []).append(row)
    return timed


def _is_of(error: Row, row: Row) -> bool:
    return (error.kind, error.provider) == (row.kind, row.provider) and error.covers(row.params, row.clock)


def text(a: Reports, b: Reports, result: Comparison, *, threshold: float) -> str:
    """The comparison for a terminal or a code block."""
    lines = _notes(a, b, result)
    for verdict in ("slower", "faster"):
        changes = result.of(verdict)
        lines += ["", f"{verdict} by more than {threshold:.0%}: {len(changes)}", *map(_time_line, changes)]
    lines += ["", f"fatter: {len(result.fatter)}"]
    for change in result.fatter:
        before, after = change.memory  # type: ignore[misc]
        lines.append(f"  {_name(change.row)}  {before:,.1f} -> {after:,.1f} MiB")
    if result.lost:
        lines += ["", f"timed in A, not in B: {len(result.lost)}"]
        lines += [f"  {_name(row)}  {error}" for row, error in result.lost]
    return "\n".join([*lines, "", *_rest(result, threshold)])


def _notes(a: Reports, b: Reports, result: Comparison) -> list[str]:
    """What was compared, and how far the machine differed."""
    lines = [f"{name}  {_where(report)}" for name, side in (("A", a), ("B", b)) for report in side]
    drifts = [change.drift for change in result.changes]
    if any(drift != 1.0 for drift in drifts):
        middle, span = statistics.median(drifts), f"{min(drifts):.3f} to {max(drifts):.3f} over the groups"
        lines.append(f"the control, the same in both, took {middle:.3f} x A's time in B ({span})")
    if result.noise:
        lines.append(f"the control changed by up to {result.noise:.0%}: less than that is no change")
    if min(len(a), len(b)) == 1:
        lines.append(
            "one run of a side: the intervals lack what differs from process to process (give folders of runs)"
        )
    return lines


def _rest(result: Comparison, threshold: float) -> list[str]:
    """The rows of which there is nothing to say."""
    same, unclear = len(result.of("same")), len(result.of("unclear"))
    lines = [f"no change: {same} rows; too noisy to tell {threshold:.0%}: {unclear} rows"]
    if result.only_a or result.only_b:
        lines.append(f"not compared: {result.only_a} rows only in A, {result.only_b} only in B")
    return lines


HEAD = ["change", "what", "provider", "B / A", "99 % interval", "A", "B"]


def cells(result: Comparison) -> list[tuple[Cell, ...]]:
    """A row of a table for each change, what is worse first, under HEAD."""

    def line(verdict: str, row: Row, mark: str, *rest: Cell) -> tuple[Cell, ...]:
        ratio, *others = rest
        return Cell(verdict), Cell(f"{row.kind} {row.group}"), Cell(row.provider), replace(ratio, mark=mark), *others

    def timed(change: Change) -> tuple[Cell, ...]:
        interval = Cell(f"{change.low:.3f} to {change.high:.3f}")
        return Cell(f"{change.ratio:.3f}", change.ratio), interval, _ms(change.before), _ms(change.after)

    made = [line("slower", change.row, "loss", *timed(change)) for change in result.of("slower")]
    for change in result.fatter:
        before, after = change.memory  # type: ignore[misc]
        sizes = Cell(f"{before:,.1f} MiB", before), Cell(f"{after:,.1f} MiB", after)
        made.append(line("fatter", change.row, "loss", Cell(f"{after / before:.3f}", after / before), Cell(""), *sizes))
    for row, error in result.lost:
        made.append(line("lost", row, "failed", Cell(""), Cell(""), _ms(row.ms()), Cell(error)))
    return made + [line("faster", change.row, "win", *timed(change)) for change in result.of("faster")]


def _ms(value: float) -> Cell:
    return Cell(f"{value:.4g} ms", value)


def summary(result: Comparison) -> str:
    """``1 slower, 2 faster``; or that nothing has changed."""
    counts = {"slower": len(result.of("slower")), "fatter": len(result.fatter), "lost": len(result.lost)}
    counts["faster"] = len(result.of("faster"))
    return ", ".join(f"{n} {word}" for word, n in counts.items() if n) or "nothing changed beyond the noise"


def markdown(a: Reports, b: Reports, result: Comparison, *, threshold: float) -> str:
    """The comparison for a pull request."""
    lines = [f"### Benchmarks: {summary(result)}", ""]
    if changed := cells(result):
        title = f"Beyond {threshold:.0%} and the noise"
        lines += [*pages.markdown_table(Table(title, HEAD, changed, names=3)), ""]
    notes = [*_notes(a, b, result), *_rest(result, threshold)]
    return "\n".join([*lines, *(f"- {pages.escape(note)}" for note in notes)])


def as_json(a: Reports, b: Reports, result: Comparison, *, threshold: float) -> str:
    """The comparison for a program: times in ms, memory in MiB, every row that both sides have."""
    changes = [
        {"kind": c.row.kind, "group": c.row.group, "provider": c.row.provider, "verdict": c.verdict, "ratio": c.ratio,
         "low": c.low, "high": c.high, "control_ratio": c.drift, "before_ms": c.before, "after_ms": c.after,
         "memory_mib": c.memory, "fatter": c.fatter}
        for c in result.changes
    ]  # fmt: skip
    lost = [{"kind": r.kind, "group": r.group, "provider": r.provider, "error": error} for r, error in result.lost]
    content = {
        "a": [_where(report) for report in a], "b": [_where(report) for report in b], "threshold": threshold,
        "noise": result.noise, "regressed": result.regressed, "changes": changes, "lost": lost,
        "only_a": result.only_a, "only_b": result.only_b,
    }  # fmt: skip
    return json.dumps(content, indent=1)


def _where(report: Report) -> str:
    m, commit = report.machine, report.commit.get("id") or "no commit"
    changed = " with changes" if report.commit.get("dirty") else ""
    versions = ", ".join(f"{name} {m[name]}" for name in ("torch", "triton") if m.get(name))
    return ", ".join(filter(None, [report.datetime, report.device, versions, f"{commit}{changed}"]))


def _name(row: Row) -> str:
    return f"{row.kind} {row.group:<56} {row.provider:<14}"


def _time_line(change: Change) -> str:
    interval = f"{change.ratio:.3f} x ({change.low:.3f} to {change.high:.3f})"
    return f"  {_name(change.row)} {interval}  {change.before:.4g} -> {change.after:.4g} ms"
