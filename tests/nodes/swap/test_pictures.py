"""AttentionSVD and WordMaps in ComfyUI on the demo model: sizes, ranges, sources, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from ..conftest import SOURCE, checksum

pytestmark = pytest.mark.needs_comfy

STEPS = 2
WORDS = ["a", "red", "star", "on", "blue", "sky", "background"]


def latent(height: int = 16, width: int = 16, batch: int = 1) -> dict:
    return {"samples": torch.zeros(batch, 8, height, width)}


@pytest.fixture
def svd(kit):
    """colours, components, by_step, report"""
    from blendswap.nodes.swap.pictures import AttentionSVD

    def run(**more) -> tuple:
        defaults = dict(
            model=kit.model,
            positive=kit.prompts()[0],
            negative=kit.prompts("", "")[0],
            components=4,
            steps=STEPS,
            cfg=4.0,
            latent=latent(),
        )
        return kit.run(AttentionSVD, **{**defaults, **more})

    return run


@pytest.fixture
def words(kit):
    """pictures, masks, names, report"""
    from blendswap.nodes.swap.pictures import WordMaps

    def run(**more) -> tuple:
        defaults = dict(
            model=kit.model,
            positive=kit.prompts()[0],
            negative=kit.prompts("", "")[0],
            steps=STEPS,
            cfg=4.0,
            latent=latent(),
            tokens=kit.prompts()[2],
        )
        return kit.run(WordMaps, **{**defaults, **more})

    return run


def is_image(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 4 and tensor.shape[-1] == 3 and 0 <= tensor.min() and tensor.max() <= 1


@pytest.mark.parametrize(("with_vae", "scale"), [(True, 4), (False, 8)])
def test_components_come_in_colour_in_grey_and_by_step(kit, svd, with_vae, scale):
    colours, grey, by_step, report = svd(latent=latent(8, 16, batch=2), vae=kit.vae if with_vae else None)
    size = (8 * scale, 16 * scale, 3)
    assert colours.shape == (2, *size) and grey.shape == (8, *size) and by_step.shape == (2 * STEPS, *size)
    assert all(is_image(made) for made in (colours, grey, by_step))
    torch.testing.assert_close(grey[4, ..., 0], colours[1, ..., 0])
    assert (grey[:4] - grey[4:]).abs().max() > 0.1
    assert "on 16×8 cells, mean of" in report and f"and {STEPS} steps" in report
    assert "picture 2: singular values" in report


def test_fewer_components_than_colours_are_drawn_as_asked_for(svd):
    colours, grey, _, report = svd(components=1, cfg=1.0, negative=None, grid=8)
    assert len(grey) == 1 and colours.shape[-1] == 3 and "on 8×8 cells" in report


@pytest.mark.parametrize("with_vae", [True, False])
def test_each_word_has_a_mask_at_the_pictures_size_and_a_picture_with_its_name(kit, words, with_vae):
    pictures, masks, names, report = words(latent=latent(8, 16, batch=2), vae=kit.vae if with_vae else None)
    assert names.splitlines() == WORDS * 2
    assert masks.shape == (14, *((32, 64) if with_vae else (64, 128)))
    assert is_image(pictures) and len(pictures) == 14 and pictures.shape[2] == masks.shape[2]
    assert pictures.shape[1] > masks.shape[1]
    assert masks.min() >= 0 and torch.allclose(masks.amax((1, 2)), torch.ones(14))
    assert "(16×8)" in report and "star: at most" in report


def test_words_can_be_chosen_and_a_threshold_gives_black_and_white(words):
    _, soft, names, _ = words(words="star, blue sky")
    assert names.splitlines() == ["star", "blue sky"]
    _, hard, _, _ = words(words="star\nblue sky", threshold=0.5)
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    assert (hard[soft > 0.65] == 1).all()


def test_words_of_other_scripts_have_maps_and_what_stands_for_a_letter_that_no_font_has_is_explained(kit, words):
    from blendswap.images.lettering import legend

    source, _, pair, _ = kit.prompts("a 红猫 on a звезда café", "a 红猫 on a звезда café")
    pictures, masks, names, report = words(positive=source, tokens=pair, words="猫，звезда、café", latent=latent())
    assert names.splitlines() == ["猫", "звезда", "café"] and len(pictures) == len(masks) == 3
    assert legend(["猫"]) in report and "звезда: at most" in report
    assert not torch.equal(*(one[masks.shape[1] :] for one in pictures[:2]))  # the strips with the words


def test_masks_are_those_of_the_other_host(kit, words):
    from blendswap.attention_swap.pictures.draw import word_masks
    from blendswap.attention_swap.pictures.watch import watch
    from blendswap.attention_swap.pictures.word_maps import WordMaps, chosen_words, word_layers
    from blendswap.demo.files import TEXT
    from blendswap.hosts.diffusers.text import DiffusersTextHost
    from blendswap.nodes.swap.capture import made_up

    with torch.inference_mode():
        noise, sigmas = made_up(kit.model, latent(), 0, STEPS, "ddim_uniform", 4.0, [])
    known = kit.prompts()[2].source
    maps, _ = watch(
        DiffusersTextHost.from_pipeline(TEXT, SOURCE, "", 4.0),
        (noise.clone(), sigmas),
        lambda layout, steps: WordMaps(word_layers(layout), chosen_words(known), len(known.ids), range(steps)),
    )
    torch.testing.assert_close(words()[1], word_masks(maps.maps(), (128, 128)), rtol=0, atol=2e-3)


def test_clip_and_prompt_serve_as_tokens_do_and_another_prompt_is_noted(kit, words):
    by_tokens = words()
    by_clip = words(tokens=None, clip=kit.clip, prompt=SOURCE)
    assert torch.equal(by_tokens[1], by_clip[1]) and by_tokens[2:] == by_clip[2:] and "note" not in by_clip[3]
    assert "note: positive is not what" in words(tokens=None, clip=kit.clip, prompt="a blue heart")[3]


def test_layers_and_steps_can_be_chosen(words):
    whole = words()[3]
    assert f"steps 1 to {STEPS}" in whole and "(16×16)" in whole and "(8×8)" not in whole
    coarse = words(max_size=8, start=0.5)[3]
    assert f"steps {STEPS} to {STEPS}" in coarse and "(8×8)" in coarse and "(16×16)" not in coarse


def test_of_an_inversion_the_source_is_the_inverted_picture(kit, svd, words):
    from blendswap.nodes.swap.invert import NullTextInvert

    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        clean = {"samples": kit.vae.encode(image)}
        inverted = kit.run(
            NullTextInvert,
            model=kit.model,
            vae=kit.vae,
            latent=clean,
            positive=kit.prompts()[0],
            negative=kit.prompts("", "")[0],
            method="direct",
            steps=3,
            cfg=2.0,
        )[0]
    _, _, by_step, report = svd(inversion=inverted, latent=None, vae=kit.vae)
    assert len(by_step) == 3 and "inversion by direct, 3 steps" in report
    pictures, masks, *_ = words(inversion=inverted, latent=None, vae=kit.vae, words="star", threshold=0.9)
    with torch.inference_mode():
        decoded = kit.vae.decode(clean["samples"])[0].mean(-1)
    cold = masks[0] == 0  # the picture shows there, darker and grey
    torch.testing.assert_close(pictures[0, :64, :, 0][cold], 0.8 * decoded[cold], rtol=0, atol=0.02)


def test_an_error_or_an_interrupt_on_the_way_leaves_the_model_as_it_was(kit, svd, words, monkeypatch):
    import comfy.model_management as management

    from blendswap.attention_swap.pictures.self_maps import MeanMap

    before, weights, first = kit.snapshot(kit.model), checksum(kit.model), svd()[0]

    def interrupt(*arguments):
        management.interrupt_current_processing(True)
        return 1

    def fail(*arguments):
        raise RuntimeError("on the way")

    for replaced, error in ((interrupt, management.InterruptProcessingException), (fail, RuntimeError)):
        with monkeypatch.context() as patch:
            patch.setattr(MeanMap, "add", replaced)
            patch.setattr(MeanMap, "components", lambda self, count: [])
            with pytest.raises(error):
                svd()
        assert kit.snapshot(kit.model) == before and checksum(kit.model) == weights
    assert torch.equal(svd()[0], first)
    words()
    assert kit.snapshot(kit.model) == before and checksum(kit.model) == weights


def flow(kit):
    import comfy.model_sampling

    patched = kit.model.clone()
    kinds = (comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST)
    patched.add_object_patch("model_sampling", type("Sampling", kinds, {})(kit.model.model.model_config))
    return patched


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda kit: dict(words="star, dog"), "'dog' is not in the prompt, which has 'a', 'red', 'star'"),
        (lambda kit: dict(tokens=None), "neither tokens nor clip is connected"),
        (lambda kit: dict(tokens=None, clip=kit.clip, prompt=" "), "prompt is empty"),
        (lambda kit: dict(tokens=None, clip=kit.clip, prompt="star " * 100), "positive has 77 tokens, the prompt 154"),
        (lambda kit: dict(start=0.5, end=0.5), "no step is left"),
        (lambda kit: dict(min_size=9, max_size=8), "min_size is 9, above max_size 8"),
        (lambda kit: dict(min_size=64), "at this size the MODEL has layers of 16×16, 8×8"),
        (lambda kit: dict(latent=None), "neither inversion nor latent"),
        (lambda kit: dict(negative=None), "negative is not connected"),
        (lambda kit: dict(model=flow(kit)), "flow model"),
    ],
)
def test_bad_input_is_an_error_that_names_it(kit, words, changes, message):
    with pytest.raises(ValueError, match=message):
        words(**changes(kit))


def test_flow_models_and_a_foreign_vae_are_refused_by_the_svd_too(kit, svd):
    from blendswap.hosts.comfy.adm import pixel_space_vae

    with pytest.raises(ValueError, match="flow model"):
        svd(model=flow(kit))
    with pytest.raises(ValueError, match="VAE that belongs to the MODEL"):
        svd(vae=pixel_space_vae())
    with pytest.raises(ValueError, match="components is 20; on a grid of 4×4"):
        svd(components=20, grid=4)
