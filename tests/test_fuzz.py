"""What nobody should type, and files that nobody should have: the short form of tools/fuzz.py."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launch import Script

from configs import UserError
from tools import fuzz


def test_every_command_ends_in_a_result_or_a_sentence() -> None:
    script = Script("tools/fuzz.py", "--cases=40", "--seed=0", "--workers=1", "--seconds=100")
    text, _ = script.communicate(timeout=400)
    assert script.returncode == 0, text[-3000:]
    assert "40 cases" in text and ": 0 ended in a traceback" in text


def stop(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("fault, found", [
    (lambda: stop(ValueError("a fault")), "This is a fault of the program"),
    (lambda: open("others/new", "w").close(), "others/new"),
    (lambda: Path("others/file.txt").unlink(), "others/file.txt was altered"),
    (lambda: os.system("true"), "ran true"),
    (lambda: os.kill(os.getpid(), signal.SIGKILL), "exit status -9"),
    (lambda: time.sleep(100), "no end in 2 s"),
    (lambda: stop(UserError("a sentence")), ""),
])
def test_the_fuzzer_finds_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  fault: Callable[[], None], found: str) -> None:
    class Stage:
        __file__ = "stage.py"

        @staticmethod
        def main(argv: list[str]) -> None:
            fault()

    monkeypatch.setattr(fuzz, "COMMANDS", [(Stage, [])])
    (tmp_path / "home").mkdir()
    (tmp_path / "home/mini.py").write_text("seed = 1\n")
    for name in fuzz.NOT_OURS:
        (tmp_path / "home" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "home" / name).write_text("This is not ours.\n")
    _, problem, _ = fuzz.run_case((tmp_path / "home", 1, 2, 2.0, False))
    assert (found in problem) if found else not problem
