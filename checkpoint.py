"""A checkpoint is a Hugging Face directory, with the state of training beside the weights.

    runs/NAME/ckpt_007/
      config.json  generation_config.json  tokenizer.json  tokenizer_config.json
      model.safetensors       float32; of N processes model-00001-of-0000N.safetensors ..., an index
      train_state/            the optimizers' state in the same format
      manifest.json           written last: step, chunk, settings, sha256 of each tensor and file

`AutoModelForCausalLM.from_pretrained("runs/NAME/ckpt_007")` opens it as it is, and every stage here
opens a directory that others have published. Nothing that is loaded can run code.
"""

import contextlib
import itertools
import json
import os
import re
from collections import ChainMap
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
from torch.optim import Optimizer
from tqdm import tqdm

import configs
import parallel
from configs import Config, ModelConfig, UserError, open_ours, read_regular, regular, with_recorded
from data import damaged, read_json, remove, sha256_file, sha256_json, to_json, write_json, writing
from model import LLaMA, copy_into_shard
from parallel import on_rank_zero, rank, world_size
from tokenizer import PROBE, Tokenizer, open_tokenizer

FORMAT = 3  # of the manifest; any other is refused
# ckpt_007 is the checkpoint at the end of a chunk, step_0000123 a rolling one in between.
NAME = re.compile(r"ckpt_\d{3,}|step_\d{7,}")
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


# ---- safetensors: eight bytes of length, a JSON header of that length, raw numbers


def write_safetensors(path: Path, tensors: list[tuple[str, Tensor]]) -> dict[str, str]:
    """Write float32 tensors on the host to a file; returns the sha256 of each tensor's bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that every number begins at a multiple of its size
    with writing(path) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in tensors:
            f.write(raw_bytes(tensor))
    return {name: sha256(raw_bytes(tensor)).hexdigest() for name, tensor in tensors}


def raw_bytes(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor on the host, without a copy if it is contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped: only what is copied out of one is read from the disk."""
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if not 2 <= length < path.stat().st_size:
            raise ValueError("it is not a safetensors file")
        header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    # "c" is copy-on-write: torch warns of arrays that it may not write to.
    data = torch.from_numpy(np.memmap(path, np.uint8, "c"))
    for name, entry in header.items():
        dtype = TYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"{name} is of type {entry['dtype']}")
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        raw = data[begin:end]
        if begin % dtype.itemsize:  # another writer may not have aligned it
            raw = raw.clone()
        tensors[name] = raw.view(dtype).view(entry["shape"])  # raises if the sizes differ
    return tensors


def read_tensors(directory: Path, stem: str = "model") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor), mapped, of the weights of a directory, or with stem = "optimizer" of a
    checkpoint's train_state. UserError names a file that cannot be read."""
    names = set()
    for file in tensor_files(directory, stem):
        try:
            with open(regular(file), "rb") as f:
                begin = f.read(8)
            if begin == b"version ":
                raise ValueError("a pointer of git-lfs: `git lfs pull` gets the file")
            if file.suffix == ".bin":
                # weights_only builds tensors and nothing else; mmap needs PyTorch 1.6's archive.
                tensors = dict(torch.load(file, "cpu", mmap=begin[:2] == b"PK", weights_only=True))
            else:
                tensors = read_safetensors(file)
        except Exception as error:  # damaged files raise all kinds
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise UserError(f"{file} cannot be read ({reason.splitlines()[0]}): is it whole?")
        if twice := names & tensors.keys():
            raise UserError(f"{directory} cannot be loaded: two files have a {min(twice)}.")
        names |= tensors.keys()
        yield from tensors.items()


