"""The papers' own datasets, read from files that :mod:`reprise.data.files` has checked."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile

import numpy as np
import torch
from torch import Tensor

from .bundled import Labelled, only_all, parse_split
from .files import obtain, obtain_all
from .own import read_picture

_VALID = 10_000  # held out of the training images of mnist and fashion_mnist, as is usual


def mnist(split: str, name: str = "mnist") -> Labelled:
    """Handwritten digits, 28x28 grey; splits train 50,000, valid 10,000 (of the original 60,000), test 10,000."""
    files = obtain_all(name)
    parts = {}
    for part, prefix in (("learn", "train"), ("test", "t10k")):
        images = _idx(files[f"{prefix}-images-idx3-ubyte.gz"])
        labels = _idx(files[f"{prefix}-labels-idx1-ubyte.gz"])
        parts[part] = images.float()[:, None] / 255, labels.long()
    images, labels = parts["learn"]
    pieces = {
        "train": (images[:-_VALID], labels[:-_VALID]),
        "valid": (images[-_VALID:], labels[-_VALID:]),
        "test": parts["test"],
    }
    return _joined(pieces, split)


def fashion_mnist(split: str) -> Labelled:
    """Pictures of clothing, 28x28 grey, 10 classes; splits as mnist."""
    return mnist(split, "fashion_mnist")


def cifar10(split: str) -> Labelled:
    """Small photographs, 32x32 colour, 10 classes; splits train 45,000, valid 5,000, test 10,000."""
    archive = obtain("cifar10", "cifar-10-python.tar.gz")
    parts = {}
    with tarfile.open(archive) as tar:
        for batch in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
            # A pickle, as its authors publish it; nothing but the archive whose sha256 we know gets here.
            content = pickle.load(tar.extractfile(f"cifar-10-batches-py/{batch}"), encoding="bytes")
            pixels = torch.from_numpy(content[b"data"]).view(-1, 3, 32, 32).float() / 255
            parts[batch] = pixels, torch.tensor(content[b"labels"])
    images = torch.cat([parts[batch][0] for batch in list(parts)[:5]])
    labels = torch.cat([parts[batch][1] for batch in list(parts)[:5]])
    pieces = {
        "train": (images[:-5000], labels[:-5000]),
        "valid": (images[-5000:], labels[-5000:]),
        "test": parts["test_batch"],
    }
    return _joined(pieces, split)


def cifar10_subset(split: str) -> Labelled:
    """The first 10,000 training and 1,000 test images of CIFAR-10; splits train 9,000, valid 1,000, test 1,000."""
    files = obtain_all("cifar10_subset")
    parts = {}
    for part in ("train", "test"):
        labels = torch.from_numpy(np.load(io.BytesIO(files[f"{part}_labels.npy"].read_bytes()))).long()
        sheets = [_tiles(path) for file, path in sorted(files.items()) if file.startswith(f"{part}_0")]
        parts[part] = torch.cat(sheets)[: len(labels)], labels
    images, labels = parts["train"]
    pieces = {
        "train": (images[:-1000], labels[:-1000]),
        "valid": (images[-1000:], labels[-1000:]),
        "test": parts["test"],
    }
    return _joined(pieces, split)


def paintings(split: str) -> dict[str, Tensor]:
    """Paintings by name, each (1, 3, H, W) in [0, 1]; no splits."""
    return _pictures("paintings", split)


def kodak(split: str) -> dict[str, Tensor]:
    """Photographs by name, each (1, 3, H, W) in [0, 1]; no splits."""
    return _pictures("kodak", split)


def _pictures(name: str, split: str) -> dict[str, Tensor]:
    only_all(split)
    return {path.stem: read_picture(path) for path in obtain_all(name).values()}


def _joined(pieces: dict[str, tuple[Tensor, Tensor]], split: str) -> Labelled:
    wanted = [pieces[name] for name in parse_split(split, pieces)]
    return Labelled(*(torch.cat(fields) for fields in zip(*wanted, strict=True)))


def _idx(path) -> Tensor:
    """The IDX format of MNIST: two zero bytes, a type (8: unsigned byte), the number of dimensions, their sizes."""
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3]
    sizes = np.frombuffer(content, dtype=">i4", count=dimensions, offset=4)
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dimensions)
    return torch.from_numpy(values.reshape(sizes).copy())


def _tiles(path) -> Tensor:
    """A sheet of 32x32 tiles, 40 to a row, as (N, 3, 32, 32)."""
    from einops import rearrange
    from PIL import Image

    with Image.open(path) as sheet:
        pixels = torch.from_numpy(np.asarray(sheet.convert("RGB")).copy())
    return rearrange(pixels, "(row h) (column w) c -> (row column) c h w", h=32, w=32).float() / 255
