"""Train a model on prepared data, one checkpoint per chunk.

    python train.py configs/amber_tiny.py                      # goes on where the run stands
    torchrun --nproc_per_node=8 train.py configs/amber_1b.py   # the same on the 8 GPUs of a node
    python train.py configs/amber_tiny.py --init_from=runs/amber_tiny/ckpt_009 --run_dir=runs/tuned

The clock is the optimizer step, counted from 1. Everything that happens at step N (its sequences,
its learning rate) is a pure function of the config and N, so a run that was stopped and resumed is
the run that was not: bit for bit on CPUs. A signal (Ctrl-C, SIGTERM, SIGUSR1) saves at the end of
the step and stops. What a checkpoint is stands in checkpoint.py.
"""

import contextlib
import functools
import gc
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint as ckpt
from configs import Config, UserError, load, run_command, with_recorded
from data import (
    Data,
    Visit,
    check_data_settings,
    load_data,
    lock_directory,
    step_sequences,
    step_to_visit,
    write_json,
)
from eval import validate
from model import (
    LLaMA,
    check_memory,
    choose_device,
    choose_kernels,
    continue_text,
    meta_model,
)
from parallel import (
    all_gather_object,
    build_device_mesh,
    build_model,
    init_distributed,
    micro_batches,
    naming_missing_ranks,
    on_rank_zero,
    rank,
    shard_size,
    world_size,
    wrap_ddp,
)

# Dense bf16 matmul, from the makers' data sheets. The first key that is part of the device's name
# counts, so "H100 PCIe" must come before "H100", and "A100" before "A10".
PEAK_TFLOPS = {
    "A100": 312, "A800": 312, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989,
    "H200": 989, "GH200": 989, "B200": 2250, "L40S": 362, "A10": 125, "RTX 4090": 165,
    "RTX 3090": 71,
}

MOST_LEFT_OUT = 100  # steps in a row: then on_nonfinite = "skip_step" leaves out no more, and stops
GC_STEPS = 50  # between two collections of Python's garbage


@dataclass
class TrainState:
    """What a run in progress consists of; `step` is all the position there is."""

    config: Config
    data: Data
    schedule: list[Visit]  # the run's passes through chunks, from its first step to its last
    model: LLaMA
    ddp_model: nn.Module  # what train_step calls: `model`, inside DDP if parallel = "ddp"
    optimizer: torch.optim.AdamW
    device: torch.device
    peak_flops: float  # per second, of all devices
    step: int = 0  # optimizer steps done
    left_out: int = 0  # steps in a row without an update, the latest among them
    verified: set[int] = field(default_factory=set)  # chunks whose bytes are the manifest's
    started_from: dict = field(default_factory=dict)  # the checkpoint of init_from, if any
    received_signal: str = ""  # its name, if this process got one
    stop_reason: str = ""  # why all processes stop after this step
    save_due: bool = False  # all processes save after this step
    saved_at: float = field(default_factory=time.monotonic)  # the newest save, or the start
    saving: Future | None = None  # the checkpoint being written
    # One thread: checkpoints are written one after the other, in the order of their steps.
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    @property
    def dir(self) -> Path:
        return Path(self.config.run_dir)

    @functools.cached_property
    def flops_per_token(self) -> int:
        return self.model.flops_per_token(self.config.seq_len)

    @property
    def total_steps(self) -> int:
        """Steps of the whole schedule, whatever max_steps says."""
        return sum(visit.steps for visit in self.schedule)

    @property
    def last_step(self) -> int:
        return min(self.total_steps, self.config.max_steps or self.total_steps)

    def log(self, text: str) -> None:
        if rank() == 0:
            tqdm.write(text)
            with open(self.dir / "train.log", "a", encoding="utf-8") as f:
                f.write(text + "\n")


# ---------------------------------------------------------------------------------------------
# the schedule and the data: pure functions of the step


def learning_rate(config: Config, step: int, total: int) -> float:
    """Rate of step `step` (from 1) of `total`: linear warm-up, then cosine, linear or constant."""
    # A schedule may have a length of its own, and end before the data does, or after.
    total = config.schedule_steps or total
    # Amber computes the rate before it counts the step (amber-train main.py), so that its first
    # update is made at rate 0; warmup_offset = 0 does the same.
    position = step - 1 + config.warmup_offset
    if position < config.warmup_steps:
        return config.learning_rate * position / config.warmup_steps
    # A run that is longer than its schedule stays at the minimum: `done` is never more than 1.
    done = min(1.0, (position - config.warmup_steps) / max(1, total - config.warmup_steps))
    # How much of the way from the minimum to the peak is left.
    share = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    span = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + share[config.lr_schedule] * span


