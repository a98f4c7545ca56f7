"""The command line on the fixture checkout: bad uses, a good run, and verdicts that differ from the record."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from click.testing import CliRunner
from filelock import FileLock

from reprise.lab import runner
from reprise.lab.checkout import Checkout
from reprise.lab.cli import main

RUN = ("run", "tiny")
UNCHANGED = ("", "")
BAD_USES = {  # what is wrong: (arguments, change of claims.yaml, what the one line must say)
    "unknown paper": (("run", "tinny"), UNCHANGED, "no paper 'tinny'; did you mean tiny?"),
    "unlike any paper": (("run", "zzz"), UNCHANGED, "no paper 'zzz'; there are: tiny"),
    "planned paper": (("run", "later"), UNCHANGED, "later is planned, but not here yet"),
    "unknown scale": ((*RUN, "--scale", "ful"), UNCHANGED, "no scale 'ful'; there are quick and full"),
    "scale as parameter": ((*RUN, "-p", "scale", "full"), UNCHANGED, "give the scale with --scale, not -p"),
    "unknown parameter": ((*RUN, "-p", "stepps", "5"), UNCHANGED, "no parameter 'stepps'; there are: scale, seed"),
    "wrong type": ((*RUN, "-p", "seed", "lots"), UNCHANGED, "parameter seed: 'lots' is not a whole number"),
    "negative": ((*RUN, "-p", "seed", "-1"), UNCHANGED, "parameter seed: -1 is not a whole number of at least 0"),
    "unknown device": ((*RUN, "-p", "device", "tpu9"), UNCHANGED, "parameter device: device 'tpu9' cannot be used"),
    "absent device": ((*RUN, "-p", "device", "cuda:99"), UNCHANGED, "parameter device: device 'cuda:99' cannot be"),
    "no place": ((*RUN, "--out", "papers/index.yaml/runs"), UNCHANGED, "cannot write to papers"),
    "missing key": (RUN, ("    where: Table 1\n", ""), "tiny/claims.yaml: claim wins: missing key where"),
    "impossible range": (
        RUN,
        ("{at_least: 0.999,", "{between: [2, 1],"),
        "tiny/claims.yaml: claim wins: quick: imposs",
    ),
    "duplicate id": (RUN, ("id: wins", "id: learns"), "tiny/claims.yaml: claims: learns: duplicate id"),
    "unknown data": (RUN, ("quick: [digits]", "quick: [digist]"), "no dataset 'digist'; there are digits, letters"),
    "report of unknown": (("report", "tinny"), UNCHANGED, "no paper 'tinny'; did you mean tiny?"),
    "nothing to collect": (("collect", "runs"), UNCHANGED, "no finished run below runs"),
    "fetch of unknown": (("fetch", "digist"), UNCHANGED, "no dataset 'digist'; there are digits"),
}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(("arguments", "change", "said"), BAD_USES.values(), ids=BAD_USES)
def test_bad_use_is_one_line_and_nothing_is_run(tiny, monkeypatch, arguments, change, said):
    monkeypatch.chdir(tiny)
    edit(tiny / "papers" / "tiny" / "claims.yaml", *change)
    before = sorted(tiny.rglob("*"))
    told = CliRunner().invoke(main, arguments)
    assert isinstance(told.exception, SystemExit), told.exception
    assert (told.exit_code, told.stdout) == (2, "")
    assert told.stderr.startswith(f"reprise: {said}")
    assert len(told.stderr.splitlines()) == 1
    assert sorted(tiny.rglob("*")) == before


@pytest.mark.parametrize("content", ["[", "- {title: without a name}", "text"])
def test_a_broken_index_is_one_line(tiny, monkeypatch, content):
    monkeypatch.chdir(tiny)
    (tiny / "papers" / "index.yaml").write_text(content, encoding="utf-8")
    told = CliRunner().invoke(main, ["list"])
    assert told.exit_code == 2
    assert told.stderr.startswith("reprise: papers/index.yaml")
    assert len(told.stderr.splitlines()) == 1


def test_bad_use_in_a_process_of_its_own(tiny, reprise):
    told = reprise(tiny, "run", "tinny", "-p", "seed", "lots")
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr == "reprise: no paper 'tinny'; did you mean tiny?\n"


def result_of(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def judged_run(checkout: Path) -> Path:
    """The folder of the one run with the notebook's own parameters."""
    (folder,) = [path.parent for path in checkout.glob("runs/quick/*/result.json") if result_of(path.parent)["judged"]]
    return folder


