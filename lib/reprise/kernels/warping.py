"""``warp``: bilinear warping by a dense flow, on the kernels of ``warp.cu``."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from .launch import FLOATS, Kernel, real_dtype

_SOURCE = Path(__file__).with_name("warp.cu").read_text(encoding="utf-8")
_TILE = (32, 8)


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """Sample an image where a flow points to: ``out[n, c, y, x] = image[n, c]`` at ``(x + dx, y + dy)``.

    Between pixels the value is bilinear; outside the image its border is repeated. As
    ``grid_sample(..., padding_mode="border", align_corners=True)`` on the grid that the flow means. Differentiable
    once, with respect to both. Runs on CUDA tensors through CuPy, and, for tests and lessons, on CPU tensors
    through g++.

    Args:
        image: shape (N, C, H, W), of any floating dtype, in any memory layout.
        flow: shape (N, 2, H', W'), in pixels, dx then dy, added to the position of the target. Its dtype may differ
            from the image's; positions are computed in float32 at least.

    Returns:
        Shape (N, C, H', W'), dtype of the image, contiguous. A NaN in the flow gives NaN in all channels of that
        pixel and nowhere else. It stops the gradient: its own is zero, and it adds nothing to the image's.
        The flow's gradient is zero outside the image, and at whole-numbered positions it is that towards the next
        pixel to the right and below. On a GPU the image's gradient is summed in any order, so that its last
        digits differ from run to run.

    Raises:
        ValueError: when shapes, dtypes or devices do not fit; the message shows them.
    """
    check(image, flow)
    return _warp(image, flow)


def check(image: Tensor, flow: Tensor) -> None:
    """Raise ValueError, with what was given, for an image and a flow that cannot be warped."""
    shapes = f"image {tuple(image.shape)} and flow {tuple(flow.shape)}"
    if image.dim() != 4 or flow.dim() != 4 or flow.size(1) != 2 or image.size(0) != flow.size(0):
        raise ValueError(f"warp takes an image (N, C, H, W) and a flow (N, 2, H', W'), got {shapes}")
    if image.dtype not in FLOATS or flow.dtype not in FLOATS:
        raise ValueError(f"warp takes floating-point tensors, got image {image.dtype} and flow {flow.dtype}")
    if image.device != flow.device:
        raise ValueError(f"warp takes tensors on one device, got image on {image.device} and flow on {flow.device}")
    if flow.size(2) * flow.size(3) and not image.size(2) * image.size(3):
        raise ValueError(f"warp cannot sample an image without pixels: {shapes}")
    if max(image.size(2) * image.size(3), flow.size(2) * flow.size(3)) >= 2**31:
        raise ValueError(f"warp takes planes of fewer than 2^31 pixels, got {shapes}")


@torch.library.custom_op("reprise::warp", mutates_args=())
def _warp(image: Tensor, flow: Tensor) -> Tensor:
    out = _empty_like_target(image, flow)
    if out.numel():
        arguments = (image.contiguous(), flow.contiguous(), out)
        _kernel("warp_forward", image.dtype, flow.dtype)(*_tiles(flow), *arguments, *image.shape, *flow.shape[2:])
    return out


@_warp.register_fake
def _empty_like_target(image: Tensor, flow: Tensor) -> Tensor:
    return image.new_empty((*image.shape[:2], *flow.shape[2:]))


@torch.library.custom_op("reprise::warp_backward", mutates_args=())
def _warp_backward(grad: Tensor, image: Tensor, flow: Tensor, to_image: bool, to_flow: bool) -> tuple[Tensor, Tensor]:
    """Both gradients in one go; one that is not asked for is an empty tensor."""
    # Many pixels may add to one: in half precision the sum would soon stop growing.
    grad_image = image.new_zeros(image.shape if to_image else 0, dtype=real_dtype(image.dtype, flow.dtype))
    grad_flow = flow.new_zeros(flow.shape if to_flow else 0)
    if grad.numel() and (to_image or to_flow):
        _kernel("warp_backward", image.dtype, flow.dtype)(
            *_tiles(flow),
            grad.contiguous(),
            image.contiguous(),
            flow.contiguous(),
            grad_image if to_image else None,
            grad_flow if to_flow else None,
            *image.shape,
            *flow.shape[2:],
        )
    return grad_image.to(image.dtype), grad_flow


@_warp_backward.register_fake
def _(grad: Tensor, image: Tensor, flow: Tensor, to_image: bool, to_flow: bool) -> tuple[Tensor, Tensor]:
    return image.new_empty(image.shape if to_image else 0), flow.new_empty(flow.shape if to_flow else 0)


def _remember(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    to_image, to_flow = ctx.needs_input_grad
    grad_image, grad_flow = _warp_backward(grad, *ctx.saved_tensors, to_image, to_flow)
    return grad_image if to_image else None, grad_flow if to_flow else None


def _refuse(ctx, *grads: Tensor) -> None:
    raise NotImplementedError("warp's kernels have no second derivative: differentiate reprise.functional's PyTorch")


_warp.register_autograd(_differentiate, setup_context=_remember)
_warp_backward.register_autograd(_refuse)


@functools.cache
def _kernel(name: str, image: torch.dtype, flow: torch.dtype) -> Kernel:
    return Kernel(_SOURCE, name, file="warp.cu", IMAGE=image, FLOW=flow, REAL=real_dtype(image, flow))


def _tiles(flow: Tensor) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """Grid and block: a thread for every target pixel; the kernel itself goes on to examples beyond the grid."""
    batch, _, height, width = flow.shape
    return (-(-width // _TILE[0]), -(-height // _TILE[1]), min(batch, 65535)), _TILE
