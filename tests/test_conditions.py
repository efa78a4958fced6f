"""Images drawn from pictures of them: lower resolution, grey, holes, edges, folders of partners."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

import datasets.check
import edit
import evaluate
import export
import sample
import train
from datasets import build_dataset
from datasets.conditions import LUMINANCE, known_pixels, planes_at, planes_of, shown
from datasets.loader import make_resident
from datasets.pictures import read_inputs
from datasets.real import chosen_images
from datasets.storage import InMemoryDataset
from diffusion import build_process, make_denoiser
from diffusion.guidance import conditioned
from generation.run import CONFIG_CHECKS, load_run
from generation.sampling import generate, sampling_from
from metrics.lpips_score import ALEXNET
from models import BACKBONES, build_model
from tests.conftest import ROOT, run_script
from tests.image_files import write_image
from tests.test_train import assert_same_training, run, state_of
from tests.tiny_networks import pixel_distance
from training.objective import training_examples
from utils.config import Config, condition_channels, load_config
from utils.distributed import Runtime
from utils.errors import EXIT_FAILURE, EXIT_OK, EXIT_USAGE, ConfigError, DataError, exit_code_of
from utils.images import ImageSpec, to_float, to_uint8
from utils.rng import Stream, numpy_generator

CPU = torch.device("cpu")
ALONE = Runtime(CPU)
KEY = (0, Stream.CONDITION, 0, 0)
OF_IMAGES = ("downsample", "grey", "mask", "edges")
COLORS = ((0, 0, 0), (255, 0, 0), (0, 0, 255))
TINY = dict(model_channels=8, channel_mult=(1, 2), num_res_blocks=1)
RECIPE = [
    "dataset=synthetic", "conditional=false", "condition=downsample", "image_size=8",
    "condition_factor=2", "num_samples=3",
]  # fmt: skip


def images_of(count: int, channels: int = 3, size: int = 8, seed: int = 0) -> InMemoryDataset:
    generator = torch.Generator().manual_seed(seed)
    shape = count, channels, size, size
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return InMemoryDataset(pixels, torch.zeros(count), ())


def config_of(kind: str | None, **values) -> Config:
    return Config(**{"experiment_name": "test", "condition": kind, "condition_factor": 2, **values})


def in_pillow(kind: str, image: torch.Tensor, planes: torch.Tensor) -> Image.Image:
    """What a user would hand in for an image (3, H, W), made by other means."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    if kind == "downsample":
        return picture.reduce(2)
    if kind == "grey":
        return picture.convert("L")
    if kind == "mask":
        picture.putalpha(Image.fromarray(((planes[-1] > 0).numpy() * 255).astype(np.uint8)))
        return picture
    grey = (image.double() * torch.tensor(LUMINANCE)[:, None, None] / 2**16).sum(0).numpy()
    gradient = np.hypot(*(ndimage.sobel(grey, axis, mode="nearest") for axis in (0, 1)))
    return Image.fromarray((gradient / 4 + 0.5).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("kind", OF_IMAGES)
def test_a_users_file_says_what_training_says(kind, tmp_path):
    """Bit for bit: planes of images are those of pictures that Pillow and scipy make of them."""
    dataset, config = images_of(3), config_of(kind)
    planes = planes_at(config, dataset, range(3))
    assert planes.shape == (3, condition_channels(config, 3), 8, 8)
    assert planes.abs().max() <= 1
    for i in range(3):
        in_pillow(kind, dataset.images[i], planes[i]).save(tmp_path / f"{i}.png")
    inputs = read_inputs(str(tmp_path), config, ImageSpec(3, 8, 8, 0), 1)
    assert torch.equal(planes_at(config, inputs, range(3)), planes)
    single = read_inputs(str(tmp_path / "1.png"), config, ImageSpec(3, 8, 8, 0), 2)
    assert torch.equal(planes_at(config, single, [0]), planes[1:2])
    assert single.outputs == ["1_0", "1_1"]


@pytest.mark.parametrize("kind", OF_IMAGES)
def test_conditions_depend_on_the_image_and_its_index_alone(kind):
    dataset, config = images_of(40), config_of(kind)
    whole = planes_at(config, dataset, range(40))
    assert torch.equal(planes_at(config, dataset, range(40), slice(7, 9)), whole[7:9])
    assert torch.equal(planes_at(config, dataset, [39, 3]), whole[[39, 3]])
    floats = to_float(dataset.images)
    ours = planes_of(config, floats, None, [KEY] * 40)
    rounded = planes_of(config, dataset.images, None, [KEY] * 40)
    assert 0 < (ours - rounded).abs().max() < 0.02 or kind in ("mask", "edges")  # in units


def test_what_one_has_without_a_model():
    dataset = images_of(2)
    mean = torch.where(torch.arange(8) < 4, 10, 50).repeat(2, 3, 8, 1).byte()
    halves = InMemoryDataset(mean, torch.zeros(2), ())
    planes = planes_at(config_of("mask"), halves, [0, 1])
    filled, known = shown(planes, config_of("mask")), planes[:, -1:] > 0
    for i in range(2):
        rest = to_float(mean[i])[known[i].expand(3, -1, -1)].mean()
        assert torch.allclose(filled[i][~known[i].expand(3, -1, -1)], rest, atol=1e-6)
    assert torch.equal(planes[:, :-1] * ~known, torch.zeros(2, 3, 8, 8))
    low = planes_at(config_of("downsample"), dataset, [0, 1])
    assert torch.equal(shown(low, config_of("downsample")), low)
    labels = config_of("folder", condition_colors=COLORS)
    one_hot = torch.tensor([[1.0, -1, -1], [-1, -1, 1]])[:, :, None, None].expand(-1, -1, 2, 2)
    assert to_uint8(shown(one_hot, labels))[:, :, 0, 0].tolist() == [[0, 0, 0], [0, 0, 255]]


@pytest.mark.parametrize("size", [(8, 8), (1, 3), (5, 64)])
def test_holes_are_rectangles_of_a_quarter_to_three_quarters(size):
    for seed in range(50):
        known = known_pixels(numpy_generator(seed, Stream.CONDITION), *size)[0]
        rows, columns = (known == 0).any(1).sum().item(), (known == 0).any(0).sum().item()
        assert (known == 0).sum() == rows * columns
        for length, side in ((rows, size[0]), (columns, size[1])):
            assert min(1, side) <= length
            assert side / 4 <= length <= max(3 * side / 4, 1)


# --- training


def examples(dataset, runtime=ALONE, start_step=0, count=3, **settings):
    config = config_of(settings.pop("condition"), **{"batch_size": 8, **settings})
    made = training_examples(config, build_process(config), dataset, runtime, start_step)
    return [next(made) for _ in range(count)]


@pytest.mark.parametrize("kind", ["mask", "grey"])
def test_conditions_follow_from_the_step_on_any_number_of_processes(kind):
    make = partial(examples, images_of(20), condition=kind, horizontal_flip=True)
    whole, later = make(count=4), make(start_step=2, count=2)
    halves = [make(replace(ALONE, rank=r, world_size=2), count=4) for r in (0, 1)]
    for one, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(one.planes, torch.cat([part.planes for part in parts]))
    assert all(torch.equal(a.planes, b.planes) for a, b in zip(whole[2:], later, strict=True))
    for example in whole:  # of the images as they are mirrored, in 8 bits
        if kind == "grey":
            own = planes_of(config_of(kind), to_uint8(example.x_0), None, ())
            kept = example.planes.flatten(1).any(1)
            assert torch.equal(example.planes[kept], own[kept])


@pytest.mark.parametrize(("prob", "low", "high"), [(0.0, 0, 0), (0.3, 0.2, 0.4), (1.0, 1, 1)])
def test_dropped_conditions_are_zeros_and_no_others_are(prob, low, high):
    settings = dict(condition="mask", condition_dropout_prob=prob, batch_size=400)
    (example,) = examples(images_of(20), count=1, **settings)
    is_dropped = ~example.planes.flatten(1).any(1)
    assert low <= is_dropped.float().mean() <= high


def pairs(folder: Path, count: int = 6, **settings) -> Config:
    """Images and their negatives, under other suffixes, in two class folders."""
    for i in range(count):
        path = write_image(folder / "a" / f"{'xy'[i % 2]}" / f"{i}.png", (12, 8), seed=i)
        negative = folder / "b" / path.relative_to(folder / "a").with_suffix(".bmp")
        negative.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(255 - np.asarray(Image.open(path))).save(negative)
    values = dict(dataset="custom", data_root=str(folder / "a"), image_size=(12, 8))
    return config_of("folder", condition_root=str(folder / "b"), **{**values, **settings})


@pytest.mark.parametrize("resident", [True, False])
def test_partners_keep_step_with_their_images(resident, tmp_path):
    settings = dict(num_workers=0, horizontal_flip=True, condition_dropout_prob=0, batch_size=4)
    config = pairs(tmp_path, **settings)
    dataset = make_resident(build_dataset(config), Runtime(CPU), resident=resident)
    for start in (0, 5):
        made = training_examples(config, build_process(config), dataset, ALONE, start)
        for _ in range(4):
            example = next(made)
            assert torch.equal(to_uint8(example.planes), 255 - to_uint8(example.x_0))
    subset = build_dataset(pairs(tmp_path, classes=(1,)))
    assert len(subset) == len(subset.partners) == 3
    assert torch.equal(subset.partners[2][0], 255 - subset[2][0])


def test_partners_are_part_of_the_fingerprint_and_follow_replaced_images(tmp_path):
    config = pairs(tmp_path)
    before = build_dataset(config)
    assert before.fingerprint != build_dataset(config.model_copy(update={"condition": None}))
    (tmp_path / "a" / "x" / "2.png").write_bytes(b"no image")
    dataset = build_dataset(config.model_copy(update={"on_bad_image": "skip"}))
    assert dataset.names[1] == dataset.names[2]
    assert torch.equal(dataset.partners[1][0], 255 - dataset[1][0])


def test_label_maps_are_planes_of_colours_and_never_blended(tmp_path):
    config = pairs(tmp_path, image_size=(4, 4), condition_colors=COLORS)
    table, rng = np.array(COLORS, dtype=np.uint8), np.random.default_rng(0)
    for path in sorted((tmp_path / "b").glob("*/*")):
        Image.fromarray(table[rng.integers(3, size=(12, 8))]).save(path)
    dataset = build_dataset(config)
    planes = planes_at(config, dataset, range(6))
    assert planes.shape == (6, 3, 4, 4)
    assert (planes.sum(1) == -1).all()
    assert set(planes.unique().tolist()) == {-1.0, 1.0}
    colours = to_uint8(shown(planes, config))[0].permute(1, 2, 0)
    theirs = Image.open(dataset.partners.listing.path(0)).crop((0, 2, 8, 10))
    assert np.array_equal(colours, theirs.resize((4, 4), Image.Resampling.NEAREST))
    pixels = np.asarray(Image.open(path)).copy()
    pixels[3, 5] = (255, 0, 1)
    Image.fromarray(pixels).save(path)
    with pytest.raises(DataError, match=r"5\.bmp: row 3, column 5 has the colour \(255, 0, 1\)"):
        dataset.partners[5]


# --- guidance


def test_scales_0_and_1_are_one_forward_and_others_compose_with_the_class():
    calls = []

    def model(x, t, y):
        calls.append(len(x))
        given = x[:, 1:].mean((1, 2, 3), keepdim=True)
        return x[:, :1] + (1 + given) * (y + 2.0)[:, None, None, None]

    x, t, y = torch.randn(2, 1, 4, 4), torch.zeros(2).long(), torch.tensor([0, 3])
    planes = torch.rand(2, 3, 4, 4) + 1
    join = [torch.cat([x, part], 1) for part in (torch.zeros_like(planes), planes)]
    none, full = (model(part, t, y) for part in join)
    for scale, forwards, expected in (
        (0, 1, none),
        (1, 1, full),
        (2.5, 2, none + 2.5 * (full - none)),
    ):
        calls.clear()
        assert torch.allclose(conditioned(model, planes, scale)(x, t, y), expected)
        assert len(calls) == forwards
    assert conditioned(model, None) is model
    config = config_of(None, prediction_type="x_0", num_timesteps=10)
    of_both = partial(make_denoiser, build_process(config), conditioned(model, planes, 2.5))
    null = torch.full_like(y, -1)
    c, u = (conditioned(model, planes, 2.5)(x, t, label) for label in (y, null))
    guided = of_both(y, cfg_scale=3.0, threshold="none")(x, 0).x_0
    assert torch.allclose(guided, u + 3 * (c - u), atol=1e-5)


# --- whole runs


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_takes_a_condition(backbone):
    params = {} if backbone == "unet" else dict(hidden_size=32, depth=2, patch_size=4)
    params |= dict(num_heads=2) if backbone in ("dit", "jit") else {}
    params = TINY if backbone == "unet" else params
    config = config_of("mask", model_type=backbone, model_params=params, conditional=True)
    model = build_model(config, ImageSpec(3, 8, 8, 5))
    x, planes = torch.randn(4, 3, 8, 8), planes_at(config, images_of(2), range(2))
    out = conditioned(model, planes)(x, torch.zeros(4).long(), torch.zeros(4).long())
    assert out.shape == x.shape


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A tiny run that doubles the resolution of 4x4 pictures, and pictures for it."""
    folder = tmp_path_factory.mktemp("conditions")
    config = folder / "tiny.py"
    text = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
    config.write_text(text.split('TINY_CONFIG = """')[1].split('"""')[0], encoding="utf-8")
    settings = [*RECIPE, "max_steps=6", "val_interval=1", "val_num_samples=8", "sample_interval=1"]
    more = ["sample_start_epoch=1", "epochs=1", "batch_size=400", f"save_dir={folder}"]
    assert run(config, "run", *settings, *more, "eval_interval=1", "eval_metrics=psnr,sanity",
               "eval_num_samples=5", "eval_best_metric=psnr") == EXIT_OK  # fmt: skip
    for i in range(2):
        write_image(folder / "pictures" / f"picture{i}.png", (4, 4), seed=i)
    return folder


def test_training_validates_evaluates_and_shows(trained):
    rows = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").open()]
    values = {key for row in rows for key in row}
    assert {"val/loss", "eval/psnr", "eval/sanity"} <= values
    report = json.loads((trained / "run" / "eval" / "epoch_0001.json").read_text())
    assert report["metrics"]["psnr"]["baseline_name"] == "bicubic"
    shown_there = iio.imread(trained / "run" / "samples" / "epoch_0001.png")
    assert shown_there.shape == (3 * 50 + 2, 3 * 50 + 2, 3)  # picture, output, image
    target = build_dataset(Config(dataset="synthetic", image_size=(8, 8)), "test")[1][0]
    assert np.array_equal(shown_there[52:100:6, 102:150:6], target.permute(1, 2, 0))


def draw(trained: Path, name: str, *options: object) -> int:
    given = ["--checkpoint", trained / "run", "--device", "cpu", "--output_dir", trained / name]
    return exit_code_of(partial(sample.main, [*map(str, given), *map(str, options)]))


def test_outputs_are_named_after_their_pictures(trained, capsys):
    pictures = trained / "pictures"
    options = ["--condition", pictures, "--save_images", "--num_samples", 2]
    assert draw(trained, "two", *options, "--batch_size", 3) == EXIT_OK
    names = [f"picture{i}_{k}.png" for i in (0, 1) for k in (0, 1)]
    assert sorted(p.name for p in (trained / "two" / "images").iterdir()) == names
    sheet = iio.imread(trained / "two" / "samples.png")
    assert sheet.shape[0] == 2 * 50 + 2
    assert sheet.shape[1] > 3 * 50 + 2  # and the names
    assert draw(trained, "one", "--condition", pictures / "picture1.png", "--save_images",
                "--seed", 44) == EXIT_OK  # fmt: skip
    assert [p.name for p in (trained / "one" / "images").iterdir()] == ["picture1.png"]
    same = [iio.imread(trained / path) for path in
            ("one/images/picture1.png", "two/images/picture1_0.png")]  # fmt: skip
    assert np.array_equal(*same)


def test_scale_0_ignores_the_pictures(trained):
    pictures = trained / "pictures"
    for name, scale in (("ignored", 0), ("guided", 2)):
        options = ["--condition", pictures, "--condition_scale", scale, "--seeds", "7,7"]
        assert draw(trained, name, *options, "--npz") == EXIT_OK
    ignored, guided = (
        np.load(next((trained / n).glob("*.npz")))["arr_0"] for n in ("ignored", "guided")
    )
    assert np.array_equal(ignored[0], ignored[1])
    assert not np.array_equal(guided[0], guided[1])


def test_images_do_not_depend_on_the_batch_size(trained):
    model = load_run(trained / "run", CPU)
    dataset = build_dataset(model.config, "test")
    planes = partial(planes_at, model.config, dataset, range(7))
    drawn = []
    for size in (7, 3):
        settings = dict(sampling=sampling_from(model.config), batch_size=size, runtime=ALONE)
        drawn.append(torch.cat([*generate(model, range(7), None, planes_of=planes, **settings)]))
    assert (drawn[0].int() - drawn[1].int()).abs().max() <= 1


def test_an_evaluation_compares_each_image_with_its_own(trained, capsys, monkeypatch):
    """PSNR and SSIM as skimage has them, and a distance in the place of LPIPS, each beside that of
    bicubic interpolation."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    given = ["--checkpoint", trained / "run", "--device", "cpu", "--num_samples", 5, "--metrics",
             "psnr,ssim,lpips_paired", "--real_split", "test", "--num_real", 3, "--output",
             trained / "r.json", "--lpips_weights", trained / "no.pth", "--save_images_dir",
             trained / "drawn"]  # fmt: skip
    torch.save({}, trained / "no.pth")
    monkeypatch.setattr(ALEXNET, "load", lambda *_: pixel_distance)
    assert exit_code_of(partial(evaluate.main, list(map(str, given)))) == EXIT_OK
    report = json.loads((trained / "r.json").read_text())["metrics"]
    config = load_run(trained / "run", CPU).config
    dataset = build_dataset(config, "test")
    indices = [chosen_images(len(dataset), 3)[i % 3] for i in range(5)]
    drawn = [iio.imread(trained / "drawn" / f"{i:06d}.png") for i in range(5)]
    bicubic = to_uint8(planes_at(config, dataset, indices)).permute(0, 2, 3, 1).numpy()
    real = [dataset[i][0].permute(1, 2, 0).numpy() for i in indices]
    ssim = partial(structural_similarity, channel_axis=2)
    scores = {"psnr": peak_signal_noise_ratio, "ssim": ssim}
    as_floats = partial(torch.nn.functional.interpolate, size=(64, 64), mode="bilinear")

    def enlarged(*pair: np.ndarray) -> float:
        """The stand-in for LPIPS, which sees images of 64 pixels."""
        return float(pixel_distance(*(as_floats(to_float(torch.tensor(x)).permute(2, 0, 1)[None])
                                      for x in pair)))  # fmt: skip

    for name, score in (scores | {"lpips_paired": enlarged}).items():
        for key, images in (("value", drawn), ("baseline", bicubic)):
            expected = np.mean([score(*pair) for pair in zip(real, images, strict=True)])
            assert report[name][key] == pytest.approx(expected, abs=1e-4), (name, key)
    assert f"bicubic {report['psnr']['baseline']:.4f}" in capsys.readouterr().out


