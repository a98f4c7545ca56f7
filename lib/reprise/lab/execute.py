"""Executes one notebook in a process of its own: ``python -m reprise.lab.execute FOLDER``.

The folder holds ``job.json``. What comes out is ``result.json``, or ``failure.json`` that tells apart a cell that
raised, a kernel that died, a cell that ended the kernel on purpose, and one that took too long.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import nbformat
import papermill
import psutil
from filelock import FileLock
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillExecutionError

from .results import LOCK, read_json, write_json


def execute(folder: Path) -> None:
    job = read_json(folder / "job.json")
    started = time.time()
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
            error_on_timeout={"ename": "TimeoutError", "evalue": "", "traceback": []},  # and then wait no longer
            start_timeout=120,
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
        if measurements is not None and _ran_to_its_end(folder) and not _late_cell(folder, job["timeout"]):
            _finish(folder, job, measurements, time.time() - started)
            return
        # The kernel ended in good order, but early: papermill takes sys.exit(0) for success.
        failure = {"kind": "exit", "error": "the notebook ended before its verdicts", "traceback": []}
    # A cell may swallow the interrupt and leave no error behind: it was out of time all the same.
    late = _late_cell(folder, job["timeout"])
    write_json(folder / "failure.json", {**failure, **(late or _last_cell(folder))})


def _finish(folder: Path, job: dict, measurements: dict, wall_seconds: float) -> None:
    result = {**measurements, "parameters": job["changed"]}
    result["provenance"] = {
        **measurements["provenance"],
        "seed": job["parameters"]["seed"],
        "commit": job["commit"],
        "wall_seconds": round(wall_seconds, 1),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_json(folder / "result.json", result)


def _code_cells(folder: Path) -> list:
    try:
        notebook = nbformat.read(folder / "notebook.ipynb", as_version=4)
    except (OSError, ValueError):
        return []
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def _ran_to_its_end(folder: Path) -> bool:
    return all(cell.execution_count is not None for cell in _code_cells(folder))


def _last_cell(folder: Path) -> dict:
    """The last cell that was started. When a kernel dies, papermill's status of cells is wrong and the kernel may not
    have told the cell's number any more; the time at which papermill sent the cell is always there."""
    cells = [cell for cell in _code_cells(folder) if cell.metadata.get("papermill", {}).get("start_time")]
    return {"cell": len(cells), "source": cells[-1].source if cells else ""}


def _late_cell(folder: Path, timeout: int | None) -> dict:
    """The first cell that took longer than allowed; nothing if none did."""
    for number, cell in enumerate(_code_cells(folder), 1):
        if timeout and (cell.metadata.get("papermill", {}).get("duration") or 0) >= timeout:
            return {"kind": "time-out", "cell": number, "source": cell.source}
    return {}


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
        execute(folder)


if __name__ == "__main__":
    main()
