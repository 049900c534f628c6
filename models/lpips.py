"""LPIPS (Zhang et al. 2018) through the `lpips` package, with its backbone from a local file.

The package downloads its backbones from torchvision; here they are read from files, never fetched. Its own
learned linear weights come with the package.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lpips
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..weights.precision import as_float32, as_stored
from ..weights.read import read_weights

BACKBONE_FILES = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
"""lpips' backbone names and the files torchvision publishes for them."""

DEMO_METADATA = "blendswap_lpips"
MINIMUM_SIDE = 32
"""Smallest side a backbone takes; smaller pictures are enlarged to it (bilinear)."""


class DemoBackbone(nn.Module):
    """A small convolutional backbone for LPIPS: five stages (3×3 convolution, batch norm, ReLU).

    `channels` are the widths of the stages; the side is halved by the second, third and fourth. Takes
    [B, 3, H, W] in -1..1 as it is (lpips' ImageNet scaling is not applied in front of it).
    """

    STRIDES = (1, 2, 2, 2, 1)

    def __init__(self, channels: Sequence[int] = (16, 32, 48, 64, 64)):
        super().__init__()
        if len(channels) != len(self.STRIDES):
            raise ValueError(f"DemoBackbone has {len(self.STRIDES)} stages, but channels = {tuple(channels)}.")
        self.channels = tuple(int(width) for width in channels)
        widths = (3, *self.channels)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            )
            for (before, after), stride in zip(itertools.pairwise(widths), self.STRIDES, strict=True)
        )

    def features(self, images: Tensor) -> list[Tensor]:
        """The five feature maps [B, C, h, w] of `images` [B, 3, H, W] in -1..1."""
        maps = []
        for stage in self.stages:
            images = stage(images)
            maps.append(images)
        return maps

    def pooled(self, images: Tensor) -> Tensor:
        """The last feature map averaged over space, [B, channels[-1]]: what a classifier is trained on."""
        return self.features(images)[-1].mean(dim=(2, 3))

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.features(images)


def save_demo_backbone(backbone: DemoBackbone, path: str | Path) -> None:
    """Write `backbone` as the one-file safetensors (fp16) that `Perceptual("demo", path)` reads."""
    save_file(
        as_stored(backbone.state_dict()),
        str(path),
        metadata={DEMO_METADATA: json.dumps({"channels": backbone.channels})},
    )


class Perceptual(nn.Module):
    """LPIPS between pictures, differentiable.

    `backbone` is "alex", "vgg" or "squeeze" (weights in torchvision's file and naming, lpips' learned linear
    weights on top) or "demo" (`DemoBackbone`; its layers count equally, as in lpips' baseline without learned
    weights, so its values are not comparable with those of the others). `name` says which, such as
    "lpips-alex": a reported LPIPS must name it.

    Raises:
        ValueError: unknown backbone; a file that is truncated, of another kind, or wants to run code.
        FileNotFoundError: no file at `path`; the message says which file goes where.
    """

    def __init__(self, backbone: str, path: str | Path):
        super().__init__()
        if backbone != "demo" and backbone not in BACKBONE_FILES:
            raise ValueError(
                f"LPIPS backbone '{backbone}' is unknown. Choose one of {', '.join([*BACKBONE_FILES, 'demo'])}."
            )
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(_missing(backbone, path))
        self.name = f"lpips-{backbone}"
        # ComfyUI runs nodes in inference mode; weights made there could not take part in a gradient.
        with torch.inference_mode(False):
            self.network = _demo_network(path) if backbone == "demo" else _published_network(backbone, path)
            self.network.eval().requires_grad_(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """LPIPS [B] (float32, 0 = equal) of `images` and `others`, [B, 3, H, W] in -1..1.

        `others` may have batch size 1. Sides below `MINIMUM_SIDE` are enlarged first. Runs on the device of
        this module and in the grad mode of the caller.
        """
        if images.shape[1:] != others.shape[1:]:
            raise ValueError(
                f"LPIPS compares pictures of one size, but got {tuple(images.shape)} and {tuple(others.shape)}."
            )
        device = next(self.network.parameters()).device
        first, second = (
            _at_least_minimum(pictures.to(device, torch.float32)) for pictures in (images, others.expand_as(images))
        )
        return self.network(first, second).flatten()


def _at_least_minimum(images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    if min(height, width) >= MINIMUM_SIDE:
        return images
    size = (max(height, MINIMUM_SIDE), max(width, MINIMUM_SIDE))
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def _missing(backbone: str, path: Path) -> str:
    if backbone == "demo":
        return (
            f"The demo LPIPS backbone {path} is missing. It comes with the node pack (demo/models/lpips): "
            "reinstall the pack or train it with `python run.py train`."
        )
    return (
        f"The LPIPS backbone '{backbone}' needs torchvision's file {BACKBONE_FILES[backbone]}, which is not "
        f"at {path}. Download it from https://download.pytorch.org/models/{BACKBONE_FILES[backbone]} and "
        "put it into ComfyUI's models/lpips folder."
    )


def _published_network(backbone: str, path: Path) -> nn.Module:
    with warnings.catch_warnings():
        # lpips calls torchvision with an argument that torchvision deprecated.
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net=backbone, pnet_rand=True, lpips=True, verbose=False)
    cure = f"Choose the backbone that fits the file, or download torchvision's {BACKBONE_FILES[backbone]} again."
    weights, _ = read_weights(path, cure)
    if not isinstance(weights, dict):
        raise ValueError(f"{path} holds a {type(weights).__name__}, not a state dict. {cure}")
    # lpips cuts torchvision's `features` into slices and keeps the layer numbers: slice2.3.weight =
    # features.3.weight
    sources = {key: "features." + key.split(".", 1)[1] for key in network.net.state_dict()}
    absent = [source for source in sources.values() if source not in weights]
    wrong = [
        source
        for key, source in sources.items()
        if source in weights and weights[source].shape != network.net.state_dict()[key].shape
    ]
    if absent or wrong:
        raise ValueError(
            f"{path} is not torchvision's {BACKBONE_FILES[backbone]}: "
            f"{'it lacks ' + absent[0] if absent else 'another shape of ' + wrong[0]}. {cure}"
        )
    network.net.load_state_dict({key: weights[source] for key, source in sources.items()})
    return network


def _demo_network(path: Path) -> nn.Module:
    cure = "Reinstall the pack or train the backbone with `python run.py train`."
    weights, metadata = read_weights(path, cure)
    if DEMO_METADATA not in metadata:
        raise ValueError(f"{path} is not a demo LPIPS backbone: its metadata has no '{DEMO_METADATA}'. {cure}")
    backbone = DemoBackbone(json.loads(metadata[DEMO_METADATA])["channels"])
    try:
        backbone.load_state_dict(as_float32(weights))
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights its metadata describes ({error}). {cure}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The smallest of lpips' networks serves as the frame; its own backbone is put aside.
        network: Any = lpips.LPIPS(net="squeeze", pnet_rand=True, lpips=False, verbose=False)
    network.net = backbone
    network.L, network.chns = len(backbone.channels), list(backbone.channels)
    network.scaling_layer = nn.Identity()
    return network
