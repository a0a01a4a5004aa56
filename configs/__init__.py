"""The one schema of all stages: `Config`, and `load`, which reads a file and the command line.

    config, flags = load(["configs/amber_tiny.py", "--learning_rate=1e-3"], Flags)

A config file is Python: plain assignments to the names below. Most defaults are Amber's (LLM360
amber-train main.py and README), so `amber_7b.py` is almost empty. This module does not know torch.
"""

import ast
import difflib
import errno
import inspect
import json
import math
import os
import re
import runpy
import signal
import stat
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Literal, get_args, get_origin

from tqdm import tqdm


class UserError(Exception):
    """One sentence for a person: what it is about, what was expected, what was found and what to
    do. `run_command` prints it; any other exception is a bug and keeps its traceback."""


def regular(path: str | Path) -> Path:
    """The path, unless it is a pipe or a device, where reading may never end: OSError."""
    if Path(path).exists() and not Path(path).is_file():
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return Path(path)


def read_regular(path: str | Path) -> bytes:
    """The bytes of a regular file; OSError if it cannot be read."""
    return regular(path).read_bytes()


def open_ours(path: Path, how: Literal["new", "append", "lock"] = "new") -> BinaryIO:
    """Open a file of a run or a data set for writing; all of them are opened here. In a stranger's
    directory train.log may be a link to ~/.bashrc: a link, a pipe or a device is replaced."""
    there = path.lstat() if os.path.lexists(path) else None
    if there and (how == "new" or not stat.S_ISREG(there.st_mode)):
        path.unlink()
    elif there and how == "append" and there.st_nlink > 1:
        # A second name of a file of another run, as `cp -al` makes: that one must not grow.
        with open_ours(path.with_name(f"{path.name}.tmp")) as copy:
            copy.write(path.read_bytes())
        os.replace(copy.name, path)
    flags = {"new": os.O_EXCL, "append": os.O_APPEND, "lock": 0}[how]
    return open(path, "r+b", -1 if how == "new" else 0, opener=lambda name, _: os.open(
        name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | flags, 0o666))


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
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # LayerNorm has a bias
    bias: bool = False  # biases beside every matrix of a block
    rotary_dim: int = 0  # dimensions of a head that are rotated; 0 = all
    rotary_interleaved: bool = False  # pairs are (2i, 2i + 1); false = (i, i + rotary_dim / 2)
    attention_scale_power: float = 0.5  # q k is divided by the head size to this power; muP: 1
    embedding_scale: float = 1.0  # factor of the embeddings
    logit_scale: float = 1.0  # factor of the logits, beside the width scale
    base_hidden_size: int = 0  # muP: the width the rates were found at; 0 = no muP
    init_truncated: bool = False  # initial weights truncated at ±2 standard deviations
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
    sources: dict = field(default_factory=dict)  # {"name": "path or glob of text"}
    text_field: str = "text,content"  # of .jsonl and .parquet: the first of these that has text
    source_weights: dict = field(default_factory=dict)  # uses of a source: 0.5 = half, 2 = twice
    source_halves: dict = field(default_factory=dict)  # {"name": "even" or "odd" documents}
    max_source_bytes: int = 0  # text taken from each source, bytes; 0 = all of it
    tokenized: str = ""  # path or glob of Amber's released chunks, used instead of sources
    tokenized_valid: str = ""  # the same for validation; without it there is none
    on_bad_line: Literal["stop", "skip"] = "stop"  # of input that is not valid
    tokenizer: str = "bpe"  # "bpe" | "hf:PATH" of a tokenizer.json | "data:DIR"
    crystal_tokens: bool = False  # ids for Crystal's 22 added tokens (infilling, files, chat)
    fim_rates: dict = field(default_factory=dict)  # {"name": share of its documents infilled}
    fim_spm_rate: float = 0.5  # of those, the share written suffix first
    seq_len: int = 2048  # tokens a sequence trains on; it holds seq_len + 1 ids
    n_chunks: int = 360  # chunks of data = checkpoints kept
    sequences_per_chunk: int = 0  # sequences of a chunk at most; 0 = all there are
    valid_sequences: int = 102_400  # of each source, for validation; at most, if valid_documents
    valid_documents: int = 0  # hold out 1 of N whole documents, by hash; 0 = random sequences
    workers: int = 0  # processes; 0 = one per core
    seed: int = 11111  # of the data order, the validation sequences and the initial weights
    init_seed: int = 0  # of the initial weights alone; 0 = seed

    # -- train.py: batch and schedule
    global_batch_size: int = 2240  # sequences per optimizer step, over all processes
    micro_batch_size: int = 10  # sequences per forward pass of one process
    learning_rate: float = 3e-4  # peak, reached after warmup_steps
    min_learning_rate: float = 3e-5  # where "cosine" and "linear" end; "constant" ignores it
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after the warm-up
    schedule_steps: int = 0  # optimizer steps of the schedule, warm-up too; 0 = the data's
    warmup_steps: int = 2000  # optimizer steps of linear warm-up from 0
    warmup_offset: int = 1  # added to the steps done; 0 = Amber's, whose first rate is 0
    epochs: int = 1  # passes through all chunks, each shuffled differently
    max_steps: int = 0  # stop after so many optimizer steps, schedule unchanged; 0 = all the data
    profile_step: int = 0  # RUN_DIR/trace.json gets the times of this step's operations; 0 = none

    # -- train.py: optimizer (AdamW)
    adam_beta1: float = 0.9  # decay of the mean gradient
    adam_beta2: float = 0.95  # decay of the mean squared gradient
    adam_eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # on every parameter, norms and embeddings too, as Amber
    grad_clip: float = 1.0  # global gradient norm at most

    # -- train.py: the machine
    device: str = "auto"  # "auto" | "cpu" | "cuda" | "cuda:1"; auto = cuda where there is one
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the arithmetic; weights are float32
    kernels: Literal["auto", "triton", "torch"] = "auto"  # auto = Triton on CUDA
    compile: bool = False  # torch.compile the blocks; pays for runs longer than a few minutes
    threads: int = 0  # CPU threads of torch; 0 = one per core
    deterministic: bool = False  # on a GPU: same bits in every run, slower; a CPU's are anyway
    peak_tflops: float = 0.0  # of one device (A100: 312, H100: 989), for MFU in metrics.jsonl

    # -- train.py: many processes (torchrun)
    parallel: Literal["ddp", "fsdp", "hsdp"] = "fsdp"  # hsdp: fsdp in groups, ddp across
    shard_size: int = 0  # hsdp: processes of a group; 0 = those of a node
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  # of gradients between processes
    same_bits: bool = False  # fixed reduction order: same bits for any number of processes; fsdp
    activation_checkpointing: Literal["none", "full"] = "none"  # full: only a block's input is kept
    timeout_minutes: float = 15.0  # longest collective; between GPUs a third, after the first step

    # -- train.py: a loss or gradient that is not finite
    on_nonfinite: Literal["stop", "skip_step"] = "stop"  # skip_step leaves out that step's update
    skip_chunks: list = field(default_factory=list)  # left out; the first chunks are repeated

    # -- train.py: validation, samples, checkpoints
    eval_interval: int = 762  # optimizer steps between validations; 0 = only at checkpoints
    eval_sequences: int = 256  # sequences per source of one validation
    sample_prompt: str = "The"  # text continued at every checkpoint
    sample_tokens: int = 48  # tokens of that continuation; 0 = none
    init_from: str = ""  # checkpoint whose weights a new run begins with
    save_minutes: float = 30.0  # minutes between rolling checkpoints; 0 = none
    keep_rolling: int = 1  # rolling checkpoints kept
    keep_train_state: int = 2  # newest checkpoints that keep their optimizer state; 0 = all

    # -- eval.py
    task_dir: str = "tasks"  # benchmark files: TASK_DIR/NAME/SPLIT.jsonl or SPLIT*.parquet
    tasks: str = ""  # of them, "name,name"; "" = our own two and all that task_dir has

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_len


