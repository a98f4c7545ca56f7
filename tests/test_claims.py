"""Ranges, verdicts, what counts as broken, and every way in which a claims.yaml can be wrong."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from reprise.lab.claims import NOT_ATTEMPTED, NOT_MEASURED, Claim, Measurement, Range, Without, load_claims
from reprise.lab.errors import BadInput
from reprise.lab.results import measured

GOOD = """
title: A Paper
authors: [Somebody, Somebody Else]
year: 2015
arxiv: "1502.03167"
data: {quick: [digits], full: [mnist]}
claims:
  - id: first
    kind: exact
    where: Equation 1
    claim: It is zero.
    records: deviation
    quick: {at_most: 1.0e-9, because: rounding}
    full: {at_most: 1.0e-9, because: rounding}
  - id: second
    where: Figure 1
    claim: It is faster.
    kind: experiment
    records: ratio
    quick: {at_least: 2, because: calibration}
    full: {at_least: 2, because: calibration, setting: as in the paper}
  - id: third
    where: Table 2
    claim: It is always faster.
    not_attempted: too large
without:
  - id: nothing-left
    removes: the idea
    breaks: [second]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "some_paper" / "claims.yaml"
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    return path


def read_range(folder: Path, range_: str) -> Range:
    text = GOOD.replace("quick: {at_least: 2, because: calibration}", f"quick: {{{range_}, because: x}}")
    return load_claims(write(folder, text)).claims["second"].ranges["quick"]


def test_everything_in_the_file_is_read(tmp_path):
    claims = load_claims(write(tmp_path, GOOD))
    assert (claims.name, claims.title, claims.year) == ("some_paper", "A Paper", 2015)
    assert claims.authors == ("Somebody", "Somebody Else")
    assert claims.url == "https://arxiv.org/abs/1502.03167"
    assert claims.data == {"quick": ("digits",), "full": ("mnist",)}
    assert list(claims.claims) == ["first", "second", "third"]
    assert [claim.id for claim in claims.at("quick")] == ["first", "second"]
    assert claims.claims["third"].not_attempted == "too large"
    assert [(w.removes, c.id) for w, c in claims.breaking("full")] == [("the idea", "second")]
    assert claims.claims["second"].ranges["full"].setting == "as in the paper"


def test_one_scale_may_be_not_attempted(tmp_path):
    text = GOOD.replace(
        "full: {at_least: 2, because: calibration, setting: as in the paper}", "full: {not_attempted: x}"
    )
    claims = load_claims(write(tmp_path, text))
    assert [claim.id for claim in claims.at("full")] == ["first"]
    assert claims.breaking("full") == []


RANGES = [  # as written, its words, values that hold, values that do not
    ("at_least: 2", "at least 2", [2, 2.5, 1e9], [1.999, -3, math.nan]),
    ("at_most: 0.5", "at most 0.5", [0.5, -7], [0.501, math.nan]),
    ("between: [1, 3]", "between 1 and 3", [1, 2, 3], [0.99, 3.01, math.nan]),
    ("at_least: 1, at_most: 3", "between 1 and 3", [1, 2, 3], [0.99, 3.01]),
    ("equals: 10, within: 0.5", "10 ± 0.5", [9.5, 10, 10.5], [9.4, 10.6]),
    ("is: true", "yes", [True], [False]),
    ("is: false", "no", [False], [True]),
]


@pytest.mark.parametrize(("written", "words", "inside", "outside"), RANGES)
def test_ranges(tmp_path, written, words, inside, outside):
    range_ = read_range(tmp_path, written)
    assert range_.words == words
    assert [range_.holds(Measurement(value)) for value in inside] == [True] * len(inside)
    assert [range_.holds(Measurement(value)) for value in outside] == [False] * len(outside)


