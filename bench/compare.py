"""Reports of two versions on one device: what got slower, faster, fatter, beyond the noise.

    ratio = median(B) / median(A)       of the times, and again of the times over the control's in the same round

Each median has a distribution-free interval from its order statistics (the binomial one: David and Nagaraja, "Order
Statistics", 2003, section 7.1). A row has changed where both ratios' whole intervals lie beyond the threshold: a busy
or hot machine slows the control too, and a lucky control alone changes nothing.

Two processes differ by more than their samples show: where their memory lies, who else runs. So a side may be several
runs, best taken in turn with the other's: a row's interval then reaches from the lowest to the highest of its runs. And
the control, which never changes, sets the least that counts: what it changed by in any group.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bench.record import CONTROL, Report, Row
from model.cli import UserError

Key = tuple[str, str, str]
Verdict = Literal["slower", "faster", "same", "unclear"]
CONFIDENCE = 0.99  # of one median's interval
FATTER = 0.01  # memory is counted, not sampled: a hundredth is a change
_FATTER_MIB = 1.0


@dataclass(frozen=True)
class Change:
    """A row of both reports. ratio: B's median time over A's, of which low to high is the interval; drift: the same of
    the control's median, 1 without one; before, after: ms; memory: peak MiB before and after, None where not measured.
    """

    row: Row
    ratio: float
    low: float
    high: float
    drift: float
    before: float
    after: float
    verdict: Verdict
    memory: tuple[float, float] | None = None

    @property
    def fatter(self) -> bool:
        """Needs more memory than before."""
        if self.memory is None:
            return False
        before, after = self.memory
        return after > before * (1 + FATTER) and after > before + _FATTER_MIB


@dataclass(frozen=True)
class Comparison:
    """All of it. lost: rows that had a time in A and have an error in B, as (row of A, the error); noise: the
    change of time that the two runs make of anything, 0.1 for 10 %.
    """

    changes: list[Change]
    lost: list[tuple[Row, str]]
    only_a: int
    only_b: int
    noise: float = 0.0

    def found(self, verdict: Verdict) -> list[Change]:
        """The changes with a verdict, the largest first."""
        of_verdict = [change for change in self.changes if change.verdict == verdict]
        return sorted(of_verdict, key=lambda change: -abs(math.log(change.ratio)))

    @property
    def fatter(self) -> list[Change]:
        return [change for change in self.changes if change.fatter]

    @property
    def regressed(self) -> bool:
        """Something is slower, fatter or gone."""
        return bool(self.found("slower") or self.fatter or self.lost)


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Two samples between which the median lies with CONFIDENCE; the extremes where there are too few for that."""
    ordered, n = sorted(samples), len(samples)
    tail, k = 0.0, 0  # P(fewer than k + 1 of n samples lie below the median)
    while True:
        tail += math.comb(n, k) / 2**n
        if 2 * tail > 1 - CONFIDENCE:
            break
        k += 1
    k = max(k, 1)
    return ordered[k - 1], ordered[n - k]


Samples = Sequence[Sequence[float]]  # of each run of a side


def _ratio(a: Samples, b: Samples) -> tuple[float, float, float]:
    """Median of b's medians over a's, and the interval that follows from those of all runs."""
    (low_a, high_a), (low_b, high_b) = (_reach(side) for side in (a, b))
    return _middle(b) / _middle(a), low_b / high_a, high_b / low_a


def _middle(side: Samples) -> float:
    return statistics.median(statistics.median(run) for run in side)


def _reach(side: Samples) -> tuple[float, float]:
    intervals = [median_interval(run) for run in side]
    return min(low for low, _ in intervals), max(high for _, high in intervals)


def _change(a: list[Row], b: list[Row], control_a: list[Row], control_b: list[Row], threshold: float) -> Change:
    """Rows of one key, a run each, and the controls of the same runs, or none."""
    times = [row.seconds for row in a], [row.seconds for row in b]
    ratio, low, high = _ratio(*times)
    intervals, drift = [(low, high)], 1.0
    if len(control_a) == len(a) and len(control_b) == len(b):
        drift = _middle([row.seconds for row in control_b]) / _middle([row.seconds for row in control_a])
        relative = [
            [
                [t / c for t, c in zip(row.seconds, control.seconds, strict=False)]
                for row, control in zip(rows, controls, strict=True)
            ]
            for rows, controls in ((a, control_a), (b, control_b))
        ]
        intervals.append(_ratio(*relative)[1:])
    verdict: Verdict = "unclear"
    if all(low > 1 + threshold for low, _ in intervals):
        verdict = "slower"
    elif all(high < 1 / (1 + threshold) for _, high in intervals):
        verdict = "faster"
    elif any(1 / (1 + threshold) <= low and high <= 1 + threshold for low, high in intervals):
        verdict = "same"
    peaks = [[row.metrics["peak_mib"] for row in rows if "peak_mib" in row.metrics] for rows in (a, b)]
    memory = (min(peaks[0]), min(peaks[1])) if all(peaks) else None
    before, after = (1e3 * _middle(side) for side in times)
    return Change(b[0], ratio, low, high, drift, before, after, verdict, memory)


