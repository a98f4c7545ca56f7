"""``reprise.kernels.warp`` against PyTorch and against what mathematics says of it, on the CPU and on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from devices import NEEDS_GPP, on_every_device, plant
from torch.autograd import gradcheck
from torch.library import opcheck
from warp_cases import DOUBLE, by_gathering, by_grid_sample, case, results

from reprise.kernels import warp, warping

SHAPES = [  # image, target: more than a block in each direction, fewer than a warp, single rows, pixels and examples
    ((2, 3, 6, 7), None), ((1, 1, 1, 1), (3, 4)), ((3, 2, 1, 9), (5, 2)), ((2, 1, 9, 1), None), ((1, 5, 4, 4), (1, 1)),
    ((2, 2, 40, 70), None), ((1, 9, 17, 33), (33, 65)), ((2, 3, 5, 5), (9, 3)),
]  # fmt: skip


@on_every_device
@pytest.mark.parametrize(("shape", "target"), SHAPES, ids=str)
def test_values_and_gradients(shape, target, device):
    image, flow = case(shape, target, device=device)
    # Atomics on a GPU add in any order, which in float64 shows in the last digits only.
    for ours, exact in zip(results(warp, image, flow), results(by_gathering, image, flow), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)


@on_every_device
@pytest.mark.parametrize("seed", range(3))
def test_as_grid_sample_away_from_kinks(seed, device):
    image, flow = case((2, 4, 13, 11), (7, 15), seed=seed, device=device)
    for ours, theirs in zip(results(warp, image, flow), results(by_grid_sample, image, flow), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


PAIRS = [(t, t) for t in warping.FLOATS] + [(t, torch.float32) for t in warping.FLOATS if t != torch.float32]
PAIRS += [(torch.float32, torch.float64), (torch.float32, torch.bfloat16)]


@on_every_device
@pytest.mark.parametrize(("image_type", "flow_type"), PAIRS, ids=str)
def test_every_pair_of_types(image_type, flow_type, device):
    image, flow = case((2, 3, 20, 30), dtype=torch.float32, device=device)
    image, flow = image.to(image_type), flow.to(flow_type)
    actual, exact = results(warp, image, flow), results(by_gathering, image.double(), flow.double())
    assert [tensor.dtype for tensor in actual] == [image_type, image_type, flow_type]
    rounding = max(torch.finfo(image_type).eps, torch.finfo(flow_type).eps, torch.finfo(torch.float32).eps * 30)
    if torch.float64 in (image_type, flow_type):
        rounding = max(torch.finfo(image_type).eps, torch.finfo(flow_type).eps)
    for ours, reference in zip(actual, exact, strict=True):
        error = (ours.double() - reference).abs().max() / reference.abs().max()
        assert error <= 2 * rounding


@on_every_device
@pytest.mark.parametrize("flow_type", [torch.float16, torch.float32], ids=str)
def test_half_images_are_sampled_at_float_positions(flow_type, device):
    # In half precision the numbers beyond 2,048 are two apart: half a pixel would be lost there.
    image = torch.randn(1, 1, 1, 4096, device=device).half()
    flow = torch.zeros(1, 2, 1, 4096, dtype=flow_type, device=device)
    flow[:, 0] = 0.5
    right = torch.cat([image[..., 1:], image[..., -1:]], -1)
    expected = ((image.float() + right.float()) / 2).half()
    torch.testing.assert_close(warp(image, flow), expected)


LAYOUTS = {
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "every second": lambda x: torch.stack([x, -x], -1).flatten(3)[..., ::2],
    "expanded": lambda x: x[:1, :, :, :1].expand_as(x),
}


@on_every_device
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_in_memory(layout, device):
    image, flow = (LAYOUTS[layout](tensor) for tensor in case((2, 3, 6, 7), device=device))
    expected = results(by_gathering, image, flow)
    for ours, exact in zip(results(warp, image, flow), expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)
    # Autograd hands on expanded gradients, too: those of a sum have strides of zero.
    leaf = image.detach().requires_grad_()
    (ones,) = torch.autograd.grad(warp(leaf, flow).sum(), leaf)
    torch.testing.assert_close(ones.sum(), torch.tensor(float(flow.numel() // 2 * 3), dtype=DOUBLE, device=device))


@on_every_device
def test_whole_numbered_flow_is_a_shift_with_the_border_repeated(device):
    image, _ = case((1, 2, 5, 6), device=device)
    flow = torch.zeros(1, 2, 5, 6, dtype=DOUBLE, device=device)
    assert torch.equal(warp(image, flow), image)
    flow[:, 0], flow[:, 1] = 2, -1
    expected = F.pad(image, (0, 2, 1, 0), mode="replicate")[:, :, :5, 2:]
    assert torch.equal(warp(image, flow), expected)


@on_every_device
def test_a_linear_ramp_is_reproduced_and_a_constant_kept(device):
    y, x = torch.meshgrid(torch.arange(9.0, dtype=DOUBLE), torch.arange(11.0, dtype=DOUBLE), indexing="ij")
    ramp = (3 * x - 2 * y + 5).view(1, 1, 9, 11).to(device)
    torch.manual_seed(0)
    flow = (torch.rand(1, 2, 9, 11, dtype=DOUBLE) * 2 - 1).to(device)
    sampled_x = (x.to(device) + flow[:, 0]).clamp(0, 10)
    sampled_y = (y.to(device) + flow[:, 1]).clamp(0, 8)
    torch.testing.assert_close(warp(ramp, flow)[0], 3 * sampled_x - 2 * sampled_y + 5)
    assert torch.equal(warp(torch.full_like(ramp, 7), flow * 20), torch.full_like(ramp, 7))


@on_every_device
def test_warping_is_linear_and_its_gradient_is_the_adjoint(device):
    image, flow = case((2, 3, 8, 9), (5, 6), device=device)
    leaf = image.detach().requires_grad_()
    out = warp(leaf, flow)
    other = torch.randn_like(out)
    (back,) = torch.autograd.grad(out, leaf, other, retain_graph=True)
    torch.testing.assert_close((out * other).sum(), (image * back).sum())
    # The four weights of a pixel sum to one: what is sent back is neither lost nor made, also across the border.
    (mass,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    torch.testing.assert_close(mass.sum(), torch.tensor(float(out.numel()), dtype=DOUBLE, device=device))
    assert mass.min() >= 0


@on_every_device
def test_left_of_the_border_positions_are_rounded_down(device):
    """FlowNet2's resample2d takes int(x) for floor(x) in its gradient, which for x < 0 rounds the wrong way."""
    image = torch.tensor([[[[10.0, 20.0, 40.0]]]], dtype=DOUBLE, device=device)
    for position, value, slope in [(-0.25, 10, 0), (0.25, 12.5, 10), (1.5, 30, 20), (2.5, 40, 0), (-1.75, 10, 0)]:
        flow = torch.tensor([[[[position]], [[0.0]]]], dtype=DOUBLE, device=device)
        leaves = image.detach().requires_grad_(), flow.requires_grad_()
        out = warp(*leaves)
        to_image, to_flow = torch.autograd.grad(out.sum(), leaves)
        assert out.item() == pytest.approx(value)
        assert to_flow[0, 0].item() == pytest.approx(slope)
        assert to_image.sum().item() == pytest.approx(1)
        assert to_image.min() >= 0, "a negative weight: the fraction was taken from the wrong pixel"


