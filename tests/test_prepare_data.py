"""prepare_data.py: the same bytes whoever makes them, nothing lost, bad input named."""

import gzip
import json
import os
import random
import subprocess
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
from helpers import ROOT, jsonl, tiny_llama, words

import prepare_data as pd
from configs import Config, UserError
from data import Data, load_data, lock_directory, sha256_file
from tokenizer import FIM_TOKENS, make_tokenizer
from tools import corpus

SMALL = {"vocab_size": 300, "seq_len": 16, "n_chunks": 4, "valid_sequences": 8,
         "global_batch_size": 4, "micro_batch_size": 2, "workers": 1}


def config_file(tmp: Path, **settings: Any) -> str:
    """A config with small settings; data in tmp/out unless another data_dir is given."""
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


def stream_of(data: Data, texts: list[str]) -> tuple[np.ndarray, int]:
    """What the sequences of a source must be, made the slow and obvious way; and its tail."""
    ids, width = [], data.seq_len + 1
    for text in texts:
        ids += [*data.tokenizer.encode(text).tolist(), data.tokenizer.eos_id]
    return np.array(ids[:len(ids) // width * width]).reshape(-1, width), len(ids) % width


def sequences_of(data: Data, source: str) -> tuple[list[np.ndarray], np.ndarray]:
    """The sequences of a source in each chunk, and its validation sequences."""
    number = data.sources.index(source)
    chunks = [data.chunk(i) for i in range(len(data.manifest["chunks"]))]
    found = [chunk[chunk["source"] == number] for chunk in chunks]
    if source not in data.validation_sources:
        return found, found[0][:0]
    valid = data.validation(source)
    assert (valid["source"] == number).all()
    return found, valid


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, str]:
    """Three sources of several files."""
    for k, (name, n) in enumerate((("web", 5), ("code", 3), ("wiki", 2))):
        for i in range(n):
            texts = [words(1000 * k + 100 * i + d, 40) + f" {name}" for d in range(25)]
            jsonl(tmp_path / name / f"{i}.jsonl", texts)
    return {name: str(tmp_path / name / "*.jsonl") for name in ("web", "code", "wiki")}


# ---- the same bytes whoever makes them


def stop_at(module: Any, step: str, tmp: Path, **settings: Any) -> None:
    """Prepare data, but with Ctrl-C instead of a step."""
    stopped = patch.object(module, step, side_effect=KeyboardInterrupt)
    with stopped, pytest.raises(KeyboardInterrupt):
        prepare(tmp, **settings)


def test_what_is_finished_is_not_done_again(tmp_path: Path, sources: dict,
                                            capsys: pytest.CaptureFixture) -> None:
    straight = prepare(tmp_path, sources=sources, data_dir=str(tmp_path / "straight")).directory
    stop_at(pd, "deal", tmp_path, sources=sources)
    never = AssertionError("this was done already")
    with patch.multiple(pd, sample_texts=Mock(side_effect=never),
                        choose_documents=Mock(side_effect=never)):
        stop_at(pd, "write_sequences", tmp_path, sources=sources)
        stop_at(pd, "list_documents", tmp_path, sources=sources)
        with patch.object(pd, "writing_array", side_effect=never):
            stop_at(pd.shutil, "rmtree", tmp_path, sources=sources)
            assert "Continuing" in capsys.readouterr().out
            assert hashes(prepare(tmp_path, sources=sources).directory) == hashes(straight)
    assert "Nothing to do" in capsys.readouterr().out
    # But what was begun with other settings or other texts is begun anew.
    stop_at(pd, "list_documents", tmp_path, sources=sources, seed=3, data_dir=str(tmp_path / "new"))
    (tmp_path / "web" / "0.jsonl").write_text(json.dumps({"text": words(5, 900)}) + "\n")
    begun = prepare(tmp_path, sources=sources, seed=4, data_dir=str(tmp_path / "new"))
    anew = prepare(tmp_path, sources=sources, seed=4, data_dir=str(tmp_path / "anew"), workers=3)
    assert hashes(begun.directory) == hashes(anew.directory) != hashes(straight)


def test_other_settings_are_refused_and_two_at_once(tmp_path: Path, sources: dict,
                                                    capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "out" / "unfinished").mkdir(parents=True)
    with lock_directory(tmp_path / "out" / "unfinished"):
        assert "is in use by another process" in refused(tmp_path, sources=sources)
    before = hashes(prepare(tmp_path, sources=sources).directory)
    prepare(tmp_path, sources=sources, workers=2, learning_rate=1e-3)  # no settings of the data
    assert "Nothing to do" in capsys.readouterr().out and hashes(tmp_path / "out") == before
    assert "seq_len = 32 (the data: 16)" in refused(tmp_path, sources=sources, seq_len=32)


def test_a_directory_of_others_is_left_alone(tmp_path: Path, sources: dict) -> None:
    for folder in ("one", "two/unfinished", "three/train"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "thesis.txt").write_text("precious")
    before = hashes(tmp_path)
    for name in ("one", "two", "three"):
        message = refused(tmp_path, sources=sources, data_dir=str(tmp_path / name))
        assert "no manifest.json: it is not a data set" in message
    after = hashes(tmp_path)
    assert after.pop("small.py") and after == before
    (tmp_path / "empty").mkdir()
    prepare(tmp_path, sources=sources, data_dir=f"{tmp_path}/empty/")


def test_a_worker_process_that_is_killed_is_not_waited_for() -> None:
    with pytest.raises(BrokenExecutor):
        pd.in_processes(2, os._exit, [9, 9])


# ---- packing and mixing


def test_sequences_are_the_documents_cut_and_none_is_lost(tmp_path: Path, sources: dict) -> None:
    (tmp_path / "web" / "2.jsonl").write_text("")
    data = prepare(tmp_path, sources=sources)
    for about in data.manifest["sources"]:
        name, texts = about["name"], texts_of(sources[about["name"]])
        stream, tail = stream_of(data, texts)
        chunks, valid = sequences_of(data, name)
        # A sequence is that of its number, and none is in two places, or twice in one.
        for chunk in (*chunks, valid):
            assert (chunk["token_ids"] == stream[chunk["number"]]).all()
        trained, held_out = np.concatenate(chunks)["number"].tolist(), valid["number"].tolist()
        assert len(set(trained) | set(held_out)) == len(trained) + len(held_out)
        unused = len(stream) - len(trained) - len(held_out)
        assert 0 <= unused < 4 and about["train_sequences"] == len(trained)
        assert about["tokens"] == stream.size + tail and about["tail_tokens"] == tail
        assert about["documents"] == len(texts) and len(held_out) == 8
        assert about["bytes"] == sum(len(t.encode()) for t in texts)
        # Dealt round-robin: the k-th that is not held out is in chunk k % 4.
        rest = [i for i in range(len(stream)) if i not in held_out]
        for c, chunk in enumerate(chunks):
            assert chunk["number"].tolist() == rest[c:len(rest) - unused:4]
    mixes = {tuple(chunk["sources"].values()) for chunk in data.manifest["chunks"]}
    assert len(mixes) == 1 and sum(*mixes) == data.manifest["chunks"][0]["sequences"]


def test_weights_use_a_source_more_or_less(tmp_path: Path, sources: dict) -> None:
    weights = {"web": 0.5, "code": 2.25, "wiki": 0}
    data = prepare(tmp_path, sources=sources, source_weights=weights)
    for about in data.manifest["sources"]:
        chunks, valid = sequences_of(data, about["name"])
        times = Counter(np.concatenate(chunks)["number"].tolist())
        free = about["sequences"] - about["valid_sequences"]
        want = free * weights[about["name"]]
        assert want - 4.5 <= sum(times.values()) == about["train_sequences"] <= want + 0.5
        assert not set(times) & set(valid["number"].tolist())
        if about["name"] == "web":  # half of it, from all over it
            assert set(times.values()) == {1} and max(times) > 0.95 * about["sequences"]
        if about["name"] == "code":
            assert set(times.values()) <= {1, 2, 3} and len(times) == free
    # A cap on the chunks keeps the mix.
    capped = prepare(tmp_path, sources=sources, source_weights=weights, sequences_per_chunk=50,
                     data_dir=str(tmp_path / "capped"))
    full = data.manifest["chunks"][0]
    assert [chunk["sequences"] for chunk in capped.manifest["chunks"]] == [50] * 4
    for name in ("web", "code"):
        n = capped.manifest["chunks"][0]["sources"][name]
        assert abs(n - 50 * full["sources"][name] / full["sequences"]) < 1


# ---- readers


def test_every_format(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    zstandard = pytest.importorskip("zstandard")
    texts = [words(i, 50) + " café 漢字 😀" for i in range(20)]
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.replace(b'"text"', b'"body"')))
    half = len(lines) // 2  # two frames in one file
    frames = zstandard.compress(lines[:half]) + zstandard.compress(lines[half:])
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    (tmp_path / "c4.json").write_bytes(lines.replace(b'"text"', b'"content"'))
    parquet.write_table(pa.table({"id": range(21), "text": [*texts, None]}), tmp_path / "a.parquet")
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    for i, t in enumerate(texts):
        (folder / ("deep" if i % 2 else "") / f"{i}.{'md' if i % 3 else 'py'}").write_text(t)
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0\0")
    (folder / "empty.txt").write_text("")
    # What is JSON or a table, but not JSON Lines, is told and left out.
    (folder / "package.json").write_text('{"name": "one"}\n{"text": "two"}')
    (folder / "table.csv").write_text("id,text\n1,one\n")
    # A pipe would be waited for, and a link may lead nowhere.
    (folder / "dangling.txt").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.txt")
    files = {"gz": "a.jsonl.gz", "zst": "a.jsonl.zst", "json": "c4.json",
             "parquet": "a.parquet", "folder": "folder"}
    data = prepare(tmp_path, sources={k: str(tmp_path / v) for k, v in files.items()},
                   text_field="body,text,content")
    said, about = capsys.readouterr().out, {s["name"]: s for s in data.manifest["sources"]}
    stream, _ = stream_of(data, texts)
    for name in files:
        assert about[name]["documents"] == 20, name
        chunks, valid = sequences_of(data, name)
        for chunk in (*chunks, valid) if name != "folder" else ():
            assert (chunk["token_ids"] == stream[chunk["number"]]).all()
    wanted = "row without a string in body or text or content, as text_field says"
    assert about["parquet"]["dropped"] == {wanted: 1}
    other = "a table or JSON, but not JSON Lines: convert it to .jsonl"
    assert about["folder"]["dropped"] == {"binary file": 1, "empty document": 1, other: 2}
    assert f"2 x {other}, " in said and "2 x not a regular file" in said
    for link in ("dangling.txt", "pipe*"):
        assert "There is no regular file at" in refused(
            tmp_path, sources={"a": str(folder / link)}, data_dir=str(tmp_path / "other"))


