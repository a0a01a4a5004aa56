"""tools/gpu.py on the day that there is no GPU: every program that it would run, at tiny shapes."""

import json
from pathlib import Path

from launch import Script


def test_every_part_runs(tmp_path: Path) -> None:
    # "tests" is the tests, and "sweep" and "decode" are programs that run without a GPU as well.
    parts = ["kernels", "steps", "runs"]
    process = Script("tools/gpu.py", *parts, "--smoke", f"--out={tmp_path / 'report.json'}",
                     OMP_NUM_THREADS=1)
    text, _ = process.communicate(timeout=400)
    assert process.returncode == 0, text
    report = json.loads((tmp_path / "report.json").read_text())
    assert "ended with exit status" not in text and "Traceback" not in text
    assert not [row for part in parts for row in report[part] if "failed" in row]
    who = {(row["what"], row["who"]) for row in report["kernels"] if "what" in row}
    assert {("attention", "ours"), ("rms_norm", "F.rms_norm"), ("rope", "formula")} <= who
    # All kinds of step are the same computation, in float32 here.
    losses = [row["loss"] for row in report["steps"] if row.get("network") == "amber_7b"]
    assert len(losses) == 7 and max(losses) - min(losses) < 1e-3
    assert {"resumed equals straight": True} in report["runs"]
    assert any("bit for bit" in row.get("text", "") for row in report["runs"])
