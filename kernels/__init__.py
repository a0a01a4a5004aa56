"""The operations of the model, each in Triton and in PyTorch, and the choice between the two.

    attention.py      causal attention, grouped heads, KV cache
    rmsnorm.py        RMSNorm (Amber), and the kernels of both norms
    layernorm.py      LayerNorm (Crystal)
    swiglu.py         silu(gate) * up
    rope.py           rotary embedding of q and k
    cross_entropy.py  output head + cross-entropy, logits never whole

`use("auto")`, the default, sends CUDA tensors to Triton and all others to PyTorch; `use("triton")`
and `use("torch")` insist. Shapes the Triton kernels do not take go to PyTorch under "auto" and are
refused with a sentence under "triton". With TRITON_INTERPRET=1 in the environment, set before
Triton is first imported, "triton" runs on the CPU in Triton's interpreter: exact and slow, for
tests.

Every operation keeps one sum in one order: two runs on one kind of GPU give the same bits. Another
kind gives others, since the tiles of attention and the programs that share a norm's rows suit the
GPU, and cuBLAS's do, too. Read rmsnorm.py first: it says what a kernel is and what surrounds it.
"""

import torch
from torch import Tensor

from configs import UserError
from kernels import attention as _attention
from kernels import cross_entropy as _cross_entropy
from kernels import lang as _lang
from kernels import layernorm as _layernorm
from kernels import rmsnorm as _rmsnorm
from kernels import rope as _rope
from kernels import swiglu as _swiglu

__all__ = ["attention", "layer_norm", "linear_cross_entropy", "rms_norm", "rope", "swiglu", "use"]

_choice = "auto"


def use(backend: str, dry: bool = False) -> str:
    """Select the kernels: "auto", "triton" or "torch"; returns the one that computes here.

    UserError when "triton" cannot run on this machine; `dry` skips the check for a GPU, for models
    whose tensors have shapes and no memory.
    """
    # The other functions read _choice at every call, so a test or a benchmark may switch.
    global _choice
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f'kernels must be "auto", "triton" or "torch", not {backend!r}')
    if backend == "triton" and not _lang.INSTALLED:
        raise UserError('kernels = "triton" needs Triton: pip install triton (Linux only).')
    if backend == "triton" and not (dry or _lang.INTERPRETED or torch.cuda.is_available()):
        raise UserError('kernels = "triton" needs a CUDA GPU, and there is none: use "auto" or'
                        ' "torch".')
    _choice = backend
    if backend == "auto":
        return "triton" if _lang.INSTALLED and torch.cuda.is_available() else "torch"
    return backend


def _triton(x: Tensor, unsupported: str = "") -> bool:
    """Whether Triton computes on x; `unsupported` says why it cannot, if it cannot."""
    if x.dtype == torch.float64:
        unsupported = "the Triton kernels compute in fp32, and this tensor is fp64"
    if _choice == "triton" and unsupported:
        raise ValueError(f'{unsupported}; use kernels="auto" or "torch"')
    return not unsupported and (
        _choice == "triton" or _choice == "auto" and x.is_cuda and _lang.INSTALLED)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention of each query over the keys up to its own position.

    q (B, T, H, D); k, v (B, S, K, D), K divides H, S >= T: query i sees keys j <= i + S - T, so a
    cache of earlier keys may be longer than the queries. `scale` is 1/sqrt(D) unless given.
    Returns (B, T, H, D), contiguous: `.reshape(B, T, H * D)` is a view. Triton computes S == T with
    D 64 or 128; S > T is PyTorch's under every choice.
    """
    if _triton(q, _attention.unsupported(q, k, v, scale)):
        return _attention.attention_triton(q, k, v, scale)
    return _attention.attention_reference(q, k, v, scale)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension.

    x (..., N) of any float dtype, weight (N,) in fp32 or x's dtype. Computed in fp32 and rounded
    once to x's dtype.
    """
    if _triton(x, _rmsnorm.unsupported(x)):
        return _rmsnorm.rms_norm_triton(x, weight, eps)
    return _rmsnorm.rms_norm_torch(x, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension; as `rms_norm`."""
    if _triton(x, _rmsnorm.unsupported(x)):
        return _layernorm.layer_norm_triton(x, weight, bias, eps)
    return _layernorm.layer_norm_reference(x, weight, bias, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, element by element; both of one shape and dtype."""
    return (_swiglu.swiglu_triton if _triton(gate) else _swiglu.swiglu_reference)(gate, up)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
         ) -> tuple[Tensor, Tensor]:
    """Rotate the first R dimensions of each head of q (B, T, H, D) and k (B, T, K, D).

    cos, sin (T, R/2) fp32, R <= D. A pair is (i, i + R/2) as in Hugging Face's LLaMA or, with
    `interleaved`, (2i, 2i + 1) as in GPT-J and Crystal.
    """
    turn = _rope.rope_triton if _triton(q) else _rope.rope_reference
    return turn(q, k, cos, sin, interleaved)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int | None = None
                         ) -> tuple[Tensor, Tensor]:
    """-> (mean cross-entropy of softmax(x weightᵀ), each row's own, detached); natural log, fp32.

    x (N, H), weight (V, H) of x's dtype, targets (N,) int64 in [0, V). Logits exist `chunk_rows`
    rows at a time. The gradients are computed here, in the forward pass, unless nobody wants them.
    """
    compute = (_cross_entropy.linear_cross_entropy_triton if _triton(x)
               else _cross_entropy.linear_cross_entropy_torch)
    return compute(x, weight, targets, chunk_rows)
