"""Draw the pictures of a run, as far as its files go. Needs matplotlib: pip install matplotlib.

    python tools/report.py runs/amber_tiny

curves.png        training loss by source; bits per byte and accuracy of every checkpoint measured
stages.png        for a run that goes on from another (Crystal): bits per byte through all of them
memorization.png  what memorize.py found: scores and losses by checkpoint and chunk, and by age
"""

import re
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from checkpoint import list_checkpoints, read_manifest, read_records, weights_hash
from configs import UserError, run_command
from data import read_json
from eval import by_checkpoint, published_scores, value
from memorize import cell_means, double_center

Points = list[tuple[float, float]]  # (tokens or FLOPs, value)


class Panel(NamedTuple):
    title: str
    x_name: str
    curves: dict[str, Points]
    published: dict[str, Points] = {}  # another run's, dotted in the colour of ours


def import_pyplot() -> Any:
    """matplotlib's pyplot, drawing into files; UserError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("The pictures need matplotlib, which is not installed here: pip install"
                        " matplotlib.")
    matplotlib.use("Agg")  # needs no screen
    from matplotlib import pyplot
    return pyplot


def draw(path: Path, panels: list[Panel]) -> None:
    """Write panels with curves as one picture, three in a row."""
    pyplot = import_pyplot()
    panels = [panel for panel in panels if any(panel.curves.values())]
    width, height = max(1, min(3, len(panels))), -(-len(panels) // 3) or 1
    figure, axes = pyplot.subplots(height, width, figsize=(5 * width + 1, 3.8 * height),
                                   layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels):]:
        axis.remove()
    for axis, panel in zip(axes.flat, panels):
        for i, (name, points) in enumerate(panel.curves.items()):
            # A few points are checkpoints, and each is marked; many are a curve.
            axis.plot([x for x, _ in points], [y for _, y in points], f"C{i}", linewidth=1,
                      marker="." if len(points) < 50 else "",
                      label=name.removeprefix("validation "))
            if name in panel.published:
                x, y = zip(*panel.published[name])
                axis.plot(x, y, f"C{i}:", label=f"{name}, published")
        axis.set(title=panel.title, xlabel=panel.x_name)
        axis.legend(fontsize="x-small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def smooth(points: Points) -> Points:
    """At most 85 points, each the mean of neighbours: single steps are noise."""
    size = -(-len(points) // 85) or 1
    means = []
    for i in range(0, len(points), size):
        x, y = zip(*points[i : i + size])
        means.append((statistics.fmean(x), statistics.fmean(y)))
    return means


def measured(run_dir: Path) -> list[dict[str, Any]]:
    """The results in eval.jsonl that belong to the weights of today's checkpoints."""
    # A run that was trained anew has checkpoints of the same names, and other weights.
    today = {weights_hash(path) for path in list_checkpoints(run_dir)}
    results = [record for record in read_records(run_dir / "eval.jsonl")
               if record.get("of", {}).get("weights") in today]
    return by_checkpoint(results)


def curve_panels(run_dir: Path) -> list[Panel]:
    """Training loss, bits per byte and accuracy over tokens."""
    losses: dict[str, Points] = {}
    for record in read_records(run_dir / "metrics.jsonl"):
        for source, loss in record.get("loss_by_source", {}).items():
            losses.setdefault(source, []).append((record["tokens"], loss))
    losses = {source: smooth(points) for source, points in losses.items()}
    panels = [Panel("training loss", "tokens", losses)]
    entries = measured(run_dir)
    if entries:
        published = published_scores(read_json(run_dir / "config.json").get("published", ""),
                                     entries)
        panels.append(Panel("bits per byte", "tokens", curves(entries, "text")))
        panels.append(Panel("accuracy", "tokens", curves(entries, "tasks"), published))
    return panels


def curves(entries: list[dict[str, Any]], kind: str) -> dict[str, Points]:
    """A curve per source ("text") or task ("tasks"), through all checkpoints that have it."""
    found: dict[str, Points] = {}
    for entry in entries:
        for name, result in entry[kind].items():
            if entry["tokens"]:  # what a published checkpoint has seen is not known
                found.setdefault(name, []).append((entry["tokens"], value(result)))
    return found


