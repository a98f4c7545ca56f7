"""Switched convolution (Betker 2021): a kernel for every position, in PyTorch. It is part of ``functional``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .kernels import on_cuda, switching

_ROWS = 512  # patches that are multiplied at a time: few enough to stay in the processor's cache


def switched_conv2d(
    x: Tensor, weight: Tensor, selector: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0
) -> Tensor:
    """Convolve with a kernel that is selected anew at every position of the output.

    Betker 2021 (https://github.com/neonbjb/SwitchedConvolutions). With patch(n, y, x) the k x k pixels of all input
    channels that an ordinary convolution looks at for output position (y, x), and selector s,

        output[n, :, y, x] = bias + weight[s[n, y, x]] · patch(n, y, x)                  where s holds integers
        output[n, :, y, x] = bias + sum over j of s[n, j, y, x] * weight[j] · patch(n, y, x)     where it holds floats

    The first costs as much arithmetic as one convolution, however many kernels there are; the second as much as all.
    The bias is counted once, whatever a selector of floats sums to. Differentiable in x, weight, bias and a selector
    of floats; a kernel that no position selects has a gradient of zero. The same numbers in every run.

    Args:
        x: shape (N, C_in, H, W), of a floating-point type.
        weight: shape (K, C_out, C_in, k, k), K kernels of one size, of the dtype of ``x``.
        selector: shape (N, H', W') with integers from 0 to K - 1, or (N, K, H', W') of the dtype of ``x``, where
            H' = (H + 2 padding - k) // stride + 1 is the output's height, and W' its width.
        bias: shape (C_out,), of the dtype of ``x``. None means 0.
        stride: pixels from one patch to the next, in both directions.
        padding: zeros put around x on all four sides.

    Returns:
        A tensor of shape (N, C_out, H', W') and the dtype of ``x``. It lies in memory with the channels last where the
        selector holds integers. On a CUDA tensor, and CuPy is installed, that case is computed by
        :func:`reprise.kernels.switched_conv2d`: it can be differentiated once only, and where an index is out of
        range it gives NaN, since to raise an error it would have to wait for the GPU.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit each other, and for an index out of range.
    """
    switching.check(x, weight, selector, bias, stride, padding)
    if selector.is_floating_point():
        mixed = (_all_kernels(x, weight, stride, padding) * selector[:, :, None]).sum(1)
        return mixed if bias is None else mixed + bias[:, None, None]
    if on_cuda.usable(x):
        return kernels.switched_conv2d(x, weight, selector, bias, stride, padding)
    if not selector.numel():
        return _all_kernels(x, weight, stride, padding)[:, 0]
    low, high = (int(value) for value in selector.aminmax())
    if low < 0 or high >= weight.size(0):
        raise ValueError(
            f"switched_conv2d takes a selector of indices from 0 to {weight.size(0) - 1}, for a weight "
            f"{tuple(weight.shape)}; got some from {low} to {high}"
        )
    # Half precision has too few digits for the gradient's sums.
    exact = torch.promote_types(x.dtype, torch.float32)
    y = _Switched.apply(x.to(exact), weight.to(exact), selector, stride, padding).to(x.dtype)
    return y if bias is None else y + bias[:, None, None]


def _all_kernels(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """What every kernel makes of every position: shape (N, K, C_out, H', W'), by one convolution."""
    return F.conv2d(x, weight.flatten(0, 1), None, stride, padding).unflatten(1, weight.shape[:2])


class _Switched(torch.autograd.Function):
    """The case of integers: positions are sorted by their kernel, and each kernel multiplies its patches at once.

    Layout is everything: with the channels last, each line of a patch is one run of k * C_in numbers in memory.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, selector: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight, selector)
        ctx.stride, ctx.padding = stride, padding
        patches, matrices = _Patches(x, weight, selector, stride, padding), _matrices(weight)
        out = x.new_empty(selector.numel(), weight.size(1))
        for kernel, positions in _by_kernel(selector, len(weight)):
            out.index_copy_(0, positions, patches.at(positions) @ matrices[kernel])
        return out.view(*selector.shape, -1).movedim(-1, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, selector = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative will be asked for: the plain way has it
            of_all = _all_kernels(x, weight, ctx.stride, ctx.padding)
            index = selector.long()[:, None, None].expand(-1, 1, *of_all.shape[2:])
            y = of_all.gather(1, index).squeeze(1)
            return *torch.autograd.grad(y, (x, weight), grad, create_graph=True), None, None, None

        to_x, to_weight = ctx.needs_input_grad[:2]
        patches, matrices = _Patches(x, weight, selector, ctx.stride, ctx.padding), _matrices(weight)
        grad = grad.movedim(1, -1).flatten(0, 2)  # (N H' W', C_out)
        grad_matrices = torch.zeros_like(matrices) if to_weight else None
        grad_patches = patches.empty() if to_x else None
        for kernel, positions in _by_kernel(selector, len(weight)):
            slope = grad.index_select(0, positions)
            if to_weight:
                grad_matrices[kernel].addmm_(patches.at(positions).T, slope)
            if to_x:
                grad_patches.index_copy_(0, positions, slope @ matrices[kernel].T)
        grad_weight = grad_matrices.view(weight.permute(0, 3, 4, 2, 1).shape) if to_weight else None
        return (
            patches.sum_over_overlaps(grad_patches) if to_x else None,
            grad_weight.permute(0, 4, 3, 1, 2) if to_weight else None,
            *(None, None, None),
        )


def _matrices(weight: Tensor) -> Tensor:
    """Kernels (K, C_out, C_in, k, k) as what patches are multiplied by: (K, k * k * C_in, C_out)."""
    return weight.permute(0, 3, 4, 2, 1).flatten(1, 3)


def _by_kernel(selector: Tensor, kernels: int) -> Iterator[tuple[int, Tensor]]:
    """Every kernel that is selected, with the positions that select it, in their order, not too many at a time."""
    selector = selector.flatten()
    counts = torch.bincount(selector, minlength=kernels).tolist()
    for kernel, positions in enumerate(torch.sort(selector, stable=True).indices.split(counts)):
        for some in positions.split(_ROWS) if len(positions) else ():
            yield kernel, some


class _Patches:
    """The k x k patches of an input, one for each position of the output: rows of k * k * C_in numbers."""

    def __init__(self, x: Tensor, weight: Tensor, selector: Tensor, stride: int, padding: int) -> None:
        n, channels, height, width = x.shape
        _, out_height, out_width = selector.shape
        self.shape, self.out_shape, self.size = x.shape, selector.shape, weight.size(-1)
        self.stride, self.padding = stride, padding
        self.padded = x.new_zeros(n, height + 2 * padding, width + 2 * padding, channels)
        self.inside(self.padded).copy_(x.movedim(1, -1))

        # Where each line of each patch begins, counted in pixels of the padded input.
        pixel = torch.arange(self.padded[..., 0].numel(), device=x.device).view(self.padded.shape[:3])
        first = pixel[:, ::stride, ::stride][:, :out_height, :out_width].flatten()
        self.begin = first[:, None] + torch.arange(self.size, device=x.device) * self.padded.size(2)
        # From every pixel on, the line of a patch that begins there: the lines overlap in memory.
        self.lines = self.padded.as_strided((pixel.numel() - self.size + 1, self.size * channels), (channels, 1))

    def inside(self, padded: Tensor) -> Tensor:
        """A padded tensor (N, H + 2 padding, W + 2 padding, ...) without its padding."""
        _, _, height, width = self.shape
        return padded[:, self.padding : self.padding + height, self.padding : self.padding + width]

    def at(self, positions: Tensor) -> Tensor:
        """Shape (P, k * k * C_in)."""
        return self.lines.index_select(0, self.begin[positions].flatten()).view(len(positions), -1)

    def empty(self) -> Tensor:
        """A row for every position, to be filled, and one of zeros."""
        rows = self.padded.new_empty(len(self.begin) + 1, self.size * self.size * self.shape[1])
        rows[-1] = 0
        return rows

    def sum_over_overlaps(self, rows: Tensor) -> Tensor:
        """The gradient of an input, given that of its patches: each pixel gathers from all patches that it is in."""
        positions, taps = len(self.begin), self.size * self.size
        place = torch.arange(positions * taps, device=rows.device).view(*self.out_shape, self.size, self.size)
        # Which pixels of patches a pixel is; those of the row of zeros where there is none.
        same = place.new_full((*self.padded.shape[:3], taps), positions * taps)
        for i in range(self.size):
            for j in range(self.size):
                at = (slice(i, None, self.stride), slice(j, None, self.stride))
                reached = same[:, *at, i * self.size + j][:, : place.size(1), : place.size(2)]
                reached.copy_(place[..., i, j])
        bags = self.inside(same).reshape(-1, taps)
        summed = F.embedding_bag(bags, rows.view(-1, self.shape[1]), mode="sum")
        return summed.view(self.shape[0], *self.shape[2:], -1).movedim(-1, 1)