class Batch(NamedTuple):
    """This process's share of the sequences of one optimizer step."""

    visit: Visit
    step_in_chunk: int  # from 0
    ids: np.ndarray  # (n,) numbers of the sequences in their chunk
    sequences: np.ndarray  # (n,) of [source, token_ids (T + 1,)]


def load_batch(run: TrainState, step: int) -> Batch:
    """Read the sequences of step `step` (from 0): the same whatever the number of processes."""
    c = run.config
    visit, step_in_chunk = step_to_visit(run.schedule, step)
    n = len(run.data.chunk(visit.chunk))
    ids = step_sequences(c.seed, visit.chunk, n, step_in_chunk, c.global_batch_size,
                         visit.turn)
    # The micro-batches are the same for any number of processes, which take them in turn.
    mine = ids.reshape(-1, world_size(), c.micro_batch_size)[:, rank()].reshape(-1)
    # Only these are read from the disk.
    return Batch(visit, step_in_chunk, mine, run.data.take(visit.chunk, mine))


def verify_chunk(run: TrainState) -> None:
    """Hash the chunk of the next step, if it is new: a flipped bit would be trained on unnoticed.
    """
    # Amber's chunk of 7 GB takes some seconds in more than two hours, and is then in the memory of
    # the system.
    chunk = step_to_visit(run.schedule, run.step)[0].chunk
    if chunk not in run.verified:
        on_rank_zero(lambda: run.data.verify_file(run.data.manifest["chunks"][chunk]))
        run.verified.add(chunk)


