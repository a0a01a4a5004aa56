"""Raw text to the data set a run trains on: tokens in chunks, held-out rows, and a manifest.

    python prepare_data.py configs/amber_tiny.py                  # seconds; no download
    python prepare_data.py configs/amber_125m.py --workers=8      # your text: `sources` in the config
    torchrun --nnodes=4 prepare_data.py configs/amber_7b.py       # several machines, one file system
    python prepare_data.py configs/amber_tiny.py --show_step=100  # what optimizer step 100 reads
    python prepare_data.py configs/amber_tiny.py --verify         # every file against its sha256

Written to data/NAME (DESIGN.md, "Formats"): train/chunk_000.npy ..., valid/SOURCE.npy, the tokenizer
and, last of all, manifest.json. A run that was stopped goes on where it was when started again, and
the bytes are the same whatever the number of workers and machines. This file knows nothing of torch.
"""

import base64
import contextlib
import errno
import functools
import glob
import gzip
import hashlib
import heapq
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import struct
import sys
import sysconfig
import threading
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import regex  # comes with tiktoken: \p{L} is not in the standard library's re
import tiktoken
from tqdm import tqdm

from configs import Config, load

VERSION = 1  # of the format
# the settings that decide the bytes of a data set; the manifest keeps them
SETTINGS = """sources source_weights max_source_bytes tokenized tokenized_valid on_bad_row tokenizer
    vocab_size seq_len n_chunks rows_per_chunk valid_rows seed""".split()
BLOCK = 4096  # rows gathered at a time: 16 MB at Amber's length
UNIT_BYTES = 16 << 20  # small files are read together until they make a unit of work this large
SAMPLE_BYTES = 10 << 20  # of text, to train a tokenizer on
PATIENCE = 6 * 3600  # seconds one rank waits for a unit of work of another


# ---- tokenizers: text to ids and back, all on tiktoken

# One digit at a time as LLaMA, a word with the space before it, no look-ahead: 30 % faster than
# GPT-4's pattern and within 2 % of its compression at small vocabularies.
BPE_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+"
LLAMA_PATTERN = r" *\p{L}+| *[^ \p{L}\p{Nd}\n]+|\p{Nd}|\n| +"
EOT = "<|endoftext|>"


