"""A checkpoint is a Hugging Face directory: transformers opens ours, we open others', and whatever
is in one, nothing of it is run."""

import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SHARED, jsonl, needs_shared, words

import audit
import checkpoint as ckpt
import eval as evaluation
import memorize
import prepare_data
import train
from configs import ModelConfig, UserError, load
from data import load_data, read_json, sha256_file, sha256_json, write_json
from model import LLaMA, Norm, build_for_inference, continue_text, meta_model

SETTINGS = """
hidden_size, intermediate_size, num_hidden_layers, num_attention_heads = 64, 160, 3, 4
vocab_size, seq_len, n_chunks, sequences_per_chunk, valid_sequences = 310, 32, 1, 8, 2
global_batch_size, micro_batch_size, warmup_steps, sample_tokens = 4, 4, 1, 0
learning_rate, min_learning_rate, threads, workers, dtype = 0.03, 0.01, 1, 1, "float32"
"""
TEXTS = [words(i, 60) + "\n don't 1234567  é漢 <|x|> \ufeff" for i in range(20)]


def prepared(home: Path, **settings: Any) -> list[str]:
    """argv of a small config in `home` whose data is there."""
    settings |= {"sources": {"a": jsonl(home / "a.jsonl", TEXTS)}, "data_dir": str(home / "data"),
                 "run_dir": str(home / "run")}
    lines = "".join(f"{key} = {value!r}\n" for key, value in settings.items())
    (home / "hub.py").write_text(SETTINGS + lines)
    prepare_data.main([str(home / "hub.py")])
    return [str(home / "hub.py")]


def trained(argv: list[str]) -> Path:
    """Train for the two steps of the only chunk; the checkpoint."""
    train.main(argv)
    return Path(load(argv)[0].run_dir) / "ckpt_000"


@pytest.fixture(scope="module")
def argv(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    # The model has ten ids more than the tokenizer.
    return [*prepared(tmp_path_factory.mktemp("hub")), "--vocab_size=320"]


@pytest.fixture(scope="module")
def saved(argv: list[str]) -> Path:
    return trained(argv)


def opened(argv: list[str], path: Path) -> LLaMA:
    net = build_for_inference(load(argv)[0])
    ckpt.load_weights(net, path)
    return net


def published(saved: Path, out: Path) -> Path:
    """The same weights as someone else would have published them: without our manifest."""
    return shutil.copytree(saved, out, ignore=shutil.ignore_patterns("manifest.json",
                                                                     "train_state"))


# ---- others open ours


@pytest.mark.parametrize("changes", [(), ("--num_key_value_heads=2",),
                                     ("--tie_word_embeddings=true",)])
def test_transformers_computes_the_same(argv: list[str], tmp_path: Path,
                                        changes: tuple[str, ...]) -> None:
    path = trained([*argv, f"--run_dir={tmp_path / 'run'}", *changes])
    check_model([*argv, *changes], path)


@needs_shared
def test_transformers_computes_the_same_with_llamas_tokenizer(tmp_path: Path) -> None:
    argv = prepared(tmp_path, vocab_size=32000, hidden_size=16, num_attention_heads=2,
                    tokenizer=f"llama:{SHARED / 'llama_crystal_tokenizer.json'}")
    check_model(argv, trained(argv))


def check_model(argv: list[str], path: Path) -> None:
    """transformers opens the checkpoint as it is: our logits, our ids, our greedy text."""
    transformers = pytest.importorskip("transformers")
    net, tokenizer = opened(argv, path), load_data(load(argv)[0].data_dir).tokenizer
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path)
    reader = transformers.AutoTokenizer.from_pretrained(path)
    assert theirs.dtype == torch.float32
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == tokenizer.eos_id
    assert reader.eos_token_id == tokenizer.eos_id and theirs.config.bos_token_id is None
    x = torch.randint(net.config.vocab_size, (2, 30), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(theirs(x).logits, net(x), rtol=0, atol=1e-5)
    for prompt in ("the don", TEXTS[3][:40], "\n"):
        ids = reader(prompt, return_tensors="pt")["input_ids"]
        assert ids[0].tolist() == tokenizer.encode(prompt).tolist()
        new = theirs.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1]:]
        text = net.generate(ids.tolist(), 24, eos_id=tokenizer.eos_id)[0]
        assert new.tolist() == text and reader.decode(text) == tokenizer.decode(text)


