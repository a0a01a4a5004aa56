"""Triton where it is installed, a stand-in where it is not (macOS, Windows).

Every file of this room starts with `from kernels.lang import tl, triton`. Without Triton the
stand-in swallows the decorators and annotations, the file still imports and its PyTorch reference
still runs. Nothing here touches the GPU driver, so importing `kernels` is safe before a fork and on
a CPU.
"""

import os


class Absent:
    """Answers any attribute with itself and any call with its argument; it can launch nothing."""

    def __getattr__(self, name: str) -> "Absent":
        return self

    def __call__(self, x: object) -> object:
        return x


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = Absent()

INSTALLED = not isinstance(triton, Absent)

# TRITON_INTERPRET=1 makes `triton.jit` run kernels tile by tile in NumPy: slow, exact, no GPU
# needed. Triton reads the variable when it is imported, so it must be set before that.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
