"""Scripts as processes of their own that need not wait for PyTorch.

Importing PyTorch takes longer than most of these tests' jobs. So a server that has imported it, and
nothing of ours, forks the processes. To the script it is `python SCRIPT ...`.
"""

import faulthandler
import functools
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "torch.distributed.fsdp"])


@functools.cache
def outputs() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()  # gone with pytest


def run_script(words: list[str], cwd: str, env: dict[str, str], output: str) -> None:
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.enable()  # a crash says where
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = words
    sys.path.insert(0, str(Path(cwd, words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")


class Script:
    """What subprocess.Popen([python, *words]) would be, stdout and stderr in one."""

    def __init__(self, *words: Any, cwd: Path = ROOT, **env: Any) -> None:
        file, name = tempfile.mkstemp(dir=outputs().name)
        os.close(file)
        self.output = Path(name)
        everything = os.environ | {name: str(value) for name, value in env.items()}
        self.process = SERVER.Process(
            target=run_script, args=([*map(str, words)], str(cwd), everything, str(self.output)))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"after {timeout} s it had said:\n{self.output.read_text()}")
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        return self.output.read_text(), None

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()


def ranks(n: int, *words: Any, **env: Any) -> list[Script]:
    """The processes that torchrun would start, without torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env |= {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [Script(*words, RANK=rank, LOCAL_RANK=rank, **env) for rank in range(n)]
