"""The one schema of all stages: `Config`, and `load`, which reads a file and the command line.

    config, flags = load(["configs/amber_tiny.py", "--learning_rate=1e-3"])

A config file is Python: plain assignments to the names below. The defaults are Amber's (LLM360
amber-train main.py and README), so `amber_7b.py` is almost empty. This module does not know torch.
"""

import ast
import difflib
import inspect
import json
import re
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any


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

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def width_scale(self) -> float:
        """muP: base width / width. The factor of the logits and of the hidden matrices'
        learning rate, its root that of their initial deviation (Yang et al. 2022, table 8)."""
        return self.base_hidden_size / self.hidden_size if self.base_hidden_size else 1.0

    @property
    def matmul_params(self) -> int:
        """Weights that every token is multiplied with: the blocks' matrices and the head."""
        d, kv = self.hidden_size, self.num_key_value_heads * self.head_dim
        block = 2 * d * d + 2 * d * kv + 3 * d * self.intermediate_size
        return self.num_hidden_layers * block + self.vocab_size * d

    @property
    def n_params(self) -> int:
        """Parameters of the network; a test holds this against the real one."""
        d, kv = self.hidden_size, self.num_key_value_heads * self.head_dim
        norms = (2 * self.num_hidden_layers + 1) * d * (2 if self.norm == "layernorm" else 1)
        biases = self.num_hidden_layers * (3 * d + 2 * kv + 2 * self.intermediate_size)
        lookup = 0 if self.tie_word_embeddings else self.vocab_size * d
        return self.matmul_params + lookup + norms + self.bias * biases

    def flops_per_token(self, seq_len: int) -> int:
        """Training FLOPs per token: 6 per matmul weight, 12 L T d of attention (PaLM, app. B)."""
        attention = 12 * self.num_hidden_layers * seq_len * self.hidden_size
        return 6 * self.matmul_params + attention


@dataclass
class Config(ModelConfig):
    """Every setting of the four stages."""

    # -- where things are
    name: str = ""  # name of the data and the run; "" = the config file's
    data_dir: str = ""  # prepared data; "" = data/NAME
    run_dir: str = ""  # checkpoints, metrics, results; "" = runs/NAME

    # -- prepare_data.py
    sources: dict = field(default_factory=dict)  # {"name": "path or glob"}; {} = the embedded text
    source_weights: dict = field(default_factory=dict)  # uses of a source: 0.5 = half, 2 = twice
    source_halves: dict = field(default_factory=dict)  # {"name": "even" or "odd" documents}
    max_source_bytes: int = 0  # text taken from each source, bytes; 0 = all of it
    canaries: dict = field(default_factory=dict)  # {times: n}: plant n random rows so many times
    tokenized: str = ""  # path or glob of Amber's released chunks, used instead of sources
    tokenized_valid: str = ""  # the same for held-out rows; without it there are none
    on_bad_row: str = "stop"  # a row or line that is not valid: "stop" | "skip" (and count)
    tokenizer: str = "bpe"  # "bpe" | "llama:PATH" | "tiktoken:NAME" | "data:DIR" = that data's
    crystal_tokens: bool = False  # ids for Crystal's 22 added tokens (infilling, files, chat)
    fim_rates: dict = field(default_factory=dict)  # {"name": share of its documents infilled}
    fim_spm_rate: float = 0.5  # of those, the share written suffix first
    seq_len: int = 2048  # tokens a row trains on; a row holds seq_len + 1 ids
    n_chunks: int = 360  # chunks of data = checkpoints kept
    rows_per_chunk: int = 0  # rows of a chunk at most; 0 = all there are
    valid_rows: int = 102_400  # rows held out of each source (at most, of tokenized_valid)
    valid_documents: int = 0  # hold out one whole document in so many, by hash; 0 = any rows
    workers: int = 0  # processes; 0 = one per core
    seed: int = 11111  # of the data order, the held-out rows and the initial weights

    # -- train.py: batch and schedule
    global_batch_size: int = 2240  # rows per optimizer step, over all processes
    micro_batch_size: int = 10  # rows per forward pass of one process
    learning_rate: float = 3e-4  # peak, reached after warmup_steps
    min_learning_rate: float = 3e-5  # at the last step
    lr_schedule: str = "cosine"  # "cosine" | "linear" | "constant", after the warm-up
    schedule_steps: int = 0  # optimizer steps of the schedule, warm-up too; 0 = the data's
    warmup_steps: int = 2000  # optimizer steps of linear warm-up from 0
    warmup_offset: int = 1  # added to the steps done; 0 = Amber's, whose first rate is 0
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
    activation_checkpointing: str = "none"  # computed again: "none" | "selective" | "full" block
    timeout_minutes: float = 15.0  # without progress for so long, a run ends and says who is stuck

    # -- train.py: a loss or gradient that is not finite
    on_nonfinite: str = "stop"  # "stop" | "skip_step" (no update) | "skip_chunk", as Amber
    make_up: bool = True  # train the first chunks again in place of those skipped, as Amber

    # -- train.py: validation, samples, checkpoints
    eval_interval: int = 762  # optimizer steps between validations; 0 = only at checkpoints
    eval_rows: int = 256  # held-out rows per source of one validation
    sample_prompt: str = "The"  # text continued at every checkpoint
    sample_tokens: int = 48  # tokens of that continuation; 0 = none
    resume: str = "auto"  # "auto" = go on if it can | "true" = it must | "false" | PATH
    init_from: str = ""  # checkpoint whose weights a new run begins with
    save_minutes: float = 30.0  # minutes between rolling checkpoints; 0 = none
    async_save: bool = True  # train on while a copy of the state is written
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


