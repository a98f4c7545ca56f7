"""``reprise.kernels.adam_step`` against ``torch.optim.Adam``, on the CPU through g++ and on a GPU."""

from __future__ import annotations

import pytest
import torch
from devices import NEEDS_GPP, on_every_device, plant
from torch import Tensor
from torch.library import opcheck

from reprise.kernels import Kernel, adam, adam_step

# A scalar, an empty one, less than a block, exactly a chunk, one more, several chunks.
SHAPES = [(), (0, 3), (3, 4), (adam._CHUNK,), (adam._CHUNK + 1,), (5, 2000, 2)]
CLOSE = {torch.float64: {"rtol": 1e-12, "atol": 1e-13}, torch.float32: {"rtol": 2e-6, "atol": 1e-6}}


class Ours:
    """Parameters and moments, stepped by the kernel."""

    def __init__(self, params: list[Tensor], amsgrad: bool = False, **options):
        self.params = [p.detach().clone(memory_format=torch.preserve_format) for p in params]
        self.m, self.v, self.largest = ([torch.zeros_like(p) for p in params] for _ in range(3))
        self.options = {"amsgrad": amsgrad, **options}
        self.t = 0

    def step(self, grads: list[Tensor]) -> None:
        self.t += 1
        largest = self.largest if self.options["amsgrad"] else None
        adam_step(self.params, grads, self.m, self.v, largest, self.t, **self.options)


def random(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in shapes]


def compare(ours: Ours, theirs: list[Tensor], state: dict[Tensor, dict], close: dict[str, float]) -> None:
    for place, p in enumerate(theirs):
        torch.testing.assert_close(ours.params[place], p.detach(), **close)
        if p in state:
            torch.testing.assert_close(ours.m[place], state[p]["exp_avg"], **close)
            torch.testing.assert_close(ours.v[place], state[p]["exp_avg_sq"], **close)
            if ours.options["amsgrad"]:
                torch.testing.assert_close(ours.largest[place], state[p]["max_exp_avg_sq"], **close)


def against_torch(dtype: torch.dtype, device: str, **options) -> None:
    torch.manual_seed(0)
    params = random(SHAPES, dtype, device)
    ours, theirs = Ours(params, **options), [p.clone().requires_grad_() for p in params]
    names = {"beta1": 0.9, "beta2": 0.999} | options
    betas = (names.pop("beta1"), names.pop("beta2"))
    optimizer = torch.optim.Adam(theirs, betas=betas, foreach=False, **names)
    for scale in (1, 100, 0.01, 1, 1e-6):
        grads = [scale * g for g in random(SHAPES, dtype, device)]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        ours.step(grads)
        compare(ours, theirs, optimizer.state, CLOSE[dtype])


OPTIONS = [
    {"lr": 1e-3},
    {"lr": 0.1, "weight_decay": 0.1},
    {"lr": 0.1, "amsgrad": True},
    {"lr": 0.1, "maximize": True},
    {"lr": 0.01, "beta1": 0.0, "beta2": 0.9, "eps": 1e-3},
    {"lr": 0.5, "beta1": 0.5, "beta2": 0.9999, "weight_decay": 0.01, "amsgrad": True, "maximize": True},
]


