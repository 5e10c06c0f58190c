"""Charts of a report as inline SVG. Colour never carries meaning alone, and the tables contain the same data."""

from __future__ import annotations

from collections.abc import Iterable

from bench import tables
from bench.record import LADDER, Report, Row
from bench.tables import TIMES, Group, between, times
from model.report.charts import MARGIN, SHAPES, WIDTH, Canvas, Key, Scale, cut, num, text_width

MODES = ("forward", "backward", "both")
CARDS_GB = (6, 8, 12, 16, 24, 40, 80)


def _label_width(names: Iterable[str]) -> float:
    return min(max(map(text_width, names)), 136) + 8


def ratios(groups: list[Group], us: str, title: str) -> str:
    """Each competitor's time over ours: a row a competitor, a lane a mode. Empty without a competitor."""
    dots: dict[str, list[tuple[int, tables.Ratio, Group]]] = {}
    for group in groups:
        for name, row in group.rows.items():
            if name != us and us in group.rows:
                lane = (*MODES, group.get("mode")).index(group.get("mode"))
                dots.setdefault(name, []).append((lane, tables.ratio(row, group.rows[us]), group))
    if not dots:
        return ""
    names = tables.ordered(dots)
    notes = {name: f"{sum(r.mark == 'win' for _, r, _ in dots[name])}/{len(dots[name])}" for name in names}
    lanes = sorted({lane for each in dots.values() for lane, _, _ in each})
    values = [v for each in dots.values() for _, r, _ in each for v in r]
    left = max(_label_width(names), text_width("ours slower") + 5)
    height, top = 11 * len(lanes) + 7, 18.0
    right = WIDTH - max(map(text_width, notes.values())) - 12
    x = Scale(min(0.8, *values) / 1.08, max(1.25, *values) * 1.08, left + 4, right, log=True)
    bottom = top + height * len(names)
    words = "; ".join(f"{name}: ours faster in {note}" for name, note in notes.items())
    canvas = Canvas(title, f"Time of each competitor over ours, logarithmic; right of 1 ours is faster. {words}")
    for i in range(0, len(names), 2):
        canvas.box(0, WIDTH, top + i * height, height, "stripe")
    canvas.x_axis(x, top, bottom, TIMES)
    canvas.line(x(1), top, x(1), bottom, "reference")
    canvas.write(x(1) - 5, 12, "ours slower", "end", "quiet")
    canvas.write(x(1) + 5, 12, "ours faster", "start", "quiet")
    shapes = {"win": "circle", "loss": "down", "tie": "bar"}
    for i, name in enumerate(names):
        start = top + i * height
        canvas.write(left - 8, start + height / 2 + 4, cut(name, left - 8), "end")
        canvas.write(WIDTH - 2, start + height / 2 + 4, notes[name], "end", "quiet")
        for lane, r, group in dots[name]:
            y = start + 9 + 11 * lanes.index(lane)
            canvas.line(x(r.low), y, x(r.high), y, "error")
            tip = f"{name}, {group.label('op')}: {times(r.mid)} ({between(r.low, r.high)})"
            canvas.dot(shapes[r.mark], x(r.mid), y, r.mark, tip)
    return canvas.done(bottom + 18)


def floors(groups: list[Group], us: str, title: str) -> str:
    """The share of its floor that ours reaches: a bar a mode of each kernel, a dot a case. Empty without any."""
    shares: dict[str, dict[str, list[tuple[float, Group]]]] = {}
    for group in groups:
        if us in group.rows and "floor" in group.rows[us].metrics:
            share = 100 * group.rows[us].metrics["floor"]
            shares.setdefault(group.get("op"), {}).setdefault(group.get("mode"), []).append((share, group))
    if not shares:
        return ""
    canvas = Canvas(title, "The time that the measured roofs allow over our time, in %; 100 is the roof.")
    every = [share for modes in shares.values() for pairs in modes.values() for share, _ in pairs]
    left, top = 68.0, 2.0
    x = Scale(0, max(105, *every) * 1.02, left, WIDTH - MARGIN)
    bottom = top + sum(20 + 15 * len(modes) for modes in shares.values())
    canvas.x_axis(x, top, bottom, " %")
    y = top
    for op, modes in shares.items():
        canvas.write(4, y + 14, cut(op, WIDTH), kind="number")
        y += 20
        for mode, pairs in modes.items():
            canvas.write(left - 6, y + 9, cut(mode, left - 6), "end", "quiet")
            canvas.box(x(0), x(sum(share for share, _ in pairs) / len(pairs)), y, 10, "bar")
            for share, group in pairs:
                canvas.dot("circle", x(share), y + 5, "point", f"{group.label()}: {num(share)} %", r=2.5)
            y += 15
    canvas.line(x(100), top, x(100), bottom, "reference")
    return canvas.done(bottom + 18)


