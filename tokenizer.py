"""Text to token ids and back: our own byte-level BPE, or another's: LLaMA's, GPT-2's, tiktoken's.

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
import itertools
import json
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import regex  # comes with tiktoken; the standard library's re has no \p{L}
import tiktoken

from configs import Config, UserError, read_regular

EOT = "<|endoftext|>"
# A word takes the character before it along, and a digit is alone, as in LLaMA's. GPT-4's pattern
# compresses 2 % better, but its look-ahead makes it 30 % slower (measured at small vocabularies).
BPE_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+"
# LLaMA itself has no words: it merges over a whole text. But none of its pieces crosses a cut of
# this pattern, so to cut there changes no id, and to merge in short words is fast.
LLAMA_PATTERN = r" *\p{L}+| *[^ \p{L}\p{Nd}\n]+|\p{Nd}|\n| +"
# Where Hugging Face's ByteLevel cuts by itself (as GPT-2), and where it does so once all digits
# have been set apart (as SmolLM2): then a space before a digit is at the end of its text.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_PATTERN = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"
                  r"|\s+(?![^\s\p{N}])|\s+")
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
    # The specials that a text may name; True: they are looked for once the text is normalized.
    found: dict[str, bool] = {}

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
        letters = byte_letters()
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


def byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in a tokenizer.json: the byte's own if it can be seen,
    else one from U+0100 on (as GPT-2)."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + k) for k, b in enumerate(hidden)}


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


class HubTokenizer(Tokenizer):
    """A byte-level BPE from its Hugging Face tokenizer.json (GPT-2's, Llama 3's, OLMo's, ...), with
    exactly its ids; a BOS is not put before a text. UserError for one that cannot be followed."""

    kind, file = "hf", "tokenizer.json"

    def __init__(self, path: str | Path, eos: str = ""):
        """eos: the special that ends a document; "" = what tokenizer_config.json says."""
        path = Path(path)
        try:
            self.data = read_regular(path)
            content = json.loads(self.data)
            said = path.with_name("tokenizer_config.json")
            settings = json.loads(read_regular(said)) if said.exists() else {}
            added = content["added_tokens"]
            if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added):
                raise ValueError("an added token strips its neighbours")
            self.specials = {token["content"]: token["id"] for token in added}
            self.found = {token["content"]: token["normalized"] for token in added}
            if settings.get("split_special_tokens"):
                self.found = {}
            named = settings.get("eos_token") or ""
            self.eos = eos or (named if isinstance(named, str) else named["content"]) or self.eos
            if self.eos not in self.specials:
                raise ValueError(f"it has no {self.eos} to end a document with, and there is no"
                                 " tokenizer_config.json beside it that names another eos_token")
            self.read(content)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is not a tokenizer.json that can be followed here"
                            f" ({type(error).__name__}: {error}). A sentencepiece .model is not"
                            " read: take the .json.")

    def read(self, content: dict[str, Any]) -> None:
        """Ranks for tiktoken from the merges, an id for each rank, and the pattern."""
        model, normalizer = content["model"], content.get("normalizer")
        # All that makes other ids of the same merges must not be there.
        for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                    "byte_fallback"):
            if model.get(key):
                raise ValueError(f"its model has {key} = {model[key]!r}")
        if model["type"] != "BPE" or normalizer not in (None, {"type": "NFC"}):
            raise ValueError(f"its model is {model['type']}, its normalizer {normalizer}")
        self.form = "NFC" if normalizer else ""
        self.pattern = split_pattern(content.get("pre_tokenizer"))
        bytes_of = {letter: bytes([b]) for b, letter in byte_letters().items()}

        def spell(piece: str) -> bytes:
            return b"".join(bytes_of[letter] for letter in piece)

        vocab = {spell(piece): i for piece, i in model["vocab"].items()
                 if piece not in self.specials}
        merges = [[spell(part) for part in (m.split(" ") if isinstance(m, str) else m)]
                  for m in model["merges"]]
        merged = dict.fromkeys(a + b for a, b in merges)
        if len([*itertools.groupby(merges, b"".join)]) > len(merged):
            raise ValueError("the ways to merge a piece do not follow each other")
        self.ranks = {piece: rank for rank, piece in enumerate(
            dict.fromkeys([*(bytes([b]) for b in range(256)), *merged]))}
        if vocab.keys() - self.ranks.keys():
            raise ValueError(f"no merge makes {min(vocab.keys() - self.ranks.keys())!r}")
        # tiktoken merges any two neighbours whose union it knows. The ids are the same if each
        # piece, merged from its bytes, ends with a merge that the file has.
        ways = {tuple(merge) for merge in merges}
        for piece in merged:
            if tuple(merge_bytes(piece, self.ranks)) not in ways:
                raise ValueError(f"{piece!r} is merged from other parts than tiktoken merges")
        # A byte that is not in the vocabulary gives no id: (n_ranks, 1), -1 for none.
        self.ids = np.array([[vocab.get(piece, -1)] for piece in self.ranks], np.int32)
        self.set_pieces({i: piece for piece, i in vocab.items()})

    def normalize(self, text: str) -> str:
        return unicodedata.normalize(self.form, text) if self.form else text

    def encode(self, text: str) -> np.ndarray:
        """The ids that Hugging Face gives without BOS, (n,) uint32. Names of specials are found
        where it finds them."""
        # Names that are "normalized" are looked for in the normalized text, and so are they.
        raw = any_of(*[name for name, normalized in self.found.items() if not normalized])
        names = {self.normalize(name): name for name, later in self.found.items() if later}
        ids: list[Any] = [[]]
        # split() gives the text between the names, and the names, in turn.
        for k, part in enumerate(raw.split(replace_invalid_utf8(text))):
            if k % 2:
                ids.append([self.specials[part]])
            elif part:  # LLaMA puts a space before a text, and none before nothing
                for j, piece in enumerate(any_of(*names).split(self.normalize(part))):
                    ids.append([self.specials[names[piece]]] if j % 2 else
                               self.encode_piece(piece))
        return np.concatenate(ids, dtype=np.uint32, casting="unsafe")

    def encode_piece(self, text: str) -> np.ndarray:
        ids = self.ids[self.core.encode_to_numpy(text, disallowed_special=())]  # (n, 1 or 3)
        return ids[ids >= 0]

    def hugging_face(self) -> dict[str, Any]:
        content = json.loads(self.data)
        content["model"]["vocab"] |= self.specials
        return {key: content.get(key) for key in ("normalizer", "pre_tokenizer", "decoder",
                                                  "model")}


def split_pattern(pre_tokenizer: dict[str, Any] | None) -> str:
    """The pattern that cuts a text as a pre_tokenizer does; ValueError if there is none."""
    steps = pre_tokenizer or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds = [step.get("type") for step in steps]
    if kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        raise ValueError("its pre_tokenizer does not end with ByteLevel, or adds a space")
    own = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and own:
        return GPT2_PATTERN
    if kinds == ["Digits", "ByteLevel"] and own and steps[0]["individual_digits"]:
        return DIGITS_PATTERN
    if kinds == ["Split", "ByteLevel"] and not own:
        split = steps[0]
        # X{1,3}+ is (X{1,3})+ to Hugging Face, and to tiktoken something that gives nothing back.
        pattern = re.sub(r"(\\p\{\w+\}\{\d+,\d+\})\+", r"(?:\1)+", split["pattern"]["Regex"])
        if (split["behavior"], split["invert"]) in (("Isolated", False), ("Removed", True)):
            regex.compile(pattern)
            return pattern
    raise ValueError(f"its pre_tokenizer ({', '.join(map(str, kinds))}) is not one of those known")


def merge_bytes(piece: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """What tiktoken makes of a piece before its last merge: two parts, if the file is sound."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
        best = min(pairs)
        if best >= ranks[piece]:
            break
        i = pairs.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


class LlamaTokenizer(HubTokenizer):
    """LLaMA's tokenizer, exactly, from its Hugging Face tokenizer.json; UserError for another's."""

    kind, eos = "llama", "</s>"

    def read(self, content: dict[str, Any]) -> None:
        self.pattern, model = LLAMA_PATTERN, content["model"]
        self.vocab = model["vocab"]
        # A merge is "a b" or, in newer files, ["a", "b"].
        self.merged = list(dict.fromkeys("".join(m).replace(" ", "") for m in model["merges"]))
        steps = model.get("byte_fallback"), content.get("normalizer"), content.get("pre_tokenizer")
        if steps != (True, LLAMA_STEPS["normalizer"], None):
            raise ValueError("it has another normalizer, pre_tokenizer or byte_fallback")
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

    def normalize(self, text: str) -> str:
        return " " + text.replace("\u2581", " ")

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
    if kind in ("llama", "hf"):
        tokenizer: Tokenizer = open_tokenizer(Path(name))
    elif kind == "tiktoken":
        try:
            named = tiktoken.get_encoding(name)
        except (ValueError, OSError) as error:  # no such name; no network
            raise UserError(f"tokenizer: tiktoken cannot load {name!r} ({type(error).__name__}); it"
                            f" knows {', '.join(tiktoken.list_encoding_names())} and downloads"
                            ' them. Without a network take "bpe" or "hf:PATH".')
        tokenizer = Tokenizer(config.tokenizer, named._mergeable_ranks, named._pat_str,
                              named._special_tokens)
    else:
        n_added = len(CRYSTAL_TOKENS) if config.crystal_tokens else 0
        ranks = train_bpe(texts, config.vocab_size - 1 - n_added)
        tokenizer = Tokenizer("bpe", ranks, BPE_PATTERN, {EOT: len(ranks)})
    return check_tokenizer(config, tokenizer)


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of a directory that has one."""
    path = path / "tokenizer.json" if path.is_dir() else path
    # LLaMA's begins with characters, and spells those that it does not know in bytes.
    llama = re.search(rb'"byte_fallback":\s*true', read_regular(path))
    return LlamaTokenizer(path) if llama else HubTokenizer(path)


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
    data = read_regular(directory / entry["file"])
    # One wrong line gives wrong ids, and wrong bits per byte, without an error anywhere.
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise ValueError("its sha256 is not the manifest's")
    if entry["kind"] in ("llama", "hf"):
        cls = LlamaTokenizer if entry["kind"] == "llama" else HubTokenizer
        eos = [name for name, i in entry["specials"].items() if i == entry["eos_id"]]
        tokenizer: Tokenizer = cls(directory / entry["file"], eos[0])
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
