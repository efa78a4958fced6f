"""The metrics against closed forms, torch-fidelity, and themselves in other shardings."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from datasets.real import RealImages, chosen_images
from metrics import (
    METRICS,
    check_metric_names,
    classifier,
    fid,
    lpips_score,
    weights,
)
from metrics.base import Collector, Context, Generated, Metric, Real, entry
from metrics.class_accuracy import per_class, wilson_interval
from metrics.classifier import ClassifierSpec, ClassifierViews, accuracy, count_pairs
from metrics.evaluation import Plan
from metrics.features import DINOV2, INCEPTION, Extractor
from metrics.lpips_score import ALEXNET
from metrics.reference import FeatureMoments
from metrics.report import build_report, compare, report_path, save_report, summary
from metrics.scoring import Part, Scoring
from tests.scored import (
    CPU,
    SINGLE,
    batches_of,
    random_images,
    real_images_of,
    real_sets,
    score,
    scoring_of,
)
from tests.tiny_networks import pixel_distance
from utils.distributed import Runtime, distributed_runtime
from utils.errors import ConfigError, MissingWeightsError
from utils.images import ImageSpec
from utils.precision import allow_tf32, full_float32


@pytest.fixture(autouse=True)
def one_thread():
    """Small networks on a shared machine: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_extractor(dim: int = 12, num_logits: int = 7) -> Extractor:
    """Projections of a 4x4 thumbnail."""
    first = torch.randn(48, dim, generator=rng(1)) / 200
    second = torch.randn(dim, num_logits, generator=rng(2))

    def extract(images: Tensor) -> tuple[Tensor, Tensor]:
        assert images.shape[1] == 3
        x = torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1) - 128
        features = (x @ first).relu()
        return features, features @ second

    return Extractor(extract, {"features": dim, "logits": num_logits})


# --- Frechet distance


def test_frechet_of_commuting_gaussians_is_the_closed_form():
    mu1, mu2 = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 0.0])
    var1, var2 = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 4.0, 1.0])
    basis = torch.linalg.qr(torch.randn(3, 3, generator=rng(), dtype=torch.float64)).Q
    sigma1 = basis @ torch.diag(var1).double() @ basis.T
    sigma2 = basis @ torch.diag(var2).double() @ basis.T
    expected = (mu1 - mu2).square().sum() + (var1.sqrt() - var2.sqrt()).square().sum()
    assert fid.frechet_distance(mu1, sigma1, mu2, sigma2)[0] == pytest.approx(expected.item())


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    sums = FeatureMoments(features.shape[1])
    sums.update(features)
    return sums.mean_cov()


def test_frechet_is_symmetric_and_zero_for_equal_sets():
    a = moments(torch.randn(100, 8, generator=rng(1)))
    b = moments(torch.randn(90, 8, generator=rng(2)) * 2 + 1)
    there, back = fid.frechet_distance(*a, *b), fid.frechet_distance(*b, *a)
    assert there == pytest.approx(back, rel=1e-10)
    value, raw = fid.frechet_distance(*a, *a)
    assert value >= 0
    assert abs(raw) < 1e-9


def test_frechet_with_fewer_images_than_features_is_the_nuclear_norm():
    a = torch.randn(10, 30, generator=rng(1), dtype=torch.float64)
    b = torch.randn(12, 30, generator=rng(2), dtype=torch.float64) + 0.5
    roots = [(x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b)]
    cross = torch.linalg.matrix_norm(roots[0] @ roots[1].T, "nuc")
    expected = (a.mean(0) - b.mean(0)).square().sum() + sum(r.square().sum() for r in roots)
    found, _ = fid.frechet_distance(*moments(a), *moments(b))
    assert found == pytest.approx((expected - 2 * cross).item(), rel=1e-7)


def test_frechet_refuses_what_does_not_fit():
    mu, sigma = torch.zeros(3), torch.eye(3)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        fid.frechet_distance(mu, sigma, torch.zeros(2), torch.eye(2))
    with pytest.raises(ValueError, match="not finite"):
        fid.frechet_distance(mu, sigma, mu * math.nan, sigma)


def test_count_name_tells_counts_apart():
    assert [fid.count_name(n) for n in (50_000, 1000, 64, 1500)] == [
        "fid_50k", "fid_1k", "fid_64", "fid_1500",
    ]  # fmt: skip


