"""Scores equal plain greedy decoding; what is measured is what was drawn."""

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch import ranks
from test_train import argv, home, straight  # noqa: F401

import memorize
import prepare_data
import train
from checkpoint import load_weights, read_records
from configs import ModelConfig, UserError, load
from data import load_data, read_json, write_json
from model import LLaMA, build_for_inference

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


def published_copy(checkpoint: Path, path: Path) -> Path:
    """A checkpoint as others publish theirs: without our manifest and the state of training."""
    ours = shutil.ignore_patterns("manifest.json", "train_state")
    # Files of a time of their own, as in a download: by that they are told apart.
    return Path(shutil.copytree(checkpoint, path, ignore=ours, copy_function=shutil.copy))


def summary_of(run: Path) -> dict[str, Any]:
    return read_json(run / "memorization.json")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are so small that threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------
# decoding


@pytest.mark.parametrize("seed", range(4))
def test_matches_are_those_of_plain_greedy_decoding(seed: int) -> None:
    model = random_model(seed)
    sequences = mixed_sequences(model, 24, seed)
    found, _ = memorize.greedy_matches(model, sequences, K)
    assert torch.equal(found, plain_matches(model, sequences, K))
    full = int(found.all(1).sum())
    # There are agreements after a disagreement too: those have to be decoded.
    assert 0 < full < 24 and found.sum() > found.cumprod(1).sum()


@pytest.mark.parametrize("k, n", [(1, 3), (K + L - 1, 4), (K, 5)])
def test_log_probabilities_of_the_suffix_are_those_of_the_full_logits(k: int, n: int) -> None:
    model = random_model(6)
    sequences = mixed_sequences(model, n, 6)
    _, found = memorize.greedy_matches(model, sequences, k)
    log_p = model(sequences[:, :-1]).log_softmax(-1)  # (n, K + L - 1, VOCAB)
    for i in range(n):
        # The logits at a position are of the token after it.
        expected = sum(log_p[i, t - 1, sequences[i, t]].item() for t in range(k, K + L))
        assert found[i].item() == pytest.approx(expected, rel=1e-4)


def test_ties_go_to_the_same_token() -> None:
    model = random_model(1)
    with torch.no_grad():  # two tokens with one and the same logit, always
        model.lm_head.weight[7] = model.lm_head.weight[3] = model.lm_head.weight.abs().max(0).values
    sequences = mixed_sequences(model, 16, 5)
    assert torch.equal(memorize.greedy_matches(model, sequences, K)[0],
                       plain_matches(model, sequences, K))


@pytest.mark.parametrize("k, n", [(1, 3), (K + L - 1, 4), (K, 1)])
def test_shortest_prompt_shortest_continuation_and_one_sequence(k: int, n: int) -> None:
    model = random_model(2)
    sequences = mixed_sequences(model, n, 3)
    assert torch.equal(memorize.greedy_matches(model, sequences, k)[0],
                       plain_matches(model, sequences, k))


