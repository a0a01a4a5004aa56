"""Time memorize.py beside transformers' generate: same model, sequences and batch, one process.

    python tools/bench_memorize.py [--config=configs/amber_tiny.py --rounds=5 --batches=1,8,40,250]

It prints a line for each batch and each share of memorized sequences: those are the model's own
greedy text, and need no decoding; at 0 % both programs must decode everything. Both compute the
same two things: where greedy text agrees with a sequence, and the log-probability of its end, for
which transformers needs a pass of its own. The weights are random, of the config's shape, in
float32. It stops if their results differ.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoint import hugging_face_config
from configs import UserError, load, run_command
from memorize import greedy_matches
from model import LLaMA
from parallel import tune_cpu

K = L = 32


@torch.inference_mode()
def their_matches(theirs: LlamaForCausalLM, part: Tensor) -> tuple[Tensor, Tensor]:
    """Where the text of `generate` agrees with sequences (B, K + L): bool (B, L); and the
    log-probability of their last L tokens (B,)."""
    text = theirs.generate(part[:, :K], attention_mask=torch.ones_like(part[:, :K]),
                           max_new_tokens=L, do_sample=False)
    logits = theirs(part[:, :-1], logits_to_keep=L).logits  # (B, L, V)
    losses = F.cross_entropy(logits.transpose(1, 2), part[:, K:], reduction="none")  # (B, L)
    return text[:, K:] == part[:, K:], -losses.sum(1)


def make_sequences(ours: LLaMA, n: int, share: float, batch: int) -> Tensor:
    """Random sequences; a share of them, anywhere, goes on as the model would."""
    sequences = torch.randint(ours.config.vocab_size, (n, K + L))
    memorized = torch.randperm(n)[: round(share * n)]
    for i in memorized.split(batch) if len(memorized) else ():
        sequences[i, K:] = torch.tensor(ours.generate(sequences[i, :K].tolist(), L))
    return sequences


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for key, default in (("config", "configs/amber_tiny.py"), ("rounds", 5), ("sequences", 40),
                         ("batches", "1,8,40,250"), ("device", "cpu")):
        parser.add_argument(f"--{key}", type=type(default), default=default)
    flags = parser.parse_args(argv)
    tune_cpu(0)
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
                    start = time.perf_counter()
                    matches, log_p = map(torch.cat, zip(*map(program, parts)))
                    results.append((matches.cpu(), log_p.cpu()))  # waits for a GPU
                    seconds.append(time.perf_counter() - start)
                times.append((*seconds, seconds[0] / seconds[1]))
            # On a GPU the last bits differ, and now and then the likeliest token.
            least = 1.0 if flags.device == "cpu" else 0.9
            (a, log_p), (b, other) = results
            if (a == b).float().mean() < least or not torch.allclose(log_p, other, rtol=1e-4):
                raise UserError("The scores differ: there is a fault in one of the two.")
            slow, fast, gain = map(statistics.median, zip(*times[1:]))
            print(f"{batch:5}{len(sequences):11}{share:11.0%}{slow:9.3f} s{fast:9.3f} s{gain:7.1f}")


if __name__ == "__main__":
    run_command(main)
