"""Ranges are neither wishful nor toothless: recomputed from the calibration seeds in ``papers/<name>/spread.json``.

A bound that a claim is expected to meet lies within three standard deviations of the calibration mean on the side
where the claim would fail, and what was measured without the trick lies outside the range.
"""

import json
import math
import statistics

import pytest

from reprise.lab.checkout import Checkout
from reprise.lab.claims import Measurement

CHECKOUT = Checkout.find()
CALIBRATED = [name for name in CHECKOUT.names() if (CHECKOUT.paper(name) / "spread.json").is_file()]

# A bound that follows from the data alone, not from runs; its `because` says how.
PRINCIPLED = {("batch_norm", "both-fail"), ("batch_norm", "careful-start-ties")}


def test_every_paper_is_calibrated():
    assert CHECKOUT.names() == CALIBRATED


def cases():
    for name in CALIBRATED:
        spread = json.loads((CHECKOUT.paper(name) / "spread.json").read_text(encoding="utf-8"))
        for claim in CHECKOUT.claims(name).at("quick"):
            if claim.kind == "experiment" and not claim.ranges["quick"].why:
                yield pytest.param(name, claim, spread, id=f"{name}-{claim.id}")


@pytest.mark.parametrize(("name", "claim", "spread"), list(cases()))
def test_range_is_within_three_deviations(name, claim, spread):
    values = list(spread["measurements"][claim.id].values())
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    range_ = claim.ranges["quick"]
    assert all(range_.low <= value <= range_.high for value in values), "a calibration seed lies outside the range"
    if (name, claim.id) in PRINCIPLED:
        return
    slack = 3 * deviation + 1e-9 * abs(mean)
    measured = f"{mean:.4g} ± {deviation:.2g}"
    assert range_.low == -math.inf or range_.low >= mean - slack, f"{range_.low} is too low for {measured}"
    assert range_.high == math.inf or range_.high <= mean + slack, f"{range_.high} is too high for {measured}"


@pytest.mark.parametrize(("name", "claim", "spread"), list(cases()))
def test_range_leaves_out_the_value_without_the_trick(name, claim, spread):
    claims = CHECKOUT.claims(name)
    for without in claims.without.values():
        if claim.id in without.breaks:
            for seed, value in spread["without"][without.id][claim.id].items():
                assert without.broken(claim, "quick", Measurement(value)), f"seed {seed}: {value} without {without.id}"
