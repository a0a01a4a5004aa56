"""How often does audit.py find what tools/forge.py has planted, and how often what is not there?

    python tools/examine.py forged [--dtype=bfloat16] [--only=swapped,twice]
    python tools/examine.py honest [--dtype=bfloat16] [--only=epochs,publish]

`forged` trains configs/exam_tiny.py once and plants each kind of fault, in each of its strengths,
at the first, the middle and the last checkpoint. Where the checks find nothing, all is replayed.
`honest` makes the runs that docs/audit.md lists, and keeps them in examine/ for another time.
"""

import argparse
import contextlib
import functools
import io
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

import forge
import torch

import audit
import checkpoint as ckpt
import parallel
import prepare_data
import train
from configs import UserError, load, run_command

# Of all that is printed the tables alone are shown.
show = functools.partial(print, file=sys.stdout, flush=True)


def make(run_dir: Path, exam: list[str], text: str) -> None:
    """A step of an honest run: settings are trained, others are explained in docs/audit.md."""
    verb, *words = text.split()
    if verb == "copy":
        shutil.copytree(run_dir.with_name("run"), run_dir)
    elif verb == "without":
        for name in words:
            shutil.rmtree(run_dir / name)
    elif verb == "two":  # processes
        torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 train.py"
        subprocess.run([sys.executable, *torchrun.split(), *exam, f"--run_dir={run_dir}",
                        "--micro_batch_size=8", *words], check=True, capture_output=True)
    elif verb == "publish":  # weights, config and tokenizer, as others do
        for path in run_dir.glob("ckpt_*"):
            shutil.rmtree(path / "train_state")
        for path in [*run_dir.glob("*.json*"), *run_dir.glob("ckpt_*/manifest.json")]:
            path.unlink()
    elif verb != "foreign":
        honest, odd = train.clip_gradients, 50 if "skip_step" in text else -1
        with patch.object(train, "clip_gradients",
                          lambda run: honest(run) * (math.nan if run.step == odd else 1)):
            train.main([*exam, f"--run_dir={run_dir}", verb, *words])


def findings(run_dir: Path, exam: list[str], replay: bool = False) -> list[str]:
    """The sentences with which an audit ends."""
    words = [str(run_dir), *exam[1:]]
    if not (run_dir / "config.json").exists():  # it was published
        paths = map(str, sorted(run_dir.glob("ckpt_*")))
        words = [*exam, f"--run_dir={run_dir / 'audit'}", f"--checkpoints={','.join(paths)}"]
    try:
        audit.main([*words, "--replay=all"] if replay else words)
    except UserError as error:
        return str(error).splitlines()[1:] or [f"refused: {error}"]
    return []


def examine_forged(exam: list[str], home: Path, only: list[str]) -> None:
    """The table kind x strength x found by what x of how many."""
    out, config = home / "forged", load([str(home / "run")])[0]
    last = len(ckpt.list_checkpoints(home / "run")) - 1
    alone = [*forge.WEIGHTS, "swapped", *forge.PUBLISHED]
    show("| kind | strength | found | another accused | with replay | by |\n" + "|---" * 6 + "|")
    for kind in [*forge.KINDS, *(f"{name} (published)" for name in alone)]:
        name, _, published = kind.partition(" ")
        _, strengths, n_places, *_ = (forge.KINDS | forge.PUBLISHED)[name]
        for strength in strengths if name in only or not only else ():
            cases = [(0, last // 2 + 1), (last // 2, last - 1), (last, 1)][: 3 if n_places else 1]
            found, others, proven, checks = 0, 0, 0, Counter()
            for seed, case in enumerate(cases):
                shutil.rmtree(out, ignore_errors=True)
                places = [*map(str, case[:n_places])]
                forge.forge(config, out, [name, *places], seed, strength)
                if published:
                    make(out / "run", exam, "publish")
                words = [exam[0], f"--data_dir={out / 'data'}", *exam[2:]]
                sentences = findings(out / "run", words)
                found += bool(sentences)
                here = "|".join(rf"(ckpt_00|chunk ){place}\b" for place in places)
                others += any(re.match(rf"path: (?!.*({here}))", each) for each in sentences)
                if not sentences and not published:
                    sentences = findings(out / "run", words, replay=True)
                proven += bool(sentences)
                checks.update({sentence.partition(":")[0] for sentence in sentences})
            by = ", ".join(f"{check} {n}" for check, n in checks.most_common())
            show(f"| {kind} | {strength} | {found} of {len(cases)} | {others} | {proven} | {by} |")


def examine_honest(exam: list[str], home: Path, only: list[str]) -> None:
    """The honest runs, and what is found in each."""
    text, alarms = Path("docs/audit.md").read_text().partition("nothing wrong:\n\n")[2], 0
    lines = [line for line in re.split(r"\n? +\| |\n? {4}", text.partition("\n\n")[0])[1:]
             if not only or any(word in line for word in only)]
    for line in lines:
        run_dir = home / re.sub(r"\W+", "_", line)
        for text in line.split("; ") if not run_dir.exists() else ():
            make(run_dir, exam, text.replace("RUN", str(home / "run")))
        with contextlib.ExitStack() as stack:
            if "foreign" in line:
                stack.enter_context(patch.object(parallel, "tune_cpu",
                                                 lambda threads: torch.set_num_threads(2)))
                stack.enter_context(patch.multiple(
                    torch.cpu, _is_avx512_bf16_supported=bool, _is_amx_tile_supported=bool))
            sentences = findings(run_dir, exam)
        alarms += bool(sentences)
        show(f"{line}: {'; '.join(sentences) or 'nothing'}")
    show(f"{alarms} of {len(lines)} honest runs raise something.")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["forged", "honest"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", default="", help="kinds, or words of the lines of honest runs")
    args = parser.parse_args(argv)
    home, only = Path("examine", args.dtype), [*filter(None, args.only.split(","))]
    exam = ["configs/exam_tiny.py", "--data_dir=examine/data", f"--dtype={args.dtype}",
            "--n_chunks=6", "--sequences_per_chunk=320"]  # of 20 steps
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepare_data.main(exam)
        train.main([*exam, f"--run_dir={home / 'run'}"])
        (examine_forged if args.what == "forged" else examine_honest)(exam, home, only)


if __name__ == "__main__":
    run_command(main)
