"""audit.py: files, and chunks trained again."""

import re
import shutil
from pathlib import Path

import pytest
from test_train import argv, damage, home, metrics, run, straight  # noqa: F401

import audit
import checkpoint as ckpt
from configs import UserError, load
from data import read_json, sha256_json, write_json


def test_verify_names_every_file_that_differs(
        home: Path, straight: Path, tmp_path: Path,  # noqa: F811
        capsys: pytest.CaptureFixture) -> None:
    audit.main(argv(home, straight, verify=True))
    said = capsys.readouterr().out
    assert "data: every file is as the manifest says" in said and "3 checkpoints, every" in said
    shutil.copytree(home / "data", tmp_path / "data")
    shutil.copytree(straight, tmp_path / "run")
    damage(tmp_path / "data/train/chunk_002.npy", "flipped")
    damage(tmp_path / "data/valid/code.npy", "missing")
    damage(tmp_path / "run/ckpt_000/train_state/optimizer.safetensors", "flipped")
    damage(tmp_path / "run/ckpt_001/manifest.json", "flipped")
    with pytest.raises(UserError) as stopped:
        audit.main(argv(home, tmp_path / "run", data_dir=tmp_path / "data"))
    for words in ("chunk_002.npy differs", "code.npy is missing", "ckpt_001: manifest.json is",
                  "ckpt_000: train_state/optimizer.safetensors is damaged"):
        assert words in str(stopped.value)
    assert str(stopped.value).count("\n") == 3


def test_replay(home: Path, straight: Path, tmp_path: Path,  # noqa: F811
                capsys: pytest.CaptureFixture) -> None:
    for chunk, before in ((0, "the initial weights"), (2, "ckpt_001")):
        # What is asked for here does not count: a checkpoint knows its own settings.
        audit.main(argv(home, straight, replay=chunk, learning_rate=2e-2, weight_decay=0.7))
        text = capsys.readouterr().out
        assert re.search(rf"ckpt_00{chunk} is what chunk {chunk} makes of \S*{before}: 63 tensors,"
                         " bit for bit, and 6 lines of metrics.jsonl", text)
    other = run(home, tmp_path / "other", learning_rate=9e-3, max_steps=6)
    shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/ckpt_000")
    shutil.copytree(other / "ckpt_000", tmp_path / "run/ckpt_000")
    with pytest.raises(UserError, match=r"is not what chunk 1 makes of .*ckpt_000 here: \d+ of 63"
                                        r" tensors differ, the first is model\..*, by up to \d"):
        audit.main(argv(home, tmp_path / "run", replay=1))
    shutil.rmtree(tmp_path / "run/ckpt_000/train_state")
    with pytest.raises(UserError, match="ckpt_000: train_state is missing.*keep_train_state"):
        audit.main(argv(home, tmp_path / "run", replay=1))
    with pytest.raises(UserError, match="ckpt_007 cannot be replayed: manifest.json is missing"):
        audit.main(argv(home, tmp_path / "run", replay=7))


@pytest.mark.parametrize("setting", ["learning_rate", "weight_decay", "adam_eps", "adam_beta2"])
def test_replay_finds_another_setting_of_the_optimizer(
        home: Path, straight: Path, tmp_path: Path, setting: str) -> None:  # noqa: F811
    """The manifest says another value than the one the chunk was trained with; hashes fit."""
    shutil.copytree(straight, tmp_path / "run")
    path = tmp_path / "run/ckpt_001/manifest.json"
    manifest = read_json(path)
    manifest.pop("sha256")
    manifest["config"][setting] *= 1.1 if setting != "adam_beta2" else 0.9
    write_json(path, manifest | {"sha256": sha256_json(manifest)})
    with pytest.raises(UserError, match="is not what chunk 1 makes of"):
        audit.main(argv(home, tmp_path / "run", replay=1))


def test_replay_finds_an_altered_line_of_the_log(home: Path, straight: Path,  # noqa: F811
                                                 tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    records = metrics(tmp_path / "run")
    records[8]["loss"] -= 1e-4
    ckpt.write_records(tmp_path / "run/metrics.jsonl", records)
    with pytest.raises(UserError, match="metrics.jsonl says something else of 1 steps.* is 9"):
        audit.main(argv(home, tmp_path / "run", replay=1))
    assert load(argv(home, straight))[0].seed == 11111
