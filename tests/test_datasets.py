"""Data sets: what they hold, and what the config says about them."""

from __future__ import annotations

import pickle
import struct
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
    native_spec,
)
from datasets.builtin import FLOWERS_URL
from datasets.loader import make_resident
from datasets.real import real_sets
from datasets.synthetic import CLASS_NAMES, draw_shapes
from tests.image_files import assert_data_error, config, write_flowers102, write_image
from utils.distributed import Runtime
from utils.images import ImageSpec, to_float, to_uint8

SIZES = {"native": None, "square": (16, 16), "tall": (12, 8)}


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
        elif name == "flowers102":
            write_flowers102(root / "flowers-102")
        elif name == "custom":
            write_custom(root)
        return root

    return prepare


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


def test_a_builder_is_held_to_its_line_in_the_table(monkeypatch):
    wrong = DATASETS["synthetic"]._replace(native=ImageSpec(3, 32, 32, 5))
    monkeypatch.setitem(DATASETS, "synthetic", wrong)
    assert_data_error(
        lambda: build_dataset(config(dataset="synthetic")),
        "its builder made",
        "32x32 pixels, 3 channel(s), 5 classes",
    )


def test_some_classes_of_a_data_set():
    whole = build_dataset(config())
    some = build_dataset(config(classes=(7, 2)))
    wanted = [i for i, label in enumerate(whole.labels.tolist()) if label in (2, 7)]
    assert some.labels.tolist() == whole.labels[wanted].tolist()
    assert len(some) == len(wanted)
    assert (some.spec, some.class_names) == (whole.spec, whole.class_names)
    for i in (0, len(some) - 1):
        image, label = some[i]
        assert torch.equal(image, whole[wanted[i]][0])
        assert label == whole[wanted[i]][1]
    # whoever trains on them sees that the data is another, and not that the order of naming is
    prints = [build_dataset(config(classes=c)).fingerprint for c in ((2, 7), (7, 2), (2,))]
    assert prints[0] == prints[1] == some.fingerprint != prints[2]
    assert some.fingerprint != whole.fingerprint
    resident = make_resident(some, Runtime(torch.device("cpu")))
    assert torch.equal(resident[3][0], some[3][0])
    assert resident.fingerprint == some.fingerprint


def test_classes_that_are_not_there():
    for dataset, classes, said in (
        ("digits", (3, 10), "classes=[3, 10]: digits has 10 classes, numbered from 0"),
        ("celeba", (0,), "classes=[0]: celeba has 0 classes"),
    ):
        found = [p.message for p in check_config(config(dataset=dataset, classes=classes))]
        assert any(said in message for message in found), found
    assert not list(check_config(config(classes=(3, 9))))


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


@pytest.mark.parametrize("split", SPLITS)
def test_a_limit_is_one_of_the_images_to_compare_with_alone(split):
    """Copies of train images are looked for among all of them, whatever the metrics take."""
    sets = real_sets(
        config(dataset="digits"), Runtime(torch.device("cpu")), 4, split=split, limit=5
    )
    assert sets.reference is getattr(sets, split)
    for name in SPLITS:
        images = getattr(sets, name)
        assert images.split == name
        if name == split:
            assert len(images.indices) == 5
            assert images.indices == sorted(set(images.indices))
        else:
            assert list(images.indices) == list(range(len(images.dataset)))


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


