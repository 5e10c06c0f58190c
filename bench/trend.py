"""A folder of reports over time: a page with a chart for each measured group, and what changed beyond the noise.

A revision is a commit, with or without changes, or a report without a commit. Revisions are in the order of their
commits' dates where the reports have them, else of the reports' own, each machine for itself. `bench.compare` compares
each group with the revision before that measured it, and the last with the first: a loss of two percent at a time
stays below every threshold.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

from bench import command, compare
from bench.compare import Comparison
from bench.record import CONTROL, Report, Row, read_reports
from model.cli import UserError
from model.files import write_atomic
from model.report.charts import SHAPES, Curve, Key, Mark, num
from model.report.pages import Cell, Figure, Table, figure, page, table

Group = tuple[str, str]  # kind, and what its competitors share


@dataclass(frozen=True)
class Trend:
    """One page over a folder of reports: a chart for each measured group, and what changed beyond the noise."""

    folder: tyro.conf.Positional[Path]  # Folder of reports, of any number of machines.
    out: Path | None = None  # The page; FOLDER/trend.html by default.
    threshold: float = 5.0  # Smallest change of time that counts, in percent.

    def main(self) -> None:
        command.require_positive(threshold=self.threshold)
        machines, threshold = read(self.folder), self.threshold / 100
        for device, revisions in machines.items():
            changes = compared(revisions, threshold)
            words = f"{device}: {len(revisions)} revision{'s' * (len(revisions) != 1)}, {_count(changes)}"
            print("\n".join([words, *(line for change in changes for line in change.lines())]))
        path = self.out or self.folder / "trend.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, html(machines, threshold=threshold))
        print(path)


@dataclass
class Revision:
    """number: from 1, on its machine. name: of the commit, with + for changes that it does not have."""

    name: str
    date: datetime.datetime
    number: int = 0
    reports: list[Report] = field(default_factory=list)

    def rows(self) -> Iterator[Row]:
        return (row for report in self.reports for row in report.rows)

    def only(self, groups: set[Group]) -> list[Report]:
        """Its reports with the rows of some groups alone, and every error."""
        return [replace(r, rows=[row for row in r.rows if row.error or _group(row) in groups]) for r in self.reports]


class Change(NamedTuple):
    """What changed from one revision to another."""

    before: Revision
    after: Revision
    result: Comparison

    @property
    def label(self) -> str:
        return f"{self.before.number} to {self.after.number}"

    def lines(self) -> list[str]:
        """What is worse, for a terminal."""
        names = f"{self.before.name} to {self.after.name}"
        return [f"  {names}: {row.kind} {row.group} [{row.provider}] {words}" for row, words in self.worse()]

    def worse(self) -> list[tuple[Row, str]]:
        """Rows, and how they are worse."""
        slower = [(c.row, f"{c.ratio:.3f} x ({c.low:.3f} to {c.high:.3f})") for c in self.result.of("slower")]
        return [*slower, *((c.row, "needs more memory") for c in self.result.fatter), *self.result.lost]


def read(folder: Path) -> dict[str, list[Revision]]:
    """The revisions of each machine, oldest first. UserError for a file that is no report, or has no date."""
    machines: dict[str, dict[str, Revision]] = {}
    for path, report in read_reports([folder]).items():
        commit = report.commit.get("id")
        name = f"{commit[:12]}{'+' * bool(report.commit.get('dirty'))}" if commit else report.datetime
        date = _date(report.commit.get("time") or report.datetime, path)
        revision = machines.setdefault(report.device, {}).setdefault(name, Revision(name, date))
        revision.date = min(revision.date, date)
        revision.reports.append(report)
    ordered = {device: sorted(found.values(), key=lambda r: r.date) for device, found in sorted(machines.items())}
    for revisions in ordered.values():
        for number, revision in enumerate(revisions, 1):
            revision.number = number
            revision.reports.sort(key=lambda report: report.datetime)
    return ordered


def _date(text: Any, path: Path) -> datetime.datetime:
    """ISO 8601; UTC where it names no zone, as pytest-benchmark does."""
    try:
        date = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    except (AttributeError, TypeError, ValueError):
        raise UserError(f"{path} has no date that can be read, but {text!r}: measure again, or remove it") from None
    return date if date.tzinfo else date.replace(tzinfo=datetime.timezone.utc)


def _group(row: Row) -> Group:
    return row.kind, row.group


def compared(revisions: Sequence[Revision], threshold: float) -> list[Change]:
    """What changed: from the revision before that measured a group, and over all revisions."""
    seen: dict[Group, list[tuple[Revision, Row]]] = {}  # a row stands for its group
    for revision in revisions:
        timed = {_group(row): row for row in revision.rows() if row.seconds}
        errors = [row for row in revision.rows() if row.error]
        for group, row in timed.items():
            seen.setdefault(group, []).append((revision, row))
        for group, ((_, row), *_) in seen.items():
            if group not in timed and any(e.kind == row.kind and e.covers(row.params, row.clock) for e in errors):
                seen[group].append((revision, row))
    pairs: dict[tuple[int, int], set[Group]] = {}
    for group, found in seen.items():
        numbers = [revision.number for revision, _ in found]
        ends = [(numbers[0], numbers[-1])] if len(numbers) > 2 else []
        for pair in (*pairwise(numbers), *ends):
            pairs.setdefault(pair, set()).add(group)
    changes = []
    for (before, after), groups in sorted(pairs.items()):
        a, b = revisions[before - 1], revisions[after - 1]
        with contextlib.suppress(UserError):  # no provider in common
            result = compare.compare(a.only(groups), b.only(groups), threshold=threshold)
            changes.append(Change(a, b, result))
    return changes


def _count(changes: Iterable[Change]) -> str:
    """How many rows got worse at any time."""
    n = len({row.key for change in changes for row, _ in change.worse()})
    return f"{n} row{'s' * (n != 1)} got worse" if n else "nothing got worse beyond the noise"


def _figures(revisions: Sequence[Revision], changes: Sequence[Change]) -> tuple[dict[str, list[Figure]], int]:
    """The charts of each kind, one for each group that two revisions or more have; and how many groups have one."""
    times: dict[Group, dict[str, dict[int, list[Row]]]] = {}
    for revision in revisions:
        for row in revision.rows():
            if row.seconds and row.provider != CONTROL:
                of = times.setdefault(_group(row), {}).setdefault(row.provider, {})
                of.setdefault(revision.number, []).append(row)
    marks = {
        (c.row.key, change.after.number): (verdict, change)
        for change in changes
        for verdict, mark in (("slower", "loss"), ("faster", "win"))
        for c in change.result.of(verdict)
    }
    figures: dict[str, list[Figure]] = {}
    single = 0
    for (kind, group), providers in times.items():
        if len({number for numbers in providers.values() for number in numbers}) < 2:
            single += 1
            continue
        figures.setdefault(kind, []).append(_figure(group, providers, revisions, marks))
    return figures, single


def _figure(
    group: str, providers: dict[str, dict[int, list[Row]]], revisions: Sequence[Revision], marks: dict[Any, Any]
) -> Figure:
    """Medians in ms over the revisions, a curve a provider. A revision that was run several times has their median."""
    drawn, points, keys = [], [], []
    for i, (provider, runs) in enumerate(providers.items()):
        y = {number: float(np.median([row.ms() for row in rows])) for number, rows in runs.items()}
        drawn.append(Curve(np.array([*y], float), np.array([*y.values()]), f"curve run{i % 5} dash{i % 4}"))
        keys.append(Key(provider, SHAPES[i % 5], f"mark run{i % 5}", f"run{i % 5} dash{i % 4}"))
        for number, ms in y.items():
            tip = f"{provider}, revision {number}, {revisions[number - 1].name}: {num(ms)} ms"
            points.append(Mark(number, ms, SHAPES[i % 5], f"mark run{i % 5}", tip))
            verdict, change = marks.get((runs[number][0].key, number), ("", None))
            if change:
                shape, kind = ("down", "loss") if verdict == "slower" else ("up", "win")
                points.append(Mark(number, ms, shape, kind, f"{tip}, {verdict}, {change.label}", 5.5))
    return figure(
        group, drawn, caption=f"{group}, ms", x_label="revisions", marks=points, keys=keys, since=1.0, zero=True,
        whole=True,
    )  # fmt: skip


def _revisions(revisions: Sequence[Revision]) -> Table:
    rows = []
    for r in revisions:
        machine = r.reports[-1].machine
        words = dict.fromkeys(str(report.method.get("command", "")) for report in r.reports)
        rows.append({
            "": Cell(str(r.number), r.number), "commit": Cell(r.name),
            "date": Cell(f"{r.date.astimezone(datetime.timezone.utc):%Y-%m-%d %H:%M}", r.date.timestamp()),
            **{name: Cell(str(machine.get(name) or "")) for name in ("torch", "triton", "driver")},
            "reports": Cell(str(len(r.reports)), len(r.reports)), "commands": Cell("; ".join(filter(None, words))),
        })  # fmt: skip
    return table("Revisions", {head: [row[head] for row in rows] for head in rows[0]}, names=8)


def _machine(revisions: Sequence[Revision], threshold: float) -> dict[str, Any]:
    """What the page shows of a machine."""
    changes = compared(revisions, threshold)
    rows = [(Cell(change.label), *cells) for change in changes for cells in compare.cells(change.result)]
    figures, single = _figures(revisions, changes)
    title = f"Changes beyond {threshold:.0%} and the noise"
    return {
        "revisions": _revisions(revisions), "changes": Table(title, ["revisions", *compare.HEAD], rows, names=4),
        "count": _count(changes), "figures": figures, "single": single,
    }  # fmt: skip


def html(machines: dict[str, list[Revision]], *, threshold: float = 0.05) -> str:
    """The page, self-contained."""
    shown = {device: _machine(revisions, threshold) for device, revisions in machines.items()}
    return page(Path(__file__).with_name("trend.html.jinja"), machines=shown)
