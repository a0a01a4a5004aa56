"""Prepared data: the format of a chunk, its reader, and the order in which a run reads it.

    data = load_data("data/amber_tiny")
    chunk = data.chunk(3)  # (n,) records {source, number, token_ids}, memory-mapped
    numbers = step_sequences(seed, 3, len(chunk), step, batch)  # which of them a step reads

A data set is a directory: train/chunk_000.npy ..., valid/SOURCE.npy, documents/SOURCE.npy,
tokenizer.json and manifest.json, which has the sha256 of each of them. prepare_data.py writes it,
and every stage reads it through this file. At its end are the helpers for files.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import mmap
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from configs import Config, UserError, open_ours, read_regular, regular
from tokenizer import Tokenizer, open_tokenizer

FORMAT = 3  # of the manifest and of the files that it lists; any other is refused
# The settings that decide the bytes of a data set. Its manifest records their values.
DATA_SETTINGS = """sources text_field source_weights max_source_bytes tokenized tokenized_valid
    on_bad_line tokenizer vocab_size seq_len n_chunks sequences_per_chunk valid_sequences seed
    source_halves valid_documents crystal_tokens fim_rates fim_spm_rate""".split()
# These two have a meaning for training too, so a run may have other values than its data.
RUN_SETTINGS = ("seed", "vocab_size")
# Where a document begins in the tokens of its source, the number of its file, and its number in the
# file (from 1). documents/SOURCE.npy has one of these for each document.
DOCUMENT = np.dtype([("begin", "<u8"), ("file", "<u4"), ("number", "<u4")])


def sequence_dtype(seq_len: int, n_vocab: int) -> np.dtype:
    """A sequence: Amber's {"token_ids": [...], "source": ...} in binary, with its number.

    `number` counts the sequences of a source in the order of the text, or the lines of a released
    file. There are seq_len + 1 ids, because inputs and targets are the same ids, one apart.
    """
    # "<" is little-endian: the bytes and their hashes are the same on every machine. Two bytes an
    # id make a chunk of Amber 7 GB, where its JSON takes 20.8.
    ids = "<u2" if n_vocab <= 1 << 16 else "<u4"
    return np.dtype([("source", "u1"), ("number", "<u4"), ("token_ids", ids, (seq_len + 1,))])


# ---- a data set


@dataclass(frozen=True)
class Data:
    """A prepared data set, opened for reading. Its chunks are memory-mapped: a sequence is read
    from the disk when it is used."""

    directory: Path
    manifest: dict[str, Any]
    _verified: dict[str, np.ndarray] = field(default_factory=dict, repr=False)  # opened, by file

    @property
    def sources(self) -> list[str]:
        """Names of the sources; the `source` of a sequence is an index into this list."""
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

    @property
    def files(self) -> list[dict[str, Any]]:
        """The manifest's entries of files: each has `file`, its name, and `sha256`."""
        return [*self.manifest["chunks"], *self.manifest["valid"], self.manifest["tokenizer"],
                *self.manifest["documents"]]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the data; UserError if its files were changed."""
        self.verify_file(self.manifest["tokenizer"])
        tokenizer = open_tokenizer(self.directory)
        if tokenizer.entry != self.manifest["tokenizer"]:  # tokenizer_config.json was changed
            raise UserError(f"The tokenizer of {self.directory} is not as its manifest says.")
        return tokenizer

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the manifest, which has the hash of every other file of the data set."""
        return sha256_file(self.directory / "manifest.json")

    def chunk(self, i: int) -> np.ndarray:
        """The sequences of chunk i, (n,) of `sequence_dtype`, memory-mapped and not verified."""
        return self._open(self.manifest["chunks"][i])

    def take(self, i: int, numbers: Any) -> np.ndarray:
        """The sequences `numbers` (n,) of chunk i, counted from 0 in it, read from the disk."""
        chunk = self.chunk(i)
        # They are anywhere in the file, and the system would read hundreds of KiB around each.
        chunk.base.madvise(mmap.MADV_RANDOM)
        return chunk[numbers]

    def validation(self, source: str) -> np.ndarray:
        """The validation sequences of one of the validation_sources, as `chunk`, verified."""
        return self.verified(self.manifest["valid"][self.validation_sources.index(source)])

    def verified(self, file: dict[str, Any]) -> np.ndarray:
        """The sequences of a file, given its entry in the manifest; UserError unless it has its
        sha256, which is computed once."""
        name = file["file"]
        if name not in self._verified:
            self.verify_file(file)
            self._verified[name] = self._open(file)
        return self._verified[name]

    def _open(self, file: dict[str, Any]) -> np.ndarray:
        # A file describes itself in its header: one of another data set would be read as well.
        path, dtype = self.directory / file["file"], sequence_dtype(self.seq_len, self.n_vocab)
        try:
            array = np.load(regular(path), mmap_mode="r", allow_pickle=False)
            fits = array.dtype == dtype and array.shape == (file["sequences"],)
        except (ValueError, EOFError):  # it is cut off; or it is a pickle, which would be code
            fits = False
        if not fits:
            raise UserError(f"{path} does not hold {file['sequences']} sequences of {dtype}, as the"
                            " manifest says: delete the data set, and prepare it anew.")
        return array

    def steps_per_chunk(self, batch: int) -> list[int]:
        """Optimizer steps of `batch` sequences in each chunk; what is left over is not read."""
        return [chunk["sequences"] // batch for chunk in self.manifest["chunks"]]

    def schedule(self, config: Config) -> "list[Visit]":
        """The visits to chunks that a run of these settings consists of."""
        return chunk_schedule(self.steps_per_chunk(config.global_batch_size), config.skip_chunks,
                              config.epochs)

    def check_settings(self, config: Config, may_differ: tuple[str, ...] = RUN_SETTINGS) -> None:
        """UserError if the config asks for other data than this: the run would use the data as it
        is, and record settings that had no effect."""
        # A setting that is younger than the data had no other value then.
        made_with = data_settings(Config()) | self.manifest["settings"]
        differ = [f"{name} = {value!r} (the data: {made_with[name]!r})"
                  for name, value in data_settings(config).items()
                  if name not in may_differ and value != made_with[name]]
        if differ:
            raise UserError(f"{self.directory} was prepared with other settings than these:"
                            f" {', '.join(differ)}. Take the data's, or prepare data for these:"
                            " with another --data_dir, or after deleting it.")

    def verify(self) -> list[str]:
        """Compare every file with its sha256 in the manifest; a sentence for each that differs."""
        hashes = {file["file"]: file["sha256"] for file in self.files}
        return [f"{self.directory}/{problem}." for problem in damaged(self.directory, hashes)]

    def verify_file(self, file: dict[str, Any]) -> None:
        """UserError unless the file of an entry of the manifest is there and has its sha256."""
        for problem in damaged(self.directory, {file["file"]: file["sha256"]}):
            raise UserError(f"{self.directory}/{problem}.")


def load_data(directory: str | Path, window: int = 2**31) -> Data:
    """Open a prepared data set of up to `window` tokens a sequence; UserError if there is none."""
    path = Path(directory, "manifest.json")
    if not path.exists():
        config = next((w for w in sys.argv[1:] if w.endswith(".py")), "configs/NAME.py")
        raise UserError(f"There is no prepared data (no manifest.json) in {path.parent.absolute()}:"
                        f" run python prepare_data.py {config} first, in the same folder.")
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path} is damaged or of format {manifest.get('format')}, not {FORMAT}:"
                        f" delete {directory}, or give another --data_dir, and prepare it anew.")
    data = Data(Path(directory), manifest)
    if data.seq_len > window:
        raise UserError(f"{directory} has sequences of {data.seq_len} tokens; seq_len is {window}.")
    for file in data.files:
        # A data set may be a stranger's: no name may lead out of its directory.
        if Path(file["file"]).is_absolute() or ".." in Path(file["file"]).parts:
            raise UserError(f"{path} lists {file['file']!r}, which is not inside {directory}.")
    return data


