"""What this machine can run, line by line."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys

from .checkout import Checkout


def examine(checkout: Checkout) -> list[tuple[str, str]]:
    """Rows of (what, finding); what is missing says what would help."""
    import torch

    from reprise.data import descriptions

    free = shutil.disk_usage(checkout.root).free / 2**30
    rows = [
        ("checkout", str(checkout.root)),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("torch", f"{torch.__version__}, {os.cpu_count()} cores"),
        ("device", _device(torch)),
        ("cupy", _cupy(torch)),
        ("g++", shutil.which("g++") or "not found: kernels are not checked on the CPU (install your system's g++)"),
        ("disk", f"{free:.0f} GiB free"),
    ]
    mirror = os.environ.get("REPRISE_MIRROR")
    rows.append(("mirror", mirror or "REPRISE_MIRROR is not set: nothing is looked up before the network"))
    for name, facts in descriptions().items():
        rows.append((f"{facts.get('kind', 'data')}: {name}", f"{facts['size']}, {_whereabouts(name, facts)}"))
    return rows


def _whereabouts(name: str, facts: dict) -> str:
    from reprise.data import at_hand

    if "in" in facts:
        return f"in {facts['in']}"
    return "at hand" if at_hand(name) else f"not here (reprise fetch {name})"


def _device(torch) -> str:
    if not torch.cuda.is_available():
        return "CPU (no CUDA device found; every notebook's quick scale runs without one)"
    name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    return f"{name}, {memory / 2**30:.0f} GiB"


def _cupy(torch) -> str:
    if importlib.util.find_spec("cupy") is None:
        return "not installed: only GPU kernels need it (pip install -e '.[cuda]')"
    return "installed" + ("" if torch.cuda.is_available() else ", but there is no CUDA device")
