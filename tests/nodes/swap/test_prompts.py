"""SwapPrompts: the conditioning it gives, the words it aligns, what it refuses; and SwapSettings and SwapLayers."""

from __future__ import annotations

import pytest
import torch

from ..conftest import SOURCE, TARGET

pytestmark = pytest.mark.needs_comfy


def test_the_conditioning_is_that_of_the_stock_node(kit):
    from nodes import CLIPTextEncode

    source, target, *_ = kit.prompts("a (red:1.3) star", "a green heart")
    with torch.inference_mode():
        stock = CLIPTextEncode().encode(kit.clip, "a (red:1.3) star")[0]
    assert torch.equal(source[0][0], stock[0][0]) and not torch.equal(source[0][0], target[0][0])


def test_words_are_aligned_whole_and_said(kit):
    *_, pair, words = kit.prompts(SOURCE, "a green dotted heart on a blue sky background")
    assert "star" in words and "heart" in words and "background" not in words
    alignment = pair.align()
    assert alignment.target_positions("heart") == (4,) and pair.subjects == ()
    assert pair.found_subjects() == (("red star", "green dotted heart"),)


def test_named_subjects_correspond_whatever_stands_around_them(kit):
    *_, pair, words = kit.prompts(SOURCE, TARGET, source_subject=" star ", target_subject="heart")
    assert pair.found_subjects() == (("star", "heart"),) and "star → heart" in words


def test_equal_prompts_need_no_subject(kit):
    *_, pair, words = kit.prompts(SOURCE, SOURCE)
    assert pair.align().identical and pair.found_subjects() == () and "same words" in words


def test_a_concepts_clip_encodes_the_target(kit):
    other = kit.clip.clone()
    other.add_patches(
        {
            key: (torch.full_like(weight, 0.1),)
            for key, weight in other.patcher.model.state_dict().items()
            if key.endswith("token_embedding.weight")
        }
    )
    plain, concept = kit.prompts(), kit.prompts(target_clip=other)
    assert torch.equal(plain[0][0][0], concept[0][0][0]) and not torch.equal(plain[1][0][0], concept[1][0][0])


def test_word_weights_are_read_with_commas_lines_and_words_in_a_row(kit):
    *_, pair, _ = kit.prompts(word_weights="heart:1.5, blue sky: 0.5\nbackground:2")
    weights = pair.align().weights
    positions = [pair.align().target_positions(word)[0] for word in ("heart", "blue", "sky", "background", "green")]
    assert weights[positions].tolist() == [1.5, 0.5, 0.5, 2.0, 1.0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"word_weights": "heart=2"}, "word_weights: 'heart=2' is no word with a weight.*star:1.5"),
        ({"word_weights": "heart:loud"}, "word_weights: 'heart:loud'"),
        ({"word_weights": ":2"}, "word_weights: ':2'"),
        ({"word_weights": "heart:1, heart:2"}, "'heart' has two weights"),
        ({"word_weights": "moon:2"}, "'moon' is not in the target's prompt"),
        ({"source_subject": "moon", "target_subject": "heart"}, "'moon' is not in the source's prompt"),
        ({"source_subject": "star"}, "target_subject is empty, but source_subject is 'star'"),
        ({"target_prompt": "ring"}, "the prompts share no word"),
        ({"clip": None}, "clip is empty"),
    ],
)
def test_bad_input_is_named_with_its_cure(kit, more, message):
    from blendswap.nodes.swap.prompts import SwapPrompts

    inputs = {"clip": kit.clip, "source_prompt": SOURCE, "target_prompt": TARGET, **more}
    with pytest.raises(ValueError, match=message):
        kit.run(SwapPrompts, **inputs)


def test_a_clip_of_another_kind_of_model_is_refused(kit):
    class T5:
        class tokenizer:
            pass

        @staticmethod
        def tokenize(text, **_):
            return {"t5xxl": [[(1, 1.0, 1)]]}

    with pytest.raises(ValueError, match=r"encoders t5xxl.*SD 1.x, SD 2.x or SDXL"):
        kit.prompts(target_clip=T5())


