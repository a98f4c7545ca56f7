"""The papers' operations, under the names and signatures that ``torch.nn.functional`` uses for such things."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .kernels import on_cuda, warping
from .switched import switched_conv2d as switched_conv2d


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


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """Move an image along a flow: every target pixel looks up where the flow says it came from.

    With (x, y) a target pixel and (dx, dy) the flow there, output[:, :, y, x] is the image at (x + dx, y + dy),
    interpolated between its four nearest pixels (Jaderberg et al. 2015, arXiv 1506.02025, Eq. 5):

        sum over n, m of image[n, m] * max(0, 1 - |x + dx - m|) * max(0, 1 - |y + dy - n|)

    Outside the image its border is repeated. Differentiable in the image and, but for the kinks at whole pixels, in
    the flow; at a kink, the slope towards larger coordinates is taken, outside the image it is zero.

    Args:
        image: shape (N, C, H, W), of a floating-point type.
        flow: shape (N, 2, H', W') in pixels of the image, dx (to the right) before dy (down). H' and W' are the
            output's and need not be the image's.

    Returns:
        A tensor of shape (N, C, H', W') and the dtype of ``image``. A pixel whose flow is not a number is not a
        number itself, and hands no gradient on; no other pixel is touched by it. On a CUDA tensor, where CuPy is
        installed, it is computed by :func:`reprise.kernels.warp`, which can be differentiated once only.

    Raises:
        ValueError: for other shapes, an image without pixels, types that are not floating-point, or two devices.
    """
    warping.check(image, flow)
    if on_cuda.usable(image):
        return kernels.warp(image, flow)
    # Half precision cannot count the pixels of a photograph; positions are single precision at least.
    exact = torch.promote_types(torch.promote_types(image.dtype, flow.dtype), torch.float32)
    y, x = (torch.arange(size, dtype=exact, device=flow.device) for size in flow.shape[2:])
    # A flow that is not a number looks up pixel 0 and is marked in the end: no index may come from it.
    unknown = flow.isnan().any(1, keepdim=True)
    dx, dy = torch.where(unknown, 0, flow).to(exact).unbind(1)
    x0, x1, a = _neighbours(x + dx, image.shape[3])
    y0, y1, b = _neighbours(y[:, None] + dy, image.shape[2])

    pixels = image.to(exact).flatten(2)  # (N, C, H * W)

    def at(row: Tensor, column: Tensor) -> Tensor:
        index = (row * image.shape[3] + column).flatten(1)[:, None].expand(-1, image.shape[1], -1)
        return pixels.gather(2, index).unflatten(2, flow.shape[2:])

    top = torch.lerp(at(y0, x0), at(y0, x1), a)
    bottom = torch.lerp(at(y1, x0), at(y1, x1), a)
    return torch.where(unknown, torch.nan, torch.lerp(top, bottom, b)).to(image.dtype)


def _neighbours(position: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the pixels before and after positions (N, H', W') along an axis, and how far each is on the way
    between them (N, 1, H', W'). Outside, both are the pixel at the border."""
    # In floating point and before any index: a flow may be huge, or infinite. One pixel further than the border on
    # either side the two neighbours are the same pixel, so nothing is lost, and an infinite slope cannot arise.
    position = position.clamp(-1, size)
    before = position.detach().floor()
    way = (position - before)[:, None]
    index = before.long()
    return index.clamp(0, size - 1), (index + 1).clamp(0, size - 1), way


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """What a discriminator minimises (Goodfellow et al. 2014, arXiv 1406.2661): -V of Eq. 1 with G held fixed,

        -mean log D(x) - mean log(1 - D(G(z))),   D = sigmoid(logit).

    At D = 1/2 it is 2 log 2. The paper's released code halves it, which is half the learning rate; we do not.
    Computed as softplus, so that no logarithm meets a zero. Detach the fakes where the generator is not to learn.

    Args:
        real_logits: of data, any shape.
        fake_logits: of samples, any shape.

    Returns:
        A scalar in nats.
    """
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits: Tensor, saturating: bool = False) -> Tensor:
    """What a generator minimises (Goodfellow et al. 2014, arXiv 1406.2661).

    By default the non-saturating loss of section 3, -mean log D(G(z)); with ``saturating`` the generator's part of
    Eq. 1, mean log(1 - D(G(z))). By a logit a their gradients are -(1 - D) and -D: same sign, ratio exp(-a), so that
    the second vanishes where the discriminator is sure.

    Args:
        fake_logits: of samples, any shape.
        saturating: see above.

    Returns:
        A scalar in nats.
    """
    return -F.softplus(fake_logits).mean() if saturating else F.softplus(-fake_logits).mean()


def gram_matrix(features: Tensor) -> Tensor:
    """Inner products between feature maps (Gatys et al. 2015, arXiv 1508.06576, Eq. 3):

        G_ij = sum over positions k of F_ik F_jk.

    The plain sum: divided neither by the number of positions nor by that of channels.

    Args:
        features: shape (N, C, H, W), floating-point.

    Returns:
        Shape (N, C, C), symmetric. Half precision, in which the sum soon overflows, gives float32.

    Raises:
        ValueError: for other shapes, or types that are not floating-point.
    """
    if features.dim() != 4 or not features.is_floating_point():
        raise ValueError(
            f"gram_matrix takes floating-point features (N, C, H, W), got {features.dtype} of shape "
            f"{tuple(features.shape)}"
        )
    if features.dtype in (torch.float16, torch.bfloat16):
        features = features.float()
    # The product leaves the gradient in the layout of its operand: the features' own, or adding it to theirs is slow.
    if features.is_contiguous(memory_format=torch.channels_last):
        f = features.permute(0, 2, 3, 1).flatten(1, 2)  # positions, channels
        return f.mT @ f
    f = features.flatten(2)  # channels, positions
    return f @ f.mT
