"""The one schema of all stages: `Config`, and `load`, which reads a file and the command line.

    config, flags = load(["configs/amber_tiny.py", "--learning_rate=1e-3"], Flags)

A config file is Python: plain assignments to the names below. The defaults are Amber's (LLM360
amber-train main.py and README), so `amber_7b.py` is almost empty. This module does not know torch.
"""

import ast
import difflib
import errno
import inspect
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any


class UserError(Exception):
    """What a person at the keyboard must know: one sentence that names the thing, what was
    expected, what was found and what to do. `run_command` prints it; everything else is a bug."""


def regular(path: str | Path) -> Path:
    """A path, if it is a file to read; OSError for a pipe or a device, where that may never end."""
    if Path(path).exists() and not Path(path).is_file():
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return Path(path)


def read_regular(path: str | Path) -> bytes:
    """The bytes of a file; every OSError names it."""
    try:
        return regular(path).read_bytes()
    except OSError as error:
        error.filename = str(path)  # a disk that fails in the middle does not say which file it was
        raise


@dataclass
class ModelConfig:
    """The network, in Hugging Face's names (LLaMA's config.json)."""

    vocab_size: int = 32000  # token ids the model knows; a "bpe" tokenizer is trained to it
    hidden_size: int = 4096  # width of the residual stream
    intermediate_size: int = 11008  # width of the SwiGLU MLP
    num_hidden_layers: int = 32  # transformer blocks
    num_attention_heads: int = 32  # query heads; the head size is hidden_size / num_attention_heads
    num_key_value_heads: int = 0  # key and value heads; 0 = num_attention_heads, as Amber
    rms_norm_eps: float = 1e-6  # added to the mean square (or variance) before the root
    rope_theta: float = 10000.0  # base of the rotary frequencies
    tie_word_embeddings: bool = False  # one matrix for the embedding and the output head
    initializer_range: float = 0.02  # standard deviation of every initial weight matrix

    # -- what Crystal chooses otherwise (LLM360 crystalcoder-train)
    norm: str = "rmsnorm"  # "rmsnorm" | "layernorm", which has a bias
    bias: bool = False  # biases beside every matrix of a block
    rotary_dim: int = 0  # dimensions of a head that turn; 0 = all
    rotary_interleaved: bool = False  # pairs are (2i, 2i + 1); false = (i, i + rotary_dim / 2)
    attention_scale_power: float = 0.5  # q k is divided by the head size to this power; muP: 1
    embedding_scale: float = 1.0  # factor of the embeddings
    logit_scale: float = 1.0  # factor of the logits, beside the width scale
    base_hidden_size: int = 0  # muP: the width the rates were found at; 0 = no muP
    init_truncated: bool = False  # initial weights within two standard deviations
    init_by_depth: bool = False  # o_proj and down_proj begin smaller by sqrt(2 x layers)

    def __post_init__(self) -> None:
        # Not left to `load`, because a model made of ModelConfig(...) alone must be right too.
        if self.num_key_value_heads == 0:
            self.num_key_value_heads = self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def width_scale(self) -> float:
        """muP's base width / width (Yang et al. 2022, table 8); 1 without muP.

        The logits and the learning rate of the hidden matrices are multiplied with it, and the
        initial deviation of the hidden matrices with its square root.
        """
        return self.base_hidden_size / self.hidden_size if self.base_hidden_size else 1.0


