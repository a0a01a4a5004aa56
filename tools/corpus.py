"""Write the embedded text, data/corpus/SOURCE.jsonl: python tools/corpus.py

configs/amber_tiny.py names these files as its `sources`. They hold the code and the English of
packages that requirements.txt pins exactly: nothing is downloaded, and everyone who has these
versions has the same bytes, whatever the machine and the version of Python.
"""

import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from configs import UserError, run_command  # noqa: E402
from data import writing  # noqa: E402

DIRECTORY = Path("data", "corpus")
# Bytes taken of each source: a third is code (Amber has 23 %), the rest English.
CORPUS = {
    "code": 4_000_000,
    "examples": 3_800_000,  # docstrings that show a session, >>>
    "docstrings": 3_200_000,  # all other docstrings
    "formulas": 1_300_000,  # docstrings with mathematics
}
# These are pinned in requirements.txt, and their Python files are the same on every platform.
PACKAGES = ("torch", "numpy", "sympy", "networkx", "mpmath")
# sha256 of the text that the pinned versions give
REFERENCE = "4de6b0d02a0bc38bc20a129a7c19abded0ecfdd3f3385256de3149f66e05d8f3"
# Written when a package is built, copied from other packages, or not there for every Python
# (numpy.distutils). __init__.py is little but imports, and Windows adds to numpy's.
SKIP_FOLDERS = {"_vendor", "vendored_templates", "generated", "distutils", "__pycache__"}
SKIP_FILES = re.compile("_sysconfig|__config__|_?version|__init__")
# Text in triple quotes: the first statement of a body, or what PyTorch adds to its C functions.
DOCSTRING = re.compile(r':\n\s+[rR]?"""(.+?)"""|add_docstr\([^"]{,200}?[rR]?"""(.+?)"""', re.S)
GENERATED = re.compile(r"generated (by|from|with|automatically)|auto-?generated|do not edit", re.I)


def write_corpus() -> None:
    """Write the documents of every source."""
    documents: dict[str, list[str]] = {name: [] for name in CORPUS}
    size: Counter[str] = Counter()
    seen: set[str] = set()
    for source, text in texts():
        if all(size[name] >= CORPUS[name] for name in CORPUS):
            break
        if size[source] >= CORPUS[source]:
            continue
        text = without_repetition(text, seen)
        whole = " ".join(text.split())
        # What is shorter is a name and a signature, or what is left of a copy.
        if len(text) >= 200 and whole not in seen:
            seen.add(whole)
            documents[source].append(text)
            size[source] += len(text.encode())
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for source in CORPUS:
        with writing(DIRECTORY / f"{source}.jsonl") as f:
            f.writelines(json.dumps({"text": text}).encode() + b"\n" for text in documents[source])


def texts() -> Iterator[tuple[str, str]]:
    """(source, text): a mixture of all packages, in an order that looks random and is fixed."""
    for key, path in python_files():
        code = path.read_text(encoding="utf-8", errors="replace")
        # A file gives either its code or its docstrings, so that no text is in two sources.
        if key % 8 == 0:
            if len(code) < 150_000 and not GENERATED.search(code[:2000]) and not is_table(code):
                yield "code", code
            continue
        for match in DOCSTRING.finditer(code):
            text = inspect.cleandoc(match[1] or match[2])
            # Sphinx writes formulas as :math:`...`, and Markdown between dollars.
            if ":math:" in text or "$" in text:
                yield "formulas", text
            else:
                yield "examples" if ">>>" in text else "docstrings", text


def is_table(code: str) -> bool:
    """Whether a file is data rather than code."""
    # Many digits, or very long lines: a model would learn nothing but numbers from it.
    digits = sum(map(code.count, "0123456789"))
    return digits > 0.08 * len(code) or max(map(len, code.splitlines()), default=0) > 400


def without_repetition(text: str, seen: set[str]) -> str:
    """A text without the paragraphs in `seen` (licences, shared parameters); adds the others."""
    kept = []
    for paragraph in text.split("\n\n"):
        key = " ".join(paragraph.split())  # two that differ in white space alone are the same
        if key not in seen:
            kept.append(paragraph)
        if len(key) >= 60:  # shorter ones repeat by chance, and mean little without the others
            seen.add(key)
    return "\n\n".join(kept).strip() + "\n"


def python_files() -> list[tuple[int, Path]]:
    """(hash of the name, path) of the files of PACKAGES, sorted: a mixture of all, from the first
    file on."""
    files = []
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)  # finds, and does not import
        if spec is None:
            raise UserError(f"The embedded text needs the package {name}, which is not installed:"
                            " pip install -r requirements.txt.")
        root = Path(spec.submodule_search_locations[0])
        for folder, folders, names in os.walk(root):
            folders[:] = [f for f in folders if f not in SKIP_FOLDERS]  # those os.walk goes into
            for file in names:
                if file.endswith(".py") and not SKIP_FILES.match(file):
                    path = Path(folder, file)
                    full = f"{name}/{path.relative_to(root).as_posix()}"
                    files.append((zlib.crc32(full.encode()), full, path))
    return [(key, path) for key, _, path in sorted(files)]


def is_reference() -> bool:
    """Whether the text is there, and that of the pinned versions."""
    text = hashlib.sha256()
    for path in (DIRECTORY / f"{source}.jsonl" for source in CORPUS):
        text.update(path.read_bytes() if path.exists() else b"")
    return text.hexdigest() == REFERENCE


def main(argv: list[str]) -> None:
    if argv:
        raise UserError("tools/corpus.py writes data/corpus, and takes no arguments.")
    if not is_reference():  # files that are right keep their time
        write_corpus()
    if is_reference():
        print(f"The text in {DIRECTORY} is the reference (sha256 {REFERENCE[:16]}).")
        return
    pinned = Path(ROOT, "requirements.txt").read_text(encoding="utf-8").split()
    there = [f"{p}=={importlib.metadata.version(p).partition('+')[0]}" for p in PACKAGES]
    others = [package for package in there if package not in pinned]
    because = f"{', '.join(others)} is installed" if others else "a file of theirs was changed"
    print(f"The text in {DIRECTORY} is not the reference, which is of the versions in"
          f" requirements.txt: {because}. Losses compare only with those on the same text.")


if __name__ == "__main__":
    run_command(main)
