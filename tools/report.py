"""Everything about a run on one page, runs/NAME/report.html; or runs side by side.

    python tools/report.py runs/amber_tiny              # needs no network
    python tools/report.py runs/amber_tiny --outliers   # steps that are worth a look; no page
    python tools/report.py runs/amber_7b --published=configs/amber_7b_published.csv
    python tools/report.py runs/a runs/b ...            # a comparison: see tools/compare.py

On top what the run came to, then pictures and samples; then, folded, what LLM360 publishes of a
training: metrics, checkpoints, data in their order, code and configuration.
"""

import csv
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np  # noqa: E402

from checkpoint import list_checkpoints, read_manifest, read_metrics  # noqa: E402
from configs import Config, load, run_command, with_recorded  # noqa: E402
from data import read_json  # noqa: E402
from eval import value  # noqa: E402
from memorize import double_center  # noqa: E402
from model import meta_model  # noqa: E402
from tools import bands, compare, page  # noqa: E402
from tools.compare import curves  # noqa: E402
from tools.page import Curve, Panel, human, number, smooth, text  # noqa: E402

WINDOW = 51  # steps that a band is made of, half of them before and half after; all, if fewer


@dataclass
class Flags:
    """What this tool takes beside the settings."""

    outliers: bool = False  # print the steps whose loss or gradient norm stands out; no page
    published: str = ""  # .csv of another run's scores, drawn beside ours: tokens, one per task
    seeds: int = 0  # two or more: train so many, and make docs/bands.json of this config


def records(config: Config, manifests: dict[str, Any], audit: dict[str, Any]) -> list[str]:
    """Folded: checkpoints with what the audit says of them, data in their order, code, settings."""
    checked, default = audit.get("checkpoints", {}), asdict(Config())
    saved = [{"checkpoint": name} | {key: m[key] for key in ("step", "tokens", "chunk")}
             | checked.get(name, {}) | {"sha256 of the weights": m["weights_sha256"][:16]}
             for name, m in manifests.items()]
    said = [f"{key}: {line}" for key, found in audit.items() if isinstance(found, list)
            for line in found or [f"no {key}"]]
    sources = read_json(Path(config.data_dir, "manifest.json")).get("sources", [])
    newest = [{}, *manifests.values()][-1]
    own = [{"setting": key, "here": repr(x), "default": repr(default[key])}
           for key, x in asdict(config).items() if x != default[key]]
    return [page.details("Checkpoints and audit", page.table(saved), *page.paragraphs(said)),
            page.details("Data, in its order", page.table(sources), *page.paragraphs([
                f"Step s (from 0) of chunk c reads default_rng([{config.seed}, c]).permutation(n)["
                f"s*B:(s+1)*B] of its n sequences, with B = {config.global_batch_size}."])),
            page.details("Code and settings", page.table([newest.get("environment", {}) | {
                "commit": newest.get("git_commit")}]), page.table(own))]


def published_scores(path: str, ours: dict[str, Curve], tokens: int) -> dict[str, Curve]:
    """Another run's scores in our tasks, up to the tokens that ours has read; some lack a score."""
    lines = Path(path).read_text(encoding="utf-8").splitlines() if path else []
    lines = [*csv.DictReader(line for line in lines if not line.startswith("#"))]
    found = {}
    for name, curve in ours.items():
        if points := [(float(line["tokens"]), float(line[name])) for line in lines
                      if line.get(name) and float(line["tokens"]) <= tokens]:
            found[f"{name}, published"] = Curve(points, curve.color, dotted=True)
    return found


