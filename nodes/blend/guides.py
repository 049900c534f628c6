"""Nodes that say what guides an edit where and when: several CLIPs, several regions, a schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io

from ..shared.convert import mask_for, to_bchw
from ..shared.inputs import aliases, dial
from ..shared.sockets import BlendRegionsIO, ClipGuideIO, GuideScheduleIO

if TYPE_CHECKING:
    from ...blending.regions import Region
    from ...hosts.comfy.guide import ComfyGuide

MOST_GUIDES = 4
GUARDS_NOTHING = "text_guard does nothing: no region has a prompt that could be written"


def negative_prompt_input(**settings) -> Any:
    return io.String.Input(
        "negative_prompt",
        multiline=True,
        default="",
        dynamic_prompts=True,
        tooltip="What the region is not to show, a line each: CLIP pushes away from it with half the weight, and ranks "
        "by the prompt's lead over it.",
        **settings,
    )


def guide_image_input() -> Any:
    return io.Image.Input(
        "guide_image",
        optional=True,
        tooltip="A picture that the region is to resemble for CLIP, beside the prompt (each has half of the weight) or "
        "instead of it.",
    )


def steering_inputs() -> list[Any]:
    """Optional inputs of a node that runs an edit: what guides beside the prompt, where else, and when."""
    return [
        negative_prompt_input(optional=True),
        guide_image_input(),
        BlendRegionsIO.Input(
            "regions", optional=True, tooltip="Further regions, edited in the same pass (BlendRegion)."
        ),
        GuideScheduleIO.Input("schedule", optional=True, tooltip="At which steps CLIP guides (GuideSchedule)."),
    ]


def text_guard_input() -> Any:
    return dial(
        io.Float.Input(
            "text_guard",
            default=0.0,
            min=0.0,
            max=10.0,
            step=0.05,
            optional=True,
            tooltip="Pushes away from pictures that write the prompt instead of showing it, which CLIP takes for the "
            "same; 0 is off, 0.5 a start. Candidates are then ranked by the prompt's lead over its written word too.",
        )
    )


@dataclasses.dataclass(frozen=True)
class RegionRequest:
    """What a node asks of a part of a picture, in ComfyUI's own terms.

    `clip_guide` None is the guide of the sampler. `guide_image` [B, H, W, C] in 0..1; its first picture counts.
    """

    mask: torch.Tensor
    prompt: str
    negative_prompt: str = ""
    strength: float = 1.0
    clip_guide: ComfyGuide | None = None
    guide_image: torch.Tensor | None = None

    @property
    def asks(self) -> bool:
        """Whether anything is to steer here."""
        wanted = self.prompt.strip() or self.negative_prompt.strip() or self.guide_image is not None
        return bool(wanted) and self.strength > 0

    def guide(self, default: ComfyGuide) -> ComfyGuide:
        return self.clip_guide or default

    def notes(self, default: ComfyGuide) -> list[str]:
        """What of the prompts the guide does not read, and what it does not know."""
        from ...blending.regions import lines

        prompts = [self.prompt.strip(), *lines(self.negative_prompt)]
        return self.guide(default).guide.notes([prompt for prompt in prompts if prompt])

    def region(self, default: ComfyGuide, mask: torch.Tensor, text_guard: float = 0.0) -> Region:
        """The core's region with `mask` [1, 1, h, w] on the working canvas; its guide is loaded already."""
        from ...blending.regions import Region, terms_for

        picture = None
        if self.guide_image is not None:
            picture = to_bchw(self.guide_image[:1].clone(), "guide_image").to(mask.device)
        guide = self.guide(default).ready()
        return Region(mask, terms_for(guide, self.prompt, self.negative_prompt, picture, text_guard), self.strength)


@dataclasses.dataclass(frozen=True)
class PlacedRegion:
    """A request with its mask [B, 1, H, W] for a picture; `number` counts from 1, which is the node's own region."""

    number: int
    request: RegionRequest
    mask: torch.Tensor

    def with_mask(self, mask: torch.Tensor) -> PlacedRegion:
        return dataclasses.replace(self, mask=mask)


def place(
    image: torch.Tensor, requests: Sequence[RegionRequest], notes: list[str] | None = None
) -> tuple[PlacedRegion, ...]:
    """The requests on `image` [B, H, W, C]; errors, and what is added to `notes`, name the region."""
    return tuple(
        PlacedRegion(
            number,
            request,
            mask_for(image, request.mask, "mask" if number == 1 else f"mask of region {number}", notes),
        )
        for number, request in enumerate(requests, start=1)
    )


def patchers_of(requests: Sequence[RegionRequest], default: ComfyGuide) -> list:
    """Every model that the guides of `requests` need, each once."""
    found = {id(one.model): one for request in requests for one in request.guide(default).patchers}
    return list(found.values())


