"""The tools that look at whole runs: report, compare, bands, check."""

import csv
import math
import re
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers import ROOT
from test_train import home as mini
from test_train import straight

import eval as evaluation
import kernels
import memorize
import train
from checkpoint import read_records, write_records
from configs import UserError, load
from data import load_data, read_json, write_json
from tools import bands, check, compare, dry_run, report


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, its data, and a run of it that is evaluated."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(straight(), home / "run")
    text = (mini() / "mini.py").read_text() + f"run_dir = {str(home / 'run')!r}\n"
    (home / "mini.py").write_text(text)
    (home / "data").symlink_to(mini() / "data")
    evaluation.main([str(home / "mini.py")])
    return home


def write_run(home: Path, path: Path, more: float = 0.0, steps: int = 18, **settings: Any) -> str:
    """The first steps of the run, with so much more loss and other settings; no checkpoints."""
    path.mkdir(parents=True)
    records = read_records(home / "run/metrics.jsonl")[:steps]
    for record in records:
        record["loss"] += more
        for result in record.get("valid", {}).values():
            result["bits_per_byte"] += more
    write_records(path / "metrics.jsonl", records)
    write_json(path / "config.json", read_json(home / "run/config.json") | settings)
    return str(path)


def open_page(path: Path, figures: int) -> str:
    """The text of a page that is well-formed, loads nothing, runs nothing, and has figures."""
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|iframe|img)|<[^>]* on\w+=", text)
    assert not re.search(r'(href|src)="(?!#|data:image/png;base64,)', text)
    assert text.count("<svg") == figures
    return "".join(ElementTree.fromstring(text.removeprefix("<!doctype html>")).itertext())


