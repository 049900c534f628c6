"""The demo backbone of LPIPS: a small classifier of whole scenes, as AlexNet and VGG are of photographs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...demo import world
from ...models.lpips import DemoBackbone, save_demo_backbone
from .clip import attributes
from .common import Pictures, Run, fit, write_json

CLASSES = (
    len(world.SHAPES),
    len(world.COLOURS),
    len(world.PATTERNS),
    len(world.GROUND_KINDS),
    len(world.GROUND_COLOURS),
)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = DemoBackbone()
        self.head = nn.Linear(self.backbone.channels[-1] * 2, sum(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        last = self.backbone.features(images)[-1]
        return self.head(torch.cat([last.mean((2, 3)), last.amax((2, 3))], 1))


def train(run: Run) -> nn.Module:
    pictures = Pictures(run.work, seed=11, count=100_000)
    truths = torch.from_numpy(np.stack([attributes(scene)[1] for scene in pictures.scenes]))

    def loss(network: nn.Module, indices: np.ndarray, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        images = pictures.batch(indices)
        images = images + 0.1 * torch.rand((), generator=generator) * torch.randn(images.shape, generator=generator)
        outputs = network(images.to(run.device)).split(CLASSES, 1)
        targets = truths[indices].to(run.device)
        # Of two objects the one in front is asked for; both answers cannot be learned, which does no harm here.
        value = sum(F.cross_entropy(o, targets[:, i]) for i, o in enumerate(outputs))
        return value, {"shape": (outputs[0].argmax(1) == targets[:, 0]).float().mean().item()}

    def export(average: nn.Module, facts: dict) -> None:
        folder = run.out / "lpips"
        folder.mkdir(parents=True, exist_ok=True)
        save_demo_backbone(average.backbone, folder / "model.safetensors")
        write_json(folder / "training.json", facts)

    torch.manual_seed(run.seed)
    return fit("backbone", run, Classifier(), len(pictures), loss, export, average=0.995)