def roofline(groups: list[Group], report: Report, title: str) -> str:
    """TFLOP/s over FLOP a byte, under the measured roofs: ours and the fastest competitor, of kernels with products."""
    us, copy, rates = tables.ours(report), tables.copy_rate(report), tables.flop_rates(report)
    points: dict[str, list[tuple[float, float, bool, str]]] = {}
    for group in groups:
        peers = [row for name, row in group.rows.items() if name != us]
        for row in filter(None, (group.rows.get(us), min(peers, key=Row.ms, default=None))):
            flops, size, rate = (row.metrics.get(name, 0.0) for name in ("flops", "bytes", "tflop_per_s"))
            if flops and size and rate:
                tip = f"{row.provider}, {group.label()}: {num(rate)} TFLOP/s at {num(flops / size)} FLOP a byte"
                points.setdefault(group.get("op"), []).append((flops / size, rate, row.provider == us, tip))
    if not points or not copy or not rates:
        return ""
    roofs = {dtype: rate / 1e12 for dtype, rate in rates.items() if dtype in {g.get("dtype") for g in groups}}
    every = [p for of_op in points.values() for p in of_op]
    tops = [*roofs.values(), *(p[1] for p in every)]
    ridge = max(roofs.values(), default=max(tops)) * 1e12 / copy
    top, bottom = 10.0, 224.0
    x = Scale(min(p[0] for p in every) / 2, max([ridge, *(p[0] for p in every)]) * 3, 44, WIDTH - MARGIN, log=True)
    y = Scale(min(p[1] for p in every) / 2, max(tops) * 1.6, bottom, top, log=True)
    products = "".join(f" Products reach {num(r)} TFLOP/s in {d}." for d, r in roofs.items())
    canvas = Canvas(title, f"Copies move {num(copy / 1e9)} GB/s.{products}")
    canvas.y_axis(y, 44, WIDTH - MARGIN)
    canvas.x_axis(x, top, bottom)
    for dtype, rate in roofs.items():
        start = max(x.low, rate * 1e12 / copy)
        canvas.line(x(start), y(rate), x(x.high), y(rate), "roof")
        canvas.write(WIDTH - MARGIN, y(rate) - 4, dtype, "end", "quiet")
    low = max(x.low, y.low * 1e12 / copy)
    canvas.line(x(low), y(low * copy / 1e12), x(ridge), y(ridge * copy / 1e12), "roof")
    for i, of_op in enumerate(points.values()):
        for intensity, rate, is_ours, tip in of_op:
            canvas.dot(SHAPES[i % len(SHAPES)], x(intensity), y(rate), f"mark run{i % 5}" if is_ours else "peer", tip)
    canvas.write((44 + WIDTH) / 2, bottom + 28, "FLOP a byte; TFLOP/s upwards", "middle", "quiet")
    keys = [Key(op, SHAPES[i % len(SHAPES)], f"mark run{i % 5}") for i, op in enumerate(points)]
    return canvas.done(canvas.legend([*keys, Key("fastest competitor", "circle", "peer")], bottom + 36))