def results(run_dir: Path, log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What eval.py measured, an entry per checkpoint; then what training validated since."""
    entries = compare.measured(run_dir, list_checkpoints(run_dir))
    since = entries[-1]["tokens"] if entries else 0
    return entries + [{"tokens": step["tokens"], "text": step["valid"], "tasks": {}}
                      for step in log if "valid" in step and step["tokens"] > since]


def stage_panels(run_dir: Path) -> list[Panel]:
    """A panel per source for a run and those it goes on from: bits per byte over the tokens of all
    of them, a curve for each. Empty for a run that began with random weights."""
    stages: dict[Path, int] = {}  # the tokens that the run before had read, newest run first
    # The newest checkpoint of a run records the checkpoint that the run started from.
    while run_dir not in stages and (saved := list_checkpoints(run_dir)):
        origin = read_manifest(saved[-1]).get("started_from") or {}
        stages[run_dir] = origin.get("tokens") or 0
        there = read_manifest(Path(origin.get("path", ""))).get("weights_sha256")
        if not origin or there != origin["weights_sha256"]:  # it was trained anew since
            break
        run_dir = Path(origin["path"]).parent
    panels: dict[str, Panel] = {}
    for i, run in enumerate(reversed(stages) if len(stages) > 1 else ()):
        before = sum([*stages.values()][-1 - i :])
        for name, curve in curves(results(run, [*read_metrics(run).values()]), "text").items():
            panel = panels.setdefault(name, Panel(name, "bits per byte", {}))
            panel.curves[run.name] = Curve([(before + x, y) for x, y in curve.points], i)
    return list(panels.values())


def samples(run_dir: Path) -> list[str]:
    """What training wrote at each checkpoint, from train.log: a line each, which unfolds."""
    log, found = run_dir / "train.log", {}
    lines = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    for step, words in re.findall(r"^step (\d+)/.*\nsample: (.*)$", lines, re.M):
        words = words[1:-1].replace("\\n", "\n")  # it is quoted there
        # By step: one that was made again after a kill counts once.
        found[int(step)] = page.details(f"step {step}: {' '.join(words.split())}",
                                        page.tag("pre", text(words)))
    return [found[step] for step in sorted(found)]


def memory_figures(summary: dict[str, Any]) -> list[str]:
    """The forgetting curve, and heat maps of checkpoints and chunks."""
    loss, score = (np.array([[number(cell[key]) for cell in row] for row in summary["cells"]])
                   for key in ("loss", "score"))  # (C, N)
    # Empty where few checkpoints or chunks do not separate the effect of age from the levels.
    ages = [(int(age.split()[0]), number(f["loss"]), number(f["loss_se"]))
            for age, f in summary["forgetting"].items()]
    forgetting = Curve([(age, x) for age, x, _ in ages], 0, [(x - e, x + e) for _, x, e in ages])
    places = [name.removeprefix("ckpt_0") for name in summary["checkpoints"]], summary["chunks"]
    about = "a row per checkpoint, a column per chunk: "
    return [page.chart(Panel("Loss on text it has read", "nats per token", {"": forgetting},
                             (0, "as text not read yet"), "chunks since; 7: 7 and more")),
            page.heat("What it remembers", about + "nats below both levels; orange: above",
                      -double_center(loss), *places),
            page.heat("Memorization score", about + "% of the tokens", 100 * score, *places)]


def find_outliers(log: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """(step, in words) of each loss and gradient norm outside the band of the WINDOW steps around
    it: a Hampel filter."""
    found, n, size = [], len(log), min(WINDOW, len(log))
    # For each step the window around it; at both ends the nearest whole one.
    nearest = np.clip(np.arange(n) - size // 2, 0, n - size)
    for key, name in (("loss", "loss"), ("grad_norm", "gradient norm")):
        values = np.array([number(record.get(key)) for record in log])
        windows = np.lib.stride_tricks.sliding_window_view(values, size)[nearest]  # (n, size)
        # Median and median absolute deviation, because outliers would move mean and standard
        # deviation. 1.4826 makes it the standard deviation of normal values, of which one in 500
        # million is beyond six. A value within 1 % of the median is no outlier either.
        median = np.nanmedian(windows, axis=1)
        deviation = np.nanmedian(np.abs(windows - median[:, None]), axis=1)
        width = np.maximum(6 * 1.4826 * deviation, 0.01 * np.abs(median))
        low, high = median - width, median + width
        # A value that is not finite is in no band.
        for k in np.flatnonzero(~((low <= values) & (values <= high))).tolist():
            usual = f"{low[k]:.3f} to {high[k]:.3f}" if low[k] > 0 else f"at most {high[k]:.3f}"
            losses = sorted(((number(x), source) for source, x in log[k]["loss_by_source"].items()))
            sources = ", ".join(f"{source} {x:.3f}" for x, source in losses[::-1])
            found.append((log[k]["step"], f"{name} {values[k]:.3f}, where {usual} is usual; loss of"
                          f" {sources}"))
    return sorted(found)


def main(argv: list[str]) -> None:
    if sum(not word.startswith("-") for word in argv) > 1:
        return compare.main(argv)
    config, flags = load(argv, Flags)
    if flags.seeds > 1:
        return bands.make(config, next(x for x in argv if not x.startswith("-")), flags.seeds)
    log, run_dir = compare.read_steps(config.run_dir), Path(config.run_dir)
    config = with_recorded(config, read_json(run_dir / "config.json"))
    outliers = [f"Step {step}: {words}: python tools/lookup.py {run_dir} --step={step}"
                for step, words in find_outliers(log)]
    heading = f"Of {len(log):,} steps, {len(outliers)} values stand out of the {WINDOW} around them"
    if flags.outliers:
        return print("\n".join([heading, *outliers]))
    manifests = {path.name: read_manifest(path) for path in list_checkpoints(run_dir)}
    memory, audit = (read_json(run_dir / f"{name}.json") for name in ("memorization", "audit"))
    entries, written, stages = results(run_dir, log), samples(run_dir), stage_panels(run_dir)
    tasks = next((entry["tasks"] for entry in entries[::-1] if entry["tasks"]), {})
    bits, scores, verdict = curves(entries, "text"), curves(entries, "tasks"), bands.check(config)
    measured = [{"tokens": human(entry["tokens"])} | {
        name: curve.points[0][1] for kind in ("text", "tasks")
        for name, curve in curves([entry], kind).items()} for entry in entries]
    losses = {name: Curve(smooth(curve.points), curve.color)
              for name, curve in curves(log, "loss_by_source").items()}
    rate, norm, speed = ([(step["tokens"], number(step.get(key))) for step in log]
                         for key in ("lr", "grad_norm", "tokens_per_s"))
    norms = {"mean": Curve(smooth(norm)), "largest": Curve(smooth(norm, np.max), 1)}
    chances = {r["chance"] for r in tasks.values()}
    pictures = [page.chart(panel) for panel in (
        Panel("Training loss", "nats per token", losses),
        Panel("Text it has never seen", "bits per byte", bits),
        Panel("Questions answered right", "share", scores | published_scores(
            flags.published, scores, log[-1]["tokens"]),
              (chances.pop(), "chance") if len(chances) == 1 else None),
        Panel("Gradient norm", "before clipping", norms, (config.grad_clip, "clipped")),
        Panel("Learning rate", "rate", {"": Curve(smooth(rate))}, (0, "")),
        Panel("Speed", "tokens per second", {"": Curve(smooth(speed))}, (0, ""))) if panel.curves]
    pictures[-3:-3] = memory_figures(memory) if memory else []
    cards = []  # large figures, each with what it is, and more
    if last := {name: bits[name].points[-1][1] for name in curves(log, "valid") if name in bits}:
        usual = ", NOT as expected" if "\n" in verdict else ", as expected" if verdict else ""
        cards.append((f"{np.mean([*last.values()]):.2f} bits per byte",
                      f"of text that it has never seen{usual}",
                      ", ".join(f"{name} {x:.2f}" for name, x in last.items())))
    if tasks:
        right, guess = np.mean([(number(value(r)), r["chance"]) for r in tasks.values()], axis=0)
        cards.append((f"{right:.0%} of questions", f"answered right (a guess: {guess:.0%})",
                      ", ".join(f"{name} {number(value(r)):.0%} ± {r[r['metric'] + '_se']:.0%}"
                                for name, r in tasks.items())))
    if ages := {age: -number(f["loss"]) for age, f in memory.get("forgetting", {}).items()}:
        recited = sum(f["extractible"] * f["sequences"] for f in memory["by_source"].values())
        cards.append((f"{[*ages.values()][0]:.2f} nats", "remembered of the chunk just read",
                      f"{[*ages.values()][-1]:.2f} at age {[*ages][-1]}; recited: {recited:.0f}"))
    found = f"{len(audit.get('findings', [])) or 'nothing'} found" if audit else "not audited"
    cards.append((found, "by the audit", f"checkpoints {len(audit.get('checkpoints', []))}"))
    model, tokens = meta_model(config), log[-1]["tokens"]
    lead = (f"A language model of {human(model.n_params)} parameters that has read {human(tokens)}"
            f" tokens: {'; '.join(f'{large} {what}' for large, what, _ in cards)}.")
    flops = f"{model.flops_per_token(config.seq_len) * tokens:.3g}"
    minutes = np.nansum(config.tokens_per_step / np.array([y for _, y in speed])) / 60
    cards.append((f"{minutes:,.0f} minutes", "of training", f"{len(log):,} steps, {flops} FLOPs"))
    words = re.findall(r"\*\*(.+)\*\*: (.+)", (bands.ROOT / "tools/glossary.md").read_text("utf-8"))
    page.write_page(
        run_dir / "report.html", str(run_dir), lead,
        [(large, f"{what}: {more}") for large, what, more in cards],
        page.tag("div", *pictures, kind="grid"),
        "<h2>With the runs that it goes on from</h2>" * bool(stages),
        page.tag("div", *map(page.chart, stages), kind="grid"),
        "<h2>What it wrote, checkpoint by checkpoint</h2>" * bool(written),
        page.tag("div", *written, kind="list"), "<h2>Details</h2>",
        page.details("Results", page.table(measured), *page.paragraphs([verdict])),
        page.details(heading, *page.paragraphs(outliers[:50])),
        *records(config, manifests, audit), "<h2>What the words mean</h2>",
        page.tag("dl", *(f"<dt>{text(word)}</dt><dd>{text(about)}</dd>" for word, about in words)),
        *page.paragraphs([f"python tools/report.py {run_dir}"]))
    print("\n".join([f"Report: {run_dir / 'report.html'}", *filter(None, [verdict])]))


if __name__ == "__main__":
    run_command(main)
