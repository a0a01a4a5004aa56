"""Stage 5: check a run's files, weights, losses and log against its recorded history.

    python audit.py configs/amber_tiny.py                # all checks but the replay
    python audit.py configs/amber_tiny.py --replay=7     # train chunk 7 again, and compare
    python audit.py configs/amber_7b.py --checkpoints=hub/ckpt_100,hub/ckpt_101,hub/ckpt_102
    torchrun --nproc_per_node=2 audit.py configs/amber_tiny.py --replay=all  # a run of 2 processes

An audit compares the history that a run claims with its files and weights: one line per checkpoint,
one column per check, then what was not checked and the findings, and exit status 1 if there are
any. Only the replay proves anything. The other checks need no optimizer's state, and most of them
no log, so they work on published directories too. docs/audit.md says what each can find.
"""

import math
import re
from collections import ChainMap
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

import checkpoint as ckpt
import memorize
import parallel
import train
from configs import PLACE, Config, UserError, load, progress, run_command, with_recorded
from data import Data, Visit, load_data, read_json, remove, step_sequences
from eval import validate
from parallel import all_gather_object, on_rank_zero, rank, world_size

COLUMNS = ("files", "twins", "path", "trace", "ties", "log")
VECTORS = "norms and biases"  # each has too few values: all of them are one tensor of the path
# What a replay must reproduce of a line of metrics.jsonl; its speed differs each time.
REPRODUCIBLE = ("loss", "loss_by_source", "grad_norm", "lr", "valid")


@dataclass
class Flags:
    """What audit.py takes beside the settings."""

    checkpoints: str = ""  # "7", "0,4,9" or paths; "" = all
    chunks: str = ""  # whose losses are measured, as "0,5,9"; "" = all
    sequences: int = 64  # of each chunk; 0 = no losses, which leaves out the model
    replay: str = ""  # train "7", "0,3" or "all" again, and compare; "" = the other checks


@dataclass
class Point:
    """A checkpoint at the end of a chunk; or the initial weights, number -1."""

    name: str
    path: Path
    manifest: dict[str, Any]  # {} of a published directory; of the initial weights the step alone
    config: Config  # with the settings in its own manifest
    number: int  # of the visit that it ends, as in its name
    visit: Visit | None  # None: this data has no such visit, as in a selection of released chunks
    row: dict[str, str] = field(default_factory=dict)  # a cell for each of COLUMNS
    losses: dict[int, np.ndarray] = field(default_factory=dict)  # by chunk: (sequences,), nats
    figures: list[tuple] = field(default_factory=list)  # see measure_figures

    @property
    def last_step(self) -> float:
        """Steps of the run until the end of its visit; NaN if it has none."""
        return self.visit.first_step + self.visit.steps if self.visit else math.nan


@dataclass
class Audit:
    """A run, and what is found in it."""

    config: Config  # as in config.json
    data: Data
    points: list[Point]  # in the order of their numbers
    metrics: dict[int, dict[str, Any]]  # the lines of metrics.jsonl, by step
    settings: dict[int, Config]  # in each manifest, rolling ones too, by its step
    findings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what is honest but unusual, or not checked

    def find(self, check: str, what: str) -> None:
        self.findings.append(f"{check}: {what}.")

    def rates(self, steps: range) -> list[list[float]]:
        """The learning rates of steps (from 1) by each manifest that can tell: those within, the
        one before and the one after. One list, if they agree."""
        ways, before = [], max((step for step in self.settings if step < steps.start), default=0)
        for last, config in (self.settings or {math.inf: self.config}).items():
            if last >= before:
                total = sum(visit.steps for visit in self.data.schedule(config))
                way = [train.learning_rate(config, step, total) for step in steps]
                ways += [way] if way not in ways else []
            if last >= steps.stop - 1:
                break
        return ways

    def rate_sums(self, points: list[Point]) -> np.ndarray:
        """The sum of the learning rates between each checkpoint and the next, (points - 1,); NaN
        where it is unknown: the data has no such visit, or settings have changed."""
        sums = []
        for a, b in pairwise(points):
            known = a.last_step < b.last_step  # neither is NaN
            ways = self.rates(range(a.last_step + 1, b.last_step + 1)) if known else []
            sums.append(sum(ways[0]) if len(ways) == 1 else math.nan)
        return np.array(sums)


