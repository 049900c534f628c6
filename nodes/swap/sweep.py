"""The node that swaps with a grid of λ values and shows which is best."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from comfy_api.latest import io, ui

from ...images.masks import plain_mask, prepare_mask
from ..blend.report import NONE, load_perceptual, lpips_choices, lpips_path
from ..shared import folders
from ..shared.convert import split_alpha
from ..shared.frame import Frame
from ..shared.inputs import aliases, dial
from ..shared.sockets import AttentionIO, ClipGuideIO, SwapSettingsIO, SwapSubjectsIO, SwapTokensIO
from .run import Attention, Progress, Target, as_latent, frame_of, whole_frame
from .settings import amount, unit_input

if TYPE_CHECKING:
    from ...attention_swap.prompts import PromptPair
    from ...attention_swap.sampler import Subject
    from ...attention_swap.settings import SwapSettings
    from ...attention_swap.sweep import Column
    from ...hosts.comfy.guide import ComfyGuide

GRID = "0, 10, 20, 30"
# As on the sheet, whose font has no Greek.
SYMBOLS = {"self_map": "M", "cross_map": "A", "self_output": "phi"}


class AttentionSwapSweep(io.ComfyNode):
    """Swap with every combination of some λ's, over one capture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def values(name: str, words: str, default: str) -> io.String.Input:
            return io.String.Input(
                name, default=default, tooltip=f"Values of {words}, with commas between. Empty: the settings' alone."
            )

        return io.Schema(
            node_id="AttentionSwapSweep",
            display_name="Attention Swap Sweep",
            category="BlendSwap/swap",
            **aliases("xy plot", "grid", "parameter search", "contact sheet", "photoswap"),
            description=(
                "Swaps once for each combination of the λ's and shows all on a sheet, with scores that do not come "
                "from the MODEL: what happened to the background, how much of the outline is kept, how well the "
                "subject fits. Over a tape (AttentionCapture with for_sweep on) N targets cost N runs, over a replay "
                "2 N."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The target's MODEL, as for AttentionSwapSampler."),
                AttentionIO.Input(
                    "attention", tooltip="The source; of a tape with for_sweep on and λ's at least the grid's."
                ),
                io.Conditioning.Input("positive", tooltip="The target's prompt."),
                io.Vae.Input("vae", tooltip="Decodes the results."),
                unit_input(),
                values("self_map", "λ_M", GRID),
                values("cross_map", "λ_A", ""),
                values("self_output", "λ_φ", "0, 10, 20"),
                io.Int.Input(
                    "max_targets",
                    default=36,
                    min=1,
                    max=1000,
                    tooltip="A larger grid than this is refused, for its time.",
                ),
                io.Float.Input(
                    "cfg", default=0.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance; 0 for the source's."
                ),
                dial(
                    io.Combo.Input(
                        "lpips",
                        options=lpips_choices(),
                        default=NONE,
                        tooltip="Backbone of LPIPS, for the distance to reference.",
                    )
                ),
                SwapTokensIO.Input("tokens", optional=True, tooltip="How the prompts' words correspond (SwapPrompts)."),
                io.Conditioning.Input("negative", optional=True, tooltip="Without it the source's."),
                SwapSettingsIO.Input(
                    "settings", optional=True, tooltip="Everything but the grid's λ's; without it the capture's."
                ),
                SwapSubjectsIO.Input("subjects", optional=True, tooltip="SwapSubject, as for AttentionSwapSampler."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the subject is, for the scores: outside of it is background. It does not "
                    "keep the swap from changing that.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The source picture to score against; without it the source as it was sampled.",
                ),
                ClipGuideIO.Input(
                    "clip_guide",
                    optional=True,
                    tooltip="A CLIP that says how well the subject fits prompt (CLIPGuideLoader).",
                ),
                io.String.Input(
                    "prompt",
                    optional=True,
                    default="",
                    dynamic_prompts=True,
                    tooltip="For clip_guide: what the subject is to be.",
                ),
                io.Image.Input(
                    "reference", optional=True, tooltip="A picture of the new subject, cut to it, for LPIPS."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="sheet", tooltip="The source and all results, labelled, the best framed."),
                io.Image.Output(display_name="images", tooltip="The results, in the grid's order."),
                io.String.Output(display_name="table", tooltip="Their scores, the best marked."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, lpips: str = NONE, **_) -> str:
        return folders.fingerprint(lpips_path, lpips)

    @classmethod
    def execute(
        cls,
        model,
        attention: Attention,
        positive,
        vae,
        unit: str,
        self_map: str = GRID,
        cross_map: str = "",
        self_output: str = "0, 10, 20",
        max_targets: int = 36,
        cfg: float = 0.0,
        lpips: str = NONE,
        tokens: PromptPair | None = None,
        negative=None,
        settings: SwapSettings | None = None,
        subjects: tuple[Subject, ...] | None = None,
        mask: torch.Tensor | None = None,
        image: torch.Tensor | None = None,
        clip_guide: ComfyGuide | None = None,
        prompt: str = "",
        reference: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        from ...attention_swap import sweep

        scorers = Scorers(mask, clip_guide, prompt.strip(), reference, lpips)
        if len(attention.capture.noise) != 1:
            raise ValueError(
                f"attention holds {len(attention.capture.noise)} pictures; a sweep is of one: capture a latent of one "
                "picture"
            )
        texts = {"self_map": self_map, "cross_map": cross_map, "self_output": self_output}
        lambdas = {name: sweep.values(text, name) for name, text in texts.items()}
        count = math.prod(len(given) for given in lambdas.values() if given)
        if count > max_targets:
            sizes = " × ".join(f"{len(given)} of {name}" for name, given in lambdas.items() if given)
            raise ValueError(
                f"the grid has {count} targets ({sizes}), max_targets is {max_targets}: list fewer values, or raise "
                "max_targets"
            )
        wanted = sweep.grid(
            settings or attention.settings,
            {name: [amount(name, value, unit) for value in given] for name, given in lambdas.items()},
        )
        labels = _labels(lambdas)
        target = Target.of(model, attention, positive, negative, cfg, vae, tokens, subjects)
        _check_tape(target, wanted, labels)
        frame = None if image is None else frame_of(image, attention, vae)
        scorers.fit(whole_frame(attention, vae).inner, frame)
        results = target.run(wanted, Progress(model, count * attention.capture.steps))
        decoded = [vae.decode(as_latent(model, result.latents)["samples"]) for result in results]
        pictures = torch.cat(decoded)[..., :3].cpu()
        if image is None or frame is None:
            source = vae.decode(as_latent(model, results[0].source)["samples"])[..., :3].cpu()
        else:
            source = frame.view(image)
        scores = scorers.score(source, pictures)
        if clip_guide is not None:
            scorers.said += clip_guide.guide.notes([scorers.prompt])
        table = "\n".join([sweep.table(labels, scores), *scorers.said])
        columns = next((len(given) for given in reversed(lambdas.values()) if len(given) > 1), 1)
        marked = sweep.best(scores)[0] if scores else None
        sheet = sweep.contact_sheet(source[0], [*pictures], labels, columns, marked)
        shown = ui.PreviewImage(sheet, cls=cls).as_dict() | ui.PreviewText(table).as_dict()
        return io.NodeOutput(sheet, pictures, table, ui=shown)


def _labels(lambdas: dict[str, list[float]]) -> list[str]:
    given = {SYMBOLS[name]: chosen for name, chosen in lambdas.items() if chosen}
    if not given:
        return ["the settings' λ's"]
    return [
        ", ".join(f"{symbol} {value:g}" for symbol, value in zip(given, combination, strict=True))
        for combination in itertools.product(*given.values())
    ]


def _check_tape(target: Target, wanted: list[SwapSettings], labels: list[str]) -> None:
    """Raises ValueError where the capture does not serve the whole grid, before any of it is run."""
    from ...attention_swap.capture import needed

    capture = target.attention.capture
    if capture.tape is None:
        return
    branches = ("cond",) if math.isclose(target.cfg, 1) else ("cond", "uncond")
    for settings, label in zip(wanted, labels, strict=True):
        own = [settings, *(subject.settings(settings) for subject in target.subjects)]
        lacking = needed(own, capture.layout, capture.steps, branches).missing(capture.needs)
        if lacking:
            raise ValueError(
                f"attention does not have what the swap with {label} needs: {lacking}. At AttentionCapture switch "
                "for_sweep on and give it settings with the largest λ's of the grid, or set its storage to replay."
            )


class Scorers:
    """What the results are scored by; `said` names what is missing."""

    def __init__(self, mask, clip_guide: ComfyGuide | None, prompt: str, reference, lpips: str) -> None:
        if (clip_guide is None) != (not prompt):
            raise ValueError(
                "prompt is empty, but clip_guide is connected: say what the subject is to be"
                if clip_guide is not None
                else "prompt is given, but clip_guide is not connected: connect one (CLIPGuideLoader), or clear prompt"
            )
        if (reference is None) != (lpips == NONE):
            raise ValueError(
                "reference is connected, but lpips is none: choose a backbone"
                if lpips == NONE
                else "lpips is chosen, but reference is not connected: connect a picture of the new subject, or set "
                "lpips to none"
            )
        self.mask, self.clip_guide, self.prompt, self.reference = mask, clip_guide, prompt, reference
        self.perceptual = load_perceptual(lpips)
        self.said: list[str] = []
        if mask is None:
            self.said.append("background and pose are left out: connect mask, which says where the subject is")
        if clip_guide is None and reference is None:
            self.said.append(
                "identity is left out: connect clip_guide and give prompt, or connect reference and choose lpips"
            )

    def fit(self, size: tuple[int, int], frame: Frame | None) -> None:
        """Brings the mask to the results' size (height, width).

        Raises ValueError for a mask that is empty, or leaves no background.
        """
        if self.mask is None:
            return
        mask = plain_mask(self.mask, "mask", self.said)
        self.mask = prepare_mask(mask if frame is None else frame.cut(mask), *size)[0, 0].cpu()
        if not (self.mask == 0).any():
            raise ValueError(
                "mask covers the whole picture, so there is no background to measure: draw where the subject is"
            )

    def score(self, source: torch.Tensor, pictures: torch.Tensor) -> dict[Column, list[float]]:
        """source [1, H, W, 3], pictures [N, H, W, 3] in 0..1 → N scores by column."""
        from ...attention_swap import sweep

        found: dict[Column, list[float]] = {}
        if self.mask is not None:
            found[sweep.BACKGROUND] = [sweep.background_psnr(source[0], picture, self.mask) for picture in pictures]
            found[sweep.POSE] = [sweep.pose_overlap(source[0], picture, self.mask) for picture in pictures]
        region = (torch.ones(pictures.shape[1:3]) if self.mask is None else self.mask)[None, None]
        with torch.inference_mode(False), torch.no_grad():
            layout = pictures.clone().movedim(-1, 1) * 2 - 1
            if self.clip_guide is not None:
                from ...blending.ranking import score

                guide = self.clip_guide.load()
                column = sweep.Column(f"CLIP ({guide.name})", "identity")
                found[column] = [one.region for one in score(layout, region.clone(), self.prompt, guide)]
            if self.reference is not None and self.perceptual is not None:
                column = sweep.Column(f"LPIPS to reference ({self.perceptual.name})", "identity", more_is_better=False)
                found[column] = self._distances(layout, region.clone())
        return found

    def _distances(self, pictures: torch.Tensor, region: torch.Tensor) -> list[float]:
        """LPIPS of the subject's square of each picture to the reference."""
        from ...blending.ranking import region_view

        assert self.perceptual is not None, "asked of only where there is one"
        reference = split_alpha(self.reference, "reference")[0][:1].float().cpu().clone().movedim(-1, 1) * 2 - 1
        size = min(reference.shape[-2:])
        reference = region_view(reference, torch.ones(1, 1, *reference.shape[-2:]), size)
        return self.perceptual(region_view(pictures, region, size), reference).tolist()
