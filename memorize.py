"""Measure what a model has by heart, over checkpoints and chunks of its training data.

    python memorize.py configs/amber_tiny.py                   # up to 10 checkpoints x all chunks
    python memorize.py configs/amber_tiny.py --checkpoints=0,9 --chunks=0,5,9 --rows=1000
    torchrun --nproc_per_node=8 memorize.py configs/amber_7b.py --checkpoints=path/to/LLM360/Amber

The first k tokens of a training row are the prompt, l tokens are decoded greedily; the score of
the row is the share of the l positions that agree with the true continuation, and a row of score 1
is k-extractible (Biderman et al. 2023; LLM360 paper, section 4.3). Chunks that a checkpoint has not
seen yet are the control that tells memory from predictability. Each cell of the grid is a line
appended to runs/NAME/memorization.jsonl; the summary is memorization.json, and memorization.png
with matplotlib.
"""

import json
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import eval as evaluation
import prepare_data
import train
from configs import Config, load
from model import KVCache, LLaMA


@torch.no_grad()
def greedy_matches(model: LLaMA, rows: Tensor, k: int) -> Tensor:
    """Where greedy decoding after k tokens of rows (B, k + l) agrees with them: bool (B, l).

    What plain greedy decoding gives, token for token, with less work: as long as decoding has
    agreed, its context is the row itself, so one pass over whole rows (teacher forcing) settles
    every position up to the first disagreement, and leaves the keys and values to go on from.
    Rows are sorted by that position: the ones being decoded are always the first of the cache.
    """
    length = rows.shape[1] - k
    cache = KVCache(model, *rows.shape)
    guesses = model(rows[:, :-1], cache=cache, last=length).argmax(-1)  # (B, l)
    agree = guesses == rows[:, k:]
    first = torch.where(agree.all(1), length, agree.int().argmin(1))  # the first disagreement
    first, order = first.sort()
    guesses, rows = guesses[order], rows[order]
    cache.k, cache.v = cache.k[:, order], cache.v[:, order]
    decoded = torch.where(torch.arange(length, device=rows.device) <= first[:, None], guesses, -1)
    for j in range(length - 1):  # decoded[:, j] is fed, decoded[:, j + 1] comes out
        active = int((first <= j).sum())
        if active:
            cache.length = k + j
            logits = model(decoded[:active, j : j + 1], cache=cache, last=1)
            decoded[:active, j + 1] = logits[:, 0].argmax(-1)
    settled = torch.arange(length, device=rows.device) < first[:, None]
    matches = torch.empty_like(agree)
    matches[order] = settled | (decoded == rows[:, k:])
    return matches


def draw_rows(seed: int, chunk: int, n_rows: int, n: int) -> np.ndarray:
    """Up to n row ids from the whole of a chunk, each once: chunks are sorted by source."""
    random = np.random.default_rng([seed, chunk, 360])  # apart from the data order's [seed, chunk]
    return np.sort(random.choice(n_rows, min(n, n_rows), replace=False))


def measure_cell(model: LLaMA, config: Config, manifest: dict, chunk: int,
                 flags: dict) -> list[int]:
    """Agreeing positions, 0 ... l, of each row drawn from a chunk."""
    rows = prepare_data.open_chunk(config.data_dir, manifest, chunk)
    ids = draw_rows(config.seed, chunk, len(rows), flags["rows"])
    ids_of = rows[ids]["token_ids"][:, : flags["k"] + flags["l"]]
    tokens = torch.from_numpy(ids_of.astype(np.int64))
    parts = tokens.to(model.lm_head.weight.device).split(flags["batch"])
    return torch.cat([greedy_matches(model, part, flags["k"]).sum(1) for part in parts]).tolist()


