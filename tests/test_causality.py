"""Leaks are found and named, whatever their kind, and causal models are left in peace."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pixel_cases import gated, lively, plain, residual
from torch import nn

from reprise import causality
from reprise.causality import Leak, dependencies, find_leak
from reprise.invariants import InvariantError
from reprise.nn import CausalSequential, MaskedConv2d, Residual
from reprise.training import declare, train


class Rolled(nn.Module):
    """Everything one pixel to the left: a position then sees its right neighbour. It has no parameters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.roll(-1, 3)


def spoilt(how: str) -> nn.Module:
    model = gated(2) if how == "one row too few" else plain(3, colours=3 if how == "no colours" else 1, hidden=12)
    if how == "mask B first":
        model[0] = MaskedConv2d(1, 12, 3, "B")
    elif how == "no mask":
        model[2] = nn.Conv2d(12, 12, 3, padding=1)
    elif how == "half a mask":  # j-min/PixelCNN, issues 3 and 4: only one row is taken away
        model[4].mask[:] = True
        model[4].mask[:, :, 1, 2] = False
    elif how == "residual around the image":
        model = CausalSequential(Residual(MaskedConv2d(1, 1, 3, "A")), nn.ReLU(), MaskedConv2d(1, 1, 1, "B"))
    elif how == "no colours":  # carpedm20/pixel-rnn-tensorflow, issue 4
        for layer in model:
            if isinstance(layer, MaskedConv2d):
                layer.mask[:, :, layer.mask.size(2) // 2, layer.mask.size(3) // 2] = True
    elif how == "one row too few":  # the vertical stack is not moved down before it feeds the horizontal one
        model[0][1].forward = lambda v, h, condition=None: (v, model[0][1].horizontal(h)[:, :6] + v)
    elif how == "rolled":
        model.insert(3, Rolled())
    return lively(model)


LEAKS = [  # how, the layer named, and where for a change in the middle of 6 x 6
    ("mask B first", "0 (MaskedConv2d)", (3, 3, 0)),
    ("no mask", "2 (Conv2d)", (2, 3, 0)),
    ("half a mask", "4 (MaskedConv2d)", (2, 3, 0)),
    ("residual around the image", "0 (Residual)", (3, 3, 0)),
    ("no colours", "0 (MaskedConv2d)", (3, 3, 0)),
    ("one row too few", "0.1 (GatedMaskedConv2d)", (3, 2, 0)),
    ("rolled", "5 (MaskedConv2d)", (3, 3, 0)),
]


@pytest.mark.parametrize(("how", "layer", "changed"), LEAKS, ids=[how for how, *_ in LEAKS])
def test_a_leak_is_found_and_its_layer_named(how, layer, changed):
    model = spoilt(how)
    colours = 3 if how == "no colours" else 1
    leak = find_leak(model, torch.rand(1, colours, 6, 6, dtype=torch.float64))
    assert leak == Leak(layer, (3, 3, 0), changed)
    assert dependencies(model, (colours, 6, 6)).violations > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("build", [lambda c: plain(3, colours=c), lambda c: residual(2, c), lambda c: gated(2, c)])
def test_there_is_none_in_a_causal_model(build, colours, dtype):
    model = lively(build(colours)).to(dtype)
    image = torch.rand(1, colours, 6, 7, dtype=dtype)
    assert find_leak(model, image, places=list(range(colours * 42))) is None
    model = lively(gated(1, classes=3))
    assert find_leak(model, torch.rand(1, 1, 5, 5, dtype=torch.float64), torch.tensor([2])) is None


def test_what_a_later_layer_ignores_is_no_leak():
    model = spoilt("no mask")
    nn.init.zeros_(model[-1].weight)
    assert find_leak(model, torch.rand(1, 1, 6, 6, dtype=torch.float64)) is None


def test_models_are_left_as_they_were():
    model = nn.Sequential(MaskedConv2d(1, 2, 3, "A"), nn.Dropout(0.5), MaskedConv2d(2, 1, 1, "B")).double()
    model[2].eval()
    before = torch.get_rng_state()
    find_leak(model, torch.rand(1, 1, 4, 4, dtype=torch.float64, generator=torch.Generator()))
    dependencies(model, (1, 4, 4))
    assert [layer.training for layer in model] == [True, True, False]
    assert torch.equal(before, torch.get_rng_state()), "a training would go on differently"
    assert not any(layer._forward_hooks for layer in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_more_outputs_than_are_looked_at_at_once(monkeypatch):
    model = lively(plain(1, colours=3))
    whole = dependencies(model, (3, 4, 4)).matrix
    monkeypatch.setattr(causality, "_AT_ONCE", 7)
    assert torch.equal(dependencies(model, (3, 4, 4)).matrix, whole)


def test_a_model_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"for an image \(3, 4, 4\) the model returned \(48, 4, 4, 4\)"):
        dependencies(nn.Conv2d(3, 4, 1), (3, 4, 4))


def learn(model: nn.Module, leaks_at: int | None = None, steps: int = 140) -> None:
    declare(model, causal=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    images = (torch.rand(8, 1, 6, 6) > 0.5).float()
    for step in train("leaking", steps, model, optimizer):
        if step == leaks_at:
            model[2].mask[:] = True
        loss = F.binary_cross_entropy_with_logits(model(images), images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize(("since", "found"), [(0, 0), (3, 4), (70, 128)])
def test_while_training_a_leak_stops_it_at_the_next_check(since, found):
    told = rf"^model \(Sequential\) at step {found}: layer 2 \(MaskedConv2d\) sees what is still to come: .* output at"
    with pytest.raises(InvariantError, match=told):
        learn(plain(2).float(), leaks_at=since)


def test_while_training_a_causal_model_is_left_in_peace_and_learns_the_same():
    def weights(declared: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(MaskedConv2d(1, 4, 3, "A"), nn.Dropout(0.3), MaskedConv2d(4, 1, 1, "B"))
        declare(model, causal=declared)
        images = (torch.rand(8, 1, 6, 6) > 0.5).float()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in train("causal", 40, model, optimizer):
            loss = F.binary_cross_entropy_with_logits(model(images), images)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert model.training
        assert model[1].training
        return model[0].weight.detach()

    assert torch.equal(weights(True), weights(False))


def test_a_conditioned_model_is_checked_as_well():
    model = declare(gated(1, classes=3), causal=True)
    images, classes = torch.rand(4, 1, 5, 5), torch.tensor([0, 1, 2, 0])
    for _ in train("fine", 3, model):
        model(images, classes)
    model[0][1].horizontal.mask[:] = True
    steps = iter(train("leaking", 3, model))
    next(steps)
    with pytest.raises(InvariantError, match=r"layer 0.1.horizontal \(MaskedConv2d\) sees"):
        model(images, classes)
    steps.close()
