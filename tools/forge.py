"""An examination: copy a finished run and plant one fault in it. Can audit.py tell which?

    python tools/forge.py runs/amber_tiny runs/forged --seed=17
    python audit.py configs/amber_tiny.py --run_dir=runs/forged/run --data_dir=runs/forged/data
    python tools/forge.py runs/amber_tiny --answer --seed=17 --says="swapped 3 6"

    swapped 3 6      the checkpoints 3 and 6 have each other's name
    duplicated 3 6   checkpoint 6 has the weights of 3
    shard 3 6        a third of the tensors of checkpoint 3 is from 6
    edited 4         a sequence of chunk 4 is not the one that was trained on
    twice 4          chunk 4 was trained twice before checkpoint 4
    left_out 4       chunk 4 was left out, and the next ones trained under the names before them
    rate 4           from chunk 4 on, the learning rate was that of one step later
    metrics 123      the log's line of step 123 is not what was measured
    leaked 4         a validation sequence is in chunk 4, and was trained on
    canary 4         a sequence of random ids is hidden in chunk 4, eight times

The seed draws the fault. All hashes and manifests are written anew, so that they give nothing away.
What has to be trained again is: half a run on average.
"""

import argparse
import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

import checkpoint as ckpt
import train
from configs import Config, UserError, run_command, with_recorded
from data import (
    Data,
    Visit,
    load_data,
    read_json,
    sha256_file,
    sha256_json,
    step_sequences,
    step_to_visit,
    write_json,
)
from model import choose_kernels

# How many numbers of checkpoints a kind names, or that it names a step of the log.
KINDS = {"swapped": 2, "duplicated": 2, "shard": 2, "edited": 1, "twice": 1, "left_out": 1,
         "rate": 1, "leaked": 1, "canary": 1, "metrics": "step"}


def run_config(run_dir: Path) -> Config:
    """The settings of a finished run; UserError if it is none."""
    recorded = read_json(run_dir / "config.json")
    if not recorded or not ckpt.list_checkpoints(run_dir):
        raise UserError(f"{run_dir} holds no finished run: train one first.")
    config = with_recorded(Config(), recorded)
    config.data_dir, config.run_dir, config.resume = recorded["data_dir"], str(run_dir), "auto"
    return config


def draw_fault(config: Config, seed: int, kind: str = "") -> list[str]:
    """The fault of a seed, in the words of an answer: ["swapped", "3", "6"]."""
    random = np.random.default_rng([seed, 2023])
    kind = kind or str(random.choice([*KINDS]))
    schedule = load_data(config.data_dir).schedule(config)
    visits = [visit.number for visit in schedule]
    if KINDS[kind] == "step":
        return [kind, str(random.integers(2, sum(visit.steps for visit in schedule) + 1))]
    # Neither the first nor the last: "left out" needs a next one, "rate" one that it changes.
    numbers = random.choice(visits[1:-1], KINDS[kind], replace=False)
    return [kind, *map(str, sorted(map(int, numbers)))]


def forge(config: Config, out: Path, fault: list[str], seed: int) -> None:
    """Write OUT/data and OUT/run, a copy of a run with a fault."""
    kind, *places = fault
    places, random = [int(place) for place in places], np.random.default_rng([seed, 2024])
    # Results of other stages would tell, and so would the text of train.log.
    passed_over = shutil.ignore_patterns("*.log", "lock", "eval.jsonl", "memorization*", "audit*",
                                         "*.html", "*.png", "*.aside*")
    shutil.copytree(config.run_dir, out / "run", ignore=passed_over)
    shutil.copytree(config.data_dir, out / "data")
    config.run_dir, config.data_dir = str(out / "run"), str(out / "data")
    write_json(out / "run" / "config.json", read_json(out / "run" / "config.json")
               | {"run_dir": config.run_dir, "data_dir": config.data_dir})
    path = [out / "run" / f"ckpt_{place:03d}" for place in places]
    if kind == "swapped":
        first, second = (ckpt.read_manifest(p) for p in path)
        path[0].rename(out / "aside")
        path[1].rename(path[0])
        (out / "aside").rename(path[1])
        put_claims(path[0], first)
        put_claims(path[1], second)
    elif kind == "duplicated":
        claims = ckpt.read_manifest(path[1])
        shutil.rmtree(path[1])
        shutil.copytree(path[0], path[1])
        put_claims(path[1], claims)
    elif kind == "shard":
        replace_shard(*path, random)
    elif kind == "metrics":
        alter_line(out / "run" / "metrics.jsonl", places[0], random)
    elif kind in ("edited", "leaked", "canary"):
        edit_chunk(config, kind, places[0], random)
    rehash(out / "run", load_data(out / "data"))
    if kind in ("twice", "left_out", "rate", "leaked", "canary"):
        retrain(config, kind, places[0])


