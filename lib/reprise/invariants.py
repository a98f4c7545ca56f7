"""What must stay true of a network while it learns, declared at the layer and checked during training.

    declare(model.hidden[1], mean=(-5, 5), saturated=(0, 0.9))
    declare(pixelcnn, causal=True)
    for step in train("plain", 2000, model, optimizer): ...

A violation stops the training with an error that names layer, step and value. Checks run at steps 0, 1, 2, 4,
8, ... and then at every 128th, so that they cost less than 3 % of a step however small the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .causality import find_leak, spread_places

EVERY = 128


class InvariantError(RuntimeError):
    """Something declared about a network, or about its loss, stopped being true during training."""


class NotFinite(InvariantError):
    """A loss or a parameter became infinite or not a number, at ``step``."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


def _saturated(output: Tensor) -> Tensor:
    # For units between 0 and 1 (sigmoids); a unit within 1 % of either end passes almost no gradient.
    return ((output < 0.01) | (output > 0.99)).float().mean()


def _per_channel(output: Tensor) -> Tensor:
    return output.movedim(1, 0).flatten(1) if output.dim() > 1 else output[None]


# Each takes a layer's output of shape (N, C, ...) and returns one or more numbers, all of which must lie in range.
STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda output: _per_channel(output).mean(1),
    "variance": lambda output: _per_channel(output).var(1, correction=0),
    "saturated": _saturated,
    "range": lambda output: torch.stack([output.min(), output.max()]),
}


def declare(layer: nn.Module, *, causal: bool = False, **ranges: tuple[float, float]) -> nn.Module:
    """Declare what must hold for a layer whenever it is trained; declaring again replaces.

    Args:
        layer: any module whose output is a tensor of shape (N, C, ...).
        causal: that no output depends on its own pixel or a later one, in raster order, colours last; for a model that
            is given images (N, C, H, W) and, perhaps, a condition. Checked by changing a few pixels of one image: a
            likelihood that gets better because the answer leaks into the question stops the training.
        **ranges: (lowest, highest) allowed for ``mean`` and ``variance`` (of every channel of the output),
            ``saturated`` (share of outputs within 1 % of 0 or 1), ``range`` (of all outputs) or
            ``gradient`` (Euclidean norm of the gradient of the layer's parameters).

    Returns:
        The layer, so that it can be declared where it is built.

    Raises:
        ValueError: for a statistic of another name, or a range whose ends are swapped.
    """
    for name, (low, high) in ranges.items():
        if name not in STATISTICS and name != "gradient":
            raise ValueError(f"no statistic {name!r}; there are {', '.join([*STATISTICS, 'gradient'])}")
        if not low <= high:
            raise ValueError(f"{name}: the range ({low}, {high}) is empty")
    layer._declared, layer._causal = dict(ranges), causal
    return layer


def is_checked(step: int) -> bool:
    """Whether a step is one of those at which invariants are computed."""
    return step % EVERY == 0 or (step < EVERY and step & (step - 1) == 0)


class Watch:
    """Checks the declared layers of some models at one step after another."""

    def __init__(self, models: list[nn.Module]):
        self.models = models
        # Pairs, since layers of two models may have the same name.
        self.layers = [
            (f"{name or 'model'} ({type(layer).__name__})", layer)
            for model in models
            for name, layer in model.named_modules()
            if hasattr(layer, "_declared")
        ]
        self._handles: list = []

    def attach(self, step: int) -> None:
        """Have this step's forward pass seen."""
        self._handles = [layer.register_forward_hook(self._checker(name, step)) for name, layer in self.layers]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def check(self, step: int) -> None:
        """Check what only the end of a step shows: gradients, and parameters that are numbers."""
        for name, layer in self.layers:
            gradients = [p.grad.norm() for p in layer.parameters() if p.grad is not None]
            if "gradient" in layer._declared and gradients:
                _require(name, step, "gradient", torch.stack(gradients).norm(), layer._declared["gradient"])
        for name, parameter in self._parameters():
            if not math.isfinite(parameter.detach().sum()):
                raise NotFinite(f"{name} is no longer finite after step {step}", step)

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        for model in self.models:
            yield from model.named_parameters()

    def _checker(self, name: str, step: int) -> Callable:
        def check(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
            if not layer.training:
                return  # an evaluation between two steps
            if layer._causal:
                _require_causal(name, layer, step, *inputs)
            for statistic, allowed in layer._declared.items():
                if statistic != "gradient":
                    _require(name, step, statistic, STATISTICS[statistic](output.detach()), allowed)

        return check


def _require(layer: str, step: int, statistic: str, values: Tensor, allowed: tuple[float, float]) -> None:
    low, high = allowed
    lowest, highest = values.min().item(), values.max().item()
    if not (low <= lowest and highest <= high):  # written so that NaN fails, too
        worst = highest if highest > high or math.isnan(highest) else lowest
        raise InvariantError(
            f"{layer} at step {step}: {statistic} is {worst:.4g}, declared to stay between {low:g} and {high:g}"
        )


def _require_causal(name: str, model: nn.Module, step: int, images: Tensor, condition: Tensor | None = None) -> None:
    places = spread_places(images.shape[1:], start=step)
    leak = find_leak(model, images[:1].detach(), None if condition is None else condition[:1], places)
    if leak is not None:
        layer = leak.layer if leak.layer.startswith("model (") else f"layer {leak.layer}"
        raise InvariantError(
            f"{name} at step {step}: {layer} sees what is still to come: changing the input at (row, column, colour) "
            f"{leak.perturbed} changes its output at {leak.changed}"
        )
