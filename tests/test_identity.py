"""No figure is another model's or another tokenizer's, and no edited one is shown as measured."""

import json
import shutil

import pytest
import torch
from helpers import jsonl, sentences
from test_checkpoint import SETTINGS, argv, hub, saved  # noqa: F401

import audit
import checkpoint as ckpt
import eval as evaluation
import prepare_data
import train
from configs import UserError
from tokenizer import BPE_PATTERN, EOT, Tokenizer, train_bpe


def test_weights_are_not_given_the_ids_of_others(argv, saved, hub, tmp_path, capsys):  # noqa: F811
    sources = {"a": jsonl(tmp_path / "a.jsonl", [sentences(i, 60) for i in range(20)])}
    places = f"data_dir, run_dir = {str(tmp_path / 'data')!r}, {str(tmp_path / 'run')!r}\n"
    (tmp_path / "other.py").write_text(f"{SETTINGS}sources = {sources}\n{places}")
    prepare_data.main(other := [str(tmp_path / "other.py"), "--vocab_size=310"])
    with pytest.raises(UserError, match="made with another tokenizer"):
        train.main([*other, "--vocab_size=320", f"--init_from={saved}"])
    train.main([*other, "--vocab_size=320"])
    damaged = shutil.copytree(hub, tmp_path / "damaged")
    (damaged / "config.json").write_text("{")
    paths = f"--checkpoints={damaged},{hub},{tmp_path / 'run/ckpt_000'}"
    evaluation.main([*argv, paths, f"--run_dir={tmp_path}", "--tokens=2"])
    assert capsys.readouterr().out.count("Skipping") == 2
    file = tmp_path / "eval.jsonl"
    assert [record["checkpoint"] for record in ckpt.read_records(file)] == ["hub"]
    lines = file.read_text().splitlines()  # an edited figure is no measured one
    forged = json.loads(lines[0]) | {"result": {"a": {"loss": 1.0, "bits_per_byte": 1.0}}}
    file.write_text(json.dumps(forged) + "\n")
    evaluation.main(command := [*argv, f"--checkpoints={hub}", f"--run_dir={tmp_path}"])
    assert "1 results were measured before" in capsys.readouterr().out
    file.unlink()
    evaluation.main(command)
    assert ckpt.read_records(file)[-1] == json.loads(lines[0])


def test_a_start_of_other_weights_an_old_file_and_many_spaces(argv, saved, hub, tmp_path):  # noqa: F811
    tuned = [*argv, f"--run_dir={tmp_path / 'tuned'}", "--replay=0"]
    train.main([*tuned[:-1], f"--init_from={hub}"])
    audit.main(tuned)
    weights = {name: x + 0.01 for name, x in ckpt.read_tensors(hub)}
    (hub / "model.safetensors").unlink()  # as before PyTorch 1.6
    torch.save(weights, hub / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert dict(ckpt.read_tensors(hub)).keys() == weights.keys()
    with pytest.raises(UserError, match="made with weights_sha256"):
        audit.main(tuned)
    tokenizer = Tokenizer("bpe", train_bpe(["a    b"], 260), BPE_PATTERN, {EOT: 270})
    assert tokenizer.decode(tokenizer.encode(text := f"a{' ' * 1_000_000}b")) == text
