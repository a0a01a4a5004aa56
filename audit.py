"""Stage 5: is this run what it says it is?

    python audit.py configs/amber_tiny.py                   # files, twins, path, losses, log
    python audit.py configs/amber_tiny.py --replay=7        # train chunk 7 again, and compare
    python audit.py configs/amber_7b.py --checkpoints=hub/ckpt_100,hub/ckpt_101,hub/ckpt_102
    torchrun --nproc_per_node=2 audit.py configs/amber_tiny.py --replay=all  # a run of 2 processes

The history that a run claims is held against what its files and its weights show: one line per
checkpoint, one column per check, then what was found, and exit status 1 if anything was. Replay is
the proof; the other checks need neither the state of the optimizer nor the same hardware, so that
they serve for directories that others have published. docs/audit.md says what each can find.
"""

import math
import re
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import checkpoint as ckpt
import replay
import train
from checkpoint import all_gather_object, rank, world_size
from configs import Config, UserError, load, run_command, with_recorded
from data import (
    Data,
    Visit,
    chunk_schedule,
    load_data,
    read_json,
    step_sequences,
    unexpected_sequences,
    write_json,
)
from memorize import ages, choose_chunks, chunk_numbers, double_center, sequence_losses
from model import build_for_inference, choose_kernels

# What others' checkpoints carry beside weights; it is the same at every step.
CONSTANT = re.compile(r"rotary_emb|attn\.(masked_)?bias$")


@dataclass
class Point:
    """A checkpoint, and what is claimed of it."""

    path: Path
    manifest: dict[str, Any]  # {} of a published directory
    visit: int  # the number in its name: of the visit to a chunk that it ends


@dataclass
class Report:
    """What the checks have to say: a cell of the table each, and the findings."""

    cells: dict[str, dict[str, str]] = field(default_factory=dict)
    findings: list[dict[str, str]] = field(default_factory=list)

    def say(self, point: Point, check: str, text: str) -> None:
        self.cells.setdefault(point.path.name, {})[check] = text

    def found(self, check: str, sentence: str) -> None:
        self.findings.append({"check": check, "sentence": sentence})


def audit(config: Config, flags: dict[str, Any]) -> Report:
    """All checks but the replay, the cheapest first."""
    train.init_distributed(config)
    data, report = load_data(config.data_dir), Report()
    config = with_recorded(config, read_json(Path(config.run_dir) / "config.json"))
    paths = ckpt.select_checkpoints(config.run_dir, flags["checkpoints"] or "all")
    chunks = choose_chunks(flags["chunks"], chunk_numbers(data))
    points = []
    for path in paths:
        name = re.fullmatch(r"ckpt_(\d+)", path.name)
        if not name:
            raise UserError(f"{path} is not called ckpt_NUMBER: an audit is of checkpoints at the"
                            " end of a chunk, and the number says which chunk that is.")
        points.append(Point(path, ckpt.read_manifest(path), int(name[1])))
    points.sort(key=lambda point: point.visit)
    check_files(config, data, points, report)
    if rank() == 0:
        for problem in data.verify() or unexpected_sequences(data):
            report.found("data", problem)
        check_tensors(config, data, points, report)
    points, report = all_gather_object((points, report))[0]
    if flags["sequences"]:
        ids = draw_steps(config, data, chunks, flags["sequences"])
        losses = measure_losses(config, data, points, chunks, ids, flags["batch"])
        if rank() == 0:
            check_losses(config, data, points, chunks, losses, report)
            check_log(config, data, points, chunks, losses, report)
    return report


# ---------------------------------------------------------------------------------------------
# 1. files: are they whole, and do they name each other?