def data_settings(config: Config) -> dict[str, Any]:
    """The settings that decide the bytes of a data set."""
    return {name: getattr(config, name) for name in DATA_SETTINGS}


# ---- the data order: a pure function of the config


@functools.lru_cache(maxsize=2)
def sequence_order(seed: int, chunk: int, n: int, epoch: int = 0) -> np.ndarray:
    """The order in which the n sequences of a chunk are read, (n,); nothing else decides it.
    epoch: how many times the run has read the chunk before."""
    # Released chunks are sorted by source, so a chunk is shuffled as a whole: 40 ms for Amber's 1.7
    # million sequences. The following steps use the cached result.
    key = [seed, chunk, epoch] if epoch else [seed, chunk]
    order = np.random.default_rng(key).permutation(n)
    # The cache returns this very array each time: a caller that changed it would change the run.
    order.flags.writeable = False
    return order


def step_sequences(seed: int, chunk: int, n: int, step: int, batch: int,
                   epoch: int = 0) -> np.ndarray:
    """Numbers (batch,) of the sequences that step `step` (from 0) of a chunk of n reads."""
    return sequence_order(seed, chunk, n, epoch)[step * batch : (step + 1) * batch]


class Visit(NamedTuple):
    """One pass of the run through a chunk. `number` names its checkpoint: chunk c is visit c, and
    visit epoch * n_chunks + c when it is read again."""

    number: int
    chunk: int
    first_step: int  # optimizer steps of the run before it
    steps: int
    epoch: int = 0  # passes through this chunk before it


