"""Nodes around inversions: making one, keeping one in a file, and handing one to ComfyUI's own samplers."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from comfy_api.latest import io, ui

from ...diffusion.sigmas import SCHEDULERS
from ..blend.report import NONE, load_perceptual, lpips_choices, lpips_path
from ..shared import folders
from ..shared.frame import Frame
from ..shared.inputs import PIXELS_PER_CELL, aliases, dial, running_node
from ..shared.sockets import InversionIO

if TYPE_CHECKING:
    from ...attention_swap.inversion.inversion import Inversion, Inverted
    from ...attention_swap.steps import StepReport

logger = logging.getLogger(__name__)

FOLDER = "inversions"
METHODS = ["null_text", "negative_prompt", "proximal", "direct", "ddim"]
WITHOUT_NEGATIVE = ("negative_prompt", "proximal")
"""Methods that put the source prompt in the negative prompt's place."""
GUIDANCE_PATCHES = ("sampler_pre_cfg_function", "sampler_cfg_function", "sampler_post_cfg_function")


class NullTextInvert(io.ComfyNode):
    """Turn a picture into noise that samples back to it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NullTextInvert",
            display_name="Null-Text Invert",
            category="BlendSwap/swap",
            **aliases(
                "ddim inversion",
                "null-text inversion",
                "image to noise",
                "unsample",
                "negative prompt inversion",
                "direct inversion",
                "real image editing",
            ),
            description=(
                "Finds the noise that samples back to a picture (DDIM inversion), and what guided sampling needs to "
                "stay on the way: null-text optimisation (Mokady et al. 2022), negative-prompt inversion, proximal "
                "guidance, or direct inversion. For AttentionCapture, and for a stock sampler: noise as latent_image "
                "with add_noise disabled, null as negative, euler, the same scheduler, steps and cfg."
            ),
            inputs=[
                io.Model.Input("model", tooltip="SD 1.x, SD 2.x or SDXL, with the LoRA and patches of the sampling."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the MODEL; shows the reconstruction."),
                io.Latent.Input("latent", tooltip="The picture's latent (VAEEncode), one picture."),
                io.Conditioning.Input("positive", tooltip="The source prompt: what the picture shows, in plain words."),
                io.Combo.Input(
                    "method",
                    options=METHODS,
                    default="null_text",
                    tooltip="null_text: an unconditional embedding for each step, optimised; best with any sampler. "
                    "negative_prompt: the source prompt in the negative's place, nothing to optimise. proximal: the "
                    "same, and a swap keeps only the larger part of the guidance. direct: the source is set back on "
                    "its path at each step; exact, for AttentionCapture alone. ddim: plain; good at cfg 1 only.",
                ),
                io.Int.Input("steps", default=50, min=1, max=1000, tooltip="Steps of the sampling to come."),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance of the sampling to come. The inversion itself has none.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=list(SCHEDULERS),
                    default="ddim_uniform",
                    tooltip="That of the sampling to come. official: the published code's, which ends a little above "
                    "zero noise; for AttentionSwapSampler's preset official, no stock sampler has it.",
                ),
                dial(
                    io.Combo.Input(
                        "optimiser",
                        options=["fast", "published"],
                        default="fast",
                        tooltip="null_text: fast starts from the source prompt and takes Gauss-Newton steps only where "
                        "they are needed; published is the published loop (Adam), several times slower.",
                    )
                ),
                dial(
                    io.Int.Input(
                        "inner_steps",
                        default=10,
                        min=1,
                        max=1000,
                        tooltip="null_text: most updates of the embedding at one step.",
                    )
                ),
                dial(
                    io.Float.Input(
                        "early_stop",
                        default=1e-5,
                        min=0.0,
                        max=1.0,
                        step=1e-6,
                        round=1e-9,
                        tooltip="null_text: error (MSE of the latent) at which a step is good enough. "
                        "That of the first step; it grows by 0.001 up to the last, as published.",
                    )
                ),
                dial(
                    io.Float.Input(
                        "lr",
                        default=1e-2,
                        min=1e-6,
                        max=10.0,
                        step=1e-3,
                        round=1e-6,
                        tooltip="null_text, published: learning rate of the first step.",
                    )
                ),
                dial(
                    io.Combo.Input(
                        "threshold",
                        options=["hard", "soft"],
                        default="hard",
                        tooltip="proximal: what is above the quantile stays, or is lowered by it.",
                    )
                ),
                dial(
                    io.Float.Input(
                        "quantile",
                        default=0.7,
                        min=0.0,
                        max=0.99,
                        step=0.01,
                        tooltip="proximal: share of the guidance that is left out, smallest first.",
                    )
                ),
                dial(
                    io.Combo.Input(
                        "lpips",
                        options=lpips_choices(),
                        default=NONE,
                        tooltip="Backbone of LPIPS for the report; values compare only within one.",
                    )
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="An empty prompt. Not needed for negative_prompt and proximal."
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The picture itself, to measure against. Without it the report knows the VAE's "
                    "round trip alone.",
                ),
            ],
            outputs=[
                InversionIO.Output(display_name="inversion", tooltip="For AttentionCapture and SaveInversion."),
                io.Latent.Output(display_name="noise", tooltip="For latent_image of a stock sampler; no noise added."),
                io.Conditioning.Output(display_name="null", tooltip="For a stock sampler as negative."),
                io.Image.Output(display_name="reconstruction", tooltip="What sampling gives back."),
                io.String.Output(display_name="report", tooltip="How well, in figures."),
                io.Image.Output(display_name="losses", tooltip="Distance from the path, and model runs, by step."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, lpips: str = NONE, **_) -> str:
        return folders.fingerprint(lpips_path, lpips)

    @classmethod
    def execute(
        cls,
        model,
        vae,
        latent: dict,
        positive,
        method: str = "null_text",
        steps: int = 50,
        cfg: float = 7.5,
        scheduler: str = "ddim_uniform",
        optimiser: str = "fast",
        inner_steps: int = 10,
        early_stop: float = 1e-5,
        lr: float = 1e-2,
        threshold: str = "hard",
        quantile: float = 0.7,
        lpips: str = NONE,
        negative=None,
        image=None,
    ) -> io.NodeOutput:
        from ...attention_swap.inversion.inversion import InvertSettings
        from ...attention_swap.inversion.null_text import NullTextSettings
        from ...attention_swap.inversion.proximal import Proximal
        from ...images.plot import loss_plot

        settings = InvertSettings(
            method,
            steps,
            scheduler,
            NullTextSettings(optimiser, inner_steps, lr, early_stop),
            Proximal(threshold, quantile),
        )
        negative = _negative_for(method, positive, negative)
        perceptual = load_perceptual(lpips)
        clean = _checked(model, vae, latent)
        bound = vae.decode(latent["samples"])
        source = None if image is None else _fitted(image, bound, vae)
        progress = _Progress(model, running_node(cls))
        inverted = _invert(model, positive, negative, cfg, clean, settings, progress)
        with torch.inference_mode(False):
            made = model.model.process_latent_out(inverted.reconstruction.clone())
        reconstruction = vae.decode(made)
        report, facts = _measure(inverted, reconstruction, bound, source, perceptual)
        patches = [name for name in GUIDANCE_PATCHES if model.model_options.get(name)]
        if patches and method == "null_text":
            report += "\n" + _about_patches(patches)
        inversion = dataclasses.replace(inverted.inversion, facts={**inverted.inversion.facts, **facts})
        history = [
            {
                "mean squared error": torch.tensor([step.loss]),
                "model runs": torch.tensor([float(step.forwards + step.backwards)]),
            }
            for step in inverted.steps
        ]
        return io.NodeOutput(
            inversion,
            noise_latent(model, inversion),
            null_conditioning(model, inversion, negative),
            reconstruction,
            report,
            loss_plot(history, f"{method}, cfg {cfg:g}"),
            ui=ui.PreviewText(report),
        )


def _negative_for(method: str, positive, negative):
    """The CONDITIONING of the unconditional branch."""
    if method in WITHOUT_NEGATIVE:
        return positive
    if negative is None:
        raise ValueError(
            f"negative is not connected: method {method} needs an (empty) CLIPTextEncode there. negative_prompt and "
            "proximal do without."
        )
    if len(negative) != 1:
        raise ValueError(
            f"negative holds {len(negative)} entries: null-text stands in for one alone. Connect one CLIPTextEncode, "
            "without areas, masks or combinations."
        )
    return negative


def _checked(model, vae, latent: dict) -> torch.Tensor:
    """The latent in the scale that the MODEL was trained on, an ordinary tensor."""
    from ...hosts.comfy.attention import check_text_model

    check_text_model(model)
    samples, channels = latent["samples"], model.get_model_object("latent_format").latent_channels
    if samples.ndim > 1 and samples.shape[1] != channels:
        raise ValueError(
            f"latent has {samples.shape[1]} channels, the MODEL works on {channels}: encode the picture with the VAE "
            "that belongs to the MODEL."
        )
    if vae.latent_channels != channels:
        raise ValueError(
            f"vae makes latents of {vae.latent_channels} channels, the MODEL works on {channels}: connect the VAE that "
            "belongs to the MODEL."
        )
    if "noise_mask" in latent:
        logger.info("NullTextInvert: the latent's noise mask is left out, the whole picture is inverted.")
    with torch.inference_mode(False), torch.no_grad():
        return model.model.process_latent_in(samples.clone().float())


def _invert(model, positive, negative, cfg: float, clean: torch.Tensor, settings, progress: _Progress) -> Inverted:
    from ...attention_swap.inversion.inversion import Inverted, invert, sample_source
    from ...diffusion.ddim import from_level
    from ...hosts.comfy.text import run_text

    patched = any(model.model_options.get(name) for name in GUIDANCE_PATCHES)

    def body(host) -> Inverted:
        inverted = invert(host, clean, settings, progress.step, {"model": type(model.model).__name__})
        if not patched or settings.method != "null_text":
            return inverted
        # The optimisation knows plain guidance; what is reported is what sampling will give.
        path, _ = sample_source(host, inverted.inversion)
        return Inverted(inverted.inversion, from_level(path[-1], float(inverted.inversion.sigmas[-1])), inverted.steps)

    return run_text(model, None, positive, negative, cfg, clean, 0, body, gradients=settings.method == "null_text")


def _about_patches(patches: list[str]) -> str:
    return (
        f"the MODEL changes guidance ({', '.join(patches)}): null_text optimises for plain guidance; the figures are "
        "those of sampling with the MODEL as it is"
    )


class _Progress:
    """Progress, live preview and the loss in words, over both ways."""

    def __init__(self, model, node_id: str | None):
        self.model, self.node_id, self.callback = model, node_id, None

    def step(self, report: StepReport) -> None:
        import latent_preview

        total = 2 * report.total
        if self.callback is None:
            self.callback = latent_preview.prepare_callback(self.model, total)
        done = report.number + (report.total if report.phase == "sample" else 0)
        with torch.inference_mode():
            self.callback(done, report.x0, report.x, total)
        if report.loss is not None:
            say(self.node_id, f"step {report.number + 1} of {report.total}, loss {report.loss:.2g}")


def say(node_id: str | None, text: str) -> None:
    """A line under the node, where there is a page to show it."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)


