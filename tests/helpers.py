"""What several test files share: texts, small tokenizers, random strings."""

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"  # a few files of LLM360's and LLaMA's; they may be absent
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the shared data is absent")


def words(seed: int, n: int) -> str:
    """n made-up words of eight letters, all equally likely: nothing can be learned from them."""
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefgh", k=rng.randint(1, 9))) for _ in range(n))


def sentences(seed: int, n: int) -> str:
    """n lines of nine words of a made-up language, frequent and rare ones as Zipf says: a model
    can learn it."""
    rng = random.Random(seed)
    lexicon = ["".join(rng.choices("aeioulnrst", k=rng.randint(2, 7))) for _ in range(200)]
    weights = [1 / (i + 1) for i in range(200)]
    return "\n".join(" ".join(rng.choices(lexicon, weights, k=9)) + "." for _ in range(n))


def jsonl(path: Path, texts: Iterable[str], key: str = "text") -> str:
    """Write one {key: text} a line; returns the path as the settings want it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return str(path)


def tiny_llama(path: Path, n_added: int = 0) -> Path:
    """Write a tokenizer.json built as LLaMA's, with four merges (278 ids) and n_added tokens."""
    vocab = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>"])}
    vocab |= {f"<0x{b:02X}>": 3 + b for b in range(256)}
    for piece in ["\u2581t", "he", "\u2581the", "\u2581\u2581", "\u2581", *"abcdefghijkté漢"]:
        vocab[piece] = len(vocab)
    merges = [["\u2581", "t"], ["h", "e"], ["\u2581t", "he"], ["\u2581", "\u2581"]]
    token = {"single_word": False, "lstrip": False, "rstrip": False, "special": True}
    added = [token | {"id": i, "content": name, "normalized": True}
             for i, name in enumerate(["<unk>", "<s>", "</s>"])]
    # Where two of them fit, the longer one is found.
    extra = ["<|extra_0|>", "<|extra_1|>", "<|extra_0|>a"][:n_added]
    added += [token | {"id": len(vocab) + i, "content": name, "normalized": bool(i % 2)}
              for i, name in enumerate(extra)]
    path.write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
        "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>",
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
                  "byte_fallback": True, "vocab": vocab, "merges": merges}}))
    return path


POOLS = ["abcde ", " \t\n\r", "  \u2581", "éüñßçа б",
         "漢字かな한글", "😀👨\u200d👩👧🏽", "0123456789",
         "٣४", "\x00\x01\x1f\x7f", "!?.,;:-_=+*/\\'\"()[]{}<>", "\u2028\u2029\u00a0\ufffd", "ابتث",
         "हिन्दी", "\u0301\u0300\u20dd", "the of and ing tion"]
SPECIAL = [" ", "  ", "</s>", " </s>", "<s>", "<unk>", "a", "\u2581</s>", "<0x41>", "the",
           "<|extra_0|>", "<|extra_1|>"]


def fuzz(n: int, pieces: list[str], specials: bool = True) -> Iterator[str]:
    """n strings of up to 40 letters (or 20 pieces): of one alphabet, of several, of `pieces` in a
    row, of any code points, and of the names of special tokens."""
    rng = random.Random(n)
    anything = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for i in range(n):
        size = rng.randint(0, 40)
        kind = i % 5
        if kind == 0:
            yield "".join(rng.choices(rng.choice(POOLS), k=size))
        elif kind == 1:
            yield "".join(rng.choice(rng.choice(POOLS)) for _ in range(size))
        elif kind == 2:
            yield "".join(rng.choices(pieces, k=size // 2))
        elif kind == 3:
            yield "".join(map(chr, rng.choices(anything, k=size)))
        elif specials:
            yield "".join(rng.choices(SPECIAL, k=size // 2))
