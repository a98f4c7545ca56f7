"""The record of a run: result.json, written last and atomically, and what it says of where it ran."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from filelock import FileLock, Timeout

from .claims import Claims, Measurement
from .errors import BadInput

_PACKAGES = ("reprise", "torch", "torchvision", "numpy", "scikit-learn", "scikit-image", "matplotlib", "cupy")


LOCK = "lock"


def is_locked(folder: Path) -> bool:
    """Whether a process is working in a run's folder."""
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True


def write_json(path: Path, data: dict) -> None:
    """Write a file that is either whole or absent, whatever happens meanwhile."""
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            # Not a number and infinity are not JSON; Measurement turns them into None with a reason.
            json.dump(data, file, indent=1, allow_nan=False, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict | None:
    """The content, or None if there is no such file.

    Raises:
        BadInput: if the file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, OSError) as error:
        raise BadInput(f"{path.name} in {path.parent.name} cannot be read ({error}); delete it to run again") from None


def measured(value: object, per_seed: object = None, censored: str | None = None) -> Measurement:
    """A Measurement of a number, truth value, NumPy scalar or one-element tensor.

    Raises:
        TypeError: for anything else.
        ValueError: if ``censored`` is neither ``above`` nor ``below``.
    """
    if censored not in (None, "above", "below"):
        raise ValueError(f"censored is {censored!r}, not 'above' (at least this much) or 'below'")
    seeds = tuple(_number(one) for one in per_seed) if per_seed is not None else None
    if seeds and not all(one is not None and math.isfinite(one) for one in seeds):
        seeds = tuple(one if one is not None and math.isfinite(one) else None for one in seeds)
    number = _number(value)
    if isinstance(number, float) and not math.isfinite(number):
        reason = "not a number" if math.isnan(number) else "infinite"
        return Measurement(None, seeds, censored, reason)
    return Measurement(number, seeds, censored)


def _number(value: object) -> float | bool:
    if hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, (bool, int, float)):
        raise TypeError(f"a measurement is a number or a truth value, not {type(value).__name__}: {value!r}")
    return value if isinstance(value, bool) else float(value)


def to_json(measurement: Measurement) -> dict:
    return {key: value for key, value in asdict(measurement).items() if key == "value" or value is not None}


def from_json(data: dict) -> Measurement:
    per_seed = data.get("per_seed")
    return Measurement(data["value"], tuple(per_seed) if per_seed else None, data.get("censored"), data.get("reason"))


class Outcome:
    """Measurements of one run at one scale, held against a paper's claims."""

    def __init__(
        self,
        claims: Claims,
        scale: str,
        measurements: dict[str, Measurement],
        without: dict[str, dict[str, Measurement]],
        judged: bool = True,
    ):
        self.claims, self.scale, self.judged = claims, scale, judged
        self.measurements, self.without = measurements, without

    @classmethod
    def from_result(cls, claims: Claims, result: dict) -> Outcome:
        """From the content of a result.json; claims that the file no longer knows are left out."""
        read = {id: from_json(data) for id, data in result["measurements"].items() if id in claims.claims}
        without = {
            what: {id: from_json(data) for id, data in entries.items() if id in claims.claims}
            for what, entries in result["without"].items()
            if what in claims.without
        }
        return cls(claims, result["scale"], read, without, result.get("judged", True))

    def missing(self) -> list[str]:
        """What should have been recorded at this scale and was not."""
        absent = [claim.id for claim in self.claims.at(self.scale) if claim.id not in self.measurements]
        pairs = self.claims.breaking(self.scale)
        return absent + [f"{c.id} without {w.id}" for w, c in pairs if c.id not in self.without.get(w.id, {})]

    def verdicts(self) -> dict[str, str]:
        """Words for each claim of the scale; none when other parameters were changed."""
        if not self.judged:
            return {}
        return {c.id: c.verdict(self.scale, self.measurements.get(c.id)) for c in self.claims.at(self.scale)}

    def surprises(self) -> list[str]:
        """Every verdict that differs from the one on record, in either direction, in words."""
        if not self.judged:
            return []
        found = []
        for claim in self.claims.at(self.scale):
            value = self.measurements.get(claim.id)
            if value is not None and not claim.as_on_record(self.scale, value):
                known = "is on record as failing" if claim.ranges[self.scale].why else "is on record as holding"
                found.append(f"{claim.id} {claim.verdict(self.scale, value)}, but {known}")
        for without, claim in self.claims.breaking(self.scale):
            value = self.without.get(without.id, {}).get(claim.id)
            if value is None or claim.ranges[self.scale].why:
                continue  # what fails anyway cannot be broken
            known = self.scale == "full" and claim.id in without.unbroken
            if without.broken(claim, self.scale, value) == known:
                without_it = f"without {without.removes}"
                words = "breaks {}, but is on record as unbroken" if known else "should break {}, but does not"
                found.append(f"{claim.id} {words.format(without_it)}")
        return found

    def as_json(self) -> dict:
        """The part of result.json that the notebook knows."""
        return {
            "paper": self.claims.name,
            "scale": self.scale,
            "judged": self.judged,
            "measurements": {id: to_json(value) for id, value in self.measurements.items()},
            "without": {
                what: {id: to_json(value) for id, value in entries.items()} for what, entries in self.without.items()
            },
            "verdicts": self.verdicts(),
        }


def provenance(device: str) -> dict:
    """Where this process ran and on what: versions, device, threads, peak memory, checksums of the data loaded,
    trainings that went on from checkpoints with the seconds they had taken before."""
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and device.startswith("cuda")
    facts = {
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "processor": _processor(),
        "threads": torch.get_num_threads() if torch else None,
        "peak_memory_mb": round(_peak_memory() / 2**20),
        "data": dict(getattr(sys.modules.get("reprise.data"), "loaded", {})),
        "resumed": dict(getattr(sys.modules.get("reprise.checkpoints"), "resumed", {})),
    }
    if on_gpu:
        facts["peak_device_memory_mb"] = round(torch.cuda.max_memory_allocated(device) / 2**20)
    return facts


def _processor() -> str:
    """The processor's name: sums of floats may differ from one to the next."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or not on x86
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
