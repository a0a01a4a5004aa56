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

C checkpoints, N chunks, R rows drawn from a chunk: `grid` is a list of N arrays (C, R) of agreeing
positions, 0 ... l.
"""

import functools
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import eval as evaluation
import prepare_data
import train
from configs import Config, load
from model import KVCache, LLaMA

PASS_TOKENS = 256  # a forward pass of fewer is no faster: reading the weights is what takes time


@torch.inference_mode()
def greedy_matches(model: LLaMA, rows: Tensor, k: int) -> Tensor:
    """Where greedy decoding after k tokens of rows (B, k + l) agrees with them: bool (B, l).

    What plain greedy decoding gives, token for token, with less work: as long as a row has agreed,
    its context is the row itself, so that one pass over a block of its tokens (teacher forcing)
    says what decoding makes of the whole block. Blocks double: most rows of an ordinary text
    disagree soon, and what has agreed for long is likely to go on. Rows that have disagreed stand
    first, sorted by where they did, and are decoded token by token.
    """
    n, total = rows.shape
    text, order = rows.clone(), torch.arange(n, device=rows.device)
    cache, lost, begin = KVCache(model, n, total), 0, k  # lost: how many rows have disagreed
    while begin < total:
        # a pass of few tokens takes as long as one of some more: few rows, long blocks
        end = total if lost == n else min(total, begin + max(begin - k, 4, PASS_TOKENS // n))
        agreed = rows.new_zeros(0)  # positions of the block, by row
        if lost < n:
            fed = begin - 1 if begin > k else 0
            guess = model(text[lost:, fed : end - 1], cache=cache.window(lost, fed),
                          last=end - begin).float().argmax(-1)
            wrong = guess != text[lost:, begin:end]
            agreed = torch.where(wrong.any(1), wrong.int().argmax(1), end - begin)
            agreed, by_agreed = agreed.sort()
            for moved in (order, text, guess, *cache.k, *cache.v):
                moved[-len(agreed) :] = moved[-len(agreed) :][by_agreed]
            own = torch.arange(end - begin, device=rows.device) == agreed[:, None]
            text[lost:, begin:end] = torch.where(own, guess, text[lost:, begin:end])
        for position in range(begin, end):
            if astray := lost + int((agreed < position - begin).sum()):
                cache.length = position - 1
                logits = model(text[:astray, position - 1 : position], cache=cache, last=1)
                text[:astray, position] = logits[:, 0].float().argmax(-1)
        lost += int((agreed < end - begin).sum())
        begin = end
    matches = torch.empty_like(text[:, k:], dtype=torch.bool)
    matches[order] = text[:, k:] == rows[order, k:]
    return matches


def draw_rows(seed: int, chunk: int, n_rows: int, n: int) -> np.ndarray:
    """Up to n row ids from the whole of a chunk, each once: chunks are sorted by source."""
    random = np.random.default_rng([seed, chunk, 360])  # apart from the data order's [seed, chunk]
    return np.sort(random.choice(n_rows, min(n, n_rows), replace=False))


def count_matches(rows: np.ndarray, flags: dict, model: LLaMA) -> list[int]:
    """Agreeing positions, 0 ... l, of rows of ids (R, k + l or more)."""
    tokens = torch.from_numpy(rows[:, : flags["k"] + flags["l"]].astype(np.int64))
    parts = tokens.to(model.lm_head.weight.device).split(flags["batch"])
    return torch.cat([greedy_matches(model, part, flags["k"]).sum(1) for part in parts]).tolist()


def measure_chunk(config: Config, manifest: dict, chunk: int, flags: dict,
                  model: LLaMA) -> list[int]:
    rows = prepare_data.open_chunk(config.data_dir, manifest, chunk)
    ids = draw_rows(config.seed, chunk, len(rows), flags["rows"])
    return count_matches(rows[ids]["token_ids"], flags, model)


def measure(config: Config, model: LLaMA, manifest: dict, paths: list[Path], chunks: list[int],
            flags: dict) -> list[dict[str, Any]]:
    """A record per (checkpoint, chunk), appended to memorization.jsonl as they come."""
    file, numbers = Path(config.run_dir) / "memorization.jsonl", chunk_numbers(manifest)
    of = {key: flags[key] for key in ("k", "l", "rows")} | {
        "seed": config.seed, "data": train.data_sha256(config.data_dir)}
    whole = evaluation.grid(model, paths, [evaluation.Measure(
        f"chunk {numbers[chunk]}", of, functools.partial(
            measure_chunk, config, manifest, chunk, flags)) for chunk in chunks])
    cells, rank, world = list(whole.items()), flags["rank"], flags["world"]
    mine = cells[len(cells) * rank // world : len(cells) * (rank + 1) // world]  # few checkpoints
    done = evaluation.known(file)
    damaged = evaluation.measure(
        file, model, {key: cell for key, cell in mine if key not in done}, "memorization")
    return evaluation.collect(file, whole, damaged, rank)


def chunk_numbers(manifest: dict) -> list[int]:
    """What the chunks are called: 0, 1, ... or, made from Amber's train_355.jsonl, 355."""
    files = [chunk.get("made_from", "") for chunk in manifest["chunks"]]
    numbers = [int(n) for file in files for n in re.findall(r"\d+$", file)]
    return numbers if len({*numbers}) == len(files) else list(range(len(files)))