def check_files(config: Config, data: Data, points: list[Point], report: Report) -> None:
    """Every file against its sha256, and each manifest against the data and the one before it."""
    for path in ckpt.find_checkpoints(config.run_dir)[1]:
        report.found("files", f"{path}: manifest.json is missing or damaged.")
    schedule = chunk_schedule(data.steps_per_chunk(config.global_batch_size), config.skip_chunks)
    ends = {visit.number: visit for visit in schedule}
    by_name = {point.path.name: point for point in points}
    for point in tqdm(points, desc="files", unit="checkpoint", leave=False, disable=None):
        # Old training states are dropped to save space; what is there must be whole.
        problem = ckpt.verify_checkpoint(point.path, (point.path / "train_state").exists())
        problems = [problem] if problem else []
        m, visit = point.manifest, ends.get(point.visit)
        if m and m["data_sha256"] != data.sha256:
            problems.append(f"it was trained on other data than {config.data_dir} holds now")
        elif m:
            if not visit or m["step"] != visit.first_step + visit.steps:
                problems.append(f"it says that it is of step {m['step']}, where its chunk does not"
                                " end")
            elif m["chunk_sha256"] != data.manifest["chunks"][visit.chunk]["sha256"]:
                problems.append(f"it names another hash of chunk {visit.chunk} than the data")
            parent = by_name.get(m["parent"].get("checkpoint"))
            if parent and parent.manifest.get("weights_sha256") != m["parent"]["weights_sha256"]:
                problems.append(f"it was trained from another {parent.path.name} than this one")
        report.say(point, "files", "damaged" if problems else "ok" if m else "no manifest")
        for problem in problems:
            report.found("files", f"{point.path}: {problem}.")


# ---------------------------------------------------------------------------------------------
# 2. and 3. tensors: do two steps have the same, and do the weights move along one path?


def check_tensors(config: Config, data: Data, points: list[Point], report: Report) -> None:
    """Read every tensor of every checkpoint once: its hash, whether it is finite, and how it moved
    since the checkpoint before. What cannot be read is taken off the list of points."""
    weights = []
    for point in [*points]:
        try:
            weights.append(dict(ckpt.read_tensors(point.path)))  # mapped: nothing is read yet
        except UserError as error:
            report.found("files", str(error))
            points.remove(point)
    names = [name for name in dict.fromkeys(n for w in weights for n in w)
             if not CONSTANT.search(name)]
    hashes: dict[str, list] = {}  # by tensor, then by point
    moves: dict[str, np.ndarray] = {}  # by tensor: (points - 1, 3), see `movement`
    for name in tqdm(names, desc="tensors", leave=False, disable=None):
        shapes = {str(tuple(w[name].shape)) if name in w else "missing" for w in weights}
        if len(shapes) > 1:
            report.found("files", f"{name} is {' or '.join(sorted(shapes))}, by the checkpoint.")
            continue
        hashes[name] = [sha256(w[name].contiguous().flatten().view(torch.uint8).numpy()).hexdigest()
                        for w in weights]
        for point, found in zip(points, hashes[name]):
            if found != point.manifest.get("tensors", {}).get(name, found):
                report.found("files", f"{point.path}: {name} is not the tensor in manifest.json.")
        moves[name] = movement([w[name] for w in weights])
    check_twins(points, hashes, report)
    if moves and len(points) > 1:
        check_path(config, data, points, moves, report)


def movement(tensor: list[torch.Tensor]) -> np.ndarray:
    """(points - 1, 3) of one tensor: squared length of its way from each checkpoint to the next,
    inner product of that way with the way after it, and its squared norm."""
    rows, before = [], None
    for a, b in zip(tensor, tensor[1:]):
        way = b.float() - a.float()
        if before is not None:
            rows[-1][1] = (before * way).sum(dtype=torch.float64).item()
        rows.append([way.square().sum(dtype=torch.float64).item(), 0.0,
                     b.float().square().sum(dtype=torch.float64).item()])
        before = way
    return np.array(rows).reshape(-1, 3)


def check_twins(points: list[Point], hashes: dict[str, list], report: Report) -> None:
    """Tensors that are the same at two steps: no step of AdamW leaves one as it was."""
    for i, j in combinations(range(len(points)), 2):
        same = [name for name, of in hashes.items() if of[i] == of[j]]
        if same:
            a, b = points[i], points[j]
            what = ("the same weights" if len(same) == len(hashes) else
                    f"{len(same)} of {len(hashes)} tensors in common, {same[0]} the first")
            report.found("twins", f"{a.path.name} and {b.path.name} have {what}.")
            report.say(a, "twins", b.path.name)
            report.say(b, "twins", a.path.name)
    for point in points:
        report.cells.setdefault(point.path.name, {}).setdefault("twins", "none")