# ---------------------------------------------------------------------------------------------
# what is planted in files


def put_claims(path: Path, manifest: dict) -> None:
    """Give a checkpoint the manifest of another."""
    state = path / "train_state" / "state.json"
    if state.exists():
        write_json(state, {"step": manifest["step"], "updates": manifest["step"]})
    write_json(path / "manifest.json", manifest)


def replace_shard(path: Path, other: Path, random: np.random.Generator) -> None:
    """A third of a checkpoint's tensors, as if it had three shards, from another checkpoint."""
    tensors = {name: tensor.clone() for name, tensor in ckpt.read_tensors(path)}
    names = np.array_split([*tensors], 3)[random.integers(3)]
    theirs = dict(ckpt.read_tensors(other))
    files = [*path.glob("model*.safetensors")]
    if len(files) > 1:
        raise UserError(f"{path} has {len(files)} files of weights: forge a run of one process.")
    tensors |= {name: theirs[name].clone() for name in names}
    ckpt.write_safetensors(files[0], [*tensors.items()])


def alter_line(file: Path, step: int, random: np.random.Generator) -> None:
    """Another loss or gradient norm of one step, with or without the losses by source."""
    records = ckpt.read_records(file)
    for record in records:
        if record["step"] == step:
            how, by = random.integers(3), round(float(random.uniform(0.02, 0.2)), 4)
            if how == 0:
                record["grad_norm"] *= 1 - by
            else:
                record["loss"] -= by
            if how == 2:
                record["loss_by_source"] = {name: round(loss - by, 5) for name, loss
                                            in record["loss_by_source"].items()}
    ckpt.write_records(file, records)


