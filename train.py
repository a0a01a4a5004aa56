"""Train a model on prepared data, one checkpoint per chunk.

    python train.py configs/amber_tiny.py                      # go on where the run stands
    torchrun --nproc_per_node=8 train.py configs/amber_1b.py   # the same on the 8 GPUs of a node
    python train.py configs/amber_tiny.py --replay=7           # train chunk 7 again and compare
    python train.py configs/amber_7b.py --dry_run --world_size=224   # memory, time, disk; no GPU
    python train.py configs/amber_tiny.py --init_from=runs/amber_tiny/ckpt_009 --run_dir=runs/tuned

The clock is the optimizer step, counted from 1. Everything that happens at step N (its rows, its
learning rate) is a pure function of the config, N and the chunks skipped so far, so a run that was
stopped and resumed is the run that was not: bit for bit on CPUs. A signal (Ctrl-C, SIGTERM,
SIGUSR1) saves at the end of the step and stops. Layout of a run directory and of a checkpoint: see
README.md.
"""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dcp_state
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from tqdm import tqdm

import kernels
import prepare_data
from configs import Config, ModelConfig, load, nearest
from model import Block, LLaMA, is_hugging_face, load_hugging_face

# One process saves and loads without a process group, on purpose.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

PEAK_TFLOPS = {  # dense bf16 matmul, from the makers' data sheets
    "A100": 312, "A800": 312, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989,
    "H200": 989, "GH200": 989, "B200": 2250, "L40S": 362, "A10": 125, "RTX 4090": 165,
    "RTX 3090": 71,
}
# What selective activation checkpointing keeps of a block: products of matrices and attention.
KEPT_OPS = [getattr(torch.ops.aten, name).default for name in (
    "mm", "addmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention_for_cpu")] + [torch.ops.kernels.attention.default]


@dataclass
class Run:
    """What a run in progress consists of; `step` and `skipped` are all the position there is."""

    config: Config
    manifest: dict  # of the data
    model: LLaMA
    computes: nn.Module  # the model, or DDP around it
    optimizer: torch.optim.AdamW
    device: torch.device
    peak_flops: float  # per second, of all devices
    watchdog: "Watchdog"
    step: int = 0  # optimizer steps done
    skipped: list[int] = field(default_factory=list)  # places in the sequence of chunks
    skipped_steps: set[int] = field(default_factory=set)
    started_from: dict = field(default_factory=dict)  # the checkpoint the weights came from, if any
    asked: str = ""  # name of the signal that asked this process to stop
    stop: str = ""  # why all processes stop after this step
    save_due: bool = False  # all processes save after this step
    saved_at: float = field(default_factory=time.monotonic)
    saving: Future | None = None  # the checkpoint being written
    saver: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    saver_group: Any = None  # its messages must not meet those of training

    @property
    def dir(self) -> Path:
        return Path(self.config.run_dir)

    def log(self, text: str) -> None:
        if rank() == 0:
            tqdm.write(text)
            with open(self.dir / "train.log", "a", encoding="utf-8") as f:
                f.write(text + "\n")

    def note(self, event: str, **what: Any) -> None:
        """Enter what happened to the run in its ledger."""
        if rank() == 0:
            append_record(self.dir / "ledger.jsonl", {
                "event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": self.step,
                **what})


# ---------------------------------------------------------------------------------------------
# processes


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def join(config: Config) -> "Watchdog":
    """Meet the other processes, if torchrun started this one; alone there is no process group."""
    if "RANK" not in os.environ or dist.is_initialized():
        return Watchdog(None, config.timeout_minutes)
    limit = timedelta(minutes=config.timeout_minutes)
    store, number, world = next(dist.rendezvous("env://", timeout=limit))
    # torchrun's store outlives a restart, with the addresses of processes that are gone.
    store = dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # The watchdog comes first: it knows a name where a collective only knows that it waited.
    dist.init_process_group(backend, store=store, rank=number, world_size=world, timeout=2 * limit)
    watchdog = Watchdog(store, config.timeout_minutes)
    watchdog.start()
    return watchdog


class Watchdog(threading.Thread):
    """Ends a process that has waited too long, and names the process that all wait for.

    Each leaves a note in torchrun's store every few seconds: how many places (`at`) it has passed,
    and where it is. A frozen process or a lost node leaves none; one that hangs is behind.
    """

    def __init__(self, store: dist.Store | None, minutes: float) -> None:
        super().__init__(daemon=True)
        self.store, self.limit = store, 60 * minutes
        self.passed, self.place, self.since = 0, "the start", time.time()

    def at(self, place: str) -> None:
        self.passed, self.place, self.since = self.passed + 1, place, time.time()

    def run(self) -> None:
        while True:
            note = {"passed": self.passed, "place": self.place, "host": socket.gethostname(),
                    "time": time.time()}
            self.store.set(f"at/{rank()}", json.dumps(note))
            if note["time"] - self.since > self.limit:
                stuck, text = self.verdict()
                if rank() == min(set(range(world_size())) - set(stuck), default=0):
                    print(text, file=sys.stderr, flush=True)
                else:
                    time.sleep(5)  # torchrun ends all when one ends: let that one speak
                os._exit(1)
            time.sleep(min(5.0, self.limit / 10))

    def verdict(self) -> tuple[list[int], str]:
        notes = {r: json.loads(self.store.get(f"at/{r}")) for r in range(world_size())
                 if self.store.check([f"at/{r}"])}
        silent = [r for r in range(world_size())
                  if r not in notes or time.time() - notes[r]["time"] > self.limit / 2]
        least = min(n["passed"] for n in notes.values())
        behind = [r for r, n in notes.items() if n["passed"] == least]
        stuck = silent or (behind if len(behind) < world_size() else [])
        names = ", ".join(f"rank {r} on {notes[r]['host']} (last heard of at {notes[r]['place']})"
                          if r in notes else f"rank {r}" for r in stuck)
        return stuck, (f"No progress for {self.limit / 60:g} minutes, at {self.place}. Stuck: "
                       + (names or "all at the same place") + ". The same command goes on from the"
                       " newest checkpoint.")


