"""Time training steps of the 7B, made by train.py's train_step, on one GPU; prints JSON objects.

    python tools/bench_steps.py [--smoke]

Compiled and eager, with the kernels of Triton and of PyTorch; and compiled with one operation at a
time left to torch.compile: `pays` is how much longer the step takes without the Triton kernel,
beside `noise`, by how much two measurements of the whole differ. A kernel that pays neither 1 % nor
more than the noise is not needed. The network has as many of the 32 layers as the memory takes.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import kernels  # noqa: E402
import train  # noqa: E402
from configs import Config, load, run_command  # noqa: E402
from data import Visit, sequence_dtype  # noqa: E402
from parallel import build_model, choose_device  # noqa: E402

# file of kernels/ -> its operation; OPERATION_triton and OPERATION_reference are in the file
OPERATIONS = {"rope": "rope", "swiglu": "swiglu", "rmsnorm": "rms_norm", "layernorm": "layer_norm"}


def start(config: Config) -> tuple[train.Run, train.Batch]:
    """A run without data or a directory, and a batch of random ids."""
    device, dtype = choose_device(config)
    kernels.use(config.kernels)
    torch.manual_seed(0)  # the same losses for all, but for rounding
    model = build_model(config, device, dtype, None)
    for p in model.parameters():
        # init_weights draws on the CPU, a minute for numbers that do not matter here.
        if p.dim() > 1:
            p.data.normal_(std=config.initializer_range)
    run = train.Run(config, SimpleNamespace(sources=["random"]), [], model,
                    train.make_optimizers(config, model), device)
    n = config.global_batch_size
    sequences = np.zeros(n, sequence_dtype(config.seq_len, config.vocab_size))
    sequences["token_ids"] = np.random.default_rng(0).integers(
        config.vocab_size, size=(n, config.seq_len + 1))
    return run, train.Batch(Visit(0, 0, 0, 1), np.arange(n), sequences)


def time_steps(config: Config, operation: str, steps: int) -> dict:
    """Seconds of a step (the median) and their spread, tokens/s, MFU and peak memory."""
    # The model before must be gone, and the compiler holds on to it.
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    times, without = [], contextlib.nullcontext()
    if operation:  # its reference in the place of its kernel
        file, name = sys.modules[f"kernels.{operation}"], OPERATIONS[operation]
        without = patch.object(file, f"{name}_triton", getattr(file, f"{name}_reference"))
    with without:
        run, batch = start(config)
        for _ in range(steps):
            begin = time.perf_counter()
            record = train.train_step(run, batch, 1e-5)  # it waits for the GPU
            times.append(time.perf_counter() - begin)
    later = times[steps // 5 :]  # the first one compiles, and allocates
    seconds = statistics.median(later)
    return {"seconds": round(seconds, 5), "spread": f"{(max(later) - min(later)) / seconds:.1%}",
            **train.speed(run, seconds),
            "loss": round(record["loss"], 4), "first_step_s": round(times[0], 1)}


def measure(smoke: bool) -> Iterator[dict]:
    small = ["--hidden_size=64", "--intermediate_size=48", "--num_attention_heads=1", "--seq_len=8",
             "--vocab_size=40", "--base_hidden_size=0", "--dtype=float32", "--device=cpu"]
    memory = 0 if smoke else torch.cuda.get_device_properties(0).total_memory
    # 16 bytes of weight, gradient and moments for each of a layer's 202M parameters; 12 GB for
    # embedding, head and activations.
    layers = max(1, min(32, int((0.92 * memory - 12e9) / 3.3e9)))
    for network, others in (("amber_7b", ("rope", "swiglu", "rmsnorm")),
                            ("crystal_7b_stage1", ("layernorm",))):
        seconds: dict[str, list[float]] = {}
        plan = [("triton", True, ""), ("torch", True, ""), *(("triton", True, x) for x in others),
                ("triton", True, ""), ("triton", False, ""), ("torch", False, "")]
        for choice, compiled, operation in plan:
            batch = 1 if smoke else 4
            config, _ = load([f"configs/{network}.py", *(small if smoke else [])])
            config = dataclasses.replace(
                config, kernels=choice, num_hidden_layers=layers, activation_checkpointing="full",
                global_batch_size=batch, micro_batch_size=batch, compile=compiled and not smoke)
            row = {"network": network, "layers": layers, "kernels": choice, "without": operation,
                   "compile": compiled}
            try:
                row |= time_steps(config, operation, steps=1 if smoke else 6)
                if choice == "triton" and compiled:
                    seconds.setdefault(operation, []).append(row["seconds"])
            except Exception as error:  # the others are to be measured all the same
                row["failed"] = f"{error!r}"[:300]
            yield row
            if operation == "" and len(whole := seconds.get("", ())) == 2 and compiled:
                base = statistics.fmean(whole)
                yield {"network": network, "noise": f"{abs(whole[0] - whole[1]) / base:.1%}",
                       "pays": {x: f"{seconds[x][0] / base - 1:.1%}" for x in seconds if x}}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    for row in measure(parser.parse_args(argv).smoke):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    run_command(main)
