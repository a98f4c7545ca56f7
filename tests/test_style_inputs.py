"""A reader's own pictures on their way to ``style_transfer``: every mode gives the right colours, and what cannot be
used is refused in one line before anything runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reprise import figures, progress
from reprise.data.own import picture_size, read_picture
from reprise.lab.checkout import Checkout
from reprise.lab.errors import BadInput
from reprise.lab.parameters import Photograph, Pixels, parse_cell, parse_options

CHECKOUT = Path(__file__).resolve().parents[1]
RED, BLUE = (204, 51, 51), (51, 51, 204)


def halves(mode: str = "RGB") -> Image.Image:
    """Red on the left, blue on the right, 40 x 20 pixels."""
    array = np.empty((20, 40, 3), dtype=np.uint8)
    array[:, :20], array[:, 20:] = RED, BLUE
    return Image.fromarray(array).convert(mode)


def colours_of(tensor: torch.Tensor) -> list[list[int]]:
    """The colours in the middle of the left and of the right half, 0 to 255."""
    height, width = tensor.shape[2:]
    return [(255 * tensor[0, :, height // 2, width * n // 4]).round().int().tolist() for n in (1, 3)]


@pytest.mark.parametrize(
    ("mode", "ending", "within"),
    [("RGB", "png", 0), ("P", "png", 3), ("CMYK", "jpg", 12), ("CMYK", "tif", 0), ("YCbCr", "jpg", 12)],
)
def test_colours_survive_every_mode(tmp_path, mode, ending, within):
    halves(mode).save(tmp_path / f"one.{ending}")
    read = read_picture(tmp_path / f"one.{ending}")
    assert read.shape == (1, 3, 20, 40)
    for found, expected in zip(colours_of(read), (RED, BLUE), strict=True):
        assert max(abs(f - e) for f, e in zip(found, expected, strict=True)) <= within


@pytest.mark.parametrize("mode", ["L", "LA", "1", "I;16"])
def test_grey_becomes_three_equal_colours(tmp_path, mode):
    array = np.zeros((20, 40), dtype=np.uint16 if mode == "I;16" else np.uint8)
    array[:, 20:] = 65535 if mode == "I;16" else 255
    picture = Image.fromarray(array)
    (picture if mode == "I;16" else picture.convert(mode)).save(tmp_path / "grey.png")
    assert colours_of(read_picture(tmp_path / "grey.png")) == [[0, 0, 0], [255, 255, 255]]


def test_sixteen_bits_of_grey_keep_their_middle(tmp_path):
    Image.fromarray(np.full((20, 40), 128 * 257, dtype=np.uint16)).save(tmp_path / "grey.png")
    assert colours_of(read_picture(tmp_path / "grey.png"))[0] == [128, 128, 128]


@pytest.mark.parametrize("palette", [False, True])
def test_what_is_transparent_lies_on_white(tmp_path, palette):
    if palette:
        picture = halves("P")
        picture.info["transparency"] = picture.getpixel((30, 10))
        picture.save(tmp_path / "one.png", transparency=picture.info["transparency"])
    else:
        picture = halves("RGBA")
        picture.paste((51, 51, 204, 0), (20, 0, 40, 20))
        picture.save(tmp_path / "one.png")
    left, right = colours_of(read_picture(tmp_path / "one.png"))
    assert right == [255, 255, 255]
    assert max(abs(f - e) for f, e in zip(left, RED, strict=True)) <= 3


def test_exif_turns_a_picture_upright(tmp_path):
    upright = halves()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: what is stored has to be turned clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert Image.open(tmp_path / "turned.png").size == (20, 40)
    assert picture_size(tmp_path / "turned.png") == (40, 20)
    assert colours_of(read_picture(tmp_path / "turned.png")) == [list(RED), list(BLUE)]


def test_a_large_picture_is_reduced_where_it_is_read(tmp_path):
    halves().resize((4000, 2000)).save(tmp_path / "large.jpg")
    assert read_picture(tmp_path / "large.jpg", longest=300).shape == (1, 3, 150, 300)
    halves().save(tmp_path / "small.png")
    assert read_picture(tmp_path / "small.png", longest=300).shape == (1, 3, 20, 40)


DECLARED = parse_cell("content: Photograph | None = None\nsize: Pixels | None = None")


def test_a_size_is_a_number_within_bounds(tmp_path):
    assert parse_options(DECLARED, (("size", "512"),)) == {"size": 512}
    assert parse_options(DECLARED, (("size", "none"),)) == {"size": None}
    for text in ("63", "2049", "large", "-512", "12.5", "1e9"):
        with pytest.raises(BadInput, match=r"parameter size: .* is not a whole number from 64 to 2048 or none$"):
            parse_options(DECLARED, (("size", text),))
    assert DECLARED["size"].check(512) == 512
    for value in (20, True, 512.0, "512"):
        with pytest.raises(BadInput):
            DECLARED["size"].check(value)
    assert issubclass(Pixels, int)


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (15, 15)])
def test_a_picture_too_thin_to_look_at_is_refused(tmp_path, monkeypatch, size):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", size).save("thin.png")
    with pytest.raises(BadInput, match=rf"parameter content: thin\.png has {size[0]}x{size[1]} pixels, but needs 16"):
        parse_options(DECLARED, (("content", "thin.png"),))
    Image.new("RGB", (16, 16)).save("enough.png")
    assert isinstance(parse_options(DECLARED, (("content", "enough.png"),))["content"], Photograph)


REFUSED = [  # options, what the one line says
    (("content", "text.jpg"), "parameter content: text.jpg cannot be read as a picture"),
    (("style", "missing.png"), "parameter style: there is no file missing.png"),
    (("style", "thin.png"), "parameter style: thin.png has 1x2000 pixels, but needs 16 on either side at least"),
    (("content", "cut.png"), "parameter content: cut.png cannot be read as a picture"),
    (("size", "9"), "parameter size: 9 is not a whole number from 64 to 2048 or none"),
    (("network", "vgg16"), "parameter network: 'vgg16' is not reprise or squeezenet or vgg19 or none"),
]


@pytest.mark.skipif("style_transfer" not in Checkout.find().names(), reason="no notebook style_transfer")
@pytest.mark.parametrize(("option", "said"), REFUSED, ids=[f"{name}-{text}" for (name, text), _ in REFUSED])
def test_bad_input_is_one_line_with_status_2_and_no_folder(tmp_path, reprise, option, said):
    (tmp_path / "text.jpg").write_text("not a picture", encoding="utf-8")
    Image.new("RGB", (1, 2000)).save(tmp_path / "thin.png")
    halves().save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    name, text = option
    value = str(tmp_path / text) if name in ("content", "style") else text
    told = reprise(CHECKOUT, "run", "style_transfer", "-p", name, value, "--out", str(tmp_path / "out"))
    assert told.returncode == 2, told.stdout + told.stderr
    assert said in told.stderr.replace(str(tmp_path) + "/", "")
    assert len(told.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


class Handle:
    """What IPython's ``display`` gives back."""

    def __init__(self):
        self.updates = 0

    def update(self, picture):
        self.updates += 1


def test_a_growing_picture_shows_in_lab_and_nowhere_else(tmp_path, monkeypatch):
    shown, now = [], [100.0]
    handle = Handle()
    monkeypatch.setattr(figures, "display", lambda picture, display_id: shown.append(picture) or handle)
    monkeypatch.setattr(figures.time, "monotonic", lambda: now[0])
    image = torch.rand(1, 3, 8, 8)

    figures.Growing("A picture.").show(image)  # in a test nobody watches
    assert shown == []
    monkeypatch.setattr(progress, "_in_notebook", lambda: True)
    monkeypatch.delenv("PYTEST_VERSION", raising=False)
    monkeypatch.setattr(progress.run, "folder", lambda: tmp_path)
    figures.Growing("A picture.").show(image)  # under the runner
    assert shown == []

    monkeypatch.setattr(progress.run, "folder", lambda: None)
    easel = figures.Growing("A picture.")
    for seconds in (0, 0.5, 1.0, 1.2, 2.5):
        now[0] = 100 + seconds
        easel.show(image)
    assert len(shown) == 1
    assert handle.updates == 2
    assert shown[0].alt == "A picture."