@pytest.mark.parametrize(
    "name", ["mnist", "fashionmnist", "cifar10", "cifar100", "celeba", "flowers102"]
)
def test_a_failed_download_says_which_files_go_where(name, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no\nnetwork")

    for module, function in (
        ("mnist", "download_and_extract_archive"),
        ("cifar", "download_and_extract_archive"),
        ("celeba", "download_file_from_google_drive"),
        ("flowers102", "download_and_extract_archive"),
    ):
        monkeypatch.setattr(f"torchvision.datasets.{module}.{function}", no_network)
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://nowhere.invalid/"])
    files = {
        "mnist": ["MNIST/raw", "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"],
        "fashionmnist": ["FashionMNIST/raw", "train-images-idx3-ubyte"],
        "cifar10": ["cifar-10-batches-py", "data_batch_1", "test_batch", "batches.meta"],
        "cifar100": ["cifar-100-python", "train", "test", "meta"],
        "celeba": ["celeba", "img_align_celeba"],
        "flowers102": ["flowers-102", "jpg/", "imagelabels.mat", "setid.mat", FLOWERS_URL],
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


def test_flowers102_has_the_images_and_labels_of_torchvision(data_root, monkeypatch):
    from torchvision.datasets import Flowers102

    root = data_root("flowers102")
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda *args: True)
    theirs = {}
    for split in ("train", "val", "test"):
        source = Flowers102(root, split)
        names = [path.name for path in source._image_files]
        theirs[split] = dict(zip(names, source._labels, strict=True))
    settings = config(dataset="flowers102", data_root=str(root))
    train, test = (build_dataset(settings, split) for split in SPLITS)
    for ours, expected in ((train, theirs["train"] | theirs["test"]), (test, theirs["val"])):
        assert dict(zip(ours.names, ours.labels.tolist(), strict=True)) == expected
        assert ours.names == sorted(expected)
        assert ours.class_names == tuple(Flowers102.classes)
    assert len(set(Flowers102.classes)) == native_spec(settings).num_classes == 102
    some = build_dataset(settings.model_copy(update={"classes": (6, 101)}), "test")
    assert some.names == ["image_00008.jpg", "image_00012.jpg"]
    photo = settings.model_copy(update={"image_size": (50, 50)})
    with Image.open(root / "flowers-102" / "jpg" / "image_00002.jpg") as image:
        expected = np.asarray(image)[:, 6:56].transpose(2, 0, 1)
    assert np.array_equal(build_dataset(photo)[0][0].numpy(), expected)


@pytest.mark.parametrize(
    ("folder", "images", "data_root"),
    [
        ("flowers-102", "jpg", "."),
        ("FLOWERS102", "102flowers/JPG", "."),
        ("Oxford-Flowers/Flowers 102", "jpg/jpg", "."),
        ("flowers-102", "jpg", "flowers-102"),
        ("mine", "102Flowers/jpg", "mine"),
    ],
)
def test_flowers102_is_found_as_unpacked_by_hand(folder, images, data_root, tmp_path):
    """Beside folders of the same names that hold something else."""
    write_flowers102(tmp_path / folder, images)
    write_image(tmp_path / "jpg" / "1.jpg")
    write_image(tmp_path / "Flowers" / "jpg" / "1.jpg")
    write_flowers102(tmp_path / "elsewhere" / "flowers-102")
    built = [
        build_dataset(config(dataset="flowers102", data_root=str(tmp_path / root)))
        for root in (data_root, "elsewhere")
    ]
    assert built[0].listing.root == tmp_path / folder / images
    assert built[0].fingerprint == built[1].fingerprint


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"labels": [0] * 12}, ("imagelabels.mat: ", "labels are not 1 to 102")),
        ({"labels": [103] * 12}, ("imagelabels.mat: ", "labels are not 1 to 102")),
        ({"labels": [1] * 13}, ("setid.mat: ", "13 images, each once")),
        ({"trnid": [11, 2, 2]}, ("setid.mat: ", "12 images, each once")),
        ({"valid": []}, ("setid.mat: ", "KeyError", "valid")),
        ({"labels": [1] * 13, "trnid": [11, 2, 3, 13]}, ("jpg: ", "1 missing", "image_00013.jpg")),
    ],
)
def test_flowers102_whose_files_contradict_each_other(tables, said, tmp_path):
    write_flowers102(tmp_path / "flowers-102", **tables)
    settings = config(dataset="flowers102", data_root=str(tmp_path))
    for split in SPLITS:
        assert_data_error(lambda split=split: build_dataset(settings, split), *said, "get it anew")


@pytest.mark.parametrize("name", ["imagelabels.mat", "setid.mat"])
def test_flowers102_with_a_damaged_table(name, tmp_path):
    write_flowers102(tmp_path / "flowers-102")
    path, settings = tmp_path / "flowers-102" / name, config(dataset="flowers102")
    settings = settings.model_copy(update={"data_root": str(tmp_path)})
    whole = path.read_bytes()
    for content in (b"", whole[:150], whole[:-12], b"<html>not found</html>", b"\0" * 500):
        path.write_bytes(content)
        assert_data_error(lambda: build_dataset(settings), path, "damaged", "get it anew from http")


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
        assert problems(dataset=name, on_bad_image="skip") == []


@pytest.mark.parametrize(
    ("values", "key", "part"),
    [
        ({"dataset": "cifar-10"}, "dataset", "did you mean 'cifar10'?"),
        ({"dataset": "Fashion_MNIST"}, "dataset", "did you mean 'fashionmnist'?"),
        ({"dataset": "zzz"}, "dataset", "cifar100"),
        ({"dataset": "cifar10", "num_classes": 102}, "num_classes", "10 classes"),
        ({"dataset": "celeba", "num_classes": 40}, "num_classes", "0 classes"),
        ({"dataset": "celeba", "conditional": True}, "conditional", "labels"),
        ({"dataset": "custom", "label_file": "x.json"}, "label_file", "use_subdirs=False"),
        ({"dataset": "custom", "num_classes": 0}, "num_classes", "has labels"),
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
    assert [name for name, on in flips.items() if not on] == [
        "digits",
        "mnist",
        "fashionmnist",
        "synthetic",
    ]
    assert default_flip(config(dataset="mnist", horizontal_flip=True))
    assert not default_flip(config(dataset="cifar10", horizontal_flip=False))