def test_invalid_text_is_replaced_and_bad_lines_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"\xef\xbb\xbfcaf\xe9 " + words(1, 300).encode())
    pair = '{"text": "one \\ud83d\\ude00 lone \\ud83d ' + words(2, 300) + '"}\n'
    bad = ["{broken", '{"title": 1}', '{"text": 5}', "5", "[1]"]
    path = tmp_path / "lone.jsonl"
    path.write_bytes(pair.encode() + b'{"text": "x\xff"}\n' + "\n".join(bad).encode() + b"\n")
    settings = {"sources": {"latin": str(tmp_path / "latin.txt"), "lone": str(path)},
                "valid_sequences": 0, "n_chunks": 1}
    reason = "not JSON with a string in text or content, as text_field says"
    message = refused(tmp_path, **settings)
    assert f"{path}, line 3: {reason}" in message and "--on_bad_line=skip" in message
    data = prepare(tmp_path, on_bad_line="skip", **settings)
    for name, begin in (("latin", "caf\ufffd "), ("lone", "one \U0001f600 lone \ufffd ")):
        ids = sequences_of(data, name)[0][0]["token_ids"]
        assert data.tokenizer.decode(ids.ravel()).startswith(begin)
    assert [s["repaired"] for s in data.manifest["sources"]] == [1, 2]
    assert data.manifest["dropped"] == {reason: 5}
    assert [s["documents"] for s in data.manifest["sources"]] == [1, 2]