def tensor_files(directory: Path, stem: str = "model") -> list[Path]:
    """The files that `read_tensors` reads: those of a checkpoint's manifest, or the weights of a
    published directory. UserError if it has none, or two sets of them."""
    home = directory.parent if stem == "optimizer" else directory
    if manifest := read_manifest(home):
        # These alone were hashed: a file that somebody put beside them is never read.
        files = [home / name for name in manifest["files"]]
        return [f for f in files if f.parent == directory and f.match(f"{stem}*.safetensors")]
    for whole in ("model.safetensors", "pytorch_model.bin"):  # the first if there are both
        index = directory / f"{whole}.index.json"
        files = [file for file in (directory / whole, index) if file.exists()]
        if len(files) == 2:
            raise UserError(f"{directory} has both {whole} and {index.name}: move one away.")
        if files == [index]:
            # Path.name: whatever an index says, it names files of its own directory.
            names = read_json(index).get("weight_map")
            shards = {Path(str(n)).name for n in names.values()} if isinstance(names, dict) else ()
            files = [directory / name for name in sorted(shards)]
        if files:
            return files
    raise UserError(f"{directory} has no weights, neither model.safetensors nor pytorch_model.bin.")


# ---- config.json, ours and others'

# The settings and the parameters that transformers' LLaMA has. A model with another setting or
# another parameter is not called a LLaMA.
LLAMA_SETTINGS = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads rms_norm_eps rope_theta tie_word_embeddings initializer_range""".split()
LLAMA_PARAMETERS = re.compile(
    r"(model\.(embed_tokens|norm)|lm_head|model\.layers\.\d+\.((input|post_attention)_layernorm"
    r"|self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj))\.weight")
# What else a config.json can say of a network, and the one value that model.py computes.
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "sliding_window": None,
         "partial_rotary_factor": 1.0, "quantization_config": None, "auto_map": None}
INITIAL = ("initializer_range", "init_truncated", "init_by_depth")  # of no effect on given weights


def hugging_face_config(model: LLaMA, eos_id: int) -> dict[str, Any]:
    """config.json of a model: LLaMA's if it is one, else all settings of ModelConfig."""
    c, default = model.config, ModelConfig()
    settings = {f.name: getattr(c, f.name) for f in fields(ModelConfig)}
    # A setting that is added to ModelConfig tomorrow must have its default, too.
    llama = all(value == getattr(default, name) for name, value in settings.items()
                if name not in LLAMA_SETTINGS)
    if llama and all(LLAMA_PARAMETERS.fullmatch(name) for name, _ in model.named_parameters()):
        kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        settings = {name: settings[name] for name in LLAMA_SETTINGS}
    elif c.norm == "layernorm":
        kind = {"architectures": ["CrystalCoderLMHeadModel"], "model_type": "crystalcoder"}
    else:  # a model that only this repository computes
        kind = {"model_type": "amber-variant"}
    # bos_token_id is null, because transformers' default would be LLaMA's id 1.
    return kind | settings | {"max_position_embeddings": c.seq_len, "hidden_act": "silu",
                              "bos_token_id": None, "eos_token_id": eos_id,
                              "torch_dtype": "float32"}


