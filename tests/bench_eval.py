"""eval.py against lm-evaluation-harness: the same model, questions and batch, in one process.

    python tests/bench_eval.py [--questions=12] [--batch=16] [--threads=0] [--dtype=float32]

amber_tiny's shape with a window of 2048, random weights, made-up questions of the lengths of
the real ones. Each contender builds its prompts, tokenizes and scores; the log-likelihoods must
agree.
"""

import argparse
import logging
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

import eval as evaluation
import prepare_data
import train
from configs import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    a = parser.parse_args()
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from test_eval import HARNESS, harness_task, hugging_face, words, write
    logging.disable(logging.WARNING)
    train.tune_cpu(a.threads)
    with tempfile.TemporaryDirectory() as name:
        folder, draw = Path(name), random.Random(0)
        write(folder / "text.jsonl", [{"text": words(i, 60)} for i in range(100)])
        (folder / "bench.py").write_text("from configs.amber_tiny import *\nvocab_size = 600\n"
                                         "seq_len, valid_rows, workers = 2048, 2, 1\n"
                                         f"sources = {{'text': {str(folder / 'text.jsonl')!r}}}\n"
                                         f"data_dir = {str(folder / 'data')!r}\n")
        prepare_data.main([str(folder / "bench.py")])
        config, _ = load([str(folder / "bench.py"), f"--dtype={a.dtype}"])
        net = evaluation.build(config)
        net.init_weights(0)
        hub = hugging_face(folder / "hub", config, net.state_dict())
        lm = HFLM(pretrained=str(hub), device="cpu", dtype=a.dtype, batch_size=a.batch)
        lexicon = words(1, 200).split()

        def some(n: int) -> str:
            return " ".join(draw.choices(lexicon, k=n))

        tasks, n = folder / "tasks", a.questions
        for split, rows in (("train", 40), ("test", n)):
            write(tasks / f"arc_challenge/{split}.jsonl", [
                {"id": str(i), "question": some(15), "answerKey": "A", "choices": {
                    "text": [some(4) for _ in "ABCD"], "label": list("ABCD")}}
                for i in range(rows)])
        for split, rows in (("train", 40), ("validation", n)):
            write(tasks / f"hellaswag/{split}.jsonl", [
                {"ind": i, "activity_label": some(2), "ctx_a": some(20), "ctx_b": some(4),
                 "ctx": "", "endings": [some(12) for _ in range(4)], "label": "1"}
                for i in range(rows)])
        for split, rows in (("dev", 5), ("test", 4 * n)):
            write(tasks / f"mmlu/abstract_algebra/{split}.jsonl", [
                {"question": some(30), "subject": "abstract_algebra", "answer": 1,
                 "choices": [some(4) for _ in range(4)]} for _ in range(rows)])
        write(tasks / "piqa/validation.jsonl", [
            {"goal": some(8), "sol1": some(15), "sol2": some(15), "label": 1}
            for _ in range(8 * n)])
        print(f"{torch.get_num_threads()} threads, {a.dtype}, batch {a.batch}")
        for name in ("arc_challenge", "hellaswag", "mmlu/abstract_algebra", "piqa"):
            task, subject = evaluation.TASKS[name.split("/")[0]], name.partition("/")[2]
            seconds: dict[str, list[float]] = {"harness": [], "eval.py": []}
            for _ in range(3):
                theirs = harness_task(name, tasks)
                begin = time.perf_counter()
                result = evaluate(lm, {theirs.config.task: theirs}, bootstrap_iters=0)
                seconds["harness"].append(time.perf_counter() - begin)
                begin = time.perf_counter()
                asked = evaluation.questions(config, task, tasks / HARNESS[name][1],
                                             subject.replace("_", " "))
                ours = evaluation.log_likelihoods(net, [q.rows for q in asked], a.batch)
                seconds["eval.py"].append(time.perf_counter() - begin)
            samples = sorted(result["samples"][theirs.config.task], key=lambda s: s["doc_id"])
            expected = [[float(ll) for ll, _ in s["filtered_resps"]] for s in samples]
            apart = max(np.abs(x - y).max() for x, y in zip(ours, expected))
            ratio = statistics.median(x / y for x, y in zip(*seconds.values()))
            print(f"{name:>22}: {len(asked)} questions of about {len(asked[0].rows[0][0])} tokens:"
                  f" harness {statistics.median(seconds['harness']):.2f} s, eval.py"
                  f" {statistics.median(seconds['eval.py']):.2f} s, ratio {ratio:.1f};"
                  f" log-likelihoods differ by {apart:.0e} at most")


if __name__ == "__main__":
    main()
