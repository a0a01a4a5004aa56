"""An examination: copy a finished run and plant one fault in it. Can audit.py tell which?

    python tools/forge.py runs/amber_tiny runs/forged --seed=17
    python tools/forge.py runs/amber_tiny --answer --seed=17 --says="swapped 3 6"

The seed draws a kind (docs/audit.md says what each is), and the checkpoint with the fault, or whose
chunk has it. All hashes and manifests fit it, and what it changes is trained again. An answer is
the kind and that number; two of them if two checkpoints are named, none if all are concerned.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

import checkpoint as ckpt
import train
from configs import Config, UserError, load, run_command
from data import load_data, read_json, sha256_file, sha256_json, step_sequences, write_json

# What the functions below get as x: config, dir and data of the copy; path, the checkpoint with the
# fault, chunk, its chunk's number, other, the second one that is named, before, the one before (the
# second, of the first); claims, {path: manifest} of all; held_out, validation sequences; random; s,
# the strength. In TRAINING also batch and lr of a step, honest, both, i, its number of n in the
# chunk, last, whether i == n - 1, at(j), batch and lr of step j of the chunk or the next, adam,
# the optimizer's settings, and step and total of the run.


class Kind(NamedTuple):
    change: Callable
    strengths: tuple[float, ...] = (1.0,)  # the largest first
    places: int = 1  # how many checkpoints it names
    source: Callable[[SimpleNamespace], Path] = lambda x: x.other  # of the tensors b
    only: str = ""  # in the names of the tensors that are changed


def elsewhere(x: SimpleNamespace, *settings: str) -> Path:
    """The newest checkpoint of another run."""
    run_dir = x.dir.with_name("elsewhere")
    train.main([str(x.dir), f"--run_dir={run_dir}", *settings])
    return ckpt.list_checkpoints(run_dir)[-1]


def one_line(records: list[dict], x: SimpleNamespace, *keys: str) -> list[dict]:
    """Of one of the chunk's lines with these keys, all numbers in them are lower."""
    def lower(value: Any) -> Any:
        nested = isinstance(value, dict)
        return {k: lower(v) for k, v in value.items()} if nested else value * (1 - x.s)

    line = x.random.choice([r for r in records if r["chunk"] == x.chunk and keys[0] in r])
    line.update({key: lower(line[key]) for key in keys})
    return records


def edit(directory: Path, **settings: Any) -> None:
    write_json(directory / "config.json", read_json(directory / "config.json") | settings)


# (a, b, x) -> the new tensor, of a in the checkpoint and b in `source`
WEIGHTS = {
    "duplicated": Kind(lambda a, b, x: b, places=2),
    "shard": Kind(lambda a, b, x: b, places=2, only="layers.0."),
    "mixed": Kind(lambda a, b, x: a.lerp(b, x.s), (0.5, 0.1), source=lambda x: x.before),
    "rounded": Kind(lambda a, b, x: a.bfloat16().float()),
    "noise": Kind(lambda a, b, x: a + a * x.s * x.random.standard_normal(a.shape, "f4"),
                  (1e-3, 1e-4)),
    "remade": Kind(lambda a, b, x: a[x.random.permutation(len(a))], only="layers.0."),
    "other_seed": Kind(lambda a, b, x: b, source=lambda x: elsewhere(
        x, f"--init_seed={x.config.seed + 1}", f"--max_steps={x.claims[x.path]['step']}")),
    "tuned": Kind(lambda a, b, x: b, (20, 2), source=lambda x: elsewhere(
        x, f"--init_from={x.path}", f"--max_steps={x.s}"))}
# (records, x) -> the lines of metrics.jsonl
LOG = {
    "loss": Kind(lambda records, x: one_line(records, x, "loss", "loss_by_source"), (0.05, 1e-3)),
    "grad_norm": Kind(lambda records, x: one_line(records, x, "grad_norm"), (0.05, 1e-3)),
    "validation": Kind(lambda records, x: one_line(records, x, "valid"), (0.05, 1e-3)),
    "thinned": Kind(lambda records, x: [r for r in records if r["grad_norm"] < np.quantile(
        [r["grad_norm"] for r in records], 1 - x.s)], (1, 0.5, 0.03), places=0),
    "cut": Kind(lambda records, x: [shutil.rmtree(x.claims.popitem()[0]) for _ in range(int(x.s))]
                and records[: [*x.claims.values()][-1]["step"]], (2, 1), places=0)}