def test_an_overfitted_model_scores_one_on_its_sequences_and_chance_on_others() -> None:
    random = torch.Generator().manual_seed(0)
    known, other = (torch.randint(VOCAB, (6, K + L), generator=random) for _ in "ab")
    model = random_model(0, 0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss, _ = model(known[:, :-1], known[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    matches, log_p = memorize.greedy_matches(model, known, K)
    assert matches.all() and log_p.min() > L * np.log(0.9)
    matches, log_p = memorize.greedy_matches(model, other, K)
    assert matches.float().mean() < 0.25 and log_p.max() < L * np.log(0.5)


def test_losses_are_the_model_s_own_sequence_by_sequence() -> None:
    model, random = random_model(3), np.random.default_rng(0)
    token_ids = random.integers(VOCAB, size=(7, K + L + 1)).astype(np.uint16)  # as on the disk
    found = memorize.sequence_losses(model, token_ids, batch=3)
    assert found.shape == (7,) and np.ptp(found) > 0.1
    for ids, loss in zip(torch.from_numpy(token_ids.astype(np.int64)), found):
        log_p = model(ids[None, :-1])[0].log_softmax(-1)  # (T, V)
        assert loss == pytest.approx(-log_p.gather(1, ids[1:, None]).mean().item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------
# statistics


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
        cells.append([{"matches": m, "suffix_log_p": -9 * x, "loss": x}
                      for m, x in zip(matches, losses)])
    return memorize.make_grid(cells, L)


def latest_and_earlier(grid: memorize.Grid, age: np.ndarray) -> dict[str, dict[str, float]]:
    return memorize.effects(grid, {"latest": age == 0, "earlier": age > 0})


def test_a_grid_holds_what_was_measured() -> None:
    cell = {"matches": [0, 3, L], "suffix_log_p": [-9.0, -5.0, -1.0], "loss": [3.0, 2.0, 1.0]}
    grid = memorize.make_grid([[cell], [cell]], L)
    figures = memorize.average(grid, np.array([[False, True]]))
    assert figures["sequences"] == 3 and figures["extractible"] == pytest.approx(1 / 3)
    assert figures["score"] == pytest.approx((3 / L + 1) / 3)
    assert (figures["loss"], figures["suffix_log_p"]) == (2, -5)
    part = memorize.select(grid, [np.array([True, True, False])] * 2)
    assert memorize.average(part, np.array([[True, True]]))["loss"] == 2.5


def test_standard_errors_against_a_simulation() -> None:
    random, n = np.random.default_rng(0), 200
    chance = np.array([0.5] + [0.45 / L] * (L - 1) + [0.05])
    matches = random.choice(L + 1, (2000, 1, n), p=chance / chance.sum())
    for values in (matches / L, matches == L):
        samples = [memorize.mean_and_stderr([value], memorize.ONLY) for value in values]
        true = np.std([mean for mean, _ in samples])
        assert np.mean([stderr for _, stderr in samples]) == pytest.approx(true, rel=0.06)


def test_effects_and_repeated_sequences_against_a_simulation() -> None:
    random = np.random.default_rng(0)
    age = np.arange(5)[:, None] - np.arange(6)  # the last chunk is never seen
    found: dict[str, list] = {"seen": [], "latest": [], "earlier": []}
    for _ in range(400):
        grid = simulated(random, age, 30)
        found["seen"].append(memorize.average(grid, age >= 0))
        for name, figures in latest_and_earlier(grid, age).items():
            found[name].append(figures)
    for name, truth in (("seen", None), ("latest", 0.05), ("earlier", 0.02)):
        scores = [figures["score"] for figures in found[name]]
        errors = [figures["score_se"] for figures in found[name]]
        assert np.mean(errors) == pytest.approx(np.std(scores), rel=0.1)
        assert truth is None or abs(np.mean(scores) - truth) < 4 * np.std(scores) / 20
    # One sequence shown to all checkpoints is not five.
    once = {key: [chunk[:1] for chunk in values] for key, values in grid.items()}
    alone = memorize.average(once, np.ones((1, 6)))["score_se"]
    assert memorize.average(grid, np.ones((5, 6)))["score_se"] > 0.7 * alone


def test_the_forgetting_curve_is_found_again_within_its_errors() -> None:
    random = np.random.default_rng(2)
    age = np.arange(8)[:, None] - np.arange(9)
    found: dict[str, list] = {}
    for _ in range(200):
        grid = simulated(random, age, 20)
        for name, f in memorize.effects(grid, memorize.age_groups(age)).items():
            found.setdefault(name, []).append((f["loss"], f["loss_se"]))
    assert [*found] == [*"0123456", "7 and more"]
    for name, samples in found.items():
        effect, stderr = np.transpose(samples)
        assert abs(effect.mean() + 0.2 * 0.5 ** int(name[0])) < 4 * effect.std() / 200 ** 0.5
        assert stderr.mean() == pytest.approx(effect.std(), rel=0.15)


@pytest.mark.parametrize("key, names", [
    ("score", ("latest", "earlier")), ("loss", (*"0123456", "7 and more"))])
def test_effects_are_those_of_least_squares_with_a_column_for_every_level(
        key: str, names: tuple[str, ...]) -> None:
    age = np.arange(9)[:, None] - np.arange(10)
    grid = simulated(np.random.default_rng(1), age, 9)
    means = np.stack([values.mean(1) for values in grid[key]], axis=1)  # (C, N)
    every = memorize.age_groups(age) | {"latest": age == 0, "earlier": age > 0}
    columns = {name: every[name] for name in names}
    checkpoint, chunk = np.indices(age.shape)
    levels = [checkpoint == c for c in range(9)] + [chunk == i for i in range(10)]
    design = np.stack([c.ravel() for c in [*levels, *columns.values()]], axis=1)
    solution = np.linalg.lstsq(design.astype(float), means.ravel(), rcond=None)[0]
    found = memorize.effects(grid, columns)
    assert [found[name][key] for name in names] == pytest.approx(solution[-len(names):])


def test_effects_that_a_grid_cannot_tell_are_not_given() -> None:
    def told(age: list[list[int]]) -> set[str]:
        cells = np.array(age)
        return {*latest_and_earlier(simulated(np.random.default_rng(0), cells, 9), cells)}

    assert told([[0]]) == told([[2, 1, 0]]) == told([[1], [0]]) == told([[1, 2], [3, 4]]) == set()
    assert told([[0, -1], [1, 0]]) == set()  # 4 cells, 3 levels, 2 effects
    assert told([[1, -1], [3, 1]]) == {"earlier"}  # no chunk is the latest
    assert told([[0, -1, -2], [1, 0, -1], [2, 1, 0]]) == {"latest", "earlier"}


def test_membership_is_the_share_of_pairs_in_order_within_each_checkpoint() -> None:
    random = np.random.default_rng(0)
    age = np.array([[1, 0, -1, -2], [2, 1, 0, -1], [3, 2, 1, 0]])  # the last has nothing unseen
    losses = [random.integers(9, size=(3, n)) / 4 for n in (7, 1, 0, 5)]  # with many ties
    found = memorize.membership(losses, age)
    assert [*found] == ["0", "1", "2"]
    for a in (0, 1, 2):
        by_checkpoint = []
        for c in (0, 1):
            members, others = ([x for i in range(4) if chosen[c, i] for x in losses[i][c]]
                               for chosen in (age == a, age < 0))
            pairs = [(x < y) + (x == y) / 2 for x in members for y in others]
            by_checkpoint += [np.mean(pairs)] if pairs else []
        assert found[str(a)]["auc"] == pytest.approx(np.mean(by_checkpoint))


def test_standard_errors_of_membership_against_a_simulation() -> None:
    random = np.random.default_rng(0)
    age = np.arange(3)[:, None] - np.arange(4)
    samples = []
    for _ in range(500):
        grid = simulated(random, age, 25)
        samples.append(memorize.membership(grid["loss"], age)["0"])
    auc = [sample["auc"] for sample in samples]
    assert 0.52 < np.mean(auc) < 0.7
    assert np.mean([sample["auc_se"] for sample in samples]) == pytest.approx(np.std(auc), rel=0.1)


def test_correlations_of_checkpoints_that_know_everything_are_none() -> None:
    assert memorize.correlations(np.array([[1, 1, 1], [0, 1, 2], [4, 2, 0]])) == [
        [None, None, None], [None, 1.0, -1.0], [None, -1.0, 1.0]]


def test_the_heat_map_of_many_chunks_fits_a_terminal() -> None:
    score = np.arange(720).reshape(2, 360) / 1000
    lines = memorize.heat_map({
        "checkpoints": ["ckpt_100", "a_very_long_name"], "chunks": [*range(360)],
        "ages": (np.array([[100], [359]]) - np.arange(360)).tolist()}, 100 * score, 1)
    assert max(map(len, lines)) < 90 and "36-" in lines[0]
    assert "  1.8    5.3    8.9 |" in lines[1] and lines[2].endswith("█|")


def test_the_map_of_losses_shows_what_was_seen_last() -> None:
    age = np.arange(6)[:, None] - np.arange(6)
    grid = simulated(np.random.default_rng(0), age, 400)
    loss = np.stack([chunk.mean(1) for chunk in grid["loss"]], axis=1)
    summary = {"checkpoints": [*"abcdef"], "chunks": [*range(6)], "ages": age.tolist()}
    lines = memorize.heat_map(summary, -memorize.double_center(loss), 2)[1:]
    assert all(line.count("|") == 1 for line in lines)
    assert all(line[line.index("|") - 1] in "▓█" for line in lines)
    assert sum(line.count("▓") + line.count("█") for line in lines) < 10


def test_evenly_spaced_with_the_last() -> None:
    assert memorize.evenly(list(range(360)), 10) == [35, 71, 107, 143, 179, 215, 251, 287, 323, 359]
    assert memorize.evenly([1, 2, 3], 10) == [1, 2, 3]


# ---------------------------------------------------------------------------------------------
# the command


def test_the_grid_is_measured_once_and_survives_a_kill(
        home: Path, straight: Path, tmp_path: Path,  # noqa: F811
        capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    grid = {"sequences": 20, "k": 6, "l": 10, "batch": 7}
    memorize.main(argv(home, run, **grid))
    lines = run / "memorization.jsonl"
    first = lines.read_text()
    assert first.count("\n") == 9 and "a line per checkpoint" in capsys.readouterr().out
    # The batch changes nothing, and a line cut by a kill is measured again.
    lines.write_text(first[: len(first) * 2 // 3])
    memorize.main(argv(home, run, **(grid | {"batch": 20})))
    again = {json.dumps(record["of"]): record for record in read_records(lines)}
    assert len(again) == 9
    for line in first.splitlines():
        record = json.loads(line)
        result, other = record.pop("result"), again[json.dumps(record["of"])].pop("result")
        assert result.pop("matches") == other.pop("matches")
        assert {*result} == {"suffix_log_p", "loss"}
        for key, values in result.items():  # sums of another order
            assert values == pytest.approx(other[key], abs=1e-4)
    # One cell by hand.
    config, _ = load(argv(home, run))
    model = build_for_inference(config)
    load_weights(model, run / "ckpt_001")
    ids, sequences = memorize.draw_sequences(config, load_data(config.data_dir), 2, 20)
    assert len(set(ids)) == 20
    tokens = torch.from_numpy(sequences["token_ids"][:, :16].astype(np.int64))
    expected = plain_matches(model, tokens, 6).sum(1)
    losses = memorize.sequence_losses(model, sequences["token_ids"], 20)
    summary = summary_of(run)
    assert (summary["checkpoints"][1], summary["chunks"][2]) == ("ckpt_001", 2)
    assert summary["cells"][1][2]["score"] == pytest.approx(expected.float().mean().item() / 10)
    assert summary["cells"][1][2]["loss"] == pytest.approx(losses.mean(), abs=1e-4)
    assert summary["ages"] == [[0, -1, -2], [1, 0, -1], [2, 1, 0]]
    assert set(summary["by_age"]) == {"-2", "-1", "0", "1", "2"}
    assert [sum(counts) for counts in summary["histogram"]] == [60, 60, 60]
    assert len(summary["correlation"]["score"]) == 3
    assert {*summary["effects"]} == {"latest", "earlier"}
    assert {*summary["forgetting"]} == {"0", "1", "2"}
    assert {*summary["membership"]} == {"all", "prose", "code"}
    assert {*summary["membership"]["all"]} == {"0", "1"}  # nothing is unseen when one is 2 old


def test_drawn_ids_are_those_of_every_earlier_version(home: Path) -> None:  # noqa: F811
    config, _ = load(argv(home, "unused"))
    ids, sequences = memorize.draw_sequences(config, load_data(config.data_dir), 1, 8)
    expected = np.random.default_rng([11111, 1, 360]).choice(50, 8, replace=False)
    assert ids.tolist() == sorted(expected)
    assert (sequences == load_data(config.data_dir).chunk(1)[ids]).all()


def test_chunks_that_were_left_out_are_unseen_and_chunks_met_again_are_young(
        home: Path) -> None:  # noqa: F811
    data = load_data(home / "data")  # 3 chunks of 6 steps; chunk 1 is left out, 0 comes again
    config, _ = load(argv(home, "unused", skip_chunks="[1]"))
    records = [{"step": step, "checkpoint": "any"} for step in (0, 6, 11, 12, 18)]
    assert memorize.ages(config, data, records, [0, 1, 2]).tolist() == [
        [-1, -2, -3], [0, -1, -2], [0, -1, -2], [2, -1, 0], [0, -1, 1]]


@pytest.mark.parametrize("flags, sentence", [
    ({"k": 30, "l": 30}, r"--k \+ --l = 60 tokens are asked for, but a sequence of .* has 33"),
    ({"chunks": "0,3"}, "there is no chunk '3'; the data has 3, from 0 to 2"),
    ({"chunks": "x"}, "'x'"), ({"sequences": 0}, "--sequences must be more than 0"),
    ({"checkpoints": "8"}, "There is no checkpoint")])
def test_bad_grids_are_refused(home: Path, straight: Path, flags: dict,  # noqa: F811
                               sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        memorize.main(argv(home, straight, **({"k": 6, "l": 10} | flags)))


def test_a_published_directory_scores_as_its_checkpoint(
        home: Path, straight: Path, tmp_path: Path) -> None:  # noqa: F811
    published = published_copy(straight / "ckpt_001", tmp_path / "ckpt_001")
    found = []
    for path in (straight / "ckpt_001", published):
        memorize.main(argv(home, tmp_path / "run", sequences=9, k=6, l=10, checkpoints=path))
        summary = summary_of(tmp_path / "run")
        found.append((summary["by_age"], summary["cells"]))
    assert found[0] == found[1]


def test_chunks_of_released_files_keep_their_numbers(
        home: Path, straight: Path, tmp_path: Path,  # noqa: F811
        capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(home / "data", tmp_path / "data")
    manifest = load_data(home / "data").manifest
    for chunk, name in zip(manifest["chunks"], ("train_002", "train_143", "train_355")):
        chunk["made_from"] = name
    write_json(tmp_path / "data" / "manifest.json", manifest)
    hub = [published_copy(straight / "ckpt_001", tmp_path / name)
           for name in ("ckpt_143", "ckpt_300", "main")]
    where = {"data_dir": tmp_path / "data", "checkpoints": ",".join(map(str, hub))}
    memorize.main(argv(home, tmp_path / "run", sequences=9, k=6, l=10, chunks="143,355", **where))
    summary = summary_of(tmp_path / "run")
    assert summary["checkpoints"] == ["ckpt_143", "ckpt_300", "main"]
    assert summary["ages"] == [[0, -212], [157, -55], [212, 0]]
    assert summary["chunks"] == [143, 355] and "  143    355" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_named_and_left_out(
        home: Path, straight: Path, tmp_path: Path,  # noqa: F811
        capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(straight, tmp_path / "run")
    weights = tmp_path / "run" / "ckpt_002" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    memorize.main(argv(home, tmp_path / "run", sequences=9, k=6, l=10))
    said = capsys.readouterr().out
    assert "ckpt_002: " in said and "model.safetensors" in said
    summary = summary_of(tmp_path / "run")
    assert summary["checkpoints"] == ["ckpt_000", "ckpt_001"] and len(summary["cells"]) == 2


def test_a_full_disk_is_one_sentence_and_loses_nothing(
        home: Path, straight: Path, tmp_path: Path) -> None:  # noqa: F811
    shutil.copytree(straight, tmp_path / "run")
    words = argv(home, tmp_path / "run", sequences=9, k=6, l=10)
    small = 1000  # bytes a file may have: a disk that is full, as the system sees it
    done = subprocess.run(
        [sys.executable, "memorize.py", *words], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (small, small)))
    assert done.returncode == 1 and done.stderr.endswith("memorization.jsonl: File too large.\n")
    assert "Traceback" not in done.stderr
    kept = read_records(tmp_path / "run" / "memorization.jsonl")
    assert kept
    memorize.main(words)
    cells = read_records(tmp_path / "run" / "memorization.jsonl")
    assert cells[: len(kept)] == kept and len(cells) == 9


def test_two_processes_share_the_grid(
        home: Path, straight: Path, tmp_path: Path) -> None:  # noqa: F811
    shutil.copytree(straight, tmp_path / "run")
    words = argv(home, tmp_path / "run", sequences=9, k=6, l=10)
    both = ranks(2, "memorize.py", *words)
    assert [process.wait(60) for process in both] == [0, 0]
    cells = read_records(tmp_path / "run" / "memorization.jsonl")
    together = summary_of(tmp_path / "run")
    assert len(cells) == 9 == len({json.dumps(cell["of"]) for cell in cells})
    (tmp_path / "run" / "memorization.jsonl").unlink()
    memorize.main(words)
    assert summary_of(tmp_path / "run") == together


def test_canaries_are_planted_as_often_as_said_and_found(
        home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    where = {"data_dir": tmp_path / "data", "canaries": "{1:6,2:3,16:6}"}
    prepare_data.main(argv(home, tmp_path / "run", **where))
    data = load_data(tmp_path / "data")
    chunks = np.concatenate([data.chunk(i) for i in range(3)])
    planted = chunks["token_ids"][chunks["source"] == 2]
    assert data.sources[2] == "canary" and len(planted) == 108
    # The same ids as ever: the draws are part of what a seed means.
    random = np.random.default_rng([11111, 0, 64])
    for times, n in ((1, 6), (2, 3), (16, 6)):
        for canary in random.integers(300, size=(n, 33)):
            assert (planted == canary).all(1).sum() == times
    train.main(argv(home, tmp_path / "run", **where))
    memorize.main(argv(home, tmp_path / "run", **where, k=6, l=10, sequences=9))
    found = summary_of(tmp_path / "run")["canaries"]
    assert {times: figures["sequences"] for times, figures in found.items()} == {
        "0": 1023, "1": 6, "2": 3, "16": 6}
    assert "canaries planted 16 x" in capsys.readouterr().out
    # A checkpoint a chunk, so each third is a chunk; two of those planted 16 times are in each.
    config, _ = load(argv(home, tmp_path / "run", **where))
    sequences, times, third = memorize.find_canaries(config, data)
    assert len(sequences) == 1023 + 15 and not times[:1023].any()
    for canary, n, last in [*zip(sequences, times, third)][1023:]:
        here = [i for i in range(3) if (data.chunk(i)["token_ids"] == canary).all(1).any()]
        assert last == here[-1] and n == (planted == canary).all(1).sum()
    assert [found["16"][name]["sequences"] for name in ("early", "middle", "late")] == [2, 2, 2]
    chance = np.log2(1024 / np.arange(1, 1024)).mean()  # 1 / ln 2, nearly
    assert found["0"]["exposure"] == pytest.approx(chance, abs=0.01)


def test_exposure_is_the_rank_among_sequences_never_seen(
        monkeypatch: pytest.MonkeyPatch) -> None:
    times, third = np.zeros(1026, int), np.zeros(1026, int)
    times[1023:], third[1023:] = (4, 4, 1), (0, 2, 1)
    monkeypatch.setattr(memorize, "find_canaries", lambda *_: (None, times, third))
    losses = [*np.linspace(5, 6, 1023), 4.9, 5.2503, 7.0]  # below all; a quarter below it; the last
    result = {"matches": [0] * 1026, "suffix_log_p": [0.0] * 1026, "loss": losses}
    found = memorize.describe_canaries(None, None, result, L)
    assert found["4"]["early"]["exposure"] == 10 and found["1"]["exposure"] == 0
    assert found["4"]["late"]["exposure"] == pytest.approx(2, abs=0.01)
    assert found["4"]["exposure"] == pytest.approx(6, abs=0.01) and "middle" not in found["4"]
