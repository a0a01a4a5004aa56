"""The same numbers as lm-evaluation-harness; nothing measured twice, nothing lost."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_train import argv, damage, home, straight, words  # noqa: F401

import eval as evaluation
import prepare_data
import train
from configs import Config, load

# A window that the longest prompts of the tasks below exceed and the others do not.
CONFIG = """
hidden_size, intermediate_size, num_hidden_layers, num_attention_heads = 32, 64, 2, 2
vocab_size, seq_len, n_chunks, valid_rows, initializer_range = 400, 512, 1, 4, 0.2
global_batch_size, micro_batch_size, eval_rows, sample_tokens = 2, 2, 4, 4
dtype, threads, workers = "float32", 1, 1
"""


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_tasks(root: Path) -> None:
    """Small files of every benchmark, in the data sets' own form, some rows awkward on purpose."""
    draw = random.Random(7)
    text = words(1, 400).split()
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
    write(folder / "text.jsonl", [{"text": words(i, 60)} for i in range(20)])
    (folder / "quiz.py").write_text(CONFIG + "\n".join(
        f"{key} = {value!r}" for key, value in {
            "sources": {"text": str(folder / "text.jsonl")}, "data_dir": str(folder / "data"),
            "run_dir": str(folder / "run"), "task_dir": str(folder / "tasks")}.items()))
    prepare_data.main([str(folder / "quiz.py")])
    train.main([str(folder / "quiz.py")])
    write_tasks(folder / "tasks")
    return folder


def hugging_face(folder: Path, config: Config, weights: dict[str, torch.Tensor]) -> Path:
    """The model and its tokenizer as a directory that transformers reads."""
    from safetensors.torch import save_file
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    ours = prepare_data.load_tokenizer(config.data_dir)
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})
    keys = ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
            " num_key_value_heads rms_norm_eps rope_theta tie_word_embeddings").split()
    train.write_json(folder / "config.json", {
        **{key: getattr(config, key) for key in keys}, "model_type": "llama",
        "architectures": ["LlamaForCausalLM"], "max_position_embeddings": config.seq_len,
        "bos_token_id": None, "eos_token_id": ours.eos_id, "torch_dtype": "float32"})
    # byte-level BPE: bytes in the letters that GPT-2 writes them with, merges in order of rank
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letter = {b: chr(b) for b in plain} | {
        b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(plain)))}
    name = {piece: "".join(letter[b] for b in piece) for piece in ours.ranks}
    merges = []
    for piece, rank in ours.ranks.items():
        parts = [bytes([b]) for b in piece]
        while len(parts) > 2:
            _, i = min((ours.ranks.get(a + b, rank), i)
                       for i, (a, b) in enumerate(zip(parts, parts[1:])))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((name[parts[0]], name[parts[1]]))
    theirs = Tokenizer(models.BPE({name[p]: i for p, i in ours.ranks.items()}, merges))
    theirs.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(ours.pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    theirs.decoder = decoders.ByteLevel()
    theirs.add_special_tokens([prepare_data.EOT])
    theirs.save(str(folder / "tokenizer.json"))
    train.write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": prepare_data.EOT})
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
    task.set_config("num_fewshot", evaluation.TASKS[name.split("/")[0]].shots)
    task.set_fewshot_seed(1234)  # simple_evaluate's default
    return task


@pytest.fixture(scope="module")
def measured(quiz: Path) -> list[dict[str, Any]]:
    """Our results of the run's checkpoint, in everything there is."""
    evaluation.main([str(quiz / "quiz.py"), "--tokens=2"])
    return train.read_records(quiz / "run/eval.jsonl")


def test_the_same_numbers_as_the_harness(quiz: Path, measured: list, tmp_path: Path) -> None:
    for package in ("lm_eval", "transformers", "safetensors"):
        pytest.importorskip(package)
    from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    config, _ = load([str(quiz / "quiz.py")])
    net = evaluation.build(config)
    train.load_weights(net, quiz / "run/ckpt_000")
    hub = hugging_face(tmp_path / "hub", config, net.state_dict())
    tasks = {name: harness_task(name, quiz / "tasks") for name in HARNESS}
    theirs = evaluate(HFLM(pretrained=str(hub), device="cpu", dtype="float32", batch_size=16),
                      {t.config.task: t for t in tasks.values()}, bootstrap_iters=0)
    ours = {r["measure"]: r["result"] for r in measured}
    assert {*ours} == {*HARNESS, *evaluation.OWN, "held-out"}
    cut = 0
    for name, task in tasks.items():
        entry, folder = evaluation.TASKS[name.split("/")[0]], quiz / "tasks" / HARNESS[name][1]
        subject = name.partition("/")[2].replace("_", " ")
        asked = evaluation.questions(config, entry, folder, subject)
        samples = sorted(theirs["samples"][task.config.task], key=lambda s: s["doc_id"])
        assert len(asked) == len(samples)
        # question by question, choice by choice, for every way of batching
        for batch in (1, 5, 64):
            for mine, sample in zip(evaluation.log_likelihoods(
                    net, [q.rows for q in asked], batch), samples):
                expected = [float(ll) for ll, _ in sample["filtered_resps"]]
                np.testing.assert_allclose(mine, expected, rtol=2e-6, atol=2e-5)
        cut += sum(len(ids) == config.seq_len + 1 for q in asked for ids, _ in q.rows)
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
    results = train.read_records(run / "eval.jsonl")
    names = [(r["checkpoint"], r["measure"]) for r in results]
    assert len(names) == len(set(names)) == 9  # 3 checkpoints, held-out and our own two
    assert text.count("held-out prose: loss") == 2 and "continuation: acc" in text
    held = [r["result"] for r in results if r["measure"] == "held-out"]
    last = train.read_records(straight / "metrics.jsonl")[-1]["valid"]["prose"]["loss"]
    assert any(r["prose"]["loss"] == pytest.approx(last, rel=1e-5) for r in held)
    with pytest.raises(SystemExit, match="There is no checkpoint .*ckpt_007; .* has: ckpt_000"):
        evaluation.main(argv(home, run, checkpoints=7))
    damage(run / "ckpt_001/model/__0_0.distcp", "flipped")
    (run / "eval.jsonl").unlink()
    shutil.copytree(run / "ckpt_000", run / "ckpt_005")
    (run / "ckpt_005/manifest.json").unlink()
    evaluation.main(argv(home, run))
    text = capsys.readouterr().out
    assert "ckpt_001: model/__0_0.distcp is damaged" in text
    assert "ckpt_005: it is half-written" in text
    assert len(train.read_records(run / "eval.jsonl")) == 6