def check_path(config: Config, data: Data, points: list[Point], moves: dict[str, np.ndarray],
               report: Report) -> None:
    """A checkpoint between two others lies between them, and its way is as long as its steps."""
    total = sum(moves.values())  # (points - 1, 3)
    for i, way in enumerate(total):
        if not np.isfinite(way).all():
            report.found("path", f"{points[i + 1].path.name} or the one before it has weights that"
                                 " are not finite.")
            return
    # The cosine of the way to a checkpoint and the way on from it. Steps that know nothing of each
    # other give 0, a common direction more. Who is not on the path has to be left again by the way
    # one came: -0.5 and less. (Long ways in a standing state would give -0.5 too: docs/audit.md.)
    limit = -0.35 - 2 / math.sqrt(config.hidden_size)  # small tensors have 1 / sqrt(size) by chance
    for i, point in enumerate(points[1:-1]):
        cosine = {}
        for name, way in [("", total), *moves.items()]:
            cosine[name] = way[i, 1] / (math.sqrt(way[i, 0] * way[i + 1, 0]) or 1)
        report.say(point, "path", f"{cosine.pop(''):+.2f}")
        astray = [name for name in cosine if cosine[name] < limit]
        if astray:
            report.found("path", f"{point.path.name} does not lie between its neighbours:"
                                 f" {len(astray)} of {len(moves)} tensors go back by the way they"
                                 f" came, {astray[0]} the first (cosine {cosine[astray[0]]:.2f}).")
    if any(finding["check"] == "path" for finding in report.findings):
        return  # lengths would say the same once more
    # AdamW moves by about the learning rate at each step, so the length of the way over the sum of
    # the rates changes little from one checkpoint to the next.
    steps = data.steps_per_chunk(config.global_batch_size)
    schedule = {v.number: v for v in chunk_schedule(steps, config.skip_chunks)}
    if not all(point.visit in schedule for point in points):
        return  # of a run with other numbers, as in a selection of released chunks
    end = [schedule[point.visit].first_step + schedule[point.visit].steps for point in points]
    pace = np.array([math.sqrt(total[i, 0]) / sum(
        train.learning_rate(config, step, sum(steps)) for step in range(end[i] + 1, end[i + 1] + 1))
        for i in range(len(total))])
    for i in range(1, len(pace) - 1):
        times = pace[i] / math.sqrt(pace[i - 1] * pace[i + 1]) if pace.all() else 1
        if not 1 / 1.25 < times < 1.25:
            report.found("path", f"{points[i + 1].path.name} is {times:.2f} times as far from the"
                                 " one before as the learning rate and its neighbours explain.")


# ---------------------------------------------------------------------------------------------
# 4. losses: has a checkpoint seen the chunk that it claims to have seen last, and no other?


def draw_steps(config: Config, data: Data, chunks: list[int], n: int) -> dict[int, np.ndarray]:
    """Of each chunk about n sequences, in whole steps where these are not larger: (steps, batch)
    numbers. The order is random, so they are a random sample of the chunk."""
    drawn, batch = {}, config.global_batch_size
    for chunk in chunks:
        there = data.manifest["chunks"][chunk]["sequences"]
        steps, k = there // batch, max(1, n // batch)
        chosen = np.linspace(0, max(0, steps - 1), min(k, max(1, steps)) + 2).astype(int)[1:-1]
        rows = [step_sequences(config.seed, chunk, there, step, batch)[:n] for step in chosen]
        drawn[chunk] = (chosen, np.stack(rows))
    return drawn


def measure_losses(config: Config, data: Data, points: list[Point], chunks: list[int],
                   drawn: dict, batch: int) -> np.ndarray:
    """Losses (points, chunks) of object arrays (steps, sequences), in nats; processes share them.

    Nothing is kept from one audit to the next: a file in the run would be the run's own word.
    """
    choose_kernels(config.kernels)
    model, mine = build_for_inference(config), {}
    for i in tqdm(range(rank(), len(points), world_size()), desc="losses", unit="checkpoint",
                  leave=False, disable=True if rank() else None):
        ckpt.load_weights(model, points[i].path, verified=True)
        for j, chunk in enumerate(chunks):
            rows = drawn[chunk][1]
            found = sequence_losses(model, data.chunk(chunk)["token_ids"][rows.ravel()], batch)
            mine[i, j] = drawn[chunk][0], found.reshape(rows.shape)
    return {key: value for part in all_gather_object(mine) for key, value in part.items()}


