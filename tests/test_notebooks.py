"""The committed notebooks and pages are whole, and what keeps them so does notice when they are not."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import checks
import nbformat
import pytest
from click.testing import CliRunner

from reprise.lab.checkout import Checkout
from reprise.lab.claims import NOT_MEASURED
from reprise.lab.cli import main
from reprise.lab.notebooks import code_cells
from reprise.lab.pages import pages, regenerated
from reprise.lab.report import claim_objects, outcome_on_record
from reprise.lab.tables import verdicts_text

CHECKOUT = Checkout(Path(__file__).resolve().parents[1])
NOTEBOOKS = {path.stem: path for path in sorted((CHECKOUT.root / "notebooks").glob("*.ipynb"))}


# Every notebook with every check for its kind: the notebook of a paper, or a guide.
APPLICABLE = [
    pytest.param(name, check, id=f"{name}-{getattr(check, 'func', check).__name__}")
    for name in NOTEBOOKS
    for check in checks.EVERYWHERE
    + (checks.IN_PAPERS if name in CHECKOUT.index else [partial(checks.checked_cells_say_something, least=1)])
]


@pytest.mark.parametrize(("name", "check"), APPLICABLE)
def test_committed_notebook(name, check):
    assert check(nbformat.read(NOTEBOOKS[name], as_version=4)) == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_notebook_is_valid_and_no_larger_than_allowed(name):
    nbformat.validate(nbformat.read(NOTEBOOKS[name], as_version=4))
    assert NOTEBOOKS[name].stat().st_size < 1_500_000


@pytest.mark.parametrize("name", CHECKOUT.names())
def test_every_claim_of_the_quick_scale_is_on_record(name):
    outcome = outcome_on_record(CHECKOUT, name, "quick")
    assert outcome is not None, "no results/quick.json: make publish"
    assert outcome.judged
    assert outcome.missing() == []
    assert outcome.surprises() == []
    for one in claim_objects(CHECKOUT, name):
        assert one["quick"]["verdict"] != NOT_MEASURED


@pytest.mark.parametrize("name", CHECKOUT.names())
def test_verdicts_in_the_notebook_are_those_on_record(name):
    last = code_cells(nbformat.read(NOTEBOOKS[name], as_version=4))[-1]
    assert checks.text_of(last).strip() == verdicts_text(outcome_on_record(CHECKOUT, name, "quick")).strip()


@pytest.mark.parametrize("name", CHECKOUT.names())
def test_a_paper_has_its_page_and_figures(name):
    page = (CHECKOUT.paper(name) / "README.md").read_text(encoding="utf-8")
    assert "<!-- results -->" in page
    assert (CHECKOUT.paper(name) / "claims.yaml").is_file()
    assert list((CHECKOUT.paper(name) / "figures" / "quick").glob("*.png"))


@pytest.mark.parametrize("name", CHECKOUT.names())
def test_a_paper_has_more_prose_than_code(name):
    cells = nbformat.read(NOTEBOOKS[name], as_version=4).cells
    words = sum(len(cell.source.split()) for cell in cells if cell.cell_type == "markdown")
    assert words >= 5 * sum(len(cell.source.splitlines()) for cell in cells if cell.cell_type == "code")


@pytest.mark.parametrize("page", pages(CHECKOUT), ids=lambda page: str(page.relative_to(CHECKOUT.root)))
def test_pages_are_as_collect_writes_them(page):
    assert page.read_text(encoding="utf-8") == regenerated(CHECKOUT, page)


@pytest.fixture(scope="module")
def collected(finished, tmp_path_factory) -> Path:
    """The fixture's notebook as it would be committed; a copy of its checkout, so that its run is left alone."""
    checkout = Path(shutil.copytree(finished.checkout, tmp_path_factory.mktemp("collected") / "tiny"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(checkout)
        assert CliRunner().invoke(main, ["collect", "runs"]).exit_code == 0
    return checkout


@pytest.fixture
def good(collected) -> nbformat.NotebookNode:
    return nbformat.read(collected / "notebooks" / "tiny.ipynb", as_version=4)


@pytest.mark.parametrize("check", checks.EVERYWHERE + checks.IN_PAPERS, ids=lambda check: check.__name__)
def test_a_good_notebook_passes_every_check(good, check):
    assert check(good) == []


def strip(notebook):
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None


def strip_outputs_only(notebook):
    for cell in code_cells(notebook):
        cell.outputs = []


def untag(notebook):
    for cell in code_cells(notebook):
        cell.metadata.pop("tags", None)


def add_output(notebook, output_type, **content):
    code_cells(notebook)[2].outputs.append(nbformat.v4.new_output(output_type, **content))


def shuffle(notebook):
    first, second = code_cells(notebook)[:2]
    first.execution_count, second.execution_count = second.execution_count, first.execution_count


def edit(notebook, old, new):
    (cell,) = [cell for cell in code_cells(notebook) if old in cell.source]
    cell.source = cell.source.replace(old, new, 1)


def forget_alt(notebook):
    for _, output in checks.outputs(notebook):
        output.get("metadata", {}).pop("image/png", None)


def publish_stripped(notebook):
    strip(notebook)
    for count, cell in enumerate(code_cells(notebook), 1):
        cell.execution_count = count


SPOILT = [
    (checks.all_run_in_order, strip),
    (checks.all_run_in_order, shuffle),
    (checks.checked_cells_say_something, strip_outputs_only),
    (checks.checked_cells_say_something, publish_stripped),
    (checks.checked_cells_say_something, untag),
    (checks.ends_with_checked_verdicts, untag),
    (checks.ends_with_checked_verdicts, strip_outputs_only),
    (checks.ends_with_checked_verdicts, lambda notebook: notebook.cells.pop()),
    (checks.not_edited_since_its_run, partial(edit, old="0.5)", new="0.4)")),
    (checks.not_edited_since_its_run, lambda notebook: notebook.cells.pop()),
    (checks.not_edited_since_its_run, lambda notebook: notebook.metadata.pop("reprise")),
    (checks.nothing_went_wrong, partial(add_output, output_type="stream", name="stderr", text="UserWarning: look")),
    (checks.nothing_went_wrong, partial(add_output, output_type="error", ename="E", evalue="", traceback=[])),
    (checks.records_something, lambda notebook: edit_all(notebook, ".record(", ".note(")),
    (checks.of_bearable_size, partial(add_output, output_type="stream", name="stdout", text="x" * 200_001)),
    (checks.of_bearable_size, lambda notebook: [add_output(notebook, "stream", text="x" * 160_000) for _ in range(10)]),
    (checks.of_bearable_length, partial(edit, old="sums = ", new="\n" * 30 + "sums = ")),
    (checks.of_bearable_length, lambda notebook: notebook.cells.extend(copy.deepcopy(notebook.cells[:1] * 50))),
    (checks.names_no_machine, partial(add_output, output_type="stream", text="saved to /root/x.png")),
    (checks.names_no_machine, partial(add_output, output_type="stream", text="saved to C:\\Users\\me")),
    (checks.names_no_machine, partial(edit, old='"digits", "train"', new='"/home/me/digits", "train"')),
    (checks.names_no_machine, partial(add_output, output_type="display_data", data={"text/html": "<a href='/tmp/x'>"})),
    (checks.pictures_have_a_text, forget_alt),
    (checks.pictures_have_a_text, partial(add_output, output_type="display_data", data={"image/png": "iVBO"})),
]


def edit_all(notebook, old, new):
    for cell in code_cells(notebook):
        cell.source = cell.source.replace(old, new)


@pytest.mark.parametrize(("check", "spoil"), SPOILT, ids=[check.__name__ for check, _ in SPOILT])
def test_a_spoilt_notebook_fails_its_check(good, check, spoil):
    spoil(good)
    assert check(good) != []


def test_nbval_notices_one_changed_number(collected, environment, good, tmp_path):
    """Both copies in one run of nbval: as committed it passes, with one other digit in a checked output it fails."""
    checked = [cell for cell in code_cells(good) if "(1000, 1, 8, 8)" in checks.text_of(cell)]
    assert len(checked) == 1
    checked[0].outputs[0].text = checked[0].outputs[0].text.replace("1000", "1001")
    nbformat.write(good, collected / "notebooks" / "changed.ipynb")
    options = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=120", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *options, f"--junitxml={tmp_path / 'told.xml'}", "notebooks"]
    told = subprocess.run(command, cwd=collected, env=environment, capture_output=True, text=True, timeout=300)
    assert told.returncode == 1, told.stdout + told.stderr
    cases = ElementTree.parse(tmp_path / "told.xml").getroot().iter("testcase")
    failed = [case.get("classname") + case.get("name") for case in cases if case.find("failure") is not None]
    assert len(failed) == 1
    assert "changed" in failed[0]
    assert "1001" in told.stdout
