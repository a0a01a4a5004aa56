"""Stage 1: text becomes the data that a run trains on, sequences of tokens in chunks.

    python prepare_data.py configs/amber_tiny.py               # seconds
    python prepare_data.py configs/amber_125m.py --workers=8   # your own text, named in `sources`
    python prepare_data.py configs/amber_7b.py                 # the chunks that LLM360 released

A document is read from a file, and perhaps held out for validation. It becomes tokens and one
end-of-document token, and follows its predecessor in the token file of its source. That file is cut
into sequences of seq_len + 1 tokens, the sequences are dealt to the chunks as cards are dealt, and
the chunks are written. The manifest comes last. The same command continues a preparation that was
stopped: a file that has its name is complete. docs/data.md describes the formats.
"""

import contextlib
import fnmatch
import functools
import gzip
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

import data
import tokenizer as tk
from configs import Config, UserError, load, progress, run_command

SAMPLE = 10 << 20  # characters of text, to train a tokenizer on
BLOCK = 4096  # sequences in memory at a time: 16 MB at Amber's length
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # in the place of a large file
Files = dict[str, list[str]]  # paths by source


class Work(NamedTuple):
    """What every step of a preparation needs."""

    config: Config
    directory: Path  # data/NAME
    scratch: Path  # data/NAME/unfinished: token files and the like, removed at the end
    dtype: np.dtype  # of a sequence: data.sequence_dtype


def main(argv: list[str]) -> None:
    """Make the data set of a config, or continue it; a finished one is left as it is."""
    config, _ = load(argv)
    if any(Path(word).is_dir() for word in argv):
        raise UserError("Give a config file: a run directory, which may be a stranger's, does not"
                        " say where data is written and what it is made of.")
    directory, scratch = Path(config.data_dir), Path(config.data_dir, "unfinished")
    if (directory / "manifest.json").exists():
        there = data.load_data(directory)
        there.check_settings(config, may_differ=())
        shutil.rmtree(scratch, ignore_errors=True)  # a kill may have come right before this
        print("Nothing to do (to prepare it anew, delete it): " + summary(config, there))
        return
    passed: dict[str, str] = {}  # paths that are not read, and why
    files = find_inputs(config, passed)
    with begin(config, files, scratch):
        tokenizer, entry = save_tokenizer(config, scratch, files)
        dtype = data.sequence_dtype(config.seq_len, tokenizer.n_vocab)
        make = from_released if config.tokenized else from_text
        made = make(Work(config, directory, scratch, dtype), tokenizer, files)
        for source in made["sources"]:
            name, valid = source["name"], made["valid"]
            source["valid_sequences"] = sum(f["sequences"] for f in valid if f["source"] == name)
            source["train_sequences"] = sum(chunk["sources"][name] for chunk in made["chunks"])
        made["dropped"] += Counter(passed.values())
        data.write_json(directory / "manifest.json", {
            "format": data.FORMAT, "settings": data.data_settings(config), "tokenizer": entry,
            "seq_len": config.seq_len, "seed": config.seed,
            "dtype": np.lib.format.dtype_to_descr(dtype), **made})
        shutil.rmtree(scratch)
    print(summary(config, data.load_data(directory)))


# ---- a document is read


