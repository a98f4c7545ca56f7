"""``reprise.functional.switched_conv2d`` and ``reprise.nn.SwitchedConv2d``: what follows from their definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from devices import on_every_device
from switched_cases import (
    DOUBLE,
    SHAPES,
    by_convolutions,
    by_one_convolution,
    by_unfolding,
    case,
    one_hot,
    out_size,
    results,
)
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from reprise import switched
from reprise.functional import switched_conv2d
from reprise.nn import SwitchedConv2d

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def simplex(x: torch.Tensor, kernels: int) -> torch.Tensor:
    """Random shares (N, K, H, W) that sum to one everywhere, for an output of the size of x."""
    return torch.randn(x.size(0), kernels, *x.shape[2:], dtype=x.dtype).softmax(1)


@pytest.mark.parametrize("numbers", [1, 100, 2**18])  # of patches at a time
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_selector_of_integers_is_the_definition(shape, numbers, monkeypatch):
    monkeypatch.setattr(switched, "_NUMBERS", numbers)
    given = (*case(*shape), *shape[-2:])
    expected = results(by_unfolding, *given)
    for way in (switched_conv2d, by_one_convolution, by_convolutions):  # ours, and the benchmark's peers
        for actual, exact in zip(results(way, *given), expected, strict=True):
            torch.testing.assert_close(actual, exact, **CLOSE)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_floats_of_one_and_zero_do_the_same(shape):
    x, weight, selector, bias = case(*shape)
    ones = one_hot(selector, len(weight)).double()
    floats = results(switched_conv2d, x, weight, ones, bias, *shape[-2:])
    for actual, exact in zip(floats, results(switched_conv2d, x, weight, selector, bias, *shape[-2:]), strict=True):
        torch.testing.assert_close(actual, exact, **CLOSE)


@pytest.mark.parametrize(("k", "stride", "padding"), [(1, 1, 0), (3, 1, 1), (3, 2, 0), (5, 2, 3)])
def test_one_kernel_is_a_convolution(k, stride, padding):
    x, weight, selector, bias = case(kernels=1, k=k, stride=stride, padding=padding)
    expected = F.conv2d(x, weight[0], bias, stride, padding)
    for one in (selector, torch.ones_like(selector[:, None], dtype=DOUBLE)):
        torch.testing.assert_close(switched_conv2d(x, weight, one, bias, stride, padding), expected, **CLOSE)


def test_equal_kernels_are_a_convolution_for_any_selector():
    x, weight, selector, bias = case()
    equal = weight[:1].expand_as(weight)
    for any_selector in (selector, simplex(x, 4)):
        y = switched_conv2d(x, equal, any_selector, bias, 1, 1)
        torch.testing.assert_close(y, F.conv2d(x, weight[0], bias, 1, 1), **CLOSE)
    # With shares that do not sum to one it is none: nothing normalises them.
    y = switched_conv2d(x, equal, 2 * simplex(x, 4), None, 1, 1)
    torch.testing.assert_close(y, 2 * F.conv2d(x, weight[0], None, 1, 1), **CLOSE)


def test_constant_shares_are_a_convolution_with_the_mean_kernel():
    x, weight, _, bias = case()
    shares = torch.randn(4, dtype=DOUBLE).softmax(0)
    y = switched_conv2d(x, weight, shares.view(1, 4, 1, 1).expand(2, 4, 6, 7), bias, 1, 1)
    mean = torch.einsum("k,koihw->oihw", shares, weight)
    torch.testing.assert_close(y, F.conv2d(x, mean, bias, 1, 1), **CLOSE)


@pytest.mark.parametrize("kernel", range(4))
def test_a_constant_selector_is_that_kernels_convolution(kernel):
    x, weight, selector, bias = case()
    given = x, weight, torch.full_like(selector, kernel), bias, 1, 1
    y, _, to_weight, _ = results(switched_conv2d, *given)
    torch.testing.assert_close(y, F.conv2d(x, weight[kernel], bias, 1, 1), **CLOSE)
    others = [j for j in range(4) if j != kernel]
    assert to_weight[kernel].all()
    assert not to_weight[others].any(), "a kernel that is never chosen learns nothing"


def test_linear_in_input_weight_and_shares():
    x, weight, selector, _ = case()
    torch.manual_seed(5)
    more_x, more_weight, shares, more_shares = torch.randn_like(x), torch.randn_like(weight), *(
        torch.randn(2, 4, 6, 7, dtype=DOUBLE) for _ in range(2)
    )  # fmt: skip

    def f(x, weight, selector):
        return switched_conv2d(x, weight, selector, None, 1, 1)

    for s in (selector, shares):
        torch.testing.assert_close(f(3 * x - more_x, weight, s), 3 * f(x, weight, s) - f(more_x, weight, s), **CLOSE)
        sums = 3 * f(x, weight, s) - f(x, more_weight, s)
        torch.testing.assert_close(f(x, 3 * weight - more_weight, s), sums, **CLOSE)
    sums = 3 * f(x, weight, shares) - f(x, weight, more_shares)
    torch.testing.assert_close(f(x, weight, 3 * shares - more_shares), sums, **CLOSE)


def test_kernels_have_no_order():
    x, weight, selector, bias = case()
    order = torch.tensor([2, 0, 3, 1])  # new kernel j is the old order[j]
    new_name = order.argsort()
    y = switched_conv2d(x, weight[order], new_name[selector], bias, 1, 1)
    torch.testing.assert_close(y, switched_conv2d(x, weight, selector, bias, 1, 1), **CLOSE)
    shares = simplex(x, 4)
    y = switched_conv2d(x, weight[order], shares[:, order], bias, 1, 1)
    torch.testing.assert_close(y, switched_conv2d(x, weight, shares, bias, 1, 1), **CLOSE)
    assert not torch.allclose(y, switched_conv2d(x, weight[order], shares, bias, 1, 1))


def test_what_moves_with_the_input():
    """Shifted on a ring: the output shifts along if and only if the selector does."""
    x, weight, selector, _ = case()

    def on_a_ring(x, selector):
        return switched_conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, selector)

    def moved(tensor):
        return tensor.roll((1, 2), (-2, -1))

    for s in (selector, simplex(x, 4)):
        torch.testing.assert_close(on_a_ring(moved(x), moved(s)), moved(on_a_ring(x, s)), **CLOSE)
        assert not torch.allclose(on_a_ring(moved(x), s), moved(on_a_ring(x, s)))
    constant = torch.full_like(selector, 2)
    torch.testing.assert_close(on_a_ring(moved(x), constant), moved(on_a_ring(x, constant)), **CLOSE)


def test_the_bias_counts_once():
    x, weight, selector, bias = case()
    for s in (selector, simplex(x, 4), torch.randn(2, 4, 6, 7, dtype=DOUBLE), torch.zeros(2, 4, 6, 7, dtype=DOUBLE)):
        with_bias, without = (switched_conv2d(x, weight, s, b, 1, 1) for b in (bias, None))
        torch.testing.assert_close(with_bias - without, bias.view(1, -1, 1, 1).expand_as(without), **CLOSE)
    leaf = bias.clone().requires_grad_()
    switched_conv2d(x, weight, selector, leaf, 1, 1).sum().backward()
    assert leaf.grad.tolist() == [2 * 6 * 7] * 5


def test_a_share_is_worth_what_its_kernel_makes_along_the_slope():
    x, weight, _, bias = case()
    shares = simplex(x, 4).requires_grad_()
    y = switched_conv2d(x, weight, shares, bias, 1, 1)
    slope = torch.randn_like(y)
    (to_shares,) = torch.autograd.grad(y, shares, slope)
    expected = torch.stack([(slope * F.conv2d(x, kernel, None, 1, 1)).sum(1) for kernel in weight], 1)
    torch.testing.assert_close(to_shares, expected, **CLOSE)


def test_a_kernel_without_a_share_has_no_gradient():
    x, weight, _, bias = case()
    shares = simplex(x, 4)
    shares[:, 2] = 0
    _, _, to_weight, _ = results(switched_conv2d, x, weight, shares, bias, 1, 1)
    assert to_weight.flatten(1).any(1).tolist() == [True, True, False, True]


def test_shares_become_a_choice_as_the_temperature_falls():
    x, weight, _, bias = case()
    logits = torch.randn(2, 4, 6, 7, dtype=DOUBLE)
    hard = switched_conv2d(x, weight, logits.argmax(1), bias, 1, 1)
    ways = [switched_conv2d(x, weight, (logits / t).softmax(1), bias, 1, 1) for t in (1, 0.1, 0.01, 1e-5)]
    distances = [(way - hard).abs().mean().item() for way in ways]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.1
    torch.testing.assert_close(ways[-1], hard, **CLOSE)
    assert torch.equal(switched_conv2d(x, weight, (logits**3).argmax(1), bias, 1, 1), hard), "no monotone map matters"


@pytest.mark.parametrize("shares", [False, True], ids=["integers", "floats"])
@pytest.mark.parametrize(("k", "stride", "padding"), [(3, 1, 1), (3, 2, 0), (2, 3, 1), (1, 1, 0)])
def test_first_and_second_derivatives_against_finite_differences(k, stride, padding, shares):
    shape = (2, 2, 4, 5)
    x, weight, selector, bias = case(shape, 3, 3, k, stride, padding)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    if shares:
        leaves.append(torch.rand(2, 3, *out_size(shape, k, stride, padding), dtype=DOUBLE).requires_grad_())

    def function(x, weight, bias, s=selector):
        return switched_conv2d(x, weight, s, bias, stride, padding)

    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


def test_only_the_gradient_that_is_asked_for():
    x, weight, selector, bias = case()
    _, *expected = results(switched_conv2d, x, weight, selector, bias, 1, 1)
    torch.manual_seed(1)
    slope = (torch.randn(2, 5, 6, 7, dtype=DOUBLE) * 16).round().div(16)
    for leaf, exact in zip((x, weight, bias), expected, strict=True):
        leaf.requires_grad_()
        (actual,) = torch.autograd.grad(switched_conv2d(x, weight, selector, bias, 1, 1), leaf, slope)
        leaf.requires_grad_(False)
        torch.testing.assert_close(actual, exact, **CLOSE)


LAYOUTS = {
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "every second": lambda t: torch.stack([t, -t], -1).flatten(3)[..., ::2],
    "expanded": lambda t: t[:1, :, :, :1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_in_memory(layout):
    x, weight, selector, bias = case()
    x = LAYOUTS[layout](x)
    weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
    selector = selector.transpose(1, 2).contiguous().transpose(1, 2)
    expected = results(by_unfolding, x, weight, selector, bias, 1, 1)
    for actual, exact in zip(results(switched_conv2d, x, weight, selector, bias, 1, 1), expected, strict=True):
        torch.testing.assert_close(actual, exact, **CLOSE)
    leaf = x.detach().requires_grad_()
    switched_conv2d(leaf, weight, selector, None, 1, 1).sum().backward()  # a slope with strides of zero
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("index", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_types(dtype, index):
    x, weight, selector, bias = case((2, 8, 6, 7), dtype=dtype)
    actual = results(switched_conv2d, x, weight, selector.to(index), bias, 1, 1)
    exact = results(by_unfolding, x.double(), weight.double(), selector, bias.double(), 1, 1)
    assert {tensor.dtype for tensor in actual} == {dtype}
    for ours, reference in zip(actual, exact, strict=True):
        error = (ours.double() - reference).abs().max() / reference.abs().max()
        # Half precision is rounded once, in the end: sums of a hundred numbers are made in float32.
        assert error <= torch.finfo(dtype).eps * (20 if dtype.itemsize > 2 else 2)


def test_the_same_in_every_run_and_for_an_empty_batch():
    given = (*case((4, 8, 20, 20), 16, dtype=torch.float32), 1, 1)
    for once, again in zip(results(switched_conv2d, *given), results(switched_conv2d, *given), strict=True):
        assert torch.equal(once, again)
    x, weight, selector, bias = case((0, 3, 6, 7))
    y, to_x, to_weight, _ = results(switched_conv2d, x, weight, selector, bias, 1, 1)
    assert (y.shape, to_x.shape) == ((0, 5, 6, 7), (0, 3, 6, 7))
    assert not to_weight.any()


def test_as_much_arithmetic_as_one_convolution_however_many_kernels():
    def count(function, *given) -> int:
        with FlopCounterMode(display=False) as counter:
            function(*given)
        return counter.get_total_flops()

    for kernels in (1, 4, 32):
        x, weight, selector, bias = case(kernels=kernels)
        one = count(F.conv2d, x, weight[0], bias, 1, 1)
        assert count(switched_conv2d, x, weight, selector, bias, 1, 1) == one
        assert count(results, switched_conv2d, x, weight, selector, bias, 1, 1) == 3 * one
        assert count(switched_conv2d, x, weight, simplex(x, kernels), bias, 1, 1) == kernels * one


REFUSED = [
    (lambda x, w, s, b: (x[0], w, s, b), r"x \(N, C_in, H, W\) and a weight .*, got x \(3, 6, 7\), weight \(4, 5, 3"),
    (lambda x, w, s, b: (x, w[0], s, b), r"weight \(5, 3, 3, 3\), selector \(2, 6, 7\), bias \(5,\)"),
    (lambda x, w, s, b: (x[:, :2], w, s, b), r"x \(2, 2, 6, 7\), weight \(4, 5, 3, 3, 3\)"),
    (lambda x, w, s, b: (x, w[..., :2], s, b), r"weight \(4, 5, 3, 3, 2\)"),
    (lambda x, w, s, b: (x, w[:0], s, b), r"at least one kernel, channel and pixel, got .* weight \(0, 5"),
    (lambda x, w, s, b: (x, w, s[:, 1:], b), r"integers \(2, 6, 7\) or of floats \(2, 4, 6, 7\).*selector \(2, 5, 7\)"),
    (lambda x, w, s, b: (x, w, s[:1], b), r"got torch.int64 with .*selector \(1, 6, 7\)"),
    (lambda x, w, s, b: (x, w, one_hot(s, 4), b), r"got torch.int64 with .*selector \(2, 4, 6, 7\)"),
    (lambda x, w, s, b: (x, w, s.to(x), b), r"got torch.float32 with .*selector \(2, 6, 7\)"),
    (lambda x, w, s, b: (x, w, one_hot(s, 5).to(x), b), r"floats \(2, 4, 6, 7\).*selector \(2, 5, 6, 7\)"),
    (lambda x, w, s, b: (x, w, s, b[1:]), r"a bias \(5,\), one for all kernels, got .*bias \(4,\)"),
    (lambda x, w, s, b: (x, w, s, b[0]), r"bias \(\)"),
    (lambda x, w, s, b: (x.double(), w, s, b), r"x torch.float64, weight torch.float32, selector torch.int64"),
    (lambda x, w, s, b: (x, w, s, b.half()), r"one floating dtype.*bias torch.float16"),
    (lambda x, w, s, b: (x, w, one_hot(s, 4).double(), b), r"selector torch.float64"),
    (lambda x, w, s, b: (x.int(), w.int(), s, b.int()), r"x torch.int32"),
    (lambda x, w, s, b: (x, w, s == 1, b), r"selector torch.bool"),
    (lambda x, w, s, b: (x, w, s.to("meta"), b), r"one device, got x on cpu, weight on cpu, selector on meta"),
    (lambda x, w, s, b: (x, w, s + 1, b), r"indices from 0 to 3, for a weight \(4, 5, 3, 3, 3\); got some from 1 to 4"),
    (lambda x, w, s, b: (x, w, s - 1, b), r"indices from 0 to 3, .* got some from -1 to 2"),
    (lambda x, w, s, b: (x, w, s, b, 0, 1), r"whole stride >= 1 and padding >= 0, got 0 and 1"),
    (lambda x, w, s, b: (x, w, s, b, 1, (1, 1)), r"got 1 and \(1, 1\)"),
    (lambda x, w, s, b: (x[..., :2], w, s, b, 1, 0), r"larger than x with a padding of 0: x \(2, 3, 6, 2\)"),
]


@pytest.mark.parametrize(("spoil", "shows"), REFUSED, ids=[shows for _, shows in REFUSED])
def test_what_does_not_fit_is_refused(spoil, shows):
    given = spoil(*case(dtype=torch.float32))
    with pytest.raises(ValueError, match=shows):
        switched_conv2d(*given, *(() if len(given) == 6 else (1, 1)))


@on_every_device
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_the_kernel_in_its_place_gives_the_same(shape, device, monkeypatch):
    """What a CUDA tensor takes; on the CPU, with the kernel run by g++."""
    given = (*case(*shape, device=device), *shape[-2:])
    expected = results(by_unfolding, *given)
    calls, kernel = [], switched.kernels.switched_conv2d
    monkeypatch.setattr(switched.kernels, "switched_conv2d", lambda *given: calls.append(given) or kernel(*given))
    monkeypatch.setattr(switched.on_cuda, "usable", lambda tensor: True)
    for actual, exact in zip(results(switched_conv2d, *given), expected, strict=True):
        torch.testing.assert_close(actual, exact, **CLOSE)
    assert len(calls) == 1


# The layer


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_of_one_kernel_begins_as_a_convolution(bias):
    torch.manual_seed(3)
    ours = SwitchedConv2d(3, 5, 3, breadth=1, stride=2, padding=1, bias=bias)
    torch.manual_seed(3)
    theirs = nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=bias)
    assert torch.equal(ours.weight[0], theirs.weight)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(ours(x, torch.zeros(2, 4, 4, dtype=torch.long)), theirs(x), rtol=1e-5, atol=1e-6)


def test_every_kernel_begins_like_a_convolutions():
    torch.manual_seed(0)
    layer = SwitchedConv2d(16, 64, 3, breadth=4)
    bound = 1 / (16 * 9) ** 0.5
    for kernel in layer.weight:
        assert kernel.abs().max() <= bound
        torch.testing.assert_close(kernel.std().item(), bound / 3**0.5, rtol=0.03, atol=0)
    assert layer.bias.abs().max() <= bound
    assert len({kernel.sum().item() for kernel in layer.weight}) == 4


def test_what_a_layer_holds():
    layer = SwitchedConv2d(3, 5, 3, breadth=4, padding=1, dtype=DOUBLE)
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes == {"weight": (4, 5, 3, 3, 3), "bias": (5,)}
    assert sum(p.numel() for p in layer.parameters()) == 4 * (5 * 3 * 3 * 3) + 5
    assert repr(layer) == "SwitchedConv2d(3, 5, kernel_size=3, breadth=4, stride=1, padding=1, bias=True)"
    assert "bias" not in SwitchedConv2d(3, 5, 3, breadth=4, bias=False).state_dict()
    x, _, selector, _ = case()
    again = SwitchedConv2d(3, 5, 3, breadth=4, padding=1, dtype=DOUBLE)
    assert not torch.equal(again(x, selector), layer(x, selector))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x, selector), layer(x, selector))
    with pytest.raises(ValueError, match=r"got \(0, 5, 3, 3, 3\)"):
        SwitchedConv2d(3, 5, 3, breadth=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shares", [False, True], ids=["integers", "floats"])
@pytest.mark.parametrize(("k", "stride", "padding"), [(3, 1, 1), (5, 2, 0), (1, 1, 0)])
def test_a_converted_convolution_computes_the_same_and_shares_its_gradient(k, stride, padding, shares, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, k, stride, padding, bias=bias, dtype=DOUBLE)
    before = conv.weight.detach().clone()
    layer = SwitchedConv2d.from_conv(conv, breadth=4)
    x = torch.randn(2, 3, 9, 8, dtype=DOUBLE)
    expected = conv(x)
    selector = torch.randint(4, (2, *expected.shape[2:]))
    if shares:
        selector = torch.randn(2, 4, *expected.shape[2:], dtype=DOUBLE).softmax(1)
    y = layer(x, selector)
    torch.testing.assert_close(y, expected, **CLOSE)
    slope = torch.randn_like(y)
    y.backward(slope), expected.backward(slope)
    torch.testing.assert_close(layer.weight.grad.sum(0), conv.weight.grad, **CLOSE)
    if bias:
        torch.testing.assert_close(layer.bias.grad, conv.bias.grad, **CLOSE)
    else:
        assert layer.bias is None
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(conv.weight, before), "the convolution is copied"


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 3}, {"dilation": 2}, {"kernel_size": (3, 1)}, {"stride": (1, 2)}, {"padding": (0, 1)},
        {"padding": "same"}, {"padding": 1, "padding_mode": "reflect"},
    ],
    ids=str,
)  # fmt: skip
def test_other_convolutions_are_not_converted(options):
    conv = nn.Conv2d(**({"in_channels": 3, "out_channels": 6, "kernel_size": 3} | options))
    with pytest.raises(ValueError, match=r"got Conv2d\(3, 6"):
        SwitchedConv2d.from_conv(conv, 2)


def test_these_tests_find_a_wrong_adjoint(monkeypatch):
    """Overlapping patches summed one pixel off."""
    correct = switched._Patches.sum_over_overlaps
    monkeypatch.setattr(switched._Patches, "sum_over_overlaps", lambda self, rows: correct(self, rows).roll(1, -1))
    with pytest.raises(AssertionError):
        test_a_selector_of_integers_is_the_definition(SHAPES[1], 100, monkeypatch)
