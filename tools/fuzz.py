"""Give every command what nobody should type, and files that nobody should have.

    python tools/fuzz.py [--cases=2000] [--seed=1] [--workers=2] [--seconds=60]
    python tools/fuzz.py --seed=1 --case=17      # this one again: what it was, and all it printed

A small run is made once. Each case has a copy of it, alters up to three files, settings or
variables of the environment, all drawn from (seed, case), and runs one command in a process of its
own. It must end, with a result or with a sentence; it must write to its data and its run alone, and
run no other program. Prints what ended otherwise, and exits with 1 if anything did.
"""

import argparse
import collections
import contextlib
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]
import check  # noqa: E402
import dry_run  # noqa: E402
import report  # noqa: E402
from helpers import sentences, tiny_llama  # noqa: E402

import audit  # noqa: E402
import eval as evaluation  # noqa: E402
import lookup  # noqa: E402
import memorize  # noqa: E402
import prepare_data  # noqa: E402
import train  # noqa: E402
from configs import CHOICES, Config, run_command  # noqa: E402
from data import sha256_file, sha256_json  # noqa: E402

CONFIG = """
hidden_size, intermediate_size, num_hidden_layers, num_attention_heads = 16, 32, 1, 2
vocab_size, seq_len, n_chunks, sequences_per_chunk, valid_sequences = 290, 16, 2, 12, 4
global_batch_size, micro_batch_size, eval_sequences, eval_interval = 4, 2, 4, 3
learning_rate, min_learning_rate, warmup_steps, save_minutes = 1e-2, 1e-3, 2, 1e-9
dtype, threads, sample_tokens, workers, keep_train_state = "float32", 1, 2, 1, 0
sources = {"prose": "text/prose.jsonl", "code": "text/code"}
data_dir, run_dir, name = "data/mini", "runs/mini", "mini"
"""
# Each with what it is given beside the config.
COMMANDS = [
    (prepare_data, []), (prepare_data, ["--data_dir=data/new"]),
    (prepare_data, ["--data_dir=data/new", "--tokenizer=hf:tok/tokenizer.json"]),
    (train, []), (train, ["--max_steps=5"]), (train, ["--run_dir=runs/new"]),
    (train, ["--run_dir=runs/new", "--init_from=hub"]), (train, ["--resume=runs/mini/ckpt_000"]),
    (evaluation, ["--sequences=2"]), (evaluation, ["--prompt=a b", "--tokens=2"]),
    (evaluation, ["--checkpoints=hub", "--sequences=2"]), (evaluation, ["--text=text/code"]),
    (memorize, ["--k=4", "--l=4", "--sequences=2"]), (audit, ["--sequences=2"]),
    (audit, ["--sequences=0"]), (audit, ["--replay=1"]), (lookup, ["--step=2"]),
    (lookup, ["--find=a"]), (lookup, ["--outliers"]), (report, []),
    (report, ["runs/copy"]), (dry_run, []), (check, ["1"])]
FLAGS = {module: [f.name for f in fields(module.Flags)]
         for module in (evaluation, memorize, audit, lookup)}

NUMBERS = """-1 0 1 2 3 7 100 65536 2147483648 70368744177664 9223372036854775808 1e30 1e-30 1e308
    -1e308 1e999 nan inf None [] {} True '' "a" 1.5 0.5 9""".split() + ["9" * 64, "", "1_0", "(1,)"]
PLACES = ["", " ", ".", "..", "../up", "others", "others/file.txt", "text/fifo", "text/self", "hub",
          "/dev/null/x", "/dev/null", "/etc/passwd", "/proc/self/mem", "~", "%s{0}", "a\nb", "-a",
          "a,b", "runs/mini", "runs/mini/", "./runs/mini/ckpt_000/", "runs/mini/ckpt_001",
          "runs/mini/ckpt_009", "data/mini", "text/*", "nowhere", "x" * 300, "all", "last", "0",
          "0,1", "0,,1", "1e3", "-1", "99", "1" * 20, "\udc80", "é漢😀", "None", "auto", "true",
          "hf:tok", "hf:tok/tokenizer.json", "hf:others", "tiktoken:none", "data:data/mini",
          "data:others", "bpe", "mini.py", "cuda", "cuda:9", "meta", "cpu"]
