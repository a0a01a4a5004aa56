"""LayerNorm, forward and backward: Crystal's norm.

    rstd = 1 / sqrt(var(x) + eps)    x̂ = (x - mean(x)) rstd    y = x̂ w + b    (arXiv 1607.06450)

    g = dy w      dx = rstd (g - mean(g) - x̂ mean(g x̂))      dw = sum of dy x̂      db = sum of dy

The variance is divided by N and not by N - 1, as everywhere in layer normalization. The kernels are
those of rmsnorm.py with MEAN.

    x  (..., N)        weight, bias  (N,)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.rmsnorm import norm_triton


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`layer_norm` by PyTorch's own, in fp32 at least and rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return y.to(x.dtype)


def layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`layer_norm` by the kernels of rmsnorm.py."""
    return norm_triton(x, weight, bias, eps)
