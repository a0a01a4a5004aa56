"""audit.py: what is wrong with a run is found, and nothing else; a chunk is trained again."""

import fcntl
import os
import re
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from helpers import ROOT

import audit
import checkpoint as ckpt
import prepare_data
import train
from configs import UserError, load
from data import read_json, sha256_json, write_json
from tools import corpus, forge


def train_exam(folder: Path) -> None:
    """Train a run that learns something, with its config and data: 6 chunks of 20 steps."""
    few = dict.fromkeys(corpus.CORPUS, 220_000)  # bytes of each source; the config takes fewer
    with patch.multiple(corpus, DIRECTORY=folder / "corpus", CORPUS=few):
        corpus.main([])
    sources = {name: str(folder / "corpus" / f"{name}.jsonl") for name in corpus.CORPUS}
    (folder / "exam.py").write_text(
        (ROOT / "configs/exam_tiny.py").read_text()
        + f"n_chunks, sequences_per_chunk, sources = 6, 320, {sources}\n"
          f"data_dir, run_dir, dtype = '{folder}/data', '{folder}/run', 'float32'\n")
    prepare_data.main([str(folder / "exam.py")])
    train.main([str(folder / "exam.py")])


@pytest.fixture(scope="session")
def exam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run, exam.py and the data, only to be read: pytest's workers share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exam"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first worker trains it, the others wait
        if not (folder / "trained").exists():
            train_exam(folder)
            (folder / "trained").touch()
    return folder


@pytest.fixture
def copy(exam: Path, tmp_path: Path) -> Path:
    """A folder with a copy of the run and its data, to be changed."""
    shutil.copytree(exam / "run", tmp_path / "run")
    shutil.copytree(exam / "data", tmp_path / "data")
    return tmp_path


def words(exam: Path, copy: Path | None = None, **settings: Any) -> list[str]:
    """The command line of an audit of the run, or of a copy of it."""
    where = {"run_dir": copy / "run", "data_dir": copy / "data"} if copy else {}
    return [str(exam / "exam.py"), *(f"--{k}={v}" for k, v in (where | settings).items())]


def findings(exam: Path, copy: Path | None = None, **settings: Any) -> list[str]:
    """What an audit finds; it ends with these sentences, or with none."""
    try:
        audit.main(words(exam, copy, **settings))
        return []
    except UserError as error:
        count, *sentences = str(error).splitlines()
        assert count.endswith(f": {len(sentences)} found.")
        return sentences


def change_manifest(path: Path, changes: dict[str, Any]) -> None:
    """Change a manifest and give it the right hash of itself."""
    manifest = read_json(path / "manifest.json") | changes
    del manifest["sha256"]
    write_json(path / "manifest.json", manifest | {"sha256": sha256_json(manifest)})


def change_log(run_dir: Path, step: int, **changes: Any) -> None:
    records = ckpt.read_records(run_dir / "metrics.jsonl")
    records[step - 1] |= changes
    ckpt.write_records(run_dir / "metrics.jsonl", records)


def test_an_honest_run_raises_nothing(exam: Path, copy: Path,
                                      capsys: pytest.CaptureFixture) -> None:
    assert findings(exam, copy) == []
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("run: 6 audited, nothing found.") and len(lines) == 8
    row = r"ckpt_003 +ok +none +[+]0\.\d\d +-0\.\d{3} ± 0\.\d{3} +20 lines"
    assert re.fullmatch(row, lines[4])
    assert read_json(copy / "run/audit.json")["findings"] == []
    few = {"checkpoints": "0,1,2,4,5", "chunks": "1,3,4", "sequences": 32}
    assert findings(exam, copy, **few) == []


def test_an_extended_run_with_another_rate_raises_nothing(exam: Path, copy: Path) -> None:
    for settings in ({"max_steps": 150}, {"max_steps": 160, "learning_rate": 4e-3}):
        train.main(words(exam, copy, epochs=2, **settings))
    assert findings(exam, copy) == []


@pytest.mark.parametrize("settings", [
    {"schedule_steps": 70, "min_learning_rate": 0, "max_steps": 100},  # it ends at rate 0
    {"global_batch_size": 64, "micro_batch_size": 64, "max_steps": 20},  # 5 steps in a chunk
], ids=["rate0", "short"])
def test_unusual_honest_runs_raise_nothing(exam: Path, tmp_path: Path, settings: dict) -> None:
    train.main(words(exam, run_dir=tmp_path / "run", **settings))
    assert findings(exam, run_dir=tmp_path / "run") == []


# What must find a kind; "" is found by replay alone.
FOUND_BY = {"swapped": "path", "duplicated": "twins", "shard": "twins", "twice": "path",
            "left_out": "trace", "leaked": "data", "canary": "data", "edited": "", "late_rate": ""}


