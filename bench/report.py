"""Reports as Markdown, as one self-contained HTML page, as tables in a README, and as lines on a terminal.

tables.py arranges the rows and charts.py draws them.
"""

from __future__ import annotations

import html as entities
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from bench import charts, tables
from bench.peers import OWN
from bench.record import CONTROL, Report, Row
from bench.tables import Group, percent, times
from model.cli import UserError
from model.report.charts import NONE, num
from model.report.pages import SYMBOLS, Cell, Figure, Table, page, table

NO_GPU = "No report of a GPU has been committed yet."
NO_REPORT = "No report of this kind has been committed yet."
_CLOCKS = {"events": "one call, by CUDA events", "graph": "device alone, by CUDA graph", "wall": "wall time"}
_MARKS = "faster in more than four fifths of the rounds, ▼ slower in more than four fifths, = neither."
_RATIO = (
    "Times are p50 in ms, followed by the ratio of a competitor's time to ours: above 1, ours is faster. "
    f"▲ ours was {_MARKS}"
)
_SPEED = f"▲ the provider was {_MARKS}"
_QUALITY = (
    "Mean and standard deviation over the runs that reached the loss, one a seed. The time is that of steps, "
    "evaluations and checkpoints, up to the end of the evaluation."
)
_EAGER = "No Triton kernel was timed here: ours are this project's functions, which run PyTorch's operators, as eager."
_LEGEND = (
    "In the charts of ratios a dot is a case: ● ours faster, ▼ slower, ▮ neither; its line is p20 to p80 of the "
    "rounds' ratios. Lanes of a row, from the top: forward, backward, both. At its end: cases in which ours is "
    "faster, of all."
)
_SPREAD_COLUMNS = 4  # with more providers p20 and p80 do not fit into a line of Markdown
_COMMANDS = {kind: f"python -m bench {kind}" for kind in ("kernels", "train", "generate", "memory", "quality")}


@dataclass
class Section:
    title: str
    anchor: str
    level: int = 3  # of the heading; 4 inside the previous section
    notes: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)

    def draw(self, title: str, svg: str) -> None:
        if svg:
            self.figures.append(Figure(title, Markup(svg)))  # ElementTree has escaped it


def sections(report: Report, anchor: str) -> list[Section]:
    """The content of a report in order. anchor: prefix of the ids of its headings."""
    made = [*_kernels(report, anchor), *_train(report, anchor), _generate(report, anchor), _memory(report, anchor)]
    made.append(_quality(report, anchor))
    kinds = dict.fromkeys(row.kind for row in report.rows if row.seconds and row.kind not in _COMMANDS)
    for i, kind in enumerate(kinds):
        made.append(Section(kind, f"{anchor}-other{i}", tables=[tables.other_table(report, kind)]))
    made.append(_missing(report, anchor))
    return [section for section in made if section.notes or section.figures or section.tables]


def _kernels(report: Report, anchor: str) -> list[Section]:
    members, us = tables.groups(report, "kernels"), tables.ours(report)
    if not members:
        return []
    head = Section("Kernels", f"{anchor}-kernels", notes=[_RATIO, *([_EAGER] if us == "eager" else [])])
    head.tables = tables.summary_tables(report)
    device = _device_time(members)
    clock = _CLOCKS.get(device[0].clock, device[0].clock)
    head.draw(f"Share of its floor that {us} reaches ({clock})", charts.floors(device, us, "Fractions of the floor"))
    head.draw(f"Roofline ({clock})", charts.roofline(device, report, "Roofline"))
    made = [head]
    for i, op in enumerate(dict.fromkeys(group.get("op") for group in members)):
        section = Section(op, f"{anchor}-op{i}", level=4, tables=tables.kernel_tables(report, op))
        for (dtype, clock), part in tables.split(tables.groups(report, "kernels", op=op), "dtype").items():
            svg = charts.ratios(part, us, f"{op}, {dtype}: ratios")
            section.draw(f"{op}, {dtype}: time of each over ours ({_CLOCKS.get(clock, clock)})", svg)
        made.append(section)
    if any(section.figures for section in made[1:]):
        head.notes.append(_LEGEND)
    return made


