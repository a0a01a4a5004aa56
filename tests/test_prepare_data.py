"""prepare_data.py: the same bytes whoever makes them, nothing lost, bad input named."""

import contextlib
import csv
import errno
import gzip
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, SHARED, jsonl, needs_shared, tiny_llama, words

import corpus
import data as dataset
import prepare_data as pd
from configs import UserError, load
from data import Data, begin_unfinished, load_data, lock_directory, sha256_file

SMALL = {"vocab_size": 300, "seq_len": 16, "n_chunks": 4, "valid_sequences": 8,
         "global_batch_size": 4, "micro_batch_size": 2, "workers": 1}


def config_file(tmp: Path, **settings: Any) -> str:
    """A config with small settings; data in tmp/out unless said otherwise."""
    values = SMALL | {"data_dir": str(tmp / "out")} | settings
    (tmp / "small.py").write_text("".join(f"{k} = {v!r}\n" for k, v in values.items()))
    return str(tmp / "small.py")


def prepare(tmp: Path, **settings: Any) -> Data:
    pd.main([config_file(tmp, **settings)])
    return load_data(settings.get("data_dir", tmp / "out"))


def refused(tmp: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as stopped:
        prepare(tmp, **settings)
    message = str(stopped.value)
    assert len(message) > 20 and "\n" not in message
    return message


def hashes(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): sha256_file(p)
            for p in sorted(directory.rglob("*")) if p.is_file()}


def texts_of(pattern: str) -> list[str]:
    paths = sorted(Path("/").glob(pattern.lstrip("/")))
    return [json.loads(line)["text"] for p in paths for line in p.read_text().splitlines()]


