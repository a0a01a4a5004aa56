"""Runs side by side: settings that differ, results, and which differences are more than chance.

    python tools/report.py runs/a runs/b ...

Printed, and written beside the runs: compare.html with the curves, compare.csv with the figures.
Runs of different length are compared at equal tokens. Runs that differ in nothing but seeds are one
group; groups that have seeds in common are compared seed by seed, because what the seed does to
both of a pair cancels in their difference.
"""

import csv
import math
import os
import statistics
from itertools import combinations
from pathlib import Path
from typing import Any

from checkpoint import list_checkpoints, read_manifest, read_metrics
from configs import Config, UserError, load
from data import load_data, read_json, sha256_json
from model import meta_model
from tools.page import Panel, curve_figures, paragraph, smooth, table, text, write_page

PLACES = ("name", "run_dir", "data_dir", "resume")  # they differ, and decide no result
SEEDS = ("seed", "init_seed")


def read_run(path: str) -> dict[str, Any]:
    """Settings, log and validations of a run directory; UserError if it is none."""
    settings = read_json(Path(path, "config.json"))
    steps = [r for r in read_metrics(path).values() if "loss" in r]
    if not (settings and steps):
        raise UserError(f"{path} is not the directory of a run: it has no config.json or no"
                        " metrics.jsonl, which train.py writes.")
    config, _ = load([path])
    # Runs of other data are no repetitions of each other, even if all their settings are the same.
    saved = list_checkpoints(path)
    data_sha256 = read_manifest(saved[-1])["data_sha256"] if saved else ""
    settings["data"] = data_sha256[:12]
    return {"settings": settings, "steps": steps, "model": meta_model(config),
            "validated_on": validation_hash(config, data_sha256),
            "valid": {step["tokens"]: step["valid"] for step in steps if "valid" in step}}


def validation_hash(config: Config, data_sha256: str) -> str:
    """A hash of the sequences that a run validates on; where its data are gone, of all its data."""
    held_out = data_sha256
    try:
        data = load_data(config.data_dir)
        if data.sha256 == data_sha256:  # the directory may hold other data by now
            held_out = sha256_json(data.manifest["valid"])
    except UserError:
        pass
    return f"{held_out}, {config.eval_sequences} of each source"


def common_tokens(runs: dict[str, dict[str, Any]]) -> tuple[int, str]:
    """The most tokens at which all runs have validated (0: none), and what to say of it."""
    ends = [run["steps"][-1]["tokens"] for run in runs.values()]
    common = set.intersection(*(set(run["valid"]) for run in runs.values()))
    at = max(common, default=0)
    if not at:
        return 0, ("There is no number of tokens at which all of these runs have validated: each is"
                   " shown at its end, which compares only what has seen equally much.")
    note = f"All are compared at {at:,} tokens"
    return at, note + ("." if set(ends) == {at} else
                       f", the most that all have validated at; they end at {min(ends):,} to"
                       f" {max(ends):,}.")


def scores(run: dict[str, Any], at: int) -> dict[str, float]:
    """The results of a run at a number of tokens, or at its end (0)."""
    seen = [step for step in run["steps"] if not at or step["tokens"] <= at]
    found = {"training loss": statistics.fmean(step["loss"] for step in seen[-20:])}
    by_source = run["valid"].get(at or max(run["valid"], default=0), {})
    for name, key in (("validation loss", "loss"), ("bits per byte", "bits_per_byte")):
        if by_source:
            found[name] = statistics.fmean(result[key] for result in by_source.values())
    return found | {f"  {source}": r["bits_per_byte"] for source, r in by_source.items()}


