"""FID, KID and IS from images on: equal to torch-fidelity's, and in the right order on digits."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metrics.base import Entry
from metrics.features import INCEPTION, Extractor, load_inception
from tests.scored import CPU, real_images_of, real_sets, score
from utils.images import to_rgb

ALL = ("fid", "kid", "is")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def metrics_of(
    extractor: Extractor, generated: Tensor, real: Tensor, *names: str, **options: int
) -> dict[str, Entry]:
    sets = real_sets(real_images_of(real, size=options.get("size", 64)))
    return score(names, generated, real=sets, networks={INCEPTION: extractor}, **options)


# --- torch-fidelity


def random_inception(path: Path) -> None:
    """Write weights of the right shapes, drawn with a fixed seed (no download)."""
    import torch_fidelity.feature_extractor_inceptionv3 as module

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    generator = rng()
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, generator=generator)
    # Logits far enough apart for a score well above 1, to which weak ones always come near.
    torch.nn.init.normal_(network.fc.weight, generator=generator)
    torch.nn.init.zeros_(network.fc.bias)
    torch.save(network.state_dict(), path)


@pytest.fixture(scope="module")
def weights_path(tmp_path_factory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    random_inception(path)
    yield path
    path.unlink()  # 96 MB


def patches(count: int, shape: tuple[int, int, int], *, contrast: float, seed: int) -> Tensor:
    """uint8 (count, *shape): random 4 x 4 patches, each picture with a contrast of its own."""
    channels, *size = shape
    colours = torch.rand(count, channels, 4, 4, generator=rng(seed)) - 0.5
    contrasts = contrast * torch.rand(count, 1, 1, 1, generator=rng(seed + 1))
    return (255 * (0.5 + contrasts * F.interpolate(colours, size))).to(torch.uint8)


class Pictures(torch.utils.data.Dataset):
    """What torch-fidelity takes for input: uint8 (3, H, W) per item."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index].expand(3, -1, -1)


def torch_fidelity_metrics(
    path: Path, layer: str, generated: Tensor, real: Tensor
) -> dict[str, float]:
    import torch_fidelity

    return torch_fidelity.calculate_metrics(
        input1=Pictures(generated), input2=Pictures(real), fid=True, kid=True, isc=True,
        feature_layer_fid=layer, feature_layer_kid=layer,
        kid_subset_size=min(len(generated), len(real)), feature_extractor_weights_path=str(path),
        cuda=False, batch_size=8, verbose=False, cache=False, save_cpu_ram=True,
    )  # fmt: skip


def remembering(extractor: Extractor, *sets: Tensor) -> Extractor:
    """What it says of these images, for which it runs only once."""
    known: dict[bytes, tuple[Tensor, ...]] = {}
    for batch in itertools.chain(*(images.split(7) for images in sets)):
        rows = zip(*extractor(batch), strict=True)
        known.update(zip(map(key, to_rgb(batch)), rows, strict=True))

    def extract(images: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.stack, zip(*(known[key(image)] for image in images), strict=True)))

    return dataclasses.replace(extractor, extract=extract)


def key(image: Tensor) -> bytes:
    return image.numpy().tobytes()


class Pair(NamedTuple):
    """The same images and weights for both sides."""

    extractor: Extractor
    generated: Tensor
    real: Tensor
    expected: dict[str, float]  # of torch-fidelity


def make_pair(
    path: Path, layer: str, *, shape: tuple[int, int, int], counts: tuple[int, int]
) -> Pair:
    generated = patches(counts[0], shape, contrast=1.0, seed=1)
    real = patches(counts[1], shape, contrast=0.3, seed=3)
    expected = torch_fidelity_metrics(path, layer, generated, real)
    extractor = remembering(load_inception(path, CPU, layer=layer), generated, real)
    return Pair(extractor, generated, real, expected)


