"""Drawing that all pages share: scales, axes and text of inline SVG, curves over many points, and the page around them.

A chart is drawn 340 units wide, so that its text stays at 11 pixels on a phone, and grows with its box; a wide one is
for screens only. Colours are classes, which the page sets for light and dark (page.css.jinja).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jinja2
import numpy as np
from markupsafe import Markup

WIDTH, WIDE = 340, 1000
NONE = "\N{EN DASH}"
LINE = 15  # from one line of text to the next
MARGIN = 10
SHAPES = ("circle", "square", "up", "diamond", "down")
_LETTER = 6.9  # the width of one at 11 pixels, in a wide font
_DIGITS = (
    (1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 7.0),
    (1.0, 1.5, 2.0, 3.0, 5.0),
    (1.0, 2.0, 3.0, 5.0),
    (1.0, 2.0, 5.0),
    (1.0, 3.0),
)
_PLOT = 170.0  # height of the frame of a chart of curves


def num(value: float | None) -> str:
    """Three significant digits, thousands separated: 0.0213, 1.42, 412,000. A dash for None, NaN and infinity."""
    if value is None or not math.isfinite(value):
        return NONE
    rounded = float(f"{value:.3g}")
    digits = 2 - math.floor(math.log10(abs(rounded))) if rounded else 0
    return f"{rounded:,.{max(digits, 0)}f}"


# --- scales and axes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """From numbers to places. low and high lie at start and end."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def around(cls, low: float, high: float, start: float, end: float, log: bool = False) -> Scale:
        """One that holds low to high, with some room where they are the same or nearly so."""
        if log:
            room = max(1.0, math.sqrt(5 * low / high))  # less than a factor of 5 may have no round number inside
            return cls(low / room, high * room, start, end, log)
        room = 0.0 if high - low > 1e-9 * max(abs(low), abs(high)) else max(abs(high) / 10, 1e-9) if high else 1.0
        return cls(low - room, high + room, start, end)

    def __call__(self, value: float) -> float:
        bend: Callable[[float], float] = math.log if self.log else float
        value = max(value, self.low) if self.log else value
        share = (bend(value) - bend(self.low)) / (bend(self.high) - bend(self.low))
        return self.start + share * (self.end - self.start)

    def ticks(self, room: float) -> list[float]:
        """Round numbers inside, at least `room` apart."""
        if not self.log:
            step = _round_up((self.high - self.low) * room / abs(self.end - self.start))
            return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step + 1e-9) + 1)]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in _DIGITS:
            inside = [d * 10.0**k for k in powers for d in digits if self.low <= d * 10.0**k <= self.high]
            if all(abs(self(b) - self(a)) >= room for a, b in itertools.pairwise(inside)):
                return inside
        every = next(n for n in itertools.count(1) if n * abs(self(10 * self.low) - self(self.low)) >= room)
        return [10.0**k for k in powers if k % every == 0 and self.low <= 10.0**k <= self.high]


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(d * power for d in (1.0, 2.0, 2.5, 5.0, 10.0) if d * power >= value * (1 - 1e-9))


def tick_text(value: float) -> str:
    return f"{value:,.10g}"


def text_width(text: str) -> float:
    return len(text) * _LETTER


def cut(text: str, room: float) -> str:
    """The text, or as much of it as `room` has place for."""
    letters = int(room / _LETTER + 1e-6)
    return text if len(text) <= letters else f"{text[: letters - 1]}…"


# --- the element -----------------------------------------------------------------------------------------------------


