"""Runs notebooks, two at a time, each in a process of its own, and shows how far they are."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from . import notebooks
from .checkout import Checkout
from .claims import Claims
from .errors import CANNOT_WRITE, BadInput
from .parameters import fingerprint, parse_options
from .results import LOCK, Outcome, is_locked, read_json, write_json

_UNKNOWN_LENGTH = float("inf")


@dataclass
class Job:
    """One notebook to run at one scale with certain parameters."""

    name: str
    scale: str
    claims: Claims
    notebook: Path
    folder: Path
    parameters: dict[str, object]
    changed: dict[str, object]
    library: str
    expected_seconds: float
    process: subprocess.Popen | None = None
    started: float = 0.0
    finished: bool = False
    result: dict | None = field(default=None)
    failure: dict | None = field(default=None)

    def outcome(self) -> Outcome:
        return Outcome.from_result(self.claims, self.result)


def plan(
    checkout: Checkout, names: list[str], scale: str, options: tuple[tuple[str, str], ...], out: Path
) -> list[Job]:
    """Check everything that can be checked before anything runs, and name the folders. Longest jobs first.

    Raises:
        BadInput: for claims, parameters or a device that are wrong.
    """
    if reserved := [name for name, _ in options if name == "scale"]:
        raise BadInput(f"give the {reserved[0]} with --scale, not -p")
    jobs = []
    for name in names:
        notebook = notebooks.read(checkout.notebook(name))
        declared = notebooks.parameters(notebook)
        given = parse_options(declared, options)
        values = {key: given.get(key, parameter.written) for key, parameter in declared.items()}
        values["scale"] = declared["scale"].check(scale)
        changed = {key: value for key, value in values.items() if value != declared[key].default}
        claims = checkout.claims(name)
        require_data(claims.data[scale])
        meant = {key: fingerprint(value) for key, value in changed.items() if key != "device"}
        facts = notebook, meant, _device(values), checkout.library
        recorded = read_json(checkout.paper(name) / "results" / f"{scale}.json") or {}
        jobs.append(
            Job(
                name=name,
                scale=scale,
                claims=claims,
                notebook=checkout.notebook(name),
                folder=out / scale / f"{name}-{notebooks.run_hash(*facts)}",
                parameters=values,
                changed=changed,
                library=notebooks.library_hash(*facts),
                expected_seconds=recorded.get("provenance", {}).get("wall_seconds", _UNKNOWN_LENGTH),
            )
        )
    return sorted(jobs, key=lambda job: -job.expected_seconds)


def require_data(names: tuple[str, ...]) -> None:
    """Have every file of these datasets at hand, downloading what is missing.

    Raises:
        BadInput: if a dataset is unknown or cannot be had.
    """
    from reprise.data import DataError, descriptions, obtain_all

    for name in names:
        if name not in descriptions():
            raise BadInput(f"no dataset {name!r}; there are {', '.join(descriptions())}")
        try:
            obtain_all(name)
        except DataError as error:
            raise BadInput(str(error)) from None


def _device(values: dict[str, object]) -> str:
    from reprise.training import pick_device

    try:
        return str(pick_device(values["device"]))
    except ValueError as error:
        raise BadInput(f"parameter device: {error}") from None


def run(checkout: Checkout, jobs: list[Job], at_once: int, force: bool, timeout: int | None, show) -> None:
    """Run the jobs that are not finished yet. ``show(jobs)`` is called a few times a second meanwhile."""
    commit = checkout.commit()
    waiting = []
    for job in jobs:
        if is_locked(job.folder):
            raise BadInput(f"{job.name} is already running in {job.folder}")
        job.result = None if force else read_json(job.folder / "result.json")
        if job.result is None:
            waiting.append(job)
        else:
            job.finished = True
    running: list[Job] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                _start(checkout, job, commit, timeout, force)
                running.append(job)
            time.sleep(0.1)
            for job in [job for job in running if job.process.poll() is not None]:
                _conclude(job)
                running.remove(job)
            show(jobs)
    except BaseException:
        for job in running:
            _stop(job)
        raise


def _start(checkout: Checkout, job: Job, commit: str, timeout: int | None, force: bool) -> None:
    owner = uuid.uuid4().hex
    is_new = not job.folder.exists()
    try:
        _clear(job.folder, keep_checkpoints=not force)
        if not force:
            _adopt_checkpoints(job)
        (job.folder / "owner").write_text(owner, encoding="utf-8")
        description = {
            "notebook": str(job.notebook),
            "parameters": job.parameters,
            "changed": job.changed,
            "timeout": timeout,
            "commit": commit,
            "library": job.library,
        }
        write_json(job.folder / "job.json", description)
    except OSError as error:
        if is_new:
            shutil.rmtree(job.folder, ignore_errors=True)
        raise BadInput(f"cannot write to {job.folder}: {error.strerror}") from None
    environment = {
        **os.environ,
        "REPRISE_RUN": str(job.folder.resolve()),
        "REPRISE_OWNER": owner,
        "REPRISE_CODE": job.library,
        # The library of the checkout that is served, whichever one is installed.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(checkout.library), os.environ.get("PYTHONPATH")])),
        # The kernel of this environment, even where the user has another one of the same name.
        "JUPYTER_PREFER_ENV_PATH": "1",
        # One thread each: two notebooks at a time on two cores, and the same sums everywhere.
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    job.started = time.monotonic()
    with (job.folder / "run.log").open("w", encoding="utf-8") as log:
        job.process = subprocess.Popen(
            [sys.executable, "-m", "reprise.lab.execute", str(job.folder.resolve())],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _clear(folder: Path, keep_checkpoints: bool) -> None:
    """A folder for the run: of an earlier attempt only checkpoints stay, the rest must not be taken for this one's."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not (keep_checkpoints and path.name == "checkpoints"):
            shutil.rmtree(path)
        elif path.is_file() and path.name != LOCK:
            path.unlink()


