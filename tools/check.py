"""The questions of docs/course.md, and whether an answer is right.

    python tools/check.py 2                    # ask the question of session 2
    python tools/check.py 2 --answer=17,4,23   # is this right?
    python tools/check.py 2 runs/mine          # about another run than runs/amber_tiny
"""

import math
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from configs import Config, UserError, load, run_command  # noqa: E402
from data import load_data, read_json, step_sequences, step_to_visit  # noqa: E402
from model import meta_model  # noqa: E402
from tools.compare import read_run, read_steps, scores  # noqa: E402


@dataclass
class Flags:
    """What this tool takes beside the settings."""

    answer: str = ""  # numbers, with commas between them; "" = print the question


def ask(number: str, c: Config) -> Iterator[Any]:
    """The question of a session, the tolerance as a share of the right number, and a hint. Then the
    numbers that answer it, worked out only when an answer is given: the runs that they need may not
    be there before."""
    match number:
        case "1":
            yield ("How many bytes does a token stand for, on average over all ids of the"
                   f" validation sequences of `code` in {c.data_dir}? (within 0.5 %)", 0.005,
                   "load_data(...).validation('code')['token_ids'], and tokenizer.token_bytes.")
            data = load_data(c.data_dir)
            yield [data.tokenizer.token_bytes[data.validation("code")["token_ids"]].mean()]
        case "2":
            data = load_data(c.data_dir)
            schedule = data.schedule(c)
            # Late in the run, so that chunk and step within it have to be worked out first.
            step = sum(visit.steps for visit in schedule) * 3 // 4
            yield (f"Which five sequences of its chunk does step {step + 1} of {c.run_dir} read"
                   f" first? Steps count from 1; the seed is {c.seed}, the batch"
                   f" {c.global_batch_size}. (exactly)", 0,
                   "Which chunk, and which step of it, counted from 0? The formula is in README.")
            visit, within = step_to_visit(schedule, step)
            n = data.manifest["chunks"][visit.chunk]["sequences"]
            yield step_sequences(c.seed, visit.chunk, n, within, c.global_batch_size,
                                 visit.epoch)[:5]
        case "3":
            yield ("How many GB (1e9 bytes) do weights, gradients and AdamW's two moments of"
                   " configs/amber_7b.py take on each of 8 GPUs, all in float32 and sharded by"
                   " FSDP? (within 1 %)", 0.01,
                   "Count the parameters first: blocks, norms, embedding and head.")
            yield [16 * meta_model(load(["configs/amber_7b.py"])[0]).n_params / 8 / 1e9]
        case "4":
            yield (f"By how many nats is the loss of step 1 of {c.run_dir} above ln(vocab_size)?"
                   " Why is it not exactly that? (within 10 %)", 0.1,
                   "metrics.jsonl has the loss of every step.")
            yield [read_steps(c.run_dir)[0]["loss"] - math.log(c.vocab_size)]
        case "5":
            yield ("T = 1000 positions, tiles of 64 queries and 64 keys (A100 in"
                   " kernels/attention.py): how many tiles of one head's scores does the forward"
                   " kernel compute, and how many of them does it mask? Two numbers. (exactly)", 0,
                   "The two loops of _forward_kernel; print(m0, n0) works in the interpreter.")
            n = math.ceil(1000 / 64)
            yield [n * (n + 1) // 2, n]
        case "6":
            yield ("In the runs of `make ablation`, what is the standard error of the difference in"
                   " bits per byte between the rates 1e-3 and 3e-3: from the differences seed by"
                   " seed, and as if the four runs had nothing to do with each other? Two numbers."
                   " (within 5 %) Was it worth while to give both rates the same seeds?", 0.05,
                   "The error of a mean of n is stdev / sqrt(n); independent variances add up.")
            bits = []  # a list for each rate, by seed
            for rate in ("1e-3", "3e-3"):
                runs = [read_run(f"runs/ablation/rate_{rate}_seed_{seed}") for seed in (1, 2)]
                bits.append([scores(run, 0)["bits per byte"] for run in runs])
            yield [statistics.stdev([b - a for a, b in zip(*bits)]) / math.sqrt(2),
                   math.sqrt(sum(map(statistics.variance, bits)) / 2)]
        case "7":
            yield ("What is the largest difference between the losses of runs/one_process and"
                   " runs/two_processes, in nats, at the same step? (within 10 %) Where does it"
                   " come from?", 0.1,
                   "Read both metrics.jsonl. Did both read the same sequences at each step?")
            one, two = read_steps("runs/one_process"), read_steps("runs/two_processes")
            yield [max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two))]
        case "8":
            yield ("In configs/crystal_7b_stage1.py: by which factor does muP multiply the learning"
                   " rate of a hidden matrix, and with which standard deviation is its q_proj"
                   " drawn? Two numbers. (within 1 %)", 0.01,
                   "init_std and parameter_groups in model.py; width_scale.")
            crystal = load(["configs/crystal_7b_stage1.py"])[0]
            yield [crystal.width_scale, math.sqrt(crystal.width_scale) * crystal.initializer_range]
        case "9":
            yield (f"Of what {c.run_dir} shows of the chunk it has just seen (loss against unseen"
                   " ones), how many per cent are left three chunks later? (within 2 %) Is that"
                   " more than chance?", 0.02,
                   "The lines `age 0` and `age 3` of memorize.py, or memorization.json.")
            curve = read_json(Path(c.run_dir, "memorization.json")).get("forgetting", {})
            if not {"0", "3"} <= curve.keys():
                raise UserError(f"{c.run_dir} has no forgetting curve: run memorize.py first.")
            yield [100 * curve["3"]["loss"] / curve["0"]["loss"]]
        case _:
            raise UserError("Say which session, 1 to 9: python tools/check.py 2 (tools/forge.py"
                            " --answer marks session 10: see docs/course.md)")


def main(argv: list[str]) -> None:
    number, words = "".join(argv[:1]), argv[1:]
    if all(word.startswith("-") for word in words):
        # The config, not the run directory: some questions can be answered before the run is made.
        words = ["configs/amber_tiny.py", *words]
    config, flags = load(words, Flags)
    session = ask(number, config)
    text, tolerance, hint = next(session)
    if not flags.answer:
        return print(text)
    right = next(session)
    said = [float(x) for x in re.findall(r"[-+]?\d*\.?\d+(?:e[-+]?\d+)?", flags.answer)]
    if len(said) != len(right):
        raise UserError(f"How many numbers are asked for: {len(right)}, with commas between them;"
                        f" found: {len(said)}, in {flags.answer!r}.")
    wrong = [str(i) for i, (a, b) in enumerate(zip(said, right), 1)
             if abs(a - b) > tolerance * abs(b) + 1e-9]
    if wrong:
        raise UserError(f"Not yet: number {', '.join(wrong)}. {hint}")
    print("Right.")


if __name__ == "__main__":
    run_command(main)
