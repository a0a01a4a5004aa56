"""Time every kernel beside its rivals on one GPU; prints a JSON object for each.

    python tools/bench_kernels.py [--sweep] [--smoke]

Ours, PyTorch's formula, torch.compile of it, and PyTorch's fused operation get the same inputs at
the shapes of Amber 7B and Crystal 7B, in bf16 with fp32 norm weights as in training. A time is
triton.testing.do_bench's median. The rate is of both
passes: bytes with each input read once and each output written once, FLOPs of attention in the
causal half, with 5 products backward. `of_ceiling` is relative to a large copy or matrix product on
this machine, `ratio` the rival's time over ours. First ours must agree with the formula, and give
the same bits 30 times.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kernels  # noqa: E402
from configs import ModelConfig, load, run_command  # noqa: E402
from kernels.attention import SWEEP, tiles  # noqa: E402
from kernels.cross_entropy import linear_cross_entropy_reference  # noqa: E402
from kernels.layernorm import layer_norm_reference  # noqa: E402
from kernels.rmsnorm import rms_norm_reference  # noqa: E402
from kernels.rope import rope_reference  # noqa: E402
from kernels.swiglu import swiglu_reference  # noqa: E402
from model import rotary_table  # noqa: E402


@dataclass
class Case:
    """One operation at one shape: ours first among `rivals`, PyTorch's formula second."""

    name: str
    inputs: tuple[Tensor, ...]
    rivals: dict[str, Callable]
    work: float  # of both passes: FLOPs, or bytes moved where `unit` is "TB/s"
    unit: str = "TB/s"


def seconds(run: Callable) -> float:
    """The median time of one call, with the L2 cache emptied before; 1.0 without a GPU."""
    if torch.cuda.is_available():
        return do_bench(run, return_mode="median") / 1e3
    run()
    return 1.0


def measure_ceilings(smoke: bool, device: str) -> dict[str, float]:
    """What this machine reaches in a large matrix product and in a large copy, by unit."""
    n, m = (1 << 16, 64) if smoke else (1 << 29, 8192)
    a, b = torch.randn(2, m, m, device=device, dtype=torch.bfloat16)
    x, y = torch.zeros(2, n, dtype=torch.float32, device=device)
    return {"TFLOP/s": 2 * m**3 / seconds(lambda: a @ b) / 1e12,
            "TB/s": 8 * n / seconds(lambda: y.copy_(x)) / 1e12}


def cases(B: int, T: int, c: ModelConfig, make: Callable) -> Iterator[Case]:
    """Every operation at the shapes of a network, attention first."""
    def sdpa(backend: SDPBackend) -> Callable:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return run

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)

    q, k, v = (make(B, T, c.num_attention_heads, c.head_dim) for _ in "qkv")
    rivals = {"ours": kernels.attention, "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
              "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION)}
    if q.is_cuda:
        compiled = torch.compile(flex_attention, dynamic=False)
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, q.device)
        rivals["FlexAttention"] = flex
    yield Case("attention", (q, k, v), rivals, 3.5 * 2 * q.numel() * T, "TFLOP/s")
    cos, sin = rotary_table(c, 0, T, q.device)
    how = {"cos": cos, "sin": sin, "interleaved": c.rotary_interleaved}
    yield Case("rope", (q, k), {"ours": partial(kernels.rope, **how),
                                "formula": partial(rope_reference, **how)}, 8 * q.nbytes)
    x = make(B, T, c.hidden_size)
    w, b = (make(c.hidden_size).detach().float().requires_grad_() for _ in "wb")
    yield Case("rms_norm", (x, w), {"ours": partial(kernels.rms_norm, eps=1e-6),
                                    "formula": partial(rms_norm_reference, eps=1e-6)}, 5 * x.nbytes)
    yield Case("layer_norm", (x, w, b), {
        "ours": partial(kernels.layer_norm, eps=1e-6),
        "formula": partial(layer_norm_reference, eps=1e-6)}, 5 * x.nbytes)
    gate, up = make(B, T, c.intermediate_size), make(B, T, c.intermediate_size)
    yield Case("swiglu", (gate, up), {"ours": kernels.swiglu, "formula": swiglu_reference},
               8 * gate.nbytes)
    x, w = make(B * T, c.hidden_size), make(c.vocab_size, c.hidden_size)
    w = (w * 0.02).detach().requires_grad_()
    targets = torch.randint(c.vocab_size, (B * T,), device=x.device)
    # Ours computes the gradients in its forward pass.
    yield Case("linear_cross_entropy", (x, w), {
        "ours": lambda x, w: kernels.linear_cross_entropy(x, w, targets)[0],
        "formula": lambda x, w: linear_cross_entropy_reference(x, w, targets)[0]},
        6 * x.numel() * c.vocab_size, "TFLOP/s")


