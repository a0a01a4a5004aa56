"""Every kernel beside its rivals on one GPU: a JSON object for each time, as soon as it is known.

    python tools/gpu.py kernels sweep    # the same, as a table

Ours, PyTorch's formula, torch.compile of it, and what PyTorch has fused get the same inputs at the
shapes of Amber 7B and Crystal 7B, in bf16 with fp32 norm weights as in training. The time is a
median between two CUDA events, with the L2 cache flushed before each run. Bytes count each input
read once and each output written once. FLOPs of attention count the causal half, and its backward
pass as 5 products. `of_ceiling` compares with a large copy or a large matrix product that is
measured first. `ratio` is the rival's time over ours: above 1, ours is faster. Before anything is
timed, ours must agree with PyTorch's formula and give the same bits 30 times.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kernels  # noqa: E402
from configs import ModelConfig, UserError, load, run_command  # noqa: E402
from kernels.attention import HOPPER  # noqa: E402
from kernels.cross_entropy import linear_cross_entropy_reference  # noqa: E402
from kernels.layernorm import layer_norm_reference  # noqa: E402
from kernels.rmsnorm import rms_norm_reference  # noqa: E402
from kernels.rope import rope_reference  # noqa: E402
from kernels.swiglu import swiglu_reference  # noqa: E402
from model import rotary_table  # noqa: E402

# Tiles worth a try, (BLOCK_M, BLOCK_N, warps, stages). All compile without spilling.
SWEEP = {
    "forward": [(128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2)],
    "dkdv": [(64, 64, 4, 2), (64, 64, 8, 2), (64, 128, 8, 2)],
    "dq": [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3)],
}


@dataclass
class Case:
    """One operation at one shape: ours first among `rivals`, PyTorch's formula second."""

    name: str
    inputs: tuple[Tensor, ...]
    rivals: dict[str, Callable]
    forward: float  # FLOPs, or bytes moved where `unit` is "TB/s"
    backward: float
    unit: str = "TB/s"


class Clock:
    """Medians, and the two ceilings of this machine."""

    def __init__(self, smoke: bool) -> None:
        self.device = "cpu" if smoke else "cuda"
        self.repetitions, self.warm_up = (1, 0) if smoke else (30, 3)
        # Writing 1 GB empties L2 and takes long enough for the host to queue what is timed.
        self.flush = torch.empty(1 if smoke else 1 << 30, dtype=torch.int8, device=self.device)
        n, m = (1 << 16, 64) if smoke else (1 << 29, 8192)
        a, b = torch.randn(2, m, m, device=self.device, dtype=torch.bfloat16)
        x, y = torch.zeros(2, n, dtype=torch.float32, device=self.device)
        self.ceiling = {"TFLOP/s": 2 * m**3 / self.seconds(lambda: a @ b) / 1e12,
                        "TB/s": 8 * n / self.seconds(lambda: y.copy_(x)) / 1e12}

    def seconds(self, run: Callable) -> float:
        # The GPU stamps an event when it gets there, so a host that lags behind would be timed,
        # too: the flush before it gives the host time to queue the run.
        times = []
        for i in range(self.warm_up + self.repetitions):
            self.flush.zero_()
            if self.device == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                end.synchronize()
                elapsed = start.elapsed_time(end) / 1e3
            else:
                began = time.perf_counter()
                run()
                elapsed = time.perf_counter() - began
            if i >= self.warm_up:  # the first runs compile and allocate
                times.append(elapsed)
        return statistics.median(times)