def _device_time(members: list[Group]) -> list[Group]:
    """The groups by the clock of the device alone, if there is one; else by the first clock."""
    by_clock = tables.split(members)
    return by_clock.get(("graph",)) or next(iter(by_clock.values()))


def _train(report: Report, anchor: str) -> list[Section]:
    note = f"Forward, backward, clipping and AdamW; the speed is eager's time over the provider's. {_SPEED}"
    made = [Section("Training step", f"{anchor}-train", notes=[note])]
    for i, group in enumerate(tables.groups(report, "train")):
        label = f"{group.label()}, {group.clock}"
        section = Section(label, f"{anchor}-train{i}", level=4, tables=[tables.train_table(group, report)])
        section.draw("Tokens/s, and the gain of each step", charts.ladder(group, "tokens_per_s", f"Ladder, {label}"))
        section.draw("Peak memory in MiB", charts.ladder(group, "peak_mib", f"Peak memory, {label}"))
        made.append(section)
    return made if len(made) > 1 else []


def _generate(report: Report, anchor: str) -> Section:
    made = tables.generate_tables(report)
    note = f"Greedy, with a key-value cache; the speed is hf's time over the provider's. {_SPEED}"
    return Section("Generation", f"{anchor}-generate", notes=[note] if made else [], tables=made)


def _memory(report: Report, anchor: str) -> Section:
    section = Section("Memory of a training step", f"{anchor}-memory", tables=tables.memory_tables(report))
    for (preset, context, dtype), rows in tables.memory_settings(report).items():
        for batch in dict.fromkeys(row.params.get("batch") for row in rows):
            title = f"{preset} {dtype}, batch {batch}, context {context}"
            section.draw(title, charts.memory([r for r in rows if r.params.get("batch") == batch], f"Memory: {title}"))
    if section.figures:
        section.notes = ["Predicted by part, and the measured peak, in GiB; dashed lines are the sizes of cards."]
    return section


def _quality(report: Report, anchor: str) -> Section:
    made = tables.quality_tables(report)
    return Section("Training to a loss", f"{anchor}-quality", notes=[_QUALITY] if made else [], tables=made)


def _missing(report: Report, anchor: str) -> Section:
    missing = [(Cell(name), Cell(why)) for name, why in report.missing.items()]
    made = [
        tables.failures(report),
        Table("Missing providers", ["provider", "why"], missing, 2),
        Table("Skipped", ["what"], [(Cell(what),) for what in report.dropped]),
    ]
    return Section("Not measured", f"{anchor}-not-measured", tables=[each for each in made if each.rows])


def markdown(reports: list[Report]) -> str:
    lines = ["# Benchmarks"]
    for i, report in enumerate(reports):
        lines += ["", f"## {escape(report.device)}", ""]
        lines += [f"- {escape(name)}: {escape(value)}" for name, value in tables.facts(report)]
        if pairs := tables.highlights(report):
            lines += ["", *(f"- **{escape(value)}** {escape(meaning)}" for value, meaning in pairs)]
        for section in sections(report, f"r{i}"):
            lines += ["", f"{'#' * section.level} {escape(section.title)}"]
            lines += [line for note in section.notes if note != _LEGEND for line in ("", escape(note))]
            lines += [line for each in section.tables for line in ("", *markdown_table(each))]
    return "\n".join(lines) + "\n"


def markdown_table(table: Table) -> list[str]:
    spreads = sum(any(row[i].span for row in table.rows) for i in range(len(table.head))) <= _SPREAD_COLUMNS
    rules = ["---" if i < table.names else "---:" for i in range(len(table.head))]
    body = [[_markdown_cell(cell, spreads) for cell in row] for row in table.rows]
    lines = [f"| {' | '.join(line)} |" for line in ([escape(name) for name in table.head], rules, *body)]
    return [f"**{escape(table.title)}.** {escape(table.note)}".rstrip(), "", *lines]


