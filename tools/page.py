"""A web page that needs nothing else: text, tables and pictures (inline SVG) in one HTML file.

It has no script, no font and no address; page.css has its look: laptop, telephone, paper, dark and
light. What files of a run hold may be a stranger's: `text` makes text of it, `number` a number.
"""

import html
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data import writing

Points = list[tuple[float, float]]  # (tokens, value); NaN is a gap


class Curve(NamedTuple):
    points: Points  # in order of x
    color: int = 0
    spread: Sequence[tuple[float, float]] = ()  # (low, high) at each point: a band; of one, a bar
    dotted: bool = False


class Panel(NamedTuple):
    title: str  # of a picture
    unit: str  # of y
    curves: dict[str, Curve]
    rule: tuple[float, str] | None = None  # a line across: (y, what it is), as chance or zero
    x_unit: str = "tokens"


def number(value: Any) -> float:
    """A value of a stranger's file as a number; NaN if it is none, or too large to be drawn."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e100 else math.nan


def text(value: Any) -> str:
    """A value of a stranger's file as text of the page, without characters that no page may have
    or that turn the direction of what follows."""
    return html.escape(re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-"
                              "\udfff\ufffe\uffff]", "\ufffd", str(value)))


def human(n: float) -> str:
    """A large number in three digits: 3.48M."""
    n = float(f"{n:.3g}")
    power = min(4, int(math.log10(max(n, 1)) // 3))
    return f"{n / 1000**power:g}{' kMBT'[power].strip()}"


def smooth(points: Points, take: Callable[..., Any] = np.mean) -> Points:
    """At most 85 points, the mean (or another `take`) of neighbours: single steps are noise."""
    groups = np.array_split(np.array(points, float), min(len(points), 85))
    return [(float(group[:, 0].mean()), float(take(group[:, 1]))) for group in groups]


def ticks(values: Iterable[float]) -> list[float]:
    """Two to nine round numbers, from below all values to above them."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    if high - low <= 1e-6 * max(-low, high):
        low, high = low - abs(low) / 2 - 1e-6, high + abs(high) / 2 + 1e-6
    step = 10.0 ** math.floor(math.log10((high - low) / 7))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 7)
    return [k * step for k in range(math.floor(low / step), math.ceil(high / step) + 1)]


def path(places: Iterable[tuple[float, float]], look: str) -> str:
    """An SVG line through the places, interrupted where one is not finite."""
    line, joined = "", False
    for x, y in places:
        if finite := math.isfinite(x + y):
            line += f"{'L' if joined else 'M'}{x:.1f} {y:.1f}"
        joined = finite
    return f'<path class="{look}" d="{line}"/>' if line else ""


def words_at(x: float, y: float, look: str, words: Any) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{look}">{text(words)}</text>'


def chart(panel: Panel) -> str:
    """A figure with axes, their units and a legend."""
    left, right, top, bottom = 48, 374, 22, 196  # of the area within the axes
    drawn = panel.curves.values()
    xs = [x for curve in drawn for x, _ in curve.points if math.isfinite(x)]
    x0, x1 = min([0, *xs]), max(xs, default=1) or 1
    ys = [y for curve in drawn for _, y in curve.points]
    ys += [y for curve in drawn for edges in curve.spread for y in edges]
    rows = ticks([*ys, *(panel.rule or ())[:1]])

    def place(x: float, y: float) -> tuple[float, float]:
        return (left + (right - left) * (x - x0) / (x1 - x0),
                bottom - (bottom - top) * (y - rows[0]) / (rows[-1] - rows[0]))

    def across(y: float, look: str) -> str:
        return path([place(x0, y), place(x1, y)], look)

    parts = [words_at(0, 11, "", panel.unit), words_at(right, 229, "end", panel.x_unit)]
    parts += [words_at(place(x, 0)[0], bottom + 16, "mid", human(x)) for x in ticks([x0, x1])
              if x0 <= x <= x1 and x == int(x)]
    for y in rows:
        parts += [across(y, "line"), words_at(left - 6, place(0, y)[1] + 4, "end", f"{y:,.6g}")]
    legend = ""
    for name, (points, color, spread, dotted) in panel.curves.items():
        look = f"c{color % 6}" + " dash" * (color >= 6) + " dots" * dotted
        legend += f'<i class="{look}">{text(name)}</i>' * (len(drawn) > 1)
        edges = [(place(x, low), place(x, high)) for (x, _), (low, high) in zip(points, spread)
                 if math.isfinite(low + high)]
        parts += [path([low for low, _ in edges] + [high for _, high in reversed(edges)],
                       f"band c{color % 6}"), path([place(*point) for point in points], look)]
        parts += ['<circle class="c{}" cx="{:.1f}" cy="{:.1f}" r="2.6"><title>{} {:.4g}</title>'
                  "</circle>".format(color % 6, *place(x, y), text(name), y)
                  for x, y in points if len(points) <= 50 and math.isfinite(x + y)]  # checkpoints
    for y, words in [panel.rule] if panel.rule else []:
        parts += [across(y, "rule dash"), words_at(right, place(0, y)[1] - 5, "on", words)]
    return tag("figure", tag("figcaption", text(panel.title), tag("span", legend)),
               f'<svg viewBox="0 0 380 232" aria-label="{text(panel.title)}">', *parts, "</svg>")