def everyone(value: Any, group: Any = None) -> list[Any]:
    """What each process has as `value`, by rank; all of them must call this."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value, group)
    return values


def first_does(work: Callable[[], Any], group: Any = None) -> None:
    """Run `work` in the first process; an error there is raised in all."""
    error = None
    if rank() == 0:
        try:
            work()
        except (OSError, SystemExit) as caught:
            error = caught
    if error := everyone(error, group)[0]:
        raise error


# ---------------------------------------------------------------------------------------------
# the machine


def choose_device(config: Config) -> tuple[torch.device, torch.dtype]:
    """The device and the type of the arithmetic; "auto" is bfloat16 where the chip has it.

    Under torchrun "cuda" is the GPU of this process's number on its node.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"device = {name!r} cannot be used here: {str(error).splitlines()[0]}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
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


def build(config: Config, device: torch.device, dtype: torch.dtype,
          mesh: DeviceMesh | None) -> LLaMA:
    """The model, sharded over a mesh of processes if there is one; no values in its weights yet.

    What is to be sharded is made on the meta device and only then given memory: no process ever
    holds more than its share.
    """
    with torch.device("meta" if mesh else device):
        model = LLaMA(config, dtype)
    for block in model.model.layers:
        recompute(block, config.activation_checkpointing)
        if config.compile:
            block.compile()
    if mesh:  # FSDP2, a group per block: float32 shards, gathered in `dtype`
        # The inputs are as they should be: the rotary table must stay float32.
        policy = MixedPrecisionPolicy(dtype, getattr(torch, config.reduce_dtype),
                                      cast_forward_inputs=False)
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        model.allocate(device)
    return model


def recompute(block: nn.Module, kind: str) -> None:
    """Activation checkpointing: "full" keeps a block's input alone, "selective" also KEPT_OPS."""
    how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if kind == "selective":
        how["context_fn"] = functools.partial(create_selective_checkpoint_contexts, KEPT_OPS)
    if kind != "none":
        block.forward = functools.partial(checkpoint, block.forward, **how)


def shard_size(config: Config, world: int) -> int:
    """Processes that share one copy of weights, gradients and optimizer state."""
    if config.parallel == "fsdp":
        return world
    if config.parallel == "ddp":
        return 1
    size = min(world, config.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", 8)))
    if world % size:
        raise SystemExit(f"hsdp: {world} processes cannot be divided into groups of {size};"
                         " give a --shard_size that divides them.")
    return size


def mesh_of(config: Config, device_type: str) -> DeviceMesh | None:
    """The processes as FSDP sees them: a line, or hsdp's groups; None without FSDP."""
    if not dist.is_initialized() or config.parallel == "ddp":
        return None
    size = shard_size(config, world_size())
    if config.parallel == "fsdp":
        return init_device_mesh(device_type, (size,))
    return init_device_mesh(device_type, (world_size() // size, size),
                            mesh_dim_names=("replicate", "shard"))


def replicate(model: LLaMA, config: Config, device: torch.device) -> nn.Module:
    """DDP around the model, if that is what was asked for."""
    if not dist.is_initialized() or config.parallel != "ddp":
        return model
    wrapped = DistributedDataParallel(model, [device] if device.type == "cuda" else None,
                                      gradient_as_bucket_view=True)
    if config.reduce_dtype == "bfloat16":  # under its own name the hook is refused on CPUs
        wrapped.register_comm_hook(None, lambda state, bucket: default_hooks.bf16_compress_hook(
            state, bucket))
    return wrapped


def make_optimizer(config: Config, model: LLaMA) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameter_groups(),
                             betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps,
                             weight_decay=config.weight_decay, fused=True)


def memory_estimate(config: Config, dtype: torch.dtype, world: int = 1,
                    wrapped: bool = False) -> dict[str, float]:
    """Bytes of training on one device, by kind, by formula; `--dry_run` measures the same.

    world: processes; wrapped: sharded or replicated by torchrun, even if it is one. Activations
    are the tensors a block saves for its backward pass, taken from one block on the meta device.
    Where gradients and activations trade places, the worse end of the backward pass counts.
    """
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
    parameters = {p.untyped_storage()._cdata for p in block.parameters()}
    saved = sum(t.untyped_storage().nbytes() for i, t in kept.items() if i not in parameters)
    matrices = [p for p in block.parameters() if p.dim() == 2]
    in_block = sum(p.numel() for p in matrices)
    if size < 4:  # the matrices' copies, counted apart below
        saved -= size * in_block
    heads = config.num_attention_heads * config.head_dim
    held = {"none": saved, "full": x.numel() * size, "selective": rows * length * size * (
        config.hidden_size + heads + sum(p.shape[0] for p in matrices))}
    each, layers = held[config.activation_checkpointing], config.num_hidden_layers
    states = 4 * config.n_params / shard_size(config, world)
    if wrapped and config.parallel != "ddp":  # what is outside the blocks, and two of them
        used = size * (config.n_params - (layers - 2) * in_block)
        buffers = (4 + size) * in_block
    else:
        used, buffers = size * config.n_params * (size < 4), 0
    accumulated = states * (config.global_batch_size > config.micro_batch_size * world)
    hidden, head = rows * length * config.hidden_size, config.vocab_size * config.hidden_size
    logits = min(8192, rows * length) * config.vocab_size  # kernels/cross_entropy.py's chunk
    always = {"weights": states, "AdamW": 2 * states, "weights in use": used,
              "temporary": 4 * size * hidden}
    again = each < saved  # a block is computed once more where its backward pass begins
    begin = always | {"gradients": accumulated, "gradient buffers": buffers * again,
                      "activations": layers * each + saved * again,
                      "temporary": size * (4 * hidden + logits + head) + 4 * head}
    end = always | {"gradients": states, "gradient buffers": buffers,
                    "activations": each + saved * again}
    return max(begin, end, key=lambda kinds: sum(kinds.values()))


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
    """A loss or gradient that is not a number, met before the update was made.

    `bad` (rows of this process,): where the loss was not finite.
    """

    def __init__(self, text: str, bad: np.ndarray) -> None:
        super().__init__(text)
        self.bad = bad


class SkipChunk(Exception):
    """The run has to go back to step `begin`, where the chunk that its ledger now skips began."""

    def __init__(self, text: str, begin: int) -> None:
        super().__init__(text)
        self.begin = begin


@contextlib.contextmanager
def synchronized(run: Run, last: bool) -> Iterator[None]:
    """Gradients of a micro-batch are exchanged at the `last` one only, where that saves anything.

    FSDP's reduce-scatter is not put off: what it saves is time, but each process would hold the
    gradients of the whole model. HSDP puts off the all-reduce between the groups.
    """
    if isinstance(run.computes, DistributedDataParallel) and not last:
        with run.computes.no_sync():
            yield
        return
    if run.config.parallel == "hsdp" and dist.is_initialized():
        run.model.set_requires_all_reduce(last)
    yield


def train_step(run: Run, rows: np.ndarray, rate: float) -> dict[str, Any]:
    """One update from this process's rows of a global batch: loss, loss by source, gradient norm.

    The loss is the mean over every target of the global batch, in nats. Raises NonFinite in every
    process if a loss or the gradient norm of any is not finite, before the update.
    """
    c, n, losses = run.config, run.config.micro_batch_size, []
    for begin in range(0, len(rows), n):
        run.watchdog.at(f"step {run.step + 1}, micro-batch {begin // n + 1}")
        part = rows[begin : begin + n]
        inputs, targets = to_tensors(part, run.device)
        with synchronized(run, last=begin + n >= len(rows)):
            loss, each = run.computes(inputs, targets)
            # DDP and FSDP take the mean over processes, which all have as many rows.
            (loss * (len(part) / len(rows))).backward()
        losses.append(each.mean(1))
    run.watchdog.at(f"step {run.step + 1}, gradient norm")
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), c.grad_clip)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    names, losses = [s["name"] for s in run.manifest["sources"]], torch.cat(losses)
    due = 0 < c.save_minutes * 60 < time.monotonic() - run.saved_at
    sums = torch.zeros(2 * len(names) + 2, device=run.device)
    source = torch.from_numpy(rows["source"].astype(np.int64)).to(run.device)
    sums.index_add_(0, source, losses)
    sums.index_add_(0, source + len(names), torch.ones_like(losses))
    sums[-2], sums[-1] = bool(run.asked), due
    if dist.is_initialized():
        dist.all_reduce(sums)
    # One look at the device per step: all that is logged or decided on, in a single copy.
    *sums, norm = torch.cat([sums, norm.reshape(1)]).tolist()
    by_source, counts, (stop, due) = sums[: len(names)], sums[len(names) : -2], sums[-2:]
    loss = sum(by_source) / sum(counts)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        run.optimizer.zero_grad(set_to_none=True)
        raise NonFinite(f"loss {loss}, gradient norm {norm}", ~losses.isfinite().cpu().numpy())
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.save_due = due > 0
    if stop:
        run.stop = run.asked or "A signal to another process"
    return {"loss": loss, "loss_by_source": {name: round(s / n, 5) for name, s, n in
                                             zip(names, by_source, counts) if n},
            "grad_norm": norm, "lr": rate}


