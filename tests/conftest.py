"""What several test modules share: copies of the fixture checkout, the command line in a process of its own, skips."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from filelock import FileLock

from reprise.data import files

FIXTURE = Path(__file__).parent / "fixtures" / "tiny"

# The fixture's notebook is committed without outputs; only copies of it are run.
collect_ignore_glob = ["fixtures/*"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = {mark: [item for item in items if item.get_closest_marker(mark)] for mark in ("gpu", "mirror")}
    if marked["gpu"]:
        import torch  # takes seconds, so only if something asks for it

        if not torch.cuda.is_available():
            for item in marked["gpu"]:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch finds none"))
    if not os.environ.get("REPRISE_MIRROR"):
        for item in marked["mirror"]:
            item.add_marker(pytest.mark.skip(reason="needs REPRISE_MIRROR, the folder of downloaded data"))


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def copy_tiny() -> Callable[[Path], Path]:
    """Copies the fixture checkout to a place that does not exist yet."""
    return lambda place: Path(shutil.copytree(FIXTURE, place))


@pytest.fixture
def tiny(tmp_path, copy_tiny) -> Path:
    """A copy of the fixture checkout, for one test to spoil."""
    return copy_tiny(tmp_path / "tiny")


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment of a reader's shell: nothing in it says that a test or a run is going on."""
    ours = ("REPRISE_RUN", "PYTEST_VERSION", "PYTEST_CURRENT_TEST", "PYTEST_ADDOPTS")
    kept = {key: value for key, value in os.environ.items() if key not in ours and "XDIST" not in key}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}


@pytest.fixture(scope="session")
def reprise(environment) -> Callable[..., subprocess.CompletedProcess]:
    """``reprise(checkout, "run", "tiny")``: the command line as a reader types it, standing in the checkout."""

    reader = environment

    def run(checkout: Path, *arguments: str, environment: dict[str, str] = {}) -> subprocess.CompletedProcess:  # noqa: B006
        return subprocess.run(
            [sys.executable, "-m", "reprise.lab.cli", *arguments],
            cwd=checkout,
            env=reader | environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=300,
        )

    return run


class Finished(NamedTuple):
    """A checkout in which ``reprise run tiny`` came to its end, and what it said."""

    checkout: Path
    status: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def finished(tmp_path_factory, copy_tiny, reprise) -> Finished:
    """Run once for all tests of all workers, which look at it or change a copy."""
    place = tmp_path_factory.getbasetemp()
    place = place.parent if "PYTEST_XDIST_WORKER" in os.environ else place
    checkout, record = place / "finished" / "tiny", place / "finished.json"
    with FileLock(place / "finished.lock"):
        if not record.exists():
            told = reprise(copy_tiny(checkout), "run", "tiny")
            record.write_text(json.dumps([told.returncode, told.stdout, told.stderr]), encoding="utf-8")
    return Finished(checkout, *json.loads(record.read_text(encoding="utf-8")))


@pytest.fixture
def after_run(finished, tmp_path) -> Path:
    """A copy of the checkout with its finished run, for one test to change."""
    return Path(shutil.copytree(finished.checkout, tmp_path / "finished"))


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No data, no mirror, no network."""

    def unreachable(url, timeout):
        raise ConnectionError("unplugged")

    monkeypatch.setenv("REPRISE_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("REPRISE_MIRROR", raising=False)
    monkeypatch.setattr(files.urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    return tmp_path
