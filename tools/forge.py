"""An examination: copy a finished run and plant one fault in it. Can audit.py tell which?

    python tools/forge.py runs/amber_tiny runs/forged --seed=17
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

The seed draws the fault. All hashes and manifests fit it, and what it changes is trained again.
"""

import argparse
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

import checkpoint as ckpt
import train
from configs import Config, UserError, load, run_command
from data import Data, load_data, read_json, sha256_file, sha256_json, step_sequences, write_json

# How many checkpoints or chunks a kind names; "metrics" names a step.
KINDS = {"swapped": 2, "duplicated": 2, "shard": 2, "edited": 1, "twice": 1, "left_out": 1,
         "rate": 1, "leaked": 1, "canary": 1, "metrics": 1}


def run_config(run_dir: Path) -> Config:
    """The settings of a finished run; UserError if it is none."""
    if not ckpt.list_checkpoints(run_dir):
        raise UserError(f"{run_dir} holds no finished run: train one first.")
    return load([str(run_dir)])[0]


def draw_fault(config: Config, seed: int, kind: str = "") -> list[str]:
    """The fault of a seed, in the words of an answer: ["swapped", "3", "6"]."""
    random = np.random.default_rng([seed, 2023])
    kind = kind or str(random.choice([*KINDS]))
    schedule = load_data(config.data_dir).schedule(config)
    if kind == "metrics":
        return [kind, str(random.integers(2, sum(visit.steps for visit in schedule) + 1))]
    # Neither the first nor the last: "left out" needs a next one, "rate" one that it changes.
    visits = [visit.number for visit in schedule[1:-1]]
    numbers = random.choice(visits, KINDS[kind], replace=False)
    return [kind, *map(str, sorted(numbers))]


def forge(config: Config, out: Path, fault: list[str], seed: int) -> None:
    """Write OUT/data and OUT/run, a copy of a run with a fault."""
    kind, places = fault[0], [int(place) for place in fault[1:]]
    random = np.random.default_rng([seed, 2024])
    run_dir, data_dir = out / "run", out / "data"
    # Nothing else: results of other stages, or the text of train.log, would give the fault away.
    for path in ckpt.select_checkpoints(config.run_dir, "all"):
        shutil.copytree(path, run_dir / path.name)
    shutil.copy(Path(config.run_dir, "metrics.jsonl"), run_dir)
    shutil.copytree(config.data_dir, data_dir)
    where = {"run_dir": str(run_dir), "data_dir": str(data_dir)}
    write_json(run_dir / "config.json", vars(config) | where)
    claims = {path: ckpt.read_manifest(path) for path in ckpt.list_checkpoints(run_dir)}
    path = [run_dir / f"ckpt_{place:03d}" for place in places]
    if kind == "swapped":
        path[0].rename(out / "aside")
        path[1].rename(path[0])
        (out / "aside").rename(path[1])
    elif kind == "duplicated":
        shutil.rmtree(path[1])
        shutil.copytree(path[0], path[1])
    elif kind == "shard":
        replace_shard(*path, random)
    elif kind == "metrics":
        # Another loss or gradient norm of one step, with or without the losses by source.
        records = ckpt.read_records(run_dir / "metrics.jsonl")
        record, factor = records[places[0] - 1], float(random.uniform(0.95, 0.99))
        key = random.choice(["grad_norm", "loss", "losses"])
        record["grad_norm" if key == "grad_norm" else "loss"] *= factor
        if key == "losses":
            for name, loss in record["loss_by_source"].items():
                record["loss_by_source"][name] = round(loss * factor, 5)
        ckpt.write_records(run_dir / "metrics.jsonl", records)
    elif kind in ("edited", "leaked", "canary"):
        edit_chunk(load_data(data_dir), config, kind, places[0], random)
    write_manifests(claims, load_data(data_dir))
    if kind in ("twice", "left_out", "rate", "leaked", "canary"):
        retrain(run_dir, kind, places[0])


