"""Concepts of the demo: a subject that no demo model has seen is learned from five pictures and swapped into another
picture, by a shipped workflow. The judge has seen neither the learning nor the swap."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from ...demo.judges import subjects as subject_judge
from ...demo.subjects import SUBJECTS, Subject, object_mask
from . import common
from .swaps import OnScene, pose_iou

LEARNING = "Learning"
"""Title of the node that saves the previews of the training."""

TOKEN = "sks"


@dataclasses.dataclass(frozen=True)
class Concept(OnScene):
    """One subject, learned and swapped in: the shipped workflow with these inputs in place of its own.

    `subject` is a name of `demo.subjects`, `room` how far the mask reaches beyond the object.
    """

    room: int = 8
    workflow: str = "concept_dreambooth_swap"

    titles: ClassVar[Mapping[str, str]] = {
        "source": common.SOURCE,
        "mask": common.MASK,
        "result": common.RESULT,
        "learning": LEARNING,
    }
    picked = -1  # the last preview is of the concept as it was learned
    kind = "concept"

    @property
    def wanted(self) -> Subject:
        return SUBJECTS[self.subject]

    @property
    def words(self) -> str:
        return f"{TOKEN} {self.wanted.kind}"

    def graph(self, object_info: Mapping[str, Any]) -> dict[str, Any]:
        prompt = common.load_workflow(self.workflow, object_info)
        kind = self.wanted.kind
        patches = {
            "DemoSubject": {"subject": self.subject},
            "LearnConceptDreamBooth": {
                "instance_prompt": f"a {TOKEN} {kind}",
                "token": TOKEN,
                "class_prompt": f"a {kind}",
                "name": f"demo_{self.subject}",
            },
            "DemoScene": {"seed": self.scene, "objects": 1, "object": 1},
            "SwapPrompts": {"source_prompt": self.source_prompt, "target_prompt": self.prompt},
            "GrowMask": {"expand": self.room},
        }
        for node in prompt.values():
            node["inputs"].update(patches.get(node["class_type"], {}))
        return prompt

    def judge(self, panels: Mapping[str, np.ndarray], mask: np.ndarray) -> dict[str, Any]:
        result = panels["result"]
        answer = subject_judge.identify(result, mask)
        return {
            "judge": {"asked": self.subject, "found": answer.name, "success": answer.name == self.subject},
            "certainty": round(answer.certainty, 3),
            "palette": answer.palette,
            "pose_iou": round(pose_iou(self.drawn, result, object_mask(self.drawn, self.wanted)), 3),
        }


CONCEPTS = (Concept("learned_blush", "blush", scene=13),)
