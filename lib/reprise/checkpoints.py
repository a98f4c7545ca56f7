"""Checkpoints of trainings: all that is needed to go on from a step, bit for bit, in one safetensors file.

``train`` uses them during a run; no notebook mentions them. Tensors are stored as such, the rest as
JSON beside them, so that reading a checkpoint never executes anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from . import run

# Trainings that went on from a checkpoint, and the seconds they had taken before, for the record of the run.
resumed: dict[str, float] = {}


def path_for(name: str, seed: int, steps: int) -> Path | None:
    """Where the checkpoint of a training belongs, or None outside of a run.

    The name covers the code of the notebook up to the cell that trains: an edit further down keeps it valid. It also
    covers the library, the parameters and the device, whose hash the runner gives (``REPRISE_CODE``).
    """
    if (place := run.folder()) is None:
        return None
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    code = shell.user_ns.get("In", []) if shell is not None else []
    facts = [name, seed, steps, list(code), os.environ.get("REPRISE_CODE", "")]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    return place / "checkpoints" / f"{re.sub(r'[^A-Za-z0-9.]+', '_', name)}-{key}.safetensors"


def seconds_between() -> float:
    """How often a training is saved: every minute, or as ``REPRISE_CHECKPOINT_SECONDS`` says."""
    return float(os.environ.get("REPRISE_CHECKPOINT_SECONDS", 60))


def save(path: Path, state: dict) -> None:
    """Write nested dicts and lists of tensors, numbers and texts; the file is whole or absent.

    Raises:
        OSError: if it cannot be written; an earlier checkpoint is still there then.
        RuntimeError: if the run's folder has meanwhile been taken over by another process.
    """
    run.folder()  # is it still ours?
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_encode(state, tensors))
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".part")
    try:
        save_file(tensors, temporary, metadata={"state": text})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:  # safetensors reports a full disk in its own way
        raise OSError(f"checkpoint not written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> dict | None:
    """What was saved, or None if there is no readable checkpoint."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            return _decode(json.loads(file.metadata()["state"]), tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None  # a damaged checkpoint is like none: the training starts anew


def random_state() -> dict:
    """The state of Python's, NumPy's and torch's generators, GPUs included."""
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002 (see seed_everything)
    return {
        "python": random.getstate(),
        "numpy": {
            **numpy,
            "state": {**numpy["state"], "key": torch.from_numpy(numpy["state"]["key"].astype(np.int64))},
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict) -> None:
    random.setstate(state["python"])
    numpy = state["numpy"]
    key = numpy["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _encode(value: object, tensors: dict[str, torch.Tensor]) -> object:
    """JSON for a value, its tensors moved into ``tensors``. Dicts become lists of pairs, since keys may be numbers."""
    if isinstance(value, torch.Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {"tensor": key}
    if isinstance(value, dict):
        return {"dict": [[_encode(k, tensors), _encode(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_encode(item, tensors) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


def _decode(value: object, tensors: dict[str, torch.Tensor]) -> object:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