def find_files(pattern: str, passed: dict[str, str]) -> list[str]:
    """The regular files of a path, a glob or a folder, sorted; `passed` gets why others are not."""
    names: dict[str, str] = {}  # what the folders that were met are called, by real path
    files: set[str] = set()  # each once: a glob can match a file and its folder

    def take(path: str) -> None:
        if not os.path.isfile(path):  # a pipe, where reading would wait for ever
            passed[path] = "not a regular file"
        elif os.path.getsize(path) < 1024 and Path(path).read_bytes().startswith(LFS_POINTER):
            passed[path] = "git-lfs pointer (git lfs pull gets the file)"
        else:
            files.add(path)

    def visit(path: str, parts: list[str]) -> None:
        """Take what the parts of a glob match below a path: without parts, all there is."""
        if not os.path.isdir(path or "."):
            if not parts:
                take(path)
            return
        part, *rest = parts or ["**"]
        # A name that exists is that name, and not the glob that it would be. "" ends "text/*/".
        if not part or part != "*" and os.path.lexists(os.path.join(path, part)):
            return visit(os.path.join(path, part) if part else path, rest)
        if part == "**":  # this folder and all below it; links are followed, each folder once
            if names.setdefault(os.path.realpath(path), path) != path:
                passed[path] = "folder that is read under another name"
                return
            if rest:
                visit(path, rest)
        try:
            there = os.listdir(path or ".")
        except OSError:
            passed[path] = "folder that may not be read"
            return
        for name in sorted(fnmatch.filter(there, part)):
            below = os.path.join(path, name)
            if name[0] == "." and part[0] != ".":
                passed[below] = "hidden (its name begins with a dot)"
            elif part != "**":
                visit(below, rest)
            elif os.path.isdir(below) or not rest:
                visit(below, parts if os.path.isdir(below) else rest)

    *parts, last = os.path.expanduser(pattern).split("/")
    visit("/"[not pattern.startswith("/"):], [*filter(None, parts), last])
    if not files:
        raise UserError(f"There is no regular file at {os.path.abspath(pattern)} (passed over:"
                        f" {dict(Counter(passed.values())) or 'nothing'})."
                        " python tools/corpus.py writes those in data/corpus.")
    return sorted(files)


def read_documents(path: str, config: Config, notes: Counter[str]) -> Iterator[str]:
    """The documents of a file: valid Unicode, none empty. `notes` counts by reason what was left
    out, and as "repaired" the documents that were not valid."""
    for text in naming(path, read_file(path, config, notes)):
        valid = tk.replace_invalid_utf8(text)
        notes["repaired"] += valid is not text
        if valid:
            yield valid
        else:
            notes["empty document"] += 1


def read_file(path: str, config: Config, notes: Counter[str]) -> Iterator[str]:
    """The texts of a file. The ending of its name tells how it holds them."""
    name = re.sub(r"\.(gz|zst)$", "", path.lower())
    keys = config.text_field.split(",")
    wanted = f"a string in {' or '.join(keys)}, as text_field says"

    def text_of(record: dict[str, Any]) -> str:
        texts = [text for key in keys if isinstance(text := record.get(key), str)]
        return next(filter(None, texts), texts[-1])  # LookupError if there is none

    if name.endswith(".parquet"):
        from pyarrow.parquet import ParquetFile  # optional: pip install pyarrow
        file = ParquetFile(path)
        columns = [key for key in keys if key in file.schema_arrow.names]
        rows = (row for batch in file.iter_batches(1024, columns=columns)
                for row in batch.to_pylist())
        for row in rows:
            try:
                yield text_of(row)
            except LookupError:
                notes[f"row without {wanted}"] += 1
    # C4's and Dolma's files end in .json. In folders of code those are the settings of programs.
    elif (name.endswith((".jsonl", ".ndjson"))
          or name.endswith(".json") and is_json_lines(path, keys)):
        for _, text in read_lines(path, text_of, f"not JSON with {wanted}", config, notes):
            yield text
    elif name.endswith((".json", ".csv", ".tsv")):
        notes["a table or JSON, but not JSON Lines: convert it to .jsonl"] += 1
    else:
        with open_input(path) as f:
            head = f.read(8192)
            # Pictures, archives and programs have NUL bytes, and text has none.
            if b"\0" in head:
                notes["binary file"] += 1
            else:
                # read_documents replaces the lone surrogates that invalid bytes become here.
                yield (head + f.read()).decode("utf-8", "surrogateescape").removeprefix("\ufeff")


def read_lines(path: str, parse: Callable[[Any], Any], expected: str, config: Config,
               notes: Counter[str]) -> Iterator[tuple[int, Any]]:
    """(number, parse(JSON)) of the lines of a file, counted from 0. A line that is not what is
    expected, for which `parse` fails, is counted in `notes`, or ends the preparation."""
    with open_input(path) as f:
        for number, line in enumerate(f):
            text = line.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
            if not text.strip():
                continue
            try:
                value = parse(json.loads(text))
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
                if config.on_bad_line == "stop":
                    because = f"{error}; " if type(error) is ValueError else ""
                    raise UserError(f"{path}, line {number + 1}: {expected} ({because}found"
                                    f" {line[:40]!r}). --on_bad_line=skip leaves such lines out and"
                                    " counts them.")
                notes[expected] += 1
            else:
                yield number, value


