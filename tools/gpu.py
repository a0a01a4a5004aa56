"""What one GPU says of this code, in nine minutes: make gpu

    python tools/gpu.py                  # everything, into gpu_report.json and tables
    python tools/gpu.py kernels steps    # some of: tests kernels sweep steps runs decode
    python tools/gpu.py --smoke          # tiny shapes on a CPU: does this still run?

Each part is a command of its own, with a time of its own; what it finds is written down as it
comes, so that a cut-off loses nothing. It downloads nothing, and needs what the stages need, pytest
for the first part and transformers for the last.
"""

import argparse
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

import audit  # noqa: E402
import prepare_data  # noqa: E402
import train  # noqa: E402
from checkpoint import read_manifest, read_metrics  # noqa: E402
from configs import UserError, run_command  # noqa: E402
from data import write_json  # noqa: E402

# part -> (most seconds of it, its command)
PARTS = {
    "tests": (120, "-m pytest tests/test_kernels.py -n 8 -p no:cacheprovider"),
    "kernels": (120, "tools/bench_kernels.py"),
    "sweep": (60, "tools/bench_kernels.py --sweep"),
    "steps": (240, "tools/bench_steps.py"),
    "runs": (150, "tools/gpu.py --runs"),
    "decode": (60, "tools/bench_memorize.py --config=configs/amber_125m.py --batches=8,40"
                   " --rounds=2 --device=cuda"),
}
SMOKE = {"tests": " -k test_the_choice", "decode": " --sequences=2 --batches=2 --rounds=1"
         " --device=cpu --config=configs/amber_tiny.py"}
SMALL = (" --hidden_size=64 --intermediate_size=64 --num_hidden_layers=1 --num_attention_heads=1"
         " --vocab_size=300 --sequences_per_chunk=32 --seq_len=32 --device=cpu --compile=false"
         " --sources={'text':'docs/*.md'} --workers=1")


def rows_of(command: str, seconds: float, smoke: bool) -> Iterator[dict[str, Any]]:
    """The JSON objects that a command prints, as they come; its other lines as {"text": line}."""
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if smoke else {})
    process = subprocess.Popen([sys.executable, *command.split()], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, env=environment,
                               start_new_session=True)

    def end_all() -> None:
        """The process and those that it has started, which would keep its output open."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    cut_off = threading.Timer(seconds, end_all)
    cut_off.start()
    try:
        for line in process.stdout:
            try:
                yield dict(json.loads(line))
            except (ValueError, TypeError):
                if line.strip():
                    yield {"text": line.rstrip()}
        process.wait()
    finally:
        cut_off.cancel()
        end_all()
    if process.returncode:
        yield {"text": f"ended with exit status {process.returncode} (-9: after {seconds:.0f} s)"}


def show(row: dict[str, Any], columns: list[str]) -> list[str]:
    """Print a row of a table, with a new head if its columns are not those before."""
    if "text" in row:
        print(row["text"], flush=True)
        return []
    if list(row) != columns:
        print("\n| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
    print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)
    return list(row)


def runs(smoke: bool) -> Iterator[dict[str, Any]]:
    """amber_tiny on the CPU and on the GPU, begun and gone on with, one chunk again; then steps of
    amber_125m."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # for deterministic, before CUDA starts
    chunk = 2 if smoke else 170  # steps
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        tiny = f"configs/amber_tiny.py --data_dir={home}/data --n_chunks=2{SMALL * smoke}"
        larger = (f"configs/amber_125m.py --data_dir={home}/data_125m --run_dir={home}/125m"
                  " --tokenizer=bpe --vocab_size=4096 --sources={} --n_chunks=1 --warmup_steps=20"
                  f" --sequences_per_chunk=3200 --valid_sequences=8 --global_batch_size=16"
                  f"{SMALL * smoke}")
        yield from stage(prepare_data.main, tiny)
        yield from stage(train.main, f"{tiny} --run_dir={home}/cpu --max_steps={chunk}"
                                     " --device=cpu")
        for run, steps in (("gpu", 2 * chunk), ("parts", chunk + 1), ("parts", 2 * chunk)):
            yield from stage(train.main, f"{tiny} --run_dir={home}/{run} --max_steps={steps}"
                                         " --deterministic=true")
        on_cpu, on_gpu = read_metrics(home / "cpu"), read_metrics(home / "gpu")
        for step in sorted(on_cpu.keys() & {1, 2, 10, 50, 170}):
            yield {"step": step, "loss on the CPU": on_cpu[step]["loss"],
                   "on the GPU": on_gpu[step]["loss"]}
        hashes = {read_manifest(home / run / "ckpt_001")["weights_sha256"]
                  for run in ("gpu", "parts")}
        yield {"resumed equals straight": len(hashes) == 1}
        yield from stage(audit.main, f"{home}/gpu --replay=1", show=True)
        torch.use_deterministic_algorithms(False)
        yield from stage(prepare_data.main, larger)
        yield from stage(train.main, larger)
        for step, record in read_metrics(home / "125m").items():
            if step in (1, 10, 50, 100, 200):
                yield {"amber_125m, step": step, **{key: record[key] for key in (
                    "loss", "grad_norm", "tokens_per_s", "mfu", "memory_gb")}}


def stage(main: Callable[[list[str]], None], words: str, show: bool = False
          ) -> Iterator[dict[str, Any]]:
    """Run a stage here; what it prints is a row if that is wanted, and if it fails."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            main(words.split())
    except Exception as error:
        show = True
        printed.write(f"{words}: {type(error).__name__}: {error}")
    if show:
        yield {"text": printed.getvalue()}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
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
    import triton  # not everywhere, and there the sentence above has been said
    card = "CPU" if a.smoke else torch.cuda.get_device_name()
    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "card": card,
                              "torch": torch.__version__, "triton": triton.__version__}
    print(", ".join(f"{key} {value}" for key, value in report.items()))
    give_up = time.monotonic() + 60 * a.minutes
    for part in a.parts or PARTS:
        seconds, command = PARTS[part]
        if a.smoke:
            command += SMOKE.get(part, " --smoke")
        begin, columns, report[part] = time.monotonic(), [], []
        print(f"\n## {part}", flush=True)
        for row in rows_of(command, min(seconds, give_up - begin), a.smoke):
            columns = show(row, columns)
            report[part].append(row)
            write_json(a.out, report)
        print(f"\n({part}: {time.monotonic() - begin:.0f} s)", flush=True)


if __name__ == "__main__":
    run_command(main)
