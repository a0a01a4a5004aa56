"""Does the best learning rate stay where it is when the network gets wider? With muP and without.

    python prepare_data.py configs/crystal_tiny_stage1.py   # the data, if it is not there yet
    python tools/mup_sweep.py             # 23M tokens, minutes on idle cores; needs matplotlib

Crystal's network in four widths is trained for 200 steps at each of some learning rates. One half
of the picture has base_hidden_size = 32, the other has the very same settings and
base_hidden_size = 0, which is no muP. At width 32 the two are the same network. Every run reads the
same sequences, at a constant rate after a short warm-up. Its result is the mean training loss of
the last 40 steps, in nats per token. Results go to runs/mup_sweep.jsonl, and what is there already
is not run again. The picture goes to docs/mup.png.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train  # noqa: E402
from checkpoint import append_record, read_records  # noqa: E402
from configs import UserError, load, run_command  # noqa: E402

BASE, WIDTHS = 32, (32, 64, 128, 256)
RATES = [2.0**-k for k in (4, 5, 6, 7, 8, 9, 10, 11)]
STEPS, LAST = 200, 40
NETWORKS = [(base, width) for base in (BASE, 0) for width in WIDTHS]
RESULTS = Path("runs/mup_sweep.jsonl")


def measure(base: int, width: int, rate: float) -> float:
    """Mean loss of the last steps of a network, infinite if it diverged."""
    # Always heads of 32 and two layers, so that only the width grows.
    config, _ = load(["configs/crystal_tiny_stage1.py", f"--base_hidden_size={base}",
                      f"--hidden_size={width}", f"--intermediate_size={8 * width // 3}",
                      f"--num_attention_heads={width // 32}", "--num_hidden_layers=2",
                      "--rotary_dim=8"])
    run = train.start(config)
    train.begin(run, None)
    losses = []
    for step in range(STEPS):
        record = train.train_step(run, train.load_batch(run, step), rate * min(1, (step + 1) / 20))
        if "loss" not in record:  # it was not finite
            return math.inf
        losses.append(record["loss"])
    return sum(losses[-LAST:]) / LAST


def draw(results: list[dict]) -> None:
    """Print the losses; docs/mup.png: loss against rate, a curve for each width, its best rate in
    a circle."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for base, width in NETWORKS:
        points = sorted((r["rate"], r["loss"]) for r in results
                        if r["width"] == width and (r["base"] == base or width == BASE))
        best = min(points, key=lambda point: point[1])
        print(f"base {base:>2} width {width:>4}: best rate 2^{math.log2(best[0]):.0f}, loss"
              f" {best[1]:.3f};", *(f"2^{math.log2(rate):.0f} {loss:.3f}" for rate, loss in points))
        half = axes[0 if base else 1]
        line, = half.plot(*zip(*points), marker=".", label=f"width {width}")
        half.plot(*best, "o", color=line.get_color(), fillstyle="none", markersize=9)
    for half, title in zip(axes, (f"with muP (base_hidden_size = {BASE})",
                                  "without (base_hidden_size = 0)")):
        half.set(xlabel="learning rate", title=title)
        half.set_xscale("log", base=2)
    # The losses of runs that diverged lie above the picture.
    lowest = min(r["loss"] for r in results)
    axes[0].set(ylabel=f"loss after {STEPS} steps", ylim=(lowest - 0.1, lowest + 2.5))
    axes[0].legend(fontsize="small")
    figure.savefig("docs/mup.png", dpi=110)


def main(argv: list[str]) -> None:
    """Measure every network at every rate that is not in RESULTS yet, and draw."""
    if argv:
        raise UserError(__doc__)
    known = {(r["base"], r["width"], r["rate"]) for r in read_records(RESULTS)}
    for base, width in NETWORKS:
        for rate in RATES:
            # At the base width there is one network for both halves of the picture.
            if (base or width != BASE) and (base, width, rate) not in known:
                append_record(RESULTS, {"width": width, "base": base, "rate": rate,
                                        "loss": round(measure(base, width, rate), 4)})
    draw(read_records(RESULTS))


if __name__ == "__main__":
    run_command(main)
