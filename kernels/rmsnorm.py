"""RMSNorm, forward and backward; read this file before the others of kernels/.

    rstd = 1 / sqrt(mean(x²) + eps)      x̂ = x rstd      y = x̂ w       (arXiv 1910.07467, eq. 4)

    g = dy w        dx = rstd (g - x̂ mean(g x̂))           dw = sum over rows of dy x̂

LayerNorm (layernorm.py) is the same of x - mean(x), with a bias: one constant, MEAN, makes these
kernels compute it.

There is little arithmetic, so the bytes moved take the time: a row is read and written once.
Forward: one program per row, with the row in registers, statistics in fp32 and one rounding at the
end. Backward: a fixed number of programs share the rows. Each keeps its own sum for dw in registers
and writes it once, and the partial sums are added in a fixed order: no atomics, the same bits in
every run on the same kind of GPU.

    x  (..., N)      weight, bias  (N,)      stats  (1, rows) fp32: rstd; LayerNorm (2, rows): mean

A function with @triton.jit is a *kernel*. `kernel[(rows,)](...)` launches `rows` programs, each a
few hundred threads of the GPU, which all run the function; `tl.program_id(0)` tells them apart. A
tensor that is passed arrives as a pointer, and the kernel reads and writes blocks of elements
there. What is marked tl.constexpr is known to the compiler, which makes another kernel for each of
its values. Around the kernel PyTorch needs three things, here and in the other files:

    custom_op          gives the launch a name, as of an operation of PyTorch's own, into which
                       torch.compile does not look, and which a checkpointing policy can name
    register_fake      the shapes and dtypes of its results, without computing them
    autograd.Function  which operation computes the gradients, and what is kept for it
"""

from functools import lru_cache

import torch
from torch import Tensor

from kernels.lang import tl, triton

# A row is in one program's registers; at 16384 columns the backward pass spills some.
MAX_COLUMNS = 8192


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` written as its formula; autograd keeps fp32 copies of x for it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * weight).to(x.dtype)


@triton.jit
def _forward_kernel(x, weight, bias, y, stats, N, eps, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    # A block is a power of two; columns past N load as zeros and add nothing to the sums.
    cols = tl.arange(0, BLOCK)
    inside = cols < N
    x_row = tl.load(x + row * N + cols, mask=inside, other=0.0).to(tl.float32)
    if MEAN:
        mean = tl.sum(x_row, 0) / N
        tl.store(stats + tl.num_programs(0) + row, mean)
        # The row is in registers, so the variance is taken about the mean, not as E[x²] - E[x]².
        x_row = tl.where(inside, x_row - mean, 0.0)
    # rstd is kept for the backward pass: 4 bytes a row instead of a second reduction.
    rstd = tl.rsqrt(tl.sum(x_row * x_row, 0) / N + eps)
    tl.store(stats + row, rstd)
    y_row = x_row * rstd * tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    if MEAN:
        y_row += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * N + cols, y_row.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(dy, x, weight, stats, dx, sums, rows, N, MEAN: tl.constexpr,
                     BLOCK: tl.constexpr):
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    inside = cols < N
    w = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    # dw and db are summed over this program's rows, in registers.
    dw_sum = tl.zeros([BLOCK], tl.float32)
    db_sum = tl.zeros([BLOCK], tl.float32)
    # Neighbouring programs take neighbouring rows; num_stages prefetches the next ones.
    for row in tl.range(program, rows, tl.num_programs(0), num_stages=3):
        at = tl.cast(row, tl.int64) * N + cols
        x_hat = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if MEAN:
            x_hat -= tl.load(stats + rows + row)
        x_hat *= tl.load(stats + row)
        dy_row = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        # Past the row's end dy is 0, and so are its products: x̂ needs no mask of its own.
        dw_sum += dy_row * x_hat
        g = dy_row * w
        dx_row = g - x_hat * (tl.sum(g * x_hat, 0) / N)
        if MEAN:
            dx_row -= tl.sum(g, 0) / N
            db_sum += dy_row
        dx_row *= tl.load(stats + row)
        tl.store(dx + at, dx_row.to(dx.dtype.element_ty), mask=inside)
    tl.store(sums + program.to(tl.int64) * N + cols, dw_sum, mask=inside)
    if MEAN:
        db = sums + (tl.num_programs(0) + program).to(tl.int64) * N
        tl.store(db + cols, db_sum, mask=inside)


def _row_launch(N: int) -> dict[str, int]:
    """The block that holds a row of N, and 16 elements of it per thread."""
    block = triton.next_power_of_2(N)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


@lru_cache
def _programs(device: torch.device) -> int:
    """Programs of the backward pass: two for each SM of the GPU, which fit at 4096 columns.

    Each sums its own rows of dw: another kind of GPU adds in another order and gives other bits.
    """
    if device.type == "cpu":  # the interpreter
        return 3
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


@torch.library.custom_op("kernels::norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """-> y, stats. With a bias it is LayerNorm."""
    x = x.contiguous()
    N = x.shape[-1]
    rows = x.numel() // N
    y = torch.empty_like(x)
    stats = x.new_empty(1 if bias is None else 2, rows, dtype=torch.float32)
    _forward_kernel[(rows,)](
        x, weight, bias, y, stats, N, eps, MEAN=bias is not None, **_row_launch(N))
    return y, stats


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    rows = x.shape[:-1].numel()
    return (x.new_empty(x.shape),
            x.new_empty(1 if bias is None else 2, rows, dtype=torch.float32))


@torch.library.custom_op("kernels::norm_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor, stats: Tensor) -> list[Tensor]:
    """-> the gradients of x, weight and, of LayerNorm, bias, which has the weight's dtype."""
    dy, x = dy.contiguous(), x.contiguous()
    N = x.shape[-1]
    rows = x.numel() // N
    programs = min(rows, _programs(x.device))
    dx = torch.empty_like(x)
    sums = x.new_empty(len(stats), programs, N, dtype=torch.float32)
    _backward_kernel[(programs,)](
        dy, x, weight, stats, dx, sums, rows, N, MEAN=len(stats) == 2, **_row_launch(N))
    # (programs, N) -> (N,) each: PyTorch's sum has a fixed order, too.
    return [dx, *(part.sum(0).to(weight.dtype) for part in sums)]


@_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, stats: Tensor) -> list[Tensor]:
    return [x.new_empty(x.shape), *(torch.empty_like(weight) for _ in range(len(stats)))]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        y, stats = torch.ops.kernels.norm(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, stats)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        grads = torch.ops.kernels.norm_backward(dy, *ctx.saved_tensors)
        return *grads, *(None,) * (4 - len(grads))


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


def norm_triton(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`rms_norm`, or with a bias `layer_norm`, by the kernels above."""
    return _Norm.apply(x, weight, bias, eps)


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` by the kernels above."""
    return norm_triton(x, weight, None, eps)