def ladder(group: Group, metric: str, title: str) -> str:
    """A bar for each step from plain eager to all optimisations; other providers below a line. metric: "tokens_per_s",
    whose bars have p20 to p80 and the gain of each step, or "peak_mib". Empty where nothing has the metric."""
    values = {name: row.metrics[metric] for name, row in group.rows.items() if row.metrics.get(metric, 0.0) > 0}
    if not values:
        return ""
    left, notes = _label_width(values), {}
    for name, value in values.items():
        step = tables.ladder_step(group, name)
        below = values.get(step[0]) if step else None
        notes[name] = f"{num(value)}  {value / below - 1:+.0%}" if below else num(value)
    right = WIDTH - max(map(text_width, notes.values())) - 12
    x = Scale(0, max(values.values()) * 1.02, left, right)
    steps = [name for name in values if name in LADDER]
    others = [name for name in values if name not in steps]
    unit = "tokens/s" if metric == "tokens_per_s" else "MiB"
    canvas = Canvas(title, "; ".join(f"{name}: {note} {unit}" for name, note in notes.items()))
    y = 4.0
    for name in (*steps, *others):
        if others and name == others[0] and steps:
            canvas.line(0, y + 3, WIDTH, y + 3, "grid")
            y += 7
        row, value = group.rows[name], values[name]
        canvas.write(left - 6, y + 14, cut(name, left - 6), "end")
        canvas.box(left, x(value), y + 3, 14, "bar" if name in steps else "bar other", f"{name}: {num(value)} {unit}")
        if metric == "tokens_per_s":
            low, high = (value * row.ms() / row.ms(p) for p in (80, 20))
            canvas.line(x(low), y + 10, x(high), y + 10, "error")
        canvas.write(WIDTH - 2, y + 14, notes[name], "end", "number")
        y += 21
    return canvas.done(y + 4)


def memory(rows: list[Row], title: str) -> str:
    """Predicted memory by part, a stacked bar a backend, with the measured peak as a tick and the sizes of cards. Empty
    without a prediction. rows: of one batch."""
    rows = [row for row in rows if row.metrics.get("predicted_mib")]
    if not rows:
        return ""
    most = max(max(row.metrics["predicted_mib"], row.metrics.get("peak_mib", 0.0)) for row in rows) / 1024
    words = [f"{row.provider}: {num(row.metrics['predicted_mib'])} MiB" for row in rows]
    canvas = Canvas(title, f"Predicted memory of a training step, with lines at the sizes of cards. {'; '.join(words)}")
    left, height = _label_width(row.provider for row in rows), 27.0
    x = Scale(0, most * 1.05, left, WIDTH - MARGIN)
    keys = [Key(part, "square", f"part{i}") for i, part in enumerate(tables.PARTS)]
    top = canvas.legend([*keys, Key("measured", "bar", "measured")], 2) + 18
    bottom = top + height * len(rows)
    canvas.x_axis(x, top, bottom)
    end = float(WIDTH)
    for card in reversed([card for card in CARDS_GB if card <= x.high]):  # of labels that overlap, the larger card
        text = f"{card} GB"
        place = min(x(card), WIDTH - text_width(text) / 2)
        if place + text_width(text) / 2 <= end:
            canvas.line(x(card), top - 4, x(card), bottom, "reference")
            canvas.write(place, top - 7, text, "middle", "quiet")
            end = place - text_width(text) / 2 - 4
    for i, row in enumerate(rows):
        y, start = top + height * i, 0.0
        canvas.write(left - 6, y + height / 2 + 4, cut(row.provider, left - 6), "end")
        for j, part in enumerate(tables.PARTS):
            size = row.metrics.get(f"{part}_mib", 0.0) / 1024
            if size:
                tip = f"{row.provider}, {part}: {num(size * 1024)} MiB"
                canvas.box(x(start), x(start + size), y + 5, height - 10, f"part{j}", tip)
            start += size
        if peak := row.metrics.get("peak_mib"):
            place, tip = x(peak / 1024), f"{row.provider}, measured: {num(peak)} MiB"
            canvas.box(place - 2, place + 2, y + 1, height - 2, "measured", tip)
    canvas.write((left + WIDTH) / 2, bottom + 27, "GiB", "middle", "quiet")
    return canvas.done(bottom + 32)
