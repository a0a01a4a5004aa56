"""Measure how much of its training data a model has memorized, over checkpoints and chunks.

    python memorize.py configs/amber_tiny.py                   # up to 10 checkpoints x all chunks
    python memorize.py configs/amber_tiny.py --checkpoints=0,9 --chunks=0,5,9 --sequences=1000
    torchrun --nproc_per_node=8 memorize.py configs/amber_7b.py --checkpoints=path/to/LLM360/Amber

The first k tokens of a training sequence are the prompt, and the model continues it greedily by l
tokens. The score of the sequence is the share of these l positions where the model's token is the
true one; a sequence of score 1 is k-extractible (Biderman et al. 2023; LLM360 paper, section 4.3).
Chunks that a checkpoint has not seen yet are the control, which tells memory from what is easy to
guess. Each cell of the grid of checkpoints and chunks is a line of runs/NAME/memorization.jsonl,
the summary is memorization.json, and tools/report.py draws it.

A `grid` has for each of N chunks the agreeing positions, 0 ... l, (C checkpoints, R sequences).
"""

import functools
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoint import Evaluation, evaluate_checkpoints, select_checkpoints
from configs import Config, UserError, load, run_command
from data import Data, chunk_schedule, load_data, write_json
from model import KVCache, LLaMA, build_for_inference, choose_kernels

PASS_TOKENS = 256  # a forward pass over fewer is no faster: reading the weights takes the time
ONLY = np.ones((1, 1))  # the weight of a grid's only cell


