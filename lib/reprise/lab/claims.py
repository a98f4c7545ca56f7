"""Claims: what a paper says, the range that counts as holding, and the verdict on a measurement.

A paper's claims are data, in ``papers/<name>/claims.yaml``. The notebook measures; this module judges.
It knows nothing of notebooks, models or files of results.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from .errors import BadInput

SCALES = ("quick", "full")
NOT_ATTEMPTED = "not attempted"
NOT_MEASURED = "not measured yet"


@dataclass(frozen=True)
class Measurement:
    """One measured value.

    ``value`` is a number, a truth value, or None with a ``reason`` (not a number, infinite).
    ``censored`` says that the true value lies beyond: ``"above"`` (at least ``value``: the run ended before
    the event) or ``"below"`` (at most ``value``).
    """

    value: float | bool | None
    per_seed: tuple[float, ...] | None = None
    censored: str | None = None
    reason: str | None = None

    def __str__(self) -> str:
        sign = {"above": "≥ ", "below": "≤ ", None: ""}[self.censored]
        return self.reason or sign + show(self.value)


@dataclass(frozen=True)
class Range:
    """The values that count as holding at one scale, and why just these."""

    low: float
    high: float
    words: str
    because: str
    setting: str = ""
    why: str = ""

    def holds(self, measured: Measurement) -> bool | None:
        """True or False, or None where a censored measurement leaves it open."""
        if measured.value is None or math.isnan(measured.value):
            return False
        least = -math.inf if measured.censored == "below" else float(measured.value)
        most = math.inf if measured.censored == "above" else float(measured.value)
        if self.low <= least and most <= self.high:
            return True
        return False if most < self.low or least > self.high else None


@dataclass(frozen=True)
class Claim:
    """One claim of a paper. ``ranges`` has an entry for each scale at which the claim is attempted."""

    id: str
    kind: str
    where: str
    text: str
    paper: str = ""
    records: str = ""
    ranges: dict[str, Range] = field(default_factory=dict)
    not_attempted: str = ""
    unbroken_because: str = ""

    def verdict(self, scale: str, measured: Measurement | None) -> str:
        """The words of the table for what was measured at a scale (None: not measured)."""
        if scale not in self.ranges:
            return NOT_ATTEMPTED
        if measured is None:
            return NOT_MEASURED
        holds = self.ranges[scale].holds(measured) is True
        if self.kind == "exact":
            return "holds" if holds else "fails"
        if scale == "quick":
            return "holds here" if holds else "does not hold here"
        if self.ranges[scale].setting == "as in the paper":
            return "reproduced" if holds else "not reproduced"
        return "holds at reduced scale" if holds else "does not hold at reduced scale"

    def as_on_record(self, scale: str, measured: Measurement) -> bool:
        """Whether the outcome is the one on record: holding, or failing where ``why`` explains a failure."""
        expected = not self.ranges[scale].why
        return (self.ranges[scale].holds(measured) is True) == expected


@dataclass(frozen=True)
class Without:
    """Something taken away, and the claims that must then break; ``unbroken``: {claim: why it does not, at full}."""

    id: str
    removes: str
    breaks: tuple[str, ...]
    breaks_by: str = ""
    unbroken: dict[str, str] = field(default_factory=dict)

    def broken(self, claim: Claim, scale: str, measured: Measurement) -> bool:
        """Whether the claim falls outside its range. A value that is not finite counts only for ``divergence``."""
        if measured.value is None:
            return self.breaks_by == "divergence"
        return claim.ranges[scale].holds(measured) is False


@dataclass(frozen=True)
class Claims:
    """The content of one claims.yaml."""

    name: str
    title: str
    authors: tuple[str, ...]
    year: int
    url: str
    data: dict[str, tuple[str, ...]]
    claims: dict[str, Claim]
    without: dict[str, Without]

    def at(self, scale: str) -> list[Claim]:
        """The claims attempted at a scale, in the order of the file."""
        return [claim for claim in self.claims.values() if scale in claim.ranges]

    def breaking(self, scale: str) -> list[tuple[Without, Claim]]:
        """Every (what is taken away, claim it must break) of a scale."""
        pairs = [(w, self.claims[id]) for w in self.without.values() for id in w.breaks]
        return [(w, claim) for w, claim in pairs if scale in claim.ranges]


def show(value: float | bool | None) -> str:
    """A measured value as the tables print it: three significant digits, no trailing zeros.

    >>> [show(v) for v in (24.0, 0.97333, 3.1e-16, True, None)]
    ['24', '0.973', '3.1e-16', 'yes', '–']
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.3g}"


