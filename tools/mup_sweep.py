"""Does the best learning rate stay where it is when the network gets wider? With muP and without.

    python prepare_data.py configs/crystal_tiny_stage1.py   # the data, if it is not there yet
    python tools/mup_sweep.py             # 23M tokens, minutes on idle cores; needs matplotlib
    python tools/mup_sweep.py --draw      # only the picture, from what was measured

Crystal's network in four widths is trained for 200 steps at each of some learning rates. One half
of the picture has base_hidden_size = 32, the other has the very same settings and
base_hidden_size = 0, which is no muP. At width 32 the two are the same network. Every run reads the
same sequences, at a constant rate after a short warm-up. Its result is the mean training loss of
the last 40 steps, in nats per token. Results go to runs/mup_sweep.jsonl, and what is there already
is not run again. The picture goes to docs/mup.png.
"""

import argparse
import math
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from checkpoint import append_record, read_records  # noqa: E402
from configs import Config, UserError, load, run_command  # noqa: E402
from data import chunk_schedule, load_data, step_sequences, step_to_visit  # noqa: E402
from model import LLaMA, choose_device  # noqa: E402

BASE, WIDTHS = 32, (32, 64, 128, 256)
RATES = [2.0**-k for k in (4, 5, 6, 7, 8, 9, 10, 11)]
STEPS, BATCH, LAST = 200, 16, 40
RESULTS = Path("runs/mup_sweep.jsonl")


def sweep() -> None:
    """Measure every cell (width, base, rate) that is not in RESULTS yet."""
    known = {(r["width"], r["base"], r["rate"]) for r in read_records(RESULTS)}
    for width in WIDTHS:
        for base in (BASE, 0):
            if width == BASE and base == 0:
                continue  # the same network as with base = BASE
            for rate in RATES:
                if (width, base, rate) not in known:
                    loss = train_and_measure(make_config(width, base), rate)
                    append_record(RESULTS, {"width": width, "base": base, "rate": rate,
                                            "loss": round(loss, 4)})


def make_config(width: int, base: int) -> Config:
    """The network of one width: always heads of 32 and two layers, so that only the width grows."""
    config, _ = load(["configs/crystal_tiny_stage1.py", f"--hidden_size={width}",
                      f"--intermediate_size={8 * width // 3}", f"--base_hidden_size={base}",
                      f"--num_attention_heads={width // 32}", "--num_hidden_layers=2",
                      "--rotary_dim=8"])
    return config


def train_and_measure(config: Config, rate: float) -> float:
    """Mean loss of the last steps of a run, infinite if it diverged."""
    data = load_data(config.data_dir)
    schedule = chunk_schedule(data.steps_per_chunk(BATCH), [])
    device, dtype = choose_device(config)
    net = LLaMA(config, dtype).to(device)
    net.init_weights(config.seed)
    optimizer = torch.optim.AdamW(net.parameter_groups(), betas=(0.9, 0.95), eps=1e-9,
                                  weight_decay=0.1, fused=True)
    losses = []
    for step in range(STEPS):
        visit, step_in_chunk = step_to_visit(schedule, step)
        sequences = data.chunk(visit.chunk)
        picked = step_sequences(config.seed, visit.chunk, len(sequences), step_in_chunk, BATCH)
        ids = torch.from_numpy(sequences["token_ids"][picked].astype("int64")).to(device)
        loss, _ = net(ids[:, :-1], ids[:, 1:])  # ids (B, T + 1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"] * min(1, (step + 1) / 20)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    mean = sum(losses[-LAST:]) / LAST
    return mean if math.isfinite(mean) else math.inf


def curve(results: list[dict], base: int, width: int) -> list[tuple[float, float]]:
    """(rate, loss) of one network, by rate; at the base width there is one network for both."""
    points = []
    for r in results:
        if r["width"] == width and (r["base"] == base or width == BASE):
            points.append((r["rate"], r["loss"]))
    return sorted(points)


def show(results: list[dict]) -> None:
    """The best rate of each network, and the loss at every rate."""
    for base in (BASE, 0):
        for width in WIDTHS:
            points = curve(results, base, width)
            best, loss = min(points, key=lambda point: point[1])
            print(f"base {base:>2} width {width:>4}: best rate 2^{math.log2(best):.0f}, loss"
                  f" {loss:.3f};", *(f"2^{math.log2(r):.0f} {x:.3f}" for r, x in points))


def draw(results: list[dict]) -> None:
    """docs/mup.png: loss against rate, a curve for each width, its best rate in a circle."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for panel, base, title in ((axes[0], BASE, f"with muP (base_hidden_size = {BASE})"),
                               (axes[1], 0, "without (base_hidden_size = 0)")):
        for width in WIDTHS:
            points = curve(results, base, width)
            line, = panel.plot(*zip(*points), marker=".", label=f"width {width}")
            best = min(points, key=lambda point: point[1])
            panel.plot(*best, "o", color=line.get_color(), fillstyle="none", markersize=9)
        panel.set(xscale="log", xlabel="learning rate", title=title)
        panel.set_xscale("log", base=2)
    # What diverged is above the picture.
    lowest = min(r["loss"] for r in results)
    axes[0].set(ylabel=f"loss after {STEPS} steps", ylim=(lowest - 0.1, lowest + 2.5))
    axes[0].legend(fontsize="small")
    figure.savefig("docs/mup.png", dpi=110)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="only the picture")
    only_draw = parser.parse_args(argv).draw
    os.chdir(ROOT)
    if not only_draw:
        sweep()
    results = read_records(RESULTS)
    if not results:
        raise UserError(f"{RESULTS} has no results to draw: run this without --draw first.")
    show(results)
    draw(results)


if __name__ == "__main__":
    run_command(main)
