"""Drawing images from a causal model, one position after another, in three ways that give the same images.

drawn = sample(model, (16, 1, 28, 28), generator=torch.Generator().manual_seed(0))
drawn.images
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..causality import evaluating
from .caching import Sizes, incremental

__all__ = ["WAYS", "Sample", "Sizes", "check_arguments", "incremental", "rows_above", "sample"]


@dataclass(frozen=True)
class Sample:
    """Images and how they were drawn.

    Attributes:
        images: (N, C, H, W), values between 0 and 1.
        logits: (N, C, K, H, W), as each position was drawn from; NaN where every image had it given.
        positions: at how many positions the network was evaluated for each image. A pass that makes one of C colours
            of a position, and only this one, counts 1 / C.
    """

    images: Tensor
    logits: Tensor
    positions: int


@torch.no_grad()
def sample(
    model: nn.Module,
    shape: tuple[int, int, int, int],
    way: str = "cached",
    *,
    generator: torch.Generator | None = None,
    uniforms: Tensor | None = None,
    known: Tensor | None = None,
    values: Tensor | None = None,
    condition: Tensor | None = None,
    temperature: float = 1.0,
    check: bool = True,
    after_row: Callable[[int, Tensor], None] | None = None,
) -> Sample:
    """Draw images pixel by pixel in raster order, and within a pixel colour by colour.

    A position takes the first level at which the cumulative probability passes its uniform number. The uniform numbers
    do not depend on the way, so that all three draw the same images, as far as rounding lets them: exactly so in
    float64, but for a number within rounding of a step.

    Args:
        model: maps images (N, C, H, W) and, if given, a condition to logits (N, C K, H, W), grouped by colour. K = 1
            is the logit of a pixel being 1; with K > 1 level k of a pixel has the value k / (K - 1).
        shape: (N, C, H, W) of the images to draw.
        way: ``"naive"`` evaluates the whole image anew for each position; ``"restricted"`` the rows that the position
            can depend on; ``"cached"`` each position of each layer once (:mod:`reprise.sampling.caching`).
        generator: of the uniform numbers; on the CPU, so that all devices draw the same.
        uniforms: the uniform numbers themselves, of the images' shape, in [0, 1).
        known: which positions are given, bool, broadcast to ``shape``: they are kept and the rest is completed. What
            is given below or to the right of a position does not influence it.
        values: what they are, broadcast to ``shape``, between 0 and 1.
        condition: what the model is conditioned on, N rows.
        temperature: the logits are divided by it; towards 0 the likeliest level is taken.
        check: hold the logits against a last pass over the finished images: one pass among hundreds, which
            finds a model that sees what is to come, and a layer that does not do in steps what it does at once.
        after_row: called with the number of rows done and the images so far, after each row.

    Returns:
        A :class:`Sample`. The model is in evaluation mode meanwhile, and afterwards as it was; there is no graph.

    Raises:
        ValueError: for arguments that do not fit, or a layer that cannot be cached; the message names it.
        RuntimeError: when ``check`` finds different logits, or some that are not numbers.
    """
    if way not in WAYS:
        raise ValueError(f"no way {way!r}; there are {', '.join(WAYS)}")
    check_arguments(shape, uniforms, known, values, condition, temperature)
    like = next(model.parameters())
    if uniforms is None:
        uniforms = torch.rand(shape, generator=generator, dtype=torch.float64)
    uniforms = uniforms.to(like.device, torch.float64)
    images = torch.zeros(shape, dtype=like.dtype, device=like.device)
    given = None
    if known is not None:
        known = known.expand(shape)
        images = torch.where(known.to(like.device), values.to(images).expand(shape), images)
        given = (known.to(like.device), known.all(0).tolist())
    condition = None if condition is None else condition.to(like.device)
    drawing = _Drawing(images, uniforms, given, temperature)
    with evaluating(model):
        network = WAYS[way](model, images, condition)
        for y in range(shape[2]):
            network.row(y)
            drawing.row(network, y)
            if after_row is not None:
                after_row(y + 1, images)
        if check:
            drawing.check(model(images) if condition is None else model(images, condition))
    return Sample(images, drawing.logits, round(network.positions))


class _Drawing:
    """The images in the making, and the logits they are drawn from."""

    def __init__(self, images: Tensor, uniforms: Tensor, given: tuple | None, temperature: float):
        self.images, self.given, self.temperature = images, given, temperature
        self.uniforms = uniforms.permute(2, 3, 1, 0).contiguous()  # those of a position side by side
        self.logits = images.new_empty(0)

    def row(self, network, y: int) -> None:
        _, colours, _, width = self.images.shape
        rows, uniforms = self.images[:, :, y], self.uniforms[y]
        for x in range(width):
            for colour in range(colours):
                all_given = self.given is not None and self.given[1][colour][y][x]
                if all_given and not network.needs_all:
                    continue
                logits = network.logits(y, x, colour)
                if all_given:
                    network.put(x, colour, rows[:, colour, x, None])
                    continue
                value = draw(logits / self.temperature if self.temperature != 1 else logits, uniforms[x, colour])
                if self.given is not None:
                    value = torch.where(self.given[0][:, colour, y, x], rows[:, colour, x], value)
                rows[:, colour, x] = value
                self._keep(logits, colour, y, x)
                network.put(x, colour, value[:, None])

    def _keep(self, logits: Tensor, colour: int, y: int, x: int) -> None:
        if not self.logits.numel():  # only now it is known how many there are
            batch, colours, height, width = self.images.shape
            self.logits = logits.new_full((batch, colours, logits.size(1), height, width), torch.nan)
        self.logits[:, colour, :, y, x] = logits

    def check(self, logits: Tensor) -> None:
        """Whether the finished images' logits are those that they were drawn from."""
        if not self.logits.numel():
            return
        if logits.isnan().any():
            raise RuntimeError("the model's logits are not numbers: nothing can be drawn from them")
        logits = logits.view_as(self.logits)
        # As far as rounding may move them, with room for sums in another order.
        allowed = torch.finfo(logits.dtype).eps ** 0.5 * logits.abs().amax().clamp(min=1)
        apart = ((logits - self.logits).abs() > allowed).any(2).any(0).permute(1, 2, 0).nonzero()
        if len(apart):
            raise RuntimeError(
                f"the logits of the finished images are not those they were drawn from, first at (row, column, "
                f"colour) {tuple(apart[0].tolist())}: an output sees its own pixel or a later one "
                "(reprise.causality.find_leak tells which layer does), or a layer behaves differently in steps"
            )


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Values between 0 and 1 drawn from logits (N, K) by uniform numbers (N,): the inverse of the cumulated sums."""
    if logits.size(1) == 1:  # the levels 0 and 1, of which the logits are 0 and this
        return (uniforms >= torch.sigmoid(-logits[:, 0])).to(logits.dtype)
    cumulated = torch.softmax(logits, 1).cumsum(1)
    level = (cumulated[:, :-1] <= uniforms[:, None]).sum(1)
    return level.to(logits.dtype) / (logits.size(1) - 1)


class _Naive:
    """The whole image for each position."""

    needs_all = False  # positions that are given need no evaluation

    def __init__(self, model: nn.Module, images: Tensor, condition: Tensor | None):
        self.model, self.images, self.positions = model, images, 0
        self.condition = () if condition is None else (condition,)

    def row(self, y: int) -> None:
        pass

    def put(self, x: int, colour: int, value: Tensor) -> None:
        pass

    def logits(self, y: int, x: int, colour: int) -> Tensor:
        return self._part(self.images, y, x, colour)

    def _part(self, images: Tensor, y: int, x: int, colour: int) -> Tensor:
        colours, height, width = images.shape[1:]
        out = self.model(images, *self.condition)
        if out.dim() != 4 or out.size(1) % colours or out.shape[2:] != images.shape[2:]:
            raise ValueError(f"for images {tuple(images.shape)} the model returned {tuple(out.shape)}")
        self.positions += height * width
        return out.unflatten(1, (colours, -1))[:, colour, :, y, x]


class _Restricted(_Naive):
    """The rows that a position can depend on, and no others."""

    def __init__(self, model: nn.Module, images: Tensor, condition: Tensor | None):
        super().__init__(model, images, condition)
        self.above = rows_above(model)

    def logits(self, y: int, x: int, colour: int) -> Tensor:
        return self._part(self.images[:, :, max(0, y - self.above) : y + 1], -1, x, colour)


class _Cached:
    """Each position of each layer once."""

    needs_all = True  # later positions look at the layers' outputs here

    def __init__(self, model: nn.Module, images: Tensor, condition: Tensor | None):
        batch, colours, height, width = images.shape
        self.network = incremental(model, Sizes(batch, colours, height, width, images, condition))
        self.row, self.put = self.network.row, self.network.put
        self.positions, self.share = 0.0, 1 / colours

    def logits(self, y: int, x: int, colour: int) -> Tensor:
        self.positions += self.share
        logits = self.network.step(x, colour, None)
        if logits is None:
            raise ValueError("the model has no masked layer")
        return logits


WAYS = {"naive": _Naive, "restricted": _Restricted, "cached": _Cached}


def rows_above(model: nn.Module) -> int:
    """How many rows above a position its output can depend on, at most: the sum of what the layers look at."""
    total = 0
    for layer in model.modules():
        if hasattr(layer, "rows_above"):
            total += layer.rows_above
        elif isinstance(layer, nn.Conv2d):
            total += layer.dilation[0] * (layer.kernel_size[0] - 1)
    return total


def check_arguments(shape, uniforms, known, values, condition, temperature) -> None:
    """Raise ValueError, with what was given, for arguments of :func:`sample` that do not fit each other."""

    def fits(tensor: Tensor) -> bool:
        try:
            return torch.broadcast_shapes(tensor.shape, shape) == torch.Size(shape)
        except RuntimeError:
            return False

    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"shape is (images, colours, height, width), all 1 at least, got {tuple(shape)}")
    if uniforms is not None and tuple(uniforms.shape) != tuple(shape):
        raise ValueError(f"uniforms must have the images' shape {tuple(shape)}, got {tuple(uniforms.shape)}")
    if (known is None) != (values is None):
        raise ValueError("known says which positions are given and values what they are: give both or neither")
    for name, tensor in (("known", known), ("values", values)):
        if tensor is not None and not fits(tensor):
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} does not broadcast to {tuple(shape)}")
    if known is not None and known.dtype != torch.bool:
        raise ValueError(f"known must be of torch.bool, got {known.dtype}")
    for name, tensor in (("values", values), ("uniforms", uniforms)):
        if tensor is not None and not (tensor.min() >= 0 and tensor.max() <= 1):
            found = f"{tensor.min().item():g} to {tensor.max().item():g}"
            raise ValueError(f"{name} must lie between 0 and 1, got {found}")
    if condition is not None and len(condition) != shape[0]:
        raise ValueError(f"condition has {len(condition)} rows for {shape[0]} images")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
