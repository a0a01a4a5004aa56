"""Several processes train and measure what one does, whatever fails.

The processes run this very file, which does the jobs it is given one after the other: starting
costs the most. Four processes do theirs first, then two, and what they leave is compared here.
"""

import json
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import Script, ranks
from test_train import (
    argv,
    assert_same_run,
    assert_same_tensors,
    faulty,
    metrics,
    muon,
    run,
    straight,
    tensors,
)

import audit
import checkpoint as ckpt
import eval as evaluation
import memorize
import parallel
import train
from configs import UserError, load
from data import load_data, read_json, step_sequences
from model import LLaMA

LONG = 240  # seconds, for machines with other work to do
TIED = {"tie_word_embeddings": True, "activation_checkpointing": "full"}
SAME_BITS = {"same_bits": True, "micro_batch_size": 2, "grad_clip": 0.5, "max_steps": 8}
KINDS = {"float32": SAME_BITS, "bfloat16": SAME_BITS | TIED | {"dtype": "bfloat16"}}
EVAL = {"tasks": "recall", "micro_batch_size": 2}
GRID = {"sequences": 9, "k": 6, "l": 10, "micro_batch_size": 2}


ENDED: dict[str, str] = {}  # job: the error that ended it, or ""


def launch(n: int, where: Path, jobs: dict[str, dict[str, Any]]) -> None:
    """Do jobs in n processes."""
    file = where / f"jobs{n}.json"
    file.write_text(json.dumps(jobs))
    texts, codes = [], []
    for process in ranks(n, "tests/test_distributed.py", file, OMP_NUM_THREADS=1):
        texts.append(process.communicate(timeout=LONG)[0])
        codes.append(process.returncode)
    assert codes == [0] * n, "\n".join(text[-3000:] for text in texts)
    ENDED.update(json.loads(file.with_suffix(".ends").read_text()))