def attention_case(B: int, T: int, c: ModelConfig, make: Callable) -> Case:
    def sdpa(backend: SDPBackend) -> Callable:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)
        return run

    H, D = c.num_attention_heads, c.head_dim
    flops = 2 * 2 * B * H * T * T * D / 2
    rivals = {"ours": kernels.attention, "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
              "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION)}
    return Case("attention", tuple(make(B, T, H, D) for _ in "qkv"), rivals, flops, 2.5 * flops,
                "TFLOP/s")


def cases(B: int, T: int, c: ModelConfig, make: Callable) -> Iterator[Case]:
    """Every operation at the shapes of a network."""
    yield attention_case(B, T, c, make)
    x = make(B, T, c.hidden_size)
    w, b = (make(c.hidden_size).detach().float().requires_grad_() for _ in "wb")
    n = x.nbytes
    if c.norm == "rmsnorm":
        yield Case("rms_norm", (x, w), {
            "ours": lambda x, w: kernels.rms_norm(x, w, 1e-6),
            "formula": lambda x, w: rms_norm_reference(x, w, 1e-6),
            "F.rms_norm": lambda x, w: F.rms_norm(x, w.shape, w.to(x.dtype), 1e-6)}, 2 * n, 3 * n)
    else:
        yield Case("layer_norm", (x, w, b), {
            "ours": lambda x, w, b: kernels.layer_norm(x, w, b, 1e-6),
            "formula": lambda x, w, b: layer_norm_reference(x, w, b, 1e-6),
            "F.layer_norm": lambda x, w, b: F.layer_norm(
                x, w.shape, w.to(x.dtype), b.to(x.dtype), 1e-6)}, 2 * n, 3 * n)
    gate, up = make(B, T, c.intermediate_size), make(B, T, c.intermediate_size)
    yield Case("swiglu", (gate, up), {"ours": kernels.swiglu, "formula": swiglu_reference},
               3 * gate.nbytes, 5 * gate.nbytes)
    q, k = (make(B, T, c.num_attention_heads, c.head_dim) for _ in "qk")
    tables = rotary_table(c, 0, T, x.device)
    yield Case("rope", (q, k), {
        "ours": lambda q, k: kernels.rope(q, k, *tables, c.rotary_interleaved),
        "formula": lambda q, k: rope_reference(q, k, *tables, c.rotary_interleaved)},
        4 * q.nbytes, 4 * q.nbytes)
    x, w = make(B * T, c.hidden_size), make(c.vocab_size, c.hidden_size)
    w = (w * 0.02).detach().requires_grad_()
    targets = torch.randint(c.vocab_size, (B * T,), device=x.device)
    flops = 2 * B * T * c.hidden_size * c.vocab_size
    # Ours computes the gradients in its forward pass: compare the sums of the two.
    yield Case("linear_cross_entropy", (x, w), {
        "ours": lambda x, w: kernels.linear_cross_entropy(x, w, targets)[0],
        "formula": lambda x, w: linear_cross_entropy_reference(x, w, targets)[0]},
        3 * flops, 0, "TFLOP/s")


def verify(case: Case, times: int) -> None:
    """Ours against the second rival, forward and gradients; and against itself, bit for bit."""
    def everything(run: Callable) -> list[Tensor]:
        torch.manual_seed(0)
        y = run(*case.inputs)
        ys = y if isinstance(y, tuple) else (y,)
        return [*ys, *torch.autograd.grad(ys, case.inputs, [torch.randn_like(y) for y in ys])]

    ours, theirs = list(case.rivals.values())[:2]
    first, other = everything(ours), everything(theirs)
    for _ in range(times - 1):
        if not all(torch.equal(a, b) for a, b in zip(first, everything(ours))):
            raise UserError(f"{case.name}: two runs of one kernel gave different bits.")
    error = max(((a.double() - b.double()).norm() / b.double().norm()).item()
                for a, b in zip(first, other))
    # These are two computations of one thing in bf16. The sharp comparison, with float64, is in
    # tests/test_kernels.py.
    if not error < 0.05:
        raise UserError(f"{case.name}: ours is {error:.1e} away from the formula, and 0.05 is"
                        " allowed: run python -m pytest tests/test_kernels.py.")


def passes(case: Case, run: Callable) -> dict[str, Callable]:
    """What is timed: {"forward": ..., "backward": ...}."""
    # The graph of one forward pass is kept, and each timed backward pass walks it again.
    y = run(*case.inputs)
    ys = y if isinstance(y, tuple) else (y,)
    dys = [torch.randn_like(y) for y in ys]
    return {"forward": lambda: run(*case.inputs),
            "backward": lambda: torch.autograd.grad(ys, case.inputs, dys, retain_graph=True)}


def time_case(case: Case, clock: Clock, network: str) -> Iterator[dict]:
    """One row per rival and pass."""
    try:
        verify(case, 30 if clock.device == "cuda" else 2)
    except Exception as error:  # the others are to be measured all the same
        yield {"network": network, "what": case.name, "failed": f"{error!r}"[:300]}
        return
    if clock.device == "cuda" and "formula" in case.rivals:
        # Not max-autotune, which takes a minute for the head alone.
        case.rivals["torch.compile"] = torch.compile(case.rivals["formula"], dynamic=False)
    ours: dict[str, float] = {}
    for rival, run in case.rivals.items():
        row = {"network": network, "what": case.name, "who": rival}
        try:
            timed = {name: clock.seconds(f) for name, f in passes(case, run).items()}
        except RuntimeError as error:  # a backend that does not take this shape or this GPU
            yield row | {"left_out": str(error).splitlines()[0][:90]}
            continue
        timed["both"] = sum(timed.values())
        ours = ours or timed  # ours comes first, and every ratio is to it
        work = {"forward": case.forward, "backward": case.backward,
                "both": case.forward + case.backward}
        for name, seconds in timed.items():
            rate = work[name] / seconds / 1e12
            yield row | {"pass": name, "us": round(seconds * 1e6, 1), "rate": round(rate, 2),
                         "unit": case.unit, "of_ceiling": round(rate / clock.ceiling[case.unit], 2),
                         "ratio": round(seconds / ours[name], 2)}


def sweep(case: Case, clock: Clock) -> Iterator[dict]:
    """Attention once per alternative tile; the table in attention.py is restored afterwards."""
    for kernel, tiles in SWEEP.items():
        frozen, part = HOPPER[kernel], "forward" if kernel == "forward" else "backward"
        for tile in tiles:
            HOPPER[kernel] = tile
            row = {"kernel": kernel, "tile": str(tile), "frozen": tile == frozen, "timed": part}
            try:
                verify(case, 2)  # a tile that computes something else is no candidate
                seconds = clock.seconds(passes(case, case.rivals["ours"])[part])
                yield row | {"us": round(seconds * 1e6, 1)}
            except Exception as error:
                yield row | {"failed": f"{error!r}"[:300]}
        HOPPER[kernel] = frozen


def measure(smoke: bool, sweeping: bool) -> Iterator[dict]:
    # Compiled backwards free their inputs unless told that there will be another one.
    torch._functorch.config.donated_buffer = False
    torch.manual_seed(0)
    kernels.use("triton")
    clock = Clock(smoke)
    yield {f"ceiling, {unit}": round(rate, 2) for unit, rate in clock.ceiling.items()}

    def make(*shape: int) -> Tensor:
        # Triton's interpreter, in which --smoke runs, has no bf16.
        dtype = torch.float32 if smoke else torch.bfloat16
        return torch.randn(shape, device=clock.device, dtype=dtype).requires_grad_()

    small = ["--hidden_size=64", "--intermediate_size=48", "--num_attention_heads=1",
             "--vocab_size=40", "--base_hidden_size=0"] if smoke else []
    B, T = (1, 16) if smoke else (4, 2048)
    for network in ("amber_7b", "crystal_7b_stage1"):
        config, _ = load([f"configs/{network}.py", *small])
        if sweeping:
            yield from sweep(attention_case(B, T, config, make), clock)
            return  # the two have the same heads
        for case in cases(B, T, config, make):
            yield from time_case(case, clock, network)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="other tiles of attention")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    args = parser.parse_args(argv)
    if not (args.smoke or torch.cuda.is_available()):
        raise UserError("This measures on a CUDA GPU, and there is none: python tools/aot.py asks"
                        " the compiler alone.")
    for row in measure(args.smoke, args.sweep):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    run_command(main)
