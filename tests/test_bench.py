"""The benchmark itself: that it compares like with like, and that the page's table is the one it writes."""

from __future__ import annotations

import re

import bench
import pytest
import torch
from bench_kernels import COMPARISONS
from devices import NEEDS_GPP


@NEEDS_GPP
@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda c: c.title(c.size("cuda")))
def test_ours_and_the_peers_compute_the_same(comparison, monkeypatch):
    monkeypatch.setattr(bench, "timed", lambda work, device: bench.Timing([1.0, 2.0, 3.0, 4.0]))
    lines = bench.kernel_rows(comparison, torch.device("cpu"), copy=0)
    assert [line[1] for line in lines] == comparison.who("cpu")
    assert all(line[2:6] == ("2.500", "2.500", "", "1.00") for line in lines)


@NEEDS_GPP
def test_a_peer_that_computes_something_else_is_found(monkeypatch):
    comparison = COMPARISONS[0]
    works = comparison.works(comparison.size("cpu"), torch.device("cpu"))
    wrong = works | {"wrong": lambda: [torch.zeros(comparison.size("cpu"))]}
    monkeypatch.setattr(type(comparison), "works", lambda *_: wrong)
    with pytest.raises(AssertionError, match="wrong: "):
        bench.kernel_rows(comparison, torch.device("cpu"), copy=0)


def test_the_ways_of_sampling_draw_the_same_and_are_scaled_by_positions(monkeypatch):
    clock = iter(range(10**6))  # every call takes one second
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    lines = bench.sampling_rows(2, torch.device("cpu"), repeats=2, size=12)
    assert lines[0][:3] == ("sampling 2x1x12x12", "ours, cached", "1000.000")
    # 12 of 144 positions are left to the naive way; the row in the middle sees 7 of them, all rows together 75.
    assert [line[1:3] for line in lines[1:]] == [
        ("naive, extrapolated from one row", "12000.000"),
        ("restricted, extrapolated from one row", f"{1000 * 75 / 7:.3f}"),
    ]


def test_medians_and_spreads():
    timing = bench.timed(lambda: None, torch.device("cpu"), repeats=8)
    assert len(timing.calls) == 8
    timing = bench.Timing([4.0, 1.0, 2.0, 3.0, 100.0])
    assert timing.median == 3
    assert timing.spread == pytest.approx(52 - 1.5)


def test_the_pages_table_is_the_benchmarks():
    page = bench.PAGE.read_text(encoding="utf-8")
    rows = [tuple(re.split(r" ?\| ?", line)[1:-1]) for line in page.splitlines() if line.startswith("| ")]
    start = rows.index(bench.HEAD)
    expected = bench.unmeasured()
    shown = rows[start + 2 : start + 2 + len(expected)]
    assert [row[:2] for row in shown] == [row[:2] for row in expected], "sizes or peers changed: make gpu"
    numbers = [row[2] for row in shown]
    assert all(number == bench.UNKNOWN or float(number) > 0 for number in numbers)
    # All measured in one run, or none.
    assert len({number == bench.UNKNOWN for number in numbers}) == 1


def test_only_the_table_is_written_anew():
    page = "before\n<!-- speed -->\nold\n| a |\n<!-- /speed -->\nafter\n"
    lines = [("op", "ours", "1.000", "0.1", "0.05", "1.00", r"80 \g<1>")]
    new = bench.written(page, "a GPU", lines)
    assert new.startswith("before\n<!-- speed -->\na GPU\n\n| operation | who |")
    assert new.endswith("| op | ours | 1.000 | 0.1 | 0.05 | 1.00 | 80 \\g<1> |\n<!-- /speed -->\nafter\n")
    assert "old" not in new
    assert bench.written(new, "a GPU", lines) == new
