"""How often does audit.py find what tools/forge.py has planted, and how often what is not there?

    python tools/examine.py forged [--seeds=20] [--kinds=swapped,twice]    # kind x found by x of 20
    python tools/examine.py honest                                         # false alarms of 24 runs
    python tools/examine.py power configs/amber_tiny.py                    # by number of sequences

`forged` trains configs/exam_tiny.py once and plants each kind of fault `--seeds` times. Where the
checks find nothing, every chunk is replayed. `honest` trains runs that differ in seed, settings,
processes, interruptions and stage, and `power` draws sequences of a finished run again and again.
The tables are in docs/audit.md. Each command works in examine/.
"""

import argparse
import contextlib
import functools
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
import train
from configs import load, run_command
from data import load_data
from memorize import sequence_losses
from parallel import build_for_inference

HOME = Path("examine")
EXAM = ["configs/exam_tiny.py", f"--data_dir={HOME / 'data'}"]
# Of all that is printed the tables alone are shown.
show = functools.partial(print, file=sys.stdout, flush=True)


def examine_forged(seeds: int, kinds: list[str]) -> None:
    """The table kind x found by x of how many."""
    config, out = forge.run_config(HOME / "run"), HOME / "forged"
    for kind in kinds:
        found, checks = 0, Counter()
        for seed in range(seeds):
            shutil.rmtree(out, ignore_errors=True)
            forge.forge(config, out, forge.draw_fault(config, seed, kind), seed)
            forged, flags = load([str(out / "run")], audit.Flags)
            findings = audit.audit(forged, flags)[1] or audit.replay(forged, "all")
            found += bool(findings)
            checks.update({finding.partition(":")[0] for finding in findings})
        by = ", ".join(f"{check} {n}" for check, n in checks.most_common())
        show(f"| {kind} | {found} of {seeds} | {by} |")


# Runs with nothing wrong: the settings of the command that trains each, or of two commands.
TWO = "-m torch.distributed.run --standalone --nproc_per_node=2 train.py --micro_batch_size=8"
HONEST = {f"seed {seed}": [f"--seed={seed}"] for seed in range(1, 7)} | {
    "lower rate": ["--learning_rate=3e-3"], "higher rate": ["--learning_rate=2e-2"],
    "constant rate": ["--lr_schedule=constant"], "batch of 32": ["--global_batch_size=32"],
    "batch of 8": ["--global_batch_size=8 --micro_batch_size=8"],
    "no weight decay": ["--weight_decay=0"], "deeper": ["--num_hidden_layers=4"],
    "a chunk skipped": ["--skip_chunks=[3]"], "another beta": ["--adam_beta2=0.99"],
    "stopped and resumed": ["--max_steps=130", ""],
    "two processes": [TWO],
    "two then one": [f"{TWO} --max_steps=130", ""],
    "Crystal network": ["--norm=layernorm --bias=true --tie_word_embeddings=true --rotary_dim=16"
                        " --attention_scale_power=1 --base_hidden_size=16 --learning_rate=5e-3"],
    "second stage": [f"--init_from={HOME}/run/ckpt_007 --seed=9"],
    "another rate from step 130": ["--max_steps=130", "--learning_rate=4e-3"],
    "extended": ["", "--epochs=2"],
    "rate 0 at the end": ["--schedule_steps=230 --min_learning_rate=0"],
    "chunks of 5 steps": ["--global_batch_size=128 --micro_batch_size=128"]}


def examine_honest() -> None:
    """One line for each honest run, and what was found in it."""
    alarms = 0
    for name, commands in HONEST.items():
        run_dir = HOME / name.replace(" ", "_")
        for words in commands:
            processes, _, settings = words.rpartition("train.py")
            command = [sys.executable, *processes.split(), "train.py", *EXAM]
            subprocess.run([*command, f"--run_dir={run_dir}", *settings.split()], check=True,
                           capture_output=True)
        findings = audit.audit(*load([str(run_dir)], audit.Flags))[1]
        alarms += bool(findings)
        show(f"{name:>27}: {'; '.join(findings) or 'nothing'}")
    show(f"{alarms} of {len(HONEST)} honest runs raise something.")


def examine_power(config_file: str) -> None:
    """By the number of sequences of a chunk: how often is the chunk just trained the one that
    became easier most, and how far does it stand out?"""
    config, _ = load([config_file])
    data, model = load_data(config.data_dir), build_for_inference(config)
    paths = ckpt.select_checkpoints(config.run_dir, "all")
    numbers, random = range(len(data.manifest["chunks"])), np.random.default_rng(0)
    drawn = [random.choice(len(data.chunk(i)), 256, replace=False) for i in numbers]
    losses = []
    for path in paths:
        ckpt.load_weights(model, path)
        losses.append([sequence_losses(model, data.chunk(i)["token_ids"][drawn[i]], 64)
                       for i in numbers])
    change = np.diff(np.array(losses), axis=0)  # (checkpoints - 1, chunks, 256)
    own = np.array([ckpt.read_manifest(path)["chunk"] for path in paths[1:]])
    is_own = np.equal.outer(own, numbers)  # (checkpoints - 1, chunks)
    show("| sequences | right chunk is lowest | its mean z | false alarms |\n|---|---|---|---|")
    for n in (4, 8, 16, 32, 64, 128):
        right, z_own, alarms = [], [], []
        for _ in range(400):
            few = change[:, :, random.choice(256, n, replace=False)]
            trace = few.mean(2) - np.median(few.mean(2), axis=1, keepdims=True)
            error = few.std(2, ddof=1) / np.sqrt(n)
            right += (trace.argmin(1) == own).tolist()
            z_own += (-trace / error)[is_own].tolist()
            # What audit.check_losses takes for the trace of another chunk.
            limit = np.minimum(-4 * error, trace[is_own][:, None] / 2)
            alarms += (~is_own & (trace < limit)).any(1).tolist()
        show(f"| {n} | {np.mean(right):.1%} | {np.mean(z_own):.1f} | {np.sum(alarms)} of"
             f" {len(alarms):,} |")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["forged", "honest", "power"])
    parser.add_argument("config", nargs="?", default="configs/amber_tiny.py", help="for power")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--kinds", default=",".join(forge.KINDS))
    args = parser.parse_args(argv)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        if args.what == "power":
            return examine_power(args.config)
        prepare_data.main(EXAM)
        train.main([*EXAM, f"--run_dir={HOME / 'run'}"])
        if args.what == "forged":
            examine_forged(args.seeds, args.kinds.split(","))
        else:
            examine_honest()


if __name__ == "__main__":
    run_command(main)
