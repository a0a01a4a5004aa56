"""A checkpoint is a Hugging Face directory: transformers opens ours, we open others', and nothing
that is in one is run."""

import os
import pickle
import re
import shutil
import threading
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import jsonl, words
from test_model import CRYSTAL, small
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import audit
import checkpoint as ckpt
import eval as evaluation
import memorize
import prepare_data
import train
from configs import Config, ModelConfig, UserError, load
from data import load_data, read_json, sha256_file, sha256_json, write_json
from model import LLaMA, Norm, continue_text, copy_into_shard, meta_model
from parallel import build_for_inference
from tokenizer import make_tokenizer
from tools import convert_crystal

SETTINGS = """
hidden_size, intermediate_size, num_hidden_layers, num_attention_heads = 64, 160, 3, 4
vocab_size, seq_len, n_chunks, sequences_per_chunk, valid_sequences = 310, 32, 1, 8, 2
global_batch_size, micro_batch_size, warmup_steps, sample_tokens = 4, 4, 1, 0
learning_rate, min_learning_rate, threads, workers, dtype = 0.03, 0.01, 1, 1, "float32"
"""
TEXTS = [words(i, 60) + "\n don't 1234567  é漢 <|x|> \ufeff" for i in range(20)]


@pytest.fixture(scope="module")
def argv(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small config and its prepared data."""
    home = tmp_path_factory.mktemp("hub")
    (home / "hub.py").write_text(SETTINGS + f"""
sources = {{"a": {jsonl(home / "a.jsonl", TEXTS)!r}}}
data_dir, run_dir = {str(home / "data")!r}, {str(home / "run")!r}
""")
    prepare_data.main([str(home / "hub.py")])
    return [str(home / "hub.py"), "--vocab_size=320"]  # ten ids more than the tokenizer has


@pytest.fixture(scope="module")
def saved(argv: list[str]) -> Path:
    train.main(argv)
    return Path(load(argv)[0].run_dir) / "ckpt_000"


@pytest.fixture
def hub(saved: Path, tmp_path: Path) -> Path:
    """The same weights as someone else would have published them: without our manifest."""
    ours = shutil.ignore_patterns("manifest.json", "train_state")
    return shutil.copytree(saved, tmp_path / "hub", ignore=ours)


def opened(argv: list[str], path: Path) -> LLaMA:
    net = build_for_inference(load(argv)[0])
    ckpt.load_weights(net, path)
    return net


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- others open ours


@pytest.mark.parametrize("changes", [
    [], ["--num_key_value_heads=2", "--tie_word_embeddings=true"]])
def test_transformers_computes_the_same(argv: list[str], tmp_path: Path,
                                        changes: list[str]) -> None:
    """It opens a checkpoint as it is: our logits, our ids, our greedy text."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "run/ckpt_000"
    train.main([*argv, f"--run_dir={path.parent}", *changes])
    net, tokenizer = ckpt.load_run(path, dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path)
    reader = transformers.AutoTokenizer.from_pretrained(path)
    assert theirs.dtype == torch.float32 and theirs.config.bos_token_id is None
    assert theirs.generation_config.eos_token_id == reader.eos_token_id == tokenizer.eos_id
    x = torch.randint(net.config.vocab_size, (2, 30), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(theirs(x).logits, net(x), rtol=0, atol=1e-5)
    for prompt in ("the don", TEXTS[3][:40], "\n"):
        ids = reader(prompt, return_tensors="pt")["input_ids"]
        assert ids[0].tolist() == tokenizer.encode(prompt).tolist()
        new = theirs.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1]:].tolist()
        ours = net.generate(ids.tolist(), 24)[0]
        assert new == ours[: len(new)] and (len(new) == 24 or new[-1] == tokenizer.eos_id)
        assert reader.decode(new) == tokenizer.decode(new)


