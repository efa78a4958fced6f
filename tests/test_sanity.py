"""The cheap checks against direct formulas, in any number of processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from metrics.sanity import count_pixels, image_hash, pixel_statistics
from tests.scored import batches_of, random_images, real_images_of, real_sets, score, scoring_of


def sanity(images, real=None, **options):
    sets = None if real is None else real_sets(real_images_of(real))
    return score(["sanity"], images, real=sets, **options)["sanity"]


@pytest.mark.parametrize("channels", [1, 3])
def test_pixel_statistics_are_those_of_numpy(channels):
    images = random_images(20, (channels, 5, 7))
    images[:3] = 255
    counts = torch.zeros(channels, 256, dtype=torch.int64)
    assert pixel_statistics(counts) is None
    for part in images.split(6):
        counts += count_pixels(part)
    found = pixel_statistics(counts)
    pixels = images.numpy() / 255
    np.testing.assert_allclose(found["mean"], pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(found["std"], pixels.std((0, 2, 3)), rtol=1e-12)
    assert found["at_0"] == pytest.approx((pixels == 0).mean())
    assert found["at_255"] == pytest.approx((pixels == 1).mean())


def test_repeats_and_blank_images_are_counted_once():
    images = random_images(10, (3, 4, 4))
    images[4] = images[9] = images[1]  # two repeats
    images[5] = torch.tensor([10, 200, 30]).view(3, 1, 1)  # blank, though its pixels differ
    images[6] = images[7] = 0  # blank, the second also a repeat
    found = sanity(images)
    assert found["num_repeats"] == 3
    assert found["num_blank"] == 3
    assert found["share_repeats"] == found["share_blank"] == 0.3
    assert found["value"] == 0.5
    assert found["real"] is None
    assert found["status"] == "ok"


def test_all_equal_and_all_different():
    different = random_images(6)
    assert sanity(different)["value"] == 1.0
    equal = different[:1].expand(6, -1, -1, -1)
    found = sanity(equal)
    assert found["num_repeats"] == 5
    assert found["value"] == pytest.approx(1 / 6)
    black = torch.zeros_like(different)
    found = sanity(black)
    assert found["value"] == 0.0
    assert found["generated"] == {"at_0": 1.0, "at_255": 0.0, "mean": [0.0], "std": [0.0]}


def test_real_images_stand_beside_the_generated_ones():
    images, real = random_images(6, seed=1), random_images(9, seed=2) // 2
    found = sanity(images, real)
    assert found["real"] == pixel_statistics(count_pixels(real))
    assert found["n_real"] == 9
    assert found["real"]["mean"][0] < found["generated"]["mean"][0]


def test_a_second_set_of_images_is_scored_by_itself():
    first, second = random_images(6, seed=1), random_images(6, seed=2)
    first[1] = first[0]
    real = random_images(9, seed=3)
    scoring = scoring_of(["sanity"], first, real=real_sets(real_images_of(real)))
    for images in (first, second):
        found = scoring.score(batches_of(images), 6)["sanity"]
        del found["seconds"]
        assert found == sanity(images, real)


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("count", [3, 20])
def test_any_number_of_processes_gives_the_same(world_size, count):
    """Also with uneven shares and ranks without an image: 3 images over 5 ranks."""
    images, real = random_images(count, (3, 6, 6)), random_images(11, (3, 6, 6), seed=5)
    images[-1] = images[0]  # on another rank
    images[1] = 255
    many = sanity(images, real, world_size=world_size, size=3)
    assert many == sanity(images, real)
    assert many["num_repeats"] == 1


def test_hashes_depend_on_content_alone():
    image = random_images(1, (3, 8, 8))[0]
    assert image_hash(torch.arange(12, dtype=torch.uint8).view(3, 2, 2)) == 2829057462896620206
    assert image_hash(image) == image_hash(image.clone())
    assert image_hash(image.transpose(1, 2)) == image_hash(image.transpose(1, 2).contiguous())
    other = image.clone()
    other[2, 7, 7] ^= 1
    assert image_hash(other) != image_hash(image)
