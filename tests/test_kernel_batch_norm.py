"""``reprise.kernels.batch_norm`` against ``torch.nn.functional.batch_norm``, on the CPU through g++ and on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from devices import NEEDS_GPP, on_every_device, plant
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck

import reprise.functional
from reprise.kernels import Kernel, batch_norm, normalising

DOUBLE = torch.float64
# Two dimensions to five; planes smaller than a warp and than a block; several blocks for a channel; many channels.
SHAPES = [
    (7, 3),
    (2, 5),
    (4, 3, 6),
    (5, 3, 4, 6),
    (1, 2, 3, 3),
    (2, 2, 2, 3, 2),
    (300, 2, 7, 9),
    (3, 1, 50, 41),
    (2, 300),
]


def case(shape, dtype=DOUBLE, device="cpu", offset=3.0) -> list[Tensor]:
    """Input, weight and bias."""
    torch.manual_seed(len(shape))
    x = 2 * torch.randn(shape, dtype=DOUBLE) + offset
    return [t.to(device, dtype) for t in (x, torch.randn(shape[1], dtype=DOUBLE), torch.randn(shape[1], dtype=DOUBLE))]


def results(function, x: Tensor, *affine: Tensor | None) -> list[Tensor]:
    """Output and gradients of everything that was given."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, *affine)]
    y = function(*leaves)
    torch.manual_seed(1)
    slope = (torch.randn(y.shape, dtype=DOUBLE) * 16).round().div(16).to(y)  # the same number in every dtype
    return [y.detach(), *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], slope)]


def ours(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return batch_norm(x, weight, bias)[0]


def theirs(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True)


def compare(x: Tensor, weight: Tensor | None, bias: Tensor | None, rtol=1e-9, atol=1e-10) -> None:
    for actual, expected in zip(results(ours, x, weight, bias), results(theirs, x, weight, bias), strict=True):
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@on_every_device
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, device):
    x, weight, bias = case(shape, device=device)
    compare(x, weight, bias)
    y, mean, var = batch_norm(x, weight, bias)
    assert y.is_contiguous()
    others = [d for d in range(x.dim()) if d != 1]
    expected_var, expected_mean = torch.var_mean(x, others, correction=0)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(var, expected_var, rtol=1e-11, atol=1e-12)
    assert not mean.requires_grad


@on_every_device
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_without_weight_or_bias(weighted, biased, device):
    x, weight, bias = case((5, 3, 4, 6), device=device)
    compare(x, weight if weighted else None, bias if biased else None)


@on_every_device
@pytest.mark.parametrize("dtype", normalising.FLOATS, ids=str)
@pytest.mark.parametrize("parameters", [None, torch.float32], ids=["same", "float32"])
def test_every_type(dtype, parameters, device):
    x, weight, bias = case((30, 4, 5, 7), dtype, device)
    weight, bias = weight.to(parameters or dtype), bias.to(parameters or dtype)
    actual = results(ours, x, weight, bias)
    exact = results(theirs, x.double(), weight.double(), bias.double())
    assert [t.dtype for t in actual] == [dtype, dtype, weight.dtype, bias.dtype]
    for value, reference in zip(actual, exact, strict=True):
        rounding = torch.finfo(value.dtype).eps + 20 * torch.finfo(normalising.real_dtype(dtype)).eps
        assert (value.double() - reference).abs().max() <= rounding * reference.abs().max()


@on_every_device
@pytest.mark.parametrize(("offset", "allowed"), [(1e3, 1e-5), (1e5, 1e-3)])
def test_the_variance_survives_a_large_mean(offset, allowed, device):
    # The mean of squares minus the square of the mean has no correct digit here, in float32.
    x, _, _ = case((64, 2, 8, 8), torch.float32, device, offset)
    _, mean, var = batch_norm(x)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    textbook = x.square().mean((0, 2, 3)) - x.mean((0, 2, 3)).square()
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=0)
    assert ((var - exact_var) / exact_var).abs().max() < allowed
    assert ((textbook - exact_var) / exact_var).abs().max() > 100 * ((var - exact_var) / exact_var).abs().max()