def compare(
    a: Sequence[Report],
    b: Sequence[Report],
    *,
    threshold: float = 0.05,
    providers: Sequence[str] = (),
    across_devices: bool = False,
) -> Comparison:
    """Sets two versions side by side, each by one run or more. threshold: the smallest change of time that counts, 0.05
    for 5 %. providers: only these. UserError for reports of different devices, unless that is asked for, and for
    reports without a common row.
    """
    devices = sorted({report.device for report in (*a, *b)})
    if len(devices) > 1 and not across_devices:
        raise UserError(
            f"the reports are of different devices: {'; '.join(devices)}\n"
            f"that compares machines, not versions: say --across-devices if it is what you want"
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
        elif (error := _error_of(rows[0], errors)) is not None:
            lost.append((rows[0], error))
        else:
            only_a += 1
    if not changes and not lost:
        raise UserError("the reports have no measurement in common: compare reports of the same command and options")
    noise = math.expm1(max((abs(math.log(change.drift)) for change in changes), default=0.0))
    changes = [
        replace(change, verdict="unclear")
        if change.verdict in ("slower", "faster") and abs(math.log(change.ratio)) < math.log1p(noise)
        else change
        for change in changes
    ]
    return Comparison(changes, lost, only_a, sum(wanted(key) and key not in rows_a for key in rows_b), noise)


def _timed(reports: Sequence[Report]) -> dict[Key, list[Row]]:
    """Rows with a time, by key: one of each report that has it."""
    found: dict[Key, list[Row]] = {}
    for report in reports:
        for row in report.rows:
            if row.seconds:
                found.setdefault(row.key, []).append(row)
    return found


def _error_of(row: Row, errors: list[Row]) -> str | None:
    """Why B has no time for a row of A: one error stands for all the modes and clocks that it does not name."""
    for e in errors:
        same = (e.kind, e.provider) == (row.kind, row.provider) and e.clock in ("", row.clock)
        if same and all(row.params.get(name) == value for name, value in e.params.items() if value != ""):
            return e.error
    return None


def text(a: Sequence[Report], b: Sequence[Report], result: Comparison, *, threshold: float) -> str:
    """The comparison as lines for a terminal, ready for Markdown's code fence."""
    lines = [f"{name}  {_where(report)}" for name, side in (("A", a), ("B", b)) for report in side]
    drifts = [change.drift for change in result.changes]
    if any(drift != 1.0 for drift in drifts):
        lines.append(
            f"the control, the same in both, took {statistics.median(drifts):.3f} x A's time in B "
            f"({min(drifts):.3f} to {max(drifts):.3f} over the groups)"
        )
    if result.noise:
        lines.append(f"the control changed by up to {result.noise:.0%}: less than that is no change")
    if min(len(a), len(b)) == 1:
        lines.append(
            "one run of a side: what differs from process to process is not in the intervals (give folders of runs)"
        )
    for verdict, word in (("slower", "slower"), ("faster", "faster")):
        found = result.found(verdict)  # type: ignore[arg-type]
        lines += ["", f"{word} by more than {threshold:.0%}: {len(found)}", *map(_time_line, found)]
    lines += ["", f"fatter: {len(result.fatter)}"]
    for change in result.fatter:
        before, after = change.memory  # type: ignore[misc]
        lines.append(f"  {_name(change.row)}  {before:,.1f} -> {after:,.1f} MiB")
    if result.lost:
        lines += ["", f"timed in A, not in B: {len(result.lost)}"]
        lines += [f"  {_name(row)}  {error}" for row, error in result.lost]
    same, unclear = len(result.found("same")), len(result.found("unclear"))
    lines += ["", f"no change: {same} rows; too noisy to tell {threshold:.0%}: {unclear} rows"]
    if result.only_a or result.only_b:
        lines.append(f"not compared: {result.only_a} rows only in A, {result.only_b} only in B")
    return "\n".join(lines)


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
