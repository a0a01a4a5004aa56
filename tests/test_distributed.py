"""Several processes: the run of one, whatever fails.

The tests start processes on this very file, which runs the jobs it is given (a list of
{"argv": ..., "nan": ...}) one after the other: starting costs the most. One test is torchrun's own.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import ranks
from test_train import argv, assert_same_run, home, metrics, run, straight, tensors

import audit
import checkpoint as ckpt
import parallel
import train
from configs import UserError, load, run_command
from data import load_data, step_sequences
from model import LLaMA

__all__ = ["home", "straight"]  # fixtures
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
LONG = 240  # seconds, for machines with other work to do


def launch(n: int, home: Path, jobs: list[dict[str, Any]]) -> list[str]:
    """Run jobs in n processes; returns what ended each, "" if nothing did."""
    work = home / f"jobs{n}.json"
    work.write_text(json.dumps(jobs))
    texts, codes = [], []
    for process in ranks(n, "tests/test_distributed.py", work, OMP_NUM_THREADS=1):
        texts.append(process.communicate(timeout=LONG)[0])
        codes.append(process.returncode)
    assert codes == [0] * n, "\n".join(text[-3000:] for text in texts)
    return json.loads((home / f"jobs{n}.json.ends").read_text())


def inject(rank: int, step: int, micro: int, where: str, times: int = 1) -> None:
    """Make one loss, or the gradient of one, not finite, `times` times; or send a signal."""
    forward, train_step = LLaMA.forward, train.train_step
    now = {"step": 0, "micro": 0, "left": times}

    def counted(run: train.TrainState, *rest: Any) -> dict[str, Any]:
        now["step"], now["micro"] = run.step + 1, 0
        return train_step(run, *rest)

    def poisoned(self: LLaMA, ids: torch.Tensor, targets: Any = None, **rest: Any) -> Any:
        out = forward(self, ids, targets, **rest)
        if targets is None or not torch.is_grad_enabled():
            return out
        now["micro"] += 1
        here = (parallel.rank(), now["step"], now["micro"]) == (rank, step, micro)
        if not (here and now["left"]):
            return out
        now["left"] -= 1
        loss, token_losses = out
        if where == "signal":  # to this process alone
            os.kill(os.getpid(), signal.SIGTERM)
            return out
        if where == "gradient":
            loss.register_hook(lambda g: g * torch.nan)
            return loss, token_losses
        token_losses = token_losses.clone()
        token_losses[0] = torch.nan
        return loss * torch.nan, token_losses

    LLaMA.forward, train.train_step = poisoned, counted


def save_again(argv: list[str]) -> None:
    """Load the newest checkpoint and save the very same state once more, under another name."""
    run = train.start(load(argv)[0])
    train.resume(run)
    train.save(run, "step_9999999")
    train.finish_save(run)
    parallel.all_gather_object(None)  # the first process has published it


def work(path: Path) -> None:
    """What each process does."""
    torch.distributed.init_process_group("gloo")
    forward, train_step, ends = LLaMA.forward, train.train_step, []
    for job in json.loads(path.read_text()):
        LLaMA.forward, train.train_step = forward, train_step
        if "nan" in job:
            inject(**job["nan"])
        try:
            {"train": train.main, "audit": audit.main, "save": save_again}[
                job.get("do", "train")](job["argv"])
            ends.append("")
        except UserError as end:
            ends.append(str(end))
    if parallel.rank() == 0:
        path.with_suffix(".json.ends").write_text(json.dumps(ends))
    torch.distributed.destroy_process_group()


def assert_close_run(a: Path, b: Path) -> None:
    """Equal but for the order of sums, over all steps."""
    assert len(metrics(a)) == len(metrics(b)) > 0
    for x, y in zip(metrics(a), metrics(b), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=2e-6)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=2e-4)
        assert x["loss_by_source"].keys() == y["loss_by_source"].keys()
        if "valid" in x and "valid" in y:
            assert x["valid"]["code"]["loss"] == pytest.approx(y["valid"]["code"]["loss"], rel=2e-6)


def assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys() and len(ours) > 50
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_two_processes(home: Path, straight: Path, tmp_path: Path) -> None:
    """DDP = FSDP = one process; resumed, resharded and recomputed = straight; NaN anywhere."""
    def job(name: str, nan: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
        settings = {"micro_batch_size": 2} | settings
        return {"argv": argv(home, tmp_path / name, **settings)} | ({"nan": nan} if nan else {})

    shutil.copytree(straight, tmp_path / "from_one")
    shutil.rmtree(tmp_path / "from_one/ckpt_002")
    shutil.copytree(straight, tmp_path / "again")
    alone = run(home, tmp_path / "bfloat16_alone", dtype="bfloat16")
    at = {"rank": 1, "step": 9, "micro": 2}
    ends = launch(2, home, [
        job("ddp", parallel="ddp"),
        job("fsdp"),
        job("parts", max_steps=11, save_minutes=1e-9),
        job("parts", activation_checkpointing="selective"),
        job("from_one"),
        job("bfloat16", parallel="ddp", reduce_dtype="bfloat16", dtype="bfloat16", max_steps=6),
        job("loss", at | {"where": "loss"}),
        job("gradient", at | {"where": "gradient"}, parallel="ddp"),
        job("step", at | {"where": "gradient"}, on_nonfinite="skip_step"),
        job("loss", skip_chunks=[1]),
        job("fsdp", replay=1) | {"do": "audit"},
        job("uneven", micro_batch_size=8),
        job("fsdp", resume="false"),
        job("signal", at | {"where": "signal"}),
        job("signal"),
        job("again", micro_batch_size=4) | {"do": "save"},
        job("bfloat16_fsdp", dtype="bfloat16"),
        job("bfloat16_alone", dtype="bfloat16", replay=1) | {"do": "audit"},
    ])
    assert ends[:6] == [""] * 6
    assert_close_run(straight, tmp_path / "ddp")
    assert_close_run(straight, tmp_path / "fsdp")
    assert_close_run(straight, tmp_path / "from_one")
    assert_same_run(tmp_path / "fsdp", tmp_path / "parts")
    assert [r["loss"] for r in metrics(tmp_path / "bfloat16")] == pytest.approx(
        [r["loss"] for r in metrics(straight)][:6], rel=2e-2)
    # FSDP casts norms and embeddings to bfloat16 as well, which one process keeps in float32
    assert [r["loss"] for r in metrics(tmp_path / "bfloat16_fsdp")] == pytest.approx(
        [r["loss"] for r in metrics(alone)], rel=1e-3)
    # the message: step, rank, chunk, row, its source, the newest checkpoint, how to go on
    config, _ = load(argv(home, straight))
    data = load_data(config.data_dir)
    chunk = data.chunk(1)
    i = step_sequences(config.seed, 1, len(chunk), 2, 8)[6]  # rank 1 has micro-batches 1 and 3
    source = data.sources[chunk["source"][i]]
    for words in ("Step 9: loss nan", "the update was not made", "chunk 1;",
                  f"rank 1: sequence {i} ({source}) (", "--step=9", "ckpt_000;",
                  "`skip_chunks = [1]`", 'on_nonfinite = "skip_step"'):
        assert words in ends[6]
    assert "Step 9: loss 4.0" in ends[7] and "every loss was finite, the gradient was" in ends[7]
    assert len(metrics(tmp_path / "gradient")) == 8
    # the policies
    assert ends[8] == ends[9] == ends[10] == ""
    assert [r["step"] for r in metrics(tmp_path / "step") if "skipped" in r] == [9]
    assert [r["chunk"] for r in metrics(tmp_path / "loss")] == [0] * 6 + [2] * 6 + [0] * 6
    assert "processes (8 x 2 = 16); 16 would do" in ends[11]
    assert "already holds a run" in ends[12]
    assert (tmp_path / "signal/step_0000009").exists() and ends[13:17] == [""] * 4
    # each process compares its share: together they differ in no more tensors than there are
    found = re.search(r"(\d+) of (\d+) tensors differ", ends[17])
    assert found, ends[17]
    differ, n = map(int, found.groups())
    assert n / 2 < differ <= n
    assert_same_run(tmp_path / "fsdp", tmp_path / "signal")
    # a checkpoint of two processes goes on in one, with no process group
    shutil.copytree(tmp_path / "fsdp", tmp_path / "in_one")
    shutil.rmtree(tmp_path / "in_one/ckpt_002")
    run(home, tmp_path / "in_one")
    assert_close_run(straight, tmp_path / "in_one")
    # the same state has the same hashes, whoever has written it
    again = ckpt.read_manifest(tmp_path / "again/step_9999999")
    first = ckpt.read_manifest(straight / "ckpt_002")
    assert len(again["files"]) == len(first["files"]) + 3  # two files more, and an index
    assert again["tensors"] == first["tensors"] and len(again["tensors"]) > 60
    assert again["weights_sha256"] == first["weights_sha256"]


def test_four_processes(home: Path, straight: Path, tmp_path: Path) -> None:
    def job(name: str, **settings: Any) -> dict[str, Any]:
        return {"argv": argv(home, tmp_path / name, micro_batch_size=1, **settings)}

    shutil.copytree(straight, tmp_path / "resharded")
    shutil.rmtree(tmp_path / "resharded/ckpt_002")
    hsdp = {"parallel": "hsdp", "shard_size": 2, "tie_word_embeddings": True}
    ends = launch(4, home, [
        job("ddp", parallel="ddp"),
        job("hsdp", **hsdp),
        job("again", **hsdp, activation_checkpointing="full"),
        job("resharded"),
        job("wrong", parallel="hsdp", shard_size=3)])
    assert ends[:4] == [""] * 4 and "cannot be divided into groups of 3" in ends[4]
    tied = run(home, tmp_path / "tied", tie_word_embeddings=True)
    assert_close_run(tied, tmp_path / "hsdp")
    assert_same_run(tmp_path / "hsdp", tmp_path / "again")
    assert_close_run(straight, tmp_path / "ddp")
    assert_close_run(straight, tmp_path / "resharded")


def test_any_number_of_processes_gives_the_same_bits(home: Path, tmp_path: Path) -> None:
    """same_bits: 1 = 2 = 4, with accumulation and clipping; begun on 4, gone on with on 2 and on 1;
    and what 4 have trained is replayed by one."""
    settings = {"same_bits": True, "micro_batch_size": 2, "grad_clip": 0.5}
    kinds = {"float32": {"dtype": "float32"}, "bfloat16": {"dtype": "bfloat16"},
             "other": {"activation_checkpointing": "full", "tie_word_embeddings": True}}

    def job(kind: str, where: str, **more: Any) -> dict[str, Any]:
        return {"argv": argv(home, tmp_path / kind / where, **settings, **kinds[kind], **more)}

    ends = launch(4, home, [*(job(kind, "four") for kind in kinds),
                            job("float32", "parts", max_steps=5),
                            job("float32", "hsdp", parallel="hsdp", shard_size=2)])
    assert ends[:4] == [""] * 4 and "same_bits needs parallel = 'fsdp', found 'hsdp'" in ends[4]
    assert launch(2, home, [*(job(kind, "two") for kind in kinds),
                            job("float32", "parts", max_steps=11)]) == [""] * 4
    train.main(job("float32", "parts")["argv"])
    for kind in kinds:
        train.main(job(kind, "one")["argv"])
        for where in ("four", "two", *["parts"] * (kind == "float32")):
            assert_same_run(tmp_path / kind / "one", tmp_path / kind / where)
        logs = [metrics(tmp_path / kind / where) for where in ("one", "four")]
        assert max(record["grad_norm"] for record in logs[0]) > 0.5  # so some were clipped
        validated = [[record["valid"] for record in log if "valid" in record] for log in logs]
        assert validated[0] == validated[1] and len(validated[0]) == 6
    audit.main([str(tmp_path / "float32/four"), "--replay=1"])


def test_two_nodes_survive_what_fails(home: Path, tmp_path: Path) -> None:
    """torchrun on two nodes: a process of either is killed, then a node is lost and replaced. The
    run ends with the bits of one that nothing has disturbed."""
    settings = {"micro_batch_size": 2, "save_minutes": 1e-9, "timeout_minutes": 0.15}
    words = argv(home, tmp_path / "run", **settings)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start_node(number: int) -> subprocess.Popen:
        command = [*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", "--max-restarts=9",
                   "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=one",
                   f"--rdzv_conf=is_host={int(number == 0)}", "--local-addr=127.0.0.1",
                   "train.py", *words]
        with open(tmp_path / "nodes.log", "a") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {
                "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})

    nodes = [start_node(0), start_node(1)]

    def workers(resumed: int) -> list[int]:
        """Those that train, when the run has gone on so many times."""
        log = tmp_path / "nodes.log"
        until(lambda: log.read_text().count("Resuming") >= resumed, *nodes)
        until(lambda: len(training_processes(tmp_path / "run")) == 2, *nodes)
        return training_processes(tmp_path / "run")

    try:
        until(lambda: len(metrics(tmp_path / "run")) >= 2, *nodes)
        os.kill(workers(0)[1], signal.SIGKILL)
        os.kill(workers(1)[0], signal.SIGKILL)
        of_both = workers(2)
        nodes[1].kill()
        for pid in of_both:
            if parent(pid) == nodes[1].pid:
                os.kill(pid, signal.SIGKILL)
        nodes[1] = start_node(1)
        assert [node.wait(LONG) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.kill()
    assert (tmp_path / "nodes.log").read_text().count("Resuming") >= 3
    assert launch(2, home, [{"argv": argv(home, tmp_path / "peace", **settings)}]) == [""]
    assert_same_run(tmp_path / "peace", tmp_path / "run")


def test_a_signal_to_torchrun_saves_on_a_slow_disk(home: Path, tmp_path: Path) -> None:
    """torchrun waits --shutdown-timeout for its processes. Every file here takes a second."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\nplain = os.fsync\nos.fsync = lambda f: (time.sleep(1), plain(f))[1]\n")
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=1", "--shutdown-timeout=120",
               "train.py", *argv(home, tmp_path / "run")]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    until(lambda: len(metrics(tmp_path / "run")) >= 2, process)
    process.terminate()
    began = time.monotonic()
    process.wait(LONG)
    assert time.monotonic() - began > 2  # so it was waited for
    [saved] = ckpt.list_checkpoints(tmp_path / "run")
    assert saved.name.startswith("step_") and not ckpt.verify_checkpoint(saved, train_state=True)


