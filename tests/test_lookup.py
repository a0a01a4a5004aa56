"""lookup.py: the sequences of a step, the documents of a sequence, the places of a text."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import jsonl, tiny_llama, words
from test_prepare_data import prepare, released_lines
from test_prepare_data import released as released  # a fixture
from test_train import argv, home, metrics, run, straight  # noqa: F401

import checkpoint as ckpt
import lookup
import prepare_data as pd
from configs import UserError, load
from data import Data, chunk_schedule, load_data, step_sequences, write_json
from model import LLaMA
from tokenizer import Tokenizer

POOL = "ab cdé ñ漢字 한😀\n  the"


def test_a_step_is_told_as_the_run_read_it_whatever_seed_the_data_has(
        home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    """The seed is the run's own, even if it is asked with a config that has another."""
    run(home, tmp_path / "run", seed=5, max_steps=9, skip_chunks=[0])
    capsys.readouterr()
    data = load_data(home / "data")
    visit = chunk_schedule(data.steps_per_chunk(8), [0])[1]
    lookup.main(argv(home, tmp_path / "run", step=9))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 9 = step 3 of chunk 2, 8 sequences") and visit.chunk == 2
    record = metrics(tmp_path / "run")[8]
    for key in ("loss", "grad_norm", "lr", "loss_by_source"):
        assert f"{key} {json.dumps(record[key])}" in lines[1]
    chunk = data.chunk(2)
    for k, i in enumerate(step_sequences(5, 2, len(chunk), 2, 8)):
        text = json.dumps(data.tokenizer.decode(chunk["token_ids"][i])[:20])[1:-1]
        source = data.sources[chunk["source"][i]]
        assert lines[2 + 2 * k].startswith(source)
        assert f"chunk 2 sequence {i} " in lines[2 + 2 * k] and text in lines[2 + 2 * k]
        assert f"{home}/{source}.jsonl document " in lines[3 + 2 * k]
    assert len(lines) == 2 + 16
    # A step that is not made yet, and one of no run at all, are known as well.
    for directory, step in (("run", 17), ("no_run", 1)):
        lookup.main(argv(home, tmp_path / directory, step=step))
        assert "loss_by_source" not in capsys.readouterr().out
    for step in (0, 19):
        with pytest.raises(UserError, match=rf"--step={step}: .* has steps 1 to 18 of 8"):
            lookup.main(argv(home, tmp_path / "run", step=step))


# ---------------------------------------------------------------------------------------------
# documents


def document_tokens(data: Data, source: str, path: str, number: int) -> list[int]:
    """The tokens of a document as they were written, made anew from the file."""
    settings, tokenizer = data.manifest["settings"], data.tokenizer
    text = json.loads(Path(path).expanduser().read_text().splitlines()[number - 1])["text"]
    ids = tokenizer.encode(text)
    if rate := settings["fim_rates"].get(source):
        generator = np.random.default_rng([settings["seed"], pd.zlib.crc32(text.encode())])
        ids = pd.fill_in_the_middle(ids, tokenizer, rate, settings["fim_spm_rate"], generator)
    return [*ids.tolist(), tokenizer.eos_id]


@pytest.mark.parametrize("part_bytes", [1, 1 << 24])  # a part for each file, and one part
@pytest.mark.parametrize("settings", [
    {},
    {"source_weights": {"web": 2.5, "code": 0.4}},
    {"sequences_per_chunk": 50, "source_weights": {"web": 2.5}, "canaries": {2: 6}},
    {"valid_documents": 5, "source_halves": {"web": "odd"}, "source_weights": {"code": 1.5}},
    {"valid_documents": 5, "fim_rates": {"code": 0.7}, "crystal_tokens": True, "vocab_size": 322},
], ids=["plain", "weights", "cap", "valid_documents", "fim"])
def test_the_documents_of_every_sequence_have_its_tokens(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict, part_bytes: int) -> None:
    monkeypatch.setattr(pd, "PART_BYTES", part_bytes)
    for k, name in enumerate(("web", "code")):
        for i in range(4):  # documents of less than a sequence and of many
            jsonl(tmp_path / name / f"{i}.jsonl",
                  [words(1000 * k + 50 * i + d, 1 + d % 17 * 5) + name for d in range(25)])
    (tmp_path / "web" / "2.jsonl").write_text("")
    files = {name: str(tmp_path / name / "*.jsonl") for name in ("web", "code")}
    data = prepare(tmp_path, sources=files, **settings)
    assert data.verify() == []
    several = 0
    for c in range(4):
        for i, (source, ids) in enumerate(data.chunk(c)):
            if data.sources[source] == "canary":
                assert "planted" in lookup.origin(data, c, i, 0, 17)
                continue
            pieces, found = lookup.documents_of(data, c, i, 0, 17), []
            several += len(pieces) > 1
            for path, number, begin, n in pieces:
                tokens = document_tokens(data, data.sources[source], path, number)
                found += tokens[begin:begin + n]
            assert found == ids.tolist()
            # A part of a sequence is of the part of its documents.
            at = sum(n for *_, n in pieces[:-1])
            assert lookup.documents_of(data, c, i, at, 17) == pieces[-1:]
            assert f"document {pieces[0][1]}" in lookup.origin(data, c, i, 0, 17)
    assert several > 20
    (data.directory / "documents" / "web.npy").unlink()
    assert [problem for problem in data.verify() if "web.npy is missing" in problem]


