"""Stage 1: text becomes the data that a run trains on, sequences of tokens in chunks.

    python prepare_data.py configs/amber_tiny.py               # seconds; nothing is downloaded
    python prepare_data.py configs/amber_125m.py --workers=8   # your own text, named in `sources`
    python prepare_data.py configs/amber_7b.py                 # the chunks that LLM360 released

The way of a document: it is read from a file, and perhaps held out for validation; it becomes
tokens and one end-of-document token; with its neighbours it makes a part, a long run of tokens on
the disk. The parts of a source are cut into sequences of seq_len + 1 tokens, the sequences are
dealt to the chunks as cards are dealt, the chunks are written, and last of all the manifest.

A preparation that was stopped goes on where it was when it is started again. Its bytes depend on
the text and the settings alone, not on the number of workers. docs/data.md has the formats.
"""

import contextlib
import csv
import glob
import gzip
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
from tqdm import tqdm

import data
from configs import Config, UserError, load, run_command
from corpus import CORPUS, describe, versions, write_embedded_corpus
from tokenizer import (
    FIM_TOKENS,
    Tokenizer,
    check_tokenizer,
    load_tokenizer,
    make_tokenizer,
    replace_invalid_utf8,
)

PART_BYTES = 16 << 20  # small files are read together until they make a part of this size
SAMPLE_BYTES = 10 << 20  # of text, to train a tokenizer on
BLOCK = 4096  # sequences in memory at a time: 16 MB at Amber's length
# A document: where it begins in its source's run of tokens, its file, its number there (from 1).
DOCUMENT = np.dtype([("begin", "<u8"), ("file", "<u4"), ("number", "<u4")])

Files = dict[str, list[str]]  # paths by source


@dataclass(frozen=True)
class Work:
    """What every worker process has to know."""

    config: Config
    directory: Path  # data/NAME.tmp, the data set while it is made; renamed when it is whole
    tokenizer_entry: dict[str, Any]  # what the manifest says of the tokenizer
    n_workers: int

    @property
    def parts(self) -> Path:
        # They are needed on the way only, and removed in the end.
        return self.directory / "parts"

    @property
    def dtype(self) -> np.dtype:
        # Of a sequence, [source u1, token_ids (seq_len + 1,)]
        return data.sequence_dtype(self.config.seq_len, self.tokenizer_entry["n_vocab"])

    @property
    def ids_dtype(self) -> np.dtype:
        # Two bytes an id where the vocabulary allows it, else four
        return self.dtype["token_ids"].base


def prepare(config: Config) -> None:
    """Make the data set of a config, or go on with it; nothing is done if it is there already."""
    if is_prepared(config):
        return
    passed_over: Counter[str] = Counter()
    files = find_inputs(config, passed_over)
    directory, lock = open_unfinished(config, files)
    with lock:
        # A kill may have come after the manifest, between two lines of `publish`.
        if not (directory / "manifest.json").exists():
            texts = files or write_embedded_corpus(directory / "corpus")
            if not files:
                print(describe(texts))
            entry = save_tokenizer(config, directory, texts)
            work = Work(config, directory, entry, count_workers(config, texts))
            make = from_released if config.tokenized else from_text
            write_manifest(work, passed_over, *make(work, texts))
        publish(directory, lock, Path(config.data_dir))
    print(summary(data.load_data(config.data_dir)))


def from_text(work: Work, files: Files) -> tuple[list, list, list, list]:
    """Text to chunks; returns its parts, and the manifest's sources, chunks and validation."""
    # Documents are read, held out or not, and encoded: files become parts.
    parts = run_jobs(work, "tokens", encode_part, split_into_parts(work.config, files))
    # Parts are cut into sequences, and these are dealt: how many of them does each chunk get?
    sources = plan_sources(work.config, parts)
    # A source is measured by itself, so its validation sequences are a file by themselves.
    validated = sources if work.config.valid_sequences else []
    valid = run_jobs(work, "validation", write_validation, validated)
    if work.config.canaries:
        sources = [*sources, plant_canaries(work, len(sources))]
    jobs = [(chunk, sources) for chunk in range(work.config.n_chunks)]
    chunks = run_jobs(work, "chunks", write_chunk, jobs)
    return parts, [source.entry for source in sources], chunks, valid


# ---------------------------------------------------------------------------------------------
# a document is read


def find_files(pattern: str, passed_over: Counter[str]) -> list[str]:
    """The files of a path, a glob or a folder, sorted; `passed_over` counts the rest, by reason."""
    paths: list[str] = []
    for found in sorted(glob.glob(os.path.expanduser(pattern), recursive=True)):
        if not os.path.isdir(found):
            paths.append(found)
        for folder, folders, names in os.walk(found):
            # os.walk goes into the folders that are left in its list: not into .git and the like.
            passed_over["hidden file or folder"] += sum(n[0] == "." for n in folders + names)
            folders[:] = sorted(name for name in folders if name[0] != ".")
            paths += [os.path.join(folder, name) for name in sorted(names) if name[0] != "."]
    # A glob can match a folder and what is in it: a file counts once, where it came first.
    paths = [*dict.fromkeys(paths)]
    # Only regular files: reading a pipe would wait for ever, and a link may lead nowhere.
    files = [path for path in paths if os.path.isfile(path)]
    passed_over["not a regular file"] += len(paths) - len(files)
    if not files:
        what = f"{len(paths)} names, none of a regular file" if paths else "nothing"
        raise UserError(f"There is no file to read at {pattern}: found {what}.")
    return files