def audit(config: Config, flags: Flags) -> Audit:
    """All checks but the replay, the cheapest first."""
    parallel.init_distributed(config)
    config = with_recorded(config, read_json(Path(config.run_dir) / "config.json"))
    data = load_data(config.data_dir, config.seq_len)
    paths = ckpt.select_checkpoints(config.run_dir, flags.checkpoints or "all")
    config = ckpt.with_network(config, paths, data.tokenizer)
    a = Audit(config, data, list_points(config, data, paths), ckpt.read_metrics(config.run_dir),
              list_settings(config))
    run = build_run(a) if flags.sequences else None

    def check_disk() -> tuple[list, ...]:
        check_data(a)
        check_files(a)
        check_tensors(a, run)
        return a.points, a.findings, a.notes

    a.points, a.findings, a.notes = on_rank_zero(check_disk)
    readable = [point for point in a.points if point.row["files"] not in ("damaged", "unreadable")]
    if run and readable:
        chunks = memorize.choose_chunks(flags.chunks, memorize.chunk_numbers(data))
        measure(a, run, readable, chunks, flags)
        check_trace(a, readable, chunks)
        check_ties(a, run, readable)
        check_log(a)
    return a


def list_points(config: Config, data: Data, paths: list[Path]) -> list[Point]:
    """The checkpoints in the order of their numbers; UserError if one has none."""
    visits, points = {visit.number: visit for visit in data.schedule(config)}, []
    for path in paths:
        if not (name := re.fullmatch(r"ckpt_(\d+)", path.name)):
            raise UserError(f"{path} is not called ckpt_NUMBER, by the number of its last chunk.")
        manifest, number = ckpt.read_manifest(path), int(name[1])
        own = with_recorded(config, manifest.get("config", {}))
        points.append(Point(path.name, path, manifest, own, number, visits.get(number)))
    return sorted(points, key=lambda point: point.number)


def list_settings(config: Config) -> dict[int, Config]:
    """The settings in each manifest of a run, rolling checkpoints' too, by its step."""
    manifests = map(ckpt.read_manifest, ckpt.list_checkpoints(config.run_dir))
    return {m["step"]: with_recorded(config, m["config"]) for m in manifests}


def build_run(a: Audit) -> train.Run:
    """The model with which losses are measured, whole in each process; puts the initial weights
    before the checkpoints, if they can be made."""
    config = replace(a.config, compile=False)
    device, dtype = parallel.choose_device(config)
    train.kernels.use(config.kernels)
    model = parallel.build_model(config, device, dtype, None)
    run = train.Run(config, a.data, a.data.schedule(config), model, [], device)
    manifest = next((point.manifest for point in a.points if point.manifest), None)
    if not manifest:  # published: nobody says how it began
        return run
    run.started_from = manifest["started_from"]
    origin = run.started_from and (config.init_from or run.started_from["path"])
    config.init_from = origin or ""
    try:
        train.begin(run, None)
        row = {"files": origin or f"seed {config.init_seed or config.seed}"}
        a.points.insert(0, Point("start", Path(), {"step": 0}, config, -1, Visit(-1, 0, 0, 0), row))
    except UserError as problem:
        a.notes.append(f"The initial weights were not compared. {problem}")
    return run


# ---- files: are they whole, do they name each other, do the weights move along one path?


def check_data(a: Audit) -> None:
    """Every file of the data against its sha256. Then every sequence: none of validation may be in
    a chunk, and none may be in the chunks more often than the weight of its source explains."""
    data, manifest = a.data, a.data.manifest
    if problems := data.verify():
        a.findings += [f"data: {problem}" for problem in problems]
        return
    chunks = [sequence_keys(data.chunk(i)["token_ids"]) for i in range(len(manifest["chunks"]))]
    held_out = [sequence_keys(data.validation(name)["token_ids"])
                for name in data.validation_sources]
    keys, first, times = np.unique(np.concatenate(chunks), return_index=True, return_counts=True)
    # Twice by chance: honest text has a document in two files, or the same licence in each.
    weights = [source.get("weight", 1) for source in manifest["sources"]]
    canaries = manifest.get("canaries", {})  # how often they are planted: how many of them
    usual = max([2 * math.ceil(max(weights)), *map(int, canaries)])
    leaked = np.isin(keys, np.concatenate([[0], *held_out]))
    begins = np.cumsum([0, *map(len, chunks)])
    for i in np.flatnonzero((keys != 0) & (leaked | (times > usual))):
        chunk = int(np.searchsorted(begins, first[i], side="right")) - 1
        what = "a validation sequence too" if leaked[i] else f"{times[i]} times in the chunks"
        a.find("data", f"Sequence {first[i] - begins[chunk]} of chunk {chunk} is {what}")