# (sequences of the chunk, numbers of those that steps read, x) -> numbers, their new ids
DATA = {
    "edited": Kind(lambda chunk, read, x: (read[0], np.append(
        chunk["token_ids"][read[0], :9], chunk["token_ids"][read[1], 9:]))),
    "replaced": Kind(lambda chunk, read, x: (few := read[: round(x.s * len(read))], np.roll(
        x.data.chunk(0 if x.chunk else 1)["token_ids"][few], 9, axis=1)), (0.5, 0.1))}
# The same, and trained on
PLANTED = {
    "leaked": Kind(lambda chunk, read, x: (read[0], x.held_out["token_ids"][0])),
    "canary": Kind(lambda chunk, read, x: (read[:8], x.random.integers(
        x.data.n_vocab, size=x.data.seq_len + 1)))}
# (x) -> what is trained in the place of a step of the chunk, the last of it logged
TRAINING = {
    "twice": Kind(lambda x: [*map(x.at, range(x.n * x.last)), x.honest]),
    "left_out": Kind(lambda x: [x.at(x.n + x.i)]),
    "reversed": Kind(lambda x: [x.at(x.n - 1 - x.i)]),
    "rate": Kind(lambda x: [(x.batch, x.lr * x.s)], (2, 0.5, 1.1)),
    "late_rate": Kind(lambda x: [(x.batch, train.learning_rate(x.config, x.step + 2, x.total))]),
    "idle": Kind(lambda x: [(x.batch, x.lr * (x.i >= x.s * x.n))], (0.5, 0.1)),
    "coached": Kind(lambda x: [*[(x.batch._replace(sequences=np.resize(
        x.held_out, x.batch.sequences.shape)), x.lr)] * int(x.s * x.last), x.honest], (10, 1)),
    "decay": Kind(lambda x: x.adam.update(weight_decay=x.s) or [x.honest], (1.0, 0.0)),
    "beta": Kind(lambda x: x.adam.update(betas=(x.config.adam_beta1, x.s)) or [x.honest],
                 (0.5, 0.99))}
# (x) changes files
FILES = {
    "swapped": Kind(lambda x: [x.path.rename(x.dir / "aside"), x.other.rename(x.path),
                               (x.dir / "aside").rename(x.other)], places=2),
    "tokens": Kind(lambda x: [m.update(tokens=10 * m["tokens"]) for m in x.claims.values()],
                   places=0),
    "config": Kind(lambda x: edit(x.dir, weight_decay=0.05), places=0)}
# The same, where directories have no manifest and no log, as others publish them: for examine.py.
PUBLISHED = {
    "rope": Kind(lambda x: [edit(path, rope_theta=5e3) for path in x.claims], places=0),
    "epsilon": Kind(lambda x: edit(x.path, rms_norm_eps=1e-3)),
    "tokenizer": Kind(lambda x: (file := x.path / "tokenizer.json").write_text(re.sub(
        ": (300|301),", lambda m: f": {601 - int(m[1])},", file.read_text()))),
    "two_sets": Kind(lambda x: write_json(x.path / "model.safetensors.index.json", {"weight_map": {
        "lm_head.weight": "model.safetensors"}}))}
KINDS = WEIGHTS | LOG | DATA | PLANTED | TRAINING | FILES


def draw_fault(config: Config, seed: int, kind: str = "") -> list[str]:
    """The fault of a seed, in the words of an answer: ["swapped", "3", "6"]."""
    random = np.random.default_rng([seed, 2023])
    kind = kind or str(random.choice([*KINDS]))
    # Neither the first nor the last, of which less can be seen.
    visits = [visit.number for visit in load_data(config.data_dir).schedule(config)[1:-1]]
    return [kind, *map(str, sorted(random.choice(visits, KINDS[kind].places, replace=False)))]


