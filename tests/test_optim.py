"""``reprise.optim`` against ``torch.optim``, against the paper's lines in NumPy, and as optimisers have to behave."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from devices import NEEDS_GPP
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from reprise import optim
from reprise.optim import Adam, AdaMax

SHAPES = [(), (7,), (3, 4), (2, 3, 2, 2)]
EXACT = {"rtol": 1e-13, "atol": 1e-15}
OPTIONS = [
    {},
    {"lr": 0.1, "betas": (0.0, 0.5), "eps": 1e-3},
    {"weight_decay": 0.1},
    {"amsgrad": True},
    {"maximize": True},
    {"weight_decay": 0.01, "amsgrad": True, "maximize": True, "betas": (0.5, 0.9)},
]


def parameters(shapes=SHAPES, dtype=torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def twins(ours, theirs, params: list[nn.Parameter], **options):
    """The two optimisers, each with a copy of the parameters."""
    return ours(copy.deepcopy(params), **options), theirs(copy.deepcopy(params), **options)


def params_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def same_steps(*optimizers: torch.optim.Optimizer, steps: int, absent: float = 0.0) -> None:
    """Steps of all optimisers on the same random gradients of very different sizes, some of them left out."""
    for _ in range(steps):
        for ps in zip(*map(params_of, optimizers), strict=True):
            gradient = torch.randn_like(ps[0]) * float(10 ** (6 * torch.rand(()) - 4))
            if torch.rand(()) < absent:
                gradient = None
            for p in ps:
                p.grad = gradient
        for optimizer in optimizers:
            optimizer.step()


def assert_same(ours, theirs, **close) -> None:
    for mine, other in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(mine, other, **(close or EXACT))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_adam_is_torchs_adam_over_hundreds_of_steps(options):
    torch.manual_seed(0)
    ours, theirs = twins(Adam, torch.optim.Adam, parameters(), **options)
    start = copy.deepcopy(params_of(ours))
    same_steps(ours, theirs, steps=400, absent=0.2)
    assert_same(ours, theirs)
    assert all((p - q).abs().min() > 1e-4 for p, q in zip(params_of(ours), start, strict=True)), "nothing moved"
    for mine, other in zip(params_of(ours), params_of(theirs), strict=True):
        assert ours.state[mine].keys() == theirs.state[other].keys()
        for name, value in ours.state[mine].items():
            torch.testing.assert_close(value, theirs.state[other][name], **EXACT)


def test_adam_moves_complex_parameters_as_torchs_does():
    torch.manual_seed(0)
    ours, theirs = twins(Adam, torch.optim.Adam, parameters(dtype=torch.complex128), lr=0.01)
    same_steps(ours, theirs, steps=50)
    assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adam_in_few_digits(dtype):
    torch.manual_seed(0)
    ours, theirs = twins(Adam, torch.optim.Adam, parameters(dtype=dtype), lr=0.01)
    same_steps(ours, theirs, steps=20)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    assert_same(ours, theirs, **close)


def test_groups_have_their_own_hyperparameters():
    torch.manual_seed(0)
    first, second, third = (parameters() for _ in range(3))

    def groups():
        one = {"params": copy.deepcopy(first), "lr": 0.1, "amsgrad": True}
        return [one, {"params": copy.deepcopy(second), "betas": (0.1, 0.2), "weight_decay": 0.3}]

    ours, theirs = Adam(groups(), lr=0.01), torch.optim.Adam(groups(), lr=0.01)
    for optimizer in (ours, theirs):
        optimizer.add_param_group({"params": copy.deepcopy(third), "maximize": True, "eps": 0.1})
    same_steps(ours, theirs, steps=50)
    assert_same(ours, theirs)


@pytest.mark.parametrize("bias_correction", [True, False])
def test_without_bias_correction(bias_correction):
    """The paper's lines in NumPy; torch cannot leave the correction out."""
    torch.manual_seed(0)
    beta1, beta2, lr, eps = 0.8, 0.95, 0.01, 1e-3
    p = nn.Parameter(torch.randn(50, dtype=torch.float64))
    optimizer = Adam([p], lr, (beta1, beta2), eps, bias_correction=bias_correction)
    theta, m, v = p.detach().numpy().copy(), 0.0, 0.0
    for t in range(1, 200):
        p.grad = torch.randn_like(p)
        g = p.grad.numpy()
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        correct1, correct2 = (1 - beta1**t, 1 - beta2**t) if bias_correction else (1, 1)
        theta -= lr * (m / correct1) / (np.sqrt(v / correct2) + eps)
        optimizer.step()
        np.testing.assert_allclose(p.detach().numpy(), theta, rtol=1e-12, atol=1e-14)