@on_every_device
def test_kinks_have_the_derivative_to_the_right(device):
    # Where grid_sample has none at the first pixel: a flow that starts from zero would not move the first column.
    ramp = torch.arange(5.0, dtype=DOUBLE, device=device).view(1, 1, 1, 5)
    flow = torch.zeros(1, 2, 1, 5, dtype=DOUBLE, device=device, requires_grad=True)
    (slope,) = torch.autograd.grad(warp(ramp, flow).sum(), flow)
    assert slope[0, 0, 0].tolist() == [1, 1, 1, 1, 0]


@on_every_device
@pytest.mark.parametrize("dtype", warping.FLOATS, ids=str)
def test_nan_stays_in_its_pixel_and_infinity_in_bounds(dtype, device):
    image, flow = case((2, 3, 6, 7), dtype=dtype, device=device)
    calm = flow.clone()
    wild = [(0, 0, 2, 3, torch.nan), (1, 1, 0, 0, torch.nan), (0, 0, 5, 6, torch.inf), (1, 1, 3, 3, -torch.inf)]
    wild += [(1, 0, 4, 4, torch.finfo(dtype).max), (0, 1, 1, 1, torch.finfo(dtype).min)]
    for n, d, y, x, value in wild:
        flow[n, d, y, x] = value
    out, to_image, to_flow = results(warp, image, flow)
    touched = torch.zeros(2, 6, 7, dtype=torch.bool, device=device)
    for n, _, y, x, value in wild:
        touched[n, y, x] = True
        assert bool(out[n, :, y, x].isnan().all()) == np.isnan(value)
    before = warp(image, calm)
    assert torch.equal(out.movedim(1, -1)[~touched], before.movedim(1, -1)[~touched])
    torch.testing.assert_close(out[0, :, 5, 6], warp(image, flow.nan_to_num(0, 1000, -1000))[0, :, 5, 6])
    assert to_image.isfinite().all()
    assert to_flow.isfinite().all()
    assert to_flow[0, :, 2, 3].tolist() == to_flow[1, :, 0, 0].tolist() == [0, 0]
    assert to_flow[1, 0, 4, 4] == 0, "outside the image a pixel does not move with the flow"


