"""Amber's network: LLaMA. Pre-norm blocks, rotary attention, SwiGLU, no biases, untied head.
What Crystal chooses otherwise is a table in configs.ModelConfig, Amber's values its defaults.

Parameters have Hugging Face's names and layout, so LLM360's published weights load as they are and
ours load in transformers. They are float32 always; `dtype` is what the arithmetic is done in: each
weight is cast where it is used, and the residual stream has that type.

B batch, T positions, S cached + new positions, D hidden, H query heads, K key/value heads,
h head size, V vocabulary.

    python model.py runs/amber_tiny/ckpt_009 OUT                 # for transformers, vLLM, ...
    python model.py runs/amber_7b/ckpt_359 OUT --dtype=bfloat16  # half the size, rounded

write a checkpoint as a Hugging Face directory, with the tokenizer of its data.
"""

import argparse
import copy
import json
import math
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F
from tqdm import tqdm

import kernels
from configs import ModelConfig


class Linear(nn.Linear):
    """x (..., in) -> (..., out); the float32 weight (and bias) is cast to x's type."""

    def __init__(self, n_in: int, n_out: int, bias: bool = False) -> None:
        super().__init__(n_in, n_out, bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, statistics in float32 (Zhang 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var) * weight + bias over the last dimension (Ba et al. 2016)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


class KVCache:
    """Keys and values of every layer for up to `size` positions: two (L, B, size, K, h) tensors."""

    def __init__(self, model: "LLaMA", batch: int, size: int) -> None:
        c, device = model.config, model.lm_head.weight.device
        shape = (c.num_hidden_layers, batch, size, c.num_key_value_heads, c.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=model.dtype, device=device) for _ in "kv")
        self.length = 0  # positions filled

    def window(self, first: int, length: int) -> "KVCache":
        """The rows from `first` on as a cache of their own, in the same memory."""
        rows = copy.copy(self)
        rows.k, rows.v, rows.length = self.k[:, first:], self.v[:, first:], length
        return rows

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, T, K, h) to the first B rows of a layer; their (B, S, K, h) come back."""
        rows, new, end = k.shape[0], k.shape[1], self.length + k.shape[1]
        self.k[layer, :rows, end - new : end], self.v[layer, :rows, end - new : end] = k, v
        return self.k[layer, :rows, :end], self.v[layer, :rows, :end]


class Attention(nn.Module):
    """Causal self-attention with rotary positions (Su et al. 2021) and H / K grouped heads."""

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.interleaved = layer, c.head_dim, c.rotary_interleaved
        self.scale = c.head_dim**-c.attention_scale_power
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, c.bias)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, c.bias)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, c.bias)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, c.bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (proj(x).view(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = kernels.rope(q, k, cos, sin, self.interleaved)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        return self.o_proj(kernels.attention(q, k, v, self.scale).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, c.bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, c.bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, c.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(kernels.swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = NORMS[c.norm](c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = NORMS[c.norm](c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """ids (B, T) -> final hidden states (B, T, D)."""

    def __init__(self, c: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.dtype = c, dtype
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.num_hidden_layers))
        self.norm = NORMS[c.norm](c.hidden_size, c.rms_norm_eps)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        start = cache.length if cache is not None else 0
        cos, sin = rotary_table(self.config, start, ids.shape[1], ids.device)
        x = (self.embed_tokens(ids) * self.config.embedding_scale).to(self.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, cache)
        if cache is not None:
            cache.length += ids.shape[1]
        return self.norm(x)


def rotary_table(c: ModelConfig, start: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (n, R/2) of positions start ... start + n - 1; R of h dimensions turn.

    Computed in float32 at every forward: a stored table would follow the model into bfloat16,
    where positions beyond 256 are no longer whole numbers (Amber's own runs cast it so).
    """
    size = c.rotary_dim or c.head_dim
    pairs = torch.arange(0, size, 2, device=device, dtype=torch.float32)
    position = torch.arange(start, start + n, device=device, dtype=torch.float32)
    angle = torch.outer(position, c.rope_theta ** (-pairs / size))
    return angle.cos(), angle.sin()


