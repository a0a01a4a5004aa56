"""Everything about a run on one page, runs/NAME/report.html; or runs side by side.

    python tools/report.py runs/amber_tiny              # needs matplotlib, and no network
    python tools/report.py runs/amber_tiny --outliers   # steps that are worth a look; no page
    python tools/report.py runs/amber_7b --published=configs/amber_7b_published.csv
    python tools/report.py runs/a runs/b ...            # a comparison: see tools/compare.py

Its four sections are the four things that LLM360 publishes of a training: the data in their order,
code and configuration, checkpoints, metrics with analyses.
"""

import csv
import sys
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np  # noqa: E402

from checkpoint import list_checkpoints, read_manifest  # noqa: E402
from configs import Config, UserError, load, run_command  # noqa: E402
from data import load_data, read_json  # noqa: E402
from eval import value  # noqa: E402
from memorize import double_center  # noqa: E402
from model import meta_model  # noqa: E402
from tools import compare, page  # noqa: E402
from tools.page import Panel, Points, paragraph, source, table  # noqa: E402

WINDOW = 51  # steps that a band is made of, half of them before and half after; all, if fewer


@dataclass
class Flags:
    """What this tool takes beside the settings."""

    outliers: bool = False  # print the steps whose loss or gradient norm stands out; no page
    published: str = ""  # .csv of another run's scores, drawn beside ours: tokens, one per task


def data_section(config: Config) -> str:
    """What the run has seen, and in what order."""
    try:
        data = load_data(config.data_dir)
    except UserError as error:
        return paragraph(str(error))
    m = data.manifest
    n = sum(chunk["sequences"] for chunk in m["chunks"])
    lines = [[entry["name"], entry.get("weight", 1), f"{entry.get('documents', 0):,}",
              f"{entry.get('bytes', 0) / 1e6:.2f}", f"{entry['train_sequences']:,}",
              f"{entry['train_sequences'] / n:.1%}", entry["valid_sequences"]]
             for entry in m["sources"]]
    head = ["source", "weight", "documents", "MB", "sequences", "share", "validation"]
    return "".join([
        paragraph(f"{n:,} sequences of {data.seq_len} + 1 tokens in {len(m['chunks'])} chunks, seen"
                  f" {config.epochs} x; tokenizer {m['tokenizer']['kind']} with {data.n_vocab:,}"
                  f" ids; sha256 of the manifest {data.sha256}."),
        table([head, *lines]), source(f"python prepare_data.py configs/{config.name}.py"),
        paragraph(f"Step s (from 0) of chunk c reads default_rng([{config.seed}, c]).permutation(n)"
                  f"[s*B:(s+1)*B] of its n sequences, with B = {config.global_batch_size}. In a"
                  f" later pass p the key is [{config.seed}, c, p]."),
        source(f"python tools/lookup.py {config.run_dir} --step=1")])


def code_section(config: Config, manifest: dict[str, Any]) -> str:
    """The code, the machine and the settings of the run that are not Amber's."""
    facts = {"commit": manifest.get("git_commit") or "not known"} | manifest.get("environment", {})
    amber = asdict(Config())
    own = [[k, repr(v), repr(amber[k])] for k, v in asdict(config).items() if v != amber[k]]
    return "".join([
        table([["", ""], *facts.items()]), source(f"{config.run_dir}/ckpt_*/manifest.json"),
        table([["setting", "here", "Amber's"], *own]),
        source(f"{config.run_dir}/config.json", "python train.py -h")])


def checkpoint_section(run_dir: Path, manifests: dict[str, dict[str, Any]]) -> str:
    """Each checkpoint, and the findings of the audit."""
    lines = [[name, f"{m['step']:,}", f"{m['tokens']:,}", m["chunk"],
              "with optimizer" if (run_dir / name / "train_state").exists() else "weights",
              m["weights_sha256"][:16]] for name, m in manifests.items()]
    head = ["checkpoint", "step", "tokens", "chunk", "", "sha256 of the weights"]
    parts = [table([head, *lines]), "<h3>Audit</h3>"]
    if audit := read_json(run_dir / "audit.json"):
        checks = ("files", "twins", "path", "trace", "log")
        rows = [[name, *(cells.get(check, "-") for check in checks)]
                for name, cells in audit["checkpoints"].items()]
        parts += [table([["checkpoint", *checks], *rows]),
                  *map(paragraph, audit["findings"] or ["Nothing found."])]
    else:
        parts.append(paragraph("This run has not been audited."))
    return "".join(parts) + source(f"python audit.py {run_dir}")