@on_every_device
@pytest.mark.parametrize(
    ("shape", "target"),
    [((0, 3, 4, 4), (4, 4)), ((2, 0, 4, 4), (4, 4)), ((2, 3, 4, 4), (0, 5)), ((1, 1, 0, 3), (2, 0))],
)
def test_empty_batches_and_targets(shape, target, device):
    image, flow = torch.zeros(shape, device=device), torch.zeros(shape[0], 2, *target, device=device)
    out, to_image, to_flow = results(warp, image, flow)
    assert out.shape == (*shape[:2], *target)
    assert not to_image.any()
    assert not to_flow.any()


REFUSED = [
    ((2, 3, 4), (2, 2, 4, 4), r"image \(2, 3, 4\) and flow \(2, 2, 4, 4\)"),
    ((2, 3, 4, 4), (2, 3, 4, 4), r"a flow \(N, 2, H', W'\), got image .* and flow \(2, 3, 4, 4\)"),
    ((2, 3, 4, 4), (1, 2, 4, 4), r"image \(2, 3, 4, 4\) and flow \(1, 2, 4, 4\)"),
    ((2, 3, 0, 4), (2, 2, 4, 4), r"without pixels: image \(2, 3, 0, 4\)"),
]


@pytest.mark.parametrize(("image", "flow", "shows"), REFUSED)
def test_wrong_shapes_are_refused(image, flow, shows):
    with pytest.raises(ValueError, match=shows):
        warp(torch.zeros(image), torch.zeros(flow))


def test_wrong_types_and_devices_are_refused():
    image, flow = torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2, 2)
    with pytest.raises(ValueError, match=r"image torch.int32 and flow torch.float32"):
        warp(image.int(), flow)
    with pytest.raises(ValueError, match="image on cpu and flow on meta"):
        warp(image, flow.to("meta"))
    with pytest.raises(ValueError, match="fewer than 2\\^31 pixels"):
        warp(torch.zeros(1, 1, 1, 1).expand(1, 1, 2**16, 2**16), flow)


