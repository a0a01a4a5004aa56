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
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from test_eval import harness_task, sentences, write

import checkpoint
import eval as evaluation
import prepare_data
import train
from configs import load
from data import load_data
from parallel import build_for_inference


def write_tasks(tasks: Path, n: int) -> None:
    """n questions (and more of the short ones) of random words, as long as the real ones."""
    draw, lexicon = random.Random(0), sentences(1, 200).split()

    def some(words: int) -> str:
        return " ".join(draw.choices(lexicon, k=words))

    for split, entries in (("train", 40), ("test", n)):
        write(tasks / f"arc_challenge/{split}.jsonl", [
            {"question": some(15), "choices": {"text": [some(4) for _ in "ABCD"],
             "label": list("ABCD")}, "answerKey": "A"} for _ in range(entries)])
    for split, entries in (("train", 40), ("validation", n)):
        write(tasks / f"hellaswag/{split}.jsonl", [
            {"ind": i, "activity_label": some(2), "ctx_a": some(20), "ctx_b": some(4), "ctx": "",
             "endings": [some(12) for _ in range(4)], "label": "1"} for i in range(entries)])
    for split, entries in (("dev", 5), ("test", 4 * n)):
        write(tasks / f"mmlu/abstract_algebra/{split}.jsonl", [
            {"question": some(30), "choices": [some(4) for _ in range(4)], "answer": 1,
             "subject": "abstract_algebra"} for _ in range(entries)])
    write(tasks / "piqa/validation.jsonl", [
        {"goal": some(8), "sol1": some(15), "sol2": some(15), "label": 1} for _ in range(8 * n)])


def main(a: argparse.Namespace, folder: Path) -> None:
    write(folder / "text.jsonl", [{"text": sentences(i, 60)} for i in range(400)])
    write_tasks(folder / "tasks", a.questions)
    settings = {"vocab_size": 600, "seq_len": 2048, "n_chunks": 1, "sequences_per_chunk": 16,
                "valid_sequences": 2, "workers": 1, "threads": a.threads, "dtype": a.dtype,
                "sources": {"text": str(folder / "text.jsonl")}, "data_dir": str(folder / "data"),
                "run_dir": str(folder / "run"), "task_dir": str(folder / "tasks"),
                "tasks": "arc_challenge,hellaswag,mmlu,piqa"}
    argv = ["configs/amber_tiny.py", *(f"--{key}={value}" for key, value in settings.items())]
    prepare_data.main(argv)
    train.main(argv)
    config, _ = load(argv)
    data, model = load_data(config.data_dir), build_for_inference(config)
    [path] = checkpoint.list_checkpoints(config.run_dir)
    checkpoint.load_weights(model, path)
    lm = HFLM(pretrained=str(path), device="cpu", dtype=a.dtype, batch_size=a.batch)
    for name, files in evaluation.find_tasks(config).items():
        times = []
        for _ in range(3):
            task, start = harness_task(name, folder / "tasks"), time.process_time()
            results = evaluate(lm, {task.config.task: task}, bootstrap_iters=0)
            middle = time.process_time()
            questions = evaluation.build_questions(config, data, name, files)
            ours = evaluation.log_likelihoods(model, [q.requests for q in questions], a.batch)
            end = time.process_time()
            times.append((middle - start, end - middle, (middle - start) / (end - middle)))
        harness, mine, ratio = map(statistics.median, zip(*times))
        samples = sorted(results["samples"][task.config.task], key=lambda s: s["doc_id"])
        theirs = [np.array([float(p) for p, _ in s["filtered_resps"]]) for s in samples]
        apart = max(np.abs(x - y).max() for x, y in zip(ours, theirs))
        print(f"{name:>22}: {len(questions)} questions of about {len(questions[0].requests[0].ids)}"
              f" tokens: harness {harness:.2f} s, eval.py {mine:.2f} s, ratio {ratio:.1f};"
              f" log-likelihoods differ by {apart:.0e} at most", flush=True)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for key, default in (("questions", 12), ("batch", 16), ("threads", 1), ("dtype", "float32")):
        parser.add_argument(f"--{key}", type=type(default), default=default)
    with tempfile.TemporaryDirectory() as folder:
        main(parser.parse_args(), Path(folder))