# Figures -------------------------------------------------------------------------------------------------------------


def _fitted(image: torch.Tensor, bound: torch.Tensor, vae) -> torch.Tensor:
    """The colours of `image` [1, H, W, C] cut to the size of the VAE's picture, as ComfyUI cuts before it encodes."""
    if len(image) != 1:
        raise ValueError(f"image holds {len(image)} pictures; connect the one that latent was encoded from.")
    size, decoded = (image.shape[1], image.shape[2]), (bound.shape[1], bound.shape[2])
    frame = Frame.cut_from(size, decoded, vae.spacial_compression_encode())
    if frame is None:
        raise ValueError(
            f"image is {size[1]}×{size[0]} (width×height), but latent decodes to {decoded[1]}×{decoded[0]}: connect "
            "the picture that latent was encoded from."
        )
    return frame.view(image)


def _measure(inverted: Inverted, reconstruction, bound, source, perceptual) -> tuple[str, dict[str, float | str]]:
    """The report, and the figures that stay with the inversion."""
    inversion = inverted.inversion
    how = f" ({inversion.facts['optimiser']})" if "optimiser" in inversion.facts else ""
    lines = [
        f"{inversion.method}{how}, {inversion.steps} steps, {inversion.facts['scheduler']}, cfg {inversion.cfg:g}, "
        f"{inversion.facts['model']}"
    ]
    facts: dict[str, float | str] = {}
    pairs = [("reconstruction against the VAE's round trip", reconstruction, bound, "vae")]
    if source is not None:
        pairs.append(("reconstruction against the source", reconstruction, source, "source"))
        pairs.append(("VAE's round trip against the source (the bound)", bound, source, "bound"))
    for words, one, two, name in pairs:
        one, two = (part[..., :3].detach().float().cpu() for part in (one, two))
        value = psnr(one, two)
        said = "equal" if math.isinf(value) else f"PSNR {value:.2f} dB"
        # JSON has no infinity: an equal picture has no figure.
        facts |= {f"psnr_{name}": value} if math.isfinite(value) else {}
        if perceptual is not None:
            distance = float(perceptual(*(part.movedim(-1, 1) * 2 - 1 for part in (one, two))))
            said += f", LPIPS {distance:.4f} ({perceptual.name})"
            facts |= {f"lpips_{name}": distance, "lpips": perceptual.name}
        lines.append(f"{words}: {said}")
    if source is None:
        lines.append("image is not connected: not measured against the source")
    losses = [math.nan if step.loss is None else step.loss for step in inverted.steps]
    worst = max(range(len(losses)), key=losses.__getitem__)
    lines.append(
        f"distance from the inverted path (MSE): {losses[-1]:.2g} at the end, at most {losses[worst]:.2g} "
        f"(step {worst + 1})"
    )
    runs = sum(step.forwards for step in inverted.steps), sum(step.backwards for step in inverted.steps)
    lines.append(f"model runs: {inversion.steps} up, {runs[0]} down and {runs[1]} backward passes")
    return "\n".join(lines), facts


