"""The loop: same bits however it is interrupted, nothing lost, nothing half-written."""

import errno
import fcntl
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import sentences
from launch import Script
from torch import nn
from torch.distributed import HashStore

import audit
import checkpoint as ckpt
import eval as evaluation
import parallel
import prepare_data
import train
from configs import Config, UserError, load
from data import load_data, lock_directory, step_sequences, step_to_visit
from model import LLaMA, build_for_inference

# 3 chunks of 6 steps of 8 rows; the text is made up, so that it is the same on every machine.
CONFIG = """
hidden_size, intermediate_size, num_hidden_layers, num_attention_heads = 32, 64, 2, 2
vocab_size, seq_len, n_chunks, sequences_per_chunk, valid_sequences = 300, 32, 3, 50, 6
global_batch_size, micro_batch_size, eval_sequences, eval_interval = 8, 4, 6, 4
learning_rate, min_learning_rate, warmup_steps = 1e-2, 1e-3, 3
dtype, threads, sample_tokens, workers, keep_train_state = "float32", 1, 4, 1, 0
"""
STEPS = 18


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config and its prepared data."""
    home = tmp_path_factory.mktemp("home")
    for seed, name in enumerate(("prose", "code")):
        rows = [json.dumps({"text": sentences(10 * seed + i, 25)}) for i in range(14 + 6 * seed)]
        (home / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    sources = {name: str(home / f"{name}.jsonl") for name in ("prose", "code")}
    (home / "mini.py").write_text(
        CONFIG + f"sources = {sources!r}\ndata_dir = {str(home / 'data')!r}\n")
    prepare_data.main([str(home / "mini.py")])
    return home


def argv(home: Path, run: Path | str, **settings: Any) -> list[str]:
    return [str(home / "mini.py"), f"--run_dir={run}", *(f"--{k}={v}" for k, v in settings.items())]


def run(home: Path, run_dir: Path, **settings: Any) -> Path:
    train.main(argv(home, run_dir, **settings))
    return run_dir


@pytest.fixture(scope="module")
def straight(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbed."""
    return run(home, tmp_path_factory.mktemp("runs") / "straight")


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, weights and training state, by name."""
    found = dict(ckpt.read_tensors(checkpoint))
    if (checkpoint / "train_state").exists():
        found |= ckpt.read_tensors(checkpoint / "train_state", "optimizer")
    return found


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return ckpt.read_records(run_dir / "metrics.jsonl")


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: weights, optimizer, random state, and everything logged but the clock."""
    kept = [[path for path in ckpt.list_checkpoints(run) if path.name.startswith("ckpt_")]
            for run in (a, b)]
    for x, y in zip(*kept, strict=True):
        ours, theirs = tensors(x), tensors(y)
        assert ours.keys() == theirs.keys() and len(ours) > 50
        assert all(torch.equal(ours[k], theirs[k]) for k in ours), x.name
    # A run that max_steps ends validates there too: that is logged, and changes nothing.
    timed = {"tokens_per_s", "mfu", "memory_gb", "data_s", "valid"}
    records = [[{k: v for k, v in r.items() if k not in timed} for r in metrics(p)]
               for p in (a, b)]
    assert records[0] == records[1]
    assert [r["step"] for r in records[0]] == list(range(1, len(records[0]) + 1))


def background(home: Path, run_dir: Path, until: int = 0, **settings: Any) -> Script:
    """Start train.py as a process and return when it has logged `until` steps."""
    process = Script("train.py", *argv(home, run_dir, **settings))
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up and process.poll() is None and len(metrics(run_dir)) < until:
        time.sleep(0.005)
    return process


# ---- the schedule and the step


