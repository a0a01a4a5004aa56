"""Prepared data: the format of a chunk, its reader, and the order in which a run sees it.

    data = load_data("data/amber_tiny")
    chunk = data.chunk(3)                   # (n,) records {source, token_ids}, memory-mapped
    ids = step_sequences(seed, 3, len(chunk), step, batch)  # the numbers of those a step reads

A data set is a directory: train/chunk_000.npy ..., valid/SOURCE.npy, documents/SOURCE.npy, the
tokenizer's file and manifest.json, which has the sha256 of each of them. prepare_data.py writes it;
every stage reads it through this file. It knows neither torch nor how chunks are made. At its end
stand the few helpers for files that every stage needs.
"""

import contextlib
import functools
import hashlib
import json
import math
import mmap
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

import numpy as np

from configs import Config, UserError, read_regular, regular, with_recorded
from tokenizer import Tokenizer, load_tokenizer

# Of the manifest and the chunks; data of another number is refused and not guessed at.
FORMAT = 2
# The settings that decide the bytes of a data set. Its manifest keeps their values.
DATA_SETTINGS = """canaries sources source_weights max_source_bytes tokenized tokenized_valid
    on_bad_line tokenizer vocab_size seq_len n_chunks sequences_per_chunk valid_sequences seed
    source_halves valid_documents crystal_tokens fim_rates fim_spm_rate""".split()


def sequence_dtype(seq_len: int, n_vocab: int) -> np.dtype:
    """A sequence: Amber's {"token_ids": [...], "source": ...} in binary.

    It holds seq_len + 1 ids, because inputs and targets are the same ids, one apart. Two bytes an
    id make a chunk of Amber 7 GB, where its JSON takes 20.8.
    """
    # Little-endian, said outright: the bytes and their hashes are the same on every machine.
    ids = "<u2" if n_vocab <= 1 << 16 else "<u4"
    return np.dtype([("source", "u1"), ("token_ids", ids, (seq_len + 1,))])


# ---------------------------------------------------------------------------------------------
# JSON that anybody may have written


def has_form(value: Any, form: Any) -> bool:
    """Whether JSON that anybody may have written has the form that is about to be relied on.

    A form is a type; or [form], a list of any length; or {"key": form, "key?": form}, an object
    with these keys (one with ? may be absent) and maybe others; or {str: form}, one with any keys;
    or a function that says yes or no.
    """
    if isinstance(form, type):
        return type(value) is form
    if isinstance(form, list):
        return type(value) is list and all(has_form(item, form[0]) for item in value)
    if not isinstance(form, dict):
        return form(value)
    if type(value) is not dict:
        return False
    if str in form:
        return all(has_form(item, form[str]) for item in value.values())
    for key, inner in form.items():
        name = key.removesuffix("?")
        if name == key and name not in value:
            return False
        if name in value and not has_form(value[name], inner):
            return False
    return True


def is_count(value: Any) -> bool:
    """A whole number that counts something."""
    return type(value) is int and 0 <= value < 2**47


def is_number(value: Any) -> bool:
    return type(value) in (int, float)


def is_inside(value: Any) -> bool:
    """The name of a file that a manifest may list: none that leads out of its directory."""
    return type(value) is str and "\0" not in value and not (
        Path(value).is_absolute() or ".." in Path(value).parts)


# ---------------------------------------------------------------------------------------------
# a data set


