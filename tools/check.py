"""The questions of docs/course.md, and whether an answer is right.

    python tools/check.py 2                    # ask the question of session 2
    python tools/check.py 2 --answer=17,4,23   # is this right?
    python tools/check.py 2 runs/mine          # about another run than runs/amber_tiny

No answer is kept here: each is worked out anew, from your own run.
"""

import math
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from checkpoint import read_metrics  # noqa: E402
from configs import Config, UserError, load, run_command  # noqa: E402
from data import load_data, read_json, step_sequences, step_to_visit  # noqa: E402
from model import meta_model  # noqa: E402
from tools import compare  # noqa: E402


@dataclass
class Flags:
    """What this tool takes beside the settings."""

    answer: str = ""  # numbers, with commas between them; "" = print the question


class Question(NamedTuple):
    text: str
    answer: Callable[[], list[float]]  # worked out only when an answer is given
    tolerance: float  # as a share of the right number
    hint: str  # where to look again


def metrics(run_dir: str | Path) -> list[dict]:
    """The steps of a run; UserError if it has none."""
    records = [r for r in read_metrics(run_dir).values() if "loss" in r]
    if not records:
        raise UserError(f"{run_dir} has no steps yet: make the run that docs/course.md says first.")
    return records


def ask_1(c: Config) -> Question:
    def answer() -> list[float]:
        data = load_data(c.data_dir)
        ids = data.validation("code")["token_ids"]
        return [data.tokenizer.token_bytes[ids].mean()]
    return Question(
        f"How many bytes does a token stand for, on average over all ids of the validation"
        f" sequences of `code` in {c.data_dir}? (within 0.5 %)", answer, 0.005,
        "load_data(...).validation('code')['token_ids'], and the tokenizer's token_bytes.")


def ask_2(c: Config) -> Question:
    data = load_data(c.data_dir)
    schedule = data.schedule(c)
    # Late in the run, so that the chunk and the step within it have to be worked out first.
    step = sum(visit.steps for visit in schedule) * 3 // 4

    def answer() -> list[float]:
        visit, within = step_to_visit(schedule, step)
        n = data.manifest["chunks"][visit.chunk]["sequences"]
        return step_sequences(c.seed, visit.chunk, n, within, c.global_batch_size, visit.turn)[:5]
    return Question(
        f"Which five sequences of its chunk does step {step + 1} of {c.run_dir} read first? Steps"
        f" count from 1; the seed is {c.seed}, the batch {c.global_batch_size}. (exactly)", answer,
        0, "Which chunk, and which step of it, counted from 0? The formula is in README.")


def ask_3(c: Config) -> Question:
    def answer() -> list[float]:
        network = meta_model(load(["configs/amber_7b.py"])[0])
        return [16 * network.n_params / 8 / 1e9]
    return Question(
        "How many GB (1e9 bytes) do weights, gradients and AdamW's two moments of configs/"
        "amber_7b.py take on each of 8 GPUs, all in float32 and sharded by FSDP? (within 1 %)",
        answer, 0.01, "Count the parameters first: blocks, norms, embedding and head.")


def ask_4(c: Config) -> Question:
    def answer() -> list[float]:
        return [metrics(c.run_dir)[0]["loss"] - math.log(c.vocab_size)]
    return Question(
        f"By how many nats is the loss of step 1 of {c.run_dir} above ln(vocab_size)? Why is it not"
        " exactly that? (within 10 %)", answer, 0.1, "metrics.jsonl has the loss of every step.")


def ask_5(c: Config) -> Question:
    def answer() -> list[float]:
        tiles = range(math.ceil(1000 / 64))
        return [sum(i + 1 for i in tiles), len(tiles)]
    return Question(
        "T = 1000 positions, tiles of 64 queries and 64 keys (HOPPER in kernels/attention.py): how"
        " many tiles of one head's scores does the forward kernel compute, and how many of them"
        " does it mask? Two numbers. (exactly)", answer, 0,
        "The two loops of _forward_kernel; print(m0, n0) works in the interpreter.")


