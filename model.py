"""The network of Amber: LLaMA. Pre-norm blocks, rotary attention, SwiGLU, no biases, untied head.
Where Crystal chooses otherwise there is a setting in configs.ModelConfig; its default is Amber's.

Parameters have Hugging Face's names and shapes, so LLM360's published weights load as they are, and
ours load in transformers. They are always float32. `dtype` is the type of the arithmetic: a weight
is cast where it is used, and the residual stream has that type.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn import functional as F

import kernels
from configs import ModelConfig, UserError

# The letters in the shape comments below:
#   B  sequences of a batch             D  hidden size, the width of the residual stream
#   T  positions of a sequence          H  query heads
#   S  cached + new positions           K  key and value heads; K divides H
#   V  vocabulary                       h  head size, D / H
#   L  layers                           I  intermediate size, the width of the MLP
#   R  dimensions of a head that rotate (in Amber all h)


class Linear(nn.Linear):
    """x (..., in) -> x Wᵀ + b (..., out); the float32 parameters are cast to x's type."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Norm(nn.Module):
    """Amber's RMSNorm, x / rms(x) * weight (Zhang 2019), or Crystal's LayerNorm,
    (x - mean) / std * weight + bias (Ba et al. 2016); over the last dimension, in float32."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.eps = c.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(c.hidden_size))
        self.bias = nn.Parameter(torch.zeros(c.hidden_size)) if c.norm == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return kernels.rms_norm(x, self.weight, self.eps)  # (B, T, D)
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)  # (B, T, D)


def rotary_table(c: ModelConfig, start: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (n, R/2) of the angles at positions start ... start + n - 1 (Su et al. 2021)."""
    # Position t rotates pair i by t / theta^(2i/R), so q·k depends on how far apart two tokens are.
    # The table is computed in float32 at every forward. A stored one would follow the model into
    # bfloat16, which has no odd numbers beyond 256; Amber's own runs cast it so.
    R = c.rotary_dim or c.head_dim
    pairs = torch.arange(0, R, 2, device=device, dtype=torch.float32)  # (R/2,): 0, 2, 4, ...
    positions = torch.arange(start, start + n, device=device, dtype=torch.float32)  # (n,)
    angles = torch.outer(positions, c.rope_theta ** (-pairs / R))  # (n, R/2)
    return angles.cos(), angles.sin()


