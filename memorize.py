"""Stage 4: how much of its training data has a model memorized, over checkpoints and chunks?

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
"""

import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import checkpoint as ckpt
from configs import Config, UserError, load, run_command, with_recorded
from data import Data, load_data, read_json, write_json
from model import KVCache, LLaMA
from parallel import build_for_inference, rank

Grid = dict[str, list[np.ndarray]]  # quantity: N chunks of values (C checkpoints, R sequences)


@dataclass
class Flags:
    """What memorize.py takes beside the settings."""

    checkpoints: str = ""  # "last", "7", "0,4,9", "all" or paths; "" = ten, evenly spaced
    chunks: str = ""  # as "0,5,9"; "" = all
    sequences: int = 1000  # drawn from each chunk; 0 = all
    k: int = 32  # tokens of the prompt
    l: int = 32  # tokens after it that are compared
    batch: int = 250  # sequences in memory at a time


@torch.inference_mode()
def greedy_matches(model: LLaMA, sequences: Tensor, k: int) -> Tensor:
    """Where greedy decoding after k tokens agrees with sequences (B, k + l): bool (B, l)."""
    n, total = sequences.shape
    true = sequences[:, k:]  # (B, l)
    cache = KVCache(model, n, total)
    # While greedy decoding has agreed with a sequence, it continues the sequence itself. So one
    # pass over the true tokens (teacher forcing) gives its choices up to and with the first
    # disagreement. Those after it are meaningless; they are decoded again below.
    logits = model(sequences[:, :-1], cache=cache, logits_to_keep=total - k)  # (B, l, V)
    text = torch.cat([sequences[:, :k], logits.argmax(-1)], dim=1)  # (B, k + l)
    wrong = text[:, k:] != true
    diverged_at = torch.where(wrong.any(1), k + wrong.int().argmax(1), total)  # (B,) positions
    # The whole batch is decoded from its first disagreement on, because few sequences agree for
    # long. Those that do keep their tokens, and the same keys and values are cached once more.
    for position in range(int(diverged_at.min()) + 1, total):
        cache.length = position - 1
        logits = model(text[:, position - 1 : position], cache=cache, logits_to_keep=1)
        choice = logits[:, 0].argmax(-1)  # (B,)
        text[:, position] = torch.where(diverged_at < position, choice, text[:, position])
    return text[:, k:] == true


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
    """Up to n different sequences of a chunk (0 = all): their ascending numbers (R,), and them."""
    # Drawn from the whole chunk, which is sorted by source: the first n would all be of one. The
    # 360 makes this draw independent of the data order, whose key is [seed, chunk].
    random = np.random.default_rng([config.seed, chunk, 360])
    size = len(data.verified(data.manifest["chunks"][chunk]))
    numbers = np.sort(random.choice(size, min(n or size, size), replace=False))
    return numbers, data.take(chunk, numbers)


