"""Raw text to the data set a run trains on: tokens in chunks, held-out rows, and a manifest.

    python prepare_data.py configs/amber_tiny.py                  # seconds; no download
    python prepare_data.py configs/amber_125m.py --workers=8      # your text: `sources` there
    torchrun --nnodes=4 prepare_data.py configs/amber_7b.py       # machines with one file system
    python prepare_data.py configs/amber_tiny.py --show_step=100  # what optimizer step 100 reads
    python prepare_data.py configs/amber_tiny.py --verify         # every file against its sha256

Makes data/NAME: train/chunk_000.npy ..., valid/SOURCE.npy, the tokenizer and, last of all,
manifest.json. A preparation that was stopped goes on where it was when it is started again, and
the bytes are the same whatever the number of workers and machines. Knows nothing of torch.
"""

import base64
import contextlib
import copy
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
import sys
import sysconfig
import threading
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import regex  # comes with tiktoken; the standard library's re has no \p{L}
import tiktoken
from tqdm import tqdm

from configs import Config, load

VERSION = 1  # of the format
# the settings that decide the bytes of a data set; the manifest keeps them
SETTINGS = """canaries sources source_weights max_source_bytes tokenized tokenized_valid on_bad_row
    tokenizer vocab_size seq_len n_chunks rows_per_chunk valid_rows seed""".split()
# and those it keeps only where they are used: Amber's data has none of them
CRYSTAL_SETTINGS = """source_halves valid_documents crystal_tokens fim_rates
    fim_spm_rate""".split()
BLOCK = 4096  # rows in memory at a time: 16 MB at Amber's length
UNIT_BYTES = 16 << 20  # small files are read together, until they make a unit of work this large
SAMPLE_BYTES = 10 << 20  # of text, to train a tokenizer on
PATIENCE = 6 * 3600  # seconds one rank waits for a unit of work of another


# ---- tokenizers: text to ids and back, all run by tiktoken

# One digit at a time as LLaMA's, a word with the character before it, no look-ahead: 30 % faster
# than GPT-4's pattern, and within 2 % of its compression at small vocabularies (measured).
BPE_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+"
# No piece of LLaMA's vocabulary crosses these cuts (the constructor checks), so they change no id.
LLAMA_PATTERN = r" *\p{L}+| *[^ \p{L}\p{Nd}\n]+|\p{Nd}|\n| +"
EOT = "<|endoftext|>"
# What Crystal adds to LLaMA's vocabulary, ids 32000 to 32021, in this order: StarCoder's
# tokens for infilling and the parts of a repository, and those of a chat.
CRYSTAL_TOKENS = [f"<|{name}|>" for name in """fim_prefix fim_middle fim_suffix fim_pad
    filename gh_stars issue_start issue_comment issue_closed jupyter_start jupyter_text
    jupyter_code jupyter_output empty_output commit_before commit_msg commit_after reponame
    im_start im_end sys_start sys_end""".split()]
FIM_TOKENS = CRYSTAL_TOKENS[:3]  # before the prefix, the middle and the suffix of a document


