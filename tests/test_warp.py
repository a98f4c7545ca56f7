"""``reprise.functional.warp``: held against a loop, formulas, torch and scipy; and flows that no one should pass."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import map_coordinates
from torch.autograd import gradcheck, gradgradcheck

from reprise.functional import warp

DOUBLE = {"dtype": torch.float64}


def constant_flow(dx: float, dy: float, size: tuple[int, int] = (6, 7), batch: int = 1) -> torch.Tensor:
    return torch.tensor([dx, dy], **DOUBLE)[None, :, None, None].expand(batch, 2, *size)


def off_the_kinks(shape: tuple[int, ...], reach: float) -> torch.Tensor:
    """Random flows up to ``reach`` pixels whose positions keep a tenth of a pixel away from whole pixels."""
    flow = (2 * torch.rand(shape, **DOUBLE) - 1) * reach
    return flow.floor() + 0.1 + 0.8 * (flow - flow.floor())


def by_loop(image: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """Equation 5 with the image continued by its border, one pixel at a time."""
    n, channels, height, width = image.shape
    out = torch.zeros(n, channels, *flow.shape[2:], **DOUBLE)
    for i in range(n):
        for y in range(flow.shape[2]):
            for x in range(flow.shape[3]):
                at_x, at_y = x + flow[i, 0, y, x].item(), y + flow[i, 1, y, x].item()
                for m in (math.floor(at_x), math.floor(at_x) + 1):
                    for k in (math.floor(at_y), math.floor(at_y) + 1):
                        weight = (1 - abs(at_x - m)) * (1 - abs(at_y - k))
                        row, column = min(max(k, 0), height - 1), min(max(m, 0), width - 1)
                        out[i, :, y, x] += weight * image[i, :, row, column]
    return out


def by_grid_sample(image: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    (height, width), (rows, columns) = image.shape[2:], flow.shape[2:]
    x = torch.arange(columns).to(flow) + flow[:, 0]
    y = torch.arange(rows).to(flow)[:, None] + flow[:, 1]
    grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], -1)
    return F.grid_sample(image, grid, padding_mode="border", align_corners=True)


@pytest.fixture
def image() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.rand(2, 3, 6, 7, **DOUBLE)


SIZES = [(6, 7), (3, 4), (9, 2), (1, 1)]  # of the flow; the image is 6x7


@pytest.mark.parametrize("reach", [0.9, 3, 20])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_three_ways_to_warp_and_two_libraries(image, size, reach):
    flow = (2 * torch.rand(2, 2, *size, **DOUBLE) - 1) * reach
    ours = warp(image, flow)
    assert ours.shape == (2, 3, *size)
    torch.testing.assert_close(ours, by_loop(image, flow), rtol=0, atol=1e-13)
    torch.testing.assert_close(ours, by_grid_sample(image, flow), rtol=0, atol=1e-12)
    rows, columns = np.mgrid[: size[0], : size[1]]
    for i in range(2):
        at = rows + flow[i, 1].numpy(), columns + flow[i, 0].numpy()
        for channel in range(3):
            theirs = map_coordinates(image[i, channel].numpy(), at, order=1, mode="nearest")
            np.testing.assert_allclose(ours[i, channel].numpy(), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_flow_is_the_identity_to_the_last_bit(dtype):
    photo = torch.rand(1, 3, 427, 640, dtype=dtype)
    assert torch.equal(warp(photo, torch.zeros(1, 2, 427, 640, dtype=dtype)), photo)


@pytest.mark.parametrize(("dx", "dy"), [(2, 0), (0, -3), (-1, 4), (30, -30)])
def test_whole_pixels_only_move_and_the_border_is_repeated(image, dx, dy):
    rows = (torch.arange(6) + dy).clamp(0, 5)
    columns = (torch.arange(7) + dx).clamp(0, 6)
    assert torch.equal(warp(image, constant_flow(dx, dy, batch=2)), image[:, :, rows][..., columns])


def test_half_a_pixel_is_the_mean_of_neighbours(image):
    moved = warp(image, constant_flow(0.5, 0, batch=2))
    torch.testing.assert_close(moved[..., :-1], (image[..., 1:] + image[..., :-1]) / 2)
    assert torch.equal(moved[..., -1], image[..., -1])


def test_ramps_are_exact_and_constants_stay():
    y, x = torch.meshgrid(torch.arange(6, **DOUBLE), torch.arange(7, **DOUBLE), indexing="ij")
    ramp = (2 * x - 3 * y + 1)[None, None]
    flow = (2 * torch.rand(1, 2, 6, 7, **DOUBLE) - 1) * 4
    inside_x, inside_y = (x + flow[:, :1]).clamp(0, 6), (y + flow[:, 1:]).clamp(0, 5)
    torch.testing.assert_close(warp(ramp, flow), 2 * inside_x - 3 * inside_y + 1, rtol=0, atol=1e-12)
    constant = torch.full((1, 1, 6, 7), 0.3, **DOUBLE)
    torch.testing.assert_close(warp(constant, 10 * flow), constant, rtol=0, atol=1e-15)


def test_weights_sum_to_one_and_are_not_negative():
    """Row by row of the matrix that a warp is: the gradients of each target pixel with respect to the image."""
    zero = torch.zeros(1, 1, 5, 4, **DOUBLE)
    flow = (2 * torch.rand(1, 2, 5, 4, **DOUBLE) - 1) * 5
    matrix = torch.autograd.functional.jacobian(lambda u: warp(u, flow).flatten(), zero).flatten(1)
    assert (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(1), torch.ones(20, **DOUBLE), rtol=0, atol=1e-15)
    image = torch.randn(1, 1, 5, 4, **DOUBLE)
    torch.testing.assert_close(matrix @ image.flatten(), warp(image, flow).flatten(), rtol=0, atol=1e-13)


def test_adjoint(image):
    u = image.clone().requires_grad_()
    flow = 3 * torch.randn(2, 2, 4, 5, **DOUBLE)
    v = torch.randn(2, 3, 4, 5, **DOUBLE)
    warped = warp(u, flow)
    (back,) = torch.autograd.grad(warped, u, v)
    torch.testing.assert_close((warped * v).sum(), (u * back).sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [(4, 5), (7, 3)], ids=str)
def test_derivatives(size):
    torch.manual_seed(1)
    image = torch.randn(2, 2, 4, 5, **DOUBLE, requires_grad=True)
    flow = off_the_kinks((2, 2, *size), 4).requires_grad_()
    assert gradcheck(warp, (image, flow))
    assert gradgradcheck(warp, (image, flow))


def test_gradients_as_torchs_inside_the_image(image):
    flow = off_the_kinks((2, 2, 6, 7), 8)
    slope = torch.randn(2, 3, 6, 7, **DOUBLE)
    ours, theirs = [], []
    for function, found in ((warp, ours), (by_grid_sample, theirs)):
        leaves = image.clone().requires_grad_(), flow.clone().requires_grad_()
        found += torch.autograd.grad(function(*leaves), leaves, slope)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-11)


def test_slope_at_whole_pixels_and_outside():
    ramp = torch.arange(5, **DOUBLE).square().expand(1, 1, 3, 5)
    flow = torch.zeros(1, 2, 3, 5, **DOUBLE, requires_grad=True)
    warp(ramp, flow).sum().backward()
    # Towards larger coordinates, the first column included (there grid_sample gives 0); at the end nothing follows.
    assert flow.grad[0, 0].tolist() == [[1, 3, 5, 7, 0]] * 3
    for dx in (-9.3, -0.4, 4.2, 40, -1, 5, math.inf, -math.inf):
        beyond = torch.zeros(1, 2, 1, 1, **DOUBLE)
        beyond[:, 0] = dx
        beyond.requires_grad_()
        warp(ramp, beyond).sum().backward()
        assert beyond.grad.tolist() == [[[[0]], [[0]]]], dx


@pytest.mark.parametrize("dx", [-0.3, -0.999, -1, -1.5, -7.25])
def test_left_of_the_border_positions_are_rounded_down(image, dx):
    """Rounded towards zero, as in the image gradient of FlowNet2's kernel, -0.3 is 0.3 to the wrong side of pixel 0."""
    moved = warp(image, constant_flow(dx, 0, batch=2))
    torch.testing.assert_close(moved[..., 0], image[..., 0], rtol=0, atol=1e-15)


