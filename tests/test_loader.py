"""Batches are a pure function of (seed, step): of nothing else that a run may vary."""

from __future__ import annotations

import gc
import os
import signal
import time
from itertools import islice
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import build_dataset
from datasets.loader import Batch, batches, global_indices, image_batches, make_resident
from datasets.storage import InMemoryDataset
from utils.config import Config
from utils.distributed import Runtime
from utils.errors import DataError
from utils.images import to_float

CPU = torch.device("cpu")
ALONE = Runtime(CPU)
NUM_IMAGES = 22


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(NUM_IMAGES):
        path = root / f"class{i % 3}" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def dataset(folder: Path):
    return build_dataset(Config(dataset="custom", data_root=str(folder)))


def first(dataset, count: int, **options: Any) -> list[Batch]:
    defaults = {
        "batch_size": 8,
        "seed": 3,
        "device": CPU,
        "horizontal_flip": True,
        "num_workers": 0,
    }
    options = {**defaults, **options}
    options.setdefault("rows", range(options["batch_size"]))
    resident, num_workers = options.pop("resident", None), options["num_workers"]
    source = make_resident(dataset, ALONE, resident=resident, num_workers=num_workers)
    return list(islice(batches(source, **options), count))


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_batches_are_normalised_and_labelled(dataset):
    decoded = torch.stack([dataset[i][0] for i in range(len(dataset))])
    indices = global_indices(NUM_IMAGES, batch_size=8, seed=3)
    for batch in first(dataset, 7, horizontal_flip=False):
        index = torch.from_numpy(next(indices))
        assert torch.equal(batch.images, to_float(decoded[index]))
        assert torch.equal(batch.labels, dataset.labels[index])
        assert (batch.images.dtype, batch.labels.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize(
    ("resident", "num_workers"), [(True, 0), (False, 0), (False, 1), (False, 2)]
)
@pytest.mark.parametrize("start_step", [0, 4])
def test_residence_workers_and_resuming_change_nothing(dataset, resident, num_workers, start_step):
    reference = first(dataset, 9)
    options = {"resident": resident, "num_workers": num_workers, "start_step": start_step}
    assert_same(first(dataset, 9 - start_step, **options), reference[start_step:])


@pytest.mark.parametrize("batch_size", [1, 5, 22, 50])
def test_each_epoch_is_a_permutation_of_its_own(batch_size):
    steps = -(-4 * NUM_IMAGES // batch_size)
    stream = islice(global_indices(NUM_IMAGES, batch_size=batch_size, seed=0), steps)
    parts = list(stream)
    assert {len(part) for part in parts} == {batch_size}
    epochs = np.concatenate(parts)[: 4 * NUM_IMAGES].reshape(4, NUM_IMAGES)
    assert (np.sort(epochs, axis=1) == np.arange(NUM_IMAGES)).all()
    assert len({epoch.tobytes() for epoch in epochs}) == 4


def test_the_order_does_not_depend_on_the_batch_size():
    orders = [
        np.concatenate(list(islice(global_indices(7, batch_size=b, seed=1), 60 // b)))
        for b in (1, 4, 10, 30)
    ]
    assert all(np.array_equal(order, orders[0]) for order in orders)
    assert not np.array_equal(next(global_indices(7, batch_size=60, seed=2)), orders[0])


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("resident", [True, False])
def test_rows_of_all_ranks_make_the_global_batch(dataset, world_size, resident):
    whole = first(dataset, 4, resident=resident)
    ranks = [
        first(dataset, 4, resident=resident, rows=Runtime(CPU, rank, world_size).share(8))
        for rank in range(world_size)
    ]
    joined = [
        Batch(torch.cat([b.images for b in parts]), torch.cat([b.labels for b in parts]))
        for parts in zip(*ranks, strict=True)
    ]
    assert_same(joined, whole)
    assert_same(first(dataset, 4, rows=slice(0, 8)), whole)


def test_a_rank_without_rows_gets_empty_batches(dataset):
    for resident in (True, False):
        batch = first(dataset, 1, rows=range(8, 8), resident=resident)[0]
        assert batch.images.shape == (0, *dataset.spec.shape)
        assert batch.labels.shape == (0,)


def test_flips_mirror_about_half_of_the_rows(dataset):
    plain, flipped = (first(dataset, 20, batch_size=32, horizontal_flip=on) for on in (False, True))
    mirrored = 0
    for a, b in zip(plain, flipped, strict=True):
        same = (a.images == b.images).flatten(1).all(1)
        turned = (a.images.flip(3) == b.images).flatten(1).all(1)
        assert (same | turned).all()
        mirrored += int(turned.sum())
    assert 0.42 < mirrored / (20 * 32) < 0.58


@pytest.mark.parametrize("num_workers", [0, 1])
def test_global_generators_are_untouched(dataset, num_workers):
    torch.manual_seed(1)
    np.random.seed(1)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    for resident in (True, False):
        first(dataset, 3, resident=resident, num_workers=num_workers)
    list(image_batches(dataset, range(4), 2, num_workers=num_workers))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_global_generators_do_not_matter(dataset):
    reference = first(dataset, 3, resident=False)
    torch.manual_seed(99)
    assert_same(first(dataset, 3, resident=False), reference)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_make_resident_decodes_once(dataset, num_workers):
    resident = make_resident(dataset, ALONE, num_workers=num_workers)
    assert isinstance(resident, InMemoryDataset)
    assert resident.fingerprint == dataset.fingerprint
    assert resident.spec == dataset.spec
    assert resident.class_names == dataset.class_names
    assert all(torch.equal(resident[i][0], dataset[i][0]) for i in range(len(dataset)))
    again = make_resident(resident, ALONE)
    assert again.images.data_ptr() == resident.images.data_ptr()
    assert_same(first(resident, 5), first(dataset, 5))


def test_only_what_fits_becomes_resident(dataset, monkeypatch):
    size = NUM_IMAGES * 3 * 6 * 5
    monkeypatch.setattr("datasets.loader.RESIDENT_LIMIT", size)
    assert make_resident(dataset, ALONE) is not dataset
    monkeypatch.setattr("datasets.loader.RESIDENT_LIMIT", size - 1)
    assert make_resident(dataset, ALONE) is dataset
    assert make_resident(dataset, ALONE, resident=True) is not dataset
    assert make_resident(dataset, ALONE, resident=False) is dataset


@pytest.mark.parametrize("num_workers", [0, 2])
def test_image_batches_keep_the_order(dataset, num_workers):
    indices = [5, 1, 1, 20, 7]
    for source in (dataset, make_resident(dataset, ALONE)):
        parts = list(image_batches(source, indices, 2, num_workers=num_workers))
        assert [len(images) for images, _ in parts] == [2, 2, 1]
        images, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        assert images.dtype == torch.uint8
        assert torch.equal(images, torch.stack([dataset[i][0] for i in indices]))
        assert torch.equal(labels, dataset.labels[indices])
    assert list(image_batches(dataset, [], 2)) == []


@pytest.mark.parametrize(
    ("resident", "num_workers"), [(True, 0), (True, 1), (False, 0), (False, 2)]
)
def test_a_broken_image_is_one_line_from_any_process(tmp_path, resident, num_workers):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for i in range(4):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    broken = tmp_path / "2.png"
    broken.write_bytes(broken.read_bytes()[:-300])
    config = Config(dataset="custom", data_root=str(tmp_path), use_subdirs=False)
    dataset = build_dataset(config)
    with pytest.raises(DataError) as caught:
        first(dataset, 2, batch_size=4, resident=resident, num_workers=num_workers)
    assert str(broken) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_resident_images_are_read_before_training(tmp_path):
    path = tmp_path / "0.png"
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(path)
    dataset = build_dataset(Config(dataset="custom", data_root=str(tmp_path), use_subdirs=False))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"0\.png"):
        make_resident(dataset, ALONE)


def test_workers_outlive_the_signals_that_stop_a_run_and_end_with_the_iterator(dataset):
    before = {child.pid for child in active_children()}
    stream = batches(
        dataset,
        batch_size=8,
        seed=3,
        device=CPU,
        rows=range(8),
        horizontal_flip=True,
        num_workers=1,
    )
    got = [next(stream)]
    workers = [child for child in active_children() if child.pid not in before]
    assert len(workers) == 1
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        os.kill(workers[0].pid, number)
    got += islice(stream, 8)
    assert_same(got, first(dataset, 9))
    assert workers[0].is_alive()
    start = time.monotonic()
    del stream
    gc.collect()
    workers[0].join(5)
    assert not workers[0].is_alive()
    assert time.monotonic() - start < 4
