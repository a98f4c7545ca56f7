"""Trainings: the same seed gives the same bits, batches are fair, and what goes wrong is named at its step."""

from __future__ import annotations

import json
import math
import random
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reprise import progress
from reprise.invariants import InvariantError, NotFinite
from reprise.training import Batches, accuracy, pick_device, seed_everything, spawn_seeds, sweep, train

IMAGES, LABELS = torch.rand(300, 8, generator=torch.Generator().manual_seed(1)), torch.arange(300) % 3


def network() -> nn.Sequential:
    seed_everything(0, "network")
    return nn.Sequential(nn.Linear(8, 6), nn.Sigmoid(), nn.Linear(6, 3))


def fit(
    name: str, steps: int, seed: int = 0, model: nn.Module | None = None, batches: Batches | None = None, **options
):
    """Train a small network; the training and its model."""
    model, batches = model or network(), batches or Batches(IMAGES, LABELS, size=50)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    run = train(name, steps, model, optimizer, batches, seed=seed, **options)
    for _ in run:
        images, labels = next(batches)
        loss = F.cross_entropy(model(images + 0.1 * torch.randn_like(images)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss)
    return run, model


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def generator_states() -> tuple:
    return random.getstate(), tuple(np.random.get_state()[1]), tuple(torch.get_rng_state().tolist())  # noqa: NPY002


def test_same_seed_and_name_give_the_same_bits():
    one, model = fit("a", 40)
    torch.randn(7), random.random()  # what happened in between must not matter
    again, model_again = fit("a", 40)
    assert np.array_equal(one.curve("loss")[1], again.curve("loss")[1])
    assert same(model, model_again)
    assert one.curve("loss")[0].tolist() == list(range(40))
    assert one.diverged_at is None


@pytest.mark.parametrize("other", [{"name": "b", "seed": 0}, {"name": "a", "seed": 1}])
def test_another_name_or_seed_draws_other_batches(other):
    order, other_order = Batches(IMAGES, LABELS, size=50), Batches(IMAGES, LABELS, size=50)
    model = fit("a", 1, batches=order)[1]
    other_model = fit(**other, steps=1, batches=other_order)[1]
    assert not torch.equal(order.order, other_order.order)
    assert not same(model, other_model)


@pytest.mark.parametrize("steps", [1000, 10])
@pytest.mark.parametrize("stop", [None, 4])
def test_generators_are_left_in_one_state(steps, stop):
    def go(count: int, stop: int | None) -> tuple:
        for step in train("a", count, seed=3):
            torch.randn(5), np.random.rand(), random.random()  # noqa: NPY002
            if step == stop:
                break
        return generator_states()

    assert go(steps, stop) == go(25, None)
    for _ in train("a", 25, seed=4):
        pass
    assert generator_states() != go(25, None)


def test_seeds():
    assert spawn_seeds(0, 5) == spawn_seeds(0, 5)
    assert len({*spawn_seeds(0, 5), *spawn_seeds(1, 5)}) == 10
    drawn = []
    for names in ((), (), ("a",), ("a", "b")):
        seed_everything(0, *names)
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))  # noqa: NPY002
    assert drawn[0] == drawn[1]
    assert all(len({one[generator] for one in drawn}) == 3 for generator in range(3))