# --- streaming sums


@pytest.mark.parametrize(("size", "dim"), [(1, 6), (7, 6), (64, 6), (200, 6), (64, 600)])
def test_moments_equal_numpy_for_any_batching(size, dim):
    features = torch.randn(150, dim, generator=rng()) * 0.01 + 50
    sums = FeatureMoments(dim)
    for part in features.split(size):
        sums.update(part)
    sums.update(features[:0])
    mean, covariance = sums.mean_cov()
    expected = features.double().numpy()
    np.testing.assert_allclose(mean, expected.mean(0), rtol=1e-13)
    np.testing.assert_allclose(covariance, np.cov(expected, rowvar=False), rtol=1e-6, atol=1e-10)


def test_moments_of_one_image_have_no_covariance():
    sums = FeatureMoments(3)
    sums.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least 2 images"):
        sums.mean_cov()


@pytest.mark.parametrize("count", [3, 10, 97])
def test_inception_score_is_that_of_torch_fidelity(count):
    """Fewer images than splits make as many splits as images."""
    from torch_fidelity.metric_isc import isc_features_to_metric

    images, extractor = random_images(count), tiny_extractor()
    found = score(["is"], images, networks={INCEPTION: extractor}, size=7)["is"]
    expected = isc_features_to_metric(extractor(images)[1], splits=min(10, count))
    assert found["value"] == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert found["std"] == pytest.approx(expected["inception_score_std"], rel=1e-6, abs=1e-9)
    assert found["num_splits"] == min(10, count)


# --- several processes, and failures


