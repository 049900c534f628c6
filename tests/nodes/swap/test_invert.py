"""NullTextInvert and the nodes around it in ComfyUI: stock samplers give what it says, files keep it, errors help."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch

from blendswap.demo import world

pytestmark = pytest.mark.needs_comfy

STEPS = 5


@pytest.fixture(scope="module")
def parts(comfy):
    """MODEL, VAE, picture, its LATENT, the caption's and the empty CONDITIONING, from inference mode as in ComfyUI."""
    from blendswap.nodes.demo import DemoModelLoader

    scene = next(world.scenes(2_900_000, 1))
    image = torch.from_numpy(world.draw(scene)).float()[None] / 255
    with torch.inference_mode():
        model, clip, vae = DemoModelLoader.execute().args
        prompts = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (scene.caption(), "")]
        return model, vae, image, {"samples": vae.encode(image)}, *prompts


@pytest.fixture(scope="module")
def invert(parts):
    """Runs the node as ComfyUI would; a run without changes of its model is made once."""
    from blendswap.nodes.swap.invert import NullTextInvert

    made = {}

    def run(method: str = "null_text", **changes):
        plain = all(type(value) in (str, int, float) for value in changes.values())
        key = (method, *sorted(changes.items())) if plain else None
        if key is None or key not in made:
            model, vae, image, latent, positive, negative = parts
            inputs = dict(
                model=model,
                vae=vae,
                latent=latent,
                positive=positive,
                negative=negative,
                image=image,
                method=method,
                steps=STEPS,
                inner_steps=2,
                lpips="demo",
            )
            with torch.inference_mode():
                output = NullTextInvert.execute(**{**inputs, **changes}).args
            if key is None:
                return output
            made[key] = output
        return made[key]

    return run


def stock(model, noise, positive, negative, *, steps=STEPS, cfg=7.5, sampler="euler", scheduler="ddim_uniform"):
    """What KSamplerAdvanced gives with add_noise disabled."""
    import comfy.sample

    with torch.inference_mode():
        latent = noise["samples"]
        return comfy.sample.sample(
            model,
            torch.zeros_like(latent),
            steps,
            cfg,
            sampler,
            scheduler,
            positive,
            negative,
            latent,
            disable_noise=True,
            disable_pbar=True,
            seed=0,
        )


def quality(report: str) -> float:
    return float(re.search(r"against the source: PSNR ([\d.]+)", report)[1])


@pytest.mark.parametrize("scheduler", ["ddim_uniform", "simple"])
@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_a_stock_sampler_gives_the_reconstruction(parts, invert, sampler, scheduler):
    model, vae, _, _, positive, _ = parts
    _, noise, null, reconstruction, _, _ = invert(scheduler=scheduler)
    made = stock(model, noise, positive, null, sampler=sampler, scheduler=scheduler)
    with torch.inference_mode():
        torch.testing.assert_close(vae.decode(made), reconstruction, rtol=0, atol=5e-3)


@pytest.mark.parametrize("method", ["ddim", "negative_prompt", "proximal"])
def test_so_it_does_with_methods_of_one_negative_for_all_steps(parts, invert, method):
    model, vae, _, _, positive, _ = parts
    _, noise, null, reconstruction, _, _ = invert(method)
    assert len(null) == 1
    made = stock(model, noise, positive, null)
    with torch.inference_mode():
        torch.testing.assert_close(vae.decode(made), reconstruction, rtol=0, atol=5e-3)


@pytest.mark.parametrize("scheduler", ["ddim_uniform", "simple"])
@pytest.mark.parametrize("steps", [10, 30, 50])
def test_each_step_of_a_stock_sampler_meets_its_own_entry_alone(parts, steps, scheduler):
    from blendswap.attention_swap.inversion.inversion import Inversion
    from blendswap.diffusion.sigmas import ddim_grid
    from blendswap.nodes.swap.invert import null_conditioning

    model, _, _, latent, positive, negative = parts
    sigmas = ddim_grid(model.get_model_object("model_sampling").sigmas, steps, scheduler)
    marks = torch.arange(1.0, len(sigmas))[:, None, None, None].expand(-1, 1, 77, 96)
    inversion = Inversion(sigmas, torch.zeros(len(sigmas), 1, 8, 16, 16), marks.contiguous(), "null_text", 7.5)
    seen = []

    def look(apply, given):
        rows = given["c"]["c_crossattn"]
        seen.extend(float(rows[i, 0, 0]) for i, kind in enumerate(given["cond_or_uncond"]) if kind == 1)
        return torch.zeros_like(given["input"])

    watched = model.clone()
    watched.set_model_unet_function_wrapper(look)
    stock(watched, latent, positive, null_conditioning(model, inversion, negative), steps=steps, scheduler=scheduler)
    assert seen == marks[:, 0, 0, 0].tolist()