def forge(config: Config, out: Path, fault: list[str], seed: int, strength: float = -1) -> None:
    """Write OUT/data and OUT/run, a copy of a run with a fault; strength: -1 = the largest."""
    name, numbers, run_dir = fault[0], [*map(int, fault[1:])] or [0], out / "run"
    kind = (KINDS | PUBLISHED)[name]
    # Nothing else: results of other stages, or the text of train.log, would give the fault away.
    for path in ckpt.select_checkpoints(config.run_dir, "all"):
        shutil.copytree(path, run_dir / path.name)
    shutil.copy(Path(config.run_dir, "metrics.jsonl"), run_dir)
    shutil.copytree(config.data_dir, out / "data")
    edit(run_dir, **vars(config) | {"run_dir": str(run_dir), "data_dir": str(out / "data")})
    data, near = load_data(out / "data"), numbers[0] - 1 if numbers[0] else 1
    path, other, before = (run_dir / f"ckpt_{i:03d}" for i in (numbers[0], numbers[-1], near))
    claims = {p: ckpt.read_manifest(p) for p in ckpt.list_checkpoints(run_dir)}
    x = SimpleNamespace(
        config=load([str(run_dir)])[0], dir=run_dir, data=data, claims=claims, path=path,
        other=other, before=before, chunk=claims[path]["chunk"],
        held_out=data.validation(data.validation_sources[0]),
        random=np.random.default_rng([seed, 2024]),
        s=kind.strengths[0] if strength < 0 else strength)
    if name in WEIGHTS:
        mine, theirs = (dict(ckpt.read_tensors(each)) for each in (path, kind.source(x)))
        # Cloned, because the file is mapped, and written anew.
        (file,) = path.glob("model*.safetensors")  # of a run of one process
        ckpt.write_safetensors(file, [
            (key, (kind.change(a, theirs[key], x) if kind.only in key else a).clone())
            for key, a in mine.items()])
        shutil.rmtree(out / "elsewhere", ignore_errors=True)
    elif name in LOG:
        lines = kind.change(ckpt.read_records(run_dir / "metrics.jsonl"), x)
        ckpt.write_records(run_dir / "metrics.jsonl", lines)
    elif name in DATA | PLANTED:
        entry = data.manifest["chunks"][x.chunk]
        chunk = np.load(data.directory / entry["file"], mmap_mode="r+")
        n, batch = len(chunk), config.global_batch_size
        read = step_sequences(config.seed, x.chunk, n, 0, n // batch * batch)  # by any step at all
        numbers, ids = kind.change(chunk, x.random.permutation(read), x)
        chunk["token_ids"][numbers] = ids
        chunk.flush()
        entry["sha256"] = sha256_file(data.directory / entry["file"])
        write_json(data.directory / "manifest.json", data.manifest)
    elif name in FILES | PUBLISHED:
        kind.change(x)
    write_manifests(x)
    if name in TRAINING | PLANTED:
        retrain(x, kind.change if name in TRAINING else lambda x: [x.honest])


def write_manifests(x: SimpleNamespace) -> None:
    """Give each directory, whatever it holds now, its old claims and the hashes that fit them."""
    data, parent = load_data(x.data.directory), {}
    for path, manifest in x.claims.items():
        weights = {key: sha256(ckpt.raw_bytes(t)).hexdigest() for key, t in ckpt.read_tensors(path)}
        content = read_json(path / "manifest.json")  # it was moved together with the files
        manifest["history"]["data_sha256"] = data.sha256
        manifest |= {"data_sha256": data.sha256, "parent": parent,
                     "chunk_sha256": data.manifest["chunks"][manifest["chunk"]]["sha256"],
                     "tensors": content["tensors"] | weights,
                     "weights_sha256": sha256_json(weights),
                     "files": {file: sha256_file(path / file) if (path / file).exists() else old
                               for file, old in content["files"].items()}}  # some were dropped
        write_json(path / "manifest.json", manifest | {"sha256": sha256_json(manifest)})
        parent = {"checkpoint": path.name, "weights_sha256": manifest["weights_sha256"]}


def retrain(x: SimpleNamespace, change: Callable) -> None:
    """Train again from the chunk on, with train.py's own loop and a change in it."""
    for path in [*x.claims][[*x.claims].index(x.path) :]:
        shutil.rmtree(path)
    honest_step = train.train_step

    def train_step(run: train.Run, batch: train.Batch, lr: float) -> dict[str, Any]:
        first, n, x.step, x.total = *batch.visit[2:4], run.step, run.total_steps
        x.batch, x.lr, x.honest, x.i, x.n = batch, lr, (batch, lr), run.step - first, n
        x.last, x.adam = x.i == n - 1, run.optimizers[0].param_groups[0]  # one, without muP
        x.at = lambda i: (train.load_batch(run, (first + i) % run.total_steps), lr)
        for each in change(x) if x.path.name == f"ckpt_{batch.visit.number:03d}" else [x.honest]:
            record = honest_step(run, *each)
        return record | {"lr": lr}

    with patch.object(train, "train_step", train_step):
        train.main([str(x.dir)])
    (x.dir / "train.log").unlink()


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
    config, _ = load([str(args.run)])
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
