"""Every kernel compiled for GPUs that are not here: that it compiles, what it uses, what became of its atomics."""

from __future__ import annotations

import re

import pytest
import torch

from reprise.kernels import adam, density, normalising, warping
from reprise.kernels.launch import FLOATS
from reprise.kernels.machine_code import ARCHITECTURES, compiled, missing_compiler, missing_disassembler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=missing_compiler() or "")
needs_nvdisasm = pytest.mark.skipif(missing_disassembler() is not None, reason=missing_disassembler() or "")

# What each source holds: function, and the registers that let enough threads share a multiprocessor's 65,536 to keep
# memory busy. At 64 there are 1,024 threads; double takes twice the registers and half of the loads.
SOURCES = {
    "warp": (warping._kernel("warp_forward", torch.float32, torch.float32), {"warp_forward": 40, "warp_backward": 48}),
    "adam": (adam._kernel(torch.float32), {"adam_step": 64}),
    "batch_norm": (
        normalising._kernel("moments", torch.float32),
        {f"batch_norm_{name}": 48 for name in ("moments", "statistics", "normalise", "sums", "grad_input")},
    ),
    # Not for memory but for arithmetic: 16 distances and what they are made of; three blocks to a multiprocessor.
    "parzen": (density._kernel("fold", torch.float32), {"parzen_fold": 80, "parzen_merge": 40}),
}
KERNELS = {
    "warp": lambda dtype: warping._kernel("warp_forward", dtype, dtype),
    "warp, float flow": lambda dtype: warping._kernel("warp_forward", dtype, torch.float32),
    "adam": adam._kernel,
    "batch_norm": lambda dtype: normalising._kernel("moments", dtype),
    "parzen": lambda dtype: density._kernel("fold", dtype),
}
ATOMIC_ADD = r"\b(?:RED|REDG|ATOM|ATOMG)\.E\.ADD\.{}\b"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_spills(name, dtype, architecture):
    resources = compiled(KERNELS[name](dtype).source, architecture).resources()
    assert resources.keys() == SOURCES[name.partition(",")[0]][1].keys()
    for function, used in resources.items():
        assert used["registers"] > 0
        assert (used["stack"], used["spill stores"], used["spill loads"]) == (0, 0, 0), function


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", SOURCES)
def test_registers_leave_room_for_enough_threads(name, architecture):
    kernel, most = SOURCES[name]
    for function, used in compiled(kernel.source, architecture).resources().items():
        assert used["registers"] <= most[function], function


def test_a_spill_would_be_seen():
    # 200 numbers that all live until the end, in a kernel that is allowed few registers.
    source = """extern "C" __global__ void __launch_bounds__(1024, 2) greedy(float* x) {
        float kept[200];
        #pragma unroll
        for (int i = 0; i < 200; ++i) kept[i] = x[i * 1024 + threadIdx.x];
        __syncthreads();
        #pragma unroll
        for (int i = 0; i < 200; ++i) x[i * 1024 + threadIdx.x] = kept[199 - i] * kept[i];
    }"""
    used = compiled(source, ARCHITECTURES[0]).resources()["greedy"]
    assert used["spill stores"] > 0
    assert used["spill loads"] > 0


def test_the_compilers_words_name_file_and_line():
    source = warping._kernel("warp_forward", torch.float32, torch.float32).source.replace("const Taps t = ", "", 1)
    with pytest.raises(RuntimeError, match=r'warp\.cu\(\d+\): error: identifier "t" is undefined'):
        compiled(source, ARCHITECTURES[0])


@needs_nvdisasm
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_warps_gradient_adds_atomically(dtype, architecture):
    """On the CPU the threads of a block take turns: a plain += for an atomicAdd would pass every other test."""
    source = warping._kernel("warp_backward", dtype, dtype).source
    real = "F64" if dtype == torch.float64 else "F32"
    code = compiled(source, architecture).instructions()
    assert len(re.findall(ATOMIC_ADD.format(real), code["warp_backward"])) >= 4
    assert not re.search(r"\b(RED|ATOM)", code["warp_forward"])

    careless = re.sub(r"atomicAdd\((sums \+ p\d\d), ([^;]*)\);", r"*(\1) += \2;", source)
    assert careless.count("+= g *") == source.count("+= g *") + 4
    code = compiled(careless, architecture).instructions()
    assert not re.search(ATOMIC_ADD.format(real), code["warp_backward"])


@needs_nvdisasm
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_else_needs_atomics_and_nothing_lives_in_local_memory(architecture):
    for name in ("adam", "batch_norm", "parzen"):
        for function, code in compiled(SOURCES[name][0].source, architecture).instructions().items():
            assert not re.search(r"\b(RED|REDG|ATOM|ATOMG)\.", code), function
            assert not re.search(r"\b(STL|LDL)\b", code), function


@needs_nvdisasm
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_four_elements_are_loaded_before_the_first_is_needed(architecture):
    """What keeps memory busy: in Adam's loop 16 loads (four of each tensor) come before the first store."""
    code = compiled(SOURCES["adam"][0].source, architecture).instructions()["adam_step"]
    order = re.findall(r"\b(LDG|STG)\.", code)
    assert order.index("STG") >= 16


@needs_nvdisasm
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_parzen_kernel_computes_rather_than_loads(architecture):
    """Two loads of 16 bytes from shared memory for the 16 differences of a dimension, squared and added at once."""
    code = compiled(SOURCES["parzen"][0].source, architecture).instructions()["parzen_fold"]
    slices = re.search(r"(?s)BAR\.SYNC(.*?)BAR\.SYNC", code)[1]  # from "the slices are there" to "nobody needs them"
    assert re.findall(r"\bLDS[\w.]*", slices) == ["LDS.128"] * 2 * 16
    arithmetic = [len(re.findall(rf"\b{name}\b", slices)) for name in ("FADD", "FFMA")]
    assert min(arithmetic) > 250, "the last few may wait until after the barrier"
