"""The annotated literals of a parameters cell: what a command line may say of them, and what a notebook checks."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from reprise.lab import Paper, notebooks
from reprise.lab.errors import BadInput
from reprise.lab.parameters import Companion, Flow, Picture, fingerprint, parse_cell, parse_options

CELL = """
scale: str = "quick"
seed: int = 0
device: str = "auto"
steps: int | None = None  # None: the scale's own number
rate: float = 0.1
momentum: float | None = None
shuffle: bool = True
optimiser: Literal["sgd", "adam"] = "sgd"
layers: Literal[2, 3] | None = None
title: str = "none of your business"
picture: Picture | None = None
"""
DECLARED = parse_cell(CELL)

ACCEPTED = [  # name, text on a command line, value
    ("seed", "7", 7),
    ("steps", "50", 50),
    ("steps", "none", None),
    ("rate", "0.5", 0.5),
    ("rate", "1", 1.0),
    ("rate", "-1e-3", -0.001),
    ("momentum", "None", None),
    ("shuffle", "false", False),
    ("shuffle", "True", True),
    ("optimiser", "adam", "adam"),
    ("layers", "3", 3),
    ("layers", "none", None),
    ("title", "none", "none"),
    ("title", "3", "3"),
    ("picture", "none", None),
    ("scale", "full", "full"),
]


@pytest.mark.parametrize(("name", "text", "value"), ACCEPTED)
def test_values_get_their_types(name, text, value):
    given = parse_options(DECLARED, ((name, text),))
    assert given == {name: value}
    assert type(given[name]) is type(value)


REFUSED = [  # name, text, what the line must say
    ("sed", "7", "no parameter 'sed'; there are: scale, seed, device"),
    ("seed", "lots", "parameter seed: 'lots' is not a whole number"),
    ("seed", "1.5", "parameter seed: '1.5' is not a whole number"),
    ("seed", "-1", "parameter seed: -1 is not a whole number of at least 0"),
    ("steps", "0", "parameter steps: 0 is not a whole number of at least 1"),
    ("steps", "many", "parameter steps: 'many' is not a whole number or none"),
    ("rate", "fast", "parameter rate: 'fast' is not a number"),
    ("rate", "nan", "parameter rate: nan is not a number"),
    ("rate", "inf", "parameter rate: inf is not a number"),
    ("rate", "none", "parameter rate: 'none' is not a number"),
    ("shuffle", "yes", "parameter shuffle: 'yes' is not true or false"),
    ("shuffle", "1", "parameter shuffle: '1' is not true or false"),
    ("optimiser", "sdg", "parameter optimiser: 'sdg' is not sgd or adam"),
    ("layers", "4", "parameter layers: '4' is not 2 or 3 or none"),
    ("scale", "ful", "parameter scale: 'ful' is not quick or full"),
    ("picture", "missing.png", "parameter picture: there is no file missing.png"),
    ("picture", "note.txt", "parameter picture: note.txt cannot be read as a picture"),
    ("picture", ".", "parameter picture: . cannot be read as a picture"),
]


@pytest.mark.parametrize(("name", "text", "said"), REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, monkeypatch, name, text, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "note.txt").write_text("not a picture", encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        parse_options(DECLARED, ((name, text),))
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_picture_is_found_from_the_callers_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (2, 2)).save("mine.png")
    found = parse_options(DECLARED, (("picture", "mine.png"),))["picture"]
    assert isinstance(found, Picture)
    assert os.path.isabs(found)
    assert os.path.samefile(found, "mine.png")
    # What the runner hands to the notebook is a plain text again.
    assert DECLARED["picture"].check(str(found)) == found


PAIR = parse_cell("left: Picture | None = None\nright: Companion | None = None\ntruth: Flow | None = None")


@pytest.fixture
def pair(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, size in {"a.png": (5, 4), "b.jpg": (5, 4), "b.ppm": (5, 4), "wide.png": (6, 4)}.items():
        Image.new("RGB", size).save(name)
    Path("a.flo").write_bytes(struct.pack("<fii40f", 202021.25, 5, 4, *range(40)))
    Path("wide.flo").write_bytes(struct.pack("<fii48f", 202021.25, 6, 4, *range(48)))
    Path("short.flo").write_bytes(struct.pack("<fii8f", 202021.25, 5, 4, *range(8)))


@pytest.mark.parametrize("right", ["b.jpg", "b.ppm"])
def test_a_pair_and_its_flow_are_accepted(pair, right):
    given = parse_options(PAIR, (("truth", "a.flo"), ("right", right), ("left", "a.png")))
    assert {name: type(value) for name, value in given.items()} == {"left": Picture, "right": Companion, "truth": Flow}
    assert all(os.path.isabs(value) for value in given.values())
    for name, value in given.items():
        assert PAIR[name].check(str(value)) == value


APART = [  # options, what the line must say
    ({"left": "a.png"}, "parameter left needs right: give both (-p right FILE)"),
    ({"right": "a.png"}, "parameter right needs left: give both"),
    ({"truth": "a.flo"}, "parameter truth needs left: give both"),
    ({"left": "a.png", "right": "none"}, "parameter left needs right: give both"),
    ({"left": "a.png", "right": "wide.png"}, "parameter right: 6x4 pixels, but left has 5x4"),
    ({"left": "a.png", "right": "b.jpg", "truth": "wide.flo"}, "parameter truth: 6x4 pixels, but left has 5x4"),
    ({"left": "a.flo", "right": "b.jpg"}, "parameter left: a.flo cannot be read as a picture"),
    ({"left": "a.png", "right": "no.png"}, "parameter right: there is no file no.png"),
    ({"left": "a.png", "right": "b.jpg", "truth": "a.png"}, "parameter truth: a.png is no flow: KITTI's png has three"),
    ({"left": "a.png", "right": "b.jpg", "truth": "b.jpg"}, "parameter truth: b.jpg is no flow: neither a .flo file"),
    ({"left": "a.png", "right": "b.jpg", "truth": "short.flo"}, "parameter truth: short.flo is damaged: 44 bytes"),
]


@pytest.mark.parametrize(("options", "said"), APART)
def test_files_that_do_not_belong_together_are_refused(pair, options, said):
    with pytest.raises(BadInput) as caught:
        parse_options(PAIR, tuple(options.items()))
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


CHECKED = [  # in the notebook itself: name, value, whether it fits
    ("rate", 1, True),
    ("rate", True, False),
    ("rate", "0.1", False),
    ("rate", float("nan"), False),
    ("seed", True, False),
    ("seed", 1.0, False),
    ("seed", -1, False),
    ("seed", None, False),
    ("steps", None, True),
    ("steps", 0, False),
    ("shuffle", 1, False),
    ("shuffle", "false", False),
    ("layers", 3, True),
    ("layers", 5, False),
    ("optimiser", "rmsprop", False),
    ("scale", "ful", False),
]


@pytest.mark.parametrize(("name", "value", "fits"), CHECKED)
def test_values_in_a_notebook_are_checked(name, value, fits):
    if fits:
        assert DECLARED[name].check(value) is value
        return
    with pytest.raises(BadInput, match=f"parameter {name}: .* is not "):
        DECLARED[name].check(value)


BAD_CELLS = [
    ("steps: int = 2 * 300", "the default of parameter steps is not a literal"),
    ("steps = 300", "may hold only `name: type = literal`, not: steps = 300"),
    ("steps: int", "may hold only `name: type = literal`, not: steps: int"),
    ("import os", "may hold only `name: type = literal`, not: import os"),
    ("steps: int = ", "the parameters cell is not Python: "),
    ("layers: list = []", "parameter layers: no type 'list'"),
    ('steps: int = "many"', "parameter steps: 'many' is not a whole number"),
    ('scale: str = "ful"', "parameter scale: 'ful' is not quick or full"),
]


@pytest.mark.parametrize(("cell", "said"), BAD_CELLS)
def test_a_cell_holds_annotated_literals_that_fit(cell, said):
    with pytest.raises(BadInput) as caught:
        parse_cell(cell)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("lost", ["scale", "seed", "device"])
def test_every_notebook_has_scale_seed_and_device(lost):
    lines = [line for line in CELL.strip().splitlines() if not line.startswith(f"{lost}:")]
    cell = nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": ["parameters"]})
    with pytest.raises(BadInput, match=f"the parameters cell lacks {lost}"):
        notebooks.parameters(nbformat.v4.new_notebook(cells=[cell]))
    with pytest.raises(BadInput, match="one cell tagged `parameters`, this one has 0"):
        notebooks.parameters(nbformat.v4.new_notebook())


TINY = {"scale": "quick", "seed": 0, "device": "auto", "steps": None}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"scale": "ful"}, "parameter scale: 'ful' is not quick or full"),
        ({"seed": "lots"}, "parameter seed: 'lots' is not a whole number"),
        ({"steps": "50"}, "parameter steps: '50' is not a whole number or none"),
    ],
)
def test_opening_a_paper_checks_what_papermill_does_not(tiny, monkeypatch, changed, said):
    monkeypatch.chdir(tiny / "notebooks")
    with pytest.raises(BadInput) as caught:
        Paper("tiny", TINY | changed)
    assert said in str(caught.value)


def test_a_paper_needs_all_parameters_and_a_name_it_knows(tiny, monkeypatch):
    monkeypatch.chdir(tiny / "notebooks")
    with pytest.raises(BadInput, match="parameter steps has no value: run the parameters cell first"):
        Paper("tiny", {key: value for key, value in TINY.items() if key != "steps"})
    with pytest.raises(BadInput, match="no paper 'tinny'; did you mean tiny"):
        Paper("tinny", TINY)


@pytest.mark.parametrize(
    ("changed", "judged"),
    [({}, True), ({"seed": 3}, True), ({"scale": "full"}, True), ({"device": "cpu"}, True), ({"steps": 50}, False)],
)
def test_other_parameters_than_seed_scale_and_device_suspend_judgement(tiny, monkeypatch, changed, judged):
    monkeypatch.chdir(tiny)
    assert Paper("tiny", TINY | changed).outcome.judged is judged


def test_a_file_counts_by_its_content(tmp_path):
    first, second = tmp_path / "a.flo", tmp_path / "b.flo"
    first.write_bytes(b"one"), second.write_bytes(b"one")
    assert fingerprint(Flow(first)) == fingerprint(Picture(second))
    second.write_bytes(b"two")
    assert fingerprint(Flow(first)) != fingerprint(Picture(second))
    assert [fingerprint(value) for value in (3, "text", None)] == [3, "text", None]
