"""The schema: what is accepted, what is refused and in which words, and Amber's figures."""

import json
import os
import re
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import pytest

import configs
from configs import Config, ModelConfig, UserError, load, with_recorded


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.py"
    path.write_text(text)
    return str(path)


@dataclass
class Flags:
    again: bool = False  # a switch
    step: int = 3  # a number


def refusal(argv: list[str], kind: type = configs.NoFlags) -> str:
    with pytest.raises(UserError) as error:
        load(argv, kind)
    return str(error.value)


def test_file_then_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, "import math\nhidden_size = 2 ** 7\nnum_attention_heads = 2\n_tmp = 1\n"
                           "sources = {'a': 'a.txt'}\nlearning_rate = 1\n")
    config, flags = load([path, "--hidden_size=256", "--compile", "--name=x", "--again",
                          "--min_learning_rate=0", "--source_weights={'a': 2}"], Flags)
    assert (config.hidden_size, config.num_attention_heads, config.head_dim) == (256, 2, 128)
    assert config.num_key_value_heads == 2  # 0 = as many as the query heads
    assert config.learning_rate == 1.0 and type(config.learning_rate) is float
    assert config.compile is True and config.source_weights == {"a": 2}
    assert (config.name, config.data_dir, config.run_dir) == ("x", "data/x", "runs/x")
    assert flags == Flags(again=True, step=3)
    assert json.loads(json.dumps(asdict(config))) == asdict(config)
    assert ModelConfig(hidden_size=64, num_attention_heads=4).num_key_value_heads == 4


@pytest.mark.parametrize("argument, words", [
    ("--sed=3", "command line: there is no setting 'sed'; did you mean seed or init_seed? -h lis"),
    ("--lr=1e-3", "no setting 'lr'; did you mean learning_rate or lr_schedule?"),
    ("--lrate=1e-3", "no setting 'lrate'; did you mean fim_rates or learning_rate?"),
    ("--learning_rate 1e-3", "write --learning_rate=VALUE, in one word."),
    ("--seq_len=abc", "command line: seq_len must be of type int, found 'abc'."),
    ("--n_chunks=True", "n_chunks must be of type int, found True."),
    ("--learning_rate=-1", "learning_rate must be 0 or more and finite, found -1.0."),
    ("--learning_rate=1e999", "learning_rate must be 0 or more and finite, found inf."),
    ("--seq_len=0", "seq_len must be more than 0."),
    ("--min_learning_rate=1", "min_learning_rate must be at most learning_rate (0.003), found 1.0"),
    ("--lr_schedule=cos", "lr_schedule must be one of 'cosine', 'linear', 'constant', found 'cos'"),
    ("--hidden_size=129", "hidden_size must be a multiple of num_attention_heads (2), found 129."),
    ("--skip_chunks=[10]", "skip_chunks must be a list of chunks, 0 to 9, found [10]."),
])
def test_a_mistake_is_one_sentence(argument: str, words: str) -> None:
    assert words in refusal(["configs/amber_tiny.py", *re.split(" (?=1)", argument)])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "no config file or run directory none.py. Configs: configs/abl" in refusal(["none.py"])
    assert "is not the directory of a run" in refusal(["configs"])
    os.mkfifo(tmp_path / "pipe.py")
    assert "There is no config file" in refusal([str(tmp_path / "pipe.py")])
    path = write(tmp_path, "hiden_size = 4\n")
    assert refusal([path]) == (f"{path}: there is no setting 'hiden_size'; did you mean"
                               " hidden_size or base_hidden_size? -h lists all of them.")
    # A mistake in a program is shown by Python itself.
    with pytest.raises(SyntaxError):
        load([write(tmp_path, "a = 1\nb = = 2\n")])
    assert refusal([]).startswith("Give one config file or run directory, like configs")
    assert "found a.py and b.py" in refusal(["a.py", "b.py"])


def test_help_prints_every_setting_with_its_comment(capsys: pytest.CaptureFixture,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    for argv in (["-h"], ["configs/amber_tiny.py", "--help"]):
        with pytest.raises(SystemExit) as stop:
            load(argv, Flags)
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert "\nagain: bool = False  # a switch\nstep: int = 3  # a number\n" in text
        for f in fields(Config):
            assert re.search(rf"\n{f.name}: .+  # .+", text), f.name


def test_a_run_directory_serves_as_config(tmp_path: Path) -> None:
    path = write(tmp_path, "learning_rate = 1e-2\nseed = 7\nname = 'x'\n")
    config, _ = load([path, "--device=cuda:3"])
    run = tmp_path / "moved"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(asdict(config)))
    # It may lie elsewhere than it was made, on a machine with another device.
    assert load([str(run)])[0] == replace(config, run_dir=str(run), device="auto")
    assert load([str(run), "--seed=8"])[0].seed == 8
    assert "step must be 0 or more" in refusal([str(run), "--step=-1"], Flags)
    for content in ("", "[]", "{", '{"model_type": "llama"}'):
        (run / "config.json").write_text(content)
        assert "is not the directory of a run" in refusal([str(run)])
    for altered, sentence in (({"seed": "7"}, "seed must be of type int"),
                              ({"global_batch_size": 0}, "global_batch_size must be more than 0")):
        recorded = asdict(config) | altered
        (run / "config.json").write_text(json.dumps(recorded))
        assert sentence in refusal([str(run)])
        with pytest.raises(UserError, match=sentence):
            with_recorded(Config(), recorded)
    recorded = {"seed": 9, "data_dir": "elsewhere", "a setting of tomorrow": 1}
    assert with_recorded(Config(), recorded) == replace(Config(), seed=9)


def test_amber_7b_is_amber() -> None:
    """Figures of LLM360's amber-train README and main.py."""
    c, _ = load(["configs/amber_7b.py"])
    assert (c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads,
            c.num_key_value_heads, c.head_dim, c.vocab_size, c.seq_len) == (
                4096, 11008, 32, 32, 32, 128, 32000, 2048)
    assert (c.rms_norm_eps, c.rope_theta, c.tie_word_embeddings, c.initializer_range) == (
        1e-6, 10000, False, 0.02)
    assert (c.learning_rate, c.min_learning_rate, c.lr_schedule, c.warmup_steps) == (
        3e-4, 3e-5, "cosine", 2000)
    assert (c.adam_beta1, c.adam_beta2, c.adam_eps, c.weight_decay, c.grad_clip) == (
        0.9, 0.95, 1e-8, 0.1, 1.0)
    assert c.global_batch_size == 2240 and c.tokens_per_step == 4_587_520
    assert c.sequences_per_chunk // c.global_batch_size == 762 and c.n_chunks == 360
    assert 360 * 762 * c.tokens_per_step == pytest.approx(1258.5e9, rel=1e-4)
