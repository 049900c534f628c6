"""Conditioning made for a whole picture, where a window of it is edited: areas, masks, ControlNets, GLIGEN's boxes.

An edit in a window is to be that of the window's own pixels alone, with what was made for the picture moved by hand.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ..conftest import in_their_nodes

pytestmark = pytest.mark.needs_comfy

LEFT, TOP, SIDE = 40, 24, 64
CELL = 4
"""Pixels of the demo's latent cells."""
UNIT = 8 / CELL
"""ComfyUI's nodes count eight pixels to a cell."""


def run(node, **inputs) -> tuple:
    with torch.inference_mode():
        return node.execute(**inputs).args


def picture(height: int = 128, width: int = 160) -> torch.Tensor:
    return torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(1))


def mask() -> torch.Tensor:
    """Whose window, with a context of a half, is the square of `SIDE` at (`LEFT`, `TOP`)."""
    made = torch.zeros(1, 128, 160)
    made[:, TOP + 16 : TOP + 48, LEFT + 16 : LEFT + 48] = 1
    return made


def cut(whole: torch.Tensor, dims: tuple[int, int] = (1, 2)) -> torch.Tensor:
    return whole.narrow(dims[0], TOP, SIDE).narrow(dims[1], LEFT, SIDE)


@pytest.fixture
def edit(kit, parts):
    from blendswap.blending.augment import ExtendingAugmentations
    from blendswap.nodes.blend.sampler import CLIPBlendSampler

    def made(image, mask, positive, window="on", **changes):
        inputs = dict(
            model=kit.model,
            vae=kit.vae,
            clip_guide=parts[2],
            prompt="a blue star",
            seed=7,
            candidates=1,
            batch_size=1,
            guidance=30.0,
            steps=4,
            start=1,
            augment=ExtendingAugmentations(copies=2),
            cfg=4.0,
            positive=positive,
            negative=kit.prompts("", "")[0],
            match_border=False,
            window=window,
        )
        images, _, _, summary = run(CLIPBlendSampler, image=image, mask=mask, **in_their_nodes({**inputs, **changes}))
        return images, summary

    return made


def words(kit, text: str) -> Any:
    with torch.inference_mode():
        return kit.clip.encode_from_tokens_scheduled(kit.clip.tokenize(text))


def area(conditioning, top: int, left: int, height: int, width: int) -> Any:
    """ConditioningSetArea of a box in pixels of the demo's pictures."""
    import nodes

    sizes = (round(each * UNIT) for each in (width, height, left, top))
    return nodes.ConditioningSetArea().append(conditioning, *sizes, 1.0)[0]


def percent(conditioning, top: int, left: int, height: int, width: int, size: tuple[int, int]) -> Any:
    import nodes

    tall, wide = size
    return nodes.ConditioningSetAreaPercentage().append(
        conditioning, width / wide, height / tall, left / wide, top / tall, 1.0
    )[0]


def masked(conditioning, given: torch.Tensor) -> Any:
    import nodes

    return nodes.ConditioningSetMask().append(conditioning, given, "default", 1.0)[0]


BOX = (32, 60, 32, 60)
"""Top, left, height and width: it reaches beyond the window to the right."""
INSIDE = (32 - TOP, 60 - LEFT, 32, LEFT + SIDE - 60)


def in_box() -> torch.Tensor:
    made = torch.zeros(1, 128, 160)
    made[:, 32:64, 60:120] = 1
    return made


def regional(kit, kind: str, whole: bool) -> Any:
    base, there = words(kit, "a blue sky background"), words(kit, "a green heart")
    if kind == "area":
        return base + area(there, *(BOX if whole else INSIDE))
    if kind == "percentage":
        return base + percent(there, *(BOX if whole else INSIDE), (128, 160) if whole else (SIDE, SIDE))
    return base + masked(there, in_box() if whole else cut(in_box()))


@pytest.mark.parametrize("kind", ["area", "percentage", "mask"])
def test_a_place_in_the_picture_is_the_same_place_in_the_window(kit, edit, kind):
    image, marked = picture(), mask()
    made, summary = edit(image, marked, regional(kit, kind, whole=True))
    assert f"window of 64×64 pixels at ({LEFT}, {TOP})" in summary
    alone, _ = edit(cut(image), cut(marked), regional(kit, kind, whole=False), window="off")
    assert torch.equal(cut(made), alone)
    plain, _ = edit(image, marked, words(kit, "a blue sky background"))
    assert (made - plain).abs().max() > 0.02


def test_what_lies_outside_of_the_window_has_no_part_in_it_and_is_said(kit, edit):
    image, marked = picture(), mask()
    base, far = words(kit, "a blue sky background"), area(words(kit, "a green heart"), 0, 120, 16, 32)
    made, summary = edit(image, marked, base + far)
    assert torch.equal(made, edit(image, marked, base)[0])
    assert "positive: 1 of 2 entries lie outside of the window" in summary
    with pytest.raises(ValueError, match="positive has areas or masks alone that lie outside of what is edited"):
        edit(image, marked, far)


@pytest.fixture(scope="module")
def network(kit):
    import comfy.cldm.cldm

    config = {key: value for key, value in kit.model.model.model_config.unet_config.items() if key != "out_channels"}
    config.pop("transformer_depth_output")  # its UNet half has output depths of no use to it
    with torch.inference_mode():
        made = comfy.cldm.cldm.ControlNet(**config, hint_channels=3).eval()
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.05)
    return made


