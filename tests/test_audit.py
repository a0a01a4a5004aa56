"""audit.py: what is wrong with a run is found, and nothing else; a chunk is trained again."""

import fcntl
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from helpers import ROOT

import audit
import checkpoint as ckpt
import prepare_data
import train
from configs import UserError, load
from data import load_data, read_json, sha256_file, sha256_json, write_json
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
    assert lines[-1].endswith("run: 7 audited, nothing found.") and len(lines) == 10
    assert re.fullmatch(r"start +seed 11111 +none +- +- +0 +-", lines[1])
    row = r"ckpt_003 +ok +none +[+]0\.\d\d +-0\.\d{3} ± 0\.\d{3} +0 +20 lines"
    assert re.fullmatch(row, lines[5]) and lines[-2].startswith("Note: Nothing was trained again")
    assert read_json(copy / "run/audit.json")["findings"] == []
    few = {"checkpoints": "0,1,2,4,5", "chunks": "1,3,4", "sequences": 32}
    assert findings(exam, copy, **few) == []
    text = capsys.readouterr().out
    assert "1 checkpoints were not compared: ckpt_003" in text
    assert findings(exam, copy, sequences=8, chunks="1") == []
    text = capsys.readouterr().out
    assert "no loss in metrics.jsonl was compared" in text and "--sequences=16" in text
    assert "none was looked for at ckpt_000, ckpt_001" in text


def test_an_extended_run_with_another_rate_raises_nothing(
        exam: Path, copy: Path, capsys: pytest.CaptureFixture) -> None:
    for settings in ({"max_steps": 150}, {"max_steps": 160, "learning_rate": 4e-3}):
        train.main(words(exam, copy, epochs=2, keep_train_state=1, **settings))
    assert findings(exam, copy) == []
    assert "The settings were changed by step 160: learning_rate 0.01 -> 0.004" in (
        capsys.readouterr().out)
    # A replay goes on with its own state, where those of the run were dropped.
    assert not (copy / "run/ckpt_003/train_state").exists()
    assert findings(exam, copy, replay="3,4,5,6,7")[0].startswith("replay: ")
    assert findings(exam, copy, replay="all") == []
    assert capsys.readouterr().out.count("tensors and the log, bit for bit") == 8
    assert not (copy / "run/replay.tmp").exists()


@pytest.mark.parametrize("settings", [
    {"schedule_steps": 70, "min_learning_rate": 0, "max_steps": 100},  # it ends at rate 0
    {"global_batch_size": 64, "micro_batch_size": 64, "max_steps": 20},  # 5 steps in a chunk
], ids=["rate0", "short"])
def test_unusual_honest_runs_raise_nothing(exam: Path, tmp_path: Path, settings: dict) -> None:
    train.main(words(exam, run_dir=tmp_path / "run", **settings))
    assert findings(exam, run_dir=tmp_path / "run") == []


# What must find a kind; "" is found by replay alone.
FOUND_BY = {"swapped": "path", "duplicated": "twins", "shard": "twins", "twice": "path",
            "left_out": "trace", "leaked": "data", "canary": "data", "edited": "", "late_rate": "",
            "noise": "ties", "validation": "ties", "replaced": "ties", "decay": "path",
            "thinned": "log", "tokens": "files", "config": "files", "cut": "files"}


