"""Stage 5: check a run's files, weights, losses and log against its recorded history.

    python audit.py configs/amber_tiny.py                   # files, twins, path, losses, log
    python audit.py configs/amber_tiny.py --replay=7        # train chunk 7 again, and compare
    python audit.py configs/amber_7b.py --checkpoints=hub/ckpt_100,hub/ckpt_101,hub/ckpt_102
    torchrun --nproc_per_node=2 audit.py configs/amber_tiny.py --replay=all  # a run of 2 processes

An audit compares the history that a run claims with its files and weights: one line per checkpoint,
one column per check, then the findings, and exit status 1 if there are any. Only the replay proves
anything. The other checks need neither the optimizer's state nor the same hardware, so they work on
published directories too. docs/audit.md says what each check can find.
"""

import math
import re
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import checkpoint as ckpt
import parallel
import train
from configs import Config, UserError, load, run_command, with_recorded
from data import Data, Visit, load_data, read_json, step_sequences, write_json
from memorize import ages, choose_chunks, chunk_numbers, double_center, sequence_losses
from parallel import all_gather_object, choose_device, on_rank_zero, rank, world_size

Losses = dict[tuple[int, int], np.ndarray]  # (index of checkpoint, chunk): (steps, batch), nats
NEXT = -1  # in the place of a chunk: the batch of the step after the checkpoint, (batch,)
COLUMNS = ("files", "twins", "path", "trace", "log")
# Published checkpoints may hold these beside the weights; they are the same at every step.
CONSTANT = re.compile(r"rotary_emb|attn\.(masked_)?bias$")
# What a replay must reproduce of a line of metrics.jsonl; its speed differs each time.
REPRODUCIBLE = ("loss", "loss_by_source", "grad_norm", "lr")


@dataclass
class Flags:
    """What audit.py takes beside the settings."""

    checkpoints: str = ""  # "7", "0,4,9" or paths; "" = all
    chunks: str = ""  # whose losses are measured, as "0,5,9"; "" = all
    sequences: int = 64  # of each chunk; 0 = no losses, which leaves out the model
    batch: int = 64  # sequences in memory at a time
    replay: str = ""  # train "7", "0,3" or "all" again, and compare; "" = the other checks


@dataclass
class Point:
    """A checkpoint at the end of a chunk: what it claims, and its row of the table."""

    path: Path
    manifest: dict[str, Any]  # {} of a published directory
    config: Config  # with the settings in its own manifest
    number: int  # of the visit that it ends, as in its name
    visit: Visit | None  # None: this data has no such visit, as in a selection of released chunks
    row: dict[str, str] = field(default_factory=dict)  # a cell for each of COLUMNS

    @property
    def last_step(self) -> float:
        """Steps of the run until the end of its visit; NaN if it has none."""
        return self.visit.first_step + self.visit.steps if self.visit else math.nan


def audit(config: Config, flags: Flags) -> tuple[dict[str, dict[str, str]], list[str]]:
    """All checks but the replay, the cheapest first: the row of each checkpoint, the findings."""
    parallel.init_distributed(config)
    config = with_recorded(config, read_json(Path(config.run_dir) / "config.json"))
    data = load_data(config.data_dir, config.seq_len)
    paths = ckpt.select_checkpoints(config.run_dir, flags.checkpoints or "all")
    config = ckpt.with_network(config, paths, data.tokenizer)
    points = list_points(config, data, paths)
    points, findings = on_rank_zero(lambda: (points, check_data(data)
                                             + check_files(config, data, points)
                                             + check_tensors(config, data, points)))
    readable = [point for point in points if point.row["files"] in ("ok", "no manifest")]
    if flags.sequences and readable:
        chunks = choose_chunks(flags.chunks, chunk_numbers(data))
        losses = measure_losses(config, data, readable, chunks, flags)
        findings += check_losses(config, data, readable, chunks, losses)
        findings += check_log(config, data, readable, losses)
    return {point.path.name: point.row for point in points}, findings


