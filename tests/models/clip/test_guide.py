"""CLIP guides: embeddings, gradients, vocabulary, and weights files of every kind, on real open_clip
models."""

from __future__ import annotations

import json
import logging
import pickle
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from blendswap.models.clip.architectures import match_architecture
from blendswap.models.clip.guide import ClipGuide
from blendswap.models.clip.loading import build_demo_clip, load_clip_guide
from blendswap.models.clip.tokens import CompactTokenizer, compact_vocabulary
from blendswap.tools.training.clip import save_demo_clip

CAPTIONS = ["a red striped star on a white ground", "a blue circle"]
VISION = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 32}
TEXT = {"context_length": 16, "width": 64, "heads": 2, "layers": 1}


@pytest.fixture(scope="module")
def tokenizer() -> CompactTokenizer:
    return CompactTokenizer(compact_vocabulary(CAPTIONS), 16)


def demo_config(tokenizer: CompactTokenizer, **vision) -> dict:
    return {
        "embed_dim": 32,
        "vision_cfg": vision or VISION,
        "text_cfg": {**TEXT, "vocab_size": tokenizer.vocab_size},
    }


@pytest.fixture(scope="module")
def demo_file(tokenizer: CompactTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = demo_config(tokenizer)
    path = tmp_path_factory.mktemp("clip") / "model.safetensors"
    save_demo_clip(build_demo_clip(config), config, tokenizer, path, architecture="demo-vit")
    return path


@pytest.fixture(scope="module")
def guide(demo_file: Path) -> ClipGuide:
    return load_clip_guide(demo_file)


@pytest.fixture(scope="module")
def tiny_architectures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small architectures in open_clip's own registry, alike but for the activation."""
    folder = tmp_path_factory.mktemp("configs")
    config = {
        "embed_dim": 48,
        "vision_cfg": VISION,
        "text_cfg": {**TEXT, "context_length": 77, "vocab_size": 49408},
    }
    (folder / "tiny-test.json").write_text(json.dumps(config))
    (folder / "tiny-test-quickgelu.json").write_text(json.dumps({**config, "quick_gelu": True}))
    open_clip.add_model_config(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tiny_architectures: Path) -> open_clip.CLIP:
    torch.manual_seed(1)
    return open_clip.CLIP(**open_clip.get_model_config("tiny-test")).eval()


def pictures(count: int = 2, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---- embeddings


def test_embeddings_are_unit_vectors_of_any_picture_size(guide: ClipGuide):
    for height, width in ((32, 32), (64, 64), (45, 80), (7, 5), (1, 1)):
        vectors = guide.embed_image(pictures(2, height, width))
        assert vectors.shape == (2, guide.embed_dim) and vectors.dtype == torch.float32
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    texts = guide.embed_text(["a red star", ""])
    assert texts.shape == (2, guide.embed_dim)
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(2))


def test_preprocessing_is_that_of_open_clip_within_a_step_of_8_bits(tiny: open_clip.CLIP):
    guide = ClipGuide(tiny, open_clip.get_tokenizer("tiny-test"), "tiny-test")
    smooth = F.interpolate(pictures(1, 8, 8), size=(64, 64), mode="bicubic", antialias=True).clamp(-1, 1)
    array = ((smooth[0].movedim(0, -1) + 1) * 127.5).round().to(torch.uint8)
    transform = image_transform_v2(PreprocessCfg(size=32), is_train=False)
    with torch.no_grad():
        reference = F.normalize(tiny.encode_image(transform(Image.fromarray(array.numpy()))[None]), dim=-1)
        ours = guide.embed_image(array.movedim(-1, 0)[None] / 127.5 - 1)
    assert (ours @ reference.T).item() > 0.9999


def test_a_picture_that_is_not_square_keeps_its_proportions_and_its_edges(guide: ClipGuide):
    wide = torch.zeros(1, 3, 32, 96)
    padded = torch.zeros(1, 3, 96, 96)
    wide[..., -4:] = 1
    padded[..., 32:64, -4:] = 1
    torch.testing.assert_close(guide.embed_image(wide), guide.embed_image(padded))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (61, 61), (40, 90), (9, 9)])
