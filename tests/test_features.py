"""Networks as measuring instruments: the right layers, the paper's normalisation, weights that are checked."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

from reprise import data, features
from reprise.data import DataError, files
from reprise.functional import gram_matrix

ROOT = Path(__file__).resolve().parents[1]
VGG_LAYERS = [f"conv{stage}_{place}" for stage, depth in enumerate((2, 2, 4, 4, 4), 1) for place in range(1, depth + 1)]
# Where torchvision's `features` have what a paper calls by name: behind the ReLU of each convolution.
VGG_INDEX = dict(zip(VGG_LAYERS, (1, 3, 6, 8, 11, 13, 15, 17, 20, 22, 24, 26, 29, 31, 33, 35), strict=True))
SQUEEZENET_INDEX = dict(
    zip(("conv1", *(f"fire{n}" for n in range(2, 10))), (1, 3, 4, 6, 7, 9, 10, 11, 12), strict=True)
)
THEIRS = {
    "vgg19": (torchvision.models.vgg19, VGG_INDEX),
    "squeezenet": (torchvision.models.squeezenet1_1, SQUEEZENET_INDEX),
}


def picture(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def their_weights(tmp_path, monkeypatch):
    """torchvision's own network, random, its state in a mirror under the published name; the checksum to match."""

    def publish(name: str) -> nn.Module:
        torch.manual_seed(0)
        # Without the fully connected layers, which are most of VGG-19 and nothing that is asked for.
        monkeypatch.setattr(nn.Linear, "reset_parameters", lambda self: None)
        theirs = THEIRS[name][0]().eval()
        for module in theirs.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.bias, std=0.1)  # torchvision starts at zero, where a lost bias goes unseen
        ((file, _),) = data.describe(name)["files"].items()
        place = tmp_path / "mirror" / "torch_hub" / file
        place.parent.mkdir(parents=True)
        torch.save({key: value for key, value in theirs.state_dict().items() if "classifier" not in key}, place)
        facts = data.describe(name) | {"files": {file: {"sha256": files.sha256(place)}}}
        monkeypatch.setattr(files, "descriptions", lambda: {name: facts, "photos": {}})
        monkeypatch.setenv("REPRISE_MIRROR", str(tmp_path / "mirror"))
        monkeypatch.setenv("REPRISE_DATA", str(tmp_path / "data"))
        return theirs

    return publish