def is_json_lines(path: str, keys: list[str]) -> bool:
    """Whether the first line of a file that is not blank is a document, perhaps without text."""
    try:
        _, record = next(read_lines(path, dict.copy, "", Config(), Counter()), (0, {}))
    except UserError:
        return False
    return any(isinstance(record.get(key, 0), str | None) for key in keys)


def open_input(path: str) -> BinaryIO:
    """Open a file, which may be compressed, for reading bytes."""
    if path.lower().endswith(".zst"):
        import pyarrow  # optional; the package zstandard does not tell that a file is cut off
        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"), 1 << 20)
    return gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb")


def naming(path: str, items: Iterator) -> Iterator:
    """The items of a reader; an error while reading becomes a sentence that names the file."""
    try:
        yield from items
    except UserError:
        raise
    # Every compressor and pyarrow have errors of their own, and a package may not be installed.
    except Exception as error:
        raise UserError(f"{path} cannot be read: {error or type(error).__name__}.")


# ---- documents become tokens


def from_text(work: Work, tokenizer: tk.Tokenizer, files: Files) -> dict[str, Any]:
    """Text to chunks; returns what the manifest records of them."""
    config, n = work.config, work.config.n_chunks
    # Encoding, hashing and writing release Python's lock, so that threads use all cores.
    with ThreadPoolExecutor(config.workers or os.cpu_count()) as pool:
        counts = {name: encode_source(work, tokenizer, pool, name, files[name]) for name in files}
        pieces, sources, valid = deal(work, counts)

        def write_chunk(c: int) -> dict[str, Any]:
            # Sorted by source, as Amber's: a run shuffles a chunk when it reads it.
            mine = [p._replace(numbers=p.numbers[c::n]) for p in pieces]
            return write_sequences(work, f"train/chunk_{c:03}.npy", mine)

        chunks = [*progress(pool.map(write_chunk, range(n)), "chunks", n)]
    return {"sources": sources, "chunks": chunks, "valid": valid,
            "dropped": sum((Counter(source["dropped"]) for source in sources), Counter()),
            "documents": list_documents(work, files)}


def save_tokenizer(config: Config, scratch: Path, files: Files) -> tuple[tk.Tokenizer, dict]:
    """The tokenizer that the config asks for, saved in the data set; its entry in the manifest."""
    path = scratch / "tokenizer.json"  # the entry, written once the tokenizer is saved
    if not path.exists():
        kind, _, name = config.tokenizer.partition(":")
        # A run that begins with the weights of another needs its tokenizer, as Crystal's stages do.
        if kind == "data":
            tokenizer = tk.check_tokenizer(config, data.load_data(name).tokenizer)
        else:
            tokenizer = tk.make_tokenizer(config, sample_texts(config, files))
        data.write_json(path, tokenizer.save(scratch.parent))
    entry = data.read_json(path)
    return tk.open_tokenizer(scratch.parent), entry


