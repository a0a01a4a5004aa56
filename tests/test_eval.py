"""The same numbers as lm-evaluation-harness; nothing measured twice, nothing lost."""

import csv
import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from helpers import sentences
from launch import ranks
from test_train import argv, damage, home, straight  # noqa: F401
from test_train import run as train_run

import checkpoint as ckpt
import eval as evaluation
import memorize
import prepare_data
import train
from configs import UserError, load
from data import load_data, sha256_json, write_json
from model import build_for_inference, continue_text
from tools import bands, check, compare, report
from tools.page import Panel, curve_figures, smooth

# A window that the longest prompts of the tasks below exceed and the others do not.
CONFIG = """
hidden_size, intermediate_size, num_hidden_layers, num_attention_heads = 32, 64, 2, 2
vocab_size, seq_len, n_chunks, valid_sequences, initializer_range = 400, 512, 1, 4, 0.2
global_batch_size, micro_batch_size, eval_sequences, sample_tokens = 2, 2, 4, 4
dtype, threads, workers = "float32", 1, 1
"""


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_tasks(root: Path) -> None:
    """Small files of every benchmark, in the data sets' own form, some rows awkward on purpose."""
    draw = random.Random(7)
    text = sentences(1, 400).split()
    odd = ["naïve", "東京", "[header] x", "a  b", "é", "-", "[title] y"]

    def some(a: int, b: int) -> str:
        return " ".join(draw.choice(odd if draw.random() < 0.1 else text)
                        for _ in range(draw.randint(a, b)))

    def arc(n: int) -> list[dict[str, Any]]:
        rows = []
        for i in range(n):
            labels = ["ABCDE"[:k] if i % 3 else "12345"[:k] for k in [draw.choice([3, 4, 4, 5])]][0]
            rows.append({"id": str(i), "question": some(2, 14) + "?" + " " * (i == 3),
                         "choices": {"text": [some(1, 5) for _ in labels], "label": list(labels)},
                         "answerKey": draw.choice(labels)})
        return rows

    write(root / "arc_challenge/train.jsonl", arc(40))
    write(root / "arc_challenge/test.jsonl", arc(20))
    for split, n in (("train", 17), ("validation", 20)):
        rows = [{"ind": i, "activity_label": some(1, 2), "ctx_a": some(3, 9) + ".",
                 "ctx_b": some(1, 3), "ctx": "", "endings": [some(2, 8) for _ in range(4)],
                 "label": str(draw.randrange(4))} for i in range(n)]
        write(root / f"hellaswag/{split}.jsonl", rows)
    # a question that is among the examples, twice: neither may be shown to it
    copies = [rows[2], rows[2], *rows[5:9], *rows[9:20]]
    write(root / "hellaswag/train.jsonl", copies)
    for subject in ("abstract_algebra", "us_foreign_policy"):
        for split, n in (("dev", 5), ("test", 14)):
            write(root / f"mmlu/{subject}/{split}.jsonl", [
                {"question": some(4, 40) + "\n", "subject": subject, "answer": draw.randrange(4),
                 "choices": [some(1, 3) for _ in range(4)]} for _ in range(n)])
    targets = lambda n, right: {"choices": [some(1, 9) for _ in range(n)],  # noqa: E731
                                "labels": [1] * right + [0] * (n - right)}
    write(root / "truthfulqa/validation.jsonl", [
        {"question": some(3, 9) + "?", "mc1_targets": targets(draw.randint(3, 6), 1),
         "mc2_targets": targets(6, draw.randint(1, 4))} for _ in range(14)])
    write(root / "piqa/validation.jsonl", [
        {"goal": some(2, 9), "sol1": some(3, 9), "sol2": some(3, 9), "label": draw.randrange(2)}
        for _ in range(14)])
    write(root / "winogrande/validation.jsonl", [
        {"sentence": f"{some(2, 5)} _ {some(2, 6)}." if i else "_ was here.", "option1": some(1, 1),
         "option2": some(1, 2), "answer": draw.choice("12")} for i in range(14)])
    write(root / "boolq/validation.jsonl", [
        {"question": some(3, 7), "passage": some(5, 300), "idx": i, "label": draw.randrange(2)}
        for i in range(14)])
    write(root / "openbookqa/test.jsonl", [
        {"id": str(i), "question_stem": some(2, 9), "answerKey": draw.choice("ABCD"),
         "choices": {"text": [some(1, 4) for _ in range(4)], "label": list("ABCD")}}
        for i in range(14)])


