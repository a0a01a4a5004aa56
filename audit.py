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
from configs import Config, UserError, load, run_command, with_recorded
from data import Data, Visit, load_data, read_json, step_sequences, write_json
from memorize import ages, choose_chunks, chunk_numbers, double_center, sequence_losses
from model import build_for_inference, choose_kernels
from parallel import all_gather_object, init_distributed, rank, world_size

# What others' checkpoints carry beside weights; it is the same at every step.
CONSTANT = re.compile(r"rotary_emb|attn\.(masked_)?bias$")


@dataclass
class Flags:
    """What audit.py takes beside the settings."""

    checkpoints: str = ""  # "7", "0,4,9" or paths; "" = all
    chunks: str = ""  # whose losses are looked at, as "0,5,9"; "" = all
    sequences: int = 64  # of each chunk; 0 = no losses, which leaves out the model
    batch: int = 64  # sequences in memory at a time
    replay: str = ""  # train "7", "0,3" or "all" again, and compare; "" = the other checks


@dataclass
class Point:
    """A checkpoint, and what is claimed of it."""

    path: Path
    manifest: dict[str, Any]  # {} of a published directory
    number: int  # of the visit to a chunk that it ends, as in its name
    visit: Visit | None  # None: a number beyond this data, as in a selection of released chunks


@dataclass
class Report:
    """What the checks have to say: a cell of the table each, and the findings."""

    cells: dict[str, dict[str, str]] = field(default_factory=dict)
    findings: list[dict[str, str]] = field(default_factory=list)

    def say(self, point: Point, check: str, text: str) -> None:
        self.cells.setdefault(point.path.name, {})[check] = text

    def found(self, check: str, sentence: str) -> None:
        self.findings.append({"check": check, "sentence": sentence})


