"""Stage 2: train a model on prepared data, one checkpoint per chunk.

    python train.py configs/amber_tiny.py                      # goes on where the run stands
    torchrun --nproc_per_node=8 train.py configs/amber_1b.py   # the same on the 8 GPUs of a node
    python train.py configs/amber_tiny.py --init_from=runs/amber_tiny/ckpt_009 --run_dir=runs/tuned

The clock is the optimizer step, counted from 1. Everything that happens at step N (its sequences,
its learning rate) is a pure function of the config and N, so a run that is stopped and resumed is
the same as one that is not: bit for bit on CPUs. A signal (Ctrl-C, SIGTERM, SIGHUP, SIGUSR1) saves
at the end of the step and stops. Another run needs another --run_dir; to go back to an earlier
checkpoint, move the newer ones away. checkpoint.py describes the format of a checkpoint.
"""

import contextlib
import functools
import gc
import math
import os
import platform
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import checkpoint as ckpt
import kernels
import parallel
from configs import Config, ModelConfig, UserError, load, open_ours, run_command
from data import Data, Visit, load_data, lock_directory, step_sequences, step_to_visit, write_json
from eval import validate
from model import LLaMA, continue_text, meta_model
from parallel import micro_batches, on_rank_zero, rank, world_size

GC_STEPS = 50  # between two collections of Python's garbage
SIGNALS: list[str] = []  # that this process got; all look at them together, after each step


@dataclass
class Run:
    """The state of a run; `step` alone determines its position."""

    config: Config
    data: Data
    schedule: list[Visit]  # the run's passes through chunks, from its first step to its last
    model: LLaMA
    optimizers: list[torch.optim.Optimizer]
    device: torch.device
    mesh: DeviceMesh | None = None  # of the processes, if torchrun has started them
    step: int = 0  # optimizer steps done
    started_from: dict = field(default_factory=dict)  # the checkpoint of init_from, if any
    parent: dict = field(default_factory=dict)  # name and hash of the newest checkpoint of a chunk
    checkpoints: list[Path] = field(default_factory=list)  # those of the run, oldest first
    saving: ckpt.Saving | None = None  # the checkpoint that is being written
    saved_at: float = math.inf  # when the newest was begun; until the first step nothing is due
    logged_at: float = 0.0  # when a step was last logged
    # (stop, save_due, writing) of the last step, each true if it is in any process: gather_losses.
    flags: tuple[bool, bool, bool] = (False, False, False)

    @property
    def dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def total_steps(self) -> int:  # of the whole schedule, whatever max_steps is
        return sum(visit.steps for visit in self.schedule)

    def log(self, text: str) -> None:
        """Print a line and add it to train.log, in process 0."""
        if rank() == 0:
            # A full disk or a terminal that has gone does not end a run: metrics.jsonl records it.
            with contextlib.suppress(OSError), open_ours(self.dir / "train.log", "append") as f:
                f.write(f"{text}\n".encode(errors="replace"))
            with contextlib.suppress(OSError):
                print(text, flush=True)


def main(argv: list[str]) -> None:
    train(load(argv)[0], " ".join(["python train.py", *argv]))


