"""prepare_data.py: the same bytes whoever makes them, nothing lost, bad input named."""

import errno
import gzip
import itertools
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import prepare_data as pd

ROOT = Path(pd.__file__).parent
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the project's shared data is absent")
SMALL = {"vocab_size": 300, "seq_len": 16, "n_chunks": 4, "valid_rows": 8, "rows_per_chunk": 0,
         "global_batch_size": 4, "micro_batch_size": 2, "workers": 1}


def words(seed: int, n: int) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefgh", k=rng.randint(1, 9))) for _ in range(n))


def jsonl(path: Path, texts, key="text") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({key: t}) + "\n" for t in texts))
    return str(path)


def config_file(tmp: Path, **settings) -> list[str]:
    """argv of a config with small settings; data in tmp/out unless said otherwise."""
    values = SMALL | {"data_dir": str(tmp / "out")} | settings
    (tmp / "small.py").write_text("".join(f"{k} = {v!r}\n" for k, v in values.items()))
    return [str(tmp / "small.py")]


def prepare(tmp: Path, *flags: str, **settings) -> tuple[Path, dict]:
    argv = config_file(tmp, **settings)
    pd.main([*argv, *flags])
    out = Path(settings.get("data_dir", tmp / "out"))
    return out, pd.load_manifest(out)


def refused(tmp: Path, *flags: str, **settings) -> str:
    with pytest.raises(SystemExit) as stopped:
        prepare(tmp, *flags, **settings)
    message = str(stopped.value)
    assert len(message) > 20 and "Traceback" not in message
    return message


def hashes(out: Path) -> dict[str, str]:
    return {str(p.relative_to(out)): pd.sha256(p) for p in sorted(out.rglob("*")) if p.is_file()}


@pytest.fixture
def sources(tmp_path) -> dict[str, str]:
    """Three sources of several files."""
    for name, n in (("web", 5), ("code", 3), ("wiki", 2)):
        for i in range(n):
            texts = [words(hash((n, i)) % 1000 + 10 * d, 40) + f" {name}" for d in range(25)]
            jsonl(tmp_path / name / f"{i}.jsonl", texts)
    return {name: str(tmp_path / name / "*.jsonl") for name in ("web", "code", "wiki")}


# ---- the same bytes whoever makes them


def test_bytes_do_not_depend_on_workers_ranks_or_a_kill(tmp_path):
    files = {f"s{k}": jsonl(tmp_path / f"s{k}.jsonl", [words(100 * k + i, 300) for i in range(60)])
             for k in range(6)}
    one, _ = prepare(tmp_path, sources=files, data_dir=str(tmp_path / "one"))
    three, _ = prepare(tmp_path, sources=files, data_dir=str(tmp_path / "three"), workers=3)
    assert hashes(one) == hashes(three) and len(hashes(one)) == 4 + 6 + 2

    def start(name, **env):
        argv = config_file(tmp_path, sources=files, data_dir=str(tmp_path / name), workers=2)
        return subprocess.Popen([sys.executable, str(ROOT / "prepare_data.py"), *argv],
                                env=os.environ | env, cwd=ROOT)
    ranks = [start("ranks", RANK=str(r), WORLD_SIZE="2") for r in (1, 0)]
    assert [r.wait(60) for r in ranks] == [0, 0]
    assert hashes(one) == hashes(tmp_path / "ranks")

    killed = start("killed")
    while not list(tmp_path.glob("killed.*.tmp/work/encode/*.json")):
        assert killed.poll() is None, "it finished before it could be killed"
        time.sleep(0.002)
    kids = Path(f"/proc/{killed.pid}/task/{killed.pid}/children")
    kids = kids.read_text().split() if kids.exists() else []
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed").exists()
    [done] = tmp_path.glob("killed.*.tmp")
    tokenizer = done / "tokenizer.tiktoken"
    before = tokenizer.stat().st_mtime_ns
    again = start("killed")
    while again.poll() is None:  # what was finished is not done again
        if tokenizer.exists():
            assert tokenizer.stat().st_mtime_ns == before
        time.sleep(0.01)
    assert again.returncode == 0 and hashes(one) == hashes(tmp_path / "killed")
    assert not list(tmp_path.glob("*.tmp"))
    time.sleep(0.2)
    assert not [k for k in kids if Path(f"/proc/{k}/stat").exists()
                and Path(f"/proc/{k}/stat").read_text().split()[2] != "Z"], "workers outlived it"


def test_again_is_nothing_to_do_and_other_settings_are_refused(tmp_path, sources, capsys):
    prepare(tmp_path, sources=sources)
    before = hashes(tmp_path / "out")
    prepare(tmp_path, sources=sources)
    assert "nothing to do" in capsys.readouterr().out and hashes(tmp_path / "out") == before
    prepare(tmp_path, sources=sources, workers=2, learning_rate=1e-3)  # not settings of the data
    message = refused(tmp_path, sources=sources, seed=5, seq_len=32)
    assert "seq_len = 16 (now 32)" in message and "seed" in message and "data_dir" in message
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    assert "no manifest.json" in refused(tmp_path, sources=sources, data_dir=str(tmp_path / "full"))


def test_changed_input_is_pointed_out(tmp_path, sources, capsys):
    prepare(tmp_path, sources=sources)
    jsonl(tmp_path / "web" / "0.jsonl", ["another text"])
    prepare(tmp_path, sources=sources)
    assert "have changed" in capsys.readouterr().out