class Tokenizer:
    """A byte-level BPE: ours ("bpe"), or one of tiktoken's named encodings.

    ranks: bytes -> id, in order of merging; specials: name -> id, never produced from text.
    eos_id, n_vocab (largest id + 1), token_bytes: (n_vocab,) UTF-8 bytes of each id, specials 0.
    """

    def __init__(self, kind: str, ranks: dict[bytes, int], pattern: str, specials: dict[str, int]):
        self.kind, self.pattern, self.specials, self.ranks = kind, pattern, specials, ranks
        self.core = tiktoken.Encoding(kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.index(specials[EOT], {i: piece for piece, i in ranks.items()})

    def index(self, eos_id: int, pieces: dict[int, bytes]) -> None:
        self.eos_id = eos_id
        self.n_vocab = 1 + max(*pieces, *self.specials.values())
        self.token_bytes = np.zeros(self.n_vocab, np.int64)
        for i, piece in pieces.items():
            self.token_bytes[i] = len(piece)
        self.pieces = pieces | {i: name.encode() for name, i in self.specials.items()}

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, (n,) uint32, without BOS or EOS; special names are ordinary text."""
        return self.core.encode_to_numpy(repair(text), disallowed_special=())

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; never raises: half a character or an unknown id becomes U+FFFD."""
        pieces = (self.pieces.get(int(i), b"\xff") for i in ids)
        return b"".join(pieces).decode("utf-8", "replace")

    def save(self, directory: Path) -> dict[str, Any]:
        """Write the tokenizer's file; returns what the manifest says of it."""
        file = self.write(directory)
        return {"kind": self.kind, "file": file, "sha256": sha256(directory / file),
                "n_vocab": self.n_vocab, "eos_id": self.eos_id, "bos_id": None,
                "rule": "no BOS; one EOS after every document",
                "pattern": self.pattern, "specials": self.specials}

    def write(self, directory: Path) -> str:
        lines = [base64.b64encode(piece) + b" %d\n" % rank for piece, rank in self.ranks.items()]
        (directory / "tokenizer.tiktoken").write_bytes(b"".join(lines))
        return "tokenizer.tiktoken"


class LlamaTokenizer(Tokenizer):
    """LLaMA's tokenizer, exactly, from Hugging Face's tokenizer.json or sentencepiece's .model.

    Sentencepiece merges the neighbours whose union has the best score, leftmost first: tiktoken's
    rule, once pieces are ranked by score and U+2581 is a plain space. tiktoken begins with bytes
    where sentencepiece begins with characters, so first come the beginnings of the vocabulary's
    characters and the characters; a beginning left over is spelled as its bytes, <0xNN>.
    Raises SystemExit when the file lacks a property that this needs.
    """

    def __init__(self, path: str):
        self.path, self.kind, self.pattern = path, "llama", LLAMA_PATTERN
        read = read_tokenizer_json if path.endswith(".json") else read_sentencepiece
        vocab, order, added = read(path)  # piece -> id; pieces in order of merging; added tokens
        self.specials = {name: i for name, i, _ in added}
        text = {p.replace("\u2581", " "): i for p, i in vocab.items() if p}
        odd = [p for p in text if len(p) > 1 and p not in self.specials
               and not re.fullmatch("<0x..>", p) and not regex.fullmatch(LLAMA_PATTERN, p)]
        spelled = [vocab.get(f"<0x{b:02X}>") for b in range(256)]
        if odd or None in spelled or "</s>" not in self.specials:
            wrong = (f"the piece {odd[0]!r} crosses a cut of LLaMA's pattern" if odd else
                     "it has no </s>" if None not in spelled else "it has no byte pieces <0xNN>")
            raise SystemExit(f"{path} is not a LLaMA tokenizer: {wrong}. Only tokenizers built as"
                             " LLaMA's can be run exactly; see NOTES-data.md section 3.")
        chars = [p.encode() for p in text if len(p) == 1 and len(p.encode()) > 1]
        starts = {c[:n] for c in chars for n in range(2, len(c))}
        merged = [p.replace("\u2581", " ") for p in order]
        # runs of spaces share the worst score: the longest wins, after every other piece
        merged.sort(key=lambda p: len(p) * -1 if not p.strip(" ") else -math.inf)
        pieces = [bytes([b]) for b in range(256)]
        pieces += sorted(starts, key=lambda s: (len(s), s)) + chars + [p.encode() for p in merged]
        self.core = tiktoken.Encoding("llama", pat_str=LLAMA_PATTERN, special_tokens={},
                                      mergeable_ranks={p: rank for rank, p in enumerate(pieces)})
        known = {p.encode(): i for p, i in text.items()}
        # rank -> up to 3 ids
        self.width = np.array([len(p) if p in starts else 1 for p in pieces])
        self.ids = np.zeros((len(pieces), 3), np.uint32)
        for rank, p in enumerate(pieces):
            ids = [known[p]] if p in known else [spelled[b] for b in p]
            self.ids[rank, :len(ids)] = ids
        self.raw, self.normal = (added_regex(added, normalized) for normalized in (False, True))
        table = {i: p.encode() for p, i in text.items() if p not in self.specials}
        self.index(self.specials["</s>"], table | {i: bytes([b]) for b, i in enumerate(spelled)})

    def encode(self, text: str) -> np.ndarray:
        """The ids of Hugging Face's LlamaTokenizerFast without BOS, (n,) uint32: added tokens in
        the text are recognised where it recognises them (" </s>", but not "a</s>")."""
        ids: list[Any] = [np.empty(0, np.uint32)]
        for k, part in enumerate(self.raw.split(repair(text)) if self.raw else [repair(text)]):
            if k % 2:
                ids.append([self.specials[part]])
            elif part:
                part = " " + part.replace("\u2581", " ")
                for j, piece in enumerate(self.normal.split(part) if self.normal else [part]):
                    ids.append([self.specials[piece[1:]]] if j % 2 else self.encode_piece(piece))
        return np.concatenate(ids, dtype=np.uint32, casting="unsafe")

    def encode_piece(self, text: str) -> np.ndarray:
        ranks = self.core.encode_to_numpy(text, disallowed_special=())
        width = self.width[ranks]
        if len(ranks) == width.sum():
            return self.ids[ranks, 0]
        column = np.arange(width.sum()) - np.repeat(np.cumsum(width) - width, width)
        return self.ids[np.repeat(ranks, width), column]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without the space that `encode` put before it; never raises."""
        return super().decode(ids).removeprefix(" ")

    def write(self, directory: Path) -> str:
        file = "tokenizer" + Path(self.path).suffix
        shutil.copyfile(self.path, directory / file)
        return file


def added_regex(added: list, normalized: bool) -> re.Pattern | None:
    """Finds added tokens: before the text is normalized, or after (then a space precedes them)."""
    names = [" " * normalized + name for name, _, kind in added if kind == normalized]
    names.sort(key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None


def read_tokenizer_json(path: str) -> tuple[dict[str, int], list[str], list]:
    """(piece -> id, pieces in order of merging, added tokens) of a Hugging Face tokenizer.json."""
    try:
        data = json.loads(Path(path).read_bytes())
        model, steps = data["model"], (data.get("normalizer") or {}).get("normalizers") or []
        normal = [(s["type"], s.get("prepend") or s.get("content")) for s in steps]
        vocab, added = model["vocab"], data["added_tokens"]
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        order = dict.fromkeys("".join(m) for m in merges)
    except (ValueError, TypeError, KeyError):
        raise SystemExit(f"{path} is not a tokenizer.json of a BPE tokenizer.") from None
    stripping = [t["content"] for t in added if t["lstrip"] or t["rstrip"] or t["single_word"]]
    names = {t["content"] for t in added}
    splits = sum(p[:n] in vocab and p[n:] in vocab for p in vocab if p not in names
                 for n in range(1, len(p)))
    wrong = ("its model is not BPE with byte_fallback" if not model.get("byte_fallback") else
             "its normalizer is not Prepend and Replace" if
             normal != [("Prepend", "\u2581"), ("Replace", "\u2581")] else
             "it has a pre_tokenizer" if data.get("pre_tokenizer") else
             f"the added token {stripping[0]!r} strips its neighbours" if stripping else
             "its merges are not all the splits of its pieces" if splits != len(merges) else "")
    if wrong:
        raise SystemExit(f"{path} is not built as LLaMA's tokenizer.json: {wrong}.")
    return vocab, list(order), [(t["content"], t["id"], t["normalized"]) for t in added]


def read_sentencepiece(path: str) -> tuple[dict[str, int], list[str], list]:
    """The same of a sentencepiece .model, a protocol buffer (sentencepiece_model.proto)."""
    def fields(data: bytes) -> Iterator[tuple[int, Any]]:
        at = 0

        def varint() -> int:
            nonlocal at
            value = shift = 0
            while True:
                byte = data[at]
                at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
                if byte < 128:
                    return value
        while at < len(data):
            key = varint()
            size = {1: 8, 5: 4}[key & 7] if key & 7 in (1, 5) else varint()
            if key & 7 == 0:
                yield key >> 3, size
            else:
                yield key >> 3, data[at:at + size]
                at += size

    vocab, scores, kinds = {}, {}, {}
    trainer, normal = {}, {}
    try:
        for field, value in fields(Path(path).read_bytes()):
            if field == 1:
                piece = dict(fields(value))
                name = piece[1].decode()
                kinds[name], vocab[name] = piece.get(3, 1), len(vocab)
                scores[name] = struct.unpack("<f", piece.get(2, bytes(4)))[0]
            elif field in (2, 3):
                (trainer if field == 2 else normal).update(fields(value))
    except (IndexError, KeyError, UnicodeDecodeError, struct.error):
        raise SystemExit(f"{path} is not a sentencepiece model (nor a tokenizer.json).") from None
    wrong = ("it is not BPE" if trainer.get(3) != 2 else
             "it normalizes the text" if normal.get(2) or normal.get(4, 1) else
             "it adds no dummy prefix" if not normal.get(3, 1) else
             "it has user-defined pieces" if 4 in kinds.values() else "")
    if wrong:
        raise SystemExit(f"{path} is not built as LLaMA's tokenizer.model: {wrong}.")
    merged = [p for p, kind in kinds.items() if kind == 1 and len(p) > 1]
    merged.sort(key=lambda p: -scores[p])
    # sentencepiece never finds control pieces in a text: None is neither raw nor normalized
    return vocab, merged, [(p, vocab[p], None) for p, kind in kinds.items() if kind in (2, 3)]


def train_bpe(texts: Iterable[str], size: int) -> dict[bytes, int]:
    """Byte-level BPE: the `size` tokens that merging the commonest pair again and again gives.

    Pieces of the text are counted once; a merge touches only the words that contain its pair.
    Ties go to the smaller ids, so the result depends on nothing but the text.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(regex.findall(BPE_PATTERN, text))
    # a piece of megabytes would be rewritten by every merge; its first 200 characters say enough
    words = [list(piece[:200].encode()) for piece in counts]
    often = list(counts.values())
    pairs: Counter[tuple[int, int]] = Counter()
    where: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for w, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += often[w]
            where[pair].add(w)
    tokens = [bytes([b]) for b in range(256)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    while len(tokens) < size and heap:
        n, pair = heapq.heappop(heap)
        if -n != pairs[pair]:  # counted before other merges changed it: back with the right number
            if pairs[pair] > 0:
                heapq.heappush(heap, (-pairs[pair], pair))
            continue
        union = tokens[pair[0]] + tokens[pair[1]]
        new = ranks.setdefault(union, len(tokens))  # (a, bc) and (ab, c) are one token
        if new == len(tokens):
            tokens.append(union)
        grown = set()
        for w in where.pop(pair):
            old = words[w]
            words[w] = word = merge(old, pair, new)
            for p in zip(old, old[1:]):
                pairs[p] -= often[w]
            for p in zip(word, word[1:]):
                pairs[p] += often[w]
                if new in p:
                    where[p].add(w)
                    grown.add(p)
        heap_push = [(-pairs[p], p) for p in grown]
        for item in heap_push:
            heapq.heappush(heap, item)
    return ranks


def merge(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    out, i = [], 0
    while i < len(word):
        if i + 1 < len(word) and word[i] == pair[0] and word[i + 1] == pair[1]:
            out.append(new)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return out


def new_tokenizer(config: Config, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer the config asks for; `texts` is read only to train one."""
    kind, _, name = config.tokenizer.partition(":")
    if kind == "llama":
        if not os.path.isfile(name):
            raise SystemExit(f"tokenizer: there is no file {name}; give llama:PATH of LLaMA's"
                             " tokenizer.json or tokenizer.model.")
        tokenizer = LlamaTokenizer(name)
    elif kind == "tiktoken":
        try:
            named = tiktoken.get_encoding(name)
        except ValueError:
            raise SystemExit(f"tokenizer: tiktoken has no encoding {name!r}; it has"
                             f" {', '.join(tiktoken.list_encoding_names())}.") from None
        except OSError as error:  # requests' exceptions are OSErrors
            raise SystemExit(f"tokenizer: tiktoken cannot download {name!r} ({type(error).__name__});"
                             ' without a network use "bpe" or "llama:PATH".') from None
        tokenizer = Tokenizer(config.tokenizer, named._mergeable_ranks, named._pat_str,
                              named._special_tokens)
    else:
        if config.vocab_size < 257:
            raise SystemExit(f"vocab_size is {config.vocab_size}, but a byte-level tokenizer needs"
                             " 257 or more: 256 bytes and the end of a document.")
        ranks = train_bpe(texts, config.vocab_size - 1)
        tokenizer = Tokenizer("bpe", ranks, BPE_PATTERN, {EOT: len(ranks)})
    if tokenizer.n_vocab > config.vocab_size:
        raise SystemExit(f"vocab_size is {config.vocab_size}, but the tokenizer {config.tokenizer}"
                         f" has {tokenizer.n_vocab} ids: set vocab_size to at least that.")
    return tokenizer


@functools.lru_cache(maxsize=4)
def read_tokenizer(directory: Path, info: str) -> Tokenizer:
    """A saved tokenizer; info: the manifest's entry as JSON."""
    entry = json.loads(info)
    path = directory / entry["file"]
    if path.suffix != ".tiktoken":
        return LlamaTokenizer(str(path))
    # not tiktoken's own loader: it caches by path, and would return a tokenizer trained before
    lines = (line.split() for line in path.read_bytes().splitlines())
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in lines}
    return Tokenizer(entry["kind"], ranks, entry["pattern"], entry["specials"])


# ---- readers: files to documents


def repair(text: str) -> str:
    """The text with what UTF-8 cannot say (lone surrogates) replaced by U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def find_files(source: str, pattern: str) -> tuple[list[str], Counter]:
    """Files of a path, glob or directory, sorted, and how many were passed over, by reason."""
    found, skipped = sorted(glob.glob(os.path.expanduser(pattern), recursive=True)), Counter()
    files: dict[str, None] = {}
    for path in found:
        if not os.path.isdir(path):
            files[path] = None
            continue
        for folder, folders, names in os.walk(path):
            skipped["hidden file or folder"] += sum(n.startswith(".") for n in folders + names)
            folders[:] = sorted(n for n in folders if not n.startswith("."))
            files |= dict.fromkeys(os.path.join(folder, n) for n in sorted(names) if n[0] != ".")
    if not files:
        what = "no file in the folder" if found else "no file matches"
        raise SystemExit(f"source {source!r}: {what} {pattern}.")
    return list(files), skipped


def open_stream(raw: BinaryIO, path: str) -> BinaryIO:
    """The uncompressed bytes of an open .gz, .zst or plain file."""
    if path.endswith(".gz"):
        return gzip.open(raw)
    if path.endswith(".zst"):
        reader = optional("zstandard").ZstdDecompressor().stream_reader(
            raw, read_across_frames=True, closefd=False)
        return io.BufferedReader(reader, 1 << 20)
    return raw


def optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise SystemExit(f"this input needs {module}: pip install {module.split('.')[0]}") from None


def read_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of a JSONL file."""
    done = 0
    with open(path, "rb") as raw:
        for number, line in enumerate(open_stream(raw, path), 1):
            if raw.tell() - done > 1 << 20:
                report(raw.tell() - done)
                done = raw.tell()
            yield number, line
        report(raw.tell() - done)


def read_documents(path: str, on_bad_row: str, notes: Counter) -> Iterator[str]:
    """The documents of a file, valid and not empty; `notes` counts by reason what was not taken."""
    name = re.sub(r"\.(gz|zst)$", "", path.lower())
    if name.endswith((".jsonl", ".ndjson")):
        texts = read_jsonl(path, on_bad_row, notes)
    elif name.endswith(".parquet"):
        texts = read_parquet(path, notes)
    else:
        texts = read_text(path, notes)
    for text in naming(path, texts):
        sound = repair(text)
        notes["repaired"] += sound is not text
        if sound:
            yield sound
        else:
            notes["empty document"] += 1


def naming(path: str, items: Iterator) -> Iterator:
    """What a reader gives, its errors as a sentence: every decompressor has its own kinds."""
    try:
        yield from items
    except Exception as error:
        raise SystemExit(f"{path}: cannot be read: {error or type(error).__name__}.") from None


def read_text(path: str, notes: Counter) -> Iterator[str]:
    with open(path, "rb") as raw:
        stream = open_stream(raw, path)
        head = stream.read(8192)
        if b"\0" in head:  # no text format has it, every binary one does
            notes["binary file"] += 1
        else:
            # surrogateescape: invalid bytes become lone surrogates, which `repair` replaces
            yield (head + stream.read()).decode("utf-8", "surrogateescape").removeprefix("\ufeff")
        report(os.path.getsize(path))


def read_jsonl(path: str, on_bad_row: str, notes: Counter) -> Iterator[str]:
    for number, line in read_lines(path):
        try:
            row = json.loads(line.decode("utf-8", "surrogateescape"))
        except (ValueError, RecursionError):
            bad_row(path, number, "not JSON", line[:40], on_bad_row, notes)
            continue
        text = (row.get("text", row.get("content")) if isinstance(row, dict) else None)
        if isinstance(text, str):
            yield text
        else:
            bad_row(path, number, 'no string "text" or "content"', line[:40], on_bad_row, notes)


def read_parquet(path: str, notes: Counter) -> Iterator[str]:
    file = optional("pyarrow.parquet").ParquetFile(path)
    column = next((n for n in ("text", "content") if n in file.schema_arrow.names), None)
    if column is None:
        raise SystemExit(f"{path} has no column text or content, but"
                         f" {', '.join(file.schema_arrow.names)}.")
    for batch in file.iter_batches(1024, columns=[column]):
        report(os.path.getsize(path) * batch.num_rows // max(1, file.metadata.num_rows))
        for text in batch.column(0).to_pylist():
            if isinstance(text, str):
                yield text
            else:
                notes[f"no string in {column}"] += 1


def bad_row(path: str, number: int, reason: str, found: Any, policy: str, notes: Counter) -> None:
    """Count a bad row, or stop."""
    if policy == "stop":
        raise SystemExit(f"{path}, line {number}: {reason} (found {found!r})."
                         " --on_bad_row=skip leaves such rows out and counts them.")
    notes[reason] += 1


# ---- the embedded corpus: text that every installation of this repository carries

# Stand-ins for Amber's seven sources, and the bytes taken of each: 30 % code as in Amber's mix
# (23 %), the rest English. "book" is the longest docstrings: the .txt files of Python's IDLE would
# be nearer, but Debian and conda leave them out. "wikipedia" is Python's language reference, "c4"
# the READMEs and licences of packages: thin, honest, and there.
CORPUS = {"starcoder": 3_800_000, "stackexchange": 2_900_000, "refinedweb": 3_300_000,
          "arxiv": 1_200_000, "c4": 350_000, "wikipedia": 450_000, "book": 350_000}
# only what requirements.txt always brings, so that the data is the same with and without anything else
PACKAGES = """numpy torch sympy networkx mpmath jinja2 markupsafe fsspec filelock tqdm tiktoken regex
    requests urllib3 idna certifi charset-normalizer typing_extensions""".split()
# tests and IDLE are absent in some distributions; the others are tables, or not English
SKIP_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "lib2to3",
                "pydoc_data", "_vendor", "__pycache__"}
DOCSTRING = re.compile(r':\n\s+[rR]?"""(.+?)"""|add_docstr\([^"]{,200}?[rR]?"""(.+?)"""', re.S)
GENERATED = re.compile(r"generated (by|from|with|automatically)|auto-?generated|do not edit", re.I)


def write_corpus(plan: "Plan", _: Any) -> dict[str, Any]:
    """Extract the embedded corpus to work/corpus/SOURCE.jsonl; returns bytes by source."""
    texts: dict[str, list[str]] = {name: [] for name in CORPUS}
    size: Counter[str] = Counter()
    seen: set[str] = set()

    def take(source: str, text: str, least: int) -> None:
        """Keep a document without the paragraphs that came before (licences, parameters)."""
        if size[source] < CORPUS[source]:
            parts = [(" ".join(p.split()), p) for p in text.split("\n\n")]
            fresh = [p for key, p in parts if len(key) < 60 or not (key in seen or seen.add(key))]
            text = "\n\n".join(fresh).strip() + "\n"
            whole = " ".join(text.split())
            if len(text) >= least and whole not in seen:
                seen.add(whole)
                texts[source].append(text)
                size[source] += len(text.encode())

    for text in package_texts():
        take("c4", text, 200)
    for _, text in sorted(python_topics().items()):
        take("wikipedia", text, 1)
    for key, path in python_files():
        if all(size[s] >= CORPUS[s] for s in CORPUS if s not in ("c4", "wikipedia")):
            break
        code = path.read_text(encoding="utf-8", errors="replace")
        # a file gives either its code or its docstrings, so that no text is in two sources
        if key % 8 == 0:
            if 500 < len(code) < 150_000 and not GENERATED.search(code[:2000]) and not table(code):
                take("starcoder", code, 500)
            continue
        for match in DOCSTRING.finditer(code):
            text = inspect.cleandoc(match[1] or match[2])
            source = ("arxiv" if ":math:" in text or "$" in text else
                      "stackexchange" if ">>>" in text else
                      "book" if len(text) > 3000 else "refinedweb")
            take(source, text, 200)
    for source, documents in texts.items():
        with writing(plan, plan.work / "corpus" / f"{source}.jsonl") as file:
            file.writelines(json.dumps({"text": t}).encode() + b"\n" for t in documents)
    return {name: size[name] for name in CORPUS if size[name]}


def python_files() -> list[tuple[int, Path]]:
    """Python files of the standard library and of PACKAGES, in an order that mixes them well."""
    roots = {"python": Path(sysconfig.get_path("stdlib"))}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name.replace("-", "_"))  # does not import a top-level name
        if spec and spec.submodule_search_locations:
            roots[name] = Path(spec.submodule_search_locations[0])
    found = []
    for name, root in roots.items():
        for folder, folders, files in os.walk(root):
            folders[:] = [f for f in folders if f not in SKIP_FOLDERS]
            for file in files:
                # _sysconfigdata, __config__ and version.py say where and how this copy was built
                if file.endswith(".py") and not re.match("_sysconfig|__config__|version", file):
                    path = Path(folder, file)
                    key = f"{name}/{path.relative_to(root).as_posix()}"
                    found.append((zlib.crc32(key.encode()), key, path))
    return [(crc, path) for crc, _, path in sorted(found)]


def table(code: str) -> bool:
    """Whether a file is data rather than code: many digits, or very long lines."""
    digits = sum(map(code.count, "0123456789"))
    return digits > 0.08 * len(code) or max(map(len, code.splitlines())) > 400


def package_texts() -> Iterator[str]:
    """READMEs (the body of METADATA) and licences of PACKAGES."""
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            files = importlib.metadata.distribution(name).files or []
            for file in sorted(files, key=str):
                if ".dist-info/" in str(file) and re.match("METADATA|LICEN|COPYING", file.name):
                    text = file.read_text(encoding="utf-8")
                    yield text.partition("\n\n")[2] if file.name == "METADATA" else text


def python_topics() -> dict[str, str]:
    """The language reference that `help()` shows."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return topics


# ---- units of work: over processes and machines, each done once


@dataclass(frozen=True)
class Plan:
    """What every unit of work needs to know."""

    config: Config
    tmp: Path  # the data set while it is made, beside its place
    rank: int
    world: int
    workers: int

    @property
    def work(self) -> Path:
        """Scratch: parts, results of units, the lock. Removed in the end."""
        return self.tmp / "work"

    @property
    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self.tmp, (self.work / "tokenizer" / "00000.json").read_text())

    @property
    def row(self) -> np.dtype:
        return row_dtype(self.config.seq_len, self.tokenizer.n_vocab)


def row_dtype(seq_len: int, n_vocab: int) -> np.dtype:
    """A row: Amber's {"token_ids": [...], "source": ...} in binary."""
    ids = "<u2" if n_vocab <= 1 << 16 else "<u4"
    return np.dtype([("source", "u1"), ("token_ids", ids, (seq_len + 1,))])


@contextlib.contextmanager
def writing(plan: Plan, path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = plan.work / f"{path.name}.{os.getpid()}"
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


_counter: Any = None  # [bytes read, tokens written, stop] of this stage, shared with the workers


def report(read: int, tokens: int = 0) -> None:
    """Tell the progress bar; also where a worker learns that another has failed."""
    if _counter is not None:
        with _counter.get_lock():
            _counter[0] += read
            _counter[1] += tokens
        if _counter[2]:
            raise SystemExit("stopped, because another worker failed")


def start_worker(counter: Any) -> None:
    global _counter
    _counter = counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()
    # without this, workers outlive a parent that was killed
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@contextlib.contextmanager
def progress(plan: Plan, title: str, total: int) -> Iterator[Any]:
    """A counter whose state a bar shows, and a line with the speed in the end."""
    global _counter
    _counter = multiprocessing.get_context("spawn").Array("q", 3)
    began, over = time.time(), threading.Event()
    bar = tqdm(total=total, desc=title, unit="B", unit_scale=True, leave=False,
               disable=True if plan.rank or not total else None)

    def show() -> None:
        while not over.wait(0.2):
            bar.set_postfix_str(f"{_counter[1] / (time.time() - began) / 1e6:.2f}M tokens/s", False)
            bar.update(_counter[0] - bar.n)
    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield _counter
    finally:
        over.set()
        thread.join()
        bar.close()
    read, tokens, seconds = _counter[0], _counter[1], max(1e-3, time.time() - began)
    if tokens and not plan.rank:
        print(f"{title}: {read / 1e6:.1f} MB, {tokens / 1e6:.2f}M tokens in {seconds:.1f} s"
              f" ({read / seconds / 1e6:.1f} MB/s, {tokens / seconds / 1e6:.2f}M tokens/s)")


def run_units(plan: Plan, stage: str, do: Callable, units: list, total: int = 0) -> list[Any]:
    """do(plan, unit) -> JSON for every unit, each by one process of one rank; all results, in order.

    A result is a file: what was done before a run was killed is not done again, and ranks learn
    of each other's work through nothing else.
    """
    marks = [plan.work / stage / f"{i:05}.json" for i in range(len(units))]
    mine = [i for i in range(plan.rank, len(units), plan.world) if not marks[i].exists()]
    workers = min(plan.workers, len(mine))
    if not plan.config.workers and total < 4 * UNIT_BYTES:
        workers = 1  # starting processes would take longer
    job = functools.partial(run_unit, plan, do)
    arguments = [marks[i] for i in mine], [units[i] for i in mine]
    with progress(plan, stage, total) as counter:
        if workers <= 1:
            list(map(job, *arguments))
        else:
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(workers, spawn, start_worker, (counter,)) as pool:
                try:
                    list(pool.map(job, *arguments))
                except BrokenProcessPool:
                    raise SystemExit("a worker process was killed, perhaps for want of memory: run"
                                     " the same command again (finished parts are kept), with"
                                     " fewer --workers if it was memory.") from None
                finally:
                    counter[2] = 1
    return [collect(plan, mark) for mark in marks]


def run_unit(plan: Plan, do: Callable, mark: Path, unit: Any) -> None:
    try:
        result = do(plan, unit)
        with writing(plan, mark) as file:
            file.write(json.dumps(result).encode())
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise SystemExit(f"the disk of {plan.tmp} is full: make room and run the same command"
                             " again; finished parts are kept.") from None
        raise SystemExit(f"{error.filename or plan.tmp}: {error.strerror or error}.") from None


def collect(plan: Plan, mark: Path) -> Any:
    """The result of a unit, waiting for the rank whose it is."""
    began = time.monotonic()
    while True:
        try:
            return json.loads(mark.read_text())
        except FileNotFoundError:
            if plan.rank and Path(plan.config.data_dir, "manifest.json").exists():
                raise SystemExit(0) from None  # rank 0 has finished everything
            if time.monotonic() - began > PATIENCE:
                raise SystemExit(f"rank {plan.rank} waited {PATIENCE} s for {mark}, which another"
                                 " rank makes: is it still running, on the same file system?") from None
            time.sleep(0.1)


# ---- stage 1: a tokenizer


def make_tokenizer(plan: Plan, files: dict[str, list[str]]) -> dict[str, Any]:
    return new_tokenizer(plan.config, sample(plan.config, files)).save(plan.tmp)


def sample(config: Config, files: dict[str, list[str]]) -> Iterator[str]:
    """About SAMPLE_BYTES of text, of each source in proportion, from the beginnings of many files."""
    sizes = {name: sum(map(os.path.getsize, paths)) for name, paths in files.items()}
    for name, paths in files.items():
        budget = SAMPLE_BYTES * sizes[name] // max(1, sum(sizes.values()))
        order = np.random.default_rng(config.seed).permutation(len(paths))
        for i in order:
            left = min(budget, max(1 << 20, SAMPLE_BYTES // len(paths)))
            for text in read_documents(paths[i], config.on_bad_row, Counter()):
                if left <= 0:
                    break
                yield text[:left]
                used = min(len(text), left)
                left, budget = left - used, budget - used
            if budget <= 0:
                break


# ---- stage 2: every file to a part, one flat run of tokens (or rows, if it is tokenized already)


def plan_units(config: Config, files: dict[str, list[str]]) -> list[tuple[int, str, list[str]]]:
    """(index, source, files) of each unit of work, the same whoever does it."""
    units: list[tuple[int, str, list[str]]] = []
    for name, paths in files.items():
        room = 0.0
        for path in paths:
            if room <= 0:
                units.append((len(units), name, []))
                # where a source is to end is known only to one who reads it from the beginning
                room = math.inf if config.max_source_bytes else UNIT_BYTES
            units[-1][2].append(path)
            room -= os.path.getsize(path)
    return units


def encode_unit(plan: Plan, unit: tuple[int, str, list[str]]) -> dict[str, Any]:
    """Encode files to one part: an EOS after every document, nothing before (as Amber)."""
    index, source, paths = unit
    tokenizer, dtype = plan.tokenizer, plan.row["token_ids"].base
    eos = np.array([tokenizer.eos_id], dtype).tobytes()
    documents = size = tokens = 0
    notes: Counter[str] = Counter()
    texts = itertools.chain.from_iterable(
        read_documents(path, plan.config.on_bad_row, notes) for path in paths)
    with writing(plan, plan.work / "parts" / f"{index:05}.bin") as file:
        for text in texts:
            ids = tokenizer.encode(text)
            file.write(ids.astype(dtype).tobytes() + eos)
            report(0, len(ids) + 1)
            documents, tokens, size = documents + 1, tokens + len(ids) + 1, size + len(text.encode())
            if plan.config.max_source_bytes and size >= plan.config.max_source_bytes:
                break
    return {"source": source, "documents": documents, "bytes": size, "tokens": tokens,
            "repaired": notes.pop("repaired", 0), "dropped": +notes}


class BadRow(ValueError):
    pass


def parse_rows(lines: list[bytes], width: int, n_vocab: int) -> tuple[np.ndarray, list[str]]:
    """Released rows to ids (n, width) and sources; raises BadRow(reason, what was found)."""
    try:
        rows = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        raise BadRow("not JSON", lines[0][:40]) from None
    for row in rows:
        ids = row.get("token_ids") if isinstance(row, dict) else None
        if not isinstance(ids, list):
            raise BadRow("no list token_ids", lines[0][:40])
        if len(ids) != width:
            raise BadRow(f"not seq_len + 1 = {width} token_ids", len(ids))
        if not isinstance(row.get("source"), str):
            raise BadRow("no source", row.get("source"))
    found = [row["token_ids"] for row in rows]
    try:
        ids = np.array(found)
    except ValueError:  # lists among the ids
        ids = np.array([0.5])
    # to NumPy true is a 1
    strange = ids.dtype.kind != "i" or ids.ndim != 2 or any(b"true" in x or b"false" in x for x in lines)
    if strange or ids.min() < 0 or ids.max() >= n_vocab:
        for i in itertools.chain.from_iterable(found):
            if type(i) is not int:
                raise BadRow("an id that is not a whole number", i)
            if not 0 <= i < n_vocab:
                raise BadRow(f"an id outside the vocabulary of {n_vocab}", i)
    return ids, [row["source"] for row in rows]


def convert_unit(plan: Plan, unit: tuple[int, str, list[str]]) -> dict[str, Any]:
    """Released rows of one file to one part of rows, in file order; sources numbered as they come."""
    index, _, [path] = unit
    width, n_vocab = plan.config.seq_len + 1, plan.tokenizer.n_vocab
    names: dict[str, int] = {}
    counts: Counter[int] = Counter()
    notes: Counter[str] = Counter()
    numbered = naming(path, read_lines(path))
    with writing(plan, plan.work / "parts" / f"{index:05}.bin") as file:
        while block := list(itertools.islice(numbered, 256)):
            try:
                good = [parse_rows([line for _, line in block], width, n_vocab)]
            except BadRow:  # one of them: look at each
                good = []
                for number, line in block:
                    try:
                        good.append(parse_rows([line], width, n_vocab))
                    except BadRow as error:
                        bad_row(path, number, *error.args, plan.config.on_bad_row, notes)
            for ids, sources in good:
                out = np.empty(len(ids), plan.row)
                out["token_ids"] = ids
                out["source"] = [names.setdefault(s, len(names)) % 256 for s in sources]
                counts.update(out["source"].tolist())
                file.write(out.tobytes())
                report(0, ids.size)
    return {"names": list(names), "rows": [counts[i] for i in range(len(names))], "dropped": +notes}


# ---- stage 3: which row goes where


def shares(counts: list[int], cap: int) -> list[int]:
    """Counts cut to `cap` in all, every one in proportion (largest remainder)."""
    total = sum(counts)
    if not cap or total <= cap:
        return counts
    cut = [n * cap // total for n in counts]
    first = sorted(range(len(counts)), key=lambda i: (-(counts[i] * cap % total), i))
    for i in first[:cap - sum(cut)]:
        cut[i] += 1
    return cut


def layout_text(plan: Plan, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per source: its parts, its rows, how many are held out and how many each chunk gets."""
    c, width, sources = plan.config, plan.config.seq_len + 1, []
    for name in dict.fromkeys(p["source"] for p in parts):
        mine = [i for i, p in enumerate(parts) if p["source"] == name]
        total = {k: sum(parts[i][k] for i in mine)
                 for k in ("documents", "bytes", "tokens", "repaired")}
        dropped = sum((Counter(parts[i]["dropped"]) for i in mine), Counter())
        if not total["documents"]:
            why = ", ".join(f"{n} x {reason}" for reason, n in dropped.items()) or "nothing to read"
            raise SystemExit(f"source {name!r} has no documents: {why}.")
        rows, times = total["tokens"] // width, c.source_weights.get(name, 1)
        train = rows - c.valid_rows
        dealt = int(times) * train + round(times % 1 * train)
        if train < 0 or (times and dealt < c.n_chunks):
            raise SystemExit(
                f"source {name!r} is too small: {total['tokens']} tokens make {rows} rows of"
                f" {width}, but valid_rows = {c.valid_rows} and n_chunks = {c.n_chunks} need"
                f" {c.valid_rows + math.ceil(c.n_chunks / times) if times else c.valid_rows} (used"
                f" {times} times). Give more text, or lower valid_rows or n_chunks.")
        sources.append({"name": name, **total, "rows": rows, "tail_tokens": total["tokens"] % width,
                        "valid_rows": c.valid_rows, "dealt": dealt, "times": times,
                        "dropped": dropped, "parts": [(i, parts[i]["tokens"]) for i in mine]})
    cut = shares([s["dealt"] // c.n_chunks for s in sources], c.rows_per_chunk)
    for source, share in zip(sources, cut):
        source["rows_in_chunk"] = share
    if not sum(cut):
        raise SystemExit("source_weights leave nothing to train on: at least one must be above 0.")
    return sources


def valid_rows(config: Config, source: int, rows: int) -> np.ndarray:
    """Row ids of a source that are held out, ascending."""
    rng = np.random.default_rng([config.seed, source])
    return np.sort(rng.choice(rows, config.valid_rows, replace=False))


def chunk_rows(config: Config, s: int, source: dict[str, Any], chunk: int) -> np.ndarray:
    """Row ids of source s in a chunk: dealt round-robin, as Amber (amber-data-prep mix_and_split.py).

    Arithmetic rather than lists of rows, so that a source of any size takes no memory.
    """
    n, train = config.n_chunks, source["rows"] - source["valid_rows"]
    row = chunk + n * np.arange(source["rows_in_chunk"])
    # rows_per_chunk takes evenly from all of the source; without a cap this changes nothing
    row = row * (source["dealt"] // n) // max(1, source["rows_in_chunk"])
    # so does a weight's fraction; whole times come first
    whole = int(source["times"]) * train
    row = np.where(row < whole, row % train, (row - whole) * train // max(1, source["dealt"] - whole))
    held = valid_rows(config, s, source["rows"])
    # the k-th row that is not held out
    return row + np.searchsorted(held - np.arange(len(held)), row, side="right")


# ---- stage 4: chunks


def gather(plan: Plan, parts: list[tuple[int, int]], rows: np.ndarray) -> np.ndarray:
    """Rows (n, seq_len + 1) of the stream that parts (index, tokens) make one after another."""
    width, dtype = plan.config.seq_len + 1, plan.row["token_ids"].base
    ends = np.cumsum([tokens for _, tokens in parts])
    first = np.searchsorted(ends, rows * width, "right")
    last = np.searchsorted(ends, rows * width + width - 1, "right")
    out = np.empty((len(rows), width), dtype)
    for p in range(first.min(), last.max() + 1) if len(rows) else ():
        index, tokens = parts[p]
        if not tokens:
            continue
        part = np.memmap(plan.work / "parts" / f"{index:05}.bin", dtype, "r")
        begin = ends[p] - tokens
        head = int(-begin % width)  # the row that began in the part before
        whole = part[head:head + max(0, tokens - head) // width * width].reshape(-1, width)
        inside = (first == p) & (last == p)
        out[inside] = whole[rows[inside] - (begin + head) // width]
        for k in np.flatnonzero((first <= p) & (last >= p) & ~inside):
            at = int(rows[k] * width - begin)
            low, high = max(at, 0), min(at + width, tokens)
            out[k, low - at:high - at] = part[low:high]
    return out


def write_rows(plan: Plan, path: Path, n_rows: int, blocks: Iterable[np.ndarray]) -> None:
    """A .npy of rows, block by block; np.memmap would die of a full disk instead of saying so."""
    if path.exists():  # finished before this run
        return
    header = {"descr": np.lib.format.dtype_to_descr(plan.row), "fortran_order": False,
              "shape": (n_rows,)}
    with writing(plan, path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(block.tobytes())
            report(block.nbytes, block["token_ids"].size)


def text_blocks(plan: Plan, s: int, parts: list, rows: np.ndarray) -> Iterator[np.ndarray]:
    for at in range(0, len(rows), BLOCK):
        ids = gather(plan, parts, rows[at:at + BLOCK])
        block = np.empty(len(ids), plan.row)
        block["source"], block["token_ids"] = s, ids
        yield block


@functools.lru_cache(maxsize=1)
def read_layout(mark: Path) -> Any:
    return json.loads(mark.read_text())


def write_text_unit(plan: Plan, unit: tuple[str, int]) -> dict[str, Any]:
    """One chunk, or the held-out rows of one source; source blocks as in Amber's own chunks."""
    kind, index = unit
    sources = read_layout(plan.work / "layout" / "00000.json")
    if kind == "valid":
        source, path = sources[index], plan.tmp / "valid" / f"{sources[index]['name']}.npy"
        rows = valid_rows(plan.config, index, source["rows"])
        write_rows(plan, path, len(rows), text_blocks(plan, index, source["parts"], rows))
        return entry(plan, path, source=source["name"], rows=len(rows))
    path = plan.tmp / "train" / f"chunk_{index:03}.npy"
    counts = {s["name"]: s["rows_in_chunk"] for s in sources}
    blocks = (text_blocks(plan, s, source["parts"], chunk_rows(plan.config, s, source, index))
              for s, source in enumerate(sources))
    write_rows(plan, path, sum(counts.values()), itertools.chain.from_iterable(blocks))
    return entry(plan, path, rows=sum(counts.values()), sources=counts)


def entry(plan: Plan, path: Path, **more: Any) -> dict[str, Any]:
    return {"file": path.relative_to(plan.tmp).as_posix(), **more, "sha256": sha256(path)}


def layout_released(plan: Plan, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sources of released rows, numbered in order of first appearance, with their rows."""
    chunks = plan.config.n_chunks
    sources: dict[str, dict[str, Any]] = {}
    for i, part in enumerate(parts):
        for name, rows in zip(part["names"], part["rows"]):
            source = sources.setdefault(name, {"name": name, "train": 0, "valid": 0})
            source["train" if i < chunks else "valid"] += rows
        if not part["names"]:
            raise SystemExit(f"part {i} of the released chunks has no good row.")
    return list(sources.values())


def write_released_unit(plan: Plan, unit: tuple[str, int, list[tuple[int, list[int]]]]) -> Any:
    """One chunk = one released file, rows in file order; or the held-out rows of one source.

    unit: (kind, chunk or source, [(part, the number of each of the part's sources)]).
    """
    kind, index, parts = unit
    sources, cap = read_layout(plan.work / "layout" / "00000.json"), plan.config.rows_per_chunk
    name = f"valid/{sources[index]['name']}.npy" if kind == "valid" else f"train/chunk_{index:03}.npy"
    path = plan.tmp / name
    if not path.exists():
        rows = [np.memmap(plan.work / "parts" / f"{part:05}.bin", plan.row, "r") for part, _ in parts]
        ids = [np.array(table, np.uint8)[r["source"]] for r, (_, table) in zip(rows, parts)]
        ids, ends = np.concatenate(ids), np.cumsum([0, *map(len, rows)])
        wanted = range(len(sources)) if kind == "train" else [index]
        where = [np.flatnonzero(ids == s) for s in wanted]
        cut = shares([len(w) for w in where], cap if kind == "train" else plan.config.valid_rows)
        # fewer rows than there are: evenly from all of each source
        keep = np.sort(np.concatenate([w[np.arange(n) * len(w) // max(1, n)] for w, n in zip(where, cut)]))

        def blocks() -> Iterator[np.ndarray]:
            for r, begin, end in zip(rows, ends, ends[1:]):
                mine = keep[(keep >= begin) & (keep < end)]
                for at in range(0, len(mine), BLOCK):
                    block = r[mine[at:at + BLOCK] - begin]
                    block["source"] = ids[mine[at:at + BLOCK]]
                    yield block
        write_rows(plan, path, len(keep), blocks())
    saved = np.load(path, mmap_mode="r")
    if kind == "valid":
        return entry(plan, path, source=sources[index]["name"], rows=len(saved))
    (plan.work / "parts" / f"{index:05}.bin").unlink(missing_ok=True)  # it is 7 GB in Amber
    counts = np.bincount(saved["source"], minlength=len(sources)).tolist()
    return entry(plan, path, rows=len(saved), sources=dict(zip((s["name"] for s in sources), counts)))


# ---- the whole


def find_inputs(config: Config) -> tuple[dict[str, list[str]], Counter]:
    """Files of every source (released chunks: "train" and "valid"), and what was passed over."""
    if not config.tokenized:
        found = {name: find_files(name, pattern) for name, pattern in config.sources.items()}
        skipped = sum((skips for _, skips in found.values()), Counter())
        return {name: files for name, (files, _) in found.items()}, skipped
    if config.tokenizer == "bpe":
        raise SystemExit('tokenized rows need the tokenizer that made them, tokenizer = "llama:PATH":'
                         ' "bpe" would train a new one.')
    train = find_files("tokenized", config.tokenized)[0]
    if len(train) < config.n_chunks:
        raise SystemExit(f"tokenized: {config.tokenized} matches {len(train)} files, but n_chunks is"
                         f" {config.n_chunks} and a file makes a chunk: --n_chunks={len(train)}.")
    valid = find_files("tokenized_valid", config.tokenized_valid)[0] if config.tokenized_valid else []
    return {"train": train[:config.n_chunks], "valid": valid}, Counter()


def settings(config: Config) -> dict[str, Any]:
    return {name: getattr(config, name) for name in SETTINGS}


def versions() -> dict[str, str]:
    """Python and the packages whose text or code decides the bytes of the data."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def inputs_of(files: dict[str, list[str]]) -> str:
    """A fingerprint of the input files' names and sizes."""
    return fingerprint([(path, os.path.getsize(path)) for paths in files.values() for path in paths])


def fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def prepare(config: Config, rank: int = 0, world: int = 1) -> None:
    """Make the data set of a config, or go on with it; nothing if it is there already."""
    data_dir = Path(config.data_dir)
    if data_dir.exists() and any(data_dir.iterdir()):
        return finished(config)
    for name in config.sources:
        check_name(name)
    files, skipped = find_inputs(config)
    if unknown := set(config.source_weights) - set(files or CORPUS):
        raise SystemExit(f"source_weights names {sorted(unknown)}, but the sources are"
                         f" {sorted(files or CORPUS)}.")
    stats = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns)
             for paths in [*files.values(), tokenizer_files(config)] for path in paths]
    key = fingerprint([VERSION, settings(config), stats, files or versions()])[:8]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    plan = Plan(config, data_dir.with_name(f"{data_dir.name}.{key}.tmp"),
                rank, world, config.workers or max(1, cores // local))
    if plan.rank:
        make(plan, files, skipped)
    else:
        with only_one(plan):
            make(plan, files, skipped)


def tokenizer_files(config: Config) -> list[str]:
    name = config.tokenizer.partition("llama:")[2]
    return [name] if os.path.isfile(name) else []


def check_name(name: str) -> None:
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise SystemExit(f"{name!r} cannot name a source: it becomes a file name; use letters,"
                         " digits and . _ + -")


@contextlib.contextmanager
def only_one(plan: Plan) -> Iterator[None]:
    """Hold the lock of the temporary directory; remove those of other settings."""
    others = map(Path, glob.glob(glob.escape(plan.config.data_dir) + ".*.tmp"))
    with contextlib.ExitStack() as held:
        for tmp in {plan.tmp, *others}:
            (tmp / "work").mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(open(tmp / "work" / "lock", "w"))
            try:
                import fcntl
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:  # Windows: do not start two at once
                pass
            except OSError:
                raise SystemExit(f"another process is preparing {plan.config.data_dir} now, in {tmp}:"
                                 " wait for it, or stop it and run the same command again.") from None
            if tmp != plan.tmp:
                shutil.rmtree(tmp)
        yield


def make(plan: Plan, files: dict[str, list[str]], skipped: Counter) -> None:
    """The stages, one after the other; every rank does its share of each."""
    config, data_dir = plan.config, Path(plan.config.data_dir)
    if not (plan.tmp / "manifest.json").exists():
        if not files:
            size, = run_units(plan, "corpus", write_corpus, [None])
            files = {name: [str(plan.work / "corpus" / f"{name}.jsonl")] for name in size}
        tokenizer, = run_units(plan, "tokenizer", make_tokenizer, [files])
        units = plan_units(config, files)
        if config.tokenized:
            units = [(i, "", [path]) for i, path in enumerate(files["train"] + files["valid"])]
        size = sum(os.path.getsize(path) for paths in files.values() for path in paths)
        parts = run_units(plan, "encode", convert_unit if config.tokenized else encode_unit, units, size)
        layout = layout_released if config.tokenized else layout_text
        sources, = run_units(plan, "layout", layout, [parts])
        for source in sources:
            check_name(source["name"])
        if len(sources) > 256:
            raise SystemExit(f"there are {len(sources)} sources; a row's source is one byte: 256.")
        entries = write_all(plan, sources, parts)
        if plan.rank:
            return collect(plan, plan.work / "never")
        manifest = describe(plan, tokenizer, sources, parts, entries, skipped)
        with writing(plan, plan.tmp / "manifest.json") as file:
            file.write(json.dumps(manifest, indent=1).encode() + b"\n")
    shutil.rmtree(plan.work)
    os.rename(plan.tmp, data_dir)
    print(summary(data_dir, load_manifest(data_dir)))


def write_all(plan: Plan, sources: list, parts: list) -> list[dict[str, Any]]:
    """Every chunk, then the held-out rows of every source."""
    n = plan.config.n_chunks
    row = plan.row.itemsize
    if not plan.config.tokenized:
        units = [("train", i) for i in range(n)]
        units += [("valid", s) for s, source in enumerate(sources) if source["valid_rows"]]
        size = row * sum(s["rows_in_chunk"] * n + s["valid_rows"] for s in sources)
        return run_units(plan, "write", write_text_unit, units, size)
    number = {source["name"]: s for s, source in enumerate(sources)}
    tables = [(i, [number[name] for name in part["names"]]) for i, part in enumerate(parts)]
    units = [("train", i, [tables[i]]) for i in range(n)]
    units += [("valid", s, tables[n:]) for s, source in enumerate(sources) if source["valid"]]
    size = row * sum(s["train"] + s["valid"] for s in sources)
    return run_units(plan, "write", write_released_unit, units, size)


def describe(plan: Plan, tokenizer: dict, sources: list, parts: list, entries: list,
             skipped: Counter) -> dict[str, Any]:
    """The manifest: all that the other stages, and a reader in five years, need to know."""
    config = plan.config
    chunks = [e for e in entries if "source" not in e]
    valid = [e for e in entries if "source" in e]
    held = {e["source"]: e["rows"] for e in valid}
    dropped = sum((Counter(p["dropped"]) for p in parts), Counter()) + skipped
    about = []
    for s in sources:
        train = sum(chunk["sources"][s["name"]] for chunk in chunks)
        if config.tokenized:
            rows = s["train"] + s["valid"]
            about.append({"name": s["name"], "tokens": rows * (config.seq_len + 1), "rows": rows,
                          "valid_rows": held.get(s["name"], 0), "train_rows": train,
                          "unused_rows": rows - train - held.get(s["name"], 0)})
        else:
            keep = ("name", "documents", "bytes", "tokens", "rows", "tail_tokens", "valid_rows")
            about.append({k: s[k] for k in keep} | {
                "train_rows": train, "times": s["times"],
                "unused_rows": max(0, s["rows"] - s["valid_rows"] - train),
                "repaired": s["repaired"], "dropped": s["dropped"]})
    return {"version": VERSION, "settings": settings(config), "tokenizer": tokenizer,
            "seq_len": config.seq_len, "seed": config.seed,
            "dtype": np.lib.format.dtype_to_descr(plan.row), "sources": about,
            "chunks": chunks, "valid": valid, "dropped": dropped,
            "inputs": inputs_of(find_inputs(config)[0]), "made_with": versions()}


def finished(config: Config) -> None:
    """Say that there is nothing to do, or why this directory cannot be used."""
    there = f"{config.data_dir} exists"
    if not Path(config.data_dir, "manifest.json").exists():
        raise SystemExit(f"{there}, but has no manifest.json: it is not a data set. Delete it, or"
                         " choose another place with --data_dir.")
    manifest = load_manifest(config.data_dir)
    now = json.loads(json.dumps(settings(config)))
    differ = [f"{k} = {manifest['settings'].get(k)!r} (now {v!r})" for k, v in now.items()
              if v != manifest["settings"].get(k)]
    if differ:
        raise SystemExit(f"{there}, prepared with {', '.join(differ)}. Delete it to prepare it anew,"
                         " or choose another place with --data_dir.")
    with contextlib.suppress(SystemExit, OSError):  # the inputs may be gone by now: they are not needed
        if manifest["inputs"] != inputs_of(find_inputs(config)[0]):
            print(f"Note: the input files have changed since; to use them delete {config.data_dir}.")
    print("nothing to do: " + summary(Path(config.data_dir), manifest))


def summary(data_dir: Path, manifest: dict[str, Any]) -> str:
    rows, chunks = sum(c["rows"] for c in manifest["chunks"]), len(manifest["chunks"])
    shares = {s["name"]: s["train_rows"] for s in manifest["sources"]}
    mix = ", ".join(f"{name} {n / rows:.1%}" for name, n in shares.items())
    return (f"{data_dir} has {rows:,} rows of {manifest['seq_len']} + 1 tokens in {chunks} chunks"
            f" and {sum(v['rows'] for v in manifest['valid']):,} held-out rows; {mix}; tokenizer"
            f" {manifest['tokenizer']['kind']} with {manifest['tokenizer']['n_vocab']:,} ids")


# ---- what the other stages use: the reader and the data order


def load_manifest(data_dir: str | Path) -> dict[str, Any]:
    """The manifest of a prepared data set; raises SystemExit when there is none."""
    path = Path(data_dir, "manifest.json")
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise SystemExit(f"{data_dir} has no prepared data (no manifest.json): run"
                         " python prepare_data.py configs/NAME.py first.") from None
    except ValueError as error:
        raise SystemExit(f"{path} is not valid JSON ({error}): prepare the data anew.") from None
    if manifest.get("version") != VERSION:
        raise SystemExit(f"{path} is of format version {manifest.get('version')}, this code reads"
                         f" {VERSION}: prepare the data anew.")
    return manifest


def load_tokenizer(data_dir: str | Path) -> Tokenizer:
    """The tokenizer that made a data set."""
    info = load_manifest(data_dir)["tokenizer"]
    return read_tokenizer(Path(data_dir), json.dumps(info))


def open_rows(data_dir: str | Path, manifest: dict[str, Any], file: dict[str, Any]) -> np.ndarray:
    path = Path(data_dir, file["file"])
    try:
        rows = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise SystemExit(f"{path} cannot be read ({error}): --verify checks every file.") from None
    expected = row_dtype(manifest["seq_len"], manifest["tokenizer"]["n_vocab"])
    if rows.dtype != expected or rows.shape != (file["rows"],):
        raise SystemExit(f"{path} has {rows.shape} rows of {rows.dtype}, but the manifest says"
                         f" {file['rows']} of {expected}: prepare the data anew.")
    return rows


def open_chunk(data_dir: str | Path, manifest: dict[str, Any], chunk: int) -> np.ndarray:
    """Rows of a chunk, a memory map of (rows,) [source u1, token_ids (seq_len + 1,)]."""
    return open_rows(data_dir, manifest, manifest["chunks"][chunk])


def open_valid(data_dir: str | Path, manifest: dict[str, Any], source_name: str) -> np.ndarray:
    """Held-out rows of a source, as `open_chunk`."""
    for file in manifest["valid"]:
        if file["source"] == source_name:
            return open_rows(data_dir, manifest, file)
    names = ", ".join(f["source"] for f in manifest["valid"]) or "no source"
    raise SystemExit(f"{data_dir} has no held-out rows of {source_name!r}; it has of {names}.")


def row_order(seed: int, chunk: int, n_rows: int) -> np.ndarray:
    """The order in which the rows of a chunk are read, (n_rows,): depends on nothing else."""
    return np.random.default_rng([seed, chunk]).permutation(n_rows)


def step_rows(seed: int, chunk: int, n_rows: int, step_in_chunk: int, batch: int) -> np.ndarray:
    """The rows (batch,) of one optimizer step; those after the last whole batch are not read."""
    return row_order(seed, chunk, n_rows)[step_in_chunk * batch:(step_in_chunk + 1) * batch]


def total_steps(manifest: dict[str, Any], batch: int) -> int:
    """Optimizer steps in all chunks."""
    return sum(chunk["rows"] // batch for chunk in manifest["chunks"])


def locate(manifest: dict[str, Any], batch: int, step: int) -> tuple[int, int]:
    """(chunk, step in the chunk) of optimizer step `step`, counted from 0."""
    left = step
    for chunk, file in enumerate(manifest["chunks"]):
        if 0 <= left < file["rows"] // batch:
            return chunk, left
        left -= file["rows"] // batch
    raise SystemExit(f"there is no step {step}: the data has {total_steps(manifest, batch)} steps of"
                     f" {batch} rows, the first is 0.")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(data_dir: str | Path) -> list[str]:
    """Every file against the manifest; returns what is wrong, one sentence each."""
    manifest = load_manifest(data_dir)
    files = [*manifest["chunks"], *manifest["valid"], manifest["tokenizer"]]

    def check(file: dict[str, Any]) -> str | None:
        path = Path(data_dir, file["file"])
        if not path.exists():
            return f"{path} is missing."
        found = sha256(path)
        same = found == file["sha256"]
        return None if same else f"{path} differs: its sha256 is {found}, not {file['sha256']}."
    with ThreadPoolExecutor() as pool:
        return [problem for problem in pool.map(check, files) if problem]


def show_step(config: Config, step: int) -> None:
    """Print what an optimizer step reads: source, chunk, row and the beginning of the text."""
    manifest, tokenizer = load_manifest(config.data_dir), load_tokenizer(config.data_dir)
    chunk, within = locate(manifest, config.global_batch_size, step)
    rows = open_chunk(config.data_dir, manifest, chunk)
    ids = step_rows(manifest["seed"], chunk, len(rows), within, config.global_batch_size)
    print(f"step {step} = step {within} of chunk {chunk}, {len(ids)} rows of {config.data_dir}")
    for row in ids:
        source = manifest["sources"][rows["source"][row]]["name"]
        text = tokenizer.decode(rows["token_ids"][row][:64])
        print(f"{source:<14} chunk {chunk} row {row:<8} {json.dumps(text[:100])}")


def main(argv: list[str]) -> None:
    # the processes of this stage need not be those of training, whose batch sizes `load` checks
    world = int(os.environ.pop("WORLD_SIZE", 1))
    config, flags = load(argv, verify=False, show_step=-1)
    if flags["verify"]:
        problems = verify(config.data_dir)
        if problems:
            raise SystemExit("\n".join(problems))
        print(f"{config.data_dir}: every file is as the manifest says")
    elif any(a.lstrip("-").startswith("show_step") for a in argv):
        show_step(config, flags["show_step"])
    else:
        prepare(config, int(os.environ.get("RANK", 0)), world)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on where this one was") from None
