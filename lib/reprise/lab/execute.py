"""Executes one notebook in a process of its own: ``python -m reprise.lab.execute FOLDER``.

The folder holds ``job.json``. What comes out is ``result.json``, or ``failure.json`` that tells apart a cell that
raised, a kernel that died, a cell that ended the kernel on purpose, and one that took too long.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from pathlib import Path

import nbformat
import papermill
import psutil
from filelock import FileLock
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillExecutionError

from .errors import CANNOT_WRITE
from .notebooks import code_cells
from .results import LOCK, read_json, write_json

_OUT_OF_TIME = "OutOfTime"


class _Cells:
    """Which cell is at work, told by nbclient as it goes. What papermill notes in the notebook cannot be relied on:
    after a kernel's death it calls every cell completed, and its durations follow the system's clock."""

    def __init__(self):
        self.number, self.source, self.timed_out = 0, "", False

    def start(self, cell, cell_index) -> None:
        if "injected-parameters" not in cell.metadata.get("tags", []):  # the reader's notebook does not have it
            self.number += 1
        self.source = cell.source

    def end(self, cell, cell_index, execute_reply) -> None:
        # A cell may swallow the interrupt and leave no error behind: it was out of time all the same.
        self.timed_out |= execute_reply["content"].get("ename") == _OUT_OF_TIME


def execute(folder: Path) -> None:
    job = read_json(folder / "job.json")
    cells = _Cells()
    started = time.monotonic()
    try:
        papermill.execute_notebook(
            job["notebook"],
            folder / "notebook.ipynb",
            parameters=job["parameters"],
            kernel_name="python3",
            cwd=Path(job["notebook"]).parent,
            progress_bar=False,
            execution_timeout=job["timeout"],
            interrupt_on_timeout=True,  # so that the cell tells where it was,
            error_on_timeout={"ename": _OUT_OF_TIME, "evalue": "", "traceback": []},  # and then wait no longer
            start_timeout=120,
            on_cell_execute=cells.start,
            on_cell_executed=cells.end,
        )
    except PapermillExecutionError as error:
        kind = "exit" if error.ename == "SystemExit" else "error"
        failure = {"kind": kind, "error": f"{error.ename}: {error.evalue}", "traceback": error.traceback}
    except CellTimeoutError:  # not even the interrupt ended it
        failure = {"kind": "time-out", "error": "", "traceback": []}
    except DeadKernelError as error:
        failure = {"kind": "kernel death", "error": str(error), "traceback": []}
    else:
        measurements = read_json(folder / "measurements.json")
        if measurements is not None and _ran_to_its_end(folder) and not cells.timed_out:
            _finish(folder, job, measurements, time.monotonic() - started)
            return
        # The kernel ended in good order, but early: papermill takes sys.exit(0) for success.
        failure = {"kind": "exit", "error": "the notebook ended before its verdicts", "traceback": []}
    if cells.timed_out:
        failure["kind"] = "time-out"
    write_json(folder / "failure.json", {**failure, "cell": cells.number, "source": cells.source})


def _finish(folder: Path, job: dict, measurements: dict, wall_seconds: float) -> None:
    result = {**measurements, "parameters": job["changed"]}
    before = sum(measurements["provenance"]["resumed"].values())
    result["provenance"] = {
        **measurements["provenance"],
        "seed": job["parameters"]["seed"],
        "commit": job["commit"],
        "wall_seconds": round(before + wall_seconds, 1),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_json(folder / "result.json", result)


def _ran_to_its_end(folder: Path) -> bool:
    notebook = nbformat.read(folder / "notebook.ipynb", as_version=4)
    return all(cell.execution_count is not None for cell in code_cells(notebook))


def _die_with(parent: int) -> None:
    """End this process and its kernel when the runner is gone, so that nothing works on unwatched."""
    while psutil.pid_exists(parent) and os.getppid() == parent:
        time.sleep(0.5)
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(1)


def main() -> None:
    folder = Path(sys.argv[1])
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    with FileLock(folder / LOCK, timeout=0):  # held as long as this process lives, whatever ends it
        try:
            execute(folder)
        except OSError:  # a full disk, say; then the log cannot be written, either, and leaving in good order fails
            with contextlib.suppress(OSError):
                traceback.print_exc()
            os._exit(CANNOT_WRITE)


if __name__ == "__main__":
    main()