def test_null_text_is_better_than_plain_inversion_and_direct_reaches_the_bound(invert):
    reports = {method: invert(method)[4] for method in ("null_text", "ddim", "direct")}
    assert quality(reports["null_text"]) > quality(reports["ddim"]) + 4
    assert "reconstruction against the VAE's round trip: equal" in reports["direct"]
    bound = float(re.search(r"\(the bound\): PSNR ([\d.]+)", reports["direct"])[1])
    assert quality(reports["direct"]) > bound - 0.1
    assert reports["direct"].count("(lpips-demo)") == 3


def test_pictures_figures_and_facts_come_along(parts, invert):
    inversion, _noise, null, reconstruction, report, losses = invert()
    assert reconstruction.shape == parts[2].shape and losses.ndim == 4 and losses.shape[-1] == 3
    assert len(null) == STEPS and null[0][1].keys() >= {"start_percent", "end_percent"}
    assert inversion.facts["psnr_source"] == pytest.approx(quality(report), abs=0.01)
    assert inversion.facts["lpips"] == "lpips-demo" and inversion.facts["optimiser"] == "fast"
    assert not inversion.trajectory.is_inference() and not inversion.null.is_inference()


def test_without_the_picture_the_report_says_so(invert):
    report = invert("direct", image=None, lpips="none")[4]
    assert "image is not connected" in report and "LPIPS" not in report


def test_a_picture_that_the_vae_cut_is_compared_where_it_was_kept(parts, invert):
    _model, vae, image, *_ = parts
    larger = torch.nn.functional.pad(image, (0, 0, 1, 2, 2, 1), value=0.5)
    with torch.inference_mode():
        latent = {"samples": vae.encode(larger)}
    report = invert("direct", latent=latent, image=larger)[4]
    assert quality(report) > 25
    with pytest.raises(ValueError, match=r"image is 32×32 \(width×height\), but latent decodes to 64×64"):
        invert("direct", image=image[:, :32, :32])


@pytest.mark.parametrize("size", [(64, 124), (68, 64), (124, 66)])
def test_a_picture_that_is_larger_by_more_than_the_vae_cuts_is_refused(invert, size):
    with pytest.raises(ValueError, match=rf"image is {size[1]}×{size[0]} .*latent decodes to 64×64: connect the"):
        invert("direct", image=torch.rand(1, *size, 3))


def test_guidance_that_another_pack_changes_is_in_the_figures(parts, invert):
    model = parts[0].clone()
    model.set_model_sampler_cfg_function(lambda given: given["input"] - given["cond_denoised"])
    _, noise, null, reconstruction, report, _ = invert(model=model)
    assert "changes guidance (sampler_cfg_function)" in report
    made = stock(model, noise, parts[4], null)
    with torch.inference_mode():
        torch.testing.assert_close(parts[1].decode(made), reconstruction, rtol=0, atol=5e-3)


def test_progress_runs_over_both_ways_with_a_preview(parts, invert, monkeypatch):
    import latent_preview

    calls = []
    monkeypatch.setattr(latent_preview, "prepare_callback", lambda model, total: lambda *given: calls.append(given))
    invert(model=parts[0], inner_steps=1)
    assert [given[0] for given in calls] == list(range(2 * STEPS))
    assert all(given[1].shape == parts[3]["samples"].shape and given[3] == 2 * STEPS for given in calls)


# Files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def output(tmp_path: Path, monkeypatch) -> Path:
    """ComfyUI's output folder, empty, with the pack's folders registered in it."""
    import folder_paths

    from blendswap.nodes.shared import folders

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    folders.register()
    return tmp_path


@pytest.mark.parametrize("method", ["null_text", "negative_prompt", "direct"])
def test_an_inversion_comes_back_from_its_file(parts, invert, output, method):
    from blendswap.nodes.shared import folders
    from blendswap.nodes.swap.invert import LoadInversion, SaveInversion

    saved = invert(method)[0]
    (file,) = SaveInversion.execute(saved, "people/face").args
    (again,) = SaveInversion.execute(saved, "people/face").args
    assert (output / "inversions" / file).is_file() and file != again
    assert folders.model_names("inversions") == sorted([file, again])
    loaded, report = LoadInversion.execute(file).args
    for name in ("sigmas", "trajectory", "null"):
        one, two = getattr(saved, name), getattr(loaded, name)
        assert one is two is None or torch.equal(one, two)
    assert dict(loaded.facts) == dict(saved.facts)
    assert method in report and "psnr_source" in report
    assert LoadInversion.fingerprint_inputs(file) != LoadInversion.fingerprint_inputs(again)


def test_a_files_name_has_the_day_and_the_size_where_its_prefix_asks_for_them(parts, invert, output):
    from blendswap.nodes.swap.invert import LoadInversion, SaveInversion

    saved = invert("direct")[0]
    height, width = (8 * side for side in saved.trajectory.shape[-2:])
    (file,) = SaveInversion.execute(saved, "%date:yyyy-MM-dd%/%year%_%width%x%height%").args
    assert Path(file).as_posix() == time.strftime(f"%Y-%m-%d/%Y_{width}x{height}_00001_.safetensors")
    assert LoadInversion.execute(file).args[0].steps == saved.steps