@on_every_device
def test_exact_properties(device):
    x, weight, bias = case((50, 3, 4, 6), device=device)
    y, _, _ = batch_norm(x, eps=0.0)
    zeros, ones = torch.zeros(3, dtype=DOUBLE, device=device), torch.ones(3, dtype=DOUBLE, device=device)
    torch.testing.assert_close(y.mean((0, 2, 3)), zeros, rtol=0, atol=1e-12)
    torch.testing.assert_close(y.square().mean((0, 2, 3)), ones)
    # Scale and shift of the input leave no trace (section 3.3), and so the gradient is at right angles to both.
    torch.testing.assert_close(batch_norm(7 * x + 5, eps=0.0)[0], y)
    leaf = x.clone().requires_grad_()
    slope = torch.randn_like(x)
    (grad,) = torch.autograd.grad(batch_norm(leaf, weight, bias, 0.0)[0], leaf, slope)
    torch.testing.assert_close(grad.sum((0, 2, 3)), zeros, rtol=0, atol=1e-11)
    torch.testing.assert_close((grad * x).sum((0, 2, 3)), zeros, rtol=0, atol=1e-10)


@on_every_device
def test_a_constant_channel(device):
    x = torch.full((4, 2, 3), 7.0, device=device)
    y, mean, var = batch_norm(x, torch.ones(2, device=device), torch.full((2,), 5.0, device=device))
    assert y.unique().tolist() == [5]
    assert (mean.tolist(), var.tolist()) == ([7, 7], [0, 0])


@on_every_device
def test_nan_and_infinity_stay_in_their_channel(device):
    x, weight, bias = case((50, 4, 3, 3), torch.float32, device)
    x[3, 1, 0, 0], x[8, 2, 1, 1] = torch.nan, torch.inf
    y, to_x, to_weight, to_bias = results(ours, x, weight, bias)
    for tensor in (y, to_x):
        assert tensor.isfinite().all(0).all(-1).all(-1).tolist() == [True, False, False, True]
    assert to_weight.isfinite().tolist() == [True, False, False, True]
    assert to_bias.isfinite().all()


LAYOUTS = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
    "every second": lambda x: x[::2, ::2, 1::2],
    "expanded": lambda x: x[:, :, :1].expand_as(x),
}


@on_every_device
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_in_memory(layout, device):
    x = LAYOUTS[layout](case((6, 4, 5, 7), device=device)[0])
    compare(x, *case(tuple(x.shape), device=device)[1:])
    leaf = x.detach().requires_grad_()  # the gradient of a sum is expanded from one number, and its result is zero
    (grad,) = torch.autograd.grad(batch_norm(leaf)[0].sum(), leaf)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-12)


