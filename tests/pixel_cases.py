"""Small networks of masked layers that several tests share."""

from __future__ import annotations

import torch
from torch import nn

from reprise.nn import CausalSequential, GatedMaskedConv2d, GatedStack, MaskedConv2d, Residual


def plain(depth: int, first: int = 3, colours: int = 1, levels: int = 1, hidden: int = 6) -> nn.Module:
    """A first layer with mask A, ``depth`` more with mask B, a 1 x 1 head."""
    hidden *= colours
    middle = [layer for _ in range(depth) for layer in (nn.ReLU(), MaskedConv2d(hidden, hidden, 3, "B", colours))]
    head = MaskedConv2d(hidden, colours * levels, 1, "B", colours)
    return nn.Sequential(MaskedConv2d(colours, hidden, first, "A", colours), *middle, nn.ReLU(), head)


def residual(depth: int, colours: int = 1, levels: int = 1, hidden: int = 6) -> nn.Module:
    """The paper's residual blocks (Figure 5), halves of the channels inside."""
    hidden *= 2 * colours
    masked = lambda i, o, k: MaskedConv2d(i, o, k, "B", colours)  # noqa: E731

    def block() -> nn.Module:
        half = hidden // 2
        inside = [masked(hidden, half, 1), nn.ReLU(), masked(half, half, 3), nn.ReLU(), masked(half, hidden, 1)]
        return Residual(nn.ReLU(), *inside)

    blocks = [block() for _ in range(depth)]
    first, head = MaskedConv2d(colours, hidden, 5, "A", colours), masked(hidden, colours * levels, 1)
    return CausalSequential(first, *blocks, nn.ELU(), head)


def gated(depth: int, colours: int = 1, levels: int = 1, hidden: int = 6, classes: int = 0) -> nn.Module:
    """``depth`` layers with mask B after the first."""
    hidden *= colours
    layers = [GatedMaskedConv2d(hidden, hidden, 3, "B", colours, classes) for _ in range(depth)]
    stack = GatedStack(GatedMaskedConv2d(colours, hidden, 3, "A", colours, classes), *layers)
    return CausalSequential(stack, nn.ReLU(), MaskedConv2d(hidden, colours * levels, 1, "B", colours))


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random parameters large enough that logits are far from zero, in float64."""
    torch.manual_seed(seed)
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            fan = parameter[0].numel() if parameter.dim() > 1 else 4
            parameter.copy_(torch.randn_like(parameter) * 2 / fan**0.5)
    return model