def measure(token_ids: np.ndarray, flags: Flags, model: LLaMA) -> dict[str, list]:
    """Of each sequence of ids (R, T + 1): the agreeing positions, 0 ... l; and the loss of the
    whole sequence, in nats per token."""
    k, end = flags.k, flags.k + flags.l
    tokens = torch.from_numpy(token_ids[:, :end].astype(np.int64))
    matches: list[int] = []
    for batch in tokens.to(model.lm_head.weight.device).split(flags.batch):
        matches += greedy_matches(model, batch, k).sum(1).tolist()
    losses = sequence_losses(model, token_ids, max(1, flags.batch * end // token_ids.shape[1]))
    return {"matches": matches, "loss": [round(x, 5) for x in losses.tolist()]}


def measure_chunk(config: Config, data: Data, chunk: int, flags: Flags, model: LLaMA) -> dict:
    """`measure` of the sequences drawn from a chunk, their sources, and the extractible texts."""
    numbers, sequences = draw_sequences(config, data, chunk, flags.sequences)
    result, texts = measure(sequences["token_ids"], flags, model), []
    for i in np.flatnonzero(np.array(result["matches"]) == flags.l):
        prompt, continuation = np.split(sequences["token_ids"][i, : flags.k + flags.l], [flags.k])
        texts.append({"chunk": chunk_numbers(data)[chunk], "sequence": int(numbers[i]),
                      "source": data.sources[sequences["source"][i]],
                      "prompt": data.tokenizer.decode(prompt),
                      "continuation": data.tokenizer.decode(continuation)})
    return result | {"source": sequences["source"].tolist(), "texts": texts}


def chunk_numbers(data: Data) -> list[int]:
    """The chunks' numbers: 0, 1, ..., or 355 for one that was made from Amber's train_355.jsonl."""
    chunks = data.manifest["chunks"]
    endings = [re.search(r"\d+$", chunk.get("made_from", "")) for chunk in chunks]
    numbers = [int(ending[0]) for ending in endings if ending]
    return numbers if len(set(numbers)) == len(chunks) else list(range(len(chunks)))


def ages(config: Config, data: Data, checkpoints: list[dict], chunks: list[int]) -> np.ndarray:
    """Age of each chunk at each checkpoint (its record), in chunks, (C, N). 0: the chunk that was
    trained on last. Negative: not trained on yet, or never (a chunk of `skip_chunks`)."""
    numbers, schedule, age = chunk_numbers(data), data.schedule(config), []
    for record in checkpoints:
        if record["step"] is None:
            # A published checkpoint has no step. Amber's ckpt_007 has seen chunks 0 to 7, and any
            # other name is taken for the end of the training.
            name = re.fullmatch(r"ckpt_(\d+)", record["checkpoint"])
            latest, planned = int(name[1]) if name else max(numbers), numbers
            seen = {i: number for i, number in enumerate(numbers) if number <= latest}
        else:
            # Of a chunk that was visited again, the last visit counts: it overwrites the first.
            seen = {visit.chunk: visit.number for visit in schedule
                    if visit.first_step + visit.steps <= record["step"]}
            latest, planned = max(seen.values(), default=-1), range(len(numbers))
        age.append([latest - seen[chunk] if chunk in seen else min(-1, latest - planned[chunk])
                    for chunk in chunks])
    return np.array(age)


def make_grid(cells: list[list[dict]], length: int) -> Grid:
    """The quantities, from the results of `measure` of each chunk at each checkpoint."""
    matches, losses = ([np.array([result[key] for result in results]) for results in cells]
                       for key in ("matches", "loss"))  # (C, R) each
    return {"score": [m / length for m in matches],
            "extractible": [(m == length).astype(float) for m in matches], "loss": losses}


def mean_and_stderr(values: list[np.ndarray], weights: np.ndarray) -> tuple[float, float]:
    """The means of N chunks' values (C, R), summed with weights (C, N), and its standard error."""
    mean, variance = 0.0, 0.0
    for chunk, w in zip(values, weights.T):
        if w.any():
            # Values of one sequence at several checkpoints are correlated, so a sequence is one
            # draw: their weighted sum.
            draws = w @ chunk  # (R,)
            mean += draws.mean()
            # Chunks are independent draws, so their variances add up.
            variance += draws.var(ddof=1) / len(draws) if len(draws) > 1 else 0
    return float(mean), math.sqrt(variance)


def figures(grid: Grid, weights: np.ndarray) -> dict[str, float]:
    """`mean_and_stderr` of every quantity, and the number of sequences."""
    sizes = np.array([values.shape[1] for values in grid["loss"]])
    result: dict[str, float] = {"sequences": int(sizes[weights.any(0)].sum())}
    for key, values in grid.items():
        result[key], result[f"{key}_se"] = mean_and_stderr(values, weights)
    return result


def double_center(values: np.ndarray) -> np.ndarray:
    """(C, N) without its row means and column means, the levels of checkpoints and of chunks."""
    # Later checkpoints predict any text better, and they have seen more chunks; some chunks are
    # easier. Neither is memory, and both make seen chunks score higher.
    return values - values.mean(1, keepdims=True) - values.mean(0, keepdims=True) + values.mean()


def age_groups(age: np.ndarray) -> dict[str, np.ndarray]:
    """The cells of each age from 0 on, bool (C, N); the few of great age are taken together."""
    return {str(a): age == a for a in range(7)} | {"7 and more": age >= 7}


def effects(grid: Grid, groups: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Effect of each group of cells (C, N) on every quantity, relative to cells in no group."""
    # Least squares of value = level of checkpoint + level of chunk + effect of the group. With one
    # column per group, double-centered, the effects are the same as with further columns for all
    # levels (Frisch and Waugh 1933).
    matrix = np.stack([double_center(group).ravel() for group in groups.values()], axis=1)
    matrix = matrix.round(12)  # (C N, E); zero columns must not consist of rounding errors
    solution = np.linalg.pinv(matrix, rcond=1e-6)  # (E, C N): solution @ values = all E effects
    # With few cells an effect may be confounded with the levels or with another effect: then its
    # row of this (E, E) is not that of the identity, and the effect is left out.
    resolution = solution @ matrix
    result = {}
    for i, (name, group) in enumerate(groups.items()):
        if np.allclose(resolution[i], np.eye(len(groups))[i], atol=1e-6):
            result[name] = figures(grid, solution[i].reshape(group.shape))
    return result


def summarize(config: Config, data: Data, records: list, chunks: list[int], flags: Flags) -> dict:
    """Everything that memorization.json holds; records: those of the first checkpoint first."""
    n, numbers, checkpoints = len(chunks), chunk_numbers(data), records[:: len(chunks)]
    grid = make_grid([[r["result"] for r in records[i::n]] for i in range(n)], flags.l)
    together = {key: np.concatenate(values, axis=1) for key, values in grid.items()}  # (C, R of N)
    age = ages(config, data, checkpoints, chunks)
    cells = []
    for c in range(len(checkpoints)):
        one = [{key: [values[i][c : c + 1]] for key, values in grid.items()} for i in range(n)]
        cells.append([figures(cell, np.ones((1, 1))) for cell in one])
    by_source, sources = {}, np.concatenate([r["result"]["source"] for r in records[-n:]])
    for source in np.unique(sources):
        last = {key: [values[-1:, sources == source]] for key, values in together.items()}
        by_source[data.sources[source]] = figures(last, np.ones((1, 1)))
    return {
        "k": flags.k, "l": flags.l, "checkpoints": [r["checkpoint"] for r in checkpoints],
        "chunks": [numbers[chunk] for chunk in chunks], "ages": age.tolist(), "cells": cells,
        "effects": effects(grid, {"latest": age == 0, "earlier": age > 0}),
        "forgetting": effects(grid, age_groups(age)), "by_source": by_source,
        "extractible": [text for r in records[-n:] for text in r["result"]["texts"]],
    }


def summary_text(summary: dict[str, Any]) -> str:
    """The averages and effects, a line each; tools/report.py draws the grid."""
    lines = [f"memorization (k = {summary['k']}, l = {summary['l']}) at"
             f" {', '.join(summary['checkpoints'])}, of {len(summary['chunks'])} chunks"]
    for key, form in (("effects", "{} against unseen"), ("by_source", "source {}")):
        sign = "+" if key == "effects" else ""  # an effect is a difference
        for name, f in summary[key].items():
            lines.append(f"{form.format(name):>24}: score {100 * f['score']:{sign}.2f} ±"
                         f" {100 * f['score_se']:.2f} %, extractible"
                         f" {100 * f['extractible']:{sign}.2f} ± {100 * f['extractible_se']:.2f} %"
                         f" of {f['sequences']:,} sequences")
    for name, f in summary["forgetting"].items():
        lines.append(f"{'age ' + name:>24}: loss {f['loss']:+.3f} ± {f['loss_se']:.3f} nats against"
                     " unseen")
    for text in summary["extractible"][:3]:
        lines.append(f"{'memorized':>24}: {text['source']}, chunk {text['chunk']} sequence"
                     f" {text['sequence']}: {text['continuation'][:60]!r}")
    return "\n".join(lines)


def choose_chunks(which: str, numbers: list[int]) -> list[int]:
    """Indices of the chunks named as in "0,5,9", each once; "" = of all chunks."""
    names = [str(number) for number in numbers]
    chosen = list(dict.fromkeys(which.split(","))) if which else names
    for name in chosen:
        if name not in names:
            raise UserError(f"--chunks: there is no chunk {name!r}, but {names[0]} to {names[-1]}.")
    return [names.index(name) for name in chosen]


def main(argv: list[str]) -> None:
    config, flags = load(argv, Flags)
    config = with_recorded(config, read_json(Path(config.run_dir, "config.json")))
    data = load_data(config.data_dir, config.seq_len)
    if flags.k + flags.l > data.seq_len + 1:
        raise UserError(f"--k + --l = {flags.k + flags.l} tokens are asked for, but a"
                        f" sequence of {config.data_dir} has {data.seq_len + 1}.")
    numbers = chunk_numbers(data)
    chunks = choose_chunks(flags.chunks, numbers)
    paths = ckpt.select_checkpoints(config.run_dir, flags.checkpoints or "all")
    if not flags.checkpoints:  # ten as in the paper, evenly spaced, the last among them
        n = min(10, len(paths))
        paths = [paths[math.ceil(i * len(paths) / n) - 1] for i in range(1, n + 1)]
    config = ckpt.with_network(config, paths, data.tokenizer)
    if any(ckpt.read_manifest(p).get("data_sha256", data.sha256) != data.sha256 for p in paths):
        raise UserError(f"{config.run_dir} was trained on other data than {config.data_dir} holds.")
    inputs = [flags.k, flags.l, flags.sequences, config.seed, data.sha256]
    evaluations = []
    for chunk in chunks:
        run = functools.partial(measure_chunk, config, data, chunk, flags)
        evaluations.append(ckpt.Evaluation(f"chunk {numbers[chunk]}", inputs, run))
    model, out = build_for_inference(config), Path(config.run_dir)
    records = ckpt.evaluate_checkpoints(out / "memorization.jsonl", model, paths, evaluations,
                                        data.tokenizer)
    if rank() == 0:
        summary = summarize(config, data, records, chunks, flags)
        print(summary_text(summary))
        write_json(out / "memorization.json", summary)
        print(f"All figures: {out / 'memorization.json'}; python tools/report.py {out} draws them.")


if __name__ == "__main__":
    run_command(main)
