"""tokenizer.py: the ids that Hugging Face gives, back and forth, saved and loaded; nothing damaged
is read without a word."""

import hashlib
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
import tiktoken
from helpers import ROOT, SHARED, fuzz, needs_shared, tiny_llama, words

from configs import Config, UserError
from tokenizer import (
    BPE_PATTERN,
    CRYSTAL_TOKENS,
    EOT,
    LlamaTokenizer,
    Tokenizer,
    check_tokenizer,
    load_tokenizer,
    make_tokenizer,
    open_tokenizer,
    replace_invalid_utf8,
    train_bpe,
)

LLAMA = SHARED / "llama_crystal_tokenizer.json"
TEXTS = [words(i, 60) + "\n don't 1234567  é漢 <|x|> \ufeff" for i in range(20)]


def bpe(texts: list[str], size: int) -> Tokenizer:
    ranks = train_bpe(texts, size - 1)
    return Tokenizer("bpe", ranks, BPE_PATTERN, {EOT: len(ranks)})


# ---- our own


def slow_bpe(texts: list[str], size: int) -> list[bytes]:
    """The definition of byte-pair encoding, with no cleverness."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(regex.findall(BPE_PATTERN, text))
    split = {word: [bytes([b]) for b in word.encode()] for word in counts}
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < size:
        pairs: Counter[tuple[int, int]] = Counter()
        for word, n in counts.items():
            for a, b in zip(split[word], split[word][1:]):
                pairs[tokens.index(a), tokens.index(b)] += n
        if not pairs:
            break
        a, b = min(pairs, key=lambda pair: (-pairs[pair], pair))
        union = tokens[a] + tokens[b]
        if union not in tokens:
            tokens.append(union)
        for word in split.values():
            i = 0
            while i < len(word):
                if word[i : i + 2] == [tokens[a], tokens[b]]:
                    word[i : i + 2] = [union]
                i += 1
    return tokens


def test_bpe_is_the_definition_and_deterministic() -> None:
    texts = [words(i, 60) + " aaaa aaa aaaaaaa the theme thesis 1234\n\n é漢" for i in range(8)]
    ranks = train_bpe(texts, 340)
    assert list(ranks) == slow_bpe(texts, 340)
    assert list(train_bpe(iter(texts), 340).items()) == list(ranks.items())
    assert len(train_bpe(["ab"], 400)) == 257  # nothing left to merge


def test_bpe_is_what_it_has_always_been(tmp_path: Path) -> None:
    entry = bpe(TEXTS, 400).save(tmp_path)
    assert entry["sha256"] == \
        "802657517a142246e9b9bce636cfe84b0d24d04135d1b20a9dd36227ddb50bf1"


def test_bpe_gives_the_text_back_after_saving(tmp_path: Path) -> None:
    entry = bpe(TEXTS, 300).save(tmp_path)
    assert [*entry] == ["kind", "file", "sha256", "n_vocab", "eos_id", "bos_id", "rule", "pattern",
                        "specials"]
    ours = load_tokenizer(tmp_path, json.loads(json.dumps(entry)))
    assert ours.n_vocab == 300 == entry["n_vocab"] and ours.eos_id == 299 == entry["eos_id"]
    for text in fuzz(3000, ["<|endoftext|>", "abc", "\ufeff"]):
        ids = ours.encode(text)
        assert ids.dtype == np.uint32 and ours.decode(ids) == text and ours.eos_id not in ids
        assert ours.token_bytes[ids].sum() == len(text.encode())
    assert ours.encode("\ud83d lone").size and ours.encode("").size == 0
    assert ours.decode([300, -5, 10**9]) == "\ufffd" * 3
    assert ours.decode([299]) == "<|endoftext|>" and ours.token_bytes[299] == 0


def test_invalid_text_becomes_valid() -> None:
    text = "a lone \ud83d, a pair \ud83d\ude00, \udc00"
    assert replace_invalid_utf8(text) == "a lone \ufffd, a pair 😀, \ufffd"
    good = "é漢😀\0\ufeff"
    assert replace_invalid_utf8(good) is good


# ---- LLaMA's


def check_llama(path: Path, n: int) -> None:
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_file(str(path))
    ours = LlamaTokenizer(str(path))
    names = re.compile("</?s>|<unk>|<.extra")
    spaces = [a + " " * k + b for k in range(80) for a in ("", "a", ",") for b in ("", "b", "1")]
    for text in itertools.chain(fuzz(n, list(theirs.get_vocab())), spaces):
        ids = ours.encode(text)
        assert ids.dtype == np.uint32
        assert ids.tolist() == theirs.encode(text, add_special_tokens=False).ids, repr(text)
        if not names.search(text):
            text = text.replace("\u2581", " ")
            assert ours.decode(ids) == text
            assert ours.token_bytes[ids].sum() == len(text.encode()) + (text != "")


@needs_shared
def test_llama_ids_equal_hugging_faces() -> None:
    check_llama(LLAMA, 12000)
    ours = LlamaTokenizer(str(LLAMA))
    assert (ours.n_vocab, ours.eos_id) == (32000, 2)
    assert ours.encode("Question: 2+2 </s> a</s>").tolist() == [
        894, 29901, 29871, 29906, 29974, 29906, 2, 263, 829, 29879, 29958]


def test_added_tokens_are_found_where_hugging_face_finds_them(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "tokenizer.json", n_added=3)
    check_llama(path, 4000)
    ours = LlamaTokenizer(str(path))
    assert ours.n_vocab == 281 and ours.encode("a<|extra_0|>b").tolist()[1:3] == [264, 278]
    assert ours.decode([278, 2, 999, -1]) == "<|extra_0|></s>\ufffd\ufffd"


def test_llamas_file_is_saved_as_it_is(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "llama.json", n_added=3)
    entry = LlamaTokenizer(str(path)).save(tmp_path)
    assert entry["kind"] == "llama" and entry["file"] == "tokenizer.json"
    assert (tmp_path / "tokenizer.json").read_bytes() == path.read_bytes()
    ours = load_tokenizer(tmp_path, entry)
    assert (ours.n_vocab, ours.eos_id) == (281, 2) == (entry["n_vocab"], entry["eos_id"])
    assert ours.specials == entry["specials"] and len(ours.specials) == 6


WRONG_JSON = {
    "byte_fallback": lambda d: d["model"].update(byte_fallback=False),
    "normalizer": lambda d: d["normalizer"]["normalizers"].pop(),
    "pre_tokenizer": lambda d: d.update(pre_tokenizer={"type": "ByteLevel"}),
    "merges": lambda d: d["model"]["merges"].pop(0),
    "strips": lambda d: d["added_tokens"][1].update(lstrip=True),
    "crosses a cut": lambda d: d["model"]["vocab"].update({"a\u2581b": 500}),
    "<0x00>": lambda d: d["model"]["vocab"].pop("<0x00>"),
    "</s>": lambda d: d["added_tokens"].pop(2),
    "'model'": lambda d: d.pop("model"),
    "vocab": lambda d: d["model"].pop("vocab"),
    "NoneType": lambda d: d.update(added_tokens=None),
}


@pytest.mark.parametrize("problem", WRONG_JSON)
def test_a_file_that_is_not_llamas_is_refused(problem: str, tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "tokenizer.json")
    content = json.loads(path.read_text())
    WRONG_JSON[problem](content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"is not a tokenizer.json that can be.*{problem}"):
        LlamaTokenizer(str(path))


def test_a_file_that_is_no_tokenizer_is_one_short_sentence(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    for data in (b"", b"{}", b"[]", b"7", b"[" * 100_000, b"\x0a\xff\xff sentencepiece" * 1000):
        path.write_bytes(data)
        with pytest.raises(UserError, match="not a tokenizer.json that can be followed") as error:
            LlamaTokenizer(str(path))
        assert len(str(error.value)) < 330 + len(str(path))


# ---- made for a config


# ---- GPT-2's and its descendants'

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
          r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def family(name: str, path: Path) -> Path:
    """Write a small tokenizer.json built as that of a family of models, and its config."""
    hub = pytest.importorskip("tokenizers")
    split, bytes_of = hub.pre_tokenizers.Split, hub.pre_tokenizers.ByteLevel
    alone, after = bytes_of(add_prefix_space=False), bytes_of(False, use_regex=False)
    pre = {"gpt2": alone, "olmo": alone,
           "smollm": hub.pre_tokenizers.Sequence([hub.pre_tokenizers.Digits(True), alone]),
           "llama3": hub.pre_tokenizers.Sequence([split(hub.Regex(LLAMA3), "isolated"), after]),
           "qwen": hub.pre_tokenizers.Sequence([
               split(hub.Regex(LLAMA3.replace("{1,3}", "")), "isolated"), after])}[name]
    theirs = hub.Tokenizer(hub.models.BPE(ignore_merges=name == "llama3"))
    theirs.pre_tokenizer, theirs.decoder = pre, hub.decoders.ByteLevel()
    if name in ("olmo", "qwen"):
        theirs.normalizer = hub.normalizers.NFC()
    # SmolLM2's lacks eight of the bytes.
    alphabet = sorted(bytes_of.alphabet())[: -8 if name == "smollm" else None]
    texts = ["".join(fuzz(400, ["the ", "we'll ", "été ", "12 ", "漢字"])), words(3, 900)]
    theirs.train_from_iterator(texts, hub.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<|endoftext|>", "</s>"]))
    theirs.add_special_tokens(["<|im_start|>"])
    if name == "olmo":  # GPT-NeoX has tokens for long rows of spaces, which are no specials
        theirs.add_tokens([hub.AddedToken(" " * n, normalized=n % 2 == 0) for n in (8, 5, 4)])
        theirs.add_tokens([hub.AddedToken("|IP|", normalized=True)])
    theirs.save(str(path))
    path.with_name("tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return path


@pytest.mark.parametrize("name", ["gpt2", "smollm", "llama3", "olmo", "qwen"])
def test_a_byte_level_tokenizer_has_hugging_faces_ids(name: str, tmp_path: Path) -> None:
    path = family(name, tmp_path / "tokenizer.json")
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_file(str(path))
    ours = make_tokenizer(config(tokenizer=f"hf:{tmp_path}", vocab_size=1000), [])
    assert ours.eos_id == theirs.token_to_id("<|endoftext|>")
    pieces = [theirs.decode([i], skip_special_tokens=False) for i in range(600)]
    odd = ["<|im_start|>", "|IP|", "e\u0301", "we'LL ", " 7", "\n\n  x", "ſ", "'ſ", "\x85"]
    for text in itertools.chain(fuzz(4000, pieces), fuzz(3000, odd)):
        ids = ours.encode(text)
        assert ids.tolist() == theirs.encode(text, add_special_tokens=False).ids, repr(text)
        if name in ("gpt2", "llama3"):  # these lose nothing
            assert ours.decode(ids) == text
    # What a data set and a checkpoint keep of it is the same tokenizer.
    again = load_tokenizer(tmp_path, ours.save(tmp_path))
    check_hugging_face(ours, tmp_path / "hub", 300)
    published = open_tokenizer(tmp_path / "hub")
    for text in fuzz(300, pieces):
        assert (ours.encode(text) == again.encode(text)).all()
        assert (ours.encode(text) == published.encode(text)).all()


def test_our_own_tokenizer_is_read_again_from_a_checkpoint(tmp_path: Path) -> None:
    ours = bpe([words(1, 500), "".join(fuzz(300, ["the "]))], 500)
    ours.save_hugging_face(tmp_path)
    again = open_tokenizer(tmp_path)
    assert (again.n_vocab, again.eos_id) == (ours.n_vocab, ours.eos_id)
    for text in fuzz(2000, ["the ", "<|endoftext|>"]):
        assert (again.encode(text) == ours.encode(text)).all()


WRONG_HUB = {
    "unk_token": lambda d: d["model"].update(unk_token="<unk>"),
    "WordPiece": lambda d: d["model"].update(type="WordPiece"),
    "Lowercase": lambda d: d.update(normalizer={"type": "Lowercase"}),
    "adds a space": lambda d: d["pre_tokenizer"].update(add_prefix_space=True),
    "Whitespace": lambda d: d.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Whitespace"}, d["pre_tokenizer"]]}),
    "strips": lambda d: d["added_tokens"][0].update(lstrip=True),
    "no merge makes": lambda d: d["model"]["merges"].pop(),
    "do not follow": lambda d: d["model"]["merges"].append(d["model"]["merges"][0]),
    "other parts": lambda d: d["model"]["merges"].reverse(),
    "no <.endoftext": lambda d: d["added_tokens"].pop(0),
}


@pytest.mark.parametrize("problem", WRONG_HUB)
def test_a_tokenizer_that_cannot_be_followed_is_refused(problem: str, tmp_path: Path) -> None:
    path = family("gpt2", tmp_path / "tokenizer.json")
    content = json.loads(path.read_text())
    WRONG_HUB[problem](content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=problem):
        open_tokenizer(path)


def config(**settings: Any) -> Config:
    return Config(**{"vocab_size": 300} | settings)


def test_a_bpe_tokenizer_fills_the_vocabulary() -> None:
    assert make_tokenizer(config(), TEXTS).n_vocab == 300
    crystal = make_tokenizer(config(crystal_tokens=True), TEXTS)
    assert crystal.n_vocab == 300 and crystal.eos_id == 300 - 23
    with pytest.raises(UserError, match="vocab_size is 100, but the tokenizer bpe has 257 ids"):
        make_tokenizer(config(vocab_size=100), TEXTS)
    with pytest.raises(UserError, match="vocab_size is 270, but the tokenizer bpe has 279 ids"):
        make_tokenizer(config(vocab_size=270, crystal_tokens=True), TEXTS)


def test_infilling_needs_its_tokens() -> None:
    rates = {"code": 0.5}
    with pytest.raises(UserError, match=r"tokenizer bpe has no <\|fim_prefix\|>; set crystal"):
        make_tokenizer(config(fim_rates=rates), TEXTS)
    crystal = make_tokenizer(config(crystal_tokens=True), TEXTS)
    # A later stage takes over the tokenizer of an earlier one, with its tokens or to add them.
    assert check_tokenizer(config(fim_rates=rates), crystal) is crystal
    again = check_tokenizer(config(fim_rates=rates, crystal_tokens=True), crystal)
    assert again.specials == crystal.specials and again.n_vocab == 300


def test_llamas_tokenizer_must_be_there_and_fit(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "tokenizer.json")
    assert make_tokenizer(config(tokenizer=f"llama:{path}"), []).n_vocab == 278
    with pytest.raises(UserError, match="vocab_size is 270, but .* has 278 ids"):
        make_tokenizer(config(tokenizer=f"llama:{path}", vocab_size=270), [])
    with pytest.raises(FileNotFoundError) as error:  # which run_command says in one sentence
        make_tokenizer(config(tokenizer=f"llama:{tmp_path}/no.json"), [])
    assert error.value.filename == f"{tmp_path}/no.json"


def test_tiktokens_encodings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 256}
    fake = tiktoken.Encoding("gpt2", pat_str=r"\w+|\W+", mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 280, "<|x|>": 290})
    gpt2 = config(tokenizer="tiktoken:gpt2")
    with monkeypatch.context() as patch:
        patch.setattr(tiktoken, "get_encoding", lambda name: fake)
        entry = make_tokenizer(gpt2, []).save(tmp_path)
    ours = load_tokenizer(tmp_path, entry)  # from the data alone
    assert entry["kind"] == "tiktoken:gpt2"
    assert (ours.n_vocab, ours.eos_id) == (291, 280) == (entry["n_vocab"], entry["eos_id"])
    assert ours.encode("abc <|x|>").tolist() == fake.encode("abc <|x|>", disallowed_special=())

    with pytest.raises(UserError, match="tiktoken cannot load 'gpt9' .*it knows .*gpt2"):
        make_tokenizer(config(tokenizer="tiktoken:gpt9"), [])

    def offline(name: str) -> None:
        raise ConnectionError("no route to host")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="cannot load 'gpt2' .ConnectionError.*Without a network"):
        make_tokenizer(gpt2, [])


# ---- loading


def test_loading_again_costs_nothing_and_is_never_stale(tmp_path: Path) -> None:
    entry = bpe(TEXTS, 300).save(tmp_path)
    first = load_tokenizer(tmp_path, entry)
    assert load_tokenizer(tmp_path, dict(entry)) is first
    other = bpe(TEXTS, 310).save(tmp_path)
    assert load_tokenizer(tmp_path, other).n_vocab == 310


def test_a_changed_file_is_not_read(tmp_path: Path) -> None:
    llama = LlamaTokenizer(str(tiny_llama(tmp_path / "llama.json")))
    for ours in (bpe(TEXTS, 300), llama):
        entry = ours.save(tmp_path)
        path = tmp_path / entry["file"]
        data = path.read_bytes()
        for damaged in (data[:-1], data + b"\n", data.replace(b"7", b"8", 1), b""):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="its sha256 is not the manifest's"):
                load_tokenizer(tmp_path, entry)
        path.unlink()
        with pytest.raises(FileNotFoundError):
            load_tokenizer(tmp_path, entry)


# Lines 1, 2, 3 ... of the file are the bytes 0, 1, 2 ..., with ranks 0, 1, 2 ...
WRONG_LINES = {
    "a word too many": ("AA== 0", "AA== 0 0"),
    "a word too few": ("AA== 0", "AA=="),
    "an empty line": ("AA== 0", ""),
    "no base64": ("AA== 0", "A?== 0"),
    "no number": ("AA== 0", "AA== zero"),
    "a rank twice": ("AA== 0", "AA== 1"),
    "a piece twice": ("AA== 0", "AQ== 0"),
    "the rank of a special": ("AA== 0", "AA== 299"),
    "a negative rank": ("AA== 0", "AA== -1"),
    "a rank beyond the vocabulary": ("AA== 0", "AA== 300"),
    "a rank that no integer of tiktoken holds": ("AA== 0", "AA== 99999999999999"),
    "a byte that is missing": ("AA== 0\n", ""),
    "a byte that is another piece": ("AA== 0", "AAA= 0"),
}


@pytest.mark.parametrize("problem", WRONG_LINES)
def test_what_is_no_vocabulary_is_not_read(problem: str, tmp_path: Path) -> None:
    """Even if the manifest says that it is the right file."""
    entry = bpe(TEXTS, 300).save(tmp_path)
    path = tmp_path / entry["file"]
    before, after = WRONG_LINES[problem]
    text = path.read_text()
    assert text.startswith("AA== 0\nAQ== 1\n")
    path.write_text(text.replace(before, after, 1))
    entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError):
        load_tokenizer(tmp_path, entry)


def test_a_pattern_that_does_not_compile_is_not_read(tmp_path: Path) -> None:
    entry = bpe(TEXTS, 300).save(tmp_path)
    with pytest.raises(ValueError):
        load_tokenizer(tmp_path, entry | {"pattern": "("})


# ---- Crystal's tokens


def test_crystals_tokens_have_its_ids_and_are_never_found_in_text(tmp_path: Path) -> None:
    assert len(CRYSTAL_TOKENS) == 22 and CRYSTAL_TOKENS.index("<|sys_end|>") == 21
    assert CRYSTAL_TOKENS.index("<|filename|>") == 4 and CRYSTAL_TOKENS.index("<|reponame|>") == 17
    llama = LlamaTokenizer(str(tiny_llama(tmp_path / "llama.json")))
    for plain in (bpe([words(1, 60)], 400), llama):
        ours, n = plain.add(CRYSTAL_TOKENS), plain.n_vocab + 22
        assert [ours.specials[name] for name in CRYSTAL_TOKENS] == list(range(n - 22, n))
        text = "x" + "".join(CRYSTAL_TOKENS) + " </s>"
        assert ours.encode(text).max() < n - 22
        assert ours.decode(ours.encode(text)).startswith("x<|fim_prefix|><|fim_mid")
        assert len(ours.token_bytes) == n and not ours.token_bytes[-22:].any()
        assert plain.n_vocab == n - 22 and not plain.added  # the one it was made from is as it was
        entry = ours.save(tmp_path)
        assert entry["added"] == CRYSTAL_TOKENS
        again = load_tokenizer(tmp_path, entry)
        assert again.specials == ours.specials and again.pieces == ours.pieces
        assert again.encode(text).tolist() == ours.encode(text).tolist()


def test_a_file_that_has_crystals_tokens_keeps_their_ids(tmp_path: Path) -> None:
    """As CrystalCoder's has. But added, they are not found in a text any more."""
    path = tiny_llama(tmp_path / "tokenizer.json")
    content = json.loads(path.read_text())
    last = max(content["model"]["vocab"].values())
    for i, name in enumerate(CRYSTAL_TOKENS):
        token = {**content["added_tokens"][0], "content": name, "id": last + 1 + i}
        content["added_tokens"].append(token)
    path.write_text(json.dumps(content))
    plain = LlamaTokenizer(str(path))
    ours = plain.add(CRYSTAL_TOKENS)
    assert ours.n_vocab == plain.n_vocab and ours.specials == plain.specials
    assert plain.encode("<|fim_pad|>").tolist() == [ours.specials["<|fim_pad|>"]]
    assert len(ours.encode("<|fim_pad|>")) > 1


