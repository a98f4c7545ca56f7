"""The loop's tools: seeds, batches, and ``train``, which hides everything about a training but the training.

for step in train("plain", 2000, model, optimizer, batches, seed=seed):
    images, labels = next(batches)
    ...
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import checkpoints
from .invariants import InvariantError, NotFinite, Watch, declare, is_checked
from .progress import Silent, display, sweep

__all__ = [
    "Batches",
    "InvariantError",
    "accuracy",
    "declare",
    "pick_device",
    "seed_everything",
    "spawn_seeds",
    "sweep",
    "train",
]


def seed_everything(seed: int, *names: str) -> None:
    """Seed Python's, NumPy's and torch's generators from a seed and, if given, the name of what comes next."""
    words = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") for name in names]
    python, numpy, pytorch = np.random.SeedSequence([seed, *words]).generate_state(3)
    random.seed(int(python))
    np.random.seed(int(numpy))  # noqa: NPY002 (libraries below us still draw from the global generator)
    torch.manual_seed(int(pytorch))


def spawn_seeds(seed: int, count: int) -> list[int]:
    """``count`` independent seeds made from one, the same ones every time."""
    return [int(child.generate_state(1)[0]) for child in np.random.SeedSequence(seed).spawn(count)]


def pick_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device if there is one, else the CPU; other names are torch's.

    Raises:
        ValueError: for a name torch does not know, or a device this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # there, and able to compute
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here ({reason}); choose auto or cpu") from None
    return device


