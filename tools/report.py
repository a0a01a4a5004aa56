"""Everything about a run on one page, runs/NAME/report.html; or runs side by side.

    python tools/report.py runs/amber_tiny          # needs matplotlib, and no network
    python tools/report.py runs/a runs/b ...        # a comparison: see tools/compare.py

Its four sections are the four things that LLM360 publishes of a training: the data in their order,
code and configuration, checkpoints, metrics with analyses. Beside each figure stands the command
that it comes from.
"""

import ast
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np  # noqa: E402

from checkpoint import (  # noqa: E402
    RESULT,
    list_checkpoints,
    read_manifest,
    read_metrics,
    read_records,
    weights_hash,
)
from configs import Config, UserError, load, run_command  # noqa: E402
from data import load_data, read_json  # noqa: E402
from eval import by_checkpoint, published_scores, value  # noqa: E402
from lookup import find_outliers  # noqa: E402
from memorize import cell_means, double_center  # noqa: E402
from model import meta_model  # noqa: E402
from tools import compare  # noqa: E402
from tools.page import (  # noqa: E402
    Panel,
    Points,
    curve_figures,
    draw,
    grid,
    import_pyplot,
    paragraph,
    smooth,
    source,
    table,
    text,
    write_page,
)


def made_of(file: Path | str, work: Callable[[], str]) -> str:
    """A part of the page; a sentence where the file that it is made of has another form than this
    code gives it, as a stranger's may."""
    try:
        return work()
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        return paragraph(f"{file} cannot be shown: it does not have the form that it should"
                         f" ({type(error).__name__}: {error}).")


# ---------------------------------------------------------------------------------------------
# data


def data_section(config: Config) -> str:
    """What the run has seen, and in what order."""
    try:
        data = load_data(config.data_dir)
    except UserError as error:
        return paragraph(str(error))
    m = data.manifest
    n = sum(chunk["sequences"] for chunk in m["chunks"])
    lines = []
    for entry in m["sources"]:
        lines.append([entry["name"], entry.get("weight", 1), f"{entry.get('documents', 0):,}",
                      f"{entry.get('bytes', 0) / 1e6:.2f}", f"{entry['train_sequences']:,}",
                      f"{entry['train_sequences'] / n:.1%}", entry["valid_sequences"]])
    order = (f"Step s (from 0) of chunk c reads the sequences default_rng([{config.seed}, c])"
             f".permutation(n)[s*B:(s+1)*B], where the chunk has n sequences and B is"
             f" {config.global_batch_size}. In a later pass p the key is [{config.seed}, c, p].")
    chunks = [[i, f"{c['sequences']:,}", c["sha256"]] for i, c in enumerate(m["chunks"])]
    return "".join([
        paragraph(f"{n:,} sequences of {data.seq_len} + 1 tokens in {len(m['chunks'])} chunks, seen"
                  f" {config.epochs} x; tokenizer {m['tokenizer']['kind']} with {data.n_vocab:,}"
                  f" ids; sha256 of the manifest {data.sha256}."),
        table(["source", "weight", "documents", "MB", "sequences", "share", "validation"], lines),
        source(f"python prepare_data.py {config.run_dir}"), paragraph(order),
        source(f"python lookup.py {config.run_dir} --step=1"),
        f"<details><summary>sha256 of every chunk</summary>"
        f"{table(['chunk', 'sequences', 'sha256'], chunks)}</details>"])


# ---------------------------------------------------------------------------------------------
# code and configuration


def code_section(config: Config, manifest: dict[str, Any]) -> str:
    """With which code, on what, and with which settings."""
    facts = [["commit", manifest.get("git_commit") or "not known"],
             *manifest.get("environment", {}).items()]
    default, settings = asdict(Config()), asdict(config)
    own = [[key, repr(v), repr(default[key])] for key, v in settings.items() if v != default[key]]
    return "".join([
        table(["", ""], facts), source(f"{config.run_dir}/ckpt_*/manifest.json"),
        table(["setting", "here", "Amber's"], own),
        source(f"{config.run_dir}/config.json", "python train.py -h"),
        "<details><summary>every setting</summary>"
        f"{table(['setting', 'value'], [[k, repr(v)] for k, v in settings.items()])}</details>"])


# ---------------------------------------------------------------------------------------------
# checkpoints