def test_data_without_documents(tmp_path: Path, released: dict) -> None:
    data = prepare(tmp_path, **released)
    lines = released_lines(tmp_path / "train_001.jsonl")
    for i in (0, 7, len(data.chunk(1)) - 1):
        assert data.chunk(1)["token_ids"][i].tolist() == lines[i][1]
        assert lookup.origin(data, 1, i, 0, 17) == f"train_001 line {i + 1}"
    data = prepare(tmp_path, **released, sequences_per_chunk=90, data_dir=str(tmp_path / "cap"))
    assert lookup.origin(data, 1, 8, 0, 17) == "train_001 line 9 or later"
    # A data set of before the index.
    files = {"a": jsonl(tmp_path / "a.jsonl", [words(i, 90) for i in range(30)])}
    old = prepare(tmp_path, sources=files, data_dir=str(tmp_path / "old"))
    manifest = {key: value for key, value in old.manifest.items() if key != "documents"}
    write_json(old.directory / "manifest.json", manifest)
    old = load_data(old.directory)
    assert old.verify() == [] and "without an index" in lookup.origin(old, 0, 0, 0, 17)


# ---------------------------------------------------------------------------------------------
# --find


def brute_force(data: Data, text: bytes) -> list[tuple[int, int, int, int, int]]:
    """(chunk, sequence, first token, last token, byte) of each occurrence, the slow way."""
    found = []
    for c in range(len(data.manifest["chunks"])):
        for i, ids in enumerate(data.chunk(c)["token_ids"].tolist()):
            pieces = [data.tokenizer.pieces.get(id, b"\xff") for id in ids]
            whole = b"".join(pieces)
            # What tokenizer.decode says, but for the space that LLaMA's takes off a beginning.
            assert whole.decode("utf-8", "replace") == Tokenizer.decode(data.tokenizer, ids)
            token_of = [k for k, piece in enumerate(pieces) for _ in piece]
            for at in range(len(whole) - len(text) + 1):
                if whole[at:at + len(text)] == text:
                    found.append((c, i, token_of[at], token_of[at + len(text) - 1], at))
    return found


@pytest.mark.parametrize("kind", ["bpe", "llama", "canaries"])
def test_every_place_is_found_and_no_other(tmp_path: Path, kind: str,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "BLOCK_TOKENS", 100)  # blocks end among the sequences
    rng = random.Random(3)
    texts = ["".join(rng.choices(POOL, k=rng.randint(5, 90))) for _ in range(60)]
    settings = {"sources": {"a": jsonl(tmp_path / "a.jsonl", texts)}, "n_chunks": 2}
    if kind == "llama":
        settings["tokenizer"] = f"llama:{tiny_llama(tmp_path / 'tokenizer.json')}"
    if kind == "canaries":  # they may have ids that the tokenizer has not
        settings |= {"canaries": {2: 5}, "vocab_size": 5000}
    data = prepare(tmp_path, **settings)
    needles = [text[at:at + rng.randint(1, 9)] for text in rng.choices(texts, k=25)
               for at in [rng.randrange(len(text) - 4)]]
    straddling = 0
    for needle in [*needles, "aa", "  ", "nowhere!"]:
        expected = brute_force(data, needle.encode())
        places, total = lookup.find_places(data, needle.encode(), 10 ** 9)
        assert [(p.chunk, p.sequence, p.first, p.last, p.byte) for p in places] == expected
        assert all(needle in p.context for p in places) and total == len(places)
        assert lookup.find_places(data, needle.encode(), 2) == (places[:2], total)
        straddling += any(p.last > p.first for p in places)
    assert straddling > 10


def test_steps_are_those_that_read_the_sequence(home: Path) -> None:  # noqa: F811
    data = load_data(home / "data")
    for skip, batch in (([], 8), ([0], 8), ([1], 12)):
        config, _ = load(argv(home, "none", skip_chunks=skip, global_batch_size=batch, seed=7,
                              micro_batch_size=4))
        read = {}
        for visit in chunk_schedule(data.steps_per_chunk(batch), skip):
            n = data.manifest["chunks"][visit.chunk]["sequences"]
            for step in range(visit.steps):
                for i in step_sequences(7, visit.chunk, n, step, batch, visit.turn).tolist():
                    read.setdefault((visit.chunk, i), []).append(visit.first_step + step + 1)
        steps = {}
        for c in range(3):
            for i in range(len(data.chunk(c))):
                place = lookup.Place(c, i, 0, 0, 0, "")
                steps[c, i] = [step for _, step in lookup.steps_of(config, data, place)]
        assert {place: s for place, s in steps.items() if s} == read
        assert [] in steps.values() and (not skip or max(map(len, steps.values())) == 2)