class Batches:
    """Endless shuffled batches of some tensors, each example once per epoch; a last incomplete batch is left out.

    The order comes from torch's global generator, which ``train`` seeds.

    Args:
        *tensors: tensors of the same length N along their first dimension.
        size: examples per batch, at most N.
    """

    def __init__(self, *tensors: Tensor, size: int):
        lengths = {len(tensor) for tensor in tensors}
        if len(lengths) != 1:
            raise ValueError(f"the tensors have different lengths: {sorted(lengths)}")
        if not 1 <= size <= len(tensors[0]):
            raise ValueError(f"a batch of {size} cannot be drawn from {len(tensors[0])} examples")
        self.tensors, self.size = tensors, size
        self.order, self.position = torch.empty(0, dtype=torch.long), 0

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return self

    def __next__(self) -> tuple[Tensor, ...]:
        if self.position + self.size > len(self.order):
            self.order, self.position = torch.randperm(len(self.tensors[0])), 0
        chosen = self.order[self.position : self.position + self.size]
        self.position += self.size
        return tuple(tensor[chosen.to(tensor.device)] for tensor in self.tensors)

    def state_dict(self) -> dict:
        return {"order": self.order, "position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.order, self.position = state["order"], state["position"]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose largest output is at their label, the model in evaluation mode meanwhile."""
    was_training = model.training
    model.eval()
    correct = (model(images).argmax(1) == labels).float().mean().item()
    model.train(was_training)
    return correct


class Training:
    """One named training: iterate over it for the steps, ``log`` values on the way, read ``curves`` afterwards.

    ``diverged_at`` is the step whose loss was no longer finite, or None.
    """

    _FETCH_EVERY = 64

    def __init__(self, name: str, steps: int, parts: tuple, seed: int, may_diverge: bool, quiet: bool):
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"training {name!r}: steps is {steps!r}, but must be a whole number of at least 1")
        for part in parts:
            if not hasattr(part, "state_dict"):
                raise TypeError(f"training {name!r}: a {type(part).__name__} has no state_dict")
        self.name, self.steps, self.parts, self.seed = name, steps, parts, seed
        self.may_diverge, self.quiet = may_diverge, quiet
        self.step = 0
        self.diverged_at: int | None = None
        self._seconds_before = 0.0  # spent on it before it was interrupted
        self._curves: dict[str, tuple[list[int], list[float]]] = {}
        self._pending: dict[str, list[float | Tensor]] = {}  # logged, but not yet fetched from the device

    def __iter__(self) -> Iterator[int]:
        watch = Watch([part for part in self.parts if isinstance(part, nn.Module)])
        seed_everything(self.seed, self.name)
        self._curves, self._pending, self.diverged_at, self._seconds_before = {}, {}, None, 0.0
        checkpoint = checkpoints.path_for(self.name, self.seed, self.steps)
        first = self._resume(checkpoint)
        shown = (Silent if self.quiet else display)(self.name, self.steps, first)
        saved = started = time.monotonic()
        try:
            for step in range(first, self.steps):
                self.step = step
                checked = is_checked(step)
                if checked:
                    watch.attach(step)
                yield step
                # Before the parameters are looked at: a loss that is not finite is at fault for theirs.
                if checked or step % self._FETCH_EVERY == 0 or step == self.steps - 1:
                    shown.values(self._fetch())
                if checked:
                    watch.detach()
                    watch.check(step)
                shown.advance(step + 1)
                if checkpoint is not None and self._is_due(step, saved, started):
                    saved = time.monotonic()
                    self._save(checkpoint, saved - started)
        except NotFinite as error:
            self.diverged_at = error.step
            if not self.may_diverge:
                raise
        finally:
            watch.detach()
            shown.close()
            # What comes next must not depend on how many random numbers this training used.
            seed_everything(self.seed, self.name, "after")

    def log(self, **values: float | Tensor) -> None:
        """Record values, numbers or tensors, at the current step; one named ``loss`` must stay finite."""
        for name, value in values.items():
            self._curves.setdefault(name, ([], []))[0].append(self.step)
            self._pending.setdefault(name, []).append(value.detach() if isinstance(value, Tensor) else value)

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The steps at which ``name`` was logged, and its values."""
        if name not in self._curves:
            logged = ", ".join(self._curves) or "nothing"
            raise KeyError(f"training {self.name!r} logged no {name!r}; it logged {logged}")
        with contextlib.suppress(NotFinite):
            self._fetch()
        steps, values = self._curves[name]
        return np.array(steps), np.array(values)

    def _is_due(self, step: int, saved: float, started: float) -> bool:
        """Whether to save after a step: now and then, and at the end of all but the shortest trainings, which are
        as quickly done again."""
        interval, now = checkpoints.seconds_between(), time.monotonic()
        return now - saved > interval or (step == self.steps - 1 and now - started > interval / 10)

    def _save(self, path: Path, seconds: float) -> None:
        self._fetch()
        state = {
            "step": self.step,
            "seconds": self._seconds_before + seconds,
            "parts": [part.state_dict() for part in self.parts],
            "curves": {
                name: (steps, torch.tensor(values, dtype=torch.float64))
                for name, (steps, values) in self._curves.items()
            },
            "random": checkpoints.random_state(),
        }
        # A training is worth more than its checkpoint: a full disk shows where results are written.
        with contextlib.suppress(OSError):
            checkpoints.save(path, state)

    def _resume(self, path: Path | None) -> int:
        """Go back to where an interrupted run was, if there is a checkpoint; the first step still to do."""
        state = checkpoints.load(path) if path else None
        if state is None:
            return 0
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        self._curves = {name: (steps, values.tolist()) for name, (steps, values) in state["curves"].items()}
        checkpoints.restore_random_state(state["random"])
        self._seconds_before = checkpoints.resumed[self.name] = state["seconds"]
        self.step = state["step"]
        return self.step + 1

    def _fetch(self) -> dict[str, float]:
        """Move pending values into the curves, many at once since each fetch waits for the device; the newest."""
        first_bad = None
        for name, pending in self._pending.items():
            steps, values = self._curves[name]
            known = len(values)
            if pending:
                numbers = (x if isinstance(x, Tensor) else torch.as_tensor(x, dtype=torch.float64) for x in pending)
                values += torch.stack(list(numbers)).cpu().double().tolist()
            pending.clear()
            if name == "loss":
                first_bad = next((i for i in range(known, len(values)) if not math.isfinite(values[i])), None)
        if first_bad is not None:
            steps, values = self._curves["loss"]
            step = steps[first_bad]
            raise NotFinite(f"training {self.name!r}: the loss is {values[first_bad]} at step {step}", step)
        return {name: values[-1] for name, (_, values) in self._curves.items() if isinstance(values[-1], float)}


def train(name: str, steps: int, *parts, seed: int = 0, may_diverge: bool = False, quiet: bool = False) -> Training:
    """Iterate over the steps of one training, with progress shown and invariants checked.

    The training seeds all generators from (seed, name) when it starts and again when it ends, so that neither it
    nor what follows depends on what ran before.

    Args:
        name: names the training in its notebook; different trainings need different names.
        steps: number of steps, at least 1.
        *parts: everything that changes while training and has a ``state_dict``: models, optimisers, batches.
            The invariants declared at models among them are checked.
        seed: see above.
        may_diverge: stop when the loss is no longer finite, instead of raising.
        quiet: show no progress, for one of many short trainings inside a :func:`sweep`.

    Raises:
        InvariantError: naming layer or loss, step and value, when a declared invariant is violated.
    """
    return Training(name, steps, parts, seed, may_diverge, quiet)