def test_the_formats_own_library_reads_what_is_written(saved: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    manifest = ckpt.read_manifest(saved)
    for directory, stem in ((saved, "model"), (saved / "train_state", "optimizer")):
        ours = dict(ckpt.read_tensors(directory, stem))
        theirs = safetensors.load_file(directory / f"{stem}.safetensors")
        assert ours.keys() == theirs.keys() and ours
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        for name, values in theirs.items():
            assert ckpt.sha256(values.numpy().tobytes()).hexdigest() == manifest["tensors"][name]
    # ... and what it writes is read: other types, empty tensors, single numbers
    odd = {"a": torch.randn(3, 5).bfloat16(), "b": torch.randn(7).half(), "c": torch.zeros(0, 4),
           "d": torch.tensor(2.5, dtype=torch.float64)}
    safetensors.save_file(odd, tmp_path / "model.safetensors", metadata={"by": "them"})
    read = dict(ckpt.read_safetensors(tmp_path / "model.safetensors"))
    assert all(torch.equal(read[name], odd[name]) for name in odd)


def test_a_model_that_llama_does_not_know_is_not_called_one(argv: list[str],
                                                            tmp_path: Path) -> None:
    config = load(argv)[0]
    net = meta_model(config)
    assert ckpt.hugging_face_config(net, 3)["model_type"] == "llama"
    net.model.layers[0].self_attn.q_norm = Norm(config)  # a change of model.py alone
    assert ckpt.hugging_face_config(net, 3)["model_type"] == "amber-variant"
    write_json(tmp_path / "config.json", ckpt.hugging_face_config(net, 3))
    assert ckpt.config_problems(config, tmp_path) == []
    for changes in ({"norm": "layernorm"}, {"bias": True}, {"rotary_dim": 8},
                    {"logit_scale": 2.0}):
        for key, value in changes.items():
            setattr(config, key, value)
        said = ckpt.hugging_face_config(meta_model(config), 3)
        assert said["model_type"] == "crystalcoder" and said["logit_scale"] == config.logit_scale


# ---- we open others'


def test_a_run_opens_in_one_line(argv: list[str], saved: Path, tmp_path: Path,
                                 capsys: pytest.CaptureFixture) -> None:
    config = load(argv)[0]
    net, data = opened(argv, saved), load_data(config.data_dir)
    hub = published(saved, tmp_path / "hub")
    for path in (config.run_dir, saved, hub):
        model, tokenizer = ckpt.load_run(path, dtype=config.dtype)
        text = continue_text(model, tokenizer, "the", 8)
        assert text == continue_text(net, data.tokenizer, "the", 8)
        assert (tokenizer.n_vocab, tokenizer.eos_id) == (data.n_vocab, data.tokenizer.eos_id)
    # Published weights need neither data nor a config that knows them.
    words = ["configs/amber_7b.py", f"--checkpoints={hub}", f"--dtype={config.dtype}",
             f"--data_dir={tmp_path / 'no_data'}", f"--run_dir={tmp_path / 'no_run'}"]
    capsys.readouterr()
    evaluation.main([*words, "--prompt=the", "--tokens=8", "--temperature=0"])
    assert capsys.readouterr().out == text + "\n"
    (tmp_path / "text.txt").write_text("the other text")
    evaluation.main([*words, f"--text={tmp_path / 'text.txt'}", "--tokens=2"])
    said = capsys.readouterr().out
    assert "bits per byte" in said and "None" not in said and "lookup.py" not in said
    # Another tokenizer than the data's would give a figure that means nothing.
    content = read_json(hub / "tokenizer.json")
    vocab = content["model"]["vocab"]
    vocab["t"], vocab["e"] = vocab["e"], vocab["t"]
    write_json(hub / "tokenizer.json", content)
    hub = hub.rename(tmp_path / "ckpt_000")
    where = [*argv, f"--run_dir={tmp_path / 'no_run'}", f"--checkpoints={hub}"]
    for main, more in ((evaluation.main, []), (memorize.main, ["--k=6", "--l=8"]),
                       (audit.main, [])):
        with pytest.raises(UserError, match="was made with another tokenizer than .*ckpt_000 has"):
            main([*where, *more])
    for junk in ({"rope_scaling": "x"}, {"rope_parameters": {"rope_theta": "x"}},
                 {"model_type": "crystalcoder", "n_embd": "x", "mup_width_scale": []},
                 {"hidden_size": None, "num_attention_heads": 7}, {"vocab_size": 0}):
        write_json(hub / "config.json", junk)
        with pytest.raises(UserError, match="cannot be loaded"):
            ckpt.load_run(hub)
    with pytest.raises(UserError, match="its config.json cannot be read"):
        ckpt.load_run(tmp_path / "no_run")


def test_weights_that_no_manifest_lists_are_not_loaded(saved: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(saved, tmp_path / "ckpt_000")
    assert not ckpt.verify_checkpoint(copy)
    shutil.copy(copy / "model.safetensors", copy / "model-x.safetensors")
    assert "model-x.safetensors is not in manifest.json" in ckpt.verify_checkpoint(copy)


def test_a_published_directory_is_evaluated_memorized_and_trained_on(
        argv: list[str], saved: Path, tmp_path: Path) -> None:
    hub, run_dir = published(saved, tmp_path / "hub"), f"--run_dir={tmp_path / 'no_run_yet'}"
    evaluation.main([*argv, run_dir, f"--checkpoints={hub}", "--tokens=2"])
    evaluation.main([*argv, run_dir, f"--checkpoints={saved}", "--tokens=2"])
    theirs, ours = (r["result"] for r in ckpt.read_records(tmp_path / "no_run_yet/eval.jsonl")
                    if r["evaluation"] == "validation")
    assert theirs == ours
    memorize.main([*argv, run_dir, f"--checkpoints={hub}", "--k=6", "--l=8"])
    train.main([*argv, f"--run_dir={tmp_path / 'tuned'}", f"--init_from={hub}", "--max_steps=1"])
    with pytest.raises(UserError, match="a published directory has no training state"):
        train.main([*argv, f"--run_dir={tmp_path / 'on'}", f"--resume={hub}"])


def test_ambers_own_form_is_read_and_what_is_wrong_is_listed(
        argv: list[str], saved: Path, tmp_path: Path) -> None:
    """Amber's: two pytorch_model-*.bin with an index, a rotary table, bfloat16."""
    hub, net = published(saved, tmp_path / "amber"), opened(argv, saved)
    (hub / "model.safetensors").unlink()
    weights = {n: p.detach().bfloat16() for n, p in net.named_parameters()}
    names = sorted(weights)
    weights |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(3)}
    shards = {"pytorch_model-00001-of-00002.bin": names[:9],
              "pytorch_model-00002-of-00002.bin": names[9:] + list(weights)[-3:]}
    for file, part in shards.items():
        torch.save({n: weights[n] for n in part}, hub / file)
    write_json(hub / "pytorch_model.bin.index.json",
               {"weight_map": {n: file for file, part in shards.items() for n in part}})
    back = opened(argv, hub)
    assert all(torch.equal(p.bfloat16().float(), q)
               for p, q in zip(net.parameters(), back.parameters()))

    first, second = (hub / file for file in shards)
    wrong = {"model.embed_tokens.weight": torch.ones(3, 2), "odd": torch.ones(1)}
    torch.save({n: weights[n] for n in names[2:9]} | wrong, first)
    with pytest.raises(UserError) as stopped:
        ckpt.load_weights(net, hub)
    assert str(stopped.value) == (
        f"{hub} cannot be loaded: model.embed_tokens.weight is (3, 2) there, (320, 64) here;"
        " odd is unknown; lm_head.weight is missing.")

    config = read_json(hub / "config.json")
    for change, sentence in (
            ({"model_type": "gpt2"}, "a model of type 'gpt2'"),
            ({"hidden_size": 96, "rms_norm_eps": 1e-5}, "hidden_size is 96 there, 64 here; rms_n"),
            ({"rope_parameters": {"rope_type": "linear"}}, "says rope_type 'linear'"),
            ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta is 500000.0 there, 10000.0"),
            ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "says rope_type 'dynamic'"),
            ({"num_key_value_heads": None}, "odd is unknown"),  # as many as heads: goes on
            ({"tie_word_embeddings": True}, "tie_word_embeddings is True there, False here")):
        write_json(hub / "config.json", config | change)
        with pytest.raises(UserError, match=re.escape(sentence)):
            ckpt.load_weights(net, hub)
    write_json(hub / "config.json", config)
    for damage, sentence in ((lambda: second.write_bytes(b"junk"), f"{second} cannot be read"),
                             (lambda: second.write_bytes(b""), f"{second} cannot be read"),
                             (second.unlink, rf"{second} cannot be read \(No such file"),
                             (lambda: (hub / "config.json").write_text("{"), "config.json cannot")):
        damage()
        with pytest.raises(UserError, match=sentence):
            ckpt.load_weights(net, hub)