def load_claims(path: Path) -> Claims:
    """Read and check a claims.yaml.

    Raises:
        BadInput: naming the file, the entry and what is wrong with it.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path.parent.name}/{path.name} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first_line = " ".join(str(error).split())
        raise BadInput(f"{path.parent.name}/{path.name} is not readable as YAML: {first_line}") from None
    return _Reader(f"{path.parent.name}/{path.name}").paper(path.parent.name, data)


class _Reader:
    """Turns the parsed YAML into Claims, with errors that name the entry."""

    def __init__(self, file: str):
        self.file = file

    def fail(self, entry: str, problem: str) -> BadInput:
        return BadInput(f"{self.file}: {entry}: {problem}")

    def check_keys(self, entry: str, data: object, required: set[str], optional: set[str]) -> dict:
        if not isinstance(data, dict):
            raise self.fail(entry, f"expected keys and values, found {type(data).__name__}")
        if missing := sorted(required - data.keys()):
            raise self.fail(entry, f"missing key {', '.join(missing)}")
        if unknown := sorted(str(key) for key in data.keys() - required - optional):
            raise self.fail(entry, f"unknown key {', '.join(unknown)}")
        return data

    def items(self, entry: str, data: object) -> list:
        if not isinstance(data, list | None):  # a single word would else be taken for a list of letters
            raise self.fail(entry, f"expected a list, found {type(data).__name__}")
        return data or []

    def paper(self, name: str, data: object) -> Claims:
        data = self.check_keys(
            "top level", data, {"title", "authors", "year", "data", "claims"}, {"arxiv", "url", "without"}
        )
        if not data.get("arxiv") and not data.get("url"):
            raise self.fail("top level", "missing key arxiv (or url)")
        for key, kind, words in (("year", int, "a number"), ("arxiv", str, "text (put it in quotes)")):
            if not isinstance(data.get(key, kind()), kind):
                raise self.fail("top level", f"{key}: {data[key]!r} is not {words}")
        self.check_keys("data", data["data"], {"quick", "full"}, set())
        entries = enumerate(self.items("claims", data["claims"]), 1)
        claims = self.unique("claims", [self.claim(i, entry) for i, entry in entries])
        entries = enumerate(self.items("without", data.get("without")), 1)
        without = self.unique("without", [self.without(i, entry, claims) for i, entry in entries])
        self.check_everything_breaks(claims, without)
        return Claims(
            name=name,
            title=str(data["title"]),
            authors=tuple(self.items("top level: authors", data["authors"])),
            year=data["year"],
            url=data.get("url") or f"https://arxiv.org/abs/{data['arxiv']}",
            data={scale: tuple(self.items(f"data: {scale}", data["data"][scale])) for scale in SCALES},
            claims=claims,
            without=without,
        )

    def unique(self, section: str, entries: list) -> dict:
        if not entries and section == "claims":
            raise self.fail(section, "no claims")
        by_id = {entry.id: entry for entry in entries}
        for entry in entries:
            if by_id[entry.id] is not entry:
                raise self.fail(f"{section}: {entry.id}", "duplicate id")
        return by_id

    def claim(self, number: int, data: object) -> Claim:
        entry = f"claim {number}"
        if isinstance(data, dict) and "id" in data:
            entry = f"claim {data['id']}"
        attempted = not (isinstance(data, dict) and "not_attempted" in data)
        required = {"id", "where", "claim"} | ({"kind", "records", *SCALES} if attempted else {"not_attempted"})
        data = self.check_keys(entry, data, required, {"kind", "paper", "records", "unbroken_because"})
        kind = data.get("kind", "experiment")
        if kind not in ("exact", "experiment"):
            raise self.fail(entry, f"kind is {kind!r}, not exact or experiment")
        ranges = {scale: self.range(f"{entry}: {scale}", data[scale]) for scale in SCALES if attempted}
        return Claim(
            id=str(data["id"]),
            kind=kind,
            where=str(data["where"]),
            text=str(data["claim"]),
            paper=str(data.get("paper", "")),
            records=str(data.get("records", "")),
            ranges={scale: range_ for scale, range_ in ranges.items() if range_ is not None},
            not_attempted=str(data.get("not_attempted", "")),
            unbroken_because=str(data.get("unbroken_because", "")),
        )

    def range(self, entry: str, data: object) -> Range | None:
        if isinstance(data, dict) and set(data) == {"not_attempted"}:
            return None
        bounds = {"at_least", "at_most", "between", "equals", "within", "is"}
        data = self.check_keys(entry, data, {"because"}, bounds | {"setting", "why"})
        given = {key: data[key] for key in sorted(bounds & data.keys())}
        for key, value in given.items():
            numbers = value if key == "between" and isinstance(value, list) else [value]
            if key != "is" and not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
                raise self.fail(entry, f"{key}: {value!r} is not a number (write 1.0e-9, not 1e-9)")
        match given:
            case {"at_least": low, "at_most": high, **rest} if not rest:
                words = f"between {show(low)} and {show(high)}"
            case {"at_least": low, **rest} if not rest:
                high, words = math.inf, f"at least {show(low)}"
            case {"at_most": high, **rest} if not rest:
                low, words = -math.inf, f"at most {show(high)}"
            case {"between": [low, high], **rest} if not rest:
                words = f"between {show(low)} and {show(high)}"
            case {"equals": middle, "within": width, **rest} if not rest:
                low, high, words = middle - width, middle + width, f"{show(middle)} ± {show(width)}"
            case {"is": bool(truth), **rest} if not rest:
                low, high, words = float(truth), float(truth), show(truth)
            case _:
                raise self.fail(
                    entry,
                    "a range is one of at_least, at_most, between: [low, high], equals with within, is: true; "
                    f"found {', '.join(given) or 'none'}",
                )
        if low > high:
            raise self.fail(entry, f"impossible range: nothing lies {words}")
        return Range(low, high, words, str(data["because"]), str(data.get("setting", "")), str(data.get("why") or ""))

    def without(self, number: int, data: object, claims: dict[str, Claim]) -> Without:
        entry = f"without {data['id'] if isinstance(data, dict) and 'id' in data else number}"
        data = self.check_keys(entry, data, {"id", "removes", "breaks"}, {"breaks_by", "unbroken_at_full"})
        breaks = tuple(self.items(f"{entry}: breaks", data["breaks"]))
        if strangers := [id for id in breaks if id not in claims]:
            raise self.fail(entry, f"breaks {strangers[0]}, which is not a claim")
        if data.get("breaks_by") not in (None, "divergence"):
            raise self.fail(entry, f"breaks_by is {data['breaks_by']!r}; the only choice is divergence")
        unbroken = self.check_keys(entry, data.get("unbroken_at_full", {}), set(), set(breaks))
        return Without(str(data["id"]), str(data["removes"]), breaks, data.get("breaks_by") or "", unbroken)

    def check_everything_breaks(self, claims: dict[str, Claim], without: dict[str, Without]) -> None:
        broken = {id for entry in without.values() for id in entry.breaks}
        for claim in claims.values():
            expected_to_hold = "quick" in claim.ranges and not claim.ranges["quick"].why
            excused = claim.kind == "exact" or claim.unbroken_because or claim.id in broken
            if expected_to_hold and not excused:
                raise self.fail(f"claim {claim.id}", "nothing taken away breaks it; add a without, or unbroken_because")