CHOICES = {
    "norm": ("rmsnorm", "layernorm"),
    "on_bad_row": ("stop", "skip"),
    "lr_schedule": ("cosine", "linear", "constant"),
    "dtype": ("auto", "bfloat16", "float32"),
    "kernels": ("auto", "triton", "torch"),
    "parallel": ("ddp", "fsdp", "hsdp"),
    "reduce_dtype": ("float32", "bfloat16"),
    "activation_checkpointing": ("none", "selective", "full"),
    "on_nonfinite": ("stop", "skip_step", "skip_chunk"),
}
POSITIVE = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    rms_norm_eps rope_theta initializer_range embedding_scale logit_scale seq_len n_chunks
    global_batch_size micro_batch_size learning_rate adam_eps grad_clip timeout_minutes
    eval_rows""".split()
# everything else that is a number may be 0, and nothing may be negative


def load(argv: list[str], **flags: Any) -> tuple[Config, dict[str, Any]]:
    """Read a config file and its `--key=value` overrides: `(config, flags)`.

    argv: `["configs/NAME.py", "--key=value", ...]`; flags: what this stage takes beside the
    settings, with defaults, e.g. `verify=False` for `--verify`. `-h` prints every setting.
    Raises SystemExit with all problems at once, one sentence each.
    """
    if "-h" in argv or "--help" in argv:
        print(help_text())
        raise SystemExit(0)
    config, known = Config(), {f.name: f.type for f in fields(Config)}  # name -> type
    paths = [a for a in argv if not a.startswith("-")]
    if len(paths) != 1:
        found = "none" if not paths else " and ".join(paths)
        raise SystemExit(f"Give one config file, like configs/amber_tiny.py: found {found}."
                         " (Settings are written --key=value; -h lists them.)")
    problems: list[str] = []
    given = read_file(paths[0])
    for key, value in given.items():
        if key not in known:
            problems.append(f"{paths[0]}: {unknown(key, known)}")
        else:
            set_value(config, key, value, known[key], paths[0], problems)
    for argument in argv:
        if not argument.startswith("-"):
            continue
        key, equals, text = argument.lstrip("-").partition("=")
        if key in flags:
            flags[key] = parse(text if equals else "true", type(flags[key]), argument, problems)
        elif key not in known:
            problems.append(f"command line: {unknown(key, [*known, *flags])}")
        elif not equals and known[key] is not bool:
            problems.append(f"command line: write --{key}=VALUE, in one word.")
        else:
            value = parse(text if equals else "true", known[key], argument, problems)
            set_value(config, key, value, known[key], "command line", problems)
    config.name = config.name or Path(paths[0]).stem
    config.data_dir = config.data_dir or f"data/{config.name}"
    config.run_dir = config.run_dir or f"runs/{config.name}"
    if not config.num_key_value_heads:
        config.num_key_value_heads = config.num_attention_heads
    if not problems:  # a range means nothing before the types are right
        problems = check(config)
    if problems:
        raise SystemExit("\n".join(problems))
    return config, flags


def read_file(path: str) -> dict[str, Any]:
    """The names a config file assigns; it runs in a namespace of its own."""
    try:
        source = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        near = ", ".join(sorted(str(p) for p in Path(__file__).parent.glob("[!_]*.py")))
        reason = getattr(error, "strerror", None) or "not a text file"
        raise SystemExit(f"Cannot read the config file {path}: {reason}. There are: {near}.")
    namespace: dict[str, Any] = {"__file__": path}
    try:
        exec(compile(source, path, "exec"), namespace)
    except Exception as error:
        line = getattr(error, "lineno", None)
        if line is None and error.__traceback__ and error.__traceback__.tb_next:
            line = error.__traceback__.tb_next.tb_lineno
        raise SystemExit(f"{path}, line {line}: {type(error).__name__}: {error}.")
    return {key: value for key, value in namespace.items()
            if not key.startswith("_") and not isinstance(value, ModuleType)}


def unknown(key: str, known: Any) -> str:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "-h lists them."
    return f"there is no setting {key!r}; {hint}"


def parse(text: str, kind: type, argument: str, problems: list[str]) -> Any:
    """The value of `--key=text` for a setting of type `kind`."""
    if kind is str:
        return text
    if kind is bool:
        text = {"true": "True", "false": "False"}.get(text.lower(), text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        problems.append(f"command line: {argument}: expected a value of type {kind.__name__},"
                        f" found {text!r}.")
        return kind()


def set_value(config: Config, key: str, value: Any, kind: type, where: str,
              problems: list[str]) -> None:
    """Set a field if the value has its type (a whole number will do for a float)."""
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        problems.append(f"{where}: {key} must be of type {kind.__name__}, found {value!r}"
                        f" ({type(value).__name__}).")
    else:
        setattr(config, key, value)


def check(c: Config) -> list[str]:
    """Everything wrong with the values of a config, one sentence each."""
    problems = [f"{key} must be one of {', '.join(map(repr, allowed))}, found {getattr(c, key)!r}."
                for key, allowed in CHOICES.items() if getattr(c, key) not in allowed]
    for f in fields(c):
        value = getattr(c, f.name)
        if f.type in (int, float):
            if not 0 <= value < float("inf"):
                problems.append(f"{f.name} must be 0 or more and finite, found {value}.")
            elif value == 0 and f.name in POSITIVE:
                problems.append(f"{f.name} must be more than 0.")
    if problems:
        return problems
    for key in ("adam_beta1", "adam_beta2"):
        if getattr(c, key) >= 1:
            problems.append(f"{key} must be less than 1, found {getattr(c, key)}.")
    if c.min_learning_rate > c.learning_rate:
        problems.append(f"min_learning_rate ({c.min_learning_rate}) must not be more than"
                        f" learning_rate ({c.learning_rate}).")
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
    if c.sources and c.tokenized:
        problems.append("give sources (text) or tokenized (released rows of ids), not both.")
    problems += [f"sources[{key!r}] must be a path or glob, found {value!r}."
                 for key, value in c.sources.items() if not isinstance(value, str)]
    problems += [f"source_weights[{key!r}] must be a number of 0 or more, found {value!r}."
                 for key, value in c.source_weights.items()
                 if not isinstance(value, (int, float)) or not 0 <= value < float("inf")]
    problems += [f"{key} is for text (sources), not for tokenized rows."
                 for key in ("source_halves", "valid_documents", "fim_rates")
                 if c.tokenized and getattr(c, key)]
    problems += [f"source_halves[{key!r}] must be 'even' or 'odd', found {value!r}."
                 for key, value in c.source_halves.items() if value not in ("even", "odd")]
    problems += [f"{key} must be a share between 0 and 1, found {value!r}."
                 for key, value in (*((f"fim_rates[{name!r}]", rate) for name, rate in
                                      c.fim_rates.items()), ("fim_spm_rate", c.fim_spm_rate))
                 if not isinstance(value, (int, float)) or not 0 <= value <= 1]
    if any(type(n) is not int or n < 1 for pair in c.canaries.items() for n in pair):
        problems.append(f"canaries must be {{times: rows}} of whole numbers, found {c.canaries}.")
    if c.canaries and c.tokenized:
        problems.append("canaries can be planted in text (sources), not in tokenized rows.")
    if not re.fullmatch("bpe|(llama|tiktoken|data):.+", c.tokenizer):
        problems.append('tokenizer must be "bpe", "llama:PATH", "tiktoken:NAME" or "data:DIR",'
                        f" found {c.tokenizer!r}.")
    return problems


def nearest(value: int, unit: int) -> str:
    """The multiples of `unit` on both sides of `value`, in words."""
    below, above = value // unit * unit, -(-value // unit) * unit
    return f"{above} would do" if not below else f"{below} or {above} would do"


def comments() -> dict[str, str]:
    """The comment behind each setting in this very file: what `-h` prints cannot go stale."""
    found = {}
    for cls in (ModelConfig, Config):
        for line in inspect.getsource(cls).splitlines():
            if match := re.match(r"    (\w+): [^=]+ = .*?  # (.*)", line):
                found[match[1]] = match[2]
    return found


def help_text() -> str:
    """The docstring of the running stage, and every setting with its default and comment."""
    stage = (getattr(sys.modules["__main__"], "__doc__", None) or "").strip()
    default, said = Config(), comments()
    rows = [f"  --{f.name}={getattr(default, f.name)!r}\n        {said[f.name]}"
            for f in fields(Config)]
    return "\n".join([stage, "", "Settings, with their defaults (Amber's):", *rows])