@pytest.fixture(scope="module")
def quiz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, its data, a run of one checkpoint, and all tasks."""
    folder = tmp_path_factory.mktemp("quiz")
    write(folder / "text.jsonl", [{"text": sentences(i, 60)} for i in range(20)])
    (folder / "quiz.py").write_text(CONFIG + "\n".join(
        f"{key} = {value!r}" for key, value in {
            "sources": {"text": str(folder / "text.jsonl")}, "data_dir": str(folder / "data"),
            "run_dir": str(folder / "run"), "task_dir": str(folder / "tasks")}.items()))
    prepare_data.main([str(folder / "quiz.py")])
    train.main([str(folder / "quiz.py")])
    write_tasks(folder / "tasks")
    return folder


HARNESS = {  # our task: its yaml, the folder of its files, their splits
    "arc_challenge": ("arc/arc_challenge.yaml", "arc_challenge", ("train", "test")),
    "hellaswag": ("hellaswag/hellaswag.yaml", "hellaswag", ("train", "validation")),
    "mmlu/abstract_algebra": ("mmlu/default/mmlu_abstract_algebra.yaml", "mmlu/abstract_algebra",
                              ("dev", "test")),
    "mmlu/us_foreign_policy": ("mmlu/default/mmlu_us_foreign_policy.yaml",
                               "mmlu/us_foreign_policy", ("dev", "test")),
    "truthfulqa_mc1": ("truthfulqa/truthfulqa_mc1.yaml", "truthfulqa", ("validation",)),
    "truthfulqa_mc2": ("truthfulqa/truthfulqa_mc2.yaml", "truthfulqa", ("validation",)),
    "piqa": ("piqa/piqa.yaml", "piqa", ("validation",)),
    "winogrande": ("winogrande/default.yaml", "winogrande", ("validation",)),
    "boolq": ("super_glue/boolq/default.yaml", "boolq", ("validation",)),
    "openbookqa": ("openbookqa/openbookqa.yaml", "openbookqa", ("test",)),
}


def harness_task(name: str, root: Path) -> Any:
    """A task of the harness as it is, but for where its files are and the splits we wrote."""
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml
    file, folder, splits = HARNESS[name]
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / file)
    for kind in ("training", "validation", "test"):
        if config.get(f"{kind}_split") not in splits:
            config.pop(f"{kind}_split", None)
    files = {split: str(root / folder / f"{split}.jsonl") for split in splits}
    config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {
        "data_files": files, "cache_dir": str(root / "cache")}}
    task = ConfigurableTask(config=config)
    task.set_config("num_fewshot", evaluation.TASKS[name.split("/")[0]].num_fewshot)
    task.set_fewshot_seed(1234)  # simple_evaluate's default
    return task


@pytest.fixture(scope="module")
def measured(quiz: Path) -> list[dict[str, Any]]:
    """Our results of the run's checkpoint, in everything there is."""
    evaluation.main([str(quiz / "quiz.py"), "--tokens=2"])
    return ckpt.read_records(quiz / "run/eval.jsonl")


def test_the_same_numbers_as_the_harness(quiz: Path, measured: list) -> None:
    for package in ("lm_eval", "transformers"):
        pytest.importorskip(package)
    from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    config, _ = load([str(quiz / "quiz.py")])
    data = load_data(config.data_dir)
    net = build_for_inference(config)
    ckpt.load_weights(net, quiz / "run/ckpt_000")
    tasks = {name: harness_task(name, quiz / "tasks") for name in HARNESS}
    # The checkpoint directory is a Hugging Face model with its tokenizer: the harness opens it.
    lm = HFLM(pretrained=str(quiz / "run/ckpt_000"), device="cpu", dtype="float32", batch_size=16)
    theirs = evaluate(lm, {t.config.task: t for t in tasks.values()}, bootstrap_iters=0)
    ours = {r["evaluation"]: r["result"] for r in measured}
    assert {*ours} == {*HARNESS, "continuation", "recall", "validation"}
    cut = 0
    for name, task in tasks.items():
        entry = evaluation.TASKS[name.split("/")[0]]
        asked = evaluation.build_questions(config, data, name)
        samples = sorted(theirs["samples"][task.config.task], key=lambda s: s["doc_id"])
        assert len(asked) == len(samples)
        # question by question, choice by choice, for every way of batching
        for batch in (3, 64):
            for mine, sample in zip(evaluation.log_likelihoods(
                    net, [q.requests for q in asked], batch), samples):
                expected = [float(ll) for ll, _ in sample["filtered_resps"]]
                np.testing.assert_allclose(mine, expected, rtol=2e-6, atol=2e-5)
        cut += sum(len(ids) == config.seq_len + 1 for q in asked for ids, _ in q.requests)
        scores = theirs["results"][task.config.task]
        metrics = {"acc": "acc", entry.metric: entry.metric}
        metrics = {"mc2": "acc"} if entry.metric == "mc2" else metrics
        for our_name, their_name in metrics.items():
            assert ours[name][our_name] == pytest.approx(scores[f"{their_name},none"], abs=1e-6)
            deviation = np.std([s[their_name] for s in samples], ddof=1) / len(samples) ** 0.5
            assert ours[name][f"{our_name}_se"] == pytest.approx(deviation, abs=1e-6)
    assert cut > 20  # prompts longer than the window were among them
    parts = [ours[name] for name in ours if name.startswith("mmlu/")]
    row = evaluation.by_checkpoint(measured)[0]["tasks"]["mmlu"]
    sizes = [p["n"] for p in parts]
    assert row["acc"] == pytest.approx(
        aggregate_subtask_metrics([p["acc"] for p in parts], sizes), abs=1e-9)
    assert row["acc_se"] == pytest.approx(
        pooled_sample_stderr([p["acc_se"] for p in parts], sizes), abs=1e-9)