def test_a_good_run_prints_its_table(finished):
    assert finished.status == 0, finished.stderr
    rows = {line.split("  ")[0]: line for line in finished.stdout.splitlines() if line.strip()}
    assert re.search(r"at most 1e-12 +holds$", rows["sums"])
    assert re.search(r"at least 0.999 +does not hold here$", rows["wins"])
    assert re.search(r"learns without no-steps +0\.9\d+ +breaks, as it should", finished.stdout)
    assert "✓ tiny: " in finished.stderr
    assert str(judged_run(finished.checkout)) in finished.stdout


def test_result_json_is_what_the_design_says(finished):
    result = result_of(judged_run(finished.checkout))
    assert (result["paper"], result["scale"], result["parameters"]) == ("tiny", "quick", {})
    assert set(result["measurements"]) == {"sums", "learns", "wins"}
    assert 0 < result["measurements"]["learns"]["value"] < 0.5
    assert result["without"]["no-steps"]["learns"]["value"] > 0.5
    assert result["verdicts"] == {"sums": "holds", "learns": "holds here", "wins": "does not hold here"}
    assert result["timings"] == {}
    facts = result["provenance"]
    assert (facts["seed"], facts["device"], facts["threads"]) == (0, "CPU", 1)
    assert facts["python"] == sys.version.split()[0]
    assert {"reprise", "torch", "numpy", "scikit-learn"} <= facts["packages"].keys()
    assert all(re.match(r"\d+\.\d+", version) for version in facts["packages"].values())
    assert facts["commit"] == "unknown", "the copy is not under version control"
    assert facts["wall_seconds"] > 1
    assert facts["peak_memory_mb"] > 100
    assert {name: len(checksum) for name, checksum in facts["data"].items()} == {"digits/train": 64, "digits/test": 64}


