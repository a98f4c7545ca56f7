"""Brings finished runs home: results and figures into ``papers/``, executed notebooks, and every generated table."""

from __future__ import annotations

import shutil
from pathlib import Path

from . import notebooks
from .checkout import Checkout
from .errors import BadInput
from .pages import write_pages
from .results import read_json, write_json


def collect(checkout: Checkout, folder: Path) -> list[str]:
    """Take over every finished run below a folder, then write all pages anew. Refused are runs with other parameters
    changed, and quick ones of notebooks that were edited since.

    Returns:
        A line for each thing done or refused.

    Raises:
        BadInput: if there is no finished run, or none that can be taken.
    """
    runs = [(path.parent, read_json(path)) for path in sorted(folder.glob("*/*/result.json"))]
    if not runs:
        raise BadInput(f"no finished run below {folder}: `reprise run` makes them")
    lines, newest = [], {}
    for run, result in sorted(runs, key=lambda pair: pair[1]["provenance"]["finished"]):
        if objection := _objection(checkout, run, result):
            lines.append(f"{run.name}: refused, {objection}")
        else:
            newest[result["paper"], result["scale"], result["provenance"]["seed"]] = run, result
    if not newest:
        raise BadInput("; ".join(lines))
    for (name, scale, seed), (run, result) in newest.items():
        if seed == _default_seed(checkout, name):
            _take(checkout, name, scale, run, result)
            lines.append(f"{name} {scale}: from {run.name}, commit {result['provenance']['commit'][:12]}")
        else:
            _put_beside(checkout, name, scale, seed, result)
            lines.append(f"{name} {scale}: seed {seed} from {run.name}")
    lines += [f"{path.name}: executed" for path in _execute_guides(checkout)]
    return lines + [f"{path.relative_to(checkout.root)}: written" for path in write_pages(checkout)]


def _objection(checkout: Checkout, run: Path, result: dict) -> str:
    """Why a run's numbers cannot be published; empty if they can."""
    name = result["paper"]
    if name not in checkout.names():
        return f"there is no paper {name} here"
    if not result["judged"]:
        changed = ", ".join(f"{key} {value}" for key, value in result["parameters"].items())
        return f"it was run with other parameters: {changed}"
    # A full run takes hours; it carries its commit, and words around it may change without another one.
    written = notebooks.read(checkout.notebook(name))
    if result["scale"] == "quick" and notebooks.edit_hash(_as_written(run)) != notebooks.edit_hash(written):
        return "the notebook was edited since"
    return ""


def _default_seed(checkout: Checkout, name: str) -> int:
    return notebooks.parameters(notebooks.read(checkout.notebook(name)))["seed"].default


def _put_beside(checkout: Checkout, name: str, scale: str, seed: int, result: dict) -> None:
    """Keep what another seed measured, for the page and for the test of ranges: {scale: {seed: its result}}."""
    path = checkout.paper(name) / "spread.json"
    spread = read_json(path) or {}
    kept = {key: result[key] for key in ("scale", "measurements", "without", "provenance")}
    seeds = {**spread.get(scale, {}), str(seed): kept}
    spread[scale] = dict(sorted(seeds.items(), key=lambda pair: int(pair[0])))
    write_json(path, spread)


def _as_written(run: Path):
    """The executed notebook of a run, without the cell of parameters that papermill adds."""
    notebook = notebooks.read(run / "notebook.ipynb")
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    return notebook


def _take(checkout: Checkout, name: str, scale: str, run: Path, result: dict) -> None:
    paper = checkout.paper(name)
    (paper / "results").mkdir(exist_ok=True)
    write_json(paper / "results" / f"{scale}.json", result)
    figures = paper / "figures" / scale
    shutil.rmtree(figures, ignore_errors=True)
    if (run / "figures").is_dir():
        shutil.copytree(run / "figures", figures)
    if scale == "quick":
        notebooks.write(notebooks.normalise(_as_written(run)), checkout.notebook(name))


def _execute_guides(checkout: Checkout) -> list[Path]:
    """Execute the notebooks that belong to no paper, which show what has been collected."""
    import nbclient

    guides = [path for path in sorted((checkout.root / "notebooks").glob("*.ipynb")) if path.stem not in checkout.index]
    for path in guides:
        notebook = notebooks.read(path)
        where = {"metadata": {"path": str(path.parent)}}
        # The kernel's start-up warnings are about the machine, not about the notebook.
        nbclient.NotebookClient(notebook, timeout=300, resources=where, extra_arguments=["--log-level=ERROR"]).execute()
        notebooks.write(notebooks.normalise(notebook), path)
    return guides
