"""Run every command on odd settings and damaged files, and look for harm.

    python tools/fuzz.py [--cases=2000] [--seed=1]
    python tools/fuzz.py --first=17 --cases=1      # this case alone, with its output
    python tools/fuzz.py --cases=60 --unchecked    # hashes are not compared: it must find harm

Each case runs one command in a copy of a small run. It may end in a traceback, but not run what a
file holds, write or delete what is not its own, die of a signal, hang, or use altered numbers.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import typing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import checkpoint  # noqa: E402
from configs import Config, run_command  # noqa: E402
from data import Data, read_json, sha256_file, sha256_json  # noqa: E402

CONFIG = """
hidden_size, intermediate_size, num_hidden_layers, num_attention_heads = 16, 32, 1, 2
vocab_size, seq_len, n_chunks, sequences_per_chunk, valid_sequences = 290, 16, 2, 12, 4
global_batch_size, micro_batch_size, eval_sequences, eval_interval = 4, 2, 4, 3
learning_rate, min_learning_rate, warmup_steps, save_minutes = 1e-2, 1e-3, 2, 1e-9
dtype, threads, sample_tokens, workers, keep_train_state = "float32", 1, 2, 1, 0
sources = {"prose": "text/prose.jsonl", "code": "text/code.jsonl"}
data_dir, run_dir, name = "data/mini", "runs/mini", "mini"
"""
FORK = multiprocessing.get_context("fork")
# A file and the words after the config. The numbers of the first four must be the same again.
COMMANDS = [
    "train", "train --run_dir=runs/new", "eval --sequences=2", "memorize --k=4 --l=4 --sequences=2",
    "audit --sequences=2", "audit --replay=1", "prepare_data", "prepare_data --data_dir=data/new",
    "train --run_dir=runs/new --init_from=hub", "eval --prompt=a --tokens=2", "report",
    "eval --checkpoints=hub", "lookup --step=2", "lookup --find=a"]
VALUES = ["-1", "0", "1", "65536", "1e30", "nan", "None", "true", "", ".", "..", "../up", "others",
          "others/file.txt", "text/fifo", "hub", "/dev/null", "a\nb", "runs/mini", "data/mini", "[",
          "runs/mini/ckpt_001", "x" * 300, "all", "\udc80", "hf:hub", "hf:others", "cpu", "[99]",
          "['a']", "{}", "{'prose': 3}", "{1: 2}", "{'../up': 'text/*'}", "{'c': 'text/fifo'}"]
JUNK = b"-1", b"0", b"1e400", b"9" * 30, b'"../x"', b"[]", b"{}", b"null"  # in the place of JSON
PICKLE = b"cos\nsystem\n(S'touch ran'\ntR."  # writes a file when it is opened
# No command may touch these, some of which lie beside its own files.
NOT_OURS = ("others/file.txt", "data/mini.backup/file", "runs/mini/mine/file", "runs/file.tmp")
SECONDS = 100.0  # that a command may take


def build(home: Path) -> None:
    """Text, data, a run of two chunks with its results, and a published directory."""
    home.mkdir()
    os.chdir(home)
    for name in (*NOT_OURS, "text/prose.jsonl", "text/code.jsonl"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        texts = [" ".join(f"{name} has {i * k % 97}" for k in range(40)) for i in range(1, 9)]
        Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    os.mkfifo("text/fifo")
    Path("mini.py").write_text(CONFIG)
    for command in "prepare_data", COMMANDS[0], *COMMANDS[2:5]:
        name, *words = command.split()
        importlib.import_module(name).main(["mini.py", *words])
    shutil.copytree("runs/mini/ckpt_001", "hub", ignore=shutil.ignore_patterns("man*", "train*"))


def odd_setting(draw: random.Random, module: typing.Any) -> str:
    flags = fields(module.Flags) if hasattr(module, "Flags") else ()
    # Not `compile`, which takes minutes.
    setting = draw.choice([f for f in (*fields(Config), *4 * flags) if f.name != "compile"])
    return f"--{setting.name}={draw.choice([*VALUES, *typing.get_args(setting.type)])}"


def forge(draw: random.Random) -> Path:
    """Other JSON in a file, half a file, or a pickle or a link in its place; and the new hash in
    the place of the old one, as a stranger would do it."""
    path = draw.choice([path for path in sorted(Path().rglob("*"))
                        if path.is_file() and str(path) not in NOT_OURS])
    raw, old, junk = path.read_bytes(), sha256_file(path), draw.choice(JUNK)
    values = [*re.finditer(rb'"[^"]*"|-?\d[\d.e-]*|\[[^][]*\]', raw[:20_000])]
    start, stop = draw.choice(values).span() if values else (0, 0)
    # With spaces up to the old length, which a safetensors file states.
    other = raw[:start] + junk.ljust(stop - start) + raw[stop:]
    new = draw.choice([other, other, other, raw[: len(raw) // 2], PICKLE, None])
    path.unlink()
    if new is None:
        target = draw.choice([path, "/dev/null", Path("text/fifo"), Path("others/file.txt")])
        path.symlink_to(os.path.abspath(target))
        return path
    path.write_bytes(new)
    for file in [*Path("runs").glob("*/*/manifest.json"), Path("data/mini/manifest.json")]:
        manifest = json.loads(json.dumps(read_json(file)).replace(old, sha256_file(path)))
        if manifest.pop("sha256", None):
            manifest["sha256"] = sha256_json(manifest)
        if manifest:  # else it is damaged itself
            file.write_text(json.dumps(manifest))
    return path


def alter_numbers(draw: random.Random) -> Path:
    """Other token ids, weights or optimizer state, as plausible as the old ones, in a file."""
    shutil.rmtree("runs/mini/ckpt_001")  # chunk 1 is to be trained on again
    for name in ("eval", "memorization"):
        Path(f"runs/mini/{name}.jsonl").unlink()
    path = draw.choice(sorted([*Path("data/mini").glob("[tv]*/*.npy"),
                               *Path("runs/mini").rglob("*.safetensors")]))
    if path.suffix == ".npy":
        np.load(path, "r+")["token_ids"] ^= 1
    else:
        header = int.from_bytes(path.read_bytes()[:8], "little")
        np.memmap(path, "<u4", "r+", 8 + header)[:] ^= 1 << 23  # twice or half of each float32
    return path


def figures(run_dir: str | Path) -> set[str]:
    """The lines of a run's results, without what was timed."""
    lines = "".join(file.read_text() for file in Path(run_dir).glob("*.jsonl")).splitlines()
    return {re.sub(r'"(tokens_per_s|mfu|memory_gb|data_s)": [^,}]*', "", line) for line in lines}


