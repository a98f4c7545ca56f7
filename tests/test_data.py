"""Named datasets: shapes, ranges, splits, what is said of them, and what is recorded when they are loaded."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from reprise import data, features
from reprise.data import DataError, describe, descriptions, docstrings, files, load
from reprise.data.letters import FAMILIES, letters

CLASSES = {"digits": 10, "letters": 26, "faces_small": 2, "mnist": 10, "fashion_mnist": 10, "cifar10_subset": 10}
SIZES = {
    "digits": (1, 8, 8),
    "letters": (1, 24, 24),
    "faces_small": (1, 25, 25),
    "mnist": (1, 28, 28),
    "fashion_mnist": (1, 28, 28),
    "cifar10_subset": (3, 32, 32),
}
BUNDLED = [name for name, facts in descriptions().items() if "in" in facts]
MIRROR = Path(os.environ.get("REPRISE_MIRROR", "")).expanduser()  # before tests hide it
LABELLED = [pytest.param(name, marks=[] if name in BUNDLED else pytest.mark.mirror) for name in CLASSES]


def rows(images: torch.Tensor) -> list[bytes]:
    return [hashlib.sha256(image.numpy().tobytes()).digest() for image in images]


@pytest.mark.parametrize("name", LABELLED)
def test_labelled_images(name):
    if "files" in describe(name) and not data.at_hand(name):
        pytest.skip(f"the mirror has no {name}")
    splits = describe(name)["splits"]
    parts = {split: load(name, split) for split in splits}
    for split, part in parts.items():
        assert part.images.shape == (splits[split], *SIZES[name])
        assert (part.images.dtype, part.labels.dtype) == (torch.float32, torch.int64)
        assert part.images.min() >= 0
        assert part.images.max() <= 1
        assert part.images.max() > 0.9, "not the whole range is used: scaled twice?"
        assert part.labels.shape == (splits[split],)
        assert set(part.labels.tolist()) == set(range(CLASSES[name]))
        # No class is so rare that a split says nothing of it.
        assert part.labels.bincount().min() > 0.3 * splits[split] / CLASSES[name]
    whole = load(name)
    assert sorted(rows(whole.images)) == sorted(row for part in parts.values() for row in rows(part.images))
    joined = load(name, "train+valid")
    assert torch.equal(joined.images, torch.cat([parts["train"].images, parts["valid"].images]))
    assert torch.equal(joined.labels, torch.cat([parts["train"].labels, parts["valid"].labels]))


@pytest.mark.parametrize(("name", "share"), [("digits", 0), ("letters", 0.01)])
def test_splits_have_no_picture_in_common(name, share):
    """But for the rare chance that a letter is turned and shifted alike twice."""
    train, test = (set(rows(load(name, split).images)) for split in ("train", "test"))
    assert len(train & test) <= share * len(test)


@pytest.mark.parametrize("name", BUNDLED)
def test_loading_again_gives_the_same(name):
    first, second = load(name), load(name)
    first, second = (list(part.values()) if isinstance(part, dict) else list(part) for part in (first, second))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_another_process_loads_the_same():
    program = (
        "from reprise import data; data.load('digits', 'train'); data.load('letters', 'valid'); print(data.loaded)"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    load("digits", "train"), load("letters", "valid")
    assert eval(told) == {name: data.loaded[name] for name in ("digits/train", "letters/valid")}


def test_generators_are_left_alone():
    state = torch.get_rng_state()
    letters.__globals__["_render"].cache_clear()
    load("digits", "train"), load("letters", "test")
    assert torch.equal(torch.get_rng_state(), state)


def test_checksums_are_recorded(monkeypatch):
    monkeypatch.setattr(data, "loaded", {})
    load("digits", "train"), load("digits", "test"), load("photos")
    assert list(data.loaded) == ["digits/train", "digits/test", "photos/all"]
    assert all(len(checksum) == 64 for checksum in data.loaded.values())
    assert len(set(data.loaded.values())) == 3


def test_photos():
    pictures = load("photos")
    assert sorted(pictures) == ["astronaut", "cat", "china", "coffee", "flower", "rocket"]
    for picture in pictures.values():
        assert picture.shape[:2] == (1, 3)
        assert min(picture.shape[2:]) >= 300
        assert picture.dtype == torch.float32
        assert 0 <= picture.min() < 0.1
        assert 0.9 < picture.max() <= 1


def test_stereo_disparities_lead_from_one_view_to_the_other():
    left, right, disparity = load("stereo")
    assert left.shape == right.shape == (1, 3, 500, 741)
    assert disparity.shape == (1, 1, 500, 741)
    known = disparity.isfinite()
    assert 0.9 < known.float().mean() < 1
    assert disparity[known].min() > 5
    row, column = known[0, 0].nonzero(as_tuple=True)
    moved = (column - disparity[0, 0, row, column].round().long()).clamp(min=0)

    def difference(columns: torch.Tensor) -> float:
        return (left[0, :, row, column] - right[0, :, row, columns]).abs().mean().item()

    assert difference(moved) < 0.5 * difference(column)


def test_faces_look_alike_and_the_rest_does_not():
    faces = load("faces_small")
    spread = [faces.images[faces.labels == label].std(0).mean() for label in (0, 1)]
    assert spread[1] < 0.8 * spread[0]


def test_docstrings_are_sparse_bags_of_real_words():
    parts = {split: load("docstrings", split) for split in describe("docstrings")["splits"]}
    assert [len(part.labels) for part in parts.values()] == [2000, 300, 500]
    everything = load("docstrings")
    assert everything.words.shape == (2800, 5000)
    assert (everything.words.dtype, everything.labels.dtype) == (torch.uint8, torch.int64)
    assert everything.labels.bincount().tolist() == [700] * 4
    assert everything.words.max() == 1
    assert everything.words.sum(0).min() >= 1, "a word that no document has"
    assert 30 < everything.words.sum(1).float().mean() < 150
    # The most frequent words come first: most documents have the first, few have the last.
    frequency = everything.words.sum(0, dtype=torch.int64)
    assert torch.equal(frequency, frequency.sort(descending=True).values)


def test_docstrings_can_be_told_apart_but_not_by_a_name():
    """By one word, a document's package is guessed far worse than by all of them."""
    everything, train, test = load("docstrings"), load("docstrings", "train"), load("docstrings", "test")
    classes = torch.nn.functional.one_hot(everything.labels).float()
    shares = classes.T @ everything.words.float() / 700
    best_word = (shares.max(0).values + 1 - (shares.sum(0) - shares.max(0).values) / 3).max() / 2
    assert best_word < 0.9, "one word gives the package away"
    means = torch.stack([train.words[train.labels == label].float().mean(0) for label in range(4)])
    rates = (means + 0.01).log(), (1.01 - means).log()
    score = test.words.float() @ rates[0].T + (1 - test.words.float()) @ rates[1].T
    assert (score.argmax(1) == test.labels).float().mean() > 0.6


