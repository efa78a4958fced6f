"""Nearest train images against brute force; copies are told from held-out images."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from datasets.real import RealImages
from metrics import memorization
from metrics.lpips_score import ALEXNET
from metrics.memorization import chance_of_hits, compare, nearest_images
from tests.scored import (
    CPU,
    batches_of,
    random_images,
    real_images_of,
    real_sets,
    score,
    scoring_of,
)
from tests.tiny_networks import pixel_distance


def result(images: Tensor, train: RealImages | None, test: RealImages | None = None, **options):
    sets = None if train is None else real_sets(train, test)
    return score(["memorization"], images, real=sets, **options)["memorization"]


def brute_force(queries: Tensor, train: Tensor) -> Tensor:
    """(Q, N) int64 squared distances in 8-bit steps."""
    difference = queries.long()[:, None] - train.long()[None]
    return difference.square().flatten(2).sum(2)


def search(
    queries: Tensor, train: Tensor, *, left_out: Tensor | None = None, size: int = 7, **options
):
    if left_out is None:
        left_out = torch.full((len(queries),), -1)
    return nearest_images(
        queries, train.split(size), len(train), left_out=left_out, device=CPU, **options
    )


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 10)])
@pytest.mark.parametrize(("size", "block_rows"), [(7, 2048), (20, 1), (7, 4), (50, 16)])
def test_search_is_brute_force_for_any_block_size(shape, size, block_rows, monkeypatch):
    """Ties included: of equal train images the first comes first."""
    train = random_images(50, shape)
    train[30:40] = train[:10]
    queries = torch.cat([train[35:40], random_images(9, shape, seed=1), 255 - train[:3]])
    monkeypatch.setattr(memorization, "BLOCK_ROWS", block_rows)
    squared, positions = search(queries, train, num_neighbours=10, size=size)
    table = brute_force(queries, train)
    expected = table.sort(dim=1, stable=True)
    assert torch.equal(squared, expected.values[:, :10])
    assert torch.equal(positions, expected.indices[:, :10])
    assert squared[:5, :2].tolist() == [[0, 0]] * 5
    assert positions[:5, :2].tolist() == [[i, 30 + i] for i in range(5, 10)]


def test_search_is_exact_where_float32_is_not():
    """Bright large images: sums of squares need 34 bits, and the nearest differs by one step."""
    train = torch.full((3, 3, 256, 256), 255, dtype=torch.uint8)
    train[1, 0, 0, 0] = 254
    train[2, 0, 0, 0] = 253
    squared, positions = search(train[1:2], train, num_neighbours=3)
    assert squared.tolist() == [[0, 1, 1]]
    assert positions.tolist() == [[1, 0, 2]]


@pytest.mark.parametrize("size", [7, 20])
def test_an_image_can_be_left_out_of_its_own_search(size):
    train = random_images(20)
    own = torch.tensor([3, 19, -1])
    queries = train[torch.tensor([3, 19, 5])]
    squared, positions = search(queries, train, left_out=own, num_neighbours=19, size=size)
    assert 3 not in positions[0]
    assert 19 not in positions[1]
    assert positions[2, 0] == 5
    assert (squared[:2] > 0).all()


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


def two_nearest(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 2) distances as of images whose nearest ones are all about as far."""
    return np.sort(0.9 + 0.1 * rng.random((count, 2)), 1)


def test_the_ratio_of_the_two_nearest_sees_copies_that_are_as_far_as_others():
    """A tenth of the images has one train image as near as the nearest, and no other one near."""
    rng = np.random.default_rng(0)
    ours, held_out = two_nearest(rng, 500), two_nearest(rng, 500)
    ours[:50, 1] = 3 * ours[:50, 0]
    verdict = compare(ours, held_out)
    assert (verdict["flagged"], verdict["signs"]) == (True, ["ratio"])
    assert (
        verdict["p_values"]["ratio"] < 1e-6 < verdict["p_value"] == verdict["p_values"]["distance"]
    )
    assert verdict["generated"]["share_close_ratio"] >= 0.1
    assert verdict["held_out"]["share_close_ratio"] == 0.01
    assert not compare(held_out, ours)["flagged"]


