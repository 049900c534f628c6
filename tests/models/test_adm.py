"""The ADM loader: the published network's numbers, files as users have them, and errors that say what is
wrong."""

from __future__ import annotations

import io
import json
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from blendswap.models.adm.config import read_adm_config
from blendswap.models.adm.convert import convert_adm_weights
from blendswap.models.adm.loading import load_guided_diffusion
from blendswap.models.adm.network import GuidedDiffusionUNet

REFERENCE = json.loads((Path(__file__).parent / "data" / "adm_reference.json").read_text(encoding="utf-8"))


# The recipe of the reference (see record_adm_reference.md) ------------------------------------------------


def published_shapes(spec: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published network's parameters for the settings in `spec`."""
    shapes: dict[str, tuple[int, ...]] = {}
    width, embedded = spec["channels"], 4 * spec["channels"]

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def residual(name: str, wide_in: int, wide_out: int) -> None:
        layer(f"{name}.in_layers.0", wide_in)
        layer(f"{name}.in_layers.2", wide_out, wide_in, 3, 3)
        layer(f"{name}.emb_layers.1", wide_out * (2 if spec["scale_shift"] else 1), embedded)
        layer(f"{name}.out_layers.0", wide_out)
        layer(f"{name}.out_layers.3", wide_out, wide_out, 3, 3)
        if wide_in != wide_out:
            layer(f"{name}.skip_connection", wide_out, wide_in, 1, 1)

    def attention(name: str, wide: int) -> None:
        layer(f"{name}.norm", wide)
        layer(f"{name}.qkv", 3 * wide, wide, 1)
        layer(f"{name}.proj_out", wide, wide, 1)

    layer("time_embed.0", embedded, width)
    layer("time_embed.2", embedded, embedded)
    if spec["classes"]:
        shapes["label_emb.weight"] = (spec["classes"], embedded)
    wides = [int(multiplier * width) for multiplier in spec["multipliers"]]
    last = len(wides) - 1
    current, index, skips = wides[0], 1, [wides[0]]
    layer("input_blocks.0.0", current, 3, 3, 3)
    for level, wide in enumerate(wides):
        for _ in range(spec["blocks"]):
            residual(f"input_blocks.{index}.0", current, wide)
            current = wide
            if level in spec["attention_levels"]:
                attention(f"input_blocks.{index}.1", wide)
            skips.append(wide)
            index += 1
        if level < last:
            if spec["resblock_updown"]:
                residual(f"input_blocks.{index}.0", wide, wide)
            else:
                layer(f"input_blocks.{index}.0.op", wide, wide, 3, 3)
            skips.append(wide)
            index += 1
    residual("middle_block.0", current, current)
    attention("middle_block.1", current)
    residual("middle_block.2", current, current)
    index = 0
    for level in range(last, -1, -1):
        for i in range(spec["blocks"] + 1):
            residual(f"output_blocks.{index}.0", current + skips.pop(), wides[level])
            current, place = wides[level], 1
            if level in spec["attention_levels"]:
                attention(f"output_blocks.{index}.1", current)
                place = 2
            if level and i == spec["blocks"]:
                if spec["resblock_updown"]:
                    residual(f"output_blocks.{index}.{place}", current, current)
                else:
                    layer(f"output_blocks.{index}.{place}.conv", current, current, 3, 3)
            index += 1
    layer("out.0", current)
    layer("out.2", 6 if spec["learn_sigma"] else 3, current, 3, 3)
    return shapes


def filled(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The value of a parameter: a function of its name and shape only (NumPy's frozen legacy generator)."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1:
        values = values / np.sqrt(np.prod(shape[1:]))
    else:
        # One-dimensional: a norm's weight is near 1, every bias near 0.
        values = 0.1 * values + float(name.endswith("weight"))
    return torch.from_numpy(values).float()


def published_weights(spec: dict) -> dict[str, torch.Tensor]:
    return {name: filled(name, shape) for name, shape in published_shapes(spec).items()}


def reference_input(case: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The recorded case's x [2, 3, S, S], timesteps [2], class labels [2] or None."""
    size = case["spec"]["image_size"]
    x = torch.from_numpy(np.random.RandomState(case["input_seed"]).standard_normal((2, 3, size, size))).float()
    labels = torch.tensor(case["labels"]) if case["labels"] else None
    return x, torch.tensor(case["timesteps"]), labels


CASES = pytest.mark.parametrize("case", REFERENCE["cases"], ids=[case["name"] for case in REFERENCE["cases"]])
SMALL = REFERENCE["cases"][0]["spec"]


@pytest.fixture(scope="module")
def small_weights() -> dict[str, torch.Tensor]:
    return published_weights(SMALL)


def load(path: Path, spec: dict = SMALL, **kwargs) -> GuidedDiffusionUNet:
    return load_guided_diffusion(path, head_channels=spec["head_channels"], image_size=spec["image_size"], **kwargs)


# The published network ------------------------------------------------------------------------------------


@CASES
@torch.no_grad()
def test_gives_the_published_networks_numbers(case: dict, tmp_path: Path) -> None:
    torch.save(published_weights(case["spec"]), tmp_path / "published.pt")
    network = load(tmp_path / "published.pt", case["spec"])
    x, t, labels = reference_input(case)
    eps, variance = network(x, t, labels)
    out = eps if variance is None else torch.cat([eps, variance], dim=1)
    assert list(out.shape) == case["shape"]
    got = out.flatten()[:: case["stride"]][: len(case["values"])]
    assert torch.allclose(got, torch.tensor(case["values"]), atol=1e-4, rtol=0)
    assert out.mean().item() == pytest.approx(case["mean"], abs=1e-4)
    assert out.std().item() == pytest.approx(case["std"], abs=1e-4)


@CASES
def test_reads_the_configuration_from_the_weights(case: dict) -> None:
    spec = case["spec"]
    config = read_adm_config(
        published_weights(spec), head_channels=spec["head_channels"], image_size=spec["image_size"]
    )
    assert config["block_out_channels"] == tuple(int(spec["channels"] * m) for m in spec["multipliers"])
    assert config["layers_per_block"] == spec["blocks"]
    levels = range(len(spec["multipliers"]))
    assert [i for i in levels if "Attn" in config["down_block_types"][i]] == spec["attention_levels"]
    assert config["num_class_embeds"] == (spec["classes"] or None)
    assert config["downsample_type"] == ("resnet" if spec["resblock_updown"] else "conv")


@pytest.mark.parametrize(
    ("multipliers", "attention_levels", "classes", "size"),
    [((1, 1, 2, 2, 4, 4), [3, 4, 5], 0, 256), ((0.5, 1, 1, 2, 2, 4, 4), [4, 5, 6], 1000, 512)],
)
def test_knows_the_published_sizes(multipliers, attention_levels, classes, size) -> None:
    spec = {
        "channels": 256,
        "multipliers": multipliers,
        "blocks": 2,
        "attention_levels": attention_levels,
        "classes": classes,
        "learn_sigma": True,
        "resblock_updown": True,
        "scale_shift": True,
    }
    weights = {name: torch.empty(shape, device="meta") for name, shape in published_shapes(spec).items()}
    config = read_adm_config(weights)
    with torch.device("meta"):
        network = GuidedDiffusionUNet(config)
    network.unet.load_state_dict(convert_adm_weights(weights, config), strict=True, assign=True)
    assert (network.image_size, network.size_multiple) == (size, 2 ** (len(multipliers) - 1))
    assert network.learned_variance and network.num_classes == (classes or None)
    assert sum(p.numel() for p in network.parameters()) == sum(w.numel() for w in weights.values())


def test_a_wrong_head_width_changes_the_result(small_weights, tmp_path: Path) -> None:
    torch.save(small_weights, tmp_path / "a.pt")
    case = REFERENCE["cases"][0]
    x, t, _ = reference_input(case)
    wrong = load_guided_diffusion(tmp_path / "a.pt", head_channels=64, image_size=32)
    with torch.no_grad():
        eps, _ = wrong(x, t)
    got = eps.flatten()[:: case["stride"]][:8]
    assert (got - torch.tensor(case["values"][:8])).abs().max() > 1e-3


def test_head_width_that_does_not_divide_is_named(small_weights) -> None:
    with pytest.raises(ValueError, match="head_channels 48 does not divide"):
        read_adm_config(small_weights, head_channels=48, image_size=32)


def test_unreadable_image_size_asks_for_the_dial(small_weights) -> None:
    with pytest.raises(ValueError, match="set image_size"):
        read_adm_config(small_weights, head_channels=32)


def test_super_resolution_checkpoint_is_refused(small_weights) -> None:
    weights = small_weights | {"input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3)}
    with pytest.raises(ValueError, match="super-resolution"):
        read_adm_config(weights, head_channels=32, image_size=32)


@pytest.mark.parametrize(("channels", "multipliers"), [(192, (1, 2, 3, 4)), (256, (1, 1, 2, 3, 4))])
def test_published_checkpoints_with_another_attention_are_refused(channels, multipliers) -> None:
    spec = {
        "channels": channels,
        "multipliers": multipliers,
        "blocks": 2,
        "attention_levels": [2, 3],
        "classes": 1000,
        "learn_sigma": True,
        "resblock_updown": True,
        "scale_shift": True,
    }
    weights = {name: torch.empty(shape, device="meta") for name, shape in published_shapes(spec).items()}
    with pytest.raises(ValueError, match="not supported"):
        read_adm_config(weights)


# Files ----------------------------------------------------------------------------------------------------
# --------


def test_safetensors_and_pickle_give_the_same_network(small_weights, tmp_path: Path) -> None:
    torch.save(small_weights, tmp_path / "a.pt")
    save_file(small_weights, tmp_path / "a.safetensors")
    first, second = load(tmp_path / "a.pt").state_dict(), load(tmp_path / "a.safetensors").state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_half_precision_files_stay_so_unless_asked(small_weights, tmp_path: Path) -> None:
    # As the published code's convert_to_fp16 leaves it: convolutions in half, the rest in single precision.
    half = {
        name: w.half() if w.ndim in (3, 4) and not name.startswith("out.") else w for name, w in small_weights.items()
    }
    torch.save(half, tmp_path / "half.pt")
    assert {p.dtype for p in load(tmp_path / "half.pt").parameters()} == {torch.float16}
    assert {p.dtype for p in load(tmp_path / "half.pt", dtype=torch.float32).parameters()} == {torch.float32}


def test_gradients_flow_when_loaded_under_inference_mode(small_weights, tmp_path: Path) -> None:
    torch.save(small_weights, tmp_path / "a.pt")
    with torch.inference_mode():
        network = load(tmp_path / "a.pt")
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    eps, _ = network(x, torch.tensor([500]))
    (gradient,) = torch.autograd.grad(eps.square().sum(), x)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def unshuffled_config() -> dict:
    return {
        "_class_name": "UNet2DModel",
        "sample_size": 32,
        "pixel_unshuffle": 2,
        "in_channels": 12,
        "out_channels": 24,
        "block_out_channels": [32, 32],
        "layers_per_block": 1,
        "attention_head_dim": 16,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "beta_schedule": "linear",
        "beta_start": 2e-4,
        "beta_end": 0.01,
    }


def make_folder(folder: Path, config: dict) -> GuidedDiffusionUNet:
    torch.manual_seed(0)
    network = GuidedDiffusionUNet(config)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(network.unet.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    return network.eval()


@torch.no_grad()
def test_diffusers_folder_with_pixel_unshuffle(tmp_path: Path) -> None:
    made = make_folder(tmp_path / "prior", unshuffled_config())
    network = load_guided_diffusion(tmp_path / "prior")
    assert (network.image_size, network.size_multiple, network.learned_variance) == (32, 4, True)
    assert network.betas[[0, -1]].tolist() == pytest.approx([2e-4, 0.01])
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([10, 900])
    eps, variance = network(x, t)
    assert eps.shape == variance.shape == x.shape
    assert torch.equal(eps, made(x, t)[0])
    # The same by hand: every 2×2 patch of the picture is one position of the network.
    patches = x.reshape(2, 3, 16, 2, 16, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 12, 16, 16)
    raw = made.unet(patches, t).sample[:, :12].reshape(2, 3, 2, 2, 16, 16)
    assert torch.allclose(eps, raw.permute(0, 1, 4, 2, 5, 3).reshape(2, 3, 32, 32), atol=1e-6)


def test_single_safetensors_file_with_its_config_in_the_metadata(tmp_path: Path) -> None:
    made = make_folder(tmp_path / "prior", unshuffled_config())
    file = tmp_path / "prior.safetensors"
    save_file(made.unet.state_dict(), file, metadata={"config": json.dumps(unshuffled_config())})
    assert load_guided_diffusion(file).size_multiple == 4
    assert load_guided_diffusion(file, image_size=64).image_size == 64


def test_image_size_of_a_config_is_in_pixels_of_the_picture(tmp_path: Path) -> None:
    # UNet2DModel's own sample_size may be what the network sees: pixels after unshuffling.
    make_folder(tmp_path / "prior", unshuffled_config() | {"sample_size": 16, "image_size": 32})
    assert load_guided_diffusion(tmp_path / "prior").image_size == 32


def test_weights_of_an_early_diffusers_version(tmp_path: Path) -> None:
    made = make_folder(tmp_path / "prior", unshuffled_config())
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = made.unet.state_dict()
    for new, name in old.items():
        weights = {key.replace(f".{new}.", f".{name}."): value for key, value in weights.items()}
    save_file(weights, tmp_path / "prior" / "diffusion_pytorch_model.safetensors")
    network = load_guided_diffusion(tmp_path / "prior")
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), made.parameters(), strict=True))


def test_a_picture_of_a_size_the_network_cannot_take(tmp_path: Path) -> None:
    make_folder(tmp_path / "prior", unshuffled_config())
    network = load_guided_diffusion(tmp_path / "prior")
    with pytest.raises(ValueError, match=r"multiples of 4 pixels.*got 30 × 32"):
        network(torch.zeros(1, 3, 32, 30), torch.tensor([5]))


def test_class_labels_where_they_belong(tmp_path: Path, small_weights) -> None:
    case = next(case for case in REFERENCE["cases"] if case["spec"]["classes"])
    torch.save(published_weights(case["spec"]), tmp_path / "classes.pt")
    torch.save(small_weights, tmp_path / "plain.pt")
    x, t = torch.zeros(1, 3, 32, 32), torch.tensor([5])
    with pytest.raises(ValueError, match="needs class_labels"):
        load(tmp_path / "classes.pt", case["spec"])(x, t)
    with pytest.raises(ValueError, match="takes no class_labels"):
        load(tmp_path / "plain.pt")(x, t, torch.tensor([0]))


# Files that are not what they should be -------------------------------------------------------------------


class Touch:
    """What a malicious pickle does: run a function of its choice."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_that_wants_to_run_code_is_not_run(tmp_path: Path) -> None:
    witness = tmp_path / "it_ran"
    torch.save({"time_embed.0.weight": Touch(witness)}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt holds Python objects besides tensors"):
        load(tmp_path / "evil.pt")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Touch(witness), protocol=2))
    with pytest.raises(ValueError, match=r"evil\.pth"):
        load(tmp_path / "evil.pth")
    assert not witness.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 7, 1000, -1000])
def test_a_truncated_file_is_named(small_weights, tmp_path: Path, suffix: str, kept: int) -> None:
    file = tmp_path / f"whole{suffix}"
    torch.save(small_weights, file) if suffix == ".pt" else save_file(small_weights, file)
    part = tmp_path / f"part{suffix}"
    part.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"part\.\w+ \([\d,]+ bytes\) cannot be read"):
        load(part)


def test_a_truncated_file_of_the_old_format_is_named(small_weights, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(small_weights, buffer, _use_new_zipfile_serialization=False)
    (tmp_path / "old.pt").write_bytes(buffer.getvalue())
    assert load(tmp_path / "old.pt").image_size == 32
    (tmp_path / "part.pt").write_bytes(buffer.getvalue()[:-5000])
    with pytest.raises(ValueError, match=r"part\.pt .*cannot be read"):
        load(tmp_path / "part.pt")


def test_a_web_page_saved_as_a_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "page.pt").write_text("<!DOCTYPE html><html>Not found</html>", encoding="utf-8")
    with pytest.raises(ValueError, match=r"page\.pt .*cannot be read"):
        load(tmp_path / "page.pt")


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "Stable Diffusion"),
        ("input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight", "latent diffusion"),
        ("visual.conv1.weight", "CLIP"),
        ("text_model.embeddings.token_embedding.weight", "CLIP"),
        ("lora_unet_down_blocks_0.lora_up.weight", "LoRA"),
        ("encoder.down.0.block.0.conv1.weight", "VAE"),
        ("features.0.weight", "image classifier"),
        ("input_blocks.0.0.weight", "ADM classifier"),
        ("down_blocks.0.resnets.0.conv1.weight", "without its config.json"),
        ("anything", "something else"),
    ],
)
def test_another_kind_of_model_is_named(tmp_path: Path, key: str, kind: str) -> None:
    save_file({key: torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=rf"other\.safetensors is .*{kind}.*Here belongs an ADM checkpoint"):
        load(tmp_path / "other.safetensors")


def test_a_checkpoint_with_weights_missing_or_too_many(small_weights, tmp_path: Path) -> None:
    less = {name: w for name, w in small_weights.items() if name != "middle_block.0.out_layers.3.weight"}
    torch.save(less, tmp_path / "less.pt")
    with pytest.raises(ValueError, match=r"less\.pt: its weights do not fit"):
        load(tmp_path / "less.pt")
    torch.save(small_weights | {"extra.weight": torch.zeros(1)}, tmp_path / "more.pt")
    with pytest.raises(ValueError, match=r"more\.pt: the weight extra\.weight has no place"):
        load(tmp_path / "more.pt")
    half = {name: w for name, w in small_weights.items() if not name.startswith("output_blocks.5")}
    torch.save(half, tmp_path / "half.pt")
    with pytest.raises(ValueError, match=r"half\.pt: its \d+ input and \d+ output blocks"):
        load(tmp_path / "half.pt")


def test_files_and_folders_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt does not exist.*Here belongs"):
        load(tmp_path / "nothing.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config.json"):
        load(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text(json.dumps(unshuffled_config()), encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="no weights"):
        load(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("hello", encoding="utf-8")
    with pytest.raises(ValueError, match=r"notes\.txt ends in \.txt"):
        load(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "describes a UNet2DConditionModel"),
        ({"in_channels": 4}, "channels in"),
        ({"sample_size": None}, "sample_size"),
        ({"beta_schedule": "scaled_linear"}, "beta_schedule"),
        ({"prediction_type": "sample"}, "prediction_type"),
        ({"time_embedding_type": "fourier"}, "timesteps"),
        ({"layers_per_block": 2}, "weights do not fit"),
        ({"block_out_channels": [32]}, "not one this loader can build"),
    ],
)
def test_a_folder_whose_config_is_not_ours(tmp_path: Path, change: dict, message: str) -> None:
    make_folder(tmp_path / "prior", unshuffled_config())
    (tmp_path / "prior" / "config.json").write_text(json.dumps(unshuffled_config() | change), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_guided_diffusion(tmp_path / "prior")
