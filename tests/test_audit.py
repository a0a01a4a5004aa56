"""audit.py and replay.py: what is wrong with a run is found, and nothing else."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_train import argv, damage, home, metrics, run, straight  # noqa: F401

import audit
import checkpoint as ckpt
import prepare_data
import train
from configs import UserError, load
from data import load_data, read_json, sha256_json, unexpected_sequences, write_json

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tools"))
import forge  # noqa: E402


@pytest.fixture(scope="module")
def exam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that has learned something: 6 chunks of 20 steps, and its data and config."""
    folder = tmp_path_factory.mktemp("exam")
    text = (ROOT / "configs/exam_tiny.py").read_text()
    (folder / "exam.py").write_text(text + "n_chunks, sequences_per_chunk = 6, 320\n"
                                    f"data_dir, run_dir = '{folder}/data', '{folder}/run'\n")
    prepare_data.main([str(folder / "exam.py")])
    train.main([str(folder / "exam.py")])
    return folder


def findings(exam: Path, forged: Path | None = None, **flags: Any) -> list[tuple[str, str]]:
    """(check, sentence) of everything that an audit finds."""
    where = [f"--run_dir={forged / 'run'}", f"--data_dir={forged / 'data'}"] if forged else []
    config, _ = load([str(exam / "exam.py"), *where])
    found = audit.audit(config, audit.Flags(**flags)).findings
    return [(f["check"], f["sentence"]) for f in found]


def test_an_honest_run_raises_nothing_and_ends_with_a_sentence(
        exam: Path, capsys: pytest.CaptureFixture) -> None:
    audit.main([str(exam / "exam.py")])
    said = capsys.readouterr().out.splitlines()
    assert said[-1].endswith("run: 6 audited, nothing found.") and len(said) == 8
    assert re.fullmatch(r"ckpt_003 +ok +none +[+]0\.\d\d +-0\.\d{3} ± 0\.\d{3} +20 lines", said[4])
    assert read_json(exam / "run/audit.json")["findings"] == []
    assert findings(exam, sequences=0) == findings(exam, chunks="1,3,4", sequences=32) == []


# What must find a kind, and a word of its sentence; the others are found by replay alone.
FOUND_BY = {"swapped": "trace|path", "duplicated": "twins", "shard": "twins", "twice": "path",
            "left_out": "trace", "leaked": "data", "canary": "data"}


@pytest.mark.parametrize("kind, seed", [
    *((kind, seed) for kind in ("swapped", "duplicated", "shard") for seed in range(3)),
    *((kind, 3) for kind in forge.KINDS if kind not in ("swapped", "duplicated", "shard"))])
def test_forged_runs_are_found(exam: Path, tmp_path: Path, kind: str, seed: int) -> None:
    config = forge.run_config(exam / "run")
    fault = forge.draw_fault(config, seed, kind)
    forge.forge(config, tmp_path, fault, seed)
    found = findings(exam, tmp_path)
    # All hashes are right: nothing is given away by a file that differs from its manifest.
    assert not [sentence for check, sentence in found if check == "files"]
    if kind in FOUND_BY:
        assert {check for check, _ in found} & set(FOUND_BY[kind].split("|"))
        place = rf"(ckpt_00|chunk ){fault[1]}\b"
        assert any(re.search(place, sentence) for _, sentence in found)
        return
    assert {check for check, _ in found} <= {"log"}
    chunk, sentence = fault[1], f"ckpt_00{fault[1]} is not what chunk {fault[1]} makes"
    if kind == "metrics":
        chunk = (int(fault[1]) - 1) // 20
        sentence = rf"metrics.jsonl says something else of 1 steps.* is {fault[1]}\."
    with pytest.raises(UserError, match=sentence):
        audit.main([str(exam / "exam.py"), f"--run_dir={tmp_path / 'run'}",
                    f"--data_dir={tmp_path / 'data'}", f"--replay={chunk}"])


def test_an_answer_is_marked_without_a_key(exam: Path, tmp_path: Path,
                                           capsys: pytest.CaptureFixture) -> None:
    run = str(exam / "run")
    fault = forge.draw_fault(forge.run_config(exam / "run"), 5, "swapped")
    answers = {" ".join(fault): "Right.", f"swapped {fault[2]} {fault[1]}": "Right.",
               "swapped 0 1": "That is what was done, but not where.", "twice 3": "No: "}
    for says, reply in answers.items():
        forge.main([run, "--answer", "--seed=5", "--kind=swapped", f"--says={says}"])
        assert capsys.readouterr().out.startswith(reply)
    for words, sentence in (([run, "--answer", "--seed=5", "--says=x"], "must begin with one of"),
                            ([str(tmp_path), "--answer", "--seed=5"], "holds no finished run"),
                            ([run, run, "--seed=5"], "does not exist yet")):
        with pytest.raises(UserError, match=sentence):
            forge.main(words)