def ages(config: Config, manifest: dict, records: list[dict], chunks: list[int]) -> np.ndarray:
    """How many chunks ago each checkpoint (records) saw each chunk, (C, N).

    0 is the chunk just trained on; negative: not seen yet, or left out by the run.
    """
    skipped, n = prepare_data.skipped_places(config.run_dir), len(manifest["chunks"])
    numbers, found = chunk_numbers(manifest), []
    for record in records:
        if record["step"] is None:  # a Hugging Face directory: ckpt_007, or the end of training
            name = re.fullmatch(r"ckpt_(\d+)", record["checkpoint"])
            done = int(name[1]) if name else max(numbers)
            found.append([done - numbers[chunk] for chunk in chunks])
            continue
        done, left = -1, record["step"]
        for place, steps in prepare_data.places(manifest, config.global_batch_size, skipped):
            if left == 0 or left < steps:
                break
            done, left = place, left - steps
        met = [[place for place in range(chunk, done + 1, n)
                if not any(p <= place and p % n == chunk for p in skipped)] for chunk in chunks]
        found.append([done - places[-1] if places else min(-1, done - chunk)
                      for chunk, places in zip(chunks, met)])
    return np.array(found)


def figures(grid: list[np.ndarray], length: int, weights: np.ndarray) -> dict[str, float]:
    """Score and extractible share, each a sum over cells with weights (C, N), and standard errors.

    A row is one draw however many checkpoints were asked: what they make of it together is one
    number, and the error comes from how these numbers differ between the rows of a chunk.
    """
    result: dict[str, float] = {"rows": sum(matches.shape[1] for matches in grid)}
    for name, of in (("score", lambda m: m / length), ("extractible", lambda m: m == length)):
        drawn = [w @ of(matches) for w, matches in zip(weights.T, grid)]  # (R,) of each chunk
        variance = sum(x.var(ddof=1) / len(x) for x in drawn if len(x) > 1)
        result |= {name: float(sum(x.mean() for x in drawn)),
                   f"{name}_se": float(np.sqrt(variance))}
    return result


def average(grid: list[np.ndarray], length: int, cells: np.ndarray | None = None
            ) -> dict[str, float]:
    """`figures` of all the scores in some cells (C, N), or in all of them."""
    if cells is None:
        cells = np.ones((len(grid[0]), len(grid)))
    here = np.flatnonzero(cells.any(0))
    grid, weights = [grid[i] for i in here], cells[:, here] * [grid[i].shape[1] for i in here]
    return figures(grid, length, weights / weights.sum())