def test_what_was_unpacked_samples_like_what_was_inverted(parts, invert, output):
    from blendswap.nodes.swap.invert import LoadInversion, SaveInversion, UnpackInversion

    inversion, noise, null, *_ = invert()
    loaded = LoadInversion.execute(SaveInversion.execute(inversion).args[0]).args[0]
    unpacked, conditioning, sigmas, cfg = UnpackInversion.execute(parts[0], loaded, parts[5]).args
    assert torch.equal(unpacked["samples"], noise["samples"]) and cfg == 7.5
    assert torch.equal(sigmas, inversion.sigmas)
    assert [entry[1]["start_percent"] for entry in conditioning] == [entry[1]["start_percent"] for entry in null]
    assert all(torch.equal(one[0], two[0]) for one, two in zip(conditioning, null, strict=True))


def test_an_empty_list_and_names_outside_say_what_to_do(output):
    from blendswap.nodes.shared import folders
    from blendswap.nodes.swap.invert import LoadInversion

    (entry,) = folders.model_names("inversions")
    assert entry == "(SaveInversion writes into output/inversions)"
    with pytest.raises(FileNotFoundError, match="output/inversions is empty"):
        LoadInversion.execute(entry)
    with pytest.raises(ValueError, match="not inside output/inversions"):
        LoadInversion.execute("../../secret.safetensors")


def test_nothing_is_written_outside_the_folder(invert, output):
    from blendswap.nodes.swap.invert import SaveInversion

    with pytest.raises(Exception, match="outside the output folder"):
        SaveInversion.execute(invert("direct")[0], "../face")
    assert not list(output.rglob("face*"))


@pytest.mark.parametrize("kind", ["foreign", "damaged"])
def test_a_file_that_is_no_inversion_is_refused(invert, output, kind):
    from safetensors.torch import save_file

    from blendswap.nodes.swap.invert import LoadInversion, SaveInversion

    (file,) = SaveInversion.execute(invert("direct")[0]).args
    path = output / "inversions" / file
    if kind == "foreign":
        save_file({"weight": torch.zeros(1)}, path)
    else:
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match={"foreign": "holds no inversion", "damaged": "is damaged"}[kind]):
        LoadInversion.execute(file)


# Bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"negative": None}, "negative is not connected: method null_text needs"),
        ({"negative": None, "method": "ddim"}, "negative is not connected: method ddim"),
        ({"cfg": 1.0}, "cfg is 1.*raise cfg"),
        ({"latent": {"samples": torch.zeros(1, 4, 16, 16)}}, "latent has 4 channels, the MODEL works on 8"),
        ({"latent": {"samples": torch.full((1, 8, 16, 16), torch.nan)}}, "latent holds NaN"),
        ({"latent": {"samples": torch.zeros(2, 8, 16, 16)}}, "takes one picture.*LatentFromBatch"),
        ({"steps": 1000}, "steps is 1000, but this model was trained on 1000 timesteps: use 1 to 999"),
        ({"quantile": 1.5}, "quantile is 1.5"),
        ({"image": torch.zeros(2, 64, 64, 3)}, "image holds 2 pictures"),
    ],
)
def test_what_cannot_be_inverted_is_refused_with_a_cure(invert, changes, said):
    with pytest.raises(ValueError, match=said):
        invert(**changes)


def test_several_negatives_at_once_are_refused(parts, invert):
    with pytest.raises(ValueError, match="negative holds 2 entries"):
        invert(negative=[*parts[5], *parts[5]])


def test_a_model_without_a_noise_schedule_is_refused(parts, invert):
    import comfy.model_sampling

    class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    model = parts[0].clone()
    model.add_object_patch("model_sampling", Flow(model.model.model_config))
    with pytest.raises(ValueError, match=r"The MODEL is a flow model.*load SD 1.x"):
        invert(model=model)


def test_an_inversion_of_another_model_or_for_no_stock_sampler_is_not_unpacked(parts, invert):
    import dataclasses

    from blendswap.nodes.swap.invert import UnpackInversion

    foreign = dataclasses.replace(invert()[0], facts={"model": "SDXL"})
    with pytest.raises(ValueError, match="made with a SDXL of 8 latent channels"):
        UnpackInversion.execute(parts[0], foreign, parts[5])
    with pytest.raises(ValueError, match="method direct"):
        UnpackInversion.execute(parts[0], invert("direct")[0], parts[5])


def test_every_schema_is_accepted_by_comfyui():
    from blendswap.nodes.swap.invert import LoadInversion, NullTextInvert, SaveInversion, UnpackInversion

    for node in (NullTextInvert, UnpackInversion, SaveInversion, LoadInversion):
        node.GET_SCHEMA().validate()
        node.GET_NODE_INFO_V1()