@pytest.mark.parametrize(
    ("copies", "held", "equal", "signs"),
    [
        (0, 0, 0, []),
        (1, 0, 0, ["copies"]),
        (3, 0, 0, ["copies"]),
        (1, 1, 0, []),
        (3, 2, 0, []),
        (1, 0, 2, []),  # the data have equal images: one more is no surprise
        (3, 0, 9, []),
        (0, 9, 9, []),
        (9, 0, 2, ["copies"]),
        (9, 1, 0, ["copies"]),
    ],
)
def test_exact_copies_are_a_sign_unless_real_images_are_some_too(copies, held, equal, signs):
    rng = np.random.default_rng(0)
    ours, held_out = two_nearest(rng, 1000), two_nearest(rng, 1000)
    ours[:copies, 0] = held_out[:held, 0] = 0
    verdict = compare(ours, held_out, equal=equal, searched=2000)
    assert verdict["signs"] == signs
    assert verdict["flagged"] == bool(signs)
    assert verdict["generated"]["num_copies"] == copies


def test_equal_images_are_counted_all_of_them():
    assert memorization.num_equal([1, 2, 2, 3, 3, 3]) == 5
    assert memorization.num_equal([]) == 0


def test_verdicts_on_real_images_of_many_splits_are_quiet_and_copies_are_seen():
    """Digits, split at random again and again; docs/metrics.md has larger sets."""
    from sklearn.datasets import load_digits

    images, alarms, seen = (torch.tensor(load_digits().images) * 15.9).round(), 0, 0
    for split in range(40):
        rng = torch.Generator().manual_seed(split)
        order = torch.randperm(len(images), generator=rng)
        train, ours, held_out = (images[rows] for rows in order[:1700].split([700, 500, 500]))
        noisy = (train[:25] + 20 * torch.randn(25, 8, 8, generator=rng)).round().clamp(0, 255)
        queries = torch.cat([ours, held_out, noisy]).to(torch.uint8)[:, None]
        squared, _ = search(queries, train.to(torch.uint8)[:, None], num_neighbours=2, size=700)
        near = squared.double().sqrt().numpy()
        ours, held_out, noisy = near[:500], near[500:1000], near[1000:]
        alarms += compare(ours, held_out)["flagged"]
        seen += compare(np.concatenate([noisy, ours[25:]]), held_out)["flagged"]
    assert alarms <= 1
    assert seen == 40


# --- the metric


@pytest.fixture(scope="module")
def digits() -> tuple[RealImages, RealImages, Tensor, Tensor]:
    """Train and test split, the train images, and 297 images that are in neither."""
    from sklearn.datasets import load_digits

    images = (torch.tensor(load_digits().images) * 15.9).round().to(torch.uint8)[:, None]
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    train, test, rest = images[:1200], images[1200:1500], images[1500:]
    return real_images_of(train), real_images_of(test, split="test"), train, rest


@pytest.mark.parametrize("with_test_split", [True, False])
def test_copies_are_flagged_and_held_out_images_are_not(digits, with_test_split):
    real, test, train, rest = digits
    test = test if with_test_split else None
    found = result(rest, real, test)
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
    found = result(copies, real, test)
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
    found = result(images, real, test)
    assert found["flagged"]
    assert 0.09 < found["value"] < 0.14
    assert found["generated"]["num_copies"] == 0


