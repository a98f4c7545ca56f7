"""``sample``: images drawn from a causal network, each by one block of threads, on the kernel of ``sampler.cu``."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..masked import CausalSequential, GatedMaskedConv2d, GatedStack, MaskedConv2d, Residual
from ..sampling import Sample, check_arguments
from .launch import Kernel

_SOURCE = Path(__file__).with_name("sampler.cu").read_text(encoding="utf-8")
_NONE, _RELU, _GATE = range(3)
_SHARED_BYTES = 48 << 10
# Rows of 32 threads in a block; on the CPU the threads take turns, and more would take longer.
_ROWS = {"cuda": 8, "cpu": 2}


@torch.no_grad()
def sample(
    model: nn.Module,
    shape: tuple[int, int, int, int],
    *,
    generator: torch.Generator | None = None,
    uniforms: Tensor | None = None,
    known: Tensor | None = None,
    values: Tensor | None = None,
    condition: Tensor | None = None,
    temperature: float = 1.0,
) -> Sample:
    """Draw images as :func:`reprise.sampling.sample` does, in a single launch.

    Arguments and result are the same, and so are the images, in float64 exactly but for numbers within rounding of a
    step; there is no check against a last pass. For networks of :class:`~reprise.nn.MaskedConv2d`, 1 x 1 convolutions,
    ReLU, residual blocks and gated stacks. The model is on a CUDA device, or, for tests and lessons, on the CPU.

    Raises:
        ValueError: for arguments that do not fit, a model that is not in float32 or float64, or a layer that the kernel
            has no place for; the message names it.
    """
    check_arguments(shape, uniforms, known, values, condition, temperature)
    like = next(model.parameters())
    if like.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the kernel draws in float32 or float64, the model is in {like.dtype}")
    condition = None if condition is None else condition.to(like.device)
    batch, colours, height, width = shape
    program = Program(colours, height, width, like)
    out = program.add(model, Place(program.map(colours), colours), condition)
    if out.activation != _NONE or out.channels % colours:
        raise ValueError(f"the model ends in {out.channels} channels for {colours} colours, or in an activation")

    if uniforms is None:
        uniforms = torch.rand(shape, generator=generator, dtype=torch.float64)
    pixels = lambda tensor: tensor.expand(shape).to(like.device).permute(0, 2, 3, 1).contiguous()  # noqa: E731
    maps = like.new_zeros(batch, program.size)
    if known is not None:
        start = torch.where(known.to(like.device), values.to(like), 0)
        maps[:, : colours * height * width] = pixels(start).flatten(1)
    biases = torch.cat([bias.expand(batch, -1) for bias in program.biases], 1).contiguous()
    _sample_images(
        maps,
        pixels(uniforms.double()),
        None if known is None else pixels(known),
        program.table(),
        torch.tensor(program.taps, dtype=torch.int32, device=like.device),
        torch.cat([weight.flatten() for weight in program.weights]),
        biases,
        [len(program.of_rows), program.most_inputs, colours, height, width, out.start, out.channels // colours],
        temperature,
    )
    images = maps[:, : colours * height * width].view(batch, height, width, colours).permute(0, 3, 1, 2)
    logits = maps[:, out.start : out.start + out.channels * height * width]
    logits = logits.view(batch, height, width, colours, -1).permute(0, 3, 4, 1, 2).contiguous()
    if known is not None:
        logits.masked_fill_(known.expand(shape).all(0)[None, :, None].to(like.device), torch.nan)
    return Sample(images.contiguous(), logits, height * width)


@dataclass(frozen=True)
class Place:
    """A map, and the activation that whoever reads it applies."""

    start: int
    channels: int  # after the activation
    activation: int = _NONE


class Program:
    """A network as the kernel's table of convolutions."""

    def __init__(self, colours: int, height: int, width: int, like: Tensor):
        self.colours, self.pixels, self.like = colours, height * width, like
        self.size = self.most_inputs = 0
        self.of_rows: list[list[int]] = []
        self.of_pixels: list[list[int]] = []
        self.taps: list[tuple[int, int]] = []
        self.weights: list[Tensor] = []
        self.biases: list[Tensor] = []

    def map(self, channels: int) -> int:
        """Room for a map; where it begins."""
        start, self.size = self.size, self.size + channels * self.pixels
        if self.size >= 2**31:
            raise ValueError("the maps of one image have more than 2^31 numbers")
        return start

    def table(self) -> Tensor:
        return torch.tensor(self.of_rows + self.of_pixels, dtype=torch.int32, device=self.like.device)

    def convolve(
        self,
        source: Place,
        weight: Tensor,
        taps: list[tuple[int, int]],
        bias: Tensor,
        added: tuple[int, int] = (-1, 0),
        rows: bool = False,
    ) -> Place:
        """A row of the table. Weight (O, C, T), taps (dy, dx), bias (O,) or (N, O); ``rows`` for the vertical stack."""
        outputs, inputs = weight.size(0), weight.size(1) * weight.size(2)
        self.most_inputs = max(self.most_inputs, inputs)
        target = Place(self.map(outputs), outputs)
        starts = sum(w.numel() for w in self.weights), sum(b.size(-1) for b in self.biases)
        row = [source.start, source.channels, source.activation, target.start, outputs]
        row += [len(self.taps), len(taps), *starts, *added]
        (self.of_rows if rows else self.of_pixels).append(row)
        self.taps += taps
        self.weights.append(weight.permute(2, 1, 0).contiguous())
        self.biases.append(bias.reshape(-1, outputs))
        return target

    def add(self, layer: nn.Module, source: Place, condition: Tensor | None, name: str = "model") -> Place:
        """A layer, and what it makes of a map."""
        forward = type(layer).forward
        if forward in (nn.Sequential.forward, CausalSequential.forward, Residual.forward):
            return self._chain(layer, source, condition, name)
        first = source.start == 0 and forward not in (nn.Identity.forward, nn.Dropout.forward, GatedStack.forward)
        if first and getattr(layer, "mask_type", "B") != "A":
            raise ValueError(f"{name} ({type(layer).__name__}) sees the pixel to be drawn: the first needs mask A")
        if forward is MaskedConv2d.forward:
            return self._masked(layer, source, name)
        if forward is nn.Conv2d.forward and layer.kernel_size == (1, 1) and self.colours == layer.groups == 1:
            return self.convolve(source, layer.weight.flatten(2), [(0, 0)], _bias(layer))
        if forward is GatedStack.forward:
            return self._gated(layer, source, condition, name)
        if forward is nn.ReLU.forward and source.activation in (_NONE, _RELU):
            return Place(source.start, source.channels, _RELU)
        if forward in (nn.Identity.forward, nn.Dropout.forward):
            return source
        raise ValueError(f"{name} ({type(layer).__name__}) has no place in the kernel: see reprise.kernels.sample")

    def _chain(self, layers: nn.Sequential, source: Place, condition: Tensor | None, name: str) -> Place:
        target, before = source, len(self.of_pixels)
        for place, layer in layers.named_children():
            target = self.add(layer, target, condition, f"{name}.{place}")
        if isinstance(layers, Residual):
            new = [row for row in self.of_pixels[before:] if row[3] == target.start and row[9] < 0]
            if not new or source.start == 0 or source.activation != _NONE or target.activation != _NONE:
                raise ValueError(f"{name} (Residual) must begin with a map and end with a convolution in the kernel")
            new[0][9:] = source.start, 0
        return target

    def _masked(
        self, layer: MaskedConv2d, source: Place, name: str, order: Tensor | slice = slice(None), bias=None, **options
    ) -> Place:
        """A masked convolution, its outputs in another order, or with another bias (in that order)."""
        if layer.colours != self.colours:
            raise ValueError(f"{name} was made for colours={layer.colours}, the images have {self.colours}")
        middle, side = (k // 2 for k in layer.kernel_size)
        # Row by row, what comes before the pixel, and the pixel itself.
        taken = [(r, c) for r in range(middle + 1) for c in range(layer.kernel_size[1]) if r < middle or c <= side]
        taps = [((r - middle) * layer.dilation[0], (c - side) * layer.dilation[1]) for r, c in taken]
        weight = torch.stack([layer.masked_weight[:, :, r, c] for r, c in taken], 2)
        return self.convolve(source, weight[order], taps, _bias(layer)[order] if bias is None else bias, **options)

    def _gated(self, stack: GatedStack, source: Place, condition: Tensor | None, name: str) -> Place:
        v = h = source
        for place, layer in stack.named_children():
            v, h = self._gated_layer(layer, v, h, condition, f"{name}.{place}")
        return h

    def _gated_layer(self, layer: GatedMaskedConv2d, v: Place, h: Place, condition, name: str) -> tuple[Place, Place]:
        to_v, to_h = layer.conditioned(condition if layer.conditions else None)
        to_v, to_h = ((t.flatten(1) if isinstance(t, Tensor) else t) for t in (to_v, to_h))
        # The kernel wants the two channels of a gate side by side: of each colour, f0 g0 f1 g1 ...
        channels = layer.out.out_channels
        pairs = torch.arange(2 * channels).view(self.colours, 2, -1).transpose(1, 2).flatten()
        rows, columns = layer.vertical.kernel_size
        taps = [(r - rows + 1, c - columns // 2) for r in range(rows) for c in range(columns)]
        weight = layer.vertical.weight.flatten(2)[pairs]
        made = self.convolve(v, weight, taps, (layer.vertical.bias + to_v)[..., pairs], rows=True)
        # What goes down is told without the condition. Its bias counts in the first row, too, above which is nothing.
        down = layer.down.weight[:, :, 0, 0]
        taken_off = -to_v @ down.T if isinstance(to_v, Tensor) else torch.zeros_like(layer.down.bias)
        below = self.convolve(made, down[pairs][:, pairs, None], [(0, 0)], taken_off[..., pairs], rows=True)
        bias = (layer.horizontal.bias + layer.down.bias + to_h)[..., pairs]
        inside = self._masked(layer.horizontal, h, f"{name}.horizontal", pairs, bias, added=(below.start, -1))
        gated = [Place(place.start, channels, _GATE) for place in (made, inside)]
        added = (h.start, 0) if layer.residual else (-1, 0)
        return gated[0], self._masked(layer.out, gated[1], f"{name}.out", added=added)


def _bias(layer: nn.Conv2d) -> Tensor:
    return torch.zeros_like(layer.weight[:, 0, 0, 0]) if layer.bias is None else layer.bias


@torch.library.custom_op("reprise::sample_images", mutates_args=("maps",))
def _sample_images(
    maps: Tensor,
    uniforms: Tensor,
    known: Tensor | None,
    layers: Tensor,
    taps: Tensor,
    weights: Tensor,
    biases: Tensor,
    sizes: list[int],
    temperature: float,
) -> None:
    of_rows, most_inputs, colours, height, width, logits, levels = sizes
    rows = _ROWS[maps.device.type]
    shared = (32 * rows + most_inputs) * maps.element_size()
    if shared > _SHARED_BYTES:
        raise ValueError(f"a layer sees {most_inputs} numbers at a pixel: more than a block's memory holds")
    tables = (layers, of_rows, len(layers), taps, weights, biases, biases.size(1))
    sizes = (colours, height, width, logits, levels, temperature)
    arguments = (maps, maps.size(1), uniforms, known, *tables, *sizes)
    _kernel(maps.dtype)(maps.size(0), (32, rows), *arguments, shared_bytes=shared)


@_sample_images.register_fake
def _(maps, uniforms, known, layers, taps, weights, biases, sizes, temperature) -> None:
    return None


@functools.cache
def _kernel(dtype: torch.dtype) -> Kernel:
    return Kernel(_SOURCE, "sample_images", file="sampler.cu", REAL=dtype)
