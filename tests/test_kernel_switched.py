"""``reprise.kernels.switched_conv2d`` against its definition in PyTorch, on the CPU and on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from devices import NEEDS_GPP, on_every_device, plant
from switched_cases import DOUBLE, SHAPES, by_unfolding, case, results
from torch.autograd import gradcheck
from torch.library import opcheck

from reprise.kernels import Kernel, switched_conv2d, switching

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
# More than a tile of positions (64 or 128) for one kernel, and fewer; parts of a gradient that have nothing to do.
LARGE = ((2, 5, 13, 15), 6, 2, 3, 1, 1)


@on_every_device
@pytest.mark.parametrize("shape", [*SHAPES, LARGE], ids=str)
def test_values_and_gradients(shape, device):
    given = (*case(*shape, device=device), *shape[-2:])
    for ours, exact in zip(results(switched_conv2d, *given), results(by_unfolding, *given), strict=True):
        torch.testing.assert_close(ours, exact, **CLOSE)


@on_every_device
@pytest.mark.parametrize("index", switching._INTEGERS, ids=str)
@pytest.mark.parametrize("dtype", switching.FLOATS, ids=str)
def test_every_type(dtype, index, device):
    x, weight, selector, bias = case((2, 20, 9, 8), 70, dtype=dtype, device=device)
    actual = results(switched_conv2d, x, weight, selector.to(index), bias, 1, 1)
    exact = results(by_unfolding, x.double(), weight.double(), selector, bias.double(), 1, 1)
    assert {tensor.dtype for tensor in actual} == {dtype}
    for ours, reference in zip(actual, exact, strict=True):
        error = (ours.double() - reference).abs().max() / reference.abs().max()
        # Half precision is rounded once, in the end: sums are made in float32.
        assert error <= torch.finfo(dtype).eps * (20 if dtype.itemsize > 2 else 2)


@on_every_device
@pytest.mark.parametrize("kernel", [0, 2])
def test_all_positions_on_one_kernel(kernel, device):
    shape = ((2, 3, 14, 15), 5, 3, 3, 1, 1)
    x, weight, selector, bias = case(*shape, device=device)
    y, _, to_weight, _ = results(switched_conv2d, x, weight, torch.full_like(selector, kernel), bias, 1, 1)
    torch.testing.assert_close(y, F.conv2d(x, weight[kernel], bias, 1, 1), **CLOSE)
    assert to_weight[kernel].all()
    assert not to_weight[[j for j in range(3) if j != kernel]].any()


@on_every_device
@pytest.mark.parametrize("kernels", [3, 300])  # sorted as bytes, or not
def test_an_index_out_of_range_is_not_a_number_there_and_nowhere_else(kernels, device):
    x, weight, selector, bias = case(kernels=kernels, device=device)
    lost = torch.zeros_like(selector, dtype=torch.bool)
    lost[0, 1, 2] = lost[1, 5, 6] = lost[1, 0, 0] = True
    spoilt = selector.clone()
    spoilt[0, 1, 2], spoilt[1, 5, 6], spoilt[1, 0, 0] = -1, kernels, 2**40
    y = switched_conv2d(x, weight, spoilt, bias, 1, 1)
    assert torch.equal(y.isnan().all(1), lost)
    assert torch.equal(y.isnan().any(1), lost)
    # Gradients are as if nothing asked for those positions.
    leaves = [tensor.requires_grad_() for tensor in (x, weight)]
    slope = torch.randn(y.shape, dtype=DOUBLE, device="cpu").to(device)
    actual = torch.autograd.grad(switched_conv2d(x, weight, spoilt, bias, 1, 1), leaves, slope)
    expected = torch.autograd.grad(by_unfolding(x, weight, selector, bias, 1, 1), leaves, slope * ~lost[:, None])
    for ours, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, exact, **CLOSE)


@on_every_device
def test_what_is_not_a_number_stays_in_its_patches(device):
    x, weight, selector, bias = case(device=device)
    x[0, 1, 3, 3] = torch.nan
    spoilt = switched_conv2d(x, weight, selector, bias, 1, 1).isnan()
    expected = torch.zeros_like(spoilt)
    expected[0, :, 2:5, 2:5] = True
    assert torch.equal(spoilt, expected)


LAYOUTS = {
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "every second": lambda t: torch.stack([t, -t], -1).flatten(3)[..., ::2],
    "expanded": lambda t: t[:1, :, :, :1].expand_as(t),
}


@on_every_device
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_in_memory(layout, device):
    x, weight, selector, bias = case(device=device)
    weight, bias = weight.transpose(0, 1).contiguous().transpose(0, 1), bias.repeat_interleave(2)[::2]
    given = LAYOUTS[layout](x), weight, selector.transpose(1, 2).contiguous().transpose(1, 2), bias, 1, 1
    for ours, exact in zip(results(switched_conv2d, *given), results(by_unfolding, *given), strict=True):
        torch.testing.assert_close(ours, exact, **CLOSE)
    leaf = x.detach().requires_grad_()
    switched_conv2d(leaf, weight, selector, None, 1, 1).sum().backward()  # a slope with strides of zero
    assert leaf.grad.isfinite().all()


@on_every_device
def test_channels_lie_last_and_every_run_gives_the_same(device):
    given = (*case((2, 20, 9, 8), 7, dtype=torch.float32, device=device), 1, 1)
    assert switched_conv2d(*given).is_contiguous(memory_format=torch.channels_last)
    for once, again in zip(results(switched_conv2d, *given), results(switched_conv2d, *given), strict=True):
        assert torch.equal(once, again)


@on_every_device
def test_an_empty_batch(device):
    y, to_x, to_weight, to_bias = results(switched_conv2d, *case((0, 3, 6, 7), device=device), 1, 1)
    assert (y.shape, to_x.shape) == ((0, 5, 6, 7), (0, 3, 6, 7))
    assert not to_weight.any()
    assert not to_bias.any()


def test_a_selector_of_floats_is_refused():
    # What else does not fit is checked in one place, which test_switched.py tests.
    x, weight, _, _ = case()
    with pytest.raises(ValueError, match=r"selector of integers \(N, H', W'\), got torch.float64 \(2, 4, 6, 7\)"):
        switched_conv2d(x, weight, torch.zeros(2, 4, 6, 7, dtype=DOUBLE), None, 1, 1)
    big, everywhere = torch.zeros(1, 1, 1, 1).expand(1, 1, 2**15, 2**15), torch.zeros(1, 1, 1).long()
    with pytest.raises(ValueError, match=r"fewer than 2\^30 positions"):
        switched_conv2d(big, weight[:, :, :1, :1, :1].float(), everywhere.expand(1, 2**15, 2**15))


@on_every_device
@pytest.mark.parametrize(("k", "stride", "padding"), [(3, 2, 1), (1, 1, 0)])
def test_gradients_against_finite_differences(k, stride, padding, device):
    x, weight, selector, bias = case((1, 2, 4, 5), 3, 3, k, stride, padding, device=device)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    assert gradcheck(lambda x, w, b: switched_conv2d(x, w, selector, b, stride, padding), leaves)


@on_every_device
def test_only_the_gradient_that_is_asked_for(device):
    x, weight, selector, bias = case(device=device)
    _, *expected = results(switched_conv2d, x, weight, selector, bias, 1, 1)
    torch.manual_seed(1)
    slope = (torch.randn(2, 5, 6, 7, dtype=DOUBLE) * 16).round().div(16).to(device)
    for leaf, exact in zip((x, weight, bias), expected, strict=True):
        leaf.requires_grad_()
        (actual,) = torch.autograd.grad(switched_conv2d(x, weight, selector, bias, 1, 1), leaf, slope)
        leaf.requires_grad_(False)
        torch.testing.assert_close(actual, exact, **CLOSE)


@on_every_device
def test_a_second_derivative_is_an_error(device):
    x, weight, selector, _ = case(device=device)
    y = switched_conv2d(x.requires_grad_(), weight, selector, None, 1, 1)
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        slope.sum().backward()


@on_every_device
def test_as_an_operator_of_torch(device):
    x, weight, selector, bias = case((1, 2, 4, 5), 3, 3, device=device)
    order, bounds = switching._sorted_by_kernel(selector, 3)
    leaves = x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    opcheck(torch.ops.reprise.switched_conv2d.default, (*leaves, order, bounds, [1, 4, 5], 1, 1))
    tests = ("test_schema", "test_faketensor")  # its own derivative is refused
    slope = torch.randn(1, 4, 5, 3, dtype=DOUBLE, device="cpu").to(device)
    for wanted in ((True, True), (False, True), (True, False)):
        arguments = (slope, x.detach(), weight.detach(), order, bounds, 1, 1, *wanted)
        opcheck(torch.ops.reprise.switched_conv2d_backward.default, arguments, test_utils=tests)


@on_every_device
def test_compiled_by_torch_in_one_graph(device):
    x, weight, selector, bias = case(device=device)

    def block(x, weight, selector, bias):
        return switched_conv2d(x * 2, weight, selector, bias, 1, 1).relu() + 1

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    given = x, weight, selector, bias
    for ours, eager in zip(results(compiled, *given), results(block, *given), strict=True):
        torch.testing.assert_close(ours, eager, **CLOSE)


def test_positions_sorted_by_their_kernel():
    selector = torch.tensor([[[2, 0, 7], [0, -1, 2]]])
    order, bounds = switching._sorted_by_kernel(selector, 4)
    assert order.tolist() == [1, 3, 0, 5, 2, 4]
    assert bounds.tolist() == [0, 2, 2, 4, 4, 6]


@NEEDS_GPP
def test_every_position_has_its_block_and_places_go_beyond_2_to_the_31():
    # The kernel's own functions, asked by a probe.
    probe = """
    extern "C" __global__ void probe(const int* bounds, int kernels, int* parts, long long* places, Layer layer) {
        const Part part = part_of(bounds, kernels, blockIdx.x);
        parts[3 * blockIdx.x] = part.kernel;
        parts[3 * blockIdx.x + 1] = part.first;
        parts[3 * blockIdx.x + 2] = part.count;
        const Corner corner = corner_of(layer, layer.out_height * layer.out_width * 29 - 1);
        places[0] = pixel(layer, corner, 1, 1);
        places[1] = pixel(layer, corner, 2, 1);
    }"""
    kernel = Kernel(switching._SOURCE + probe, "probe", SCALAR="float", REAL="float", EACH=4)  # tiles of 64
    layer = switching.np.array([(5, 64, 1, 6000, 7000, 6000, 7000, 3, 1, 1)], switching._LAYER)
    # Sizes of 64, 0, 65, 1 and 130, and 3 that have no kernel.
    bounds = torch.tensor([0, 64, 64, 129, 130, 260, 263], dtype=torch.int32)
    blocks = switching._tiles(torch.empty(263), torch.empty(5, dtype=DOUBLE), 1)[0]
    parts, places = torch.full((blocks, 3), -7, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    kernel(blocks, 1, bounds, 5, parts, places, layer)
    expected = [[0, 0, 64], [2, 64, 64], [2, 128, 1], [3, 129, 1], [4, 130, 64], [4, 194, 64], [4, 258, 2], [5, 260, 3]]
    assert [part for part in parts.tolist() if part[2]] == expected
    assert places.tolist() == [(29 * 6000 * 7000 - 1) * 64, -1]
    assert places[0] > 2**31
    # In the worst case, every kernel and what has none leave a tile unfinished.
    worst = torch.tensor([0, 1, 2, 3, 4, 5, 6], dtype=torch.int32)
    assert switching._tiles(torch.empty(6), torch.empty(5, dtype=DOUBLE), 1)[0] == len(worst) - 1


BUGS = {
    "a kernel beside its own": ("weight + matrix, layer.in_channels", "weight, layer.in_channels"),
    "rows and columns of a patch exchanged": ("pixel(layer, corner, tap / layer.size, tap % layer.size)",
                                              "pixel(layer, corner, tap % layer.size, tap / layer.size)"),
    "the last column left out": ("|| x >= layer.width)", "|| x >= layer.width - 1)"),
    "the stride forgotten": ("column * layer.stride", "column"),
    "the last channels left out": ("first < depth; first", "first + DEPTH <= depth; first"),
    "sums of another tap overwritten": ("+ column] += sums[i][j]", "+ column] = sums[i][j]"),
    "a wrong neighbour's gradient": ("target[own] = own < part.count ? here", "target[own] = here >= 0 ? position"),
    "positions counted by every part": ("bounds[kernel] + blockIdx.x % parts * DEPTH", "bounds[kernel]"),
    "a kernel's last position left out": ("first + own < last ? order", "first + own < last - 1 ? order"),
    "the wrong number of a patch": ("x[here + channel]", "x[here]"),
    "no barrier before slices are used": ("__syncthreads();  // the slices", "// the slices"),
    "no barrier before slices are filled": ("__syncthreads();  // everybody knows where", "// everybody"),
    "no barrier after positions are known": ("__syncthreads();  // everybody knows the", "// everybody"),
}  # fmt: skip


@NEEDS_GPP
@pytest.mark.parametrize("bug", BUGS)
def test_these_tests_find_planted_bugs(bug, monkeypatch):
    plant(monkeypatch, switching, *BUGS[bug])

    def everything() -> None:
        for shape in (SHAPES[2], SHAPES[3], LARGE):
            test_values_and_gradients(shape, "cpu")

    with pytest.raises(AssertionError):
        everything()
