"""bf16 made right in Triton's interpreter, for tests: `install()` before a kernel runs.

The interpreter keeps bf16 as its 16 bits in uint16. Loads, stores and the cast to fp32 are right;
its arithmetic, comparisons and dots act on the bits as on integers, and its cast from fp32 cuts off
where hardware rounds to nearest even (upstream says bf16 is not supported: triton issue 11584).
Here every such operation goes through fp32 and comes back rounded as a GPU rounds.
"""

import re

import numpy as np
import torch

# The operations with a float result; comparisons give booleans, a dot the type of its accumulator.
ARITHMETIC = re.compile(
    "create_(f(add|sub|mul|div|rem|ma|abs|neg)|precise_divf|(min|max)(imum|num)f|clampf|exp2?|log2?"
    "|sqrt|rsqrt|sin|cos)$")


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bits -> fp32: bf16 is the upper half of an fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """fp32 -> bf16 bits, to nearest, ties to even, as PyTorch rounds."""
    values = torch.from_numpy(np.array(values, dtype=np.float32))
    return values.bfloat16().view(torch.int16).numpy().view(np.uint16)


def install() -> None:
    """Patch the interpreter of this process."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def is_bf16(x: object) -> bool:
        return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16

    def in_fp32(x: object) -> object:
        return TensorHandle(widen(x.data), tl.float32) if is_bf16(x) else x

    def wrap(name: str) -> None:
        original = getattr(InterpreterBuilder, name)

        def patched(self, *args, **kwargs):
            out = original(self, *map(in_fp32, args), **kwargs)
            if ARITHMETIC.match(name) and any(map(is_bf16, args)):
                return TensorHandle(narrow(out.data), tl.bfloat16)
            return out

        setattr(InterpreterBuilder, name, patched)

    for name in dir(InterpreterBuilder):
        if ARITHMETIC.match(name) or name.startswith("create_fcmp") or name == "create_dot":
            wrap(name)
    cast, rounding_cast = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp

    def cast_impl(self, source, target):
        if target.scalar == tl.bfloat16 and not is_bf16(source):
            return TensorHandle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        if is_bf16(source) and target.scalar == tl.float32:
            return in_fp32(source)
        return cast(self, source if target.scalar == tl.bfloat16 else in_fp32(source), target)

    def create_fp_to_fp(self, source, target, rounding):
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return self.cast_impl(source, target)
        return rounding_cast(self, source, target, rounding)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
