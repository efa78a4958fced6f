"""Data that fooled others: splits by other names, strangers among the images, files that lie."""

from __future__ import annotations

import json
import random
import resource
import struct
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train
from datasets import build_dataset, check, has_test_split
from datasets.decoding import decode_image
from datasets.folder import split_of
from datasets.pictures import fitted_pictures, read_pictures
from datasets.remarks import remarks_on
from editing.from_noise import read_latents
from metrics.reference import read_reference
from tests.hostile_files import chunk, encoded, picture, png
from tests.image_files import assert_data_error, custom, flat, write_image
from training.job import prepare
from utils.distributed import Runtime
from utils.errors import EXIT_OK, EXIT_USAGE, UserError, exit_code_of
from utils.files import read_npz
from utils.images import ImageSpec

# pytest undoes the filters of datasets/decoding.py.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")
CONFIG = """config = dict(dataset="custom", conditional=False, image_size=8, batch_size=2,
    model_params=dict(model_channels=8, channel_mult=(1, 2), num_res_blocks=1))"""
SPEC = ImageSpec(3, 8, 8, 0)


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.py").write_text(CONFIG)


@pytest.fixture
def command(tmp_path, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs a main; (exit code, stdout, stderr). Nothing is written but what the test names."""

    def run(main, *arguments: object) -> tuple[int, str, str]:
        before = set(tmp_path.rglob("*"))
        capsys.readouterr()
        code = exit_code_of(lambda: main([str(a) for a in arguments]))
        out, err = capsys.readouterr()
        if code != EXIT_OK:
            assert set(tmp_path.rglob("*")) == before
            assert err.count("\n") == 1
        return code, out, err

    return run


def images(root: Path, names: str) -> Path:
    for i, name in enumerate(names.split()):
        write_image(root / f"{name.replace('~', ' ')}.png", seed=i)
    return root


# --- splits, classes, junk

SPLITS = {  # images -> class names, train images, test images; or parts of the error
    "valid": ("train/cat/1 train/dog/1 valid/cat/2", "cat dog", "train/cat/1 train/dog/1", 1),
    "capitals": ("Train/cat/1 Test/cat/2", "cat", "Train/cat/1", 1),
    "upper case": ("TRAIN/cat/1 TEST/cat/2", "cat", "TRAIN/cat/1", 1),
    "long names": (
        "training/cat/1 validation/cat/2 testing/cat/3 testing/cat/4",
        "cat",
        "training/cat/1",
        2,
    ),
    "with set": ("train_set/cat/1 test-set/cat/2", "cat", "train_set/cat/1", 1),
    "before": ("images_train/cat/1 images_val/cat/2", "cat", "images_train/cat/1", 1),
    "years": ("train2017/cat/1 val2017/cat/2", "cat", "train2017/cat/1", 1),
    "spaces": ("Training~Data/cat/1 Dev~Set/cat/2", "cat", "Training Data/cat/1", 1),
    "Chinese": ("\u8bad\u7ec3\u96c6/a/1 \u6d4b\u8bd5\u96c6/a/2", "a", "\u8bad\u7ec3\u96c6/a/1", 1),
    "train alone": ("Training/cat/1 Training/dog/1", "cat dog", "Training/cat/1 Training/dog/1", 0),
    "flat test": ("train/cat/1 test/2", "cat", "train/cat/1", 0),
    "one more folder": ("train/cat/1 test/cat/2 extra/3", "cat", "train/cat/1", 1),
    "vehicles": ("train/1 bus/1 car/1", "bus car train", "bus/1 car/1 train/1", 0),
    "deep vehicles": ("train/1 train/steam/2 bus/1", "bus train", "bus/1 train/1 train/steam/2", 0),
    "quality": ("valid/1 invalid/1", "invalid valid", "invalid/1 valid/1", 0),
    "words in class names": ("test_tube/1 train_station/1 cat/1", "cat test_tube train_station",
                             "cat/1 test_tube/1 train_station/1", 0),
    "junk": ("cat/1 @eaDir/1 #recycle/cat/2 __MACOSX/cat/1 cat/@eaDir/3 $RECYCLE.BIN/4 "
             "lost+found/5 System~Volume~Information/6 .ipynb_checkpoints/7 cat/._1", "cat",
             "cat/1", 0),
}  # fmt: skip
UNCLEAR = {
    "no train": ("val/cat/1 test/cat/1", "test/ and val/: named like splits"),
    "test alone": ("Test/cat/1", "Test/: named like splits"),
    "not alone": ("train/cat/1 extra/1", "train/: named like splits"),
    "two of one": ("train/cat/1 Train/cat/1", "Train/ and train/ are one split"),
    "two for test": ("train/cat/1 val/cat/1 valid/cat/1", "val/ and valid/ are one split"),
    "prefixed": ("seg_train/cat/1 seg_test/cat/1 seg_pred/1", "seg_test/ and seg_train/"),
    "camel case": ("catTrain/x/1 catTest/x/1", "catTest/ and catTrain/"),
    "twice": ("train/train/cat/1 test/test/cat/1", "train: train/: named like splits"),
    "inside classes": ("cat/train/1 cat/test/1", "cat/test/ and cat/train/"),
    "one folder around": ("data/train/cat/1 data/valid/cat/1", "data/train/ and data/valid/"),
    "two domains": ("trainA/1 trainB/1 testA/1 testB/1", "testA/ and testB/ and trainA/"),
}


@pytest.mark.parametrize("case", SPLITS)
def test_splits_by_any_name(tmp_path, case):
    names, class_names, train_images, num_test = SPLITS[case]
    config = custom(images(tmp_path / "data", names))
    dataset = build_dataset(config)
    assert dataset.class_names == tuple(class_names.split())
    expected = tmp_path / "expected"
    images(expected, train_images.replace("Training Data", "Training~Data"))
    assert dataset.names == sorted(
        p.relative_to(expected).as_posix() for p in expected.rglob("*.png")
    )
    assert has_test_split(config) == bool(num_test)
    if num_test:
        assert len(build_dataset(config, "test")) == num_test


@pytest.mark.parametrize("case", UNCLEAR)
def test_what_may_be_a_split_is_never_trained_on(tmp_path, command, case):
    names, line = UNCLEAR[case]
    root = images(tmp_path / "data", names)
    for main in (train.main, check.main):
        code, _, error = command(main, "--config", "run.py", f"data_root={root}")
        assert code == EXIT_USAGE
        assert line in error


def test_flat_splits_too(tmp_path):
    config = custom(images(tmp_path, "Train/1 Test/2 extra/3"), use_subdirs=False)
    assert build_dataset(config).names == ["Train/1.png"]
    assert build_dataset(config, "test").names == ["Test/2.png"]
    assert any("1 extra/" in line for line in remarks_on(build_dataset(config)))


def test_a_long_name_is_no_riddle():
    started = time.monotonic()
    assert split_of("dataset" * 36 + "x") is None
    assert time.monotonic() - started < 0.1


# --- what lies beside the images is told once

STRANGERS = {  # file -> how it is counted; None: nobody misses it
    "a/1.dds": "1 .dds", "a/1.TGA": "1 .tga", "a/1.gif": "1 .gif", "a/1.avif": "1 .avif",
    "a/1.heic": "1 .heic", "a/1.ppm": "1 .ppm", "a/deep/1.jp2": "1 .jp2", "a/1.jxl": "1 .jxl",
    "images.zip": "1 .zip", "a/clip.mp4": "1 .mp4", "a/1.npq": "1 .npq", "a/0001": "1 without",
    "a/1.png_large": "1 .png_large", "a/@eaDir/1.png": "1 @eaDir/", "__MACOSX/a/1.png": "1 __MAC",
    "a/1.txt": None, "a/1.json": None, "notes.md": None, "a/Thumbs.db": None, "README": None,
    "a/.DS_Store": None, "a/._1.png": None, ".git/x.png": None, "a/desktop.ini": None,
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "JFIF"])
def test_other_suffixes_of_jpeg(tmp_path, suffix):
    (tmp_path / "a").mkdir()
    picture().save(tmp_path / f"a/1.{suffix}", "JPEG")
    assert build_dataset(custom(tmp_path)).names == [f"a/1.{suffix}"]


def with_strangers(root: Path) -> Path:
    for i in range(3):
        write_image(root / f"a/{i}0.png", seed=i)
    for name in STRANGERS:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"any")
    return root


@pytest.mark.parametrize("name", STRANGERS)
def test_each_stranger(tmp_path, name):
    write_image(tmp_path / "data/a/00.png")
    path = tmp_path / "data" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"any")
    dataset, counted = build_dataset(custom(tmp_path / "data")), STRANGERS[name]
    assert dataset.names == ["a/00.png"]
    lines = [line for line in remarks_on(dataset) if "passed over" in line]
    assert [counted in line for line in lines] == ([True] if counted else [])


def test_every_command_tells_them_once(tmp_path, command):
    root = with_strangers(tmp_path / "data")
    settings = ("--config", "run.py", f"data_root={root}")
    counts = [counted for counted in STRANGERS.values() if counted]
    report = tmp_path / "report.json"
    for main, more in ((train.main, ["--dry_run"]), (check.main, ["--json", report])):
        code, out, _ = command(main, *settings, *more)
        assert code == EXIT_OK
        (line,) = (line for line in out.splitlines() if "passed over" in line)
        assert all(counted in line for counted in counts), line
    told = json.loads(report.read_text())["splits"]["train"]
    assert told["passed_over"][".dds"] == told["passed_over"]["@eaDir/"] == 1
    assert sum(told["passed_over"].values()) == len(counts)
    assert "passed over" in told["remarks"][0]
    pictures = ("--images", root / "a", "--reference", root, "--device", "cpu", "--dry_run")
    _, out, _ = command(evaluate.main, *pictures, "--metrics", "sanity")
    assert [line.split(":")[0] for line in out.splitlines() if "passed over" in line] == [
        str(root), str(root / "a"),
    ]  # fmt: skip


def test_edit_tells_them_too(tmp_path, caplog):
    fitted_pictures(with_strangers(tmp_path / "data") / "a", SPEC, (), None)
    assert "1 .heic" in caplog.text


def test_labelled_images_may_lie_beside_strangers(tmp_path):
    config = flat(tmp_path, {"0.png": 0, "1.png": 1, "2.png": 1})
    for name in ("@eaDir/0.png", "sub/#recycle/1.png"):
        write_image(tmp_path / name)
    (tmp_path / "3.gif").touch()
    dataset = build_dataset(config)
    assert dataset.listing.passed_over == {"@eaDir/": 1, "#recycle/": 1, ".gif": 1}
    assert build_dataset(config.model_copy(update={"classes": (1,)})).listing.passed_over


def test_classes_are_named_at_the_start(tmp_path, command):
    root = images(tmp_path / "data", "Cat/1 cat/1 a/1 b/1 c/1 d/1 e/1")
    _, out, _ = command(train.main, "--config", "run.py", "--dry_run", f"data_root={root}")
    assert "7 classes (Cat, a, b, c, cat, ...)" in out
    assert "differ in case alone: Cat, cat" in out


# --- bits


def sixteen(values: np.ndarray) -> bytes:
    """A 16-bit RGB PNG (H, W, 3), which Pillow does not write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(rows, side=len(values), depth=16, colour_type=2)


def grey(limit: int) -> bytes:
    values = np.random.default_rng(0).integers(0, limit, (8, 8)).astype(np.uint16)
    values[0, 0] = limit - 1
    return encoded(Image.fromarray(values))


def mask(limit: int) -> bytes:
    return encoded(Image.fromarray((np.arange(64).reshape(8, 8) % limit).astype(np.uint8)))


BITS = {
    "12 of 16": ([grey(2**12)], "the upper 4 of 16 bits"),
    "10 of 16": ([grey(2**10)] * 3, "the upper 6 of 16 bits"),
    "8 of 16": ([grey(200)], "the upper 8 of 16 bits"),
    "15 of 16": ([grey(2**15)], "the upper 1 of 16 bits"),
    "RGB": ([sixteen(np.full((8, 8, 3), 4095))], "the upper 4 of 16 bits"),
    "among others": (
        [grey(2**12), mask(64), encoded(picture(size=(8, 8)))],
        "the upper 4 of 16 bits",
    ),
    "a mask": ([mask(2)], "the upper 7 of 8 bits"),
    "all 16": ([grey(2**16), grey(2**9)], None),
    "RGB of 16": ([sixteen(np.full((8, 8, 3), 65535))], None),
    "8 of 8": ([encoded(picture())], None),
}


@pytest.mark.parametrize("case", BITS)
def test_unused_bits(tmp_path, command, case):
    files, line = BITS[case]
    (tmp_path / "data/a").mkdir(parents=True)
    for i, content in enumerate(files):
        (tmp_path / f"data/a/{i}.png").write_bytes(content)
    lines = remarks_on(build_dataset(custom(tmp_path / "data")))
    assert [line in text for text in lines] == ([True] if line else [])
    _, out, _ = command(check.main, "--config", "run.py", f"data_root={tmp_path}/data")
    assert line in out if line else "never used" not in out


# --- files that are not what their name says

CONTENTS = {
    "an AVIF": (bytes(3) + b"\x20ftypavif" + bytes(99), "AVIF content"),
    "a HEIC": (bytes(3) + b"\x18ftypheic" + bytes(99), "HEIC content"),
    "a video": (bytes(3) + b"\x18ftypisom" + bytes(99), "video content"),
    "a TIFF": (lambda: encoded(picture(), "TIFF"), "TIFF content"),
    "a GIF": (lambda: encoded(picture("L"), "GIF"), "GIF content"),
    "a JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(99), "JPEG_2000 content"),
    "a JPEG XL": (b"\xff\n" + bytes(99), "JPEG_XL content"),
    "a drawing": (b"<svg xmlns='x'></svg>", "SVG content"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
    "a page": (b"\xef\xbb\xbf\n<!DOCTYPE html>", "a web page"),
    "a text": (b"error code: 1020", "text ('error code: 1020'"),
    "an array": (b"\x93NUMPY\1\0" + bytes(99), "a single array"),
    "noise": (b"\x07\x99" * 50, "replace or remove it"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_a_stranger_under_a_good_name_is_named(tmp_path, case):
    content, line = CONTENTS[case]
    path = tmp_path / "a" / "1.jpg"
    path.parent.mkdir()
    path.write_bytes(content() if callable(content) else content)
    assert_data_error(lambda: build_dataset(custom(tmp_path)), path, "not a readable", line)


TEXTS = {
    "70 MB": [chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(70_000_000)))],
    "international": [
        chunk(b"iTXt", b"key\0\1\0\0\0" + zlib.compress("\u8bad".encode() * 2_000_000))
    ],
    "a profile": [chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(3_000_000)))],
    "forty": [chunk(b"zTXt", b"k%d\0\0" % i + zlib.compress(bytes(2_000_000))) for i in range(40)],
    "plain": [chunk(b"tEXt", b"key\0" + b"x" * 3_000_000)],
}


