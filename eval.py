"""Measure the checkpoints of a run on the rows held out of its data, and report.

    python eval.py configs/amber_tiny.py                         # every checkpoint not yet measured
    python eval.py configs/amber_tiny.py --checkpoints=last      # or =7, =0,4,9, or a path
    python eval.py configs/amber_tiny.py --prompt="def main("    # text from the newest checkpoint

Results are appended to runs/NAME/eval.jsonl, one line per checkpoint, as they come; with matplotlib
installed the curves are drawn to runs/NAME/curves.png, and those of a run that goes on from
another (Crystal's stages) together with that one's to runs/NAME/stages.png.
"""

import math
import statistics
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

import prepare_data
import train
from configs import Config, load
from model import LLaMA


def chosen(run_dir: str, which: str) -> list[Path]:
    """The checkpoints `which` names: "all" (one per chunk), "last", "7", "0,4,9", or a path.

    A path may be one of a Hugging Face directory (config.json and weights).
    """
    found = train.checkpoints(run_dir)
    kept = [p for p in found if p.name.startswith("ckpt_")]
    if which == "all":
        paths = kept or found[-1:]
    elif which == "last":
        paths = found[-1:]
    elif all(part.isdecimal() for part in which.split(",")):
        paths = [Path(run_dir) / f"ckpt_{int(part):03d}" for part in which.split(",")]
    else:
        paths = [Path(which)]
    for path in paths:
        if not ((path / "manifest.json").exists() or train.is_hugging_face(path)):
            names = ", ".join(p.name for p in found) or "none"
            raise SystemExit(f"There is no checkpoint {path}; {run_dir} has: {names}.")
    if not paths:
        raise SystemExit(f"{run_dir} has no checkpoint yet: run train.py with this config first.")
    return paths


def build(config: Config) -> LLaMA:
    """The model of a config on its device, weights not yet filled."""
    train.tune_cpu(config.threads)
    device, dtype = train.choose_device(config)
    return LLaMA(config, dtype).to(device)


def measure(config: Config, model: LLaMA, paths: list[Path]) -> list[dict[str, Any]]:
    """Every result of eval.jsonl, after appending those of the checkpoints it does not have yet."""
    file = Path(config.run_dir) / "eval.jsonl"
    results = train.read_records(file)
    data = train.data_sha256(config.data_dir)
    # A result belongs to the weights and the data, not to a name that may be trained anew.
    key = {path: {"weights": train.identity(path), "data": data} for path in paths}
    todo = [path for path in paths if not any(r["of"] == key[path] for r in results)]
    for path in tqdm(todo, desc="evaluating", unit="checkpoint", disable=None):
        if problem := train.problem_of(path, ("model",)):
            tqdm.write(f"Skipping {path}: {problem}.")
            continue
        manifest = train.load_weights(model, path)
        result = {"checkpoint": path.name, "step": manifest["step"], "tokens": manifest["tokens"],
                  "valid": train.validate(model, config.data_dir, None, config.micro_batch_size),
                  "dtype": str(model.dtype)[6:], "of": key[path]}
        results.append(result)
        train.append_record(file, result)
    wanted = [key[path] for path in paths]
    return sorted((r for r in results if r["of"] in wanted), key=lambda r: r["step"] or math.inf)


def table(results: list[dict[str, Any]]) -> str:
    """Bits per byte, a row per checkpoint, a column per source."""
    names = list(results[-1]["valid"])
    head = f"{'checkpoint':>14} {'tokens':>15}" + "".join(f"{n[:13]:>14}" for n in names)
    rows = [f"{r['checkpoint']:>14} {r['tokens'] or 0:>15,}"
            + "".join(f"{r['valid'][n]['bits_per_byte']:>14.3f}" for n in names) for r in results]
    return "\n".join(["bits per byte of the held-out rows", head, *rows])


def report(config: Config, results: list[dict[str, Any]], text: str, file: str) -> str:
    """What a run came to, and what to type next."""
    records = train.read_records(Path(config.run_dir) / "metrics.jsonl")
    manifest, last = prepare_data.load_manifest(config.data_dir), results[-1]
    rows = {"run": f"{config.run_dir}, {last['checkpoint']}, step {last['step']},"
                   f" {last['tokens'] or 0:,} tokens, {config.n_params:,} parameters",
            "data": f"{config.data_dir}, {len(manifest['chunks'])} chunks"}
    if records:
        rows["training"] = (
            f"loss {statistics.fmean(r['loss'] for r in records[-20:]):.3f} (last 20 steps),"
            f" {statistics.median(r['tokens_per_s'] for r in records):,.0f} tokens/s (median)")
    for name, v in last["valid"].items():
        rows[f"held-out {name}"] = f"loss {v['loss']:.3f}, {v['bits_per_byte']:.3f} bits per byte"
    rows["sample"] = repr(text)
    lines = "\n".join(f"{key:>24}: {value}" for key, value in rows.items())
    return f"""{lines}
Next:
  python eval.py {file} --prompt="import "       # text from this model
  python prepare_data.py {file} --show_step=100  # the rows step 100 learned from
  python train.py {file} --learning_rate=1e-3 --run_dir=runs/lower_rate  # a first ablation"""