TABLES = ["{}", "{3: 'x'}", "{None: 1}", "{('a', 1): 2}", "{'prose': 1e308}", "{'prose': None}",
          "{'prose': 0.5}", "{'prose': 3}", "{'prose': 0}", "{'prose': 'even'}", "{'none': 1}",
          "{'prose': 'text/prose.jsonl'}", "{'prose': 'text/*'}", "{'': 'text/prose.jsonl'}",
          "{'a/b': 'text/prose.jsonl'}", "{'..': 'text/prose.jsonl'}", "{'c': 'text/fifo'}",
          "{'canary': 'text/prose.jsonl'}", "{'prose': 'others'}", "{'prose': 'text/self'}",
          "{1: 2}", "{2: 1, 3: 1}", "{1000000: 100}", "{'2': 1}", "{1: 10**30}", "[", "[]", "5",
          "{'prose': float('nan')}", "{'a\\0b': 'text/prose.jsonl'}", "{'x' * 300: 'text/code'}",
          "{'prose': 'a\\0b'}", "{'prose': '\\udc80'}", "{'prose': ''}", "{'prose': True}"]
LISTS = ["[]", "[0]", "[0, 1]", "[99]", "[-1]", "['a']", "[None]", "[[0]]", "[True]", "[0.0]", "5",
         "{}", "[10**30]"]
# What only a config file can say.
OBJECTS = ["object()", "float('nan')", "10**400", "'a\\0b'", "b'x'", "lambda: 1", "1j", "print",
           "{1, 2}", "None", "...", "range(3)", "__import__('math')", "[[]] * 3"]
VARIABLES = [("RANK", "0"), ("RANK", "x"), ("RANK", "1"), ("WORLD_SIZE", "2"), ("WORLD_SIZE", "x"),
             ("LOCAL_RANK", "-1"), ("OMP_NUM_THREADS", "x"), ("COLUMNS", "1"), ("HOME", "/nowhere"),
             ("TORCHELASTIC_RESTART_COUNT", "x"), ("LOCAL_WORLD_SIZE", "0"), ("TMPDIR", "/nowhere"),
             ("SLURM_PROCID", "x"), ("LANG", "C"), ("PATH", "")]
JUNK = [None, True, -1, 0, 1.5, 10**30, "", "x", "../x", "/dev/null", [], {}, [[]], {"a": {}},
        float("nan"), "é" * 100, [None], "a\0b"]


# Files that no command may touch, some of them where its own files are.
NOT_OURS = ("others/file.txt", "data/mini.backup.tmp/file", "runs/mini/mine.tmp/file",
            "runs/mini/notes.tmp", "runs/file.tmp")


class Bomb:
    """A pickle that runs a program when it is opened."""

    def __reduce__(self) -> tuple:
        return os.system, ("true",)


# ---------------------------------------------------------------------------------------------
# what every case starts from


def build(home: Path) -> None:
    """Text, data, a run of two chunks with all its results, a published directory, a tokenizer."""
    os.chdir(home)
    for name in ("text/code", "tok", "data/mini.backup.tmp", "runs/mini/mine.tmp", "others"):
        Path(name).mkdir(parents=True)
    for name in NOT_OURS:
        Path(name).write_text("This is not ours.\n")
    Path("mini.py").write_text(CONFIG)
    rows = [json.dumps({"text": sentences(i, 12)}) for i in range(8)]
    Path("text/prose.jsonl").write_text("\n".join(rows) + "\n")
    for i in range(8):
        Path(f"text/code/{i}.txt").write_text(sentences(100 + i, 12))
    Path("text/self").symlink_to("self")
    os.mkfifo("text/fifo")
    tiny_llama(Path("tok/tokenizer.json"))
    argv = ["mini.py"]
    prepare_data.main(argv)
    train.main(argv)
    evaluation.main([*argv, "--sequences=2"])
    memorize.main([*argv, "--k=4", "--l=4", "--sequences=2"])
    audit.main([*argv, "--sequences=2"])
    shutil.copytree("runs/mini", "runs/copy")
    shutil.copytree("runs/mini/ckpt_001", "hub", ignore=shutil.ignore_patterns(
        "manifest.json", "train_state"))


