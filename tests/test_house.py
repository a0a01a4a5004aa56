"""What must not rot: which room knows which, and what a reader can take in at once.

The rooms stand in README.md. A file at the top is a command one runs, the network, or a noun that
three of them share; tools/ are programs that no stage imports.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = {"prepare_data", "train", "eval", "memorize", "audit", "lookup"}
# Which rooms a room may import, beside configs, which all may.
KNOWS = {
    "configs": set(), "kernels": set(), "tokenizer": set(),
    "data": {"tokenizer"},
    "model": {"kernels"},
    "parallel": {"model", "kernels"},
    "checkpoint": {"data", "model", "parallel", "tokenizer"},
    "corpus": {"data"},
    "prepare_data": {"data", "tokenizer", "corpus"},
    "eval": {"data", "model", "checkpoint", "kernels", "parallel", "tokenizer"},
    # train's validation is eval's bits per byte: the one place where a stage knows another ...
    "train": {"data", "model", "checkpoint", "parallel", "eval"},
    "memorize": {"data", "model", "checkpoint"},
    # ... but for those whose work is to do again what train has done, to ask what is known, and to
    # ask where prepare_data has dealt what to.
    "replay": {"data", "model", "checkpoint", "parallel", "train"},
    "audit": {"data", "model", "checkpoint", "parallel", "train", "memorize", "replay"},
    "lookup": {"data", "model", "checkpoint", "prepare_data", "tokenizer"},
}
FILES = [*ROOT.glob("*.py"), *(ROOT / "configs").glob("*.py"), *(ROOT / "kernels").glob("*.py"),
         *(ROOT / "tools").glob("*.py"), *(ROOT / "tests").glob("*.py")]
PRODUCT = [path for path in FILES if path.parent.name != "tests"]
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def imports(path: Path) -> set[str]:
    """The packages and files that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def test_the_rooms_are_those_of_the_plan() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} | {"configs", "kernels"} == set(KNOWS)


@pytest.mark.parametrize("room", KNOWS)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    files = [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else (ROOT / room).glob("*.py")
    for path in files:
        assert imports(path) & (set(KNOWS) | {"tools", "tests"}) <= KNOWS[room] | {"configs", room}


@pytest.mark.parametrize("room", ["configs", "tokenizer", "data", "corpus", "prepare_data"])
def test_what_makes_data_does_not_know_torch(room: str) -> None:
    path = ROOT / f"{room}.py" if room != "configs" else ROOT / "configs/__init__.py"
    assert "torch" not in imports(path)


def test_the_network_opens_no_file() -> None:
    tree = ast.parse((ROOT / "model.py").read_text(encoding="utf-8"))
    called = {node.func.id for node in ast.walk(tree)
              if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"open", "Path"}


@pytest.mark.parametrize("name", names(PRODUCT))
def test_functions_fit_on_a_page(name: str) -> None:
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            size = node.end_lineno - node.lineno + 1
            assert size <= 55, f"{name}:{node.lineno} {node.name} has {size} lines"


@pytest.mark.parametrize("name", names(FILES))
def test_lines_fit_a_window(name: str) -> None:
    for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1):
        assert len(line) <= 100, f"{name}:{number}"


def depth(node: ast.AST) -> int:
    """How deep comprehensions nest below a node."""
    inner = max((depth(child) for child in ast.iter_child_nodes(node)), default=0)
    return inner + isinstance(node, COMPREHENSIONS)


@pytest.mark.parametrize("name", names(PRODUCT))
def test_no_comprehension_in_a_comprehension_in_a_comprehension(name: str) -> None:
    assert depth(ast.parse((ROOT / name).read_text(encoding="utf-8"))) < 3


def test_decisions_are_explained_where_they_are_made() -> None:
    """Full-line comments in the rooms at the top, and shapes in the network."""
    rooms = [*ROOT.glob("*.py"), ROOT / "configs/__init__.py"]
    lines = [line.strip() for path in rooms
             for line in path.read_text(encoding="utf-8").splitlines()]
    comments = sum(line.startswith("#") for line in lines)
    assert comments / len(lines) >= 0.08
    network = (ROOT / "model.py").read_text(encoding="utf-8")
    assert len(re.findall(r"#.*\([BTSDHKhVRN0-9]+(?:[ ,*/+-]+[\w.]+)*,?\)", network)) >= 25
