"""sample.py: images are a function of seed and label; every output file is what it says."""

import json
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import models
import sample
import train
from diffusion import build_process
from generation.run import Run, load_run
from generation.sampling import generate, sampling_from
from utils.config import Config
from utils.distributed import Runtime
from utils.errors import EXIT_OK, ConfigError, UserError
from utils.images import ImageSpec

CPU = torch.device("cpu")


@pytest.fixture
def trained(tiny):
    """The run directory of a few steps of training (weights off their zero start)."""
    options = ["max_steps=8", "learning_rate=5e-3", "experiment_name=run"]
    assert train.main(["--config", str(tiny), *options]) == EXIT_OK
    return Path("checkpoints/run")


def draw(checkpoint, *arguments):
    """Run sample.py; returns images (N, H, W, C) and labels of its NPZ."""
    for old in Path("out").glob("*.npz") if Path("out").is_dir() else []:
        old.unlink()
    command = ["--checkpoint", checkpoint, "--output_dir", "out", "--npz", "--device", "cpu"]
    assert sample.main([*map(str, command), *map(str, arguments)]) == EXIT_OK
    (path,) = Path("out").glob("*.npz")
    with np.load(path) as data:
        return data["arr_0"], data.get("arr_1")


def assert_same_images(a, b):
    """Equal but for rounding: one grey level of 256, because convolutions depend on the batch."""
    assert a.shape == b.shape
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_images_do_not_depend_on_batch_size_or_processes(trained, script):
    options = ["--num_samples", "11", "--sampling_method", "ddpm", "--steps", "10"]
    whole, labels = draw(trained, *options, "--batch_size", "64")
    parts, _ = draw(trained, *options, "--batch_size", "3")
    assert_same_images(whole, parts)
    result = script(
        "sample.py", "--checkpoint", trained, *options, "--npz", "--output_dir", "two", processes=2
    )
    assert result.returncode == EXIT_OK, result.output
    with np.load("two/samples_11x8x8x1.npz") as data:
        assert_same_images(whole, data["arr_0"])
        assert (labels == data["arr_1"]).all()


def test_an_image_is_a_function_of_its_seed_and_label(trained):
    images, _ = draw(trained, "--seeds", "3,5,9", "--labels", "1")
    alone, _ = draw(trained, "--seeds", "5", "--labels", "1")
    counted, _ = draw(trained, "--seed", "3", "--num_samples", "3", "--labels", "1")
    assert_same_images(images[1:2], alone)
    assert_same_images(images[:1], counted[:1])
    other, _ = draw(trained, "--seeds", "5", "--labels", "2")
    assert np.abs(other.astype(int) - alone).max() > 1
    assert np.abs(images[0].astype(int) - images[2]).max() > 10


def test_a_model_that_guides_itself_is_not_guided(trained, capsys):
    """w out_y + (1 - w) out_y: whatever the scale, images as without guidance."""
    plain, _ = draw(trained, "--cfg_scale", 1)
    capsys.readouterr()
    guided, _ = draw(trained, "--cfg_scale", 3, "--guide", trained)
    assert_same_images(plain, guided)
    told = capsys.readouterr().out
    assert "guided by" in told
    assert "autoguided, cfg_scale 3" in told


def test_guides_that_do_not_fit_are_refused(trained, tiny, capsys):
    options = ["max_steps=1", "experiment_name=other", "prediction_type=v", "process=flow"]
    assert train.main(["--config", str(tiny), *options]) == EXIT_OK
    command = ["--checkpoint", str(trained), "--device", "cpu", "--output_dir", "out"]
    with pytest.raises(ConfigError, match="prediction_type: v in the checkpoint, eps") as error:
        sample.main([*command, "--guide", "checkpoints/other"])
    assert "--guide checkpoints/other/best_model.pth: " in str(error.value).splitlines()[0]
    with pytest.raises(ConfigError, match="--guide: has no effect with cfg_scale=1"):
        sample.main([*command, "--guide", str(trained), "cfg_scale=1"])
    assert not Path("out").exists()