def test_each_checkpoint_is_measured_once(home: Path, straight: Path, tmp_path: Path,  # noqa: F811
                                          capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    evaluation.main(argv(home, run, checkpoints="0,2"))
    first = (run / "eval.jsonl").read_text().splitlines()
    (run / "eval.jsonl").write_text("\n".join(first[:3]) + '\n{"checkpoint": "ckpt_0')  # killed
    evaluation.main(argv(home, run))
    text = capsys.readouterr().out
    results = ckpt.read_records(run / "eval.jsonl")
    names = [(r["checkpoint"], r["evaluation"]) for r in results]
    assert len(names) == len(set(names)) == 9  # 3 checkpoints, validation and our own two
    assert text.count("validation prose: loss") == 2 and "continuation: acc" in text
    held = [r["result"] for r in results if r["evaluation"] == "validation"]
    last = ckpt.read_records(straight / "metrics.jsonl")[-1]["valid"]["prose"]["loss"]
    assert any(r["prose"]["loss"] == pytest.approx(last, rel=1e-5) for r in held)
    with pytest.raises(UserError, match="There is no checkpoint .*ckpt_007; .* has: ckpt_000"):
        evaluation.main(argv(home, run, checkpoints=7))
    damage(run / "ckpt_001/model.safetensors", "flipped")
    (run / "eval.jsonl").unlink()
    evaluation.main(argv(home, run))
    text = capsys.readouterr().out
    assert "ckpt_001: model.safetensors is damaged" in text
    assert len(ckpt.read_records(run / "eval.jsonl")) == 6


# ---- scores


def by_hand(net: Any, ids: list[int], n: int) -> float:
    """log p of the last n ids, one row alone, in one pass."""
    with torch.no_grad():
        log_p = net(torch.tensor([ids[:-1]])).log_softmax(-1)[0]
    return sum(float(log_p[i - 1, ids[i]]) for i in range(len(ids) - n, len(ids)))


@pytest.fixture(scope="module")
def net(home: Path, straight: Path) -> Any:  # noqa: F811
    config, _ = load(argv(home, straight))
    net = build_for_inference(config)
    ckpt.load_weights(net, straight / "ckpt_002")
    return net


@pytest.mark.parametrize("batch", [1, 3, 50])
@pytest.mark.parametrize("spared", [0.0, 0.1, 9.0])
def test_sharing_changes_no_score(net: Any, batch: int, spared: float,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "MIN_SHARED", spared)
    monkeypatch.setattr(net.config, "logit_scale", 3.0)  # as Crystal has one
    draw = np.random.default_rng(0)
    ids = lambda n: draw.integers(300, size=n).astype(np.int32)  # noqa: E731
    common, asked = ids(5), []
    for kind in range(12):
        context = np.concatenate([common[: kind % 6], ids(1 + kind % 7)])
        word = ids(2)  # choices that begin alike share more than their context
        choices = [np.append(word[: kind % 3], ids(1 + k * (kind % 2)))
                   for k in range(1 + kind % 4)]
        asked.append([evaluation.Request(np.append(context, c), len(c)) for c in choices])
    for requests, found in zip(asked, evaluation.log_likelihoods(net, asked, batch)):
        expected = [by_hand(net, r.ids.tolist(), r.n) for r in requests]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 12, 13, 40])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_windows_score_every_token_once_with_all_the_context_there_is(length: int,
                                                                      stride: int) -> None:
    seen = []
    for ids, n in evaluation.windows(np.arange(length + 1), 8, stride):
        assert len(ids) <= 9
        for target in ids[-n:]:
            seen.append(int(target))
            assert target - ids[0] >= min(target, 8 - stride + 1)
    assert seen == list(range(1, length + 1))


