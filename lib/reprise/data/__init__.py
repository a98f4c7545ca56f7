"""Named datasets to tensors.

    images, labels = load("digits", "train")

What each is, where it comes from and its licence stand in ``data/datasets.yaml``; ``describe`` reads it.
"""

from __future__ import annotations

import hashlib

from torch import Tensor

from . import bundled, docstrings, downloads, letters
from .files import DataError, at_hand, descriptions, obtain_all
from .own import read_pair, read_picture

__all__ = [
    "DataError",
    "at_hand",
    "describe",
    "descriptions",
    "load",
    "loaded",
    "obtain_all",
    "read_pair",
    "read_picture",
]

_LOADERS = {
    "digits": bundled.digits,
    "photos": bundled.photos,
    "faces_small": bundled.faces_small,
    "stereo": bundled.stereo,
    "letters": letters.letters,
    "docstrings": docstrings.docstrings,
    "mnist": downloads.mnist,
    "fashion_mnist": downloads.fashion_mnist,
    "cifar10": downloads.cifar10,
    "cifar10_subset": downloads.cifar10_subset,
    "paintings": downloads.paintings,
    "kodak": downloads.kodak,
}

# Checksums of what this process loaded, for the record of a run: {"digits/train": sha256}.
loaded: dict[str, str] = {}


def load(name: str, split: str = "all"):
    """Load a dataset as tensors.

    Images are float32 between 0 and 1, shaped (N, C, H, W), words uint8 of 0 or 1, shaped (N, words); labels are
    int64, shaped (N,).

    Args:
        name: ``digits``, ``letters``, ``docstrings``, ``faces_small``, ``photos`` and ``stereo`` are always there;
            ``mnist``, ``fashion_mnist`` and ``cifar10`` are downloaded or taken from a mirror; ``cifar10_subset``,
            ``paintings`` and ``kodak`` come from a mirror only; ``describe(name)`` tells more.
        split: ``train``, ``valid``, ``test``, or several joined by ``+``; ``all`` for data without splits.

    Returns:
        A named tuple, whose fields are in the loader's docstring; for ``photos``, ``paintings`` and ``kodak`` a dict of
        pictures.

    Raises:
        ValueError: for an unknown name or split, listing those there are.
        DataError: if a file is neither at hand nor can be downloaded; nothing else is used in its place.
    """
    if name not in _LOADERS:
        raise ValueError(f"no dataset {name!r}; there are {', '.join(_LOADERS)}")
    data = _LOADERS[name](split)
    loaded[f"{name}/{split}"] = _checksum(data)
    return data


def describe(name: str) -> dict:
    """What a dataset is: ``title``, ``source``, ``licence``, ``size``, ``splits``."""
    try:
        return descriptions()[name]
    except KeyError:
        raise ValueError(f"no dataset {name!r}; there are {', '.join(descriptions())}") from None


def _checksum(data) -> str:
    digest = hashlib.sha256()
    fields = data.values() if isinstance(data, dict) else data
    for field in fields:
        if isinstance(field, Tensor):
            digest.update(str(tuple(field.shape)).encode() + field.contiguous().numpy().tobytes())
    return digest.hexdigest()
