"""Scores equal plain greedy decoding; what is measured is what was drawn."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_train import argv, home, straight

import memorize
from checkpoint import load_weights, read_records
from configs import ModelConfig, UserError, load
from data import load_data, read_json, write_json
from model import LLaMA
from parallel import build_for_inference

K, L, VOCAB = 8, 12, 40


def random_model(seed: int, spread: float = 0.3) -> LLaMA:
    """A random model with weights wide enough that its greedy text is not one token for ever."""
    model = LLaMA(ModelConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=64,
                              num_hidden_layers=2, num_attention_heads=2,
                              initializer_range=spread))
    model.init_weights(seed)
    return model


def plain_matches(model: LLaMA, sequences: torch.Tensor, k: int) -> torch.Tensor:
    """Greedy decoding by the book: without a cache, the whole text again for every token."""
    text = sequences[:, :k]
    while text.shape[1] < sequences.shape[1]:
        token = model(text)[:, -1].argmax(-1)
        text = torch.cat([text, token[:, None]], dim=1)
    return text[:, k:] == sequences[:, k:]


def mixed_sequences(model: LLaMA, n: int, seed: int) -> torch.Tensor:
    """Sequences that follow the model's own greedy text for 0 ... L tokens, then go their way."""
    random = torch.Generator().manual_seed(seed)
    sequences = torch.randint(VOCAB, (n, K + L), generator=random)
    for i, text in enumerate(model.generate(sequences[:, :K].tolist(), L)):
        sequences[i, K:] = torch.tensor(text)
        wrong = int(torch.randint(L + 1, (1,), generator=random))
        if wrong < L:  # one wrong token; what follows it may or may not agree
            sequences[i, K + wrong] = (sequences[i, K + wrong] + 1) % VOCAB
    return sequences


def matches_of(run: Path) -> dict[str, list[int]]:
    """What has been measured, by cache key."""
    return {json.dumps(record["of"]): record["result"]["matches"]
            for record in read_records(run / "memorization.jsonl")}


def summary_of(run: Path) -> dict[str, Any]:
    return read_json(run / "memorization.json")


@pytest.mark.parametrize("seed, k, n, tie", [
    (0, K, 24, False), (1, K, 24, True), (2, 1, 3, False), (3, K + L - 1, 4, False)])
def test_matches_are_those_of_plain_greedy_decoding(seed: int, k: int, n: int, tie: bool) -> None:
    model = random_model(seed)
    if tie:  # two tokens with one and the same logit, always; often it is the highest
        head = model.lm_head.weight.data
        head[7] = head[3] = head.abs().max(0).values
    sequences = mixed_sequences(model, n, seed)
    matches = memorize.greedy_matches(model, sequences, k)
    assert torch.equal(matches, plain_matches(model, sequences, k))
    if n == 24:  # agreements after a disagreement have to be decoded, and there are some
        assert 0 < matches.all(1).sum() < 24 and matches.sum() > matches.cumprod(1).sum()


def simulated(random: np.random.Generator, age: np.ndarray, n: int) -> memorize.Grid:
    """A grid of n sequences a chunk: levels of checkpoints, chunks and sequences; having been seen
    adds 5 % to the score at once and 2 % later, and takes 0.2, 0.1, 0.05 ... nats off the loss."""
    effect = 0.05 * (age == 0) + 0.02 * (age > 0)
    levels = 0.02 * np.arange(len(age))[:, None] + 0.01 * np.arange(age.shape[1])
    forgotten = np.where(age >= 0, 0.2 * 0.5 ** np.maximum(age, 0.0), 0)
    cells = []
    for i in range(age.shape[1]):
        ease = random.uniform(-0.2, 0.2, n)
        matches = random.binomial(L, (0.2 + levels + effect)[:, i, None] + ease)
        noise = random.normal(0, 0.1, matches.shape)
        losses = 4 - (levels + forgotten)[:, i, None] - 5 * ease + noise
        cells.append([{"matches": m, "loss": x}
                      for m, x in zip(matches, losses)])
    return memorize.make_grid(cells, L)


