"""Text to token ids and back: our own byte-level BPE, LLaMA's tokenizer exactly, or tiktoken's.

    tokenizer = make_tokenizer(config, texts)
    ids = tokenizer.encode("Hello")  # (n,) uint32
    tokenizer = load_tokenizer(directory, tokenizer.save(directory))

All of them run on tiktoken: a pattern cuts the text into words, and in each word the two neighbours
whose union has the lowest rank are merged, again and again.
"""

import base64
import copy
import functools
import hashlib
import heapq
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import regex  # comes with tiktoken; the standard library's re has no \p{L}
import tiktoken

from configs import Config, UserError

EOT = "<|endoftext|>"
# A word takes the character before it along, and a digit is alone, as in LLaMA's. GPT-4's pattern
# compresses 2 % better, but its look-ahead makes it 30 % slower (measured at small vocabularies).
BPE_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+"
# LLaMA itself has no words: it merges over a whole text. But none of its pieces crosses a cut of
# this pattern, so to cut there changes no id, and to merge in short words is fast.
LLAMA_PATTERN = r" *\p{L}+| *[^ \p{L}\p{Nd}\n]+|\p{Nd}|\n| +"
# LLaMA's tokenizer.json: a space before the text, U+2581 for every space, the model; and back.
LLAMA_STEPS = {
    "normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
    "decoder": {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}}
# What Crystal adds to LLaMA's vocabulary, ids 32000 to 32021, in this order: StarCoder's tokens for
# infilling and for the parts of a repository, and those of a chat.
CRYSTAL_TOKENS = [f"<|{name}|>" for name in """fim_prefix fim_middle fim_suffix fim_pad filename
    gh_stars issue_start issue_comment issue_closed jupyter_start jupyter_text jupyter_code
    jupyter_output empty_output commit_before commit_msg commit_after reponame im_start im_end
    sys_start sys_end""".split()]
FIM_TOKENS = CRYSTAL_TOKENS[:3]  # before the prefix, the middle and the suffix of a document


