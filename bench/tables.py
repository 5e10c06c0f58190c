"""What a report shows: rows of a report side by side, as tables of cells. report.py writes them as text and as a page.

"Ours" is the provider "triton" where the report has it; elsewhere our functions run PyTorch's operators, and "eager" is
ours. A ratio is a competitor's time over ours: above 1, ours is faster. Its mark says how sure that is: ▲ (or ▼) where
ours was the faster (slower) in more than four fifths of the rounds, = otherwise.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bench.record import CONTROL, Report, Row
from bench.train_step import LADDER
from model.report.charts import NONE, num

TIMES = "\N{MULTIPLICATION SIGN}"
SYMBOLS = {"win": "▲", "loss": "▼", "tie": "="}
PARTS = ("parameters", "gradients", "optimizer", "activations", "workspace", "working")
# what each step of the ladder adds to; the last of these that has a time is what its gain is told against
BUILDS_ON = {
    "eager": "plain", "compile": "eager", "+attention": "eager", "+layer_norm": "+attention", "+gelu": "+layer_norm",
    "triton": "+gelu", "triton+graph": "triton", "trainer": "triton+graph",
}  # fmt: skip
_ORDER = (
    "triton", "triton+graph", "plain", "eager", "compile", "+attention", "+layer_norm", "+gelu", "sdpa", "sdpa_full",
    "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "sdpa_math", "flex", "liger", "cce", "cce_exact", "fla", "hf",
    "hf_static", "hf+liger", "nanogpt",
)  # fmt: skip


def percent(value: float | None) -> str:
    return NONE if value is None else f"{num(value * 100)} %"


def times(value: float) -> str:
    """How many times, with its sign."""
    return f"{num(value)}{TIMES}"


def between(low: float, high: float) -> str:
    return f"{num(low)}{NONE}{num(high)}"


def spread(values: Sequence[float]) -> tuple[float, float]:
    """p20 and p80."""
    if len(values) == 1:
        return values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[1], tenths[7]


class Ratio(NamedTuple):
    """How many times as long one row takes as another. mid: of the medians; low, high: p20, p80 of round by round."""

    mid: float
    low: float
    high: float

    @property
    def mark(self) -> str:
        return "win" if self.low > 1 else "loss" if self.high < 1 else "tie"


def ratio(row: Row, base: Row) -> Ratio:
    """The time of `row` over that of `base`, both of one group."""
    rounds = [a / b for a, b in zip(row.seconds, base.seconds, strict=False)]
    return Ratio(row.ms() / base.ms(), *spread(rounds))


# --- picking ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Competitors on one thing with one clock. rows: those with a time, in the order in which they are shown; failed:
    provider -> why it has none."""

    params: dict[str, Any]
    clock: str
    rows: dict[str, Row]
    failed: dict[str, str]

    def get(self, name: str) -> str:
        """A parameter as text; empty where the group has none of that name."""
        return str(self.params.get(name, ""))

    def label(self, *leave_out: str) -> str:
        """The parameters but some, in a line: ``M=1024 N=768 float32 forward``."""
        words = [v if isinstance(v, str) else f"{k}={v}" for k, v in self.params.items() if k not in leave_out]
        return " ".join(words)


def ours(report: Report) -> str:
    """The provider that is ours in this report."""
    found = any(row.provider == "triton" and row.kind != "memory" for row in report.rows)
    return "triton" if found else "eager"