class KVCache:
    """Keys and values of all layers for up to `size` positions: no position is computed twice."""

    def __init__(self, model: "LLaMA", batch: int, size: int) -> None:
        c, device = model.config, model.lm_head.weight.device
        shape = (c.num_hidden_layers, batch, size, c.num_key_value_heads, c.head_dim)
        self.k = torch.zeros(shape, dtype=model.dtype, device=device)  # (L, B, size, K, h)
        self.v = torch.zeros(shape, dtype=model.dtype, device=device)  # (L, B, size, K, h)
        self.length = 0  # positions filled in every layer; Decoder moves it on

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, T, K, h); returns all that there are (B, S, K, h)."""
        S = self.length + k.shape[1]
        self.k[layer, :, self.length : S] = k
        self.v[layer, :, self.length : S] = v
        return self.k[layer, :, :S], self.v[layer, :, :S]  # (B, S, K, h) each


class Attention(nn.Module):
    """Causal self-attention with rotary positions; H / K query heads share a key/value head."""

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = c, layer
        # 1/sqrt(h) keeps q·k at variance 1 where q and k are independent, as they are at first.
        # muP takes 1/h, because training aligns them (Yang et al. 2022).
        self.scale = c.head_dim**-c.attention_scale_power
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, c.bias)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, c.bias)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, c.bias)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, c.bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        c = self.config
        B, T, _ = x.shape  # (B, T, D)
        H, K, h = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        q = self.q_proj(x).view(B, T, H, h)  # (B, T, D) -> (B, T, H * h) -> (B, T, H, h)
        k = self.k_proj(x).view(B, T, K, h)  # (B, T, D) -> (B, T, K * h) -> (B, T, K, h)
        v = self.v_proj(x).view(B, T, K, h)  # (B, T, D) -> (B, T, K * h) -> (B, T, K, h)
        # Positions enter here and nowhere else: q and k are rotated, v is not.
        q, k = kernels.rope(q, k, cos, sin, c.rotary_interleaved)  # shapes as before
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, S, K, h) each
        # A query sees the keys up to its own position. The scores (B, H, T, S) never exist whole.
        y = kernels.attention(q, k, v, self.scale)  # (B, T, H, h)
        return self.o_proj(y.view(B, T, H * h))  # (B, T, H, h) -> (B, T, H * h) -> (B, T, D)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, c.bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, c.bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, c.bias)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)  # (B, T, D) -> (B, T, I)
        up = self.up_proj(x)  # (B, T, D) -> (B, T, I)
        return self.down_proj(kernels.swiglu(gate, up))  # (B, T, I) -> (B, T, D)


class Block(nn.Module):
    """Attention, then the MLP: each reads the normed residual stream and adds its result to it."""

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = Norm(c)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = Norm(c)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)  # (B, T, D)
        return x + self.mlp(self.post_attention_layernorm(x))  # (B, T, D)


class Decoder(nn.Module):
    """All but the head: ids (B, T) -> final hidden states (B, T, D)."""

    def __init__(self, c: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.dtype = c, dtype
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.num_hidden_layers))
        self.norm = Norm(c)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        start, T = (0 if cache is None else cache.length), ids.shape[1]
        cos, sin = rotary_table(self.config, start, T, ids.device)  # (T, R/2) each
        x = (self.embed_tokens(ids) * self.config.embedding_scale).to(self.dtype)  # -> (B, T, D)
        for layer in self.layers:
            x = layer(x, cos, sin, cache)  # (B, T, D)
        if cache is not None:
            cache.length += T
        return self.norm(x)  # (B, T, D)


class LLaMA(nn.Module):
    """The language model; the settings of the network are in the names of config.json."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.model = Decoder(config, dtype)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor, targets: Tensor | None = None, cache: KVCache | None = None,
                logits_to_keep: int = 0) -> Tensor | tuple[Tensor, Tensor]:
        """ids (B, T) -> logits (B, T, V), or those of the last `logits_to_keep` positions alone;
        with targets (B, T) -> (mean loss, token_losses (B, T)), in nats and float32."""
        x = self.model(ids, cache)  # (B, T, D)
        # muP: a wider x gives larger logits, and this takes it back. For Amber the factor is 1.
        x = x * (self.config.logit_scale * self.config.width_scale)
        if targets is None:
            return self.lm_head(x[:, -logits_to_keep:])  # (B, T, D) -> (B, T, V); -0 keeps all
        # The logits of a whole batch would be the largest tensor of a training step, so head and
        # loss are one operation, a part at a time. The gradient flows through the mean alone.
        x = x.flatten(0, 1)  # (B, T, D) -> (B * T, D)
        weight = self.lm_head.weight.to(x.dtype)  # (V, D)
        loss, token_losses = kernels.linear_cross_entropy(x, weight, targets.flatten())
        return loss, token_losses.view_as(targets)  # (), (B * T,) -> (B, T)

    @property
    def n_params(self) -> int:
        """Parameters; a tied head is counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, seq_len: int) -> int:
        """Training FLOPs per token: 6 per matmul weight, 12 L T d of attention (PaLM, app. B)."""
        # Counted from the modules, so that a new kind of block needs no change here. 6 = 2 for the
        # forward pass, 4 for the backward one. The embedding is looked up, not multiplied.
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, Linear))
        # A token is multiplied with T others twice (q k and p v), although a half is masked.
        c = self.config
        attention = 12 * c.num_hidden_layers * seq_len * c.num_attention_heads * c.head_dim
        return 6 * weights + attention

    def init_weights(self, seed: int) -> None:
        """Matrices are normal with deviation `init_std`, norms begin as ones, biases as zeros."""
        for i, (name, parameter) in enumerate(self.named_parameters()):
            if parameter.dim() == 1:
                nn.init.constant_(parameter, 0 if name.endswith("bias") else 1)
                continue
            # Every matrix has a random stream of its own, on the CPU: its values depend neither on
            # the device nor, in a sharded model, on which parts a process holds.
            generator = torch.Generator().manual_seed((seed << 16) + i)
            values = torch.empty(parameter.shape)
            if self.config.init_truncated:
                nn.init.trunc_normal_(values, generator=generator)  # at ±2
            else:
                values.normal_(generator=generator)
            copy_into_shard(parameter, values.mul_(self.init_std(name)))

    def init_std(self, name: str) -> float:
        """Standard deviation of a matrix before training; Amber's is the same for all of them."""
        c = self.config
        if not is_hidden(name):
            return c.initializer_range
        # muP (Yang et al. 2022, table 8): a sum of n products keeps its size if its weights shrink
        # by the root of n.
        std = c.initializer_range * math.sqrt(c.width_scale)
        # As in GPT-2: two matrices a block add to the residual stream, a sum of 2 L in the end.
        if c.init_by_depth and name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * c.num_hidden_layers)
        return std

    def parameter_groups(self) -> list[dict[str, Any]]:
        """For an optimizer: [{"params": [...], "lr_scale": factor of the learning rate}, ...]."""
        # Adam moves every weight by about the learning rate, and in a sum of n products the moves
        # add up: in muP the rate of the hidden matrices shrinks with n, so they are a second group.
        by_scale: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            scale = self.config.width_scale if is_hidden(name) else 1.0
            by_scale.setdefault(scale, []).append(parameter)
        return [{"params": group, "lr_scale": scale} for scale, group in by_scale.items()]

    def materialize(self, device: torch.device) -> "LLaMA":
        """Give a model made on the meta device its memory, without any values yet."""
        self.to_empty(device=device)
        if self.config.tie_word_embeddings:  # to_empty has made two of one
            self.lm_head.weight = self.model.embed_tokens.weight
        return self

    def cast_for_inference(self) -> "LLaMA":
        """Hold the matrices in the type of the arithmetic: the same results, without gradients."""
        # In bfloat16 this halves the memory and saves the cast at each use, which takes longer than
        # the product where one token is decoded. Norms compute in float32, and the embedding (which
        # may be the head too) is scaled before it is cast: these stay.
        for module in self.modules():
            if isinstance(module, Linear) and module.weight is not self.model.embed_tokens.weight:
                module.to(self.dtype)
        return self.requires_grad_(False)

    @torch.no_grad()
    def generate(self, prompts: Any, n: int, temperature: float = 0.0,
                 seed: int = 0) -> list[list[int]]:
        """The n tokens after each prompt, a list for each: the likeliest at temperature 0, else
        drawn. prompts (B, T), or (T,) for one: token ids, as lists, a tensor or an array."""
        ids = prompts if isinstance(prompts, Tensor) else torch.tensor(prompts)
        ids = ids.to(self.lm_head.weight.device).view(-1, ids.shape[-1]).long()  # (B, T)
        cache = KVCache(self, len(ids), ids.shape[1] + n)
        # A generator of its own: the global random state belongs to training.
        generator = torch.Generator(ids.device).manual_seed(seed)
        tokens = [ids[:, :0]]
        for _ in range(n):
            logits = self(ids, cache=cache, logits_to_keep=1)[:, 0].float()  # (B, V)
            if not logits.isfinite().all():
                raise UserError("The logits are not finite: the weights are damaged, or diverged.")
            ids = logits.argmax(-1, keepdim=True)  # (B, 1)
            if temperature:
                ids = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            tokens.append(ids)
        return torch.cat(tokens, 1).tolist()  # (B, n)