@dataclass
class Config(ModelConfig):
    """Every setting of the five stages; one that has no effect on a stage is ignored by it."""

    # -- where things are
    name: str = ""  # name of the data and the run; "" = the config file's
    data_dir: str = ""  # prepared data; "" = data/NAME
    run_dir: str = ""  # checkpoints, metrics, results; "" = runs/NAME

    # -- prepare_data.py
    sources: dict = field(default_factory=dict)  # {"name": "path or glob"}; {} = the embedded text
    source_weights: dict = field(default_factory=dict)  # uses of a source: 0.5 = half, 2 = twice
    source_halves: dict = field(default_factory=dict)  # {"name": "even" or "odd" documents}
    max_source_bytes: int = 0  # text taken from each source, bytes; 0 = all of it
    canaries: dict = field(default_factory=dict)  # {times: n}: plant n random sequences so often
    tokenized: str = ""  # path or glob of Amber's released chunks, used instead of sources
    tokenized_valid: str = ""  # the same for validation; without it there is none
    on_bad_line: str = "stop"  # a line of input that is not valid: "stop" | "skip" (and count)
    tokenizer: str = "bpe"  # "bpe" | "hf:PATH" of a tokenizer.json | "tiktoken:NAME" | "data:DIR"
    crystal_tokens: bool = False  # ids for Crystal's 22 added tokens (infilling, files, chat)
    fim_rates: dict = field(default_factory=dict)  # {"name": share of its documents infilled}
    fim_spm_rate: float = 0.5  # of those, the share written suffix first
    seq_len: int = 2048  # tokens a sequence trains on; it holds seq_len + 1 ids
    n_chunks: int = 360  # chunks of data = checkpoints kept
    sequences_per_chunk: int = 0  # sequences of a chunk at most; 0 = all there are
    valid_sequences: int = 102_400  # held out of each source for validation (at most)
    valid_documents: int = 0  # hold out one whole document in so many, by hash; 0 = any sequences
    workers: int = 0  # processes; 0 = one per core
    seed: int = 11111  # of the data order, the validation sequences and the initial weights
    init_seed: int = 0  # of the initial weights alone; 0 = seed

    # -- train.py: batch and schedule
    global_batch_size: int = 2240  # sequences per optimizer step, over all processes
    micro_batch_size: int = 10  # sequences per forward pass of one process
    learning_rate: float = 3e-4  # peak, reached after warmup_steps
    min_learning_rate: float = 3e-5  # where "cosine" and "linear" end; "constant" ignores it
    lr_schedule: str = "cosine"  # "cosine" | "linear" | "constant", after the warm-up
    schedule_steps: int = 0  # optimizer steps of the schedule, warm-up too; 0 = the data's
    warmup_steps: int = 2000  # optimizer steps of linear warm-up from 0
    warmup_offset: int = 1  # added to the steps done; 0 = Amber's, whose first rate is 0
    epochs: int = 1  # passes through all chunks, each in an order of its own
    max_steps: int = 0  # stop after so many optimizer steps, schedule unchanged; 0 = all the data

    # -- train.py: optimizer (AdamW)
    adam_beta1: float = 0.9  # decay of the mean gradient
    adam_beta2: float = 0.95  # decay of the mean squared gradient
    adam_eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # on every parameter, norms and embeddings too, as Amber
    grad_clip: float = 1.0  # global gradient norm at most

    # -- train.py: the machine
    device: str = "auto"  # "auto" | "cpu" | "cuda" | "cuda:1"; auto = cuda where there is one
    dtype: str = "auto"  # compute: "auto" | "bfloat16" | "float32"; weights are float32 always
    kernels: str = "auto"  # "auto" | "triton" | "torch"; auto = Triton on CUDA
    compile: bool = False  # torch.compile the blocks; pays for runs longer than a few minutes
    threads: int = 0  # CPU threads of torch; 0 = one per core
    deterministic: bool = False  # on a GPU: same bits in every run, slower; a CPU's are anyway
    peak_tflops: float = 0.0  # of one device, for MFU; 0 = known by name, or measured on a CPU

    # -- train.py: many processes (torchrun)
    parallel: str = "fsdp"  # "ddp" | "fsdp" | "hsdp": shard in groups, replicate across them
    shard_size: int = 0  # hsdp: processes of a group; 0 = those of a node
    reduce_dtype: str = "float32"  # gradients between processes: "float32" | "bfloat16", as Amber
    same_bits: bool = False  # sums in one order: any number of processes gives the same bits; fsdp
    activation_checkpointing: str = "none"  # computed again: "none" | "selective" | "full" block
    timeout_minutes: float = 15.0  # a collective that takes so long ends the run

    # -- train.py: a loss or gradient that is not finite
    on_nonfinite: str = "stop"  # "stop" | "skip_step": leave out the update of that step
    skip_chunks: list = field(default_factory=list)  # left out; the first ones come again instead

    # -- train.py: validation, samples, checkpoints
    eval_interval: int = 762  # optimizer steps between validations; 0 = only at checkpoints
    eval_sequences: int = 256  # sequences per source of one validation
    sample_prompt: str = "The"  # text continued at every checkpoint
    sample_tokens: int = 48  # tokens of that continuation; 0 = none
    resume: str = "auto"  # "auto" = go on if it can | "true" = it must | "false" = a new run | PATH
    init_from: str = ""  # checkpoint whose weights a new run begins with
    save_minutes: float = 30.0  # minutes between rolling checkpoints; 0 = none
    keep_rolling: int = 1  # rolling checkpoints kept
    keep_train_state: int = 2  # newest checkpoints that keep their optimizer state; 0 = all

    # -- eval.py
    task_dir: str = "tasks"  # benchmark files: TASK_DIR/NAME/SPLIT.jsonl or SPLIT*.parquet
    tasks: str = ""  # of them, "name,name"; "" = our own two and all that task_dir has
    published: str = ""  # .csv of another run's scores, drawn beside ours: tokens, one per task

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_len

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


