"""`python -m datasets.check`: what it finds, and that it says of a data set what training says."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import train
from datasets.check import NUM_SHOWN, main, make_parser
from tests.hostile_files import BAD, GOOD, KINDS, write_kind
from tests.image_files import flat, write_flowers102, write_image
from utils.cli import parse_args
from utils.config import load_config
from utils.errors import EXIT_FAILURE, EXIT_OK, EXIT_USAGE, exit_code_of

ROOT = Path(__file__).resolve().parent.parent
# pytest undoes the filters of datasets/decoding.py.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")
CONFIG = """config = dict(
    dataset="custom", data_root="images", conditional=False,
    model_params=dict(model_channels=8, channel_mult=(1, 2), num_res_blocks=1),
)"""


class Result(dict):
    """The JSON report, with what else the command did."""

    code: int
    text: str
    error: str


@pytest.fixture
def check(tmp_path, monkeypatch, capsys) -> Callable[..., Result]:
    """Runs the command in `tmp_path` on a config for the folder images/."""
    monkeypatch.chdir(tmp_path)
    Path("run.py").write_text(CONFIG, encoding="utf-8")

    def run(*arguments: str) -> Result:
        capsys.readouterr()
        path = Path("report.json")
        path.unlink(missing_ok=True)
        command = ["--config", "run.py", "--json", str(path), *arguments]
        code = exit_code_of(lambda: main(command))
        result = Result(json.loads(path.read_text()) if path.exists() else {})
        result.code = code
        result.text, result.error = capsys.readouterr()
        assert result.error.count("\n") == (code == EXIT_USAGE)
        return result

    return run


def value_of(text: str, title: str) -> str:
    """What the first line with this title says."""
    return next(line[18:] for line in text.splitlines() if line[:18].strip() == title)


# --- built-in data sets


def test_digits(check):
    found = check("dataset=digits")
    assert found.code == EXIT_OK
    assert found["verdict"] == "ready to train"
    train_split, test_split = found["splits"]["train"], found["splits"]["test"]
    assert (train_split["num_images"], test_split["num_images"]) == (1442, 355)
    assert train_split["sizes"] == [[[8, 8], 1442]]
    assert list(train_split["classes"]) == list("0123456789")
    assert train_split["imbalance"] == pytest.approx(147 / 140)
    assert value_of(found.text, "train") == "1442 images in 10 classes"
    assert value_of(found.text, "verdict") == "ready to train"


def test_synthetic_in_another_size(check):
    found = check("dataset=synthetic", "image_size=12,8", "image_channels=1")
    assert found.code == EXIT_OK
    assert value_of(found.text, "height x width") == "12 x 8: 1200"


def test_celeba(check, tmp_path):
    folder = tmp_path / "images" / "celeba"
    for i in range(4):
        write_image(folder / "img_align_celeba" / f"{i}.jpg", (218, 178), seed=i)
    lines = [f"{i}.jpg {2 * (i % 2)}" for i in range(4)]
    (folder / "list_eval_partition.txt").write_text("\n".join(lines))
    (folder / "img_align_celeba" / "2.jpg").write_bytes(b"")
    found = check("dataset=celeba")
    assert found.code == EXIT_FAILURE
    assert list(found["splits"]["train"]["bad"]) == ["2.jpg"]
    assert value_of(found.text, "train") == "2 images without labels"
    assert value_of(found.text, "height x width") == "218 x 178: 1"
    assert check("dataset=celeba", "on_bad_image=skip").code == EXIT_OK


def test_flowers102(check, tmp_path):
    folder = tmp_path / "images" / "flowers-102"
    write_flowers102(folder)
    (folder / "jpg" / "image_00003.jpg").write_bytes(b"")
    found = check("dataset=flowers102")
    assert found.code == EXIT_FAILURE
    assert list(found["splits"]["train"]["bad"]) == ["image_00003.jpg"]
    assert value_of(found.text, "train") == "8 images in 102 classes"
    assert value_of(found.text, "test") == "4 images in 102 classes"
    found = check("dataset=flowers102", "classes=2,101")
    assert found.code == EXIT_OK
    assert found["splits"]["train"]["classes"] == {"canterbury bells": 1, "blackberry lily": 1}
    (folder / "jpg" / "image_00003.jpg").unlink()
    assert "1 missing" in check("dataset=flowers102").error


def test_the_config_of_flowers102_draws_its_first_batch(tmp_path, capsys):
    write_flowers102(tmp_path / "flowers-102")
    small = ["image_size=16", "model_params.model_channels=32", "model_params.channel_mult=1,2"]
    small += ["model_params.attention_resolutions=8,", "batch_size=8", "num_workers=0"]
    command = ["--config", str(ROOT / "configs/flowers102_unet.py"), f"data_root={tmp_path}"]
    command += ["--device", "cpu", "--dry_run", "--sheet", str(tmp_path / "sheet.png")]
    assert exit_code_of(lambda: train.main([*command, *small])) == EXIT_OK
    printed = "".join(capsys.readouterr())
    assert "flowers102, 8 images 3x16x16, 102 classes (pink primrose, " in printed
    assert (tmp_path / "sheet.png").is_file()


# --- folders


def test_a_folder_with_everything(check, tmp_path):
    root = tmp_path / "images"
    for i in range(6):
        write_image(root / "train" / "cat" / f"{i}.png", (8, 8), seed=i)
    for i in range(3):
        write_image(root / "train" / "dog" / f"{i}.png", (16, 24), seed=10 + i)
    write_image(root / "train" / "dog" / "grey.png", (4, 4), "L", seed=20)
    copy = (root / "train" / "cat" / "2.png").read_bytes()
    (root / "train" / "cat" / "copy.png").write_bytes(copy)
    # Other bytes, the same pixels, and another label
    with Image.open(root / "train" / "cat" / "3.png") as image:
        image.save(root / "train" / "dog" / "same.bmp")
    write_image(root / "test" / "cat" / "new.png", seed=99)
    (root / "test" / "cat" / "leaked.png").write_bytes(copy)
    (root / "train" / "dog" / "bad.png").write_bytes(copy[:50])
    (root / "test" / "cat" / "bad.jpg").write_bytes(b"")

    found = check("image_size=8")
    assert found.code == EXIT_FAILURE
    assert "2 bad image(s)" in found["verdict"]
    split = found["splits"]["train"]
    assert split["num_images"] == 13
    assert split["sizes"] == [[[8, 8], 8], [[16, 24], 3], [[4, 4], 1]]
    assert (split["smallest"], split["largest"]) == ([4, 4], [16, 24])
    assert split["classes"] == {"cat": 7, "dog": 6}
    assert list(split["bad"]) == ["train/dog/bad.png"]
    assert split["duplicates"] == [
        ["train/cat/2.png", "train/cat/copy.png"],
        ["train/cat/3.png", "train/dog/same.bmp"],
    ]
    assert split["conflicting_labels"] == 1
    test = found["splits"]["test"]
    assert test["in_train"] == [["train/cat/2.png", "test/cat/leaked.png"]]
    assert test["classes"] == {"cat": 3, "dog": 0}
    assert (test["imbalance"], test["duplicates"]) == (None, [])

    assert value_of(found.text, "bad images") == "1"
    assert "train/dog/bad.png: broken image" in found.text
    assert value_of(found.text, "duplicates") == "2, 1 with another label"
    assert value_of(found.text, "in train too") == "1"
    assert "train/cat/3.png = train/dog/same.bmp" in found.text
    sizes = "8 x 8: 8, 16 x 24: 3, 4 x 4: 1, from 4 x 4 to 16 x 24"
    assert value_of(found.text, "height x width") == sizes

    skipped = check("image_size=8", "on_bad_image=skip")
    assert skipped.code == EXIT_OK
    assert skipped["splits"] == found["splits"]
    assert "1 of 13 images" in skipped.text


def test_copies_are_what_training_sees_as_equal(check, tmp_path):
    """Crops of two pictures that differ at the edges alone."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 24, 3), dtype=np.uint8)
    for name, shade in (("0", 0), ("1", 255)):
        pixels[:, :4] = shade
        path = tmp_path / "images" / "a" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    for image_size, num_copies in (("8", 1), ("8,24", 0)):
        found = check(f"image_size={image_size}")["splits"]["train"]
        assert len(found["duplicates"]) == num_copies


