"""Brings finished runs home: results and figures into ``papers/``, executed notebooks, and every generated table.

Text between ``<!-- name -->`` and ``<!-- /name -->`` in a page belongs to this module; the rest to its author.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from . import notebooks
from .checkout import Checkout
from .claims import SCALES, show
from .errors import BadInput
from .report import minutes, outcome_on_record, record
from .results import Outcome, read_json, write_json
from .tables import ablation_words, count_words

_MARKED = re.compile(r"<!-- (?P<name>[\w.:-]+) -->(?P<text>.*?)<!-- /(?P=name) -->", re.DOTALL)


def collect(checkout: Checkout, folder: Path) -> list[str]:
    """Take over every finished run below a folder, then write all pages anew.

    Returns:
        A line for each thing done.

    Raises:
        BadInput: if there is no finished run, one was made with other parameters changed, or the notebook was
            edited since.
    """
    runs = [(path.parent, read_json(path)) for path in sorted(folder.glob("*/*/result.json"))]
    if not runs:
        raise BadInput(f"no finished run below {folder}: `reprise run` makes them")
    newest = {}
    for run, result in sorted(runs, key=lambda pair: pair[1]["provenance"]["finished"]):
        if result["paper"] in checkout.names() and _is_current(checkout, run, result):
            newest[result["paper"], result["scale"]] = run, result
    lines = []
    for (name, scale), (run, result) in newest.items():
        _take(checkout, name, scale, run, result)
        lines.append(f"{name} {scale}: from {run.name}, commit {result['provenance']['commit'][:12]}")
    lines += [f"{path.name}: executed" for path in _execute_guides(checkout)]
    return lines + [f"{path.relative_to(checkout.root)}: written" for path in write_pages(checkout)]


def _is_current(checkout: Checkout, run: Path, result: dict) -> bool:
    """Whether a run is of the published kind: the notebook as it stands, with its own parameters and seed."""
    notebook = notebooks.read(checkout.notebook(result["paper"]))
    same = notebooks.edit_hash(_as_written(run)) == notebooks.edit_hash(notebook)
    default_seed = result["provenance"]["seed"] == notebooks.parameters(notebook)["seed"].default
    return result["judged"] and default_seed and (same or result["scale"] == "full")


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
    shutil.copytree(run / "figures", figures)
    if scale == "quick":
        notebooks.write(notebooks.normalise(_as_written(run)), checkout.notebook(name))


def _execute_guides(checkout: Checkout) -> list[Path]:
    """Execute the notebooks that belong to no paper, which show what has been collected."""
    import nbclient

    guides = [path for path in sorted((checkout.root / "notebooks").glob("*.ipynb")) if path.stem not in checkout.index]
    for path in guides:
        notebook = notebooks.read(path)
        nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
        notebooks.write(notebooks.normalise(notebook), path)
    return guides


def pages(checkout: Checkout) -> list[Path]:
    """Every page with generated parts."""
    papers = checkout.root / "papers"
    candidates = [checkout.root / "README.md", papers / "README.md"]
    return [
        page
        for page in [*candidates, *(checkout.paper(name) / "README.md" for name in checkout.names())]
        if page.is_file()
    ]


def write_pages(checkout: Checkout) -> list[Path]:
    """Write the generated parts anew. Returns the pages that changed."""
    changed = []
    for page in pages(checkout):
        old = page.read_text(encoding="utf-8")
        new = regenerated(checkout, page)
        if new != old:
            page.write_text(new, encoding="utf-8")
            changed.append(page)
    return changed


def regenerated(checkout: Checkout, page: Path) -> str:
    """A page with its generated parts as the record has them now."""

    def fill(match: re.Match) -> str:
        name = match["name"]
        text = _content(checkout, page, name)
        if "\n" in match["text"]:
            text = f"\n{text}\n"
        return f"<!-- {name} -->{text}<!-- /{name} -->"

    return _MARKED.sub(fill, page.read_text(encoding="utf-8"))


def _content(checkout: Checkout, page: Path, name: str) -> str:
    """What belongs at a marker: ``papers``, ``index``, ``results``, or one value as ``paper.scale.claim``, with
    ``paper.scale.claim.without`` for the value without something."""
    if name == "papers":
        return _papers_table(checkout)
    if name == "index":
        return _index_table(checkout)
    if name == "results":
        return _results(checkout, page.parent.name)
    paper, scale, claim, *without = name.split(".")
    outcome = outcome_on_record(checkout, paper, scale)
    if outcome is None:
        return "not measured yet"
    try:
        values = outcome.without[without[0]] if without else outcome.measurements
        return str(values[claim])
    except KeyError:
        raise BadInput(f"{page.name} asks for {name}, which is not on record") from None


def _papers_table(checkout: Checkout) -> str:
    lines = ["| paper | quick: bundled data | full: the paper's data | time |", "|---|---|---|---|"]
    for name in checkout.names():
        claims = checkout.claims(name)
        quick, full = (count_words(outcome_on_record(checkout, name, scale)) for scale in SCALES)
        title = f"[{claims.title}](notebooks/{name}.ipynb) ({claims.year})"
        link = f"[{quick}](papers/{name}/README.md)"
        lines.append(f"| {title} | {link} | {full} | {minutes(checkout, name, 'quick')} |")
    return "\n".join(lines)


def _index_table(checkout: Checkout) -> str:
    lines = ["| | paper | year | status |", "|---|---|---|---|"]
    for number, (name, entry) in enumerate(checkout.index.items(), 1):
        present = name in checkout.names()
        title = f"[{entry['title']}]({name}/README.md)" if present else entry["title"]
        status = f"[here](../notebooks/{name}.ipynb)" if present else "planned"
        lines.append(
            f"| {number} | {title}, {entry['authors']} ([source]({entry['url']})) | {entry['year']} | {status} |"
        )
    return "\n".join(lines)


def _results(checkout: Checkout, name: str) -> str:
    parts = []
    for scale in SCALES:
        outcome = outcome_on_record(checkout, name, scale)
        parts.append(f"### {scale.capitalize()}\n")
        parts.append(_scale_table(outcome, record(checkout, name, scale)) if outcome else "not measured yet\n")
    missing = [c for c in checkout.claims(name).claims.values() if c.not_attempted]
    parts.append("### Not attempted\n\n" + "\n".join(f"- {c.text} ({c.where}): {c.not_attempted}" for c in missing))
    return "\n".join(parts)


def _scale_table(outcome: Outcome, result: dict) -> str:
    lines = ["| claim | where | the paper says | measured | holds when | verdict |", "|---|---|---|---|---|---|"]
    verdicts = outcome.verdicts()
    for claim in outcome.claims.at(outcome.scale):
        range_, value = claim.ranges[outcome.scale], outcome.measurements[claim.id]
        seeds = f" ({', '.join(show(one) for one in value.per_seed)})" if value.per_seed else ""
        verdict = f"**{verdicts[claim.id]}**" + (f": {range_.why}" if range_.why else "")
        cells = (claim.text, claim.where, claim.paper, f"{value}{seeds}", range_.words, verdict)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += ["", "| taken away | claim | measured then | |", "|---|---|---|---|"]
    for without, claim in outcome.claims.breaking(outcome.scale):
        value = outcome.without[without.id][claim.id]
        lines.append(f"| {without.removes} | {claim.id} | {value} | {ablation_words(without, claim, outcome)} |")
    facts = result["provenance"]
    packages = facts["packages"]
    lines += [
        "",
        f"Commit `{facts['commit'][:12]}`, seed {facts['seed']}, {facts['device']}, {facts['threads']} thread, "
        f"torch {packages.get('torch', '–')}, {facts['wall_seconds']:.0f} s, {facts['peak_memory_mb']} MB, "
        f"data {', '.join(facts['data']) or 'none'}; checksums in `results/{outcome.scale}.json`.",
        "",
    ]
    return "\n".join(lines)
