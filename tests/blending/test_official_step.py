"""The preset `official` makes the steps of the published code (see record_official_step.md)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blendswap.blending import sampler
from blendswap.blending.augment import ExtendingAugmentations
from blendswap.blending.guidance import Guidance
from blendswap.blending.regions import Region
from blendswap.blending.sampler import StepReport
from blendswap.blending.settings import BlendSettings, preset_settings
from blendswap.models.adm.config import read_adm_config
from blendswap.models.adm.convert import convert_adm_weights
from blendswap.models.adm.network import GuidedDiffusionUNet
from blendswap.protocols.diffusion import Prediction

HERE = Path(__file__).parent
REFERENCE = json.loads((HERE / "data" / "official_step.json").read_text(encoding="utf-8"))
CASES = REFERENCE["cases"]


# The recipe of the reference ------------------------------------------------------------------------------


def published_weights(spec: dict) -> dict[str, Tensor]:
    """Made-up weights by the published names, by the recipe of the ADM loader's tests."""
    place = importlib.util.spec_from_file_location("adm_recipe", HERE.parent / "models" / "test_adm.py")
    recipe = importlib.util.module_from_spec(place)
    place.loader.exec_module(recipe)
    return recipe.published_weights(spec)


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape)).float()


def source_picture() -> Tensor:
    levels = np.random.RandomState(21).randint(0, 256, (16, 16, 3))
    return torch.from_numpy(levels).movedim(-1, 0)[None].float() / 255 * 2 - 1


def rectangle() -> Tensor:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 5:14] = 1
    return mask


class StandInGuide:
    """The CLIP of the recipe: a fixed layer after CLIP's own preprocessing."""

    name = "stand-in"
    image_size = 12

    def embed_image(self, images: Tensor) -> Tensor:
        assert images.shape[-2:] == (self.image_size, self.image_size)
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
        pixels = ((images + 1) / 2 - mean) / std
        features = torch.tanh(F.conv2d(pixels, numbers(11, 8, 3, 3, 3) / 4, stride=2)).mean(dim=(2, 3))
        return F.normalize(features @ numbers(12, 8, 8), dim=-1)

    def embed_text(self) -> Tensor:
        return F.normalize(numbers(13, 1, 8), dim=-1)[0]


def stand_in_lpips(first: Tensor, second: Tensor) -> Tensor:
    weight = numbers(14, 6, 3, 3, 3) / 5
    difference = torch.tanh(F.conv2d(first, weight)) - torch.tanh(F.conv2d(second, weight))
    return difference.square().mean(dim=(1, 2, 3))


class RecordedNoise:
    """The numbers that the published code drew, in its order: the start, then a step's own and its background's.

    A DDIM step draws there as well, and does not use it. The background's is the same for all candidates.
    """

    def __init__(self, case: dict):
        shape = (3, 16, 16)
        self.drawn = [numbers(101, case["batch"], *shape)]
        for step in range(case["steps_run"]):
            if case["sampler"] == "ddpm":
                self.drawn.append(numbers(102 + 2 * step, case["batch"], *shape))
            self.drawn.append(numbers(103 + 2 * step, 1, *shape).expand(case["batch"], *shape))

    def like(self, shape: torch.Size) -> Tensor:
        assert tuple(shape) == (3, 16, 16)
        return self.drawn.pop(0)


class PixelHost:
    """The converted published network behind the host protocol."""

    device = torch.device("cpu")
    downscale = 1

    def __init__(self, network: GuidedDiffusionUNet):
        self.network = network
        alphas = torch.cumprod(1 - network.betas, 0)
        self.train_sigmas = ((1 - alphas) / alphas).sqrt()

    def encode(self, image: Tensor) -> Tensor:
        return image

    def decode(self, x0: Tensor) -> Tensor:
        return x0

    def decode_for_guide(self, x0: Tensor) -> Tensor:
        return self.decode(x0)

    def predict(self, x: Tensor, sigma: float) -> Prediction:
        timestep = (self.train_sigmas - sigma).abs().argmin().repeat(len(x))
        eps, variance = self.network(x / (1 + sigma**2) ** 0.5, timestep)
        return Prediction(x - sigma * eps, variance)


@pytest.fixture(scope="module")
def host() -> PixelHost:
    spec = REFERENCE["spec"]
    weights = published_weights(spec)
    config = read_adm_config(weights, head_channels=spec["head_channels"], image_size=spec["image_size"])
    network = GuidedDiffusionUNet(config)
    network.unet.load_state_dict(convert_adm_weights(weights, config))
    return PixelHost(network.eval().requires_grad_(False))


# The steps ------------------------------------------------------------------------------------------------


def settings_of(case: dict) -> BlendSettings:
    """`official`, with what the case's command line changed."""
    settings = preset_settings("official", {"guidance": 1000.0})
    changes = {"sampler": case["sampler"], "start": 99 - case["index"]}
    if case["background_loss"]:
        changes |= {"background_weight": 1000.0, "background_loss": "official"}
    return BlendSettings(**{**vars(settings), **changes})


def guidance_of(case: dict) -> Guidance:
    augment = ExtendingAugmentations(copies=1, pooling="area")
    guide = StandInGuide()
    return Guidance(
        settings_of(case),
        (Region.of(rectangle(), guide, guide.embed_text()),),
        source_picture(),
        augment,
        augment.generators(range(case["batch"])),
        stand_in_lpips if case["background_loss"] else None,
    )


def recorded(case: dict) -> Tensor:
    return torch.tensor(case["values"]).view(case["batch"], 3, 16, 16)


def name(case: dict) -> str:
    background = "_background" if case["background_loss"] else ""
    return f"{case['sampler']}_{case['index']}_{case['steps_run']}{background}"


@pytest.mark.parametrize("case", CASES, ids=map(name, CASES))
def test_official_makes_the_published_steps(host: PixelHost, case: dict, monkeypatch) -> None:
    class Enough(Exception):
        pass

    def on_step(report: StepReport) -> None:
        reports.append(report)
        if len(reports) == case["steps_run"]:
            raise Enough

    reports, noise = [], RecordedNoise(case)
    monkeypatch.setattr(sampler, "CandidateNoise", lambda seeds, device: noise)
    with pytest.raises(Enough):
        sampler.blended_diffusion(host, guidance_of(case), range(case["batch"]), settings_of(case), on_step)
    for report in reports:
        assert report.losses.keys() == {"clip", "range"} | ({"background"} if case["background_loss"] else set())
    assert noise.drawn == []
    x, expected = reports[-1].x, recorded(case)
    # Of the largest value: untrained, the network takes step 74 to 100, where float32 itself is off by 1e-3.
    torch.testing.assert_close(x, expected, atol=1e-4 * max(1.0, expected.abs().max().item()), rtol=0)


def test_a_whole_run_of_official_ends_where_the_published_loop_does(host: PixelHost, monkeypatch) -> None:
    case = next(case for case in CASES if case["index"] + 1 == case["steps_run"] > 1)
    monkeypatch.setattr(sampler, "CandidateNoise", lambda seeds, device: RecordedNoise(case))
    result = sampler.blended_diffusion(host, guidance_of(case), range(case["batch"]), settings_of(case))
    torch.testing.assert_close(result, recorded(case).clamp(-1, 1), atol=1e-4, rtol=0)
