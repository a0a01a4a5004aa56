"""The loop: same bits however it is interrupted, nothing lost, nothing half-written."""

import functools
import os
import random
import re
import resource
import shutil
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import jsonl, sentences
from launch import ROOT, Script, outputs
from torch import nn
from torch.distributed import HashStore

import audit
import checkpoint as ckpt
import eval as evaluation
import parallel
import prepare_data
import train
from configs import Config, UserError, load
from data import Data, load_data, lock_directory, read_json, step_sequences
from model import LLaMA

# 3 chunks of 6 steps of 8 sequences; the text is made up, the same on every machine.
CONFIG = """
hidden_size, intermediate_size, num_hidden_layers, num_attention_heads = 32, 64, 2, 2
vocab_size, seq_len, n_chunks, sequences_per_chunk, valid_sequences = 300, 32, 3, 50, 6
global_batch_size, micro_batch_size, eval_sequences, eval_interval = 8, 4, 6, 4
learning_rate, min_learning_rate, warmup_steps = 1e-2, 1e-3, 3
dtype, threads, sample_tokens, workers, keep_train_state = "float32", 1, 4, 1, 0
"""
STEPS = 18


@functools.cache
def home() -> Path:
    """A folder with the config and its prepared data; gone with pytest."""
    home = Path(outputs().name) / "home"
    texts = [sentences(i, 25) for i in range(30)]
    sources = {"prose": jsonl(home / "prose.jsonl", texts[:14]),
               "code": jsonl(home / "code.jsonl", texts[10:])}
    (home / "mini.py").write_text(
        CONFIG + f"sources = {sources!r}\ndata_dir = {str(home / 'data')!r}\n")
    prepare_data.main([str(home / "mini.py")])
    return home


@functools.cache
def straight() -> Path:
    """The run that nothing disturbed."""
    return run(home() / "straight")


def argv(run_dir: Path | str, **settings: Any) -> list[str]:
    words = {"run_dir": run_dir} | settings
    return [str(home() / "mini.py"), *(f"--{key}={value}" for key, value in words.items())]


def run(run_dir: Path, **settings: Any) -> Path:
    train.main(argv(run_dir, **settings))
    return run_dir


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of that run, to be changed."""
    return Path(shutil.copytree(straight(), tmp_path / "run"))


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, weights and optimizer state, by name."""
    state = dict(ckpt.read_tensors(checkpoint / "train_state", "optimizer"))
    return state | dict(ckpt.read_tensors(checkpoint))


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return ckpt.read_records(run_dir / "metrics.jsonl")


