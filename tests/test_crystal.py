"""Crystal: its choices in the network, muP, schedule, infilling, stages, the hub's names."""

import dataclasses
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_model import ids
from test_train import assert_same_run, metrics, tensors, words

import eval as evaluation
import prepare_data
import train
from configs import Config, ModelConfig, load
from model import (
    LLaMA,
    crystal_config,
    crystal_names,
    export,
    from_crystal,
    is_hidden,
    to_crystal,
)

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
def test_counts(changes: dict) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    net, x, counter = small(**changes), ids(1, 33), FlopCounterMode(display=False)
    assert sum(p.numel() for p in net.parameters()) == net.config.n_params
    with sdpa_kernel(SDPBackend.MATH), counter:
        net(x[:, :-1], x[:, 1:])[0].backward()
    assert counter.get_total_flops() == net.config.flops_per_token(32) * 32


def test_initial_deviations_are_the_released_ones() -> None:
    c, _ = load(["configs/crystal_7b_stage1.py"])
    with torch.device("meta"):
        net = LLaMA(c)
    deviation = {n.removeprefix("model.layers.0."): net.initial_deviation(n)
                 for n, p in net.named_parameters() if p.dim() == 2}
    assert deviation["model.embed_tokens.weight"] == 0.073
    assert deviation["self_attn.q_proj.weight"] == deviation["mlp.up_proj.weight"] == 0.01825
    assert deviation["self_attn.o_proj.weight"] == 0.00228125
    assert deviation["mlp.down_proj.weight"] == 0.00228125
    assert c.logit_scale * c.width_scale == 0.13875
    net = LLaMA(ModelConfig(**SMALL))
    net.init_weights(3)
    for name, p in net.named_parameters():
        if p.dim() == 2:
            limit = 2 * net.initial_deviation(name)
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


def test_parameter_groups() -> None:
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
    with torch.device("meta"):
        net = LLaMA(c)
    # LLM360's index of the weights says how many bytes they are: these in fp32, the head once
    # more, and for each block a mask of 2048 x 2048 bytes and a number.
    assert sum(p.numel() for p in net.parameters()) == c.n_params == 6_575_278_720
    assert 4 * c.n_params + 4 * 32032 * 4096 + 32 * (2048**2 + 4) == 26_960_145_024
    assert c.max_steps == steps and c.n_chunks * c.rows_per_chunk // 2112 >= steps
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
    assert c.rows_per_chunk // 2112 == (1000 if stage == 3 else 1500)


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


# ---- Hugging Face's names


def test_weights_go_to_crystalcoders_names_and_back() -> None:
    for changes in ({}, {"num_key_value_heads": 2}):
        net = small(**changes)
        state, c = net.state_dict(), net.config
        theirs = to_crystal(c, state)
        kv = c.num_key_value_heads * c.head_dim
        shapes = {name: tuple(t.shape) for name, t in theirs.items() if ".0." in name}
        assert shapes == {f"transformer.h.0.{name}": shape for name, shape in {
            "ln_1.weight": (64,), "ln_1.bias": (64,), "ln_2.weight": (64,), "ln_2.bias": (64,),
            "attn.c_attn.weight": (64, 64 + 2 * kv), "attn.c_attn.bias": (64 + 2 * kv,),
            "attn.c_proj.weight": (64, 64), "attn.c_proj.bias": (64,),
            "mlp.c_fc.weight": (64, 170), "mlp.c_fc.bias": (170,),
            "mlp.c_fc2.weight": (64, 170), "mlp.c_fc2.bias": (170,),
            "mlp.c_proj.weight": (170, 64), "mlp.c_proj.bias": (64,)}.items()}
        x = torch.randn(5, 64)  # Conv1D: x @ weight + bias
        weight, bias = (theirs[f"transformer.h.1.mlp.c_fc2.{k}"] for k in ("weight", "bias"))
        torch.testing.assert_close(x @ weight + bias, net.model.layers[1].mlp.gate_proj(x))
        names = list(theirs)
        parts = [{n: theirs[n] for n in names[i::3]} for i in range(3)]  # as in several files
        back = {k: v for part in parts for k, v in from_crystal(c, part).items()}
        assert back.keys() == state.keys() == crystal_names(c).keys()
        assert all(torch.equal(back[k], state[k]) for k in state)