def told(regions: Sequence[Region], numbers: Iterable[int]) -> list[str]:
    """Lines for a report: what steers where, with what weight."""
    lines = []
    for number, region in zip(numbers, regions, strict=True):
        share = f"{(region.mask > 0).float().mean().item():.1%} of the canvas, strength {region.strength:g}"
        terms = "; ".join(str(term) for term in region.terms) or "nothing steers"
        lines.append(f"region {number} ({share}): {terms}")
    return lines


class CombineCLIPGuides(io.ComfyNode):
    """Several CLIPs with weights as one CLIP_GUIDE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = []
        for number in range(1, MOST_GUIDES + 1):
            inputs.append(
                ClipGuideIO.Input(f"clip_guide_{number}", optional=number > 2, tooltip="A CLIP (CLIPGuideLoader).")
            )
            inputs.append(
                io.Float.Input(
                    f"weight_{number}",
                    default=1.0,
                    min=0.01,
                    max=100.0,
                    step=0.05,
                    tooltip="Its share; only the proportion of the weights counts.",
                )
            )
        return io.Schema(
            node_id="CombineCLIPGuides",
            display_name="Combine CLIP Guides",
            category="BlendSwap/blend",
            **aliases("clip ensemble", "several clips", "merge clip", "multi clip"),
            description=(
                "Several CLIPs as one guide, with weights: a picture that fools one of them seldom fools the others. "
                "They steer one after another, so memory is that of the largest. As a scorer it gives the weighted "
                "mean similarity."
            ),
            inputs=inputs,
            outputs=[ClipGuideIO.Output(display_name="CLIP_GUIDE")],
        )

    @classmethod
    def execute(
        cls,
        clip_guide_1: ComfyGuide,
        weight_1: float,
        clip_guide_2: ComfyGuide,
        weight_2: float,
        weight_3: float = 1.0,
        weight_4: float = 1.0,
        clip_guide_3: ComfyGuide | None = None,
        clip_guide_4: ComfyGuide | None = None,
    ) -> io.NodeOutput:
        from ...hosts.comfy.guide import ComfyGuide

        guides = (
            (clip_guide_1, weight_1),
            (clip_guide_2, weight_2),
            (clip_guide_3, weight_3),
            (clip_guide_4, weight_4),
        )
        return io.NodeOutput(ComfyGuide.combine([(guide, weight) for guide, weight in guides if guide is not None]))


class BlendRegion(io.ComfyNode):
    """One more region of an edit, with what guides it. Regions form a chain."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendRegion",
            display_name="Blend Region",
            category="BlendSwap/blend",
            **aliases("multi region", "regional prompt", "several masks", "second mask", "area prompt"),
            description=(
                "A region with a mask, a prompt and a strength of its own, edited in the same pass as the sampler's "
                "own region. Where masks overlap, a pixel is shared in proportion to their values; every guide looks "
                "at the whole of its region."
            ),
            inputs=[
                io.Mask.Input("mask", tooltip="White is changed. Of the size of the picture that is edited."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    dynamic_prompts=True,
                    tooltip="What this region is to show. Empty, with no guide_image: it is made up anew.",
                ),
                negative_prompt_input(),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    tooltip="Factor of the sampler's guidance for this region.",
                ),
                BlendRegionsIO.Input("regions", optional=True, tooltip="Regions before this one in the chain."),
                ClipGuideIO.Input(
                    "clip_guide", optional=True, tooltip="A CLIP for this region alone. Without it: the sampler's."
                ),
                guide_image_input(),
            ],
            outputs=[
                BlendRegionsIO.Output(display_name="BLEND_REGIONS", tooltip="For CLIPBlendSampler or CLIPBlendGuider.")
            ],
        )

    @classmethod
    def execute(
        cls,
        mask: torch.Tensor,
        prompt: str,
        negative_prompt: str,
        strength: float,
        regions: tuple[RegionRequest, ...] = (),
        clip_guide: ComfyGuide | None = None,
        guide_image: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        request = RegionRequest(mask, prompt, negative_prompt, strength, clip_guide, guide_image)
        return io.NodeOutput((*regions, request))


class GuideSchedule(io.ComfyNode):
    """When CLIP guides during a run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GuideSchedule",
            display_name="Guide Schedule",
            category="BlendSwap/blend",
            **aliases("guidance schedule", "start end step", "clip guidance"),
            description=(
                "At which steps of a run CLIP guides. The first steps decide on shape and layout, the last on detail; "
                "steps that are not guided cost half or less."
            ),
            inputs=[
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Fraction of the run from which it guides.",
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Fraction of the run at which it stops. Above start.",
                ),
                io.Int.Input("every", default=1, min=1, max=1000, tooltip="At every n-th step only."),
            ],
            outputs=[
                GuideScheduleIO.Output(
                    display_name="GUIDE_SCHEDULE", tooltip="For CLIPBlendSampler or CLIPBlendGuider."
                )
            ],
        )

    @classmethod
    def execute(cls, start: float, end: float, every: int) -> io.NodeOutput:
        from ...blending.schedule import GuideSchedule as Schedule

        return io.NodeOutput(Schedule(start, end, every))
