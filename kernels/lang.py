"""Triton where it is installed, a stand-in where it is not (macOS, Windows).

Every file of kernels/ starts with `from kernels.lang import tl, triton`. Without Triton the
stand-in accepts the decorators and annotations, so that the file can be imported and its PyTorch
reference runs. Importing `kernels` does not touch the GPU driver: it is safe before a fork and on a
CPU.
"""

import os


class Absent:
    """Every attribute is this object, and a call returns its argument; it launches nothing."""

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