def samples(run_dir: Path) -> dict[int, str]:
    """The text that the model wrote at the end of each chunk, by step, from train.log."""
    found, step, file = {}, 0, run_dir / "train.log"
    log = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    for line in log.split("\n"):
        if match := re.match(r"step (\d+)/", line):
            step = int(match[1])
        elif match := re.fullmatch(r"sample: (['\"].*)", line):
            try:
                found[step] = str(ast.literal_eval(match[1]))
            except (ValueError, SyntaxError):
                continue
    return found


def audit_part(audit: dict[str, Any]) -> str:
    """The table of audit.json, and what was found."""
    checks = ("files", "twins", "path", "trace", "log")
    rows = [[name, *(cells.get(c, "-") for c in checks)]
            for name, cells in audit["checkpoints"].items()]
    sentences = [f"{found['check']}: {found['sentence']}" for found in audit["findings"]]
    return "".join(["<h3>Audit</h3>", table(["checkpoint", *checks], rows),
                    *map(paragraph, sentences or ["Nothing found."])])


def checkpoint_section(config: Config, manifests: dict[str, dict]) -> str:
    """Each checkpoint, what it writes, and what an audit says of it."""
    run_dir, lines = Path(config.run_dir), []
    for name, m in manifests.items():
        state = "with optimizer" if (run_dir / name / "train_state").exists() else "weights"
        lines.append([name, f"{m['step']:,}", f"{m['tokens']:,}", m["chunk"], state,
                      m["weights_sha256"][:16]])
    parts = [table(["checkpoint", "step", "tokens", "chunk", "", "sha256 of the weights"], lines)]
    audit = read_json(run_dir / "audit.json")
    parts.append(made_of("audit.json", lambda: audit_part(audit)) if audit else
                 paragraph("This run has not been audited."))
    parts.append(source(f"python audit.py {run_dir}"))
    written = samples(run_dir)
    if written:
        parts.append(f"<h3>What it wrote, from {text(repr(config.sample_prompt))} on</h3>")
        parts += [f"<p>step {step:,}</p><pre>{text(words)}</pre>"
                  for step, words in written.items()]
        parts.append(source(f'python eval.py {run_dir} --prompt="{config.sample_prompt}"'))
    return "".join(parts)


# ---------------------------------------------------------------------------------------------
# metrics and analyses


def measured(run_dir: Path) -> list[dict[str, Any]]:
    """The results in eval.jsonl that belong to the weights of today's checkpoints."""
    # A run that was trained anew has checkpoints of the same names, and other weights.
    today = {weights_hash(path) for path in list_checkpoints(run_dir)}
    results = read_records(run_dir / "eval.jsonl", RESULT)
    return by_checkpoint([r for r in results if r["of"].get("weights") in today])


def curve_panels(run_dir: Path) -> list[Panel]:
    """Training loss, bits per byte and accuracy over tokens."""
    losses: dict[str, Points] = {}
    for record in read_metrics(run_dir).values():
        for name, loss in record.get("loss_by_source", {}).items():
            losses.setdefault(name, []).append((record["tokens"], loss))
    losses = {name: smooth(points) for name, points in losses.items()}
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
        for name, points in curves(measured(run), "text").items():
            shifted = [(before + tokens, y) for tokens, y in points]
            sources.setdefault(name, {})[run.name] = shifted
    return [Panel(name.removeprefix("validation "), "tokens", lines)
            for name, lines in sources.items()]


def result_table(entries: list[dict[str, Any]]) -> str:
    """The figures of the last checkpoint."""
    if not entries:
        return paragraph("It has not been evaluated.")
    rows = []
    for name, r in entries[-1]["text"].items():
        rows.append([name, f"{r['bits_per_byte']:.3f} bits per byte", f"loss {r['loss']:.3f}"])
    for name, r in entries[-1]["tasks"].items():
        rows.append([name, f"{value(r):.3f} ± {r[r['metric'] + '_se']:.3f}",
                     f"{r['metric']} of {r['n']:,}, chance {r['chance']:.3f}"])
    return table([entries[-1]["checkpoint"], "", ""], rows)


def heat_figure(title: str, values: Any, rows: list, columns: list) -> str:
    """Values (C, N) as an image, a line per checkpoint."""
    values = np.array(values, float)  # a correlation that is not defined (None) becomes NaN

    def work(axis: Any) -> None:
        high = None if values.any() else 1  # a scale for nothing but zeros
        shown = axis.imshow(values, aspect="auto", origin="lower", vmax=high)
        axis.figure.colorbar(shown, ax=axis)
        ticks = np.unique(np.linspace(0, len(columns) - 1, 12).round().astype(int))
        axis.set(title=title, ylabel="checkpoint", yticks=range(len(rows)), yticklabels=rows,
                 xticks=ticks, xticklabels=[columns[i] for i in ticks])

    return draw(work)