def _markdown_cell(cell: Cell, spreads: bool) -> str:
    span = f"({cell.span})" if cell.span and spreads else ""
    note = f"{SYMBOLS.get(cell.mark, '')} {cell.note}".strip() if cell.note else ""
    return escape(" ".join(filter(None, [cell.text, span, note])))


def escape(text: str) -> str:
    """Text that Markdown shows verbatim, on one line."""
    plain = entities.escape(" ".join(text.split()), quote=False)
    outside = "(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"  # an underscore inside a word has no meaning
    return re.sub(rf"[\\`*\[\]|]|{outside}", r"\\\g<0>", plain)


def html(reports: list[Report]) -> str:
    """The reports as one self-contained page."""
    shown = [
        {"report": r, "anchor": f"r{i}", "facts": tables.facts(r), "highlights": tables.highlights(r),
         "sections": sections(r, f"r{i}")}
        for i, r in enumerate(reports)
    ]  # fmt: skip
    return page(Path(__file__).with_name("report.html.jinja"), reports=shown)


def action_entries(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """What github-action-benchmark reads as `customSmallerIsBetter`: the median time of each row, and its peak memory.

    Several runs of one device give the median of theirs. UserError for reports of different devices.
    """
    if len(devices := sorted({report.device for report in reports})) > 1:
        raise UserError(f"the reports are of different devices: {'; '.join(devices)}\nname those of one device")
    rows: dict[str, list[Row]] = {}
    for row in (row for report in reports for row in report.rows if row.seconds):
        rows.setdefault(f"{row.kind} {row.group} [{row.provider}]", []).append(row)
    versions = {f"{name} {r.machine[name]}" for r in reports for name in ("torch", "triton") if r.machine.get(name)}
    extra, entries = "\n".join([*devices, *sorted(versions)]), list[dict[str, Any]]()
    for name, runs in rows.items():
        median, low, high = (statistics.median(row.ms(p) for row in runs) for p in (50, 20, 80))
        spread = f"{num(low)} to {num(high)}"
        entries.append({"name": name, "unit": "ms", "value": float(f"{median:.5g}"), "range": spread, "extra": extra})
        if peaks := [row.metrics["peak_mib"] for row in runs if "peak_mib" in row.metrics]:
            peak = round(statistics.median(peaks), 1)
            entries.append({"name": f"{name}, peak memory", "unit": "MiB", "value": peak, "extra": extra})
    return entries


def readme_tables(reports: Mapping[str, Report]) -> dict[str, str]:
    """The text for each marker of a README. reports: by path relative to the README's folder, for the links."""
    return {f"bench {kind}": _readme_part(reports, kind) for kind in _COMMANDS}


def _readme_part(reports: Mapping[str, Report], kind: str) -> str:
    parts, on_gpu = [], False
    for name, report in reports.items():
        if shown := _readme_pick(report, kind):
            on_gpu |= not report.on_cpu
            versions = ", ".join(f"{n} {report.machine[n]}" for n in ("torch", "triton") if report.machine.get(n))
            command = report.method.get("command", _COMMANDS[kind])
            parts.append(f"{escape(report.device)}, {escape(versions)}: `{command}`, [{name}]({name})")
            parts += ["\n".join(markdown_table(table)) for table in shown]
    if not parts:
        return NO_REPORT
    return "\n\n".join(parts if on_gpu else [NO_GPU, *parts])


def _readme_pick(report: Report, kind: str) -> list[Table]:
    """The tables of a kind that belong in a README."""
    if kind == "kernels":
        return _readme_kernels(report)
    if kind == "train":  # of each setting the largest batch, which is the last one
        last = {(g.label("batch"), g.clock): g for g in tables.groups(report, "train")}
        return [tables.train_table(group, report, parts=()) for group in last.values()]
    picked = {"generate": tables.generate_tables, "memory": tables.memory_tables, "quality": tables.quality_tables}
    return picked[kind](report)


def _readme_kernels(report: Report) -> list[Table]:
    """Each kernel once, on its first case: forward and backward, or only forward if nothing else was timed."""
    members, us = tables.groups(report, "kernels"), tables.ours(report)
    if not members:
        return []
    timed = _device_time(members)
    clock, picked = timed[0].clock, []
    for part in tables.split(timed, "op", "dtype").values():
        first = [group for group in part if group.params.get("case") == part[0].params.get("case")]
        picked.append({g.get("mode"): g for g in first}.get("both", first[0]))

    def against(group: Group, name: str) -> str:
        both = name != us and {name, us} <= group.rows.keys()
        return times(tables.ratio(group.rows[name], group.rows[us]).mid) if both else NONE

    def fastest(group: Group) -> str:
        others = {n: r for n, r in group.rows.items() if n not in (us, "eager", "compile", *OWN)}
        name = min(others, key=lambda name: others[name].ms(), default="")
        return f"{against(group, name)} {name}" if name else NONE

    columns = {
        "kernel": [Cell(g.get("op")) for g in picked],
        **tables.param_columns(picked, "case", "dtype", "mode"),
        f"{us}, ms": [Cell(num(g.rows[us].ms()) if us in g.rows else "failed") for g in picked],
        "of floor": [tables.cell(g.metric(us, "floor"), percent) for g in picked],
        **{f"{name} / ours": [Cell(against(g, name)) for g in picked] for name in ("eager", "compile")},
        "fastest other / ours": [Cell(fastest(g)) for g in picked],
    }
    note = "Ratios of p50: above 1, ours is faster."
    return [table(f"Kernels, {_CLOCKS.get(clock, clock)}", columns, 4, note=note)]


def update_readme(text: str, parts: Mapping[str, str]) -> str:
    """Replace what is between `<!-- NAME -->` and `<!-- /NAME -->` by each part. UserError without the markers."""
    for name, part in parts.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, opened, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (opened and closed):
            raise UserError(f"the README has no place for {name}: it needs the lines {begin} and {end}")
        text = f"{before}{begin}\n{part}\n{end}{after}"
    return text


def line(row: Row) -> str:
    """A row as a line of text: kind, case, provider, p50 (p20 to p80) and its main metrics, or its error."""
    head = f"{row.kind:<8} {row.group:<58} {row.provider:<14}"
    if row.error:
        return f"{head} {row.error}"
    time = f"{num(row.ms()):>8} ms ({num(row.ms(20))} to {num(row.ms(80))})" if row.seconds else ""
    if row.kind == "quality":
        time = f"{num(row.seconds[0]):>8} s"
    return f"{head} {time:<32} {'  '.join(_metrics(row))}".rstrip()


def _metrics(row: Row) -> list[str]:
    m = row.metrics
    if row.provider == CONTROL:
        return [f"{name} {num(value)}" for name, value in m.items()]
    rates = {"gb_per_s": "GB/s", "tflop_per_s": "TFLOP/s", "tokens_per_s": "tokens/s"}
    words = [f"{num(m[name])} {unit}" for name, unit in rates.items() if m.get(name)]
    words += [f"{percent(m[name])} {of}" for name, of in (("floor", "of floor"), ("mfu", "MFU")) if name in m]
    words += [f"host {num(m['host_ms'])} ms"] if "host_ms" in m else []
    if "bits_per_byte" in m:
        words += [f"{m['step']:,.0f} steps", f"{m['tokens']:,.0f} tokens", f"loss {m['loss']:.4f}"]
        words += [f"{m['bits_per_byte']:.4f} bits per byte"]
    return words + [f"{word} {num(m[f'{word}_mib'])} MiB" for word in ("peak", "predicted") if f"{word}_mib" in m]
