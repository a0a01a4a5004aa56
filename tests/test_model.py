"""The network against transformers' LLaMA, its counts, its initial weights, and generation."""

import tempfile

import numpy as np
import pytest
import torch
from launch import ranks

import kernels
from configs import Config, ModelConfig, UserError, load
from model import (
    Linear,
    LLaMA,
    build_for_inference,
    choose_device,
    choose_kernels,
    continue_text,
    copy_into_shard,
    meta_model,
    sample,
)

SMALL = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 4}


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
    assert torch.equal(ours(x[:, :-1], logits_to_keep=5), ours(x[:, :-1])[:, -5:])
    loss, token_losses = ours(x[:, :-1], x[:, 1:])
    flat = torch.nn.functional.cross_entropy(expected.flatten(0, 1), x[:, 1:].flatten(),
                                             reduction="none")
    torch.testing.assert_close(token_losses.flatten(), flat, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, flat.mean(), rtol=1e-5, atol=1e-6)
    text = ours.generate(x[:, :8].tolist(), 20)
    generated = theirs.generate(x[:, :8], max_new_tokens=20, do_sample=False, use_cache=True)
    assert text == generated[:, 8:].tolist()


def test_gradients_are_those_of_the_plain_loss() -> None:
    net, x = small(), ids(2, 17)
    net(x[:, :-1], x[:, 1:])[0].backward()
    got = {n: p.grad.clone() for n, p in net.named_parameters()}
    net.zero_grad()
    logits = net(x[:, :-1])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten()).backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)


# small, and for its head size of 64 as Crystal's 32 of 128
CRYSTAL = {"norm": "layernorm", "bias": True, "rotary_dim": 16, "rotary_interleaved": True,
           "attention_scale_power": 1.0, "embedding_scale": 14.6, "logit_scale": 2.22,
           "tie_word_embeddings": True, "base_hidden_size": 64, "initializer_range": 0.073}


@pytest.mark.parametrize("changes", [{"num_key_value_heads": 1}, {
    **CRYSTAL, "num_key_value_heads": 2}], ids=["amber", "crystal"])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-5), (torch.bfloat16, 4e-2)])