class Canvas:
    """An SVG element in the making. ElementTree escapes every text and attribute."""

    def __init__(self, title: str, description: str, width: float = WIDTH, kind: str = "chart") -> None:
        self.width = width
        self.root = ElementTree.Element("svg", {"role": "img", "class": kind})
        self.add("title", text=title)
        self.add("desc", text=description)

    def add(self, tag: str, text: str = "", tip: str = "", **attributes: str | float) -> None:
        named = {
            name.rstrip("_").replace("_", "-"): v if isinstance(v, str) else f"{v:.1f}".removesuffix(".0")
            for name, v in attributes.items()
        }
        element = ElementTree.SubElement(self.root, tag, named)
        element.text = text or None
        if tip:
            ElementTree.SubElement(element, "title").text = tip

    def write(self, x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> None:
        self.add("text", text, x=x, y=y, text_anchor=anchor, class_=f"t {kind}".strip())

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)

    def curve(self, points: Iterable[tuple[float, float]], kind: str, tip: str = "") -> None:
        self.add("polyline", tip=tip, points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=kind)

    def box(self, x1: float, x2: float, y: float, height: float, kind: str, tip: str = "") -> None:
        self.add("rect", tip=tip, x=x1, y=y, width=max(x2 - x1, 0.5), height=height, class_=kind)

    def dot(self, shape: str, x: float, y: float, kind: str, tip: str = "", r: float = 4) -> None:
        if shape == "circle":
            self.add("circle", tip=tip, cx=x, cy=y, r=r, class_=kind)
            return
        corners = {
            "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)), "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
            "up": ((0, -1.2), (1.2, 1), (-1.2, 1)), "down": ((0, 1.2), (1.2, -1), (-1.2, -1)),
            "bar": ((-0.35, -1.2), (0.35, -1.2), (0.35, 1.2), (-0.35, 1.2)),
            "line": ((-1.2, -0.3), (1.2, -0.3), (1.2, 0.3), (-1.2, 0.3)),
        }[shape]  # fmt: skip
        points = " ".join(f"{x + a * r:.1f},{y + b * r:.1f}" for a, b in corners)
        self.add("polygon", tip=tip, points=points, class_=kind)

    def legend(self, entries: Iterable[tuple[str, str, str]], y: float) -> float:
        """Symbols with their names, in as many lines as they need. entries: (shape, class, name). Returns the end."""
        x = 4.0
        for shape, kind, name in entries:
            width = 14 + text_width(name) + 10
            if x > 4 and x + width > self.width:
                x, y = 4.0, y + LINE + 1
            self.dot(shape, x + 5, y + 5, kind)
            self.write(x + 14, y + 9, cut(name, self.width - 20))
            x += width
        return y + LINE + 1

    def x_axis(self, scale: Scale, top: float, bottom: float, unit: str = "", room: float = 34) -> None:
        """Ticks with their grid lines over top to bottom, and their labels below."""
        for tick in scale.ticks(room):
            self.line(scale(tick), top, scale(tick), bottom, "grid")
            text = f"{tick_text(tick)}{unit}"
            x = min(scale(tick), self.width - text_width(text) / 2)
            self.write(x, bottom + 13, text, "middle", "quiet")

    def y_axis(self, scale: Scale, left: float, right: float, room: float = 24) -> None:
        """Ticks with their grid lines from left to right, and their labels before them."""
        for tick in scale.ticks(room):
            self.line(left, scale(tick), right, scale(tick), "grid")
            self.write(left - 4, scale(tick) + 4, tick_text(tick), "end", "quiet")

    def done(self, height: float) -> str:
        """The element as text."""
        self.root.set("viewBox", f"0 0 {self.width} {height:.0f}")
        return ElementTree.tostring(self.root, encoding="unicode")


# --- curves ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Points in the order of x, all finite. kind: a class of the page; tip: what it is called when pointed at."""

    x: np.ndarray
    y: np.ndarray
    kind: str
    tip: str = ""


@dataclass(frozen=True)
class Mark:
    """A symbol at a point, or at the upper edge where y is None."""

    x: float
    y: float | None
    shape: str
    kind: str
    tip: str
    r: float = 3.5


def thin(x: np.ndarray, y: np.ndarray, buckets: int) -> np.ndarray:
    """Indices of what `buckets` columns of a chart can show of many points: the ends, and of each column its lowest and
    its highest point, so that no spike is lost. x: in order."""
    if len(x) <= 2 * buckets:
        return np.arange(len(x))
    column = np.minimum((x - x[0]) * (buckets / max(x[-1] - x[0], 1e-300)), buckets - 1).astype(np.int64)
    starts = np.flatnonzero(np.diff(column, prepend=-1))
    parts = itertools.pairwise([*starts.tolist(), len(x)])
    both = [(a + int(y[a:b].argmin()), a + int(y[a:b].argmax())) for a, b in parts]
    return np.unique([0, len(x) - 1, *itertools.chain.from_iterable(both)])


