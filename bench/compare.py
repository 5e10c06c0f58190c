"""Two reports of one device: what got slower, faster, fatter, beyond the noise.

    ratio = median(B) / median(A)       of the times, and again of the times over the control's in the same round

Each median has a distribution-free interval from its order statistics (the binomial one: David and Nagaraja, "Order
Statistics", 2003, section 7.1). A row has changed where both ratios' whole intervals lie beyond the threshold: a busy
or hot machine slows the control too, and a lucky control alone changes nothing.

Two processes differ in more than their samples show: where their memory lies, who else runs. How much is read off the
rows themselves, of which a change of code moves few, or all alike: a row must also stand out by SCATTERS robust
deviations of all rows' logarithms (1.4826 times the median absolute deviation), if there are enough rows to tell.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bench.record import CONTROL, Report, Row
from model.cli import UserError

Verdict = Literal["slower", "faster", "same", "unclear"]
CONFIDENCE = 0.99  # of one median's interval
FATTER = 0.01  # memory is counted, not sampled: a hundredth is a change
_FATTER_MIB = 1.0
SCATTERS, ENOUGH = 4.0, 10


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
    """All of it. lost: rows that had a time in A and have an error in B, as (row of A, the error); noise: the change of
    time that rows make between two runs of anything, 0.1 for 10 %, 0 where there are too few of them to tell.
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


def _ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """median(b) / median(a), and the interval that follows from theirs."""
    (low_a, high_a), (low_b, high_b) = median_interval(a), median_interval(b)
    return statistics.median(b) / statistics.median(a), low_b / high_a, high_b / low_a


def _change(a: Row, b: Row, controls: tuple[Row | None, Row | None], threshold: float) -> Change:
    ratio, low, high = _ratio(a.seconds, b.seconds)
    intervals, drift = [(low, high)], 1.0
    control_a, control_b = controls
    if control_a is not None and control_b is not None:
        drift = statistics.median(control_b.seconds) / statistics.median(control_a.seconds)
        relative = [
            [t / c for t, c in zip(row.seconds, control.seconds, strict=False)]
            for row, control in ((a, control_a), (b, control_b))
        ]
        intervals.append(_ratio(*relative)[1:])
    verdict: Verdict = "unclear"
    if all(low > 1 + threshold for low, _ in intervals):
        verdict = "slower"
    elif all(high < 1 / (1 + threshold) for _, high in intervals):
        verdict = "faster"
    elif any(1 / (1 + threshold) <= low and high <= 1 + threshold for low, high in intervals):
        verdict = "same"
    memory = (
        (a.metrics["peak_mib"], b.metrics["peak_mib"]) if "peak_mib" in a.metrics.keys() & b.metrics.keys() else None
    )
    return Change(b, ratio, low, high, drift, a.ms(), b.ms(), verdict, memory)


def compare(
    a: Report, b: Report, *, threshold: float = 0.05, providers: Sequence[str] = (), across_devices: bool = False
) -> Comparison:
    """Sets two reports side by side. threshold: the smallest change of time that counts, 0.05 for 5 %. providers: only
    these. UserError for reports of different devices, unless that is asked for, and for reports without a common row.
    """
    if a.device != b.device and not across_devices:
        raise UserError(
            f"the reports are of different devices: {a.device}, and {b.device}\n"
            f"that compares machines, not versions: say --across-devices if it is what you want"
        )
    rows_a, rows_b = ({row.key: row for row in report.rows} for report in (a, b))

    def control(rows: dict[tuple[str, str, str], Row], row: Row) -> Row | None:
        return rows.get((row.kind, row.group, CONTROL))

    def wanted(row: Row) -> bool:
        return bool(row.seconds) and row.provider != CONTROL and (not providers or row.provider in providers)

    errors = [row for row in b.rows if row.error]
    changes, lost, only_a = [], [], 0
    for key, row in rows_a.items():
        if not wanted(row):
            continue
        other = rows_b.get(key)
        if other is not None and other.seconds:
            controls = control(rows_a, row), control(rows_b, other)
            changes.append(_change(row, other, controls, threshold))
        elif (error := _error_of(row, errors)) is not None:
            lost.append((row, error))
        else:
            only_a += 1
    if not changes and not lost:
        raise UserError("the reports have no measurement in common: compare reports of the same command and options")
    only_b = sum(wanted(row) and not (key in rows_a and rows_a[key].seconds) for key, row in rows_b.items())
    noise = _noise(changes)
    changes = [
        replace(change, verdict="unclear")
        if change.verdict in ("slower", "faster") and abs(math.log(change.ratio)) < math.log1p(noise)
        else change
        for change in changes
    ]
    return Comparison(changes, lost, only_a, only_b, noise)


def _noise(changes: list[Change]) -> float:
    if len(changes) < ENOUGH:
        return 0.0
    logs = [math.log(change.ratio / change.drift) for change in changes]
    middle = statistics.median(logs)
    return math.expm1(SCATTERS * 1.4826 * statistics.median(abs(x - middle) for x in logs))


def _error_of(row: Row, errors: list[Row]) -> str | None:
    """Why B has no time for a row of A: one error stands for all the modes and clocks that it does not name."""
    for e in errors:
        same = (e.kind, e.provider) == (row.kind, row.provider) and e.clock in ("", row.clock)
        if same and all(row.params.get(name) == value for name, value in e.params.items() if value != ""):
            return e.error
    return None


def text(a: Report, b: Report, result: Comparison, *, threshold: float) -> str:
    """The comparison as lines for a terminal, ready for Markdown's code fence."""
    lines = [f"{name}  {_where(report)}" for name, report in (("A", a), ("B", b))]
    drifts = [change.drift for change in result.changes]
    if any(drift != 1.0 for drift in drifts):
        lines.append(
            f"the control, the same in both, took {statistics.median(drifts):.3f} x A's time in B "
            f"({min(drifts):.3f} to {max(drifts):.3f} over the groups)"
        )
    if result.noise:
        lines.append(f"rows scatter between the runs: less than {result.noise:.0%} by one row alone is no change")
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
