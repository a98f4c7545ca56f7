"""Train the network that ships with this repository, and write it beside this file with the record of its training.

    REPRISE_MIRROR=… .venv/bin/python data/weights/train.py

It learns to tell the ten classes of CIFAR-10 apart, at many scales. Batch normalisation helps it to learn and is
folded into the convolutions afterwards, so that what ships is convolutions, ReLUs and average pooling, as in VGG.
The step that ships is chosen on the validation split; the test split is looked at once, when all is decided.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from reprise import features
from reprise.data import load
from reprise.training import Batches, train

HERE = Path(__file__).parent
BATCH, RATE, WARM_UP, DECAY = 128, 0.15, 200, 5e-4
SIZES = (24, 32), (32, 64)  # pixels an image is enlarged or reduced to: range at the first step, range at the last
COLOUR = 0.3  # weight of the second head's error
JUDGED_AT = 32, 48, 64  # pixels


def to_train(net: features.Features) -> nn.Sequential:
    """The network's convolutions and poolings, with a batch normalisation after every convolution."""
    layers: list[nn.Module] = []
    for name, block in net.blocks.items():
        if name.startswith("pool"):
            layers.append(nn.AvgPool2d(2))
            continue
        conv = nn.Conv2d(block.conv.in_channels, block.channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        layers += [conv, nn.BatchNorm2d(block.channels), nn.ReLU()]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def varied(images: Tensor, size: int) -> Tensor:
    """Random crops, stretched a little, mirrored, at a size in pixels. Colours stay as they are."""
    u = torch.rand(len(images), 6)
    zoom, stretch = 1 - 0.45 * u[:, 0] + 0.1 * u[:, 1], torch.exp(0.4 * (u[:, 2] - 0.5))
    seen = torch.stack([zoom * stretch, zoom / stretch], 1)  # share of the width and height that is seen
    shift = (2 * u[:, 3:5] - 1) * ((1 - seen).clamp(min=0) + 0.12)
    way = torch.diag_embed(seen)
    way[:, 0, 0] *= torch.where(u[:, 5] < 0.5, -1, 1)
    grid = F.affine_grid(torch.cat([way, shift[:, :, None]], 2), [len(images), 3, size, size], align_corners=False)
    return F.grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)


def colours(images: Tensor) -> Tensor:
    """What the second head is to tell: mean and deviation of each colour, (N, 6)."""
    return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)


def seen_by(trunk: nn.Module, images: Tensor) -> Tensor:
    """The last layer's means over all positions, (N, C); convolved in bfloat16, which CPUs and GPUs have units for."""
    with torch.autocast(images.device.type, torch.bfloat16):
        return trunk(images.contiguous(memory_format=torch.channels_last)).float().mean((2, 3))


@torch.no_grad()
def share_right(see, classifier: nn.Linear, images: Tensor, labels: Tensor, size: int) -> float:
    """Accuracy on images resized to ``size`` pixels."""
    right = 0
    for some, wanted in zip(images.split(250), labels.split(250), strict=True):
        some = F.interpolate(some, size=(size, size), mode="bicubic", antialias=True)
        right += (classifier(see(some)).argmax(1) == wanted).sum().item()
    return right / len(labels)