def chunk_schedule(steps_per_chunk: list[int], skip_chunks: list[int],
                   epochs: int = 1) -> list[Visit]:
    """The visits of a run: chunks 0, 1, ... without `skip_chunks`, and so again until there are
    `epochs` times as many steps as in all chunks together.

    Amber did so: four of its chunks gave NaN wherever they were read, and the first chunks were
    trained again to complete the schedule of the learning rate.
    """
    total, n = epochs * sum(steps_per_chunk), len(steps_per_chunk)
    good = [c for c in range(n) if c not in skip_chunks and steps_per_chunk[c]]
    visits: list[Visit] = []
    done, epoch = 0, 0
    # Each epoch reads every good chunk once. If some were left out, there is one epoch more, cut
    # off where the schedule ends.
    while good and done < total:
        for chunk in good:
            steps = min(steps_per_chunk[chunk], total - done)
            if steps:
                visits.append(Visit(epoch * n + chunk, chunk, done, steps, epoch))
            done += steps
        epoch += 1
    return visits


def step_to_visit(schedule: list[Visit], step: int) -> tuple[Visit, int]:
    """(visit, step within it) of optimizer step `step`, counted from 0; UserError beyond them."""
    # A linear search: a schedule has a few hundred visits, and an optimizer step takes far longer.
    for visit in schedule:
        if 0 <= step - visit.first_step < visit.steps:
            return visit, step - visit.first_step
    total = sum(visit.steps for visit in schedule)
    raise UserError(f"There is no step {step}: the run has {total} steps, and the first is 0.")


# ---- files


def sha256_file(path: Path) -> str:
    with open(regular(path), "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def damaged(directory: Path, hashes: dict[str, str]) -> list[str]:
    """What is wrong with the files of a directory that are to have these sha256, by name."""
    def look(name: str) -> str:
        if not (directory / name).is_file():
            return f"{name} is missing"
        if (found := sha256_file(directory / name)) == hashes[name]:
            return ""
        return f"{name} differs: its sha256 is {found}, not {hashes[name]}"

    # In threads: a core hashes 1.5 GB/s, and a disk may read more.
    with ThreadPoolExecutor(8) as pool:
        return [*filter(None, pool.map(look, hashes))]


def sha256_json(value: Any) -> str:
    """The sha256 of a value's canonical JSON: {2: x} and {"2": x} have the same."""
    kept = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} if the file is missing, damaged or holds something else."""
    try:
        value = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Open PATH.tmp for writing; at the end of the block, sync it to the disk and rename it."""
    # So a file that has its name is complete, even after a kill or a loss of power.
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        with open_ours(unfinished) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk reports no name
        raise


def to_json(value: Any, indent: int | None = None) -> bytes:
    """JSON, in which a number that is not finite is null: the standard has no NaN."""
    value = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return json.dumps(value, indent=indent).encode() + b"\n"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, as `writing` does."""
    with writing(path) as f:
        f.write(to_json(value, indent=1))


def remove(path: Path) -> None:
    """Delete a file or a directory of ours; of a link nothing but the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def lock_directory(directory: Path) -> BinaryIO:
    """Make a directory, and hold a lock on it while the returned file is open; UserError if another
    process holds it. The system releases it when the process ends, however that happens."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"{error.filename} is a file, or a link that leads nowhere: move it away.")
    lock = open_ours(directory / "lock", "lock")
    try:
        # LOCK_NB: fail at once instead of waiting for the other process, which may train for weeks.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{directory} is in use by another process: wait for it, or stop it.")
    except OSError:
        pass  # Some network file systems have no locks; a run must be possible there.
    return lock
