"""The generated parts of README and of the papers' pages.

Text between ``<!-- name -->`` and ``<!-- /name -->`` in a page belongs to this module; the rest to its author.
"""

from __future__ import annotations

import re
from pathlib import Path

from .checkout import Checkout
from .claims import NOT_MEASURED, SCALES, Claim, Measurement, show
from .errors import BadInput
from .report import minutes, other_seeds, outcome_on_record, record
from .results import Outcome
from .tables import ablation_words, count_words, seconds

_MARKED = re.compile(r"<!-- (?P<name>[\w.:-]+) -->(?P<text>.*?)<!-- /(?P=name) -->", re.DOTALL)


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
        return papers_table(checkout)
    if name == "index":
        return _index_table(checkout)
    if name == "results":
        return _results(checkout, page.parent.name)
    paper, scale, claim, without, *more = [*name.split("."), "", "", ""]
    claims = checkout.claims(paper) if paper in checkout.names() else None
    known = claims and scale in SCALES and claim in claims.claims and not any(more)
    if not known or (without and without not in claims.without):
        raise BadInput(f"{page.name}: the marker {name} is neither papers, index, results nor paper.scale.claim")
    outcome = outcome_on_record(checkout, paper, scale)
    if outcome is None:
        return NOT_MEASURED
    values = outcome.without.get(without, {}) if without else outcome.measurements
    return str(values.get(claim, NOT_MEASURED))


def papers_table(checkout: Checkout, to_root: str = "") -> str:
    """The papers that are present with what is on record for them; ``to_root`` leads from the page to the root."""
    lines = ["| paper | quick: bundled data | full: the paper's data | quick takes |", "|---|---|---|---|"]
    for name in checkout.names():
        claims = checkout.claims(name)
        quick, full = (count_words(outcome_on_record(checkout, name, scale)) for scale in SCALES)
        title = f"[{claims.title}]({to_root}notebooks/{name}.ipynb) ({claims.year})"
        link = f"[{quick}]({to_root}papers/{name}/README.md)"
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
        if outcome is None:
            parts.append(f"{NOT_MEASURED}\n")
            continue
        result = record(checkout, name, scale)
        parts += [_scale_table(outcome), _provenance(result["provenance"], scale)]
        if others := other_seeds(checkout, name, scale):
            parts.append(_seeds_table(outcome, str(result["provenance"]["seed"]), others))
    if missing := [c for c in checkout.claims(name).claims.values() if c.not_attempted]:
        lines = [f"- {c.text} ({c.where}): {c.not_attempted}" for c in missing]
        parts.append("### Not attempted\n\n" + "\n".join(lines))
    return "\n".join(parts)


def _scale_table(outcome: Outcome) -> str:
    lines = ["| claim | where | the paper says | measured | holds when | verdict |", "|---|---|---|---|---|---|"]
    verdicts = outcome.verdicts()
    for claim in outcome.claims.at(outcome.scale):
        range_, value = claim.ranges[outcome.scale], outcome.measurements.get(claim.id, Measurement(None))
        seeds = f" ({', '.join(show(one) for one in value.per_seed)})" if value.per_seed else ""
        verdict = f"**{verdicts[claim.id]}**" + (f": {range_.why}" if range_.why else "")
        cells = (claim.text, claim.where, claim.paper, f"{value}{seeds}", range_.words, verdict)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += ["", "| taken away | claim | measured then | |", "|---|---|---|---|"]
    for without, claim in outcome.claims.breaking(outcome.scale):
        if value := outcome.without.get(without.id, {}).get(claim.id):
            lines.append(f"| {without.removes} | {claim.id} | {value} | {ablation_words(without, claim, outcome)} |")
    return "\n".join([*lines, ""])


def _provenance(facts: dict, scale: str) -> str:
    """On what the numbers of a table were measured."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["packages"].items() if name != "reprise")
    data = ", ".join(f"{name} `{checksum[:8]}`" for name, checksum in facts["data"].items())
    memory = f"{facts['peak_memory_mb']:,} MB"
    if "peak_device_memory_mb" in facts:
        memory += f" and {facts['peak_device_memory_mb']:,} MB on the device"
    resumed = f" ({len(facts['resumed'])} trainings from checkpoints)" if facts.get("resumed") else ""
    where = [facts["device"], facts.get("processor"), facts["system"], f"{facts['threads']} thread"]
    return (
        f"Seed {facts['seed']}, commit `{facts['commit'][:12]}`, finished {facts['finished'][:10]}. "
        f"{', '.join(filter(None, where))}; {seconds(facts['wall_seconds'])}{resumed}, at most {memory}. "
        f"Python {facts['python']}, {versions}. Data, with the first digits of what was loaded from it: "
        f"{data or 'none'}; all of it is in `results/{scale}.json`.\n"
    )


def _seeds_table(outcome: Outcome, default: str, others: dict[str, dict]) -> str:
    """The experiments' measurements side by side; bold is what has another verdict than the published one."""
    seeds = {default: outcome} | {s: Outcome.from_result(outcome.claims, result) for s, result in others.items()}
    lines = ["| the same with seed | " + " | ".join(seeds) + " |", "|---" * (len(seeds) + 1) + "|"]
    for claim in outcome.claims.at(outcome.scale):
        if claim.kind == "experiment":
            cells = [_seed_cell(claim, outcome, one) for one in seeds.values()]
            lines.append(f"| {claim.id} | " + " | ".join(cells) + " |")
    commits = sorted({result["provenance"]["commit"][:12] for result in others.values()})
    devices = sorted({result["provenance"]["device"] for result in others.values()})
    lines += ["", f"Bold: another verdict. Commit {', '.join(f'`{c}`' for c in commits)}; {', '.join(devices)}.", ""]
    return "\n".join(lines)


def _seed_cell(claim: Claim, published: Outcome, one: Outcome) -> str:
    value, verdicts = one.measurements.get(claim.id), one.verdicts()
    if value is None:
        return NOT_MEASURED
    return f"{value}" if verdicts[claim.id] == published.verdicts()[claim.id] else f"**{value}**"