def test_a_package_with_too_few_docstrings_is_named(monkeypatch):
    monkeypatch.setattr(docstrings, "_EACH", 10**6)
    with pytest.raises(DataError, match=r"numpy has \d+ docstrings .* 1000000 are needed"):
        docstrings._sample("numpy")
    with pytest.raises(DataError, match="no_such_package, which is not installed"):
        docstrings._sample("no_such_package")


def test_letters_are_what_their_attributes_say():
    everything = load("letters")
    assert len(FAMILIES) == 4
    ink = everything.images.mean((1, 2, 3))
    across = torch.arange(24.0) - 11.5
    mass = everything.images[:, 0]
    # Upper half further to the right than the lower: negative slope of the centre of ink over the rows.
    centre = (mass * across).sum(2) / mass.sum(2).clamp(min=1e-6)
    lean = centre[:, 6:12].mean(1) - centre[:, 12:18].mean(1)

    def average(of: torch.Tensor, family: int, bold: int, italic: int) -> float:
        return of[(everything.family == family) & (everything.bold == bold) & (everything.italic == italic)].mean()

    for family, other in itertools.product(range(4), range(2)):
        assert average(ink, family, 1, other) > 1.15 * average(ink, family, 0, other)
        assert average(lean, family, other, 1) > average(lean, family, other, 0) + 0.5
    # Of each letter there are as many pictures, in each font as well.
    assert set(everything.labels.bincount().tolist()) == {320}
    fonts = everything.family * 4 + everything.bold * 2 + everything.italic
    assert set(fonts.bincount().tolist()) == {520}
    # Nothing is cut off at the border.
    border = torch.cat([mass[:, 0], mass[:, -1], mass[:, :, 0], mass[:, :, -1]], 1)
    assert (border.amax(1) > 0.5).float().mean() < 0.01
    assert ink[everything.labels == ord("M") - 65].mean() > 1.3 * ink[everything.labels == ord("I") - 65].mean()


