"""Letters rendered from the fonts that matplotlib ships, with attributes known because we chose them."""

from __future__ import annotations

import string
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .bundled import choose

SIZE = 24
FAMILIES = ("sans", "serif", "mono", "times")
_FONTS = {  # (family, bold, italic) -> file
    ("sans", 0, 0): "DejaVuSans",
    ("sans", 1, 0): "DejaVuSans-Bold",
    ("sans", 0, 1): "DejaVuSans-Oblique",
    ("sans", 1, 1): "DejaVuSans-BoldOblique",
    ("serif", 0, 0): "DejaVuSerif",
    ("serif", 1, 0): "DejaVuSerif-Bold",
    ("serif", 0, 1): "DejaVuSerif-Italic",
    ("serif", 1, 1): "DejaVuSerif-BoldItalic",
    ("mono", 0, 0): "DejaVuSansMono",
    ("mono", 1, 0): "DejaVuSansMono-Bold",
    ("mono", 0, 1): "DejaVuSansMono-Oblique",
    ("mono", 1, 1): "DejaVuSansMono-BoldOblique",
    ("times", 0, 0): "STIXGeneral",
    ("times", 1, 0): "STIXGeneralBol",
    ("times", 0, 1): "STIXGeneralItalic",
    ("times", 1, 1): "STIXGeneralBolIta",
}
_VARIANTS = {"train": 16, "valid": 2, "test": 2}  # of each letter in each font


class Letters(NamedTuple):
    """``images`` (N, 1, 24, 24), ink 1 on paper 0; ``labels`` 0 for A to 25 for Z; ``family`` an index into
    FAMILIES; ``bold`` and ``italic`` 0 or 1. All but the images are shaped (N,)."""

    images: Tensor
    labels: Tensor
    family: Tensor
    bold: Tensor
    italic: Tensor


def letters(split: str) -> Letters:
    """Capital letters in 16 fonts, slightly resized, turned and shifted; train 6,656, valid 832, test 832."""
    everything = _render()
    copies = len(_FONTS) * len(string.ascii_uppercase)
    chosen = choose(split, {name: count * copies for name, count in _VARIANTS.items()})
    return Letters(*(field[chosen] for field in everything))


@cache
def _render() -> Letters:
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    random = np.random.default_rng(0)
    images, attributes = [], []
    for (family, bold, italic), file in _FONTS.items():
        font = ImageFont.truetype(folder / f"{file}.ttf", 4 * 19, layout_engine=ImageFont.Layout.BASIC)
        for label, letter in enumerate(string.ascii_uppercase):
            for _ in range(sum(_VARIANTS.values())):
                images.append(_draw(letter, font, random))
                attributes.append((label, FAMILIES.index(family), bold, italic))
    pictures = torch.tensor(np.stack(images), dtype=torch.float32)[:, None] / 255
    return Letters(pictures, *torch.tensor(attributes).unbind(1))


def _draw(letter: str, font: ImageFont.FreeTypeFont, random: np.random.Generator) -> np.ndarray:
    """One letter, drawn four times too large and shrunk, so that its edges are smooth."""
    side = 4 * SIZE
    canvas = Image.new("L", (side, side))
    ImageDraw.Draw(canvas).text((side / 2, side / 2), letter, fill=255, font=font, anchor="mm")
    angle = np.radians(random.uniform(-6, 6))
    scale = random.uniform(0.95, 1.2)  # of the source coordinates: above 1 shrinks the letter
    shift_x, shift_y = random.uniform(-4, 4, size=2)
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    middle = side / 2
    turned = canvas.transform(
        (side, side),
        Image.Transform.AFFINE,
        (cos, -sin, middle - cos * middle + sin * middle + shift_x,
         sin, cos, middle - sin * middle - cos * middle + shift_y),
        Image.Resampling.BILINEAR,
    )  # fmt: skip
    return np.asarray(turned.resize((SIZE, SIZE), Image.Resampling.BOX))