# The numbers that must be more than 0. Any other may be 0, often with a meaning of its own ("0 =
# all"), and none may be negative.
POSITIVE = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    rms_norm_eps rope_theta initializer_range embedding_scale logit_scale seq_len n_chunks
    global_batch_size micro_batch_size learning_rate epochs adam_eps grad_clip timeout_minutes
    eval_sequences k l batch world_size""".split()
# Paths and devices come from the command, never from a recorded config. All other settings decide
# the result, so the recorded ones are used.
PLACE = ("name", "data_dir", "run_dir", "device", "kernels", "init_from")


@dataclass
class NoFlags:
    """For a stage that takes nothing but the settings."""


def load(argv: list[str], Flags: type = NoFlags) -> tuple[Config, Any]:
    """Read a config and its `--key=value` overrides: `(config, flags)`.

    argv: `["configs/NAME.py", "--key=value", ...]`. A run directory in place of the file gives the
    settings that the run was trained with. Flags: a dataclass of what this stage takes beside the
    settings, a comment for each; `flags` is one of these. `-h` prints all of them and exits.
    Raises UserError with the first problem.
    """
    # f.type is the class int and not the word "int", unless this file imports `annotations`.
    settings = {f.name: f.type for f in fields(Config)}
    flags = {f.name: f.type for f in fields(Flags)}
    paths, given = [], {}
    asks_for_help = "-h" in argv or "--help" in argv
    for word in argv:
        key, equals, text = word.lstrip("-").partition("=")
        if not word.startswith("-"):
            paths.append(word)
        elif word not in ("-h", "--help"):
            kind = kind_of(key, settings | flags, "command line")
            if not equals and kind is not bool:
                raise UserError(f"command line: write --{key}=VALUE, in one word.")
            given[key] = typed(key, parse(text if equals else "true", kind), kind, "command line")
    if len(paths) != 1 and not (asks_for_help and not paths):
        raise UserError(f"Give one config file or run directory, like configs/amber_tiny.py or"
                        f" runs/amber_tiny: found {' and '.join(paths) or 'none'}. (Settings are"
                        " written --key=value; -h lists them.)")
    values: dict[str, Any] = {}
    for key, value in (read_config(paths[0]) if paths else {}).items():
        values[key] = typed(key, value, kind_of(key, settings, paths[0]), paths[0])
    values |= given
    config = Config(**{key: value for key, value in values.items() if key in settings})
    chosen = Flags(**{key: value for key, value in values.items() if key in flags})
    if paths:  # data and run are found by the config's name unless it names other places
        config.name = config.name or Path(paths[0]).stem
        config.data_dir = config.data_dir or f"data/{config.name}"
        config.run_dir = config.run_dir or f"runs/{config.name}"
    check(config)
    check_numbers(chosen)
    if asks_for_help:
        print(help_text(chosen))
        sys.exit(0)
    return config, chosen


def read_config(path: str) -> dict[str, Any]:
    """The names that a config file assigns, or the settings that a run directory has recorded."""
    if Path(path).is_dir():
        try:
            recorded = json.loads(read_regular(Path(path, "config.json")))
            recorded["run_dir"]  # a checkpoint's config.json describes the network alone
        except (OSError, ValueError, TypeError, KeyError):
            raise UserError(f"{path} is not the directory of a run: it has no config.json as"
                            " train.py writes it. (Checkpoints are named by --checkpoints=PATH.)")
        # A run may have been moved, and to a machine with another device. What else it says of
        # places may be a stranger's choice, and is only read: prepare_data.py takes no run.
        names = {f.name for f in fields(Config)} - {"device", "kernels"}
        return {key: recorded[key] for key in names & recorded.keys()} | {"run_dir": path}
    if not Path(path).is_file():
        near = ", ".join(sorted(os.path.relpath(p) for p in Path(__file__).parent.glob("[!_]*.py")))
        raise UserError(f"There is no config file or run directory {path}. Configs: {near}.")
    # A config is a program, so that one can build on another. It is the user's own, and may run.
    namespace = runpy.run_path(path)
    # It may import modules and keep helpers under names with _: these are no settings.
    return {key: value for key, value in namespace.items()
            if not key.startswith("_") and not isinstance(value, ModuleType)}


def with_recorded(config: Config, recorded: dict[str, Any]) -> Config:
    """A copy of a config with the settings, all but PLACE, that a run or a data set has recorded.
    UserError if one of them cannot be used."""
    values = {}
    for f in fields(Config):
        if f.name in recorded and f.name not in PLACE:
            values[f.name] = typed(f.name, recorded[f.name], f.type, "as recorded")
    config = replace(config, **values)
    check(config)
    return config


def kind_of(key: str, kinds: dict[str, Any], where: str) -> Any:
    """The type of a setting; UserError if there is no setting of that name."""
    if key in kinds:
        return kinds[key]
    # Three kinds of slip: lr for learning_rate, warmup for warmup_steps, lrate.
    near = [name for name in kinds if key == "".join(word[0] for word in name.split("_"))]
    near += [name for name in kinds if key and key in name]
    near += difflib.get_close_matches(key, kinds, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join([*dict.fromkeys(near)][:2])}? " if near else ""
    raise UserError(f"{where}: there is no setting {key!r}; {hint}-h lists all of them.")


def parse(text: str, kind: Any) -> Any:
    """The value of `--key=text`; text that does not parse is returned, and `typed` rejects it."""
    if kind is str or get_origin(kind) is Literal:
        return text
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    # Numbers, lists and dictionaries as Python writes them; literal_eval runs no code.
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def typed(key: str, value: Any, kind: Any, where: str) -> Any:
    """The value, if it has its setting's type; an int is accepted for a float."""
    if kind is float and type(value) is int:
        value = float(value)
    if get_origin(kind) is Literal:
        fits, expected = value in get_args(kind), f"one of {', '.join(map(repr, get_args(kind)))}"
    else:  # exact types: to Python True is an int
        fits, expected = type(value) is kind, f"of type {kind.__name__}"
    if not fits:
        raise UserError(f"{where}: {key} must be {expected}, found {value!r}.")
    return value


