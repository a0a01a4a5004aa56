"""Text to token ids and back: byte-pair encodings of our own, and LLaMA's.

    tokenizer = make_tokenizer(config, texts)
    ids = tokenizer.encode("Hello")  # (n,) uint32
    tokenizer.save(directory)  # open_tokenizer(directory) is the same again

Both run on tiktoken: a pattern cuts the text into words, and in each word the two neighbours whose
union has the lowest rank are merged, again and again.
"""

import functools
import hashlib
import heapq
import json
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import regex  # comes with tiktoken; the standard library's re has no \p{L}
import tiktoken

from configs import Config, UserError, open_ours, read_regular

EOT = "<|endoftext|>"
# As in LLaMA's, a digit is a word of its own, and a word includes the character before it. GPT-4's
# pattern compresses 2 % better, but its look-ahead makes it 30 % slower (small vocabularies).
BPE_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+"
# LLaMA itself has no words: it merges over a whole text. But none of its pieces crosses a cut of
# this pattern, so to cut there changes no id, and to merge in short words is fast.
LLAMA_PATTERN = r" *\p{L}+| *[^ \p{L}\p{Nd}\n]+|\p{Nd}|\n| +"
LLAMA_NORMALIZER = {"type": "Sequence", "normalizers": [
    {"type": "Prepend", "prepend": "\u2581"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]}
# What Crystal adds to LLaMA's vocabulary, ids 32000 to 32021, in this order: StarCoder's tokens for
# infilling and for the parts of a repository, and those of a chat.
CRYSTAL_TOKENS = [f"<|{name}|>" for name in """fim_prefix fim_middle fim_suffix fim_pad filename
    gh_stars issue_start issue_comment issue_closed jupyter_start jupyter_text jupyter_code
    jupyter_output empty_output commit_before commit_msg commit_after reponame im_start im_end
    sys_start sys_end""".split()]
FIM_TOKENS = CRYSTAL_TOKENS[:3]  # before the prefix, the middle and the suffix of a document
SPECIAL = {"special": True, "normalized": False,  # how a tokenizer.json describes our specials
           "single_word": False, "lstrip": False, "rstrip": False}
# GPT-2's byte-to-unicode table: a printable byte is its own character, others are U+0100 on.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [b for b in range(256) if b not in VISIBLE]
LETTERS = {b: chr(b) for b in VISIBLE} | {b: chr(256 + k) for k, b in enumerate(HIDDEN)}
BYTES = {letter: bytes([b]) for b, letter in LETTERS.items()}
# A tokenizer that loses or changes letters or spaces shows it on this text.
PROBE = "The QUICK brown fox: été, 漢字 😀 ﬁ ①, 12 345\n\n\tx = [1]  \r\n "


class Tokenizer:
    """A byte-level BPE on tiktoken: our own, "bpe".

        >>> ranks = train_bpe(["aaabdaaabac"], 259)  # 256 bytes and three merges
        >>> tokenizer = Tokenizer("bpe", ranks, BPE_PATTERN, {EOT: 259})
        >>> tokenizer.encode("aaabdaaabac").tolist()  # aaab d aaab a c
        [258, 100, 258, 97, 99]
        >>> tokenizer.pieces[258], tokenizer.decode([258, 259])
        (b'aaab', 'aaab<|endoftext|>')

    ranks: bytes -> id, in the order of the merges; specials: name -> id, ids that no text gives.
    Attributes: kind, specials, eos_id; n_vocab, the largest id + 1; pieces, id -> bytes;
    token_bytes (n_vocab,), the UTF-8 bytes of each id, which make bits per byte out of a loss per
    token (0 for specials); data, the bytes of its tokenizer.json, for cache keys.
    """

    prefix = ""  # what `encode` puts before a text

    def __init__(self, kind: str, ranks: dict[bytes, int], pattern: str, specials: dict[str, int]):
        # EOT is allowed in no text. Without any special, tiktoken seeks "" at every position.
        self.core = tiktoken.Encoding(kind, pat_str=pattern, mergeable_ranks=ranks,
                                      special_tokens={EOT: len(ranks)})
        vocab = {p.decode("latin-1").translate(LETTERS): rank for p, rank in ranks.items()}
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
                 "invert": False}
        as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                    "use_regex": False}
        content = {
            "version": "1.0",
            "added_tokens": [{"id": i, "content": name} | SPECIAL for name, i in specials.items()],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, as_bytes]},
            "decoder": as_bytes,
            # Hugging Face gives another id to a special that is not in the vocabulary too.
            "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab | specials,
                      "merges": all_merges(sorted(vocab, key=vocab.get), vocab)}}
        self.describe(kind, content, {i: piece for piece, i in ranks.items()}, EOT, True)

    def describe(self, kind: str, content: dict[str, Any], text_pieces: dict[int, bytes], eos: str,
                 splits: bool) -> None:
        """Set the attributes. content: the tokenizer.json; text_pieces: id -> bytes, without added
        tokens; splits: whether names of specials are ordinary text (split_special_tokens)."""
        added = content["added_tokens"]
        self.kind, self.data = kind, json.dumps(content, indent=1).encode()
        self.specials = {token["content"]: token["id"] for token in added if token["special"]}
        self.pieces = text_pieces | {token["id"]: token["content"].encode() for token in added}
        self.eos_id, self.n_vocab = self.specials[eos], max(self.pieces) + 1
        if not 0 <= min(self.pieces) < self.n_vocab <= 1 << 24:  # a table of 2**40 would be made
            raise ValueError("an id is below 0, or beyond 2**24")
        self.token_bytes = np.zeros(self.n_vocab, np.int64)
        for i in self.pieces.keys() - self.specials.values():
            self.token_bytes[i] = len(self.pieces[i])
        self.config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "kind": kind,
                       "clean_up_tokenization_spaces": False, "split_special_tokens": splits}
        self.entry = {"kind": kind, "file": "tokenizer.json", "n_vocab": self.n_vocab,
                      "sha256": hashlib.sha256(self.data).hexdigest(), "eos_id": self.eos_id,
                      "specials": self.specials, "config": self.config}

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, (n,) uint32, no BOS, no EOS."""
        # Names of specials are ordinary text: no document can end itself, or begin another.
        return self.core.encode_to_numpy(replace_invalid_utf8(text), disallowed_special=())

    def __call__(self, text: str) -> list[int]:
        return self.encode(text).tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Half a character or an unknown id becomes U+FFFD."""
        # It never raises: a model may give any id, and more ids than the tokenizer has.
        pieces = [self.pieces.get(int(i), b"\xff") for i in ids]
        return b"".join(pieces).decode("utf-8", "replace").removeprefix(self.prefix)

    def save(self, directory: Path) -> dict[str, Any]:
        """Write tokenizer.json and tokenizer_config.json, with which AutoTokenizer gives the same
        ids; returns what a manifest records of it."""
        config = json.dumps(self.config, indent=1).encode() + b"\n"
        for name, content in (("tokenizer.json", self.data), ("tokenizer_config.json", config)):
            with open_ours(directory / name) as f:
                f.write(content)
        return self.entry


