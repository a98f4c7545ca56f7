"""Notebooks that go wrong, each in its own way: the reader is told which, and what there was is kept."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import nbformat
import psutil
import pytest
import yaml

# What stands in the cell at fault, and what the closing line must say of it.
FAULTS = {
    "raises": ('raise ValueError("the first line\\nand a second")', "raised ValueError: the first line"),
    "no_python": ("1 +", "raised SyntaxError: "),
    "kills_itself": ("import os\nos.kill(os.getpid(), 9)", "the kernel died"),
    "exits_0": ("import sys\nsys.exit(0)", "ended the notebook early"),
    "exits_late": ("import sys\npaper.verdicts()\nsys.exit(0)", "ended the notebook early"),
    "exits_3": ("import sys\nsys.exit(3)", "ended the notebook early"),
    "hangs": ("import time\ntime.sleep(300)", "took longer than allowed"),
    "swallows": (
        "while True:\n    try:\n        time.sleep(300)\n    except KeyboardInterrupt:\n        pass",
        "took longer than allowed",
    ),
    "forgets": ('paper.outcome.measurements.pop("learns")', "raised BadInput: not recorded: learns"),
}
TIMED_OUT = ("hangs", "swallows")
# Measurements by decree, so that a run takes as little time as one can.
RECORDS = """from reprise.lab import Paper

paper = Paper("{name}", globals())
for id, value in {{"sums": 0.0, "learns": 0.1, "wins": 0.9}}.items():
    paper.record(id, value)
paper.record("learns", 1.0, without="no-steps")"""
QUICK = 'import time\n\nprint("before", flush=True)'  # importing anything large might itself be out of time


def first_cell(name: str) -> str:
    return QUICK if name in TIMED_OUT else RECORDS.format(name=name)


def add_paper(checkout: Path, name: str, fault: str) -> None:
    """A further paper whose notebook has the fixture's parameters, some records, the fault and the verdicts."""
    notebook = nbformat.read(checkout / "notebooks" / "tiny.ipynb", as_version=4)
    sources = [first_cell(name), fault, "paper.verdicts()"]
    notebook.cells = notebook.cells[:2] + [nbformat.v4.new_code_cell(source) for source in sources if source]
    nbformat.write(notebook, checkout / "notebooks" / f"{name}.ipynb")
    shutil.copytree(checkout / "papers" / "tiny", checkout / "papers" / name)
    index = checkout / "papers" / "index.yaml"
    entries = yaml.safe_load(index.read_text(encoding="utf-8"))
    index.write_text(yaml.safe_dump([*entries, {**entries[0], "name": name}]), encoding="utf-8")


def folder_of(checkout: Path, name: str) -> Path:
    (folder,) = (checkout / "runs" / "quick").glob(f"{name}-*")
    return folder


class Together(NamedTuple):
    checkout: Path
    statuses: set[int]
    stderr: str


@pytest.fixture(scope="module")
def together(tmp_path_factory, copy_tiny, reprise) -> Together:
    """All faults and one notebook without any; those that are to be out of time have a limit."""
    checkout = copy_tiny(tmp_path_factory.mktemp("together") / "tiny")
    for name, (source, _) in FAULTS.items():
        add_paper(checkout, name, source)
    add_paper(checkout, "sound", "")
    others = [name for name in FAULTS if name not in TIMED_OUT]
    told = [reprise(checkout, "run", *others, "sound"), reprise(checkout, "run", *TIMED_OUT, "--timeout", "10")]
    return Together(checkout, {one.returncode for one in told}, "".join(one.stderr for one in told))


def test_status_says_that_a_notebook_failed(together):
    assert together.statuses == {3}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_told_apart_in_one_line(together, name):
    lines = [line for line in together.stderr.splitlines() if line.startswith(f"✗ {name}: ")]
    assert len(lines) == 1
    assert FAULTS[name][1] in lines[0]
    assert "second" not in lines[0], "the message's second line is in the traceback"


