"""The diffusers learner: the same model as the pipeline's, trained only where it is said, in every precision."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from blendswap.demo import files, world
from blendswap.hosts.diffusers.host import DiffusersHost
from blendswap.hosts.diffusers.learner import DiffusersLearner
from blendswap.protocols.learner import FullWeights, Learned, LowRank, TokenVectors

PROMPT = "a red striped star"
KINDS = [
    LowRank(2),
    LowRank(2, alpha=4.0, text_encoder=False, convolutions=True),
    FullWeights(),
    FullWeights(text_encoder=False),
    TokenVectors("sks", "star", 2),
]
ALL_KINDS = pytest.mark.parametrize("learned", KINDS, ids=lambda learned: type(learned).__name__)


def picture() -> torch.Tensor:
    drawn = world.draw(next(world.scenes(3_000_000, 1)))
    return torch.from_numpy(drawn).permute(2, 0, 1)[None].float() / 127.5 - 1


def noisy(batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 8, 16, 16, generator=torch.Generator().manual_seed(0))


def gradients(learner: DiffusersLearner, prompt: str) -> dict[str, torch.Tensor]:
    for parameter in learner.parameters.values():
        parameter.grad = None
    # Of the size that a loss's mean has, which is where half precision has its limits.
    learner.denoise(noisy(2), torch.tensor([300, 700]), learner.text([prompt] * 2)).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in learner.parameters.items()}


@ALL_KINDS
def test_before_training_it_answers_as_the_pipeline(learned: Learned) -> None:
    learner, host = DiffusersLearner(files.TEXT, learned), DiffusersHost.from_pipeline(files.TEXT, PROMPT)
    assert (learner.prediction, learner.downscale) == (host.prediction, host.downscale)
    t = torch.tensor([500])
    with torch.no_grad():
        torch.testing.assert_close(
            learner.denoise(noisy(), t, learner.text([PROMPT])), host.network(noisy(), t)[0], rtol=1e-4, atol=1e-5
        )
        x0 = learner.encode(picture())
        torch.testing.assert_close(x0, host.encode(picture()), rtol=1e-4, atol=1e-5)
    assert (learner.decode(x0) - picture()).square().mean() < 0.01 and learner.decode(9 * x0).abs().max() <= 1


@ALL_KINDS
def test_gradients_reach_what_is_trained_and_nothing_else(learned: Learned) -> None:
    learner = DiffusersLearner(files.TEXT, learned)
    found = gradients(learner, "a sks star")
    parameters = learner.parameters
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in parameters.values())
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    # LoRA begins with up = 0, where down has no gradient yet.
    begun = [name for name in found if ".lora_A." not in name]
    assert begun and all(found[name].abs().max() > 0 for name in begun if "k_proj.bias" not in name)
    with_text = not isinstance(learned, TokenVectors) and learned.text_encoder
    assert any(name.startswith("text_encoder.") for name in found) == with_text
    others = [
        p
        for part in (learner.unet, learner.encoder, learner.vae)
        for p in part.parameters()
        if not any(p is mine for mine in parameters.values())
    ]
    assert others and all(p.grad is None and not p.requires_grad for p in others)


def test_low_rank_is_on_attention_or_on_every_weight() -> None:
    few = DiffusersLearner(files.TEXT, LowRank(2)).parameters
    many = DiffusersLearner(files.TEXT, LowRank(2, convolutions=True)).parameters
    assert all(".to_" in name or "_proj." in name for name in few) and any("text_encoder" in name for name in few)
    assert any("conv1" in name for name in many) and any(".ff." in name for name in many) and set(few) < set(many)


@ALL_KINDS
def test_every_run_begins_alike(learned: Learned) -> None:
    torch.manual_seed(0)
    first = DiffusersLearner(files.TEXT, learned).parameters
    torch.manual_seed(1)
    second = DiffusersLearner(files.TEXT, learned).parameters
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), ("fp16", 0.02)])
@pytest.mark.parametrize(
    "learned", [LowRank(2), FullWeights(), TokenVectors("sks", "star")], ids=lambda learned: type(learned).__name__
)
def test_half_precision_with_checkpointing_has_about_the_same_gradients(learned, precision, tolerance) -> None:
    exact = gradients(DiffusersLearner(files.TEXT, learned), "a sks star")
    learner = DiffusersLearner(files.TEXT, learned, precision, gradient_checkpointing=True)
    found = gradients(learner, "a sks star")
    difference = sum((found[name] - exact[name]).square().sum() for name in exact).sqrt()
    assert difference < tolerance * sum(gradient.square().sum() for gradient in exact.values()).sqrt()


def test_checkpointing_keeps_fewer_activations() -> None:
    kept = []
    for checkpointing in (False, True):
        learner, sizes = DiffusersLearner(files.TEXT, FullWeights(), gradient_checkpointing=checkpointing), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x):
            learner.denoise(noisy(4), torch.tensor([5] * 4), learner.text([PROMPT] * 4))
        kept.append(sum(sizes))
    assert kept[1] < 0.7 * kept[0]


# Token vectors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_a_token_begins_as_its_initial_word(count: int) -> None:
    learner = DiffusersLearner(files.TEXT, TokenVectors("sks", "star", count))
    assert learner.parameters["token_vectors"].shape == (count, 96)
    with torch.no_grad():
        new = learner.text(["a red sks on a white background"]).context
        old = learner.text([f"a red {'star ' * count} on a white background"]).context
    torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5)


def test_an_initial_word_of_several_tokens_gives_each_vector_its_own() -> None:
    learner = DiffusersLearner(files.TEXT, TokenVectors("sks", "red star", 3))
    with torch.no_grad():
        torch.testing.assert_close(learner.text(["a sks"]).context, learner.text(["a red star star"]).context)


def test_the_token_counts_as_a_whole_word_alone() -> None:
    learner = DiffusersLearner(files.TEXT, TokenVectors("star", "circle"))
    with torch.no_grad():
        before = learner.text(["a Star", "a star, red", "a starry moon"]).context
        learner.parameters["token_vectors"].neg_()
        after = learner.text(["a Star", "a star, red", "a starry moon"]).context
    changed = (before - after).abs().amax((1, 2)) > 1e-3
    assert changed.tolist() == [True, True, False]


def test_an_initial_word_that_is_unknown_is_refused() -> None:
    for word in ("", "xylophone"):
        with pytest.raises(ValueError, match=f"initial_word '{word}'"):
            DiffusersLearner(files.TEXT, TokenVectors("sks", word))


# Sampling ---------------------------------------------------------------------------------------------------------


def test_sampling_shows_what_is_asked_for() -> None:
    """The colour of the object, as the palette finds it."""
    from blendswap.demo.judges.shapes import nearest_colour

    learner = DiffusersLearner(files.TEXT, LowRank(2))
    prompts = [f"a {colour} square on a plain white background" for colour in ("red", "green", "blue")]
    made = learner.sample(prompts, (64, 64), steps=15, cfg=5.0, seed=1)
    pixels = ((made + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    everywhere = torch.ones(64, 64, dtype=torch.bool).numpy()
    found = [nearest_colour(row, everywhere) for row in pixels]
    assert sum(colour in prompt for colour, prompt in zip(found, prompts, strict=True)) >= 2


def test_a_row_is_the_same_beside_others_and_leaves_chance_alone() -> None:
    learner = DiffusersLearner(files.TEXT, LowRank(2))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    both = learner.sample([PROMPT, "a blue circle"], (64, 48), steps=3, cfg=4.0, seed=2)
    alone = learner.sample([PROMPT], (64, 48), steps=3, cfg=4.0, seed=2)
    assert both.shape == (2, 3, 64, 48) and torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(both[:1], alone, rtol=0, atol=1e-4)
    assert (both[0] - both[1]).abs().max() > 0.1
    assert all(parameter.requires_grad for parameter in learner.parameters.values())


# What is refused --------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_such_a_model_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(files.TEXT, folder)
    (folder / "text_encoder_2").mkdir()
    with pytest.raises(ValueError, match="two text encoders"):
        DiffusersLearner(folder, LowRank(2))
    (folder / "text_encoder_2").rmdir()
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, "prediction_type": "sample"}))
    with pytest.raises(ValueError, match="prediction is 'sample'"):
        DiffusersLearner(folder, LowRank(2))
    shutil.rmtree(folder / "vae")
    with pytest.raises(FileNotFoundError, match="vae is missing"):
        DiffusersLearner(folder, LowRank(2))
    with pytest.raises(ValueError, match="precision is 'fp8'"):
        DiffusersLearner(files.TEXT, LowRank(2), "fp8")