# ---------------------------------------------------------------------------------------------
# what a case alters


def odd_value(draw: random.Random, name: str) -> str:
    """Something to write behind --NAME=."""
    kind = next((f.type for f in fields(Config) if f.name == name), str)
    pool = {int: NUMBERS, float: NUMBERS, bool: ["maybe", "1", "", "None", "true", "false"],
            dict: TABLES, list: LISTS, str: PLACES}[kind]
    if name in CHOICES:
        pool = [*CHOICES[name], *PLACES]
    # Now and then of another kind altogether.
    return draw.choice(draw.choice([pool] * 8 + [PLACES, NUMBERS]))


def alter_settings(draw: random.Random, module: Any) -> list[str]:
    """One more word for the command line, or one more line in the config file."""
    # To compile is to run other programs.
    name = draw.choice([f.name for f in fields(Config) if f.name != "compile"]
                       + 4 * FLAGS.get(module, []))
    if draw.random() < 0.15:
        with open("mini.py", "a") as f:
            f.write(f"{name} = {draw.choice(OBJECTS)}\n")
        return []
    if draw.random() < 0.05:
        return [draw.choice(["--", "-", "--=", "--nothing=1", "x", f"--{name}", f"--{name}=", "",
                             "runs/mini", "--seed=1=2", "mini.py", "-h"])]
    return [f"--{name}={odd_value(draw, name)}"]


def alter_json(draw: random.Random, value: Any) -> Any:
    """JSON with one node replaced, removed or added."""
    if draw.random() < 0.1 or not isinstance(value, (dict, list)) or not value:
        return draw.choice(JUNK)
    key = draw.choice([*value] if isinstance(value, dict) else range(len(value)))
    how = draw.random()
    if how < 0.2:
        del value[key]
    elif how < 0.25 and isinstance(value, dict):
        value[draw.choice(["../x", "", "a\0b", "x"])] = value[key]
    else:
        value[key] = alter_json(draw, value[key])
    return value


def alter_bytes(draw: random.Random, path: Path) -> None:
    """A file's content: cut short, flipped, other bytes, a pickle, one node of its JSON."""
    raw = path.read_bytes() if path.is_file() else b""
    lines, how = raw.split(b"\n"), draw.randrange(10)
    if path.suffix in (".json", ".jsonl") and raw and how < 6:
        # A .jsonl has an object in every line, and a .json is one.
        i = draw.randrange(len(lines) - 1) if path.suffix == ".jsonl" else None
        try:
            value = alter_json(draw, json.loads(raw if i is None else lines[i]))
        except ValueError:  # an earlier change of this case has made it no JSON
            value = draw.choice(JUNK)
        text = json.dumps(value).encode()
        raw = text if i is None else b"\n".join([*lines[:i], text, *lines[i + 1 :]])
    elif path.suffix == ".safetensors" and raw and how < 5:
        length = int.from_bytes(raw[:8], "little")
        header = json.dumps(alter_json(draw, json.loads(raw[8 : 8 + length]))).encode()
        raw = len(header).to_bytes(8, "little") + header + raw[8 + length :]
    elif how == 6:
        raw = raw[: draw.randrange(len(raw) + 1)]
    elif how == 7:
        raw = pickle.dumps(Bomb())
    elif how == 8:
        raw = draw.choice([b"", b"\xff\xfe\0", b"[" * 100_000, b"null", b"3", b'"x"', b"\n\n"])
    else:
        at = draw.randrange(len(raw) + 1)
        raw = raw[:at] + draw.randbytes(draw.choice([1, 4, 60])) + raw[at + 1 :]
    path.write_bytes(raw)