@pytest.mark.parametrize(
    ("name", "split", "said"),
    [
        ("digist", "train", "no dataset 'digist'; there are digits, photos"),
        ("digits", "trian", "no split 'trian'; there are train, valid, test, joined by"),
        ("digits", "train+", "no split ''; there are train"),
        ("digits", "train+train", "split train is named twice"),
        ("letters", "test+all", "no split 'all'"),
        ("photos", "train", "no split 'train': this dataset has none"),
        ("stereo", "test", "no split 'test': this dataset has none"),
    ],
)
def test_unknown_names_and_splits_are_refused(name, split, said):
    with pytest.raises(ValueError, match=said):
        load(name, split)
    with pytest.raises(ValueError, match="no dataset 'digist'; there are digits"):
        describe("digist")


def test_datasets_yaml_says_everything():
    for name, facts in descriptions().items():
        assert {"title", "source", "licence", "size"} <= facts.keys(), name
        assert ("in" in facts) != ("files" in facts), f"{name} is either in a package or a list of files"
        known = "title kind source licence size splits in files urls folder tracked otherwise"
        assert facts.keys() <= set(known.split())
        for file in facts.get("files", {}):
            assert all(re.fullmatch("[0-9a-f]{64}", checksum) for checksum in files._checksums(name, file))
        assert facts.get("kind", "weights") == "weights"
        assert "tracked" not in facts or "urls" not in facts
    assert data._LOADERS.keys() == {name for name, facts in descriptions().items() if "kind" not in facts}
    assert features.NETWORKS.keys() == {name for name, facts in descriptions().items() if "kind" in facts}


@pytest.mark.parametrize("name", ["mnist", "cifar10_subset"])
def test_nothing_takes_the_place_of_what_is_missing(nowhere, name):
    assert not data.at_hand(name)
    with pytest.raises(DataError, match=f"{name}: .*REPRISE_MIRROR") as caught:
        load(name, "test")
    assert len(str(caught.value).splitlines()) == 1


def test_a_damaged_file_is_not_used(nowhere, monkeypatch):
    for place in ("data", "mirror"):
        (nowhere / place / "cifar10_subset").mkdir(parents=True)
        (nowhere / place / "cifar10_subset" / "test_labels.npy").write_bytes(b"something else")
    monkeypatch.setenv("REPRISE_MIRROR", str(nowhere / "mirror"))
    with pytest.raises(DataError, match=r"data.cifar10_subset.test_labels\.npy is damaged.*mirror.cifar10_subset"):
        files.obtain("cifar10_subset", "test_labels.npy")


CONTENT = b"what the dataset is made of" * 1000


