"""Time memorize.py beside transformers' generate: same model, sequences and batch, one process.

    python tools/bench_memorize.py [--config=configs/amber_tiny.py --rounds=5 --batches=1,8,40,250]

It prints a line for each batch and each share of memorized sequences: those are the model's own
greedy text, and need no decoding; at 0 % both programs must decode everything. Both find the same
two things: where greedy text agrees with a sequence, and the log-probability of its end, for which
transformers needs a pass of its own. The weights are random, of the config's shape, in float32.
The results must be equal, or the benchmark fails.
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

from configs import UserError, load, run_command
from memorize import greedy_matches
from model import LLaMA, meta_model, tune_cpu

K = L = 32


def hugging_face(ours: LLaMA) -> LlamaForCausalLM:
    """The same weights in transformers, with no token that would end a text."""
    c = ours.config
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, rms_norm_eps=c.rms_norm_eps,
        tie_word_embeddings=c.tie_word_embeddings, bos_token_id=None, eos_token_id=None,
        pad_token_id=0))
    theirs.load_state_dict(ours.state_dict())
    return theirs.eval()


@torch.inference_mode()
def their_matches(theirs: LlamaForCausalLM, sequences: Tensor, batch: int
                  ) -> tuple[Tensor, Tensor]:
    """Where the text of `generate` agrees with the sequences (n, K + L): bool (n, L); and the
    log-probability of their last L tokens (n,)."""
    texts, log_p = [], []
    for part in sequences.split(batch):
        text = theirs.generate(part[:, :K], attention_mask=torch.ones_like(part[:, :K]),
                               max_new_tokens=L, do_sample=False)
        texts.append(text[:, K:])
        logits = theirs(part[:, :-1], logits_to_keep=L).logits  # (n, L, V)
        losses = F.cross_entropy(logits.transpose(1, 2), part[:, K:], reduction="none")  # (n, L)
        log_p.append(-losses.sum(1))
    return torch.cat(texts) == sequences[:, K:], torch.cat(log_p)


def our_matches(ours: LLaMA, sequences: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    parts = [greedy_matches(ours, part, K) for part in sequences.split(batch)]
    return tuple(map(torch.cat, zip(*parts)))


def make_sequences(ours: LLaMA, n: int, share: float, batch: int) -> Tensor:
    """Random sequences; a share of them, anywhere, goes on as the model would."""
    sequences = torch.randint(ours.config.vocab_size, (n, K + L))
    memorized = torch.randperm(n)[: round(share * n)]
    for i in memorized.split(batch) if len(memorized) else ():
        sequences[i, K:] = torch.tensor(ours.generate(sequences[i, :K].tolist(), L))
    return sequences


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", default="configs/amber_tiny.py")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=40, help="or the batch, if it is more")
    parser.add_argument("--batches", default="1,8,40,250")
    parser.add_argument("--device", default="cpu")
    flags = parser.parse_args(argv)
    tune_cpu(0)
    config, _ = load([flags.config])
    ours = LLaMA(config)
    ours.init_weights(0)
    theirs = hugging_face(ours).to(flags.device)
    ours.to(flags.device)
    print(f"{flags.config}: {meta_model(config).n_params:,} parameters, k = l = {K},"
          f" {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("batch  sequences  memorized   generate   memorize  ratio")
    for batch in map(int, flags.batches.split(",")):
        for share in (0.0, 0.9, 1.0):
            sequences = make_sequences(ours, max(batch, flags.sequences), share, batch)
            sequences = sequences.to(flags.device)
            a, b = their_matches(theirs, sequences, batch), our_matches(ours, sequences, batch)
            # On a GPU the last bits differ, and now and then the likeliest token.
            least = 1.0 if flags.device == "cpu" else 0.9
            agree = (a[0] == b[0]).float().mean()
            if not (agree >= least and torch.allclose(a[1], b[1], rtol=1e-4)):
                raise UserError("The scores differ: there is a fault in one of the two.")
            slow, fast, ratios = [], [], []
            # The two take turns, so that what else the machine does meets both alike.
            for _ in range(flags.rounds):
                start = time.perf_counter()
                their_matches(theirs, sequences, batch)[1].tolist()  # waits for a GPU
                middle = time.perf_counter()
                our_matches(ours, sequences, batch)[1].tolist()
                end = time.perf_counter()
                slow.append(middle - start)
                fast.append(end - middle)
                ratios.append(slow[-1] / fast[-1])
            print(f"{batch:5}{len(sequences):11}{share:11.0%}{statistics.median(slow):9.3f} s"
                  f"{statistics.median(fast):9.3f} s{statistics.median(ratios):7.1f}", flush=True)


if __name__ == "__main__":
    run_command(main)