def test_sdxl_and_sd2_prompts_are_aligned_by_their_own_tokenizers(comfy):
    from comfy.sdxl_clip import SDXLTokenizer
    from comfy.text_encoders.sd2_clip import SD2Tokenizer

    from blendswap.nodes.swap.prompts import encoded

    class Clip:
        """A CLIP whose text encoder is left out."""

        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

        def tokenize(self, text, return_word_ids):
            return self.tokenizer.tokenize_with_weights(text, return_word_ids)

        def encode_from_tokens_scheduled(self, tokens):
            assert all(len(entry) == 2 for chunks in tokens.values() for chunk in chunks for entry in chunk)

    for tokenizer in (SDXLTokenizer(), SD2Tokenizer()):
        words = encoded(Clip(tokenizer), "a photo of an extraordinarycat, sitting")[1].words
        assert [word.text for word in words] == ["a", "photo", "of", "an", "extraordinarycat", ",", "sitting"]
        assert len(words[4].positions) > 1


OTHER_SCRIPTS = [
    ("a red star on a café background", "café", ["a", "red", "star", "on", "a", "café", "background"]),
    ("A Red CAFÉ, naïve", "café", ["A", "Red", "CAFÉ", ",", "naïve"]),
    ("a cafe\u0301 at night", "caf\u00e9", ["a", "cafe\u0301", "at", "night"]),
    ("a caf\u00e9 at night", "cafe\u0301", ["a", "caf\u00e9", "at", "night"]),
    ("красная Звезда на небе", "звезда", ["красная", "Звезда", "на", "небе"]),
    ("ένας ΟΔΟΣ εδώ", "οδος", ["ένας", "ΟΔΟΣ", "εδώ"]),
    ("İstanbul at night", "İstanbul", ["İstanbul", "at", "night"]),
    ("नमस्ते दुनिया", "नमस्ते", ["नमस्ते", "दुनिया"]),
    ("سلام می\u200cخواهم", "می\u200cخواهم", ["سلام", "می\u200cخواهم"]),
    ("고양이가 있다", "고양이가", ["고양이가", "있다"]),
    ("一只红色的猫", "猫", ["一", "只", "红", "色", "的", "猫"]),
    ("a (猫:1.3) 在草地", "草地", ["a", "猫", "在", "草", "地"]),
    ("ねこが好き", "ねこ", ["ね", "こ", "が", "好", "き"]),
    ("a 🐶, sitting 👩\u200d🚀❤️", "🐶", ["a", "🐶", ",", "sitting", "👩\u200d🚀", "❤️"]),
    ("a 1️⃣ sign", "1️⃣", ["a", "1️⃣", "sign"]),
    ("ＡＢＣ logo", "abc", ["ＡＢＣ", "logo"]),
]


@pytest.mark.parametrize(("prompt", "subject", "shown"), OTHER_SCRIPTS)
def test_words_of_every_script_are_found_and_shown_as_typed(kit, prompt, subject, shown):
    from blendswap.attention_swap.pictures.word_maps import chosen_words

    *_, pair, _ = kit.prompts(
        prompt, prompt, source_subject=subject, target_subject=subject, word_weights=f"{subject}:1.5"
    )
    assert [word.text for word in pair.source.words] == shown
    alignment = pair.align()
    positions = alignment.source_positions(subject)
    assert (
        positions
        and (alignment.weights[list(positions)] == 1.5).all()
        and (alignment.weights != 1).sum() == len(positions)
    )
    assert chosen_words(pair.source, [subject])[0].positions == positions
    covered = sorted(position for word in pair.source.words for position in word.positions)
    assert covered == list(range(1, len(covered) + 1))  # every token of the prompt belongs to one word
    with pytest.raises(ValueError, match=f"which has {shown[0]!r}, "):
        alignment.source_positions("absent")


def test_a_thai_word_is_found_where_a_token_holds_parts_of_two_characters(kit):
    *_, pair, _ = kit.prompts("แมวสีแดงบนหญ้า", "แมวสีแดงบนหญ้า", source_subject="แมว", target_subject="แมว")
    positions = pair.align().source_positions("แมว")
    assert (
        positions[0] == 1
        and len(positions) < len([token for token in pair.source.ids if token != pair.source.ids[-1]]) / 2
    )


