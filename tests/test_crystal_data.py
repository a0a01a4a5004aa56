"""Crystal's data: documents written for infilling, and stages that share what they should."""

import json
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import jsonl, words

import prepare_data
from configs import UserError
from data import Data, load_data
from tokenizer import BPE_PATTERN, CRYSTAL_TOKENS, EOT, FIM_TOKENS, Tokenizer, train_bpe

# ---------------------------------------------------------------------------------------------
# infilling


def restored(document: list[int], tokenizer: Tokenizer) -> list[int]:
    """A document of either of its infilling forms: before <SUF>, after <MID>, between."""
    pre, mid, suf = (tokenizer.specials[name] for name in FIM_TOKENS)
    if document[:1] != [pre]:
        return document
    s, m = document.index(suf), document.index(mid)
    assert [document.count(i) for i in (pre, suf, mid)] == [1, 1, 1] and s < m
    return document[1:s] + document[m + 1:] + document[s + 1:m]


def a_tokenizer() -> Tokenizer:
    ranks = train_bpe([words(1, 60)], 400)
    return Tokenizer("bpe", ranks, BPE_PATTERN, {EOT: len(ranks)}).add(CRYSTAL_TOKENS)


def test_infilling_gives_back_the_document() -> None:
    tokenizer, draw = a_tokenizer(), random.Random(2)
    pre, _, suf = (tokenizer.specials[name] for name in FIM_TOKENS)
    changed = suffix_first = 0
    for seed in range(2000):
        pieces = ["def ", "foo", "(bar)", " ", "\n", "\U0001f40d", "<|fim_middle|>", "x"]
        text = "".join(draw.choices(pieces, k=draw.choice((1, 2, 3, 8, 40))))
        document = tokenizer.encode(text)
        drawn, kept = (prepare_data.fill_in_the_middle(document, tokenizer, rate, 0.5,
                                                       np.random.default_rng(seed))
                       for rate in (0.9, 0))
        out, back = drawn.tolist(), restored(drawn.tolist(), tokenizer)
        assert back == document.tolist() and kept is document
        assert tokenizer.decode(back) == text  # no space at the cuts
        changed += len(out) == len(document) + 3
        suffix_first += out[:2] == [pre, suf]  # or an empty prefix
    assert changed / 2000 == pytest.approx(0.9, abs=0.03) and suffix_first > 800


def test_the_two_forms_are_the_papers() -> None:
    tokenizer, document = a_tokenizer(), np.arange(10, 30, dtype=np.uint32)
    pre, mid, suf = (tokenizer.specials[name] for name in FIM_TOKENS)
    cuts = np.random.default_rng(3)
    cuts.random()  # whether it is cut at all
    a, b = np.sort(cuts.integers(21, size=2))
    assert 0 < a < b < 20
    d = document.tolist()
    for spm_rate, expected in ((0.0, [pre, *d[:a], suf, *d[b:], mid, *d[a:b]]),
                               (1.0, [pre, suf, *d[b:], mid, *d[:b]])):
        out = prepare_data.fill_in_the_middle(document, tokenizer, 1.0, spm_rate,
                                              np.random.default_rng(3))
        assert out.tolist() == expected


# ---------------------------------------------------------------------------------------------
# stages

MINI = """
vocab_size, seq_len, n_chunks, sequences_per_chunk = 340, 32, 3, 50
valid_sequences, valid_documents, crystal_tokens, workers = 6, 6, True, 1
source_halves, source_weights = {"prose": "even"}, {"code": 0}
"""
SECOND = """
source_halves, source_weights, fim_rates = {"prose": "odd"}, {"code": 2}, {"code": 0.9}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages, prepared; no document has a part of another in it by chance."""
    home = tmp_path_factory.mktemp("crystal")
    sources = {name: jsonl(home / f"{name}.jsonl", [words(1000 * k + i, 12) for i in range(60)])
               for k, name in enumerate(("prose", "code"))}
    for stage, more in (("one", ""), ("two", SECOND)):
        tokenizer = f"data:{home / 'data_one'}" if more else "bpe"
        (home / f"{stage}.py").write_text(
            MINI + more + f"sources, tokenizer = {sources!r}, {tokenizer!r}\n"
            f"data_dir = {str(home / f'data_{stage}')!r}\n")
        prepare_data.main([str(home / f"{stage}.py")])
    return home