@pytest.mark.parametrize("case", TEXTS)
def test_long_texts_break_no_image(tmp_path, case):
    rows = b"".join(b"\0" + bytes([40 * i, 255]) for i in range(2))
    (tmp_path / "1.png").write_bytes(png(rows, *TEXTS[case]))
    (tmp_path / "2.png").write_bytes(png(rows))
    spec = ImageSpec(1, 2, 2, 0)
    one, two = (decode_image(tmp_path / f"{i}.png", spec) for i in (1, 2))
    assert torch.equal(one, two)


# --- label files

LABELS = {
    "EDM": ({"labels": [["0.png", 0], ["1.png", 1], ["2.png", 0]]}, [0, 1, 0]),
    "no labels": ({"labels": None}, "leave label_file out"),
    "one-hot": ({"labels": [["0.png", [0, 1]]]}, "whole number"),
    "absent image": ({"labels": [["0.png", 0], ["9.png", 0]]}, "no such file"),
    "twice": ({"labels": [["0.png", 0], ["0.png", 1]]}, "listed twice"),
    "outside": ({"labels": [["../0.png", 0]]}, "'..'"),
    "unlisted": ({"labels": [["0.png", 0]]}, "without a label"),
    "no pairs": ({"labels": ["0.png", "1.png"]}, "whole number"),
    "triples": ({"labels": [["0.png", 0, 1]]}, "whole number"),
    "none": ({"labels": []}, "no labels"),
    "not alone": ({"labels": [["0.png", 0]], "2.png": 0}, "whole number"),
    "a table": ("file,label\n0.png,0\n", 'must be a mapping {"img1.jpg": 0, ...}'),
    "lines": ('{"file_name": "0.png"}\n{"file_name": "1.png"}\n', "must be a mapping"),
    "other name": ({"annotations": [["0.png", 0]]}, "whole number"),
}


