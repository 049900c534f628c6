"""LPIPS from local backbone files, in torchvision's naming and as the demo's own."""

from __future__ import annotations

from pathlib import Path

import lpips
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from blendswap.models.lpips import BACKBONE_FILES, DemoBackbone, Perceptual, save_demo_backbone


def pictures(height: int = 64, width: int = 64, count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(count, 3, height, width, generator=generator) * 2 - 1
    return first, (first + 0.3 * torch.randn(first.shape, generator=generator)).clamp(-1, 1)


@pytest.fixture(scope="module")
def squeeze_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as torchvision publishes it, of random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lpips") / BACKBONE_FILES["squeeze"]
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def demo_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("demo") / "model.safetensors"
    save_demo_backbone(DemoBackbone(), path)
    return path


def test_a_published_backbone_is_read_into_the_lpips_package(squeeze_file: Path):
    perceptual = Perceptual("squeeze", squeeze_file)
    reference = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    whole = torch.load(squeeze_file, weights_only=True)
    for slice_name, layers in reference.net.named_children():
        for number, layer in layers.named_children():
            prefix = f"features.{number}."
            layer.load_state_dict({k.removeprefix(prefix): v for k, v in whole.items() if k.startswith(prefix)})
        assert slice_name.startswith("slice")
    first, second = pictures()
    torch.testing.assert_close(perceptual(first, second), reference(first, second).flatten())
    assert perceptual.name == "lpips-squeeze"


def test_the_learned_linear_weights_of_the_package_are_in_use(squeeze_file: Path):
    path = Path(lpips.__file__).parent / "weights/v0.1/squeeze.pth"
    weights = torch.load(path, map_location="cpu", weights_only=True)
    network = Perceptual("squeeze", squeeze_file).network
    torch.testing.assert_close(network.lin0.model[1].weight, weights["lin0.model.1.weight"])


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_the_other_backbones_name_the_layers_that_torchvisions_files_have(backbone: str):
    network = lpips.LPIPS(net=backbone, pnet_rand=True, verbose=False).net
    builder = {"alex": torchvision.models.alexnet, "vgg": torchvision.models.vgg16}[backbone]
    with torch.device("meta"):
        published = builder(weights=None).state_dict()
    for key, value in network.state_dict().items():
        assert published["features." + key.split(".", 1)[1]].shape == value.shape


@pytest.mark.parametrize("kind", ["squeeze", "demo"])
def test_equal_pictures_have_no_distance_and_others_have(kind: str, squeeze_file: Path, demo_file: Path):
    perceptual = Perceptual(kind, {"squeeze": squeeze_file, "demo": demo_file}[kind])
    first, second = pictures()
    assert perceptual(first, first).abs().max() == 0
    assert (perceptual(first, second) > 0).all()
    torch.testing.assert_close(perceptual(first, second[:1])[0], perceptual(first, second)[0])


@pytest.mark.parametrize("kind", ["squeeze", "demo"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 200), (31, 33)])
def test_pictures_of_any_size_are_taken_with_gradients(
    kind: str, squeeze_file: Path, demo_file: Path, height: int, width: int
):
    perceptual = Perceptual(kind, {"squeeze": squeeze_file, "demo": demo_file}[kind])
    first, second = pictures(height, width, 1)
    first.requires_grad_()
    distance = perceptual(first, second)
    distance.sum().backward()
    assert distance.shape == (1,) and torch.isfinite(distance).all()
    assert torch.isfinite(first.grad).all() and first.grad.abs().sum() > 0


def test_it_gives_gradients_when_loaded_in_inference_mode(squeeze_file: Path):
    with torch.inference_mode():
        perceptual = Perceptual("squeeze", squeeze_file)
    first, second = pictures()
    first.requires_grad_()
    perceptual(first, second).sum().backward()
    assert first.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in perceptual.parameters())


def test_the_demo_backbone_comes_back_as_it_was_saved(tmp_path: Path):
    backbone = DemoBackbone((8, 8, 16, 16, 24))
    backbone.train()(torch.randn(8, 3, 32, 32))
    save_demo_backbone(backbone, tmp_path / "model.safetensors")
    perceptual = Perceptual("demo", tmp_path / "model.safetensors")
    assert perceptual.name == "lpips-demo"
    first, _ = pictures()
    maps = perceptual.network.net.features(first)
    assert [m.shape[1:] for m in maps] == [(8, 64, 64), (8, 32, 32), (16, 16, 16), (16, 8, 8), (24, 8, 8)]
    for one, other in zip(maps, backbone.eval().features(first), strict=True):
        torch.testing.assert_close(one, other, atol=0.01, rtol=0.01)
    assert backbone.pooled(first).shape == (2, 24)


@pytest.mark.parametrize("backbone", [*BACKBONE_FILES, "demo"])
def test_a_missing_file_says_which_file_goes_where(backbone: str, tmp_path: Path):
    with pytest.raises(FileNotFoundError) as raised:
        Perceptual(backbone, tmp_path / "nothing.pth")
    expected = "demo/models/lpips" if backbone == "demo" else BACKBONE_FILES[backbone]
    assert expected in str(raised.value)
    assert backbone == "demo" or "models/lpips" in str(raised.value)


def test_wrong_files_are_refused_with_the_cure(squeeze_file: Path, demo_file: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"is not torchvision's alexnet-owt-7be5be79.pth"):
        Perceptual("alex", squeeze_file)
    with pytest.raises(ValueError, match=r"unknown. Choose one of alex, vgg, squeeze, demo"):
        Perceptual("resnet", squeeze_file)
    cut = tmp_path / BACKBONE_FILES["squeeze"]
    cut.write_bytes(squeeze_file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"squeezenet1_1-b8a52dc0.pth .*download"):
        Perceptual("squeeze", cut)
    save_file({"x": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a demo LPIPS backbone"):
        Perceptual("demo", tmp_path / "other.safetensors")


def test_pictures_of_different_sizes_are_refused(demo_file: Path):
    with pytest.raises(ValueError, match="one size"):
        Perceptual("demo", demo_file)(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 40))