def test_a_replaced_chinese_word_is_said_without_spaces(kit):
    *_, pair, words = kit.prompts("一只红色的小猫在草地上", "一只红色的大狗在草地上")
    assert words == "replaced: 小 → 大, 猫 → 狗" and pair.found_subjects() == (("小猫", "大狗"),)
    alignment = pair.align("words", pair.found_subjects())
    assert alignment.target_positions("大狗") == tuple(p for w in pair.target.words[5:7] for p in w.positions)


def test_lists_of_words_take_the_commas_and_colons_of_other_scripts(kit):
    *_, pair, _ = kit.prompts("猫和狗", "猫和狗", word_weights="猫：1.5，狗：0.5")
    assert sorted(set(pair.align().weights.tolist())) == [0.5, 1.0, 1.5]
    with pytest.raises(ValueError, match="'Heart' has two weights"):
        kit.prompts(word_weights="heart:1, Heart:2")


def test_an_unknown_word_is_named_as_it_was_typed(kit, caplog):
    kit.prompts("a café background", "a café background")
    assert "never shown the words: café." in caplog.text


@pytest.fixture
def embeddings(comfy):
    """Embeddings in ComfyUI's folder: one that fits the demo's CLIP, one of another model."""
    from safetensors.torch import save_file

    folder = comfy / "models" / "embeddings"
    folder.mkdir(exist_ok=True)
    save_file({"emb_params": torch.ones(2, 96)}, folder / "good.safetensors")
    save_file({"emb_params": torch.ones(3, 768)}, folder / "wide.safetensors")


@pytest.mark.parametrize(
    "prompt",
    [
        "a embedding:missing embedding:good on a star",
        "a embedding:good on a (embedding:missing:1.2) star",
        "a embedding:wide embedding:good on a star",
        "a embedding:good, embedding:missing on a star",
    ],
)
def test_an_embedding_that_is_left_out_does_not_rename_the_others_and_is_named(kit, embeddings, prompt):
    from nodes import CLIPTextEncode

    source, _, pair, words = kit.prompts(prompt, "a heart on a star", source_subject="good", target_subject="heart")
    good = next(word for word in pair.source.words if word.text == "embedding:good")
    assert [pair.source.ids[position] for position in good.positions] == ["embedding:good.0", "embedding:good.1"]
    assert [word.text for word in pair.source.words if word.text != ","] == ["a", "embedding:good", "on", "a", "star"]
    lost = "embedding:wide was made for another kind" if "wide" in prompt else "embedding:missing is not in ComfyUI's"
    assert lost in words and words.count("left out") == 1
    with torch.inference_mode():
        stock = CLIPTextEncode().encode(kit.clip, prompt)[0][0][0]
        alone = CLIPTextEncode().encode(kit.clip, prompt.replace("embedding:wide ", ""))[0][0][0]
    assert torch.equal(source[0][0], stock)
    if "wide" in prompt:  # the words stand where the encoder has them
        assert torch.allclose(stock[:, :8], alone[:, :8])


def test_a_word_that_a_clip_was_taught_is_named_by_itself_beside_an_embedding(kit, embeddings):
    from blendswap.hosts.comfy.learner.text import with_token

    knowing = with_token(kit.clip, "sks", {"clip_l": torch.ones(3, 96)})
    *_, pair, words = kit.prompts(
        "a red heart",
        "a Sks on a embedding:missing embedding:good sky",
        target_clip=knowing,
        source_subject="heart",
        target_subject="sks",
    )
    assert [word.text for word in pair.target.words] == ["a", "Sks", "on", "a", "embedding:good", "sky"]
    assert len(pair.align().target_positions("sks")) == 3 and "heart → Sks" in words


def test_no_word_of_a_long_prompt_is_lost(kit):
    """ComfyUI encodes it in pieces of 75 tokens."""
    long = "a red star on a blue sky background, " * 12 + "a green heart"
    source, _, pair, words = kit.prompts(long, long)
    assert source[0][0].shape[1] == len(pair.source.ids) == 154 and pair.source.words[-1].text == "heart"
    assert pair.align().source_positions("heart")[0] > 77 and "same words" in words