def check_losses(config: Config, data: Data, points: list[Point], chunks: list[int],
                 losses: dict, report: Report) -> None:
    """Which chunks became easier from one checkpoint to the next? Those that were trained between.

    The trace of a chunk is by how much more its loss fell than that of the chunks in between which
    were not trained then: nats, negative where something was learned from it.
    """
    age = ages(config, data, [{"step": point.manifest.get("step"), "checkpoint": point.path.name}
                              for point in points], chunks)  # (points, chunks)
    traces: dict[int, tuple] = {}  # by point: (claimed (chunks,), trace (chunks,), error (chunks,))
    for k in range(1, len(points)):
        claimed = (age[k] >= 0) & (age[k] < points[k].visit - points[k - 1].visit)
        if not claimed.any() or (~claimed).sum() < 2:
            continue  # nothing to look at, or nothing to hold it against
        change = np.stack([(losses[k, j][1] - losses[k - 1, j][1]).ravel()
                           for j in range(len(chunks))])  # (chunks, sequences)
        # Both checkpoints read the same sequences, so that easy and hard ones cancel. The median:
        # chunks seen before are being forgotten, and one that was trained unsaid must not count.
        level = np.median(change.mean(1)[~claimed])
        error = change.std(1, ddof=1) / math.sqrt(change.shape[1])
        traces[k] = claimed, change.mean(1) - level, error
    usual = np.median([trace[claimed].min() for claimed, trace, _ in traces.values()] or [0])
    numbers = np.array(chunk_numbers(data))[chunks]
    # By its losses alone, with the levels of checkpoints and chunks off: what was it trained on?
    means = np.array([[losses[k, j][1].mean() for j in range(len(chunks))]
                      for k in range(len(points))])
    last = numbers[double_center(means).argmin(1)]  # (points,)
    for k, (claimed, trace, error) in traces.items():
        own = np.flatnonzero(claimed)[trace[claimed].argmin()]
        report.say(points[k], "trace", f"{trace[own]:+.3f} ± {error[own]:.3f}")
        who, other = points[k].path.name, np.flatnonzero(~claimed)[trace[~claimed].argmin()]
        # Four standard errors: honest runs are asked hundreds of such questions. Half: what is seen
        # next to a strong trace, but much weaker, is how texts resemble each other.
        if trace[other] < min(-4 * error[other], trace[own] / 2):
            report.found("trace", f"{who} has learned from chunk {numbers[other]}"
                                  f" ({trace[other]:+.3f} ± {error[other]:.3f} nats), not only"
                                  f" from what it claims. It looks like the checkpoint after"
                                  f" chunk {last[k]}.")
        for j in np.flatnonzero(claimed):
            # Only where a usual trace could not have been overlooked.
            if trace[j] > usual / 4 and usual < -6 * error[j]:
                report.found("trace", f"{who} shows no trace of chunk {numbers[j]}"
                                      f" ({trace[j]:+.3f} ± {error[j]:.3f} nats, where"
                                      f" {usual:+.3f} is usual in this run).")


# ---------------------------------------------------------------------------------------------
# 5. the log: does it fit the data order, and what the weights say of those very sequences?