def to_tensors(sequences: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B,) sequences of T + 1 ids -> inputs and targets (B, T), the same ids one apart."""
    # A chunk keeps ids as uint16 (uint32 for a large vocabulary); PyTorch looks up with int64.
    ids = torch.from_numpy(sequences["token_ids"].astype(np.int64))  # (B, T + 1)
    ids = ids.to(device, non_blocking=True)
    return ids[:, :-1], ids[:, 1:]


# ---------------------------------------------------------------------------------------------
# one optimizer step


def train_step(run: TrainState, batch: Batch, lr: float) -> dict[str, Any]:
    """One update: batch -> micro-batches -> clip -> check -> update. Returns what is logged.

    The loss is the mean over every target of the global batch, in nats. If it or the gradient norm
    is not finite in any process, no process makes the update (see `handle_nonfinite`).
    """
    c, n = run.config, run.config.micro_batch_size
    total = c.global_batch_size if c.same_bits else len(batch.sequences)
    losses = []
    # Gradients of the micro-batches add up in .grad, as if they had been one large batch.
    for begin in range(0, len(batch.sequences), n):
        part = batch.sequences[begin : begin + n]
        inputs, targets = to_tensors(part, run.device)  # (B, T) each
        with maybe_no_sync(run, last=begin + n >= len(batch.sequences)):
            loss, token_losses = run.ddp_model(inputs, targets)  # (), (B, T)
            # `loss` is the mean of this part, so it counts by the part's share of this process's
            # sequences. DDP and FSDP average over the processes, which have equally many.
            (loss * (len(part) / total)).backward()
        losses.append(token_losses.mean(1))  # (sequences of the part,), no graph behind them
    losses = torch.cat(losses)  # (sequences of this process,)

    grad_norm = clip_gradients(run)  # ()
    loss_sums, counts, grad_norm = gather_losses(run, batch, losses, grad_norm)
    loss = sum(loss_sums) / sum(counts)

    # Before the update, because after it the weights would be lost. All processes have the same
    # sums, so all of them come to the same decision without asking each other.
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        run.optimizer.zero_grad(set_to_none=True)
        handle_nonfinite(run, batch, loss, grad_norm, ~losses.isfinite().cpu().numpy())
        return {"skipped": True}
    if run.step == 0 and grad_norm == 0:
        raise UserError("Step 1: the gradient is exactly 0, so nothing can be learned: some"
                        " factor of the settings is too large or too small for float32.")
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]  # lr_scale: muP's, 1 without it
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    by_source = {name: round(total / count, 5)
                 for name, total, count in zip(run.data.sources, loss_sums, counts) if count}
    return {"loss": loss, "loss_by_source": by_source, "grad_norm": grad_norm, "lr": lr}


def clip_gradients(run: TrainState) -> Tensor:
    """Scale all gradients if their global norm is more than grad_clip; the norm before that, ()."""
    parameters, most = [*run.model.parameters()], run.config.grad_clip
    if not run.config.same_bits:
        norm = torch.nn.utils.clip_grad_norm_(parameters, most)
        return whole(norm)
    # A process has whole rows of a matrix: the sum of each row is the same wherever it is made, and
    # the sum of these sums too.
    rows = [p.grad.double().square() for p in parameters]
    rows = [whole(x.sum(1) if x.dim() > 1 else x) for x in rows]  # (rows of the parameter,) each
    norm = torch.cat(rows).sum().sqrt().float()
    for p in parameters:
        p.grad.mul_((most / (norm + 1e-6)).clamp(max=1.0))
    return norm


def whole(x: Tensor) -> Tensor:
    """A tensor of which FSDP may hold only a part here, in one piece."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def gather_losses(run: TrainState, batch: Batch, losses: Tensor,
                  grad_norm: Tensor) -> tuple[list[float], list[float], float]:
    """Sum of the losses and number of sequences of each source over all processes, and the gradient
    norm as a number. losses: (sequences of this process,). Notes on `run` what any of them wants:
    to stop at a signal, or to save."""
    names = run.data.sources
    source = torch.from_numpy(batch.sequences["source"].astype(np.float32)).to(run.device)
    wants = torch.tensor([bool(run.received_signal),  # 0 minutes: never
                          0 < run.config.save_minutes * 60 < time.monotonic() - run.saved_at])
    # One all_gather for all, and of the losses themselves: so they are added in the order of the
    # batch, whoever has computed them.
    mine = torch.cat([torch.stack([losses, source], 1), wants[None].to(losses)])  # (n + 1, 2)
    everyones = mine.repeat(world_size(), 1, 1)  # (world, n + 1, 2)
    if dist.is_initialized():
        dist.all_gather([*everyones], mine)  # into the rows of `everyones`
    in_turn = everyones[:, :-1].unflatten(1, (-1, run.config.micro_batch_size))  # (world, m, B, 2)
    losses, source = in_turn.transpose(0, 1).reshape(-1, 2).unbind(1)  # (global batch,) each
    source = source.long()
    sums = torch.zeros(2 * len(names), device=run.device)
    sums.index_add_(0, source, losses)
    sums.index_add_(0, source + len(names), torch.ones_like(losses))
    # tolist() makes the CPU wait for the GPU, so there is one for all that is logged or decided on.
    any_wants = everyones[:, -1].sum(0)  # (2,)
    *totals, signal, due, norm = torch.cat([sums, any_wants, grad_norm.reshape(1)]).tolist()
    if signal:
        run.stop_reason = run.received_signal or "A signal to another process"
    run.save_due = due > 0
    return totals[: len(names)], totals[len(names) :], norm


@contextlib.contextmanager
def maybe_no_sync(run: TrainState, last: bool) -> Iterator[None]:
    """Exchange the gradients at the last micro-batch only, where that saves anything.

    FSDP's reduce-scatter is not put off: it would save time, but each process would have to hold
    the gradients of the whole model. HSDP puts off the all-reduce between its groups.
    """
    if isinstance(run.ddp_model, DistributedDataParallel) and not last:
        with run.ddp_model.no_sync():
            yield
        return
    if run.config.parallel == "hsdp" and dist.is_initialized():
        run.model.set_requires_all_reduce(last)
    yield