def assert_same_tensors(a: Path, b: Path) -> None:
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys() and len(ours) > 40
    assert all(torch.equal(ours[k], theirs[k]) for k in ours), a.name


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: weights, optimizer state, and everything logged but the clock."""
    kept = [[path for path in ckpt.list_checkpoints(run) if path.name.startswith("ckpt_")]
            for run in (a, b)]
    for x, y in zip(*kept, strict=True):
        assert_same_tensors(x, y)
    # A run that max_steps ends validates there too: that is logged, and changes nothing.
    timed = {"tokens_per_s", "data_s", "valid"}
    records = [[{k: v for k, v in r.items() if k not in timed} for r in metrics(p)]
               for p in (a, b)]
    assert records[0] == records[1]
    assert [r["step"] for r in records[0]] == list(range(1, len(records[0]) + 1))
    logs = [(path / "train.log").read_text().splitlines() for path in (a, b)]
    assert len({tuple(dict.fromkeys(x for x in log if "sample: " in x)) for log in logs}) == 1


def background(run_dir: Path, until: int = 0, **settings: Any) -> Script:
    """Start train.py as a process and return when it has logged `until` steps."""
    process = Script("train.py", *argv(run_dir, **settings))
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up and process.poll() is None and len(metrics(run_dir)) < until:
        time.sleep(0.005)
    return process


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- the schedule and the step


def test_learning_rate_is_a_pure_function_of_the_step() -> None:
    c = Config(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=4)
    rates = [train.learning_rate(c, step, 12) for step in range(1, 13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert (rates[7], rates[11]) == (pytest.approx(0.55), pytest.approx(0.1))
    c.warmup_offset = 0  # as Amber's
    assert [train.learning_rate(c, step, 12) for step in (1, 2, 5)] == [0, 0.25, 1.0]
    c.lr_schedule = "constant"  # test_crystal.py has the linear one
    assert train.learning_rate(c, 12, 12) == 1.0


def test_golden_losses() -> None:
    """A change that must not change results leaves these as they are."""
    assert [r["loss"] for r in metrics(straight())] == pytest.approx([
        5.7043, 5.65724, 5.36445, 5.0653, 4.71484, 4.49268, 4.27806, 4.10892, 4.01923,
        3.88362, 3.85057, 3.80167, 3.78028, 3.7176, 3.69671, 3.73831, 3.81098, 3.7233], rel=2e-4)


def test_the_first_update_is_adamw_on_the_mean_loss(tmp_path: Path) -> None:
    """One step of the loop against plain PyTorch on the same eight sequences."""
    config, _ = load(argv(run(tmp_path / "run", max_steps=1, grad_clip=0.5)))
    data = load_data(config.data_dir)
    chunk = data.chunk(0)[step_sequences(config.seed, 0, len(data.chunk(0)), 0, 8)]
    x = torch.from_numpy(chunk["token_ids"].astype(np.int64))
    net = LLaMA(config)
    net.init_weights(config.seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2 / 3, betas=(0.9, 0.95), eps=1e-8,
                                  weight_decay=0.1)
    losses = nn.functional.cross_entropy(net(x[:, :-1]).mT, x[:, 1:], reduction="none").mean(1)
    losses.mean().backward()
    nn.utils.clip_grad_norm_(net.parameters(), 0.5)
    optimizer.step()
    saved = tensors(tmp_path / "run/step_0000001")
    for name, p in net.named_parameters():
        torch.testing.assert_close(saved[name], p.data, rtol=2e-3, atol=2e-4)
    [record] = metrics(tmp_path / "run")
    assert record["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    for number, name in enumerate(data.sources):
        expected = losses[torch.from_numpy(chunk["source"] == number)].mean().item()
        assert record["loss_by_source"][name] == pytest.approx(expected, abs=2e-5)


def test_compile_makes_one_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for all blocks, sharded by FSDP and partly recomputed; validation adds none."""
    # Imported here: the processes of test_distributed.py import this file, and not the compiler.
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compile_with = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_with(self, backend=counter))
    torch.compiler.reset()
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        run(tmp_path / "run", compile=True, activation_checkpointing="full", max_steps=6)
    finally:
        torch.distributed.destroy_process_group()
    assert counter.frame_count == 1
    losses = [[r["loss"] for r in metrics(path)][:6] for path in (straight(), tmp_path / "run")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def documented(word: str) -> str:
    """The code in docs/scale.md that has a word."""
    blocks = re.findall(r"(?:^    .*\n)+", (ROOT / "docs/scale.md").read_text(), re.M)
    [code] = [block for block in blocks if word in block]
    return textwrap.dedent(code)


def muon() -> Any:
    """The make_optimizers of docs/scale.md: Muon and AdamW."""
    names = {"torch": torch, "Config": Config, "LLaMA": LLaMA}
    exec(documented("def make_optimizers"), names)
    return names["make_optimizers"]


def test_a_logger_gets_every_number(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[dict] = []
    logger = SimpleNamespace(init=lambda **_: SimpleNamespace(log=lambda r, step: got.append(r)))
    monkeypatch.setitem(sys.modules, "wandb", logger)
    monkeypatch.setattr(sys, "stdin", (straight() / "metrics.jsonl").open())
    exec(documented("import json, sys, wandb"), {})
    record = metrics(straight())[-1]
    assert len(got) == STEPS and got[-1]["loss"] == record["loss"]
    assert got[-1]["valid/code/bits_per_byte"] == record["valid"]["code"]["bits_per_byte"]


# ---- interrupted


def test_stopped_and_resumed_is_the_straight_run(tmp_path: Path) -> None:
    for last in (4, 11, 0):  # inside a chunk; then past a chunk's end; then to the end
        run(tmp_path / "run", max_steps=last)
    assert_same_run(straight(), tmp_path / "run")


def test_killed_at_any_instant_loses_no_run(tmp_path: Path) -> None:
    """A signal that lets it save, then kill -9 at random instants, some of them inside a save."""
    draw, run_dir = random.Random(1), tmp_path / "run"
    for number in (signal.SIGUSR1, signal.SIGKILL, signal.SIGKILL):
        already = len(metrics(run_dir))
        process = background(run_dir, until=already + draw.randint(1, 4), save_minutes=0.0001)
        time.sleep(draw.random() * 0.05)
        process.send_signal(number)
        text, _ = process.communicate(timeout=60)
        if number == signal.SIGUSR1:
            assert "SIGUSR1: saved at step" in text and "To go on: python train.py" in text
            newest = ckpt.list_checkpoints(run_dir)[-1]
            assert ckpt.read_manifest(newest)["step"] == metrics(run_dir)[-1]["step"] >= 1
    run(run_dir)
    assert_same_run(straight(), run_dir)
    assert not list(run_dir.glob("*.tmp"))


def test_two_epochs_read_everything_twice_and_resume(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", epochs=2)
    for last in (20, 0):
        parts = run(tmp_path / "parts", epochs=2, max_steps=last)
    assert_same_run(whole, parts)
    run(whole)  # with one epoch the run is finished: nothing is set aside
    assert ckpt.list_checkpoints(whole)[-1].name == "ckpt_005"
    losses = [r["loss"] for r in metrics(whole)]
    assert len(losses) == 36 and losses[18:] != losses[:18]
    audit.main([str(whole), "--replay=4"])  # the second pass is replayed as the first is


def faulty(where: str, steps: list[int], rank: int = 0, micro: int = 1) -> tuple[Any, Any]:
    """LLaMA.forward and train_step in which one micro-batch of these steps (from 1) in one process
    makes the loss or its gradient NaN, as data that always gives one would (or once, for "slip"),
    or gets a signal."""
    plain, train_step, now = LLaMA.forward, train.train_step, {}

    def counted(run: train.Run, *rest: Any) -> dict[str, Any]:
        now.update(step=run.step + 1, micro=0)
        return train_step(run, *rest)

    def forward(self: LLaMA, ids: torch.Tensor, targets: Any = None, **rest: Any) -> Any:
        out = plain(self, ids, targets, **rest)
        if targets is None or not torch.is_grad_enabled():
            return out
        now["micro"] += 1
        if now["step"] not in steps or (parallel.rank(), now["micro"]) != (rank, micro):
            return out
        loss, token_losses = out
        if where == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        elif where == "gradient":
            loss.register_hook(lambda gradient: gradient * torch.nan)
        else:
            token_losses[0], loss = torch.nan, loss * torch.nan
            if where == "slip":
                steps.clear()
        return loss, token_losses

    return forward, counted


def test_a_chunk_that_gives_nan_is_left_out_and_made_up_for(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """NaN at step 8, in chunk 1; a rolling checkpoint of step 7 has trained on that chunk."""
    for owner, name, new in zip((LLaMA, train), ("forward", "train_step"), faulty("loss", [8])):
        monkeypatch.setattr(owner, name, new)
    with pytest.raises(UserError, match=r"Step 8: loss nan.*not made. It was chunk 1; the loss is"
                       r" not finite on sequence \d+ \((prose|code)\).*`skip_chunks = \[1\]`"):
        run(tmp_path / "run", save_minutes=1e-9)
    assert len(metrics(tmp_path / "run")) == 7  # and the checkpoint of step 7 was published
    monkeypatch.undo()
    run(tmp_path / "run", skip_chunks=[1])
    text = capsys.readouterr().out
    assert "step_0000007: it was trained with skip_chunks = [], now [1]" in text
    assert "step_0000007 is now step_0000007.aside" in text
    records = metrics(tmp_path / "run")
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert [r["chunk"] for r in records] == [0] * 6 + [2] * 6 + [0] * 6
    assert [p.name for p in ckpt.list_checkpoints(tmp_path / "run")] == [
        "ckpt_000", "ckpt_002", "ckpt_003"]
    for owner, name, new in zip((LLaMA, train), ("forward", "train_step"), faulty("slip", [8])):
        monkeypatch.setattr(owner, name, new)
    run(tmp_path / "again", skip_chunks=[1])
    assert "Step 8 is not finite, and is computed once more." in capsys.readouterr().out
    assert_same_run(tmp_path / "run", tmp_path / "again")
    with pytest.raises(UserError, match=r"no usable checkpoint.*skip_chunks = \[1\], now \[0\]"):
        run(tmp_path / "again", skip_chunks=[0])


# ---- damaged


def flip(path: Path) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file, damage", [
    ("model.safetensors", flip), ("train_state/optimizer.safetensors", flip),
    ("manifest.json", flip), ("tokenizer.json", Path.unlink)])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
        copy: Path, capsys: pytest.CaptureFixture, file: str,
        damage: Callable[[Path], None]) -> None:
    damage(copy / "ckpt_002" / file)
    run(copy)
    text = capsys.readouterr().out
    assert "Passing over" in text and "ckpt_002 is now ckpt_002.aside" in text
    assert "ckpt_001, step 12" in text
    assert_same_run(straight(), copy)


def test_a_chunk_with_a_flipped_bit_is_not_trained_on(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is hashed during the chunk before: the last step of chunk 0 waits for that."""
    shutil.copytree(home() / "data", tmp_path / "data")
    begun, verify, step = threading.Event(), Data.verify_file, train.train_step
    monkeypatch.setattr(Data, "verify_file", lambda data, file: (
        file["file"] == "train/chunk_001.npy" and begun.set()) or verify(data, file))
    monkeypatch.setattr(train, "train_step", lambda run, *rest: (
        run.step != 5 or begun.wait(20)) and step(run, *rest))
    flip(tmp_path / "data/train/chunk_001.npy")
    with pytest.raises(UserError, match="chunk_001.npy"):
        run(tmp_path / "run", data_dir=tmp_path / "data")
    assert metrics(tmp_path / "run")[-1]["step"] == 6  # chunk 0 is done, and saved
    monkeypatch.undo()
    shutil.copy(home() / "data/train/chunk_001.npy", tmp_path / "data/train")
    run(tmp_path / "run", data_dir=tmp_path / "data")
    assert_same_run(tmp_path / "run", straight())


def test_a_run_is_never_written_over(copy: Path) -> None:
    for path in ckpt.list_checkpoints(copy):
        shutil.rmtree(path / "train_state")
    before = contents(copy)
    with lock_directory(copy), pytest.raises(UserError, match="is in use by another"):
        run(copy)
    with pytest.raises(UserError, match="no usable checkpoint to resume.*train_state.* is missing"):
        run(copy)
    assert before == contents(copy)


def test_a_save_that_fails_says_so_and_leaves_the_rest(tmp_path: Path) -> None:
    run(tmp_path / "run", max_steps=6)
    process = background(tmp_path / "run")
    # No file may be longer from now on: a disk that is full, as the system sees it.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "Could not save" in text and "Traceback" not in text
    assert not list((tmp_path / "run").glob("*.tmp"))
    run(tmp_path / "run")
    assert_same_run(straight(), tmp_path / "run")


def test_saving_and_validating_at_every_step_changes_nothing(tmp_path: Path) -> None:
    """And old states, rolling checkpoints and what a kill has left are deleted."""
    (tmp_path / "run/ckpt_000.tmp/train_state").mkdir(parents=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "run/ckpt_001.tmp").symlink_to(tmp_path / "thesis")
    (tmp_path / "run/trace.json").symlink_to(tmp_path / "nothing")
    run(tmp_path / "run", save_minutes=1e-9, keep_train_state=2, keep_rolling=2,
        eval_interval=1, eval_sequences=3, sample_tokens=9, profile_step=5)
    assert read_json(tmp_path / "run/trace.json")["traceEvents"]
    assert not (tmp_path / "nothing").exists()
    names = [p.name for p in ckpt.list_checkpoints(tmp_path / "run")]
    assert names == ["ckpt_000", "ckpt_001", "step_0000016", "step_0000017", "ckpt_002"]
    has_state = [(tmp_path / "run" / n / "train_state").exists() for n in names]
    assert has_state == [False, False, False, True, True]
    assert not [*(tmp_path / "run").glob("*.tmp")] and (tmp_path / "thesis").exists()
    assert_same_tensors(straight() / "ckpt_002", tmp_path / "run/ckpt_002")


def test_a_finished_run_is_left_as_it_is_and_other_settings_are_refused(
        tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before = contents(straight())
    run(straight(), learning_rate=1e-3)
    text = capsys.readouterr().out
    assert "is finished: 18 steps. --epochs=2" in text and "another --run_dir" in text
    for settings, sentence in (
            ({"seed": 3, "max_steps": 99}, "trained with seed = 11111, now 3"),
            ({"hidden_size": 64, "max_steps": 99}, "trained with hidden_size = 32, now 64"),
            ({"micro_batch_size": 3}, r"global_batch_size \(8\) must be a multiple of .*"
             "micro_batch_size=1 would do"),
            ({"num_hidden_layers": 10, "hidden_size": 65536}, r"needs [\d,.]+ GB here .* GB")):
        with pytest.raises(UserError, match=sentence):
            run(straight(), **settings)
    assert before == contents(straight())
    with pytest.raises(UserError, match="nothing to train on"):
        run(tmp_path / "none", skip_chunks=[0, 1, 2])
    assert not (tmp_path / "none").exists()


def test_validation_is_exact_for_every_batch() -> None:
    config, _ = load(argv(straight()))
    net, data = parallel.build_for_inference(config), load_data(config.data_dir)
    ckpt.load_weights(net, straight() / "ckpt_002")
    for batch in (1, 4, 64):
        result = evaluation.validate(net, data, None, batch)
        for source in ("prose", "code"):
            x = torch.from_numpy(data.validation(source)["token_ids"].astype(np.int64))
            loss = nn.functional.cross_entropy(net(x[:, :-1]).mT, x[:, 1:]).item()
            assert result[source]["loss"] == pytest.approx(loss, rel=1e-5)
            bytes_per_token = data.tokenizer.token_bytes[x[:, 1:].numpy()].mean()
            assert result[source]["bits_per_byte"] == pytest.approx(
                loss / np.log(2) / bytes_per_token, rel=1e-5)