def test_edit_and_diffusers_refuse_in_one_line(trained, capsys):
    checkpoint = ["--checkpoint", str(trained / "run"), "--device", "cpu"]
    output = trained / "nothing"
    commands = [
        partial(
            edit.main, ["interpolate", *checkpoint, "--output_dir", str(output), "--seeds=1,2"]
        ),
        partial(export.main, [*checkpoint, "--format", "diffusers", "--output", str(output)]),
    ]
    for command, words in zip(
        commands, ("sample.py --condition", "condition='downsample'"), strict=True
    ):
        assert exit_code_of(command) == EXIT_USAGE
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
        assert words in line
        assert not output.exists()


# --- faults


CONFIG_FAULTS = {
    "a folder for other data sets": (
        dict(condition="folder", condition_root="x"),
        "dataset='custom'",
    ),
    "no folder": (dict(condition="folder", dataset="custom"), "condition_root"),
    "grey of grey": (dict(condition="grey", dataset="digits"), "grey already"),
    "no divisor": (dict(condition_factor=3), "condition_factor=3: must divide image_size"),
    "no size": (dict(dataset="custom", image_size=None), "must divide image_size"),
    "five channels": (dict(condition_channels=5), "condition_channels=5: use 1"),
    "two of one colour": (dict(condition_colors=((1,), (1,))), "different"),
    "colours of two kinds": (dict(condition_colors=((1,), (1, 2, 3))), "different"),
    "guided without drops": (dict(condition_scale=2, condition_dropout_prob=0), "needs training"),
}