def parent_runs(run_dir: Path) -> list[tuple[Path, int]]:
    """A run and those it goes on from, oldest first: (directory, tokens seen before it began)."""
    # The newest checkpoint of each says what its run started from; a chain ends where no run is.
    chain: list[tuple[Path, int]] = []
    while run_dir not in [run for run, _ in chain]:
        found = list_checkpoints(run_dir)
        if not found:
            break
        origin = read_manifest(found[-1]).get("started_from") or {}
        chain.insert(0, (run_dir, origin.get("tokens") or 0))
        if not origin:
            break
        run_dir = Path(origin["path"]).parent
    runs, before = [], 0
    for run, tokens in chain:
        before += tokens
        runs.append((run, before))
    return runs


def stage_panels(runs: list[tuple[Path, int]]) -> list[Panel]:
    """A panel per source, bits per byte over the tokens of all stages, a curve per stage."""
    sources: dict[str, dict[str, Points]] = {}
    for run, before in runs:
        for source, points in curves(measured(run), "text").items():
            shifted = [(before + tokens, y) for tokens, y in points]
            sources.setdefault(source, {})[run.name] = shifted
    return [Panel(source.removeprefix("validation "), "tokens", lines)
            for source, lines in sources.items()]


def draw_memorization(path: Path, summary: dict[str, Any]) -> None:
    """The summary in memorization.json as a picture of six panels."""
    pyplot = import_pyplot()
    names, chunks = summary["checkpoints"], summary["chunks"]
    labels = [re.sub(r"^ckpt_0*(?=\d)", "", name) for name in names]
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), layout="constrained")

    def image(axis: Any, values: Any, title: str, columns: list) -> None:
        values = np.array(values, float)  # a correlation that is not defined (None) becomes NaN
        high = None if values.any() else 1  # a scale for nothing but zeros
        shown = axis.imshow(values, aspect="auto", origin="lower", vmax=high)
        figure.colorbar(shown, ax=axis)
        ticks = np.unique(np.linspace(0, len(columns) - 1, 12).round().astype(int))
        axis.set(title=title, ylabel="checkpoint", yticks=range(len(labels)), yticklabels=labels,
                 xticks=ticks, xticklabels=[columns[i] for i in ticks])

    image(axes[0, 0], 100 * cell_means(summary, "score"), "score, %, by chunk", chunks)
    image(axes[0, 1], -double_center(cell_means(summary, "loss")),
          "loss, nats below the levels, by chunk", chunks)
    image(axes[0, 2], summary["correlation"]["score"], "correlation of the sequences' scores",
          labels)
    # With few checkpoints or chunks, ages cannot be told from levels: then all ages as they are.
    by_age = summary["forgetting"] or summary["by_age"]
    axes[1, 0].errorbar([age.replace(" and more", "+") for age in by_age],
                        [figures["loss"] for figures in by_age.values()],
                        [figures["loss_se"] for figures in by_age.values()], marker=".")
    axes[1, 0].set(xlabel="age: chunks since it was seen", ylabel="loss, nats",
                   title="loss against unseen chunks" if summary["forgetting"] else "")
    for name, counts in zip(names, summary["histogram"]):
        axes[1, 1].plot(counts, label=name)
    axes[1, 1].set(xlabel="agreeing positions", ylabel="sequences", yscale="symlog")
    axes[1, 1].legend(fontsize="x-small")
    sources = summary["by_source"]
    axes[1, 2].barh(list(sources), [100 * figures["score"] for figures in sources.values()],
                    xerr=[100 * figures["score_se"] for figures in sources.values()])
    axes[1, 2].set(xlabel=f"score of {names[-1]}, %")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str]) -> None:
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError("Give one run directory: python tools/report.py runs/NAME")
    run_dir = Path(argv[0])
    if not (run_dir / "metrics.jsonl").exists():
        raise UserError(f"{run_dir} is not the directory of a run: it has no metrics.jsonl, which"
                        " train.py writes.")
    draw(run_dir / "curves.png", curve_panels(run_dir))
    print(f"Curves: {run_dir / 'curves.png'}")
    runs = parent_runs(run_dir)
    if len(runs) > 1:
        draw(run_dir / "stages.png", stage_panels(runs))
        print(f"Stages: {run_dir / 'stages.png'}")
    summary = read_json(run_dir / "memorization.json")
    if summary:
        draw_memorization(run_dir / "memorization.png", summary)
        print(f"Memorization: {run_dir / 'memorization.png'}")


if __name__ == "__main__":
    run_command(main)
