"""The run that this process works for, if any: the one place where it may leave something."""

from __future__ import annotations

import os
from pathlib import Path


def folder() -> Path | None:
    """The run's folder, which the runner names in ``REPRISE_RUN``; None outside of a run.

    Raises:
        RuntimeError: if another runner has taken the folder over since (``REPRISE_OWNER``): a kernel that outlived
            its own runner must not write into somebody else's run.
    """
    if not (named := os.environ.get("REPRISE_RUN")):
        return None
    run, token = Path(named), os.environ.get("REPRISE_OWNER")
    owner = run / "owner"
    if token and (not owner.is_file() or owner.read_text(encoding="utf-8") != token):
        raise RuntimeError("this kernel outlived its runner: its folder belongs to another run now")
    return run
