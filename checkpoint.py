"""A checkpoint is a Hugging Face directory, with the state of training beside the weights.

    runs/NAME/ckpt_007/
      config.json  generation_config.json  tokenizer.json  tokenizer_config.json
      model.safetensors       float32; N processes write model-00001-of-0000N.safetensors ... and
                              an index
      train_state/            AdamW's moments in the same format, and state.json
      manifest.json           written last: step, chunk, settings, sha256 of each tensor and file

`AutoModelForCausalLM.from_pretrained("runs/NAME/ckpt_007")` opens it as it is, and every stage here
opens a directory that others have published. Nothing that is loaded is a pickle, so a stranger's
checkpoint cannot run his code. Below: reading, writing, listing, and measuring each of them once.
"""

import contextlib
import functools
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from configs import Config, ModelConfig, UserError, check, read_regular, regular
from data import (
    MARK,
    Data,
    begin_unfinished,
    has_form,
    is_count,
    is_inside,
    is_number,
    is_unfinished,
    read_json,
    remove_unfinished,
    sha256_file,
    sha256_json,
    write_json,
)
from model import (
    LLaMA,
    build_for_inference,
    choose_kernels,
    copy_into_shard,
    is_hidden,
)
from parallel import all_gather_object, on_rank_zero, rank, world_size
from tokenizer import Tokenizer, open_tokenizer

FORMAT = 2  # format 1 was torch.distributed.checkpoint's, whose metadata is a pickle
# ckpt_007 is the checkpoint at the end of a chunk, step_0000123 a rolling one in between.
NAME = re.compile(r"ckpt_\d{3,}|step_\d{7,}")
TYPES = {"F64": torch.float64, "F32": torch.float32,  # in safetensors' words
         "F16": torch.float16, "BF16": torch.bfloat16}


# ---------------------------------------------------------------------------------------------
# safetensors: eight bytes of length, a JSON header of that length, raw numbers


def write_safetensors(path: Path, tensors: list[tuple[str, Tensor]]) -> dict[str, str]:
    """Write float32 tensors on the host to a file; returns the sha256 of each tensor's bytes."""
    # The header comes first and says where every tensor lies, so sizes are added up before.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that every number lies at a multiple of its size
    hashes = {}
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            raw = tensor.numpy().data.cast("B") if tensor.numel() else b""
            f.write(raw)
            hashes[name] = sha256(raw).hexdigest()
        f.flush()
        os.fsync(f.fileno())
    return hashes


def read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a file, mapped: only what is copied out of a tensor is read from the disk.

    Raises ValueError if the header does not describe this file.
    """
    size = path.stat().st_size
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise ValueError("it is not a safetensors file")
        header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    # Mode "c" is copy-on-write: torch warns of arrays that it may not write to, and nothing that is
    # written to this one reaches the file.
    data = torch.from_numpy(np.memmap(path, np.uint8, "c", offset=8 + length)) \
        if size > 8 + length else torch.empty(0, dtype=torch.uint8)
    # Every byte belongs to one tensor: what overlaps, or lies between them, nobody has meant.
    spans = sorted(entry["data_offsets"] for entry in header.values())
    if [0, *(end for _, end in spans)] != [*(begin for begin, _ in spans), len(data)]:
        raise ValueError("its tensors overlap, leave gaps, or are cut short")
    for name, entry in header.items():
        if entry["dtype"] not in TYPES:
            raise ValueError(f"{name} is of type {entry['dtype']}")
        dtype, shape, (begin, end) = TYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != end - begin:
            raise ValueError(f"{name} of shape {shape} does not have {end - begin} bytes")
        raw = data[begin:end]
        if (8 + length + begin) % dtype.itemsize:  # another writer may not have aligned it
            raw = raw.clone()
        yield name, raw.view(dtype).view(shape)


def read_tensors(directory: Path, stem: str = "model") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all files of a directory: STEM*.safetensors or, as some have published
    theirs, pytorch_model*.bin. Raises UserError with the file that cannot be read."""
    for pattern in (f"{stem}*.safetensors", "pytorch_model*.bin"):
        # `file` is what the error below names: the index at first, then the file being read.
        file = index = directory / f"{pattern.replace('*', '')}.index.json"
        try:
            names = {path.name for path in directory.glob(pattern)}
            if index.exists():
                names = set(json.loads(read_regular(index))["weight_map"].values())
            for name in sorted(names):
                file = regular(directory / Path(name).name)  # an index names no place but its own
                if name.endswith(".bin"):
                    # weights_only: PyTorch's own unpickler, which builds tensors and nothing else
                    yield from torch.load(file, "cpu", mmap=True, weights_only=True).items()
                else:
                    yield from read_safetensors(file)
        except UserError:
            raise
        except Exception as error:  # damaged files raise all kinds
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise UserError(f"{file} cannot be read ({reason.splitlines()[0]}): is it whole?")
        if names:
            return
    raise UserError(f"{directory} has no weights: neither {stem}*.safetensors nor"
                    " pytorch_model*.bin.")


