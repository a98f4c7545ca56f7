"""Compiling CUDA C through CuPy and running it on CUDA tensors."""

from __future__ import annotations

import functools
import importlib.util

import numpy as np
import torch

# Known once and for all, so that torch.compile can look through what depends on it.
_CUPY = importlib.util.find_spec("cupy") is not None


def usable(tensor: torch.Tensor) -> bool:
    """Whether a kernel can take the place of PyTorch for this tensor: it is on a CUDA device, and CuPy is here."""
    return _CUPY and tensor.is_cuda


def missing() -> str | None:
    """Why kernels cannot run on CUDA tensors here, and what would help; None if they can."""
    if not _CUPY:
        return "kernels run on CUDA tensors through CuPy, which is not installed (pip install 'cupy-cuda13x[ctk]')"
    if not torch.cuda.is_available():
        return "kernels run on CUDA tensors on a CUDA device; torch finds none"
    return None


def launch(
    source: str,
    name: str,
    grid: tuple,
    block: tuple,
    arguments: list[np.ndarray],
    shared_bytes: int,
    device: torch.device,
) -> None:
    """Put the kernel on torch's current stream of the device, after what is there already, and return at once."""
    if reason := missing():
        raise RuntimeError(reason)
    import cupy

    # CuPy has a stream of its own; there the kernel would run beside torch's work instead of after it.
    stream = torch.cuda.current_stream(device)
    with torch.cuda.device(device), cupy.cuda.Stream.from_external(stream):
        _function(source, name, stream.device_index)(grid, block, tuple(arguments), shared_mem=shared_bytes)


@functools.cache
def _function(source: str, name: str, device: int):
    """A kernel as CuPy's function on the current device; what is compiled is kept in CuPy's own cache on disk."""
    from cupy.cuda.compiler import CompileException

    try:
        return _module(source).get_function(name)
    except CompileException as error:
        raise RuntimeError(f"NVRTC cannot compile the kernel:\n{error}") from error


@functools.cache
def _module(source: str):
    import cupy

    return cupy.RawModule(code=source, options=("-std=c++17",))
