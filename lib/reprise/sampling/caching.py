"""A network evaluated one position after another, each position of each layer once.

Ramachandran et al. 2017 (arXiv 1704.06001): what a layer made of earlier pixels stays the same, so it is kept. Every
layer has a twin here with three methods, called in the order in which an image is made:

    row(y)              the rows above y are complete: do what depends on nothing else, for the whole row at once
    step(x, colour, h)  the layer's output at column x of the row, the channels of one colour: h (N, C) to (N, C')
    put(x, colour, h)   the pixel is drawn: the first layer writes down its value, shape (N, 1)

Steps have h = None until the first masked layer: the value is not known yet, and with mask A nobody asks for it.
A layer or model of your own joins in with a method ``incremental(sizes)`` that returns its twin; a model that only
wraps others returns ``incremental(self.layers, sizes)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..masked import CausalSequential, GatedMaskedConv2d, GatedStack, MaskedConv2d, Residual, gate


@dataclass(frozen=True)
class Sizes:
    """What the twins have to know of the images: how many of which size, their type and device, their condition."""

    batch: int
    colours: int
    height: int
    width: int
    like: Tensor
    condition: Tensor | None = None


class Pointwise:
    """A layer that looks at one position and one channel at a time, such as an activation."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.function = function

    def row(self, y: int) -> None:
        pass

    def step(self, x: int, colour: int, h: Tensor | None) -> Tensor | None:
        return h if h is None else self.function(h)

    def put(self, x: int, colour: int, h: Tensor) -> Tensor | None:
        """What the next layer is to write down, or None if it is done."""
        return self.function(h)


