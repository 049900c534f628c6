"""Concepts of the demo: a subject that no demo model has seen is learned from five pictures and swapped into another
picture, by a shipped workflow. The judge has seen neither the learning nor the swap."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...demo.judges import subjects as subject_judge
from ...demo.subjects import SUBJECTS, Subject, object_mask
from ..server import ComfyServer
from . import edits
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

    panels = ("source", "mask", "result", "learning")
    kind = "concept"

    @property
    def wanted(self) -> Subject:
        return SUBJECTS[self.subject]

    @property
    def words(self) -> str:
        return f"{TOKEN} {self.wanted.kind}"

    def run(
        self, server: ComfyServer, object_info: Mapping[str, Any], stem: Path, on_progress: Callable[[int, int], None]
    ) -> dict[str, Any]:
        """Learns the subject, swaps it in, writes the pictures beside `stem`, and returns the entry of report.json."""
        prompt = prepare(self, object_info)
        start = time.monotonic()
        outputs = server.run(prompt, lambda _, value, maximum: on_progress(value, maximum))
        seconds = time.monotonic() - start
        titles = (edits.SOURCE, edits.MASK, edits.RESULT, LEARNING)
        # The last preview is of the concept as it was learned.
        saved = {
            name: edits.pictures(server, prompt, outputs, title)[-1]
            for name, title in zip(self.panels, titles, strict=True)
        }
        for name, png in saved.items():
            stem.with_name(f"{stem.name}_{name}.png").write_bytes(png)
        source, result = edits.to_array(saved["source"]), edits.to_array(saved["result"])
        mask = edits.to_array(saved["mask"], "L") > 0
        largest, identical = edits.background(source, result, mask)
        found = subject_judge.identify(result, mask)
        return {
            "name": self.name,
            "kind": self.kind,
            "prompt": self.prompt,
            "seed": self.scene,
            "seconds": round(seconds, 1),
            "background_max_abs": largest,
            "background_identical": identical,
            "judge": {"asked": self.subject, "found": found.name, "success": found.name == self.subject},
            "certainty": round(found.certainty, 3),
            "palette": found.palette,
            "pose_iou": round(pose_iou(self.drawn, result, object_mask(self.drawn, self.wanted)), 3),
        }


CONCEPTS = (Concept("learned_blush", "blush", scene=13),)


def prepare(concept: Concept, object_info: Mapping[str, Any]) -> dict[str, Any]:
    """The workflow as a prompt of ComfyUI's API, its inputs patched."""
    prompt = edits.load_workflow(concept.workflow, object_info)
    kind = concept.wanted.kind
    patches = {
        "DemoSubject": {"subject": concept.subject},
        "LearnConceptDreamBooth": {
            "instance_prompt": f"a {TOKEN} {kind}",
            "token": TOKEN,
            "class_prompt": f"a {kind}",
            "name": f"demo_{concept.subject}",
        },
        "DemoScene": {"seed": concept.scene, "objects": 1, "object": 1},
        "SwapPrompts": {"source_prompt": concept.source_prompt, "target_prompt": concept.prompt},
        "GrowMask": {"expand": concept.room},
    }
    for node in prompt.values():
        node["inputs"].update(patches.get(node["class_type"], {}))
    return prompt
