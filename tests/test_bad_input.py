"""Bad input through the real commands: one line that names it, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import models
import sample
import train
from utils.checkpoint import BEST, CURRENT, FORMAT_VERSION, save_checkpoint
from utils.config import Config
from utils.errors import EXIT_FAILURE, EXIT_OK, EXIT_USAGE, exit_code_of
from utils.images import ImageSpec

ROOT = Path(__file__).resolve().parent.parent
PARAMS = "model_params=dict(model_channels=8, channel_mult=(1, 2), num_res_blocks=1)"


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def command(tmp_path, capsys) -> Callable[..., tuple[int, str]]:
    """Runs a script's main; (exit code, stderr). Whatever fails leaves no file behind."""

    def run(main: Callable[[list[str]], int], *arguments: object) -> tuple[int, str]:
        before = set(tmp_path.rglob("*"))
        capsys.readouterr()
        started = time.monotonic()
        try:
            code = exit_code_of(lambda: main([str(a) for a in arguments]))
        except SystemExit as error:  # argparse
            code = error.code
        text = capsys.readouterr().err
        if code != EXIT_OK:
            assert set(tmp_path.rglob("*")) == before, "something was written"
            assert "Traceback" not in text
            assert time.monotonic() - started < 10
        return code, text

    return run


def write_config(folder: Path, body: str) -> Path:
    path = folder / "run.py"
    path.write_text(f"config = dict({PARAMS}, {body})", encoding="utf-8")
    return path


def train_fault(command, folder: Path, body: str, *overrides: str) -> list[str]:
    """The lines of the error that training with this config stops with."""
    code, text = command(train.main, "--config", write_config(folder, body), *overrides)
    assert code == EXIT_USAGE, text
    assert text.startswith("error: ")
    return [line.strip() for line in text.removeprefix("error: ").splitlines()]


# --- configs

BAD_CONFIGS = {
    "lr=1e-3": "'lr' is not a config key; did you mean 'learning_rate'?",
    "dataset='digts'": "dataset='digts': use digits",
    "model_type='unt'": "model_type='unt': use ",
    "batch_size=0": "batch_size=0: input should be greater",
    "batch_size='abc'": "batch_size='abc': a number is needed",
    "learning_rate=float('nan')": "learning_rate=nan: a finite number",
    "image_size=7": "image_size (7, 7) cannot be halved",
    "conditional=True, num_classes=102": "num_classes=102, but digits has 10 classes",
    "gradient_accumulation_steps=3": "batch_size=128 cannot be shared evenly",
    "gpu_ids=(0, 1, 2, 3)": "names 4 GPU(s), but this node runs 1 process(es)",
    "beta_start=0.5, beta_end=0.1": "beta_start=0.5 must be below beta_end=0.1",
    "sampling_method='dpm'": "sampling_method='dpm': use ddpm, ddim, heun, dpmpp_2m",
    "experiment_name='../x'": "experiment_name='../x': must be usable as a folder name",
    "precision='fp16'": "precision='fp16' needs a GPU",
}


@pytest.mark.parametrize("body", BAD_CONFIGS)
def test_bad_configs(command, tmp_path, body):
    if "fp16" in body and torch.cuda.is_available():
        pytest.skip("here is a GPU")
    lines = train_fault(command, tmp_path, body)
    assert len(lines) == 1
    assert BAD_CONFIGS[body] in lines[0]


def test_many_faults_are_many_lines(command, tmp_path):
    body = "lr=1, epochs=0, dataset='no', use_ema='x'"
    lines = train_fault(command, tmp_path, body, "seed=-1", "nonsense")
    assert len(lines) == 6
    for key in ("lr", "epochs", "dataset", "use_ema", "seed", "nonsense"):
        assert sum(key in line.partition(": ")[2] for line in lines) == 1


