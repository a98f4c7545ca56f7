"""Runs that are killed: the next call goes on where they were and ends with the same measurements, bit for bit, and
nothing of the old run is left at work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest

from reprise.lab import runner

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no signals for a single process")

# After every step, so that a training of a fraction of a second takes long enough to be caught at any step.
SAVED_OFTEN = {"REPRISE_CHECKPOINT_SECONDS": "0"}
TRAININGS = ("with a rate", "without")
# Killed while which training is at work, how many times it has been saved by then, and which process.
KILLS = [("with a rate", 1, "kernel"), ("with a rate", 40, "all"), ("without", 1, "runner"), ("without", 25, "command")]


def start(checkout: Path, environment: dict[str, str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "reprise.lab.cli", "run", "tiny"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=checkout, env=environment | SAVED_OFTEN, **quiet)


def version_of(checkout: Path, training: str) -> int:
    """When a training was last saved, in nanoseconds; 0 if it never was."""
    for path in (checkout / "runs" / "quick").glob("*/checkpoints/*.safetensors"):
        if path.name.startswith(training.replace(" ", "_") + "-"):
            return path.stat().st_mtime_ns
    return 0


def wait_until_saved(checkout: Path, training: str, times: int) -> None:
    """Until a training has been saved at least so many times."""
    deadline, seen = time.monotonic() + 60, set()
    while len(seen) < times:
        assert time.monotonic() < deadline, f"{training!r} was never saved"
        if version := version_of(checkout, training):
            seen.add(version)
        time.sleep(0.001)


def family(command: subprocess.Popen) -> dict[str, psutil.Process]:
    (runner,) = psutil.Process(command.pid).children()
    (kernel,) = runner.children()
    return {"command": psutil.Process(command.pid), "runner": runner, "kernel": kernel}


def gone(process: psutil.Process) -> bool:
    try:
        process.wait(timeout=20)
    except psutil.TimeoutExpired:
        return False
    return True


def result_in(checkout: Path) -> dict:
    results = [json.loads(path.read_text(encoding="utf-8")) for path in checkout.glob("runs/quick/*/result.json")]
    return max(results, key=lambda result: result["provenance"]["finished"])


def first_steps(checkout: Path) -> dict[str, int]:
    """For each training of the newest run, the step at which it began."""
    newest = max(checkout.glob("runs/quick/*/progress.jsonl"), key=lambda path: path.stat().st_mtime)
    lines = [json.loads(line) for line in newest.read_text(encoding="utf-8").splitlines()]
    return {line["training"]: line["step"] for line in reversed(lines)}


@pytest.mark.parametrize(("training", "times", "victim"), KILLS)
def test_killed_in_a_training(tiny, reprise, environment, finished, training, times, victim):
    command = start(tiny, environment)
    wait_until_saved(tiny, training, times)
    processes = family(command)
    for name, process in processes.items():
        if victim in (name, "all"):
            process.kill()
    command.wait()
    assert all(gone(process) for process in processes.values()), "what lost its runner works on unwatched"
    assert not list(tiny.glob("runs/*/*/result.json"))

    told = reprise(tiny, "run", "tiny", environment=SAVED_OFTEN)
    assert told.returncode == 0, told.stderr
    began = first_steps(tiny)
    # A kernel whose runner died lives on for a moment, in which it may come to the training's end.
    assert 0 < began[training] <= (299 if victim in ("kernel", "all") else 300)
    assert began["with a rate"] == (300 if training == "without" else began[training])
    result, undisturbed = result_in(tiny), result_in(finished.checkout)
    for what in ("measurements", "without", "verdicts"):
        assert result[what] == undisturbed[what]
    resumed = result["provenance"]["resumed"]
    assert set(resumed) == set(TRAININGS[: TRAININGS.index(training) + 1])
    assert all(seconds > 0 for seconds in resumed.values())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -15)], ids=["^C", "kill"])
def test_an_ended_command_leaves_no_process_behind(tiny, environment, number, status):
    command = start(tiny, environment)
    wait_until_saved(tiny, "with a rate", times=1)
    processes = family(command)
    command.send_signal(number)
    assert command.wait() == status
    assert all(gone(process) for process in processes.values())
    assert not list(tiny.glob("runs/*/*/result.json"))


def edit(checkout: Path, old: str, new: str) -> None:
    path = checkout / "notebooks" / "tiny.ipynb"
    notebook = nbformat.read(path, as_version=4)
    (cell,) = [cell for cell in notebook.cells if old in cell.source]
    cell.source = cell.source.replace(old, new)
    nbformat.write(notebook, path)


def test_an_edit_keeps_the_trainings_above_it(tiny, reprise):
    assert reprise(tiny, "run", "tiny", environment=SAVED_OFTEN).returncode == 0
    before = result_in(tiny)
    assert before["provenance"]["resumed"] == {}
    edit(tiny, 'learn("without", 0.0)', 'learn("without", 0)')
    time.sleep(1)  # so that the second run is the newer one by the record's clock
    assert reprise(tiny, "run", "tiny", environment=SAVED_OFTEN).returncode == 0
    assert len(list(tiny.glob("runs/quick/*/result.json"))) == 2
    after = result_in(tiny)
    assert first_steps(tiny) == {"with a rate": 300, "without": 0}
    assert after["measurements"] == before["measurements"]
    trained = before["provenance"]["wall_seconds"]
    assert after["provenance"]["resumed"]["with a rate"] < trained
    # Another seed is another training.
    assert reprise(tiny, "run", "tiny", "-p", "seed", "1", environment=SAVED_OFTEN).returncode == 0
    assert first_steps(tiny) == {"with a rate": 0, "without": 0}


def test_of_several_runs_checkpoints_the_latest_is_taken(tmp_path):
    for age, hash_, content in ((100, "a", "early"), (10, "b", "late"), (50, "c", "middle")):
        checkpoint = tmp_path / f"tiny-{hash_}" / "checkpoints" / "training.safetensors"
        checkpoint.parent.mkdir(parents=True)
        checkpoint.write_text(content, encoding="utf-8")
        os.utime(checkpoint, (time.time() - age,) * 2)
        library = "another" if content == "middle" else "the same"
        (tmp_path / f"tiny-{hash_}" / "job.json").write_text(json.dumps({"library": library}), encoding="utf-8")
    job = SimpleNamespace(folder=tmp_path / "tiny-new", name="tiny", library="the same")
    job.folder.mkdir()
    runner._adopt_checkpoints(job)
    (adopted,) = (job.folder / "checkpoints").iterdir()
    assert adopted.read_text(encoding="utf-8") == "late"
