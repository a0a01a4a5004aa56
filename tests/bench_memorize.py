"""memorize.py beside transformers' generate: the same model, rows and batch; one ratio.

    python tests/bench_memorize.py [--rows=250 --agree=0.0]

`agree` is the share of rows that are the model's own greedy text, and so never need decoding: 0 is
the worst case for us. Both run in turn in one process, in float32; the scores must be equal.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=250)
    parser.add_argument("--agree", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=7)
    a = parser.parse_args()
    train.tune_cpu(0)
    config, _ = load(["configs/amber_tiny.py"])
    ours = LLaMA(config)
    ours.init_weights(0)
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size, num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads, bos_token_id=None, eos_token_id=None,
        pad_token_id=0, rms_norm_eps=config.rms_norm_eps))
    theirs.load_state_dict(ours.state_dict())
    rows = torch.randint(config.vocab_size, (a.rows, 64))
    known = int(a.agree * a.rows)
    if known:
        rows[:known, 32:] = torch.tensor(ours.generate(rows[:known, :32].tolist(), 32))

    def generate() -> torch.Tensor:
        text = theirs.generate(rows[:, :32], attention_mask=torch.ones(a.rows, 32),
                               max_new_tokens=32, min_new_tokens=32, do_sample=False)
        return text[:, 32:] == rows[:, 32:]

    contenders = {"generate": generate, "memorize": lambda: memorize.greedy_matches(ours, rows, 32)}
    results = {name: run() for name, run in contenders.items()}  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(a.rounds):
        for name, run in contenders.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    ratio = statistics.median(x / y for x, y in zip(seconds["generate"], seconds["memorize"]))
    print(f"{a.rows} rows, {a.agree:.0%} of them known: generate"
          f" {statistics.median(seconds['generate']):.3f} s, memorize"
          f" {statistics.median(seconds['memorize']):.3f} s, ratio {ratio:.1f}; scores"
          f" {'equal' if torch.equal(*results.values()) else 'DIFFER'}")


if __name__ == "__main__":
    main()