def train(config: Config, command: str = "the same command") -> None:
    """Train a run from where it stands until its data, max_steps or a signal ends it."""
    # First of all: Slurm's would kill a process that is still starting, and torchrun begin again.
    signal.signal(signal.SIGUSR1, lambda got, _: SIGNALS.append(signal.Signals(got).name))
    SIGNALS.clear()
    parallel.init_distributed(config)
    run = start(config)  # data, model and optimizers
    last_step = min(run.total_steps, config.max_steps or run.total_steps)
    with contextlib.ExitStack() as stack:
        # The lock comes first: a checkpoint that another command is writing looks like a leftover.
        on_rank_zero(lambda: stack.enter_context(lock_directory(run.dir))
                     and ckpt.remove_leftovers(run.dir))
        notes = resume(run)
        if run.step >= last_step:
            if rank() == 0:
                print(f"{run.dir} is finished: {run.step} steps. --epochs={config.epochs + 1} makes"
                      " it longer, and other settings need another --run_dir.")
            return
        on_rank_zero(lambda: begin_records(run))
        lines = run_summary(run.model, run.data, world_size())
        lines["environment"] = ", ".join(f"{k} {v}" for k, v in environment(run).items())
        run.log("\n".join([*notes, *(f"{key:>16}: {value}" for key, value in lines.items())]))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup does
                signal.signal(number, signal.getsignal(signal.SIGUSR1))
        # Automatic garbage collection would pause each process at a different step; all would wait.
        gc.disable()
        stack.callback(gc.enable)
        reader = stack.enter_context(ThreadPoolExecutor(2))  # of batches, and to hash a chunk
        writer = stack.enter_context(ThreadPoolExecutor(1))
        run.saved_at = time.monotonic()
        visit, stop, problem, first_step = None, False, "", run.step
        verified = reader.submit(verify_chunk, run, run.step)
        upcoming = reader.submit(load_batch, run, run.step)
        while run.step < last_step and not stop:
            began = time.perf_counter()
            if visit is None or run.step == visit.first_step + visit.steps:
                # A new chunk, in which a flipped bit would go unnoticed. Amber's takes about ten
                # seconds to hash: all but the first have been hashed during the chunk before.
                visit, _ = step_to_visit(run.schedule, run.step)
                try:
                    on_rank_zero(verified.result)
                except UserError as error:  # in all processes
                    problem = str(error)
                    break
                verified = reader.submit(verify_chunk, run, visit.first_step + visit.steps)
            batch = upcoming.result()
            # The next one is read while this one is computed; after the last step, for nothing.
            upcoming = reader.submit(load_batch, run, run.step + 1)
            data_s = time.perf_counter() - began
            lr = learning_rate(config, run.step + 1, run.total_steps)
            traced = run.step + 1 == config.profile_step and rank() == 0
            with tracer(run.dir / "trace.json") if traced else contextlib.nullcontext():
                record = train_step(run, batch, lr)
            if "nonfinite" in record:  # no update was made; a machine's slip is not there again
                run.log(f"Step {run.step + 1} is not finite, and is computed once more.")
                record = train_step(run, batch, lr)
            if run.step == first_step and run.device.type == "cuda":
                # All have compiled and connected, and what takes long beside a step is on gloo.
                parallel.set_timeout(run.mesh, run.device, config.timeout_minutes / 3)
            stop, save_due, writing = run.flags
            nonfinite = record.pop("nonfinite", "")
            if nonfinite and config.on_nonfinite == "stop":
                problem = nonfinite
                break
            if nonfinite:  # a resumed run gets the same from the same data
                run.log(f"{nonfinite} The step is left out.")
            run.step += 1
            record = {"step": run.step, "chunk": visit.chunk,
                      "tokens": run.step * config.tokens_per_step, **record,
                      **speed(run, time.perf_counter() - began), "data_s": round(data_s, 5)}
            chunk_done = run.step == visit.first_step + visit.steps
            sample = ""
            if chunk_done or run.step == last_step or (
                    config.eval_interval and run.step % config.eval_interval == 0):
                record["valid"], sample = look(run, chunk_done)
            # The line comes before the checkpoint: a step that was saved is never made again.
            log_step(run, record, last_step, sample)

            # All processes have the same flags, so they save and publish at the same steps.
            save_due |= chunk_done or stop or run.step == last_step
            if save_due or not writing:
                finish_save(run)
            if save_due:
                # The checkpoint of a chunk is kept for good, a rolling one until there are
                # keep_rolling newer ones.
                name = f"ckpt_{visit.number:03d}" if chunk_done else f"step_{run.step:07d}"
                run.saving = ckpt.begin_save(run.dir / name, run.model, run.optimizers,
                                             run.data.tokenizer, metadata(run, visit), writer)
                run.saved_at = time.monotonic()
            if run.step % GC_STEPS == 0:
                gc.collect(1)
        finish_save(run)
        if problem:
            raise UserError(problem)
        if stop:
            run.log(f"{', '.join(SIGNALS) or 'A signal to another process'}: saved at step"
                    f" {run.step}. To go on: {command}")
        else:
            run.log(f"Finished: {run.step} steps in {run.dir}.")


def tracer(path: Path) -> torch.profiler.profile:
    """Inside this context the times of all operations are taken; https://ui.perfetto.dev shows
    the file."""
    open_ours(path).close()  # in the place of a link, which the profiler would follow
    return torch.profiler.profile(on_trace_ready=lambda p: p.export_chrome_trace(str(path)))


