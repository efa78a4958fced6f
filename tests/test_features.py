"""KID against torch-fidelity, precision to coverage against full matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from metrics.fid import kernel_distance
from metrics.prdc import prdc, squared_distances, squared_radii


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(count: int, dim: int, seed: int = 0, **options) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), **options)


# --- kernel Inception distance


def test_kid_is_that_of_torch_fidelity_on_the_generated_images_first():
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = normal(150, 24, 1).abs(), normal(130, 24, 2).abs() * 1.1
    mean, std = kernel_distance(a, b, subset_size=60)
    expected = kid_features_to_metric(
        a.double(), b.double(), kid_subsets=100, kid_subset_size=60, verbose=False
    )
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], abs=1e-6)
    assert std == pytest.approx(expected["kernel_inception_distance_std"], abs=1e-6)


def test_kid_of_one_subset_is_the_sum_over_pairs():
    x, y = normal(5, 3, 1, dtype=torch.float64), normal(5, 3, 2, dtype=torch.float64)

    def k(p: Tensor, q: Tensor) -> float:
        return (p.dot(q).item() / 3 + 1) ** 3

    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    expected = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs) / 20
    expected -= 2 * sum(k(p, q) for p in x for q in y) / 25
    mean, std = kernel_distance(x, y, subset_size=5)
    assert mean == pytest.approx(expected, rel=1e-12)
    assert std == pytest.approx(0, abs=1e-12)


def test_kid_is_unbiased_and_grows_with_the_shift():
    """Equal sources: about 0 within the error of the mean, with both signs among the subsets."""
    a, b = normal(4000, 8, 1), normal(4000, 8, 2)
    same, std = kernel_distance(a, b, subset_size=50)
    assert abs(same) < 4 * std / 100**0.5
    shifted = [kernel_distance(a, b + shift, subset_size=50)[0] for shift in (0.3, 0.6)]
    assert same < shifted[0] < shifted[1]


def test_kid_of_features_that_are_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        kernel_distance(normal(5, 3) / 0, normal(5, 3), subset_size=5)


# --- precision, recall, density, coverage


def brute_force(real: Tensor, generated: Tensor, k: int) -> tuple[float, ...]:
    """The four definitions with full matrices and explicit neighbour lists."""

    def full(x: Tensor, y: Tensor) -> np.ndarray:
        return np.linalg.norm(x.double().numpy()[:, None] - y.double().numpy()[None], axis=2)

    def radii(x: Tensor) -> np.ndarray:
        matrix = full(x, x)
        return np.array([np.sort(np.delete(row, i))[k - 1] for i, row in enumerate(matrix)])

    cross = full(real, generated)
    in_real, in_generated = cross <= radii(real)[:, None], cross <= radii(generated)[None]
    return (
        in_real.any(0).mean(),
        in_generated.any(1).mean(),
        in_real.sum() / (k * len(generated)),
        in_real.any(1).mean(),
    )


def pair(case: str) -> tuple[Tensor, Tensor]:
    if case == "overlap":
        return normal(83, 6, 1), normal(71, 6, 2) * 0.8 + 0.4
    if case == "far from 0":  # where |x|^2 + |y|^2 - 2 x.y cancels
        return normal(60, 6, 1) * 1e-2 + 1e4, normal(60, 6, 2) * 1e-2 + 1e4
    lattice = torch.randint(0, 4, (150, 3), generator=torch.Generator().manual_seed(3)).float()
    return lattice[:80], lattice[80:]  # ties and duplicates everywhere


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("case", ["overlap", "far from 0", "lattice"])
def test_prdc_equals_brute_force(case, k):
    real, generated = pair(case)
    found = prdc(real, generated, k=k, block=16)
    assert found[:4] == pytest.approx(brute_force(real, generated, k), rel=1e-12)
    assert found[4:] == (k, len(real), len(generated))


@pytest.mark.parametrize("case", ["overlap", "lattice"])
def test_prdc_does_not_depend_on_the_block_or_the_order(case):
    real, generated = pair(case)
    expected = prdc(real, generated)
    assert all(prdc(real, generated, block=block) == expected for block in (1, 7, 80, 1000))
    assert prdc(real.flip(0), generated.flip(0), block=9) == expected


@pytest.mark.parametrize("dim", [2, 37, 300])
def test_precision_and_recall_equal_torch_fidelity(dim):
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, generated = normal(90, dim, 1, dtype=torch.float64), normal(110, dim, 2) * 0.93 + 0.1
    for save_memory in (False, True):
        expected = prc_features_to_metric(
            generated.double(), real, prc_neighborhood=3, save_cpu_ram=save_memory, verbose=False
        )
        found = prdc(real, generated, k=3)
        assert found.precision == pytest.approx(expected["precision"], rel=1e-6)
        assert found.recall == pytest.approx(expected["recall"], rel=1e-6)
        assert 0 < found.recall < 1


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_a_set_against_itself(scale):
    points = normal(60, 100) * scale + 1
    found = prdc(points, points, k=5)
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    assert found.density == pytest.approx(6 / 5)  # the point itself and its 5 neighbours


def test_duplicates_lie_in_their_balls_of_radius_zero():
    points = normal(5, 4).repeat(4, 1)
    found = prdc(points, points, k=3)
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    assert found.density == pytest.approx(4 / 3)
    assert prdc(points, points + 1e-3, k=3)[:4] == (0, 0, 0, 0)
    one_picture = torch.ones(10, 4)
    assert prdc(one_picture, one_picture)[:4] == (1, 1, 2, 1)


def test_far_apart_sets_share_nothing():
    assert prdc(normal(40, 5), normal(30, 5, 1) + 100)[:4] == (0, 0, 0, 0)


def test_a_collapsed_generator_is_precise_but_covers_little():
    real = normal(200, 2)
    found = prdc(real, real.median(0).values + normal(200, 2, 1) * 1e-3)
    assert found.precision == 1
    assert found.recall < 0.05
    assert found.coverage < 0.1


def test_density_and_coverage_of_equal_sources_are_as_expected():
    """Density 1, coverage 1 - 2^-k for large equal sets (Naeem et al. 2020, section 3)."""
    found = prdc(normal(1500, 3, 1), normal(1500, 3, 2), k=3)
    assert found.density == pytest.approx(1, abs=0.06)
    assert found.coverage == pytest.approx(1 - 2**-3, abs=0.03)


def test_distances_and_radii_are_those_of_the_differences():
    x, y = normal(40, 300, 1, dtype=torch.float64), normal(30, 300, 2, dtype=torch.float64)
    expected = (x[:, None] - y).square().sum(2)
    torch.testing.assert_close(squared_distances(x, y), expected, rtol=1e-13, atol=0)
    assert (squared_distances(x, y, 1e-12) < expected).all()
    within = (x[:, None] - x).square().sum(2).sort(1).values  # column 0: the point itself
    for k in (1, 4):
        torch.testing.assert_close(squared_radii(x, k, 7), within[:, k], rtol=1e-13, atol=0)


def test_prdc_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"k=5 .* got 5 real and 9 generated"):
        prdc(normal(5, 3), normal(9, 3))
    assert prdc(normal(6, 3), normal(6, 3)).coverage == 1
    with pytest.raises(ValueError, match="k >= 1"):
        prdc(normal(9, 3), normal(9, 3), k=0)
    with pytest.raises(RuntimeError, match="must match the size"):
        prdc(normal(9, 3), normal(9, 4))
    with pytest.raises(ValueError, match="not finite"):
        prdc(normal(9, 3), normal(9, 3) / 0)
