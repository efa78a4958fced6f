"""The label file: every fault is one line, and no name in it leads out of the folder."""

from __future__ import annotations

import json
import os

import pytest

from datasets import build_dataset
from datasets.label_file import MAX_BYTES
from tests.image_files import assert_data_error, flat, write_image
from tests.traversals import ATTEMPTS, Attempt, make_attempts


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


def test_a_folder_whose_name_begins_alike_is_outside(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    write_image(tmp_path / "images-private" / "x.png")
    (root / "link.png").symlink_to(tmp_path / "images-private" / "x.png")
    settings = flat(root, {"link.png": 0}, num_images=0)
    assert_data_error(lambda: build_dataset(settings), "link.png", "leads out")


def test_label_file_against_num_classes(tmp_path):
    labels = {"0.png": 0, "1.png": 1, "2.png": 2}
    assert build_dataset(flat(tmp_path, labels, num_classes=3)).spec.num_classes == 3
    build = lambda n: build_dataset(flat(tmp_path, labels, num_classes=n))  # noqa: E731
    assert_data_error(lambda: build(2), "labels.json", '"2.png": 2', "num_classes=2")
    assert_data_error(lambda: build(4), "labels.json", "label 3")


def test_missing_label_file(tmp_path):
    settings = flat(tmp_path).model_copy(update={"label_file": "lables.json"})
    assert_data_error(lambda: build_dataset(settings), tmp_path / "lables.json", "no such")


def test_a_label_file_beside_the_images_comes_before_one_in_the_working_directory(
    tmp_path, monkeypatch
):
    """The same relative path may lead to a file in both; `data_root` is where it is looked for."""
    images, working = tmp_path / "images", tmp_path / "working"
    settings = flat(images, {"0.png": 0, "1.png": 1, "2.png": 1})
    working.mkdir()
    (working / "labels.json").write_text('{"0.png": 1, "1.png": 0, "2.png": 0}')
    monkeypatch.chdir(working)
    assert build_dataset(settings).labels.tolist() == [0, 1, 1]
    (images / "labels.json").unlink()
    assert build_dataset(settings).labels.tolist() == [1, 0, 0]


def test_a_byte_order_mark_is_no_fault(tmp_path):
    settings = flat(tmp_path)
    (tmp_path / "labels.json").write_bytes(b'\xef\xbb\xbf{"0.png": 0, "1.png": 1, "2.png": 0}')
    settings = settings.model_copy(update={"label_file": "labels.json"})
    assert build_dataset(settings).labels.tolist() == [0, 1, 0]


def test_a_name_that_is_no_utf8_can_be_labelled(tmp_path):
    odd = os.fsdecode(b"\xff.png")
    write_image(tmp_path / odd)
    dataset = build_dataset(flat(tmp_path, {"0.png": 0, "1.png": 1, odd: 1}, num_images=2))
    assert dataset.names == ["0.png", "1.png", odd]


BYTES = {
    "UTF-16": '{"0.png": 0}'.encode("utf-16"),
    "Latin-1": '{"\xe4.png": 0}'.encode("latin-1"),
    "NUL": bytes(1000),
    "nothing": b"",
    "digits": b'{"0.png": ' + b"9" * 5000 + b"}",
    "objects in objects": b'{"0.png": ' * 100_000 + b"0" + b"}" * 100_000,
    "half": b'{"0.png": 0, "1.png"',
    "two": b'{"0.png": 0}{"0.png": 0}',
}


@pytest.mark.parametrize("kind", BYTES)
def test_bytes_that_are_no_json(tmp_path, kind):
    settings = flat(tmp_path, {"0.png": 0})
    (tmp_path / "labels.json").write_bytes(BYTES[kind])
    message = assert_data_error(lambda: build_dataset(settings), "labels.json", "not readable")
    assert len(message) < 300 + len(str(tmp_path))


MEGABYTE = 2**20
LARGE = {
    "one name": lambda: f'{{"{"x" * 50 * MEGABYTE}": 0}}',
    "one label": lambda: f'{{"0.png": "{"x" * 50 * MEGABYTE}"}}',
    "a list": lambda: f"[{'0,' * 25 * MEGABYTE}0]",
    "many names": lambda: json.dumps({f"{i:0120}.png": 0 for i in range(400_000)}),
    "cut off": lambda: '{"0.png": 0, ' + " " * 50 * MEGABYTE,
}


@pytest.mark.parametrize("kind", LARGE)
def test_fifty_megabytes_end_in_one_short_line(tmp_path, kind):
    text = LARGE[kind]()
    assert len(text) > 50_000_000
    settings = flat(tmp_path, text)
    message = assert_data_error(lambda: build_dataset(settings), "labels.json")
    assert len(message) < 300 + 2 * len(str(tmp_path))


def test_labels_of_thousands_of_digits_are_shown_short(tmp_path):
    message = assert_data_error(
        lambda: build_dataset(flat(tmp_path, {"0.png": 0, "1.png": 10**4200, "2.png": 2})),
        "no image has label 1",
    )
    assert len(message) < 300 + len(str(tmp_path))


def test_files_over_the_limit_are_not_read(tmp_path):
    settings = flat(tmp_path, {"0.png": 0})
    with (tmp_path / "labels.json").open("r+b") as file:
        file.truncate(MAX_BYTES + 1)
    assert_data_error(lambda: build_dataset(settings), "labels.json", "at most", str(MAX_BYTES))


# --- names that lead out of the folder


@pytest.fixture(scope="module")
def attempted(tmp_path_factory) -> tuple[list, dict[str, Attempt]]:
    return make_attempts(tmp_path_factory.mktemp("traversal"))


@pytest.mark.parametrize("name", ATTEMPTS, ids=lambda name: ascii(name)[1:40])
def test_nothing_outside_the_folder_is_opened(attempted, name):
    end, message, outside, num_opened = attempted[1][name]
    assert end == "refused"
    assert outside == []
    assert num_opened > 0
    assert "labels.json: " in message
    assert message.isprintable()
    assert len(message) < 400


def test_names_inside_the_folder_are_read(attempted):
    assert attempted[0] == ["read", ["0.png", "inner.png"]]