def handle_nonfinite(run: TrainState, batch: Batch, loss: float, grad_norm: float,
                     bad: np.ndarray) -> None:
    """Say which sequences gave a loss that is not finite, in every process, and stop unless the
    config says to leave out such steps. bad: (sequences of this process,) where it was not."""
    chunk, number, names = batch.visit.chunk, run.step + 1, run.data.sources
    sources = batch.sequences["source"]
    mine = [f"sequence {i} ({names[s]})" for i, s in zip(batch.ids[bad], sources[bad])]
    found = []
    for r, theirs in enumerate(all_gather_object(mine)):
        if theirs:
            found.append(f"rank {r}: " + ", ".join(theirs[:8]) + ", ..." * (len(theirs) > 8))
    where = (f"the loss is not finite on {'; '.join(found)}" if found
             else "every loss was finite, the gradient was not")
    text = (f"Step {number}: loss {loss}, gradient norm {grad_norm}; the update was not made. It"
            f" was chunk {chunk}; {where} (python lookup.py CONFIG --step={number} prints them).")
    if run.config.on_nonfinite == "skip_step" and run.left_out + 1 < MOST_LEFT_OUT:
        # Nothing needs to be recorded: a resumed run gets the same from the same data.
        run.log(f"{text} The step is left out.")
        return
    finish_save(run)
    # The message is what a person has at three in the morning: it says what to write where.
    newest = (ckpt.list_checkpoints(run.dir) or ["none"])[-1]
    skip = sorted({*run.config.skip_chunks, chunk})
    if run.left_out:
        text += f" It is the {MOST_LEFT_OUT}th step in a row."
    raise UserError(
        f"{text} The newest checkpoint is {newest}; the same command goes on from there."
        f" To leave out the chunk, as Amber did, add `skip_chunks = {skip}` to the config; to leave"
        " out steps like this one, `on_nonfinite = \"skip_step\"`.")


# ---------------------------------------------------------------------------------------------
# the loop


def train(run: TrainState) -> None:
    """Step until the data, max_steps or a signal ends it; a checkpoint at the end of each chunk."""
    c = run.config
    bar = tqdm(total=run.last_step, initial=run.step, unit="step", dynamic_ncols=True,
               disable=True if rank() else None)
    # `run.step` steps are done: that is also the number, from 0, of the one that comes next.
    reader = ThreadPoolExecutor(1)
    coming = reader.submit(load_batch, run, run.step)
    while run.step < run.last_step and not run.stop_reason:
        # Read, update, count: all of training is in these three.
        begin = time.perf_counter()
        verify_chunk(run)
        batch = coming.result()
        # The next one is read while this one is computed. (After the last step nobody asks.)
        coming = reader.submit(load_batch, run, run.step + 1)
        loaded = time.perf_counter()
        record = train_step(run, batch, learning_rate(c, run.step + 1, run.total_steps))
        run.step += 1
        run.left_out = run.left_out + 1 if "skipped" in record else 0
        record = {"step": run.step, "chunk": batch.visit.chunk,
                  "tokens": run.step * c.tokens_per_step, **record,
                  **speed(run, time.perf_counter() - begin), "data_s": round(loaded - begin, 5)}

        # Validation draws no random numbers and moves no position: a run that validates more often
        # is the same run.
        chunk_done = batch.step_in_chunk + 1 == batch.visit.steps
        if chunk_done or run.step == run.last_step or (
                c.eval_interval and run.step % c.eval_interval == 0):
            with uncompiled(c):
                record["valid"] = validate(run.model, run.data, c.eval_sequences,
                                           c.micro_batch_size, rank(), world_size())
        log_step(run, record, bar)
        # All processes generate the sample, because FSDP gathers the weights from all of them.
        if chunk_done and c.sample_tokens:
            with uncompiled(c):
                text = continue_text(run.model, run.data.tokenizer, c.sample_prompt,
                                     c.sample_tokens)
            run.log(f"sample: {text!r}")
        # The checkpoint at the end of a chunk is kept for good. A rolling one, in between, is
        # deleted when keep_rolling newer ones are there.
        if chunk_done:
            save(run, f"ckpt_{batch.visit.number:03d}")
        elif run.stop_reason or run.step == run.last_step or run.save_due:
            save(run, f"step_{run.step:07d}")
        if run.saving and run.saving.done():
            finish_save(run)  # which says so at once if it has failed
        if run.step % GC_STEPS == 0:
            gc.collect(1)
    finish_save(run)
    reader.shutdown()
    bar.close()