# ---------------------------------------------------------------------------------------------
# config.json, ours and others'

# What transformers' LLaMA can be told, and the parameters that it has. A model that has another
# setting or another parameter is not called a LLaMA.
LLAMA_SETTINGS = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads rms_norm_eps rope_theta tie_word_embeddings initializer_range""".split()
LLAMA_PARAMETERS = re.compile(
    r"(model\.(embed_tokens|norm)|lm_head|model\.layers\.\d+\.((input|post_attention)_layernorm"
    r"|self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj))\.weight")
# These decide the weights at the beginning of training, and nothing once there are weights.
INITIAL = ("initializer_range", "init_truncated", "init_by_depth")


def is_llama(model: LLaMA) -> bool:
    """Whether transformers' LLaMA has the settings and the parameters that this model has."""
    # Every setting that transformers' LLaMA does not know must have its default. LLAMA_SETTINGS
    # lists those it knows, so that a setting added tomorrow is looked at though nobody lists it.
    default, c = ModelConfig(), model.config
    settings = all(getattr(c, f.name) == getattr(default, f.name) for f in fields(ModelConfig)
                   if f.name not in LLAMA_SETTINGS)
    return settings and all(LLAMA_PARAMETERS.fullmatch(name) for name, _ in
                            model.named_parameters())


def hugging_face_config(model: LLaMA, eos_id: int) -> dict[str, Any]:
    """config.json of a model: LLaMA's where it is one, and else all our settings by their names."""
    c = model.config
    settings = {f.name: getattr(c, f.name) for f in fields(ModelConfig)}
    if is_llama(model):
        kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        settings = {name: settings[name] for name in LLAMA_SETTINGS}
    elif c.norm == "layernorm":
        kind = {"architectures": ["CrystalCoderLMHeadModel"], "model_type": "crystalcoder"}
    else:  # for this code alone
        kind = {"model_type": "amber-variant"}
    # No BOS, said outright: transformers would take LLaMA's id 1.
    return kind | settings | {"max_position_embeddings": c.seq_len, "hidden_act": "silu",
                              "bos_token_id": None, "eos_token_id": eos_id,
                              "torch_dtype": "float32"}


def read_network(directory: Path) -> ModelConfig:
    """The network that a directory's config.json describes; UserError if it is not one of ours."""
    said = read_json(directory / "config.json")
    try:
        theirs = our_settings(directory, said)
    except (TypeError, ValueError, AttributeError) as error:  # JSON can be anything
        raise UserError(f"{directory} cannot be loaded: its config.json does not have the form of"
                        f" one ({error}).")
    for f in fields(ModelConfig):
        # JSON has one kind of number.
        if f.type is float and type(theirs.get(f.name)) is int:
            theirs[f.name] = float(theirs[f.name])
        if f.name in theirs and type(theirs[f.name]) is not f.type:
            raise UserError(f"{directory} cannot be loaded: {f.name} in its config.json is"
                            f" {theirs[f.name]!r}.")
    if problems := check(Config(**theirs)):
        raise UserError(f"{directory} cannot be loaded: {' '.join(problems)}")
    return ModelConfig(**theirs)


