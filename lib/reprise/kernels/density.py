"""``parzen``: log-densities under a Gaussian Parzen window, on the kernels of ``parzen.cu``."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from .launch import FLOATS, Kernel, real_dtype

_SOURCE = Path(__file__).with_name("parzen.cu").read_text(encoding="utf-8")
_TILE, _SIDE = 64, 16
_BLOCKS = 8192  # a few dozen for each multiprocessor of every present GPU, so that none is idle for long in the end


def parzen(points: Tensor, samples: Tensor, widths: Tensor) -> Tensor:
    """Log-density of points when every sample is smeared out to a Gaussian, for many widths of the Gaussian at once.

    Breuleux et al. 2011; the measure of Goodfellow et al. 2014 (arXiv 1406.2661), Table 1:
    ``out[w, p] = log(mean over s of N(points[p]; samples[s], widths[w]^2 I))``. The distances are never stored, however
    many there are. Not differentiable. Runs on CUDA tensors through CuPy, and, for tests and lessons, on CPU tensors
    through g++.

    Args:
        points: shape (P, D), of any floating dtype, in any memory layout (one that is not contiguous is copied).
        samples: shape (S, D) with S of 1 or more, of the dtype of the points.
        widths: shape (W,), standard deviations in the units of the points, above zero, of any floating dtype.

    Returns:
        Shape (W, P), in nats, in float32, or in float64 for such points; the same numbers in every run. Nothing
        underflows: they are finite as long as squared distances, and squared widths and their inverses, are within the
        range of that dtype. The rounding of a squared distance grows with the root of D; in float32 it is about one
        part in a million for 784 dimensions. A NaN in a point makes that point NaN, one in a sample all of them. A
        point infinitely far from all samples has minus infinity. A width that is not above zero gives NaN.

    Raises:
        ValueError: when shapes, dtypes or devices do not fit, or there is no sample; the message shows them.
        NotImplementedError: when a gradient is asked for.
    """
    check(points, samples, widths)
    return _parzen(points, samples, widths)


def check(points: Tensor, samples: Tensor, widths: Tensor) -> None:
    """Raise ValueError, with what was given, for points, samples and widths that do not fit each other."""
    given = (points, samples, widths)
    shapes = "points {}, samples {} and widths {}".format(*(tuple(t.shape) for t in given))
    if [t.dim() for t in given] != [2, 2, 1] or points.size(1) != samples.size(1):
        raise ValueError(f"parzen takes points (P, D), samples (S, D) and widths (W,), got {shapes}")
    if points.dtype not in FLOATS or samples.dtype != points.dtype or widths.dtype not in FLOATS:
        raise ValueError(
            "parzen takes points and samples of one floating dtype, and floating-point widths, got "
            f"points {points.dtype}, samples {samples.dtype} and widths {widths.dtype}"
        )
    if len({t.device for t in given}) > 1:
        raise ValueError(
            f"parzen takes tensors on one device, got points on {points.device}, samples on {samples.device} and "
            f"widths on {widths.device}"
        )
    if samples.size(0) == 0:
        raise ValueError(f"parzen needs a sample to estimate a density from: draw at least one, got {shapes}")
    if max(max(t.shape) for t in given) >= 2**30:
        raise ValueError(f"parzen takes fewer than 2^30 points, samples, dimensions and widths, got {shapes}")


@torch.library.custom_op("reprise::parzen", mutates_args=())
def _parzen(points: Tensor, samples: Tensor, widths: Tensor) -> Tensor:
    out = _empty_densities(points, samples, widths)
    if out.numel():
        widths = widths.to(out.dtype).contiguous()
        counts = (points.size(0), samples.size(0), points.size(1), widths.size(0))
        grid = _grid(*counts[:2])
        nearest = out.new_empty(grid[1], counts[0])
        sums = out.new_empty(counts[3], grid[1], counts[0])
        given = (points.contiguous(), samples.contiguous(), widths)
        _kernel("fold", points.dtype)(grid, _SIDE**2, *given, nearest, sums, *counts)
        blocks = -(-out.numel() // _SIDE**2)
        _kernel("merge", points.dtype)(blocks, _SIDE**2, nearest, sums, widths, out, grid[1], *counts)
    return out


@_parzen.register_fake
def _empty_densities(points: Tensor, samples: Tensor, widths: Tensor) -> Tensor:
    return points.new_empty((widths.size(0), points.size(0)), dtype=real_dtype(points.dtype))


def _refuse(ctx, *grads: Tensor) -> None:
    raise NotImplementedError("parzen's kernels have no derivative: detach the samples, or differentiate PyTorch")


_parzen.register_autograd(_refuse)


@functools.cache
def _kernel(name: str, dtype: torch.dtype) -> Kernel:
    # In double half the depth: tile and slices have to fit into 48 KiB of shared memory.
    real = real_dtype(dtype)
    sizes = {"TILE": _TILE, "SIDE": _SIDE, "DEPTH": 8 if real == torch.float64 else 16}
    return Kernel(_SOURCE, f"parzen_{name}", file="parzen.cu", SCALAR=dtype, REAL=real, **sizes)


def _grid(point_count: int, sample_count: int) -> tuple[int, int]:
    """Tiles of points, and in how many parts the samples are shared out so that few points, too, fill the GPU."""
    tiles, sample_tiles = -(-point_count // _TILE), -(-sample_count // _TILE)
    return tiles, min(sample_tiles, max(1, _BLOCKS // tiles))