def check_numbers(values: Any) -> None:
    """UserError with the first number of a dataclass that is out of range."""
    for f in fields(values):
        value = getattr(values, f.name)
        if f.type in (int, float) and not 0 <= value < math.inf:
            raise UserError(f"{f.name} must be 0 or more and finite, found {value}.")
        if f.name in POSITIVE and value == 0:
            raise UserError(f"{f.name} must be more than 0.")


def check(c: Config) -> None:
    """UserError with the first value that is out of range or does not fit the others."""
    check_numbers(c)

    def is_number(value: Any, most: float) -> bool:
        return type(value) in (int, float) and 0 <= value <= most

    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
    text_only = "source_weights source_halves max_source_bytes valid_documents fim_rates"
    rules = [
        # A slip, or a stranger's config.json, must not make tensors for hours.
        *((getattr(c, key) <= 2**24, key, "at most 2**24") for key in (
            "vocab_size", "hidden_size", "intermediate_size", "seq_len", "n_chunks", "epochs")),
        (c.num_hidden_layers <= 10_000, "num_hidden_layers", "at most 10,000"),
        (c.hidden_size % heads == 0, "hidden_size", f"a multiple of num_attention_heads ({heads})"),
        (heads % kv_heads == 0, "num_key_value_heads", f"a divisor of the {heads} query heads"),
        (c.head_dim % 2 == 0, "hidden_size", f"an even multiple of num_attention_heads ({heads}),"
         " because rotary positions rotate pairs"),
        (c.rotary_dim % 2 == 0 and c.rotary_dim <= c.head_dim, "rotary_dim",
         f"even and at most the head size ({c.head_dim})"),
        (c.kernels != "triton" or c.head_dim in (64, 128), "kernels",
         f"'auto' or 'torch': Triton's attention has head sizes 64 and 128, and not {c.head_dim}"),
        *((getattr(c, key) < 1, key, "less than 1") for key in ("adam_beta1", "adam_beta2")),
        (c.min_learning_rate <= c.learning_rate, "min_learning_rate",
         f"at most learning_rate ({c.learning_rate})"),
        (not c.same_bits or c.reduce_dtype == "float32", "reduce_dtype",
         "'float32' with same_bits: a single process does not round its gradients"),
        (not c.same_bits or c.parallel == "fsdp", "parallel",
         "'fsdp' with same_bits: the order is kept in FSDP's sums"),
        (re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", c.device), "device",
         "'auto', 'cpu', 'cuda' or 'cuda:N'"),
        (re.fullmatch("bpe|(hf|data):.+", c.tokenizer), "tokenizer",
         "'bpe', 'hf:PATH' or 'data:DIR'"),
        (c.sample_tokens <= max(1024, c.seq_len), "sample_tokens", "at most 1024, or seq_len"),
        (not (c.sources and c.tokenized), "tokenized",
         "empty where sources are given: data is made of text or of released chunks"),
        *((not (c.tokenized and getattr(c, key)), key, "left out with tokenized chunks: it is for"
           " text") for key in text_only.split()),
        (len(c.sources) <= 256 and {*map(type, [*c.sources, *c.sources.values()])} <= {str},
         "sources", "{'name': 'path or glob'}, 256 at most"),
        (all(is_number(w, 1e6) for w in c.source_weights.values()), "source_weights",
         "{'name': number from 0 to 1e6}"),
        (all(half in ("even", "odd") for half in c.source_halves.values()), "source_halves",
         "{'name': 'even' or 'odd'}"),
        (all(is_number(rate, 1) for rate in c.fim_rates.values()), "fim_rates",
         "{'name': share from 0 to 1}"),
        (all(type(i) is int and 0 <= i < c.n_chunks for i in c.skip_chunks), "skip_chunks",
         f"a list of chunks, 0 to {c.n_chunks - 1}"),
    ]
    for fits, key, expected in rules:
        if not fits:
            raise UserError(f"{key} must be {expected}, found {getattr(c, key)!r}.")


