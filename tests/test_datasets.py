"""Data sets: what they hold, and that every fault is one line that names the file or folder."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import (
    DATASETS,
    SPLITS,
    build_dataset,
    check_config,
    default_flip,
    has_test_split,
    native_spec,
)
from datasets.base import ImageSpec
from datasets.storage import MAX_PIXELS, decode_image, fit_arrays, read_size
from datasets.synthetic import CLASS_NAMES, draw_shapes
from utils.config import Config
from utils.errors import DataError
from utils.images import to_float, to_uint8

SIZES = {"native": None, "square": (16, 16), "tall": (12, 8)}


def config(**values: Any) -> Config:
    return Config(**{"experiment_name": "test", **values})


def write_image(
    path: Path, size: tuple[int, int] = (8, 8), mode: str = "RGB", seed: int = 0
) -> Path:
    """A random image; `size` is (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = size if mode == "L" else (*size, len(mode))
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels, mode).save(path)
    return path


def write_mnist(root: Path, name: str = "MNIST") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    content = {}
    for split, prefix, count in (("train", "train", 23), ("test", "t10k", 7)):
        rng = np.random.default_rng(count)
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">II", 0x801, count)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
        content[split] = images, labels
    return content


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, num_classes: int) -> None:
    """Files of the true layout and invented content, which only the checksums could tell."""
    from torchvision.datasets import CIFAR10, CIFAR100

    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    dataset_class = CIFAR10 if num_classes == 10 else CIFAR100
    folder = root / dataset_class.base_folder
    folder.mkdir(parents=True)
    key = "labels" if num_classes == 10 else "fine_labels"
    for name, _ in (*dataset_class.train_list, *dataset_class.test_list):
        pixels = np.random.default_rng(len(name)).integers(0, 256, (4, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, key: [0, 1, 2, 3]}))
    names = {dataset_class.meta["key"]: [f"class{i}" for i in range(num_classes)]}
    (folder / dataset_class.meta["filename"]).write_bytes(pickle.dumps(names))