@pytest.mark.parametrize(("count", "size"), [(12, 4), (10, 3), (5, 5), (4, 1)])
def test_each_example_once_per_epoch(count, size):
    numbers = torch.arange(count)
    batches = Batches(numbers, 10 * numbers, size=size)
    epochs = [[next(batches) for _ in range(count // size)] for _ in range(3)]
    for epoch in epochs:
        drawn = torch.cat([numbers for numbers, _ in epoch]).tolist()
        assert len(set(drawn)) == len(drawn) == count // size * size
        assert all(torch.equal(tens, 10 * numbers) for numbers, tens in epoch)
    if count > 5:
        assert any(not torch.equal(a, b) for (a, _), (b, _) in zip(epochs[0], epochs[1], strict=True))


@pytest.mark.parametrize(
    ("lengths", "size", "said"),
    [
        ((10,), 11, "a batch of 11 cannot be drawn from 10 examples"),
        ((10,), 0, "a batch of 0 cannot be drawn from 10 examples"),
        ((10, 9), 3, r"different lengths: \[9, 10\]"),
    ],
)
def test_impossible_batches_are_refused(lengths, size, said):
    with pytest.raises(ValueError, match=said):
        Batches(*[torch.zeros(length) for length in lengths], size=size)


def test_batches_go_on_where_they_were():
    batches = Batches(torch.arange(10), size=3)
    for _ in range(5):
        next(batches)
    state, generators = batches.state_dict(), torch.get_rng_state()
    expected = [next(batches)[0].tolist() for _ in range(7)]
    restored = Batches(torch.arange(10), size=3)
    restored.load_state_dict(state)
    torch.set_rng_state(generators)
    assert [next(restored)[0].tolist() for _ in range(7)] == expected


@pytest.mark.parametrize("steps", [0, -1, 1.5, "10", None])
def test_impossible_numbers_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match=r"training 'a': steps is .* a whole number of at least 1"):
        train("a", steps)


def test_parts_without_state_are_refused():
    with pytest.raises(TypeError, match="a list has no state_dict"):
        train("a", 1, [1, 2])


# 3 is checked by no invariant, 4 by one at the same step, 70 is between two fetches, 99 is the last.
@pytest.mark.parametrize("bad", [0, 3, 4, 70, 99])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_diverges_is_named_at_its_step(bad, value):
    def go(**options):
        model = network()
        run = train("a", 100, model, **options)
        for step in run:
            loss = model(IMAGES[:2]).sum() * (value if step == bad else 1)
            run.log(loss=loss, other=math.nan)
            if step >= bad:  # as an optimiser would leave it behind
                model[0].weight.data.fill_(math.nan)
        return run

    with pytest.raises(InvariantError, match=f"training 'a': the loss is -?{value} at step {bad}$"):
        go()
    run = go(may_diverge=True)
    assert run.diverged_at == bad
    assert bad <= run.step < bad + 64
    steps, values = run.curve("loss")
    assert np.isfinite(values[:bad]).all()
    assert not np.isfinite(values[bad])
    assert steps[bad] == bad


def test_a_parameter_that_is_not_finite_is_named():
    model = network()

    def go():
        for step in train("a", 100, model):
            if step == 7:  # the next step at which parameters are looked at is 8
                model[2].weight.data[0, 0] = math.inf

    with pytest.raises(NotFinite, match=r"2\.weight is no longer finite after step 8$") as caught:
        go()
    assert caught.value.step == 8


def test_what_was_logged_comes_back_as_it_was():
    run = train("a", 3)
    for step in run:
        run.log(plain=0.1 * step, tensor=torch.tensor(0.1, dtype=torch.float64) * step, many=torch.tensor([step, 1.0]))
        if step:
            run.log(late=step)
    assert run.curve("plain")[1].tolist() == [0.0, 0.1, 0.2]
    assert run.curve("tensor")[1].tolist() == [0.0, 0.1, 0.2]
    assert run.curve("many")[1].tolist() == [[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]]
    assert [list(part) for part in run.curve("late")] == [[1, 2], [1.0, 2.0]]
    with pytest.raises(KeyError, match="logged no 'los'; it logged plain, tensor, many, late"):
        run.curve("los")


def test_accuracy_leaves_the_mode_alone():
    model = nn.Sequential(nn.Linear(8, 3), nn.Dropout(0.9))
    perfect = model.eval()(IMAGES).argmax(1)
    assert accuracy(model.train(), IMAGES, perfect) == 1, "without dropout"
    assert model.training
    assert accuracy(model.eval(), IMAGES, (perfect + 1) % 3) == 0
    assert not model.training


@pytest.mark.parametrize("name", ["tpu9", "cuda:99", "meta", ""])
def test_devices_that_cannot_compute_are_refused(name):
    with pytest.raises(ValueError, match=r"device .* cannot be used here .*; choose auto or cpu"):
        pick_device(name)
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda")


def test_nothing_is_shown_under_pytest(capfd, monkeypatch):
    monkeypatch.setattr(progress, "_in_notebook", lambda: True)
    for _ in sweep("many", [1, 2]):
        fit("a", 3)
    assert capfd.readouterr() == ("", "")
    monkeypatch.delenv("PYTEST_VERSION")
    monkeypatch.setattr(progress, "Bar", lambda name, steps, first, notebook: f"{first} of {steps} of {name}")
    assert progress.display("a", 3, 1) == "1 of 3 of a"


def test_the_time_left_counts_only_what_is_done_now(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = progress.File("a", 1000, 900, tmp_path / "progress.jsonl")  # 900 steps were done before
    for done in (910, 920):
        now[0] += 5
        shown.advance(done)
    lines = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["step"], line["seconds_left"]) for line in lines] == [(900, None), (910, 45), (920, 40)]


def test_progress_of_a_run_is_lines_of_json(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("REPRISE_RUN", str(tmp_path))
    fit("a", 70)
    run = train("b", 5, may_diverge=True)
    for step in run:
        time.sleep(1.1 * (step == 1))
        run.log(loss=math.inf if step == 4 else 1.0)
    fit("silent", 3, quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all({"time", "training", "step", "steps", "seconds_left"} <= line.keys() for line in lines)
    told = [(line["training"], line["step"], line["steps"]) for line in lines]
    assert told == [("a", 0, 70), ("a", 70, 70), ("b", 0, 5), ("b", 2, 5), ("b", 4, 5)]
    assert lines[1]["loss"] > 0
    assert lines[0]["seconds_left"] is None
    assert 1 < lines[3]["seconds_left"] < 10
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_does_not_stop_a_training(tmp_path, monkeypatch):
    (tmp_path / "progress.jsonl").mkdir()  # as little to be written to as a full disk
    monkeypatch.setenv("REPRISE_RUN", str(tmp_path))
    assert fit("a", 5)[0].step == 4
