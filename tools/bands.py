"""Did a run come out as it should? Its figures against those of the same run with other seeds.

tools/report.py says so. Its --seeds=10 makes the bands, docs/bands.json, for a config and its data.
"""

import math
import statistics
import subprocess
import sys
from pathlib import Path

from checkpoint import list_checkpoints, read_manifest
from configs import Config
from data import load_data, read_json, write_json
from eval import value
from tools.compare import aligned, mean, measured

ROOT = Path(__file__).parent.parent
BANDS = ROOT / "docs/bands.json"
# Half the width of a band, in standard deviations. With those of ten seeds, 3 honest runs of 1,000
# have a given figure outside of it (Student's t).
WIDTH = 4.0


def figures(run_dir: Path) -> dict[str, float]:
    """The figures of a run: of its last checkpoint, and of memorization.json."""
    found = {}
    for entry in measured(run_dir, list_checkpoints(run_dir)[-1:]):
        found |= {f"bits per byte of {name.removeprefix('validation ')}": value(result)
                  for name, result in entry["text"].items()}
        found |= {f"accuracy of {name}": value(result) for name, result in entry["tasks"].items()}
    effects = read_json(run_dir / "memorization.json").get("forgetting", {})
    return found | {f"loss at age {age}": effect["loss"] for age, effect in effects.items()}


def check(config: Config) -> str:
    """Whether every figure of a run lies in its band, in words; "" where none is expected."""
    run_dir, expected = Path(config.run_dir), read_json(BANDS).get(config.name, {})
    manifests = [read_manifest(path) for path in list_checkpoints(run_dir)[-1:]]
    if [m["data_sha256"] for m in manifests] != [expected.get("data_sha256")]:
        return ""  # no bands, or of other data
    outside, found = [], {name: x for name, x in figures(run_dir).items()
                          if name in expected["figures"]}
    for name, x in found.items():
        values = expected["figures"][name]
        # The mean of n runs has an error itself, which adds to the deviation of a new run.
        half = WIDTH * statistics.stdev(values) * math.sqrt(1 + 1 / len(values))
        low, high = statistics.fmean(values) - half, statistics.fmean(values) + half
        if not low <= x <= high:
            outside.append(f"  {name} is {x:.3f}, expected {low:.3f} to {high:.3f}.")
    if outside:
        return "\n".join([f"{run_dir} is NOT as expected:", *outside, "A setting, the arithmetic or"
                          " the order of the data differs: audit.py looks for the last two."])
    return "" if not found else (
        f"{run_dir} is as expected: {len(found)} of {len(found)} figures lie where"
        f" {expected['seeds']} runs with other seeds had them (docs/bands.json).")


def make(config: Config, config_file: str, n: int) -> None:
    """Train, evaluate and memorize n seeds, as far as that is not done; write their bands."""
    found = []
    for seed in range(1, n + 1):
        run = f"runs/bands/{config.name}/seed_{seed}"
        for stage, *flags in (["train.py"], ["eval.py"], ["memorize.py", "--sequences=100"]):
            words = [stage, config_file, f"--seed={seed}", f"--run_dir={run}", *flags]
            subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
        found.append(figures(ROOT / run))
    by_name = {name: [round(f[name], 5) for f in found] for name in found[0]}
    entry = {"seeds": n, "data_sha256": load_data(config.data_dir).sha256, "figures": by_name}
    write_json(BANDS, read_json(BANDS) | {config.name: entry})
    print(aligned([mean("variant", config.name, *item) for item in by_name.items()]))