def test_labels_come_in_rows(trained):
    assert draw(trained, "--num_samples", 6, "--labels", "7,0")[1].tolist() == [7, 7, 7, 0, 0, 0]
    assert draw(trained)[1].tolist() == [i // 2 for i in range(20)]
    assert draw(trained, "--num_samples", 3)[1].tolist() == [0, 1, 2]
    assert draw(trained, "--num_samples", 4, "--labels", "0-9")[1].tolist() == [0, 1, 2, 3]


def test_every_output_is_written(trained):
    images, _ = draw(
        trained,
        *("--num_samples", 20, "--create_gif", "--gif_fps", 10, "--gif_final_seconds", 3),
        *("--save_intermediate", "--save_images", "--output_name", "digits", "--steps", 7),
    )
    out = Path("out")
    assert sorted(p.name for p in out.iterdir()) == [
        "digits.gif",
        "digits.png",
        "digits_20x8x8x1.npz",
        "digits_steps",
        "images",
    ]
    grid = iio.imread(out / "digits.png")
    scale, padding = 6, 2  # 8 pixels are enlarged to 48
    assert grid.shape == (10 * (8 * scale + padding) + padding, 2 * (8 * scale + padding) + padding)
    frames = iio.imread(out / "digits.gif", index=None)
    assert len(frames) == 7
    durations = [iio.immeta(out / "digits.gif", index=i)["duration"] for i in range(7)]
    assert durations == [100] * 6 + [3000]
    assert len(list((out / "digits_steps").iterdir())) == 7
    named = json.loads((out / "images/labels.json").read_text())
    assert list(named.items())[:3] == [("000000.png", 0), ("000001.png", 0), ("000002.png", 1)]
    assert sorted(named) == sorted(path.name for path in (out / "images").glob("*.png"))
    last_step = iio.imread(sorted((out / "digits_steps").iterdir())[-1])
    assert (last_step == grid).all()
    files = sorted((out / "images").glob("*.png"))
    assert [p.name for p in files] == [f"{i:06d}.png" for i in range(20)]
    assert (np.stack([iio.imread(p) for p in files]) == images[..., 0]).all()


def test_pictures_of_a_larger_call_do_not_stay(trained):
    draw(trained, "--num_samples", 5, "--save_images")
    draw(trained, "--num_samples", 5, "--save_images")
    said = r"holds 2 pictures \(000003.png \.\.\.\) that these 3 would not replace"
    with pytest.raises(UserError, match=said):
        draw(trained, "--num_samples", 3, "--save_images")
    assert len(list(Path("out/images").glob("*.png"))) == 5


def test_averaged_weights_are_the_default(trained):
    default, _ = draw(trained, "--num_samples", 4)
    averaged, _ = draw(trained, "--num_samples", 4, "--use_ema")
    raw, _ = draw(trained, "--num_samples", 4, "--no-ema")
    assert (default == averaged).all()
    assert (default != raw).any()


def test_scale_zero_ignores_the_label_and_null_guidance_is_linear(trained):
    zero, _ = draw(trained, "--seeds", "1", "--labels", "3", "--cfg_scale", 0)
    other, _ = draw(trained, "--seeds", "1", "--labels", "8", "--cfg_scale", 0)
    assert (zero == other).all()


def test_run_directory_means_its_best_checkpoint(trained):
    run = load_run(trained, CPU)
    assert run.checkpoint == trained / "best_model.pth"
    assert (run.step, run.ema, run.spec.shape) == (8, True, (1, 8, 8))
    assert not run.model.training


def test_compile_is_the_networks(trained, monkeypatch):
    asked = []
    monkeypatch.setattr(models, "compile_model", lambda model, how: asked.append(how))
    for option in ([], ["--compile", "blocks"]):
        draw(trained, "--num_samples", 1, *option)
    assert asked == [None, "blocks"]


def test_overrides_reach_sampling_but_not_the_shape_of_the_model(trained):
    run = load_run(trained, CPU, overrides=["num_inference_steps=5", "threshold=none"])
    assert sampling_from(run.config).num_inference_steps == 5
    assert sampling_from(run.config).threshold == "none"
    for override in ("model_params.model_channels=16", "prediction_type=v", "image_size=16"):
        with pytest.raises(ConfigError, match="belong to"):
            load_run(trained, CPU, overrides=[override])


def test_a_config_file_lies_over_the_stored_settings(trained, tmp_path):
    """... under those of the command line, and its faults are told with their line in it."""
    path = tmp_path / "other.py"
    path.write_text("config = dict(\n    num_inference_steps=5,\n    threshold='none',\n)\n")
    run = load_run(trained, CPU, config_path=str(path), overrides=["num_inference_steps=4"])
    assert (run.config.num_inference_steps, run.config.threshold) == (4, "none")
    path.write_text("config = dict(\n    num_inference_steps=0,\n)\n")
    with pytest.raises(ConfigError, match=r"other\.py:2"):
        load_run(trained, CPU, config_path=str(path))


def test_sampling_takes_the_defaults_of_its_method():
    config = Config(experiment_name="x", conditional=True, num_inference_steps=30)
    assert sampling_from(config).num_inference_steps == 30
    assert sampling_from(config, "ddpm").num_inference_steps == 1000
    assert sampling_from(config, "dpmpp_2m").num_inference_steps == 20
    assert sampling_from(config, "ddpm", 10).num_inference_steps == 10
    assert sampling_from(config).cfg_scale == 2.0
    assert "guided" in sampling_from(config, cfg_scale=3).describe()
    short = Config(experiment_name="x", num_timesteps=10)
    assert sampling_from(short).num_inference_steps == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(method="euler"), "sampling_method"),
        (dict(num_inference_steps=0), "num_inference_steps"),
        (dict(num_inference_steps=1001), "num_inference_steps"),
        (dict(cfg_scale=2.0), "needs training with conditional=True"),
        (dict(cfg_scale=-1.0), "cfg_scale"),
        (dict(cfg_scale=float("nan")), "cfg_scale"),
    ],
)
def test_impossible_sampling_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        sampling_from(Config(experiment_name="x"), **options)


