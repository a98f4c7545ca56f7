"""Three ways to draw an image, which must be the same image; and what it is drawn from must be the model."""

from __future__ import annotations

import itertools

import pytest
import torch
from pixel_cases import gated, lively, plain, residual
from torch import nn

from reprise import sampling
from reprise.nn import CausalSequential, GatedMaskedConv2d, GatedStack, MaskedConv2d, Residual
from reprise.sampling import WAYS, draw, incremental, rows_above, sample
from reprise.sampling import caching as twins


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wide() -> nn.Module:
    """All the other things a masked layer may be: dilated, high, wide, without a bias."""
    layers = [MaskedConv2d(6, 6, (5, 1), "B", bias=False), nn.Tanh(), MaskedConv2d(6, 6, 3, "B", dilation=(1, 2))]
    return nn.Sequential(MaskedConv2d(1, 6, (3, 7), "A", dilation=2), nn.Dropout(0.5), *layers, nn.Conv2d(6, 4, 1))


NETWORKS = {  # name: model, colours, rows above that it sees
    "plain": (plain(3, first=7), 1, 6),
    "plain, 5 levels": (plain(2, levels=5), 1, 3),
    "plain, 3 colours": (plain(2, first=5, colours=3), 3, 4),
    "plain, 3 colours, 4 levels": (plain(2, colours=3, levels=4), 3, 3),
    "residual": (residual(2, levels=3), 1, 4),
    "residual, 3 colours": (residual(2, colours=3), 3, 4),
    "gated": (gated(3), 1, 5),
    "gated, 3 colours, 4 levels": (gated(2, colours=3, levels=4), 3, 4),
    "wide": (wide(), 1, 5),
    "mask A twice": (nn.Sequential(*plain(1)[:-1], MaskedConv2d(6, 2, 3, "A")), 1, 3),
    "one layer": (nn.Sequential(MaskedConv2d(1, 3, 3, "A")), 1, 1),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def network(name: str) -> tuple[nn.Module, tuple[int, int, int, int]]:
    model, colours, _ = NETWORKS[name]
    return lively(model), (3, colours, 6, 5)


@every_network
def test_all_ways_draw_the_same_images_from_the_same_logits(name):
    model, shape = network(name)
    drawn = {way: sample(model, shape, way, generator=seeded()) for way in WAYS}
    for way in WAYS:
        assert torch.equal(drawn[way].images, drawn["naive"].images), way
        torch.testing.assert_close(drawn[way].logits, drawn["naive"].logits, rtol=1e-10, atol=1e-10)
    images = drawn["naive"].images
    assert 0 < images.mean() < 1
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(sample(model, shape, generator=seeded(1)).images, images)
    # And they are the logits of the finished images, pixel by pixel.
    whole = model.eval()(images).view_as(drawn["cached"].logits)
    torch.testing.assert_close(drawn["cached"].logits, whole, rtol=1e-10, atol=1e-10)


@every_network
def test_in_single_precision_logits_agree_to_four_digits(name):
    model, shape = network(name)
    model.float()
    uniforms = torch.rand(shape, generator=seeded(), dtype=torch.float64)
    drawn = {way: sample(model, shape, way, uniforms=uniforms) for way in WAYS}
    for way in ("restricted", "cached"):
        same = (drawn[way].images == drawn["naive"].images).flatten(1).all(1)
        assert same.any(), "a number within rounding of a step is rare"
        torch.testing.assert_close(drawn[way].logits[same], drawn["naive"].logits[same], rtol=1e-4, atol=1e-4)


@every_network
def test_how_many_positions_each_way_evaluates(name):
    model, (_, colours, height, width) = network(name)
    above = NETWORKS[name][2]
    assert rows_above(model) == above
    counts = {way: sample(model, (1, colours, height, width), way, generator=seeded()).positions for way in WAYS}
    rows = sum(min(y, above) + 1 for y in range(height))
    assert counts == {
        "naive": colours * (height * width) ** 2,
        "restricted": colours * rows * width**2,
        "cached": height * width,
    }


@pytest.mark.parametrize("name", ["plain", "gated"])
def test_the_restricted_way_takes_no_row_too_many(name, monkeypatch):
    model, _ = network(name)
    monkeypatch.setattr(sampling, "rows_above", lambda model: rows_above(model) - 1)
    with pytest.raises(RuntimeError, match="not those they were drawn from"):
        sample(model, (3, 1, 9, 5), "restricted", generator=seeded())


@pytest.mark.parametrize("way", WAYS)
@every_network
def test_given_pixels_are_kept_and_the_rest_completed(name, way):
    model, shape = network(name)
    first = sample(model, shape, "naive", generator=seeded()).images
    # The upper half of all, one pixel of some below, and one colour of another.
    known = torch.zeros(shape, dtype=torch.bool)
    known[:, :, :3] = True
    known[1, :, 4, 2] = True
    known[:, -1:, 5, 4] = True
    drawn = sample(model, shape, way, generator=seeded(), known=known, values=first)
    assert torch.equal(drawn.images, first), "with the same numbers below, the same images again"
    assert drawn.logits[:, :, :, :3].isnan().all()
    assert not drawn.logits[:, :, :, 3:5].isnan().any()
    other = 1 - first
    drawn = sample(model, shape, way, generator=seeded(1), known=known, values=other)
    assert torch.equal(drawn.images[known], other[known])
    reference = sample(model, shape, "naive", generator=seeded(1), known=known, values=other)
    assert torch.equal(drawn.images, reference.images)


def test_nothing_is_evaluated_for_what_is_given_but_where_the_cache_needs_it():
    model, shape = network("plain")
    known = torch.ones(1, 1, 6, 1, dtype=torch.bool)
    known[:, :, 4:] = False
    values = torch.zeros(1, 1, 1, 1)
    counts = {way: sample(model, shape, way, generator=seeded(), known=known, values=values).positions for way in WAYS}
    assert counts == {"naive": 10 * 30, "restricted": 5 * 5 * 5 + 5 * 6 * 5, "cached": 30}
    everything = sample(model, shape, known=torch.tensor(True), values=torch.tensor(1.0))
    assert everything.images.eq(1).all()


@pytest.mark.parametrize("form", ["classes", "vectors"])
def test_conditions(form):
    model = lively(gated(2, classes=4))
    classes = torch.tensor([0, 3, 1, 3])
    condition = classes if form == "classes" else nn.functional.one_hot(classes, 4).double()
    numbers = torch.rand(1, 1, 6, 6, generator=seeded(), dtype=torch.float64).expand(4, -1, -1, -1)
    drawn = [sample(model, (4, 1, 6, 6), way, uniforms=numbers, condition=condition) for way in WAYS]
    assert all(torch.equal(one.images, drawn[0].images) for one in drawn)
    assert torch.equal(drawn[0].images[1], drawn[0].images[3]), "one class, the same numbers"
    assert not torch.equal(drawn[0].images[0], drawn[0].images[1])
    torch.testing.assert_close(drawn[2].logits[:, :, 0], model(drawn[2].images, condition), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("levels", [1, 3])
def test_frequencies_are_the_models_probabilities(levels):
    """All images of 2 x 2 pixels: a chi-squared test of 20,000 draws against the product of the conditionals."""
    model = lively(plain(1, levels=levels), seed=3)
    values = 2 if levels == 1 else levels
    every = torch.tensor(list(itertools.product(range(values), repeat=4)), dtype=torch.float64)
    images = (every / (values - 1)).view(-1, 1, 2, 2)
    logits = model(images).detach()
    if levels == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], 1)
    chosen = logits.log_softmax(1).gather(1, every.long().view(-1, 1, 2, 2))
    probability = chosen.flatten(1).sum(1).exp()
    assert probability.sum() == pytest.approx(1), "it is a distribution"

    drawn = sample(model, (20_000, 1, 2, 2), generator=seeded()).images
    index = ((drawn.flatten(1) * (values - 1)).round().long() * values ** torch.arange(3, -1, -1)).sum(1)
    counts = torch.bincount(index, minlength=len(every))
    expected = 20_000 * probability
    seldom = expected < 5
    cells = [(counts[~seldom], expected[~seldom]), (counts[seldom].sum()[None], expected[seldom].sum()[None])]
    statistic = sum(((c - e) ** 2 / e.clamp(min=1e-9)).sum() for c, e in cells if e.sum() > 0)
    freedom = int((~seldom).sum()) - (0 if seldom.any() else 1)
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_a_draw_is_the_inverse_of_the_cumulated_probabilities():
    logits = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64).log().expand(7, 3)
    uniforms = torch.tensor([0, 0.1999, 0.2001, 0.6999, 0.7001, 0.9999, 1 - 1e-16], dtype=torch.float64)
    assert (draw(logits, uniforms) * 2).tolist() == [0, 0, 1, 1, 2, 2, 2]
    logit = torch.full((4, 1), 0.7, dtype=torch.float64).logit()
    assert draw(logit, torch.tensor([0, 0.2999, 0.3001, 0.9999], dtype=torch.float64)).tolist() == [0, 0, 1, 1]
    two = torch.cat([torch.zeros_like(logit), logit], 1)
    assert torch.equal(draw(two, torch.linspace(0, 0.9, 4)), draw(logit, torch.linspace(0, 0.9, 4)))