def test_missing_broken_and_too_small_inputs_are_named(tmp_path: Path) -> None:
    (tmp_path / "hollow").mkdir()
    (tmp_path / "nothing.txt").write_text("")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "abc"}\n' * 9000)[:100])
    jsonl(tmp_path / "tiny.jsonl", [words(1, 12)])
    for path, sentence in (("hollow", "hollow (passed over: nothing)"),
                           ("nothing.txt", "'dropped': {'empty document': 1}"),
                           ("cut.jsonl.gz", "cut.jsonl.gz cannot be read"),
                           ("tiny.jsonl", "'a' is too small for n_chunks = 4 or")):
        assert sentence in refused(tmp_path, sources={"a": str(tmp_path / path)})
    assert "cannot name a source" in refused(tmp_path, sources={"../a": str(tmp_path / "hollow")})


# ---- released chunks


@pytest.fixture
def released(tmp_path: Path) -> dict[str, Any]:
    """Two released files and one for validation, 17 ids a line; the settings to read them."""
    rng = np.random.default_rng(0)
    for name, order in (("train_000", ["arxiv", "c4", "starcoderdata"]),
                        ("train_001", ["c4", "arxiv"]), ("valid", ["c4", "arxiv"])):
        with open(tmp_path / f"{name}.jsonl", "w") as f:
            for source in order:
                for ids in rng.integers(0, 270, (300, 17)).tolist():
                    f.write(json.dumps({"token_ids": ids, "source": source}) + "\n")
    path = tiny_llama(tmp_path / "tokenizer.json")
    return {"tokenized": str(tmp_path / "train_*.jsonl"), "n_chunks": 2, "valid_sequences": 1000,
            "tokenizer": f"hf:{path}", "tokenized_valid": str(tmp_path / "valid.jsonl")}


