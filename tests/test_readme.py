"""What README and docs mark as runnable runs, and README's line counts are right.

    python tests/test_readme.py        # writes the right counts into README.md
"""

import json
import re
import shlex
import shutil
from pathlib import Path

from launch import Script

ROOT = Path(__file__).parent.parent
ROW = re.compile(r"^\| `([\w/.]+\.py)` \| (\d+) \|", re.MULTILINE)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks() -> list[tuple[str, str]]:
    """(name, content) of the blocks that are marked ```sh test or ```python NAME.py, README's
    first."""
    text = "".join(page.read_text() for page in PAGES)
    return re.findall(r"^```(?:sh|python) (test|\S+\.py)\n(.*?)^```", text, re.M | re.S)


def lines(name: str) -> int:
    return len((ROOT / name).read_text().splitlines())


def test_line_counts() -> None:
    claimed = dict(ROW.findall((ROOT / "README.md").read_text()))
    assert len(claimed) >= 10
    assert {name: int(n) for name, n in claimed.items()} == {name: lines(name) for name in claimed}


def test_commands(tmp_path: Path) -> None:
    """Verbatim, one after the other, in a fresh copy whose tiny config is made tinier."""
    for name in ("configs", "docs", "kernels", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in [*ROOT.glob("*.py"), ROOT / "requirements.txt"]:
        shutil.copy(file, tmp_path)
    with open(tmp_path / "configs/amber_tiny.py", "a") as f:
        f.write("n_chunks, sequences_per_chunk, valid_sequences, sample_tokens = 2, 32, 4, 4\n")
    commands = []
    for name, block in blocks():
        lines = block.splitlines()
        if name != "test":
            (tmp_path / name).write_text(block)
            lines = [f"python {name}"] if "import torch" in block else []  # else it is a config
        for command in lines:
            words = shlex.split(command, comments=True)
            assert words[0] == "python"
            if command not in commands:
                process = Script(*words[1:], cwd=tmp_path)
                text, _ = process.communicate(timeout=120)
                assert process.returncode == 0 and text.strip(), f"{command}\n{text}"
                commands.append(command)
    assert len(commands) >= 18


def test_readme_can_be_read_in_a_sitting() -> None:
    text = (ROOT / "README.md").read_text()
    # The bands, without which a run is not judged, are of the data that README names.
    assert json.loads((ROOT / "docs/bands.json").read_text())["amber_tiny"]["data_sha256"] in text
    assert len(text.splitlines()) <= 200 and len(text.split()) <= 1900


def test_what_is_named_is_there() -> None:
    """Every stage, tool and config that a page names, and every page that it leads to."""
    text = "".join(page.read_text() for page in PAGES)
    for link in re.findall(r"\]\((docs/[\w./]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / link).exists(), link
    for name in set(re.findall(r"(?:python|torchrun) ([\w/]+\.py)|(configs/\w+\.py)", text)):
        assert (ROOT / "".join(name)).exists() or name[0] in dict(blocks()), name


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(ROW.sub(lambda m: f"| `{m[1]}` | {lines(m[1])} |", readme.read_text()))