@on_every_device
def test_the_same_in_every_run(device):
    x, weight, bias = case((300, 2, 7, 9), torch.float32, device)
    first, second = (results(ours, x, weight, bias) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


REFUSED = [
    (lambda x, w: (x[0, :, 0], w), r"input \(N, C, ...\), got torch.float32 \(3,\)"),
    (lambda x, w: (x.int(), w), r"torch.int32 \(4, 3, 2\)"),
    (lambda x, w: (x[:0], w), r"1 to 2\^30 values along a dimension, got shape \(0, 3, 2\)"),
    (lambda x, w: (x, w[:2]), r"a weight of shape \(3,\) on cpu, got torch.float32 \(2,\) on cpu"),
    (lambda x, w: (x, w.to("meta")), r"a weight of shape \(3,\) on cpu, got .* on meta"),
]


@pytest.mark.parametrize(("spoil", "shows"), REFUSED, ids=[shows for _, shows in REFUSED])
def test_what_does_not_fit_is_refused(spoil, shows):
    with pytest.raises(ValueError, match=shows):
        batch_norm(*spoil(torch.zeros(4, 3, 2), torch.ones(3)))


@on_every_device
@pytest.mark.parametrize("affine", [True, False])
def test_gradients_against_finite_differences(affine, device):
    x, weight, bias = (t.requires_grad_() for t in case((4, 2, 3), device=device))
    leaves = (x, weight, bias) if affine else (x,)
    assert gradcheck(lambda *given: batch_norm(*given)[0], leaves)


@on_every_device
def test_a_second_derivative_is_an_error(device):
    x = case((4, 2, 3), device=device)[0].requires_grad_()
    (slope,) = torch.autograd.grad(batch_norm(x)[0].pow(3).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        slope.sum().backward()


@on_every_device
def test_as_an_operator_of_torch(device):
    x, weight, bias = (t.requires_grad_() for t in case((4, 2, 3), device=device))
    opcheck(torch.ops.reprise.batch_norm.default, (x, weight, bias, 1e-5))
    opcheck(torch.ops.reprise.batch_norm.default, (x, None, None, 1e-5))
    x, weight = x.detach(), weight.detach()
    var, mean = torch.var_mean(x, (0, 2), correction=0)
    arguments = (torch.randn_like(x), x, mean, var, weight, 1e-5)
    opcheck(torch.ops.reprise.batch_norm_backward.default, arguments, test_utils=("test_schema", "test_faketensor"))


@on_every_device
def test_compiled_by_torch_in_one_graph(device):
    given = case((4, 3, 5), device=device)

    def layer(x, weight, bias):
        return batch_norm(x * 2, weight, bias)[0].relu()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for actual, eager in zip(results(compiled, *given), results(layer, *given), strict=True):
        torch.testing.assert_close(actual, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
def test_training_on_a_gpu_goes_through_the_kernel(monkeypatch):
    calls = []
    kernel = batch_norm
    monkeypatch.setattr(reprise.functional.kernels, "batch_norm", lambda *given: calls.append(given) or kernel(*given))
    x, weight, bias = case((6, 3, 4, 4), torch.float32, "cuda")
    statistics = [torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")]
    expected = [t.clone() for t in statistics]
    y = reprise.functional.batch_norm(x, *statistics, weight, bias, training=True)
    torch.testing.assert_close(y, F.batch_norm(x, *expected, weight, bias, training=True), rtol=1e-4, atol=1e-5)
    for ours_, theirs_ in zip(statistics, expected, strict=True):
        torch.testing.assert_close(ours_, theirs_)
    assert len(calls) == 1
    reprise.functional.batch_norm(x, *statistics, weight, bias, training=False)
    assert len(calls) == 1, "evaluation is an affine map, for which torch needs no help"


@NEEDS_GPP
def test_functional_takes_running_statistics_from_the_kernel(monkeypatch):
    """What the CUDA path of ``functional.batch_norm`` does beside the kernel, with the kernel on the CPU."""
    monkeypatch.setattr(reprise.functional.on_cuda, "usable", lambda tensor: True)
    x, weight, bias = case((6, 3, 4, 4))
    statistics, expected = ([torch.zeros(3), torch.ones(3)] for _ in range(2))
    y = reprise.functional.batch_norm(x, *statistics, weight, bias, training=True, momentum=0.3)
    torch.testing.assert_close(y, F.batch_norm(x, *[t.double() for t in expected], weight, bias, True))
    F.batch_norm(x.float(), *expected, training=True, momentum=0.3)
    torch.testing.assert_close(statistics, expected)


@NEEDS_GPP
def test_places_beyond_2_to_the_31():
    # The kernel's own walk through a channel, asked by a probe: a tensor of that size would take minutes here.
    probe = """
    extern "C" __global__ void probe(long long* out, int batch, int channels, int size,
                                     long long first, long long step) {
        Walk w = walk(batch, channels, size, channels - 1, first, step);
        out[0] = w.index(); w.advance(); out[1] = w.index(); w.advance(); out[2] = w.index(); out[3] = w.inside();
        for (int i = 0; i < 3; ++i) w.advance();
        out[4] = w.inside();
    }"""
    kernel = Kernel(normalising._SOURCE + probe, "probe", SCALAR="float", REAL="float", THREADS=32)
    batch, channels, size, first, step = 100_000, 1000, 49, 3_000_000, 900_000
    out = torch.zeros(5, dtype=torch.int64)
    kernel(1, 1, out, batch, channels, size, first, step)
    places = [first + i * step for i in range(3)]
    assert out[:3].tolist() == [((i // size) * channels + channels - 1) * size + i % size for i in places]
    assert out[2] > 2**31
    assert out[3:].tolist() == [1, first + 5 * step < batch * size and 1]


@NEEDS_GPP
@pytest.mark.parametrize(
    "change",
    [
        ("s -= size; ++n;", "s -= size;"),
        ("apart * apart * a.count", "apart * a.count"),
        ("* tilt", "* level"),
        ("__syncthreads();\n    for", "for"),  # found since the CPU shuffles threads at every barrier
        ("        }\n        __syncthreads();\n", "        }\n"),
    ],
)
def test_these_tests_find_planted_bugs(change, monkeypatch):
    plant(monkeypatch, normalising, *change)
    with pytest.raises(AssertionError):
        test_values_and_gradients((300, 2, 7, 9), "cpu")
