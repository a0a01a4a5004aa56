"""A web page that needs nothing else: text, tables and curves (inline SVG) in one HTML file.

For tools/report.py and tools/compare.py. There is no script, no font and no address in it; it looks
right on a laptop and on a telephone, and in the light or dark colours that the reader has chosen.
"""

import html
import io
import re
import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from configs import UserError
from data import writing

Points = list[tuple[float, float]]  # (tokens or FLOPs, value)

STYLE = """
:root { color-scheme: light dark; --line: #8884; --faint: #8882; }
body { font: 16px/1.5 Georgia, serif; max-width: 72rem; margin: 0 auto; padding: 1rem;
       background: light-dark(#fff, #16181c); color: light-dark(#222, #ddd); }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1rem 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .6rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .3rem; }
nav a { margin-right: 1.2rem; } a { color: inherit; }
code, pre { font: .82rem/1.45 ui-monospace, Menlo, Consolas, monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--faint);
      padding: .5rem .7rem; margin: .3rem 0; border-radius: 4px; }
.from { font-size: .82rem; opacity: .75; margin: .3rem 0 1rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .16rem .7rem .16rem 0; text-align: left; vertical-align: top; }
td { border-top: 1px solid var(--faint); } .n { text-align: right; white-space: nowrap; }
p { overflow-wrap: anywhere; }
.grid { display: grid; gap: 1rem 1.5rem;
        grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
figure { margin: 0; max-width: 36rem; } svg { width: 100%; height: auto; display: block; }
@media print { body { max-width: none; } }
"""
# matplotlib is told to draw text and frames in this colour, for which the page's own is put.
INK = "#010203"


def import_pyplot() -> Any:
    """matplotlib's pyplot, drawing into files; UserError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("The pictures need matplotlib, which is not installed here: pip install"
                        " matplotlib.")
    matplotlib.use("Agg")  # needs no screen
    from matplotlib import pyplot
    # Letters stay text, which the browser sets in the page's own type: it may have those that
    # matplotlib's fonts do not.
    warnings.filterwarnings("ignore", "Glyph .* missing from font")
    # A name with dollar signs is a name, and no formula.
    style = {"svg.fonttype": "none", "font.family": "serif", "axes.spines.top": False,
             "axes.spines.right": False, "legend.frameon": False, "savefig.transparent": True,
             "text.parse_math": False}
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color",
             "ytick.color")
    pyplot.rcParams.update(style | dict.fromkeys(inked, INK))
    return pyplot


def draw(work: Callable[[Any], None]) -> str:
    """A figure as SVG; `work` gets its axis."""
    pyplot = import_pyplot()
    figure, axis = pyplot.subplots(figsize=(5.4, 3.5), layout="constrained")
    work(axis)
    out = io.StringIO()
    figure.savefig(out, format="svg")
    pyplot.close(figure)
    # What stands before the drawing names web addresses, and the page has a head of its own.
    svg = re.sub(r"<metadata>.*?</metadata>", "", out.getvalue()[out.getvalue().index("<svg") :],
                 flags=re.S)
    return f"<figure>{printable(svg).replace(INK, 'currentColor')}</figure>"


class Panel(NamedTuple):
    title: str
    x_name: str
    curves: dict[str, Points]
    published: dict[str, Points] = {}  # another run's, dotted in the colour of ours


def curve_figures(panels: Sequence[Panel]) -> str:
    """A figure per panel that has points, side by side where there is room."""
    figures = []
    for panel in panels:
        if not any(panel.curves.values()):
            continue

        def work(axis: Any, panel: Panel = panel) -> None:
            for i, (name, points) in enumerate(panel.curves.items()):
                # A few points are checkpoints, and each is marked; many are a curve.
                axis.plot([x for x, _ in points], [y for _, y in points], f"C{i}", linewidth=1.2,
                          marker="." if len(points) < 50 else "",
                          label=name.removeprefix("validation "))
                if name in panel.published:
                    x, y = zip(*panel.published[name])
                    axis.plot(x, y, f"C{i}:", label=f"{name}, published")
            axis.set(title=panel.title, xlabel=panel.x_name)
            axis.legend(fontsize="small")

        figures.append(draw(work))
    return grid(figures)


def grid(figures: Sequence[str]) -> str:
    return f'<div class="grid">{"".join(figures)}</div>'


def smooth(points: Points) -> Points:
    """At most 85 points, each the mean of neighbours: single steps are noise."""
    size = -(-len(points) // 85) or 1
    means = []
    for i in range(0, len(points), size):
        x, y = zip(*points[i : i + size])
        means.append((statistics.fmean(x), statistics.fmean(y)))
    return means


def printable(value: Any) -> str:
    """A value without control characters, which have no place in a page, not even escaped."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "\ufffd", str(value))


def text(value: Any) -> str:
    """A value as text of the page: what a stranger's file says is never read as HTML."""
    return html.escape(printable(value))


def table(head: Sequence[Any], lines: Sequence[Sequence[Any]]) -> str:
    """Cells of any values; a column of nothing but numbers stands on the right."""
    number = re.compile(r"([-+]?\d[\d.,e+-]*%?( ± [\d.]+)?|-)?")
    kinds = ["n" if all(number.fullmatch(str(cell)) for cell in column) else "t"
             for column in zip(*lines)]
    heads = "".join(f'<th class="{kind}">{text(cell)}</th>' for kind, cell in zip(kinds, head))
    rows = [f"<tr>{heads}</tr>"]
    for line in lines:
        cells = "".join(f'<td class="{kind}">{text(cell)}</td>' for kind, cell in zip(kinds, line))
        rows.append(f"<tr>{cells}</tr>")
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def paragraph(words: str) -> str:
    return f"<p>{text(words)}</p>"


def source(*commands: str) -> str:
    """Where the figures above come from: what to type to have them again."""
    said = " ; ".join(f"<code>{text(command)}</code>" for command in commands)
    return f'<p class="from">from {said}</p>'


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
""".encode())