def work(file: Path) -> None:
    """What each process does."""
    torch.distributed.init_process_group("gloo")
    plain, ends = (LLaMA.forward, train.train_step, train.make_optimizers), {}
    for name, job in json.loads(file.read_text()).items():
        LLaMA.forward, train.train_step, train.make_optimizers = plain
        if job["fault"]:
            LLaMA.forward, train.train_step = faulty(job["fault"], [9], rank=1, micro=2)
        if job["muon"]:
            train.make_optimizers = muon()
        try:
            sys.modules[job["stage"]].main(job["argv"])
            ends[name] = ""
        except UserError as end:
            ends[name] = str(end)
    for group in torch.distributed.distributed_c10d._world.pg_map:  # HSDP's own groups too
        timeout = group._get_backend(torch.device("cpu")).options._timeout
        if timeout != timedelta(minutes=15):
            ends["a group's timeout"] = str(timeout)
    if parallel.rank() == 0:
        file.with_suffix(".ends").write_text(json.dumps(ends))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of four processes, of two, and of one; and how each ended."""
    where, jobs = tmp_path_factory.mktemp("many"), {4: {}, 2: {}}

    def job(n: int, name: str, run_dir: str = "", stage: str = "train", fault: str = "",
            muon: bool = False, **settings: Any) -> None:
        words = argv(where / (run_dir or name), **{"micro_batch_size": 4 // n} | settings)
        jobs[n][name] = {"argv": words, "stage": stage, "fault": fault, "muon": muon}

    for name in ("resharded", "from_one", "measured"):
        shutil.copytree(straight(), where / name)
        (where / name / "ckpt_002/model.safetensors").write_bytes(b"damaged")
    job(4, "hsdp", parallel="hsdp", shard_size=2, **TIED, max_steps=8)
    for name, last in (("hsdp parts", 4), ("hsdp parts, on", 8)):
        job(4, name, "hsdp parts", parallel="hsdp", shard_size=2, **TIED, max_steps=last)
    job(4, "resharded", max_steps=15)
    job(4, "groups of three", parallel="hsdp", shard_size=3)
    for kind, settings in KINDS.items():
        job(4, f"{kind}/four", **settings)
    job(4, "float32/parts", **SAME_BITS | {"max_steps": 4})
    job(4, "other sums", parallel="hsdp", shard_size=2, **SAME_BITS)
    launch(4, where, jobs[4])
    job(2, "float32/parts", **SAME_BITS | {"max_steps": 7})
    job(2, "bfloat16/two", **KINDS["bfloat16"])
    job(2, "ddp", parallel="ddp", max_steps=8)
    shutil.copytree(load(argv(where))[0].data_dir, where / "damaged_data")
    with open(where / "damaged_data/train/chunk_001.npy", "ab") as f:
        f.write(b"x")
    job(2, "damaged", data_dir=where / "damaged_data")
    job(2, "fsdp", max_steps=12)
    job(2, "parts", max_steps=8, save_minutes=1e-9)
    job(2, "parts, on", "parts", max_steps=12, activation_checkpointing="full")
    job(2, "from_one")
    for kind in ("fsdp", "hsdp"):
        job(2, f"reduced {kind}", parallel=kind, shard_size=2, reduce_dtype="bfloat16",
            dtype="bfloat16", micro_batch_size=1, max_steps=4)
    job(2, "loss", fault="loss")
    job(2, "loss, on", "loss", skip_chunks=[1], max_steps=8)
    job(2, "gradient", parallel="ddp", fault="gradient")
    for name, run_dir, last in (("skipped", "", 10), ("skipped parts", "", 8),
                                ("skipped parts, on", "skipped parts", 10)):
        job(2, name, run_dir, fault="gradient", on_nonfinite="skip_step", max_steps=last)
    job(2, "signal", fault="signal")
    job(2, "signal, on", "signal", max_steps=12)
    job(2, "replay", "fsdp", stage="audit", replay=1)
    job(2, "eval", "measured", stage="eval", **EVAL)
    job(2, "memorize", "measured", stage="memorize", **GRID)
    for name, run_dir, last in (("muon", "", 4), ("muon parts", "", 2),
                                ("muon parts, on", "muon parts", 4)):
        job(2, name, run_dir, muon=True, max_steps=last)
    launch(2, where, jobs[2])
    return where


def assert_close_run(a: Path, b: Path, steps: int) -> None:
    """Equal but for the order of sums, over a number of steps."""
    for x, y in zip(metrics(a)[:steps], metrics(b)[:steps], strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=2e-6)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=2e-4)
        assert x["loss_by_source"].keys() == y["loss_by_source"].keys()
        if "valid" in x and "valid" in y:
            assert x["valid"]["code"]["loss"] == pytest.approx(y["valid"]["code"]["loss"], rel=2e-6)


def test_nothing_ended_but_what_should(runs: Path) -> None:
    wrong = {name: end for name, end in ENDED.items() if end}
    assert wrong.keys() == {"groups of three", "other sums", "damaged", "loss", "gradient"}
    assert "chunk_001.npy differs" in wrong["damaged"] and len(metrics(runs / "damaged")) == 6
    assert "cannot be divided into groups of 3" in wrong["groups of three"]
    assert "parallel must be 'fsdp' with same_bits" in wrong["other sums"]


def test_two_and_four_processes_train_the_run_of_one(runs: Path) -> None:
    for name, steps in (("ddp", 8), ("fsdp", 12), ("from_one", 18), ("resharded", 15)):
        assert_close_run(straight(), runs / name, steps)
    assert_close_run(run(runs / "tied", **TIED, max_steps=8), runs / "hsdp", 8)
    assert [r["loss"] for r in metrics(runs / "reduced hsdp")] == pytest.approx(
        [r["loss"] for r in metrics(straight())][:4], rel=2e-2)
    # One group of all processes is FSDP, whatever the type in which gradients add up.
    assert_same_run(runs / "reduced fsdp", runs / "reduced hsdp")
    # A checkpoint of two processes goes on in one, without a process group.
    shutil.copytree(runs / "fsdp", runs / "in_one")
    shutil.rmtree(runs / "in_one/ckpt_001")
    assert_close_run(straight(), run(runs / "in_one", max_steps=12), 12)


def test_two_processes_stop_and_go_on(runs: Path) -> None:
    assert_same_run(runs / "fsdp", runs / "parts")
    assert_same_run(runs / "hsdp", runs / "hsdp parts")
    assert_same_tensors(*(runs / name / "step_0000008" for name in ("hsdp", "hsdp parts")))
    assert (runs / "signal/step_0000009").exists()
    assert_same_run(runs / "fsdp", runs / "signal")


def test_weights_and_moments_are_saved_in_float32(runs: Path) -> None:
    saved = tensors(runs / "reduced hsdp/step_0000004")
    assert len(saved) > 60 and {v.dtype for v in saved.values()} == {torch.float32}
    # ... and carry more than bfloat16 can: a save that rounded on the way would pass the line above
    weight = saved["lm_head.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())


def test_sharded_state_of_any_optimizer_resumes(runs: Path) -> None:
    last = runs / "muon/step_0000004"
    assert_same_run(runs / "muon", runs / "muon parts")
    assert_same_tensors(last, runs / "muon parts/step_0000004")
    names = set(ckpt.read_manifest(last)["tensors"])
    assert sum(name.endswith("momentum_buffer") for name in names) == 14
    assert sum(name.endswith(".step") for name in names) == 1  # of AdamW, saved once
    with pytest.raises(UserError, match="trained with optimizers = .*, now .'AdamW'"):
        run(runs / "muon")


def test_nan_in_one_process_stops_all_before_the_update(runs: Path) -> None:
    config, _ = load(argv(runs))
    chunk = load_data(config.data_dir).chunk(1)
    i = step_sequences(config.seed, 1, len(chunk), 2, 8)[6]  # process 1 has micro-batches 1 and 3
    for words in ("Step 9: loss nan", "the update was not made. It was chunk 1;",
                  f"not finite on sequence {i} (", "--step=9", "`skip_chunks = [1]`",
                  'on_nonfinite = "skip_step"'):
        assert words in ENDED["loss"]
    assert "Step 9: loss 4.0" in ENDED["gradient"]
    assert "the loss is finite, but not the gradient" in ENDED["gradient"]
    assert len(metrics(runs / "gradient")) == 8
    assert [r["step"] for r in metrics(runs / "skipped") if "skipped" in r] == [9]
    assert_same_run(runs / "skipped", runs / "skipped parts")
    assert [r["chunk"] for r in metrics(runs / "loss")] == [0] * 6 + [2] * 2


def test_any_number_of_processes_gives_the_same_bits(runs: Path) -> None:
    """same_bits, with accumulation and clipping; begun on 4, gone on with on 2 and on 1; and what 4
    have trained is replayed by one."""
    run(runs / "float32/parts", **KINDS["float32"])
    for kind, others in (("float32", ("four", "parts")), ("bfloat16", ("four", "two"))):
        one = run(runs / kind / "one", **KINDS[kind])
        for other in others:
            assert_same_run(one, runs / kind / other)
            # The hashes are of tensors, so they are the same in however many files these are.
            first, second = (ckpt.read_manifest(path / "ckpt_000")
                             for path in (one, runs / kind / other))
            assert len(second["files"]) > len(first["files"])
            for key in ("tensors", "weights_sha256"):
                assert first[key] == second[key]
        assert max(record["grad_norm"] for record in metrics(one)) > 0.5  # so some were clipped
        validated = [[record["valid"] for record in metrics(path) if "valid" in record]
                     for path in (one, runs / kind / "four")]
        assert validated[0] == validated[1] and len(validated[0]) >= 3
    audit.main([str(runs / "float32/four"), "--replay=0"])


def test_processes_share_what_is_measured(runs: Path) -> None:
    """They find what one alone does, and leave out a damaged checkpoint."""
    results = shutil.ignore_patterns("eval.json*", "memorization.json*")
    alone = shutil.copytree(runs / "measured", runs / "alone", ignore=results)
    evaluation.main(argv(alone, **EVAL))
    memorize.main(argv(alone, **GRID))
    for file, n in (("eval.jsonl", 4), ("memorization.jsonl", 6)):
        ours, theirs = ({json.dumps(record["of"]): record["result"] for record in records}
                        for records in (ckpt.read_records(path / file)
                                        for path in (alone, runs / "measured")))
        assert ours == theirs and len(ours) == n
    summary = read_json(runs / "measured/memorization.json")
    assert summary == read_json(alone / "memorization.json")
    assert summary["checkpoints"] == ["ckpt_000", "ckpt_001"]


# ---- what fails


# What a process that torchrun starts does first: it dies with torchrun, as on a node that is lost.
# The disk is slow, or the run would end before that.
SITE = """
import ctypes, os, time
ctypes.CDLL(None).prctl(1, 9)
plain = os.fsync
os.fsync = lambda file: (time.sleep(0.1), plain(file))[1]
"""


def test_two_nodes_survive_what_fails(runs: Path, tmp_path: Path) -> None:
    """torchrun on two nodes: one is lost and replaced, the other restarts its process. The run
    ends with the bits of one that nothing has disturbed."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    (tmp_path / "torchrun.py").write_text("from torch.distributed.run import main\nmain()\n")
    words = argv(tmp_path / "run", micro_batch_size=2, save_minutes=1e-9,
                 timeout_minutes=0.15, max_steps=12)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start_node(number: int) -> Script:
        return Script(
            tmp_path / "torchrun.py", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=9",
            "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=one",
            f"--rdzv_conf=is_host={int(number == 0)}", "--local-addr=127.0.0.1", "train.py", *words,
            OMP_NUM_THREADS=1, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, PYTHONPATH=tmp_path)

    started = [start_node(0), start_node(1)]
    try:
        until(lambda: len(ckpt.list_checkpoints(tmp_path / "run")) > 0, *started)
        started[1].kill()
        started.append(start_node(1))
        assert [started[0].wait(LONG), started[2].wait(LONG)] == [0, 0]
    finally:
        for node in started:
            node.kill()
    assert any("Resuming" in node.output.read_text() for node in started)
    assert_same_run(runs / "fsdp", tmp_path / "run")
    # What a person typed wrong is not tried again.
    typed = Script(tmp_path / "torchrun.py", "--nproc_per_node=2", "--max-restarts=9", "train.py",
                   *argv(tmp_path / "run", lrate=3), OMP_NUM_THREADS=1)
    text, _ = typed.communicate(timeout=LONG)
    assert typed.returncode == 1 and 1 <= text.count("there is no setting 'lrate'") <= 2


def test_nobody_waits_for_ever_for_a_process(tmp_path: Path) -> None:
    """One of two processes dies, or sleeps."""
    pairs = {number: ranks(2, "train.py", *argv(tmp_path / number.name, micro_batch_size=2,
                                                timeout_minutes=0.1, save_minutes=1e-9))
             for number in (signal.SIGKILL, signal.SIGSTOP)}
    for number, both in pairs.items():
        until(lambda: len(metrics(tmp_path / number.name)) >= 2, *both)  # noqa: B023
        both[1].send_signal(number)
    for first, second in pairs.values():
        assert "Traceback" in first.communicate(timeout=LONG)[0] and first.returncode == 1
        second.kill()


def until(condition: Callable[[], bool], *processes: Any) -> None:
    """Wait, as long as the processes run."""
    give_up = time.monotonic() + LONG
    while not condition() and all(process.poll() is None for process in processes):
        assert time.monotonic() < give_up
        time.sleep(0.01)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
