"""data.py: the data order is what it always was, files are whole or named, nobody's are removed."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, jsonl, words

import data as dataset
import prepare_data
from configs import UserError, load
from data import (
    Data,
    Visit,
    begin_unfinished,
    check_data_settings,
    chunk_schedule,
    is_unfinished,
    load_data,
    lock_directory,
    read_json,
    remove_unfinished,
    sequence_dtype,
    sequence_order,
    sha256_file,
    sha256_json,
    step_sequences,
    step_to_visit,
    write_json,
    writing,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, small.py, and its data."""
    home = tmp_path_factory.mktemp("data")
    sources = {name: jsonl(home / f"{name}.jsonl", [words(k + i, 40) for i in range(30)])
               for k, name in ((0, "web"), (100, "code"))}
    (home / "small.py").write_text(
        f"sources, data_dir = {sources!r}, {str(home / 'out')!r}\n"
        "vocab_size, seq_len, n_chunks, valid_sequences, workers = 300, 16, 3, 5, 1\n"
        "source_weights = {'code': 2}\n")
    prepare_data.main([str(home / "small.py")])
    return home


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Data:
    """A copy of it, to be damaged."""
    shutil.copytree(made / "out", tmp_path / "out")
    return load_data(tmp_path / "out")


# ---------------------------------------------------------------------------------------------
# the order


# NumPy promises the stream of PCG64, and not that of permutation(): a change must be noticed.
GOLDEN = [[3, 8, 4, 2, 7, 5, 0, 1, 9, 6], [7, 8, 2, 9, 1, 0, 6, 3, 4, 5],
          [981474, 346804, 499287, 1608156, 886144]]


