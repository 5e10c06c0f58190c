"""The tables of a report. report.py writes them as text and as a page.

"Ours" is the provider "triton" where the report has it, and otherwise "eager", our functions on PyTorch's operators. A
ratio is a competitor's time over ours: above 1, ours is faster. Its mark: ▲ (or ▼) where ours was faster (slower) in
more than four fifths of the rounds, = otherwise.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bench.peers import OWN, STEP_PEERS
from bench.record import CONTROL, LADDER, Report, Row, params_text
from model.report.charts import NONE, num
from model.report.pages import SYMBOLS, Cell, Table, cell, table

TIMES = "\N{MULTIPLICATION SIGN}"
PARTS = ("parameters", "gradients", "optimizer", "activations", "workspace", "working")
# The step that each step of the ladder adds to. Its gain is measured against the nearest one below that has a time.
BUILDS_ON = {
    "eager": "plain", "compile": "eager", "+attention": "eager", "+layer_norm": "+attention", "+gelu": "+layer_norm",
    "triton": "+gelu", "triton+graph": "triton", "trainer": "triton+graph",
    **dict.fromkeys(("compile+graph", *STEP_PEERS), "compile"),
}  # fmt: skip
_ORDER = (
    "triton", "untuned", "triton+graph", *LADDER, "sdpa", "sdpa_full", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient",
    "sdpa_math", "flex", "liger", "cce", "cce_exact", "fla", "hf", "hf_static", "hf+patch", "hf+liger", "nanogpt",
)  # fmt: skip
_CLOCKS = ("events", "graph", "wall")
# Columns of training runs: head, metric, format.
QUALITY: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("s of steps", "steps_s", num), ("steps", "step", "{:,.0f}".format), ("tokens", "tokens", "{:,.0f}".format),
    ("validation loss", "loss", "{:.4f}".format), ("bits per byte", "bits_per_byte", "{:.4f}".format),
)  # fmt: skip
_STATES = {
    "sm_mhz": "MHz, multiprocessors", "memory_mhz": "MHz, memory", "watts": "W", "celsius": "°C", "load": "load",
}  # fmt: skip


def percent(value: float) -> str:
    return f"{num(value * 100)} %"


def times(value: float) -> str:
    return f"{num(value)}{TIMES}"


def between(low: float, high: float) -> str:
    return f"{num(low)}{NONE}{num(high)}"


class Ratio(NamedTuple):
    """The time of one row over another's. mid: ratio of the medians; low, high: p20, p80 of the rounds' ratios."""

    mid: float
    low: float
    high: float

    @property
    def mark(self) -> str:
        return "win" if self.low > 1 else "loss" if self.high < 1 else "tie"


def ratio(row: Row, base: Row) -> Ratio:
    """The time of `row` over that of `base`, of the same group."""
    rounds = [a / b for a, b in zip(row.seconds, base.seconds, strict=False)]
    return Ratio(row.ms() / base.ms(), *np.quantile(rounds, (0.2, 0.8)).tolist())


@dataclass(frozen=True)
class Group:
    """Competitors on one case with one clock. rows: those with a time, in display order; failed: provider -> error."""

    params: dict[str, Any]
    clock: str
    rows: dict[str, Row]
    failed: dict[str, str]

    def get(self, name: str) -> str:
        return str(self.params.get(name, ""))

    def metric(self, provider: str, name: str) -> float | None:
        return self.rows[provider].metrics.get(name) if provider in self.rows else None

    def label(self, *omit: str) -> str:
        return params_text(self.params, *omit)


def ours(report: Report) -> str:
    return "triton" if any(row.provider == "triton" and row.kind != "memory" for row in report.rows) else "eager"


def ordered(providers: Iterable[str], order: Sequence[str] = _ORDER) -> list[str]:
    """Those of `order`, then the others as they come."""
    return sorted(dict.fromkeys(providers), key=lambda name: order.index(name) if name in order else len(order))


def groups(report: Report, kind: str, **params: Any) -> list[Group]:
    """The groups of a kind, and with these parameters, that have a time."""
    timed: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in report.rows:
        if row.kind == kind and row.seconds and params.items() <= row.params.items():
            timed.setdefault((tuple(row.params.items()), row.clock), {})[row.provider] = row
    failed = [row for row in report.rows if row.kind == kind and row.error]
    order = (*LADDER, *_ORDER) if kind == "train" else _ORDER
    made = []
    for (items, clock), rows in timed.items():
        of = dict(items)
        errors = {f.provider: f.error for f in failed if f.provider not in rows and f.covers(of, clock)}
        if names := [name for name in ordered(rows, order) if name != CONTROL]:
            made.append(Group(of, clock, {name: rows[name] for name in names}, errors))
    return made


def split(members: Iterable[Group], *names: str) -> dict[tuple[str, ...], list[Group]]:
    """Groups by these parameters and their clock."""
    parts: dict[tuple[str, ...], list[Group]] = {}
    for group in members:
        parts.setdefault((*map(group.get, names), group.clock), []).append(group)
    return parts


def ladder_step(group: Group, provider: str) -> tuple[str, float] | None:
    """The nearest timed step below, and the speed-up over it."""
    below = BUILDS_ON.get(provider) if provider in group.rows else None
    while below is not None and below not in group.rows:
        below = BUILDS_ON.get(below)
    return None if below is None else (below, group.rows[below].ms() / group.rows[provider].ms())


def _time(group: Group, provider: str, base: str = "") -> Cell:
    """p50 in ms with p20 and p80, and its ratio to the time of `base`; the error of a failed provider as a tooltip."""
    row, ours_ = group.rows.get(provider), group.rows.get(base)
    if row is None:
        error = group.failed.get(provider, "")
        return Cell("failed", mark="failed", tip=error) if error else Cell(NONE)
    r = ratio(row, ours_) if ours_ and provider != base else None
    note, mark = (times(r.mid), r.mark) if r else ("", "")
    return Cell(num(row.ms()), row.ms(), note, between(row.ms(20), row.ms(80)), mark)


def _speed(group: Group, provider: str, base: str) -> Cell:
    """The speed relative to `base`; ▲ where this provider is faster."""
    if provider == base or provider not in group.rows or base not in group.rows:
        return Cell(NONE)
    r = ratio(group.rows[base], group.rows[provider])
    in_turn = group.metric(provider, "interleaved") != 0  # else rounds of the two do not belong together
    return Cell("", r.mid, times(r.mid), mark=r.mark if in_turn else "")


def _called(provider: str, us: str) -> str:
    return f"{provider} (ours)" if provider == us else provider


def _providers(members: Iterable[Group], us: str) -> list[str]:
    names = (name for group in members for name in (*group.rows, *group.failed))
    return ordered(ordered(names), (us,))


def param_columns(members: Iterable[Group], *names: str) -> dict[str, list[Cell]]:
    return {name: [Cell(group.get(name)) for group in members] for name in names}


def kernel_tables(report: Report, op: str) -> list[Table]:
    """The times of a kernel by clock and dtype, then the host time and the memory."""
    us, made = ours(report), []
    parts = split(groups(report, "kernels", op=op), "dtype")
    for (dtype, clock), members in parts.items():
        names = _providers(members, us)
        first, *others = ((f"{_called(n, us)}, ms", [_time(g, n, us) for g in members]) for n in names)
        columns = param_columns(members, "case", "mode") | dict([first])
        columns["of floor"] = [cell(g.metric(us, "floor"), percent) for g in members]
        columns["GB/s"] = [cell(g.metric(us, "gb_per_s")) for g in members]
        columns["TFLOP/s"] = [cell(g.metric(us, "tflop_per_s") or None) for g in members]  # 0 without a product
        made.append(table(f"{op}, {dtype}, {clock}", columns | dict(others), 2))
    for name, what in (("host_ms", "host time to issue a call, ms"), ("peak_mib", "memory beyond the inputs, MiB")):
        measured: dict[str, list[Group]] = {}  # by one clock, as all clocks give the same
        for (dtype, _), members in parts.items():
            if with_metric := [g for g in members if any(name in row.metrics for row in g.rows.values())]:
                measured.setdefault(dtype, with_metric)
        for dtype, members in measured.items():
            columns = param_columns(members, "case", "mode")
            columns |= {_called(p, us): [cell(g.metric(p, name)) for g in members] for p in _providers(members, us)}
            made.append(table(f"{op}, {dtype}: {what}", columns, 2, folded=True))
    return made


def summary_tables(report: Report) -> list[Table]:
    """Each kernel against each competitor, over all cases and modes: one table a clock."""
    us, made = ours(report), []
    for (clock,), members in split(groups(report, "kernels")).items():
        parts = split(members, "op", "dtype")
        columns = {"kernel": [Cell(op) for op, _, _ in parts], "dtype": [Cell(dtype) for _, dtype, _ in parts]}
        for name in _providers(members, us):
            if name != us:
                columns[name] = [_overall(part, name, us) for part in parts.values()]
        note = "Geometric mean of a competitor's time over ours; then in how many cases ours was faster, equal, slower."
        made.append(table(f"Ours against each, {clock}", columns, 2, note=note))
    return [summary for summary in made if len(summary.head) > 2]


def _overall(members: list[Group], peer: str, us: str) -> Cell:
    each = [ratio(group.rows[peer], group.rows[us]) for group in members if {peer, us} <= group.rows.keys()]
    if not each:
        return Cell(NONE)
    mean = statistics.geometric_mean(r.mid for r in each)
    count = {mark: sum(r.mark == mark for r in each) for mark in SYMBOLS}
    mark = max(count, key=lambda mark: count[mark])
    return Cell(times(mean), mean, f"{count['win']}/{count['tie']}/{count['loss']}", mark=mark)


def train_table(group: Group, report: Report, parts: tuple[str, ...] = PARTS) -> Table:
    """A training step, a row for each provider and a column for each of these parts of the memory."""
    names = ordered((*group.rows, *group.failed), (*LADDER, *_ORDER))
    gains = []
    for name in names:
        step = ladder_step(group, name)
        gains.append(Cell(f"{step[1] - 1:+.1%} on {step[0]}".replace("%", " %"), step[1]) if step else Cell(NONE))
    columns = {
        "provider": [Cell(_called(name, ours(report))) for name in names],
        "step, ms": [_time(group, name) for name in names],
        "tokens/s": [cell(group.metric(name, "tokens_per_s")) for name in names],
        "speed against eager": [_speed(group, name, "eager") for name in names],
        "gain of the step": gains,
        "MFU": [cell(group.metric(name, "mfu"), percent) for name in names],
    }
    for metric in ("peak", "predicted", *parts):
        columns[f"{metric} MiB"] = [cell(group.metric(name, f"{metric}_mib")) for name in names]
    return table(f"{group.label()}, {group.clock}", columns)


def generate_tables(report: Report) -> list[Table]:
    """Greedy generation: the prompt, then token by token; a table for all batches of one setting."""
    us, made = ours(report), []
    parts = split(groups(report, "generate"), "preset", "prompt", "tokens", "dtype", "prompts")
    for (preset, prompt, tokens, dtype, prompts, clock), members in parts.items():
        phases: dict[str, dict[str, Group]] = {}
        for group in members:
            phases.setdefault(group.get("batch"), {})[group.get("phase")] = group
        rows = [(batch, of, name) for batch, of in phases.items() for name in _providers(of.values(), us)]
        columns = {
            "batch": [Cell(batch, float(batch) if batch.isdigit() else None) for batch, _, _ in rows],
            "provider": [Cell(_called(name, us)) for _, _, name in rows],
        }
        for phase, head in (("prefill", "prefill, ms"), ("decode", f"{tokens} tokens, ms")):
            timed = [(of.get(phase, Group({}, "", {}, {})), name) for _, of, name in rows]
            columns[head] = [_time(group, name) for group, name in timed]
            columns[f"{phase}, tokens/s"] = [cell(group.metric(name, "tokens_per_s")) for group, name in timed]
            columns[f"{phase} speed against hf"] = [_speed(group, name, "hf") for group, name in timed]
        if any(group.metric(name, "weights_mib") for group, name in timed):
            columns["weights MiB"] = [cell(group.metric(name, "weights_mib")) for group, name in timed]
        read = f"prompts of {max(1, int(prompt) // 4)} to {prompt}" if prompts == "ragged" else f"prompt of {prompt}"
        made.append(table(f"{preset} {dtype}, {read}, {tokens} new tokens, {clock}", columns, 2))
    return made


def memory_settings(report: Report) -> dict[tuple[str, ...], list[Row]]:
    """Rows of kind "memory" by preset, context and dtype."""
    parts: dict[tuple[str, ...], list[Row]] = {}
    for row in report.rows:
        if row.kind == "memory" and row.metrics:
            key = tuple(str(row.params.get(name, "")) for name in ("preset", "context", "dtype"))
            parts.setdefault(key, []).append(row)
    return parts


def memory_tables(report: Report) -> list[Table]:
    """The memory of a training step, predicted by part and measured."""
    made = []
    for (preset, context, dtype), rows in memory_settings(report).items():
        columns = {
            "batch": [Cell(str(row.params.get("batch", "")), row.params.get("batch")) for row in rows],
            "backend": [Cell(row.provider) for row in rows],
        }
        for head, name in (*((part, part) for part in PARTS), ("predicted", "predicted"), ("measured", "peak")):
            columns[f"{head} MiB"] = [cell(row.metrics.get(f"{name}_mib")) for row in rows]
        sizes = [(row.metrics.get("predicted_mib"), row.metrics.get("peak_mib")) for row in rows]
        columns["measured / predicted"] = [cell(peak / size if peak and size else None) for size, peak in sizes]
        made.append(table(f"{preset} {dtype}, context {context}", columns, 2))
    return made


def quality_tables(report: Report) -> list[Table]:
    """Training runs to a loss, or for a time: a row for each provider with the means over its seeds."""
    settings: dict[str, dict[str, list[Row]]] = {}
    for row in report.rows:
        if row.kind == "quality":
            settings.setdefault(params_text(row.params), {}).setdefault(row.provider, []).append(row)
    made = []
    for setting, providers in settings.items():
        timed = {name: [row for row in rows if row.seconds] for name, rows in providers.items()}
        columns = {
            "provider": [Cell(name) for name in providers],
            "runs": [Cell(f"{len(timed[name])} of {len(rows)}") for name, rows in providers.items()],
            "time, s": [_mean([row.seconds[0] for row in rows]) for rows in timed.values()],
        }
        for head, name, show in QUALITY:
            columns[head] = [_mean([row.metrics[name] for row in rows], show) for rows in timed.values()]
        made.append(table(setting, columns))
    return made


def _mean(values: Sequence[float], show: Callable[[float], str] = num) -> Cell:
    """Mean and standard deviation, with the lowest and the highest."""
    if not values:
        return Cell(NONE)
    span = f"{show(min(values))}{NONE}{show(max(values))}" if len(values) > 1 else ""
    return Cell(mean_text(values, show), statistics.mean(values), span=span)


def mean_text(values: Sequence[float], show: Callable[[float], str] = num) -> str:
    """Mean, and standard deviation where there are several values: ``151 ± 3.20``."""
    mean = show(statistics.mean(values))
    return f"{mean} ± {show(statistics.stdev(values))}" if len(values) > 1 else mean


def other_table(report: Report, kind: str) -> Table:
    """Rows of a kind without a table of its own."""
    rows = [(group, name) for group in groups(report, kind) for name in group.rows]
    columns = {
        "what": [Cell(group.label()) for group, _ in rows],
        "provider": [Cell(name) for _, name in rows],
        "ms": [_time(group, name) for group, name in rows],
        "clock": [Cell(group.clock) for group, _ in rows],
    }
    return table(kind, columns, 2)


def failures(report: Report) -> Table:
    """What has no time, and why: a row for each error, however many groups it affects."""
    same: dict[tuple[str, str, str], list[Row]] = {}
    for row in report.rows:
        if row.error:
            of = str(row.params.get("op", row.params.get("preset", "")))
            same.setdefault((of, row.provider, row.error), []).append(row)
    rows = []
    for first, *more in same.values():
        what = f"{first.group} and {len(more)} more" if more else first.group
        rows.append((Cell(first.kind), Cell(what), Cell(first.provider), Cell(first.error)))
    return Table("Not timed", ["kind", "what", "provider", "why"], rows, 4)


def facts(report: Report) -> list[tuple[str, str]]:
    """Where, when, with what and how a report was made: (name, value)."""
    m, method, clocks = report.machine, report.method, {row.clock for row in report.rows if row.seconds}
    memory, commit = m.get("memory_mib"), report.commit.get("id")
    names = (
        "compute_capability", "multiprocessors", "driver", "cuda", "torch", "triton", "launch_tables",
        "python_version", "system",
    )  # fmt: skip
    pairs = [
        ("device", report.device),
        ("device memory", f"{num(memory)} MiB" if memory else ""),
        *((name.removesuffix("_version").replace("_", " "), str(m.get(name) or "")) for name in names),
        ("commit", f"{commit}{', with changes' if report.commit.get('dirty') else ''}" if commit else ""),
        ("date", report.datetime),
        *((k, v) for k, v in method.items() if isinstance(v, str) and (k in clocks or k not in _CLOCKS)),
    ]
    if copy := copy_rate(report):
        pairs.append(("measured roof, copy", f"{num(copy / 1e9)} GB/s"))
    pairs += [(f"measured roof, {dtype}", f"{num(rate / 1e12)} TFLOP/s") for dtype, rate in flop_rates(report).items()]
    return [(name, value) for name, value in pairs if value] + _control_facts(report)


def copy_rate(report: Report) -> float | None:
    """The rate of the largest copy on this device, which no cache holds: bytes (read and written) a second."""
    copies = {int(size): seconds for size, seconds in report.method.get("roofs", {}).get("copy", {}).items()}
    return max(copies) / copies[max(copies)] if copies else None


def flop_rates(report: Report) -> dict[str, float]:
    """The measured rate of a matrix product by dtype, FLOP/s."""
    return dict(report.method.get("roofs", {}).get("flops", {}))


def _control_facts(report: Report) -> list[tuple[str, str]]:
    """The control's time over all groups, and the state of the machine."""
    rows = [row for row in report.rows if row.provider == CONTROL and row.seconds]
    pairs = []
    for clock in dict.fromkeys(row.clock for row in rows):
        medians = [row.ms() for row in rows if row.clock == clock]
        words = f"{num(min(medians))} to {num(max(medians))} ms in {len(medians)} groups"
        pairs.append((f"control, {clock}", f"{words}, half of them below {num(statistics.median(medians))} ms"))
    states = [
        f"{num(min(values))} to {num(max(values))} {unit}"
        for name, unit in _STATES.items()
        if (values := [row.metrics[name] for row in rows if name in row.metrics])
    ]
    return pairs + ([("while measuring", "; ".join(states))] if states else [])