def test_two_at_once_and_stale_directories(tmp_path, sources):
    stale = tmp_path / "out.00000000.tmp"
    config, _ = pd.load(config_file(tmp_path, sources=sources))
    with pd.only_one(pd.Plan(config, stale, 0, 1, 1)):
        assert "another process is preparing" in refused(tmp_path, sources=sources)
        assert stale.exists()
    prepare(tmp_path, sources=sources)
    assert not stale.exists()


def die(plan, unit):
    os._exit(9)


def fail(plan, unit):
    raise SystemExit(f"unit {unit} is bad")


def a_plan(tmp_path, workers, **settings) -> pd.Plan:
    (tmp_path / "tmp" / "work").mkdir(parents=True, exist_ok=True)
    config, _ = pd.load(config_file(tmp_path, **settings | {"workers": workers}))
    return pd.Plan(config, tmp_path / "tmp", 0, 1, workers)


def test_a_killed_worker_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="a worker process was killed"):
        pd.run_units(a_plan(tmp_path, 2), "stage", die, [1, 2])


def test_a_bad_unit_is_named_whichever_worker_has_it(tmp_path):
    for workers in (1, 2):
        with pytest.raises(SystemExit, match="unit 1 is bad"):
            pd.run_units(a_plan(tmp_path, workers), "stage", fail, [1, 2, 3])