@torch.inference_mode()
def greedy_matches(model: LLaMA, sequences: Tensor, k: int) -> Tensor:
    """Where greedy decoding after k tokens agrees with sequences (B, k + l): bool (B, l)."""
    # The result is that of plain greedy decoding, token for token, in fewer passes: only behind its
    # first disagreement does a sequence have to be decoded token by token.
    n, total = sequences.shape
    text = sequences.clone()  # (B, k + l): the prompts and, in the end, what the model writes
    order = torch.arange(n, device=text.device)  # text[i] belongs to sequences[order[i]]
    diverged_at = torch.full_like(order, total)  # position of the first disagreement of text[i]
    cache = KVCache(model, n, total)

    # First: how far does the model agree? While it has agreed with a sequence, what it goes on from
    # is the sequence itself, so one pass over a block of true tokens (teacher forcing) gives its
    # choice at every position of the block. Only sequences that still agree are read on. They are
    # kept behind the others, so that they are one slice of the text and of the cache.
    n_diverged, fed, begin = 0, 0, k
    while begin < total and n_diverged < n:
        # Blocks double: most sequences of ordinary text disagree soon, and one that has agreed for
        # long is likely to go on. A few sequences may have long blocks from the beginning.
        end = min(total, begin + max(begin - k, 4, PASS_TOKENS // n))
        logits = model(text[n_diverged:, fed : end - 1], cache=cache.window(n_diverged, fed),
                       logits_to_keep=end - begin)
        guess = logits.float().argmax(-1)  # (sequences that agree, end - begin)
        wrong = guess != text[n_diverged:, begin:end]
        first_wrong = torch.where(wrong.any(1), begin + wrong.int().argmax(1), total)
        # The guess is what the model writes up to and with the first disagreement. It means
        # nothing behind it, but there the token is written anew below.
        text[n_diverged:, begin:end] = guess
        diverged_at[n_diverged:], by_position = first_wrong.sort()
        for kept in (order, text, *cache.k, *cache.v):  # layer by layer: a cache can be large
            kept[n_diverged:] = kept[n_diverged:][by_position]
        n_diverged = int((diverged_at < total).sum())
        fed, begin = end - 1, end

    # Then: the others are decoded token by token, each from its disagreement on. The text is now
    # sorted by that, so those to decode stand first at every position. What the cache holds of true
    # tokens behind a disagreement is overwritten.
    for position in range(int(diverged_at[0]) + 1, total):
        n_decoded = int((diverged_at < position).sum())
        cache.length = position - 1
        logits = model(text[:n_decoded, position - 1 : position], cache=cache, logits_to_keep=1)
        text[:n_decoded, position] = logits[:, 0].float().argmax(-1)

    matches = torch.empty_like(text[:, k:], dtype=torch.bool)
    matches[order] = text[:, k:] == sequences[order, k:]
    return matches


def count_matches(token_ids: np.ndarray, flags: dict, model: LLaMA) -> list[int]:
    """Agreeing positions, 0 ... l, of each sequence of ids (R, k + l or more)."""
    tokens = torch.from_numpy(token_ids[:, : flags["k"] + flags["l"]].astype(np.int64))
    counts = []
    for batch in tokens.to(model.lm_head.weight.device).split(flags["batch"]):
        counts += greedy_matches(model, batch, flags["k"]).sum(1).tolist()
    return counts


@torch.inference_mode()
def sequence_losses(model: LLaMA, token_ids: np.ndarray, batch: int) -> np.ndarray:
    """The mean loss of each whole sequence of ids (R, T + 1), in nats: float32 (R,)."""
    tokens = torch.from_numpy(token_ids.astype(np.int64))
    losses = []
    for part in tokens.to(model.lm_head.weight.device).split(batch):
        _, token_losses = model(part[:, :-1], part[:, 1:])  # (B, T)
        losses.append(token_losses.mean(1).cpu())
    return torch.cat(losses).numpy()


def draw_sequences(config: Config, data: Data, chunk: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to n different sequences of a chunk: their ids (R,) in ascending order, and themselves."""
    sequences = data.chunk(chunk)
    # From the whole chunk, as it is sorted by source: the first n would all be of one. The 360
    # keeps this draw apart from the data order's [seed, chunk].
    random = np.random.default_rng([config.seed, chunk, 360])
    ids = np.sort(random.choice(len(sequences), min(n, len(sequences)), replace=False))
    return ids, sequences[ids]


def measure_chunk(config: Config, data: Data, chunk: int, flags: dict, model: LLaMA) -> list[int]:
    """One cell of the grid: agreeing positions of the sequences drawn from a chunk."""
    _, sequences = draw_sequences(config, data, chunk, flags["sequences"])
    return count_matches(sequences["token_ids"], flags, model)


def measure_canaries(config: Config, data: Data, flags: dict, model: LLaMA) -> dict[str, Any]:
    """Figures of the random sequences that are planted in the data, by how often they are there."""
    planted = []
    for i, chunk in enumerate(data.manifest["chunks"]):
        # Of a chunk's sources they are the last.
        planted.append(data.chunk(i)["token_ids"][-chunk["sources"]["canary"] :])
    sequences, times = np.unique(np.concatenate(planted), axis=0, return_counts=True)
    # The control, 0 times: sequences of the same kind that are nowhere in the data.
    random = np.random.default_rng(config.seed)
    control = random.integers(config.vocab_size, size=(32, data.seq_len + 1))
    result = {"0": count_matches(control, flags, model)}
    for n in np.unique(times).tolist():
        result[str(n)] = count_matches(sequences[times == n], flags, model)
    return {n: mean_and_stderr([np.array([m])], flags["l"], ONLY) for n, m in result.items()}


def chunk_numbers(data: Data) -> list[int]:
    """What the chunks are called: 0, 1, ... or, made from Amber's train_355.jsonl, 355."""
    chunks = data.manifest["chunks"]
    endings = [re.search(r"\d+$", chunk.get("made_from", "")) for chunk in chunks]
    # The files' own numbers make ages right in any selection of the released chunks.
    numbers = [int(ending[0]) for ending in endings if ending]
    return numbers if len(set(numbers)) == len(chunks) else list(range(len(chunks)))


def ages(config: Config, data: Data, checkpoints: list[dict], chunks: list[int]) -> np.ndarray:
    """How many chunks ago each checkpoint (its record) saw each chunk, (C, N). 0: it has just been
    trained on it. Negative: not seen yet, or never (a chunk of `skip_chunks`)."""
    numbers = chunk_numbers(data)
    schedule = chunk_schedule(data.steps_per_chunk(config.global_batch_size), config.skip_chunks)
    age = np.empty((len(checkpoints), len(chunks)), dtype=int)
    for c, record in enumerate(checkpoints):
        if record["step"] is None:
            # A published checkpoint tells no step. Amber's ckpt_007 has seen chunks 0 to 7, and
            # any other name is taken for the end of the training.
            name = re.fullmatch(r"ckpt_(\d+)", record["checkpoint"])
            latest, planned = int(name[1]) if name else max(numbers), numbers
            seen = {i: number for i, number in enumerate(numbers) if number <= latest}
        else:
            # Of a chunk that was visited again, the last visit counts: it overwrites the first.
            seen = {visit.chunk: visit.number for visit in schedule
                    if visit.first_step + visit.steps <= record["step"]}
            latest, planned = max(seen.values(), default=-1), range(len(numbers))
        for i, chunk in enumerate(chunks):
            age[c, i] = latest - seen[chunk] if chunk in seen else min(-1, latest - planned[chunk])
    return age


# ---------------------------------------------------------------------------------------------
# statistics of a grid


def mean_and_stderr(grid: list[np.ndarray], length: int, weights: np.ndarray) -> dict[str, float]:
    """The cells' means, summed with weights (C, N), and the standard error of that sum: of the
    score and of the share of extractible sequences."""
    asked = [(matches, w) for matches, w in zip(grid, weights.T) if w.any()]
    result: dict[str, float] = {"sequences": sum(matches.shape[1] for matches, _ in asked)}
    for key in ("score", "extractible"):
        mean, variance = 0.0, 0.0
        for matches, w in asked:
            # Scores of one sequence at several checkpoints are correlated, so a sequence is one
            # draw: what all checkpoints make of it together is one number.
            values = matches / length if key == "score" else matches == length  # (C, R)
            drawn = w @ values  # (R,)
            mean += drawn.mean()
            # Chunks are independent draws, so their variances add up.
            variance += drawn.var(ddof=1) / len(drawn) if len(drawn) > 1 else 0
        result |= {key: float(mean), f"{key}_se": math.sqrt(variance)}
    return result


def average(grid: list[np.ndarray], length: int, chosen: np.ndarray) -> dict[str, float]:
    """`mean_and_stderr` of all scores together in the cells that are chosen, bool (C, N)."""
    weights = chosen * np.array([matches.shape[1] for matches in grid])
    return mean_and_stderr(grid, length, weights / weights.sum())


def double_center(values: np.ndarray) -> np.ndarray:
    """(C, N) without its row means and column means, the levels of checkpoints and of chunks."""
    # Later checkpoints guess better, whether they have seen a text or not, and they have seen more;
    # some chunks are easier. Neither is memory, and both make seen chunks score higher.
    return values - values.mean(1, keepdims=True) - values.mean(0, keepdims=True) + values.mean()


def effects(grid: list[np.ndarray], length: int, age: np.ndarray) -> dict[str, dict[str, float]]:
    """What having seen a chunk adds to its score: "latest" (age 0), "earlier", against unseen."""
    # Least squares of score = level of checkpoint + level of chunk + effect of the age. Regressing
    # on the columns of the two ages alone, but double-centered, gives the same effects as doing so
    # beside a column for each level (Frisch and Waugh 1933).
    columns = np.stack([double_center(age == 0).ravel(), double_center(age > 0).ravel()], axis=1)
    columns = columns.round(12)  # (C N, 2); a column of zeros is not one of rounding errors
    solution = np.linalg.pinv(columns, rcond=1e-6)  # (2, C N): solution @ scores = both effects
    # With few cells an effect may not be told from the levels or from the other effect: then this
    # (2, 2) is not the identity, and the effect is left out.
    told = solution @ columns
    result = {}
    for i, name in enumerate(("latest", "earlier")):
        if np.allclose(told[i], np.eye(2)[i], atol=1e-6):
            result[name] = mean_and_stderr(grid, length, solution[i].reshape(age.shape))
    return result


def correlations(values: np.ndarray) -> list[list[float | None]]:
    """(C, C) between checkpoints, of values (C, sequences); None where all sequences are equal."""
    with np.errstate(invalid="ignore", divide="ignore"):
        matrix = np.atleast_2d(np.corrcoef(values)).round(4)
    return np.where(np.isfinite(matrix), matrix, None).tolist()


def summarize(config: Config, data: Data, records: list, chunks: list[int], flags: dict) -> dict:
    """Everything that memorization.json holds; records: those of the first checkpoint first."""
    length, n, numbers = flags["l"], len(chunks), chunk_numbers(data)
    canaries = [record["result"] for record in records if record["evaluation"] == "canaries"]
    records = [record for record in records if record["evaluation"] != "canaries"]
    checkpoints = records[::n]  # one record of each
    grid = []
    for i in range(n):
        grid.append(np.array([record["result"] for record in records[i::n]]))  # (C, R)
    together = np.concatenate(grid, axis=1)  # (C, sequences of all chunks)
    age = ages(config, data, checkpoints, chunks)

    cells = []
    for c in range(len(checkpoints)):
        cells.append([mean_and_stderr([m[c : c + 1]], length, ONLY) for m in grid])
    seen, by_age, by_age_beyond_levels = {}, {}, {}
    for name, chosen in (("seen", age >= 0), ("not yet seen", age < 0)):
        if chosen.any():
            seen[name] = average(grid, length, chosen)
    for a in np.unique(age).tolist():
        by_age[a] = average(grid, length, age == a)
        weights = double_center((age == a) / (age == a).sum())
        by_age_beyond_levels[a] = mean_and_stderr(grid, length, weights)

    # The last checkpoint has seen the most, so it alone is asked for sources, texts and canaries.
    by_source, texts = describe_last(config, data, chunks, grid, flags)
    return {
        "k": flags["k"], "l": length,
        "checkpoints": [record["checkpoint"] for record in checkpoints],
        "steps": [record["step"] for record in checkpoints],
        "chunks": [numbers[chunk] for chunk in chunks],
        "ages": age.tolist(), "cells": cells, "seen": seen,
        "effects": effects(grid, length, age),
        "by_age": by_age, "by_age_beyond_levels": by_age_beyond_levels, "by_source": by_source,
        "histogram": [np.bincount(m, minlength=length + 1).tolist() for m in together],
        "correlation": {"score": correlations(together),
                        "extractible": correlations(together == length)},
        "extractible": texts, "canaries": canaries[-1] if canaries else {},
    }


def describe_last(config: Config, data: Data, chunks: list[int], grid: list[np.ndarray],
                  flags: dict) -> tuple[dict, list[dict]]:
    """Of the last checkpoint: figures by source, and the extractible sequences with their text."""
    k, end, numbers = flags["k"], flags["k"] + flags["l"], chunk_numbers(data)
    sources, texts = [], []
    for chunk, matches in zip(chunks, grid):
        ids, sequences = draw_sequences(config, data, chunk, flags["sequences"])
        sources.append(sequences["source"])
        for i in np.flatnonzero(matches[-1] == flags["l"]):
            tokens = sequences["token_ids"][i]
            texts.append({"chunk": numbers[chunk], "sequence": int(ids[i]),
                          "source": data.sources[sequences["source"][i]],
                          "prompt": data.tokenizer.decode(tokens[:k]),
                          "continuation": data.tokenizer.decode(tokens[k:end])})
    source, matches = np.concatenate(sources), np.concatenate(grid, axis=1)[-1]
    by_source = {}
    for i, name in enumerate(data.sources):
        if (source == i).any():
            by_source[name] = mean_and_stderr([matches[None, source == i]], flags["l"], ONLY)
    return by_source, texts


def heat_map(summary: dict[str, Any], columns: int = 10) -> list[str]:
    """Scores in figures and shades, a line per checkpoint, with a bar behind its latest chunk."""
    latest = np.array(summary["ages"]) == 0  # (C, N)
    scores = np.reshape([cell["score"] for row in summary["cells"] for cell in row], latest.shape)
    low, spread = scores.min(), scores.max() - scores.min() or 1
    # Where there are more chunks than columns, neighbours share one, which shows their mean.
    groups = np.array_split(np.arange(scores.shape[1]), min(columns, scores.shape[1]))
    heads = [str(summary["chunks"][g[0]]) + "-" * (len(g) > 1) for g in groups]
    lines = [f"memorization score in % (k = {summary['k']}, l = {summary['l']}); a line per"
             " checkpoint, a column per chunk; | behind the latest seen",
             " " * 13 + "".join(f"{head:>5}  " for head in heads)]
    for c, name in enumerate(summary["checkpoints"]):
        line = f"{name[-12:]:>12} "
        for group in groups:
            score = scores[c, group].mean()
            shade = " ░▒▓█"[round(4 * (score - low) / spread)]
            line += f"{100 * score:5.1f}{shade}{'|' if latest[c, group].any() else ' '}"
        lines.append(line.rstrip())
    return lines


def summary_text(summary: dict[str, Any]) -> str:
    """The heat map, and what it says in a few lines."""
    lines = heat_map(summary)
    labels = {"seen": "{}", "effects": "{} against unseen", "by_source": "source {}",
              "canaries": "canaries planted {} x"}
    for kind, label in labels.items():
        sign = "+" if kind == "effects" else ""  # an effect is a difference
        for name, f in summary[kind].items():
            lines.append(f"{label.format(name):>24}: score {100 * f['score']:{sign}.2f} ±"
                         f" {100 * f['score_se']:.2f} %, extractible"
                         f" {100 * f['extractible']:{sign}.2f} ± {100 * f['extractible_se']:.2f} %"
                         f" of {f['sequences']:,} sequences")
    names, correlation = summary["checkpoints"], summary["correlation"]["score"][0][-1]
    if len(names) > 1 and correlation is not None:
        lines.append(f"{'same sequences':>24}: correlation {correlation:.2f} between the scores of"
                     f" {names[0]} and {names[-1]}")
    for text in summary["extractible"][:3]:
        lines.append(f"{'memorized':>24}: {text['source']}, chunk {text['chunk']} sequence"
                     f" {text['sequence']}: {text['continuation'][:60]!r}")
    return "\n".join(lines)


def evenly(items: list, n: int) -> list:
    """At most n of the items, evenly spaced, the last among them."""
    n = min(n, len(items))
    return [items[math.ceil(i * len(items) / n) - 1] for i in range(1, n + 1)]


def choose_chunks(which: str, numbers: list[int]) -> list[int]:
    """Indices of the chunks named as in "0,5,9", each once; "" = of all chunks."""
    names = [str(number) for number in numbers]
    chosen = list(dict.fromkeys(which.split(","))) if which else names
    for name in chosen:
        if name not in names:
            raise UserError(f"--chunks={which}: there is no chunk {name!r}; the data has"
                            f" {len(names)}, from {names[0]} to {names[-1]}.")
    return [names.index(name) for name in chosen]


def main(argv: list[str]) -> None:
    config, flags = load(argv, checkpoints="", chunks="", sequences=1000, k=32, l=32, batch=250)
    data = load_data(config.data_dir)
    for name in ("sequences", "k", "l", "batch"):
        if flags[name] < 1:
            raise UserError(f"--{name} must be 1 or more, found {flags[name]}.")
    if flags["k"] + flags["l"] > data.seq_len + 1:
        raise UserError(f"--k + --l = {flags['k'] + flags['l']} tokens are asked for, but a"
                        f" sequence of {config.data_dir} has {data.seq_len + 1}.")
    numbers = chunk_numbers(data)
    chunks = choose_chunks(flags["chunks"], numbers)
    paths = select_checkpoints(config.run_dir, flags["checkpoints"] or "all")
    if not flags["checkpoints"]:
        paths = evenly(paths, 10)  # as many as in the paper

    # A cell is measured again only if the weights or one of these inputs have changed.
    inputs = {"k": flags["k"], "l": flags["l"], "sequences": flags["sequences"],
              "seed": config.seed, "data": data.sha256}
    evaluations = []
    for chunk in chunks:
        run = functools.partial(measure_chunk, config, data, chunk, flags)
        evaluations.append(Evaluation(f"chunk {numbers[chunk]}", inputs, run))
    if "canary" in data.sources:
        run = functools.partial(measure_canaries, config, data, flags)
        evaluations.append(Evaluation("canaries", inputs, run))

    choose_kernels(config.kernels)
    model = build_for_inference(config)
    out = Path(config.run_dir)
    records = evaluate_checkpoints(out / "memorization.jsonl", model, paths, evaluations)
    if int(os.environ.get("RANK", 0)) == 0:  # under torchrun the first process speaks for all
        summary = summarize(config, data, records, chunks, flags)
        print(summary_text(summary))
        write_json(out / "memorization.json", summary)
        print(f"All figures: {out / 'memorization.json'}; python tools/report.py {out} draws them.")


if __name__ == "__main__":
    run_command(main)