class Convolution:
    """A masked convolution: its rows above for the whole row at once, then pixel by pixel what is to the left."""

    def __init__(self, layer: MaskedConv2d, sizes: Sizes, name: str):
        self.name, self.first, self.colours, self.width = name, layer.mask_type == "A", layer.colours, sizes.width
        if layer.colours != sizes.colours:
            raise ValueError(f"{name} was made for colours={layer.colours}, the images have {sizes.colours}")
        (self.above, self.side), self.dilation = layer.padding, layer.dilation
        weight, middle = layer.masked_weight.detach(), layer.kernel_size[0] // 2
        self.bias = torch.zeros_like(weight[:, 0, 0, 0]) if layer.bias is None else layer.bias.detach()
        self.weight_above = weight[:, :, :middle]
        # The taps to the left and the pixel itself, as one matrix (taps * C, C') for each colour of the output. Where
        # the kernel is dilated, the taps between are zero.
        left = weight.new_zeros(*weight.shape[:2], self.side + 1)
        left[:, :, :: self.dilation[1]] = weight[:, :, middle, : layer.kernel_size[1] // 2 + 1]
        self.weight_left = [part.contiguous() for part in left.permute(2, 1, 0).flatten(0, 1).chunk(layer.colours, 1)]
        # The row in the making, channels last and padded on the left: taps that are neighbours lie side by side. Its
        # views are made once: cell x is where the input of column x goes, window x shows the taps that column x needs.
        batch, channels = sizes.batch, layer.in_channels
        self.line = sizes.like.new_zeros(batch, self.side + sizes.width, channels)
        self.cells = self.line[:, self.side :].view(batch, -1, channels // self.colours).unbind(1)
        windows = (batch, sizes.width, (self.side + 1) * channels), (self.line.stride(0), channels, 1)
        self.windows = self.line.as_strided(*windows).unbind(1)
        # The rows above, as a convolution wants them, the padding around them.
        self.rows = sizes.like.new_zeros(batch, channels, self.above, sizes.width + 2 * self.side)
        self.base = self.for_each_pixel(self.bias.view(1, -1, 1).expand(batch, -1, sizes.width))

    def for_each_pixel(self, row: Tensor) -> tuple[Tensor, ...]:
        """(N, C', W) as W * colours pieces (N, C' / colours), in the order of the steps."""
        return row.unflatten(1, (self.colours, -1)).permute(3, 1, 0, 2).flatten(0, 1).contiguous().unbind(0)

    def completed(self) -> Tensor:
        """The inputs of the row that was last made: (N, C, W)."""
        return self.line[:, self.side :].transpose(1, 2)

    def row(self, y: int) -> None:
        if self.above:
            if y:
                last = F.pad(self.completed(), (self.side, self.side))
                self.rows = torch.cat([self.rows[:, :, 1:], last[:, :, None]], 2)
            made = F.conv2d(self.rows, self.weight_above, self.bias, dilation=self.dilation)
            self.base = self.for_each_pixel(made[:, :, 0])

    def step(self, x: int, colour: int, h: Tensor | None) -> Tensor:
        place = x * self.colours + colour
        if h is not None:
            self.cells[place].copy_(h)
        elif not self.first:
            raise ValueError(f"{self.name} has mask B and sees the pixel to be drawn: the first needs mask A")
        return torch.addmm(self.base[place], self.windows[x], self.weight_left[colour])

    def put(self, x: int, colour: int, h: Tensor) -> None:
        self.cells[x * self.colours + colour].copy_(h)


class Chain:
    """Layers one after another."""

    def __init__(self, layers: nn.Sequential, sizes: Sizes, name: str):
        self.layers = [incremental(layer, sizes, f"{name}.{place}") for place, layer in layers.named_children()]

    def row(self, y: int) -> None:
        for layer in self.layers:
            layer.row(y)

    def step(self, x: int, colour: int, h: Tensor | None) -> Tensor | None:
        for layer in self.layers:
            h = layer.step(x, colour, h)
        return h

    def put(self, x: int, colour: int, h: Tensor | None) -> Tensor | None:
        for layer in self.layers:
            h = layer.put(x, colour, h)
            if h is None:
                break
        return h


class Sum(Chain):
    """x + layers(x)."""

    def __init__(self, layers: nn.Sequential, sizes: Sizes, name: str):
        super().__init__(layers, sizes, name)
        self.name = name

    def step(self, x: int, colour: int, h: Tensor | None) -> Tensor:
        if h is None:
            raise ValueError(f"{self.name} adds the image itself to what it makes of it, which is a leak")
        return h + super().step(x, colour, h)


class Gated:
    """One gated layer. The vertical stack's rows are made whole, since they are needed only in the row below."""

    def __init__(self, layer: GatedMaskedConv2d, sizes: Sizes, name: str):
        self.layer = layer
        self.horizontal = Convolution(layer.horizontal, sizes, f"{name}.horizontal")
        self.out = Convolution(layer.out, sizes, f"{name}.out")
        self.to_v, self.to_h = layer.conditioned(sizes.condition if layer.conditions else None)
        reach = layer.reach
        self.rows = sizes.like.new_zeros(sizes.batch, layer.vertical.in_channels, reach + 1, sizes.width + 2 * reach)
        self.nothing = sizes.like.new_zeros(sizes.batch, layer.out.out_channels, sizes.width)

    def row(self, y: int, v: Tensor) -> Tensor:
        """From the vertical stack's row above, (N, C, W), the one of the next layer; zeros above the first row."""
        reach = self.layer.reach
        self.rows = torch.cat([self.rows[:, :, 1:], F.pad(v, (reach, reach))[:, :, None]], 2)
        made = self.layer.vertical(self.rows)
        from_above = self.layer.down(made if y else torch.zeros_like(made)) + self.to_h
        self.horizontal.base = self.horizontal.for_each_pixel(from_above[:, :, 0] + self.horizontal.bias[:, None])
        # Above the image there is nothing, not what a layer makes of nothing.
        return gate(made + self.to_v, self.layer.colours)[:, :, 0] if y else self.nothing

    def step(self, x: int, colour: int, h: Tensor | None) -> Tensor:
        new_h = self.out.step(x, colour, gate(self.horizontal.step(x, colour, h)))
        return new_h + h if self.layer.residual else new_h


class Stack:
    """Gated layers. Both stacks of the first are given the image."""

    def __init__(self, layers: GatedStack, sizes: Sizes, name: str):
        self.layers = [Gated(layer, sizes, f"{name}.{place}") for place, layer in layers.named_children()]
        self.nothing = sizes.like.new_zeros(sizes.batch, layers[0].vertical.in_channels, sizes.width)

    def row(self, y: int) -> None:
        v = self.layers[0].horizontal.completed() if y else self.nothing
        for layer in self.layers:
            v = layer.row(y, v)

    def step(self, x: int, colour: int, h: Tensor | None) -> Tensor:
        for layer in self.layers:
            h = layer.step(x, colour, h)
        return h

    def put(self, x: int, colour: int, h: Tensor) -> None:
        self.layers[0].horizontal.put(x, colour, h)


def _one_by_one(layer: nn.Conv2d, sizes: Sizes, name: str) -> Pointwise:
    if layer.kernel_size != (1, 1) or layer.stride != (1, 1) or layer.padding not in ((0, 0), "same", "valid"):
        raise ValueError(f"{name} (Conv2d) sees more than one pixel, and later ones: use MaskedConv2d")
    if sizes.colours != 1 or layer.groups != 1:
        raise ValueError(f"{name} (Conv2d) mixes the colours: use MaskedConv2d(..., 1, mask='B', colours=...)")
    return Pointwise(lambda h: F.linear(h, layer.weight[:, :, 0, 0], layer.bias))


def _pointwise(layer: nn.Module, sizes: Sizes, name: str) -> Pointwise:
    return Pointwise(layer.forward)  # past the hooks of a module's call, which take longer than the work


_ACTIVATIONS = (
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardtanh),
    *(nn.Identity, nn.Dropout, nn.Dropout2d),  # nothing drops out in evaluation mode
)
_TWINS: dict[type[nn.Module], Callable] = {
    MaskedConv2d: Convolution,
    nn.Conv2d: _one_by_one,
    nn.Sequential: Chain,
    CausalSequential: Chain,
    Residual: Sum,
    GatedStack: Stack,
    **dict.fromkeys(_ACTIVATIONS, _pointwise),
}


def incremental(layer: nn.Module, sizes: Sizes, name: str = "model"):
    """The twin of a layer that makes one position after another.

    Raises:
        ValueError: for a layer that has none, or cannot have one; the message names it.
    """
    if hasattr(layer, "incremental"):
        return layer.incremental(sizes)
    for kind in type(layer).__mro__:
        # A subclass that computes something else is not what it was made from.
        if kind in _TWINS and type(layer).forward is kind.forward:
            return _TWINS[kind](layer, sizes, name)
    raise ValueError(
        f"{name} ({type(layer).__name__}) cannot be evaluated position by position: reprise.sampling knows "
        f"{', '.join(kind.__name__ for kind in _TWINS)}, and layers with a method incremental(sizes)"
    )
