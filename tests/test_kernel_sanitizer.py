"""The kernels under g++'s address sanitizer: no read or write outside of a tensor, and a planted one is found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from devices import NEEDS_GPP

pytestmark = NEEDS_GPP

EVERYTHING = """
import torch
from torch import nan, inf
from reprise.kernels import adam_step, batch_norm, parzen, warp, warping, Kernel

# Sizes beside every edge of a tile, of a warp and of a block; positions inside, outside, and nowhere.
images = (1, 1, 1, 1), (2, 3, 5, 7), (1, 2, 1, 40), (3, 1, 9, 1)
for shape, target in zip(images, [(1, 1), (9, 33), (7, 31), (8, 32)]):
    for dtype in (torch.float32, torch.float16):
        image = torch.randn(shape).to(dtype).requires_grad_()
        flow = torch.randn(shape[0], 2, *target) * 5
        flow.view(-1)[::3] = flow.view(-1)[::3].round()
        for place, value in enumerate((nan, inf, -inf, 3e38, -3e38, 2.0**31, -(2.0**31))):
            flow.view(-1)[place % flow.numel()] = value
        warp(image, flow.requires_grad_()).sum().backward()

for shape in [(2, 3), (5, 1, 7), (3, 2, 16, 16), (300, 2, 7, 9)]:
    x = torch.randn(shape, requires_grad=True)
    batch_norm(x, torch.ones(shape[1], requires_grad=True), torch.zeros(shape[1]))[0].sum().backward()

for size in (1, 255, 1025, 4096, 4097):
    params, grads, m, v, largest = ([torch.rand(size), torch.rand(3)] for _ in range(5))
    for maxima in (None, largest):
        adam_step(params, grads, m, v, maxima, 1, lr=0.1, amsgrad=maxima is not None)

for points, samples, size in [(1, 1, 1), (65, 63, 15), (3, 130, 17), (64, 64, 16)]:
    for dtype in (torch.float32, torch.float16, torch.float64):
        x, y = (torch.randn(n, size).to(dtype) for n in (points, samples))
        parzen(x, y, torch.rand(5))
print("done")
"""
# The thread that has no pixel writes all the same.
PLANTED = """
import torch
from reprise.kernels import Kernel, warping
broken = warping._SOURCE.replace("if (x >= out_width || y >= out_height) return;", "", 1)
assert broken != warping._SOURCE
warping._kernel = lambda name, i, f: Kernel(broken, name, file="warp.cu", IMAGE=i, FLOW=f, REAL=torch.float32)
warping.warp(torch.zeros(1, 1, 5, 5), torch.zeros(1, 2, 5, 5))
print("done")
"""


def sanitized(program: str, cache: Path) -> subprocess.CompletedProcess:
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(library).exists():
        pytest.skip("needs libasan, which this g++ comes without")
    environment = {
        "REPRISE_GPP_FLAGS": "-fsanitize=address -g -O1",
        "LD_PRELOAD": str(Path(library).resolve()),  # it must be there before Python asks for memory
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "XDG_CACHE_HOME": str(cache),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


def test_no_kernel_leaves_its_tensors(tmp_path):
    told = sanitized(EVERYTHING, tmp_path)
    assert "AddressSanitizer" not in told.stderr, told.stderr[:3000]
    assert (told.stdout, told.returncode) == ("done\n", 0), told.stderr[:3000]


def test_a_planted_write_outside_is_found_with_its_line(tmp_path):
    told = sanitized(PLANTED, tmp_path)
    assert told.returncode != 0
    assert "done" not in told.stdout
    assert "AddressSanitizer: heap-buffer-overflow" in told.stderr
    assert "warp.cu:" in told.stderr
    shutil.rmtree(tmp_path, ignore_errors=True)