@pytest.mark.parametrize("world_size", [2, 5])
def test_any_number_of_processes_gives_the_same(world_size):
    """Also with ranks that have no image: 3 generated images over 5 ranks."""
    images = random_images(3 if world_size == 5 else 21)
    labels = [i % 3 for i in range(len(images))]
    real = real_sets(real_images_of(random_images(40, seed=5) // 2, torch.arange(40) % 4))
    networks = {INCEPTION: tiny_extractor(), ALEXNET: pixel_distance}
    options = {"real": real, "networks": networks}
    names = ("fid", "kid", "is", "prdc", "lpips")
    single = score(names, images, labels, **options)
    many = score(names, images, labels, **options, world_size=world_size, size=4)
    for name, result in single.items():
        expected = result["value"] and pytest.approx(result["value"], rel=1e-6)
        assert many[name]["value"] == expected, name


class Failing(Collector):
    """Raises on one rank, or on all, while images pass."""

    def __init__(self, on_rank: int | None = None) -> None:
        self.on_rank = on_rank

    def update_real(self, real, runtime):
        self.raises = self.on_rank is None or runtime.rank == self.on_rank

    def reduce_real(self, runtime):
        runtime.all_reduce(torch.zeros(1))

    def update(self, images, indices):
        if self.raises:
            raise RuntimeError("boom")

    def reduce(self, runtime):
        runtime.all_reduce(torch.zeros(1))


class OfFailing(Metric):
    def compute(self):
        return entry("ok", 1.0)


def small_scoring(runtime: Runtime) -> Scoring:
    """Metrics of 5 images that have seen 20 real ones."""
    train = real_images_of(random_images(20, seed=5), torch.arange(20) % 2)
    return scoring_of(
        ["fid", "is", "class_acc", "fd_domain"],
        random_images(5),
        [0, 1, 0, 1, 0],
        real=real_sets(train, train),
        networks={INCEPTION: tiny_extractor()},
        runtime=runtime,
    )


def _score_on_rank(rank: int, port: int, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    with distributed_runtime("cpu", timeout_minutes=1) as runtime:
        scoring = small_scoring(runtime)
        failing = Part(Failing(on_rank=1), {"lpips": OfFailing(None)})
        failing.collector.update_real(None, runtime)
        scoring.parts.append(failing)
        scoring.alive.append(failing)
        entries = scoring.score(batches_of(random_images(5), runtime), 5)
        if runtime.is_main:
            Path(folder, "entries.json").write_text(json.dumps(entries))


def test_two_processes_agree_with_one_and_survive_a_failure_on_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_score_on_rank, args=(port, str(tmp_path)), nprocs=2)
    found = json.loads((tmp_path / "entries.json").read_text())
    single = small_scoring(SINGLE).score(batches_of(random_images(5)), 5)
    for name, result in single.items():
        assert found[name]["value"] == pytest.approx(result["value"], rel=1e-6), name
    assert found["class_acc"]["confusion"] == single["class_acc"]["confusion"]
    assert found["lpips"]["status"] == "failed"
    assert "another process" in found["lpips"]["reason"]


def test_a_failing_metric_is_recorded_and_the_others_go_on(caplog):
    images = random_images(6)
    parts = scoring_of(["is"], images, networks={INCEPTION: tiny_extractor()}).parts
    failing = Part(Failing(), {"lpips": OfFailing(None)})
    scoring = Scoring([failing, *parts], SINGLE)
    scoring.update_real(real_sets(real_images_of(images)))
    found = scoring.score(batches_of(images), 6)
    assert found["lpips"]["status"] == "failed"
    assert found["lpips"]["reason"] == "RuntimeError: boom"
    assert found["is"]["value"] >= 1
    assert caplog.messages == ["lpips failed and is left out: RuntimeError: boom"]


def test_fid_of_real_halves_is_small_and_of_noise_large():
    smooth = torch.arange(256).view(1, 1, 16, 16).expand(200, -1, -1, -1).to(torch.uint8)
    real = (smooth // 2 + random_images(200, seed=3) // 4).to(torch.uint8)
    found = {}
    sets = real_sets(real_images_of(real[:100]))
    for name, images in {"half": real[100:], "noise": random_images(100, seed=4)}.items():
        found[name] = score(["fid"], images, real=sets, networks={INCEPTION: tiny_extractor()})[
            "fid"
        ]
    assert 0 < found["half"]["value"] < found["noise"]["value"] / 10
    assert found["half"]["status"] == "unreliable"
    assert found["half"]["name"] == "fid_100"


def test_tf32_stays_out_of_metrics_and_comes_back_after_them():
    """And the flags can be read in every way: torch refuses where two ways of setting them mix."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]

    def settings() -> list:
        with torch.backends.cudnn.flags(enabled=True):
            pass
        products = torch.backends.cuda.matmul.fp32_precision, torch.get_float32_matmul_precision()
        return [*(flag.allow_tf32 for flag in flags), "tf32" in products, "high" in products]

    try:
        allow_tf32()
        assert settings() == [True] * 4
        with full_float32(CPU):
            assert settings() == [False] * 4
        assert settings() == [True] * 4
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


@pytest.mark.parametrize(("device", "threads"), [("cuda", 8), ("cpu", 1)])
def test_the_main_process_computes_with_the_threads_of_those_that_wait(
    monkeypatch, device, threads
):
    class Metric:
        better = None

        def compute(self):
            return {"value": torch.get_num_threads()}

    class Silent(Collector):
        def reduce(self, runtime):
            pass

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    scoring = Scoring([Part(Silent(), {"a": Metric()})], Runtime(torch.device(device)))
    assert scoring.score([], 0)["a"]["value"] == threads
    assert torch.get_num_threads() == 1


def test_real_indices_are_a_fixed_sorted_subset():
    chosen = chosen_images(1000, 10)
    assert list(chosen) == sorted(set(chosen)) == list(chosen_images(1000, 10))
    assert max(chosen) > 500
    assert list(chosen_images(5, 10)) == list(range(5))


# --- weights


def test_missing_weights_say_what_to_do_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refuse(url, dst, **_):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    for given in (None, str(tmp_path / "absent.pth")):
        with pytest.raises(MissingWeightsError) as caught:
            weights.find_weights(INCEPTION, given)
        message = str(caught.value)
        assert "\n" not in message
        assert INCEPTION.url in message
        assert "--inception_weights PATH" in message
        assert str(tmp_path) in message


def test_weights_come_from_the_cache_and_are_not_fetched_in_a_dry_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("fetched"))
    with pytest.raises(MissingWeightsError, match="a run downloads them"):
        weights.find_weights(INCEPTION, None, download=False)
    path = tmp_path / "hub" / "checkpoints" / INCEPTION.other_names[0]
    path.parent.mkdir(parents=True)
    torch.save({"a": torch.zeros(1)}, path)
    found = weights.find_weights(INCEPTION, None)
    assert found.path == path
    assert len(found.sha256) == 64


def test_a_download_is_checked_against_the_hash_that_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    asked = []

    def download(url, target, *, hash_prefix, progress):
        asked.append((url, hash_prefix))
        torch.save({}, target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    network = dataclasses.replace(INCEPTION, hash_prefix="0123abcd")
    assert weights.find_weights(network, None).path == network.cache_path
    assert asked == [(network.url, "0123abcd")]
    assert ALEXNET.hash_prefix


class Dangerous:
    def __reduce__(self):
        return (pytest.fail, ("code from a weights file was run",))


@pytest.mark.parametrize("content", ["pickle", "text", "wrong"])
def test_weights_that_are_not_plain_or_do_not_fit_are_refused(tmp_path, content):
    path = tmp_path / "weights.pth"
    if content == "text":
        path.write_text("<html>404</html>")
    else:
        torch.save(Dangerous() if content == "pickle" else {"x": torch.zeros(1)}, path)
    for network in (INCEPTION, DINOV2, ALEXNET):
        with pytest.raises(MissingWeightsError) as caught, weights.usable(network, "does not fit"):
            network.load(path, CPU)
        assert "\n" not in str(caught.value)


def test_metrics_without_their_needs_are_skipped_and_the_rest_planned(tmp_path):
    absent = {"inception": str(tmp_path / "a.pth"), "lpips": str(tmp_path / "b.pth")}
    generated = Generated(ImageSpec(1, 8, 8, 2), 4, [0, 1, 0, 1])
    plan = Plan(tuple(METRICS), Context(SINGLE, generated, Real(None)), absent, True)
    offline = ("class_acc", "fd_domain", "prdc_domain", "memorization", "sanity")
    assert plan.runnable == offline
    assert set(plan.skipped) == set(METRICS) - set(offline)
    unlabelled = Generated(ImageSpec(1, 8, 8, 2), 4, None, "trained without labels")
    context = Context(SINGLE, unlabelled, Real(None, "no data"))
    plan = Plan(("class_acc", "memorization"), context, {}, True)
    assert plan.skipped["memorization"]["reason"] == "no data"
    plan = Plan(("class_acc",), Context(SINGLE, unlabelled, Real(None)), {}, True)
    assert plan.skipped["class_acc"]["reason"] == "trained without labels"


def test_metric_names_are_checked_with_a_hint():
    assert check_metric_names(["fid", "is", "fid"]) == ("fid", "is")
    for wrong, hint in {"fidd": "'fid'", "LPIP": "'lpips'", "accuracy": "'class_acc'"}.items():
        with pytest.raises(ConfigError, match=f"did you mean {hint}"):
            check_metric_names([wrong])


# --- LPIPS


@pytest.fixture(scope="module")
def alexnet_path(tmp_path_factory) -> Path:
    """torchvision's AlexNet state dict with random convolutions (the head is not read)."""
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    shapes = {
        0: (64, 3, 11),
        3: (192, 64, 5),
        6: (384, 192, 3),
        8: (256, 384, 3),
        10: (256, 256, 3),
    }
    state = {}
    for layer, (out, into, kernel) in shapes.items():
        scale = math.sqrt(2 / (into * kernel**2))
        weight = torch.randn(out, into, kernel, kernel, generator=rng(layer)) * scale
        state |= {f"features.{layer}.weight": weight, f"features.{layer}.bias": torch.zeros(out)}
    torch.save(state, path)
    return path


def test_lpips_loads_given_weights_and_leaves_the_random_state(alexnet_path):
    state = torch.random.get_rng_state()
    distance = lpips_score.load_lpips(alexnet_path, CPU)
    assert torch.equal(torch.random.get_rng_state(), state)
    x = lpips_score.lpips_input(random_images(2, (1, 28, 28)))
    assert x.shape == (2, 3, 64, 64)
    assert x.min() >= -1
    assert x.max() <= 1
    assert distance(x, x).tolist() == [0, 0]
    assert (distance(x, x.flip(0)) > 0).all()
    first = torch.load(alexnet_path)["features.0.weight"]
    assert torch.equal(distance.__closure__[0].cell_contents.net.slice1[0].weight, first)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((28, 56), (64, 128)), ((96, 32), (192, 64)), ((64, 100), (64, 100)), ((80, 70), (80, 70))],
)
def test_lpips_sees_the_smaller_side_of_oblong_images_at_64_pixels(size, expected):
    assert lpips_score.lpips_input(random_images(1, (3, *size))).shape == (1, 3, *expected)


def test_lpips_diversity_of_grey_28_pixel_images(alexnet_path):
    """Images of one class are near each other, real images twice as far apart as generated ones."""
    labels = [i % 2 for i in range(8)]
    base = random_images(2, (1, 28, 28))[torch.tensor(labels)]
    images = (base // 2 + random_images(8, (1, 28, 28), seed=1) // 16).to(torch.uint8)
    real = real_images_of(random_images(8, (1, 28, 28), seed=2), torch.tensor(labels))
    networks = {ALEXNET: lpips_score.load_lpips(alexnet_path, CPU)}
    found = score(["lpips"], images, labels, real=real_sets(real), networks=networks, size=3)[
        "lpips"
    ]
    assert found["lpips_intra"]["value"] < found["lpips_inter"]["value"]
    assert found["value"] == found["lpips_inter"]["value"] < found["real_value"]
    assert found["sem"] > 0
    assert found["extractor"]["size"] == [64, 64]


def test_pairs_differ_and_depend_on_the_draw_alone():
    pairs = lpips_score.draw_pairs(100, 500, 3)
    assert pairs.shape == (500, 2)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert torch.equal(pairs, lpips_score.draw_pairs(100, 500, 3))
    assert not torch.equal(pairs, lpips_score.draw_pairs(100, 500, 4))
    assert len(lpips_score.draw_pairs(5, 500, 1)) == 10


def test_diversity_is_the_mean_over_all_pairs_when_there_are_few():
    images = random_images(5, (3, 64, 64))
    labels = torch.tensor([0, 0, 0, 1, 2])
    found = lpips_score.diversity(pixel_distance, images, labels, CPU)
    x = lpips_score.lpips_input(images)
    table = torch.stack([pixel_distance(x, x[i : i + 1].expand_as(x)) for i in range(5)])
    rows, columns = torch.triu_indices(5, 5, offset=1)
    expected = table[rows, columns]
    mean, sem = found["lpips_inter"]
    assert mean == pytest.approx(expected.mean().item(), rel=1e-6)
    assert sem == pytest.approx(expected.std().item() / math.sqrt(10), rel=1e-5)
    within = torch.stack([table[0, 1], table[0, 2], table[1, 2]]).mean().item()
    assert found["lpips_intra"][0] == pytest.approx(within, rel=1e-6)


# --- classifier


@pytest.fixture(scope="module")
def digits() -> tuple[RealImages, RealImages, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (torch.tensor(data.images) * 15.9).round().to(torch.uint8)[:, None]
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=rng())
    images, labels = images[order], labels[order]
    train = real_images_of(images[:1438], labels[:1438])
    return train, real_images_of(images[1438:], labels[1438:], split="test"), images, labels


def short_training(monkeypatch, num_steps: int) -> None:
    usual = classifier.classifier_spec

    def short(*args, **options) -> ClassifierSpec:
        return dataclasses.replace(usual(*args, **options), num_steps=num_steps)

    monkeypatch.setattr(classifier, "classifier_spec", short)


def test_classifier_is_right_on_real_digits_and_repeatable(digits, tmp_path, monkeypatch, caplog):
    """Real test images as "generated" ones reach the ceiling; the cache gives the same again."""
    caplog.set_level(logging.INFO, "diffusion")
    train, test, images, labels = digits

    short_training(monkeypatch, 150)

    def score_digits(asked: Tensor) -> dict:
        options = {"real": real_sets(train, test), "cache_dir": tmp_path}
        names = ["class_acc"]
        return score(names, images[1438:], asked.tolist(), size=100, **options)["class_acc"]

    found = score_digits(labels[1438:])
    assert found["status"] == "ok"
    assert found["value"] == found["real_ceiling"] >= 0.97
    assert found["per_class"] == found["per_class_real"]
    assert found["ci95"][0] < found["value"] <= found["ci95"][1]
    assert sum(map(sum, found["confusion"])) == found["n"] == len(test.dataset)
    assert len(list(tmp_path.glob("classifier_*.pth"))) == 1
    assert caplog.messages

    caplog.clear()
    again = score_digits(labels[1438:])
    assert not caplog.messages  # nothing was trained
    shuffled = score_digits(labels[1438:][torch.randperm(len(test.dataset), generator=rng(1))])
    assert again == found
    assert abs(shuffled["value"] - 0.1) < 0.06
    assert shuffled["real_ceiling"] == found["real_ceiling"]


def test_training_is_a_function_of_its_arguments(digits):
    train, _, _, _ = digits
    images, labels = train.load(range(200))
    spec = classifier.classifier_spec(ImageSpec(1, 8, 8, 10), 200, flip=True)
    spec = ClassifierSpec(**(dataclasses.asdict(spec) | {"num_steps": 4}))
    state = torch.random.get_rng_state()
    one = classifier.train_classifier(images, labels, spec, CPU).state_dict()
    torch.manual_seed(99)
    two = classifier.train_classifier(images, labels, spec, CPU).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    torch.random.set_rng_state(state)


def test_a_weak_classifier_makes_the_accuracy_unreliable(digits, monkeypatch):
    train, _, images, labels = digits
    short_training(monkeypatch, 1)
    asked = labels[:20].tolist()
    found = score(["class_acc"], images[:20], asked, real=real_sets(train))["class_acc"]
    assert found["status"] == "unreliable"
    assert "held out" in found["classifier"]["ceiling_split"]
    assert found["n_real"] == 143


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 64, 64), (3, 20, 48), (1, 28, 28), (3, 96, 96)])
def test_classifier_takes_any_shape_and_shifts_keep_it(shape):
    spec = classifier.classifier_spec(ImageSpec(*shape, 4), 10, flip=False)
    images = random_images(2, shape)
    probs, _ = classifier.classify(classifier.Classifier(spec).eval(), images, CPU)
    assert probs.shape == (2, 4)
    assert classifier.shift_randomly(images.float(), rng()).shape == images.shape


