"""Every kind of hostile file under both settings of `on_bad_image`, with exact counts."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from datasets import build_dataset
from datasets.bad_images import max_bad, next_good
from datasets.decoding import MAX_FILE_BYTES
from datasets.loader import batches, make_resident
from tests.hostile_files import BAD, GOOD, KINDS, write_kind
from tests.image_files import assert_data_error, custom, write_image
from utils.checkpoint import load_checkpoint
from utils.distributed import Runtime
from utils.errors import EXIT_OK

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
ALONE = Runtime(CPU)
# pytest undoes the filters of datasets/decoding.py.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")


def skipping(root: Path, **values: object):
    return build_dataset(custom(root, **{"image_size": 8, "on_bad_image": "skip", **values}))


def load_all(dataset) -> torch.Tensor:
    return torch.stack([dataset[i][0] for i in range(len(dataset))])


def many_good(folder: Path, count: int, class_name: str = "a") -> None:
    """Links to one file: quick to make, and to the loader images like any others."""
    first = write_image(folder / class_name / "00000.png")
    for i in range(1, count):
        os.link(first, folder / class_name / f"{i:05d}.png")


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# --- one file at a time


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three good images, a.png, c.png and d.png, of one class."""
    for i, name in enumerate("acd"):
        write_image(tmp_path / "class" / f"{name}.png", seed=i)
    return tmp_path


def test_there_are_kinds_enough():
    assert len(GOOD) >= 20
    assert len(BAD) >= 20


@pytest.mark.parametrize("on_bad_image", ["error", "skip"])
@pytest.mark.parametrize("kind", GOOD)
def test_odd_images_are_used(folder, caplog, kind, on_bad_image):
    path = write_kind(folder / "class", kind)
    dataset = build_dataset(custom(folder, image_size=8, on_bad_image=on_bad_image))
    names = [os.fsencode(name) for name in dataset.names]
    assert names == sorted({b"class/" + os.fsencode(n) for n in os.listdir(folder / "class")})
    assert len(names) == 4
    assert os.fsencode(path.name) in b"".join(names)
    assert load_all(dataset).shape == (4, 3, 8, 8)
    assert warnings_in(caplog) == []


@pytest.mark.parametrize("kind", BAD)
def test_bad_images_stop_training(folder, kind):
    path = write_kind(folder / "class", kind)
    message = KINDS[kind].message

    def read() -> None:
        load_all(build_dataset(custom(folder, image_size=8)))

    assert_data_error(read, path, message)


@pytest.mark.parametrize("image_size", [8, None])
@pytest.mark.parametrize("kind", BAD)
def test_the_next_good_image_takes_the_place(folder, caplog, kind, image_size):
    path = write_kind(folder / "class", kind)
    dataset = skipping(folder, image_size=image_size)
    assert dataset.names == [f"class/{name}.png" for name in "accd"]
    assert load_all(dataset).shape == (4, 3, 8, 8)
    assert torch.equal(dataset[1][0], dataset[2][0])
    (warning,) = warnings_in(caplog)
    assert "1 of 4 images" in warning
    assert warning.endswith(f": class/{path.name}")


def test_files_over_the_limit_are_not_even_opened(folder):
    path = folder / "class" / "b.webp"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # sparse: takes no space
    assert_data_error(lambda: build_dataset(custom(folder)), path, "too large", "512 MiB")
    assert skipping(folder).names[1] == "class/c.png"


@pytest.mark.parametrize("on_bad_image", ["error", "skip"])
def test_what_cannot_be_read_is_never_skipped(folder, on_bad_image):
    """The next process might be able to read it: then the processes would differ."""
    path = folder / "class" / "b.png"
    settings = custom(folder, image_size=8, on_bad_image=on_bad_image)
    path.symlink_to("nowhere.png")
    assert_data_error(lambda: build_dataset(settings), path, "No such file")
    path.unlink()
    os.mkfifo(path)
    read = lambda: build_dataset(settings)[1]  # noqa: E731
    assert_data_error(read, path, "not a regular file")
    if os.geteuid() != 0:
        path.unlink()
        write_image(path).chmod(0)
        assert_data_error(read, path, "Permission denied")


# --- many files


