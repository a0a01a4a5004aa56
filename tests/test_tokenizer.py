"""tokenizer.py: the ids of Hugging Face, back and forth, saved and loaded; a damaged file is
refused."""

import doctest
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
from helpers import ROOT, SHARED, fuzz, needs_shared, tiny_llama, words

import tokenizer as tok
from configs import Config, UserError
from tokenizer import CRYSTAL_TOKENS, Tokenizer, make_tokenizer, open_tokenizer

LLAMA = SHARED / "llama_crystal_tokenizer.json"
TEXTS = [words(i, 60) + "\n don't 1234567  é漢 <|x|> \ufeff" for i in range(20)]
CODE = (ROOT / "tokenizer.py").read_text()
SPACES = [a + " " * k + b for k in range(40) for a in ("", "é", ",") for b in ("", "b\n", "1")]


def config(**settings: Any) -> Config:
    return Config(**{"vocab_size": 300} | settings)


def bpe(texts: list[str], size: int) -> Tokenizer:
    return make_tokenizer(config(vocab_size=size), texts)


def with_crystal_tokens(plain: Tokenizer) -> Tokenizer:
    return tok.check_tokenizer(config(crystal_tokens=True, vocab_size=40_000), plain)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def check_saved(ours: Tokenizer, directory: Path, n: int = 300) -> None:
    """Saved and loaded it is the same, and AutoTokenizer gives our ids for any text, and our text
    for them."""
    transformers = pytest.importorskip("transformers")
    directory.mkdir()
    assert json.loads(json.dumps(ours.save(directory))) == ours.entry
    again = open_tokenizer(directory)
    assert type(again) is type(ours) and again.entry == ours.entry and again.data == ours.data
    assert (again.token_bytes == ours.token_bytes).all() and again.pieces == ours.pieces
    (directory / "config.json").write_text('{"model_type": "llama"}')  # as beside the weights
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert theirs.eos_token_id == ours.eos_id and theirs.bos_token_id is None
    pieces = [piece.decode("utf-8", "replace") for piece in ours.pieces.values()]
    names = re.compile("|".join(map(re.escape, ours.specials)))
    known = ["", "\n", " ", *TEXTS[:3], "it'ſ IT'LL 'S", "1234567 12", "  \r\n \n\n x\t\n "]
    specials = [f"{a} {b} {a}x{b}" for a, b in itertools.product(ours.specials, repeat=2)]
    for text in itertools.chain(fuzz(n, pieces), known, SPACES, specials):
        ids = ours.encode(text)
        assert ids.dtype == np.uint32 and theirs(text)["input_ids"] == ids.tolist(), repr(text)
        assert (again.encode(text) == ids).all()
        if ours.kind != "llama" or not names.search(text):  # there 2 decodes to " </s>"
            assert theirs.decode(ids) == ours.decode(ids), repr(text)


# ---- our own, and OpenAI's


def slow_bpe(texts: list[str], size: int) -> list[bytes]:
    """The definition of byte-pair encoding, with no cleverness."""
    found = regex.findall(tok.BPE_PATTERN, "".join(texts))
    cut = [word.encode().decode("latin-1") for word in found]  # strings of chr(token id)
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < size:
        pairs = Counter(a + b for word in cut for a, b in zip(word, word[1:]))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        union = tokens[ord(best[0])] + tokens[ord(best[1])]
        if union not in tokens:
            tokens.append(union)
        cut = [word.replace(best, chr(tokens.index(union))) for word in cut]
    return tokens


def test_bpe_is_the_definition() -> None:
    texts = [words(i, 60) + " aaaa aaa aaaaaaa the theme thesis 1234\n\n é漢\n" for i in range(8)]
    ranks = tok.train_bpe(iter(texts), 340)
    assert list(ranks) == slow_bpe(texts, 340) and [*ranks.values()] == [*range(340)]
    assert len(tok.train_bpe(["ab"], 400)) == 257  # nothing left to merge
    assert doctest.testmod(tok) == (0, 4)


def test_bpe_gives_the_text_back() -> None:
    ours = bpe(TEXTS, 300)
    assert (ours.n_vocab, ours.eos_id) == (300, 299)
    for text in fuzz(1000, ["<|endoftext|>", "abc", "\ufeff"]):
        ids = ours.encode(text)
        assert ours.decode(ids) == text and ours.eos_id not in ids
        assert ours.token_bytes[ids].sum() == len(text.encode())
    assert ours.encode("\ud83d lone").size and ours.encode("").size == 0
    assert ours.decode([300, -5, 10**9]) == "\ufffd" * 3
    assert ours.decode([299]) == "<|endoftext|>" and ours.token_bytes[299] == 0


def test_bpe_has_the_same_ids_in_hugging_face(tmp_path: Path) -> None:
    ours = bpe([*TEXTS, "aaaa aaa aaaaaaaa \n\n\n \t the theme thesis" * 9, CODE], 900)
    check_saved(ours, tmp_path / "hub", 1000)
    check_saved(with_crystal_tokens(ours), tmp_path / "crystal")


# ---- LLaMA's


