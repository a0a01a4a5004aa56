"""prepare_data.py tells what it does not read, and reads what a person named."""

import gzip
import json
import os
from pathlib import Path

import pytest
from helpers import ROOT, jsonl, words

import prepare_data as pd
from configs import UserError
from data import load_data

TEXTS = [words(i, 30) for i in range(10)]


def prepare(out: Path, *settings: str) -> int:
    small = ("--vocab_size=300", "--seq_len=16", "--n_chunks=1", "--valid_sequences=5")
    pd.main([f"{ROOT}/configs/amber_tiny.py", f"--data_dir={out}", *small, *settings])
    return load_data(out).manifest["sources"][0]["documents"]


def test_what_is_not_read_is_told(tmp_path: Path, capsys: pytest.CaptureFixture,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    text, listdir = tmp_path / "text", os.listdir
    lines = Path(jsonl(text / "[1].jsonl", TEXTS)).read_bytes()
    (text / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\n\n"))
    (text / "dolma.json.gz").write_bytes(gzip.compress(b"\n" + lines[:-9] + b"\xff" + lines[-9:]))
    (text / "both.jsonl").write_text(json.dumps({"text": None, "content": TEXTS[0]}))
    (text / "large.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1")
    (text / "locked").mkdir()
    jsonl(text / ".hidden.jsonl", TEXTS)
    jsonl(tmp_path / "disk" / "far.jsonl", TEXTS)
    for link, target in (("text/linked", "disk"), ("disk/loop", "text"), ("disk/again", "text")):
        (tmp_path / link).symlink_to(tmp_path / target)
    monkeypatch.setattr(os, "listdir", lambda p: listdir("/no" if "locked" in str(p) else p))
    for name, place in (("folder", ""), ("all", "/**"), ("deep", "/**/*")):
        assert prepare(tmp_path / name, f"--sources={{'a': '{text}{place}'}}") == 41
        told = capsys.readouterr().out.splitlines()[-1]
        for what in ("1 x hidden", "1 x git-lfs", "1 x folder that may", "2 x folder that is read",
                     "1 x repaired", "left over by steps of 16"):
            assert what in told
    for n, name in enumerate(("[1].jsonl", "[2]/*.jsonl", "[[]1].jsonl")):
        jsonl(text / "[2]" / "a.jsonl", TEXTS)
        jsonl(text / "1.jsonl", TEXTS[:5])  # what [1].jsonl means as a glob
        assert prepare(tmp_path / f"of{n}", f"--sources={{'a': '{text}/{name}'}}") == 10


def test_links_of_a_data_directory(tmp_path: Path) -> None:
    text = f"--sources={{'a': '{jsonl(tmp_path / 'a.jsonl', TEXTS)}'}}"
    for folder in ("disk", "theirs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "out").symlink_to("disk")
    assert prepare(tmp_path / "out", text) == 10
    (tmp_path / "disk" / "lock").write_text("precious")
    (tmp_path / "theirs" / "unfinished").symlink_to(tmp_path / "disk")
    with pytest.raises(UserError, match="is not a data set"):
        prepare(tmp_path / "theirs", text)
    assert (tmp_path / "disk" / "lock").exists() and (tmp_path / "disk" / "train").exists()
