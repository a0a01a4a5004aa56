"""eval.py against lm-evaluation-harness: the same model, questions and batch, in one process.

    python tools/bench_eval.py [--questions=12] [--batch=16] [--threads=1] [--dtype=float32]

amber_tiny's shape with a window of 2048 after one training step, made-up questions of the lengths
of the real ones. Both build their prompts, tokenize and score; their log-likelihoods must agree.
The ratio is of CPU time, which other programs on the machine change least.
"""

import argparse
import logging
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from test_eval import harness_task, sentences, write

import checkpoint
import eval as evaluation
import prepare_data
import train
from configs import Config, load
from data import load_data
from model import build_for_inference

TASKS = ("arc_challenge", "hellaswag", "mmlu/abstract_algebra", "piqa")


def make_model(folder: Path, a: argparse.Namespace) -> Config:
    """Data and a run of one step in `folder`; returns its config."""
    write(folder / "text.jsonl", [{"text": sentences(i, 60)} for i in range(400)])
    settings = {"vocab_size": 600, "seq_len": 2048, "n_chunks": 1, "sequences_per_chunk": 16,
                "valid_sequences": 2, "workers": 1, "threads": a.threads, "dtype": a.dtype,
                "sources": {"text": str(folder / "text.jsonl")}, "data_dir": str(folder / "data"),
                "run_dir": str(folder / "run"), "task_dir": str(folder / "tasks")}
    (folder / "bench.py").write_text("from configs.amber_tiny import *\n" + "\n".join(
        f"{key} = {value!r}" for key, value in settings.items()))
    argv = [str(folder / "bench.py")]
    prepare_data.main(argv)
    train.main(argv)
    return load(argv)[0]


def write_tasks(tasks: Path, n: int) -> None:
    """n questions (and more of the short ones) of random words, as long as the real ones."""
    draw = random.Random(0)
    lexicon = sentences(1, 200).split()

    def some(words: int) -> str:
        return " ".join(draw.choices(lexicon, k=words))

    for split, entries in (("train", 40), ("test", n)):
        write(tasks / f"arc_challenge/{split}.jsonl", [
            {"id": str(i), "question": some(15), "answerKey": "A",
             "choices": {"text": [some(4) for _ in "ABCD"], "label": list("ABCD")}}
            for i in range(entries)])
    for split, entries in (("train", 40), ("validation", n)):
        write(tasks / f"hellaswag/{split}.jsonl", [
            {"ind": i, "activity_label": some(2), "ctx_a": some(20), "ctx_b": some(4), "ctx": "",
             "endings": [some(12) for _ in range(4)], "label": "1"} for i in range(entries)])
    for split, entries in (("dev", 5), ("test", 4 * n)):
        write(tasks / f"mmlu/abstract_algebra/{split}.jsonl", [
            {"question": some(30), "subject": "abstract_algebra", "answer": 1,
             "choices": [some(4) for _ in range(4)]} for _ in range(entries)])
    write(tasks / "piqa/validation.jsonl", [
        {"goal": some(8), "sol1": some(15), "sol2": some(15), "label": 1} for _ in range(8 * n)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    a = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_model(folder, a)
        write_tasks(folder / "tasks", a.questions)
        data, model = load_data(config.data_dir), build_for_inference(config)
        path = checkpoint.list_checkpoints(config.run_dir)[-1]
        checkpoint.load_weights(model, path)
        lm = HFLM(pretrained=str(path), device="cpu", dtype=a.dtype, batch_size=a.batch)
        print(f"{torch.get_num_threads()} threads, {a.dtype}, batch {a.batch}")
        for name in TASKS:
            seconds: dict[str, list[float]] = {"harness": [], "eval.py": []}
            for _ in range(3):
                task = harness_task(name, folder / "tasks")
                begin = time.process_time()
                result = evaluate(lm, {task.config.task: task}, bootstrap_iters=0)
                seconds["harness"].append(time.process_time() - begin)
                begin = time.process_time()
                questions = evaluation.build_questions(config, data, name)
                ours = evaluation.log_likelihoods(model, [q.requests for q in questions], a.batch)
                seconds["eval.py"].append(time.process_time() - begin)
            samples = sorted(result["samples"][task.config.task], key=lambda s: s["doc_id"])
            apart = 0.0
            for mine, sample in zip(ours, samples):
                theirs = np.array([float(log_p) for log_p, _ in sample["filtered_resps"]])
                apart = max(apart, np.abs(mine - theirs).max())
            ratio = statistics.median(x / y for x, y in zip(*seconds.values()))
            length = len(questions[0].requests[0].ids)
            print(f"{name:>22}: {len(questions)} questions of about {length} tokens: harness"
                  f" {statistics.median(seconds['harness']):.2f} s, eval.py"
                  f" {statistics.median(seconds['eval.py']):.2f} s, ratio {ratio:.1f};"
                  f" log-likelihoods differ by {apart:.0e} at most")


if __name__ == "__main__":
    main()