def memorization_part(run_dir: Path, summary: dict[str, Any]) -> str:
    """Heat maps, and the forgetting curve."""
    labels = [re.sub(r"^ckpt_0*(?=\d)", "", name) for name in summary["checkpoints"]]
    # With few checkpoints or chunks, ages cannot be told from levels: then all ages as they are.
    by_age = summary["forgetting"] or summary["by_age"]

    def forgetting(axis: Any) -> None:
        axis.errorbar([age.replace(" and more", "+") for age in by_age],
                      [f["loss"] for f in by_age.values()],
                      [f["loss_se"] for f in by_age.values()], marker=".")
        axis.set(xlabel="chunks since it was seen", ylabel="nats",
                 title="loss against unseen chunks" if summary["forgetting"] else "loss by age")

    return "<h3>What it remembers</h3>" + grid([
        draw(forgetting),
        heat_figure("loss, nats below the levels, by chunk",
                    -double_center(cell_means(summary, "loss")), labels, summary["chunks"]),
        heat_figure("memorization score, %, by chunk", 100 * cell_means(summary, "score"), labels,
                    summary["chunks"]),
        heat_figure("correlation of the sequences' scores", summary["correlation"]["score"], labels,
                    labels)]) + source(f"python memorize.py {run_dir}")


def metrics_section(config: Config) -> str:
    """Curves, scores, memory, and the steps that stand out."""
    run_dir = Path(config.run_dir)
    parts = [made_of("eval.jsonl", lambda: curve_figures(curve_panels(run_dir)))]
    parts.append(source(f"{run_dir}/metrics.jsonl", f"python eval.py {run_dir}"))
    parts.append(made_of("eval.jsonl", lambda: result_table(measured(run_dir))))
    parts.append(source(f"python eval.py {run_dir}"))
    if len(runs := parent_runs(run_dir)) > 1:
        parts += ["<h3>With the runs that it goes on from: bits per byte</h3>",
                  curve_figures(stage_panels(runs))]
    summary = read_json(run_dir / "memorization.json")
    parts.append(made_of("memorization.json", lambda: memorization_part(run_dir, summary))
                 if summary else paragraph("What it remembers has not been measured: python"
                                           f" memorize.py {run_dir}"))
    outliers = find_outliers([r for _, r in sorted(read_metrics(run_dir).items()) if "loss" in r])
    rows = [[step, key, f"{v:.3f}", f"{low:.3f} to {high:.3f}"]
            for step, key, v, low, high, _ in outliers[:20]]
    parts.append(f"<h3>Steps that stand out: {len(outliers)}</h3>")
    parts.append(table(["step", "", "is", "band of the steps around it"], rows) if rows else "")
    parts.append(source(f"python lookup.py {run_dir} --outliers"))
    return "".join(parts)


def write_report(config: Config) -> Path:
    """Write report.html of a run; returns its path."""
    run_dir, steps = Path(config.run_dir), [*read_metrics(config.run_dir).values()]
    manifests = {path.name: read_manifest(path) for path in list_checkpoints(run_dir)}
    newest = next(reversed(manifests.values()), {})
    model, tokens = meta_model(config), steps[-1]["tokens"] if steps else 0
    flops = model.flops_per_token(config.seq_len) * tokens
    intro = paragraph(f"{model.n_params:,} parameters, {tokens:,} tokens in {len(steps):,} steps,"
                      f" {flops:.3g} FLOPs.") + source(f"python tools/report.py {run_dir}")
    write_page(run_dir / "report.html", str(run_dir), intro, {
        "Metrics and analyses": metrics_section(config),
        "Checkpoints": checkpoint_section(config, manifests),
        "Data, in its order": made_of(config.data_dir, lambda: data_section(config)),
        "Code and configuration": code_section(config, newest)})
    return run_dir / "report.html"


def main(argv: list[str]) -> None:
    runs = [word for word in argv if not word.startswith("-")]
    import_pyplot()  # where it is not installed, that is said before any work
    if len(runs) > 1:
        return compare.main(argv)
    config, _ = load(argv)
    if not Path(config.run_dir, "metrics.jsonl").exists():
        raise UserError(f"{config.run_dir} is not the directory of a run: it has no metrics.jsonl,"
                        " which train.py writes.")
    print(f"Report: {write_report(config)}")


if __name__ == "__main__":
    run_command(main)