def test_published_directories_are_audited_by_their_weights(
        exam: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Without manifest, optimizer or log: as others publish theirs. Two have each other's name."""
    hub = tmp_path / "hub"
    for i in range(1, 6):
        shutil.copytree(exam / "run" / f"ckpt_00{i}", hub / f"ckpt_00{i}",
                        ignore=shutil.ignore_patterns("manifest.json", "train_state"))
    words = [str(exam / "exam.py"), f"--run_dir={tmp_path / 'report'}",
             "--checkpoints=" + ",".join(str(hub / f"ckpt_00{i}") for i in range(1, 6))]
    audit.main(words)
    said = capsys.readouterr().out
    assert "5 audited, nothing found" in said and said.count("no manifest") == 5
    for a, b in (("2", "aside"), ("4", "2"), ("aside", "4")):
        (hub / f"ckpt_00{a}").rename(hub / f"ckpt_00{b}")
    with pytest.raises(UserError, match="(?s)ckpt_002 does not lie between.*ckpt_004 does not lie"
                                        " between.*has learned from chunk 4 "):
        audit.main(words)
    (hub / "ckpt_003/model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="ckpt_003/model.safetensors cannot be read"):
        audit.main([*words, "--sequences=0"])
    (hub / "ckpt_004").rename(hub / "main")
    with pytest.raises(UserError, match="main is not called ckpt_NUMBER"):
        audit.main([*words[:2], f"--checkpoints={hub / 'main'}"])
    with pytest.raises(UserError, match="has 1024 token ids in sequences of 64: more than"):
        audit.main([str(exam / "exam.py"), "--vocab_size=200", f"--run_dir={tmp_path / 'other'}",
                    f"--checkpoints={exam / 'run/ckpt_001'}"])
    audit.main([*words[:2], f"--checkpoints={hub / 'ckpt_001'}"])  # one alone
    assert "1 audited, nothing found" in capsys.readouterr().out


def test_every_file_that_differs_is_named(
        home: Path, straight: Path, tmp_path: Path) -> None:  # noqa: F811
    shutil.copytree(home / "data", tmp_path / "data")
    shutil.copytree(straight, tmp_path / "run")
    damage(tmp_path / "data/train/chunk_002.npy", "flipped")
    damage(tmp_path / "data/valid/code.npy", "missing")
    damage(tmp_path / "run/ckpt_000/train_state/optimizer.safetensors", "flipped")
    damage(tmp_path / "run/ckpt_001/manifest.json", "flipped")
    with pytest.raises(UserError) as stopped:
        audit.main(argv(home, tmp_path / "run", data_dir=tmp_path / "data", sequences=0))
    for words in ("chunk_002.npy differs", "code.npy is missing", "ckpt_001: manifest.json is",
                  "ckpt_000: train_state/optimizer.safetensors is damaged"):
        assert words in str(stopped.value)


def test_manifests_that_do_not_fit_each_other(
        home: Path, straight: Path, tmp_path: Path) -> None:  # noqa: F811
    """Each with the right hash of itself: only the chain shows it."""
    for key, value, sentence in (
            ("step", 13, "it says that it is of step 13, where its chunk does not end"),
            ("data_sha256", "0", "trained on other data"),
            ("chunk_sha256", "0", "names another hash of chunk 1"),
            ("parent", {"checkpoint": "ckpt_000", "weights_sha256": "0"}, "another ckpt_000 than"),
            ("tensors", {"model.norm.weight": "0"}, "model.norm.weight is not the tensor in")):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(straight, tmp_path / "run")
        path = tmp_path / "run/ckpt_001/manifest.json"
        manifest = read_json(path)
        manifest.pop("sha256")
        manifest[key] = value
        write_json(path, manifest | {"sha256": sha256_json(manifest)})
        with pytest.raises(UserError, match=f"1 found.\nfiles: .*ckpt_001: .*{sentence}"):
            audit.main(argv(home, tmp_path / "run", sequences=0))


@pytest.mark.parametrize("line", [{"lr": 1e-3}, {"chunk": 2}, {"tokens": 5}, {"loss": 3.0},
                                  {"loss_by_source": {"prose": 5.0}}])
def test_lines_that_do_not_follow_from_config_and_data_order(
        home: Path, straight: Path, tmp_path: Path, line: dict) -> None:  # noqa: F811
    shutil.copytree(straight, tmp_path / "run")
    records = metrics(tmp_path / "run")
    records[8] |= line
    ckpt.write_records(tmp_path / "run/metrics.jsonl", records)
    with pytest.raises(UserError, match="1 lines of chunk 1 do not follow .* the first is step 9"):
        audit.main(argv(home, tmp_path / "run"))


def test_a_shuffled_log_is_found(exam: Path, tmp_path: Path) -> None:
    """Losses that are right in themselves, but not of these steps."""
    shutil.copytree(exam / "run", tmp_path / "run")
    shutil.copytree(exam / "data", tmp_path / "data")
    records = metrics(tmp_path / "run")
    order = np.random.default_rng(0).permutation(len(records))
    shuffled = [record | {key: records[i][key] for key in ("loss", "loss_by_source")}
                for record, i in zip(records, order)]
    ckpt.write_records(tmp_path / "run/metrics.jsonl", shuffled)
    found = findings(exam, tmp_path)
    assert {check for check, _ in found} == {"log"}
    assert "correlation" in found[-1][1] and "do not follow" in found[0][1]


def test_sequences_that_should_not_be_there(home: Path, tmp_path: Path) -> None:  # noqa: F811
    """Against a search by hand, in data that has both."""
    shutil.copytree(home / "data", tmp_path / "data")
    chunk = np.load(tmp_path / "data/train/chunk_001.npy", mmap_mode="r+")
    valid = load_data(home / "data").validation("prose")
    assert unexpected_sequences(load_data(tmp_path / "data")) == []
    chunk["token_ids"][7] = valid["token_ids"][4]
    chunk["token_ids"][[11, 12, 13]] = np.arange(33)
    chunk["token_ids"][[30, 31, 32]] = 5  # says nothing
    chunk.flush()
    assert unexpected_sequences(load_data(tmp_path / "data")) == [
        "Sequence 4 of valid/prose.npy is in the training data: sequence 7 of chunk 1.",
        "Sequence 11 of chunk 1 is 3 times in the training data."]


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
    with pytest.raises(UserError, match="There is no checkpoint .*ckpt_007"):
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