def our_settings(directory: Path, said: dict[str, Any]) -> dict[str, Any]:
    """What a config.json says, by our names; what it does not say has our default, LLaMA's."""
    kind = said.get("model_type", "llama" if said else "")
    if kind == "llama":
        rope = said.get("rope_parameters") or said.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if (rope_type, said.get("hidden_act", "silu")) != ("default", "silu"):
            raise UserError(f"{directory} cannot be loaded: its config.json says rope_type"
                            f" {rope_type!r} and hidden_act {said.get('hidden_act')!r}.")
        theirs = {name: said[name] for name in LLAMA_SETTINGS if said.get(name) is not None}
        return theirs | ({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {})
    if kind == "crystalcoder" and "n_embd" in said:  # LLM360's own file, in GPT-2's names
        return from_crystal_config(said)
    if kind in ("crystalcoder", "amber-variant"):
        return {f.name: said[f.name] for f in fields(ModelConfig) if f.name in said}
    raise UserError(f"{directory} cannot be loaded: " + (
        f"it is a model of type {kind!r}, and only 'llama' and 'crystalcoder' are known."
        if said else "its config.json cannot be read."))


def config_problems(c: ModelConfig, directory: Path) -> list[str]:
    """What a directory's config.json says otherwise than `c`, one phrase each."""
    theirs, problems = read_network(directory), []
    for f in fields(ModelConfig):
        said, ours = getattr(theirs, f.name), getattr(c, f.name)
        # As float32: others write 9.999999974752427e-07 for 1e-6.
        same = np.float32(said) == np.float32(ours) if f.type is float else said == ours
        if f.name not in INITIAL and not same:
            problems.append(f"{f.name} is {said!r} there, {ours!r} here")
    return problems


def with_network(config: Config, path: Path, data: Data | None = None) -> Config:
    """A config with the network of a published directory, which says itself what it is; for a
    checkpoint of ours the config as it is, which must fit it. UserError if the published model
    shall read data that was made with another tokenizer than its own."""
    if not is_published(path):
        return config
    if data and (path / "tokenizer.json").exists():
        # A few kinds of text are enough: tokenizers that agree on all of these are the same.
        text = "The quick brown fox: été, 漢字, 12 345\n\tx = [1]"
        if list(open_tokenizer(path).encode(text)) != list(data.tokenizer.encode(text)):
            raise UserError(f"{data.directory} was made with another tokenizer than {path} has: its"
                            " ids mean nothing to these weights. (eval.py --text and --prompt need"
                            " no data.)")
    return replace(config, **asdict(read_network(path)))


# LLM360/CrystalCoder has GPT-2's names, c_fc2 for the gate: so say the index of its weights and
# LLM360's conversion of them (crystalcoder-train, finetune/Megatron-LM). Its modeling file is on
# the hub alone: that its weights give the same text here has not been tried.
CRYSTAL_NAMES = {
    "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
    "self_attn.q_proj": "attn.c_attn", "self_attn.k_proj": "attn.c_attn",
    "self_attn.v_proj": "attn.c_attn", "self_attn.o_proj": "attn.c_proj",
    "mlp.gate_proj": "mlp.c_fc2", "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}


def from_crystal_config(said: dict[str, Any]) -> dict[str, Any]:
    """Our settings of the network that LLM360's config.json of CrystalCoder describes."""
    names = {"hidden_size": "n_embd", "intermediate_size": "n_inner",
             "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
             "vocab_size": "vocab_size", "rms_norm_eps": "layer_norm_epsilon",
             "rotary_dim": "rotary_dim", "tie_word_embeddings": "tie_word_embeddings",
             "embedding_scale": "mup_embeddings_scale", "logit_scale": "mup_output_alpha"}
    ours = {our: said.get(their) for our, their in names.items()}
    return ours | {
        "norm": "layernorm", "bias": True, "rotary_interleaved": True,
        "attention_scale_power": 1.0 if said.get("mup_scale_qk_dot_by_d") else 0.5,
        "base_hidden_size": round(said.get("mup_width_scale", 0) * said.get("n_embd", 0))}


def from_crystal(c: ModelConfig, name: str, values: Tensor) -> dict[str, Tensor]:
    """Our tensors of one of CrystalCoder's, whose matrices are (in, out) and q, k, v one."""
    outside = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm"}
    stem, _, kind = name.rpartition(".")
    match = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", stem)
    # Outside the blocks only the names differ.
    if match is None:
        return {f"{outside.get(stem, stem)}.{kind}": values}
    ours = [f"model.layers.{match[1]}.{our}.{kind}" for our, their in CRYSTAL_NAMES.items()
            if their == match[2]]
    if not ours:
        return {name: values}  # an attention mask, for instance
    if is_hidden(ours[0]):
        values = values.T
    if len(ours) == 1:
        return {ours[0]: values}
    # One matrix has q, k and v under each other, in this order.
    kv = c.num_key_value_heads * c.head_dim
    return dict(zip(ours, values.split((c.hidden_size, kv, kv))))


# ---------------------------------------------------------------------------------------------
# reading a checkpoint


def is_published(path: Path) -> bool:
    """Whether this is a Hugging Face directory that train.py has not written."""
    return (path / "config.json").is_file() and not (path / "manifest.json").exists()


# What the stages rely on; more is there.
MANIFEST = {
    "format": int, "step": is_count, "tokens": is_count, "chunk": is_count, "visit": is_count,
    "weights_sha256": str, "data_sha256": str, "chunk_sha256": str, "tensors": {str: str},
    "files": lambda files: type(files) is dict and all(map(is_inside, files)),
    "config": dict, "environment": {"threads": is_count},
    "parent": {"checkpoint?": str, "weights_sha256?": str},
    "started_from": {"path?": str, "tokens?": lambda value: value is None or is_count(value)},
}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; {} if it is missing, damaged, or not of this form."""
    manifest = read_json(path / "manifest.json", MANIFEST)
    own_hash = manifest.pop("sha256", None)
    sound = manifest.get("format") == FORMAT and own_hash == sha256_json(manifest)
    return manifest if sound else {}


def verify_checkpoint(path: Path, train_state: bool = False) -> str:
    """Why a checkpoint cannot be used, or "": every file is there and has its sha256.

    Several processes share the reading, and all get the same answer.
    """
    problems = all_gather_object(verify_share(path, train_state))
    return next(filter(None, problems), "")


def verify_share(path: Path, train_state: bool) -> str:
    """`verify_checkpoint` for this process's share of the files."""
    if is_published(path):
        return "a published directory has no training state" if train_state else ""
    manifest = read_manifest(path)
    if not manifest:
        if (path / "model" / ".metadata").exists():
            return ("it is of format 1, whose metadata could run code and is not opened any more;"
                    " train it again")
        return "manifest.json is missing or damaged"
    if train_state and not (path / "train_state").exists():
        return "train_state is missing"
    # Evaluation needs the weights alone, which are a third of what there is to read.
    names = [name for name in sorted(manifest["files"])
             if train_state or not name.startswith("train_state/")]
    if not any(name.endswith(".safetensors") for name in names):
        return "manifest.json lists no weights"
    # What is loaded is what was hashed.
    for file in [*path.glob("*.safetensors"), *path.glob("train_state/*.safetensors")]:
        if file.relative_to(path).as_posix() not in manifest["files"]:
            return f"{file.name} is not in manifest.json"
    for name in names[rank() :: world_size()]:
        if not (path / name).is_file():
            return f"{name} is missing"
        if sha256_file(path / name) != manifest["files"][name]:
            return f"{name} is damaged (its sha256 is not the one in manifest.json)"
    return ""


def load_weights(model: LLaMA, path: str | Path, verified: bool = False) -> dict[str, Any]:
    """Fill `model`, sharded or not, from a checkpoint or a published directory.

    Returns its manifest, or {"step": None, "tokens": None} of a published one: what it has seen is
    not written there. Raises UserError with everything that does not fit at once.
    """
    path = Path(path)
    problem = "" if verified else verify_checkpoint(path)
    if problem:
        raise UserError(f"{path} is not a usable checkpoint: {problem}.")
    c = model.config
    # Shapes do not tell all: weights load under another rope_theta too, and compute nonsense.
    problems = config_problems(c, path)
    if problems:
        raise UserError(f"{path} cannot be loaded: {'; '.join(problems)}.")
    weights = named_parameters(model)
    missing = set(weights)
    theirs_is_crystal = "n_embd" in read_json(path / "config.json")
    # One tensor after the other, so that no second copy of the model is ever in memory.
    for name, values in read_tensors(path):
        found = from_crystal(c, name, values) if theirs_is_crystal else {name: values}
        for ours, part in found.items():
            missing.discard(ours)
            if ours not in weights:
                # Old exports carry rotary tables and masks, some a tied head.
                known = re.search(r"rotary_emb|attn\.(masked_)?bias$|^lm_head\.weight$", ours)
                problems += [] if known else [f"{ours} is unknown"]
            elif weights[ours].shape != part.shape:
                problems.append(f"{ours} is {tuple(part.shape)} there,"
                                f" {tuple(weights[ours].shape)} here")
            else:
                copy_into_shard(weights[ours], part)
    problems += [f"{name} is missing" for name in sorted(missing)]
    if problems:
        raise UserError(f"{path} cannot be loaded: {'; '.join(problems)}.")
    return read_manifest(path) or {"step": None, "tokens": None}


def load_run(path: str | Path, **settings: Any) -> tuple[LLaMA, Tokenizer]:
    """Model and tokenizer of a run (its newest checkpoint), a checkpoint or a published directory.

        model, tokenizer = load_run("runs/amber_tiny")
        print(continue_text(model, tokenizer, "import ", 32))  # of model.py

    settings: where and how it computes, like device="cpu" or dtype="float32".
    """
    path = Path(path)
    path = (list_checkpoints(path) or [path])[-1]
    config = Config(**asdict(read_network(path)), **settings)
    choose_kernels(config.kernels)
    model = build_for_inference(config)
    load_weights(model, path)
    return model, open_tokenizer(path)


def named_parameters(model: LLaMA) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer knows, by name; a tied head is not there twice."""
    for module in model.modules():
        # A forward pass without a backward one (validation) leaves FSDP with gathered weights.
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(model.named_parameters())


def init_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """AdamW's moments, all zero: what PyTorch makes at the first step, made at once, so that they
    can be filled from a checkpoint (and saved) without a special case."""
    # Sharded like the parameter, since zeros_like of a DTensor is one.
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device),
                                  "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def optimizer_tensors(model: LLaMA, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's moments by name: `PARAMETER.exp_avg` and `PARAMETER.exp_avg_sq`."""
    moments = {}
    for name, parameter in named_parameters(model).items():
        for kind in ("exp_avg", "exp_avg_sq"):
            moments[f"{name}.{kind}"] = optimizer.state[parameter][kind]
    return moments


def load_optimizer(model: LLaMA, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Fill AdamW's moments and its count of updates from a verified checkpoint. Its settings stay
    those of the config: what is recorded is what is in effect."""
    ours = optimizer_tensors(model, optimizer)
    missing = set(ours)
    for name, values in read_tensors(path / "train_state", "optimizer"):
        if name not in ours or ours[name].shape != values.shape:
            raise UserError(f"{path} cannot be resumed: {name} does not fit this model.")
        copy_into_shard(ours[name], values)
        missing.discard(name)
    updates = read_json(path / "train_state" / "state.json").get("updates")
    if missing or type(updates) is not int:
        raise UserError(f"{path} cannot be resumed: its training state is not complete.")
    for state in optimizer.state.values():
        state["step"].fill_(updates)


# ---------------------------------------------------------------------------------------------
# writing a checkpoint


def save_checkpoint(path: Path, model: LLaMA, optimizer: torch.optim.Optimizer,
                    tokenizer: Tokenizer, metadata: dict[str, Any],
                    delete_old: Callable[[], None], pool: ThreadPoolExecutor) -> Future:
    """Copy the state of training to host memory, and write it in a thread while training goes on.

    All processes call this; each copies and writes its share of the tensors. metadata: what the
    manifest says beside the hashes; delete_old: called by the first process when all is in place.
    The future raises UserError if it could not be written; the checkpoints before it are untouched.
    """
    # All in a directory of another name, so that what is called ckpt_007 is always whole.
    tmp = path.with_name(f"{path.name}.tmp")
    on_rank_zero(lambda: begin_unfinished(tmp))
    # Not the step of the run: where on_nonfinite = "skip_step" has left out an update, AdamW has
    # made fewer, and its bias correction goes by these. Every parameter has the same number.
    updates = next(iter(optimizer.state.values()))["step"]
    # No state of a random generator is saved: nothing in training draws from one.
    state = {"step": metadata["step"], "updates": int(updates)}
    weights = copy_to_host(named_parameters(model))
    moments = copy_to_host(optimizer_tensors(model, optimizer))

    def write() -> None:
        try:
            write_share(tmp, weights, moments)
            if rank() == 0:
                write_json(tmp / "train_state" / "state.json", state)
                publish(tmp, path, model, tokenizer, metadata)
                # Only now: until the new checkpoint has its name, the old ones are all there is.
                delete_old()
        except OSError as error:
            with contextlib.suppress(OSError, UserError):
                remove_unfinished(tmp)
            raise UserError(f"Could not save {path}: {error.strerror or error}. The checkpoints"
                            " before it are untouched; make room and start the same command again.")

    return pool.submit(write)


def copy_to_host(tensors: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Whole float32 copies on the host of this process's share: tensor i goes to process i mod N.

    Sharded tensors are gathered one at a time, so that no device ever holds more than one whole.
    """
    mine = []
    for i, (name, tensor) in enumerate(tensors.items()):
        # Every process takes part in gathering every tensor, even one that it does not keep.
        tensor = tensor.detach()
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # all_gather
        if i % world_size() == rank():
            mine.append((name, whole.to("cpu", torch.float32, copy=True).contiguous()))
    return mine


def write_share(tmp: Path, weights: list[tuple[str, Tensor]],
                moments: list[tuple[str, Tensor]]) -> None:
    """Write this process's two files, and rank_N.json, which tells the first process of them."""
    shard = f"-{rank() + 1:05}-of-{world_size():05}" if world_size() > 1 else ""
    model, optimizer = f"model{shard}.safetensors", f"train_state/optimizer{shard}.safetensors"
    (tmp / "train_state").mkdir(exist_ok=True)
    hashes = write_safetensors(tmp / model, weights)
    written = {"weight_map": dict.fromkeys(hashes, model),
               "tensors": hashes | write_safetensors(tmp / optimizer, moments),
               "files": {name: sha256_file(tmp / name) for name in (model, optimizer)}}
    # Written under another name first, so that the first process never reads half of it.
    half = tmp / f"rank_{rank()}.half"
    write_json(half, written)
    half.rename(half.with_suffix(".json"))  # the name that the first process waits for


def publish(tmp: Path, path: Path, model: LLaMA, tokenizer: Tokenizer,
            metadata: dict[str, Any]) -> None:
    """When all processes have written their files: index, config, tokenizer, manifest, rename.

    This needs no collective, which training may be using: it only looks for the others' files.
    """
    c, weight_map = model.config, {}
    tensors: dict[str, str] = {}
    files: dict[str, str] = {}
    # A process that has died writes nothing, and this thread must not keep its own from ending.
    deadline = time.monotonic() + 60 * c.timeout_minutes
    for r in range(world_size()):
        theirs = tmp / f"rank_{r}.json"
        while not theirs.exists():
            if time.monotonic() > deadline:
                raise UserError(f"Could not save {path}: process {r} has not written its share in"
                                f" timeout_minutes = {c.timeout_minutes:g}.")
            time.sleep(0.02)
        written = json.loads(theirs.read_text(encoding="utf-8"))
        weight_map |= written["weight_map"]
        tensors |= written["tensors"]
        files |= written["files"]
        theirs.unlink()
    if world_size() > 1:
        write_json(tmp / "model.safetensors.index.json", {
            "metadata": {"total_size": 4 * model.n_params}, "weight_map": weight_map})
    write_json(tmp / "config.json", hugging_face_config(model, tokenizer.eos_id))
    write_json(tmp / "generation_config.json", {"eos_token_id": tokenizer.eos_id})
    tokenizer.save_hugging_face(tmp)
    for file in [*tmp.glob("*.json"), tmp / "train_state" / "state.json"]:
        files[file.relative_to(tmp).as_posix()] = sha256_file(file)
    # Of the tensors and not of the files: the same weights have the same hash, however many
    # processes have written them.
    weights = {name: tensors[name] for name in sorted(weight_map)}
    manifest = metadata | {"format": FORMAT, "weights_sha256": sha256_json(weights),
                           "tensors": dict(sorted(tensors.items())),
                           "files": dict(sorted(files.items()))}
    # With its own hash, so that a flipped bit in the manifest itself is found too.
    write_json(tmp / "manifest.json", manifest | {"sha256": sha256_json(manifest)})
    # On the disk before it has its name: a machine that loses its power keeps either all or none.
    sync_directory(tmp / "train_state")
    sync_directory(tmp)
    if path.exists():
        delete_directory(path)
    tmp.rename(path)
    # If a kill comes in between the mark stays, but it says ckpt_007.tmp: ckpt_007 counts as whole.
    (path / MARK).unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Have the names in a directory on the disk, not in a cache."""
    descriptor = os.open(directory, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


# ---------------------------------------------------------------------------------------------
# the checkpoints of a run


def find_checkpoints(run_dir: str | Path) -> tuple[list[Path], list[Path]]:
    """(sound ones by their step, those whose manifest is missing or damaged) of a run."""
    sound, damaged = [], []
    # By the step in the manifest and not by the name or the time of the directory.
    for path in Path(run_dir).glob("*_*"):
        if NAME.fullmatch(path.name) and path.is_dir():
            manifest = read_manifest(path)
            if manifest:
                sound.append((manifest["step"], path.name, path))
            else:
                damaged.append(path)
    return [path for _, _, path in sorted(sound)], sorted(damaged)


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """The checkpoints of a run with a sound manifest, oldest first."""
    return find_checkpoints(run_dir)[0]


def delete_directory(path: Path) -> None:
    """Remove a checkpoint or a training state: first its name, so that a kill in the middle leaves
    nothing that looks like one."""
    gone = path.with_name(f"{path.name}.deleted.tmp")
    remove_unfinished(gone)
    (path / MARK).write_text(f"{gone.name}: being deleted\n")
    path.rename(gone)
    remove_unfinished(gone)


def set_aside(path: Path) -> Path:
    """Rename a checkpoint that must not count any more to NAME.aside; nothing is lost."""
    n, target = 1, path.with_name(f"{path.name}.aside")
    while target.exists():
        n += 1
        target = path.with_name(f"{path.name}.aside{n}")
    path.rename(target)
    return target


def remove_leftovers(run_dir: Path) -> None:
    """Remove what a kill left of a save or of a deletion, and nothing else."""
    for path in [*run_dir.glob("*.tmp"), *run_dir.glob("*/train_state.deleted.tmp")]:
        name = path.name if path.parent == run_dir else path.parent.name
        if NAME.match(name) and is_unfinished(path):
            remove_unfinished(path)


def drop_old_checkpoints(run_dir: Path, keep_rolling: int, keep_train_state: int) -> None:
    """Keep the newest rolling checkpoints, and the newest training states (0 = all)."""
    # Only sound checkpoints count: a damaged one must not cost the life of a good one.
    rolling = [path for path in list_checkpoints(run_dir) if path.name.startswith("step_")]
    # Not rolling[:-keep_rolling], which is empty for 0 and would keep them all.
    for path in rolling[: max(0, len(rolling) - keep_rolling)]:
        delete_directory(path)
    if keep_train_state:
        for path in list_checkpoints(run_dir)[:-keep_train_state]:
            if (path / "train_state").exists():
                delete_directory(path / "train_state")


def weights_hash(path: Path) -> str:
    """A hash that changes with the weights: of their tensors, or of a published directory's files
    as the system lists them."""
    manifest = read_manifest(path)
    if manifest:
        return manifest["weights_sha256"]
    return sha256_json([(file.name, file.stat().st_size, file.stat().st_mtime_ns)
                        for file in sorted(path.iterdir())])


def select_checkpoints(run_dir: str, which: str) -> list[Path]:
    """The checkpoints `which` names: "all" (one per chunk), "last", "7", "0,4,9", or paths.

    A path may be one of a published directory. Raises UserError for what is not there.
    """
    found, damaged = find_checkpoints(run_dir)
    if which == "all":
        paths = [path for path in found if path.name.startswith("ckpt_")] or found[-1:]
        for path in damaged:
            tqdm.write(f"Skipping {path}: manifest.json is missing or damaged.")
    elif which == "last":
        paths = found[-1:]
    else:
        paths = [Path(run_dir, f"ckpt_{int(part):03d}") if part.isdecimal() else Path(part)
                 for part in which.split(",")]
    for path in paths:
        if not (read_manifest(path) or is_published(path)):
            names = ", ".join(p.name for p in found) or "none"
            problem = f" ({verify_checkpoint(path)})" if path.exists() else ""
            raise UserError(f"There is no checkpoint {path}{problem}; {run_dir} has: {names}.")
    if not paths:
        raise UserError(f"{run_dir} has no checkpoint yet: run train.py with this config first.")
    return paths


# ---------------------------------------------------------------------------------------------
# lines of JSON: records that are only ever added to


def read_records(path: Path, form: Any = dict) -> list[dict[str, Any]]:
    """The objects of a .jsonl file that have a form (see `has_form`). Others may have written it:
    lines of another form are left out, and that is said."""
    records, left_out = [], 0
    lines = read_regular(path).split(b"\n") if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not (has_form(record, dict) and has_form(record, form)):
                raise ValueError
            records.append(record)
        except (ValueError, RecursionError):
            # The last one may be half written just now; others may be empty.
            left_out += bool(line) and number < len(lines)
    if left_out:
        say_once(f"{path}: {left_out} lines are damaged, and left out.")
    return records


@functools.cache
def say_once(text: str) -> None:
    tqdm.write(text)


# A line of metrics.jsonl and one of eval.jsonl.
METRICS = {"step": is_count, "tokens": is_count, "chunk?": is_count, "loss?": is_number,
           "grad_norm?": is_number, "lr?": is_number, "tokens_per_s?": is_number,
           "loss_by_source?": {str: is_number},
           "valid?": {str: {"loss": is_number, "bits_per_byte": is_number}}}
RESULT = {"of": dict, "evaluation": str, "result": dict, "checkpoint": str,
          "step": lambda step: step is None or is_count(step),
          "tokens": lambda tokens: tokens is None or is_count(tokens)}


def read_metrics(run_dir: str | Path) -> dict[int, dict[str, Any]]:
    """The lines of a run's metrics.jsonl, by their step."""
    return {record["step"]: record
            for record in read_records(Path(run_dir, "metrics.jsonl"), METRICS)}


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add a line to a .jsonl file that others may be adding to, and a kill may have cut short."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # published weights have no run
        with open(path, "a+b") as f:
            with contextlib.suppress(ImportError, OSError):  # Windows, file systems without locks
                import fcntl
                fcntl.flock(f, fcntl.LOCK_EX)
            # A line that a kill has cut short gets its end, so that this one is not lost with it.
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - 1))
            torn = f.read(1) not in (b"", b"\n")
            f.write(b"\n" * torn + json.dumps(record).encode() + b"\n")
    except OSError as error:
        raise UserError(f"Could not add to {path}: {error.strerror or error}.")


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Replace a .jsonl file, so that what is appended next begins on a line of its own."""
    half = path.with_name(f"{path.name}.half")
    half.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    half.replace(path)


# ---------------------------------------------------------------------------------------------
# measuring checkpoints: each once, the work shared out over torchrun's processes


class Evaluation(NamedTuple):
    """Something to measure of a checkpoint."""

    name: str
    inputs: Any  # JSON: what the result depends on, beside the weights
    run: Callable[[LLaMA], Any]  # -> JSON


def evaluate_checkpoints(file: Path, model: LLaMA, paths: list[Path],
                         evaluations: list[Evaluation], finish: bool = True
                         ) -> list[dict[str, Any]]:
    """The result of every evaluation of every checkpoint, in that order.

    Results are lines of `file`, added as soon as they are there; what is there is not measured
    again. torchrun's processes share the work and meet at the end; finish = False returns before
    that, with no results. A damaged checkpoint is named and left out.
    """
    # Not rank(): there is no process group before `meet`, but torchrun's variables are there.
    rank_here, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    # To load a checkpoint is the expensive part, so one process has all of its evaluations; only
    # when there are more processes than checkpoints do several (a team) share one.
    team = max(1, world // max(1, len(paths)))
    known = known_results(file)
    asked: list[tuple[Path, str]] = []  # checkpoint, and what a result of it is a result of
    damaged: set[Path] = set()
    for i, path in enumerate(paths):
        # A result belongs to weights, data and settings, not to a name that may be trained anew.
        weights = weights_hash(path)
        mine = []
        for j, evaluation in enumerate(evaluations):
            of = {"weights": weights, "dtype": str(model.dtype)[6:],
                  "evaluation": evaluation.name, "inputs": evaluation.inputs}
            asked.append((path, json.dumps(of)))
            # The processes from i * team on take the evaluations of checkpoint i in turn.
            if json.dumps(of) not in known and (i * team + j % team) % world == rank_here:
                mine.append((evaluation, of))
        if mine and not measure(file, model, path, mine):
            damaged.add(path)
    if not finish:
        return []
    damaged = meet(damaged)
    known = known_results(file)
    # Two checkpoints with the same weights share a result, and keep their own names.
    results = [known[of] | {"checkpoint": path.name} for path, of in asked if path not in damaged]
    if not results:
        raise UserError(f"None of the checkpoints could be measured: {file.parent} has no sound one"
                        " among them.")
    return results


def measure(file: Path, model: LLaMA, path: Path,
            evaluations: list[tuple[Evaluation, dict[str, Any]]]) -> bool:
    """Measure a checkpoint and append the results, with what they are results of, to a file;
    False if the checkpoint is damaged."""
    # A long evaluation must not end at one bad file of a hundred.
    problem = verify_checkpoint(path)
    if problem:
        tqdm.write(f"Skipping {path}: {problem}.")
        return False
    # What this raises is of a sound checkpoint that does not fit this config: it ends the stage.
    # But a run that is going on deletes its rolling checkpoints, be they read or not.
    try:
        manifest = load_weights(model, path, verified=True)
    except UserError:
        if path.exists():
            raise
        tqdm.write(f"Skipping {path}: it was deleted meanwhile.")
        return False
    for evaluation, of in tqdm(evaluations, desc=path.name, leave=False, disable=None):
        append_record(file, {
            "checkpoint": path.name, "step": manifest["step"], "tokens": manifest["tokens"],
            "evaluation": evaluation.name, "result": evaluation.run(model), "of": of})
    return True


def known_results(file: Path) -> dict[str, dict[str, Any]]:
    """The results in a file, by what they are results of."""
    return {json.dumps(record["of"]): record for record in read_records(file, RESULT)}


def meet(damaged: set[Path]) -> set[Path]:
    """Wait for torchrun's other processes; what any of them has found damaged."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return damaged
    # Only now: until here the processes have nothing to say to each other, and one may be slow.
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    found = set().union(*all_gather_object(damaged))
    dist.destroy_process_group()
    return found
