"""``reprise.nn.BatchNorm1d/2d`` and ``reprise.functional.batch_norm`` against PyTorch's own."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import reprise.nn
from reprise.functional import batch_norm

SHAPES = [(7, 3), (2, 5), (4, 3, 6), (1, 2, 9), (5, 3, 4, 6), (2, 1, 1, 8), (1, 4, 3, 3), (64, 10, 2, 2)]
CLOSE = {torch.float64: {"rtol": 1e-9, "atol": 1e-11}, torch.float32: {"rtol": 2e-4, "atol": 2e-5}}
OPTIONS = [
    {"momentum": momentum, "affine": affine, "track_running_stats": track}
    for momentum, affine, track in itertools.product((0.1, None, 1.0, 0.0), (True, False), (True, False))
    if track or momentum == 0.1
]


def pair(shape: tuple[int, ...], **options) -> tuple[nn.Module, nn.Module]:
    """Our layer and torch's with the same parameters, none of them at its initial value."""
    kind = "BatchNorm2d" if len(shape) == 4 else "BatchNorm1d"
    ours, theirs = getattr(reprise.nn, kind)(shape[1], **options), getattr(nn, kind)(shape[1], **options)
    for name, tensor in theirs.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(
                torch.rand(tensor.shape) + 0.5 if "var" in name or name == "weight" else torch.randn(tensor.shape)
            )
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def results(layer: nn.Module, x: torch.Tensor, slope: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, gradients of input and parameters, and buffers after a step."""
    layer.zero_grad()
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(leaf)
    y.backward(slope)
    gradients = {f"{name}.grad": parameter.grad for name, parameter in layer.named_parameters()}
    return {"y": y.detach(), "x.grad": leaf.grad, **gradients, **layer.state_dict()}


def compare(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    slope = torch.randn(x.shape, dtype=torch.float64).to(x)  # at a constant slope the input's gradient would be zero
    actual, expected = results(ours, x, slope), results(theirs, x, slope)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, **CLOSE[x.dtype], msg=lambda text, name=name: f"{name}: {text}")


def steps(ours: nn.Module, theirs: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> None:
    ours, theirs = ours.to(device, dtype), theirs.to(device, dtype)
    for scale, offset in ((1, 0), (3, 10), (0.1, -2)):
        x = (scale * torch.randn(shape, dtype=torch.float64) + offset).to(device, dtype)
        compare(ours, theirs, x)
    ours.eval(), theirs.eval()
    compare(ours, theirs, x)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_torch(shape, options):
    torch.manual_seed(len(shape))
    ours, theirs = pair(shape, **options)
    steps(ours, theirs, shape, torch.float64)
    if options["track_running_stats"]:
        assert ours.num_batches_tracked == 3
    else:
        assert ours.running_mean is None


def check_half(shape: tuple[int, ...], dtype: torch.dtype, parameters: torch.dtype, device: str = "cpu") -> None:
    """Half precision differs from torch's by rounding; held against float64, ours is no less exact."""
    torch.manual_seed(0)
    ours, theirs = (layer.to(device, parameters) for layer in pair(shape))
    exact = copy.deepcopy(theirs).double()
    x, slope = (torch.randn(shape).to(device, dtype) for _ in range(2))
    references = results(exact, x.double(), slope.double())
    actual, expected = results(ours, x, slope), results(theirs, x, slope)
    for name, reference in references.items():
        assert actual[name].dtype == expected[name].dtype, name
        size, rounding = reference.abs().max(), torch.finfo(dtype).eps
        error, allowed = ((tensors[name].double() - reference).abs().max() for tensors in (actual, expected))
        assert error <= max(1.1 * allowed, rounding * size), name


HALF = [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize(("dtype", "parameters"), HALF, ids=str)
@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 6), (5, 3, 4, 6), (64, 10, 2, 2)], ids=str)
def test_half_precision(shape, dtype, parameters):
    check_half(shape, dtype, parameters)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_single_precision(shape):
    torch.manual_seed(0)
    steps(*pair(shape), shape, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_a_gpu(shape):
    for dtype in CLOSE:
        torch.manual_seed(0)
        steps(*pair(shape), shape, dtype, "cuda")
    for dtype, parameters in HALF:
        check_half(shape, dtype, parameters, "cuda")


LAYOUTS = {
    "transposed": lambda: torch.randn(3, 6, dtype=torch.float64).T,
    "every second": lambda: torch.randn(8, 6, 10, dtype=torch.float64)[::2, ::2, 1::3],
    "channels last": lambda: torch.randn(4, 3, 5, 5, dtype=torch.float64).to(memory_format=torch.channels_last),
    "expanded": lambda: torch.randn(4, 3, 1, 5, dtype=torch.float64).expand(4, 3, 6, 5),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_in_memory(layout):
    torch.manual_seed(0)
    x = LAYOUTS[layout]()
    assert not x.is_contiguous()
    ours, theirs = pair(x.shape)
    compare(ours.double(), theirs.double(), x)


def test_statistics_switched_off_later():
    # Known from fine-tuning: buffers stay where they are, training goes by the batch, evaluation by the buffers.
    torch.manual_seed(0)
    ours, theirs = pair((6, 3))
    ours.track_running_stats = theirs.track_running_stats = False
    steps(ours, theirs, (6, 3), torch.float64)
    assert ours.num_batches_tracked == 0


@pytest.mark.filterwarnings("ignore:var_mean")  # torch warns, rightly, that an empty batch has no variance
def test_an_empty_batch():
    ours, theirs = pair((5, 3, 4, 4))
    compare(ours, theirs, torch.zeros(0, 3, 4, 4))


def test_state_dicts_are_exchangeable():
    for kind in ("BatchNorm1d", "BatchNorm2d"):
        ours, theirs = getattr(reprise.nn, kind)(4), getattr(nn, kind)(4)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), f"{name} starts as torch's"
        assert isinstance(ours, type(theirs))
        theirs.weight.data.fill_(3)
        theirs.num_batches_tracked.fill_(9)
        ours.load_state_dict(theirs.state_dict())
        assert (ours.weight[0], ours.num_batches_tracked) == (3, 9)
        ours.running_var.fill_(7)
        theirs.load_state_dict(ours.state_dict())
        assert theirs.running_var[0] == 7


@pytest.mark.parametrize("shape", [(5, 2), (3, 2, 4), (2, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_first_and_second_derivatives(shape, training):
    torch.manual_seed(0)
    options = {"dtype": torch.float64}
    mean, var = torch.randn(2, **options), torch.rand(2, **options) + 0.5
    leaves = [torch.randn(size, **options, requires_grad=True) for size in (shape, (2,), (2,))]

    def transform(x, weight, bias):
        # Copies, since training updates its running statistics in place.
        return batch_norm(x, mean.clone(), var.clone(), weight, bias, training)

    assert gradcheck(transform, leaves)
    assert gradgradcheck(transform, leaves)


@pytest.mark.parametrize("function", [batch_norm, F.batch_norm], ids=["ours", "torch"])
def test_functional_arguments_are_torchs(function):
    x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    mean, var = torch.zeros(2), torch.ones(2)
    y = function(x, mean, var, torch.full((2,), 2.0), torch.ones(2), True, 0.5, 1.0)
    expected = 1 + 2 * (x - x.mean(0)) / (torch.tensor([1.0, 100.0]) + 1.0).sqrt()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(mean, torch.tensor([1.0, 10.0]))
    torch.testing.assert_close(var, torch.tensor([1.5, 100.5]))  # unbiased: 2 and 200
    y = function(x, mean, var, eps=0.0)
    torch.testing.assert_close(y, (x - torch.tensor([1.0, 10.0])) / torch.tensor([1.5, 100.5]).sqrt())


REFUSED = [  # layer, shape, mode, what the error shows
    ("BatchNorm1d", (1, 3), "train", r"one value per channel \(input of shape \(1, 3\)\)"),
    ("BatchNorm2d", (1, 3, 1, 1), "train", r"one value per channel \(input of shape \(1, 3, 1, 1\)\)"),
    ("BatchNorm1d", (4, 2), "train", r"BatchNorm1d\(3\) expects 3 channels .* shape \(4, 2\)"),
    ("BatchNorm2d", (4, 5, 2, 2), "eval", r"BatchNorm2d\(3\) expects 3 channels .* shape \(4, 5, 2, 2\)"),
    ("BatchNorm1d", (4, 3, 2, 2), "train", r"expected 2D or 3D input \(got 4D input\)"),
    ("BatchNorm2d", (4, 3), "train", r"expected 4D input \(got 2D input\)"),
]


@pytest.mark.parametrize(("kind", "shape", "mode", "shows"), REFUSED)
def test_wrong_inputs_are_refused_with_their_shape(kind, shape, mode, shows):
    layer = getattr(reprise.nn, kind)(3)
    getattr(layer, mode)()
    with pytest.raises(ValueError, match=shows):
        layer(torch.ones(shape))
    assert (layer.running_mean.tolist(), layer.running_var.tolist()) == ([0, 0, 0], [1, 1, 1])
    # Torch refuses the same inputs, with an error of its own.
    with pytest.raises((ValueError, RuntimeError)):
        getattr(getattr(nn, kind)(3), mode)()(torch.ones(shape))


def test_one_value_per_channel_is_no_problem_when_evaluating():
    layer = reprise.nn.BatchNorm1d(3).eval()
    torch.testing.assert_close(layer(torch.ones(1, 3)), torch.full((1, 3), (1 + 1e-5) ** -0.5))


def test_evaluation_without_statistics_is_refused():
    with pytest.raises(ValueError, match="needs running_mean and running_var"):
        batch_norm(torch.ones(4, 3), None, None)
