"""A web page that needs nothing else: text, tables and curves (inline SVG) in one HTML file.

For tools/report.py and tools/compare.py. The page has no script, no font and no address in it. It
suits a laptop and a telephone, and the light or dark colours that the reader has chosen.
"""

import html
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data import writing

Points = list[tuple[float, float]]  # (tokens, value)

STYLE = """
:root { color-scheme: light dark; --line: #8884; --faint: #8882; }
body { font: 16px/1.5 Georgia, serif; max-width: 72rem; margin: 0 auto; padding: 1rem;
       background: light-dark(#fff, #16181c); color: light-dark(#222, #ddd); }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1rem 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .6rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .3rem; }
nav a { margin-right: 1.2rem; } a { color: inherit; }
code { font: .82rem/1.45 ui-monospace, Menlo, Consolas, monospace; }
.from { font-size: .82rem; opacity: .75; margin: .3rem 0 1rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .16rem .7rem .16rem 0; text-align: left; vertical-align: top; }
td { border-top: 1px solid var(--faint); }
p { overflow-wrap: anywhere; }
.grid { display: grid; gap: 1rem 1.5rem;
        grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
figure { margin: 0; max-width: 36rem; }
svg { width: 100%; height: auto; display: block; fill: currentColor; }
"""


class Panel(NamedTuple):
    title: str
    curves: dict[str, Points]
    published: dict[str, Points] = {}  # another run's, dotted in the colour of ours


def new_figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib's; inches."""
    import matplotlib
    from matplotlib.figure import Figure
    # Letters stay text, so the browser draws those that matplotlib's fonts do not have. A name with
    # dollar signs is not a formula.
    matplotlib.rcParams |= {"svg.fonttype": "none", "text.parse_math": False,
                            "font.family": "serif", "axes.spines.top": False,
                            "axes.spines.right": False, "legend.frameon": False}
    return Figure(figsize=(width, height), layout="constrained")


def draw(work: Callable[[Any], None]) -> str:
    """A figure as SVG; `work` draws on the axis that it gets."""
    figure, out = new_figure(5.4, 3.5), io.StringIO()
    work(figure.subplots())
    figure.savefig(out, format="svg", transparent=True)
    # matplotlib's head and metadata contain web addresses, and the page has a head of its own.
    _, tag, svg = out.getvalue().partition("<svg")
    svg = re.sub(r"<metadata>.*?</metadata>", "", tag + svg, flags=re.S)
    # Text, frames and ticks are black, and get the page's own colour.
    return f"<figure>{svg.replace('#000000', 'currentColor')}</figure>"


def draw_panel(axis: Any, panel: Panel) -> None:
    for i, (name, points) in enumerate(panel.curves.items()):
        # Up to 50 points are checkpoints, and each is marked; more are a curve.
        axis.plot(*zip(*points), f"C{i}", linewidth=1.2, marker="." if len(points) < 50 else "",
                  label=name.removeprefix("validation "))
        if name in panel.published:
            axis.plot(*zip(*panel.published[name]), f"C{i}:", label=f"{name}, published")
    axis.set(title=panel.title, xlabel="tokens")
    axis.legend(fontsize="small")


def curve_figures(panels: Sequence[Panel]) -> str:
    """A figure for each panel that has curves, side by side where there is room."""
    return grid([draw(lambda axis, panel=panel: draw_panel(axis, panel))
                 for panel in panels if panel.curves])


def grid(figures: Sequence[str]) -> str:
    return f'<div class="grid">{"".join(figures)}</div>'


def smooth(points: Points) -> Points:
    """At most 85 points, each the mean of neighbours: single steps are noise."""
    size = -(-len(points) // 85) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [tuple(np.mean(part, axis=0)) for part in parts]


def text(value: Any) -> str:
    """A value as text of the page. Every value from a file goes through here, because a stranger
    may have written the file."""
    return html.escape(str(value))


def table(lines: Sequence[Sequence[Any]]) -> str:
    """Cells of any values, the head in the first line."""
    rows = []
    for i, line in enumerate(lines):
        tag = "td" if i else "th"
        cells = [f"<{tag}>{text(cell)}</{tag}>" for cell in line]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def paragraph(words: str) -> str:
    return f"<p>{text(words)}</p>"


def source(*commands: str) -> str:
    """The files, and the commands to type, that the figures above come from."""
    codes = " ; ".join(f"<code>{text(command)}</code>" for command in commands)
    return f'<p class="from">from {codes}</p>'


def write_page(path: Path, title: str, intro: str, sections: dict[str, str]) -> None:
    """Write a page; intro and the sections (by their titles) are HTML."""
    links = "".join(f'<a href="#{i}">{text(name)}</a>' for i, name in enumerate(sections))
    body = "".join(f'<section id="{i}"><h2>{text(name)}</h2>{content}</section>'
                   for i, (name, content) in enumerate(sections.items()))
    with writing(path) as f:
        f.write(f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"/><title>{text(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<style>{STYLE}</style></head>
<body><h1>{text(title)}</h1>{intro}<nav>{links}</nav>{body}</body></html>
""".encode(errors="replace"))