CENSORED = [  # range, value, censored, whether it holds; None leaves it open
    ((5, math.inf), 6, "above", True),
    ((5, math.inf), 4, "above", None),
    ((5, math.inf), 4, "below", False),
    ((5, math.inf), 6, "below", None),
    ((-math.inf, 5), 6, "above", False),
    ((-math.inf, 5), 4, "above", None),
    ((-math.inf, 5), 4, "below", True),
    ((2, 5), 6, "above", False),
    ((2, 5), 3, "above", None),
    ((2, 5), 1, "below", False),
]


@pytest.mark.parametrize(("bounds", "value", "censored", "expected"), CENSORED)
def test_censored_measurements(bounds, value, censored, expected):
    range_ = Range(*bounds, words="", because="")
    claim = Claim("c", "experiment", "", "", ranges={"quick": range_})
    value = Measurement(value, censored=censored)
    assert range_.holds(value) is expected
    # What is left open neither holds nor counts as broken.
    assert (claim.verdict("quick", value) == "holds here") == (expected is True)
    assert Without("w", "", ("c",)).broken(claim, "quick", value) == (expected is False)


WORDS = [  # kind, scale, setting, words for holding, words for not holding
    ("exact", "quick", "", "holds", "fails"),
    ("exact", "full", "as in the paper", "holds", "fails"),
    ("experiment", "quick", "as in the paper", "holds here", "does not hold here"),
    ("experiment", "full", "a smaller network", "holds at reduced scale", "does not hold at reduced scale"),
    ("experiment", "full", "", "holds at reduced scale", "does not hold at reduced scale"),
    ("experiment", "full", "as in the paper", "reproduced", "not reproduced"),
]


@pytest.mark.parametrize(("kind", "scale", "setting", "good", "bad"), WORDS)
def test_words_of_verdicts(kind, scale, setting, good, bad):
    claim = Claim("c", kind, "", "", ranges={scale: Range(0, 1, "", "", setting)})
    assert claim.verdict(scale, Measurement(0.5)) == good
    assert claim.verdict(scale, Measurement(2)) == bad
    assert claim.verdict(scale, None) == NOT_MEASURED
    assert claim.verdict({"quick": "full", "full": "quick"}[scale], Measurement(0.5)) == NOT_ATTEMPTED


@pytest.mark.parametrize(("why", "as_on_record"), [("", [True, False]), ("too few steps", [False, True])])
def test_why_turns_the_record_round(why, as_on_record):
    claim = Claim("c", "experiment", "", "", ranges={"quick": Range(0, 1, "", "", why=why)})
    assert [claim.as_on_record("quick", Measurement(value)) for value in (0.5, 2)] == as_on_record


