"""The same numbers as lm-evaluation-harness; nothing measured twice, nothing lost."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import sentences

import checkpoint as ckpt
import eval as evaluation
import prepare_data
import train
from configs import load
from data import load_data
from model import LLaMA
from parallel import build_for_inference

# A window that the longest prompts of the tasks below exceed and the others do not.
CONFIG = """
hidden_size, intermediate_size, num_hidden_layers, num_attention_heads = 32, 64, 2, 2
vocab_size, seq_len, n_chunks, valid_sequences, initializer_range = 400, 512, 2, 4, 0.2
sequences_per_chunk, global_batch_size, micro_batch_size, eval_sequences = 2, 2, 2, 4
dtype, threads, workers, sample_tokens = "float32", 1, 1, 4
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

    def targets(n: int, right: int) -> dict[str, Any]:
        return {"choices": [some(1, 9) for _ in range(n)],
                "labels": [1] * right + [0] * (n - right)}

    for split, n in (("train", 30), ("test", 9)):
        rows = []
        for i in range(n):
            labels = ("ABCDE" if i % 3 else "12345")[: draw.choice([3, 4, 4, 5])]
            rows.append({"question": some(2, 14) + "?" + " " * (i == 3),
                         "choices": {"text": [some(1, 5) for _ in labels], "label": list(labels)},
                         "answerKey": draw.choice(labels)})
        write(root / f"arc_challenge/{split}.jsonl", rows)
    rows = [{"ind": i, "activity_label": some(1, 2), "ctx_a": some(3, 9) + ".", "ctx": "",
             "ctx_b": some(1, 3), "endings": [some(2, 8) for _ in range(4)],
             "label": str(draw.randrange(4))} for i in range(20)]
    write(root / "hellaswag/validation.jsonl", rows[:12])
    # A question that is among the examples, twice: neither may be shown to it.
    write(root / "hellaswag/train.jsonl", [rows[2], rows[2], *rows[5:]])
    for subject in ("abstract_algebra", "us_foreign_policy"):
        for split, n in (("dev", 5), ("test", 8)):
            write(root / f"mmlu/{subject}/{split}.jsonl", [
                {"question": some(4, 40) + "\n", "subject": subject, "answer": draw.randrange(4),
                 "choices": [some(1, 3) for _ in range(4)]} for _ in range(n)])
    write(root / "truthfulqa/validation.jsonl", [
        {"question": some(3, 9) + "?", "mc1_targets": targets(draw.randint(3, 6), 1),
         "mc2_targets": targets(6, draw.randint(1, 4))} for _ in range(8)])
    write(root / "piqa/validation.jsonl", [
        {"goal": some(2, 9), "sol1": some(3, 9), "sol2": some(3, 9), "label": draw.randrange(2)}
        for _ in range(8)])
    write(root / "winogrande/validation.jsonl", [
        {"sentence": f"{some(2, 5)} _ {some(2, 6)}." if i else "_ was here.", "option1": some(1, 1),
         "option2": some(1, 2), "answer": draw.choice("12")} for i in range(8)])
    write(root / "boolq/validation.jsonl", [
        {"question": some(3, 7), "passage": some(5, 300), "idx": i, "label": draw.randrange(2)}
        for i in range(8)])
    write(root / "openbookqa/test.jsonl", [
        {"id": str(i), "question_stem": some(2, 9), "answerKey": draw.choice("ABCD"),
         "choices": {"text": [some(1, 4) for _ in range(4)], "label": list("ABCD")}}
        for i in range(8)])


