"""What does the compiler make of the kernels? No GPU is needed.

    python tools/aot.py            a table: registers, spills, shared memory, instructions
    python tools/aot.py --json     the same, one JSON object a line

Every operation is called once per shape with the launch itself replaced by a note of its arguments,
so what is compiled here is what a training step launches. Triton's own compiler and the ptxas in
its wheel then do everything short of running it.
"""

import argparse
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kernels  # noqa: E402
from configs import UserError, run_command  # noqa: E402

ops = torch.ops.kernels
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64"}

# What an SM has, from the CUDA C++ programming guide, "technical specifications per compute
# capability". It adds 1 KiB to the shared memory of each program.
SHARED = {80: 164 << 10, 90: 228 << 10}  # bytes
REGISTERS, THREADS, PROGRAMS = 65536, 2048, 32


def calls() -> list[tuple[str, Callable]]:
    """(label, call) for every operation, tile table and element type that ships."""
    found = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for D, H, K in ((128, 2, 2), (64, 2, 2), (128, 4, 2)):
            if K < H and dtype != torch.bfloat16:
                continue  # grouped heads change nothing but dK/dV's outer loop
            q, k = torch.zeros(2, 64, H, D, dtype=dtype), torch.zeros(2, 64, K, D, dtype=dtype)
            label = f"attention {TYPES[dtype]} D={D}" + f" H/K={H // K}" * (K < H)
            lse = torch.zeros(2, H, 64)
            found.append((label, lambda q=q, k=k: ops.attention(q, k, k, 1.0)))
            found.append((label, lambda q=q, k=k, lse=lse:
                          ops.attention_backward(q, q, k, k, q, lse, 1.0)))
    # Rows of the 7B, of a laptop model, and the longest that are taken.
    for N in (4096, 128, 8192):
        x, w, rows = torch.zeros(32, N, dtype=torch.bfloat16), torch.zeros(N), torch.zeros(32)
        found.append((f"rms_norm N={N}", lambda x=x, w=w: ops.rms_norm(x, w, 1e-5)))
        found.append((f"rms_norm N={N}", lambda x=x, w=w, rows=rows:
                      ops.rms_norm_backward(x, x, w, rows)))
        found.append((f"layer_norm N={N}", lambda x=x, w=w: ops.layer_norm(x, w, w, 1e-5)))
        found.append((f"layer_norm N={N}", lambda x=x, w=w, rows=rows:
                      ops.layer_norm_backward(x, x, w, rows, rows)))
    y = torch.zeros(32, 11008, dtype=torch.bfloat16)
    found.append(("swiglu", lambda: ops.swiglu(y, y)))
    found.append(("swiglu", lambda: ops.swiglu_backward(y, y, y)))
    q = torch.zeros(2, 16, 32, 128, dtype=torch.bfloat16)
    full, part = torch.zeros(16, 64), torch.zeros(16, 16)  # Amber's table and Crystal's
    found.append(("rope R=128", lambda: ops.rope(q, q, full, full, False, 1)))
    found.append(("rope R=32 interleaved", lambda: ops.rope(q, q, part, part, True, 1)))
    z, targets = torch.zeros(32, 32000, dtype=torch.bfloat16), torch.zeros(32, dtype=torch.int64)
    found.append(("cross_entropy V=32000", lambda: ops.cross_entropy_(z, targets, True)))
    return found


def launches(arch: int) -> list[tuple]:
    """(label, kernel, arguments, options) of every launch those calls would make on sm_`arch`."""
    # The launch of every kernel goes through JITFunction.run; noting instead of running leaves the
    # outputs uninitialised, which nobody reads.
    noted, label = [], ""

    def note(kernel: JITFunction, *args, grid, warmup, **kwargs) -> None:
        options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
        arguments = dict(zip(kernel.arg_names, args)) | kwargs
        noted.append((label, kernel, arguments, options))

    run, JITFunction.run = JITFunction.run, note
    attention = sys.modules["kernels.attention"]
    on_hopper, attention._on_hopper = attention._on_hopper, lambda device: arch == 90
    try:
        for label, call in calls():  # noqa: B007 (`note` reads label)
            call()
    finally:
        JITFunction.run, attention._on_hopper = run, on_hopper
    return noted