def test_config_is_crystalcoders() -> None:
    """Of LLM360's crystalcoder-train, finetune/Megatron-LM/CrystalCoder/config.json."""
    assert crystal_config(load(["configs/crystal_7b_stage1.py"])[0]) == {
        "n_embd": 4096, "n_inner": 10922, "n_layer": 32, "n_head": 32, "vocab_size": 32032,
        "layer_norm_epsilon": 1e-5, "rotary_dim": 32, "position_embedding_type": "rotary",
        "activation_function": "swiglu", "tie_word_embeddings": True,
        "mup_width_scale": 0.0625, "mup_embeddings_scale": 14.6, "mup_output_alpha": 2.22,
        "mup_scale_qk_dot_by_d": True}


# ---- infilling


def restored(row: list[int], tokenizer: prepare_data.Tokenizer) -> list[int]:
    """A document of either of its infilling forms: before <SUF>, after <MID>, between."""
    pre, mid, suf = (tokenizer.specials[name] for name in prepare_data.FIM_TOKENS)
    if row[:1] != [pre]:
        return row
    s, m = row.index(suf), row.index(mid)
    assert row.count(pre) == row.count(suf) == row.count(mid) == 1 and s < m
    return row[1:s] + row[m + 1:] + row[s + 1:m]


def a_tokenizer() -> prepare_data.Tokenizer:
    ranks = prepare_data.train_bpe([words(1, 60)], 400)
    specials = {prepare_data.EOT: len(ranks)}
    tokenizer = prepare_data.Tokenizer("bpe", ranks, prepare_data.BPE_PATTERN, specials)
    return tokenizer.add(prepare_data.CRYSTAL_TOKENS)


def test_infilling_gives_back_the_document() -> None:
    tokenizer, draw = a_tokenizer(), random.Random(2)
    pre, _, suf = (tokenizer.specials[name] for name in prepare_data.FIM_TOKENS)
    changed = suffix_first = 0
    for seed in range(2000):
        pieces = ["def ", "foo", "(bar)", " ", "\n", "\U0001f40d", "<|fim_middle|>", "x"]
        text = "".join(draw.choices(pieces, k=draw.choice((1, 2, 3, 8, 40))))
        document = tokenizer.encode(text)
        drawn, kept = (
            prepare_data.infilling(document, tokenizer, rate, 0.5, np.random.default_rng(seed))
            for rate in (0.9, 0))
        out, back = drawn.tolist(), restored(drawn.tolist(), tokenizer)
        assert back == document.tolist() and kept is document
        assert tokenizer.decode(back) == text  # no space at the cuts
        changed += len(out) == len(document) + 3
        suffix_first += out[:2] == [pre, suf]  # or an empty prefix
    assert changed / 2000 == pytest.approx(0.9, abs=0.03) and suffix_first > 800


def test_the_two_forms_are_the_papers() -> None:
    tokenizer, document = a_tokenizer(), np.arange(10, 30, dtype=np.uint32)
    pre, mid, suf = (tokenizer.specials[name] for name in prepare_data.FIM_TOKENS)
    cuts = np.random.default_rng(3)
    cuts.random()  # whether it is cut at all
    a, b = np.sort(cuts.integers(21, size=2))
    assert 0 < a < b < 20
    d = document.tolist()
    for spm_rate, expected in (
            (0.0, [pre, *d[:a], suf, *d[b:], mid, *d[a:b]]),
            (1.0, [pre, suf, *d[b:], mid, *d[:b]])):
        out = prepare_data.infilling(document, tokenizer, 1.0, spm_rate,
                                     np.random.default_rng(3))
        assert out.tolist() == expected