def test_triton_and_torch_kernels_give_one_model(dtype: torch.dtype, limit: float,
                                                 changes: dict) -> None:
    """Loss and every gradient of a whole model; Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton")
    import interp_bf16
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        interp_bf16.install()
    net = small(hidden_size=128, num_attention_heads=2, num_hidden_layers=2, **changes)
    net = net.to(device)
    net.dtype = net.model.dtype = dtype
    x, found = ids(1, 20).to(device), {}
    try:
        for backend in ("torch", "triton"):
            assert kernels.use(backend) == backend
            net.zero_grad()
            loss, _ = net(x[:, :-1], x[:, 1:])
            loss.backward()
            found[backend] = {n: p.grad.clone() for n, p in net.named_parameters()}
            found[backend]["loss"] = loss.detach()
    finally:
        kernels.use("auto")
    for name, ours in found["triton"].items():
        error = (ours - found["torch"][name]).norm() / found["torch"][name].norm()
        assert error < limit, f"{name}: {error:.1e}"


@pytest.mark.parametrize("name, count", [("amber_7b", 6_738_415_616), ("amber_1b", 1_345_423_360),
                                         ("amber_125m", 134_105_856), ("amber_tiny", 1_852_544)])
def test_parameter_count(name: str, count: int) -> None:
    config, _ = load([f"configs/{name}.py"])
    assert meta_model(config).n_params == count


def test_a_changed_block_is_counted_without_a_word() -> None:
    net, plain = small(), small()
    for block in net.model.layers:
        block.self_attn.extra_proj = Linear(64, 24, bias=False)
    assert net.n_params - plain.n_params == len(net.model.layers) * 64 * 24
    assert net.flops_per_token(8) - plain.flops_per_token(8) == 6 * len(net.model.layers) * 64 * 24
    # A tied head is multiplied with, and is no parameter of its own.
    tied = small(tie_word_embeddings=True)
    assert plain.n_params - tied.n_params == tied.lm_head.weight.numel()
    assert plain.flops_per_token(8) == tied.flops_per_token(8)


def test_flops_per_token_are_what_pytorch_counts() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    net, seq_len = small(), 32
    counter, x = FlopCounterMode(display=False), ids(1, seq_len + 1)
    with sdpa_kernel(SDPBackend.MATH), counter:  # the counter does not know the CPU's flash kernel
        net(x[:, :-1], x[:, 1:])[0].backward()
    assert counter.get_total_flops() == net.flops_per_token(seq_len) * seq_len


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


def fill_a_shard() -> None:
    """One of two processes: its part of a sharded model has its part of the whole one's weights."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    dist.init_process_group("gloo")
    # A vocabulary of 97 among two processes: their parts have unequal sizes.
    c = ModelConfig(**{**SMALL, **CRYSTAL})
    whole, sharded = LLaMA(c), LLaMA(c)
    for block in sharded.model.layers:
        fully_shard(block)
    fully_shard(sharded)
    state = small(**CRYSTAL).state_dict()

    def from_mapped_files(net: LLaMA) -> None:
        for name, parameter in net.state_dict().items():
            with tempfile.NamedTemporaryFile() as file:
                np.save(file, state[name].numpy())
                file.flush()
                values = np.load(file.name, mmap_mode="c")
                copy_into_shard(parameter, torch.from_numpy(values))

    for give_weights in (lambda net: net.init_weights(7), from_mapped_files):
        for rank in range(2):  # in turn: what needed the other process would never return
            if rank == dist.get_rank():
                give_weights(whole)
                give_weights(sharded)
            dist.barrier()
        for p, q in zip(whole.parameters(), sharded.parameters(), strict=True):
            begin = -(-len(p) // 2) * dist.get_rank()
            assert len(q.to_local()) < len(p)
            assert torch.equal(q.to_local(), p[begin : begin + len(q.to_local())])
            assert torch.equal(q.full_tensor(), p)
    assert all(torch.equal(p, state[name]) for name, p in whole.state_dict().items())
    dist.destroy_process_group()
    print("equal")


def test_a_sharded_model_is_filled_without_communication() -> None:
    for process in ranks(2, "tests/test_model.py", OMP_NUM_THREADS=1):
        text, _ = process.communicate(timeout=90)
        assert process.returncode == 0 and "equal" in text, text


@pytest.mark.parametrize("changes", [{}, CRYSTAL], ids=["amber", "crystal"])
def test_a_model_cast_for_inference_computes_the_same_bits_in_less_memory(changes: dict) -> None:
    weights = small(**changes).state_dict()
    with torch.device("meta"):
        nets = [LLaMA(ModelConfig(**{**SMALL, **changes}), torch.bfloat16) for _ in "ab"]
    nets[1].cast_for_inference()
    for net in nets:
        net.materialize(torch.device("cpu")).load_state_dict(weights)
    a, b = ids(2, 9), ids(2, 9, seed=1)
    with torch.no_grad():
        assert torch.equal(nets[0](a), nets[1](a))
        assert torch.equal(nets[0](a, b)[1], nets[1](a, b)[1])
    size = [sum(p.nbytes for p in net.parameters()) for net in nets]
    assert size[1] < 0.6 * size[0] and not any(p.requires_grad for p in nets[1].parameters())


def test_cached_generation_equals_full_recomputation() -> None:
    net = small()
    for n, batch in ((1, 2), (7, 1), (4, 3)):
        prompts = ids(batch, n, seed=n).tolist()
        for prompt, continuation in zip(prompts, net.generate(prompts, 12)):
            sequence = list(prompt)
            for _ in range(12):
                sequence.append(int(net(torch.tensor([sequence]))[0, -1].argmax()))
            assert continuation == sequence[n:]


def test_a_continuation_ends_at_eos_and_the_random_state_is_kept() -> None:
    net, prompt = small(), ids(4).tolist()
    free = net.generate([prompt], 12)[0]
    eos = free[5]
    state = torch.get_rng_state()
    assert net.generate([prompt], 12, eos_id=eos) == [free[: free.index(eos) + 1]]
    drawn = net.generate([prompt], 12, temperature=1.0, top_p=0.9, seed=3)
    assert drawn == net.generate([prompt], 12, temperature=1.0, top_p=0.9, seed=3)
    assert drawn != net.generate([prompt], 12, temperature=1.0, top_p=0.9, seed=4)
    assert torch.equal(state, torch.get_rng_state())


class Letters:
    """A tokenizer of the letters a ... z, and the end of a document."""

    eos_id = 26

    def encode(self, text: str) -> np.ndarray:
        return np.array([ord(letter) - ord("a") for letter in text], dtype=np.uint32)

    def decode(self, ids: list[int]) -> str:
        return "".join("." if i == self.eos_id else chr(ord("a") + i) for i in ids)


def test_text_goes_on_and_an_empty_prompt_begins_a_document() -> None:
    net, tokenizer = small(vocab_size=27), Letters()
    text = continue_text(net, tokenizer, "abc", 6)
    assert text == "abc" + tokenizer.decode(net.generate([[0, 1, 2]], 6)[0])
    assert continue_text(net, tokenizer, "", 6).startswith(".")
    assert len(continue_text(net, tokenizer, "", 6, temperature=1.0)) == 7


def test_sampling_draws_from_the_kept_tokens_in_proportion() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)

    def shares(temperature: float, top_p: float) -> list[float]:
        tokens = sample(logits.expand(20_000, 4), temperature, top_p, generator)
        return (torch.bincount(tokens, minlength=4) / 20_000).tolist()

    for top_p, expected in ((1.0, [.5, .3, .15, .05]), (0.7, [.625, .375, 0, 0])):
        assert shares(1.0, top_p) == pytest.approx(expected, abs=0.015)
    squares = [.25 / .365, .09 / .365, .0225 / .365, .0025 / .365]
    assert shares(0.5, 1.0) == pytest.approx(squares, abs=0.015)
    assert shares(0, 1.0) == [1, 0, 0, 0]


