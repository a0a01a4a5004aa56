"""Train a model on prepared data, one checkpoint per chunk.

    python train.py configs/amber_tiny.py                      # go on where the run stands
    python train.py configs/amber_tiny.py --resume=false --run_dir=runs/again
    python train.py configs/amber_tiny.py --init_from=runs/amber_tiny/ckpt_009 --run_dir=runs/tuned

The clock is the optimizer step, counted from 1. Everything that happens at step N (its rows, its
learning rate) is a pure function of the config and N, so a run that was stopped and resumed is the
run that was not: bit for bit on a CPU. A signal (Ctrl-C, SIGTERM, SIGUSR1) saves at the end of the
step and stops. Layout of a run directory and of a checkpoint: see README.md.
"""

import contextlib
import ctypes
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dcp_state
from torch import Tensor
from tqdm import tqdm

import kernels
import prepare_data
from configs import Config, ModelConfig, load
from model import Block, LLaMA

# One process saves and loads without a process group, on purpose.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

PEAK_TFLOPS = {  # dense bf16 matmul, from the makers' data sheets
    "A100": 312, "A800": 312, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989,
    "H200": 989, "GH200": 989, "B200": 2250, "L40S": 362, "A10": 125, "RTX 4090": 165,
    "RTX 3090": 71,
}


@dataclass
class Run:
    """What a run in progress consists of; `step` and `order` are all the position there is."""

    config: Config
    manifest: dict  # of the data
    model: LLaMA
    optimizer: torch.optim.AdamW
    device: torch.device
    peak_flops: float  # per second, of this device
    step: int = 0  # optimizer steps done
    started_from: dict = field(default_factory=dict)  # the checkpoint the weights came from, if any
    stop: str = ""  # name of the signal that asked to stop
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def dir(self) -> Path:
        return Path(self.config.run_dir)

    def log(self, text: str) -> None:
        tqdm.write(text)
        with open(self.dir / "train.log", "a", encoding="utf-8") as f:
            f.write(text + "\n")


# ---------------------------------------------------------------------------------------------
# the machine


def choose_device(config: Config) -> tuple[torch.device, torch.dtype]:
    """The device and the type of the arithmetic; "auto" is bfloat16 where the chip has it."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"device = {name!r} cannot be used here: {str(error).splitlines()[0]}")
    if config.dtype != "auto":
        return device, getattr(torch, config.dtype)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device, torch.bfloat16 if fast else torch.float32


def choose_kernels(choice: str) -> str:
    """ "triton" or "torch": what a choice comes to here."""
    try:
        return kernels.use(choice)
    except RuntimeError as error:
        raise SystemExit(str(error))


def tune_cpu(threads: int) -> None:
    """Fix the thread count, and let malloc keep large buffers instead of giving them back.

    Page-faulting fresh memory for every activation costs a small model a third of its step. The
    thread count decides the order of sums, so it is part of a run's record.
    """
    if threads:
        torch.set_num_threads(threads)
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping per large buffer
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap


def peak_flops(config: Config, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one device in `dtype`: given, known by name, or on a CPU the best of 8 matmuls."""
    if config.peak_tflops:
        return config.peak_tflops * 1e12
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((t * 1e12 for key, t in PEAK_TFLOPS.items() if key in name), float("nan"))
    a, best = torch.ones(1024, 1024, dtype=dtype), math.inf
    for _ in range(8):
        begin = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begin)
    return 2 * 1024**3 / best