def _adopt_checkpoints(job: Job) -> None:
    """Offer the checkpoints of this paper's other runs, which cost no space as links: after a cell is edited, the
    trainings above it need not be done again. Each checkpoint's name tells whether it fits."""
    mine = job.folder / "checkpoints"
    runs = [path.parent for path in job.folder.parent.glob(f"{job.name}-*/job.json")]
    alike = [run for run in runs if (read_json(run / "job.json") or {}).get("library") == job.library]
    # Of several that fit, the latest has come furthest.
    found = sorted(
        (path for run in alike for path in run.glob("checkpoints/*.safetensors")), key=_written, reverse=True
    )
    for path in found:
        if not (mine / path.name).exists():
            mine.mkdir(exist_ok=True)
            with contextlib.suppress(OSError):  # a file system without links: then they are trained again
                os.link(path, mine / path.name)


def _written(path: Path) -> float:
    """When a file was last written; long ago if it has just been replaced or removed."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _conclude(job: Job) -> None:
    job.finished = True
    job.result = read_json(job.folder / "result.json")
    if job.result is not None:
        return
    job.failure = read_json(job.folder / "failure.json")
    if job.failure is None:
        kind = "storage" if job.process.returncode == CANNOT_WRITE else "runner death"
        job.failure = {"kind": kind, "error": _last_words(job), "cell": 0, "source": "", "traceback": []}


def _last_words(job: Job) -> str:
    status = job.process.returncode
    if status == CANNOT_WRITE:  # the log may be cut off, too
        free = shutil.disk_usage(job.folder).free
        return f"{free / 2**20:.0f} MB are free there"
    if status < 0:  # whatever it wrote last has nothing to do with its end
        return f"killed by signal {-status}"
    log = (job.folder / "run.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return log[-1] if log else f"exit status {status}"


def _stop(job: Job) -> None:
    """Interrupt a run; papermill then shuts its kernel down."""
    job.process.terminate()
    try:
        job.process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        job.process.kill()


def failure_words(job: Job) -> str:
    """What went wrong, in one line."""
    failure = job.failure
    where, first_line = f"cell {failure['cell']}", failure["error"].partition("\n")[0]
    return {
        "error": f"{where} raised {first_line}",
        "kernel death": f"the kernel died in {where}: killed from outside, or out of memory",
        "exit": f"{where} ended the notebook early (sys.exit?)",
        "time-out": f"{where} took longer than allowed",
        "storage": f"its folder could not be written to; {first_line}",
        "runner death": f"the process that ran it died: {first_line}",
    }[failure["kind"]]


def progress_words(job: Job) -> str:
    """The newest line of progress.jsonl in words: ``plain  step 1,200/2,000  loss 0.31  12 s left``."""
    try:
        with (job.folder / "progress.jsonl").open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 4096))
            last = json.loads(file.read().decode("utf-8").splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return "starting"
    words = f"{last['training']}  step {last['step']:,}/{last['steps']:,}"
    if isinstance(last.get("loss"), float):
        words += f"  loss {last['loss']:.3g}"
    if last["seconds_left"]:
        words += f"  {last['seconds_left']:.0f} s left"
    return words