# ---- one optimizer step


class Batch(NamedTuple):
    """This process's share of the sequences of one optimizer step."""

    visit: Visit
    numbers: np.ndarray  # (global batch,) of all the step's sequences in their chunk
    sequences: np.ndarray  # (n,) of [source, number, token_ids (T + 1,)], this process's share


def load_batch(run: Run, step: int, whole: bool = False) -> Batch:
    """This process's share of step `step` (from 0), or the `whole`: the same for any processes."""
    c = run.config
    visit, step_in_chunk = step_to_visit(run.schedule, step)
    n = len(run.data.chunk(visit.chunk))
    numbers = step_sequences(c.seed, visit.chunk, n, step_in_chunk, c.global_batch_size,
                             visit.epoch)
    # The micro-batches are the same for any number of processes: process r of N computes the
    # micro-batches r, N + r, 2N + r, ...
    mine = numbers
    if not whole:
        mine = numbers.reshape(-1, world_size(), c.micro_batch_size)[:, rank()].reshape(-1)
    return Batch(visit, numbers, run.data.take(visit.chunk, mine))


def verify_chunk(run: Run, step: int) -> None:
    """In process 0, UserError unless the chunk of step `step` (from 0) has its sha256."""
    if rank() == 0 and step < run.total_steps:
        visit, _ = step_to_visit(run.schedule, step)
        run.data.verify_file(run.data.manifest["chunks"][visit.chunk])


def train_step(run: Run, batch: Batch, lr: float) -> dict[str, Any]:
    """One update: batch -> micro-batches -> clip -> check -> update. Returns what is logged.

    The loss is the mean over every target of the global batch, in nats. If it or the gradient norm
    is not finite in any process, no process makes the update, and the record has "skipped", and
    "nonfinite", a sentence that names the sequences.
    """
    losses = compute_gradients(run, batch)  # (n,)
    grad_norm = clip_gradients(run)  # ()
    losses, sources, grad_norm = gather_losses(run, batch, losses, grad_norm)

    # Summed in float64 in batch order: the result does not depend on the number of processes.
    sums = np.bincount(sources, losses, len(run.data.sources))  # (sources,)
    counts = np.bincount(sources, minlength=len(run.data.sources))  # (sources,)
    loss = float(sums.sum() / len(losses))
    # Checked before the update, which would destroy the weights. All processes have gathered the
    # same numbers, so all of them decide alike.
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        for optimizer in run.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return {"skipped": True,
                "nonfinite": describe_nonfinite(run, batch, losses, sources, grad_norm)}
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)  # muP's factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    by_source = {name: round(float(total / count), 5)
                 for name, total, count in zip(run.data.sources, sums, counts) if count}
    return {"loss": loss, "loss_by_source": by_source, "grad_norm": grad_norm, "lr": lr}


def compute_gradients(run: Run, batch: Batch) -> Tensor:
    """Add the gradients of the mean loss of a batch to .grad, a micro-batch at a time; returns the
    loss of each sequence of this process, (n,)."""
    c, losses = run.config, []
    # A chunk keeps ids as uint16 (uint32 for a large vocabulary); PyTorch looks up with int64.
    ids = torch.from_numpy(batch.sequences["token_ids"].astype(np.int64))  # (n, T + 1)
    if run.device.type == "cuda":  # from pinned memory, so that the CPU does not wait for the copy
        ids = ids.pin_memory().to(run.device, non_blocking=True)
    # same_bits adds the gradients of all processes; without it FSDP averages them, and all have
    # equally many sequences.
    total = c.global_batch_size if c.same_bits else len(ids)
    # Gradients of the micro-batches add up in .grad, as if they had been one large batch.
    parts = ids.split(c.micro_batch_size)
    for i, part in enumerate(parts, 1):  # (B, T + 1) each
        if isinstance(run.model, FSDPModule):
            # The groups of HSDP and DDP exchange gradients at the last micro-batch only. (Inside a
            # group it comes after each, or a process would hold gradients of the whole model.) But
            # what is not exchanged yet adds up in reduce_dtype, and a long sum in bfloat16 is
            # rounded at each term; what is exchanged adds up in .grad, in float32.
            run.model.set_requires_all_reduce(i == len(parts) or c.reduce_dtype == "bfloat16")
        loss, token_losses = run.model(part[:, :-1], part[:, 1:])  # (), (B, T)
        (loss * (len(part) / total)).backward()
        losses.append(token_losses.mean(1))  # (B,), no graph behind them
    return torch.cat(losses)