def latest_and_earlier(grid: memorize.Grid, age: np.ndarray) -> dict[str, dict[str, float]]:
    return memorize.effects(grid, {"latest": age == 0, "earlier": age > 0})


def test_effects_and_errors_against_a_simulation() -> None:
    """In 100 simulated grids: effects without bias, standard errors as large as the spread."""
    random, found = np.random.default_rng(0), {}
    age = np.arange(8)[:, None] - np.arange(9)  # the last chunk is never seen
    for _ in range(100):
        grid = simulated(random, age, 20)
        samples = {}
        for name, figures in latest_and_earlier(grid, age).items():
            samples[name] = figures, "score"
        for name, figures in memorize.effects(grid, memorize.age_groups(age)).items():
            samples[name] = figures, "loss"
        for name, (figures, key) in samples.items():
            found.setdefault(name, []).append((figures[key], figures[f"{key}_se"]))
    truth = {"latest": 0.05, "earlier": 0.02} | {
        name: -0.2 * 0.5 ** int(name[0]) for name in memorize.age_groups(age)}
    assert found.keys() == truth.keys()
    for name, pairs in found.items():
        effect, stderr = np.transpose(pairs)
        assert stderr.mean() == pytest.approx(effect.std(), rel=0.2)
        assert abs(effect.mean() - truth[name]) < 4 * effect.std() / 100 ** 0.5
    # One sequence shown to all checkpoints is not eight.
    once = {key: [chunk[:1] for chunk in values] for key, values in grid.items()}
    alone = memorize.figures(once, np.ones((1, 9)))["score_se"]
    assert memorize.figures(grid, np.ones((8, 9)) / 8)["score_se"] > 0.7 * alone


def test_effects_that_a_grid_cannot_tell_are_not_given() -> None:
    def told(age: list[list[int]]) -> set[str]:
        cells = np.array(age)
        return {*latest_and_earlier(simulated(np.random.default_rng(0), cells, 9), cells)}

    assert told([[0]]) == told([[2, 1, 0]]) == told([[1], [0]]) == told([[1, 2], [3, 4]]) == set()
    assert told([[0, -1], [1, 0]]) == set()  # 4 cells, 3 levels, 2 effects
    assert told([[1, -1], [3, 1]]) == {"earlier"}  # no chunk is the latest
    assert told([[0, -1, -2], [1, 0, -1], [2, 1, 0]]) == {"latest", "earlier"}


