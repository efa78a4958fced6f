"""Folders of your own images: what is found, and that every doubt is one line."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

from datasets import (
    build_dataset,
    has_test_split,
)
from tests.image_files import assert_data_error, custom, flat, write_image


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


def test_some_classes_of_a_folder(tmp_path):
    for name in ("a/1.png", "b/1.png", "b/2.png", "d/1.png"):
        write_image(tmp_path / name)
    dataset = build_dataset(custom(tmp_path, classes=(2, 1)))
    assert dataset.names == ["b/1.png", "b/2.png", "d/1.png"]
    assert dataset.labels.tolist() == [1, 1, 2]
    assert dataset.class_names == ("a", "b", "d")
    build = lambda: build_dataset(custom(tmp_path, classes=(1, 7, 5)))  # noqa: E731
    assert_data_error(build, "classes=[1, 7, 5]: the data has no image of [5, 7]", "3 of 3 classes")


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


@pytest.mark.parametrize("use_subdirs", [True, False])
def test_test_images_come_before_validation_images(tmp_path, use_subdirs):
    """Where there are both test/ and val/, the test split is test/."""
    inside = "cat/" if use_subdirs else ""
    for split in ("train", "val", "test"):
        write_image(tmp_path / split / f"{inside}of_{split}.png")
    test = build_dataset(custom(tmp_path, use_subdirs=use_subdirs), "test")
    assert [name.rpartition("/")[2] for name in test.names] == ["of_test.png"]


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


def test_folder_faults(tmp_path):
    def fails(name: str, *parts: Any, **values: Any) -> str:
        return assert_data_error(lambda: build_dataset(custom(tmp_path / name, **values)), *parts)

    fails("missing", "missing", "no such folder", "data_root")
    message = fails("my-CIFAR_10", "dataset='cifar10'")
    assert "my-CIFAR_10" in message
    fails("none", "dataset='cifar100'", experiment_name="cifar100_unet")
    fails("Flowers-102", "dataset='flowers102'")
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
    (tmp_path / "holes" / "b" / "0.tga").write_text("")
    fails("holes", tmp_path / "holes" / "b", "1 .tga", ".webp")

    flat(tmp_path / "flat")
    fails("flat", tmp_path / "flat", "0.png", "set use_subdirs=False")
    write_image(tmp_path / "nested" / "a" / "0.png")
    fails("nested", tmp_path / "nested", "a/", "set use_subdirs=True", use_subdirs=False)
    write_image(tmp_path / "nested" / "loose.png")
    for use_subdirs in (True, False):
        parts = (tmp_path / "nested", "directly in it (first: loose.png)", "(first: a/)")
        fails("nested", *parts, "put all images there", use_subdirs=use_subdirs)

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


def test_fingerprint_follows_the_labels_alone(tmp_path):
    names = ("0.png", "1.png", "2.png")
    seen = set()
    for labels in ((0, 1, 1), (0, 0, 1), (1, 0, 0)):
        settings = flat(tmp_path, dict(zip(names, labels, strict=True)))
        seen.add(build_dataset(settings).fingerprint)
    assert len(seen) == 3