@torch.no_grad()
def validate(model: LLaMA, data_dir: str, limit: int | None, batch: int,
             watchdog: "Watchdog | None" = None) -> dict[str, dict[str, float]]:
    """Loss in nats per token and bits per byte of the held-out rows of each source.

    The first `limit` rows of each (None = all), shared between the processes; any `batch` gives
    the same figures. Nothing is changed: not the random state, not the data order.
    """
    manifest = prepare_data.load_manifest(data_dir)
    token_bytes = prepare_data.load_tokenizer(data_dir).token_bytes.astype(np.int64)
    device, results = model.lm_head.weight.device, {}
    for name in [file["source"] for file in manifest["valid"]]:
        rows = prepare_data.open_valid(data_dir, manifest, name)[:limit]
        sums = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
        for begin in range(0, len(rows), batch * world_size()):
            if watchdog:
                watchdog.at(f"validation on {name}")
            mine = rows[begin + batch * rank() :][:batch]
            # A process without rows of its own computes too: FSDP gathers weights from all.
            inputs, targets = to_tensors(mine if len(mine) else rows[:1], device)
            nats = model(inputs, targets)[1][: len(mine)].double().sum()
            targets = targets[: len(mine)].cpu()
            sums += torch.stack([nats.cpu(), torch.tensor(float(targets.numel())),
                                 torch.tensor(float(token_bytes[targets].sum()))])
        nats, tokens, n_bytes = (math.fsum(s) for s in zip(*everyone(sums.tolist())))
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
    """Save a copy of the present state under `name`; training may go on while it is written."""
    run.watchdog.at(f"saving {name}")
    finish_save(run)  # of the one before
    state = {"model": run.model.state_dict(), "train_state": train_state(run)}
    if run.config.async_save:
        state = tree_map_only(Tensor, lambda t: t.detach().to("cpu", copy=True), state)
    # What it says of itself is settled now: the run moves on.
    run.saving = run.saver.submit(write_checkpoint, run, name, state, about(run))
    run.saved_at = time.monotonic()
    if not run.config.async_save:
        finish_save(run)


def finish_save(run: Run) -> None:
    """Wait for the checkpoint being written; raises SystemExit if it could not be."""
    if run.saving:
        saving, run.saving = run.saving, None
        saving.result()