@on_every_device
def test_gradients_against_finite_differences(device):
    image, flow = case((2, 2, 4, 5), (3, 4), device=device)
    image.requires_grad_(), flow.requires_grad_()
    # On a GPU sums come out in any order: two backward passes may differ by rounding.
    assert gradcheck(warp, (image, flow), nondet_tol=0.0 if device == "cpu" else 1e-10)


@on_every_device
def test_only_the_gradient_that_is_asked_for(device):
    image, flow = case(device=device)
    _, to_image, to_flow = results(warp, image, flow)
    torch.manual_seed(1)
    slope = (torch.randn(image.shape, dtype=DOUBLE) * 16).round().div(16).to(device)
    for leaf, expected in ((image, to_image), (flow, to_flow)):
        leaf.requires_grad_()
        (actual,) = torch.autograd.grad(warp(image, flow), leaf, slope)
        leaf.requires_grad_(False)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@on_every_device
def test_a_second_derivative_is_an_error(device):
    image, flow = case(device=device)
    flow.requires_grad_()
    (slope,) = torch.autograd.grad(warp(image, flow).square().sum(), flow, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        slope.sum().backward()


@on_every_device
def test_as_an_operator_of_torch(device):
    image, flow = case(device=device)
    slope = torch.randn(image.shape, dtype=DOUBLE).to(device)
    opcheck(torch.ops.reprise.warp.default, (image.requires_grad_(), flow.requires_grad_()))
    tests = ("test_schema", "test_faketensor")  # its own derivative is refused
    for wanted in ((True, True), (False, True), (True, False)):
        arguments = (slope, image.detach(), flow.detach(), *wanted)
        opcheck(torch.ops.reprise.warp_backward.default, arguments, test_utils=tests)


@on_every_device
def test_compiled_by_torch_in_one_graph(device):
    image, flow = case(device=device)

    def blend(image, flow):
        return warp(image * 2, flow.tanh()) + 1

    compiled = torch.compile(blend, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(results(compiled, image, flow), results(blend, image, flow), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-12, atol=1e-12)


@NEEDS_GPP
def test_an_image_of_more_than_2_to_the_31_numbers():
    # Its memory is asked for but never touched (zeros come from calloc), except for the pixels that the flow reaches.
    channels, height, width = 3, 1 << 15, 1 << 15
    try:
        image = torch.from_numpy(np.zeros((1, channels, height, width), np.float16))
        sums = torch.from_numpy(np.zeros((1, channels, height, width), np.float32))
    except MemoryError:
        pytest.skip("this system does not lend 19 GB of untouched memory")
    assert image.numel() > 2**31
    image[0, 2, -2:, -2:] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    flow = torch.tensor([width - 1.5, height - 1.75]).view(1, 2, 1, 1)
    assert warp(image, flow).flatten().tolist() == [0, 0, 2.0]

    backward = warping._kernel("warp_backward", torch.float16, torch.float32)
    slope, grad_flow = torch.full((1, channels, 1, 1), 2.0).half(), torch.zeros(1, 2, 1, 1)
    backward(1, (32, 8), slope, image, flow, sums, grad_flow, 1, channels, height, width, 1, 1)
    assert sums[0, 2, -2:, -2:].tolist() == [[0.75, 0.75], [0.25, 0.25]]
    assert grad_flow.flatten().tolist() == [2.0, 4.0]


@NEEDS_GPP
def test_more_examples_than_a_grid_is_deep():
    image = torch.arange(70_000.0).view(-1, 1, 1, 1)
    assert torch.equal(warp(image, torch.full((70_000, 2, 1, 1), 0.3)), image)


@pytest.mark.parametrize("change", [("? inside_x - left", "? x - (int)x"), ("t.ax * t.ay);", "t.ax * by);")])
@NEEDS_GPP
def test_these_tests_find_planted_bugs(change, monkeypatch):
    """Truncation for floor, and a wrong fourth weight: a comparison that passes for them would prove nothing."""
    plant(monkeypatch, warping, *change)
    with pytest.raises(AssertionError):
        test_values_and_gradients((2, 3, 6, 7), None, "cpu")