def test_shifts_move_pixels_by_at_most_a_twelfth():
    images = torch.zeros(50, 1, 24, 24)
    images[:, :, 12, 12] = 1
    y, x = classifier.shift_randomly(images, rng()).nonzero()[:, 2:].unbind(1)
    assert set(y.tolist()) == set(x.tolist()) == {10, 11, 12, 13, 14}


def test_confusion_counts_what_was_asked_against_what_is_seen():
    confusion = count_pairs(torch.tensor([0, 1, 2]), torch.tensor([0, 0, 2]), 3)
    assert confusion.tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 1]]
    assert accuracy(confusion) == pytest.approx(2 / 3)
    assert per_class(confusion) == [1.0, 0.0, 1.0]
    assert per_class(torch.zeros(2, 2, dtype=torch.int64)) == [None, None]
    assert math.isnan(accuracy(torch.zeros(2, 2)))


def test_how_sure_the_classifier_is_comes_from_its_probabilities(digits, monkeypatch):
    train, _, images, labels = digits
    short_training(monkeypatch, 60)
    asked = labels[:30].roll(1).tolist()
    scoring = scoring_of(["class_acc"], images[:30], asked, real=real_sets(train))
    found = scoring.score(batches_of(images[:30]), 30)["class_acc"]
    network = scoring.parts[0].collector.network
    probs = classifier.classify(network, images[:30], CPU)[0].double()
    assert found["unsure_share"] == pytest.approx((probs.amax(1) < 0.5).double().mean().item())
    expected = probs[range(30), asked].mean().item()
    assert found["mean_requested_prob"] == pytest.approx(expected, rel=1e-6)
    assert found["confusion"] == count_pairs(torch.tensor(asked), probs.argmax(1), 10).tolist()
    (picture,) = scoring.parts[0].metrics["class_acc"].pictures().values()
    assert " drawn as " in picture.caption