def clip_gradients(run: Run) -> Tensor:
    """Clip the global gradient norm to grad_clip; returns the norm before clipping, ()."""
    parameters, most = [*run.model.parameters()], run.config.grad_clip
    if not run.config.same_bits:
        norm = torch.nn.utils.clip_grad_norm_(parameters, most)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
    # FSDP shards matrices by rows. Sums per row, and the sum of all rows' sums in one order, do not
    # depend on the number of processes.
    sums = []
    for p in parameters:  # one at a time: its squares take twice its gradient's memory
        squares = p.grad.double().square_()
        rows = squares.sum(1) if squares.dim() > 1 else squares  # (rows of the parameter,)
        sums.append(rows.full_tensor() if isinstance(rows, DTensor) else rows)
    norm = torch.cat(sums).sum().sqrt().float()
    for p in parameters:
        p.grad.mul_((most / (norm + 1e-6)).clamp(max=1.0))
    return norm


def gather_losses(run: Run, batch: Batch, losses: Tensor,
                  grad_norm: Tensor) -> tuple[np.ndarray, np.ndarray, float]:
    """losses (n,) of this process -> losses and sources of all (global batch,), in the order of the
    batch; grad_norm as a number. Also sets run.flags."""
    source = torch.from_numpy(batch.sequences["source"].astype(np.float32))
    save_due = 0 < run.config.save_minutes * 60 < time.monotonic() - run.saved_at
    writing = run.saving is not None and not run.saving.share.done()
    flags = torch.tensor([float(len(SIGNALS)), float(save_due), float(writing)])
    # One all_gather for all of it, and one wait of the CPU for the GPU.
    mine = torch.cat([losses, source.to(losses.device), flags.to(losses.device),
                      grad_norm.reshape(1)])  # (2n + 4,)
    everyones = mine.repeat(world_size(), 1)  # (world, 2n + 4)
    if dist.is_initialized():
        dist.all_gather([*everyones], mine)  # into the rows of `everyones`
    table = everyones.cpu().numpy()
    run.flags = tuple(table[:, -4:-1].any(0).tolist())
    # The micro-batches of the processes alternate in the batch.
    pairs = table[:, :-4].reshape(world_size(), 2, -1, run.config.micro_batch_size)
    losses, sources = pairs.transpose(1, 2, 0, 3).reshape(2, -1)  # (global batch,) each
    return losses, sources.astype(np.int64), float(table[:, -1].max())


def describe_nonfinite(run: Run, batch: Batch, losses: np.ndarray, sources: np.ndarray,
                       grad_norm: float) -> str:
    """The error message: step, chunk and sequences of the non-finite loss, and how to skip them."""
    bad = np.flatnonzero(~np.isfinite(losses))[:8]
    named = [f"sequence {batch.numbers[i]} ({run.data.sources[sources[i]]})" for i in bad]
    where = f"not finite on {', '.join(named)}" if named else "finite, but not the gradient"
    chunk, step = batch.visit.chunk, run.step + 1
    skip = sorted({*run.config.skip_chunks, chunk})
    return (f"Step {step}: loss {losses.mean()}, gradient norm {grad_norm}; the update was not"
            f" made. It was chunk {chunk}; the loss is {where} (python tools/lookup.py {run.dir}"
            f" --step={step} prints the step). To leave out the chunk, as Amber did, add"
            f" `skip_chunks = {skip}` to the config, or `on_nonfinite = \"skip_step\"` to leave out"
            " such steps; the same command then goes on from the newest checkpoint.")


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
    # The decay factor: 1 at the peak rate, 0 at the minimum.
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    span = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + left[config.lr_schedule] * span


# ---- starting