def test_the_grid_is_measured_once_and_survives_a_kill(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight(), run)
    grid = {"sequences": 20, "k": 6, "l": 10, "batch": 7}
    memorize.main(argv(run, **grid))
    lines = run / "memorization.jsonl"
    text, first = lines.read_text(), matches_of(run)
    assert text.count("\n") == 9
    # The batch changes nothing, and a line cut by a kill is measured again.
    lines.write_text(text[: len(text) * 2 // 3])
    memorize.main(argv(run, **(grid | {"batch": 20})))
    assert matches_of(run) == first and len(first) == 9
    # One cell by hand.
    config, _ = load(argv(run))
    model = build_for_inference(config)
    load_weights(model, run / "ckpt_001")
    ids, sequences = memorize.draw_sequences(config, load_data(config.data_dir), 2, 20)
    assert ids.tolist() == sorted(  # the draw of every earlier version
        np.random.default_rng([11111, 2, 360]).choice(50, 20, replace=False))
    whole = torch.from_numpy(sequences["token_ids"].astype(np.int64))
    losses = model(whole[:, :-1], whole[:, 1:])[1]  # (20, T)
    expected = plain_matches(model, whole[:, :16], 6).sum(1)
    summary = summary_of(run)
    cell = summary["cells"][1][2]  # of ckpt_001 and chunk 2
    assert cell["score"] == pytest.approx(expected.float().mean().item() / 10)
    assert cell["loss"] == pytest.approx(losses.mean().item(), abs=1e-4)
    assert summary["ages"] == [[0, -1, -2], [1, 0, -1], [2, 1, 0]]
    assert {*summary["effects"]} == {"latest", "earlier"}
    assert {*summary["by_source"]} == {"prose", "code"}


def test_chunks_that_were_left_out_are_unseen_and_chunks_met_again_are_young() -> None:
    data = load_data(home() / "data")  # 3 chunks of 6 steps; chunk 1 is left out, 0 comes again
    config, _ = load(argv("unused", skip_chunks="[1]"))
    records = [{"step": step, "checkpoint": "any"} for step in (0, 6, 11, 12, 18)]
    assert memorize.ages(config, data, records, [0, 1, 2]).tolist() == [
        [-1, -2, -3], [0, -1, -2], [0, -1, -2], [2, -1, 0], [0, -1, 1]]


def test_bad_grids_are_refused() -> None:
    with pytest.raises(UserError, match="60 tokens are asked for, but a sequence of .* has 33"):
        memorize.main(argv(straight(), k=30, l=30))
    with pytest.raises(UserError, match="there is no chunk '3', but 0 to 2"):
        memorize.main(argv(straight(), k=6, l=10, chunks="0,3"))


def test_published_checkpoints_and_chunks_of_released_files(tmp_path: Path,
                                                            capsys: pytest.CaptureFixture) -> None:
    """A copy without our manifest scores as its checkpoint does; chunks keep their numbers."""
    shutil.copytree(home() / "data", tmp_path / "data")
    manifest = load_data(home() / "data").manifest
    for chunk, name in zip(manifest["chunks"], ("train_002", "train_143", "train_355")):
        chunk["made_from"] = name
    write_json(tmp_path / "data" / "manifest.json", manifest)
    ours = straight() / "ckpt_001"
    ignore = shutil.ignore_patterns("manifest.json", "train_state")
    hub = [shutil.copytree(ours, tmp_path / name, ignore=ignore)
           for name in ("ckpt_143", "ckpt_300", "main")]
    grid = {"sequences": 0, "k": 6, "l": 10}
    where = {"data_dir": tmp_path / "data", "checkpoints": ",".join(map(str, hub))}
    memorize.main(argv(tmp_path / "theirs", chunks="143,355", **where, **grid))
    assert "at ckpt_143, ckpt_300, main, of 2 chunks" in capsys.readouterr().out
    memorize.main(argv(tmp_path / "ours", chunks="1,2", checkpoints=ours, **grid))
    theirs, mine = summary_of(tmp_path / "theirs"), summary_of(tmp_path / "ours")
    assert theirs["checkpoints"] == ["ckpt_143", "ckpt_300", "main"]
    assert theirs["ages"] == [[0, -212], [157, -55], [212, 0]] and theirs["chunks"] == [143, 355]
    assert theirs["cells"] == 3 * mine["cells"]


def test_extractible_sequences_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = shutil.copytree(straight(), tmp_path / "run")
    memorize.main(argv(run, sequences=0, chunks=1, k=31, l=1, checkpoints="last"))
    data, summary = load_data(home() / "data"), summary_of(run)
    [record] = read_records(run / "memorization.jsonl")
    chunk = data.chunk(1)
    recited = np.flatnonzero(np.array(record["result"]["matches"]) == 1)
    assert 0 < len(recited) < len(chunk) and [x["sequence"] for x in summary["extractible"]] == [
        *recited]
    for text, i in zip(summary["extractible"], recited):
        ids = chunk["token_ids"][i]
        assert text == {"chunk": 1, "sequence": i, "source": data.sources[chunk["source"][i]],
                        "prompt": data.tokenizer.decode(ids[:31]),
                        "continuation": data.tokenizer.decode(ids[31:32])}
    assert summary["cells"][0][0]["extractible"] == pytest.approx(len(recited) / len(chunk))
    assert capsys.readouterr().out.count("memorized: ") == min(3, len(recited))
