"""What is declared about a layer is checked as it learns, named where it fails, and costs next to nothing."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reprise.invariants import Watch
from reprise.training import Batches, InvariantError, declare, train


class Given(nn.Module):
    """A layer whose output is what the test says."""

    def forward(self, output: torch.Tensor) -> torch.Tensor:
        return output


STATISTICS = [  # declared, an output that fits, one that does not, the words for it
    ({"mean": (-1, 1)}, torch.zeros(4, 3), torch.tensor([[0.0, 5.0]] * 4), "mean is 5"),
    ({"mean": (-1, 1)}, torch.zeros(2, 3, 2, 2), torch.full((2, 3, 2, 2), -2.0), "mean is -2"),
    ({"variance": (0, 1)}, torch.ones(4, 3), torch.tensor([[-3.0], [3.0]]), "variance is 9"),
    ({"variance": (0.5, 9)}, torch.tensor([[-1.0], [1.0]]), torch.ones(4, 1), "variance is 0"),
    ({"saturated": (0, 0.5)}, torch.tensor([[0.5, 0.999]]), torch.tensor([[0.001, 0.999]]), "saturated is 1"),
    ({"range": (0, 1)}, torch.tensor([[0.0, 1.0]]), torch.tensor([[-0.25, 1.0]]), "range is -0.25"),
    ({"range": (0, 1)}, torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, float("nan")]]), "range is nan"),
]


def pass_through(layer: nn.Module, output: torch.Tensor, steps: int = 1, at: int = 0) -> None:
    model = nn.Sequential()
    model.add_module("hidden", layer)
    for step in train("a", steps, model):
        if step == at:
            model(output)


@pytest.mark.parametrize(("declared", "good", "bad", "words"), STATISTICS)
def test_statistics_of_outputs(declared, good, bad, words):
    layer = declare(Given(), **declared)
    pass_through(layer, good)
    low, high = next(iter(declared.values()))
    said = rf"hidden \(Given\) at step 0: {words}, declared to stay between {low:g} and {high:g}$"
    with pytest.raises(InvariantError, match=said):
        pass_through(layer, bad)


def test_the_step_is_named_and_steps_between_checks_are_not_seen():
    layer, bad = declare(Given(), range=(0, 1)), torch.full((1, 1), 7.0)
    for step in (0, 1, 2, 4, 64, 128, 256):
        with pytest.raises(InvariantError, match=rf"at step {step}: range is 7"):
            pass_through(layer, bad, steps=300, at=step)
    for step in (3, 100, 129):
        pass_through(layer, bad, steps=300, at=step)


def test_gradients():
    layer = declare(nn.Linear(1, 1, bias=False), gradient=(0, 3))
    model = nn.Sequential(layer)

    def learn(slope: float) -> None:
        for _ in train("a", 1, model):
            layer.zero_grad()
            model(torch.tensor([[slope]])).sum().backward()

    learn(2.5)
    with pytest.raises(InvariantError, match=r"0 \(Linear\) at step 0: gradient is 3.5, declared to stay between 0 an"):
        learn(3.5)


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ({"mean": (1, -1)}, r"mean: the range \(1, -1\) is empty"),
        ({"mean": (0, float("nan"))}, r"mean: the range \(0, nan\) is empty"),
        ({"median": (0, 1)}, "no statistic 'median'; there are mean, variance, saturated, range, gradient"),
    ],
)
def test_impossible_declarations_are_refused(declared, said):
    with pytest.raises(ValueError, match=said):
        declare(nn.Linear(1, 1), **declared)


def test_declaring_again_replaces():
    layer = declare(declare(Given(), range=(0, 1)), mean=(0, 10))
    pass_through(layer, torch.full((1, 1), 7.0))


def test_an_evaluation_between_two_steps_is_not_watched():
    layer = declare(Given(), range=(0, 1))
    for _ in train("a", 3, nn.Sequential(layer)):
        layer.eval()(torch.full((1, 1), 7.0))
        layer.train()(torch.full((1, 1), 0.5))


def test_layers_of_all_models_are_watched():
    # Both are layer "0" of their model.
    good, bad = nn.Sequential(declare(Given(), range=(0, 1))), nn.Sequential(declare(Given(), range=(0, 1)))

    def go(*models: nn.Module) -> None:
        for _ in train("a", 1, *models):
            good(torch.ones(1, 1))
            bad(torch.full((1, 1), 7.0))

    for models in ((good, bad), (bad, good)):
        with pytest.raises(InvariantError, match="range is 7"):
            go(*models)


class Stop(Exception):
    pass


def leave(how: str, model: nn.Module) -> None:
    for _ in train("a", 5, model):
        if how == "break":
            break
        if how == "error":
            raise Stop
        model(torch.full((1, 1), 7.0 if how == "violation" else 0.5))


@pytest.mark.parametrize("how", ["break", "error", "violation", "end"])
def test_nothing_stays_attached(how):
    model = nn.Sequential(declare(Given(), range=(0, 1)), nn.Linear(1, 1))
    with contextlib.suppress(Stop, InvariantError):
        leave(how, model)
    assert not any(module._forward_hooks for module in model.modules())


def test_checks_cost_less_than_three_percent_of_a_step(monkeypatch):
    """Processor time inside the library over that of the loop around it: robust against a machine that is busy."""
    spent = Counter()

    def timed(what: str, function: Callable) -> Callable:
        def wrapper(*arguments):
            started = time.thread_time()
            try:
                return function(*arguments)
            finally:
                spent[what] += time.thread_time() - started

        return wrapper

    for method in ("attach", "detach", "check"):
        monkeypatch.setattr(Watch, method, timed("invariants", getattr(Watch, method)))
    # The hooks work inside the forward pass.
    checker = Watch._checker
    monkeypatch.setattr(Watch, "_checker", lambda self, name, step: timed("hooks", checker(self, name, step)))
    layers = [nn.Linear(64, 100), *[layer for _ in range(2) for layer in (nn.Sigmoid(), nn.Linear(100, 100))]]
    model = nn.Sequential(*layers, nn.Sigmoid(), nn.Linear(100, 10))
    for layer in model:
        if isinstance(layer, nn.Sigmoid):
            declare(layer, mean=(0, 1), variance=(0, 1), saturated=(0, 1), range=(0, 1))
        else:
            declare(layer, mean=(-50, 50), gradient=(0, 1e3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = Batches(torch.rand(1000, 64), torch.randint(10, (1000,)), size=60)
    run = train("a", 1500, model, optimizer, batches)
    steps, ask, log = iter(run), timed("train", next), timed("train", lambda loss: run.log(loss=loss))
    started = time.thread_time()
    while ask(steps, None) is not None:
        images, labels = next(batches)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log(loss)
    step = time.thread_time() - started - spent["hooks"] - spent["train"]
    assert spent["hooks"] > 0
    assert spent["invariants"] + spent["hooks"] < 0.03 * step
    assert spent["train"] + spent["hooks"] < 0.06 * step, "logging, progress and curves included"