def test_a_flow_that_is_not_a_number_stays_where_it_is(image):
    flow = torch.randn(2, 2, 6, 7, **DOUBLE)
    expected = warp(image, flow)
    flow[0, 0, 2, 3] = flow[1, 1, 5, 0] = math.nan
    u, f = image.clone().requires_grad_(), flow.clone().requires_grad_()
    moved = warp(u, f)
    touched = torch.zeros(2, 1, 6, 7, dtype=torch.bool)
    touched[0, 0, 2, 3] = touched[1, 0, 5, 0] = True
    assert moved.isnan().equal(touched.expand(2, 3, 6, 7))
    assert torch.equal(moved[~moved.isnan()], expected[~touched.expand(2, 3, 6, 7)])
    moved.sum().backward()
    assert u.grad.isfinite().all()
    assert f.grad.isfinite().all()
    assert (f.grad[touched.expand(2, 2, 6, 7)] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("far", [1e4, 1e30, math.inf])
def test_a_huge_flow_finds_the_corner(image, dtype, far):
    far = min(far, torch.finfo(dtype).max) if far != math.inf else far
    flow = torch.full((2, 2, 2, 2), far, dtype=dtype)
    flow[:, 1] = -far
    u, f = image.to(dtype).requires_grad_(), flow.requires_grad_()
    moved = warp(u, f)
    assert torch.equal(moved, u[:, :, :1, -1:].expand(2, 3, 2, 2))
    moved.sum().backward()
    assert u.grad[:, :, 0, -1].eq(4).all()
    assert f.grad.eq(0).all()


def layouts(tensor: torch.Tensor) -> list[torch.Tensor]:
    n, c, h, w = tensor.shape
    room = torch.full((n, c, 2 * h, 3 * w), math.nan, dtype=tensor.dtype)
    room[:, :, ::2, 1::3] = tensor
    return [
        tensor.transpose(2, 3).contiguous().transpose(2, 3),
        tensor.to(memory_format=torch.channels_last),
        room[:, :, ::2, 1::3],
    ]


def test_any_layout_in_memory(image):
    flow = torch.randn(2, 2, 6, 7, **DOUBLE)
    expected = warp(image, flow)
    for picture in layouts(image):
        for way in layouts(flow):
            assert not (picture.is_contiguous() and way.is_contiguous())
            assert torch.equal(warp(picture, way), expected)
    assert torch.equal(warp(image[:1].expand(2, -1, -1, -1), flow)[0], expected[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_at_single_precision_positions(dtype):
    # Half precision has no odd numbers above 2,048 (bfloat16: 256): there a position could not even be a whole pixel.
    width = 3001
    image = (torch.arange(width) % 2).to(dtype).expand(1, 1, 1, width)
    for flow_dtype in (dtype, torch.float32):
        moved = warp(image, torch.zeros(1, 2, 1, width, dtype=flow_dtype))
        assert moved.dtype == dtype
        assert torch.equal(moved, image)
    moved = warp(image, torch.full((1, 2, 1, width), 0.25))
    assert moved[0, 0, 0, :4].tolist() == [0.25, 0.75, 0.25, 0.75]
    assert moved[0, 0, 0, -4:].tolist() == [0.75, 0.25, 0.75, 0.0]


def test_double_precision_flows_keep_their_digits():
    ramp = torch.arange(2000, dtype=torch.float32).expand(1, 1, 1, 2000)
    tiny = torch.full((1, 2, 1, 1), 1500 + 2**-20, **DOUBLE)
    assert warp(ramp.double(), tiny).item() == 1500 + 2**-20
    assert warp(ramp, tiny).dtype == torch.float32


def test_images_and_channels_do_not_mix(image):
    flow = torch.randn(2, 2, 6, 7, **DOUBLE)
    together = warp(image, flow)
    for i in range(2):
        for channel in range(3):
            alone = warp(image[i : i + 1, channel : channel + 1], flow[i : i + 1])
            assert torch.equal(together[i, channel], alone[0, 0])


@pytest.mark.parametrize(("n", "c", "size"), [(0, 3, (4, 4)), (2, 0, (4, 4)), (2, 3, (0, 4)), (2, 3, (4, 0))])
def test_nothing_to_do(n, c, size):
    image = torch.rand(n, c, 6, 7, requires_grad=True)
    moved = warp(image, torch.rand(n, 2, *size))
    assert moved.shape == (n, c, *size)
    moved.sum().backward()
    assert image.grad.shape == image.shape


def test_what_cannot_be_warped_is_refused_as_the_kernel_does():
    with pytest.raises(ValueError, match=r"image \(1, 3, 6, 7\) and flow \(1, 6, 7, 2\)"):
        warp(torch.zeros(1, 3, 6, 7), torch.zeros(1, 6, 7, 2))


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu(image):
    flow = off_the_kinks((2, 2, 5, 4), 6)
    results = []
    for device in ("cpu", "cuda"):
        leaves = image.to(device).requires_grad_(), flow.to(device).requires_grad_()
        moved = warp(*leaves)
        results.append([one.cpu() for one in (moved, *torch.autograd.grad(moved.square().sum(), leaves))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
