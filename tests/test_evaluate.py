"""evaluate.py from the command line, on a digits model trained for three steps."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train
from datasets import real
from diffusion import likelihood as densities
from generation import evaluated
from metrics import METRICS, classifier, likelihood, reference
from metrics.base import Collector, Metric, measured
from metrics.features import DINOV2, EFFNET, INCEPTION, Extractor, Features
from metrics.lpips_score import ALEXNET, Lpips
from metrics.reference import read_reference
from metrics.weights import Network
from models.unet import UNet
from reporting.pages import Picture
from tests.tiny_networks import extract, pixel_distance
from utils.errors import ConfigError, DataError, exit_code_of
from utils.images import to_array

ABSENT = ["--inception_weights", "/absent/inception.pth", "--lpips_weights", "/absent/alex.pth"]
FAST = ["--num_inference_steps", "2", "--device", "cpu", "--batch_size", "7"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    settings = [
        "max_steps=3", "batch_size=8", "image_size=8", "model_params.model_channels=8",
        "model_params.channel_mult=1,2", f"save_dir={folder}", "num_samples=2", "experiment_name=r",
        "eval_metrics=fid,is,lpips,class_acc",
    ]  # fmt: skip
    assert train.main(["--config", "configs/digits_unet.py", "--device", "cpu", *settings]) == 0
    return folder / "r"


@pytest.fixture
def tiny_networks(monkeypatch, tmp_path):
    """Stand-ins for both pretrained networks, behind files that are found and hashed as usual."""

    monkeypatch.setattr(
        INCEPTION, "load", lambda *_: Extractor(extract, {"features": 3, "logits": 3})
    )
    monkeypatch.setattr(ALEXNET, "load", lambda *_: pixel_distance)
    path = tmp_path / "weights.pth"
    torch.save({}, path)
    return ["--inception_weights", str(path), "--lpips_weights", str(path)]


@pytest.fixture
def quick_classifier(monkeypatch):
    """Five steps of training: for tests of the plumbing, not of the classifier."""

    usual = classifier.classifier_spec

    def short(*args, **options):
        return dataclasses.replace(usual(*args, **options), num_steps=5)

    monkeypatch.setattr(classifier, "classifier_spec", short)
    monkeypatch.setattr(likelihood, "NUM_IMAGES", 4)
    monkeypatch.setattr(densities, "NUM_TIMESTEPS", 5)


def read(path: Path) -> dict:
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))


def test_all_metrics_end_in_a_report(run_dir, tiny_networks, quick_classifier, tmp_path, capsys):
    path = tmp_path / "out" / "metrics_report.json"
    command = ["--checkpoint", str(run_dir), "--num_samples", "23", "--num_real", "50", *FAST]
    command += ["--save_images_dir", str(tmp_path / "png"), "--output", str(path)]
    assert evaluate.main([*command, *tiny_networks]) == 0
    report = read(path)
    assert list(report)[:4] == ["FID", "IS_mean", "IS_std", "LPIPS_diversity"]
    assert None not in [report[key] for key in list(report)[:5]]
    assert report["fid_23"] == report["FID"]
    assert report["status"] == "complete"
    assert report["metrics"]["fid"]["n_real"] == 50
    assert report["metrics"]["class_acc"]["n"] == 23
    confusion = report["metrics"]["class_acc"]["confusion"]
    assert [sum(row) for row in confusion] == [3, 3, 3, 2, 2, 2, 2, 2, 2, 2]
    assert ["too few" in line for line in report["warnings"]] == [True, False]  # each once
    made = report["provenance"]
    assert made["n"] == 23
    assert made["step"] == 3
    assert made["sampler"] == "ddim"
    assert made["steps"] == 2
    assert made["label_mode"] == "balanced"
    assert len(made["sha256"]) == 64
    assert made["dataset"]["name"] == "digits"
    assert read(tmp_path / "png/labels.json")["000013.png"] == 3
    pictures = sorted((tmp_path / "png").glob("*.png"))
    assert [p.name for p in pictures] == [f"{i:06d}.png" for i in range(23)]
    assert Image.open(pictures[0]).size == (8, 8)
    printed = capsys.readouterr().out
    assert "fid_23" in printed
    assert "real" in printed
    assert list((run_dir / "eval").glob("classifier_*.pth"))


OFFLINE = "class_acc,fd_domain,prdc_domain,memorization,sanity"


def test_a_sweep_reports_every_setting_and_their_summary(
    run_dir, tiny_networks, quick_classifier, tmp_path, monkeypatch
):
    trained = []
    train_classifier = classifier.train_classifier
    monkeypatch.setattr(
        classifier,
        "train_classifier",
        lambda *args, **kw: trained.append(1) or train_classifier(*args, **kw),
    )
    command = ["--checkpoint", str(run_dir), "--n", "20", "--metrics", "all", "--device", "cpu"]
    command += ["--cfg_scale", "1,3", "--steps", "2,3", "--output", str(tmp_path / "out")]
    assert evaluate.main([*command, "seed=5", *tiny_networks]) == 0
    report = read(tmp_path / "out/report.json")
    rows = [(row["cfg_scale"], row["num_inference_steps"]) for row in report["sweep"]]
    assert rows == [(1, 2), (1, 3), (3, 2), (3, 3)]
    assert len(trained) <= 1  # real images are looked at once for all settings
    for row in report["sweep"]:
        single = read(tmp_path / "out" / row["report"])
        entries = single["metrics"]
        recalls = {f"{name} recall": entries[name]["recall"] for name in ("prdc", "prdc_domain")}
        assert row["metrics"] == {name: e["value"] for name, e in entries.items()} | recalls
        assert set(entries) == set(METRICS)
        assert single["provenance"]["cfg_scale"] == row["cfg_scale"]
    alone = ["--cfg_scale", "3", "--steps", "2", "--output", str(tmp_path / "alone")]
    assert evaluate.main([*command, *alone, "seed=5", *tiny_networks]) == 0
    single = read(tmp_path / "alone/report.json")
    for name, result in single["metrics"].items():
        expected = report["sweep"][2]["metrics"][name]
        if expected is None:  # without the weights, or of models with a condition alone
            assert result["status"] == "skipped"
            continue
        assert result["value"] == pytest.approx(expected, rel=1e-6), name
    left = sorted(path.suffix for path in (tmp_path / "out").iterdir() if path.is_file())
    assert left == [".csv"] * 4 + [".html"] * 5 + [".json"] * 5
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]  # nor images


def test_repeats_have_seeds_of_their_own(run_dir, tmp_path):
    command = ["--checkpoint", str(run_dir), "--n", "6", "--metrics", "sanity", *FAST]
    assert evaluate.main([*command, "--repeats", "3", "--output", str(tmp_path)]) == 0
    report = read(tmp_path / "report.json")
    assert report["repeats"][0]["seeds"] == [42, 48, 54]
    values = [row["metrics"]["sanity"] for row in report["sweep"]]
    summary = report["repeats"][0]["metrics"]["sanity"]
    assert summary["mean"] == pytest.approx(sum(values) / 3)
    assert summary["min"] == min(values)


def test_an_interrupted_evaluation_draws_only_what_is_missing(
    run_dir, quick_classifier, tmp_path, monkeypatch
):
    """... with another batch size, and reports what an undisturbed one does."""
    command = ["--checkpoint", str(run_dir), "--n", "23", "--metrics", OFFLINE, "--device", "cpu"]
    command += ["--steps", "2", "--cfg_scale", "1"]
    generate, drawn = evaluated.generate, []

    def watched(run, seeds, labels, **options):
        left = iter(seeds)
        for images in generate(run, seeds, labels, **options):
            if len(drawn) >= limit:
                raise KeyboardInterrupt
            drawn.extend(islice(left, len(images)))
            yield images

    monkeypatch.setattr(evaluated, "generate", watched)
    limit = 14
    with pytest.raises(KeyboardInterrupt):
        evaluate.main([*command, "--batch_size", "7", "--output", str(tmp_path / "a")])
    assert len(list((tmp_path / "a").glob("samples_*/images_*.npy"))) == 2
    limit, drawn = 1000, []
    assert evaluate.main([*command, "--batch_size", "5", "--output", str(tmp_path / "a")]) == 0
    assert drawn == list(range(42 + 14, 42 + 23))
    assert not list((tmp_path / "a").glob("samples_*"))
    drawn = []
    assert evaluate.main([*command, "--batch_size", "7", "--output", str(tmp_path / "b")]) == 0
    assert len(drawn) == 23
    resumed, whole = (read(tmp_path / x / "report.json")["metrics"] for x in "ab")
    for name, found in whole.items():
        assert resumed[name]["value"] == pytest.approx(found["value"], rel=1e-4), name


def test_kept_images_serve_another_evaluation(run_dir, tmp_path, monkeypatch):
    command = ["--checkpoint", str(run_dir), "--n", "6", *FAST, "--output", str(tmp_path)]
    assert evaluate.main([*command, "--metrics", "sanity", "--keep_samples"]) == 0

    def refuse(*_, **__):
        yield pytest.fail("images were drawn again")

    monkeypatch.setattr(evaluated, "generate", refuse)
    assert evaluate.main([*command, "--metrics", "memorization"]) == 0


def classes_of_one_image(folder: Path, num_classes: int) -> Path:
    """A folder of folders, one for each class, with a black image in it."""
    for name in map(str, range(num_classes)):
        (folder / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(folder / name / "0.png")
    return folder


def test_kept_images_do_not_serve_what_would_draw_others(run_dir, tmp_path):
    command = ["--checkpoint", str(run_dir), "--n", "3", *FAST, "--metrics", "sanity"]
    command += ["--output", str(tmp_path), "--keep_samples"]
    changes = [
        *([], ["precision=bf16"], ["threshold=none"], ["--no_ema"], ["--seed", "7"]),
        *(["classes=2,7"], ["--label_mode", "3"], ["--label_mode", "train"]),
        ["--guide", str(run_dir), "--cfg_scale", "2"],
        ["--label_mode", "train", "--reference", str(classes_of_one_image(tmp_path / "images", 2))],
    ]
    for number, change in enumerate(changes, 1):
        assert evaluate.main([*command, *change]) == 0
        assert len(list(tmp_path.glob("samples_*"))) == number, change
    # "auto" is fp32 on a CPU, and bf16 on many a GPU: what counts is what it means here
    assert evaluate.main([*command, "precision=fp32"]) == 0
    assert len(list(tmp_path.glob("samples_*"))) == len(changes)


def test_statistics_of_real_images_are_kept_written_and_read(
    run_dir, tiny_networks, tmp_path, monkeypatch
):
    """The next evaluation does not look at the real images again; nor does one with a file."""
    monkeypatch.setitem(reference.GIVEN, "fid", (3, ""))  # of the stand-in network
    for path in (run_dir / "eval").glob("reference_*.npz"):  # of other tests
        path.unlink()
    looked = []
    update_real = Features.update_real

    def watched(self, real, runtime):
        update_real(self, real, runtime)
        looked.append(self.num_real)

    monkeypatch.setattr(Features, "update_real", watched)
    command = ["--checkpoint", str(run_dir), "--n", "9", "--metrics", "fid", *FAST, *tiny_networks]
    stats, values = tmp_path / "stats.npz", []
    for extra in (["--write_reference", str(stats)], [], ["--reference", str(stats)]):
        out = tmp_path / str(len(values))
        assert evaluate.main([*command, *extra, "--output", str(out)]) == 0
        report = read(out / "report.json")
        values.append((report["FID"], report["metrics"]["fid"]["n_real"]))
    assert looked == [1442, 0, 0]
    assert values[0] == values[1] == values[2]
    assert read_reference(stats, 3).meta["split"] == "train"
    (cached,) = (run_dir / "eval").glob("reference_*.npz")
    cached.write_bytes(b"damaged")
    assert evaluate.main([*command, "--output", str(tmp_path / "again")]) == 0
    assert looked[-1] == 1442
    other = [*command, "--num_real", "30", "--output", str(tmp_path / "fewer")]
    assert evaluate.main(other) == 0
    assert looked[-1] == 30


def test_one_image_costs_only_the_metrics_that_need_more(
    run_dir, tiny_networks, quick_classifier, tmp_path
):
    command = ["--checkpoint", str(run_dir), "--n", "1", "--metrics", "all", *FAST]
    assert evaluate.main([*command, "--output", str(tmp_path), *tiny_networks]) == 0
    found = read(tmp_path / "report.json")["metrics"]
    for name in ("fid", "kid", "prdc", "fd_domain", "prdc_domain"):
        assert found[name]["status"] == "unreliable", name
        assert found[name]["value"] is None
        assert found[name]["reason"]
    for name in ("is", "class_acc", "memorization", "sanity"):
        assert found[name]["value"] is not None, name


def test_strict_and_compare(run_dir, tmp_path, capsys):
    command = ["--checkpoint", str(run_dir), "--n", "12", *FAST, *ABSENT]
    metrics = ["--metrics", "fid,sanity"]
    assert evaluate.main([*command, *metrics, "--output", str(tmp_path), "--strict"]) == 3
    old = str(tmp_path / "report.json")
    more = ["--metrics", "sanity", "--strict", "--output", str(tmp_path / "b"), "--compare", old]
    assert evaluate.main([*command, *more]) == 0
    (row,) = read(tmp_path / "b/report.json")["comparison"]
    assert row["metric"] == "sanity"
    assert row["delta"] == 0
    assert row["note"] is None
    fewer = ["--metrics", "sanity", "--num_samples", "6", "--output", str(tmp_path / "c")]
    assert evaluate.main([*command, *fewer, "--compare", old]) == 0
    (row,) = read(tmp_path / "c/report.json")["comparison"]
    assert row["note"] == "not comparable, n differ"
    with pytest.raises(ConfigError, match="cannot be read"):
        evaluate.main([*command, "--compare", str(tmp_path / "absent.json")])


@pytest.mark.parametrize(("scale", "rows_per_image"), [("0", 1), ("1", 1), ("2.5", 2)])
def test_one_forward_a_step_of_twice_the_batch_with_guidance(
    run_dir, tmp_path, monkeypatch, scale, rows_per_image
):
    """50 DDIM steps: 50 forwards per batch, as docs/metrics.md says."""
    batches = []
    forward = UNet.forward
    monkeypatch.setattr(
        UNet, "forward", lambda self, x, t, y=None: batches.append(len(x)) or forward(self, x, t, y)
    )
    command = ["--checkpoint", str(run_dir), "--n", "10", "--metrics", "sanity", "--device", "cpu"]
    command += ["--steps", "50", "--batch_size", "5", "--cfg_scale", scale]
    assert evaluate.main([*command, "--output", str(tmp_path)]) == 0
    assert batches == [5 * rows_per_image] * 100


def test_values_do_not_depend_on_the_batch_size(run_dir, tiny_networks, tmp_path):
    found = []
    for size in ("3", "16"):
        path = tmp_path / f"{size}.json"
        command = ["--checkpoint", str(run_dir), "--n", "16", "--metrics", "fid,is,lpips",
                   "--output", str(path), "--steps", "2", "--device", "cpu"]  # fmt: skip
        assert evaluate.main([*command, "--batch_size", size, *tiny_networks]) == 0
        report = read(path)
        found.append([report["FID"], report["IS_mean"], report["LPIPS_diversity"]])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_without_any_weights_there_is_a_report_and_nothing_is_sampled(
    run_dir, tmp_path, monkeypatch, capsys
):
    def refuse(*_, **__):
        yield pytest.fail("images were sampled")

    monkeypatch.setattr(evaluated, "generate", refuse)
    command = ["--ckpt", str(run_dir), "--n", "4", "--metrics", "fid,is,lpips"]
    assert evaluate.main([*command, "--output", str(tmp_path), *FAST, *ABSENT]) == 0
    report = read(tmp_path / "report.json")
    assert [report[key] for key in list(report)[:4]] == [None] * 4
    assert {found["status"] for found in report["metrics"].values()} == {"skipped"}
    assert "--inception_weights PATH" in report["metrics"]["fid"]["reason"]
    assert "alexnet-owt" in capsys.readouterr().out


def test_dry_run_plans_and_writes_nothing(run_dir, tmp_path, capsys):
    path = tmp_path / "report.json"
    command = ["--checkpoint", str(run_dir), "--output", str(path), "--dry_run", *FAST, *ABSENT]
    assert evaluate.main(command) == 0
    assert not path.exists()
    printed = capsys.readouterr().out
    assert "fid: skipped" in printed
    assert "class_acc: nothing to download" in printed


def test_missing_data_leaves_what_needs_none(run_dir, tiny_networks, tmp_path, monkeypatch):
    def absent(*_):
        raise DataError("no data here")

    monkeypatch.setattr(real, "build_dataset", absent)
    path = tmp_path / "report.json"
    command = ["--checkpoint", str(run_dir), "--n", "4", "--output", str(path), *FAST]
    assert evaluate.main([*command, *tiny_networks]) == 0
    report = read(path)
    assert report["IS_mean"] is not None
    assert report["metrics"]["lpips"]["real_value"] is None
    assert report["metrics"]["class_acc"]["reason"] == "no real images: no data here"
    assert report["status"] == "partial"


def test_a_metric_that_raises_is_recorded(run_dir, tiny_networks, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Lpips, "update", broken)
    path = tmp_path / "report.json"
    command = ["--checkpoint", str(run_dir), "--n", "4", "--metrics", "is,lpips"]
    assert evaluate.main([*command, "--output", str(path), *FAST, *tiny_networks]) == 0
    found = read(path)["metrics"]
    assert found["lpips"]["status"] == "failed"
    assert found["lpips"]["reason"] == "RuntimeError: out of luck"
    assert found["is"]["value"] is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics", "fid,clas_acc"], "did you mean 'class_acc'"),
        (["eval_metrics=fidd"], "did you mean 'fid'"),
        (["--num_inference_steps", "1001"], "num_inference_steps"),
    ],
)
def test_wrong_arguments_are_refused_at_once(run_dir, arguments, message, capsys):
    command = ["--checkpoint", str(run_dir), *FAST, *ABSENT, "--dry_run", *arguments]
    assert exit_code_of(lambda: evaluate.main(command)) == ConfigError.exit_code
    assert message in capsys.readouterr().err


def test_unknown_metric_is_found_before_the_checkpoint_is_read():
    with pytest.raises(ConfigError, match="not a metric"):
        evaluate.main(["--checkpoint", "/absent", "--metrics", "fdi"])


def test_print_config_prints_the_stored_one_with_overrides(run_dir, capsys):
    command = ["--checkpoint", str(run_dir), "--print_config", "--device", "cpu", "seed=7"]
    assert evaluate.main(command) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 7


DOUBLER = Network(
    name="doubler",
    title="Doubler",
    load=lambda path, device: lambda images: 2 * images.double(),
    url="https://example.org/doubler.pth",
    help="for twice",
)


class Twice(Metric, Collector):
    """A metric with a network, a note and a picture."""

    better = "higher"
    network = DOUBLER

    def __init__(self, context):
        self.double = context.networks[DOUBLER]

    def reset(self):
        self.total = torch.zeros(2, dtype=torch.float64)

    def update(self, images, indices):
        self.image = images[0]
        self.total += torch.tensor([self.double(images).sum().item(), images.numel()])

    def reduce(self, runtime):
        runtime.all_reduce(self.total)

    def compute(self):
        return measured((self.total[0] / self.total[1]).item())

    def pictures(self):
        return {"twice": Picture(to_array(self.image), "An image that was doubled")}

    @classmethod
    def note(cls, result):
        return "twice the mean"


def test_a_metric_is_its_class_and_a_line_of_the_table(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(METRICS, "twice", Twice)
    weights = tmp_path / "doubler.pth"
    torch.save({}, weights)
    command = ["--checkpoint", str(run_dir), "--n", "5", "--metrics", "twice", *FAST]
    command += ["--output", str(tmp_path), "--save_images_dir", str(tmp_path / "png")]
    assert evaluate.main([*command, "--doubler_weights", "/absent"]) == 0
    reason = read(tmp_path / "report.json")["metrics"]["twice"]["reason"]
    assert reason.startswith("Doubler weights: --doubler_weights /absent: no such file")
    assert evaluate.main([*command, "--doubler_weights", str(weights)]) == 0
    images = [np.asarray(Image.open(path)) for path in (tmp_path / "png").glob("*.png")]
    value = read(tmp_path / "report.json")["metrics"]["twice"]["value"]
    assert value == pytest.approx(2 * np.mean(images))
    assert "twice the mean" in capsys.readouterr().out
    assert "An image that was doubled" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.ci
def test_any_number_of_processes_and_a_kill_in_between_give_the_same(run_dir, tmp_path):
    """Every metric, 22 images: uneven shares on 3 processes; 2 are killed, 3 go on."""
    weights = tmp_path / "weights.pth"
    torch.save({}, weights)

    def start(name: str, processes: int) -> subprocess.Popen:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else []), "tests/tiny_networks.py"]
        command += ["--checkpoint", str(run_dir), "--num_samples", "22", "--metrics", "all"]
        command += ["--num_inference_steps", "40", "--device", "cpu", "--batch_size", "2"]
        command += ["--inception_weights", str(weights), "--lpips_weights", str(weights)]
        return subprocess.Popen(
            [*command, "--output", str(tmp_path / name), "--num_real", "301"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    stopped = start("resumed", 2)
    deadline = time.monotonic() + 200
    while len(list((tmp_path / "resumed").glob("samples_*/images_*.npy"))) < 3:
        assert time.monotonic() < deadline
        assert stopped.poll() is None, stopped.communicate()[0]
        time.sleep(0.01)
    os.killpg(stopped.pid, signal.SIGKILL)
    stopped.communicate()
    assert not (tmp_path / "resumed/report.json").exists()

    found = {}
    for name, processes in (("one", 1), ("two", 2), ("three", 3), ("resumed", 3)):
        process = start(name, processes)
        output = process.communicate(timeout=250)[0]
        assert process.returncode == 0, output
        found[name] = read(tmp_path / name / "report.json")
        assert found[name]["provenance"]["world_size"] == processes
        assert ("are there already" in output) == (name == "resumed"), output
    left_out = {n for n in METRICS if METRICS[n].paired or METRICS[n].network in (DINOV2, EFFNET)}
    values = {
        name: {m: r["value"] for m, r in report["metrics"].items() if m not in left_out}
        for name, report in found.items()
    }
    assert set(values["one"]) == set(METRICS) - left_out
    assert None not in values["one"].values()
    for name in ("two", "three", "resumed"):
        for metric, value in values["one"].items():
            assert values[name][metric] == pytest.approx(value, rel=1e-4), (name, metric)
