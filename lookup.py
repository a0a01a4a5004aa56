"""For any number of a run: where did it come from?

    python lookup.py configs/amber_tiny.py --step=100          # what step 100 learned from
    python lookup.py configs/amber_tiny.py --find="import re"  # where a text is, and its losses
    python lookup.py configs/amber_tiny.py --outliers          # steps that are worth a look

A line of the log leads to a step, a step to its sequences, and a sequence to the documents of the
files that it was made from. A text leads back: to every sequence that has it, to the step that
learned from it, and to the loss of that very passage before and after. Nothing is written.
"""

import bisect
import functools
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import checkpoint as ckpt
from configs import Config, UserError, load, run_command, with_recorded
from data import (
    Data,
    Visit,
    load_data,
    open_array,
    read_json,
    step_sequences,
    step_to_visit,
)
from model import LLaMA, build_for_inference, choose_kernels
from prepare_data import DOCUMENT, Source, dealt_sequences
from tokenizer import replace_invalid_utf8

SHOWN = 20  # places of a text that are printed; all are counted
BLOCK_TOKENS = 1 << 16  # decoded at a time: what stays in the processor's cache is twice as fast
WINDOW = 51  # steps that a band is made of, half of them before and half after


@dataclass
class Flags:
    """What lookup.py takes beside the settings; one of these must be given."""

    step: int = 0  # print the sequences that this optimizer step (from 1) learned from
    find: str = ""  # a text: where it is in the data, and how its losses went
    outliers: bool = False  # print the steps whose loss or gradient norm stands out


# ---------------------------------------------------------------------------------------------
# --step: what did a step learn from?


def show_step(config: Config, step: int) -> None:
    """Print the line of the log of optimizer step `step` (from 1), and the sequences it read."""
    data, batch = load_data(config.data_dir), config.global_batch_size
    schedule = data.schedule(config)
    total = sum(visit.steps for visit in schedule)
    if not 1 <= step <= total:
        raise UserError(f"--step={step}: {config.data_dir} has steps 1 to {total:,} of {batch}"
                        " sequences.")
    visit, within = step_to_visit(schedule, step - 1)
    ids = step_sequences(config.seed, visit.chunk, len(data.chunk(visit.chunk)), within, batch,
                         visit.turn)
    print(f"step {step} = step {within + 1} of chunk {visit.chunk}, {batch} sequences of"
          f" {config.data_dir}")
    if record := ckpt.read_metrics(config.run_dir).get(step):
        kept = ("loss", "grad_norm", "lr", "loss_by_source")
        print(", ".join(f"{key} {json.dumps(record[key])}" for key in kept if key in record))
    for i, sequence in zip(ids.tolist(), data.take(visit.chunk, ids)):
        source = data.sources[sequence["source"]]
        text = data.tokenizer.decode(sequence["token_ids"][:64])[:100]
        print(f"{source:<16} chunk {visit.chunk} sequence {i:<8}"
              f" {json.dumps(text, ensure_ascii=False)}")
        print(f"{'':<16} {origin(data, visit.chunk, i, 0, data.seq_len + 1)}")


# ---------------------------------------------------------------------------------------------
# which documents is a sequence made of?


def origin(data: Data, chunk: int, i: int, begin: int, end: int) -> str:
    """Where tokens `begin` to `end` of sequence i of a chunk come from, in words."""
    settings = with_recorded(Config(), data.manifest["settings"])
    about = data.manifest["chunks"][chunk]
    if "made_from" in about:
        # A released file has lines and no documents. A cap chose among them, evenly and in order.
        capped = settings.sequences_per_chunk == about["sequences"]
        skipped = any(data.manifest["dropped"].values())
        return f"{about['made_from']} line {i + 1}" + " or later" * (capped or skipped)
    source = data.source_of(chunk, i)
    if source == "canary" and settings.canaries:
        return "planted: random tokens, of no document"
    if not data.manifest.get("documents"):
        return "of an unknown document: this data was prepared without an index of documents"
    pieces = documents_of(data, chunk, i, begin, end)
    # Tokens are counted as they were written: infilled documents have their middle last.
    unit = "infilled token" if settings.fim_rates.get(source) else "token"
    said = [f"{file} document {document}" + f" from its {unit} {first}" * (first > 0)
            for file, document, first, _ in pieces[:3]]
    return "; ".join(said) + f"; and {len(pieces) - 3} more" * (len(pieces) > 3)


