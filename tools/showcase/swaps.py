"""Swaps of the demo: the subject of a picture becomes another, in its pose and place, by a shipped workflow.

Beside the result stand a swap without a mask, which shows what the swap keeps by itself, and pictures of the source's
attention. What was kept is measured on the saved PNGs against what the world knows of the scene.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from ...demo import world
from . import common

UNMASKED, WORD, LAYOUT = "Swap without a mask", "Word map", "Layout"
"""Titles of the nodes that the demo adds to the workflow."""

FIRST_SEED = 2_000_000  # as in DemoScene
_STANDS_OUT = 28  # distance in RGB of 0..255: what is farther from the bare background is the object


@dataclasses.dataclass(frozen=True)
class OnScene:
    """What takes the place of the object in a scene. `scene` is DemoScene's seed."""

    name: str
    subject: str
    scene: int

    latent = True
    picked = 0

    @property
    def seed(self) -> int:
        return self.scene

    @property
    def words(self) -> str:
        """What stands in the place of the scene's object in its caption."""
        return self.subject

    @property
    def drawn(self) -> world.Scene:
        return next(world.scenes(FIRST_SEED + self.scene, 1))

    @property
    def source_prompt(self) -> str:
        return self.drawn.caption()

    @property
    def prompt(self) -> str:
        """The source's caption with the new subject."""
        return self.source_prompt.replace(self.drawn.things[0].caption(), self.words, 1)


@dataclasses.dataclass(frozen=True)
class Swap(OnScene):
    """One swap: the shipped workflow with these inputs in place of its own.

    `subject` is the new object in words. `room` is how far the mask reaches beyond the object, in pixels; `lambdas` are
    SwapSettings' where they are not the workflow's.
    """

    room: int = 4
    lambdas: Mapping[str, float] = dataclasses.field(default_factory=dict)
    workflow: str = "swap_real_image"

    titles: ClassVar[Mapping[str, str]] = {
        "source": common.SOURCE,
        "mask": common.MASK,
        "result": common.RESULT,
        "unmasked": UNMASKED,
        "word": WORD,
        "layout": LAYOUT,
    }
    kind = "swap"

    def graph(self, object_info: Mapping[str, Any]) -> dict[str, Any]:
        """The workflow with the inputs patched, and with nodes for the pictures that it does not make by itself."""
        prompt = common.load_workflow(self.workflow, object_info)
        patches = {
            "DemoScene": {"seed": self.scene, "objects": 1, "object": 1},
            "SwapPrompts": {"source_prompt": self.source_prompt, "target_prompt": self.prompt},
            "GrowMask": {"expand": self.room},
            "SwapSettings": self.lambdas,
        }
        for node in prompt.values():
            node["inputs"].update(patches.get(node["class_type"], {}))
        found = {node["class_type"]: (number, node["inputs"]) for number, node in prompt.items()}
        sampler, capture = found["AttentionSwapSampler"][1], found["AttentionCapture"][1]

        def add(number: str, kind: str, title: str, inputs: dict[str, Any]) -> None:
            prompt[number] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}

        def save(number: str, title: str) -> None:
            add(
                f"{number}_saved", "SaveImage", title, {"images": [number, 0], "filename_prefix": f"BlendSwap/{number}"}
            )

        free = {name: value for name, value in sampler.items() if name not in ("mask", "image")}
        add("unmasked", "AttentionSwapSampler", "Without a mask", free)
        prompt["unmasked_saved"] = {
            "class_type": "SaveImage",
            "_meta": {"title": UNMASKED},
            "inputs": {"images": ["unmasked", 1], "filename_prefix": "BlendSwap/unmasked"},
        }
        shared = {
            name: capture[name]
            for name in ("model", "positive", "negative", "inversion", "seed", "steps", "cfg", "scheduler")
        }
        shared["vae"] = sampler["vae"]
        add(
            "word",
            "WordMaps",
            "Word Maps",
            {
                **shared,
                "tokens": sampler["tokens"],
                "prompt": "",
                "words": self.drawn.things[0].shape,
                "threshold": 0.0,
                "min_size": 0,
                "max_size": 0,
                "start": 0.0,
                "end": 1.0,
            },
        )
        save("word", WORD)
        add("layout", "AttentionSVD", "Attention SVD", {**shared, "components": 3, "grid": world.SIZE})
        save("layout", LAYOUT)
        return prompt

    def judge(self, panels: Mapping[str, np.ndarray], mask: np.ndarray) -> dict[str, Any]:
        return {
            "judge": common.verdict(panels["result"], mask, self.subject),
            "pose_iou": round(pose_iou(self.drawn, panels["result"]), 3),
            "background_psnr": psnr(panels["source"], panels["unmasked"], ~mask),
        }


# Colour, colour and pattern, shape: the first scenes that no training has seen, prompts fixed beforehand. The λ's were
# chosen on another scene, those of the third swap on its own, after the workflow's had left the moon as it was.
SWAPS = (
    Swap("pink_to_blue", "blue checked triangle", scene=0),
    Swap("checked_to_striped", "purple striped triangle", scene=1),
    # Another shape: less of the source's layout, and more room.
    Swap(
        "moon_to_circle",
        "red dotted circle",
        scene=2,
        room=8,
        lambdas={"self_map": 10, "cross_map": 20, "self_output": 5},
    ),
)


def pose_iou(scene: world.Scene, result: np.ndarray, wanted: np.ndarray | None = None) -> float:
    """How well the object of `result` (uint8 [H, W, 3]) lies where the object of `scene` does: IoU, in 0..1.

    wanted: where another object should lie in its place, bool [H, W].

    The object is what stands out from the scene's background as it would be without the object; the source's is known.
    """
    before = world.object_mask(scene) if wanted is None else wanted
    ground = world.draw(dataclasses.replace(scene, things=()))
    after = np.linalg.norm(result.astype(np.float32) - ground, axis=-1) > _STANDS_OUT
    return float((before & after).sum() / (before | after).sum())


def psnr(source: np.ndarray, result: np.ndarray, where: np.ndarray) -> float | None:
    """PSNR in dB of two uint8 pictures in `where` (bool [H, W]); None where they are equal, or nothing is left."""
    error = ((source.astype(np.float64) - result)[where] / 255) ** 2
    return round(-10 * math.log10(error.mean()), 2) if error.any() else None
