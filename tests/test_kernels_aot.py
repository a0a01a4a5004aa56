"""Every launch of kernels/ compiled for Hopper by Triton's compiler, with no GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_every_kernel_compiles_well():
    """No register spilled to memory, no serialized wgmma, and the tensor cores are used."""
    tool = Path(__file__).parents[1] / "tools" / "aot.py"
    output = subprocess.run([sys.executable, tool, "90"], capture_output=True, text=True,
                            check=True, timeout=300).stdout
    names, _, *rows = [line.replace(" ", "").split("|") for line in output.splitlines()]
    assert len(rows) > 50
    for row in (dict(zip(names, cells)) for cells in rows):
        swept = row["what"].startswith("sweep")
        # One tile in the sweep keeps four registers in memory.
        assert int(row["spill_bytes"]) <= (16 if swept else 0), row
        assert not row["warnings"] and int(row["programs_per_sm"]) >= 1, row  # it fits into an SM
        if swept or row["what"].startswith("attention"):
            assert int(row["mma" if "float32" in row["what"] else "wgmma"]) > 0, row