def test_all_kinds_in_thousands_of_files(tmp_path, caplog):
    many_good(tmp_path, 100 * len(BAD))
    for kind in (*GOOD, *BAD):
        write_kind(tmp_path / "a", kind, prefix=f"{kind} ")
    count = len(os.listdir(tmp_path / "a"))
    assert count == 101 * len(BAD) + len(GOOD)
    dataset = skipping(tmp_path)
    (warning,) = warnings_in(caplog)
    assert f"{len(BAD)} of {count} images" in warning
    named = warning.partition("each: ")[2]
    assert named.count("a/") == 10
    assert named.endswith(", ...")
    assert len(dataset) == count
    assert len(set(dataset.names)) == count - len(BAD)
    assert not any(kind + " " in name for kind in BAD for name in dataset.names)
    assert make_resident(dataset, ALONE).images.shape == (count, 3, 8, 8)


@pytest.mark.parametrize(
    ("count", "num_bad", "allowed"),
    [(2, 1, 1), (99, 1, 1), (199, 1, 1), (199, 2, 1), (200, 2, 2), (300, 4, 3), (3, 3, 1)],
)
def test_at_most_one_per_cent(tmp_path, caplog, count, num_bad, allowed):
    many_good(tmp_path, count - num_bad) if count > num_bad else (tmp_path / "a").mkdir()
    for i in range(num_bad):
        (tmp_path / "a" / f"bad{i}.png").touch()
    assert max_bad(count) == allowed
    if num_bad <= allowed:
        assert len(skipping(tmp_path)) == count
        assert f"{num_bad} of {count} images" in warnings_in(caplog)[0]
        return
    parts = (tmp_path, f"{num_bad} of {count} images", f"replaces {allowed} at most", "bad0.png")
    assert_data_error(lambda: skipping(tmp_path), *parts)
    assert warnings_in(caplog) == []


def test_a_folder_of_one_bad_image(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "bad.png").touch()
    assert_data_error(lambda: skipping(tmp_path), "1 of 1 images", "replaces 0 at most")


def test_a_class_is_not_lost(tmp_path):
    many_good(tmp_path, 150)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "bad.png").touch()
    assert_data_error(lambda: skipping(tmp_path), "class b has no image", "b/bad.png")


def test_the_label_comes_with_the_image(tmp_path):
    """Past the end of a class, and round the end of the data set."""
    for name in ("a/0.png", "b/0.png", "b/1.png"):
        write_image(tmp_path / name, seed=len(name) + ord(name[0]))
    (tmp_path / "a" / "9.png").touch()
    dataset = skipping(tmp_path)
    assert dataset.names == ["a/0.png", "b/0.png", "b/0.png", "b/1.png"]
    assert dataset.labels.tolist() == [0, 1, 1, 1]
    (tmp_path / "a" / "9.png").unlink()
    (tmp_path / "b" / "9.png").touch()
    dataset = skipping(tmp_path)
    assert dataset.names == ["a/0.png", "b/0.png", "b/1.png", "a/0.png"]
    assert dataset.labels.tolist() == [0, 1, 1, 0]


def test_next_good_is_the_next_in_order():
    rng = np.random.default_rng(0)
    for size in (1, 2, 5, 40):
        for _ in range(20):
            is_bad = rng.random(size) < 0.7
            is_bad[rng.integers(size)] = False
            expected = [
                next(j % size for j in range(i, i + size) if not is_bad[j % size])
                for i in range(size)
            ]
            assert next_good(is_bad.tolist()) == expected


def test_celeba_skips_too(tmp_path, caplog):
    for i in range(6):
        write_image(tmp_path / "celeba" / "img_align_celeba" / f"{i}.jpg", (218, 178), seed=i)
    listing = "\n".join(f"{i}.jpg {2 * (i % 2)}" for i in range(6))
    (tmp_path / "celeba" / "list_eval_partition.txt").write_text(listing)
    (tmp_path / "celeba" / "img_align_celeba" / "2.jpg").write_bytes(b"")
    dataset = skipping(tmp_path, dataset="celeba")
    assert dataset.names == ["0.jpg", "4.jpg", "4.jpg"]
    assert "2.jpg" in warnings_in(caplog)[0]


def test_the_size_is_that_of_the_first_good_image(tmp_path):
    """Also for the test split, and a broken image of another size is no contradiction."""
    for name in ("train/a/1.png", "train/a/2.png", "test/a/1.png"):
        write_image(tmp_path / name, (6, 9))
    path = write_image(tmp_path / "train" / "a" / "0.png", (90, 90))
    path.write_bytes(path.read_bytes()[:-200])
    settings = custom(tmp_path, on_bad_image="skip")
    for split in ("train", "test"):
        assert build_dataset(settings, split).spec == (3, 6, 9, 1)


