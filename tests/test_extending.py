"""docs/extending.md, followed to the letter in a copy of the project."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models import resnet18

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n# (\S+\.py)(.*?)\n(.*?)```", PAGE, flags=re.DOTALL)
FOLDERS = ("configs", "datasets", "diffusion", "editing", "generation", "metrics", "models")
FOLDERS += ("reporting", "training", "utils")
SMALL = ("max_steps=12", "num_inference_steps=3", "num_samples=4", "batch_size=32")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The project with the parts of the page added."""
    root = tmp_path_factory.mktemp("project")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for script in ("train.py", "sample.py", "edit.py", "evaluate.py"):
        shutil.copy(ROOT / script, root)
    for name, how, code in BLOCKS:
        is_new = not how
        assert (root / name).exists() != is_new
        with open(root / name, "a", encoding="utf-8") as file:
            file.write("\n\n" * (not is_new) + code)
    return root


def run(project: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=project, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_adds_one_file_of_each_kind():
    new = [name for name, how, _ in BLOCKS if not how]
    assert {name.split("/")[0] for name in new} == {"models", "datasets", "diffusion", "metrics"}


@pytest.fixture(scope="module")
def trained(project) -> Path:
    """The same, with a run in it: the backbone learns the data set, the metric chooses the best."""
    parts = ["model_type=plain", "model_params.width=16", "dataset=stripes"]
    parts += ["process=trigonometric"]
    evaluation = ["eval_interval=1", "eval_num_samples=8", "eval_metrics=brightness,sanity"]
    evaluation += ["eval_best_metric=brightness", "sampling_method=same_noise"]
    config = ["--config", "configs/digits_unet.py", "experiment_name=own"]
    run(project, "train.py", *config, *parts, *SMALL, *evaluation)
    return project


def test_the_parts_work_together(trained):
    project = trained
    checkpoint = ["--checkpoint", "checkpoints/own"]
    assert "same_noise, 3 steps" in run(project, "sample.py", *checkpoint, "--num_samples", "4")
    run(project, "evaluate.py", *checkpoint, "--n", "8", "--metrics", "brightness", "--seed", "1")
    report = json.loads((project / "checkpoints/own/eval/report.json").read_text())
    found = report["metrics"]["brightness"]
    assert found["status"] == "ok"
    assert found["value"] == pytest.approx(abs(found["mean"] - 127.5), abs=0.1)
    status = json.loads((project / "checkpoints/own/status.json").read_text())
    assert status["best"]["metric"] == "brightness"


@pytest.mark.slow
@pytest.mark.ci
def test_a_deterministic_sampler_serves_the_commands_that_need_one(trained):
    project = trained
    command = ["--checkpoint", "checkpoints/own", "--sampling_method", "same_noise", "--steps", "3"]
    run(project, "edit.py", "interpolate", *command, "--seeds", "3,8", "--labels", "0,1")
    x_T = np.random.default_rng(0).standard_normal((2, 1, 16, 16), dtype=np.float32)
    np.savez(project / "x_T.npz", x_T=x_T, labels=[0, 1], num_inference_steps=3, cfg_scale=1.0)
    run(project, "edit.py", "decode", *command, "--latents", "x_T.npz")
    assert {"interpolate.png", "decode.png"} <= {p.name for p in (project / "samples").iterdir()}


@pytest.mark.slow
@pytest.mark.ci
def test_a_metric_may_have_a_network_a_note_and_a_picture(trained):
    project = trained
    torch.manual_seed(0)
    torch.save(resnet18().state_dict(), project / "resnet.pth")
    command = ["--checkpoint", "checkpoints/own", "--n", "8", "--steps", "3", "--device", "cpu"]
    command += ["--metrics", "variety", "--output", "variety"]
    assert "variety: skipped" in run(project, "evaluate.py", *command, "--dry_run")
    told = run(project, "evaluate.py", *command, "--resnet_weights", "resnet.pth")
    result = json.loads((project / "variety/report.json").read_text())["metrics"]["variety"]
    assert result["value"] == result["num_classes_seen"] / 8
    assert f"{result['num_classes_seen']} classes seen" in told
    assert "An image of each class" in (project / "variety/report.html").read_text()


@pytest.mark.slow
@pytest.mark.ci
def test_mistakes_in_their_parameters_are_caught_like_any_others(project):
    for wrong, words in (
        ("model_params.widht=16", "did you mean 'width'"),
        ("model_params.width=-1", "model_params.width=-1"),
        ("sampling_method=same_noize", "did you mean 'same_noise'"),
    ):
        command = ["train.py", "--config", "configs/digits_unet.py", "model_type=plain", wrong]
        done = subprocess.run(
            [sys.executable, *command], cwd=project, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert words in done.stderr