@dataclass(frozen=True)
class Data:
    """A prepared data set, opened for reading. Chunks are memory-mapped: nothing is read until
    its sequences are."""

    directory: Path
    manifest: dict[str, Any]

    @property
    def sources(self) -> list[str]:
        """Names of the sources, by the number that each sequence carries."""
        return [source["name"] for source in self.manifest["sources"]]

    @property
    def validation_sources(self) -> list[str]:
        """The sources that have validation sequences."""
        return [file["source"] for file in self.manifest["valid"]]

    @property
    def seq_len(self) -> int:
        return self.manifest["seq_len"]

    @property
    def n_vocab(self) -> int:
        return self.manifest["tokenizer"]["n_vocab"]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the data."""
        entry = self.manifest["tokenizer"]
        try:
            return load_tokenizer(self.directory, entry)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.directory / entry['file']} cannot be read ({error}): python"
                            " audit.py CONFIG checks every file.")

    @functools.cached_property
    def sha256(self) -> str:
        """Of the manifest, and so of every byte of the data set."""
        return sha256_file(self.directory / "manifest.json")

    def chunk(self, i: int) -> np.ndarray:
        """The sequences of chunk i, (n,) of [source u1, token_ids (seq_len + 1,)]."""
        return self._open(self.manifest["chunks"][i])

    def take(self, i: int, ids: Any) -> np.ndarray:
        """The sequences `ids` (n,) of chunk i, read from the disk."""
        chunk = self.chunk(i)
        # They lie anywhere in the file, and with each the system would read hundreds of KiB around.
        if isinstance(chunk.base, mmap.mmap) and hasattr(mmap, "MADV_RANDOM"):
            chunk.base.madvise(mmap.MADV_RANDOM)
        return self._sound(chunk[ids], self.manifest["chunks"][i])

    def source_of(self, i: int, sequence: int) -> str:
        """The name of the source of a sequence of chunk i."""
        return self.sources[self.take(i, [sequence])["source"][0]]

    def _sound(self, sequences: np.ndarray, file: dict[str, Any]) -> np.ndarray:
        # A damaged byte can name a token that the embedding does not have.
        if len(sequences) and (sequences["token_ids"].max() >= self.n_vocab
                               or sequences["source"].max() >= len(self.sources)):
            raise UserError(f"{self.directory / file['file']} is damaged: it has token ids or"
                            " sources that this data does not have.")
        return sequences

    def validation(self, source: str) -> np.ndarray:
        """The validation sequences of a source, as `chunk`; UserError if it has none."""
        if source not in self.validation_sources:
            names = ", ".join(self.validation_sources) or "no source"
            raise UserError(f"{self.directory} has no validation sequences of {source!r}; it has"
                            f" them of {names}.")
        if source not in self._validation:  # a run asks for them many times
            file = next(f for f in self.manifest["valid"] if f["source"] == source)
            self.verify_file(file)
            self._validation[source] = self._sound(self._open(file), file)
        return self._validation[source]

    @functools.cached_property
    def _validation(self) -> dict[str, np.ndarray]:
        """What `validation` has hashed and opened, by source."""
        return {}

    def _open(self, file: dict[str, Any]) -> np.ndarray:
        # A .npy file has its type and length in its own header, and np.load believes it. They must
        # be the manifest's, or a file of another data set would be trained on without a word.
        return open_array(self.directory / file["file"], sequence_dtype(self.seq_len, self.n_vocab),
                          (file["sequences"],))

    def steps_per_chunk(self, batch: int) -> list[int]:
        """Optimizer steps of `batch` sequences in each chunk; what is left over is not read."""
        return [chunk["sequences"] // batch for chunk in self.manifest["chunks"]]

    def schedule(self, config: Config) -> "list[Visit]":
        """The visits to chunks that a run of these settings consists of."""
        return chunk_schedule(self.steps_per_chunk(config.global_batch_size), config.skip_chunks,
                              config.epochs)

    def verify(self) -> list[str]:
        """Every file against its sha256 in the manifest, then every sequence (see
        `unexpected_sequences`): what is wrong, one sentence each."""
        problems = []
        # Data that was prepared before there was lookup.py has no index of documents.
        for file in [*self.manifest["chunks"], *self.manifest["valid"],
                     self.manifest["tokenizer"], *self.manifest.get("documents", [])]:
            try:
                self.verify_file(file)
            except UserError as problem:
                problems.append(str(problem))
        return problems or unexpected_sequences(self)

    def verify_file(self, file: dict[str, Any]) -> None:
        """UserError unless a file of the manifest is there, with its sha256."""
        path = self.directory / file["file"]
        if not path.is_file():
            raise UserError(f"{path} is missing.")
        if (found := sha256_file(path)) != file["sha256"]:
            raise UserError(f"{path} differs: its sha256 is {found}, not {file['sha256']}.")


def open_array(path: Path, dtype: np.dtype, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """A .npy file, memory-mapped; UserError unless it has this type and shape (None: any length).
    """
    try:
        array = np.load(regular(path), mmap_mode="r")
    except Exception as error:  # damaged headers raise all kinds
        raise UserError(f"{path} cannot be read ({error}): python audit.py CONFIG checks every"
                        " file.")
    if array.dtype != dtype or array.shape != (shape or array.shape[:1]):
        raise UserError(f"{path} has {array.shape} entries of {array.dtype}, but the manifest says"
                        f" {shape or 'some'} of {dtype}: prepare the data anew.")
    return array


# What is relied on below and in the other stages; more may be there.
FILE = {"file": is_inside, "sha256": str}
MANIFEST: dict[str, Any] = {
    "settings": dict, "dropped": {str: is_count}, "documents?": [FILE],
    "seq_len": lambda value: is_count(value) and value > 0,
    "tokenizer": FILE | {"kind": str, "n_vocab": is_count, "eos_id": is_count,
                         "specials": {str: is_count}},
    "sources": [{"name": str, "sequences": is_count, "valid_sequences": is_count,
                 "weight?": is_number}],
    "chunks": [FILE | {"sequences": is_count, "sources": {str: is_count}}],
    "valid": [FILE | {"sequences": is_count, "source": str}],
}


def load_data(directory: str | Path) -> Data:
    """Open a prepared data set; UserError when there is none."""
    path = Path(directory, "manifest.json")
    if not path.exists():
        raise UserError(f"{directory} has no prepared data (no manifest.json): run"
                        " python prepare_data.py configs/NAME.py first.")
    manifest = read_json(path)
    if manifest and manifest.get("format") != FORMAT:
        raise UserError(f"{path} is of format {manifest.get('format')}, this code reads {FORMAT}:"
                        " prepare the data anew.")
    if wrong := [key for key in MANIFEST if not has_form(manifest, {key: MANIFEST[key]})]:
        raise UserError(f"{path} is damaged ({', '.join(wrong)}): prepare the data anew.")
    return Data(Path(directory), manifest)


def unexpected_sequences(data: Data) -> list[str]:
    """Validation sequences that are in a chunk, which makes validation worthless; and sequences
    that are in the chunks more often than their source's weight says: one sentence each."""
    n_chunks = len(data.manifest["chunks"])
    chunks = [sequence_keys(data.chunk(i)["token_ids"]) for i in range(n_chunks)]
    begins = np.cumsum([0, *map(len, chunks)])
    keys, first, times = np.unique(np.concatenate(chunks), return_index=True, return_counts=True)

    def place(key: int) -> str:
        at = first[np.searchsorted(keys, key)]
        chunk = int(np.searchsorted(begins, at, side="right")) - 1
        return f"sequence {at - begins[chunk]} of chunk {chunk}"

    problems = []
    for source in data.validation_sources:
        held_out = sequence_keys(data.validation(source)["token_ids"])
        for i in np.flatnonzero(np.isin(held_out, keys) & (held_out != 0)):
            problems.append(f"Sequence {i} of valid/{source}.npy is in the training data:"
                            f" {place(held_out[i])}.")
    # Twice by chance: honest text has a document in two files, or the same licence in each.
    weights = [source.get("weight", 1) for source in data.manifest["sources"]]
    planted = with_recorded(Config(), data.manifest["settings"]).canaries
    usual = max([2 * math.ceil(max(weights)), *planted])
    for key, n in zip(keys[times > usual], times[times > usual]):
        if key:
            problems.append(f"{place(key)} is {n} times in the training data.".capitalize())
    return problems


