"""Crystal: its choices in the network, its initial weights, muP, and the released figures."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from test_model import ids

import train
from configs import ModelConfig, load
from model import LLaMA, is_hidden, meta_model

# Crystal's choices, at any size; a test adds its own.
CRYSTAL: dict[str, Any] = {
    "norm": "layernorm", "rms_norm_eps": 1e-5, "bias": True, "tie_word_embeddings": True,
    "rotary_interleaved": True, "attention_scale_power": 1.0, "embedding_scale": 14.6,
    "logit_scale": 2.22, "initializer_range": 0.073, "init_truncated": True,
    "init_by_depth": True}
SMALL = {**CRYSTAL, "vocab_size": 97, "hidden_size": 64, "intermediate_size": 170,
         "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
         "rotary_dim": 4, "base_hidden_size": 16}


def small(**changes: Any) -> LLaMA:
    net = LLaMA(ModelConfig(**{**SMALL, **changes}))
    net.init_weights(1)
    with torch.no_grad():  # ones and zeros would hide a swapped or forgotten one
        for i, p in enumerate(net.parameters()):
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.2)
    return net


# ---- the network


def plain(net: LLaMA, x: torch.Tensor) -> torch.Tensor:
    """Crystal's logits from its formulas, position by position, head by head, in float64."""
    c, p = net.config, {n: v.double() for n, v in net.named_parameters()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * p[name + ".weight"] + p[name + ".bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ p[name + ".weight"].T + p[name + ".bias"]

    def turn(x: torch.Tensor) -> torch.Tensor:  # (B, T, h)
        x = x.clone()
        for t, i in itertools.product(range(x.shape[1]), range(c.rotary_dim // 2)):
            angle = t * c.rope_theta ** (-2 * i / c.rotary_dim)
            a, b = x[:, t, 2 * i].clone(), x[:, t, 2 * i + 1].clone()
            x[:, t, 2 * i] = a * math.cos(angle) - b * math.sin(angle)
            x[:, t, 2 * i + 1] = b * math.cos(angle) + a * math.sin(angle)
        return x

    table, future = p["model.embed_tokens.weight"], torch.ones(x.shape[1], x.shape[1]).triu(1)
    h = 14.6 * table[x]
    for layer in (f"model.layers.{i}." for i in range(c.num_hidden_layers)):
        y = norm(h, layer + "input_layernorm")
        q, k, v = (linear(y, f"{layer}self_attn.{n}_proj").split(c.head_dim, -1)
                   for n in "qkv")
        scores = [turn(a) @ turn(b).mT / c.head_dim for a, b in zip(q, k)]
        heads = [s.masked_fill(future == 1, -math.inf).softmax(-1) @ value
                 for s, value in zip(scores, v)]
        h = h + linear(torch.cat(heads, -1), layer + "self_attn.o_proj")
        y = norm(h, layer + "post_attention_layernorm")
        gate = torch.nn.functional.silu(linear(y, layer + "mlp.gate_proj"))
        h = h + linear(gate * linear(y, layer + "mlp.up_proj"), layer + "mlp.down_proj")
    scale = 2.22 * c.base_hidden_size / c.hidden_size
    return scale * norm(h, "model.norm") @ table.T


def test_logits_and_loss_are_the_formulas() -> None:
    net, x = small(), ids(2, 13)
    expected = plain(net, x)
    torch.testing.assert_close(net(x).double(), expected, rtol=1e-4, atol=1e-5)
    loss, _ = net(x[:, :-1], x[:, 1:])
    theirs = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1),
                                               x[:, 1:].flatten())
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    sequence = x[:1, :4].tolist()[0]
    for _ in range(6):
        sequence.append(int(plain(net, torch.tensor([sequence]))[0, -1].argmax()))
    assert net.generate(x[:1, :4].tolist(), 6)[0] == sequence[4:]  # through the cache


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"bias": False},
                                     {"num_key_value_heads": 2}, {"norm": "rmsnorm"}])