def test_compare(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    runs = [(1e-2, 1, 0.0), (1e-2, 2, 0.1), (1e-3, 1, 0.3), (1e-3, 2, 0.5)]
    paths = [write_run(home, tmp_path / f"rate_{rate}_{seed}", more, learning_rate=rate, seed=seed)
             for rate, seed, more in runs]
    report.main(paths)
    text = capsys.readouterr().out
    assert "nothing yet: more seeds would decide, about 1\n" in text and "run_dir" not in text
    open_page(tmp_path / "compare.html", figures=4)
    with open(tmp_path / "compare.csv") as f:
        rows = {row["name"]: row for row in csv.DictReader(f) if row["figure"].endswith("prose")}
    assert float(rows["learning_rate 0.01"]["spread"]) == pytest.approx(0.1 / math.sqrt(2), 1e-5)
    # Seed by seed 0.3 and 0.4: what the seed does to both of a pair is not in the error. The two
    # sources are a family, so Holm doubles the p-value of t = 7 with one degree of freedom.
    found = [float(rows["learning_rate 0.01 to 0.001"][key]) for key in ("value", "spread", "p")]
    assert found == pytest.approx([0.35, 0.05, 4 / math.pi * math.atan(1 / 7)], rel=1e-5)
    report.main([paths[0], write_run(home, tmp_path / "shorter", steps=10)])
    assert "All are compared at 2,048 tokens" in capsys.readouterr().out
    # Runs of other data, or that validate on other sequences, are not compared seed by seed.
    for other in (home / "run", write_run(home, tmp_path / "other", eval_sequences=2)):
        report.main([*paths, str(other)])
        text = " ".join(re.findall("difference.*", capsys.readouterr().out))
        assert "0.01 to 0.001" in text and "data" not in text and "eval_sequences" not in text
    with pytest.raises(UserError, match="is not the directory of a run"):
        report.main([paths[0], str(tmp_path)])


def test_report(home: Path, tmp_path: Path) -> None:
    """Of a run that goes on from another one, beside another one's scores; and of that other."""
    first, second, theirs = home / "run", tmp_path / "<second>", tmp_path / "theirs.csv"
    argv = [str(home / "mini.py"), f"--run_dir={second}"]
    train.main([*argv, f"--init_from={first / 'ckpt_002'}", "--max_steps=6"])
    evaluation.main([*argv, "--tasks=recall"])
    memorize.main([*argv, "--k=8", "--l=8"])
    [panel] = [panel for panel in report.stage_panels(second) if panel.title == "prose"]
    tokens = {name: [x for x, _ in curve.points] for name, curve in panel.curves.items()}
    assert tokens == {"run": [1536, 3072, 4608], "<second>": [4608 + 1536]}
    theirs.write_text("# source\ntokens,recall,other\n10,0.25,1\n1000,,1\n1536,0.75,1\n9e9,1,1\n")
    # What the files of a run contain is a stranger's: it stays text.
    write_json(second / "audit.json", {"checkpoints": {"ckpt_000": {"log": "6 lines"}},
                                       "findings": ["log: <script>"]})
    report.main([str(second), f"--published={theirs}"])
    said = open_page(second / "report.html", figures=6 + 1 + 2)
    assert "recall, published 0.75" in said and "log: <script>" in said
    # What is null or no number is a gap, and a run that is not evaluated shows training's figures.
    bare = Path(write_run(home, tmp_path / "bare"))
    steps = read_records(bare / "metrics.jsonl")
    steps[0] |= {"loss": None, "lr": [], "grad_norm": 10**999}
    steps[-1]["valid"]["</svg>\0"] = {"bits_per_byte": None}
    write_records(bare / "metrics.jsonl", steps)
    (bare / "train.log").write_text("step 6/6  chunk 0\nsample: 'The\\n<script>'\n")
    report.main([str(bare)])
    said = open_page(bare / "report.html", figures=5)
    assert "</svg>\ufffd" in said and "The\n<script>" in said and "not audited" in said


def test_bands(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, found = load([str(home / "mini.py")])[0], bands.figures(home / "run")
    values = {name: [x - 0.001, x + 0.001] for name, x in found.items()}
    entry = {"seeds": 2, "data_sha256": load_data(config.data_dir).sha256, "figures": values}
    monkeypatch.setattr(bands, "BANDS", tmp_path / "bands.json")

    def said(**changes: Any) -> str:
        write_json(bands.BANDS, {"mini": entry | changes})
        return bands.check(config)
    assert "is as expected: 4 of 4 figures" in said()
    assert "is NOT as expected:\n  bits per byte of code is" in said(
        figures=values | {"bits per byte of code": [1.0, 1.001]})
    assert said(data_sha256="0" * 64) == ""  # bands of other data


def test_the_questions_of_the_course(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                     capsys: pytest.CaptureFixture) -> None:
    # The differences by seed are 0.3 and 0.1.
    for name, more in (("1e-3_seed_1", 0.0), ("3e-3_seed_1", 0.3),
                       ("1e-3_seed_2", 0.1), ("3e-3_seed_2", 0.2)):
        write_run(home, tmp_path / f"runs/ablation/rate_{name}", more)
    mine = write_run(home, tmp_path / "runs/one_process")
    write_run(home, tmp_path / "runs/two_processes", -0.25)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    write_json(Path(mine) / "memorization.json",
               {"forgetting": {"0": {"loss": -0.2}, "3": {"loss": -0.05}}})
    # What a student would write down, without this code. 18 steps: the question is about step 14.
    data, loss = load_data(home / "data"), compare.read_steps(mine)[0]["loss"]
    ids = data.validation("code")["token_ids"]
    text = "".join(data.tokenizer.decode(row) for row in ids)
    order = np.random.default_rng([load([mine])[0].seed, 2]).permutation(50)[8:13]
    right = {1: f"{len(text.encode()) / ids.size}", 2: ",".join(map(str, order)), 3: "13.48",
             4: f"{loss - math.log(300)}", 5: "136, 16", 6: "0.1,0.0707", 7: "0.25",
             8: "0.0625,0.01825", 9: "25"}
    for n, answer in right.items():
        check.main([str(n), mine])
        check.main([str(n), mine, f"--answer={answer}"])
        assert capsys.readouterr().out.endswith("Right.\n")
        with pytest.raises(UserError, match="Not yet"):
            check.main([str(n), mine, f"--answer=7{answer.lstrip('-')}"])


def test_a_dry_run_is_of_the_kernels_of_a_gpu(capsys: pytest.CaptureFixture,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple] = []
    monkeypatch.setattr(kernels, "use", lambda backend, dry=False: used.append((backend, dry)))
    dry_run.main([str(ROOT / "configs/exam_tiny.py"), "--world_size=2",
                  "--micro_batch_size=8"])
    assert used == [("triton", True)] and "This fits 80 GB" in capsys.readouterr().out
