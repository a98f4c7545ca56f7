"""Claims and verdicts as tables: in a notebook, in a terminal, in the pages of the papers."""

from __future__ import annotations

from html import escape

from .claims import NOT_ATTEMPTED, Claim, Without, show
from .results import Outcome

_GOOD = ("holds", "holds here", "holds at reduced scale", "reproduced")


def align(rows: list[tuple[str, ...]], gap: str = "  ") -> str:
    """Rows of text as columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [gap.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def ablation_words(without: Without, claim: Claim, outcome: Outcome) -> str:
    value = outcome.without[without.id][claim.id]
    if not outcome.judged:
        return ""
    if claim.ranges[outcome.scale].why:
        return "shows nothing: the claim does not hold anyway"
    if without.broken(claim, outcome.scale, value):
        return "breaks, as it should"
    reason = without.unbroken.get(claim.id) if outcome.scale == "full" else None
    return f"does not break: {reason}" if reason else "does not break"


def verdicts_text(outcome: Outcome) -> str:
    """Ids, ranges and words: nothing that changes from one machine to the next."""
    if not outcome.judged:
        return "No verdicts: other parameters than seed, device and scale were changed."
    verdicts = outcome.verdicts()
    rows = [("claim", "holds when", "verdict")]
    rows += [(c.id, c.ranges[outcome.scale].words, verdicts[c.id]) for c in outcome.claims.at(outcome.scale)]
    rows += [
        (f"{claim.id} without {without.id}", "outside it", ablation_words(without, claim, outcome))
        for without, claim in outcome.claims.breaking(outcome.scale)
    ]
    rows += [(c.id, "", NOT_ATTEMPTED) for c in outcome.claims.claims.values() if outcome.scale not in c.ranges]
    return align(rows)


def outcome_text(outcome: Outcome) -> str:
    """Claims, measurements and verdicts for a terminal."""
    verdicts = outcome.verdicts()
    rows = [("claim", "measured", "holds when", "verdict")]
    for claim in outcome.claims.at(outcome.scale):
        value = str(outcome.measurements[claim.id])
        rows.append((claim.id, value, claim.ranges[outcome.scale].words, verdicts.get(claim.id, "")))
    for without, claim in outcome.claims.breaking(outcome.scale):
        value = str(outcome.without[without.id][claim.id])
        rows.append((f"  {claim.id} without {without.id}", value, "", ablation_words(without, claim, outcome)))
    return align(rows)


def outcome_html(outcome: Outcome) -> str:
    """Claims, measurements and verdicts for a notebook."""
    claims, scale = outcome.claims, outcome.scale
    cell = "text-align:left;vertical-align:top;padding:.45em .7em"
    rows = []
    for claim in claims.at(scale):
        range_ = claim.ranges[scale]
        words = outcome.verdicts().get(claim.id, "no verdict: parameters were changed")
        mark = "" if not outcome.judged else "✓ " if words in _GOOD else "✗ "
        told = f"{escape(claim.text)}<br><small>{escape(claim.where)} · recorded: {escape(claim.records)}</small>"
        reason = f"<br><small>{escape(range_.why)}</small>" if range_.why else ""
        measured = f"<b>{escape(str(outcome.measurements[claim.id]))}</b>"
        for without, broken in claims.breaking(scale):
            if broken is claim:
                value = escape(str(outcome.without[without.id][claim.id]))
                note = ablation_words(without, claim, outcome)
                measured += f"<br><small>without {escape(without.removes)}: {value}{', ' * bool(note)}{note}</small>"
        columns = (told, escape(claim.paper), measured, escape(range_.words), f"{mark}{escape(words)}{reason}")
        rows.append("<tr>" + "".join(f'<td style="{cell}">{column}</td>' for column in columns) + "</tr>")
    for claim in claims.claims.values():
        if scale not in claim.ranges:
            told = f"{escape(claim.text)}<br><small>{escape(claim.where)}</small>"
            why = f"{NOT_ATTEMPTED}<br><small>{escape(claim.not_attempted)}</small>"
            columns = (told, escape(claim.paper), "", "", why)
            rows.append("<tr>" + "".join(f'<td style="{cell}">{column}</td>' for column in columns) + "</tr>")
    head = "".join(
        f'<th style="{cell}">{title}</th>' for title in ("claim", "the paper says", "measured", "holds when", "verdict")
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def count_words(outcome: Outcome | None) -> str:
    """``9 of 12 hold`` for a line of an overview; what is on record as failing counts as not holding."""
    if outcome is None:
        return "not measured yet"
    words = list(outcome.verdicts().values())
    return f"{sum(word in _GOOD for word in words)} of {len(words)} hold"


def seconds(value: float) -> str:
    """A duration: ``48 s``, ``3 min``, ``2.5 h``."""
    if value < 90:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{show(round(value / 3600, 1))} h"
