"""What a kernel takes: its parameters as the source declares them, and arguments turned into their exact bytes."""

from __future__ import annotations

import functools
import operator
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

C_TYPES = {
    torch.float64: "double",
    torch.float32: "float",
    torch.float16: "__half",
    torch.bfloat16: "__nv_bfloat16",
    torch.int64: "long long",
    torch.int32: "int",
    torch.int16: "short",
    torch.int8: "signed char",
    torch.uint8: "unsigned char",
    torch.bool: "bool",
}
_TENSORS = {c_type: dtype for dtype, c_type in C_TYPES.items()} | {"int64_t": torch.int64, "int32_t": torch.int32}
_SCALARS = {
    "double": np.float64,
    "float": np.float32,
    "long long": np.int64,
    "int64_t": np.int64,
    "int": np.int32,
    "int32_t": np.int32,
    "unsigned long long": np.uint64,
    "size_t": np.uint64,
    "unsigned int": np.uint32,
    "unsigned": np.uint32,
    "bool": np.bool_,
}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel: its text, the C type of it or of what it points to."""

    text: str
    type: str
    pointer: bool

    def convert(self, kernel: str, value: object) -> np.ndarray:
        """A value as the bytes that the function takes: an array of one element."""
        if self.pointer:
            return np.array([0 if value is None else self._address(kernel, value)], np.uint64)
        if isinstance(value, np.ndarray) and value.size == 1:  # a struct, or a number of a type of its own
            return np.ascontiguousarray(value.reshape(1))
        if self.type not in _SCALARS:
            raise ValueError(f"{kernel}: `{self.text}` takes a NumPy array of one element, got {_shown(value)}")
        scalar = _SCALARS[self.type]
        if not isinstance(value, (int, float, np.number, np.bool_)):
            raise ValueError(f"{kernel}: `{self.text}` takes a number, got {_shown(value)}")
        if np.issubdtype(scalar, np.integer):
            limits = np.iinfo(scalar)
            try:
                number = operator.index(value)
            except TypeError:
                raise ValueError(f"{kernel}: `{self.text}` takes a whole number, got {value!r}") from None
            if not limits.min <= number <= limits.max:
                raise ValueError(f"{kernel}: {number} does not fit `{self.text}`")
            return np.array([number], scalar)
        return np.array([value], scalar)

    def _address(self, kernel: str, value: object) -> int:
        if not isinstance(value, Tensor):
            raise ValueError(f"{kernel}: `{self.text}` takes a tensor or None, got {value!r}")
        wanted = _TENSORS.get(self.type)
        if wanted not in (None, value.dtype):  # None: void, a struct, a typedef of the source's own
            raise ValueError(f"{kernel}: `{self.text}` takes a tensor of {wanted}, got {value.dtype}")
        if not value.is_contiguous():
            raise ValueError(
                f"{kernel}: `{self.text}` takes a contiguous tensor, got shape {tuple(value.shape)} with strides "
                f"{value.stride()}; pass .contiguous()"
            )
        return value.data_ptr()


def _shown(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


@functools.lru_cache(maxsize=256)
def declared(source: str) -> dict[str, tuple[str, ...]]:
    """The kernels of a source, and the text of their parameters."""
    code = re.sub(r"//[^\n]*|/\*.*?\*/", " ", source, flags=re.DOTALL)
    bounds = r"(?:__launch_bounds__\s*\([^)]*\)\s*)?"
    found = re.findall(rf'extern\s+"C"\s+__global__\s+void\s+{bounds}(\w+)\s*\(([^)]*)\)', code)
    return {name: tuple(" ".join(text.split()) for text in texts.split(",") if text.strip()) for name, texts in found}


def parameters(source: str, name: str, words: dict[str, str]) -> list[Parameter]:
    """Those of one kernel; ``words`` says what the source's own names for types stand for."""
    if name not in declared(source):
        raise ValueError(f'the source has no `extern "C" __global__ void {name}(...)`')
    found = []
    for text in declared(source)[name]:
        bare = re.sub(r"\b(const|volatile|struct|__restrict__|__grid_constant__)\b", " ", text)
        kind = bare.replace("*", " ").split()[:-1]  # without the parameter's own name
        found.append(Parameter(text, " ".join(words.get(word, word) for word in kind), "*" in bare))
    return found
