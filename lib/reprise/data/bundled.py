"""Real data that ships inside scikit-learn and scikit-image: no download, the same on every machine."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Labelled(NamedTuple):
    """``images`` (N, C, H, W) in [0, 1]; ``labels`` (N,)."""

    images: Tensor
    labels: Tensor


class Stereo(NamedTuple):
    """``left``, ``right`` (1, 3, H, W) in [0, 1]; ``disparity`` (1, 1, H, W) in pixels, infinite where unknown."""

    left: Tensor
    right: Tensor
    disparity: Tensor


def choose(split: str, sizes: dict[str, int], seed: int = 0) -> Tensor:
    """Indices of a split: a fixed random order of all examples, cut into pieces of the given sizes."""
    order = torch.randperm(sum(sizes.values()), generator=torch.Generator().manual_seed(seed))
    pieces = dict(zip(sizes, order.split(list(sizes.values())), strict=True))
    return torch.cat([pieces[name] for name in parse_split(split, sizes)])


def parse_split(split: str, known: Collection[str]) -> list[str]:
    """The splits meant by names joined by ``+``, or by ``all``.

    Raises:
        ValueError: for a split that is not among the known ones, or is named twice.
    """
    wanted = list(known) if split == "all" else split.split("+")
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"no split {unknown[0]!r}; there are {', '.join(known)}, joined by + or all")
    if twice := [name for name in wanted if wanted.count(name) > 1]:
        raise ValueError(f"split {twice[0]} is named twice in {split!r}")
    return wanted


def only_all(split: str) -> None:
    if split != "all":
        raise ValueError(f"no split {split!r}: this dataset has none, leave the split out")


def digits(split: str) -> Labelled:
    """Handwritten digits, 8x8 grey, 10 classes; splits train 1,000, valid 297, test 500."""
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = choose(split, {"train": 1000, "valid": 297, "test": 500})
    images = torch.tensor(data.images[:, None] / 16, dtype=torch.float32)
    return Labelled(images[chosen], torch.tensor(data.target, dtype=torch.long)[chosen])


def faces_small(split: str) -> Labelled:
    """Grey patches of 25x25; label 1 is a face, 0 is not; splits train 140, valid 20, test 40."""
    from skimage.data import lfw_subset

    images = torch.tensor(lfw_subset()[:, None], dtype=torch.float32)
    labels = (torch.arange(len(images)) < 100).long()  # the file holds the faces first
    chosen = choose(split, {"train": 140, "valid": 20, "test": 40})
    return Labelled(images[chosen], labels[chosen])


def photos(split: str) -> dict[str, Tensor]:
    """Colour photographs by name, each (1, 3, H, W) in [0, 1]; no splits."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    only_all(split)
    china, flower = load_sample_images().images
    pictures = {
        "astronaut": data.astronaut(),
        "cat": data.chelsea(),
        "china": china,
        "coffee": data.coffee(),
        "flower": flower,
        "rocket": data.rocket(),
    }
    return {name: _picture(picture) for name, picture in pictures.items()}


def stereo(split: str) -> Stereo:
    """Two photographs of a motorcycle from cameras side by side, with measured disparities; no splits."""
    from skimage.data import stereo_motorcycle

    only_all(split)
    left, right, disparity = stereo_motorcycle()
    return Stereo(_picture(left), _picture(right), torch.tensor(disparity, dtype=torch.float32)[None, None])


def _picture(array: np.ndarray) -> Tensor:
    return torch.tensor(np.asarray(array)).permute(2, 0, 1)[None].float() / 255