def sequence_keys(ids: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each sequence of ids (n, T + 1): int64 (n,). 0 for those that say next to
    nothing, like `0, 0, 0, ...`, which honest data has more than once."""
    keys = (hash(row.tobytes()) if len(set(row[:64].tolist())) >= 16 else 0 for row in ids)
    return np.fromiter(keys, np.int64, len(ids))


def data_settings(config: Config) -> dict[str, Any]:
    """The settings that decide the bytes of a data set, as JSON keeps them."""
    # There and back, so that they compare equal with a manifest: JSON turns the key 2 into "2".
    values = {name: getattr(config, name) for name in DATA_SETTINGS}
    return json.loads(json.dumps(values))


# These two mean something to training as well (initial weights and order; size of the embedding),
# so a run may have other values than the data was made with. No other of DATA_SETTINGS may differ.
RUN_SETTINGS = ("seed", "vocab_size")


def check_data_settings(config: Config, data: Data,
                        may_differ: tuple[str, ...] = RUN_SETTINGS) -> None:
    """UserError if the config asks for other data than this: the run would use the data as it is,
    and record settings that had no effect."""
    # Both as JSON has them, where {2: 1} and {"2": 1} are the same.
    made_with, now = data.manifest["settings"], data_settings(config)
    differ = [f"{name} = {now[name]!r} (the data: {made_with.get(name)!r})" for name in now
              if name not in may_differ and now[name] != made_with.get(name)]
    if differ:
        raise UserError(f"{data.directory} was prepared with other settings than these:"
                        f" {', '.join(differ)}. Take the data's, or prepare data for these: with"
                        " another --data_dir, or after deleting it.")


# ---------------------------------------------------------------------------------------------
# the data order: a pure function of the config


@functools.lru_cache(maxsize=2)
def sequence_order(seed: int, chunk: int, n: int, turn: int = 0) -> np.ndarray:
    """The order in which the n sequences of a chunk are read, (n,); nothing else decides it.
    turn: how many times the run has met the chunk before."""
    # Released chunks are sorted by source, so a chunk must be shuffled as a whole. For Amber's 1.7
    # million sequences that takes 40 ms: it is kept for the steps that follow.
    key = [seed, chunk, turn] if turn else [seed, chunk]
    order = np.random.default_rng(key).permutation(n)
    # The cache returns this very array each time: a caller that changed it would change the run.
    order.flags.writeable = False
    return order


def step_sequences(seed: int, chunk: int, n: int, step: int, batch: int,
                   turn: int = 0) -> np.ndarray:
    """Ids (batch,) of the sequences that step `step` (from 0) of a chunk of n sequences reads."""
    return sequence_order(seed, chunk, n, turn)[step * batch : (step + 1) * batch]


class Visit(NamedTuple):
    """One pass of the run through a chunk. `number` names its checkpoint: chunk c is visit c, and
    visit turn * n_chunks + c if it is met once more."""

    number: int
    chunk: int
    first_step: int  # optimizer steps of the run before it
    steps: int
    turn: int = 0  # passes through this chunk before it


def chunk_schedule(steps_per_chunk: list[int], skip_chunks: list[int],
                   epochs: int = 1) -> list[Visit]:
    """The visits of a run: chunks 0, 1, ... without `skip_chunks`, and so again until there are
    `epochs` times as many steps as in all chunks together.

    Amber did so: four of its chunks gave NaN wherever they were met, and the first chunks were
    trained again to complete the schedule of the learning rate.
    """
    total, n = epochs * sum(steps_per_chunk), len(steps_per_chunk)
    good = [c for c in range(n) if c not in skip_chunks and steps_per_chunk[c]]
    visits: list[Visit] = []
    done, turn = 0, 0
    # In each turn every good chunk is met once. If some were left out, there is one turn more, cut
    # off where the schedule ends.
    while good and done < total:
        for chunk in good:
            steps = min(steps_per_chunk[chunk], total - done)
            if steps:
                visits.append(Visit(turn * n + chunk, chunk, done, steps, turn))
            done += steps
        turn += 1
    return visits


def step_to_visit(schedule: list[Visit], step: int) -> tuple[Visit, int]:
    """(visit, step within it) of optimizer step `step`, counted from 0; UserError beyond them."""
    # A schedule has a few hundred visits, so to look through them costs nothing beside a step.
    for visit in schedule:
        if 0 <= step - visit.first_step < visit.steps:
            return visit, step - visit.first_step
    total = sum(visit.steps for visit in schedule)
    raise UserError(f"There is no step {step}: the run has {total} steps, and the first is 0.")


# ---------------------------------------------------------------------------------------------
# files


def sha256_file(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """A hash of what JSON keeps of a value: {2: x} and {"2": x} are the same."""
    kept = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def read_json(path: Path, form: Any = dict) -> dict[str, Any]:
    """A JSON object; {} if the file is missing, damaged or not of this form (see `has_form`)."""
    try:
        value = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if has_form(value, dict) and has_form(value, form) else {}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Open PATH.tmp for writing; at the end of the block, sync it to the disk and rename it."""
    # So a file that has its name is whole, even after a kill or a loss of power.
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        with open(unfinished, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        # A full disk does not say which file it was about.
        error.filename = error.filename or str(path)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, as `writing` does."""
    with writing(path) as f:
        f.write(json.dumps(value, indent=1).encode() + b"\n")


def lock_directory(directory: Path) -> TextIO:
    """Hold a lock on a directory while the returned file is open; UserError if another process
    has it. The system drops it with the process, however that ends."""
    lock = open(directory / "lock", "w")
    # LOCK_NB: do not wait for the other process, which may train for weeks, but say so at once.
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass  # Windows has nothing as simple: do not start two there.
    except BlockingIOError:
        raise UserError(f"{directory} is in use by another process: wait for it, or stop it.")
    except OSError:
        pass  # Some network file systems have no locks; that must not stop a run.
    return lock


# A directory is made under a name that ends in .tmp, with this file inside, and renamed when it is
# whole. What is removed without a question must have both: many people call things *.tmp.
MARK = "unfinished"


def begin_unfinished(directory: Path) -> None:
    """Make a directory that `remove_unfinished` may take away again; one that was left is gone."""
    remove_unfinished(directory)
    directory.mkdir(parents=True)
    (directory / MARK).write_text(f"{directory.name}: being written; not whole yet\n")


def remove_unfinished(directory: Path) -> None:
    """Remove what `begin_unfinished` made, if it is there; UserError if it is someone else's."""
    if not directory.exists():
        return
    if not is_unfinished(directory):
        raise UserError(f"{directory} is in the way, and was not written by this program: move it.")
    for path in directory.iterdir():
        if path.name == MARK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    # The mark goes last, so that a kill in the middle leaves a directory that is still ours.
    (directory / MARK).unlink(missing_ok=True)
    directory.rmdir()


def is_unfinished(directory: Path) -> bool:
    """Whether a directory was made by `begin_unfinished`, under this very name."""
    try:
        text = (directory / MARK).read_text(encoding="utf-8")
    except (OSError, ValueError):
        # An empty one: a kill came before `begin_unfinished` had written the mark, or after
        # `remove_unfinished` had removed it.
        return directory.is_dir() and not any(directory.iterdir())
    return bool(re.match(re.escape(directory.name) + ":", text))
