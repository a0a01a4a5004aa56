"""Where does a number of a run come from?

    python tools/lookup.py configs/amber_tiny.py --step=100          # what step 100 learned from
    python tools/lookup.py configs/amber_tiny.py --find="import re"  # where a text is, its losses

A line of the log leads to a step, a step to its sequences, and a sequence to the documents of the
files that it was made from. A text leads back: to every sequence that has it, to the step that
learned from it, and to the loss of that very passage before and after. Nothing is written.
"""

import bisect
import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

import checkpoint as ckpt
import train
from configs import Config, UserError, load, progress, regular, run_command, with_recorded
from data import Data, Visit, load_data, read_json, step_sequences, step_to_visit
from model import LLaMA
from parallel import build_for_inference
from tokenizer import replace_invalid_utf8

SHOWN = 20  # places of a text that are printed; all are counted
BLOCK = 512  # sequences that are read at a time


@dataclass
class Flags:
    """What lookup.py takes beside the settings; one of these must be given."""

    step: int = 0  # print the sequences that this optimizer step (from 1) learned from
    find: str = ""  # a text: where it is in the data, and how its losses changed


def show_step(config: Config, step: int) -> None:
    """Print the line of the log of optimizer step `step` (from 1), and the sequences it read."""
    data, batch = load_data(config.data_dir), config.global_batch_size
    schedule = data.schedule(config)
    total = sum(visit.steps for visit in schedule)
    if not 1 <= step <= total:
        raise UserError(f"--step={step}: {config.data_dir} has steps 1 to {total:,} of {batch}"
                        " sequences.")
    visit, within = step_to_visit(schedule, step - 1)
    n = len(data.verified(data.manifest["chunks"][visit.chunk]))
    numbers = step_sequences(config.seed, visit.chunk, n, within, batch, visit.epoch)
    print(f"step {step} = step {within + 1} of chunk {visit.chunk}, {batch} sequences of"
          f" {config.data_dir}")
    if record := ckpt.read_metrics(config.run_dir).get(step):
        kept = ("loss", "grad_norm", "lr", "loss_by_source")
        print(", ".join(f"{key} {json.dumps(record[key])}" for key in kept if key in record))
    for i, sequence in zip(numbers.tolist(), data.take(visit.chunk, numbers)):
        source = data.sources[sequence["source"]]
        text = data.tokenizer.decode(sequence["token_ids"][:64])[:100]
        print(f"{source:<16} chunk {visit.chunk} sequence {i:<8}"
              f" {json.dumps(text, ensure_ascii=False)}")
        print(f"{'':<16} {origin(data, visit.chunk, i, 0, data.seq_len + 1)}")


def origin(data: Data, chunk: int, i: int, begin: int, end: int) -> str:
    """Where tokens `begin` to `end` of sequence i of a chunk come from, in words."""
    about, (sequence,) = data.manifest["chunks"][chunk], data.take(chunk, [i])
    source = data.sources[sequence["source"]]
    if source == "canary" and "canaries" in data.manifest:
        return "planted: random tokens, of no document"
    if "made_from" in about:  # a released file has lines and no documents
        return f"{about['made_from']} line {sequence['number'] + 1}"
    pieces = documents_of(data, sequence, begin, end)
    # Tokens are counted as they were written: infilled documents have their middle last.
    unit = "infilled token" if data.manifest["settings"]["fim_rates"].get(source) else "token"
    words = [f"{file} document {document}" + f" from its {unit} {first}" * (first > 0)
             for file, document, first, _ in pieces[:3]]
    return "; ".join(words) + f"; and {len(pieces) - 3} more" * (len(pieces) > 3)


def documents_of(data: Data, sequence: np.void, begin: int,
                 end: int) -> list[tuple[str, int, int, int]]:
    """(file, number of the document in it, from 1; its first token here, from 0; tokens) of each
    document in tokens `begin` to `end` of a sequence. Its last is the end-of-document."""
    index, files = read_index(data.directory, data.sources[sequence["source"]])
    # A source is one long run of tokens, cut into sequences in the order of its documents.
    at = int(sequence["number"]) * (data.seq_len + 1)
    begin, end = at + begin, at + end
    # Bisection reads a few places of the mapped file, and searchsorted would copy all of it.
    k, pieces = bisect.bisect_right(index["begin"], begin) - 1, []
    while begin < end:
        first, file, number = index[k].tolist()
        k += 1
        stop = min(end, int(index["begin"][k])) if k < len(index) else end
        pieces.append((files[file], number, begin - first, stop - begin))
        begin = stop
    return pieces


@functools.lru_cache
def read_index(directory: Path, source: str) -> tuple[np.ndarray, list[str]]:
    """The documents of a source, memory-mapped (dtype data.DOCUMENT), and its files' names."""
    data = load_data(directory)
    for entry in data.manifest["documents"]:
        if entry["file"] in (f"documents/{source}.npy", "documents/files.json"):
            data.verify_file(entry)
    index = np.load(regular(directory / "documents" / f"{source}.npy"), "r", allow_pickle=False)
    return index, read_json(directory / "documents" / "files.json")[source]


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
    data = load_data(config.data_dir)
    places, total = find_places(data, replace_invalid_utf8(text).encode(), SHOWN)
    if not places:
        raise UserError(f"{text!r} is nowhere in the training data of {config.data_dir}.")
    print(f"{total:,} place{'s' * (total > 1)} in {config.data_dir}"
          + f", the first {SHOWN}" * (total > SHOWN))
    for k, place in enumerate(places, 1):
        steps = [f"step {step}" for _, step in steps_of(config, data, place)]
        source = data.sources[data.chunk(place.chunk)["source"][place.sequence]]
        print(f"{k:>2}: {source}, chunk {place.chunk} sequence"
              f" {place.sequence}, tokens {place.first} to {place.last}, byte {place.byte}:"
              f" {' and '.join(steps) or 'not read'}")
        print(f"    {json.dumps(place.context, ensure_ascii=False)}")
        print(f"    {origin(data, place.chunk, place.sequence, place.first, place.last + 1)}")
    show_losses(config, data, places)