def test_a_process_that_does_not_come_is_named(home: Path, tmp_path: Path) -> None:
    """While groups are made, and in a step. All cases at once: they do nothing but wait."""
    cases = {}
    for where in ("build_device_mesh", "train_step"):
        for how, who in (("dead", 1), ("asleep", 1), ("stopped", 1), ("dead", 0)):
            words = argv(home, tmp_path / f"{where}_{how}_{who}", micro_batch_size=2,
                         timeout_minutes=0.2)
            cases[where, how, who] = ranks(2, "tests/test_distributed.py", how, where, who, *words)
    texts = {}
    for (where, how, who), both in cases.items():
        texts[where, how, who] = both[1 - who].communicate(timeout=LONG)[0]
        if how != "dead":
            both[who].kill()
    for (_, _, who), text in texts.items():
        assert "Traceback" not in text
        assert "A collective failed or took longer than timeout_minutes = 0.2" in text
        assert f"Of ranks 0 to 1 there was no answer from: {who} (" in text


def do_not_come(how: str, where: str, who: str, *words: str) -> None:
    """Train, but process `who` never begins what train.py calls `where`."""
    plain = getattr(train, where)
    miss = {"dead": lambda: os._exit(1), "asleep": lambda: time.sleep(LONG),
            "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP)}

    def missing(*rest: Any) -> Any:
        if parallel.rank() == int(who):
            miss[how]()
        return plain(*rest)

    setattr(train, where, missing)
    sys.argv[1:] = words
    run_command(train.main)


def until(condition: Callable[[], bool], *processes: subprocess.Popen) -> None:
    """Wait, as long as the processes run."""
    give_up = time.monotonic() + LONG
    while not condition() and all(process.poll() is None for process in processes):
        assert time.monotonic() < give_up
        time.sleep(0.01)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def training_processes(run_dir: Path) -> list[int]:
    """Process ids by rank of those that train a run, as the system tells."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text().split("\0")
            env = dict(x.partition("=")[::2] for x in (folder / "environ").read_text().split("\0"))
        except (OSError, UnicodeDecodeError):
            continue  # it has just ended
        if f"--run_dir={run_dir}" in words and "RANK" in env:
            found[int(env["RANK"])] = int(folder.name)
    return [pid for _, pid in sorted(found.items())]


if __name__ == "__main__":
    if len(sys.argv) == 2:
        work(Path(sys.argv[1]))
    else:
        do_not_come(*sys.argv[1:])