def test_full_disk_is_one_sentence_and_leaves_no_half_file(tmp_path, sources, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(pd.os, "fsync", full)
        assert "is full" in refused(tmp_path, sources=sources)
    [tmp] = tmp_path.glob("out.*.tmp")
    left = {p.name for p in tmp.rglob("*") if p.is_file()}
    assert left <= {"lock", "tokenizer.tiktoken"} and not (tmp_path / "out").exists()
    prepare(tmp_path, sources=sources)


def test_a_rank_does_not_wait_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(pd, "PATIENCE", 0.3)
    plan = a_plan(tmp_path, 1)
    with pytest.raises(SystemExit, match="rank 1 waited"):
        pd.collect(pd.Plan(plan.config, plan.tmp, 1, 2, 1), plan.work / "never.json")


# ---- packing and mixing


def stream_of(out: Path, texts: list[str], width: int) -> tuple[np.ndarray, int]:
    """What the rows of a source must be, made the slow and obvious way; and its tail."""
    tokenizer = pd.load_tokenizer(out)
    ids = [i for t in texts for i in [*tokenizer.encode(t).tolist(), tokenizer.eos_id]]
    return np.array(ids[:len(ids) // width * width]).reshape(-1, width), len(ids) % width


def rows_of(out: Path, manifest: dict, source: str) -> tuple[list[np.ndarray], np.ndarray]:
    number = [s["name"] for s in manifest["sources"]].index(source)
    chunks = [pd.open_chunk(out, manifest, c) for c in range(len(manifest["chunks"]))]
    held = [f["source"] for f in manifest["valid"]]
    valid = pd.open_valid(out, manifest, source) if source in held else chunks[0][:0]
    assert (valid["source"] == number).all()
    return [c["token_ids"][c["source"] == number].astype(int) for c in chunks], \
        valid["token_ids"].astype(int)


def texts_of(pattern: str) -> list[str]:
    paths = sorted(Path("/").glob(pattern.lstrip("/")))
    return [json.loads(line)["text"] for p in paths for line in p.read_text().splitlines()]


@pytest.mark.parametrize("unit_bytes", [1, 1 << 24])  # a part per file, and one part
def test_rows_are_the_documents_cut_and_none_is_lost(tmp_path, sources, monkeypatch, unit_bytes):
    monkeypatch.setattr(pd, "UNIT_BYTES", unit_bytes)
    (tmp_path / "web" / "2.jsonl").write_text("")  # an empty part in the middle
    out, manifest = prepare(tmp_path, sources=sources, workers=2 if unit_bytes == 1 else 1)
    for about in manifest["sources"]:
        texts = texts_of(sources[about["name"]])
        stream, tail = stream_of(out, texts, 17)
        chunks, valid = rows_of(out, manifest, about["name"])
        assert len({tuple(r) for r in stream}) == len(stream)
        place = {tuple(r): i for i, r in enumerate(stream)}
        trained = [place[tuple(r)] for r in np.concatenate(chunks)]
        held = [place[tuple(r)] for r in valid]
        assert len(set(trained) | set(held)) == len(trained) + len(held)  # disjoint, no row twice
        unused = about["unused_rows"]
        assert len(stream) == len(trained) + len(held) + unused and unused < 4
        assert about["tokens"] == stream.size + tail and about["tail_tokens"] == tail
        assert about["documents"] == len(texts) and len(held) == 8
        assert about["bytes"] == sum(len(t.encode()) for t in texts)
        # dealt round-robin: row k that is not held out is in chunk k % 4
        rest = [i for i in range(len(stream)) if i not in held]
        for c, chunk in enumerate(chunks):
            assert [place[tuple(r)] for r in chunk] == rest[c:len(rest) - unused:4]
    compositions = [tuple(c["sources"].values()) for c in manifest["chunks"]]
    assert len(set(compositions)) == 1 and sum(compositions[0]) == manifest["chunks"][0]["rows"]


def test_one_eos_per_document_and_no_bos(tmp_path):
    texts = [words(i, 30) for i in range(100)]
    files = {"a": jsonl(tmp_path / "a.jsonl", texts)}
    out, manifest = prepare(tmp_path, sources=files, n_chunks=1, valid_rows=0)
    eos = manifest["tokenizer"]["eos_id"]
    [about] = manifest["sources"]
    ids = pd.open_chunk(out, manifest, 0)["token_ids"].ravel()
    tail = stream_of(out, texts, 1)[0].ravel()[len(ids):]
    assert (ids == eos).sum() + (tail == eos).sum() == 100 == about["documents"]
    assert ids[0] != eos and len(tail) == about["tail_tokens"] and not manifest["valid"]
    assert manifest["tokenizer"]["bos_id"] is None


def test_weights_use_a_source_more_or_less(tmp_path, sources):
    weights = {"web": 0.5, "code": 2.25, "wiki": 0}
    out, manifest = prepare(tmp_path, sources=sources, source_weights=weights)
    for about in manifest["sources"]:
        chunks, valid = rows_of(out, manifest, about["name"])
        stream, _ = stream_of(out, texts_of(sources[about["name"]]), 17)
        place = {tuple(r): i for i, r in enumerate(stream)}
        times = Counter(place[tuple(r)] for r in np.concatenate(chunks))
        free = about["rows"] - about["valid_rows"]
        want = free * weights[about["name"]]
        assert want - 4.5 <= sum(times.values()) == about["train_rows"] <= want + 0.5
        assert not set(times) & {place[tuple(r)] for r in valid}
        if about["name"] == "web":  # half of it, from all over it
            assert set(times.values()) == {1} and max(times) > 0.95 * len(stream)
        if about["name"] == "code":
            assert set(times.values()) <= {1, 2, 3} and len(times) == free
    assert "source_weights names ['wbe']" in refused(
        tmp_path, sources=sources, source_weights={"wbe": 1}, data_dir=str(tmp_path / "other"))


def test_cap_keeps_the_mix(tmp_path, sources):
    _, full = prepare(tmp_path, sources=sources, data_dir=str(tmp_path / "full"))
    out, manifest = prepare(tmp_path, sources=sources, rows_per_chunk=50)
    assert [c["rows"] for c in manifest["chunks"]] == [50] * 4
    for name, rows in manifest["chunks"][0]["sources"].items():
        share = full["chunks"][0]["sources"][name] / full["chunks"][0]["rows"]
        assert abs(rows - 50 * share) < 1
        chunks, _ = rows_of(out, manifest, name)
        kept = {tuple(r) for r in np.concatenate(chunks)}
        stream, _ = stream_of(out, texts_of(sources[name]), 17)
        place = [i for i, r in enumerate(stream) if tuple(r) in kept]
        # evenly from all of the source
        assert len(place) == len(kept) == 4 * rows and max(place) > 0.9 * len(stream)
    assert pd.shares([5, 5, 5], 7) == [3, 2, 2] and pd.shares([5, 1], 9) == [5, 1]


def test_max_source_bytes_stops_in_file_order(tmp_path, sources, monkeypatch):
    monkeypatch.setattr(pd, "UNIT_BYTES", 1)
    limit = 9000
    out, manifest = prepare(tmp_path, sources=sources, max_source_bytes=limit, workers=2)
    for about in manifest["sources"]:
        texts = texts_of(sources[about["name"]])
        sizes = list(itertools.accumulate(len(t) for t in texts))
        n = next(i for i, s in enumerate(sizes) if s >= limit) + 1
        assert about["documents"] == n and about["bytes"] == sizes[n - 1]
        stream, _ = stream_of(out, texts[:n], 17)
        chunks, valid = rows_of(out, manifest, about["name"])
        assert {tuple(r) for r in np.concatenate([*chunks, valid])} <= {tuple(r) for r in stream}


def test_too_small_source_is_named_with_numbers(tmp_path):
    files = {"big": jsonl(tmp_path / "b.jsonl", [words(i, 90) for i in range(30)]),
             "tiny": jsonl(tmp_path / "t.jsonl", [words(1, 12)])}
    message = refused(tmp_path, sources=files)
    assert "'tiny'" in message and "valid_rows = 8" in message and "n_chunks = 4" in message
    assert not (tmp_path / "out").exists()


def test_one_endless_document(tmp_path):
    """5 MB without a space, and 5 MB of nothing else: linear time, and they come back."""
    for i, text in enumerate(("".join(random.Random(1).choices("abcdefgh", k=5_000_000)),
                              " " * 5_000_000)):
        (tmp_path / "long.txt").write_text(text)
        out, manifest = prepare(tmp_path, sources={"long": str(tmp_path / "long.txt")},
                                data_dir=str(tmp_path / f"out{i}"), n_chunks=1, valid_rows=0)
        ids = pd.open_chunk(out, manifest, 0)["token_ids"].ravel()
        found = pd.load_tokenizer(out).decode(ids)
        assert text.startswith(found[:4_000_000]) and manifest["sources"][0]["bytes"] == 5_000_000


# ---- readers


def test_every_format(tmp_path):
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
    out, manifest = prepare(tmp_path, sources={k: str(tmp_path / v) for k, v in files.items()})
    about = {s["name"]: s for s in manifest["sources"]}
    want, _ = stream_of(out, texts, 17)
    for name in files:
        assert about[name]["documents"] == 20, name
        chunks, valid = rows_of(out, manifest, name)
        rows = Counter(map(tuple, np.concatenate([*chunks, valid])))
        if name != "folder":
            assert not rows - Counter(map(tuple, want))
    assert about["text_column"]["dropped"] == {"no string in text": 1}
    assert about["folder"]["dropped"] == {"binary file": 1, "empty document": 1}
    assert manifest["dropped"]["hidden file or folder"] == 1


def test_invalid_text_is_replaced_and_counted(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"\xef\xbb\xbfcaf\xe9 " + words(1, 300).encode())
    pair = '{"text": "one \\ud83d\\ude00 lone \\ud83d ' + words(2, 300) + '"}\n'
    (tmp_path / "lone.jsonl").write_bytes(pair.encode() + b'{"text": "x\xff"}\n')
    files = {"latin": str(tmp_path / "latin.txt"), "lone": str(tmp_path / "lone.jsonl")}
    out, manifest = prepare(tmp_path, sources=files, valid_rows=0, n_chunks=1)
    ids, tokenizer = pd.open_chunk(out, manifest, 0)["token_ids"], pd.load_tokenizer(out)
    text = tokenizer.decode(ids[0].tolist() + ids[1].tolist())
    assert text.startswith("caf\ufffd ")
    lone = tokenizer.decode(rows_of(out, manifest, "lone")[0][0].ravel())
    assert lone.startswith("one \U0001f600 lone \ufffd ")
    assert [s["repaired"] for s in manifest["sources"]] == [1, 2]


def test_bad_json_lines(tmp_path):
    good = [json.dumps({"text": words(i, 40)}) for i in range(40)]
    lines = [*good[:3], "{broken", *good[3:7], '{"title": 1}', '{"text": 5}', "", *good[7:]]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + "\n")
    message = refused(tmp_path, sources={"a": str(path)})
    assert f"{path}, line 4: not JSON" in message and "--on_bad_row=skip" in message
    _, manifest = prepare(tmp_path, sources={"a": str(path)}, on_bad_row="skip")
    assert manifest["dropped"] == {"not JSON": 2, 'no string "text" or "content"': 2}
    assert manifest["sources"][0]["documents"] == 40


def test_missing_and_broken_inputs_are_named(tmp_path):
    (tmp_path / "hollow").mkdir()
    (tmp_path / "nothing.txt").write_text("")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "abc"}\n' * 9000)[:100])
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    for path, words_of_it in (("no/such/*.txt", "no file matches"), ("hollow", "no file in"),
                              ("nothing.txt", "no documents: 1 x empty document"),
                              ("cut.jsonl.gz", "cut.jsonl.gz: cannot be read"),
                              ("x.parquet", "x.parquet")):
        message = refused(tmp_path, sources={"a": str(tmp_path / path)})
        assert words_of_it in message and "\n" not in message, path
    assert "cannot name a source" in refused(tmp_path, sources={"../a": str(tmp_path / "hollow")})


# ---- released chunks


def tiny_llama(path: Path, n_added: int = 0) -> Path:
    """A tokenizer.json built as LLaMA's, with three merged pieces."""
    vocab = {p: i for i, p in enumerate(["<unk>", "<s>", "</s>"])}
    vocab |= {f"<0x{b:02X}>": 3 + b for b in range(256)}
    for piece in ["\u2581t", "he", "\u2581the", "\u2581\u2581", "\u2581", *"abcdefghijkté漢"]:
        vocab[piece] = len(vocab)
    merges = [["\u2581", "t"], ["h", "e"], ["\u2581t", "he"], ["\u2581", "\u2581"]]
    token = {"single_word": False, "lstrip": False, "rstrip": False, "special": True}
    added = [token | {"id": i, "content": c, "normalized": True}
             for i, c in enumerate(["<unk>", "<s>", "</s>"])]
    extra = ["<|extra_0|>", "<|extra_1|>", "<|extra_0|>a"][:n_added]  # the longest wins
    added += [token | {"id": len(vocab) + i, "content": name, "normalized": bool(i % 2)}
              for i, name in enumerate(extra)]
    path.write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
        "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>",
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
                  "byte_fallback": True, "vocab": vocab, "merges": merges}}))
    return path