def psnr(one: torch.Tensor, two: torch.Tensor) -> float:
    """Of pictures in 0..1, in dB; infinite for those that differ by rounding at most."""
    error = float((one - two).square().mean())
    return math.inf if error < 1e-10 else -10 * math.log10(error)


# Into ComfyUI's own sockets ------------------------------------------------------------------------------------------


def noise_latent(model, inversion: Inversion) -> dict:
    """LATENT that a sampler with add_noise disabled starts from.

    ComfyUI then takes latent_image itself for x at the first σ, in VE space: no scale is put on it.
    """
    return {"samples": model.model.process_latent_out(inversion.noise.clone())}


def null_conditioning(model, inversion: Inversion, negative) -> list:
    """The inversion's unconditional embeddings as CONDITIONING: an entry per step, each for its own time range.

    Where the inversion has none, `negative` itself. What else `negative` holds (pooled output, sizes) stays.
    """
    from ...diffusion.sigmas import percent_ranges

    null = inversion.null
    if null is None:
        return negative
    options = negative[0][1]
    if all(torch.equal(null[0], other) for other in null[1:]):
        return [[null[0].clone(), dict(options)]]
    ranges = percent_ranges(model.get_model_object("model_sampling").sigmas, inversion.sigmas)
    return [
        [embedding.clone(), {**options, "start_percent": start, "end_percent": end}]
        for embedding, (start, end) in zip(null, ranges, strict=True)
    ]


