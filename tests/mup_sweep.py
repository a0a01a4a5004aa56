"""Does the best learning rate stay put when the network gets wider? With muP and without.

    python tests/mup_sweep.py             # 23M tokens, minutes on idle cores; needs matplotlib
    python tests/mup_sweep.py --draw      # the picture again, from what was measured

Crystal's network in four widths, trained for 200 steps on the data of
configs/crystal_tiny_stage1.py at each of some learning rates; one half of the picture with
base_hidden_size = 32, one with the very same settings and base_hidden_size = 0. At width 32
the two are the same. Every run reads the same rows, at a constant rate after a short warm-up,
and its result is the mean training loss of the last 40 steps, in nats per token. Results go to
runs/mup_sweep.jsonl, and what is there already is not run again; the picture to docs/mup.png.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import prepare_data  # noqa: E402
import train  # noqa: E402
from configs import Config, load  # noqa: E402
from model import LLaMA  # noqa: E402

BASE, WIDTHS = 32, (32, 64, 128, 256)
RATES = [2.0**-k for k in (4, 5, 6, 7, 8, 9, 10, 11)]
STEPS, BATCH, LAST = 200, 16, 40
RESULTS = ROOT / "runs/mup_sweep.jsonl"


def setup(width: int, base: int) -> Config:
    config, _ = load([str(ROOT / "configs/crystal_tiny_stage1.py"), f"--hidden_size={width}",
                      f"--intermediate_size={8 * width // 3}", f"--base_hidden_size={base}",
                      f"--num_attention_heads={width // 32}", "--num_hidden_layers=2",
                      "--rotary_dim=8"])
    return config


def loss_after(config: Config, rate: float) -> float:
    """Mean loss of the last steps; every run reads the same rows in the same order."""
    manifest = prepare_data.load_manifest(config.data_dir)
    device, dtype = train.choose_device(config)
    net = LLaMA(config, dtype).to(device)
    net.init_weights(config.seed)
    optimizer = torch.optim.AdamW(net.parameter_groups(), betas=(0.9, 0.95), eps=1e-9,
                                  weight_decay=0.1, fused=True)
    losses = []
    for step in range(STEPS):
        chunk, at = prepare_data.locate(manifest, BATCH, step)
        rows = prepare_data.open_chunk(config.data_dir, manifest, chunk)
        picked = prepare_data.step_rows(config.seed, chunk, len(rows), at, BATCH)
        loss, _ = net(*train.to_tensors(rows[picked], device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"] * min(1, (step + 1) / 20)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    mean = sum(losses[-LAST:]) / LAST
    return mean if math.isfinite(mean) else math.inf


def draw(results: list[dict]) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for panel, base, title in ((axes[0], BASE, f"with muP (base_hidden_size = {BASE})"),
                               (axes[1], 0, "without (base_hidden_size = 0)")):
        for width in WIDTHS:
            curve = sorted((r["rate"], r["loss"]) for r in results
                           if r["width"] == width and (r["base"] == base or width == BASE))
            line, = panel.plot(*zip(*curve), marker=".", label=f"width {width}")
            best = min(curve, key=lambda point: point[1])
            panel.plot(*best, "o", color=line.get_color(), fillstyle="none", markersize=9)
        panel.set(xscale="log", xlabel="learning rate", title=title)
        panel.set_xscale("log", base=2)
    axes[0].set(ylabel=f"loss after {STEPS} steps", ylim=(
        min(r["loss"] for r in results) - 0.1, min(r["loss"] for r in results) + 2.5))
    axes[0].legend(fontsize="small")
    figure.savefig(ROOT / "docs/mup.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="only the picture")
    os.chdir(ROOT)
    only_draw = parser.parse_args().draw
    train.tune_cpu(int(os.environ.get("OMP_NUM_THREADS", 0)))
    RESULTS.parent.mkdir(exist_ok=True)
    for width in WIDTHS:
        for base in (BASE, 0)[: 1 if width == BASE else 2]:  # the same network at the base
            done = {r["rate"] for r in train.read_records(RESULTS)
                    if (r["width"], r["base"]) == (width, base)}
            for rate in RATES if not only_draw else []:
                if rate not in done:
                    loss = loss_after(setup(width, base), rate)
                    train.append_record(RESULTS, {"width": width, "base": base, "rate": rate,
                                                  "loss": round(loss, 4)})
    results = train.read_records(RESULTS)
    for base in (BASE, 0):
        for width in WIDTHS:
            curve = {r["rate"]: r["loss"] for r in results
                     if r["width"] == width and (r["base"] == base or width == BASE)}
            best = min(curve, key=curve.get)
            print(f"base {base:>2} width {width:>4}: best rate 2^{math.log2(best):.0f},"
                  f" loss {curve[best]:.3f};", json.dumps(
                      {f"2^{math.log2(r):.0f}": loss for r, loss in sorted(curve.items())}))
    draw(results)


if __name__ == "__main__":
    main()
