"""Word alignment: what takes its map from what, on the demo's tokenizer and on ComfyUI's token lists."""

from __future__ import annotations

import functools

import pytest
import torch

from blendswap.attention_swap.alignment.align import Alignment, align
from blendswap.attention_swap.alignment.tokenizers import from_comfy, from_transformers
from blendswap.attention_swap.alignment.words import TokenisedPrompt, Word
from blendswap.demo.files import TEXT

SOURCE = "a red star on a blue sky background"


@functools.cache
def tokenizer():
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(TEXT / "tokenizer")


def prompt(text: str) -> TokenisedPrompt:
    return from_transformers(tokenizer(), text)


def by_hand(text: str, split: dict[str, int] | None = None, length: int = 20) -> TokenisedPrompt:
    """Words of one token each, or as many as `split` says."""
    ids, words = ["<start>"], []
    for word in text.split():
        count = (split or {}).get(word, 1)
        words.append(Word(word, tuple(range(len(ids), len(ids) + count))))
        ids += [f"{word}.{number}" for number in range(count)]
    ids += ["<end>"] * (length - len(ids))
    return TokenisedPrompt(tuple(ids), tuple(words), length)


def taken(alignment: Alignment, word: str) -> dict[str, float]:
    """Which source words a target word takes its map from, with what weight in all."""
    columns = (
        alignment.mapper[:, list(alignment.target_positions(word))]
        * alignment.alphas[list(alignment.target_positions(word))]
    )
    shares = {source.text: columns[list(source.positions)].sum().item() for source in alignment.source_words}
    return {text: share for text, share in shares.items() if share}


def test_words_and_their_positions_come_from_the_tokenizer() -> None:
    made = prompt("a zebra on a sky")
    assert [word.text for word in made.words] == ["a", "zebra", "on", "a", "sky"]
    assert len(made.words[1].positions) > 1 and made.words[1].positions[0] == 2
    assert len(made.ids) == made.chunk == 77
    assert made.occurrences("a") == [(0,), (3,)] and made.occurrences("A  Sky,") == [(3, 4)]


def test_added_tokens_of_one_concept_are_one_word() -> None:
    from transformers import CLIPTokenizer

    own = CLIPTokenizer.from_pretrained(TEXT / "tokenizer")
    own.add_tokens(["<cat>", "<cat>_1", "<cat>_2"])
    made = from_transformers(own, "a <cat> <cat>_1 <cat>_2 on a sky")
    assert [(word.text, word.positions) for word in made.words[:3]] == [("a", (1,)), ("<cat>", (2, 3, 4)), ("on", (5,))]


def test_equal_prompts_align_to_themselves() -> None:
    alignment = align(prompt(SOURCE), prompt(SOURCE))
    assert alignment.identical and not alignment.reweights
    assert "same words" in alignment.describe()


def test_a_replaced_word_hands_its_map_on_and_the_rest_stays() -> None:
    alignment = align(prompt(SOURCE), prompt("a red heart on a blue sky background"))
    assert taken(alignment, "heart") == {"star": 1} and taken(alignment, "blue") == {"blue": 1}
    # Nothing is lost and nothing is made: a mapped map still adds up to 1.
    assert torch.equal(alignment.mapper.sum(1), torch.ones(77)) and (alignment.alphas == 1).all()
    assert alignment.describe() == "replaced: star → heart"


def test_a_map_is_spread_evenly_over_a_word_of_more_tokens() -> None:
    alignment = align(by_hand("a cat on grass"), by_hand("a capybara on grass", {"capybara": 4}))
    assert alignment.mapper[2, 2:6].tolist() == [0.25] * 4
    assert alignment.mapper[3, 6] == 1 and alignment.mapper[4, 7] == 1
    back = align(by_hand("a capybara on grass", {"capybara": 4}), by_hand("a cat on grass"))
    assert back.mapper[2:6, 2].tolist() == [1] * 4  # several maps come together in one
    same = align(by_hand("a capybara sat", {"capybara": 2}), by_hand("a quokka sat", {"quokka": 2}))
    assert torch.equal(same.mapper[2:4, 2:4], torch.eye(2))


def test_an_inserted_word_keeps_its_own_map() -> None:
    alignment = align(by_hand("a cat on grass"), by_hand("a fluffy cat on green grass"))
    assert taken(alignment, "fluffy") == {} and taken(alignment, "green") == {}
    assert all(taken(alignment, word) == {word: 1} for word in ("cat", "on", "grass"))
    assert (alignment.alphas == 0).sum() == 2
    assert alignment.describe() == "only in the target: fluffy, green"


