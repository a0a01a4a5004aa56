"""Runs side by side: settings that differ, results, and which differences are more than chance.

    python tools/report.py runs/a runs/b ...

Printed, and written beside the first run: compare.html with the curves, compare.csv with a line per
run. Runs of different length are compared at equal tokens. Runs that differ in nothing but seeds
are one group. Groups that validate on the same text and have seeds in common are compared seed by
seed, because what the seed does to both of a pair cancels in their difference.
"""

import csv
import io
import math
import statistics
from itertools import combinations
from pathlib import Path
from typing import Any

from checkpoint import list_checkpoints, read_manifest, read_metrics, read_records, weights_hash
from configs import Config, UserError, load, open_ours
from data import load_data, read_json, sha256_json
from eval import by_checkpoint
from model import meta_model
from tools.page import Panel, curve_figures, paragraph, smooth, table, text, write_page

Runs = dict[str, dict[str, Any]]  # by their directories, as `read_run` reads them
Groups = dict[str, dict[tuple, dict[str, float]]]  # results by other settings, then by SEEDS
Lines = list[list[str]]  # a table, its head first
SEEDS = ("seed", "init_seed")


def read_steps(run_dir: str | Path) -> list[dict[str, Any]]:
    """The steps in the log of a run; UserError if it has none."""
    steps = [record for _, record in sorted(read_metrics(run_dir).items()) if "loss" in record]
    if not steps:
        raise UserError(f"{run_dir} is not the directory of a run: it has no metrics.jsonl with"
                        " steps, which train.py writes.")
    return steps


def measured(run_dir: Path, checkpoints: list[Path]) -> list[dict[str, Any]]:
    """The results in eval.jsonl, an entry for each of these checkpoints that has any."""
    # A run that was trained anew has checkpoints of the same names, and other weights.
    weights = {weights_hash(path) for path in checkpoints}
    results = read_records(run_dir / "eval.jsonl")
    results = [r for r in results if isinstance(r.get("of"), dict)]
    return by_checkpoint([r for r in results if r["of"].get("weights") in weights])


def read_run(path: str) -> dict[str, Any]:
    """Settings, log and validations of a run directory."""
    steps, settings = read_steps(path), read_json(Path(path, "config.json"))
    config, saved = load([path])[0], list_checkpoints(path)
    data_sha256 = read_manifest(saved[-1])["data_sha256"] if saved else ""
    # Runs of other data are no repetitions of each other, even if all their settings are the same.
    settings["data"] = data_sha256[:12]
    return {"settings": settings, "steps": steps, "model": meta_model(config),
            "validated_on": (validation_hash(config, data_sha256), config.eval_sequences),
            "valid": {step["tokens"]: step["valid"] for step in steps if "valid" in step}}


def validation_hash(config: Config, data_sha256: str) -> str:
    """A hash of the text that a run validates on; where its data are gone, of all its data."""
    # Mixtures of the same sources are worth comparing: they may have the same validation sequences.
    try:
        data = load_data(config.data_dir)
    except UserError:
        return data_sha256
    # The directory may hold other data by now.
    return sha256_json(data.manifest["valid"]) if data.sha256 == data_sha256 else data_sha256


def scores(run: dict[str, Any], at: int) -> dict[str, float]:
    """The results of a run at a number of tokens, or at its end (0)."""
    by_source = run["valid"].get(at or max(run["valid"], default=0), {})
    found = {}
    for name, key in (("validation loss", "loss"), ("bits per byte", "bits_per_byte")):
        if by_source:
            found[name] = statistics.fmean(result[key] for result in by_source.values())
    return found | {f"  {source}": r["bits_per_byte"] for source, r in by_source.items()}


def run_lines(runs: Runs, differing: list[str], at: int) -> Lines:
    """A column per run: the settings that differ, its size, its results."""
    columns = []
    for name, run in runs.items():
        model, tokens = run["model"], at or run["steps"][-1]["tokens"]
        flops = model.flops_per_token(model.config.seq_len) * tokens
        speed = statistics.median(step["tokens_per_s"] for step in run["steps"])
        cells = {"": name} | {key: str(run["settings"].get(key)) for key in differing}
        cells |= {"parameters": f"{model.n_params:,}", "tokens": f"{tokens:,}",
                  "FLOPs": f"{flops:.3g}", "tokens/s": f"{speed:,.0f}"}
        columns.append(cells | {key: f"{x:.3f}" for key, x in run["results"].items()})
    return [[name, *(cells[name] for cells in columns)] for name in columns[0]]


def spread_lines(groups: Groups, names: list[str]) -> Lines:
    """A line per group: mean and standard deviation over its seeds."""
    lines = [["", "runs", *names]]
    for label, group in groups.items():
        lines.append([label, str(len(group))])
        for name in names:
            values = [results[name] for results in group.values()]
            deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            lines[-1].append(f"{statistics.fmean(values):.3f}{deviation}")
    return lines


