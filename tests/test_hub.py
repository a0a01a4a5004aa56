"""Weights that travel: checkpoint -> Hugging Face directory -> transformers, and back here."""

import itertools
import json
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_prepare_data import SHARED, fuzz, jsonl, needs_shared, words

import eval as evaluation
import model
import prepare_data as pd
import train
from configs import load

transformers = pytest.importorskip("transformers")

SETTINGS = """
hidden_size, intermediate_size, num_hidden_layers, num_attention_heads = 64, 160, 3, 4
vocab_size, seq_len, n_chunks, rows_per_chunk, valid_rows = 310, 32, 1, 8, 2
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
    pd.main([str(home / "hub.py")])
    return [str(home / "hub.py")]


def checkpoint(argv: list[str]) -> Path:
    """Train for the two steps of the only chunk."""
    train.main(argv)
    return Path(load(argv)[0].run_dir) / "ckpt_000"


@pytest.fixture(scope="module")
def argv(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    # the model has ten ids more than the tokenizer
    return [*prepared(tmp_path_factory.mktemp("hub")), "--vocab_size=320"]


@pytest.fixture(scope="module")
def saved(argv: list[str]) -> Path:
    return checkpoint(argv)


def ours(argv: list[str], path: Path) -> model.LLaMA:
    net = evaluation.build(load(argv)[0])
    train.load_weights(net, path)
    return net


def same_bits(a: model.LLaMA, b: model.LLaMA) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def check_model(net: model.LLaMA, hub: Path, data_dir: str, limit: float = 1e-5) -> None:
    """transformers loads `hub` and gives the logits and the greedy text of `net`."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(hub)
    reader, tokenizer = transformers.AutoTokenizer.from_pretrained(hub), pd.load_tokenizer(data_dir)
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == tokenizer.eos_id
    assert reader.eos_token_id == tokenizer.eos_id and theirs.config.bos_token_id is None
    x = torch.randint(net.config.vocab_size, (2, 30), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(theirs(x).logits.float(), net(x), rtol=0, atol=limit)
    for prompt in ("the don", TEXTS[3][:40], "\n"):
        ids = reader(prompt, return_tensors="pt")["input_ids"]
        assert ids[0].tolist() == tokenizer.encode(prompt).tolist()
        new = theirs.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1]:]
        text = net.generate(ids.tolist(), 24, eos_id=tokenizer.eos_id)[0]
        assert new.tolist() == text and reader.decode(text) == tokenizer.decode(text)


@pytest.mark.parametrize("changes", [(), ("--num_key_value_heads=2",),
                                     ("--tie_word_embeddings=true",)])
def test_transformers_computes_the_same_and_the_way_back_keeps_every_bit(
        argv: list[str], tmp_path: Path, changes: tuple[str, ...]) -> None:
    argv = [*argv, f"--run_dir={tmp_path / 'run'}", *changes]
    path = checkpoint(argv)
    model.main([str(path), str(tmp_path / "hub")])
    net = ours(argv, path)
    check_model(net, tmp_path / "hub", load(argv)[0].data_dir)
    assert same_bits(net, ours(argv, tmp_path / "hub"))


def test_shards_and_bfloat16(argv: list[str], saved: Path, tmp_path: Path) -> None:
    numpy_file = pytest.importorskip("safetensors.torch")
    model.export(saved, tmp_path / "hub", shard_bytes=100_000)
    index = json.loads((tmp_path / "hub/model.safetensors.index.json").read_text())
    net, files = ours(argv, saved), sorted((tmp_path / "hub").glob("*.safetensors"))
    weights = {}
    for file in files:
        assert re.fullmatch(rf"model-\d+-of-0*{len(files)}.safetensors", file.name)
        tensors = numpy_file.load_file(file)  # the format's own reader
        assert sum(t.nbytes for t in tensors.values()) <= 100_000 or len(tensors) == 1
        assert all(index["weight_map"][name] == file.name for name in tensors)
        weights |= tensors
    assert len(files) > 5 and weights.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == 4 * net.config.n_params
    assert all(torch.equal(weights[n], p) for n, p in net.named_parameters())
    check_model(net, tmp_path / "hub", load(argv)[0].data_dir)
    assert same_bits(net, ours(argv, tmp_path / "hub"))
    model.main([str(saved), str(tmp_path / "half"), "--dtype=bfloat16"])
    for p, q in zip(net.parameters(), ours(argv, tmp_path / "half").parameters()):
        assert torch.equal(p.bfloat16().float(), q)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert theirs.dtype == torch.bfloat16


# ---- tokenizers