def test_entry_is_what_brute_force_gives(digits):
    real, test, train, rest = digits
    images = rest[:120]
    found = result(images, real, test)
    squared = {
        kind: brute_force(queries, train).sort(1).values.double().numpy()
        for kind, queries in {"generated": images, "held_out": test.load(test.indices)[0]}.items()
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
def test_the_closest_are_shown_beside_their_neighbours(channels):
    train, images = random_images(40, (channels, 6, 5)), random_images(12, (channels, 6, 5), seed=1)
    images[7] = train[33]
    scoring = scoring_of(["memorization"], images, real=real_sets(real_images_of(train)))
    found = scoring.score(batches_of(images), 12)["memorization"]
    metric = scoring.parts[0].metrics["memorization"]
    assert len(found["closest"]) == 8
    assert found["closest"][0] == {"index": 7, "train_index": 33, "distance": 0.0}
    indices, train_indices = ([x[k] for x in found["closest"]] for k in ("index", "train_index"))
    generated, near = metric.closest
    assert torch.equal(generated, images[indices])
    assert torch.equal(near, train[train_indices])
    picture = metric.pictures()["neighbours"]
    assert picture.image.shape[2:] == ((3,) if channels == 3 else ())
    assert picture.caption == "In turn: generated, nearest train image"


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize(("count", "num_checked"), [(3, 1000), (40, 25)])
def test_any_number_of_processes_gives_the_same(world_size, count, num_checked, monkeypatch):
    """Also with ranks that have no image, or none that is checked."""
    monkeypatch.setattr(memorization, "NUM_CHECKED", num_checked)
    train, images = random_images(60, (3, 6, 6)), random_images(count, (3, 6, 6), seed=1)
    images[2] = train[17]
    single = result(images, real_images_of(train))
    assert result(images, real_images_of(train), world_size=world_size, size=3) == single
    assert single["n_checked"] == min(count, num_checked)


def test_a_second_set_of_images_is_scored_by_itself():
    train, real = random_images(60), real_images_of(random_images(60))
    sets = [random_images(12, seed=1), train[:12]]
    scoring = scoring_of(["memorization"], sets[0], real=real_sets(real))
    for images in sets:
        found = scoring.score(batches_of(images), 12)["memorization"]
        del found["seconds"]
        assert found == result(images, real)
    assert found["value"] == 1.0


def test_equal_images_in_both_splits_are_no_alarm():
    """A tenth of the held-out images are train images: as many copies among generated are fine."""
    train, test, images = (random_images(300, seed=seed) for seed in range(3))
    test[::10] = train[:30]
    images[::10] = train[30:60]
    found = result(images, real_images_of(train), real_images_of(test))
    assert found["threshold"] == 0
    assert found["value"] == found["held_out"]["share_close"] == 0.1
    assert found["held_out"]["num_copies"] == 30
    assert not found["flagged"]
    found = result(train, real_images_of(train), real_images_of(test))
    assert found["value"] == 1.0
    assert found["flagged"]


def test_few_images_or_a_partial_search_are_unreliable():
    train, images = random_images(200), random_images(99, seed=1)
    real = real_images_of(train)
    found = result(images, real)
    assert found["status"] == "unreliable"
    assert found["reason"] == "only 99 generated images are checked"
    images = random_images(100, seed=1)
    assert result(images, real)["status"] == "ok"
    found = result(images, real, real_images_of(random_images(50, seed=2)))
    assert "only 50 held-out real images" in found["reason"]
    part = dataclasses.replace(real, indices=range(0, 200, 2))
    found = result(images, part)
    assert found["reason"].startswith("100 of 200 train images are searched")
    assert all(pair["train_index"] % 2 == 0 for pair in found["closest"])


def test_of_one_real_image_it_fails_and_says_so():
    images = random_images(4)
    found = result(images, real_images_of(images[:1]))
    assert found["status"] == "failed"
    assert "at least 2 real train images" in found["reason"]
    found = result(images, real_images_of(random_images(2, seed=1)))
    assert found["held_out"]["median_ratio"] is None  # one neighbour: there is no second


def brightness_distance(a: Tensor, b: Tensor) -> Tensor:
    return (a.mean((1, 2, 3)) - b.mean((1, 2, 3))).abs()


def test_another_distance_ranks_the_ten_nearest_again():
    train, images = random_images(120, (1, 64, 64)), random_images(30, (1, 64, 64), seed=1)
    train, images = train // 8 + random_images(120, (1, 1, 1), seed=2) // 2, images // 8
    sets = real_sets(real_images_of(train))
    scoring = scoring_of(
        ["memorization"], images, real=sets, networks={ALEXNET: brightness_distance}
    )
    found = scoring.score(batches_of(images), len(images))["memorization"]
    near = brute_force(images, train).sort(dim=1, stable=True).indices[:, :10]
    levels = [x.double().mean((1, 2, 3)) / 127.5 for x in (images, train)]
    table = (levels[0][:, None] - levels[1][near]).abs()
    expected = np.percentile(table.min(1).values.numpy(), 50)
    assert found["lpips"]["generated"]["percentiles"]["p50"] == pytest.approx(expected, abs=1e-5)
    assert found["lpips"]["held_out"]["share_close"] <= 0.02
    closest = scoring.parts[0].metrics["memorization"].closest
    for (_, by_pixels, by_distance), pair in zip(
        zip(*closest, strict=True), found["closest"], strict=True
    ):
        assert torch.equal(by_pixels, train[pair["train_index"]])
        best = near[pair["index"], table[pair["index"]].argmin()]
        assert torch.equal(by_distance, train[best])
    plain = result(images, real_images_of(train))
    assert plain["lpips"] is None
    assert plain["value"] == found["value"]


def test_small_images_are_enlarged_for_another_distance():
    train, images = random_images(20, (3, 8, 8)), random_images(5, (3, 8, 8), seed=1)
    found = result(images, real_images_of(train), networks={ALEXNET: pixel_distance})
    assert found["lpips"]["generated"]["num_copies"] == 0