def highlights(report: Report) -> list[tuple[str, str]]:
    """The main figures of a report: (value, meaning). Losses count like wins."""
    us, pairs = ours(report), []
    for (clock,), members in split(groups(report, "kernels")).items() if us != "eager" else ():
        played = [group.rows for group in members if us in group.rows]
        marks = [ratio(row, rows[us]).mark for rows in played for p, row in rows.items() if p not in (us, *OWN)]
        if marks:
            words = f"comparisons of kernels won by {us}, {marks.count('loss')} lost ({clock})"
            pairs.append((f"{marks.count('win')} of {len(marks)}", words))
    trained = [group for group in groups(report, "train") if us in group.rows][-1:]
    decoded = groups(report, "generate", phase="decode")[:1]
    for what, members, peers in (("training", trained, ("compile", "eager")), ("decoding", decoded, ("hf",))):
        for group in members:
            mine = [name for name in ("triton", "triton+graph", "trainer", us) if name in group.rows]
            if best := min(mine, key=lambda name: group.rows[name].ms(), default=""):
                ms = {name: row.ms() for name, row in group.rows.items() if name != best}
                against = [f": {times(ms[p] / group.rows[best].ms())} {p}" for p in peers if p in ms]
                words = f"tokens/s in {what}, {best}, {group.label('phase')}{''.join(against[:1])}"
                pairs.append((num(group.metric(best, "tokens_per_s")), words))
    return pairs