@pytest.mark.parametrize("name", CONFIG_FAULTS)
def test_faults_of_a_config(name, tmp_path):
    values, words = CONFIG_FAULTS[name]
    path = tmp_path / "config.py"
    basis = dict(dataset="synthetic", image_size=8, condition="downsample", condition_factor=2)
    path.write_text(f"config = { ({**basis, **values})!r}")
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        load_config(path, checks=CONFIG_CHECKS)
    assert "\n" not in str(caught.value)


def spoil(folder: Path, fault: str) -> None:
    target = folder / "b" / "x" / "2.bmp"
    if fault == "other size":
        write_image(target, (8, 8))
    if fault in ("missing", "extra"):
        target.rename(folder / ("c.bmp" if fault == "missing" else "b/x/extra.bmp"))
    if fault == "extra":
        write_image(target, (12, 8))
    if fault == "a class more":
        write_image(folder / "b" / "z" / "1.bmp", (12, 8))
    if fault == "two of one name":
        write_image(target.with_suffix(".png"), (12, 8))
    if fault == "no folder":
        (folder / "b").rename(folder / "c")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("other size", "x/2.bmp: is 8 x 8 (height x width), must be 12 x 8"),
        ("missing", "1 are not in both, first x/2"),
        ("extra", "1 are not in both, first x/extra"),
        ("a class more", "1 are not in both, first z/1"),
        ("two of one name", "needs the names of"),
        ("no folder", "b"),
    ],
)
def test_faults_of_folders(fault, words, tmp_path, monkeypatch, capsys):
    """One line from train.py and from datasets.check, before anything is written."""
    monkeypatch.chdir(tmp_path)
    config = pairs(tmp_path, save_dir=str(tmp_path / "out"), model_params=TINY)
    spoil(tmp_path, fault)
    path = tmp_path / "pairs.py"
    path.write_text(f"config = {config.model_dump(exclude_defaults=True)!r}")
    for main in (train.main, datasets.check.main):
        assert exit_code_of(partial(main, ["--config", str(path), "--device", "cpu"])) == EXIT_USAGE
        errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
        assert len(errors) == 1
        assert words in errors[0]
    assert not (tmp_path / "out").exists()