def test_states_are_interchangeable_with_torchs():
    torch.manual_seed(0)
    ours, theirs = twins(Adam, torch.optim.Adam, parameters(), lr=0.01, amsgrad=True)
    same_steps(ours, theirs, steps=10)
    start = copy.deepcopy(params_of(ours))
    mine, other = Adam(copy.deepcopy(start)), torch.optim.Adam(copy.deepcopy(start))
    mine.load_state_dict(theirs.state_dict())
    other.load_state_dict(ours.state_dict())
    same_steps(mine, other, steps=50)
    assert_same(mine, other)
    assert mine.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("kind", [Adam, AdaMax])
def test_a_saved_state_continues_bit_for_bit(kind, tmp_path):
    torch.manual_seed(0)
    original = kind(parameters(dtype=torch.float32), lr=0.01)
    same_steps(original, steps=10)
    torch.save(original.state_dict(), tmp_path / "state.pt")
    restored = kind(copy.deepcopy(params_of(original)))
    restored.load_state_dict(torch.load(tmp_path / "state.pt"))
    same_steps(original, restored, steps=50)
    for mine, other in zip(params_of(original), params_of(restored), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: LambdaLR(optimizer, lambda epoch: 1 / math.sqrt(epoch + 1)),
        lambda optimizer: CosineAnnealingLR(optimizer, T_max=20),
        lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=40),  # moves beta1, too
    ],
)
def test_schedulers_drive_it(schedule):
    torch.manual_seed(0)
    ours, theirs = twins(Adam, torch.optim.Adam, parameters(), lr=0.1)
    schedules = [schedule(ours), schedule(theirs)]
    for _ in range(30):
        same_steps(ours, theirs, steps=1)
        for one in schedules:
            one.step()
    assert_same(ours, theirs)
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"] != 0.1


@pytest.mark.parametrize("kind", [Adam, AdaMax])
def test_a_closure_is_called_with_gradients_and_its_loss_returned(kind):
    p = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = kind([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 13
    torch.testing.assert_close(p.detach(), torch.tensor([2.9, -1.9]))
    assert optimizer.step() is None


def test_a_learning_rate_may_be_a_tensor():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    Adam([p], lr=torch.tensor(0.5)).step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.5))


def test_memory_layout_and_views_do_not_matter():
    torch.manual_seed(0)
    flat = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    kinds = [flat.clone(), flat.clone().to(memory_format=torch.channels_last), flat.clone().transpose(0, 3)]
    gradient = torch.randn_like(flat)
    params = [nn.Parameter(kind) for kind in kinds]
    for p in params:
        p.grad = gradient if p.shape == gradient.shape else gradient.transpose(0, 3)
    Adam(params, lr=0.1).step()
    assert torch.equal(params[0], params[1])
    assert torch.equal(params[0], params[2].transpose(0, 3))


@pytest.mark.parametrize("kind", [Adam, AdaMax])
def test_a_parameter_that_is_not_a_number_stays_visible(kind):
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([0.0, math.nan, 1.0])
    kind([p]).step()
    assert p[0] == 1
    assert p[1].isnan()
    assert p[2] < 1