def smooth(y: np.ndarray, reach: int) -> np.ndarray:
    """The mean of each value and of up to `reach` on either side: fewer near the beginning, where a loss falls so fast
    that a mean of both sides would lie beside the curve."""
    i = np.arange(len(y))
    sides = np.minimum(i, reach)
    low, high = i - sides, np.minimum(i + sides, len(y) - 1)
    sums = np.concatenate([[0.0], np.cumsum(y)])
    return (sums[high + 1] - sums[low]) / (high + 1 - low)


def curves(
    title: str,
    drawn: Sequence[Curve],
    *,
    x_label: str,
    marks: Sequence[Mark] = (),
    bands: Sequence[tuple[float, str]] = (),
    since: float = 0.0,
    log: bool = False,
    zero: bool = False,
    width: int = WIDTH,
) -> str:
    """Curves and marks over one axis from `since` on; empty without a point.

    bands: (x, words): what is read when the pointer is nearest to x. log: of y, which then is above 0. zero: y begins
    there, as lengths are compared.
    """
    drawn = [Curve(c.x[keep], c.y[keep], c.kind, c.tip) for c in drawn if (keep := c.x >= since).any()]
    marks = [mark for mark in marks if mark.x >= since]
    ys = np.concatenate([*(c.y for c in drawn), [mark.y for mark in marks if mark.y is not None]])
    if not len(ys):
        return ""
    top, low, high = 10.0, min(float(ys.min()), 0.0 if zero else math.inf), float(ys.max())
    bottom = top + (_PLOT if width == WIDTH else 1.6 * _PLOT)
    y = Scale.around(low, high, bottom - 4, top + 4, log)
    left = max(text_width(tick_text(tick)) for tick in y.ticks(24)) + 8
    most = max([float(c.x[-1]) for c in drawn] + [mark.x for mark in marks])
    x = Scale(since, most, left, width - MARGIN) if most > since else Scale(since, since + 1, left, width - MARGIN)
    kind = "chart" if width == WIDTH else "chart wide"
    canvas = Canvas(
        title, f"{title}: from {num(float(ys.min()))} to {num(high)}, over {tick_text(most)} {x_label}", width, kind
    )
    canvas.y_axis(y, left, width - MARGIN)
    room = 34.0  # for the labels of most axes; more for long ones
    canvas.x_axis(x, top, bottom, room=max(room, *(1.5 * text_width(tick_text(tick)) for tick in x.ticks(room))))
    canvas.write((left + width) / 2, bottom + 28, x_label, "middle", "quiet")
    for c in drawn:
        keep = thin(c.x, c.y, int(width - left) // 2)
        canvas.curve(((x(a), y(b)) for a, b in zip(c.x[keep].tolist(), c.y[keep].tolist(), strict=True)), c.kind, c.tip)
    places = [(x(at), tip) for at, tip in bands if at >= since]
    edges = [left, *((a + b) / 2 for (a, _), (b, _) in itertools.pairwise(places)), width - MARGIN]
    for (start, end), (_, tip) in zip(itertools.pairwise(edges), places, strict=False):
        canvas.box(start, end, top, bottom - top, "band", tip)
    for mark in marks:
        canvas.dot(mark.shape, x(mark.x), top - 3 if mark.y is None else y(mark.y), mark.kind, mark.tip, mark.r)
    return canvas.done(bottom + 34)


def drawings(title: str, drawn: Sequence[Curve], *, wide: bool = False, **options: Any) -> list[Markup]:
    """One chart of `curves` for every screen, for a wide one another before it; nothing without a point."""
    made = [curves(title, drawn, width=width, **options) for width in ((WIDE, WIDTH) if wide else (WIDTH,))]
    return [Markup(text) for text in made if text]  # ElementTree has escaped it


# --- pages -----------------------------------------------------------------------------------------------------------


def page(template: Path, **values: object) -> str:
    """A self-contained HTML page. A template may include those of its own folder and of this one, such as the style."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template.name).render(**values)