def read_documents(path: str, on_bad_line: str, notes: Counter[str]) -> Iterator[str]:
    """The documents of a file: valid Unicode, none empty. `notes` counts by reason what was left
    out, and as "repaired" the documents that were not valid."""
    # Its name says what a file is, and what it is without the ending of its compression.
    name = re.sub(r"\.(gz|zst)$", "", path.lower())
    if name.endswith((".jsonl", ".ndjson")):
        texts = read_jsonl(path, on_bad_line, notes)
    elif name.endswith(".json"):
        texts = read_json(path, on_bad_line, notes)
    elif name.endswith((".csv", ".tsv")):
        texts = read_table(path, "\t" if name.endswith(".tsv") else ",", on_bad_line, notes)
    elif name.endswith(".parquet"):
        texts = read_parquet(path, notes)
    else:
        texts = read_text(path, notes)
    for text in with_path_in_errors(path, texts):
        valid = replace_invalid_utf8(text)
        notes["repaired"] += valid is not text
        if valid:
            yield valid
        else:
            notes["empty document"] += 1


def read_text(path: str, notes: Counter[str]) -> Iterator[str]:
    """A file of any other name is one document."""
    with open_input(path) as f:
        head = f.read(8192)
        # Pictures, archives and programs have NUL bytes, and text has none.
        if b"\0" in head:
            notes["binary file"] += 1
            return
        # surrogateescape turns invalid bytes into lone surrogates; read_documents replaces those.
        yield (head + f.read()).decode("utf-8", "surrogateescape").removeprefix("\ufeff")


def read_jsonl(path: str, on_bad_line: str, notes: Counter[str]) -> Iterator[str]:
    """Every line is a document."""
    with open_input(path) as f:
        for number, line in enumerate(f, 1):
            try:
                record = json.loads(line.decode("utf-8", "surrogateescape"))
            except (ValueError, RecursionError):
                bad_line(path, number, "not JSON", line, on_bad_line, notes)
                continue
            yield from text_of(path, number, record, on_bad_line, notes)


def read_json(path: str, on_bad_line: str, notes: Counter[str]) -> Iterator[str]:
    """Every object of a list is a document."""
    with open_input(path) as f:
        try:
            records = json.loads(f.read().decode("utf-8", "surrogateescape"))
        except (ValueError, RecursionError):
            records = None
    # Folders of code have settings in such files: they are no text, and no reason to stop.
    if not isinstance(records, list):
        notes["JSON that is no list of objects"] += 1
        return
    for number, record in enumerate(records, 1):
        yield from text_of(path, number, record, on_bad_line, notes)


def read_table(path: str, delimiter: str, on_bad_line: str, notes: Counter[str]) -> Iterator[str]:
    """Every row below the head is a document."""
    csv.field_size_limit(2**31 - 1)  # a document may be longer than Python's 131,072 letters
    with open_input(path) as f:
        lines = io.TextIOWrapper(f, "utf-8-sig", "surrogateescape", newline="")
        for number, row in enumerate(csv.DictReader(lines, delimiter=delimiter), 1):
            yield from text_of(path, number, row, on_bad_line, notes)


def text_of(path: str, number: int, record: Any, on_bad_line: str,
            notes: Counter[str]) -> Iterator[str]:
    """The text of a record, or none."""
    # RedPajama, C4 and SlimPajama have "text", RefinedWeb and StarCoder "content".
    fields = record if isinstance(record, dict) else {}
    text = fields.get("text", fields.get("content"))
    if isinstance(text, str):
        yield text
        return
    others = [key for key, value in fields.items() if isinstance(value, str)]
    longest = max(others, key=lambda key: len(fields[key]), default="")
    hint = f'; its longest is "{longest}": call that one "text"' if longest else ""
    found = json.dumps(record, default=str).encode()
    bad_line(path, number, 'no string "text" or "content"', found, on_bad_line, notes, hint)


def read_parquet(path: str, notes: Counter[str]) -> Iterator[str]:
    """A row is a document."""
    from pyarrow.parquet import ParquetFile  # optional: pip install pyarrow
    file = ParquetFile(path)
    columns = [name for name in ("text", "content") if name in file.schema_arrow.names]
    if not columns:
        raise ValueError(f"no column text or content, only {', '.join(file.schema_arrow.names)}")
    for batch in file.iter_batches(1024, columns=columns[:1]):
        for text in batch.column(0).to_pylist():
            if isinstance(text, str):
                yield text
            else:
                notes[f"no string in {columns[0]}"] += 1


def open_input(path: str) -> BinaryIO:
    """A file that may be compressed, opened for reading bytes."""
    if path.lower().endswith(".gz"):
        return gzip.open(path)
    if path.lower().endswith(".zst"):
        import zstandard  # optional: pip install zstandard
        # Compressors with several threads write several frames, one after the other.
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(
            open(path, "rb"), read_across_frames=True), 1 << 20)
    return open(path, "rb")


def with_path_in_errors(path: str, items: Iterator) -> Iterator:
    """What a reader gives; its errors as one sentence."""
    try:
        yield from items
    except UserError:
        raise
    # Every compressor and pyarrow have errors of their own, and a package may not be installed.
    except Exception as error:
        raise UserError(f"{path} cannot be read: {error or type(error).__name__}.")


def bad_line(path: str, number: int, reason: str, found: bytes, policy: str,
             notes: Counter[str], hint: str = "") -> None:
    """Count a line that is not valid, or stop at it."""
    if policy == "stop":
        raise UserError(f"{path}, line {number}: {reason}{hint} (found {found[:40]!r})."
                        " --on_bad_line=skip leaves such lines out and counts them.")
    notes[reason] += 1