def all_merges(merged: Iterable[str], vocab: dict[str, int]) -> list[str]:
    """Every way to merge two pieces of a vocabulary into one of `merged`, in that order."""
    # In tiktoken they share a rank; in Hugging Face each has its own. That changes nothing: within
    # a piece a text is merged as the piece alone is, so the last merge has always the same parts.
    return [f"{piece[:n]} {piece[n:]}" for piece in merged for n in range(1, len(piece))
            if piece[:n] in vocab and piece[n:] in vocab]


def replace_invalid_utf8(text: str) -> str:
    """The text with lone surrogates (from JSON) replaced by U+FFFD; the same object if none."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        # Two surrogates that belong together become the character that they stand for.
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def spell(piece: str) -> str:
    return piece.replace("\u2581", " ")  # the space of sentencepiece


def train_bpe(texts: Iterable[str], size: int) -> dict[bytes, int]:
    """Byte-level BPE (Sennrich et al. 2016): merge the commonest pair of neighbours, again and
    again, until there are `size` tokens or nothing is left to merge. Returns bytes -> rank."""
    frequency: Counter[str] = Counter()
    for text in texts:
        frequency.update(regex.findall(BPE_PATTERN, text))
    # A word is a string of chr(token id), so that str.replace merges a pair. Every merge rewrites
    # the words that have its pair; of "words" of megabytes the beginning will do.
    words = [word[:200].encode().decode("latin-1") for word in frequency]
    often = list(frequency.values())
    pair_count: Counter[str] = Counter()
    words_with: defaultdict[str, set[int]] = defaultdict(set)

    def count_pairs(w: int, sign: int) -> None:
        for pair in map(operator.add, words[w], words[w][1:]):
            pair_count[pair] += sign * often[w]
            words_with[pair].add(w)

    for w in range(len(words)):
        count_pairs(w, +1)
    tokens = [bytes([b]) for b in range(256)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    # The commonest pair comes first, and of equally common ones that of the smaller ids.
    heap = sorted((-n, pair) for pair, n in pair_count.items())
    while len(tokens) < size and heap:
        n, pair = heapq.heappop(heap)
        # Other merges may have lowered the count since it was pushed: back, with the right one.
        if -n != pair_count[pair]:
            if pair_count[pair] > 0:
                heapq.heappush(heap, (-pair_count[pair], pair))
            continue
        union = tokens[ord(pair[0])] + tokens[ord(pair[1])]
        new = ranks.setdefault(union, len(tokens))  # (a, bc) and (ab, c) make the same token
        if new == len(tokens):
            tokens.append(union)
        new_pairs = set()
        for w in words_with.pop(pair):
            count_pairs(w, -1)
            words[w] = words[w].replace(pair, chr(new))
            count_pairs(w, +1)
            new_pairs.update(p for p in map(operator.add, words[w], words[w][1:]) if chr(new) in p)
        for p in new_pairs:
            heapq.heappush(heap, (-pair_count[p], p))
    return ranks


class LlamaTokenizer(Tokenizer):
    """LLaMA's tokenizer on tiktoken, with exactly Hugging Face's ids for any text."""

    prefix = " "

    def __init__(self, content: dict[str, Any], eos: str, splits: bool):
        """content: a tokenizer.json; KeyError or ValueError if it is not built as LLaMA's."""
        added, model, vocab = content["added_tokens"], content["model"], content["model"]["vocab"]
        byte_names = [f"<0x{b:02X}>" for b in range(256)]
        others = {"", *byte_names, *(token["content"] for token in added)}
        pieces = [piece for piece in vocab if piece not in others]
        id_of = {spell(piece).encode(): vocab[piece] for piece in pieces}
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        whole = [len(p) == 1 or regex.fullmatch(LLAMA_PATTERN, spell(p)) for p in pieces]
        # tiktoken merges whatever makes a piece, so all those merges must be in the file.
        if ((content["normalizer"], content["pre_tokenizer"]) != (LLAMA_NORMALIZER, None)
                or not model["byte_fallback"] or not all(whole)
                or sorted(merges) != sorted(all_merges(pieces, vocab))):
            raise ValueError("it is not LLaMA's")
        # LLaMA's was made with sentencepiece, which merges the neighbours whose union has the best
        # score, leftmost first: tiktoken's rule, with ranks in the order of scores. But it begins
        # with characters, and tiktoken with bytes. So the first ranks go to the beginnings of
        # characters (their first 2 or 3 bytes), and the next to the characters: each is whole
        # before it is merged with another.
        characters = [piece for piece in id_of if len(piece) > 1 and len(piece.decode()) == 1]
        beginnings = {c[:n] for c in characters for n in range(2, len(c))}
        ranked = [bytes([b]) for b in range(256)] + sorted(beginnings) + characters
        ranked += dict.fromkeys(spell(merge.replace(" ", "")).encode() for merge in merges)
        self.core = tiktoken.Encoding("llama", pat_str=LLAMA_PATTERN, special_tokens={EOT: 0},
                                      mergeable_ranks={p: rank for rank, p in enumerate(ranked)})
        # A rank has one id: (n_ranks, 3), filled up with -1. But the beginning of a character that
        # LLaMA does not know is spelled in two or three bytes.
        self.ids = np.full((len(ranked), 3), -1, np.int32)
        for rank, piece in enumerate(ranked):
            ids = [id_of[piece]] if piece in id_of else [vocab[byte_names[b]] for b in piece]
            self.ids[rank, : len(ids)] = ids
        # Added tokens with "normalized": true are normalized and matched in the normalized text.
        found = [token for token in added if not (splits and token["special"])]
        self.raw = {t["content"]: t["id"] for t in found if not t["normalized"]}
        self.normalized = {" " + spell(t["content"]): t["id"] for t in found if t["normalized"]}
        text_pieces = {vocab[name]: bytes([b]) for b, name in enumerate(byte_names)}
        text_pieces |= {i: piece for piece, i in id_of.items()}
        self.describe("llama", content, text_pieces, eos, splits)

    def encode(self, text: str) -> np.ndarray:
        rows: list[Any] = [[]]
        # split() gives the text between the names, and the names, in turn.
        for k, part in enumerate(any_of(*self.raw).split(replace_invalid_utf8(text))):
            if k % 2:
                rows.append([self.raw[part]])
            elif part:  # LLaMA puts a space before a text, and none before nothing
                for j, piece in enumerate(any_of(*self.normalized).split(" " + spell(part))):
                    ranks = self.core.encode_to_numpy(piece, disallowed_special=())
                    rows.append([self.normalized[piece]] if j % 2 else self.ids[ranks].ravel())
        ids = np.concatenate(rows)
        return ids[ids >= 0].astype(np.uint32)