def data_for(config: Config) -> Data:
    """The data of a config; UserError if it cannot be trained on with these settings."""
    data = load_data(config.data_dir)
    if data.n_vocab > config.vocab_size or data.seq_len != config.seq_len:
        raise UserError(f"{config.data_dir} has {data.n_vocab} token ids in sequences of"
                        f" {data.seq_len}, the model {config.vocab_size} in sequences of"
                        f" {config.seq_len}: set vocab_size and seq_len alike, or prepare again.")
    data.check_settings(config)
    if not data.schedule(config):
        raise UserError(f"There is nothing to train on in {config.data_dir}: no chunk but those in"
                        f" skip_chunks has a step's {config.global_batch_size} sequences.")
    return data


def make_optimizers(config: Config, model: LLaMA) -> list[torch.optim.Optimizer]:
    """The optimizers, each of its own parameters: AdamW of all of them."""
    return [torch.optim.AdamW(model.parameter_groups(),
                              betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps,
                              weight_decay=config.weight_decay, fused=True)]


def start(config: Config) -> Run:
    """A run with its data, model and optimizers, but no values yet in its weights."""
    micro_batches(config, world_size())  # refused before anything is built
    data = data_for(config)
    device, dtype = parallel.choose_device(config)
    kernels.use(config.kernels)
    # Weights, gradients and two moments, four bytes each; tools/dry_run.py tells what else.
    n_bytes = 16 * meta_model(config).n_params / parallel.shard_size(config, world_size())
    parallel.check_memory(n_bytes, "weights, gradients and AdamW's moments", device)
    # This asks PyTorch for algorithms that give the same bits every time; on a CPU all of them do.
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True)
    mesh = parallel.build_device_mesh(config, device.type)
    model = parallel.build_model(config, device, dtype, mesh)
    parallel.set_timeout(mesh, device, config.timeout_minutes)
    return Run(config, data, data.schedule(config), model, make_optimizers(config, model), device,
               mesh)


def resume(run: Run) -> list[str]:
    """Put a run at its newest usable checkpoint, or at its first step; returns lines for the log.

    A run is never written over: UserError if there are checkpoints and none can be used.
    """
    sound, damaged = on_rank_zero(lambda: ckpt.find_checkpoints(run.dir))
    notes = [f"Passing over {path}: manifest.json is missing or damaged." for path in damaged]
    for path in reversed(sound):
        problem = on_rank_zero(functools.partial(checkpoint_problem, run, path))
        if not problem:
            break
        notes.append(f"Passing over {path}: {problem}.")
    else:
        if notes:
            raise UserError(f"{run.dir} has no usable checkpoint to resume. {' '.join(notes[:3])}"
                            " Give another --run_dir to begin a new run.")
        begin(run, None)
        return [f"Weights from {run.started_from['path']}."] if run.started_from else []
    begin(run, path)
    run.checkpoints = sound[: sound.index(path) + 1]

    def move() -> list[str]:
        # Left where they are, these would be taken for newer ones, or be in the way.
        newer = sound[len(run.checkpoints):]
        return [f"{p.name} is now {ckpt.set_aside(p).name}." for p in damaged + newer]

    return [*notes, f"Resuming {path}, step {run.step}.", *on_rank_zero(move)]


def begin(run: Run, path: Path | None) -> None:
    """Put a run at a verified checkpoint or, if it is None, at its first step."""
    if path is None:
        for optimizer in run.optimizers:
            optimizer.state.clear()
        run.step, run.parent = 0, {}
        if run.config.init_from:
            ckpt.check_ids(Path(run.config.init_from), run.config, run.data.tokenizer)
        run.started_from = initial_weights(run.model, run.config, run.started_from)
        return
    ckpt.load_optimizer(run.model, run.optimizers, path)
    manifest = ckpt.load_weights(run.model, path, verified=True)
    run.step, run.started_from = manifest["step"], manifest["started_from"]
    run.parent = manifest["parent"]
    if path.name.startswith("ckpt_"):
        run.parent = {"checkpoint": path.name, "weights_sha256": manifest["weights_sha256"]}


def initial_weights(model: LLaMA, config: Config, recorded: dict[str, Any]) -> dict[str, Any]:
    """Fill in the weights of init_from, else random ones; returns the manifest's "started_from",
    which must be as `recorded` if the run has begun before."""
    if not config.init_from:
        model.init_weights(config.init_seed or config.seed)
        return {}
    source = ckpt.load_weights(model, config.init_from)
    weights = ckpt.weights_hash(Path(config.init_from))
    if recorded.get("weights_sha256", weights) != weights:
        raise UserError(f"{config.init_from} has other weights than this run began with: it was"
                        " made anew since. --init_from=PATH says where those are now.")
    return {"path": config.init_from, "step": source["step"], "tokens": source["tokens"],
            "data_sha256": source.get("data_sha256"), "weights_sha256": weights}


