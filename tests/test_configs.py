"""The schema: what is accepted, what is refused and in which words, and Amber's figures."""

import json
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import pytest

import configs
from configs import Config, UserError, load, with_recorded


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.py"
    path.write_text(text)
    return str(path)


@dataclass
class Flags:
    watch: bool = False  # a switch
    step: int = 3  # a number


def refusal(argv: list[str], kind: type = configs.NoFlags) -> str:
    with pytest.raises(UserError) as error:
        load(argv, kind)
    return str(error.value)


def test_file_then_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, "import math\nhidden_size = 2 ** 7\nnum_attention_heads = 2\n_tmp = 1\n"
                           "sources = {'a': 'a.txt'}\nlearning_rate = 1\n")
    config, flags = load([path, "--hidden_size=256", "--compile", "--name=x", "--watch",
                          "--min_learning_rate=0", "--source_weights={'a': 2}"], Flags)
    assert (config.hidden_size, config.num_attention_heads, config.head_dim) == (256, 2, 128)
    assert config.num_key_value_heads == 2  # 0 = as many as the query heads
    assert config.learning_rate == 1.0 and type(config.learning_rate) is float
    assert config.compile is True and config.source_weights == {"a": 2}
    assert (config.name, config.data_dir, config.run_dir) == ("x", "data/x", "runs/x")
    assert flags == Flags(watch=True, step=3)
    assert json.loads(json.dumps(asdict(config))) == asdict(config)


def test_every_problem_at_once_one_sentence_each(tmp_path: Path) -> None:
    path = write(tmp_path, "hiden_size = 4\nlearning_rate = 'fast'\nn_chunks = 2.5\n")
    text = refusal([path, "--sed=3", "--seq_len=abc", "--tokenizer"])
    assert text.splitlines() == [
        f"{path}: there is no setting 'hiden_size'; did you mean 'hidden_size'?",
        f"{path}: learning_rate must be of type float, found 'fast' (str).",
        f"{path}: n_chunks must be of type int, found 2.5 (float).",
        "command line: there is no setting 'sed'; did you mean 'seed'?",
        "command line: --seq_len=abc: expected a value of type int, found 'abc'.",
        "command line: write --tokenizer=VALUE, in one word.",
    ]


@pytest.mark.parametrize("argument, words", [
    ("--learning_rate=-1", "learning_rate must be 0 or more and at most 1e+12, found -1.0."),
    ("--learning_rate=1e999", "learning_rate must be 0 or more and at most 1e+12, found inf."),
    ("--seed=99999999999999999999", "seed must be 0 or more and at most 1.41e+14, found 999"),
    ("--sources={3: 'x'}", "sources must have names of sources as keys, found 3."),
    ("--sample_tokens=100000", "sample_tokens must be at most 1024, found 100000."),
    ("--seq_len=0", "seq_len must be more than 0."),
    ("--min_learning_rate=1", "min_learning_rate (1.0) must not be more than learning_rate"),
    ("--lr_schedule=cos", "lr_schedule must be one of 'cosine', 'linear', 'constant', found"),
    ("--hidden_size=129", "hidden_size (129) must be a multiple of num_attention_heads (2); 128 or"
                          " 130 would do."),
    ("--hidden_size=130", "the head size, hidden_size / num_attention_heads = 65, must be even"),
    ("--num_key_value_heads=3", "num_attention_heads (2) must be a multiple of num_key_value_heads"
                                " (3); 3 would do."),
    ("--parallel=tp", "parallel must be one of 'ddp', 'fsdp', 'hsdp', found 'tp'."),
    ("--tokenizer=gpt2", 'tokenizer must be "bpe", "hf:PATH", "tiktoken:NAME" or "data'),
    ("--adam_beta2=1", "adam_beta2 must be less than 1, found 1.0."),
    ("--sources={'a': 3}", "sources['a'] must be a path or glob, found 3."),
    ("--source_weights={'a': -1}", "source_weights['a'] must be a number of 0 or more (at mos"),
])
def test_values_out_of_range(argument: str, words: str) -> None:
    assert words in refusal(["configs/amber_tiny.py", argument])


