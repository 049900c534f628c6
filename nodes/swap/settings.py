"""The nodes that say what of a source's attention a swap takes, where, and for how long."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from comfy_api.latest import io, ui

from ..shared.inputs import aliases, dial
from ..shared.sockets import SwapLayersIO, SwapSettingsIO

if TYPE_CHECKING:
    from ...attention_swap.settings import Steps, SwapSettings as Settings, Where
    from ...protocols.text import Branch, Place

CUSTOM = "custom"
PRESET_NAMES = ["photoswap", "official", "p2p", "pnp", "masactrl"]
OF_50, FRACTION, STEPS = UNITS = ["of 50 steps", "fraction", "steps"]
HALVES: dict[str, tuple[Branch, ...]] = {"both": ("cond", "uncond"), "cond": ("cond",), "uncond": ("uncond",)}
NOT_GIVEN = -1.0


def amount(name: str, value: float, unit: str) -> float | Steps:
    """A λ as the core takes it: a fraction of the steps, or a number of them.

    Raises ValueError for one out of the unit's range.
    """
    from ...attention_swap.settings import Steps

    if unit == STEPS:
        return Steps(int(value) if value == int(value) else cast("int", value))  # which refuses a part of one
    most = 50 if unit == OF_50 else 1
    if not 0 <= value <= most:
        raise ValueError(f"{name} is {value:g}; with unit {unit!r} it must be 0 to {most}. Change it, or the unit.")
    return value / most


def unit_input(**more: Any) -> io.Combo.Input:
    return io.Combo.Input(
        "unit",
        options=UNITS,
        default=OF_50,
        **more,
        tooltip="What the λ's are given in. of 50 steps: as in the papers, scaled to the run's steps. fraction: 0 to "
        "1. steps: that many, whatever the run has.",
    )


def describe(settings: Settings) -> str:
    """Settings for people, a line each."""
    names = {
        "self_output": "φ, self outputs",
        "self_map": "M, self maps",
        "cross_map": "A, cross maps",
        "features": "features",
        "self_kv_from": "self keys and values from",
    }
    where = {
        "self_output": settings.output_where,
        "self_map": settings.map_where,
        "cross_map": settings.cross_where,
        "self_kv_from": settings.kv_where,
    }
    lines = []
    for name, words in names.items():
        value = getattr(settings, name)
        if not (value is not None if name == "self_kv_from" else value):
            continue
        said = f"{value:.0%} of the steps" if isinstance(value, float) else str(value)
        lines.append(f"{words}: {said}" + (f"; {_place(where[name])}" if name in where else ""))
    if not lines:
        lines.append("nothing is swapped: every λ is 0")
    if settings.local_blend:
        lines.append(
            f"local blend from {settings.blend_from:.0%} of the steps on, threshold {settings.blend_threshold:g}"
        )
    counting = "; the published code's counting" if settings.published else ""
    lines.append(f"prompts aligned by {settings.alignment}{counting}")
    return "\n".join(lines)


def _place(where: Where) -> str:
    parts = [f"{' and '.join(where.branches)} " + ("halves" if len(where.branches) > 1 else "half")]
    if len(where.places) < 3:
        parts.append(" and ".join(where.places))
    if where.first or where.last is not None:
        parts.append(f"layers {where.first} to {'the last' if where.last is None else where.last}")
    if where.skip:
        parts.append(f"without the first {where.skip:.0%} of them")
    if where.min_tokens or where.max_tokens is not None:
        most = "any number of" if where.max_tokens is None else where.max_tokens
        parts.append(f"{where.min_tokens} to {most} tokens")
    return ", ".join(parts)


class SwapSettings(io.ComfyNode):
    """Say what a swap takes from the source, and for how long."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SwapSettings",
            display_name="Swap Settings",
            category="BlendSwap/swap",
            **aliases("photoswap", "prompt-to-prompt", "masactrl", "plug and play", "swap presets"),
            description=(
                "How long a swap takes self-attention outputs (φ), self-attention maps (M) and cross-attention maps "
                "(A) from the source (Photoswap, Gu et al. 2023). Connect one to AttentionCapture, and the capture "
                "keeps just that; AttentionSwapSampler then uses the capture's."
            ),
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=[CUSTOM, *PRESET_NAMES],
                    default=CUSTOM,
                    tooltip="custom: the dials below, whose defaults are the Photoswap paper's. The others replace "
                    "all of them: photoswap, official (its published code), p2p (Prompt-to-Prompt), pnp "
                    "(Plug-and-Play), masactrl. What they set is said in the summary.",
                ),
                unit_input(),
                io.Float.Input(
                    "self_map",
                    default=25.0,
                    min=0.0,
                    max=1000.0,
                    step=1.0,
                    round=0.001,
                    tooltip="λ_M: how long self-attention maps are the source's. More keeps more of the source's "
                    "shape.",
                ),
                io.Float.Input(
                    "cross_map",
                    default=20.0,
                    min=0.0,
                    max=1000.0,
                    step=1.0,
                    round=0.001,
                    tooltip="λ_A: how long cross-attention maps are the source's: which word is where.",
                ),
                io.Float.Input(
                    "self_output",
                    default=10.0,
                    min=0.0,
                    max=1000.0,
                    step=1.0,
                    round=0.001,
                    tooltip="λ_φ: how long self-attention outputs are the source's. It holds layout and background "
                    "most.",
                ),
                io.Boolean.Input(
                    "local_blend",
                    default=False,
                    tooltip="Put the source's latents back wherever the subject's words are not, step by step.",
                ),
                dial(
                    io.Float.Input(
                        "blend_from",
                        default=0.2,
                        min=0.0,
                        max=0.99,
                        step=0.01,
                        tooltip="Local blend: from this fraction of the steps on.",
                    )
                ),
                dial(
                    io.Float.Input(
                        "blend_threshold",
                        default=0.3,
                        min=0.0,
                        max=0.99,
                        step=0.01,
                        tooltip="Local blend: share of a word's strongest attention that counts as the word.",
                    )
                ),
                dial(
                    io.Float.Input(
                        "features",
                        default=0.0,
                        min=0.0,
                        max=1000.0,
                        step=1.0,
                        round=0.001,
                        tooltip="How long features of the decoder are the source's (Plug-and-Play: 40).",
                    )
                ),
                dial(
                    io.Float.Input(
                        "self_kv_from",
                        default=NOT_GIVEN,
                        min=-1.0,
                        max=1000.0,
                        step=1.0,
                        round=0.001,
                        tooltip="From when on the target's queries look at the source's keys and values "
                        "(MasaCtrl: 4); -1 for never.",
                    )
                ),
                dial(
                    io.Combo.Input(
                        "alignment",
                        options=["words", "tokens"],
                        default="words",
                        tooltip="A replaced word takes its predecessor's map whole (words), or keeps its "
                        "own, as in the published code (tokens).",
                    )
                ),
                dial(
                    io.Combo.Input(
                        "counting",
                        options=["paper", "published"],
                        default="paper",
                        tooltip="paper: every λ counts from the first step. published: as the published "
                        "code, M from where φ ends, φ one step more.",
                    )
                ),
                SwapLayersIO.Input("output_layers", optional=True, tooltip="SwapLayers for φ; with a preset too."),
                SwapLayersIO.Input("map_layers", optional=True, tooltip="SwapLayers for M; with a preset too."),
                SwapLayersIO.Input("cross_layers", optional=True, tooltip="SwapLayers for A; with a preset too."),
                SwapLayersIO.Input(
                    "kv_layers", optional=True, tooltip="SwapLayers for keys and values; with a preset too."
                ),
            ],
            outputs=[
                SwapSettingsIO.Output(
                    display_name="settings", tooltip="For AttentionCapture, or for a swap of its own."
                ),
                io.String.Output(display_name="summary", tooltip="What is set, by a preset too."),
            ],
        )

    @classmethod
    def execute(
        cls,
        preset: str = CUSTOM,
        unit: str = OF_50,
        self_map: float = 25.0,
        cross_map: float = 20.0,
        self_output: float = 10.0,
        local_blend: bool = False,
        blend_from: float = 0.2,
        blend_threshold: float = 0.3,
        features: float = 0.0,
        self_kv_from: float = NOT_GIVEN,
        alignment: str = "words",
        counting: str = "paper",
        output_layers: Where | None = None,
        map_layers: Where | None = None,
        cross_layers: Where | None = None,
        kv_layers: Where | None = None,
    ) -> io.NodeOutput:
        from ...attention_swap.settings import SwapSettings as Settings, preset_settings

        layers: dict[str, Any] = dict(
            output_where=output_layers, map_where=map_layers, cross_where=cross_layers, kv_where=kv_layers
        )
        layers = {name: where for name, where in layers.items() if where is not None}
        if preset != CUSTOM:
            settings = preset_settings(preset, **layers)
        else:
            lambdas: dict[str, Any] = dict(
                self_map=self_map, cross_map=cross_map, self_output=self_output, features=features
            )
            settings = Settings(
                **{name: amount(name, value, unit) for name, value in lambdas.items()},
                self_kv_from=None if self_kv_from < 0 else amount("self_kv_from", self_kv_from, unit),
                local_blend=local_blend,
                blend_from=blend_from,
                blend_threshold=blend_threshold,
                alignment=alignment,
                published=counting == "published",
                **layers,
            )
        summary = describe(settings)
        if preset != CUSTOM:
            summary = f"preset {preset}\n{summary}"
        return io.NodeOutput(settings, summary, ui=ui.PreviewText(summary))


