"""Nearest train images against brute force; copies are told from held-out images."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from datasets.real import RealImages
from metrics.memorization import MemorizationScorer, chance_of_hits, choose, compare, nearest_images
from metrics.sanity import SanityScorer
from metrics.scoring import Scoring, run_scorers
from tests.test_metrics import (
    SINGLE,
    batches_of,
    pixel_distance,
    random_images,
    real_images_of,
    real_sets,
)
from tests.test_sanity import score, with_real
from utils.distributed import distributed_runtime

CPU = torch.device("cpu")


def brute_force(queries: Tensor, train: Tensor) -> Tensor:
    """(Q, N) int64 squared distances in 8-bit steps."""
    difference = queries.long()[:, None] - train.long()[None]
    return difference.square().flatten(2).sum(2)


def search(queries: Tensor, train: Tensor, *, left_out: Tensor | None = None, **options):
    if left_out is None:
        left_out = torch.full((len(queries),), -1)
    return nearest_images(
        queries, train.split(7), len(train), left_out=left_out, device=CPU, **options
    )


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 10)])
@pytest.mark.parametrize("block_rows", [None, 1, 4, 16, 1000])
def test_search_is_brute_force_for_any_block_size(shape, block_rows):
    """Ties included: of equal train images the first comes first."""
    train = random_images(50, shape)
    train[30:40] = train[:10]
    queries = torch.cat([train[35:40], random_images(9, shape, seed=1), 255 - train[:3]])
    found = search(queries, train, num_neighbours=10, block_rows=block_rows)
    table = brute_force(queries, train)
    expected = table.sort(dim=1, stable=True)
    assert torch.equal(found.squared, expected.values[:, :10])
    assert torch.equal(found.positions, expected.indices[:, :10])
    assert found.squared[:5, :2].tolist() == [[0, 0]] * 5
    assert found.positions[:5, :2].tolist() == [[i, 30 + i] for i in range(5, 10)]


def test_search_is_exact_where_float32_is_not():
    """Bright large images: sums of squares need 34 bits, and the nearest differs by one step."""
    train = torch.full((3, 3, 256, 256), 255, dtype=torch.uint8)
    train[1, 0, 0, 0] = 254
    train[2, 0, 0, 0] = 253
    found = search(train[1:2], train, num_neighbours=3)
    assert found.squared.tolist() == [[0, 1, 1]]
    assert found.positions.tolist() == [[1, 0, 2]]


@pytest.mark.parametrize("block_rows", [None, 4])
def test_an_image_can_be_left_out_of_its_own_search(block_rows):
    train = random_images(20)
    own = torch.tensor([3, 19, -1])
    queries = train[torch.tensor([3, 19, 5])]
    found = search(queries, train, left_out=own, num_neighbours=19, block_rows=block_rows)
    assert 3 not in found.positions[0]
    assert 19 not in found.positions[1]
    assert found.positions[2, 0] == 5
    assert (found.squared[:2] > 0).all()


@pytest.mark.parametrize(("hits", "count", "hits_real", "count_real"),
                         [(0, 50, 1, 100), (9, 1000, 10, 1000), (25, 1000, 10, 1000),
                          (3, 100, 2, 180), (100, 100, 99, 100)])  # fmt: skip
def test_chance_is_the_beta_binomial_tail(hits, count, hits_real, count_real):
    from scipy.stats import betabinom

    expected = betabinom(count, hits_real + 1, count_real - hits_real).sf(hits - 1)
    assert chance_of_hits(hits, count, hits_real, count_real) == pytest.approx(expected, rel=1e-8)


def test_chance_nears_the_binomial_tail_with_a_large_baseline():
    from scipy.stats import binom

    found = chance_of_hits(18, 1000, 10_000, 1_000_000)
    assert found == pytest.approx(binom(1000, 0.01).sf(17), rel=0.05)
    assert chance_of_hits(5, 5, 7, 7) == 1.0


def test_alarms_on_images_like_the_held_out_ones_are_as_rare_as_promised():
    rng = np.random.default_rng(0)
    alarms = sum(compare(rng.random((300, 2)), rng.random((300, 2)))["flagged"] for _ in range(500))
    assert alarms <= 10


# --- the scorer


@pytest.fixture(scope="module")
def digits() -> tuple[RealImages, RealImages, Tensor, Tensor]:
    """Train and test split, the train images, and 297 images that are in neither."""
    from sklearn.datasets import load_digits

    images = (torch.tensor(load_digits().images) * 15.9).round().to(torch.uint8)[:, None]
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    train, test, rest = images[:1200], images[1200:1500], images[1500:]
    test_split = dataclasses.replace(with_real(test), split="test")
    return with_real(train), test_split, train, rest


def scorer_of(images: Tensor, **options) -> Callable[[], MemorizationScorer]:
    return lambda: MemorizationScorer(
        CPU, num_images=len(images), shape=tuple(images.shape[1:]), **options
    )


@pytest.mark.parametrize("with_test_split", [True, False])
def test_copies_are_flagged_and_held_out_images_are_not(digits, with_test_split):
    real, test, train, rest = digits
    test = test if with_test_split else None
    found = score(scorer_of(rest), rest, real_sets(real, test))
    assert found["status"] == "ok"
    assert found["value"] == found["generated"]["share_close"] <= 0.03
    assert found["held_out"]["share_close"] == pytest.approx(0.01, abs=0.001)
    assert not found["flagged"]
    assert found["generated"]["num_copies"] == found["held_out"]["num_copies"] == 0
    medians = [found[kind]["percentiles"]["p50"] for kind in ("generated", "held_out")]
    assert medians[0] == pytest.approx(medians[1], rel=0.1)
    assert found["n_checked"] == 297
    assert found["n_train"] == 1200
    assert found["n_held_out"] == (300 if with_test_split else 1000)
    assert found["baseline"].startswith("test" if with_test_split else "train")
    assert found["better"] == "lower"

    copies = train[::4]
    found = score(scorer_of(copies), copies, real_sets(real, test))
    assert found["value"] == 1.0
    assert found["flagged"] is True
    assert found["generated"]["num_copies"] == len(copies) == 300
    assert found["generated"]["median_ratio"] == 0.0
    assert found["held_out"]["median_ratio"] > 0.8


def test_a_few_noisy_copies_are_enough(digits):
    real, test, train, rest = digits
    images = rest.clone()
    noise = random_images(30, (1, 8, 8)) // 32
    images[::10] = train[:30].clamp(max=240) + noise
    found = score(scorer_of(images), images, real_sets(real, test))
    assert found["flagged"]
    assert 0.09 < found["value"] < 0.14
    assert found["generated"]["num_copies"] == 0


def test_entry_is_what_brute_force_gives(digits):
    real, test, train, rest = digits
    images = rest[:120]
    found = score(scorer_of(images), images, real_sets(real, test))
    squared = {
        kind: brute_force(queries, train).sort(1).values.double().numpy()
        for kind, queries in {"generated": images, "held_out": test.load(test.indices)}.items()
    }
    nearest = {kind: np.sqrt(table[:, 0] / 64) / 255 for kind, table in squared.items()}
    threshold = np.percentile(nearest["held_out"], 1)
    assert found["threshold"] == pytest.approx(threshold)
    assert found["value"] == (nearest["generated"] <= threshold).mean()
    for kind, table in squared.items():
        ratio = np.median(np.sqrt(table[:, 0] / table[:, 1]))
        assert found[kind]["median_ratio"] == pytest.approx(ratio)
        assert list(found[kind]["percentiles"].values()) == pytest.approx(
            np.percentile(nearest[kind], [1, 5, 25, 50, 75, 95, 99]).tolist()
        )
    order = np.argsort(nearest["generated"], kind="stable")[:8]
    assert [pair["index"] for pair in found["closest"]] == order.tolist()
    for pair in found["closest"]:
        difference = images[pair["index"]].double() - train[pair["train_index"]].double()
        assert pair["distance"] == pytest.approx(difference.square().mean().sqrt().item() / 255)


@pytest.mark.parametrize("channels", [1, 3])
def test_pairs_are_the_pictures_of_the_closest(channels):
    train, images = random_images(40, (channels, 6, 5)), random_images(12, (channels, 6, 5), seed=1)
    images[7] = train[33]
    real = with_real(train)
    scorer = scorer_of(images)()
    found = run_scorers(
        [scorer],
        real=real_sets(real),
        batches=batches_of(images, None),
        num_images=12,
        runtime=SINGLE,
    )["memorization"]
    assert len(scorer.pairs) == len(found["closest"]) == 8
    assert found["closest"][0] == {"index": 7, "train_index": 33, "distance": 0.0}
    for (generated, near), pair in zip(scorer.pairs, found["closest"], strict=True):
        assert generated.dtype == near.dtype == np.uint8
        assert generated.shape == ((6, 5, 3) if channels == 3 else (6, 5))
        picture = images[pair["index"]].permute(1, 2, 0).numpy()
        assert np.array_equal(generated, picture.squeeze())
        assert np.array_equal(near, train[pair["train_index"]].permute(1, 2, 0).numpy().squeeze())


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize(("count", "num_checked"), [(3, 1000), (40, 25)])
def test_any_number_of_processes_gives_the_same(world_size, count, num_checked):
    """Also with ranks that have no image, or none that is checked."""
    train, images = random_images(60, (3, 6, 6)), random_images(count, (3, 6, 6), seed=1)
    images[2] = train[17]
    make = scorer_of(images, num_checked=num_checked)
    single = score(make, images, real_sets(with_real(train)))
    assert score(make, images, real_sets(with_real(train)), world_size=world_size, size=3) == single
    assert single["n_checked"] == min(count, num_checked)


def test_a_second_set_of_images_is_scored_by_itself():
    train, real = random_images(60), with_real(random_images(60))
    sets = [random_images(12, seed=1), train[:12]]
    scorer = scorer_of(sets[0])()
    scoring = Scoring([scorer], runtime=SINGLE)
    scoring.see_real(real_sets(real))
    for images in sets:
        found = scoring.score(batches_of(images, None), 12)["memorization"]
        alone = score(scorer_of(images), images, real_sets(real))
        assert {**found, "seconds": 0} == {**alone, "seconds": 0}
        assert len(scorer.pairs) == 8
    assert found["value"] == 1.0


def test_checked_images_depend_on_seed_and_count_alone():
    chosen = choose(500, 100, 3, 5)
    assert torch.equal(chosen, choose(500, 100, 3, 5))
    assert not torch.equal(chosen, choose(500, 100, 4, 5))
    assert torch.equal(chosen, chosen.unique())
    assert len(chosen) == 100
    assert choose(5, 100, 0, 5).tolist() == [0, 1, 2, 3, 4]


def test_equal_images_in_both_splits_are_no_alarm():
    """A tenth of the held-out images are train images: as many copies among generated are fine."""
    train, test, images = (random_images(300, seed=seed) for seed in range(3))
    test[::10] = train[:30]
    images[::10] = train[30:60]
    found = score(scorer_of(images), images, real_sets(with_real(train), with_real(test)))
    assert found["threshold"] == 0
    assert found["value"] == found["held_out"]["share_close"] == 0.1
    assert found["held_out"]["num_copies"] == 30
    assert not found["flagged"]
    found = score(scorer_of(train), train, real_sets(with_real(train), with_real(test)))
    assert found["value"] == 1.0
    assert found["flagged"]


def test_few_images_or_a_partial_search_are_unreliable():
    train, images = random_images(200), random_images(99, seed=1)
    real = with_real(train)
    found = score(scorer_of(images), images, real_sets(real))
    assert found["status"] == "unreliable"
    assert found["reason"] == "only 99 generated images are checked"
    images = random_images(100, seed=1)
    assert score(scorer_of(images), images, real_sets(real))["status"] == "ok"
    found = score(scorer_of(images), images, real_sets(real, with_real(random_images(50, seed=2))))
    assert "only 50 held-out real images" in found["reason"]
    part = dataclasses.replace(real, indices=range(0, 200, 2))
    found = score(scorer_of(images), images, real_sets(part))
    assert found["reason"].startswith("100 of 200 train images are searched")
    assert all(pair["train_index"] % 2 == 0 for pair in found["closest"])


def test_without_real_images_it_fails_and_says_so():
    images = random_images(4)
    for real in (None, real_sets(with_real(images[:1]))):
        found = score(scorer_of(images), images, real)
        assert found["status"] == "failed"
        assert "at least 2 real train images" in found["reason"]
    found = score(scorer_of(images), images, real_sets(with_real(random_images(2, seed=1))))
    assert found["held_out"]["median_ratio"] is None  # one neighbour: there is no second


def brightness_distance(a: Tensor, b: Tensor) -> Tensor:
    return (a.mean((1, 2, 3)) - b.mean((1, 2, 3))).abs()


def test_another_distance_ranks_the_ten_nearest_again():
    train, images = random_images(120, (1, 64, 64)), random_images(30, (1, 64, 64), seed=1)
    train, images = train // 8 + random_images(120, (1, 1, 1), seed=2) // 2, images // 8
    scorer = scorer_of(images, distance=brightness_distance)()
    found = run_scorers(
        [scorer], real=real_sets(with_real(train)), batches=batches_of(images, None),
        num_images=len(images), runtime=SINGLE,
    )["memorization"]  # fmt: skip
    near = brute_force(images, train).sort(dim=1, stable=True).indices[:, :10]
    levels = [x.double().mean((1, 2, 3)) / 127.5 for x in (images, train)]
    table = (levels[0][:, None] - levels[1][near]).abs()
    expected = np.percentile(table.min(1).values.numpy(), 50)
    assert found["lpips"]["generated"]["percentiles"]["p50"] == pytest.approx(expected, abs=1e-5)
    assert found["lpips"]["held_out"]["share_close"] <= 0.02
    for (_, by_pixels, by_distance), pair in zip(scorer.pairs, found["closest"], strict=True):
        assert np.array_equal(by_pixels, train[pair["train_index"], 0].numpy())
        best = near[pair["index"], table[pair["index"]].argmin()]
        assert np.array_equal(by_distance, train[best, 0].numpy())
    plain = score(scorer_of(images), images, real_sets(with_real(train)))
    assert plain["lpips"] is None
    assert plain["value"] == found["value"]


def test_small_images_are_enlarged_for_another_distance():
    train, images = random_images(20, (3, 8, 8)), random_images(5, (3, 8, 8), seed=1)
    found = score(scorer_of(images, distance=pixel_distance), images, real_sets(with_real(train)))
    assert found["lpips"]["generated"]["num_copies"] == 0


def _score_on_rank(rank: int, port: int, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    with distributed_runtime("cpu", timeout_minutes=1) as runtime:
        entries = _entries(runtime)
        if runtime.is_main:
            Path(folder, "entries.json").write_text(json.dumps(entries))


def _entries(runtime) -> dict:
    train, images = random_images(30), random_images(5, seed=1)
    images[4] = images[0]
    images[3] = train[7]
    scorers = [scorer_of(images)(), SanityScorer(CPU, num_images=5, shape=(1, 16, 16))]
    entries = run_scorers(
        scorers, real=real_sets(real_images_of(train, torch.arange(30) % 2)),
        batches=batches_of(images, None, runtime, size=2), num_images=5, runtime=runtime,
    )  # fmt: skip
    return {name: {**entry, "seconds": 0} for name, entry in entries.items()}


def test_two_processes_agree_with_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_score_on_rank, args=(port, str(tmp_path)), nprocs=2)
    assert json.loads((tmp_path / "entries.json").read_text()) == _entries(SINGLE)
