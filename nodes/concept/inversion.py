"""The node that learns a subject as a new word."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..shared.inputs import aliases, running_node
from .options import DEFAULTS, TrainingOptions
from .training import (
    Training,
    checked_token,
    gathered,
    model_inputs,
    name_input,
    reference_inputs,
    train,
    training_inputs,
    training_outputs,
)


class LearnConceptTextualInversion(io.ComfyNode):
    """Learn a subject from a few pictures as a word of the CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        shared = training_inputs(steps=1000, lr=5e-4, lr_words="Learning rate of AdamW; 5e-4 as published.")
        return io.Schema(
            node_id="LearnConceptTextualInversion",
            display_name="Learn Concept (Textual Inversion)",
            category="BlendSwap/concept",
            **aliases("train embedding", "learn embedding", "personalization", "teach a subject"),
            description=(
                "Textual Inversion (Gal et al. 2022): learns a subject from 3 to 20 pictures as one or a few vectors "
                "of a new word; no weight of the model changes. Gives a CLIP that knows the word, and writes a file "
                "for embedding:name in any prompt."
            ),
            inputs=[
                *model_inputs(),
                io.String.Input("token", default="sks", tooltip="The new word: one that means nothing yet."),
                io.String.Input(
                    "initial_word", default="dog", tooltip="What the subject is, in a word: what the vectors begin as."
                ),
                io.Int.Input(
                    "vectors",
                    default=1,
                    min=1,
                    max=32,
                    tooltip="Vectors of the word. More hold more of the subject, and leave less room for "
                    "the rest of a prompt.",
                ),
                name_input("my_concept", "ComfyUI's embeddings folder"),
                io.String.Input(
                    "templates",
                    default="",
                    multiline=True,
                    tooltip="Prompts to train on, one in a line, with {} in the place of the word. Empty "
                    "for the 27 published ones (a photo of a {}, …).",
                ),
                *shared,
                *reference_inputs(),
            ],
            outputs=[
                io.Clip.Output(display_name="CLIP", tooltip="Knows the token as a word of any prompt."),
                io.String.Output(display_name="embedding", tooltip="What to write in a prompt for the file."),
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
        token: str,
        initial_word: str,
        name: str,
        vectors: int,
        templates: str,
        steps: int,
        lr: float,
        seed: int,
        options: TrainingOptions = DEFAULTS,
        images=None,
        masks=None,
        references=None,
    ) -> io.NodeOutput:
        from ...blending.regions import lines
        from ...concepts.files import concept_name
        from ...concepts.settings import TEMPLATES, TEXTUAL_INVERSION, prompts_for
        from ...hosts.comfy.learner.learner import check_learnable, learned_model
        from ...protocols.learner import TokenVectors

        options.check_for(lora=False)
        pictures = gathered(images, masks, references)
        name = concept_name(name)
        check_learnable(model, clip, vae)
        token = checked_token(clip, token)
        if not initial_word.strip():
            raise ValueError("initial_word is empty: give a word for what the subject is, such as 'dog'")
        learned = TokenVectors(token, initial_word.strip(), vectors)
        training = Training(
            kind="Textual Inversion",
            folder="embeddings",
            name=name,
            token=token,
            learned=learned,
            references=pictures,
            prompts=prompts_for(token, lines(templates) or TEMPLATES),
            settings=options.settings(
                steps=steps, lr=lr or TEXTUAL_INVERSION.lr, seed=seed, batch=TEXTUAL_INVERSION.batch
            ),
            options=options,
        )
        made = train(model, clip, vae, training, running_node(cls))
        knowing = learned_model(model, clip, learned, made.state)[1]
        return io.NodeOutput(
            knowing,
            f"embedding:{made.file.stem}",
            made.plot,
            made.previews,
            made.report,
            ui=ui.PreviewText(made.report),
        )