def sample_texts(config: Config, files: Files) -> Iterator[str]:
    """About SAMPLE characters, of each source in proportion: the beginnings of many files."""
    most = config.max_source_bytes or float("inf")
    sizes = {name: min(sum(map(os.path.getsize, paths)), most) for name, paths in files.items()}
    for name, paths in files.items():
        budget = SAMPLE * sizes[name] // max(1, sum(sizes.values()))
        for i in np.random.default_rng(config.seed).permutation(len(paths)):
            # Few files give more each than many do, and a huge one is never read whole.
            left = min(budget, max(1 << 20, SAMPLE // len(paths)))
            for text in read_documents(paths[i], config, Counter()):
                yield (part := text[:left])
                budget, left = budget - len(part), left - len(part)
                if left <= 0:
                    break
            if budget <= 0:
                break


def encode_source(work: Work, tokenizer: tk.Tokenizer, pool: ThreadPoolExecutor, name: str,
                  paths: list[str]) -> dict[str, Any]:
    """Write the tokens of a source into unfinished/NAME.tokens, those of documents held out whole
    into NAME.valid, and where each document begins into documents/NAME.npy; returns the counts."""
    train, valid, done = (work.scratch / f"{name}.{x}" for x in ("tokens", "valid", "counts"))
    if done.exists():
        return data.read_json(done)
    fim_rate, spm_rate = work.config.fim_rates.get(name, 0), work.config.fim_spm_rate
    counts, notes = {"documents": 0, "bytes": 0, "tokens": 0}, Counter()

    def encode(text: str, key: int, held_out: bool) -> np.ndarray:
        ids = tokenizer.encode(text)
        if fim_rate and not held_out:
            random = np.random.default_rng([work.config.seed, key])
            ids = fill_in_the_middle(ids, tokenizer, fim_rate, spm_rate, random)
        # One end-of-document token after each document, and nothing before it, as Amber.
        return np.append(ids, tokenizer.eos_id).astype(work.dtype["token_ids"].base)

    documents = encoded_in_order(pool, encode, choose_documents(work.config, name, paths, notes))
    before = np.cumsum([0, *map(os.path.getsize, paths)])  # bytes in the files before each
    with (data.writing(train) as train_file, data.writing(valid) as valid_file,
          writing_array(work.directory / f"documents/{name}.npy", data.DOCUMENT) as index,
          progress(None, name, before[-1], unit="B", unit_scale=True) as bar):
        for (file, number, text, _, held_out), tokens in documents:
            bar.update(before[file] - bar.n)
            if held_out:
                valid_file.write(tokens.tobytes())
                continue
            train_file.write(tokens.tobytes())
            index.write(np.array((counts["tokens"], file, number), data.DOCUMENT).tobytes())
            counts["documents"] += 1
            counts["bytes"] += len(text.encode())
            counts["tokens"] += len(tokens)
    counts |= {"repaired": notes.pop("repaired", 0), "dropped": dict(+notes)}
    data.write_json(done, counts)
    return counts


def choose_documents(config: Config, source: str, paths: list[str],
                     notes: Counter[str]) -> Iterator[tuple[int, int, str, int, bool]]:
    """(file index, document number in it from 1, text, crc32, held_out) of each document that is
    used from a source, up to max_source_bytes."""
    half, left = config.source_halves.get(source), config.max_source_bytes or float("inf")
    for file, path in enumerate(paths):
        for number, text in enumerate(read_documents(path, config, notes), 1):
            utf8 = text.encode()
            # The text of a document decides what is done with it, in all stages. The last bit of
            # the key is its half, and the other bits decide whether it is held out.
            key = zlib.crc32(utf8)
            held_out = config.valid_documents > 0 and key // 2 % config.valid_documents == 0
            if half and not held_out and half != ("even", "odd")[key % 2]:
                continue
            yield file, number, text, key, held_out
            left -= len(utf8)
            if left <= 0:
                return


def encoded_in_order(pool: ThreadPoolExecutor, encode: Callable, documents: Iterator) -> Iterator:
    """(document, its tokens) in their order, while threads encode the next ones."""
    waiting: deque = deque()
    for document in documents:
        waiting.append((document, pool.submit(encode, *document[2:])))
        if len(waiting) > 256:
            first, tokens = waiting.popleft()
            yield first, tokens.result()
    for document, tokens in waiting:
        yield document, tokens.result()


def fill_in_the_middle(ids: np.ndarray, tokenizer: tk.Tokenizer, rate: float, spm_rate: float,
                       random: np.random.Generator) -> np.ndarray:
    """A document's ids (n,), at `rate` with the middle last (n + 3,): Bavarian et al. 2022."""
    if random.random() >= rate:
        return ids
    # The cuts are between tokens and nothing is encoded anew, so that the three pieces are the
    # document, token for token. Crystal's released script encodes them, and adds spaces.
    first, second = np.sort(random.integers(len(ids) + 1, size=2))
    prefix, middle, suffix = ids[:first], ids[first:second], ids[second:]
    pre, mid, suf = ([tokenizer.specials[name]] for name in tk.FIM_TOKENS)
    # Prefix first is <PRE> prefix <SUF> suffix <MID> middle. Suffix first, in the form that shares
    # its tokens with the other (the paper's variant 2), is <PRE> <SUF> suffix <MID> prefix middle.
    if random.random() < spm_rate:
        prefix, middle = ids[:0], ids[:second]
    return np.concatenate([pre, prefix, suf, suffix, mid, middle])


def list_documents(work: Work, files: Files) -> list[dict[str, str]]:
    """Write the names of the sources' files; returns the manifest's entries of documents/."""
    folder, home = work.directory / "documents", re.escape(os.path.expanduser("~/"))
    # Equal data has equal bytes, whatever the home directory.
    shorten = functools.partial(re.sub, f"^{home}", "~/")
    names = {source: [*map(shorten, paths)] for source, paths in files.items()}
    data.write_json(folder / "files.json", names)
    return [{"file": f"documents/{path.name}", "sha256": data.sha256_file(path)}
            for path in sorted(folder.iterdir())]


# ---- sequences are dealt to chunks, and chunks are written


class Piece(NamedTuple):  # some of the sequences of a source
    source: int  # its place among the sources
    name: str
    tokens: np.ndarray  # all of its sequences (n, seq_len + 1)
    numbers: np.ndarray  # (k,) of them


def deal(work: Work, counts: dict[str, dict]) -> tuple[list[Piece], list[dict], list[dict]]:
    """Write each source's validation sequences. Returns the others, of which chunk c gets
    numbers[c :: n_chunks], and the manifest's entries of the sources and of the validation."""
    config, n, pieces, sources, validation = work.config, work.config.n_chunks, [], [], []
    for number, (name, about) in enumerate(counts.items()):
        tokens = valid_tokens = open_tokens(work, f"{name}.tokens")
        if config.valid_documents:
            valid_tokens, free = open_tokens(work, f"{name}.valid"), np.arange(len(tokens))
            there, needed = len(valid_tokens), min(1, config.valid_sequences)
            valid = evenly(np.arange(there), min(there, config.valid_sequences))
        else:
            # Drawn from all of it: the last files of a source may be unlike the first.
            there, needed = len(tokens), config.valid_sequences
            random = np.random.default_rng([config.seed, number])
            valid = np.sort(random.choice(there, min(there, needed), replace=False))
            free = np.delete(np.arange(there), valid)
        # A weight of 2.5 is all twice, then half of them.
        weight = config.source_weights.get(name, 1)
        dealt = np.append(np.tile(free, int(weight)), evenly(free, round(weight % 1 * len(free))))
        if there < needed or weight and len(dealt) < n:
            raise UserError(f"Source {name!r} is too small for n_chunks = {n} or valid_sequences ="
                            f" {config.valid_sequences}: there are {len(dealt)} sequences to train"
                            f" on, {there} for validation. It has {about}.")
        sources.append({"name": name, "weight": weight, **about, "sequences": len(tokens),
                        "tail_tokens": about["tokens"] - tokens.size})
        pieces.append(Piece(number, name, tokens, dealt))
        if config.valid_sequences:
            held = [Piece(number, name, valid_tokens, valid)]
            validation.append(write_sequences(work, f"valid/{name}.npy", held) | {"source": name})
    # Every chunk gets the same of every source, as in Amber; what does not divide is left out.
    shares = [len(piece.numbers) // n for piece in pieces]
    if not any(shares):
        raise UserError("source_weights leave nothing to train on: one must be above 0.")
    kept = apportion(shares, config.sequences_per_chunk)
    pieces = [piece._replace(numbers=evenly(piece.numbers[: n * share], n * k))
              for piece, share, k in zip(pieces, shares, kept)]
    return pieces, sources, validation


def open_tokens(work: Work, file: str) -> np.ndarray:
    """A token file as sequences (n, seq_len + 1), memory-mapped; tokens left over are not used."""
    path, ids = work.scratch / file, work.dtype["token_ids"]
    n = path.stat().st_size // ids.itemsize  # what is empty cannot be mapped
    return np.memmap(path, ids.base, "r", shape=(n, *ids.shape)) if n else np.empty((0, *ids.shape))


def evenly(items: np.ndarray, n: int) -> np.ndarray:
    """n of the items, evenly spaced."""
    return items[np.arange(n) * len(items) // max(1, n)]


def apportion(counts: list[int], cap: int) -> list[int]:
    """Counts cut to `cap` in all, each in proportion (largest remainder); 0 = no cap."""
    total = sum(counts)
    if not cap or total <= cap:
        return counts
    cut = [n * cap // total for n in counts]
    by_remainder = sorted(range(len(counts)), key=lambda i: counts[i] * cap % total, reverse=True)
    for i in by_remainder[:cap - sum(cut)]:
        cut[i] += 1
    return cut


def write_sequences(work: Work, file: str, pieces: list[Piece]) -> dict[str, Any]:
    """Write a .npy of sequences, unless it is there; returns its entry in the manifest."""
    path = work.directory / file
    if not path.exists():
        with writing_array(path, work.dtype) as f:
            for source, _, tokens, numbers in pieces:
                for at in np.array_split(numbers, len(numbers) // BLOCK + 1):
                    block = np.empty(len(at), work.dtype)
                    block["source"], block["number"], block["token_ids"] = source, at, tokens[at]
                    f.write(block.tobytes())
    shares = {piece.name: len(piece.numbers) for piece in pieces}
    return {"file": file, "sequences": sum(shares.values()), "sha256": data.sha256_file(path),
            "sources": shares}


@contextlib.contextmanager
def writing_array(path: Path, dtype: np.dtype) -> Iterator[BinaryIO]:
    """Write a .npy whose records are written as bytes, and whose length is known at the end."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
    path.parent.mkdir(exist_ok=True)
    # Not through a memory map, where a full disk is a crash and not an error.
    with data.writing(path) as f:
        np.lib.format.write_array_header_1_0(f, header | {"shape": (0,)})
        begin = f.tell()
        yield f
        n = (f.tell() - begin) // dtype.itemsize
        # NumPy pads headers, so that one with another length has the same size.
        f.seek(0)
        np.lib.format.write_array_header_1_0(f, header | {"shape": (n,)})


# ---- chunks that LLM360 released: a file of lines {"token_ids": [...], "source": ...} for each


def from_released(work: Work, tokenizer: tk.Tokenizer, files: Files) -> dict[str, Any]:
    """Released files to chunks, each in one pass; returns what the manifest records of them."""
    config, n = work.config, len(files["train"])
    jobs = [(path, f"train/chunk_{i:03}.npy", config.sequences_per_chunk)
            for i, path in enumerate(files["train"])]
    jobs += [(path, f"unfinished/valid_{i:03}.npy", 0) for i, path in enumerate(files["valid"])]
    # The sources are those of the first file, numbered as they first appear in it.
    first = convert_released(work, tokenizer.n_vocab, [], jobs[0])
    names = list(first["read"])
    convert = functools.partial(convert_released, work, tokenizer.n_vocab, names)
    results = [first, *in_processes(config.workers or os.cpu_count(), convert, jobs[1:])]
    sources, valid, valid_files = [], [], [work.directory / file for _, file, _ in jobs[n:]]
    for number, name in enumerate(names):
        there = sum(result["read"][name] for result in results)
        sources.append({"name": name, "sequences": there, "tokens": there * (config.seq_len + 1)})
        if any(result["read"][name] for result in results[n:]):
            path = work.directory / f"valid/{name}.npy"
            [n_valid] = choose_released(valid_files, [number], config.valid_sequences, path)
            valid.append({"file": f"valid/{name}.npy", "sequences": n_valid, "source": name,
                          "sha256": data.sha256_file(path)})
    return {"sources": sources, "chunks": [result["entry"] for result in results[:n]],
            "valid": valid, "documents": [],
            "dropped": sum((Counter(result["dropped"]) for result in results), Counter())}


def convert_released(work: Work, n_vocab: int, names: list[str],
                     job: tuple[str, str, int]) -> dict[str, Any]:
    """Write the sequences of a released file as a .npy, `cap` of them at most (0 = all); returns
    the counts and its entry in the manifest. names: the sources; [] = those of this file."""
    path, file, cap = job
    out, done = work.directory / file, work.scratch / f"{Path(file).stem}.json"
    everything = work.scratch / f"{Path(file).stem}.npy" if cap else out
    if done.exists():
        return data.read_json(done)
    counts, dropped = dict.fromkeys(names, 0), Counter()
    width = work.config.seq_len + 1

    def parse(record: dict[str, Any]) -> tuple[list[int], str]:
        ids, source = record["token_ids"], record["source"]
        if len(ids) != width:
            raise ValueError(f"it has {len(ids)} token_ids")
        if set(map(type, ids)) != {int} or not 0 <= min(ids) <= max(ids) < n_vocab:
            raise ValueError("one of its token_ids is no such number")
        if not isinstance(source, str):
            raise ValueError("its source is not a string")
        return ids, source

    expected = f"not JSON with token_ids, {width} numbers below {n_vocab}, and a source"
    lines = naming(path, read_lines(path, parse, expected, work.config, dropped))
    with writing_array(everything, work.dtype) as f:
        for number, (ids, source) in lines:
            if source not in counts:
                check_name(source)
                if names or len(counts) == 256:
                    raise UserError(f"{path}, line {number + 1}: the source {source!r} is not one"
                                    f" of the first file's (256 at most), {[*counts][:9]}.")
            counts[source] = counts.get(source, 0) + 1
            f.write(np.array(([*counts].index(source), number, ids), work.dtype).tobytes())
    kept = list(counts.values())
    if not sum(kept):
        raise UserError(f"{path} has no line that is a sequence.")
    if cap:
        kept = choose_released([everything], [*range(len(counts))], cap, out)
        everything.unlink()
    # A chunk is known by the name that LLM360 gave it, whatever part of Amber the data set is.
    entry = {"file": file, "sequences": sum(kept), "sha256": data.sha256_file(out),
             "sources": dict(zip(counts, kept)), "made_from": os.path.basename(path).split(".")[0]}
    data.write_json(done, {"read": counts, "dropped": dropped, "entry": entry})
    return data.read_json(done)


def choose_released(files: list[Path], wanted: list[int], cap: int, out: Path) -> list[int]:
    """Copy the sequences of the sources `wanted`, `cap` at most (0 = all); returns their counts."""
    arrays = [np.load(file, mmap_mode="r") for file in files]
    sequences = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    there = [np.flatnonzero(sequences["source"] == source) for source in wanted]
    kept = apportion([len(numbers) for numbers in there], cap)
    # Evenly, since released files are sorted by source: their first lines are all of one.
    chosen = np.sort(np.concatenate([evenly(numbers, n) for numbers, n in zip(there, kept)]))
    with writing_array(out, sequences.dtype) as f:
        for some in np.array_split(chosen, len(chosen) // BLOCK + 1):
            f.write(sequences[some].tobytes())
    return kept


def in_processes(workers: int, job: Callable[[Any], Any], arguments: list) -> list[Any]:
    """job(argument) of every argument, in worker processes; the results in their order."""
    if min(workers, len(arguments)) <= 1:
        return [job(argument) for argument in progress(arguments, "files")]
    # Not multiprocessing.Pool, which waits for ever when a worker is killed.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker) as pool:
        try:
            # In their order, so that of several errors always the same one is reported.
            return [*progress(pool.map(job, arguments), "files", len(arguments))]
        except BaseException:
            # Otherwise leaving this block would wait until each worker has finished its file.
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def start_worker() -> None:
    """What each worker does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()
    # A killed parent cannot end its workers, so each of them waits for its end.
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# ---- what goes in, and where the data set is made


def find_inputs(config: Config, passed: dict[str, str]) -> Files:
    """The files of each source, or the released ones as "train" and "valid"."""
    if config.tokenized:
        if config.tokenizer == "bpe":
            raise UserError('tokenizer = "bpe" is for text: tokenized chunks need "hf:PATH".')
        train = find_files(config.tokenized, passed)
        if len(train) < config.n_chunks:
            raise UserError(f"tokenized: {config.tokenized} matches {len(train)} files, each for a"
                            f" chunk: take --n_chunks={len(train)} at most.")
        valid = find_files(config.tokenized_valid, passed) if config.tokenized_valid else []
        return {"train": train[:config.n_chunks], "valid": valid}
    if not config.sources:
        raise UserError("The config names no text: set sources = {'name': 'path or glob'}.")
    for setting in ("sources", "source_weights", "source_halves", "fim_rates"):
        for name in getattr(config, setting):
            if name not in config.sources:
                raise UserError(f"{setting} names {name!r}, but the sources are"
                                f" {', '.join(config.sources)}.")
            check_name(name)
    return {name: find_files(place, passed) for name, place in config.sources.items()}


def check_name(name: str) -> None:
    """UserError if this cannot be the name of a source, and so of its files."""
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise UserError(f"{name!r} cannot name a source, for it names a file too: use letters,"
                        " digits and . _ + -")


def begin(config: Config, files: Files, scratch: Path) -> BinaryIO:
    """Make data/NAME/unfinished, or clear it if it was begun with other settings or inputs; returns
    a lock on it. UserError if data/NAME holds other files, or another process works in it."""
    directory = scratch.parent
    ours = (scratch / "lock").exists() and not any(p.is_symlink() for p in directory.rglob("*"))
    if not ours and any(path.is_symlink() or not path.is_dir() for path in directory.rglob("*")):
        raise UserError(f"{directory} exists, but has no manifest.json: it is not a data set."
                        " Delete it, or choose another place with --data_dir.")
    lock = data.lock_directory(scratch)
    if (directory / "manifest.json").exists():
        raise UserError(f"Another process has just finished {directory}.")
    inputs, (kind, _, name) = sum(files.values(), []), config.tokenizer.partition(":")
    if kind in ("hf", "data"):  # name: of a file, or of a directory that has the tokenizer
        folder = Path(name) if os.path.isdir(name) else Path(name).parent
        inputs += sorted(map(str, folder.glob("*.json")))
    # Size and time stand for the content of a file: to read all of them would take too long.
    stats = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in inputs]
    key = {"key": data.sha256_json([data.FORMAT, data.data_settings(config), stats])}
    if data.read_json(scratch / "key.json") == key:
        print(f"Continuing {directory}, which was begun before.")
        return lock
    # The old key goes first: if this is killed, what is left must not be taken for finished work.
    (scratch / "key.json").unlink(missing_ok=True)
    for path in (*scratch.iterdir(), *(directory / d for d in ("train", "valid", "documents"))):
        if path.name != "lock":
            data.remove(path)
    data.write_json(scratch / "key.json", key)
    return lock


def summary(config: Config, there: data.Data) -> str:
    """A data set in one sentence, and in another what of the text is not in it."""
    m, batch = there.manifest, config.global_batch_size
    n, n_valid = (sum(file["sequences"] for file in m[key]) for key in ("chunks", "valid"))
    shares = ", ".join(f"{s['name']} {s['train_sequences'] / n:.1%}" for s in m["sources"])
    sentence = (f"{there.directory} has {n:,} sequences of {there.seq_len} + 1 tokens in"
                f" {len(m['chunks'])} chunks and {n_valid:,} for validation; {shares}; tokenizer"
                f" {m['tokenizer']['kind']} with {there.n_vocab:,} ids.")
    notes = Counter(m["dropped"])
    notes["repaired text"] = sum(source.get("repaired", 0) for source in m["sources"])
    notes[f"sequence left over by steps of {batch}"] = n - batch * sum(there.steps_per_chunk(batch))
    told = ", ".join(f"{times:,} x {reason}" for reason, times in notes.items() if times)
    return sentence + (f"\nNot used, or repaired: {told}." if told else "")


if __name__ == "__main__":
    run_command(main)