def ask_6(c: Config) -> Question:
    def answer() -> list[float]:
        low, high = [], []
        for seed in (1, 2):
            for rate, found in (("1e-3", low), ("3e-3", high)):
                run = compare.read_run(f"runs/ablation/rate_{rate}_seed_{seed}")
                found.append(compare.scores(run, 0)["bits per byte"])
        differences = [b - a for a, b in zip(low, high)]
        return [statistics.stdev(differences) / math.sqrt(2),
                math.sqrt((statistics.variance(low) + statistics.variance(high)) / 2)]
    return Question(
        "In the runs of `make ablation`, what is the standard error of the difference in bits per"
        " byte between the rates 1e-3 and 3e-3: from the differences seed by seed, and as if the"
        " four runs had nothing to do with each other? Two numbers. (within 5 %) Was it worth while"
        " to give both rates the same seeds?", answer, 0.05,
        "The error of a mean of n is stdev / sqrt(n); variances of independent means add up.")


def ask_7(c: Config) -> Question:
    def answer() -> list[float]:
        one, two = metrics("runs/one_process"), metrics("runs/two_processes")
        return [max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two))]
    return Question(
        "What is the largest difference between the losses of runs/one_process and"
        " runs/two_processes, in nats, at the same step? (within 10 %) Where does it come from?",
        answer, 0.1, "Read both metrics.jsonl. Did both read the same sequences at each step?")


def ask_8(c: Config) -> Question:
    def answer() -> list[float]:
        crystal = load(["configs/crystal_7b_stage1.py"])[0]
        return [crystal.width_scale, math.sqrt(crystal.width_scale) * crystal.initializer_range]
    return Question(
        "In configs/crystal_7b_stage1.py: by which factor does muP multiply the learning rate of a"
        " hidden matrix, and with which standard deviation is its q_proj drawn? Two numbers."
        " (within 1 %)", answer, 0.01, "init_std and parameter_groups in model.py; width_scale.")


def ask_9(c: Config) -> Question:
    def answer() -> list[float]:
        curve = read_json(Path(c.run_dir, "memorization.json")).get("forgetting", {})
        if not {"0", "3"} <= curve.keys():
            raise UserError(f"{c.run_dir} has no forgetting curve: python memorize.py {c.run_dir}")
        return [100 * curve["3"]["loss"] / curve["0"]["loss"]]
    return Question(
        f"Of what {c.run_dir} shows of the chunk it has just seen (loss against unseen ones), how"
        " many per cent are left three chunks later? (within 2 %) Is that more than chance?",
        answer, 0.02, "The lines `age 0` and `age 3` of memorize.py, or memorization.json.")


SESSIONS = [ask_1, ask_2, ask_3, ask_4, ask_5, ask_6, ask_7, ask_8, ask_9]


def judge(question: Question, said: str) -> str:
    """Whether an answer is right; UserError if it is not."""
    numbers = [float(x) for x in re.findall(r"[-+]?\d*\.?\d+(?:e[-+]?\d+)?", said)]
    right = [float(x) for x in question.answer()]
    if len(numbers) != len(right):
        raise UserError(f"How many numbers are asked for: {len(right)}, with commas between them;"
                        f" found: {len(numbers)}, in {said!r}.")
    wrong = [i + 1 for i, (a, b) in enumerate(zip(numbers, right))
             if abs(a - b) > question.tolerance * abs(b) + 1e-9]
    if wrong:
        which = "" if len(right) == 1 else f" (number {', '.join(map(str, wrong))})"
        raise UserError(f"Not yet{which}. {question.hint}")
    return "Right."


def main(argv: list[str]) -> None:
    number = argv[0] if argv else ""
    if number == "10":
        print("Session 10 is marked by tools/forge.py --answer: see docs/course.md.")
        return
    if number not in [str(i + 1) for i in range(len(SESSIONS))]:
        raise UserError(f"Say which session, 1 to {len(SESSIONS)}: python tools/check.py 2")
    words = argv[1:]
    if not any(not word.startswith("-") for word in words):
        # The config, not the run directory: some questions can be answered before the run is made.
        words = ["configs/amber_tiny.py", *words]
    config, flags = load(words, Flags)
    question = SESSIONS[int(number) - 1](config)
    print(judge(question, flags.answer) if flags.answer else question.text)


if __name__ == "__main__":
    run_command(main)
