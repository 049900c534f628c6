"""A swap of demo pictures through the nodes, as ComfyUI would run them: in inference mode, one after another."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

from blendswap.demo import files

SOURCE, TARGET = "a red star on a blue sky background", "a green heart on a blue sky background"
STEPS = 4


@dataclasses.dataclass
class Kit:
    """The demo's MODEL, CLIP and VAE, and a swap's nodes with few steps. Inputs by name replace those given here."""

    model: Any
    clip: Any
    vae: Any

    @staticmethod
    def run(node: Any, **inputs: Any) -> tuple:
        with torch.inference_mode():
            return node.execute(**inputs).args

    def prompts(self, source: str = SOURCE, target: str = TARGET, **more: Any) -> tuple:
        """source, target, tokens, words"""
        from blendswap.nodes.swap.prompts import SwapPrompts

        return self.run(SwapPrompts, clip=self.clip, source_prompt=source, target_prompt=target, **more)

    def settings(self, preset: str = "photoswap", **more: Any) -> Any:
        from blendswap.nodes.swap.settings import SwapSettings

        return self.run(SwapSettings, preset=preset, **more)[0]

    def subject(self, *words: str, **more: Any) -> Any:
        from blendswap.nodes.swap.sampler import SwapSubject

        return self.run(SwapSubject, source_word=words[0], target_word=words[1], **more)[0]

    def empty(self, batch: int = 1) -> dict:
        return {"samples": torch.zeros(batch, 8, 16, 16)}

    def capture(self, **more: Any) -> tuple:
        """attention, latent, summary; of a source that is made up"""
        from blendswap.nodes.swap.capture import AttentionCapture

        defaults = dict(
            model=self.model,
            positive=self.prompts()[0],
            negative=self.prompts("", "")[0],
            seed=3,
            steps=STEPS,
            cfg=4.0,
            storage="tape",
            latent=self.empty(),
        )
        return self.run(AttentionCapture, **{**defaults, **more})

    def swap(self, attention: Any, target: str = TARGET, **more: Any) -> tuple:
        """latent, image, report, json"""
        from blendswap.nodes.swap.sampler import AttentionSwapSampler

        _, positive, tokens, _ = self.prompts(SOURCE, target)
        defaults = dict(model=self.model, attention=attention, positive=positive, tokens=tokens)
        return self.run(AttentionSwapSampler, **{**defaults, **more})

    @staticmethod
    def snapshot(model: Any) -> str:
        """What sits on a MODEL and on its network."""
        unet = model.model.diffusion_model
        hooks = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in unet.modules())
        return json.dumps(
            [
                repr(model.model_options),
                sorted(model.patches),
                sorted(model.object_patches),
                sorted(model.wrappers),
                sorted(model.callbacks),
                hooks,
            ],
            default=str,
        )


def checksum(model: Any) -> float:
    """Of a network's weights."""
    return sum(float(weight.double().abs().sum()) for weight in model.model.diffusion_model.parameters())


def concept(kit):
    """The MODEL with other weights on it, as a LoRA puts them."""
    model = kit.model.clone()
    generator = torch.Generator().manual_seed(1)
    patches = {
        f"diffusion_model.{key}": (torch.randn(weight.shape, generator=generator) * weight.float().std() * 0.2,)
        for key, weight in model.model.diffusion_model.state_dict().items()
        if key.endswith("attn2.to_v.weight")
    }
    model.add_patches(patches)
    return model


def half_mask(size: int = 64) -> torch.Tensor:
    """The left half."""
    mask = torch.zeros(1, size, size)
    mask[..., : size // 2] = 1
    return mask


def in_their_nodes(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of CLIPBlendSampler or CLIPBlendGuider, where those of BlendSettings and BlendFraming stand among them."""
    from blendswap.nodes.blend.settings import BlendFraming, BlendSettings

    own = dict(inputs)
    for socket, node in (("settings", BlendSettings), ("framing", BlendFraming)):
        names = {one.id for one in node.define_schema().inputs}
        dials = {name: own.pop(name) for name in names & own.keys()}
        if dials:
            own[socket] = node.execute(**dials).args[0]
    return own


@pytest.fixture
def interrupted(comfy, monkeypatch) -> Callable[[], AbstractContextManager]:
    """A context in which ComfyUI is told to interrupt at the second guided step, and has to."""

    @contextmanager
    def at_the_second_step():
        import comfy.model_management as management

        from blendswap.blending.denoiser import GuidedDenoiser

        calls, real = [], GuidedDenoiser.guided

        def interrupting(*arguments):
            calls.append(1)
            if len(calls) == 2:
                management.interrupt_current_processing(True)
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(GuidedDenoiser, "guided", interrupting)
            with pytest.raises(management.InterruptProcessingException):
                yield
        assert len(calls) == 2

    return at_the_second_step


@pytest.fixture(scope="session")
def parts(comfy):
    """The pixel prior, its VAE and the demo CLIP, loaded in inference mode as ComfyUI does."""
    from blendswap.hosts.comfy import adm as adm_comfy
    from blendswap.hosts.comfy.guide import ComfyGuide
    from blendswap.models.clip.loading import load_clip_guide

    with torch.inference_mode():
        model = adm_comfy.load_native_model(files.PRIOR, dtype=torch.float32)
        guide = ComfyGuide.wrap(load_clip_guide(files.CLIP, "auto", "cpu", torch.float32))
        return model, adm_comfy.pixel_space_vae(), guide


@pytest.fixture
def other(parts):
    """A second CLIP, of the same vocabulary, another size of vectors and random weights."""
    from blendswap.hosts.comfy.guide import ComfyGuide
    from blendswap.models.clip.guide import ClipGuide
    from blendswap.models.clip.loading import build_demo_clip
    from blendswap.models.clip.tokens import CompactTokenizer
    from blendswap.tools.training.clip import GUIDE

    tokenizer = CompactTokenizer(GUIDE.vocabulary(), context_length=16)
    torch.manual_seed(3)
    with torch.inference_mode():
        model = build_demo_clip(GUIDE.model_config(tokenizer.vocab_size) | {"embed_dim": 24})
        return ComfyGuide.wrap(ClipGuide(model, tokenizer, "other"))


@pytest.fixture(scope="session")
def kit(comfy) -> Kit:
    from blendswap.nodes.demo import DemoModelLoader

    with torch.inference_mode():
        return Kit(*DemoModelLoader.execute().args)
