"""The launcher: arguments of the right types, launches within bounds, barriers, and words that say what to do."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from devices import NEEDS_GPP, on_every_device

from reprise import kernels
from reprise.kernels import Kernel, on_cpu, on_cuda

SCALE = """
// A comment with extern "C" __global__ void decoy(int no) in it.
extern "C" __global__ void scale(SCALAR* __restrict__ y, const SCALAR* x, /* the factor */ float factor, long long n) {
    for (long long i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        y[i] = (SCALAR)(factor * (float)x[i]);
}
"""
PAGE = Path(kernels.__file__).with_name("README.md")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_call_for_every_type_and_device(dtype, device):
    x = torch.randn(1000, device=device).to(dtype)
    y = torch.empty_like(x)
    Kernel(SCALE, "scale", SCALAR=dtype)(3, 128, y, x, 0.3, x.numel())
    expected = (
        (np.float32(0.3).item() * x.double()).to(dtype) if dtype == torch.float64 else (0.3 * x.float()).to(dtype)
    )
    torch.testing.assert_close(y, expected)


@NEEDS_GPP
def test_the_pages_example_runs():
    (example,) = [part.partition("```")[0] for part in PAGE.read_text(encoding="utf-8").split("```python\n")[1:]]
    names = {}
    exec(example, names)
    t = names["x"].clamp(0, 1)
    torch.testing.assert_close(names["y"], t * t * (3 - 2 * t))


REFUSED = [  # arguments, what the error shows
    (lambda x: (x, x, 0.5), r"scale\(SCALAR\* __restrict__ y, .*\) takes 4 arguments, got 3"),
    (lambda x: (x, x.double(), 0.5, 4), r"`const SCALAR\* x` takes a tensor of torch.float32, got torch.float64"),
    (lambda x: (x, x.reshape(2, 2).T, 0.5, 4), r"takes a contiguous tensor, got shape \(2, 2\) with strides \(1, 2\)"),
    (lambda x: (x, x.tolist(), 0.5, 4), r"`const SCALAR\* x` takes a tensor or None, got \[0.0"),
    (lambda x: (x, x, 0.5, 4.0), r"`long long n` takes a whole number, got 4.0"),
    (lambda x: (x, x, 0.5, 2**63), r"9223372036854775808 does not fit `long long n`"),
    (lambda x: (x, x, None, 4), r"`float factor` takes a number, got None"),
    (lambda x: (x, x, "0.5", 4), r"`float factor` takes a number, got '0.5'"),
    (lambda x: (x, x, 0.5, x), r"`long long n` takes a number, got a tensor of shape \(4,\)"),
    (lambda x: (x, x.to("meta"), 0.5, 4), r"tensors must be on one device, got cpu, meta"),
    (lambda x: (None, None, 0.5, 4), r"tensors must be on one device, got none"),
    (lambda x: (x.to("meta"), x.to("meta"), 0.5, 4), r"must be on a CUDA device or on the CPU, got meta"),
]


@pytest.mark.parametrize(("arguments", "shows"), REFUSED, ids=[shows for _, shows in REFUSED])
def test_arguments_that_do_not_fit_are_refused(arguments, shows):
    with pytest.raises(ValueError, match=shows):
        Kernel(SCALE, "scale", SCALAR=torch.float32)(1, 32, *arguments(torch.zeros(4)))


@pytest.mark.parametrize(
    ("grid", "block", "shared"),
    [(0, 32, 0), (1, 0, 0), (1, 1025, 0), (1, (64, 32), 0), (1, (1, 1, 65), 0), ((1, 65536), 1, 0), (1, 1, 50_000)],
)
def test_launches_that_cuda_would_refuse_are_refused_on_the_cpu(grid, block, shared):
    x = torch.zeros(4)
    with pytest.raises(ValueError, match=r"out of bounds|1024 threads and 49152 bytes"):
        Kernel(SCALE, "scale", SCALAR=torch.float32)(grid, block, x, x, 1.0, 4, shared_bytes=shared)


@pytest.mark.parametrize("name", ["decoy", "other"])
def test_a_function_that_is_not_there(name):
    with pytest.raises(ValueError, match=rf'no `extern "C" __global__ void {name}'):
        Kernel(SCALE, name, SCALAR=torch.float32)


@NEEDS_GPP
def test_numbers_travel_with_their_exact_types():
    source = """
    struct Pair { double first; int second; };
    extern "C" __global__ void exact(double* out, float f, double d, int i, unsigned int u, long long l, bool b,
                                     const Pair p, const float* none) {
        out[0] = f; out[1] = d; out[2] = i; out[3] = u; out[4] = l % 1000; out[5] = b; out[6] = p.first + p.second;
        out[7] = none == nullptr;
    }"""
    out = torch.zeros(8, dtype=torch.float64)
    pair = np.array([(0.5, 2)], dtype=np.dtype([("first", np.float64), ("second", np.int32)], align=True))
    exact = Kernel(source, "exact")
    exact(1, 1, out, 0.1, 0.1, -(2**31), 2**32 - 1, 2**62 + 7, True, pair, None)
    assert out.tolist() == [np.float32(0.1), 0.1, -(2**31), 2**32 - 1, (2**62 + 7) % 1000, 1, 2.5, 1]
    with pytest.raises(ValueError, match="argument 8 has 12 bytes"):  # packed, where C++ pads
        exact(1, 1, out, 1, 1, 1, 1, 1, True, np.zeros(1, [("first", np.float64), ("second", np.int32)]), None)


BLOCK_SUM = """
extern "C" __global__ void block_sum(float* out, const float* x, int n) {
    extern __shared__ float part[];
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    float mine = i < n ? x[i] : 0;
    for (int by = 16; by > 0; by /= 2) mine += __shfl_down_sync(0xffffffffu, mine, by);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = mine;
    __syncthreads();
    if (threadIdx.x < 32) {  // the other warps have left by now, or wait at nothing
        mine = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0;
        for (int by = 16; by > 0; by /= 2) mine += __shfl_xor_sync(0xffffffffu, mine, by);
        if (threadIdx.x == 0) atomicAdd(out, mine);
    }
}
"""


@on_every_device
def test_barriers_shuffles_shared_memory_and_atomics(device):
    torch.manual_seed(0)
    x, out = torch.randn(5000, device=device), torch.zeros(1, device=device)
    Kernel(BLOCK_SUM, "block_sum")(20, 256, out, x, x.numel(), shared_bytes=8 * 4)
    torch.testing.assert_close(out[0], x.sum(), rtol=1e-4, atol=1e-4)


@NEEDS_GPP
def test_a_missing_barrier_is_found():
    x, out = torch.randn(256, generator=torch.Generator().manual_seed(0)), torch.zeros(1)
    careless = BLOCK_SUM.replace("__syncthreads();", "")
    Kernel(careless, "block_sum")(1, 256, out, x, 256, shared_bytes=8 * 4)
    assert abs(out - x.sum()) > 1, "it happened to come out right: the order of the threads hides the bug"


@NEEDS_GPP
def test_a_barrier_that_not_all_reach_is_an_error_and_no_hang():
    # Half of a warp waits for the block, half for the warp: on a GPU neither would ever go on.
    source = """extern "C" __global__ void stuck(float* x) {
        if (threadIdx.x % 2) __syncthreads(); else __syncwarp();
    }"""
    with pytest.raises(RuntimeError, match="stuck: some threads of a block wait at a barrier"):
        Kernel(source, "stuck")(1, 64, torch.zeros(1))


@NEEDS_GPP
def test_blocks_on_several_cpu_threads_and_their_atomics():
    source = """extern "C" __global__ void count(int* out, float* sum, int* largest) {
        atomicAdd(out, 1); atomicAdd(sum, 0.5f); atomicMax(largest, (int)(blockIdx.y * gridDim.x + blockIdx.x));
    }"""
    out, total, largest = torch.zeros(1, dtype=torch.int32), torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        Kernel(source, "count")((300, 20), 32, out, total, largest)
    finally:
        torch.set_num_threads(before)
    assert (out.item(), total.item(), largest.item()) == (300 * 20 * 32, 300 * 20 * 16, 5999)


@NEEDS_GPP
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_on_the_cpu_rounds_as_torch_does(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)  # all there are
    source = """
    extern "C" __global__ void widen(float* y, const SCALAR* x, int n) { for (int i = 0; i < n; ++i) y[i] = x[i]; }
    extern "C" __global__ void narrow(SCALAR* y, const float* x, int n) { for (int i = 0; i < n; ++i) y[i] = x[i]; }
    """
    wide = torch.empty(every.shape)
    Kernel(source, "widen", SCALAR=dtype)(1, 1, wide, every, every.numel())
    torch.testing.assert_close(wide, every.float(), rtol=0, atol=0, equal_nan=True)

    torch.manual_seed(0)
    finite = wide[wide.isfinite()].sort().values
    halfway = (finite[1:] + finite[:-1]) / 2
    x = torch.cat(
        [wide, halfway, halfway.nextafter(torch.tensor(torch.inf)), torch.randn(10_000) * 10 ** torch.randn(1)]
    )
    x = torch.cat([x, torch.tensor([65519.0, 65520.0, 3.4e38, 1e-45, -0.0]), -x])
    narrow = torch.empty(x.shape, dtype=dtype)
    Kernel(source, "narrow", SCALAR=dtype)(1, 1, narrow, x, x.numel())
    torch.testing.assert_close(narrow, x.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(narrow.signbit()[~x.isnan()], x.signbit()[~x.isnan()])


@on_every_device
def test_the_compilers_words_name_file_and_line(device):
    source = 'extern "C" __global__ void f(float* x) {\n\nnot_declared = 1; }'
    with pytest.raises(RuntimeError, match=r"(?s)cannot compile the kernel:.*lesson.cu.3.*not_declared"):
        Kernel(source, "f", file="lesson.cu")(1, 1, torch.zeros(1, device=device))


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)


TRY = f"""
import torch
from reprise.kernels import Kernel
x = torch.ones(4)
try:
    Kernel({SCALE!r}, "scale", SCALAR=torch.float32)(1, 4, x, x.clone(), 3.0, 4)
    print(x.tolist())
except RuntimeError as error:
    print(error)
"""


@NEEDS_GPP
def test_compiled_once_and_kept_in_the_users_cache(tmp_path):
    times = []
    for _ in range(2):
        assert in_a_process(TRY, XDG_CACHE_HOME=str(tmp_path)).stdout == "[3.0, 3.0, 3.0, 3.0]\n"
        (made,) = (tmp_path / "reprise" / "kernels").iterdir()  # one file, and nothing left of its making
        times.append(made.stat().st_mtime_ns)
    assert times[0] == times[1]


@NEEDS_GPP
def test_a_home_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("where the folder should be")
    assert in_a_process(TRY, XDG_CACHE_HOME=str(tmp_path / "file")).stdout == "[3.0, 3.0, 3.0, 3.0]\n"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the message is that it needs Linux")
def test_without_gpp_one_line_says_what_to_install(tmp_path):
    told = in_a_process(TRY, PATH=str(tmp_path)).stdout
    assert told.splitlines() == [
        "kernels run on CPU tensors through g++, which is not installed (Debian, Ubuntu: apt install g++)"
    ]


def test_without_cupy_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(on_cuda, "_CUPY", False)
    with pytest.raises(RuntimeError, match=r"CuPy, which is not installed \(pip install 'cupy-cuda13x\[ctk\]'\)"):
        on_cuda.launch("", "f", (1, 1, 1), (1, 1, 1), [], 0, torch.device("cuda"))


def test_what_cupy_is_given(monkeypatch):
    """The CUDA path without a GPU, against a stand-in for CuPy: stream, device and arguments, nothing computed."""
    seen, entered = [], []

    @contextlib.contextmanager
    def entering(what):
        entered.append(what)
        yield
        entered.remove(what)

    class Module:
        def __init__(self, code, options):
            seen.append((code, options))

        def get_function(self, name):
            return lambda *launch, shared_mem: seen.append((name, launch, shared_mem, tuple(entered)))

    device, stream = torch.device("cuda:1"), types.SimpleNamespace(device_index=1)
    compiler = types.SimpleNamespace(CompileException=ValueError)
    cuda = types.SimpleNamespace(Stream=types.SimpleNamespace(from_external=entering), compiler=compiler)
    fakes = {"cupy": types.SimpleNamespace(RawModule=Module, cuda=cuda), "cupy.cuda": cuda}
    for name, module in (fakes | {"cupy.cuda.compiler": compiler}).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(on_cuda, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", entering)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda on: stream if on == device else None)
    # CuPy passes an array of one element by value, byte for byte; a bare Python number it would widen to 8 bytes.
    values = [np.array([7], np.uint64), np.array([0.5], np.float32)]
    for _ in range(2):
        on_cuda.launch("a source of this test", "f", (2, 1, 1), (32, 1, 1), values, 64, device)
    launched = ("f", ((2, 1, 1), (32, 1, 1), tuple(values)), 64, (device, stream))
    assert seen == [("a source of this test", ("-std=c++17",)), launched, launched], "compiled once"


@pytest.mark.gpu
def test_launches_follow_torchs_current_stream():
    x = torch.zeros(1 << 24, device="cuda")
    out = torch.empty_like(x)
    scale = Kernel(SCALE, "scale", SCALAR=torch.float32)
    scale(1, 32, out, x, 1.0, 1)  # compiled now
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(50):  # on another stream the kernel would overtake these
            x.add_(1)
        scale(1024, 256, out, x, 2.0, x.numel())
    side.synchronize()
    assert torch.equal(out, torch.full_like(out, 100))


def test_why_kernels_do_not_run_on_the_cpu_elsewhere(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert on_cpu.missing() == "kernels run on CPU tensors through GNU g++ on Linux only, this is darwin"
