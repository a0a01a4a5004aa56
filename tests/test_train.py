"""The loop: same bits however it is interrupted, nothing lost, nothing half-written."""

import json
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from launch import Script

import eval as evaluation
import prepare_data
import train
from configs import Config, load
from model import LLaMA, export

# 3 chunks of 6 steps of 8 rows; the text is made up, so that it is the same on every machine.
CONFIG = """
hidden_size, intermediate_size, num_hidden_layers, num_attention_heads = 32, 64, 2, 2
vocab_size, seq_len, n_chunks, rows_per_chunk, valid_rows = 300, 32, 3, 50, 6
global_batch_size, micro_batch_size, eval_rows, eval_interval = 8, 4, 6, 4
learning_rate, min_learning_rate, warmup_steps = 1e-2, 1e-3, 3
dtype, threads, sample_tokens, workers, keep_train_state = "float32", 1, 4, 1, 0
"""
STEPS = 18


def words(seed: int, n: int) -> str:
    """Text of a made-up language: Zipf-distributed words, sentences, lines."""
    draw = random.Random(seed)
    lexicon = ["".join(draw.choices("aeioulnrst", k=draw.randint(2, 7))) for _ in range(200)]
    weights = [1 / (i + 1) for i in range(200)]
    return "\n".join(" ".join(draw.choices(lexicon, weights, k=9)) + "." for _ in range(n))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config and its prepared data."""
    home = tmp_path_factory.mktemp("home")
    for seed, name in enumerate(("prose", "code")):
        rows = [json.dumps({"text": words(10 * seed + i, 25)}) for i in range(14 + 6 * seed)]
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
    found = {}
    for part in ("model", "train_state"):
        reader = dcp.FileSystemReader(checkpoint / part)
        meta = reader.read_metadata().state_dict_metadata
        state = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in meta.items()
                 if hasattr(m, "size")}
        dcp.load(state, storage_reader=reader, no_dist=True)
        found |= {f"{part}/{k}": v for k, v in state.items()}
    return found


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return train.read_records(run_dir / "metrics.jsonl")


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: weights, optimizer, random state, and everything logged but the clock."""
    for x, y in zip(sorted(a.glob("ckpt_*")), sorted(b.glob("ckpt_*")), strict=True):
        ours, theirs = tensors(x), tensors(y)
        assert ours.keys() == theirs.keys() and len(ours) > 60
        assert all(torch.equal(ours[k], theirs[k]) for k in ours), x.name
    # A run that max_steps ends validates there too: that is logged, and changes nothing.
    timed = {"tokens_per_s", "mfu", "memory_gb", "data_s", "valid"}
    records = [[{k: v for k, v in r.items() if k not in timed} for r in metrics(p)]
               for p in (a, b)]
    assert records[0] == records[1] and [r["step"] for r in records[0]] == list(range(1, STEPS + 1))


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
    assert train.micro_batches(config, 224) == 1 and train.micro_batches(config, 32) == 7
    config.global_batch_size = 2000
    with pytest.raises(SystemExit, match=r"processes \(10 x 224 = 2240\); 2240 would do"):
        train.micro_batches(config, 224)


def test_loss_by_source_weighs_up_to_the_loss(home: Path, straight: Path) -> None:
    config, _ = load(argv(home, straight))
    manifest = prepare_data.load_manifest(config.data_dir)
    names = [s["name"] for s in manifest["sources"]]
    for r in metrics(straight):
        chunk, at = prepare_data.locate(manifest, 8, r["step"] - 1)
        rows = prepare_data.open_chunk(config.data_dir, manifest, chunk)
        ids = prepare_data.step_rows(config.seed, chunk, len(rows), at, 8)
        counts = np.bincount(rows[ids]["source"], minlength=2)
        mean = sum(r["loss_by_source"].get(n, 0) * k for n, k in zip(names, counts)) / 8
        assert r["loss"] == pytest.approx(mean, abs=2e-5)


def test_the_first_update_is_adamw_on_the_mean_loss(home: Path, tmp_path: Path) -> None:
    """One step of the loop against plain PyTorch on the same eight rows."""
    config, _ = load(argv(home, run(home, tmp_path / "run", max_steps=1, grad_clip=0.5)))
    manifest = prepare_data.load_manifest(config.data_dir)
    rows = prepare_data.open_chunk(config.data_dir, manifest, 0)
    x = torch.from_numpy(rows[prepare_data.row_order(config.seed, 0, len(rows))[:8]]["token_ids"]
                         .astype(np.int64))
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
        torch.testing.assert_close(saved[f"model/{name}"], p.data, rtol=2e-3, atol=2e-4)


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
    assert train.checkpoints(tmp_path / "run")[-1].exists() and 2 <= step <= STEPS
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


