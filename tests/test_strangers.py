"""What a stranger's run directory may do (nothing), and what a run outlives."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, jsonl, sentences

import checkpoint as ckpt
import eval as evaluation
import memorize
import prepare_data
import train
from configs import UserError

CONFIG = """
hidden_size, intermediate_size, num_hidden_layers, num_attention_heads = 32, 64, 2, 2
vocab_size, seq_len, n_chunks, valid_sequences, sequences_per_chunk = 300, 32, 2, 8, 32
global_batch_size, micro_batch_size, warmup_steps, sample_tokens, eval_interval = 8, 8, 2, 4, 2
dtype, device, threads, keep_train_state = "float32", "cpu", 1, 1
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, its data, and a run of the first of two chunks."""
    home = tmp_path_factory.mktemp("home")
    source = jsonl(home / "a.jsonl", [sentences(i, 40) for i in range(12)])
    (home / "mini.py").write_text(f"{CONFIG}sources = {{'a': {source!r}}}\n"
                                  f"data_dir, run_dir = {str(home / 'data')!r}, '{home}/run'\n")
    prepare_data.main([str(home / "mini.py")])
    train.main([str(home / "mini.py"), "--max_steps=4"])
    return home


def content(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["link", "pipe", "hard link"])
def test_a_run_touches_nothing_but_itself(home: Path, tmp_path: Path, kind: str) -> None:
    run, ours = tmp_path / "run", shutil.copytree(home / "run", tmp_path / "ours")
    shutil.copytree(ours, run, copy_function=os.link)
    for name in "train.log lock eval.jsonl memorization.json.tmp config.json.tmp".split():
        if kind == "link" or kind == "pipe" and name != "eval.jsonl":
            (run / name).unlink(missing_ok=True)
            (run / name).symlink_to(ours / name) if kind == "link" else os.mkfifo(run / name)
    if kind == "link":  # the second chunk drops the training state of the first
        shutil.rmtree(run / "ckpt_000")
        for link, target in (("ckpt_000", "ckpt_000"), ("ckpt_001", "no"), ("step_0000009", ".")):
            (run / link).symlink_to(ours / target)
    before = content(ours)
    train.main([str(run), "--max_steps=0"])
    evaluation.main([str(run)])
    memorize.main([str(run), "--k=8", "--l=8"])
    assert content(ours) == before and len(ckpt.read_metrics(run)) == 8
    assert len(ckpt.read_records(run / "eval.jsonl")) == 6 and (run / "train.log").is_file()
    with pytest.raises(UserError, match="stranger"):
        prepare_data.main([str(run)])


@pytest.mark.parametrize("stdout", ["2>&1 | head -c 9", ">&- 2>&-"])
def test_a_run_outlives_its_listener(home: Path, tmp_path: Path, stdout: str) -> None:
    (tmp_path / "run/train.log").mkdir(parents=True)  # cannot be written either
    command = f"{sys.executable} {ROOT}/train.py {home}/mini.py --run_dir={tmp_path}/run {stdout}"
    subprocess.run(command, shell=True, check=True, stdout=None, timeout=100)
    assert ckpt.verify_checkpoint(tmp_path / "run/ckpt_001", train_state=True) == ""


def test_a_run_that_cannot_be_written_to_is_shown(
        home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def refuse(path: Path, *how: str) -> None:
        raise OSError(30, "Read-only file system", str(path))

    for module in ("data", "checkpoint"):
        monkeypatch.setattr(f"{module}.open_ours", refuse)
    evaluation.main([str(home / "run")])
    assert "bits per byte" in (text := capsys.readouterr().out) and "Read-only" in text
