"""One line per running notebook, rewritten in a terminal, appended now and then elsewhere."""

from __future__ import annotations

import shutil
import sys
import time

from .runner import Job, failure_words, progress_words
from .tables import seconds


class Live:
    """Callable with the list of jobs, as often as one likes."""

    def __init__(self):
        self.rewrites = sys.stderr.isatty()
        self.every = 0.5 if self.rewrites else 15
        self.drawn_at, self.lines = 0.0, 0
        self.told: set[str] = set()

    def __call__(self, jobs: list[Job]) -> None:
        for job in jobs:
            if job.finished and job.name not in self.told:
                self._erase()
                self.told.add(job.name)
                print(self._end(job), file=sys.stderr, flush=True)
        if time.monotonic() - self.drawn_at < self.every:
            return
        self._erase()
        running = [job for job in jobs if job.process is not None and not job.finished]
        width = shutil.get_terminal_size().columns - 1
        for job in running:
            elapsed = time.monotonic() - job.started
            print(f"  {job.name:<16} {elapsed:4.0f} s  {progress_words(job)}"[:width], file=sys.stderr)
        sys.stderr.flush()
        self.drawn_at, self.lines = time.monotonic(), len(running) if self.rewrites else 0

    def _erase(self) -> None:
        if self.lines:
            print(f"\x1b[{self.lines}A\x1b[J", end="", file=sys.stderr)
            self.lines = 0

    def _end(self, job: Job) -> str:
        if job.failure is not None:
            return f"✗ {job.name}: {failure_words(job)}"
        took = seconds(job.result["provenance"]["wall_seconds"])
        return f"✓ {job.name}: {took}" + ("" if job.process else " (finished earlier)")
