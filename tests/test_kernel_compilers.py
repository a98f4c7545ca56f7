"""The ways from a source to a running kernel, g++ and CuPy: caches, errors, and words that say what to install."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from devices import NEEDS_GPP, on_every_device

from reprise.kernels import Kernel, on_cpu, on_cuda

DOUBLE_IT = 'extern "C" __global__ void double_it(float* x, int n) { if (threadIdx.x < n) x[threadIdx.x] *= 2; }'


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
    Kernel({DOUBLE_IT!r}, "double_it")(1, 4, x, 4)
    print(x.tolist())
except RuntimeError as error:
    print(error)
"""


@NEEDS_GPP
def test_compiled_once_and_kept_in_the_users_cache(tmp_path):
    times = []
    for _ in range(2):
        assert in_a_process(TRY, XDG_CACHE_HOME=str(tmp_path)).stdout == "[2.0, 2.0, 2.0, 2.0]\n"
        (made,) = (tmp_path / "reprise" / "kernels").iterdir()  # one file, and nothing left of its making
        times.append(made.stat().st_mtime_ns)
    assert times[0] == times[1]


@NEEDS_GPP
def test_a_home_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("where the folder should be")
    assert in_a_process(TRY, XDG_CACHE_HOME=str(tmp_path / "file")).stdout == "[2.0, 2.0, 2.0, 2.0]\n"


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


def test_why_kernels_do_not_run_on_the_cpu_elsewhere(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert on_cpu.missing() == "kernels run on CPU tensors through GNU g++ on Linux only, this is darwin"