def log_step(run: TrainState, record: dict[str, Any], bar: tqdm) -> None:
    """A line of metrics.jsonl, the bar, and of some steps a line of train.log."""
    if rank() == 0:
        with open(run.dir / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")
    bar.update()
    bar.set_postfix_str(f"loss {record.get('loss', math.nan):.3f},"
                        f" {record['tokens_per_s']:,} tok/s, mfu {record['mfu']:.1%}")
    # metrics.jsonl has every step; the log has the first few, to see that the run is sound.
    if run.step <= 3 or "valid" in record:
        run.log(summary_line(record, run.last_step))


def uncompiled(config: Config) -> contextlib.AbstractContextManager:
    """For validation and samples: of other shapes than the step and without gradients, each of them
    would be compiled anew."""
    # The stance belongs to torch's compiler, which takes a second to import.
    return torch.compiler.set_stance("force_eager") if config.compile else contextlib.nullcontext()


def summary_line(record: dict[str, Any], last: int) -> str:
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


def speed(run: TrainState, seconds: float) -> dict[str, float]:
    """Of a step that took so long: tokens per second, MFU, and the memory of this process."""
    tokens_per_s = run.config.tokens_per_step / seconds
    # Model FLOPs utilization: the share of the devices' peak that the model's own FLOPs make.
    mfu = tokens_per_s * run.flops_per_token / run.peak_flops
    return {"tokens_per_s": round(tokens_per_s), "mfu": round(mfu, 4), "memory_gb": memory_gb(run)}


def memory_gb(run: TrainState) -> float:
    """Peak memory of this process so far, GB (1e9 bytes): of the GPU, or resident on a CPU."""
    if run.device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(run.device) / 1e9, 3)
    import resource  # not on Windows, which has no use for it either
    # ru_maxrss is in bytes on macOS, and in KiB elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


# ---------------------------------------------------------------------------------------------
# saving


def save(run: TrainState, name: str) -> None:
    """Copy the state and begin to write it as checkpoint `name`; training goes on meanwhile."""
    # Wait for the save before this one: host memory has room for one copy of the state.
    finish_save(run)
    delete_old = functools.partial(ckpt.drop_old_checkpoints, run.dir, run.config.keep_rolling,
                                   run.config.keep_train_state)
    # The first process alone writes the manifest. To name the parent it reads the manifests of the
    # checkpoints before, which the others are spared.
    metadata = checkpoint_metadata(run) if rank() == 0 else {"step": run.step}
    run.saving = ckpt.save_checkpoint(run.dir / name, run.model, run.optimizer, run.data.tokenizer,
                                      metadata, delete_old, run.pool)
    run.saved_at = time.monotonic()


def finish_save(run: TrainState) -> None:
    """Wait for the checkpoint being written; raises UserError if it could not be."""
    if run.saving:
        saving, run.saving = run.saving, None
        saving.result()


def checkpoint_metadata(run: TrainState) -> dict[str, Any]:
    """What manifest.json says beside the hashes: of which run, data and step this is the state."""
    c = run.config
    # The visit of the step just done: at the end of a chunk, `run.step` is already in the next.
    visit, _ = step_to_visit(run.schedule, max(0, run.step - 1))
    # The checkpoint of the chunk before, so that manifests make a chain. The list is oldest first:
    # the last that fits is the newest.
    parent = {}
    for path in ckpt.list_checkpoints(run.dir):
        manifest = ckpt.read_manifest(path)
        if path.name.startswith("ckpt_") and manifest["step"] < run.step:
            parent = {"checkpoint": path.name, "weights_sha256": manifest["weights_sha256"]}
    return {
        "step": run.step,
        "tokens": run.step * c.tokens_per_step,
        "chunk": visit.chunk,  # the one being trained, or just finished
        "visit": visit.number,
        "chunk_sha256": run.data.manifest["chunks"][visit.chunk]["sha256"],
        "data_sha256": run.data.sha256,
        "parent": parent,
        "started_from": run.started_from,
        "config": asdict(c),
        "environment": environment(run),
        "git_commit": git_commit(),
    }