def list_points(config: Config, data: Data, paths: list[Path]) -> list[Point]:
    """The checkpoints in the order of their numbers; UserError if one has none."""
    visits, points = {visit.number: visit for visit in data.schedule(config)}, []
    for path in paths:
        name = re.fullmatch(r"ckpt_(\d+)", path.name)
        if not name:
            raise UserError(f"{path} is not called ckpt_NUMBER, by the number of its last chunk.")
        manifest, number = ckpt.read_manifest(path), int(name[1])
        own = with_recorded(config, manifest.get("config", {}))
        points.append(Point(path, manifest, own, number, visits.get(number)))
    return sorted(points, key=lambda point: point.number)


def learning_rates(config: Config, data: Data, steps: range) -> list[float]:
    """The learning rate of each of these steps (from 1) with these settings."""
    total = sum(visit.steps for visit in data.schedule(config))
    return [train.learning_rate(config, step, total) for step in steps]


def rate_sums(data: Data, points: list[Point]) -> np.ndarray:
    """The sum of the learning rates between each checkpoint and the next, (points - 1,); NaN where
    it is unknown, because the data has no such visit or because the settings have changed."""
    sums = []
    for a, b in pairwise(points):
        steps = range(a.last_step + 1, b.last_step + 1) if a.visit and b.visit else range(0)
        by_a, by_b = (learning_rates(point.config, data, steps) for point in (a, b))
        sums.append(sum(by_b) if steps and by_a == by_b else math.nan)
    return np.array(sums)


# ---- files: are they whole, do they name each other, do the weights move along one path?


def check_data(data: Data) -> list[str]:
    """Every file of the data against its sha256. Then every sequence: none of validation may be in
    a chunk, and none may be in the chunks more often than the weight of its source explains."""
    if problems := data.verify():
        return [f"data: {problem}" for problem in problems]
    n_chunks = len(data.manifest["chunks"])
    chunks = [sequence_keys(data.chunk(i)["token_ids"]) for i in range(n_chunks)]
    begins = np.cumsum([0, *map(len, chunks)])
    keys, first, times = np.unique(np.concatenate(chunks), return_index=True, return_counts=True)

    def place(key: int) -> str:
        at = first[np.searchsorted(keys, key)]
        chunk = int(np.searchsorted(begins, at, side="right")) - 1
        return f"sequence {at - begins[chunk]} of chunk {chunk}"

    findings = []
    for source in data.validation_sources:
        held_out = sequence_keys(data.validation(source)["token_ids"])
        for i in np.flatnonzero(np.isin(held_out, keys) & (held_out != 0)):
            findings.append(f"data: Sequence {i} of valid/{source}.npy is in the training data:"
                            f" {place(held_out[i])}.")
    # Twice by chance: honest text has a document in two files, or the same licence in each.
    weights = [source.get("weight", 1) for source in data.manifest["sources"]]
    canaries = data.manifest.get("canaries", {})  # how often they are planted: how many of them
    usual = max([2 * math.ceil(max(weights)), *map(int, canaries)])
    for key, n in zip(keys[times > usual], times[times > usual]):
        if key:
            findings.append(f"data: {place(key).capitalize()} is {n} times in the training data.")
    return findings


