"""The papers' layers, under the names, arguments and state_dict that ``torch.nn`` uses for such things."""

from __future__ import annotations

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