def alter_file(draw: random.Random) -> str:
    """Damage one file, or put something else in its place; returns which."""
    files = [path for path in sorted(Path().rglob("*")) if path.is_file()
             and path.parts[0] != "others" and path.read_bytes()[:11] != b"This is not"]
    path, how = draw.choice(files), draw.random()
    if how < 0.75:
        alter_bytes(draw, path)
    else:
        path.unlink()
        kind = draw.choice(["gone", "folder", "nowhere", "itself", "fifo", "elsewhere"])
        if kind == "folder":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind in ("nowhere", "itself", "elsewhere"):
            path.symlink_to({"nowhere": "nowhere", "itself": path.name,
                             "elsewhere": Path("others/file.txt").resolve()}[kind])
    if draw.random() < 0.6:
        forge_hashes()
    return str(path)


def forge_hashes() -> None:
    """Make the hashes in the manifests fit what is there, as a stranger would."""
    for file in [*Path("runs").glob("*/*/manifest.json"), Path("data/mini/manifest.json")]:
        if not file.is_file():  # a pipe by now, perhaps
            continue
        # What this case has damaged beyond that is left as it is.
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, KeyError,
                                 RecursionError):
            manifest = json.loads(file.read_text())
            if "chunks" in manifest:
                for entry in [*manifest["chunks"], *manifest["valid"], *manifest["documents"],
                              manifest["tokenizer"]]:
                    if (file.parent / entry["file"]).is_file():
                        entry["sha256"] = sha256_file(file.parent / entry["file"])
            else:
                manifest.pop("sha256", None)
                manifest["files"] = {
                    path.relative_to(file.parent).as_posix(): sha256_file(path)
                    for path in file.parent.rglob("*") if path.is_file() and path != file}
                manifest["sha256"] = sha256_json(manifest)
            file.write_text(json.dumps(manifest))


# ---------------------------------------------------------------------------------------------
# one case


def watch(allowed: list[str], strays: list[str]) -> None:
    """Note what this process writes elsewhere than `allowed`, and other programs that it runs."""
    writes = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.symlink",
              "os.link", "shutil.rmtree"}

    def hook(event: str, details: tuple) -> None:
        if event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"):
            # The commit, the name of the processor, matplotlib's fonts.
            if (program := os.fsdecode(details[0])) not in ("git", "uname", "fc-list"):
                strays.append(f"ran {program}")
        elif event == "open" and isinstance(details[0], (str, bytes, os.PathLike)):
            if details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                note(details[0])
        elif event in writes:
            # With a path that begins at an open directory rmtree works: it was noted itself.
            inside = event in ("os.remove", "os.rmdir") and details[1] != -1
            for path in details[: 0 if inside else 2 if event == "os.rename" else 1]:
                note(path)

    def note(path: Any) -> None:
        path = os.path.abspath(os.fsdecode(path))
        # Or a folder on the way to one of them.
        if not any(path == top or path.startswith((top + "/", top + "."))
                   or top.startswith(path + "/") for top in allowed):
            strays.append(f"wrote {path}")

    sys.addaudithook(hook)


