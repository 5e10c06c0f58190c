"""SVG charts for all pages: scales, axes, text, and curves over many points.

A chart is 340 units wide, so that its text stays at 11 pixels on a phone, and scales with its box; a wide one is for
large screens. Colours are classes; chart.css.jinja defines them for light and dark.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

WIDTH, WIDE, PICTURE = 340, 1000, 640  # of a chart on any screen, on a large one, and in a file of its own
NONE = "\N{EN DASH}"
LINE = 15  # height of a line of text
MARGIN = 10
SHAPES = ("circle", "square", "up", "diamond", "down")
_CORNERS = {
    "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)), "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
    "up": ((0, -1.2), (1.2, 1), (-1.2, 1)), "down": ((0, 1.2), (1.2, -1), (-1.2, -1)),
    "bar": ((-0.35, -1.2), (0.35, -1.2), (0.35, 1.2), (-0.35, 1.2)),
}  # fmt: skip
_LETTER = 6.9  # width of a letter at 11 pixels, in a wide font
_DIGITS = ((1, 1.2, 1.5, 2, 3, 5, 7), (1, 1.5, 2, 3, 5), (1, 2, 3, 5), (1, 2, 5), (1, 3))  # of log ticks, by room
_PLOT = 170.0  # height of the frame of a chart of curves


def num(value: float | None) -> str:
    """Three significant digits, thousands separated: 0.0213, 1.42, 412,000. A dash for None, NaN and infinity."""
    if value is None or not math.isfinite(value):
        return NONE
    rounded = float(f"{value:.3g}")
    digits = 2 - math.floor(math.log10(abs(rounded))) if rounded else 0
    return f"{rounded:,.{max(digits, 0)}f}"


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] to the coordinates [start, end], linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def around(cls, low: float, high: float, start: float, end: float, log: bool) -> Scale:
        """A scale that covers low to high, with a margin where they are nearly equal."""
        if log:
            room = max(1.0, math.sqrt(5 * low / high))  # a factor below 5 may contain no tick
            return cls(low / room, high * room, start, end, log)
        room = 0.0 if high - low > 1e-9 * max(abs(low), abs(high)) else max(abs(high) / 10, 1e-9) if high else 1.0
        return cls(low - room, high + room, start, end)

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, room: float) -> list[float]:
        """Round numbers on the scale, at least `room` apart."""
        if not self.log:
            least = (self.high - self.low) * room / abs(self.end - self.start)
            power = 10.0 ** math.floor(math.log10(least))
            step = next(d * power for d in (1.0, 2.0, 2.5, 5.0, 10.0) if d * power >= least * (1 - 1e-9))
            return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step + 1e-9) + 1)]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in _DIGITS:
            inside = [d * 10.0**k for k in powers for d in digits if self.low <= d * 10.0**k <= self.high]
            if all(abs(self(b) - self(a)) >= room for a, b in itertools.pairwise(inside)):
                return inside
        every = next(n for n in itertools.count(1) if n * abs(self(10 * self.low) - self(self.low)) >= room)
        return [10.0**k for k in powers if k % every == 0 and self.low <= 10.0**k <= self.high]


def tick_text(value: float) -> str:
    return f"{value:,.10g}"


def text_width(text: str) -> float:
    return len(text) * _LETTER


def cut(text: str, room: float) -> str:
    """The text, truncated to fit into `room`."""
    letters = int(room / _LETTER + 1e-6)
    return text if len(text) <= letters else f"{text[: letters - 1]}…"


class Key(NamedTuple):
    """An entry of a legend. shape, kind: of its symbol; curve: the class of its line; either may be empty."""

    name: str
    shape: str = ""
    kind: str = ""
    curve: str = ""


class Canvas:
    """Builds an SVG element. ElementTree escapes every text and attribute."""

    def __init__(self, title: str, description: str, width: float = WIDTH, kind: str = "chart") -> None:
        self.width, self.margin = width, 0
        self.root = ElementTree.Element("svg", {"role": "img", "class": kind})
        self.add("title", text=title)
        self.add("desc", text=description)

    def add(self, tag: str, text: str = "", tip: str = "", **attributes: str | float) -> None:
        element = ElementTree.SubElement(self.root, tag)
        for name, value in attributes.items():
            shown = value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
            element.set(name.rstrip("_").replace("_", "-"), shown)
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
        else:
            points = " ".join(f"{x + a * r:.1f},{y + b * r:.1f}" for a, b in _CORNERS[shape])
            self.add("polygon", tip=tip, points=points, class_=kind)

    def key(self, key: Key, x: float, y: float) -> float:
        """Draw the line and the symbol of a legend entry. Returns the width."""
        width = 32 if key.curve else 10
        if key.curve:
            self.curve([(x, y), (x + width, y)], f"curve {key.curve} key")
        if key.shape:
            self.dot(key.shape, x + width / 2, y, f"{key.kind} key")
        return width

    def legend(self, keys: Iterable[Key], y: float) -> float:
        """Symbols with their names, on as many lines as they need. Returns the y of the end."""
        x = 4.0
        for key in keys:
            width = (32 if key.curve else 10) + text_width(key.name) + 14
            if x > 4 and x + width > self.width:
                x, y = 4.0, y + LINE + 1
            self.write(x + self.key(key, x, y + 5) + 4, y + 9, cut(key.name, self.width - 20))
            x += width
        return y + LINE + 1

    def x_axis(
        self, scale: Scale, top: float, bottom: float, unit: str = "", room: float = 34, whole: bool = False
    ) -> None:
        """Grid lines from top to bottom, with labels below; only at whole numbers if asked for."""
        for tick in [tick for tick in scale.ticks(room) if not whole or abs(tick - round(tick)) < 1e-9]:
            self.line(scale(tick), top, scale(tick), bottom, "grid")
            text = f"{tick_text(tick)}{unit}"
            x = min(scale(tick), self.width - text_width(text) / 2)
            self.write(x, bottom + 13, text, "middle", "quiet")

    def y_axis(self, scale: Scale, left: float, right: float, room: float = 24) -> None:
        """Grid lines from left to right, with labels to their left."""
        for tick in scale.ticks(room):
            self.line(left, scale(tick), right, scale(tick), "grid")
            self.write(left - 4, scale(tick) + 4, tick_text(tick), "end", "quiet")

    def frame(self) -> None:
        """Make the element a file of its own: its name space, its style, a size, and a background."""
        self.margin = MARGIN
        self.root.attrib |= {"xmlns": "http://www.w3.org/2000/svg", "width": f"{1.25 * self.width:.0f}"}
        self.add("style", text=Path(__file__).with_name("chart.css.jinja").read_text(encoding="utf-8"))
        self.add("rect", x=-MARGIN, width="100%", height="100%", rx=8, class_="page")

    def done(self, height: float) -> str:
        """The element as text, of this height."""
        self.root.set("viewBox", f"{-self.margin} 0 {self.width + 2 * self.margin} {height:.0f}")
        return ElementTree.tostring(self.root, encoding="unicode")


@dataclass(frozen=True)
class Curve:
    """Points ordered by x, all finite. kind: CSS class; tip: tooltip."""

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
    """Indices of the points that `buckets` columns of pixels can show: the first, the last, and the lowest and highest
    of each column, so that no spike is lost. x: sorted."""
    if len(x) <= 2 * buckets:
        return np.arange(len(x))
    column = np.minimum((x - x[0]) * (buckets / max(x[-1] - x[0], 1e-300)), buckets - 1).astype(np.int64)
    starts = np.flatnonzero(np.diff(column, prepend=-1))
    parts = itertools.pairwise([*starts.tolist(), len(x)])
    extremes = [(a + int(y[a:b].argmin()), a + int(y[a:b].argmax())) for a, b in parts]
    return np.unique([0, len(x) - 1, *itertools.chain.from_iterable(extremes)])


def smooth(y: np.ndarray, reach: int) -> np.ndarray:
    """Centred moving average over up to `reach` neighbours on either side; fewer near the beginning, where a loss falls
    too fast for a one-sided mean."""
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
    keys: Sequence[Key] = (),
    since: float = 0.0,
    log: bool = False,
    zero: bool = False,
    whole: bool = False,
    width: int = WIDTH,
) -> str:
    """Curves and marks over one x axis that begins at `since`; empty without a point.

    bands: (x, tooltip), shown where the pointer is nearest to x. keys: of the legend. log: logarithmic y. zero: y
    starts at 0. whole: x is labelled at whole numbers. width: WIDTH, WIDE, or PICTURE for a file of its own, with its
    title and style.
    """
    drawn = [Curve(c.x[keep], c.y[keep], c.kind, c.tip) for c in drawn if (keep := c.x >= since).any()]
    marks = [mark for mark in marks if mark.x >= since]
    ys = np.concatenate([*(c.y for c in drawn), [mark.y for mark in marks if mark.y is not None]])
    if not len(ys):
        return ""
    low, high = float(ys.min()), float(ys.max())
    top = 44.0 if width == PICTURE else 10.0
    bottom = top + (_PLOT if width == WIDTH else 1.6 * _PLOT)
    y = Scale.around(min(low, 0.0) if zero else low, high, bottom - 4, top + 4, log)
    left = max(text_width(tick_text(tick)) for tick in y.ticks(24)) + 8
    most = max([float(c.x[-1]) for c in drawn] + [mark.x for mark in marks])
    x = Scale(since, most if most > since else since + 1, left, width - MARGIN)
    description = f"{title}: from {num(low)} to {num(high)}, over {tick_text(most)} {x_label}"
    canvas = Canvas(title, description, width, "chart wide" if width == WIDE else "chart")
    if width == PICTURE:
        canvas.frame()
        canvas.write(4, 24, title, kind="heading")
    canvas.y_axis(y, left, width - MARGIN)
    room = 34.0  # for most tick labels; more for long ones
    room = max(room, *(1.5 * text_width(tick_text(tick)) for tick in x.ticks(room)))
    canvas.x_axis(x, top, bottom, room=room, whole=whole)
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
    return canvas.done(canvas.legend(keys, bottom + 40) + 4 if keys else bottom + 34)
