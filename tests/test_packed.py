"""Archives in the place of folders: the same data set, and one line for what cannot be read."""

from __future__ import annotations

import io
import itertools
import json
import os
import struct
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from datasets import build_dataset, check, pack, packed
from datasets.loader import batches
from datasets.pictures import read_pictures
from tests.image_files import assert_data_error, custom, flat, write_image
from tests.test_train import run, state_of
from utils.errors import exit_code_of

KINDS = ("zip", "deflated zip", "tar", "shards")


@pytest.fixture
def folder(tmp_path):
    """Two splits of two classes, in which names repeat."""
    for number, name in enumerate(
        ("train/b/2.jpg", "train/b/10.PNG", "train/a/2.jpg", "test/b/2.png")
    ):
        write_image(tmp_path / "images" / name, seed=number)
    for number in range(9):
        write_image(tmp_path / "images" / "train" / "a" / f"{number:03d}.png", seed=10 + number)
    (tmp_path / "images" / "train" / "a" / "notes.gif").write_text("")
    (tmp_path / "images" / "train" / ".git").mkdir()
    return tmp_path / "images"


def archive_of(folder: Path, kind: str) -> Path:
    """The files of a folder as an archive beside it."""
    path = folder.parent / {"deflated zip": "d.zip"}.get(kind, f"{folder.name}.{kind}")
    names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
    if kind == "zip":
        assert exit_code_of(lambda: pack.main([str(folder), str(path)])) == 0
    elif kind == "deflated zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in reversed(names):
                archive.write(folder / name, name)
    elif kind == "parquet":
        for split in ("train", "test"):
            rows = rows_of(folder / split)
            parts = [rows[:5], rows[5:]] if split == "train" else [rows]
            for number, part in enumerate(parts):
                name = f"{split}-{number:05d}-of-{len(parts):05d}.parquet"
                parquet_of(path / name, part, row_group_size=3)
    elif kind == "tar":
        with tarfile.open(path, "w") as archive:
            archive.add(folder, ".")
    else:
        path.mkdir()
        for part in range(3):
            with tarfile.open(path / f"{part:05d}.tar", "w") as archive:
                for name in names[part::3]:
                    archive.add(folder / name, name)
    return path


CLASSES = {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}


