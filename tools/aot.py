"""Compile every kernel of kernels/ for a GPU and report the result. No GPU is needed.

    python tools/aot.py [90]    # for Hopper alone: registers, spills, shared memory, instructions

Every operation is called forward and backward, with a launch that only records its arguments. So
what a training step launches is compiled, by Triton and its ptxas.
"""

import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "0"  # else Triton would interpret the kernels, not compile them
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kernels  # noqa: E402
from configs import UserError, run_command  # noqa: E402

attention = sys.modules["kernels.attention"]  # the file; kernels.attention is the function

# architecture -> bytes of shared memory, threads and programs of one SM (CUDA programming guide,
# "Compute Capabilities"). Each program needs 1 KiB of shared memory more.
SM = {80: (164 << 10, 2048, 32), 86: (100 << 10, 1536, 16), 89: (100 << 10, 1536, 24),
      90: (228 << 10, 2048, 32), 100: (228 << 10, 2048, 32), 120: (100 << 10, 1536, 24)}


def calls() -> Iterator[tuple[str, Callable, tuple]]:
    """(label, operation, inputs) for every operation, tile table and element type that ships."""
    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    for name in ("bfloat16", "float16", "float32"):
        for D in (128, 64):
            q, k, v = (make(2, 64, 2, D, dtype=getattr(torch, name)) for _ in "qkv")
            yield f"attention {name} D={D}", kernels.attention, (q, k, v)
    for N in (4096, 128, 8192):  # the 7B, a laptop model, the longest row that is taken
        x, weight, bias = make(32, N), *(make(N, dtype=torch.float32) for _ in "wb")
        yield f"rms_norm N={N}", kernels.rms_norm, (x, weight, 1e-5)
        yield f"layer_norm N={N}", kernels.layer_norm, (x, weight, bias, 1e-5)
    yield "swiglu", kernels.swiglu, (make(32, 11008), make(32, 11008))
    # No gradient is asked for: the backward pass of the rotation is the same kernel.
    q, amber, crystal = make(2, 16, 32, 128).detach(), torch.zeros(16, 64), torch.zeros(16, 16)
    yield "rope R=128", kernels.rope, (q, q, amber, amber)
    yield "rope R=32 interleaved", kernels.rope, (q, q, crystal, crystal, True)
    head = make(32, 16), make(32000, 16), torch.zeros(32, dtype=torch.int64)
    yield "cross_entropy V=32000", kernels.linear_cross_entropy, head
    for kernel, sweep in attention.SWEEP.items():
        for tile in sweep:
            with patch.dict(attention.tiles(q)[0], {kernel: tile}):
                yield f"sweep {kernel}", kernels.attention, (make(2, 64, 2, 128),) * 3


def launches(arch: int) -> list[tuple]:
    """(arch, label, kernel, arguments, options) of every launch of those calls on sm_`arch`."""
    recorded: list[tuple] = []

    # Every launch goes through JITFunction.run. The outputs stay uninitialized; nothing reads them.
    def record(kernel: JITFunction, *args, grid, warmup, **kwargs) -> None:
        options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
        arguments = dict(zip(kernel.arg_names, args)) | kwargs
        # Of a call with a swept tile only the kernel that has it is compiled.
        if "sweep" not in label or label.split()[1] in kernel.__name__:
            recorded.append((arch, label, kernel, arguments, options))

    with (patch.object(JITFunction, "run", record),
          patch.object(kernels, "_triton", lambda *_: True),
          patch.object(attention, "_architecture", lambda device: arch)):
        for label, operation, inputs in calls():  # noqa: B007 (`record` reads label)
            outputs = operation(*inputs)
            loss = outputs[0] if isinstance(outputs, tuple) else outputs
            if loss.requires_grad:
                loss.sum().backward()
    return recorded


def source(kernel: JITFunction, arguments: dict) -> ASTSource:
    """The kernel specialized as the JIT specializes it: by type, and by divisibility by 16."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = mangle_type(value)
        # Pointers, strides and counts that are multiples of 16 allow loads of 16 bytes.
        if isinstance(value, Tensor) or isinstance(value, int) and value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def report(job: int) -> dict:
    """Compile one launch; registers and spilled bytes per thread, shared bytes, programs per SM."""
    arch, label, kernel, arguments, options = jobs[job]
    compiled = triton.compile(source(kernel, arguments), GPUTarget("cuda", arch, 32), options)
    ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
    # Triton does not return ptxas's own report, so ptxas runs once more.
    chip = "--gpu-name=" + re.search(r"\.target (sm_\w+)", ptx)[1]
    command = [get_ptxas(arch).path, "-v", chip, "/dev/stdin", "-o", os.devnull]
    output = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", output)[1])
    warps = options.get("num_warps", 4)
    allotted = 32 * warps * ((registers + 7) // 8 * 8)  # in groups of 8 a thread
    memory, threads, most = SM[arch]
    programs = min(most, threads // (32 * warps), 65536 // allotted, memory // (shared + 1024))
    blocks = [str(arguments[n]) for n in ("BLOCK_M", "BLOCK_N", "BLOCK") if n in arguments]
    return {
        "arch": f"sm_{arch}", "what": label, "kernel": kernel.__name__.strip("_"),
        "tile": "x".join(blocks), "warps": warps, "stages": options.get("num_stages", 3),
        "registers": registers,
        "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", output))),
        "shared_bytes": shared, "programs_per_sm": programs,
        "wgmma": ptx.count("wgmma.mma_async"), "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "warnings": ", ".join(sorted(set(re.findall(r"\(C75\d\d\)[^']*", output)))),
    }


jobs: list[tuple] = []  # arguments of `report`, which a fork inherits: kernels cannot be pickled


def main(argv: list[str]) -> None:
    if not all(word in map(str, SM) for word in argv):
        raise UserError(f"Give architectures out of {', '.join(map(str, SM))}, or none for all.")
    for arch in map(int, argv or SM):
        jobs.extend(launches(arch))
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        for i, row in enumerate(pool.map(report, range(len(jobs)))):
            if i == 0:
                print("| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
            print(f"| {' | '.join(map(str, row.values()))} |")


if __name__ == "__main__":
    run_command(main)
