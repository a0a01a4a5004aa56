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
# None has been timed. They were chosen from the compiler's report (`python tools/aot.py`, the table
# in docs/kernels.md): no spilled register, which is a variable moved to memory because a thread has
# 255 registers at most, and no serialized wgmma. Hopper's matrix product, wgmma, is started by four
# warps together, which may go on while it is computed; where the compiler cannot tell that its
# registers are left alone meanwhile, it makes each product wait for the one before. And the more
# queries a tile has, the less often K and V are read. In the kernels that hold queries BLOCK_M is a
# multiple of BLOCK_N, because the mask starts at a tile's edge.
# Hopper's are those of PyTorch's FlexAttention for an H100 (torch/_inductor/template_heuristics),
# but for the third stage of dK/dV, which spills.
HOPPER = {"forward": (128, 64, 8, 3), "dkdv": (64, 128, 8, 2), "dq": (128, 64, 8, 3)}
A100 = {"forward": (64, 64, 4, 2), "dkdv": (64, 64, 8, 2), "dq": (64, 64, 8, 2)}
# 100 KiB of shared memory per SM (sm_86, 89, 120): two programs of the forward kernel fit, so that
# the softmax of one runs during the products of the other.
SMALL = {"forward": (64, 32, 4, 2), "dkdv": (64, 64, 8, 2), "dq": (128, 32, 8, 2)}
TILES = {80: A100, 90: HOPPER, 100: HOPPER, 103: HOPPER}  # any other architecture: SMALL
# fp32 as three tf32 products: each operand is held twice, so smaller tiles.
SINGLE = {"forward": (32, 32, 8, 1), "dkdv": (32, 16, 8, 1), "dq": (16, 16, 8, 1)}
# Tiles worth a try, for `tools/bench_kernels.py --sweep`. All compile for Hopper; not all fit into
# the shared memory of every other GPU.
SWEEP = {
    "forward": [(128, 64, 8, 3), (128, 128, 8, 2), (128, 32, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2),
                (64, 32, 4, 2)],
    "dkdv": [(64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2)],
    "dq": [(128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2)],
}


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


# A tile is ROWS consecutive positions of one head of a contiguous (B, T, H, D) tensor. On Hopper a
# unit of the SM (TMA, tensor memory accelerator) copies it between memory and shared memory at one
# request. It knows the tensor from a descriptor: no thread computes an address or keeps one in a
# register, and rows past T are loaded as zeros and not stored. Elsewhere a tile is pointer
# arithmetic with a mask.


@triton.jit
def _addresses(x, b, h, row0, T, H, ROWS: tl.constexpr, D: tl.constexpr):
    rows = row0 + tl.arange(0, ROWS)
    first = (b.to(tl.int64) * T * H + h) * D
    return x + first + rows[:, None] * (H * D) + tl.arange(0, D)[None, :]


