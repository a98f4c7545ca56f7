"""What the kernels are timed against, and at which sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from warp_cases import by_grid_sample, grid_of, sampled

from reprise import metrics
from reprise.kernels import adam_step, batch_norm, parzen, warp

Works = dict[str, Callable[[], list[Tensor]]]


@dataclass(frozen=True)
class Comparison:
    """One operation: its sizes, and who does it. ``prepare`` returns the calls in the order of ``peers``, ours first.

    ``least`` is how many bytes have to be read and written whoever does it, so that a share of a copy's speed can be
    told; 0 where arithmetic is the limit. Peers whose name ends in "compiled" are left out on the CPU.
    """

    name: str
    sizes: dict[str, tuple[int, ...]]
    peers: tuple[str, ...]
    least: Callable[..., int]
    prepare: Callable[[tuple[int, ...], torch.device], list[Callable[[], list[Tensor]]]]

    def size(self, device: str) -> tuple[int, ...]:
        return self.sizes[device]

    def title(self, size: tuple[int, ...]) -> str:
        return f"{self.name} {'x'.join(map(str, size))}"

    def who(self, device: str) -> list[str]:
        ours = "ours" if device == "cuda" else "ours, through g++"
        return [ours, *(peer for peer in self.peers if device == "cuda" or not peer.endswith("compiled"))]

    def works(self, size: tuple[int, ...], device: torch.device) -> Works:
        return dict(zip(self.who(device.type), self.prepare(size, device), strict=False))

    def least_bytes(self, size: tuple[int, ...]) -> int:
        return self.least(*size)


def picture_and_flow(size: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A picture, a smooth flow of a few pixels (as flows are), and the grid that means the same."""
    n, _, height, width = size
    image = torch.randn(size, device=device)
    coarse = 4 * torch.randn(n, 2, max(height // 32, 2), max(width // 32, 2), device=device)
    flow = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
    return image, flow, grid_of(flow, height, width)


def warp_forward(size: tuple[int, ...], device: torch.device) -> list[Callable]:
    image, flow, grid = picture_and_flow(size, device)
    compiled = torch.compile(by_grid_sample)
    return [
        lambda: [warp(image, flow)],
        lambda: [sampled(image, grid)],
        lambda: [by_grid_sample(image, flow)],
        lambda: [compiled(image, flow)],
    ]


def warp_backward(size: tuple[int, ...], device: torch.device) -> list[Callable]:
    image, flow, grid = (tensor.requires_grad_() for tensor in picture_and_flow(size, device))
    slope = torch.randn_like(image)

    def backward(out: Tensor, place: Tensor) -> Callable:
        return lambda: list(torch.autograd.grad(out, (image, place), slope, retain_graph=True))

    def with_ready_grid() -> list[Tensor]:
        to_image, to_grid = of_grid()
        # In units of the grid: turned into pixels only so that results can be compared, one cheap product.
        return [to_image, to_grid.movedim(3, 1) * scale]

    scale = torch.tensor([2 / (size[3] - 1), 2 / (size[2] - 1)], device=device).view(1, 2, 1, 1)
    of_grid = backward(sampled(image, grid), grid)
    return [backward(warp(image, flow), flow), with_ready_grid, backward(by_grid_sample(image, flow), flow)]


def adam(size: tuple[int, ...], device: torch.device) -> list[Callable]:
    """Tensors of many sizes, as a network has them; each takes its part of what the ones before have left."""
    count, rest = size
    sizes = []
    for left in range(count, 0, -1):
        sizes.append(2 * rest // (left + 1))
        rest -= sizes[-1]
    start = [torch.randn(n, device=device) for n in sizes]
    grads = [torch.randn_like(p) for p in start]
    ours, m, v = ([p.clone() for p in start], *([torch.zeros_like(p) for p in start] for _ in range(2)))
    step = 0

    def kernel() -> list[Tensor]:
        nonlocal step
        step += 1
        adam_step(ours, grads, m, v, None, step, lr=0.1)
        return ours

    def torchs(**kind: bool) -> Callable:
        params = [p.clone().requires_grad_() for p in start]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer = torch.optim.Adam(params, lr=0.1, **kind)

        def work() -> list[Tensor]:
            optimizer.step()
            return [p.detach() for p in params]

        return work

    return [kernel, torchs(fused=True), torchs(foreach=True), torchs(foreach=False)]


def by_hand(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Algorithm 1 as one writes it down."""
    mean = x.mean((0, 2, 3), keepdim=True)
    var = (x - mean).square().mean((0, 2, 3), keepdim=True)
    normalised = (x - mean) / torch.sqrt(var + 1e-5)
    return normalised * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def normalisers(size: tuple[int, ...], device: torch.device) -> tuple[list[Tensor], list[Callable]]:
    given = [torch.randn(size, device=device), *(torch.rand(size[1], device=device) for _ in range(2))]
    native = lambda x, weight, bias: F.batch_norm(x, None, None, weight, bias, training=True)  # noqa: E731
    return given, [lambda *g: batch_norm(*g)[0], native, by_hand, torch.compile(by_hand)]


def batch_norm_forward(size: tuple[int, ...], device: torch.device) -> list[Callable]:
    given, functions = normalisers(size, device)
    return [lambda function=function: [function(*given)] for function in functions]


def batch_norm_backward(size: tuple[int, ...], device: torch.device) -> list[Callable]:
    given, functions = normalisers(size, device)
    leaves, slope = [g.requires_grad_() for g in given], torch.randn(size, device=device)
    outs = [function(*leaves) for function in functions[:-1]]
    return [lambda out=out: list(torch.autograd.grad(out, leaves, slope, retain_graph=True)) for out in outs]


def by_cdist(points: Tensor, samples: Tensor, widths: Tensor) -> Tensor:
    """What one writes with the whole matrix of distances: torch.cdist, which takes a matrix product for many rows."""
    exponents = -torch.cdist(points, samples).square() / 2
    constant = points.size(1) * torch.log(widths * math.sqrt(2 * math.pi)) + math.log(len(samples))
    return torch.stack([torch.logsumexp(exponents / width**2, 1) for width in widths]) - constant[:, None]


def parzen_windows(size: tuple[int, ...], device: torch.device) -> list[Callable]:
    points, samples, dimensions, width_count = size
    x, y = (torch.rand(n, dimensions, device=device) for n in (points, samples))
    widths = torch.logspace(-1, 0, width_count, device=device)
    functions = parzen, metrics._parzen_in_chunks, by_cdist
    return [lambda function=function: list(function(x, y, widths)) for function in functions]


CHAIN = ("grid_sample, its grid at hand", "flow to grid to grid_sample", "flow to grid to grid_sample, compiled")
ADAMS = ("torch.optim.Adam fused", "torch.optim.Adam foreach", "torch.optim.Adam, a loop")
PARZENS = ("reprise.metrics without the kernel, in chunks", "torch.cdist and logsumexp")
NORMS = ("torch.nn.functional.batch_norm", "by hand", "by hand, compiled")
VIDEO = {"cuda": (8, 3, 1080, 1920), "cpu": (1, 3, 128, 128)}
FEATURES = {"cuda": (16, 64, 128, 128), "cpu": (1, 16, 32, 32)}
MAPS = {"cuda": (256, 64, 56, 56), "cpu": (8, 16, 14, 14)}
# The gradients are called again and again on one graph, which compiled ones do not allow.
COMPARISONS = [
    # Reads picture and flow, writes the result.
    Comparison("warp", VIDEO, CHAIN, lambda n, c, h, w: 4 * n * h * w * (2 * c + 2), warp_forward),
    Comparison("warp", FEATURES, CHAIN, lambda n, c, h, w: 4 * n * h * w * (2 * c + 2), warp_forward),
    # Reads gradient, picture and flow, clears and sums one gradient, writes the other.
    Comparison("warp backward", VIDEO, CHAIN[:-1], lambda n, c, h, w: 4 * n * h * w * (4 * c + 4), warp_backward),
    Comparison("warp backward", FEATURES, CHAIN[:-1], lambda n, c, h, w: 4 * n * h * w * (4 * c + 4), warp_backward),
    # Tensors x numbers in all; four numbers read and three written for each.
    Comparison("Adam", {"cuda": (1, 100_000_000), "cpu": (1, 200_000)}, ADAMS, lambda k, n: 28 * n, adam),
    Comparison("Adam", {"cuda": (160, 25_000_000), "cpu": (40, 200_000)}, ADAMS, lambda k, n: 28 * n, adam),
    # Read twice, written once; the gradient reads two tensors twice.
    Comparison("batch norm", MAPS, NORMS, lambda n, c, h, w: 12 * n * c * h * w, batch_norm_forward),
    Comparison("batch norm backward", MAPS, NORMS[:-1], lambda n, c, h, w: 20 * n * c * h * w, batch_norm_backward),
    # Points x samples x dimensions x widths; Goodfellow et al. 2014 at its full size.
    Comparison(
        "Parzen", {"cuda": (10_000, 10_000, 784, 10), "cpu": (100, 150, 20, 3)}, PARZENS, lambda *_: 0, parzen_windows
    ),
]