def loss_by_hand(path: Path | None, config: Path, place: lookup.Place, ids: list[int]) -> float:
    model = LLaMA(load([str(config)])[0])
    if path:
        model.load_state_dict(dict(ckpt.read_tensors(path)))
    else:
        model.init_weights(11111)
    with torch.no_grad():
        log_p = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    covering = range(max(1, place.first), place.last + 1)
    return -sum(float(log_p[t - 1, ids[t]]) for t in covering) / len(covering)


@pytest.mark.parametrize("chunk", [0, 1])
def test_losses_before_and_after(home: Path, straight: Path, chunk: int,  # noqa: F811
                                 capsys: pytest.CaptureFixture) -> None:
    data = load_data(home / "data")
    text = data.tokenizer.decode(data.chunk(chunk)["token_ids"][5][3:12])
    places, total = lookup.find_places(data, text.encode(), 20)
    assert 0 < total < 20
    lookup.main(argv(home, straight, find=text))
    said = capsys.readouterr().out
    config, _ = load(argv(home, straight))
    for k, place in enumerate(places, 1):
        ids = data.chunk(place.chunk)["token_ids"][place.sequence].tolist()
        for visit, step in lookup.steps_of(config, data, place):
            line = next(x for x in said.splitlines() if x.startswith(f"{k:>2}: chunk {visit.chunk}")
                        and "sequence" not in x)
            assert f"step {step}\n" in said
            ends = [straight / f"ckpt_{c:03}" if c >= 0 else None
                    for c in (place.chunk - 1, place.chunk)]
            for path in ends:
                loss = loss_by_hand(path, home / "mini.py", place, ids)
                name = str(path or "the initial weights")
                found = line.split(f" ({name})")[0].split()[-1]
                assert float(found) == pytest.approx(loss, abs=2e-3)
    assert ("the initial weights" in said) == (chunk == 0)


def test_find_says_what_is_missing(home: Path, straight: Path, tmp_path: Path,  # noqa: F811
                                   capsys: pytest.CaptureFixture) -> None:
    for settings, sentence in (({"find": ""}, "--find is empty"),
                               ({"find": "qqzqq"}, "'qqzqq' is nowhere in the training data"),
                               ({"find": "a", "data_dir": tmp_path / "no"}, "no prepared data"),
                               ({}, "Say what to look up")):
        with pytest.raises(UserError, match=sentence):
            lookup.main(argv(home, straight, **settings))
    lookup.main(argv(home, tmp_path / "no_run", find="a"))
    said = capsys.readouterr().out
    assert re.search(r"^[\d,]+ places in .*, the first 20\n(.*\n)*20: \w+, chunk 0 sequence", said)
    assert "no_run has no checkpoint" in said


# ---------------------------------------------------------------------------------------------
# --outliers


def test_outliers(home: Path, tmp_path: Path,  # noqa: F811
                  capsys: pytest.CaptureFixture) -> None:
    rng = np.random.default_rng(1)

    def said(change: dict[int, float], noise: float) -> list[str]:
        records = []
        for step in range(1, 301):
            loss = change.get(step, 3 + 5 * 0.97 ** step + noise * rng.standard_normal())
            records.append({"step": step, "tokens": 8 * step, "chunk": 2, "loss": loss,
                            "grad_norm": 0.5, "loss_by_source": {"web": loss, "code": loss + 1}})
        (tmp_path / "run").mkdir(exist_ok=True)
        ckpt.write_records(tmp_path / "run/metrics.jsonl", records)
        lookup.main(argv(home, tmp_path / "run", outliers=True))
        return capsys.readouterr().out.splitlines()

    for noise in (0, 0.05):
        assert said({}, noise) == ["0 of 300 steps leave the band of the 51 steps around them"]
        lines = said({150: 4.5, 299: float("nan"), 300: 1.0}, noise)
        assert lines[0].startswith("3 of 300 steps")
        assert [line.split(",")[0] for line in lines[1:]] == ["step 150", "step 299", "step 300"]
        assert "chunk 2: loss 4.500, band " in lines[1] and "largest loss code 5.500" in lines[1]
        assert lines[1].endswith("--step=150") and f"lookup.py {home}/mini.py" in lines[1]
        low, high = lines[1].split("band ")[1].split(",")[0].split(" to ")
        assert 2 < float(low) < 3.2 < float(high) < 4.4
    ckpt.write_records(tmp_path / "run/metrics.jsonl", [{"step": 1, "tokens": 8, "loss": 1.0}])
    for directory, n in (("run", 1), ("no_run", 0)):
        with pytest.raises(UserError, match=f"has {n} steps, and a band is made of 51"):
            lookup.main(argv(home, tmp_path / directory, outliers=True))
