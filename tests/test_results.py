"""The record of a run: measurements as JSON, files that are whole or absent, and what differs from the record."""

from __future__ import annotations

import json
import math

import pytest

from reprise.lab.claims import Claim, Claims, Measurement, Range, Without, show
from reprise.lab.errors import BadInput
from reprise.lab.results import Outcome, from_json, measured, provenance, read_json, to_json, write_json
from reprise.lab.tables import ablation_words


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (measured(0.5, per_seed=[0.25, math.nan]), {"value": 0.5, "per_seed": (0.25, None)}),
        (measured(True), {"value": True}),
        (measured(3, censored="above"), {"value": 3.0, "censored": "above"}),
        (measured(math.nan), {"value": None, "reason": "not a number"}),
        (measured(-math.inf), {"value": None, "reason": "infinite"}),
    ],
)
def test_measurements_survive_json(value, kept):
    assert to_json(value) == kept
    assert from_json(to_json(value)) == value


@pytest.mark.parametrize(("value", "error"), [("0.5", TypeError), (None, TypeError), ([1.0], TypeError)])
def test_only_numbers_and_truths_are_measurements(value, error):
    with pytest.raises(error, match="a number or a truth value"):
        measured(value)
    with pytest.raises(ValueError, match="'above'"):
        measured(1.0, censored="sideways")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(24.0, "24"), (1234.0, "1,234"), (0.97333, "0.973"), (2.2e-16, "2.2e-16"), (True, "yes"), (None, "–")],
)
def test_values_are_shown_with_three_digits(value, shown):
    assert show(value) == shown


def test_a_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "result.json"
    assert read_json(path) is None
    write_json(path, {"words": "größer"})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"value": math.nan})
    assert read_json(path) == {"words": "größer"}
    path.write_text('{"value": 1', encoding="utf-8")
    with pytest.raises(BadInput, match=r"result\.json .* cannot be read .* delete it"):
        read_json(path)


def outcome(values: dict[str, float], taken_away: float | None, scale: str = "quick", judged: bool = True) -> Outcome:
    """Held against two claims: `holds` is expected to, `fails` is on record as failing; `w` must break the first."""
    claims = {
        "holds": Claim("holds", "experiment", "", "", ranges={"quick": Range(0, 1, "", "")}),
        "fails": Claim("fails", "experiment", "", "", ranges={"quick": Range(0, 1, "", "", why="too few steps")}),
        "later": Claim("later", "experiment", "", "", ranges={"full": Range(0, 1, "", "")}),
    }
    paper = Claims("p", "", (), 2015, "", {}, claims, {"w": Without("w", "the idea", ("holds",))})
    without = {} if taken_away is None else {"w": {"holds": Measurement(taken_away)}}
    return Outcome(paper, scale, {id: Measurement(value) for id, value in values.items()}, without, judged)


SURPRISES = [  # holds, fails, holds without the idea, what differs from the record
    (0.5, 2, 2, []),
    (2, 2, 2, ["holds does not hold here, but is on record as holding"]),
    (0.5, 0.5, 2, ["fails holds here, but is on record as failing"]),
    (0.5, 2, 0.5, ["holds should break without the idea, but does not"]),
]


@pytest.mark.parametrize(("holds", "fails", "taken_away", "surprises"), SURPRISES)
def test_what_differs_from_the_record(holds, fails, taken_away, surprises):
    values = {"holds": holds, "fails": fails}
    assert outcome(values, taken_away).surprises() == surprises
    assert outcome(values, taken_away, judged=False).surprises() == []
    assert outcome(values, taken_away, judged=False).verdicts() == {}


@pytest.mark.parametrize("value", [0.5, 2.0])
def test_what_fails_anyway_cannot_be_broken(value):
    one = outcome({"holds": 0.5, "fails": 2}, 2)
    without = Without("w", "the idea", ("fails",))
    one.claims.without["w"], one.without["w"] = without, {"fails": Measurement(value)}
    assert one.surprises() == []
    assert ablation_words(without, one.claims.claims["fails"], one) == "shows nothing: the claim does not hold anyway"


@pytest.mark.parametrize(
    ("taken_away", "surprises", "words"),
    [
        (0.5, [], "does not break: tuned well"),
        (2.0, ["later breaks without the idea, but is on record as unbroken"], "breaks, as it should"),
    ],
)
def test_what_is_known_not_to_break_at_full_scale(taken_away, surprises, words):
    one = outcome({"later": 0.5}, None, scale="full")
    without = Without("w", "the idea", ("later",), unbroken={"later": "tuned well"})
    one.claims.without["w"], one.without["w"] = without, {"later": Measurement(taken_away)}
    assert one.surprises() == surprises
    assert ablation_words(without, one.claims.claims["later"], one) == words


def test_what_is_missing():
    assert outcome({"holds": 0.5, "fails": 2}, 2).missing() == []
    assert outcome({"holds": 0.5}, None).missing() == ["fails", "holds without w"]
    assert outcome({}, None, scale="full").missing() == ["later"]


def test_a_result_survives_json_and_changes_of_the_claims():
    before = outcome({"holds": 0.5, "fails": 2}, 2)
    stored = json.loads(json.dumps(before.as_json()))
    assert Outcome.from_result(before.claims, stored).as_json() == before.as_json()
    del before.claims.claims["fails"], before.claims.without["w"]
    after = Outcome.from_result(before.claims, stored)
    assert (list(after.measurements), after.without) == (["holds"], {})


def test_provenance_says_where_and_on_what():
    import torch

    facts = provenance("cpu")
    assert torch.__version__.startswith(facts["packages"]["torch"])
    assert facts["device"] == "CPU"
    assert facts["threads"] == torch.get_num_threads()
    assert 10 < facts["peak_memory_mb"] < 100_000