class Host(BaseHTTPRequestHandler):
    """Serves one file, as the list ``answers`` says, one entry for each request; then as it should be."""

    answers: list[str]
    asked: list[str]

    def do_GET(self):
        self.asked.append(self.path)
        how = self.answers.pop(0) if self.answers else "whole"
        body = {"cut short": CONTENT[:-9], "another": b"<html>Please log in</html>"}.get(how, CONTENT)
        if how == "slow":
            threading.Event().wait(1)  # time.sleep does nothing here, see below
        self.send_response(503 if how == "busy" else 200)
        self.send_header("Content-Length", str(len(CONTENT) if how == "cut short" else len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A dataset ``toy`` of one file, on a server of our own."""
    Host.answers, Host.asked = [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    toy = {
        "files": {"toy.bin": {"sha256": hashlib.sha256(CONTENT).hexdigest()}},
        "urls": [f"http://127.0.0.1:{server.server_port}/"],
    }
    monkeypatch.setattr(files, "descriptions", lambda: {"toy": toy})
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("REPRISE_MIRROR", raising=False)
    yield Host
    server.shutdown()


@pytest.mark.parametrize("trouble", ["busy", "cut short", "another"])
def test_a_download_that_fails_is_tried_again(host, tmp_path, trouble):
    host.answers = [trouble, trouble]
    path = files.obtain("toy", "toy.bin")
    assert path == tmp_path / "data" / "toy" / "toy.bin"
    assert path.read_bytes() == CONTENT
    assert host.asked == ["/toy.bin"] * 3
    assert files.obtain("toy", "toy.bin") == path
    assert len(host.asked) == 3, "what is here is not downloaded again"
    assert not list(path.parent.glob("*.part"))


@pytest.mark.parametrize(
    ("trouble", "said"),
    [("busy", "Service Unavailable"), ("another", "sent another file than expected"), ("cut short", "sent another")],
)
def test_a_download_that_never_succeeds_leaves_nothing(host, tmp_path, trouble, said):
    host.answers = [trouble] * 9
    with pytest.raises(DataError, match=said) as caught:
        files.obtain("toy", "toy.bin")
    assert len(str(caught.value).splitlines()) == 1
    assert len(host.asked) == 3
    assert [path.name for path in (tmp_path / "data" / "toy").iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize("damaged", [CONTENT[:-9], b"", CONTENT[::-1], b"another file of the same dataset"])
def test_a_damaged_file_is_fetched_anew(host, tmp_path, damaged):
    (tmp_path / "data" / "toy").mkdir(parents=True)
    (tmp_path / "data" / "toy" / "toy.bin").write_bytes(damaged)
    assert files.obtain("toy", "toy.bin").read_bytes() == CONTENT
    assert len(host.asked) == 1


def test_the_mirror_comes_before_the_network_but_not_when_damaged(host, tmp_path, monkeypatch):
    mirror = tmp_path / "mirror" / "toy" / "toy.bin"
    mirror.parent.mkdir(parents=True)
    mirror.write_bytes(CONTENT)
    monkeypatch.setenv("REPRISE_MIRROR", str(tmp_path / "mirror"))
    assert files.obtain("toy", "toy.bin") == mirror
    assert host.asked == []
    mirror.write_bytes(CONTENT[:-1])
    assert files.obtain("toy", "toy.bin") == tmp_path / "data" / "toy" / "toy.bin"
    assert mirror.read_bytes() == CONTENT[:-1], "the mirror is somebody else's"


def test_a_file_may_lie_in_a_folder_of_another_name_and_have_two_checksums(host, tmp_path, monkeypatch):
    toy = files.descriptions()["toy"]
    toy["folder"] = "shared"
    toy["files"]["toy.bin"]["sha256"] = ["0" * 64, toy["files"]["toy.bin"]["sha256"]]
    assert files.obtain("toy", "toy.bin") == tmp_path / "data" / "shared" / "toy.bin"
    mirror = tmp_path / "mirror" / "shared" / "toy.bin"
    mirror.parent.mkdir(parents=True)
    mirror.write_bytes(CONTENT)
    monkeypatch.setenv("REPRISE_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path / "empty"))
    assert files.obtain("toy", "toy.bin") == mirror
    mirror.write_bytes(CONTENT[::-1])
    host.answers = ["another"] * 3
    with pytest.raises(DataError, match=r"shared.toy\.bin is damaged.*a folder that has shared/toy\.bin"):
        files.obtain("toy", "toy.bin")


def test_what_is_tracked_lies_in_the_checkout_wherever_the_data_is(host, tmp_path, monkeypatch):
    toy = files.descriptions()["toy"]
    toy |= {"folder": "weights", "tracked": True}
    del toy["urls"]
    monkeypatch.setattr(files, "_HOME", tmp_path / "checkout")
    with pytest.raises(DataError, match=r"no intact toy\.bin"):
        files.obtain("toy", "toy.bin")
    place = tmp_path / "checkout" / "weights" / "toy.bin"
    place.parent.mkdir(parents=True)
    place.write_bytes(CONTENT)
    assert files.obtain("toy", "toy.bin") == place
    assert host.asked == []


def test_two_that_ask_at_once_download_once(host, tmp_path):
    host.answers = ["slow"]
    with ThreadPoolExecutor() as pool:
        paths = list(pool.map(lambda _: files.obtain("toy", "toy.bin"), range(4)))
    assert set(paths) == {tmp_path / "data" / "toy" / "toy.bin"}
    assert paths[0].read_bytes() == CONTENT
    assert len(host.asked) == 1


def test_a_folder_that_cannot_be_written_is_named(host, tmp_path):
    (tmp_path / "data").write_text("in the way", encoding="utf-8")
    with pytest.raises(DataError, match=r"toy: toy\.bin could not be written to .*toy"):
        files.obtain("toy", "toy.bin")
    assert host.asked == []


@pytest.mark.mirror
def test_files_that_are_swapped_are_found_before_use(nowhere, monkeypatch):
    place = nowhere / "data" / "cifar10_subset"
    shutil.copytree(MIRROR / "cifar10_subset", place)
    (place / "train_labels.npy").rename(place / "x")
    (place / "test_labels.npy").rename(place / "train_labels.npy")
    (place / "x").rename(place / "test_labels.npy")
    with pytest.raises(DataError, match=r"(test|train)_labels\.npy is damaged"):
        load("cifar10_subset", "test")