# The settings that take one of a few words. Those that also take a path or a name are not here.
CHOICES = {
    "norm": ("rmsnorm", "layernorm"),
    "on_bad_line": ("stop", "skip"),
    "lr_schedule": ("cosine", "linear", "constant"),
    "dtype": ("auto", "bfloat16", "float32"),
    "kernels": ("auto", "triton", "torch"),
    "parallel": ("ddp", "fsdp", "hsdp"),
    "reduce_dtype": ("float32", "bfloat16"),
    "activation_checkpointing": ("none", "selective", "full"),
    "on_nonfinite": ("stop", "skip_step"),
}
# The numbers that must be more than 0. Any other may be 0, often with a meaning of its own ("0 =
# all"), and none may be negative.
POSITIVE = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    rms_norm_eps rope_theta initializer_range embedding_scale logit_scale seq_len n_chunks
    global_batch_size micro_batch_size learning_rate epochs adam_eps grad_clip timeout_minutes
    eval_sequences k l batch world_size""".split()

# The most that a number may be: what is larger is a slip of the finger, and would overflow, or not
# end, somewhere deep inside. Below are those that Python counts one by one, or float32 must hold.
MOST = {int: 2**47, float: 1e12, "num_hidden_layers": 10_000, "seq_len": 10**8, "n_chunks": 10**6,
        "epochs": 10_000, "workers": 1024, "threads": 1024, "world_size": 10**6,
        "rms_norm_eps": 1.0, "adam_eps": 1.0, "initializer_range": 1e3, "embedding_scale": 1e6,
        "logit_scale": 1e6, "attention_scale_power": 4.0}


@dataclass
class NoFlags:
    """For a stage that takes nothing beside the settings."""


def load(argv: list[str], Flags: type = NoFlags) -> tuple[Config, Any]:
    """Read a config and its `--key=value` overrides: `(config, flags)`.

    argv: `["configs/NAME.py", "--key=value", ...]`. In place of the file a run directory will do:
    then the settings are those that the run was trained with. Flags: a dataclass of what this stage
    takes beside the settings, with a comment for each; `flags` is one of these. `-h` prints all.
    Raises UserError with all problems at once, one sentence each.
    """
    if "-h" in argv or "--help" in argv:
        print(help_text(Flags))
        sys.exit(0)
    paths = [argument for argument in argv if not argument.startswith("-")]
    if len(paths) != 1:
        found = " and ".join(paths) or "none"
        raise UserError(f"Give one config file or run directory, like configs/amber_tiny.py or"
                        f" runs/amber_tiny: found {found}. (Settings are written --key=value; -h"
                        " lists them.)")
    # All problems are collected, so that a person does not meet them one at a time.
    # f.type is the class int and not the word "int", unless this file imports `annotations`.
    settings, flags = ({f.name: f.type for f in fields(cls)} for cls in (Config, Flags))
    kinds = settings | flags
    values: dict[str, Any] = {}
    problems: list[str] = []
    read = read_run if Path(paths[0]).is_dir() else read_file
    for key, value in read(paths[0]).items():
        if key in settings:
            set_value(values, key, value, settings[key], paths[0], problems)
        else:
            problems.append(f"{paths[0]}: {unknown(key, [*settings])}")
    for argument in argv:
        if not argument.startswith("-"):
            continue
        key, equals, text = argument.lstrip("-").partition("=")
        if key not in kinds:
            problems.append(f"command line: {unknown(key, [*kinds])}")
        elif not equals and kinds[key] is not bool:
            problems.append(f"command line: write --{key}=VALUE, in one word.")
        else:
            value = parse(text if equals else "true", kinds[key], argument, problems)
            set_value(values, key, value, kinds[key], "command line", problems)
    config = Config(**{key: value for key, value in values.items() if key in settings})
    # Data and run are found by the config's name unless it says otherwise.
    config.name = config.name or Path(paths[0]).stem
    config.data_dir = config.data_dir or f"data/{config.name}"
    config.run_dir = config.run_dir or f"runs/{config.name}"
    chosen = Flags(**{key: value for key, value in values.items() if key in flags})
    if not problems:  # a range means nothing before the types are right
        problems = check_ranges(chosen) + check(config)
    if problems:
        raise UserError("\n".join(problems))
    return config, chosen


def read_run(directory: str) -> dict[str, Any]:
    """The settings that a run has recorded, for use with that run wherever it lies now."""
    try:
        recorded = json.loads(read_regular(Path(directory, "config.json")))
        # What a model computes is in the config.json of a checkpoint; only a run's has all this.
        found = {name: value for name, value in recorded_settings(recorded).items()
                 if name not in ("device", "kernels", "resume")}
        found["canaries"]
    except (OSError, ValueError, RecursionError, AttributeError, KeyError):
        raise UserError(f"{directory} is not the directory of a run: it has no config.json as"
                        " train.py writes it. (Checkpoints are named by --checkpoints=PATH.)")
    return found | {"run_dir": str(Path(directory))}


def recorded_settings(recorded: dict[str, Any]) -> dict[str, Any]:
    """The settings in JSON that a run or a data set has recorded: of the names of today, with
    whatever values others may have written there."""
    found = {f.name: recorded[f.name] for f in fields(Config) if f.name in recorded}
    if type(found.get("canaries")) is dict:  # JSON has made text of the numbers that are keys
        found["canaries"] = {int(times) if str(times).isdecimal() else times: n
                             for times, n in found["canaries"].items()}
    return found


def read_file(path: str) -> dict[str, Any]:
    """The names a config file assigns; it runs in a namespace of its own."""
    try:
        source = read_regular(path).decode()
    except (OSError, ValueError) as error:
        near = ", ".join(sorted(os.path.relpath(p) for p in Path(__file__).parent.glob("[!_]*.py")))
        reason = getattr(error, "strerror", None) or "it is not a text file"
        raise UserError(f"Cannot read the config file {path}: {reason}. There are: {near}.")
    # A config is a program, so that one can build on another. It is the user's own, and may run.
    namespace: dict[str, Any] = {"__file__": path}
    try:
        exec(compile(source, path, "exec"), namespace)
    except Exception as error:
        # A SyntaxError knows its line. Of any other error it is in the traceback, whose first frame
        # is this function and whose second is the config.
        line = getattr(error, "lineno", None)
        if line is None and error.__traceback__ and error.__traceback__.tb_next:
            line = error.__traceback__.tb_next.tb_lineno
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}.")
    # A config may import modules and keep helpers under names with _: these are no settings.
    return {key: value for key, value in namespace.items()
            if not key.startswith("_") and not isinstance(value, ModuleType)}


def unknown(key: str, known: list[str]) -> str:
    """What to say of a name that is no setting: the nearest one."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "-h lists them."
    return f"there is no setting {key!r}; {hint}"