def test_parameters_and_flops_are_counted_right(changes: dict) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    net, x, counter = small(**changes), ids(1, 33), FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        net(x[:, :-1], x[:, 1:])[0].backward()
    assert counter.get_total_flops() == net.flops_per_token(32) * 32


def test_initial_standard_deviations_are_the_released_ones() -> None:
    c, _ = load(["configs/crystal_7b_stage1.py"])
    with torch.device("meta"):
        net = LLaMA(c)
    std = {name.removeprefix("model.layers.0."): net.init_std(name)
           for name, p in net.named_parameters() if p.dim() == 2}
    assert std["model.embed_tokens.weight"] == 0.073
    assert std["self_attn.q_proj.weight"] == std["mlp.up_proj.weight"] == 0.01825
    assert std["self_attn.o_proj.weight"] == std["mlp.down_proj.weight"] == 0.00228125
    assert c.logit_scale * c.width_scale == 0.13875
    net = LLaMA(ModelConfig(**SMALL))
    net.init_weights(3)
    for name, p in net.named_parameters():
        if p.dim() == 2:
            limit = 2 * net.init_std(name)
            assert 0.97 * limit < p.abs().max() <= limit
            # what is left of a normal between ± 2 deviations
            assert p.std().item() == pytest.approx(0.8796 * limit / 2, rel=0.05)
        else:
            assert p.eq(0 if name.endswith("bias") else 1).all()


# ---- muP


def sizes(width: int, **changes: Any) -> list[dict[str, float]]:
    """Mean size of what each kind of layer puts out, before and after 5 steps on one batch."""
    c = ModelConfig(**{**CRYSTAL, "vocab_size": 64, "hidden_size": width,
                       "num_hidden_layers": 2, "intermediate_size": 2 * width,
                       "num_attention_heads": 2, "num_key_value_heads": 2,
                       "rotary_dim": width // 8, "base_hidden_size": 64, **changes})
    net, x = LLaMA(c), torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(0))
    net.init_weights(0)
    optimizer = torch.optim.AdamW(net.parameter_groups(), betas=(0.9, 0.95), fused=True)
    found: list[dict[str, float]] = []
    for name, module in net.named_modules():
        if name.endswith(("self_attn", "mlp", "q_proj")):
            module.register_forward_hook(lambda m, args, y, name=name: found[-1].update(
                {name: y.abs().mean().item()}))
    for _ in range(6):
        found.append({})
        logits = net(x[:, :-1])
        found[-1]["logits"] = logits.abs().mean().item()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten()).backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * group["lr_scale"]
        optimizer.step()
        optimizer.zero_grad()
    return [found[0], found[5]]


def slopes(**changes: Any) -> list[dict[str, float]]:
    """Growth of each size with the width, d log size / d log width over 64 ... 1024."""
    widths = (64, 256, 1024)
    begin, after = zip(*(sizes(width, **changes) for width in widths))
    return [{name: np.polyfit(np.log(widths), np.log([r[name] for r in rows]), 1)[0].item()
             for name in rows[0]} for rows in (begin, after)]


def test_coordinates_do_not_move_with_the_width() -> None:
    """Yang et al. 2022, app. D.1: what every layer puts out keeps its size, before and in
    training. Logits begin smaller in wider networks, by no more than the root: there they are
    a sum of as many random terms as there are dimensions, and later they are learned."""
    begin, after = slopes()
    assert -0.55 < begin.pop("logits") < 0.05
    assert all(abs(slope) < 0.1 for slope in begin.values()), begin
    assert all(abs(slope) < 0.2 for slope in after.values()), after


def test_coordinates_grow_without_mup() -> None:
    """The same measure on the same network with base_hidden_size = 0: it can fail."""
    _, after = slopes(base_hidden_size=0)
    assert all(slope > 0.4 for slope in after.values()), after