def test_bad_command_lines(command, tmp_path):
    config = write_config(tmp_path, "")
    assert command(train.main)[0] == EXIT_USAGE
    code, text = command(train.main, "--config", config, "--gpus", "4")
    assert code == EXIT_USAGE
    assert "--gpus" in text
    code, text = command(train.main, "--config", "configs/none.py")
    assert (code, "no such config file" in text) == (EXIT_USAGE, True)
    code, text = command(train.main, "--config", config, "--device", "tpu")
    assert (code, "use cpu, cuda" in text) == (EXIT_USAGE, True)
    for script in (train, sample, evaluate):
        assert command(script.main, "--help")[0] == 0


def test_print_config_and_dry_run_write_nothing(command, tmp_path, capsys):
    config = write_config(tmp_path, "image_size=8, epochs=1")
    for flag in ("--print_config", "--dry-run"):
        before = set(tmp_path.rglob("*"))
        assert command(train.main, "--config", config, flag)[0] == EXIT_OK
        assert set(tmp_path.rglob("*")) == before


def test_bad_resume_paths(command, tmp_path):
    config = write_config(tmp_path, "image_size=8")
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    for path in ("gone.pth", "broken.pth"):
        code, text = command(train.main, "--config", config, f"resume_path={path}")
        assert (code, path in text, text.count("\n")) == (EXIT_FAILURE, True, 1)
    (tmp_path / "checkpoints" / "run").mkdir(parents=True)
    (tmp_path / "checkpoints" / "run" / CURRENT).write_bytes(b"not a checkpoint")
    code, text = command(train.main, "--config", config)
    assert (code, "already holds a run" in text) == (EXIT_USAGE, True)
    code, text = command(train.main, "--config", config, "resume_path=auto")
    assert (code, "no readable checkpoint" in text) == (EXIT_FAILURE, True)


def test_a_checkpoint_for_sampling_alone_cannot_be_continued(command, tmp_path):
    make_checkpoint(tmp_path / "old")
    body = "image_size=8, num_timesteps=20"
    config = write_config(tmp_path, body)
    code, text = command(train.main, "--config", config, "resume_path=old")
    assert code == EXIT_FAILURE
    assert "cannot be continued: optimizer_state_dict is missing" in text
    code, text = command(train.main, "--config", config, "resume_path=old", "seed=1", "use_ema=no")
    assert code == EXIT_USAGE


# --- folders of images


