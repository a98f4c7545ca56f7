"""Files that do not ship inside a package: found, checked by sha256 before every use, downloaded where missing.

``REPRISE_DATA`` moves the folder they are kept in (``data/`` of the checkout). ``REPRISE_MIRROR`` names a folder that
is looked in before the network, laid out as ``<dataset>/<file>``; files are used from there in place. In both, what
has a ``folder`` in ``datasets.yaml`` lies in that one; what is ``tracked`` lies in the checkout and is never fetched.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import yaml
from filelock import FileLock

_HOME = Path(__file__).parents[3] / "data"
_ATTEMPTS = 3


class DataError(RuntimeError):
    """A file is missing or damaged and could not be had; one line that says what would help."""


@cache
def descriptions() -> dict[str, dict]:
    """Everything in ``data/datasets.yaml``, by name."""
    return yaml.safe_load((_HOME / "datasets.yaml").read_text(encoding="utf-8"))


def folder() -> Path:
    """Where downloads are kept."""
    return Path(os.environ.get("REPRISE_DATA") or _HOME).expanduser()


def obtain(dataset: str, file: str) -> Path:
    """A path to one file of a dataset whose content has just been checked.

    Raises:
        DataError: if no intact copy is at hand and none could be downloaded.
    """
    facts = descriptions()[dataset]
    if path := _intact(dataset, file):
        return path
    found = [place / file for place in _places(dataset) if (place / file).is_file()]
    damaged = [f"{path} is damaged (another sha256 than expected)" for path in found]
    if "urls" not in facts:
        raise DataError(
            f"{dataset}: no intact {file}; set REPRISE_MIRROR to a folder that has {_folder(dataset)}/{file}"
            + "".join(f"; {problem}" for problem in damaged)
            + _otherwise(dataset)
        )
    return _download(dataset, file, [url + file for url in facts["urls"]], damaged)


def obtain_all(dataset: str) -> dict[str, Path]:
    """All files of a dataset by name; empty for those that ship inside a package."""
    return {file: obtain(dataset, file) for file in descriptions()[dataset].get("files", {})}


def at_hand(dataset: str) -> bool:
    """Whether intact copies of all files are here or in the mirror, so that nothing would be downloaded."""
    return all(_intact(dataset, file) for file in descriptions()[dataset].get("files", {}))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _otherwise(dataset: str) -> str:
    """What a reader can do without the files, if ``datasets.yaml`` knows something."""
    return f"; {words}" if (words := descriptions()[dataset].get("otherwise")) else ""


def _folder(dataset: str) -> str:
    return descriptions()[dataset].get("folder", dataset)


def _places(dataset: str) -> Iterable[Path]:
    if descriptions()[dataset].get("tracked"):
        yield _HOME / _folder(dataset)
    yield folder() / _folder(dataset)
    if mirror := os.environ.get("REPRISE_MIRROR"):
        yield Path(mirror).expanduser() / _folder(dataset)


def _checksums(dataset: str, file: str) -> list[str]:
    """The sha256 a file may have; more than one where several releases of it hold the same."""
    known = descriptions()[dataset]["files"][file]["sha256"]
    return [known] if isinstance(known, str) else known


def _intact(dataset: str, file: str) -> Path | None:
    """The first copy of a file whose content is what it should be."""
    expected = _checksums(dataset, file)
    for place in _places(dataset):
        if (place / file).is_file() and sha256(place / file) in expected:
            return place / file
    return None


def _download(dataset: str, file: str, urls: list[str], damaged: list[str]) -> Path:
    target = folder() / _folder(dataset) / file
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Of two processes that ask at once, one waits and then finds what the other has brought.
        with FileLock(target.with_name(f"{file}.lock")):
            if path := _intact(dataset, file):
                return path
            problem = _fetch(target, urls, _checksums(dataset, file))
    except OSError as error:
        raise DataError(f"{dataset}: {file} could not be written to {target.parent}: {error.strerror}") from None
    if problem is None:
        return target
    raise DataError(
        f"{dataset}: {file} could not be downloaded ({'; '.join([*damaged, problem])}). Without a network, set "
        f"REPRISE_MIRROR to a folder that has {_folder(dataset)}/{file}, or put the file into {target.parent}"
        + _otherwise(dataset)
    )


def _fetch(target: Path, urls: list[str], expected: list[str]) -> str | None:
    """Download a file under a temporary name, check it, rename it. What was the matter last, if nothing helped."""
    temporary = target.with_name(f"{target.name}.part")
    problem = None
    try:
        for attempt in range(_ATTEMPTS):
            for url in urls:
                try:
                    with urllib.request.urlopen(url, timeout=30) as answer, temporary.open("wb") as out:
                        shutil.copyfileobj(answer, out)
                except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
                    problem = f"{url}: {getattr(error, 'reason', error)}"
                    continue
                if sha256(temporary) in expected:
                    os.replace(temporary, target)
                    return None
                problem = f"{url} sent another file than expected (sha256 differs)"
            time.sleep(2**attempt if attempt < _ATTEMPTS - 1 else 0)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return problem
