"""An interrupted training goes on from its checkpoint, bit for bit, or starts anew where there is none to trust."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reprise import checkpoints, figures, progress
from reprise.training import Batches, seed_everything, train

IMAGES, LABELS = torch.rand(90, 8, generator=torch.Generator().manual_seed(1)), torch.arange(90) % 3
STEPS = 25


class Interrupted(Exception):
    pass


class Attempt:
    """One kernel's attempt at a training: everything is made anew, as when a notebook is run from the top."""

    def __init__(self, stop_at: int | None = None, name: str = "a", seed: int = 0, steps: int = STEPS):
        seed_everything(0)
        self.model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Sigmoid(), nn.Linear(6, 3))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.05)
        self.batches = Batches(IMAGES, LABELS, size=40)
        self.done: list[int] = []
        self.run = train(name, steps, self.model, self.optimizer, self.batches, seed=seed)
        try:
            for step in self.run:
                if step == stop_at:
                    raise Interrupted
                self.learn(step)
        except Interrupted:
            return
        self.after = random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    def learn(self, step: int) -> None:
        images, labels = next(self.batches)
        noise = random.random() * torch.randn_like(images) + np.random.rand()  # noqa: NPY002 (all three generators)
        loss = F.cross_entropy(self.model(images + noise), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.run.log(loss=loss, step=step)
        self.done.append(step)

    def trained(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}


def same(one: Attempt, other: Attempt) -> bool:
    curves = all(np.array_equal(one.run.curve(name), other.run.curve(name)) for name in ("loss", "step"))
    weights = [torch.equal(value, other.trained()[name]) for name, value in one.trained().items()]
    return curves and all(weights) and one.after == other.after


@pytest.fixture(scope="module")
def uninterrupted() -> Attempt:
    return Attempt()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A run's folder in which every step is saved."""
    monkeypatch.setenv("REPRISE_RUN", str(tmp_path))
    monkeypatch.delenv("REPRISE_OWNER", raising=False)
    monkeypatch.setenv("REPRISE_CHECKPOINT_SECONDS", "0")
    return tmp_path


def saved(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("*"))


@pytest.mark.parametrize("stop_at", [1, 2, 17, STEPS - 1])
def test_an_interrupted_training_goes_on_bit_for_bit(folder, uninterrupted, stop_at):
    first = Attempt(stop_at)
    assert first.done == list(range(stop_at))
    second = Attempt()
    assert second.done == list(range(stop_at, STEPS))
    assert same(second, uninterrupted)


def test_a_finished_training_is_skipped(folder, uninterrupted):
    Attempt()
    again = Attempt()
    assert again.done == []
    assert same(again, uninterrupted)
    assert again.run.step == STEPS - 1


def test_nothing_is_saved_outside_of_a_run(folder, monkeypatch, uninterrupted):
    monkeypatch.delenv("REPRISE_RUN")
    assert checkpoints.path_for("a", 0, STEPS) is None
    assert same(Attempt(), uninterrupted)
    assert list(folder.iterdir()) == []


def test_short_trainings_are_not_saved(folder, monkeypatch):
    monkeypatch.setenv("REPRISE_CHECKPOINT_SECONDS", "60")
    Attempt()
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize("other", [{"name": "b"}, {"seed": 1}, {"steps": STEPS + 1}])
def test_another_training_has_another_checkpoint(folder, other):
    Attempt(stop_at=5)
    attempt = Attempt(**other)
    assert attempt.done[0] == 0
    assert len(saved(folder)) == 2


DAMAGES = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "empty": lambda path: path.write_bytes(b""),
    "another format": lambda path: path.write_text("{}", encoding="utf-8"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_like_none(folder, uninterrupted, damage):
    Attempt(stop_at=5)
    (path,) = saved(folder)
    damage(path)
    second = Attempt()
    assert second.done[0] == 0
    assert same(second, uninterrupted)


def test_a_checkpoint_that_cannot_be_written_does_not_stop_a_training(folder, uninterrupted):
    (folder / "checkpoints").write_text("in the way", encoding="utf-8")
    assert same(Attempt(), uninterrupted)


def test_only_the_owner_of_a_folder_writes_to_it(folder, monkeypatch):
    monkeypatch.setenv("REPRISE_OWNER", "me")
    (folder / "owner").write_text("me", encoding="utf-8")
    Attempt(stop_at=3)
    shown = progress.display("b", 3)
    (folder / "owner").write_text("somebody else", encoding="utf-8")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    writes = [
        Attempt,
        shown.write,
        lambda: checkpoints.save(saved(folder)[0], {"step": 1}),
        lambda: figures.save(figures.plt.figure(), "a", "nothing to see"),
    ]
    for write in writes:
        with pytest.raises(RuntimeError, match="its folder belongs to another run now"):
            write()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_anything_nested_survives(tmp_path):
    state = {
        "tensors": [torch.arange(3), (torch.ones(2, 2, dtype=torch.bfloat16), torch.empty(0))],
        3: {"numbers": (1, 2.5, -0.0, float("inf")), "none": None, "truth": True, "text": "größer"},
        "numpy": [np.float64(0.1), np.int64(7)],
    }
    path = tmp_path / "checkpoints" / "a.safetensors"
    checkpoints.save(path, state)
    loaded = checkpoints.load(path)
    assert torch.equal(loaded["tensors"][0], state["tensors"][0])
    assert torch.equal(loaded["tensors"][1][0], state["tensors"][1][0])
    assert (loaded["tensors"][1][0].dtype, loaded["tensors"][1][1].shape) == (torch.bfloat16, (0,))
    assert (loaded[3], loaded["numpy"]) == (state[3], [0.1, 7])
    with pytest.raises(TypeError, match="cannot hold a set"):
        checkpoints.save(path, {"a": {1}})
    assert checkpoints.load(path)[3] == state[3], "the earlier one is still there"
    assert checkpoints.load(tmp_path / "none.safetensors") is None