def beyond_levels(cells: np.ndarray) -> np.ndarray:
    """What is left of numbers (..., C, N) without a level for each checkpoint and each chunk.

    Later checkpoints guess better, whether they have seen a text or not, and have seen more; some
    chunks are easier. Neither is memory.
    """
    return (cells - cells.mean(-1, keepdims=True) - cells.mean(-2, keepdims=True)
            + cells.mean((-2, -1), keepdims=True))


def effects(grid: list[np.ndarray], length: int, age: np.ndarray) -> dict[str, dict[str, float]]:
    """What having seen a chunk adds to its score: "latest" (age 0) and "earlier" against unseen.

    Least squares of score = checkpoint + chunk + (age 0) + (age > 0), by cells. What a grid
    cannot tell is left out.
    """
    kinds = np.stack([age == 0, age > 0]).astype(float)
    flat = beyond_levels(kinds).round(12).reshape(2, -1)  # what is nothing is 0
    square = flat @ flat.T
    inverse = np.linalg.pinv(square, rcond=1e-9)
    told = np.isclose(inverse @ square, np.eye(2), atol=1e-6).all(1)
    weights = (inverse @ flat).reshape(2, *age.shape)
    return {name: figures(grid, length, weights[i])
            for i, name in enumerate(("latest", "earlier")) if told[i]}


def correlations(grid: list[np.ndarray]) -> list[list[float | None]]:
    """(C, C) over all rows; None with a checkpoint at which all rows are the same."""
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.atleast_2d(np.corrcoef(np.concatenate(grid, 1)))
    return [[round(x, 4) if np.isfinite(x) else None for x in row] for row in found.tolist()]


def summarize(config: Config, manifest: dict, records: list[dict], chunks: list[int],
              flags: dict) -> dict[str, Any]:
    """Everything memorization.json holds but the canaries."""
    length, n, checkpoints = flags["l"], len(chunks), records[:: len(chunks)]
    grid = [np.array([r["result"] for r in records[i::n]]) for i in range(n)]
    age = ages(config, manifest, checkpoints, chunks)
    last = [matches[-1] for matches in grid]
    source, texts = describe_rows(config, manifest, chunks, last, flags)
    pooled, numbers = np.concatenate(last), chunk_numbers(manifest)
    return {
        "k": flags["k"], "l": length, "checkpoints": [r["checkpoint"] for r in checkpoints],
        "steps": [r["step"] for r in checkpoints], "chunks": [numbers[i] for i in chunks],
        "ages": age.tolist(),
        "cells": [[average([matches[c : c + 1]], length) for matches in grid]
                  for c in range(len(checkpoints))],
        "seen": {kind: average(grid, length, cells) for kind, cells in (
            ("seen", age >= 0), ("not yet seen", age < 0)) if cells.any()},
        "effects": effects(grid, length, age),
        "by_age": {int(a): average(grid, length, age == a) for a in np.unique(age)},
        "by_age_beyond_levels": {int(a): figures(grid, length, beyond_levels(
            (age == a) / (age == a).sum())) for a in np.unique(age)},
        "by_source": {s["name"]: average([pooled[None, source == i]], length)
                      for i, s in enumerate(manifest["sources"]) if (source == i).any()},
        "histogram": [np.bincount(np.concatenate([m[c] for m in grid]), minlength=length + 1
                                  ).tolist() for c in range(len(checkpoints))],
        "correlation": {"score": correlations(grid),
                        "extractible": correlations([m == length for m in grid])},
        "extractible": texts,
    }


def measure_canaries(config: Config, model: LLaMA, manifest: dict,
                     flags: dict) -> dict[int, dict[str, float]]:
    """Figures of the planted rows by the times they were planted; 0 = such rows, never planted."""
    planted = prepare_data.canaries(manifest["settings"])
    if planted:
        control = np.random.default_rng(config.seed).integers(
            config.vocab_size, size=(32, manifest["seq_len"] + 1))
        planted = {0: control} | planted
    return {times: average([np.array([count_matches(rows, flags, model)])], flags["l"])
            for times, rows in planted.items()}