def test_only_the_classes_asked_for_are_looked_at(check, tmp_path):
    for name, count in (("cat", 3), ("cow", 2), ("dog", 4)):
        for i in range(count):
            write_image(tmp_path / "images" / name / f"{i}.png", seed=i)
    (tmp_path / "images/cow/bad.png").write_bytes(b"no image")
    found = check("image_size=8", "classes=0,2")
    assert found.code == EXIT_OK, found.text
    split = found["splits"]["train"]
    assert (split["num_images"], split["classes"], split["bad"]) == (7, {"cat": 3, "dog": 4}, {})
    assert check("image_size=8").code == EXIT_FAILURE
    found = check("dataset=digits", "classes=3,7")
    assert list(found["splits"]["test"]["classes"]) == ["3", "7"]
    assert found["splits"]["test"]["imbalance"] is not None
    found = check("image_size=8", "classes=5")
    assert found.code == EXIT_USAGE
    assert "classes" in found.error


def test_many_classes_are_shown_short(check, tmp_path):
    for i in range(30):
        for j in range(1 + i % 3):
            write_image(tmp_path / "images" / f"class{i:02d}" / f"{j}.png", seed=10 * i + j)
    found = check()
    assert found.code == EXIT_OK
    assert len(found["splits"]["train"]["classes"]) == 30
    assert len(re.findall(r"class\d\d", found.text)) == 2 * NUM_SHOWN
    assert value_of(found.text, "classes") == "largest / smallest = 3.00"


