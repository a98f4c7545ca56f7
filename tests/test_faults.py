"""What can go wrong with a run: what the caller is told, what is left in the run's folder, and that the next call
mends it. One table; each row makes its fault in a checkout of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest
import yaml
from filelock import FileLock

# Measurements by decree, so that a run takes as little time as one can.
RECORDS = """from reprise.lab import Paper

paper = Paper("tiny", globals())
for id, value in {"sums": 0.0, "learns": 0.1, "wins": 0.9}.items():
    paper.record(id, value)
paper.record("learns", 1.0, without="no-steps")"""
# What only happens the first time: the second call finds the file.
ONCE = """import os, pathlib, psutil, time
once = pathlib.Path("happened")
if not once.exists():
    before = time.time(); once.touch(); after = time.time()
    {}"""
SWALLOWS = """import time
while True:
    try:
        time.sleep(300)
    except KeyboardInterrupt:
        pass"""
# The system's clock for a process that is started with this library; the monotonic clock stays as it is.
CLOCK = """
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *now) {
    int status = syscall(SYS_clock_gettime, clock, now);
    if (clock == CLOCK_REALTIME && access(getenv("CLOCK_JUMPS_AFTER"), F_OK) == 0)
        now->tv_sec += atol(getenv("CLOCK_JUMPS_BY"));
    return status;
}
"""
JUMP = "assert abs(after - before) > 80_000; time.sleep(1)"


@contextmanager
def nothing(checkout: Path) -> Iterator[dict]:
    yield {}


class Fault(NamedTuple):
    status: int
    said: str
    left: str  # the files in the run's folder afterwards; nothing: there is no such folder
    cell: str = ""  # a further cell of the notebook, before its verdicts
    options: tuple[str, ...] = ()
    # Around the command, given the checkout: makes something wrong, hands over changes of the environment, mends it.
    around: Callable[[Path], AbstractContextManager[dict]] = nothing
    traceback: str = ""  # what is in it; nothing: there is none
    printed: str = ""  # what the executed notebook keeps of the cell's output
    by_editing: bool = False  # only another notebook helps, else the same call again


STARTED = "job.json lock notebook.ipynb owner run.log"
FAILED = f"failure.json {STARTED}"
FINISHED = f"measurements.json result.json {STARTED}"


def mount(folder: Path, options: str) -> None:
    folder.mkdir(exist_ok=True)
    told = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "reprise", str(folder)], capture_output=True)
    if told.returncode:
        pytest.skip("needs the right to mount a small tmpfs, as root has it")


@contextmanager
def disk(checkout: Path, options: str) -> Iterator[dict]:
    """``runs`` is a small disk, which afterwards has room."""
    mount(checkout / "runs", options)
    yield {}
    mount_again = ["mount", "-o", "remount,rw,size=10m", str(checkout / "runs")]
    subprocess.run(mount_again, check=True)


@contextmanager
def clock(checkout: Path, seconds: int) -> Iterator[dict]:
    """The system's clock jumps when the file ``happened`` comes into being."""
    compiler = shutil.which("cc") or shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler, for a clock that can be set without harm")
    source, library = checkout / "clock.c", checkout / "clock.so"
    source.write_text(CLOCK, encoding="utf-8")
    subprocess.run([compiler, "-x", "c", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    happened = str(checkout / "notebooks" / "happened")
    yield {"LD_PRELOAD": str(library), "CLOCK_JUMPS_AFTER": happened, "CLOCK_JUMPS_BY": str(seconds)}


@contextmanager
def data(checkout: Path, **files: bytes) -> Iterator[dict]:
    """The paper asks for MNIST; there are these files, and no network."""
    claims = checkout / "papers" / "tiny" / "claims.yaml"
    text = claims.read_text(encoding="utf-8")
    claims.write_text(text.replace("quick: [digits]", "quick: [mnist]"), encoding="utf-8")
    folder = checkout / "data" / "mnist"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / f"{name.replace('_', '-')}-ubyte.gz").write_bytes(content)
    nobody = "http://127.0.0.1:9"
    yield {"REPRISE_DATA": str(folder.parent), "REPRISE_MIRROR": "", "http_proxy": nobody, "https_proxy": nobody}
    claims.write_text(text, encoding="utf-8")


@contextmanager
def held(checkout: Path) -> Iterator[dict]:
    """Another process works in the run's folder."""
    folder = folder_of(checkout, planned=True)
    folder.mkdir(parents=True)
    with FileLock(folder / "lock"):
        yield {}
    shutil.rmtree(folder)


@contextmanager
def spoiled(checkout: Path) -> Iterator[dict]:
    """What an earlier run left cannot be read."""
    folder = folder_of(checkout, planned=True)
    folder.mkdir(parents=True)
    (folder / "result.json").write_text('{"paper": "ti', encoding="utf-8")
    yield {}
    (folder / "result.json").unlink()


FAULTS = {
    # A notebook that goes wrong.
    "raises": Fault(
        3,
        "✗ tiny: cell 3 raised ValueError: the first line",
        FAILED,
        cell='raise ValueError("the first line\\nand a second")',
        traceback="and a second",
        by_editing=True,
    ),
    "no python": Fault(
        3, "✗ tiny: cell 3 raised SyntaxError: ", FAILED, cell="1 +", traceback="SyntaxError", by_editing=True
    ),
    "forgets": Fault(
        3,
        "✗ tiny: cell 4 raised BadInput: not recorded: learns",
        FAILED,
        cell='paper.outcome.measurements.pop("learns")',
        traceback="not recorded",
        by_editing=True,
    ),
    "leaves with 0": Fault(3, "✗ tiny: cell 3 ended the noteb", FAILED, cell=ONCE.format("raise SystemExit(0)")),
    "leaves with 3": Fault(
        3,
        "✗ tiny: cell 3 ended the noteb",
        FAILED,
        cell="raise SystemExit(3)",
        traceback="SystemExit",
        by_editing=True,
    ),
    "leaves late": Fault(
        3,
        "✗ tiny: cell 3 ended the notebook early",
        f"measurements.json {FAILED}",
        cell="import sys\npaper.verdicts()\nsys.exit(0)",
        by_editing=True,
    ),
    "out of time": Fault(
        3,
        "✗ tiny: cell 3 took longer than",
        FAILED,
        cell=ONCE.format("print('before', flush=True); time.sleep(300)"),
        options=("--timeout", "10"),
        traceback="KeyboardInterrupt",
        printed="before",
    ),
    "swallows it": Fault(
        3,
        "✗ tiny: cell 3 took longer than",
        FAILED,
        cell=SWALLOWS,
        options=("--timeout", "10"),
        by_editing=True,
    ),
    # Processes that die.
    "kernel": Fault(
        3,
        "✗ tiny: the kernel died in cell 3: killed from outside, or out of memory",
        FAILED,
        cell=ONCE.format("os.kill(os.getpid(), 9)"),
    ),
    "runner": Fault(
        3,
        "✗ tiny: the process that ran it died: killed by signal 9",
        STARTED,
        cell=ONCE.format("psutil.Process().parent().kill(); time.sleep(300)"),
    ),
    "command": Fault(-9, "", STARTED, cell=ONCE.format("psutil.Process().parent().parent().kill(); time.sleep(300)")),
    # The machine.
    "disk full at first": Fault(2, "reprise: cannot write to ", "", around=lambda c: disk(c, "size=4k")),
    "disk full later": Fault(
        3,
        "✗ tiny: its folder could not be written to; 0 MB are free there",
        STARTED,
        cell="print('much' * 50_000)",
        around=lambda c: disk(c, "size=96k"),
    ),
    "folder not writable": Fault(2, "reprise: cannot write to ", "", around=lambda c: disk(c, "size=1m,ro")),
    "clock goes back": Fault(
        0,
        "✓ tiny: ",
        FINISHED,
        cell=ONCE.format(JUMP),
        options=("--timeout", "30"),
        around=lambda c: clock(c, -86_400),
    ),
    "clock leaps ahead": Fault(
        0,
        "✓ tiny: ",
        FINISHED,
        cell=ONCE.format(JUMP),
        options=("--timeout", "30"),
        around=lambda c: clock(c, 86_400),
    ),
    "folder in use": Fault(2, "reprise: tiny is already running in ", "lock", around=held),
    "result spoiled": Fault(2, "reprise: result.json in tiny-", "result.json", around=spoiled),
    # Input. (All of the command line's are in test_cli.)
    "wrong type": Fault(2, "reprise: parameter seed: 'two' is not a whole", "", options=("-p", "seed", "two")),
    "no data": Fault(2, "reprise: mnist: train-images-idx3-ubyte.gz could not be downloaded (", "", around=data),
    "data cut short": Fault(
        2,
        "train-images-idx3-ubyte.gz is damaged (another sha256 than expected); http",
        "",
        around=lambda c: data(c, train_images_idx3=b"\x1f\x8b\x08 cut off"),
    ),
}


def write_notebook(checkout: Path, cell: str) -> None:
    """The fixture's parameters, records by decree, a cell, the verdicts."""
    path = checkout / "notebooks" / "tiny.ipynb"
    notebook = nbformat.read(path, as_version=4)
    sources = [source for source in (RECORDS, cell, "paper.verdicts()") if source]
    cells = [nbformat.v4.new_code_cell(source, id=f"cell-{number}") for number, source in enumerate(sources)]
    notebook.cells = notebook.cells[:2] + cells
    nbformat.write(notebook, path)


def folder_of(checkout: Path, planned: bool = False) -> Path:
    """The folder of the one run there is, or where it will be."""
    if planned:
        from reprise.lab import runner
        from reprise.lab.checkout import Checkout

        (job,) = runner.plan(Checkout(checkout), ["tiny"], "quick", (), checkout / "runs")
        return job.folder
    (folder,) = (checkout / "runs" / "quick").glob("tiny-*")
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def checkout(tiny) -> Iterator[Path]:
    yield tiny
    if os.path.ismount(tiny / "runs"):
        subprocess.run(["umount", str(tiny / "runs")], check=True)


@pytest.mark.skipif(os.name == "nt", reason="signals and mounts are POSIX")
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_fault(checkout, reprise, fault):
    write_notebook(checkout, fault.cell)
    with fault.around(checkout) as changes:
        told = reprise(checkout, "run", "tiny", *fault.options, environment=changes)
        assert told.returncode == fault.status, told.stderr
        assert fault.said in told.stderr
        if fault.status == 2:
            assert len(told.stderr.splitlines()) == 1
        folders = list((checkout / "runs").glob("quick/*"))
        assert [files(folder) for folder in folders] == ([sorted(fault.left.split())] if fault.left else [])
        if "failure.json" in fault.left:
            assert_told_in_full(fault, folders[0], told.stderr)
    if fault.by_editing:
        return
    told = reprise(checkout, "run", "tiny")
    assert told.returncode == 0, told.stderr
    assert_finished(checkout)


def assert_told_in_full(fault: Fault, folder: Path, stderr: str) -> None:
    """The cell at fault and its traceback are in the record of the failure and on the screen, but the one line is
    one line; the notebook keeps what was done before."""
    (line,) = [line for line in stderr.splitlines() if line.startswith("✗")]
    assert "second" not in line
    failure = json.loads((folder / "failure.json").read_text(encoding="utf-8"))
    # `forgets` makes its mistake in one cell and is told so by the next.
    assert failure["source"] == ("paper.verdicts()" if "pop(" in fault.cell else fault.cell)
    assert failure["source"] in stderr
    traceback = plain("\n".join(failure["traceback"]))
    assert traceback in stderr
    assert fault.traceback in traceback
    assert bool(fault.traceback) == bool(traceback)
    cells = [cell for cell in nbformat.read(folder / "notebook.ipynb", as_version=4).cells if cell.cell_type == "code"]
    assert RECORDS in [cell.source for cell in cells if cell.execution_count]
    if fault.printed:
        assert f"{fault.printed}\n" in [output.get("text") for cell in cells for output in cell.outputs]


def assert_finished(checkout: Path) -> None:
    result = json.loads((folder_of(checkout) / "result.json").read_text(encoding="utf-8"))
    assert result["measurements"] == {"sums": {"value": 0.0}, "learns": {"value": 0.1}, "wins": {"value": 0.9}}
    assert 0 < result["provenance"]["wall_seconds"] < 120


def plain(text: str) -> str:
    """Without the colours of a terminal."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_one_failure_does_not_keep_the_others_from_running(checkout, reprise):
    write_notebook(checkout, "raise ValueError")
    notebooks, papers = checkout / "notebooks", checkout / "papers"
    text = (notebooks / "tiny.ipynb").read_text(encoding="utf-8").replace("raise ValueError", "pass")
    (notebooks / "sound.ipynb").write_text(text.replace('\\"tiny\\"', '\\"sound\\"'), encoding="utf-8")
    shutil.copytree(papers / "tiny", papers / "sound")
    entries = yaml.safe_load((papers / "index.yaml").read_text(encoding="utf-8"))
    text = yaml.safe_dump([*entries, {**entries[0], "name": "sound"}])
    (papers / "index.yaml").write_text(text, encoding="utf-8")
    told = reprise(checkout, "run")
    assert told.returncode == 3
    assert "✓ sound: " in told.stderr
    assert "✗ tiny: " in told.stderr
    (folder,) = (checkout / "runs" / "quick").glob("sound-*")
    assert json.loads((folder / "result.json").read_text(encoding="utf-8"))["measurements"]["wins"] == {"value": 0.9}
