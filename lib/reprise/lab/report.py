"""What is on record: the collected results of every paper, as objects and as tables."""

from __future__ import annotations

from .checkout import Checkout
from .claims import NOT_ATTEMPTED, SCALES
from .results import Outcome, read_json, to_json
from .tables import align, seconds


def record(checkout: Checkout, name: str, scale: str) -> dict | None:
    """The collected result of a paper at a scale, or None."""
    return read_json(checkout.paper(name) / "results" / f"{scale}.json")


def outcome_on_record(checkout: Checkout, name: str, scale: str) -> Outcome | None:
    """The same, held against the claims as they stand now."""
    result = record(checkout, name, scale)
    return Outcome.from_result(checkout.claims(name), result) if result else None


def other_seeds(checkout: Checkout, name: str, scale: str) -> dict[str, dict]:
    """Results of other seeds than the default one, by seed."""
    return (read_json(checkout.paper(name) / "spread.json") or {}).get(scale, {})


def minutes(checkout: Checkout, name: str, scale: str) -> str:
    """How long the recorded run took."""
    result = record(checkout, name, scale)
    return seconds(result["provenance"]["wall_seconds"]) if result else "not run yet"


def claim_objects(checkout: Checkout, name: str) -> list[dict]:
    """One object for each claim of a paper, in the order of claims.yaml."""
    claims = checkout.claims(name)
    outcomes = {scale: outcome_on_record(checkout, name, scale) for scale in SCALES}
    objects = []
    for claim in claims.claims.values():
        one = {
            "paper": name,
            "id": claim.id,
            "kind": claim.kind,
            "where": claim.where,
            "claim": claim.text,
            "paper_says": claim.paper,
        }
        for scale in SCALES:
            value = outcomes[scale].measurements.get(claim.id) if outcomes[scale] else None
            verdict = NOT_ATTEMPTED if claim.not_attempted else claim.verdict(scale, value)
            one[scale] = {**(to_json(value) if value else {"value": None}), "verdict": verdict}
        one["without"] = {
            without.id: {
                scale: {**to_json(value), "breaks": without.broken(claim, scale, value)}
                for scale in claim.ranges
                if outcomes[scale] and (value := outcomes[scale].without.get(without.id, {}).get(claim.id))
            }
            for without in claims.without.values()
            if claim.id in without.breaks
        }
        objects.append(one)
    return objects


def report_text(objects: list[dict]) -> str:
    rows = [("paper", "claim", "where", "quick", "full")]
    rows += [(o["paper"], o["id"], o["where"], o["quick"]["verdict"], o["full"]["verdict"]) for o in objects]
    return align(rows)
