"""data.py: the data order is what it always was, damaged files are named, files are complete."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import jsonl, words
from test_prepare_data import prepare

import data as dataset
from configs import UserError
from data import (
    Data,
    Visit,
    chunk_schedule,
    load_data,
    lock_directory,
    read_json,
    sequence_dtype,
    sequence_order,
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
    prepare(home, sources=sources, n_chunks=3, valid_sequences=5, source_weights={"code": 2})
    return home


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Data:
    """A copy of it, to be damaged."""
    shutil.copytree(made / "out", tmp_path / "out")
    return load_data(tmp_path / "out")


# ---- the order


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
    schedule = chunk_schedule([2, 0, 2], [])
    assert schedule == [Visit(0, 0, 0, 2), Visit(2, 2, 2, 2)]
    found = [step_to_visit(schedule, step) for step in range(4)]
    assert found == [(schedule[0], 0), (schedule[0], 1), (schedule[1], 0), (schedule[1], 1)]
    for step in (4, -1):
        with pytest.raises(UserError, match=f"no step {step}: the run has 4 steps"):
            step_to_visit(schedule, step)
    amber = chunk_schedule([1_706_976 // 2240] * 360, [])
    assert sum(visit.steps for visit in amber) == 274_320


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
    first, second, third = (sequence_order(11111, 1, 1000, epoch) for epoch in range(3))
    assert (first == sequence_order(11111, 1, 1000)).all()
    assert sorted(first) == sorted(second) == sorted(third)
    assert max((first == second).mean(), (first == third).mean(), (second == third).mean()) < 0.02


# ---- reading


def test_a_data_set_says_what_it_has(made: Path) -> None:
    data = load_data(made / "out")
    assert (data.seq_len, data.n_vocab) == (16, 300) == (16, data.tokenizer.n_vocab)
    # Ids have two bytes where they fit.
    assert data.chunk(0).dtype == sequence_dtype(16, 300) == sequence_dtype(16, 65536)
    assert sequence_dtype(4, 65537)["token_ids"].base == "<u4"
    assert sequence_dtype(2048, 32000).itemsize == 5 + 2 * 2049
    assert (data.take(1, [7, 3]) == data.chunk(1)[[7, 3]]).all()


def test_damaged_files_are_named(data: Data) -> None:
    chunk, valid = data.directory / "train/chunk_002.npy", data.directory / "valid/code.npy"
    tokenizer = data.directory / data.manifest["tokenizer"]["file"]
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    valid.unlink()
    with open(tokenizer, "ab") as f:
        f.write(b"x")
    first, second, third = data.verify()
    assert "chunk_002.npy differs: its sha256 is" in first
    assert "code.npy is missing" in second and f"{tokenizer.name} differs" in third
    for read in (lambda: data.validation("code"), lambda: load_data(data.directory).tokenizer):
        with pytest.raises(UserError):
            read()
    # A chunk that is cut off, of another shape, or a pickle, which would run a stranger's code.
    shorter, pickle = data.directory / "short.npy", data.directory / "pickle.npy"
    np.save(shorter, np.array(data.chunk(1)[:-1]))
    np.save(pickle, np.array([print], object), allow_pickle=True)
    for content in (whole[:-100], whole[:20], b"", shorter.read_bytes(), pickle.read_bytes()):
        chunk.write_bytes(content)
        with pytest.raises(UserError, match="chunk_002.npy does not hold"):
            data.chunk(2)


def test_no_data_and_no_manifest(data: Data, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="python prepare_data.py"):
        load_data(tmp_path)
    path, whole = data.directory / "manifest.json", data.manifest
    for text in ("{", json.dumps(whole | {"format": 2})):
        path.write_text(text)
        with pytest.raises(UserError, match="is damaged or of format .*not 3"):
            load_data(data.directory)
    for name in ("../../secret", "/etc/passwd"):
        path.write_text(json.dumps(whole | {"valid": [whole["valid"][0] | {"file": name}]}))
        with pytest.raises(UserError, match="which is not inside"):
            load_data(data.directory)


# ---- files


def test_a_file_has_its_name_when_it_is_whole(tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    assert read_json(path) == {}
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
    (tmp_path / "link").symlink_to("nowhere")
    for place in (tmp_path / "link", tmp_path / "link/below"):
        with pytest.raises(UserError, match="link is a file, or a link that leads nowhere"):
            lock_directory(place)
    for damaged in (b"{", b"[1]", b"\xff", b"", b"[" * 100_000):
        path.write_bytes(damaged)
        assert read_json(path) == {}
