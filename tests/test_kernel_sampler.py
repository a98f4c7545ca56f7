"""``reprise.kernels.sample`` against ``reprise.sampling``, which it must repeat image by image."""

from __future__ import annotations

import pytest
import torch
from devices import NEEDS_GPP, on_every_device
from pixel_cases import gated, lively, plain
from torch import nn
from torch.library import opcheck

from reprise import kernels, sampling
from reprise.kernels import Kernel, drawing
from reprise.nn import CausalSequential, GatedMaskedConv2d, GatedStack, MaskedConv2d, Residual


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def many_shapes() -> nn.Module:
    """High, wide, dilated, without a bias; more outputs than a row of threads, more inputs than threads."""
    layers = [MaskedConv2d(40, 9, (5, 1), "B", bias=False), nn.Identity(), MaskedConv2d(9, 33, 3, "B", dilation=(1, 2))]
    return nn.Sequential(MaskedConv2d(1, 40, (3, 7), "A", dilation=2), nn.ReLU(), *layers, nn.Conv2d(33, 4, 1))


def gated_of_many_sizes() -> nn.Module:
    layers = [GatedMaskedConv2d(1, 4, 7, "A"), GatedMaskedConv2d(4, 6, 1, "B"), GatedMaskedConv2d(6, 6, 5, "B")]
    return CausalSequential(GatedStack(*layers), nn.Dropout(0.5), nn.Conv2d(6, 5, 1))


def blocks() -> nn.Module:
    inner = [nn.ReLU(), MaskedConv2d(8, 4, 3, "B"), nn.ReLU(), MaskedConv2d(4, 8, 1, "B")]
    return nn.Sequential(MaskedConv2d(1, 8, 5, "A"), Residual(*inner), Residual(*inner), nn.ReLU(), nn.Conv2d(8, 3, 1))


CASES = {  # model, colours, height, width
    "plain": (plain(2, first=7), 1, 6, 5),
    "plain, 5 levels": (plain(2, levels=5), 1, 5, 6),
    "plain, 3 colours, 4 levels": (plain(1, colours=3, levels=4), 3, 4, 4),
    "residual": (blocks(), 1, 5, 5),
    "gated": (gated(2), 1, 6, 5),
    "gated, 3 colours": (gated(1, colours=3), 3, 4, 3),
    "many shapes": (many_shapes(), 1, 7, 8),
    "gated of many sizes": (gated_of_many_sizes(), 1, 5, 4),
    "one layer": (nn.Sequential(MaskedConv2d(1, 3, 3, "A")), 1, 3, 3),
    "one row": (plain(1), 1, 1, 9),
    "one column": (gated(1), 1, 9, 1),
}
every_case = pytest.mark.parametrize("name", CASES)


def case(name: str, device: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, tuple[int, int, int, int]]:
    model, colours, height, width = CASES[name]
    return lively(model).to(device, dtype), (3, colours, height, width)


@on_every_device
@every_case
def test_the_images_of_the_other_ways(name, device):
    model, shape = case(name, device)
    ours = kernels.sample(model, shape, generator=seeded())
    naive = sampling.sample(model, shape, "naive", generator=seeded())
    assert torch.equal(ours.images, naive.images)
    torch.testing.assert_close(ours.logits, naive.logits, rtol=1e-9, atol=1e-10)
    assert ours.positions == shape[2] * shape[3]
    assert ours.images.is_contiguous()
    assert len(ours.images.unique()) > 1, "an image of one value would be had from any kernel"


@NEEDS_GPP
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("name", ["gated", "many shapes"])
def test_blocks_of_other_sizes(name, rows, monkeypatch):
    monkeypatch.setitem(drawing._ROWS, "cpu", rows)  # 8 is what a GPU is given
    test_the_images_of_the_other_ways(name, "cpu")


@on_every_device
@pytest.mark.parametrize("name", ["plain", "gated", "plain, 5 levels"])
def test_in_single_precision_logits_agree_to_four_digits(name, device):
    model, shape = case(name, device, torch.float32)
    ours = kernels.sample(model, shape, generator=seeded())
    cached = sampling.sample(model, shape, generator=seeded())
    same = (ours.images == cached.images).flatten(1).all(1)
    assert same.any()
    torch.testing.assert_close(ours.logits[same], cached.logits[same], rtol=1e-4, atol=1e-4)


@on_every_device
@pytest.mark.parametrize("name", ["plain", "plain, 3 colours, 4 levels", "gated"])
def test_completion_and_temperature(name, device):
    model, shape = case(name, device)
    known = torch.zeros(shape, dtype=torch.bool)
    known[:, :, :2] = True
    known[1, -1, 3, 1] = True
    values = torch.ones(1, 1, 1, 1)
    options = {"known": known, "values": values, "temperature": 0.7}
    ours = kernels.sample(model, shape, generator=seeded(), **options)
    naive = sampling.sample(model, shape, "naive", generator=seeded(), **options)
    assert torch.equal(ours.images, naive.images)
    torch.testing.assert_close(ours.logits, naive.logits, rtol=1e-9, atol=1e-10, equal_nan=True)
    assert ours.images[known.to(device)].eq(1).all()


@on_every_device
def test_conditions(device):
    model = lively(gated(2, classes=4)).to(device)
    classes = torch.tensor([0, 3, 1, 3])  # brought to the model's device
    numbers = torch.rand(1, 1, 5, 5, generator=seeded(), dtype=torch.float64).expand(4, -1, -1, -1)
    ours = kernels.sample(model, (4, 1, 5, 5), uniforms=numbers, condition=classes)
    naive = sampling.sample(model, (4, 1, 5, 5), "naive", uniforms=numbers, condition=classes)
    assert torch.equal(ours.images, naive.images)
    torch.testing.assert_close(ours.logits, naive.logits, rtol=1e-9, atol=1e-10)
    assert not torch.equal(ours.images[0], ours.images[1])


