"""What a stranger's run directory may do (nothing), and what a run outlives."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from test_train import argv, contents

import checkpoint as ckpt
import eval as evaluation
import memorize
import prepare_data
import train
from configs import UserError


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the first of three chunks."""
    path = tmp_path_factory.mktemp("first") / "run"
    train.main(argv(path, max_steps=6, keep_train_state=1))
    return path


@pytest.mark.parametrize("kind", ["link", "pipe", "hard link"])
def test_a_run_touches_nothing_but_itself(first: Path, tmp_path: Path, kind: str) -> None:
    run, ours = tmp_path / "run", shutil.copytree(first, tmp_path / "ours")
    shutil.copytree(ours, run, copy_function=os.link)
    for name in "train.log lock eval.jsonl memorization.json.tmp config.json.tmp".split():
        if kind == "link" or kind == "pipe" and name != "eval.jsonl":
            (run / name).unlink(missing_ok=True)
            (run / name).symlink_to(ours / name) if kind == "link" else os.mkfifo(run / name)
    if kind == "link":  # the second chunk drops the training state of the first
        shutil.rmtree(run / "ckpt_000")
        for link, target in (("ckpt_000", "ckpt_000"), ("ckpt_001", "no"), ("step_0000009", ".")):
            (run / link).symlink_to(ours / target)
    before = contents(ours)
    train.main([str(run), "--max_steps=12"])
    evaluation.main([str(run)])
    memorize.main([str(run), "--k=8", "--l=8"])
    assert contents(ours) == before and len(ckpt.read_metrics(run)) == 12
    assert len(ckpt.read_records(run / "eval.jsonl")) == 6 and (run / "train.log").is_file()
    with pytest.raises(UserError, match="stranger"):
        prepare_data.main([str(run)])


@pytest.mark.parametrize("stdout", ["2>&1 | head -c 9", ">&- 2>&-"])
def test_a_run_outlives_its_listener(tmp_path: Path, stdout: str) -> None:
    (tmp_path / "run/train.log").mkdir(parents=True)  # cannot be written either
    words = " ".join(argv(tmp_path / "run"))
    command = f"{sys.executable} {ROOT}/train.py {words} {stdout}"
    subprocess.run(command, shell=True, check=True, stdout=None, timeout=100)
    assert ckpt.verify_checkpoint(tmp_path / "run/ckpt_002", train_state=True) == ""


def test_a_run_that_cannot_be_written_to_is_shown(
        first: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def refuse(path: Path, *how: str) -> None:
        raise OSError(30, "Read-only file system", str(path))

    for module in ("data", "checkpoint"):
        monkeypatch.setattr(f"{module}.open_ours", refuse)
    evaluation.main([str(first)])
    assert "bits per byte" in (text := capsys.readouterr().out) and "Read-only" in text