def test_all_bad_images_are_listed_with_their_reason(check, tmp_path):
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    for kind in KINDS:
        write_kind(folder, kind, prefix=f"{kind} ")
    (folder / "link.png").symlink_to("nowhere")
    found = check("image_size=8")
    assert found.code == EXIT_FAILURE
    bad = found["splits"]["train"]["bad"]
    assert len(bad) == len(BAD) + 1
    for kind in BAD:
        name = next(name for name in bad if name.startswith(f"a/{kind} "))
        assert KINDS[kind].message in bad[name]
        assert bad[name] in found.text
    assert sum(count for _, count in found["splits"]["train"]["sizes"]) == len(GOOD)
    assert found.text.isprintable() or all(map(str.isprintable, found.text.splitlines()))


# --- what would stop training


def sizes_differ(root: Path) -> None:
    write_image(root / "a" / "0.png", (8, 8))
    write_image(root / "a" / "1.png", (9, 9))


def too_many_bad(root: Path) -> None:
    for i in range(5):
        write_image(root / "a" / f"{i}.png")
        (root / "a" / f"bad{i}.png").touch()


def unreadable(root: Path) -> None:
    write_image(root / "a" / "0.png")
    (root / "a" / "1.png").symlink_to("nowhere")


FAULTS: dict[str, tuple[Callable[[Path], Any], list[str], str]] = {
    "no folder": (lambda root: None, [], "no such folder"),
    "no images": (
        lambda root: (root / "a").mkdir(parents=True),
        [],
        "a class folder with no images",
    ),
    "flat": (flat, [], "use_subdirs=False"),
    "labels": (
        lambda root: flat(root, {"0.png": -1}),
        ["use_subdirs=false", "label_file=labels.json"],
        "whole number from 0",
    ),
    "sizes": (sizes_differ, [], "is 9 x 9"),
    "classes": (sizes_differ, ["image_size=8", "num_classes=4"], "num_classes=4"),
    "too many bad": (too_many_bad, ["on_bad_image=skip"], "5 of 10 images cannot be decoded"),
    "unreadable": (unreadable, ["on_bad_image=skip"], "No such file"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_are_those_of_training(check, tmp_path, capsys, kind):
    make, overrides, message = FAULTS[kind]
    make(tmp_path / "images")
    found = check(*overrides)
    assert found.code == EXIT_USAGE
    assert message in found.error
    assert found.error == f"error: {found['verdict']}\n"
    code = exit_code_of(lambda: train.main(["--config", "run.py", "--dry_run", *overrides]))
    assert (code, capsys.readouterr().err) == (EXIT_USAGE, found.error)


def test_the_report_comes_before_the_fault(check, tmp_path):
    sizes_differ(tmp_path / "images")
    found = check()
    assert value_of(found.text, "height x width") == "8 x 8: 1, 9 x 9: 1, from 8 x 8 to 9 x 9"
    assert "verdict" not in found.text


# --- the command


def test_faults_of_the_config(check):
    assert "'lr' is not a config key" in check("lr=1").error
    assert "use 'error' or 'skip'" in check("on_bad_image=ignore").error


def test_what_is_written(check, tmp_path, capsys):
    write_image(tmp_path / "images" / "a" / "0.png")
    assert check("--dry_run") == {}
    assert check("--print_config").text.startswith("{")
    code = exit_code_of(lambda: main(["--config", "run.py", "--json", "no/such/folder.json"]))
    assert code == EXIT_FAILURE
    refused = "error: no/such/folder.json: No such file or directory\n"
    assert capsys.readouterr().err == refused
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"images", "run.py"}


def test_as_users_start_it(tmp_path):
    write_image(tmp_path / "a" / "0.png")
    (tmp_path / "a" / "1.png").touch()
    command = [sys.executable, "-m", "datasets.check", "--config", "configs/custom_folder.py"]
    done = subprocess.run(
        [*command, f"data_root={tmp_path}", "image_size=8"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (EXIT_FAILURE, "")
    assert f"{tmp_path}/a/1.png: not a readable PNG" in done.stdout


def test_documented_commands_are_accepted():
    pages = [ROOT / "README.md", ROOT / "README_zh.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    lines = re.findall(r"^python -m datasets\.check (.+)$", text, re.MULTILINE)
    assert lines
    for line in lines:
        args = parse_args(make_parser(), shlex.split(line, comments=True))
        load_config(ROOT / args.config, args.overrides)
