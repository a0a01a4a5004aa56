"""Measure how much of its training data a model has memorized, over checkpoints and chunks.

    python memorize.py configs/amber_tiny.py                   # up to 10 checkpoints x all chunks
    python memorize.py configs/amber_tiny.py --checkpoints=0,9 --chunks=0,5,9 --sequences=1000
    torchrun --nproc_per_node=8 memorize.py configs/amber_7b.py --checkpoints=path/to/LLM360/Amber

The first k tokens of a training sequence are the prompt, and the model continues it greedily by l
tokens. The score of the sequence is the share of these l positions where the model's token is the
true one; a sequence of score 1 is k-extractible (Biderman et al. 2023; LLM360 paper, section 4.3).
The loss of the whole sequence is measured too: it sees far weaker traces of the training. Chunks
that a checkpoint has not seen yet are the control, which tells memory from what is easy to guess.
Each cell of the grid of checkpoints and chunks is a line of runs/NAME/memorization.jsonl, the
summary is memorization.json, and tools/report.py draws it.

A `Grid` has for each quantity and each of N chunks the values (C checkpoints, R sequences).
"""

import functools
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoint import Evaluation, evaluate_checkpoints, select_checkpoints, with_network
from configs import Config, UserError, load, run_command
from data import Data, load_data, write_json
from model import KVCache, LLaMA, build_for_inference, choose_kernels

Grid = dict[str, list[np.ndarray]]
ONLY = np.ones((1, 1))  # the weight of a grid's only cell
THIRDS = ("early", "middle", "late")  # of the chunks
N_CONTROLS = 1023  # random sequences that are nowhere in the data: exposure ends at 10 bits


@dataclass
class Flags:
    """What memorize.py takes beside the settings."""

    checkpoints: str = ""  # "last", "7", "0,4,9", "all" or paths; "" = ten, evenly spaced
    chunks: str = ""  # as "0,5,9"; "" = all
    sequences: int = 1000  # drawn from each chunk
    k: int = 32  # tokens of the prompt
    l: int = 32  # tokens after it that are compared
    batch: int = 250  # sequences in memory at a time