def test_prompts_are_read_by_the_page_as_clip_text_encode_is(comfy):
    """The page replaces {a|b} and takes comments out where an input says dynamicPrompts."""
    import asyncio

    from nodes import CLIPTextEncode

    from blendswap.nodes import BlendSwapExtension

    assert CLIPTextEncode.INPUT_TYPES()["required"]["text"][1]["dynamicPrompts"]
    dynamic = set()
    for node in asyncio.run(BlendSwapExtension().get_node_list()):
        for group in node.INPUT_TYPES().values():
            dynamic |= {
                (node.define_schema().node_id, name)
                for name, (_, *options) in (
                    (name, spec) for name, spec in group.items() if isinstance(spec, tuple) and len(spec) > 1
                )
                if options[0].get("dynamicPrompts")
            }
    assert dynamic == {
        ("CLIPBlendSampler", "prompt"),
        ("CLIPBlendSampler", "negative_prompt"),
        ("CLIPBlendGuider", "prompt"),
        ("CLIPBlendGuider", "negative_prompt"),
        ("BlendRegion", "prompt"),
        ("BlendRegion", "negative_prompt"),
        ("RankCandidates", "prompt"),
        ("RankCandidates", "contrasts"),
        ("EditReport", "prompt"),
        ("SwapPrompts", "source_prompt"),
        ("SwapPrompts", "target_prompt"),
        ("WordMaps", "prompt"),
        ("AttentionSwapSweep", "prompt"),
        ("ConceptScore", "prompt"),
        ("ConceptScore", "class_prompt"),
    }


# Settings -------------------------------------------------------------------------------------------------------------


def test_the_dials_are_the_papers_in_every_unit(kit):
    from blendswap.attention_swap.settings import PRESETS, Steps

    paper = PRESETS["photoswap"]
    assert kit.settings("custom") == paper
    fractions = kit.settings("custom", unit="fraction", self_map=0.5, cross_map=0.4, self_output=0.2)
    assert fractions == paper
    steps = kit.settings("custom", unit="steps")
    assert (steps.self_map, steps.cross_map, steps.self_output) == (Steps(25), Steps(20), Steps(10))


@pytest.mark.parametrize("preset", ["photoswap", "official", "p2p", "pnp", "masactrl"])
def test_a_preset_replaces_the_dials_and_says_what_it_sets(kit, preset):
    from blendswap.attention_swap.settings import PRESETS
    from blendswap.nodes.swap.settings import SwapSettings

    settings, summary = kit.run(SwapSettings, preset=preset, self_map=50.0)
    assert settings == PRESETS[preset] and f"preset {preset}" in summary and "%" in summary


def test_layers_narrow_a_swap_down_with_a_preset_too(kit):
    from blendswap.attention_swap.settings import Where
    from blendswap.nodes.swap.settings import SwapLayers, SwapSettings

    layers = kit.run(SwapLayers, halves="cond", down=False, mid=False, first=1, last=5, max_tokens=1024)[0]
    assert layers == Where(("cond",), ("up",), 1, 5, 0.0, 0, 1024)
    settings, summary = kit.run(SwapSettings, preset="photoswap", map_layers=layers)
    assert settings.map_where == layers and settings.output_where == Where()
    assert "cond half, up, layers 1 to 5, 0 to 1024 tokens" in summary


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"self_map": 60.0}, "self_map is 60; with unit 'of 50 steps' it must be 0 to 50"),
        ({"unit": "fraction"}, "self_map is 25; with unit 'fraction' it must be 0 to 1"),
        ({"unit": "steps", "cross_map": 2.5}, "must be whole"),
        ({"counting": "published", "self_map": 45.0}, "add up to more than 1"),
    ],
)
def test_a_lambda_out_of_range_is_named(kit, more, message):
    with pytest.raises(ValueError, match=message):
        kit.settings("custom", **more)


def test_layers_that_leave_none_are_refused(kit):
    from blendswap.nodes.swap.settings import SwapLayers

    with pytest.raises(ValueError, match="down, mid and up are all off"):
        kit.run(SwapLayers, down=False, mid=False, up=False)
    with pytest.raises(ValueError, match="layer range 5 to 2 is empty"):
        kit.run(SwapLayers, first=5, last=2)
