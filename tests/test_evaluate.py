"""evaluate.py from the command line, on a digits model trained for three steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import evaluate
import train
from metrics import plan, scoring
from metrics.inception import Extractor
from utils.errors import ConfigError, exit_code_of

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

    def extract(images):
        assert images.shape[1] == 3
        features = images.float().mean((2, 3)) / 255
        return features, features * torch.tensor([1.0, 2.0, 3.0])

    monkeypatch.setattr(plan, "load_inception", lambda *_: Extractor(extract, 3, 3))
    monkeypatch.setattr(
        plan, "load_lpips", lambda *_: lambda a, b: (a - b).square().mean((1, 2, 3))
    )
    path = tmp_path / "weights.pth"
    torch.save({}, path)
    return ["--inception_weights", str(path), "--lpips_weights", str(path)]


@pytest.fixture
def quick_classifier(monkeypatch):
    """Five steps of training: for tests of the plumbing, not of the classifier."""
    monkeypatch.setattr(
        plan, "ClassScorer", lambda *args, **kw: plan_class_scorer(*args, **kw, num_steps=5)
    )


plan_class_scorer = plan.ClassScorer


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
    made = report["provenance"]
    assert made["n"] == 23
    assert made["step"] == 3
    assert made["sampler"] == "ddim"
    assert made["steps"] == 2
    assert made["label_mode"] == "balanced"
    assert len(made["sha256"]) == 64
    assert made["dataset"]["name"] == "digits"
    pictures = sorted((tmp_path / "png").iterdir())
    assert [p.name for p in pictures] == [f"{i:06d}.png" for i in range(23)]
    assert Image.open(pictures[0]).size == (8, 8)
    printed = capsys.readouterr().out
    assert "fid_23" in printed
    assert "real" in printed
    assert list((run_dir / "eval").glob("classifier_*.pth"))


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

    monkeypatch.setattr(evaluate, "generate", refuse)
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
        raise evaluate.DataError("no data here")

    monkeypatch.setattr(evaluate.datasets, "build_dataset", absent)
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

    monkeypatch.setattr(plan.LpipsScorer, "see_generated", broken)
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
        (["--num_samples", "0"], "at least 1"),
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


@pytest.mark.slow
@pytest.mark.ci
def test_under_torchrun_two_processes_give_one_report(run_dir, tmp_path):
    """Three images over two processes; the accuracy equals that of a single process."""
    reports = []
    for launcher in (
        [sys.executable],
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    ):
        path = tmp_path / f"{len(reports)}.json"
        command = [*launcher, "evaluate.py", "--checkpoint", str(run_dir), *FAST, *ABSENT]
        # Not `--n`: torchrun takes it for an ambiguous option of its own.
        command += ["--num_samples", "3", "--output", str(path)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        reports.append(read(path))
    single, double = (report["metrics"]["class_acc"] for report in reports)
    assert single["confusion"] == double["confusion"]
    assert reports[1]["provenance"]["world_size"] == 2


def test_scoring_never_imports_its_siblings():
    """The metrics know nothing of data sets, models or samplers."""
    for path in Path(scoring.__file__).parent.glob("*.py"):
        for name in ("datasets", "diffusion", "models", "sample"):
            text = path.read_text()
            assert f"import {name}" not in text, path
            assert f"from {name}" not in text, path
