"""Causal attention, forward and backward: FlashAttention in plain Triton.

    S = scale Q Kᵀ,  P = softmax(S + causal mask),  O = P V

Neither S nor P is ever in memory. One program holds a tile of queries and walks over the keys,
keeping each row's running maximum (`peak`) and sum (`total`); when the maximum grows, the output
and the sum so far are scaled by exp(old peak - new peak). This is algorithm 1 of Dao et al. 2022
(arXiv 2205.14135), with the loops in the order of Dao 2023 (arXiv 2307.08691), algorithm 1.
Exponentials are of base 2, as in the hardware: log2(e) is folded into the scale.

The forward pass keeps LSE = peak + log2(total) of each row, from which the backward pass computes P
with one exponential:

    P = 2^(S log2(e) - LSE)       delta = rowsum(dO * O)        dS = P * (dO Vᵀ - delta)
    dV = Pᵀ dO                    dQ = scale dS K               dK = scale dSᵀ Q

(2307.08691, algorithm 2, split in two.) One kernel owns a tile of keys and walks over the queries,
giving dK and dV; another owns a tile of queries and walks over the keys, giving dQ. S is computed
twice, 7 products where a fused kernel has 5, but every output has one writer: no atomics, the same
bits in every run. dK/dV works on Sᵀ = K Qᵀ, so that no product's result is ever transposed.

    B  sequences      T  queries       S  keys, S >= T      D  head_dim, 64 or 128 in Triton
    H  query heads    K  key/value heads, K divides H       GROUP = H / K
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.lang import INTERPRETED, tl, triton

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)

# (BLOCK_M queries, BLOCK_N keys, warps, pipeline stages) of each kernel. They are fixed, because an
# autotuner may choose another tile in the next run, whose sums have another order and other bits.
# They were chosen from the compiler's report, `python tools/aot.py` (the table in docs/kernels.md):
# no spilled register, no serialized wgmma (a tensor-core product that waits for the one before),
# and, on Hopper, two programs per SM, so that the softmax of one runs during the products of the
# other.
HOPPER = {"forward": (64, 64, 4, 3), "dkdv": (64, 64, 4, 2), "dq": (64, 64, 4, 2)}
# Any other GPU: tiles in 74 KiB of shared memory, and 8 warps where 4 would spill registers.
OTHER = {"forward": (64, 64, 4, 2), "dkdv": (64, 64, 8, 2), "dq": (64, 64, 8, 2)}
# fp32 as three tf32 products: each operand is held twice, so smaller tiles.
# In the kernels that hold queries, BLOCK_M is a multiple of BLOCK_N: the mask starts at a tile's
# edge.
SINGLE = {"forward": (32, 32, 4, 1), "dkdv": (32, 16, 8, 1), "dq": (16, 16, 8, 1)}


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """`attention` by PyTorch's own SDPA: same arguments, any head_dim, any S >= T."""
    T, S = q.shape[1], k.shape[1]
    # A single query at the end of the cache sees every key, and T == S is the usual triangle.
    # Between them the triangle is aligned at the bottom right, and is_causal aligns it top left.
    mask = None
    if 1 < T < S:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    dtype = q.dtype
    if q.device.type == "cpu" and T <= 128 and dtype.itemsize == 2:
        # PyTorch's 16-bit backward takes twice as long as its fp32 one here, and rounds more.
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=T == S, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return o.transpose(1, 2).to(dtype).contiguous()


# A tile is ROWS consecutive positions of one head of a contiguous (B, T, H, D) tensor. On Hopper it
# is one request to the TMA unit (tensor memory accelerator) through a descriptor, which costs no
# address registers, loads rows past T as zeros and does not store them. Elsewhere it is pointer
# arithmetic with a mask.


@triton.jit
def _addresses(x, b, h, row0, T, H, ROWS: tl.constexpr, D: tl.constexpr):
    rows = row0 + tl.arange(0, ROWS)
    first = (b.to(tl.int64) * T * H + h) * D
    return x + first + rows[:, None] * (H * D) + tl.arange(0, D)[None, :]


