"""The embedded corpus: text that every installation of this repository carries, the same for all.

    python corpus.py text      # writes it into a folder, one .jsonl file per source, to look at

prepare_data.py takes it where a config names no `sources`. It is the code and the English of
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
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from configs import UserError, run_command
from data import writing

# Bytes taken of each source: a third is code (Amber has 23 %), the rest English. The order decides
# the numbers that their sequences carry.
CORPUS = {
    "code": 4_000_000,
    "examples": 3_800_000,  # docstrings that show a session, >>>
    "docstrings": 3_200_000,  # all other docstrings
    "formulas": 1_300_000,  # docstrings with mathematics
}
# These are pinned in requirements.txt, and their Python files are the same on every platform.
PACKAGES = ("torch", "numpy", "sympy", "networkx", "mpmath")
# sha256 of the text that these versions give: see `describe`.
REFERENCE = "4de6b0d02a0bc38bc20a129a7c19abded0ecfdd3f3385256de3149f66e05d8f3"
# What is written when a package is built, copied from other packages, or not there for every Python
# (numpy.distutils). __init__.py is little but imports, and Windows adds to numpy's.
SKIP_FOLDERS = {"_vendor", "vendored_templates", "generated", "distutils", "__pycache__"}
SKIP_FILES = re.compile("_sysconfig|__config__|_?version|__init__")
# Text in triple quotes: the first statement of a body, or what PyTorch adds to its C functions.
DOCSTRING = re.compile(r':\n\s+[rR]?"""(.+?)"""|add_docstr\([^"]{,200}?[rR]?"""(.+?)"""', re.S)
GENERATED = re.compile(r"generated (by|from|with|automatically)|auto-?generated|do not edit", re.I)


def write_embedded_corpus(directory: Path) -> dict[str, list[str]]:
    """Write directory/SOURCE.jsonl of every source; returns their paths."""
    documents: dict[str, list[str]] = {name: [] for name in CORPUS}
    size: Counter[str] = Counter()
    seen: set[str] = set()
    for source, text in embedded_texts():
        if all(size[name] >= CORPUS[name] for name in CORPUS):
            break
        if size[source] >= CORPUS[source]:
            continue
        text = without_repetition(text, seen)
        # What is shorter is a name and a signature, or what is left of a copy.
        whole = one_spaced(text)
        if len(text) >= 200 and whole not in seen:
            seen.add(whole)
            documents[source].append(text)
            size[source] += len(text.encode())
    directory.mkdir(parents=True, exist_ok=True)
    files = {}
    for source, texts in documents.items():
        path = directory / f"{source}.jsonl"
        with writing(path) as f:
            f.writelines(json.dumps({"text": text}).encode() + b"\n" for text in texts)
        files[source] = [str(path)]
    return files


def embedded_texts() -> Iterator[tuple[str, str]]:
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
            yield docstring_source(text), text


def docstring_source(text: str) -> str:
    """The source that a docstring belongs to."""
    # Sphinx writes formulas as :math:`...`, and Markdown between dollars.
    if ":math:" in text or "$" in text:
        return "formulas"
    return "examples" if ">>>" in text else "docstrings"


def is_table(code: str) -> bool:
    """Whether a file is data rather than code."""
    # Many digits, or very long lines: a model would learn nothing but numbers from it.
    digits = sum(map(code.count, "0123456789"))
    return digits > 0.08 * len(code) or max(map(len, code.splitlines()), default=0) > 400


def without_repetition(text: str, seen: set[str]) -> str:
    """A text without the paragraphs in `seen` (licences, shared parameters); adds the others."""
    kept = []
    for paragraph in text.split("\n\n"):
        key = one_spaced(paragraph)
        # Short ones repeat by chance, and mean little without their neighbours.
        if len(key) < 60:
            kept.append(paragraph)
        elif key not in seen:
            seen.add(key)
            kept.append(paragraph)
    return "\n\n".join(kept).strip() + "\n"


def one_spaced(text: str) -> str:
    """A text with one space wherever it has any: two that differ in nothing else are the same."""
    return " ".join(text.split())


def python_files() -> list[tuple[int, Path]]:
    """(key, path) of the files of PACKAGES, sorted by key, a hash of the name: any beginning of
    the list is a mixture of all."""
    found = []
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)  # finds, and does not import
        if spec is None:
            raise UserError(f"The embedded corpus needs the package {name}, which is not installed:"
                            " pip install -r requirements.txt.")
        root = Path(spec.submodule_search_locations[0])
        for folder, folders, files in os.walk(root):
            # os.walk goes into the folders that are left in this list.
            folders[:] = [f for f in folders if f not in SKIP_FOLDERS]
            for file in files:
                if file.endswith(".py") and not SKIP_FILES.match(file):
                    path = Path(folder, file)
                    full = f"{name}/{path.relative_to(root).as_posix()}"
                    found.append((zlib.crc32(full.encode()), full, path))
    return [(key, path) for key, _, path in sorted(found)]


def describe(files: dict[str, list[str]]) -> str:
    """Whether the text in `files` is the reference, and if not, why."""
    text = hashlib.sha256()
    for [path] in files.values():
        text.update(Path(path).read_bytes())
    if text.hexdigest() == REFERENCE:
        return f"The embedded text is the reference (sha256 {REFERENCE[:16]})."
    pinned = Path(__file__).with_name("requirements.txt").read_text(encoding="utf-8").split()
    others = [package for package in versions() if package not in pinned]
    because = f"{', '.join(others)} is installed" if others else "a file of theirs was changed"
    return (f"The embedded text is not the reference: {because}, and the reference is of the"
            " versions in requirements.txt. Losses compare only with those on the same text.")


def versions() -> list[str]:
    """The versions of PACKAGES that are installed, as requirements.txt has them."""
    found = []
    for name in PACKAGES:
        version = importlib.metadata.version(name).partition("+")[0]  # 2.13.0+cpu is 2.13.0
        found.append(f"{name}=={version}")
    return found


def main(argv: list[str]) -> None:
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError("Name one folder to write the embedded corpus into: python corpus.py text")
    files = write_embedded_corpus(Path(argv[0]))
    for source, [path] in files.items():
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        print(f"{source}: {len(lines)} documents, {os.path.getsize(path):,} bytes in {path}")
    print(describe(files))


if __name__ == "__main__":
    run_command(main)