def test_temperature():
    model, shape = network("plain, 5 levels")
    coldest = [sample(model, shape, way, generator=seeded(int(way == "naive")), temperature=1e-6) for way in WAYS]
    assert torch.equal(coldest[0].images, coldest[2].images), "the likeliest level, whatever the numbers"
    chosen = coldest[0].logits.argmax(2) / 4
    assert torch.equal(coldest[0].images, chosen.double())
    warm = [sample(model, shape, way, generator=seeded(), temperature=2.0) for way in WAYS]
    assert torch.equal(warm[0].images, warm[2].images)


def test_mode_gradients_and_numbers_are_left_alone():
    model = wide()
    model.train()
    model[2].eval()
    before = torch.get_rng_state()
    rows = []
    drawn = sample(model, (2, 1, 4, 4), generator=seeded(), after_row=lambda y, images: rows.append((y, images.shape)))
    assert rows == [(y, (2, 1, 4, 4)) for y in range(1, 5)]
    assert [layer.training for layer in model] == [True, True, False, True, True, True]
    assert not drawn.images.requires_grad
    assert not drawn.logits.requires_grad
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="cannot be evaluated"):
        sample(nn.Sequential(MaskedConv2d(1, 1, 3, "A"), nn.Softmax(1)).train(), (1, 1, 2, 2))
    drawn.images.requires_grad_()  # and can be learned from
    model(drawn.images).sum().backward()


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = plain(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * self.layers(x)


class Joining(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)

    def incremental(self, sizes: sampling.Sizes):
        return incremental(self.layers, sizes, "layers")


class Negative(nn.ReLU):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -super().forward(x)


A = MaskedConv2d(1, 4, 3, "A")
UNCACHED = [
    (Own(), r"model \(Own\) cannot be evaluated position by position: reprise.sampling knows MaskedConv2d"),
    (nn.Sequential(A, nn.Sequential(nn.BatchNorm2d(4))), r"model.1.0 \(BatchNorm2d\) cannot"),
    (nn.Sequential(A, Negative()), r"model.1 \(Negative\) cannot"),
    (nn.Sequential(A, nn.Conv2d(4, 1, 3, padding=1)), r"model.1 \(Conv2d\) sees more than one pixel"),
    (nn.Sequential(A, GatedMaskedConv2d(4, 4, 3, "B")), r"model.1 \(GatedMaskedConv2d\) cannot"),
    (nn.Sequential(MaskedConv2d(1, 1, 3, "B")), r"model.0 has mask B and sees the pixel to be drawn"),
    (nn.Sequential(Residual(A)), r"model.0 adds the image itself"),
    (nn.Sequential(nn.Tanh(), nn.Conv2d(1, 1, 1)), "the model has no masked layer"),
]


@pytest.mark.parametrize(("model", "said"), UNCACHED, ids=[said[:24] for _, said in UNCACHED])
def test_what_cannot_be_cached_is_named(model, said):
    with pytest.raises(ValueError, match=said):
        sample(model, (1, 1, 3, 3))


def test_colours_that_a_layer_would_mix_are_named():
    first = MaskedConv2d(3, 6, 3, "A", colours=3)
    with pytest.raises(ValueError, match=r"model.1 \(Conv2d\) mixes the colours"):
        sample(nn.Sequential(first, nn.Conv2d(6, 3, 1)), (1, 3, 2, 2))
    with pytest.raises(ValueError, match=r"model.1 was made for colours=1, the images have 3"):
        sample(nn.Sequential(first, MaskedConv2d(6, 3, 1, "B")), (1, 3, 2, 2))


def test_a_model_of_ones_own_joins_in_and_an_activation_before_the_first_layer_is_fine():
    model = lively(CausalSequential(nn.Tanh(), Joining(), nn.Identity()))
    drawn = [sample(model, (2, 1, 5, 5), way, generator=seeded()) for way in WAYS]
    assert all(torch.equal(one.images, drawn[0].images) for one in drawn)


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_leaks_is_found_while_it_draws(way):
    model, shape = network("plain")
    model[2].mask[:, :, 1, 2] = True
    if way == "cached":
        assert sample(model, shape, way, generator=seeded(), check=False).images.shape == shape
    with pytest.raises(
        RuntimeError, match=r"not those they were drawn from, first at \(row, column, colour\) \(0, 0, 0\)"
    ):
        sample(model, shape, way, generator=seeded())
    model[2].mask[:, :, 1, 2] = False


def test_a_model_that_diverged_draws_nothing():
    model, shape = network("plain")
    with torch.no_grad():
        model[0].bias.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="logits are not numbers"):
        sample(model, shape)