def replace_shard(path: Path, other: Path, random: np.random.Generator) -> None:
    """A third of a checkpoint's tensors, as if it had three shards, from another checkpoint."""
    (file,) = path.glob("model*.safetensors")  # of a run of one process
    mine, theirs = dict(ckpt.read_tensors(path)), dict(ckpt.read_tensors(other))
    names = np.array_split([*mine], 3)[random.integers(3)]
    # The file is mapped, so it must be copied before it is written.
    copies = [(name, (theirs if name in names else mine)[name].clone()) for name in mine]
    hashes, manifest = ckpt.write_safetensors(file, copies), ckpt.read_manifest(path)
    manifest["tensors"] |= hashes
    manifest["files"][file.name] = sha256_file(file)
    manifest["weights_sha256"] = sha256_json(hashes)
    write_json(path / "manifest.json", manifest)


def edit_chunk(data: Data, config: Config, kind: str, chunk: int,
               random: np.random.Generator) -> None:
    """Change sequences of a chunk that a step reads, and the data's manifest with them."""
    entry = data.manifest["chunks"][chunk]
    path = data.directory / entry["file"]
    sequences = np.load(path, mmap_mode="r+")
    n, batch = len(sequences), config.global_batch_size
    read = step_sequences(config.seed, chunk, n, 0, n // batch * batch)  # by any step at all
    chosen, ids = random.choice(read, 9, replace=False), sequences["token_ids"]
    if kind == "edited":  # from the tenth id on it is another sequence's text
        ids[chosen[0], 9:] = ids[chosen[1], 9:]
    elif kind == "leaked":
        source = random.choice(data.validation_sources)
        ids[chosen[0]] = random.choice(data.validation(source)["token_ids"])
    else:
        ids[chosen[:8]] = random.integers(data.n_vocab, size=ids.shape[1])
    sequences.flush()
    entry["sha256"] = sha256_file(path)
    write_json(data.directory / "manifest.json", data.manifest)


def write_manifests(claims: dict[Path, dict], data: Data) -> None:
    """Give each directory, whatever it holds now, its old claims and the hashes that fit them."""
    parent: dict[str, str] = {}
    for path, manifest in claims.items():
        content = read_json(path / "manifest.json")  # it was moved together with the files
        manifest |= {key: content[key] for key in ("files", "tensors", "weights_sha256")}
        manifest["history"]["data_sha256"] = data.sha256
        manifest["chunk_sha256"] = data.manifest["chunks"][manifest["chunk"]]["sha256"]
        manifest |= {"data_sha256": data.sha256, "parent": parent}
        write_json(path / "manifest.json", manifest | {"sha256": sha256_json(manifest)})
        parent = {"checkpoint": path.name, "weights_sha256": manifest["weights_sha256"]}


def retrain(run_dir: Path, kind: str, number: int) -> None:
    """Train a run again from visit `number` on, with train.py's own loop and a change in it."""
    for path in ckpt.list_checkpoints(run_dir):
        if ckpt.read_manifest(path)["visit"] >= number:
            shutil.rmtree(path)
    honest_step = train.train_step

    def train_step(run: train.Run, batch: train.Batch, lr: float) -> dict:
        visit, own_lr = batch.visit, lr
        if kind == "left_out":  # the next chunk instead of this one; at last the first
            batch = train.load_batch(run, (run.step + visit.steps) % run.total_steps)
        elif kind == "rate":  # that of the next step, and the right one in the log
            own_lr = train.learning_rate(run.config, run.step + 2, run.total_steps)
        elif kind == "twice" and visit.number == number:
            steps = range(visit.first_step, visit.first_step + visit.steps)
            for step in steps if run.step == steps[-1] else []:
                honest_step(run, train.load_batch(run, step), lr)
        return honest_step(run, batch, own_lr) | {"lr": lr}

    with patch.object(train, "train_step", train_step):
        train.main([str(run_dir)])
    (run_dir / "train.log").unlink()


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
        kind, *places = args.says.split() or [""]
        if kind not in KINDS:
            raise UserError(f"--says={args.says!r} must begin with one of: {', '.join(KINDS)}.")
        # Of two that were swapped the order is the same either way; of a duplicate it is not.
        right = places == fault[1:] or kind == "swapped" and places[::-1] == fault[1:]
        where = "Right." if right else "That is what was done, but not where."
        print(where if kind == fault[0] else "No: that is not what was done.")
        return
    if args.out is None or args.out.exists():
        raise UserError("Give a directory that does not exist yet: tools/forge.py RUN OUT --seed=N")
    forge(config, args.out, fault, args.seed)
    print(f"{args.out}/run and {args.out}/data: one thing is wrong with them. What, and where?")


if __name__ == "__main__":
    run_command(main)