def test_the_main_process_knows_the_mistakes_of_all():
    """Each of two processes hands in its own; the report shows the union, first rank first."""
    images = random_images(3)
    mistakes = [(images[i], i, i + 1) for i in range(3)]
    collector = ClassifierViews(
        Context(SINGLE, Generated(ImageSpec(1, 16, 16, 4), 3, [0, 1, 2]), Real(None))
    )

    class Gathering(Runtime):
        def gather(self, rows):
            return rows

        def gather_objects(self, value):
            return [value, mistakes[2:]]

    collector.mistakes = mistakes[:2]
    collector.parts = [torch.zeros(3, 5)]
    collector.reduce(Gathering(CPU))
    assert len(collector.mistakes) == 3
    for ours, expected in zip(collector.mistakes, mistakes, strict=True):
        assert torch.equal(ours[0], expected[0])
        assert ours[1:] == expected[1:]


def test_wilson_interval_of_known_shares():
    assert wilson_interval(90, 100) == pytest.approx((0.8256, 0.9448), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_held_out_rows_are_no_training_rows():
    train = real_images_of(random_images(100))
    seen, held_out = classifier.split_images(real_sets(train), seed=0)
    assert len(held_out.indices) == 10
    assert sorted(seen.indices + held_out.indices) == list(range(100))
    test = real_images_of(random_images(20), split="test")
    seen, unseen = classifier.split_images(real_sets(train, test), seed=0)
    assert seen.indices == list(range(100))
    assert (unseen.split, unseen.indices) == ("test", list(range(20)))


# --- report


def test_report_has_the_known_keys_first_and_no_nan(tmp_path):
    entries = {
        "is": entry("ok", 2.5, std=math.nan, num_splits=10),
        "fid": entry("unreliable", math.inf, name="fid_64", raw=-math.inf),
        "lpips": entry("skipped", None, "no weights"),
    }
    report = build_report(entries, provenance={"seed": 1, "checkpoint": Path("a.pth")})
    path = tmp_path / "eval" / "report.json"
    save_report(path, report)
    stored = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert list(stored)[:5] == ["FID", "IS_mean", "IS_std", "LPIPS_diversity", "class_accuracy"]
    assert stored["IS_mean"] == 2.5
    assert stored["FID"] is stored["fid_64"] is stored["LPIPS_diversity"] is None
    assert stored["metrics"]["fid"]["reason"]
    assert stored["provenance"]["created"].endswith("+00:00")
    assert stored["provenance"]["checkpoint"] == "a.pth"
    assert stored["status"] == "complete" or stored["status"] == "partial"
    assert sorted(tmp_path.glob("eval/*")) == [path.with_suffix(".html"), path]


def test_summary_shows_each_class_beside_the_real_ceiling():
    accuracy = entry(
        "ok", 0.75, ci95=[0.5, 0.9], real_ceiling=0.99, unsure_share=0.125,
        per_class={"cat": 0.5, "dog": None}, per_class_real={"cat": 0.98, "dog": 1.0},
    )  # fmt: skip
    skipped = entry("skipped", None, "no weights")
    report = build_report({"class_acc": accuracy, "fid": skipped}, provenance={}, warnings=["few"])
    lines = summary(report).splitlines()
    assert lines[0].split() == ["fid", "skipped", "no", "weights"]
    assert "real images 0.9900, unsure 12.5%" in lines[1]
    assert any(line.split() == ["cat", "0.5000", "real", "0.9800"] for line in lines)
    assert any(line.split() == ["dog", "-", "real", "1.0000"] for line in lines)
    assert lines[-1] == "note: few"


@pytest.mark.parametrize(
    "key", ["n", "n_real", "num_pairs", "subset_size", "extractor", "classifier", "k"]
)
def test_values_that_were_made_in_different_ways_are_not_compared(key):
    new, same, other = (
        {"metrics": {"fid": entry("ok", 1.0, **{key: {"path": path, "sha256": digest}})}}
        for path, digest in (("a.pth", "1"), ("b.pth", "1"), ("a.pth", "2"))
    )
    notes = [compare(new, old)[0]["note"] for old in (same, other)]
    assert notes == [None, f"not comparable, {key} differ"]


def test_report_path_takes_a_file_or_a_folder(tmp_path):
    assert report_path(None, Path("run/eval")) == Path("run/eval/report.json")
    assert report_path("a/metrics_report.json", Path("run")) == Path("a/metrics_report.json")
    assert report_path("folder", Path("run")) == Path("folder/report.json")


def test_warnings_follow_the_number_of_images():
    def told(name: str, num_images: int, channels: int) -> str:
        return "; ".join(METRICS[name].warnings(num_images, channels))

    assert "unreliable" in told("fid", 2048, 3)
    assert "not comparable" in told("fid", 9999, 3)
    assert told("fid", 10_000, 3) == told("class_acc", 10, 1) == ""
    assert "grey" in told("is", 10_000, 1)