@pytest.mark.parametrize("case", LABELS)
def test_the_label_files_of_others(tmp_path, case):
    labels, expected = LABELS[case]
    config = flat(tmp_path, labels)
    if isinstance(expected, list):
        assert build_dataset(config).labels.tolist() == expected
    else:
        assert_data_error(lambda: build_dataset(config), "labels.json", expected)


# --- pictures


def npz(path: Path, **arrays: object) -> Path:
    np.savez_compressed(path, **{name: np.asarray(array) for name, array in arrays.items()})
    return path


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_an_npz_is_brought_to_the_size_as_a_folder_is(tmp_path):
    pixels = numbers(3, 12, 20, 3)
    npz(tmp_path / "a.NPZ.npz", arr_0=pixels).rename(tmp_path / "a.NPZ")
    (tmp_path / "a").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"a/{i}.png")
    for size, channels in (((8, 8), None), ((8, 6), 1), (None, 1), (None, None)):
        both = [
            read_pictures(tmp_path / name, (), image_size=size, image_channels=channels).data
            for name in ("a", "a.NPZ")
        ]
        assert torch.equal(*(torch.stack([d[i][0] for i in range(3)]) for d in both))


def test_evaluate_applies_the_size(tmp_path, command):
    npz(tmp_path / "a.npz", arr_0=numbers(3, 8, 8, 3))
    words = ("--images", "a.npz", "--output", "out", "--metrics", "sanity", "--device", "cpu")
    for more, shape in (([], [3, 8, 8]), (["image_size=16", "image_channels=1"], [1, 16, 16])):
        assert command(evaluate.main, *words, *more)[0] == EXIT_OK
        (saved,) = [read_pictures("a.npz", (), image_size=(16, 16) if more else None)]
        assert list(saved.data.spec.shape)[1:] == shape[1:]
    told = json.loads((tmp_path / "out/report.json").read_text())["provenance"]
    expected = read_pictures("a.npz", (), image_size=(16, 16), image_channels=1).data.fingerprint
    assert told["images_fingerprint"] == expected


