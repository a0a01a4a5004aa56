"""tools/gpu.py without a GPU: the programs of its parts at tiny shapes."""

import json
from pathlib import Path

from launch import Script


def test_every_part_runs(tmp_path: Path) -> None:
    # Other tests run the parts that are left out: tests, sweep and decode.
    process = Script("tools/gpu.py", "kernels", "steps", "runs", "--smoke",
                     f"--out={tmp_path / 'report.json'}", OMP_NUM_THREADS=1)
    text, _ = process.communicate(timeout=400)
    assert process.returncode == 0 and "Error" not in text and '"failed"' not in text, text
    report = json.loads((tmp_path / "report.json").read_text())
    timed = {(row["what"], row["who"]) for row in report["kernels"] if "what" in row}
    assert {("attention", "ours"), ("rope", "formula")} <= timed
    # All kinds of step are the same computation, in float32 here.
    for network, kinds in (("amber_7b", 8), ("crystal_7b_stage1", 6)):
        losses = [row["loss"] for row in report["steps"]
                  if row.get("network") == network and "loss" in row]
        assert len(losses) == kinds and max(losses) - min(losses) < 1e-3
    assert [[*row["pays"]] for row in report["steps"] if "pays" in row] == [
        ["rope", "swiglu", "rmsnorm"], ["layernorm"]]
    assert {"resumed equals straight": True} in report["runs"]
    assert any("bit for bit" in row.get("text", "") for row in report["runs"])
