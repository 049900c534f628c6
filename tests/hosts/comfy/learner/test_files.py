"""What was learned as files and outputs: the same pictures through ComfyUI's own loaders, on whole files alone."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from blendswap.concepts.files import concept_name, write_concept
from blendswap.protocols.learner import FullWeights, LowRank, TokenVectors

TOKEN, PROMPT = "sks", "a sks star"
KINDS = {
    "lora": LowRank(4, text_encoder=False),
    "lora everywhere": LowRank(2, alpha=4.0, convolutions=True),
    "full": FullWeights(),
    "vectors": TokenVectors(TOKEN, "star", 3),
}


@pytest.fixture(scope="module")
def parts(comfy, text_model: Path) -> tuple:
    from blendswap.hosts.comfy.small_sd import load_demo_text_model

    with torch.inference_mode():
        return load_demo_text_model(text_model)


@contextlib.contextmanager
def learned_on(parts: tuple, learned: Any) -> Iterator[Any]:
    """A learner after some change to everything that it learns."""
    from blendswap.hosts.comfy.learner.learner import open_learner

    with torch.inference_mode(), open_learner(*parts, learned, size=64) as learner:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in learner.parameters.values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        yield learner


def latent(model: Any, clip: Any, prompt: str) -> torch.Tensor:
    """What ComfyUI's sampler makes of a prompt through CLIPTextEncode."""
    import comfy.sample
    from nodes import CLIPTextEncode

    with torch.inference_mode():
        conds = [CLIPTextEncode().encode(clip, text)[0] for text in (prompt, "")]
        noise = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(2))
        return comfy.sample.sample(
            model, noise, 2, 3.0, "euler", "normal", *conds, torch.zeros(1, 8, 16, 16), disable_pbar=True, seed=0
        ).clone()


@pytest.mark.needs_comfy
@pytest.mark.parametrize("kind", KINDS)
def test_the_stock_loader_makes_the_same_pictures_of_the_file(parts, comfy: Path, kind):
    from nodes import LoraLoader

    from blendswap.hosts.comfy.learner.learner import concept_state, learned_model

    learned, (model, clip, _) = KINDS[kind], parts
    with learned_on(parts, learned) as learner:
        state = concept_state(learner)
    with torch.inference_mode():
        made = latent(*learned_model(model, clip, learned, state), PROMPT)
    folder = "embeddings" if kind == "vectors" else "loras"
    write_concept(comfy / "models" / folder / "my_concept.safetensors", state, {"token": TOKEN})
    with torch.inference_mode():
        if kind == "vectors":
            loaded = latent(model, clip, "a embedding:my_concept star")
        else:
            loaded = latent(*LoraLoader().load_lora(model, clip, "my_concept.safetensors", 1.0, 1.0), PROMPT)
    assert torch.equal(made, loaded)
    assert (made - latent(model, clip, PROMPT)).abs().max() > 1e-2


@pytest.mark.needs_comfy
@pytest.mark.parametrize("kind", KINDS)
def test_the_outputs_answer_as_the_learner_did(parts, kind):
    from blendswap.hosts.comfy.learner.learner import concept_state, learned_model, open_learner

    learned = KINDS[kind]
    x, t = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([400])

    def answer(learner: Any) -> torch.Tensor:
        with torch.no_grad():
            return learner.denoise(x, t, learner.text([PROMPT]))

    with learned_on(parts, learned) as learner:
        expected, state = answer(learner), concept_state(learner)
    with torch.inference_mode():
        model, clip = learned_model(*parts[:2], learned, state)
        with open_learner(model, clip, parts[2], LowRank(1), size=64) as again:
            made = answer(again)
            if kind == "vectors":  # a second concept beside the first
                both = learned_model(model, clip, TokenVectors("zwx", "star"), {"emb_params": torch.zeros(1, 96)})[1]
                assert [len(tensor) for tensor in map(vectors_of(both), ("sks", "zwx", "sks zwx"))] == [3, 1, 4]
        with open_learner(*parts, LowRank(1), size=64) as plain:
            before = answer(plain)
    torch.testing.assert_close(made, expected, rtol=2e-3, atol=2e-3)
    assert (made - before).abs().max() > 1e-2


def vectors_of(clip: Any) -> Any:
    return lambda prompt: [
        entry for chunk in clip.tokenize(prompt)["l"] for entry in chunk if isinstance(entry[0], torch.Tensor)
    ]


@pytest.mark.needs_comfy
def test_the_word_is_found_wherever_a_prompt_has_it_as_a_word(parts):
    from blendswap.hosts.comfy.learner.text import with_token

    vectors = torch.randn(2, 96)
    clip = with_token(parts[1], "<dog>", {"clip_l": vectors})
    tensors = vectors_of(clip)
    for prompt in ("<dog>", "a <dog>, sitting", "A <DOG>'s ball", "a\n<dog>", "(<dog>)", "red, (big <dog>:1.3) here"):
        found = tensors(prompt)
        assert [torch.equal(entry[0], row) for entry, row in zip(found, vectors, strict=True)] == [True, True], prompt
    assert tensors("a (<dog>:1.3)")[0][1] == pytest.approx(1.3)
    assert not tensors("a dog, <dogs") and not vectors_of(parts[1])("a <dog>")
    assert len(clip.tokenize("a <dog> " * 60)["l"]) > 1
    words = clip.tokenize("a <dog> star", return_word_ids=True)["l"][0]
    assert words[2][2] == words[3][2] != words[4][2]


# Names and files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["my_dog", "dog-2.v1", "  rex ", "rex.safetensors", "Hündchen"])
def test_ordinary_names_are_taken(name):
    assert concept_name(name) == name.strip().removesuffix(".safetensors")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("../dog", "path"),
        ("a/b", "path"),
        ("a\\b", "path"),
        ("..", "path"),
        ("a:b", "letters"),
        ("my dog", "letters"),
        ("a,b", "letters"),
        (".hidden", "letters"),
        ("dog.", "letters"),
        ("con", "Windows"),
        ("NUL.txt", "Windows"),
        ("lpt1", "Windows"),
        ("a" * 200, "200 characters"),
    ],
)
def test_names_that_some_system_refuses_are_refused_with_words(name, message):
    with pytest.raises(ValueError, match=message):
        concept_name(name)


def test_a_concept_is_written_whole_with_its_metadata(tmp_path: Path):
    from safetensors import safe_open

    path = tmp_path / "loras" / "dog.safetensors"
    write_concept(path, {"a": torch.arange(6.0).reshape(2, 3).T}, {"token": TOKEN})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"token": TOKEN}
        assert torch.equal(file.get_tensor("a"), torch.arange(6.0).reshape(2, 3).T)
    assert os.listdir(path.parent) == ["dog.safetensors"]


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path: Path, monkeypatch, where):
    path = tmp_path / "dog.safetensors"
    write_concept(path, {"a": torch.ones(2)}, {})
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, where, full)
    with pytest.raises(RuntimeError, match=r"dog.safetensors could not be written: No space left on device"):
        write_concept(path, {"a": torch.zeros(2)}, {})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["dog.safetensors"]