def test_text_of_a_file(home: Path, straight: Path, net: Any, tmp_path: Path,  # noqa: F811
                        capsys: pytest.CaptureFixture) -> None:
    file, text = tmp_path / "some text.txt", sentences(5, 6) + " é 東"
    data, window = load_data(net.config.data_dir), net.config.seq_len
    file.write_text(text, encoding="utf-8")
    ids = [data.tokenizer.eos_id, *data.tokenizer.encode(text).tolist()]
    nats = 0.0
    for i in range(1, len(ids)):  # stride 1: each token after a whole window
        nats -= by_hand(net, ids[max(0, i - window) : i + 1], 1)
    for batch in (1, 7):
        found = evaluation.measure_text(net, data.tokenizer, [text], 1, window, batch)
        assert found["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
        assert found["bits_per_byte"] == pytest.approx(nats / np.log(2) / len(text.encode()))
        assert found["tokens"] == len(ids) - 1
    run = shutil.copytree(straight, tmp_path / "run")
    evaluation.main(argv(home, run, text=file, checkpoints="0,2"))
    assert "some text.txt: loss" in capsys.readouterr().out
    assert len(ckpt.read_records(run / "eval.jsonl")) == 2
    for content, words_of_it in ((b"", "no text"), (b"a\0b", "no text")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=words_of_it):
            evaluation.main(argv(home, run, text=file))
    with pytest.raises(FileNotFoundError):  # of which configs.run_command makes a sentence
        evaluation.main(argv(home, run, text=tmp_path / "none.txt"))
    with pytest.raises(UserError, match="stride=99 is more than the window, 32"):
        evaluation.main(argv(home, run, text=file, stride=99))


def test_synthetic_questions_are_what_they_say(quiz: Path) -> None:
    data = load_data(load([str(quiz / "quiz.py")])[0].data_dir)
    ids = data.validation("text")["token_ids"].astype(int)
    for i, q in enumerate(evaluation.synthetic_questions(data, "continuation")):
        right = q.requests[int(q.gold.argmax())].ids
        assert right.tolist() == ids[i, :64].tolist() and q.gold.argmax() == i % 4
        assert sum(request.ids.tolist() == right.tolist() for request in q.requests) == 1
    for i, q in enumerate(evaluation.synthetic_questions(data, "recall")):
        right = q.requests[int(q.gold.argmax())].ids
        assert right.tolist() == [*ids[i, :64], *ids[i, :16]] and q.requests[0].n == 8


def test_parquet_is_read_as_jsonl_is(quiz: Path, tmp_path: Path) -> None:
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    config = load([str(quiz / "quiz.py")])[0]
    data, other = load_data(config.data_dir), load([
        str(quiz / "quiz.py"), f"--task_dir={tmp_path}"])[0]
    docs = evaluation.read_docs([quiz / "tasks/openbookqa/test.jsonl"])
    (tmp_path / "openbookqa").mkdir()
    pq.write_table(pa.Table.from_pylist(docs),
                   tmp_path / "openbookqa/test-00000-of-00001.parquet")
    for a, b in zip(evaluation.build_questions(config, data, "openbookqa"),
                    evaluation.build_questions(other, data, "openbookqa")):
        assert all(np.array_equal(x, y) for (x, _), (y, _) in zip(a.requests, b.requests))


@pytest.mark.parametrize("task, file, content, sentence", [
    ("piqa", "piqa/validation.jsonl", None, r"piqa has no validation.jsonl and no validation"
     r"\*.parquet: .* huggingface.co/datasets/baber/piqa"),
    ("piqa", "piqa/validation.jsonl", "", "has 0 questions"),
    ("piqa", "piqa/validation.jsonl", '{"goal": "x"}\n', "after 0 questions: an entry is not in the"
     " form of huggingface.co/datasets/baber/piqa"),
    ("piqa", "piqa/validation.jsonl", '{"goal": ', "cannot be read"),
    ("mmlu", "mmlu/abstract_algebra/dev.jsonl", '{"a": 1}\n',
     "14 questions, and 1 entries to draw 5 examples from: too few"),
])
def test_files_that_are_not_as_they_should_be(quiz: Path, tmp_path: Path, task: str, file: str,
                                              content: str | None, sentence: str) -> None:
    tasks = shutil.copytree(quiz / "tasks", tmp_path / "tasks")
    (tasks / file).unlink()
    if content is not None:
        (tasks / file).write_text(content)
    with pytest.raises(UserError, match=sentence):
        evaluation.main([str(quiz / "quiz.py"), f"--tasks={task}", f"--task_dir={tasks}"])


def test_wrong_names_and_sizes(quiz: Path, tmp_path: Path) -> None:
    config = str(quiz / "quiz.py")
    for setting, sentence in (
            ("--tasks=hellaswag,mmmlu", "there is no 'mmmlu'; there are continuation, recall, arc"),
            ("--vocab_size=300", "has 400 token ids, the model of this config 300"),
            ("--vocab_size=500", "vocab_size is 400 there, 500 here"),
            ("--batch=0", "batch must be more than 0"),
            ("--published=none.csv", "none.csv' cannot be read"),
            (f"--run_dir={tmp_path}/none", "has no checkpoint yet")):
        with pytest.raises(UserError, match=sentence):
            evaluation.main([config, "--tokens=1", setting])
    with pytest.raises(UserError, match="mmlu/abstract_algebra has no test.jsonl"):
        evaluation.main([config, "--tasks=mmlu", f"--task_dir={tmp_path}"])


# ---- many checkpoints, many processes, a run that is going on


def test_processes_share_the_work(home: Path, straight: Path, tmp_path: Path) -> None:  # noqa: F811
    alone = shutil.copytree(straight, tmp_path / "alone")
    evaluation.main(argv(home, alone, checkpoints="0,2"))
    together = shutil.copytree(straight, tmp_path / "together")
    four = ranks(4, "eval.py", *argv(home, together, checkpoints="0,2"), OMP_NUM_THREADS=1)
    texts = [process.communicate(timeout=120)[0] for process in four]
    assert [process.returncode for process in four] == [0] * 4, texts
    assert "".join(texts).count("validation prose: loss") == 1
    a, b = ({json.dumps(r["of"]): r["result"] for r in ckpt.read_records(p / "eval.jsonl")}
            for p in (alone, together))
    assert a == b and len(ckpt.read_records(together / "eval.jsonl")) == len(a)


def test_watch_follows_a_run(home: Path, straight: Path, tmp_path: Path,  # noqa: F811
                             monkeypatch: pytest.MonkeyPatch) -> None:
    run, waiting = tmp_path / "run", ["ckpt_000", "ckpt_001", "ckpt_002"]
    seen: list[int] = []

    def sleep(_: float) -> None:  # the run saves a checkpoint between two looks
        shutil.copytree(straight / waiting[0], run / waiting[0])
        seen.append(len(ckpt.read_records(run / "eval.jsonl")))
        waiting.pop(0)

    monkeypatch.setattr(evaluation.time, "sleep", sleep)
    evaluation.main(argv(home, run, watch=True))
    assert seen == [0, 3, 6] and len(ckpt.read_records(run / "eval.jsonl")) == 9
    evaluation.main(argv(home, run, watch=True))  # over: nothing to wait for

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation.time, "sleep", stop)
    shutil.rmtree(run / "ckpt_002")
    with pytest.raises(KeyboardInterrupt):
        evaluation.main(argv(home, run, watch=True))


