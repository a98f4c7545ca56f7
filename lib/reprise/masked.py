"""Convolutions that see only what comes before a pixel, and what they are stacked with.

Pixels come in raster order, row by row and from left to right; within a pixel the colours come one after the other.
Channels are grouped by colour everywhere: with three colours and six channels they are R R G G B B.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskedConv2d(nn.Conv2d):
    """A convolution of which every weight that would look at, or past, the pixel in the making is zero.

    van den Oord et al. 2016 (arXiv 1601.06759), section 3.4 and Figure 2. Rows above are seen, and in its own row what
    is left of the pixel. In the pixel itself, an output channel of one colour sees the input channels of earlier
    colours and, with mask B, of its own. Mask A is for the first layer, whose input is the image: a channel must not
    see its own value. Mask B is for all others, whose input at a pixel already knows nothing of it.

    The mask is applied at every forward pass: whatever an optimiser does to a masked weight has no effect, and its
    gradient is zero. Arguments and state_dict are those of :class:`torch.nn.Conv2d`, without what would break the
    order of the pixels: the stride is 1, the padding keeps height and width, and is zero.

    Args:
        in_channels: a multiple of ``colours``, grouped by colour (R R ... G G ... B B ...).
        out_channels: likewise.
        kernel_size: odd; a number, or height and width.
        mask: ``"A"`` or ``"B"``.
        colours: 1 for grey images, 3 for coloured ones.

    Shape: (N, in_channels, H, W) to (N, out_channels, H, W).

    Raises:
        ValueError: for channels that cannot be shared out evenly among the colours, an even kernel, another mask, or
            a stride, padding or groups that a masked convolution cannot have.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        mask: str,
        colours: int = 1,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = "same",
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        height, width = _pair(kernel_size)
        same = tuple(d * (k // 2) for d, k in zip(_pair(dilation), (height, width), strict=True))
        wrong = [
            (mask not in ("A", "B"), f"mask is {mask!r}, but must be 'A' or 'B'"),
            (colours < 1, f"colours is {colours}, but must be 1 at least"),
            (colours >= 1 and in_channels % colours, f"in_channels={in_channels} is no multiple of colours={colours}"),
            (colours >= 1 and out_channels % colours, f"out_channels={out_channels} is no multiple of {colours=}"),
            (not height % 2 or not width % 2, f"kernel_size={kernel_size} has no middle: it must be odd"),
            (_pair(stride) != (1, 1), f"stride={stride}: every pixel needs an output of its own, so it must be 1"),
            (padding != "same" and _pair(padding) != same, f"padding={padding} moves the pixels: it must be {same}"),
            (groups != 1, f"groups={groups} is not supported: colours group the channels"),
            (padding_mode != "zeros", f"padding_mode={padding_mode!r} shows pixels from elsewhere: it must be 'zeros'"),
        ]
        for is_wrong, words in wrong:
            if is_wrong:
                raise ValueError(f"MaskedConv2d: {words}")
        super().__init__(
            in_channels, out_channels, (height, width), 1, same, dilation, bias=bias, device=device, dtype=dtype
        )
        self.mask_type, self.colours = mask, colours
        self.register_buffer("mask", self._mask().to(device), persistent=False)

    def _mask(self) -> Tensor:
        """True where a weight counts; the shape of the weight (out, in, height, width)."""
        middle_row, middle = (k // 2 for k in self.kernel_size)
        seen = torch.zeros(self.weight.shape, dtype=torch.bool)
        seen[:, :, :middle_row] = True
        seen[:, :, middle_row, :middle] = True
        of_output = torch.arange(self.out_channels)[:, None] // (self.out_channels // self.colours)
        of_input = torch.arange(self.in_channels)[None] // (self.in_channels // self.colours)
        seen[:, :, middle_row, middle] = of_input < of_output if self.mask_type == "A" else of_input <= of_output
        return seen

    @property
    def masked_weight(self) -> Tensor:
        """The weight as it is used, zeros where it is masked."""
        return torch.where(self.mask, self.weight, 0)

    @property
    def rows_above(self) -> int:
        """How many rows above a pixel this layer looks at."""
        return self.padding[0]

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.masked_weight, self.bias)

    def extra_repr(self) -> str:
        colours = f", colours={self.colours}" if self.colours > 1 else ""
        return f"{super().extra_repr()}, mask={self.mask_type!r}{colours}"


def gate(x: Tensor, colours: int = 1) -> Tensor:
    """tanh of one half of each colour's channels, times the sigmoid of the other: (N, 2C, ...) to (N, C, ...).

    van den Oord et al. 2016 (arXiv 1606.05328), Eq. 2.
    """
    f, g = x.unflatten(1, (colours, 2, -1)).unbind(2)
    return (torch.tanh(f) * torch.sigmoid(g)).flatten(1, 2)


class GatedMaskedConv2d(nn.Module):
    """One layer of the Gated PixelCNN: a vertical and a horizontal stack, which together have no blind spot.

    van den Oord et al. 2016 (arXiv 1606.05328), Eq. 2 and 4, Figure 2:

        y = tanh(W_f * x + V_f^T h) ⊙ σ(W_g * x + V_g^T h)

    The vertical stack sees a rectangle: its own row and ``kernel_size // 2`` above it. Moved down by one row, it tells
    the horizontal stack of everything above, to the right as well. The horizontal stack sees its own row up to the
    pixel; only it has a residual connection (where it can: in layers with mask B that keep the number of channels).

    Args:
        in_channels: of both stacks, grouped by colour; the image's in the first layer.
        out_channels: of both stacks, grouped by colour.
        kernel_size: odd.
        mask: ``"A"`` in the first layer, which is given the image, ``"B"`` in the others.
        colours: as in :class:`MaskedConv2d`.
        conditions: size of the vector h that the image is conditioned on, such as the number of classes; 0 for none.

    Shape: v and h, both (N, in_channels, H, W), to v and h, both (N, out_channels, H, W). The condition is
    (N, conditions), or classes as integers (N,).

    Raises:
        ValueError: as :class:`MaskedConv2d`; and for a condition that does not fit.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, mask: str, colours: int = 1, conditions: int = 0
    ) -> None:
        super().__init__()
        self.colours, self.conditions, self.reach = colours, conditions, kernel_size // 2
        self.horizontal = MaskedConv2d(in_channels, 2 * out_channels, (1, kernel_size), mask, colours)
        self.vertical = nn.Conv2d(in_channels, 2 * out_channels, (self.reach + 1, kernel_size))
        self.vertical.sees_its_row = True  # what it makes is for rows below: see reprise.causality
        self.down = nn.Conv2d(2 * out_channels, 2 * out_channels, 1)
        self.out = MaskedConv2d(out_channels, out_channels, 1, "B", colours)
        # One V for each stack; the biases are the convolutions'.
        self.condition = nn.Linear(conditions, 4 * out_channels, bias=False) if conditions else None
        self.takes_condition = conditions > 0
        self.residual = mask == "B" and in_channels == out_channels

    @property
    def rows_above(self) -> int:
        """The one row by which the vertical stack is moved, once; its own reach is its convolution's."""
        return 1 if self.horizontal.mask_type == "A" else 0

    def forward(self, v: Tensor, h: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        to_v, to_h = self.conditioned(condition)
        r = self.reach
        v_in = self.vertical(F.pad(v, (r, r, r, 0)))  # rows y - r to y make row y
        above = F.pad(v_in, (0, 0, 1, -1))  # row y now holds what was in row y - 1
        h_in = self.horizontal(h) + self.down(above)
        if condition is not None:
            v_in, h_in = v_in + to_v, h_in + to_h
        new_h = self.out(gate(h_in, self.colours))
        return gate(v_in, self.colours), new_h + h if self.residual else new_h

    def conditioned(self, condition: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
        """V^T h for the vertical and for the horizontal stack, shape (N, 2 * out_channels, 1, 1); 0 without."""
        if condition is None and not self.conditions:
            return 0.0, 0.0
        if condition is None or not self.conditions:
            given = "none" if condition is None else f"one of shape {tuple(condition.shape)}"
            raise ValueError(f"a gated layer made with conditions={self.conditions} was given {given}")
        if condition.dim() == 1 and not condition.is_floating_point():
            condition = F.one_hot(condition, self.conditions)
        if condition.dim() != 2 or condition.size(1) != self.conditions:
            shown = tuple(condition.shape)
            raise ValueError(f"the condition must be (N, {self.conditions}) or classes (N,), got {shown}")
        to_v, to_h = self.condition(condition.to(self.condition.weight.dtype))[..., None, None].chunk(2, 1)
        return to_v, to_h


class CausalSequential(nn.Sequential):
    """Layers one after another, as :class:`torch.nn.Sequential`; those that take a condition are given it.

    Raises:
        ValueError: for a condition that no layer takes, or a missing one.
    """

    @property
    def takes_condition(self) -> bool:
        return any(takes_condition(layer) for layer in self)

    def forward(self, input: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is not None and not self.takes_condition:
            raise ValueError("a condition was given, but no layer takes one: see GatedMaskedConv2d(conditions=...)")
        for layer in self:
            input = layer(input, condition) if takes_condition(layer) else layer(input)
        return input


class Residual(CausalSequential):
    """x + layers(x) (He et al. 2015; PixelCNN's Figure 5).

    Around the first layer this would hand the image itself on, which is a leak: only features may be its input.
    """

    def forward(self, input: Tensor, condition: Tensor | None = None) -> Tensor:
        return input + super().forward(input, condition)


class GatedStack(nn.ModuleList):
    """Gated layers one after another, fed the image in both stacks; what comes out is the horizontal one.

    ::

        GatedStack(GatedMaskedConv2d(1, 32, 7, "A"), GatedMaskedConv2d(32, 32, 3, "B"))

    Shape: (N, in_channels of the first, H, W) to (N, out_channels of the last, H, W).

    Raises:
        ValueError: when the first layer does not have mask A, or a later one does.
    """

    def __init__(self, *layers: GatedMaskedConv2d) -> None:
        masks = "".join(layer.horizontal.mask_type for layer in layers)
        if not layers or masks != "A" + "B" * (len(layers) - 1):
            raise ValueError(f"the first layer of a GatedStack has mask A, all others B; got {masks or 'none'}")
        super().__init__(layers)

    @property
    def takes_condition(self) -> bool:
        return any(takes_condition(layer) for layer in self)

    def forward(self, input: Tensor, condition: Tensor | None = None) -> Tensor:
        v = h = input
        for layer in self:
            v, h = layer(v, h, condition)
        return h


def takes_condition(layer: nn.Module) -> bool:
    """Whether a layer wants a condition beside its input."""
    return getattr(layer, "takes_condition", False)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
