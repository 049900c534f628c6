"""The score of a concept: embeddings built so that the answer is known, in two scorers of different taste."""

from __future__ import annotations

import math

import pytest
import torch

from blendswap.concepts.score import ConceptScoring, score_concept

WIDTH = 64
COMMON, SUBJECT = torch.eye(WIDTH)[0] * 3, torch.eye(WIDTH)[1] * 3


def pictures(kind: float, count: int, seed: int, spread: float = 0.15, common: float = 1.0) -> torch.Tensor:
    """Embeddings [count, WIDTH] of pictures that are the subject (kind 1), or any of its class (kind 0). `common` is
    what a scorer finds alike in all pictures."""
    noise = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)) * spread
    return COMMON * common + SUBJECT * kind + noise


def score(
    known: float, learned_class: float | torch.Tensor | None = 0.0, common: float = 1.0, **changes
) -> ConceptScoring:
    given = {
        "samples": pictures(known, 12, 1, common=common),
        "references": pictures(1, 5, 2, common=common),
        "base_class": pictures(0, 12, 3, common=common),
        "learned_class": pictures(learned_class, 12, 4, common=common)
        if isinstance(learned_class, float)
        else learned_class,
    }
    return score_concept(**{**given, **changes})


@pytest.mark.parametrize("common", [0.5, 3.0])
def test_the_scale_means_the_same_with_any_scorer(common: float) -> None:
    """Raw similarities of the class differ widely between scorers; the score does not."""
    nothing, everything = score(0.0, common=common), score(1.0, common=common)
    assert nothing.identity == pytest.approx(0, abs=0.1) and nothing.verdict == "weak"
    assert everything.identity == pytest.approx(1, abs=0.1) and everything.verdict == "known"
    assert nothing.identity < score(0.4, common=common).identity < everything.identity


def test_a_model_that_learned_nothing_is_weak_and_says_what_to_do() -> None:
    words = score(0.0).words()
    assert words.startswith("weak:") and "more steps" in words


def test_a_concept_that_is_known_is_called_so() -> None:
    assert score(1.0).words().startswith("known")
    assert score(1.0, learned_class=None).words().startswith("known")
    assert score(1.0, learned_class=None).drift is None


def test_a_class_that_became_the_subject_is_overfitted() -> None:
    scoring = score(1.0, learned_class=1.0)
    assert scoring.drift == pytest.approx(1, abs=0.1) and scoring.verdict == "overfitted"
    assert "of the way to the subject" in scoring.words() and "prior preservation" in scoring.words()
    assert score(1.0, learned_class=0.0).drift < 0.15


def test_a_class_that_lost_its_variety_is_overfitted() -> None:
    scoring = score(1.0, pictures(0, 12, 4, spread=0.03))
    assert scoring.class_diversity < 0.3 and "differ only" in scoring.words() and scoring.verdict == "overfitted"


def test_samples_all_alike_are_overfitted() -> None:
    scoring = score(1.0, samples=pictures(1, 12, 1, spread=0.02))
    assert scoring.sample_diversity < 0.3 and scoring.verdict == "overfitted"


def test_weak_and_broken_at_once_says_both() -> None:
    words = score(0.0, -pictures(1, 12, 4)).words()
    assert words.startswith("weak:") and "And the class itself has gone" in words


def test_copies_of_references_show_in_the_best() -> None:
    references = pictures(1, 5, 2, spread=0.3)
    copies = references.repeat(2, 1) + 0.01 * pictures(0, 10, 9)
    scoring = score(1.0, samples=copies, references=references)
    honest = score(1.0, samples=pictures(1, 10, 8, spread=0.3), references=references)
    assert honest.best == pytest.approx(1, abs=0.15) and scoring.best > 1.5


def test_a_scorer_that_cannot_tell_the_subject_says_so() -> None:
    blind = score(0.0, references=pictures(0, 5, 2))
    assert math.isnan(blind.identity) and blind.words().startswith("unclear")


def test_one_reference_will_do() -> None:
    assert score(1.0, references=pictures(1, 1, 2)).verdict == "known"
    assert score(0.0, references=pictures(1, 1, 2)).verdict == "weak"


def test_lengths_of_embeddings_do_not_matter() -> None:
    long = score(0.7, samples=pictures(0.7, 12, 1) * torch.linspace(0.1, 50, 12)[:, None])
    assert long.identity == pytest.approx(score(0.7).identity)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"samples": torch.ones(1, WIDTH)}, "samples has the shape"),
        ({"base_class": torch.ones(4, 3)}, "base_class has the shape"),
        ({"references": torch.ones(0, WIDTH)}, "references has the shape"),
        ({"samples": torch.full((3, WIDTH), float("nan"))}, "samples has NaN"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused_by_name(changes, said) -> None:
    with pytest.raises(ValueError, match=said):
        score(1.0, **changes)
