"""Randomness is a pure function of (seed, stream, index): no two keys meet, nothing remembers."""

from __future__ import annotations

import itertools

import pytest
import torch

from utils.rng import (
    EvaluationDraw,
    Stream,
    derive_seed,
    fixed_subset,
    numpy_generator,
    sample_noise,
    seed_everything,
    torch_generator,
)

CPU = torch.device("cpu")
LONG = 2**32


def test_the_numbers_of_the_streams_never_change():
    assert {stream.name: stream.value for stream in Stream} == {
        "PERMUTATION": 0,
        "FLIP": 1,
        "TIMESTEP": 2,
        "NOISE": 3,
        "LABEL_DROPOUT": 4,
        "MODEL_DROPOUT": 5,
        "SAMPLE": 6,
        "MODEL_INIT": 7,
        "EVALUATION": 8,
        "CLASSIFIER": 9,
        "VALIDATION": 10,
        "CONDITION": 11,
        "CONDITION_DROPOUT": 12,
    }


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ((0, Stream.PERMUTATION), 15793235383387715774),
        ((42, Stream.NOISE, 7), 5122231805094739018),
        ((42, Stream.MODEL_DROPOUT, 7, 1), 9819397741276587422),
        ((5 + LONG, Stream.TIMESTEP, 3), 9352845796624927693),
    ],
)
def test_the_seed_of_a_key_never_changes(key, expected):
    """Every number of every old run follows from these, so they are written down."""
    assert derive_seed(*key) == expected


def test_the_draws_of_a_key_never_change():
    assert numpy_generator(42, Stream.PERMUTATION, 3).permutation(10).tolist() == [
        *(6, 7, 5, 0, 8, 3, 9, 1, 2, 4)
    ]
    draw = sample_noise([42, 7], CPU)
    first = [
        [-1.588308334350586, -0.23015311360359192, -1.4865657091140747, -1.2884901762008667],
        [-1.7231124639511108, -0.9432697892189026, -0.6025022268295288, 0.14247144758701324],
    ]
    second = [[0.6365870237350464, -0.9475402235984802], [0.06220659613609314, -0.7260496020317078]]
    assert draw((2, 4)).tolist() == first
    assert draw((2, 2)).tolist() == second


def test_no_two_keys_meet():
    seeds = (0, 1, 5, 42, 5 + LONG, 5 + 2 * LONG, 5 + LONG * LONG, 2**64 + 1)
    keys = list(itertools.product(seeds, Stream, range(12)))
    found = {derive_seed(seed, stream, index) for seed, stream, index in keys}
    assert len(found) == len(keys)
    # the CPU generator of torch uses the low 32 bits alone
    assert len({value % LONG for value in found}) == len(keys)


def test_seed_plus_step_is_no_key():
    sums = [derive_seed(seed, Stream.NOISE, step) for seed in range(30) for step in range(30)]
    assert len(set(sums)) == 900


def test_a_long_seed_does_not_shift_the_other_words():
    assert derive_seed(5 + LONG, Stream.NOISE) != derive_seed(5, Stream.FLIP, 3)
    assert derive_seed(5 + 6 * LONG, Stream.NOISE) != derive_seed(5, Stream.SAMPLE, 3)


@pytest.mark.parametrize("make", [torch_generator, numpy_generator])
def test_generators_are_fresh_and_repeat(make):
    def draw(seed: int, stream: Stream, *index: int) -> list[float]:
        generator = make(seed, stream, *index)
        if isinstance(generator, torch.Generator):
            return torch.randn(4, generator=generator).tolist()
        return generator.standard_normal(4).tolist()

    assert draw(1, Stream.NOISE, 7) == draw(1, Stream.NOISE, 7)
    different = [
        draw(1, Stream.NOISE, 7),
        draw(1, Stream.NOISE, 8),
        draw(1, Stream.FLIP, 7),
        draw(2, Stream.NOISE, 7),
        draw(1 + LONG, Stream.NOISE, 7),
    ]
    assert len({tuple(numbers) for numbers in different}) == len(different)


def test_generators_leave_the_global_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    torch.randn(3, generator=torch_generator(1, Stream.NOISE, 1))
    sample_noise([1, 2], CPU)((2, 3))
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_everything_takes_any_seed_and_tells_them_apart():
    weights = []
    for seed in (5, 5 + LONG, 2**64 + 5, 2**200):
        seed_everything(seed)
        weights.append(torch.nn.Linear(2, 2).weight.tolist())
    assert all(a != b for a, b in itertools.combinations(weights, 2))
    seed_everything(5)
    assert torch.nn.Linear(2, 2).weight.tolist() == weights[0]


def test_the_global_seed_is_that_of_the_initial_weights():
    """A seed gives the same initial weights in every version, so the key is written down."""
    seed_everything(42)
    expected = torch.Generator().manual_seed(derive_seed(42, Stream.MODEL_INIT))
    assert torch.equal(torch.rand(3), torch.rand(3, generator=expected))


def test_the_noise_of_an_image_is_its_own():
    shape = (3, 4, 5)
    draw = sample_noise([3, 7, 5, 3], CPU)
    together = [draw((4, *shape)) for _ in range(3)]
    for row, seed in enumerate([3, 7, 5, 3]):
        alone = sample_noise([seed], CPU)
        for draws in together:
            assert torch.equal(draws[row], alone((1, *shape))[0])
    assert torch.equal(together[0][0], together[0][3])
    assert not torch.equal(together[0][0], together[0][1])
    assert not torch.equal(together[0], together[1])


def test_noise_of_long_seeds_differs():
    first, second = (sample_noise([seed], CPU)((1, 8)) for seed in (5, 5 + LONG))
    assert not torch.equal(first, second)


def test_noise_is_standard_normal_float32():
    noise = sample_noise(list(range(50)), CPU)((50, 2000))
    assert noise.dtype == torch.float32
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    neighbours = (noise[:-1] * noise[1:]).mean(dim=1)
    assert neighbours.abs().max() < 0.12  # 5 sigma of uncorrelated rows


def test_noise_wants_a_row_per_seed():
    with pytest.raises(ValueError, match="3 rows asked of 2"):
        sample_noise([1, 2], CPU)((3, 4))


def test_a_fixed_subset_is_sorted_and_never_changes():
    """What evaluations draw decides their scores, which are compared over years."""
    for draw, expected in (
        (EvaluationDraw.REAL_IMAGES, [189, 258, 632, 744, 816]),
        (EvaluationDraw.NEIGHBOUR_ROWS, [106, 402, 436, 662, 749]),
    ):
        assert fixed_subset(1000, 5, draw).tolist() == expected
        assert set(expected) < set(fixed_subset(1000, 50, draw).tolist())
    for limit in (None, 7, 8):
        assert fixed_subset(7, limit, EvaluationDraw.REAL_IMAGES).tolist() == list(range(7))
    assert fixed_subset(7, 0).tolist() == fixed_subset(0, 3).tolist() == []