class Tokenizer:
    """A byte-level BPE: our own ("bpe"), or one of tiktoken's ("tiktoken:NAME").

    ranks: bytes -> id, in order of merging; specials: name -> id, ids that no text gives.
    Also has eos_id; n_vocab, the largest id + 1; pieces, id -> bytes; and token_bytes (n_vocab,),
    the UTF-8 bytes of each id, which make bits per byte out of a loss per token (0 for specials).
    """

    file, eos = "tokenizer.tiktoken", EOT  # the name of its file, the special that ends a document
    added: list[str] = []  # the specials that `add` was given
    found: dict[str, bool] = {}  # the specials that a text may name: only LLaMA has such

    def __init__(self, kind: str, ranks: dict[bytes, int], pattern: str, specials: dict[str, int]):
        self.kind, self.ranks, self.pattern, self.specials = kind, ranks, pattern, specials
        # Its file has a piece in base64 and its rank a line, as tiktoken's own files.
        lines = [base64.b64encode(piece) + b" %d\n" % rank for piece, rank in ranks.items()]
        self.data = b"".join(lines)
        self.set_pieces({i: piece for piece, i in ranks.items()})

    def set_pieces(self, text_pieces: dict[int, bytes]) -> None:
        # Specials are not tiktoken's business: it would look for their names in the text.
        self.core = tiktoken.Encoding(self.kind, pat_str=self.pattern, mergeable_ranks=self.ranks,
                                      special_tokens={})
        self.text_pieces = text_pieces
        self.pieces = text_pieces | {i: name.encode() for name, i in self.specials.items()}
        self.eos_id, self.n_vocab = self.specials[self.eos], max(self.pieces) + 1
        self.token_bytes = np.array([len(text_pieces.get(i, b"")) for i in range(self.n_vocab)])

    def add(self, names: list[str]) -> "Tokenizer":
        """The same with more specials: a name that it has keeps its id, others get the next ones.
        No text gives any of them."""
        new = copy.copy(self)
        missing = [name for name in names if name not in self.specials]
        fresh = {name: self.n_vocab + i for i, name in enumerate(missing)}
        new.added, new.specials = names, self.specials | fresh
        new.found = {name: how for name, how in self.found.items() if name not in names}
        new.set_pieces(self.text_pieces)
        return new

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, (n,) uint32, no BOS, no EOS."""
        # Names of specials are ordinary text: no document can end itself, or begin another.
        return self.core.encode_to_numpy(replace_invalid_utf8(text), disallowed_special=())

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Half a character or an unknown id becomes U+FFFD."""
        # It never raises: a model may give any id, and more ids than the tokenizer has.
        pieces = [self.pieces.get(int(i), b"\xff") for i in ids]
        return b"".join(pieces).decode("utf-8", "replace")

    def save(self, directory: Path) -> dict[str, Any]:
        """Write the tokenizer's file; returns its entry in the manifest, for `load_tokenizer`."""
        (directory / self.file).write_bytes(self.data)
        entry = {"kind": self.kind, "file": self.file,
                 "sha256": hashlib.sha256(self.data).hexdigest(),
                 "n_vocab": self.n_vocab, "eos_id": self.eos_id, "bos_id": None,
                 "rule": "no BOS; one EOS after every document",
                 "pattern": self.pattern, "specials": self.specials}
        return entry | ({"added": self.added} if self.added else {})

    def save_hugging_face(self, directory: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json: AutoTokenizer then gives our ids."""
        flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False}
        tokens = [{"id": i, "content": name, "normalized": self.found.get(name, False), **flags}
                  for name, i in self.specials.items()]
        tokenizer = {"version": "1.0", "added_tokens": tokens, **self.hugging_face()}
        config = {"tokenizer_class": "PreTrainedTokenizerFast",
                  "clean_up_tokenization_spaces": False, "eos_token": self.eos,
                  # Hugging Face looks for all specials in a text, or for none.
                  "split_special_tokens": not self.found}
        for name, content in (("tokenizer", tokenizer), ("tokenizer_config", config)):
            (directory / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")

    def hugging_face(self) -> dict[str, Any]:
        """The model of a tokenizer.json, and the steps before and after it."""
        # A byte is a letter there: itself if it can be seen, else one from U+0100 on (as GPT-2).
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [b for b in range(256) if b not in visible]
        letters = {b: chr(b) for b in visible} | {b: chr(256 + k) for k, b in enumerate(hidden)}
        vocab = {"".join(letters[b] for b in piece): rank for piece, rank in self.ranks.items()}
        # tiktoken's X{1,3}+ never gives back what it took; to Hugging Face it is (X{1,3})+.
        pattern = re.sub(r"(\\p\{\w+\}\{\d+,\d+\})\+", r"(?>\1)", self.pattern)
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
                 "invert": False}
        as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                    "use_regex": False}
        # A special that is not in the vocabulary too would get another id.
        model = {"type": "BPE", "ignore_merges": True, "vocab": vocab | self.specials,
                 "merges": all_merges(sorted(vocab, key=vocab.get), vocab)}
        return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, as_bytes]},
                "decoder": as_bytes, "model": model}


def all_merges(merged: Iterable[str], vocab: dict[str, int]) -> list[str]:
    """Every way to merge two pieces of a vocabulary into one of `merged`, in that order."""
    # In tiktoken they share a rank; in Hugging Face each has its own. That changes nothing: within
    # a piece a text is merged as the piece alone is, so the last merge has always the same parts.
    return [f"{piece[:n]} {piece[n:]}" for piece in merged for n in range(1, len(piece))
            if piece[:n] in vocab and piece[n:] in vocab]


def replace_invalid_utf8(text: str) -> str:
    """The text itself, or with U+FFFD for what UTF-8 cannot say: lone surrogates, as from JSON."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        # Two surrogates that belong together become the character that they stand for.
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def train_bpe(texts: Iterable[str], size: int) -> dict[bytes, int]:
    """Byte-level BPE (Sennrich et al. 2016): merge the commonest pair of neighbours, again and
    again, until there are `size` tokens or nothing is left to merge. Returns bytes -> rank."""
    frequency: Counter[str] = Counter()
    for text in texts:
        frequency.update(regex.findall(BPE_PATTERN, text))
    # A merge rewrites the words that have its pair; of "words" of megabytes the beginning will do.
    words = [list(word[:200].encode()) for word in frequency]
    often = list(frequency.values())
    pair_count: Counter[tuple[int, int]] = Counter()
    words_with: defaultdict[tuple[int, int], set[int]] = defaultdict(set)

    def count_pairs(w: int, sign: int) -> None:
        for pair in zip(words[w], words[w][1:]):
            pair_count[pair] += sign * often[w]
            words_with[pair].add(w)

    for w in range(len(words)):
        count_pairs(w, +1)
    tokens = [bytes([b]) for b in range(256)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    # The commonest pair comes first, and of equals the one of smaller ids: the result depends on
    # nothing but the text.
    heap = sorted((-n, pair) for pair, n in pair_count.items())
    while len(tokens) < size and heap:
        n, pair = heapq.heappop(heap)
        # Other merges may have lowered the count since it was pushed: back, with the right one.
        if -n != pair_count[pair]:
            if pair_count[pair] > 0:
                heapq.heappush(heap, (-pair_count[pair], pair))
            continue
        union = tokens[pair[0]] + tokens[pair[1]]
        new = ranks.setdefault(union, len(tokens))  # (a, bc) and (ab, c) make the same token
        if new == len(tokens):
            tokens.append(union)
        new_pairs = set()
        for w in words_with.pop(pair):
            count_pairs(w, -1)
            words[w] = merge_pair(words[w], pair, new)
            count_pairs(w, +1)
            new_pairs.update(p for p in zip(words[w], words[w][1:]) if new in p)
        for p in new_pairs:
            heapq.heappush(heap, (-pair_count[p], p))
    return ranks


def merge_pair(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    merged: list[int] = []
    for token in word:
        if token == pair[1] and merged and merged[-1] == pair[0]:
            merged[-1] = new
        else:
            merged.append(token)
    return merged


class LlamaTokenizer(Tokenizer):
    """LLaMA's tokenizer, exactly, from its Hugging Face tokenizer.json; UserError for another's."""

    file, eos = "tokenizer.json", "</s>"

    def __init__(self, path: str):
        self.kind, self.pattern = "llama", LLAMA_PATTERN
        try:
            self.data = Path(path).read_bytes()
            self.read(json.loads(self.data))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is not LLaMA's tokenizer.json ({type(error).__name__}:"
                            f" {error}). A sentencepiece .model is not read: take the .json.")

    def read(self, content: dict[str, Any]) -> None:
        model, added = content["model"], content["added_tokens"]
        self.vocab = model["vocab"]
        # A merge is "a b" or, in newer files, ["a", "b"].
        self.merged = list(dict.fromkeys("".join(m).replace(" ", "") for m in model["merges"]))
        self.specials = {token["content"]: token["id"] for token in added}
        self.found = {token["content"]: token["normalized"] for token in added}
        steps = model.get("byte_fallback"), content.get("normalizer"), content.get("pre_tokenizer")
        if steps != (True, LLAMA_STEPS["normalizer"], None):
            raise ValueError("it has another normalizer, pre_tokenizer or byte_fallback")
        if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added):
            raise ValueError("an added token strips its neighbours")
        # tiktoken merges whatever makes a piece, so all those merges must be in the file.
        pieces = self.vocab.keys() - self.specials.keys()
        if len(all_merges(pieces, self.vocab)) != len(model["merges"]):
            raise ValueError("its merges are not all that make its pieces")
        byte_ids = [self.vocab[f"<0x{b:02X}>"] for b in range(256)]
        id_of = {}  # UTF-8 of a piece -> its id
        for piece in self.vocab:
            text = piece.replace("\u2581", " ")
            if not piece or piece in self.specials or re.fullmatch("<0x..>", piece):
                continue
            if len(text) > 1 and not regex.fullmatch(LLAMA_PATTERN, text):
                raise ValueError(f"the piece {text!r} crosses a cut of the pattern")
            id_of[text.encode()] = self.vocab[piece]
        # LLaMA's was made with sentencepiece, which merges the neighbours whose union has the best
        # score, leftmost first: tiktoken's rule, with ranks in the order of scores. But it begins
        # with characters, and tiktoken with bytes. So the first ranks go to the beginnings of
        # characters (their first 2 or 3 bytes), and the next to the characters: each is whole
        # before it is merged with another.
        characters = [piece for piece in id_of if len(piece) > 1 and len(piece.decode()) == 1]
        beginnings = {c[:n] for c in characters for n in range(2, len(c))}
        merged = [piece.replace("\u2581", " ").encode() for piece in self.merged]
        ranked = [bytes([b]) for b in range(256)] + sorted(beginnings) + characters + merged
        self.ranks = {piece: rank for rank, piece in enumerate(ranked)}
        # A rank has one id: (n_ranks, 3), filled up with -1. But a beginning that is left over is
        # of a character that LLaMA does not know, and is spelled in two or three bytes.
        self.ids = np.full((len(ranked), 3), -1, np.int32)
        for piece, rank in self.ranks.items():
            ids = [id_of[piece]] if piece in id_of else [byte_ids[b] for b in piece]
            self.ids[rank, : len(ids)] = ids
        text_pieces = {i: piece for piece, i in id_of.items()}
        self.set_pieces(text_pieces | {i: bytes([b]) for b, i in enumerate(byte_ids)})

    def encode(self, text: str) -> np.ndarray:
        """The ids of Hugging Face's LLaMA tokenizer without BOS, (n,) uint32. Names of specials are
        found where it finds them: in " </s>", but not in "a</s>"."""
        # Names that are "normalized" are looked for once a space has gone before the text.
        raw = any_of(*[name for name, normalized in self.found.items() if not normalized])
        spaced = any_of(*[" " + name for name, normalized in self.found.items() if normalized])
        ids: list[Any] = [[]]
        # split() gives the text between the names, and the names, in turn.
        for k, part in enumerate(raw.split(replace_invalid_utf8(text))):
            if k % 2:
                ids.append([self.specials[part]])
            elif part:  # no space goes before nothing
                for j, piece in enumerate(spaced.split(" " + part.replace("\u2581", " "))):
                    ids.append([self.specials[piece[1:]]] if j % 2 else self.encode_piece(piece))
        return np.concatenate(ids, dtype=np.uint32, casting="unsafe")

    def encode_piece(self, text: str) -> np.ndarray:
        ids = self.ids[self.core.encode_to_numpy(text, disallowed_special=())]
        return ids[ids >= 0]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without the space that `encode` puts before it."""
        return super().decode(ids).removeprefix(" ")

    def hugging_face(self) -> dict[str, Any]:
        model = {"type": "BPE", "byte_fallback": True, "vocab": self.vocab | self.specials,
                 "merges": all_merges(self.merged, self.vocab)}
        return {**LLAMA_STEPS, "model": model}


@functools.cache
def any_of(*names: str) -> re.Pattern:
    """Finds any of the names, the longest that fits, as Hugging Face's matcher does."""
    alternatives = [re.escape(name) for name in sorted(names, key=len, reverse=True)]
    return re.compile(f"({'|'.join(alternatives)})" if names else "(?!)")  # (?!) is never found


def make_tokenizer(config: Config, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that a config asks for, checked; `texts` is read only to train one."""
    kind, _, name = config.tokenizer.partition(":")
    if kind == "llama":
        tokenizer: Tokenizer = LlamaTokenizer(name)
    elif kind == "tiktoken":
        try:
            named = tiktoken.get_encoding(name)
        except (ValueError, OSError) as error:  # no such name; no network
            raise UserError(f"tokenizer: tiktoken cannot load {name!r} ({type(error).__name__}); it"
                            f" knows {', '.join(tiktoken.list_encoding_names())} and downloads"
                            ' them. Without a network take "bpe" or "llama:PATH".')
        tokenizer = Tokenizer(config.tokenizer, named._mergeable_ranks, named._pat_str,
                              named._special_tokens)
    else:
        n_added = len(CRYSTAL_TOKENS) if config.crystal_tokens else 0
        ranks = train_bpe(texts, config.vocab_size - 1 - n_added)
        tokenizer = Tokenizer("bpe", ranks, BPE_PATTERN, {EOT: len(ranks)})
    return check_tokenizer(config, tokenizer)


def check_tokenizer(config: Config, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, with the tokens that the config adds; UserError if it does not fit it."""
    if config.crystal_tokens:
        tokenizer = tokenizer.add(CRYSTAL_TOKENS)
    missing = [name for name in FIM_TOKENS if name not in tokenizer.specials]
    if config.fim_rates and missing:
        raise UserError(f"fim_rates: the tokenizer {config.tokenizer} has no {missing[0]};"
                        " set crystal_tokens = True.")
    if tokenizer.n_vocab > config.vocab_size:
        raise UserError(f"vocab_size is {config.vocab_size}, but the tokenizer {config.tokenizer}"
                        f" has {tokenizer.n_vocab} ids: set vocab_size to at least that.")
    return tokenizer


def load_tokenizer(directory: Path, entry: dict[str, Any]) -> Tokenizer:
    """A saved tokenizer, from what `save` returned; OSError or ValueError if the file is not what
    was saved, UserError if this code cannot read it."""
    # To load it once more costs nothing: every command asks for it in several places.
    return read_tokenizer(Path(directory), json.dumps(entry))


@functools.lru_cache(maxsize=4)
def read_tokenizer(directory: Path, entry_json: str) -> Tokenizer:
    entry = json.loads(entry_json)
    data = (directory / entry["file"]).read_bytes()
    # One wrong line gives wrong ids, and wrong bits per byte, without an error anywhere.
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise ValueError("its sha256 is not the manifest's")
    if entry["kind"] == "llama":
        tokenizer: Tokenizer = LlamaTokenizer(str(directory / entry["file"]))
    else:
        # Not by tiktoken's own reader, which caches by path: it would give what was trained before.
        lines = [line.split() for line in data.splitlines()]
        ranks = {base64.b64decode(piece, validate=True): int(rank) for piece, rank in lines}
        # tiktoken does not check either of these, and panics.
        ids = {*ranks.values(), *entry["specials"].values()} & {*range(entry["n_vocab"])}
        if len(ids) < len(lines) + len(entry["specials"]) or sum(len(p) == 1 for p in ranks) < 256:
            raise ValueError("its ids are not all different, or one of the 256 bytes is missing")
        tokenizer = Tokenizer(entry["kind"], ranks, entry["pattern"], entry["specials"])
    return tokenizer.add(entry["added"]) if "added" in entry else tokenizer