def check_equal(pair: Pair, **options: int) -> None:
    found = metrics_of(pair.extractor, pair.generated, pair.real, *ALL, **options)
    expected = pair.expected
    assert found["fid"]["value"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    assert found["fid"]["value"] > 0.1
    for name, key, smallest in (
        ("kid", "kernel_inception_distance", 0),
        ("is", "inception_score", 1),
    ):
        above = found[name]["value"] - smallest
        assert above == pytest.approx(expected[f"{key}_mean"] - smallest, rel=1e-4)
        assert above > 1e-3
        assert found[name]["std"] == pytest.approx(expected[f"{key}_std"], rel=1e-4)
        assert found[name]["std"] > 1e-3


# At 75 pixels the network takes a fifteenth of the time, so there the covariances have full rank.
@pytest.fixture(scope="module", params=[(299, (12, 9)), (75, (90, 70))], ids=["few", "many"])
def pair(request, weights_path) -> Pair:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    size, counts = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", size)
        return make_pair(weights_path, "64", shape=(3, 32, 32), counts=counts)


# Of 16 processes some see none of the 12 or 9 images.
@pytest.mark.parametrize(("world_size", "size"), [(1, 64), (3, 4), (16, 3)])
def test_all_equal_torch_fidelity_on_64_features(pair, world_size, size):
    check_equal(pair, world_size=world_size, size=size)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(900)
def test_all_equal_torch_fidelity_on_grey_images_and_the_2048_features(weights_path):
    pair = make_pair(weights_path, "2048", shape=(1, 28, 28), counts=(32, 24))
    for world_size, size in ((1, 16), (3, 5)):
        check_equal(pair, world_size=world_size, size=size)


def test_fid_of_a_set_with_itself_is_zero_and_never_below(pair):
    """Exactly so up to the root of the rounding error; see `Frechet`."""
    same = metrics_of(pair.extractor, pair.real, pair.real, "fid", world_size=2, size=4)["fid"]
    assert same["value"] == max(0, same["raw"])
    assert abs(same["raw"]) < 1e-5 * pair.expected["frechet_inception_distance"]


@pytest.mark.slow
@pytest.mark.ci
def test_sfid_is_of_the_first_channels_of_the_seventh_block_and_0_of_a_set_with_itself(
    weights_path,
):
    extractor, images = (
        load_inception(weights_path, CPU),
        patches(6, (3, 32, 32), contrast=1, seed=1),
    )
    network, blocks = extractor.extract.__closure__, []
    network = next(
        cell.cell_contents for cell in network if hasattr(cell.cell_contents, "Mixed_6d")
    )
    network.Mixed_6d.register_forward_hook(lambda *call: blocks.append(call[-1]))
    *_, found = extractor(images)
    (block,) = blocks  # (6, 768, 17, 17); ADM flattens TensorFlow's (17, 17, 7)
    assert found.view(6, 17, 17, 7).equal(block[:, :7].permute(0, 2, 3, 1))
    assert found.std() > 0
    same = metrics_of(remembering(extractor, images), images, images, "sfid")["sfid"]
    assert abs(same["raw"]) < 1e-5 * found.square().sum(1).mean().item()


# --- real digits through a small random network


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """uint8 (1797, 1, 8, 8) in random order."""
    from sklearn.datasets import load_digits

    images = (torch.tensor(load_digits().images) * 15.9).round().to(torch.uint8)
    return images[torch.randperm(len(images), generator=rng())][:, None]


def small_network(dim: int = 32) -> Extractor:
    """Two random convolutions with ReLU and the mean over the pixels."""
    first = torch.randn(16, 3, 3, 3, generator=rng(1)) * (2 / 27) ** 0.5
    second = torch.randn(dim, 16, 3, 3, generator=rng(2)) * (2 / 144) ** 0.5

    def extract(images: Tensor) -> tuple[Tensor, Tensor]:
        x = (images.float() - 128) / 128
        x = F.conv2d(F.conv2d(x, first).relu(), second).relu().mean((2, 3))
        return x, x

    return Extractor(extract, {"features": dim, "logits": dim})


def fid_of(generated: Tensor, real: Tensor) -> float:
    return metrics_of(small_network(), generated, real, "fid", size=64)["fid"]["value"]


def test_fid_of_two_halves_of_real_digits_is_far_below_that_of_noise(digits):
    one, other = digits[:898], digits[898:]
    noise = torch.randint(0, 256, one.shape, generator=rng(), dtype=torch.uint8)
    order = torch.rand(len(other), 64, generator=rng()).argsort(1)
    shuffled = other.flatten(1).gather(1, order).view_as(other)  # the very same pixel values
    halves = fid_of(other, one)
    assert 0 < halves < fid_of(shuffled, one) / 100
    assert halves < fid_of(noise, one) / 100


def test_fid_grows_with_the_share_of_noise(digits):
    one, other = digits[:898], digits[898:].float()
    noise = 255 * torch.rand(other.shape, generator=rng())
    shares = (0, 0.1, 0.2, 0.4, 0.8)
    distances = [fid_of(torch.lerp(other, noise, s).to(torch.uint8), one) for s in shares]
    assert distances == sorted(distances)
    assert distances[1] > 2 * distances[0]


def test_fid_of_equal_sources_falls_with_the_number_of_images(digits):
    """Its bias goes as 1 / N: why counts stand in the metric's name."""
    few, more = (fid_of(digits[:n], digits[n : 2 * n]) for n in (100, 800))
    assert 4 < few / more < 12