@pytest.mark.parametrize(("breaks_by", "broken"), [("", False), ("divergence", True)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_breaks_only_where_divergence_is_meant(breaks_by, broken, value):
    claim = Claim("c", "experiment", "", "", ranges={"quick": Range(-math.inf, 1, "", "")})
    assert Without("w", "", ("c",), breaks_by).broken(claim, "quick", measured(value)) is broken
    assert claim.verdict("quick", measured(value)) == "does not hold here"


SECOND = "quick: {at_least: 2, because: calibration}"
BAD = {  # what is wrong: (text to replace, its replacement, what the one line must name)
    "missing key": ("    where: Figure 1\n", "", "claim second: missing key where"),
    "missing at the top": ("title: A Paper\n", "", "top level: missing key title"),
    "missing in a without": ("    removes: the idea\n", "", "without nothing-left: missing key removes"),
    "missing scale": (f"    {SECOND}\n", "", "claim second: missing key quick"),
    "no because": (SECOND, "quick: {at_least: 2}", "claim second: quick: missing key because"),
    "no source": ('arxiv: "1502.03167"\n', "", "top level: missing key arxiv"),
    "unknown key": ("    claim: It is faster.", "    clam: x\n    claim: x", "claim second: unknown key clam"),
    "unknown range": (SECOND, "quick: {at_leest: 2, because: x}", "claim second: quick: unknown key at_leest"),
    "impossible range": (SECOND, "quick: {between: [3, 2], because: x}", "claim second: quick: impossible range"),
    "negative width": (SECOND, "quick: {equals: 3, within: -1, because: x}", "claim second: quick: impossible range"),
    "two kinds": (SECOND, "quick: {at_least: 2, equals: 3, within: 1, because: x}", "claim second: quick: a range is"),
    "half a kind": (SECOND, "quick: {equals: 3, because: x}", "claim second: quick: a range is"),
    "no bounds": (SECOND, "quick: {because: x}", "claim second: quick: a range is"),
    "one end": (SECOND, "quick: {between: [3], because: x}", "claim second: quick: a range is"),
    "1e-9 is text": ("quick: {at_most: 1.0e-9", "quick: {at_most: 1e-9", "claim first: quick: at_most: '1e-9' is not"),
    "truth as number": (SECOND, "quick: {at_least: true, because: x}", "claim second: quick: at_least: True is not"),
    "not finite": (SECOND, "quick: {at_least: .nan, because: x}", "claim second: quick: at_least: nan is not"),
    "duplicate claim": ("id: second", "id: first", "claims: first: duplicate id"),
    "duplicate without": (
        "without:\n",
        "without:\n  - {id: nothing-left, removes: x, breaks: [second]}\n",
        "without: nothing-left: duplicate id",
    ),
    "breaks the unknown": ("breaks: [second]", "breaks: [fourth]", "without nothing-left: breaks fourth, which is not"),
    "breaks as text": ("breaks: [second]", "breaks: second", "without nothing-left: breaks: expected a list"),
    "unknown breaks_by": ("breaks: [second]", "breaks: [second]\n    breaks_by: x", "without nothing-left: breaks_by"),
    "unbroken": ("breaks: [second]", "breaks: [first]", "claim second: nothing taken away breaks it"),
    "unknown kind": ("kind: exact", "kind: inexact", "claim first: kind is 'inexact'"),
    "authors as text": (
        "authors: [Somebody, Somebody Else]",
        "authors: Somebody",
        "top level: authors: expected a list",
    ),
    "year as text": ("year: 2015", "year: long ago", "top level: year"),
    "arxiv as number": ('arxiv: "1502.03167"', "arxiv: 1502.03160", "top level: arxiv"),
    "data as text": ("quick: [digits]", "quick: digits", "data: quick: expected a list"),
    "claim as text": ("claims:\n", "claims:\n  - nothing\n", "claim 1: expected keys and values, found str"),
}


@pytest.mark.parametrize(("old", "new", "named"), BAD.values(), ids=BAD)
def test_a_wrong_file_is_one_line_that_names_the_entry(tmp_path, old, new, named):
    assert old in GOOD
    refused(write(tmp_path, GOOD.replace(old, new)), named)


WHOLE = {
    "not YAML": ("title: [", "is not readable as YAML"),
    "empty": ("", "top level: expected keys and values, found NoneType"),
    "a list": ("- title", "top level: expected keys and values, found list"),
    **{f"claims {claims!r}": (claims, "claims: expected a list") for claims in ("first", 3, {"id": "first"})},
    "no claims": ([], "claims: no claims"),
}


@pytest.mark.parametrize(("content", "named"), WHOLE.values(), ids=WHOLE)
def test_a_file_that_is_no_list_of_claims(tmp_path, content, named):
    if not isinstance(content, str) or content == "first":
        content = yaml.safe_dump({**yaml.safe_load(GOOD), "claims": content})
    refused(write(tmp_path, content), named)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"some_paper/claims\.yaml does not exist"):
        load_claims(tmp_path / "some_paper" / "claims.yaml")


def refused(path: Path, named: str) -> None:
    with pytest.raises(BadInput) as caught:
        load_claims(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith("some_paper/claims.yaml")
    assert named in message
