"""Measures of samples against what is known of them in closed form, and judges against labels they never saw."""

import math

import pytest
import torch
from devices import on_every_device
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from reprise import metrics
from reprise.data import load
from reprise.functional import discriminator_loss, generator_loss
from reprise.training import accuracy


@pytest.fixture(scope="module")
def digits_judge():
    return metrics.train_judge(*load("digits", "train"), classes=10)


def test_a_judge_knows_digits(digits_judge):
    assert accuracy(digits_judge, *load("digits", "test")) > 0.95
    assert not digits_judge.training
    assert not any(p.requires_grad for p in digits_judge.parameters())


def test_a_judge_knows_letters():
    data, test = load("letters", "train"), load("letters", "test")
    judge = metrics.train_judge(data.images, data.labels, classes=26, steps=300)
    assert accuracy(judge, test.images, test.labels) > 0.9


def test_a_judge_depends_on_its_seed_only(digits_judge):
    data = load("digits", "train")
    torch.rand(7)
    again, other = (metrics.train_judge(*data, classes=10, name="judge", seed=s, steps=20) for s in (0, 1))
    torch.rand(1)
    same = metrics.train_judge(*data, classes=10, steps=20)
    x = data.images[:5]
    assert torch.equal(same(x), again(x))
    assert not torch.equal(same(x), other(x))


@pytest.mark.parametrize("size", [8, 9, 28, 32])
def test_a_judge_takes_images_of_many_sizes(size):
    judge = metrics.Judge(3, 10, width=7)
    images = torch.rand(4, 3, size, size)
    assert judge.features(images).shape == (4, 7)
    torch.testing.assert_close(judge.output(judge.features(images)), judge(images))


def test_a_judge_refuses_flat_images(digits_judge):
    with pytest.raises(ValueError, match=r"expected images \(N, 1, H, W\), got \(5, 64\)"):
        digits_judge(torch.rand(5, 64))


def test_class_shares_of_real_digits(digits_judge):
    images, labels = load("digits", "test")
    shares = metrics.class_shares(digits_judge, images, chunk=33)
    assert shares.sum().item() == pytest.approx(1)
    torch.testing.assert_close(shares, torch.bincount(labels) / len(labels), atol=0.03, rtol=0)
    assert metrics.covered(shares) == 10
    only_threes = metrics.class_shares(digits_judge, images[labels == 3])
    assert metrics.covered(only_threes, at_least=0.1) == 1
    assert only_threes.argmax() == 3


def test_covered_counts_at_the_bound():
    assert metrics.covered(torch.tensor([0.5, 0.25, 0.125, 0.125, 0.0]), at_least=0.125) == 4


def gaussian(mean, root, n):
    """``n`` rows whose mean and covariance are exactly these."""
    x = torch.randn(n, len(mean), dtype=torch.float64)
    x = x - x.mean(0)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T
    return x @ root.T + mean


def test_frechet_distance_is_dowson_and_landaus():
    torch.manual_seed(0)
    mean_a, mean_b = torch.randn(2, 5, dtype=torch.float64)
    # Covariances that commute, for which it is the sum of squared differences of deviations.
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    std_a, std_b = torch.rand(2, 5, dtype=torch.float64)
    a, b = (gaussian(mean, turn * std, 50) for mean, std in ((mean_a, std_a), (mean_b, std_b)))
    expected = ((mean_a - mean_b) ** 2).sum() + ((std_a - std_b) ** 2).sum()
    assert metrics.frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_against_scipys_root():
    linalg = pytest.importorskip("scipy.linalg")
    torch.manual_seed(0)
    a, b = torch.randn(100, 6, dtype=torch.float64), torch.randn(80, 6, dtype=torch.float64) * 2 + 1
    a = a @ torch.randn(6, 6, dtype=torch.float64)
    cov_a, cov_b = torch.cov(a.T).numpy(), torch.cov(b.T).numpy()
    root = linalg.sqrtm(cov_a @ cov_b).real
    expected = float(((a.mean(0) - b.mean(0)) ** 2).sum()) + (cov_a + cov_b - 2 * root).trace()
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_too_few_or_constant_features_is_finite():
    x = torch.randn(4, 30)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet_distance(torch.zeros(5, 3), torch.ones(5, 3)) == pytest.approx(3)
    assert metrics.frechet_distance(torch.zeros(5, 1), 2 * torch.ones(9, 1)) == pytest.approx(4)


@pytest.mark.parametrize(("a", "b"), [((5, 3), (5, 4)), ((1, 3), (5, 3)), ((5,), (5,))])
def test_frechet_distance_refuses(a, b):
    with pytest.raises(ValueError, match="two rows"):
        metrics.frechet_distance(torch.rand(a), torch.rand(b))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_nearest(chunk):
    torch.manual_seed(0)
    queries, data = torch.rand(23, 12) + 100, torch.rand(41, 12) + 100
    distances = (queries[:, None].double() - data).norm(dim=2)
    index, distance = metrics.nearest(queries, data, chunk=chunk)
    assert torch.equal(index, distances.argmin(1))
    torch.testing.assert_close(distance.double(), distances.amin(1), rtol=1e-4, atol=0)


def test_nearest_of_a_copy_is_the_copy():
    data = torch.rand(500, 784)
    index, distance = metrics.nearest(data[7:9], data)
    assert index.tolist() == [7, 8]
    assert distance.tolist() == [0, 0]