def small_llama(path: Path, n_added: int = 0) -> Path:
    tiny_llama(path, n_added)
    edit(path, lambda d: d.update(decoder={"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}))
    return path


def check_llama(path: Path, n: int, tmp_path: Path) -> None:
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_file(str(path))
    ours = open_tokenizer(path)
    names = re.compile("</?s>|<unk>|<.extra")
    for text in itertools.chain(fuzz(n, list(theirs.get_vocab())), SPACES):
        ids = ours.encode(text)
        assert ids.tolist() == theirs.encode(text, add_special_tokens=False).ids, repr(text)
        if not names.search(text):
            text = text.replace("\u2581", " ")
            assert ours.decode(ids) == text
            assert ours.token_bytes[ids].sum() == len(text.encode()) + (text != "")
    check_saved(ours, tmp_path / "llama")
    check_saved(with_crystal_tokens(ours), tmp_path / "crystal")


@needs_shared
def test_llama_ids_equal_hugging_faces(tmp_path: Path) -> None:
    check_llama(LLAMA, 5000, tmp_path)
    ours = open_tokenizer(LLAMA)
    assert (ours.kind, ours.n_vocab, ours.eos_id) == ("llama", 32000, 2)
    assert ours.encode("Question: 2+2 </s> a</s>").tolist() == [
        894, 29901, 29871, 29906, 29974, 29906, 2, 263, 829, 29879, 29958]


def test_a_small_llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small_llama(tmp_path / "tokenizer.json", n_added=3)
    check_llama(path, 2000, tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # it does not need the package
    tok.read_tokenizer.cache_clear()
    ours = open_tokenizer(path)
    assert ours.n_vocab == 281 and ours.encode("a<|extra_0|>b").tolist()[1:3] == [264, 278]
    assert ours.decode([278, 2, 999, -1]) == "<|extra_0|></s>\ufffd\ufffd"


def test_crystals_tokens_have_its_ids_and_are_never_found_in_text(tmp_path: Path) -> None:
    assert [CRYSTAL_TOKENS.index(f"<|{x}|>") for x in ("filename", "reponame")] == [4, 17]
    path = tiny_llama(tmp_path / "tokenizer.json")
    for plain in (bpe([words(1, 60)], 400), open_tokenizer(path)):
        ours, n = with_crystal_tokens(plain), plain.n_vocab + 22
        assert [ours.specials[name] for name in CRYSTAL_TOKENS] == list(range(n - 22, n))
        text = "x" + "".join(CRYSTAL_TOKENS) + " </s>"
        assert not {*ours.encode(text)} & {*ours.specials.values()}
        assert len(ours.token_bytes) == n and not ours.token_bytes[-22:].any()
    # A file that has them, as CrystalCoder's, keeps their ids. But added, they are not found.
    edit(path, lambda d: d["added_tokens"].extend(
        {**d["added_tokens"][0], "id": 278 + i, "content": name, "special": False}
        for i, name in enumerate(CRYSTAL_TOKENS)))
    plain = open_tokenizer(path)
    ours = with_crystal_tokens(plain)
    assert ours.n_vocab == plain.n_vocab == 300 and ours.specials == plain.specials
    assert plain.encode("<|fim_pad|>").tolist() == [ours.specials["<|fim_pad|>"]]
    assert len(ours.encode("<|fim_pad|>")) > 1


# ---- what is refused


def test_what_cannot_be_followed_is_refused_in_a_sentence(tmp_path: Path) -> None:
    refusal = "not a tokenizer.json that can be followed"
    path = tmp_path / "tokenizer.json"
    right = small_llama(path).read_bytes()
    for problem, change in (
            ("not LLaMA's", lambda d: d.update(normalizer={"type": "Lowercase"})),
            ("not LLaMA's", lambda d: d["model"]["merges"].pop(0)),
            ("not LLaMA's", lambda d: d["normalizer"]["normalizers"].pop()),
            ("not LLaMA's", lambda d: d["model"]["vocab"].update({"a\u2581b": 500})),
            ("random", lambda d: d["model"].update(dropout=0.1)),
            ("takes spaces", lambda d: d["added_tokens"][0].update(lstrip=True)),
            ("no </s> to end a document", lambda d: d["added_tokens"].clear())):
        path.write_bytes(right)
        edit(path, change)
        with pytest.raises(UserError, match=f"{refusal}.*{problem}"):
            open_tokenizer(path)
    # Hugging Face would follow these, and give other ids than this code.
    for change in (lambda d: d["model"]["merges"].reverse(),
                   lambda d: d.update(normalizer={"type": "Lowercase"}),
                   lambda d: d["added_tokens"][0].update(rstrip=True)):
        bpe(TEXTS, 300).save(tmp_path)
        edit(path, change)
        with pytest.raises(UserError, match="not what a tokenizer of the kind bpe is saved as"):
            open_tokenizer(tmp_path)


# ---- made for a config, and loaded


def test_a_tokenizer_fits_its_config() -> None:
    crystal = make_tokenizer(config(crystal_tokens=True), TEXTS)
    assert crystal.n_vocab == 300 and crystal.eos_id == 300 - 23
    for settings, problem in (
            ({"vocab_size": 100}, "vocab_size is 100, but the tokenizer bpe has 257 ids"),
            ({"fim_rates": {"a": 0.5}}, "no tokens for infilling")):
        with pytest.raises(UserError, match=problem):
            make_tokenizer(config(**settings), TEXTS)