def image(path: Path, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def flat(folder: Path, labels: object = None) -> None:
    for name in ("a.png", "b.png"):
        image(folder / name)
    if labels is not None:
        text = labels if isinstance(labels, str) else json.dumps(labels)
        (folder / "labels.json").write_text(text, encoding="utf-8")


def classes(folder: Path) -> None:
    image(folder / "cat" / "a.png")
    image(folder / "dog" / "b.png")


def no_images(folder: Path) -> None:
    (folder / "cat").mkdir(parents=True)
    (folder / "cat" / "note.txt").touch()


def truncated(folder: Path) -> None:
    classes(folder)
    path = folder / "dog" / "b.png"
    path.write_bytes(path.read_bytes()[:20])


def text_as_image(folder: Path) -> None:
    classes(folder)
    (folder / "dog" / "c.jpg").write_text("hello", encoding="utf-8")


def two_sizes(folder: Path) -> None:
    classes(folder)
    image(folder / "dog" / "c.png", (8, 10))


LABELLED = "use_subdirs=False, label_file='labels.json', conditional=True"
BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str, list[str]]] = {
    "missing": (lambda folder: None, "image_size=8", ["data_root=", "no such folder"]),
    "a file": (lambda folder: folder.write_text("x"), "image_size=8", ["is a file, not a folder"]),
    "empty": (lambda folder: folder.mkdir(), "image_size=8", ["a folder per class", "no images"]),
    "no images": (no_images, "image_size=8", ["cat: a class folder with no images", "1 .txt"]),
    "flat": (flat, "image_size=8", ["use_subdirs=True needs a folder per class", "a.png"]),
    "not flat": (classes, "image_size=8, use_subdirs=False", ["set use_subdirs=True"]),
    "classes": (classes, "image_size=8, num_classes=3", ["num_classes=3", "2 class folders"]),
    "truncated": (truncated, "image_size=8", ["b.png"]),
    "text": (text_as_image, "image_size=8", ["c.jpg"]),
    "two sizes": (two_sizes, "image_channels=3", ["c.png", "8 x 10", "set image_size"]),
    "no label file": (flat, f"{LABELLED}, image_size=8", ["labels.json", "no such label_file"]),
    "broken labels": (
        lambda folder: flat(folder, "{"),
        f"{LABELLED}, image_size=8",
        ["labels.json", "not readable as JSON"],
    ),
    "label too large": (
        lambda folder: flat(folder, {"a.png": 0, "b.png": 2}),
        f"{LABELLED}, image_size=8, num_classes=2",
        ['"b.png": 2', "num_classes=2"],
    ),
    "label negative": (
        lambda folder: flat(folder, {"a.png": 0, "b.png": -1}),
        f"{LABELLED}, image_size=8",
        ['"b.png": -1', "whole number from 0"],
    ),
    "label of nothing": (
        lambda folder: flat(folder, {"a.png": 0, "b.png": 1, "gone.png": 1}),
        f"{LABELLED}, image_size=8",
        ["gone.png", "no such file"],
    ),
    "label outside": (
        lambda folder: flat(folder, {"a.png": 0, "b.png": 1, "../run.py": 1}),
        f"{LABELLED}, image_size=8",
        ["../run.py", "without '..'"],
    ),
    "wrong model": (
        classes,
        "model_params=dict(model_channels=8, in_channels=7)",
        ["model_params.in_channels=7 contradicts the data"],
    ),
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_bad_folders(command, tmp_path, kind):
    make, body, parts = BAD_FOLDERS[kind]
    make(tmp_path / "images")
    if body.startswith("model_params"):
        body = f"**dict({body})"
        path = tmp_path / "run.py"
        path.write_text(
            f"config = {{**dict(dataset='custom', data_root='images'), {body}}}", encoding="utf-8"
        )
        code, text = command(train.main, "--config", path)
        assert code == EXIT_USAGE
        lines = text.splitlines()
    else:
        lines = train_fault(command, tmp_path, f"dataset='custom', data_root='images', {body}")
    assert len(lines) == 1 or lines[1].startswith("how to fix: ")
    for part in parts:
        assert part in lines[0]


# --- sampling and evaluation


def make_checkpoint(folder: Path, **values: object) -> Path:
    """A run directory as training leaves it, of an untrained network."""
    params = {"model_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1}
    config = Config(
        **{
            "experiment_name": "run",
            "image_size": 8,
            "model_params": params,
            "num_timesteps": 20,
            "num_inference_steps": 2,
            **values,
        }
    )
    spec = ImageSpec(1, 8, 8, 10)
    state = {
        "format_version": FORMAT_VERSION,
        "model_state_dict": models.build_model(config, spec).state_dict(),
        "epoch": 1,
        "step": 10,
        "config": config.to_dict(),
        "spec": list(spec),
    }
    folder.mkdir()
    save_checkpoint(folder / CURRENT, state)
    return folder


BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "no such checkpoint or run directory"),
    "empty folder": (lambda path: path.mkdir(), "has neither best_model.pth nor current_model.pth"),
    "text": (lambda path: path.write_text("hello"), "cannot be read as a checkpoint"),
    "weights": (lambda path: torch.save({"w": torch.ones(2)}, path), "not a checkpoint of this"),
}


