"""Crystal: its choices in the network, its initial weights, muP, and the released figures."""

import itertools
import math

import pytest
import torch
from test_model import CRYSTAL, SMALL, ids, small

import train
from configs import ModelConfig, load
from model import LLaMA, meta_model


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
    net, x = small(**CRYSTAL), ids(2, 13)
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


def test_initial_standard_deviations_are_the_released_ones() -> None:
    c, _ = load(["configs/crystal_7b_stage1.py"])
    net = meta_model(c)
    for name, std in (("model.embed_tokens", 0.073), ("model.layers.0.self_attn.q_proj", 0.01825),
                      ("model.layers.0.mlp.up_proj", 0.01825),
                      ("model.layers.0.self_attn.o_proj", 0.00228125),
                      ("model.layers.0.mlp.down_proj", 0.00228125)):
        assert net.init_std(f"{name}.weight") == std
    assert c.logit_scale * c.width_scale == 0.13875
    net = LLaMA(ModelConfig(**SMALL | CRYSTAL))
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


def sizes(width: int, base: int) -> list[dict[str, float]]:
    """Mean size of what each kind of layer puts out, before and after 5 steps on one batch."""
    net = LLaMA(ModelConfig(**CRYSTAL | {
        "vocab_size": 64, "hidden_size": width, "intermediate_size": 2 * width,
        "num_hidden_layers": 2, "num_attention_heads": 2, "rotary_dim": width // 8,
        "base_hidden_size": base}))
    net.init_weights(0)
    x = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(net.parameter_groups(), betas=(0.9, 0.95), fused=True)
    steps: list[dict[str, float]] = []
    for name, module in net.named_modules():
        if name.endswith(("self_attn", "mlp", "q_proj", "lm_head")):
            module.register_forward_hook(lambda m, args, y, name=name: steps[-1].update(
                {name: y.abs().mean().item()}))
    for _ in range(6):
        steps.append({})
        logits = net(x[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten()).backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * group["lr_scale"]
        optimizer.step()
        optimizer.zero_grad()
    return [steps[0], steps[5]]


def slopes(base: int) -> list[dict[str, float]]:
    """Growth of each size with the width, d log size / d log width between 64 and 512."""
    narrow, wide = sizes(64, base), sizes(512, base)  # before and after, each
    return [{name: math.log(b[name] / a[name], 512 / 64) for name in a}
            for a, b in zip(narrow, wide)]


def test_coordinates_do_not_move_with_the_width() -> None:
    """Yang et al. 2022, app. D.1: what every layer puts out keeps its size, before and in
    training. Logits begin smaller in wider networks, by no more than the root: there they are
    a sum of as many random terms as there are dimensions, and later they are learned."""
    begin, after = slopes(base=64)
    assert -0.55 < begin.pop("lm_head") < 0.05
    assert all(abs(slope) < 0.1 for slope in begin.values()), begin
    assert all(abs(slope) < 0.2 for slope in after.values()), after
    _, without = slopes(base=0)  # the same network without muP: the measure can fail
    assert all(slope > 0.4 for slope in without.values()), without


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
    rate = {step: train.learning_rate(c, step, total) for step in (1, warmup, warmup + 1, steps)}
    assert rate[warmup] == peak and rate[1] == peak / warmup
    assert peak - rate[warmup + 1] == pytest.approx((peak - end) / decay, rel=1e-6)
    assert rate[steps] == pytest.approx(first_line, rel=1e-5)
    assert train.learning_rate(c, warmup + decay, total) == pytest.approx(end, rel=1e-12)