# ---- what is printed, and drawn


def html_of(path: Path) -> ElementTree.Element:
    """A page that is well-formed, and asks for nothing from anywhere and runs nothing."""
    text = path.read_text(encoding="utf-8")
    page = ElementTree.fromstring(text.removeprefix("<!doctype html>"))
    for element in page.iter():
        assert element.tag.rpartition("}")[2] not in ("script", "link", "iframe", "img")
        for key, value in element.attrib.items():
            assert not key.startswith("on")
            if key.rpartition("}")[2] in ("href", "src"):
                assert value.startswith(("#", "data:image/png;base64,")), value
    return page


def test_compare(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    paths = []
    for rate in ("1e-2", "1e-3"):
        for seed in (1, 2):
            paths.append(str(tmp_path / f"rate_{rate}_{seed}"))
            train.main(argv(home, paths[-1], learning_rate=rate, seed=seed, max_steps=8))
    capsys.readouterr()
    compare.main(paths)
    text = capsys.readouterr().out
    assert "learning_rate" in text and "hidden_size" not in text and "run_dir" not in text
    assert "rate_1e-2_1  rate_1e-2_2  rate_1e-3_1" in text
    rows = [line.split() for line in text.splitlines() if line.strip().startswith("learning_rate ")]
    assert len(rows[0]) == 5 and [row[1:3] for row in rows[1:3]] == [["0.01", "2"], ["0.001", "2"]]
    losses = [ckpt.read_records(Path(p) / "metrics.jsonl")[-1]["valid"] for p in paths[:2]]
    both = [np.mean([v["loss"] for v in valid.values()]) for valid in losses]
    assert f"{np.mean(both):.3f} ± {np.std(both, ddof=1):.3f}" in text
    assert "validation loss" in text and "FLOPs" in text
    # Seed by seed: what the seed does to both of a pair is not in the error.
    valid = [ckpt.read_records(Path(p) / "metrics.jsonl")[-1]["valid"]["prose"] for p in paths]
    a, b, c, d = (v["bits_per_byte"] for v in valid)
    mean, error = np.mean([c - a, d - b]), np.std([c - a, d - b], ddof=1) / math.sqrt(2)
    [line] = [line for line in text.splitlines() if " prose  " in line and "0.001 - " in line]
    assert f"  2  {mean:+.3f} ± {error:.3f}  " in line
    table = list(csv.reader((tmp_path / "compare.csv").open()))
    assert len(table) == 5 and "learning_rate" in table[0] and "0.001" in table[3]
    html_of(tmp_path / "compare.html")
    train.main(argv(home, tmp_path / "longer", max_steps=12))
    capsys.readouterr()
    compare.main([paths[0], str(tmp_path / "longer")])
    assert "All are compared at 2,048 tokens" in capsys.readouterr().out
    assert compare.judge([0.3, 0.31, 0.29]) == ("+0.300 ± 0.006", "more than chance")
    assert compare.judge([0.1, -0.06])[1] == "nothing yet: more seeds would decide, about 124"
    assert compare.judge([0.1])[1].startswith("one pair has no error")
    # Runs of other data are neither repetitions nor a pair.
    for path in ckpt.list_checkpoints(paths[1]):
        manifest = ckpt.read_manifest(path) | {"data_sha256": "0" * 64}
        write_json(path / "manifest.json", manifest | {"sha256": sha256_json(manifest)})
    compare.main(paths)
    text = capsys.readouterr().out
    assert "no difference is taken" in text
    assert "seed by seed: mean" not in text
    spread = text[text.index("mean ± standard deviation") :].splitlines()
    assert [line.split()[4] for line in spread if "data 000000000000" in line] == ["1"]
    with pytest.raises(UserError, match="two or more"):
        compare.main([paths[0]])
    with pytest.raises(UserError, match="nowhere is not the directory of a run"):
        compare.main([paths[0], str(tmp_path / "nowhere")])


def test_pictures_of_a_run(quiz: Path, measured: list, tmp_path: Path,
                           monkeypatch: pytest.MonkeyPatch) -> None:
    loss, text, tasks = report.curve_panels(quiz / "run")
    steps = ckpt.read_records(quiz / "run/metrics.jsonl")
    assert loss.curves == {"text": [
        (r["tokens"], r["loss_by_source"]["text"]) for r in steps]}
    entry = evaluation.by_checkpoint(measured)[0]
    assert text.curves == {"validation text": [
        (entry["tokens"], entry["text"]["validation text"]["bits_per_byte"])]}
    assert tasks.curves["piqa"] == [(entry["tokens"], entry["tasks"]["piqa"]["acc_norm"])]
    assert smooth([(x, 2 * x) for x in range(86)])[:2] == [(0.5, 1.0), (2.5, 5.0)]
    with pytest.raises(UserError, match="is not the directory of a run"):
        report.main([str(tmp_path)])
    pytest.importorskip("matplotlib")
    config = str(quiz / "quiz.py")
    page = html_of(report.write_report(load([config])[0]))
    assert [h.text for h in page.iter("h2")] == [
        "Metrics and analyses", "Checkpoints", "Data, in its order", "Code and configuration"]
    assert sum(e.tag.endswith("}svg") for e in page.iter()) == 3
    said = "".join(page.itertext())
    assert "This run has not been audited" in said and "has not been measured" in said
    # What stands in the files of a run is a stranger's: it stays text.
    log = quiz / "run/train.log"
    before = log.read_text() if log.exists() else ""
    log.write_text(before + "step 7/9\nsample: '<img src=x onerror=alert(1)>\\x00'\n")
    page = html_of(report.write_report(load([config])[0]))
    assert any("<img src=x" in (pre.text or "") for pre in page.iter("pre"))
    odd = curve_figures([Panel("$\\foo{$", "x", {"<b>\x00$_$": [(0, 1), (1, 2)]})])
    assert "".join(ElementTree.fromstring(odd).itertext()).count("<b>\ufffd$_$") == 1
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    with pytest.raises(UserError, match="pip install matplotlib"):
        report.main([str(quiz / "run")])


def test_a_run_is_drawn_with_those_it_goes_on_from(
        home: Path, straight: Path, tmp_path: Path) -> None:  # noqa: F811
    first = shutil.copytree(straight, tmp_path / "first")
    second = train_run(home, tmp_path / "second", init_from=first / "ckpt_002", max_steps=6)
    runs = report.parent_runs(second)
    assert runs == [(first, 0), (second, 18 * 8 * 32)]
    for directory in (first, second):
        evaluation.main(argv(home, directory, tasks="recall", checkpoints="0"))
    prose = next(panel for panel in report.stage_panels(runs) if panel.title == "prose")
    assert [x for points in prose.curves.values() for x, _ in points] == [1536, 4608 + 1536]
    # An evaluation of one checkpoint adds to the picture, and takes nothing from it.
    evaluation.main(argv(home, first, tasks="recall", checkpoints="last"))
    points = report.curves(report.measured(first), "text")["validation prose"]
    assert [x for x, _ in points] == [1536, 4608]
    pytest.importorskip("matplotlib")
    memorize.main(argv(home, second, k=8, l=8))
    report.main([str(second)])
    page = html_of(second / "report.html")
    assert "With the runs that it goes on from: bits per byte" in [h.text for h in page.iter("h3")]
    assert sum(e.tag.endswith("}svg") for e in page.iter()) == 3 + 2 + 4
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser:
        opened = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}",
             "--dump-dom", (second / "report.html").as_uri()], capture_output=True, text=True)
        assert opened.stdout.count("<figure>") == 9


