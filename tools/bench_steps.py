"""Training steps of the 7B, as train.py makes them, on one GPU: a JSON object for each kind.

    python tools/gpu.py steps    # the same, as a table

Eager and compiled, with Triton's and with PyTorch's kernels; then compiled with one operation at a
time left to torch.compile: `pays` is by how much the step gets longer without the Triton kernel.
What pays less than 1 % need not be there. The network has the layers that fit the GPU's memory (32,
or 16 on 80 GB). Its weights are random numbers of the right size; train_step is train.py's own.
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
from dry_run import measure_memory  # noqa: E402

import checkpoint  # noqa: E402
import train  # noqa: E402
from configs import Config, UserError, load, run_command  # noqa: E402
from data import Visit, sequence_dtype  # noqa: E402
from model import choose_device, choose_kernels  # noqa: E402
from parallel import build_model  # noqa: E402

# file of kernels/, its function in Triton -> in PyTorch
OPERATIONS = {"rope": ("rope_triton", "rope_reference"),
              "swiglu": ("swiglu_triton", "swiglu_reference"),
              "rmsnorm": ("rms_norm_triton", "rms_norm_reference"),
              "layernorm": ("layer_norm_triton", "layer_norm_reference")}


def by_pytorch(operation: str) -> contextlib.AbstractContextManager:
    """One operation of kernels/ left to PyTorch, and so to torch.compile."""
    if not operation:
        return contextlib.nullcontext()
    file, (ours, theirs) = sys.modules[f"kernels.{operation}"], OPERATIONS[operation]
    return patch.object(file, ours, getattr(file, theirs))


def start(config: Config) -> tuple[train.TrainState, train.Batch]:
    """A run without data or a directory, and a batch of random ids."""
    device, dtype = choose_device(config)
    choose_kernels(config.kernels)
    model = build_model(config, device, dtype, None)
    torch.manual_seed(0)  # the same losses for all, but for rounding
    for p in model.parameters():
        # init_weights draws on the CPU, a minute for numbers that do not matter here.
        if p.dim() > 1:
            p.data.normal_(std=config.initializer_range)
    optimizer = train.make_optimizer(config, model)
    checkpoint.init_optimizer_state(optimizer)
    data = SimpleNamespace(sources=["random"])
    run = train.TrainState(config, data, [], model, model, optimizer, device,
                           train.peak_flops(config, device, dtype))
    n = config.global_batch_size
    sequences = np.zeros(n, sequence_dtype(config.seq_len, config.vocab_size))
    sequences["token_ids"] = np.random.default_rng(0).integers(
        config.vocab_size, size=(n, config.seq_len + 1))
    return run, train.Batch(Visit(0, 0, 0, 1), 0, np.arange(n), sequences)


def time_steps(config: Config, operation: str, steps: int) -> dict:
    """Seconds of a step (the median), tokens/s, MFU and peak memory."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    # The model before must be gone, and the compiler holds on to it.
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with by_pytorch(operation):
        run, batch = start(config)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(steps):
            synchronize()
            begin = time.perf_counter()
            record = train.train_step(run, batch, 1e-5)
            synchronize()
            times.append(time.perf_counter() - begin)
    # The first ones compile, and allocate.
    seconds = statistics.median(times[steps // 5 :])
    return {"seconds": round(seconds, 5), **train.speed(run, seconds),
            "loss": round(record["loss"], 4), "first_step_s": round(times[0], 1)}


def measure(smoke: bool) -> Iterator[dict]:
    small = ["--hidden_size=64", "--intermediate_size=48", "--num_attention_heads=1", "--seq_len=8",
             "--vocab_size=40", "--base_hidden_size=0", "--dtype=float32", "--device=cpu"]
    memory = 0 if smoke else torch.cuda.get_device_properties(0).total_memory
    layers = 1 if smoke else 32 if memory > 130e9 else 16
    eager, compiled = {"compile": False}, {"compile": not smoke}
    plan = [("amber_7b", "triton", eager, ""), ("amber_7b", "torch", eager, ""),
            ("amber_7b", "triton", compiled, ""), ("amber_7b", "torch", compiled, ""),
            ("amber_7b", "triton", compiled, "rope"), ("amber_7b", "triton", compiled, "swiglu"),
            ("amber_7b", "triton", compiled, "rmsnorm"),
            ("crystal_7b_stage1", "triton", compiled, ""),
            ("crystal_7b_stage1", "triton", compiled, "layernorm")]
    whole: dict[str, float] = {}  # seconds of the compiled step with all kernels, by network
    for network, kernels, mode, operation in plan:
        batch = 1 if smoke else 4
        config, _ = load([f"configs/{network}.py", *(small if smoke else [])])
        config = dataclasses.replace(
            config, kernels=kernels, num_hidden_layers=layers, activation_checkpointing="full",
            global_batch_size=batch, micro_batch_size=batch, **mode)
        row = {"network": network, "layers": layers, "kernels": kernels, **mode,
               "without": operation}
        try:
            row |= time_steps(config, operation, steps=1 if smoke else 10)
        except Exception as error:  # the others are to be measured all the same
            row["failed"] = f"{error!r}"[:300]
        if kernels == "triton" and not operation:  # the compiled one comes last
            whole[network] = row.get("seconds", float("nan"))
        if operation and "seconds" in row:
            row["pays"] = f"{row['seconds'] / whole[network] - 1:.1%}"
        yield row
    choose_kernels("triton")
    kinds = measure_memory(config, torch.float32 if smoke else torch.bfloat16, 1)
    yield {"network": network, "layers": layers,
           "dry_run_memory_gb": round(sum(kinds.values()) / 1e9, 3)}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    args = parser.parse_args(argv)
    if not (args.smoke or torch.cuda.is_available()):
        raise UserError("This measures on a CUDA GPU, and there is none.")
    for row in measure(args.smoke):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    run_command(main)
