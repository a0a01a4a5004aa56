"""The network against transformers' LLaMA, its counts, its initial weights, and generation."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from configs import Config, ModelConfig, UserError, load
from model import Linear, LLaMA, meta_model
from parallel import build_for_inference, choose_device

SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4}
# What Crystal changes; as in its network a quarter of a head is rotated.
CRYSTAL: dict[str, Any] = {
    "norm": "layernorm", "rms_norm_eps": 1e-5, "bias": True, "tie_word_embeddings": True,
    "rotary_dim": 4, "rotary_interleaved": True, "attention_scale_power": 1.0,
    "embedding_scale": 14.6, "logit_scale": 2.22, "base_hidden_size": 16,
    "initializer_range": 0.073, "init_truncated": True, "init_by_depth": True}


def small(**changes: object) -> LLaMA:
    net = LLaMA(ModelConfig(**{**SMALL, **changes}))
    net.init_weights(1)
    with torch.no_grad():  # norms of all ones would hide a swapped or forgotten one
        for i, p in enumerate(net.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
    return net


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True}])
def test_same_logits_loss_and_greedy_text_as_transformers(changes: dict) -> None:
    transformers = pytest.importorskip("transformers")
    ours = small(**changes)
    c = ours.config
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, rms_norm_eps=c.rms_norm_eps,
        tie_word_embeddings=c.tie_word_embeddings, bos_token_id=None, eos_token_id=None,
        pad_token_id=None, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}))
    theirs.load_state_dict(ours.state_dict())  # strict: the names are Hugging Face's
    x = ids(2, 33)
    expected = theirs(input_ids=x[:, :-1]).logits
    torch.testing.assert_close(ours(x[:, :-1]), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(x[:, :-1], logits_to_keep=5), expected[:, -5:])
    loss, token_losses = ours(x[:, :-1], x[:, 1:])
    flat = torch.nn.functional.cross_entropy(expected.flatten(0, 1), x[:, 1:].flatten(),
                                             reduction="none")
    torch.testing.assert_close(token_losses.flatten(), flat, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, flat.mean(), rtol=1e-5, atol=1e-6)
    text = ours.generate(x[:, :8].tolist(), 20)
    generated = theirs.generate(x[:, :8], max_new_tokens=20, do_sample=False, use_cache=True)
    assert text == generated[:, 8:].tolist()


@pytest.mark.parametrize("name, count", [("amber_7b", 6_738_415_616), ("amber_1b", 1_345_423_360),
                                         ("amber_125m", 134_105_856), ("amber_tiny", 1_852_544)])
def test_parameter_count(name: str, count: int) -> None:
    config, _ = load([f"configs/{name}.py"])
    assert meta_model(config).n_params == count


def test_a_changed_block_is_counted_by_itself() -> None:
    net, plain, tied = small(), small(), small(tie_word_embeddings=True)
    for block in net.model.layers:
        block.self_attn.extra_proj = Linear(64, 24, bias=False)
    assert net.n_params - plain.n_params == 3 * 64 * 24
    assert net.flops_per_token(8) - plain.flops_per_token(8) == 6 * 3 * 64 * 24
    # A tied head is multiplied with, and is no parameter of its own.
    assert plain.n_params - tied.n_params == tied.lm_head.weight.numel()
    assert plain.flops_per_token(8) == tied.flops_per_token(8)


@pytest.mark.parametrize("changes", [
    {}, {"num_key_value_heads": 2}, CRYSTAL, CRYSTAL | {"norm": "rmsnorm", "bias": False}])
def test_flops_per_token_are_what_pytorch_counts(changes: dict) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    net, x, counter = small(**changes), ids(1, 33), FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # the counter does not know the CPU's flash kernel
        net(x[:, :-1], x[:, 1:])[0].backward()
    assert counter.get_total_flops() == net.flops_per_token(32) * 32


def test_initial_weights_do_not_depend_on_order_or_neighbours() -> None:
    a, b = LLaMA(ModelConfig(**SMALL)), LLaMA(ModelConfig(**SMALL))
    a.init_weights(5)
    torch.manual_seed(99)
    b.init_weights(5)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    b.init_weights(6)
    assert not torch.equal(a.lm_head.weight, b.lm_head.weight)
    assert a.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert a.model.norm.weight.eq(1).all()


@pytest.mark.parametrize("changes", [{}, CRYSTAL], ids=["amber", "crystal"])
def test_a_model_built_for_inference_computes_the_same_bits_in_less_memory(changes: dict) -> None:
    config = Config(**SMALL | changes, device="cpu", dtype="bfloat16")
    nets = [meta_model(config, torch.bfloat16).materialize(torch.device("cpu")),
            build_for_inference(config)]
    for net in nets:
        net.load_state_dict(small(**changes).state_dict())
    a, b = ids(2, 9), ids(2, 9, seed=1)
    logits = nets[1](a)
    assert logits.dtype == torch.bfloat16 and not logits.requires_grad
    assert torch.equal(nets[0](a), logits) and torch.equal(nets[0](a, b)[1], nets[1](a, b)[1])
    size = [sum(p.nbytes for p in net.parameters()) for net in nets]
    assert size[1] < 0.6 * size[0]


def test_drawing_tokens_follows_the_seed_and_keeps_the_random_state() -> None:
    net, prompt = small(), ids(4).tolist()
    state = torch.get_rng_state()
    drawn, again, other = (net.generate([prompt], 12, temperature=1.0, seed=seed)
                           for seed in (3, 3, 4))
    assert drawn == again != other
    assert torch.equal(state, torch.get_rng_state())
    assert net.generate([prompt, prompt], 0) == [[], []]
    for one in (prompt, ids(4), np.array(prompt, np.uint32)):  # as a notebook may have it
        assert net.generate(one, 12, temperature=1.0, seed=3) == drawn
    net.lm_head.weight.data[0, 0] = math.nan  # the likeliest token would be number 0
    with pytest.raises(UserError, match="not finite"):
        net.generate(prompt, 1)


def test_sampling_draws_from_the_tokens_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    net, p = small(), torch.tensor([0.5, 0.3, 0.15, 0.05])
    monkeypatch.setattr(LLaMA, "forward", lambda *_, **__: p.log().expand(20_000, 1, 4))
    for temperature, expected in ((1.0, p), (0.5, p**2 / 0.365)):
        drawn = torch.tensor(net.generate(ids(20_000, 1), 1, temperature))  # (20_000, 1)
        shares = torch.bincount(drawn[:, 0], minlength=4) / 20_000
        torch.testing.assert_close(shares, expected, rtol=0, atol=0.015)


def test_the_device_is_chosen_or_refused_in_a_sentence() -> None:
    assert choose_device(Config(device="cpu", dtype="bfloat16"))[1] == torch.bfloat16
    assert choose_device(Config(device="cpu"))[1] in (torch.bfloat16, torch.float32)
    with pytest.raises(UserError, match="device = 'cuda:99' is not here"):
        choose_device(Config(device="cuda:99"))
