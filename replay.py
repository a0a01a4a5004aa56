"""Train a chunk again, and compare every bit, and every line of the log, with what the run has.

    python audit.py configs/amber_tiny.py --replay=7     # chunk visit 7; --replay=0,3; --replay=all

The last check of audit.py, and the only one that proves. A run is a pure function of its config and
its data, so a checkpoint can be made again from the one before it. It takes the time of training
and the state of the optimizer, and it is exact on CPUs, with the same threads and processes.
"""

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import checkpoint as ckpt
import train
from configs import Config, UserError, with_recorded
from data import Visit
from model import choose_kernels
from parallel import all_gather_object, init_distributed, rank

# The entries of a line of metrics.jsonl that a replay must reproduce: the others are speeds, memory
# and the like, different each time.
TIMELESS = ("loss", "loss_by_source", "grad_norm", "lr")


def replay_all(config: Config, which: str) -> None:
    """Replay visits "7", "0,3" or "all"; UserError with what differs in any of them."""
    init_distributed(config)
    if which == "all":
        paths = [path for path in ckpt.select_checkpoints(config.run_dir, "all")
                 if path.name.startswith("ckpt_")]
    else:
        paths = ckpt.select_checkpoints(config.run_dir, which)
    problems = []
    for path in paths:
        # One that fails must not keep the others from being tried.
        try:
            text = replay(config, path)
            if rank() == 0:
                tqdm.write(text)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def replay(config: Config, after: Path) -> str:
    """Train the chunk that ends in a checkpoint again; a sentence if all bits are equal.

    Settings, and a CPU's threads, are those the checkpoint names. UserError with the first tensor
    that differs and by how much, and the first line of metrics.jsonl.
    """
    problem, manifest = ckpt.verify_checkpoint(after), ckpt.read_manifest(after)
    if problem or not manifest:
        raise UserError(f"{after} cannot be replayed: {problem or 'it has no manifest'}.")
    config = with_recorded(config, manifest["config"])
    # The number of threads decides the order of sums, and so the last bits.
    config.threads = manifest["environment"]["threads"]
    choose_kernels(config.kernels)
    run = train.start(config)
    if manifest["data_sha256"] != run.data.sha256:
        raise UserError(f"{after} was trained on other data than {config.data_dir} holds now.")
    visit = next((v for v in run.schedule if v.number == manifest["visit"]), None)
    if visit is None or visit.first_step + visit.steps != manifest["step"]:
        raise UserError(f"{after} says that it is of step {manifest['step']}, where no chunk ends.")
    before = load_start(run, visit, manifest)
    logged = ckpt.read_metrics(run.dir)
    # The same steps as in train.py's loop, without saving, validation and samples, none of which
    # leaves a trace in the weights.
    other_lines = []
    for step in tqdm(range(visit.first_step + 1, manifest["step"] + 1), unit="step",
                     desc=f"chunk {visit.chunk} again", disable=True if rank() else None):
        lr = train.learning_rate(config, step, run.total_steps)
        train.verify_chunk(run)
        record = train.train_step(run, train.load_batch(run, run.step), lr)
        run.step = step
        # JSON keeps every digit of a float, so != compares bits. A step that is not in the log (it
        # may have been cut short) is compared with itself.
        if any(record.get(key) != logged.get(step, record).get(key) for key in TIMELESS):
            other_lines.append(step)
    n, differing = compare(run, after)
    if not differing and not other_lines:
        lines = sum(s in logged for s in range(visit.first_step + 1, run.step + 1))
        return (f"{after} is what chunk {visit.chunk} makes of {before}: {n} tensors, bit for bit,"
                f" and {lines} lines of metrics.jsonl.")
    made_with = environment_note(run, manifest)
    if differing:
        name, by, largest = differing[0]
        raise UserError(f"{after} is not what chunk {visit.chunk} makes of {before} here:"
                        f" {len(differing)} of {n} tensors differ, the first is {name}, by up to"
                        f" {by:.3g} where its largest value is {largest:.3g}.{made_with}")
    raise UserError(f"{after} is what chunk {visit.chunk} makes of {before}, but metrics.jsonl says"
                    f" something else of {len(other_lines)} steps, the first is"
                    f" {other_lines[0]}.{made_with}")


def environment_note(run: train.TrainState, manifest: dict[str, Any]) -> str:
    """How this machine differs from the one a checkpoint was made on, for the end of a sentence."""
    # Another version of PyTorch or number of threads changes the last bits of an honest run too.
    now, then = train.environment(run), manifest["environment"]
    other = ", ".join(f"{key} {then[key]!r}, now {now[key]!r}" for key in then
                      if then[key] != now.get(key))
    return f" It was made with {other}." if other else ""


def load_start(run: train.TrainState, visit: Visit, manifest: dict[str, Any]) -> Path | str:
    """Put a run where a visit begins; says where that is."""
    # A run starts at one of three places: where the chunk before ended, at the weights of another
    # run, or at weights drawn from the seed.
    if visit.first_step:
        found = [path for path in ckpt.list_checkpoints(run.dir)
                 if ckpt.read_manifest(path)["step"] == visit.first_step]
        if not found:
            raise UserError(f"Chunk {visit.chunk} cannot be trained again: {run.dir} has no"
                            f" checkpoint of step {visit.first_step}, where it begins.")
        problem = ckpt.verify_checkpoint(found[-1], train_state=True)
        if problem:
            raise UserError(f"Chunk {visit.chunk} cannot be trained again from {found[-1]}:"
                            f" {problem}. (keep_train_state = 0 keeps what is needed for it.)")
        train.restore(run, found[-1])
        return found[-1]
    if manifest["started_from"]:
        origin = Path(run.config.init_from or manifest["started_from"]["path"])
        ckpt.load_weights(run.model, origin)
        return origin
    run.model.init_weights(run.config.init_seed or run.config.seed)
    return "the initial weights"


def compare(run: train.TrainState, path: Path) -> tuple[int, list[tuple[str, float, float]]]:
    """Tensors compared, and (name, largest difference, largest value) of those not equal."""
    theirs = dict(ckpt.read_tensors(path))
    ours = ckpt.copy_to_host(ckpt.named_parameters(run.model))
    # keep_train_state may have deleted an older state of the optimizer: then the weights must do.
    if (path / "train_state").exists() and not ckpt.verify_checkpoint(path, train_state=True):
        theirs |= dict(ckpt.read_tensors(path / "train_state", "optimizer"))
        ours += ckpt.copy_to_host(ckpt.optimizer_tensors(run.model, run.optimizer))
    differing = []
    for name, a in ours:  # this process's share
        b = theirs[name]
        if not torch.equal(a.view(torch.int32), b.view(torch.int32)):  # bits: NaN equals itself
            difference = (a.double() - b.double()).abs().max().item()
            differing.append((name, difference, b.abs().max().item()))
    # Every process has compared its own share of the tensors: join their lists.
    return len(theirs), sum(all_gather_object(differing), [])