def test_the_formats_own_library_reads_what_is_written(saved: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    for directory, stem in ((saved / "train_state", "optimizer"), (saved, "model")):
        theirs = safetensors.load_file(directory / f"{stem}.safetensors")
        assert same(dict(ckpt.read_tensors(directory, stem)), theirs) and theirs
        hashes = {name: ckpt.sha256(t.numpy().tobytes()).hexdigest() for name, t in theirs.items()}
        assert hashes.items() <= ckpt.read_manifest(saved)["tensors"].items()
    assert ckpt.weights_hash(saved) == sha256_json(hashes)
    # ... and what it writes is read: other types, empty tensors, single numbers
    odd = {"a": torch.randn(3, 5).bfloat16(), "b": torch.randn(7).half(), "c": torch.zeros(0, 4),
           "d": torch.tensor(2.5, dtype=torch.float64)}
    safetensors.save_file(odd, tmp_path / "model.safetensors", metadata={"by": "them"})
    assert same(ckpt.read_safetensors(tmp_path / "model.safetensors"), odd)


def test_a_model_that_llama_does_not_know_is_not_called_one(argv: list[str],
                                                            tmp_path: Path) -> None:
    config = load(argv)[0]
    net = meta_model(config)
    assert ckpt.hugging_face_config(net, 3)["model_type"] == "llama"
    net.model.layers[0].self_attn.q_norm = Norm(config)  # a change of model.py alone
    assert ckpt.hugging_face_config(net, 3)["model_type"] == "amber-variant"
    for key, value in (("norm", "layernorm"), ("bias", True), ("rotary_dim", 8),
                       ("logit_scale", 2.0)):
        setattr(config, key, value)
        write_json(tmp_path / "config.json", ckpt.hugging_face_config(meta_model(config), 3))
        assert read_json(tmp_path / "config.json")["model_type"] == "crystalcoder"
        assert getattr(ckpt.read_network(tmp_path), key) == value


# ---- many processes write and read one


def test_shares_are_equal_and_no_process_waits_for_the_copies_of_another(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """The first copy ends when the next tensor has been gathered, in which all take part."""
    sizes = [1, 6, 2, 3, 6, 1, 2, 3]  # the mean of three processes is 8
    tensors = {f"t{i}": torch.full((size,), i) for i, size in enumerate(sizes)}
    gathered, empty, shares = threading.Semaphore(0), torch.empty, []

    def slow(*shape: Any, **how: Any) -> torch.Tensor:
        assert gathered.acquire(timeout=20) and gathered.acquire(timeout=20)
        gathered.release()
        return empty(*shape, **how)

    monkeypatch.setattr(torch, "empty", slow)
    monkeypatch.setattr(ckpt, "world_size", lambda: 3)
    for r in range(3):
        monkeypatch.setattr(ckpt, "rank", lambda r=r: gathered.release() or r)
        shares.append(dict(ckpt.copy_to_host(tensors)))
    assert [sum(map(len, share.values())) for share in shares] == [8, 8, 8]
    assert same(shares[0] | shares[1] | shares[2], {k: v.float() for k, v in tensors.items()})


@pytest.mark.parametrize("number", [1, 2])
def test_one_of_hsdps_replicas_reads(number: int) -> None:
    """Under a fake group nothing is sent, so what is filled in was read."""
    dist.init_process_group("fake", store=FakeStore(), rank=number, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        weight = DTensor.from_local(torch.zeros(2, 3), mesh, [Replicate(), Shard(0)])
        copy_into_shard(weight, torch.ones(4, 3))
        assert (weight.to_local() == (number == 1)).all()
    finally:
        dist.destroy_process_group()


# ---- we open others'


def test_a_published_directory_is_read_evaluated_memorized_and_trained_on(
        argv: list[str], saved: Path, hub: Path, tmp_path: Path,
        capsys: pytest.CaptureFixture) -> None:
    text = continue_text(opened(argv, saved), load_data(load(argv)[0].data_dir).tokenizer, "the", 8)
    assert continue_text(*ckpt.load_run(saved.parent, dtype="float32"), "the", 8) == text
    # Published weights need neither data nor a config that knows them.
    no_run = f"--run_dir={tmp_path / 'no_run'}"
    anywhere = ["configs/amber_7b.py", f"--checkpoints={hub}", "--dtype=float32", no_run,
                f"--data_dir={tmp_path / 'no_data'}", "--prompt=the"]
    with pytest.raises(UserError, match="reads at most 32 tokens"):
        evaluation.main(anywhere)
    capsys.readouterr()
    evaluation.main([*anywhere, "--seq_len=32", "--tokens=8", "--temperature=0"])
    assert capsys.readouterr().out == text + "\n"
    for path in (hub, saved):
        evaluation.main([*argv, no_run, f"--checkpoints={path}", "--tokens=2"])
    theirs, ours = (r["result"] for r in ckpt.read_records(tmp_path / "no_run/eval.jsonl")
                    if r["evaluation"] == "validation")
    assert theirs == ours
    memorize.main([*argv, no_run, f"--checkpoints={hub}", "--k=6", "--l=8"])
    # Training takes the weights alone: at no learning rate they stay what they are.
    train.main([*argv, f"--run_dir={tmp_path / 'tuned'}", f"--init_from={hub}", "--max_steps=1",
                "--learning_rate=1e-30", "--min_learning_rate=0"])
    tuned = tmp_path / "tuned/step_0000001"
    assert same(dict(ckpt.read_tensors(tuned)), dict(ckpt.read_tensors(hub)))
    assert ckpt.read_manifest(tuned)["started_from"]["path"] == str(hub)
    # Another tokenizer than the data's would give a figure that means nothing.
    make_tokenizer(Config(vocab_size=270), ["other words, other merges"] * 9).save(hub)
    for main, more in ((evaluation.main, []), (memorize.main, ["--k=6", "--l=8"]),
                       (audit.main, [])):
        with pytest.raises(UserError, match="was made with another tokenizer than .*hub has"):
            main([*argv, no_run, f"--checkpoints={hub}", *more])


def test_ambers_own_form_is_read_and_what_is_wrong_is_named(argv: list[str], saved: Path,
                                                            hub: Path) -> None:
    """Amber's: two pytorch_model-*.bin with an index, a rotary table, bfloat16."""
    net = opened(argv, saved)
    (hub / "model.safetensors").unlink()
    weights = {n: p.detach().bfloat16() for n, p in net.named_parameters()}
    names = sorted(weights)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    shards = {"pytorch_model-00001-of-00002.bin": names[:9],
              "pytorch_model-00002-of-00002.bin": names[9:] + list(weights)[-1:]}
    for file, part in shards.items():
        torch.save({n: weights[n] for n in part}, hub / file)
    write_json(hub / "pytorch_model.bin.index.json",
               {"weight_map": {n: f"../{file}" for file, part in shards.items() for n in part}})
    back = opened(argv, hub)
    assert all(torch.equal(p.bfloat16().float(), q)
               for p, q in zip(net.parameters(), back.parameters()))

    wrong = {"model.embed_tokens.weight": torch.ones(3, 2), "odd": torch.ones(1),
             names[2]: weights[names[2]].int()}
    torch.save({n: weights[n] for n in names[2:9]} | wrong, hub / [*shards][0])
    config = read_json(hub / "config.json")
    for change, sentence in (
            ({}, f"{names[2]} is of type torch.int32; model.embed_tokens.weight is (3, 2) there,"
                 " (320, 64) here; odd is unknown (and 1 more)."),
            ({"model_type": "gpt2"}, "a model of type 'gpt2'"),
            ({"hidden_size": 96, "rms_norm_eps": 1e-5}, "hidden_size is 96 there, 64 here; rms_n"),
            ({"rope_parameters": {"rope_theta": 5e5}}, "no network with rope_theta = 10000.0"),
            ({"head_dim": 32, "hidden_act": "gelu"}, "with hidden_act = 'gelu', head_dim = 32"),
            ({"num_key_value_heads": None}, "odd is unknown"),  # as many as heads: goes on
            ({"tie_word_embeddings": True}, "tie_word_embeddings is True there, False here")):
        write_json(hub / "config.json", config | change)
        with pytest.raises(UserError, match=f"cannot be loaded.*{re.escape(sentence)}"):
            ckpt.load_weights(net, hub)


def test_ambiguous_weights_are_named(argv: list[str], saved: Path, hub: Path) -> None:
    net = opened(argv, saved)
    (hub / "model_ema.safetensors").write_bytes(b"junk")  # a name that nobody reads
    torch.save({}, hub / "pytorch_model.bin")  # the same weights once more, as is common
    assert same(net.state_dict(), opened(argv, hub).state_dict())
    write_json(hub / "model.safetensors.index.json", {"weight_map": {}})
    with pytest.raises(UserError, match="has both model.safetensors and model.safetensors.index"):
        ckpt.load_weights(net, hub)
    # A head in the file that is not the embedding, although the two are tied
    (hub / "model.safetensors.index.json").unlink()
    config = read_json(hub / "config.json")
    write_json(hub / "config.json", config | {"tie_word_embeddings": True})
    with pytest.raises(UserError, match="lm_head.weight is not the embedding"):
        opened([*argv, "--tie_word_embeddings=true"], hub)


def test_crystalcoder_is_converted(argv: list[str], tmp_path: Path) -> None:
    """config.json of LLM360's crystalcoder-train (finetune/Megatron-LM/CrystalCoder), then smaller;
    names as in LLM360's index of the weights: q, k and v in one, matrices (in, out)."""
    said = {"model_type": "crystalcoder", "n_embd": 4096, "n_inner": 10922, "n_layer": 32,
            "n_head": 32, "vocab_size": 32032, "layer_norm_epsilon": 1e-5, "rotary_dim": 32,
            "position_embedding_type": "rotary", "activation_function": "swiglu",
            "tie_word_embeddings": True, "mup_width_scale": 0.0625, "mup_embeddings_scale": 14.6,
            "mup_output_alpha": 2.22, "mup_scale_qk_dot_by_d": True, "eos_token_id": 2}
    ours, theirs = load(["configs/crystal_7b_stage1.py"])[0], convert_crystal.convert_config(said)
    assert {f.name for f in fields(ModelConfig)
            if getattr(ours, f.name) != getattr(theirs, f.name)} == set(ckpt.INITIAL)
    net = small(**CRYSTAL)
    said |= {"n_embd": 64, "n_inner": 160, "n_layer": 3, "n_head": 4, "vocab_size": 97,
             "rotary_dim": 4}
    parameters = dict(net.named_parameters())
    weights = dict.fromkeys(["transformer.wte.weight", "lm_head.weight"],
                            parameters["model.embed_tokens.weight"])
    for kind in ("weight", "bias"):
        weights[f"transformer.ln_f.{kind}"] = parameters[f"model.norm.{kind}"]
        for i in range(3):
            for their, stems in convert_crystal.LAYER_STEMS.items():
                parts = [parameters[f"model.layers.{i}.{stem}.{kind}"] for stem in stems]
                values = torch.cat(parts) if parts else torch.ones(())  # a mask
                values = values.T.contiguous() if values.dim() == 2 else values
                weights[f"transformer.h.{i}.{their}.{kind}"] = values
    assert weights["transformer.h.0.attn.c_attn.weight"].shape == (64, 3 * 64)
    (source := tmp_path / "theirs").mkdir()
    torch.save(weights, source / "pytorch_model.bin")
    write_json(source / "config.json", said)
    with pytest.raises(UserError, match="tools/convert_crystal.py"):
        ckpt.load_run(source)
    convert_crystal.main([str(source), str(tmp_path / "ours")])
    back = meta_model(ckpt.read_network(tmp_path / "ours")).materialize(torch.device("cpu"))
    ckpt.load_weights(back, tmp_path / "ours")
    assert same(net.state_dict(), back.state_dict())


# ---- a stranger's checkpoint runs nothing


class Bomb:
    """A pickle that makes a file when it is opened."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.sign}",)


def rewrite_manifest(path: Path, **changes: Any) -> None:
    """Make the manifest's own hash fit, as a stranger would."""
    manifest = read_json(path / "manifest.json") | changes
    manifest.pop("sha256")
    write_json(path / "manifest.json", manifest | {"sha256": sha256_json(manifest)})


def test_a_strangers_checkpoint_runs_none_of_his_code(argv: list[str], saved: Path, hub: Path,
                                                      tmp_path: Path) -> None:
    """Pickles under every name that something might open, in every command that opens one."""
    sign, home = tmp_path / "it_ran", tmp_path / "run"
    shutil.copytree(saved.parent, home)
    path = home / "ckpt_000"
    for name in (".metadata", "model/.metadata", "model/__0_0.distcp", "train_state/.metadata",
                 "pytorch_model.bin", "train_state/pytorch_model.bin", "train_state/rng.pt",
                 "train_state/optimizer.bin", "modeling_llama.py", "training_args.bin"):
        for directory in (path, hub):
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(pickle.dumps(Bomb(sign)))
    rewrite_manifest(path, files={file.relative_to(path).as_posix(): sha256_file(file)
                                  for file in path.rglob("*")
                                  if file.is_file() and file.name != "manifest.json"})
    (hub / "model.safetensors").unlink()  # so that the .bin is what has the weights
    where = [f"--run_dir={home}"]
    commands = [
        (evaluation.main, [*where, "--tokens=2"]),
        (evaluation.main, [*where, "--prompt=x", "--tokens=2"]),
        (evaluation.main, [*where, f"--checkpoints={hub}", "--tokens=2"]),
        (memorize.main, [*where, "--k=6", "--l=8", "--sequences=2"]), (train.main, where),
        (train.main, [f"--run_dir={tmp_path / 'b'}", f"--init_from={hub}"]),
        (audit.main, where), (audit.main, [*where, "--replay=0"])]
    for main, more in commands:
        try:
            main([*argv, *more])
        except UserError as error:
            # The one whose weights are the pickle, and the audit, to which it is no checkpoint.
            assert "hub" in str(error) or main is audit.main
    assert not sign.exists()


def test_what_is_loaded_is_what_the_manifest_lists(argv: list[str], saved: Path,
                                                   tmp_path: Path) -> None:
    path = shutil.copytree(saved, tmp_path / "ckpt_000")
    ckpt.write_safetensors(path / "model-x.safetensors", [("odd", torch.ones(1))])
    write_json(path / "model.safetensors.index.json", {"weight_map": {"odd": "x.bin"}})
    assert same(opened(argv, saved).state_dict(), opened(argv, path).state_dict())
    files = ckpt.read_manifest(saved)["files"]
    for changes in ({"files": {}}, {"files": files | {"../../dev/zero": "0" * 64}},
                    {"files": files | {"/dev/zero": "0" * 64}}, {"weights_sha256": "0" * 64},
                    {"files": files | {"train_state/../x": "0" * 64}}, {"format": 2}):
        rewrite_manifest(path, **({"files": files} | changes))
        assert ckpt.verify_checkpoint(path) != ""
    with pytest.raises(UserError, match="ckpt_000.*is missing or damaged, or its format is not 3"):
        evaluation.main([*argv, f"--checkpoints={path}"])
