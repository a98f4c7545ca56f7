"""What the tests and the benchmark of the warp share: the definition in PyTorch, two ways, and random cases."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DOUBLE = torch.float64


def by_gathering(image: Tensor, flow: Tensor) -> Tensor:
    """The definition in plain PyTorch: four gathered pixels and their weights."""
    n, c, height, width = image.shape
    rows, columns = flow.shape[2:]
    y = torch.arange(rows, device=flow.device).view(1, -1, 1) + flow[:, 1]
    x = torch.arange(columns, device=flow.device).view(1, 1, -1) + flow[:, 0]
    x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
    left, top = x.detach().floor().long(), y.detach().floor().long()
    a, b = (x - left).unsqueeze(1), (y - top).unsqueeze(1)

    def pixel(row: Tensor, column: Tensor) -> Tensor:
        place = (row.clamp(max=height - 1) * width + column.clamp(max=width - 1)).reshape(n, 1, -1).expand(n, c, -1)
        return image.flatten(2).gather(2, place).view(n, c, rows, columns)

    above = (1 - a) * pixel(top, left) + a * pixel(top, left + 1)
    below = (1 - a) * pixel(top + 1, left) + a * pixel(top + 1, left + 1)
    return (1 - b) * above + b * below


def grid_of(flow: Tensor, height: int, width: int) -> Tensor:
    """The flow as grid_sample wants it: absolute positions, -1 and 1 the centres of the outermost pixels.

    Sizes above 1 only, since it divides by size - 1.
    """
    rows, columns = flow.shape[2:]
    x = torch.arange(columns, device=flow.device).view(1, 1, -1) + flow[:, 0]
    y = torch.arange(rows, device=flow.device).view(1, -1, 1) + flow[:, 1]
    return torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], -1)


def by_grid_sample(image: Tensor, flow: Tensor) -> Tensor:
    """What the field does without a kernel."""
    return sampled(image, grid_of(flow, *image.shape[2:]))


def sampled(image: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)


def case(shape=(2, 3, 6, 7), target=None, reach=3.0, dtype=DOUBLE, device="cpu", seed=0) -> tuple[Tensor, Tensor]:
    """A random image and a flow that also leaves it, never within 0.1 of where a derivative jumps."""
    torch.manual_seed(seed)
    image = torch.randn(shape, dtype=DOUBLE)
    flow = (torch.randn(shape[0], 2, *(target or shape[2:]), dtype=DOUBLE) * reach).floor()
    flow += 0.1 + 0.8 * torch.rand(flow.shape, dtype=DOUBLE)
    return image.to(device, dtype), flow.to(device, dtype)


def results(function, image: Tensor, flow: Tensor) -> list[Tensor]:
    """Output and both gradients."""
    image, flow = image.detach().requires_grad_(), flow.detach().requires_grad_()
    out = function(image, flow)
    torch.manual_seed(1)
    slope = (torch.randn(out.shape, dtype=DOUBLE) * 16).round().div(16).to(out)  # the same number in every dtype
    return [out.detach(), *torch.autograd.grad(out, (image, flow), slope)]