def heat(title: str, about: str, values: np.ndarray, rows: Sequence, columns: Sequence) -> str:
    """Values (R, C) as shades of a table, the first row at the bottom; NaN is left empty. If some
    are negative 0 is blank, and these have another colour; else the smallest is blank."""
    base = max(0, np.nanmin(values, initial=1e99))
    most = np.nanmax(np.abs(values - base), initial=1e-9)
    columns = columns if len(columns) <= 12 else []  # no room for words and numbers
    lines = ["".join(tag("th", text(x)) for x in ["", *columns])]
    for label, row in zip(rows, values.tolist()):
        cells = [f'<td class="c{int(x < base)}" style="--v:{65 * abs(x - base) / most:.0f}%">'
                 f"{f'{x:z.2f}' * bool(columns)}</td>" if math.isfinite(x) else "<td></td>"
                 for x in row]
        lines.append(tag("th", text(label)) + "".join(cells))
    return tag("figure", tag("figcaption", text(title), tag("span", text(about))),
               tag("table", *(tag("tr", line) for line in lines[::-1]), kind="heat"))


def tag(name: str, *parts: str, kind: str = "") -> str:
    """An element of HTML around parts that are HTML already."""
    return f'<{name} class="{kind}">{"".join(parts)}</{name}>'


def details(title: str, *parts: str) -> str:
    """HTML that unfolds below its title."""
    return tag("details", tag("summary", text(title)), *parts)


def paragraphs(lines: Iterable[str]) -> list[str]:
    return [tag("p", text(line)) for line in lines]


def columns(records: Sequence[dict[str, Any]], form: str = ".3f") -> list[list[str]]:
    """Records as lines of a table, its head first: a column for each key, empty where it lacks."""
    lines = [[*dict.fromkeys(key for record in records for key in record)]]
    for record in records:
        cells = [x if type(x := record.get(key, "")) is float else str(x) for key in lines[0]]
        lines.append(["" if x != x else format(x, form) if type(x) is float else x for x in cells])
    return lines


def table(records: Sequence[dict[str, Any]]) -> str:
    rows = [tag("tr", *(tag("td" if i else "th", text(cell)) for cell in line))
            for i, line in enumerate(columns(records))]
    return tag("div", tag("table", *rows), kind="wide")


def write_page(path: Path, title: str, lead: str, cards: Iterable[tuple[str, str]],
               *parts: str) -> None:
    """Write a page: a sentence, large figures with what each is, and then parts in HTML."""
    large = [tag("div", "<b>", text(figure).replace(" ", "</b> ", 1), *paragraphs([about]),
                 kind=f"c{i % 6}") for i, (figure, about) in enumerate(cards)]
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    with writing(path) as f:
        f.write(f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"/><title>{text(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<style>{style}</style></head><body><h1>{text(title)}</h1><p class="lead">{text(lead)}</p>
<div class="cards">{"".join(large)}</div>{"".join(parts)}</body></html>
""".encode(errors="replace"))