def inventory(allowed: list[str]) -> set[tuple[str, int]]:
    """(path, time of its last change) of what a command may not change: all else than `allowed`."""
    tops = tuple(f"{os.path.abspath(path)}/" for path in allowed)
    files = [file for file in Path("..").resolve().rglob("*")
             if os.path.relpath(file) in NOT_OURS or not f"{file}/".startswith(tops)]
    return {(str(file), file.lstat().st_mtime_ns) for file in files
            if file.is_symlink() or not file.is_dir()}


def play(module: typing.Any) -> None:
    """Run a command in this process; what it prints goes to a file."""
    for stream in (1, 2):
        os.dup2(os.open("../output", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
    run_command(module.main)


def run_case(job: tuple[Path, int, int]) -> tuple[str, str]:
    """(harm done or "", what was printed) of a case, in a copy of `home`."""
    home, seed, case = job
    # Kinds of case: 0 an odd setting, 1 a forged file, 2 other numbers in a hashed file.
    draw, kind, altered = random.Random(f"{seed} {case}"), case % 3, None
    name, *words = draw.choice(COMMANDS[:4] if kind == 2 else COMMANDS).split()
    module = importlib.import_module(name)
    with tempfile.TemporaryDirectory(dir=home.parent) as place:
        os.chdir(place)
        os.system(f"cp -a {home} home")  # copytree would wait for ever at the fifo
        os.chdir("home")
        if kind == 0:
            words.append(odd_setting(draw, module))
        else:
            altered = forge(draw) if kind == 1 else alter_numbers(draw)
        sys.argv = [module.__file__, draw.choice(["mini.py", "mini.py", "runs/mini"]), *words]
        given = [word.partition("=")[2] for word in words if word.startswith(("--data_", "--run_"))]
        allowed = ["data/mini", "runs/mini", "../output", *given]
        before = inventory(allowed)
        child = FORK.Process(target=play, args=(module,))
        child.start()
        child.join(SECONDS)
        harm = []
        if child.exitcode not in (0, 1):  # 1: a sentence or a traceback
            harm.append("no end" if child.exitcode is None else f"signal {-child.exitcode}")
        child.kill()
        child.join()
        harm += [f"wrote or deleted {path}" for path, _ in before ^ inventory(allowed)]
        if kind == 2:
            wrong = (figures("runs/mini") | figures("runs/new")) - figures(home / "runs/mini")
            harm += [f"other numbers: {line[:200]}" for line in wrong]
        output = Path("../output").read_text(errors="replace")
        return "; ".join(harm), f"{sys.argv} {altered}\n{output}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, value in (("cases", 2000), ("first", 0), ("seed", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--unchecked", action="store_true")
    a = parser.parse_args()
    if a.unchecked:
        Data.verify_file = checkpoint.verify_checkpoint = lambda *_, **__: ""
    harmful = 0
    with tempfile.TemporaryDirectory(prefix="fuzz_") as top:
        home = Path(top, "home")
        # In a process of its own, as every case: what has used threads must not be forked.
        with ProcessPoolExecutor(1, FORK) as builder:
            builder.submit(build, home).result()
        with ProcessPoolExecutor(mp_context=FORK) as pool:
            jobs = [(home, a.seed, case) for case in range(a.first, a.first + a.cases)]
            for (*_, case), (harm, output) in zip(jobs, pool.map(run_case, jobs)):
                harmful += bool(harm)
                if harm or a.cases == 1:
                    print(f"--first={case}: {harm[:1000]}\n{output}", flush=True)
    print(f"{a.cases} cases: {harmful} did harm")
    sys.exit(harmful > 0)


if __name__ == "__main__":
    main()
