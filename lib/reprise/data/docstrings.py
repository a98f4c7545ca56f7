"""Documentation that ships inside Python packages, as bags of words: which package is a text from?"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .bundled import choose
from .files import DataError

PACKAGES = ("numpy", "sklearn", "matplotlib", "skimage")
VOCABULARY = 5000
_EACH = 700  # documents of each package
_SHORTEST = 25  # words
# They would give the answer away.
_NAMES = {"numpy", "np", "sklearn", "scikit", "learn", "matplotlib", "mpl", "plt", "pyplot", "skimage"}


class Documents(NamedTuple):
    """``words`` (N, 5000) uint8, 1 where the document has the word; ``labels`` (N,), an index into PACKAGES."""

    words: Tensor
    labels: Tensor


def docstrings(split: str) -> Documents:
    """Docstrings of four packages, 5,000 words, 4 classes; splits train 2,000, valid 300, test 500.

    The packages are those installed here: another version of one has other documents, and the checksum in a run's
    record tells. The vocabulary is what occurs in most documents, the packages' own names left out.

    Raises:
        DataError: if an installed package has too few documents.
    """
    words, labels = _bags()
    chosen = choose(split, {"train": 2000, "valid": 300, "test": 500})
    return Documents(words[chosen], labels[chosen])


@cache
def _bags() -> Documents:
    documents = [_sample(package) for package in PACKAGES]
    bags = [set(re.findall("[a-z]{2,}", text.lower())) - _NAMES for texts in documents for text in texts]
    frequency = Counter(word for bag in bags for word in bag)
    # Words that are equally frequent stand in the order of the alphabet: sets have none of their own.
    ranked = sorted(frequency, key=lambda word: (-frequency[word], word))[:VOCABULARY]
    if len(ranked) < VOCABULARY:
        raise DataError(f"docstrings has only {len(ranked)} different words, {VOCABULARY} are needed")
    column = {word: place for place, word in enumerate(ranked)}
    words = torch.zeros(len(bags), VOCABULARY, dtype=torch.uint8)
    for row, bag in enumerate(bags):
        words[row, [column[word] for word in bag if word in column]] = 1
    return Documents(words, torch.arange(len(PACKAGES)).repeat_interleave(_EACH))


def _sample(package: str) -> list[str]:
    """A fixed random choice of a package's documents, none of them twice."""
    spec = importlib.util.find_spec(package)  # found, not imported: matplotlib takes a second to load
    if spec is None or spec.origin is None:
        raise DataError(f"docstrings needs the package {package}, which is not installed")
    found = list(dict.fromkeys(_documents(Path(spec.origin).parent)))
    if len(found) < _EACH:
        raise DataError(f"{package} has {len(found)} docstrings of {_SHORTEST} words here, {_EACH} are needed")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:_EACH]
    return [found[place] for place in order]


def _documents(folder: Path) -> Iterator[str]:
    """Every docstring of some length below a folder, the packages' own tests left out."""
    for path in sorted(folder.rglob("*.py")):
        if "tests" not in path.parts:
            for text in _texts(ast.parse(path.read_bytes())):
                if len(text.split()) >= _SHORTEST:
                    yield text


def _texts(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """The docstrings of a module or class, and of the classes and functions in it."""
    yield ast.get_docstring(node) or ""
    if isinstance(node, ast.Module | ast.ClassDef):
        for inner in node.body:
            if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _texts(inner)
