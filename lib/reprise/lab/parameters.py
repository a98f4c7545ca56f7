"""The typed parameters of a notebook: annotated literals in its cell tagged ``parameters``."""

from __future__ import annotations

import ast
import hashlib
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path

from .claims import SCALES
from .errors import BadInput


class Picture(str):
    """A path to a picture of the reader's own, resolved against the folder the command is given in."""


class Companion(Picture):
    """A picture that belongs to the ``Picture`` of the same notebook: given together with it, and of its size."""


class Photograph(Picture):
    """A picture for a network to look at: at least 16 pixels wide and high."""


class Pixels(int):
    """The longer side of a picture that a notebook is to make: 64 to 2048 pixels."""


class Flow(str):
    """A path to a flow measured for that picture, a ``.flo`` or a png of KITTI's, of its size."""


# What an annotation may mention; it is evaluated with nothing else in reach.
_FILES = {"Picture": Picture, "Photograph": Photograph, "Companion": Companion, "Flow": Flow}
_NAMES = {"str": str, "int": int, "float": float, "bool": bool, "Pixels": Pixels, **_FILES, "Literal": typing.Literal}

# Parameters that every notebook has mean the same everywhere.
_EVERYWHERE = {"scale": SCALES}


@dataclass(frozen=True)
class Parameter:
    """One line ``name: type = written`` of the parameters cell. ``default`` is what was written when the notebook was
    published, which differs where a reader has edited the cell since."""

    name: str
    annotation: str
    default: object
    written: object

    @property
    def allowed(self) -> tuple:
        """The types and literal choices that the annotation allows, unions taken apart."""
        try:
            meaning = eval(self.annotation, {"__builtins__": {}}, _NAMES)
        except (NameError, TypeError):
            raise BadInput(
                f"parameter {self.name}: no type {self.annotation!r}; there are {', '.join(_NAMES)}"
            ) from None
        union = typing.get_origin(meaning) in (types.UnionType, typing.Union)  # the latter where a Literal is part
        parts = typing.get_args(meaning) if union else (meaning,)
        flat = []
        for part in parts:
            flat += typing.get_args(part) if typing.get_origin(part) is typing.Literal else [part]
        return tuple(flat)

    def fail(self, value: object, wanted: str) -> BadInput:
        return BadInput(f"parameter {self.name}: {value!r} is not {wanted}")

    def parse(self, text: str) -> object:
        """The value that a text on a command line stands for.

        Raises:
            BadInput: if the text does not fit the type.
        """
        if type(None) in self.allowed and text.lower() == "none":
            return None
        for kind in self.allowed:
            if kind is bool and text.lower() in ("true", "false"):
                return text.lower() == "true"
            if kind in (int, float, Pixels):
                try:
                    return int(text) if kind is Pixels else kind(text)
                except ValueError:
                    continue
            if kind in _FILES.values():
                return kind(_open(self.name, text, kind)[0])
            if kind is str or (not isinstance(kind, type) and str(kind) == text):
                return self.check(text if kind is str else kind)
        raise self.fail(text, self.wanted())

    def check(self, value: object) -> object:
        """The value itself, if it has the type and is one of the choices.

        Raises:
            BadInput: naming the parameter, the value and what would be right.
        """
        kinds = {kind for kind in self.allowed if isinstance(kind, type)}
        if Pixels in kinds and type(value) is int and not 64 <= value <= 2048:
            raise self.fail(value, self.wanted())
        fits = type(value) in kinds or (Pixels in kinds and type(value) is int)
        fits = (
            fits or (float in kinds and type(value) is int) or (kinds & set(_FILES.values()) and isinstance(value, str))
        )
        literals = [kind for kind in self.allowed if not isinstance(kind, type)]
        if (not fits and value not in literals) or (type(value) is float and not math.isfinite(value)):
            raise self.fail(value, self.wanted())
        if self.name in _EVERYWHERE and value not in _EVERYWHERE[self.name]:
            raise self.fail(value, " or ".join(_EVERYWHERE[self.name]))
        least = 0 if self.name == "seed" else 1
        if type(value) is int and int in kinds and float not in kinds and value < least:
            raise self.fail(value, f"a whole number of at least {least}")
        return value

    def wanted(self) -> str:
        words = {
            int: "a whole number",
            float: "a number",
            str: "text",
            bool: "true or false",
            Pixels: "a whole number from 64 to 2048",
            Picture: "a picture",
            Photograph: "a picture",
            Companion: "a picture",
            Flow: "a flow",
            type(None): "none",
        }
        return " or ".join(words[kind] if isinstance(kind, type) else str(kind) for kind in self.allowed)