def test_the_check_finds_colours_that_are_none(tmp_path, monkeypatch, capsys):
    config = pairs(tmp_path, condition_colors=COLORS, save_dir=str(tmp_path / "out"))
    path = tmp_path / "pairs.py"
    path.write_text(f"config = {config.model_dump(exclude_defaults=True)!r}")
    code = exit_code_of(partial(datasets.check.main, ["--config", str(path)]))
    assert code == EXIT_USAGE
    assert "none of condition_colors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (None, "give pictures unless"),
        ("absent.png", "absent.png"),
        ("empty", "no images"),
        ("large", "large/a.png: is 8 x 8 (height x width), must be 4 x 4"),
        ("broken", "broken/a.png"),
        ("twins", "two pictures have one name"),
    ],
)
def test_faults_of_a_users_pictures(path, words, trained, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    write_image(tmp_path / "large" / "a.png", (8, 8))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    for name in ("a.png", "a.jpg"):
        write_image(tmp_path / "twins" / name, (4, 4))
    options = [] if path is None else ["--condition", tmp_path / path]
    assert draw(trained, "faulty", *options) in (EXIT_USAGE, EXIT_FAILURE)
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert len(errors) == 1
    assert words in errors[0]
    assert not (trained / "faulty").exists()


def test_a_mask_needs_a_hole(tmp_path):
    write_image(tmp_path / "a.png", (8, 8), "RGBA")
    pixels = np.asarray(Image.open(tmp_path / "a.png")).copy()
    pixels[..., 3] = 128
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="has no hole"):
        read_inputs(str(tmp_path), config_of("mask"), ImageSpec(3, 8, 8, 0), 1)


