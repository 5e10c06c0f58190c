"""Reports for readers: Markdown, one self-contained HTML page, tables of the README, lines on a terminal.

tables.py picks and arranges the rows, charts.py draws them; the same sections go into the text and the page.
"""

from __future__ import annotations

import html as entities
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from bench import charts, tables
from bench.record import CONTROL, Report, Row
from bench.tables import Cell, Table, percent, times
from model.cli import UserError
from model.report.charts import NONE, num, page

NO_GPU = "No report of a GPU has been committed yet."
_CLOCKS = {"events": "one call, by CUDA events", "graph": "device alone, by CUDA graph", "wall": "wall time"}
_RATIO = (
    "Times are p50 in ms; beside them a competitor's time over ours: above 1, ours is faster. ▲ ours was faster in "
    "more than four fifths of the rounds, ▼ slower in more than four fifths, = neither."
)
_SPEED = (
    "▲ the provider was faster in more than four fifths of the rounds, ▼ slower in more than four fifths, = neither."
)
_EAGER = "No Triton kernel was timed here: ours are this project's functions, which run PyTorch's operators, as eager."
_LEGEND = (
    "In the charts of ratios a dot is a case: ● ours faster, ▼ slower, ▮ neither; its line is p20 to p80 of the "
    "rounds' ratios. Lanes of a row, from the top: forward, backward, both. At its end: cases in which ours is "
    "faster, of all."
)
_SPREAD_COLUMNS = 4  # more providers than this leave no room for p20 and p80 in a line of Markdown
_COMMANDS = {
    "kernels": "python -m bench kernels", "train": "python -m bench train", "generate": "python -m bench generate",
    "memory": "python -m bench memory",
}  # fmt: skip


class Figure(NamedTuple):
    """A chart and its caption."""

    title: str
    svg: Markup


@dataclass
class Section:
    """A heading with what stands under it. level: 3, or 4 inside the one before."""

    title: str
    anchor: str
    level: int = 3
    notes: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)

    def draw(self, title: str, svg: str) -> None:
        """Adds a chart, if there is one."""
        if svg:
            self.figures.append(Figure(title, Markup(svg)))  # ElementTree has escaped it

    @property
    def empty(self) -> bool:
        return not (self.notes or self.figures or self.tables)


# --- sections --------------------------------------------------------------------------------------------------------


def sections(report: Report, anchor: str) -> list[Section]:
    """All that is shown of a report, in order. anchor: what the ids of its headings begin with."""
    known = [*_kernels(report, anchor), *_train(report, anchor), _generate(report, anchor), _memory(report, anchor)]
    kinds = dict.fromkeys(row.kind for row in report.rows if row.seconds and row.kind not in _COMMANDS)
    other = [
        Section(kind, f"{anchor}-other{i}", tables=[tables.other_table(report, kind)]) for i, kind in enumerate(kinds)
    ]
    return [section for section in [*known, *other, _left_out(report, anchor)] if not section.empty]


def _kernels(report: Report, anchor: str) -> list[Section]:
    found, us = tables.groups(report, "kernels"), tables.ours(report)
    if not found:
        return []
    head = Section("Kernels", f"{anchor}-kernels", notes=[_RATIO, *([_EAGER] if us == "eager" else [])])
    head.tables = tables.summary_tables(report)
    by_clock = tables.split(found)
    device = by_clock.get(("graph",)) or next(iter(by_clock.values()))  # the device's own time, if there is one
    clock = _CLOCKS.get(device[0].clock, device[0].clock)
    head.draw(f"Share of its floor that {us} reaches ({clock})", charts.floors(device, us, "Fractions of the floor"))
    head.draw(f"Roofline ({clock})", charts.roofline(device, report, "Roofline"))
    made = [head]
    for i, op in enumerate(dict.fromkeys(group.get("op") for group in found)):
        section = Section(op, f"{anchor}-op{i}", level=4, tables=tables.kernel_tables(report, op))
        for (clock, dtype), members in _by_clock_and_dtype(tables.groups(report, "kernels", op=op)).items():
            svg = charts.ratios(members, us, f"{op}, {dtype}: ratios")
            section.draw(f"{op}, {dtype}: time of each over ours ({_CLOCKS.get(clock, clock)})", svg)
        made.append(section)
    if any(section.figures for section in made[1:]):
        head.notes.append(_LEGEND)
    return made


def _by_clock_and_dtype(found: list[tables.Group]) -> dict[tuple[str, str], list[tables.Group]]:
    return {(clock, dtype): members for (dtype, clock), members in tables.split(found, "dtype").items()}