class SwapLayers(io.ComfyNode):
    """Say in which attention layers, and in which half of the guidance, something is swapped."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SwapLayers",
            display_name="Swap Layers",
            category="BlendSwap/swap",
            **aliases("photoswap", "unet blocks", "attention layers", "block weights"),
            description="Narrows one of the swaps of SwapSettings down to some layers. All conditions count together; "
            "the report of a swap names the layers that were left.",
            inputs=[
                io.Combo.Input(
                    "halves",
                    options=list(HALVES),
                    default="both",
                    tooltip="Halves of classifier-free guidance: cond (with the prompt), uncond, or both.",
                ),
                io.Boolean.Input("down", default=True, tooltip="Layers of the UNet's encoder."),
                io.Boolean.Input("mid", default=True, tooltip="The layer in the middle."),
                io.Boolean.Input("up", default=True, tooltip="Layers of the decoder."),
                io.Int.Input(
                    "first", default=0, min=0, max=999, tooltip="First layer, counted from 0 through the whole UNet."
                ),
                io.Int.Input("last", default=-1, min=-1, max=999, tooltip="Last layer; -1 for the last there is."),
                io.Int.Input(
                    "min_tokens",
                    default=0,
                    min=0,
                    max=1048576,
                    tooltip="Only layers of at least this many tokens (height × width there).",
                ),
                io.Int.Input(
                    "max_tokens",
                    default=0,
                    min=0,
                    max=1048576,
                    tooltip="Only layers of at most this many tokens; 0 sets no limit. Published code: 1024.",
                ),
            ],
            outputs=[SwapLayersIO.Output(display_name="layers", tooltip="For SwapSettings.")],
        )

    @classmethod
    def execute(
        cls,
        halves: str = "both",
        down: bool = True,
        mid: bool = True,
        up: bool = True,
        first: int = 0,
        last: int = -1,
        min_tokens: int = 0,
        max_tokens: int = 0,
    ) -> io.NodeOutput:
        from ...attention_swap.settings import Where

        chosen: dict[Place, bool] = {"down": down, "mid": mid, "up": up}
        places: tuple[Place, ...] = tuple(place for place in chosen if chosen[place])
        if not places:
            raise ValueError("down, mid and up are all off, so no layer is left: switch one on")
        return io.NodeOutput(
            Where(HALVES[halves], places, first, None if last < 0 else last, 0.0, min_tokens, max_tokens or None)
        )