@pytest.mark.parametrize("script", [sample, evaluate], ids=["sample", "evaluate"])
@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_bad_checkpoints(command, tmp_path, script, kind):
    make, message = BAD_CHECKPOINTS[kind]
    make(tmp_path / "run")
    code, text = command(script.main, "--checkpoint", tmp_path / "run")
    assert code == EXIT_FAILURE
    assert text.startswith("error: ")
    assert str(tmp_path / "run") in text
    assert message in text
    assert text.count("\n") == 1


@pytest.mark.parametrize("script", [sample, evaluate], ids=["sample", "evaluate"])
def test_a_damaged_best_model_is_not_swapped_for_another(command, tmp_path, script):
    run = make_checkpoint(tmp_path / "run")
    content = bytearray((run / CURRENT).read_bytes())
    content[len(content) // 2] ^= 4
    (run / BEST).write_bytes(content)
    code, text = command(script.main, "--checkpoint", run)
    assert (code, BEST in text) == (EXIT_FAILURE, True)


UNCONDITIONAL = {
    "--labels 1": "--labels: this model was trained without class labels",
    "--cfg_scale 2": "cfg_scale=2 needs training with conditional=True",
    "--cfg_scale 0": "cfg_scale=0 needs training with conditional=True",
    "--use_ema": "holds no EMA weights",
    "--num_inference_steps 21": "num_inference_steps=21: must lie in 1..20",
    "--sampling_method euler": "sampling_method='euler': use ddpm, ddim, heun, dpmpp_2m",
    "--num_samples -1": "at least 1",
    "--seed -5": "at least 0",
    "--seeds 0-3 --num_samples 2": "one non-negative seed per image",
    "--batch_size 0": "at least 1",
    "model_params.model_channels=16": "belong to the weights",
    "no_such_key=1": "'no_such_key' is not a config key",
    "--config gone.py": "gone.py: no such config file",
}
CONDITIONAL = {
    "--labels 10": "--labels [10]: classes are 0..9",
    "--labels 0,99,-3": "whole numbers",
    "--labels 5-3": "whole numbers",
    "--labels cat": "whole numbers",
}


def test_sample_refuses_what_the_model_cannot_do(command, tmp_path):
    run = make_checkpoint(tmp_path / "run")
    conditional = make_checkpoint(tmp_path / "cond", conditional=True, cfg_dropout_prob=0.0)
    cases = [(run, *case) for case in UNCONDITIONAL.items()]
    cases += [(conditional, *case) for case in CONDITIONAL.items()]
    cases += [(conditional, "--cfg_scale 3", "needs training with cfg_dropout_prob above 0")]
    for folder, options, message in cases:
        code, text = command(sample.main, "--checkpoint", folder, *options.split())
        assert code in (EXIT_USAGE, EXIT_FAILURE), options
        assert message in text, options
    code, _ = command(sample.main, "--checkpoint", run, "--num_samples", 2, "--output_dir", "out")
    assert code == EXIT_OK
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["samples.png"]


def test_evaluate_refuses_what_it_cannot_do(command, tmp_path):
    run = make_checkpoint(tmp_path / "run")
    cases = {
        "--metrics fdi": "'fdi' is not a metric; did you mean 'fid'?",
        "--metrics=": "not a metric",
        "--num_samples 0": "must be at least 1",
        "--cfg_scale 2": "cfg_scale=2 needs training with conditional=True",
        "--use_ema": "holds no EMA weights",
        "lr=1": "'lr' is not a config key",
    }
    for options, message in cases.items():
        code, text = command(evaluate.main, "--checkpoint", run, *options.split())
        assert code in (EXIT_USAGE, EXIT_FAILURE), options
        assert message in text, options


# --- as users start it


def test_a_real_process_ends_with_a_line_and_the_exit_code(tmp_path):
    config = write_config(tmp_path, "lr=1, dataset='custom', data_root='nowhere'")
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--config", str(config)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == EXIT_USAGE
    assert done.stdout == ""
    message = "'lr' is not a config key; did you mean 'learning_rate'?"
    assert done.stderr == f"error: {config}:1: {message}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["run.py"]