def check_fits(model, inversion: Inversion) -> None:
    """Raises ValueError where an inversion was made with a model of another kind."""
    channels = model.get_model_object("latent_format").latent_channels
    family, made_with = type(model.model).__name__, inversion.facts.get("model", type(model.model).__name__)
    if inversion.channels != channels or family != made_with:
        raise ValueError(
            f"inversion was made with a {made_with} of {inversion.channels} latent channels, MODEL is a {family} of "
            f"{channels}: connect the MODEL that the picture was inverted with, or invert it again with this one."
        )


class UnpackInversion(io.ComfyNode):
    """Hand an inversion to ComfyUI's own samplers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UnpackInversion",
            display_name="Unpack Inversion",
            category="BlendSwap/swap",
            **aliases("ddim inversion", "unsampler", "null-text", "inverted noise"),
            description="What a stock sampler needs to sample an inversion: noise as latent_image with add_noise "
            "disabled, null as negative, and the sigmas (euler). For an inversion from a file; NullTextInvert gives "
            "the first two itself.",
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that the picture was inverted with."),
                InversionIO.Input("inversion", tooltip="NullTextInvert or LoadInversion."),
                io.Conditioning.Input(
                    "negative",
                    tooltip="As at the inversion: the empty prompt, or for "
                    "negative_prompt and proximal the source prompt.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="noise", tooltip="For latent_image; add_noise disabled."),
                io.Conditioning.Output(display_name="null", tooltip="For negative."),
                io.Sigmas.Output(display_name="sigmas", tooltip="For SamplerCustomAdvanced."),
                io.Float.Output(display_name="cfg", tooltip="The guidance it was made for."),
            ],
        )

    @classmethod
    def execute(cls, model, inversion: Inversion, negative) -> io.NodeOutput:
        check_fits(model, inversion)
        if inversion.method == "direct":
            raise ValueError(
                "inversion is of method direct, which sets the source back on its path at every step; no stock sampler "
                "does that. Use it with AttentionCapture, or invert with null_text."
            )
        negative = _negative_for("null_text", None, negative)
        return io.NodeOutput(
            noise_latent(model, inversion),
            null_conditioning(model, inversion, negative),
            inversion.sigmas.clone(),
            inversion.cfg,
        )


# Files ---------------------------------------------------------------------------------------------------------------


def inversion_path(choice: str) -> Path:
    """Path of a file of SaveInversion."""
    return folders.resolve(FOLDER, choice)


class SaveInversion(io.ComfyNode):
    """Keep an inversion in a file, so that it is paid once."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveInversion",
            display_name="Save Inversion",
            category="BlendSwap/swap",
            **aliases("ddim inversion", "save noise", "store inversion"),
            description="Writes an inversion into output/inversions, as one safetensors file. LoadInversion lists it.",
            inputs=[
                InversionIO.Input("inversion", tooltip="From NullTextInvert."),
                io.String.Input(
                    "filename_prefix",
                    default="inversion",
                    tooltip="Name, with a folder if you like; a number is added. %date:yyyy-MM-dd%, "
                    "%width%, %KSampler.seed% and the like are filled in, as in Save Image.",
                ),
            ],
            outputs=[io.String.Output(display_name="file", tooltip="Its name, as LoadInversion lists it.")],
            hidden=[io.Hidden.prompt],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, inversion: Inversion, filename_prefix: str = "inversion") -> io.NodeOutput:
        import folder_paths

        root = os.path.abspath(os.path.join(folder_paths.get_output_directory(), FOLDER))
        os.makedirs(root, exist_ok=True)
        prefix = folders.file_prefix(filename_prefix, getattr(getattr(cls, "hidden", None), "prompt", None))
        height, width = (side * PIXELS_PER_CELL for side in inversion.trajectory.shape[-2:])
        folder, name, counter, below, _ = folder_paths.get_save_image_path(prefix, root, width, height)
        file = f"{name}_{counter:05}_.safetensors"
        inversion.save(os.path.join(folder, file))
        shown = os.path.join(below, file)
        return io.NodeOutput(shown, ui=ui.PreviewText(f"output/{FOLDER}/{shown}"))


class LoadInversion(io.ComfyNode):
    """Open an inversion of SaveInversion."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadInversion",
            display_name="Load Inversion",
            category="BlendSwap/swap",
            **aliases("ddim inversion", "load noise", "open inversion"),
            description="Opens an inversion from output/inversions. UnpackInversion makes it fit for a stock sampler.",
            inputs=[io.Combo.Input("file", options=folders.model_names(FOLDER), tooltip="A file of SaveInversion.")],
            outputs=[
                InversionIO.Output(display_name="inversion"),
                io.String.Output(display_name="report", tooltip="What made it, and how well it does."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return folders.fingerprint(inversion_path, file)

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        return folders.valid(inversion_path, file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        from ...attention_swap.inversion.inversion import Inversion

        with torch.inference_mode(False):
            inversion = Inversion.load(inversion_path(file))
        height, width = inversion.trajectory.shape[-2:]
        lines = [
            f"{inversion.method}, {inversion.steps} steps, cfg {inversion.cfg:g}, latent of {width}×{height} cells and "
            f"{inversion.channels} channels",
            *(
                f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}"
                for key, value in inversion.facts.items()
            ),
        ]
        report = "\n".join(lines)
        return io.NodeOutput(inversion, report, ui=ui.PreviewText(report))
