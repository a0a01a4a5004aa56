"""Test and time this code on one GPU in nine minutes: make gpu

    python tools/gpu.py                  # everything, onto the screen and into gpu_report.json
    python tools/gpu.py kernels steps    # some of: tests runs kernels steps sweep decode
    python tools/gpu.py --smoke          # tiny shapes on a CPU: does this still run?

Each part is a command with a time limit, the most important first, and every row is written as it
comes. Nothing is downloaded; the first part needs pytest, the last transformers.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import triton  # noqa: E402

import audit  # noqa: E402
import prepare_data  # noqa: E402
import train  # noqa: E402
from checkpoint import read_manifest, read_metrics  # noqa: E402
from configs import UserError, run_command  # noqa: E402
from data import write_json  # noqa: E402

# part -> (most seconds of it, its command); 540 seconds in all
PARTS = {
    "tests": (85, "-m pytest tests/test_kernels.py -p no:cacheprovider"
                  + " -n 8" * bool(importlib.util.find_spec("xdist"))),
    "runs": (120, "tools/gpu.py --runs"),
    "kernels": (90, "tools/bench_kernels.py"),
    "steps": (165, "tools/bench_steps.py"),
    "sweep": (45, "tools/bench_kernels.py --sweep"),
    "decode": (35, "tools/bench_memorize.py --batches=8,40 --rounds=2 --device=cuda"),
}
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"  # Triton's own compiler
SMOKE = {"tests": " -k test_the_choice", "decode": " --sequences=2 --batches=2 --rounds=1"
         " --device=cpu --config=configs/amber_tiny.py"}
SMALL = ("--hidden_size=64 --intermediate_size=64 --num_hidden_layers=1 --num_attention_heads=1"
         " --vocab_size=300 --sequences_per_chunk=32 --seq_len=32 --device=cpu --compile=false"
         " --sources={'text':'docs/*.md'} --workers=1")


def rows_of(command: str, seconds: float, smoke: bool) -> Iterator[dict[str, Any]]:
    """The JSON objects that a command prints, as they come; its other lines as {"text": line}."""
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if smoke else {})
    # `timeout` also ends the processes that the command has started.
    process = subprocess.Popen(
        ["timeout", "-s", "KILL", str(seconds), sys.executable, *command.split()], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    for line in filter(str.strip, process.stdout):
        print(line, end="", flush=True)
        yield json.loads(line) if line.startswith("{") else {"text": line.rstrip()}
    if process.wait():
        yield {"text": f"ended with exit status {process.returncode} (-9: after {seconds:.0f} s)"}


def runs(smoke: bool) -> Iterator[dict[str, Any]]:
    """amber_tiny on the CPU and on the GPU, straight and resumed, one chunk again; amber_125m."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # for deterministic, before CUDA starts
    chunk, small = (2, SMALL.split()) if smoke else (170, [])  # steps of a chunk, settings
    with tempfile.TemporaryDirectory() as home:
        tiny = ["configs/amber_tiny.py", f"--data_dir={home}/data", "--n_chunks=2", *small]
        if not smoke:
            subprocess.run([sys.executable, "tools/corpus.py"], check=True)
        prepare_data.main(tiny)
        train.main([*tiny, f"--run_dir={home}/cpu", f"--max_steps={chunk}", "--device=cpu"])
        for run, steps in (("gpu", 2 * chunk), ("parts", chunk + 1), ("parts", 2 * chunk)):
            train.main([*tiny, f"--run_dir={home}/{run}", f"--max_steps={steps}",
                        "--deterministic=true"])
        on_cpu, on_gpu = read_metrics(f"{home}/cpu"), read_metrics(f"{home}/gpu")
        for step in sorted(on_cpu.keys() & {1, 2, 10, 50, 170}):
            yield {"step": step, "loss on the CPU": on_cpu[step]["loss"],
                   "on the GPU": on_gpu[step]["loss"]}
        straight, resumed = (read_manifest(Path(home, run, "ckpt_001")) for run in ("gpu", "parts"))
        yield {"resumed equals straight": straight["weights_sha256"] == resumed["weights_sha256"]}
        audit.main([f"{home}/gpu", "--replay=1"])
        torch.use_deterministic_algorithms(False)
        larger = (f"configs/amber_125m.py --data_dir={home}/data_125m --run_dir={home}/125m"
                  " --tokenizer=bpe --vocab_size=4096 --n_chunks=1 --warmup_steps=20"
                  " --sequences_per_chunk=3200 --valid_sequences=8 --global_batch_size=16"
                  " --sources={'text':'data/corpus/*.jsonl'}").split() + small
        prepare_data.main(larger)
        train.main(larger)
        for step, record in read_metrics(f"{home}/125m").items():
            if step in (1, 10, 50, 100, 200):
                names = ("loss", "grad_norm", "tokens_per_s", "mfu", "memory_gb")
                yield {"amber_125m, step": step, **{key: record.get(key) for key in names}}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path("gpu_report.json"))
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--runs", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    if not (a.smoke or torch.cuda.is_available()):
        raise UserError("This measures on a CUDA GPU, and there is none (--smoke tries the programs"
                        " on the CPU).")
    if a.runs:
        for row in runs(a.smoke):
            print(json.dumps(row), flush=True)
        return
    if unknown := set(a.parts) - set(PARTS):
        raise UserError(f"There is no part {min(unknown)!r}: choose some of {', '.join(PARTS)}.")
    ptxas = subprocess.run([PTXAS, "--version"], capture_output=True, text=True).stdout.split()
    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
                              "triton": triton.__version__, "ptxas": ptxas[-1:],
                              "card": "CPU" if a.smoke else torch.cuda.get_device_name()}
    print(report)
    deadline = time.monotonic() + 9 * 60
    for part in a.parts or PARTS:
        seconds, command = PARTS[part]
        if a.smoke:
            command += SMOKE.get(part, " --smoke")
        report[part] = []
        print(f"\n## {part}", flush=True)
        seconds = max(1, min(seconds, deadline - time.monotonic()))
        for row in rows_of(command, seconds, a.smoke):
            report[part].append(row)
            write_json(a.out, report)


if __name__ == "__main__":
    run_command(main)
