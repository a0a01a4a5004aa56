"""tools/fuzz.py: a few of its cases, and whether it sees the harm that it looks for."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from launch import Script

from tools import fuzz


@pytest.mark.parametrize("words, harm", [([], False), (["--unchecked"], True)])
def test_cases(words: list[str], harm: bool) -> None:
    text, _ = (script := Script("tools/fuzz.py", "--cases=18", *words)).communicate(timeout=400)
    assert script.returncode == harm and "other numbers: {" in text or not harm, text[-3000:]


@pytest.mark.parametrize("fault, harm", [
    (lambda: 1 / 0, ""),
    (lambda: open("others/new", "w").close(), "others/new"),
    (lambda: Path("runs/mini/mine/file").unlink(), "runs/mini/mine/file"),
    (lambda: os.system("touch ran"), "ran"),
    (lambda: os.kill(os.getpid(), 9), "signal 9"),
    (lambda: time.sleep(100), "no end"),
])
def test_harm_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable,
                      harm: str) -> None:
    stage = SimpleNamespace(__file__="stage.py", main=lambda argv: fault())
    monkeypatch.setitem(sys.modules, "stage", stage)
    monkeypatch.setattr(fuzz, "COMMANDS", ["stage"])
    monkeypatch.setattr(fuzz, "SECONDS", 2.0)
    for name in fuzz.NOT_OURS:
        (tmp_path / "home" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "home" / name).touch()
    monkeypatch.chdir(tmp_path)
    found, output = fuzz.run_case((tmp_path / "home", 1, 0))
    assert harm in found and bool(harm) == bool(found), output