def test_a_model_without_a_condition_takes_no_pictures():
    with pytest.raises(DataError, match="condition=None"):
        read_inputs("pictures", Config(), ImageSpec(3, 8, 8, 0), 1)
    assert read_inputs(None, Config(), ImageSpec(3, 8, 8, 0), 1) is None


# --- in full


@pytest.mark.slow
@pytest.mark.ci
def test_paired_folders_train_alike_however_they_are_read(tmp_path, monkeypatch):
    """Bit for bit: resumed in mid-epoch, with workers; on two processes up to the sums."""
    monkeypatch.chdir(tmp_path)
    params = {**TINY, "dropout": 0.0}  # whose masks are those of a process
    values = dict(model_params=params, batch_size=4, num_timesteps=20, sample_start_epoch=100)
    values |= dict(horizontal_flip=True, ema_decay=0.9, resident=False)
    config = pairs(tmp_path, **values)
    path = tmp_path / "pairs.py"
    path.write_text(f"config = {config.model_dump(exclude_defaults=True)!r}")
    assert run(path, "whole", "max_steps=7", "num_workers=0") == EXIT_OK
    assert run(path, "parts", "max_steps=4", "num_workers=2") == EXIT_OK
    assert run(path, "parts", "max_steps=7", "num_workers=1", "resume_path=auto") == EXIT_OK
    one, other = (state_of(name) for name in ("whole", "parts"))
    assert_same_training(one, {**other, "best_loss": one["best_loss"]})  # that of a save
    done = run_script(
        "train.py", "--config", path, "experiment_name=two", "max_steps=7", "num_workers=0",
        processes=2, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == EXIT_OK, done.output
    ours, theirs = (state_of(name)["model_state_dict"] for name in ("whole", "two"))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(1200)
def test_digits_become_sharper_than_bicubic(tmp_path, monkeypatch):
    """Held-out digits: at least 1 dB above bicubic; from pictures of others, below it."""
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "configs" / "digits_superres.py")
    assert train.main(["--config", config, "epochs=6", "sample_start_epoch=9"]) == EXIT_OK
    given = ["--checkpoint", "checkpoints/digits_superres", "--real_split", "test"]
    assert evaluate.main([*given, "--num_samples", "60"]) == EXIT_OK
    report = json.loads(Path("checkpoints/digits_superres/eval/report.json").read_text())["metrics"]
    assert report["psnr"]["value"] > report["psnr"]["baseline"] + 1
    assert report["ssim"]["value"] > report["ssim"]["baseline"]
    model = load_run("checkpoints/digits_superres", CPU)
    dataset = build_dataset(model.config, "test")
    settings = dict(sampling=sampling_from(model.config), batch_size=50, runtime=ALONE)
    others = partial(planes_at, model.config, dataset, range(1, 51))
    (drawn,) = generate(model, range(50), None, planes_of=others, **settings)
    error = (to_float(drawn) - to_float(dataset.images[:50])).square().flatten(1).mean(1) / 4
    assert -10 * error.log10().mean() < report["psnr"]["baseline"]