def test_two_processes_on_one_run_are_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lock = train.only_one(tmp_path / "run")
    with pytest.raises(SystemExit, match="is in use by another process"):
        run(home, tmp_path / "run")
    lock.close()


# ---- a chunk or a step left out


def test_a_skipped_chunk_is_made_up_for_and_the_ledger_is_all_it_takes(
        home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in chunk 1 wherever it is met, in chunk 0 when it is met again, later in the run."""
    plain, bad = train.train_step, {8: 1, 14: 1}  # step -> times

    def poisoned(run: train.Run, *rest: Any) -> dict[str, Any]:
        if bad.get(run.step + 1):
            bad[run.step + 1] -= 1
            raise train.NonFinite("loss nan, gradient norm nan", np.ones(8, dtype=bool))
        return plain(run, *rest)

    monkeypatch.setattr(train, "train_step", poisoned)
    run(home, tmp_path / "run", on_nonfinite="skip_chunk", save_minutes=1e-9)
    monkeypatch.undo()
    records = metrics(tmp_path / "run")
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert [r["chunk"] for r in records] == [0] * 6 + [2] * 12
    assert [p.name for p in train.checkpoints(tmp_path / "run") if "ckpt" in p.name] == [
        "ckpt_000", "ckpt_002", "ckpt_005"]
    ledger = train.read_records(tmp_path / "run/ledger.jsonl")
    skips = [r for r in ledger if r["event"] == "skip_chunk"]
    assert [(r["place"], r["chunk"], r["step"]) for r in skips] == [(1, 1, 7), (3, 0, 13)]
    assert len(skips[0]["rows"]["rank 0"]) == 8
    (tmp_path / "again").mkdir()
    stale = {"event": "skip_step", "step": 7, "place": 1}  # of the chunk that is then left out
    for entry in (stale, *skips):
        train.append_record(tmp_path / "again/ledger.jsonl", entry)
    with open(tmp_path / "again/ledger.jsonl", "a") as f:
        f.write('{"event": "skip_ch')  # killed in a write
    for last in (9, 14, 0):
        run(home, tmp_path / "again", max_steps=last)
    assert_same_run(tmp_path / "run", tmp_path / "again")
    train.main(argv(home, tmp_path / "run", replay=5))
    config, _ = load(argv(home, tmp_path / "run"))
    manifest = prepare_data.load_manifest(config.data_dir)
    assert prepare_data.skipped_places(config.run_dir) == [1, 3]
    assert prepare_data.locate(manifest, 8, 12, [1, 3]) == (5, 0)
    with pytest.raises(SystemExit, match="chunks left out: 3"):
        prepare_data.locate(manifest, 8, 12, [1, 3, 5])
    short = tmp_path / "short"
    short.mkdir()
    train.append_record(short / "ledger.jsonl", skips[0])
    run(home, short, make_up=False)
    assert [r["chunk"] for r in metrics(short)] == [0] * 6 + [2] * 6


def test_a_skipped_step_stays_skipped(home: Path, tmp_path: Path) -> None:
    for name, stops in (("run", (0,)), ("again", (2, 4, 0))):
        (tmp_path / name).mkdir()
        train.append_record(tmp_path / name / "ledger.jsonl", {"event": "skip_step", "step": 2})
        for last in stops:
            run(home, tmp_path / name, max_steps=last)
    assert_same_run(tmp_path / "run", tmp_path / "again")
    assert [r["step"] for r in metrics(tmp_path / "run") if "skipped" in r] == [3]


# ---- replay and dry run


def test_replay(home: Path, straight: Path, tmp_path: Path,
                capsys: pytest.CaptureFixture) -> None:
    for chunk, before in ((0, "the initial weights"), (2, "ckpt_001")):
        train.main(argv(home, straight, replay=chunk, learning_rate=2e-2))  # the run's own counts
        text = capsys.readouterr().out
        assert re.search(rf"ckpt_00{chunk} is what chunk {chunk} makes of \S*{before}: 8\d tensors,"
                         " bit for bit", text)
    other = run(home, tmp_path / "other", learning_rate=9e-3, max_steps=6)
    shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/ckpt_000")
    shutil.copytree(other / "ckpt_000", tmp_path / "run/ckpt_000")
    with pytest.raises(SystemExit, match=r"is not what chunk 1 makes of .*ckpt_000 here: \d+ of 8\d"
                                         r" tensors differ, the first is model/.*, by up to \d"):
        train.main(argv(home, tmp_path / "run", replay=1))
    shutil.rmtree(tmp_path / "run/ckpt_000/train_state")
    with pytest.raises(SystemExit, match="ckpt_000: train_state is missing.*keep_train_state"):
        train.main(argv(home, tmp_path / "run", replay=1))
    with pytest.raises(SystemExit, match="ckpt_007 cannot be replayed: manifest.json is missing"):
        train.main(argv(home, tmp_path / "run", replay=7))


def test_dry_run_of_amber_is_amber(capsys: pytest.CaptureFixture) -> None:
    """582.4k tokens/s on 224 A100, 25 days (paper); 762 steps in each of 360 chunks."""
    pytest.importorskip("triton")
    train.main(["configs/amber_7b.py", "--dry_run", "--world_size=224"])
    text = capsys.readouterr().out
    numbers = re.search(r"time: ([\d.]+) days at ([\d,]+) tokens/s", text)
    assert float(numbers[1]) == pytest.approx(25.0, rel=0.01)
    assert int(numbers[2].replace(",", "")) == pytest.approx(582_400, rel=0.01)
    assert "6,738,415,616" in text and "274,320 = 1,258,448,486,400 tokens" in text
    measured, formula = map(float, re.search(r"in all +(\S+) +(\S+)", text).groups())
    assert formula == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("settings", [
    {}, {"activation_checkpointing": "full"}, {"activation_checkpointing": "selective"},
    {"parallel": "hsdp", "shard_size": 2}, {"parallel": "ddp"}, {"micro_batch_size": 8}])
def test_memory_formula_and_measured_memory_agree(settings: dict[str, Any]) -> None:
    pytest.importorskip("triton")
    config, _ = load(["configs/amber_125m.py", "--num_hidden_layers=8", *(
        f"--{k}={v}" for k, v in settings.items())])
    train.kernels.use("triton", dry=True)
    try:
        measured = train.measure_memory(config, torch.bfloat16, 16)
        formula = train.memory_estimate(config, torch.bfloat16, 16, True)
    finally:
        train.kernels.use("auto")
    assert sum(formula.values()) == pytest.approx(sum(measured.values()), rel=0.25)


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
@pytest.mark.parametrize("file", ["model/__0_0.distcp", "train_state/.metadata", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
        home: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture, how: str,
        file: str) -> None:
    shutil.copytree(straight, tmp_path / "run")
    damage(tmp_path / "run/ckpt_002" / file, how)
    run(home, tmp_path / "run")
    text = capsys.readouterr().out
    if (file, how) != ("manifest.json", "missing"):  # without a manifest it is not a checkpoint
        assert "Passing over" in text and "ckpt_002" in text
    assert "ckpt_001, step 12" in text
    assert_same_run(straight, tmp_path / "run")


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
    plain = train.to_tensors

    def poisoned(rows: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            running[0].model.norm.weight[3] = torch.nan
        return plain(rows, device)

    running: list[LLaMA] = []
    start = train.start
    monkeypatch.setattr(
        train, "start", lambda *a: running.append((r := start(*a)).model) or r)
    monkeypatch.setattr(train, "to_tensors", poisoned)
    with pytest.raises(SystemExit, match=r"Step 13: loss nan.*update was not made.*chunk 2; the"
                                         r" loss is not finite on rank 0: row \d+ \((prose|code)\)"
                                         r".*--show_step=13.*ckpt_001"):
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
    weight = saved["model/lm_head.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())


def test_manifest_ties_checkpoint_to_data(home: Path, straight: Path) -> None:
    data = prepare_data.load_manifest(home / "data")
    for chunk in range(3):
        m = train.read_json(straight / f"ckpt_{chunk:03d}" / "manifest.json")
        step = 6 * (chunk + 1)
        assert (m["step"], m["chunk"], m["tokens"]) == (step, chunk, step * 256)
        assert m["chunk_sha256"] == data["chunks"][chunk]["sha256"]
        assert m["config"]["hidden_size"] == 32 and m["compute"]["threads"] == 1


def test_old_states_and_rolling_checkpoints_go(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "run", save_minutes=1e-9, keep_train_state=2, keep_rolling=2)
    names = [p.name for p in train.checkpoints(tmp_path / "run")]
    assert names == ["ckpt_000", "ckpt_001", "step_0000016", "step_0000017", "ckpt_002"]
    has_state = [(tmp_path / "run" / n / "train_state").exists() for n in names]
    assert has_state == [False, False, False, True, True]
    assert train.problem_of(tmp_path / "run/ckpt_000", ("model",)) == ""
    assert "train_state is missing" in train.problem_of(tmp_path / "run/ckpt_000")


def test_resume_settings(home: Path, straight: Path, tmp_path: Path) -> None:
    for settings, sentence in (
            ({"resume": "true", "run_dir": tmp_path / "none"}, "has no usable checkpoint"),
            ({"resume": "false"}, "already holds a run"),
            ({"resume": tmp_path / "nowhere"}, "nowhere cannot be resumed: manifest"),
            ({"seed": 3, "max_steps": 99}, "was trained with seed = 11111, now it is 3"),
            ({"hidden_size": 64}, "has hidden_size = 32, this config 64"),
            ({"vocab_size": 200}, "set vocab_size and seq_len alike"),
            ({"data_dir": tmp_path / "no_data"}, "no_data"),
            ({"device": "warp"}, "device = 'warp' cannot be used here")):
        with pytest.raises(SystemExit, match=sentence):
            train.main(argv(home, settings.pop("run_dir", straight), **settings))


def test_kernels_that_cannot_run_are_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.kernels._lang, "INSTALLED", False)
    with pytest.raises(SystemExit, match="needs Triton"):
        train.choose_kernels("triton")


def test_init_from_takes_the_weights_alone(home: Path, straight: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "run", init_from=straight / "ckpt_001", max_steps=1, learning_rate=1e-12,
        min_learning_rate=0)
    old, new = tensors(straight / "ckpt_001"), tensors(tmp_path / "run/step_0000001")
    for key in old:
        if key.startswith("model/"):
            torch.testing.assert_close(old[key], new[key], rtol=0, atol=1e-9)
    m = train.read_json(tmp_path / "run/step_0000001/manifest.json")
    assert m["step"] == 1 and m["started_from"]["step"] == 12


# ---- validation and evaluation


def test_validation_touches_nothing(home: Path, straight: Path, tmp_path: Path) -> None:
    run(home, tmp_path / "run", eval_interval=1, eval_rows=3, sample_tokens=9)
    for chunk in range(3):
        a, b = (tensors(p / f"ckpt_{chunk:03d}") for p in (straight, tmp_path / "run"))
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_validation_is_exact_for_every_batch(home: Path, straight: Path) -> None:
    config, _ = load(argv(home, straight))
    net = evaluation.build(config)
    train.load_weights(net, straight / "ckpt_002")
    results = [train.validate(net, config.data_dir, None, batch) for batch in (1, 4, 64)]
    manifest = prepare_data.load_manifest(config.data_dir)
    tokenizer = prepare_data.load_tokenizer(config.data_dir)
    for source in ("prose", "code"):
        rows = prepare_data.open_valid(config.data_dir, manifest, source)
        x = torch.from_numpy(rows["token_ids"].astype(np.int64))
        with torch.no_grad():
            logits = net(x[:, :-1]).flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, x[:, 1:].flatten())
        size = sum(len(tokenizer.decode([i]).encode()) for row in x[:, 1:].tolist() for i in row
                   if i != tokenizer.eos_id)
        bits = loss.item() / np.log(2) * x[:, 1:].numel() / size
        for r in results:
            assert r[source]["loss"] == pytest.approx(loss.item(), rel=1e-5)
            assert r[source]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_hugging_face_directories_are_evaluated_and_trained_on(home: Path, straight: Path,
                                                               tmp_path: Path) -> None:
    """Their forms, and what can be wrong with them, are in test_hub.py."""
    hub, run_dir = tmp_path / "hub", tmp_path / "no_run_yet"
    export(straight / "ckpt_002", hub)
    evaluation.main(argv(home, run_dir, checkpoints=str(hub)))
    ours = metrics(straight)[-1]["valid"]["prose"]["loss"]
    assert train.read_records(run_dir / "eval.jsonl")[0]["result"]["prose"]["loss"] == (
        pytest.approx(ours, rel=1e-5))
    run(home, tmp_path / "tuned", init_from=hub, max_steps=1)


# If a change is meant to change results, `python tests/test_train.py RUN_DIR` prints new ones.
GOLDEN = [
    5.7043, 5.65724, 5.36445, 5.0653, 4.71484, 4.49268, 4.27806, 4.10892, 4.01923,
    3.88362, 3.85057, 3.80167, 3.78028, 3.7176, 3.69671, 3.73831, 3.81098, 3.7233,
]

if __name__ == "__main__":
    print([round(r["loss"], 5) for r in metrics(Path(sys.argv[1]))])