def released_lines(path: Path) -> list[tuple[str, list[int]]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [(record["source"], record["token_ids"]) for record in records]


def test_released_lines_become_sequences_one_to_one(tmp_path: Path, released: dict) -> None:
    data = prepare(tmp_path, **released)
    assert data.sources == ["arxiv", "c4", "starcoderdata"]
    for c in range(2):
        chunk = data.chunk(c)
        names = [data.sources[s] for s in chunk["source"]]
        found = list(zip(names, chunk["token_ids"].tolist()))
        assert found == released_lines(tmp_path / f"train_00{c}.jsonl")
        assert chunk["number"].tolist() == [*range(len(chunk))]
        assert data.manifest["chunks"][c]["made_from"] == f"train_00{c}"
    valid = released_lines(tmp_path / "valid.jsonl")
    kept = data.validation("c4")["token_ids"].tolist()
    assert kept == [ids for source, ids in valid if source == "c4"]
    assert data.verify() == [] and (data.directory / "tokenizer.json").exists()
    other = prepare(tmp_path, **released, workers=3, data_dir=str(tmp_path / "three"))
    assert hashes(data.directory) == hashes(other.directory)


def test_released_files_resume_and_no_worker_outlives_its_parent(
        tmp_path: Path, released: dict) -> None:
    path = tmp_path / "train_001.jsonl"
    path.write_text(path.read_text() * 40)
    straight = prepare(tmp_path, **released, data_dir=str(tmp_path / "straight")).directory
    command = [sys.executable, str(ROOT / "prepare_data.py"),
               config_file(tmp_path, **released, workers=2)]
    killed = subprocess.Popen(command, cwd=ROOT)
    # The file for validation is done, and the second chunk is being made.
    while not (tmp_path / "out/unfinished/valid_000.json").exists():
        assert killed.poll() is None, "it finished before it could be killed"
        time.sleep(0.002)
    workers = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    killed.kill()
    killed.wait()
    assert len(workers) >= 2 and (tmp_path / "out/train/chunk_000.npy").exists()
    stats = [Path(f"/proc/{pid}/stat") for pid in workers]
    began = time.monotonic()
    while any(stat.exists() and stat.read_text().split()[2] != "Z" for stat in stats):
        assert time.monotonic() - began < 20, "a worker outlived its parent"
        time.sleep(0.01)
    subprocess.run(command, cwd=ROOT, check=True)
    assert hashes(tmp_path / "out") == hashes(straight)


def test_released_lines_are_capped_in_proportion(tmp_path: Path, released: dict) -> None:
    data = prepare(tmp_path, **released | {"valid_sequences": 10}, sequences_per_chunk=90)
    assert [chunk["sequences"] for chunk in data.manifest["chunks"]] == [90, 90]
    assert list(data.manifest["chunks"][0]["sources"].values()) == [30, 30, 30]
    lines = released_lines(tmp_path / "train_000.jsonl")
    assert data.chunk(0)["token_ids"].tolist() == [ids for _, ids in lines[::10]]
    assert data.chunk(0)["number"].tolist() == [*range(0, 900, 10)]
    assert [file["sequences"] for file in data.manifest["valid"]] == [10, 10]


def test_bad_released_lines_are_named_and_counted(tmp_path: Path, released: dict) -> None:
    path = tmp_path / "train_001.jsonl"
    good = path.read_text().splitlines()
    bad = ['{"token_ids": [s1', '{"source": "c4"}', json.dumps({"token_ids": [1] * 17})]
    strange = [[1] * 16 + [x] for x in (2 ** 70, -1, 278, 1.0, True, "1", [1])]
    for ids in [*strange, [1] * 18, None]:
        bad.append(json.dumps({"token_ids": ids, "source": "c4"}))
    bad += ["[]", "3", json.dumps({"token_ids": [1] * 17, "source": 5}), "[" * 10_000]
    reason = "not JSON with token_ids, 17 numbers below 278, and a source"
    new = json.dumps({"token_ids": [1] * 17, "source": "new"})
    for line, why in ((bad[0], f"{reason} (found"), (bad[3], f"{reason} (one of its token_ids"),
                      (bad[10], f"{reason} (it has 18 token_ids; found"),
                      (bad[14], f"{reason} (its source is no"), (new, "the source 'new' is not")):
        path.write_text("\n".join([*good[:290], line, *good[290:]]) + "\n")
        assert f"{path}, line 291: {why}" in refused(tmp_path, **released, workers=2)
    path.write_text("\n".join([*good[:290], *bad, *good[290:]]) + "\n")
    data = prepare(tmp_path, **released, on_bad_line="skip")
    assert data.manifest["dropped"] == {reason: len(bad)}
    assert data.manifest["chunks"][1]["sequences"] == 600
    first = tmp_path / "train_000.jsonl"
    first.write_text(json.dumps({"token_ids": [1] * 17, "source": "../../x"}))
    assert "cannot name a source" in refused(tmp_path, **released, data_dir=str(tmp_path / "other"))


# ---- Crystal's stages, and documents written for infilling


def test_infilling_is_the_papers_and_gives_back_the_document() -> None:
    tokenizer = make_tokenizer(Config(vocab_size=400, crystal_tokens=True), [words(1, 60)])
    pre, mid, suf = (tokenizer.specials[name] for name in FIM_TOKENS)
    draw, forms = random.Random(2), Counter()
    for seed in range(1000):
        pieces = ["def ", "foo", "(bar)", " ", "\n", "\U0001f40d", "<|fim_middle|>", "x"]
        text = "".join(draw.choices(pieces, k=draw.choice((1, 2, 3, 8, 40))))
        document = tokenizer.encode(text)
        out = pd.fill_in_the_middle(document, tokenizer, 0.9, 0.5,
                                    np.random.default_rng(seed)).tolist()
        d, cuts = document.tolist(), np.random.default_rng(seed)
        cuts.random()  # whether it is cut at all
        a, b = np.sort(cuts.integers(len(d) + 1, size=2))
        expected = {"prefix first": [pre, *d[:a], suf, *d[b:], mid, *d[a:b]],
                    "suffix first": [pre, suf, *d[b:], mid, *d[:b]], "as it was": d}
        # Nothing is encoded anew, so there is no space at the cuts.
        forms[next(form for form, ids in expected.items() if ids == out)] += 1
    assert forms["as it was"] / 1000 == pytest.approx(0.1, abs=0.03)
    assert min(forms.values()) > 50 and len(forms) == 3


def documents_of(data: Data, source: str) -> list[list[int]]:
    """The documents of a data set of one chunk that are whole in it."""
    chunk, eos = data.chunk(0), data.tokenizer.eos_id
    ids = chunk["token_ids"][chunk["source"] == data.sources.index(source)].ravel()
    ends = np.flatnonzero(ids == eos) + 1
    return [document[:-1].tolist() for document in np.split(ids, ends)[1:-1]]


def test_stages_share_tokenizer_and_validation_and_no_text_is_in_two_places(tmp_path: Path) -> None:
    """No document has a part of another in it by chance."""
    files = {name: jsonl(tmp_path / f"{name}.jsonl", [words(1000 * k + i, 12) for i in range(60)])
             for k, name in enumerate(("prose", "code"))}
    both = {"sources": files, "vocab_size": 340, "seq_len": 32, "n_chunks": 1, "valid_sequences": 6,
            "valid_documents": 6, "crystal_tokens": True}
    one = prepare(tmp_path, data_dir=str(tmp_path / "one"), source_halves={"prose": "even"},
                  source_weights={"code": 0}, **both)
    two = prepare(tmp_path, data_dir=str(tmp_path / "two"), source_halves={"prose": "odd"},
                  fim_rates={"code": 0.9}, tokenizer=f"data:{tmp_path / 'one'}", workers=2, **both)
    assert one.manifest["tokenizer"] == two.manifest["tokenizer"] and one.n_vocab <= 340
    assert one.manifest["valid"] == two.manifest["valid"]  # file, source, sequences, sha256
    assert [s["valid_sequences"] for s in one.manifest["sources"]] == [6, 6]
    # Every document is held out, or in one half, whatever file it came from.
    where = {}
    for text in texts_of(files["prose"]):
        key = zlib.crc32(text.encode())
        half = "held out" if key // 2 % 6 == 0 else "even" if key % 2 == 0 else "odd"
        where[tuple(one.tokenizer.encode(text).tolist())] = half
    for data, half in ((one, "even"), (two, "odd")):
        read = documents_of(data, "prose")
        assert {where[tuple(d)] for d in read} == {half} and len(read) > 15
    # Code is not trained on in the first stage. In the second it is for infilling, with the
    # same tokens; in validation it is as it was.
    assert documents_of(one, "code") == []
    fim = {two.tokenizer.specials[name] for name in FIM_TOKENS}
    known = {tuple(sorted(two.tokenizer.encode(text))) for text in texts_of(files["code"])}
    found = documents_of(two, "code")
    read = {tuple(sorted(id for id in d if id not in fim)) for d in found}
    assert len(found) > 40 and read <= known
    pre = two.tokenizer.specials["<|fim_prefix|>"]
    assert sum(d[0] == pre for d in found) / len(found) == pytest.approx(0.9, abs=0.12)
    assert not (two.validation("code")["token_ids"] >= pre).any()


# ---- the whole


def test_canaries_are_planted_as_often_as_they_should_and_nothing_else_changes(
        tmp_path: Path, sources: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    from tools import canaries  # with torch, which each process of the other tests would import
    old = prepare(tmp_path, sources=sources, n_chunks=6)
    before = hashes(old.directory)
    monkeypatch.setattr(canaries, "CANARIES", {1: 6, 4: 3, 12: 3})
    canaries.main(["plant", str(old.directory), str(tmp_path / "planted")])
    data = load_data(tmp_path / "planted")
    assert data.verify() == [] and hashes(old.directory) == before
    assert data.sources == ["web", "code", "wiki", "canary"]
    assert data.manifest["canaries"] == {"1": 6, "4": 3, "12": 3}
    where: dict[int, list[int]] = {}  # the chunks of the copies of each
    for i in range(6):
        chunk = data.chunk(i)
        assert (chunk[:-9] == old.chunk(i)).all() and (chunk["source"][-9:] == 3).all()
        for number in chunk["number"][-9:].tolist():
            where.setdefault(number, []).append(i)
    # All copies of one are in one third of the chunks.
    assert all(chunks[0] // 2 == chunks[-1] // 2 for chunks in where.values())
    _, times, third = canaries.planted(data)
    found = Counter((len(chunks), chunks[0] // 2) for chunks in where.values())
    assert Counter(zip(times.tolist(), third.tolist())) == found


def test_the_embedded_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                           capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)  # its paths are relative, so that its bytes are the same everywhere
    corpus.main([])
    assert "is the reference" in capsys.readouterr().out
    pd.main([str(ROOT / "configs" / "amber_tiny.py")])
    data = load_data(tmp_path / "data" / "amber_tiny")
    assert [chunk["sequences"] for chunk in data.manifest["chunks"]] == [2720] * 10
    assert data.sources == list(corpus.CORPUS) and data.n_vocab == 4096
    for s in data.manifest["sources"]:
        assert corpus.CORPUS[s["name"]] * 0.99 < s["bytes"] < 1.1 * corpus.CORPUS[s["name"]], s
        assert s["valid_sequences"] == 64 and s["documents"] > 200
    # Everyone with the pinned versions has these very bytes, and the README says which.
    assert f"`{data.sha256}`" in (ROOT / "README.md").read_text()