def environment(run: TrainState) -> dict[str, Any]:
    """What decides the last bits of the arithmetic beside the settings."""
    return {"device": device_name(run.device), "dtype": str(run.model.dtype)[6:],
            "threads": torch.get_num_threads(), "processes": world_size(),
            "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__}


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


# ---------------------------------------------------------------------------------------------
# resuming


def resume(run: TrainState) -> list[str]:
    """Put the run where its newest usable checkpoint stands; returns what to say of it.

    A run is never written over: if there are checkpoints and none serves, this raises UserError.
    """
    c = run.config
    sound, damaged = on_rank_zero(lambda: ckpt.find_checkpoints(run.dir))
    begun = on_rank_zero(lambda: (run.dir / "metrics.jsonl").exists()) or sound or damaged
    # After a failure torchrun starts the same command again, and then the run is there already,
    # which resume = "false" must allow. Only the node whose process failed counts the restart.
    restarted = max(all_gather_object(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))))
    if c.resume == "false" and begun and not restarted:
        raise UserError(f"{run.dir} already holds a run: delete it, or give another --run_dir.")
    # Any other value of `resume` is the path of the one checkpoint to go on from.
    named = c.resume not in ("auto", "true", "false")
    notes = [f"Passing over {path}: manifest.json is missing or damaged." for path in damaged]
    for path in [Path(c.resume)] if named else reversed(sound):
        # Every file is read and hashed before anything is loaded: a flipped bit in the weights
        # would train on without a word.
        problem = ckpt.verify_checkpoint(path, train_state=True) or history_problem(run, path)
        if not problem:
            return [*notes, restore(run, path), *on_rank_zero(lambda: put_aside(run))]
        notes.append(f"Passing over {path}: {problem}.")
    if named or sound or damaged or c.resume == "true":
        raise UserError(f"{run.dir} has no usable checkpoint to resume. {' '.join(notes)} Give"
                        " another --run_dir to begin a new run.")
    # There is no checkpoint at all, so the run begins with its first step.
    if begun:
        notes.append(f"{run.dir} was stopped before its first checkpoint: it begins again.")
    if c.init_from:
        source = ckpt.load_weights(run.model, c.init_from)
        run.started_from = {"path": c.init_from, "step": source["step"], "tokens": source["tokens"],
                            "data_sha256": source.get("data_sha256"),
                            "weights_sha256": ckpt.weights_hash(Path(c.init_from))}
        notes.append(f"Weights from {c.init_from}.")
    else:
        run.model.init_weights(c.init_seed or c.seed)
    return notes


def history_problem(run: TrainState, path: Path) -> str:
    """Why a checkpoint is not one of this config's run, or "": until its step it must have met the
    chunks that this config's schedule meets."""
    manifest = ckpt.read_manifest(path)
    recorded = with_recorded(run.config, manifest["config"])
    theirs = run.data.schedule(replace(run.config, skip_chunks=recorded.skip_chunks))
    met = [visit for visit in theirs if visit.first_step < manifest["step"]]
    if met == [visit for visit in run.schedule if visit.first_step < manifest["step"]]:
        return ""
    return "it has trained on chunks that skip_chunks leaves out"


def put_aside(run: TrainState) -> list[str]:
    """Rename the checkpoints that are damaged, or from beyond the step the run goes on from: they
    must neither count as newer than what comes now nor be overwritten by it."""
    sound, damaged = ckpt.find_checkpoints(run.dir)
    beyond = [path for path in sound if ckpt.read_manifest(path)["step"] > run.step]
    return [f"{path.name} is now {ckpt.set_aside(path).name}." for path in damaged + beyond]


def restore(run: TrainState, path: Path) -> str:
    """Weights, optimizer and position from a verified checkpoint; says what has changed since."""
    c, manifest = run.config, ckpt.read_manifest(path)
    then = with_recorded(c, manifest["config"])
    # These decide which sequences a step reads, so they must be equal. The network is checked by
    # load_weights, skip_chunks by history_problem; all else may change, and the log says what did.
    for key in ("global_batch_size", "seq_len", "seed"):
        if getattr(then, key) != getattr(c, key):
            raise UserError(f"{path} was trained with {key} = {getattr(then, key)}, now it is"
                            f" {getattr(c, key)}: that is another run; give another --run_dir.")
    if manifest["data_sha256"] != run.data.sha256:
        raise UserError(f"{path} was trained on other data than {c.data_dir} holds now (the"
                        " manifests differ); give another --run_dir.")
    ckpt.load_weights(run.model, path, verified=True)
    ckpt.load_optimizer(run.model, run.optimizer, path)
    run.step, run.started_from = manifest["step"], manifest["started_from"]
    changed = changed_since(run, manifest)
    return f"Resuming {path}, step {run.step}." + (f" Changed: {changed}." if changed else "")


