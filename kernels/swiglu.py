"""SwiGLU's product, forward and backward.

    y = silu(gate) up,  silu(z) = z σ(z)                                   (arXiv 2002.05202, eq. 6)

    dup = dy silu(gate)          dgate = dy up σ(gate) (1 + gate (1 - σ(gate)))

Element by element, so the bytes moved take the time: forward reads two tensors and writes one,
backward reads three and writes two. PyTorch's two operations also write silu(gate) and keep it for
the backward pass; here only gate and up are kept, and σ is computed again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.lang import tl, triton

# Elements per program: 16 for each thread of 8 warps, two 16-byte loads of bf16 from each input.
BLOCK = 4096


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` in PyTorch."""
    return F.silu(gate) * up


@triton.jit
def _forward_kernel(gate, up, y, count, BLOCK: tl.constexpr):
    # 64-bit positions: 48,000 tokens of 11,008 are already a quarter of the range of 32 bits.
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(dy, gate, up, dgate, dup, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    sigma = tl.sigmoid(g)
    # d silu(z)/dz = σ + z σ (1 - σ)
    dg = d * u * sigma * (1 + g * (1 - sigma))
    tl.store(dgate + at, dg.to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + at, (d * g * sigma).to(dup.dtype.element_ty), mask=inside)


@torch.library.custom_op("kernels::swiglu", mutates_args=())
def _forward(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    grid = (triton.cdiv(y.numel(), BLOCK),)
    _forward_kernel[grid](gate, up, y, y.numel(), BLOCK=BLOCK, num_warps=8)
    return y


@_forward.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("kernels::swiglu_backward", mutates_args=())
def _backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    # Not in place: autograd may need gate and up for another backward pass.
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    grid = (triton.cdiv(dy.numel(), BLOCK),)
    _backward_kernel[grid](dy, gate, up, dgate, dup, dy.numel(), BLOCK=BLOCK, num_warps=8)
    return dgate, dup


@_backward.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.ops.kernels.swiglu(gate, up)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.kernels.swiglu_backward(dy, *ctx.saved_tensors)


def swiglu_triton(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` by the kernels above."""
    return _SwiGLU.apply(gate, up)