@pytest.fixture
def released(tmp_path) -> dict:
    """Two released files and a held-out one, rows of 17 ids; the settings to read them."""
    rng = np.random.default_rng(0)
    for name, order in (("train_000", ["arxiv", "c4", "starcoderdata"]),
                        ("train_001", ["c4", "new", "arxiv"]), ("valid", ["c4", "arxiv"])):
        rows = [{"token_ids": rng.integers(0, 270, 17).tolist(), "source": s}
                for s in order for _ in range(300)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    path = tiny_llama(tmp_path / "tokenizer.json")
    return {"tokenized": str(tmp_path / "train_*.jsonl"), "n_chunks": 2, "valid_rows": 1000,
            "tokenizer": f"llama:{path}", "tokenized_valid": str(tmp_path / "valid.jsonl")}


def released_rows(path: Path) -> list[tuple]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(r["source"], r["token_ids"]) for r in rows]


def test_released_rows_one_to_one(tmp_path, released):
    out, manifest = prepare(tmp_path, **released)
    assert [s["name"] for s in manifest["sources"]] == ["arxiv", "c4", "starcoderdata", "new"]
    for c in range(2):
        rows = pd.open_chunk(out, manifest, c)
        names = [manifest["sources"][s]["name"] for s in rows["source"]]
        found = list(zip(names, rows["token_ids"].tolist()))
        assert found == released_rows(tmp_path / f"train_00{c}.jsonl")
    assert list(manifest["chunks"][1]["sources"].values()) == [300, 300, 0, 300]
    held = released_rows(tmp_path / "valid.jsonl")
    kept = pd.open_valid(out, manifest, "c4")["token_ids"].tolist()
    assert kept == [r for s, r in held if s == "c4"]
    assert pd.verify(out) == [] and (out / "tokenizer.json").exists()
    other, _ = prepare(tmp_path, **released, workers=3, data_dir=str(tmp_path / "three"))
    assert hashes(out) == hashes(other)
    gz = tmp_path / "gz"
    gz.mkdir()
    for path in tmp_path.glob("train_*.jsonl"):
        (gz / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    released |= {"tokenized": f"{gz}/*", "data_dir": str(tmp_path / "zipped")}
    zipped, _ = prepare(tmp_path, **released)
    assert pd.sha256(zipped / "train/chunk_001.npy") == pd.sha256(out / "train/chunk_001.npy")


def test_released_rows_capped_in_proportion(tmp_path, released):
    out, manifest = prepare(tmp_path, **released | {"valid_rows": 10}, rows_per_chunk=90)
    assert [c["rows"] for c in manifest["chunks"]] == [90, 90]
    assert list(manifest["chunks"][0]["sources"].values()) == [30, 30, 30, 0]
    rows = released_rows(tmp_path / "train_000.jsonl")
    found = pd.open_chunk(out, manifest, 0)["token_ids"].tolist()
    assert found == [r for i, (_, r) in enumerate(rows) if i % 10 == 0]
    assert [v["rows"] for v in manifest["valid"]] == [10, 10]


BAD_ROWS = {"not JSON": '{"token_ids": [s1', "no list token_ids": '{"source": "c4"}',
            "no source": json.dumps({"token_ids": [1] * 17}),
            "not seq_len + 1 = 17 token_ids": json.dumps({"token_ids": [1] * 18, "source": "c4"}),
            "an id that is not a whole number":
                json.dumps({"token_ids": [1] * 16 + [True], "source": "c4"}),
            "an id outside the vocabulary of 278":
                json.dumps({"token_ids": [1] * 16 + [278], "source": "c4"})}


def test_bad_released_rows_are_named_and_counted(tmp_path, released):
    path = tmp_path / "train_001.jsonl"
    good = path.read_text().splitlines()
    strange = [[1] * 16 + [x] for x in (2 ** 70, -1, 1.0, "1", None, [1])] + [[[1]] * 17, "1", []]
    more = [json.dumps({"token_ids": x, "source": "c4"}) for x in strange]
    more += ["[]", "3", "", '{"token_ids": null, "source": "c4"}']
    for reason, line in BAD_ROWS.items():
        path.write_text("\n".join([*good[:290], line, *good[290:]]) + "\n")
        message = refused(tmp_path, **released, workers=2)
        assert f"{path}, line 291: {reason}" in message and "--on_bad_row=skip" in message
    bad = [*BAD_ROWS.values(), *more]
    path.write_text("\n".join(itertools.chain(*zip(good, bad), good[len(bad):])) + "\n")
    _, manifest = prepare(tmp_path, **released, on_bad_row="skip")
    assert set(manifest["dropped"]) == set(BAD_ROWS)
    assert sum(manifest["dropped"].values()) == len(bad)
    assert manifest["chunks"][1]["rows"] == 900


@needs_shared
def test_real_amber_rows(tmp_path):
    both = {"tokenizer": f"llama:{SHARED / 'llama_crystal_tokenizer.json'}", "vocab_size": 32000,
            "seq_len": 2048, "n_chunks": 1}
    out, manifest = prepare(tmp_path, tokenized=str(SHARED / "amber_rows_good.jsonl"), **both)
    rows = pd.open_chunk(out, manifest, 0)
    real = released_rows(SHARED / "amber_rows_good.jsonl")
    assert rows["token_ids"].tolist() == [r for _, r in real]
    assert rows["token_ids"].dtype == "<u2" and rows.dtype.itemsize == 1 + 2 * 2049
    both |= {"tokenized": str(SHARED / "amber_rows_bad.jsonl"), "data_dir": str(tmp_path / "bad")}
    assert "amber_rows_bad.jsonl, line 1: no source" in refused(tmp_path, **both)
    text = (SHARED / "amber_rows_bad.jsonl").read_text().replace("]}", '], "source": "c4"}')
    (tmp_path / "bad.jsonl").write_text(text)
    both["tokenized"] = str(tmp_path / "bad.jsonl")
    assert "bad.jsonl, line 4: not JSON" in refused(tmp_path, **both)
    _, manifest = prepare(tmp_path, **both, on_bad_row="skip")
    assert manifest["dropped"] == {"not JSON": 2, "not seq_len + 1 = 2049 token_ids": 1}
    assert manifest["chunks"][0]["rows"] == 7


def test_released_settings_that_cannot_work(tmp_path, released):
    assert "--n_chunks=2" in refused(tmp_path, **released | {"n_chunks": 5})
    assert "bpe" in refused(tmp_path, **released | {"tokenizer": "bpe"})
    assert "has 278 ids" in refused(tmp_path, **released, vocab_size=100)
    assert "there is no file" in refused(tmp_path, **released | {"tokenizer": "llama:nowhere.json"})


# ---- tokenizers


POOLS = ["abcde ", " \t\n\r", "  \u2581", "éüñßçа б",
         "漢字かな한글", "😀👨\u200d👩👧🏽", "0123456789",
         "٣४", "\x00\x01\x1f\x7f", "!?.,;:-_=+*/\\'\"()[]{}<>", "\u2028\u2029\u00a0\ufffd", "ابتث",
         "हिन्दी", "\u0301\u0300\u20dd", "the of and ing tion"]
SPECIAL = [" ", "  ", "</s>", " </s>", "<s>", "<unk>", "a", "\u2581</s>", "<0x41>", "the",
           "<|extra_0|>", "<|extra_1|>"]


def fuzz(n: int, pieces: list[str], specials: bool = True):
    rng = random.Random(n)
    anything = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for i in range(n):
        size = rng.randint(0, 40)
        kind = i % 5
        if kind == 0:
            yield "".join(rng.choices(rng.choice(POOLS), k=size))
        elif kind == 1:
            yield "".join(rng.choice(rng.choice(POOLS)) for _ in range(size))
        elif kind == 2:
            yield "".join(rng.choices(pieces, k=size // 2))
        elif kind == 3:
            yield "".join(map(chr, rng.choices(anything, k=size)))
        elif specials:
            yield "".join(rng.choices(SPECIAL, k=size // 2))


def check_against_hugging_face(path: Path, n: int) -> None:
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_file(str(path))
    ours = pd.LlamaTokenizer(str(path))
    names = re.compile("</?s>|<unk>|<.extra")
    spaces = (a + " " * k + b for k in range(80) for a in ("", "a", ",") for b in ("", "b", "1"))
    for text in itertools.chain(fuzz(n, list(theirs.get_vocab())), spaces):
        ids = ours.encode(text)
        assert ids.tolist() == theirs.encode(text, add_special_tokens=False).ids, repr(text)
        if not names.search(text):
            text = text.replace("\u2581", " ")
            assert ours.decode(ids) == text
            assert ours.token_bytes[ids].sum() == len(text.encode()) + (text != "")


@needs_shared
def test_llama_ids_equal_hugging_faces():
    check_against_hugging_face(SHARED / "llama_crystal_tokenizer.json", 12000)
    ours = pd.LlamaTokenizer(str(SHARED / "llama_crystal_tokenizer.json"))
    assert (ours.n_vocab, ours.eos_id) == (32000, 2)
    assert ours.encode("Question: 2+2 </s> a</s>").tolist() == [
        894, 29901, 29871, 29906, 29974, 29906, 2, 263, 829, 29879, 29958]


def test_added_tokens_are_kept(tmp_path):
    path = tiny_llama(tmp_path / "tokenizer.json", n_added=3)
    check_against_hugging_face(path, 4000)
    ours = pd.LlamaTokenizer(str(path))
    assert ours.n_vocab == 281 and ours.encode("a<|extra_0|>b").tolist()[1:3] == [264, 278]
    assert ours.decode([278, 2, 999, -1]) == "<|extra_0|></s>\ufffd\ufffd"


def test_what_is_not_llamas_is_refused(tmp_path):
    path = tiny_llama(tmp_path / "tokenizer.json")
    good = json.loads(path.read_text())
    for change, words_of_it in (
            (lambda d: d["model"].update(byte_fallback=False), "byte_fallback"),
            (lambda d: d["normalizer"]["normalizers"].pop(), "normalizer"),
            (lambda d: d.update(pre_tokenizer={"type": "ByteLevel"}), "pre_tokenizer"),
            (lambda d: d["model"]["merges"].pop(0), "merges"),
            (lambda d: d["added_tokens"][1].update(lstrip=True), "strips"),
            (lambda d: d["model"]["vocab"].update({"a\u2581b": 500}), "crosses a cut"),
            (lambda d: d["model"]["vocab"].pop("<0x00>"), "<0xNN>")):
        data = json.loads(json.dumps(good))
        change(data)
        path.write_text(json.dumps(data))
        with pytest.raises(SystemExit, match=words_of_it):
            pd.LlamaTokenizer(str(path))
    path.write_text("{}")
    with pytest.raises(SystemExit, match="tokenizer.json"):
        pd.LlamaTokenizer(str(path))


def test_sentencepiece_model(tmp_path):
    spm = pytest.importorskip("sentencepiece")
    texts = [words(i, 30).replace("a", "é") + " the end: (42), <x>" + " " * (i % 30) + "y\n\tz"
             for i in range(300)]
    lines = [t.replace("\n\t", " ") for t in texts]
    settings = {"vocab_size": 450, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2,
                "normalization_rule_name": "identity", "split_digits": True,
                "remove_extra_whitespaces": False}
    for name, runs in (("m", True), ("llama", False)):
        spm.SentencePieceTrainer.train(sentence_iterator=iter(lines), **settings,
                                       model_prefix=str(tmp_path / name),
                                       allow_whitespace_only_pieces=runs)
    with open(tmp_path / "llama.model", "ab") as model:
        for n in range(2, 17):  # as in LLaMA's: every run of spaces has one score, the worst
            piece = b"\x0a" + bytes([3 * n]) + "\u2581".encode() * n
            piece += b"\x15" + struct.pack("<f", -1e9)
            model.write(b"\x0a" + bytes([len(piece)]) + piece)
    for name in ("m", "llama"):
        theirs = spm.SentencePieceProcessor(model_file=str(tmp_path / f"{name}.model"))
        ours = pd.LlamaTokenizer(str(tmp_path / f"{name}.model"))
        pieces = [theirs.id_to_piece(i) for i in range(theirs.get_piece_size())]
        assert (ours.n_vocab, ours.eos_id) == (len(pieces), 2) and "\u2581" * 4 in pieces
        runs = (" " * n + "é" + " " * n for n in range(60))
        for text in itertools.chain(fuzz(4000, pieces), texts, runs):
            assert ours.encode(text).tolist() == theirs.encode(text), repr(text)
    settings["normalization_rule_name"] = "nmt_nfkc"
    spm.SentencePieceTrainer.train(sentence_iterator=iter(lines), **settings,
                                   model_prefix=str(tmp_path / "n"))
    with pytest.raises(SystemExit, match="normalizes"):
        pd.LlamaTokenizer(str(tmp_path / "n.model"))
    (tmp_path / "junk.model").write_bytes(b"\x0a\xff\xff junk")
    with pytest.raises(SystemExit, match="not a sentencepiece model"):
        pd.LlamaTokenizer(str(tmp_path / "junk.model"))
    files = {"a": jsonl(tmp_path / "a.jsonl", texts)}
    tokenizer = f"llama:{tmp_path / 'm.model'}"
    out, _ = prepare(tmp_path, sources=files, tokenizer=tokenizer, vocab_size=450)
    assert (out / "tokenizer.model").exists() and pd.load_tokenizer(out).n_vocab == 450


def slow_bpe(texts: list[str], size: int) -> list[bytes]:
    """The definition of byte-pair encoding, with no cleverness."""
    counts = Counter(w for t in texts for w in pd.regex.findall(pd.BPE_PATTERN, t))
    split = {w: [bytes([b]) for b in w.encode()] for w in counts}
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < size:
        pairs: Counter = Counter()
        for w, n in counts.items():
            for a, b in zip(split[w], split[w][1:]):
                pairs[tokens.index(a), tokens.index(b)] += n
        if not pairs:
            break
        a, b = min(pairs, key=lambda p: (-pairs[p], p))
        union = tokens[a] + tokens[b]
        if union not in tokens:
            tokens.append(union)
        for word in split.values():
            i = 0
            while i < len(word):
                if word[i:i + 2] == [tokens[a], tokens[b]]:
                    word[i:i + 2] = [union]
                i += 1
    return tokens


def test_bpe_is_the_definition_and_deterministic():
    texts = [words(i, 60) + " aaaa aaa aaaaaaa the theme thesis 1234\n\n é漢" for i in range(8)]
    ranks = pd.train_bpe(texts, 340)
    assert list(ranks) == slow_bpe(texts, 340)
    assert list(pd.train_bpe(iter(texts), 340).items()) == list(ranks.items())
    assert len(pd.train_bpe(["ab"], 400)) == 257  # nothing left to merge


def test_bpe_round_trip_and_saving(tmp_path, sources):
    out, manifest = prepare(tmp_path, sources=sources)
    tokenizer = pd.load_tokenizer(out)
    assert tokenizer.n_vocab == 300 == manifest["tokenizer"]["n_vocab"] and tokenizer.eos_id == 299
    for text in fuzz(3000, ["<|endoftext|>", "abc", "\ufeff"]):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.eos_id not in ids
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.encode("\ud83d lone").size and tokenizer.encode("").size == 0
    assert tokenizer.decode([300, -5, 10 ** 9]) == "\ufffd" * 3
    assert tokenizer.decode([299]) == "<|endoftext|>" and tokenizer.token_bytes[299] == 0


def test_named_tiktoken_encodings(tmp_path, sources, monkeypatch):
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 256}
    fake = pd.tiktoken.Encoding("gpt2", pat_str=r"\w+|\W+", mergeable_ranks=ranks,
                                special_tokens={"<|endoftext|>": 280, "<|x|>": 290})
    with monkeypatch.context() as patch:
        patch.setattr(pd.tiktoken, "get_encoding", lambda name: fake)
        out, manifest = prepare(tmp_path, sources=sources, tokenizer="tiktoken:gpt2")
    tokenizer = pd.load_tokenizer(out)  # from the data alone
    assert (tokenizer.n_vocab, tokenizer.eos_id) == (291, 280) == (
        manifest["tokenizer"]["n_vocab"], manifest["tokenizer"]["eos_id"])
    assert tokenizer.encode("abc <|x|>").tolist() == fake.encode("abc <|x|>", disallowed_special=())
    other = {"sources": sources, "data_dir": str(tmp_path / "no")}
    assert "no encoding 'gpt9'" in refused(tmp_path, tokenizer="tiktoken:gpt9", **other)

    def offline(name):
        raise ConnectionError("no route to host")
    monkeypatch.setattr(pd.tiktoken, "get_encoding", offline)
    assert "cannot download 'gpt2'" in refused(tmp_path, tokenizer="tiktoken:gpt2", **other)


def test_vocabulary_must_hold_the_tokenizer(tmp_path, sources):
    assert "257 or more" in refused(tmp_path, sources=sources, vocab_size=100)
    large = pd.row_dtype(4, 100_000)
    assert large["token_ids"].base == "<u4" and pd.row_dtype(4, 65536)["token_ids"].base == "<u2"


# ---- the data order, and looking at it


# numpy promises the stream of PCG64, not of permutation(): a change must be noticed
GOLDEN = [[3, 8, 4, 2, 7, 5, 0, 1, 9, 6], [7, 8, 2, 9, 1, 0, 6, 3, 4, 5],
          [981474, 346804, 499287, 1608156, 886144]]


def test_data_order_is_what_it_has_always_been():
    assert pd.row_order(11111, 0, 10).tolist() == GOLDEN[0]
    assert pd.row_order(11111, 359, 10).tolist() == GOLDEN[1]
    assert pd.row_order(11111, 0, 1_706_976)[:5].tolist() == GOLDEN[2]
    order = pd.row_order(7, 3, 1000)
    assert sorted(order) == list(range(1000))
    steps = [pd.step_rows(7, 3, 1000, s, 48) for s in range(1000 // 48)]
    assert np.concatenate(steps).tolist() == order[:960].tolist()


def test_locate_counts_whole_batches_of_each_chunk():
    manifest = {"chunks": [{"rows": 10}, {"rows": 3}, {"rows": 9}]}
    assert pd.total_steps(manifest, 4) == 4
    assert [pd.locate(manifest, 4, s) for s in range(4)] == [(0, 0), (0, 1), (2, 0), (2, 1)]
    for step in (4, -1):
        with pytest.raises(SystemExit, match=f"no step {step}: the data has 4 steps"):
            pd.locate(manifest, 4, step)
    amber = {"chunks": [{"rows": 1_706_976}] * 360}
    assert pd.total_steps(amber, 2240) == 274_320 and pd.locate(amber, 2240, 762) == (1, 0)


def test_show_step_and_verify(tmp_path, sources, capsys):
    out, manifest = prepare(tmp_path, sources=sources)
    argv = config_file(tmp_path, sources=sources)
    capsys.readouterr()
    per_chunk = manifest["chunks"][0]["rows"] // 4
    pd.main([*argv, f"--show_step={per_chunk + 3}"])
    lines = capsys.readouterr().out.splitlines()
    rows, tokenizer = pd.open_chunk(out, manifest, 1), pd.load_tokenizer(out)
    assert len(lines) == 5 and f"step {per_chunk + 3} = step 3 of chunk 1" in lines[0]
    for line, row in zip(lines[1:], pd.step_rows(11111, 1, len(rows), 2, 4)):
        name = manifest["sources"][rows["source"][row]]["name"]
        text = json.dumps(tokenizer.decode(rows["token_ids"][row])[:20])[1:-1]
        assert line.startswith(name) and f"chunk 1 row {row} " in line and text in line
    for step in (10 ** 6, -3):
        assert f"--show_step={step}: " in refused(tmp_path, f"--show_step={step}", sources=sources)

    pd.main([*argv, "--verify"])
    assert "every file" in capsys.readouterr().out and pd.verify(out) == []
    chunk, valid = out / "train" / "chunk_002.npy", out / "valid" / "code.npy"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    valid.unlink()
    with open(out / "tokenizer.tiktoken", "ab") as file:
        file.write(b"x")
    problems = pd.verify(out)
    assert [bool(re.search(p, q)) for p, q in zip(
        ("chunk_002.npy differs", "code.npy is missing", "tokenizer.tiktoken differs"), problems)] \
        == [True] * 3 == [True] * len(problems)
    assert refused(tmp_path, "--verify", sources=sources).count("\n") == 2
    chunk.write_bytes(whole[:-100])
    assert "chunk_002.npy" in pd.verify(out)[0]
    with pytest.raises(SystemExit, match="chunk_002.npy"):
        pd.open_chunk(out, manifest, 2)
    with pytest.raises(SystemExit, match="no held-out rows of 'poetry'"):
        pd.open_valid(out, manifest, "poetry")


def test_no_data_no_manifest(tmp_path):
    with pytest.raises(SystemExit, match="python prepare_data.py"):
        pd.load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(SystemExit, match="format version None"):
        pd.load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(SystemExit, match="not valid JSON"):
        pd.load_manifest(tmp_path)


def test_help_and_no_torch():
    code = "import sys, prepare_data; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    out = subprocess.run([sys.executable, "prepare_data.py", "-h"], cwd=ROOT, check=True,
                         capture_output=True, text=True).stdout
    assert "--verify" in out and "--rows_per_chunk" in out


# ---- the embedded corpus


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("tiny") / "out"
    pd.main([str(ROOT / "configs" / "amber_tiny.py"), f"--data_dir={out}"])
    return out, pd.load_manifest(out)


def test_embedded_corpus(tiny, tmp_path):
    out, manifest = tiny
    assert [c["rows"] for c in manifest["chunks"]] == [2720] * 10
    assert [s["name"] for s in manifest["sources"]] == list(pd.CORPUS)
    total = sum(s["bytes"] for s in manifest["sources"])
    assert 11.5e6 < total < 13.5e6
    for s in manifest["sources"]:
        assert 0.6 * pd.CORPUS[s["name"]] < s["bytes"] < 1.1 * pd.CORPUS[s["name"]], s
        assert s["valid_rows"] == 64 and s["documents"] > 20
    assert 0.25 < manifest["sources"][0]["bytes"] / total < 0.35
    assert manifest["made_with"]["python"] and manifest["made_with"]["numpy"]
    tokenizer = pd.load_tokenizer(out)
    assert tokenizer.n_vocab == 4096 and total / sum(s["tokens"] for s in manifest["sources"]) > 3


def test_embedded_corpus_is_clean_and_the_same_twice(tmp_path):
    plan = a_plan(tmp_path, 1)
    size = pd.write_corpus(plan, None)
    texts = {name: texts_of(str(plan.work / "corpus" / f"{name}.jsonl")) for name in size}
    everything = "\n".join(itertools.chain(*texts.values()))
    # nothing of this machine; /usr/local is in texts everywhere, and short host names are words
    folders = {str(Path.home()), str(ROOT), sys.prefix, sys.base_prefix}
    folders = {f for f in folders if len(f) > 5 and not f.startswith("/usr")}
    assert not [f for f in folders if f in everything]
    assert len(os.uname().nodename) < 8 or os.uname().nodename not in everything
    assert not re.search(r"/home/\w+/\.?(pyenv|venv|conda|cache)|feedstock_root", everything)
    # nor in the files that another version of a package would make the corpus take instead
    for _, path in pd.python_files():
        code = path.read_bytes()
        assert not [f for f in folders if f.encode() in code], path
    assert "\0" not in everything
    documents = list(itertools.chain(*texts.values()))
    assert len(set(documents)) == len(documents)
    paragraphs = Counter(" ".join(p.split()) for d in documents for p in d.split("\n\n"))
    assert not [p for p, n in paragraphs.items() if len(p) >= 60 and n > 1]
    once = hashes(plan.work / "corpus")
    pd.write_corpus(plan, None)
    assert hashes(plan.work / "corpus") == once