def _train(report: Report, anchor: str) -> list[Section]:
    about = f"Forward, backward, clipping and AdamW; the speed is the time of eager over a provider's. {_SPEED}"
    made = [Section("Training step", f"{anchor}-train", notes=[about])]
    for i, group in enumerate(tables.groups(report, "train")):
        label = f"{group.label()}, {group.clock}"
        section = Section(label, f"{anchor}-train{i}", level=4, tables=[tables.train_table(group, report)])
        section.draw("Tokens/s, and the gain of each step", charts.ladder(group, "tokens_per_s", f"Ladder, {label}"))
        section.draw("Peak memory in MiB", charts.ladder(group, "peak_mib", f"Peak memory, {label}"))
        made.append(section)
    return made if len(made) > 1 else []


def _generate(report: Report, anchor: str) -> Section:
    section = Section("Generation", f"{anchor}-generate", tables=tables.generate_tables(report))
    if section.tables:
        section.notes = [f"Greedy, with a key-value cache; the speed is the time of hf over a provider's. {_SPEED}"]
    return section


def _memory(report: Report, anchor: str) -> Section:
    section = Section("Memory of a training step", f"{anchor}-memory", tables=tables.memory_tables(report))
    for (preset, context, dtype), rows in tables.memory_settings(report).items():
        for batch in dict.fromkeys(row.params.get("batch") for row in rows):
            title = f"{preset} {dtype}, batch {batch}, context {context}"
            members = [row for row in rows if row.params.get("batch") == batch]
            section.draw(title, charts.memory(members, f"Memory: {title}"))
    if section.figures:
        section.notes = ["Predicted by part, and the measured peak, in GiB; dashed lines are the sizes of cards."]
    return section


def _left_out(report: Report, anchor: str) -> Section:
    """Errors, peers that are not there, cases for which there was no time."""
    section = Section("Not here", f"{anchor}-not-here")
    if (failed := tables.failures(report)).rows:
        section.tables.append(failed)
    if report.missing:
        rows = [[Cell(name), Cell(why)] for name, why in report.missing.items()]
        section.tables.append(Table("Providers that are missing", ["provider", "why"], rows, 2))
    if report.dropped:
        rows = [[Cell(what)] for what in report.dropped]
        section.tables.append(Table("Left out", ["what"], rows))
    return section


# --- Markdown --------------------------------------------------------------------------------------------------------


def markdown(reports: list[Report]) -> str:
    """The reports as text that can be read alone."""
    lines = ["# Benchmarks"]
    for i, report in enumerate(reports):
        lines += ["", f"## {_escape(report.device)}", ""]
        lines += [f"- {_escape(name)}: {_escape(value)}" for name, value in tables.facts(report)]
        if figures := tables.glance(report):
            lines += ["", *(f"- **{_escape(figure)}** {_escape(what)}" for figure, what in figures)]
        for section in sections(report, f"r{i}"):
            lines += ["", f"{'#' * section.level} {_escape(section.title)}"]
            lines += [line for note in section.notes if note != _LEGEND for line in ("", _escape(note))]
            for table in section.tables:
                lines += [
                    "",
                    f"**{_escape(table.title)}.** {_escape(table.note)}".rstrip(),
                    "",
                    *_markdown_table(table),
                ]
    return "\n".join(lines) + "\n"


def _markdown_table(table: Table) -> list[str]:
    """Lines of a table; numbers to the right."""
    spreads = sum(any(row[i].span for row in table.rows) for i in range(len(table.head))) <= _SPREAD_COLUMNS
    rules = ["---" if i < table.names else "---:" for i in range(len(table.head))]
    body = [[_markdown_cell(cell, spreads) for cell in row] for row in table.rows]
    return [f"| {' | '.join(line)} |" for line in ([_escape(name) for name in table.head], rules, *body)]


def _markdown_cell(cell: Cell, spreads: bool) -> str:
    span = f"({cell.span})" if cell.span and spreads else ""
    note = f"{tables.SYMBOLS.get(cell.mark, '')} {cell.note}".strip() if cell.note else ""
    return _escape(" ".join(filter(None, [cell.text, span, note])))


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    plain = entities.escape(" ".join(text.split()), quote=False)
    outside = "(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"  # an underscore inside a word means nothing
    return re.sub(rf"[\\`*\[\]|]|{outside}", r"\\\g<0>", plain)


# --- HTML ------------------------------------------------------------------------------------------------------------


def html(reports: list[Report]) -> str:
    """The reports as one page that needs nothing else: no network, no other file."""
    shown = [
        {
            "report": r,
            "anchor": f"r{i}",
            "facts": tables.facts(r),
            "glance": tables.glance(r),
            "sections": sections(r, f"r{i}"),
        }
        for i, r in enumerate(reports)
    ]
    return page(Path(__file__).with_name("report.html.jinja"), reports=shown, symbols=tables.SYMBOLS)


# --- README ----------------------------------------------------------------------------------------------------------


def readme_tables(reports: Mapping[str, Report]) -> dict[str, str]:
    """What stands between the README's markers: marker -> Markdown. reports: by the file name that the README gives."""
    return {f"bench {kind}": _readme_part(reports, kind) for kind in _COMMANDS}


