"""Scores equal plain greedy decoding; what is measured is what was drawn."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import ranks
from test_train import argv, home, straight  # noqa: F401

import memorize
import prepare_data
import train
from configs import ModelConfig
from model import LLaMA, export

K, L, VOCAB = 8, 12, 40


def net(seed: int, spread: float = 0.3) -> LLaMA:
    """A random model with weights wide enough that its greedy text is not one token for ever."""
    model = LLaMA(ModelConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=64,
                              num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                              initializer_range=spread))
    model.init_weights(seed)
    return model


def plain(model: LLaMA, rows: torch.Tensor, k: int) -> torch.Tensor:
    """Greedy decoding without a cache, a row and a token at a time."""
    out = []
    for row in rows.tolist():
        text = row[:k]
        while len(text) < len(row):
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
        out.append([a == b for a, b in zip(text[k:], row[k:])])
    return torch.tensor(out)


def mixed_rows(model: LLaMA, n: int, seed: int) -> torch.Tensor:
    """Rows that follow the model's own greedy text for 0 ... L tokens, then go their own way."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randint(VOCAB, (n, K + L), generator=random)
    for i, text in enumerate(model.generate(rows[:, :K].tolist(), L)):
        rows[i, K:] = torch.tensor(text)
        wrong = int(torch.randint(L + 1, (1,), generator=random))
        if wrong < L:  # one wrong token; what follows it may or may not agree
            rows[i, K + wrong] = (rows[i, K + wrong] + 1) % VOCAB
    return rows


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("pass_tokens", [1, 256])  # blocks of 4, 4, 4 tokens; of 10 and 2
def test_matches_are_those_of_plain_greedy_decoding(
        seed: int, pass_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memorize, "PASS_TOKENS", pass_tokens)
    model = net(seed)
    rows = mixed_rows(model, 24, seed)
    got = memorize.greedy_matches(model, rows, K)
    assert torch.equal(got, plain(model, rows, K))
    full = int(got.all(1).sum())
    assert 0 < full < 24 and got.sum() > got.cumprod(1).sum()  # agreements after a disagreement too


def test_ties_go_to_the_same_token() -> None:
    model = net(1)
    with torch.no_grad():  # two tokens with one and the same logit, always
        model.lm_head.weight[7] = model.lm_head.weight[3] = model.lm_head.weight.abs().max(0).values
    rows = mixed_rows(model, 16, 5)
    assert torch.equal(memorize.greedy_matches(model, rows, K), plain(model, rows, K))


@pytest.mark.parametrize("k, rows", [(1, 3), (K + L - 1, 4)])
def test_shortest_prompt_and_shortest_continuation(k: int, rows: int) -> None:
    model = net(2)
    tokens = mixed_rows(model, rows, 3)
    assert torch.equal(memorize.greedy_matches(model, tokens, k), plain(model, tokens, k))


