"""Time memorize.py beside transformers' generate: same model, sequences and batch, one process.

    python tools/bench_memorize.py [--config=configs/amber_125m.py --rounds=3 --batches=1,8,40]

It prints a line for each batch and each share of memorized sequences: those are the model's own
greedy text, and need no decoding; at 0 % both programs must decode everything. Both find where
greedy text agrees with a sequence; it stops if they differ. The weights are random, of the
config's shape, in float32; on a CPU the seconds are those of the process, whatever else runs.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoint import hugging_face_config
from configs import UserError, load, run_command
from memorize import greedy_matches
from model import LLaMA
from parallel import tune_cpu

K = L = 32


@torch.inference_mode()
def their_matches(theirs: LlamaForCausalLM, part: Tensor) -> Tensor:
    """Where the text of `generate` agrees with sequences (B, K + L): bool (B, L)."""
    text = theirs.generate(part[:, :K], attention_mask=torch.ones_like(part[:, :K]),
                           max_new_tokens=L, do_sample=False)
    return text[:, K:] == part[:, K:]


def make_sequences(ours: LLaMA, n: int, share: float, batch: int) -> Tensor:
    """Random sequences; a share of them, anywhere, goes on as the model would."""
    sequences = torch.randint(ours.config.vocab_size, (n, K + L))
    memorized = torch.randperm(n)[: round(share * n)]
    for i in memorized.split(batch) if len(memorized) else ():
        sequences[i, K:] = torch.tensor(ours.generate(sequences[i, :K].tolist(), L))
    return sequences


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for key, default in (("config", "configs/amber_125m.py"), ("rounds", 3), ("sequences", 8),
                         ("batches", "1,8,40"), ("device", "cpu")):
        parser.add_argument(f"--{key}", type=type(default), default=default)
    flags = parser.parse_args(argv)
    tune_cpu(0)
    clock = time.process_time if flags.device == "cpu" else time.perf_counter
    config, _ = load([flags.config])
    ours = LLaMA(config)
    ours.init_weights(0)
    settings = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}  # no text ends
    theirs = LlamaForCausalLM(LlamaConfig(**hugging_face_config(ours, 0) | settings)).eval()
    theirs.to(flags.device).load_state_dict(ours.to(flags.device).state_dict())
    programs = (lambda p: their_matches(theirs, p), lambda p: greedy_matches(ours, p, K))
    print(f"{flags.config}: {ours.n_params:,} parameters, k = l = {K},"
          f" {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("batch  sequences  memorized   generate   memorize  ratio")
    for batch in map(int, flags.batches.split(",")):
        for share in (0.0, 0.9, 1.0):
            sequences = make_sequences(ours, max(batch, flags.sequences), share, batch)
            parts, times = sequences.to(flags.device).split(batch), []
            # The two alternate, as other programs may slow them down; the first round warms up.
            for _ in range(1 + flags.rounds):
                seconds, results = [], []
                for program in programs:
                    start = clock()
                    results.append(torch.cat([*map(program, parts)]).cpu())  # waits for a GPU
                    seconds.append(clock() - start)
                times.append((*seconds, seconds[0] / seconds[1]))
            # On a GPU the last bits differ, and now and then the likeliest token.
            least = 1.0 if flags.device == "cpu" else 0.9
            if (results[0] == results[1]).float().mean() < least:
                raise UserError("The scores differ: there is a fault in one of the two.")
            slow, fast, gain = map(statistics.median, zip(*times[1:]))
            print(f"{batch:5}{len(sequences):11}{share:11.0%}{slow:9.3f} s{fast:9.3f} s{gain:7.1f}")


if __name__ == "__main__":
    run_command(main)