@triton.jit
def _load(x, b, h, row0, T, H, ROWS: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        return x.load([b, row0, h * D]).reshape(ROWS, D)
    else:
        inside = (row0 + tl.arange(0, ROWS) < T)[:, None]
        return tl.load(_addresses(x, b, h, row0, T, H, ROWS, D), mask=inside, other=0.0)


@triton.jit
def _store(x, tile, b, h, row0, T, H, ROWS: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        x.store([b, row0, h * D], tile.reshape(1, ROWS, D))
    else:
        inside = (row0 + tl.arange(0, ROWS) < T)[:, None]
        tl.store(_addresses(x, b, h, row0, T, H, ROWS, D), tile, mask=inside)


@triton.jit
def _dot(a, b, acc=None):
    # input_precision concerns fp32 operands only: three tf32 products come close to their rounding.
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def _forward_kernel(q, k, v, o, lse, scale, T, H, GROUP: tl.constexpr, D: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr):
    # The last queries see the most keys: start with them, so that short programs come last.
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    h, b = tl.program_id(1), tl.program_id(2)
    K, hk = H // GROUP, h // GROUP
    q_tile = _load(q, b, h, m0, T, H, BLOCK_M, D, TMA)
    rows = m0 + tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    c = scale * LOG2E
    tl.static_assert(BLOCK_M % BLOCK_N == 0)
    # Two loops, one body: static_range unrolls, so MASKED is a constant in each copy. Keys before
    # the tile's first query need no mask; those beside it do; later ones are skipped.
    for MASKED in tl.static_range(2):
        for n0 in range(m0 * MASKED, m0 + BLOCK_M * MASKED, BLOCK_N):
            s = _dot(q_tile, _load(k, b, hk, n0, T, K, BLOCK_N, D, TMA).T)
            if MASKED:
                s = tl.where(rows[:, None] >= n0 + tl.arange(0, BLOCK_N)[None, :], s, float("-inf"))
            # The first tile of keys holds one that every row may see: from there on the peak is
            # finite. The scale is applied after max, so that s * c - peak is one instruction.
            new_peak = tl.maximum(peak, tl.max(s, 1) * c)
            p = tl.exp2(s * c - new_peak[:, None])
            shrink = tl.exp2(peak - new_peak)
            v_tile = _load(v, b, hk, n0, T, K, BLOCK_N, D, TMA)
            acc = _dot(p.to(q_tile.dtype), v_tile, acc * shrink[:, None])
            total = total * shrink + tl.sum(p, 1)
            peak = new_peak
    # Divided once at the end instead of once per tile.
    _store(o, (acc / total[:, None]).to(q_tile.dtype), b, h, m0, T, H, BLOCK_M, D, TMA)
    tl.store(lse + (b * H + h) * T + rows, peak + tl.log2(total), mask=rows < T)


@triton.jit
def _dq_kernel(q, k, v, o, do, dq, lse, delta, scale, T, H, GROUP: tl.constexpr, D: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr):
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    h, b = tl.program_id(1), tl.program_id(2)
    K, hk = H // GROUP, h // GROUP
    q_tile = _load(q, b, h, m0, T, H, BLOCK_M, D, TMA)
    do_tile = _load(do, b, h, m0, T, H, BLOCK_M, D, TMA)
    rows = m0 + tl.arange(0, BLOCK_M)
    stats = (b * H + h) * T + rows
    # The softmax's gradient subtracts rowsum(P * dP), which equals rowsum(dO * O). dK/dV needs it
    # too, and runs after this kernel.
    o_tile = _load(o, b, h, m0, T, H, BLOCK_M, D, TMA)
    delta_row = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    tl.store(delta + stats, delta_row, mask=rows < T)
    # Rows past T get LSE = inf, which makes their P zero.
    lse_row = tl.load(lse + stats, mask=rows < T, other=float("inf"))
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    tl.static_assert(BLOCK_M % BLOCK_N == 0)
    # The two loops of the forward kernel.
    for MASKED in tl.static_range(2):
        for n0 in range(m0 * MASKED, m0 + BLOCK_M * MASKED, BLOCK_N):
            k_tile = _load(k, b, hk, n0, T, K, BLOCK_N, D, TMA)
            p = tl.exp2(_dot(q_tile, k_tile.T) * (scale * LOG2E) - lse_row[:, None])
            if MASKED:
                p = tl.where(rows[:, None] >= n0 + tl.arange(0, BLOCK_N)[None, :], p, 0.0)
            v_tile = _load(v, b, hk, n0, T, K, BLOCK_N, D, TMA)
            ds = p * (_dot(do_tile, v_tile.T) - delta_row[:, None])
            acc = _dot(ds.to(k_tile.dtype), k_tile, acc)
    _store(dq, (acc * scale).to(q_tile.dtype), b, h, m0, T, H, BLOCK_M, D, TMA)


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


@lru_cache
def _architecture(device: torch.device) -> int:
    """90 for Hopper (sm_90); the interpreter runs what Hopper does."""
    major, minor = (9, 0) if INTERPRETED else torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tiles(q: Tensor) -> tuple[dict[str, tuple[int, int, int, int]], bool]:
    """The table of tiles for this tensor, and whether they are loaded by TMA."""
    if q.dtype == torch.float32:
        return SINGLE, False
    architecture = _architecture(q.device)
    return TILES.get(architecture, SMALL), architecture == 90


def _operands(tma: bool, *accessed: tuple[Tensor, int]) -> list:
    """The kernel's argument for each contiguous (B, T, H, D) tensor: a descriptor, or itself.

    accessed: each tensor with the rows of the tiles in which the kernel accesses it.
    """
    if not tma:
        return [x for x, _ in accessed]
    from triton.tools.tensor_descriptor import TensorDescriptor

    # (B, T, H, D) -> (B, T, H D), of which head h has the columns from h D. The last tile may reach
    # past T: the descriptor knows T, and TMA ignores those rows.
    return [TensorDescriptor.from_tensor(x.flatten(2), [1, rows, x.shape[-1]])
            for x, rows in accessed]


@torch.library.custom_op("kernels::attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """-> o (B, T, H, D) and the base-2 log-sum-exp of each row, (B, H, T) fp32."""
    # The model's tensors are contiguous; slices of a fused projection are copied.
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    B, T, H, D = q.shape
    table, tma = tiles(q)
    M, N, warps, stages = table["forward"]
    o = torch.empty_like(q)
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    _forward_kernel[(triton.cdiv(T, M), H, B)](
        *_operands(tma, (q, M), (k, N), (v, N), (o, M)), lse, scale, T, H, GROUP=H // k.shape[2],
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
    table, tma = tiles(q)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = torch.empty_like(lse)
    M, N, warps, stages = table["dq"]
    _dq_kernel[(triton.cdiv(T, M), H, B)](
        *_operands(tma, (q, M), (k, N), (v, N), (o, M), (do, M), (dq, M)), lse, delta, scale, T, H,
        GROUP=H // K, D=D, BLOCK_M=M, BLOCK_N=N, TMA=tma, num_warps=warps, num_stages=stages)
    M, N, warps, stages = table["dkdv"]
    _dkdv_kernel[(triton.cdiv(T, N), K, B)](
        *_operands(tma, (q, M), (k, N), (v, N), (do, M), (dk, N), (dv, N)), lse, delta, scale, T, H,
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


def unsupported(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> str:
    """Why the Triton kernels cannot take these, or ""."""
    if q.shape[1] != k.shape[1]:
        return ""  # decoding: `attention_triton` calls the reference
    if scale is not None and scale <= 0:
        return f"attention in Triton has a scale above 0, not {scale}"  # max(s) * c is the maximum
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
