"""Kill a run again and again and see that nothing comes of it: the same final weights, bit for bit.

    python tools/kill_many.py [--kills=50] [--processes=2] [--seed=1]

A small run of `--processes` (1: no torchrun) is trained once in peace. Then it is trained again in
another directory, killed with SIGKILL at random instants, one process or all of them, many of them
inside a save, and started again each time. In the end every kept checkpoint of the two runs is
compared: weights, optimizer, position. Prints what each kill met; exits with 1 if they differ.
"""

import argparse
import collections
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import torch  # noqa: E402
from helpers import sentences  # noqa: E402
from test_distributed import training_processes  # noqa: E402
from test_train import CONFIG, metrics, tensors  # noqa: E402

import prepare_data  # noqa: E402
from checkpoint import list_checkpoints  # noqa: E402


def start(home: Path, run_dir: Path, processes: int) -> subprocess.Popen:
    """A run in a session of its own, saving after every step."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [sys.executable, *launcher[: 0 if processes == 1 else None], "train.py",
         str(home / "mini.py"), f"--run_dir={run_dir}", "--save_minutes=1e-9",
         f"--micro_batch_size={4 // processes}"],
        stdout=open(home / "log", "a"), stderr=subprocess.STDOUT, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"})


def kill(process: subprocess.Popen, run_dir: Path, draw: random.Random) -> str:
    """SIGKILL all processes, or one that trains and, when the others have noticed, the rest."""
    pids = training_processes(run_dir)
    victim = draw.choice([None, *range(len(pids))])
    if victim is not None and len(pids) > 1:
        try:
            os.kill(pids[victim], signal.SIGKILL)
            process.wait(timeout=60)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            victim = None
    for pid in [process.pid, *pids]:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(os.getpgid(pid), signal.SIGKILL)
    process.wait()
    return "all" if victim is None or len(pids) < 2 else f"rank {victim}"


def checkpoints_of(run_dir: Path) -> list[str]:
    return [path.name for path in list_checkpoints(run_dir) if path.name.startswith("ckpt_")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("kills", 50), ("processes", 2), ("seed", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    a = parser.parse_args()
    draw, met = random.Random(a.seed), collections.Counter()
    home = Path(tempfile.mkdtemp(prefix="kill_many_"))
    (home / "text.txt").write_text("\n".join(sentences(i, 60) for i in range(30)))
    (home / "mini.py").write_text(
        CONFIG.replace("n_chunks, sequences_per_chunk, valid_sequences = 300, 32, 3, 50, 6",
                       "n_chunks, sequences_per_chunk, valid_sequences = 300, 32, 12, 40, 6")
        + f"sources = {{'text': {str(home / 'text.txt')!r}}}\ndata_dir = {str(home / 'data')!r}\n")
    prepare_data.main([str(home / "mini.py")])
    peace, war = home / "peace", home / "war"
    if start(home, peace, a.processes).wait() != 0:
        raise SystemExit((home / "log").read_text()[-2000:])
    last, done = metrics(peace)[-1]["step"], 0
    while done < a.kills:
        process, before = start(home, war, a.processes), len(metrics(war))
        # One step further at least, or fifty kills would never leave the beginning.
        wanted = before + 1 if done < last - 1 else 0
        while process.poll() is None and len(metrics(war)) < wanted:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.06)
        if process.poll() is not None:
            break
        halves = list(war.glob("*.tmp"))
        who = kill(process, war, draw)
        done, step = done + 1, len(metrics(war))
        met["inside a save"] += bool(halves)
        print(f"kill {done}: {who}, after step {step} of {last}"
              + ", inside a save" * bool(halves), flush=True)
    if start(home, war, a.processes).wait() != 0:
        raise SystemExit((home / "log").read_text()[-2000:])
    kept = checkpoints_of(peace)
    if kept != checkpoints_of(war):
        raise SystemExit(f"Not the same checkpoints: see {home}.")
    for name in kept:
        ours, theirs = tensors(peace / name), tensors(war / name)
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[k], theirs[k]) for k in ours):
            raise SystemExit(f"{name} is not the same: see {home}.")
    print(f"{done} kills ({met['inside a save']} inside a save), {a.processes} processes:"
          f" {len(kept)} checkpoints identical, bit for bit.")


if __name__ == "__main__":
    main()
