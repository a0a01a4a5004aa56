"""How fast does this network train on a CPU beside other code? Ratios, measured in one run.

    python tools/bench_cpu.py
    python tools/bench_cpu.py --hidden=256 --layers=6 --heads=4 --ffn=688
    python tools/bench_cpu.py --nanogpt=PATH/TO/nanoGPT

Every contender trains the same shape on the same ids, with AdamW, clipping at 1.0 and its best
settings (bfloat16 where the CPU has it, fused AdamW, the same threads), in a process of its own.
The processes take turns, so that a machine that slows down slows all of them, and the median step
of each counts. The malloc that keeps its buffers (model.tune_cpu) is part of train.py. "+ our
malloc" lends it to the others, so that one can tell the code from the allocator.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402

from configs import Config, UserError, run_command  # noqa: E402
from model import LLaMA, choose_device, tune_cpu  # noqa: E402


def ours(a: argparse.Namespace, dtype: torch.dtype) -> tuple[torch.nn.Module, Callable]:
    net = LLaMA(Config(vocab_size=a.vocab, hidden_size=a.hidden, intermediate_size=a.ffn,
                       num_hidden_layers=a.layers, num_attention_heads=a.heads,
                       num_key_value_heads=a.heads), dtype)
    net.init_weights(0)
    return net, lambda x, y: net(x, y)[0]


def hugging_face(a: argparse.Namespace, dtype: torch.dtype) -> tuple[torch.nn.Module, Callable]:
    from transformers import LlamaConfig, LlamaForCausalLM
    net = LlamaForCausalLM(LlamaConfig(
        vocab_size=a.vocab, hidden_size=a.hidden, intermediate_size=a.ffn,
        num_hidden_layers=a.layers, num_attention_heads=a.heads, max_position_embeddings=a.length,
        attn_implementation="sdpa", use_cache=False))

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = net(input_ids=x).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten())

    return net, loss


def nanogpt(a: argparse.Namespace, dtype: torch.dtype) -> tuple[torch.nn.Module, Callable]:
    sys.path.insert(0, a.nanogpt)
    sys.modules.pop("model", None)  # ours has the same name
    from model import GPT, GPTConfig  # nanoGPT's model.py
    net = GPT(GPTConfig(block_size=a.length, vocab_size=a.vocab, n_layer=a.layers, n_head=a.heads,
                        n_embd=a.hidden, dropout=0.0, bias=False))

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return net(x, y)[1]

    return net, loss


CONTENDERS = {"ours": ours, "hugging_face": hugging_face, "nanogpt": nanogpt}


def worker(a: argparse.Namespace) -> None:
    """Answer each line on standard input with the median seconds of a few steps."""
    torch.set_num_threads(a.threads)
    if a.malloc:
        tune_cpu(a.threads)
    torch.manual_seed(0)
    with contextlib.redirect_stdout(sys.stderr):  # nanoGPT prints a greeting
        net, loss_of = CONTENDERS[a.worker](a, getattr(torch, a.dtype))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    ids = torch.randint(a.vocab, (a.batch, a.length + 1))
    if a.compile:
        net.compile()

    def step() -> None:
        loss_of(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(4):  # the first steps allocate, and compile
        step()
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        times = []
        for _ in range(a.steps):
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
        print(json.dumps(statistics.median(times)), flush=True)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name, default in (("hidden", 128), ("layers", 4), ("heads", 2), ("ffn", 352),
                          ("vocab", 4096), ("length", 128), ("batch", 16), ("steps", 10),
                          ("threads", torch.get_num_threads()), ("rounds", 8), ("malloc", 0),
                          ("compile", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--nanogpt", default="", help="a checkout of nanoGPT, to compare with it")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    if a.worker:
        return worker(a)
    if a.nanogpt and not (Path(a.nanogpt) / "model.py").exists():
        raise UserError(f"--nanogpt={a.nanogpt} has no model.py: give a checkout of nanoGPT.")
    # One type for all of them, chosen here, because choosing it in a worker would set its malloc.
    _, dtype = choose_device(Config(device="cpu", dtype=a.dtype))
    plan = {"ours": ("ours", 1), "ours, system malloc": ("ours", 0),
            "transformers LlamaForCausalLM": ("hugging_face", 0),
            "transformers + our malloc": ("hugging_face", 1)}
    if a.nanogpt:
        plan |= {"nanoGPT": ("nanogpt", 0), "nanoGPT + our malloc": ("nanogpt", 1)}
    workers = {}
    for label, (contender, malloc) in plan.items():
        command = [sys.executable, __file__, *argv, f"--worker={contender}",
                   f"--malloc={malloc}", f"--dtype={str(dtype)[6:]}"]
        workers[label] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                          text=True, bufsize=1)
    for label, process in workers.items():
        answer(process, label)
    seconds: dict[str, list[float]] = {label: [] for label in workers}
    for _ in range(a.rounds):
        for label, process in workers.items():  # in turn, one at a time
            process.stdin.write("go\n")
            seconds[label].append(float(answer(process, label)))
    for process in workers.values():
        process.stdin.close()
        process.wait()
    print(f"{a.layers} layers, hidden {a.hidden}, {a.heads} heads, MLP {a.ffn}, vocabulary"
          f" {a.vocab}, {a.batch} x {a.length} tokens per step, {a.threads} threads,"
          f" {str(dtype)[6:]}, torch {torch.__version__}" + (", compiled" if a.compile else ""))
    print(f"{'':32}{'ms/step':>9}{'tokens/s':>10}{'ours is faster by':>19}")
    for label, times in seconds.items():
        ratio = statistics.median(t / u for t, u in zip(times, seconds["ours"]))
        median = statistics.median(times)
        print(f"{label:32}{1e3 * median:9.1f}{a.batch * a.length / median:10,.0f}{ratio:18.2f}x")


def answer(process: subprocess.Popen, label: str) -> str | float:
    """The next line of a worker: "ready", then seconds."""
    line = process.stdout.readline()
    if not line:
        raise UserError(f"The process of {label!r} ended early; its error is above.")
    return json.loads(line)


if __name__ == "__main__":
    run_command(main)