@torch.no_grad()
def folded(net: features.Features, trunk: nn.Sequential) -> dict[str, Tensor]:
    """Weights and biases that do without the batch normalisations what the trunk does with them."""
    convolutions = [layer for layer in trunk if isinstance(layer, nn.Conv2d)]
    normalisations = [layer for layer in trunk if isinstance(layer, nn.BatchNorm2d)]
    found = {}
    for name, conv, norm in zip(net.layers, convolutions, normalisations, strict=True):
        factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        found[f"{name}.weight"] = (conv.weight * factor[:, None, None, None]).contiguous()
        found[f"{name}.bias"] = norm.bias - norm.running_mean * factor
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the network that ships with this repository.")
    parser.add_argument("--data", default="cifar10_subset", choices=["cifar10_subset", "cifar10"])
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for weights and record")
    given = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()

    net = features.load("reprise", "he", seed=given.seed)
    learn, valid = load(given.data, "train"), load(given.data, "valid")
    images, valid_images = net.pre(learn.images), net.pre(valid.images)
    torch.manual_seed(given.seed)
    trunk = to_train(net)
    heads = nn.ModuleDict({"classes": nn.Linear(net.channels[net.layers[-1]], 10)})
    heads["colours"] = nn.Linear(heads["classes"].in_features, 6)
    learned = [*trunk.parameters(), *heads.parameters()]
    groups = [
        {"params": [p for p in learned if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in learned if p.dim() == 1]},
    ]
    optimizer = torch.optim.SGD(groups, lr=RATE, momentum=0.9, nesterov=True)
    batches = Batches(images, learn.labels, size=BATCH)

    best, curve = {"valid": 0.0}, []
    training = train("reprise", given.steps, trunk, heads, optimizer, batches, seed=given.seed)
    for step in training:
        way = step / given.steps
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, step / WARM_UP) * (1 + math.cos(math.pi * way)) / 2
        least, most = ((1 - way) * first + way * last for first, last in zip(*SIZES, strict=True))
        size = 8 * round((least + (most - least) * torch.rand(()).item()) / 8)
        some, labels = next(batches)
        some = varied(some, size)
        seen = seen_by(trunk, some)
        loss = F.cross_entropy(heads["classes"](seen), labels, label_smoothing=0.1)
        off = F.mse_loss(heads["colours"](seen), colours(some))
        optimizer.zero_grad()
        (loss + COLOUR * off).backward()
        optimizer.step()
        training.log(loss=loss, colours=off)
        if (step + 1) % 100 == 0 or step == given.steps - 1:
            trunk.eval()
            right = {
                size: share_right(lambda x: seen_by(trunk, x), heads["classes"], valid_images, valid.labels, size)
                for size in JUDGED_AT
            }
            trunk.train()
            mean = sum(right.values()) / len(right)
            seconds = round(time.monotonic() - started)
            curve.append({"step": step + 1, "seconds": seconds, **{f"{size} px": right[size] for size in right}})
            print(json.dumps(curve[-1] | {"loss": round(loss.item(), 3), "colours": round(off.item(), 3)}), flush=True)
            if mean >= best["valid"]:
                classifier = {
                    f"classifier.{name}": p.detach().clone() for name, p in heads["classes"].named_parameters()
                }
                weights = {name: p.detach().half() for name, p in (folded(net, trunk) | classifier).items()}
                best = {"valid": mean, "step": step + 1, "right": right, "weights": weights}
    write(given, best, curve, time.monotonic() - started)


def write(given: argparse.Namespace, best: dict, curve: list[dict], seconds: float) -> None:
    """Save the weights, look at the test split with what was saved, and put everything down."""
    net, classifier = features.load("reprise", "he"), nn.Linear(best["weights"]["classifier.weight"].shape[1], 10)
    classifier.load_state_dict({name: best["weights"][f"classifier.{name}"].float() for name in ("weight", "bias")})
    net.blocks.load_state_dict(
        {
            f"{layer}.conv.{kind}": best["weights"][f"{layer}.{kind}"].float()
            for layer in net.layers
            for kind in ("weight", "bias")
        }
    )
    last = net.layers[-1]
    size = max(JUDGED_AT, key=lambda size: best["right"][size])
    parts = {split: load(given.data, split) for split in ("valid", "test")}
    right = {
        split: share_right(lambda x: net(x, [last])[last].mean((2, 3)), classifier, part.images, part.labels, size)
        for split, part in parts.items()
    }
    file = given.out / "reprise.safetensors"
    save_file(best["weights"], file, {"network": "reprise.features.reprise", "licence": "MIT"})
    record = {
        "file": file.name,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "parameters": sum(p.numel() for name, p in best["weights"].items() if not name.startswith("classifier")),
        "stored": "float16, batch normalisation folded in; of the two heads, the classifier",
        "data": {"name": given.data, "splits": "train to learn, valid to choose the step, test once at the end"},
        "accuracy": {"size": size, **right, "valid_by_size": best["right"]},
        "training": {
            "steps": given.steps,
            "chosen_step": best["step"],
            "batch": BATCH,
            "optimizer": f"SGD, Nesterov momentum 0.9, weight decay {DECAY}, rate {RATE} to 0 along a cosine",
            "loss": f"cross-entropy, labels smoothed by 0.1, + {COLOUR} x squared error of colours (mean, deviation)",
            "augmentation": "random crop, stretch, shift and mirroring; no change of colours",
            "sizes": f"multiples of 8 px, from {SIZES[0]} at the first step to {SIZES[1]} at the last",
            "seed": given.seed,
            "seconds": round(seconds),
            "device": f"one thread of a shared CPU ({platform.machine()}), bfloat16",
            "date": date.today().isoformat(),
            "versions": {name: version(name) for name in ("torch", "safetensors")},
        },
        "curve": curve,
    }
    (given.out / "reprise.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record["accuracy"]), record["sha256"])


if __name__ == "__main__":
    main()