def documents_of(data: Data, chunk: int, i: int, begin: int,
                 end: int) -> list[tuple[str, int, int, int]]:
    """(file, number of the document in it, from 1; its first token here, from 0; tokens) of each
    document that tokens `begin` to `end` of a sequence are of. Its last is the end-of-document."""
    source = data.source_of(chunk, i)
    index, files = read_index(data.directory, source)
    # A source is one run of tokens: at which of them do we begin, and in which document?
    at = int(source_numbers(data.directory, chunk)[i]) * (data.seq_len + 1)
    begin, end = at + begin, at + end
    # Bisection reads a few places of the mapped file, and searchsorted would copy all of it.
    k, found = bisect.bisect_right(index["begin"], begin) - 1, []
    while begin < end:
        first, file, number = index[k].tolist()
        k += 1
        stop = min(end, int(index["begin"][k])) if k < len(index) else end
        found.append((files[file], number, begin - first, stop - begin))
        begin = stop
    return found


@functools.lru_cache
def source_numbers(directory: Path, chunk: int) -> np.ndarray:
    """The number (n,) of each sequence of a chunk among all of its source, in the text's order."""
    # It is arithmetic, and was not written down. A chunk has its sources one after the other.
    data, numbers = load_data(directory), []
    config = with_recorded(Config(), data.manifest["settings"])
    shares = data.manifest["chunks"][chunk]["sources"]
    for k, entry in enumerate(data.manifest["sources"]):
        n_held_out = 0 if config.valid_documents else entry["valid_sequences"]
        source = Source(k, [], [], entry["sequences"], n_held_out, entry.get("weight", 1), entry,
                        shares[entry["name"]])
        numbers.append(dealt_sequences(config, source, chunk))
    return np.concatenate(numbers)


@functools.lru_cache
def read_index(directory: Path, source: str) -> tuple[np.ndarray, list[str]]:
    """The documents of a source, mapped, and the names of its files."""
    data, path = load_data(directory), directory / "documents" / f"{source}.npy"
    for entry in data.manifest["documents"]:
        if directory / entry["file"] in (path, path.with_name("files.json")):
            data.verify_file(entry)
    files = read_json(path.with_name("files.json"), {source: [str]})
    index = open_array(path, DOCUMENT)
    if not (files and len(index) and index["file"][-1] < len(files[source])):
        raise UserError(f"{path.parent} is damaged: prepare the data anew.")
    return index, files[source]


# ---------------------------------------------------------------------------------------------
# --find: where is a text, and what did the model make of it?


class Place(NamedTuple):
    """An occurrence of a text in a sequence: its tokens and bytes, counted from 0."""

    chunk: int
    sequence: int
    first: int  # token
    last: int
    byte: int
    context: str


def find(config: Config, text: str) -> None:
    """Print where a text is in the training data, when it was learned from, and its losses."""
    if not text:
        raise UserError('--find is empty: give a text, as in --find="import re".')
    data = load_data(config.data_dir)
    places, total = find_places(data, replace_invalid_utf8(text).encode(), SHOWN)
    if not places:
        raise UserError(f"{text!r} is nowhere in the training data of {config.data_dir}.")
    print(f"{total:,} place{'s' * (total > 1)} in {config.data_dir}"
          + f", the first {SHOWN}" * (total > SHOWN))
    visits = []
    for k, place in enumerate(places, 1):
        steps = steps_of(config, data, place)
        visits.append([visit for visit, _ in steps])
        when = " and ".join(f"step {step}" for _, step in steps) or "not read"
        source = data.source_of(place.chunk, place.sequence)
        print(f"{k:>2}: {source}, chunk {place.chunk} sequence {place.sequence}, tokens"
              f" {place.first} to {place.last}, byte {place.byte}: {when}")
        print(f"    {json.dumps(place.context, ensure_ascii=False)}")
        print(f"    {origin(data, place.chunk, place.sequence, place.first, place.last + 1)}")
    show_losses(config, data, places, visits)