@on_every_device
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_as_torch(options, dtype, device):
    against_torch(dtype, device, **options)


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_rounds_once(dtype, device):
    """Each step is that of float64, rounded when it is stored: held against it from the same state."""
    torch.manual_seed(0)
    params, grads = random([(1000,)], dtype, device), random([(1000,)], dtype, device)
    ours = Ours(params, lr=0.1, weight_decay=0.1)
    exact = Ours([p.double() for p in params], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        ours.step(grads)
        exact.step([g.double() for g in grads])
        for stored, reference in ((ours.m, exact.m), (ours.v, exact.v), (ours.params, exact.params)):
            assert (stored[0].double() - reference[0]).abs().max() <= torch.finfo(dtype).eps * reference[0].abs().max()
        for stored, reference in ((ours.m, exact.m), (ours.v, exact.v), (ours.params, exact.params)):
            reference[0].copy_(stored[0])


@on_every_device
def test_without_bias_correction(device):
    p, g = torch.tensor([1.0], device=device), torch.tensor([2.0], device=device)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    adam_step([p], [g], [m], [v], None, 1, lr=0.5, beta1=0.9, beta2=0.99, eps=0.1, bias_correction=False)
    assert (m.item(), v.item()) == (pytest.approx(0.2), pytest.approx(0.04))
    assert p.item() == pytest.approx(1 - 0.5 * 0.2 / (0.2 + 0.1))


@on_every_device
def test_the_first_step_is_lr_whatever_the_scale(device):
    # Kingma & Ba, section 2.1: with its bias corrected the first step is lr * g / |g|.
    for scale in (1e-12, 1.0, 1e12):
        p = torch.zeros(1, dtype=torch.float64, device=device)
        adam_step([p], [p + scale], [p.clone()], [p.clone()], None, 1, lr=0.1, eps=0.0)
        assert p.item() == pytest.approx(-0.1, rel=1e-12)


@on_every_device
def test_a_step_number_for_each_tensor(device):
    torch.manual_seed(0)
    start, grads = random([(10,)] * 3, torch.float64, device), random([(10,)] * 3, torch.float64, device)
    together, moments = [p.clone() for p in start], [torch.full_like(p, 0.1) for p in start]
    m, v = [t.clone() for t in moments], [t.clone() for t in moments]
    adam_step(together, grads, m, v, None, [1, 7, 1000], lr=0.1)
    for place, t in enumerate([1, 7, 1000]):
        alone = [start[place].clone()]
        adam_step(alone, [grads[place]], [moments[place].clone()], [moments[place].clone()], None, t, lr=0.1)
        assert torch.equal(alone[0], together[place])


@on_every_device
def test_more_tensors_than_a_table_holds_and_mixed_types(device):
    torch.manual_seed(0)
    count = 2 * adam._TENSORS + 3
    types = [torch.float64 if place % 3 else torch.float32 for place in range(count)]
    params = [torch.randn(place % 5, device=device).to(dtype) for place, dtype in enumerate(types)]
    grads = [torch.randn_like(p) for p in params]
    ours, theirs = Ours(params, lr=0.1), [p.clone().requires_grad_() for p in params]
    for p, g in zip(theirs, grads, strict=True):
        p.grad = g
    optimizer = torch.optim.Adam(theirs, lr=0.1, foreach=False)
    for _ in range(2):
        optimizer.step()
        ours.step(grads)
    for place, p in enumerate(theirs):
        torch.testing.assert_close(ours.params[place], p.detach(), **CLOSE[p.dtype])


LAYOUTS = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1),
    "every second": lambda x: torch.stack([x, -x], -1).flatten(3)[..., ::2],
    "plain": lambda x: x,
}


@on_every_device
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_in_memory(layout, grad_layout, device):
    torch.manual_seed(0)
    place = (lambda x: x.transpose(0, 1)) if layout == "transposed" else (lambda x: x)
    p = LAYOUTS[layout](torch.randn(4, 3, 5, 6, dtype=torch.float64, device=device))
    g = LAYOUTS[grad_layout](torch.randn(4, 3, 5, 6, dtype=torch.float64, device=device))
    g = g.transpose(0, 1) if (layout == "transposed") != (grad_layout == "transposed") else g
    ours, reference = Ours([p], lr=0.1), Ours([p.contiguous()], lr=0.1)
    ours.params = [p]  # with its own strides, gaps included
    assert place(p).shape == (4, 3, 5, 6)
    for _ in range(2):
        ours.step([g])
        reference.step([g.contiguous()])
    assert torch.equal(p, reference.params[0])
    assert torch.equal(ours.m[0], reference.m[0])


@on_every_device
def test_nan_and_infinity_stay_in_their_element(device):
    params, grads = random([(50,)], torch.float32, device), random([(50,)], torch.float32, device)
    grads[0][7], grads[0][9] = torch.nan, torch.inf
    ours = Ours(params, lr=0.1, amsgrad=True)
    ours.step(grads)
    finite = ours.params[0].isfinite() & ours.m[0].isfinite() & ours.v[0].isfinite() & ours.largest[0].isfinite()
    assert (~finite).nonzero().flatten().tolist() == [7, 9]
    assert ours.largest[0][7].isnan(), "a maximum must not hide a NaN"


def lists(count: int = 2) -> list[list[Tensor]]:
    return [[torch.zeros(3) for _ in range(count)] for _ in range(4)]


