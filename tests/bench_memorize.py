"""memorize.py beside transformers' generate: the same model, rows and batch, in one process.

    python tests/bench_memorize.py [--config=configs/amber_tiny.py --rounds=5 --batches=1,8,40,250]

A line for each batch and share of known rows, those that are the model's own greedy text and so
need no decoding: at 0 % both must decode everything. Random weights of the config's shape, float32;
the agreeing positions must be equal, or the benchmark fails.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import memorize
import train
from configs import load
from model import LLaMA

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


def generate(theirs: LlamaForCausalLM, rows: torch.Tensor, batch: int) -> torch.Tensor:
    """Where the text of `generate` agrees with the rows."""
    text = [theirs.generate(part[:, :K], attention_mask=torch.ones(len(part), K),
                            max_new_tokens=L, do_sample=False)[:, K:] for part in rows.split(batch)]
    return torch.cat(text) == rows[:, K:]


def match(ours: LLaMA, rows: torch.Tensor, batch: int) -> torch.Tensor:
    return torch.cat([memorize.greedy_matches(ours, part, K) for part in rows.split(batch)])


def make_rows(ours: LLaMA, n: int, known: float, batch: int) -> torch.Tensor:
    """Random rows, a share of them going on as the model would, spread among the others."""
    rows = torch.randint(ours.config.vocab_size, (n, K + L))
    mine = torch.randperm(n)[: round(known * n)]
    for i in mine.split(batch) if len(mine) else ():
        rows[i, K:] = torch.tensor(ours.generate(rows[i, :K].tolist(), L))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", default="configs/amber_tiny.py")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=40, help="or the batch, if it is more")
    parser.add_argument("--batches", default="1,8,40,250")
    a = parser.parse_args()
    train.tune_cpu(0)
    config, _ = load([a.config])
    ours = LLaMA(config)
    ours.init_weights(0)
    theirs = hugging_face(ours)
    print(f"{a.config}: {config.n_params:,} parameters, k = l = {K}, {torch.get_num_threads()}"
          f" threads, torch {torch.__version__}\nbatch  rows  known   generate   memorize  ratio")
    for batch in map(int, a.batches.split(",")):
        for known in (0.0, 0.9, 1.0):
            rows, seconds = make_rows(ours, max(batch, a.rows), known, batch), []
            if not torch.equal(generate(theirs, rows, batch), match(ours, rows, batch)):
                raise SystemExit("The scores differ: there is a fault in one of the two.")
            for _ in range(a.rounds):
                times = [time.perf_counter()]
                for run, model in ((generate, theirs), (match, ours)):
                    run(model, rows, batch)
                    times.append(time.perf_counter())
                seconds.append((times[1] - times[0], times[2] - times[1]))
            slow, fast = (statistics.median(column) for column in zip(*seconds))
            ratio = statistics.median(x / y for x, y in seconds)
            print(f"{batch:5}{len(rows):6}{known:7.0%}{slow:9.3f} s{fast:9.3f} s{ratio:7.1f}",
                  flush=True)


if __name__ == "__main__":
    main()
