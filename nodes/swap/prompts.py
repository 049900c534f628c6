"""The node of a swap's two prompts: their conditioning, and how their words correspond."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io, ui

from ..shared.inputs import aliases
from ..shared.sockets import SwapTokensIO

if TYPE_CHECKING:
    from ...attention_swap.alignment.words import TokenisedPrompt

ENCODERS = {"l", "g", "h"}
"""ComfyUI's names of the text encoders of SD 1.x, SDXL and SD 2.x."""


class SwapPrompts(io.ComfyNode):
    """Encode a source's and a target's prompt, and align their words."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SwapPrompts",
            display_name="Swap Prompts",
            category="BlendSwap/swap",
            **aliases(
                "photoswap",
                "prompt-to-prompt",
                "p2p",
                "clip text encode",
                "align words",
                "replace word",
                "attention reweighting",
            ),
            description=(
                "Encodes the source's prompt and the target's, and says which words correspond, so that a swap knows "
                "whose cross-attention a new word takes. The target's prompt is best the source's with the subject "
                "replaced. Embeddings and prompt weights work as in CLIPTextEncode."
            ),
            inputs=[
                io.Clip.Input("clip", tooltip="CLIP of SD 1.x, SD 2.x or SDXL."),
                io.String.Input(
                    "source_prompt",
                    multiline=True,
                    default="",
                    dynamic_prompts=True,
                    tooltip="What the source shows: the prompt that it was inverted or made with.",
                ),
                io.String.Input(
                    "target_prompt",
                    multiline=True,
                    default="",
                    dynamic_prompts=True,
                    tooltip="The same with the new subject in the old one's place.",
                ),
                io.String.Input(
                    "source_subject",
                    default="",
                    tooltip="The subject's word, or words in a row, in source_prompt. Empty: the words "
                    "that were replaced. For several subjects use SwapSubject.",
                ),
                io.String.Input(
                    "target_subject", default="", tooltip="What stands in its place in target_prompt. Both, or neither."
                ),
                io.String.Input(
                    "word_weights",
                    default="",
                    multiline=True,
                    tooltip="How strongly words of target_prompt attend, 1 being normal: star:1.5, blue sky:0.5",
                ),
                io.Clip.Input(
                    "target_clip",
                    optional=True,
                    tooltip="CLIP for the target's prompt where it is another one, such as a concept's.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="source", tooltip="positive for NullTextInvert and AttentionCapture."
                ),
                io.Conditioning.Output(display_name="target", tooltip="positive for AttentionSwapSampler."),
                SwapTokensIO.Output(display_name="tokens", tooltip="For AttentionSwapSampler."),
                io.String.Output(display_name="words", tooltip="What became of the words."),
            ],
        )

    @classmethod
    def execute(
        cls,
        clip,
        source_prompt: str,
        target_prompt: str,
        source_subject: str = "",
        target_subject: str = "",
        word_weights: str = "",
        target_clip=None,
    ) -> io.NodeOutput:
        from ...attention_swap.prompts import PromptPair, word_weights as parsed

        source_subject, target_subject = source_subject.strip(), target_subject.strip()
        if bool(source_subject) != bool(target_subject):
            missing, given = ("target", "source") if source_subject else ("source", "target")
            raise ValueError(
                f"{missing}_subject is empty, but {given}_subject is {source_subject or target_subject!r}: name the "
                "subject in both prompts, or in neither"
            )
        if clip is None:
            raise ValueError("clip is empty: the checkpoint has no text encoder. Load one and connect it.")
        source, source_tokens, notes = encoded(clip, source_prompt)
        target, target_tokens, more = encoded(clip if target_clip is None else target_clip, target_prompt)
        subjects = ((source_subject, target_subject),) if source_subject else ()
        pair = PromptPair(source_tokens, target_tokens, subjects, parsed(word_weights))
        words = "\n".join(dict.fromkeys([pair.align().describe(), *notes, *more]))
        return io.NodeOutput(source, target, pair, words, ui=ui.PreviewText(words))


def encoded(clip: Any, prompt: str) -> tuple[Any, TokenisedPrompt, list[str]]:
    """CONDITIONING of a prompt, as CLIPTextEncode makes it, the prompt as cross-attention meets it, and what to say of
    embeddings that ComfyUI leaves out.

    SDXL's two encoders put the same words at the same positions, so one of them tells for both.
    Raises ValueError for a CLIP that is not Stable Diffusion's.
    """
    from ...attention_swap.alignment.tokenizers import embeddings_in, from_comfy

    tokens = clip.tokenize(prompt, return_word_ids=True)
    tokenizers = [one for one in vars(clip.tokenizer).values() if hasattr(one, "inv_vocab")]
    if not tokenizers or not set(tokens) <= ENCODERS:
        raise ValueError(
            f"the CLIP ({type(clip.tokenizer).__name__}, encoders {', '.join(tokens)}) is not one of Stable "
            "Diffusion's: connect the CLIP of an SD 1.x, SD 2.x or SDXL checkpoint"
        )
    first = next(iter(tokens))
    tokenizer = getattr(clip.tokenizer, f"clip_{first}", tokenizers[0])
    width, found, notes = tokenizer.embedding_size, [], []
    for name in embeddings_in(prompt, getattr(tokenizer, "concepts", ())):
        vectors = _vectors(clip.tokenize(name, return_word_ids=True)[first])
        if not vectors:
            notes.append(f"{name} is not in ComfyUI's embeddings folder, and is left out")
        elif vectors[0].shape[-1] != width:
            notes.append(
                f"{name} was made for another kind of model ({vectors[0].shape[-1]} numbers a vector, "
                f"this one takes {width}), and is left out"
            )
        else:
            found.append(name)
    chunks = [_as_encoded(chunk, width) for chunk in tokens[first]]
    words = from_comfy({first: chunks}, lambda token: tokenizers[0].inv_vocab.get(token, ""), prompt, found)
    plain = {name: [[entry[:2] for entry in chunk] for chunk in chunks] for name, chunks in tokens.items()}
    return clip.encode_from_tokens_scheduled(plain), words, list(dict.fromkeys(notes))


def _vectors(chunks: list[list[tuple]]) -> list[torch.Tensor]:
    return [entry[0] for chunk in chunks for entry in chunk if isinstance(entry[0], torch.Tensor)]


def _as_encoded(chunk: list[tuple], width: int) -> list[tuple]:
    """Tokens where the encoder has them: it takes vectors of another width out, and pads at the end."""
    kept = [entry for entry in chunk if not isinstance(entry[0], torch.Tensor) or entry[0].shape[-1] == width]
    return kept + [chunk[-1]] * (len(chunk) - len(kept))
