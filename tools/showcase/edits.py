"""Blended edits of the demo. Scenes come from seeds that no training has used."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from . import common


@dataclasses.dataclass(frozen=True)
class Edit:
    """One edit: a shipped workflow with these inputs in place of its own.

    `scene`, `objects` and `object` are the inputs of DemoScene, `seed` that of the sampler.
    """

    name: str
    workflow: str
    prompt: str
    scene: int
    seed: int
    objects: int = 1
    object: int = 1

    titles: ClassVar[Mapping[str, str]] = {"source": common.SOURCE, "mask": common.MASK, "result": common.RESULT}
    picked = 0
    kind = "blend"

    @property
    def latent(self) -> bool:
        return self.workflow == "blend_latent"

    def graph(self, object_info: Mapping[str, Any]) -> dict[str, Any]:
        prompt = common.load_workflow(self.workflow, object_info)
        patches = {
            "DemoScene": {"seed": self.scene, "objects": self.objects, "object": self.object},
            "CLIPBlendSampler": {"seed": self.seed, "prompt": self.prompt},
            "PrimitiveStringMultiline": {"value": self.prompt},
        }
        for node in prompt.values():
            for name, value in patches.get(node["class_type"], {}).items():
                if not isinstance(node["inputs"].get(name), list):  # a linked input takes what its link brings
                    node["inputs"][name] = value
        return prompt

    def judge(self, panels: Mapping[str, np.ndarray], mask: np.ndarray) -> dict[str, Any]:
        return {"judge": common.verdict(panels["result"], mask, self.prompt)}


EDITS = (
    Edit("heart_to_star", "blend_replace_object", "a blue star", scene=13, seed=1),
    Edit("moon_to_heart", "blend_replace_object", "a green heart", scene=20, seed=2),
    Edit("cross_to_ring", "blend_replace_object", "an orange ring", scene=6, seed=3),
    Edit("one_of_two", "blend_replace_object", "a purple circle", scene=3, seed=4, objects=2, object=2),
    Edit("latent_star_to_circle", "blend_latent", "a red circle", scene=10, seed=5),
    Edit("latent_ring_to_square", "blend_latent", "a yellow square", scene=19, seed=6),
)