class Toy(torch.nn.Module):
    """A network of one line; remembers in which precision it was asked to compute."""

    def __init__(self):
        super().__init__()
        self.modes = set()

    def forward(self, x, t, y):
        self.modes.add((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return torch.tanh(x * 0.7 + t.float()[:, None, None, None] / 20)


def toy_images(**settings):
    """Four images that the config's settings sample, as integers, and the network they are of."""
    config = Config(
        conditional=False, num_timesteps=20, num_inference_steps=10, threshold="none", **settings
    )
    run = Run(Toy(), build_process(config), ImageSpec(1, 8, 8, 0), config)
    parts = generate(
        run, range(4), None, sampling=sampling_from(config), batch_size=4, runtime=Runtime(CPU)
    )
    return torch.cat([images for images, *_ in parts]).int(), run.model


def test_the_config_s_eta_reaches_the_sampler():
    """DDIM with eta = 1 is DDPM (Song et al. 2021) with the same noise, and not with eta = 0."""
    ddpm, _ = toy_images(sampling_method="ddpm")
    stochastic, _ = toy_images(sampling_method="ddim", ddim_eta=1.0)
    deterministic, _ = toy_images(sampling_method="ddim", ddim_eta=0.0)
    assert (stochastic - ddpm).abs().max() <= 1
    assert (deterministic - ddpm).abs().max() > 10


def test_sampling_computes_in_the_config_s_precision():
    assert toy_images(precision="bf16")[1].modes == {(True, torch.bfloat16)}
    for precision in ("fp32", "auto"):
        modes = toy_images(precision=precision)[1].modes
        assert [is_autocast for is_autocast, _ in modes] == [False]


def test_too_little_memory_says_how_many_images_were_tried(monkeypatch):
    def forward(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Toy, "forward", forward)
    with pytest.raises(UserError, match=r"^out of memory on cpu .* 4 images at a time; draw fewer"):
        toy_images()


def test_empty_shares_are_fine(trained):
    run = load_run(trained, CPU)
    runtime = Runtime(CPU, rank=2, world_size=3)
    parts = generate(
        run, [1, 2], [0, 1], sampling=sampling_from(run.config), batch_size=4, runtime=runtime
    )
    assert list(parts) == []


def test_a_grid_of_some_images_has_their_classes_in_rows(trained, monkeypatch):
    """Of 40 images, four a class, the grid has room for half: two of each class, side by side."""
    monkeypatch.setattr("utils.images.MAX_GRID_IMAGES", 20)
    images, _ = draw(trained, "--num_samples", 40)
    shown = np.linspace(0, 39, 20).round().astype(int).reshape(10, 2)
    grid = iio.imread("out/samples.png")
    assert grid.shape == (10 * 50 + 2, 2 * 50 + 2)
    for row, pair in enumerate(shown):
        for column, index in enumerate(pair):
            y, x = 2 + 50 * row, 2 + 50 * column
            assert (grid[y : y + 48 : 6, x : x + 48 : 6] == images[index, ..., 0]).all()


def test_sampling_leaves_the_global_generator_alone(trained):
    run = load_run(trained, CPU)
    before = torch.get_rng_state()
    runtime = Runtime(CPU)
    options = dict(sampling=sampling_from(run.config, "ddpm", 3), batch_size=4, runtime=runtime)
    list(generate(run, [1, 2], [0, 1], **options))
    assert torch.equal(before, torch.get_rng_state())


def test_captions_stand_above_the_grid(trained):
    draw(trained, "--seeds", "0-63")
    plain = iio.imread("out/samples.png")
    _, labels = draw(trained, "--seeds", "0-63", "--captions")
    assert len(labels) == 64
    captioned = iio.imread("out/samples.png")
    line = (len(captioned) - len(plain)) // 10  # a line for each of ten rows
    assert line > 10
    rows = [captioned[r * (line + 50) + line :][:50] for r in range(10)]
    assert (np.concatenate(rows) == plain[:500]).all()
