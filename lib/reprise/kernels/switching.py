"""``switched_conv2d``: a convolution kernel for every position, on the kernels of ``switched_conv.cu``."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .launch import FLOATS, Kernel, real_dtype

_SOURCE = Path(__file__).with_name("switched_conv.cu").read_text(encoding="utf-8")
_THREADS, _DEPTH = 128, 16
_BLOCKS = 256  # for each kernel's gradient: twice as many as a present GPU has multiprocessors
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# The struct of the same name in the source.
_LAYER = np.dtype([(name, np.int32) for name in (
    "kernels", "in_channels", "out_channels", "height", "width", "out_height", "out_width", "size", "stride", "padding"
)])  # fmt: skip


def switched_conv2d(
    x: Tensor, weight: Tensor, selector: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0
) -> Tensor:
    """Convolve with the kernel that is selected at every position of the output (Betker 2021).

    ``out[n, :, y, x] = bias + weight[selector[n, y, x]] · (the k x k pixels of all channels under that position)``.
    Differentiable once, with respect to x, weight and bias. Runs on CUDA tensors through CuPy, and, for tests and
    lessons, on CPU tensors through g++.

    Args:
        x: shape (N, C_in, H, W), of any floating dtype. One whose channels lie last in memory is not copied.
        weight: shape (K, C_out, C_in, k, k), of the dtype of x.
        selector: shape (N, H', W') with H' = (H + 2 padding - k) // stride + 1 and W' likewise, of any integer dtype.
        bias: shape (C_out,), of the dtype of x. None means 0.
        stride: pixels from one patch to the next.
        padding: zeros around x.

    Returns:
        Shape (N, C_out, H', W'), dtype of x, with the channels last in memory; summed in float32, or in float64 for
        such an x. Where the selector is below 0, or K or above, there is NaN in all channels, and no gradient comes
        from there but the bias's. The same numbers in every run.

    Raises:
        ValueError: when shapes, dtypes or devices do not fit; the message shows them.
    """
    check(x, weight, selector, bias, stride, padding)
    if selector.is_floating_point():
        raise ValueError(
            f"the kernels of switched_conv2d take a selector of integers (N, H', W'), got {selector.dtype} "
            f"{tuple(selector.shape)}: reprise.functional mixes kernels"
        )
    order, bounds = _sorted_by_kernel(selector, weight.size(0))
    out = _switched_conv2d(x, weight, bias, order, bounds, list(selector.shape), stride, padding)
    return out.permute(0, 3, 1, 2)


def check(x: Tensor, weight: Tensor, selector: Tensor, bias: Tensor | None, stride: int, padding: int) -> None:
    """Raise ValueError, with what was given, for tensors that do not fit each other."""
    given = {"x": x, "weight": weight, "selector": selector} | ({} if bias is None else {"bias": bias})
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in given.items())
    if x.dim() != 4 or weight.dim() != 5 or x.size(1) != weight.size(2) or weight.size(3) != weight.size(4):
        raise ValueError(f"switched_conv2d takes x (N, C_in, H, W) and a weight (K, C_out, C_in, k, k), got {shapes}")
    if min(weight.shape) < 1:
        raise ValueError(f"switched_conv2d takes a weight of at least one kernel, channel and pixel, got {shapes}")
    if not (isinstance(stride, int) and isinstance(padding, int)) or stride < 1 or padding < 0:
        raise ValueError(f"switched_conv2d takes a whole stride >= 1 and padding >= 0, got {stride!r} and {padding!r}")
    height, width = ((size + 2 * padding - weight.size(4)) // stride + 1 for size in x.shape[2:])
    if height < 1 or width < 1:
        raise ValueError(f"switched_conv2d: the kernels are larger than x with a padding of {padding}: {shapes}")
    integers, floats = (x.size(0), height, width), (x.size(0), weight.size(0), height, width)
    if tuple(selector.shape) != (floats if selector.is_floating_point() else integers):
        raise ValueError(
            f"switched_conv2d takes a selector of integers {integers} or of floats {floats}, the size of its output "
            f"at stride {stride} and padding {padding}; got {selector.dtype} with {shapes}"
        )
    if bias is not None and tuple(bias.shape) != (weight.size(1),):
        raise ValueError(f"switched_conv2d takes a bias ({weight.size(1)},), one for all kernels, got {shapes}")
    alike = [tensor for tensor in given.values() if tensor is not selector or tensor.is_floating_point()]
    if x.dtype not in FLOATS or len({t.dtype for t in alike}) > 1 or selector.dtype not in (*FLOATS, *_INTEGERS):
        found = ", ".join(f"{name} {tensor.dtype}" for name, tensor in given.items())
        raise ValueError(f"switched_conv2d takes tensors of one floating dtype, or a selector of integers, got {found}")
    if len({tensor.device for tensor in given.values()}) > 1:
        found = ", ".join(f"{name} on {tensor.device}" for name, tensor in given.items())
        raise ValueError(f"switched_conv2d takes tensors on one device, got {found}")
    if max(selector.numel(), weight[0].numel(), *x.shape) >= 2**30:
        raise ValueError(f"switched_conv2d takes fewer than 2^30 positions, and numbers in a kernel, got {shapes}")


def _sorted_by_kernel(selector: Tensor, kernels: int) -> tuple[Tensor, Tensor]:
    """All positions, those of one kernel together and in their order; and where each kernel's begin, shape (K + 2,).

    Those of an index out of range come last, as if they had selected a kernel K.
    """
    selector = selector.flatten().long()
    selector = torch.where((selector < 0) | (selector >= kernels), kernels, selector)
    if kernels < 255:
        selector = selector.to(torch.uint8)  # a GPU sorts by eight bits at a time
    kernel_of, order = torch.sort(selector, stable=True)
    edges = torch.arange(kernels + 2, dtype=selector.dtype, device=selector.device)
    return order, torch.searchsorted(kernel_of, edges, out_int32=True)


@torch.library.custom_op("reprise::switched_conv2d", mutates_args=())
def _switched_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    order: Tensor,
    bounds: Tensor,
    out_shape: list[int],
    stride: int,
    padding: int,
) -> Tensor:
    out = _empty_output(x, weight, bias, order, bounds, out_shape, stride, padding)
    if out.numel():
        layer = _layer(x, weight, out_shape, stride, padding)
        x, weight = _channels_last(x), weight.permute(0, 3, 4, 2, 1).contiguous()
        bias, grid = None if bias is None else bias.contiguous(), _tiles(order, weight, out.size(3))
        _kernel("forward", x.dtype)(grid, _THREADS, x, weight, bias, out, order, bounds, layer)
    return out


@_switched_conv2d.register_fake
def _empty_output(x, weight, bias, order, bounds, out_shape, stride, padding) -> Tensor:
    return x.new_empty((*out_shape, weight.size(1)))


@torch.library.custom_op("reprise::switched_conv2d_backward", mutates_args=())
def _switched_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    order: Tensor,
    bounds: Tensor,
    stride: int,
    padding: int,
    to_x: bool,
    to_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients (N, H, W, C_in) and (K, k, k, C_in, C_out); one that is not asked for is an empty tensor."""
    real, layer = real_dtype(x.dtype), _layer(x, weight, grad.shape[:3], stride, padding)
    kernels, out_channels, in_channels, size, _ = weight.shape
    grad, x = grad.contiguous(), _channels_last(x)
    grad_x = x.new_zeros(x.shape if to_x else 0, dtype=real)
    if to_x and grad.numel():
        matrices, grid = weight.permute(0, 3, 4, 1, 2).contiguous(), _tiles(order, weight, in_channels)
        for tap in range(size * size):
            arguments = (grad, matrices, grad_x, order, bounds, layer, tap)
            _kernel("grad_input", x.dtype)(grid, _THREADS, *arguments)
    grad_weight = x.new_zeros(0, dtype=real)
    if to_weight:
        each, rows = _each(x.dtype), size * size * in_channels
        tiles = -(-rows // (16 * each)), -(-out_channels // (8 * each))
        # So many parts that one kernel that has all positions fills a GPU, if there are a few slices for each.
        parts = max(1, min(_BLOCKS // (tiles[0] * tiles[1]), len(order) // (4 * _DEPTH)))
        partial = x.new_empty((kernels, parts, size, size, in_channels, out_channels), dtype=real)
        arguments = (grad, x, partial, order, bounds, layer, parts)
        _kernel("grad_weight", x.dtype)((kernels * parts, *tiles), _THREADS, *arguments)
        grad_weight = partial.sum(1)
    return grad_x.to(x.dtype), grad_weight.to(x.dtype)


@_switched_conv2d_backward.register_fake
def _(grad, x, weight, order, bounds, stride, padding, to_x, to_weight) -> tuple[Tensor, Tensor]:
    n, in_channels, height, width = x.shape
    kernels, out_channels, _, size, _ = weight.shape
    of_weight = (kernels, size, size, in_channels, out_channels)
    return x.new_empty((n, height, width, in_channels) if to_x else 0), x.new_empty(of_weight if to_weight else 0)


def _remember(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, _, order, bounds, _, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(x, weight, order, bounds)


def _differentiate(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
    to_both = to_x, to_weight
    grad_x, grad_weight = _switched_conv2d_backward(grad, *ctx.saved_tensors, ctx.stride, ctx.padding, *to_both)
    return (
        grad_x.permute(0, 3, 1, 2) if to_x else None,
        grad_weight.permute(0, 4, 3, 1, 2) if to_weight else None,
        grad.sum((0, 1, 2)) if to_bias else None,
        *[None] * 5,
    )


def _refuse(ctx, *grads: Tensor) -> None:
    raise NotImplementedError(
        "switched_conv2d's kernels have no second derivative: mix by floats, or use the CPU, in reprise.functional"
    )


_switched_conv2d.register_autograd(_differentiate, setup_context=_remember)
_switched_conv2d_backward.register_autograd(_refuse)


@functools.cache
def _kernel(name: str, dtype: torch.dtype) -> Kernel:
    types = {"SCALAR": dtype, "REAL": real_dtype(dtype), "EACH": _each(dtype)}
    return Kernel(_SOURCE, f"switched_conv_{name}", file="switched_conv.cu", **types)


def _each(dtype: torch.dtype) -> int:
    """A thread makes so many sums squared: 64 floats, or 16 doubles, fit into its registers."""
    return 4 if dtype == torch.float64 else 8


def _layer(x: Tensor, weight: Tensor, out_shape: list[int], stride: int, padding: int) -> np.ndarray:
    kernels, out_channels, in_channels, size, _ = weight.shape
    values = (kernels, in_channels, out_channels, *x.shape[2:], *out_shape[1:], size, stride, padding)
    return np.array([values], _LAYER)


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def _tiles(order: Tensor, weight: Tensor, columns: int) -> tuple[int, int]:
    """Grid: tiles of positions, with an unfinished one for each kernel and for positions without; tiles of columns."""
    each = _each(weight.dtype)
    return len(order) // (16 * each) + len(weight) + 1, -(-columns // (8 * each))