def sequence_keys(token_ids: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each sequence of ids (n, T + 1): int64 (n,). 0 for near-constant sequences
    such as 0, 0, 0, ..., which honest data has more than once."""
    keys = (hash(row.tobytes()) if len(set(row[:64].tolist())) >= 16 else 0 for row in token_ids)
    return np.fromiter(keys, np.int64, len(token_ids))


def check_files(config: Config, data: Data, points: list[Point]) -> list[str]:
    """Every file against its sha256, and each manifest against the data and the one before it."""
    findings = [f"files: {path}: manifest.json is missing or damaged."
                for path in ckpt.find_checkpoints(config.run_dir)[1]]
    manifests = {point.path.name: point.manifest for point in points}
    for point in tqdm(points, desc="files", unit="checkpoint", leave=False, disable=None):
        # Old training states are dropped to save space; what is there must be whole.
        problems = [ckpt.verify_checkpoint(point.path, (point.path / "train_state").exists())]
        m, visit = point.manifest, point.visit
        if m and m["data_sha256"] != data.sha256:
            problems.append(f"it was trained on other data than {config.data_dir} holds now")
        elif m and m["step"] != point.last_step:
            problems.append(f"step {m['step']} in its manifest is not the end of its chunk")
        elif m and m["chunk_sha256"] != data.manifest["chunks"][visit.chunk]["sha256"]:
            problems.append(f"it names another hash of chunk {visit.chunk} than the data")
        parent = m.get("parent", {})
        there = manifests.get(parent.get("checkpoint"), parent)
        if there.get("weights_sha256") != parent.get("weights_sha256"):
            problems.append(f"it was trained from another {parent['checkpoint']} than this one")
        point.row["files"] = "damaged" if any(problems) else "ok" if m else "no manifest"
        findings += [f"files: {point.path}: {problem}." for problem in problems if problem]
    return findings


def check_tensors(config: Config, data: Data, points: list[Point]) -> list[str]:
    """Read every tensor of every checkpoint once: its hash, whether it is finite, and how it moved
    since the checkpoint before."""
    readable, weights, findings = [], [], []
    for point in points:
        try:
            ckpt.with_network(config, [point.path], data.tokenizer)
            weights.append(dict(ckpt.read_tensors(point.path)))  # mapped: nothing is read yet
            readable.append(point)
            point.row["twins"] = "none"
        except UserError as error:
            point.row["files"] = "unreadable"
            findings.append(f"files: {error}")
    names = {name: 0 for tensors in weights for name in tensors if not CONSTANT.search(name)}
    hashes, moves = {}, {}  # by tensor: hashes by checkpoint; (checkpoints - 1, 2) displacements
    for name in tqdm(names, desc="tensors", leave=False, disable=None):
        shapes = {str(tuple(w[name].shape)) if name in w else "missing" for w in weights}
        if len(shapes) > 1:
            findings.append(f"files: {name} is {' or '.join(sorted(shapes))}, by the checkpoint.")
            continue
        versions = [w[name] for w in weights]
        hashes[name] = [sha256(t.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()
                        for t in versions]
        finite = [bool(t.isfinite().all()) for t in versions]
        for point, own_hash, is_finite in zip(readable, hashes[name], finite):
            if not is_finite:
                findings.append(f"files: {point.path}: {name} has values that are not finite.")
            if own_hash != point.manifest.get("tensors", {}).get(name, own_hash):
                findings.append(f"files: {point.path}: {name} is not the tensor in manifest.json.")
        if all(finite):
            moves[name] = displacements(versions)
    findings += check_twins(data, readable, hashes)
    return findings + (check_path(config, data, readable, moves) if moves else [])


def displacements(versions: list[torch.Tensor]) -> np.ndarray:
    """(checkpoints - 1, 2) of a tensor's displacement from each checkpoint to the next: its squared
    length, and its inner product with the displacement after it."""
    rows, before = np.zeros((len(versions) - 1, 2)), None
    for i, (a, b) in enumerate(pairwise(versions)):
        step = b.float() - a.float()
        rows[i, 0] = step.square().sum(dtype=torch.float64)
        if before is not None:
            rows[i - 1, 1] = (before * step).sum(dtype=torch.float64)
        before = step
    return rows


def check_twins(data: Data, points: list[Point], hashes: dict[str, list[str]]) -> list[str]:
    """Tensors that are equal in two checkpoints: every step of AdamW changes all of them, unless
    its learning rate is 0."""
    findings, rates = [], rate_sums(data, points)
    for i, j in combinations(range(len(points)), 2):
        a, b = points[i], points[j]
        same = [name for name, versions in hashes.items() if versions[i] == versions[j]]
        if same and rates[i:j].sum() != 0:
            findings.append(f"twins: {a.path.name} and {b.path.name} have {len(same)} of"
                            f" {len(hashes)} tensors in common, {same[0]} the first.")
            a.row["twins"], b.row["twins"] = b.path.name, a.path.name
    return findings


def check_path(config: Config, data: Data, points: list[Point],
               moves: dict[str, np.ndarray]) -> list[str]:
    """A checkpoint lies between its neighbours, as far from them as its learning rates explain."""
    findings, total = [], sum(moves.values())  # (points - 1, 2)
    # The cosine between the displacement to a checkpoint and the one on from it is 0 if they are
    # independent, and positive if they share a direction. For a checkpoint of another run the two
    # are nearly opposite: -0.5 or less. The standard deviation by chance is 1 / sqrt(size).
    limit = -0.35 - 2 / math.sqrt(config.hidden_size)
    for i, point in enumerate(points[1:-1]):
        cosine = {name: move[i, 1] / (math.sqrt(move[i, 0] * move[i + 1, 0]) or 1)
                  for name, move in (moves | {"all": total}).items()}
        point.row["path"] = f"{cosine.pop('all'):+.2f}"
        if astray := [name for name in cosine if cosine[name] < limit]:
            findings.append(f"path: {point.path.name} does not lie between its neighbours:"
                            f" {len(astray)} of {len(moves)} tensors go back by the way they came,"
                            f" {astray[0]} the first (cosine {cosine[astray[0]]:.2f}).")
    if findings:
        return findings  # lengths would say the same once more
    # AdamW moves by about the learning rate at each step, so the distance over the sum of the rates
    # changes little. Steps are not all in one direction, so many of them go less far each: only
    # intervals of about equally many steps are compared.
    steps, rates = np.diff([point.last_step for point in points]), rate_sums(data, points)
    pace = [math.sqrt(x / r**2) if x * r > 0 else math.nan for x, r in zip(total[:, 0], rates)]
    for i in range(1, len(pace) - 1):
        near, times = steps[i - 1 : i + 2], pace[i] / math.sqrt(pace[i - 1] * pace[i + 1])
        if max(near) < 1.2 * min(near) and (times < 1 / 1.25 or times > 1.25):
            findings.append(f"path: {points[i + 1].path.name} is {times:.2f} times as far from the"
                            " one before as the learning rate and its neighbours explain.")
    return findings


# ---- losses: has a checkpoint seen what it claims, and does the log have its losses?


def measure_losses(config: Config, data: Data, points: list[Point], chunks: list[int],
                   flags: Flags) -> Losses:
    """The losses of about flags.sequences sequences of each chunk at each checkpoint, those of
    evenly spaced steps; and (k, NEXT), at checkpoint k those of the step after it."""
    drawn, batch = {}, config.global_batch_size
    for chunk in chunks:  # the data order is random, so whole steps are a random sample
        there = data.manifest["chunks"][chunk]["sequences"]
        n, steps = max(1, flags.sequences // batch), max(1, there // batch)
        chosen = np.linspace(0, steps - 1, min(n, steps) + 2).astype(int)[1:-1]
        drawn[chunk] = np.stack([step_sequences(config.seed, chunk, there, step, batch)
                                 for step in chosen])[:, : flags.sequences]
    # torchrun's processes share the checkpoints. Nothing is kept: a file could be changed.
    model, mine = parallel.build_for_inference(config), {}
    for k in tqdm(range(rank(), len(points), world_size()), desc="losses", unit="checkpoint",
                  leave=False, disable=True if rank() else None):
        ckpt.load_weights(model, points[k].path, verified=True)
        for chunk, numbers in drawn.items():
            token_ids = data.take(chunk, numbers.ravel())["token_ids"]
            mine[k, chunk] = sequence_losses(model, token_ids, flags.batch).reshape(numbers.shape)
        after = points[k + 1].visit if k + 1 < len(points) else None
        if after and after.first_step == points[k].last_step and batch <= flags.sequences:
            there = data.manifest["chunks"][after.chunk]["sequences"]
            numbers = step_sequences(config.seed, after.chunk, there, 0, batch, after.epoch)
            token_ids = data.take(after.chunk, numbers)["token_ids"]
            mine[k, NEXT] = sequence_losses(model, token_ids, flags.batch)
    return {key: losses for part in all_gather_object(mine) for key, losses in part.items()}


def check_losses(config: Config, data: Data, points: list[Point], chunks: list[int],
                 losses: Losses) -> list[str]:
    """Which chunks became easier from one checkpoint to the next? A chunk's trace is its change of
    loss less that of chunks that were not trained in between, in nats: negative if it was."""
    findings, numbers = [], np.array(chunk_numbers(data))[chunks]
    records = [{"checkpoint": p.path.name, "step": p.manifest.get("step")} for p in points]
    age = ages(config, data, records, chunks)  # (points, chunks)
    means = np.array([[losses[k, chunk].mean() for chunk in chunks] for k in range(len(points))])
    # Without the levels of checkpoints and chunks: on which chunk is each checkpoint best?
    best = numbers[double_center(means).argmin(1)]  # (points,)
    traces = {}  # by index: (claimed, others, trace, standard error), (chunks,) each
    for k in range(1, len(points)):
        gap, visit = points[k].number - points[k - 1].number, points[k].visit
        claimed = (age[k] >= 0) & (age[k] < gap)
        if not claimed.any() or (~claimed).sum() < 2:
            continue  # nothing to look at, or nothing to compare it with
        # In few steps, AdamW's momentum is still that of the chunk before.
        carried = (age[k] == gap) & bool(visit and visit.steps < 2 / (1 - config.adam_beta1))
        # The median, because old chunks are being forgotten and a secretly trained chunk must not
        # shift the level. Both checkpoints read the same sequences: easy and hard ones cancel.
        change = [losses[k, chunk] - losses[k - 1, chunk] for chunk in chunks]
        error = [x.std(ddof=1) / math.sqrt(x.size) for x in change]
        mean = means[k] - means[k - 1]
        traces[k] = claimed, ~(claimed | carried), mean - np.median(mean[~claimed]), error
    usual = np.median([trace[claimed].min() for claimed, _, trace, _ in traces.values()] or [0])
    # A small learning rate leaves a small trace, and 0 none. The root, because the steps of a chunk
    # are in many directions.
    rates = rate_sums(data, points)
    strength = np.sqrt(np.nan_to_num(rates / np.nanmax(rates, initial=1e-30), nan=1))
    for k, (claimed, others, trace, error) in traces.items():
        name, own = points[k].path.name, np.where(claimed, trace, math.inf).argmin()
        points[k].row["trace"] = f"{trace[own]:+.3f} ± {error[own]:.3f}"
        # Four standard errors, because there are hundreds of such tests in an honest run. Half,
        # because texts that resemble a chunk with a strong trace have a weak one too.
        other = np.where(others, trace, math.inf).argmin()
        if trace[other] < min(-4 * error[other], trace[own] / 2):
            findings.append(f"trace: {name} has learned from chunk {numbers[other]}"
                            f" ({trace[other]:+.3f} ± {error[other]:.3f} nats), not only from what"
                            f" it claims. It looks like the checkpoint after chunk {best[k]}.")
        expected = usual * strength[k - 1]
        for j in np.flatnonzero(claimed):
            if trace[j] > expected / 4 and expected < -6 * error[j]:
                findings.append(f"trace: {name} shows no trace of chunk {numbers[j]}"
                                f" ({trace[j]:+.3f} ± {error[j]:.3f} nats, {expected:+.3f} usual).")
    return findings


def check_log(config: Config, data: Data, points: list[Point], losses: Losses) -> list[str]:
    """Each line of metrics.jsonl against what follows from the settings; and the recorded loss of a
    chunk's first step against that of the weights before it."""
    logged, findings = ckpt.read_metrics(config.run_dir), []
    for k, point in enumerate(points):
        before, visit, own, wrong = points[max(0, k - 1)], point.visit, point.config, []
        if not (logged and point.manifest and visit):
            continue
        sources = np.asarray(data.chunk(visit.chunk)["source"])
        steps = range(visit.first_step + 1, point.last_step + 1)
        lines = [logged[step] for step in steps if step in logged]
        lines = [line for line in lines if "skipped" not in line]
        # Where the run was resumed within the chunk, the settings may have changed to its own.
        rates = [learning_rates(each.config, data, steps) for each in (before, point)]
        rates[0][-1] = rates[1][-1]
        for line in lines:
            i, by_source = line["step"] - steps[0], line.get("loss_by_source", {})
            numbers = step_sequences(own.seed, visit.chunk, len(sources), i, own.global_batch_size,
                                     visit.epoch)
            # The loss is the mean over the sources, and these are the ones that the step has read.
            read = {data.sources[source]: count for source, count
                    in zip(*np.unique(sources[numbers], return_counts=True))}
            mean = sum(by_source.get(name, 0) * read[name] for name in read) / len(numbers)
            if (line.get("chunk") != visit.chunk or line.get("lr") not in (rates[0][i], rates[1][i])
                    or line.get("tokens") != line["step"] * own.tokens_per_step
                    or by_source.keys() != read.keys()
                    or not abs(mean - line.get("loss", math.nan)) < 5e-5):  # five digits are kept
                wrong.append(line["step"])
        point.row["log"] = f"{len(wrong)} wrong" if wrong else f"{len(lines)} lines"
        if wrong:
            findings.append(f"log: metrics.jsonl: {len(wrong)} lines of chunk {visit.chunk} do not"
                            f" follow from config and data order, the first is step {wrong[0]}.")
        recorded = logged.get(steps[0], {}).get("loss")
        if recorded and (k - 1, NEXT) in losses:
            # In float32 only the order of sums differs; bfloat16 keeps three digits.
            dtypes = {str(choose_device(config)[1])[6:], point.manifest["environment"]["dtype"]}
            loss = losses[k - 1, NEXT].mean()
            if not abs(loss - recorded) < (1e-4 if dtypes == {"float32"} else 0.01):
                findings.append(f"log: metrics.jsonl has loss {recorded:.5f} at step {steps[0]},"
                                f" where the weights of {before.path.name} give {loss:.5f}.")
    return findings


# ---- replay: a run is a pure function of its settings and data, so any chunk can be trained again


def replay(config: Config, which: str) -> list[str]:
    """Train the chunks that end in the checkpoints `which` again ("7", "0,3" or "all"), and print
    those that come out the same; returns what differs."""
    parallel.init_distributed(config)
    findings = []
    for path in ckpt.select_checkpoints(config.run_dir, which):
        try:
            sentence = replay_chunk(config, path)
            if rank() == 0:
                tqdm.write(sentence)
        except UserError as problem:  # the others are still tried
            findings.append(f"replay: {problem}")
    return findings


def replay_chunk(config: Config, after: Path) -> str:
    """Train the chunk that ends in a checkpoint again, with its manifest's settings; a sentence if
    all bits are equal. UserError with the first tensor and line of metrics.jsonl that differ."""
    manifest, has_state = ckpt.read_manifest(after), (after / "train_state").exists()
    problem = on_rank_zero(lambda: ckpt.verify_checkpoint(after, has_state))
    if problem or not manifest:
        raise UserError(f"{after} cannot be replayed: {problem or 'it has no manifest'}.")
    config = with_recorded(config, manifest["config"])
    # The number of threads decides the order of sums, and so the last bits.
    config.threads = manifest["environment"]["threads"]
    origin = manifest["started_from"]
    config.init_from = config.init_from or origin["path"] if origin else ""
    run = train.start(config)
    run.started_from = manifest["started_from"]
    visit = next((v for v in run.schedule if v.first_step + v.steps == manifest["step"]), None)
    if visit is None or manifest["data_sha256"] != run.data.sha256:
        raise UserError(f"{after} cannot be replayed: it was trained on other data than"
                        f" {config.data_dir} holds now, or its step is not the end of a chunk.")
    before, origin = None, config.init_from or "the initial weights"
    if visit.first_step:
        there = [path for path in ckpt.list_checkpoints(config.run_dir)
                 if ckpt.read_manifest(path)["step"] == visit.first_step]
        missing = Path(config.run_dir, f"step_{visit.first_step:07d}")
        before = origin = [*there, missing][0]
        if problem := on_rank_zero(lambda: ckpt.verify_checkpoint(before, train_state=True)):
            raise UserError(f"{after} cannot be replayed from {before}: {problem}."
                            " (keep_train_state = 0 keeps what is needed for it.)")
    on_rank_zero(lambda: run.data.verify_file(run.data.manifest["chunks"][visit.chunk]))
    train.begin(run, before)

    # The same steps as in train.py's loop, without saving, validation and samples, none of which
    # changes the weights.
    logged, differing, other_lines = ckpt.read_metrics(config.run_dir), [], []
    steps = range(visit.first_step + 1, manifest["step"] + 1)
    bar = tqdm(steps, f"chunk {visit.chunk} again", unit="step", disable=True if rank() else None)
    for step, lr in zip(bar, learning_rates(config, run.data, steps)):
        record = train.train_step(run, train.load_batch(run, step - 1), lr)
        run.step = step
        # JSON keeps every digit of a float, so != compares bits. A step that is not in the log
        # (which may have been cut short) is compared with itself.
        if any(record.get(key) != logged.get(step, record).get(key) for key in REPRODUCIBLE):
            other_lines.append(f"step {step} of metrics.jsonl")
    theirs, ours = dict(ckpt.read_tensors(after)), ckpt.named_parameters(run.model)
    if has_state:  # keep_train_state may have deleted an older one
        theirs |= ckpt.read_tensors(after / "train_state", "optimizer")
        ours |= ckpt.optimizer_tensors(run.model, run.optimizers)
    for name, a in ckpt.copy_to_host(ours):  # of which each process compares its share
        b = theirs[name]
        if not torch.equal(a.view(torch.int32), b.view(torch.int32)):  # bits: NaN equals itself
            differing.append(f"{name} by up to {(a - b).abs().max():.3g}")
    differing = sum(all_gather_object(differing), []) + other_lines
    n_lines = sum(step in logged for step in steps)
    if not differing:
        return (f"{after} is what chunk {visit.chunk} makes of {origin}: {len(theirs)} tensors, bit"
                f" for bit, and {n_lines} lines of metrics.jsonl.")
    # Another version of PyTorch or number of threads changes the last bits of an honest run too.
    now = train.environment(run)
    others = [f" It was made with {key} {then!r}, now {now.get(key)!r}."
              for key, then in manifest["environment"].items() if then != now.get(key)]
    raise UserError(f"{after} or its log is not what chunk {visit.chunk} makes of {origin} here: of"
                    f" {len(theirs)} tensors and {n_lines} lines {len(differing)} differ,"
                    f" {differing[0]} the first.{''.join(others)}")


def main(argv: list[str]) -> None:
    config, flags = load(argv, Flags)
    rows, findings = ({}, replay(config, flags.replay)) if flags.replay else audit(config, flags)
    if rows and rank() == 0:
        for file in (Path(config.run_dir, name) for name in ("eval.jsonl", "memorization.jsonl")):
            if file.exists():
                print(f"{file} was not measured again: its stage does that, with --again=true.")
        for name, row in [("checkpoint", dict(zip(COLUMNS, COLUMNS))), *rows.items()]:
            print(f"{name:<12}" + "".join(f"{row.get(column, '-'):>16}" for column in COLUMNS))
        try:
            Path(config.run_dir).mkdir(parents=True, exist_ok=True)  # published weights have no run
            write_json(Path(config.run_dir, "audit.json"),
                       {"checkpoints": rows, "findings": findings})
        except OSError as error:  # as in a run of somebody else's
            print(f"{error.filename} could not be written ({error.strerror}).")
    if findings:
        raise UserError("\n".join([f"{config.run_dir}: {len(findings)} found.", *findings]))
    if rows and rank() == 0:
        print(f"{config.run_dir}: {len(rows)} audited, nothing found.")


if __name__ == "__main__":
    run_command(main)