PLANTED = [  # where, what, what instead: each a bug that a twin could have
    (twins.Convolution, "put", lambda self, x, colour, h: None),
    (twins.Convolution, "row", lambda self, y: None),
    (twins.Sum, "step", lambda self, x, colour, h: twins.Chain.step(self, x, colour, h)),
]


@pytest.mark.parametrize(("kind", "method", "instead"), PLANTED, ids=[f"{k.__name__}.{m}" for k, m, _ in PLANTED])
def test_these_tests_find_planted_bugs(kind, method, instead, monkeypatch):
    monkeypatch.setattr(kind, method, instead)
    with pytest.raises(RuntimeError, match="not those they were drawn from"):
        test_all_ways_draw_the_same_images_from_the_same_logits("residual")


REFUSED = [
    ({"way": "fast"}, "no way 'fast'; there are naive, restricted, cached"),
    ({"shape": (2, 4, 4)}, r"shape is \(images, colours, height, width\), all 1 at least, got \(2, 4, 4\)"),
    ({"uniforms": torch.rand(2, 1, 4, 5)}, r"uniforms must have the images' shape \(2, 1, 4, 4\), got \(2, 1, 4, 5\)"),
    ({"known": torch.tensor(True)}, "give both or neither"),
    ({"known": torch.ones(3), "values": torch.ones(4)}, r"known of shape \(3,\) does not broadcast to \(2, 1, 4, 4\)"),
    ({"known": torch.ones(4), "values": torch.ones(4)}, "known must be of torch.bool, got torch.float32"),
    ({"known": torch.tensor(True), "values": torch.tensor(255.0)}, "values must lie between 0 and 1, got 255 to 255"),
    ({"uniforms": torch.full((2, 1, 4, 4), torch.nan)}, "uniforms must lie between 0 and 1, got nan to nan"),
    ({"condition": torch.tensor([1])}, "condition has 1 rows for 2 images"),
    ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
]