def parquet_of(
    path: Path, rows: list[dict], features: Any = CLASSES, kinds: tuple = (), **settings: Any
) -> Path:
    """A file as `datasets` of Hugging Face writes it; each `path` is the name alone."""
    import pyarrow as pa
    from pyarrow.parquet import write_table

    path.parent.mkdir(exist_ok=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    about = {"huggingface": json.dumps({"info": {"features": features}})} if features else {}
    fields = {"image": image, "caption": pa.string(), "label": pa.int64()} | dict(kinds)
    schema = pa.schema([item for item in fields.items() if item[0] in rows[0]], about)
    write_table(pa.Table.from_pylist(rows, schema), path, **settings)
    return path


def rows_of(folder: Path) -> list[dict]:
    """The images of class folders, the last class first."""
    return [
        {
            "image": {"bytes": path.read_bytes(), "path": path.name},
            "caption": path.name,
            "label": label,
        }
        for label, name in ((1, "b"), (0, "a"))
        if (folder / name).is_dir()
        for path in sorted((folder / name).iterdir())
        if path.suffix != ".gif"
    ]


def images_of(dataset) -> torch.Tensor:
    return torch.stack([dataset[i][0] for i in range(len(dataset))])


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_is_the_folder(folder, kind):
    path = archive_of(folder, kind)
    for split in ("train", "test"):
        of_folder, of_archive = (
            build_dataset(custom(root, image_size=8), split) for root in (folder, path)
        )
        assert of_archive.names == of_folder.names
        assert of_archive.class_names == of_folder.class_names == ("a", "b")
        assert torch.equal(of_archive.labels, of_folder.labels)
        assert torch.equal(images_of(of_archive), images_of(of_folder))
        assert of_archive.fingerprint == of_folder.fingerprint
    assert build_dataset(custom(path)).spec == build_dataset(custom(folder)).spec
    some = build_dataset(custom(path, classes=(1,)))
    assert some.names == build_dataset(custom(folder, classes=(1,))).names


@pytest.mark.parametrize("kind", ["zip", "tar", "shards", "parquet"])
def test_batches_are_those_of_the_folder_from_any_step(folder, kind):
    settings = dict(batch_size=5, seed=3, rows=slice(0, 5), device=torch.device("cpu"))
    roots, first = (folder, archive_of(folder, kind)), []
    for root in roots:
        dataset = build_dataset(custom(root, image_size=8))
        stream = batches(dataset, **settings, horizontal_flip=True, num_workers=0)
        first.append(list(itertools.islice(stream, 100)))
    for ours, theirs in zip(*first, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
    resumed = batches(dataset, **settings, horizontal_flip=True, num_workers=2, start_step=50)
    for ours, theirs in zip(itertools.islice(resumed, 20), first[0][50:], strict=False):
        assert torch.equal(ours.images, theirs.images)


def test_a_run_goes_on_from_the_folder_to_the_zip(tiny, folder, capsys):
    options = ["dataset=custom", "batch_size=5", "epochs=9", "resident=false", "num_workers=0"]
    zipped = archive_of(folder, "zip")
    run(tiny, "whole", *options, f"data_root={folder}", "max_steps=5")
    for root, step in ((folder, 2), (zipped, 5)):
        run(tiny, "a", *options, f"data_root={root}", f"max_steps={step}", "resume_path=auto")
    states = [state_of(name) for name in ("a", "whole")]
    for key in ("model_state_dict", "ema_model_state_dict"):
        ours, theirs = (state[key] for state in states)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "not the one" not in capsys.readouterr().out


def test_labels_of_a_flat_folder(tmp_path, capsys):
    settings = flat(tmp_path / "images", {"2.png": 0, "0.png": 1, "1.png": 1})
    expected = build_dataset(settings)
    path = tmp_path / "images.zip"
    arguments = [str(tmp_path / "images"), str(path)]
    assert exit_code_of(lambda: pack.main(arguments)) == 0
    assert f"data_root={path} use_subdirs=false label_file=dataset.json" in capsys.readouterr().out
    update = {"data_root": str(path), "label_file": "dataset.json"}
    assert build_dataset(settings.model_copy(update=update)).fingerprint == expected.fingerprint
    pictures = [
        read_pictures(p, ("x", "y"))
        for p in (tmp_path / "images", archive_of(tmp_path / "images", "tar"))
    ]
    assert pictures[0].labels == pictures[1].labels == [1, 1, 0]

    labels = ({"cls": "1"}, {"json": '{"label": 1}'}, {"cls": "0"})
    (tmp_path / "images" / "labels.json").unlink()
    for number, files in enumerate(labels):
        for extension, text in files.items():
            (tmp_path / "images" / f"{number}.{extension}").write_text(text)
    tar = archive_of(tmp_path / "images", "tar")
    settings = custom(tar, use_subdirs=False, label_file="cls")
    assert_data_error(lambda: build_dataset(settings), "1.png", "without a label")
    (tmp_path / "images" / "1.cls").write_text("1")
    dataset = build_dataset(custom(archive_of(tmp_path / "images", "tar"), **settings_of(settings)))
    assert dataset.fingerprint == expected.fingerprint
    assert not dataset.listing.passed_over
    again = [str(tar), str(tmp_path / "again.zip"), "use_subdirs=false", "label_file=cls"]
    assert exit_code_of(lambda: pack.main(again)) == 0
    update["data_root"] = again[1]
    assert build_dataset(settings.model_copy(update=update)).fingerprint == expected.fingerprint


def settings_of(config) -> dict:
    return {"use_subdirs": config.use_subdirs, "label_file": config.label_file}


def test_a_packed_folder_is_one_of_edm(folder):
    path = archive_of(folder, "zip")
    with zipfile.ZipFile(path) as archive:
        table = json.loads(archive.read("dataset.json"))
        assert json.loads(archive.read("class_names.json")) == ["a", "b"]
        names = [name for name in archive.namelist() if not name.endswith(".json")]
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        assert archive.read("train/b/2.jpg") == (folder / "train/b/2.jpg").read_bytes()
    assert names == sorted(names) == [name for name, _ in table["labels"]]
    assert dict(table["labels"])["train/b/10.PNG"] == 1
    assert [*table] == ["labels"]
    again = folder.parent / "again.zip"
    assert exit_code_of(lambda: pack.main([str(path), str(again)])) == 0
    assert again.read_bytes() == path.read_bytes()


def test_a_named_pipe_is_not_waited_for(folder, capsys):
    os.mkfifo(folder / "train" / "a" / "pipe.png")
    assert exit_code_of(lambda: pack.main([str(folder), str(folder.parent / "x.zip")])) == 1
    assert "pipe.png: not a file" in capsys.readouterr().err
    assert not list(folder.parent.glob("x.zip*"))


@pytest.mark.parametrize("output", ["images/x.zip", "there.zip", "x.tar", "nowhere/x.zip"])
def test_packing_replaces_nothing(folder, capsys, output):
    there = folder.parent / "there.zip"
    there.write_text("mine")
    arguments = [str(folder), str(folder.parent / output)]
    assert exit_code_of(lambda: pack.main(arguments)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert output in error
    assert there.read_text() == "mine"
    assert not list(folder.parent.rglob("*.tmp-*"))
    assert output == "there.zip" or not (folder.parent / output).exists()


def test_the_check_reads_archives_and_finds_flipped_bits(folder, tmp_path, monkeypatch, capsys):
    path = archive_of(folder, "zip")
    monkeypatch.chdir(tmp_path)
    Path("run.py").write_text("config = dict(dataset='custom', image_size=8)", encoding="utf-8")
    command = ["--config", "run.py", f"data_root={path}"]
    assert exit_code_of(lambda: check.main(command)) == 0
    assert "12 images in 2 classes" in capsys.readouterr().out
    content = bytearray(path.read_bytes())
    content[content.index((folder / "train/a/003.png").read_bytes()) + 60] ^= 1
    path.write_bytes(content)
    dataset = build_dataset(custom(path, image_size=8))
    place = dataset.names.index("train/a/003.png")
    assert_data_error(lambda: dataset[place], path / "train/a/003.png", "name or checksum")
    assert exit_code_of(lambda: check.main(command)) == 1
    skipping = build_dataset(custom(path, image_size=8, on_bad_image="skip"))
    assert skipping.names[place] == "train/a/004.png"


def test_no_file_is_opened_before_its_image_is_asked_for(tmp_path):
    write_image(tmp_path / "a" / "0.png")
    (tmp_path / "a" / "1.png").write_text("no image")
    dataset = build_dataset(custom(tmp_path, image_size=8))
    assert_data_error(lambda: dataset[1], tmp_path / "a" / "1.png", "not a readable")
    assert_data_error(lambda: build_dataset(custom(tmp_path)), tmp_path / "a" / "1.png")


def zip_of(path: Path, *names: str, deflate: bool = False, **changes: int) -> Path:
    """A .zip with files of these names, and other values in the table of contents."""
    Image.new("RGB", (8, 8)).save(image := io.BytesIO(), "png")
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            kind = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(name), image.getvalue(), kind)
    content = bytearray(path.read_bytes())
    offsets = {"flags": (8, "<H"), "method": (10, "<H"), "packed": (20, "<I"), "size": (24, "<I")}
    start = content.index(b"PK\1\2")
    for key, value in changes.items():
        struct.pack_into(offsets[key][1], content, start + offsets[key][0], value)
    path.write_bytes(content)
    return path


def tar_of(path: Path, **changes) -> Path:
    with tarfile.open(path, "w") as archive:
        for name in ("a/1.png", "a/2.png"):
            info = tarfile.TarInfo(name)
            info.size = 700
            for key, value in changes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(bytes(700)))
    return path


def cut(path: Path, num_bytes: int) -> Path:
    os.truncate(path, num_bytes)
    return path


HOSTILE = {
    "leads out": (lambda p: zip_of(p / "x.zip", "a/../../b.png"), "no relative name"),
    "absolute": (lambda p: zip_of(p / "x.zip", "/a/b.png"), "no relative name"),
    "backslash": (lambda p: zip_of(p / "x.zip", "a\\b.png"), "no relative name"),
    "line break": (lambda p: zip_of(p / "x.zip", "a/..\n/../b.png"), "no relative name"),
    "twice": (lambda p: zip_of(p / "x.zip", "a/b.png", "a/b.png"), "a/b.png is there twice"),
    "encrypted": (lambda p: zip_of(p / "x.zip", "a/b.png", flags=1), "encrypted"),
    "LZMA": (lambda p: zip_of(p / "x.zip", "a/b.png", method=14), "method 14"),
    "sizes": (lambda p: zip_of(p / "x.zip", "a/b.png", packed=9), "9 bytes are not there"),
    "bomb": (lambda p: zip_of(p / "x.zip", "a/b.png", method=8, size=2**31), "too large"),
    "lies": (lambda p: zip_of(p / "x.zip", "a/b.png", deflate=True, size=9), "name or checksum"),
    "no deflate": (lambda p: zip_of(p / "x.zip", "a/b.png", method=8, size=9), "name or checksum"),
    "behind the end": (
        lambda p: zip_of(p / "x.zip", "a/b.png", packed=2**31 - 9, size=2**31 - 9),
        "bytes are not there",
    ),
    "cut zip": (lambda p: cut(zip_of(p / "x.zip", "a/1.png", "a/2.png"), 300), "not a zip"),
    "tar out": (lambda p: tar_of(p / "x.tar", name="../a.png"), "no relative name"),
    "tar twice": (lambda p: tar_of(p / "x.tar", name="a/1.png"), "twice"),
    "link": (lambda p: tar_of(p / "x.tar", type=tarfile.SYMTYPE, linkname="/etc/hosts"), "a link"),
    "device": (lambda p: tar_of(p / "x.tar", type=tarfile.CHRTYPE), "a device"),
    "cut in a file": (lambda p: cut(tar_of(p / "x.tar"), 900), "unexpected end"),
    "cut between files": (lambda p: cut(tar_of(p / "x.tar"), 1536), "cut off"),
    "no tar": (lambda p: cut(tar_of(p / "x.tar"), 0), "cannot be read (empty file)"),
    "zip as tar": (lambda p: zip_of(p / "x.tar", "a/1.png"), "cannot be read"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives_are_one_line(tmp_path, case):
    write, part = HOSTILE[case]
    path = write(tmp_path)
    assert_data_error(lambda: build_dataset(custom(path, image_size=8))[0], path, part)


def test_shards_of_several_splits_are_not_mixed(tmp_path):
    (tmp_path / "shards").mkdir()
    for split in ("train", "validation"):
        zip_of(tmp_path / "shards" / f"{split}-00000-of-00001.zip", f"a/{split}.png")
    build = lambda: build_dataset(custom(tmp_path / "shards", image_size=8))  # noqa: E731
    assert_data_error(build, tmp_path / "shards", "train and val")


def test_an_archive_that_changes_is_noticed(folder):
    path = archive_of(folder, "tar")
    dataset = build_dataset(custom(path, image_size=8))
    packed._opened.cache_clear()
    os.utime(path, (0, 0))
    assert_data_error(lambda: dataset[0], path, "has changed")


def test_files_stay_open_while_they_are_read(folder, monkeypatch):
    """Threads that open a file at once have one each, of which all but one are forgotten."""
    dataset = build_dataset(custom(archive_of(folder, "tar"), image_size=8))
    expected = images_of(dataset)
    monkeypatch.setattr(packed, "_opened", packed._opened.__wrapped__)
    assert torch.equal(images_of(dataset), expected)


@pytest.mark.parametrize("name", ["x.arrow", "x.tar.gz"])
def test_other_archives_are_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"ARROW1")
    build = lambda: build_dataset(custom(tmp_path / name))  # noqa: E731
    assert_data_error(build, name, "is a file, not a folder", "a .zip, .tar or .parquet of them")


def test_parquet_shards_have_the_splits_and_classes_of_their_names(folder):
    path = archive_of(folder, "parquet")
    for split in ("train", "test"):
        of_folder, of_parquet = (
            build_dataset(custom(root, image_size=8), split) for root in (folder, path)
        )
        assert torch.equal(images_of(of_parquet), images_of(of_folder))
        assert torch.equal(of_parquet.labels, of_folder.labels)
        assert of_parquet.class_names == of_folder.class_names == ("a", "b")
    assert build_dataset(custom(path)).spec == build_dataset(custom(folder)).spec
    packed_again = folder.parent / "again.zip"
    assert exit_code_of(lambda: pack.main([str(path), str(packed_again)])) == 0
    again = build_dataset(custom(packed_again, image_size=8))
    assert torch.equal(images_of(again), images_of(build_dataset(custom(folder, image_size=8))))
    with zipfile.ZipFile(packed_again) as archive:
        assert json.loads(archive.read("class_names.json")) == ["a", "b"]


def test_a_parquet_whose_paths_are_no_names_has_those_of_its_rows(folder):
    """Classes keep the order of the labels, whatever they are called, and rows theirs."""
    rows, names = rows_of(folder / "train")[:4], {"label": {"names": ["z: /", "y"]}}
    contents = [row["image"]["bytes"] for row in rows]
    for number, spoil in enumerate((None, "", "a/1.png", ".1.png", "1.txt", "c:\\1.png")):
        for row in rows:
            row["image"]["path"] = spoil
        rows[1]["label"] = 0
        dataset = build_dataset(
            custom(parquet_of(folder.parent / f"{number}.parquet", rows, names), image_size=8)
        )
        assert dataset.names == [
            f"{place}/{number}-{row:07d}.png"
            for place, row in (("00000", 1), ("00000", 2), ("00000", 3), ("00001", 0))
        ]
        assert dataset.class_names == ("z: /", "y")
        files = [dataset.listing.path(i).open().read() for i in range(4)]
        assert files == [contents[i] for i in (1, 2, 3, 0)]
    unlabelled = [{"image": row["image"]} for row in rows]
    path = parquet_of(folder.parent / "plain.parquet", unlabelled, None)
    settings = dict(use_subdirs=False, conditional=False, image_size=8)
    assert len(build_dataset(custom(path, **settings))) == 4
    numbered = build_dataset(custom(parquet_of(path, rows, None), image_size=8))
    assert numbered.class_names == ("0", "1")
    assert_data_error(lambda: build_dataset(custom(path, **settings)), path, "use_subdirs=True")


HOSTILE_PARQUET = {
    "no bytes": (dict(image={"bytes": None, "path": "2.png"}), "null in the place"),
    "no image": (dict(image=None), "null in the place"),
    "text as images": (dict(image="2.png"), "needs one column {bytes, path}"),
    "no label": (dict(label=None), "label None is none of 0 to 1"),
    "below": (dict(label=-1), "label -1 is none of 0 to 1"),
    "above": (dict(label=2), "label 2 is none of 0 to 1"),
    "text as labels": (dict(label="b"), "label of integers"),
}


@pytest.mark.parametrize("case", HOSTILE_PARQUET)
def test_hostile_rows_are_one_line(folder, case):
    import pyarrow as pa

    values, part = HOSTILE_PARQUET[case]
    text = {key: pa.string() for key, value in values.items() if isinstance(value, str)}
    rows = [row | {key: "" for key in text} for row in rows_of(folder / "train")]
    rows[0] |= values
    path = parquet_of(folder.parent / "x.parquet", rows, kinds=tuple(text.items()))
    dataset = lambda: build_dataset(custom(path, image_size=8))  # noqa: E731
    assert_data_error(lambda: images_of(dataset()), path, part)


def test_a_class_of_a_parquet_without_images_is_one_line(folder):
    rows = [row for row in rows_of(folder / "train") if row["label"] == 1]
    path = parquet_of(folder.parent / "x.parquet", rows)
    assert_data_error(lambda: build_dataset(custom(path)), path, "00000: a class folder with no")


def test_damaged_parquet_is_one_line(folder, monkeypatch):
    path = parquet_of(folder.parent / "x.parquet", rows_of(folder / "train"))
    dataset = build_dataset(custom(path, image_size=8))
    content = path.read_bytes()
    packed._row_group.cache_clear()
    os.utime(path, (0, 0))
    assert_data_error(lambda: dataset[0], path, "has changed")
    path.write_bytes(content[: len(content) // 2])
    assert_data_error(lambda: build_dataset(custom(path)), path, "cannot be read", "again")
    (folder.parent / "both").mkdir()
    for number, classes in enumerate((["a", "b"], ["b", "a"])):
        features = {"label": {"names": classes}}
        shard = folder.parent / "both" / f"{number}.parquet"
        parquet_of(shard, rows_of(folder / "train"), features)
    assert_data_error(lambda: build_dataset(custom(shard.parent)), "1.parquet", "is called b")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    path.write_bytes(content)
    assert_data_error(lambda: build_dataset(custom(path)), path, "pip install pyarrow")