@functools.cache
def any_of(*names: str) -> re.Pattern:
    """Finds any of the names, the longest that fits, as Hugging Face's matcher does."""
    alternatives = [re.escape(name) for name in sorted(names, key=len, reverse=True)]
    return re.compile(f"({'|'.join(alternatives) or chr(0xD800)})")  # no text has a lone surrogate


def make_tokenizer(config: Config, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that a config asks for, checked; `texts` is read only to train one."""
    kind, _, name = config.tokenizer.partition(":")
    if kind == "hf":
        tokenizer = open_tokenizer(Path(name))
    else:
        n_specials = 1 + len(CRYSTAL_TOKENS) * config.crystal_tokens
        ranks = train_bpe(texts, config.vocab_size - n_specials)
        tokenizer = Tokenizer("bpe", ranks, BPE_PATTERN, {EOT: len(ranks)})
    return check_tokenizer(config, tokenizer)


def check_tokenizer(config: Config, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, with the tokens that the config adds; UserError if it does not fit it."""
    if config.crystal_tokens:
        # Names that it has keep their ids, others get the next ones. No text gives any special.
        content = json.loads(tokenizer.data)
        missing = [name for name in CRYSTAL_TOKENS if name not in tokenizer.specials]
        for i, name in enumerate(missing, tokenizer.n_vocab):
            content["added_tokens"].append({"id": i, "content": name} | SPECIAL)
            content["model"]["vocab"][name] = i
        settings = tokenizer.config | {"split_special_tokens": True}
        tokenizer = read_tokenizer(*(json.dumps(x, indent=1).encode() for x in (content, settings)))
    if config.fim_rates and not tokenizer.specials.keys() >= set(FIM_TOKENS):
        raise UserError(f"fim_rates: the tokenizer {config.tokenizer} has no tokens for"
                        " infilling; set crystal_tokens = True.")
    if tokenizer.n_vocab > config.vocab_size:
        raise UserError(f"vocab_size is {config.vocab_size}, but the tokenizer {config.tokenizer}"
                        f" has {tokenizer.n_vocab} ids: set vocab_size to at least that.")
    return tokenizer


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of a directory that has one. The eos_token and the
    split_special_tokens of a tokenizer_config.json beside it are followed."""
    path = path / "tokenizer.json" if path.is_dir() else path
    beside = path.with_name("tokenizer_config.json")
    data, config_data = read_regular(path), read_regular(beside) if beside.exists() else b"{}"
    try:
        return read_tokenizer(data, config_data)
    except Exception as error:  # of any kind: anybody may have written the JSON
        raise UserError(f"{path} is not a tokenizer.json that can be followed here"
                        f" ({type(error).__name__}: {error}): LLaMA's can, with tokens added too,"
                        " and those made here. A sentencepiece .model is not read.")


@functools.lru_cache(maxsize=4)  # every command opens the same one in several places
def read_tokenizer(data: bytes, config_data: bytes) -> Tokenizer:
    """The tokenizer that a tokenizer.json and a tokenizer_config.json describe."""
    content, config = json.loads(data), json.loads(config_data)
    kind, splits = config.get("kind", ""), bool(config.get("split_special_tokens"))
    specials = {token["content"]: token["id"] for token in content["added_tokens"]}
    if kind == "bpe":
        ranks = {b"".join(BYTES[letter] for letter in piece): rank
                 for piece, rank in content["model"]["vocab"].items() if piece not in specials}
        pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        tokenizer = Tokenizer(kind, ranks, pattern, specials)
        # Hugging Face would follow whatever else it says.
        if tokenizer.data != data or tokenizer.config != config:
            raise ValueError(f"it is not what a tokenizer of the kind {kind} is saved as")
        return tokenizer
    eos = config.get("eos_token") or (EOT if EOT in specials else "</s>")
    eos = eos if isinstance(eos, str) else eos["content"]
    if eos not in specials:
        raise ValueError(f"it has no {eos} to end a document with, and there is no"
                         " tokenizer_config.json beside it that names another eos_token")
    for token in content["added_tokens"]:
        token["special"] |= token["content"] in (eos, *CRYSTAL_TOKENS)
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise ValueError(f"{token['content']} takes spaces around it along, or needs them")
    if content["model"].get("dropout"):
        raise ValueError("its merges are random (dropout)")
    # A post-processor puts a BOS before the text; the others cut it short or fill it up.
    content |= {"post_processor": None, "truncation": None, "padding": None}
    return LlamaTokenizer(content, eos, splits)
