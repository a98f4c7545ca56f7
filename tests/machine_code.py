"""Compiling kernels for GPUs that are not here, and reading what came out. Public NVRTC bindings, no device needed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

# Ampere and Hopper, the data-centre GPUs of the last years (A100, H100 and H200).
ARCHITECTURES = ("sm_80", "sm_90")


class Compiled(NamedTuple):
    """One source for one architecture."""

    log: str
    cubin: bytes

    def resources(self) -> dict[str, dict[str, int]]:
        """For every function: registers, and bytes of stack, spill stores and spill loads, as ptxas tells them."""
        found = {}
        for part in self.log.split("Function properties for ")[1:]:
            name = part.split()[0]
            stack, stores, loads = re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
            ).groups()
            used = re.search(r"Used (\d+) registers", part)
            found[name] = {
                "registers": int(used[1]) if used else 0,
                "stack": int(stack),
                "spill stores": int(stores),
                "spill loads": int(loads),
            }
        return found

    def instructions(self, folder: Path) -> dict[str, str]:
        """The machine code (SASS) of every function, disassembled by the nvdisasm that Triton brings along."""
        path = folder / "kernel.cubin"
        path.write_bytes(self.cubin)
        told = subprocess.run([nvdisasm(), "-c", path], capture_output=True, text=True, check=True)
        parts = re.split(r"^\s*\.section\s+\.text\.(\w+)", told.stdout, flags=re.MULTILINE)
        return dict(zip(parts[1::2], parts[2::2], strict=True))


def missing_compiler() -> str | None:
    """Why nothing can be compiled for a GPU here."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError, OSError):
        return "needs NVRTC and cuda-bindings, which come with torch's CUDA builds and not with its CPU builds"
    return None


def nvdisasm() -> Path | None:
    triton = importlib.util.find_spec("triton")
    found = triton and Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return found if found and found.exists() else None


def compiled(source: str, architecture: str) -> Compiled:
    """Compile as CuPy does; a RuntimeError carries the compiler's words."""
    from cuda.bindings import nvrtc
    from cuda.pathfinder import find_nvidia_header_directory

    headers = find_nvidia_header_directory("cudart")
    # -ftz as CuPy has it always; ptxas then tells in the log what each function uses.
    options = [f"-arch={architecture}", "-std=c++17", "-ftz=true", "--ptxas-options=-v", f"-I{headers}"]
    options = [option.encode() for option in options]
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], [])
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * size
    nvrtc.nvrtcGetProgramLog(program, log)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(log.decode(errors="replace"))
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    cubin = b" " * size
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(program)
    return Compiled(log.decode(errors="replace"), cubin)