# ---- Hugging Face's form


def check_hugging_face(ours: Tokenizer, hub: Path, n: int) -> None:
    """AutoTokenizer gives our ids for any text, and our text for them."""
    transformers = pytest.importorskip("transformers")
    hub.mkdir()
    ours.save_hugging_face(hub)
    (hub / "config.json").write_text('{"model_type": "llama"}')  # as beside the weights
    theirs = transformers.AutoTokenizer.from_pretrained(hub)
    assert theirs.eos_token_id == ours.eos_id and theirs.bos_token_id is None
    names = re.compile("|".join(map(re.escape, ours.specials)))
    pieces = [piece.decode("utf-8", "replace") for piece in ours.pieces.values()]
    known = ["", "\n", " ", *TEXTS[:3], "it'ſ IT'LL 'S", "1234567 12", "  \r\n \n\n x\t\n "]
    spaces = [a + " " * k + b for k in range(20) for a in ("", "é") for b in ("", "b\n", "1")]
    specials = [f"{a} {b} {a}x{b}" for a, b in itertools.product(ours.specials, repeat=2)]
    for text in itertools.chain(fuzz(n, pieces), known, spaces, specials):
        ids = ours.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids, repr(text)
        if ours.kind != "llama" or not names.search(text):  # there 2 decodes to " </s>"
            assert theirs.decode(ids) == ours.decode(ids), repr(text)
    if theirs.split_special_tokens:
        end = [*ours.encode("ab").tolist(), ours.eos_id]
        assert theirs.decode(end, skip_special_tokens=True) == "ab"