def hooked(theirs: nn.Module, images: torch.Tensor, index: dict[str, int]) -> dict[str, torch.Tensor]:
    """What torchvision's own forward leaves at each layer."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    found, hooks = {}, []
    for name, place in index.items():
        take = lambda module, inputs, output, name=name: found.__setitem__(name, output.clone())  # noqa: E731
        hooks.append(theirs.features[place].register_forward_hook(take))
    with torch.no_grad():
        theirs.features((images - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", THEIRS)
def test_layers_are_those_of_torchvision(their_weights, name):
    theirs, index = their_weights(name), THEIRS[name][1]
    net = features.load(name, pooling="max")
    assert net.layers == tuple(index)
    images = picture(2, 3, 50, 41)
    expected, ours = hooked(theirs, images, index), net(images, net.layers)
    for layer in net.layers:
        assert ours[layer].shape == expected[layer].shape
        assert ours[layer].shape[1] == net.channels[layer]
        assert (expected[layer] == 0).any(), "behind the ReLU"
        torch.testing.assert_close(ours[layer], expected[layer], rtol=1e-4, atol=1e-5)


@pytest.mark.mirror
def test_squeezenet_of_the_mirror():
    if not data.at_hand("squeezenet"):
        pytest.skip("the mirror has no squeezenet")
    net = features.load("squeezenet", pooling="max")
    theirs = torchvision.models.squeezenet1_1()
    theirs.load_state_dict(torch.load(files.obtain("squeezenet", "squeezenet1_1-b8a52dc0.pth"), weights_only=True))
    images = torch.nn.functional.interpolate(data.load("photos")["cat"], size=(96, 120), mode="area")
    expected = hooked(theirs.eval(), images, SQUEEZENET_INDEX)
    for layer, tensor in net(images, net.layers).items():
        torch.testing.assert_close(tensor, expected[layer], rtol=1e-4, atol=1e-3)
    # The weights are the trained ones: the whole network knows a cat (classes 281 to 285) when it sees one.
    photo = torch.nn.functional.interpolate(data.load("photos")["cat"][..., 50:274], size=(224, 224), mode="area")
    with torch.no_grad():
        logits = theirs.classifier(net(photo, ["fire9"])["fire9"]).flatten(1)
    assert 281 <= logits.argmax(1).item() <= 285


@pytest.mark.parametrize("name", features.NETWORKS)
@pytest.mark.parametrize("pooling", ["average", "max"])
def test_normalising_scales_layers_and_changes_nothing_else(name, pooling):
    plain = features.load(name, "orthogonal", pooling=pooling, seed=3).double()
    scaled = features.load(name, "orthogonal", pooling=pooling, seed=3).double()
    for net in (plain, scaled):  # biases that are not zero, as trained ones are
        generator = torch.Generator().manual_seed(5)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.bias.copy_(0.1 * torch.randn(module.bias.shape, generator=generator, dtype=torch.float64))
    images, others = picture(3, 3, 40, 48).double(), picture(1, 3, 37, 64, seed=1).double()
    assert plain.means == {}
    assert scaled.normalise(images) is scaled
    assert tuple(scaled.means) == scaled.layers
    for layer, now in scaled(images, scaled.layers).items():
        mean = now.mean((0, 2, 3))
        before = plain(images, [layer])[layer].mean((0, 2, 3))
        halves = before.chunk(2 if layer.startswith("fire") else 1)  # the two convolutions of a fire module
        loud = torch.cat([part > features._QUIET * part.mean() for part in halves])
        assert loud.float().mean() > 0.5
        torch.testing.assert_close(mean[loud], torch.ones_like(mean[loud]))
        assert (mean[~loud] < 1).all()
    then, now = plain(others, plain.layers), scaled(others, plain.layers)
    for layer in plain.layers:
        torch.testing.assert_close(now[layer] * scaled.means[layer][:, None, None], then[layer])
        assert not torch.allclose(now[layer], then[layer])
    # Normalised once more, by other images, the means still lead back to the network as it was.
    for layer, tensor in scaled.normalise(others)(images, plain.layers).items():
        torch.testing.assert_close(
            tensor * scaled.means[layer][:, None, None], plain(images, [layer])[layer], rtol=1e-6, atol=1e-9
        )


def test_normalised_means_the_bundled_photographs():
    net = features.load("reprise", normalised=True)
    assert {mean.dtype for mean in copy.deepcopy(net).double().means.values()} == {torch.float64}
    photographs = features._photographs()
    assert photographs.shape == (6, 3, 224, 224)
    shares = []
    for layer, tensor in net(photographs, net.layers).items():
        mean = tensor.mean((0, 2, 3))
        assert mean.max() < 1.001, layer
        shares.append((mean > 0.999).float().mean().item())
    assert min(shares) > 0.8


@pytest.mark.parametrize("name", features.NETWORKS)
def test_any_size_down_to_the_smallest(name):
    net = features.load(name, "he")
    for height, width in ((net.smallest, net.smallest), (net.smallest + 5, 70)):
        last = net(picture(1, 3, height, width), net.layers[-1])[net.layers[-1]]
        assert last.shape[1] == net.channels[net.layers[-1]]
        assert min(last.shape[2:]) >= 1
    with pytest.raises(ValueError, match=rf"at least {net.smallest} pixels .*\(1, 3, 40, {net.smallest - 1}\)"):
        net(picture(1, 3, 40, net.smallest - 1), net.layers[:1])
    # One pixel less does not reach the last layer: the bound is the network's, not a caution of ours.
    net.smallest -= 1
    with pytest.raises(RuntimeError, match="too small"):
        net(picture(1, 3, net.smallest, net.smallest), net.layers)


def test_computes_no_further_than_asked():
    net = features.load("vgg19", "he")
    entered = []
    for name, block in net.blocks.items():
        block.register_forward_hook(lambda *_, name=name: entered.append(name))
    found = net(picture(1, 3, 32, 32), ["conv2_1", "conv1_2"])
    assert entered == ["conv1_1", "conv1_2", "pool1", "conv2_1"]
    assert list(found) == ["conv2_1", "conv1_2"], "in the order asked for"
    entered.clear()
    assert net(picture(1, 3, 32, 32), []) == {}
    assert entered == []


def test_parameters_are_frozen_and_images_are_not():
    net = features.load("reprise")
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())
    before = {key: value.clone() for key, value in net.state_dict().items()}
    images = picture(1, 3, 32, 32).requires_grad_()
    layers = net(images, ["conv1_1", "conv5_1"])
    kept = layers["conv1_1"].clone()
    sum(layer.square().sum() for layer in layers.values()).backward()
    assert torch.equal(layers["conv1_1"], kept)
    assert images.grad.abs().max() > 0
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_gradients_reach_the_image():
    """Against finite differences, in double precision and through both poolings."""
    for pooling in ("average", "max"):
        net = features.load("reprise", "orthogonal", pooling=pooling).double()
        images = picture(1, 3, 16, 16).double().requires_grad_()
        way = picture(1, 3, 16, 16, seed=9).double()

        def total(x, net=net):
            return sum(layer.square().sum() for layer in net(x, ["conv2_1", "conv4_2"]).values())

        (slope,) = torch.autograd.grad(total(images), images)
        with torch.no_grad():
            measured = (total(images + 1e-6 * way) - total(images - 1e-6 * way)) / 2e-6
        torch.testing.assert_close((slope * way).sum(), measured, rtol=1e-5, atol=0)


def test_pre_and_post_are_inverse():
    for name in features.NETWORKS:
        net, images = features.load(name, "he"), picture(2, 3, 9, 9)
        assert (net.post(net.pre(images)) - images).abs().max() < 1e-6
        assert net.pre(images).std() > 2 * images.std()


@pytest.mark.parametrize("weights", ["orthogonal", "he"])
def test_random_weights(weights):
    state = torch.get_rng_state()
    net, same, other = (features.load("reprise", weights, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    images = picture(1, 3, 64, 64)
    layer = "conv4_2"
    assert torch.equal(net(images, [layer])[layer], same(images, [layer])[layer])
    assert not torch.allclose(net(images, [layer])[layer], other(images, [layer])[layer])
    # The scale neither dies away nor explodes on the way up.
    size = {name: tensor.square().mean().sqrt() for name, tensor in net(images, net.layers).items()}
    assert 0.05 < size["conv5_1"] / size["conv1_1"] < 20
    if weights == "orthogonal":
        rows = net.blocks["conv4_2"].conv.weight.flatten(1)
        torch.testing.assert_close(rows @ rows.T, 2 * torch.eye(len(rows)), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: features.load("vgg16"), "no 'vgg16'; there are vgg19, squeezenet, reprise"),
        (lambda: features.load("vgg19", "random"), "no 'random'; there are trained, orthogonal, he"),
        (lambda: features.load("vgg19", pooling="mean"), "no 'mean'; there are average, max"),
        (
            lambda: features.load("vgg19", "he")(picture(1, 3, 32, 32), ["relu4_2"]),
            "no layer 'relu4_2'; there are conv1_1",
        ),
        (lambda: features.load("squeezenet", "he")(picture(1, 3, 32, 32), ["pool1"]), "no layer 'pool1'; .*fire9$"),
        (
            lambda: features.load("reprise")(picture(3, 32, 32), ["conv1_1"]),
            r"\(N, 3, H, W\), got .*shape \(3, 32, 32\)",
        ),
        (lambda: features.load("reprise")(picture(1, 1, 32, 32), ["conv1_1"]), r"shape \(1, 1, 32, 32\)"),
        (lambda: features.load("reprise")(torch.ones(1, 3, 32, 32).byte(), ["conv1_1"]), "got torch.uint8"),
    ],
)
def test_bad_input_is_refused_with_what_there_is(call, said):
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.parametrize("name", ["vgg19", "squeezenet"])
def test_without_the_weights_the_one_that_ships_is_named(nowhere, name):
    with pytest.raises(
        DataError, match=rf"{name}: .*REPRISE_MIRROR .*torch_hub/{name}.*reprise.*needs no download$"
    ) as caught:
        features.load(name)
    assert len(str(caught.value).splitlines()) == 1


def test_a_damaged_file_is_not_used(nowhere):
    place = nowhere / "data" / "torch_hub" / "vgg19-dcbb9e9d.pth"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"something else")
    with pytest.raises(DataError, match=r"vgg19-dcbb9e9d\.pth is damaged"):
        features.load("vgg19")


def test_checksums_are_the_beginning_of_torchvision_s_names():
    for name in THEIRS:
        ((file, facts),) = data.describe(name)["files"].items()
        known = facts["sha256"] if isinstance(facts["sha256"], list) else [facts["sha256"]]
        assert known[0].startswith(re.search(r"-([0-9a-f]{8})\.pth$", file)[1])
        assert (data.describe(name)["urls"][0] + file) in {
            "vgg19": torchvision.models.VGG19_Weights.IMAGENET1K_V1.url,
            "squeezenet": torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url,
        }[name]


def test_our_network_ships(nowhere, monkeypatch):
    """Found without network, mirror or data folder; the same in every place that speaks of it."""
    monkeypatch.setattr(data, "loaded", {})
    net = features.load("reprise")
    record = json.loads((ROOT / "data" / "weights" / "reprise.json").read_text(encoding="utf-8"))
    content = (ROOT / "data" / "weights" / record["file"]).read_bytes()
    assert hashlib.sha256(content).hexdigest() == record["sha256"]
    assert data.loaded == {"reprise/weights": record["sha256"]}
    assert data.describe("reprise")["files"] == {record["file"]: {"sha256": record["sha256"]}}
    assert sum(p.numel() for p in net.parameters()) == record["parameters"]
    assert len(content) < 3e6


@pytest.fixture(scope="module")
def training():
    """The script that trained our network, as a module."""
    spec = importlib.util.spec_from_file_location("train_reprise", ROOT / "data" / "weights" / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_folding_takes_the_batch_normalisation_away_and_changes_nothing(training):
    net = features.load("reprise", "he")
    trunk = training.to_train(net)
    torch.manual_seed(0)
    with torch.no_grad():
        for module in trunk.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    tensor.uniform_(0.5, 2)
                for tensor in (module.bias, module.running_mean):
                    tensor.normal_()
    trunk.eval()
    net.blocks.load_state_dict(
        {key.replace(".", ".conv."): value for key, value in training.folded(net, trunk).items()}
    )
    images = picture(2, 3, 40, 40)
    expected = trunk(net.pre(images)).detach()
    assert expected.std() > 0.1
    torch.testing.assert_close(net(images, ["conv5_1"])["conv5_1"], expected, rtol=1e-4, atol=1e-4)


def test_what_the_training_writes_is_what_is_loaded(training, tmp_path, monkeypatch):
    class Part(NamedTuple):
        images: torch.Tensor
        labels: torch.Tensor

    def few(name, split):
        return Part(picture(250, 3, 32, 32), torch.arange(250) % 10)

    monkeypatch.setattr(training, "load", few)
    monkeypatch.setattr(training, "JUDGED_AT", (16,))
    monkeypatch.setattr(sys, "argv", ["train.py", "--steps", "2", "--out", str(tmp_path / "weights")])
    (tmp_path / "weights").mkdir()
    training.main()
    record = json.loads((tmp_path / "weights" / "reprise.json").read_text(encoding="utf-8"))
    assert [entry["step"] for entry in record["curve"]] == [2]
    facts = data.describe("reprise") | {"files": {record["file"]: {"sha256": record["sha256"]}}}
    monkeypatch.setattr(files, "descriptions", lambda: {"reprise": facts})
    monkeypatch.setattr(files, "_HOME", tmp_path)
    net = features.load("reprise")
    assert sum(p.numel() for p in net.parameters()) == record["parameters"]
    assert net(picture(1, 3, 32, 32), ["conv5_1"])["conv5_1"].std() > 0


@pytest.mark.mirror
def test_our_network_sees_what_its_record_says(training):
    """On the validation split; the test split was looked at once, when the weights were made."""
    record = json.loads((ROOT / "data" / "weights" / "reprise.json").read_text(encoding="utf-8"))
    if not data.at_hand(record["data"]["name"]):
        pytest.skip(f"the mirror has no {record['data']['name']}")
    net, classifier = features.load("reprise"), nn.Linear(256, 10)
    stored = load_file(ROOT / "data" / "weights" / record["file"])
    classifier.load_state_dict({name: stored[f"classifier.{name}"].float() for name in ("weight", "bias")})
    part = data.load(record["data"]["name"], "valid")
    right = training.share_right(
        lambda x: net(x, ["conv5_1"])["conv5_1"].mean((2, 3)),
        classifier,
        part.images,
        part.labels,
        record["accuracy"]["size"],
    )
    assert abs(right - record["accuracy"]["valid"]) <= 0.003
    assert record["accuracy"]["test"] > 0.7


def test_our_network_missing_is_one_clear_line(nowhere, monkeypatch):
    monkeypatch.setattr(files, "_HOME", nowhere)
    with pytest.raises(DataError, match=r"reprise: no intact reprise\.safetensors.*git brings it back$") as caught:
        features.load("reprise")
    assert len(str(caught.value).splitlines()) == 1
    (nowhere / "weights").mkdir()
    (nowhere / "weights" / "reprise.safetensors").write_bytes(b"cut short")
    with pytest.raises(DataError, match=r"reprise\.safetensors is damaged"):
        features.load("reprise")


def test_gram_matrix_is_the_sum_of_equation_3():
    by_hand = torch.tensor([[[[1.0, 2.0]], [[3.0, -1.0]]]])  # two channels of two positions
    assert gram_matrix(by_hand).tolist() == [[[5.0, 1.0], [1.0, 10.0]]]
    f = torch.randn(3, 5, 4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = gram_matrix(f)
    assert gram.shape == (3, 5, 5)
    assert gram.dtype == torch.float64
    torch.testing.assert_close(gram, torch.einsum("nihw,njhw->nij", f, f), rtol=0, atol=1e-13)
    # Where something is does not matter, how much of it there is does.
    moved = f.flatten(2)[..., torch.randperm(28, generator=torch.Generator().manual_seed(1))].view_as(f)
    torch.testing.assert_close(gram_matrix(moved), gram)
    torch.testing.assert_close(gram_matrix(torch.cat([f, f], 3)), 2 * gram)
    torch.testing.assert_close(gram_matrix(f.to(memory_format=torch.channels_last)), gram)
    assert torch.autograd.gradcheck(gram_matrix, f[:1, :3, :2, :2].clone().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gram_matrix_of_half_precision_does_not_overflow(dtype):
    f = torch.full((1, 2, 64, 64), 100.0, dtype=dtype)
    gram = gram_matrix(f)
    assert gram.dtype == torch.float32
    assert gram.unique().tolist() == [4096 * 1e4]


@pytest.mark.parametrize(
    ("features", "said"),
    [
        (torch.ones(2, 3, 4), r"\(N, C, H, W\), got torch.float32 of shape \(2, 3, 4\)"),
        (torch.ones(1, 2, 3, 4, 5), r"shape \(1, 2, 3, 4, 5\)"),
        (torch.ones(1, 2, 3, 4).long(), "got torch.int64"),
    ],
)
def test_gram_matrix_refuses_other_shapes_and_types(features, said):
    with pytest.raises(ValueError, match=said):
        gram_matrix(features)
