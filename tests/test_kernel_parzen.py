"""``reprise.kernels.parzen`` against plain PyTorch in float64 and against what mathematics says of a density."""

from __future__ import annotations

import math

import pytest
import torch
from devices import NEEDS_GPP, on_every_device, plant
from torch import Tensor
from torch.library import opcheck

from reprise.kernels import Kernel, density, parzen

DOUBLE = torch.float64
# Points, samples, dimensions, widths: on, below and above the edges of a tile (64) and of a slice (8 or 16).
SHAPES = [
    (1, 1, 1, 1), (5, 1, 3, 2), (64, 64, 16, 4), (65, 129, 17, 5), (3, 300, 33, 1), (130, 70, 7, 10), (2, 3, 0, 2),
]  # fmt: skip


def case(shape=(65, 129, 17, 5), dtype=DOUBLE, device="cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Points, samples and widths; samples come nearer from first to last, so that the nearest changes in every tile."""
    torch.manual_seed(0)
    points, samples, dimensions, widths = shape
    away = torch.linspace(3, 1, samples, dtype=DOUBLE)[:, None]
    given = torch.randn(points, dimensions, dtype=DOUBLE), away * torch.randn(samples, dimensions, dtype=DOUBLE)
    return tuple(t.to(device, dtype) for t in (*given, torch.logspace(-0.5, 1, widths, dtype=DOUBLE)))


def squared_distances(points: Tensor, samples: Tensor) -> Tensor:
    return torch.stack([(samples - point).square().sum(1) for point in points])


def exact(points: Tensor, samples: Tensor, widths: Tensor) -> Tensor:
    """The definition, in float64, with the whole matrix of distances."""
    points, samples, widths = (t.double() for t in (points, samples, widths))
    exponents = -squared_distances(points, samples) / (2 * widths[:, None, None] ** 2)
    constant = points.size(1) * torch.log(widths * math.sqrt(2 * math.pi)) + math.log(len(samples))
    return torch.logsumexp(exponents, 2) - constant[:, None]


@on_every_device
@pytest.mark.parametrize("blocks", [1, 5, 8192])  # one block walks all samples; two or so share them; one for each tile
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, blocks, device, monkeypatch):
    monkeypatch.setattr(density, "_BLOCKS", blocks)
    given = case(shape, device=device)
    torch.testing.assert_close(parzen(*given), exact(*given), rtol=1e-12, atol=1e-12)


@on_every_device
@pytest.mark.parametrize("dtype", density.FLOATS, ids=str)
@pytest.mark.parametrize("width_type", [None, torch.float64], ids=["same", "float64"])
def test_every_type(dtype, width_type, device):
    points, samples, widths = case((70, 80, 100, 3), dtype, device)
    widths = widths.to(width_type or dtype)
    actual = parzen(points, samples, widths)
    assert actual.dtype == (DOUBLE if dtype == DOUBLE else torch.float32)
    tolerance = 100 * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), exact(points, samples, widths), rtol=tolerance, atol=tolerance)


@on_every_device
def test_near_neighbours_are_told_apart(device):
    """Where the matrix product |x|² + |y|² - 2 x.y, the usual way, has no correct digit, in float32."""
    torch.manual_seed(0)
    samples = torch.rand(100, 784, device=device) + 1
    points = samples[:20] + 1e-4 * torch.randn(20, 784, device=device)
    widths = torch.tensor([1e-3, 1e-2], device=device)
    truth = exact(points, samples, widths)
    norms = points.square().sum(1)[:, None] + samples.square().sum(1)
    squared = norms - 2 * points @ samples.T
    by_product = torch.logsumexp(-squared / (2 * widths[:, None, None] ** 2), 2)
    by_product -= (784 * torch.log(widths * math.sqrt(2 * math.pi)) + math.log(100))[:, None]
    wrong, ours = ((t.double() - truth).abs().amax(1) for t in (by_product, parzen(points, samples, widths)))
    assert (ours < 1e-3).all(), "of 4,690 and 2,890 nats"
    assert (wrong > torch.tensor([100, 1.0], device=device)).all()


@on_every_device
@pytest.mark.parametrize("width", [1e-3, 1e-2, 1.0, 1e3])
def test_nothing_underflows(width, device):
    points, samples, _ = case((20, 100, 30, 1), torch.float32, device)
    widths = torch.tensor([width], device=device)
    actual, truth = parzen(points, samples, widths), exact(points, samples, widths)
    torch.testing.assert_close(actual.double(), truth, rtol=1e-5, atol=1e-5)
    plain = torch.exp(-squared_distances(points, samples) / (2 * width**2)).mean(1)
    assert (plain == 0).all() == (width < 0.1), "what taking the logarithm last would have left"


@on_every_device
def test_one_sample_is_a_gaussian(device):
    points, samples, widths = case((9, 1, 4, 3), device=device)
    for row, width in zip(parzen(points, samples, widths), widths, strict=True):
        torch.testing.assert_close(row, torch.distributions.Normal(samples[0], width).log_prob(points).sum(1))


