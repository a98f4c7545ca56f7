"""The machine code of a kernel for GPUs that are not here: compiled by NVRTC, read back by Triton's disassembler.

Needs no GPU and no driver. Both come with torch's CUDA builds; :func:`missing` says what is not there.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

# Ampere and Hopper, the data-centre GPUs of the last years (A100; H100 and H200).
ARCHITECTURES = ("sm_80", "sm_90")


class Compiled(NamedTuple):
    """One source for one architecture: what the compiler said, and the ELF file it made."""

    log: str
    cubin: bytes

    def resources(self) -> dict[str, dict[str, int]]:
        """For every function: registers, and bytes of stack, spill stores and spill loads, as ptxas tells them."""
        found = {}
        for part in self.log.split("Function properties for ")[1:]:
            stack, stores, loads = re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
            ).groups()
            used = re.search(r"Used (\d+) registers", part)
            found[part.split()[0]] = {
                "registers": int(used[1]) if used else 0,
                "stack": int(stack),
                "spill stores": int(stores),
                "spill loads": int(loads),
            }
        return found

    def instructions(self) -> dict[str, str]:
        """The machine code (SASS) of every function, as text."""
        if reason := missing_disassembler():
            raise RuntimeError(reason)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "kernel.cubin")
            path.write_bytes(self.cubin)
            told = subprocess.run([_nvdisasm(), "-c", path], capture_output=True, text=True, check=True)
        parts = re.split(r"^\s*\.section\s+\.text\.(\w+)", told.stdout, flags=re.MULTILINE)
        return dict(zip(parts[1::2], parts[2::2], strict=True))


def missing() -> str | None:
    """Why no machine code can be read here, and what would help; None if it can."""
    return missing_compiler() or missing_disassembler()


def missing_compiler() -> str | None:
    """Why nothing can be compiled for a GPU here, and what would help; None if it can."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError, OSError):
        return (
            "machine code needs NVRTC and cuda-bindings, which torch's CUDA builds for Linux bring along and its CPU "
            "builds do not (pip install 'cuda-bindings[all]')"
        )
    return None


def missing_disassembler() -> str | None:
    """Why machine code cannot be shown as text here, and what would help; None if it can."""
    return None if _nvdisasm() else "machine code is read by the nvdisasm in Triton's wheel (pip install triton)"


def compiled(source: str, architecture: str = "sm_90") -> Compiled:
    """Compile a source, such as a ``Kernel``'s, with the options of CuPy.

    Args:
        source: CUDA C++.
        architecture: one of ``ARCHITECTURES``, or another that NVRTC knows.

    Raises:
        RuntimeError: when something is missing, or the source does not compile; the message has the compiler's words.
    """
    if reason := missing_compiler():
        raise RuntimeError(reason)
    from cuda.bindings import nvrtc
    from cuda.pathfinder import find_nvidia_header_directory

    headers = find_nvidia_header_directory("cudart")
    # -ftz as CuPy has it always; ptxas then tells in the log what each function uses.
    options = [f"-arch={architecture}", "-std=c++17", "-ftz=true", "--ptxas-options=-v", f"-I{headers}"]
    options = [option.encode() for option in options]
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], [])
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
        text = log.decode(errors="replace").rstrip("\0")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"NVRTC cannot compile the kernel for {architecture}:\n{text}")
        _, size = nvrtc.nvrtcGetCUBINSize(program)
        cubin = b" " * size
        nvrtc.nvrtcGetCUBIN(program, cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Compiled(text, cubin)


def _nvdisasm() -> Path | None:
    triton = importlib.util.find_spec("triton")
    found = triton and Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return found if found and found.exists() else None