@pytest.mark.parametrize(("wrong", "said"), REFUSED, ids=[said[:20] for _, said in REFUSED])
def test_arguments_that_do_not_fit_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        sample(plain(1), **({"shape": (2, 1, 4, 4)} | wrong))


@pytest.mark.parametrize("way", ["naive", "restricted"])
def test_a_model_that_returns_something_else_is_refused(way):
    with pytest.raises(ValueError, match=r"for images \(1, 3, \d, 2\) the model returned \(1, 4, \d, 2\)"):
        sample(nn.Conv2d(3, 4, 1), (1, 3, 2, 2), way)


@pytest.mark.gpu
@every_network
def test_on_a_gpu_as_on_the_cpu(name):
    model, shape = network(name)
    here = sample(model, shape, generator=seeded())
    model.to("cuda")
    for way in WAYS:
        there = sample(model, shape, way, generator=seeded())
        assert torch.equal(there.images.cpu(), here.images)
    model.to("cpu")


def test_stacks_of_gated_layers_of_many_sizes():
    layers = [GatedMaskedConv2d(1, 4, 7, "A"), GatedMaskedConv2d(4, 6, 1, "B"), GatedMaskedConv2d(6, 6, 5, "B")]
    model = lively(CausalSequential(GatedStack(*layers), nn.Conv2d(6, 5, 1)))
    drawn = [sample(model, (2, 1, 7, 4), way, generator=seeded()) for way in WAYS]
    assert all(torch.equal(one.images, drawn[0].images) for one in drawn)