def parse_cell(source: str) -> dict[str, Parameter]:
    """The parameters that a cell declares; anything but annotated literals (and comments) is refused."""
    parameters = {}
    try:
        lines = ast.parse(source).body
    except SyntaxError as error:
        raise BadInput(f"the parameters cell is not Python: {error}") from None
    for line in lines:
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name) or line.value is None:
            raise BadInput(f"the parameters cell may hold only `name: type = literal`, not: {ast.unparse(line)}")
        try:
            default = ast.literal_eval(line.value)
        except ValueError:
            raise BadInput(f"the default of parameter {line.target.id} is not a literal") from None
        parameter = Parameter(line.target.id, ast.unparse(line.annotation), default, default)
        parameter.check(default)
        parameters[parameter.name] = parameter
    return parameters


def parse_options(declared: dict[str, Parameter], options: tuple[tuple[str, str], ...]) -> dict[str, object]:
    """Typed values for the ``-p NAME VALUE`` options of a command line.

    Raises:
        BadInput: for an unknown name or a value of the wrong type.
    """
    values = {}
    for name, text in options:
        if name not in declared:
            raise BadInput(f"no parameter {name!r}; there are: {', '.join(declared)}")
        values[name] = declared[name].check(declared[name].parse(text))
    _check_companions(declared, values)
    return values


def fingerprint(value: object) -> object:
    """What a value means to a run: for a file its content, since another picture may come to lie at the same path."""
    if type(value) in _FILES.values():
        return hashlib.sha256(Path(value).read_bytes()).hexdigest()
    return value


def _check_companions(declared: dict[str, Parameter], values: dict[str, object]) -> None:
    """Pictures and flows that belong together are given together and have one size."""
    of_kind = {kind: [name for name in declared if kind in declared[name].allowed] for kind in _FILES.values()}
    companions = of_kind[Companion] + of_kind[Flow]
    if not companions:
        return
    (leader,) = of_kind[Picture]
    given = [name for name in (leader, *companions) if values.get(name) is not None]
    needed = [leader, *of_kind[Companion]]
    if missing := [name for name in needed if given and name not in given]:
        raise BadInput(f"parameter {given[0]} needs {missing[0]}: give both (-p {missing[0]} FILE)")
    sizes = {name: _open(name, values[name], type(values[name]))[1] for name in given}
    for name in given:
        if sizes[name] != sizes[leader]:
            words = ["x".join(map(str, sizes[one])) for one in (name, leader)]
            raise BadInput(f"parameter {name}: {words[0]} pixels, but {leader} has {words[1]}")


def _open(name: str, text: str, kind: type) -> tuple[Path, tuple[int, int]]:
    """Check a file by reading it; its path and its width and height."""
    from reprise.data.own import DataError, picture_size, read_flow

    path = Path(text).expanduser().resolve()
    try:
        size = tuple(read_flow(path).shape[:1:-1]) if kind is Flow else picture_size(path)
    except DataError as error:
        raise BadInput(f"parameter {name}: {str(error).replace(str(path), text)}") from None
    if kind is Photograph and min(size) < 16:
        raise BadInput(f"parameter {name}: {text} has {size[0]}x{size[1]} pixels, but needs 16 on either side at least")
    return path, size
