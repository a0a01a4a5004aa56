"""Every launch of kernels/ compiled for Hopper by Triton's compiler, with no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
# Triton 3.6 keeps four registers of three of attention's dK/dV kernels in memory.
SPILL_LIMIT = 16 if triton.__version__.startswith("3.6.") else 0


def test_every_kernel_compiles_well():
    """No register spilled to memory, no serialized wgmma, and the tensor cores are used."""
    tool = Path(__file__).parents[1] / "tools" / "aot.py"
    # This process may have Triton in interpreting mode, which cannot compile.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # Ampere takes as long again: python tools/aot.py compiles for both.
    done = subprocess.run([sys.executable, tool, "--json", "--arch=90"], env=env,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) > 20 and {row["arch"] for row in rows} == {"sm_90"}
    for row in rows:
        assert row["spill_bytes"] <= SPILL_LIMIT, row
        assert not row["warnings"], row
        assert row["shared_bytes"] <= 227 << 10, row
        if row["what"].startswith("attention") and row["kernel"] != "delta_kernel":
            hopper_unit = "fp32" not in row["what"]
            assert row["wgmma" if hopper_unit else "mma"] > 0, row
            # One program's softmax is to run under the other's products.
            assert row["programs_per_sm"] >= (2 if hopper_unit else 1), row
