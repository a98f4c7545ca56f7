"""What ``reprise collect`` brings home: results, figures, the executed notebook as it is committed, filled-in pages."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from click.testing import CliRunner

from reprise.lab import exhibits, notebooks
from reprise.lab.checkout import Checkout
from reprise.lab.cli import main
from reprise.lab.errors import BadInput
from reprise.lab.pages import regenerated, write_pages

README = """# The page

One value: <!-- tiny.quick.wins -->–<!-- /tiny.quick.wins -->, one without:
<!-- tiny.quick.learns.no-steps -->–<!-- /tiny.quick.learns.no-steps -->, one to come:
<!-- tiny.full.wins -->stale<!-- /tiny.full.wins -->.

<!-- papers -->
stale
<!-- /papers -->

The author's own words stay.
"""
PAGE = "# Tiny\n\n<!-- results -->\n<!-- /results -->\n\nThe end.\n"
INDEX = "<!-- index -->\n<!-- /index -->\n"
GUIDE = "from reprise.lab import course\n\ncourse()"


@pytest.fixture
def collected(after_run, monkeypatch) -> Path:
    monkeypatch.chdir(after_run)
    (after_run / "README.md").write_text(README, encoding="utf-8")
    (after_run / "papers" / "README.md").write_text(INDEX, encoding="utf-8")
    (after_run / "papers" / "tiny" / "README.md").write_text(PAGE, encoding="utf-8")
    told = CliRunner().invoke(main, ["collect", "runs"])
    assert told.exit_code == 0, told.output
    return after_run


def content(checkout: Path) -> dict[Path, bytes]:
    """Every file that collect may write."""
    return {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file() and "runs" not in path.parts}


def test_results_and_figures_come_as_they_are(collected):
    (run,) = (collected / "runs" / "quick").glob("tiny-*")
    paper = collected / "papers" / "tiny"
    assert (paper / "results" / "quick.json").read_bytes() == (run / "result.json").read_bytes()
    for name in ("loss.png", "loss.json"):
        assert (paper / "figures" / "quick" / name).read_bytes() == (run / "figures" / name).read_bytes()


def test_prints_in_pieces_are_joined():
    pieces = [("stdout", "a"), ("stdout", "b"), ("stderr", "c"), ("stdout", "d")]
    outputs = [nbformat.v4.new_output("stream", name=name, text=text) for name, text in pieces]
    outputs.insert(1, nbformat.v4.new_output("display_data", {"text/plain": "x"}))
    outputs.insert(1, nbformat.v4.new_output("stream", name="stdout", text="!"))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=outputs)])
    (cell,) = notebooks.normalise(notebook).cells
    assert [output.get("text") for output in cell.outputs] == ["a!", None, "b", "c", "d"]


def test_a_folded_solution_stays_folded():
    metadata = {"tags": ["keep"], "jupyter": {"source_hidden": True, "outputs_hidden": True}, "other": 1}
    cells = [nbformat.v4.new_code_cell("1", metadata=metadata), nbformat.v4.new_code_cell("2")]
    first, second = notebooks.normalise(nbformat.v4.new_notebook(cells=cells)).cells
    assert first.metadata == {"tags": ["keep"], "jupyter": {"source_hidden": True}}
    assert second.metadata == {}


def test_the_notebook_is_normalised(collected, repository):
    path = collected / "notebooks" / "tiny.ipynb"
    text, notebook = path.read_text(encoding="utf-8"), nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    fixture = nbformat.read(repository / "tests" / "fixtures" / "tiny" / "notebooks" / "tiny.ipynb", as_version=4)
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in fixture.cells]
    assert [cell.id for cell in notebook.cells] == [cell.id for cell in fixture.cells]
    assert notebook.metadata.reprise.code_sha256 == notebooks.edit_hash(fixture)
    assert notebook.metadata.reprise.parameters == {"scale": "quick", "seed": 0, "device": "auto", "steps": None}
    assert set(notebook.metadata) == {"kernelspec", "language_info", "reprise"}
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    assert "papermill" not in text
    assert "injected-parameters" not in text
    assert not re.search(r"\d\d:\d\d:\d\d", text), "a time of day"
    assert str(collected) not in text
    assert str(Path.home()) not in text
    pictures = [output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})]
    assert [output.metadata["image/png"]["alt"][:14] for output in pictures] == ["The loss falls"]


def test_collecting_twice_changes_nothing(collected):
    before = content(collected)
    told = CliRunner().invoke(main, ["collect", "runs"])
    assert told.exit_code == 0, told.output
    assert "written" not in told.stdout
    assert content(collected) == before


def test_a_collected_notebook_finds_its_finished_run(collected):
    told = CliRunner().invoke(main, ["run", "tiny"])
    assert told.exit_code == 0, told.output
    assert "finished earlier" in told.stderr


def test_markers_are_filled_and_the_rest_is_left_alone(collected):
    result = json.loads((collected / "papers" / "tiny" / "results" / "quick.json").read_text(encoding="utf-8"))
    readme = (collected / "README.md").read_text(encoding="utf-8")
    accuracy = f"{result['measurements']['wins']['value']:.3g}"
    unlearned = f"{result['without']['no-steps']['learns']['value']:.3g}"
    assert f"One value: <!-- tiny.quick.wins -->{accuracy}<!-- /tiny.quick.wins -->" in readme
    assert f"<!-- tiny.quick.learns.no-steps -->{unlearned}<!-- " in readme
    assert "<!-- tiny.full.wins -->not measured yet<!-- " in readme
    assert "| [A Tiny Paper](notebooks/tiny.ipynb) (2000) | [2 of 3 hold](papers/tiny/README.md) | not mea" in readme
    assert "<!-- papers -->\n| paper |" in readme, "a table needs lines of its own"
    assert "stale" not in readme
    assert readme.endswith("\n\nThe author's own words stay.\n")
    page = (collected / "papers" / "tiny" / "README.md").read_text(encoding="utf-8")
    assert f"| {accuracy} | at least 0.999 | **does not hold here**: some digits cannot be told apart" in page
    assert "| the learning rate | learns | " in page
    assert "- It works on everything. (Table 2): there is too much of it" in page
    assert page.endswith("\n\nThe end.\n")
    index = (collected / "papers" / "README.md").read_text(encoding="utf-8")
    assert "| 2 | A Planned Paper, Nobody ([source](https://example.org)) | 2001 | planned |" in index


def another_seed(checkout: Path, seed: int, **measured: float) -> None:
    """A finished run with another seed, made from the one there is."""
    (run,) = (checkout / "runs" / "quick").glob("tiny-????????????")
    copy = Path(shutil.copytree(run, run.with_name(f"tiny-seed{seed}")))
    result = json.loads((copy / "result.json").read_text(encoding="utf-8"))
    result["provenance"]["seed"] = seed
    for id, value in measured.items():
        result["measurements"][id] = {"value": value}
    (copy / "result.json").write_text(json.dumps(result), encoding="utf-8")


def test_seeds_stand_side_by_side(collected):
    another_seed(collected, 100, wins=0.9995, learns=0.25)
    another_seed(collected, 7, wins=0.5, learns=0.125)
    for _ in range(2):  # what was collected before stays, and is not doubled
        told = CliRunner().invoke(main, ["collect", "runs"])
        assert told.exit_code == 0, told.output
        assert "tiny quick: seed 100 from tiny-seed100\n" in told.stdout
        shutil.rmtree(collected / "runs" / "quick" / "tiny-seed7", ignore_errors=True)
    spread = json.loads((collected / "papers" / "tiny" / "spread.json").read_text(encoding="utf-8"))
    assert list(spread["quick"]) == ["7", "100"]
    assert spread["quick"]["100"]["measurements"]["learns"] == {"value": 0.25}
    result = json.loads((collected / "papers" / "tiny" / "results" / "quick.json").read_text(encoding="utf-8"))
    page = (collected / "papers" / "tiny" / "README.md").read_text(encoding="utf-8")
    learns, wins = (f"{result['measurements'][id]['value']:.3g}" for id in ("learns", "wins"))
    assert "| the same with seed | 0 | 7 | 100 |\n|---|---|---|---|\n" in page
    assert f"| learns | {learns} | 0.125 | 0.25 |" in page
    assert f"| wins | {wins} | 0.5 | **1** |" in page, "it holds with this seed, and not with the published one"
    assert "| sums | 0" not in page, "identities do not depend on the seed"


def test_the_page_says_on_what_it_was_measured(collected):
    result = json.loads((collected / "papers" / "tiny" / "results" / "quick.json").read_text(encoding="utf-8"))
    page = (collected / "papers" / "tiny" / "README.md").read_text(encoding="utf-8")
    (line,) = [line for line in page.splitlines() if line.startswith("Seed 0, commit `unknown`, finished ")]
    facts = result["provenance"]
    assert facts["processor"]
    assert f"finished {facts['finished'][:10]}. CPU, {facts['processor']}, {facts['system']}, 1 thread; " in line
    assert (
        f" s, at most {facts['peak_memory_mb']:,} MB. Python {facts['python']}, torch {facts['packages']['torch']}"
        in line
    )
    for name in ("digits/train", "digits/test"):
        assert f"{name} `{facts['data'][name][:8]}`" in line
    assert line.endswith("; all of it is in `results/quick.json`.")


def test_a_number_that_differs_from_the_record_is_found(collected):
    page = collected / "papers" / "tiny" / "README.md"
    text = page.read_text(encoding="utf-8")
    assert regenerated(Checkout(collected), page) == text
    result = json.loads((collected / "papers" / "tiny" / "results" / "quick.json").read_text(encoding="utf-8"))
    wins = f"{result['measurements']['wins']['value']:.3g}"
    page.write_text(text.replace(f"| {wins} |", "| 0.999 |"), encoding="utf-8")
    assert regenerated(Checkout(collected), page) == text


def test_figures_of_full_runs_are_shown_with_their_origin(collected, monkeypatch):
    shown = []
    monkeypatch.setattr(exhibits, "display", shown.append)
    exhibits.published("tiny", "loss")
    assert [one.data for one in shown] == ["*Full scale: not measured yet.*"]
    exhibits.published("tiny", "loss", or_quick=True)
    assert shown[2].data.startswith("*Quick scale (full scale: not measured yet): digits, on one CPU, ")
    shown = shown[:1]
    monkeypatch.setattr(exhibits, "display", shown.append)
    paper = collected / "papers" / "tiny"
    shutil.copytree(paper / "figures" / "quick", paper / "figures" / "full")
    shutil.copy(paper / "results" / "quick.json", paper / "results" / "full.json")
    date = json.loads((paper / "results" / "full.json").read_text(encoding="utf-8"))["provenance"]["finished"][:10]
    exhibits.published("tiny", "loss")
    picture, caption = shown[1:]
    assert picture.data == (paper / "figures" / "full" / "loss.png").read_bytes()
    assert picture.alt.startswith("The loss falls")
    assert caption.data == f"*Full scale: digits, on one CPU, {date}.*"


@pytest.mark.parametrize("marker", ["contents", "tiny.quick", "tiny.quick.winns", "tiny.ful.wins", "tinny.quick.wins"])
def test_a_marker_that_means_nothing_is_named(collected, marker):
    page = collected / "README.md"
    page.write_text(f"<!-- {marker} -->x<!-- /{marker} -->", encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        regenerated(Checkout(collected), page)
    assert marker.split(".")[0] in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_claim_added_after_the_record_is_not_measured_yet(collected):
    claims = collected / "papers" / "tiny" / "claims.yaml"
    entry = "  - {id: new, kind: exact, where: here, claim: A new one., records: x, quick: *exact, full: *exact}\n"
    claims.write_text(claims.read_text(encoding="utf-8").replace("without:\n", entry + "without:\n"), encoding="utf-8")
    write_pages(Checkout(collected))
    page = (collected / "papers" / "tiny" / "README.md").read_text(encoding="utf-8")
    assert re.search(r"\| A new one. \| here \|  \| – \| at most 1e-12 \| \*\*not measured yet\*\* \|", page)
    assert "2 of 4 hold" in (collected / "README.md").read_text(encoding="utf-8")
    told = CliRunner().invoke(main, ["run", "tiny"])
    assert told.exit_code == 2
    assert "claims.yaml asks for new, which " in told.stderr


def test_an_edited_notebook_is_not_overwritten(after_run, monkeypatch):
    monkeypatch.chdir(after_run)
    path = after_run / "notebooks" / "tiny.ipynb"
    edited = path.read_text(encoding="utf-8").replace("The loss falls", "The loss drops")
    path.write_text(edited, encoding="utf-8")
    told = CliRunner().invoke(main, ["collect", "runs"])
    assert told.exit_code == 2
    assert re.fullmatch(r"reprise: tiny-\w+: refused, the notebook was edited since\n", told.stderr)
    assert path.read_text(encoding="utf-8") == edited
    assert not (after_run / "papers" / "tiny" / "results").exists()


def test_a_notebook_without_figures_and_a_guide(after_run, monkeypatch):
    monkeypatch.chdir(after_run)
    (run,) = (after_run / "runs" / "quick").glob("tiny-*")
    for path in (run / "figures").iterdir():
        path.unlink()
    (run / "figures").rmdir()
    cell = nbformat.v4.new_code_cell(GUIDE, id="guide")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), after_run / "notebooks" / "guide.ipynb")
    told = CliRunner().invoke(main, ["collect", "runs"])
    assert told.exit_code == 0, told.output
    assert not (after_run / "papers" / "tiny" / "figures").exists()
    guide = nbformat.read(after_run / "notebooks" / "guide.ipynb", as_version=4)
    assert "2 of 3 hold" in guide.cells[0].outputs[0].data["text/markdown"]
    assert guide.metadata.reprise.code_sha256 == notebooks.edit_hash(guide)
    assert guide.cells[0].execution_count == 1