def check_tokenizer(tokenizer: pd.Tokenizer, hub: Path, n: int) -> None:
    """AutoTokenizer gives our ids for any text, and our text for them."""
    hub.mkdir()
    tokenizer.save_hugging_face(hub)
    model.write_json(hub / "config.json", {"model_type": "llama"})  # as beside the weights
    theirs = transformers.AutoTokenizer.from_pretrained(hub)
    assert theirs.eos_token_id == tokenizer.eos_id and theirs.bos_token_id is None
    names = re.compile("|".join(map(re.escape, tokenizer.specials)))
    pieces = [p.decode("utf-8", "replace") for p in tokenizer.pieces.values()]
    known = ["", "\n", " ", *TEXTS[:3], "it'ſ IT'LL 'S", "1234567 12", "  \r\n \n\n x\t\n ",
             *(a + " " * k + b for k in range(20) for a in ("", "é") for b in ("", "b\n", "1"))]
    specials = [f"{a} {b} {a}x{b}" for a, b in itertools.product(tokenizer.specials, repeat=2)]
    for text in itertools.chain(fuzz(n, pieces), known, specials):
        ids = tokenizer.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids, repr(text)
        if tokenizer.kind != "llama" or not names.search(text):  # there 2 decodes to " </s>"
            assert theirs.decode(ids) == tokenizer.decode(ids), repr(text)
    if theirs.split_special_tokens:
        end = [*tokenizer.encode("ab").tolist(), tokenizer.eos_id]
        assert theirs.decode(end, skip_special_tokens=True) == "ab"


def test_bpe_has_the_same_ids_in_hugging_face(tmp_path: Path) -> None:
    texts = [*TEXTS, "aaaa aaa aaaaaaaa \n\n\n \t the theme thesis" * 9,
             Path(pd.__file__).read_text()]
    ranks = pd.train_bpe(texts, 900)
    tokenizer = pd.Tokenizer("bpe", ranks, pd.BPE_PATTERN, {pd.EOT: len(ranks)})
    check_tokenizer(tokenizer, tmp_path / "hub", 1500)


def test_named_encodings_have_the_same_ids_in_hugging_face(tmp_path: Path) -> None:
    """The patterns of tiktoken's encodings, whose vocabularies would have to be downloaded."""
    from tiktoken_ext import openai_public
    ranks = pd.train_bpe([*TEXTS, Path(pd.__file__).read_text(), "it's THEY'LL 123456 " * 9], 700)
    found = {}
    for name in openai_public.ENCODING_CONSTRUCTORS:
        with pytest.MonkeyPatch.context() as patch:
            for reader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
                patch.setattr(openai_public, reader, lambda *_, **__: ranks)
            found[openai_public.ENCODING_CONSTRUCTORS[name]()["pat_str"]] = name
    assert len(found) >= 3
    for pattern, name in found.items():
        specials = {pd.EOT: len(ranks) + 3, "<|x|>": len(ranks) + 9}  # with ids that nothing has
        check_tokenizer(pd.Tokenizer(name, ranks, pattern, specials), tmp_path / name, 600)


@needs_shared
def test_llamas_tokenizer_has_the_same_ids_in_hugging_face(tmp_path: Path) -> None:
    tokenizer = pd.LlamaTokenizer(str(SHARED / "llama_crystal_tokenizer.json"))
    check_tokenizer(tokenizer, tmp_path / "hub", 1500)
    again = pd.LlamaTokenizer(str(tmp_path / "hub/tokenizer.json"))  # and it can make data here
    assert all(again.encode(t).tolist() == tokenizer.encode(t).tolist() for t in fuzz(500, ["a"]))


def test_a_sentencepiece_model_has_the_same_ids_in_hugging_face(tmp_path: Path) -> None:
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    trainer.train(sentence_iterator=iter([t.replace("\n", " ") for t in TEXTS]), vocab_size=400,
                  model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
                  remove_extra_whitespaces=False, split_digits=True, minloglevel=2,
                  model_prefix=str(tmp_path / "m"))
    check_tokenizer(pd.LlamaTokenizer(str(tmp_path / "m.model")), tmp_path / "hub", 1500)


@needs_shared
def test_a_model_with_llamas_tokenizer_travels(tmp_path: Path) -> None:
    argv = prepared(tmp_path, vocab_size=32000, hidden_size=16, num_attention_heads=2,
                    tokenizer=f"llama:{SHARED / 'llama_crystal_tokenizer.json'}")
    path = checkpoint(argv)
    model.export(path, tmp_path / "hub")
    check_model(ours(argv, path), tmp_path / "hub", str(tmp_path / "data"))


# ---- what can go wrong on the way out


def refused(*arguments: Any) -> str:
    with pytest.raises(SystemExit) as stopped:
        model.export(*arguments)
    return str(stopped.value)