def check_log(config: Config, data: Data, points: list[Point], chunks: list[int], losses: dict,
              report: Report) -> None:
    """Each line of metrics.jsonl against what follows from the config, and the recorded losses
    against those that the checkpoint before gives on the same steps."""
    logged = {r.get("step"): r for r in ckpt.read_records(Path(config.run_dir) / "metrics.jsonl")}
    schedule = chunk_schedule(data.steps_per_chunk(config.global_batch_size), config.skip_chunks)
    visits = {visit.number: visit for visit in schedule}
    recorded, expected = [], []
    for k, point in enumerate(points):
        visit = visits.get(point.visit)
        if not logged or not point.manifest or not visit:
            continue
        wrong, n = check_lines(point, config, data, visit, schedule, logged)
        report.say(point, "log", f"{n} lines" if not wrong else f"{len(wrong)} wrong")
        if wrong:
            report.found("log", f"metrics.jsonl: {len(wrong)} lines of chunk {visit.chunk} do not"
                                " follow from config and data order, the first is step"
                                f" {wrong[0]}.")
        if k and visit.chunk in chunks and points[k - 1].visit == point.visit - 1:
            steps, values = losses[k - 1, chunks.index(visit.chunk)]
            lines = [logged.get(visit.first_step + int(s) + 1, {}).get("loss") for s in steps]
            whole = values.shape[1] == config.global_batch_size
            if whole and len(steps) > 1 and all(type(x) is float for x in lines):
                # Without their means: how far training has come in the chunk is another matter.
                recorded += [x - np.mean(lines) for x in lines]
                expected += [*(values.mean(1) - values.mean())]
    if len(recorded) >= 8:
        r = np.corrcoef(recorded, expected)[0, 1]
        if not r > 0.5:
            report.found("log", f"The recorded losses of {len(recorded)} steps are not those of the"
                                f" sequences they are said to be of: correlation {r:.2f}.")


def check_lines(point: Point, config: Config, data: Data, visit: Visit, schedule: list[Visit],
                logged: dict) -> tuple[list[int], int]:
    """The steps of a visit whose line contradicts config and data order, and how many lines it
    has. The mean over sources is the loss, and a source has one if the step read of it."""
    own = with_recorded(config, point.manifest["config"])  # a rate may change at a resume
    total, batch, names = sum(v.steps for v in schedule), own.global_batch_size, data.sources
    sources = np.asarray(data.chunk(visit.chunk)["source"])
    wrong, n = [], 0
    for s in range(visit.steps):
        step = visit.first_step + s + 1
        line = logged.get(step)
        if line is None or "skipped" in line:
            continue
        n += 1
        ids = step_sequences(own.seed, visit.chunk, len(sources), s, batch)
        counts = np.bincount(sources[ids], minlength=len(names))
        by_source = line.get("loss_by_source", {})
        mean = sum(by_source.get(name, 0) * c for name, c in zip(names, counts)) / batch
        if (line.get("chunk") != visit.chunk or line.get("tokens") != step * own.tokens_per_step
                or line.get("lr") != train.learning_rate(own, step, total)
                or set(by_source) != {name for name, c in zip(names, counts) if c}
                or not abs(mean - line.get("loss", math.nan)) < 5e-5):  # five digits are kept
            wrong.append(step)
    return wrong, n


# ---------------------------------------------------------------------------------------------


def table(report: Report) -> str:
    """One line per checkpoint, one column per check."""
    columns = ("files", "twins", "path", "trace", "log")
    lines = [f"{'checkpoint':<12}" + "".join(f"{name:>16}" for name in columns)]
    for name, cells in report.cells.items():
        lines.append(f"{name:<12}" + "".join(f"{cells.get(c, '-'):>16}" for c in columns))
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    config, flags = load(argv, checkpoints="", chunks="", sequences=64, batch=64, replay="")
    if flags["sequences"] < 0 or flags["batch"] < 1:
        raise UserError("--sequences must be 0 or more (0: no losses), and --batch 1 or more.")
    if flags["replay"]:
        replay.replay_all(config, flags["replay"])
        return
    report = audit(config, flags)
    if rank() == 0:
        print(table(report))
        Path(config.run_dir).mkdir(parents=True, exist_ok=True)  # published weights have no run
        write_json(Path(config.run_dir) / "audit.json",
                   {"checkpoints": report.cells, "findings": report.findings})
        if not report.findings:
            print(f"{config.run_dir}: {len(report.cells)} checkpoints, nothing found.")
            return
        sentences = [f"{f['check']}: {f['sentence']}" for f in report.findings]
        raise UserError("\n".join([f"{config.run_dir}: {len(sentences)} findings.", *sentences]))


if __name__ == "__main__":
    run_command(main)