class LLaMA(nn.Module):
    """The language model. `config` as in config.json; `dtype`: type of the arithmetic."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.model = Decoder(config, dtype)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def allocate(self, device: torch.device) -> "LLaMA":
        """Give a model that was made on the meta device its memory; no values in it yet."""
        self.to_empty(device=device)
        if self.config.tie_word_embeddings:  # to_empty has made two of one
            self.lm_head.weight = self.model.embed_tokens.weight
        return self

    def freeze(self) -> "LLaMA":
        """Hold the matrices in the type of the arithmetic: the same results, for reading only.

        Half the memory in bfloat16, and no cast at each use, which costs more than the product it
        is for where one token is decoded. Norms stay float32, and the embedding, even as a head.
        """
        for module in self.modules():
            if isinstance(module, Linear) and module.weight is not self.model.embed_tokens.weight:
                module.to(self.dtype)
        return self.requires_grad_(False)

    def init_weights(self, seed: int) -> None:
        """Normal matrices of `initial_deviation`, ones in the norms, zeros in the biases.

        Every tensor has a stream of its own on the CPU: the values do not depend on the device,
        nor, in a sharded model, on which tensors a process holds.
        """
        for i, (name, parameter) in enumerate(self.named_parameters()):
            if parameter.dim() == 1:
                nn.init.constant_(parameter, 0 if name.endswith("bias") else 1)
                continue
            stream = torch.Generator().manual_seed((seed << 16) + i)
            values = torch.empty(parameter.shape)
            if self.config.init_truncated:
                nn.init.trunc_normal_(values, a=-2, b=2, generator=stream)
            else:
                values.normal_(generator=stream)
            fill(parameter, values.mul_(self.initial_deviation(name)))

    def initial_deviation(self, name: str) -> float:
        """Standard deviation of a matrix before training: Amber's is the same for all of them.

        muP shrinks the hidden ones with the root of the width (Yang et al. 2022, table 8), and
        init_by_depth what a block adds to the residual stream (as GPT-2).
        """
        c = self.config
        if not is_hidden(name):
            return c.initializer_range
        deviation = c.initializer_range * math.sqrt(c.width_scale)
        if c.init_by_depth and name.endswith(("o_proj.weight", "down_proj.weight")):
            deviation /= math.sqrt(2 * c.num_hidden_layers)
        return deviation

    def parameter_groups(self) -> list[dict[str, Any]]:
        """For an optimizer: [{"params": [...], "lr_scale": factor of the learning rate}].

        One group without muP; with it the hidden matrices are the second, at the width scale.
        """
        by_scale: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            scale = self.config.width_scale if is_hidden(name) else 1.0
            by_scale.setdefault(scale, []).append(parameter)
        return [{"params": group, "lr_scale": scale} for scale, group in by_scale.items()]

    def forward(self, ids: Tensor, targets: Tensor | None = None, cache: KVCache | None = None,
                last: int = 0) -> Tensor | tuple[Tensor, Tensor]:
        """ids (B, T) -> logits (B, T or `last`, V); with targets (B, T) -> (loss, losses (B, T)).

        The loss is the mean of the token losses, in nats and float32; the gradient flows through
        it alone. The logits of the whole batch never exist at once.
        """
        x = self.model(ids, cache) * (self.config.logit_scale * self.config.width_scale)
        if targets is None:
            return self.lm_head(x[:, -last:])
        weight = self.lm_head.weight.to(x.dtype)
        loss, each = kernels.linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten())
        return loss, each.view_as(targets)

    @torch.no_grad()
    def stream(self, prompts: list[list[int]], max_new_tokens: int, temperature: float = 0.0,
               top_k: int = 0, top_p: float = 1.0, eos_id: int | None = None,
               seed: int = 0) -> Iterator[Tensor]:
        """Continue prompts of any lengths >= 1: yields (B,) tokens, position by position.

        The first column yielded is that after the shortest prompt; longer prompts yield their own
        tokens until they end. temperature 0 = greedy. Stops when every row has met `eos_id`, after
        which a row repeats it. The global random state is not touched.
        """
        device = self.lm_head.weight.device
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        start, end = int(lengths.min()), int(lengths.max()) + max_new_tokens
        if start == 0:
            raise ValueError("a prompt must have at least one token")
        ids = torch.zeros(len(prompts), end, dtype=torch.int64, device=device)
        for row, prompt in zip(ids, prompts):
            row[: len(prompt)] = torch.tensor(prompt)
        done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        random = torch.Generator(device).manual_seed(seed)
        cache, fed = KVCache(self, len(prompts), end), 0
        for position in range(start, end):
            logits = self(ids[:, fed:position], cache=cache, last=1)[:, 0].float()
            fed = position
            token = sample(logits, temperature, top_k, top_p, random)
            if eos_id is not None:
                token = token.masked_fill(done, eos_id)
            token = torch.where(position < lengths, ids[:, position], token)
            ids[:, position] = token
            yield token
            if eos_id is not None:
                done |= (token == eos_id) & (position >= lengths)
            if (done | (position + 1 >= lengths + max_new_tokens)).all():
                return

    def generate(self, prompts: list[list[int]], max_new_tokens: int, eos_id: int | None = None,
                 **sampling: float) -> list[list[int]]:
        """The continuations alone, one list per prompt, each up to and with its first `eos_id`."""
        columns = list(self.stream(prompts, max_new_tokens, eos_id=eos_id, **sampling))
        shortest = min(len(p) for p in prompts)
        texts = []
        for row, prompt in enumerate(prompts):
            text = [int(c[row]) for c in columns][len(prompt) - shortest :][:max_new_tokens]
            texts.append(text[: text.index(eos_id) + 1] if eos_id in text else text)
        return texts


def is_hidden(name: str) -> bool:
    """Whether a parameter is a matrix of a block: both its sides grow with the width."""
    return ".layers." in name and name.endswith("proj.weight")


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float,
           random: torch.Generator) -> Tensor:
    """One token per row of logits (B, V): the best at temperature 0, else drawn from the best.

    top_k > 0 keeps the k most likely; top_p < 1 the fewest whose probabilities reach p together
    (Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits.argmax(-1)
    values, order = (logits / temperature).sort(-1, descending=True)
    probabilities = values.softmax(-1)
    if top_k > 0:
        probabilities[:, top_k:] = 0
    before = probabilities.cumsum(-1) - probabilities  # mass of the better ones
    probabilities[before >= top_p] = 0
    return order.gather(-1, torch.multinomial(probabilities, 1, generator=random))[:, 0]


# ---------------------------------------------------------------------------------------------
# Hugging Face directories: weights in and out

OURS_ALONE = ("norm", "bias", "rotary_dim", "rotary_interleaved", "attention_scale_power",
              "embedding_scale", "logit_scale", "base_hidden_size", "init_truncated",
              "init_by_depth")  # settings that transformers' LLaMA does not have
TYPES = {"F64": torch.float64, "F32": torch.float32,  # in safetensors' words
         "F16": torch.float16, "BF16": torch.bfloat16}


@torch.no_grad()
def fill(parameter: Tensor, values: Tensor) -> None:
    """Copy a whole tensor into a parameter; into a sharded one (FSDP2) this process's part of it.

    Nothing is communicated: every process must come with the same values.
    """
    if isinstance(parameter, DTensor):
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements,
                                   src_data_rank=None).to_local()
        parameter = parameter.to_local()
    parameter.copy_(values)


