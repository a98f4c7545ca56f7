"""``Kernel``: one CUDA C function, run on CUDA tensors through CuPy and on CPU tensors through g++."""

from __future__ import annotations

import math
import re

import numpy as np
import torch
from torch import Tensor

from . import on_cpu, on_cuda
from .signature import C_TYPES, parameters

# What every present CUDA device takes; checked on the CPU, too, so that what runs here runs there.
_GRID, _BLOCK, _THREADS, _SHARED_BYTES = (2**31 - 1, 65535, 65535), (1024, 1024, 64), 1024, 48 << 10
# What the library's own kernels take.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def real_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """What kernels compute in: double where a tensor is, else float, also for half precision."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


class Kernel:
    """A CUDA C function that takes tensors.

    ::

        double_it = Kernel('''
        extern "C" __global__ void double_it(float* y, const float* x, int n) {
            const int i = blockIdx.x * blockDim.x + threadIdx.x;
            if (i < n) y[i] = 2 * x[i];
        }
        ''', "double_it")
        x = torch.arange(1000.0)                  # or on "cuda": the same call
        y = torch.empty_like(x)
        double_it(4, 256, y, x, x.numel())        # 4 blocks of 256 threads

    On CUDA tensors it is compiled by NVRTC through CuPy and launched on torch's current stream, without a copy and
    without waiting. On CPU tensors g++ compiles the same source, which shows whether it computes the right thing, not
    how fast, nor that it has no races (``README.md`` beside this file lists what cannot be found so).

    Arguments are held against the function's own parameters: the type of a tensor against that of the pointer, a
    number against the range of its type. A pointer takes a contiguous tensor or None, which is the null pointer. A
    parameter that is a struct takes a NumPy array of one element of a structured dtype.

    Args:
        source: CUDA C++; what is launched is declared ``extern "C" __global__ void name(...)``. The types ``__half``
            and ``__nv_bfloat16`` need no include.
        name: the function to launch; a source may hold several.
        file: what the source is called in the compiler's messages.
        types: names that the source uses for types (longer than one letter) or constants, and what they stand for:
            a dtype, or text as for ``#define``. ``SCALAR=torch.float16`` makes SCALAR ``__half``.

    Raises:
        ValueError: when the source has no such function.
    """

    def __init__(self, source: str, name: str, *, file: str = "kernel.cu", **types: torch.dtype | str | int) -> None:
        words = {key: C_TYPES[value] if isinstance(value, torch.dtype) else str(value) for key, value in types.items()}
        self.name, self.parameters = name, parameters(source, name, words)
        defines = "".join(f"#define {key} {value}\n" for key, value in words.items())
        half = re.search(r"__half|__nv_bfloat16", defines + source)
        includes = "#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n" if half else ""
        #: The source as it is compiled, with its types filled in.
        self.source = f'{includes}{defines}#line 1 "{file}"\n{source}'

    def __call__(
        self,
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        *arguments: Tensor | float | np.ndarray | None,
        shared_bytes: int = 0,
        device: torch.device | None = None,
    ) -> None:
        """Launch.

        Args:
            grid: how many blocks: one number, or up to three.
            block: how many threads in each: one number, or up to three, with a product of 1,024 at most.
            arguments: one for each parameter of the function, in its order.
            shared_bytes: of dynamic shared memory for each block.
            device: only needed where no argument is a tensor.

        Raises:
            ValueError: when an argument does not fit its parameter, when tensors are on different devices, or when
                the launch is larger than CUDA allows.
            RuntimeError: when CuPy or g++ is missing, or the source does not compile; the message says what to do.
        """
        grid, block = _three("grid", grid, _GRID), _three("block", block, _BLOCK)
        if math.prod(block) > _THREADS or not 0 <= shared_bytes <= _SHARED_BYTES:
            raise ValueError(
                f"{self.name}: a block has {_THREADS} threads and {_SHARED_BYTES} bytes of shared memory at most, "
                f"got {block} and {shared_bytes}"
            )
        if len(arguments) != len(self.parameters):
            names = ", ".join(parameter.text for parameter in self.parameters)
            raise ValueError(f"{self.name}({names}) takes {len(self.parameters)} arguments, got {len(arguments)}")
        device = self._device(arguments, device)
        values = [
            parameter.convert(self.name, argument)
            for parameter, argument in zip(self.parameters, arguments, strict=True)
        ]
        if device.type == "cpu":
            on_cpu.launch(self.source, self.name, grid, block, values, shared_bytes)
        elif device.type == "cuda":
            on_cuda.launch(self.source, self.name, grid, block, values, shared_bytes, device)
        else:
            raise ValueError(f"{self.name}: tensors must be on a CUDA device or on the CPU, got {device}")

    def _device(self, arguments: tuple, device: torch.device | None) -> torch.device:
        devices = {argument.device for argument in arguments if isinstance(argument, Tensor)}
        devices |= {device} if device else set()
        if len(devices) != 1:
            found = ", ".join(sorted(map(str, devices))) or "none (name one: device=...)"
            raise ValueError(f"{self.name}: tensors must be on one device, got {found}")
        return devices.pop()


def _three(what: str, shape: int | tuple[int, ...], limits: tuple[int, ...]) -> tuple[int, int, int]:
    given = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    sizes = given + (1,) * (3 - len(given))
    whole = len(sizes) == 3 and all(isinstance(size, (int, np.integer)) for size in sizes)
    if not whole or not all(1 <= size <= limit for size, limit in zip(sizes, limits, strict=True)):
        raise ValueError(f"{what} {given} is out of bounds: CUDA takes whole numbers from 1 to {limits}")
    return int(sizes[0]), int(sizes[1]), int(sizes[2])