def controlled(kit, network, *hints: torch.Tensor) -> Any:
    """ControlNetApplyAdvanced with each of `hints` [1, H, W, 3], one after the other."""
    import comfy.controlnet
    import nodes

    control = comfy.controlnet.ControlNet(network, load_device=kit.model.load_device)
    positive, negative = words(kit, "a blue sky background"), words(kit, "")
    for hint in hints:
        positive, negative = nodes.ControlNetApplyAdvanced().apply_controlnet(
            positive, negative, control, hint, 1.0, 0.0, 1.0
        )
    return positive, negative


def test_a_controlnets_picture_is_cut_with_the_window_and_the_callers_stays_as_it_was(kit, edit, network):
    image, marked = picture(), mask()
    seen = torch.zeros(1, 128, 160, 3)
    cut(seen)[:, :32] = 1  # the window's upper half
    hints = [seen * 3, picture()]
    positive, negative = controlled(kit, network, *hints)
    mine = positive[0][1]["control"]
    made, _ = edit(image, marked, positive, negative=negative)
    positive, negative = controlled(kit, network, *map(cut, hints))
    alone, _ = edit(cut(image), cut(marked), positive, negative=negative, window="off")
    assert (cut(made) - alone).abs().max() < 1e-4
    positive, negative = controlled(kit, network, *hints)
    laid_over, _ = edit(cut(image), cut(marked), positive, negative=negative, window="off")
    assert (laid_over - alone).abs().max() > 0.01
    for control, hint in ((mine, hints[1]), (mine.previous_controlnet, hints[0])):
        assert torch.equal(control.cond_hint_original.movedim(1, -1), hint) and control.cond_hint is None
    assert (made - edit(image, marked, words(kit, "a blue sky background"))[0]).abs().max() > 0.02


def test_positive_and_negative_keep_sharing_their_controlnet(kit, network):
    from blendswap.hosts.comfy.window import fit_conditioning
    from blendswap.images.canvas import Canvas
    from blendswap.images.window import Window

    positive, negative = controlled(kit, network, picture())
    window = Window(8, 72, 16, 80, 128, 160)
    canvas = Canvas.make(torch.rand(1, 3, 128, 160), torch.ones(1, 1, 128, 160), 32, 64, window)
    fitted, said = fit_conditioning(canvas, CELL, positive=positive, negative=negative)
    controls = [fitted[name][0][1]["control"] for name in ("positive", "negative")]
    assert controls[0] is controls[1] is not positive[0][1]["control"] and not said
    assert controls[0].control_model is network


@pytest.mark.parametrize("window", [(10, 74, 20, 120), (0, 50, 30, 90), (0, 100, 0, 130)])
def test_places_fall_where_the_pictures_pixels_do_on_an_enlarged_and_padded_canvas(comfy, window):
    from blendswap.hosts.comfy.window import fit_conditioning
    from blendswap.images.canvas import Canvas
    from blendswap.images.window import Window

    box = torch.zeros(1, 1, 100, 130)
    box[..., 20:40, 40:80] = 1
    canvas = Canvas.make(torch.rand(1, 3, 100, 130), box, 32, 96, Window(*window, 100, 130))
    place = torch.nn.functional.max_pool2d(canvas.fit(box), 4)[0, 0] > 0
    rows, columns = place.any(1).nonzero().flatten(), place.any(0).nonzero().flatten()
    edges = (int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)  # cells that the box touches
    text = torch.zeros(1, 77, 8)
    boxes = [(text, 5, 10, 5, 10), (text, 1, 1, 24, 32)]
    places = [
        {"area": (5, 10, 5, 10)},
        {"area": ("percentage", 0.2, 40 / 130, 0.2, 40 / 130)},
        {"mask": box[0]},
        {"gligen": ("position", None, boxes)},
    ]
    given = [[text, options] for options in places]
    fitted = fit_conditioning(canvas, 4, positive=given)[0]["positive"]
    areas = [fitted[0][1]["area"], fitted[1][1]["area"], fitted[3][1]["gligen"][2][0][1:]]
    for height, width, top, left in areas:
        found = (top, top + height, left, left + width)
        assert all(abs(one - other) <= 1 for one, other in zip(found, edges, strict=True)), (found, edges)
    assert fitted[2][1]["mask"].shape[-2:] == canvas.source.shape[-2:]
    inner = (slice(0, canvas.inner[0] - 2), slice(0, canvas.inner[1] - 2))
    off = (fitted[2][1]["mask"][0][inner] > 0.5).float() - canvas.fit(box)[0, 0][inner]
    assert off.abs().mean() < 0.03
    assert len(fitted[3][1]["gligen"][2]) == (2 if window == (0, 100, 0, 130) else 1)
    assert given[0][1]["area"] == (5, 10, 5, 10)


def test_what_cannot_be_cut_is_said_by_name_and_a_picture_that_is_not_cut_keeps_its_own(kit, edit):
    text = words(kit, "a blue sky background")
    inpainting = [[text[0][0], {**text[0][1], "concat_latent_image": torch.zeros(1, 8, 32, 40)}]]
    image, marked = picture(), mask()
    said = "positive holds the latent of an inpainting model for the whole picture, laid over what is edited as it is"
    assert said in edit(image, marked, inpainting)[1]
    assert said not in edit(image, marked, inpainting, window="off", resolution=0)[1]