def ordered(providers: Iterable[str], order: Sequence[str] = _ORDER) -> list[str]:
    """Providers in the order in which they are shown: those of `order` first, others as they come."""
    names = list(dict.fromkeys(providers))
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def groups(report: Report, kind: str, **params: Any) -> list[Group]:
    """The groups of a kind in which something was timed, in the order of the report. params: only those with these."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in report.rows:
        if row.kind == kind and row.seconds and params.items() <= row.params.items():
            found.setdefault((tuple(row.params.items()), row.clock), {})[row.provider] = row
    failed = [row for row in report.rows if row.kind == kind and row.error]
    order = (*LADDER, *_ORDER) if kind == "train" else _ORDER
    made = []
    for (items, clock), rows in found.items():
        names = [name for name in ordered(rows, order) if name != CONTROL]
        errors = {
            row.provider: row.error for row in failed if row.provider not in rows and _of(row, dict(items), clock)
        }
        if names:
            made.append(Group(dict(items), clock, {name: rows[name] for name in names}, errors))
    return made


def _of(failed: Row, params: dict[str, Any], clock: str) -> bool:
    """Whether an error is about a group: one error stands for all the modes and clocks that it does not name."""
    named = {name: value for name, value in failed.params.items() if value != ""}
    return failed.clock in ("", clock) and named.items() <= params.items()


def split(found: Iterable[Group], *names: str) -> dict[tuple[str, ...], list[Group]]:
    """Groups by some of their parameters and their clock."""
    parts: dict[tuple[str, ...], list[Group]] = {}
    for group in found:
        parts.setdefault((*map(group.get, names), group.clock), []).append(group)
    return parts


def ladder_step(group: Group, provider: str) -> tuple[str, float] | None:
    """The step below a step of the ladder and the speed over it, both of those that were timed."""
    below = BUILDS_ON.get(provider)
    while below is not None and below not in group.rows:
        below = BUILDS_ON.get(below)
    return None if below is None else (below, group.rows[below].ms() / group.rows[provider].ms())


# --- tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """value: what it sorts by; note: beside the text; span: p20 and p80; mark: "win", "loss" or "tie" of the note,
    "failed", where tip says why, or nothing."""

    text: str
    value: float | None = None
    note: str = ""
    span: str = ""
    mark: str = ""
    tip: str = ""


@dataclass(frozen=True)
class Table:
    """names: how many columns on the left name the row. folded: of second interest."""

    title: str
    head: list[str]
    rows: list[list[Cell]]
    names: int = 1
    note: str = ""
    folded: bool = field(default=False, kw_only=True)


def cell(value: float | None, show: Callable[[float | None], str] = num) -> Cell:
    return Cell(show(value), value)


def trimmed(title: str, head: list[str], rows: list[list[Cell]], names: int, **more: Any) -> Table:
    """A table without the columns in which nothing stands."""
    keep = [
        i for i in range(len(head)) if i < names or any(row[i].note or row[i].text not in ("", NONE) for row in rows)
    ]
    return Table(title, [head[i] for i in keep], [[row[i] for i in keep] for row in rows], names, **more)


def _metric(row: Row | None, name: str) -> float | None:
    return row.metrics.get(name) if row else None


def _time(group: Group, provider: str) -> Cell:
    """p50 in ms with p20 and p80; why not, where it failed."""
    row = group.rows.get(provider)
    if row is None:
        why = group.failed.get(provider, "")
        return Cell("failed", mark="failed", tip=why) if why else Cell(NONE)
    return Cell(num(row.ms()), row.ms(), span=between(row.ms(20), row.ms(80)))


def _against(group: Group, provider: str, base: str) -> Cell:
    """A time, and beside it how many times that of `base`."""
    found, us = _time(group, provider), group.rows.get(base)
    if provider == base or us is None or provider not in group.rows:
        return found
    r = ratio(group.rows[provider], us)
    return Cell(found.text, found.value, times(r.mid), found.span, r.mark)


def _speed(group: Group, provider: str, base: str) -> Cell:
    """How many times as fast as `base`; ▲ where this provider is the faster."""
    if provider == base or provider not in group.rows or base not in group.rows:
        return Cell(NONE)
    r = ratio(group.rows[base], group.rows[provider])
    return Cell("", r.mid, times(r.mid), mark=r.mark)


def _text(group: Group, *names: str) -> list[Cell]:
    return [Cell(group.get(name)) for name in names]


def _called(provider: str, us: str) -> str:
    return f"{provider} (ours)" if provider == us else provider


def _providers(found: Iterable[Group], us: str) -> list[str]:
    names = ordered(name for group in found for name in (*group.rows, *group.failed))
    return ordered(names, (us,))


def kernel_tables(report: Report, op: str) -> list[Table]:
    """Everything about an operator: times by clock and precision, then what the host and the memory pay."""
    us, tables = ours(report), []
    parts = split(groups(report, "kernels", op=op), "dtype")
    for (dtype, clock), found in parts.items():
        names = _providers(found, us)
        heads = [f"{_called(name, us)}, ms" for name in names]
        head = ["case", "mode", heads[0], "of floor", "GB/s", "TFLOP/s", *heads[1:]]
        rows: list[list[Cell]] = []
        for group in found:
            row = group.rows.get(us)
            figures = [cell(_metric(row, "floor"), percent), cell(_metric(row, "gb_per_s"))]
            figures.append(cell(_metric(row, "tflop_per_s") or None))  # 0 where there is no product
            first, *others = [_against(group, name, us) for name in names]
            rows.append([*_text(group, "case", "mode"), first, *figures, *others])
        tables.append(trimmed(f"{op}, {dtype}, {clock}", head, rows, 2))
    for name, what in (("host_ms", "host time to issue a call, ms"), ("peak_mib", "memory beyond the inputs, MiB")):
        held: dict[str, list[Group]] = {}  # of one clock: that of another says the same
        for (dtype, _), found in parts.items():
            if holding := [g for g in found if any(name in row.metrics for row in g.rows.values())]:
                held.setdefault(dtype, holding)
        for dtype, found in held.items():
            names = _providers(found, us)
            rows = [[*_text(g, "case", "mode"), *(cell(_metric(g.rows.get(p), name)) for p in names)] for g in found]
            head = ["case", "mode", *(_called(p, us) for p in names)]
            tables.append(trimmed(f"{op}, {dtype}: {what}", head, rows, 2, folded=True))
    return tables


def summary_tables(report: Report) -> list[Table]:
    """Each operator against each competitor, over all cases and modes: one table a clock."""
    us, tables = ours(report), []
    for (clock,), found in split(groups(report, "kernels")).items():
        names = [name for name in _providers(found, us) if name != us]
        rows = []
        for (op, dtype, _), members in split(found, "op", "dtype").items():
            rows.append([Cell(op), Cell(dtype), *(_overall(members, name, us) for name in names)])
        note = "Geometric mean of a competitor's time over ours; then in how many cases ours was faster, equal, slower."
        tables.append(trimmed(f"Ours against each, {clock}", ["kernel", "dtype", *names], rows, 2, note=note))
    return [table for table in tables if len(table.head) > 2]


def _overall(found: list[Group], peer: str, us: str) -> Cell:
    each = [ratio(group.rows[peer], group.rows[us]) for group in found if {peer, us} <= group.rows.keys()]
    if not each:
        return Cell(NONE)
    mean = statistics.geometric_mean(r.mid for r in each)
    count = {mark: sum(r.mark == mark for r in each) for mark in SYMBOLS}
    mark = max(count, key=lambda mark: count[mark])
    return Cell(times(mean), mean, f"{count['win']}/{count['tie']}/{count['loss']}", mark=mark)


def train_table(group: Group, report: Report, parts: tuple[str, ...] = PARTS) -> Table:
    """A training step, a provider a row in the order of the ladder. parts: of its memory, a column each."""
    head = ["provider", "step, ms", "tokens/s", "speed against eager", "gain of the step", "MFU", "peak MiB"]
    head += ["predicted MiB", *(f"{part} MiB" for part in parts)]
    rows = []
    for name in ordered((*group.rows, *group.failed), (*LADDER, *_ORDER)):
        row = group.rows.get(name)
        step = ladder_step(group, name) if row else None
        gain = Cell(f"{step[1] - 1:+.1%} on {step[0]}".replace("%", " %"), step[1]) if step else Cell(NONE)
        rows.append(
            [
                Cell(_called(name, ours(report))), _time(group, name), cell(_metric(row, "tokens_per_s")),
                _speed(group, name, "eager"), gain, cell(_metric(row, "mfu"), percent), cell(_metric(row, "peak_mib")),
                cell(_metric(row, "predicted_mib")), *(cell(_metric(row, f"{part}_mib")) for part in parts),
            ]
        )  # fmt: skip
    return trimmed(f"{group.label()}, {group.clock}", head, rows, 1)


def generate_tables(report: Report) -> list[Table]:
    """Greedy generation: the prompt, then token by token; a table for all batches of one setting."""
    us, tables = ours(report), []
    parts = split(groups(report, "generate"), "preset", "prompt", "tokens", "dtype")
    for (preset, prompt, tokens, dtype, clock), found in parts.items():
        phases: dict[str, dict[str, Group]] = {}
        for group in found:
            phases.setdefault(group.get("batch"), {})[group.get("phase")] = group
        rows = []
        for batch, by_phase in phases.items():
            for name in _providers(by_phase.values(), us):
                cells = [Cell(batch, float(batch) if batch.isdigit() else None), Cell(_called(name, us))]
                for phase in ("prefill", "decode"):
                    one = by_phase.get(phase, Group({}, "", {}, {}))
                    rate = _metric(one.rows.get(name), "tokens_per_s")
                    cells += [_time(one, name), cell(rate), _speed(one, name, "hf")]
                rows.append(cells)
        head = ["batch", "provider", "prefill, ms", "prefill, tokens/s", "prefill speed against hf"]
        head += [f"{tokens} tokens, ms", "decode, tokens/s", "decode speed against hf"]
        tables.append(trimmed(f"{preset} {dtype}, prompt of {prompt}, {tokens} new tokens, {clock}", head, rows, 2))
    return tables


def memory_settings(report: Report) -> dict[tuple[str, ...], list[Row]]:
    """Rows of kind "memory" by preset, context and dtype."""
    parts: dict[tuple[str, ...], list[Row]] = {}
    for row in report.rows:
        if row.kind == "memory" and row.metrics:
            key = tuple(str(row.params.get(name, "")) for name in ("preset", "context", "dtype"))
            parts.setdefault(key, []).append(row)
    return parts


def memory_tables(report: Report) -> list[Table]:
    """What a training step was predicted to need, by part, and what it took."""
    tables = []
    for (preset, context, dtype), found in memory_settings(report).items():
        head = ["batch", "backend", *(f"{part} MiB" for part in PARTS), "predicted MiB", "measured MiB"]
        rows = []
        for row in found:
            predicted, peak = row.metrics.get("predicted_mib"), row.metrics.get("peak_mib")
            cells = [Cell(str(row.params.get("batch", "")), row.params.get("batch")), Cell(row.provider)]
            cells += [cell(row.metrics.get(f"{part}_mib")) for part in PARTS]
            off = peak / predicted if peak and predicted else None
            rows.append([*cells, cell(predicted), cell(peak), cell(off)])
        title = f"{preset} {dtype}, context {context}"
        tables.append(trimmed(title, [*head, "measured / predicted"], rows, 2))
    return tables


def other_table(report: Report, kind: str) -> Table:
    """Rows of a kind that has no table of its own."""
    rows = []
    for group in groups(report, kind):
        for name in group.rows:
            rows.append([Cell(group.label()), Cell(name), _time(group, name), Cell(group.clock)])
    return trimmed(kind, ["what", "provider", "ms", "clock"], rows, 2)


def failures(report: Report) -> Table:
    """What has no time, and why: an error a line, however many groups it cost."""
    same: dict[tuple[str, str, str], list[Row]] = {}
    for row in report.rows:
        if row.error:
            of = str(row.params.get("op", row.params.get("preset", "")))
            same.setdefault((of, row.provider, row.error), []).append(row)
    rows = []
    for (_, provider, error), found in same.items():
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        rows.append([Cell(found[0].kind), Cell(found[0].group + more), Cell(provider), Cell(error)])
    return Table("Not timed", ["kind", "what", "provider", "why"], rows, 4)


# --- the head of a report --------------------------------------------------------------------------------------------


def facts(report: Report) -> list[tuple[str, str]]:
    """Where, when, with what and how a report was made, as names and values."""
    m, found = report.machine, [("device", report.device)]
    if memory := m.get("memory_mib"):
        found.append(("device memory", f"{num(memory)} MiB"))
    names = ("compute_capability", "multiprocessors", "driver", "cuda", "torch", "triton", "python_version", "system")
    found += [(name.removesuffix("_version").replace("_", " "), str(m[name])) for name in names if m.get(name)]
    if commit := report.commit.get("id"):
        found.append(("commit", f"{commit}{', with changes' if report.commit.get('dirty') else ''}"))
    found.append(("date", report.datetime))
    clocks = {row.clock for row in report.rows if row.seconds}
    for name, words in report.method.items():
        if isinstance(words, str) and (name in clocks or name not in ("events", "graph", "wall")):
            found.append((name, words))
    return found + _roof_facts(report) + _control_facts(report)


def copy_rate(report: Report) -> float | None:
    """The highest rate at which a copy moved bytes on the device in hand: bytes (read and written) a second."""
    rates = [int(size) / seconds for size, seconds in report.method.get("roofs", {}).get("copy", {}).items()]
    return max(rates, default=None)


def flop_rates(report: Report) -> dict[str, float]:
    """The rate of a matrix product by dtype, FLOP/s."""
    return dict(report.method.get("roofs", {}).get("flops", {}))


def _roof_facts(report: Report) -> list[tuple[str, str]]:
    copy, products = copy_rate(report), flop_rates(report)
    found = [("measured roof, copy", f"{num(copy / 1e9)} GB/s")] if copy else []
    return found + [(f"measured roof, {dtype}", f"{num(rate / 1e12)} TFLOP/s") for dtype, rate in products.items()]


def _control_facts(report: Report) -> list[tuple[str, str]]:
    """How steady the machine was: the control's time over all groups, and what the machine said of itself."""
    rows = [row for row in report.rows if row.provider == CONTROL and row.seconds]
    found = []
    for clock in dict.fromkeys(row.clock for row in rows):
        medians = [row.ms() for row in rows if row.clock == clock]
        words = f"{num(min(medians))} to {num(max(medians))} ms in {len(medians)} groups"
        found.append((f"control, {clock}", f"{words}, half of them below {num(statistics.median(medians))} ms"))
    units = {
        "sm_mhz": "MHz, multiprocessors",
        "memory_mhz": "MHz, memory",
        "watts": "W",
        "celsius": "°C",
        "load": "load",
    }
    states = [
        f"{num(min(values))} to {num(max(values))} {unit}"
        for name, unit in units.items()
        if (values := [row.metrics[name] for row in rows if name in row.metrics])
    ]
    return found + ([("while measuring", "; ".join(states))] if states else [])


