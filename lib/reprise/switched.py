"""Switched convolution (Betker 2021): a kernel for every position, in PyTorch. It is part of ``functional``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .kernels import on_cuda, switching

_NUMBERS = 2**18  # in patches that are multiplied at a time: few enough to stay in the processor's cache


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
        A tensor of shape (N, C_out, H', W') and the dtype of ``x``. Where the selector holds integers, it lies in
        memory with the channels last; on a CUDA tensor, where CuPy is installed, that case is computed by
        :func:`reprise.kernels.switched_conv2d`, which can be differentiated once only, and gives NaN where an index
        is out of range, since to raise an error it would have to wait for the GPU.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit each other, and for an index out of range.
    """
    switching.check(x, weight, selector, bias, stride, padding)
    if selector.is_floating_point():
        mixed = (_all_kernels(x, weight, stride, padding) * selector[:, :, None]).sum(1)
        return mixed if bias is None else mixed + bias[:, None, None]
    if on_cuda.usable(x):
        return kernels.switched_conv2d(x, weight, selector, bias, stride, padding)
    low, high = (int(value) for value in selector.aminmax()) if selector.numel() else (0, 0)
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
        ctx.patches = patches = _Patches(x, weight, selector, stride, padding)
        matrices, rows = _matrices(weight), x.new_empty(selector.numel(), weight.size(1))
        for kernel, some in patches.by_kernel():
            torch.mm(patches[some], matrices[kernel], out=rows[some])
        out = torch.empty_like(rows).index_copy_(0, patches.order, rows)
        return out.view(*selector.shape, weight.size(1)).movedim(-1, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, selector = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative will be asked for: the plain way has it
            of_all = _all_kernels(x, weight, ctx.stride, ctx.padding)
            index = selector.long()[:, None, None].expand(-1, 1, *of_all.shape[2:])
            y = of_all.gather(1, index).squeeze(1)
            return *torch.autograd.grad(y, (x, weight), grad, create_graph=True), None, None, None

        to_x, to_weight = ctx.needs_input_grad[:2]
        patches, matrices = ctx.patches, _matrices(weight)
        slopes = grad.movedim(1, -1).flatten(0, 2).index_select(0, patches.order)  # (N H' W', C_out)
        grad_matrices = torch.zeros_like(matrices) if to_weight else None
        grad_patches = patches.empty() if to_x else None
        for kernel, some in patches.by_kernel():
            if to_weight:
                grad_matrices[kernel] += patches[some].T @ slopes[some]
            if to_x:
                torch.mm(slopes[some], matrices[kernel].T, out=grad_patches[some])
        grad_weight = grad_matrices.view(weight.permute(0, 3, 4, 2, 1).shape) if to_weight else None
        return (
            patches.sum_over_overlaps(grad_patches) if to_x else None,
            grad_weight.permute(0, 4, 3, 1, 2) if to_weight else None,
            *(None, None, None),
        )


def _matrices(weight: Tensor) -> Tensor:
    """Kernels (K, C_out, C_in, k, k) as what patches are multiplied by: (K, k * k * C_in, C_out)."""
    return weight.permute(0, 3, 4, 2, 1).flatten(1, 3)


class _Patches:
    """The k x k patches of an input, one for each position of the output, sorted by the kernel that is selected there.

    ``patches[some]`` are those from one place to another in that order, as rows (P, k * k * C_in).
    """

    def __init__(self, x: Tensor, weight: Tensor, selector: Tensor, stride: int, padding: int) -> None:
        n, channels, height, width = x.shape
        _, out_height, out_width = selector.shape
        self.shape, self.out_shape, self.size = x.shape, selector.shape, weight.size(-1)
        self.stride, self.padding = stride, padding
        self.order = torch.sort(selector.flatten(), stable=True).indices
        self.counts = torch.bincount(selector.flatten(), minlength=len(weight)).tolist()

        self.padded = x.new_zeros(n, height + 2 * padding, width + 2 * padding, channels)
        self.without_padding(self.padded).copy_(x.movedim(1, -1))
        # From every pixel on, the line of a patch that begins there: the lines overlap in memory.
        pixel = torch.arange(self.padded[..., 0].numel(), device=x.device).view(self.padded.shape[:3])
        count = max(pixel.numel() - self.size + 1, 0)
        self.lines = self.padded.as_strided((count, self.size * channels), (channels, 1))
        # At which pixels the lines of each patch begin.
        first = pixel[:, ::stride, ::stride][:, :out_height, :out_width].flatten()[self.order]
        self.begin = first[:, None] + torch.arange(self.size, device=x.device) * self.padded.size(2)

    def __getitem__(self, some: slice) -> Tensor:
        begin = self.begin[some]
        return self.lines.index_select(0, begin.flatten()).view(len(begin), self.size * self.lines.size(1))

    def by_kernel(self) -> Iterator[tuple[int, slice]]:
        """Every kernel that is selected, and from where to where its patches are, not too many at a time."""
        most = max(1, _NUMBERS // (self.size * self.lines.size(1)))
        first = 0
        for kernel, count in enumerate(self.counts):
            for begin in range(first, first + count, most):
                yield kernel, slice(begin, min(begin + most, first + count))
            first += count

    def without_padding(self, padded: Tensor) -> Tensor:
        """Those pixels of a padded tensor (N, H + 2 padding, W + 2 padding, ...) that are the input's."""
        _, _, height, width = self.shape
        return padded[:, self.padding : self.padding + height, self.padding : self.padding + width]

    def empty(self) -> Tensor:
        """A row for every patch, to be filled, and one of zeros."""
        rows = self.padded.new_empty(len(self.begin) + 1, self.size * self.lines.size(1))
        rows[-1] = 0
        return rows

    def sum_over_overlaps(self, rows: Tensor) -> Tensor:
        """The gradient of the input, given that of its patches: each pixel gathers from all patches that it is in."""
        taps = self.size**2
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(0, len(place) * taps, taps, device=place.device)
        place = place.view(self.out_shape)
        # Which pixels of which patches a pixel is; where it is fewer, those of the row of zeros.
        same = place.new_full((*self.padded.shape[:3], taps), place.numel() * taps)
        for tap in range(taps):
            down, right = divmod(tap, self.size)
            reached = same[:, down :: self.stride, right :: self.stride, tap]
            torch.add(place, tap, out=reached[:, : place.size(1), : place.size(2)])
        bags = self.without_padding(same).reshape(-1, taps)
        summed = F.embedding_bag(bags, rows.view(-1, self.shape[1]), mode="sum")
        return summed.view(self.shape[0], *self.shape[2:], self.shape[1]).movedim(-1, 1)