def published_scores(path: str, last: dict[str, Any]) -> dict[str, Points]:
    """Another run's scores in the tasks of `last`, our last checkpoint, up to its tokens."""
    scores: dict[str, Points] = {}
    lines = Path(path).read_text(encoding="utf-8").splitlines() if path else []
    for line in csv.DictReader(line for line in lines if not line.startswith("#")):
        for name in last["tasks"]:
            if line.get(name) and float(line["tokens"]) <= last["tokens"]:  # some have no score
                scores.setdefault(name, []).append((float(line["tokens"]), float(line[name])))
    return scores


def curves(entries: list[dict[str, Any]], kind: str) -> dict[str, Points]:
    """A curve per source ("text") or task ("tasks"), through all checkpoints that have it."""
    found: dict[str, Points] = {}
    for entry in entries:
        for name, result in entry[kind].items():
            found.setdefault(name, []).append((entry["tokens"], value(result)))
    return found


def result_table(entries: list[dict[str, Any]], published: dict[str, Points]) -> str:
    """The results of the last checkpoint."""
    if not entries:
        return paragraph("It has not been evaluated.")
    last, rows = entries[-1], []
    for name, r in last["text"].items():
        rows.append([name, f"{r['bits_per_byte']:.3f} bits per byte", f"loss {r['loss']:.3f}"])
    for name, r in last["tasks"].items():
        about = f"{r['metric']} of {r['n']:,}, chance {r['chance']:.3f}"
        if name in published:
            theirs = np.interp(last["tokens"], *zip(*published[name]))
            about += f", published at these tokens {theirs:.3f}"
        rows.append([name, f"{value(r):.3f} ± {r[r['metric'] + '_se']:.3f}", about])
    return table([[last["checkpoint"], "", ""], *rows])


def stage_panels(run_dir: Path) -> list[Panel]:
    """A panel per source for a run and those it goes on from: bits per byte over the tokens of all
    of them, a curve for each. Empty for a run that began with random weights."""
    stages: list[tuple[Path, int]] = []  # (directory, tokens of the run before), newest first
    # The newest checkpoint of a run records the checkpoint that the run started from.
    while run_dir not in [run for run, _ in stages] and (saved := list_checkpoints(run_dir)):
        origin = read_manifest(saved[-1]).get("started_from") or {}
        stages.append((run_dir, origin.get("tokens") or 0))
        there = read_manifest(Path(origin.get("path", ""))).get("weights_sha256")
        if not origin or there != origin["weights_sha256"]:  # it was trained anew since
            break
        run_dir = Path(origin["path"]).parent
    panels: dict[str, Panel] = {}
    before = 0
    for run, tokens in reversed(stages) if len(stages) > 1 else ():
        before += tokens
        for name, points in curves(compare.measured(run, list_checkpoints(run)), "text").items():
            empty = Panel(name.removeprefix("validation "), {})
            panels.setdefault(name, empty).curves[run.name] = [(before + x, y) for x, y in points]
    return list(panels.values())


