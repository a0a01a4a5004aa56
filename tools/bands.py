"""Did a run come out as it should? Its figures against those of the same run with other seeds.

    python tools/bands.py configs/amber_tiny.py               # as `make` does at its end
    python tools/bands.py configs/amber_tiny.py --seeds=10    # train ten seeds, and make the bands

The bands are in docs/bands.json, for the data whose sha256 stands beside them. On the machine that
made them, float32 instead of bfloat16 moves a figure by less than another seed does.
"""

import math
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import RESULT, list_checkpoints, read_records, weights_hash  # noqa: E402
from configs import Config, UserError, load, run_command  # noqa: E402
from data import load_data, read_json, write_json  # noqa: E402
from eval import by_checkpoint, value  # noqa: E402

BANDS = ROOT / "docs" / "bands.json"
# Half the width of a band, in standard deviations. Where these are known from ten seeds, 3 honest
# runs of 1,000 have a given figure outside of it (Student's t).
WIDTH = 4.0
# What may differ from the runs that the bands were made of.
FREE = """name data_dir run_dir seed workers device dtype kernels compile threads deterministic
    peak_tflops parallel shard_size reduce_dtype activation_checkpointing timeout_minutes
    micro_batch_size eval_interval eval_sequences sample_prompt sample_tokens resume init_from
    save_minutes keep_rolling keep_train_state task_dir tasks published""".split()
MEANING = {
    "bits per byte of": "arithmetic or order are not the usual ones; audit.py looks for it",
    "accuracy of": "these are few questions; bits per byte say more",
    "loss at age": "what was seen when is not as said; audit.py looks for it",
}


@dataclass
class Flags:
    """What this tool takes beside the settings."""

    seeds: int = 0  # train so many and make the bands of this config; 0 = check its run


def figures(run_dir: Path) -> dict[str, float]:
    """The figures of a run: of its last checkpoint, and of memorization.json."""
    checkpoints, found = list_checkpoints(run_dir), {}
    results = [r for r in read_records(run_dir / "eval.jsonl", RESULT) if checkpoints
               and r["of"].get("weights") == weights_hash(checkpoints[-1])]
    for entry in by_checkpoint(results):
        for name, result in entry["text"].items():
            if name.startswith("validation "):
                found[f"bits per byte of {name.removeprefix('validation ')}"] = value(result)
        for name, result in entry["tasks"].items():
            found[f"accuracy of {name}"] = value(result)
    memorization = read_json(run_dir / "memorization.json")
    for age, effect in memorization.get("forgetting", {}).items():
        found[f"loss at age {age}"] = effect["loss"]
    if not found:
        raise UserError(f"{run_dir} has no results of its last checkpoint: run eval.py (and"
                        " memorize.py) first.")
    return found


def decisive(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what a run comes to."""
    return {key: v for key, v in settings.items() if key not in FREE}


def check(config: Config, bands: dict[str, Any]) -> str:
    """Whether every figure of a run lies in its band, in words."""
    data = load_data(config.data_dir)
    if data.sha256 != bands["data_sha256"]:
        return (f"{config.data_dir} is not the data that docs/bands.json is about (its sha256 is"
                f" {data.sha256[:16]}, not {bands['data_sha256'][:16]}): nothing to compare with.")
    # What an older version did not record had its default.
    recorded = asdict(Config()) | read_json(Path(config.run_dir, "config.json"))
    other = [key for key in bands["settings"] if recorded.get(key) != bands["settings"][key]]
    if other:
        return f"{config.run_dir} has a {', '.join(other)} of its own: nothing to compare with."
    found, outside = figures(Path(config.run_dir)), []
    compared = [name for name in found if name in bands["figures"]]
    for name in compared:
        low, high = band(bands["figures"][name])
        if not low <= found[name] <= high:
            why = next(text for kind, text in MEANING.items() if name.startswith(kind))
            outside.append(f"  {name} is {found[name]:.3f}, expected {low:.3f} to {high:.3f}."
                           f" Usually: {why}.")
    if outside:
        return "\n".join([f"{config.run_dir} is NOT as expected:", *outside])
    return (f"{config.run_dir} is as expected: {len(compared)} of {len(compared)} figures lie where"
            f" {bands['seeds']} runs with other seeds had them (docs/bands.json).")


def band(values: list[float]) -> tuple[float, float]:
    """Where a figure is expected, given those of other seeds."""
    # The mean of n runs has an error itself, which a new run adds to its own deviation.
    half = WIDTH * statistics.stdev(values) * math.sqrt(1 + 1 / len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def make(config: Config, config_file: str, n: int) -> str:
    """Train, evaluate and memorize n seeds, or go on with that; write their figures."""
    runs = []
    for seed in range(1, n + 1):
        runs.append(f"runs/bands/{config.name}/seed_{seed}")
        words = [config_file, f"--seed={seed}", f"--run_dir={runs[-1]}"]
        for stage in ("train.py", "eval.py", "memorize.py"):
            more = ["--sequences=100"] if stage == "memorize.py" else []
            # What it has done already it does not do again.
            if subprocess.run([sys.executable, stage, *words, *more], cwd=ROOT).returncode:
                raise UserError(f"{stage} has failed for {runs[-1]}: the same command goes on.")
    found = [figures(ROOT / run) for run in runs]
    entry = {"seeds": n, "data_sha256": load_data(config.data_dir).sha256,
             "settings": decisive(asdict(config)),
             "figures": {name: [round(f[name], 5) for f in found] for name in found[0]}}
    write_json(BANDS, read_json(BANDS) | {config.name: entry})
    lines = []
    for name, values in entry["figures"].items():
        low, high = band(values)
        lines.append(f"{name:>32}: {statistics.fmean(values):7.3f} ±"
                     f" {statistics.stdev(values):.3f}, band {low:.3f} to {high:.3f}")
    return "\n".join([*lines, f"{BANDS} has the bands of {config.name}."])


def main(argv: list[str]) -> None:
    config, flags = load(argv, Flags)
    if flags.seeds == 1:
        raise UserError("--seeds=1: a spread needs two seeds or more.")
    if flags.seeds:
        print(make(config, next(word for word in argv if not word.startswith("-")), flags.seeds))
    elif config.name in (bands := read_json(BANDS)):
        print(check(config, bands[config.name]))
    else:
        print(f"docs/bands.json has no bands of {config.name}: --seeds=10 makes them.")


if __name__ == "__main__":
    run_command(main)