def test_a_removed_word_leaves_the_others_in_place() -> None:
    alignment = align(by_hand("a fluffy cat on grass"), by_hand("a cat on grass"))
    assert all(taken(alignment, word) == {word: 1} for word in ("a", "cat", "on", "grass"))
    assert alignment.mapper[2].sum() == 0 and "only in the source: fluffy" in alignment.describe()


def test_where_a_noun_gets_an_adjective_the_noun_takes_the_place() -> None:
    alignment = align(by_hand("photo of a cat on grass"), by_hand("photo of a sks dog on grass"))
    assert taken(alignment, "dog") == {"cat": 1} and taken(alignment, "sks") == {}


def test_a_word_does_not_take_the_place_of_a_comma() -> None:
    alignment = align(by_hand("a cat , on grass"), by_hand("a dog on grass"))
    assert taken(alignment, "dog") == {"cat": 1}


def test_named_subjects_override_the_alignment() -> None:
    source, target = by_hand("photo of a cat on grass"), by_hand("photo of a sks dog on grass")
    alignment = align(source, target, [("cat", "sks dog")])
    assert alignment.mapper[4, 4:6].tolist() == [0.5, 0.5]
    crossed = align(by_hand("a cat and a dog"), by_hand("a wolf and a lynx"), [("cat", "lynx"), ("dog", "wolf")])
    assert taken(crossed, "lynx") == {"cat": 1} and taken(crossed, "wolf") == {"dog": 1}
    assert taken(crossed, "and") == {"and": 1}


def test_a_subject_that_stands_twice_corresponds_in_order() -> None:
    source, target = by_hand("a cat beside a cat"), by_hand("a dog beside a dog")
    alignment = align(source, target, [("cat", "dog")])
    assert alignment.mapper[2, 2] == 1 and alignment.mapper[5, 5] == 1 and alignment.mapper[2, 5] == 0
    one = align(source, by_hand("a dog beside water"), [("cat", "dog")])
    assert one.mapper[:, 2].nonzero().flatten().tolist() == [2, 5]


def test_start_end_and_padding_align_to_themselves() -> None:
    alignment = align(by_hand("a cat"), by_hand("a big fat cat"))
    assert alignment.mapper[0, 0] == 1 and alignment.mapper[3, 5] == 1  # start; end, which moved
    assert torch.equal(alignment.mapper[6:, 6:], torch.eye(14))
    shorter = align(by_hand("a big fat cat"), by_hand("a cat"))
    assert shorter.mapper[5, 3] == 1
    # In the source these positions hold words and the end: there is no padding to take a map from.
    assert shorter.alphas[4:6].tolist() == [0, 0]


def test_weights_apply_to_every_token_of_the_word() -> None:
    source = by_hand("a capybara on grass", {"capybara": 3})
    alignment = align(source, source, weights={"capybara": 2.5, "grass": -1})
    assert alignment.weights[2:5].tolist() == [2.5] * 3 and alignment.weights[6] == -1 and alignment.reweights
    assert (alignment.weights != 1).sum() == 4
    with pytest.raises(ValueError, match="weight of 'grass' is nan"):
        align(source, source, weights={"grass": float("nan")})


def test_by_tokens_a_replaced_word_keeps_its_own_map_as_published() -> None:
    source, target = prompt(SOURCE), prompt("a red striped heart on a blue sky background")
    alignment = align(source, target, [("star", "heart")], by="tokens")
    assert taken(alignment, "heart") == {} and taken(alignment, "striped") == {}
    assert taken(alignment, "background") == {"background": 1}
    # The published mapper: the token's own position in the padding.
    assert torch.equal(alignment.mapper[12:, 12:], torch.eye(65)) and (alignment.alphas[10:] == 1).all()