def memory_estimate(config: Config, dtype: torch.dtype) -> dict[str, float]:
    """Bytes of training on one device, by kind; activations are those a block saves, on meta."""
    kept: dict[int, Tensor] = {}  # one tensor per storage: views and repeats cost nothing

    def keep(t: Tensor) -> Tensor:
        return kept.setdefault(t.untyped_storage()._cdata, t)

    rows, length, size = config.micro_batch_size, config.seq_len, dtype.itemsize
    with torch.device("meta"):
        block = Block(config, 0)
        x = torch.empty(rows, length, config.hidden_size, dtype=dtype, requires_grad=True)
        cos = torch.empty(length, config.head_dim // 2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        block(x, cos, cos)
    weights = {p.untyped_storage()._cdata for p in block.parameters()}
    activations = sum(t.untyped_storage().nbytes() for i, t in kept.items() if i not in weights)
    if size < 4:  # the matrices' copies, counted apart below
        activations -= size * sum(p.numel() for p in block.parameters() if p.dim() == 2)
    return {
        "weights, gradients, AdamW": 16 * config.n_params,
        "weights cast for use": size * config.n_params if size < 4 else 0,
        "activations": config.num_hidden_layers * activations,
        "embeddings and loss": rows * length * config.hidden_size * size * 4,
    }


# ---------------------------------------------------------------------------------------------
# schedule and data: pure functions of the step


def learning_rate(config: Config, step: int, total: int) -> float:
    """Rate of step `step` (from 1) of `total`: linear warm-up, then cosine, linear or constant.

    Amber computes the rate before it counts the step: warmup_offset = 0 (amber-train main.py).
    A schedule of its own length (schedule_steps) may end before the data, or after.
    """
    total = config.schedule_steps or total
    position = step - 1 + config.warmup_offset
    if position < config.warmup_steps:
        return config.learning_rate * position / config.warmup_steps
    done = min(1.0, (position - config.warmup_steps) / max(1, total - config.warmup_steps))
    share = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    span = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + share[config.lr_schedule] * span


def to_tensors(rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of seq_len + 1 ids -> inputs and targets (B, T), int64."""
    ids = torch.from_numpy(rows["token_ids"].astype(np.int64)).to(device, non_blocking=True)
    return ids[:, :-1], ids[:, 1:]


# ---------------------------------------------------------------------------------------------
# one optimizer step


class NonFinite(Exception):
    """A loss or gradient that is not a number, met before the update was made."""


def train_step(run: Run, rows: np.ndarray, rate: float) -> dict[str, Any]:
    """One update from the rows of a global batch: loss, loss by source, gradient norm.

    The loss is the mean over every target of the global batch, in nats.
    """
    config, n = run.config, run.config.micro_batch_size
    sums = torch.zeros(len(run.manifest["sources"]), device=run.device)
    for begin in range(0, len(rows), n):
        part = rows[begin : begin + n]
        inputs, targets = to_tensors(part, run.device)
        loss, each = run.model(inputs, targets)
        (loss * (len(part) / len(rows))).backward()
        source = torch.from_numpy(part["source"].astype(np.int64)).to(run.device)
        sums.index_add_(0, source, each.mean(1))
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip)
    # One look at the device per step: everything that is logged, in a single copy.
    *by_source, norm = torch.cat([sums, norm.reshape(1)]).tolist()
    counts = np.bincount(rows["source"], minlength=len(by_source))
    loss = sum(by_source) / len(rows)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        run.optimizer.zero_grad(set_to_none=True)
        raise NonFinite(f"loss {loss}, gradient norm {norm}")
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    names = [s["name"] for s in run.manifest["sources"]]
    return {"loss": loss, "loss_by_source": {name: round(s / c, 5) for name, s, c in
                                             zip(names, by_source, counts) if c},
            "grad_norm": norm, "lr": rate}


@torch.no_grad()
def validate(model: LLaMA, data_dir: str, limit: int | None,
             batch: int) -> dict[str, dict[str, float]]:
    """Loss in nats per token and bits per byte of the held-out rows of each source.

    The first `limit` rows of each (None = all); any `batch` gives the same figures. Nothing is
    changed: not the random state, not the data order.
    """
    manifest = prepare_data.load_manifest(data_dir)
    token_bytes = prepare_data.load_tokenizer(data_dir).token_bytes.astype(np.int64)
    device, results = model.lm_head.weight.device, {}
    for name in [file["source"] for file in manifest["valid"]]:
        rows = prepare_data.open_valid(data_dir, manifest, name)[:limit]
        nats, tokens, n_bytes = 0.0, 0, 0
        for begin in range(0, len(rows), batch):
            inputs, targets = to_tensors(rows[begin : begin + batch], device)
            _, each = model(inputs, targets)
            nats += each.double().sum().item()
            tokens += targets.numel()
            n_bytes += int(token_bytes[targets.cpu()].sum())
        results[name] = {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / n_bytes}
    return results


# ---------------------------------------------------------------------------------------------
# checkpoints


def train_state(run: Run) -> dict[str, Any]:
    """Optimizer and random state, as torch.distributed.checkpoint saves and fills it."""
    state = {"optimizer": dcp_state.get_optimizer_state_dict(run.model, run.optimizer),
             "rng": torch.get_rng_state()}
    if run.device.type == "cuda":
        state["rng_cuda"] = torch.cuda.get_rng_state(run.device)
    return state


def save_checkpoint(run: Run, name: str) -> None:
    """Write a checkpoint that is there whole or not at all: fsync, manifest last, rename."""
    final, tmp = run.dir / name, run.dir / f"{name}.tmp"
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        dcp.save(run.model.state_dict(), checkpoint_id=tmp / "model", no_dist=True)
        dcp.save(train_state(run), checkpoint_id=tmp / "train_state", no_dist=True)
        manifest = checkpoint_manifest(run, tmp)
        write_json(tmp / "manifest.json", {**manifest, "sha256": digest(manifest)})
        shutil.rmtree(final, ignore_errors=True)
        tmp.rename(final)
        fsync(run.dir)
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        # A full disk arrives here in many clothes, from Python, C++ and torch's own wrapper.
        shutil.rmtree(tmp, ignore_errors=True)
        raise SystemExit(f"Could not save {final}: {root_cause(error)}. The checkpoints before it"
                         " are untouched; make room and start the same command again.")
    run.saved_at = time.monotonic()
    drop_old_checkpoints(run)


def checkpoint_manifest(run: Run, directory: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; hashing also forces its files to the disk."""
    c, data = run.config, run.manifest
    chunk, _ = prepare_data.locate(data, c.global_batch_size, max(0, run.step - 1))
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        fsync(path)
        files[str(path.relative_to(directory))] = sha256(path)
    return {
        "step": run.step,
        "tokens": run.step * c.tokens_per_step,
        "chunk": chunk,  # the one being trained, or just finished
        "chunk_sha256": data["chunks"][chunk]["sha256"],
        "data_sha256": data_sha256(c.data_dir),
        "started_from": run.started_from,
        "config": asdict(c),
        "compute": {"device": device_name(run.device), "dtype": str(run.model.dtype)[6:],
                    "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "numpy": np.__version__},
        "git_commit": git_commit(),
        "files": files,
    }


def drop_old_checkpoints(run: Run) -> None:
    """Keep `keep_rolling` rolling checkpoints and `keep_train_state` optimizer states."""
    found = checkpoints(run.dir)
    rolling = [p for p in found if p.name.startswith("step_")]
    for path in rolling[: max(0, len(rolling) - run.config.keep_rolling)]:
        shutil.rmtree(path)
    if keep := run.config.keep_train_state:
        for path in checkpoints(run.dir)[:-keep]:
            shutil.rmtree(path / "train_state", ignore_errors=True)


def checkpoints(run_dir: str | Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first; a damaged manifest counts as newest."""
    found = [p.parent for p in Path(run_dir).glob("*/manifest.json") if p.parent.suffix != ".tmp"]
    steps = {p: read_json(p / "manifest.json").get("step", math.inf) for p in found}
    return sorted(found, key=lambda p: (steps[p], p.name))


def problem_of(checkpoint: Path, need: tuple[str, ...] = ("model", "train_state")) -> str:
    """Why a checkpoint cannot be used, or "": every file under `need` is there and has its hash."""
    if is_hugging_face(checkpoint):
        return "" if need == ("model",) else "a Hugging Face directory has no training state"
    manifest = read_json(checkpoint / "manifest.json")
    if manifest.pop("sha256", None) != digest(manifest):
        return "manifest.json is missing or damaged"
    for name, expected in manifest["files"].items():
        if name.split("/")[0] not in need:
            continue
        path = checkpoint / name
        if not path.exists():
            gone = not path.parent.exists()
            return f"{path.parent.name if gone else name} is missing"
        if sha256(path) != expected:
            return f"{name} is damaged (its sha256 is not the one in manifest.json)"
    return ""


def load_weights(model: LLaMA, checkpoint: str | Path) -> dict[str, Any]:
    """Fill `model` from a checkpoint directory and return its manifest."""
    checkpoint = Path(checkpoint)
    if is_hugging_face(checkpoint):
        return load_hugging_face(model, checkpoint)
    if problem := problem_of(checkpoint, ("model",)):
        raise SystemExit(f"{checkpoint} is not a usable checkpoint: {problem}.")
    manifest = read_json(checkpoint / "manifest.json")
    for f in fields(ModelConfig):  # a setting younger than the checkpoint had its default then
        theirs, ours = manifest["config"].get(f.name, f.default), getattr(model.config, f.name)
        if theirs != ours and f.name != "initializer_range":
            raise SystemExit(f"{checkpoint} has {f.name} = {theirs}, this config {ours}.")
    dcp.load(model.state_dict(), checkpoint_id=checkpoint / "model", no_dist=True)
    return manifest


def is_hugging_face(directory: Path) -> bool:
    return (directory / "config.json").exists() and not (directory / "manifest.json").exists()


def identity(checkpoint: Path) -> str:
    """A hash that changes with the weights: of the manifest, or of a foreign directory's list."""
    if not is_hugging_face(checkpoint):
        return sha256(checkpoint / "manifest.json")
    return digest([(p.name, p.stat().st_size, p.stat().st_mtime_ns)
                   for p in sorted(checkpoint.iterdir())])


def load_hugging_face(model: LLaMA, directory: Path) -> dict[str, Any]:
    """Fill `model` from config.json and *.safetensors or pytorch_model*.bin, a file at a time.

    Everything that does not fit is listed at once. What the directory saw of the data is not
    written in it: step and tokens come back as None.
    """
    theirs, problems = read_json(directory / "config.json"), []
    for f in fields(ModelConfig):
        value, ours = theirs.get(f.name), getattr(model.config, f.name)
        if value is not None and value != ours and f.name != "initializer_range":
            problems.append(f"{f.name} is {value} there, {ours} in this config")
    files = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("pytorch_model*.bin"))
    weights, filled = dict(model.state_dict()), set()
    for file in files if not problems else []:
        if file.suffix == ".safetensors":
            try:
                from safetensors.torch import load_file
            except ImportError:
                raise SystemExit(f"{file} is read with safetensors: pip install safetensors.")
            tensors = load_file(file)
        else:
            tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        for name, tensor in tensors.items():
            if name not in weights:  # old exports carry the rotary table
                problems += [f"{name} is unknown"] * ("rotary_emb" not in name)
            elif weights[name].shape != tensor.shape:
                problems.append(f"{name} is {tuple(tensor.shape)} there,"
                                f" {tuple(weights[name].shape)} here")
            else:
                weights[name].copy_(tensor)
                filled.add(name)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    if not problems:
        problems = [f"{name} is missing" for name in weights if name not in filled | tied]
    if problems or not files:
        raise SystemExit(f"{directory} cannot be loaded: "
                         + ("; ".join(problems) or "it has no *.safetensors or *.bin file") + ".")
    return {"step": None, "tokens": None}


def resume(run: Run) -> list[str]:
    """Put the run where its newest usable checkpoint stands; returns what to say of it."""
    notes: list[str] = []
    c, found = run.config, checkpoints(run.dir)
    if c.resume == "false" and (found or (run.dir / "metrics.jsonl").exists()):
        raise SystemExit(f"{run.dir} already holds a run: delete it, or give another --run_dir.")
    if c.resume not in ("auto", "true", "false"):
        found = [Path(c.resume)]
    for path in reversed(found if c.resume != "false" else []):
        problem = problem_of(path)
        if not problem:
            return [*notes, restore(run, path)]
        if c.resume == str(path):
            raise SystemExit(f"{path} cannot be resumed: {problem}.")
        notes.append(f"Passing over {path}: {problem}.")
    if c.resume == "true":
        raise SystemExit(f"{run.dir} has no usable checkpoint to resume.")
    if c.init_from:
        source = load_weights(run.model, c.init_from)
        run.started_from = {"path": c.init_from, "step": source["step"], "tokens": source["tokens"],
                            "data_sha256": source.get("data_sha256"),
                            "sha256": identity(Path(c.init_from))}
        notes.append(f"Weights from {c.init_from}.")
    return notes


def restore(run: Run, path: Path) -> str:
    """Weights, optimizer, random state and position from a verified checkpoint."""
    c, manifest = run.config, read_json(path / "manifest.json")
    for key in ("global_batch_size", "seq_len", "seed"):
        if manifest["config"][key] != getattr(c, key):
            raise SystemExit(f"{path} was trained with {key} = {manifest['config'][key]}, now it is"
                             f" {getattr(c, key)}: that is another run; give another --run_dir.")
    if manifest["data_sha256"] != data_sha256(c.data_dir):
        raise SystemExit(f"{path} was trained on other data than {c.data_dir} holds now (the"
                         " manifests differ); give another --run_dir.")
    load_weights(run.model, path)
    state = train_state(run)
    dcp.load(state, checkpoint_id=path / "train_state", no_dist=True)
    dcp_state.set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"])
    torch.set_rng_state(state["rng"])
    if "rng_cuda" in state:
        torch.cuda.set_rng_state(state["rng_cuda"], run.device)
    run.step, run.started_from = manifest["step"], manifest["started_from"]
    now = json.loads(json.dumps(asdict(c)))
    changed = [f"{k} {v!r} -> {now.get(k)!r}" for k, v in manifest["config"].items()
               if now.get(k) != v and k != "resume"]
    return (f"Resuming {path}, step {run.step}."
            + (f" Changed: {', '.join(changed)}." if changed else ""))


# ---------------------------------------------------------------------------------------------
# the loop


def train(run: Run, total: int) -> None:
    """Step until the data, max_steps or a signal ends it; checkpoint at the end of each chunk."""
    c, last = run.config, min(total, run.config.max_steps or total)
    bar = tqdm(total=last, initial=run.step, unit="step", disable=None, dynamic_ncols=True)
    metrics, opened = open(run.dir / "metrics.jsonl", "a", encoding="utf-8"), -1
    while run.step < last and not run.stop:
        begin = time.perf_counter()
        chunk, at = prepare_data.locate(run.manifest, c.global_batch_size, run.step)
        if chunk != opened:
            chunk_rows = prepare_data.open_chunk(c.data_dir, run.manifest, chunk)
            order, opened = prepare_data.row_order(c.seed, chunk, len(chunk_rows)), chunk
        ids = order[at * c.global_batch_size : (at + 1) * c.global_batch_size]
        rows = chunk_rows[ids]  # the only rows read from the disk
        loaded = time.perf_counter()
        try:
            record = train_step(run, rows, learning_rate(c, run.step + 1, total))
        except NonFinite as error:
            stop_on_nonfinite(run, error, chunk, ids)
        run.step += 1
        speed = c.tokens_per_step / (time.perf_counter() - begin)
        record = {"step": run.step, "chunk": chunk, "tokens": run.step * c.tokens_per_step,
                  **record, "tokens_per_s": round(speed), "mfu": mfu(run, speed),
                  "memory_gb": memory_gb(run), "data_s": round(loaded - begin, 5)}
        chunk_done = run.step == total or prepare_data.locate(
            run.manifest, c.global_batch_size, run.step)[0] != chunk
        if chunk_done or run.step == last or c.eval_interval and run.step % c.eval_interval == 0:
            record["valid"] = validate(run.model, c.data_dir, c.eval_rows, c.micro_batch_size)
        metrics.write(json.dumps(record) + "\n")
        metrics.flush()
        bar.update()
        bar.set_postfix_str(f"loss {record['loss']:.3f}, {speed:,.0f} tok/s,"
                            f" mfu {record['mfu']:.1%}")
        if run.step <= 3 or "valid" in record:
            run.log(summary(record, last))
        if chunk_done:
            if c.sample_tokens:
                text = continue_text(c, run.model, c.sample_prompt, c.sample_tokens)
                run.log(f"sample: {text!r}")
            save_checkpoint(run, f"ckpt_{chunk:03d}")
        elif (run.stop or run.step == last
              or 0 < c.save_minutes * 60 < time.monotonic() - run.saved_at):
            save_checkpoint(run, f"step_{run.step:07d}")
    bar.close()


def stop_on_nonfinite(run: Run, error: NonFinite, chunk: int, ids: np.ndarray) -> None:
    shown = " ".join(map(str, ids[:32])) + (" ..." if len(ids) > 32 else "")
    raise SystemExit(
        f"Step {run.step + 1}: {error}; the update was not made. It was chunk {chunk}, rows {shown}"
        f" (prepare_data.py CONFIG --show_step={run.step + 1} prints them). The newest checkpoint"
        f" is {(checkpoints(run.dir) or ['none'])[-1]}; the same command goes on from there.")


def summary(record: dict[str, Any], last: int) -> str:
    """One line of a step: what a person wants to see go down, and how fast."""
    text = (f"step {record['step']}/{last}  chunk {record['chunk']}  loss {record['loss']:.4f}"
            f"  grad norm {record['grad_norm']:.2f}  lr {record['lr']:.2e}"
            f"  {record['tokens_per_s']:,} tok/s")
    if "valid" in record:
        text += "  bits per byte: " + ", ".join(
            f"{name} {v['bits_per_byte']:.3f}" for name, v in record["valid"].items())
    return text


def continue_text(config: Config, model: LLaMA, prompt: str, n: int,
                  temperature: float = 0.0) -> str:
    """A prompt and n tokens after it, past the end of a document too; 0 = greedy."""
    tokenizer = prepare_data.load_tokenizer(config.data_dir)
    ids = tokenizer.encode(prompt).tolist() or [tokenizer.eos_id]
    new = model.generate([ids], n, temperature=temperature, top_p=0.95)
    return tokenizer.decode(ids + new[0])


def mfu(run: Run, speed: float) -> float:
    return round(speed * run.config.flops_per_token(run.config.seq_len) / run.peak_flops, 4)


def memory_gb(run: Run) -> float:
    """Peak memory of this process so far, GB (1e9 bytes): of the GPU, or resident on a CPU."""
    if run.device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(run.device) / 1e9, 3)
    import resource  # not on Windows, which has no use for it either
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


def describe(run: Run, total: int, backend: str) -> str:
    """The settings that are not the default, and every number that follows from them."""
    c, default = run.config, Config()
    memory = memory_estimate(c, run.model.dtype)
    chunk_steps = [chunk["rows"] // c.global_batch_size for chunk in run.manifest["chunks"]]
    per_token, last = c.flops_per_token(c.seq_len), min(total, c.max_steps or total)
    given = ", ".join(f"{k} = {v!r}" for k, v in asdict(c).items() if v != getattr(default, k))
    rows = {
        "settings": given + "; the rest as in configs/__init__.py",
        "parameters": f"{c.n_params:,}",
        "data": f"{c.data_dir}: {len(chunk_steps)} chunks of {min(chunk_steps)} to"
                f" {max(chunk_steps)} steps, {len(run.manifest['sources'])} sources",
        "tokens per step": f"{c.tokens_per_step:,} = {c.global_batch_size} rows of {c.seq_len};"
                           f" {c.accumulation_steps} micro-batches of {c.micro_batch_size}",
        "steps": f"{last:,} = {last * c.tokens_per_step:,} tokens",
        "FLOPs": f"{per_token:,} per token, {per_token * last * c.tokens_per_step:.3g} in all",
        "memory": f"about {sum(memory.values()) / 1e9:.2f} GB: " + ", ".join(
            f"{kind} {n / 1e9:.2f}" for kind, n in memory.items()),
        "compute": f"{device_name(run.device)}, {str(run.model.dtype)[6:]}, {backend} kernels,"
                   f" {torch.get_num_threads()} threads, peak {run.peak_flops / 1e12:.2f} TFLOP/s",
    }
    return "\n".join(f"{key:>16}: {value}" for key, value in rows.items())


def start(config: Config) -> tuple[Run, int]:
    """Everything a run needs before its first step: device, data, model, optimizer, position."""
    tune_cpu(config.threads)
    device, dtype = choose_device(config)
    manifest = prepare_data.load_manifest(config.data_dir)
    total = prepare_data.total_steps(manifest, config.global_batch_size)
    tokenizer = manifest["tokenizer"]
    if tokenizer["n_vocab"] > config.vocab_size or manifest["seq_len"] != config.seq_len:
        raise SystemExit(f"{config.data_dir} has {tokenizer['n_vocab']} token ids in rows of"
                         f" {manifest['seq_len']}, the model {config.vocab_size} in rows of"
                         f" {config.seq_len}: set vocab_size and seq_len alike, or prepare again.")
    if total == 0:
        raise SystemExit(f"No chunk of {config.data_dir} has the {config.global_batch_size} rows of"
                         " one step: lower global_batch_size, or prepare more data.")
    torch.manual_seed(config.seed)  # nothing draws from it today; saved and restored all the same
    with torch.device(device):
        model = LLaMA(config, dtype)
    model.init_weights(config.seed)
    if config.compile:
        for block in model.model.layers:
            block.compile()
    optimizer = torch.optim.AdamW(
        model.parameter_groups(), betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps, weight_decay=config.weight_decay, fused=True)
    run = Run(config, manifest, model, optimizer, device, peak_flops(config, device, dtype))
    return run, total


def main(argv: list[str]) -> None:
    config, _ = load(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SystemExit("train.py runs in one process for now: start it without torchrun.")
    backend = choose_kernels(config.kernels)
    run, total = start(config)
    run.dir.mkdir(parents=True, exist_ok=True)
    lock = only_one(run.dir)
    for half in run.dir.glob("*.tmp"):  # a save that a kill cut short
        shutil.rmtree(half) if half.is_dir() else half.unlink()
    notes = resume(run)
    last = min(total, config.max_steps or total)
    if run.step >= last:
        print(f"{run.dir} is finished: {run.step} steps,"
              f" {run.step * config.tokens_per_step:,} tokens.")
        return
    write_json(run.dir / "config.json", asdict(config))
    metrics = run.dir / "metrics.jsonl"  # steps that will be made again are dropped
    write_records(metrics, [r for r in read_records(metrics) if r["step"] <= run.step])
    for name in {"SIGINT", "SIGTERM", "SIGUSR1"} & set(dir(signal)):  # Windows has not all three
        signal.signal(getattr(signal, name), lambda number, _: setattr(
            run, "stop", signal.Signals(number).name))
    run.log("\n".join([*notes, describe(run, total, backend)]))
    train(run, total)
    if run.stop:
        run.log(f"{run.stop}: saved at step {run.step}. To go on: python train.py {' '.join(argv)}")
    else:
        run.log(f"Finished: {run.step} steps in {run.dir}.")
    lock.close()


# ---------------------------------------------------------------------------------------------
# files


def only_one(run_dir: Path) -> Any:
    """Hold a lock on the run directory; a sentence if another process has it."""
    lock = open(run_dir / "lock", "w")
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass  # Windows: nothing as simple there
    except OSError:
        raise SystemExit(f"{run_dir} is in use by another process; give another --run_dir.")
    return lock


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a line that a kill cut short is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add a line to a .jsonl file that others may be adding to, and a kill may have cut short."""
    with open(path, "a+b") as f:
        with contextlib.suppress(ImportError):  # Windows
            import fcntl
            fcntl.flock(f, fcntl.LOCK_EX)
        size = f.seek(0, os.SEEK_END)
        f.seek(max(0, size - 1))
        torn = f.read(1) not in (b"", b"\n")
        f.write(b"\n" * torn + json.dumps(record).encode() + b"\n")


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Replace a .jsonl file, so that what is appended next begins on a line of its own."""
    tmp = path.with_suffix(".tmp")
    tmp.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    tmp.replace(path)


def write_json(path: Path, value: Any) -> None:
    with open(path, "w", encoding="utf-8") as f:
        f.write(json.dumps(value, indent=1) + "\n")
        f.flush()
        os.fsync(f.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} if the file is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def digest(value: Any) -> str:
    """A hash of what JSON keeps of a value: {2: x} and {"2": x} are the same."""
    kept = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def data_sha256(data_dir: str) -> str:
    return sha256(Path(data_dir) / "manifest.json")


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def root_cause(error: BaseException) -> str:
    """The operating system's reason if there is one under torch's wrappers, in a few words."""
    if isinstance(error, dcp.api.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    inner: BaseException | None = error
    while inner and not (isinstance(inner, OSError) and inner.strerror):
        inner = inner.__cause__ or inner.__context__
    return inner.strerror if inner else f"{str(error).splitlines()[0]} (is the disk full?)"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def git_commit() -> str:
    """The commit of this code, with "+changes" if files differ from it; "" outside a checkout."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True,
                              text=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + "+changes" * bool(git("status", "--porcelain", "-uno"))
    except OSError:
        return ""


if __name__ == "__main__":
    main(sys.argv[1:])