def sequence_keys(token_ids: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each sequence of ids (n, T + 1): int64 (n,). 0 for near-constant sequences
    such as 0, 0, 0, ..., which honest data has more than once."""
    keys = (hash(row.tobytes()) if len(set(row[:64].tolist())) >= 16 else 0 for row in token_ids)
    return np.fromiter(keys, np.int64, len(token_ids))


def check_files(a: Audit) -> None:
    """Every file against its sha256; each manifest against data, settings and the one before it;
    config.json against the newest; and whether a checkpoint is missing."""
    run_dir, visits = Path(a.config.run_dir), a.data.schedule(a.config)
    a.findings += [f"files: {path}: manifest.json is missing or damaged."
                   for path in ckpt.find_checkpoints(run_dir)[1]]
    names = {visit.number: f"ckpt_{visit.number:03d}" for visit in visits}
    before = dict(zip(names, [None, *names.values()]))
    weights = {point.name: point.manifest.get("weights_sha256") for point in a.points}
    for point in progress([point for point in a.points if point.number >= 0], "files"):
        # Old training states are dropped to save space; what is there must be whole.
        problems = [ckpt.verify_checkpoint(point.path, (point.path / "train_state").exists())]
        m, visit, claims = point.manifest, point.visit, {}
        if m and visit:
            parent = before[visit.number]
            known = weights.get(parent, m["parent"].get("weights_sha256"))
            claims = {"data_sha256": a.data.sha256, "step": point.last_step,
                      "tokens": point.last_step * point.config.tokens_per_step,
                      "visit": visit.number, "chunk": visit.chunk,
                      "chunk_sha256": a.data.manifest["chunks"][visit.chunk]["sha256"],
                      "parent": {"checkpoint": parent, "weights_sha256": known} if parent else {}}
        elif m:
            problems.append("its number is not that of a chunk of the data")
        problems += [f"its {key} is {m[key]}, where data and checkpoints have {value}"
                     for key, value in claims.items() if m[key] != value]
        point.row["files"] = "damaged" if any(problems) else "ok" if m else "no manifest"
        a.findings += [f"files: {point.path}: {problem}." for problem in problems if problem]
    if not a.settings:
        return a.notes.append("Nothing records this run: no log and no hash was compared.")
    for (_, old), (step, new) in pairwise(a.settings.items()):
        if changes := differences(old, new):
            a.notes.append(f"The settings were changed by step {step}: {changes}.")
    last, total = max(a.settings), sum(visit.steps for visit in visits)
    changes, planned = differences(a.settings[last], a.config), a.config.max_steps or total
    if changes and max(a.metrics, default=0) <= last:  # no step was made with the new ones since
        a.find("files", f"{run_dir}/config.json is not that of step {last}: {changes}")
    absent = [names[visit.number] for visit in visits
              if visit.first_step + visit.steps <= last and names[visit.number] not in weights]
    if absent:
        a.notes.append(f"{len(absent)} checkpoints were not compared: {', '.join(absent[:9])}.")
    if last < min(planned, total):
        if (run_dir / "train.log").exists():
            a.notes.append(f"The run is at step {last} of {planned}.")
        else:
            a.find("files", f"The newest checkpoint is of step {last} of {planned}, and there is"
                   " no train.log that says why")


def differences(old: Config, new: Config) -> str:
    """The settings that differ, but for places, as "weight_decay 0.1 -> 0.0"."""
    return ", ".join(f"{key} {value!r} -> {getattr(new, key)!r}" for key, value in vars(old).items()
                     if key not in PLACE and value != getattr(new, key))


def check_tensors(a: Audit, run: train.Run | None) -> None:
    """Read every tensor of every checkpoint once: its hash, whether it is finite, and how it moved
    since the checkpoint before."""
    readable, weights = [], []
    for point in a.points:
        try:
            if point.number < 0:
                tensors = {name: p.detach().cpu() for name, p in run.model.named_parameters()}
            else:
                ckpt.with_network(a.config, [point.path], a.data.tokenizer)
                network = asdict(ckpt.read_network(point.path))
                if wrong := [key for key in network if network[key] != getattr(a.config, key)]:
                    raise UserError(f"{point.path} has another {wrong[0]} than the first.")
                tensors = dict(ckpt.read_tensors(point.path))  # mapped: nothing is read yet
            weights.append(tensors)
            readable.append(point)
            point.row["twins"] = "none"
        except UserError as error:
            point.row["files"] = "unreadable"
            a.find("files", str(error).rstrip("."))
    # Old exports hold a table of rotary angles too, the same at every step.
    names = {name: 0 for tensors in weights for name in tensors if not name.endswith("inv_freq")}
    hashes, moves = {}, {}  # by tensor: hashes by checkpoint; `displacements`
    for name in progress(names, "tensors"):
        shapes = {str(tuple(w[name].shape)) if name in w else "missing" for w in weights}
        if len(shapes) > 1:
            a.find("files", f"{name} is {' or '.join(sorted(shapes))}, by the checkpoint")
            continue
        versions = [w[name] for w in weights]
        hashes[name] = [sha256(ckpt.raw_bytes(t)).hexdigest() for t in versions]
        finite = [bool(t.isfinite().all()) for t in versions]
        for point in [point for point, each in zip(readable, finite) if not each]:
            a.find("files", f"{point.path}: {name} has values that are not finite")
        if all(finite):
            group = name if versions[0].dim() > 1 else VECTORS
            moves[group] = moves.get(group, 0) + displacements(versions)
    check_twins(a, readable, hashes)
    if len(readable) > 2 and moves:
        check_path(a, readable, moves)
    else:
        a.notes.append("No path was looked at: that takes three checkpoints.")


def displacements(versions: list[torch.Tensor]) -> np.ndarray:
    """Of a tensor's displacements from each checkpoint to the next, (n, n + 2): the inner products
    with each other, 0 beyond seven on either side; with the weights that they begin at; and the
    squared length of these weights."""
    n, recent = len(versions) - 1, []
    table = np.zeros((n, n + 2))
    for i, (a, b) in enumerate(pairwise(versions)):
        a, step = a.float(), b.float() - a.float()
        recent = [*recent[-7:], step]
        for j, other in enumerate(recent, i + 1 - len(recent)):
            table[i, j] = table[j, i] = (other * step).sum(dtype=torch.float64)
        table[i, n:] = [(a * x).sum(dtype=torch.float64) for x in (step, a)]
    return table


def check_twins(a: Audit, points: list[Point], hashes: dict[str, list[str]]) -> None:
    """Tensors that are equal in two checkpoints: every step of AdamW changes all of them, unless
    its learning rate is 0."""
    rates = a.rate_sums(points)
    for i, j in combinations(range(len(points)), 2):
        one, two = points[i], points[j]
        same = [name for name, versions in hashes.items() if versions[i] == versions[j]]
        if same and rates[i:j].sum() != 0:
            a.find("twins", f"{one.name} and {two.name} have {len(same)} of {len(hashes)} tensors"
                   f" in common, {same[0]} the first")
            one.row["twins"], two.row["twins"] = two.name, one.name


def check_path(a: Audit, points: list[Point], moves: dict[str, np.ndarray]) -> None:
    """A checkpoint lies between its neighbours, as far from them as its learning rates explain, and
    weights shrink by no more than their decay. moves: `displacements` by tensor."""
    # The cosine between the displacement to a checkpoint and the one on from it is 0 or more; for a
    # checkpoint of another run -0.5 or less. Its standard deviation by chance is 1 / sqrt(size).
    limit = -0.4 - 2 / math.sqrt(a.config.hidden_size)
    total, path = sum(moves.values()), [*range(len(points))]
    for point, cosine in zip(points[1:-1], cosines(total, path)):
        point.row["path"] = f"{cosine:+.2f}"
    while len(path) > 2:
        bends = {name: cosines(move, path) for name, move in moves.items()}  # (len(path) - 2,) each
        worst = min(bends, key=lambda name: bends[name].min())
        if (cosine := bends[worst].min()) >= limit:
            break
        # Of it and its neighbours, the one without which all is straight; else it.
        at, least = bends[worst].argmin() + 1, {}
        for j in (at, at - 1, at + 1):
            rest = [i for i in path if i != path[j]]
            least[j] = min(min(cosines(move, rest), default=1) for move in moves.values())
        wrong = path.pop(max(least, key=least.get) if max(least.values()) >= limit else at)
        a.find("path", f"{points[wrong].name} is not on the way of the others: {worst} goes back"
               f" by the way it came (cosine {cosine:.2f})")
    if a.config.adam_beta1**2 < a.config.adam_beta2:  # else AdamW's steps may have any length
        check_distances(a, [points[i] for i in path], np.diag(gram(total, path)))
    rates, few = a.rate_sums(points), 1.5 / (1 - a.config.adam_beta1)
    for i, (one, two) in enumerate(pairwise(points)):
        # The gradient's part of many steps makes trained weights longer.
        if {i, i + 1} <= {*path} and one.number >= 0 and two.last_step - one.last_step > few:
            inward, size = sum(moves[name][i, -2:] for name in moves if name != VECTORS)
            decay, pull = two.config.weight_decay, -inward / size
            if pull > (1.5 * decay + 0.1) * rates[i]:
                a.find("path", f"From {one.name} to {two.name} the weights shrink as by a weight"
                       f" decay of {pull / rates[i]:.2f}, not {decay}")


def gram(table: np.ndarray, path: list[int]) -> np.ndarray:
    """The inner products of the displacements along some of the checkpoints."""
    n = len(table)
    steps = np.diff(np.tri(n + 1, n, -1)[path], axis=0)  # (len(path) - 1, n): which are part of it
    return steps @ table[:, :n] @ steps.T


def cosines(table: np.ndarray, path: list[int]) -> np.ndarray:
    """Between the displacement to each inner checkpoint of a path and the one on from it."""
    products = gram(table, path)
    lengths = np.sqrt(np.maximum(np.diag(products), 1e-30))
    return np.diag(products, 1) / (lengths[:-1] * lengths[1:])


def check_distances(a: Audit, points: list[Point], squares: np.ndarray) -> None:
    """The distances (squared) between checkpoints against those before and after."""
    # AdamW moves by about the learning rate at each step, so the distance over the sum of the rates
    # changes slowly. Steps are not all in one direction, so many of them go less far each: only
    # intervals of about equally many steps are compared.
    steps, last, astray = np.diff([point.last_step for point in points]), len(points) - 2, {}
    with np.errstate(all="ignore"):  # of no step, or an unknown one
        pace = np.log(squares) / 2 - np.log(a.rate_sums(points))
    for i in range(last + 1):
        # The first and the last: as if the two next to it went on alike. In a warm-up the first
        # steps all go in one direction, so that it may be far longer.
        inner = 0 < i < last
        near = [i - 1, i + 1] if inner else [abs(i - 1), abs(i - 2)]
        low, high = 0.7 if i > 1 else 0.5, 1.25 if inner else 1.4 if i else 2.7
        if (inner or last > 2) and max(steps[[i, *near]]) < 1.2 * min(steps[[i, *near]]):
            usual = pace[near].mean() if inner else 2 * pace[near[0]] - pace[near[1]]
            times = max(math.exp(pace[i] - usual), 1e-9)
            if times < low or times > high:  # not if it is NaN
                astray[i] = math.log(times) / math.log(low if times < 1 else high), times, near
    # One that is too long makes those near it look too short: only the worst is named, and what was
    # compared with none that is astray.
    for i, found in astray.items():
        if found == max(astray.values()) or not {*found[2]} & {*astray}:
            a.find("path", f"{points[i].name} and {points[i + 1].name} are {found[1]:.2f} times as"
                   " far apart as rates and neighbours explain")


# ---- losses: has a checkpoint seen what it claims, and do weights and log say the same?


def measure(a: Audit, run: train.Run, points: list[Point], chunks: list[int], flags: Flags) -> None:
    """Fill in the points' losses of flags.sequences sequences of each chunk, and their figures."""
    drawn = {chunk: memorize.draw_sequences(a.config, a.data, chunk, flags.sequences)[1]
             for chunk in chunks}
    # torchrun's processes share the checkpoints. Nothing is kept: a file could be changed.
    mine: dict[int, tuple] = {}
    for k in progress(range(rank(), len(points), world_size()), "losses"):
        if points[k].number < 0:
            train.begin(run, None)
        else:
            ckpt.load_weights(run.model, points[k].path, verified=True)
        losses = {chunk: memorize.sequence_losses(run.model, sequences["token_ids"],
                                                  a.config.micro_batch_size)
                  for chunk, sequences in drawn.items()}
        mine[k] = losses, measure_figures(a, run, points[k], flags)
    for k, measured in ChainMap(*all_gather_object(mine)).items():
        points[k].losses, points[k].figures = measured


def measure_figures(a: Audit, run: train.Run, point: Point, flags: Flags) -> list[tuple]:
    """What the log has of the weights in run.model: loss and gradient norm of the next step, and
    the validation at their own. (kind, relative difference, sentence) for each."""
    figures, step, size = [], point.last_step, a.config.global_batch_size
    metrics, c = a.metrics if point.manifest else {}, point.config  # the log of this run alone
    line = metrics.get(step + 1, {})
    if "loss" in line and size <= flags.sequences:
        batch = train.load_batch(run, step, whole=True)
        loss = float(train.compute_gradients(run, batch).double().mean())
        norm = float(train.clip_gradients(run))
        figures = [("loss", step + 1, loss, line["loss"]),
                   ("grad_norm", step + 1, norm, line.get("grad_norm"))]
        run.model.zero_grad(set_to_none=True)
    if recorded := metrics.get(step, {}).get("valid"):
        valid = validate(run.model, a.data, c.eval_sequences, c.micro_batch_size)
        figures += [("valid", step, valid[name]["loss"], recorded.get(name, {}).get("loss"))
                    for name in valid]
    return [(kind, abs(here / (then or math.nan) - 1),
             f"{kind} of step {step} is {then}, and these weights give {here:.7g}")
            for kind, step, here, then in figures]


def check_ties(a: Audit, run: train.Run, points: list[Point]) -> None:
    """What weights and metrics.jsonl both tell must be the same."""
    now = train.environment(run)
    exact = now["dtype"] == "float32" and all(
        point.manifest.get("environment", now)[key] == now[key]
        for point in points for key in ("device", "dtype", "kernels"))
    for kind in ("loss", "grad_norm", "valid"):
        # In float32 another number of threads or processes changes 1e-6. Other devices, and
        # bfloat16, change more, but all figures alike: what stands out is wrong.
        errors = [(point, error, sentence) for point in points
                  for what, error, sentence in point.figures if what == kind]
        usual = np.median([error for _, error, _ in errors] or [0])
        limit = 1e-5 if exact else min(0.01, max(1e-5, 10 * usual))
        for point, error, sentence in errors:
            point.row["ties"] = max(point.row.get("ties", "0"), f"{error:.0e}", key=float)
            if not error <= limit:  # it may be NaN
                a.find("ties", f"{point.name}: in metrics.jsonl {sentence} (difference"
                       f" {error:.0e}, limit {limit:.0e})")
        if a.settings and not errors:
            a.notes.append(f"Ties: no {kind} in metrics.jsonl was compared with the weights (with"
                           f" --sequences={a.config.global_batch_size} a loss is).")


def check_trace(a: Audit, points: list[Point], chunks: list[int]) -> None:
    """Which chunks became easier from one checkpoint to the next? A chunk's trace is its change of
    loss less that of chunks that were not trained in between, in nats: negative if it was."""
    numbers, alone = np.array(memorize.chunk_numbers(a.data))[chunks], []
    records = [{"checkpoint": point.name, "step": point.manifest.get("step")} for point in points]
    age = memorize.ages(a.config, a.data, records, chunks)  # (points, chunks)
    means = np.array([[point.losses[chunk].mean() for chunk in chunks] for point in points])
    # Without the levels of checkpoints and chunks: on which chunk is each checkpoint best?
    best = numbers[memorize.double_center(means).argmin(1)]  # (points,)
    traces = {}  # by index: (claimed, others, trace, standard error), (chunks,) each
    for k in range(1, len(points)):
        gap, visit = points[k].number - points[k - 1].number, points[k].visit
        claimed = (age[k] >= 0) & (age[k] < gap)
        if not claimed.any() or (~claimed).sum() < 2:
            alone.append(points[k].name)  # nothing to look at, or nothing to compare it with
            continue
        # In few steps, AdamW's momentum is still that of the chunk before.
        carried = (age[k] == gap) & bool(visit and visit.steps < 2 / (1 - a.config.adam_beta1))
        # The median, because old chunks are being forgotten and a secretly trained chunk must not
        # shift the level. Both checkpoints read the same sequences: easy and hard ones cancel.
        change = [points[k].losses[chunk] - points[k - 1].losses[chunk] for chunk in chunks]
        error = [x.std(ddof=1) / math.sqrt(x.size) for x in change]
        mean = means[k] - means[k - 1]
        traces[k] = claimed, ~(claimed | carried), mean - np.median(mean[~claimed]), error
    strongest = {k: trace[claimed].min() for k, (claimed, _, trace, _) in traces.items()}
    rates = np.append(math.nan, a.rate_sums(points))  # to each point
    for k, (claimed, others, trace, error) in traces.items():
        name, own = points[k].name, np.where(claimed, trace, math.inf).argmin()
        points[k].row["trace"] = f"{trace[own]:+.3f} ± {error[own]:.3f}"
        # Four standard errors, because there are hundreds of such tests in an honest run. Half,
        # because texts that resemble a chunk with a strong trace have a weak one too.
        other = np.where(others, trace, math.inf).argmin()
        if trace[other] < min(-4 * error[other], trace[own] / 2):
            a.find("trace", f"{name} has learned from chunk {numbers[other]} ({trace[other]:+.3f}"
                   f" ± {error[other]:.3f} nats), not only from what it claims. It looks"
                   f" like the one after chunk {best[k]}")
        # The weaker of its neighbours', at this rate; none where the settings changed. The root,
        # because the steps of a chunk are in many directions.
        usual = max((strongest[j] * np.nan_to_num(math.sqrt(rates[k] / (rates[j] or math.nan)),
                                                  nan=0 if a.settings else 1)
                     for j in (k - 1, k + 1) if j in strongest), default=0)
        for j in np.flatnonzero(claimed):
            # Four errors on the wrong side are too many whatever is usual.
            if trace[j] > usual / 4 and usual < -6 * error[j] < 0 or trace[j] > 4 * error[j] > 0:
                a.find("trace", f"{name} shows no trace of chunk {numbers[j]} ({trace[j]:+.3f} ±"
                       f" {error[j]:.3f} nats, usual {usual:+.3f})")
    if alone:
        a.notes.append(f"Trace: none was looked for at {', '.join(alone[:9])}: it takes the chunk"
                       " and two that were not trained on.")


def check_log(a: Audit) -> None:
    """Each line of metrics.jsonl against what follows from the settings."""
    rows, missing, last = {p.number: p.row for p in a.points}, [], max(a.settings, default=0)
    for visit in a.data.schedule(a.config):
        steps = range(visit.first_step + 1, visit.first_step + visit.steps + 1)
        sources, wrong, n = np.asarray(a.data.chunk(visit.chunk)["source"]), [], 0
        ways = a.rates(steps) if steps.start <= last else []
        for i, step in enumerate(steps[: max(0, last - visit.first_step)]):
            line = a.metrics.get(step)
            if not line or "skipped" in line and a.config.on_nonfinite == "skip_step":
                missing += [] if line else [step]
                continue
            n, by_source = n + 1, line.get("loss_by_source", {})
            numbers = step_sequences(a.config.seed, visit.chunk, len(sources), i,
                                     a.config.global_batch_size, visit.epoch)
            # The loss is the mean over the sources, and these are the ones that the step has read.
            read = {a.data.sources[source]: count for source, count
                    in zip(*np.unique(sources[numbers], return_counts=True))}
            mean = sum(by_source.get(name, 0) * read[name] for name in read) / len(numbers)
            if (line.get("chunk") != visit.chunk or line.get("lr") not in [way[i] for way in ways]
                    or line.get("tokens") != step * a.config.tokens_per_step
                    or by_source.keys() != read.keys()
                    or not abs(mean - line.get("loss", math.nan)) < 5e-5  # five digits are kept
                    or step == steps[-1] and "valid" not in line):
                wrong.append(step)
        rows.get(visit.number, {})["log"] = f"{len(wrong)} wrong" if wrong else f"{n} lines"
        if wrong:
            a.find("log", f"{len(wrong)} lines of chunk {visit.chunk} in metrics.jsonl do not"
                   f" follow from config and data order, the first is step {wrong[0]}")
    if missing:
        a.find("log", f"{len(missing)} of {last} lines of metrics.jsonl are missing, the first is"
               f" step {missing[0]}")


# ---- replay: a run is a pure function of its settings and data, so any chunk can be trained again


def replay(config: Config, which: str) -> list[str]:
    """Train the chunks that end in the checkpoints `which` again ("7", "0,3" or "all"), and print
    those that come out the same; returns what differs."""
    parallel.init_distributed(config)
    findings, home = [], Path(config.run_dir, "replay.tmp")  # a run of its own, next to the weights
    on_rank_zero(lambda: remove(home))  # somebody could have put checkpoints there
    for path in ckpt.select_checkpoints(config.run_dir, which):
        try:
            sentence = replay_chunk(config, path, home)
            if rank() == 0:
                print(sentence)
        except UserError as problem:  # the others are still tried
            findings.append(f"replay: {problem}")
            on_rank_zero(lambda: remove(home))  # what it has made leads to nothing
            if train.SIGNALS:
                break
    on_rank_zero(lambda: remove(home))
    return findings


def replay_chunk(config: Config, after: Path, home: Path) -> str:
    """Train from the checkpoint before to this one again in the run `home`, with the settings of
    the manifests; a sentence if all bits are equal. UserError with the first tensor and line of
    metrics.jsonl that differ."""
    manifest, again = ckpt.read_manifest(after), home / after.name
    has_state = (after / "train_state").exists()
    problem = on_rank_zero(lambda: ckpt.verify_checkpoint(after, has_state))
    if problem or not manifest:
        raise UserError(f"{after} cannot be replayed: {problem or 'it has no manifest'}.")
    first, last, before = 0, manifest["step"], None
    for path in ckpt.list_checkpoints(config.run_dir):
        step = ckpt.read_manifest(path)["step"]
        if path.name.startswith("ckpt_") and step < last:
            first, before = step, path
    older = ckpt.list_checkpoints(home)
    if [ckpt.read_manifest(path)["step"] for path in older[-1:]] != ([first] if before else []):
        problem = before and on_rank_zero(lambda: ckpt.verify_checkpoint(before, train_state=True))
        if problem:
            raise UserError(f"{after} cannot be replayed from {before}: {problem}."
                            " (keep_train_state = 0 keeps it; --replay=all goes on with its own.)")
        on_rank_zero(lambda: remove(home) or home.mkdir()
                     or before and (home / before.name).symlink_to(before.absolute()))
    origin, environment = manifest["started_from"], manifest["environment"]
    for step, own in list_settings(config).items():
        if first < step <= last:  # several, if it was resumed with others within the chunk
            train.train(replace(own, run_dir=str(home), threads=environment["threads"],
                                max_steps=step, sample_tokens=0, save_minutes=0.0,
                                init_from=origin and (config.init_from or origin["path"]) or ""))
    if not again.exists():
        raise UserError(f"{after} was not reached: step {last} is not the end of a chunk, or the"
                        " replay was stopped.")
    # A manifest could name tensors that the files do not hold; an old state may have been dropped.
    held = {name: sha256(ckpt.raw_bytes(t)).hexdigest()
            for name, t in [*ckpt.read_tensors(after), *(ckpt.read_tensors(
                after / "train_state", "optimizer") if has_state else ())]}
    theirs, ours = manifest["tensors"] | held, ckpt.read_manifest(again)["tensors"]
    differing = [name for name in theirs if theirs[name] != ours.get(name)]
    lines, new = ckpt.read_metrics(config.run_dir), ckpt.read_metrics(home)
    # JSON keeps every digit of a float, so != compares bits.
    for step in range(first + 1, last + 1):
        line = lines.get(step, {})
        if any(new[step].get(key) != line.get(key) for key in REPRODUCIBLE):
            differing.append(f"step {step} of metrics.jsonl")
    made = f"steps {first + 1} to {last} make of {before or 'the initial weights'}"
    if not differing:
        on_rank_zero(lambda: [remove(path) for path in older if path != again])  # 81 GB of a 7B
        return f"{after} is what {made}: {len(theirs)} tensors and the log, bit for bit."
    # Another version of PyTorch or number of threads changes the last bits of an honest run too.
    made_now = ckpt.read_manifest(again)
    others = [f" It was made with {key} {then!r}, now {now.get(key)!r}."
              for what, now in made_now.items() if what in ("environment", "started_from")
              for key, then in manifest[what].items() if then != now.get(key)]
    raise UserError(f"{after} or its log is not what {made} here: of {len(theirs)} tensors and"
                    f" {last - first} lines {len(differing)} differ, {differing[0]} the"
                    f" first.{''.join(others)}")


def main(argv: list[str]) -> None:
    config, flags = load(argv, Flags)
    a = None if flags.replay else audit(config, flags)
    findings = a.findings if a else replay(config, flags.replay)
    if a and rank() == 0:
        a.notes.append("Nothing was trained again (--replay=all does); eval.jsonl and"
                       " memorization.jsonl were not measured again (without them, stages do).")
        rows = {point.name: point.row for point in a.points}
        for name, row in [("checkpoint", dict(zip(COLUMNS, COLUMNS))), *rows.items()]:
            print(f"{name:<12}" + "".join(f"{row.get(column, '-'):>16}" for column in COLUMNS))
        print("\n".join(f"Note: {note}" for note in a.notes))
        try:
            Path(config.run_dir).mkdir(parents=True, exist_ok=True)  # published weights have no run
            ckpt.write_json(Path(config.run_dir, "audit.json"),
                            {"checkpoints": rows, "findings": findings, "notes": a.notes})
        except OSError as error:  # as in a run of somebody else's
            print(f"{error.filename} could not be written ({error.strerror}).")
    if findings:
        raise UserError("\n".join([f"{config.run_dir}: {len(findings)} found.", *findings]))
    if a and rank() == 0:
        print(f"{config.run_dir}: {len(a.points)} audited, nothing found.")


if __name__ == "__main__":
    run_command(main)