def test_crystals_tokens_have_its_ids_and_are_never_found_in_text(tmp_path: Path) -> None:
    from test_prepare_data import tiny_llama
    names = prepare_data.CRYSTAL_TOKENS
    assert len(names) == 22 and names.index("<|sys_end|>") == 21
    assert names.index("<|filename|>") == 4 and names.index("<|reponame|>") == 17
    path = tiny_llama(tmp_path / "tokenizer.json")
    for tokenizer in (a_tokenizer(), prepare_data.LlamaTokenizer(str(path)).add(names)):
        n = tokenizer.n_vocab
        assert [tokenizer.specials[name] for name in names] == list(range(n - 22, n))
        text = "x" + "".join(names) + " </s>"
        assert tokenizer.encode(text).max() < n - 22
        assert tokenizer.decode(tokenizer.encode(text)).startswith("x<|fim_prefix|><|fim_mid")
        assert len(tokenizer.token_bytes) == n and not tokenizer.token_bytes[-22:].any()
    # a file that has them, as CrystalCoder's: the ids stay, and text does not become one
    data = json.loads(path.read_text())
    last = max(data["model"]["vocab"].values())
    data["added_tokens"] += [{**data["added_tokens"][0], "content": name, "id": last + 1 + i}
                             for i, name in enumerate(names)]
    path.write_text(json.dumps(data))
    plain_one = prepare_data.LlamaTokenizer(str(path))
    tokenizer = plain_one.add(names)
    assert tokenizer.n_vocab == plain_one.n_vocab and tokenizer.specials == plain_one.specials
    assert plain_one.encode("<|fim_pad|>").tolist() == [tokenizer.specials["<|fim_pad|>"]]
    assert len(tokenizer.encode("<|fim_pad|>")) > 1


# ---- stages