@pytest.fixture(scope="module")
def quiz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, its data, a run of two checkpoints, and all tasks."""
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


@pytest.fixture
def run(quiz: Path, tmp_path: Path) -> Path:
    """A copy of the run, without results."""
    path = shutil.copytree(quiz / "run", tmp_path / "run")
    (path / "eval.jsonl").unlink(missing_ok=True)
    return path


@pytest.fixture(scope="module")
def net(quiz: Path) -> LLaMA:
    """The model of the last checkpoint."""
    model = build_for_inference(load([str(quiz / "quiz.py")])[0])
    ckpt.load_weights(model, quiz / "run/ckpt_001")
    return model


def argv(quiz: Path, run: Path, **settings: Any) -> list[str]:
    words = {"run_dir": run, "tasks": "recall"} | settings
    return [str(quiz / "quiz.py"), *(f"--{key}={value}" for key, value in words.items())]


def by_hand(net: LLaMA, ids: list[int], n: int) -> float:
    """log p of the last n ids, one row alone, in one pass."""
    with torch.no_grad():
        log_p = net(torch.tensor([ids[:-1]])).log_softmax(-1)[0]
    return sum(float(log_p[i - 1, ids[i]]) for i in range(len(ids) - n, len(ids)))


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


def test_the_same_numbers_as_the_harness(quiz: Path, run: Path, net: LLaMA,
                                         capsys: pytest.CaptureFixture) -> None:
    for package in ("lm_eval", "transformers"):
        pytest.importorskip(package)
    from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    evaluation.main(argv(quiz, run, tasks="", checkpoints="last"))
    text, measured = capsys.readouterr().out, ckpt.read_records(run / "eval.jsonl")
    ours = {r["evaluation"]: r["result"] for r in measured}
    assert {*ours} == {*HARNESS, "continuation", "recall", "validation"}
    assert f"piqa: acc_norm {ours['piqa']['acc_norm']:.3f} ± " in text and "mmlu_macro: acc" in text
    config, _ = load([str(quiz / "quiz.py")])
    data, files = load_data(config.data_dir), evaluation.find_tasks(config)
    tasks = {name: harness_task(name, quiz / "tasks") for name in HARNESS}
    # The checkpoint directory is a Hugging Face model with its tokenizer: the harness opens it.
    lm = HFLM(pretrained=str(run / "ckpt_001"), device="cpu", dtype="float32", batch_size=16)
    theirs = evaluate(lm, {t.config.task: t for t in tasks.values()}, bootstrap_iters=0)
    cut = 0
    for name, task in tasks.items():
        metric = evaluation.TASKS[name.split("/")[0]].metric
        asked = evaluation.build_questions(config, data, name, files[name])
        samples = sorted(theirs["samples"][task.config.task], key=lambda s: s["doc_id"])
        assert len(asked) == len(samples)
        # Question by question, choice by choice
        for mine, sample in zip(evaluation.log_likelihoods(
                net, [q.requests for q in asked], 16), samples):
            expected = [float(ll) for ll, _ in sample["filtered_resps"]]
            np.testing.assert_allclose(mine, expected, rtol=2e-6, atol=2e-5)
        cut += sum(len(ids) == config.seq_len + 1 for q in asked for ids, _ in q.requests)
        scores = theirs["results"][task.config.task]
        for our_name, their_name in ({"mc2": "acc"} if metric == "mc2" else
                                     {"acc": "acc", metric: metric}).items():
            assert ours[name][our_name] == pytest.approx(scores[f"{their_name},none"], abs=1e-6)
            deviation = np.std([s[their_name] for s in samples], ddof=1) / len(samples) ** 0.5
            assert ours[name][f"{our_name}_se"] == pytest.approx(deviation, abs=1e-6)
    assert cut > 20  # prompts longer than the window were among them
    parts = [ours[name] for name in ours if name.startswith("mmlu/")]
    n, acc, se = ([part[key] for part in parts] for key in ("n", "acc", "acc_se"))
    row = evaluation.by_checkpoint(measured)[0]["tasks"]["mmlu"]
    assert row["acc"] == pytest.approx(aggregate_subtask_metrics(acc, n), abs=1e-9)
    assert row["acc_se"] == pytest.approx(pooled_sample_stderr(se, n), abs=1e-9)


def test_sharing_changes_no_score(net: LLaMA, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "MIN_SHARED", 0.0)  # whatever is common is shared
    monkeypatch.setattr(net.config, "logit_scale", 3.0)  # as Crystal has one
    draw = np.random.default_rng(0)
    common, asked = draw.integers(400, size=5), []
    for kind in range(12):
        context = np.append(common[: kind % 6], draw.integers(400, size=1 + kind % 7))
        word = draw.integers(400, size=2)  # choices that begin alike share more than their context
        choices = [np.append(word[: kind % 3], draw.integers(400, size=1 + k * (kind % 2)))
                   for k in range(1 + kind % 4)]
        asked.append([evaluation.Request(np.append(context, c).astype(np.int32), len(c))
                      for c in choices])
    for batch in (3, 50):
        for requests, values in zip(asked, evaluation.log_likelihoods(net, asked, batch)):
            expected = [by_hand(net, r.ids.tolist(), r.n) for r in requests]
            np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)


def test_weights_that_are_not_finite_give_no_score(quiz: Path, net: LLaMA,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    questions = evaluation.synthetic_questions(load_data(quiz / "data"), "recall")
    monkeypatch.setattr(net.lm_head.weight, "data", net.lm_head.weight * np.nan)
    assert np.isnan(evaluation.score_questions(net, questions, "acc", 8)["acc"])


def test_synthetic_questions_are_what_they_say(quiz: Path) -> None:
    data = load_data(quiz / "data")
    ids = data.validation("text")["token_ids"].astype(int)
    for name in ("continuation", "recall"):
        for i, q in enumerate(evaluation.synthetic_questions(data, name)):
            asked = [request.ids.tolist() for request in q.requests]
            again = ids[i, :16].tolist() if name == "recall" else []
            right = ids[i, :64].tolist() + again
            assert asked.index(right) == q.gold.argmax() and asked.count(right) == 1


def test_parquet_is_read_as_jsonl_is(quiz: Path, tmp_path: Path) -> None:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    docs = evaluation.read_docs([quiz / "tasks/openbookqa/test.jsonl"])
    (tmp_path / "openbookqa").mkdir()
    file = tmp_path / "openbookqa/test-00000-of-00001.parquet"
    parquet.write_table(arrow.Table.from_pylist(docs), file)
    config, _ = load(argv(quiz, tmp_path, task_dir=tmp_path, tasks=""))
    assert evaluation.find_tasks(config)["openbookqa"] == [[file], []]
    assert evaluation.read_docs([file]) == docs and len(docs) == 8
