"""docs/extending.md, followed to the letter in a copy of the project."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n# (\S+\.py)(.*?)\n(.*?)```", PAGE, flags=re.DOTALL)
FOLDERS = ("configs", "datasets", "diffusion", "generation", "metrics", "models")
FOLDERS += ("reporting", "training", "utils")
SMALL = ("max_steps=12", "num_inference_steps=3", "num_samples=4", "batch_size=32")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The project with the parts of the page added."""
    root = tmp_path_factory.mktemp("project")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for script in ("train.py", "sample.py", "evaluate.py"):
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


def test_the_parts_work_together(project):
    """The backbone learns the data set; the sampler draws; the metric chooses the best model."""
    parts = ["model_type=plain", "model_params.width=16", "dataset=stripes"]
    evaluation = ["eval_interval=1", "eval_num_samples=8", "eval_metrics=brightness,sanity"]
    evaluation += ["eval_best_metric=brightness", "sampling_method=renoise"]
    config = ["--config", "configs/digits_unet.py", "experiment_name=own"]
    run(project, "train.py", *config, *parts, *SMALL, *evaluation)
    checkpoint = ["--checkpoint", "checkpoints/own"]
    assert "renoise, 3 steps" in run(project, "sample.py", *checkpoint, "--num_samples", "4")
    run(project, "evaluate.py", *checkpoint, "--n", "8", "--metrics", "brightness", "--seed", "1")
    report = json.loads((project / "checkpoints/own/eval/report.json").read_text())
    found = report["metrics"]["brightness"]
    assert found["status"] == "ok"
    assert found["value"] == pytest.approx(abs(found["mean"] - 127.5), abs=0.1)
    status = json.loads((project / "checkpoints/own/status.json").read_text())
    assert status["best"]["metric"] == "brightness"


def test_mistakes_in_their_parameters_are_caught_like_any_others(project):
    for wrong, words in (
        ("model_params.widht=16", "did you mean 'width'"),
        ("model_params.width=-1", "model_params.width=-1"),
        ("sampling_method=renoize", "did you mean 'renoise'"),
    ):
        command = ["train.py", "--config", "configs/digits_unet.py", "model_type=plain", wrong]
        done = subprocess.run(
            [sys.executable, *command], cwd=project, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert words in done.stderr