def read_network(directory: Path) -> ModelConfig:
    """The network that a directory's config.json describes, with LLaMA's defaults for what it
    leaves out; UserError if model.py has no such network."""
    content = read_json(directory / "config.json")
    kind = content.get("model_type")
    if kind not in ("llama", "crystalcoder", "amber-variant") or "n_embd" in content:
        raise UserError(f"{directory} cannot be loaded: its config.json is missing, damaged, or of"
                        f" a model of type {kind!r}; 'llama' is known, and CrystalCoder once"
                        " tools/convert_crystal.py has converted it.")
    ours = [f.name for f in fields(ModelConfig)]
    names = LLAMA_SETTINGS if kind == "llama" else ours
    settings = {name: content[name] for name in names if content.get(name) is not None}
    wrong = [key for key, value in FIXED.items() if content.get(key) not in (None, value)]
    if kind != "llama":
        wrong += [name for name in ours if name not in settings]
    for key in ("rope_parameters", "rope_scaling"):
        rope = {**value} if isinstance(value := content.get(key) or {}, dict) else {key: value}
        theta = rope.pop("rope_theta", settings.get("rope_theta", 10000.0))
        # What is left may be rope_type = "default"; everything else rescales the angles.
        if any(value not in ("default", None) for value in rope.values()):
            wrong.append(key)
        if settings.setdefault("rope_theta", theta) != theta:
            wrong.append("rope_theta")
    try:
        config = with_recorded(Config(), {"num_key_value_heads": 0} | settings)
    except UserError as error:
        raise UserError(f"{directory} cannot be loaded: {error}")
    wrong += ["head_dim"] if content.get("head_dim") not in (None, config.head_dim) else []
    if wrong:
        values = ", ".join(f"{key} = {content.get(key)!r}" for key in wrong)
        raise UserError(f"{directory} cannot be loaded: model.py has no network with {values}.")
    return ModelConfig(**{name: getattr(config, name) for name in ours})


def with_network(config: Config, paths: list[Path], tokenizer: Tokenizer | None = None) -> Config:
    """The config with the network of the first path that has one; of a checkpoint of ours, the
    config itself. UserError unless its weights belong to the tokenizer whose ids are to be read."""
    for path in paths[:-1]:
        with contextlib.suppress(UserError):
            return with_network(config, [path], tokenizer)
    path = paths[-1]
    if is_published(path):
        config = replace(config, **asdict(read_network(path)))
    most = read_json(path / "config.json").get("max_position_embeddings") or config.seq_len
    if type(most) is not int or config.seq_len > most:
        raise UserError(f"seq_len is {config.seq_len}, and {path} reads at most {most} tokens"
                        " (max_position_embeddings): set it to that or less.")
    if tokenizer:
        check_ids(path, config, tokenizer)
    return config


