"""Kill a run again and again, and see that it ends with the same weights, bit for bit.

    python tools/kill_many.py [--kills=25]

A small run of two processes is trained once undisturbed. Then it is trained in another directory,
killed with SIGKILL at random instants, one process or both, often inside a save, and started again
each time. In the end every checkpoint of the two runs is compared: weights, optimizer, position.
"""

import argparse
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
from helpers import sentences  # noqa: E402
from test_train import CONFIG, assert_same_run, metrics  # noqa: E402

import prepare_data  # noqa: E402


def start(home: Path, run_dir: Path) -> subprocess.Popen:
    """A run in a session of its own, saving after every step."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "train.py", str(home / "mini.py"), f"--run_dir={run_dir}"],
        stdout=open(home / "log", "a"), stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"})


def kill(process: subprocess.Popen, draw: random.Random) -> str:
    """SIGKILL all processes, or one that trains and, when the other has noticed, the rest."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    pids = [int(pid) for pid in children.read_text().split()]
    victim = draw.choice(["all", *range(len(pids))])
    if victim != "all":
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.kill(pids[victim], signal.SIGKILL)
            process.wait(timeout=60)
    for pid in [process.pid, *pids]:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(os.getpgid(pid), signal.SIGKILL)
    process.wait()
    return f"process {victim}"


def finish(home: Path, run_dir: Path) -> None:
    if start(home, run_dir).wait() != 0:
        raise SystemExit((home / "log").read_text()[-2000:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25)
    kills, draw, inside, done = parser.parse_args().kills, random.Random(1), 0, 0
    home = Path(tempfile.mkdtemp(prefix="kill_many_"))  # it stays: a difference is to be looked at
    (home / "text.txt").write_text("\n".join(sentences(i, 60) for i in range(30)))
    (home / "mini.py").write_text(
        f"{CONFIG}\nn_chunks, sequences_per_chunk = 12, 40\ndata_dir = {str(home / 'data')!r}\n"
        f"sources = {{'text': {str(home / 'text.txt')!r}}}\n"
        "save_minutes, micro_batch_size = 1e-9, 2\n")
    prepare_data.main([str(home / "mini.py")])
    calm, killed = home / "calm", home / "killed"
    finish(home, calm)
    last = metrics(calm)[-1]["step"]
    while done < kills:
        process, before = start(home, killed), len(metrics(killed))
        # One step further at least, or the kills would never leave the beginning.
        wanted = before + 1 if before < last - 1 else 0
        while process.poll() is None and len(metrics(killed)) < wanted:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.06)
        if process.poll() is not None:
            break
        saving = [*killed.glob("*.tmp")] != []
        who = kill(process, draw)
        done, inside = done + 1, inside + saving
        print(f"kill {done}: {who}, after step {len(metrics(killed))} of {last}", flush=True)
    finish(home, killed)
    assert_same_run(calm, killed)
    print(f"{done} kills ({inside} inside a save): the runs are identical, bit for bit.")


if __name__ == "__main__":
    main()
