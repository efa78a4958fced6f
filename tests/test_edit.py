"""edit.py: its sheets and films, and its command line."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

import edit
import sample
import train
from diffusion import SAMPLERS, Sampler
from diffusion.ddim import ddim
from editing.command import Pictures
from editing.mathematics import img2img_steps, last_timesteps
from generation.run import load_run
from generation.sampling import sampling_from, timesteps_of
from tests.conftest import TINY_CONFIG
from utils import captions
from utils.captions import class_captions, contact_sheet
from utils.errors import EXIT_OK, ConfigError, UserError
from utils.images import can_write_mp4, make_grid, save_mp4

# --- words


def test_a_sheet_without_words_is_the_grid():
    images = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8)
    for rows in ([[0, 1, 2], [3, 4, 0]], [[0, 1], [2, 3]]):
        assert torch.equal(contact_sheet(images, rows), make_grid(images, rows))


@pytest.mark.parametrize("channels", [1, 3])
def test_words_stand_beside_the_images_and_never_on_them(channels):
    images = torch.randint(256, (4, channels, 8, 8), dtype=torch.uint8)
    rows = [[0, 1], [2, 3]]
    plain = make_grid(images, rows)
    titled = contact_sheet(images, rows, left=["input", "output"])
    gutter = titled.shape[2] - plain.shape[2]
    assert torch.equal(titled[:, :, gutter:], plain)
    assert titled[:, :, :gutter].max() > 128
    above = [["a name much longer than its image", "b"], []]
    captioned = contact_sheet(images, rows, above=above)
    line = captioned.shape[1] - plain.shape[1]
    assert torch.equal(captioned[:, line:], plain)
    bright = (captioned[0, :line] > 128).any(0)
    assert bright[:50].any()
    assert not bright[50:52].any()  # cut short where its own image ends
    assert bright[52:].any()


def test_names_that_no_font_has_are_numbers(monkeypatch):
    monkeypatch.setattr(captions, "wide_font", lambda: None)
    assert class_captions([1, 0, 2], ["cat", "\u732b", ""]) == ["class 1", "cat", "class 2"]
    assert class_captions([3], []) == ["class 3"]


def test_other_letters_take_the_font_that_has_them(monkeypatch):
    """Here an obvious one: three times as large."""
    monkeypatch.setattr(captions, "wide_font", lambda: ImageFont.load_default(36))
    names = ["cat", "\u732b"]
    assert class_captions([1, 0], names) == ["\u732b", "cat"]
    images = torch.zeros(1, 1, 48, 192, dtype=torch.uint8)
    ink = [
        (contact_sheet(images, [[0]], above=[[text]])[0, : captions.LINE_HEIGHT] > 128).sum()
        for text in ("iii", "iii\u00e9")
    ]
    assert ink[1] > 2 * ink[0] > 0


def test_films(tmp_path):
    if not can_write_mp4():
        pytest.skip("imageio-ffmpeg is not installed")
    frames = [torch.full((1, 33, 51), level, dtype=torch.uint8) for level in (0, 100, 200)]
    save_mp4(tmp_path / "film.mp4", frames, fps=10, final_seconds=0.3)
    film = iio.imread(tmp_path / "film.mp4", plugin="FFMPEG")
    assert film.shape == (5, 34, 52, 3)
    assert np.abs(film[:, 10, 10, 0].astype(int) - [0, 100, 200, 200, 200]).max() < 8


# --- the command line


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with tiny trained runs: `classes` and `plain` are UNets."""
    folder = tmp_path_factory.mktemp("runs")
    config = folder / "tiny.py"
    config.write_text(TINY_CONFIG, encoding="utf-8")
    options = ["max_steps=30", "learning_rate=5e-3", "beta_schedule=cosine", f"save_dir={folder}"]
    for name, more in (
        ("classes", []),
        ("plain", ["conditional=false"]),
        ("dit", ["model_type=dit", "model_params.hidden_size=32", "model_params.num_heads=2"]),
        ("dim", ["model_type=dim", "model_params.hidden_size=32", "model_params.depth=3"]),
    ):
        command = [
            "--config",
            config,
            "--device",
            "cpu",
            *options,
            *more,
            f"experiment_name={name}",
        ]
        assert train.main(list(map(str, command))) == EXIT_OK
    return folder