@pytest.mark.parametrize("kind", FOUND_BY)
def test_forged_runs_are_found(exam: Path, tmp_path: Path, kind: str,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    if kind in ("leaked", "canary"):  # the data alone shows it
        monkeypatch.setattr(forge, "retrain", lambda *_: None)
    config = load([str(exam / "run")])[0]
    fault = forge.draw_fault(config, 3, kind)
    forge.forge(config, tmp_path, fault, 3)
    by = FOUND_BY[kind]
    found = findings(exam, tmp_path, sequences=64 if by in ("trace", "ties", "log", "") else 0)
    # All hashes are right: nothing is given away by a file that differs from its manifest.
    assert not [sentence for sentence in found if sentence.startswith("files:") and by != "files"]
    if by:
        # A batch that was not trained on shows at the checkpoint before its chunk.
        places = "|".join(str(int(place) - (kind == "replaced")) for place in fault[1:])
        pattern = rf"{by}: .*(ckpt_00|chunk )({places})\b" if places else f"{by}: "
        assert any(re.match(pattern, sentence) for sentence in found)
        return
    assert found == []
    sentence = rf"ckpt_00{fault[1]} or its log is not what steps \d+ to \d+ make of .*ckpt_00"
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
    assert re.search("(?s)ckpt_00[24] is not on the way.*has learned from", found)
    write_json(hub / "ckpt_003/config.json",
               read_json(hub / "ckpt_003/config.json") | {"rms_norm_eps": 1e-3})
    assert "ckpt_003 has another rms_norm_eps" in findings(exam, **where)[0]
    (hub / "ckpt_003/model.safetensors").write_bytes(b"")
    (hub / "ckpt_003/config.json").write_bytes((hub / "ckpt_001/config.json").read_bytes())
    assert "ckpt_003/model.safetensors cannot be read" in findings(exam, **where, sequences=0)[0]
    where["checkpoints"] = f"{hub}/ckpt_001,{hub}/ckpt_005"
    assert findings(exam, **where) == []
    assert "that takes three checkpoints" in capsys.readouterr().out


def test_files_and_manifests_that_do_not_fit(exam: Path, copy: Path) -> None:
    """Manifests have the right hash of themselves: only the chain of them shows the change."""
    for name in ("data/train/chunk_002.npy", "run/ckpt_000/train_state/optimizer.safetensors",
                 "run/ckpt_005/manifest.json"):
        damaged = bytearray((copy / name).read_bytes())
        damaged[-3] ^= 1
        (copy / name).write_bytes(damaged)
    (copy / "data/valid/code.npy").unlink()
    other_parent = {"checkpoint": "ckpt_000", "weights_sha256": "0"}
    change_manifest(copy / "run/ckpt_001", {"tokens": 13})
    change_manifest(copy / "run/ckpt_002", {"data_sha256": "0"})
    change_manifest(copy / "run/ckpt_003", {"chunk_sha256": "0"})
    change_manifest(copy / "run/ckpt_004", {"parent": other_parent})
    write_json(copy / "run/config.json", read_json(copy / "run/config.json") | {"adam_eps": 1e-6})
    (copy / "run/train.log").unlink()
    write_log = ckpt.read_records(copy / "run/metrics.jsonl")[:100]
    ckpt.write_records(copy / "run/metrics.jsonl", write_log)
    found = findings(exam, copy, sequences=0)
    sentences = ("chunk_002.npy differs", "code.npy is missing",
                 "ckpt_005: manifest.json is missing or damaged",
                 "ckpt_000: train_state/optimizer.safetensors differs",
                 "ckpt_001: its tokens is 13, where data and checkpoints have 40960",
                 "ckpt_002: its data_sha256 is 0",
                 "ckpt_003: its chunk_sha256 is 0",
                 "ckpt_004: its parent is {'checkpoint': 'ckpt_000'",
                 "config.json is not that of step 100: adam_eps 1e-08 -> 1e-06",
                 "newest checkpoint is of step 100 of 120, and there is no train.log")
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
    assert re.match(r"ties: ckpt_004: .* loss of step 101 is", found[0])
    for chunk, sentence in enumerate(found[1:]):
        assert re.search(f"1 lines of chunk {chunk} in .* do not follow .* the first is step"
                         f" {20 * chunk + 9}", sentence)


def test_replay(exam: Path, copy: Path, capsys: pytest.CaptureFixture) -> None:
    for chunk, before in ((0, "the initial weights"), (2, "ckpt_001")):
        # The settings given here do not count: those of the manifest do.
        assert findings(exam, copy, replay=chunk, learning_rate=2e-2, weight_decay=0.7) == []
        text = capsys.readouterr().out
        assert re.search(rf"ckpt_00{chunk} is what steps {chunk}[01]?1? to {chunk + 1}0|"
                         rf"ckpt_00{chunk} is what .* make of \S*{before}: \d+ tensors", text)
    # A line that is gone, a validation, and a moment, which all hashes now fit.
    records = ckpt.read_records(copy / "run/metrics.jsonl")
    records[59]["valid"]["code"]["loss"] += 1e-9
    ckpt.write_records(copy / "run/metrics.jsonl", records[:69] + records[70:])
    assert "1 differ, step 60 of metrics.jsonl" in findings(exam, copy, replay=2)[0]
    assert "1 differ, step 70 of metrics.jsonl" in findings(exam, copy, replay=3)[0]
    state = copy / "run/ckpt_004/train_state/optimizer.safetensors"
    tensors = {name: t.clone() for name, t in ckpt.read_safetensors(state).items()}
    tensors["lm_head.weight.exp_avg"] *= 2
    ckpt.write_safetensors(state, [*tensors.items()])
    files = read_json(copy / "run/ckpt_004/manifest.json")["files"]
    files |= {"train_state/optimizer.safetensors": sha256_file(state)}
    change_manifest(copy / "run/ckpt_004", {"files": files})
    assert "1 differ, lm_head.weight.exp_avg" in findings(exam, copy, replay=4)[0]
    with pytest.raises(UserError, match="There is no checkpoint .*ckpt_007"):
        audit.main(words(exam, replay=7))


def test_a_replay_trains_whatever_lies_there(exam: Path, copy: Path) -> None:
    """A forged checkpoint, and the same in the place where a replay works."""
    tensors = {name: t * 1.01 for name, t in ckpt.read_tensors(copy / "run/ckpt_000")}
    ckpt.write_safetensors(copy / "run/ckpt_000/model.safetensors", [*tensors.items()])
    x = SimpleNamespace(data=load_data(copy / "data"), claims={
        path: ckpt.read_manifest(path) for path in ckpt.list_checkpoints(copy / "run")})
    forge.write_manifests(x)
    shutil.copytree(copy / "run", copy / "aside")
    (copy / "aside").rename(copy / "run/replay.tmp")
    [found] = findings(exam, copy, replay="0")
    assert "ckpt_000 or its log is not what steps 1 to 20 make" in found
    change_log(copy / "run", 1, grad_norm=None)
    assert any("ties: start: " in each for each in findings(exam, copy))