def history(run: Run, step: int) -> dict[str, Any]:
    """What a checkpoint of a step must have been trained with for this run to go on from it."""
    c = run.config
    visit, _ = step_to_visit(run.schedule, min(step, run.total_steps) - 1)
    passed = [chunk for chunk in sorted({*c.skip_chunks}) if visit.epoch or chunk < visit.chunk]
    return {f.name: getattr(c, f.name) for f in fields(ModelConfig)} | {
        "seed": c.seed, "global_batch_size": c.global_batch_size, "seq_len": c.seq_len,
        "data_sha256": run.data.sha256, "skip_chunks": passed,
        "optimizers": [type(optimizer).__name__ for optimizer in run.optimizers]}


def checkpoint_problem(run: Run, path: Path) -> str:
    """Why a run cannot go on from a checkpoint, or ""."""
    manifest = ckpt.read_manifest(path)
    then, now = manifest["history"], history(run, manifest["step"])
    for key in now:
        if then.get(key, now[key]) != now[key]:
            return f"it was trained with {key} = {then[key]}, now {now[key]}"
    # Every file is hashed before anything is loaded: a flipped bit would go unnoticed.
    return ckpt.verify_checkpoint(path, train_state=True)


def begin_records(run: Run) -> None:
    """Write config.json, and drop the metrics of steps that will be made again."""
    write_json(run.dir / "config.json", asdict(run.config))
    metrics = ckpt.read_metrics(run.dir).items()
    ckpt.write_records(run.dir / "metrics.jsonl", [r for step, r in metrics if step <= run.step])