def test_adamax_is_algorithm_2():
    torch.manual_seed(0)
    beta1, beta2, lr = 0.8, 0.95, 0.01
    p = nn.Parameter(torch.randn(50, dtype=torch.float64))
    optimizer = AdaMax([p], lr, (beta1, beta2))
    theta, m, u = p.detach().numpy().copy(), 0.0, np.zeros(50)
    for t in range(1, 200):
        p.grad = torch.randn_like(p) * 10 ** (4 * torch.rand(50) - 2)
        g = p.grad.numpy()
        m = beta1 * m + (1 - beta1) * g
        u = np.maximum(beta2 * u, abs(g))
        theta -= lr / (1 - beta1**t) * m / u
        optimizer.step()
        np.testing.assert_allclose(p.detach().numpy(), theta, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("maximize", [False, True])
def test_adamax_is_torchs_up_to_the_eps_that_the_paper_lacks(maximize):
    torch.manual_seed(0)
    ours, theirs = twins(AdaMax, torch.optim.Adamax, parameters(), lr=0.01, maximize=maximize)
    same_steps(ours, theirs, steps=200)
    assert_same(ours, theirs, rtol=1e-3, atol=1e-3)


def test_adamax_without_any_gradient_stays():
    p = nn.Parameter(torch.ones(2))
    optimizer = AdaMax([p], lr=0.1)
    for value in (0.0, 0.0, 1.0):
        p.grad = torch.tensor([0.0, value])
        optimizer.step()
    assert p[0] == 1
    assert 0 < 1 - p[1] < 0.1  # its first gradient is a third of what the mean is corrected for


@pytest.mark.parametrize("kind", [Adam, AdaMax])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": -0.1}, r"lr must be a finite number of at least 0, got -0\.1"),
        ({"lr": math.nan}, "lr must be a finite number of at least 0, got nan"),
        ({"lr": math.inf}, "lr must be"),
        ({"betas": (1.0, 0.999)}, r"betas must be two numbers, each at least 0 and below 1, got \(1\.0, 0\.999\)"),
        ({"betas": (0.9, -0.1)}, "betas must be"),
        ({"betas": 0.9}, r"betas must be two numbers, each at least 0 and below 1, got 0\.9"),
        ({"betas": (0.9, 0.99, 0.999)}, "betas must be"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(kind, wrong, message):
    with pytest.raises(ValueError, match=f"{kind.__name__}: {message}"):
        kind(parameters(), **wrong)
    with pytest.raises(ValueError, match=message):  # torch looks at the constructor's only
        kind([{"params": parameters(), **wrong}])
    optimizer = kind(parameters())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": parameters(), **wrong})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("wrong", [{"eps": -1e-8}, {"weight_decay": -1.0}, {"eps": math.nan}])
def test_adams_own_hyperparameters_are_checked(wrong):
    with pytest.raises(ValueError, match=f"Adam: {next(iter(wrong))} must be a finite number of at least 0"):
        Adam(parameters(), **wrong)


def test_no_parameters_are_refused():
    with pytest.raises(ValueError, match="empty parameter list"):
        Adam([])


def test_sparse_gradients_are_refused_before_anything_moves():
    dense, table = nn.Parameter(torch.ones(2)), nn.Embedding(10, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    dense.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"dense gradients only.*sparse=False"):
        Adam([{"params": [dense]}, {"params": table.parameters()}]).step()
    assert dense.tolist() == [1, 1]


# Where a CUDA tensor takes the kernel, here a CPU tensor does, through g++: the same way through the optimiser.
@NEEDS_GPP
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_kernel_behind_it_gives_the_same(options, monkeypatch):
    torch.manual_seed(0)
    ours, theirs = twins(Adam, torch.optim.Adam, parameters(), **options)
    calls = []
    monkeypatch.setattr(optim.on_cuda, "usable", lambda p: calls.append(p) or True)
    same_steps(ours, theirs, steps=40, absent=0.2)
    assert calls
    assert_same(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [*OPTIONS, {"bias_correction": False}], ids=str)
def test_on_a_gpu_it_is_the_cpus(options):
    torch.manual_seed(0)
    on_cpu = Adam(parameters(), **options)
    on_gpu = Adam([nn.Parameter(p.detach().cuda()) for p in params_of(on_cpu)], **options)
    for _ in range(40):
        for p, q in zip(params_of(on_cpu), params_of(on_gpu), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.cuda()
        on_cpu.step()
        on_gpu.step()
    for p, q in zip(params_of(on_cpu), params_of(on_gpu), strict=True):
        torch.testing.assert_close(q.cpu(), p, rtol=1e-11, atol=1e-12)