@on_every_device
def test_it_is_a_density(device):
    points = torch.linspace(-12, 12, 3001, dtype=DOUBLE, device=device)
    _, samples, _ = case((1, 50, 1, 1), device=device)
    density_of = parzen(points[:, None], samples, torch.tensor([0.1, 0.5], dtype=DOUBLE, device=device)).exp()
    torch.testing.assert_close(torch.trapezoid(density_of, points), density_of.new_ones(2), rtol=0, atol=1e-6)


@on_every_device
def test_samples_have_no_order_and_count_by_their_share(device):
    points, samples, widths = case(device=device)
    expected = parzen(points, samples, widths)
    shuffled = samples[torch.randperm(len(samples)).to(device)]
    torch.testing.assert_close(parzen(points, shuffled, widths), expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(parzen(points, samples.repeat(3, 1), widths), expected, rtol=1e-13, atol=0)
    # Twice as far apart, twice as wide: the same exponents, and D log 2 less.
    torch.testing.assert_close(parzen(2 * points, 2 * samples, 2 * widths), expected - 17 * math.log(2))


@on_every_device
@pytest.mark.parametrize("blocks", [1, 8192])
def test_nan_and_infinity(blocks, device, monkeypatch):
    monkeypatch.setattr(density, "_BLOCKS", blocks)
    points, samples, widths = case(dtype=torch.float32, device=device)
    plain = parzen(points, samples, widths)

    spoilt = points.clone()
    spoilt[3, 0], spoilt[9, 5], spoilt[40, 2] = torch.nan, torch.inf, -torch.inf
    actual = parzen(spoilt, samples, widths)
    assert actual[:, 3].isnan().all(), "and no other point, as the next lines say"
    assert (actual[:, [9, 40]] == -torch.inf).all()
    others = [p for p in range(len(points)) if p not in (3, 9, 40)]
    assert torch.equal(actual[:, others], plain[:, others])

    gone = samples.clone()
    gone[100:, 7] = torch.inf  # also whole tiles of them: they add nothing to the sum, but count in the mean
    expected = parzen(points, samples[:100], widths) + math.log(100 / len(samples))
    torch.testing.assert_close(parzen(points, gone, widths), expected)
    assert (parzen(points, torch.full_like(samples, torch.inf), widths) == -torch.inf).all()
    gone[70, 3] = torch.nan
    assert parzen(points, gone, widths).isnan().all()


@on_every_device
def test_a_width_that_is_none_spoils_its_own_row(device):
    points, samples, _ = case((5, 7, 3, 1), torch.float32, device)
    widths = torch.tensor([1.0, 0.0, -1.0, torch.nan, 2.0], device=device)
    assert parzen(points, samples, widths).isnan().all(1).tolist() == [False, True, True, True, False]


LAYOUTS = {
    "transposed": lambda x: x.T.contiguous().T,
    "every second": lambda x: torch.stack([x, -x], -1).flatten(1)[:, ::2],
    "expanded": lambda x: x[:1].expand_as(x),
}


@on_every_device
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_in_memory(layout, device):
    points, samples, widths = case(device=device)
    given = LAYOUTS[layout](points), LAYOUTS[layout](samples), widths.repeat_interleave(2)[::2]
    assert not given[0].is_contiguous()
    torch.testing.assert_close(parzen(*given), exact(*given), rtol=1e-12, atol=1e-12)


@on_every_device
def test_without_points_or_widths(device):
    points, samples, widths = case(device=device)
    assert parzen(points[:0], samples, widths).shape == (5, 0)
    assert parzen(points, samples, widths[:0]).shape == (0, 65)


@on_every_device
def test_the_same_in_every_run(device):
    given = case((65, 300, 17, 5), torch.float32, device)
    assert torch.equal(parzen(*given), parzen(*given))


REFUSED = [
    (lambda p, s, w: (p[0], s, w), r"points \(P, D\).*, got points \(3,\), samples \(5, 3\) and widths \(2,\)"),
    (lambda p, s, w: (p, s[:, :2], w), r"got points \(4, 3\), samples \(5, 2\)"),
    (lambda p, s, w: (p, s, w[0]), r"and widths \(\)"),
    (lambda p, s, w: (p, s[:0], w), r"needs a sample to estimate a density from: draw at least one"),
    (lambda p, s, w: (p.int(), s.int(), w), r"got points torch.int32, samples torch.int32 and widths torch.float32"),
    (lambda p, s, w: (p, s.double(), w), r"points torch.float32, samples torch.float64"),
    (lambda p, s, w: (p, s, w.long()), r"widths torch.int64"),
    (lambda p, s, w: (p, s.to("meta"), w), r"points on cpu, samples on meta and widths on cpu"),
    (lambda p, s, w: (p, s[:1].expand(2**30, 3), w), r"fewer than 2\^30 .* samples \(1073741824, 3\)"),
]


@pytest.mark.parametrize(("spoil", "shows"), REFUSED, ids=[shows for _, shows in REFUSED])
def test_what_does_not_fit_is_refused(spoil, shows):
    with pytest.raises(ValueError, match=shows):
        parzen(*spoil(torch.zeros(4, 3), torch.zeros(5, 3), torch.ones(2)))


@on_every_device
@pytest.mark.parametrize("place", range(3))
def test_a_gradient_is_an_error(place, device):
    given = list(case((5, 7, 3, 2), device=device))
    given[place].requires_grad_()
    with pytest.raises(NotImplementedError, match="no derivative: detach the samples"):
        parzen(*given).sum().backward()


@on_every_device
def test_as_an_operator_of_torch(device):
    for dtype in (torch.float32, torch.float16):
        opcheck(torch.ops.reprise.parzen.default, case((5, 70, 3, 2), dtype, device))


@on_every_device
def test_compiled_by_torch_in_one_graph(device):
    given = case((5, 70, 3, 2), device=device)

    def mean(points, samples, widths):
        return parzen(points * 2, samples, widths).mean(1)

    compiled = torch.compile(mean, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), mean(*given), rtol=1e-12, atol=1e-12)


