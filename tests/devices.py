"""Where the tests of kernels run: on the CPU through g++, and on a GPU where there is one. The same tests."""

import pytest

from reprise.kernels import on_cpu

NEEDS_GPP = pytest.mark.skipif(on_cpu.missing() is not None, reason=on_cpu.missing() or "")
DEVICES = [pytest.param("cpu", marks=NEEDS_GPP), pytest.param("cuda", marks=pytest.mark.gpu)]
on_every_device = pytest.mark.parametrize("device", DEVICES)