def source(kernel: JITFunction, arguments: dict) -> ASTSource:
    """The kernel specialised as the JIT specialises it: types, and which values 16 divides."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            # Strides and counts that 16 divides let loads be 16 bytes wide, so the JIT looks for
            # them.
            pointer = isinstance(value, torch.Tensor)
            signature[name] = f"*{TYPES[value.dtype]}" if pointer else "i32"
            if pointer or value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def report(arch: int, label: str, kernel: JITFunction, arguments: dict, options: dict) -> dict:
    """Compile one launch; registers and bytes per thread, shared memory, programs per SM."""
    made = triton.compile(source(kernel, arguments), target=GPUTarget("cuda", arch, 32),
                          options=options)
    # Triton keeps ptxas's report to itself: ask ptxas once more.
    ptx = made.asm["ptx"]
    ptxas = os.environ.get("TRITON_PTXAS_PATH",
                           Path(triton.__file__).parent / "backends/nvidia/bin/ptxas")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        chip = re.search(r"\.target (sm_\w+)", ptx)[1]
        said = subprocess.run([ptxas, "-v", f"--gpu-name={chip}", file.name, "-o", os.devnull],
                              capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", said)[1])
    threads = 32 * options.get("num_warps", 4)
    shared = made.metadata.shared
    # Each thread gets its registers in groups of 8.
    fit = (REGISTERS // (threads * (math.ceil(registers / 8) * 8)), THREADS // threads,
           SHARED[arch] // (shared + 1024), PROGRAMS)
    return {
        "arch": f"sm_{arch}", "what": label, "kernel": kernel.__name__.strip("_"),
        "tile": "x".join(str(arguments[n]) for n in ("BLOCK_M", "BLOCK_N", "BLOCK")
                         if n in arguments),
        "warps": options.get("num_warps", 4), "stages": options.get("num_stages", 3),
        "registers": registers,
        "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        "shared_bytes": shared, "programs_per_sm": min(fit),
        "wgmma": ptx.count("wgmma.mma_async"), "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "tma": ptx.count("cp.async.bulk.tensor"),
        "warnings": sorted(set(re.findall(r"\(C75\d\d\)[^']*", said))),
    }


def _report_one(job: tuple[int, int]) -> dict:
    arch, i = job
    return report(arch, *_launches[arch][i])


_launches: dict[int, list] = {}


def reports(archs: tuple[int, ...] = (90, 80)) -> list[dict]:
    """Every launch compiled for every architecture, on all cores."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("TRITON_INTERPRET is set, so Triton would interpret the kernels instead of"
                        " compiling them: run env -u TRITON_INTERPRET python tools/aot.py.")
    kernels.use("auto")
    _launches.update((arch, launches(arch)) for arch in archs)
    jobs = [(arch, i) for arch in archs for i in range(len(_launches[arch]))]
    # Forked, because a compiled function cannot be pickled but can be inherited.
    with multiprocessing.get_context("fork").Pool() as pool:
        return pool.map(_report_one, jobs, chunksize=1)


def table(rows: list[dict]) -> str:
    """The reports as a Markdown table."""
    names = [name for name in rows[0] if name != "warnings"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        lines.append("| " + " | ".join(str(row[name]) for name in names) + " |")
        lines += [f"| | {warning} |" for warning in row["warnings"]]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--arch", type=int, choices=(90, 80), help="only for Hopper or Ampere")
    args = parser.parse_args(argv)
    rows = reports((args.arch,) if args.arch else (90, 80))
    if args.json:
        print("\n".join(map(json.dumps, rows)))
    else:
        print(table(rows))


if __name__ == "__main__":
    run_command(main)
