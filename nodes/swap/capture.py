"""The node that runs a source and keeps of its attention what swaps will take."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io, ui

from ...diffusion.sigmas import SCHEDULERS
from ..shared.inputs import LARGEST_SEED, aliases, dial, running_node, source_kind
from ..shared.sockets import AttentionIO, SwapSettingsIO, SwapSubjectsIO
from .invert import WITHOUT_NEGATIVE, check_fits, say
from .run import Attention, Progress, as_latent
from .settings import describe

if TYPE_CHECKING:
    from ...attention_swap.capture import Capture
    from ...attention_swap.inversion.inversion import Inversion
    from ...attention_swap.layout import Layout, Needs
    from ...attention_swap.sampler import Subject
    from ...attention_swap.settings import SwapSettings
    from ...protocols.text import Branch, TextHost

logger = logging.getLogger(__name__)

NOISE_SHARE = 0.3
"""A latent with less of the first σ than this is no noise."""

FREE_SHARE, MOST = 0.25, 8 * 2**30
"""Of free main memory, and in bytes: what a tape may take where nothing is said. It is held long after the run, and a
workflow may have several."""

RELEASE = "until ComfyUI drops this node's output (Edit, Unload Models and Execution Cache does)"


class AttentionCapture(io.ComfyNode):
    """Run a source, and keep what a swap needs of its attention."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttentionCapture",
            display_name="Attention Capture",
            category="BlendSwap/swap",
            **aliases("photoswap", "prompt-to-prompt", "p2p", "attention injection", "save attention"),
            description=(
                "Samples the source, a picture that was inverted or one made from noise, and keeps what "
                "AttentionSwapSampler will take of its attention: only the kinds, steps and layers that the settings "
                "name, and never a map of every token to every token."
            ),
            inputs=[
                io.Model.Input("model", tooltip="SD 1.x, SD 2.x or SDXL: for an inversion the MODEL that made it."),
                io.Conditioning.Input("positive", tooltip="The source's prompt."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=LARGEST_SEED,
                    control_after_generate=True,
                    tooltip="Draws the noise for a latent, as KSampler does.",
                ),
                io.Int.Input("steps", default=50, min=1, max=1000, tooltip="Steps of source and targets."),
                io.Float.Input("cfg", default=7.5, min=0.0, max=100.0, step=0.1, tooltip="Guidance of the source."),
                io.Combo.Input(
                    "scheduler",
                    options=list(SCHEDULERS),
                    default="ddim_uniform",
                    tooltip="Noise levels of the steps. official: the published code's, which ends a little "
                    "above zero noise.",
                ),
                io.Combo.Input(
                    "storage",
                    options=["auto", "tape", "replay"],
                    default="auto",
                    tooltip="tape: what a swap needs is kept in main memory, and a target costs one run. replay: "
                    "nothing is kept, the source runs again beside each target. auto: a tape where it fits into "
                    "memory_gib.",
                ),
                io.Float.Input(
                    "memory_gib",
                    default=0.0,
                    min=0.0,
                    max=4096.0,
                    step=0.5,
                    tooltip="Main memory that a tape may take, in GiB; 0 for a quarter of what is free, and "
                    "at most 8. It is held until ComfyUI drops this node's output.",
                ),
                dial(
                    io.Boolean.Input(
                        "for_sweep",
                        default=False,
                        tooltip="Keep what every smaller λ needs too, so that AttentionSwapSweep can "
                        "run a grid up to the settings' λ's from one tape.",
                    )
                ),
                dial(
                    io.Boolean.Input(
                        "sample_source",
                        default=True,
                        tooltip="With replay: sample the source here, for the LATENT output. A swap "
                        "does not need it; off saves a run.",
                    )
                ),
                *source_kind(),
                SwapSettingsIO.Input(
                    "settings", optional=True, tooltip="SwapSettings; without it the Photoswap paper's."
                ),
                SwapSubjectsIO.Input(
                    "subjects",
                    optional=True,
                    tooltip="SwapSubject, where subjects have λ's of their own: a tape must know of them.",
                ),
            ],
            outputs=[
                AttentionIO.Output(
                    display_name="attention", tooltip="For AttentionSwapSampler and AttentionSwapSweep."
                ),
                io.Latent.Output(display_name="latent", tooltip="The source as it was sampled."),
                io.String.Output(
                    display_name="summary", tooltip="What was run, what is kept, and how much memory it takes."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        seed: int = 0,
        steps: int = 50,
        cfg: float = 7.5,
        scheduler: str = "ddim_uniform",
        storage: str = "auto",
        memory_gib: float = 0.0,
        for_sweep: bool = False,
        sample_source: bool = True,
        negative=None,
        inversion: Inversion | None = None,
        latent: dict | None = None,
        settings: SwapSettings | None = None,
        subjects: tuple[Subject, ...] | None = None,
    ) -> io.NodeOutput:
        from comfy_execution.graph_utils import ExecutionBlocker

        from ...attention_swap.settings import PRESETS
        from ...hosts.comfy.attention import check_text_model

        check_text_model(model)
        settings = settings or PRESETS["photoswap"]
        said: list[str] = []
        if inversion is not None:
            source, cfg = of_inversion(model, inversion, latent, said), inversion.cfg
        else:
            source = made_up(model, latent, seed, steps, scheduler, cfg, said)
        negative = negative_for(negative, positive, cfg, inversion)
        budget, why = _budget(memory_gib)
        said.append(f"memory for a tape: {_size(budget)}{why}")
        node_id = running_node(cls)

        def estimated(line: str) -> None:
            said.append(line)
            say(node_id, line)

        total = len(source[1]) - 1 if isinstance(source, tuple) else source.steps
        wanted = _Wanted(settings, subjects or (), for_sweep, estimated)
        made = _run(
            model, positive, negative, cfg, seed, source, wanted, storage, budget, sample_source, Progress(model, total)
        )
        said.append(_kept(made, storage))
        if "note" in made.facts:
            said.append(f"note: {made.facts['note']}")
        said.append(describe(settings))
        text = "\n".join(said)
        attention = Attention.of(made, settings, positive, negative, seed, model)
        result = (
            as_latent(model, latents)
            if (latents := made.latents) is not None
            else ExecutionBlocker("AttentionCapture did not sample the source: switch sample_source on for its latent.")
        )
        return io.NodeOutput(attention, result, text, ui=ui.PreviewText(text))


class _Wanted:
    """What the swaps to come need; tells the estimate on the way, before anything is run."""

    def __init__(self, settings: SwapSettings, subjects: tuple[Subject, ...], for_sweep: bool, tell) -> None:
        from ...attention_swap.sweep import covering

        whole = [settings, *(subject.settings(settings) for subject in subjects)]
        self.settings = [one for given in whole for one in (covering(given) if for_sweep else [given])]
        self.tell, self.batch = tell, 1
        self.branches: tuple[Branch, ...] = ()

    def __call__(self, layout: Layout, steps: int) -> Needs:
        from ...attention_swap.capture import estimate, needed

        needs = needed(self.settings, layout, steps, self.branches)
        self.tell(f"a tape would take {estimate(needs, layout, self.batch)}")
        return needs


def of_inversion(model, inversion: Inversion, latent: dict | None, said: list[str]) -> Inversion:
    if latent is not None:
        raise ValueError(
            "inversion and latent are both connected: the source is either a picture that was inverted, or one made "
            "up from noise. Disconnect one of them."
        )
    check_fits(model, inversion)
    if not torch.isfinite(inversion.trajectory).all():
        raise ValueError("inversion holds NaN or infinite values: invert the picture again")
    said.append(
        f"source: inversion by {inversion.method}, {inversion.steps} steps, cfg {inversion.cfg:g} (they hold here, "
        "and steps, cfg, scheduler and seed of this node do not count)"
    )
    return inversion


def made_up(model, latent: dict | None, seed: int, steps: int, scheduler: str, cfg: float, said: list[str]):
    """Noise in VE space, and the σ grid."""
    import comfy.sample

    from ...diffusion.sigmas import ddim_grid

    if latent is None:
        raise ValueError(
            "neither inversion nor latent is connected: connect NullTextInvert for a real picture, or an empty latent "
            "(EmptyLatentImage) for one made up from noise"
        )
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    channels = model.get_model_object("latent_format").latent_channels
    if samples.ndim != 4 or samples.shape[1] != channels:
        raise ValueError(f"latent is {list(samples.shape)}; this MODEL takes [pictures, {channels}, height, width]")
    if not torch.isfinite(samples).all():
        raise ValueError("latent holds NaN or infinite values: check the VAE (fp16 overflows in some) or what made it")
    with torch.inference_mode(False), torch.no_grad():
        sampling = model.get_model_object("model_sampling")
        sigmas = ddim_grid(sampling.sigmas, steps, scheduler)
        if not samples.any():
            drawn = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index")).float()
            # As KSampler scales it, so that the source is the picture that KSampler makes with euler and this seed.
            from_the_top = bool(sigmas[0] >= float(sampling.sigma_max) * (1 - 1e-5))
            noise = sampling.noise_scaling(sigmas[:1], drawn, torch.zeros_like(drawn), from_the_top)
            origin = f"noise by seed {seed}"
        else:
            noise, origin = model.model.process_latent_in(samples.clone().float()), "the noise in latent"
            if noise.std() < NOISE_SHARE * sigmas[0]:
                raise ValueError(
                    f"latent is neither empty nor noise (its values spread by {noise.std():.2g}, noise here would by "
                    f"{sigmas[0]:.3g}): for a real picture connect NullTextInvert's inversion, for one that is made "
                    "up an EmptyLatentImage"
                )
    height, width = noise.shape[-2:]
    said.append(
        f"source: {origin}, latent of {width}×{height} cells, {len(sigmas) - 1} steps, {scheduler}, cfg {cfg:g}"
    )
    return noise.cpu(), sigmas


def negative_for(negative, positive, cfg: float, inversion: Inversion | None):
    if negative is not None:
        return negative
    if math.isclose(cfg, 1) or (inversion is not None and inversion.method in WITHOUT_NEGATIVE):
        return positive
    raise ValueError("negative is not connected: connect an (empty) CLIPTextEncode, or set cfg to 1.")


def _budget(gib: float) -> tuple[int, str]:
    """Bytes that a tape may take, and why so many, where nobody has said."""
    import comfy.model_management

    if gib > 0:
        return int(gib * 2**30), ""
    share = int(comfy.model_management.get_free_memory(torch.device("cpu")) * FREE_SHARE)
    return (share, " (a quarter of what is free)") if share < MOST else (MOST, " (the most without memory_gib)")


def _size(count: int) -> str:
    from ...attention_swap.capture import size_text

    return size_text(count)


def _run(
    model,
    positive,
    negative,
    cfg: float,
    seed: int,
    source: Any,
    wanted: _Wanted,
    storage: str,
    budget: int,
    sample: bool,
    progress: Progress,
) -> Capture:
    from ...attention_swap.capture import branches_of, capture
    from ...hosts.comfy.text import run_text

    noise = source[0] if isinstance(source, tuple) else source.noise

    def body(host: TextHost) -> Capture:
        check_null(host, source)
        wanted.batch, wanted.branches = len(noise), branches_of(host)
        return capture(
            host,
            source,
            wanted,
            storage,
            budget=budget,
            sample=sample,
            on_step=progress.step,
            facts={"model": type(model.model).__name__},
        )

    return run_text(model, None, positive, negative, cfg, noise, seed, body)


def check_null(host: TextHost, source: Any) -> None:
    null = None if isinstance(source, tuple) else source.null
    if null is not None and null.shape[-1] != host.null.shape[-1]:
        raise ValueError(
            f"inversion has text embeddings of {null.shape[-1]} channels, the MODEL's text has {host.null.shape[-1]}: "
            "it was made with another model family. Invert with this MODEL."
        )


def _kept(made: Capture, storage: str) -> str:
    chosen = f"storage: {made.storage}" + (f" ({storage})" if storage != made.storage else "")
    if made.tape is None:
        return f"{chosen}; the source runs again beside each target, and its MODEL is held {RELEASE}"
    return f"{chosen}; {_size(made.tape.bytes)} of main memory are held {RELEASE}"
