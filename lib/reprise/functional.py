"""The papers' operations, under the names and signatures that ``torch.nn.functional`` uses for such things."""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels
from .kernels import on_cuda


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise every channel over all other dimensions, then scale and shift it.

    Ioffe & Szegedy 2015 (arXiv 1502.03167), Algorithm 1 when ``training``, the affine map of Algorithm 2
    otherwise. A drop-in for :func:`torch.nn.functional.batch_norm`.

    Args:
        input: shape (N, C, ...).
        running_mean: shape (C,), the population mean; updated in place when training. May be None when training.
        running_var: shape (C,), the *unbiased* population variance (Algorithm 2, step 10); likewise.
        weight: shape (C,), the paper's gamma. None means 1.
        bias: shape (C,), the paper's beta. None means 0.
        training: normalise by the batch's own statistics instead of the running ones.
        momentum: weight of the newest batch in the running statistics.
        eps: added to the variance, inside the root.

    Returns:
        A tensor of the shape and dtype of ``input``. When training on a CUDA tensor, and CuPy is installed, it is
        computed by :func:`reprise.kernels.batch_norm`, which can be differentiated once only.

    Raises:
        ValueError: when training on a single value per channel, whose variance says nothing, or when not
            training without running statistics.
    """
    others = [d for d in range(input.dim()) if d != 1]
    per_channel = [1, -1] + [1] * (input.dim() - 2)
    # Half precision has too few digits for sums over a batch.
    x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input

    if training:
        count = input.numel() // max(input.size(1), 1)
        if count == 1:
            raise ValueError(
                f"batch normalisation cannot train on one value per channel (input of shape {tuple(input.shape)}): "
                "use a larger batch, or eval()"
            )
        if count and on_cuda.usable(input):
            y, mean, var = kernels.batch_norm(input, weight, bias, eps)
            _remember(running_mean, running_var, mean, var, count, momentum)
            return y
        var, mean = torch.var_mean(x, others, correction=0, keepdim=True)
        if count:  # an empty batch has no statistics to remember
            _remember(running_mean, running_var, mean.flatten(), var.flatten(), count, momentum)
    elif running_mean is None or running_var is None:
        raise ValueError("batch normalisation needs running_mean and running_var when it is not training")
    else:
        mean, var = running_mean.to(x.dtype).view(per_channel), running_var.to(x.dtype).view(per_channel)

    y = (x - mean) * torch.rsqrt(var + eps)
    if weight is not None:
        y = y * weight.view(per_channel)
    if bias is not None:
        y = y + bias.view(per_channel)
    return y.to(input.dtype)


@torch.no_grad()
def _remember(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, var: Tensor, count: int, momentum: float
) -> None:
    """Move the running statistics towards a batch's mean and biased variance."""
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    if running_var is not None:
        running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