MINI = """
hidden_size, intermediate_size, num_hidden_layers, num_attention_heads = 32, 84, 2, 2
norm, rms_norm_eps, bias, tie_word_embeddings = "layernorm", 1e-5, True, True
rotary_dim, rotary_interleaved, attention_scale_power, base_hidden_size = 4, True, 1.0, 16
embedding_scale, logit_scale, initializer_range = 14.6, 2.22, 0.073
init_truncated = init_by_depth = crystal_tokens = True
vocab_size, seq_len, n_chunks, rows_per_chunk = 340, 32, 3, 50
valid_rows, valid_documents = 8, 6
global_batch_size, micro_batch_size, eval_rows, eval_interval = 8, 4, 6, 4
learning_rate, min_learning_rate, warmup_steps, adam_eps = 1e-2, 1e-3, 3, 1e-9
dtype, threads, sample_tokens, workers, keep_train_state = "float32", 1, 4, 1, 0
lr_schedule, source_halves, source_weights = "linear", {"prose": "even"}, {"code": 0}
"""
SECOND = """
source_halves, source_weights, fim_rates = {"prose": "odd"}, {"code": 2}, {"code": 0.9}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages, prepared; the text has no word in common with a later document by chance."""
    home = tmp_path_factory.mktemp("crystal")
    for seed, name in enumerate(("prose", "code")):
        rows = [json.dumps({"text": words(1000 * seed + i, 12)}) for i in range(60)]
        (home / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    sources = {name: str(home / f"{name}.jsonl") for name in ("prose", "code")}
    for stage, more in (("one", ""), ("two", SECOND)):
        tokenizer = f"data:{home / 'data_one'}" if more else "bpe"
        (home / f"{stage}.py").write_text(
            MINI + more + f"sources, tokenizer = {sources!r}, {tokenizer!r}\n"
            f"data_dir = {str(home / f'data_{stage}')!r}\n")
        prepare_data.main([str(home / f"{stage}.py")])
    return home


def run(home: Path, stage: str, run_dir: Path, **settings: Any) -> Path:
    train.main([str(home / f"{stage}.py"), f"--run_dir={run_dir}",
                *(f"--{k}={v}" for k, v in settings.items())])
    return run_dir


def documents_of(data: Path, source: str) -> list[list[int]]:
    """The documents of a data set that are whole in its training stream."""
    manifest, eos = prepare_data.load_manifest(data), prepare_data.load_tokenizer(data).eos_id
    number = [s["name"] for s in manifest["sources"]].index(source)
    rows = [prepare_data.open_chunk(data, manifest, i) for i in range(len(manifest["chunks"]))]
    rows = [r["token_ids"][r["source"] == number] for r in rows]
    stream = np.stack(rows, 1).reshape(-1).tolist()  # row i is dealt to chunk i % n
    found: list[list[int]] = [[]]
    for token in stream:
        found.append([]) if token == eos else found[-1].append(token)
    return found[1:-1]


def whole(home: Path, stage: str, tmp_path: Path) -> Path:
    """The data of a stage once more: one chunk of all rows, nothing twice, two workers."""
    prepare_data.main([str(home / f"{stage}.py"), f"--data_dir={tmp_path / stage}",
                       "--workers=2", "--n_chunks=1", "--rows_per_chunk=0"]
                      + ["--source_weights={}"] * (stage == "two"))
    return tmp_path / stage


def test_stages_share_tokenizer_and_held_out_rows_and_no_text_is_in_two_places(
        home: Path, tmp_path: Path) -> None:
    one, two = (prepare_data.load_manifest(home / f"data_{s}") for s in ("one", "two"))
    assert one["tokenizer"] == two["tokenizer"] and one["tokenizer"]["n_vocab"] <= 340
    assert one["valid"] == two["valid"]  # file, source, rows, sha256
    assert [s["valid_rows"] for s in one["sources"]] == [8, 8]
    for manifest in (one, two):
        for s in manifest["sources"]:
            assert s["rows"] * 33 + s["tail_tokens"] == s["tokens"]
            assert s["unused_rows"] == max(0, s["rows"] - s["train_rows"])
    # every document is held out, or in one half, whatever file it came from
    tokenizer = prepare_data.load_tokenizer(home / "data_one")
    texts = [json.loads(x)["text"] for x in (home / "prose.jsonl").read_text().splitlines()]
    where = {}
    for text in texts:
        key = prepare_data.zlib.crc32(text.encode())
        where[tuple(tokenizer.encode(text).tolist())] = (
            "held" if key // 2 % 6 == 0 else "even" if key % 2 == 0 else "odd")
    for stage, half in (("one", "even"), ("two", "odd")):
        read = documents_of(whole(home, stage, tmp_path), "prose")
        assert {where[tuple(d)] for d in read} == {half} and len(read) > 15
    assert documents_of(tmp_path / "one", "code") == []


def test_code_of_stage_two_is_for_infilling_and_reads_as_it_was(home: Path,
                                                                tmp_path: Path) -> None:
    tokenizer = prepare_data.load_tokenizer(home / "data_two")
    known = {json.loads(x)["text"] for x in (home / "code.jsonl").read_text().splitlines()}
    found = documents_of(whole(home, "two", tmp_path), "code")
    read = [tokenizer.decode(restored(d, tokenizer)) for d in found]
    assert len(read) > 40 and set(read) <= known
    pre = tokenizer.specials["<|fim_prefix|>"]
    assert sum(d[0] == pre for d in found) / len(found) == pytest.approx(0.9, abs=0.12)
    held = prepare_data.open_valid(home / "data_two", prepare_data.load_manifest(
        home / "data_two"), "code")["token_ids"]
    assert not (held >= pre).any()


def test_settings_that_cannot_work(home: Path, tmp_path: Path) -> None:
    for arguments, sentence in (
            (["--fim_rates={'prse': 0.5}"], r"fim_rates names \['prse'\], but the sources"),
            (["--source_halves={'prose': 'left'}"], "must be 'even' or 'odd', found 'left'"),
            (["--fim_rates={'code': 2}"], r"fim_rates\['code'\] must be a share between"),
            (["--fim_rates={'code': 1}", "--crystal_tokens=false"], "has no <|fim_prefix|>;"),
            (["--vocab_size=270"], "needs 279 or more"),
            (["--tokenizer=data:/nowhere"], "/nowhere has no prepared data"),
            (["--valid_documents=100000"], "holds out 0 tokens, and a row has 33: lower it"),
            (["--rotary_dim=3"], "rotary_dim must be even and at most the head size"),
            (["--norm=none"], "norm must be one of 'rmsnorm', 'layernorm'")):
        with pytest.raises(SystemExit, match=sentence.replace("|", r"\|")):
            prepare_data.main([str(home / "one.py"), f"--data_dir={tmp_path}/x", *arguments])


def test_stopped_and_resumed_is_the_straight_run_and_stage_two_knows_stage_one(
        home: Path, tmp_path: Path) -> None:
    straight = run(home, "one", tmp_path / "straight")
    for last in (5, 11, 0):
        run(home, "one", tmp_path / "parts", max_steps=last)
    assert_same_run(straight, tmp_path / "parts")
    saved = tensors(straight / "ckpt_002")
    rates = {k: v for k, v in saved.items() if "lr_scale" in k}
    assert not rates or {float(v) for v in rates.values()} == {1.0, 0.5}

    export(straight / "ckpt_002", tmp_path / "hub")  # in CrystalCoder's names, and back
    config, _ = load([str(home / "one.py")])
    net = evaluation.build(config)
    train.load_weights(net, tmp_path / "hub")
    assert all(torch.equal(saved[f"model/{k}"], v) for k, v in net.state_dict().items())
    amber = evaluation.build(dataclasses.replace(config, norm="rmsnorm"))
    with pytest.raises(SystemExit, match="it is a model of type 'crystalcoder'"):
        train.load_weights(amber, tmp_path / "hub")

    origin = straight / "ckpt_002"
    second = run(home, "two", tmp_path / "second", init_from=origin)
    manifest = train.read_json(second / "ckpt_002" / "manifest.json")
    assert manifest["started_from"] == {
        "path": str(origin), "step": 18, "tokens": 18 * 256, "sha256": train.identity(origin),
        "data_sha256": train.data_sha256(str(home / "data_one"))}
    assert metrics(second)[0]["lr"] == pytest.approx(1e-2 / 3)  # counter and warm-up anew
    assert evaluation.stages(str(second)) == [(straight, 0), (second, 18 * 256)]
    pytest.importorskip("matplotlib")
    for stage, directory in (("one", straight), ("two", second)):
        evaluation.main([str(home / f"{stage}.py"), f"--run_dir={directory}"])
    assert (second / "stages.png").exists() and not (straight / "stages.png").exists()


def test_the_first_update_has_two_rates(home: Path, tmp_path: Path) -> None:
    """One step of the loop: Adam moves each weight by its group's rate (and decays it)."""
    run(home, "one", tmp_path / "run", max_steps=1, weight_decay=0, grad_clip=1e9)
    config, _ = load([str(home / "one.py")])
    net = LLaMA(config)
    net.init_weights(config.seed)
    saved = tensors(tmp_path / "run" / "step_0000001")
    for name, p in net.named_parameters():
        moved = (saved[f"model/{name}"] - p.data).abs()
        rate = 1e-2 / 3 * (0.5 if is_hidden(name) else 1)
        assert moved.max() == pytest.approx(rate, rel=1e-3), name


def test_a_checkpoint_from_before_these_settings_still_loads(home: Path) -> None:
    """Without them it is Amber's: the defaults stand in for what its manifest does not say."""
    config = Config(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                    num_attention_heads=2, num_key_value_heads=2)
    net = LLaMA(config)
    net.init_weights(0)
    directory = home / "old"
    train.dcp.save(net.state_dict(), checkpoint_id=directory / "model", no_dist=True)
    files = {f"model/{p.name}": train.sha256(p) for p in (directory / "model").iterdir()}
    old = {k: v for k, v in train.asdict(config).items() if k not in CRYSTAL or k in (
        "rms_norm_eps", "tie_word_embeddings", "initializer_range")}
    manifest = {"config": old, "files": files}
    manifest["sha256"] = train.digest(manifest)
    train.write_json(directory / "manifest.json", manifest)
    assert train.load_weights(LLaMA(config), directory)["config"] == old
