"""Edit reports: what is outside counts to the last bit of the saved file, what is inside does not count
against it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from blendswap.blending.report import AMPLIFICATION, EditReport, edit_report, picture, to_8_bit
from blendswap.models.clip.guide import ClipGuide
from blendswap.models.clip.loading import build_demo_clip
from blendswap.models.clip.tokens import CompactTokenizer, compact_vocabulary
from blendswap.models.lpips import DemoBackbone, Perceptual, save_demo_backbone


def scene(height: int = 40, width: int = 48) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    source = torch.rand(1, height, width, 3, generator=generator)
    mask = torch.zeros(1, 1, height, width)
    mask[..., 10:20, 10:25] = 1
    result = source.clone()
    result[:, 10:20, 10:25] = torch.rand(1, 10, 15, 3, generator=generator)
    return source, result, mask


@pytest.fixture(scope="module")
def perceptual(tmp_path_factory: pytest.TempPathFactory) -> Perceptual:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lpips") / "model.safetensors"
    save_demo_backbone(DemoBackbone(), path)
    return Perceptual("demo", path)


def test_an_edit_inside_the_mask_leaves_a_perfect_background(perceptual: Perceptual):
    report = edit_report(*scene(), perceptual)
    assert (report.max_abs_outside, report.identical_outside, report.max_abs_outside_float) == (0, 1.0, 0.0)
    assert (report.mse_outside, report.psnr_outside, report.ssim_outside) == (0.0, math.inf, 1.0)
    assert (report.lpips_outside, report.lpips_backbone) == (0.0, "lpips-demo")
    assert report.mask_share == pytest.approx(150 / (40 * 48))


def test_differences_outside_are_measured_there_alone():
    source, result, mask = scene()
    source = source * 0.8 + 0.1
    result = torch.where(mask.movedim(1, -1) == 1, result, source)
    result[:, 30, 30] = source[:, 30, 30] + 0.1
    report = edit_report(source, result, mask)
    outside = 40 * 48 - 150
    assert report.max_abs_outside in (25, 26)
    assert report.max_abs_outside_float == pytest.approx(25.5, abs=1e-3)
    assert report.identical_outside == pytest.approx(1 - 1 / outside)
    assert report.mse_outside == pytest.approx(0.01 / outside, rel=1e-3)
    assert report.psnr_outside == pytest.approx(-10 * math.log10(0.01 / outside), abs=0.01)
    assert 0.9 < report.ssim_outside < 1
    assert report.lpips_outside is None and report.lpips_backbone is None


def test_the_8_bit_picture_is_what_comfyui_saves():
    values = torch.tensor([0.0, 1 / 255, 0.5, 0.9999, 1.0, 1.2, -0.1])
    saved = np.clip(255.0 * values.numpy(), 0, 255).astype(np.uint8)
    assert to_8_bit(values).tolist() == saved.tolist()


def test_a_difference_below_8_bits_shows_in_the_floats_only():
    source, _, mask = scene()
    source = (source * 200).round() / 255 + 0.5 / 255
    report = edit_report(source, source + 0.1 / 255, mask)
    assert (report.max_abs_outside, report.identical_outside) == (0, 1.0)
    assert report.max_abs_outside_float == pytest.approx(0.1, rel=0.01)


def test_a_full_mask_has_no_outside_and_says_so(perceptual: Perceptual):
    source, result, mask = scene()
    report = edit_report(source, result, torch.ones_like(mask), perceptual)
    assert report.max_abs_outside is None and report.lpips_outside is None and report.mask_share == 1
    assert "covers the picture" in report.to_text()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (3, 3), (5, 40)])
def test_small_pictures_are_reported(height: int, width: int):
    source = torch.rand(1, height, width, 3)
    report = edit_report(source, source, torch.zeros(1, 1, height, width))
    assert report.max_abs_outside == 0
    assert (report.ssim_outside is None) == (min(height, width) < 3)
    assert "largest difference 0" in report.to_text()
    assert picture(source, source, torch.zeros(1, 1, height, width)).ndim == 4


def test_clip_similarity_is_given_before_and_after_with_the_guides_name():
    torch.manual_seed(0)
    tokenizer = CompactTokenizer(compact_vocabulary(["a red star"]))
    vision = {"layers": 1, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 32}
    text = {"context_length": 16, "width": 64, "heads": 2, "layers": 1, "vocab_size": tokenizer.vocab_size}
    model = build_demo_clip({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text})
    guide = ClipGuide(model, tokenizer, "tiny")
    source, result, mask = scene()
    report = edit_report(source, result, mask, guide=guide, prompt="a red star")
    whole = guide.score(result.movedim(-1, 1) * 2 - 1, "a red star").item()
    assert report.clip_whole_after == pytest.approx(whole, abs=1e-5)
    assert report.clip_region_before != report.clip_region_after
    assert "'a red star' (tiny)" in report.to_text()


def test_text_and_json_name_what_they_report(perceptual: Perceptual):
    report = edit_report(*scene(), perceptual)
    read = json.loads(report.to_json())
    assert read["psnr_outside"] is None and read["lpips_backbone"] == "lpips-demo"
    assert set(read) == set(EditReport.__dataclass_fields__)
    assert "LPIPS 0.0000 (lpips-demo)" in report.to_text() and "PSNR infinite" in report.to_text()


def test_the_picture_shows_four_panels_for_each_result():
    source, result, mask = scene(64, 96)
    sheet = picture(source, result.repeat(2, 1, 1, 1), mask)[0]
    assert sheet.shape[2] == 3 and sheet.dtype == torch.float32 and sheet.min() >= 0 and sheet.max() <= 1
    width = 4 * 192 + 3 * 4
    assert sheet.shape[1] == width and sheet.shape[0] % 2 == 0
    row = sheet[: sheet.shape[0] // 2]
    panels = row[-128:]
    enlarged = source[0].repeat_interleave(2, 0).repeat_interleave(2, 1)
    torch.testing.assert_close(panels[:, :192], enlarged, atol=1 / 255, rtol=0)
    difference = ((result - source).abs() * AMPLIFICATION).clamp(0, 1)[0]
    shown = panels[:, -192:]
    torch.testing.assert_close(shown, difference.repeat_interleave(2, 0).repeat_interleave(2, 1), atol=1 / 255, rtol=0)
    assert (row[:-128] < 0.5).any()  # the labels


def test_pictures_of_different_sizes_are_refused():
    source, result, mask = scene()
    with pytest.raises(ValueError, match="resize them first"):
        edit_report(source, result[:, 1:], mask)
