"""The head: logits, softmax and cross-entropy, a chunk of rows at a time.

    z = x Wᵀ      loss = logsumexp(z) - z[target]      dz = softmax(z) - onehot(target)
    dx = dz W / N      dW = dzᵀ x / N                  for the mean loss of N rows

Logits are the largest tensor of a language model: 8192 tokens times 32,000 ids are 0.5 GB in bf16,
and an fp32 copy and its gradient take three times that again. Here a chunk of logits is computed,
replaced by dz in place, used for dx and dW, and freed: the gradient is complete when the forward
pass ends, and the backward pass only scales it, as in Liger Kernel (arXiv 2410.10989, section 3.2).
cuBLAS computes the three matrix products, and the kernel the softmax between them: one program per
row reads it twice (the second time from L2) and writes it once.

    x  (N, H)        weight  (V, H)        targets  (N,) int64 in [0, V)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.lang import tl, triton

# Columns per step of the kernel: 16 per thread of 32 warps. Two such programs fit on an SM. On the
# 132 SMs of an H100 they hold 264 rows of 32,000 bf16 logits, 17 MB, which its L2 of 50 MB keeps
# for the second reading; eight programs of 8 warps would hold 68 MB.
BLOCK, WARPS = 16384, 32
# dW is a sum over rows, divided by N only at the end. In fp16, which ends at 65504, it would
# overflow meanwhile: so x is scaled down, by a power of two, which changes no other bit.
SHRINK = 2.0**-7


def linear_cross_entropy_reference(
    x: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` with all logits at once, in fp32 at least."""
    logits = F.linear(x, weight)
    logits = logits.to(torch.promote_types(x.dtype, torch.float32))
    losses = F.cross_entropy(logits, targets, reduction="none")
    return losses.mean(), losses.detach()


@triton.jit
def _softmax_kernel(logits, targets, losses, V, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    z = logits + row * V
    target = tl.load(targets + row)
    # A target outside the vocabulary becomes a NaN loss, not a read outside the tensor.
    known = (target >= 0) & (target < V)
    z_target = tl.load(z + target, mask=known, other=float("nan")).to(tl.float32)
    # Online softmax, as in attention.py: the sum is rescaled when the maximum grows.
    peak = float("-inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        part = tl.load(z + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
        new_peak = tl.maximum(peak, tl.max(part, 0))
        total = total * tl.exp(peak - new_peak) + tl.sum(tl.exp(part - new_peak), 0)
        peak = new_peak
    lse = peak + tl.log(total)
    tl.store(losses + row, lse - z_target)
    # The row was just read, so this time it comes from L2.
    if GRADIENT:
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            part = tl.load(z + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
            dz = tl.exp(part - lse) - tl.where(cols == target, 1.0, 0.0)
            tl.store(z + cols, dz.to(logits.dtype.element_ty), mask=cols < V)


@torch.library.custom_op("kernels::cross_entropy_", mutates_args={"logits"})
def _softmax_triton(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """-> the loss of each row; with `gradient`, logits become softmax - onehot in place."""
    rows, V = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    _softmax_kernel[(rows,)](
        logits, targets, losses, V, GRADIENT=gradient, BLOCK=BLOCK, num_warps=WARPS)
    return losses


@_softmax_triton.register_fake
def _(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def _softmax_torch(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_p = torch.log_softmax(logits, -1, dtype=wide)
    log_p_target = log_p.gather(1, targets[:, None])
    # At the target p - 1 is expm1(log p), which is exact also where p is close to 1.
    if gradient:
        logits.copy_(log_p.exp_().scatter_(1, targets[:, None], log_p_target.expm1()))
    return -log_p_target.squeeze(1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int, fused: bool,
                gradient: bool) -> tuple[Tensor, Tensor]:
        softmax = torch.ops.kernels.cross_entropy_ if fused else _softmax_torch
        want_x, want_weight = (gradient and want for want in ctx.needs_input_grad[:2])
        losses, dx, dw = [], [], None
        for x_rows, target_rows in zip(x.split(chunk_rows), targets.split(chunk_rows)):
            # (chunk, V), the only logits there are; `softmax` replaces them by dz.
            z = x_rows @ weight.t()
            losses.append(softmax(z, target_rows, want_x or want_weight))
            if want_x:
                dx.append(z @ weight)
            if want_weight:
                # The product is summed in fp32 and rounded to x's type: a chunk is rounded once,
                # and the sum over chunks is kept in fp32.
                part = z.t() @ (x_rows * SHRINK)
                dw = part if dw is None else dw.float().add_(part)
        losses = torch.cat(losses)
        # Not yet divided by N, which would underflow in fp16.
        ctx.save_for_backward(torch.cat(dx) if dx else None,
                              None if dw is None else dw.to(weight.dtype))
        ctx.rows = len(losses)
        ctx.mark_non_differentiable(losses)
        return losses.mean(), losses

    @staticmethod
    def backward(ctx, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # Of shape (1,): on a GPU PyTorch would round a scalar to the other factor's type first.
        share = (dloss / ctx.rows).view(1)

        def scaled(grad: Tensor | None, share: Tensor) -> Tensor | None:
            # Out of place: with retain_graph a second backward needs the same sums again.
            if grad is None or grad.dtype == share.dtype:
                return None if grad is None else grad * share
            return (grad * share).to(grad.dtype)

        dx, dw = ctx.saved_tensors
        return scaled(dx, share), scaled(dw, share / SHRINK), *(None,) * 4


def _chunked(x: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int, fused: bool
             ) -> tuple[Tensor, Tensor]:
    return _LinearCrossEntropy.apply(x, weight, targets, chunk_rows, fused, torch.is_grad_enabled())


def linear_cross_entropy_torch(
    x: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` with PyTorch's softmax between the products."""
    # On a CPU 256 rows of a few thousand logits stay in its cache; on a GPU 2048 rows of 32,000
    # fp32 logits are 0.25 GB.
    return _chunked(x, weight, targets, chunk_rows or (2048 if x.is_cuda else 256), False)


def linear_cross_entropy_triton(
    x: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` with the kernel above between the products."""
    # The fp32 sum of dW takes the memory of the bf16 logits of 2H rows, 8192 for the 7B: smaller
    # chunks would save little, and every further chunk is another pass over that sum.
    return _chunked(x, weight, targets, chunk_rows or 8192, True)
