"""Runs side by side: settings that differ, results, and which differences are more than chance.

    python tools/report.py runs/a runs/b ...

Printed, and written beside the first run: compare.html with pictures, compare.csv with the numbers.
Runs of different length are compared at equal tokens. Runs that differ in nothing but seeds are one
variant. Variants that validate on the same text and have seeds in common are compared seed by seed,
because what the seed does to both of a pair cancels in their difference.

Of many comparisons some look good by chance. So the headline is one figure, bits per byte as the
mean over sources; all others are a family apart. The p-values of a family are Holm's (1979): where
nothing differs, at most one family in twenty has a difference that is called more than chance.
"""

import contextlib
import csv
import io
import math
import statistics
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint import list_checkpoints, read_manifest, read_metrics, read_records, weights_hash
from configs import UserError, load, open_ours
from data import load_data, read_json, sha256_json
from eval import by_checkpoint, value
from model import meta_model
from tools import page
from tools.page import Curve, Panel, number

Variants = dict[str, dict[tuple, dict[str, Any]]]  # runs by their other settings, then by SEEDS
Rows = list[dict[str, Any]]  # of a table
SEEDS = ("seed", "init_seed")
HEADLINE = "bits per byte"


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
    trained_on = validated_on = read_manifest(saved[-1])["data_sha256"] if saved else ""
    # Mixtures of the same sources are worth comparing: they may have the same validation sequences.
    with contextlib.suppress(UserError):
        data = load_data(config.data_dir)
        if data.sha256 == trained_on:  # the directory may hold other data by now
            validated_on = sha256_json(data.manifest["valid"])
    # Runs of other data are no repetitions of each other, even if all their settings are the same.
    settings |= {"data": trained_on[:12], "validated_on": (validated_on, config.eval_sequences)}
    return {"settings": settings, "steps": steps, "model": meta_model(config),
            "valid": {step["tokens"]: step["valid"] for step in steps if "valid" in step}}


def scores(run: dict[str, Any], at: int) -> dict[str, float]:
    """The results of a run at a number of tokens, or at its end (0)."""
    by_source = run["valid"].get(at or max(run["valid"], default=0), {})
    found = {f"{HEADLINE} of {name}": number(r.get("bits_per_byte"))
             for name, r in by_source.items()}
    return {HEADLINE: statistics.fmean(found.values())} | found if found else {}


def statistics_of(variants: Variants, figures: list[str], own: list[str]) -> Rows:
    """For each figure the mean of every variant, with the standard deviation over its seeds; and
    the difference of every two, seed by seed, with its standard error and what it shows."""
    rows: Rows = []
    for figure in figures:
        for name, group in variants.items():
            values = [run["results"][figure] for run in group.values()]
            rows.append(mean("variant", name, figure, values))
        for a, b in combinations(variants.values(), 2):
            old, new = ([*group.values()][0]["settings"] for group in (a, b))
            change = ", ".join(f"{key} {old.get(key)} to {new.get(key)}" for key in own
                               if old.get(key) != new.get(key))
            found = [b[seed]["results"][figure] - a[seed]["results"][figure]
                     for seed in a if seed in b and old["validated_on"] == new["validated_on"]]
            rows += [mean("difference", change, figure, found)] if found else []
    for headline in (True, False):
        family = [row for row in rows if row["kind"] == "difference"
                  and (row["figure"] == HEADLINE) == headline]
        adjusted = 0.0
        for factor, row in zip(range(len(family), 0, -1), sorted(family, key=chance)):
            adjusted = max(adjusted, min(1.0, factor * chance(row)))
            row |= {"p": adjusted, "verdict": verdict(row, factor, adjusted)}
    return rows


def mean(kind: str, name: str, figure: str, values: list[float]) -> dict[str, Any]:
    """A mean with its deviation or, of differences, its standard error: NaN of a single value."""
    n, deviation = len(values), statistics.stdev(values) if len(values) > 1 else math.nan
    return {"kind": kind, "name": name, "figure": figure, "n": n, "value": statistics.fmean(values),
            "spread": deviation / math.sqrt(n) if kind == "difference" else deviation}


def chance(row: dict[str, Any], pairs: int = 0) -> float:
    """How probable so large a difference is by chance (Student's t), also if `pairs` pairs had its
    mean and deviation. One pair has no error: 1."""
    n, x, error = row["n"], row["value"], row["spread"]
    if math.isnan(x + error) or not error:
        return float(math.isnan(x + error) or not x)
    t, df = abs(x) / error * math.sqrt((pairs or n) / n), (pairs or n) - 1
    # With t = sqrt(df) tan(angle) the density of t is cos(angle) ** (df - 1), but for a factor.
    tail, half = (np.linspace(low, math.pi / 2, 1001) for low in (math.atan(t / math.sqrt(df)), 0))
    return float(np.trapezoid(np.cos(tail) ** (df - 1), tail)
                 / np.trapezoid(np.cos(half) ** (df - 1), half))


def verdict(row: dict[str, Any], factor: int, adjusted: float) -> str:
    """Whether a difference is more than chance, or how many more seeds would show it if the true
    difference were this one; Holm multiplies its p-value with the factor."""
    n = row["n"]
    if adjusted <= 0.05 or n < 2:
        return "more than chance" if n > 1 else "one pair has no error: train another seed"
    needed = next((m for m in range(n + 1, 200) if factor * chance(row, m) <= 0.05), 0)
    more = f"about {needed - n}" if needed else "hundreds"
    return f"nothing yet: more seeds would decide, {more}"


