"""Pictures and flows from files of the reader's own."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from reprise.data import DataError, read_pair
from reprise.data.own import read_flow, read_picture


def flo(flow: np.ndarray) -> bytes:
    """Middlebury's format, from (H, W, 2)."""
    return struct.pack("<fii", 202021.25, flow.shape[1], flow.shape[0]) + flow.astype("<f4").tobytes()


def filtered(lines: np.ndarray, kind: int) -> np.ndarray:
    """Lines of bytes (H, 6 W) as one of the five filters of png stores them."""
    padded = np.pad(lines.astype(int), ((1, 0), (6, 0)))
    a, b, c = padded[1:, :-6], padded[:-1, 6:], padded[:-1, :-6]
    p = a + b - c
    nearest = np.abs(np.stack([p - a, p - b, p - c])).argmin(0)
    guess = [0 * a, a, b, (a + b) // 2, np.choose(nearest, [a, b, c])][kind]
    return ((lines - guess) % 256).astype(np.uint8)


def png16(image: np.ndarray, kind: int = 0) -> bytes:
    """A png of 16 bits from (H, W, 3), all lines with one filter; Pillow cannot write one."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    raw = np.frombuffer(image.astype(">u2").tobytes(), np.uint8).reshape(len(image), -1)
    lines = b"".join(bytes([kind]) + line.tobytes() for line in filtered(raw, min(kind, 4)))
    header = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("ending", ["png", "ppm", "jpg", "gif", "bmp"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pictures_of_common_formats(tmp_path, ending, mode):
    array = np.full((4, 6, 3), (51, 51, 51), dtype=np.uint8)
    array[:, 3:] = 204
    Image.fromarray(array).convert(mode).save(tmp_path / f"one.{ending}")
    picture = read_picture(tmp_path / f"one.{ending}")
    assert picture.shape == (1, 3, 4, 6)
    assert picture.dtype == torch.float32
    torch.testing.assert_close(picture[0, :, 2, [0, 5]], torch.tensor([0.2, 0.8]).expand(3, 2), atol=0.03, rtol=0)


def test_a_flo_file(tmp_path):
    flow = np.arange(24, dtype=np.float32).reshape(3, 4, 2)
    flow[0, 1] = 1e10  # unknown, as Middlebury marks it
    flow[2, 3, 0] = np.nan
    (tmp_path / "one.flo").write_bytes(flo(flow))
    read = read_flow(tmp_path / "one.flo")
    assert read.shape == (1, 2, 3, 4)
    assert read[0, :, 1, 0].tolist() == [8, 9]
    assert read.isinf().nonzero().tolist() == [[0, 0, 0, 1], [0, 0, 2, 3], [0, 1, 0, 1], [0, 1, 2, 3]]


def test_a_png_of_kitti(tmp_path):
    image = np.zeros((2, 3, 3), dtype=np.uint16)
    image[0, 1] = 2**15 + 64 * 5, 2**15 - 32, 1
    image[1, 2] = 65535, 1, 1
    (tmp_path / "one.png").write_bytes(png16(image))
    read = read_flow(tmp_path / "one.png")
    assert read.shape == (1, 2, 2, 3)
    assert read[0, :, 0, 1].tolist() == [5, -0.5]
    assert read[0, :, 1, 2].tolist() == [(65535 - 2**15) / 64, (1 - 2**15) / 64]
    assert int(read.isinf().sum()) == 2 * 4


@pytest.mark.parametrize("kind", range(5))
def test_every_filter_of_png(tmp_path, kind):
    torch.manual_seed(kind)
    image = torch.randint(0, 2**16, (5, 4, 3)).numpy()
    image[..., 2] = 1
    (tmp_path / "one.png").write_bytes(png16(image, kind))
    expected = torch.tensor((image[..., :2] - 2**15) / 64, dtype=torch.float32).permute(2, 0, 1)
    assert torch.equal(read_flow(tmp_path / "one.png")[0], expected)


def test_a_pair(tmp_path):
    for name in ("left.png", "right.png"):
        Image.new("RGB", (4, 3)).save(tmp_path / name)
    (tmp_path / "truth.flo").write_bytes(flo(np.zeros((3, 4, 2))))
    paths = [tmp_path / name for name in ("left.png", "right.png", "truth.flo")]
    assert read_pair(*paths[:2]).flow is None
    assert [tuple(one.shape) for one in read_pair(*paths)] == [(1, 3, 3, 4), (1, 3, 3, 4), (1, 2, 3, 4)]
    Image.new("RGB", (4, 5)).save(paths[1])
    with pytest.raises(DataError, match="the pictures differ in size: 4x3, 4x5"):
        read_pair(*paths[:2])
    with pytest.raises(DataError, match="the flow has another size than the pictures: 4x5, 4x5, 4x3"):
        read_pair(paths[1], paths[1], paths[2])


GOOD_PNG = png16(np.zeros((2, 3, 3), dtype=np.uint16))
BAD_FLOWS = {
    "empty": (b"", "is no flow: neither"),
    "text": (b"not a flow at all", "is no flow: neither"),
    "cut short": (flo(np.zeros((3, 4, 2)))[:-1], "is damaged: 107 bytes do not make a flow of 4x3 pixels"),
    "impossible": (struct.pack("<fii", 202021.25, -4, -3), "is damaged: 12 bytes"),
    "huge": (struct.pack("<fii", 202021.25, 2**31 - 1, 2**31 - 1), "is damaged: 12 bytes"),
    "png cut short": (GOOD_PNG[:50], "is damaged"),
    "head of a png": (GOOD_PNG[:20], "is damaged"),
    "png without its end": (GOOD_PNG[:41], "is damaged"),
    "png of another filter": (png16(np.zeros((2, 3, 3), dtype=np.uint16), 5), "is damaged: a line of its picture has"),
}


@pytest.mark.parametrize("name", BAD_FLOWS)
def test_what_is_no_flow_is_refused_in_one_line(tmp_path, name):
    content, said = BAD_FLOWS[name]
    (tmp_path / "flow").write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_flow(tmp_path / "flow")
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_missing_files_and_folders(tmp_path):
    for read in (read_flow, read_picture):
        with pytest.raises(DataError, match="there is no file"):
            read(tmp_path / "none")
        with pytest.raises(DataError, match=tmp_path.name):
            read(tmp_path)