def edit_chunk(config: Config, kind: str, chunk: int, random: np.random.Generator) -> None:
    """Change sequences of a chunk that a step reads, and the data's manifest with them."""
    data = load_data(config.data_dir)
    entry = data.manifest["chunks"][chunk]
    path = data.directory / entry["file"]
    sequences = np.load(path, mmap_mode="r+")
    n, batch = len(sequences), config.global_batch_size
    read = step_sequences(config.seed, chunk, n, 0, n // batch * batch)  # by any step at all
    chosen = random.choice(read, 9, replace=False)
    ids = sequences["token_ids"]
    if kind == "edited":
        # From the middle on it is another sequence's text.
        middle = ids.shape[1] // 2
        ids[chosen[0], middle:] = ids[chosen[1], middle:]
    elif kind == "leaked":
        source = data.validation_sources[random.integers(len(data.validation_sources))]
        ids[chosen[0]] = random.choice(data.validation(source)["token_ids"])
    else:
        ids[chosen[:8]] = random.integers(data.n_vocab, size=ids.shape[1])
    sequences.flush()
    entry["sha256"] = sha256_file(path)
    write_json(data.directory / "manifest.json", data.manifest)


def rehash(run_dir: Path, data: Data) -> None:
    """Write all manifests anew, so that every hash and every chain of them is right."""
    manifests = [(read_json(path / "manifest.json"), path) for path in run_dir.glob("ckpt_*")]
    parent: dict[str, str] = {}
    for manifest, path in sorted(manifests, key=lambda pair: pair[0]["step"]):
        manifest.pop("sha256", None)
        weights = tensor_hashes(path, "model")
        moments = tensor_hashes(path / "train_state", "optimizer")
        files = {name: sha256_file(path / name) for name in manifest["files"]}
        manifest |= {"weights_sha256": sha256_json(dict(sorted(weights.items()))), "files": files,
                     "tensors": dict(sorted((weights | moments).items())),
                     "data_sha256": data.sha256, "parent": parent,
                     "chunk_sha256": data.manifest["chunks"][manifest["chunk"]]["sha256"]}
        write_json(path / "manifest.json", manifest | {"sha256": sha256_json(manifest)})
        parent = {"checkpoint": path.name, "weights_sha256": manifest["weights_sha256"]}


def tensor_hashes(directory: Path, stem: str) -> dict[str, str]:
    """sha256 of each tensor, as a manifest has them; {} where old states were dropped."""
    if not directory.exists():
        return {}
    return {name: ckpt.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()
            for name, tensor in ckpt.read_tensors(directory, stem)}


# ---------------------------------------------------------------------------------------------
# what is trained


def retrain(config: Config, kind: str, number: int) -> None:
    """Train a run again from visit `number` on, with train.py's own loop and a change in it."""
    run_dir = Path(config.run_dir)
    for path in run_dir.glob("ckpt_*"):
        manifest = ckpt.read_manifest(path)
        config.threads = manifest["environment"]["threads"]
        if manifest["visit"] >= number:
            ckpt.delete_directory(path)
    choose_kernels(config.kernels)
    run = train.start(config)
    train.resume(run)
    train.begin_records(run)
    changed = {"twice": train_twice, "left_out": leave_out, "rate": shift_rate}
    with changed.get(kind, lambda run, number: contextlib.nullcontext())(run, number):
        train.train(run)
    run.pool.shutdown()
    (run_dir / "train.log").unlink()


def batch_of(run: train.TrainState, visit: Visit, step: int, chunk: int) -> train.Batch:
    """The batch of a step of a visit, but out of another chunk than the one that is claimed."""
    sequences = run.data.chunk(chunk)
    ids = step_sequences(run.config.seed, chunk, len(sequences), step,
                         run.config.global_batch_size)
    return train.Batch(visit, step, ids, sequences[ids])


@contextlib.contextmanager
def leave_out(run: train.TrainState, number: int) -> Iterator[None]:
    """From visit `number` on read the chunk after the one that is claimed; at last the first."""
    chunks = [visit.chunk for visit in run.schedule]

    def load_batch(run: train.TrainState, step_of_run: int) -> train.Batch:
        visit, step = step_to_visit(run.schedule, step_of_run)
        place = run.schedule.index(visit)
        return batch_of(run, visit, step, chunks[(place + 1) % len(chunks)])

    with patch.object(train, "load_batch", load_batch):
        yield


@contextlib.contextmanager
def train_twice(run: train.TrainState, number: int) -> Iterator[None]:
    """Before the last step of visit `number`, all of its chunk once more."""
    honest = train.train_step

    def train_step(run: train.TrainState, batch: train.Batch, lr: float) -> dict:
        if batch.visit.number == number and batch.step_in_chunk + 1 == batch.visit.steps:
            for step in range(batch.visit.steps):
                honest(run, batch_of(run, batch.visit, step, batch.visit.chunk), lr)
        return honest(run, batch, lr)

    with patch.object(train, "train_step", train_step):
        yield


@contextlib.contextmanager
def shift_rate(run: train.TrainState, number: int) -> Iterator[None]:
    """The learning rate of the next step at every step, and the right one in the log."""
    honest = train.train_step

    def train_step(run: train.TrainState, batch: train.Batch, lr: float) -> dict:
        next_lr = train.learning_rate(run.config, run.step + 2, run.total_steps)
        return honest(run, batch, next_lr) | {"lr": lr}

    with patch.object(train, "train_step", train_step):
        yield


# ---------------------------------------------------------------------------------------------


def mark(says: str, fault: list[str]) -> str:
    """What is to be said of an answer."""
    words = says.split()
    if not words or words[0] not in KINDS:
        raise UserError(f"--says={says!r} must begin with one of: {', '.join(KINDS)}.")
    if words[0] != fault[0]:
        return "No: that is not what was done."
    # Who has whose name is the same either way; of a duplicate, who is the copy is not.
    right = sorted(words[1:]) == sorted(fault[1:]) if words[0] == "swapped" else words == fault
    return "Right." if right else "That is what was done, but not where."


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--kind", choices=[*KINDS], help="plant this kind; the seed draws where")
    parser.add_argument("--answer", action="store_true")
    parser.add_argument("--says", default="")
    args = parser.parse_args(argv)
    config = run_config(args.run)
    fault = draw_fault(config, args.seed, args.kind or "")
    if args.answer:
        print(mark(args.says, fault))
        return
    if args.out is None or args.out.exists():
        raise UserError("Give a directory that does not exist yet: tools/forge.py RUN OUT --seed=N")
    args.out.mkdir(parents=True)
    forge(config, args.out, fault, args.seed)
    print(f"{args.out}/run and {args.out}/data: one thing is wrong with them. What, and where?")


if __name__ == "__main__":
    run_command(main)