REFUSED = [
    (nn.Sequential(MaskedConv2d(1, 4, 3, "A"), nn.Tanh()), r"model.1 \(Tanh\) has no place in the kernel"),
    (nn.Sequential(MaskedConv2d(1, 4, 3, "A"), nn.Conv2d(4, 1, 3, padding=1)), r"model.1 \(Conv2d\) has no place"),
    (nn.Sequential(MaskedConv2d(1, 4, 3, "A"), nn.ReLU()), "ends in 4 channels for 1 colours, or in an activation"),
    (nn.Sequential(MaskedConv2d(1, 4, 3, "A"), nn.ReLU(), Residual(nn.Conv2d(4, 4, 1))), r"model.2 \(Residual\) must"),
    (nn.Sequential(MaskedConv2d(1, 4, 3, "A"), Residual(nn.Identity())), r"model.1 \(Residual\) must begin with a map"),
    (nn.Sequential(MaskedConv2d(1, 4, 3, "B")), r"model.0 \(MaskedConv2d\) sees the pixel to be drawn"),
    (nn.Sequential(nn.Conv2d(1, 4, 1)), r"model.0 \(Conv2d\) sees the pixel to be drawn"),
    (nn.Sequential(Residual(MaskedConv2d(1, 1, 3, "A"))), r"model.0 \(Residual\) must begin with a map"),
    (nn.Sequential(MaskedConv2d(3, 6, 3, "A", colours=3)), "made for colours=3, the images have 1"),
    (
        nn.Sequential(MaskedConv2d(1, 400, 3, "A"), MaskedConv2d(400, 1, 9, "B")),
        "a layer sees 16400 numbers at a pixel",
    ),
    (MaskedConv2d(1, 1, 3, "A").half(), "in float32 or float64, the model is in torch.float16"),
]


@pytest.mark.parametrize(("model", "said"), REFUSED, ids=[said[:30] for _, said in REFUSED])
def test_what_has_no_place_in_the_kernel_is_named(model, said):
    with pytest.raises(ValueError, match=said):
        kernels.sample(model, (1, 1, 2, 2))


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="temperature must be above 0"):
        kernels.sample(plain(1), (1, 1, 2, 2), temperature=0)


@on_every_device
def test_as_an_operator_of_torch(device, monkeypatch):
    model, shape = case("gated", device)
    seen = []
    monkeypatch.setattr(drawing, "_sample_images", lambda *arguments: seen.append(arguments))
    kernels.sample(model, shape, generator=seeded())
    (arguments,) = seen
    opcheck(torch.ops.reprise.sample_images.default, arguments, test_utils=("test_schema", "test_faketensor"))


PLANTED = [  # each a bug that such a kernel could have, and a case that must show it
    ("column >= 0 && column < canvas.width", "column < canvas.width", "plain"),
    ("const bool inside = row >= 0", "const bool inside = row >= -1", "gated"),
    ("pixel + layer.added_row * canvas.width", "pixel", "gated"),
    ("exp(-pixel[2 * c + 1])", "exp(pixel[2 * c + 1])", "gated, 3 colours"),
    ("c < channels; c += 32", "c < channels; c += 64", "many shapes"),
    ("evaluate(layers[l], canvas, y - 1, x,", "evaluate(layers[l], canvas, y, x,", "gated"),
    ("colour * share, (colour + 1) * share", "0, share", "plain, 3 colours, 4 levels"),
    ("level += cumulated / total <= uniform", "level += cumulated <= uniform", "plain, 5 levels"),
    ("uniform >= 1 / (1 + exp(logits[0]", "uniform >= 1 / (1 + exp(-logits[0]", "plain"),
    ("for (int part = 0; part < parts", "for (int part = 0; part < 1", "plain"),
    ("first += 32", "first += 64", "many shapes"),
    ("pixel[c] < 0 ?", "pixel[c] < -1 ?", "residual"),
]
# After the copy, the parts, the output and the draw; and a case in which the next thread soon needs what it waits for.
BARRIERS = ["many shapes", "many shapes", "many shapes", "plain"]


@NEEDS_GPP
@pytest.mark.parametrize(("right", "wrong", "name"), PLANTED, ids=[wrong for _, wrong, _ in PLANTED])
def test_these_tests_find_planted_bugs(right, wrong, name, monkeypatch):
    assert drawing._SOURCE.count(right) == 1
    broken = drawing._SOURCE.replace(right, wrong)
    monkeypatch.setattr(drawing, "_kernel", lambda dtype: Kernel(broken, "sample_images", REAL=dtype))
    with pytest.raises(AssertionError):
        test_the_images_of_the_other_ways(name, "cpu")


@NEEDS_GPP
@pytest.mark.parametrize(("which", "name"), list(enumerate(BARRIERS)))
def test_each_barrier_is_missed(which, name, monkeypatch):
    barrier = "__syncthreads();"
    parts = drawing._SOURCE.split(barrier)
    assert len(parts) == len(BARRIERS) + 1
    broken = barrier.join(parts[: which + 1]) + barrier.join(parts[which + 1 :])
    assert broken.count(barrier) == len(BARRIERS) - 1
    monkeypatch.setattr(drawing, "_kernel", lambda dtype: Kernel(broken, "sample_images", REAL=dtype))
    with pytest.raises(AssertionError):
        test_the_images_of_the_other_ways(name, "cpu")