@torch.inference_mode()
def greedy_matches(model: LLaMA, sequences: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Where greedy decoding after k tokens agrees with sequences (B, k + l): bool (B, l); and the
    log-probability of their last l tokens given what is before, in nats: float32 (B,)."""
    n, total = sequences.shape
    true = sequences[:, k:]  # (B, l)
    cache = KVCache(model, n, total)
    # While greedy decoding has agreed with a sequence, what it goes on from is the sequence itself.
    # So one pass over the true tokens (teacher forcing) gives its choices up to and with the first
    # disagreement. What they are behind it means nothing; there they are made anew below.
    logits = model(sequences[:, :-1], cache=cache, logits_to_keep=total - k).float()  # (B, l, V)
    log_p = logits.gather(-1, true[..., None])[..., 0] - logits.logsumexp(-1)  # (B, l)
    text = torch.cat([sequences[:, :k], logits.argmax(-1)], dim=1)  # (B, k + l)
    wrong = text[:, k:] != true
    diverged_at = torch.where(wrong.any(1), k + wrong.int().argmax(1), total)  # (B,) positions
    # All of the batch is decoded from its first disagreement on, because few sequences agree for
    # long. Those that do keep their tokens, and the cache is overwritten with what it held.
    for position in range(int(diverged_at.min()) + 1, total):
        cache.length = position - 1
        logits = model(text[:, position - 1 : position], cache=cache, logits_to_keep=1)
        choice = logits[:, 0].float().argmax(-1)  # (B,)
        text[:, position] = torch.where(diverged_at < position, choice, text[:, position])
    return text[:, k:] == true, log_p.sum(1)


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
    there = len(data.chunk(chunk))
    # From the whole chunk, as it is sorted by source: the first n would all be of one. The 360
    # keeps this draw apart from the data order's [seed, chunk].
    random = np.random.default_rng([config.seed, chunk, 360])
    ids = np.sort(random.choice(there, min(n, there), replace=False))
    return ids, data.take(chunk, ids)


def measure(token_ids: np.ndarray, flags: Flags, model: LLaMA) -> dict[str, list]:
    """Of each sequence of ids (R, T + 1): the agreeing positions, 0 ... l; the log-probability of
    the l tokens after the prompt, in nats; the loss of the whole sequence, in nats per token."""
    k, end = flags.k, flags.k + flags.l
    tokens = torch.from_numpy(token_ids[:, :end].astype(np.int64))
    result: dict[str, list] = {"matches": [], "suffix_log_p": []}
    for batch in tokens.to(model.lm_head.weight.device).split(flags.batch):
        matches, log_p = greedy_matches(model, batch, k)
        result["matches"] += matches.sum(1).tolist()
        result["suffix_log_p"] += [round(x, 5) for x in log_p.tolist()]
    # Whole sequences are longer, so fewer of them fit into the same memory.
    losses = sequence_losses(model, token_ids, max(1, flags.batch * end // token_ids.shape[1]))
    return result | {"loss": [round(x, 5) for x in losses.tolist()]}


def measure_chunk(config: Config, data: Data, chunk: int, flags: Flags, model: LLaMA) -> dict:
    """One cell of the grid: what `measure` finds of the sequences drawn from a chunk."""
    _, sequences = draw_sequences(config, data, chunk, flags.sequences)
    return measure(sequences["token_ids"], flags, model)


def find_canaries(config: Config, data: Data) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random sequences (R, T + 1), first the controls, which are nowhere in the data; how often
    each is planted there (R,); in which third of the chunks, 0 ... 2, for the last time (R,)."""
    random, chunks = np.random.default_rng(config.seed), data.manifest["chunks"]
    controls = random.integers(config.vocab_size, size=(N_CONTROLS, data.seq_len + 1))
    # Of a chunk's sources the planted ones are the last, and every chunk has as many.
    planted = [data.chunk(i)["token_ids"][-chunk["sources"]["canary"] :]
               for i, chunk in enumerate(chunks)]
    sequences, which, times = np.unique(np.concatenate(planted), axis=0, return_inverse=True,
                                        return_counts=True)
    last = np.zeros(len(times), int)
    np.maximum.at(last, which.ravel(), np.repeat(np.arange(len(chunks)), len(planted[0])))
    return (np.concatenate([controls, sequences]), np.pad(times, (N_CONTROLS, 0)),
            np.pad(3 * last // len(chunks), (N_CONTROLS, 0)))


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
    schedule = data.schedule(config)
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


def make_grid(cells: list[list[dict]], length: int) -> Grid:
    """The quantities, from what `measure` found of each chunk at each checkpoint."""
    found = {}
    for key in ("matches", "suffix_log_p", "loss"):
        found[key] = [np.array([result[key] for result in results]) for results in cells]  # (C, R)
    matches = found.pop("matches")
    return {"score": [m / length for m in matches],
            "extractible": [(m == length).astype(float) for m in matches], **found}


def select(grid: Grid, masks: list[np.ndarray]) -> Grid:
    """The grid of some sequences alone: masks, N of (R,)."""
    return {key: [values[:, mask] for values, mask in zip(chunks, masks)]
            for key, chunks in grid.items()}


def mean_and_stderr(values: list[np.ndarray], weights: np.ndarray) -> tuple[float, float]:
    """The means of N chunks' values (C, R), summed with weights (C, N), and its standard error."""
    mean, variance = 0.0, 0.0
    for chunk, w in zip(values, weights.T):
        if w.any():
            # Values of one sequence at several checkpoints are correlated, so a sequence is one
            # draw: what all checkpoints make of it together is one number.
            drawn = w @ chunk  # (R,)
            mean += drawn.mean()
            # Chunks are independent draws, so their variances add up.
            variance += drawn.var(ddof=1) / len(drawn) if len(drawn) > 1 else 0
    return float(mean), math.sqrt(variance)


def figures(grid: Grid, weights: np.ndarray) -> dict[str, float]:
    """`mean_and_stderr` of every quantity, and of how many sequences."""
    sizes = np.array([values.shape[1] for values in grid["loss"]])
    result: dict[str, float] = {"sequences": int(sizes[weights.any(0)].sum())}
    for key, values in grid.items():
        result[key], result[f"{key}_se"] = mean_and_stderr(values, weights)
    return result


def average(grid: Grid, chosen: np.ndarray) -> dict[str, float]:
    """`figures` of all sequences together in the cells that are chosen, bool (C, N)."""
    weights = chosen * np.array([values.shape[1] for values in grid["loss"]])
    return figures(grid, weights / weights.sum())


def double_center(values: np.ndarray) -> np.ndarray:
    """(C, N) without its row means and column means, the levels of checkpoints and of chunks."""
    # Later checkpoints guess better, whether they have seen a text or not, and they have seen more;
    # some chunks are easier. Neither is memory, and both make seen chunks score higher.
    return values - values.mean(1, keepdims=True) - values.mean(0, keepdims=True) + values.mean()


def age_groups(age: np.ndarray) -> dict[str, np.ndarray]:
    """The cells of each age from 0 on, bool (C, N); the few of great age are taken together."""
    return {str(a): age == a for a in range(7)} | {"7 and more": age >= 7}


def effects(grid: Grid, columns: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """What it does to every quantity that a cell is in a column (C, N), against those in none."""
    # Least squares of value = level of checkpoint + level of chunk + effect of the column.
    # Regressing on the columns alone, but double-centered, gives the same effects as doing so
    # beside a column for each level (Frisch and Waugh 1933).
    matrix = np.stack([double_center(column).ravel() for column in columns.values()], axis=1)
    matrix = matrix.round(12)  # (C N, E); a column of zeros is not one of rounding errors
    solution = np.linalg.pinv(matrix, rcond=1e-6)  # (E, C N): solution @ values = all E effects
    # With few cells an effect may not be told from the levels or from another effect: then its row
    # of this (E, E) is not that of the identity, and the effect is left out.
    told = solution @ matrix
    result = {}
    for i, (name, column) in enumerate(columns.items()):
        if np.allclose(told[i], np.eye(len(told))[i], atol=1e-6):
            result[name] = figures(grid, solution[i].reshape(column.shape))
    return result


def membership(losses: list[np.ndarray], age: np.ndarray) -> dict[str, dict[str, float]]:
    """How well a threshold on the loss, N of (C, R), tells the seen sequences of an age from unseen
    ones: the AUC within a checkpoint, averaged over the checkpoints that have both."""
    sizes = np.array([chunk.shape[1] for chunk in losses])
    unseen, result = (age < 0) & (sizes > 0), {}
    for name, seen in age_groups(age).items():
        seen = seen & (sizes > 0)
        both = seen.any(1) & unseen.any(1)  # (C,)
        # The AUC is the chance that a seen sequence has a lower loss than an unseen one: the mean
        # share of unseen ones above a seen one, and the mean share of seen ones below an unseen
        # one. The errors of the two means add up to its error (DeLong et al. 1988). Of ties the
        # first counts none and the second all, so that each is a half.
        shares, weights = [np.zeros(chunk.shape) for chunk in losses], np.zeros(age.shape)
        for c in np.flatnonzero(both):
            for mine, others, sign, side in ((seen[c], unseen[c], -1, "left"),
                                             (unseen[c], seen[c], 1, "right")):
                sample = np.concatenate([losses[i][c] for i in np.flatnonzero(others)]) * sign
                sample.sort()
                for i in np.flatnonzero(mine):
                    shares[i][c] = np.searchsorted(sample, sign * losses[i][c], side) / len(sample)
                weights[c] += mine * sizes / sizes[mine].sum() / both.sum()
        if both.any():
            total, stderr = mean_and_stderr(shares, weights)
            result[name] = {"auc": total / 2, "auc_se": stderr}
    return result


def describe_canaries(config: Config, data: Data, result: dict, length: int) -> dict[str, Any]:
    """Figures of the canaries by how often they are planted, and of each third of the run."""
    _, times, third = find_canaries(config, data)
    grid = make_grid([[result]], length)
    # Exposure (Carlini et al. 2019): by how many bits a canary's rank by loss, among sequences that
    # were never seen, is better than the worst. Chance gives 1.4 bits, the first rank 10.
    loss = grid["loss"][0]  # (1, R)
    rank = 1 + np.searchsorted(np.sort(loss[0, :N_CONTROLS]), loss)
    grid["exposure"] = [np.log2((N_CONTROLS + 1) / rank)]
    found: dict[str, Any] = {}
    for n in np.unique(times).tolist():
        found[str(n)] = figures(select(grid, [times == n]), ONLY)
        for i, name in enumerate(THIRDS):
            chosen = (times == n) & (third == i)
            if n and chosen.any():
                found[str(n)][name] = figures(select(grid, [chosen]), ONLY)
    return found


def correlations(values: np.ndarray) -> list[list[float | None]]:
    """(C, C) between checkpoints, of values (C, sequences); None where all sequences are equal."""
    with np.errstate(invalid="ignore", divide="ignore"):
        matrix = np.atleast_2d(np.corrcoef(values)).round(4)
    return np.where(np.isfinite(matrix), matrix, None).tolist()


def summarize(config: Config, data: Data, records: list, chunks: list[int], flags: Flags) -> dict:
    """Everything that memorization.json holds; records: those of the first checkpoint first."""
    length, n, numbers = flags.l, len(chunks), chunk_numbers(data)
    canaries = [record["result"] for record in records if record["evaluation"] == "canaries"]
    records = [record for record in records if record["evaluation"] != "canaries"]
    checkpoints = records[::n]  # one record of each
    grid = make_grid([[r["result"] for r in records[i::n]] for i in range(n)], length)
    together = {key: np.concatenate(values, axis=1) for key, values in grid.items()}  # (C, R of N)
    age = ages(config, data, checkpoints, chunks)
    sources, texts = read_drawn(config, data, chunks, grid["extractible"], flags)

    cells = []
    for c in range(len(checkpoints)):
        cells.append([figures({key: [values[i][c : c + 1]] for key, values in grid.items()}, ONLY)
                      for i in range(n)])
    seen = {name: average(grid, chosen) for name, chosen in
            (("seen", age >= 0), ("not yet seen", age < 0)) if chosen.any()}
    last = {key: [values[-1:]] for key, values in together.items()}
    by_source, by_membership = {}, {"all": membership(grid["loss"], age)}
    for i, name in enumerate(data.sources):
        masks = [source == i for source in sources]
        if np.concatenate(masks).any():
            by_source[name] = figures(select(last, [np.concatenate(masks)]), ONLY)
            by_membership[name] = membership(select(grid, masks)["loss"], age)
    return {
        "k": flags.k, "l": length, "checkpoints": [r["checkpoint"] for r in checkpoints],
        "chunks": [numbers[chunk] for chunk in chunks], "ages": age.tolist(), "cells": cells,
        "seen": seen, "effects": effects(grid, {"latest": age == 0, "earlier": age > 0}),
        "by_age": {a: average(grid, age == a) for a in np.unique(age).tolist()},
        "forgetting": effects(grid, age_groups(age)),
        "membership": by_membership, "by_source": by_source,
        "histogram": [np.bincount(np.rint(scores * length).astype(int),
                                  minlength=length + 1).tolist() for scores in together["score"]],
        "correlation": {key: correlations(together[key]) for key in ("score", "extractible")},
        "extractible": texts,
        "canaries": describe_canaries(config, data, canaries[-1], length) if canaries else {},
    }


def read_drawn(config: Config, data: Data, chunks: list[int], extractible: list[np.ndarray],
               flags: Flags) -> tuple[list[np.ndarray], list[dict]]:
    """The sources of the drawn sequences, N of (R,), and the text of those that are extractible
    from the last checkpoint."""
    k, end, numbers = flags.k, flags.k + flags.l, chunk_numbers(data)
    sources, texts = [], []
    for chunk, recited in zip(chunks, extractible):
        ids, sequences = draw_sequences(config, data, chunk, flags.sequences)
        sources.append(sequences["source"].copy())  # not a view of all the tokens
        for i in np.flatnonzero(recited[-1]):
            tokens = sequences["token_ids"][i]
            texts.append({"chunk": numbers[chunk], "sequence": int(ids[i]),
                          "source": data.sources[sequences["source"][i]],
                          "prompt": data.tokenizer.decode(tokens[:k]),
                          "continuation": data.tokenizer.decode(tokens[k:end])})
    return sources, texts


def cell_means(summary: dict[str, Any], key: str) -> np.ndarray:
    """A quantity's mean in every cell, (C, N)."""
    return np.array([[cell[key] for cell in row] for row in summary["cells"]])


def heat_map(summary: dict[str, Any], values: np.ndarray, digits: int) -> list[str]:
    """Values (C, N) in figures and shades, a line per checkpoint; a bar behind its latest chunk."""
    latest = np.array(summary["ages"]) == 0  # (C, N)
    low, spread = values.min(), values.max() - values.min() or 1
    # Of more than ten chunks, neighbours share a column, which shows their mean.
    groups = np.array_split(np.arange(values.shape[1]), min(10, values.shape[1]))
    heads = [str(summary["chunks"][g[0]]) + "-" * (len(g) > 1) for g in groups]
    lines = [" " * 13 + "".join(f"{head:>5}  " for head in heads)]
    for c, name in enumerate(summary["checkpoints"]):
        line = f"{name[-12:]:>12} "
        for group in groups:
            value = values[c, group].mean()
            shade = " ░▒▓█"[round(4 * (value - low) / spread)]
            line += f"{value:5.{digits}f}{shade}{'|' if latest[c, group].any() else ' '}"
        lines.append(line.rstrip())
    return lines


def summary_text(summary: dict[str, Any]) -> str:
    """The heat maps, and what they say in a few lines."""
    lines = [f"memorization score in % (k = {summary['k']}, l = {summary['l']}); a line per"
             " checkpoint, a column per chunk; | behind the latest seen",
             *heat_map(summary, 100 * cell_means(summary, "score"), 1)]
    if min(np.shape(summary["ages"])) > 1:
        lines += ["by how many nats the loss is below the levels of its checkpoint and chunk",
                  *heat_map(summary, -double_center(cell_means(summary, "loss")), 2)]
    labels = {"seen": "{}", "effects": "{} against unseen", "by_source": "source {}",
              "canaries": "canaries planted {} x"}
    for kind, label in labels.items():
        sign = "+" if kind == "effects" else ""  # an effect is a difference
        for name, f in summary[kind].items():
            lines.append(f"{label.format(name):>24}: score {100 * f['score']:{sign}.2f} ±"
                         f" {100 * f['score_se']:.2f} %, extractible"
                         f" {100 * f['extractible']:{sign}.2f} ± {100 * f['extractible_se']:.2f} %"
                         f" of {f['sequences']:,} sequences")
            if "exposure" in f:
                lines[-1] += f"; exposure {f['exposure']:.1f} bits, loss {f['loss']:.2f}" + "".join(
                    f"; {third} {f[third]['exposure']:.1f}, {f[third]['loss']:.2f}"
                    for third in THIRDS if third in f)
    for name in summary["membership"]["all"] | summary["forgetting"]:
        parts = []
        if f := summary["forgetting"].get(name):
            parts.append(f"loss {f['loss']:+.3f} ± {f['loss_se']:.3f} nats against unseen")
        if f := summary["membership"]["all"].get(name):
            parts.append(f"AUC {f['auc']:.3f} ± {f['auc_se']:.3f}")
        lines.append(f"{'age ' + name:>24}: {', '.join(parts)}")
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
    config, flags = load(argv, Flags)
    data = load_data(config.data_dir)
    if flags.sequences < 1:
        raise UserError("--sequences must be more than 0.")
    if flags.k + flags.l > data.seq_len + 1:
        raise UserError(f"--k + --l = {flags.k + flags.l} tokens are asked for, but a"
                        f" sequence of {config.data_dir} has {data.seq_len + 1}.")
    numbers = chunk_numbers(data)
    chunks = choose_chunks(flags.chunks, numbers)
    paths = select_checkpoints(config.run_dir, flags.checkpoints or "all")
    config = with_network(config, paths[0], data)
    if not flags.checkpoints:
        paths = evenly(paths, 10)  # as many as in the paper

    # A cell is measured again only if the weights or one of these inputs have changed.
    inputs = {"k": flags.k, "l": flags.l, "sequences": flags.sequences,
              "seed": config.seed, "data": data.sha256, "result": "matches, suffix_log_p, loss"}
    evaluations = []
    for chunk in chunks:
        run = functools.partial(measure_chunk, config, data, chunk, flags)
        evaluations.append(Evaluation(f"chunk {numbers[chunk]}", inputs, run))
    if "canary" in data.sources:
        run = functools.partial(measure, find_canaries(config, data)[0], flags)
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