def test_the_hidden_matrices_are_a_group_of_their_own() -> None:
    amber = LLaMA(ModelConfig(**{**SMALL, "base_hidden_size": 0}))
    (group,) = amber.parameter_groups()
    assert group["lr_scale"] == 1 and len(group["params"]) == len(list(amber.parameters()))
    crystal = LLaMA(ModelConfig(**SMALL))
    rest, hidden = crystal.parameter_groups()
    assert (rest["lr_scale"], hidden["lr_scale"]) == (1.0, 0.25)
    assert len(hidden["params"]) == 7 * 3 and all(p.dim() == 2 for p in hidden["params"])
    assert sorted(map(id, rest["params"] + hidden["params"])) == sorted(
        map(id, crystal.parameters()))
    assert {n for n, p in crystal.named_parameters() if p.dim() == 2 and not is_hidden(n)} == {
        "model.embed_tokens.weight"}


# ---- the released figures


@pytest.mark.parametrize("stage, steps, line, first_line", [
    (1, 79_721, (0.012, 0.00012408, 86, 294_337), 0.0087869),
    (2, 214_387, (0.0087825, 0.00013679, 86, 214_301), 0.00013679),
    (3, 27_728, (0.002, 0.0002, 276, 27_452), 0.0002)])
def test_crystal_7b_is_crystal(stage: int, steps: int, line: tuple, first_line: float) -> None:
    """Figures of LLM360's crystalcoder-train, params.yaml of each phase; the last rate of
    stage 1 is where its line stands when it is left."""
    c, _ = load([f"configs/crystal_7b_stage{stage}.py"])
    net = meta_model(c)
    # LLM360's index of the weights says how many bytes they are: these in fp32, the head once
    # more, and for each block a mask of 2048 x 2048 bytes and a number.
    assert net.n_params == 6_575_278_720
    assert 4 * net.n_params + 4 * 32032 * 4096 + 32 * (2048**2 + 4) == 26_960_145_024
    assert c.max_steps == steps and c.n_chunks * c.sequences_per_chunk // 2112 >= steps
    peak, end, warmup, decay = line
    total = 10**9  # the data's own length does not matter
    rate = {step: train.learning_rate(c, step, total)
            for step in (1, warmup, warmup + 1, steps)}
    assert rate[warmup] == peak and rate[1] == peak / warmup
    assert peak - rate[warmup + 1] == pytest.approx((peak - end) / decay, rel=1e-6)
    assert rate[steps] == pytest.approx(first_line, rel=1e-5)
    assert train.learning_rate(c, warmup + decay, total) == pytest.approx(end, rel=1e-12)
    assert (c.adam_beta1, c.adam_beta2, c.adam_eps, c.weight_decay, c.grad_clip) == (
        0.9, 0.95, 1e-9, 0.1, 1.0)
    assert (c.global_batch_size, c.tokens_per_step, c.seq_len) == (2112, 4_325_376, 2048)
    assert (c.width_scale, c.head_dim, c.rotary_dim) == (0.0625, 128, 32)
    assert c.sequences_per_chunk // 2112 == (1000 if stage == 3 else 1500)


def test_stages_one_and_two_are_one_line() -> None:
    one, two = (load([f"configs/crystal_7b_stage{i}.py"])[0] for i in (1, 2))
    slope = [train.learning_rate(c, 1000, 0) - train.learning_rate(c, 1001, 0)
             for c in (one, two)]
    assert slope == pytest.approx([4.034e-8, 4.034e-8], rel=3e-4)
    assert two.learning_rate == pytest.approx(train.learning_rate(one, 79_721, 0), rel=6e-4)


def test_each_stage_begins_with_the_one_before() -> None:
    for size in ("tiny", "7b"):
        configs = [load([f"configs/crystal_{size}_stage{i}.py"])[0] for i in (1, 2, 3)]
        network = [{f: getattr(c, f) for f in ModelConfig.__dataclass_fields__}
                   for c in configs]
        assert network[0] == network[1] == network[2]
        for before, after in itertools.pairwise(configs):
            run, checkpoint = after.init_from.rsplit("/", 1)
            assert run == before.run_dir and checkpoint == (
                f"step_{before.max_steps:07d}" if before.max_steps
                else f"ckpt_{before.n_chunks - 1:03d}")
