"""What makes a run another run: code, parameters, device, and the library modules it imports; not words about them."""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
import pytest

from reprise.lab import notebooks, runner
from reprise.lab.checkout import Checkout

CELLS = ["from reprise.training import train", "x = 1  # one\nprint(x)"]


def notebook(*sources: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])


def run_hash(*sources: str, changed: dict | None = None, device: str = "cpu", library: Path | None = None) -> str:
    return notebooks.run_hash(notebook(*sources), changed or {}, device, library or Checkout.find().library)


def test_words_do_not_count():
    said = notebook(CELLS[0], '"""What x is."""\nx = 1\n\n\nprint( x )')
    said.cells.insert(0, nbformat.v4.new_markdown_cell("Read this."))
    assert notebooks.run_hash(said, {}, "cpu", Checkout.find().library) == run_hash(*CELLS)


OTHERS = {
    "code": {"sources": [CELLS[0], "x = 2\nprint(x)"]},
    "order": {"sources": CELLS[::-1]},
    "parameter": {"sources": CELLS, "changed": {"seed": 1}},
    "device": {"sources": CELLS, "device": "cuda:0"},
    "import": {"sources": [CELLS[0], CELLS[1] + "\nimport reprise.nn"]},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_what_counts(other):
    sources = other.pop("sources")
    assert run_hash(*sources, **other) != run_hash(*CELLS)


@pytest.fixture
def library(tmp_path) -> Path:
    """A copy of the library, to be changed."""
    shutil.copytree(Checkout.find().library / "reprise", tmp_path / "lib" / "reprise")
    return tmp_path / "lib"


CHANGES = {  # file, what is added, whether a notebook that imports `training` is another one then
    "imported": ("training.py", "\nanything = 1\n", True),
    "imported by it": ("progress.py", "\nanything = 1\n", True),
    "a comment": ("training.py", "\n# anything\n", False),
    "not imported": ("nn.py", "\nanything = 1\n", False),
    "laboratory": ("lab/tables.py", "\nanything = 1\n", False),
}


@pytest.mark.parametrize(("file", "added", "counts"), CHANGES.values(), ids=CHANGES)
def test_the_library_counts_as_far_as_it_is_imported(library, file, added, counts):
    before = run_hash(*CELLS, library=library)
    assert before == run_hash(*CELLS), "the same library in another place"
    path = library / "reprise" / file
    path.write_text(path.read_text(encoding="utf-8") + added, encoding="utf-8")
    assert (run_hash(*CELLS, library=library) != before) == counts


def test_the_library_is_that_of_the_checkout(tiny, library):
    (installed,) = runner.plan(Checkout(tiny), ["tiny"], "quick", (), tiny / "runs")
    shutil.move(library, tiny / "lib")
    (own,) = runner.plan(Checkout(tiny), ["tiny"], "quick", (), tiny / "runs")
    assert (own.folder, own.library) == (installed.folder, installed.library)
    with (tiny / "lib" / "reprise" / "training.py").open("a", encoding="utf-8") as file:
        file.write("\nanything = 1\n")
    (changed,) = runner.plan(Checkout(tiny), ["tiny"], "quick", (), tiny / "runs")
    assert changed.folder != own.folder
    assert changed.library != own.library