def test_every_pixel_gets_a_gradient(guide: ClipGuide, height: int, width: int):
    images = pictures(1, height, width).requires_grad_()
    guide.embed_image(images)[:, 0].sum().backward()
    assert torch.isfinite(images.grad).all()
    assert (images.grad != 0).all(dim=1).float().mean() > 0.99


def test_the_gradient_is_the_derivative(guide: ClipGuide):
    images = pictures(1, 48, 48).requires_grad_()
    text = guide.embed_text(["a red star"])
    (guide.embed_image(images) @ text.T).sum().backward()
    step = 0.02 * images.grad.sign()
    with torch.no_grad():
        change = (guide.embed_image(images + step) - guide.embed_image(images - step)) @ text.T
    assert change.item() == pytest.approx(2 * (step * images.grad).sum().item(), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight", [1e-7, 1.0, 1e3])
def test_half_precision_weights_give_the_same_gradient(demo_file: Path, guide: ClipGuide, dtype, weight: float):
    low = load_clip_guide(demo_file, dtype=dtype)
    gradients = []
    for one in (guide, low):
        images = pictures(1).requires_grad_()
        (one.embed_image(images)[:, 0].sum() * weight).backward()
        assert torch.isfinite(images.grad).all()
        gradients.append(images.grad.flatten() / weight)
    assert low.embed_image(pictures(1)).dtype == torch.float32
    assert gradients[1].norm().item() == pytest.approx(gradients[0].norm().item(), rel=0.03)
    difference = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert difference < (0.02 if dtype == torch.float16 else 0.15)


def test_a_guide_loaded_and_asked_in_inference_mode_still_gives_gradients(demo_file: Path):
    with torch.inference_mode():
        guide = load_clip_guide(demo_file)
        text = guide.embed_text(["a red star"])
    images = pictures(1).requires_grad_()
    (guide.embed_image(images) @ text.T).sum().backward()
    assert images.grad.abs().sum() > 0


def test_score_is_the_cosine_and_takes_no_gradient(guide: ClipGuide):
    images = pictures(3).requires_grad_()
    scores = guide.score(images, "a blue circle")
    assert scores.shape == (3,) and not scores.requires_grad
    torch.testing.assert_close(scores, (guide.embed_image(images) @ guide.embed_text(["a blue circle"])[0]).detach())


# ---- vocabulary and prompts


def test_the_compact_tokenizer_maps_to_rows_with_the_end_token_highest(tokenizer: CompactTokenizer):
    rows = tokenizer([*CAPTIONS, "a purple star", ""])
    assert rows.shape == (4, 16) and rows.max() < tokenizer.vocab_size
    assert (rows.max(dim=1).values == tokenizer.end_row).all()
    assert (rows[:, 0] == tokenizer.start_row).all()
    assert tokenizer.unknown_row in rows[2] and tokenizer.unknown_row not in rows[:2]
    assert tokenizer("a red star.").tolist() == tokenizer("A  red star").tolist()


def test_the_compact_tokenizer_is_clips_own_cut_to_the_rows_in_use(tokenizer: CompactTokenizer):
    full = open_clip.SimpleTokenizer()
    known = [*tokenizer.vocabulary[:-1], None, tokenizer.vocabulary[-1]]
    for text in CAPTIONS:
        ids = [full.sot_token_id, *full.encode(text), full.eot_token_id]
        assert [known[row] for row in tokenizer(text)[0][: len(ids)]] == ids


def test_a_vocabulary_without_its_end_token_is_refused(tokenizer: CompactTokenizer):
    with pytest.raises(ValueError, match="end token"):
        CompactTokenizer(tokenizer.vocabulary[:-1])


def test_unknown_words_are_named_in_the_log(guide: ClipGuide, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        guide.embed_text(["a red spaceship, a spaceship!"])
    assert caplog.text.count("spaceship") == 1


def test_a_prompt_without_a_known_word_is_refused(guide: ClipGuide):
    with pytest.raises(ValueError, match="knows no word of the prompt 'flying spaceship'"):
        guide.embed_text(["flying spaceship"])


@pytest.mark.parametrize("compact", [True, False])
def test_an_over_long_prompt_is_cut_off_with_a_warning(
    guide: ClipGuide, tiny: open_clip.CLIP, caplog: pytest.LogCaptureFixture, compact: bool
):
    if not compact:
        guide = ClipGuide(tiny, open_clip.get_tokenizer("tiny-test"), "tiny-test")
    limit = guide.tokenizer.context_length
    with caplog.at_level(logging.WARNING):
        exact = guide.embed_text(["star " * (limit - 2)])
        assert not caplog.records
        longer = guide.embed_text(["star " * (limit + 5)])
    assert "last 7 tokens are dropped" in caplog.text
    torch.testing.assert_close(longer, exact)


# ---- files


def test_the_demo_file_brings_its_weights_and_its_description(demo_file: Path, guide: ClipGuide, tokenizer):
    assert (guide.name, guide.image_size, guide.embed_dim, guide.mean) == (
        "demo-vit",
        32,
        32,
        (0.5, 0.5, 0.5),
    )
    assert guide.tokenizer.vocabulary == tokenizer.vocabulary
    torch.manual_seed(0)
    original = ClipGuide(build_demo_clip(demo_config(tokenizer)), tokenizer, "x", (0.5,) * 3, (0.5,) * 3)
    assert (guide.embed_image(pictures()) * original.embed_image(pictures())).sum(dim=1).min() > 0.9999


def test_a_demo_resnet_loads_too(tokenizer: CompactTokenizer, tmp_path: Path):
    config = demo_config(tokenizer, layers=[1, 1, 1, 1], width=16, head_width=64, patch_size=None, image_size=64)
    save_demo_clip(build_demo_clip(config), config, tokenizer, tmp_path / "rn.safetensors")
    guide = load_clip_guide(tmp_path / "rn.safetensors")
    assert guide.image_size == 64 and guide.embed_image(pictures()).shape == (2, 32)


@pytest.mark.parametrize("layout", ["safetensors", "bin", "training checkpoint", "openai state dict"])
def test_published_layouts_load_and_embed_as_the_model_does(tiny: open_clip.CLIP, tmp_path: Path, layout: str):
    weights = tiny.state_dict()
    path = tmp_path / {"safetensors": "laion2b.safetensors"}.get(layout, "laion2b.pt")
    if layout == "safetensors":
        save_file(weights, path)
    elif layout == "training checkpoint":
        torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in weights.items()}}, path)
    elif layout == "openai state dict":
        extras = dict.fromkeys(("input_resolution", "context_length", "vocab_size"), torch.tensor(1))
        torch.save({**{key: value.half() for key, value in weights.items()}, **extras}, path)
    else:
        torch.save(weights, path)
    guide = load_clip_guide(path, "auto")
    # OpenAI's layout means QuickGELU, also where the file name says otherwise.
    openai = layout == "openai state dict"
    assert guide.name == ("tiny-test-quickgelu" if openai else "tiny-test")
    if not openai:
        images = (pictures() + 1) / 2
        mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (guide.mean, guide.std))
        expected = F.normalize(tiny.encode_image((images - mean) / std), dim=-1)
        torch.testing.assert_close(guide.embed_image(pictures()), expected)
    tokens = open_clip.tokenize(["a red star"])
    if not openai:
        torch.testing.assert_close(guide.embed_text(["a red star"]), F.normalize(tiny.encode_text(tokens), dim=-1))