def play(home: Path, seed: int, case: int, show: bool) -> None:
    """Alter the copy in the working directory and run a command; does not return. What went wrong
    is written to the file `verdict`, the command and what it printed to `output`."""
    draw = random.Random(f"{seed} {case}")
    module, words = draw.choice(COMMANDS)
    done = []
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        how = draw.random()
        if how < 0.5:
            words = [*words, *alter_settings(draw, module)]
        elif how < 0.95:
            done.append(alter_file(draw))
        else:
            name, value = draw.choice(VARIABLES)
            os.environ[name] = value
            done.append(f"{name}={value}")
    of_run = draw.random() < 0.2 and module is not prepare_data
    sys.argv = [module.__file__, "runs/mini" if of_run else "mini.py", *words]
    verdict, strays = open("../verdict", "w"), []
    output = os.open("../output", os.O_CREAT | os.O_WRONLY)
    if not show:
        os.dup2(output, 1)
        os.dup2(output, 2)
    print(f"{Path(module.__file__).name} {' '.join(map(repr, sys.argv[1:]))}; altered: {done}",
          flush=True)
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
    # Where libraries keep what they have worked out.
    for name in ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR"):
        os.environ[name] = os.path.abspath("../cache")
    given = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    watch([os.path.abspath(path) for path in (
        "data/mini", "runs/mini", given.get("--data_dir") or "data/mini",
        given.get("--run_dir") or "runs/mini", "runs/compare",
        "../cache", "/dev/null")], strays)
    problem = ""
    try:
        run_command(module.main)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code)
            problem = end.code if end.code.startswith("This is a fault") else ""
    except BaseException:
        problem = traceback.format_exc()
        print(problem)
    sys.stdout.flush()
    said = "" if show else Path("../output").read_text(errors="replace")
    # A traceback of a thread, or of a process of its own, ends nothing here.
    if "Traceback (most recent" in said:
        problem = said[said.index("Traceback (most recent") :]
    verdict.write("; ".join([*([problem] if problem else []), *dict.fromkeys(strays)]))
    verdict.close()
    os._exit(0)


def run_case(job: tuple[Path, int, int, float, bool]) -> tuple[int, str, str]:
    """(case, what went wrong or "", command) of a case in a process and a directory of its own."""
    home, seed, case, seconds, show = job
    place = Path(tempfile.mkdtemp(prefix=f"case_{case}_", dir=home.parent))
    # cp -a: copytree would wait for ever at the fifo.
    os.system(f"cp -a {home} {place}/home")
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            os.chdir(place / "home")
            play(home, seed, case, show)
        except BaseException:  # a fault of this file
            traceback.print_exc()
            os._exit(3)
    give_up, status = time.monotonic() + seconds, None
    while status is None and time.monotonic() < give_up:
        pid, code = os.waitpid(child, os.WNOHANG)
        status = code if pid else None
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # processes of its own that it has left behind
    if status is None:
        os.waitpid(child, 0)
    found = (place / "verdict").read_text() if (place / "verdict").exists() else ""
    output = (place / "output").read_text(errors="replace") if (place / "output").exists() else ""
    if status is None:
        found = f"no end in {seconds:g} s\n{output[-500:]}"
    elif status:
        found = f"exit status {os.waitstatus_to_exitcode(status)}\n{output[-1500:]}"
    for name in NOT_OURS:
        file = place / "home" / name
        if not file.is_file() or file.read_text() != "This is not ours.\n":
            found += f"; {name} was altered"
    if not show:
        shutil.rmtree(place, ignore_errors=True)
    return case, found, output.partition("\n")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, value in (("cases", 2000), ("seed", 1), ("workers", os.cpu_count()), ("case", -1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--seconds", type=float, default=60)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz_") as top:
        home = Path(top, "home")
        home.mkdir()
        # In a process of its own, as every case: what has used threads must not be forked.
        builder = multiprocessing.get_context("fork").Process(target=build, args=(home,))
        builder.start()
        builder.join()
        if builder.exitcode:
            raise SystemExit("The run that the cases alter could not be made.")
        if a.case >= 0:
            print(run_case((home, a.seed, a.case, a.seconds, True))[1])
            if sys.stdin.isatty():
                input(f"{top} is there until Enter is pressed.")
            return
        jobs = [(home, a.seed, case, a.seconds, False) for case in range(a.cases)]
        kinds, wrong = collections.Counter(), 0
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(a.workers, fork) as pool:
            for case, found, command in pool.map(run_case, jobs):
                kinds[command.partition(" ")[0]] += 1
                if found:
                    wrong += 1
                    print(f"--seed={a.seed} --case={case}: {command}\n    "
                          + found.strip().replace("\n", "\n    "), flush=True)
        print(f"{a.cases} cases ({', '.join(f'{n} {kind}' for kind, n in sorted(kinds.items()))}):"
              f" {wrong} ended in a traceback, in nothing, or wrote elsewhere.")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