@pytest.mark.parametrize("name", FAULTS)
def test_cell_and_traceback_are_kept(together, name):
    folder = folder_of(together.checkout, name)
    assert not (folder / "result.json").exists()
    failure = json.loads((folder / "failure.json").read_text(encoding="utf-8"))
    # `forgets` makes its mistake in one cell and is told so by the next.
    at_fault = "paper.verdicts()" if name == "forgets" else FAULTS[name][0]
    assert failure["source"] == at_fault
    assert at_fault in together.stderr
    raised = {"raises": "and a second", "no_python": "SyntaxError", "forgets": "not recorded", "exits_3": "SystemExit"}
    raised["hangs"] = "KeyboardInterrupt"
    traceback = "\n".join(failure["traceback"])
    assert raised.get(name, "") in traceback
    assert bool(traceback) == (name in raised), "a traceback, exactly where there is one"
    kept = nbformat.read(folder / "notebook.ipynb", as_version=4)
    executed = [cell.source for cell in kept.cells if cell.cell_type == "code" and cell.execution_count]
    assert first_cell(name) in executed


def test_output_before_the_time_was_up_is_kept(together):
    kept = nbformat.read(folder_of(together.checkout, "hangs") / "notebook.ipynb", as_version=4)
    printed = [output.get("text") for cell in kept.cells for output in cell.get("outputs", [])]
    assert "before\n" in printed


def test_one_failure_does_not_keep_the_others_from_running(together):
    result = json.loads((folder_of(together.checkout, "sound") / "result.json").read_text(encoding="utf-8"))
    assert result["measurements"]["wins"] == {"value": 0.9}
    assert "✓ sound: " in together.stderr


def test_leaving_with_status_0_is_not_success_and_can_be_repaired(together, reprise):
    # The one fault that papermill itself takes for success; alone, no other failure makes the status 3.
    again = reprise(together.checkout, "run", "exits_0")
    assert again.returncode == 3
    assert "✗ exits_0: " in again.stderr
    path = together.checkout / "notebooks" / "exits_0.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "sys.exit" not in cell.source]
    nbformat.write(notebook, path)
    repaired = reprise(together.checkout, "run", "exits_0")
    assert repaired.returncode == 0, repaired.stderr
    assert "does not hold here" in repaired.stdout


def start(checkout: Path, environment: dict[str, str], *names: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "reprise.lab.cli", "run", *names]
    return subprocess.Popen(
        command, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def family(command: subprocess.Popen, checkout: Path, name: str) -> tuple[psutil.Process, psutil.Process]:
    """The process that executes a paper's notebook, and its kernel, once that is at the cell that waits."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if list((checkout / "runs" / "quick").glob(f"{name}-*/waiting")):
            for child in psutil.Process(command.pid).children():
                if f"{name}-" in child.cmdline()[-1]:
                    return child, child.children()[0]
        time.sleep(0.1)
    raise AssertionError(f"{name} never came to its cell: {command.communicate(timeout=60)}")


def gone(process: psutil.Process) -> bool:
    try:
        process.wait(timeout=15)
    except psutil.TimeoutExpired:
        return False
    return True


WAITS = 'import os, pathlib, time\n(pathlib.Path(os.environ["REPRISE_RUN"]) / "waiting").touch()\ntime.sleep(300)'


@pytest.fixture
def waiting(tiny) -> Path:
    for name in ("kernel_killed", "runner_killed"):
        add_paper(tiny, name, WAITS)
    return tiny


def test_killed_from_outside(waiting, environment):
    command = start(waiting, environment, "kernel_killed", "runner_killed")
    _, kernel = family(command, waiting, "kernel_killed")
    runner, orphan = family(command, waiting, "runner_killed")
    kernel.kill()
    runner.kill()
    stderr = command.communicate(timeout=60)[1]
    assert command.returncode == 3
    assert "✗ kernel_killed: the kernel died in cell 4: killed from outside, or out of memory" in stderr
    assert "✗ runner_killed: the process that ran it died: " in stderr
    if os.name == "posix":
        assert "✗ runner_killed: the process that ran it died: killed by signal 9" in stderr
    assert WAITS in stderr
    assert gone(orphan), "a kernel without its runner works on unwatched"
    for name in ("kernel_killed", "runner_killed"):
        folder = folder_of(waiting, name)
        assert not (folder / "result.json").exists()
        assert any(cell.source == WAITS for cell in nbformat.read(folder / "notebook.ipynb", as_version=4).cells)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals for a single process")
@pytest.mark.parametrize(("number", "status", "said"), [(2, 130, "interrupted"), (9, -9, "")], ids=["^C", "kill -9"])
def test_a_command_that_ends_leaves_no_process_behind(waiting, environment, number, status, said):
    command = start(waiting, environment, "kernel_killed")
    runner, kernel = family(command, waiting, "kernel_killed")
    command.send_signal(number)
    assert said in command.communicate(timeout=60)[1]
    assert command.returncode == status
    assert gone(runner)
    assert gone(kernel)