def test_openais_torchscript_archive_is_read_without_running_it(tiny: open_clip.CLIP, tmp_path: Path):
    class Published(torch.nn.Module):
        """OpenAI's archives carry the weights under CLIP's own names, and three numbers."""

        def __init__(self):
            super().__init__()
            for name, child in tiny.named_children():
                setattr(self, name, child)
            for name in ("positional_embedding", "text_projection", "logit_scale"):
                setattr(self, name, getattr(tiny, name))
            for name, value in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 49408)):
                self.register_buffer(name, torch.tensor(value))

        def forward(self, image):
            return self.visual(image) * self.logit_scale + self.positional_embedding.sum() + self.text_projection.sum()

    path = tmp_path / "ViT-tiny.pt"
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(Published().eval(), torch.zeros(1, 3, 32, 32)), path)
    guide = load_clip_guide(path)
    assert guide.name == "tiny-test-quickgelu"
    torch.testing.assert_close(guide.model.visual.conv1.weight, tiny.visual.conv1.weight)
    torch.testing.assert_close(guide.model.token_embedding.weight, tiny.token_embedding.weight)


def test_an_open_clip_folder_says_what_it_is(tiny: open_clip.CLIP, tiny_architectures: Path, tmp_path: Path):
    config = open_clip.get_model_config("tiny-test")
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "resize_mode": "squash"}
    description = {"model_cfg": config, "preprocess_cfg": preprocess}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(description))
    save_file(tiny.state_dict(), tmp_path / "open_clip_model.safetensors")
    guide = load_clip_guide(tmp_path)
    assert (guide.mean, guide.std, guide.squash) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), True)
    assert guide.name == tmp_path.name