def changed_since(run: TrainState, manifest: dict[str, Any]) -> str:
    """The settings, and what else decides the last bits, that a checkpoint was made without."""
    then = manifest["config"] | manifest["environment"]
    # Through JSON, as the manifest has been: there the key of {2: 1} is "2", which is no change.
    now = json.loads(json.dumps(asdict(run.config))) | environment(run)
    # A directory may have been moved; and an older version has not recorded what it did not know.
    return ", ".join(f"{key} {then[key]!r} -> {value!r}" for key, value in now.items()
                     if then.get(key, value) != value and key not in ("resume", "run_dir"))


def finished(run: TrainState) -> str:
    """What to say to one who starts a run that is finished."""
    newest = ckpt.list_checkpoints(run.dir)[-1]
    text = (f"{run.dir} is finished: {run.step} steps,"
            f" {run.step * run.config.tokens_per_step:,} tokens.")
    changed = changed_since(run, ckpt.read_manifest(newest))
    if changed:
        text += f" It was trained with other settings, and stays as it is: {changed}."
    return (f"{text} To train anew, give another --run_dir: for longer with --epochs="
            f"{run.config.epochs + 1}, or from these weights with --init_from={newest}.")


# ---------------------------------------------------------------------------------------------
# starting


def data_for(config: Config) -> Data:
    """The data of a config; UserError if it cannot be trained on with these settings."""
    data = load_data(config.data_dir)
    if data.n_vocab > config.vocab_size or data.seq_len != config.seq_len:
        raise UserError(f"{config.data_dir} has {data.n_vocab} token ids in sequences of"
                        f" {data.seq_len}, the model {config.vocab_size} in sequences of"
                        f" {config.seq_len}: set vocab_size and seq_len alike, or prepare again.")
    check_data_settings(config, data)
    if not data.schedule(config):
        raise UserError(f"There is nothing to train on in {config.data_dir}: no chunk that"
                        f" skip_chunks leaves has the {config.global_batch_size} sequences of one"
                        " step. Lower global_batch_size, or prepare more text or fewer chunks.")
    return data


def make_optimizer(config: Config, model: LLaMA) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameter_groups(),
                             betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps,
                             weight_decay=config.weight_decay, fused=True)


