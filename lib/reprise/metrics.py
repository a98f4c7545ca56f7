"""Measures of samples that have no labels: which classes they cover, how far they are from data, how many differ.

They are instruments, not truths: each docstring says what its measure does not see.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .kernels import on_cuda
from .training import Batches, seed_everything, train

__all__ = [
    "Judge",
    "birthday_support",
    "class_shares",
    "covered",
    "frechet_distance",
    "nearest",
    "parzen_log_likelihood",
    "train_judge",
]


class Judge(nn.Module):
    """A small convolutional classifier of images, used to judge samples; see :func:`train_judge`.

    Args:
        channels: C of the images (N, C, H, W); H and W may be anything from 8 to 32 or so.
        classes: number of classes.
        width: number of features.
    """

    def __init__(self, channels: int, classes: int, width: int = 64):
        super().__init__()
        self.channels = channels
        self.maps = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(3),
        )
        self.penultimate = nn.Sequential(nn.Flatten(), nn.Linear(64 * 9, width), nn.ReLU())
        self.output = nn.Linear(width, classes)

    def features(self, images: Tensor) -> Tensor:
        """The penultimate layer: images (N, C, H, W), in the range that it was trained on, to (N, width).

        Raises:
            ValueError: for another shape.
        """
        if images.dim() != 4 or images.shape[1] != self.channels:
            raise ValueError(f"expected images (N, {self.channels}, H, W), got {tuple(images.shape)}")
        return self.penultimate(self.maps(images))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes)."""
        return self.output(self.features(images))


