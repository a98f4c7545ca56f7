"""The launcher: arguments of the right types, launches within bounds, and what CUDA has that the CPU has to mimic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from devices import NEEDS_GPP, on_every_device

from reprise import kernels
from reprise.kernels import Kernel

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
    (lambda x: (x, x, np.array([0.5]), 4), r"`float factor` takes a number, got array\(\[0.5\]\)"),
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
    [
        (0, 32, 0),
        (2.5, 32, 0),
        ((1, 1, 1, 1), 32, 0),
        (1, 0, 0),
        (1, 1025, 0),
        (1, (64, 32), 0),
        (1, (1, 1, 65), 0),
        ((1, 65536), 1, 0),
        (1, 1, 50_000),
    ],
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


@on_every_device
def test_four_floats_at_once(device):
    source = """extern "C" __global__ void reversed(float* y, const float* x) {
        const float4 v = reinterpret_cast<const float4*>(x)[threadIdx.x];
        reinterpret_cast<float4*>(y)[threadIdx.x] = make_float4(v.w, v.z, v.y, v.x);
    }"""
    x = torch.arange(32.0, device=device)
    y = torch.empty_like(x)
    Kernel(source, "reversed")(1, 8, y, x)
    assert torch.equal(y, x.view(8, 4).flip(1).flatten())


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


TREE_SUM = """
extern "C" __global__ void tree_sum(float* out, const float* x) {
    __shared__ float sums[64];
    const int t = threadIdx.x;
    sums[t] = x[t];
    __syncthreads();  // before
    for (int half = 32; half > 0; half /= 2) {
        if (t < half) sums[t] += sums[t + half];
        __syncthreads();  // within
    }
    if (t == 0) *out = sums[0];
}
"""


@NEEDS_GPP
@pytest.mark.parametrize("barrier", ["before", "within"])
def test_either_barrier_of_a_tree_of_sums_is_missed(barrier):
    x, out = torch.arange(64.0), torch.zeros(1)
    Kernel(TREE_SUM, "tree_sum")(1, 64, out, x)
    assert out == x.sum()
    Kernel(TREE_SUM.replace(f"__syncthreads();  // {barrier}", ""), "tree_sum")(1, 64, out, x)
    assert out != x.sum(), "it happened to come out right: the order of the threads hides the bug"


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
