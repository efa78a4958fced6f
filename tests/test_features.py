"""Stored features, KID against torch-fidelity, precision to coverage against full matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from metrics import kid
from metrics.features import Features, FeatureStore, as_features
from metrics.kid import kernel_inception_distance
from metrics.prdc import choose_rows, prdc, squared_distances, squared_radii
from utils.distributed import Runtime


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(count: int, dim: int, seed: int = 0, **options) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), **options)


# --- features on disk


def store_all(folder, features: Tensor, world_size: int, size: int = 4) -> FeatureStore:
    """Write `features` as so many processes would, in batches of `size`."""
    for rank in range(world_size):
        store = FeatureStore(folder, features.shape[1])
        share = Runtime(torch.device("cpu"), rank, world_size).share(len(features))
        for start in range(share.start, share.stop, size):
            part = range(start, min(start + size, share.stop))
            store.append(features[part.start : part.stop], part)
        store.close()
    return store


@pytest.mark.parametrize("world_size", [1, 3, 20])
def test_features_are_read_in_global_order_from_any_number_of_processes(tmp_path, world_size):
    features = normal(17, 5)
    stored = store_all(tmp_path / "new" / "folder", features, world_size).read(17)
    expected = features.numpy()
    assert len(stored) == 17
    assert stored.rows([3]).dtype == np.float32
    for rows in (slice(None), slice(2, 13), slice(-3, None), slice(9, 2, -2), slice(4, 4)):
        np.testing.assert_array_equal(stored.rows(rows), expected[rows])
    for rows in ([16, 0, 7, 7], range(5, 9), np.array([12, 3])):
        np.testing.assert_array_equal(stored.rows(rows), expected[np.asarray(rows)])
    assert stored.rows([]).shape == (0, 5)
    for rows in ([17], [-1, 2]):
        with pytest.raises(IndexError, match="of 17 features"):
            stored.rows(rows)


def test_files_are_named_by_their_first_index_and_hold_float32(tmp_path):
    features = normal(6, 2, dtype=torch.float64)
    store_all(tmp_path, features, 2)
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == ["features_00000000.f32", "features_00000003.f32"]
    written = np.fromfile(files[1], dtype="<f4").reshape(-1, 2)
    np.testing.assert_array_equal(written, features[3:].float().numpy())


def test_a_strided_or_graph_bound_tensor_is_written_by_value(tmp_path):
    features = normal(3, 8).requires_grad_()
    store = FeatureStore(tmp_path, 4)
    store.append(features[:, ::2], range(3))
    store.append(features.new_empty(0, 4), range(3, 3))
    store.close()
    np.testing.assert_array_equal(store.read().rows(slice(None)), features.detach()[:, ::2])


def test_the_store_refuses_what_is_out_of_order(tmp_path):
    store = FeatureStore(tmp_path, 3)
    store.append(normal(2, 3), range(10, 12))
    for start in (10, 13):
        with pytest.raises(ValueError, match="12 is the next"):
            store.append(normal(2, 3), range(start, start + 2))
    for bad in (normal(2, 4), normal(3, 3), normal(2, 3)[0]):
        with pytest.raises(ValueError, match="D = 3"):
            store.append(bad, range(12, 14))


def test_gaps_and_leftovers_are_refused_until_cleared(tmp_path):
    features = normal(12, 3)
    store = store_all(tmp_path, features, 4)
    with pytest.raises(ValueError, match="features of 12, not 13 images"):
        store.read(13)
    (tmp_path / "features_00000003.f32").unlink()
    with pytest.raises(ValueError, match="features 3 to 5 are missing"):
        store.read()
    store_all(tmp_path, features, 3)  # the files of four processes lie between those of three
    with pytest.raises(ValueError, match="features 6 to 7 are there twice"):
        store.read(12)
    (tmp_path / "other.txt").write_text("kept")
    FeatureStore(tmp_path, 3)
    assert len(list(tmp_path.iterdir())) > 2
    store.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["other.txt"]
    with pytest.raises(ValueError, match="features of 0, not any images"):
        store.read()
    FeatureStore(tmp_path / "absent", 3).clear()


@pytest.mark.parametrize("size", [0, 22])
def test_a_file_cut_short_is_named(tmp_path, size):
    store = store_all(tmp_path, normal(4, 3), 1)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{path.name}: cut short"):
        store.read(4)


def test_arrays_and_tensors_are_features_too():
    array = normal(4, 3).numpy()
    features = Features([array])
    assert as_features(features) is features
    for given in (array, torch.from_numpy(array)):
        np.testing.assert_array_equal(as_features(given).rows([2, 0]), array[[2, 0]])
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        as_features(array[0])


# --- kernel Inception distance


def torch_fidelity_kid(a: Tensor, b: Tensor, **options) -> tuple[float, float]:
    from torch_fidelity.metric_kid import kid_features_to_metric

    found = kid_features_to_metric(a, b, verbose=False, **options)
    return found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]


@pytest.mark.parametrize(("num1", "num2", "size"), [(150, 130, 60), (90, 70, 70), (70, 70, 70)])
def test_kid_equals_torch_fidelity(num1, num2, size):
    a = normal(num1, 24, 1, dtype=torch.float64)
    b = normal(num2, 24, 2, dtype=torch.float64) * 1.2 + 0.3
    expected = torch_fidelity_kid(a, b, kid_subsets=20, kid_subset_size=size)
    found = kernel_inception_distance(a, b, num_subsets=20, subset_size=size)
    assert found.mean == pytest.approx(expected[0], rel=1e-10)
    assert found.std == pytest.approx(expected[1], rel=1e-9, abs=1e-14)
    assert found.subset_size == size


def test_kid_of_stored_features_equals_torch_fidelity_in_float32(tmp_path):
    a, b = normal(300, 64, 1).abs(), normal(250, 64, 2).abs() * 1.1
    stored = store_all(tmp_path / "a", a, 3).read(), store_all(tmp_path / "b", b, 2).read()
    expected = torch_fidelity_kid(a, b, kid_subsets=10, kid_subset_size=200)
    found = kernel_inception_distance(*stored, num_subsets=10, subset_size=200)
    assert found.mean == pytest.approx(expected[0], rel=1e-4)
    assert found.std == pytest.approx(expected[1], rel=1e-3)
    assert found == kernel_inception_distance(a.numpy(), b, num_subsets=10, subset_size=200)


def test_kid_with_few_images_takes_all_of_the_smaller_set():
    a, b = normal(40, 6, 1), normal(30, 6, 2)
    assert kernel_inception_distance(a, b, num_subsets=3).subset_size == 30


def test_squared_mmd_is_the_sum_over_pairs():
    x, y = normal(4, 3, 1, dtype=torch.float64), normal(5, 3, 2, dtype=torch.float64)

    def k(p: Tensor, q: Tensor) -> float:
        return (p.dot(q).item() / 3 + 1) ** 3

    expected = sum(k(x[i], x[j]) for i in range(4) for j in range(4) if i != j) / 12
    expected += sum(k(y[i], y[j]) for i in range(5) for j in range(5) if i != j) / 20
    expected -= 2 * sum(k(p, q) for p in x for q in y) / 20
    assert kid.squared_mmd(x.numpy(), y.numpy()) == pytest.approx(expected, rel=1e-12)


def test_kid_is_unbiased_symmetric_and_grows_with_the_shift():
    """Equal sources: about 0 within the error of the mean, with both signs among the subsets."""
    a, b = normal(4000, 8, 1), normal(4000, 8, 2)
    same = kernel_inception_distance(a, b, num_subsets=50, subset_size=50)
    assert abs(same.mean) < 4 * same.std / 50**0.5
    shifts = [
        kernel_inception_distance(a, b + s, num_subsets=5, subset_size=50) for s in (0.3, 0.6)
    ]
    assert same.mean < shifts[0].mean < shifts[1].mean
    x, y = a[:50].double().numpy(), b[:50].double().numpy()
    assert kid.squared_mmd(x, y) == pytest.approx(kid.squared_mmd(y, x))


def test_kid_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="subsets of 2 images"):
        kernel_inception_distance(normal(1, 3), normal(5, 3))
    with pytest.raises(ValueError, match="one D, got 3 and 4"):
        kernel_inception_distance(normal(5, 3), normal(5, 4))
    with pytest.raises(ValueError, match="not finite"):
        kernel_inception_distance(normal(5, 3) / 0, normal(5, 3), num_subsets=2)


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
    in_parts = Features([generated[:20].numpy(), generated[20:].numpy()])
    assert prdc(real.numpy(), in_parts) == expected


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
    with pytest.raises(ValueError, match="one D, got 3 and 4"):
        prdc(normal(9, 3), normal(9, 4))
    with pytest.raises(ValueError, match="not finite"):
        prdc(normal(9, 3), normal(9, 3) / 0)


def test_rows_are_chosen_by_seed():
    rows = choose_rows(1000, 10, 1)
    assert rows.tolist() == sorted(set(rows.tolist())) == choose_rows(1000, 10, 1).tolist()
    assert len(rows) == 10
    assert rows.max() > 500
    assert rows.tolist() != choose_rows(1000, 10, 2).tolist()
    assert choose_rows(7, 10, 1).tolist() == list(range(7))