def train_judge(
    images: Tensor, labels: Tensor, classes: int, name: str = "judge", steps: int = 400, seed: int = 0
) -> Judge:
    """Train a judge on real, labelled images, and freeze it.

    A judge knows nothing but its classes: asked about noise it still names one, and it cannot tell a good picture
    from a bad one. Give it images that the generator was trained on, never samples.

    Args:
        images: shape (N, C, H, W).
        labels: shape (N,), from 0 to ``classes`` - 1.
        classes: number of classes.
        name: of the training, unique in its notebook.
        steps: of Adam with batches of 100, the rate falling linearly to zero.
        seed: of weights and batches.

    Returns:
        The judge in evaluation mode, on the device of the images, without gradients for its weights.
    """
    seed_everything(seed, name, "weights")
    judge = Judge(images.shape[1], classes).to(images.device)
    optimizer = torch.optim.Adam(judge.parameters(), lr=2e-3)
    batches = Batches(images, labels, size=min(100, len(images)))
    run = train(name, steps, judge, optimizer, batches, seed=seed)
    for step in run:
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        x, y = next(batches)
        loss = F.cross_entropy(judge(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss)
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def class_shares(judge: nn.Module, images: Tensor, chunk: int = 1000) -> Tensor:
    """The share of images (N, C, H, W) that the judge puts into each class: shape (classes,), sum 1.

    Blind to quality and to variety within a class.
    """
    logits = torch.cat([judge(part) for part in images.split(chunk)])
    return torch.bincount(logits.argmax(1), minlength=logits.shape[1]) / len(images)


def covered(shares: Tensor, at_least: float = 0.02) -> int:
    """How many classes get at least this share of the samples."""
    return int((shares >= at_least).sum())


@torch.no_grad()
def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """The squared Fréchet distance between Gaussians fitted to two sets of features (Dowson & Landau 1982),

        ||mean_a - mean_b||² + tr(A + B - 2 (A^½ B A^½)^½),   A and B the covariances.

    With features of an Inception network it is called FID (Heusel et al. 2017, arXiv 1706.08500); on other
    features the numbers mean something else and must not be compared with it. It sees means and covariances only,
    and is biased upwards for few samples: compare equal numbers, beside real against real.

    Args:
        features_a: shape (N, D), N at least 2; D + 1 are needed for a covariance of full rank.
        features_b: shape (M, D).

    Returns:
        A number of at least 0, computed in double precision from symmetric eigenvalues, so that it is never complex.

    Raises:
        ValueError: for other shapes.
    """
    a, b = (features.double() for features in (features_a, features_b))
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"expected (N, D) and (M, D) of two rows at least, got {tuple(a.shape)} and {tuple(b.shape)}")
    # torch.cov makes a number of a single feature.
    cov_a, cov_b = (torch.cov(x.T).reshape(x.shape[1], x.shape[1]) for x in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ cov_b @ root
    of_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum() + cov_a.trace() + cov_b.trace() - 2 * of_root
    return max(distance.item(), 0.0)


def _squared_distances(queries: Tensor, data: Tensor) -> Tensor:
    """(Q, D) and (N, D) to (Q, N), by one matrix product; rounding may make zeros slightly positive."""
    norms = (queries**2).sum(1)[:, None] + (data**2).sum(1)
    return torch.addmm(norms, queries, data.T, alpha=-2).clamp_(min=0)


def _check_two_matrices(first: Tensor, second: Tensor) -> None:
    if first.dim() != 2 or second.dim() != 2 or first.shape[1] != second.shape[1] or not len(second):
        raise ValueError(f"expected (., D) and (at least 1, D), got {tuple(first.shape)} and {tuple(second.shape)}")


def _centred(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    # The matrix product loses digits far from the origin; half precision has too few to begin with.
    centre = second.float().mean(0) if second.dtype in (torch.float16, torch.bfloat16) else second.mean(0)
    return first - centre, second - centre


@torch.no_grad()
def nearest(queries: Tensor, data: Tensor, chunk: int = 1000) -> tuple[Tensor, Tensor]:
    """The nearest row of ``data`` to each query, by Euclidean distance.

    In pixels this finds copies, and nothing else: an image shifted by one pixel is far away
    (Theis et al. 2016, arXiv 1511.01844, section 3.3).

    Args:
        queries: shape (Q, D).
        data: shape (N, D), N at least 1.
        chunk: rows of either that are compared at a time; memory is bounded by its square.

    Returns:
        Indices into ``data`` and distances, both shaped (Q,). Among rows whose distances agree to rounding, any.

    Raises:
        ValueError: for other shapes.
    """
    _check_two_matrices(queries, data)
    centred, rows = _centred(queries, data)
    best = torch.full((len(queries),), math.inf, dtype=centred.dtype, device=centred.device)
    index = torch.zeros(len(queries), dtype=torch.long, device=centred.device)
    for first in range(0, len(queries), chunk):
        here = slice(first, first + chunk)
        for start in range(0, len(data), chunk):
            least, at = _squared_distances(centred[here], rows[start : start + chunk]).min(1)
            closer = least < best[here]
            best[here] = torch.where(closer, least, best[here])
            index[here] = torch.where(closer, at + start, index[here])
    # The product rounds; the difference of the two rows does not.
    pairs = zip(queries.split(chunk), index.split(chunk), strict=True)
    return index, torch.cat([(query - data[at]).norm(dim=1) for query, at in pairs])


@torch.no_grad()
def parzen_log_likelihood(points: Tensor, samples: Tensor, widths: Tensor, chunk: int = 1000) -> Tensor:
    """Log-density of each point under a Parzen window: a Gaussian of some width around every sample,

        log p(x) = log 1/S sum over samples s of N(x; s, width² I)

    (Breuleux et al. 2011; Goodfellow et al. 2014, section 5, who report the mean over test points). The value
    depends on the width, which is to be chosen on validation data, and on the number of samples; it does not rank
    models by their samples (Theis et al. 2016, section 3.2).

    Args:
        points: shape (P, D).
        samples: shape (S, D), S at least 1.
        widths: shape (W,), standard deviations, positive.
        chunk: rows of either that are compared at a time; memory is bounded by its square.

    Returns:
        Shape (W, P), in nats. On CUDA tensors, where CuPy is installed, :func:`reprise.kernels.parzen` computes it,
        which needs no ``chunk`` and squares differences one by one; PyTorch here takes a matrix product for speed,
        whose rounding shows where the width is far smaller than the rows are long.

    Raises:
        ValueError: for other shapes, or a width that is not positive.
    """
    widths = torch.as_tensor(widths, device=points.device)
    if widths.dim() != 1 or not bool((widths > 0).all()):
        raise ValueError(f"expected positive widths (W,), got {widths}")
    _check_two_matrices(points, samples)
    if on_cuda.usable(points):
        return kernels.parzen(points, samples, widths.double())  # a list of whole numbers makes integers
    return _parzen_in_chunks(points, samples, widths, chunk)


def _parzen_in_chunks(points: Tensor, samples: Tensor, widths: Tensor, chunk: int = 1000) -> Tensor:
    points, samples = _centred(points, samples)
    widths = widths.to(points.dtype)
    sharpness = -0.5 / widths**2
    parts = []
    for here in points.split(chunk):
        total = torch.full((len(widths), len(here)), -math.inf, dtype=points.dtype, device=points.device)
        for there in samples.split(chunk):
            squared = _squared_distances(here, there)
            new = torch.stack([torch.logsumexp(squared * s, 1) for s in sharpness])
            total = torch.logaddexp(total, new)
        parts.append(total)
    total = torch.cat(parts, 1) if parts else points.new_empty(len(widths), 0)
    constant = points.shape[1] * torch.log(widths * math.sqrt(2 * math.pi)) + math.log(len(samples))
    return total - constant[:, None]


def _close_pairs(samples: Tensor, closer_than: float, chunk: int) -> Iterator[Tensor]:
    """Index pairs (., 2) of samples, first before second, that lie within a distance, block by block."""
    for first in range(0, len(samples), chunk):
        for second in range(first, len(samples), chunk):
            distance = torch.cdist(
                samples[first : first + chunk],
                samples[second : second + chunk],
                compute_mode="donot_use_mm_for_euclid_dist",  # the product cannot tell small distances from zero
            )
            close = distance < closer_than
            pairs = (close.triu(1) if first == second else close).nonzero()
            yield pairs + torch.tensor([first, second], device=pairs.device)


@torch.no_grad()
def birthday_support(samples: Tensor, closer_than: float, trials: int = 200, chunk: int = 500) -> float:
    """How many different samples a generator can make, by the birthday paradox (Arora & Zhang 2017, arXiv 1706.08224).

    If a batch of s samples contains a pair of near-duplicates with probability one half, there are about s²
    different samples. Here s is the median, over random orders of the samples, of how many must be drawn until the
    first such pair. What a near-duplicate is decides the result: Arora and Zhang look with their eyes, we ask for
    a distance. Compare with the value of real data at the same distance.

    Args:
        samples: shape (N, D), some thousands at most.
        closer_than: the Euclidean distance below which two samples count as the same.
        trials: random orders, drawn from torch's global generator.
        chunk: rows compared at a time.

    Returns:
        s², or infinity if even all N samples hold no such pair: then all that is known is that N² is too low.
    """
    pairs = torch.cat(list(_close_pairs(samples, closer_than, chunk))).cpu()
    if not len(pairs):
        return math.inf
    drawn = []
    for _ in range(trials):
        place = torch.randperm(len(samples))  # when each sample is drawn
        drawn.append(place[pairs].amax(1).min() + 1)
    return float(torch.stack(drawn).float().median()) ** 2
