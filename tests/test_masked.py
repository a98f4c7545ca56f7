"""The masked and gated convolutions: what each weight may do, what each output sees, and what is refused."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from pixel_cases import gated, lively, plain, residual
from torch import nn

from reprise.causality import dependencies
from reprise.masked import gate
from reprise.nn import CausalSequential, GatedMaskedConv2d, GatedStack, MaskedConv2d, Residual

SIZES = [  # in, out, kernel, colours
    (1, 1, 3, 1), (2, 3, 7, 1), (1, 4, 1, 1), (3, 6, 3, 3), (6, 3, 5, 3), (9, 12, (1, 3), 3), (4, 8, (3, 1), 2),
]  # fmt: skip


def brute_force(layer: MaskedConv2d) -> torch.Tensor:
    """The mask from the order of (pixel, colour) alone: every weight connects two of them."""
    rows, columns = layer.kernel_size
    mask = torch.zeros(layer.weight.shape, dtype=torch.bool)
    for o, i, r, c in itertools.product(*map(range, mask.shape)):
        # Any place of the output will do, such as row 100 of an image that is 1000 pixels wide.
        to_pixel = 100 * 1000 + 100
        from_pixel = (100 + r - rows // 2) * 1000 + 100 + c - columns // 2
        to = (to_pixel, o * layer.colours // layer.out_channels)
        source = (from_pixel, i * layer.colours // layer.in_channels)
        mask[o, i, r, c] = source < to if layer.mask_type == "A" else source <= to
    return mask


@pytest.mark.parametrize("mask", ["A", "B"])
@pytest.mark.parametrize(("inputs", "outputs", "kernel", "colours"), SIZES)
def test_the_mask_follows_from_the_order_of_pixels_and_colours(inputs, outputs, kernel, colours, mask):
    layer = MaskedConv2d(inputs, outputs, kernel, mask, colours)
    assert torch.equal(layer.mask, brute_force(layer))
    x = torch.randn(2, inputs, 6, 7)
    expected = F.conv2d(x, layer.weight * brute_force(layer), layer.bias, padding=layer.padding)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_counts_of_one_colour(kernel):
    square = kernel * kernel
    assert MaskedConv2d(1, 1, kernel, "A").mask.sum() == (square - 1) // 2
    assert MaskedConv2d(1, 1, kernel, "B").mask.sum() == (square + 1) // 2


def test_colours_within_a_pixel():
    a, b = (MaskedConv2d(3, 3, 3, mask, colours=3).mask[:, :, 1, 1].int().tolist() for mask in "AB")
    assert a == [[0, 0, 0], [1, 0, 0], [1, 1, 0]], "red sees nothing, green sees red, blue sees both"
    assert b == [[1, 0, 0], [1, 1, 0], [1, 1, 1]], "and each sees itself"


def of_one_layer(layer: nn.Module, channels: int, size: int = 4) -> torch.Tensor:
    """(outputs, inputs) in the order (pixel, channel), True where the Jacobian is not zero."""
    x = torch.randn(1, channels, size, size, dtype=torch.float64, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(layer.double(), x)[0, :, :, :, 0]  # (C', H, W, C, H, W)
    return jacobian.permute(1, 2, 0, 4, 5, 3).flatten(3, 5).flatten(0, 2) != 0


@pytest.mark.parametrize(("mask", "diagonal"), [("A", 0), ("B", 1)])
@pytest.mark.parametrize("colours", [1, 3])
def test_jacobian_in_the_order_of_pixel_and_channel(mask, diagonal, colours):
    torch.manual_seed(0)
    found = of_one_layer(MaskedConv2d(colours, colours, 3, mask, colours), colours)
    assert not found.triu(diagonal).any(), "something is seen too early"
    # What a 3 x 3 kernel reaches and comes before is all there.
    order = [(y, x, c) for y in range(4) for x in range(4) for c in range(colours)]
    for i, j in itertools.product(range(len(order)), repeat=2):
        near = all(abs(order[i][axis] - order[j][axis]) <= 1 for axis in (0, 1))
        assert found[i, j] == (near and (j < i or (j == i and mask == "B")))


@pytest.mark.parametrize("optimiser", [torch.optim.Adam, torch.optim.SGD], ids=lambda kind: kind.__name__)
def test_masked_weights_have_no_effect_and_no_gradient_whatever_is_done_to_them(optimiser):
    torch.manual_seed(0)
    layer, x = MaskedConv2d(2, 4, 5, "A"), torch.randn(3, 2, 6, 6)
    spoilt = copy.deepcopy(layer)
    with torch.no_grad():
        spoilt.weight[~spoilt.mask] = torch.nan
    assert torch.equal(layer(x), spoilt(x))

    steps = optimiser(layer.parameters(), lr=0.1, weight_decay=0.5)
    before = layer.weight.detach().clone()
    for _ in range(3):
        steps.zero_grad()
        layer(x).square().sum().backward()
        assert not layer.weight.grad[~layer.mask].any()
        assert layer.weight.grad[layer.mask].all()
        steps.step()
    assert (layer.weight != before)[~layer.mask].all(), "weight decay did move them"
    changed = x.clone()
    changed[:, :, 3, 3:] += 1
    changed[:, :, 4:] += 1
    assert torch.equal(layer(x)[:, :, 3, :4], layer(changed)[:, :, 3, :4])
    assert torch.equal(layer(x)[:, :, :3], layer(changed)[:, :, :3])


def test_state_and_options_are_those_of_torch():
    ours, theirs = MaskedConv2d(4, 6, 3, "B", bias=True), nn.Conv2d(4, 6, 3, padding=1)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    assert MaskedConv2d(1, 1, 3, "A", bias=False).bias is None
    wide = MaskedConv2d(1, 1, 3, "A", dilation=2, padding=2, dtype=torch.float64)
    assert wide(torch.zeros(1, 1, 5, 6, dtype=torch.float64)).shape == (1, 1, 5, 6)
    assert ours.to("meta").mask.device.type == "meta"
    assert "mask='B', colours=3" in repr(MaskedConv2d(3, 3, 3, "B", colours=3))


REFUSED = [
    ({"in_channels": 4, "colours": 3}, "in_channels=4 is no multiple of colours=3"),
    ({"in_channels": 3, "out_channels": 32, "colours": 3}, "out_channels=32 is no multiple of colours=3"),
    ({"colours": 0}, "colours is 0"),
    ({"kernel_size": 4}, "kernel_size=4 has no middle: it must be odd"),
    ({"kernel_size": (3, 2)}, r"kernel_size=\(3, 2\) has no middle"),
    ({"mask": "C"}, "mask is 'C', but must be 'A' or 'B'"),
    ({"stride": 2}, "stride=2: every pixel needs an output of its own"),
    ({"padding": 0}, r"padding=0 moves the pixels: it must be \(1, 1\)"),
    ({"groups": 2}, "groups=2 is not supported"),
    ({"padding_mode": "circular"}, "padding_mode='circular' shows pixels from elsewhere"),
]


@pytest.mark.parametrize(("wrong", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_would_break_the_order_is_refused(wrong, said):
    with pytest.raises(ValueError, match=f"MaskedConv2d: {said}"):
        MaskedConv2d(**({"in_channels": 6, "out_channels": 6, "kernel_size": 3, "mask": "A"} | wrong))


NETWORKS = [plain(3), plain(2, first=5, colours=3), residual(2), residual(1, colours=3), gated(2), gated(1, colours=3)]


@pytest.mark.parametrize("model", NETWORKS, ids=lambda model: f"{type(model[0]).__name__} {len(model)}")
def test_networks_are_causal_and_their_first_pixel_is_blind(model):
    shape = (3 if model[-1].colours == 3 else 1, 4, 5)
    found = dependencies(lively(model), shape)
    assert found.violations == 0
    assert found.causal > found.possible / 2
    assert not found.matrix[0].any()
    x = torch.rand(2, *shape, dtype=torch.float64)
    assert torch.equal(*model(x)[:, :: shape[0], 0, 0])


@pytest.mark.parametrize(("depth", "causal"), [(2, 829), (4, 1405), (8, 1694), (12, 1694)])
def test_a_stack_of_masked_layers_has_a_blind_spot_that_depth_does_not_cure(depth, causal):
    torch.manual_seed(0)
    found = dependencies(plain(depth, hidden=16), (1, 8, 8))
    assert (found.violations, found.causal, found.possible, len(found.missing)) == (0, causal, 2016, 2016 - causal)
    if depth >= 8:
        unseen = {(1, 7), (2, 6), (2, 7), (3, 5), (3, 6), (3, 7)}
        assert {source[:2] for output, source in found.missing if output == (4, 3, 0)} == unseen
        assert {tuple(at) for at in (~found.seen_from(4, 3)[0, :4]).nonzero().tolist()} == unseen


def test_two_stacks_have_none():
    torch.manual_seed(0)
    found = [dependencies(gated(depth, hidden=16), (1, 8, 8)) for depth in (1, 2, 4, 6)]
    assert [one.violations for one in found] == [0] * 4
    assert [one.causal for one in found] == [716, 1112, 1766, 2016]
    of_colours = dependencies(gated(5, colours=3), (3, 5, 5))
    assert (of_colours.violations, of_colours.missing) == (0, [])


def test_the_gate_and_its_order_of_channels():
    x = torch.randn(2, 12, 3, 3)
    f, g = x[:, [0, 1, 4, 5, 8, 9]], x[:, [2, 3, 6, 7, 10, 11]]
    torch.testing.assert_close(gate(x, colours=3), f.tanh() * g.sigmoid())
    torch.testing.assert_close(gate(x), x[:, :6].tanh() * x[:, 6:].sigmoid())


def test_one_gated_layer_against_a_loop_over_pixels():
    """Equation 2 read literally: for each pixel, the rows above, and its own row up to it."""
    torch.manual_seed(0)
    layer = GatedMaskedConv2d(2, 2, 3, "B", conditions=4).double()
    v, h, classes = *torch.randn(2, 1, 2, 4, 5, dtype=torch.float64), torch.tensor([3])
    new_v, new_h = layer(v, h, classes)
    to_v, to_h = layer.condition.weight[:, 3].chunk(2)

    def vertical(y: int, x: int) -> torch.Tensor:
        window = F.pad(v, (1, 1, 1, 0))[0, :, y : y + 2, x : x + 3]
        return torch.einsum("oirc,irc->o", layer.vertical.weight, window) + layer.vertical.bias

    def gated_unit(a: torch.Tensor) -> torch.Tensor:
        return a[:2].tanh() * a[2:].sigmoid()

    for y, x in itertools.product(range(4), range(5)):
        torch.testing.assert_close(new_v[0, :, y, x], gated_unit(vertical(y, x) + to_v))
        above = vertical(y - 1, x) if y else torch.zeros(4, dtype=torch.float64)
        left = F.pad(h, (1, 0))[0, :, y, x : x + 2]
        a = torch.einsum("oic,ic->o", layer.horizontal.weight[:, :, 0, :2], left) + layer.horizontal.bias
        a = a + layer.down.weight[:, :, 0, 0] @ above + layer.down.bias + to_h
        expected = layer.out.weight[:, :, 0, 0] @ gated_unit(a) + layer.out.bias + h[0, :, y, x]
        torch.testing.assert_close(new_h[0, :, y, x], expected)


def test_a_condition_shifts_and_nothing_else():
    torch.manual_seed(0)
    with_condition, without = gated(2, classes=5).double(), gated(2).double()
    without.load_state_dict({k: v for k, v in with_condition.state_dict().items() if "condition" not in k})
    x, classes = torch.rand(3, 1, 6, 6, dtype=torch.float64), torch.tensor([0, 4, 2])
    told = with_condition(x, classes)
    torch.testing.assert_close(told, with_condition(x, F.one_hot(classes, 5).double()))
    assert not torch.allclose(told, without(x))
    assert dependencies(with_condition, (1, 5, 5), condition=torch.tensor([1])).violations == 0
    for name, parameter in with_condition.named_parameters():
        if "condition" in name:
            nn.init.zeros_(parameter)
    torch.testing.assert_close(with_condition(x, classes), without(x))


def test_conditions_that_do_not_fit_are_refused():
    x = torch.rand(2, 1, 4, 4)
    with pytest.raises(ValueError, match="made with conditions=5 was given none"):
        gated(1, classes=5)(x)
    with pytest.raises(ValueError, match="no layer takes one"):
        gated(1)(x, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="conditions=0 was given one of shape"):
        GatedMaskedConv2d(1, 2, 3, "A")(x, x, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"must be \(N, 5\) or classes \(N,\), got \(2, 4\)"):
        gated(1, classes=5)(x, torch.rand(2, 4))


def test_containers():
    doubling = Residual(nn.Identity())
    assert torch.equal(doubling(torch.ones(1, 1, 2, 2)), torch.full((1, 1, 2, 2), 2.0))
    inner = Residual(GatedStack(GatedMaskedConv2d(1, 1, 3, "A", conditions=2)))
    nested = CausalSequential(nn.Identity(), inner)
    assert nested(torch.ones(1, 1, 2, 2), torch.tensor([0])).shape == (1, 1, 2, 2)
    for layers in ([], [GatedMaskedConv2d(1, 2, 3, "B")], [GatedMaskedConv2d(1, 1, 3, "A")] * 2):
        with pytest.raises(ValueError, match="the first layer of a GatedStack has mask A, all others B"):
            GatedStack(*layers)
