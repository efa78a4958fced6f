"""evaluate.py --images: pictures that exist, compared with data sets, folders and statistics."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import evaluate
from datasets.builtin import build_digits
from datasets.pictures import folder_settings, read_pictures
from generation.evaluated import existing_images
from metrics.base import Real
from tests.scored import on_ranks
from tests.test_evaluate import ABSENT, quick_classifier, read, tiny_networks  # noqa: F401
from utils.cli import parse_args
from utils.config import Config
from utils.errors import EXIT_INCOMPLETE, EXIT_OK, ConfigError, DataError
from utils.images import save_image
from utils.labels import requested_labels

DIGITS = ["--config", "configs/digits_unet.py", "image_size=8", "--device", "cpu"]
NAMES = tuple(str(k) for k in range(10))


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, list[int]]:
    """297 of the real test digits, 8x8, and their classes."""
    data = build_digits(Config(dataset="digits", image_size=(8, 8)), "test")
    return data.images[:297], data.labels[:297].tolist()


def write_npz(path: Path, images: Tensor, labels: list[int] | None) -> Path:
    given = {} if labels is None else {"arr_1": np.array(labels)}
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), **given)
    return path


def write_folder(folder: Path, images: Tensor, labels: list[int] | None, layout: str) -> Path:
    for i, image in enumerate(images):
        name = f"{i:06d}.png"
        save_image(folder / (f"{labels[i]}/{name}" if layout == "classes" else name), image)
    if layout == "json":
        named = {f"{i:06d}.png": label for i, label in enumerate(labels)}
        (folder / "labels.json").write_text(json.dumps(named))
    return folder


def score(images: Path, output: Path, *arguments: str) -> dict:
    command = ["--images", str(images), "--output", str(output), *DIGITS, *ABSENT, *arguments]
    assert evaluate.main(command) == 0
    return read(output / "report.json")


OFFLINE = ["--metrics", "class_acc,fd_domain,memorization,sanity"]


def test_real_pictures_reach_the_ceiling_and_shuffled_labels_do_not(digits, tmp_path):
    images, labels = digits
    report = score(write_npz(tmp_path / "real.npz", images, labels), tmp_path / "out", *OFFLINE)
    assert report["class_accuracy"] >= 0.97
    assert not report["metrics"]["memorization"]["flagged"]
    assert report["metrics"]["sanity"]["value"] == 1
    made = report["provenance"]
    assert made["images"].endswith("real.npz")
    assert made["n"] == 297
    assert made["dataset"]["name"] == "digits"
    assert "checkpoint" not in made
    page = (tmp_path / "out/report.html").read_text()
    assert "real.npz" in page

    order = np.random.default_rng(0).permutation(len(labels))
    path = write_npz(tmp_path / "real.npz", images, [labels[i] for i in order])
    shuffled = score(path, tmp_path / "out2", *OFFLINE)
    assert 0.03 < shuffled["class_accuracy"] < 0.2


def test_copies_of_train_pictures_are_flagged(tmp_path):
    train = build_digits(Config(dataset="digits", image_size=(8, 8)), "train")
    path = write_npz(tmp_path / "copies.npz", train.images[:200], train.labels[:200].tolist())
    found = score(path, tmp_path / "out", "--metrics", "memorization")["metrics"]["memorization"]
    assert found["flagged"]
    assert found["generated"]["num_copies"] == 200


@pytest.mark.parametrize("layout", ["classes", "json"])
def test_layouts_of_pictures_give_the_same(layout, digits, tmp_path, quick_classifier):  # noqa: F811
    images, labels = digits[0][:40], digits[1][:40]
    as_npz = score(write_npz(tmp_path / "a.npz", images, labels), tmp_path / "one", *OFFLINE)
    folder = write_folder(tmp_path / "pictures", images, labels, layout)
    as_files = score(folder, tmp_path / "two", *OFFLINE)
    for name in ("class_acc", "fd_domain", "sanity", "memorization"):
        pair = [report["metrics"][name]["value"] for report in (as_npz, as_files)]
        assert pair[0] == pytest.approx(pair[1], rel=1e-6), name
    assert sorted(path.name for path in tmp_path.iterdir() if "eval" in path.name) == [
        "a_eval", "pictures_eval",
    ]  # fmt: skip


def test_the_label_of_a_picture_is_the_one_under_its_name(digits, tmp_path):
    write_folder(tmp_path, digits[0][:3], [4, 0, 2], "json")
    named = {"000002.png": 2, "000001.png": 0, "absent.png": 1, "000000.png": 4}
    (tmp_path / "labels.json").write_text(json.dumps(named))
    assert read_pictures(tmp_path, tuple("abcde")).labels == [4, 0, 2]


def test_a_folder_named_as_a_class_is_that_class_even_if_the_name_is_a_number(digits, tmp_path):
    folder = write_folder(tmp_path, digits[0][:4], [0, 0, 0, 1], "classes")
    assert read_pictures(folder, ("1", "0")).labels == [1, 1, 1, 0]
    assert read_pictures(folder, ("cat", "dog")).labels == [0, 0, 0, 1]


def test_what_has_no_labels_or_nothing_to_compare_with_says_so(digits, tmp_path, capsys):
    folder = write_folder(tmp_path / "flat", digits[0][:6], None, "flat")
    report = score(folder, tmp_path / "out", "--metrics", "class_acc,sanity", "--num_samples", "5")
    assert "no folder per class" in report["metrics"]["class_acc"]["reason"]
    assert report["provenance"]["n"] == 5
    command = ["--images", str(folder), "--device", "cpu", "--output", str(tmp_path / "alone")]
    assert evaluate.main([*command, *ABSENT]) == 0
    report = read(tmp_path / "alone/report.json")
    assert report["metrics"]["sanity"]["value"] == 1
    assert "--config" in report["metrics"]["fd_domain"]["reason"]
    assert report["provenance"]["dataset"]["name"] is None


def test_a_folder_is_compared_with_another(digits, tmp_path, tiny_networks, quick_classifier):  # noqa: F811
    images, labels = digits
    ours = write_folder(tmp_path / "ours", images[:100], labels[:100], "classes")
    theirs = write_folder(tmp_path / "theirs", images[100:], labels[100:], "classes")
    command = ["--images", str(ours), "--reference", str(theirs), "--device", "cpu"]
    assert evaluate.main([*command, "--output", str(tmp_path / "out"), *tiny_networks]) == 0
    report = read(tmp_path / "out/report.json")
    assert report["provenance"]["dataset"]["num_images"] == 197
    assert report["metrics"]["fid"]["n_real"] == 197
    assert report["metrics"]["class_acc"]["value"] is not None
    assert report["metrics"]["memorization"]["n_train"] == 197


def test_the_test_split_can_be_the_reference(digits, tmp_path, tiny_networks, quick_classifier):  # noqa: F811
    """The Frechet distance is symmetric: train against test is test against train."""
    path = write_npz(tmp_path / "a.npz", *digits)
    names = ["--metrics", "fid,fd_domain,memorization", *tiny_networks]
    by_split = {
        split: score(path, tmp_path / split, *names, "--real_split", split)
        for split in ("train", "test")
    }
    found = {split: report["metrics"] for split, report in by_split.items()}
    real_values = [found[split]["fd_domain"]["real_value"] for split in ("train", "test")]
    assert real_values[0] == pytest.approx(real_values[1], rel=1e-6)
    assert found["test"]["fd_domain"]["value"] < found["train"]["fd_domain"]["value"]
    assert found["test"]["fid"]["n_real"] == 355
    assert found["train"]["fid"]["n_real"] == 1442
    assert found["test"]["memorization"]["n_train"] == 1442  # copies are of train images
    assert by_split["test"]["provenance"]["split"] == "test"


def test_sizes_that_differ_are_not_compared(tmp_path):
    images = torch.zeros(4, 1, 16, 16, dtype=torch.uint8)
    images[:, :, 3] = torch.arange(4, dtype=torch.uint8)[:, None, None] + 1
    path = write_npz(tmp_path / "big.npz", images, None)
    own_sizes = ("--metrics", "memorization,sanity", "image_size=none")
    report = score(path, tmp_path / "out", *own_sizes)
    reason = report["metrics"]["memorization"]["reason"]
    assert reason == "these images are 1 x 16 x 16, the real ones 1 x 8 x 8"
    assert report["metrics"]["sanity"]["value"] == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "absent", "no such folder"),
        (lambda d: write_npz(d / "a.npz", torch.zeros(2, 1, 8, 8), None), "arr_0 is float32"),
        (lambda d: write_npz(d / "a.npz", DOTS, [0, 10]), "label 10: classes are 0 to 9"),
        (lambda d: write_npz(d / "a.npz", DOTS, [0, 1, 2]), "not 2 integers"),
        (lambda d: write_folder(d / "f", DOTS, ["0", "cat"], "classes"), "no such class"),
        (lambda d: write_folder(d / "f", DOTS, [0, "1"], "json"), "label '1': classes"),
        (lambda d: write_folder(d / "f", DOTS[:1], [True], "json"), "label True"),
        (lambda d: empty_file(d / "a.npz"), "cannot be read"),
    ],
)
def test_wrong_pictures_are_one_clear_line(make, message, tmp_path):
    with pytest.raises(DataError, match=message) as caught:
        read_pictures(make(tmp_path), NAMES, image_channels=1)
    assert "\n" not in str(caught.value)


DOTS = torch.arange(128, dtype=torch.uint8).view(2, 1, 8, 8)


def empty_file(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def test_an_npz_may_not_run_code(tmp_path):
    path = tmp_path / "evil.npz"
    np.savez(path, arr_0=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="cannot be read"):
        read_pictures(path, NAMES)


def test_settings_of_a_folder(tmp_path):
    flat = write_folder(tmp_path / "flat", DOTS, None, "flat")
    assert folder_settings(flat)["use_subdirs"] is False
    assert folder_settings(flat)["label_file"] is None
    labelled = write_folder(tmp_path / "labelled", DOTS, [0, 1], "json")
    assert folder_settings(labelled)["label_file"] == "labels.json"
    classes = write_folder(tmp_path / "classes", DOTS, [0, 1], "classes")
    assert folder_settings(classes)["use_subdirs"] is True


@pytest.mark.parametrize(
    ("metrics", "code"), [("sanity", EXIT_OK), ("sanity,fid", EXIT_INCOMPLETE)]
)
def test_every_process_ends_with_the_code_that_strict_asks_for(metrics, code, digits, tmp_path):
    """The main one alone has the report that tells it."""
    path = write_npz(tmp_path / "a.npz", digits[0][:5], None)
    command = ["--images", str(path), "--metrics", metrics, "--strict", *ABSENT]
    args = parse_args(evaluate.make_parser(), command)
    args.command, config = "", evaluate.config_of_pictures(args)
    assert on_ranks(2, partial(evaluate.evaluate, args, config, None)) == [code, code]


@pytest.mark.parametrize(
    ("overrides", "side"),
    [([], 8), (["num_workers=0"], 8), (["num_workers=0", "image_size=4"], 4)],
)
def test_only_the_command_line_resizes_pictures(overrides, side, tmp_path):
    """The image_size of a config file is that of the data set, whatever else is overridden."""
    path = write_folder(tmp_path / "flat", DOTS, None, "flat")
    config = Config(dataset="digits", image_size=(4, 4), image_channels=1)
    args = parse_args(evaluate.make_parser(), ["--images", str(path), *overrides])
    images = existing_images(args, config, Real(None, "not compared"))
    assert images.generated.spec.shape == (1, side, side)


@pytest.mark.parametrize("option", ["--cfg_scale", "--steps", "--seed", "--repeats"])
def test_options_of_sampling_need_a_checkpoint(option, tmp_path):
    with pytest.raises(ConfigError, match="drawn from a --checkpoint"):
        evaluate.main(["--images", str(tmp_path), option, "2"])


@pytest.mark.parametrize("arguments", [[], ["--images", "a", "--checkpoint", "b"]])
def test_one_source_must_be_named(arguments):
    with pytest.raises(ConfigError, match="one of them"):
        evaluate.main(arguments)


def test_labels_are_a_function_of_mode_and_index():
    train = torch.tensor([0] * 60 + [1] * 30 + [3] * 10)
    assert requested_labels("balanced", 7, 3) == [0, 1, 2, 0, 1, 2, 0]
    assert requested_labels("2", 3, 4) == [2, 2, 2]
    for mode in ("uniform", "train"):
        long = requested_labels(mode, 20_000, 4, train_labels=train)
        assert requested_labels(mode, 10, 4, train_labels=train) == long[:10]
        shares = torch.tensor(long).bincount(minlength=4) / 20_000
        expected = [0.25] * 4 if mode == "uniform" else [0.6, 0.3, 0, 0.1]
        assert torch.allclose(shares, torch.tensor(expected), atol=0.012), mode
    assert requested_labels("balanced", 5, 4, classes=(3, 1)) == [3, 1, 3, 1, 3]
    some = torch.tensor(requested_labels("uniform", 20_000, 4, classes=(3, 1)))
    assert torch.allclose(
        some.bincount(minlength=4) / 20_000, torch.tensor([0, 0.5, 0, 0.5]), atol=0.012
    )
    assert 2 not in requested_labels("train", 20_000, 4, train_labels=train)
    for mode, message in (("4", "0..3"), ("even", "balanced, train, uniform"), ("train", "no tr")):
        with pytest.raises(ConfigError, match=message):
            requested_labels(mode, 3, 4)
