"""Where the progress of a training shows: a bar in Lab, a file under the runner, nothing under nbval."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from . import run


class Silent:
    """Shows nothing. The other displays have the same three methods."""

    def __init__(self, name: str, steps: int, first: int = 0):
        """``first`` steps were done before, in a run that was interrupted."""
        self.name, self.steps, self.done = name, steps, first

    def advance(self, done: int) -> None:
        """``done`` steps are finished."""

    def values(self, values: dict[str, float]) -> None:
        """The newest logged values."""

    def close(self) -> None:
        """The training ended, or was interrupted."""


class Bar(Silent):
    """A tqdm bar: a widget in a notebook, text in a terminal."""

    def __init__(self, name: str, steps: int, first: int, notebook: bool):
        super().__init__(name, steps, first)
        if notebook:
            from tqdm.notebook import tqdm
        else:
            from tqdm import tqdm
        # Steps per second are left out: beside them the bar of a notebook would shrink to nothing.
        layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self.bar = tqdm(total=steps, initial=first, desc=name, unit="step", leave=notebook, bar_format=layout)

    def advance(self, done: int) -> None:
        self.bar.update(done - self.bar.n)

    def values(self, values: dict[str, float]) -> None:
        self.bar.set_postfix({key: f"{value:.3g}" for key, value in values.items()}, refresh=False)

    def close(self) -> None:
        self.bar.close()


class File(Silent):
    """Lines of JSON in the run's folder, which ``reprise run`` shows as they come."""

    def __init__(self, name: str, steps: int, first: int, path: Path):
        super().__init__(name, steps, first)
        self.path, self.latest = path, {}
        # The pace is that of the last few lines: what was done before an interruption passes in no time.
        self.marks = deque(maxlen=6)
        self.write()

    def advance(self, done: int) -> None:
        self.done = done
        if time.monotonic() - self.marks[-1][0] > 1:
            self.write()

    def values(self, values: dict[str, float]) -> None:
        self.latest = values

    def close(self) -> None:
        self.write()

    def write(self) -> None:
        self.marks.append((time.monotonic(), self.done))
        (then, done_then), (now, done) = self.marks[0], self.marks[-1]
        left = (now - then) / (done - done_then) * (self.steps - done) if done > done_then else None
        # JSON has no infinity; a loss that diverged shows as text.
        values = {key: value if abs(value) < float("inf") else str(value) for key, value in self.latest.items()}
        line = {
            "time": time.time(),
            "training": self.name,
            "step": self.done,
            "steps": self.steps,
            "seconds_left": left,
            **values,
        }
        run.folder()  # is it still ours?
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError:
            pass  # A training is worth more than its progress line: a full disk shows where results are written.


def display(name: str, steps: int, first: int = 0) -> Silent:
    """The display that suits where this process runs."""
    if place := run.folder():
        return File(name, steps, first, place / "progress.jsonl")
    if is_watched():
        return Bar(name, steps, first, notebook=True)
    if "PYTEST_VERSION" not in os.environ and sys.stderr is not None and sys.stderr.isatty():
        return Bar(name, steps, first, notebook=False)
    return Silent(name, steps, first)


def sweep(name: str, items: Iterable) -> Iterator:
    """Iterate over the settings of many short trainings (``train(..., quiet=True)``) under one bar."""
    items = list(items)
    shown = display(name, len(items)) if items else Silent(name, 0)
    try:
        for done, item in enumerate(items, 1):
            yield item
            shown.advance(done)
    finally:
        shown.close()


def is_watched() -> bool:
    """Whether this is a notebook with a reader before it: not under the runner, and not under nbval, which compares
    outputs, and nothing that moves looks the same twice."""
    return run.folder() is None and "PYTEST_VERSION" not in os.environ and _in_notebook()


def _in_notebook() -> bool:
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return shell is not None and hasattr(shell, "kernel")