def test_an_overfitted_model_scores_one_on_its_rows_and_chance_on_others() -> None:
    random = torch.Generator().manual_seed(0)
    known, other = (torch.randint(VOCAB, (6, K + L), generator=random) for _ in "ab")
    model = net(0, 0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss, _ = model(known[:, :-1], known[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert memorize.greedy_matches(model, known, K).all()
    assert memorize.greedy_matches(model, other, K).float().mean() < 0.25


def simulated(random: np.random.Generator, age: np.ndarray, rows: int) -> list[np.ndarray]:
    """A grid (N of (C, rows)): levels of checkpoints, chunks and rows, 5 % latest, 2 % earlier."""
    effect = 0.05 * (age == 0) + 0.02 * (age > 0)
    level = 0.2 + 0.02 * np.arange(len(age))[:, None] + 0.01 * np.arange(age.shape[1]) + effect
    return [random.binomial(L, level[:, i, None] + random.uniform(-0.2, 0.2, rows))
            for i in range(age.shape[1])]


def test_standard_errors_against_a_simulation() -> None:
    random, n = np.random.default_rng(0), 200
    chance = np.array([0.5] + [0.45 / L] * (L - 1) + [0.05])
    samples = [memorize.average([random.choice(L + 1, (1, n), p=chance / chance.sum())], L)
               for _ in range(2000)]
    for key in ("score", "extractible"):
        true = np.std([s[key] for s in samples])
        assert np.mean([s[f"{key}_se"] for s in samples]) == pytest.approx(true, rel=0.06)


def test_effects_and_repeated_rows_against_a_simulation() -> None:
    random = np.random.default_rng(0)
    age = np.arange(5)[:, None] - np.arange(6)  # the last chunk is never seen
    found: dict[str, list] = {"seen": [], "latest": [], "earlier": []}
    for _ in range(400):
        grid = simulated(random, age, 30)
        found["seen"].append(memorize.average(grid, L, age >= 0))
        for name, f in memorize.effects(grid, L, age).items():
            found[name].append(f)
    for name, truth in (("seen", None), ("latest", 0.05), ("earlier", 0.02)):
        scores = [f["score"] for f in found[name]]
        assert np.mean([f["score_se"] for f in found[name]]) == pytest.approx(
            np.std(scores), rel=0.1)
        assert truth is None or abs(np.mean(scores) - truth) < 4 * np.std(scores) / 20
    # one row shown to all checkpoints is not five
    alone = memorize.average([m[:1] for m in grid], L)["score_se"]
    assert memorize.average(grid, L)["score_se"] > 0.7 * alone


def test_effects_that_a_grid_cannot_tell_are_not_given() -> None:
    def told(age: list[list[int]]) -> set[str]:
        cells = np.array(age)
        return {*memorize.effects(simulated(np.random.default_rng(0), cells, 9), L, cells)}

    assert told([[0]]) == told([[2, 1, 0]]) == told([[1], [0]]) == told([[1, 2], [3, 4]]) == set()
    assert told([[0, -1], [1, 0]]) == set()  # 4 cells, 3 levels, 2 effects
    assert told([[1, -1], [3, 1]]) == {"earlier"}  # no chunk is the latest
    assert told([[0, -1, -2], [1, 0, -1], [2, 1, 0]]) == {"latest", "earlier"}


def test_the_heat_map_of_many_chunks_fits_a_terminal() -> None:
    score = np.arange(720).reshape(2, 360) / 1000
    lines = memorize.heat_map({
        "k": 1, "l": 1, "checkpoints": ["ckpt_100", "a_very_long_name"], "chunks": [*range(360)],
        "ages": (np.array([[100], [359]]) - np.arange(360)).tolist(),
        "cells": [[{"score": x} for x in row] for row in score]})
    assert max(map(len, lines[1:])) < 90 and "36-" in lines[1]
    assert "  1.8    5.3    8.9 |" in lines[2] and lines[3].endswith("█|")


def test_evenly_spaced_with_the_last() -> None:
    assert memorize.evenly(list(range(360)), 10) == [35, 71, 107, 143, 179, 215, 251, 287, 323, 359]
    assert memorize.evenly([1, 2, 3], 10) == [1, 2, 3]


def test_the_grid_is_measured_once_and_survives_a_kill(
        home: Path, straight: Path, tmp_path: Path,  # noqa: F811
        capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    grid = {"rows": 20, "k": 6, "l": 10, "batch": 7}
    memorize.main(argv(home, run, **grid))
    lines = run / "memorization.jsonl"
    first, summary = lines.read_text(), train.read_json(run / "memorization.json")
    assert first.count("\n") == 9 and "rows: checkpoints, columns" in capsys.readouterr().out
    # the batch changes nothing, and a line cut by a kill is measured again
    lines.write_text(first[: len(first) * 2 // 3])
    memorize.main(argv(home, run, **(grid | {"batch": 20})))
    assert train.read_json(run / "memorization.json") == summary
    again = sorted(json.dumps(r) for r in train.read_records(lines))
    assert again == sorted(first.splitlines())
    # one cell by hand
    config, _ = memorize.load(argv(home, run))
    model = memorize.evaluation.build(config)
    train.load_weights(model, run / "ckpt_001")
    manifest = prepare_data.load_manifest(config.data_dir)
    rows = prepare_data.open_chunk(config.data_dir, manifest, 2)
    ids = memorize.draw_rows(config.seed, 2, len(rows), 20)
    assert len(set(ids)) == 20
    tokens = torch.from_numpy(rows[ids]["token_ids"][:, :16].astype(np.int64))
    expected = plain(model, tokens, 6).sum(1)
    assert (summary["checkpoints"][1], summary["chunks"][2]) == ("ckpt_001", 2)
    assert summary["cells"][1][2]["score"] == pytest.approx(expected.float().mean().item() / 10)
    assert set(summary["by_age"]) == {"-2", "-1", "0", "1", "2"}
    assert [sum(counts) for counts in summary["histogram"]] == [60, 60, 60]
    assert len(summary["correlation"]["score"]) == 3 and {*summary["effects"]} == {
        "latest", "earlier"}


@pytest.mark.parametrize("flags, sentence", [
    ({"k": 30, "l": 30}, r"--k \+ --l = 60 tokens are asked for, but a row of .* has 33"),
    ({"chunks": "0,3"}, "there is no chunk '3'; there are 0, 1, 2"), ({"chunks": "x"}, "'x'"),
    ({"rows": 0}, "must be 1 or more"), ({"checkpoints": "8"}, "There is no checkpoint")])
def test_bad_grids_are_refused(home: Path, straight: Path, flags: dict,  # noqa: F811
                               sentence: str) -> None:
    with pytest.raises(SystemExit, match=sentence):
        memorize.main(argv(home, straight, **({"k": 6, "l": 10} | flags)))


def test_a_hugging_face_directory_scores_as_its_checkpoint(
        home: Path, straight: Path, tmp_path: Path) -> None:  # noqa: F811
    export(straight / "ckpt_001", tmp_path / "ckpt_001")
    found = []
    for path in (straight / "ckpt_001", tmp_path / "ckpt_001"):
        memorize.main(argv(home, tmp_path / "run", rows=9, k=6, l=10, checkpoints=path))
        summary = train.read_json(tmp_path / "run" / "memorization.json")
        found.append((summary["by_age"], summary["cells"]))
    assert found[0] == found[1]


def test_chunks_of_released_files_keep_their_numbers(
        home: Path, straight: Path, tmp_path: Path,  # noqa: F811
        capsys: pytest.CaptureFixture) -> None:
    manifest = prepare_data.load_manifest(home / "data")
    shutil.copytree(home / "data", tmp_path / "data")
    for chunk, name in zip(manifest["chunks"], ("train_002", "train_143", "train_355")):
        chunk["made_from"] = name
    train.write_json(tmp_path / "data" / "manifest.json", manifest)
    hub = [tmp_path / name for name in ("ckpt_143", "ckpt_300", "main")]
    for path in hub:
        export(straight / "ckpt_001", path)
    where = {"data_dir": tmp_path / "data", "checkpoints": ",".join(map(str, hub))}
    memorize.main(argv(home, tmp_path / "run", rows=9, k=6, l=10, chunks="143,355", **where))
    summary = train.read_json(tmp_path / "run" / "memorization.json")
    assert summary["checkpoints"] == ["ckpt_143", "ckpt_300", "main"]
    assert summary["ages"] == [[0, -212], [157, -55], [212, 0]]
    assert summary["chunks"] == [143, 355] and "  143    355" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_named_and_left_out(
        home: Path, straight: Path, tmp_path: Path,  # noqa: F811
        capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(straight, tmp_path / "run")
    weights = next((tmp_path / "run" / "ckpt_002" / "model").glob("*.distcp"))
    weights.write_bytes(weights.read_bytes()[:-1])
    memorize.main(argv(home, tmp_path / "run", rows=9, k=6, l=10))
    assert "ckpt_002: model/__0_0.distcp is damaged" in capsys.readouterr().out
    summary = train.read_json(tmp_path / "run" / "memorization.json")
    assert summary["checkpoints"] == ["ckpt_000", "ckpt_001"] and len(summary["cells"]) == 2


def test_a_full_disk_is_one_sentence_and_loses_nothing(
        home: Path, straight: Path, tmp_path: Path) -> None:  # noqa: F811
    shutil.copytree(straight, tmp_path / "run")
    words = argv(home, tmp_path / "run", rows=9, k=6, l=10)
    small = 1000  # bytes a file may have: a disk that is full, as the system sees it
    done = subprocess.run(
        [sys.executable, "memorize.py", *words], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (small, small)))
    assert done.returncode == 1 and done.stderr.endswith("memorization.jsonl: File too large.\n")
    assert "Traceback" not in done.stderr
    kept = train.read_records(tmp_path / "run" / "memorization.jsonl")
    assert kept
    memorize.main(words)
    cells = train.read_records(tmp_path / "run" / "memorization.jsonl")
    assert cells[: len(kept)] == kept and len(cells) == 9


def test_two_processes_share_the_grid(home: Path, straight: Path, tmp_path: Path) -> None:  # noqa: F811
    shutil.copytree(straight, tmp_path / "run")
    both = ranks(2, "memorize.py", *argv(home, tmp_path / "run", rows=9, k=6, l=10))
    assert [process.wait(60) for process in both] == [0, 0]
    cells = train.read_records(tmp_path / "run" / "memorization.jsonl")
    two = train.read_json(tmp_path / "run" / "memorization.json")
    assert len(cells) == 9 == len({json.dumps(c["of"]) for c in cells})
    (tmp_path / "run" / "memorization.jsonl").unlink()
    memorize.main(argv(home, tmp_path / "run", rows=9, k=6, l=10))
    assert train.read_json(tmp_path / "run" / "memorization.json") == two


def test_canaries_are_planted_as_often_as_said_and_found(
        home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    where = {"data_dir": tmp_path / "data", "canaries": "{1:4,2:4,16:6}"}
    prepare_data.main(argv(home, tmp_path / "run", **where))
    data = prepare_data.load_manifest(tmp_path / "data")
    rows = np.concatenate([prepare_data.open_chunk(tmp_path / "data", data, c) for c in range(3)])
    planted = rows["token_ids"][rows["source"] == 2]
    assert data["sources"][2]["name"] == "canary" and len(planted) == 108
    kinds = prepare_data.canaries(data["settings"])
    assert {times: len(r) for times, r in kinds.items()} == {1: 4, 2: 4, 16: 6}
    for times, canary in kinds.items():
        assert all((planted == row).all(1).sum() == times for row in canary)
    train.main(argv(home, tmp_path / "run", **where))
    memorize.main(argv(home, tmp_path / "run", **where, k=6, l=10, rows=9))
    found = train.read_json(tmp_path / "run" / "memorization.json")["canaries"]
    assert list(found) == ["0", "1", "2", "16"] and found["16"]["rows"] == 6
    assert "canaries planted 16 x" in capsys.readouterr().out