def passes(case: Case, run: Callable) -> tuple[tuple[Tensor, ...], Callable]:
    """The outputs of a forward pass, and a function that makes the backward pass of them, with the
    same random gradients at every call."""
    outputs = run(*case.inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.manual_seed(0)
    gradients = [torch.randn_like(y) for y in outputs]
    return outputs, lambda: torch.autograd.grad(outputs, case.inputs, gradients, retain_graph=True)


def verify(case: Case, times: int) -> None:
    """Ours against the second rival, forward and gradients; and against itself, bit for bit."""
    def everything(run: Callable) -> list[Tensor]:
        outputs, backward = passes(case, run)
        return [*outputs, *backward()]

    ours, rival = list(case.rivals.values())[:2]
    first, other = everything(ours), everything(rival)
    for _ in range(times - 1):
        if not all(torch.equal(a, b) for a, b in zip(first, everything(ours))):
            raise ValueError("two runs of one kernel gave different bits")
    # Both are computed in bf16. tests/test_kernels.py makes the sharp comparison, with float64.
    for a, b in zip(first, other):
        if not (a.double() - b.double()).norm() < 0.05 * b.double().norm():
            raise ValueError("ours is more than 5 % away from the formula")


def time_passes(case: Case, run: Callable) -> dict[str, float]:
    """Microseconds of the forward and of the backward pass."""
    _, backward = passes(case, run)  # one graph, which each backward pass walks again
    return {"forward_us": round(1e6 * seconds(lambda: run(*case.inputs)), 1),
            "backward_us": round(1e6 * seconds(backward), 1)}


def time_case(case: Case, ceilings: dict[str, float], network: str) -> Iterator[dict]:
    """One row per rival."""
    if torch.cuda.is_available() and "formula" in case.rivals:
        # Not max-autotune, which takes a minute for the head alone.
        case.rivals["torch.compile"] = torch.compile(case.rivals["formula"], dynamic=False)
    ours = float("nan")
    for rival, run in case.rivals.items():
        row = {"network": network, "what": case.name, "who": rival}
        try:
            if rival == "ours":
                verify(case, 30 if torch.cuda.is_available() else 2)
            times = time_passes(case, run)
        except Exception as error:  # the others are to be measured all the same
            # Some backends of SDPA do not take every shape and every GPU.
            yield row | {"failed" if rival == "ours" else "left_out": str(error)[:300]}
            continue
        total = sum(times.values())
        ours = total if rival == "ours" else ours
        rate = case.work / total / 1e6
        of_ceiling = round(rate / ceilings[case.unit], 2)
        yield row | times | {"rate": round(rate, 2), "unit": case.unit, "of_ceiling": of_ceiling,
                             "ratio": round(total / ours, 2)}


def sweep(case: Case) -> Iterator[dict]:
    """Attention once per alternative tile."""
    table, _ = tiles(case.inputs[0])  # this GPU's
    for kernel, others in SWEEP.items():
        for tile in others:
            row = {"kernel": kernel, "tile": str(tile), "frozen": tile == table[kernel]}
            try:
                with patch.dict(table, {kernel: tile}):
                    verify(case, 2)  # a tile that computes something else is no candidate
                    row |= time_passes(case, case.rivals["ours"])
            except Exception as error:
                row["failed"] = f"{error!r}"[:300]
            yield row


def measure(smoke: bool, sweeping: bool) -> Iterator[dict]:
    # Compiled backwards free their inputs unless told that there will be another one.
    torch._functorch.config.donated_buffer = False
    torch.manual_seed(0)
    kernels.use("triton")
    device = "cpu" if smoke else "cuda"
    ceilings = measure_ceilings(smoke, device)
    yield {f"ceiling, {unit}": round(rate, 2) for unit, rate in ceilings.items()}

    def make(*shape: int) -> Tensor:
        # Triton's interpreter, in which --smoke runs, has no bf16.
        dtype = torch.float32 if smoke else torch.bfloat16
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

    small = ["--hidden_size=64", "--intermediate_size=48", "--num_attention_heads=1",
             "--vocab_size=40", "--base_hidden_size=0"] if smoke else []
    B, T = (1, 16) if smoke else (4, 2048)
    for network in ("amber_7b", "crystal_7b_stage1"):
        config, _ = load([f"configs/{network}.py", *small])
        if sweeping:
            yield from sweep(next(cases(B, T, config, make)))
            return  # the two have the same heads
        for case in cases(B, T, config, make):
            yield from time_case(case, ceilings, network)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("--sweep", "--smoke"):  # other tiles of attention; tiny shapes on the CPU
        parser.add_argument(name, action="store_true")
    args = parser.parse_args(argv)
    for row in measure(args.smoke, args.sweep):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    run_command(main)
