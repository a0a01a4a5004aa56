"""Put runs side by side: settings that differ, results, and the spread over seeds.

    python tools/compare.py runs/a runs/b ...

Where runs differ in nothing but the seed, their mean and standard deviation are printed too, which
say what difference is more than chance. With matplotlib, compare.png is drawn beside the runs.
"""

import importlib.util
import math
import os
import statistics
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from checkpoint import read_records
from configs import Config, UserError, run_command
from data import read_json
from model import meta_model
from tools.report import Panel, draw, smooth

PLACES = ("name", "run_dir", "data_dir", "resume")  # they differ, and decide no result


def read_run(path: str) -> dict[str, Any]:
    """Settings, results and loss curve of a run directory; UserError if it is none."""
    settings = read_json(Path(path, "config.json"))
    steps = [r for r in read_records(Path(path, "metrics.jsonl")) if "loss" in r]
    if not (settings and steps):
        raise UserError(f"{path} is not the directory of a run: it has no config.json or no"
                        " metrics.jsonl, which train.py writes.")
    config = Config(**{f.name: settings[f.name] for f in fields(Config) if f.name in settings})
    model, tokens = meta_model(config), steps[-1]["tokens"]
    flops = model.flops_per_token(config.seq_len)
    validations = [step["valid"] for step in steps if "valid" in step]
    by_source = validations[-1] if validations else {}
    scores = {"training loss": statistics.fmean(step["loss"] for step in steps[-20:])}
    if by_source:
        for name, key in (("validation loss", "loss"), ("bits per byte", "bits_per_byte")):
            scores[name] = statistics.fmean(result[key] for result in by_source.values())
    speed = statistics.median(step["tokens_per_s"] for step in steps)
    shown = {"parameters": short(model.n_params), "tokens": short(tokens),
             "FLOPs": f"{flops * tokens:.3g}", "tokens/s": f"{speed:,.0f}"}
    shown |= {name: f"{score:.3f}" for name, score in scores.items()}
    for source, result in by_source.items():
        shown[f"  {source}"] = f"{result['bits_per_byte']:.3f}"
    curve = smooth([(step["tokens"], step["loss"]) for step in steps])
    curve = curve[len(curve) // 10 :]  # the steep beginning would flatten all the rest
    return {"settings": settings, "scores": scores, "shown": shown, "flops": flops, "curve": curve}


def short(x: float) -> str:
    """1.26e12 -> 1.26T"""
    power = max(0, min(4, int(math.log10(max(x, 1)) // 3)))
    return f"{x / 1000**power:.3g}{' kMGT'[power].strip()}" if x < 1e15 else f"{x:.3g}"


def columns(lines: list[list[str]]) -> str:
    """Cells under each other, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = []
    for line in lines:
        aligned.append("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths)))
    return "\n".join(aligned)


def mean_std(values: list[float]) -> str:
    """0.123 ± 0.045; no deviation of one value, and nothing of none."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}" if values else ""


def table(runs: dict[str, dict[str, Any]], differing: list[str]) -> str:
    """A column per run: the settings that differ, then the results."""
    lines = [["", *runs]]
    for key in differing:
        lines.append([key, *(str(run["settings"].get(key)) for run in runs.values())])
    names: list[str] = []  # of results, in order; a run may lack some
    for run in runs.values():
        names += [name for name in run["shown"] if name not in names]
    for name in names:
        lines.append([name, *(run["shown"].get(name, "") for run in runs.values())])
    return columns(lines)


def seed_table(runs: dict[str, dict[str, Any]], differing: list[str]) -> str:
    """A line per group of runs that differ in the seed alone; "" if there is no such group."""
    groups: dict[str, list[dict[str, float]]] = {}
    for run in runs.values():
        settings = [f"{key} {run['settings'].get(key)}" for key in differing if key != "seed"]
        groups.setdefault(", ".join(settings) or "all", []).append(run["scores"])
    if len(groups) == len(runs):
        return ""
    names = list(next(iter(runs.values()))["scores"])
    lines = [["", "runs", *names]]
    for label, group in groups.items():
        line = [label, str(len(group))]
        for name in names:
            line.append(mean_std([scores[name] for scores in group if name in scores]))
        lines.append(line)
    return columns(lines)


def main(argv: list[str]) -> None:
    if len(argv) < 2 or any(path.startswith("-") for path in argv):
        raise UserError("Give two or more run directories: python tools/compare.py runs/a runs/b")
    # Runs are named by what their paths do not have in common.
    top = os.path.commonpath([Path(path).resolve().parent for path in argv])
    runs = {os.path.relpath(path, top): read_run(path) for path in argv}
    settings = [run["settings"] for run in runs.values()]
    differing = []
    for key in settings[0]:
        if key not in PLACES and any(s.get(key) != settings[0][key] for s in settings):
            differing.append(key)
    print(table(runs, differing))
    seeds = seed_table(runs, differing)
    if seeds:
        print(f"\nmean ± standard deviation over seeds\n{seeds}")
    if importlib.util.find_spec("matplotlib"):
        losses = {name: run["curve"] for name, run in runs.items()}
        # Models of different sizes are compared fairly at equal compute, not at equal tokens.
        costs = {}
        for name, run in runs.items():
            costs[name] = [(tokens * run["flops"], loss) for tokens, loss in run["curve"]]
        picture = Path(top, "compare.png")
        draw(picture, [Panel("training loss", "tokens", losses),
                       Panel("training loss", "FLOPs", costs)])
        print(f"Picture: {picture}")


if __name__ == "__main__":
    run_command(main)