def short(x: float) -> str:
    """1.26e12 -> 1.26T"""
    power = max(0, min(4, int(math.log10(max(x, 1)) // 3)))
    return f"{x / 1000**power:.3g}{' kMGT'[power].strip()}" if x < 1e15 else f"{x:.3g}"


def run_lines(runs: dict[str, dict[str, Any]], differing: list[str], at: int) -> list[list[str]]:
    """A column per run: the settings that differ, its size, its results."""
    lines = [["", *runs]]
    for key in differing:
        lines.append([key, *(str(run["settings"].get(key)) for run in runs.values())])
    shown = []
    for run in runs.values():
        model, tokens = run["model"], at or run["steps"][-1]["tokens"]
        flops = model.flops_per_token(model.config.seq_len) * tokens
        speed = statistics.median(step["tokens_per_s"] for step in run["steps"])
        shown.append({"parameters": short(model.n_params), "tokens": short(tokens),
                      "FLOPs": f"{flops:.3g}", "tokens/s": f"{speed:,.0f}"}
                     | {name: f"{score:.3f}" for name, score in scores(run, at).items()})
    for name in dict.fromkeys(name for cells in shown for name in cells):
        lines.append([name, *(cells.get(name, "") for cells in shown)])
    return lines


def group_runs(runs: dict[str, dict[str, Any]], differing: list[str],
               at: int) -> dict[str, dict[tuple, dict[str, float]]]:
    """The runs that differ in seeds alone: by their other settings, then by seeds, the scores."""
    groups: dict[str, dict[tuple, dict[str, float]]] = {}
    for run in runs.values():
        label = ", ".join(f"{key} {run['settings'].get(key)}" for key in differing
                          if key not in SEEDS) or "all"
        seeds = tuple(run["settings"].get(key) for key in SEEDS)
        groups.setdefault(label, {})[seeds] = scores(run, at)
    return groups


def spread_lines(groups: dict[str, dict]) -> list[list[str]]:
    """A line per group: mean and standard deviation over its seeds."""
    names = list(next(iter(next(iter(groups.values())).values())))
    lines = [["", "runs", *names]]
    for label, group in groups.items():
        line = [label, str(len(group))]
        for name in names:
            values = [s[name] for s in group.values() if name in s]
            deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            line.append(f"{statistics.fmean(values):.3f}{deviation}" if values else "")
        lines.append(line)
    return lines


def pair_lines(groups: dict[str, dict]) -> list[list[str]]:
    """For each two groups the difference of each result, seed by seed, and what it shows."""
    lines = [["second minus first", "result", "pairs", "difference", "shows"]]
    for (first, a), (second, b) in combinations(groups.items(), 2):
        seeds = [seed for seed in a if seed in b]
        for name in next(iter(a.values())):
            differences = [b[s][name] - a[s][name] for s in seeds if name in a[s] and name in b[s]]
            if differences and name not in ("training loss", "validation loss"):
                difference, verdict = judge(differences)
                lines.append([f"{second} - {first}", name.strip(), str(len(differences)),
                              difference, verdict])
    return lines


def judge(differences: list[float]) -> tuple[str, str]:
    """A mean difference with its standard error; and whether that is more than chance, or how many
    more seeds would show it if the true difference were this one."""
    mean, n = statistics.fmean(differences), len(differences)
    if not any(differences):
        return f"{mean:+.3f}", "no difference"
    if n < 2:
        return f"{mean:+.3f}", "one pair has no error: train another seed"
    deviation = statistics.stdev(differences)
    error = deviation / math.sqrt(n)
    found = f"{mean:+.3f} ± {error:.3f}"
    if abs(mean) > t95(n) * error:
        return found, "more than chance"
    needed = n + 1
    while needed < 1000 and abs(mean) <= t95(needed) * deviation / math.sqrt(needed):
        needed += 1
    more = f"about {needed - n}" if needed < 1000 else "hundreds"
    return found, f"nothing yet: more seeds would decide, {more}"


def t95(n: int) -> float:
    """How many standard errors the mean of n values must be from 0, to be so by chance once in
    twenty times (Student's t)."""
    return {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}.get(n, 1.96 + 3 / n)


def aligned(lines: list[list[str]]) -> str:
    """Cells under each other, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths))
                     for line in lines)


def panels(runs: dict[str, dict[str, Any]]) -> list[Panel]:
    """Held-out curves of every source, and the training loss over tokens and over FLOPs."""
    found: dict[str, Panel] = {}
    for name, run in runs.items():
        for tokens, by_source in run["valid"].items():
            for source, result in by_source.items():
                panel = found.setdefault(source, Panel(f"bits per byte: {source}", "tokens", {}))
                panel.curves.setdefault(name, []).append((tokens, result["bits_per_byte"]))
    losses, costs = {}, {}
    for name, run in runs.items():
        curve = smooth([(step["tokens"], step["loss"]) for step in run["steps"]])
        losses[name] = curve[len(curve) // 10 :]  # the steep beginning would flatten all the rest
        # Models of different sizes are compared fairly at equal compute, not at equal tokens.
        flops = run["model"].flops_per_token(run["model"].config.seq_len)
        costs[name] = [(tokens * flops, loss) for tokens, loss in losses[name]]
    return [*found.values(), Panel("training loss", "tokens", losses),
            Panel("training loss", "FLOPs", costs)]


def main(argv: list[str]) -> None:
    if len(argv) < 2 or any(path.startswith("-") for path in argv):
        raise UserError("Give two or more run directories: python tools/report.py runs/a runs/b")
    # Runs are named by what their paths do not have in common.
    top = os.path.commonpath([Path(path).resolve().parent for path in argv])
    runs = {os.path.relpath(path, top): read_run(path) for path in argv}
    settings = [run["settings"] for run in runs.values()]
    differing = []
    for key in settings[0]:
        if key not in PLACES and any(s.get(key) != settings[0][key] for s in settings):
            differing.append(key)
    at, note = common_tokens(runs)
    same_text = len({run["validated_on"] for run in runs.values()}) == 1
    if not same_text:
        note += (" They are not known to have validated on the same text: no difference is taken"
                 " seed by seed.")
    groups = group_runs(runs, differing, at)
    tables = {note: run_lines(runs, differing, at)}
    if len(groups) < len(runs):
        tables["mean ± standard deviation over seeds"] = spread_lines(groups)
    if same_text and len(pairs := pair_lines(groups)) > 1:
        tables["bits per byte, seed by seed: mean difference ± standard error (more than chance:"
               " Student's t, 95 %, so once in twenty it is chance)"] = pairs
    print("\n\n".join(f"{title}\n{aligned(lines)}" for title, lines in tables.items()))
    with open(Path(top, "compare.csv"), "w", newline="", encoding="utf-8") as f:
        # A line per run, as spreadsheets want it.
        csv.writer(f).writerows(zip(*run_lines(runs, differing, at)))
    parts = [f"<h3>{text(title)}</h3>{table(lines[0], lines[1:])}"
             for title, lines in tables.items()]
    write_page(Path(top, "compare.html"), " and ".join(runs), paragraph(
        f"python tools/report.py {' '.join(argv)}"),
        {"Figures": "".join(parts), "Curves": curve_figures(panels(runs))})
    print(f"Curves: {Path(top, 'compare.html')}; figures: {Path(top, 'compare.csv')}")