def test_a_model_config_alone_is_whole() -> None:
    assert configs.ModelConfig(hidden_size=64, num_attention_heads=4).num_key_value_heads == 4


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "Cannot read the config file none.py: No such file" in refusal(["none.py"])
    assert "is not the directory of a run" in refusal(["configs"])
    os.mkfifo(tmp_path / "pipe.py")
    assert "it is not a regular file" in refusal([str(tmp_path / "pipe.py")])
    assert "line 2: SyntaxError" in refusal([write(tmp_path, "a = 1\nb = = 2\n")])
    assert "line 3: NameError" in refusal([write(tmp_path, "seed = 1\n\nseq_len = undefined\n")])
    assert refusal([]).startswith("Give one config file or run directory, like configs")
    assert "found a.py and b.py" in refusal(["a.py", "b.py"])
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    assert "not a text file" in refusal([str(tmp_path / "binary.py")])


def test_help_prints_every_setting_with_its_comment(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        load(["-h"], Flags)
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "--step=3\n        a number" in text and "--watch=False\n        a switch" in text
    comments = configs.comments(Flags)
    for f in fields(Config):
        assert f"--{f.name}=" in text and len(comments[f.name]) > 10, f.name


def test_a_run_directory_serves_as_config(tmp_path: Path) -> None:
    path = write(tmp_path, "learning_rate = 1e-2\nseed = 7\ncanaries = {4: 500}\nname = 'x'\n")
    config, _ = load([path, "--device=cuda:3", "--resume=false"])
    run = tmp_path / "moved"
    run.mkdir()
    (run / "config.json").write_text(config.to_json())
    # It may lie elsewhere than it was made, on a machine with another device.
    assert load([str(run)])[0] == replace(config, run_dir=str(run), device="auto", resume="auto")
    assert load([str(run), "--seed=8"])[0].seed == 8
    assert "step must be 0 or more" in refusal([str(run), "--step=-1"], Flags)
    recorded = asdict(config)
    for content in ("", "[]", "{", '{"a": 1}'):
        (run / "config.json").write_text(content)
        assert "is not the directory of a run" in refusal([str(run)])
    for altered, sentence in (({"seed": "7"}, "seed must be of type int"),
                              ({"canaries": {"x": 2}}, "canaries must be {times: sequences}"),
                              ({"global_batch_size": 0}, "global_batch_size must be more than 0")):
        (run / "config.json").write_text(json.dumps(recorded | altered))
        assert sentence in refusal([str(run)])
        with pytest.raises(UserError, match="recorded settings cannot be used"):
            with_recorded(Config(), recorded | altered)
    # What an older version did not record has its default.
    (run / "config.json").write_text(json.dumps({"canaries": {}, "seed": 9}))
    assert load([str(run)])[0].seed == 9
    assert "is not the directory of a run" in refusal([str(tmp_path)])


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


def test_a_text_is_a_text(tmp_path: Path) -> None:
    for value in (r"'a\0b'", r"'\udc80'"):
        path = write(tmp_path, f"run_dir = {value}\n")
        assert "run_dir has characters that are no text" in refusal([path])


def test_torchruns_variables_fit_together() -> None:
    alone: dict[str, str] = {}
    whole = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
             "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
    configs.check_torchrun(alone)
    configs.check_torchrun(whole)
    for environ, sentence in (({"RANK": "0"}, "WORLD_SIZE is not set"),
                              ({"WORLD_SIZE": "2"}, "RANK is not set"),
                              (whole | {"RANK": "x"}, "RANK is 'x'"),
                              (whole | {"RANK": "2"}, "RANK must be less than WORLD_SIZE"),
                              ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0'")):
        with pytest.raises(UserError, match=sentence):
            configs.check_torchrun(environ)