@triton.jit
def _load(x, b, h, row0, T, H, ROWS: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        return x.load([b, h, row0, 0]).reshape(ROWS, D)
    else:
        inside = (row0 + tl.arange(0, ROWS) < T)[:, None]
        return tl.load(_addresses(x, b, h, row0, T, H, ROWS, D), mask=inside, other=0.0)


@triton.jit
def _store(x, tile, b, h, row0, T, H, ROWS: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        x.store([b, h, row0, 0], tile.reshape(1, 1, ROWS, D))
    else:
        inside = (row0 + tl.arange(0, ROWS) < T)[:, None]
        tl.store(_addresses(x, b, h, row0, T, H, ROWS, D), tile, mask=inside)


@triton.jit
def _dot(a, b, acc=None):
    # input_precision concerns fp32 operands only: three tf32 products come close to their rounding.
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def _attend(acc, total, peak, q, k, v, b, hk, m0, n0, c, T, K, MASKED: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr):
    """One tile of keys: the online softmax step. `c` is scale * log2(e)."""
    s = _dot(q, _load(k, b, hk, n0, T, K, BLOCK_N, D, TMA).T) * c
    if MASKED:
        rows = m0 + tl.arange(0, BLOCK_M)
        cols = n0 + tl.arange(0, BLOCK_N)
        s = tl.where(rows[:, None] >= cols[None, :], s, float("-inf"))
    # The first tile of keys holds one that every row may see, so the peak is finite from there on.
    new_peak = tl.maximum(peak, tl.max(s, 1))
    p = tl.exp2(s - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    acc = _dot(p.to(q.dtype), _load(v, b, hk, n0, T, K, BLOCK_N, D, TMA), acc * shrink[:, None])
    return acc, total * shrink + tl.sum(p, 1), new_peak


@triton.jit
def _forward_kernel(q, k, v, o, lse, scale, T, H, GROUP: tl.constexpr, D: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr):
    # The last queries see the most keys: start with them, so that short programs come last.
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    h, b = tl.program_id(1), tl.program_id(2)
    q_tile = _load(q, b, h, m0, T, H, BLOCK_M, D, TMA)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    tl.static_assert(BLOCK_M % BLOCK_N == 0)
    # Keys before the tile's first query need no mask; those beside it do; later ones are skipped.
    for n0 in range(0, m0, BLOCK_N):
        acc, total, peak = _attend(acc, total, peak, q_tile, k, v, b, h // GROUP, m0, n0,
                                   scale * LOG2E, T, H // GROUP, False, BLOCK_M, BLOCK_N, D, TMA)
    for n0 in range(m0, m0 + BLOCK_M, BLOCK_N):
        acc, total, peak = _attend(acc, total, peak, q_tile, k, v, b, h // GROUP, m0, n0,
                                   scale * LOG2E, T, H // GROUP, True, BLOCK_M, BLOCK_N, D, TMA)
    # Divided once at the end instead of once per tile.
    _store(o, (acc / total[:, None]).to(q_tile.dtype), b, h, m0, T, H, BLOCK_M, D, TMA)
    rows = m0 + tl.arange(0, BLOCK_M)
    tl.store(lse + (b * H + h) * T + rows, peak + tl.log2(total), mask=rows < T)


@triton.jit
def _delta_kernel(o, do, delta, T, H, D: tl.constexpr, BLOCK_M: tl.constexpr):
    m0, h, b = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2)
    rows = m0 + tl.arange(0, BLOCK_M)
    # The softmax's gradient subtracts rowsum(P * dP), which equals rowsum(dO * O).
    o_tile = _load(o, b, h, m0, T, H, BLOCK_M, D, False).to(tl.float32)
    do_tile = _load(do, b, h, m0, T, H, BLOCK_M, D, False).to(tl.float32)
    tl.store(delta + (b * H + h) * T + rows, tl.sum(o_tile * do_tile, 1), mask=rows < T)


@triton.jit
def _dkdv_kernel(q, k, v, do, dk, dv, lse, delta, scale, T, H, GROUP: tl.constexpr, D: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr):
    n0, hk, b = tl.program_id(0) * BLOCK_N, tl.program_id(1), tl.program_id(2)
    K = H // GROUP
    k_tile = _load(k, b, hk, n0, T, K, BLOCK_N, D, TMA)
    v_tile = _load(v, b, hk, n0, T, K, BLOCK_N, D, TMA)
    dk_tile = tl.zeros([BLOCK_N, D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, D], tl.float32)
    cols = n0 + tl.arange(0, BLOCK_N)
    # Every query head of the group adds to the same key head, one after another: a fixed order.
    for h in range(hk * GROUP, (hk + 1) * GROUP):
        stats = (b * H + h) * T
        # Every step is masked: with a loop of its own for the diagonal ptxas serialized the wgmma.
        for m0 in range(n0 // BLOCK_M * BLOCK_M, T, BLOCK_M):
            rows = m0 + tl.arange(0, BLOCK_M)
            q_tile = _load(q, b, h, m0, T, H, BLOCK_M, D, TMA)
            # Rows past T get LSE = inf, which makes their column of Pᵀ zero.
            lse_row = tl.load(lse + stats + rows, mask=rows < T, other=float("inf"))
            pT = tl.exp2(_dot(k_tile, q_tile.T) * (scale * LOG2E) - lse_row[None, :])
            pT = tl.where(cols[:, None] <= rows[None, :], pT, 0.0)
            do_tile = _load(do, b, h, m0, T, H, BLOCK_M, D, TMA)
            dv_tile = _dot(pT.to(do_tile.dtype), do_tile, dv_tile)
            delta_row = tl.load(delta + stats + rows, mask=rows < T, other=0.0)
            dsT = pT * (_dot(v_tile, do_tile.T) - delta_row[None, :])
            dk_tile = _dot(dsT.to(q_tile.dtype), q_tile, dk_tile)
    _store(dk, (dk_tile * scale).to(k_tile.dtype), b, hk, n0, T, K, BLOCK_N, D, TMA)
    _store(dv, dv_tile.to(k_tile.dtype), b, hk, n0, T, K, BLOCK_N, D, TMA)


@triton.jit
def _dq_step(acc, q, do, lse, delta, k, v, b, hk, m0, n0, c, T, K, MASKED: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr):
    k_tile = _load(k, b, hk, n0, T, K, BLOCK_N, D, TMA)
    v_tile = _load(v, b, hk, n0, T, K, BLOCK_N, D, TMA)
    p = tl.exp2(_dot(q, k_tile.T) * c - lse[:, None])
    if MASKED:
        rows = m0 + tl.arange(0, BLOCK_M)
        cols = n0 + tl.arange(0, BLOCK_N)
        p = tl.where(rows[:, None] >= cols[None, :], p, 0.0)
    ds = p * (_dot(do, v_tile.T) - delta[:, None])
    return _dot(ds.to(k_tile.dtype), k_tile, acc)


@triton.jit
def _dq_kernel(q, k, v, do, dq, lse, delta, scale, T, H, GROUP: tl.constexpr, D: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr):
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    h, b = tl.program_id(1), tl.program_id(2)
    q_tile = _load(q, b, h, m0, T, H, BLOCK_M, D, TMA)
    do_tile = _load(do, b, h, m0, T, H, BLOCK_M, D, TMA)
    # Rows past T get LSE = inf, as in dK/dV.
    rows = m0 + tl.arange(0, BLOCK_M)
    lse_row = tl.load(lse + (b * H + h) * T + rows, mask=rows < T, other=float("inf"))
    delta_row = tl.load(delta + (b * H + h) * T + rows, mask=rows < T, other=0.0)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for n0 in range(0, m0, BLOCK_N):
        acc = _dq_step(acc, q_tile, do_tile, lse_row, delta_row, k, v, b, h // GROUP, m0, n0,
                       scale * LOG2E, T, H // GROUP, False, BLOCK_M, BLOCK_N, D, TMA)
    for n0 in range(m0, m0 + BLOCK_M, BLOCK_N):
        acc = _dq_step(acc, q_tile, do_tile, lse_row, delta_row, k, v, b, h // GROUP, m0, n0,
                       scale * LOG2E, T, H // GROUP, True, BLOCK_M, BLOCK_N, D, TMA)
    _store(dq, (acc * scale).to(q_tile.dtype), b, h, m0, T, H, BLOCK_M, D, TMA)


@lru_cache
def _on_hopper(device: torch.device) -> bool:
    return INTERPRETED or torch.cuda.get_device_capability(device)[0] == 9


def _tiles(q: Tensor) -> tuple[dict[str, tuple[int, int, int, int]], bool]:
    """The table of tiles for this tensor, and whether they are loaded by TMA."""
    if q.dtype == torch.float32:
        return SINGLE, False
    return (HOPPER, True) if _on_hopper(q.device) else (OTHER, False)


def _operands(rows: tuple[int, ...], tma: bool, tensors: tuple[Tensor, ...]) -> list:
    """The kernel's argument for each contiguous (B, T, H, D) tensor: a descriptor, or itself.

    rows: of the tiles in which the kernel accesses each of the tensors.
    """
    if not tma:
        return list(tensors)
    from triton.tools.tensor_descriptor import TensorDescriptor

    # The last tile may reach past T: the descriptor knows T, and TMA ignores those rows.
    # Heads come before positions, so that a tile is the last two dimensions of its box.
    def describe(x: Tensor, n: int) -> TensorDescriptor:
        B, T, H, D = x.shape
        return TensorDescriptor(x, [B, H, T, D], [T * H * D, D, H * D, 1], [1, 1, n, D])

    return [describe(x, n) for x, n in zip(tensors, rows)]


@torch.library.custom_op("kernels::attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """-> o (B, T, H, D) and the base-2 log-sum-exp of each row, (B, H, T) fp32."""
    # The model's tensors are contiguous; slices of a fused projection are copied.
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    B, T, H, D = q.shape
    table, tma = _tiles(q)
    M, N, warps, stages = table["forward"]
    o = torch.empty_like(q)
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    _forward_kernel[(triton.cdiv(T, M), H, B)](
        *_operands((M, N, N, M), tma, (q, k, v, o)), lse, scale, T, H, GROUP=H // k.shape[2],
        D=D, BLOCK_M=M, BLOCK_N=N, TMA=tma, num_warps=warps, num_stages=stages)
    return o, lse


# Shapes and dtypes for torch.compile, which does not trace into a custom operator.
@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("kernels::attention_backward", mutates_args=())
def _backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
              ) -> tuple[Tensor, Tensor, Tensor]:
    # `do` may be expanded, with strides of 0: the gradient of a sum is.
    do, q, k, v = do.contiguous(), q.contiguous(), k.contiguous(), v.contiguous()
    B, T, H, D = q.shape
    K = k.shape[2]
    table, tma = _tiles(q)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = torch.empty_like(lse)
    _delta_kernel[(triton.cdiv(T, 64), H, B)](o, do, delta, T, H, D=D, BLOCK_M=64)
    M, N, warps, stages = table["dkdv"]
    _dkdv_kernel[(triton.cdiv(T, N), K, B)](
        *_operands((M, N, N, M, N, N), tma, (q, k, v, do, dk, dv)), lse, delta, scale, T, H,
        GROUP=H // K, D=D, BLOCK_M=M, BLOCK_N=N, TMA=tma, num_warps=warps, num_stages=stages)
    M, N, warps, stages = table["dq"]
    _dq_kernel[(triton.cdiv(T, M), H, B)](
        *_operands((M, N, N, M, M), tma, (q, k, v, do, dq)), lse, delta, scale, T, H,
        GROUP=H // K, D=D, BLOCK_M=M, BLOCK_N=N, TMA=tma, num_warps=warps, num_stages=stages)
    return dq, dk, dv


@_backward.register_fake
def _(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
      ) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


# Counted as PyTorch counts its own SDPA, mask or no mask: 2 products forward, 5 backward.
@register_flop_formula(torch.ops.kernels.attention)
def _forward_flops(q_shape, k_shape, *args, **kwargs) -> int:
    B, T, H, D = q_shape
    return 2 * 2 * B * H * T * k_shape[1] * D


@register_flop_formula(torch.ops.kernels.attention_backward)
def _backward_flops(do_shape, q_shape, k_shape, *args, **kwargs) -> int:
    return _forward_flops(q_shape, k_shape) // 2 * 5


# Autograd wraps the two custom operators, so that torch.compile traces the saving of tensors and a
# checkpointing policy can name the operators.
class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        o, lse = torch.ops.kernels.attention(q, k, v, scale)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.scale = scale
        return o

    @staticmethod
    def backward(ctx, do: Tensor) -> tuple[Tensor | None, ...]:
        grads = torch.ops.kernels.attention_backward(do, *ctx.saved_tensors, ctx.scale)
        return *grads, None


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why the Triton kernels cannot take these tensors, or ""."""
    if q.shape[1] != k.shape[1]:
        return ""  # decoding: `attention_triton` calls the reference
    if q.shape[-1] not in (64, 128):
        return f"attention in Triton has head_dim 64 or 128, not {q.shape[-1]}"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"attention in Triton takes fp32, fp16 or bf16, not {q.dtype}"
    if not q.dtype == k.dtype == v.dtype:
        return f"attention needs q, k, v of one dtype, not {q.dtype}, {k.dtype}, {v.dtype}"
    return ""


def attention_triton(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """`attention` by the kernels above; S > T (decoding with a cache) goes to the reference."""
    if q.shape[1] != k.shape[1]:
        return attention_reference(q, k, v, scale)
    return _Attention.apply(q, k, v, 1 / math.sqrt(q.shape[-1]) if scale is None else scale)