def parse(text: str, kind: type, argument: str, problems: list[str]) -> Any:
    """The value of `--key=text` for a setting of type `kind`."""
    if kind is str:
        return text
    if kind is bool:
        text = {"true": "True", "false": "False"}.get(text.lower(), text)
    # Numbers, lists and dictionaries as Python writes them; literal_eval runs no code.
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        problems.append(f"command line: {argument}: expected a value of type {kind.__name__},"
                        f" found {text!r}.")
        # An empty value of the right type, so that set_value does not note a second problem.
        return kind()


def set_value(values: dict[str, Any], key: str, value: Any, kind: type, where: str,
              problems: list[str]) -> None:
    """Set a value if it has its setting's type (a whole number will do for a float)."""
    # Exact types: True is an int to Python, and "3" is not a number to anybody.
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**1000 else float("inf")  # there are longer ones
    if type(value) is not kind:
        problems.append(f"{where}: {key} must be of type {kind.__name__}, found {value!r}"
                        f" ({type(value).__name__}).")
    elif kind is str and ("\0" in value or value.encode("utf-8", "replace").decode() != value):
        problems.append(f"{where}: {key} has characters that are no text, found {value!r}.")
    else:
        values[key] = value


def check_ranges(values: Any) -> list[str]:
    """The numbers of a dataclass that are out of range, one sentence each."""
    problems = []
    for f in fields(values):
        value = getattr(values, f.name)
        if f.type not in (int, float):
            continue
        most = MOST.get(f.name, MOST[f.type])
        if not 0 <= value <= most:
            problems.append(f"{f.name} must be 0 or more and at most {most:.3g}, found {value}.")
        elif value == 0 and f.name in POSITIVE:
            problems.append(f"{f.name} must be more than 0.")
    return problems