def help_text(flags: Any) -> str:
    """The docstring of the running stage, and the declarations of its flags and of all settings."""
    lines = [(getattr(sys.modules["__main__"], "__doc__", None) or "").strip(), "",
             "Written --NAME=VALUE; listed as NAME: type = default  # what it is"]
    for cls in (type(flags), ModelConfig, Config):
        lines += ["", *re.findall(r"^    (\w+: .+#.*|# -- .*)$", inspect.getsource(cls), re.M)]
    return "\n".join(lines)


def progress(items: Iterable | None, what: str, total: float | None = None, **how: Any) -> tqdm:
    """A progress bar over items. Where the output is no terminal it is a line every half minute,
    with the time left; of torchrun's processes the first alone has one."""
    if not sys.stderr.isatty():
        how |= {"bar_format": "{desc}: {n_fmt} of {total_fmt}, {remaining} left\n",
                "miniters": 1, "mininterval": 30, "delay": 30}
    return tqdm(items, what, total, leave=False, disable=os.environ.get("RANK", "0") != "0", **how)


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run a stage's `main` on the words of the command line. What a person can act on is printed
    as one sentence, with exit status 1; any other exception keeps its traceback."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # a shell's >&- has closed it
            setattr(sys, name, open(os.devnull, "w"))
    # A terminal that cannot show a letter shows a question mark.
    sys.stdout.reconfigure(errors="replace")
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
        # Not after an error, when other processes may wait in a collective for this one to end.
        if (dist := sys.modules.get("torch.distributed")) and dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command goes on from what was finished.")
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        # With --max-restarts torchrun would begin again, and come to the same.
        if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and os.getppid() > 1:
            os.kill(os.getppid(), signal.SIGTERM)
        sys.exit(1)
    except OSError as error:
        if error.filename:
            sys.exit(f"{error.filename}: {error.strerror}.")
        if error.errno == errno.ENOSPC:
            print(f"The output cannot be written: {error.strerror}.", file=sys.stderr)
        elif error.errno != errno.EPIPE:  # else the reader of a pipe, such as `head`, has ended
            raise
        os._exit(1)  # without the flush at Python's exit, which would fail once more