def test_bpe_has_the_same_ids_in_hugging_face(tmp_path: Path) -> None:
    texts = [*TEXTS, "aaaa aaa aaaaaaaa \n\n\n \t the theme thesis" * 9,
             (ROOT / "tokenizer.py").read_text()]
    ours = bpe(texts, 900)
    check_hugging_face(ours, tmp_path / "hub", 1500)
    check_hugging_face(ours.add(CRYSTAL_TOKENS), tmp_path / "crystal", 300)


def test_tiktokens_encodings_have_the_same_ids_in_hugging_face(tmp_path: Path) -> None:
    """With the patterns of its encodings, GPT-4's \\p{N}{1,3}+ among them. Their vocabularies would
    have to be downloaded."""
    from tiktoken_ext import openai_public
    code = (ROOT / "tokenizer.py").read_text()
    ranks = train_bpe([*TEXTS, code, "it's THEY'LL 123456 " * 9], 700)
    found = {}
    for name in openai_public.ENCODING_CONSTRUCTORS:
        with pytest.MonkeyPatch.context() as patch:
            for reader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
                patch.setattr(openai_public, reader, lambda *_, **__: ranks)
            found[openai_public.ENCODING_CONSTRUCTORS[name]()["pat_str"]] = name
    assert len(found) >= 3 and any("{1,3}+" in pattern for pattern in found)
    for pattern, name in found.items():
        specials = {EOT: len(ranks) + 3, "<|x|>": len(ranks) + 9}  # ids with gaps before them
        check_hugging_face(Tokenizer(name, ranks, pattern, specials), tmp_path / name, 600)


def test_a_small_llama_has_the_same_ids_in_hugging_face(tmp_path: Path) -> None:
    ours = LlamaTokenizer(str(tiny_llama(tmp_path / "tokenizer.json", n_added=2)))
    check_hugging_face(ours, tmp_path / "hub", 1000)


@needs_shared
def test_llamas_tokenizer_has_the_same_ids_in_hugging_face(tmp_path: Path) -> None:
    ours = LlamaTokenizer(str(LLAMA))
    check_hugging_face(ours, tmp_path / "hub", 1500)
    again = LlamaTokenizer(str(tmp_path / "hub/tokenizer.json"))  # and it can make data here
    for text in fuzz(500, ["a"]):
        assert again.encode(text).tolist() == ours.encode(text).tolist()