def peak_flops(config: Config, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one device in `dtype`: given, known by name, or on a CPU the best of 8 matmuls."""
    if config.peak_tflops:
        return config.peak_tflops * 1e12
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((t * 1e12 for key, t in PEAK_TFLOPS.items() if key in name), float("nan"))
    # A CPU's peak is what it does: vector units, cores and clock differ too much for a table.
    a, best = torch.ones(1024, 1024, dtype=dtype), math.inf
    for _ in range(8):
        begin = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begin)
    return 2 * 1024**3 / best


def start(config: Config) -> TrainState:
    """Everything a run needs before its first step but values in its weights."""
    device, dtype = choose_device(config)
    # This asks PyTorch for algorithms that give the same bits every time; on a CPU all of them do.
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True)
    data = data_for(config)
    # Nothing here depends on how far the run is; `resume` puts it where it stands.
    schedule = data.schedule(config)
    model = build_model(config, device, dtype, build_device_mesh(config, device.type))
    optimizer = make_optimizer(config, model)
    ckpt.init_optimizer_state(optimizer)
    return TrainState(config, data, schedule, model, wrap_ddp(model, config, device), optimizer,
                      device, peak_flops(config, device, dtype) * world_size())


def run_summary(model: LLaMA, data: Data | None, world: int) -> dict[str, str]:
    """What a run comes to before it begins, line by line; without data, by n_chunks."""
    c, per_token = model.config, model.flops_per_token(model.config.seq_len)
    steps = [c.sequences_per_chunk // c.global_batch_size] * c.n_chunks
    if data:
        steps = data.steps_per_chunk(c.global_batch_size)
    last = c.epochs * sum(steps)
    last = min(last, c.max_steps or last)
    # All of it follows from the settings, so that a wrong one is seen before the first step.
    how = f" x {world} processes, {c.parallel}" if world > 1 else ""
    if world > 1 and c.parallel == "hsdp":
        how += f" in groups of {shard_size(c, world)}"
    default = asdict(Config())
    given = ", ".join(f"{k} = {v!r}" for k, v in asdict(c).items() if v != default[k])
    return {
        "settings": given + "; the rest as in configs/__init__.py",
        "parameters": f"{model.n_params:,}",
        "data": f"{c.data_dir}: {len(steps)} chunks"
                + (f" of {min(steps)} to {max(steps)} steps" if last else "")
                + ("" if data else ", not prepared yet")
                + (f", without {c.skip_chunks}" if c.skip_chunks else "")
                + ("" if last else ": how many steps they hold is not known"),
        "tokens per step": f"{c.tokens_per_step:,} = {c.global_batch_size} sequences of"
                           f" {c.seq_len}; {micro_batches(c, world)} micro-batches of"
                           f" {c.micro_batch_size}{how}",
        "steps": f"{last:,} = {last * c.tokens_per_step:,} tokens",
        "FLOPs": f"{per_token:,} per token, {per_token * last * c.tokens_per_step:.3g} in all",
    }


def main(argv: list[str]) -> None:
    config, _ = load(argv)
    with naming_missing_ranks(config):
        init_distributed(config)
        run_training(config, argv)


def run_training(config: Config, argv: list[str]) -> None:
    """Look, lock, build, resume, train: what every process does once it has met the others."""
    backend = choose_kernels(config.kernels)
    micro_batches(config, world_size())  # refused before anything is built
    home = Path(config.run_dir)
    device, _ = choose_device(config)
    # Weights, gradients and two moments, four bytes each; tools/dry_run.py says what else it takes.
    check_memory(16 * meta_model(config).n_params / shard_size(config, world_size()),
                 "weights, gradients and AdamW's moments", device)
    # One process looks before all of them build: what it finds wrong ends all, in one sentence.
    on_rank_zero(lambda: data_for(config) and home.mkdir(parents=True, exist_ok=True))
    with contextlib.ExitStack() as held:
        # The lock first: a checkpoint that a running process is writing looks like a leftover.
        on_rank_zero(lambda: held.enter_context(lock_directory(home))
                     and ckpt.remove_leftovers(home))
        run = start(config)
        notes = resume(run)
        if run.step >= run.last_step:
            if rank() == 0:
                print(finished(run))
            return
        on_rank_zero(lambda: begin_records(run))
        # Python collects its garbage when it likes, in each process at another step, for which all
        # others wait. Here all do it at the same step, in `train`.
        gc.disable()
        held.callback(gc.enable)
        # A handler only makes a note: the loop looks at it when the step is done, in all processes
        # at once, so that they save the same step.
        for name in {"SIGINT", "SIGTERM", "SIGUSR1"} & set(dir(signal)):  # Windows has not all
            signal.signal(getattr(signal, name), lambda number, _: setattr(
                run, "received_signal", signal.Signals(number).name))
        compute = (f"{device_name(run.device)}, {str(run.model.dtype)[6:]}, {backend} kernels,"
                   f" {torch.get_num_threads()} threads, peak {run.peak_flops / 1e12:.2f} TFLOP/s")
        if config.kernels == "auto" and backend == "triton":
            compute += ('; no GPU has timed these kernels yet: python tools/gpu.py does, and'
                        ' kernels = "torch" takes PyTorch\'s own')
        lines = run_summary(run.model, run.data, world_size()) | {"compute": compute}
        run.log("\n".join([*notes, *(f"{key:>16}: {value}" for key, value in lines.items())]))
        try:
            train(run)
        except UserError:
            finish_save(run)
            raise
        except torch.OutOfMemoryError as error:
            raise UserError(f"Step {run.step + 1}: {str(error).splitlines()[0]} Take a smaller"
                            " micro_batch_size, or activation_checkpointing = 'full'.")
        if run.stop_reason:
            run.log(f"{run.stop_reason}: saved at step {run.step}. To go on: python train.py"
                    f" {' '.join(argv)}")
        else:
            left_out = f" The last {run.left_out} were left out." * (run.left_out > 0)
            run.log(f"Finished: {run.step} steps in {run.dir}.{left_out}")


def begin_records(run: TrainState) -> None:
    """Settle what the run directory says before the first step of this process."""
    write_json(run.dir / "config.json", asdict(run.config))
    # Lines of steps that will be made again are dropped.
    metrics = ckpt.read_metrics(run.dir).items()
    ckpt.write_records(run.dir / "metrics.jsonl", [r for step, r in metrics if step <= run.step])


if __name__ == "__main__":
    run_command(main)