def find_places(data: Data, text: bytes, limit: int) -> tuple[list[Place], int]:
    """The first `limit` occurrences in the training sequences, and how many there are."""
    places, total = [], 0
    # One piece more, for ids that the tokenizer does not have: a byte that UTF-8 never has.
    pieces = [data.tokenizer.pieces.get(i, b"\xff") for i in range(data.n_vocab + 1)]
    for c, file in enumerate(progress(data.manifest["chunks"], "chunks")):
        chunk = data.verified(file)["token_ids"]
        for at in range(0, len(chunk), BLOCK):
            block = np.minimum(chunk[at : at + BLOCK], data.n_vocab).tolist()
            for i, ids in enumerate(block, at):
                sequence = b"".join(map(pieces.__getitem__, ids))
                byte = sequence.find(text)
                while byte >= 0:
                    total += 1
                    if total <= limit:
                        ends = np.cumsum([len(pieces[id]) for id in ids])
                        tokens = np.searchsorted(ends, [byte, byte + len(text) - 1], side="right")
                        near = sequence[max(0, byte - 40) : byte + len(text) + 40]
                        # Half characters at the edges of the context are left out.
                        places.append(Place(c, i, *tokens.tolist(), byte,
                                            near.decode("utf-8", "ignore")))
                    byte = sequence.find(text, byte + 1)
    return places, total


def steps_of(config: Config, data: Data, place: Place) -> list[tuple[Visit, int]]:
    """Each visit that learned from a place, and the step (from 1) at which it did."""
    n, steps = data.manifest["chunks"][place.chunk]["sequences"], []
    for visit in data.schedule(config):
        if visit.chunk == place.chunk:
            order = step_sequences(config.seed, place.chunk, n, 0, n, visit.epoch)
            within = int(np.flatnonzero(order == place.sequence)[0]) // config.global_batch_size
            if within < visit.steps:  # else no step reads it: it is left over at the chunk's end
                steps.append((visit, visit.first_step + within + 1))
    return steps


def show_losses(config: Config, data: Data, places: list[Place]) -> None:
    """Print each passage's loss before and after its chunk, where there are checkpoints."""
    paths = {ckpt.read_manifest(path)["step"]: path
             for path in ckpt.list_checkpoints(config.run_dir)}
    if not paths:
        print(f"{config.run_dir} has no checkpoint, so there are no losses of these places.")
        return
    started_from = ckpt.read_manifest([*paths.values()][-1])["started_from"]
    config.init_from = config.init_from or started_from["path"] if started_from else ""
    paths[0] = config.init_from or "the initial weights"
    ends = [(k, visit.chunk, step) for k, place in enumerate(places)
            for visit, _ in steps_of(config, data, place)
            for step in (visit.first_step, visit.first_step + visit.steps)]
    model, losses = build_for_inference(config), {}
    # Every checkpoint is loaded once, however many places are measured with it.
    for step in sorted({step for _, _, step in ends} & paths.keys()):
        if step:
            ckpt.load_weights(model, paths[step])
        else:
            train.initial_weights(model, config, started_from)
        for k, place in enumerate(places):
            losses[k, step] = f"{passage_loss(model, data, place):.3f} ({paths[step]})"
    print("The losses of these passages, in nats per token, before and after their chunk:")
    for (k, chunk, first), (_, _, last) in zip(ends[::2], ends[1::2]):
        before, after = (losses.get((k, step), f"unknown (no checkpoint of step {step})")
                         for step in (first, last))
        print(f"{k + 1:>2}: chunk {chunk} {before} {after}")


def passage_loss(model: LLaMA, data: Data, place: Place) -> float:
    """Mean loss of the tokens that cover a place; NaN if there is none that is predicted."""
    ids = data.take(place.chunk, [place.sequence])["token_ids"].astype(np.int64)  # (1, T + 1)
    ids = torch.from_numpy(ids).to(model.lm_head.weight.device)
    _, token_losses = model(ids[:, :-1], ids[:, 1:])  # (1, T)
    # The first token of a sequence is never predicted: the losses begin with that of the second.
    return float(token_losses[0, max(0, place.first - 1) : place.last].mean())


def main(argv: list[str]) -> None:
    config, flags = load(argv, Flags)
    # What the run has recorded comes before the config, which may have changed since.
    config = with_recorded(config, read_json(Path(config.run_dir) / "config.json"))
    for path in ckpt.list_checkpoints(config.run_dir)[-1:]:
        if ckpt.read_manifest(path)["data_sha256"] != load_data(config.data_dir).sha256:
            raise UserError(f"{path} was trained on other data than {config.data_dir} holds.")
    if flags.find:
        find(config, flags.find)
    elif flags.step:
        show_step(config, flags.step)
    else:
        raise UserError('Say what to look up: --step=N, counted from 1, or --find="some text".')


if __name__ == "__main__":
    run_command(main)
