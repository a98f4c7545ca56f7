"""The papers' layers, under the names, arguments and state_dict that ``torch.nn`` uses for such things."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import functional
from .masked import CausalSequential, GatedMaskedConv2d, GatedStack, MaskedConv2d, Residual

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "CausalSequential",
    "GatedMaskedConv2d",
    "GatedStack",
    "MaskedConv2d",
    "Residual",
]


class _OurForward(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation (Ioffe & Szegedy 2015) computed by :func:`reprise.functional.batch_norm`.

    Arguments, buffers, initial values and state_dict are torch's, by inheritance: what is ours is the arithmetic.
    """

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if input.size(1) != self.num_features:
            raise ValueError(
                f"{type(self).__name__}({self.num_features}) expects {self.num_features} channels in dimension 1, "
                f"got an input of shape {tuple(input.shape)}"
            )
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the plain average over all batches so far
                momentum = 1.0 / float(self.num_batches_tracked)
        return functional.batch_norm(
            input,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            training=self.training or self.running_mean is None,
            momentum=momentum,
            eps=self.eps,
        )


class BatchNorm1d(_OurForward, nn.BatchNorm1d):
    """Batch normalisation of (N, C) or (N, C, L) inputs, one mean and variance per channel C.

    Ioffe & Szegedy 2015 (arXiv 1502.03167), Algorithms 1 and 2. Arguments as :class:`torch.nn.BatchNorm1d`.
    """


class BatchNorm2d(_OurForward, nn.BatchNorm2d):
    """Batch normalisation of (N, C, H, W) inputs, one mean and variance per feature map C over N, H and W.

    Ioffe & Szegedy 2015 (arXiv 1502.03167), section 3.2. Arguments as :class:`torch.nn.BatchNorm2d`.
    """


class SwitchedConv2d(nn.Module):
    """A convolution with several kernels, of which a selector picks or mixes one at every position of the output.

    Betker 2021 (https://github.com/neonbjb/SwitchedConvolutions); computed by
    :func:`reprise.functional.switched_conv2d`. What makes the selector is another layer's affair.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, bias, device, dtype: as :class:`torch.nn.Conv2d`,
            with whole numbers for size, stride and padding.
        breadth: the number of kernels, K.

    Attributes:
        weight: shape (K, C_out, C_in, k, k); each kernel begins as that of a :class:`torch.nn.Conv2d`.
        bias: shape (C_out,), one for all kernels; or None.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        breadth: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = (breadth, out_channels, in_channels, kernel_size, kernel_size)
        if min(shape) < 1:
            raise ValueError(f"SwitchedConv2d needs channels, a kernel size and a breadth of 1 or more, got {shape}")
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.breadth, self.stride, self.padding = breadth, stride, padding
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every kernel, and the bias, as :class:`torch.nn.Conv2d` draws its own.

        One by one: of a weight with five dimensions torch takes K times the fan-in, and all kernels would begin
        sqrt(K) times too small, as they do in the released code.
        """
        for kernel in self.weight:
            nn.init.kaiming_uniform_(kernel, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0, 0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, breadth: int) -> SwitchedConv2d:
        """A layer that computes what a trained convolution does, whatever the selector: all kernels are copies of its.

        The gradients of the kernels sum to that of the convolution's. Nothing tells the kernels apart but the
        positions that they get.

        Args:
            conv: with a square kernel, one group, zeros as padding, and no dilation. It is copied, not changed.
            breadth: the number of copies.

        Raises:
            ValueError: for any other convolution; the message shows it.
        """
        (size, width), (stride, across), padding = conv.kernel_size, conv.stride, conv.padding
        alike = size == width and stride == across and not isinstance(padding, str) and padding[0] == padding[1]
        if not alike or conv.groups != 1 or conv.dilation != (1, 1) or conv.padding_mode != "zeros" or conv.transposed:
            raise ValueError(
                "SwitchedConv2d.from_conv takes a convolution that is the same in both directions, with zeros as "
                f"padding, one group and no dilation, got {conv}"
            )
        like = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        has_bias = conv.bias is not None
        made = cls(conv.in_channels, conv.out_channels, size, breadth, stride, padding[0], has_bias, **like)
        with torch.no_grad():
            made.weight.copy_(conv.weight.expand_as(made.weight))
            if has_bias:
                made.bias.copy_(conv.bias)
        return made.train(conv.training)

    def forward(self, x: Tensor, selector: Tensor) -> Tensor:
        """x: shape (N, C_in, H, W). selector: integers (N, H', W'), or floats (N, K, H', W'), for an output of that
        size. Returns shape (N, C_out, H', W')."""
        return functional.switched_conv2d(x, self.weight, selector, self.bias, self.stride, self.padding)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, breadth={self.breadth}, "
            f"stride={self.stride}, padding={self.padding}, bias={self.bias is not None}"
        )
