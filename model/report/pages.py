"""What pages are made of: figures, tables, and the templates around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from model.report import charts
from model.report.charts import NONE, num

SYMBOLS = {"win": "▲", "loss": "▼", "tie": "="}


class Figure(NamedTuple):
    """A chart and its caption. wide: as broad as the page, on a large screen."""

    title: str
    svg: Markup
    wide: bool = False


def figure(title: str, *args: Any, caption: str = "", wide: bool = False, **options: Any) -> Figure:
    """The chart `charts.curves` draws, preceded by a wide version if asked for; an empty one without a point."""
    widths = (charts.WIDE, charts.WIDTH) if wide else (charts.WIDTH,)
    drawings = [charts.curves(title, *args, width=width, **options) for width in widths]
    return Figure(caption or title, Markup("".join(drawings)), wide)  # ElementTree has escaped it


@dataclass(frozen=True)
class Cell:
    """value: sort key; note: after the text; span: p20 and p80; mark: win, loss, tie or failed; tip: the reason."""

    text: str
    value: float | None = None
    note: str = ""
    span: str = ""
    mark: str = ""
    tip: str = ""


def cell(value: float | None, show: Callable[[float], str] = num) -> Cell:
    """A number; a dash if there is none."""
    return Cell(NONE if value is None else show(value), value)


@dataclass(frozen=True)
class Table:
    """names: how many columns on the left name the row. folded: collapsed on the page."""

    title: str
    head: list[str]
    rows: Sequence[tuple[Cell, ...]]
    names: int = 1
    note: str = ""
    folded: bool = False


def table(title: str, columns: Mapping[str, list[Cell]], names: int = 1, **more: Any) -> Table:
    """A table of columns, without those that are empty in every row. more: note and folded of Table."""
    filled = {head for head, cells in columns.items() if any(c.note or c.text not in ("", NONE) for c in cells)}
    shown = {head: cells for i, (head, cells) in enumerate(columns.items()) if i < names or head in filled}
    return Table(title, list(shown), list(zip(*shown.values(), strict=True)), names, **more)


def page(template: Path, **values: object) -> str:
    """A self-contained HTML page from a template that extends base.html.jinja of this folder."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]), undefined=jinja2.StrictUndefined,
        autoescape=True, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template.name).render(symbols=SYMBOLS, **values)