def glance(report: Report) -> list[tuple[str, str]]:
    """The few figures of a report that a reader looks for first: (figure, what it is). Losses count like wins."""
    us, found = ours(report), []
    for (clock,), members in split(groups(report, "kernels")).items() if us != "eager" else ():
        each = [ratio(row, g.rows[us]) for g in members if us in g.rows for p, row in g.rows.items() if p != us]
        if each:
            count = [sum(r.mark == mark for r in each) for mark in SYMBOLS]
            found.append(
                (f"{count[0]} of {len(each)}", f"comparisons of kernels won by {us}, {count[1]} lost ({clock})")
            )
    trained = [group for group in groups(report, "train") if us in group.rows]
    if trained:
        last = trained[-1]
        best = min(
            (p for p in ("triton", "triton+graph", "trainer", us) if p in last.rows), key=lambda p: last.rows[p].ms()
        )
        rate = num(_metric(last.rows[best], "tokens_per_s"))
        found.append((rate, f"tokens/s in training, {best}, {last.label()}{_beside(last, best, ('compile', 'eager'))}"))
    for group in groups(report, "generate", phase="decode")[:1]:
        best = min(
            (p for p in ("triton", "triton+graph", "trainer", us) if p in group.rows),
            key=lambda p: group.rows[p].ms(),
            default="",
        )
        if best:
            rate = num(_metric(group.rows[best], "tokens_per_s"))
            found.append((rate, f"tokens/s in decoding, {best}, {group.label('phase')}{_beside(group, best, ('hf',))}"))
    return found


def _beside(group: Group, provider: str, peers: tuple[str, ...]) -> str:
    peer = next((name for name in peers if name in group.rows and name != provider), None)
    return f": {times(group.rows[peer].ms() / group.rows[provider].ms())} {peer}" if peer else ""
