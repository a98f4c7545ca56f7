"""Where the tests of kernels run: on the CPU through g++, and on a GPU where there is one. The same tests.

And whether they would notice: ``plant`` changes a kernel's source for one of them.
"""

from types import ModuleType

import pytest

from reprise.kernels import on_cpu

NEEDS_GPP = pytest.mark.skipif(on_cpu.missing() is not None, reason=on_cpu.missing() or "")
DEVICES = [pytest.param("cpu", marks=NEEDS_GPP), pytest.param("cuda", marks=pytest.mark.gpu)]
on_every_device = pytest.mark.parametrize("device", DEVICES)


def plant(monkeypatch: pytest.MonkeyPatch, module: ModuleType, before: str, after: str) -> None:
    """A bug in the source of a kernel's module, until the test ends."""
    assert before in module._SOURCE
    monkeypatch.setattr(module, "_SOURCE", module._SOURCE.replace(before, after))
    monkeypatch.setattr(module, "_kernel", module._kernel.__wrapped__)  # past what it remembers