def test_learning_rate_is_a_pure_function_of_the_step() -> None:
    c = Config(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=4)
    rates = [train.learning_rate(c, step, 12) for step in range(1, 13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[7] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1)
    amber = Config(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=4, warmup_offset=0)
    assert [train.learning_rate(amber, step, 12) for step in (1, 2, 5)] == [0, 0.25, 1.0]
    c.lr_schedule = "linear"
    assert train.learning_rate(c, 8, 12) == pytest.approx(0.55)
    c.lr_schedule = "constant"
    assert train.learning_rate(c, 12, 12) == 1.0


def test_golden_losses(straight: Path) -> None:
    """A change that must not change results leaves these as they are."""
    losses = [r["loss"] for r in metrics(straight)]
    assert losses == pytest.approx(GOLDEN, rel=2e-4)


def test_loss_and_step_do_not_depend_on_the_micro_batch(home: Path, straight: Path,
                                                        tmp_path: Path) -> None:
    other = run(home, tmp_path / "run", micro_batch_size=2)
    a, b = metrics(straight), metrics(other)
    for x, y in zip(a, b, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-4)


def test_the_batch_must_divide_over_the_processes() -> None:
    config, _ = load(["configs/amber_7b.py"])
    assert parallel.micro_batches(config, 224) == 1 and parallel.micro_batches(config, 32) == 7
    config.global_batch_size = 2000
    with pytest.raises(UserError, match=r"processes \(10 x 224 = 2240\); 2240 would do"):
        parallel.micro_batches(config, 224)


def test_loss_by_source_weighs_up_to_the_loss(home: Path, straight: Path) -> None:
    config, _ = load(argv(home, straight))
    data = load_data(config.data_dir)
    schedule = data.schedule(config)
    for r in metrics(straight):
        visit, step = step_to_visit(schedule, r["step"] - 1)
        chunk = data.chunk(visit.chunk)
        ids = step_sequences(config.seed, visit.chunk, len(chunk), step, 8)
        counts = np.bincount(chunk[ids]["source"], minlength=2)
        mean = sum(r["loss_by_source"].get(n, 0) * k for n, k in zip(data.sources, counts)) / 8
        assert r["loss"] == pytest.approx(mean, abs=2e-5)


def test_the_first_update_is_adamw_on_the_mean_loss(home: Path, tmp_path: Path) -> None:
    """One step of the loop against plain PyTorch on the same eight rows."""
    config, _ = load(argv(home, run(home, tmp_path / "run", max_steps=1, grad_clip=0.5)))
    chunk = load_data(config.data_dir).chunk(0)
    ids = step_sequences(config.seed, 0, len(chunk), 0, 8)
    x = torch.from_numpy(chunk[ids]["token_ids"].astype(np.int64))
    net = LLaMA(config)
    net.init_weights(config.seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2 / 3, betas=(0.9, 0.95), eps=1e-8,
                                  weight_decay=0.1)
    logits = net(x[:, :-1])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten()).backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
    optimizer.step()
    saved = tensors(tmp_path / "run" / "step_0000001")
    for name, p in net.named_parameters():
        torch.testing.assert_close(saved[name], p.data, rtol=2e-3, atol=2e-4)


