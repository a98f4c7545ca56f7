"""What the tests and the benchmark of switched convolution share: the definition, the usual ways, and random cases."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DOUBLE = torch.float64
# x (N, C_in, H, W), C_out, K, k, stride, padding: one of everything; a kernel per position; rows and columns on, below
# and above the tiles of the CUDA kernel; kernels that overlap, that leave pixels out, and that see only padding.
SHAPES = [
    ((1, 1, 1, 1), 1, 1, 1, 1, 0), ((2, 3, 6, 7), 5, 4, 3, 1, 1), ((2, 17, 9, 8), 35, 3, 3, 2, 1),
    ((3, 2, 11, 10), 70, 5, 5, 3, 2), ((2, 40, 8, 16), 4, 1, 1, 1, 0), ((1, 3, 5, 5), 3, 2, 5, 1, 0),
    ((2, 3, 5, 6), 4, 30, 2, 3, 0), ((1, 2, 3, 4), 3, 3, 3, 2, 4), ((1, 16, 8, 16), 32, 2, 1, 1, 0),
]  # fmt: skip


def out_size(shape, k: int, stride: int, padding: int) -> tuple[int, int]:
    return tuple((size + 2 * padding - k) // stride + 1 for size in shape[2:])


def case(
    shape=(2, 3, 6, 7), out_channels=5, kernels=4, k=3, stride=1, padding=1, dtype=DOUBLE, device="cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, a selector of integers, bias: at random."""
    torch.manual_seed(0)
    given = (
        torch.randn(shape, dtype=DOUBLE),
        torch.randn(kernels, out_channels, shape[1], k, k, dtype=DOUBLE),
        torch.randn(out_channels, dtype=DOUBLE),
    )
    x, weight, bias = (tensor.to(device, dtype) for tensor in given)
    selector = torch.randint(kernels, (shape[0], *out_size(shape, k, stride, padding))).to(device)
    return x, weight, selector, bias


def by_unfolding(x: Tensor, weight: Tensor, selector: Tensor, bias: Tensor | None, stride=1, padding=0) -> Tensor:
    """The definition: at every position, the weight of its kernel times the patch."""
    patches = F.unfold(x, weight.size(-1), stride=stride, padding=padding)  # (N, C_in k k, H' W')
    own = weight.flatten(2)[selector.flatten(1).long()]  # (N, H' W', C_out, C_in k k)
    y = torch.einsum("npoc,ncp->nop", own, patches).unflatten(2, selector.shape[1:])
    return y if bias is None else y + bias.view(-1, 1, 1)


def by_one_convolution(x: Tensor, weight: Tensor, selector: Tensor, bias: Tensor | None, stride=1, padding=0) -> Tensor:
    """What one writes without a kernel: compute all kernels by one convolution, then pick."""
    of_all = F.conv2d(x, weight.flatten(0, 1), None, stride, padding).unflatten(1, weight.shape[:2])
    index = selector.long()[:, None, None].expand(-1, 1, *of_all.shape[2:])
    y = of_all.gather(1, index).squeeze(1)
    return y if bias is None else y + bias.view(-1, 1, 1)


def by_convolutions(x: Tensor, weight: Tensor, selector: Tensor, bias: Tensor | None, stride=1, padding=0) -> Tensor:
    """The original's way in PyTorch: as many convolutions as kernels, stacked, times a selector of ones and zeros."""
    of_all = torch.stack([F.conv2d(x, kernel, bias, stride, padding) for kernel in weight], 1)
    return (of_all * one_hot(selector, len(weight)).to(x.dtype)[:, :, None]).sum(1)


def one_hot(selector: Tensor, kernels: int) -> Tensor:
    """Integers (N, H, W) as (N, K, H, W)."""
    return F.one_hot(selector.long(), kernels).movedim(-1, 1)


def results(function, x: Tensor, weight: Tensor, selector: Tensor, bias: Tensor, *more: int) -> list[Tensor]:
    """Output, and the gradients of x, weight and bias."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    out = function(leaves[0], leaves[1], selector, leaves[2], *more)
    torch.manual_seed(1)
    slope = (torch.randn(out.shape, dtype=DOUBLE) * 16).round().div(16).to(out)  # the same number in every dtype
    return [out.detach(), *torch.autograd.grad(out, leaves, slope)]
