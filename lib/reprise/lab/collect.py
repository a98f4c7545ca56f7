"""Brings finished runs home: results and figures into ``papers/``, executed notebooks, and every generated table."""

from __future__ import annotations

import shutil
from pathlib import Path

from . import notebooks
from .checkout import Checkout
from .errors import BadInput
from .pages import write_pages
from .results import read_json, write_json

# Ranges are set from runs with these seeds, never from the default one.
CALIBRATION_SEEDS = range(100, 105)


def collect(checkout: Checkout, folder: Path) -> list[str]:
    """Take over every finished run below a folder, then write all pages anew. Left out are runs with other parameters
    changed, and of notebooks that were edited since.

    Returns:
        A line for each thing done.

    Raises:
        BadInput: if there is no finished run.
    """
    runs = [(path.parent, read_json(path)) for path in sorted(folder.glob("*/*/result.json"))]
    if not runs:
        raise BadInput(f"no finished run below {folder}: `reprise run` makes them")
    newest = {}
    for run, result in sorted(runs, key=lambda pair: pair[1]["provenance"]["finished"]):
        if result["paper"] in checkout.names() and _is_current(checkout, run, result):
            newest[result["paper"], result["scale"], result["provenance"]["seed"]] = run, result
    published = {(name, scale) for name, scale, seed in newest if seed == _default_seed(checkout, name)}
    lines = [
        f"{name} {scale}: no run of the notebook as it stands, with its own parameters and seed"
        for name, scale in sorted({(result["paper"], result["scale"]) for _, result in runs} - published)
    ]
    for (name, scale, seed), (run, result) in newest.items():
        if seed == _default_seed(checkout, name):
            _take(checkout, name, scale, run, result)
            lines.append(f"{name} {scale}: from {run.name}, commit {result['provenance']['commit'][:12]}")
    for name in checkout.names():
        calibration = {seed: newest[key][1] for seed in CALIBRATION_SEEDS if (key := (name, "quick", seed)) in newest}
        if len(calibration) == len(CALIBRATION_SEEDS):
            write_json(checkout.paper(name) / "spread.json", _spread(calibration))
            lines.append(f"{name}: spread over seeds {', '.join(map(str, calibration))}")
    lines += [f"{path.name}: executed" for path in _execute_guides(checkout)]
    return lines + [f"{path.relative_to(checkout.root)}: written" for path in write_pages(checkout)]


def _is_current(checkout: Checkout, run: Path, result: dict) -> bool:
    """Whether a run is of the published kind: the notebook as it stands, with its own parameters."""
    written = notebooks.read(checkout.notebook(result["paper"]))
    same = notebooks.edit_hash(_as_written(run)) == notebooks.edit_hash(written)
    return result["judged"] and (same or result["scale"] == "full")


def _default_seed(checkout: Checkout, name: str) -> int:
    return notebooks.parameters(notebooks.read(checkout.notebook(name)))["seed"].default


def _spread(results: dict[int, dict]) -> dict:
    """What each seed measured, for the test that recomputes the ranges: {id: {seed: value}}, without likewise."""
    some = next(iter(results.values()))

    def by_seed(read) -> dict:
        return {str(seed): read(result) for seed, result in results.items()}

    return {
        "measurements": {id: by_seed(lambda r, id=id: r["measurements"][id]["value"]) for id in some["measurements"]},
        "without": {
            what: {id: by_seed(lambda r, what=what, id=id: r["without"][what][id]["value"]) for id in entries}
            for what, entries in some["without"].items()
        },
    }


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