def heat_figure(title: str, values: Any, rows: list[str], columns: list[Any]) -> str:
    """Values (C, N) as an image, a line per checkpoint; None, an undefined one, becomes NaN."""
    def work(axis: Any) -> None:
        shown = axis.imshow(np.array(values, float), aspect="auto", origin="lower")
        axis.figure.colorbar(shown, ax=axis)
        every = -(-len(columns) // 12)  # 12 labels fit
        axis.set_xticks(range(0, len(columns), every), columns[::every])
        axis.set(title=title, ylabel="checkpoint", yticks=range(len(rows)), yticklabels=rows)

    return page.draw(work)


def memorization_part(run_dir: Path, summary: dict[str, Any]) -> str:
    """The forgetting curve, and heat maps."""
    labels = [name.removeprefix("ckpt_").lstrip("0") or "0" for name in summary["checkpoints"]]
    cells = np.array(summary["cells"])  # (C, N) of dicts
    loss, score = (np.vectorize(itemgetter(key))(cells) for key in ("loss", "score"))  # (C, N)
    # With few checkpoints or chunks the effect of age cannot be separated from the levels.
    by_age = summary["forgetting"] or summary["by_age"]

    def forgetting(axis: Any) -> None:
        axis.errorbar([age.replace(" and more", "+") for age in by_age],
                      [f["loss"] for f in by_age.values()],
                      [f["loss_se"] for f in by_age.values()], marker=".")
        axis.set(xlabel="chunks since it was seen", ylabel="nats",
                 title="loss against unseen chunks" if summary["forgetting"] else "loss by age")

    return "<h3>What it remembers</h3>" + page.grid([
        page.draw(forgetting),
        heat_figure("loss, nats below the levels, by chunk", -double_center(loss), labels,
                    summary["chunks"]),
        heat_figure("memorization score, %, by chunk", 100 * score, labels, summary["chunks"]),
        heat_figure("correlation of the sequences' scores", summary["correlation"]["score"],
                    labels, labels)]) + source(f"python memorize.py {run_dir}")


def find_outliers(log: list[dict[str, Any]]) -> list[tuple[int, str, float, float, float]]:
    """(step, "loss" or "grad_norm", value, low, high) of the values outside the band of the WINDOW
    steps around them: a Hampel filter."""
    found, n, size = [], len(log), min(WINDOW, len(log))
    # For each step the window around it; at both ends the nearest whole one.
    nearest = np.clip(np.arange(n) - size // 2, 0, n - size)
    for key in ("loss", "grad_norm"):
        values = np.array([record[key] for record in log], dtype=float)
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
            found.append((log[k]["step"], key, values[k], low[k], high[k]))
    return sorted(found)


def metrics_section(run_dir: Path, log: list[dict[str, Any]], published_file: str) -> str:
    """Curves, scores, memory, and the number of steps that stand out."""
    losses: dict[str, Points] = {}
    for step in log:
        for name, loss in step["loss_by_source"].items():
            losses.setdefault(name, []).append((step["tokens"], loss))
    entries = compare.measured(run_dir, list_checkpoints(run_dir))
    published = published_scores(published_file, entries[-1]) if entries else {}
    parts = [
        page.curve_figures([
            Panel("training loss", {name: page.smooth(losses[name]) for name in losses}),
            Panel("bits per byte", curves(entries, "text")),
            Panel("accuracy", curves(entries, "tasks"), published)]),
        result_table(entries, published),
        source(f"{run_dir}/metrics.jsonl", f"python eval.py {run_dir}")]
    if stages := stage_panels(run_dir):
        parts += ["<h3>With the runs that it goes on from: bits per byte</h3>",
                  page.curve_figures(stages)]
    summary = read_json(run_dir / "memorization.json")
    parts.append(memorization_part(run_dir, summary) if summary else paragraph(
        f"What it remembers has not been measured: python memorize.py {run_dir}"))
    parts.append(paragraph(f"Values that stand out in the log: {len(find_outliers(log))}"))
    return "".join(parts) + source(f"python tools/report.py {run_dir} --outliers")


def main(argv: list[str]) -> None:
    runs = [word for word in argv if not word.startswith("-")]
    if len(runs) > 1:
        return compare.main(argv)
    config, flags = load(argv, Flags)
    log, run_dir = compare.read_steps(config.run_dir), Path(config.run_dir)
    if flags.outliers:
        print(f"Of {len(log):,} steps these leave the band of the {WINDOW} around them:")
        for step, key, x, low, high in find_outliers(log):
            print(f"step {step}: {key} {x:.3f}, band {low:.3f} to {high:.3f}: python"
                  f" tools/lookup.py {run_dir} --step={step}")
        return
    manifests = {path.name: read_manifest(path) for path in list_checkpoints(run_dir)}
    model, tokens = meta_model(config), log[-1]["tokens"]
    flops = model.flops_per_token(config.seq_len) * tokens
    intro = paragraph(f"{model.n_params:,} parameters, {tokens:,} tokens in {len(log):,} steps,"
                      f" {flops:.3g} FLOPs.") + source(f"python tools/report.py {run_dir}")
    page.write_page(run_dir / "report.html", str(run_dir), intro, {
        "Metrics and analyses": metrics_section(run_dir, log, flags.published),
        "Checkpoints": checkpoint_section(run_dir, manifests),
        "Data, in its order": data_section(config),
        "Code and configuration": code_section(config, next(reversed(manifests.values()), {}))})
    print(f"Report: {run_dir / 'report.html'}")


if __name__ == "__main__":
    run_command(main)