def run_summary(model: LLaMA, data: Data | None, world: int) -> dict[str, str]:
    """What a run comes to before it begins, line by line; without data, by n_chunks."""
    # All of it follows from the settings, so that a wrong one is seen before the first step.
    c, per_token = model.config, model.flops_per_token(model.config.seq_len)
    steps = [c.sequences_per_chunk // c.global_batch_size] * c.n_chunks
    if data:
        steps = data.steps_per_chunk(c.global_batch_size)
    lengths = " to ".join(map(str, sorted({min(steps), max(steps)})))  # one if all are alike
    total = min(c.epochs * sum(steps), c.max_steps or math.inf)
    how = f" x {world} processes, {c.parallel} in groups of {parallel.shard_size(c, world)}"
    return {
        "parameters": f"{model.n_params:,}",
        "data": f"{c.data_dir}: {len(steps)} chunks of {lengths} steps"
                + (f", without {c.skip_chunks}" if c.skip_chunks else ""),
        "tokens per step": f"{c.tokens_per_step:,} = {c.global_batch_size} sequences of"
                           f" {c.seq_len}; {micro_batches(c, world)} micro-batches of"
                           f" {c.micro_batch_size}{how if world > 1 else ''}",
        "steps": f"{total:,} = {total * c.tokens_per_step:,} tokens",
        "FLOPs": f"{per_token:,} per token, {per_token * total * c.tokens_per_step:.3g} in all",
    }


# ---- between the steps


def look(run: Run, chunk_done: bool) -> tuple[dict[str, Any], str]:
    """Validation by source and, at the end of a chunk, a sample. No global random state is used."""
    c, sample = run.config, ""
    # Both have other shapes than the step, and no gradients: each would be compiled anew.
    eager = torch.compiler.set_stance("force_eager") if c.compile else contextlib.nullcontext()
    with eager:
        valid = validate(run.model, run.data, c.eval_sequences, c.micro_batch_size, rank(),
                         world_size())
        # All processes generate it, because FSDP gathers the weights from all of them.
        if chunk_done and c.sample_tokens:
            # Drawn with the same seed each time: from the likeliest tokens alone it would go in
            # circles ("of the graph of the graph").
            sample = continue_text(run.model, run.data.tokenizer, c.sample_prompt, c.sample_tokens,
                                   temperature=0.8)
    return valid, sample


def log_step(run: Run, record: dict[str, Any], last_step: int, sample: str) -> None:
    """Add a line to metrics.jsonl and, for some steps, lines to train.log and the terminal."""
    if rank() == 0:
        ckpt.append_record(run.dir / "metrics.jsonl", record)
    r = dict.fromkeys(("loss", "grad_norm", "lr"), math.nan) | record  # not there if left out
    # metrics.jsonl has every step; the log has the first few, to see that the run is sound, those
    # with a validation, and one in ten seconds.
    if run.step <= 3 or "valid" in r or time.monotonic() > run.logged_at + 10:
        run.logged_at = time.monotonic()
        # By the speed of this step, without validation and saving.
        left = (last_step - run.step) * run.config.tokens_per_step / max(1, r["tokens_per_s"])
        text = (f"step {run.step}/{last_step}  chunk {r['chunk']}  loss {r['loss']:.4f}  grad norm"
                f" {r['grad_norm']:.2f}  lr {r['lr']:.2e}  {r['tokens_per_s']:,} tok/s"
                f"  {left / 60:.0f} min left")
        bits = [f"{name} {v['bits_per_byte']:.3f}" for name, v in r.get("valid", {}).items()]
        run.log(text + "  bits per byte: " * bool(bits) + ", ".join(bits))
    if sample:
        run.log(f"sample: {sample!r}")


def speed(run: Run, seconds: float) -> dict[str, float]:
    """Tokens per second of a step that took `seconds`; on a GPU also the peak of memory in GB."""
    tokens_per_s = run.config.tokens_per_step / seconds
    figures = {"tokens_per_s": round(tokens_per_s)}
    if run.device.type == "cuda":
        figures["memory_gb"] = round(torch.cuda.max_memory_allocated(run.device) / 1e9, 3)
    if peak := run.config.peak_tflops * 1e12 * world_size():
        # Model FLOPs utilization: the model's own FLOPs over the peak of all devices.
        flops = tokens_per_s * run.model.flops_per_token(run.config.seq_len)
        figures["mfu"] = round(flops / peak, 4)
    return figures


def metadata(run: Run, visit: Visit) -> dict[str, Any]:
    """The entries of manifest.json that say where a run is; visit: that of the step just done."""
    return {"step": run.step, "tokens": run.step * run.config.tokens_per_step,
            "chunk": visit.chunk, "visit": visit.number,
            "chunk_sha256": run.data.manifest["chunks"][visit.chunk]["sha256"],
            "data_sha256": run.data.sha256, "history": history(run, run.step),
            "parent": run.parent,  # so that manifests make a chain
            "started_from": run.started_from, "config": asdict(run.config),
            "environment": environment(run), "git_commit": git_commit()}


def environment(run: Run) -> dict[str, Any]:
    """What decides the last bits of the arithmetic beside the settings."""
    device = platform.processor() or platform.machine()
    if run.device.type == "cuda":
        device = torch.cuda.get_device_name(run.device)
    return {"device": device, "dtype": str(run.model.dtype)[6:],
            "kernels": kernels.use(run.config.kernels),
            "threads": torch.get_num_threads(), "processes": world_size(),
            "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__}


def git_commit() -> str:
    """The commit of this code, with "-dirty" if files differ from it; "" outside a checkout."""
    command = "git describe --always --abbrev=40 --exclude=* --dirty"
    with contextlib.suppress(OSError):  # git may not be installed
        return subprocess.run(command.split(), cwd=Path(__file__).parent, capture_output=True,
                              text=True).stdout.strip()
    return ""


def finish_save(run: Run) -> None:
    """Publish the checkpoint that is being written, if any, and delete what it replaces."""
    if not run.saving:
        return
    saving, run.saving, c = run.saving, None, run.config
    weights_sha256 = ckpt.finish_save(saving)
    if saving.path.name.startswith("ckpt_"):
        run.parent = {"checkpoint": saving.path.name, "weights_sha256": weights_sha256}
    # Only now: until the new checkpoint has its name, the old ones are all there is.
    run.checkpoints = on_rank_zero(lambda: ckpt.drop_old_checkpoints(
        [*run.checkpoints, saving.path], c.keep_rolling, c.keep_train_state))


if __name__ == "__main__":
    run_command(main)