def test_what_is_kept_does_not_grow_with_points_times_samples():
    for points, samples in [(1, 10**6), (100, 10**5), (10**4, 10**4), (10**6, 10**6)]:
        tiles, parts = density._grid(points, samples)
        assert tiles * 64 >= points
        assert parts * points <= max(points, 8192 * 64), "numbers for each width: 2 MB, or a few results"
        assert tiles * parts >= min(8192 // 2, tiles * math.ceil(samples / 64)), "enough blocks to fill a GPU"
        assert parts <= 65535


@NEEDS_GPP
def test_places_beyond_2_to_the_31():
    # The kernel's own index functions, asked by a probe: a tensor of that size would take hours here.
    probe = """
    extern "C" __global__ void probe(long long* out, int row, int dimensions, int width, int parts, int part,
                                     int point_count, int point) {
        out[0] = in_row(row, dimensions, dimensions - 1);
        out[1] = in_sums(width, parts, part, point_count, point);
    }"""
    kernel = Kernel(density._SOURCE + probe, "probe", SCALAR="float", REAL="float", TILE=64, SIDE=16, DEPTH=16)
    out = torch.zeros(2, dtype=torch.int64)
    row, dimensions, width, parts, part, points = 2**29, 784, 99, 53, 7, 2**28
    kernel(1, 1, out, row, dimensions, width, parts, part, points, points - 1)
    assert out.tolist() == [row * dimensions + dimensions - 1, (width * parts + part) * points + points - 1]
    assert min(out) > 2**31


@pytest.mark.gpu
def test_more_than_2_to_the_31_distances_and_little_memory():
    torch.manual_seed(0)
    points, samples = torch.randn(60_000, 3, device="cuda"), torch.randn(50_000, 3, device="cuda")
    assert len(points) * len(samples) > 2**31
    widths = torch.tensor([0.1, 1.0], device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    actual = parzen(points, samples, widths)
    assert torch.cuda.max_memory_allocated() - before < 20e6
    some = [0, 1, 31_234, 59_999]
    torch.testing.assert_close(actual[:, some].double(), exact(points[some], samples, widths), rtol=1e-4, atol=1e-4)


BUGS = {
    "a factor of two in the exponent": ("((REAL)0.5 / (width", "((REAL)1 / (width"),
    "old sums kept as they were": ("*total * share(nearest, before, widths[w])", "*total"),
    "sums of the parts left out": ("sum += sums[in_sums(w, parts, part, point_count, point)]\n            *", "sum +="),
    "zeros beyond the last sample counted": ("min(TILE, sample_count - first)", "TILE"),
    "one part left out": ("int part = 0; part < parts", "int part = 1; part < parts"),
    "the farthest for the nearest": ("fmin(nearest, squared", "fmax(nearest, squared"),
    "every tile's sum begins anew": ("first == part * TILE ?", "true ?"),
    "no barrier before a slice is used": ("__syncthreads();  // the slices", "// the slices"),
    "no barrier after": ("__syncthreads();  // nobody", "// nobody"),
    "no barrier before the tile is folded": ("__syncthreads();  // the tile", "// the tile"),
}


@NEEDS_GPP
@pytest.mark.parametrize("bug", BUGS)
def test_these_tests_find_planted_bugs(bug, monkeypatch):
    plant(monkeypatch, density, *BUGS[bug])

    def both_ways() -> None:
        for blocks in (1, 8192):
            test_values((65, 129, 17, 5), blocks, "cpu", monkeypatch)

    with pytest.raises(AssertionError):
        both_ways()