def find_places(data: Data, text: bytes, limit: int) -> tuple[list[Place], int]:
    """The first `limit` occurrences in the training sequences, and how many there are."""
    places, total, width = [], 0, data.seq_len + 1
    pieces = [data.tokenizer.pieces.get(i, b"\xff") for i in range(data.n_vocab)]
    # One more: the byte that UTF-8 never has stands between two sequences, and for unknown ids.
    # So no text runs over from one sequence into the next, which is another text.
    pieces.append(b"\xff")
    table = np.frombuffer(b"".join(pieces), np.uint8)
    length = np.array([len(piece) for piece in pieces])
    begin = np.cumsum(length) - length  # of each id's bytes in the table
    n_rows = max(1, BLOCK_TOKENS // width)
    for c in tqdm(range(len(data.manifest["chunks"])), unit="chunk", leave=False, disable=None):
        chunk = data.chunk(c)["token_ids"]
        for at in range(0, len(chunk), n_rows):
            ids = np.minimum(chunk[at : at + n_rows].astype(np.intp), data.n_vocab)
            ids = np.pad(ids, ((0, 0), (0, 1)), constant_values=data.n_vocab).ravel()
            ends = np.cumsum(length[ids])  # of each token in the text of the block
            # Each byte of the block is the byte of the table as far behind its token's beginning.
            shift = np.repeat(begin[ids] - (ends - length[ids]), length[ids])
            block = table[shift + np.arange(ends[-1])].tobytes()
            found = block.find(text)
            while found >= 0:
                if total < limit:
                    row, *where = place_in(block, ends, width + 1, found, len(text))
                    places.append(Place(c, at + row, *where))
                total += 1
                found = block.find(text, found + 1)
    return places, total


def place_in(block: bytes, ends: np.ndarray, row_length: int, found: int,
             n_bytes: int) -> tuple[int, int, int, int, str]:
    """(row, first token, last token, byte in the row, context) of bytes of a decoded block."""
    first, last = np.searchsorted(ends, [found, found + n_bytes - 1], side="right").tolist()
    at = first - first % row_length  # where its row begins: tokens of a sequence, and one between
    begin, end = int(ends[at - 1]) if at else 0, int(ends[at + row_length - 2])
    near = block[max(begin, found - 40) : min(end, found + n_bytes + 40)]
    # Half characters at the edges of the context are left out.
    return at // row_length, first - at, last - at, found - begin, near.decode("utf-8", "ignore")


def steps_of(config: Config, data: Data, place: Place) -> list[tuple[Visit, int]]:
    """Each visit that learned from a place, and the step (from 1) at which it did."""
    n, found = data.manifest["chunks"][place.chunk]["sequences"], []
    for visit in data.schedule(config):
        if visit.chunk == place.chunk:
            order = step_sequences(config.seed, place.chunk, n, 0, n, visit.turn)
            within = np.flatnonzero(order == place.sequence)[0] // config.global_batch_size
            if within < visit.steps:  # else it is left over behind the chunk's last step
                found.append((visit, visit.first_step + int(within) + 1))
    return found


def show_losses(config: Config, data: Data, places: list[Place],
                visits: list[list[Visit]]) -> None:
    """The loss of each passage before and after the chunk that had it, if there are checkpoints."""
    found: dict[int, Any] = {ckpt.read_manifest(path)["step"]: path
                             for path in ckpt.list_checkpoints(config.run_dir)}
    if not found:
        print(f"{config.run_dir} has no checkpoint, so there are no losses of these places.")
        return
    # Before the first step there is no checkpoint, but what the run began with can be had again.
    started_from = ckpt.read_manifest([*found.values()][-1])["started_from"]
    found[0] = Path(started_from["path"]) if started_from else "the initial weights"
    choose_kernels(config.kernels)
    model = build_for_inference(config)
    losses: dict[tuple[int, int], str] = {}
    # Every checkpoint is loaded once, however many places it is asked about.
    for step in sorted(found):
        asked = {k for k, theirs in enumerate(visits) for v in theirs
                 if step in (v.first_step, v.first_step + v.steps)}
        if asked and (step or started_from):
            ckpt.load_weights(model, found[step])
        elif asked:
            model.init_weights(config.init_seed or config.seed)
        for k in asked:
            losses[k, step] = f"{passage_loss(model, data, places[k]):.3f} ({found[step]})"
    print("The losses of these passages, in nats per token, before and after their chunk:")
    for k, theirs in enumerate(visits):
        for v in theirs:
            print(f"{k + 1:>2}: chunk {v.chunk}", *(
                losses.get((k, step), f"unknown (no checkpoint of step {step})")
                for step in (v.first_step, v.first_step + v.steps)))


def passage_loss(model: LLaMA, data: Data, place: Place) -> float:
    """Mean loss of the tokens that cover a place; NaN if there is none that is predicted."""
    ids = data.take(place.chunk, [place.sequence])["token_ids"].astype(np.int64)  # (1, T + 1)
    ids = torch.from_numpy(ids).to(model.lm_head.weight.device)
    _, token_losses = model(ids[:, :-1], ids[:, 1:])  # (1, T)
    # The first token of a sequence is never predicted: the losses begin with that of the second.
    return float(token_losses[0, max(0, place.first - 1) : place.last].mean())


# ---------------------------------------------------------------------------------------------
# --outliers: which steps stand out?


def show_outliers(config: Config, command: str) -> None:
    """Print the steps whose loss or gradient norm is outside the band of the steps around them."""
    lines = ckpt.read_metrics(config.run_dir)
    log = [lines[step] for step in sorted(lines) if "loss" in lines[step]]
    if len(log) < WINDOW:
        raise UserError(f"{config.run_dir}/metrics.jsonl has {len(log)} steps, and a band is made"
                        f" of {WINDOW}: run train.py with this config first.")
    found = find_outliers(log)
    print(f"{len({step for step, *_ in found})} of {len(log):,} steps leave the band of the"
          f" {WINDOW} steps around them")
    for step, key, value, low, high, record in found:
        by_source = record.get("loss_by_source") or {"unknown": float("nan")}
        worst = max(by_source, key=by_source.get)
        print(f"step {step}, chunk {record.get('chunk')}: {key} {value:.3f}, band {low:.3f} to"
              f" {high:.3f}, largest loss {worst} {by_source[worst]:.3f}: {command} --step={step}")


def find_outliers(log: list[dict[str, Any]]) -> list[tuple]:
    """(step, "loss" or "grad_norm", value, low, high, record) of those outside their band."""
    found = []
    for key in ("loss", "grad_norm") if len(log) >= WINDOW else ():
        values = np.array([record[key] for record in log], dtype=float)
        low, high = band(values)
        # A value that is not finite is in no band.
        for k in np.flatnonzero(~((low <= values) & (values <= high))).tolist():
            found.append((log[k]["step"], key, values[k], low[k], high[k], log[k]))
    return sorted(found, key=lambda f: f[:2])


def band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest value (N,) that is like those around it."""
    # A Hampel filter: median and median absolute deviation of a running window. Mean and deviation
    # would be moved by the very outliers. At both ends the nearest whole window counts.
    good = np.flatnonzero(np.isfinite(values))
    filled = np.interp(np.arange(len(values)), good, values[good])
    windows = np.lib.stride_tricks.sliding_window_view(filled, WINDOW)  # (N - 50, 51)
    median = np.median(windows, axis=1)
    deviation = np.median(np.abs(windows - median[:, None]), axis=1)
    # 1.4826 makes it the standard deviation where values are normal; of those one in 500 million
    # is beyond six. And what is within 1 % is no outlier, however quiet the steps around it.
    width = np.maximum(6 * 1.4826 * deviation, 0.01 * np.abs(median))
    return tuple(np.pad(edge, WINDOW // 2, mode="edge") for edge in (median - width,
                                                                     median + width))


def main(argv: list[str]) -> None:
    config, flags = load(argv, Flags)
    # What the run itself has recorded comes before the config: that may have changed since, or
    # another --seed was given. Without a run the config says what one would read.
    config = with_recorded(config, read_json(Path(config.run_dir) / "config.json"))
    # The words and not the values: --step=0 and --find= must be refused, and are the defaults.
    asked = {argument.lstrip("-").partition("=")[0] for argument in argv}
    if "step" in asked:
        show_step(config, flags.step)
    elif "find" in asked:
        find(config, flags.find)
    elif flags.outliers:
        same = [word for word in argv if word.lstrip("-").partition("=")[0] != "outliers"]
        show_outliers(config, shlex.join(["python", "lookup.py", *same]))
    else:
        raise UserError('Say what to look up: --step=N, --find="some text" or --outliers.')


if __name__ == "__main__":
    run_command(main)