def pair_lines(groups: Groups, names: list[str]) -> Lines:
    """For each two groups the difference of each result, seed by seed, and what it shows."""
    lines = [["second minus first", "result", "pairs", "difference", "shows"]]
    for (first, a), (second, b) in combinations(groups.items(), 2):
        for name in names:
            differences = [b[seed][name] - a[seed][name] for seed in a if seed in b]
            if differences:
                lines.append([f"{second} - {first}", name.strip(), str(len(differences)),
                              *judge(differences)])
    return lines


def judge(differences: list[float]) -> tuple[str, str]:
    """A mean difference with its standard error; and whether that is more than chance, or how many
    more seeds would show it if the true difference were this one."""
    mean, n = statistics.fmean(differences), len(differences)
    if n < 2:
        return f"{mean:+.3f}", "one pair has no error: train another seed"
    deviation, needed = statistics.stdev(differences), n
    while needed < 1000 and abs(mean) <= t95(needed) * deviation / math.sqrt(needed):
        needed += 1
    found = f"{mean:+.3f} ± {deviation / math.sqrt(n):.3f}"
    if needed == n:
        return found, "more than chance"
    more = f"about {needed - n}" if needed < 1000 else "hundreds"
    return found, f"nothing yet: more seeds would decide, {more}"


def t95(n: int) -> float:
    """How many standard errors the mean of n values must be from 0, to be so by chance once in
    twenty times (Student's t)."""
    return {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}.get(n, 1.96 + 3 / n)


def aligned(lines: Lines) -> str:
    """Cells under each other, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths))
                     for line in lines)


def panels(runs: Runs) -> list[Panel]:
    """Validation curves of every source, and the training loss."""
    found: dict[str, Panel] = {}
    for name, run in runs.items():
        losses = smooth([(step["tokens"], step["loss"]) for step in run["steps"]])
        # The steep beginning would flatten all the rest.
        curves = {"training loss": losses[len(losses) // 10 :]}
        for tokens, by_source in run["valid"].items():
            for source, result in by_source.items():
                points = curves.setdefault(f"bits per byte: {source}", [])
                points.append((tokens, result["bits_per_byte"]))
        for title, points in curves.items():
            found.setdefault(title, Panel(title, {})).curves[name] = points
    return list(found.values())


def main(argv: list[str]) -> None:
    runs = {path: read_run(path) for path in argv}
    first, *others = [run["settings"] for run in runs.values()]
    differing = [key for key in first if key not in ("name", "run_dir", "data_dir")
                 and any(settings.get(key) != first[key] for settings in others)]
    # The most tokens at which all have validated, 0 if there are none.
    at = max(set.intersection(*(set(run["valid"]) for run in runs.values())), default=0)
    note = (f"All are compared at {at:,} tokens, the most that all have validated at." if at else
            "They have not all validated at the same number of tokens: each is shown at its end.")
    results = [scores(run, at) for run in runs.values()]
    names = [name for name in results[0] if all(name in others for others in results)]
    groups: Groups = {}
    for run, found in zip(runs.values(), results):
        run["results"] = {name: found[name] for name in names}
        label = ", ".join(f"{key} {run['settings'].get(key)}" for key in differing
                          if key not in SEEDS)
        seeds = tuple(run["settings"].get(key) for key in SEEDS)
        groups.setdefault(label or "all", {})[seeds] = run["results"]
    tables = {note: run_lines(runs, differing, at)}
    if len(groups) < len(runs):
        tables["mean ± standard deviation over seeds"] = spread_lines(groups, names)
    pairs = pair_lines(groups, names)
    same_text = len({run["validated_on"] for run in runs.values()}) == 1
    if len(pairs) > 1 and same_text:
        tables["seed by seed: difference ± standard error (more than chance: t-test, 95 %)"] = pairs
    print("\n\n".join(f"{title}\n{aligned(lines)}" for title, lines in tables.items()))
    if not same_text:
        print("They have not all validated on the same text: no difference is taken seed by seed.")
    figures = "".join(f"<h3>{text(title)}</h3>{table(lines)}" for title, lines in tables.items())
    path = Path(argv[0]).absolute().parent / "compare.html"
    write_page(path, " and ".join(runs), paragraph(f"python tools/report.py {' '.join(argv)}"),
               {"Figures": figures, "Curves": curve_figures(panels(runs))})
    with io.TextIOWrapper(open_ours(path.with_suffix(".csv")), "utf-8", newline="") as f:
        csv.writer(f).writerows(zip(*run_lines(runs, differing, at)))
    print(f"Curves: {path}; figures: {path.with_suffix('.csv')}")
