"""Networks used as measuring instruments: frozen, their layers called by name.

    net = features.load("reprise", normalised=True)
    layers = net(images, ["conv1_1", "conv4_2"])  # a dict of tensors, each after its ReLU

What each network is, its licence and where its weights come from stand in ``data/datasets.yaml``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import data
from .data import files

__all__ = ["NETWORKS", "Features", "load"]

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CIFAR = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
_QUIET = 0.01  # of its convolution's mean: filters that fire less are normalised as if they fired this much


class Rectified(nn.Module):
    """A convolution and its ReLU."""

    def __init__(self, *arguments: int, **options: int):
        super().__init__()
        self.conv = nn.Conv2d(*arguments, **options)

    @property
    def channels(self) -> int:
        return self.conv.out_channels

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()  # not in place: somebody may be holding the tensor below

    def normalise(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Divide the outputs by their means. ``x`` is the input as it was, ``before`` what it is divided by now."""
        y = self(x)
        means = y.mean((0, 2, 3))
        means = torch.maximum(means, _QUIET * means.mean())
        self.conv.weight.mul_(before[:, None, None] / means[:, None, None, None])
        self.conv.bias.div_(means)
        return y, means


class Fire(nn.Module):
    """SqueezeNet's module (Iandola et al. 2016): few channels by 1x1, then many by 1x1 and 3x3, concatenated."""

    def __init__(self, channels: int, squeezed: int, each: int):
        super().__init__()
        self.channels = 2 * each
        self.squeeze = Rectified(channels, squeezed, 1)
        self.expand1x1 = Rectified(squeezed, each, 1)
        self.expand3x3 = Rectified(squeezed, each, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x)
        return torch.cat([self.expand1x1(x), self.expand3x3(x)], 1)

    def normalise(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        x, before = self.squeeze.normalise(x, before)
        y, means = zip(self.expand1x1.normalise(x, before), self.expand3x3.normalise(x, before), strict=True)
        return torch.cat(y, 1), torch.cat(means)


class Features(nn.Module):
    """A frozen network whose layers are called by name.

    Attributes:
        layers: the names, from the image upwards. A convolution's layer is what comes out of its ReLU; a
            SqueezeNet ``fire`` module's is its concatenated output.
        channels: channels of each layer, by name.
        smallest: the least height and width of an image, in pixels, that reach the last layer.
        means: after :meth:`normalise`, what each filter was divided by, (C,) for every layer; else empty.
    """

    def __init__(self, blocks: dict[str, nn.Module], mean: Iterable[float], std: Iterable[float], smallest: int):
        super().__init__()
        self.blocks = nn.ModuleDict(blocks)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.layers = tuple(name for name in blocks if not name.startswith("pool"))
        self.channels = {name: blocks[name].channels for name in self.layers}
        self.smallest = smallest
        self.means: dict[str, Tensor] = {}

    def forward(self, images: Tensor, layers: Iterable[str]) -> dict[str, Tensor]:
        """The layers asked for, computed no further than the last of them.

        Args:
            images: RGB, shape (N, 3, H, W), floating-point, 0 to 1 (an optimiser may overstep), H and W at least
                ``smallest``. Differentiable.
            layers: names out of ``self.layers``, or a single one.

        Returns:
            Name to tensor (N, C, H', W'), in the order asked for.

        Raises:
            ValueError: for a name that is not there, or images of another shape, type or too small a size.
        """
        wanted = [layers] if isinstance(layers, str) else list(layers)
        if unknown := [name for name in wanted if name not in self.layers]:
            raise ValueError(f"no layer {unknown[0]!r}; there are {', '.join(self.layers)}")
        self._check(images)
        x, found = self.pre(images), {}
        for name, block in self.blocks.items():
            if len(found) == len(set(wanted)):
                break
            x = block(x)
            if name in wanted:
                found[name] = x
        return {name: found[name] for name in wanted}

    def pre(self, images: Tensor) -> Tensor:
        """Images from 0 to 1 as the first convolution takes them: less the mean of the training images, over their
        standard deviation, each channel by its own."""
        return (images - self.mean) / self.std

    def post(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`pre`."""
        return x * self.std + self.mean

    @torch.no_grad()
    def normalise(self, images: Tensor) -> Features:
        """Scale every filter so that its mean activation, over these images and all positions, is 1.

        Gatys et al. 2016 (the conference version), section 2. ReLU and pooling let a positive factor through, so each
        filter's weights and bias are divided by its mean and the next layer's weights for it multiplied: a layer
        of the old network is ``self.means[name][:, None, None]`` times that of the new one, on any image. A filter
        that fires less than a hundredth as much as the filters of its convolution do on average is divided by that
        hundredth, since one that never fires cannot be normalised; its mean then stays below 1.
        """
        self._check(images)
        x, before, seen = self.pre(images), torch.ones_like(self.mean.flatten()), {}
        for name, block in self.blocks.items():
            if name in self.layers:
                x, before = block.normalise(x, before)
                seen[name] = before * self.means.get(name, 1)
            else:
                x = block(x)
        self.means = seen
        return self

    def _apply(self, change: Callable[[Tensor], Tensor], recurse: bool = True) -> Features:
        """What ``to``, ``double`` and ``cuda`` do to parameters and buffers; the means go along."""
        self.means = {name: change(mean) for name, mean in self.means.items()}
        return super()._apply(change, recurse)

    def _check(self, images: Tensor) -> None:
        shape = tuple(images.shape)
        if images.dim() != 4 or shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be floating-point (N, 3, H, W), got {images.dtype} of shape {shape}")
        if min(shape[2:]) < self.smallest:
            raise ValueError(f"images must be at least {self.smallest} pixels high and wide, got shape {shape}")


def _pool(kind: str, size: int, ceil: bool = False) -> nn.Module:
    return {"average": nn.AvgPool2d, "max": nn.MaxPool2d}[kind](size, stride=2, ceil_mode=ceil)


def _vgg_like(widths: Iterable[int], depths: Iterable[int], pooling: str) -> dict[str, nn.Module]:
    """Stages of 3x3 convolutions with a pooling between two of them: conv1_1, conv1_2, pool1, conv2_1, ..."""
    blocks, channels = {}, 3
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True), 1):
        if blocks:
            blocks[f"pool{stage - 1}"] = _pool(pooling, 2)
        for place in range(1, depth + 1):
            blocks[f"conv{stage}_{place}"] = Rectified(channels, width, 3, padding=1)
            channels = width
    return blocks


def vgg19(pooling: str) -> Features:
    """The convolutions of VGG-19 (Simonyan & Zisserman 2014)."""
    return Features(_vgg_like((64, 128, 256, 512, 512), (2, 2, 4, 4, 4), pooling), *_IMAGENET, smallest=16)


def squeezenet(pooling: str) -> Features:
    """SqueezeNet 1.1 (Iandola et al. 2016) up to its classifier."""
    blocks = {"conv1": Rectified(3, 64, 3, stride=2)}
    channels = 64
    for number, (squeezed, each) in enumerate(
        [(16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256)], 2
    ):
        if number in (2, 4, 6):
            blocks[f"pool{number - 1}"] = _pool(pooling, 3, ceil=True)
        blocks[f"fire{number}"] = Fire(channels, squeezed, each)
        channels = 2 * each
    return Features(blocks, *_IMAGENET, smallest=17)


def reprise(pooling: str) -> Features:
    """The network that ships with this repository; ``data/weights/train.py`` trains it."""
    return Features(_vgg_like((32, 64, 128, 192, 256), (2, 2, 2, 2, 1), pooling), *_CIFAR, smallest=16)


NETWORKS: dict[str, Callable[[str], Features]] = {"vgg19": vgg19, "squeezenet": squeezenet, "reprise": reprise}


def load(
    name: str, weights: str = "trained", *, pooling: str = "average", normalised: bool = False, seed: int = 0
) -> Features:
    """A network to measure with, in evaluation mode, its parameters frozen.

    Args:
        name: ``vgg19`` and ``squeezenet``, trained on ImageNet, are downloaded or taken from a mirror; ``reprise``
            ships with this repository.
        weights: ``trained``; or random ones as a control, ``orthogonal`` or ``he`` (normal), both scaled so that
            ReLU layers keep the size of their inputs, biases zero.
        pooling: ``average``, which Gatys et al. prefer, or ``max``, with which VGG-19 and SqueezeNet were trained.
        normalised: call :meth:`Features.normalise` with the six photographs of ``data.load("photos")``, the
            shorter side of each reduced to 224 pixels and cut to a square.
        seed: of random weights. No generator of the process is touched.

    Raises:
        ValueError: for an unknown name, kind of weights or pooling, listing those there are.
        DataError: if the weights are neither at hand nor can be downloaded.
    """
    for given, known in ((name, NETWORKS), (weights, ("trained", *_RANDOM)), (pooling, ("average", "max"))):
        if given not in known:
            raise ValueError(f"features.load: no {given!r}; there are {', '.join(known)}")
    with torch.random.fork_rng(devices=[]):  # torch fills new layers with random numbers, which we replace
        net = NETWORKS[name](pooling)
    if weights == "trained":
        net.blocks.load_state_dict(_trained(name, net))
    else:
        generator = torch.Generator().manual_seed(seed)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                _RANDOM[weights](module.weight, generator)
                nn.init.zeros_(module.bias)
    # Channels last is what CPUs and GPUs convolve fastest.
    net = net.to(memory_format=torch.channels_last).requires_grad_(False).eval()
    return net.normalise(_photographs()) if normalised else net


def _orthogonal(weight: Tensor, generator: torch.Generator) -> None:
    nn.init.orthogonal_(weight, gain=2**0.5, generator=generator)


def _he(weight: Tensor, generator: torch.Generator) -> None:
    nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)


_RANDOM = {"orthogonal": _orthogonal, "he": _he}


def _trained(name: str, net: Features) -> dict[str, Tensor]:
    """A network's published weights under the names of ours."""
    if name == "reprise":
        from safetensors.torch import load_file

        theirs, prefixes = load_file(_file(name)), {block: block for block in net.blocks}
    else:
        # Of these files nothing but tensors is read: whatever else a pickle could do is refused.
        theirs = torch.load(_file(name), map_location="cpu", weights_only=True)
        prefixes, index = {}, 0
        for block, module in net.blocks.items():  # torchvision numbers convolutions, ReLUs, modules and poolings
            prefixes[block] = f"features.{index}"
            index += 2 if isinstance(module, Rectified) else 1
    found = {}
    for key in net.blocks.state_dict():
        block, _, rest = key.partition(".")
        found[key] = theirs[f"{prefixes[block]}.{rest.replace('conv.', '')}"].float()
    return found


def _file(name: str) -> Path:
    """The file of a network's weights, its checksum put down for the record of a run."""
    (file,) = files.descriptions()[name]["files"]
    path = files.obtain(name, file)
    data.loaded[f"{name}/weights"] = files.sha256(path)
    return path


def _photographs() -> Tensor:
    """The photographs that ship inside the dependencies, (6, 3, 224, 224)."""
    squares = []
    for photo in data.load("photos").values():
        side = min(photo.shape[2:])
        square = photo[..., (photo.shape[2] - side) // 2 :, (photo.shape[3] - side) // 2 :][..., :side, :side]
        squares.append(F.interpolate(square, size=(224, 224), mode="bicubic", antialias=True).clamp(0, 1))
    return torch.cat(squares)
