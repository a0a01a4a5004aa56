"""Random sequences planted in a data set: how often must a text be seen to be memorized, and when?

    python tools/canaries.py plant data/amber_tiny data/amber_tiny_canaries
    python train.py configs/amber_tiny.py --data_dir=data/amber_tiny_canaries \\
        --run_dir=runs/amber_tiny_canaries
    python tools/canaries.py measure runs/amber_tiny_canaries

`plant` copies a prepared data set and adds the sequences to the chunks of the copy, as a source
called "canary". `measure` prints for each number of copies what a checkpoint knows of them.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from checkpoint import load_run, select_checkpoints  # noqa: E402
from configs import UserError, load, regular, run_command  # noqa: E402
from data import Data, load_data, sha256_file, write_json  # noqa: E402
from memorize import measure  # noqa: E402

# Copies of a sequence -> different sequences with so many: 900 in all, 90 a chunk of amber_tiny.
CANARIES = {1: 30, 2: 27, 4: 24, 8: 18, 16: 12, 32: 6, 64: 3}
THIRDS = ("early", "middle", "late")  # of the chunks
N_CONTROLS = 1023  # random sequences that are nowhere in the data: exposure ends at 10 bits


@dataclass
class Flags:
    """What `measure` takes beside the settings."""

    checkpoints: str = "last"  # "last", "7", "0,4,9", "all" or paths
    k: int = 32  # tokens of the prompt
    l: int = 32  # tokens after it that are compared
    batch: int = 250  # sequences in memory at a time


def plant(old: Path, new: Path) -> None:
    """Write the data set `new`: `old` with canaries."""
    data = load_data(old)
    if "canary" in data.sources or new.exists():
        raise UserError(f"{old} has a source called canary already, or {new} exists already.")
    manifest, n_chunks, width = data.manifest, len(data.manifest["chunks"]), data.seq_len + 1
    seed, n_different = manifest["seed"], sum(CANARIES.values())
    # Nobody can guess random ids: what a model knows of them it has memorized.
    random = np.random.default_rng([seed, 0, 64])
    different = random.integers(manifest["settings"]["vocab_size"], size=(n_different, width))
    copies = np.repeat(np.arange(n_different), np.repeat([*CANARIES], [*CANARIES.values()]))
    per_chunk = len(copies) // n_chunks
    copies = np.random.default_rng([seed, 1, 64]).permutation(copies)[: per_chunk * n_chunks]
    # Each in one third of the chunks: is a text seen early remembered at the end?
    by_third = copies[np.argsort(copies % 3, kind="stable")].reshape(n_chunks, per_chunk)
    for name in [*(file["file"] for file in data.files), "tokenizer_config.json"]:
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(regular(old / name), new / name)
    for i, entry in enumerate(manifest["chunks"]):
        chunk, path = data.chunk(i), new / entry["file"]
        canaries = [(len(data.sources), number, different[number]) for number in by_third[i]]
        np.save(path, np.concatenate([chunk, np.array(canaries, chunk.dtype)]))
        entry |= {"sequences": len(chunk) + per_chunk, "sha256": sha256_file(path)}
        entry["sources"]["canary"] = per_chunk
    manifest["sources"].append({"name": "canary", "sequences": copies.size, "valid_sequences": 0,
                                "train_sequences": copies.size, "tokens": copies.size * width})
    write_json(new / "manifest.json", manifest | {"canaries": CANARIES})


def planted(data: Data) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The different canaries (R, T + 1), the copies of each (R,), and the third of the chunks that
    has its last copy, 0 ... 2 (R,)."""
    number, n_chunks = data.sources.index("canary"), len(data.manifest["chunks"])
    chunks = [data.chunk(i) for i in range(n_chunks)]
    found = [chunk[chunk["source"] == number] for chunk in chunks]
    ids = np.concatenate([canaries["token_ids"] for canaries in found])
    ids, which, times = np.unique(ids, axis=0, return_inverse=True, return_counts=True)
    last = np.zeros(len(ids), int)
    np.maximum.at(last, which.ravel(), np.repeat(np.arange(n_chunks), [*map(len, found)]))
    return ids.astype(np.int64), times, 3 * last // n_chunks


def main(argv: list[str]) -> None:
    if argv[:1] == ["plant"] and len(argv) == 3:
        return plant(Path(argv[1]), Path(argv[2]))
    if argv[:1] != ["measure"]:
        raise UserError("Write `plant DATA NEW_DATA` or `measure RUN`: see tools/canaries.py.")
    config, flags = load(argv[1:], Flags)
    data = load_data(config.data_dir)
    if "canaries" not in data.manifest:
        raise UserError(f"{config.data_dir} has no canaries: python tools/canaries.py plant first.")
    ids, times, third = planted(data)
    random = np.random.default_rng(config.seed)
    controls = random.integers(config.vocab_size, size=(N_CONTROLS, data.seq_len + 1))
    ids = np.concatenate([controls, ids])
    times, third = np.pad(times, (N_CONTROLS, 0)), np.pad(third, (N_CONTROLS, 0))
    for path in select_checkpoints(config.run_dir, flags.checkpoints):
        model, _ = load_run(path, device=config.device, dtype=config.dtype, kernels=config.kernels)
        result = measure(ids, flags, model)
        score, loss = np.array(result["matches"]) / flags.l, np.array(result["loss"])
        # Exposure (Carlini et al. 2019): bits by which a rank among the unseen beats the last one.
        rank = 1 + np.searchsorted(np.sort(loss[:N_CONTROLS]), loss)
        exposure = np.log2((N_CONTROLS + 1) / rank)
        print(f"{path.name}\ncopies  last seen  different  score %   loss  exposure, bits")
        for n, i in np.unique(np.stack([times, third]), axis=1).T:
            chosen = (times == n) & (third == i)
            print(f"{n:>6}  {THIRDS[i] if n else '':<9}  {chosen.sum():>9}"
                  f"  {100 * score[chosen].mean():>7.1f}  {loss[chosen].mean():>5.2f}"
                  f"  {exposure[chosen].mean():>14.1f}")


if __name__ == "__main__":
    run_command(main)