class Tokenizer:
    """A byte-level BPE: our own ("bpe"), or one of tiktoken's named encodings.

    ranks: bytes -> id, in order of merging; specials: name -> id, never produced from text.
    Has eos_id, n_vocab (largest id + 1) and token_bytes, (n_vocab,): UTF-8 bytes of each id, 0
    for specials, which makes bits per byte out of a loss per token.
    """

    added: tuple[str, ...] = ()  # the specials that `add` was given

    def __init__(self, kind: str, ranks: dict[bytes, int], pattern: str, specials: dict[str, int]):
        self.kind, self.ranks, self.pattern, self.specials = kind, ranks, pattern, specials
        self.core = tiktoken.Encoding(kind, pat_str=pattern, mergeable_ranks=ranks,
                                      special_tokens={})
        self.index({i: piece for piece, i in ranks.items()}, specials[EOT])

    def index(self, pieces: dict[int, bytes], eos_id: int) -> None:
        self.eos_id, self.n_vocab = eos_id, 1 + max(*pieces, *self.specials.values())
        self.token_bytes = np.zeros(self.n_vocab, np.int64)
        self.token_bytes[list(pieces)] = [len(piece) for piece in pieces.values()]
        self.pieces = pieces | {i: name.encode() for name, i in self.specials.items()}

    def add(self, names: Collection[str]) -> "Tokenizer":
        """The same with more specials: ids after all others, and never found in a text."""
        new, missing = copy.copy(self), [name for name in names if name not in self.specials]
        fresh = {name: self.n_vocab + i for i, name in enumerate(missing)}
        new.added, new.specials = (*names,), self.specials | fresh
        new.n_vocab += len(fresh)
        new.token_bytes = np.append(self.token_bytes, np.zeros(len(fresh), np.int64))
        new.pieces = self.pieces | {i: name.encode() for name, i in fresh.items()}
        return new

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, (n,) uint32, no BOS, no EOS; names of specials are ordinary text."""
        return self.core.encode_to_numpy(repair(text), disallowed_special=())

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Never raises: half a character or an unknown id becomes U+FFFD."""
        pieces = (self.pieces.get(int(i), b"\xff") for i in ids)
        return b"".join(pieces).decode("utf-8", "replace")

    def save(self, directory: Path) -> dict[str, Any]:
        """Write the tokenizer's file; returns what the manifest says of it."""
        file = self.write(directory)
        return {"kind": self.kind, "file": file, "sha256": sha256(directory / file),
                "n_vocab": self.n_vocab, "eos_id": self.eos_id, "bos_id": None,
                "rule": "no BOS; one EOS after every document",
                "pattern": self.pattern, "specials": self.specials,
                **({"added": self.added} if self.added else {})}

    def write(self, directory: Path) -> str:
        lines = (base64.b64encode(piece) + b" %d\n" % rank for piece, rank in self.ranks.items())
        (directory / "tokenizer.tiktoken").write_bytes(b"".join(lines))
        return "tokenizer.tiktoken"

    def hugging_face(self) -> tuple["Vocabulary", dict[str, Any], dict[str, Any]]:
        """The vocabulary in Hugging Face's spelling, the kind of BPE, and the steps around it.

        There a byte is one letter: itself if it can be seen, else one from U+0100 on (GPT-2's
        encoder.py).
        """
        seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
        hidden = (b for b in range(256) if b not in seen)
        letter = {b: chr(b) for b in seen} | {b: chr(256 + k) for k, b in enumerate(hidden)}
        vocab = {"".join(letter[b] for b in piece): rank for piece, rank in self.ranks.items()}
        # tiktoken's X{1,3}+ never gives back; to Hugging Face's Oniguruma it is (X{1,3})+
        pattern = re.sub(r"(\\p\{\w+\}\{\d+,\d+\})\+", r"(?>\1)", self.pattern)
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
                 "invert": False}
        as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                    "use_regex": False}
        # the specials are in the vocabulary too: a name that is not gets the next free id
        vocabulary = (vocab | self.specials, sorted(vocab, key=vocab.get),
                      [(name, i, None) for name, i in self.specials.items()])
        return vocabulary, {"ignore_merges": True}, {
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, as_bytes]},
            "decoder": as_bytes}

    def save_hugging_face(self, directory: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json: AutoTokenizer then gives our ids.

        Every way to cut a piece in two becomes a merge. tiktoken has one rank for all of them, and
        here each has its own, which changes nothing: inside a piece a text is merged as the piece
        alone would be, so before the last merge there are always the same two parts.
        """
        (vocab, order, added), kind, steps = self.hugging_face()
        merges = [f"{piece[:n]} {piece[n:]}" for piece in order for n in range(1, len(piece))
                  if piece[:n] in vocab and piece[n:] in vocab]
        tokens = [{"id": i, "content": name, "normalized": bool(when), "special": True,
                   "single_word": False, "lstrip": False, "rstrip": False}
                  for name, i, when in added]
        tokenizer = {"version": "1.0", "added_tokens": tokens, **steps, "model": {
            "type": "BPE", **kind, "vocab": vocab, "merges": merges}}
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            "eos_token": next(name for name, i in self.specials.items() if i == self.eos_id),
            # whether names of specials are ordinary text
            "split_special_tokens": all(when is None for _, _, when in added)}
        for file, value in (("tokenizer", tokenizer), ("tokenizer_config", settings)):
            (directory / f"{file}.json").write_text(json.dumps(value, indent=1) + "\n")


class LlamaTokenizer(Tokenizer):
    """LLaMA's tokenizer, exactly: of Hugging Face's tokenizer.json or sentencepiece's .model.

    Sentencepiece merges the neighbours whose union has the best score, leftmost first. That is
    tiktoken's rule, with pieces ranked by score and U+2581 read as a plain space. But tiktoken
    begins with bytes where sentencepiece begins with characters. So the first ranks go to the
    beginnings of the vocabulary's characters, then to the characters; a beginning that is left
    over is spelled in bytes, <0xNN>. Raises SystemExit for a file without the needed properties.
    """

    def __init__(self, path: str):
        self.path, self.kind, self.pattern = path, "llama", LLAMA_PATTERN
        read = read_tokenizer_json if path.endswith(".json") else read_sentencepiece
        self.vocabulary = vocab, order, added = read(path)
        self.specials = {name: i for name, i, _ in added}
        spelled = [vocab.get(f"<0x{b:02X}>") for b in range(256)]  # byte -> id
        text = {p.replace("\u2581", " "): i for p, i in vocab.items()
                if p and p not in self.specials and not re.fullmatch("<0x..>", p)}
        crossing = [p for p in text if len(p) > 1 and not regex.fullmatch(LLAMA_PATTERN, p)]
        wrong = (f"the piece {crossing[0]!r} crosses a cut of its pattern" if crossing else
                 "it has no pieces <0xNN> for bytes" if None in spelled else
                 "it has no </s>" if "</s>" not in self.specials else "")
        if wrong:
            raise SystemExit(f"{path} is not LLaMA's tokenizer: {wrong}.")
        known = {p.encode(): i for p, i in text.items()}
        chars = [p.encode() for p in text if len(p) == 1 and len(p.encode()) > 1]
        starts = sorted({c[:n] for c in chars for n in range(2, len(c))})
        merged = [p.replace("\u2581", " ").encode() for p in order]
        ranked = [bytes([b]) for b in range(256)] + starts + chars + merged
        self.core = tiktoken.Encoding("llama", pat_str=LLAMA_PATTERN, special_tokens={},
                                      mergeable_ranks={p: rank for rank, p in enumerate(ranked)})
        # rank -> one id, or for a beginning of a character the ids of its 2 or 3 bytes; -1 = none
        self.ids = np.full((len(ranked), 3), -1, np.int32)
        for rank, piece in enumerate(ranked):
            ids = [known[piece]] if piece in known else [spelled[b] for b in piece]
            self.ids[rank, :len(ids)] = ids
        self.found = added
        self.raw, self.normal = (added_regex(added, normalized) for normalized in (False, True))
        single = {i: bytes([b]) for b, i in enumerate(spelled)}
        self.index({i: p for p, i in known.items()} | single, self.specials["</s>"])

    def encode(self, text: str) -> np.ndarray:
        """The ids of Hugging Face's LLaMA tokenizer without BOS, (n,) uint32. Added tokens are
        found in the text where it finds them: in " </s>", but not in "a</s>"."""
        ids: list[Any] = [np.empty(0, np.uint32)]
        for k, part in enumerate(self.raw.split(repair(text))):
            if k % 2:  # split() gives what lies between the names, and the names, in turn
                ids.append([self.specials[part]])
            elif part:
                for j, piece in enumerate(self.normal.split(" " + part.replace("\u2581", " "))):
                    ids.append([self.specials[piece[1:]]] if j % 2 else self.encode_piece(piece))
        return np.concatenate(ids, dtype=np.uint32, casting="unsafe")

    def add(self, names: Collection[str]) -> "Tokenizer":
        """As `Tokenizer.add`; names that the file has already keep their ids."""
        new, names = super().add(names), [*names]
        new.found = [token for token in self.found if token[0] not in names]
        vocab, order, _ = self.vocabulary
        new.vocabulary = vocab | new.specials, order, new.found + [
            (name, new.specials[name], None) for name in names]
        new.raw, new.normal = (added_regex(new.found, when) for when in (False, True))
        return new

    def encode_piece(self, text: str) -> np.ndarray:
        ids = self.ids[self.core.encode_to_numpy(text, disallowed_special=())]
        return ids[ids >= 0]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without the space that `encode` puts before it. Never raises."""
        return super().decode(ids).removeprefix(" ")

    def write(self, directory: Path) -> str:
        file = "tokenizer" + Path(self.path).suffix
        shutil.copyfile(self.path, directory / file)
        return file

    def hugging_face(self) -> tuple["Vocabulary", dict[str, Any], dict[str, Any]]:
        space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
        back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        return self.vocabulary, {"byte_fallback": True}, {
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"}, space]},
            "decoder": {"type": "Sequence", "decoders": [
                back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]}}


def added_regex(added: list[tuple[str, int, bool | None]], normalized: bool) -> re.Pattern:
    """Finds added tokens in a text: before it is normalized, or after (a space goes before)."""
    names = [" " * normalized + name for name, _, when in added if when is normalized]
    # the longest wins, as in tokenizers' matcher; (?!) is never found
    return re.compile("(" + "|".join(map(re.escape, sorted(names, key=len)[::-1])) + ")"
                      if names else "(?!)")


# Both readers return vocab: piece -> id, the merged pieces in order of merging, and the added
# tokens: (name, id, whether it is looked for in the normalized text; None = never).
Vocabulary = tuple[dict[str, int], list[str], list[tuple[str, int, bool | None]]]


def read_tokenizer_json(path: str) -> Vocabulary:
    """The vocabulary of a Hugging Face tokenizer.json; raises SystemExit if not as LLaMA's."""
    try:
        data = json.loads(Path(path).read_bytes())
        model, steps = data["model"], (data.get("normalizer") or {}).get("normalizers") or []
        normal = [(s["type"], s.get("prepend") or s.get("content")) for s in steps]
        vocab, added = model["vocab"], data["added_tokens"]
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        order = dict.fromkeys("".join(m) for m in merges)
        names = {t["content"]: t["lstrip"] or t["rstrip"] or t["single_word"] for t in added}
    except (ValueError, TypeError, KeyError):
        raise SystemExit(f"{path} is not a tokenizer.json of a BPE tokenizer.") from None
    # tiktoken merges whatever makes a piece: every way to cut a piece in two must be a merge here
    splits = sum(p[:n] in vocab and p[n:] in vocab
                 for p in vocab if p not in names for n in range(1, len(p)))
    wrong = ("its model has no byte_fallback" if not model.get("byte_fallback") else
             "its normalizer is not Prepend and Replace"
             if normal != [("Prepend", "\u2581"), ("Replace", "\u2581")] else
             "it has a pre_tokenizer" if data.get("pre_tokenizer") else
             "an added token strips its neighbours" if any(names.values()) else
             "its merges are not all the splits of its pieces" if splits != len(merges) else "")
    if wrong:
        raise SystemExit(f"{path} is not built as LLaMA's tokenizer.json: {wrong}.")
    return vocab, list(order), [(t["content"], t["id"], t["normalized"]) for t in added]


def protobuf(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protocol buffer message: whole numbers, or bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        begin = at
        while data[at] > 127:
            at += 1
        at += 1
        return sum((byte & 127) << 7 * k for k, byte in enumerate(data[begin:at]))

    while at < len(data):
        field, kind = divmod(varint(), 8)
        # kinds: 0 varint, 1 eight bytes, 2 length and bytes, 5 four bytes
        number = {1: 8, 5: 4}.get(kind) or varint()
        yield field, data[at:at + number] if kind else number
        at += number if kind else 0


def read_sentencepiece(path: str) -> Vocabulary:
    """The same of a sentencepiece .model (its sentencepiece_model.proto names the fields)."""
    vocab, scores, kinds, specs = {}, {}, {}, {2: {}, 3: {}}
    try:
        for field, value in protobuf(Path(path).read_bytes()):
            if field == 1:
                piece = dict(protobuf(value))
                name = piece[1].decode()
                vocab[name], kinds[name] = len(vocab), piece.get(3, 1)
                scores[name] = float(np.frombuffer(piece.get(2, bytes(4)), "<f4")[0])
            elif field in specs:
                specs[field] = dict(protobuf(value))
    except (IndexError, KeyError, ValueError, TypeError):
        raise SystemExit(f"{path} is not a sentencepiece model (nor a tokenizer.json).") from None
    trainer, normalizer = specs[2], specs[3]
    wrong = ("it is not BPE" if trainer.get(3) != 2 else
             "it normalizes the text" if normalizer.get(2) or normalizer.get(4, 1) else
             "it adds no space before a text" if not normalizer.get(3, 1) else
             "it has user-defined pieces" if 4 in kinds.values() else "")
    if wrong:
        raise SystemExit(f"{path} is not built as LLaMA's tokenizer.model: {wrong}.")
    merged = [p for p, kind in kinds.items() if kind == 1 and len(p) > 1]
    # LLaMA's runs of spaces share one score, the worst: there the leftmost merge makes the longest
    merged.sort(key=lambda p: (-scores[p], -len(p)))
    # kinds 2 and 3, unknown and control: sentencepiece never finds those in a text
    return vocab, merged, [(p, vocab[p], None) for p, kind in kinds.items() if kind in (2, 3)]


def train_bpe(texts: Iterable[str], size: int) -> dict[bytes, int]:
    """Byte-level BPE: the `size` tokens that merging the commonest pair, again and again, gives.

    The pieces of the text are counted once, and a merge touches only the words that have its
    pair. Ties go to the smaller ids: the result depends on nothing but the text.
    """
    pieces: Counter[str] = Counter()
    for text in texts:
        pieces.update(regex.findall(BPE_PATTERN, text))
    # every merge rewrites its words: of a piece of megabytes the beginning says enough
    words, often = [list(p[:200].encode()) for p in pieces], list(pieces.values())
    counts: Counter[tuple[int, int]] = Counter()  # of pairs
    where: defaultdict[tuple[int, int], set[int]] = defaultdict(set)  # pair -> words

    def count(w: int, sign: int) -> None:
        for p in zip(words[w], words[w][1:]):
            counts[p] += sign * often[w]
            if sign > 0:
                where[p].add(w)

    for w in range(len(words)):
        count(w, 1)
    tokens = [bytes([b]) for b in range(256)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    while len(tokens) < size and heap:
        n, pair = heapq.heappop(heap)
        if -n != counts[pair]:  # counted before other merges changed it: back with the right number
            if counts[pair] > 0:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        union = tokens[pair[0]] + tokens[pair[1]]
        new = ranks.setdefault(union, len(tokens))  # (a, bc) and (ab, c) are the same token
        if new == len(tokens):
            tokens.append(union)
        changed = where.pop(pair)
        for w in changed:
            count(w, -1)
            words[w] = merge(words[w], pair, new)
            count(w, 1)
        for p in {p for w in changed for p in zip(words[w], words[w][1:]) if new in p}:
            heapq.heappush(heap, (-counts[p], p))
    return ranks


def merge(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    out, i = [], 0
    while i < len(word):
        both = i + 1 < len(word) and word[i] == pair[0] and word[i + 1] == pair[1]
        out.append(new if both else word[i])
        i += 1 + both
    return out


def new_tokenizer(config: Config, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that a config asks for; `texts` is read only to train one."""
    kind, _, name = config.tokenizer.partition(":")
    added = CRYSTAL_TOKENS if config.crystal_tokens else []
    if kind == "data":
        tokenizer = load_tokenizer(name)
    elif kind == "llama":
        if not os.path.isfile(name):
            raise SystemExit(f"tokenizer: there is no file {name}; llama:PATH needs the path of"
                             " LLaMA's tokenizer.json or tokenizer.model.")
        tokenizer = LlamaTokenizer(name)
    elif kind == "tiktoken":
        try:
            named = tiktoken.get_encoding(name)
        except ValueError:
            raise SystemExit(f"tokenizer: tiktoken has no encoding {name!r}; it has"
                             f" {', '.join(tiktoken.list_encoding_names())}.") from None
        except OSError as error:  # which the exceptions of requests are
            raise SystemExit(f"tokenizer: tiktoken cannot download {name!r}"
                             f" ({type(error).__name__}); without a network take"
                             ' "bpe" or "llama:PATH".') from None
        tokenizer = Tokenizer(config.tokenizer, named._mergeable_ranks, named._pat_str,
                              named._special_tokens)
    else:
        specials = [EOT, *added]
        if config.vocab_size < 256 + len(specials):
            raise SystemExit(f"vocab_size is {config.vocab_size}, but a byte-level tokenizer needs"
                             f" {256 + len(specials)} or more: the 256 bytes and the end of a"
                             f" document{', and the 22 crystal_tokens' if added else ''}.")
        ranks = train_bpe(texts, config.vocab_size - len(specials))
        tokenizer = Tokenizer("bpe", ranks, BPE_PATTERN, {EOT: len(ranks)})
    if added:
        tokenizer = tokenizer.add(added)
    if missing := [t for t in FIM_TOKENS if config.fim_rates and t not in tokenizer.specials]:
        raise SystemExit(f"fim_rates: the tokenizer {config.tokenizer} has no {missing[0]};"
                         " set crystal_tokens = True.")
    if tokenizer.n_vocab > config.vocab_size:
        raise SystemExit(f"vocab_size is {config.vocab_size}, but the tokenizer {config.tokenizer}"
                         f" has {tokenizer.n_vocab} ids: set vocab_size to at least that.")
    return tokenizer


@functools.lru_cache(maxsize=4)
def read_tokenizer(directory: Path, info: str) -> Tokenizer:
    """A saved tokenizer; info: the manifest's entry for it, as JSON."""
    entry = json.loads(info)
    path = directory / entry["file"]
    if path.suffix != ".tiktoken":
        tokenizer: Tokenizer = LlamaTokenizer(str(path))
    else:
        # not tiktoken's own reader: it caches by path, and would give what was trained before
        lines = (line.split() for line in path.read_bytes().splitlines())
        ranks = {base64.b64decode(piece): int(rank) for piece, rank in lines}
        tokenizer = Tokenizer(entry["kind"], ranks, entry["pattern"], entry["specials"])
    return tokenizer.add(entry["added"]) if "added" in entry else tokenizer


# ---- readers: files to documents


def repair(text: str) -> str:
    """The text; what UTF-8 cannot say (lone surrogates) replaced by U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def find_files(source: str, pattern: str) -> tuple[list[str], Counter[str]]:
    """The files of a path, glob or folder, sorted, and how many were passed over, by reason."""
    found, skipped = sorted(glob.glob(os.path.expanduser(pattern), recursive=True)), Counter()
    files: dict[str, None] = {}  # a set in order: a glob can match a folder and what is in it
    for path in found:
        if not os.path.isdir(path):
            files[path] = None
            continue
        for folder, folders, names in os.walk(path):
            skipped["hidden file or folder"] += sum(n.startswith(".") for n in folders + names)
            folders[:] = sorted(n for n in folders if not n.startswith("."))
            files |= dict.fromkeys(os.path.join(folder, n) for n in sorted(names) if n[0] != ".")
    if not files:
        reason = "there is no file in the folder" if found else "no file matches"
        raise SystemExit(f"source {source!r}: {reason} {pattern}.")
    return list(files), +skipped


def optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise SystemExit(f"this input needs {package}: pip install {package}") from None


def decompress(raw: BinaryIO, path: str) -> BinaryIO:
    if path.endswith(".gz"):
        return gzip.open(raw)
    if path.endswith(".zst"):
        stream = optional("zstandard").ZstdDecompressor().stream_reader(
            raw, read_across_frames=True, closefd=False)
        return io.BufferedReader(stream, 1 << 20)
    return raw


def naming(path: str, items: Iterator) -> Iterator:
    """What a reader gives, its errors as a sentence: every decompressor has kinds of its own."""
    try:
        yield from items
    except Exception as error:
        raise SystemExit(f"{path}: cannot be read: {error or type(error).__name__}.") from None


def read_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of a file."""
    done = 0
    with open(path, "rb") as raw:
        for number, line in enumerate(decompress(raw, path), 1):
            if raw.tell() - done > 1 << 20:
                report(raw.tell() - done)
                done = raw.tell()
            yield number, line
        report(raw.tell() - done)


def read_documents(path: str, on_bad_row: str, notes: Counter[str]) -> Iterator[str]:
    """The documents of a file, valid, not empty; `notes` counts what was left out, by reason."""
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


def read_text(path: str, notes: Counter[str]) -> Iterator[str]:
    with open(path, "rb") as raw:
        stream = decompress(raw, path)
        head = stream.read(8192)
        if b"\0" in head:  # which text has not, and pictures, archives and programs have
            notes["binary file"] += 1
        else:
            # surrogateescape makes invalid bytes lone surrogates, which `repair` replaces
            yield (head + stream.read()).decode("utf-8", "surrogateescape").removeprefix("\ufeff")
        report(os.path.getsize(path))


def read_jsonl(path: str, on_bad_row: str, notes: Counter[str]) -> Iterator[str]:
    for number, line in read_lines(path):
        try:
            row = json.loads(line.decode("utf-8", "surrogateescape"))
        except (ValueError, RecursionError):
            bad_row(path, number, "not JSON", line[:40], on_bad_row, notes)
            continue
        # RedPajama, C4 and SlimPajama have "text", RefinedWeb and StarCoder "content"
        text = row.get("text", row.get("content")) if isinstance(row, dict) else None
        if isinstance(text, str):
            yield text
        else:
            bad_row(path, number, 'no string "text" or "content"', line[:40], on_bad_row, notes)


def read_parquet(path: str, notes: Counter[str]) -> Iterator[str]:
    file = optional("pyarrow.parquet").ParquetFile(path)
    names = file.schema_arrow.names
    column = next((name for name in ("text", "content") if name in names), None)
    if column is None:
        raise SystemExit(f"{path} has no column text or content, but {', '.join(names)}.")
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

# Stand-ins for Amber's seven sources, and how many bytes are taken of each: 30 % code (Amber:
# 23 %), the rest English. "stackexchange" is docstrings with examples, "arxiv" those with formulas,
# "book" the longest, "refinedweb" the others; "wikipedia" is Python's language reference, "c4" the
# READMEs and licences of packages. The last three are thin, but real, and there: IDLE's long .txt
# files would be more like a book, and Debian and conda leave them out.
CORPUS = {"starcoder": 3_800_000, "stackexchange": 2_900_000, "refinedweb": 3_300_000,
          "arxiv": 1_200_000, "c4": 350_000, "wikipedia": 450_000, "book": 350_000}
# only what requirements.txt always brings: whatever else is installed must not change the data
PACKAGES = """numpy torch sympy networkx mpmath jinja2 markupsafe fsspec filelock tqdm tiktoken
    regex requests urllib3 idna certifi charset-normalizer typing_extensions""".split()
# tests and IDLE are absent from some distributions; the rest is tables, or other people's packages
SKIP_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings",
                "lib2to3", "pydoc_data", "_vendor", "__pycache__"}
# these, and folders config-*, say where and how this very copy was built
SKIP_FILES = re.compile("_sysconfig|__config__|version")
DOCSTRING = re.compile(r':\n\s+[rR]?"""(.+?)"""|add_docstr\([^"]{,200}?[rR]?"""(.+?)"""', re.S)
GENERATED = re.compile(r"generated (by|from|with|automatically)|auto-?generated|do not edit", re.I)


def write_corpus(plan: "Plan", _: Any) -> dict[str, int]:
    """Extract the embedded corpus to work/corpus/SOURCE.jsonl; returns bytes by source."""
    texts: dict[str, list[str]] = {name: [] for name in CORPUS}
    size: Counter[str] = Counter()
    seen: set[str] = set()

    def take(source: str, text: str) -> None:
        """Keep a document, without the paragraphs that came before (licences, parameters)."""
        if size[source] >= CORPUS[source]:
            return
        parts = [(" ".join(p.split()), p) for p in text.split("\n\n")]
        fresh = [p for key, p in parts if len(key) < 60 or not (key in seen or seen.add(key))]
        text = "\n\n".join(fresh).strip() + "\n"
        whole = " ".join(text.split())
        if len(text) >= 200 and whole not in seen:
            seen.add(whole)
            texts[source].append(text)
            size[source] += len(text.encode())

    for text in package_texts():
        take("c4", text)
    for _, text in sorted(python_topics().items()):
        take("wikipedia", text)
    for key, path in python_files():
        if all(size[s] >= CORPUS[s] for s in CORPUS if s not in ("c4", "wikipedia")):
            break
        code = path.read_text(encoding="utf-8", errors="replace")
        # a file gives its code or its docstrings, so that no text is in two sources
        if key % 8 == 0:
            if len(code) < 150_000 and not GENERATED.search(code[:2000]) and not is_table(code):
                take("starcoder", code)
            continue
        for match in DOCSTRING.finditer(code):
            text = inspect.cleandoc(match[1] or match[2])
            take("arxiv" if ":math:" in text or "$" in text else
                 "stackexchange" if ">>>" in text else
                 "book" if len(text) > 3000 else "refinedweb", text)
    for source, documents in texts.items():
        with writing(plan, plan.work / "corpus" / f"{source}.jsonl") as file:
            file.writelines(json.dumps({"text": t}).encode() + b"\n" for t in documents)
    return {name: size[name] for name in CORPUS if size[name]}


def python_files() -> list[tuple[int, Path]]:
    """(key, path) of the files of the standard library and of PACKAGES, sorted by key: a hash of
    the name, so that any beginning of the list is a mixture."""
    roots = {"python": Path(sysconfig.get_path("stdlib"))}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name.replace("-", "_"))  # finds, does not import
        if spec and spec.submodule_search_locations:
            roots[name] = Path(spec.submodule_search_locations[0])
    found = []
    for name, root in roots.items():
        for folder, folders, files in os.walk(root):
            folders[:] = [f for f in folders
                          if f not in SKIP_FOLDERS and not f.startswith("config-")]
            for path in (Path(folder, f) for f in files if f.endswith(".py")):
                full = f"{name}/{path.relative_to(root).as_posix()}"
                if not SKIP_FILES.match(path.name):
                    found.append((zlib.crc32(full.encode()), full, path))
    return [(key, path) for key, _, path in sorted(found)]


def is_table(code: str) -> bool:
    """Whether a file is data rather than code: many digits, or very long lines."""
    digits = sum(map(code.count, "0123456789"))
    return digits > 0.08 * len(code) or max(map(len, code.splitlines()), default=0) > 400


def package_texts() -> Iterator[str]:
    """READMEs (which are the body of METADATA) and licences of PACKAGES."""
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            for file in sorted(importlib.metadata.distribution(name).files or [], key=str):
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

    @functools.cached_property
    def row(self) -> np.dtype:
        return row_dtype(self.config.seq_len, self.tokenizer.n_vocab)


def row_dtype(seq_len: int, n_vocab: int) -> np.dtype:
    """A row: Amber's {"token_ids": [...], "source": ...} in binary."""
    ids = "<u2" if n_vocab <= 1 << 16 else "<u4"
    return np.dtype([("source", "u1"), ("token_ids", ids, (seq_len + 1,))])


@contextlib.contextmanager
def writing(plan: Plan, path: Path) -> Iterator[BinaryIO]:
    """A file that has its name only when it is whole."""
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


_counter: Any = None  # [bytes read, tokens written, stop!] of this stage, shared with the workers


def report(read: int, tokens: int = 0) -> None:
    """Tell the progress bar; and learn that another worker has failed."""
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
    # a worker would outlive a parent that was killed
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@contextlib.contextmanager
def progress(plan: Plan, title: str, total: int) -> Iterator[Any]:
    """The counter, while a bar shows what it counts; in the end a line with the speed."""
    global _counter
    _counter = multiprocessing.get_context("spawn").Array("q", 3)
    began, over = time.time(), threading.Event()
    bar = tqdm(total=total, desc=title, unit="B", unit_scale=True, leave=False,
               disable=True if plan.rank or not total else None)

    def show() -> None:
        while not over.wait(0.2):
            speed = _counter[1] / (time.time() - began) / 1e6
            bar.set_postfix_str(f"{speed:.2f}M tokens/s", refresh=False)
            bar.update(_counter[0] - bar.n)
    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield _counter
    finally:
        over.set()
        thread.join()
        bar.close()
    mb, million, seconds = _counter[0] / 1e6, _counter[1] / 1e6, max(1e-3, time.time() - began)
    if million and not plan.rank:
        print(f"{title}: {mb:.1f} MB, {million:.2f}M tokens in {seconds:.1f} s"
              f" ({mb / seconds:.1f} MB/s, {million / seconds:.2f}M tokens/s)")


def run_units(plan: Plan, stage: str, do: Callable, units: list, total: int = 0) -> list[Any]:
    """do(plan, unit) -> JSON for every unit, once, by one process of one rank; all results.

    A result is a file: what was done before a run was killed is not done again, and the ranks
    learn of each other's work through nothing else. total: bytes, for the progress bar.
    """
    marks = [plan.work / stage / f"{i:05}.json" for i in range(len(units))]
    mine = [i for i in range(plan.rank, len(units), plan.world) if not marks[i].exists()]
    workers = min(plan.workers, len(mine))
    if not plan.config.workers and total < 4 * UNIT_BYTES:
        workers = 1  # to start processes would take longer
    job = functools.partial(run_unit, plan, do)
    arguments = [marks[i] for i in mine], [units[i] for i in mine]
    with progress(plan, stage, total) as counter:
        if workers <= 1:
            list(map(job, *arguments))
        else:
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(workers, spawn, start_worker, (counter,)) as pool:
                try:
                    # in the order of the units: of several errors the first is the one told
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
    """The result of a unit, when the rank that does it has done it."""
    began = time.monotonic()
    while True:
        try:
            return json.loads(mark.read_text())
        except FileNotFoundError:
            if plan.rank and Path(plan.config.data_dir, "manifest.json").exists():
                raise SystemExit(0) from None  # all is done, and the results are swept away
            if time.monotonic() - began > PATIENCE:
                raise SystemExit(f"rank {plan.rank} waited {PATIENCE} s for {mark}, which another"
                                 " rank makes: does it still run, on the same file system?"
                                 ) from None
            time.sleep(0.1)


# ---- stage 1: a tokenizer


def make_tokenizer(plan: Plan, files: dict[str, list[str]]) -> dict[str, Any]:
    return new_tokenizer(plan.config, sample(plan.config, files)).save(plan.tmp)


def sample(config: Config, files: dict[str, list[str]]) -> Iterator[str]:
    """About SAMPLE_BYTES of text, of each source in proportion: the beginnings of many files."""
    sizes = {name: sum(map(os.path.getsize, paths)) for name, paths in files.items()}
    if config.max_source_bytes:
        sizes = {name: min(size, config.max_source_bytes) for name, size in sizes.items()}
    for name, paths in files.items():
        budget = SAMPLE_BYTES * sizes[name] // max(1, sum(sizes.values()))
        for i in np.random.default_rng(config.seed).permutation(len(paths)):
            left = min(budget, max(1 << 20, SAMPLE_BYTES // len(paths)))
            for text in read_documents(paths[i], config.on_bad_row, Counter()):
                if left <= 0:
                    break
                yield text[:left]
                used = min(len(text), left)
                left, budget = left - used, budget - used
            if budget <= 0:
                break


# ---- stage 2: files to parts, flat runs of tokens (of rows, when the input is tokenized already)


def plan_units(config: Config, files: dict[str, list[str]]) -> list[tuple[int, str, list[str]]]:
    """(index, source, files) of each unit of work, the same whoever does it."""
    units: list[tuple[int, str, list[str]]] = []
    for name, paths in files.items():
        room = 0.0
        for path in paths:
            if room <= 0 or config.tokenized:
                units.append((len(units), name, []))
                # where to stop is known only to one who reads a source from its beginning
                room = math.inf if config.max_source_bytes else UNIT_BYTES
            units[-1][2].append(path)
            room -= os.path.getsize(path)
    return units


def encode_unit(plan: Plan, unit: tuple[int, str, list[str]]) -> dict[str, Any]:
    """Files to one part: an EOS after every document, nothing before it (as Amber).

    What becomes of a document beyond that (left out, held out whole in a part of its own,
    written for infilling) follows from its text and the settings, whoever reads it and when.
    """
    index, source, paths = unit
    c, tokenizer, dtype = plan.config, plan.tokenizer, plan.row["token_ids"].base
    half, fim_rate = c.source_halves.get(source), c.fim_rates.get(source, 0)
    eos = np.array([tokenizer.eos_id], dtype).tobytes()
    documents = size = tokens = held_tokens = read = 0
    notes: Counter[str] = Counter()
    texts = itertools.chain.from_iterable(
        read_documents(path, c.on_bad_row, notes) for path in paths)
    with (writing(plan, part_path(plan, index)) as file,
          writing(plan, part_path(plan, ~index)) as held_file):
        for text in texts:
            data = text.encode()
            key = zlib.crc32(data)
            held = c.valid_documents and key // 2 % c.valid_documents == 0
            if half and not held and half != ("even", "odd")[key % 2]:
                continue
            ids = tokenizer.encode(text)
            if held:
                held_file.write(ids.astype(dtype).tobytes() + eos)
                held_tokens += len(ids) + 1
            else:
                if fim_rate:
                    random = np.random.default_rng([c.seed, key])
                    ids = infilling(ids, tokenizer, fim_rate, c.fim_spm_rate, random)
                file.write(ids.astype(dtype).tobytes() + eos)
                documents, size = documents + 1, size + len(data)
                tokens += len(ids) + 1
            report(0, len(ids) + 1)
            read += len(data)
            if c.max_source_bytes and read >= c.max_source_bytes:
                break
    return {"source": source, "documents": documents, "bytes": size, "tokens": tokens,
            "held_tokens": held_tokens, "repaired": notes.pop("repaired", 0),
            "dropped": +notes}


def infilling(ids: np.ndarray, tokenizer: Tokenizer, rate: float, spm_rate: float,
              random: np.random.Generator) -> np.ndarray:
    """A document's ids, (n,), at `rate` cut in three and written with the middle last.

    Bavarian et al. 2022: prefix-suffix-middle, <PRE> prefix <SUF> suffix <MID> middle, or at
    `spm_rate` suffix-prefix-middle in the form that shares its tokens with the other (there
    "variant 2"), <PRE> <SUF> suffix <MID> prefix middle. Cut between tokens, anywhere, and
    nothing is encoded anew: what is before <SUF>, after <MID> and between is the document.
    """
    if random.random() >= rate:
        return ids
    first, second = np.sort(random.integers(len(ids) + 1, size=2))
    prefix, middle, suffix = ids[:first], ids[first:second], ids[second:]
    pre, mid, suf = ([tokenizer.specials[name]] for name in FIM_TOKENS)
    if random.random() < spm_rate:
        prefix, middle = ids[:0], ids[:second]
    return np.concatenate([pre, prefix, suf, suffix, mid, middle])


def part_path(plan: Plan, index: int) -> Path:
    """The part of a unit, or for ~index (negative) the documents of it that are held out."""
    return plan.work / "parts" / f"{index:05}.bin"


class BadRow(ValueError):
    """(reason, what was found)"""


def parse_rows(lines: list[bytes], width: int, n_vocab: int) -> tuple[np.ndarray, list[str]]:
    """Released rows to ids, (n, width), and sources; raises BadRow for the first that is bad."""
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
    except ValueError:  # a list among the ids
        ids = np.empty(0)
    # to NumPy true is 1, so look for the word; only a row under suspicion is read id by id
    strange = ids.dtype.kind != "i" or ids.ndim != 2 or any(b"true" in x or b"false" in x
                                                            for x in lines)
    if strange or ids.min() < 0 or ids.max() >= n_vocab:
        for i in itertools.chain.from_iterable(found):
            if type(i) is not int:
                raise BadRow("an id that is not a whole number", i)
            if not 0 <= i < n_vocab:
                raise BadRow(f"an id outside the vocabulary of {n_vocab}", i)
    return ids, [row["source"] for row in rows]


def convert_unit(plan: Plan, unit: tuple[int, str, list[str]]) -> dict[str, Any]:
    """One file of released rows to one part, in file order; sources are numbered as they come."""
    index, _, [path] = unit
    width, n_vocab = plan.config.seq_len + 1, plan.tokenizer.n_vocab
    names: dict[str, int] = {}
    counts: Counter[int] = Counter()
    notes: Counter[str] = Counter()
    numbered = naming(path, read_lines(path))
    with writing(plan, part_path(plan, index)) as file:
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
                numbers = [names.setdefault(s, len(names)) for s in sources]
                # more than 256 names are refused when all are known
                out["token_ids"], out["source"] = ids, np.array(numbers, np.int64).astype(np.uint8)
                counts.update(numbers)
                file.write(out.tobytes())
                report(0, ids.size)
    return {"file": os.path.basename(path).split(".")[0], "names": list(names),
            "rows": [counts[i] for i in range(len(names))], "dropped": +notes}


# ---- stage 3: which row goes where


def shares(counts: list[int], cap: int) -> list[int]:
    """Counts cut to `cap` in all, every one in proportion (largest remainder); 0 = no cap."""
    total = sum(counts)
    if not cap or total <= cap:
        return counts
    cut = [n * cap // total for n in counts]
    first = sorted(range(len(counts)), key=lambda i: (-(counts[i] * cap % total), i))
    for i in first[:cap - sum(cut)]:
        cut[i] += 1
    return cut


def layout_text(plan: Plan, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per source: its parts, its rows, and how many of them each chunk gets."""
    c, width, sources = plan.config, plan.config.seq_len + 1, []
    for name in dict.fromkeys(p["source"] for p in parts):
        mine = [(i, p) for i, p in enumerate(parts) if p["source"] == name]
        total = {k: sum(p[k] for _, p in mine)
                 for k in ("documents", "bytes", "tokens", "repaired")}
        held_tokens = sum(p["held_tokens"] for _, p in mine)
        dropped = sum((Counter(p["dropped"]) for _, p in mine), Counter())
        if not total["documents"]:
            reasons = ", ".join(f"{n} x {reason}" for reason, n in dropped.items())
            raise SystemExit(f"source {name!r} has no documents: {reasons or 'nothing to read'}.")
        rows, times = total["tokens"] // width, c.source_weights.get(name, 1)
        train = rows - n_held_rows(c)
        # a weight of 2.5 is every row twice, and then half of them
        dealt = int(times) * train + round(times % 1 * train)
        if train < 0 or (times and dealt < c.n_chunks):
            least = c.valid_rows + (math.ceil(c.n_chunks / times) if times else 0)
            raise SystemExit(
                f"source {name!r} is too small: {total['tokens']} tokens make {rows} rows of"
                f" {width}; valid_rows = {c.valid_rows} and n_chunks = {c.n_chunks} need {least}"
                f" (weight {times}). Give more text, or lower valid_rows or n_chunks.")
        if c.valid_documents and held_tokens < width:
            raise SystemExit(f"source {name!r}: valid_documents = {c.valid_documents} holds"
                             f" out {held_tokens} tokens, and a row has {width}: lower it.")
        sources.append({"name": name, **total, "rows": rows, "tail_tokens": total["tokens"] % width,
                        "times": times, "dealt": dealt, "dropped": dropped,
                        "parts": [(i, p["tokens"]) for i, p in mine],
                        "held_parts": [(~i, p["held_tokens"]) for i, p in mine],
                        "held_rows": held_tokens // width})
    # every chunk gets the same of every source, as in Amber; what does not divide is left out
    cut = shares([s["dealt"] // c.n_chunks for s in sources], c.rows_per_chunk)
    for source, share in zip(sources, cut):
        source["rows_in_chunk"] = share
    if c.canaries:
        n = sum(times * rows for times, rows in c.canaries.items())
        if "canary" in (s["name"] for s in sources) or n < c.n_chunks:
            raise SystemExit(f"canaries: {n} rows for {c.n_chunks} chunks, under the name canary:"
                             " plant at least one for each chunk, and name no source so.")
        sources.append({"name": "canary", "documents": 0, "bytes": 0, "tokens": n * width,
                        "repaired": 0, "rows": n, "tail_tokens": 0, "times": 1, "dealt": n,
                        "dropped": {}, "parts": [], "rows_in_chunk": n // c.n_chunks})
    if not sum(cut):
        raise SystemExit("source_weights leave nothing to train on: one must be above 0.")
    return sources


def layout_released(plan: Plan, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sources of released rows, numbered as they first appear over the files in their order."""
    rows: Counter[str] = Counter()
    for i, part in enumerate(parts):
        if not part["names"]:
            raise SystemExit(f"file {i} (from 0) of the released chunks has no good row.")
        rows.update(dict(zip(part["names"], part["rows"])))
    return [{"name": name, "rows": n, "tokens": n * (plan.config.seq_len + 1)}
            for name, n in rows.items()]


def n_held_rows(config: Config) -> int:
    """Rows held out of the very stream that is trained on: none if whole documents are."""
    return 0 if config.valid_documents else config.valid_rows


def valid_ids(config: Config, s: int, rows: int) -> np.ndarray:
    """Ids of the rows of source s that are held out, ascending."""
    rng = np.random.default_rng([config.seed, s])
    return np.sort(rng.choice(rows, n_held_rows(config), replace=False))


def chunk_ids(config: Config, s: int, source: dict[str, Any], chunk: int) -> np.ndarray:
    """Ids of the rows of source s in a chunk: dealt round-robin, as Amber (mix_and_split.py).

    Arithmetic rather than a list of all rows, so that a source of any size takes no memory.
    """
    n, train = config.n_chunks, source["rows"] - n_held_rows(config)
    row = chunk + n * np.arange(source["rows_in_chunk"])
    # rows_per_chunk takes evenly from the whole source; without it this changes nothing
    row = row * (source["dealt"] // n) // max(1, source["rows_in_chunk"])
    # so does the fraction of a weight, after its whole times
    whole = int(source["times"]) * train
    part = (row - whole) * train // max(1, source["dealt"] - whole)
    row = np.where(row < whole, row % train, part)
    held = valid_ids(config, s, source["rows"])
    # so far a number among the rows that are not held out: step over those that are
    return row + np.searchsorted(held - np.arange(len(held)), row, side="right")


# ---- stage 4: chunks


def gather(plan: Plan, parts: list[tuple[int, int]], rows: np.ndarray) -> np.ndarray:
    """Rows (n, seq_len + 1) of the stream that parts (index, tokens) make one after another."""
    width, dtype = plan.config.seq_len + 1, plan.row["token_ids"].base
    ends = np.cumsum([tokens for _, tokens in parts])
    first = np.searchsorted(ends, rows * width, "right")
    last = np.searchsorted(ends, rows * width + width - 1, "right")
    out = np.empty((len(rows), width), dtype)
    for p in range(first.min(), last.max() + 1):
        index, tokens = parts[p]
        if not tokens:
            continue
        part = np.memmap(part_path(plan, index), dtype, "r")
        begin = ends[p] - tokens
        head = int(-begin % width)  # the end of a row that began in the part before
        whole = part[head:head + max(0, tokens - head) // width * width].reshape(-1, width)
        inside = (first == p) & (last == p)
        out[inside] = whole[rows[inside] - (begin + head) // width]
        for k in np.flatnonzero((first <= p) & (last >= p) & ~inside):  # rows over two parts
            at = int(rows[k] * width - begin)
            low, high = max(at, 0), min(at + width, tokens)
            out[k, low - at:high - at] = part[low:high]
    return out


def write_rows(plan: Plan, path: Path, n_rows: int, blocks: Iterable[np.ndarray]) -> None:
    """A .npy of rows, block by block: a full disk is an error here, and kills a memory map."""
    if path.exists():  # whole, and of a run that was stopped just then
        return
    header = {"descr": np.lib.format.dtype_to_descr(plan.row), "fortran_order": False,
              "shape": (n_rows,)}
    with writing(plan, path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(block.tobytes())
            report(block.nbytes, block["token_ids"].size)


def text_blocks(plan: Plan, s: int, parts: list, ids: np.ndarray) -> Iterator[np.ndarray]:
    for at in range(0, len(ids), BLOCK):
        block = np.empty(len(ids[at:at + BLOCK]), plan.row)
        block["source"] = s
        block["token_ids"] = gather(plan, parts, ids[at:at + BLOCK])
        yield block


def canary_blocks(plan: Plan, counts: dict[str, int], chunk: int) -> Iterator[np.ndarray]:
    """The planted rows of a chunk: all copies in one drawn order, dealt round-robin."""
    if "canary" in counts:
        copies = np.concatenate([np.repeat(rows, times, axis=0)
                                 for times, rows in canaries(settings(plan.config)).items()])
        order = np.random.default_rng([plan.config.seed, 1, 64]).permutation(len(copies))
        mine = order[chunk::plan.config.n_chunks][:counts["canary"]]
        block = np.empty(len(mine), plan.row)
        block["source"], block["token_ids"] = len(counts) - 1, copies[mine]
        yield block


@functools.lru_cache(maxsize=1)
def read_layout(mark: Path) -> Any:
    return json.loads(mark.read_text())


def write_text_unit(plan: Plan, unit: tuple[str, int]) -> dict[str, Any]:
    """One chunk, source after source as in Amber's; or the held-out rows of one source."""
    kind, index = unit
    sources = read_layout(plan.work / "layout" / "00000.json")
    if kind == "valid":
        source, path = sources[index], plan.tmp / "valid" / f"{sources[index]['name']}.npy"
        parts, ids = source["parts"], valid_ids(plan.config, index, source["rows"])
        if plan.config.valid_documents:
            parts, rows = source["held_parts"], source["held_rows"]
            n = min(rows, plan.config.valid_rows)
            ids = np.arange(n) * rows // max(1, n)  # evenly from all of them
        write_rows(plan, path, len(ids), text_blocks(plan, index, parts, ids))
        return entry(plan, path, source=source["name"], rows=len(ids))
    path = plan.tmp / "train" / f"chunk_{index:03}.npy"
    counts = {s["name"]: s["rows_in_chunk"] for s in sources}
    blocks = (text_blocks(plan, s, source["parts"], chunk_ids(plan.config, s, source, index))
              for s, source in enumerate(sources) if source["parts"])
    write_rows(plan, path, sum(counts.values()), itertools.chain(
        itertools.chain.from_iterable(blocks), canary_blocks(plan, counts, index)))
    return entry(plan, path, rows=sum(counts.values()), sources=counts)


def entry(plan: Plan, path: Path, **more: Any) -> dict[str, Any]:
    return {"file": path.relative_to(plan.tmp).as_posix(), **more, "sha256": sha256(path)}


def write_released_unit(plan: Plan, unit: tuple[str, int, list[tuple[int, list[int]]]]) -> Any:
    """One chunk = one released file, rows in file order; or the held-out rows of one source.

    unit: (kind, chunk or source, [(part, the number of each of the part's own sources)]).
    """
    kind, index, parts = unit
    names = [s["name"] for s in read_layout(plan.work / "layout" / "00000.json")]
    train = kind == "train"
    path = plan.tmp / (f"train/chunk_{index:03}.npy" if train else f"valid/{names[index]}.npy")
    if not path.exists():
        rows = [np.memmap(part_path(plan, part), plan.row, "r") for part, _ in parts]
        source = np.concatenate([np.array(table, np.uint8)[r["source"]]
                                 for r, (_, table) in zip(rows, parts)])
        ends = np.cumsum([0, *map(len, rows)])
        where = [np.flatnonzero(source == s) for s in (range(len(names)) if train else [index])]
        cap = plan.config.rows_per_chunk if train else plan.config.valid_rows
        # fewer rows than there are: of every source its share, evenly from all of it
        keep = np.sort(np.concatenate([w[np.arange(n) * len(w) // max(1, n)] for w, n in zip(
            where, shares([len(w) for w in where], cap))]))

        def blocks() -> Iterator[np.ndarray]:
            for r, begin, end in zip(rows, ends, ends[1:]):
                mine = keep[(keep >= begin) & (keep < end)]
                for at in range(0, len(mine), BLOCK):
                    block = r[mine[at:at + BLOCK] - begin]
                    block["source"] = source[mine[at:at + BLOCK]]
                    yield block
        write_rows(plan, path, len(keep), blocks())
    saved = np.load(path, mmap_mode="r")
    if not train:
        return entry(plan, path, source=names[index], rows=len(saved))
    part_path(plan, index).unlink(missing_ok=True)  # 7 GB, for each of Amber's
    counts = np.bincount(saved["source"], minlength=len(names)).tolist()
    return entry(plan, path, rows=len(saved), sources=dict(zip(names, counts)))


def write_all(plan: Plan, sources: list[dict], parts: list[dict]) -> list[dict[str, Any]]:
    """Every chunk, then the held-out rows of every source."""
    n, names = plan.config.n_chunks, [source["name"] for source in sources]
    size = plan.row.itemsize * sum(source["rows"] for source in sources)
    if not plan.config.tokenized:
        units = [("train", i) for i in range(n)]
        units += [("valid", s) for s, source in enumerate(sources)
                  if plan.config.valid_rows and source["parts"]]
        return run_units(plan, "write", write_text_unit, units, size)
    tables = [(i, [names.index(name) for name in part["names"]]) for i, part in enumerate(parts)]
    held = {name for part in parts[n:] for name in part["names"]}
    units = [("train", i, [tables[i]]) for i in range(n)]
    units += [("valid", s, tables[n:]) for s, name in enumerate(names) if name in held]
    return run_units(plan, "write", write_released_unit, units, size)


# ---- the whole


def find_inputs(config: Config) -> tuple[dict[str, list[str]], Counter[str]]:
    """Files by source (released ones: by "train" and "valid"), and what was passed over."""
    for name in config.sources:
        check_name(name)
    if not config.tokenized:
        found = {name: find_files(name, pattern) for name, pattern in config.sources.items()}
        skipped = sum((skips for _, skips in found.values()), Counter())
        return {name: files for name, (files, _) in found.items()}, skipped
    if config.tokenizer == "bpe":
        raise SystemExit("tokenized rows need the tokenizer that made them, as tokenizer ="
                         ' "llama:PATH": "bpe" would train a new one.')
    train = find_files("tokenized", config.tokenized)[0]
    if len(train) < config.n_chunks:
        raise SystemExit(f"tokenized: {config.tokenized} matches {len(train)} files, but n_chunks"
                         f" is {config.n_chunks}, and a file makes a chunk: take"
                         f" --n_chunks={len(train)}.")
    held = config.tokenized_valid
    return {"train": train[:config.n_chunks],
            "valid": find_files("tokenized_valid", held)[0] if held else []}, Counter()


def check_name(name: str) -> None:
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise SystemExit(f"{name!r} cannot name a source, because it names a file too: use"
                         " letters, digits and . _ + -")


def settings(config: Config) -> dict[str, Any]:
    default = Config()
    return {name: getattr(config, name) for name in SETTINGS + CRYSTAL_SETTINGS
            if name in SETTINGS or getattr(config, name) != getattr(default, name)}


def versions() -> dict[str, str]:
    """Python and the packages that decide the bytes of the data, the embedded corpus above all."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def inputs_of(files: dict[str, list[str]]) -> str:
    """A fingerprint of the names and sizes of the input files."""
    return fingerprint([(path, os.path.getsize(path)) for path in itertools.chain(*files.values())])


def prepare(config: Config, rank: int = 0, world: int = 1) -> None:
    """Make the data set of a config, or go on with it; nothing if it is there already.

    rank, world: of the processes that share the work, through nothing but the file system.
    """
    data_dir = Path(config.data_dir)
    if data_dir.exists() and any(data_dir.iterdir()):
        return finished(config)
    files, skipped = find_inputs(config)
    names = set(files or CORPUS)
    for setting in ("source_weights", "source_halves", "fim_rates"):
        if strangers := sorted(set(getattr(config, setting)) - names):
            raise SystemExit(f"{setting} names {strangers}, but the sources are"
                             f" {sorted(names)}.")
    kind, _, tokenizer = config.tokenizer.partition(":")
    if kind == "data":
        tokenizer = os.path.join(tokenizer, "manifest.json")
    stats = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns)
             for path in itertools.chain(*files.values(), [tokenizer]) if os.path.exists(path)]
    # what was begun with other settings or other inputs must not be gone on with
    key = fingerprint([VERSION, settings(config), stats, files or versions()])[:8]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = config.workers or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    tmp = data_dir.with_name(f"{data_dir.name}.{key}.tmp")
    plan = Plan(config, tmp, rank, world, workers)
    with contextlib.nullcontext() if rank else only_one(plan):
        make(plan, files, skipped)


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
                raise SystemExit(f"another process is preparing {plan.config.data_dir}, in {tmp}:"
                                 " wait for it, or stop it and run the same command again."
                                 ) from None
            if tmp != plan.tmp:
                shutil.rmtree(tmp)
        yield


def make(plan: Plan, files: dict[str, list[str]], skipped: Counter[str]) -> None:
    """The stages, one after the other; every rank does its share of each."""
    config, inputs = plan.config, inputs_of(files)
    if not (plan.tmp / "manifest.json").exists():
        if not files:
            size, = run_units(plan, "corpus", write_corpus, [None])
            files = {name: [str(plan.work / "corpus" / f"{name}.jsonl")] for name in size}
        tokenizer, = run_units(plan, "tokenizer", make_tokenizer, [files])
        size = sum(os.path.getsize(path) for paths in files.values() for path in paths)
        parts = run_units(plan, "encode", convert_unit if config.tokenized else encode_unit,
                          plan_units(config, files), size)
        layout = layout_released if config.tokenized else layout_text
        sources, = run_units(plan, "layout", layout, [parts])
        if len(sources) > 256:
            raise SystemExit(f"there are {len(sources)} sources; a row has one byte for it: 256.")
        for source in sources:
            check_name(source["name"])
        written = write_all(plan, sources, parts)
        if plan.rank:
            return collect(plan, plan.work / "never")  # until rank 0 has finished
        manifest = describe(plan, tokenizer, sources, parts, written, skipped)
        with writing(plan, plan.tmp / "manifest.json") as file:
            file.write(json.dumps(manifest | {"inputs": inputs}, indent=1).encode() + b"\n")
    shutil.rmtree(plan.work)
    os.rename(plan.tmp, config.data_dir)
    print(summary(config.data_dir, load_manifest(config.data_dir)))


def describe(plan: Plan, tokenizer: dict, sources: list[dict], parts: list[dict],
             written: list[dict], skipped: Counter[str]) -> dict[str, Any]:
    """The manifest: all that the other stages, and a reader in five years, need to know."""
    chunks = [e for e in written if "source" not in e]
    if plan.config.tokenized:  # whatever part of Amber this is, its chunks keep their names
        chunks = [e | {"made_from": part["file"]} for e, part in zip(chunks, parts)]
    valid = [e for e in written if "source" in e]
    held = {e["source"]: e["rows"] for e in valid}
    about = []
    for s in sources:
        train = sum(chunk["sources"][s["name"]] for chunk in chunks)
        n_held = held.get(s["name"], 0)
        inside = min(n_held, n_held_rows(plan.config))
        known = {k: v for k, v in s.items() if k not in (
            "parts", "held_parts", "held_rows", "dealt", "rows_in_chunk")}
        # a weight above 1 counts a row every time; unused rows are in no chunk at all
        about.append(known | {"valid_rows": n_held, "train_rows": train,
                              "unused_rows": max(0, s["rows"] - inside - train)})
    dropped = sum((Counter(p["dropped"]) for p in parts), Counter()) + skipped
    return {"version": VERSION, "settings": settings(plan.config), "tokenizer": tokenizer,
            "seq_len": plan.config.seq_len, "seed": plan.config.seed,
            "dtype": np.lib.format.dtype_to_descr(plan.row), "sources": about, "chunks": chunks,
            "valid": valid, "dropped": dropped, "made_with": versions()}


def finished(config: Config) -> None:
    """Say that there is nothing to do, or why this directory cannot be used."""
    there = f"{config.data_dir} exists"
    if not Path(config.data_dir, "manifest.json").exists():
        raise SystemExit(f"{there}, but has no manifest.json: it is not a data set. Delete it, or"
                         " choose another place with --data_dir.")
    manifest = load_manifest(config.data_dir)
    before, now = manifest["settings"], json.loads(json.dumps(settings(config)))
    differ = [f"{k} = {before.get(k)!r} (now {now.get(k)!r})"
              for k in now | before if now.get(k) != before.get(k)]
    if differ:
        raise SystemExit(f"{there}, prepared with {', '.join(differ)}. Delete it to prepare it"
                         " anew, or choose another place with --data_dir.")
    # the inputs are not needed any more, and may be gone
    with contextlib.suppress(SystemExit, OSError):
        if manifest.get("inputs") != inputs_of(find_inputs(config)[0]):
            print(f"Note: the input files have changed since; to use them delete"
                  f" {config.data_dir}.")
    print("nothing to do: " + summary(config.data_dir, manifest))


def summary(data_dir: str, manifest: dict[str, Any]) -> str:
    rows, held = (sum(f["rows"] for f in manifest[k]) for k in ("chunks", "valid"))
    mix = ", ".join(f"{s['name']} {s['train_rows'] / rows:.1%}" for s in manifest["sources"])
    return (f"{data_dir} has {rows:,} rows of {manifest['seq_len']} + 1 tokens in"
            f" {len(manifest['chunks'])} chunks and {held:,} held-out rows; {mix}; tokenizer"
            f" {manifest['tokenizer']['kind']} with {manifest['tokenizer']['n_vocab']:,} ids")


# ---- what the other stages use: the reader and the data order


def load_manifest(data_dir: str | Path) -> dict[str, Any]:
    """The manifest of a prepared data set; raises SystemExit when there is none."""
    path = Path(data_dir, "manifest.json")
    try:
        manifest = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise SystemExit(f"{data_dir} has no prepared data (no manifest.json): run"
                         " python prepare_data.py configs/NAME.py first.") from None
    except ValueError as error:
        raise SystemExit(f"{path} is not valid JSON ({error}): prepare the data anew.") from None
    if manifest.get("version") != VERSION:
        raise SystemExit(f"{path} is of format version {manifest.get('version')}, this code reads"
                         f" {VERSION}: prepare the data anew.")
    return manifest


def load_tokenizer(data_dir: str | Path) -> Tokenizer:
    """The tokenizer that made a data set; raises SystemExit when it is not there."""
    info = load_manifest(data_dir)["tokenizer"]
    try:
        return read_tokenizer(Path(data_dir), json.dumps(info))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{Path(data_dir, info['file'])} cannot be read ({error}): --verify checks"
                         " every file.") from None


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
    """The rows of a chunk, a memory map: (rows,) of [source u1, token_ids (seq_len + 1,)]."""
    return open_rows(data_dir, manifest, manifest["chunks"][chunk])


def open_valid(data_dir: str | Path, manifest: dict[str, Any], source_name: str) -> np.ndarray:
    """The held-out rows of a source, as `open_chunk`; raises SystemExit if it has none."""
    for file in manifest["valid"]:
        if file["source"] == source_name:
            return open_rows(data_dir, manifest, file)
    names = ", ".join(f["source"] for f in manifest["valid"]) or "no source"
    raise SystemExit(f"{data_dir} has no held-out rows of {source_name!r}; it has of {names}.")


def row_order(seed: int, chunk: int, n_rows: int) -> np.ndarray:
    """The order in which the rows of a chunk are read, (n_rows,); it depends on nothing else."""
    return np.random.default_rng([seed, chunk]).permutation(n_rows)


def step_rows(seed: int, chunk: int, n_rows: int, step_in_chunk: int, batch: int) -> np.ndarray:
    """The rows (batch,) of one optimizer step; those after the last whole batch are not read."""
    return row_order(seed, chunk, n_rows)[step_in_chunk * batch:(step_in_chunk + 1) * batch]


def total_steps(manifest: dict[str, Any], batch: int) -> int:
    """Optimizer steps in all chunks; batch: rows of a step."""
    return sum(chunk["rows"] // batch for chunk in manifest["chunks"])


def places(manifest: dict[str, Any], batch: int,
           skipped: Iterable[int] = ()) -> Iterator[tuple[int, int]]:
    """The sequence of chunks as a run meets them, without end: (place, steps of its chunk).

    Place p is chunk p, and after the last chunk the sequence begins again (p modulo the chunks), to
    make up for `skipped` places. A chunk that was skipped is not met again.
    """
    steps = [chunk["rows"] // batch for chunk in manifest["chunks"]]
    bad = {place % len(steps): place for place in skipped}  # chunk -> left out from this place on
    for place in itertools.count() if len(bad) < len(steps) else ():
        if place < bad.get(place % len(steps), math.inf):
            yield place, steps[place % len(steps)]


def locate(manifest: dict[str, Any], batch: int, step: int,
           skipped: Collection[int] = ()) -> tuple[int, int]:
    """(place, step in its chunk) of optimizer step `step`, from 0; raises SystemExit beyond."""
    left = step
    if 0 <= step < total_steps(manifest, batch):
        for place, steps in places(manifest, batch, skipped):
            if left < steps:
                return place, left
            left -= steps
    raise SystemExit(f"there is no step {step}: the data has {total_steps(manifest, batch)} steps"
                     f" of {batch} rows, and the first is 0"
                     + f"; chunks left out: {len(skipped)}" * bool(skipped) + ".")


def skipped_places(run_dir: str | Path) -> list[int]:
    """What a run left out of the sequence of chunks, as its ledger says."""
    path, found = Path(run_dir, "ledger.jsonl"), []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # a line that a kill cut short
            record = json.loads(line)
            found += [record["place"]] if record["event"] == "skip_chunk" else []
    return found


def canaries(settings: dict[str, Any]) -> dict[int, np.ndarray]:
    """{times: rows (n, seq_len + 1) of random ids} that a manifest's settings plant."""
    rng = np.random.default_rng([settings["seed"], 0, 64])
    spec = sorted((int(times), n) for times, n in settings["canaries"].items())
    shape = settings["seq_len"] + 1
    return {times: rng.integers(settings["vocab_size"], size=(n, shape)) for times, n in spec}


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(data_dir: str | Path) -> list[str]:
    """Every file against the manifest; returns what is wrong, one sentence each."""
    manifest = load_manifest(data_dir)

    def check(file: dict[str, Any]) -> str:
        path = Path(data_dir, file["file"])
        if not path.exists():
            return f"{path} is missing."
        found, said = sha256(path), file["sha256"]
        return "" if found == said else f"{path} differs: its sha256 is {found}, not {said}."

    with ThreadPoolExecutor() as pool:
        files = [*manifest["chunks"], *manifest["valid"], manifest["tokenizer"]]
        return [problem for problem in pool.map(check, files) if problem]


def show_step(config: Config, step: int) -> None:
    """Print what optimizer step `step`, from 1, reads: source, chunk, row, beginning of text."""
    manifest, tokenizer = load_manifest(config.data_dir), load_tokenizer(config.data_dir)
    total = total_steps(manifest, config.global_batch_size)
    if not 1 <= step <= total:
        raise SystemExit(f"--show_step={step}: {config.data_dir} has steps 1 to {total:,} of"
                         f" {config.global_batch_size} rows.")
    place, within = locate(manifest, config.global_batch_size, step - 1,
                           skipped_places(config.run_dir))
    chunk = place % len(manifest["chunks"])
    rows = open_chunk(config.data_dir, manifest, chunk)
    ids = step_rows(manifest["seed"], chunk, len(rows), within, config.global_batch_size)
    print(f"step {step} = step {within + 1} of chunk {chunk}, {len(ids)} rows of {config.data_dir}")
    for row in ids:
        source = manifest["sources"][rows["source"][row]]["name"]
        text = tokenizer.decode(rows["token_ids"][row][:64])[:100]
        print(f"{source:<14} chunk {chunk} row {row:<8} {json.dumps(text, ensure_ascii=False)}")


def main(argv: list[str]) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    config, flags = load(argv, verify=False, show_step=0)
    if flags["verify"]:
        if problems := verify(config.data_dir):
            raise SystemExit("\n".join(problems))
        print(f"{config.data_dir}: every file is as the manifest says")
    elif any(argument.lstrip("-").startswith("show_step") for argument in argv):
        show_step(config, flags["show_step"])
    else:
        prepare(config, rank, world)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on where this one was") from None