def check(c: Config) -> list[str]:
    """Everything wrong with the values of a config, one sentence each."""
    problems = check_ranges(c)
    for key, allowed in CHOICES.items():
        if getattr(c, key) not in allowed:
            problems.append(f"{key} must be one of {', '.join(map(repr, allowed))}, found"
                            f" {getattr(c, key)!r}.")
    for key in ("adam_beta1", "adam_beta2"):
        if getattr(c, key) >= 1:
            problems.append(f"{key} must be less than 1, found {getattr(c, key)}.")
    if c.same_bits and c.reduce_dtype != "float32":
        problems.append("same_bits needs reduce_dtype = 'float32': one process rounds no gradient"
                        " on its way to another.")
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", c.device):
        problems.append(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', found {c.device!r}.")
    if c.min_learning_rate > c.learning_rate:
        problems.append(f"min_learning_rate ({c.min_learning_rate}) must not be more than"
                        f" learning_rate ({c.learning_rate}).")
    # What follows divides by these numbers, so they must be in range first.
    problems = problems or check_heads(c) + check_data(c)
    if not problems and c.kernels == "triton" and c.head_dim not in (64, 128):
        problems.append(f"kernels = 'triton' has no attention for a head size of {c.head_dim}, only"
                        " for 64 and 128: take 'auto', which chooses what can.")
    return problems


def check_heads(c: ModelConfig) -> list[str]:
    """What is wrong with the sizes of the attention heads."""
    problems = []
    for whole, part in (("hidden_size", "num_attention_heads"),
                        ("num_attention_heads", "num_key_value_heads")):
        n, unit = getattr(c, whole), getattr(c, part)
        if n % unit:
            problems.append(f"{whole} ({n}) must be a multiple of {part} ({unit});"
                            f" {nearest(n, unit)}.")
    if not problems and c.head_dim % 2:
        problems.append(f"the head size, hidden_size / num_attention_heads = {c.head_dim}, must be"
                        " even: rotary positions turn pairs.")
    elif not problems and (c.rotary_dim % 2 or c.rotary_dim > c.head_dim):
        problems.append(f"rotary_dim must be even and at most the head size ({c.head_dim}),"
                        f" found {c.rotary_dim}.")
    return problems


def check_data(c: Config) -> list[str]:
    """What is wrong with the settings that say what the data is made of."""
    problems = []
    if c.sources and c.tokenized:
        problems.append("give sources (text) or tokenized (released chunks of ids), not both.")
    for key in ("source_weights", "source_halves", "max_source_bytes", "valid_documents",
                "fim_rates", "canaries"):
        if c.tokenized and getattr(c, key):
            problems.append(f"{key} is for text (sources), not for tokenized chunks.")
    for name in ("sources", "source_weights", "source_halves", "fim_rates"):
        for key in getattr(c, name):
            if not isinstance(key, str):
                problems.append(f"{name} must have names of sources as keys, found {key!r}.")
    longest = max(1024, c.seq_len)  # of a sample, which every checkpoint waits for
    if c.sample_tokens > longest:
        problems.append(f"sample_tokens must be at most {longest}, found {c.sample_tokens}.")
    for key, value in c.sources.items():
        if not isinstance(value, str):
            problems.append(f"sources[{key!r}] must be a path or glob, found {value!r}.")
    for key, value in c.source_weights.items():
        if not isinstance(value, (int, float)) or not 0 <= value <= 1e6:
            problems.append(f"source_weights[{key!r}] must be a number of 0 or more (at most 1e6),"
                            f" found {value!r}.")
    for key, value in c.source_halves.items():
        if value not in ("even", "odd"):
            problems.append(f"source_halves[{key!r}] must be 'even' or 'odd', found {value!r}.")
    rates = {f"fim_rates[{key!r}]": rate for key, rate in c.fim_rates.items()}
    for key, value in [*rates.items(), ("fim_spm_rate", c.fim_spm_rate)]:
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            problems.append(f"{key} must be a share between 0 and 1, found {value!r}.")
    for times, n in c.canaries.items():
        if type(times) is not int or type(n) is not int or times < 1 or n < 1:
            problems.append("canaries must be {times: sequences} of whole numbers, found"
                            f" {{{times!r}: {n!r}}}.")
    for chunk in c.skip_chunks:
        if type(chunk) is not int or not 0 <= chunk < c.n_chunks:
            problems.append(f"skip_chunks must hold numbers of chunks, 0 to {c.n_chunks - 1},"
                            f" found {chunk!r}.")
    if not re.fullmatch("bpe|(hf|llama|tiktoken|data):.+", c.tokenizer):
        problems.append('tokenizer must be "bpe", "hf:PATH", "tiktoken:NAME" or "data:DIR",'
                        f" found {c.tokenizer!r}.")
    return problems


# Where files are and what computes: a command's own, whatever run it looks at. All other settings
# decide what comes out.
PLACE = ("name", "data_dir", "run_dir", "device", "kernels", "resume", "init_from")


def with_recorded(config: Config, recorded: dict[str, Any]) -> Config:
    """A copy of a config with the settings that a run or a data set has recorded, all but PLACE;
    UserError if they cannot be used."""
    kinds, values, problems = {f.name: f.type for f in fields(Config)}, {}, []
    for name, value in recorded_settings(recorded).items():
        if name not in PLACE:
            set_value(values, name, value, kinds[name], "as recorded", problems)
    config = replace(config, **values)
    if problems := problems or check(config):
        raise UserError("The recorded settings cannot be used: " + "\n".join(problems))
    return config


def nearest(value: int, unit: int) -> str:
    """The multiples of `unit` on both sides of `value`, in words."""
    below, above = value // unit * unit, -(-value // unit) * unit
    return f"{above} would do" if not below else f"{below} or {above} would do"


def comments(Flags: type) -> dict[str, str]:
    """The comment behind each setting where it is declared: what `-h` prints cannot go stale."""
    found = {}
    for cls in (ModelConfig, Config, Flags):
        for line in inspect.getsource(cls).splitlines():
            # A setting is one line: name, type, default, and a comment that this takes whole.
            if match := re.match(r"    (\w+): [^=]+ = .*?  # (.*)", line):
                found[match[1]] = match[2]
    return found


def help_text(Flags: type) -> str:
    """The docstring of the running stage, its flags, and every setting, with their comments."""
    lines = [(getattr(sys.modules["__main__"], "__doc__", None) or "").strip()]
    said = comments(Flags)
    for title, cls in (("Flags of this stage:", Flags), ("Settings (defaults: Amber's):", Config)):
        lines += ["", title] if fields(cls) else []
        for f in fields(cls):
            # Dictionaries and lists have a factory, since a default must not be shared.
            default = f.default_factory() if callable(f.default_factory) else f.default
            lines += [f"  --{f.name}={default!r}", f"        {said[f.name]}"]
    return "\n".join(lines)


def check_torchrun(environ: Mapping[str, str]) -> None:
    """UserError unless torchrun's variables fit together; without RANK and WORLD_SIZE none counts.
    """
    # A process that is told of others, but not how to find them, would wait for them for ever.
    several = {"RANK", "WORLD_SIZE"} & environ.keys()
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    problems = [f"{name} is not set" for name in needed if several and name not in environ]
    for name in (*needed[:4], "TORCHELASTIC_RESTART_COUNT"):
        word = environ.get(name, "1")
        if not word.isdecimal() or word == "0" and name.endswith("SIZE"):
            problems.append(f"{name} is {word!r}")
    if several and not problems and int(environ["RANK"]) >= int(environ["WORLD_SIZE"]):
        problems.append("RANK must be less than WORLD_SIZE")
    if problems:
        raise UserError(f"In the environment {', '.join(problems)}: start several processes with"
                        " torchrun, and a single one without RANK and WORLD_SIZE.")


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run a stage's `main` on the command line's words, and end as a command should: what a person
    must know is one sentence and exit status 1, and only a bug leaves a traceback."""
    # A terminal that cannot show a letter shows a question mark.
    sys.stdout.reconfigure(errors="replace")
    try:
        check_torchrun(os.environ)
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        sentence = str(error)
    except KeyboardInterrupt:
        sentence = "Stopped. The same command goes on from what was finished."
    except BrokenPipeError:  # `| head`: nobody reads any more, and that is no fault
        # Python writes out what is left when it ends, and that must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if not (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)):
            raise
        # A full disk does not say which file it was about.
        sentence = f"{error.filename or 'A file could not be written'}: {error.strerror}."
    except Exception:
        traceback.print_exc()
        sentence = "This is a fault of the program: please report it, with the lines above."
    else:
        return
    if os.environ.get("RANK", "0") != "0" and "WORLD_SIZE" in os.environ:
        # Usually all processes have the same to say, and torchrun ends all when one has ended:
        # let the first one say it. What only this one knows is said after the wait.
        time.sleep(3)
        sentence = f"Process {os.environ['RANK']}: {sentence}"
    sys.exit(sentence)
