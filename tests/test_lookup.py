"""tools/lookup.py: the sequences of a step, the documents of a sequence, the places of a text."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from helpers import jsonl
from helpers import words as made_up_words
from test_audit import exam, words  # noqa: F401
from test_prepare_data import prepare

import checkpoint as ckpt
import train
from configs import UserError, load
from data import Data, load_data, read_json, step_sequences
from model import LLaMA
from tools import lookup


def test_a_step_is_told_as_the_run_read_it(
        exam: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    """The seed is the run's own, even if it is asked with a config that has another."""
    train.main(words(exam, run_dir=tmp_path / "run", seed=5, max_steps=3, skip_chunks=[0]))
    capsys.readouterr()
    data = load_data(exam / "data")
    chunk, record = data.chunk(1), ckpt.read_records(tmp_path / "run/metrics.jsonl")[2]
    lookup.main(words(exam, run_dir=tmp_path / "run", step=3))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 3 = step 3 of chunk 1, 16 sequences")
    for key in ("loss", "grad_norm", "lr", "loss_by_source"):
        assert f"{key} {json.dumps(record[key])}" in lines[1]
    for k, i in enumerate(step_sequences(5, 1, len(chunk), 2, 16)):
        text = json.dumps(data.tokenizer.decode(chunk["token_ids"][i])[:20], ensure_ascii=False)
        source = data.sources[chunk["source"][i]]
        assert lines[2 + 2 * k].startswith(source) and text[1:-1] in lines[2 + 2 * k]
        assert f"chunk 1 sequence {i} " in lines[2 + 2 * k]
        assert f"/corpus/{source}.jsonl document " in lines[3 + 2 * k]
    assert len(lines) == 2 + 32
    with pytest.raises(UserError, match=r"--step=121: .* has steps 1 to 120 of 16"):
        lookup.main(words(exam, step=121))


def document_tokens(data: Data, path: str, number: int) -> list[int]:
    """The tokens of a document, made anew from the file."""
    text = json.loads(Path(path).expanduser().read_text().splitlines()[number - 1])["text"]
    return [*data.tokenizer.encode(text).tolist(), data.tokenizer.eos_id]


def test_the_documents_of_every_sequence_have_its_tokens(tmp_path: Path) -> None:
    for k, name in enumerate(("web", "code")):
        for i in range(3):  # documents of less than a sequence and of many; and an empty file
            texts = [made_up_words(1000 * k + 50 * i + d, 1 + d % 17 * 5) for d in range(25)]
            jsonl(tmp_path / name / f"{i}.jsonl", texts if i != 1 else [])
    files = {name: str(tmp_path / name / "*.jsonl") for name in ("web", "code")}
    data = prepare(tmp_path, sources=files, sequences_per_chunk=50, source_weights={"web": 2.5},
                   valid_documents=5, source_halves={"web": "odd"})
    several = 0
    for c in range(4):
        for i, sequence in enumerate(data.chunk(c)):
            pieces, tokens = lookup.documents_of(data, sequence, 0, 17), []
            several += len(pieces) > 1
            for path, number, begin, n in pieces:
                tokens += document_tokens(data, path, number)[begin : begin + n]
            assert tokens == sequence["token_ids"].tolist()
            # A part of a sequence is of the part of its documents.
            at = sum(n for *_, n in pieces[:-1])
            assert lookup.documents_of(data, sequence, at, 17) == pieces[-1:]
            assert f"document {pieces[0][1]}" in lookup.origin(data, c, i, 0, 17)
    assert several > 20


def brute_force(data: Data, text: bytes) -> list[tuple[int, int, int, int, int]]:
    """(chunk, sequence, first token, last token, byte) of each occurrence, the slow way."""
    found = []
    for c in range(len(data.manifest["chunks"])):
        for i, ids in enumerate(data.chunk(c)["token_ids"].tolist()):
            pieces = [data.tokenizer.pieces[id] for id in ids]
            whole = b"".join(pieces)
            token_of = [k for k, piece in enumerate(pieces) for _ in piece]
            for at in range(len(whole) - len(text) + 1):
                if whole[at:at + len(text)] == text:
                    found.append((c, i, token_of[at], token_of[at + len(text) - 1], at))
    return found


def test_every_place_is_found_and_no_other(tmp_path: Path) -> None:
    rng = random.Random(3)
    texts = ["".join(rng.choices("ab cdé ñ漢字 한😀\n  the", k=rng.randint(5, 90)))
             for _ in range(60)]
    data = prepare(tmp_path, sources={"a": jsonl(tmp_path / "a.jsonl", texts)}, n_chunks=2)
    straddling = 0
    for needle in ["the", "é", "漢", "\n  ", "b c", "aa", "  ", "nowhere!"]:
        expected = brute_force(data, needle.encode())
        places, total = lookup.find_places(data, needle.encode(), 10**9)
        assert [(p.chunk, p.sequence, p.first, p.last, p.byte) for p in places] == expected
        assert all(needle in p.context for p in places) and total == len(places)
        assert lookup.find_places(data, needle.encode(), 2) == (places[:2], total)
        straddling += any(p.last > p.first for p in places)
    assert straddling > 2


def test_steps_are_those_that_read_the_sequence(exam: Path) -> None:  # noqa: F811
    """One chunk is skipped, so another is read twice; and 32 sequences of each are left over."""
    data = load_data(exam / "data")
    config, _ = load(words(exam, skip_chunks=[0], global_batch_size=48, seed=7))
    read = {}
    for visit in data.schedule(config):
        n = len(data.chunk(visit.chunk))
        for step in range(visit.steps):
            for i in step_sequences(7, visit.chunk, n, step, 48, visit.epoch).tolist():
                read.setdefault((visit.chunk, i), []).append(visit.first_step + step + 1)
    times = set()
    for c in range(3):
        for i in range(0, len(data.chunk(c)), 5):
            steps = lookup.steps_of(config, data, lookup.Place(c, i, 0, 0, 0, ""))
            assert [step for _, step in steps] == read.get((c, i), [])
            times.add(len(steps))
    assert times == {0, 1, 2}


@pytest.mark.parametrize("chunk", [0, 2])
def test_losses_before_and_after(exam: Path, chunk: int,  # noqa: F811
                                 capsys: pytest.CaptureFixture) -> None:
    data, config = load_data(exam / "data"), load(words(exam))[0]
    text = data.tokenizer.decode(data.chunk(chunk)["token_ids"][5][3:15])
    lookup.main(words(exam, find=text))
    said = capsys.readouterr().out
    places, _ = lookup.find_places(data, text.encode(), 20)
    (k, place), = [(k, p) for k, p in enumerate(places, 1) if (p.chunk, p.sequence) == (chunk, 5)]
    ids = data.chunk(chunk)["token_ids"][5].tolist()
    covering = range(max(1, place.first), place.last + 1)
    line = next(x for x in said.splitlines() if re.match(rf" *{k}: chunk {chunk} ", x))
    run = exam / "run"
    for path in (run / f"ckpt_00{chunk - 1}" if chunk else None, run / f"ckpt_00{chunk}"):
        model = LLaMA(config)
        if path:
            model.load_state_dict(dict(ckpt.read_tensors(path)))
        else:
            model.init_weights(read_json(exam / "run/config.json")["seed"])
        with torch.no_grad():
            log_p = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
        loss = -sum(float(log_p[t - 1, ids[t]]) for t in covering) / len(covering)
        figure = line.split(f" ({path or 'the initial weights'})")[0].split()[-1]
        assert float(figure) == pytest.approx(loss, abs=2e-3)