def test_the_folder_holds_notebook_figures_and_progress(finished):
    folder = judged_run(finished.checkout)
    cells = [cell for cell in nbformat.read(folder / "notebook.ipynb", 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sorted(path.name for path in (folder / "figures").iterdir()) == ["loss.json", "loss.png"]
    lines = [json.loads(line) for line in (folder / "progress.jsonl").read_text(encoding="utf-8").splitlines()]
    last = {line["training"]: line for line in lines}
    assert {name: (line["step"], line["steps"]) for name, line in last.items()} == {
        "with a rate": (300, 300),
        "without": (300, 300),
    }
    assert last["with a rate"]["loss"] < last["without"]["loss"]


def test_a_finished_run_is_not_repeated(after_run, reprise):
    folder = judged_run(after_run)
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
    told = reprise(after_run, "run", "all")
    assert told.returncode == 0
    assert "finished earlier" in told.stderr
    assert "does not hold here" in told.stdout
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before


def test_force_repeats_bit_for_bit(after_run, reprise):
    folder = judged_run(after_run)
    first = result_of(folder)
    (folder / "left.over").touch()
    assert reprise(after_run, "run", "tiny", "--force").returncode == 0
    second = result_of(folder)
    assert not (folder / "left.over").exists()
    for what in ("measurements", "without", "verdicts"):
        assert second[what] == first[what]
    assert second["provenance"]["data"] == first["provenance"]["data"]


DIFFERENT = {  # change of claims.yaml, what is said; the record is of claims, so no run need be repeated
    "expected to hold": ("{at_most: 0.5,", "{at_most: 0.01,", "learns does not hold here, but is on record as holding"),
    "expected to fail": ("{at_least: 0.999,", "{at_least: 0.9,", "wins holds here, but is on record as failing"),
    "expected to break": ("{at_most: 0.5,", "{at_most: 2,", "learns should break without the learning rate, but does"),
}


@pytest.mark.parametrize(("old", "new", "said"), DIFFERENT.values(), ids=DIFFERENT)
def test_status_1_where_the_record_is_wrong(after_run, monkeypatch, old, new, said):
    monkeypatch.chdir(after_run)
    edit(after_run / "papers" / "tiny" / "claims.yaml", old, new)
    told = CliRunner().invoke(main, RUN)
    assert told.exit_code == 1
    assert f"differs from the record: tiny: {said}" in told.stderr


def test_other_parameters_give_measurements_without_verdicts(after_run, reprise):
    told = reprise(after_run, "run", "tiny", "-p", "steps", "50")
    assert told.returncode == 0, told.stderr
    assert re.search(r"^learns +0\.\d+ +at most 0.5$", told.stdout, re.MULTILINE)
    assert "hold here" not in told.stdout
    (folder,) = {*(after_run / "runs" / "quick").iterdir()} - {judged_run(after_run)}
    result = result_of(folder)
    assert (result["parameters"], result["verdicts"], result["judged"]) == ({"steps": 50}, {}, False)
    # It is the newest run, but not one that is published.
    told = reprise(after_run, "collect", "runs")
    assert told.returncode == 0, told.stderr
    assert f"{folder.name}: refused, it was run with other parameters: steps 50\n" in told.stdout
    recorded = json.loads((after_run / "papers" / "tiny" / "results" / "quick.json").read_text(encoding="utf-8"))
    assert recorded == result_of(judged_run(after_run))


def test_a_folder_in_use_is_refused(after_run, monkeypatch):
    monkeypatch.chdir(after_run)
    folder = judged_run(after_run)
    with FileLock(folder / "lock"):
        told = CliRunner().invoke(main, [*RUN, "--force"])
    assert told.exit_code == 2
    assert told.stderr == f"reprise: tiny is already running in {folder}\n"
    assert (folder / "result.json").exists()


def test_a_result_that_is_not_json_is_named(after_run, monkeypatch):
    monkeypatch.chdir(after_run)
    (judged_run(after_run) / "result.json").write_text("{", encoding="utf-8")
    told = CliRunner().invoke(main, RUN)
    assert told.exit_code == 2
    assert told.stderr.startswith("reprise: result.json in tiny-")


def test_report_has_one_object_for_each_claim(after_run, monkeypatch):
    monkeypatch.chdir(after_run)
    assert CliRunner().invoke(main, ["collect", "runs"]).exit_code == 0
    objects = json.loads(CliRunner().invoke(main, ["report", "--json"]).stdout)
    claims = yaml.safe_load((after_run / "papers" / "tiny" / "claims.yaml").read_text(encoding="utf-8"))["claims"]
    assert [one["id"] for one in objects] == [claim["id"] for claim in claims]
    keys = {"paper", "id", "kind", "where", "claim", "paper_says", "quick", "full", "without"}
    assert all(set(one) == keys for one in objects)
    sums, learns, wins, costly = objects
    assert (sums["kind"], sums["paper_says"], sums["quick"]["verdict"]) == ("exact", "1", "holds")
    assert learns["full"] == {"value": None, "verdict": "not measured yet"}
    assert learns["without"]["no-steps"]["quick"]["breaks"] is True
    assert 0.9 < wins["quick"]["value"] < 0.999
    assert costly["quick"] == {"value": None, "verdict": "not attempted"}
    assert "does not hold here" in CliRunner().invoke(main, ["report", "tiny"]).stdout


def test_list_doctor_and_fetch(after_run, monkeypatch):
    monkeypatch.chdir(after_run)
    assert re.search(r"^tiny +2000 +A Tiny Paper +4 ", CliRunner().invoke(main, ["list"]).stdout, re.MULTILINE)
    told = CliRunner().invoke(main, ["doctor"]).stdout
    assert re.search(rf"^checkout +{re.escape(str(after_run))}$", told, re.MULTILINE)
    assert re.search(r"^data: digits +1,797 images, in scikit-learn$", told, re.MULTILINE)
    assert CliRunner().invoke(main, ["fetch", "digits"]).stdout == "digits: at hand\n"


def test_a_parameter_edited_in_lab_is_the_one_that_runs(after_run, monkeypatch):
    monkeypatch.chdir(after_run)
    assert CliRunner().invoke(main, ["collect", "runs"]).exit_code == 0
    edit(after_run / "notebooks" / "tiny.ipynb", "steps: int | None = None", "steps: int | None = 50")
    (job,) = runner.plan(Checkout.find(), ["tiny"], "quick", (), Path("runs"))
    assert job.parameters["steps"] == 50
    assert job.changed == {"steps": 50}


@pytest.mark.skipif(os.name == "nt", reason="drive letters")
def test_outside_of_a_checkout_the_installed_one_is_served(tmp_path, monkeypatch, repository):
    monkeypatch.chdir(tmp_path)
    assert Checkout.find().root == repository
