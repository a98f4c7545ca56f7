"""One look for all figures: legible at 700 pixels, safe for colour-blind readers, never without a text alternative."""

from __future__ import annotations

import io
import json
import logging
import time

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
from IPython.display import Image, display

from . import progress, run

# Okabe & Ito's palette, which stays apart under every common colour blindness. Ours is what the paper proposes.
BLUE, ORANGE, GREEN, PINK, SKY, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#6B6B6B"
COLOURS = {"ours": BLUE, "without": RED, "other": GREEN}

STYLE = {
    "figure.figsize": (7, 3.4),
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.prop_cycle": mpl.cycler(color=[BLUE, RED, GREEN, ORANGE, PINK, SKY, GREY]),
    "lines.linewidth": 2,
    "legend.frameon": False,
    "image.cmap": "gray",
    "image.interpolation": "nearest",
}


mpl.rcParams.update(STYLE)
# On a new machine matplotlib makes a list of fonts, and warns in red if that takes a while.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)


def show_images(axes, images, columns: int, gap: int = 1) -> None:
    """Draw a batch of images of shape (N, C, H, W), values 0 to 1, as one sheet of tiles."""
    images = np.asarray(images.detach().cpu() if hasattr(images, "detach") else images).clip(0, 1)
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    sheet = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap, channels))
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    axes.imshow(sheet.squeeze(-1) if channels == 1 else sheet, vmin=0, vmax=1)
    axes.set_axis_off()


def _small(png: bytes, colours: int | None = None) -> bytes:
    """The same pixels in fewer bytes: sheets of grey samples are half as large without colours. Or, with ``colours``,
    nearly the same ones, dithered unless that takes half as many bytes again."""
    picture = PIL.Image.open(io.BytesIO(png)).convert("RGB")
    if colours is not None:
        flat = picture.quantize(colours, kmeans=2)
        plain, dithered = (_png(one) for one in (flat, picture.quantize(palette=flat)))
        return dithered if len(dithered) < 1.5 * len(plain) else plain
    red, green, blue = np.moveaxis(np.asarray(picture), 2, 0)
    grey = bool((red == green).all() and (green == blue).all())
    return _png(picture.convert("L") if grey else picture)


def _png(picture: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def save(figure, name: str, alt: str, colours: int | None = None) -> None:
    """Show a figure with its text alternative and, during a run, keep it in the run's ``figures`` folder.

    Args:
        figure: a matplotlib figure; it is closed afterwards.
        name: file name without ending.
        alt: what a reader who cannot see the picture needs to know of it.
        colours: at most 256; a figure full of photographs, reduced to so many, takes a third of the bytes.

    Raises:
        ValueError: if ``alt`` is empty.
    """
    if not alt.strip():
        raise ValueError(f"figure {name!r} needs an alt text: what does it show?")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    picture = _small(buffer.getvalue(), colours)
    if place := run.folder():
        folder = place / "figures"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.png").write_bytes(picture)
        (folder / f"{name}.json").write_text(json.dumps({"alt": alt}), encoding="utf-8")
    display(Image(picture, format="png", alt=alt))


def keep(image, name: str) -> None:
    """During a run, write a picture pixel for pixel as ``<name>.png`` into the run's folder; elsewhere do nothing.

    Args:
        image: a tensor (1, 3, H, W), values 0 to 1.
        name: file name without ending.
    """
    if place := run.folder():
        (place / f"{name}.png").write_bytes(_png(_pixels(image)))


def _pixels(image) -> PIL.Image.Image:
    array = image[0].detach().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    return PIL.Image.fromarray(array)


class Growing:
    """A picture shown in Lab while it is being made, in one place, anew each second; elsewhere it shows nothing.

    Args:
        alt: its text alternative.
    """

    def __init__(self, alt: str):
        self.alt = alt
        self._shown, self._at = None, 0.0

    def show(self, image) -> None:
        """Show a tensor (1, 3, H, W), values 0 to 1, if a second has passed."""
        if not progress.is_watched() or time.monotonic() - self._at < 1:
            return
        buffer = io.BytesIO()
        _pixels(image).save(buffer, "PNG")
        picture = Image(buffer.getvalue(), format="png", alt=self.alt)
        if self._shown is None:
            self._shown = display(picture, display_id=True)
        else:
            self._shown.update(picture)
        self._at = time.monotonic()
