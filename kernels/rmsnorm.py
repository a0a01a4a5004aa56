"""RMSNorm, forward and backward.

    rstd = 1 / sqrt(mean(x²) + eps)      x̂ = x rstd      y = x̂ w       (arXiv 1910.07467, eq. 4)

    g = dy w        dx = rstd (g - x̂ mean(g x̂))           dw = sum over rows of dy x̂

There is little arithmetic, so the bytes moved take the time: a row is read and written once.
Forward: one program per row, with the row in registers, statistics in fp32 and one rounding at the
end. Backward: a fixed number of programs share the rows. Each keeps its own sum for dw in registers
and writes it once, and the partial sums are added in a fixed order: no atomics, the same bits in
every run.

    x  (..., N)        weight  (N,)        rstd  one fp32 per row
"""

import torch
from torch import Tensor

from kernels.lang import tl, triton

# Programs of the backward pass. A constant and not the GPU's SM count, because each program sums
# its own rows of dw: another count means another order of additions and other bits. 264 is two
# programs for each of the 132 SMs of an H100 or H200, which fit at 4096 columns; other GPUs run it
# too.
PROGRAMS = 264
# A row is in one program's registers; at 16384 columns the backward pass spills some.
MAX_COLUMNS = 8192


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` written as its formula; autograd keeps fp32 copies of x for it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * weight).to(x.dtype)


@triton.jit
def _forward_kernel(x, weight, y, rstd, N, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    # A block is a power of two; columns past N load as zeros and add nothing to the sums.
    cols = tl.arange(0, BLOCK)
    inside = cols < N
    x_row = tl.load(x + row * N + cols, mask=inside, other=0.0).to(tl.float32)
    # rstd is kept for the backward pass: 4 bytes a row instead of a second reduction.
    r = tl.rsqrt(tl.sum(x_row * x_row, 0) / N + eps)
    tl.store(rstd + row, r)
    w = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * N + cols, (x_row * r * w).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(dy, x, weight, rstd, dx, dw, rows, N, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    inside = cols < N
    w = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    dw_sum = tl.zeros([BLOCK], tl.float32)
    # Neighbouring programs take neighbouring rows; num_stages prefetches the next ones.
    for row in tl.range(program, rows, tl.num_programs(0), num_stages=3):
        at = tl.cast(row, tl.int64) * N + cols
        x_hat = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * tl.load(rstd + row)
        # dw is summed over this program's rows, in registers.
        dy_row = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        dw_sum += dy_row * x_hat
        g = dy_row * w
        dx_row = (g - x_hat * (tl.sum(g * x_hat, 0) / N)) * tl.load(rstd + row)
        tl.store(dx + at, dx_row.to(dx.dtype.element_ty), mask=inside)
    tl.store(dw + program.to(tl.int64) * N + cols, dw_sum, mask=inside)


def row_launch(N: int) -> dict[str, int]:
    """The block that holds a row of N, and 16 elements of it per thread."""
    block = triton.next_power_of_2(N)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


@torch.library.custom_op("kernels::rms_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> y, rstd."""
    x = x.contiguous()
    N = x.shape[-1]
    rows = x.numel() // N
    y, rstd = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    _forward_kernel[(rows,)](x, weight, y, rstd, N, eps, **row_launch(N))
    return y, rstd


@_forward.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@torch.library.custom_op("kernels::rms_norm_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """-> the gradients of x and weight."""
    dy, x = dy.contiguous(), x.contiguous()
    N = x.shape[-1]
    rows = x.numel() // N
    programs = min(rows, PROGRAMS)
    dx, dw = torch.empty_like(x), x.new_empty(programs, N, dtype=torch.float32)
    _backward_kernel[(programs,)](dy, x, weight, rstd, dx, dw, rows, N, **row_launch(N))
    # (programs, N) -> (N,): PyTorch's sum has a fixed order, too.
    return dx, dw.sum(0).to(weight.dtype)


@_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = torch.ops.kernels.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = torch.ops.kernels.rms_norm_backward(dy, *ctx.saved_tensors)
        return dx, dw, None


class _RMSNormTorch(torch.autograd.Function):
    """The same formulas in few PyTorch operations, saving only x and rstd; used on CPUs."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        y = wide * rstd * weight
        # No mul_, and no cast to the type that y already has: both return an alias of a tensor, for
        # which torch.compile of PyTorch 2.11 gives the backward pass wrong tensors.
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        x_hat, dy = x.to(rstd.dtype) * rstd, dy.to(rstd.dtype)
        dy_x_hat = dy * x_hat
        # mean(g x̂) = (dy x̂) · w / N, a matrix-vector product instead of another pass.
        mean = (dy_x_hat @ weight.to(rstd.dtype)).unsqueeze(-1).div_(x.shape[-1])
        dx = (dy * weight).addcmul_(x_hat, mean, value=-1).mul_(rstd)
        return dx.to(x.dtype), dy_x_hat.flatten(0, -2).sum(0).to(weight.dtype), None


def unsupported(x: Tensor) -> str:
    """Why the Triton kernels cannot take these rows, or ""."""
    if x.shape[-1] > MAX_COLUMNS:
        return f"a norm in Triton has rows of at most {MAX_COLUMNS}, not {x.shape[-1]}"
    return ""


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in PyTorch with its own backward; differentiable once."""
    return _RMSNormTorch.apply(x, weight, eps)


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` by the kernels above."""
    return _RMSNorm.apply(x, weight, eps)
