"""Compiling CUDA C with g++ and running it on CPU tensors: for tests and lessons, not for speed."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from .signature import declared

_SHIM = Path(__file__).with_name("cuda_on_cpu.h")
_FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC", "-Wl,-Bsymbolic", "-Wno-unknown-pragmas")
_STUCK = -1


def missing() -> str | None:
    """Why kernels cannot run on CPU tensors here, and what would help; None if they can."""
    if sys.platform != "linux":
        return f"kernels run on CPU tensors through GNU g++ on Linux only, this is {sys.platform}"
    if not shutil.which("g++"):
        return "kernels run on CPU tensors through g++, which is not installed (Debian, Ubuntu: apt install g++)"
    return None


def launch(source: str, name: str, grid: tuple, block: tuple, arguments: list[np.ndarray], shared_bytes: int) -> None:
    """Run every block of the grid, and return when all are done."""
    function = getattr(library(source), f"run_{name}")
    shape = (ctypes.c_uint * 6)(*grid, *block)
    pointers = (ctypes.c_void_p * len(arguments))(*[argument.ctypes.data for argument in arguments])
    sizes = (ctypes.c_size_t * len(arguments))(*[argument.nbytes for argument in arguments])
    status = function(pointers, sizes, shape, ctypes.c_size_t(shared_bytes), torch.get_num_threads())
    if status == _STUCK:
        raise RuntimeError(f"{name}: some threads of a block wait at a barrier that the others never reach")
    if status:
        size = arguments[status - 1].nbytes
        raise ValueError(f"{name}: argument {status} has {size} bytes, which is not the size of the kernel's parameter")


@functools.cache
def library(source: str) -> ctypes.CDLL:
    """A source compiled and loaded; from the user's cache folder if this machine has compiled it before."""
    if reason := missing():
        raise RuntimeError(reason)
    text, shim = _translate(source), _SHIM.read_text(encoding="utf-8")
    # Further flags are for debugging: the tests compile with -fsanitize=address.
    flags = (*_FLAGS, *os.environ.get("REPRISE_GPP_FLAGS", "").split())
    facts = (text, shim, repr(flags), platform.machine(), _compiler_version())
    key = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:24]
    path = _cache() / f"{key}.so"
    if not path.exists():
        _compile(text, flags, path)
    return ctypes.CDLL(str(path))


def _translate(source: str) -> str:
    """The little that macros cannot do: dynamic shared memory, fibers where needed, an entry for every kernel."""
    entries = "".join(
        f'extern "C" int run_{name}(void** arguments, const size_t* sizes, const unsigned* shape, size_t shared, '
        f"int threads) {{ return cuda_on_cpu::run({name}, arguments, sizes, shape, shared, threads); }}\n"
        for name in declared(source)
    )
    source = re.sub(r"extern\s+__shared__\s+([\w\s]+?)\s+(\w+)\s*\[\s*\]", r"DYNAMIC_SHARED(\1, \2)", source)
    source = re.sub(r"^\s*#include\s*<cuda_\w+\.h>", "", source, flags=re.MULTILINE)  # the shim has what they declare
    fibers = "#define NEEDS_FIBERS\n" if re.search(r"__sync(threads|warp)|__shfl", source) else ""
    return f'{fibers}#include "{_SHIM.name}"\n{source}\n{entries}'


@functools.cache
def _compiler_version() -> str:
    return subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True, check=True).stdout


@functools.cache
def _cache() -> Path:
    parent = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(parent, "reprise", "kernels")
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    # A home that cannot be written to: compiled anew by every process.
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="reprise-kernels-"))


def _compile(text: str, flags: tuple[str, ...], path: Path) -> None:
    # In a folder of its own, then renamed: of two processes that compile the same, neither sees half a file.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        code, made = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
        code.write_text(text, encoding="utf-8")
        command = ["g++", *flags, "-I", str(_SHIM.parent), str(code), "-o", str(made)]
        told = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if told.returncode:
            raise RuntimeError(f"g++ cannot compile the kernel:\n{told.stderr.strip()}")
        os.replace(made, path)
