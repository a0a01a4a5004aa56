"""Did a run come out as it should? Its figures against those of the same run with other seeds.

    python tools/bands.py configs/amber_tiny.py               # as `make` does at its end
    python tools/bands.py configs/amber_tiny.py --seeds=10    # train ten seeds, and make the bands

The bands are in docs/bands.json, for the data whose sha256 is beside them, and for the config's
settings: a run with others may be outside.
"""

import math
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from checkpoint import list_checkpoints, read_manifest  # noqa: E402
from configs import Config, UserError, load, run_command  # noqa: E402
from data import load_data, read_json, write_json  # noqa: E402
from eval import value  # noqa: E402
from tools.compare import measured  # noqa: E402

BANDS = ROOT / "docs/bands.json"
# Half the width of a band, in standard deviations. With those of ten seeds, 3 honest runs of 1,000
# have a given figure outside of it (Student's t).
WIDTH = 4.0


@dataclass
class Flags:
    """What this tool takes beside the settings."""

    seeds: int = 0  # two or more: train so many, and make the bands of this config


def figures(run_dir: Path) -> dict[str, float]:
    """The figures of a run: of its last checkpoint, and of memorization.json."""
    found = {}
    for entry in measured(run_dir, list_checkpoints(run_dir)[-1:]):
        for name, result in entry["text"].items():
            # A text of --text has no such name, and "" is in no band.
            found[f"bits per byte of {name.partition('validation ')[2]}"] = value(result)
        for name, result in entry["tasks"].items():
            found[f"accuracy of {name}"] = value(result)
    if not found:
        raise UserError(f"{run_dir} has no results of its last checkpoint: run eval.py first.")
    for age, effect in read_json(run_dir / "memorization.json").get("forgetting", {}).items():
        found[f"loss at age {age}"] = effect["loss"]
    return found


def band(values: list[float]) -> tuple[float, float]:
    """Where a figure is expected, given those of other seeds."""
    # The mean of n runs has an error itself, which adds to the deviation of a new run.
    half = WIDTH * statistics.stdev(values) * math.sqrt(1 + 1 / len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def check(config: Config, bands: dict[str, Any]) -> str:
    """Whether every figure of a run lies in its band, in words."""
    run_dir, found, outside = config.run_dir, figures(Path(config.run_dir)), []
    data_sha256 = read_manifest(list_checkpoints(run_dir)[-1])["data_sha256"]
    if data_sha256 != bands["data_sha256"]:
        return f"{run_dir} was trained on other data than docs/bands.json is about: no comparison."
    compared = [name for name in found if name in bands["figures"]]
    for name in compared:
        low, high = band(bands["figures"][name])
        if not low <= found[name] <= high:
            outside.append(f"  {name} is {found[name]:.3f}, expected {low:.3f} to {high:.3f}.")
    if outside:
        return "\n".join([f"{run_dir} is NOT as expected:", *outside, "A setting, the arithmetic or"
                          " the order of the data differs: audit.py looks for the last two."])
    return (f"{run_dir} is as expected: {len(compared)} of {len(compared)} figures lie where"
            f" {bands['seeds']} runs with other seeds had them (docs/bands.json).")


def make(config: Config, config_file: str, n: int) -> None:
    """Train, evaluate and memorize n seeds, as far as that is not done; write their bands."""
    found = []
    for seed in range(1, n + 1):
        run = f"runs/bands/{config.name}/seed_{seed}"
        for stage, *flags in (["train.py"], ["eval.py"], ["memorize.py", "--sequences=100"]):
            words = [stage, config_file, f"--seed={seed}", f"--run_dir={run}", *flags]
            if subprocess.run([sys.executable, *words], cwd=ROOT).returncode:
                raise UserError(f"{stage} has failed for {run}: the same command goes on.")
        found.append(figures(ROOT / run))
    by_name = {name: [round(f[name], 5) for f in found] for name in found[0]}
    entry = {"seeds": n, "data_sha256": load_data(config.data_dir).sha256, "figures": by_name}
    write_json(BANDS, read_json(BANDS) | {config.name: entry})
    for name, values in by_name.items():
        print(f"{name:>32}: {statistics.fmean(values):7.3f} ± {statistics.stdev(values):.3f}")


def main(argv: list[str]) -> None:
    config, flags = load(argv, Flags)
    if flags.seeds > 1:
        make(config, next(word for word in argv if not word.startswith("-")), flags.seeds)
    elif bands := read_json(BANDS).get(config.name):
        print(check(config, bands))
    else:
        print(f"docs/bands.json has no bands of {config.name}: --seeds=10 makes them.")


if __name__ == "__main__":
    run_command(main)
