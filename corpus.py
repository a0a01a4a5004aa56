"""The embedded corpus: text that every installation of this repository carries.

    python corpus.py text      # writes it into a folder, one .jsonl file per source, to look at

prepare_data.py takes it where a config names no `sources`. It is the code and the English of
Python and of the packages in requirements.txt: nothing is downloaded. Its bytes depend on their
versions, so that losses on it compare only between equal data sets.
"""

import contextlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from configs import UserError, run_command
from data import writing

# Bytes taken of each source: 30 % code (Amber has 23 %), the rest English. The order decides the
# numbers that their sequences carry.
CORPUS = {
    "code": 3_800_000,
    "examples": 2_900_000,  # docstrings that show a session, >>>
    "docstrings": 3_300_000,  # all other docstrings
    "formulas": 1_200_000,  # docstrings with mathematics
    "readmes": 350_000,  # READMEs and licences of packages
    "reference": 450_000,  # Python's language reference
    "long_docstrings": 350_000,  # those of more than 3000 letters
}
# Of these there is less than is wanted, and of the others more.
SCARCE = ("readmes", "reference")
# Only what requirements.txt always brings: whatever else is installed must not change the data.
PACKAGES = """numpy torch sympy networkx mpmath jinja2 markupsafe fsspec filelock tqdm tiktoken
    regex requests urllib3 idna certifi charset-normalizer typing_extensions""".split()
# Some distributions lack the tests and IDLE; the rest is tables, or other people's packages.
SKIP_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings",
                "lib2to3", "pydoc_data", "_vendor", "__pycache__"}
# These, and the folders config-*, say where and how this very copy was built.
SKIP_FILES = re.compile("_sysconfig|__config__|version")
# Text in triple quotes: the first statement of a body, or what PyTorch adds to its C functions.
DOCSTRING = re.compile(r':\n\s+[rR]?"""(.+?)"""|add_docstr\([^"]{,200}?[rR]?"""(.+?)"""', re.S)
GENERATED = re.compile(r"generated (by|from|with|automatically)|auto-?generated|do not edit", re.I)


def write_embedded_corpus(directory: Path) -> dict[str, list[str]]:
    """Write directory/SOURCE.jsonl of every source that there is text of; returns their paths."""
    documents: dict[str, list[str]] = {name: [] for name in CORPUS}
    size: Counter[str] = Counter()
    seen: set[str] = set()
    for source, text in embedded_texts():
        # To read on for a little more of the scarce ones would take a minute.
        if all(size[name] >= CORPUS[name] for name in CORPUS if name not in SCARCE):
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
        if texts:
            path = directory / f"{source}.jsonl"
            with writing(path) as f:
                f.writelines(json.dumps({"text": text}).encode() + b"\n" for text in texts)
            files[source] = [str(path)]
    return files


def embedded_texts() -> Iterator[tuple[str, str]]:
    """(source, text), in an order that depends on the versions of Python and packages alone."""
    for text in package_texts():
        yield "readmes", text
    # The pages that help() shows; some distributions leave them out.
    with contextlib.suppress(ImportError):
        from pydoc_data.topics import topics
        for _, text in sorted(topics.items()):
            yield "reference", text
    # A mixture of all packages, in an order that looks random and is the same everywhere.
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
    if ">>>" in text:
        return "examples"
    return "long_docstrings" if len(text) > 3000 else "docstrings"


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


def package_texts() -> Iterator[str]:
    """The READMEs and licences of PACKAGES."""
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            for file in sorted(importlib.metadata.distribution(name).files or [], key=str):
                if ".dist-info/" in str(file) and re.match("METADATA|LICEN|COPYING", file.name):
                    # METADATA is a header of names and versions, and the README as its body.
                    text = file.read_text(encoding="utf-8")
                    yield text.partition("\n\n")[2] if file.name == "METADATA" else text


def python_files() -> list[tuple[int, Path]]:
    """(key, path) of the files of the standard library and of PACKAGES, sorted by key, a hash of
    the name: any beginning of the list is a mixture of all."""
    roots = {"python": Path(sysconfig.get_path("stdlib"))}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name.replace("-", "_"))  # finds, and does not import
        if spec and spec.submodule_search_locations:
            roots[name] = Path(spec.submodule_search_locations[0])
    found = []
    for name, root in roots.items():
        for folder, folders, files in os.walk(root):
            # os.walk goes into the folders that are left in this list.
            folders[:] = [f for f in folders
                          if f not in SKIP_FOLDERS and not f.startswith("config-")]
            for file in files:
                if file.endswith(".py") and not SKIP_FILES.match(file):
                    path = Path(folder, file)
                    full = f"{name}/{path.relative_to(root).as_posix()}"
                    found.append((zlib.crc32(full.encode()), full, path))
    return [(key, path) for key, _, path in sorted(found)]


def versions() -> dict[str, str]:
    """Of Python and the packages: they decide the bytes of this text."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def main(argv: list[str]) -> None:
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError("Name one folder to write the embedded corpus into: python corpus.py text")
    for source, [path] in write_embedded_corpus(Path(argv[0])).items():
        lines = Path(path).read_text().splitlines()
        print(f"{source}: {len(lines)} documents, {os.path.getsize(path):,} bytes in {path}")


if __name__ == "__main__":
    run_command(main)