def test_damaged_safetensors_are_named(argv: list[str], saved: Path, tmp_path: Path) -> None:
    hub = published(saved, tmp_path / "hub")
    net, file = opened(argv, saved), hub / "model.safetensors"
    whole = file.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    for content, sentence in ((whole[:-9], "cut short"), (whole[:50], "not a safetensors file"),
                              (b"", ""), (pointer, "not a safetensors file"),
                              (whole.replace(b'"F32"', b'"I32"'), "is of type I32"),
                              (whole.replace(b"[320, 64]", b"[-32, 64]"), "does not have"),
                              (whole.replace(b"[320, 64]", b"[321, 64]"), "does not have")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"model.safetensors cannot be read \(.*{sentence}"):
            ckpt.load_weights(net, hub)
    file.unlink()
    with pytest.raises(UserError, match="has no weights"):
        ckpt.load_weights(net, hub)


def test_weights_come_from_crystalcoders_names() -> None:
    """As LLM360's index of the weights has them: q, k and v in one, matrices (in, out)."""
    c = ModelConfig(vocab_size=97, hidden_size=64, intermediate_size=170, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, norm="layernorm", bias=True)
    net = LLaMA(c)
    net.init_weights(1)
    ours = dict(net.named_parameters())
    theirs: dict[str, torch.Tensor] = {
        "transformer.wte.weight": ours["model.embed_tokens.weight"],
        "transformer.ln_f.weight": ours["model.norm.weight"],
        "transformer.ln_f.bias": ours["model.norm.bias"], "lm_head.weight": ours["lm_head.weight"]}
    for i in range(2):
        for kind in ("weight", "bias"):
            parts: dict[str, list[torch.Tensor]] = {}
            for our, their in ckpt.CRYSTAL_NAMES.items():
                values = ours[f"model.layers.{i}.{our}.{kind}"]
                parts.setdefault(their, []).append(values.T if values.dim() == 2 else values)
            for their, values in parts.items():
                theirs[f"transformer.h.{i}.{their}.{kind}"] = torch.cat(values, -1)
    assert theirs["transformer.h.0.attn.c_attn.weight"].shape == (64, 64 + 32 + 32)
    x = torch.randn(5, 64)  # their Conv1D: x @ weight + bias
    weight, bias = (theirs[f"transformer.h.1.mlp.c_fc2.{kind}"] for kind in ("weight", "bias"))
    torch.testing.assert_close(x @ weight + bias, net.model.layers[1].mlp.gate_proj(x))
    back: dict[str, torch.Tensor] = {}
    for name, values in theirs.items():
        back |= ckpt.from_crystal(c, name, values)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)