def stream_of(data: Data, texts: list[str], width: int) -> tuple[np.ndarray, int]:
    """What the sequences of a source must be, made the slow and obvious way; and its tail."""
    ids = []
    for text in texts:
        ids += [*data.tokenizer.encode(text).tolist(), data.tokenizer.eos_id]
    return np.array(ids[:len(ids) // width * width]).reshape(-1, width), len(ids) % width


def sequences_of(data: Data, source: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Token ids of a source in each chunk, and of its validation sequences."""
    number = data.sources.index(source)
    found = []
    for i in range(len(data.manifest["chunks"])):
        chunk = data.chunk(i)
        found.append(chunk["token_ids"][chunk["source"] == number].astype(int))
    if source not in data.validation_sources:
        return found, found[0][:0]
    valid = data.validation(source)
    assert (valid["source"] == number).all()
    return found, valid["token_ids"].astype(int)


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, str]:
    """Three sources of several files."""
    for k, (name, n) in enumerate((("web", 5), ("code", 3), ("wiki", 2))):
        for i in range(n):
            texts = [words(1000 * k + 100 * i + d, 40) + f" {name}" for d in range(25)]
            jsonl(tmp_path / name / f"{i}.jsonl", texts)
    return {name: str(tmp_path / name / "*.jsonl") for name in ("web", "code", "wiki")}


# ---------------------------------------------------------------------------------------------
# the same bytes whoever makes them


def test_bytes_do_not_depend_on_workers_or_a_kill(tmp_path: Path) -> None:
    files = {f"s{k}": jsonl(tmp_path / f"s{k}.jsonl", [words(100 * k + i, 300) for i in range(60)])
             for k in range(6)}
    one = prepare(tmp_path, sources=files, data_dir=str(tmp_path / "one")).directory
    three = prepare(tmp_path, sources=files, data_dir=str(tmp_path / "three"), workers=3).directory
    assert hashes(one) == hashes(three) and len(hashes(one)) == 4 + 6 + 7 + 2

    config = config_file(tmp_path, sources=files, data_dir=str(tmp_path / "killed"), workers=2)
    command, tmp = [sys.executable, str(ROOT / "prepare_data.py"), config], tmp_path / "killed.tmp"
    killed = subprocess.Popen(command, cwd=ROOT)
    while not list(tmp.glob("parts/tokens_*.json")):
        assert killed.poll() is None, "it finished before it could be killed"
        time.sleep(0.002)
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children")
    workers = children.read_text().split() if children.exists() else []
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert tmp.exists() and not (tmp_path / "killed").exists()
    subprocess.run(command, cwd=ROOT, check=True)
    assert hashes(one) == hashes(tmp_path / "killed") and not list(tmp_path.glob("*.tmp"))
    for pid in workers:  # none outlived its parent
        with contextlib.suppress(OSError):
            assert Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"


def interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


def never(*args: Any) -> None:
    raise AssertionError("this was done already")


@pytest.mark.parametrize("step", ["plan_sources", "write_chunk", "write_manifest", "publish"])
def test_what_is_finished_is_not_done_again(tmp_path: Path, sources: dict, step: str,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    straight = prepare(tmp_path, sources=sources, data_dir=str(tmp_path / "straight")).directory
    with monkeypatch.context() as patch:
        patch.setattr(pd, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path, sources=sources)
    with monkeypatch.context() as patch:
        for done in ("make_tokenizer", "encode_part"):
            patch.setattr(pd, done, never)
        if step in ("write_manifest", "publish"):
            patch.setattr(pd, "write_chunk", never)
        assert hashes(prepare(tmp_path, sources=sources).directory) == hashes(straight)


def test_a_kill_while_publishing_loses_nothing(tmp_path: Path, sources: dict,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts are gone, and the data has not got its name."""
    straight = prepare(tmp_path, sources=sources, data_dir=str(tmp_path / "straight")).directory
    with monkeypatch.context() as patch:
        patch.setattr(pd.os, "rename", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path, sources=sources)
    assert not (tmp_path / "out.tmp" / "parts").exists()
    monkeypatch.setattr(pd, "encode_part", never)
    assert hashes(prepare(tmp_path, sources=sources).directory) == hashes(straight)


def test_what_was_begun_with_other_settings_or_inputs_is_begun_anew(
        tmp_path: Path, sources: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(**settings: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(pd, "write_manifest", interrupt)
            with pytest.raises(KeyboardInterrupt):
                prepare(tmp_path, sources=sources, **settings)

    begin(seed=3)
    first = hashes(tmp_path / "out.tmp" / "train")
    begin(seed=4)
    assert hashes(tmp_path / "out.tmp" / "train") != first
    (tmp_path / "web" / "0.jsonl").write_text(json.dumps({"text": words(5, 900)}) + "\n")
    data = prepare(tmp_path, sources=sources, seed=4)
    other = prepare(tmp_path, sources=sources, seed=4, data_dir=str(tmp_path / "straight"))
    assert hashes(data.directory) == hashes(other.directory)


def test_again_is_nothing_to_do_and_other_settings_are_refused(
        tmp_path: Path, sources: dict, capsys: pytest.CaptureFixture) -> None:
    data = prepare(tmp_path, sources=sources)
    before = hashes(data.directory)
    prepare(tmp_path, sources=sources, workers=2, learning_rate=1e-3)  # no settings of the data
    assert "Nothing to do" in capsys.readouterr().out and hashes(data.directory) == before
    message = refused(tmp_path, sources=sources, seed=5, seq_len=32)
    assert "seq_len = 32 (the data: 16)" in message and "seed" in message and "data_dir" in message
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    assert "no manifest.json" in refused(tmp_path, sources=sources, data_dir=str(tmp_path / "full"))
    (tmp_path / "empty").mkdir()
    prepare(tmp_path, sources=sources, data_dir=f"{tmp_path}/empty/")


def test_only_unfinished_work_of_this_very_data_set_is_removed(tmp_path: Path,
                                                               sources: dict) -> None:
    (tmp_path / "out.backup.tmp").mkdir()
    (tmp_path / "out.backup.tmp" / "thesis.txt").write_text("precious")
    begin_unfinished(tmp_path / "out.v2.tmp")
    (tmp_path / "out.v2.tmp" / "half").write_text("days of work")
    before = hashes(tmp_path)
    prepare(tmp_path, sources=sources)
    assert before.items() <= hashes(tmp_path).items()
    # One that has our name and not our mark, or the mark of another, is in the way.
    (tmp_path / "x.tmp").mkdir()
    (tmp_path / "x.tmp" / "thesis.txt").write_text("precious")
    (tmp_path / "out.v2.tmp").rename(tmp_path / "y.tmp")
    before = hashes(tmp_path)
    for name in ("x", "y"):
        message = refused(tmp_path, sources=sources, data_dir=str(tmp_path / name))
        assert f"{name}.tmp is in the way" in message
    after = hashes(tmp_path)
    assert after.pop("small.py") and before.pop("small.py") and after == before


def test_two_at_once(tmp_path: Path, sources: dict) -> None:
    begin_unfinished(tmp_path / "out.tmp")
    lock = lock_directory(tmp_path / "out.tmp")
    assert "is in use by another process" in refused(tmp_path, sources=sources)
    lock.close()
    prepare(tmp_path, sources=sources)
    assert not list(tmp_path.glob("*.tmp"))


def test_it_is_not_for_torchrun(tmp_path: Path, sources: dict,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--workers" in refused(tmp_path, sources=sources)


def die(work: pd.Work, argument: int) -> None:
    os._exit(9)


def fail(work: pd.Work, argument: int) -> None:
    if argument != 1:
        raise UserError(f"{argument} is bad")
    time.sleep(0.2)
    raise UserError("1 is bad")


def stop_or_sleep(work: pd.Work, argument: int) -> None:
    if argument:
        time.sleep(60)
    raise KeyboardInterrupt


def some_work(tmp_path: Path, workers: int) -> pd.Work:
    (tmp_path / "parts").mkdir(exist_ok=True)
    config, _ = load([config_file(tmp_path)])
    return pd.Work(config, tmp_path, {}, workers)


def test_a_killed_worker_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="A worker process was killed"):
        pd.run_jobs(some_work(tmp_path, 2), "x", die, [1, 2])


def test_the_first_bad_input_is_named_whichever_worker_has_it(tmp_path: Path) -> None:
    for workers in (1, 2):
        with pytest.raises(UserError, match="1 is bad"):
            pd.run_jobs(some_work(tmp_path, workers), "x", fail, [1, 2, 3])


def test_a_stop_does_not_wait_for_other_workers(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        pd.run_jobs(some_work(tmp_path, 2), "x", stop_or_sleep, [0, 1])
    assert time.monotonic() - began < 30


def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(
        tmp_path: Path, sources: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "write_json", lambda path, value: path.write_text(json.dumps(value)))
        patch.setattr(dataset.os, "fsync", full)
        with pytest.raises(OSError) as stopped:  # which run_command prints as one sentence
            prepare(tmp_path, sources=sources)
    assert stopped.value.filename and stopped.value.errno == errno.ENOSPC
    assert not list(tmp_path.rglob("*.npy")) and not (tmp_path / "out").exists()
    prepare(tmp_path, sources=sources)


# ---------------------------------------------------------------------------------------------
# packing and mixing


@pytest.mark.parametrize("part_bytes", [1, 1 << 24])  # a part for each file, and one part
def test_sequences_are_the_documents_cut_and_none_is_lost(
        tmp_path: Path, sources: dict, monkeypatch: pytest.MonkeyPatch, part_bytes: int) -> None:
    monkeypatch.setattr(pd, "PART_BYTES", part_bytes)
    (tmp_path / "web" / "2.jsonl").write_text("")  # an empty part in the middle
    data = prepare(tmp_path, sources=sources)
    for about in data.manifest["sources"]:
        texts = texts_of(sources[about["name"]])
        stream, tail = stream_of(data, texts, 17)
        chunks, valid = sequences_of(data, about["name"])
        assert len({tuple(r) for r in stream}) == len(stream)
        place = {tuple(r): i for i, r in enumerate(stream)}
        trained = [place[tuple(r)] for r in np.concatenate(chunks)]
        held_out = [place[tuple(r)] for r in valid]
        # None is in two places, or twice in one.
        assert len(set(trained) | set(held_out)) == len(trained) + len(held_out)
        unused = about["unused_sequences"]
        assert len(stream) == len(trained) + len(held_out) + unused and unused < 4
        assert about["tokens"] == stream.size + tail and about["tail_tokens"] == tail
        assert about["documents"] == len(texts) and len(held_out) == 8
        assert about["bytes"] == sum(len(t.encode()) for t in texts)
        # Dealt round-robin: the k-th that is not held out is in chunk k % 4.
        rest = [i for i in range(len(stream)) if i not in held_out]
        for c, chunk in enumerate(chunks):
            assert [place[tuple(r)] for r in chunk] == rest[c:len(rest) - unused:4]
    mixes = {tuple(chunk["sources"].values()) for chunk in data.manifest["chunks"]}
    assert len(mixes) == 1 and sum(*mixes) == data.manifest["chunks"][0]["sequences"]


def test_one_eos_per_document_and_no_bos(tmp_path: Path) -> None:
    texts = [words(i, 30) for i in range(100)]
    files = {"a": jsonl(tmp_path / "a.jsonl", texts)}
    data = prepare(tmp_path, sources=files, n_chunks=1, valid_sequences=0)
    eos, [about] = data.tokenizer.eos_id, data.manifest["sources"]
    ids = data.chunk(0)["token_ids"].ravel()
    tail = stream_of(data, texts, 1)[0].ravel()[len(ids):]
    assert (ids == eos).sum() + (tail == eos).sum() == 100 == about["documents"]
    assert ids[0] != eos and len(tail) == about["tail_tokens"] and not data.manifest["valid"]


def test_weights_use_a_source_more_or_less(tmp_path: Path, sources: dict) -> None:
    weights = {"web": 0.5, "code": 2.25, "wiki": 0}
    data = prepare(tmp_path, sources=sources, source_weights=weights)
    for about in data.manifest["sources"]:
        chunks, valid = sequences_of(data, about["name"])
        stream, _ = stream_of(data, texts_of(sources[about["name"]]), 17)
        place = {tuple(r): i for i, r in enumerate(stream)}
        times = Counter(place[tuple(r)] for r in np.concatenate(chunks))
        free = about["sequences"] - about["valid_sequences"]
        want = free * weights[about["name"]]
        assert want - 4.5 <= sum(times.values()) == about["train_sequences"] <= want + 0.5
        assert not set(times) & {place[tuple(r)] for r in valid}
        if about["name"] == "web":  # half of it, from all over it
            assert set(times.values()) == {1} and max(times) > 0.95 * len(stream)
        if about["name"] == "code":
            assert set(times.values()) <= {1, 2, 3} and len(times) == free
    other = {"sources": sources, "data_dir": str(tmp_path / "other")}
    assert "source_weights names ['wbe']" in refused(tmp_path, source_weights={"wbe": 1}, **other)
    nothing = dict.fromkeys(sources, 0)
    assert "nothing to train on" in refused(tmp_path, source_weights=nothing, **other)


def test_a_cap_keeps_the_mix(tmp_path: Path, sources: dict) -> None:
    full = prepare(tmp_path, sources=sources, data_dir=str(tmp_path / "full")).manifest["chunks"][0]
    data = prepare(tmp_path, sources=sources, sequences_per_chunk=50)
    assert [chunk["sequences"] for chunk in data.manifest["chunks"]] == [50] * 4
    for name, n in data.manifest["chunks"][0]["sources"].items():
        assert abs(n - 50 * full["sources"][name] / full["sequences"]) < 1
        kept = {tuple(r) for r in np.concatenate(sequences_of(data, name)[0])}
        stream, _ = stream_of(data, texts_of(sources[name]), 17)
        place = [i for i, r in enumerate(stream) if tuple(r) in kept]
        # evenly from all of the source
        assert len(place) == len(kept) == 4 * n and max(place) > 0.9 * len(stream)
    assert pd.apportion([5, 5, 5], 7) == [3, 2, 2] and pd.apportion([5, 1], 9) == [5, 1]


def test_max_source_bytes_stops_in_file_order(tmp_path: Path, sources: dict,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pd, "PART_BYTES", 1)
    data = prepare(tmp_path, sources=sources, max_source_bytes=9000)
    for about in data.manifest["sources"]:
        texts = texts_of(sources[about["name"]])
        sizes = [*itertools.accumulate(len(t) for t in texts)]
        n = next(i for i, size in enumerate(sizes) if size >= 9000) + 1
        assert about["documents"] == n and about["bytes"] == sizes[n - 1]
        stream, _ = stream_of(data, texts[:n], 17)
        chunks, valid = sequences_of(data, about["name"])
        assert {tuple(r) for r in np.concatenate([*chunks, valid])} <= {tuple(r) for r in stream}


def test_a_source_that_is_too_small_is_named_with_numbers(tmp_path: Path) -> None:
    files = {"big": jsonl(tmp_path / "b.jsonl", [words(i, 90) for i in range(30)]),
             "tiny": jsonl(tmp_path / "t.jsonl", [words(1, 12)])}
    message = refused(tmp_path, sources=files)
    assert "'tiny'" in message and "valid_sequences = 8" in message and "n_chunks = 4" in message
    assert not (tmp_path / "out").exists()


def test_one_endless_document(tmp_path: Path) -> None:
    """2 MB without a space, and 2 MB of nothing else: linear time, and they come back."""
    for i, text in enumerate(("".join(random.Random(1).choices("abcdefgh", k=2_000_000)),
                              " " * 2_000_000)):
        (tmp_path / "long.txt").write_text(text)
        data = prepare(tmp_path, sources={"long": str(tmp_path / "long.txt")}, n_chunks=1,
                       data_dir=str(tmp_path / f"out{i}"), valid_sequences=0)
        found = data.tokenizer.decode(data.chunk(0)["token_ids"].ravel())
        assert text.startswith(found[:1_900_000])
        assert data.manifest["sources"][0]["bytes"] == 2_000_000


def test_canaries_are_there_as_often_as_they_should(tmp_path: Path, sources: dict) -> None:
    data = prepare(tmp_path, sources=sources, canaries={1: 5, 3: 4, 8: 2})
    assert data.sources == ["web", "code", "wiki", "canary"]
    chunks, _ = sequences_of(data, "canary")
    assert [len(chunk) for chunk in chunks] == [8] * 4  # of 33 copies
    times = Counter(tuple(r) for r in np.concatenate(chunks))
    assert sum(times.values()) == 32 and len(times) in (10, 11)
    want = Counter({1: 5, 3: 4, 8: 2})
    assert sum((Counter(times.values()) - want).values()) <= 1  # one copy was left over
    plain = prepare(tmp_path, sources=sources, data_dir=str(tmp_path / "plain"))
    for name in sources:  # nothing else has changed
        found, other = (sequences_of(d, name)[0] for d in (data, plain))
        assert all(np.array_equal(a, b) for a, b in zip(found, other))


def test_each_canary_has_a_third_of_the_run_to_itself(tmp_path: Path, sources: dict) -> None:
    data = prepare(tmp_path, sources=sources, n_chunks=6, canaries={1: 6, 4: 3, 12: 3})
    chunks, _ = sequences_of(data, "canary")
    assert [len(chunk) for chunk in chunks] == [9] * 6
    where: dict[tuple, list[int]] = {}
    for number, chunk in enumerate(chunks):
        for canary in chunk:
            where.setdefault(tuple(canary), []).append(number)
    thirds = [{number // 2 for number in numbers} for numbers in where.values()]
    assert all(len(third) == 1 for third in thirds)
    found = Counter((len(numbers), *third) for numbers, third in zip(where.values(), thirds))
    assert found == {(times, third): 2 if times == 1 else 1
                     for times in (1, 4, 12) for third in range(3)}
    # Within a third they are scattered: those planted 12 times are in both of its chunks.
    assert all(len({*numbers}) == 2 for numbers in where.values() if len(numbers) == 12)


def test_a_source_may_be_called_canary_where_none_are_planted(tmp_path: Path,
                                                             sources: dict) -> None:
    files = {"canary": sources["web"]}
    assert prepare(tmp_path, sources=files).sources == ["canary"]
    other = {"data_dir": str(tmp_path / "other")}
    assert "under the name canary" in refused(tmp_path, sources=files, canaries={1: 9}, **other)
    assert "3 sequences for 4 chunks" in refused(tmp_path, sources=sources, canaries={3: 1},
                                                 **other)


# ---------------------------------------------------------------------------------------------
# readers


def test_every_format(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    zstandard = pytest.importorskip("zstandard")
    texts = [words(i, 50) + " café 漢字 😀" for i in range(20)]
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    half = len(lines) // 2  # two frames in one file
    frames = zstandard.compress(lines[:half]) + zstandard.compress(lines[half:])
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    jsonl(tmp_path / "content.jsonl", texts, key="content")
    parquet.write_table(pa.table({"id": range(20), "content": texts}), tmp_path / "a.parquet")
    parquet.write_table(pa.table({"text": [*texts, None]}), tmp_path / "b.parquet")
    folder = tmp_path / "folder"
    (folder / "deep" / ".git").mkdir(parents=True)
    for i, t in enumerate(texts):
        (folder / ("deep" if i % 2 else "") / f"{i}.{'md' if i % 3 else 'py'}").write_text(t)
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0\0")
    (folder / "deep" / ".git" / "config").write_text("secret")
    (folder / "empty.txt").write_text("")
    files = {"gz": "a.jsonl.gz", "zst": "a.jsonl.zst", "content": "content.jsonl",
             "parquet": "a.parquet", "text_column": "b.parquet", "folder": "folder"}
    data = prepare(tmp_path, sources={k: str(tmp_path / v) for k, v in files.items()})
    about = {s["name"]: s for s in data.manifest["sources"]}
    want = Counter(map(tuple, stream_of(data, texts, 17)[0]))
    for name in files:
        assert about[name]["documents"] == 20, name
        chunks, valid = sequences_of(data, name)
        if name != "folder":
            assert not Counter(map(tuple, np.concatenate([*chunks, valid]))) - want
    assert about["text_column"]["dropped"] == {"no string in text": 1}
    assert about["folder"]["dropped"] == {"binary file": 1, "empty document": 1}
    assert data.manifest["dropped"]["hidden file or folder"] == 1


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """A pipe would be waited for, and links may lead nowhere."""
    folder = tmp_path / "folder"
    folder.mkdir()
    jsonl(folder / "a.jsonl", [words(i, 90) for i in range(9)])
    (folder / "link.jsonl").symlink_to(folder / "a.jsonl")
    (folder / "dangling.jsonl").symlink_to(folder / "nowhere")
    (folder / "self.jsonl").symlink_to(folder / "self.jsonl")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.jsonl")
    data = prepare(tmp_path, sources={"a": str(folder)})
    assert data.manifest["dropped"] == {"not a regular file": 3}
    assert data.manifest["sources"][0]["documents"] == 18
    other = {"data_dir": str(tmp_path / "other")}
    for pattern in ("pipe.jsonl", "dangling*", "[ds]*"):
        message = refused(tmp_path, sources={"a": str(folder / pattern)}, **other)
        assert "no file to read" in message and "none of a regular file" in message


def test_invalid_text_is_replaced_and_counted(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"\xef\xbb\xbfcaf\xe9 " + words(1, 300).encode())
    pair = '{"text": "one \\ud83d\\ude00 lone \\ud83d ' + words(2, 300) + '"}\n'
    (tmp_path / "lone.jsonl").write_bytes(pair.encode() + b'{"text": "x\xff"}\n')
    files = {"latin": str(tmp_path / "latin.txt"), "lone": str(tmp_path / "lone.jsonl")}
    data = prepare(tmp_path, sources=files, valid_sequences=0, n_chunks=1)
    text = data.tokenizer.decode(sequences_of(data, "latin")[0][0].ravel())
    assert text.startswith("caf\ufffd ")
    text = data.tokenizer.decode(sequences_of(data, "lone")[0][0].ravel())
    assert text.startswith("one \U0001f600 lone \ufffd ")
    assert [s["repaired"] for s in data.manifest["sources"]] == [1, 2]


def test_bad_lines_of_json(tmp_path: Path) -> None:
    good = [json.dumps({"text": words(i, 40)}) for i in range(40)]
    lines = [*good[:3], "{broken", *good[3:7], '{"title": 1}', '{"text": 5}', "", *good[7:]]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + "\n")
    message = refused(tmp_path, sources={"a": str(path)})
    assert f"{path}, line 4: not JSON" in message and "--on_bad_line=skip" in message
    data = prepare(tmp_path, sources={"a": str(path)}, on_bad_line="skip")
    assert data.manifest["dropped"] == {"not JSON": 2, 'no string "text" or "content"': 2}
    assert data.manifest["sources"][0]["documents"] == 40


def test_arrays_of_json_and_tables_are_read_and_other_fields_named(tmp_path: Path) -> None:
    texts = [words(i, 40) + f'\n"quoted, {i}"' for i in range(30)]
    texts[3] *= 900  # more letters than Python's csv module takes by itself
    jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts]))
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with open(tmp_path / name, "w", newline="") as f:
            table = csv.writer(f, delimiter=delimiter)
            table.writerows([["id", "content"], *([i, text] for i, text in enumerate(texts))])
    made = []
    for name in ("a.jsonl", "a.json", "a.csv", "a.tsv"):
        made.append(prepare(tmp_path, sources={"a": str(tmp_path / name)},
                            data_dir=str(tmp_path / name[2:])))
    chunks = [[chunk["sha256"] for chunk in data.manifest["chunks"]] for data in made]
    assert chunks[0] == chunks[1] == chunks[2] == chunks[3]
    jsonl(tmp_path / "b.jsonl", texts, key="body")
    assert 'its longest is "body": call that one "text"' in refused(
        tmp_path, sources={"a": str(tmp_path / "b.jsonl")})
    # A settings file is no text: alone it is refused, and among code it is passed over.
    (tmp_path / "code").mkdir()
    (tmp_path / "code/package.json").write_text('{"text": "one"}')
    (tmp_path / "code/tsconfig.json").write_text("{ // a comment")
    assert "1 x JSON that is no list of objects, in" in refused(
        tmp_path, sources={"a": str(tmp_path / "code/package.json")})
    (tmp_path / "code/a.py").write_text(words(1, 900))
    data = prepare(tmp_path, sources={"a": str(tmp_path / "code")},
                   data_dir=str(tmp_path / "of_code"))
    assert data.manifest["dropped"] == {"JSON that is no list of objects": 2}
    skipped = refused(tmp_path, sources={"a": str(tmp_path / "b.jsonl")}, on_bad_line="skip")
    assert "has no documents: 30 x no string" in skipped and "b.jsonl" in skipped


def test_too_little_text_says_what_would_do_and_keeps_the_tokens(
        tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {"a": jsonl(tmp_path / "a.jsonl", [words(i, 40) for i in range(40)]),
               "b": jsonl(tmp_path / "b.jsonl", [words(i, 40) for i in range(30)])}
    message = refused(tmp_path, sources=sources, n_chunks=5000, valid_sequences=3000)
    assert "'a' is too small" in message and "'b' is too small" in message
    numbers = dict(re.findall(r"--(\w+)=(\d+)", message))
    # The numbers that it names do, and nothing is encoded a second time.
    monkeypatch.setattr(pd, "encode_part", None)
    data = prepare(tmp_path, sources=sources, **{key: int(n) for key, n in numbers.items()})
    assert "Going on with" in capsys.readouterr().out
    assert len(data.manifest["chunks"]) == int(numbers["n_chunks"])
    monkeypatch.undo()
    anew = prepare(tmp_path, sources=sources, data_dir=str(tmp_path / "anew"),
                   **{key: int(n) for key, n in numbers.items()})
    assert hashes(anew.directory) == hashes(data.directory)


def test_missing_and_broken_inputs_are_named(tmp_path: Path) -> None:
    (tmp_path / "hollow").mkdir()
    (tmp_path / "nothing.txt").write_text("")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "abc"}\n' * 9000)[:100])
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    for path, sentence in (("no/such/*.txt", "no/such/*.txt: found nothing"),
                           ("hollow", "hollow: found nothing"),
                           ("nothing.txt", "no documents: 1 x empty document"),
                           ("cut.jsonl.gz", "cut.jsonl.gz cannot be read"),
                           ("x.parquet", "x.parquet cannot be read")):
        assert sentence in refused(tmp_path, sources={"a": str(tmp_path / path)})
    assert "cannot name a source" in refused(tmp_path, sources={"../a": str(tmp_path / "hollow")})
    many = {f"s{i}": str(tmp_path / "nothing.txt") for i in range(256)}
    assert "256 sources" in refused(tmp_path, sources=many)


# ---------------------------------------------------------------------------------------------
# released chunks


@pytest.fixture
def released(tmp_path: Path) -> dict[str, Any]:
    """Two released files and one for validation, 17 ids a line; the settings to read them."""
    rng = np.random.default_rng(0)
    for name, order in (("train_000", ["arxiv", "c4", "starcoderdata"]),
                        ("train_001", ["c4", "new", "arxiv"]), ("valid", ["c4", "arxiv"])):
        with open(tmp_path / f"{name}.jsonl", "w") as f:
            for source in order:
                for ids in rng.integers(0, 270, (300, 17)).tolist():
                    f.write(json.dumps({"token_ids": ids, "source": source}) + "\n")
    path = tiny_llama(tmp_path / "tokenizer.json")
    return {"tokenized": str(tmp_path / "train_*.jsonl"), "n_chunks": 2, "valid_sequences": 1000,
            "tokenizer": f"llama:{path}", "tokenized_valid": str(tmp_path / "valid.jsonl")}


def released_lines(path: Path) -> list[tuple[str, list[int]]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [(record["source"], record["token_ids"]) for record in records]


def test_released_lines_become_sequences_one_to_one(tmp_path: Path, released: dict) -> None:
    data = prepare(tmp_path, **released)
    assert data.sources == ["arxiv", "c4", "starcoderdata", "new"]
    for c in range(2):
        chunk = data.chunk(c)
        names = [data.sources[s] for s in chunk["source"]]
        found = list(zip(names, chunk["token_ids"].tolist()))
        assert found == released_lines(tmp_path / f"train_00{c}.jsonl")
        assert data.manifest["chunks"][c]["made_from"] == f"train_00{c}"
    assert list(data.manifest["chunks"][1]["sources"].values()) == [300, 300, 0, 300]
    valid = released_lines(tmp_path / "valid.jsonl")
    kept = data.validation("c4")["token_ids"].tolist()
    assert kept == [ids for source, ids in valid if source == "c4"]
    assert data.verify() == [] and (data.directory / "tokenizer.json").exists()
    assert [s["unused_sequences"] for s in data.manifest["sources"]] == [0] * 4
    other = prepare(tmp_path, **released, workers=3, data_dir=str(tmp_path / "three"))
    assert hashes(data.directory) == hashes(other.directory)
    (tmp_path / "gz").mkdir()
    for path in tmp_path.glob("train_*.jsonl"):
        (tmp_path / "gz" / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    released |= {"tokenized": f"{tmp_path}/gz/*", "data_dir": str(tmp_path / "zipped")}
    zipped = prepare(tmp_path, **released)
    assert zipped.manifest["chunks"] == data.manifest["chunks"]


def test_released_lines_resume(tmp_path: Path, released: dict,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    """The part of a chunk is removed with the chunk's end, and not missed."""
    straight = prepare(tmp_path, **released, data_dir=str(tmp_path / "straight")).directory
    for step in ("write_released", "write_manifest"):
        with monkeypatch.context() as patch:
            patch.setattr(pd, step, interrupt)
            with pytest.raises(KeyboardInterrupt):
                prepare(tmp_path, **released)
    parts = tmp_path / "out.tmp" / "parts"
    assert [p.name for p in sorted(parts.glob("*.bin"))] == ["00002.bin"]
    (parts / "chunks_00001.json").unlink()  # as if the kill had come before it
    monkeypatch.setattr(pd, "convert_released", never)
    assert hashes(prepare(tmp_path, **released).directory) == hashes(straight)


def test_released_lines_are_capped_in_proportion(tmp_path: Path, released: dict) -> None:
    data = prepare(tmp_path, **released | {"valid_sequences": 10}, sequences_per_chunk=90)
    assert [chunk["sequences"] for chunk in data.manifest["chunks"]] == [90, 90]
    assert list(data.manifest["chunks"][0]["sources"].values()) == [30, 30, 30, 0]
    lines = released_lines(tmp_path / "train_000.jsonl")
    assert data.chunk(0)["token_ids"].tolist() == [ids for _, ids in lines[::10]]
    assert [file["sequences"] for file in data.manifest["valid"]] == [10, 10]


def test_bad_released_lines_are_named_and_counted(tmp_path: Path, released: dict) -> None:
    path = tmp_path / "train_001.jsonl"
    good = path.read_text().splitlines()
    bad = ['{"token_ids": [s1', '{"source": "c4"}', json.dumps({"token_ids": [1] * 17})]
    strange = [[1] * 16 + [x] for x in (2 ** 70, -1, 278, 1.0, True, "1", None, [1])]
    for ids in [*strange, [[1]] * 17, [1] * 18, "1", [], None]:
        bad.append(json.dumps({"token_ids": ids, "source": "c4"}))
    bad += ["[]", "3", "", json.dumps({"token_ids": [1] * 17, "source": 5}), "[" * 10_000]
    reason = "not JSON with token_ids, 17 numbers below 278, and a source"
    for line in bad[:4]:
        path.write_text("\n".join([*good[:290], line, *good[290:]]) + "\n")
        message = refused(tmp_path, **released, workers=2)
        assert f"{path}, line 291: {reason}" in message and "--on_bad_line=skip" in message
    path.write_text("\n".join(itertools.chain(*zip(good, bad), good[len(bad):])) + "\n")
    data = prepare(tmp_path, **released, on_bad_line="skip")
    assert data.manifest["dropped"] == {reason: len(bad)}
    assert data.manifest["chunks"][1]["sequences"] == 900
    path.write_text("\n".join(bad))
    message = refused(tmp_path, **released, on_bad_line="skip", data_dir=str(tmp_path / "other"))
    assert "train_001.jsonl has no line" in message


@needs_shared
def test_real_lines_of_amber(tmp_path: Path) -> None:
    both = {"tokenizer": f"llama:{SHARED / 'llama_crystal_tokenizer.json'}", "vocab_size": 32000,
            "seq_len": 2048, "n_chunks": 1}
    data = prepare(tmp_path, tokenized=str(SHARED / "amber_rows_good.jsonl"), **both)
    chunk, real = data.chunk(0), released_lines(SHARED / "amber_rows_good.jsonl")
    assert chunk["token_ids"].tolist() == [ids for _, ids in real]
    assert chunk["token_ids"].dtype == "<u2" and chunk.dtype.itemsize == 1 + 2 * 2049
    both |= {"tokenized": str(SHARED / "amber_rows_bad.jsonl"), "data_dir": str(tmp_path / "bad")}
    assert "amber_rows_bad.jsonl, line 1: not" in refused(tmp_path, **both)
    text = (SHARED / "amber_rows_bad.jsonl").read_text().replace("]}", '], "source": "c4"}')
    (tmp_path / "bad.jsonl").write_text(text)
    both["tokenized"] = str(tmp_path / "bad.jsonl")
    assert "bad.jsonl, line 4: not" in refused(tmp_path, **both)
    data = prepare(tmp_path, **both, on_bad_line="skip")
    assert [*data.manifest["dropped"].values()] == [3]  # two are no JSON, one has 2050 ids
    assert data.manifest["chunks"][0]["sequences"] == 7


def test_released_settings_that_cannot_work(tmp_path: Path, released: dict) -> None:
    assert "--n_chunks=2" in refused(tmp_path, **released | {"n_chunks": 5})
    assert "bpe" in refused(tmp_path, **released | {"tokenizer": "bpe"})
    assert "has 278 ids" in refused(tmp_path, **released, vocab_size=100)


# ---------------------------------------------------------------------------------------------
# tokenizers in data sets


def test_a_tokenizer_of_another_data_set(tmp_path: Path, sources: dict) -> None:
    first = prepare(tmp_path, sources=sources, data_dir=str(tmp_path / "first"))
    second = prepare(tmp_path, sources={"a": sources["web"]}, tokenizer=f"data:{tmp_path}/first")
    assert first.manifest["tokenizer"] == second.manifest["tokenizer"]
    other = {"sources": sources, "data_dir": str(tmp_path / "other")}
    assert "no prepared data" in refused(tmp_path, tokenizer=f"data:{tmp_path}/nowhere", **other)
    assert "vocab_size is 100" in refused(tmp_path, vocab_size=100, **other)


def test_help_and_no_torch() -> None:
    code = "import sys, prepare_data; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    out = subprocess.run([sys.executable, "prepare_data.py", "-h"], cwd=ROOT, check=True,
                         capture_output=True, text=True).stdout
    assert "configs/amber_7b.py" in out and "--sequences_per_chunk" in out


# ---------------------------------------------------------------------------------------------
# the embedded corpus


def test_embedded_corpus(tmp_path: Path) -> None:
    pd.main([str(ROOT / "configs" / "amber_tiny.py"), f"--data_dir={tmp_path / 'tiny'}"])
    data = load_data(tmp_path / "tiny")
    assert [chunk["sequences"] for chunk in data.manifest["chunks"]] == [2720] * 10
    assert data.sources == list(corpus.CORPUS)
    total = sum(s["bytes"] for s in data.manifest["sources"])
    assert 12e6 < total < 13e6
    for s in data.manifest["sources"]:
        assert corpus.CORPUS[s["name"]] * 0.99 < s["bytes"] < 1.1 * corpus.CORPUS[s["name"]], s
        assert s["valid_sequences"] == 64 and s["documents"] > 200
    # Everyone with the pinned versions has these very bytes, and the README says which.
    assert f"`{data.sha256}`" in (ROOT / "README.md").read_text()
    assert data.n_vocab == 4096 and total / sum(s["tokens"] for s in data.manifest["sources"]) > 3
    assert {p.name for p in data.directory.iterdir()} == {
        "train", "valid", "documents", "manifest.json", "tokenizer.tiktoken"}


def test_embedded_corpus_is_clean_and_the_same_twice(tmp_path: Path,
                                                     monkeypatch: Any) -> None:
    files = corpus.write_embedded_corpus(tmp_path / "one")
    texts = {name: texts_of(path) for name, [path] in files.items()}
    everything = "\n".join(itertools.chain(*texts.values()))
    # Nothing of this machine; /usr/local is in texts everywhere, and short host names are words.
    folders = {str(Path.home()), str(ROOT), sys.prefix, sys.base_prefix}
    folders = {f for f in folders if len(f) > 5 and not f.startswith("/usr")}
    assert not [f for f in folders if f in everything]
    assert len(os.uname().nodename) < 8 or os.uname().nodename not in everything
    assert not re.search(r"/home/\w+/\.?(pyenv|venv|conda|cache)|feedstock_root", everything)
    # Nor in the files that another version of a package would make the corpus take instead.
    for _, path in corpus.python_files():
        code = path.read_bytes()
        assert not [f for f in folders if f.encode() in code], path
    assert "\0" not in everything
    documents = [*itertools.chain(*texts.values())]
    assert len(set(documents)) == len(documents)
    paragraphs = Counter(" ".join(p.split()) for d in documents for p in d.split("\n\n"))
    assert not [p for p, n in paragraphs.items() if len(p) >= 60 and n > 1]
    assert "is the reference" in corpus.describe(files)
    corpus.main([str(tmp_path / "two")])
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    Path(files["code"][0]).write_text("another text")
    assert "a file of theirs was changed" in corpus.describe(files)
    monkeypatch.setattr(corpus, "versions", lambda: ["torch==2.0.0", "numpy==2.4.6"])
    assert "torch==2.0.0 is installed, and the reference" in corpus.describe(files)
    with pytest.raises(UserError, match="Name one folder"):
        corpus.main([])