def test_bad_exports_are_one_sentence_and_leave_nothing(
        saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "hub"
    assert "is not a checkpoint" in refused(tmp_path / "none", out)
    assert "is not a checkpoint" in refused(saved.parent, out)  # the run, which has a config.json
    copy = shutil.copytree(saved, tmp_path / "copy")
    with open(copy / "model/__0_0.distcp", "r+b") as f:
        f.write(b"x")
    assert "is damaged" in refused(copy, out)
    assert "has no prepared data" in refused(saved, out, torch.float32, str(tmp_path))
    assert not out.exists()
    small = 50_000  # bytes a file may have: a disk that is full, as the system sees it
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (small, limits[1]))
    try:
        assert re.fullmatch(rf"Could not write {out}: .*\.", refused(saved, out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("hub*"))
    model.main([str(saved), str(out)])
    assert "exists already" in refused(saved, out)
    assert "is not a checkpoint" in refused(out, tmp_path / "again")
    assert capsys.readouterr().out == f"{out}: 182,720 parameters in float32.\n"


def test_a_tokenizer_that_is_not_there_is_named(argv: list[str], tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    path = checkpoint(prepared(home))
    shutil.move(home / "data", home / "moved")
    note = model.export(path, tmp_path / "a")
    assert "tokenizer is missing" in note and "--data_dir=PATH" in note
    assert not (tmp_path / "a/tokenizer.json").exists()
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert "\n" not in model.export(path, tmp_path / "b", data_dir=str(home / "moved"))
    assert (tmp_path / "b/tokenizer.json").exists()
    manifest = json.loads((home / "moved/manifest.json").read_text())
    (home / "moved/manifest.json").write_text(json.dumps(manifest | {"seed": 1}))
    assert "is not what it was trained on" in model.export(path, tmp_path / "c",
                                                           data_dir=str(home / "moved"))


# ---- and on the way in


def test_published_directories_are_read_and_what_is_wrong_is_listed(
        argv: list[str], saved: Path, tmp_path: Path) -> None:
    """Amber's: two pytorch_model-*.bin with an index, a rotary table, bfloat16."""
    hub, net = tmp_path / "amber", ours(argv, saved)
    model.export(saved, hub)
    (hub / "model.safetensors").unlink()
    weights = {n: p.detach().bfloat16() for n, p in net.named_parameters()}
    names = sorted(weights)
    weights |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(3)}
    shards = {"pytorch_model-00001-of-00002.bin": names[:9],
              "pytorch_model-00002-of-00002.bin": names[9:] + list(weights)[-3:]}
    for file, part in shards.items():
        torch.save({n: weights[n] for n in part}, hub / file)
    model.write_json(hub / "pytorch_model.bin.index.json",
                     {"weight_map": {n: file for file, part in shards.items() for n in part}})
    back = ours(argv, hub)
    assert all(torch.equal(p.bfloat16().float(), q)
               for p, q in zip(net.parameters(), back.parameters()))

    first, second = (hub / file for file in shards)
    wrong = {"model.embed_tokens.weight": torch.ones(3, 2), "odd": torch.ones(1)}
    torch.save({n: weights[n] for n in names[2:9]} | wrong, first)
    with pytest.raises(SystemExit) as stopped:
        train.load_weights(net, hub)
    assert str(stopped.value) == (
        f"{hub} cannot be loaded: model.embed_tokens.weight is (3, 2) there, (320, 64) here;"
        " odd is unknown; lm_head.weight is missing.")

    config = json.loads((hub / "config.json").read_text())
    for change, sentence in (
            ({"model_type": "gpt2"}, "a model of type 'gpt2'"),
            ({"hidden_size": 96, "rms_norm_eps": 1e-5}, "hidden_size is 96 there, 64 here; rms_n"),
            ({"rope_parameters": {"rope_type": "linear"}}, "rope_type is 'linear' there"),
            ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta is 500000.0 there, 10000.0"),
            ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_type is 'dynamic' there"),
            ({"num_key_value_heads": None}, "odd is unknown"),  # as many as heads: goes on
            ({"tie_word_embeddings": True}, "tie_word_embeddings is True there, False here")):
        model.write_json(hub / "config.json", config | change)
        with pytest.raises(SystemExit, match=re.escape(sentence)):
            train.load_weights(net, hub)
    model.write_json(hub / "config.json", config)
    for damage, sentence in ((lambda: second.write_bytes(b"junk"), f"{second} cannot be read"),
                             (lambda: second.write_bytes(b""), f"{second} cannot be read"),
                             (second.unlink, rf"{second} cannot be read \(No such file"),
                             (lambda: (hub / "config.json").write_text("{"), "config.json cannot")):
        damage()
        with pytest.raises(SystemExit, match=sentence):
            train.load_weights(net, hub)


def test_damaged_safetensors_are_named(argv: list[str], saved: Path, tmp_path: Path) -> None:
    model.export(saved, tmp_path / "hub")
    net, file = ours(argv, saved), tmp_path / "hub/model.safetensors"
    whole = file.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    for data, sentence in ((whole[:-9], "cut short"), (whole[:50], "not a safetensors file"),
                           (b"", ""), (pointer, "not a safetensors file"),
                           (whole.replace(b'"F32"', b'"I32"'), "is of type I32")):
        file.write_bytes(data)
        with pytest.raises(SystemExit, match=rf"model.safetensors cannot be read \(.*{sentence}"):
            train.load_weights(net, tmp_path / "hub")
    file.unlink()
    with pytest.raises(SystemExit, match="has no weights"):
        train.load_weights(net, tmp_path / "hub")
