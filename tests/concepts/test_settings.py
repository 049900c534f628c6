"""Settings of a training, its prompts and its token."""

from __future__ import annotations

import pytest

from blendswap.concepts.settings import (
    DREAMBOOTH_FULL,
    DREAMBOOTH_LORA,
    TEMPLATES,
    TEXTUAL_INVERSION,
    TrainSettings,
    prompts_for,
)
from blendswap.protocols.learner import check_token


def test_the_presets_are_the_papers() -> None:
    assert (DREAMBOOTH_FULL.steps, DREAMBOOTH_FULL.lr, DREAMBOOTH_FULL.batch) == (800, 1e-6, 1)
    assert (TEXTUAL_INVERSION.steps, TEXTUAL_INVERSION.lr, TEXTUAL_INVERSION.batch) == (1000, 5e-4, 4)
    assert (DREAMBOOTH_LORA.steps, DREAMBOOTH_LORA.lr, DREAMBOOTH_LORA.batch) == (800, 1e-4, 1)
    assert len(set(TEMPLATES)) == 27


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch", 0),
        ("accumulation", 1.5),
        ("lr", 0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("warmup", -1),
        ("weight_decay", -1),
        ("min_snr", 0),
        ("prior_weight", -0.1),
        ("seed", -1),
        ("max_grad_norm", 0),
        ("checkpoint_every", -1),
        ("preview_every", -1),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{field} is {value}"):
        TrainSettings(**{field: value})


def test_the_learning_rate_rises_and_stays() -> None:
    settings = TrainSettings(lr=1.0, warmup=4)
    assert [settings.rate(step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert TrainSettings(lr=1.0).rate(0) == 1


def test_prompts_are_templates_with_the_token() -> None:
    assert prompts_for("ohwx")[0] == "a photo of a ohwx" and len(prompts_for("ohwx")) == 27
    assert prompts_for("ohwx", ["a {} on a white background"]) == ("a ohwx on a white background",)


@pytest.mark.parametrize("templates", [[], ["a photo"], ["{} and {}"], ["a {} in {0}"]])
def test_a_template_without_one_place_for_the_token_is_refused(templates: list[str]) -> None:
    with pytest.raises(ValueError, match="template"):
        prompts_for("ohwx", templates)


def test_a_rare_word_is_taken_as_token() -> None:
    assert check_token(" ohwx ", {"dog", "star"}) == "ohwx"
    assert check_token("<my-cat>", {"cat"}) == "<my-cat>"


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("my dog", "more than one word"),
        ("a/b", "/"),
        ("sks,", ","),
        ("(sks:1.2)", ":"),
        ("Dog", "common word"),
    ],
)
def test_an_unfit_token_is_refused_with_the_reason(token: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)token.*{said}"):
        check_token(token, {"dog", "star"})