def draw(run_dir: str, results: list[dict[str, Any]]) -> Path | None:
    """Training loss and held-out bits per byte over tokens, if matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    records = train.read_records(Path(run_dir) / "metrics.jsonl")
    path = Path(run_dir) / "curves.png"
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    tokens = [r["tokens"] / 1e6 for r in records]
    for name in results[-1]["valid"]:
        points = [(t, r["loss_by_source"][name]) for t, r in zip(tokens, records)
                  if name in r["loss_by_source"]]
        x, y = zip(*smooth(points, 20)) if points else ((), ())
        left.plot(x, y, linewidth=1, label=name)
        right.plot([(r["tokens"] or 0) / 1e6 for r in results],
                   [r["valid"][name]["bits_per_byte"] for r in results], marker=".", label=name)
    left.set(xlabel="tokens, millions", ylabel="loss, nats per token", title="training")
    right.set(xlabel="tokens, millions", ylabel="bits per byte", title="held-out rows")
    right.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def stages(run_dir: str) -> list[tuple[Path, int]]:
    """A run and those it goes on from, oldest first: (directory, tokens seen before it began).

    As the newest checkpoint of each tells in `started_from`; a chain ends where no run is.
    """
    runs, before = [Path(run_dir)], []
    while found := train.checkpoints(runs[0]):
        origin = train.read_json(found[-1] / "manifest.json").get("started_from", {})
        before.insert(0, origin.get("tokens") or 0)
        if not origin or Path(origin["path"]).parent in runs:
            break
        runs.insert(0, Path(origin["path"]).parent)
    runs = runs[len(runs) - len(before) :]
    return [(run, sum(before[: i + 1])) for i, run in enumerate(runs)]


def draw_stages(runs: list[tuple[Path, int]]) -> Path:
    """Bits per byte over the tokens of all stages, a panel per source (needs matplotlib)."""
    from matplotlib import pyplot
    curves: list[list[tuple[float, dict[str, Any]]]] = []
    for run, before in runs:
        results = train.read_records(run / "eval.jsonl")
        now = {p.name: train.identity(p) for p in train.checkpoints(run)}
        points = [((before + r["tokens"]) / 1e6, r["valid"]) for r in results
                  if r["tokens"] and now.get(r["checkpoint"]) == r["of"]["weights"]]
        begun = [p for curve in curves for p in curve if p[0] == before / 1e6][-1:]
        curves.append(begun + sorted(points, key=lambda p: p[0]))
    names = list(curves[-1][-1][1])
    figure, axes = pyplot.subplots(1, len(names), figsize=(1 + 1.9 * len(names), 2.8),
                                   layout="constrained", squeeze=False)
    for name, panel in zip(names, axes[0]):
        for (run, _), curve in zip(runs, curves):
            known = [(x, valid[name]["bits_per_byte"]) for x, valid in curve if name in valid]
            x, y = zip(*known) if known else ((), ())
            panel.plot(x, y, marker=".", label=run.name)
        panel.set(title=name)
    axes[0][0].set(xlabel="tokens, millions", ylabel="bits per byte")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=len(runs), fontsize="small")
    path = runs[-1][0] / "stages.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def smooth(points: list[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Means of `window` neighbouring points."""
    groups = [points[i : i + window] for i in range(0, len(points), window)]
    return [tuple(map(statistics.fmean, zip(*group))) for group in groups]


def main(argv: list[str]) -> None:
    config, flags = load(argv, checkpoints="all", prompt="", tokens=64, temperature=0.8)
    train.choose_kernels(config.kernels)
    if flags["prompt"]:
        which = "last" if flags["checkpoints"] == "all" else flags["checkpoints"]
        model = build(config)
        train.load_weights(model, chosen(config.run_dir, which)[-1])
        print(train.continue_text(config, model, flags["prompt"], flags["tokens"],
                                  flags["temperature"]))
        return
    paths = chosen(config.run_dir, flags["checkpoints"])
    model = build(config)
    results = measure(config, model, paths)
    if not results:
        raise SystemExit(f"None of the checkpoints of {config.run_dir} could be measured.")
    print(table(results), end="\n\n")
    train.load_weights(model, paths[-1])
    text = train.continue_text(config, model, config.sample_prompt, flags["tokens"],
                               flags["temperature"])
    print(report(config, results, text, next(a for a in argv if not a.startswith("-"))))
    if picture := draw(config.run_dir, results):
        print(f"Curves: {picture}")
        if len(runs := stages(config.run_dir)) > 1:
            print(f"Stages: {draw_stages(runs)}")


if __name__ == "__main__":
    main(sys.argv[1:])
