"""Time training steps of a network on a CPU beside other code; prints ratios of one run.

    python tools/bench_cpu.py [--nanogpt=PATH/TO/nanoGPT] [--SETTING=VALUE ...]

Every contender trains the shape of amber_tiny on the same ids, with fused AdamW, clipping at 1.0,
and bfloat16 where the CPU has it, in a process of its own. The processes take turns, so that a
machine that slows down slows all of them. "Our malloc" is the setting of parallel.tune_cpu.
"""

import itertools
import multiprocessing
import statistics
import sys
import timeit
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from configs import Config, load, run_command  # noqa: E402
from model import LLaMA  # noqa: E402
from parallel import choose_device, tune_cpu  # noqa: E402

ROUNDS = 8  # of ten steps each


@dataclass
class Flags:
    """What this tool takes beside the settings."""

    nanogpt: str = ""  # a checkout of nanoGPT, to compare with it


def contender(name: str, c: Config, dtype: torch.dtype, path: str) -> tuple[nn.Module, Callable]:
    """A network of the shape of a config, and its loss: inputs, targets (B, T) -> ()."""
    if name == "ours":
        net = LLaMA(c, dtype)
        net.init_weights(0)
        return net, lambda x, y: net(x, y)[0]
    if name == "transformers":
        from transformers import LlamaConfig, LlamaForCausalLM
        net = LlamaForCausalLM(LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, use_cache=False,
            intermediate_size=c.intermediate_size, num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads, max_position_embeddings=c.seq_len))
        return net, lambda x, y: nn.functional.cross_entropy(
            net(input_ids=x).logits.flatten(0, 1).float(), y.flatten())
    sys.path.insert(0, path)
    sys.modules.pop("model")  # nanoGPT's has the same name
    from model import GPT, GPTConfig
    net = GPT(GPTConfig(block_size=c.seq_len, vocab_size=c.vocab_size, bias=False, dropout=0.0,
                        n_layer=c.num_hidden_layers, n_head=c.num_attention_heads,
                        n_embd=c.hidden_size))
    return net, lambda x, y: net(x, y)[1]


def begin(name: str, malloc: bool, c: Config, dtype: torch.dtype, threads: int, path: str) -> None:
    """Build a contender in this process, and make its first steps, which allocate."""
    global step  # one contender a process
    torch.set_num_threads(threads)
    if malloc:
        tune_cpu(threads)
    torch.manual_seed(0)
    net, loss_of = contender(name, c, dtype, path)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    ids = torch.randint(c.vocab_size, (c.global_batch_size, c.seq_len + 1))
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    # Ours computes in `dtype` by itself.
    autocast = torch.autocast("cpu", dtype, enabled=name != "ours" and dtype != torch.float32)

    def step() -> None:
        with autocast:
            loss = loss_of(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    time_steps()


def time_steps() -> float:
    """Seconds of a step of this process's contender, the median of ten."""
    return statistics.median(timeit.repeat(step, number=1, repeat=10))


def main(argv: list[str]) -> None:
    config, flags = load(["configs/amber_tiny.py", "--device=cpu", *argv], Flags)
    names = ["transformers", "nanoGPT"] if flags.nanogpt else ["transformers"]
    plan = [("ours", True), *itertools.product(names, (False, True))]
    _, dtype = choose_device(config)
    given = (config, dtype, torch.get_num_threads(), flags.nanogpt)
    spawn = multiprocessing.get_context("spawn")
    pools = [ProcessPoolExecutor(1, spawn, begin, (*contender, *given)) for contender in plan]
    rounds = [[pool.submit(time_steps).result() for pool in pools] for _ in range(ROUNDS)]
    print(f"{config.tokens_per_step:,} tokens a step, {torch.get_num_threads()} threads, {dtype}")
    print(f"{'':32}{'ms/step':>9}{'ours is faster by':>19}")
    for (name, malloc), times in zip(plan, zip(*rounds)):
        ratio = statistics.median(t / ours for t, (ours, *_) in zip(times, rounds))
        label = f"{name}, {'our' if malloc else 'system'} malloc"
        print(f"{label:32}{1e3 * statistics.median(times):9.1f}{ratio:18.2f}x")


if __name__ == "__main__":
    run_command(main)