def write_checkpoint(run: Run, name: str, state: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Write a checkpoint that is there whole or not at all: fsync, manifest last, rename."""
    final, tmp, group = run.dir / name, run.dir / f"{name}.tmp", run.saver_group

    def publish() -> None:
        write_json(tmp / "manifest.json", {**manifest, "sha256": digest(manifest)})
        shutil.rmtree(final, ignore_errors=True)
        tmp.rename(final)
        fsync(run.dir)
        drop_old_checkpoints(run)

    try:
        first_does(lambda: (shutil.rmtree(tmp, ignore_errors=True), tmp.mkdir(parents=True)), group)
        for part, values in state.items():
            dcp.save(values, checkpoint_id=tmp / part, process_group=group,
                     no_dist=not dist.is_initialized())
        hashes, written = {}, sorted(p for p in tmp.glob("*/*") if p.is_file())
        for path in written[rank() :: world_size()]:
            fsync(path)
            hashes[str(path.relative_to(tmp))] = sha256(path)
        for theirs in everyone(hashes, group):
            manifest["files"] |= theirs
        first_does(publish, group)
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        # A full disk arrives here in many clothes, from Python, C++ and torch's own wrapper.
        shutil.rmtree(tmp, ignore_errors=True)
        raise SystemExit(f"Could not save {final}: {root_cause(error)}. The checkpoints before it"
                         " are untouched; make room and start the same command again.")


def about(run: Run) -> dict[str, Any]:
    """What a checkpoint says of itself; the hashes of its files are added when they are written."""
    c, data = run.config, run.manifest
    place, _ = prepare_data.locate(data, c.global_batch_size, max(0, run.step - 1), run.skipped)
    chunk = place % len(data["chunks"])
    return {
        "step": run.step,
        "tokens": run.step * c.tokens_per_step,
        "chunk": chunk,  # the one being trained, or just finished
        "chunk_sha256": data["chunks"][chunk]["sha256"],
        "skipped": run.skipped,
        "skipped_steps": sorted(s for s in run.skipped_steps if s <= run.step),
        "data_sha256": data_sha256(c.data_dir),
        "started_from": run.started_from,
        "config": asdict(c),
        "compute": compute(run),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "numpy": np.__version__},
        "git_commit": git_commit(),
        "files": {},
    }


def compute(run: Run) -> dict[str, Any]:
    """What decides the last bits of the arithmetic beside the settings."""
    return {"device": device_name(run.device), "dtype": str(run.model.dtype)[6:],
            "threads": torch.get_num_threads(), "processes": world_size()}


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
    """Why a checkpoint cannot be used, or "": every file under `need` is there and has its hash.

    Several processes share the reading, and all get the same answer.
    """
    return next(filter(None, everyone(problem_of_share(checkpoint, need))), "")


def problem_of_share(checkpoint: Path, need: tuple[str, ...]) -> str:
    if is_hugging_face(checkpoint):
        return "" if need == ("model",) else "a Hugging Face directory has no training state"
    manifest = read_json(checkpoint / "manifest.json")
    if manifest.pop("sha256", None) != digest(manifest):
        return "manifest.json is missing or damaged"
    files = {n: h for n, h in manifest["files"].items() if n.split("/")[0] in need}
    for name, expected in list(files.items())[rank() :: world_size()]:
        path = checkpoint / name
        if not path.exists():
            gone = not path.parent.exists()
            return f"{path.parent.name if gone else name} is missing"
        if sha256(path) != expected:
            return f"{name} is damaged (its sha256 is not the one in manifest.json)"
    return ""


def load_weights(model: LLaMA, checkpoint: str | Path) -> dict[str, Any]:
    """Fill `model`, sharded or not, from a checkpoint directory and return its manifest."""
    checkpoint = Path(checkpoint)
    if is_hugging_face(checkpoint):
        load_hugging_face(model, checkpoint)
        return {"step": None, "tokens": None}  # what it saw of the data is not written there
    if problem := problem_of(checkpoint, ("model",)):
        raise SystemExit(f"{checkpoint} is not a usable checkpoint: {problem}.")
    return fill_weights(model, checkpoint)


def fill_weights(model: LLaMA, checkpoint: Path) -> dict[str, Any]:
    """`load_weights` from a checkpoint that is known to be whole."""
    manifest = read_json(checkpoint / "manifest.json")
    for f in fields(ModelConfig):  # a setting younger than the checkpoint had its default then
        theirs, ours = manifest["config"].get(f.name, f.default), getattr(model.config, f.name)
        if theirs != ours and f.name != "initializer_range":
            raise SystemExit(f"{checkpoint} has {f.name} = {theirs}, this config {ours}.")
    dcp.load(model.state_dict(), checkpoint_id=checkpoint / "model",
             no_dist=not dist.is_initialized())
    return manifest


def identity(checkpoint: Path) -> str:
    """A hash that changes with the weights: of the manifest, or of a foreign directory's list."""
    if not is_hugging_face(checkpoint):
        return sha256(checkpoint / "manifest.json")
    return digest([(p.name, p.stat().st_size, p.stat().st_mtime_ns)
                   for p in sorted(checkpoint.iterdir())])


def resume(run: Run) -> list[str]:
    """Put the run where its newest usable checkpoint stands; returns what to say of it."""
    notes: list[str] = []
    c, found = run.config, everyone(checkpoints(run.dir))[0]
    # torchrun starts the same command again after a failure, on the run it has begun.
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    choice = "auto" if c.resume == "false" and restarted else c.resume
    if choice == "false" and (found or (run.dir / "metrics.jsonl").exists()):
        raise SystemExit(f"{run.dir} already holds a run: delete it, or give another --run_dir.")
    if choice not in ("auto", "true", "false"):
        found = [Path(choice)]
    read_ledger(run)
    for path in reversed(found if choice != "false" else []):
        run.watchdog.at(f"verifying {path}")
        problem = problem_of(path)
        if not problem:
            return [*notes, restore(run, path)]
        if choice == str(path):
            raise SystemExit(f"{path} cannot be resumed: {problem}.")
        notes.append(f"Passing over {path}: {problem}.")
    if choice == "true":
        raise SystemExit(f"{run.dir} has no usable checkpoint to resume.")
    if c.init_from:
        source = load_weights(run.model, c.init_from)
        run.started_from = {"path": c.init_from, "step": source["step"], "tokens": source["tokens"],
                            "data_sha256": source.get("data_sha256"),
                            "sha256": identity(Path(c.init_from))}
        notes.append(f"Weights from {c.init_from}.")
    else:
        run.model.init_weights(c.seed)
    return notes


def read_ledger(run: Run) -> None:
    """What the run is to skip, as the first process finds it in the ledger."""
    run.skipped = everyone(prepare_data.skipped_places(run.dir))[0]
    records = everyone(read_records(run.dir / "ledger.jsonl"))[0]
    run.skipped_steps = {  # of a chunk that was left out later, the step is another one now
        r["step"] + 1 for r in records
        if r["event"] == "skip_step" and r.get("place") not in run.skipped}


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
    fill_weights(run.model, path)
    state = train_state(run)
    dcp.load(state, checkpoint_id=path / "train_state", no_dist=not dist.is_initialized())
    dcp_state.set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"])
    torch.set_rng_state(state["rng"])
    if "rng_cuda" in state:
        torch.cuda.set_rng_state(state["rng_cuda"], run.device)
    run.step, run.started_from = manifest["step"], manifest["started_from"]
    now = json.loads(json.dumps(asdict(c)))
    changed = [f"{k} {v!r} -> {now.get(k)!r}" for k, v in manifest["config"].items()
               if now.get(k) != v and k != "resume"]
    changed += [f"{k} {v!r} -> {compute(run)[k]!r}" for k, v in manifest["compute"].items()
                if compute(run).get(k) != v]
    return (f"Resuming {path}, step {run.step}."
            + (f" Changed: {', '.join(changed)}." if changed else ""))


# ---------------------------------------------------------------------------------------------
# the loop


def steps(run: Run, last: int) -> Iterator[dict[str, Any]]:
    """Make optimizer steps until `last`; yields the record of each when it is made."""
    c, total, opened = run.config, total_steps(run), None
    while run.step < last:
        begin = time.perf_counter()
        run.watchdog.at(f"step {run.step + 1}, reading rows")
        place, at = prepare_data.locate(run.manifest, c.global_batch_size, run.step, run.skipped)
        chunk = place % len(run.manifest["chunks"])
        if place != opened:
            chunk_rows = prepare_data.open_chunk(c.data_dir, run.manifest, chunk)
            order, opened = prepare_data.row_order(c.seed, chunk, len(chunk_rows)), place
        ids = order[at * c.global_batch_size : (at + 1) * c.global_batch_size]
        mine = np.array_split(ids, world_size())[rank()]
        rows = chunk_rows[mine]  # the only rows read from the disk
        loaded = time.perf_counter()
        record: dict[str, Any] = {"skipped": True}
        if run.step + 1 not in run.skipped_steps:
            try:
                record = train_step(run, rows, learning_rate(c, run.step + 1, total))
            except NonFinite as error:
                on_nonfinite(run, error, place, at, mine, rows["source"])
        run.step += 1
        speed = c.tokens_per_step / (time.perf_counter() - begin)
        yield {"step": run.step, "chunk": chunk, "tokens": run.step * c.tokens_per_step, **record,
               "tokens_per_s": round(speed), "mfu": mfu(run, speed), "memory_gb": memory_gb(run),
               "data_s": round(loaded - begin, 5)}


def on_nonfinite(run: Run, error: NonFinite, place: int, at: int, ids: np.ndarray,
                 sources: np.ndarray) -> None:
    """Do what the config says of a step that is not finite; every process comes here."""
    policy, chunk = run.config.on_nonfinite, place % len(run.manifest["chunks"])
    names = [s["name"] for s in run.manifest["sources"]]
    found = everyone([(int(i), names[s]) for i, s in zip(ids[error.bad], sources[error.bad])])
    culprits = {f"rank {r}": rows for r, rows in enumerate(found) if rows}
    shown = "; ".join(f"{who}: " + ", ".join(f"row {i} ({name})" for i, name in rows[:8])
                      + ", ..." * (len(rows) > 8) for who, rows in culprits.items())
    number = run.step + 1
    text = (f"Step {number}: {error}; the update was not made. It was chunk {chunk}; "
            + (f"the loss is not finite on {shown}"
               if shown else "every loss was finite, the gradient was not")
            + f" (prepare_data.py CONFIG --show_step={number} prints the step's rows).")
    finish_save(run)
    newest = (checkpoints(run.dir) or ["none"])[-1]
    if policy == "stop":
        raise SystemExit(
            f"{text} The newest checkpoint is {newest}; the same command goes on from there,"
            " --on_nonfinite=skip_step or =skip_chunk leaves out the step or the chunk.")
    run.log(text)
    run.note(policy, place=place, chunk=chunk, reason=str(error), rows=culprits)
    if policy == "skip_step":
        run.skipped_steps.add(number)
        run.log(f"Step {number} is left out.")
        return
    everyone(None)  # the ledger is written
    raise SkipChunk(f"Chunk {chunk} is left out; back to the step before it, {run.step - at}.",
                    run.step - at)


def total_steps(run: Run) -> int:
    """Steps of the schedule: those of all the data, whatever is skipped and made up for."""
    return prepare_data.total_steps(run.manifest, run.config.global_batch_size)


def last_step(run: Run, stopped: bool = True) -> int:
    """Where the run ends: with its schedule or, without make_up, its good chunks; or max_steps."""
    c, end = run.config, total_steps(run)
    if not c.make_up:
        chunks = run.manifest["chunks"]
        end -= sum(chunks[p]["rows"] // c.global_batch_size for p in run.skipped)
    return min(end, c.max_steps or end) if stopped else end


def train(run: Run) -> None:
    """Step until the data, max_steps or a signal ends it; checkpoint at the end of each chunk."""
    c, end, last = run.config, last_step(run, stopped=False), last_step(run)
    bar = tqdm(total=last, initial=run.step, unit="step", dynamic_ncols=True,
               disable=True if rank() else None)
    metrics = open(run.dir / "metrics.jsonl", "a", encoding="utf-8") if rank() == 0 else None
    place = functools.partial(prepare_data.locate, run.manifest, c.global_batch_size)
    for record in steps(run, last):
        here = place(run.step - 1, run.skipped)[0]
        chunk_done = run.step == end or place(run.step, run.skipped)[0] != here
        if chunk_done or run.step == last or c.eval_interval and run.step % c.eval_interval == 0:
            record["valid"] = validate(run.model, c.data_dir, c.eval_rows, c.micro_batch_size,
                                       run.watchdog)
        if metrics:
            metrics.write(json.dumps(record) + "\n")
            metrics.flush()
        bar.update()
        bar.set_postfix_str(f"loss {record.get('loss', math.nan):.3f},"
                            f" {record['tokens_per_s']:,} tok/s, mfu {record['mfu']:.1%}")
        if run.step <= 3 or "valid" in record:
            run.log(summary(record, last))
        if chunk_done and c.sample_tokens:
            text = continue_text(c, run.model, c.sample_prompt, c.sample_tokens)
            run.log(f"sample: {text!r}")
        if chunk_done:
            save_checkpoint(run, f"ckpt_{here:03d}")
        elif run.stop or run.step == last or run.save_due:
            save_checkpoint(run, f"step_{run.step:07d}")
        if run.saving and run.saving.done():
            finish_save(run)
        if run.stop:
            break
    run.watchdog.at("the last save")
    finish_save(run)
    bar.close()


def summary(record: dict[str, Any], last: int) -> str:
    """One line of a step: what a person wants to see go down, and how fast."""
    text = f"step {record['step']}/{last}  chunk {record['chunk']}  "
    if "skipped" in record:
        text += "left out"
    else:
        text += (f"loss {record['loss']:.4f}  grad norm {record['grad_norm']:.2f}"
                 f"  lr {record['lr']:.2e}  {record['tokens_per_s']:,} tok/s")
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


def facts(config: Config, manifest: dict[str, Any] | None, world: int
          ) -> tuple[dict[str, str], int]:
    """What a run comes to before it begins, and its steps; without data, by n_chunks."""
    c, per_token = config, config.flops_per_token(config.seq_len)
    sizes = [config.rows_per_chunk // config.global_batch_size] * config.n_chunks
    if manifest:
        sizes = [chunk["rows"] // c.global_batch_size for chunk in manifest["chunks"]]
    last = min(sum(sizes), c.max_steps or sum(sizes))
    how = f" x {world} processes, {c.parallel}" if world > 1 else ""
    if world > 1 and c.parallel == "hsdp":
        how += f" in groups of {shard_size(c, world)}"
    given = ", ".join(f"{k} = {v!r}" for k, v in asdict(c).items() if v != getattr(Config(), k))
    rows = {
        "settings": given + "; the rest as in configs/__init__.py",
        "parameters": f"{c.n_params:,}",
        "data": f"{c.data_dir}: {len(sizes)} chunks"
                + (f" of {min(sizes)} to {max(sizes)} steps" if last else "")
                + ("" if manifest else ", not prepared yet")
                + ("" if last else ": how many steps they hold is not known"),
        "tokens per step": f"{c.tokens_per_step:,} = {c.global_batch_size} rows of {c.seq_len};"
                           f" {micro_batches(c, world)} micro-batches of {c.micro_batch_size}{how}",
        "steps": f"{last:,} = {last * c.tokens_per_step:,} tokens",
        "FLOPs": f"{per_token:,} per token, {per_token * last * c.tokens_per_step:.3g} in all",
    }
    return rows, last


def describe(run: Run, backend: str) -> str:
    """Every number that follows from the settings, before the first step."""
    c, world = run.config, world_size()
    memory = memory_estimate(c, run.model.dtype, world, dist.is_initialized())
    rows = facts(c, run.manifest, world)[0] | {
        "memory": f"about {sum(memory.values()) / 1e9:.2f} GB per process: " + ", ".join(
            f"{kind} {n / 1e9:.2f}" for kind, n in memory.items() if n),
        "compute": f"{device_name(run.device)}, {str(run.model.dtype)[6:]}, {backend} kernels,"
                   f" {torch.get_num_threads()} threads, peak {run.peak_flops / 1e12:.2f} TFLOP/s",
    }
    return "\n".join(f"{key:>16}: {value}" for key, value in rows.items())


def micro_batches(config: Config, world: int) -> int:
    """Micro-batches of a process in one optimizer step; SystemExit if they do not come out even."""
    unit = config.micro_batch_size * world
    if config.global_batch_size % unit:
        raise SystemExit(f"global_batch_size ({config.global_batch_size}) must be a multiple of"
                         f" micro_batch_size x processes ({config.micro_batch_size} x {world} ="
                         f" {unit}); {nearest(config.global_batch_size, unit)}.")
    return config.global_batch_size // unit


def data_for(config: Config) -> dict[str, Any]:
    """The manifest of the data; SystemExit if it cannot be trained on with this config."""
    manifest = prepare_data.load_manifest(config.data_dir)
    tokenizer = manifest["tokenizer"]
    if tokenizer["n_vocab"] > config.vocab_size or manifest["seq_len"] != config.seq_len:
        raise SystemExit(f"{config.data_dir} has {tokenizer['n_vocab']} token ids in rows of"
                         f" {manifest['seq_len']}, the model {config.vocab_size} in rows of"
                         f" {config.seq_len}: set vocab_size and seq_len alike, or prepare again.")
    if prepare_data.total_steps(manifest, config.global_batch_size) == 0:
        raise SystemExit(f"No chunk of {config.data_dir} has the {config.global_batch_size} rows of"
                         " one step: lower global_batch_size, or prepare more data.")
    return manifest


def start(config: Config, watchdog: "Watchdog") -> Run:
    """Everything a run needs before its first step but values in its weights."""
    tune_cpu(config.threads)
    device, dtype = choose_device(config)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(config.seed)  # nothing draws from it today; saved and restored all the same
    watchdog.at("building the model")
    model = build(config, device, dtype, mesh_of(config, device.type))
    run = Run(config, data_for(config), model, replicate(model, config, device),
              make_optimizer(config, model), device,
              peak_flops(config, device, dtype) * world_size(), watchdog)
    if dist.is_initialized():
        run.saver_group = dist.new_group(backend="gloo")
    return run


def main(argv: list[str]) -> None:
    config, flags = load(argv, replay=-1, dry_run=False, world_size=1, mfu=0.357)
    if flags["dry_run"]:
        print(dry_run(config, flags["world_size"], flags["mfu"]))
        return
    watchdog = join(config)
    backend = choose_kernels(config.kernels)
    if flags["replay"] >= 0:
        if (verdict := replay(config, flags["replay"], watchdog)) and rank() == 0:
            print(verdict)
        return
    data_for(config)
    micro_batches(config, world_size())
    home, held = Path(config.run_dir), []
    first_does(lambda: home.mkdir(parents=True, exist_ok=True))
    first_does(lambda: held.append(only_one(home)))
    first_does(lambda: remove_halves(home))
    while not attempt(config, watchdog, backend, " ".join(argv)):
        pass
    for lock in held:
        lock.close()


def attempt(config: Config, watchdog: "Watchdog", backend: str, argv: str) -> bool:
    """Go on with the run from where it stands; False if a chunk was skipped: then once more."""
    run = start(config, watchdog)
    notes = resume(run)
    if run.step >= last_step(run):
        if rank() == 0:
            print(f"{run.dir} is finished: {run.step} steps,"
                  f" {run.step * config.tokens_per_step:,} tokens.")
        return True
    pids = everyone(os.getpid())
    first_does(lambda: begin_records(run, pids))
    for name in {"SIGINT", "SIGTERM", "SIGUSR1"} & set(dir(signal)):  # Windows has not all three
        signal.signal(getattr(signal, name), lambda number, _: setattr(
            run, "asked", signal.Signals(number).name))
    run.log("\n".join([*notes, describe(run, backend)]))
    try:
        train(run)
    except SkipChunk as skip:
        run.log(str(skip))
        begin = skip.begin
        first_does(lambda: drop_after(run.dir, begin))
        return False
    if run.stop:
        run.log(f"{run.stop}: saved at step {run.step}. To go on: python train.py {argv}")
    else:
        run.log(f"Finished: {run.step} steps in {run.dir}.")
    return True


def begin_records(run: Run, pids: list[int]) -> None:
    """Settle what the run directory says before the first step of this process."""
    write_json(run.dir / "config.json", asdict(run.config))
    metrics = run.dir / "metrics.jsonl"  # steps that will be made again are dropped
    write_records(metrics, [r for r in read_records(metrics) if r["step"] <= run.step])
    run.note("start", **compute(run), pids=pids, started_from=run.started_from,
             git_commit=git_commit())


def remove_halves(home: Path) -> None:
    for half in home.glob("*.tmp"):  # a save that a kill cut short
        shutil.rmtree(half) if half.is_dir() else half.unlink()


def drop_after(home: Path, step: int) -> None:
    for path in checkpoints(home):
        if read_json(path / "manifest.json").get("step", 0) > step:
            shutil.rmtree(path)


# ---------------------------------------------------------------------------------------------
# replay: is a checkpoint what its chunk makes of the checkpoint before?


def replay(config: Config, place: int, watchdog: "Watchdog") -> str:
    """Train chunk `place` again from the checkpoint before it and compare with the one after it.

    Says whether they are identical, bit for bit; SystemExit with the first tensor that differs and
    by how much. Settings, and a CPU's threads, are those the checkpoint names; nothing is written.
    """
    home = Path(config.run_dir)
    after, before = home / f"ckpt_{place:03d}", Path("the initial weights")
    if problem := problem_of(after, ("model",)):
        raise SystemExit(f"{after} cannot be replayed: {problem}.")
    manifest = read_json(after / "manifest.json")
    here = {"name", "data_dir", "run_dir", "device", "kernels", "resume", "init_from"}
    settings = {f.name: manifest["config"].get(f.name, getattr(config, f.name))
                for f in fields(Config) if f.name not in here}
    settings |= {"threads": manifest["compute"]["threads"], "on_nonfinite": "stop"}
    for key, value in settings.items():
        setattr(config, key, value)
    if manifest["data_sha256"] != data_sha256(config.data_dir):
        raise SystemExit(f"{after} was trained on other data than {config.data_dir} holds now.")
    run = start(config, watchdog)
    run.skipped = manifest.get("skipped", [])
    run.skipped_steps = set(manifest.get("skipped_steps", []))
    _, done = prepare_data.locate(run.manifest, config.global_batch_size, manifest["step"] - 1,
                                  run.skipped)
    if begin := manifest["step"] - 1 - done:
        steps_of = {read_json(p / "manifest.json").get("step"): p for p in checkpoints(home)}
        before = steps_of.get(begin, Path(f"a checkpoint of step {begin}"))
        if problem := problem_of(before):
            raise SystemExit(f"Chunk {place} cannot be trained again from {before}: {problem}."
                             " (keep_train_state = 0 keeps what is needed for it at all.)")
        restore(run, before)
    elif manifest["started_from"]:
        before = Path(config.init_from or manifest["started_from"]["path"])
        load_weights(run.model, before)
    else:
        run.model.init_weights(config.seed)
    for _ in tqdm(steps(run, manifest["step"]), total=manifest["step"] - run.step, unit="step",
                  desc=f"chunk {place} again", disable=True if rank() else None):
        pass
    n, differing = differences(run, after)
    if not differing:
        return f"{after} is what chunk {place} makes of {before}: {n} tensors, bit for bit."
    now = compute(run) | {"torch": torch.__version__}
    then = manifest["compute"] | {"torch": manifest["versions"]["torch"]}
    other = ", ".join(f"{k} {then[k]!r}, now {now[k]!r}" for k in then if then[k] != now[k])
    name, by, largest = differing[0]
    raise SystemExit(f"{after} is not what chunk {place} makes of {before} here:"
                     f" {len(differing)} of {n} tensors differ, the first is {name}, by up to"
                     f" {by:.3g} where its largest value is {largest:.3g}."
                     + f" It was made with {other}." * bool(other))


def differences(run: Run, path: Path) -> tuple[int, list[tuple[str, float, float]]]:
    """Tensors compared, and (name, largest difference, largest value) of those not equal."""
    ours = {"model": run.model.state_dict()}
    if (path / "train_state").exists() and not problem_of(path):
        ours["train_state"] = train_state(run)
    theirs = tree_map_only(Tensor, torch.clone, ours)
    for part, state in theirs.items():
        dcp.load(state, checkpoint_id=path / part, no_dist=not dist.is_initialized())
    pairs = list(zip(tensors(ours), tensors(theirs)))
    found = []
    for (name, a), (_, b) in pairs:
        a, b = (t.to_local() if isinstance(t, DTensor) else t for t in (a, b))
        if not torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
            found.append((name, (a.double() - b.double()).abs().max().item(),
                          b.abs().max().item()))
    return len(pairs), sum(everyone(found), [])


def tensors(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dictionaries, by name."""
    if isinstance(state, Tensor):
        yield name, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from tensors(value, f"{name}/{key}" if name else key)


# ---------------------------------------------------------------------------------------------
# dry run: memory, time and disk of a run on machines one does not have


KINDS = {  # torch's names for what its memory trackers tell apart -> ours
    "Sharded Param": "weights", "Parameter": "weights", "Sharded Grad": "gradients",
    "Gradient": "gradients", "OptState": "AdamW", "Optstate": "AdamW",
    "Unsharded Param": "weights in use", "All Gather": "weights in use",
    "Unsharded Grad": "gradient buffers", "Reduce Scatter": "gradient buffers",
    "Activation": "activations", "Temp": "temporary",
}


def measure_memory(config: Config, dtype: torch.dtype, world: int) -> dict[str, float]:
    """Bytes at the peak of a step of process 0 of `world`, by kind.

    The real model, wrapped and run, in tensors that have a shape and no memory, among processes
    that do not exist. More than one micro-batch is two: the second meets the first's gradients.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        cpu, mesh = torch.device("cpu"), mesh_of(config, "cpu") if world > 1 else None
        with FakeTensorMode():
            model = build(dataclasses.replace(config, compile=False), cpu, dtype, mesh)
            optimizer = make_optimizer(config, model)
            ids = torch.zeros(config.micro_batch_size, config.seq_len, dtype=torch.int64)

            def forward_backward() -> None:
                loss, _ = model(ids, ids)
                loss.backward()

            forward_backward()
            optimizer.step()  # AdamW's state comes into being
            optimizer.zero_grad()
            tracker = FSDPMemTracker(model, optimizer) if mesh else MemTracker()
            (tracker.track_inputs((ids,)) if mesh
             else tracker.track_external(model, optimizer, ids))
            with tracker:
                for _ in range(min(2, micro_batches(config, world))):
                    tracker.reset_mod_stats()
                    forward_backward()
    finally:
        dist.destroy_process_group()
    found = dict.fromkeys(KINDS.values(), 0.0)
    for kind, n in tracker.get_tracker_snapshot("peak")[cpu].items():
        if name := KINDS.get(getattr(kind, "value", kind)):
            found[name] += n
    return found


def dry_run(config: Config, world: int, mfu: float) -> str:
    """What a run on `world` GPUs would take, as a table; `mfu` is a guess, Amber's by default."""
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    try:
        backend = kernels.use(config.kernels if config.kernels != "auto" else "triton", dry=True)
    except RuntimeError:  # no Triton on this machine: PyTorch's operations keep more
        backend = kernels.use("torch")
    prepared = (Path(config.data_dir) / "manifest.json").exists()
    manifest = data_for(config) if prepared else None
    rows, steps = facts(config, manifest, world)
    measured = measure_memory(config, dtype, world)
    formula = memory_estimate(config, dtype, world, world > 1)
    peak, per_token = config.peak_tflops or 312, config.flops_per_token(config.seq_len)
    speed = mfu * peak * 1e12 * world / per_token
    days = steps * config.tokens_per_step / speed / 86400
    weights, n = 4 * config.n_params, len(manifest["chunks"]) if manifest else config.n_chunks
    kept = min(n, config.keep_train_state or n)
    rows |= {
        "time": (f"{days:.1f} days at " if steps else "") + f"{speed:,.0f} tokens/s, if MFU is"
                f" {mfu:.1%} ({mfu * 6 * config.n_params / per_token:.1%} by 6 FLOPs a"
                f" parameter) of {peak:g} TFLOP/s (--mfu=, --peak_tflops=)",
        "checkpoint": f"{weights / 1e9:.1f} GB of weights, {2 * weights / 1e9:.1f} GB of optimizer"
                      f" state; {3 * weights / 1e9:,.0f} s at 1 GB/s",
        "all checkpoints": f"{(n + 2 * kept) * weights / 1e12:.2f} TB: {n}, {kept} of them with"
                           " optimizer state",
    }
    lines = [f"{key:>16}: {value}" for key, value in rows.items()]
    lines += ["", f"{'GB per GPU at the peak':>30} {'measured':>9} {'formula':>9}"]
    for kind in formula:
        lines.append(f"{kind:>30} {measured[kind] / 1e9:9.2f} {formula[kind] / 1e9:9.2f}")
    total_of = [sum(d.values()) / 1e9 for d in (measured, formula)]
    lines.append(f"{'in all':>30} {total_of[0]:9.2f} {total_of[1]:9.2f}")
    lines.append(f"(measured: the model itself, {str(dtype)[6:]}, {backend} kernels, activation"
                 f" checkpointing {config.activation_checkpointing!r}, in tensors without memory)")
    return "\n".join(lines)


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
    """Add a line to a .jsonl file that others may be adding to, and a kill may have cut short.

    Raises SystemExit if the system refuses; what the file had before is there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # published weights have no run
        with open(path, "a+b") as f:
            with contextlib.suppress(ImportError):  # Windows
                import fcntl
                fcntl.flock(f, fcntl.LOCK_EX)
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - 1))
            torn = f.read(1) not in (b"", b"\n")
            f.write(b"\n" * torn + json.dumps(record).encode() + b"\n")
    except OSError as error:
        raise SystemExit(f"Could not add to {path}: {error.strerror or error}.")


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
    try:
        main(sys.argv[1:])
    except SystemExit as end:
        if isinstance(end.code, str) and int(os.environ.get("RANK", 0)):
            time.sleep(3)  # torchrun ends all when one ends: let the first process say it
            raise SystemExit(1)
        raise