def test_a_prompt_is_continued_as_it_is_generated(
        home: Path, straight: Path, net: Any, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    tokenizer = load_data(net.config.data_dir).tokenizer
    evaluation.main(argv(home, straight, prompt="an é", tokens=30, temperature=0.0))
    assert capsys.readouterr().out == continue_text(net, tokenizer, "an é", 30) + "\n"
    pieces = "né東".encode()  # half a character is held back until it is whole
    ids = [next(i for i, p in tokenizer.pieces.items() if p == bytes([b])) for b in pieces]

    class Parrot:
        def stream(self, *_: Any, **__: Any) -> Any:
            for i in ids:
                yield [i]
                said.append(capsys.readouterr().out)

    said: list[str] = []
    evaluation.stream_completion(Parrot(), tokenizer, "a", 6, 0.0)
    assert said == ["an", "", "é", "", "", "東"]


def test_published_scores_lie_beside_ours(quiz: Path, measured: list, tmp_path: Path,
                                          capsys: pytest.CaptureFixture) -> None:
    entries = evaluation.by_checkpoint(measured)
    file = tmp_path / "theirs.csv"
    file.write_text("# source\ntokens,piqa,mmlu_macro,other\n10,0.25,,1\n20000,0.75,0.5,1\n"
                    "9e9,1,1,1\n")
    assert evaluation.published_scores(str(file), entries) == {
        "mmlu_macro": [(20000.0, 0.5)], "piqa": [(10.0, 0.25), (20000.0, 0.75)]}
    evaluation.main([str(quiz / "quiz.py"), f"--published={file}", "--tokens=1"])
    assert "published at these tokens 0.750" in capsys.readouterr().out
    entries = [{"tokens": 1.3e12, "tasks": evaluation.TASKS | {"mmlu_macro": 0}}]
    theirs = evaluation.published_scores(load(["configs/amber_7b.py"])[0].published, entries)
    assert theirs["hellaswag"][0] == (3495690240.0, 0.2483) and len(theirs["hellaswag"]) == 356
    assert theirs["mmlu_macro"][-1][1] == pytest.approx(0.2853)  # ckpt_355 on the model's card


def test_a_run_is_held_against_other_seeds(home: Path, straight: Path, tmp_path: Path,  # noqa: F811
                                           monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture) -> None:
    run, file = tmp_path / "run", tmp_path / "bands.json"
    shutil.copytree(straight, run)
    monkeypatch.setattr(bands, "BANDS", file)

    def said(*words: str) -> str:
        bands.main([str(run), *words])
        return capsys.readouterr().out

    assert "has no bands of mini" in said()
    with pytest.raises(UserError, match="has no results of its last checkpoint"):
        bands.figures(run)
    evaluation.main(argv(home, run, checkpoints="last"))
    config, found = load(argv(home, run))[0], bands.figures(run)
    assert set(found) == {"bits per byte of prose", "bits per byte of code",
                          "accuracy of continuation", "accuracy of recall"}
    entry = {"seeds": 2, "data_sha256": load_data(config.data_dir).sha256,
             "settings": bands.decisive(json.loads(config.to_json())),
             "figures": {name: [x - 0.001, x + 0.001] for name, x in found.items()}}
    write_json(file, {"mini": entry})
    capsys.readouterr()
    assert "is as expected: 4 of 4 figures" in said()
    entry["figures"]["bits per byte of code"] = [1.0, 1.001]
    write_json(file, {"mini": entry})
    text = said()
    assert "is NOT as expected:\n  bits per byte of code is" in text and text.count("\n") == 2
    write_json(file, {"mini": entry | {"settings": entry["settings"] | {"weight_decay": 0.5}}})
    assert "has a weight_decay of its own" in said()
    write_json(file, {"mini": entry | {"data_sha256": "0" * 64}})
    assert "is not the data that docs/bands.json is about" in said()


def test_the_questions_of_the_course(home: Path, straight: Path,  # noqa: F811
                                     capsys: pytest.CaptureFixture) -> None:
    def said(n: int, answer: str = "") -> str:
        check.main([str(n), str(straight), *([f"--answer={answer}"] if answer else [])])
        return capsys.readouterr().out

    capsys.readouterr()
    for n in (1, 2, 3, 4, 5, 8, 9):
        assert said(n).count("(") and "?" in said(n)
    # What a student would write down, without this code.
    data, loss = load_data(home / "data"), ckpt.read_records(straight / "metrics.jsonl")[0]["loss"]
    ids = data.validation("code")["token_ids"]
    text = "".join(data.tokenizer.decode(row) for row in ids)
    # A run of S steps is asked about its step S * 3 // 4 + 1: which chunk's, and which one of it?
    config = load([str(straight)])[0]
    n, batch = data.manifest["chunks"][0]["sequences"], config.global_batch_size  # all are as large
    step = len(ckpt.read_records(straight / "metrics.jsonl")) * 3 // 4
    chunk, within = divmod(step, n // batch)
    order = np.random.default_rng([config.seed, chunk]).permutation(n)[within * batch:]
    assert chunk > 0 and within > 0
    right = {1: f"{len(text.encode()) / ids.size}", 2: ",".join(map(str, order[:5])),
             3: "13.48", 4: f"{loss - math.log(300)}", 5: "136, 16", 8: "0.0625,0.01825"}
    for n, answer in right.items():
        assert said(n, answer) == "Right.\n"
        with pytest.raises(UserError, match="Not yet"):
            check.main([str(n), str(straight), f"--answer=7{answer}"])
    for words, sentence in (([], "which session"), (["11"], "which session"),
                            (["4", str(home)], "not the directory"),
                            (["9", str(straight), "--answer=1"], "has no forgetting curve"),
                            (["5", str(straight), "--answer=1"], "asked for: 2, .* found: 1"),
                            (["3", str(straight), "--answer=many"], "asked for: 1, .* found: 0")):
        with pytest.raises(UserError, match=sentence):
            check.main(words)


def test_the_questions_about_runs_side_by_side(straight: Path, tmp_path: Path,  # noqa: F811
                                               monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture) -> None:
    def write_run(name: str, more: float) -> None:
        """The run `straight`, with so much more loss at each step, and bits per byte."""
        records = ckpt.read_records(straight / "metrics.jsonl")
        for record in records:
            record["loss"] += more
            for result in record.get("valid", {}).values():
                result["bits_per_byte"] += more
        write(tmp_path / name / "metrics.jsonl", records)
        shutil.copy(straight / "config.json", tmp_path / name)

    monkeypatch.chdir(tmp_path)
    run = str(straight)
    for n, sentence in ((6, "is not the directory of a run"), (7, "has no steps yet")):
        with pytest.raises(UserError, match=sentence):
            check.main([str(n), run, "--answer=1,2"])
    for i, more in enumerate((0.0, 0.3, 0.1, 0.2)):  # each seed: the lower rate, the higher one
        write_run(f"runs/ablation/rate_{('1e-3', '3e-3')[i % 2]}_seed_{i // 2 + 1}", more)
    write_run("runs/one_process", 0.0)
    write_run("runs/two_processes", -0.25)
    write_run("run", 0.0)
    write_json(tmp_path / "run/memorization.json",
               {"forgetting": {"0": {"loss": -0.2}, "3": {"loss": -0.05}}})
    # Differences 0.3 and 0.1: their deviation is 0.2 / sqrt(2), that of both pairs 0.1 / sqrt(2).
    for n, path, answer in ((6, run, "0.1,0.0707"), (7, run, "0.25"), (9, "run", "25")):
        assert check.main([str(n), path, f"--answer={answer}"]) is None
        assert capsys.readouterr().out == "Right.\n"
        with pytest.raises(UserError, match="Not yet"):
            check.main([str(n), path, f"--answer=7{answer}"])
