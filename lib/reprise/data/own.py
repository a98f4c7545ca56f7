"""The reader's own pictures, and flows measured for them: files of any place, named on a command line."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

from .files import DataError

_FLO_MAGIC = 202021.25  # the bytes "PIEH" as a little-endian float
_UNKNOWN = 1e9  # Middlebury: a flow larger than this is not known


class Pair(NamedTuple):
    """``left``, ``right`` (1, 3, H, W) in [0, 1]; ``flow`` (1, 2, H, W) in pixels, infinite where unknown, or None."""

    left: Tensor
    right: Tensor
    flow: Tensor | None


def read_picture(path: str | Path, longest: int | None = None) -> Tensor:
    """A picture of any common format as colours, shape (1, 3, H, W), values 0 to 1.

    It is turned upright as its EXIF tag says. Grey, palettes, CMYK and 16 bits of grey become colours; what is
    transparent lies on white.

    Args:
        path: the file.
        longest: a picture with a longer side than this is reduced to it, which also bounds the memory needed.

    Raises:
        DataError: if the file is missing or no picture.
    """
    picture = _opened(path)
    if longest is not None and max(picture.size) > longest:
        scale = longest / max(picture.size)
        size = [max(1, round(side * scale)) for side in picture.size]
        picture = picture.resize(size, PIL.Image.Resampling.LANCZOS)
    return torch.tensor(np.asarray(picture)).permute(2, 0, 1)[None].float() / 255


def picture_size(path: str | Path) -> tuple[int, int]:
    """Width and height of a picture, upright, in pixels; all of it is read.

    Raises:
        DataError: as :func:`read_picture`.
    """
    return _opened(path).size


def _opened(path: str | Path) -> PIL.Image.Image:
    """A picture as RGB of 8 bits, upright."""
    try:
        with warnings.catch_warnings(), PIL.Image.open(path) as picture:
            warnings.simplefilter("ignore")  # of large pictures and odd tags; errors come as errors
            picture = PIL.ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):  # 16 bits of grey, of which Pillow would keep the dark ones
                grey = np.asarray(picture).astype(np.float64) / 257
                picture = PIL.Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                ground = PIL.Image.new("RGBA", picture.size, "white")
                picture = PIL.Image.alpha_composite(ground, picture)
            return picture.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as a picture ({error})") from None


def read_flow(path: str | Path) -> Tensor:
    """A flow field, shape (1, 2, H, W), dx before dy in pixels, infinite where it is not known.

    Two formats: Middlebury's ``.flo``, and KITTI's png of 16 bits and three channels (64 times the flow plus 2^15,
    and whether it is known).

    Raises:
        DataError: if the file is missing, damaged, or of another format.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = "there is no file" if isinstance(error, FileNotFoundError) else error.strerror
        raise DataError(f"{reason} {path}" if "no file" in reason else f"{path}: {reason}") from None
    flow = _from_kitti(path, content) if content.startswith(b"\x89PNG") else _from_flo(path, content)
    return torch.from_numpy(np.ascontiguousarray(flow.transpose(2, 0, 1)))[None]


def read_pair(left: str | Path, right: str | Path, truth: str | Path | None = None) -> Pair:
    """Two pictures of the same size and, where it is known, the flow from the first to the second.

    Raises:
        DataError: as above, or if the sizes differ.
    """
    pair = Pair(read_picture(left), read_picture(right), None if truth is None else read_flow(truth))
    sizes = [f"{one.shape[3]}x{one.shape[2]}" for one in pair if one is not None]
    if len(set(sizes)) > 1:
        names = "the pictures differ in size" if sizes[0] != sizes[1] else "the flow has another size than the pictures"
        raise DataError(f"{names}: {', '.join(sizes)} pixels")
    return pair


def _from_flo(path: Path, content: bytes) -> np.ndarray:
    if len(content) < 12 or struct.unpack("<f", content[:4])[0] != _FLO_MAGIC:
        raise DataError(f"{path} is no flow: neither a .flo file nor a png as KITTI writes them")
    width, height = struct.unpack("<ii", content[4:12])
    if width < 1 or height < 1 or len(content) != 12 + 8 * width * height:
        raise DataError(f"{path} is damaged: {len(content)} bytes do not make a flow of {width}x{height} pixels")
    flow = np.frombuffer(content, "<f4", offset=12).reshape(height, width, 2).astype(np.float32)
    unknown = ~(np.abs(flow) <= _UNKNOWN).all(2, keepdims=True)  # not-a-number included
    return np.where(unknown, np.float32(np.inf), flow)


def _from_kitti(path: Path, content: bytes) -> np.ndarray:
    # Pillow keeps 8 of the 16 bits of a colour png without a word.
    try:
        width, height, bits, colours, _, _, interlaced = struct.unpack(">IIBBBBB", content[16:29])
        if (bits, colours, interlaced) != (16, 2, 0):
            raise DataError(f"{path} is no flow: KITTI's png has three channels of 16 bits")
        lines = _unfiltered(zlib.decompress(_png_data(content)), height, 6 * width)
    except (struct.error, zlib.error, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    image = lines.view(">u2").reshape(height, width, 3)
    flow = (image[:, :, :2].astype(np.float32) - 2**15) / 64
    return np.where(image[:, :, 2:] > 0, flow, np.float32(np.inf))


def _png_data(content: bytes) -> bytes:
    """The compressed data of a png: the content of its IDAT chunks, one after another."""
    position, data = 8, b""
    while position < len(content):
        length, kind = struct.unpack(">I4s", content[position : position + 8])
        if kind == b"IDAT":
            data += content[position + 8 : position + 8 + length]
        position += length + 12
    return data


def _unfiltered(data: bytes, height: int, width: int) -> np.ndarray:
    """The lines of a png as bytes (height, width). Each was stored as its difference from a guess, by one of five
    filters (ISO/IEC 15948, section 9); a pixel has six bytes."""
    filtered = np.frombuffer(data, np.uint8).reshape(height, width + 1)
    lines = np.zeros((height + 1, width + 6), np.uint8)  # nothing stands above the first line and left of a line
    for above, line, (kind, *rest) in zip(lines, lines[1:], filtered.tolist(), strict=False):
        if kind in (0, 2):
            line[6:] = np.array(rest, np.uint8) + (above[6:] if kind else 0)
        elif kind == 1:
            line[6:] = np.array(rest, np.uint8).reshape(-1, 6).cumsum(0, dtype=np.uint8).ravel()
        elif kind in (3, 4):
            line[:] = _guessed_from_both(rest, above.tolist(), average=kind == 3)
        else:
            raise ValueError(f"a line of its picture has filter {kind}")
    return np.ascontiguousarray(lines[1:, 6:])


def _guessed_from_both(rest: list[int], above: list[int], average: bool) -> list[int]:
    line = [0] * 6
    for i, difference in enumerate(rest, 6):
        a, b, c = line[i - 6], above[i], above[i - 6]
        # Without the average it is Paeth's: whichever is nearest to a + b - c, ties in this order.
        guess = (a + b) // 2 if average else min((a, b, c), key=lambda one: abs(a + b - c - one))
        line.append((difference + guess) % 256)
    return line