def test_the_device_and_the_kernels_are_chosen_or_refused_in_a_sentence(
        monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    device, dtype = choose_device(Config(device="cpu", dtype="bfloat16", threads=threads))
    assert (device.type, dtype, torch.get_num_threads()) == ("cpu", torch.bfloat16, threads)
    assert choose_device(Config(device="cpu"))[1] in (torch.bfloat16, torch.float32)
    with pytest.raises(UserError, match="device = 'cuda:99' cannot be used here"):
        choose_device(Config(device="cuda:99"))
    with pytest.raises(UserError, match="device = 'tpu' cannot be used here"):
        choose_device(Config(device="tpu"))
    assert choose_kernels("torch") == "torch"
    monkeypatch.setattr(kernels._lang, "INSTALLED", False)
    with pytest.raises(UserError, match="needs Triton: pip install triton"):
        choose_kernels("triton")
    assert choose_kernels("auto") == "torch"


def test_a_model_built_for_inference_waits_for_its_weights() -> None:
    c = Config(**SMALL, device="cpu", dtype="bfloat16", tie_word_embeddings=True)
    net = build_for_inference(c)
    assert net.lm_head.weight is net.model.embed_tokens.weight
    assert {str(p.device) for p in net.parameters()} == {"cpu"}
    assert net.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    net.load_state_dict(small(tie_word_embeddings=True).state_dict())
    assert net(ids(1, 4)).dtype == torch.bfloat16 and not net(ids(1, 4)).requires_grad


if __name__ == "__main__":
    fill_a_shard()