def test_a_folder_with_its_own_tokenizer_needs_no_network(tiny: open_clip.CLIP, tmp_path: Path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: row for row, word in enumerate(["[PAD]", "[UNK]", "a", "red", "star"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    config = open_clip.get_model_config("tiny-test")
    config["text_cfg"]["hf_tokenizer_name"] = "somewhere/else"
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    save_file(tiny.state_dict(), tmp_path / "open_clip_model.safetensors")
    guide = load_clip_guide(tmp_path)
    assert guide.embed_text(["a red star"]).shape == (1, 48)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json"):
        load_clip_guide(tmp_path)


def shapes_of(architecture: str) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return open_clip.CLIP(**open_clip.get_model_config(architecture)).state_dict()


@pytest.mark.parametrize(
    ("architecture", "path"),
    [
        ("ViT-B-32", "laion2b/open_clip_model.safetensors"),
        ("ViT-B-32-quickgelu", "openai/model.safetensors"),
        ("ViT-B-16", "vit-b-16-datacomp.safetensors"),
        ("ViT-L-14-quickgelu", "clip_vit_large_patch14.openai.safetensors"),
        ("ViT-H-14", "ViT-H-14-laion2b.bin"),
        ("RN50-quickgelu", "rn50-openai.safetensors"),
        ("RN50x4-quickgelu", "rn50x4-openai.safetensors"),
    ],
)
def test_auto_recognises_published_architectures(architecture: str, path: str):
    assert match_architecture(shapes_of(architecture), Path("clip_guidance") / path) == architecture


def test_auto_recognises_openais_layout_whatever_the_name():
    assert match_architecture(shapes_of("ViT-B-16"), Path("model.pt"), openai_layout=True) == "ViT-B-16-quickgelu"


def test_auto_asks_where_the_weights_do_not_tell():
    with pytest.raises(ValueError, match="ViT-B-32, ViT-B-32-quickgelu") as raised:
        match_architecture(shapes_of("ViT-B-32"), Path("models/clip_guidance/model.safetensors"))
    assert "set the architecture" in str(raised.value)


def test_a_missing_file_says_what_goes_where(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="clip_guidance"):
        load_clip_guide(tmp_path / "nothing.safetensors")


def test_unknown_and_unfitting_architectures_are_named(tiny: open_clip.CLIP, tmp_path: Path):
    save_file(tiny.state_dict(), tmp_path / "tiny.safetensors")
    with pytest.raises(ValueError, match=r"no architecture 'ViT-B16'.*ViT-B-16"):
        load_clip_guide(tmp_path / "tiny.safetensors", "ViT-B16")
    with pytest.raises(ValueError, match="does not hold the weights of 'ViT-S-32-alt'"):
        load_clip_guide(tmp_path / "tiny.safetensors", "ViT-S-32-alt")
    with pytest.raises(ValueError, match="tokenizer"):
        load_clip_guide(tmp_path / "tiny.safetensors", "ViT-B-16-SigLIP")


def test_weights_of_another_kind_are_refused_by_name(tmp_path: Path):
    big = torch.zeros(1000)
    save_file({"model.diffusion_model.input_blocks.0.0.weight": big}, tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match=r"unet.safetensors is not a CLIP.*model.diffusion_model"):
        load_clip_guide(tmp_path / "unet.safetensors")
    save_file({"vision_model.embeddings.class_embedding": big}, tmp_path / "hf.safetensors")
    with pytest.raises(ValueError, match="Transformers' layout"):
        load_clip_guide(tmp_path / "hf.safetensors")
    torch.save(list(range(1000)), tmp_path / "list.pt")
    with pytest.raises(ValueError, match="does not hold a state dict"):
        load_clip_guide(tmp_path / "list.pt")


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pt", "cut.bin"])
def test_truncated_files_are_refused_with_the_cure(tiny: open_clip.CLIP, tmp_path: Path, name: str):
    path = tmp_path / name
    save_file(tiny.state_dict(), path) if path.suffix == ".safetensors" else torch.save(tiny.state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"{name} .*Download the file again"):
        load_clip_guide(path)


def test_placeholders_and_other_files_are_refused(tmp_path: Path):
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 600000000\n")
    with pytest.raises(ValueError, match=r"only .* bytes long"):
        load_clip_guide(tmp_path / "pointer.safetensors")
    (tmp_path / "page.pt").write_text("<html>" + "not found " * 500)
    with pytest.raises(ValueError, match=r"page.pt"):
        load_clip_guide(tmp_path / "page.pt")


class Trap:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path):
    torch.save({"visual.conv1.weight": torch.zeros(1000), "trap": Trap(tmp_path / "sprung")}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil.pt was not opened.*run code"):
        load_clip_guide(tmp_path / "evil.pt")
    assert not (tmp_path / "sprung").exists()


def test_a_torchscript_archive_that_wants_to_run_code_is_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("evil/constants.pkl", pickle.dumps(()))
        archive.writestr("evil/data.pkl", pickle.dumps(Trap(tmp_path / "sprung")))
        archive.writestr("evil/padding", np.random.default_rng(0).bytes(2000))
    with pytest.raises(ValueError, match=r"evil.pt was not opened.*run code"):
        load_clip_guide(tmp_path / "evil.pt")
    assert not (tmp_path / "sprung").exists()


def test_a_demo_file_that_does_not_fit_its_description_is_refused(demo_file: Path, tokenizer, tmp_path: Path):
    config = demo_config(tokenizer)
    wrong = {**config, "embed_dim": 8}
    save_demo_clip(build_demo_clip(config), wrong, tokenizer, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match="does not fit its own description"):
        load_clip_guide(tmp_path / "wrong.safetensors")


# ---- prompts as ComfyUI's text encoders take them


@pytest.mark.parametrize(
    ("prompt", "plain"),
    [
        ("a (red:1.4) star", "a red star"),
        ("a ((red) striped:0.8) star", "a red striped star"),
        ("a (red star)", "a red star"),
        (r"a star \(red\)", "a star (red)"),
        ("a red star embedding:glow", "a red star "),
        ("a star (at 12:30", "a star (at 12:30"),
        ("a star (noon: bright)", "a star noon: bright"),
    ],
)
def test_a_guide_reads_the_words_of_a_weighted_prompt_alone_and_says_so(guide: ClipGuide, prompt: str, plain: str):
    torch.testing.assert_close(
        guide.embed_text([prompt]), guide.embed_text([plain.replace("(", "\\(").replace(")", "\\)")])
    )
    notes = [note for note in guide.notes([prompt]) if "reads no weights" in note]
    assert notes == (
        []
        if plain in (prompt, "a star (red)")
        else [f"The guide 'demo-vit' reads no weights and no embeddings: of '{prompt}' it reads '{plain}'."]
    )


def test_a_weighted_prompt_is_what_its_words_are(guide: ClipGuide):
    weighted, plain = guide.embed_text(["a (red:1.4) star", "a red star"])
    assert torch.equal(weighted, plain)


def test_what_is_lost_of_a_prompt_is_told_by_each_of_several_guides(guide: ClipGuide, demo_file: Path):
    from blendswap.models.clip.combined import CombinedGuide

    second = load_clip_guide(demo_file)
    second.name = "second"
    notes = CombinedGuide([(guide, 1.0), (second, 1.0)]).notes(["a red star " * 9, "a blue zebra circle"])
    for name in ("demo-vit", "second"):
        assert any(f"too long for '{name}': its last 13 tokens are dropped" in note for note in notes)
        assert f"The guide '{name}' does not know: zebra." in notes
    assert guide.notes(["a red star", ""]) == []