def test_the_next_step_is_read_while_this_one_is_computed(
        home: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for the other: a step until the next one's sequences have been read, and they
    until the step has begun. Read in turn, both would wait in vain."""
    read, begun = (defaultdict(threading.Event) for _ in range(2))
    load_batch, train_step = train.load_batch, train.train_step

    def slow(run: train.TrainState, step: int) -> train.Batch:
        assert step == 0 or begun[step - 1].wait(60)
        batch = load_batch(run, step)
        read[step].set()
        return batch

    def waiting(run: train.TrainState, *rest: Any) -> dict[str, Any]:
        begun[run.step].set()
        assert run.step + 1 == STEPS or read[run.step + 1].wait(60)
        return train_step(run, *rest)

    monkeypatch.setattr(train, "load_batch", slow)
    monkeypatch.setattr(train, "train_step", waiting)
    assert_same_run(straight, run(home, tmp_path / "run"))


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
@pytest.mark.parametrize("parallel", ["", "fsdp"])
def test_compile_makes_one_graph(home: Path, straight: Path, tmp_path: Path, kind: str,
                                 parallel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all blocks, whatever is computed again; validation and samples add none."""
    # Imported here: the processes of test_distributed.py import this file, and not the compiler.
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compile_with = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_with(self, backend=counter))
    torch.compiler.reset()
    if parallel:
        torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        run(home, tmp_path / "run", compile=True, activation_checkpointing=kind, max_steps=6)
    finally:
        if parallel:
            torch.distributed.destroy_process_group()
    assert counter.frame_count == 1
    losses = [[r["loss"] for r in metrics(path)][:6] for path in (straight, tmp_path / "run")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ---- interrupted


def test_stopped_and_resumed_is_the_straight_run(home: Path, straight: Path,
                                                 tmp_path: Path) -> None:
    for last in (4, 5, 11, 0):  # inside a chunk, twice; then past a chunk's end; then to the end
        run(home, tmp_path / "run", max_steps=last)
    assert_same_run(straight, tmp_path / "run")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_saves_and_says_how_to_go_on(home: Path, straight: Path, tmp_path: Path,
                                              name: str) -> None:
    process = background(home, tmp_path / "run", until=2)
    process.send_signal(getattr(signal, name))
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert f"{name}: saved at step" in text and "To go on: python train.py" in text
    step = metrics(tmp_path / "run")[-1]["step"]
    assert ckpt.list_checkpoints(tmp_path / "run")[-1].exists() and 2 <= step <= STEPS
    run(home, tmp_path / "run")
    assert_same_run(straight, tmp_path / "run")


def test_killed_at_any_instant_loses_no_run(home: Path, straight: Path, tmp_path: Path) -> None:
    """kill -9 at random instants, some of them inside a save, until the run is through."""
    draw = random.Random(1)
    for _ in range(4):
        already = len(metrics(tmp_path / "run"))
        process = background(home, tmp_path / "run", until=already + draw.randint(0, 4) or 1,
                             save_minutes=0.0001)
        time.sleep(draw.random() * 0.05)
        process.kill()
        process.communicate()
    run(home, tmp_path / "run")
    assert_same_run(straight, tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_finished_is_said_and_nothing_is_redone(home: Path, straight: Path,
                                                capsys: pytest.CaptureFixture) -> None:
    before = {p: p.stat().st_mtime_ns for p in straight.rglob("*") if p.name != "lock"}
    run(home, straight)
    assert "is finished: 18 steps" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in straight.rglob("*") if p.name != "lock"}


def test_a_finished_run_says_what_other_settings_would_need(home: Path, straight: Path,
                                                            capsys: pytest.CaptureFixture) -> None:
    run(home, straight, learning_rate=1e-3)
    said = capsys.readouterr().out
    assert "stays as it is: learning_rate 0.01 -> 0.001." in said
    assert "give another --run_dir" in said and "--epochs=2" in said
    train.main([str(straight)])  # the run itself in place of its config
    assert "stays" not in capsys.readouterr().out


def test_two_epochs_read_everything_twice_and_resume(home: Path, tmp_path: Path) -> None:
    whole = run(home, tmp_path / "whole", epochs=2)
    parts = run(home, tmp_path / "parts", epochs=2, max_steps=20)
    run(home, parts, epochs=2)
    assert_same_run(whole, parts)
    assert [path.name for path in ckpt.list_checkpoints(whole)][-1] == "ckpt_005"
    losses = [r["loss"] for r in metrics(whole)]
    assert len(losses) == 36 and losses[18:] != losses[:18]
    # The second pass is replayed as the first is, and an audit knows both.
    audit.main([str(whole), "--replay=4"])
    audit.main([str(whole), "--sequences=0"])


def test_a_network_that_cannot_fit_is_refused_with_both_numbers(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs [\d,.]+ GB here .* there are [\d,.]+ GB"):
        run(home, tmp_path / "run", num_hidden_layers=10, hidden_size=65536)
    assert not (tmp_path / "run").exists()


def test_two_processes_on_one_run_are_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lock = lock_directory(tmp_path / "run")
    with pytest.raises(UserError, match="is in use by another process"):
        run(home, tmp_path / "run")
    lock.close()


def test_a_file_system_without_locks_stops_no_run(tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(file: Any, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    lock_directory(tmp_path).close()


# ---- a chunk or a step left out


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the loss of these steps (from 1) NaN, as data that always gives one would."""
    plain = LLaMA.forward
    train_step = train.train_step
    now = {"step": 0}

    def counted(run: train.TrainState, *rest: Any) -> dict[str, Any]:
        now["step"] = run.step + 1
        return train_step(run, *rest)

    def poisoned(self: LLaMA, ids: torch.Tensor, targets: Any = None, **rest: Any) -> Any:
        out = plain(self, ids, targets, **rest)
        if targets is None or not torch.is_grad_enabled() or now["step"] not in steps:
            return out
        loss, token_losses = out
        return loss * torch.nan, token_losses * torch.nan

    monkeypatch.setattr(train, "train_step", counted)
    monkeypatch.setattr(LLaMA, "forward", poisoned)


def test_a_chunk_that_gives_nan_is_left_out_and_made_up_for(
        home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture) -> None:
    """NaN at step 8, in chunk 1; a rolling checkpoint of step 7 has trained on that chunk."""
    poison(monkeypatch, {8})
    with pytest.raises(UserError, match=r"chunk 1;.*`skip_chunks = \[1\]`"):
        run(home, tmp_path / "run", save_minutes=1e-9)
    monkeypatch.undo()
    run(home, tmp_path / "run", skip_chunks=[1])
    text = capsys.readouterr().out
    assert "step_0000007: it has trained on chunks that skip_chunks leaves out" in text
    assert "step_0000007 is now step_0000007.aside" in text
    records = metrics(tmp_path / "run")
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert [r["chunk"] for r in records] == [0] * 6 + [2] * 6 + [0] * 6
    assert [p.name for p in ckpt.list_checkpoints(tmp_path / "run")] == [
        "ckpt_000", "ckpt_002", "ckpt_003"]
    run(home, tmp_path / "again", skip_chunks=[1])
    assert_same_run(tmp_path / "run", tmp_path / "again")
    with pytest.raises(UserError, match="has no usable checkpoint.*skip_chunks leaves out"):
        run(home, tmp_path / "again", skip_chunks=[0])
    with pytest.raises(UserError, match="nothing to train on"):
        run(home, tmp_path / "none", skip_chunks=[0, 1, 2])


def test_a_step_that_is_left_out_is_left_out_again(home: Path, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {3, 8})
    run(home, tmp_path / "run", on_nonfinite="skip_step")
    for last in (2, 4, 0):
        run(home, tmp_path / "again", on_nonfinite="skip_step", max_steps=last)
    assert_same_run(tmp_path / "run", tmp_path / "again")
    assert [r["step"] for r in metrics(tmp_path / "run") if "skipped" in r] == [3, 8]


def test_a_run_that_leaves_out_everything_stops(home: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, set(range(4, 19)))
    monkeypatch.setattr(train, "MOST_LEFT_OUT", 10)
    with pytest.raises(UserError, match=r"Step 13: .* the 10th step in a row"):
        run(home, tmp_path / "run", on_nonfinite="skip_step")
    run(home, tmp_path / "few", on_nonfinite="skip_step", max_steps=8)
    assert "The last 5 were left out." in (tmp_path / "few/train.log").read_text()


def test_settings_that_leave_no_gradient_are_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Step 1: the gradient is exactly 0"):
        run(home, tmp_path / "run", logit_scale=1e-60)


# ---- damaged


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
@pytest.mark.parametrize("file", ["model.safetensors", "train_state/optimizer.safetensors",
                                  "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
        home: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture, how: str,
        file: str) -> None:
    shutil.copytree(straight, tmp_path / "run")
    damage(tmp_path / "run/ckpt_002" / file, how)
    run(home, tmp_path / "run")
    text = capsys.readouterr().out
    assert "Passing over" in text and "ckpt_002 is now ckpt_002.aside" in text
    assert "ckpt_001, step 12" in text
    assert_same_run(straight, tmp_path / "run")


def test_a_damaged_newest_checkpoint_does_not_cost_the_later_ones(home: Path, straight: Path,
                                                                  tmp_path: Path) -> None:
    """keep_rolling and keep_train_state count sound checkpoints only."""
    run(home, tmp_path / "run", max_steps=11, save_minutes=1e-9)
    damage(tmp_path / "run/step_0000011/manifest.json", "flipped")
    for last in (8, 9, 10):
        run(home, tmp_path / "run", max_steps=last, save_minutes=1e-9)
        assert ckpt.list_checkpoints(tmp_path / "run")[-1].name == f"step_{last:07d}"
    run(home, tmp_path / "run")
    assert_same_run(straight, tmp_path / "run")


def test_a_chunk_with_a_flipped_bit_is_not_trained_on(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "data", tmp_path / "data")
    damage(tmp_path / "data/train/chunk_001.npy", "flipped")
    with pytest.raises(UserError, match="chunk_001.npy differs: its sha256 is"):
        run(home, tmp_path / "run", data_dir=tmp_path / "data")
    assert metrics(tmp_path / "run")[-1]["step"] == 6  # chunk 0 is done, and saved
    shutil.copy(home / "data/train/chunk_001.npy", tmp_path / "data/train")
    run(home, tmp_path / "run", data_dir=tmp_path / "data")
    assert_same_run(tmp_path / "run", run(home, tmp_path / "peace"))


def test_a_run_is_never_written_over(home: Path, straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    for chunk in range(3):
        shutil.rmtree(tmp_path / f"run/ckpt_{chunk:03d}/train_state")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    for resume in ("auto", "true", f"{tmp_path}/run/ckpt_001/", f"{tmp_path}/run/./nowhere/"):
        with pytest.raises(UserError, match="no usable checkpoint"):
            run(home, tmp_path / "run", resume=resume)
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_files_of_others_are_not_touched(home: Path, tmp_path: Path) -> None:
    """Many people call things *.tmp; what a save leaves behind is known by a mark inside."""
    theirs = tmp_path / "run"
    for folder in ("precious.tmp", "ckpt_000.tmp", "step_0000003.tmp"):
        (theirs / folder).mkdir(parents=True)
        (theirs / folder / "thesis.txt").write_text("precious")
    (theirs / "notes.tmp").write_text("precious")
    ours = theirs / "ckpt_002.tmp"
    ckpt.begin_unfinished(ours)
    (ours / "model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="ckpt_000.tmp is in the way, and was not written by"):
        run(home, theirs)
    shutil.rmtree(theirs / "ckpt_000.tmp")
    run(home, theirs)
    assert not ours.exists() and (theirs / "notes.tmp").read_text() == "precious"
    for folder in ("precious.tmp", "step_0000003.tmp"):
        assert (theirs / folder / "thesis.txt").read_text() == "precious"


def test_settings_of_the_data_that_have_no_effect_are_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"source_weights = \{'code': 2\} \(the data: \{\}\)"):
        run(home, tmp_path / "run", source_weights="{'code': 2}")
    with pytest.raises(UserError, match=r"n_chunks = 2 \(the data: 3\)"):
        run(home, tmp_path / "run", n_chunks=2)
    run(home, tmp_path / "run", seed=5, max_steps=1)  # this one has an effect


def test_settings_of_the_optimizer_take_effect_when_a_run_goes_on(
        home: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/ckpt_002")
    run(home, tmp_path / "run", weight_decay=0.9)
    assert "weight_decay 0.1 -> 0.9" in capsys.readouterr().out
    ours, theirs = tensors(tmp_path / "run/ckpt_002"), tensors(straight / "ckpt_002")
    assert not torch.equal(ours["lm_head.weight"], theirs["lm_head.weight"])


def test_a_save_that_fails_says_so_and_leaves_the_rest(home: Path, straight: Path,
                                                       tmp_path: Path) -> None:
    run(home, tmp_path / "run", max_steps=6)
    small = 20_000  # bytes a file may have from now on: a disk that is full, as the system sees it
    done = subprocess.run(
        [sys.executable, "train.py", *argv(home, tmp_path / "run")], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (small, small)))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "Could not save" in done.stderr and done.stderr.count("\n") == 1
    assert not list((tmp_path / "run").glob("*.tmp"))
    run(home, tmp_path / "run")
    assert_same_run(straight, tmp_path / "run")


def test_nonfinite_loss_stops_before_the_update(home: Path, straight: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/ckpt_002")
    plain = train.train_step

    def poisoned(run: train.TrainState, *rest: Any) -> dict[str, Any]:
        with torch.no_grad():
            run.model.model.norm.weight[3] = torch.nan
        return plain(run, *rest)

    monkeypatch.setattr(train, "train_step", poisoned)
    with pytest.raises(UserError, match=r"Step 13: loss nan.*update was not made.*chunk 2; the"
                                        r" loss is not finite on rank 0: sequence \d+ \((prose|"
                                        r"code)\).*--step=13.*ckpt_001"):
        run(home, tmp_path / "run")
    assert len(metrics(tmp_path / "run")) == 12
    monkeypatch.undo()
    run(home, tmp_path / "run")
    assert_same_run(straight, tmp_path / "run")


# ---- what a checkpoint is


def test_weights_and_moments_are_saved_in_float32(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "run", dtype="bfloat16", max_steps=2)
    saved = tensors(tmp_path / "run/step_0000002")
    floats = {k: v for k, v in saved.items() if v.is_floating_point()}
    assert len(floats) > 60 and {v.dtype for v in floats.values()} == {torch.float32}
    # ... and carry more than bfloat16 can: a save that rounded on the way would pass the line above
    weight = saved["lm_head.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())


def test_manifest_ties_checkpoint_to_data(home: Path, straight: Path) -> None:
    data, before = load_data(home / "data").manifest, {}
    for chunk in range(3):
        m = ckpt.read_manifest(straight / f"ckpt_{chunk:03d}")
        step = 6 * (chunk + 1)
        assert (m["step"], m["chunk"], m["tokens"]) == (step, chunk, step * 256)
        assert m["chunk_sha256"] == data["chunks"][chunk]["sha256"]
        assert m["config"]["hidden_size"] == 32 and m["environment"]["threads"] == 1
        assert m["parent"] == before
        before = {"checkpoint": f"ckpt_{chunk:03d}", "weights_sha256": m["weights_sha256"]}


def test_old_states_and_rolling_checkpoints_go(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "run", save_minutes=1e-9, keep_train_state=2, keep_rolling=2)
    names = [p.name for p in ckpt.list_checkpoints(tmp_path / "run")]
    assert names == ["ckpt_000", "ckpt_001", "step_0000016", "step_0000017", "ckpt_002"]
    has_state = [(tmp_path / "run" / n / "train_state").exists() for n in names]
    assert has_state == [False, False, False, True, True]
    assert ckpt.verify_checkpoint(tmp_path / "run/ckpt_000") == ""
    assert "train_state is missing" in ckpt.verify_checkpoint(tmp_path / "run/ckpt_000", True)


def test_resume_settings(home: Path, straight: Path, tmp_path: Path) -> None:
    for settings, sentence in (
            ({"resume": "true", "run_dir": tmp_path / "none"}, "has no usable checkpoint"),
            ({"resume": "false"}, "already holds a run"),
            ({"resume": tmp_path / "nowhere"}, "Passing over .*nowhere: manifest"),
            ({"seed": 3, "max_steps": 99}, "was trained with seed = 11111, now it is 3"),
            ({"hidden_size": 64, "max_steps": 99}, "hidden_size is 32 there, 64 here"),
            ({"vocab_size": 200}, "set vocab_size and seq_len alike"),
            ({"data_dir": tmp_path / "no_data"}, "no_data"),
            ({"device": "cuda:99"}, "device = 'cuda:99' cannot be used here")):
        with pytest.raises(UserError, match=sentence):
            train.main(argv(home, settings.pop("run_dir", straight), **settings))


def test_init_from_takes_the_weights_alone(home: Path, straight: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "run", init_from=straight / "ckpt_001", max_steps=1, learning_rate=1e-12,
        min_learning_rate=0)
    old, new = tensors(straight / "ckpt_001"), tensors(tmp_path / "run/step_0000001")
    for key in old:
        if not key.endswith(("exp_avg", "exp_avg_sq")):
            torch.testing.assert_close(old[key], new[key], rtol=0, atol=1e-9)
    m = ckpt.read_manifest(tmp_path / "run/step_0000001")
    assert m["step"] == 1 and m["started_from"]["step"] == 12


# ---- validation and evaluation


def test_validation_touches_nothing(home: Path, straight: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "run", eval_interval=1, eval_sequences=3, sample_tokens=9)
    for chunk in range(3):
        a, b = (tensors(p / f"ckpt_{chunk:03d}") for p in (straight, tmp_path / "run"))
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_validation_is_exact_for_every_batch(home: Path, straight: Path) -> None:
    config, _ = load(argv(home, straight))
    net, data = build_for_inference(config), load_data(config.data_dir)
    ckpt.load_weights(net, straight / "ckpt_002")
    results = [evaluation.validate(net, data, None, batch) for batch in (1, 4, 64)]
    for source in ("prose", "code"):
        x = torch.from_numpy(data.validation(source)["token_ids"].astype(np.int64))
        with torch.no_grad():
            logits = net(x[:, :-1]).flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, x[:, 1:].flatten())
        ids = [i for i in x[:, 1:].flatten().tolist() if i != data.tokenizer.eos_id]
        size = sum(len(data.tokenizer.decode([i]).encode()) for i in ids)
        bits = loss.item() / np.log(2) * x[:, 1:].numel() / size
        for r in results:
            assert r[source]["loss"] == pytest.approx(loss.item(), rel=1e-5)
            assert r[source]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


# If a change is meant to change results, `python tests/test_train.py RUN_DIR` prints new ones.
GOLDEN = [
    5.7043, 5.65724, 5.36445, 5.0653, 4.71484, 4.49268, 4.27806, 4.10892, 4.01923,
    3.88362, 3.85057, 3.80167, 3.78028, 3.7176, 3.69671, 3.73831, 3.81098, 3.7233,
]

if __name__ == "__main__":
    print([round(r["loss"], 5) for r in metrics(Path(sys.argv[1]))])
