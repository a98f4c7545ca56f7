"""Figures as they are saved: small, and still the same picture."""

from __future__ import annotations

import io
import json

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import pytest
import torch

from reprise import figures


@pytest.mark.parametrize("colour", ["0.5", "tab:orange"])
def test_fewer_bytes_are_the_same_pixels(colour):
    figure, axis = plt.subplots(figsize=(2, 2))
    axis.plot([1, 2, 0], color=colour)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    small = figures._small(buffer.getvalue())
    assert len(small) < len(buffer.getvalue())
    before, after = (np.asarray(PIL.Image.open(io.BytesIO(png)).convert("RGB")) for png in (buffer.getvalue(), small))
    np.testing.assert_array_equal(after, before)
    assert (PIL.Image.open(io.BytesIO(small)).mode == "L") == (colour == "0.5")


def test_a_run_keeps_picture_and_words(tmp_path, monkeypatch):
    monkeypatch.setattr(figures.run, "folder", lambda: tmp_path)
    figure, axis = plt.subplots(figsize=(2, 2))
    axis.plot([1, 2, 0])
    figures.save(figure, "line", "A line that rises and falls")
    with PIL.Image.open(tmp_path / "figures" / "line.png") as picture:
        assert picture.format == "PNG"
    assert json.loads((tmp_path / "figures" / "line.json").read_text()) == {"alt": "A line that rises and falls"}
    assert not plt.fignum_exists(figure.number)


def test_photographs_in_fewer_colours(tmp_path, monkeypatch):
    monkeypatch.setattr(figures.run, "folder", lambda: tmp_path)
    noise = np.random.default_rng(0).random((200, 200, 3))
    for name, colours in (("all", None), ("few", 64)):
        figure, axis = plt.subplots(figsize=(2, 2))
        axis.imshow(noise)
        figures.save(figure, name, "Noise", colours=colours)
    whole, few = (tmp_path / "figures" / f"{name}.png" for name in ("all", "few"))
    assert few.stat().st_size < whole.stat().st_size / 2
    assert len(PIL.Image.open(few).convert("RGB").getcolors(100_000)) <= 64


def test_a_run_keeps_a_picture_pixel_for_pixel(tmp_path, monkeypatch):
    image = torch.rand(1, 3, 5, 7)
    monkeypatch.setattr(figures.run, "folder", lambda: None)
    figures.keep(image, "picture")  # without a run nothing is written
    monkeypatch.setattr(figures.run, "folder", lambda: tmp_path)
    figures.keep(image, "picture")
    with PIL.Image.open(tmp_path / "picture.png") as picture:
        np.testing.assert_allclose(np.asarray(picture) / 255, image[0].permute(1, 2, 0), atol=0.5 / 255 + 1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