# --- what depends on it


def test_the_fingerprint_follows_the_images_used(folder):
    strict = build_dataset(custom(folder, image_size=8)).fingerprint
    assert skipping(folder).fingerprint == strict
    seen = {strict}
    for name in ("b.png", "e.png"):
        (folder / "class" / name).touch()
        dataset = skipping(folder)
        assert dataset.fingerprint not in seen
        assert dataset.fingerprint == skipping(folder).fingerprint
        seen.add(dataset.fingerprint)
        (folder / "class" / name).unlink()
    good = write_image(folder / "class" / "b.png")
    assert skipping(folder).fingerprint not in seen
    assert good.exists()


@pytest.mark.parametrize("start_step", [0, 5])
@pytest.mark.parametrize(
    ("resident", "num_workers"), [(True, 0), (True, 2), (False, 0), (False, 1), (False, 2)]
)
def test_workers_and_resuming_change_nothing(folder, resident, num_workers, start_step):
    def take(count: int, *, resident: bool | None, **options: object) -> list[torch.Tensor]:
        stream = batches(
            make_resident(skipping(folder), ALONE, resident=resident),
            batch_size=3,
            seed=1,
            device=CPU,
            rows=range(3),
            horizontal_flip=True,
            **options,
        )
        return [batch.images for batch in islice(stream, count)]

    (folder / "class" / "b.png").touch()
    reference = take(9, resident=None, num_workers=0)[start_step:]
    found = take(9 - start_step, resident=resident, num_workers=num_workers, start_step=start_step)
    assert all(torch.equal(a, b) for a, b in zip(reference, found, strict=True))


def test_training_resumes_exactly(tiny, tmp_path):
    many_good(tmp_path / "images", 150)
    write_kind(tmp_path / "images" / "a", "truncated PNG")
    write_image(tmp_path / "images" / "b" / "0.png", seed=5)
    settings = ["dataset=custom", f"data_root={tmp_path}/images", "on_bad_image=skip"]

    def run(name: str, *overrides: str) -> dict:
        given = ["--config", str(tiny), f"experiment_name={name}", *settings, *overrides]
        assert train.main(given) == EXIT_OK
        return load_checkpoint(Path("checkpoints") / name / "current_model.pth")

    whole = run("whole", "max_steps=6")
    run("parts", "max_steps=2", "resident=false", "num_workers=2")
    parts = run("parts", "max_steps=6", "resume_path=auto")
    for key in ("model_state_dict", "ema_model_state_dict"):
        assert all(torch.equal(whole[key][name], parts[key][name]) for name in whole[key])


# --- memory

MEASURE = """
import json, sys
from pathlib import Path
from datasets import build_dataset
from utils.images import ImageSpec
from datasets.decoding import decode_image, read_size
from utils.config import Config
from utils.errors import DataError

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

folder = Path(sys.argv[1])
decode_image(folder / "a" / "good.png", ImageSpec(3, 8, 8, 0))
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before, messages = status("VmRSS"), {}
for path in sorted((folder / "a").iterdir()):
    for read in (read_size, lambda path: decode_image(path, ImageSpec(3, 8, 8, 0))):
        try:
            read(path)
        except DataError as error:
            messages[path.name] = str(error)
for how in ("error", "skip"):
    size = 8 if how == "skip" else None
    config = Config(dataset="custom", data_root=str(folder), image_size=size, on_bad_image=how)
    try:
        build_dataset(config)
    except DataError as error:
        messages[how] = str(error)
print(json.dumps([status("VmHWM") - before, messages]))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_bombs_are_refused_in_little_memory(tmp_path):
    bombs = [kind for kind in KINDS if "bomb" in kind]
    write_image(tmp_path / "a" / "good.png")
    paths = {write_kind(tmp_path / "a", kind, prefix=kind).name: kind for kind in bombs}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    growth, messages = json.loads(done.stdout)
    refused = {kind for name, kind in paths.items() if name in messages}
    assert refused == set(bombs) & set(BAD)
    assert {"error", "skip"} <= set(messages)
    assert growth < 100, f"{growth:.0f} MiB"
