"""The budget, and which file knows which. README.md describes the files.

A file at the top is a stage that one runs, the network, or a noun that several of them share. No
stage imports a program of tools/.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Lines of all files at the top and of configs/__init__.py, comments and blank lines included. A
# change may lower this number and never raises it: a feature pays with lines that go.
MOST_LINES = 5198
# Which files a file may import, beside configs, which all may.
KNOWS = {
    "configs": set(), "kernels": set(), "tokenizer": set(),
    "data": {"tokenizer"},
    "model": {"kernels"},
    "parallel": {"model", "kernels"},
    "checkpoint": {"data", "model", "parallel", "tokenizer"},
    "prepare_data": {"data", "tokenizer"},
    "eval": {"data", "model", "checkpoint", "kernels", "parallel", "tokenizer"},
    # A stage knows another in two places: validation during training is eval's bits per byte, and
    # the audit measures losses as memorize does, validates, and trains a chunk again.
    "train": {"data", "model", "kernels", "checkpoint", "parallel", "eval"},
    "memorize": {"data", "model", "checkpoint", "parallel"},
    "audit": {"data", "model", "checkpoint", "parallel", "train", "eval", "memorize"},
}
TOP = [*sorted(ROOT.glob("*.py")), ROOT / "configs/__init__.py"]


def imports(path: Path) -> set[str]:
    """The packages and files that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def n_lines(paths: list[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def test_budget() -> None:
    total = n_lines(TOP)
    assert total <= MOST_LINES
    assert n_lines([*(ROOT / "tools").glob("*.py")]) <= 3200
    assert n_lines([*(ROOT / "tests").glob("*.py")]) <= 4500


def test_the_files_are_those_of_the_plan() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} | {"configs", "kernels"} == set(KNOWS)


@pytest.mark.parametrize("name", KNOWS)
def test_a_file_imports_only_what_it_may(name: str) -> None:
    files = [ROOT / f"{name}.py"] if (ROOT / f"{name}.py").exists() else (ROOT / name).glob("*.py")
    for path in files:
        known = imports(path) & (set(KNOWS) | {"tools", "tests"})
        assert known <= KNOWS[name] | {"configs", name}, path


@pytest.mark.parametrize("name", ["configs/__init__", "tokenizer", "data", "prepare_data"])
def test_what_makes_data_does_not_know_torch(name: str) -> None:
    assert "torch" not in imports(ROOT / f"{name}.py")
