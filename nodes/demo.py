"""Nodes of the demo world: its text model, and pictures with masks and captions."""

from __future__ import annotations

from comfy_api.latest import io

from ..demo import files
from .shared import folders
from .shared.inputs import aliases

# Trainings draw their scenes from seeds below 1,000,000: no model has seen the ones from here on.
FIRST_SEED = 2_000_000
FIRST_SUBJECT_SEED = 2_500_000


class DemoModelLoader(io.ComfyNode):
    """Load the text-conditional model of the demo world as a native MODEL, CLIP and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DemoModelLoader",
            display_name="Load Demo Model",
            category="BlendSwap/demo",
            **aliases("example model", "small stable diffusion", "test model"),
            description="The small Stable Diffusion of the pack's demo world, for 64 × 64 pictures (latents "
            "of 16 × 16 cells and 8 channels). Made of ComfyUI's own networks, so LoRA, embeddings, patches "
            "and samplers take it. It knows the words of DemoScene's captions; others are named in the log.",
            inputs=[],
            outputs=[
                io.Model.Output(display_name="MODEL"),
                io.Clip.Output(display_name="CLIP"),
                io.Vae.Output(display_name="VAE"),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_) -> str:
        return folders.fingerprint(lambda _: files.TEXT, "demo")

    @classmethod
    def execute(cls) -> io.NodeOutput:
        from ..hosts.comfy.small_sd import load_demo_text_model

        if not (files.TEXT / "model_index.json").is_file():
            raise FileNotFoundError(
                f"The demo's text model is not there: {files.TEXT} has no model_index.json. Get the pack's "
                "demo/models folder again, or train the model: python run.py train vae, then python run.py "
                "train text."
            )
        return io.NodeOutput(*load_demo_text_model(files.TEXT))


class DemoScene(io.ComfyNode):
    """Draw a picture of the demo world, with the mask of an object and a caption."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DemoScene",
            display_name="Demo Scene",
            category="BlendSwap/demo",
            **aliases("example picture", "test picture", "sample image"),
            description="Draws a 64 × 64 picture: one or two objects (shape, colour, pattern) on a pale "
            "background. None of these pictures was in any training.",
            inputs=[
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**32 - 1,
                    control_after_generate=True,
                    tooltip="Which picture. The same seed draws the same one everywhere.",
                ),
                io.Int.Input("objects", default=1, min=1, max=2, tooltip="How many objects are in the picture."),
                io.Int.Input("object", default=1, min=1, max=2, tooltip="Which of them the masks are about."),
                io.Float.Input(
                    "margin",
                    default=3.0,
                    min=0.0,
                    max=64.0,
                    step=0.5,
                    tooltip="Room around the object in the edit mask, in pixels.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="IMAGE"),
                io.Mask.Output(display_name="edit", tooltip="A square with room for another object in its place."),
                io.Mask.Output(display_name="outline", tooltip="The object's own visible pixels."),
                io.String.Output(display_name="caption", tooltip="The picture in the demo models' words."),
            ],
        )

    @classmethod
    def execute(cls, seed: int, objects: int = 1, object: int = 1, margin: float = 3.0) -> io.NodeOutput:
        import torch

        from ..demo import world

        if object > objects:
            raise ValueError(f"object is {object}, but the picture has only {objects}: choose 1, or set objects to 2.")
        scene = next(world.scenes(FIRST_SEED + seed, objects))
        image = torch.from_numpy(world.draw(scene)).float() / 255
        edit = torch.from_numpy(world.edit_mask(scene, object - 1, margin)).float()
        outline = torch.from_numpy(world.object_mask(scene, object - 1)).float()
        return io.NodeOutput(image[None], edit[None], outline[None], scene.caption())


class DemoSubject(io.ComfyNode):
    """Draw reference pictures of a subject that no demo model has seen, with its masks."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        from ..demo.subjects import SUBJECTS

        return io.Schema(
            node_id="DemoSubject",
            display_name="Demo Subject",
            category="BlendSwap/demo",
            **aliases("example subject", "reference images", "test picture"),
            description="Draws 64 × 64 pictures of one subject that the demo world does not have and no demo model "
            "has seen, in poses and on grounds by chance: references to learn it from.",
            inputs=[
                io.Combo.Input("subject", options=list(SUBJECTS), tooltip="Which subject."),
                io.Int.Input("count", default=5, min=1, max=100, tooltip="How many pictures."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**32 - 1,
                    control_after_generate=True,
                    tooltip="Poses and grounds. The same seed draws the same pictures everywhere.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="IMAGE"),
                io.Mask.Output(display_name="outline", tooltip="The subject's own pixels in each picture."),
                io.String.Output(
                    display_name="kind", tooltip="The nearest word of the demo world, for prompts and class prompts."
                ),
            ],
        )

    @classmethod
    def execute(cls, subject: str, count: int = 5, seed: int = 0) -> io.NodeOutput:
        import torch

        from ..demo.subjects import SUBJECTS, references

        images, masks = references(SUBJECTS[subject], count, FIRST_SUBJECT_SEED + seed)
        return io.NodeOutput(
            torch.from_numpy(images).float() / 255, torch.from_numpy(masks).float(), SUBJECTS[subject].kind
        )