def test_config_is_crystalcoders(tmp_path: Path) -> None:
    """Of LLM360's crystalcoder-train, finetune/Megatron-LM/CrystalCoder/config.json."""
    write_json(tmp_path / "config.json", {"model_type": "crystalcoder",
        "n_embd": 4096, "n_inner": 10922, "n_layer": 32, "n_head": 32, "vocab_size": 32032,
        "layer_norm_epsilon": 1e-5, "rotary_dim": 32, "position_embedding_type": "rotary",
        "activation_function": "swiglu", "tie_word_embeddings": True,
        "mup_width_scale": 0.0625, "mup_embeddings_scale": 14.6, "mup_output_alpha": 2.22,
        "mup_scale_qk_dot_by_d": True})
    assert ckpt.config_problems(load(["configs/crystal_7b_stage1.py"])[0], tmp_path) == []


# ---- a stranger's checkpoint runs nothing


class Bomb:
    """A pickle that makes a file when it is opened."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.sign}",)


def rewrite_manifest(path: Path) -> None:
    """Make the hashes fit what is there, as a stranger would."""
    manifest = read_json(path / "manifest.json")
    manifest.pop("sha256")
    for file in path.rglob("*"):
        name = file.relative_to(path).as_posix()
        if file.is_file() and name != "manifest.json":
            manifest["files"][name] = sha256_file(file)
    write_json(path / "manifest.json", manifest | {"sha256": sha256_json(manifest)})


def test_a_strangers_checkpoint_runs_none_of_his_code(argv: list[str], saved: Path,
                                                      tmp_path: Path) -> None:
    """Pickles under every name that something might open, in every command that opens one."""
    sign, home = tmp_path / "it_ran", tmp_path / "run"
    shutil.copytree(saved.parent, home)
    path = home / "ckpt_000"
    bomb = pickle.dumps(Bomb(sign))
    for name in (".metadata", "model/.metadata", "model/__0_0.distcp", "train_state/.metadata",
                 "pytorch_model.bin", "train_state/pytorch_model.bin", "train_state/rng.pt",
                 "train_state/optimizer.bin", "modeling_llama.py", "training_args.bin"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(bomb)
    rewrite_manifest(path)
    stranger = tmp_path / "hub"
    shutil.copytree(path, stranger)
    for name in ("manifest.json", "model.safetensors"):
        (stranger / name).unlink()  # so that the .bin is what has the weights
    where = [f"--run_dir={home}"]
    commands = [
        (evaluation.main, [*where, "--tokens=2"]),
        (evaluation.main, [*where, f"--checkpoints={path}", "--tokens=2"]),
        (evaluation.main, [*where, "--prompt=x", "--tokens=2"]),
        (evaluation.main, [*where, f"--checkpoints={stranger}", "--tokens=2"]),
        (memorize.main, [*where, "--k=6", "--l=8", "--sequences=2"]),
        (train.main, [*where]), (train.main, [*where, f"--resume={path}"]),
        (train.main, [f"--run_dir={tmp_path / 'a'}", f"--init_from={path}", "--max_steps=1"]),
        (train.main, [f"--run_dir={tmp_path / 'b'}", f"--init_from={stranger}"]),
        (audit.main, [*where]), (audit.main, [*where, "--replay=0"])]
    for main, words_of_it in commands:
        try:
            main([*argv, *words_of_it])
        except UserError as error:
            # The one whose weights are the pickle, and the audit, to which it is no checkpoint.
            assert "hub" in str(error) or main is audit.main
    assert not sign.exists()


@pytest.mark.parametrize("files", [
    {}, {"../../dev/zero": "0" * 64}, {"/dev/zero": "0" * 64}, {"train_state/../x": "0" * 64},
    {"model.safetensors": 3}, ["model.safetensors"]])
def test_a_manifest_that_leads_elsewhere_or_nowhere_is_refused(saved: Path, tmp_path: Path,
                                                               files: Any) -> None:
    path = shutil.copytree(saved, tmp_path / "ckpt_000")
    manifest = read_json(path / "manifest.json")
    manifest.pop("sha256")
    manifest["files"] = files
    write_json(path / "manifest.json", manifest | {"sha256": sha256_json(manifest)})
    assert ckpt.verify_checkpoint(path) != ""


def test_format_one_is_refused_in_a_sentence(argv: list[str], saved: Path, tmp_path: Path) -> None:
    old = tmp_path / "ckpt_000"
    (old / "model").mkdir(parents=True)
    (old / "model/.metadata").write_bytes(pickle.dumps({}))
    write_json(old / "manifest.json", {"step": 2, "files": {}})
    with pytest.raises(UserError, match="ckpt_000 .*of format 1, whose metadata could run code"):
        evaluation.main([*argv, f"--checkpoints={old}"])


# ---- leftovers


def test_a_kill_while_a_checkpoint_is_deleted_leaves_nothing_behind(
        argv: list[str], saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is cut off, what is left is either the checkpoint or goes at the next start."""
    for allowed in range(12):
        run = tmp_path / f"run{allowed}"
        shutil.copytree(saved, run / "ckpt_000")
        left = [allowed]

        def killed(path: Path, *_: Any, _plain: Any = Path.unlink, left: list = left,
                   **rest: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            _plain(path, **rest)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", killed)
            try:
                ckpt.delete_directory(run / "ckpt_000")
            except KeyboardInterrupt:
                assert ckpt.find_checkpoints(run) == ([], [])
        ckpt.remove_leftovers(run)
        assert list(run.iterdir()) == []
