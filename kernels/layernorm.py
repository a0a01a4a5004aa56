"""LayerNorm, forward and backward: Crystal's norm.

    rstd = 1 / sqrt(var(x) + eps)    x̂ = (x - mean(x)) rstd    y = x̂ w + b    (arXiv 1607.06450)

    g = dy w      dx = rstd (g - mean(g) - x̂ mean(g x̂))      dw = sum of dy x̂      db = sum of dy

Tiled as in rmsnorm.py: forward, one program per row; backward, a fixed number of programs share the
rows, and each keeps its own sums for dw and db, which are then added in a fixed order.

    x  (..., N)        weight, bias  (N,)        mean, rstd  one fp32 per row
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.lang import tl, triton
from kernels.rmsnorm import PROGRAMS, row_launch


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`layer_norm` by PyTorch's own, in fp32 at least and rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return y.to(x.dtype)


@triton.jit
def _forward_kernel(x, weight, bias, y, mean, rstd, N, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < N
    x_row = tl.load(x + row * N + cols, mask=inside, other=0.0).to(tl.float32)
    mu = tl.sum(x_row, 0) / N
    # The row is in registers, so the variance is taken about the mean, not as E[x²] - E[x]².
    centered = tl.where(inside, x_row - mu, 0.0)
    # The variance is divided by N and not by N - 1, as everywhere in layer normalization.
    r = tl.rsqrt(tl.sum(centered * centered, 0) / N + eps)
    tl.store(mean + row, mu)
    tl.store(rstd + row, r)
    w = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * N + cols, (centered * r * w + b).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(dy, x, weight, mean, rstd, dx, dw, db, rows, N, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    inside = cols < N
    w = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    # Two running sums over this program's rows, one per parameter.
    dw_sum = tl.zeros([BLOCK], tl.float32)
    db_sum = tl.zeros([BLOCK], tl.float32)
    for row in tl.range(program, rows, tl.num_programs(0), num_stages=3):
        at = tl.cast(row, tl.int64) * N + cols
        r = tl.load(rstd + row)
        x_hat = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - tl.load(mean + row)) * r
        dy_row = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        dw_sum += dy_row * x_hat
        db_sum += dy_row
        # Past the row's end dy is 0, and so is g: x̂ needs no mask of its own.
        g = dy_row * w
        dx_row = (g - tl.sum(g, 0) / N - x_hat * (tl.sum(g * x_hat, 0) / N)) * r
        tl.store(dx + at, dx_row.to(dx.dtype.element_ty), mask=inside)
    tl.store(dw + program.to(tl.int64) * N + cols, dw_sum, mask=inside)
    tl.store(db + program.to(tl.int64) * N + cols, db_sum, mask=inside)


@torch.library.custom_op("kernels::layer_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """-> y, mean, rstd."""
    x = x.contiguous()
    N = x.shape[-1]
    rows = x.numel() // N
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    _forward_kernel[(rows,)](x, weight, bias, y, mean, rstd, N, eps, **row_launch(N))
    return y, mean, rstd


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[:-1].numel()
    return (x.new_empty(x.shape), x.new_empty(rows, dtype=torch.float32),
            x.new_empty(rows, dtype=torch.float32))


@torch.library.custom_op("kernels::layer_norm_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
              ) -> tuple[Tensor, Tensor, Tensor]:
    """-> the gradients of x, weight, bias; the bias has the weight's dtype."""
    dy, x = dy.contiguous(), x.contiguous()
    N = x.shape[-1]
    rows = x.numel() // N
    programs = min(rows, PROGRAMS)
    dx = torch.empty_like(x)
    dw, db = (x.new_empty(programs, N, dtype=torch.float32) for _ in range(2))
    _backward_kernel[(programs,)](dy, x, weight, mean, rstd, dx, dw, db, rows, N, **row_launch(N))
    return dx, dw.sum(0).to(weight.dtype), db.sum(0).to(weight.dtype)


@_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
      ) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight), torch.empty_like(weight)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rstd = torch.ops.kernels.layer_norm(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *torch.ops.kernels.layer_norm_backward(dy, *ctx.saved_tensors), None


def layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`layer_norm` by the kernels above."""
    return _LayerNorm.apply(x, weight, bias, eps)