def is_hidden(name: str) -> bool:
    """Whether a parameter is a matrix of a block, both sides of which grow with the width (muP)."""
    return ".layers." in name and name.endswith("proj.weight")


@torch.no_grad()
def copy_into_shard(parameter: Tensor, values: Tensor) -> None:
    """Copy a whole tensor into a parameter; into a sharded one (FSDP2) only this process's part."""
    # Every process comes with the same `values`. They may be a mapped file, of which that part
    # alone is read: of HSDP's replicas by the first, from which the others get it.
    replicas = None
    if isinstance(parameter, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements)
        for dim in range(values.dim()):
            values = values.narrow(dim, offset[dim], shape[dim])  # a view; nothing is read yet
        mesh, parameter = parameter.device_mesh, parameter.to_local()
        replicas = mesh.get_group("replicate") if mesh.ndim == 2 else None
    if not replicas or replicas.rank() == 0:
        parameter.copy_(values)
    if replicas:
        torch.distributed.broadcast(parameter, group=replicas, group_src=0)


def meta_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> LLaMA:
    """A model whose tensors have shapes and no memory: to count, or to be given memory later."""
    with torch.device("meta"):
        return LLaMA(config, dtype)


def continue_text(model: LLaMA, tokenizer: Any, prompt: str, n: int,
                  temperature: float = 0.0) -> str:
    """The prompt and n generated tokens; does not stop at eos_id. Temperature 0 is greedy."""
    # An empty prompt is the start of a document: in the data that comes after an eos_id.
    ids = tokenizer(prompt) or [tokenizer.eos_id]
    [continuation] = model.generate(ids, n, temperature=temperature)
    return tokenizer.decode(ids + continuation)