ARGUMENTS = {
    "x.npy": (
        b"\x93NUMPY\1\0" + bytes(99),
        "a single array: an .npy file, not an .npz; give a fol",
    ),
    "x.png": (encoded(picture()), "is a file, not a folder; give a folder of images"),
    "x.zip": (b"PK\5\6" + bytes(18), "it holds no images"),
    "x.txt": (b"hello", "text ('hello' ...); give a folder"),
    "absent": (None, "no such folder; give a folder"),
    "lfs.npz": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "page.npz": (b"<html>", "a web page"),
    "cut.npz": (b"PK\3\4" + bytes(99), "cut off"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_images_that_are_no_folder(tmp_path, command, name):
    content, line = ARGUMENTS[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, _, error = command(evaluate.main, "--images", name, "--device", "cpu")
    assert code == EXIT_USAGE
    assert line in error
    assert name in error


def test_pictures_in_splits_are_not_scored_by_halves(tmp_path):
    images(tmp_path, "train/a/1 Test/a/1")
    assert_data_error(lambda: read_pictures(tmp_path, ()), "holds splits")


# --- .npz files that are damaged or lie


def stored(path: Path) -> dict[str, np.ndarray]:
    return dict(np.load(path))


OWN = {
    "sample": (
        dict(arr_0=numbers(4, 8, 8, 3), arr_1=np.arange(4)),
        lambda path: (p := read_pictures(path, tuple("abcd")))
        and (torch.stack([p.data[i][0] for i in range(len(p.data))]).tolist(), p.labels),
    ),
    "invert": (
        dict(
            x_T=np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32),
            num_inference_steps=5, cfg_scale=1.5, labels=[1, 0],
        ),
        lambda path: (r := read_latents(path, (3, 4, 4))) and (r[0].tolist(), *r[1:]),
    ),
    "reference": (
        dict(mu=np.zeros(8), sigma=np.eye(8), meta='{"a": 1}', num_images=9),
        lambda path: (r := read_reference(path, 8))
        and (r.mu.tolist(), r.sigma.tolist(), r.num_images, dict(r.meta)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_bit_is_one_line_or_changes_nothing(tmp_path, kind, save):
    arrays, read = OWN[kind]
    save(tmp_path / "good.npz", **arrays)
    path, content = str(tmp_path / "bad.npz"), (tmp_path / "good.npz").read_bytes()
    expected, rng, refused = read(str(tmp_path / "good.npz")), random.Random(0), []
    for _ in range(1000):
        changed, place = bytearray(content), rng.randrange(8 * len(content))
        changed[place // 8] ^= 1 << place % 8
        Path(path).write_bytes(changed)
        try:
            assert read(path) == expected, place
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 500
    assert all(map(str.isprintable, refused))


def header(shape: object, dtype: str = "|u1") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return long_header(text)


def long_header(text: bytes) -> bytes:
    return b"\x93NUMPY\2\0" + struct.pack("<I", len(text)) + text


def zipped(*members: tuple[str, bytes], kind: int = zipfile.ZIP_DEFLATED) -> Callable:
    def write(path: Path) -> None:
        with warnings.catch_warnings(), zipfile.ZipFile(path, "w", kind) as archive:
            warnings.simplefilter("ignore")  # a name given twice
            for name, content in members:
                archive.writestr(name, content)

    return write


GOOD = header((1, 8, 8, 3)) + bytes(range(192))
HALF_GIB = 2**29 // 192


def bomb(kind: int, lie: int | None = None, parts: int = 64) -> Callable:
    """Zeros, `parts` of 8 MiB; `lie`: how many bytes the directory says they are packed in."""

    def write(path: Path) -> None:
        with (
            zipfile.ZipFile(path, "w", kind) as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as member,
        ):
            member.write(header((HALF_GIB, 8, 8, 3)))
            for _ in range(parts):
                member.write(bytes(HALF_GIB * 3))
        if lie is not None:
            content = bytearray(path.read_bytes())
            at = content.rindex(b"PK\1\2")
            content[at + 20 : at + 24] = struct.pack("<I", lie)
            path.write_bytes(content)

    return write


def patched(local: int, central: int, value: int) -> Callable:
    """A good file where the 16 bits there, in both tables of contents, are this."""

    def write(path: Path) -> None:
        zipped(("arr_0.npy", GOOD))(path)
        content = bytearray(path.read_bytes())
        for mark, place in ((b"PK\3\4", local), (b"PK\1\2", central)):
            at = content.rindex(mark) + place
            content[at : at + 2] = struct.pack("<H", value)
        path.write_bytes(content)

    return write


HOSTILE = {
    "bomb": (bomb(zipfile.ZIP_DEFLATED), "would become 536,870"),
    "bomb that lies": (bomb(zipfile.ZIP_DEFLATED, 2**31 - 1), "would become 536,870"),
    "bz2 bomb": (bomb(zipfile.ZIP_BZIP2, parts=1), "numpy does not write"),
    "LZMA bomb": (bomb(zipfile.ZIP_LZMA, parts=1), "numpy does not write"),
    "huge shape": (zipped(("arr_0.npy", header((2**40, 8, 8, 3)))), "says (1099511627776"),
    "negative shape": (zipped(("arr_0.npy", header((-1, 8, 8, 3)) + bytes(99))), "says (-1"),
    "endless product": (zipped(("arr_0.npy", header((2**62, 2**62, 0)))), "array is too big"),
    "huge header": (zipped(("arr_0.npy", long_header(b"{" + b" " * 10**8))), "would become 100"),
    "header of lies": (zipped(("arr_0.npy", b"\x93NUMPY\2\0\xff\xff\xff\xff{")), "array header"),
    "longish header": (zipped(("arr_0.npy", long_header(b"{" + b" " * 10_500))), "array header"),
    "nested brackets": (zipped(("arr_0.npy", long_header(b"(" * 9000))), "cannot be read"),
    "nested signs": (zipped(("arr_0.npy", long_header(b"-" * 9000 + b"1"))), "cannot be read"),
    "objects": (zipped(("arr_0.npy", header((1,), "|O") + b"cos\nsystem\n(S'x'\ntR.")), "Python"),
    "twice": (zipped(("arr_0.npy", GOOD), ("arr_0.npy", GOOD)), "a name twice"),
    "two spellings": (zipped(("arr_0.npy", GOOD), ("arr_0", GOOD)), "a name twice"),
    "encrypted": (patched(6, 8, 1), "encrypted"),
    "another method": (patched(8, 10, 99), "not supported"),
    "escapes": (zipped(("\x1b[31m\n.npy", b"x")), "no array arr_0"),
    "many": (zipped(*((f"a{i}.npy", b"x") for i in range(20_000))), "no array arr_0"),
}
HARMLESS = {
    "path": zipped(("../x.npy", b"x"), ("arr_0.npy", GOOD)),
    "many": zipped(("arr_0.npy", GOOD), *((f"a{i}.npy", b"x") for i in range(20_000))),
    "other objects": zipped(("arr_0.npy", GOOD), ("other.npy", header((1,), "|O"))),
    "stored": zipped(("arr_0.npy", GOOD), kind=zipfile.ZIP_STORED),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_npz(tmp_path, case):
    write, line = HOSTILE[case]
    write(tmp_path / "a.npz")
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    message = assert_data_error(lambda: read_pictures(tmp_path / "a.npz", ()), "a.npz", line)
    assert "allow_pickle" not in message
    assert len(message) < 600
    assert time.monotonic() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB: 128 MiB


@pytest.mark.parametrize("case", HARMLESS)
def test_only_what_is_needed_is_read(tmp_path, case):
    HARMLESS[case](tmp_path / "a.npz")
    array = read_npz(tmp_path / "a.npz", ["arr_0"])["arr_0"]
    assert array.tobytes() == bytes(range(192))
    assert [path.name for path in tmp_path.iterdir() if path.name != "run.py"] == ["a.npz"]


def test_half_a_number_of_steps_is_not_rounded(tmp_path):
    arrays, _ = OWN["invert"]
    np.savez(tmp_path / "a.npz", **arrays | {"num_inference_steps": 2.5})
    with pytest.raises(UserError, match="invert"):
        read_latents(str(tmp_path / "a.npz"), (3, 4, 4))


@pytest.mark.parametrize("key", ["save_dir", "sample_dir"])
def test_no_run_writes_among_the_classes(key, tmp_path):
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "images" / name / "1.png")
    others = {"save_dir": str(tmp_path / "runs"), "sample_dir": str(tmp_path / "previews")}
    given = custom(
        tmp_path / "images", conditional=True, **(others | {key: str(tmp_path / "images/out")})
    )
    with pytest.raises(UserError, match="among the classes"):
        prepare(given, Runtime(torch.device("cpu")))
    assert prepare(custom(tmp_path / "images", **others), Runtime(torch.device("cpu")))