# ---------------------------------------------------------------------------------------------
# the tokenizer


def save_tokenizer(config: Config, directory: Path, files: Files) -> dict[str, Any]:
    """Make or take the tokenizer that the config asks for; returns its entry in the manifest."""
    entry_path = directory / "parts" / "tokenizer.json"
    if entry_path.exists():
        return data.read_json(entry_path)
    kind, _, name = config.tokenizer.partition(":")
    # Stages that go on with the weights of another take over its tokenizer, as Crystal's do.
    if kind == "data":
        tokenizer = check_tokenizer(config, data.load_data(name).tokenizer)
    else:
        tokenizer = make_tokenizer(config, sample_texts(config, files))
    entry = tokenizer.save(directory)
    data.write_json(entry_path, entry)
    return entry


def sample_texts(config: Config, files: Files) -> Iterator[str]:
    """About SAMPLE_BYTES of text, of each source in proportion: the beginnings of many files."""
    # Merges follow the commonest pairs, and for those a sample will do.
    sizes = {}
    for name, paths in files.items():
        size = sum(map(os.path.getsize, paths))
        sizes[name] = min(size, config.max_source_bytes or size)
    for name, paths in files.items():
        budget = SAMPLE_BYTES * sizes[name] // max(1, sum(sizes.values()))
        for i in np.random.default_rng(config.seed).permutation(len(paths)):
            # Of few files more is read than of many, and never all of one that is huge.
            left = min(budget, max(1 << 20, SAMPLE_BYTES // len(paths)))
            for text in read_documents(paths[i], config.on_bad_line, Counter()):
                if left <= 0:
                    break
                yield text[:left]
                used = min(len(text), left)
                left, budget = left - used, budget - used
            if budget <= 0:
                break


# ---------------------------------------------------------------------------------------------
# documents become parts: long runs of tokens


def split_into_parts(config: Config, files: Files) -> list[tuple[int, str, list[str]]]:
    """(number, source, files) of each part: whole files in their order, PART_BYTES together."""
    jobs: list[tuple[int, str, list[str]]] = []
    for source, paths in files.items():
        room = 0.0
        for path in paths:
            if room <= 0:
                jobs.append((len(jobs), source, []))
                # Where to stop is known only to one who reads a source from its beginning.
                room = math.inf if config.max_source_bytes else PART_BYTES
            jobs[-1][2].append(path)
            room -= os.path.getsize(path)
    return jobs


def encode_part(work: Work, job: tuple[int, str, list[str]]) -> dict[str, Any]:
    """Write the tokens of some files as one part; returns what was counted."""
    number, source, paths = job
    c = work.config
    # Loading it once more costs nothing: load_tokenizer keeps what this process has loaded.
    tokenizer = load_tokenizer(work.directory, work.tokenizer_entry)
    half, fim_rate = c.source_halves.get(source), c.fim_rates.get(source, 0)
    part = {"source": source, "file": f"{number:05}.bin", "valid_file": f"{number:05}.valid.bin",
            "index_file": f"{number:05}.documents", "paths": paths,
            "documents": 0, "bytes": 0, "tokens": 0, "valid_tokens": 0}
    notes: Counter[str] = Counter()
    texts = ((file, n, text) for file, path in enumerate(paths)
             for n, text in enumerate(read_documents(path, c.on_bad_line, notes), 1))
    left = c.max_source_bytes or math.inf
    with (data.writing(work.parts / part["file"]) as train_file,
          data.writing(work.parts / part["valid_file"]) as valid_file,
          data.writing(work.parts / part["index_file"]) as index_file):
        for file, n, text in texts:
            utf8 = text.encode()
            # What becomes of a document follows from its text, so that it does not matter which
            # worker reads it, and when. The last bit of the key chooses its half, and the others
            # whether it is held out: what is held out in one stage is so in all.
            key = zlib.crc32(utf8)
            held_out = c.valid_documents > 0 and key // 2 % c.valid_documents == 0
            if half and not held_out and half != ("even", "odd")[key % 2]:
                continue
            ids = tokenizer.encode(text)
            if fim_rate and not held_out:
                random = np.random.default_rng([c.seed, key])
                ids = fill_in_the_middle(ids, tokenizer, fim_rate, c.fim_spm_rate, random)
            # One end-of-document token after each, and nothing before it, as Amber.
            tokens = np.append(ids, tokenizer.eos_id).astype(work.ids_dtype)
            if held_out:
                valid_file.write(tokens.tobytes())
                part["valid_tokens"] += len(tokens)
            else:
                train_file.write(tokens.tobytes())
                index_file.write(np.array((part["tokens"], file, n), DOCUMENT).tobytes())
                part["documents"] += 1
                part["bytes"] += len(utf8)
                part["tokens"] += len(tokens)
            left -= len(utf8)
            if left <= 0:
                break
    part |= {"repaired": notes.pop("repaired", 0), "dropped": +notes}
    return part


def fill_in_the_middle(ids: np.ndarray, tokenizer: Tokenizer, rate: float, spm_rate: float,
                       random: np.random.Generator) -> np.ndarray:
    """A document's ids (n,), at `rate` cut in three and written with the middle last, (n + 3,):
    Bavarian et al. 2022."""
    if random.random() >= rate:
        return ids
    # The cuts are between tokens and nothing is encoded anew, so that the three pieces are the
    # document, token for token. Crystal's released script encodes them, and adds spaces.
    first, second = np.sort(random.integers(len(ids) + 1, size=2))
    prefix, middle, suffix = ids[:first], ids[first:second], ids[second:]
    pre, mid, suf = ([tokenizer.specials[name]] for name in FIM_TOKENS)
    # Prefix first is <PRE> prefix <SUF> suffix <MID> middle. Suffix first, in the form that shares
    # its tokens with the other (the paper's variant 2), is <PRE> <SUF> suffix <MID> prefix middle.
    if random.random() < spm_rate:
        prefix, middle = ids[:0], ids[:second]
    return np.concatenate([pre, prefix, suf, suffix, mid, middle])


# ---------------------------------------------------------------------------------------------
# parts are cut into sequences, and the sequences dealt to chunks


@dataclass
class Source:
    """A source whose text has become tokens, and how many of its sequences go where."""

    number: int  # its place among the sources, which its sequences carry
    parts: list[tuple[str, int]]  # (file, tokens): one after the other they are one long run
    valid_parts: list[tuple[str, int]]  # the same of the documents that are held out whole
    sequences: int  # that the run makes; what is left over at its end is not used
    n_held_out: int  # of them, for validation
    weight: float  # how often the others are used
    entry: dict[str, Any]  # what the manifest says of it
    per_chunk: int = 0

    @property
    def dealt(self) -> int:
        """Sequences for the chunks, if nothing caps them; 2.5 is all twice, then half of them."""
        train = self.sequences - self.n_held_out
        return int(self.weight) * train + round(self.weight % 1 * train)


def plan_sources(config: Config, parts: list[dict[str, Any]]) -> list[Source]:
    """The sources in their order, and how many of their sequences each chunk gets."""
    sources: list[Source] = []
    problems: list[str] = []
    for name in dict.fromkeys(part["source"] for part in parts):
        mine = [part for part in parts if part["source"] == name]
        sources.append(plan_source(config, len(sources), name, mine, problems))
    if problems:
        # What would do for all of them: a tenth of each for validation, a sequence in each chunk.
        used = [source for source in sources if source.weight]
        n_valid = min([config.valid_sequences, *(s.sequences // 10 for s in sources)])
        n = min([config.n_chunks, *(int((s.sequences - n_valid) * s.weight) for s in used)])
        would_do = f"--valid_sequences={n_valid} --n_chunks={n} would do" if n else "give more text"
        raise UserError(" ".join([*problems, f"With this text {would_do} (the tokens are kept)."]))
    # Every chunk gets the same of every source, as in Amber; what does not divide is left out.
    shares = [source.dealt // config.n_chunks for source in sources]
    for source, share in zip(sources, apportion(shares, config.sequences_per_chunk)):
        source.per_chunk = share
    if not any(shares):
        raise UserError("source_weights leave nothing to train on: one must be above 0.")
    return sources


def plan_source(config: Config, number: int, name: str, parts: list[dict[str, Any]],
                problems: list[str]) -> Source:
    """One source from the counts of its parts; one that is too small is added to the problems."""
    width, weight = config.seq_len + 1, config.source_weights.get(name, 1)
    entry = {"name": name, "weight": weight}
    for key in ("documents", "bytes", "tokens", "repaired"):
        entry[key] = sum(part[key] for part in parts)
    dropped = sum((Counter(part["dropped"]) for part in parts), Counter())
    if not entry["documents"]:
        reasons = ", ".join(f"{n} x {reason}" for reason, n in dropped.items())
        raise UserError(f"Source {name!r} has no documents: {reasons or 'nothing to read'}, in"
                        f" {parts[0]['paths'][0]}{' and others' * (len(parts[0]['paths']) > 1)}.")
    sequences, tail = divmod(entry["tokens"], width)
    # Where whole documents are held out, no sequence need be held out of the others.
    n_held_out = 0 if config.valid_documents else config.valid_sequences
    valid_tokens = sum(part["valid_tokens"] for part in parts)
    source = Source(number, [(part["file"], part["tokens"]) for part in parts],
                    [(part["valid_file"], part["valid_tokens"]) for part in parts],
                    sequences, n_held_out, weight, entry)
    no_chunk = sequences < n_held_out or (weight and source.dealt < config.n_chunks)
    no_validation = config.valid_documents and valid_tokens < width
    if no_chunk or no_validation:
        problems.append(
            f"Source {name!r} is too small: {entry['tokens']} tokens are {sequences} sequences of"
            f" {width}, and valid_documents = {config.valid_documents} holds out {valid_tokens}"
            f" more. That is not enough for valid_sequences = {config.valid_sequences} and n_chunks"
            f" = {config.n_chunks} at weight {weight}.")
    entry |= {"dropped": dropped, "sequences": sequences, "tail_tokens": tail}
    return source


def apportion(counts: list[int], cap: int) -> list[int]:
    """Counts cut to `cap` in all, each in proportion (largest remainder); 0 = no cap."""
    total = sum(counts)
    if not cap or total <= cap:
        return counts
    cut = [n * cap // total for n in counts]
    # What rounding down has left over goes to those that it took most from.
    by_remainder = sorted(range(len(counts)), key=lambda i: (-(counts[i] * cap % total), i))
    for i in by_remainder[:cap - sum(cut)]:
        cut[i] += 1
    return cut


def held_out_sequences(config: Config, source: Source) -> np.ndarray:
    """Numbers (n_held_out,) of a source's sequences that are for validation, ascending."""
    # Drawn from all of it: the last files of a source may be unlike the first.
    random = np.random.default_rng([config.seed, source.number])
    return np.sort(random.choice(source.sequences, source.n_held_out, replace=False))


def dealt_sequences(config: Config, source: Source, chunk: int) -> np.ndarray:
    """Numbers (per_chunk,) of the sequences of a source that a chunk gets."""
    # Dealt round-robin, as Amber (mix_and_split.py): chunk c gets the places c, c + n, c + 2n, ...
    # This is arithmetic and not a list, so that a source of any size needs no memory.
    n, train = config.n_chunks, source.sequences - source.n_held_out
    i = chunk + n * np.arange(source.per_chunk)
    # A cap takes evenly from the whole source; where there is none this changes nothing.
    i = i * (source.dealt // n) // max(1, source.per_chunk)
    # So does the fraction of a weight, which comes after its whole times.
    whole = int(source.weight) * train
    fraction = (i - whole) * train // max(1, source.dealt - whole)
    i = np.where(i < whole, i % train, fraction)
    # So far this counts the sequences that are not held out: step over those that are.
    held_out = held_out_sequences(config, source)
    return i + np.searchsorted(held_out - np.arange(len(held_out)), i, side="right")


def plant_canaries(work: Work, number: int) -> Source:
    """A source of random ids, each sequence of them as often as `canaries` says, and all of that
    in one third of the run."""
    # Nobody can guess random ids: what a model knows of them it has memorized.
    config, width = work.config, work.config.seq_len + 1
    random = np.random.default_rng([config.seed, 0, 64])
    different, copies = [], []
    for times, n in sorted(config.canaries.items()):
        copies += np.repeat(len(different) + np.arange(n), times).tolist()
        different += [*random.integers(config.vocab_size, size=(n, width))]
    per_chunk = len(copies) // config.n_chunks
    n = per_chunk * config.n_chunks
    copies = np.random.default_rng([config.seed, 1, 64]).permutation(copies)[:n]
    # Whether a text that was seen early is remembered at the end is half of the question. So the
    # canaries belong to the early, the middle and the late chunks in turn: ordered by that, the
    # first copies are for chunk 0, the next for chunk 1, ...
    by_phase = copies[np.argsort(copies % 3, kind="stable")]
    # ... and as sequences are dealt round-robin, they are written across the chunks.
    dealt = by_phase.reshape(config.n_chunks, per_chunk).T.ravel()  # (n,): chunk 0, 1, ..., 0, 1
    with data.writing(work.parts / "canary.bin") as f:
        for i in dealt:
            f.write(different[i].astype(work.ids_dtype).tobytes())
    entry = {"name": "canary", "weight": 1, "documents": 0, "bytes": 0, "tokens": n * width,
             "repaired": 0, "dropped": {}, "sequences": n, "tail_tokens": 0}
    return Source(number, [("canary.bin", n * width)], [], n, n_held_out=0, weight=1,
                  entry=entry, per_chunk=per_chunk)


# ---------------------------------------------------------------------------------------------
# chunks are written


def write_chunk(work: Work, job: tuple[int, list[Source]]) -> dict[str, Any]:
    """One chunk, source after source as Amber's: it is shuffled when it is read."""
    chunk, sources = job
    pieces = []
    for source in sources:
        ids = dealt_sequences(work.config, source, chunk)
        pieces.append((np.full(len(ids), source.number), source.parts, ids))
    entry = write_sequences(work, f"train/chunk_{chunk:03}.npy", pieces)
    return entry | {"sources": {source.entry["name"]: source.per_chunk for source in sources}}


def write_validation(work: Work, source: Source) -> dict[str, Any]:
    """The validation sequences of a source."""
    parts, ids = source.parts, held_out_sequences(work.config, source)
    if work.config.valid_documents:
        # As many as are wanted, evenly from all that the held-out documents make.
        parts = source.valid_parts
        there = sum(tokens for _, tokens in parts) // (work.config.seq_len + 1)
        n = min(there, work.config.valid_sequences)
        ids = np.arange(n) * there // max(1, n)
    name, numbers = source.entry["name"], np.full(len(ids), source.number)
    return write_sequences(work, f"valid/{name}.npy", [(numbers, parts, ids)]) | {"source": name}


def write_sequences(work: Work, file: str, pieces: list[tuple]) -> dict[str, Any]:
    """Write a .npy of sequences, unless it is there; returns its entry in the manifest."""
    # pieces: (source numbers (n,), parts, ids (n,) of sequences in the run that the parts make)
    path, n = work.directory / file, sum(len(ids) for _, _, ids in pieces)
    header = {"descr": np.lib.format.dtype_to_descr(work.dtype), "fortran_order": False,
              "shape": (n,)}
    # A file that has its name is whole: of a preparation that was stopped.
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        # Not through a memory map: there a full disk is a crash, and here it is an error.
        with data.writing(path) as f:
            np.lib.format.write_array_header_1_0(f, header)
            for numbers, parts, ids in pieces:
                for at in range(0, len(ids), BLOCK):
                    block = np.empty(len(ids[at:at + BLOCK]), work.dtype)
                    block["source"] = numbers[at:at + BLOCK]
                    block["token_ids"] = read_sequences(work, parts, ids[at:at + BLOCK])
                    f.write(block.tobytes())
    return {"file": file, "sequences": n, "sha256": data.sha256_file(path)}


def read_sequences(work: Work, parts: list[tuple[str, int]], ids: np.ndarray) -> np.ndarray:
    """Sequences (n, seq_len + 1) by their numbers (n,) in the run that `parts` make."""
    width = work.config.seq_len + 1
    # An empty part has no sequence, and an empty file cannot be mapped.
    parts = [(file, length) for file, length in parts if length]
    ends = np.cumsum([length for _, length in parts])
    firsts = np.searchsorted(ends, ids * width, side="right")  # the part each sequence begins in
    out = np.empty((len(ids), width), work.ids_dtype)
    opened, begin = -1, 0
    for sequence, at, part in zip(out, (ids * width).tolist(), firsts.tolist()):
        filled = 0
        # A sequence may begin in one part and end in another.
        while filled < width:
            # One file at a time: there may be more of them than a process may open.
            if part != opened:
                tokens = np.asarray(np.memmap(work.parts / parts[part][0], work.ids_dtype, "r"))
                opened, begin = part, int(ends[part]) - len(tokens)
            piece = tokens[at + filled - begin:][:width - filled]
            sequence[filled:filled + len(piece)] = piece
            filled, part = filled + len(piece), part + 1
    return out


# ---------------------------------------------------------------------------------------------
# chunks that LLM360 released: lines of {"token_ids": [...], "source": ...}, a file for each chunk


def from_released(work: Work, files: Files) -> tuple[list, list, list, list]:
    """Released files to chunks; returns what `from_text` does."""
    config, n = work.config, len(files["train"])
    jobs = [*enumerate(files["train"] + files["valid"])]
    parts = run_jobs(work, "sequences", convert_released, jobs)
    total, validated = Counter(), Counter()  # sequences of each source
    for i, part in enumerate(parts):
        total.update(part["counts"])
        if i >= n:
            validated.update(part["counts"])
    names = [*total]  # sources are numbered as they first appear in the files
    check_names(names)
    # Whatever part of Amber this is, its chunks keep the names that LLM360 gave them.
    jobs = [(f"train/chunk_{i:03}.npy", [part], names, names, config.sequences_per_chunk,
             {"made_from": part["made_from"]}) for i, part in enumerate(parts[:n])]
    chunks = run_jobs(work, "chunks", write_released, jobs)
    jobs = [(f"valid/{name}.npy", parts[n:], names, [name], config.valid_sequences,
             {"source": name}) for name in names if name in validated]
    valid = run_jobs(work, "validation", write_released, jobs)
    sources = []
    for name in names:
        tokens = total[name] * (config.seq_len + 1)
        sources.append({"name": name, "sequences": total[name], "tokens": tokens})
    return parts, sources, chunks, valid


def convert_released(work: Work, job: tuple[int, str]) -> dict[str, Any]:
    """The tokens of one released file as a part, in its order, and a byte each for the source."""
    number, path = job
    width, n_vocab = work.config.seq_len + 1, work.tokenizer_entry["n_vocab"]
    counts: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    numbers = bytearray()
    with data.writing(work.parts / f"{number:05}.bin") as f, open_input(path) as lines:
        for i, line in with_path_in_errors(path, enumerate(lines, 1)):
            try:
                ids, source = parse_released(line, width, n_vocab)
            except ValueError as error:
                bad_line(path, i, str(error), line, work.config.on_bad_line, notes)
                continue
            counts[source] += 1
            # Its number in this file: the numbers of all are known when all files are read. A byte
            # is enough, for more than 255 sources are refused then.
            numbers.append([*counts].index(source) % 256)
            f.write(ids.astype(work.ids_dtype).tobytes())
    if not counts:
        raise UserError(f"{path} has no line that is a sequence of {width} token_ids.")
    with data.writing(work.parts / f"{number:05}.sources") as f:
        f.write(numbers)
    return {"file": f"{number:05}", "made_from": os.path.basename(path).split(".")[0],
            "counts": counts, "dropped": notes}


def parse_released(line: bytes, width: int, n_vocab: int) -> tuple[np.ndarray, str]:
    """(ids (width,), source) of a released line; ValueError says what it should be."""
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        record = json.loads(line)
        ids, source = np.array(record["token_ids"]), record["source"]
        # NumPy reads true as 1, so the types are looked at as well.
        if (isinstance(source, str) and set(map(type, record["token_ids"])) == {int}
                and ids.shape == (width,) and ids.min() >= 0 and ids.max() < n_vocab):
            return ids, source
    raise ValueError(f"not JSON with token_ids, {width} numbers below {n_vocab}, and a source")


def write_released(work: Work, job: tuple) -> dict[str, Any]:
    """Write the sequences of the sources `wanted` from `parts`, in their order, `cap` at most."""
    file, parts, names, wanted, cap, more = job
    numbers = []
    for part in parts:
        # From the numbers in this file to those of all files together.
        table = np.array([names.index(name) for name in part["counts"]], np.uint8)
        numbers.append(table[np.fromfile(work.parts / f"{part['file']}.sources", np.uint8)])
    numbers = np.concatenate(numbers)
    places = [np.flatnonzero(numbers == names.index(name)) for name in wanted]
    # Of every source its share, evenly from all that there are: released files are sorted by
    # source, and the first so many lines would be of one.
    kept = apportion([len(there) for there in places], cap)
    chosen = [there[np.arange(n) * len(there) // max(1, n)] for there, n in zip(places, kept)]
    ids = np.sort(np.concatenate(chosen))
    runs = [(f"{part['file']}.bin", sum(part["counts"].values()) * (work.config.seq_len + 1))
            for part in parts]
    entry = write_sequences(work, file, [(numbers[ids], runs, ids)])
    if file.startswith("train"):
        # It is not needed any more: a part of Amber is 7 GB, and there are 360.
        (work.parts / runs[0][0]).unlink(missing_ok=True)
    return entry | {"sources": dict(zip(wanted, kept))} | more


# ---------------------------------------------------------------------------------------------
# worker processes


def run_jobs(work: Work, title: str, job: Callable[[Work, Any], dict[str, Any]],
             arguments: list) -> list[dict[str, Any]]:
    """job(work, argument) of every argument, in worker processes; the results in their order."""
    results = [work.parts / f"{title}_{i:05}.json" for i in range(len(arguments))]
    # The bar is for a person at a terminal: disable=None leaves it out of a log file.
    bar = {"desc": title, "total": len(arguments), "leave": False, "disable": None}
    jobs = itertools.repeat(work), itertools.repeat(job), results, arguments
    n_workers = min(work.n_workers, len(arguments))
    if n_workers <= 1:
        return [*tqdm(map(run_job, *jobs), **bar)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_workers, spawn, start_worker) as pool:
        try:
            # Of several errors the one of the first argument is told, whoever was faster.
            return [*tqdm(pool.map(run_job, *jobs), **bar)]
        except BrokenProcessPool:
            raise UserError("A worker process was killed, perhaps for want of memory: run the same"
                            " command again (finished parts are kept), with fewer --workers if it"
                            " was memory.")
        except BaseException:
            # Otherwise leaving this block waits until each worker is through with its file.
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def run_job(work: Work, job: Callable[[Work, Any], dict[str, Any]], result: Path,
            argument: Any) -> dict[str, Any]:
    """job(work, argument), unless its result is there already."""
    # This is all that it takes to go on after a kill: the result is written when the files of the
    # job are, and it has its name when it is whole.
    if not result.exists():
        data.write_json(result, job(work, argument))
    return data.read_json(result)


def start_worker() -> None:
    """What each worker does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()
    # When the parent is killed, nobody else would end its workers.
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def count_workers(config: Config, files: Files) -> int:
    """Processes to work with."""
    # To start them takes seconds, in which a small data set is made.
    size = sum(os.path.getsize(path) for path in itertools.chain(*files.values()))
    return config.workers or (os.cpu_count() if size >= 4 * PART_BYTES else 1)


# ---------------------------------------------------------------------------------------------
# the whole: what goes in, where it is made, the manifest


def find_inputs(config: Config, passed_over: Counter[str]) -> Files:
    """Files by source ({} = the embedded corpus; released ones as "train" and "valid");
    UserError where the settings do not fit them."""
    check_names([*config.sources])
    if not config.tokenized:
        files = {name: find_files(at, passed_over) for name, at in config.sources.items()}
        check_sources(config, [*(files or CORPUS)])
        return files
    if config.tokenizer == "bpe":
        raise UserError("tokenized chunks need the tokenizer that made them, as tokenizer ="
                        ' "hf:PATH": "bpe" would train a new one.')
    train = find_files(config.tokenized, passed_over)
    if len(train) < config.n_chunks:
        raise UserError(f"tokenized: {config.tokenized} matches {len(train)} files, but n_chunks is"
                        f" {config.n_chunks}, and a file makes a chunk: take"
                        f" --n_chunks={len(train)}.")
    valid = find_files(config.tokenized_valid, passed_over) if config.tokenized_valid else []
    return {"train": train[:config.n_chunks], "valid": valid}


def check_names(names: list[str]) -> None:
    """UserError if these cannot be the names of sources."""
    for name in names:
        # A source names its file of validation sequences, which must not be somewhere else.
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise UserError(f"{name!r} cannot name a source, for it names a file too: use letters,"
                            " digits and . _ + -")
    if len(names) > 255:  # and the canaries
        raise UserError(f"There are {len(names)} sources, but a sequence has one byte for the"
                        " number of its source: join some, until there are 255 at most.")


def check_sources(config: Config, names: list[str]) -> None:
    """UserError where the settings do not fit sources of text."""
    for setting in ("source_weights", "source_halves", "fim_rates"):
        if unknown := sorted(set(getattr(config, setting)) - set(names)):
            raise UserError(f"{setting} names {unknown}, but the sources are {sorted(names)}.")
    if config.canaries and "canary" in names:
        raise UserError("canaries are planted under the name canary: call that source otherwise.")
    n = sum(times * n for times, n in config.canaries.items())
    if config.canaries and n < config.n_chunks:
        raise UserError(f"canaries make {n} sequences for {config.n_chunks} chunks: plant at least"
                        " one for each chunk.")


def open_unfinished(config: Config, files: Files) -> tuple[Path, TextIO]:
    """The directory data/NAME.tmp and the lock on it: as a preparation of the same data left it,
    or empty. UserError if another process works in it, or if it is someone else's."""
    directory = Path(f"{Path(config.data_dir)}.tmp")
    name = config.tokenizer.partition(":")[2]  # a file, or a data set that has the tokenizer
    inputs = [*itertools.chain(*files.values()), name, f"{name}/manifest.json"]
    # A file whose size or time has changed is another one; to read them all would take too long.
    stats = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns)
             for path in inputs if os.path.exists(path)]
    key = {"format": data.FORMAT, "settings": data.data_settings(config),
           "inputs": data.sha256_json([stats, versions()])}
    lock = None
    # An empty directory may be one that another process has made just now: it is not locked yet.
    if data.is_unfinished(directory) and (directory / data.MARK).exists():
        lock = data.lock_directory(directory)
    there = data.read_json(directory / "key.json") if lock else {}
    if there and same_tokens(there) == same_tokens(key):
        print(f"Going on with {directory}, which was begun before.")
        if there != key:
            # The tokens are those of these settings too; what was made of them is not.
            for result in (directory / "parts").glob("[!t]*_*.json"):
                result.unlink()
            for name in ("train", "valid", "documents"):
                shutil.rmtree(directory / name, ignore_errors=True)
            (directory / "manifest.json").unlink(missing_ok=True)
            data.write_json(directory / "key.json", key)
    else:
        # What was begun with other settings or other inputs is of no use. Its key goes first: a
        # kill in the middle must not leave a directory that looks as if one could go on with it.
        if lock:
            (directory / "key.json").unlink(missing_ok=True)
        data.begin_unfinished(directory)
        lock = data.lock_directory(directory)
        (directory / "parts").mkdir()
        data.write_json(directory / "key.json", key)
    return directory, lock


def same_tokens(key: dict[str, Any]) -> dict[str, Any]:
    """What the tokens of a preparation depend on: all but how they are dealt, later."""
    if not key or key["settings"]["tokenized"]:  # of released chunks a part is gone once it is used
        return key
    dealing = ("source_weights", "seq_len", "n_chunks", "sequences_per_chunk", "valid_sequences",
               "canaries")
    settings = {name: value for name, value in key.get("settings", {}).items()
                if name not in dealing}
    return key | {"settings": settings}


def write_manifest(work: Work, passed_over: Counter[str], parts: list[dict], sources: list[dict],
                   chunks: list[dict], valid: list[dict]) -> None:
    """All that the other stages, and a reader in five years, need to know."""
    dropped = sum((Counter(part["dropped"]) for part in parts), passed_over)
    n_valid = {file["source"]: file["sequences"] for file in valid}
    for source in sources:
        train = sum(chunk["sources"][source["name"]] for chunk in chunks)
        held_out = n_valid.get(source["name"], 0)
        # Documents that are held out whole are not among the sequences of their source. A weight
        # above 1 counts a sequence every time; unused is what is in no chunk at all.
        inside = 0 if work.config.valid_documents else held_out
        source |= {"valid_sequences": held_out, "train_sequences": train,
                   "unused_sequences": max(0, source["sequences"] - inside - train)}
    # Released chunks have lines, and no documents.
    documents = [] if work.config.tokenized else write_documents(work, parts)
    manifest = {"format": data.FORMAT, "settings": data.data_settings(work.config),
                "tokenizer": work.tokenizer_entry, "seq_len": work.config.seq_len,
                "seed": work.config.seed, "dtype": np.lib.format.dtype_to_descr(work.dtype),
                "sources": sources, "chunks": chunks, "valid": valid, "dropped": dropped,
                "documents": documents}
    data.write_json(work.directory / "manifest.json", manifest)


def write_documents(work: Work, parts: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Where the documents of each source begin, and their files' names; the manifest's entries."""
    folder, names = work.directory / "documents", {}
    folder.mkdir(exist_ok=True)
    # Equal data has equal bytes, whoever's home ~ is, and wherever the embedded text lay.
    home, here = os.path.expanduser("~/"), f"{work.directory}{os.sep}"
    for source, mine in itertools.groupby(parts, lambda part: part["source"]):
        index, tokens, paths = [], 0, []
        for part in mine:
            # A part counts its tokens and files from its own beginning.
            index.append(np.fromfile(work.parts / part["index_file"], DOCUMENT))
            index[-1]["begin"] += tokens
            index[-1]["file"] += len(paths)
            tokens += part["tokens"]
            paths += part["paths"]
        names[source] = [path.removeprefix(here).replace(home, "~/", 1) for path in paths]
        with data.writing(folder / f"{source}.npy") as f:
            np.save(f, np.concatenate(index))
    data.write_json(folder / "files.json", names)
    return [{"file": f"documents/{path.name}", "sha256": data.sha256_file(path)}
            for path in sorted(folder.iterdir())]


def publish(directory: Path, lock: TextIO, data_dir: Path) -> None:
    """Give a data set that is whole its name; what was needed on the way goes."""
    for name in ("parts", "corpus"):
        shutil.rmtree(directory / name, ignore_errors=True)
    lock.close()  # Windows renames nothing that is open
    os.rename(directory, data_dir)
    for name in (data.MARK, "key.json", "lock"):
        (data_dir / name).unlink(missing_ok=True)


def is_prepared(config: Config) -> bool:
    """Whether the data set is there; UserError if something else is in its place."""
    directory = Path(config.data_dir)
    if not directory.exists() or not any(directory.iterdir()):
        return False
    if not (directory / "manifest.json").exists():
        raise UserError(f"{directory} exists, but has no manifest.json: it is not a data set."
                        " Delete it, or choose another place with --data_dir.")
    there = data.load_data(directory)
    data.check_data_settings(config, there, may_differ=())
    print("Nothing to do (to prepare it anew, delete it): " + summary(there))
    return True


def summary(there: data.Data) -> str:
    """A data set in one sentence."""
    n = sum(chunk["sequences"] for chunk in there.manifest["chunks"])
    n_valid = sum(file["sequences"] for file in there.manifest["valid"])
    shares = ", ".join(f"{source['name']} {source['train_sequences'] / n:.1%}"
                       for source in there.manifest["sources"])
    return (f"{there.directory} has {n:,} sequences of {there.seq_len} + 1 tokens in"
            f" {len(there.manifest['chunks'])} chunks and {n_valid:,} for validation; {shares};"
            f" tokenizer {there.manifest['tokenizer']['kind']} with {there.n_vocab:,} ids.")


def main(argv: list[str]) -> None:
    config, _ = load(argv)
    # It shares its work over the cores of one machine, and not over torchrun's processes.
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("prepare_data.py has several processes of its own, --workers of them: start"
                        " it with python, not with torchrun.")
    prepare(config)


if __name__ == "__main__":
    run_command(main)