@pytest.mark.parametrize(
    ("source", "target", "mapper"),
    [
        # Recorded from get_refinement_mapper of the published code; -1 where a token keeps its own map.
        ([90, 4, 4, 1, 3, 5, 4, 4, 91], [90, 3, 4, 3, 5, 2, 5, 2, 91], [0, -1, 1, 4, 5, -1, -1, -1, 8, 9, 10, 11]),
        ([90, 2, 1, 5, 91], [90, 3, 5, 5, 2, 3, 1, 1, 91], [0, -1, -1, -1, 1, -1, 2, -1, 4, 9, 10, 11]),
        ([90, 3, 4, 5, 1, 3, 4, 3, 91], [90, 2, 5, 4, 4, 5, 91], [0, -1, 3, 6, -1, -1, 8, 7, 8, 9, 10, 11]),
    ],
)
def test_by_tokens_agrees_with_the_published_mapper(source: list[int], target: list[int], mapper: list[int]) -> None:
    def tokens(ids: list[int]) -> TokenisedPrompt:
        return TokenisedPrompt(tuple(ids + [91] * (12 - len(ids))), (Word("w", tuple(range(1, len(ids) - 1))),), 12)

    alignment = align(tokens(source), tokens(target), by="tokens")
    columns = zip(alignment.mapper.T, alignment.alphas, strict=True)
    assert [int(column.argmax()) if alpha else -1 for column, alpha in columns] == mapper
    assert set(alignment.mapper.sum(0).tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("by", ["words", "tokens"])
def test_prompts_that_share_nothing_are_refused(by: str) -> None:
    with pytest.raises(ValueError, match=r"share no word.*'a', 'cat'.*'two', 'dogs'.*name the subject's word"):
        align(by_hand("a cat"), by_hand("two dogs"), by=by)
    assert taken(align(by_hand("cat"), by_hand("dog"), [("cat", "dog")]), "dog") == {"cat": 1}


def test_a_word_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(ValueError, match="subject word 'hat' is not in the target's prompt, which has 'a', 'dog'"):
        align(by_hand("a cat"), by_hand("a dog"), [("cat", "hat")])
    with pytest.raises(ValueError, match="alignment is 'letters'; choose one of words, tokens"):
        align(by_hand("a cat"), by_hand("a dog"), by="letters")


# ComfyUI ----------------------------------------------------------------------------------------------------------

PIECES = {1: "a</w>", 2: "cat</w>", 3: "capy", 4: "bara</w>", 5: ",</w>", 98: "<start>", 99: "<end>"}


def chunk(entries: list[tuple]) -> list[tuple]:
    return [(98, 1.0, 0), *entries, *[(99, 1.0, 0)] * (76 - len(entries))]


def test_comfyui_gives_one_id_to_a_run_of_words_which_their_pieces_divide() -> None:
    run = [(token, 1.0, 1) for token in (1, 3, 4, 5, 1, 2)]
    made = from_comfy({"l": [chunk(run)]}, PIECES.__getitem__)
    assert [word.text for word in made.words] == ["a", "capybara", ",", "a", "cat"]
    assert made.words[1].positions == (2, 3) and len(made.ids) == 77


def test_an_embedding_of_several_vectors_is_one_word_by_its_name() -> None:
    vectors = [(torch.randn(768), 1.0, 2) for _ in range(3)]
    entries = [(1, 1.0, 1), *vectors, (1, 1.0, 3), (2, 1.1, 3)]
    made = from_comfy({"l": [chunk(entries)]}, PIECES.__getitem__, "a embedding:my-cat a (cat)")
    assert [(word.text, word.positions) for word in made.words] == [
        ("a", (1,)),
        ("embedding:my-cat", (2, 3, 4)),
        ("a", (5,)),
        ("cat", (6,)),
    ]
    source = from_comfy({"l": [chunk([(1, 1.0, 1), (2, 1.0, 1), (1, 1.0, 1), (2, 1.0, 1)])]}, PIECES.__getitem__)
    alignment = align(source, made, [("cat a", "my-cat")])
    assert alignment.mapper[2:4, 2:5].sum(1).tolist() == pytest.approx([1, 1])
    with pytest.raises(ValueError, match="'dog' is not in the target's prompt, which has 'a', 'embedding:my-cat'"):
        align(source, made, [("cat", "dog")])


def test_a_prompt_of_several_chunks_keeps_its_positions() -> None:
    first, second = [(1, 1.0, 1)] * 74 + [(3, 1.0, 1)], [(4, 1.0, 1), (2, 1.0, 1)]
    made = from_comfy({"g": [chunk(first), chunk(second)]}, PIECES.__getitem__)
    assert len(made.ids) == 154
    # A word that the end of a chunk cuts in two stays one.
    assert made.words[74] == Word("capybara", (75, 78)) and made.words[75] == Word("cat", (79,))
    alignment = align(made, made)
    assert alignment.identical
    short = from_comfy({"g": [chunk([(1, 1.0, 1), (2, 1.0, 1)])]}, PIECES.__getitem__)
    longer = align(short, made)
    assert longer.mapper.shape == (77, 154) and longer.mapper[0, 0] == 1 and longer.alphas[77] == 0


def test_chunks_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"chunks of .*77.* tokens"):
        from_comfy({"t5": [chunk([]), [(98, 1.0, 0)] * 5]}, PIECES.__getitem__)


@pytest.mark.needs_comfy
def test_comfyuis_own_token_list_has_the_words_of_transformers() -> None:
    from blendswap.hosts.comfy.small_sd import load_demo_text_model

    clip = load_demo_text_model(TEXT)[1]
    vocabulary = clip.tokenizer.clip_l.inv_vocab
    made = from_comfy(clip.tokenize(SOURCE, return_word_ids=True), vocabulary.__getitem__, SOURCE)
    assert made.words == prompt(SOURCE).words and len(made.ids) == 77
    assert align(made, made).identical