def check_ids(path: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """UserError unless a tokenizer gives the ids that the weights of `path` were trained with."""
    if tokenizer.n_vocab > config.vocab_size:
        raise UserError(f"{path}: the tokenizer has {tokenizer.n_vocab} token ids, the model"
                        f" {config.vocab_size} (vocab_size).")
    if (path / "tokenizer.json").exists():
        # Not by their bytes: LLaMA's tokenizer was published in several forms.
        theirs = open_tokenizer(path)
        ids = [each.encode(PROBE).tolist() for each in (theirs, tokenizer)]
        if ids[0] != ids[1] or theirs.pieces != tokenizer.pieces:
            raise UserError(f"The data was made with another tokenizer than {path} has.")


# ---- reading a checkpoint


def is_published(path: Path) -> bool:
    """Whether this is a Hugging Face directory that train.py has not written."""
    return (path / "config.json").is_file() and not (path / "manifest.json").exists()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; {} if it is missing, damaged or of another format."""
    manifest = read_json(path / "manifest.json")
    own_hash = manifest.pop("sha256", None)
    if manifest.get("format") != FORMAT or own_hash != sha256_json(manifest):
        return {}
    # A stranger's could name files anywhere.
    outside = [name for name in manifest["files"] if name[:1] == "/" or ".." in Path(name).parts]
    return {} if outside else manifest


def verify_checkpoint(path: Path, train_state: bool = False) -> str:
    """Why a checkpoint cannot be used, or "": its files and weights have the manifest's hashes.
    With train_state the optimizers' state is verified too."""
    if is_published(path):
        return "a published directory has no training state" if train_state else ""
    manifest = read_manifest(path)
    if not manifest:
        return f"manifest.json is missing or damaged, or its format is not {FORMAT}"
    # The state is two thirds of the bytes, and evaluation does not need it.
    files = {name: expected for name, expected in manifest["files"].items()
             if train_state or not name.startswith("train_state/")}
    if problems := damaged(path, files):
        return problems[0]
    # Results are kept under weights_sha256, so it must belong to these very weights.
    weights = dict(read_tensors(path))
    with ThreadPoolExecutor(8) as pool:
        hashes = pool.map(lambda values: sha256(raw_bytes(values)).hexdigest(), weights.values())
    if sha256_json(dict(zip(weights, hashes))) != manifest["weights_sha256"]:
        return "its weights do not have the weights_sha256 of manifest.json"
    return ""


def load_weights(model: LLaMA, path: str | Path, verified: bool = False) -> dict[str, Any]:
    """Fill `model`, sharded or not; UserError if the checkpoint is damaged or another network's.
    Returns its manifest, or {"step": None, "tokens": None} for a published directory."""
    path = Path(path)
    if not verified and (problem := verify_checkpoint(path)):
        raise UserError(f"{path}: {problem}.")
    # Shapes are not enough: weights load under another rope_theta too, and compute nonsense.
    theirs, problems = read_network(path), []
    for f in fields(ModelConfig):
        there, here = getattr(theirs, f.name), getattr(model.config, f.name)
        # As float32: others write 9.999999974752427e-07 for 1e-6.
        same = np.float32(there) == np.float32(here) if f.type is float else there == here
        if f.name not in INITIAL and not same:
            problems.append(f"{f.name} is {there!r} there, {here!r} here")
    weights = named_parameters(model)
    tensors = dict(read_tensors(path))  # mapped, so the model is never in memory twice
    if model.config.tie_word_embeddings and "lm_head.weight" in tensors:
        head, embedding = tensors.pop("lm_head.weight"), tensors.get("model.embed_tokens.weight")
        if embedding is not None and not torch.equal(head, embedding):
            problems.append("lm_head.weight is not the embedding, to which it is tied")
    for name, values in tensors.items():
        if name not in weights:
            # Old exports have tables of rotary angles, which are computed here.
            problems += [] if name.endswith("rotary_emb.inv_freq") else [f"{name} is unknown"]
        elif values.dtype not in TYPES.values():
            problems.append(f"{name} is of type {values.dtype}")
        elif values.shape != weights[name].shape:
            problems.append(f"{name} is {tuple(values.shape)} there,"
                            f" {tuple(weights[name].shape)} here")
    problems += [f"{name} is missing" for name in weights if name not in tensors]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(f"{path} cannot be loaded: {'; '.join(problems[:3])}{more}.")
    for name, parameter in weights.items():
        copy_into_shard(parameter, tensors[name])
    return read_manifest(path) or {"step": None, "tokens": None}


def load_run(path: str | Path, **settings: Any) -> tuple[LLaMA, Tokenizer]:
    """Model and tokenizer of a run (its newest checkpoint), a checkpoint or a published directory.
    settings: where and how it computes, like device="cpu" or dtype="float32"."""
    path = Path(path)
    path = (list_checkpoints(path) or [path])[-1]
    model = parallel.build_for_inference(Config(**asdict(read_network(path)), **settings))
    load_weights(model, path)
    return model, open_tokenizer(path)


def named_parameters(model: LLaMA) -> dict[str, nn.Parameter]:
    """The optimizer's parameters by name, resharded; a tied head is listed once."""
    for module in model.modules():
        # A forward pass without a backward one (validation) leaves FSDP with gathered weights.
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(model.named_parameters())


def optimizer_tensors(model: LLaMA, optimizers: list[Optimizer],
                      every_counter: bool = False) -> dict[str, Tensor]:
    """The state of all optimizers by `PARAMETER.ENTRY`, whatever they call their entries. A counter
    that is the same for all parameters is there once, for the first, unless `every_counter`."""
    parameters, state, tensors = named_parameters(model), {}, {}
    for optimizer in optimizers:
        state |= optimizer.state  # {parameter: {entry: tensor}}
    for entry in dict.fromkeys(entry for entries in state.values() for entry in entries):
        named = {f"{name}.{entry}": state[parameter][entry]
                 for name, parameter in parameters.items() if entry in state.get(parameter, {})}
        counted = {id(t) if t.dim() else t.item() for t in named.values()}
        first_only = len(counted) == 1 and not every_counter
        tensors |= dict([*named.items()][:1]) if first_only else named
    return tensors


def load_optimizer(model: LLaMA, optimizers: list[Optimizer], path: Path) -> None:
    """Fill the optimizers' state from a verified checkpoint; the weights are to be loaded after it.
    Learning rate, betas and so on stay those of the config. UserError if the state does not fit."""
    # An optimizer makes its state in its first step. A step at rate 0 makes the same here, of the
    # right types and sharded alike, and then all values are replaced.
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # train_step sets it before every step
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    saved = dict(read_tensors(path / "train_state", "optimizer"))  # mapped, not in memory
    values = torch.empty(0)
    for name, tensor in optimizer_tensors(model, optimizers, every_counter=True).items():
        # A counter that was saved once, for the first parameter, is that of all.
        values = saved.pop(name, values if tensor.dim() == 0 else torch.empty(0))
        if values.shape != tensor.shape:  # copy_ would broadcast it without a word
            raise UserError(f"{path} cannot be resumed: {name} is missing in its train_state, or"
                            " has another shape.")
        copy_into_shard(tensor, values)
    if saved:
        raise UserError(f"{path} cannot be resumed: no optimizer here has {[*saved][0]}.")


# ---- writing a checkpoint: every process writes its share, then process 0 publishes all of them


class Saving(NamedTuple):
    """A checkpoint that is being written."""

    path: Path
    tmp: Path  # its name until it is complete
    model: LLaMA
    metadata: dict[str, Any]  # entries of manifest.json beside the hashes
    share: Future  # of write_share: done when this process has written its files


def begin_save(path: Path, model: LLaMA, optimizers: list[Optimizer], tokenizer: Tokenizer,
               metadata: dict[str, Any], pool: ThreadPoolExecutor) -> Saving:
    """Copy the state of training to the host, and begin to write it in a thread of `pool`. All
    processes call this, and `finish_save` when `share` is done in all of them."""
    tmp = path.with_name(f"{path.name}.tmp")
    on_rank_zero(lambda: (tmp / "train_state").mkdir(parents=True))
    # No state of a random generator is saved, because nothing in training draws from one.
    weights = named_parameters(model)
    mine = copy_to_host(weights | optimizer_tensors(model, optimizers))
    kinds = [[one for one in mine if (one[0] in weights) == kind] for kind in (True, False)]
    share = pool.submit(write_share, tmp, model, tokenizer, *kinds)
    return Saving(path, tmp, model, metadata, share)


def copy_to_host(tensors: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Whole float32 copies on the host of this process's share of the tensors. Sharded ones are
    gathered one at a time: no device ever holds more than three whole."""
    loads, mine = [0] * world_size(), []
    side = torch.cuda.Stream() if any(tensor.is_cuda for tensor in tensors.values()) else None

    def copy(whole: Tensor) -> Tensor:
        with torch.cuda.stream(side):  # which also makes its device that of the thread
            # Pinned memory is several times as fast, and PyTorch keeps it for the next checkpoint.
            host = torch.empty(whole.shape, dtype=torch.float32, pin_memory=side is not None)
            return host.copy_(whole)

    # In a thread and a stream of their own, so that no process waits for the copies of another.
    with ThreadPoolExecutor(1) as copier:
        for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].numel()):
            # Every process takes part in gathering every tensor, even one that it does not keep.
            tensor = tensor.detach()
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # all_gather
            owner = loads.index(min(loads))  # the largest that is left to the one with the least
            loads[owner] += tensor.numel()
            if owner == rank():
                if len(mine) > 1:
                    mine[-2][1].result()
                if side:
                    side.wait_stream(torch.cuda.current_stream())
                mine.append((name, copier.submit(copy, whole)))
    return [(name, copied.result()) for name, copied in mine]


def write_share(tmp: Path, model: LLaMA, tokenizer: Tokenizer, weights: list[tuple[str, Tensor]],
                state: list[tuple[str, Tensor]]) -> tuple[dict[str, str], ...]:
    """Write this process's two files and, in process 0, config and tokenizer; returns the sha256 of
    each tensor, the weight_map of Hugging Face's index, and the sha256 of each file."""
    shard = f"-{rank() + 1:05}-of-{world_size():05}" if world_size() > 1 else ""
    names = [f"model{shard}.safetensors", f"train_state/optimizer{shard}.safetensors"]
    weight_hashes = write_safetensors(tmp / names[0], weights)
    tensors = weight_hashes | write_safetensors(tmp / names[1], state)
    if rank() == 0:
        write_json(tmp / "config.json", hugging_face_config(model, tokenizer.eos_id))
        write_json(tmp / "generation_config.json", {"eos_token_id": tokenizer.eos_id})
        tokenizer.save(tmp)
        names += [file.name for file in tmp.glob("*.json")]
    return (tensors, dict.fromkeys(weight_hashes, names[0]),
            {name: sha256_file(tmp / name) for name in names})


def finish_save(saving: Saving) -> str:
    """Wait until all processes have written their shares, and publish; returns weights_sha256.
    All processes call this; UserError in all of them if one could not write."""
    try:
        shares = parallel.on_all_ranks(saving.share.result)
        return on_rank_zero(lambda: publish(saving, shares))
    except OSError as error:
        with contextlib.suppress(OSError):
            on_rank_zero(lambda: remove(saving.tmp))
        raise UserError(f"Could not save {saving.path}: {error.strerror or error}. The checkpoints"
                        " before it are untouched; make room and start the same command again.")


def publish(saving: Saving, shares: list[tuple[dict[str, str], ...]]) -> str:
    """Write index and manifest, sync, and rename the directory; returns weights_sha256."""
    tmp = saving.tmp
    tensors, weight_map, files = (dict(ChainMap(*parts)) for parts in zip(*shares))
    if len(shares) > 1:
        index = "model.safetensors.index.json"
        total = {"total_size": 4 * saving.model.n_params}
        write_json(tmp / index, {"metadata": total, "weight_map": weight_map})
        files[index] = sha256_file(tmp / index)
    # Of the tensors and not of the files: the same weights have the same hash, however many
    # processes have written them.
    weights_sha256 = sha256_json({name: tensors[name] for name in weight_map})
    manifest = saving.metadata | {"format": FORMAT, "weights_sha256": weights_sha256,
                                  "tensors": dict(sorted(tensors.items())),
                                  "files": dict(sorted(files.items()))}
    # With its own hash, so that a flipped bit in the manifest itself is found too.
    write_json(tmp / "manifest.json", manifest | {"sha256": sha256_json(manifest)})
    # fsync before the rename: a power loss leaves either a complete checkpoint or none.
    sync_directory(tmp / "train_state")
    sync_directory(tmp)
    tmp.rename(saving.path)
    sync_directory(saving.path.parent)
    return weights_sha256


def sync_directory(directory: Path) -> None:
    """fsync a directory, so that renames in it survive a power loss."""
    descriptor = os.open(directory, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


# ---- the checkpoints of a run


def find_checkpoints(run_dir: str | Path) -> tuple[list[Path], list[Path]]:
    """(sound checkpoints by their step, those whose manifest is missing or damaged) of a run."""
    steps = {path: read_manifest(path).get("step")
             for path in sorted(Path(run_dir).glob("*_*")) if NAME.fullmatch(path.name)}
    sound = [path for path in steps if steps[path] is not None]
    return sorted(sound, key=steps.get), [path for path in steps if path not in sound]


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """The checkpoints of a run with a sound manifest, oldest first."""
    return find_checkpoints(run_dir)[0]


def set_aside(path: Path) -> Path:
    """Rename a checkpoint that must not count any more to NAME.aside; nothing is lost."""
    target = path.with_name(f"{path.name}.aside")
    while os.path.lexists(target):
        target = target.with_name(f"{target.name}.aside")
    return path.rename(target)


def remove_leftovers(run_dir: Path) -> None:
    """Remove what a kill left of a save or of a deletion, ckpt_007.tmp or ckpt_007_state.tmp."""
    for path in run_dir.glob("*.tmp"):
        if NAME.match(path.name):
            remove(path)


def drop_old_checkpoints(paths: list[Path], keep_rolling: int, keep_train_state: int) -> list[Path]:
    """Of a run's sound checkpoints, oldest first, keep the newest rolling ones, and the newest
    training states (0 = all); returns those that are left."""
    paths = [path for path in paths if path.exists()]  # somebody may have moved one away
    rolling = [path for path in paths if path.name.startswith("step_")]
    # Not rolling[:-keep_rolling], which is empty for 0 and would keep them all.
    old = rolling[: max(0, len(rolling) - keep_rolling)]
    # First the name goes, so that a kill in the middle leaves nothing that looks like a checkpoint.
    for path in old:
        remove(path.rename(path.with_name(f"{path.name}.tmp")))
    left = [path for path in paths if path not in old]
    for path in left[:-keep_train_state] if keep_train_state else []:
        if (path / "train_state").exists() and not path.is_symlink():  # a link to another run's
            remove((path / "train_state").rename(path.with_name(f"{path.name}_state.tmp")))
    return left


def weights_hash(path: Path) -> str:
    """A hash that changes with the weights: weights_sha256 of a checkpoint, or one of the files of
    a published directory, which takes about a minute for a 7B."""
    if manifest := read_manifest(path):
        return manifest["weights_sha256"]
    files = [path / "config.json", *tensor_files(path)]
    return sha256_json([sha256_file(regular(file)) for file in files])


def select_checkpoints(run_dir: str, which: str) -> list[Path]:
    """The checkpoints `which` names: "all" (one per chunk), "last", "7", "0,4,9", or paths, also of
    published directories. UserError for what is not there."""
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
            problem = f" ({verify_checkpoint(path)})" if path.exists() else ""
            raise UserError(f"There is no checkpoint {path}{problem}; {run_dir} has:"
                            f" {', '.join(p.name for p in found) or 'none'}.")
    if not paths:
        raise UserError(f"There is no checkpoint yet in {Path(run_dir).absolute()}: run train.py"
                        " with this config first, in the same folder.")
    return paths


# ---- lines of JSON: records that are only ever added to


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; other lines, as a kill leaves them, are left out."""
    lines, records = read_regular(path).splitlines() if path.exists() else [], []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            records.append(json.loads(line))
    records = [record for record in records if isinstance(record, dict)]
    if len(records) < len(lines):
        tqdm.write(f"{path}: {len(lines) - len(records)} lines are damaged, and left out.")
    return records


def read_metrics(run_dir: str | Path) -> dict[int, dict[str, Any]]:
    """The lines of a run's metrics.jsonl, by their step."""
    records = read_records(Path(run_dir, "metrics.jsonl"))
    return {record["step"]: record for record in records if type(record.get("step")) is int}


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add a line to a .jsonl file that others may be adding to, and a kill may have cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)  # published weights have no run
    # O_APPEND, and no buffer: a line is one write to the end, so lines of two processes never mix.
    with open_ours(path, "append") as f:
        f.seek(max(0, f.seek(0, os.SEEK_END) - 1))
        torn = f.read(1) not in (b"", b"\n")  # the line that was cut short is ended
        line = b"\n" * torn + to_json(record)
        try:
            while line:  # a disk that is almost full takes a part, and refuses the rest
                line = line[f.write(line) :]
        except OSError as error:
            error.filename = str(path)
            raise


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Replace a .jsonl file, so that what is appended next begins on a line of its own."""
    with writing(path) as f:
        f.writelines(map(to_json, records))


# ---- measuring checkpoints: each once, the work divided among torchrun's processes


class Evaluation(NamedTuple):
    """Something to measure of a checkpoint."""

    name: str
    inputs: Any  # JSON: what the result depends on, beside the weights
    run: Callable[[LLaMA], Any]  # -> JSON


def evaluate_checkpoints(file: Path, model: LLaMA, paths: list[Path], evaluations: list[Evaluation],
                         tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The result of every evaluation of every checkpoint, in that order. Each is a line of `file`,
    and is measured only once. A checkpoint that cannot be loaded, or whose ids are not the
    tokenizer's, is named and left out. torchrun's processes share the work."""
    # A process waits at the end for the slowest. If one dies, torchrun ends the others.
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=1))
    problems: dict[Path, str] = {}  # a long evaluation must not end at one bad file of a hundred

    def identify(path: Path) -> dict[str, Any]:
        manifest = read_manifest(path)
        try:
            with_network(model.config, [path], tokenizer)
            return {"checkpoint": path.name, "step": manifest.get("step"),
                    "tokens": manifest.get("tokens"), "of": weights_hash(path)}
        except (OSError, UserError) as error:
            problems[path] = str(error)
            return {}

    requests = []  # (checkpoint, evaluation, cache key, its line of the file without the result)
    for path, line in zip(paths, on_rank_zero(lambda: [*map(identify, paths)])):
        for e in evaluations if line else []:
            # A result belongs to weights, data and settings, not to the name of a checkpoint.
            key = {"weights": line["of"], "dtype": str(model.dtype)[6:], "evaluation": e.name,
                   "inputs": e.inputs}
            requests.append((path, e, json.dumps(key), line | {"evaluation": e.name, "of": key}))
    # Process 0 reads for all: the file grows as soon as one process has begun.
    results = on_rank_zero(lambda: cached_results(file))
    todo = [request for request in requests if request[2] not in results]
    if rank() == 0 and len(todo) < len(requests):
        tqdm.write(f"{len(requests) - len(todo)} results were measured before, and are those of"
                   f" {file} (without that file they are measured anew).")
    # Neighbours in this list share a checkpoint, and to load one is expensive.
    begin, end = (len(todo) * r // world_size() for r in (rank(), rank() + 1))
    measured, mine = {}, configs.progress(todo[begin:end], file.stem)
    for path, group in itertools.groupby(mine, key=lambda request: request[0]):
        try:
            load_weights(model, path)
        except UserError as error:
            problems[path] = str(error)
            continue
        for _, e, key, entry in group:
            measured[key] = entry | {"result": e.run(model)}
            try:
                json.dumps(measured[key], allow_nan=False)
                append_record(file, measured[key])
            except ValueError:
                problems[path] = f"{path}: the result of {e.name} is not finite."
                break
            except OSError as error:  # as in a run of somebody else's
                problems[file] = f"{file} ({error.strerror}): what is measured is shown alone."
    for rank_results, rank_problems in parallel.all_gather_object((measured, problems)):
        results |= rank_results
        problems |= rank_problems
    for problem in problems.values() if rank() == 0 else []:
        tqdm.write(f"Skipping {problem}")
    # Two checkpoints with the same weights share a result, and keep their own names and steps.
    results = [results[key] | entry | {"path": path}
               for path, _, key, entry in requests if path not in problems]
    if not results:
        raise UserError(f"No checkpoint could be measured: {[*problems.values()][0]}")
    return results


def cached_results(file: Path) -> dict[str, dict[str, Any]]:
    """The results in a file, by cache key."""
    return {json.dumps(r["of"]): r for r in read_records(file) if isinstance(r.get("of"), dict)}