def describe_rows(config: Config, manifest: dict, chunks: list[int], matches: list[np.ndarray],
                  flags: dict) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The source of every row drawn from some chunks, and the extractible rows with their text."""
    tokenizer, sources, texts = prepare_data.load_tokenizer(config.data_dir), [], []
    numbers, k, end = chunk_numbers(manifest), flags["k"], flags["k"] + flags["l"]
    for chunk, found in zip(chunks, matches):
        rows = prepare_data.open_chunk(config.data_dir, manifest, chunk)
        ids = draw_rows(config.seed, chunk, len(rows), flags["rows"])
        sources.append(rows[ids]["source"])
        for row in ids[found == flags["l"]]:
            tokens = rows[row]["token_ids"][:end]
            texts.append({"chunk": numbers[chunk], "row": int(row),
                          "source": manifest["sources"][rows[row]["source"]]["name"],
                          "prompt": tokenizer.decode(tokens[:k]),
                          "continuation": tokenizer.decode(tokens[k:])})
    return np.concatenate(sources), texts


# ---------------------------------------------------------------------------------------------
# what is said of it


def heat_map(summary: dict[str, Any], columns: int = 10) -> list[str]:
    """Scores in figures and shades; neighbouring chunks share a column if they are too many.

    A bar stands behind the latest chunk that a checkpoint has seen.
    """
    scores = np.array([[cell["score"] for cell in row] for row in summary["cells"]])
    low, high, age = scores.min(), scores.max(), np.array(summary["ages"])
    groups = np.array_split(np.arange(scores.shape[1]), min(columns, scores.shape[1]))
    heads = [str(summary["chunks"][g[0]]) + "-" * (len(g) > 1) for g in groups]
    lines = [f"memorization score in % (k = {summary['k']}, l = {summary['l']}); rows: checkpoints,"
             " columns: chunks; | behind the latest seen",
             " " * 13 + "".join(f"{head:>5}  " for head in heads)]
    for name, row, seen in zip(summary["checkpoints"], scores, age):
        text = ""
        for g in groups:
            shade = " ░▒▓█"[round(4 * (row[g].mean() - low) / (high - low or 1))]
            text += f"{100 * row[g].mean():5.1f}{shade}{'|' if (seen[g] == 0).any() else ' '}"
        lines.append(f"{name[-12:]:>12} {text}".rstrip())
    return lines


def report(summary: dict[str, Any]) -> str:
    """The heat map, and what it says in a few lines."""
    lines = heat_map(summary)

    def say(kind: str, f: dict[str, float], sign: str = "") -> None:
        lines.append(f"{kind:>24}: score {100 * f['score']:{sign}.2f} ± {100 * f['score_se']:.2f} %"
                     f", extractible {100 * f['extractible']:{sign}.2f} ±"
                     f" {100 * f['extractible_se']:.2f} % of {f['rows']:,} rows")

    for kind, f in summary["seen"].items():
        say(kind, f)
    for kind, f in summary["effects"].items():
        say(f"{kind} against unseen", f, "+")
    for kind in ("by_source", "canaries"):
        for name, f in summary[kind].items():
            say(f"source {name}" if kind == "by_source" else f"canaries planted {name} x", f)
    if len(names := summary["checkpoints"]) > 1 and (r := summary["correlation"]["score"][0][-1]):
        lines.append(f"{'same rows':>24}: correlation {r:.2f} between the scores of {names[0]} and"
                     f" {names[-1]}")
    for text in summary["extractible"][:3]:
        lines.append(f"{'by heart':>24}: {text['source']}, chunk {text['chunk']} row {text['row']}:"
                     f" {text['continuation'][:60]!r}")
    return "\n".join(lines)


def draw(path: Path, summary: dict[str, Any]) -> bool:
    """The summary as a picture of six panels; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot
    names, chunks = summary["checkpoints"], summary["chunks"]
    labels = [re.sub(r"^ckpt_0*(?=\d)", "", name) for name in names]
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), layout="constrained")

    def image(axis: Any, values: list[list[float]], title: str, columns: list) -> None:
        values = np.array(values, float)
        high = None if values.any() else 1  # a scale for nothing but zeros
        shown = axis.imshow(values, aspect="auto", origin="lower", vmax=high)
        figure.colorbar(shown, ax=axis)
        some = evenly(list(range(len(columns))), 12)
        axis.set(title=title, ylabel="checkpoint", yticks=range(len(labels)), yticklabels=labels,
                 xticks=some, xticklabels=[columns[i] for i in some])

    for axis, key in zip(axes[0], ("score", "extractible")):
        image(axis, [[100 * cell[key] for cell in row] for row in summary["cells"]],
              f"{key}, %, by chunk", chunks)
    image(axes[0, 2], summary["correlation"]["score"], "correlation of the rows' scores", labels)
    several = min(len(names), len(chunks)) > 1
    by_age = summary["by_age_beyond_levels" if several else "by_age"]
    axes[1, 0].errorbar(list(by_age), [100 * f["score"] for f in by_age.values()],
                        [100 * f["score_se"] for f in by_age.values()])
    axes[1, 0].axvline(-0.5, color="grey", linestyle=":")
    axes[1, 0].set(xlabel="chunks since it was seen (< 0: not yet)",
                   ylabel="score, % over levels" if several else "score, %",
                   title="checkpoints' and chunks' levels taken off" if several else "")
    for name, counts in zip(names, summary["histogram"]):
        axes[1, 1].plot(counts, label=name)
    axes[1, 1].set(xlabel="agreeing positions", ylabel="rows", yscale="symlog")
    axes[1, 1].legend(fontsize="x-small")
    sources = summary["by_source"]
    axes[1, 2].barh(list(sources), [100 * f["score"] for f in sources.values()],
                    xerr=[100 * f["score_se"] for f in sources.values()])
    axes[1, 2].set(xlabel=f"score of {names[-1]}, %")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def evenly(items: list, n: int) -> list:
    """At most n of the items, evenly spaced, the last among them."""
    n = min(n, len(items))
    return [items[-1 - i * len(items) // n] for i in range(n)][::-1]


def chosen_chunks(which: str, numbers: list[int]) -> list[int]:
    """Chunks named as in "0,5,9", or all of them, at most 360."""
    if not which:
        return evenly(list(range(len(numbers))), 360)
    place = {str(number): i for i, number in enumerate(numbers)}
    unknown = [part for part in which.split(",") if part not in place]
    if unknown:
        some = ", ".join(map(str, numbers if len(numbers) < 9 else [*numbers[:3], "...",
                                                                    numbers[-1]]))
        raise SystemExit(f"--chunks={which}: there is no chunk {unknown[0]!r}; there are {some},"
                         " and a comma goes between two.")
    return list(dict.fromkeys(place[part] for part in which.split(",")))


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
    chunks = chosen_chunks(flags["chunks"], chunk_numbers(manifest))
    paths = evaluation.chosen(config.run_dir, flags["checkpoints"] or "all")
    if not flags["checkpoints"]:
        paths = evenly(paths, 10)
    model = evaluation.build(config)
    try:
        records = measure(config, model, manifest, paths, chunks, flags)
    except KeyboardInterrupt:
        raise SystemExit(f"Stopped. What was measured is in {config.run_dir}/memorization.jsonl;"
                         " the same command goes on from there.")
    canaries = {}
    if manifest["settings"]["canaries"]:
        train.load_weights(model, next(
            path for path in reversed(paths) if path.name == records[-1]["checkpoint"]))
        canaries = measure_canaries(config, model, manifest, flags)
    summary = summarize(config, manifest, records, chunks, flags) | {"canaries": canaries}
    out = Path(config.run_dir) / "memorization.json"
    print(report(summary))
    try:
        train.write_json(out, summary)
        picture = draw(out.with_suffix(".png"), summary)
    except OSError as error:
        raise SystemExit(f"Could not write {out}: {error.strerror or error}.")
    print(f"All figures: {out}" + f", picture: {out.with_suffix('.png')}" * picture)


if __name__ == "__main__":
    main(sys.argv[1:])
