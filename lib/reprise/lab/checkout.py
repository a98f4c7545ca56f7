"""The checkout a command serves: where its notebooks and papers are."""

from __future__ import annotations

import difflib
import functools
import subprocess
from pathlib import Path

import yaml

from .claims import Claims, load_claims
from .errors import BadInput


class Checkout:
    """A folder with ``papers/index.yaml``, which lists the papers in the order of the course."""

    def __init__(self, root: Path):
        self.root = root

    @classmethod
    def find(cls, start: Path | None = None) -> Checkout:
        """The checkout around a folder (the current one), else the one this package was installed from."""
        start = (start or Path.cwd()).resolve()
        for folder in [start, *start.parents, *Path(__file__).resolve().parents]:
            if (folder / "papers" / "index.yaml").is_file():
                return cls(folder)
        raise BadInput("no checkout of Reprise here: stand in one (a folder with papers/index.yaml)")

    @functools.cached_property
    def index(self) -> dict[str, dict]:
        """All papers of the course, present and planned: {name: {title, authors, year, url, ...}}."""
        try:
            entries = yaml.safe_load((self.root / "papers" / "index.yaml").read_text(encoding="utf-8"))
            return {entry["name"]: entry for entry in entries}
        except (yaml.YAMLError, TypeError, KeyError) as error:
            problem = " ".join(str(error).split())
            raise BadInput(f"papers/index.yaml is not a list of entries with a name each: {problem}") from None

    def names(self) -> list[str]:
        """The papers that are present, in the order of the course."""
        return [name for name in self.index if self.notebook(name).is_file()]

    def choose(self, names: tuple[str, ...]) -> list[str]:
        """The papers meant by names on a command line; none or ``all`` means all.

        Raises:
            BadInput: for a name that is not there, with the nearest one that is.
        """
        present = self.names()
        if not names or "all" in names:
            return present
        for name in names:
            if name in self.index and name not in present:
                raise BadInput(f"{name} is planned, but not here yet; there are: {', '.join(present)}")
            if name not in present:
                near = difflib.get_close_matches(name, present, 1)
                hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(present)}"
                raise BadInput(f"no paper {name!r}; {hint}")
        return [name for name in present if name in names]

    @property
    def library(self) -> Path:
        """The folder that has the package ``reprise``: this checkout's own, else where it is installed."""
        own = self.root / "lib"
        return own if (own / "reprise").is_dir() else Path(__file__).parents[2]

    def notebook(self, name: str) -> Path:
        return self.root / "notebooks" / f"{name}.ipynb"

    def paper(self, name: str) -> Path:
        return self.root / "papers" / name

    def claims(self, name: str) -> Claims:
        return load_claims(self.paper(name) / "claims.yaml")

    def commit(self) -> str:
        """The commit that is checked out, with ``+changes`` if tracked files differ from it; or ``unknown``."""
        git = ["git", "-C", str(self.root)]
        try:
            head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
            status = subprocess.run(
                [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
            ).stdout
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
        return head.strip() + ("+changes" if status.strip() else "")
