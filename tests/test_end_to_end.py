"""The main job through the real command lines: every config starts; train -> sample -> evaluate."""

import json

import pytest
from PIL import Image

import train
from models import BACKBONES
from tests.conftest import ROOT
from tests.image_files import write_image
from tests.test_datasets import write_celeba, write_cifar, write_mnist
from utils.errors import EXIT_OK

MNIST_CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("mnist_*.py"))


def dry_run(config, *overrides):
    arguments = ["--config", str(ROOT / "configs" / config), "--dry_run", "--device", "cpu"]
    return train.main([*arguments, "batch_size=2", *map(str, overrides)])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_digits_configs_start(backbone, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert dry_run(f"digits_{backbone}.py") == EXIT_OK
    assert "dry run" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("config", [*MNIST_CONFIGS, "fashionmnist_unet.py"])
def test_mnist_configs_start(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "FashionMNIST" if config.startswith("fashion") else "MNIST"
    write_mnist(tmp_path / "data", name)
    assert dry_run(config) == EXIT_OK


def test_custom_config_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (40, 30), colour).save(folder / "1.png")
    options = ["data_root=pictures", "image_size=16,32", "model_params.attention_resolutions=(4,)"]
    assert dry_run("custom_folder.py", *options) == EXIT_OK


def test_jit_configs_of_colour_images_start(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path / "data", monkeypatch, 10)
    write_celeba(tmp_path / "data")
    for split in ("train", "val"):
        for name in ("n01440764", "n01443537"):
            write_image(tmp_path / "data" / "imagenet" / split / name / "1.JPEG", (40, 30))
    small = ["size=none", "hidden_size=64", "depth=2", "num_heads=2", "bottleneck=8"]
    assert dry_run("cifar10_jit.py") == EXIT_OK
    assert dry_run("celeba64_jit.py") == EXIT_OK
    assert dry_run("imagenet256_jit.py", *(f"model_params.{pair}" for pair in small)) == EXIT_OK
    printed = capsys.readouterr().out
    assert "2 images 3x256x256, 2 classes (n01440764, n01443537)" in printed
    assert printed.count("dry run: one batch has loss") == 3


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("backbone", ["dit", "jit", "dim"])
def test_other_backbones_through_two_processes(backbone, script, tmp_path):
    """Trained by two processes, sampled by one."""
    options = ["image_size=8", "model_params.hidden_size=32", "model_params.depth=3"]
    options += ["max_steps=3", "num_samples=20", "num_inference_steps=2", "experiment_name=run"]
    config = ROOT / f"configs/digits_{backbone}.py"
    trained = script("train.py", "--config", config, *options, processes=2)
    assert trained.returncode == EXIT_OK, trained.output
    sampled = script("sample.py", "--checkpoint", "checkpoints/run", "--num_samples", "4")
    assert sampled.returncode == EXIT_OK, sampled.output
    assert (tmp_path / "samples" / "samples.png").is_file()


def test_train_sample_evaluate(script, tmp_path):
    """Each command as printed by the one before it; a checkpoint needs no config file."""
    trained = script(
        "train.py",
        "--config",
        ROOT / "configs/digits_unet.py",
        "experiment_name=run",
        "image_size=8",
        "model_params.model_channels=16",
        "num_samples=20",
        "num_inference_steps=3",
        "max_steps=30",
        "use_swanlab=true",
        "swanlab_mode=offline",
    )
    assert trained.returncode == EXIT_OK, trained.output
    run = tmp_path / "checkpoints" / "run"
    assert "python sample.py --checkpoint checkpoints/run" in trained.output
    assert (run / "samples" / "epoch_0001.png").is_file()
    assert list((run / "swanlog").glob("run-*"))

    sampled = script("sample.py", "--checkpoint", "checkpoints/run", "--create_gif")
    assert sampled.returncode == EXIT_OK, sampled.output
    assert Image.open(tmp_path / "samples" / "samples.png").size[0] > 0
    assert Image.open(tmp_path / "samples" / "samples.gif").n_frames == 3

    evaluated = script(
        "evaluate.py",
        *("--checkpoint", "checkpoints/run", "--num_samples", "20", "--steps", "2"),
        *("--metrics", "class_acc", "--save_images_dir", "drawn"),
    )
    assert evaluated.returncode == EXIT_OK, evaluated.output
    report = json.loads((run / "eval" / "report.json").read_text(encoding="utf-8"))
    assert list(report)[:4] == ["FID", "IS_mean", "IS_std", "LPIPS_diversity"]
    assert report["metrics"]["class_acc"]["real_ceiling"] > 0.9
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 20


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(900)
def test_the_requested_digit_appears(script, tmp_path):
    """A minute of training at 8x8 is enough for the right digit in most samples."""
    options = ["experiment_name=run", "image_size=8", "epochs=25", "sample_interval=100"]
    trained = script("train.py", "--config", ROOT / "configs/digits_unet.py", *options)
    assert trained.returncode == EXIT_OK, trained.output
    evaluated = script("evaluate.py", "--checkpoint", "checkpoints/run", "--num_samples", 200)
    assert evaluated.returncode == EXIT_OK, evaluated.output
    report = json.loads((tmp_path / "checkpoints/run/eval/report.json").read_text())
    assert report["class_accuracy"] > 0.9