def _readme_part(reports: Mapping[str, Report], kind: str) -> str:
    parts, on_gpu = [], False
    for name, report in reports.items():
        if shown := _readme_pick(report, kind):
            on_gpu |= not report.on_cpu
            versions = ", ".join(f"{n} {report.machine[n]}" for n in ("torch", "triton") if report.machine.get(n))
            command = report.method.get("command", _COMMANDS[kind])
            where = f"{_escape(report.device)}, {_escape(versions)}: `{command}`, [{name}]({name})"
            parts.append(where)
            for table in shown:
                parts += [
                    f"**{_escape(table.title)}.** {_escape(table.note)}".rstrip(),
                    "\n".join(_markdown_table(table)),
                ]
    return "\n\n".join([*([] if on_gpu else [NO_GPU]), *parts])


def _readme_pick(report: Report, kind: str) -> list[Table]:
    """The tables of a kind that a reader of the README wants."""
    if kind == "kernels":
        return _readme_kernels(report)
    if kind == "train":  # of each setting the largest batch, which comes last
        last = {(g.label("batch"), g.clock): g for g in tables.groups(report, "train")}
        return [tables.train_table(group, report, parts=()) for group in last.values()]
    return tables.generate_tables(report) if kind == "generate" else tables.memory_tables(report)


def _readme_kernels(report: Report) -> list[Table]:
    """Each kernel once, on its first case: forward and backward, or forward where there is no more."""
    found, us, rows = tables.groups(report, "kernels"), tables.ours(report), []
    clocks = dict.fromkeys(group.clock for group in found)
    clock = "graph" if "graph" in clocks else next(iter(clocks), "")
    for (op, dtype, _), members in tables.split((g for g in found if g.clock == clock), "op", "dtype").items():
        first = [group for group in members if group.params.get("case") == members[0].params.get("case")]
        group = {g.get("mode"): g for g in first}.get("both", first[0])
        row, others = group.rows.get(us), {n: r for n, r in group.rows.items() if n not in (us, "eager", "compile")}
        fastest = min(others, key=lambda name: others[name].ms(), default="")
        cells = [Cell(op), Cell(group.get("case")), Cell(dtype), Cell(group.get("mode"))]
        cells += [Cell(num(row.ms())), Cell(percent(row.metrics.get("floor")))] if row else [Cell("failed"), Cell("")]
        for name in ("eager", "compile", fastest):
            other = group.rows.get(name) if name != us else None
            text = times(tables.ratio(other, row).mid) if row and other else NONE
            cells.append(Cell(f"{text} {name}" if other and name == fastest else text))
        rows.append(cells)
    head = [
        "kernel",
        "case",
        "dtype",
        "mode",
        f"{us}, ms",
        "of floor",
        "eager / ours",
        "compile / ours",
        "fastest other / ours",
    ]
    title = f"Kernels, {_CLOCKS.get(clock, clock)}"
    return [tables.trimmed(title, head, rows, 4, note="Ratios of p50: above 1, ours is faster.")] if rows else []


def update_readme(text: str, parts: Mapping[str, str]) -> str:
    """The README with each part between its markers, `<!-- NAME -->` and `<!-- /NAME -->`. UserError without them."""
    for name, part in parts.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, opened, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (opened and closed):
            raise UserError(f"the README has no place for {name}: it needs the lines {begin} and {end}")
        text = f"{before}{begin}\n{part}\n{end}{after}"
    return text


# --- a terminal ------------------------------------------------------------------------------------------------------


def line(row: Row) -> str:
    """A row as a line of text: kind, what, provider, p50 (p20 to p80), and its main figures or why it has no time."""
    head = f"{row.kind:<8} {row.group:<58} {row.provider:<14}"
    if row.error:
        return f"{head} {row.error}"
    time = f"{num(row.ms()):>8} ms ({num(row.ms(20))} to {num(row.ms(80))})" if row.seconds else ""
    return f"{head} {time:<32} {_figures(row)}".rstrip()


def _figures(row: Row) -> str:
    m = row.metrics
    if row.provider == CONTROL:
        return "  ".join(f"{name} {num(value)}" for name, value in m.items())
    words = [
        f"{num(m[name])} {unit}"
        for name, unit in (("gb_per_s", "GB/s"), ("tflop_per_s", "TFLOP/s"), ("tokens_per_s", "tokens/s"))
        if m.get(name)
    ]
    words += [f"{percent(m[name])} {of}" for name, of in (("floor", "of floor"), ("mfu", "MFU")) if name in m]
    words += [f"host {num(m['host_ms'])} ms"] if "host_ms" in m else []
    words += [
        f"{word} {num(m[name])} MiB"
        for name, word in (("peak_mib", "peak"), ("predicted_mib", "predicted"))
        if name in m
    ]
    return "  ".join(words)