def aligned(records: Rows) -> str:
    """Cells under each other, each column as wide as its widest cell."""
    padded = [[cell.rjust(max(map(len, column))) for cell in column]
              for column in zip(*page.columns(records))]
    return "\n".join(map("  ".join, zip(*padded)))


def curves(entries: list[dict[str, Any]], kind: str) -> dict[str, Curve]:
    """A curve over tokens for each source or task that entry[kind] has, through all entries."""
    found: dict[str, Curve] = {}
    for entry in entries:
        for name, result in entry.get(kind, {}).items():
            y = number(value(result) if isinstance(result, dict) else result)
            curve = found.setdefault(name.removeprefix("validation "), Curve([], len(found)))
            curve.points.append((number(entry["tokens"]), y))
    return found


def panels(variants: Variants) -> list[Panel]:
    """Training loss and bits per byte of each source: a curve per variant, the mean of its seeds,
    in a band from the smallest to the largest."""
    found: dict[str, Panel] = {}
    for color, (variant, group) in enumerate(variants.items()):
        series: dict[str, dict[float, list[float]]] = {}  # by title and tokens, of each seed
        for run in group.values():
            losses = page.smooth([(step["tokens"], number(step["loss"])) for step in run["steps"]])
            # The steep beginning would flatten all the rest.
            drawn = {"Training loss": Curve(losses[len(losses) // 10 :])}
            for title, curve in (drawn | curves(run["steps"], "valid")).items():
                for x, y in curve.points:
                    series.setdefault(title, {}).setdefault(x, []).append(y)
        for title, at in series.items():
            unit = "nats per token" if title == "Training loss" else HEADLINE
            at = {x: ys for x, ys in at.items() if len(ys) == len(group)}  # where all seeds are
            found.setdefault(title, Panel(title, unit, {})).curves[variant] = Curve(
                [(x, statistics.fmean(ys)) for x, ys in at.items()], color,
                [(min(ys), max(ys)) for ys in at.values()])
    return list(found.values())


def main(argv: list[str]) -> None:
    runs = {path: read_run(path) for path in argv}
    first, *others = [run["settings"] for run in runs.values()]
    differing = [key for key in first if key not in ("name", "run_dir", "data_dir", "validated_on")
                 and any(settings.get(key) != first[key] for settings in others)]
    own = [key for key in differing if key not in SEEDS]
    # The most tokens at which all have validated, 0 if there are none.
    at = max(set.intersection(*(set(run["valid"]) for run in runs.values())), default=0)
    note = (f"All are compared at {at:,} tokens, the most that all have validated at." if at else
            "They have not all validated at the same number of tokens: each is shown at its end.")
    rule = ("More than chance: p <= 0.05 in a t-test after Holm's correction, of the headline (the"
            " mean over sources) and, apart from it, of the sources. Of runs that validate on"
            " different text no difference is taken.")
    facts: Rows = []
    variants: Variants = {}
    for path, run in runs.items():
        settings, run["results"] = run["settings"], scores(run, at)
        speed = round(statistics.median(step["tokens_per_s"] for step in run["steps"]))
        facts.append({"run": path} | {key: str(settings.get(key)) for key in differing} | {
            "parameters": run["model"].n_params, "tokens": at or run["steps"][-1]["tokens"],
            "tokens/s": speed} | run["results"])
        name = ", ".join(f"{key} {settings.get(key)}" for key in own) or "all"
        variants.setdefault(name, {})[tuple(settings.get(key) for key in SEEDS)] = run
    figures = [name for name in run["results"] if all(name in of for of in facts)]
    rows = statistics_of(variants, figures, own)
    print(note, aligned(facts), aligned(rows), rule, sep="\n\n")
    headline = [row for row in rows if (row["kind"], row["figure"]) == ("variant", HEADLINE)]
    bars = {name: Curve([(i + 1, x)], i, [(x - deviation, x + deviation)])
            for i, (_, name, _, _, x, deviation) in enumerate(row.values() for row in headline)}
    path = Path(argv[0]).absolute().parent / "compare.html"
    page.write_page(
        path, f"{len(runs)} runs of {len(variants)} variants", note,
        [(f"{r['value']:.3f} {HEADLINE}", f"{r['name']}: {r['n']} runs"
          + f", ± {r['spread']:.3f}" * (r["n"] > 1)) for r in headline],
        page.tag("div", *map(page.chart, [
            Panel("Mean over sources, and deviation over seeds", HEADLINE, bars, None, "variant"),
            *panels(variants)]), kind="grid"),
        "<h2>Means, and differences seed by seed</h2>", page.table(rows), *page.paragraphs([rule]),
        page.details("Runs", page.table(facts)),
        *page.paragraphs([f"python tools/report.py {' '.join(argv)}"]))
    with io.TextIOWrapper(open_ours(path.with_suffix(".csv")), "utf-8", newline="") as f:
        csv.writer(f).writerows(page.columns([
            {"kind": "run", "name": of["run"], "figure": key, "n": 1, "value": x}
            for of in facts for key, x in of.items() if key != "run"] + rows, ".6g"))
    print(f"\nPictures: {path}; figures: {path.with_suffix('.csv')}")