REFUSED = [  # what to spoil, steps, what the error shows
    (lambda p, g, m, v: g.pop(), 1, r"lists of one length, got \[2, 1, 2, 2, 2\]"),
    (lambda p, g, m, v: g.__setitem__(1, torch.zeros(4)), 1, r"parameter 1, .* differ: \(3,\) .*; \(4,\)"),
    (lambda p, g, m, v: m.__setitem__(0, torch.zeros(3).double()), 1, r"parameter 0, .* torch.float64 cpu"),
    (lambda p, g, m, v: v.__setitem__(0, torch.zeros(3, device="meta")), 1, r"torch.float32 cpu; .* meta"),
    (lambda p, g, m, v: None, 0, r"counts steps from 1, got 0"),
    (lambda p, g, m, v: None, [1, 2, 3], r"got \[2, 2, 2, 2, 3\]"),
    (lambda p, g, m, v: [t.__setitem__(0, torch.zeros(3, dtype=torch.int32)) for t in (p, g, m, v)], 1, "torch.int32"),
]


@pytest.mark.parametrize(("spoil", "steps", "shows"), REFUSED, ids=[shows for *_, shows in REFUSED])
def test_what_does_not_fit_is_refused_and_nothing_changed(spoil, steps, shows):
    given = lists()
    spoil(*given)
    with pytest.raises(ValueError, match=shows):
        adam_step(*given, None, steps, lr=0.1)
    assert not any(t.any() for t in given[0] if t.device.type == "cpu")


def test_amsgrad_needs_its_maxima():
    with pytest.raises(ValueError, match=r"lists of one length, got \[2, 2, 2, 2, 0, 2\]"):
        adam_step(*lists(), None, 1, lr=0.1, amsgrad=True)


@NEEDS_GPP
def test_no_parameters_and_leaves_that_want_gradients():
    adam_step([], [], [], [], None, 1, lr=0.1)
    leaf = torch.zeros(3, requires_grad=True)
    adam_step([leaf], [torch.ones(3)], [torch.zeros(3)], [torch.zeros(3)], None, 1, lr=0.1)
    assert leaf.detach().tolist() == pytest.approx([-0.1] * 3)
    assert leaf.is_leaf


@NEEDS_GPP
def test_autograd_knows_that_parameters_changed():
    leaf = torch.ones(3, requires_grad=True)
    loss = leaf.square().sum()  # its gradient needs the leaf as it was
    adam_step([leaf], [torch.ones(3)], [torch.zeros(3)], [torch.zeros(3)], None, 1, lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@on_every_device
@pytest.mark.parametrize("amsgrad", [False, True])
def test_as_an_operator_of_torch(amsgrad, device):
    given = [random([(3, 4), (5,)], torch.float64, device) for _ in range(5)]
    given[3] = [t.square() for t in given[3]]
    given[4] = [t.square() for t in given[4]] if amsgrad else []
    tests = ("test_schema", "test_faketensor")
    arguments = (*given, [1, 2], 0.1, 0.9, 0.999, 1e-8, 0.0, True, False)
    opcheck(torch.ops.reprise.adam_step.default, arguments, test_utils=tests)


@on_every_device
def test_compiled_by_torch_in_one_graph(device):
    torch.manual_seed(0)
    params, grads = random([(3, 4), (5,)], torch.float64, device), random([(3, 4), (5,)], torch.float64, device)
    ours, eager = Ours(params), Ours(params)

    def step(params, grads, m, v):
        adam_step(params, [2 * g for g in grads], m, v, None, 1, lr=0.1)

    torch.compile(step, fullgraph=True, backend="aot_eager")(ours.params, grads, ours.m, ours.v)
    step(eager.params, grads, eager.m, eager.v)
    for compiled, expected in zip(ours.params + ours.m + ours.v, eager.params + eager.m + eager.v, strict=True):
        assert torch.equal(compiled, expected)


@NEEDS_GPP
def test_places_beyond_2_to_the_31():
    # The kernel's own functions, asked by a probe: a tensor of that size would take minutes here.
    probe = """
    extern "C" __global__ void probe(long long* out, int chunk) { out[0] = chunk_start(chunk); }
    """
    kernel = Kernel(adam._SOURCE + probe, "probe", SCALAR="float", REAL="float", TENSORS=4, CHUNK=adam._CHUNK)
    out = torch.zeros(1, dtype=torch.int64)
    kernel(1, 1, out, 2**20)
    assert out.item() == 2**20 * adam._CHUNK > 2**31


@NEEDS_GPP
@pytest.mark.parametrize(
    "change",
    [("largest[k] > v[k] ?", "largest[k] < v[k] ?"), ("+ weight_decay * p[k]", ""), ("slope * slope", "slope")],
)
def test_these_tests_find_planted_bugs(change, monkeypatch):
    plant(monkeypatch, adam, *change)
    with pytest.raises(AssertionError):
        against_torch(torch.float64, "cpu", **OPTIONS[-1])
