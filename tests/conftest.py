"""Settings that must be in the environment before numpy, torch or triton is first imported."""

import os

# Tiles in Triton's interpreter are small NumPy products: threads would only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Several pytest workers share the cores already.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

# Without a GPU the Triton kernels run in Triton's interpreter, which reads this at its import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