def documents_of(data: Data, source: str) -> list[list[int]]:
    """The documents of a data set of one chunk that are whole in it."""
    chunk, eos = data.chunk(0), data.tokenizer.eos_id
    found: list[list[int]] = [[]]
    for token in chunk["token_ids"][chunk["source"] == data.sources.index(source)].ravel().tolist():
        if token == eos:
            found.append([])
        else:
            found[-1].append(token)
    return found[1:-1]


def whole(home: Path, stage: str, tmp_path: Path) -> Data:
    """The data of a stage once more: one chunk of all sequences, none twice, two workers."""
    prepare_data.main([str(home / f"{stage}.py"), f"--data_dir={tmp_path / stage}",
                       "--workers=2", "--n_chunks=1", "--sequences_per_chunk=0"]
                      + ["--source_weights={}"] * (stage == "two"))
    return load_data(tmp_path / stage)


def test_stages_share_tokenizer_and_validation_and_no_text_is_in_two_places(
        home: Path, tmp_path: Path) -> None:
    one, two = (load_data(home / f"data_{stage}") for stage in ("one", "two"))
    assert one.manifest["tokenizer"] == two.manifest["tokenizer"] and one.n_vocab <= 340
    assert one.manifest["valid"] == two.manifest["valid"]  # file, source, sequences, sha256
    assert [s["valid_sequences"] for s in one.manifest["sources"]] == [6, 6]
    for s in one.manifest["sources"] + two.manifest["sources"]:
        assert s["sequences"] * 33 + s["tail_tokens"] == s["tokens"]
        assert s["unused_sequences"] == max(0, s["sequences"] - s["train_sequences"])
    # Every document is held out, or in one half, whatever file it came from.
    where = {}
    for line in (home / "prose.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        key = zlib.crc32(text.encode())
        half = "held out" if key // 2 % 6 == 0 else "even" if key % 2 == 0 else "odd"
        where[tuple(one.tokenizer.encode(text).tolist())] = half
    for stage, half in (("one", "even"), ("two", "odd")):
        data = whole(home, stage, tmp_path)
        read = documents_of(data, "prose")
        assert {where[tuple(d)] for d in read} == {half} and len(read) > 15
        # Code is not trained on in the first stage, and measured in both.
        assert bool(documents_of(data, "code")) == (stage == "two")


def test_code_of_the_second_stage_is_for_infilling_and_reads_as_it_was(home: Path,
                                                                       tmp_path: Path) -> None:
    data = whole(home, "two", tmp_path)
    known = {json.loads(x)["text"] for x in (home / "code.jsonl").read_text().splitlines()}
    found = documents_of(data, "code")
    read = [data.tokenizer.decode(restored(d, data.tokenizer)) for d in found]
    assert len(read) > 40 and set(read) <= known
    pre = data.tokenizer.specials["<|fim_prefix|>"]
    assert sum(d[0] == pre for d in found) / len(found) == pytest.approx(0.9, abs=0.12)
    assert not (data.validation("code")["token_ids"] >= pre).any()


def test_settings_that_cannot_work(home: Path, tmp_path: Path) -> None:
    for arguments, sentence in (
            (["--fim_rates={'prse': 0.5}"], r"fim_rates names \['prse'\], but the sources"),
            (["--source_halves={'prse': 'odd'}"], r"source_halves names \['prse'\], but"),
            (["--source_halves={'prose': 'left'}"], "must be 'even' or 'odd', found 'left'"),
            (["--fim_rates={'code': 2}"], r"fim_rates\['code'\] must be a share between"),
            (["--fim_rates={'code': 1}", "--crystal_tokens=false"], "has no <|fim_prefix|>;"),
            (["--tokenizer=data:/nowhere"], "/nowhere has no prepared data"),
            (["--valid_documents=100000"], "valid_documents = 100000 holds out 0 more")):
        with pytest.raises(UserError, match=sentence.replace("|", r"\|")):
            prepare_data.main([str(home / "one.py"), f"--data_dir={tmp_path}/x", *arguments])
