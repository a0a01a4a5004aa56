"""How often does audit.py find what tools/forge.py has planted, and how often what is not there?

    python tools/examine.py forged [--seeds=20] [--kinds=swapped,twice]    # kind x found by x of 20
    python tools/examine.py honest                                         # false alarms of 20 runs
    python tools/examine.py power configs/amber_tiny.py                    # by number of sequences

`forged` trains configs/exam_tiny.py once and plants each kind of fault `--seeds` times. Where the
checks find nothing, every chunk is replayed. `honest` trains 20 runs that differ in seed, settings,
processes, interruptions and stage, and `power` draws sequences of a finished run again and again.
The tables are in docs/audit.md. Each command works in examine/, and goes on where it was stopped.
"""

import argparse
import contextlib
import io
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import forge
import numpy as np

import audit
import checkpoint as ckpt
import prepare_data
import replay
import train
from configs import UserError, load, run_command
from data import load_data
from memorize import sequence_losses
from model import build_for_inference

ROOT = Path(__file__).parent.parent
HOME = Path("examine")
EXAM = str(ROOT / "configs/exam_tiny.py")


def quietly(work, *words):
    """work(*words) without what it prints, and without a bar."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return work(*words)


def base_run() -> Path:
    """configs/exam_tiny.py, trained once."""
    words = [EXAM, f"--data_dir={HOME / 'data'}", f"--run_dir={HOME / 'run'}"]
    quietly(prepare_data.main, words)
    quietly(train.main, words)
    return HOME / "run"


def audited(words: list[str]) -> list[dict[str, str]]:
    """The findings of an audit."""
    config, flags = load(words, audit.Flags)
    return quietly(audit.audit, config, flags).findings


def found_by(run_dir: Path, data_dir: Path) -> tuple[list[str], list[str]]:
    """The checks that find something in a forged run, and their sentences."""
    words = [EXAM, f"--run_dir={run_dir}", f"--data_dir={data_dir}"]
    findings = audited(words)
    if findings:
        return sorted({f["check"] for f in findings}), [f["sentence"] for f in findings]
    try:
        quietly(replay.replay_all, load(words)[0], "all")
    except UserError as error:
        return ["replay"], [str(error)]
    return [], []


def examine_forged(seeds: int, kinds: list[str]) -> None:
    """The table kind x found by x of how many."""
    run, results = base_run(), HOME / "forged.jsonl"
    done = {(r["kind"], r["seed"]): r for r in ckpt.read_records(results)}
    for kind in kinds:
        for seed in range(seeds):
            if (kind, seed) not in done:
                config = forge.run_config(run)
                fault = forge.draw_fault(config, seed, kind)
                out = HOME / f"forged_{kind}"
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()
                quietly(forge.forge, config, out, fault, seed)
                checks, sentences = found_by(out / "run", out / "data")
                shutil.rmtree(out)
                done[kind, seed] = {"kind": kind, "seed": seed, "fault": fault, "checks": checks,
                                    "sentences": sentences}
                ckpt.append_record(results, done[kind, seed])
        mine = [done[kind, seed] for seed in range(seeds)]
        counts = Counter(check for record in mine for check in record["checks"])
        by = ", ".join(f"{check} {n}" for check, n in counts.most_common())
        print(f"| {kind} | {sum(bool(r['checks']) for r in mine)} of {seeds} | {by} |", flush=True)


def honest_runs() -> dict[str, list[str]]:
    """Settings of 20 runs with nothing wrong; the words that are no settings say how to train."""
    runs = {f"seed {seed}": [f"--seed={seed}"] for seed in range(1, 7)}
    runs |= {"lower rate": ["--learning_rate=3e-3"], "higher rate": ["--learning_rate=2e-2"],
             "constant rate": ["--lr_schedule=constant"], "batch of 32": ["--global_batch_size=32"],
             "batch of 8": ["--global_batch_size=8", "--micro_batch_size=8"],
             "no weight decay": ["--weight_decay=0"], "deeper": ["--num_hidden_layers=4"],
             "a chunk skipped": ["--skip_chunks=[3]"], "another beta": ["--adam_beta2=0.99"],
             "stopped and resumed": ["resumed"], "two processes": ["2 processes"],
             "two, then one": ["resumed", "2 processes"],
             "Crystal's network": [
                 "--norm=layernorm", "--bias=true", "--tie_word_embeddings=true", "--rotary_dim=16",
                 "--attention_scale_power=1", "--base_hidden_size=16", "--learning_rate=5e-3"],
             "second stage": ["--init_from=" + str(HOME / "run/ckpt_007"), "--seed=9"]}
    return runs


def examine_honest() -> None:
    """One line for each honest run, and what was found in it."""
    base_run()
    alarms = 0
    for name, words in honest_runs().items():
        run = HOME / name.translate({ord(c): None for c in " ,'"})
        settings = [EXAM, f"--data_dir={HOME / 'data'}", f"--run_dir={run}",
                    *(word for word in words if word.startswith("-"))]
        python = [sys.executable, str(ROOT / "train.py")]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node=2", str(ROOT / "train.py")]
        first = torchrun if "2 processes" in words else python
        first_settings = [*settings, *(["--micro_batch_size=8"] if first is torchrun else [])]
        if "resumed" in words:
            command([*first, *first_settings, "--max_steps=130"])
            command([*python, *settings])
        else:
            command([*first, *first_settings])
        findings = audited(settings)
        alarms += bool(findings)
        print(f"{name:>20}: {'; '.join(f['sentence'] for f in findings) or 'nothing'}", flush=True)
    print(f"{alarms} of {len(honest_runs())} honest runs raise something.")


def command(words: list[str]) -> None:
    """Run a command; UserError with what it said if it fails."""
    process = subprocess.run(words, capture_output=True, text=True)
    if process.returncode:
        raise UserError(f"{' '.join(words)} failed: {process.stdout}{process.stderr}")


def examine_power(config_file: str, pool: int = 256, draws: int = 400) -> None:
    """By the number of sequences of a chunk: how often is the chunk just trained the one that
    became easier most, and how far does it stand out?"""
    config, _ = load([config_file])
    data, model = load_data(config.data_dir), build_for_inference(config)
    paths = [p for p in ckpt.list_checkpoints(config.run_dir) if p.name.startswith("ckpt_")]
    numbers, random = range(len(data.manifest["chunks"])), np.random.default_rng(0)
    drawn = [random.choice(len(data.chunk(i)), pool, replace=False) for i in numbers]
    losses = []
    for path in paths:
        ckpt.load_weights(model, path)
        losses.append([sequence_losses(model, data.chunk(i)["token_ids"][drawn[i]], 64)
                       for i in numbers])
        print(f"{path.name} measured", file=sys.stderr)
    change = np.diff(np.array(losses), axis=0)  # (checkpoints - 1, chunks, pool)
    own = np.array([ckpt.read_manifest(path)["chunk"] for path in paths[1:]])
    print("| sequences | right chunk is lowest | its mean z | false alarms |\n|---|---|---|---|")
    for n in (4, 8, 16, 32, 64, 128):
        right, z_own, alarms = [], [], []
        for _ in range(draws):
            few = change[:, :, random.choice(pool, n, replace=False)]
            trace = few.mean(2) - np.median(few.mean(2), axis=1, keepdims=True)
            error = few.std(2, ddof=1) / np.sqrt(n)
            rows = np.arange(len(own))
            right += (trace.argmin(1) == own).tolist()
            z_own += (-trace / error)[rows, own].tolist()
            # What audit.check_losses takes for the trace of another chunk.
            limit = np.minimum(-4 * error, trace[rows, own, None] / 2)
            trace[rows, own] = 0
            alarms += (trace < limit).any(1).tolist()
        print(f"| {n} | {np.mean(right):.1%} | {np.mean(z_own):.1f} | {np.sum(alarms)} of"
              f" {len(alarms):,} |", flush=True)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["forged", "honest", "power"])
    parser.add_argument("config", nargs="?", default="configs/amber_tiny.py", help="for power")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--kinds", default=",".join(forge.KINDS))
    args = parser.parse_args(argv)
    HOME.mkdir(exist_ok=True)
    if args.what == "forged":
        examine_forged(args.seeds, args.kinds.split(","))
    elif args.what == "honest":
        examine_honest()
    else:
        examine_power(args.config)


if __name__ == "__main__":
    run_command(main)