def measure(config: Config, model: LLaMA, manifest: dict, grid: list[tuple[Path, int]],
            flags: dict) -> list[dict[str, Any]]:
    """The cells of a grid of (checkpoint, chunk), appended to memorization.jsonl as they come."""
    file = Path(config.run_dir) / "memorization.jsonl"
    known = train.read_records(file)
    same = {key: flags[key] for key in ("k", "l", "rows")} | {
        "dtype": str(model.dtype)[6:], "seed": config.seed,
        "data": train.data_sha256(config.data_dir)}
    weights = {path: train.identity(path) for path, _ in grid}
    label = {(path, chunk): {**same, "checkpoint": path.name, "weights": weights[path],
                             "chunk": chunk} for path, chunk in grid}
    found = {json.dumps(r["of"]): r for r in known}
    mine = grid[flags["rank"] :: flags["world"]]  # whatever the others have done by now
    mine, loaded = [cell for cell in mine if json.dumps(label[cell]) not in found], None
    for path, chunk in tqdm(mine, desc="memorization", unit="cell", disable=None):
        if path != loaded:
            step, loaded = train.load_weights(model, path)["step"], path
        record = {"of": label[path, chunk], "step": step,
                  "matches": measure_cell(model, config, manifest, chunk, flags)}
        found[json.dumps(record["of"])] = record
        train.append_record(file, record)
    while flags["rank"] == 0 and any(json.dumps(label[cell]) not in found for cell in grid):
        time.sleep(1)  # for the other processes; torchrun ends all of us if one of them fails
        found |= {json.dumps(r["of"]): r for r in train.read_records(file)}
    if flags["rank"]:
        raise SystemExit(0)  # the first process sums up
    return [found[json.dumps(label[cell])] for cell in grid]


def figures(matches: list[int] | np.ndarray, length: int) -> dict[str, float]:
    """Mean score and extractible share of rows, each with its standard error."""
    scores = np.asarray(matches) / length
    n, full = len(scores), scores == 1
    deviation = scores.std(ddof=1) if n > 1 else 0.0
    share = float(full.mean())
    return {"rows": n, "score": float(scores.mean()), "score_se": float(deviation / math.sqrt(n)),
            "extractible": share, "extractible_se": math.sqrt(share * (1 - share) / n)}


def summarize(config: Config, manifest: dict, cells: list[dict], flags: dict) -> dict[str, Any]:
    """Everything memorization.json holds, from the agreeing positions of each cell's rows."""
    length, batch = flags["l"], config.global_batch_size
    skipped, n_chunks = prepare_data.skipped_places(config.run_dir), len(manifest["chunks"])
    names = list(dict.fromkeys(c["of"]["checkpoint"] for c in cells))
    chunks = list(dict.fromkeys(c["of"]["chunk"] for c in cells))
    by_age: dict[int, list[int]] = {}
    for c in cells:  # age 0: the chunk just trained on; negative: not yet seen
        done, left, chunk = -1, c["step"] or 0, c["of"]["chunk"]
        if c["step"] is None:
            done = chunk_of(c["of"]["checkpoint"], n_chunks)
        for place, steps in prepare_data.places(manifest, batch, skipped):
            if left == 0 or left < steps:
                break
            done, left = place, left - steps
        met = [place for place in range(chunk, done + 1, n_chunks)
               if not any(p <= place and p % n_chunks == chunk for p in skipped)]
        age = done - met[-1] if met else min(-1, done - chunk)
        by_age.setdefault(age, []).extend(c["matches"])
    last = [c for c in cells if c["of"]["checkpoint"] == names[-1]]
    pooled = np.concatenate([c["matches"] for c in last])
    source, texts = describe_rows(config, manifest, last, flags)
    per_checkpoint = [np.concatenate([c["matches"] for c in cells if c["of"]["checkpoint"] == name])
                      for name in names]
    with np.errstate(invalid="ignore", divide="ignore"):  # a checkpoint that scores 0 everywhere
        correlation = np.atleast_2d(np.corrcoef(per_checkpoint))
    seen = {kind: figures(np.concatenate(picked), length) for kind, picked in (
        ("seen", [m for age, m in by_age.items() if age >= 0]),
        ("not yet seen", [m for age, m in by_age.items() if age < 0])) if picked}
    return {
        "k": flags["k"], "l": length, "checkpoints": names, "chunks": chunks,
        "cells": [{"checkpoint": c["of"]["checkpoint"], "chunk": c["of"]["chunk"],
                   "step": c["step"], **figures(c["matches"], length)} for c in cells],
        "seen": seen,
        "by_age": {age: figures(by_age[age], length) for age in sorted(by_age)},
        "by_source": {name: figures(pooled[source == i], length)
                      for i, name in enumerate(s["name"] for s in manifest["sources"])
                      if (source == i).any()},
        "histogram": np.bincount(pooled, minlength=length + 1).tolist(),
        "correlation": [[round(x, 4) if math.isfinite(x) else None for x in row]
                        for row in correlation.tolist()],
        "extractible": texts,
    }