def audit(config: Config, flags: Flags) -> Report:
    """All checks but the replay, the cheapest first."""
    init_distributed(config)
    data, report = load_data(config.data_dir), Report()
    config = with_recorded(config, read_json(Path(config.run_dir) / "config.json"))
    paths = ckpt.select_checkpoints(config.run_dir, flags.checkpoints or "all")
    config = ckpt.with_network(config, paths[0], data)
    if data.n_vocab > config.vocab_size or data.seq_len > config.seq_len:
        raise UserError(f"{config.data_dir} has {data.n_vocab} token ids in sequences of"
                        f" {data.seq_len}: more than this model was made for.")
    chunks = choose_chunks(flags.chunks, chunk_numbers(data))
    schedule = data.schedule(config)
    visits, points = {visit.number: visit for visit in schedule}, []
    for path in paths:
        name = re.fullmatch(r"ckpt_(\d+)", path.name)
        if not name:
            raise UserError(f"{path} is not called ckpt_NUMBER: an audit is of checkpoints at the"
                            " end of a chunk, and the number says which chunk that is.")
        points.append(Point(path, ckpt.read_manifest(path), int(name[1]), visits.get(int(name[1]))))
    points.sort(key=lambda point: point.number)
    check_files(config, data, points, report)
    if rank() == 0:
        for problem in data.verify():
            report.found("data", problem)
        check_tensors(config, data, points, report)
    points, report = all_gather_object((points, report))[0]
    if flags.sequences:
        ids = draw_steps(config, data, chunks, flags.sequences)
        losses = measure_losses(config, data, points, chunks, ids, flags.batch)
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
    by_name = {point.path.name: point for point in points}
    for point in tqdm(points, desc="files", unit="checkpoint", leave=False, disable=None):
        # Old training states are dropped to save space; what is there must be whole.
        problem = ckpt.verify_checkpoint(point.path, (point.path / "train_state").exists())
        problems = [problem] if problem else []
        m, visit = point.manifest, point.visit
        if m and m["data_sha256"] != data.sha256:
            problems.append(f"it was trained on other data than {config.data_dir} holds now")
        elif m:
            if not visit or m["step"] != visit.first_step + visit.steps:
                problems.append(f"it says that it is of step {m['step']}, where its chunk does not"
                                " end")
            elif m["chunk_sha256"] != data.manifest["chunks"][visit.chunk]["sha256"]:
                problems.append(f"it names another hash of chunk {visit.chunk} than the data")
            named = m["parent"]
            parent = by_name.get(named.get("checkpoint"))
            if parent and parent.manifest.get("weights_sha256") != named.get("weights_sha256"):
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
    hashes: dict[str, list[str]] = {}  # by tensor, then by point
    moves: dict[str, np.ndarray] = {}  # by tensor: (points - 1, 2), see `displacements`
    for name in tqdm(names, desc="tensors", leave=False, disable=None):
        shapes = {str(tuple(w[name].shape)) if name in w else "missing" for w in weights}
        if len(shapes) > 1:
            report.found("files", f"{name} is {' or '.join(sorted(shapes))}, by the checkpoint.")
            continue
        tensor = [w[name] for w in weights]
        hashes[name] = [sha256(t.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()
                        for t in tensor]
        finite = [bool(t.isfinite().all()) for t in tensor]
        for point, found, sound in zip(points, hashes[name], finite):
            if not sound:
                report.found("files", f"{point.path}: {name} has values that are not finite.")
            if found != point.manifest.get("tensors", {}).get(name, found):
                report.found("files", f"{point.path}: {name} is not the tensor in manifest.json.")
        if all(finite):
            moves[name] = displacements(tensor)
    check_twins(points, hashes, report)
    if moves and len(points) > 1:
        check_path(config, data, points, moves, report)


def displacements(tensor: list[torch.Tensor]) -> np.ndarray:
    """(points - 1, 2) of a tensor's displacement from each checkpoint to the next: its squared
    length, and its inner product with the displacement after it."""
    rows, before = np.zeros((len(tensor) - 1, 2)), None
    for i, (a, b) in enumerate(zip(tensor, tensor[1:])):
        step = b.float() - a.float()
        rows[i, 0] = step.square().sum(dtype=torch.float64)
        if before is not None:
            rows[i - 1, 1] = (before * step).sum(dtype=torch.float64)
        before = step
    return rows


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
    """A checkpoint between two others lies between them, as far from them as its steps go."""
    total = sum(moves.values())  # (points - 1, 2)
    # The cosine between the displacement to a checkpoint and the one on from it. Steps that know
    # nothing of each other give 0, a common direction more. What is not on the path must be left
    # by the way that led to it: -0.5 and less.
    limit = -0.35 - 2 / math.sqrt(config.hidden_size)  # 1 / sqrt(size) is what chance does
    for i, point in enumerate(points[1:-1]):
        cosine = {}
        for name, move in [("", total), *moves.items()]:
            cosine[name] = move[i, 1] / (math.sqrt(move[i, 0] * move[i + 1, 0]) or 1)
        report.say(point, "path", f"{cosine.pop(''):+.2f}")
        astray = [name for name in cosine if cosine[name] < limit]
        if astray:
            report.found("path", f"{point.path.name} does not lie between its neighbours:"
                                 f" {len(astray)} of {len(moves)} tensors go back by the way they"
                                 f" came, {astray[0]} the first (cosine {cosine[astray[0]]:.2f}).")
    if any(finding["check"] == "path" for finding in report.findings):
        return  # lengths would say the same once more
    # AdamW moves by about the learning rate at each step, so the distance over the sum of the rates
    # changes little from one checkpoint to the next.
    if not all(point.visit for point in points):
        return
    end = [point.visit.first_step + point.visit.steps for point in points]
    n_steps, pace = sum(visit.steps for visit in data.schedule(config)), []
    for i in range(len(total)):
        rates = sum(train.learning_rate(config, step, n_steps)
                    for step in range(end[i] + 1, end[i + 1] + 1))
        pace.append(math.sqrt(total[i, 0]) / (rates or 1))
    for i in range(1, len(pace) - 1):
        times = pace[i] / (math.sqrt(pace[i - 1] * pace[i + 1]) or 1)
        if not 1 / 1.25 < times < 1.25:
            report.found("path", f"{points[i + 1].path.name} is {times:.2f} times as far from the"
                                 " one before as the learning rate and its neighbours explain.")


# ---------------------------------------------------------------------------------------------
# 4. losses: has a checkpoint seen the chunk that it claims to have seen last, and no other?


def draw_steps(config: Config, data: Data, chunks: list[int], n: int) -> dict[int, tuple]:
    """Of each chunk about n sequences, in whole steps where these are not larger: the steps
    and the numbers (steps, batch). The order is random, so they are a random sample."""
    drawn, batch = {}, config.global_batch_size
    for chunk in chunks:
        there = data.manifest["chunks"][chunk]["sequences"]
        steps, k = there // batch, max(1, n // batch)
        chosen = np.linspace(0, max(0, steps - 1), min(k, max(1, steps)) + 2).astype(int)[1:-1]
        rows = [step_sequences(config.seed, chunk, there, step, batch)[:n] for step in chosen]
        drawn[chunk] = (chosen, np.stack(rows))
    return drawn


def measure_losses(config: Config, data: Data, points: list[Point], chunks: list[int],
                   drawn: dict, batch: int) -> dict[tuple[int, int], tuple]:
    """By (point, chunk): the steps drawn and their losses (steps, sequences), in nats. torchrun's
    processes share the checkpoints.

    Nothing is kept for the next audit: a file in the run would be the run's own word."""
    choose_kernels(config.kernels)
    model, mine = build_for_inference(config), {}
    for i in tqdm(range(rank(), len(points), world_size()), desc="losses", unit="checkpoint",
                  leave=False, disable=True if rank() else None):
        ckpt.load_weights(model, points[i].path, verified=True)
        for j, chunk in enumerate(chunks):
            rows = drawn[chunk][1]
            found = sequence_losses(model, data.take(chunk, rows.ravel())["token_ids"], batch)
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
        claimed = (age[k] >= 0) & (age[k] < points[k].number - points[k - 1].number)
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
    logged = ckpt.read_metrics(config.run_dir)
    recorded, expected = [], []
    for k, point in enumerate(points):
        visit = point.visit
        if not logged or not point.manifest or not visit:
            continue
        wrong, n = check_lines(config, data, point, logged)
        report.say(point, "log", f"{n} lines" if not wrong else f"{len(wrong)} wrong")
        if wrong:
            report.found("log", f"metrics.jsonl: {len(wrong)} lines of chunk {visit.chunk} do not"
                                " follow from config and data order, the first is step"
                                f" {wrong[0]}.")
        # The sequences drawn are those of a chunk's first turn.
        if (k and visit.chunk in chunks and not visit.turn
                and points[k - 1].number == point.number - 1):
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


def check_lines(config: Config, data: Data, point: Point, logged: dict) -> tuple[list[int], int]:
    """The steps of a visit whose line contradicts config and data order, and how many lines it
    has. The mean over sources is the loss, and a source has one if the step read of it."""
    own = with_recorded(config, point.manifest["config"])  # a rate may change at a resume
    visit, batch, names = point.visit, own.global_batch_size, data.sources
    total = sum(visit.steps for visit in data.schedule(own))
    sources = np.asarray(data.chunk(visit.chunk)["source"])
    wrong, n = [], 0
    for s in range(visit.steps):
        step = visit.first_step + s + 1
        line = logged.get(step)
        if line is None or "skipped" in line:
            continue
        n += 1
        ids = step_sequences(own.seed, visit.chunk, len(sources), s, batch, visit.turn)
        counts = np.bincount(sources[ids], minlength=len(names))
        by_source = line.get("loss_by_source", {})
        mean = sum(by_source.get(name, 0) * c for name, c in zip(names, counts)) / batch
        if (line.get("chunk") != visit.chunk or line.get("tokens") != step * own.tokens_per_step
                or line.get("lr") != train.learning_rate(own, step, total)
                or set(by_source) != {name for name, c in zip(names, counts) if c}
                or not abs(mean - line.get("loss", math.nan)) < 5e-5):  # five digits are kept
            wrong.append(step)
    return wrong, n


def table(report: Report) -> str:
    """One line per checkpoint, one column per check."""
    columns = ("files", "twins", "path", "trace", "log")
    lines = [f"{'checkpoint':<12}" + "".join(f"{name:>16}" for name in columns)]
    for name, cells in report.cells.items():
        lines.append(f"{name:<12}" + "".join(f"{cells.get(c, '-'):>16}" for c in columns))
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    config, flags = load(argv, Flags)
    if flags.replay:
        return replay.replay_all(config, flags.replay)
    report = audit(config, flags)
    if rank() == 0:
        print(table(report))
        Path(config.run_dir).mkdir(parents=True, exist_ok=True)  # published weights have no run
        write_json(Path(config.run_dir) / "audit.json",
                   {"checkpoints": report.cells, "findings": report.findings})
        if lines := [f"{found['check']}: {found['sentence']}" for found in report.findings]:
            raise UserError("\n".join([f"{config.run_dir}: {len(lines)} found.", *lines]))
        print(f"{config.run_dir}: {len(report.cells)} audited, nothing found.")


if __name__ == "__main__":
    run_command(main)
