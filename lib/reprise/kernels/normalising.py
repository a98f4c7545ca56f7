"""``batch_norm``: normalisation by the batch's own statistics, on the kernels of ``batch_norm.cu``."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from .launch import FLOATS, Kernel, real_dtype

_SOURCE = Path(__file__).with_name("batch_norm.cu").read_text(encoding="utf-8")
_THREADS = 256
_BLOCKS = 2048  # that many are enough for every present GPU


def batch_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise every channel by its own mean and variance, then scale and shift it.

    Ioffe & Szegedy 2015 (arXiv 1502.03167), Algorithm 1: ``y = weight * (x - mean) / sqrt(var + eps) + bias``.
    Differentiable once with respect to x, weight and bias. Runs on CUDA tensors through CuPy, and, for tests and
    lessons, on CPU tensors through g++.

    Args:
        x: shape (N, C, ...), of any floating dtype, in any memory layout (one that is not contiguous is copied).
        weight: shape (C,), the paper's gamma, of any floating dtype. None means 1.
        bias: shape (C,), the paper's beta. None means 0.
        eps: added to the variance, inside the root.

    Returns:
        y, of the shape and dtype of x, contiguous; mean and *biased* variance, shape (C,), in float32, or in float64
        for such an x. No gradient passes through mean and variance as results of their own.

    Raises:
        ValueError: when shapes, dtypes or devices do not fit, or a channel has no values; the message shows them.
    """
    if x.dim() < 2 or x.dtype not in FLOATS:
        raise ValueError(f"batch_norm takes a floating-point input (N, C, ...), got {x.dtype} {tuple(x.shape)}")
    if x.numel() == 0 or max(_dimensions(x)) >= 2**30:
        raise ValueError(f"batch_norm takes 1 to 2^30 values along a dimension, got shape {tuple(x.shape)}")
    for name, given in (("weight", weight), ("bias", bias)):
        if given is not None and (given.shape != (x.size(1),) or given.device != x.device or given.dtype not in FLOATS):
            raise ValueError(
                f"batch_norm takes a {name} of shape ({x.size(1)},) on {x.device}, "
                f"got {given.dtype} {tuple(given.shape)} on {given.device}"
            )
    return _batch_norm(x, weight, bias, eps)


def _dimensions(x: Tensor) -> tuple[int, int, int]:
    """N, C, and the product of what follows."""
    return x.size(0), x.size(1), x.numel() // max(x.size(0) * x.size(1), 1)


@torch.library.custom_op("reprise::batch_norm", mutates_args=())
def _batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x, shape = x.contiguous(), _dimensions(x)
    grid, real = _grid(shape), real_dtype(x.dtype)
    y, mean, var = _empty_results(x, weight, bias, eps)
    partial = x.new_empty((grid[1], shape[1], 3), dtype=real)
    _kernel("moments", x.dtype)(grid, _THREADS, x, partial, *shape)
    _kernel("statistics", x.dtype)(-(-shape[1] // _THREADS), _THREADS, partial, mean, var, grid[1], shape[1])
    affine = [None if given is None else given.to(real).contiguous() for given in (weight, bias)]
    _kernel("normalise", x.dtype)(grid, _THREADS, x, mean, var, *affine, y, eps, *shape)
    return y, mean, var


@_batch_norm.register_fake
def _empty_results(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = (x.new_empty(x.size(1), dtype=real_dtype(x.dtype)) for _ in range(2))
    return x.new_empty(x.shape), mean, var


@torch.library.custom_op("reprise::batch_norm_backward", mutates_args=())
def _batch_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x, weight and bias, the last two in the dtype of the statistics."""
    grad, x, shape = grad.contiguous(), x.contiguous(), _dimensions(x)
    grid = _grid(shape)
    partial = mean.new_empty((grid[1], 2, shape[1]))
    _kernel("sums", x.dtype)(grid, _THREADS, grad, x, mean, var, partial, eps, *shape)
    sums, grad_x = partial.sum(0), x.new_empty(x.shape)
    scale = None if weight is None else weight.to(mean.dtype).contiguous()
    _kernel("grad_input", x.dtype)(grid, _THREADS, grad, x, mean, var, scale, sums, grad_x, eps, *shape)
    return grad_x, sums[1].clone(), sums[0].clone()


@_batch_norm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(mean), torch.empty_like(mean)


def _remember(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, ctx.eps = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.weight_dtype, ctx.bias_dtype = (None if given is None else given.dtype for given in (weight, bias))
    ctx.save_for_backward(x, mean, var, weight)


def _differentiate(ctx, grad: Tensor, *of_statistics: Tensor | None) -> tuple:
    grad_x, grad_weight, grad_bias = _batch_norm_backward(grad, *ctx.saved_tensors, ctx.eps)
    grad_weight = None if ctx.weight_dtype is None else grad_weight.to(ctx.weight_dtype)
    return grad_x, grad_weight, None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype), None


def _refuse(ctx, *grads: Tensor) -> None:
    raise NotImplementedError(
        "batch_norm's kernels have no second derivative: use torch.nn.functional.batch_norm, or the CPU"
    )


_batch_norm.register_autograd(_differentiate, setup_context=_remember)
_batch_norm_backward.register_autograd(_refuse)


@functools.cache
def _kernel(name: str, dtype: torch.dtype) -> Kernel:
    types = {"SCALAR": dtype, "REAL": real_dtype(dtype), "THREADS": _THREADS}
    return Kernel(_SOURCE, f"batch_norm_{name}", file="batch_norm.cu", **types)


def _grid(shape: tuple[int, int, int]) -> tuple[int, int]:
    """A channel's values are shared out among so many blocks that the GPU is full, each thread with four or more."""
    batch, channels, size = shape
    return channels, max(1, min(-(-_BLOCKS // channels), batch * size // (4 * _THREADS)))