@pytest.fixture
def do(runs, tmp_path, monkeypatch, capsys):
    """Run edit.py in an empty folder; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(command: str, *arguments: object, model: str = "classes") -> str:
        given = [command, "--checkpoint", runs / model, "--device", "cpu", *arguments]
        assert edit.main(list(map(str, given))) == EXIT_OK
        return capsys.readouterr().out

    return run


def cells(path: str, columns: int, rows: int, line: int = 0) -> np.ndarray:
    """The 8x8 images of a sheet, (rows, columns, 8, 8); words may stand left and `line` above."""
    sheet = iio.imread(path)[line:]
    sheet = sheet[:, sheet.shape[1] - (columns * 50 + 2) :]
    assert sheet.shape[0] == rows * 50 + 2
    return sheet[2:, 2:].reshape(rows, 50, columns, 50).swapaxes(1, 2)[:, :, :48:6, :48:6]


def plain_samples(runs: Path, model: str = "classes", *arguments: object) -> np.ndarray:
    command = ["--checkpoint", runs / model, "--device", "cpu", "--npz", "--output_dir", "plain"]
    shutil.rmtree("plain", ignore_errors=True)
    assert sample.main([*map(str, command), *map(str, arguments)]) == EXIT_OK
    (path,) = Path("plain").glob("*.npz")
    with np.load(path) as data:
        return data["arr_0"][..., 0]


def assert_same(a: np.ndarray, b: np.ndarray) -> None:
    """Equal but for rounding: one grey level, because convolutions depend on the batch."""
    assert a.shape == b.shape
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


def saved(folder: str) -> np.ndarray:
    return np.stack([iio.imread(path) for path in sorted(Path("samples", folder).glob("*.png"))])


@pytest.mark.parametrize("method", ["ddim", "dpmpp_2m"])
def test_a_path_begins_and_ends_with_plain_samples(do, runs, method):
    options = ("--sampling_method", method, "--cfg_scale", 2, "--steps", 6)
    said = do("interpolate", "--seeds", "3,8", "--labels", "2,7", "--frames", 5, *options)
    strip = cells("samples/interpolate.png", 5, 1)[0]
    for seed, label, frame in ((3, 2, strip[0]), (8, 7, strip[-1])):
        plain = plain_samples(runs, "classes", "--seeds", seed, "--labels", label, *options)
        assert_same(plain, frame[None])
    assert "wrote samples/interpolate.png, samples/interpolate.gif; next: python" in said
    film = iio.imread("samples/interpolate.gif", index=None)
    assert film.shape[:3] == (5, 132, 132)


def test_rows_and_chains(do, runs):
    given = ("--seeds", "3", "--seeds", "5", "--labels", "0,1,2", "--frames", "4")
    do("interpolate", *given, "--batch_size", "5")
    parts = cells("samples/interpolate.png", 4, 4)
    do("interpolate", *given, "--output-name", "whole")
    assert_same(parts, cells("samples/whole.png", 4, 4))
    assert (parts[0, -1] == parts[1, 0]).all()  # one frame, shown on both strips
    plain = plain_samples(runs, "classes", "--seeds", "5", "--labels", "2")
    assert_same(plain, parts[3, -1][None])
    assert len(iio.imread("samples/whole.gif", index=None)) == 7


def test_noise_alone_for_a_model_without_classes(do, runs):
    do("interpolate", "--seeds", "1,2,3", "--frames", "3", model="plain")
    strip = cells("samples/interpolate.png", 3, 2)
    plain = plain_samples(runs, "plain", "--seeds", "1,2,3")
    assert_same(plain, np.stack([strip[0, 0], strip[1, 0], strip[1, 2]]))


def test_pictures_are_noised_as_far_as_the_strength_says(do, runs):
    run = load_run(runs / "classes", torch.device("cpu"))
    sampling = sampling_from(run.config, "ddim", 10)
    pictures = Pictures(torch.zeros(2, 1, 8, 8), [3, 3], [0, 1])
    for strength, count in ((1.0, 10), (0.6, 6)):
        timesteps = last_timesteps(timesteps_of(run, sampling), strength)
        with torch.inference_mode():
            steps = list(img2img_steps(run, pictures, timesteps, sampling))
        assert [s.t for s in steps] == [*timesteps_of(run, sampling)[1:], -1][-count:]
    options = ("--real_split", "test", "--n", 5, "--seeds", "0-4", "--labels", 3, "--steps", 20)
    distances = []
    for strength in (0.05, 0.5, 1):
        do("img2img", *options, "--strength", strength, "--save_images")
        sheet = cells("samples/img2img.png", 5, 2, line=16)
        assert (sheet[1] == saved("img2img_images")).all()
        distances.append(np.abs(sheet[0].astype(int) - sheet[1]).mean())
    assert distances == sorted(distances)
    plain = plain_samples(runs, "classes", "--seeds", "0-4", "--labels", 3, "--steps", 20)
    assert_same(plain, sheet[1])  # at the end of the cosine schedule nothing of a picture is left
    do("img2img", *options, "--strength", 1, "--save_images", "--batch_size", 2)
    assert_same(plain, saved("img2img_images"))


@pytest.mark.parametrize("method", SAMPLERS)
def test_unmasked_pixels_are_those_of_the_input(do, method):
    mask = np.zeros((8, 8), np.uint8)
    mask[2:5, 1:7] = 255
    Image.fromarray(mask).save("mask.png")
    options = ("--real_split", "test", "--n", 3, "--sampling_method", method, "--steps", 5)
    do("inpaint", *options, "--mask", "mask.png", "--save_images")
    shown, known, _ = cells("samples/inpaint.png", 3, 3, line=16)
    drawn = saved("inpaint_images")
    assert (drawn[:, mask == 0] == shown[:, mask == 0]).all()
    assert (drawn[:, mask == 255] != shown[:, mask == 255]).any()
    assert (known[:, mask == 255] == 128).all()
    do("inpaint", *options, "--box", "1,2,7,5", "--save_images", "--batch_size", 1)
    assert_same(drawn, saved("inpaint_images"))
    if not SAMPLERS[method].multistep:
        do("inpaint", *options, "--box", "1,2,7,5", "--save_images", "--resample", 3)
        again = saved("inpaint_images")
        assert (again[:, mask == 0] == shown[:, mask == 0]).all()
        assert (again != drawn).any()


@pytest.mark.parametrize("method", SAMPLERS)
def test_a_hole_as_large_as_the_picture_is_a_plain_sample(do, runs, method):
    options = ("--seeds", "4,9", "--labels", 6, "--sampling_method", method, "--steps", 5)
    do("inpaint", "--real_split", "test", "--n", 2, "--box", "0,0,8,8", "--save_images", *options)
    assert (saved("inpaint_images") == plain_samples(runs, "classes", *options)).all()


def test_inversion_and_decoding(do, runs):
    """With more steps the pictures come back, and decode draws them from the file."""
    means = []
    for steps in (5, 20, 100):
        options = ("--real_split", "test", "--n", 6, "--steps", steps, "--batch_size", 4)
        said = do("invert", *options)
        assert len(re.findall(r"^picture \d \(label \d\): error [\d.]+$", said, re.MULTILINE)) == 6
        means.append(float(re.search(r"mean error ([\d.]+)", said)[1]))
    assert means == sorted(means, reverse=True)
    assert means[-1] < 4
    sheet = cells("samples/invert.png", 6, 2, line=16)
    error = np.sqrt(np.square(sheet[0].astype(float) - sheet[1]).mean((1, 2))).mean()
    assert error == pytest.approx(means[-1], abs=0.01)
    assert "no guidance" in said
    assert said.endswith(
        f"next: python edit.py decode --checkpoint {runs / 'classes'} --latents "
        "samples/invert.npz\n"
    )
    with np.load("samples/invert.npz") as stored:
        assert (stored["x_T"].dtype, stored["x_T"].shape) == (np.float32, (6, 1, 8, 8))
    said = do("decode", "--latents", "samples/invert.npz")
    assert "ddim, 100 steps, conditional, no guidance" in said
    found = iio.imread("samples/decode.png")
    first_row = found[18 : 18 + 48 : 6, 2:].reshape(8, 3, 50)[:, :, :48:6].swapaxes(0, 1)
    assert_same(first_row, sheet[1, :3])


def test_another_sampler_decodes_in_its_own_number_of_steps(do):
    """The steps in the file are those of the sampler that was undone."""
    do("invert", "--real_split", "test", "--n", 2, "--steps", 5)
    latents = ("decode", "--latents", "samples/invert.npz")
    assert "ddim, 5 steps" in do(*latents)
    assert "dpmpp_2m, 20 steps" in do(*latents, "--sampling_method", "dpmpp_2m")
    assert "dpmpp_2m, 7 steps" in do(*latents, "--sampling_method", "dpmpp_2m", "--steps", 7)


@pytest.mark.parametrize("model", ["dit", "dim"])
def test_every_command_with_every_backbone(do, runs, model):
    options = ("--steps", 5, "--cfg_scale", 2)
    do("interpolate", "--seeds", "3,8", "--labels", "2,7", "--frames", 3, *options, model=model)
    strip = cells("samples/interpolate.png", 3, 1)[0]
    for seed, label, frame in ((3, 2, strip[0]), (8, 7, strip[-1])):
        plain = plain_samples(runs, model, "--seeds", seed, "--labels", label, *options)
        assert_same(plain, frame[None])

    real = ("--real_split", "test", "--n", 6)
    box = ("--box", "1,2,7,5", "--save_images")
    do("inpaint", *real, *box, *options, model=model)
    shown = cells("samples/inpaint.png", 6, 3, line=16)[0]
    drawn, inside = saved("inpaint_images"), np.zeros((8, 8), bool)
    inside[2:5, 1:7] = True
    assert (drawn[:, ~inside] == shown[:, ~inside]).all()
    assert (drawn[:, inside] != shown[:, inside]).any()

    errors = []
    for steps in (5, 100):
        said = do("invert", *real, "--steps", steps, model=model)
        errors.append(float(re.search(r"mean error ([\d.]+)", said)[1]))
    assert errors[1] < min(errors[0], 4)
    sheet = cells("samples/invert.png", 6, 2, line=16)
    do("decode", "--latents", "samples/invert.npz", model=model)
    found = iio.imread("samples/decode.png")[18 : 18 + 48 : 6, 2:]
    assert_same(found.reshape(8, 3, 50)[:, :, :48:6].swapaxes(0, 1), sheet[1, :3])

    do("img2img", *real, *options, "--strength", 1, "--seeds", "1,2,3,4,5,6", model=model)
    do("grid", "--cfg_scale", "1,3", "--steps", "2,4", "--labels", 3, model=model)


@pytest.fixture
def own_samplers(monkeypatch):
    """Samplers of a user's own: `mine` is DDIM's function under another name, `heun` a function
    that calls the network twice a step, `steady` remembers its last step."""

    def heun(denoise, x_T, diffusion, timesteps, randn_like):
        for step in ddim(denoise, x_T, diffusion, timesteps, randn_like):
            denoise(step.x, max(step.t, 0))
            yield step

    rows = dict(deterministic=lambda eta: eta == 0, options=("eta",))
    monkeypatch.setitem(SAMPLERS, "mine", Sampler(ddim, 7, **rows))
    monkeypatch.setitem(SAMPLERS, "heun", Sampler(heun, 6, deterministic=True, forwards_per_step=2))
    monkeypatch.setitem(SAMPLERS, "steady", Sampler(heun, 6, multistep=True))


@pytest.mark.parametrize("method", ["mine", "heun"])
def test_samplers_under_any_name_work(do, own_samplers, method):
    steps = ("--steps", 5)
    do("invert", "--real_split", "test", "--n", 2, "--iterations", 1, *steps)
    for command in (
        ("interpolate", "--seeds", "3,8", "--labels", "2,7", "--frames", 3, *steps),
        ("decode", "--latents", "samples/invert.npz", *steps),
        ("img2img", "--real_split", "test", "--n", 2, *steps),
        ("inpaint", "--real_split", "test", "--n", 2, "--box", "0,0,4,4", "--resample", 2, *steps),
        ("grid", "--labels", 3, "--cfg_scale", 2, *steps),
    ):
        sheets = []
        for name in (method, "ddim"):
            said = do(*command, "--sampling_method", name)
            assert f"{name}, 5 steps" in said
            sheets.append(Path("samples", f"{command[0]}.png").read_bytes())
        assert sheets[0] == sheets[1]


def test_inverting_undoes_the_function_and_not_the_name(do, own_samplers):
    options = ("--real_split", "test", "--n", 2, "--steps", 5, "--output_name")
    do("invert", *options, "ours")
    said = do("invert", *options, "theirs", "--sampling_method", "mine")
    assert "mine, 5 steps" in said
    assert "mine, 5 steps" in do(
        "decode", "--latents", "samples/theirs.npz", "sampling_method=mine"
    )
    assert Path("samples/ours.png").read_bytes() == Path("samples/theirs.png").read_bytes()
    with pytest.raises(
        ConfigError, match="invert undoes the steps of ddim or mine with ddim_eta 0"
    ):
        do("invert", *options, "x", "--sampling_method", "heun")


def test_a_samplers_row_says_what_it_cannot_do(do, own_samplers):
    hole = ("inpaint", "--real_split", "test", "--n", 2, "--box", "0,0,4,4", "--resample", 2)
    with pytest.raises(ConfigError, match="steady remembers its last step; use ddpm or ddim or"):
        do(*hole, "--sampling_method", "steady")
    with pytest.raises(ConfigError, match="use --ddim_eta 0 and --sampling_method ddim or heun or"):
        do("interpolate", "--labels", "2,7", "--sampling_method", "steady")
    assert "heun, 4 steps of 2 forwards" in do("grid", "--steps", 4, "--sampling_method", "heun")
    assert "mine, 7 steps, eta 0.5, " in do(
        "grid", "--labels", 3, "--sampling_method", "mine", "--ddim_eta", 0.5
    )


def test_inverting_without_classes(do):
    said = do("invert", "--real_split", "test", "--n", 2, model="plain")
    assert "picture 1: error" in said
    with np.load("samples/invert.npz") as stored:
        assert "labels" not in stored.files


def test_guidance_against_steps(do, runs):
    do("grid", "--cfg_scale", "1,3", "--num_inference_steps", "2,5,9", "--labels", 3, "--seeds", 7)
    sheet = cells("samples/grid.png", 3, 2, line=16)
    options = ("--labels", 3, "--seeds", 7, "--cfg_scale", 3, "--steps", 5)
    assert_same(plain_samples(runs, "classes", *options), sheet[1, 1][None])
    do("grid", "--steps", "2,5", "--seeds", "0,1", model="plain")
    assert iio.imread("samples/grid.png").shape[0] == 16 + 52 + 4  # a strip in its frame


@pytest.mark.parametrize("kind", ["folder", "classes", "npz", "file"])
def test_pictures_of_any_size_become_those_of_the_model(do, kind):
    """As images of a data set: the centre, resized. Their own classes serve if none are given."""
    large = np.zeros((3, 20, 30, 3), np.uint8)
    large[:, :, 5:25] = np.array([40, 90, 200]).reshape(3, 1, 1, 1)
    labels = [4, 0, 4]
    folder = Path("given")
    for i, (image, label) in enumerate(zip(large, labels, strict=True)):
        place = folder / (str(label) if kind == "classes" else "")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i}.png")
    path, more = folder, ()
    if kind == "npz":
        path = "given.npz"
        np.savez(path, arr_0=large, arr_1=labels)
    elif kind != "classes":
        path, more = (folder / "0.png" if kind == "file" else folder), ("--labels", "4")
    said = do("inpaint", "--input", path, "--box", "0,0,4,4", "--save_images", *more)
    count = 1 if kind == "file" else 3
    assert f"{count} pictures, 16 of 64 pixels" in said
    levels = sorted(saved("inpaint_images")[:, 5, 5].tolist())
    assert levels == [40, 90, 200][:count]


def test_one_picture_serves_several_labels(do):
    Image.fromarray(np.full((8, 8), 70, np.uint8)).save("one.png")
    do("img2img", "--input", "one.png", "--labels", "0-4", "--strength", "0.5")
    assert (cells("samples/img2img.png", 5, 2, line=16)[0] == 70).all()


BAD = [
    ("interpolate --labels 2,7 --sampling_method ddpm", "draws noise on the way"),
    ("interpolate --labels 2,7 --ddim_eta 0.5", "draws noise on the way"),
    ("interpolate --labels 2,10", "classes are 0..9"),
    ("interpolate --seeds 1,2", "--labels: give a class"),
    ("interpolate --seeds 1 --labels 3", "nothing to go to"),
    ("interpolate --seeds 1,2,3 --labels 3,4", "--labels of a row: 2 given; give 1 for all, or 3"),
    ("interpolate --labels 1,2 --labels 1,2,3", "same number of stops"),
    ("interpolate --labels 1,2 --frames 1", "--frames 1"),
    ("interpolate --labels 1,2 --fps 0", "--fps"),
    ("interpolate --labels 1,2 --format mp4", "pip install imageio-ffmpeg"),
    ("img2img --real_split test --n 2 --strength 0", "strength=0"),
    ("img2img --real_split test --n 2 --strength 1.5", "strength=1.5"),
    ("img2img --labels 3", "--input or --real_split"),
    ("img2img --input absent --labels 3", "absent: no such file or folder"),
    ("img2img --input text.png --labels 3", "not a readable PNG"),
    ("img2img --input mask.png", "--labels: give a class"),
    ("img2img --input mask.png --labels 12", "classes are 0..9"),
    ("img2img --real_split test --n 2 --labels 1,2,3", "2 pictures, but 3 --labels"),
    ("img2img --real_split train", "holds 1442 pictures; --num_samples"),
    ("img2img --real_split test --n 0", "--num_samples"),
    ("inpaint --real_split test --n 2", "--mask or --box"),
    ("inpaint --real_split test --n 2 --mask mask.png", "the mask is 6x4 pixels"),
    ("inpaint --real_split test --n 2 --mask absent.png", "absent.png: no such file"),
    ("inpaint --real_split test --n 2 --box 0,0,9,8", "box 0,0,9,8"),
    (
        "inpaint --real_split test --n 2 --box 0,0,4,4 --resample 2 --sampling_method dpmpp_2m",
        "use ddpm or ddim",
    ),
    ("invert --real_split test --n 2 --sampling_method ddpm", "invert undoes"),
    ("invert --real_split test --n 2 --seed 1", "--seed"),
    ("decode --latents absent.npz", "absent.npz"),
    ("decode --latents text.png", "text.png: not what edit.py invert writes"),
    ("decode --latents other.npz", "x_T is float32 (2, 3, 8, 8)"),
    ("grid --labels 10", "classes are 0..9"),
    ("grid --labels 1,2 --seeds 1,2,3", "--labels: 2 given"),
    ("grid --labels 0-9 --steps 1-50", "at most 400"),
    ("grid --steps 0", "num_inference_steps=0"),
]


@pytest.mark.parametrize(("command", "message"), BAD)
def test_bad_input_is_one_line_and_writes_nothing(do, command, message, monkeypatch):
    monkeypatch.setattr("utils.images.can_write_mp4", lambda: False)
    Path("text.png").write_text("no image", encoding="utf-8")
    Image.fromarray(np.zeros((4, 6), np.uint8)).save("mask.png")
    wrong = np.zeros((2, 3, 8, 8), np.float32)
    np.savez("other.npz", x_T=wrong, num_inference_steps=3, cfg_scale=1.0)
    with pytest.raises(UserError) as error:
        do(*command.split())
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path("samples").exists()


@pytest.mark.parametrize(("command", "option"), [("inpaint", "resample"), ("invert", "iterations")])
def test_counts_of_repetitions_are_at_least_one(do, command, option, capsys):
    with pytest.raises(SystemExit):
        do(command, "--real_split", "test", f"--{option}", 0)
    assert f"argument --{option}: 0: must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "interpolate --seeds 1,2 --labels 3",
        "img2img --real_split test --n 2 --labels 3",
        "inpaint --real_split test --n 2 --labels 3 --box 0,0,4,4",
        "invert --real_split test --n 2 --labels 3",
        "grid --labels 3",
        "grid --cfg_scale 2",
    ],
)
def test_a_model_without_classes_takes_no_labels(do, command):
    with pytest.raises(ConfigError, match="without class labels"):
        do(*command.split(), model="plain")


def test_dry_runs_and_print_config_write_nothing(do):
    np.savez(
        "some.npz",
        x_T=np.zeros((1, 1, 8, 8), np.float32),
        num_inference_steps=3,
        cfg_scale=1.0,
        labels=[3],
    )
    for command in (
        "interpolate --labels 1,2",
        "img2img --real-split test --n 2",
        "inpaint --real-split test --n 2 --box 0,0,4,4",
        "invert --real-split test --n 2",
        "decode --latents some.npz",
        "grid --labels 3",
    ):
        assert "steps" in do(*command.split(), "--dry-run")
        assert '"dataset": "digits"' in do(*command.split(), "--print-config", "seed=3")
    assert not Path("samples").exists()


@pytest.mark.slow
@pytest.mark.ci
def test_two_processes_draw_the_same(do, runs, script):
    options = ("--real_split", "test", "--num_samples", 5, "--labels", 3)
    do("img2img", *options, "--save_images")
    alone = saved("img2img_images")
    result = script(
        *("edit.py", "img2img", "--checkpoint", runs / "classes", "--device", "cpu"),
        *(*options, "--save_images"),
        processes=2,
    )
    assert result.returncode == EXIT_OK, result.output
    assert_same(alone, saved("img2img_images"))


@pytest.mark.slow
@pytest.mark.ci
def test_a_process_without_pictures_inverts_none(do, runs, script):
    command = ("invert", "--checkpoint", runs / "classes", "--device", "cpu")
    result = script("edit.py", *command, "--real_split", "test", "--num_samples", 1, processes=2)
    assert result.returncode == EXIT_OK, result.output
    with np.load("samples/invert.npz") as stored:
        assert (stored["x_T"].dtype, stored["x_T"].shape) == (np.float32, (1, 1, 8, 8))


def test_faults_are_told_without_a_traceback(runs, script):
    result = script("edit.py", "img2img", "--checkpoint", runs / "classes", "--strength", 0)
    assert result.returncode == 2
    assert result.output.splitlines()[-1].startswith("error: strength=0")
    result = script("edit.py", "grid", "--checkpoint", runs / "classes", "--strenght", 0)
    assert "unrecognized arguments: --strenght" in result.output
