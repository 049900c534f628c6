"""The node that learns a subject into a MODEL and CLIP."""

from __future__ import annotations

import re

from comfy_api.latest import io, ui

from ..shared.inputs import aliases, running_node
from .options import DEFAULTS, TrainingOptions
from .training import (
    Training,
    checked_token,
    class_input,
    gathered,
    given_class,
    model_inputs,
    name_input,
    reference_inputs,
    train,
    training_inputs,
    training_outputs,
)

LORA, FULL = "lora", "full"


class LearnConceptDreamBooth(io.ComfyNode):
    """Learn a subject from a few pictures into MODEL and CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        shared = training_inputs(
            steps=800,
            lr=0.0,
            lr_words="Learning rate of AdamW; 0 for the preset's: 1e-4 (lora), 1e-6 (full, as in the Photoswap paper).",
        )
        return io.Schema(
            node_id="LearnConceptDreamBooth",
            display_name="Learn Concept (DreamBooth)",
            category="BlendSwap/concept",
            **aliases("train lora", "fine-tune", "personalization", "teach a subject"),
            description=(
                "DreamBooth (Ruiz et al. 2023): learns a subject from 3 to 20 pictures, under a rare word, as a LoRA "
                "or in the full weights. Gives MODEL and CLIP that know it, and writes a file for Load LoRA."
            ),
            inputs=[
                *model_inputs(),
                io.String.Input(
                    "instance_prompt",
                    default="a photo of sks dog",
                    tooltip="What the references show: the token, and the class after it.",
                ),
                io.String.Input("token", default="sks", tooltip="The rare word that names the subject."),
                io.String.Input(
                    "class_prompt",
                    default="a photo of a dog",
                    tooltip="The same without the token: what the prior is preserved with.",
                ),
                name_input("my_concept", "ComfyUI's loras folder"),
                io.Combo.Input(
                    "what",
                    options=[LORA, FULL],
                    default=LORA,
                    tooltip="lora: a small file, little memory. full: every weight, as published; the file "
                    "is as large as the model, and takes four times its memory in fp32.",
                ),
                io.Int.Input("rank", default=16, min=1, max=1024, tooltip="lora: rank."),
                io.Boolean.Input("text_encoder", default=True, tooltip="Train the text encoder as well."),
                io.Float.Input(
                    "prior_weight",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How much the class is held to what it was; 0 for not at all, which saves half "
                    "of the time.",
                ),
                io.Int.Input(
                    "class_images",
                    default=100,
                    min=1,
                    max=10000,
                    tooltip="Pictures of the class that the MODEL makes first, to hold it to. They are made "
                    "once, and kept in output/class_pictures.",
                ),
                *shared,
                *reference_inputs(),
                class_input(),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="Knows the subject."),
                io.Clip.Output(display_name="CLIP", tooltip="Knows the subject."),
                io.String.Output(display_name="lora_name", tooltip="The file as Load LoRA lists it."),
                *training_outputs(),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        instance_prompt: str,
        token: str,
        class_prompt: str,
        name: str,
        what: str,
        rank: int,
        text_encoder: bool,
        prior_weight: float,
        class_images: int,
        steps: int,
        lr: float,
        seed: int,
        options: TrainingOptions = DEFAULTS,
        images=None,
        masks=None,
        references=None,
        class_pictures=None,
    ) -> io.NodeOutput:
        from ...concepts.files import concept_name
        from ...concepts.settings import DREAMBOOTH_FULL, DREAMBOOTH_LORA
        from ...hosts.comfy.learner.learner import check_learnable, learned_model
        from ...protocols.learner import FullWeights, LowRank

        options.check_for(lora=what == LORA)
        pictures, own_class = gathered(images, masks, references), given_class(class_pictures)
        name = concept_name(name)
        check_learnable(model, clip, vae)
        token = checked_token(clip, token)
        if not re.search(rf"(?<!\w){re.escape(token)}(?!\w)", instance_prompt, re.IGNORECASE):
            raise ValueError(
                f"instance_prompt is {instance_prompt!r}, without the token {token!r}: nothing would be tied to it. "
                f"Write for example 'a photo of {token} dog'"
            )
        if prior_weight > 0 and not class_prompt.strip():
            raise ValueError(
                "class_prompt is empty, but prior_weight is above 0: say what kind of thing the subject is, such as "
                "'a photo of a dog', or set prior_weight to 0"
            )
        preset, learned = DREAMBOOTH_FULL, FullWeights(text_encoder)
        if what == LORA:
            preset, learned = DREAMBOOTH_LORA, LowRank(rank, options.alpha or None, text_encoder, options.all_layers)
        training = Training(
            kind="DreamBooth",
            folder="loras",
            name=name,
            token=token,
            learned=learned,
            references=pictures,
            prompts=(instance_prompt.strip(),),
            settings=options.settings(
                steps=steps, lr=lr or preset.lr, seed=seed, batch=preset.batch, prior_weight=prior_weight
            ),
            options=options,
            class_prompt=class_prompt.strip(),
            class_images=class_images,
            own_class=own_class,
        )
        made = train(model, clip, vae, training, running_node(cls))
        knowing = learned_model(model, clip, learned, made.state)
        return io.NodeOutput(
            *knowing, made.file.name, made.plot, made.previews, made.report, ui=ui.PreviewText(made.report)
        )