@pytest.mark.parametrize("chunk", [3, 50])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_parzen_is_a_mixture_of_gaussians(dtype, tolerance, chunk):
    torch.manual_seed(0)
    points, samples = torch.rand(11, 9, dtype=dtype), torch.rand(17, 9, dtype=dtype) + 1
    widths = torch.tensor([0.1, 0.5, 3.0], dtype=dtype)
    ours = metrics.parzen_log_likelihood(points, samples, widths, chunk=chunk)
    assert ours.shape == (3, 11)
    for width, row in zip(widths.double(), ours, strict=True):
        kernel = Independent(Normal(samples.double(), width), 1)
        mixture = MixtureSameFamily(Categorical(torch.ones(17, dtype=torch.float64)), kernel)
        torch.testing.assert_close(row.double(), mixture.log_prob(points.double()), rtol=tolerance, atol=tolerance)


def test_parzen_integrates_to_one():
    grid = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    samples = torch.randn(30, 1, dtype=torch.float64)
    density = metrics.parzen_log_likelihood(grid[:, None], samples, torch.tensor([0.3])).exp()[0]
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-9)


def test_parzen_far_away_and_doubled():
    samples = torch.randn(20, 3)
    far = torch.full((1, 3), 1e4)
    widths = torch.tensor([0.1, 1.0])
    once = metrics.parzen_log_likelihood(far, samples, widths)
    assert once.isfinite().all()
    torch.testing.assert_close(metrics.parzen_log_likelihood(far, samples.repeat(2, 1), widths), once)


@pytest.mark.parametrize(
    "types", [(torch.float32,) * 3, (torch.float64,) * 2 + (torch.float32,), (torch.float16,) * 3], ids=str
)
@on_every_device
def test_parzen_by_the_kernel_is_that_by_pytorch(device, types, monkeypatch):
    """What a CUDA tensor takes; on the CPU, with the kernel run by g++."""
    calls, kernel = [], metrics.kernels.parzen
    monkeypatch.setattr(metrics.kernels, "parzen", lambda *given: calls.append(given) or kernel(*given))
    monkeypatch.setattr(metrics.on_cuda, "usable", lambda tensor: True)
    torch.manual_seed(0)
    given = torch.rand(70, 20), torch.rand(130, 20) + 1, torch.tensor([0.2, 1.0, 5.0])
    given = [tensor.to(device, dtype) for tensor, dtype in zip(given, types, strict=True)]
    actual, expected = metrics.parzen_log_likelihood(*given), metrics._parzen_in_chunks(*given)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3, check_dtype=True)
    assert len(calls) == 1
    with pytest.raises(ValueError, match="positive widths"):
        metrics.parzen_log_likelihood(*given[:2], -given[2])
    with pytest.raises(ValueError, match="expected"):
        metrics.parzen_log_likelihood(given[0], given[1][:0], given[2])


@pytest.mark.parametrize("widths", [[0.0, 1.0], [[1.0]], [-1.0]])
def test_parzen_refuses_widths(widths):
    with pytest.raises(ValueError, match="positive widths"):
        metrics.parzen_log_likelihood(torch.rand(2, 3), torch.rand(2, 3), torch.tensor(widths))


@pytest.mark.parametrize("function", [metrics.nearest, lambda a, b: metrics.parzen_log_likelihood(a, b, [1.0])])
@pytest.mark.parametrize(("a", "b"), [((5, 3), (5, 4)), ((5, 3), (0, 3)), ((5,), (5,))])
def test_two_sets_that_do_not_fit_are_refused(function, a, b):
    with pytest.raises(ValueError, match="expected"):
        function(torch.rand(a), torch.rand(b))


@pytest.mark.parametrize("support", [100, 2500])
def test_birthday_support_of_a_known_one(support):
    torch.manual_seed(0)
    points = torch.randn(support, 8)
    samples = points[torch.randint(support, (1500,))] + 1e-4 * torch.randn(1500, 8)
    # Half of the batches have a pair at s = 1.18 sqrt(support), so s² is 1.4 times the support.
    assert support < metrics.birthday_support(samples, closer_than=0.01) < 2 * support


def test_birthday_support_of_all_different_and_of_one():
    assert metrics.birthday_support(torch.randn(50, 20), closer_than=1e-6) == math.inf
    assert metrics.birthday_support(torch.ones(50, 20), closer_than=1e-6) == 4  # two samples suffice


def test_adversarial_losses_are_eq_1():
    real, fake = torch.randn(2, 40, dtype=torch.float64)
    value = torch.sigmoid(real).log().mean() + (1 - torch.sigmoid(fake)).log().mean()
    torch.testing.assert_close(discriminator_loss(real, fake), -value)
    torch.testing.assert_close(generator_loss(fake), -torch.sigmoid(fake).log().mean())
    torch.testing.assert_close(generator_loss(fake, saturating=True), (1 - torch.sigmoid(fake)).log().mean())
    assert discriminator_loss(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize("saturating", [False, True])
def test_adversarial_losses_of_a_sure_discriminator_are_finite(saturating):
    fake = torch.tensor([-1e4, 1e4], requires_grad=True)
    for loss in (generator_loss(fake, saturating), discriminator_loss(-fake, fake)):
        (gradient,) = torch.autograd.grad(loss, fake)
        assert loss.isfinite()
        assert gradient.isfinite().all()