@pytest.mark.parametrize("kind", FOUND_BY)
def test_forged_runs_are_found(exam: Path, tmp_path: Path, kind: str,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    if kind in ("leaked", "canary"):  # the data alone shows it
        monkeypatch.setattr(forge, "retrain", lambda *_: None)
    config = load([str(exam / "run")])[0]
    fault = forge.draw_fault(config, 3, kind)
    forge.forge(config, tmp_path, fault, 3)
    found = findings(exam, tmp_path, sequences=64 if kind == "left_out" else 0)
    # All hashes are right: nothing is given away by a file that differs from its manifest.
    assert not [sentence for sentence in found if sentence.startswith("files:")]
    if FOUND_BY[kind]:
        pattern = rf"{FOUND_BY[kind]}: .*(ckpt_00|chunk ){fault[1]}\b"
        assert any(re.match(pattern, sentence) for sentence in found)
        return
    sentence = f"ckpt_00{fault[1]} or its log is not what chunk {fault[1]} makes"
    assert re.search(sentence, findings(exam, tmp_path, replay=fault[1])[0])


def test_published_directories_are_audited_by_their_weights(
        exam: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Without manifest, optimizer or log: as others publish theirs. Two have each other's name."""
    hub = tmp_path / "hub"
    for i in range(1, 6):
        shutil.copytree(exam / "run" / f"ckpt_00{i}", hub / f"ckpt_00{i}",
                        ignore=shutil.ignore_patterns("manifest.json", "train_state"))
    where = {"run_dir": tmp_path / "report",
             "checkpoints": ",".join(str(hub / f"ckpt_00{i}") for i in range(1, 6))}
    assert findings(exam, **where) == []
    assert capsys.readouterr().out.count("no manifest") == 5
    for a, b in (("2", "aside"), ("4", "2"), ("aside", "4")):
        (hub / f"ckpt_00{a}").rename(hub / f"ckpt_00{b}")
    found = "\n".join(findings(exam, **where))
    assert re.search("(?s)ckpt_002 does not lie.*ckpt_004 does not lie.*has learned from", found)
    (hub / "ckpt_003/model.safetensors").write_bytes(b"")
    assert "ckpt_003/model.safetensors cannot be read" in findings(exam, **where, sequences=0)[0]


def test_files_and_manifests_that_do_not_fit(exam: Path, copy: Path) -> None:
    """Manifests have the right hash of themselves: only the chain of them shows the change."""
    for name in ("data/train/chunk_002.npy", "run/ckpt_000/train_state/optimizer.safetensors",
                 "run/ckpt_005/manifest.json"):
        damaged = bytearray((copy / name).read_bytes())
        damaged[-3] ^= 1
        (copy / name).write_bytes(damaged)
    (copy / "data/valid/code.npy").unlink()
    other_parent = {"checkpoint": "ckpt_000", "weights_sha256": "0"}
    change_manifest(copy / "run/ckpt_001", {"step": 13})
    change_manifest(copy / "run/ckpt_002", {"data_sha256": "0"})
    change_manifest(copy / "run/ckpt_003", {"chunk_sha256": "0", "parent": other_parent})
    change_manifest(copy / "run/ckpt_004", {"tensors": {"model.norm.weight": "0"}})
    found = findings(exam, copy, sequences=0)
    sentences = ("chunk_002.npy differs", "code.npy is missing",
                 "ckpt_005: manifest.json is missing or damaged",
                 "ckpt_000: train_state/optimizer.safetensors differs",
                 "ckpt_001: step 13 in its manifest is not the end of its chunk",
                 "ckpt_002: it was trained on other data",
                 "ckpt_003: it names another hash of chunk 3",
                 "ckpt_003: it was trained from another ckpt_000",
                 "ckpt_004: model.norm.weight is not the tensor in manifest.json")
    for sentence in sentences:
        assert sum(sentence in line for line in found) == 1, sentence
    assert len(found) == len(sentences)


def test_lines_that_do_not_follow_from_config_and_data_order(exam: Path, copy: Path) -> None:
    wrong = ({"lr": 1e-3}, {"chunk": 2}, {"tokens": 5}, {"loss": 3.0},
             {"loss_by_source": {"code": 5.0}})
    for chunk, changes in enumerate(wrong):
        change_log(copy / "run", 20 * chunk + 9, **changes)
    # Right in itself, and of a batch with the same sources, but not of this step.
    record = ckpt.read_records(copy / "run/metrics.jsonl")[100]
    by_source = {name: loss + 1e-3 for name, loss in record["loss_by_source"].items()}
    change_log(copy / "run", 101, loss=record["loss"] + 1e-3, loss_by_source=by_source)
    found = findings(exam, copy)
    assert len(found) == 6
    for chunk, sentence in enumerate(found[:5]):
        assert re.search(f"1 lines of chunk {chunk} do not follow .* the first is step"
                         f" {20 * chunk + 9}", sentence)
    assert re.match(r"log: .* at step 101, where the weights of ckpt_004", found[5])


def test_replay(exam: Path, capsys: pytest.CaptureFixture) -> None:
    for chunk, before in ((0, "the initial weights"), (2, "ckpt_001")):
        # The settings given here do not count: those of the manifest do.
        assert findings(exam, replay=chunk, learning_rate=2e-2, weight_decay=0.7) == []
        text = capsys.readouterr().out
        assert re.search(rf"ckpt_00{chunk} is what chunk {chunk} makes of \S*{before}: \d+ tensors,"
                         " bit for bit, and 20 lines of metrics.jsonl", text)
    with pytest.raises(UserError, match="There is no checkpoint .*ckpt_007"):
        audit.main(words(exam, replay=7))