def chunk_of(name: str, n_chunks: int) -> int:
    """The last chunk a Hugging Face directory has seen: ckpt_007's is 7, another's the last."""
    match = re.fullmatch(r"ckpt_(\d+)", name)
    return int(match[1]) if match else n_chunks - 1


def measure_canaries(config: Config, model: LLaMA, manifest: dict,
                     flags: dict) -> dict[int, dict[str, float]]:
    """Figures of the planted rows by the times they were planted; 0 = such rows, never planted."""
    planted = prepare_data.canaries(manifest["settings"])
    if planted:
        control = np.random.default_rng(config.seed).integers(
            config.vocab_size, size=(32, manifest["seq_len"] + 1))
        planted = {0: control} | planted
    results = {}
    for times, rows in planted.items():
        tokens = torch.from_numpy(rows[:, : flags["k"] + flags["l"]])
        matches = greedy_matches(model, tokens.to(model.lm_head.weight.device), flags["k"])
        results[times] = figures(matches.sum(1).tolist(), flags["l"])
    return results


def describe_rows(config: Config, manifest: dict, cells: list[dict],
                  flags: dict) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The source of every row of some cells, and the extractible rows with their text."""
    tokenizer, sources, texts = prepare_data.load_tokenizer(config.data_dir), [], []
    for c in cells:
        chunk = c["of"]["chunk"]
        rows = prepare_data.open_chunk(config.data_dir, manifest, chunk)
        ids = draw_rows(config.seed, chunk, len(rows), flags["rows"])
        sources.append(rows[ids]["source"])
        for row in ids[np.asarray(c["matches"]) == flags["l"]]:
            tokens = rows[row]["token_ids"][: flags["k"] + flags["l"]]
            texts.append({"chunk": chunk, "row": int(row),
                          "source": manifest["sources"][rows[row]["source"]]["name"],
                          "prompt": tokenizer.decode(tokens[: flags["k"]]),
                          "continuation": tokenizer.decode(tokens[flags["k"] :])})
    return np.concatenate(sources), texts


def report(summary: dict[str, Any]) -> str:
    """The heat map in figures and shades, and what it says in a few lines."""
    scores = {(c["checkpoint"], c["chunk"]): c["score"] for c in summary["cells"]}
    low, high = min(scores.values()), max(scores.values())
    lines = [f"memorization score in % (k = {summary['k']}, l = {summary['l']});"
             " rows: checkpoints, columns: chunks",
             " " * 13 + "".join(f"{chunk:>6}" for chunk in summary["chunks"])]
    for name in summary["checkpoints"]:
        cells = [scores[name, chunk] for chunk in summary["chunks"]]
        shades = [" ░▒▓█"[round(4 * (s - low) / (high - low or 1))] for s in cells]
        lines.append(f"{name:>12} " + "".join(f"{100 * s:5.1f}{x}" for s, x in zip(cells, shades)))
    for kind, f in [*summary["seen"].items(),
                    *((f"source {name}", f) for name, f in summary["by_source"].items())]:
        lines.append(f"{kind:>24}: score {100 * f['score']:.2f} ± {100 * f['score_se']:.2f} %,"
                     f" extractible {100 * f['extractible']:.2f} ±"
                     f" {100 * f['extractible_se']:.2f} % of {f['rows']:,} rows")
    for times, f in summary["canaries"].items():
        lines.append(f"{f'canaries planted {times} x':>24}: score {100 * f['score']:.1f} ±"
                     f" {100 * f['score_se']:.1f} %, extractible {100 * f['extractible']:.1f} %"
                     f" of {f['rows']}")
    for text in summary["extractible"][:3]:
        lines.append(f"{'by heart':>24}: {text['source']}, chunk {text['chunk']} row {text['row']}:"
                     f" {text['continuation'][:60]!r}")
    return "\n".join(lines)


def draw(path: Path, summary: dict[str, Any]) -> bool:
    """Heat map, score by age and histogram as a picture; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot
    shape = (len(summary["checkpoints"]), len(summary["chunks"]))
    scores = np.array([100 * c["score"] for c in summary["cells"]]).reshape(shape)
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    image = axes[0].imshow(scores, aspect="auto", origin="lower")
    axes[0].set(xlabel="chunk", ylabel="checkpoint", title="score, %",
                xticks=range(shape[1]), xticklabels=summary["chunks"],
                yticks=range(shape[0]), yticklabels=[n[5:] for n in summary["checkpoints"]])
    figure.colorbar(image, ax=axes[0])
    ages, by_age = list(summary["by_age"]), list(summary["by_age"].values())
    axes[1].errorbar(ages, [100 * f["score"] for f in by_age],
                     [100 * f["score_se"] for f in by_age])
    axes[1].axvline(-0.5, color="grey", linestyle=":")
    axes[1].set(xlabel="chunks since it was seen (< 0: not yet)", ylabel="score, %")
    axes[2].bar(range(summary["l"] + 1), summary["histogram"])
    axes[2].set(xlabel="agreeing positions", ylabel="rows of the last checkpoint", yscale="log")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def evenly(items: list, n: int) -> list:
    """At most n of the items, evenly spaced, the last among them."""
    n = min(n, len(items))
    return [items[-1 - i * len(items) // n] for i in range(n)][::-1]


def main(argv: list[str]) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    config, flags = load(argv, checkpoints="", chunks="", rows=1000, k=32, l=32, batch=250)
    flags |= {"rank": rank, "world": world}
    train.choose_kernels(config.kernels)
    manifest = prepare_data.load_manifest(config.data_dir)
    if min(flags[key] for key in ("rows", "k", "l", "batch")) < 1:
        raise SystemExit("--rows, --k, --l and --batch must be 1 or more.")
    if flags["k"] + flags["l"] > manifest["seq_len"] + 1:
        raise SystemExit(f"--k + --l = {flags['k'] + flags['l']} tokens are asked for, but a row of"
                         f" {config.data_dir} has {manifest['seq_len'] + 1}.")
    n_chunks = len(manifest["chunks"])
    parts = [part for part in flags["chunks"].split(",") if part] or map(str, range(n_chunks))
    chunks = [int(part) if part.isdecimal() else n_chunks for part in parts]
    if max(chunks) >= n_chunks:
        raise SystemExit(f"--chunks={flags['chunks']}: give numbers from 0 to {n_chunks - 1}, like"
                         " --chunks=0,5,9.")
    paths = evaluation.chosen(config.run_dir, flags["checkpoints"] or "all")
    if not flags["checkpoints"]:
        usable = [path for path in paths if not train.problem_of(path, ("model",))]
        paths = evenly(usable or paths, 10)
    model = evaluation.build(config)
    cells = measure(config, model, manifest, [(p, c) for p in paths for c in chunks], flags)
    train.load_weights(model, paths[-1])
    summary = {**summarize(config, manifest, cells, flags),
               "canaries": measure_canaries(config, model, manifest, flags)}
    out = Path(config.run_dir) / "memorization.json"
    train.write_json(out, summary)
    print(report(summary))
    print(f"All figures: {out}" + (f", picture: {out.with_suffix('.png')}"
                                   if draw(out.with_suffix(".png"), summary) else ""))


if __name__ == "__main__":
    main(sys.argv[1:])