def test_the_order_is_what_it_has_always_been() -> None:
    assert sequence_order(11111, 0, 10).tolist() == GOLDEN[0]
    assert sequence_order(11111, 359, 10).tolist() == GOLDEN[1]
    assert sequence_order(11111, 0, 1_706_976)[:5].tolist() == GOLDEN[2]
    order = sequence_order(7, 3, 1000)
    assert sorted(order) == list(range(1000))
    steps = [step_sequences(7, 3, 1000, s, 48) for s in range(1000 // 48)]
    assert np.concatenate(steps).tolist() == order[:960].tolist()


def test_the_schedule_counts_whole_batches_of_each_chunk() -> None:
    steps = [2, 0, 2]  # 10, 3 and 9 sequences in batches of 4
    schedule = chunk_schedule(steps, [])
    assert schedule == [Visit(0, 0, 0, 2), Visit(2, 2, 2, 2)]
    found = [(v.chunk, within) for v, within in (step_to_visit(schedule, s) for s in range(4))]
    assert found == [(0, 0), (0, 1), (2, 0), (2, 1)]
    for step in (4, -1):
        with pytest.raises(UserError, match=f"no step {step}: the run has 4 steps"):
            step_to_visit(schedule, step)
    amber = chunk_schedule([1_706_976 // 2240] * 360, [])
    assert sum(visit.steps for visit in amber) == 274_320
    assert step_to_visit(amber, 762) == (Visit(1, 1, 762, 762), 0)


def test_skipped_chunks_are_made_up_for_by_the_first_good_ones() -> None:
    visits = chunk_schedule([3, 4, 5, 3], [0, 2])
    assert [(v.number, v.chunk, v.first_step, v.steps) for v in visits] == [
        (1, 1, 0, 4), (3, 3, 4, 3), (5, 1, 7, 4), (7, 3, 11, 3), (9, 1, 14, 1)]
    # Amber left four of 360 out, and trained the first four once more.
    visits = chunk_schedule([762] * 360, [47, 64, 70, 356])
    assert [v.chunk for v in visits[-5:]] == [359, 0, 1, 2, 3] and len(visits) == 360
    assert visits[-1] == Visit(363, 3, 359 * 762, 762, 1)
    assert chunk_schedule([3, 3], [0, 1]) == [] == chunk_schedule([0, 0], [])


def test_every_epoch_meets_every_chunk_in_an_order_of_its_own() -> None:
    assert chunk_schedule([3, 2], [], epochs=2) == [
        Visit(0, 0, 0, 3, 0), Visit(1, 1, 3, 2, 0), Visit(2, 0, 5, 3, 1), Visit(3, 1, 8, 2, 1)]
    orders = [sequence_order(11111, 1, 1000, turn) for turn in range(3)]
    assert (orders[0] == sequence_order(11111, 1, 1000)).all()
    for i, j in itertools.combinations(range(3), 2):
        assert sorted(orders[i]) == sorted(orders[j]) and (orders[i] == orders[j]).mean() < 0.02


# ---------------------------------------------------------------------------------------------
# reading


def test_a_data_set_says_what_it_has(made: Path) -> None:
    data = load_data(made / "out")
    assert data.sources == ["web", "code"] == data.validation_sources
    assert (data.seq_len, data.n_vocab) == (16, 300) == (16, data.tokenizer.n_vocab)
    assert data.sha256 == sha256_file(made / "out" / "manifest.json")
    assert data.steps_per_chunk(10) == [len(data.chunk(i)) // 10 for i in range(3)]
    assert len(data.validation("code")) == 5 and data.verify() == []
    assert data.chunk(0).dtype == sequence_dtype(16, 300)
    text = data.tokenizer.decode(data.chunk(0)["token_ids"][0])
    assert text in (made / "web.jsonl").read_text()
    with pytest.raises(UserError, match="no validation sequences of 'poetry'; it has .* web, code"):
        data.validation("poetry")


def test_ids_have_two_bytes_where_they_fit() -> None:
    assert sequence_dtype(4, 65536)["token_ids"].base == "<u2"
    assert sequence_dtype(4, 65537)["token_ids"].base == "<u4"
    assert sequence_dtype(2048, 32000).itemsize == 1 + 2 * 2049


def test_damaged_files_are_named(data: Data) -> None:
    chunk, valid = data.directory / "train/chunk_002.npy", data.directory / "valid/code.npy"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    valid.unlink()
    with open(data.directory / "tokenizer.tiktoken", "ab") as f:
        f.write(b"x")
    first, second, third = data.verify()
    assert "chunk_002.npy differs: its sha256 is" in first
    assert "code.npy is missing" in second and "tokenizer.tiktoken differs" in third
    for content in (whole[:-100], whole[:20], b""):
        chunk.write_bytes(content)
        assert "chunk_002.npy" in data.verify()[0]
        with pytest.raises(UserError, match="chunk_002.npy cannot be read.*audit.py"):
            data.chunk(2)
    for read in (lambda: data.validation("code"), lambda: load_data(data.directory).tokenizer):
        with pytest.raises(UserError):
            read()


def test_a_chunk_of_another_shape_is_refused(data: Data) -> None:
    shorter = np.array(data.chunk(1)[:-1])  # a copy: writing over a mapped file is a crash
    np.save(data.directory / "train/chunk_001.npy", shorter)
    with pytest.raises(UserError, match="chunk_001.npy has .* but the manifest says"):
        data.chunk(1)
    # A pickle inside an .npy would run a stranger's code: it is not read.
    np.save(data.directory / "train/chunk_001.npy", np.array([print], object), allow_pickle=True)
    with pytest.raises(UserError, match="chunk_001.npy cannot be read"):
        data.chunk(1)


def test_no_data_and_no_manifest(data: Data, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="python prepare_data.py"):
        load_data(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="python prepare_data.py"):
        load_data(tmp_path / "file")
    path, whole = data.directory / "manifest.json", data.manifest
    for text in ("{", "\x00", "[" * 100_000, "{}", "[]", "null", "3"):
        path.write_text(text)
        with pytest.raises(UserError, match="is damaged .*seq_len"):
            load_data(data.directory)
    path.write_text(json.dumps(whole | {"format": 1}))
    with pytest.raises(UserError, match="format 1, this code reads 2"):
        load_data(data.directory)
    path.write_text(json.dumps({k: v for k, v in whole.items() if k != "format"}))
    with pytest.raises(UserError, match="format None, this code reads 2"):
        load_data(data.directory)
    for key in ("chunks", "tokenizer", "valid", "seq_len", "sources", "settings"):
        path.write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
        with pytest.raises(UserError, match=f"is damaged .*{key}"):
            load_data(data.directory)
    for key, value in (("chunks", [3]), ("chunks", [whole["chunks"][0] | {"sequences": -1}]),
                       ("valid", [whole["valid"][0] | {"file": "../../secret"}]),
                       ("seq_len", "16"), ("seq_len", 0), ("seq_len", True)):
        path.write_text(json.dumps(whole | {key: value}))
        with pytest.raises(UserError, match=rf"is damaged \({key}\)"):
            load_data(data.directory)


def test_settings_that_the_data_was_not_made_with_are_refused(made: Path) -> None:
    data, command = load_data(made / "out"), [str(made / "small.py")]
    check_data_settings(load([*command, "--seed=3", "--vocab_size=400", "--workers=7",
                              "--learning_rate=1e-3"])[0], data)
    config, _ = load([*command, "--seq_len=8", "--source_weights={'code': 1}", "--n_chunks=3"])
    with pytest.raises(UserError) as refused:
        check_data_settings(config, data)
    assert "seq_len = 8 (the data: 16)" in str(refused.value)
    assert "{'code': 1} (the data: {'code': 2})" in str(refused.value)
    assert "n_chunks" not in str(refused.value)
    with pytest.raises(UserError, match=r"seed = 3 \(the data: 11111\)"):
        check_data_settings(load([*command, "--seed=3"])[0], data, may_differ=())


# ---------------------------------------------------------------------------------------------
# files


def test_a_file_has_its_name_when_it_is_whole(tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(KeyboardInterrupt), writing(path) as f:
        f.write(b"half")
        raise KeyboardInterrupt
    assert read_json(path) == {"a": 1}

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(dataset.os, "fsync", full)
    with pytest.raises(OSError) as stopped:
        write_json(path, {"a": 2})
    assert stopped.value.filename == str(path) and read_json(path) == {"a": 1}


def test_json_that_is_damaged_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert read_json(path) == {} == read_json(tmp_path)
    for content in (b"{", b"[1]", b"\xff", b"null", b"", b"[" * 100_000):
        path.write_bytes(content)
        assert read_json(path) == {}


def test_hashes_are_of_what_json_keeps() -> None:
    assert sha256_json({2: (1,), "a": None}) == sha256_json({"a": None, "2": [1]})
    assert sha256_json({"a": 1}) != sha256_json({"a": 1.5})


def test_a_lock_holds_until_its_process_ends(tmp_path: Path) -> None:
    code = f"from data import lock_directory; from pathlib import Path;" \
           f" lock = lock_directory(Path({str(tmp_path)!r})); print(1, flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(UserError, match="in use by another process"):
        lock_directory(tmp_path)
    other.kill()
    other.wait()
    with lock_directory(tmp_path), pytest.raises(UserError, match="in use"):
        lock_directory(tmp_path)
    lock_directory(tmp_path).close()


def test_only_what_was_begun_under_this_very_name_is_removed(tmp_path: Path) -> None:
    ours, others = tmp_path / "a.tmp", tmp_path / "b.tmp"
    begin_unfinished(ours)
    (ours / "deep" / "er").mkdir(parents=True)
    (ours / "deep" / "er" / "file").write_text("")
    (ours / "link").symlink_to(tmp_path / "precious")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("precious")
    assert is_unfinished(ours)
    remove_unfinished(ours)
    assert not ours.exists() and (tmp_path / "precious" / "thesis.txt").exists()
    remove_unfinished(ours)  # that it is not there is fine

    begin_unfinished(ours)
    ours.rename(others)  # whose mark says a.tmp
    (tmp_path / "c.tmp").mkdir()
    (tmp_path / "c.tmp" / "thesis.txt").write_text("precious")
    (tmp_path / "d.tmp").write_text("precious")
    for path in (others, tmp_path / "c.tmp", tmp_path / "d.tmp"):
        assert not is_unfinished(path)
        for function in (remove_unfinished, begin_unfinished):
            with pytest.raises(UserError, match="in the way"):
                function(path)
        assert path.exists()


def test_an_unfinished_directory_stays_ours_wherever_its_removal_is_stopped(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tmp"
    for n in range(6):
        begin_unfinished(path)
        for name in ("1", "zz", "m"):
            (path / name).write_text("")
        with monkeypatch.context() as patch:
            left, unlink = [n], Path.unlink

            def stop(self: Path, left: list = left, unlink=unlink, **how: bool) -> None:
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
                unlink(self, **how)
            patch.setattr(Path, "unlink", stop)
            if n < 4:
                with pytest.raises(KeyboardInterrupt):
                    remove_unfinished(path)
        assert not path.exists() or is_unfinished(path)
    path.mkdir(exist_ok=True)
    shutil.rmtree(path)
    os.mkdir(path)  # killed between making it and marking it
    begin_unfinished(path)
    assert is_unfinished(path)