# LLM360/CrystalCoder has GPT-2's names, c_fc2 for the gate: so say the index of its weights
# and LLM360's conversion of them (crystalcoder-train, finetune/Megatron-LM). Its modeling file
# is on the hub alone: that the weights give one text here and there has not been tried.
CRYSTAL_BLOCK = {
    "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
    "self_attn.q_proj": "attn.c_attn", "self_attn.k_proj": "attn.c_attn",
    "self_attn.v_proj": "attn.c_attn", "self_attn.o_proj": "attn.c_proj",
    "mlp.gate_proj": "mlp.c_fc2", "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}


def crystal_names(c: ModelConfig) -> dict[str, str]:
    """{our parameter: LLM360/CrystalCoder's}; theirs has q, k and v in one."""
    names = {"model.embed_tokens.weight": "transformer.wte.weight",
             "model.norm.weight": "transformer.ln_f.weight",
             "model.norm.bias": "transformer.ln_f.bias", "lm_head.weight": "lm_head.weight"}
    return names | {f"model.layers.{i}.{ours}.{kind}": f"transformer.h.{i}.{theirs}.{kind}"
                    for i in range(c.num_hidden_layers)
                    for ours, theirs in CRYSTAL_BLOCK.items() for kind in ("weight", "bias")}


def from_crystal(c: ModelConfig, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors of those of (a part of) CrystalCoder's; its matrices are (in, out)."""
    found, kv = {}, c.num_key_value_heads * c.head_dim
    for ours, name in crystal_names(c).items():
        if name in theirs:
            found[ours] = theirs[name].T if is_hidden(ours) else theirs[name]
            if "c_attn" in name:
                qkv = found[ours].split((c.hidden_size, kv, kv))
                found[ours] = qkv["qkv".index(ours.split(".")[-2][0])]
    return found


def to_crystal(c: ModelConfig, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """CrystalCoder's tensors of (a part of) ours."""
    parts: dict[str, list[Tensor]] = {}
    for name, theirs in crystal_names(c).items():
        if name in ours:
            parts.setdefault(theirs, []).append(ours[name].T if is_hidden(name) else ours[name])
    return {theirs: torch.cat(part, -1) for theirs, part in parts.items()}


def is_crystal(c: ModelConfig) -> bool:
    return c.norm == "layernorm"


def crystal_config(c: ModelConfig) -> dict[str, Any]:
    """What CrystalCoder's config.json says of the same network."""
    return {"n_embd": c.hidden_size, "n_inner": c.intermediate_size,
            "n_layer": c.num_hidden_layers, "n_head": c.num_attention_heads,
            "vocab_size": c.vocab_size, "layer_norm_epsilon": c.rms_norm_eps,
            "rotary_dim": c.rotary_dim, "position_embedding_type": "rotary",
            "activation_function": "swiglu",
            "tie_word_embeddings": c.tie_word_embeddings, "mup_width_scale": c.width_scale,
            "mup_embeddings_scale": c.embedding_scale, "mup_output_alpha": c.logit_scale,
            "mup_scale_qk_dot_by_d": c.attention_scale_power == 1}


def is_hugging_face(directory: Path) -> bool:
    return (directory / "config.json").exists() and not (directory / "manifest.json").exists()


def load_hugging_face(model: LLaMA, directory: Path) -> None:
    """Fill `model` from config.json and *.safetensors or pytorch_model*.bin, tensor by tensor.

    Raises SystemExit with everything that does not fit at once.
    """
    def refuse(problems: list[str]) -> None:
        if problems:
            raise SystemExit(f"{directory} cannot be loaded: {'; '.join(problems)}.")

    refuse(config_problems(model.config, directory))
    weights, problems = model.state_dict(), []
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    missing = dict.fromkeys(weights)
    for name, values in in_our_names(model.config, published_tensors(directory)):
        missing.pop(name, None)
        if name not in weights:  # old exports carry rotary tables and masks, some a tied head
            known = re.search(r"rotary_emb|attn\.(masked_)?bias$|^lm_head\.weight$", name)
            problems += [f"{name} is unknown"] * (not known)
        elif weights[name].shape != values.shape:
            problems.append(f"{name} is {tuple(values.shape)} there,"
                            f" {tuple(weights[name].shape)} here")
        else:
            fill(weights[name], values)
    refuse(problems + [f"{name} is missing" for name in missing])


def in_our_names(c: ModelConfig, published: Iterator[tuple[str, Tensor]]
                 ) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a published directory under our names; those that have none keep theirs."""
    for name, values in published:
        ours = from_crystal(c, {name: values}) if is_crystal(c) else {}
        yield from (ours or {name: values}).items()


def config_problems(c: ModelConfig, directory: Path) -> list[str]:
    """What config.json says otherwise than `c`; what it does not say is LLaMA's default."""
    try:
        said = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        rope = said.get("rope_parameters") or said.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type"))
    except (OSError, ValueError, AttributeError):
        return ["its config.json cannot be read"]
    if is_crystal(c):
        ours = crystal_config(c)
        return [f"{name} is {said.get(name)!r} there, {value!r} here"
                for name, value in ours.items() if said.get(name, value) != value]
    if (kind := said.get("model_type", "llama")) != "llama":
        return [f"it is a model of type {kind!r}, and only 'llama' is known here"]
    ours = {f.name: getattr(c, f.name) for f in fields(ModelConfig)}
    ours |= {"hidden_act": "silu", "rope_type": "default"}
    theirs = ours | asdict(ModelConfig()) | said | rope | {"rope_type": rope_type or "default"}
    theirs["num_key_value_heads"] = (theirs["num_key_value_heads"]
                                     or theirs["num_attention_heads"])
    return [f"{name} is {theirs[name]!r} there, {value!r} here" for name, value in ours.items()
            if theirs[name] != value and name != "initializer_range"]


def published_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every file of weights, one tensor in memory at a time."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        file = directory / f"{stem}.{suffix}.index.json"
        try:
            names = [path.name for path in directory.glob(f"{stem}*.{suffix}")]
            if file.exists():
                names = json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()
            for file in sorted({directory / name for name in names}):
                yield from read_bin(file) if suffix == "bin" else read_safetensors(file)
        except Exception as error:  # damaged files raise all kinds
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise SystemExit(f"{file} cannot be read ({reason.splitlines()[0]}): is the download"
                             " whole?")
        if names:
            return
    raise SystemExit(f"{directory} has no weights: neither model*.safetensors nor"
                     " pytorch_model*.bin.")


def read_bin(path: Path) -> Iterable[tuple[str, Tensor]]:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True).items()


def read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a file: 8 bytes of length, a JSON header of that length, the data."""
    with open(path, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        if size > path.stat().st_size:
            raise ValueError("it is not a safetensors file")
        for name, about in json.loads(f.read(size)).items():
            if name == "__metadata__":
                continue
            if about["dtype"] not in TYPES:
                raise ValueError(f"{name} is of type {about['dtype']}")
            values = torch.empty(about["shape"], dtype=TYPES[about["dtype"]])
            f.seek(8 + size + about["data_offsets"][0])
            if f.readinto(values.flatten().view(torch.uint8).numpy()) < values.nbytes:
                raise ValueError("it is cut short")
            yield name, values


def write_safetensors(path: Path, published: dict[str, tuple[torch.Size, list[str]]],
                      c: ModelConfig, dtype: torch.dtype, saved: Path) -> None:
    """Tensors of a checkpoint's model/ (`saved`) as one file, one in memory at a time.

    published: {name in the file: (shape, our names of what it consists of)}.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, _) in published.items():
        begin, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": next(n for n, t in TYPES.items() if t == dtype),
                        "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    with torch.device("meta"):
        state = LLaMA(c).state_dict()
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, (_, parts) in published.items():
            ours = {part: torch.empty(state[part].shape) for part in parts}
            try:
                dcp.load(ours, checkpoint_id=saved, no_dist=True)
            except dcp.api.CheckpointException as error:  # around anything, Ctrl-C too
                raise next(iter(error.failures.values()))[0]
            values = to_crystal(c, ours)[name] if is_crystal(c) else ours[name]
            f.write(values.to(dtype).contiguous().view(torch.uint8).numpy())


def published_names(c: ModelConfig) -> dict[str, tuple[torch.Size, list[str]]]:
    """{name in a Hugging Face directory: (shape, our names of what it consists of)}."""
    with torch.device("meta"):
        state = LLaMA(c).state_dict()
    if c.tie_word_embeddings:
        del state["lm_head.weight"]
    theirs = to_crystal(c, state) if is_crystal(c) else state
    name_of = crystal_names(c) if is_crystal(c) else {name: name for name in state}
    return {name: (values.shape, [ours for ours in state if name_of[ours] == name])
            for name, values in theirs.items()}


def write_weights(saved: Path, c: ModelConfig, out: Path, dtype: torch.dtype,
                  shard_bytes: float) -> None:
    """A checkpoint's model/ as model.safetensors; larger ones as shards and an index."""
    tensors, shards, size = published_names(c), [{}], 0
    for name, about in tensors.items():
        n_bytes = about[0].numel() * dtype.itemsize
        size += n_bytes
        if size > shard_bytes and shards[-1]:
            shards, size = [*shards, {}], n_bytes
        shards[-1][name] = about
    files = {f"model-{i:05}-of-{len(shards):05}.safetensors": shard
             for i, shard in enumerate(shards, 1)}
    if len(shards) == 1:
        files = {"model.safetensors": tensors}
    for file, shard in tqdm(files.items(), desc="writing", unit="file", disable=None):
        write_safetensors(out / file, shard, c, dtype, saved)
    if len(shards) > 1:
        total = sum(shape.numel() for shape, _ in tensors.values()) * dtype.itemsize
        write_json(out / "model.safetensors.index.json", {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, shard in files.items() for name in shard}})


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def export(checkpoint: Path, out: Path, dtype: torch.dtype = torch.float32, data_dir: str = "",
           shard_bytes: float = 5e9) -> str:
    """Write a checkpoint of train.py as a Hugging Face directory; returns what to say of it.

    data_dir: where the data with the tokenizer lies now; "" = where training had it. Raises
    SystemExit when it cannot be done, and leaves nothing half-written.
    """
    # here, because the network knows nothing of data and training
    import prepare_data
    import train

    if out.exists():
        raise SystemExit(f"{out} exists already: delete it, or name another place.")
    if not (checkpoint / "manifest.json").exists():
        raise SystemExit(f"{checkpoint} is not a checkpoint, like runs/NAME/ckpt_007: it has no"
                         " manifest.json.")
    if problem := train.problem_of(checkpoint, ("model",)):
        raise SystemExit(f"{checkpoint} is not a usable checkpoint: {problem}.")
    manifest = train.read_json(checkpoint / "manifest.json")
    settings, tokenizer, note = manifest["config"], None, ""
    c = ModelConfig(**{f.name: settings.get(f.name, f.default) for f in fields(ModelConfig)})
    default = ModelConfig()
    other = [f"{name} = {getattr(c, name)!r}" for name in OURS_ALONE
             if getattr(c, name) != getattr(default, name)]
    if other and not is_crystal(c):
        raise SystemExit(f"{checkpoint} cannot be published as a LLaMA: {', '.join(other)} is known"
                         " to no architecture of transformers.")
    place = data_dir or settings["data_dir"]
    if data_dir or Path(place, "manifest.json").exists():
        tokenizer = prepare_data.load_tokenizer(place)
        if tokenizer.n_vocab > c.vocab_size:
            raise SystemExit(f"The tokenizer of {place} has {tokenizer.n_vocab} ids,"
                             f" {checkpoint} has {c.vocab_size}: name the data it was trained on"
                             " with --data_dir.")
        if train.data_sha256(place) != manifest["data_sha256"]:
            note = f"\n{place} is not what it was trained on: is the tokenizer the same?"
    else:
        note = (f"\nThe tokenizer is missing: it lies with the data, and {place} is not there;"
                " --data_dir=PATH says where it is.")
    eos_id = tokenizer.eos_id if tokenizer else None
    tmp = out.with_name(f"{out.name}.tmp")
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        write_weights(checkpoint / "model", c, tmp, dtype, shard_bytes)
        # no BOS, said outright: transformers would take LLaMA's 1
        said = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **{
            k: v for k, v in asdict(c).items() if k not in OURS_ALONE},
            "max_position_embeddings": settings["seq_len"]}
        if is_crystal(c):  # loads with the modeling file that LLM360/CrystalCoder has on the hub
            said = {"architectures": ["CrystalCoderLMHeadModel"], "model_type": "crystalcoder",
                    "n_positions": settings["seq_len"], **crystal_config(c)}
        write_json(tmp / "config.json", said | {
            "bos_token_id": None, "eos_token_id": eos_id, "torch_dtype": str(dtype)[6:]})
        write_json(tmp / "generation_config.json", {"eos_token_id": eos_id})
        if tokenizer:
            tokenizer.save_hugging_face(tmp)
        tmp.rename(out)
    except OSError as error:
        raise SystemExit(f"Could not write {out}: {error.strerror or error}.")
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return f"{out}: {c.n_params:,} parameters in {str(dtype)[6:]}.{note}"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="model.py", description="Write a checkpoint of"
                                     " train.py as a Hugging Face directory.")
    parser.add_argument("checkpoint", type=Path, help="runs/NAME/ckpt_007")
    parser.add_argument("out", type=Path, help="the directory to make")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"),
                        help="of the written weights; bfloat16 rounds them to half the size")
    parser.add_argument("--data_dir", default="", help="where the data, and its tokenizer, lies"
                        " now; default: where training had it")
    a = parser.parse_args(argv)
    print(export(a.checkpoint, a.out, getattr(torch, a.dtype), a.data_dir))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        raise SystemExit("stopped; nothing was written")
