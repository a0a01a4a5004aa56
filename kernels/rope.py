"""Rotary position embedding of q and k in one kernel; backward it rotates by the opposite angle.

    (a, b) -> (a cos - b sin, b cos + a sin)     for each pair (a, b) of a head   (arXiv 2104.09864)

Which dimensions make a pair is a convention of the weights. Half-split (LLaMA in Hugging Face's
layout, Amber): i with i + R/2. Interleaved (GPT-J, Crystal): 2i with 2i + 1. Only the first R of D
dimensions are rotated, the others copied. The rotation is orthogonal, so its gradient is the
rotation by the opposite angle: only the two tables are kept for the backward pass.

One program rotates every head of one position, so cos and sin are read once for all of them. It is
not in place: the bytes moved are the same, and the input is freed when its last reference goes.

    q  (B, T, H, D)      k  (B, T, K, D)      cos, sin  (T, R/2) fp32, R even, R <= D
"""

import torch
from torch import Tensor

from kernels.lang import tl, triton


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    R = cos.shape[-1]
    turning = x[..., :R].to(torch.promote_types(x.dtype, cos.dtype))
    if interleaved:
        partner = turning.unflatten(-1, (R // 2, 2)).flip(-1).flatten(-2)
    else:
        partner = turning.roll(R // 2, -1)
    # The rotation is computed in fp32 and rounded once.
    turned = torch.addcmul(turning * cos, partner, sin).to(x.dtype)
    return turned if x.shape[-1] == R else torch.cat((turned, x[..., R:]), -1)


def rope_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """`rope` in PyTorch: x cos + partner(x) (∓sin), with the tables widened to R."""
    # The widened tables are (T, 1, R), the same for every head.
    join = (lambda *pair: torch.stack(pair, -1).flatten(-2)) if interleaved else (
        lambda *pair: torch.cat(pair, -1))
    cos, sin = join(cos, cos)[:, None], join(-sin, sin)[:, None]
    return _turn(q, cos, sin, interleaved), _turn(k, cos, sin, interleaved)


@triton.jit
def _turn_heads(x, y, cos, sin, HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
                STEP: tl.constexpr, GAP: tl.constexpr,
                BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr):
    """x, y at the first of HEADS heads of one position; a pair is (STEP i, STEP i + GAP)."""
    # One address formula for both conventions: half-split has STEP 1 and GAP R/2 (two contiguous
    # halves), interleaved STEP 2 and GAP 1.
    heads = tl.arange(0, BLOCK_H)[:, None]
    pairs = tl.arange(0, BLOCK_R)[None, :]
    inside = (heads < HEADS) & (pairs < R // 2)
    first = heads * D + STEP * pairs
    a = tl.load(x + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + first + GAP, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + first, (a * cos - b * sin).to(y.dtype.element_ty), mask=inside)
    tl.store(y + first + GAP, (b * cos + a * sin).to(y.dtype.element_ty), mask=inside)
    # The other dimensions are copied, since the output is a new tensor.
    if R < D:
        rest = R + tl.arange(0, BLOCK_REST)[None, :]
        inside = (heads < HEADS) & (rest < D)
        tl.store(y + heads * D + rest, tl.load(x + heads * D + rest, mask=inside), mask=inside)


@triton.jit
def _rope_kernel(q, k, q_out, k_out, cos, sin, T, H: tl.constexpr, K: tl.constexpr,
                 D: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr, GAP: tl.constexpr,
                 SIGN: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
                 BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr):
    # One program for each of the B * T positions; every sequence starts at the table's first row.
    position = tl.program_id(0).to(tl.int64)
    pairs = tl.arange(0, BLOCK_R)
    table = (position % T) * (R // 2) + pairs
    c = tl.load(cos + table, mask=pairs < R // 2, other=0.0)[None, :]
    s = tl.load(sin + table, mask=pairs < R // 2, other=0.0)[None, :] * SIGN
    _turn_heads(q + position * H * D, q_out + position * H * D, c, s, H, D, R, STEP, GAP,
                BLOCK_H, BLOCK_R, BLOCK_REST)
    _turn_heads(k + position * K * D, k_out + position * K * D, c, s, K, D, R, STEP, GAP,
                BLOCK_K, BLOCK_R, BLOCK_REST)


@torch.library.custom_op("kernels::rope", mutates_args=())
def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, sign: int
          ) -> tuple[Tensor, Tensor]:
    q, k, cos, sin = (x.contiguous() for x in (q, k, cos, sin))
    B, T, H, D = q.shape
    R, K = 2 * cos.shape[-1], k.shape[2]
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    _rope_kernel[(B * T,)](
        q, k, q_out, k_out, cos, sin, T, H=H, K=K, D=D, R=R, STEP=2 if interleaved else 1,
        GAP=1 if interleaved else R // 2, SIGN=sign, BLOCK_H=triton.next_power_of_2(H),
        BLOCK_K=triton.next_power_of_2(K), BLOCK_R=triton.next_power_of_2(R // 2),
        BLOCK_REST=triton.next_power_of_2(max(D - R, 1)), num_warps=4)
    return q_out, k_out


@_rope.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, sign: int
      ) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
                ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return torch.ops.kernels.rope(q, k, cos, sin, interleaved, 1)

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk = torch.ops.kernels.rope(dq, dk, *ctx.saved_tensors, ctx.interleaved, -1)
        return dq, dk, None, None, None


def rope_triton(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """`rope` by the kernel above."""
    return _RoPE.apply(q, k, cos, sin, interleaved)
