"""DemoScene and DemoModelLoader: what they draw, what they load, what they say when something is missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from blendswap.demo import files, world

pytestmark = pytest.mark.needs_comfy


def scene(**inputs):
    from blendswap.nodes.demo import DemoScene

    image, edit, outline, caption = DemoScene.execute(**inputs).args
    return image, edit, outline, caption


def test_a_scene_is_a_picture_its_masks_and_its_caption():
    image, edit, outline, caption = scene(seed=4)
    expected = next(world.scenes(2_000_004, 1))
    assert torch.equal((image[0] * 255).round().to(torch.uint8), torch.from_numpy(world.draw(expected)))
    assert image.shape == (1, 64, 64, 3) and edit.shape == outline.shape == (1, 64, 64)
    assert image.dtype == edit.dtype == outline.dtype == torch.float32
    assert caption == expected.caption()


def test_the_edit_mask_holds_the_object_with_room_around_it():
    _, edit, outline, _ = scene(seed=1, margin=4.0)
    assert set(edit.unique().tolist()) == {0.0, 1.0}
    assert (outline <= edit).all()
    assert scene(seed=1, margin=0.0)[1].sum() < edit.sum()


def test_a_seed_draws_the_same_scene_and_another_seed_another():
    assert torch.equal(scene(seed=9)[0], scene(seed=9)[0])
    assert not torch.equal(scene(seed=9)[0], scene(seed=10)[0])


def test_either_of_two_objects_can_be_masked():
    first, second = scene(seed=2, objects=2, object=1), scene(seed=2, objects=2, object=2)
    assert torch.equal(first[0], second[0]) and " and " in first[3]
    assert (first[2] * second[2]).sum() == 0


def test_an_object_that_is_not_in_the_picture_is_an_error():
    with pytest.raises(ValueError, match="object is 2"):
        scene(seed=0, objects=1, object=2)


def test_the_loader_gives_model_clip_and_vae_that_belong_together(caplog):
    from blendswap.nodes.demo import DemoModelLoader

    model, clip, vae = DemoModelLoader.execute().args
    caplog.clear()
    with torch.inference_mode():
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(scene(seed=0)[3]))
    assert conditioning[0][0].shape == (1, 77, 96)
    assert not caplog.records, "a caption of the demo world holds a word that the demo model does not know"
    assert model.get_model_object("latent_format").latent_channels == vae.latent_channels


def test_the_demo_autoencoder_gives_a_picture_back():
    from blendswap.nodes.demo import DemoModelLoader

    vae = DemoModelLoader.execute().args[2]
    image = scene(seed=0)[0]
    with torch.inference_mode():
        error = (vae.decode(vae.encode(image)) - image).square().mean()
    assert -10 * error.log10() > 28


def test_new_weights_are_loaded_again(tmp_path: Path, monkeypatch):
    from blendswap.nodes import demo

    monkeypatch.setattr(files, "TEXT", tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"")
    before = demo.DemoModelLoader.fingerprint_inputs()
    assert before == demo.DemoModelLoader.fingerprint_inputs()
    os.utime(weights, (1, 1))
    assert demo.DemoModelLoader.fingerprint_inputs() != before


def test_without_the_model_the_error_says_what_to_do(tmp_path: Path, monkeypatch):
    from blendswap.nodes import demo

    monkeypatch.setattr(files, "TEXT", tmp_path / "text")
    with pytest.raises(FileNotFoundError, match="train text"):
        demo.DemoModelLoader.execute()


def test_every_schema_is_accepted_by_comfyui():
    from blendswap.nodes.demo import DemoModelLoader, DemoScene

    for node in (DemoModelLoader, DemoScene):
        node.GET_SCHEMA().validate()
        node.GET_NODE_INFO_V1()


def test_the_prior_loader_offers_the_demo_prior():
    from blendswap.nodes.blend import guided_diffusion
    from blendswap.nodes.shared import folders

    folders.register()
    assert guided_diffusion.checkpoint_names()[0] == "demo"
    model, vae, _ = guided_diffusion.GuidedDiffusionLoader.execute("demo").args
    assert model.model.image_size == 64 and vae.latent_channels == 3


def test_without_the_demo_prior_the_prior_loader_offers_what_is_in_its_folder(tmp_path: Path, monkeypatch):
    from blendswap.nodes.blend import guided_diffusion
    from blendswap.nodes.shared import folders

    folders.register()
    monkeypatch.setattr(files, "PRIOR", tmp_path)
    assert guided_diffusion.checkpoint_names() == folders.model_names("guided_diffusion")