def write_celeba(root: Path) -> None:
    lines = []
    for i in range(9):
        write_image(root / "celeba" / "img_align_celeba" / f"{i:06d}.jpg", (218, 178), seed=i)
        lines.append(f"{i:06d}.jpg {i % 3}")
    (root / "celeba" / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")


def write_custom(root: Path) -> None:
    for split in SPLITS:
        for name in ("cat", "dog"):
            for i in range(3):
                write_image(root / split / name / f"{i}.png", seed=i)


@pytest.fixture
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`prepare(name)`: a folder that holds a tiny data set of that name."""

    def prepare(name: str) -> Path:
        root = tmp_path / "data"
        if name in ("mnist", "fashionmnist"):
            write_mnist(root, {"mnist": "MNIST", "fashionmnist": "FashionMNIST"}[name])
        elif name in ("cifar10", "cifar100"):
            write_cifar(root, monkeypatch, int(name.removeprefix("cifar")))
        elif name == "celeba":
            write_celeba(root)
        elif name == "custom":
            write_custom(root)
        return root

    return prepare


def assert_data_error(build, *parts: str | Path) -> str:
    """`build()` raises a one-line DataError that holds all `parts`."""
    with pytest.raises(DataError) as caught:
        build()
    message = str(caught.value)
    assert message.isprintable()
    assert len(message.splitlines()) == 1
    for part in parts:
        assert str(part) in message
    return message


# --- all data sets


@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset_meets_the_contract(name, data_root):
    root = data_root(name)
    for image_size in SIZES.values():
        for image_channels in (None, 1, 3):
            settings = config(
                dataset=name,
                data_root=str(root),
                image_size=image_size,
                image_channels=image_channels,
            )
            if image_size and image_channels:
                continue
            built = {split: build_dataset(settings, split) for split in SPLITS}
            assert built["train"].fingerprint != built["test"].fingerprint
            for dataset in built.values():
                assert dataset.spec == (native_spec(settings) or dataset.spec)
                assert dataset.spec == built["train"].spec
                assert len(dataset) == len(dataset.labels) > 0
                assert dataset.labels.dtype == torch.int64
                assert len(dataset.class_names) == dataset.spec.num_classes
                assert dataset.labels.min() >= 0
                assert dataset.labels.max() < max(1, dataset.spec.num_classes)
                if image_size:
                    assert dataset.spec.shape[1:] == image_size
                if image_channels:
                    assert dataset.spec.channels == image_channels
                for i in (0, len(dataset) - 1):
                    image, label = dataset[i]
                    assert image.dtype == torch.uint8
                    assert image.shape == dataset.spec.shape
                    assert label == dataset.labels[i]
                    assert type(label) is int


@pytest.mark.parametrize("name", ["digits", "synthetic", "custom"])
def test_building_twice_gives_the_same(name, data_root):
    settings = config(dataset=name, data_root=str(data_root(name)))
    first, second = build_dataset(settings), build_dataset(settings)
    assert first.fingerprint == second.fingerprint
    assert all(torch.equal(first[i][0], second[i][0]) for i in range(len(first)))


def test_channel_conversion():
    grey = build_dataset(config(dataset="digits"))
    rgb = build_dataset(config(dataset="digits", image_channels=3))
    assert torch.equal(rgb.images, grey.images.expand(-1, 3, -1, -1))
    shapes = build_dataset(config(dataset="synthetic")).images[:20]
    luminance = build_dataset(config(dataset="synthetic", image_channels=1)).images[:20]
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    expected = (shapes * weights).sum(1, keepdim=True)
    assert (luminance - expected).abs().max() <= 1


def test_a_read_only_folder_is_enough(data_root):
    root = data_root("mnist")
    for path in (root / "MNIST" / "raw", root / "MNIST", root):
        path.chmod(0o555)
    try:
        assert len(build_dataset(config(dataset="mnist", data_root=str(root)))) == 23
    finally:
        for path in (root, root / "MNIST", root / "MNIST" / "raw"):
            path.chmod(0o755)


def test_8_bit_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels)


# --- built in


def test_digits_split_is_disjoint_stratified_and_complete():
    from sklearn.datasets import load_digits

    train, test = (build_dataset(config(dataset="digits"), split) for split in SPLITS)
    assert train.spec == (1, 8, 8, 10)
    assert (len(train), len(test)) == (1442, 355)
    share = test.labels.bincount() / (test.labels.bincount() + train.labels.bincount())
    assert share.sub(0.2).abs().max() < 0.01
    source = load_digits()
    scaled = torch.from_numpy(np.rint(source.images * 255 / 16).astype(np.uint8))
    assert scaled.max() == 255

    def rows(images, labels):
        return sorted((i.tobytes(), int(y)) for i, y in zip(images.numpy(), labels, strict=True))

    together = torch.cat([train.images, test.images])[:, 0]
    labels = torch.cat([train.labels, test.labels])
    assert rows(together, labels) == rows(scaled, source.target)


def test_mnist_reads_the_raw_files(tmp_path):
    content = write_mnist(tmp_path)
    for split, (images, labels) in content.items():
        dataset = build_dataset(config(dataset="mnist", data_root=str(tmp_path)), split)
        assert np.array_equal(dataset.images[:, 0].numpy(), images)
        assert np.array_equal(dataset.labels.numpy(), labels)


def test_damaged_mnist_names_the_folder(tmp_path):
    write_mnist(tmp_path)
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:1000])
    settings = config(dataset="mnist", data_root=str(tmp_path))
    assert_data_error(lambda: build_dataset(settings), file.parent, "damaged", file.name)


@pytest.mark.parametrize("name", ["mnist", "fashionmnist", "cifar10", "cifar100", "celeba"])
def test_a_failed_download_says_which_files_go_where(name, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no\nnetwork")

    for module, function in (
        ("mnist", "download_and_extract_archive"),
        ("cifar", "download_and_extract_archive"),
        ("celeba", "download_file_from_google_drive"),
    ):
        monkeypatch.setattr(f"torchvision.datasets.{module}.{function}", no_network)
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://nowhere.invalid/"])
    files = {
        "mnist": ["MNIST/raw", "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"],
        "fashionmnist": ["FashionMNIST/raw", "train-images-idx3-ubyte"],
        "cifar10": ["cifar-10-batches-py", "data_batch_1", "test_batch", "batches.meta"],
        "cifar100": ["cifar-100-python", "train", "test", "meta"],
        "celeba": ["celeba", "img_align_celeba", "list_eval_partition.txt", "dataset='custom'"],
    }[name]
    root = tmp_path / "new" / "data"
    settings = config(dataset=name, data_root=str(root))
    assert_data_error(lambda: build_dataset(settings), "no network", root, name, *files)
    assert not list(tmp_path.iterdir())


def test_celeba_crops_the_centre_and_keeps_the_splits(data_root):
    root = data_root("celeba")
    settings = config(dataset="celeba", data_root=str(root), image_size=178)
    dataset = build_dataset(settings)
    assert dataset.names == ["000000.jpg", "000003.jpg", "000006.jpg"]
    with Image.open(root / "celeba" / "img_align_celeba" / "000003.jpg") as image:
        expected = np.asarray(image)[20:198].transpose(2, 0, 1)
    assert np.array_equal(dataset[1][0].numpy(), expected)
    partition = root / "celeba" / "list_eval_partition.txt"
    partition.write_text("000000.jpg 0\n../x.jpg 0\n")
    assert_data_error(lambda: build_dataset(settings), f"{partition}:2", "../x.jpg")
    partition.write_text("000000.jpg 0\nmissing.jpg 0\n")
    assert_data_error(lambda: build_dataset(settings), "missing.jpg")


# --- synthetic


@pytest.mark.parametrize("label", range(len(CLASS_NAMES)))
def test_shapes_are_antialiased_and_scale_with_the_size(label):
    draws = np.random.default_rng(0).random((4, 9))
    small, large = (draw_shapes(label, draws, size, size) for size in (16, 64))
    pooled = large.reshape(4, 16, 4, 16, 4, 3).mean((2, 4))
    assert np.abs(pooled - small).mean() < 2.5
    assert len(np.unique(large[0].reshape(-1, 3), axis=0)) > 2 or label == 1


@pytest.mark.parametrize("label", range(len(CLASS_NAMES)))
def test_shapes_are_never_cut_off(label):
    """Wherever a shape lies it covers the same area."""
    places = [(radius, y, x) for radius in (0, 0.99) for y in (0, 0.5, 1) for x in (0, 0.5, 1)]
    draws = np.array([[*place, 1, 1, 1, 0, 0, 0] for place in places])
    area = draw_shapes(label, draws, 48, 32).sum((1, 2, 3), dtype=np.int64).reshape(2, 9)
    assert (np.ptp(area, axis=1) < 0.03 * area.mean(1)).all()  # antialiasing is no exact area


def test_shapes_differ():
    dataset = build_dataset(config(dataset="synthetic"))
    assert len({dataset[i][0].numpy().tobytes() for i in range(len(dataset))}) == len(dataset)
    wide = build_dataset(config(dataset="synthetic", image_size=(8, 20)))
    assert wide.spec == (3, 8, 20, 6)


# --- decoding


def test_centre_crop_never_stretches(tmp_path):
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[:, :20], pixels[:, 20:80], pixels[:, 80:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    image = decode_image(path, ImageSpec(3, 30, 30, 0))
    assert image.shape == (3, 30, 30)
    inner = image[:, :, 2:-2]  # at its edges bicubic sees two pixels of what was cut off
    assert (inner == torch.tensor([0, 255, 0])[:, None, None]).all()
    tall = decode_image(path, ImageSpec(3, 60, 20, 0))
    assert (tall == torch.tensor([0, 255, 0])[:, None, None]).all()
    full = decode_image(path, ImageSpec(3, 60, 100, 0))
    assert np.array_equal(full.permute(1, 2, 0).numpy(), pixels)


def test_downscaling_is_antialiased():
    checkers = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[None]
    small = fit_arrays(checkers, (16, 16), None)
    assert small.float().sub(127.5).abs().max() < 8


def test_every_mode_is_read(tmp_path):
    spec = ImageSpec(3, 4, 4, 0)

    def first_pixel(image: Image.Image, suffix: str = ".png", **options) -> list[int]:
        path = tmp_path / f"image{suffix}"
        image.save(path, **options)
        assert read_size(path) == (4, 4)
        grey = decode_image(path, spec._replace(channels=1))
        rgb = decode_image(path, spec)
        assert grey.shape == (1, 4, 4)
        assert rgb.shape == (3, 4, 4)
        return rgb[:, 0, 0].tolist()

    size = (4, 4)
    assert first_pixel(Image.new("L", size, 77)) == [77] * 3
    assert first_pixel(Image.new("1", size, 1)) == [255] * 3
    assert first_pixel(Image.new("RGB", size, (1, 2, 3)), ".bmp") == [1, 2, 3]
    assert first_pixel(Image.new("RGB", size, (1, 2, 3)), ".webp", lossless=True) == [1, 2, 3]
    assert first_pixel(Image.new("RGBA", size, (10, 20, 30, 0))) == [255] * 3
    assert first_pixel(Image.new("RGBA", size, (10, 20, 30, 255))) == [10, 20, 30]
    assert first_pixel(Image.new("LA", size, (0, 128))) == [127] * 3
    palette = Image.new("RGB", size, (9, 8, 7)).quantize(4)
    assert first_pixel(palette) == [9, 8, 7]
    assert first_pixel(palette, transparency=palette.getpixel((0, 0))) == [255] * 3
    sixteen = Image.fromarray(np.full(size, 0x1234, np.uint16))
    assert first_pixel(sixteen) == [0x12] * 3
    cmyk = first_pixel(Image.new("CMYK", size, (0, 255, 255, 0)), ".jpg")
    assert cmyk[0] > 240
    assert max(cmyk[1:]) < 15
    frames = [Image.new("RGB", size, (i, i, i)) for i in (50, 200)]
    animation = {"save_all": True, "append_images": frames[1:]}
    assert first_pixel(frames[0], ".png", **animation) == [50] * 3
    assert first_pixel(frames[0], ".webp", lossless=True, **animation) == [50] * 3


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path, suffix, orientation):
    from PIL import ImageOps

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    image.save(path, exif=exif)
    with Image.open(path) as saved:
        expected = np.asarray(ImageOps.exif_transpose(saved).convert("RGB"))
    assert read_size(path) == expected.shape[:2]
    decoded = decode_image(path, ImageSpec(3, *expected.shape[:2], 0))
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), expected)


def png_claiming(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    end = b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    return b"\x89PNG\r\n\x1a\n" + chunk + end


@pytest.mark.parametrize("side", [8001, 12_000, 60_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_by_their_header(tmp_path, side):
    assert side**2 > MAX_PIXELS
    write_image(tmp_path / "a" / "good.png")
    path = tmp_path / "a" / "bomb.png"
    path.write_bytes(png_claiming(side, side))
    settings = config(dataset="custom", data_root=str(tmp_path), image_size=8)
    assert_data_error(lambda: build_dataset(settings), path, "too large", "64 million")


def damage(kind: str, path: Path) -> None:
    data = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_bytes(b"this is no image")
    elif kind == "gif inside":
        Image.new("RGB", (8, 8)).save(path, format="GIF")
    elif kind == "header cut":
        path.write_bytes(data[:20])
    elif kind == "link to nowhere":
        path.unlink()
        path.symlink_to("nowhere.png")


@pytest.mark.parametrize("kind", ["empty", "text", "gif inside", "header cut", "link to nowhere"])
def test_broken_files_are_found_when_building(tmp_path, kind):
    for i in range(3):
        path = write_image(tmp_path / "a" / f"{i}.png")
        if i:
            damage(kind, path)
    settings = config(dataset="custom", data_root=str(tmp_path), image_size=8)
    assert_data_error(lambda: build_dataset(settings), tmp_path / "a" / "1.png", "a/2.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp"])
def test_truncated_files_are_named(tmp_path, suffix):
    path = write_image(tmp_path / "a" / f"x{suffix}", (64, 64))
    data = path.read_bytes()

    def load():
        dataset = build_dataset(config(dataset="custom", data_root=str(tmp_path), image_size=8))
        return dataset[0]

    load()
    for share in (0.3, 0.6, 0.9):
        path.write_bytes(data[: int(len(data) * share)])
        assert_data_error(load, path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_random_damage_never_raises_anything_else(tmp_path):
    path = write_image(tmp_path / "a" / "x.png", (16, 16))
    spec = ImageSpec(3, 8, 8, 0)
    for suffix in (".png", ".jpg", ".webp", ".bmp"):
        good = write_image(tmp_path / f"x{suffix}", (16, 16)).read_bytes()
        rng = np.random.default_rng(0)
        for _ in range(60):
            data = bytearray(good)
            for position in rng.integers(0, min(len(data), 80), 3):
                data[position] = rng.integers(256)
            path.write_bytes(data)
            for read in (read_size, lambda path: decode_image(path, spec)):
                with contextlib.suppress(DataError):
                    read(path)


# --- custom folders


def custom(root: Path, **values: Any) -> Config:
    return config(dataset="custom", data_root=str(root), **values)


def flat(root: Path, labels: Any = None, *, num_images: int = 3, **values: Any) -> Config:
    for i in range(num_images):
        write_image(root / f"{i}.png", seed=i)
    if labels is None:
        return custom(root, use_subdirs=False, **values)
    text = labels if isinstance(labels, str) else json.dumps(labels)
    (root / "labels.json").write_text(text)
    return custom(root, use_subdirs=False, label_file="labels.json", **values)


def test_class_folders_are_sorted_by_bytes(tmp_path):
    for name in ("b/1.png", "b/10.jpg", "b/2.PNG", "B/x.webp", "ä/y.bmp", "b/deep/er.jpeg"):
        write_image(tmp_path / name)
    for ignored in ("B/.hidden.png", ".git/x.png", "b/Thumbs.db", "notes.txt"):
        (tmp_path / ignored).parent.mkdir(exist_ok=True)
        (tmp_path / ignored).write_text("no image")
    dataset = build_dataset(custom(tmp_path))
    assert dataset.class_names == ("B", "b", "ä")
    expected = ["B/x.webp", "b/1.png", "b/10.jpg", "b/2.PNG", "b/deep/er.jpeg", "ä/y.bmp"]
    assert dataset.names == expected
    assert dataset.labels.tolist() == [0, 1, 1, 1, 1, 2]
    assert not has_test_split(custom(tmp_path))
    assert_data_error(lambda: build_dataset(custom(tmp_path), "test"), tmp_path, "no test split")


@pytest.mark.parametrize("test_name", ["test", "val"])
@pytest.mark.parametrize("use_subdirs", [True, False])
def test_split_folders(tmp_path, test_name, use_subdirs):
    inside = ("cat", "dog") if use_subdirs else (".",)
    for split, count in (("train", 3), (test_name, 2)):
        for i in range(count):
            for name in inside:
                write_image(tmp_path / split / name / f"{i}.png")
    settings = custom(tmp_path, use_subdirs=use_subdirs)
    assert has_test_split(settings)
    assert len(build_dataset(settings)) == 3 * len(inside)
    assert len(build_dataset(settings, "test")) == 2 * len(inside)
    assert build_dataset(settings).spec == (3, 8, 8, 2 if use_subdirs else 0)


def test_test_classes_take_the_train_labels(tmp_path):
    for name in ("train/a", "train/b", "train/c", "test/c"):
        write_image(tmp_path / name / "0.png")
    test = build_dataset(custom(tmp_path), "test")
    assert test.labels.tolist() == [2]
    assert test.spec.num_classes == 3
    write_image(tmp_path / "test" / "d" / "0.png")
    build = lambda: build_dataset(custom(tmp_path), "test")  # noqa: E731
    assert_data_error(build, tmp_path / "test" / "d", tmp_path / "train")


def test_train_folder_alone_is_the_root(tmp_path):
    for name in ("train/a", "train/b"):
        write_image(tmp_path / name / "0.png")
    assert build_dataset(custom(tmp_path)).class_names == ("a", "b")
    assert not has_test_split(custom(tmp_path))


def test_classes_called_train_and_test_are_asked_about(tmp_path):
    for name in ("train", "test"):
        write_image(tmp_path / name / "0.png")
    assert_data_error(lambda: build_dataset(custom(tmp_path)), tmp_path, "use_subdirs=False")
    write_image(tmp_path / "bus" / "0.png")
    assert build_dataset(custom(tmp_path)).class_names == ("bus", "test", "train")


def test_flat_folders(tmp_path):
    unlabelled = build_dataset(flat(tmp_path))
    assert unlabelled.spec == (3, 8, 8, 0)
    assert unlabelled.labels.tolist() == [0, 0, 0]
    settings = flat(tmp_path, {"2.png": 0, "./0.png": 1, "1.png": 2})
    labelled = build_dataset(settings)
    assert labelled.names == ["0.png", "1.png", "2.png"]
    assert labelled.labels.tolist() == [1, 2, 0]
    assert labelled.class_names == ("0", "1", "2")
    assert labelled.fingerprint != unlabelled.fingerprint


def test_label_file_may_lie_elsewhere(tmp_path, monkeypatch):
    settings = flat(tmp_path / "images", {f"{i}.png": i for i in range(3)})
    (tmp_path / "images" / "labels.json").rename(tmp_path / "mine.json")
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "mine.json"), "mine.json"):
        dataset = build_dataset(settings.model_copy(update={"label_file": name}))
        assert dataset.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("labels", "parts"),
    [
        ("{", ["labels.json", "not readable as JSON"]),
        ("\xff", ["labels.json", "not readable as JSON"]),
        ("[" * 100_000, ["labels.json", "not readable as JSON"]),
        ([["0.png", 0]], ["labels.json", "a mapping", "list"]),
        ({}, ["labels.json", "no labels"]),
        ({"0.png": "1"}, ["labels.json", '"0.png": "1"', "whole number"]),
        ({"0.png": True}, ['"0.png": true', "whole number"]),
        ({"0.png": 1.0}, ['"0.png": 1.0', "whole number"]),
        ({"0.png": None}, ['"0.png": null', "whole number"]),
        ({"0.png": {"a": 1}}, ['"0.png"', "whole number"]),
        ({"0.png": -1}, ['"0.png": -1', "whole number from 0"]),
        ('{"0.png": 0, "0.png": 1}', ['"0.png": 1', "twice"]),
        ({"0.png": 0, "./0.png": 0}, ['"./0.png": 0', "twice"]),
        ({"0.png": 0, "1.png": 2, "2.png": 2}, ["labels.json", "no image has label 1"]),
        ({"0.png": 1, "1.png": 1, "2.png": 1}, ["labels.json", "no image has label 0"]),
        ({"0.png": 10**30, "1.png": 0}, ["labels.json", "no image has label 1"]),
        ({"0.png": 0, "9.png": 0}, ['"9.png": 0', "no such file"]),
        ({"0.png": 0, "1.png": 0}, ["2.png", "labels.json", "without a label"]),
        ({"labels.json": 0}, ['"labels.json": 0', "not an image"]),
        ({"": 0}, ["labels.json", "no such file"]),
        ({"../secret.png": 0}, ["../secret.png", "without '..'"]),
        ({"a/../../secret.png": 0}, ["secret.png", "without '..'"]),
        ({"/etc/passwd": 0}, ["/etc/passwd", "relative"]),
        ({"..\\secret.png": 0}, ["secret.png", "relative"]),
        ({"0.png\0.txt": 0}, ["0.png", "relative"]),
        ({"link.png": 0}, ["link.png", "leads out"]),
        ({"linked/secret.png": 0}, ["linked/secret.png", "leads out"]),
        ({"\uff0e\uff0e/secret.png": 0}, ["secret.png", "no such file"]),
        ({"x" * 5000 + ".png": 0}, ["labels.json", "xxx"]),
        ('{"\\ud800.png": 0}', ["labels.json", "ud800"]),
        ({"a\nb.png": 0}, ["labels.json", "a\\nb.png", "no such file"]),
    ],
)
def test_label_file_faults(tmp_path, labels, parts):
    root = tmp_path / "images"
    write_image(tmp_path / "secret.png")
    write_image(tmp_path / "outside" / "secret.png")
    if isinstance(labels, dict) and any("link" in key for key in labels):
        root.mkdir()
        (root / "link.png").symlink_to(tmp_path / "secret.png")
        (root / "linked").symlink_to(tmp_path / "outside")
    settings = flat(root, labels)
    if labels == "\xff":
        (root / "labels.json").write_bytes(b"\xff")
    assert_data_error(lambda: build_dataset(settings), *parts)


def test_label_file_against_num_classes(tmp_path):
    labels = {"0.png": 0, "1.png": 1, "2.png": 2}
    assert build_dataset(flat(tmp_path, labels, num_classes=3)).spec.num_classes == 3
    build = lambda n: build_dataset(flat(tmp_path, labels, num_classes=n))  # noqa: E731
    assert_data_error(lambda: build(2), "labels.json", '"2.png": 2', "num_classes=2")
    assert_data_error(lambda: build(4), "labels.json", "label 3")


def test_missing_label_file(tmp_path):
    settings = flat(tmp_path).model_copy(update={"label_file": "lables.json"})
    assert_data_error(lambda: build_dataset(settings), tmp_path / "lables.json", "no such")


def test_folder_faults(tmp_path):
    def fails(name: str, *parts: Any, **values: Any) -> str:
        return assert_data_error(lambda: build_dataset(custom(tmp_path / name, **values)), *parts)

    fails("missing", "missing", "no such folder", "data_root")
    message = fails("my-CIFAR_10", "dataset='cifar10'")
    assert "my-CIFAR_10" in message
    fails("none", "dataset='cifar100'", experiment_name="cifar100_unet")
    (tmp_path / "file").write_text("")
    fails("file", "file", "not a folder")

    (tmp_path / "empty").mkdir()
    for use_subdirs in (True, False):
        fails("empty", tmp_path / "empty", ".jpeg", "no files", use_subdirs=use_subdirs)
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.txt", "c.gif", "README"):
        (tmp_path / "texts" / name).write_text("")
    for use_subdirs in (True, False):
        fails("texts", "2 .txt", "1 .gif", "1 without extension", use_subdirs=use_subdirs)

    write_image(tmp_path / "holes" / "a" / "0.png")
    (tmp_path / "holes" / "b").mkdir()
    (tmp_path / "holes" / "b" / "0.tiff").write_text("")
    fails("holes", tmp_path / "holes" / "b", "1 .tiff", ".webp")

    flat(tmp_path / "flat")
    fails("flat", tmp_path / "flat", "0.png", "set use_subdirs=False")
    write_image(tmp_path / "nested" / "a" / "0.png")
    fails("nested", tmp_path / "nested", "a/", "set use_subdirs=True", use_subdirs=False)
    write_image(tmp_path / "nested" / "loose.png")
    fails("nested", tmp_path / "nested" / "loose.png", "class folders")
    fails("nested", tmp_path / "nested" / "a", "subfolder", use_subdirs=False)

    for name in ("x", "y"):
        write_image(tmp_path / "two" / name / "0.png")
    fails("two", tmp_path / "two", "num_classes=3", "2 class folders (x, y)", num_classes=3)
    fails("flat", tmp_path / "flat", "num_classes=3", use_subdirs=False, num_classes=3)
    fails("two", "labels.json", "use_subdirs=False", label_file="labels.json")


def test_linked_folders(tmp_path):
    write_image(tmp_path / "elsewhere" / "0.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a").symlink_to(tmp_path / "elsewhere")
    assert build_dataset(custom(tmp_path / "data")).names == ["a/0.png"]
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "elsewhere")
    assert_data_error(lambda: build_dataset(custom(tmp_path / "data")), "a/loop", "link")


def test_odd_file_names_stay_on_one_line(tmp_path):
    for name in ("line\nbreak.png", os.fsdecode(b"\xff.png")):
        folder = tmp_path / "data" / "a"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
        assert_data_error(lambda: build_dataset(custom(tmp_path / "data")), ".png")
        write_image(folder / name)
        assert len(build_dataset(custom(tmp_path / "data"))) > 0


def test_without_image_size_all_images_must_be_equal(tmp_path):
    for name in ("a/0.png", "a/1.png"):
        write_image(tmp_path / name, (6, 9))
    assert build_dataset(custom(tmp_path)).spec == (3, 6, 9, 1)
    assert build_dataset(custom(tmp_path, image_channels=1)).spec == (1, 6, 9, 1)
    odd = write_image(tmp_path / "b" / "odd.png", (9, 6))
    message = assert_data_error(lambda: build_dataset(custom(tmp_path)), odd, "image_size")
    assert re.search("9 x 6.*6 x 9", message)
    assert build_dataset(custom(tmp_path, image_size=(4, 6))).spec == (3, 4, 6, 2)


def test_fingerprint_follows_names_sizes_labels_and_shape(tmp_path):
    def fingerprint(**values: Any) -> str:
        return build_dataset(custom(tmp_path, image_size=8, **values)).fingerprint

    for name in ("a/0.png", "b/0.png"):
        write_image(tmp_path / name)
    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    write_image(tmp_path / "a" / "1.png")
    seen.append(fingerprint())
    (tmp_path / "a" / "1.png").rename(tmp_path / "a" / "2.png")
    seen.append(fingerprint())
    (tmp_path / "a" / "2.png").rename(tmp_path / "b" / "2.png")
    seen.append(fingerprint())
    write_image(tmp_path / "b" / "2.png", (9, 9))
    seen.append(fingerprint())
    seen.append(build_dataset(custom(tmp_path, image_size=4)).fingerprint)
    seen.append(fingerprint(image_channels=1))
    assert len(set(seen)) == len(seen)


# --- what the config says


def problems(**values: Any) -> list[tuple[str, str]]:
    return [(keys[0], message) for keys, message in check_config(config(**values))]


def test_check_config_accepts_every_dataset():
    for name, entry in DATASETS.items():
        assert problems(dataset=name) == []
        if entry.native is not None:
            assert problems(dataset=name, num_classes=entry.native.num_classes) == []
        if entry.native is None or entry.native.num_classes:
            assert problems(dataset=name, conditional=True) == []


@pytest.mark.parametrize(
    ("values", "key", "part"),
    [
        ({"dataset": "cifar-10"}, "dataset", "did you mean 'cifar10'?"),
        ({"dataset": "Fashion_MNIST"}, "dataset", "did you mean 'fashionmnist'?"),
        ({"dataset": "zzz"}, "dataset", "cifar100"),
        ({"dataset": "cifar10", "num_classes": 102}, "num_classes", "10 classes"),
        ({"dataset": "celeba", "num_classes": 40}, "num_classes", "0 classes"),
        ({"dataset": "celeba", "conditional": True}, "conditional", "labels"),
        ({"dataset": "mnist", "label_file": "x.json"}, "label_file", "custom"),
        ({"dataset": "custom", "label_file": "x.json"}, "label_file", "use_subdirs=False"),
        ({"dataset": "custom", "num_classes": 0}, "num_classes", "labelled"),
        (
            {"dataset": "custom", "use_subdirs": False, "num_classes": 3},
            "num_classes",
            "label_file",
        ),
        (
            {"dataset": "custom", "use_subdirs": False, "conditional": True},
            "conditional",
            "label_file",
        ),
    ],
)
def test_check_config_finds_faults(values, key, part):
    found = problems(**values)
    assert [name for name, _ in found] == [key]
    assert part in found[0][1]


def test_unknown_names_are_data_errors_too():
    assert_data_error(lambda: build_dataset(config(dataset="cifar-10")), "'cifar10'")
    assert_data_error(lambda: build_dataset(config(), "valid"), "train or test")


def test_native_spec_and_flip():
    assert native_spec(config(dataset="celeba")) == (3, 64, 64, 0)
    assert native_spec(config(dataset="mnist", image_size=32, image_channels=3)) == (3, 32, 32, 10)
    assert native_spec(config(dataset="custom")) is None
    assert native_spec(config(dataset="custom", image_size=32)) is None
    assert native_spec(config(dataset="custom", num_classes=4)) is None
    assert native_spec(config(dataset="nonsense")) is None
    custom_spec = native_spec(config(dataset="custom", image_size=(32, 16), num_classes=4))
    assert custom_spec == (3, 32, 16, 4)
    unlabelled = config(dataset="custom", image_size=32, use_subdirs=False)
    assert native_spec(unlabelled) == (3, 32, 32, 0)
    flips = {name: default_flip(config(dataset=name)) for name in DATASETS}
    assert [name for name, on in flips.items() if not on] == ["digits", "mnist", "synthetic"]
    assert default_flip(config(dataset="mnist", horizontal_flip=True))
    assert not default_flip(config(dataset="cifar10", horizontal_flip=False))
