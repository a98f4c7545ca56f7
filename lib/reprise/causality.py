"""Who sees whom: which pixels an output depends on, and whether one sees what it must not.

Positions are counted in the order of the making: pixels row by row, and within a pixel its colours one after the other.
An output may depend on the positions before its own, and on nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_AT_ONCE = 128


@dataclass(frozen=True)
class Dependencies:
    """Which outputs of a model depend on which inputs.

    Attributes:
        matrix: (P, P) of bool, True where output i depends on input j; positions in raster order, colours last.
        shape: (C, H, W) of the image; P = C H W.
    """

    matrix: Tensor
    shape: tuple[int, int, int]

    @property
    def violations(self) -> int:
        """How many pairs there are of an output and an input at or after it that it sees. A causal model has none."""
        return int(self.matrix.triu().sum())

    @property
    def causal(self) -> int:
        """How many pairs there are of an output and an input before it that it sees."""
        return int(self.matrix.tril(-1).sum())

    @property
    def possible(self) -> int:
        """How many such pairs there could be: P (P - 1) / 2."""
        count = len(self.matrix)
        return count * (count - 1) // 2

    @property
    def missing(self) -> list[tuple[tuple[int, int, int], tuple[int, int, int]]]:
        """The pairs there could be and are not: (row, column, colour) of the output, and of the input it misses."""
        absent = (~self.matrix).tril(-1).nonzero().tolist()
        return [(self.position(i), self.position(j)) for i, j in absent]

    def position(self, place: int) -> tuple[int, int, int]:
        """Row, column and colour of the place-th position."""
        colours, _, width = self.shape
        return place // colours // width, place // colours % width, place % colours

    def seen_from(self, row: int, column: int, colour: int = 0) -> Tensor:
        """What one output sees: (C, H, W) of bool."""
        colours, height, width = self.shape
        seen = self.matrix[(row * width + column) * colours + colour]
        return seen.view(height, width, colours).movedim(2, 0)


def dependencies(
    model: nn.Module, shape: tuple[int, int, int], condition: Tensor | None = None, inputs: int = 4, seed: int = 0
) -> Dependencies:
    """The pattern of a model's Jacobian, found by gradients at a few random inputs.

    An entry counts if it is not zero at any of the inputs: units that are switched off at one may be on at another.

    Args:
        model: maps (N, C, H, W) to (N, C K, H, W), grouped by colour, for any K.
        shape: (C, H, W). The model sees C H W images, some at a time, forwards and backwards.
        condition: one row, for a model that is conditioned.
        inputs: how many random inputs to try.
        seed: of the inputs.

    Raises:
        ValueError: when the model returns something else.
    """
    colours, height, width = shape
    count = colours * height * width
    weight = next(model.parameters())
    random = torch.Generator().manual_seed(seed)
    found = torch.zeros(count, count, dtype=torch.bool)
    with evaluating(model):
        for _ in range(inputs):
            image = torch.rand(shape, generator=random, dtype=torch.float64).to(weight)
            for places in torch.arange(count).split(_AT_ONCE):
                # One image for each output: a single backward pass then gives as many rows of the Jacobian.
                x = image.expand(len(places), *shape).clone().requires_grad_()
                out = model(x) if condition is None else model(x, condition.expand(len(places), *condition.shape[1:]))
                outputs = _by_position(out, shape)[range(len(places)), places]  # (rows, K)
                mix = torch.randn(outputs.size(1), generator=random, dtype=torch.float64)  # so that none cancel out
                (gradient,) = torch.autograd.grad((outputs @ mix.to(outputs)).sum(), x)
                found[places] |= (gradient.movedim(1, 3).flatten(1) != 0).cpu()
    return Dependencies(found, (colours, height, width))


@dataclass(frozen=True)
class Leak:
    """A place where something is seen too early: what the perturbed position changed, and in which layer first."""

    layer: str
    perturbed: tuple[int, int, int]
    changed: tuple[int, int, int]


def spread_places(shape: tuple[int, int, int], start: int = 0, count: int = 8) -> list[int]:
    """Positions of an image (C, H, W): its middle in all colours, which can look in all directions, and others."""
    colours, height, width = shape
    middle = (height // 2 * width + width // 2) * colours
    total = colours * height * width
    others = [(start * 7919 + k * total // count) % total for k in range(count)]  # a prime: others for each start
    return list(dict.fromkeys([*range(middle, middle + colours), *others]))


@torch.no_grad()
def find_leak(
    model: nn.Module, image: Tensor, condition: Tensor | None = None, places: list[int] | None = None
) -> Leak | None:
    """Change an image at one position after another and look whether an output at or before it changes.

    Costs one forward pass of a batch of ``len(places) + 1`` images, and draws no random numbers.

    Args:
        model: as in :func:`dependencies`.
        image: (1, C, H, W).
        condition: one row, for a model that is conditioned.
        places: positions to change, in the order of the making; by default :func:`spread_places`.

    Returns:
        None, or the first leak, with the innermost layer whose output has it.
    """
    shape = image.shape[1:]
    colours, _, width = shape
    places = spread_places(shape) if places is None else places
    batch = image.expand(len(places) + 1, *shape).clone()
    for example, place in enumerate(places, 1):
        pixel, colour = divmod(place, colours)
        batch[example, colour, pixel // width, pixel % width] += 1
    condition = None if condition is None else condition.expand(len(batch), *condition.shape[1:])

    leaks: list[Leak] = []

    def look(name: str):
        def hook(layer: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
            output = output[-1] if isinstance(output, tuple) else output  # of two stacks, the horizontal one
            fits = isinstance(output, Tensor) and output.dim() == 4 and output.shape[2:] == shape[1:]
            if fits and output.size(1) % colours == 0 and not getattr(layer, "sees_its_row", False):
                changed = _first_change(_by_position(output, shape), places)
                if changed is not None:
                    leaks.append(Leak(f"{name or 'model'} ({type(layer).__name__})", *map(position, changed)))

        return hook

    def position(place: int) -> tuple[int, int, int]:
        return place // colours // width, place // colours % width, place % colours

    # Layers without parameters may stand before the first masked one, where the image itself passes.
    seen = [(name, layer) for name, layer in model.named_modules() if any(True for _ in layer.parameters())]
    handles = [layer.register_forward_hook(look(name)) for name, layer in seen]
    try:
        with evaluating(model):
            model(batch) if condition is None else model(batch, condition)
    finally:
        for handle in handles:
            handle.remove()
    # What a layer saw too early a later one may ignore: what counts is what the model tells.
    told = bool(leaks) and leaks[-1].layer.startswith("model (")
    return leaks[0] if told else None


def _first_change(output: Tensor, places: list[int]) -> tuple[int, int] | None:
    """Which position was perturbed, and the first at or before it at which an output changed: output (1 + N, P, K)."""
    change = (output[1:] - output[:1]).abs().amax(2)
    for place, row in zip(places, change, strict=True):
        # Some algorithms for convolutions mix neighbours and take them out again: more than their rounding counts.
        early = (row[: place + 1] > 1e-4 * row.max()).nonzero()
        if len(early):
            return place, int(early[0])
    return None


def _by_position(out: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """(N, C K, H, W) as (N, P, K), positions in the order of the making."""
    colours, height, width = shape
    if out.dim() != 4 or out.size(1) % colours or tuple(out.shape[2:]) != (height, width):
        raise ValueError(f"for an image {tuple(shape)} the model returned {tuple(out.shape)}, not (N, C K, H, W)")
    return out.unflatten(1, (colours, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode, and afterwards each of its modules in the mode it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
