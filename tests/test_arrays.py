"""Images that are not 8-bit pictures: arrays of any number of channels, and their units."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import edit
import evaluate
import export
import sample
import train
from datasets import build_dataset, check
from datasets.conditions import planes_at
from datasets.pictures import read_inputs, read_pictures
from metrics.memorization import nearest_images
from tests.image_files import custom
from utils.checkpoint import load_any
from utils.errors import EXIT_OK, EXIT_USAGE, DataError, UserError, exit_code_of
from utils.files import check_picture_folder
from utils.images import Values, as_pictures, save_image, to_file

TINY = """
config = dict(
    dataset="custom",
    data_root="data",
    image_channels=5,
    conditional=True,
    model_params=dict(model_channels=8, channel_mult=(1, 2), num_res_blocks=1, dropout=0.1),
    batch_size=8,
    max_steps=6,
    num_timesteps=50,
    beta_schedule="cosine",
    num_inference_steps=3,
    sampling_method="ddpm",
    num_samples=6,
    num_workers=0,
    ema_decay=0.9,
    save_interval=1,
    sample_interval=100,
)
"""


def write_fields(
    root: Path, *, count: int = 20, shape: tuple = (5, 8, 8), scale: float = 1
) -> None:
    """`count` random float32 images of two classes."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = root / f"class{i % 2}" / f"{i:03d}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, (rng.normal(size=(5, 8, 8)) * scale + i % 2).astype(np.float32))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Call the main function of a script in `tmp_path`, where the config run.py is; returns the
    exit code and all that it has printed."""
    monkeypatch.chdir(tmp_path)
    Path("run.py").write_text(TINY)

    def call(main, *arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = exit_code_of(partial(main, [str(argument) for argument in arguments]))
        return code, "".join(capsys.readouterr())

    return call


# --- files


def save_npz(path: Path, array: np.ndarray) -> None:
    np.savez_compressed(path, image=array)


def save_tiff(path: Path, array: np.ndarray) -> None:
    pytest.importorskip("tifffile").imwrite(path, array)


@pytest.mark.parametrize(
    ("name", "save"), [("a.npy", np.save), ("a.NPZ.npz", save_npz), ("a.tif", save_tiff)]
)
def test_each_file_and_layout_is_the_same_image(tmp_path, name, save):
    array = np.random.default_rng(0).integers(0, 2**16, (5, 6, 7), np.uint16)
    images = []
    for layout in (array, array.transpose(1, 2, 0), array.astype(">u2")):
        save(tmp_path / name, np.ascontiguousarray(layout))
        config = custom(tmp_path, use_subdirs=False, image_channels=5, value_range=(0, 65535))
        dataset = build_dataset(config)
        assert dataset.values == ("uint16", 0, 65535)
        images.append(dataset[0][0])
    assert images[0].dtype == torch.float32
    assert images[0].shape == (5, 6, 7)
    assert all(torch.equal(image, images[0]) for image in images)
    assert np.array_equal(to_file(images[0], dataset.values)[0].numpy(), array)


def test_every_level_of_16_bits_comes_back(tmp_path):
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    np.save(tmp_path / "a.npy", levels)
    given = {"use_subdirs": False, "image_channels": 1}
    measured = build_dataset(custom(tmp_path, **given))
    dataset = build_dataset(custom(tmp_path, **given, value_range=(0, 65535)))
    assert measured.values == dataset.values
    image = dataset[0][0]
    assert (image.min(), image.max(), len(image.unique())) == (-1, 1, 65536)
    held, clipped = to_file(image, dataset.values)
    save_image(tmp_path / "out" / "b.npy", held)
    back = np.load(tmp_path / "out" / "b.npy")
    assert back.dtype == np.uint16
    assert clipped == 0
    assert np.array_equal(back[0], levels)


def test_what_a_type_cannot_hold_is_clipped_and_counted():
    images = torch.tensor([-1.5, -1.00001, -1, 0, 1, 1.5])
    held, clipped = to_file(images, Values("uint16", 0, 65535))
    assert held.tolist() == [0, 0, 0, 32768, 65535, 65535]
    assert clipped == 2
    assert to_file(images, Values("float32", 0, 2))[0].tolist() == pytest.approx(
        [-0.5, 0, 0, 1, 2, 2.5], abs=1e-4
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [None, (6, 5)])
def test_8_bit_arrays_of_grey_and_rgb_are_pictures(tmp_path, channels, size):
    rng = np.random.default_rng(0)
    for folder in ("arrays", "pictures"):
        (tmp_path / folder).mkdir()
    for i, shape in enumerate([(9, 8), (9, 8, 3)]):
        pixels = rng.integers(0, 256, shape, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
        np.save(tmp_path / "arrays" / f"{i}.npy", pixels)
    sets = [
        build_dataset(
            custom(tmp_path / name, use_subdirs=False, image_channels=channels, image_size=size)
        )
        for name in ("arrays", "pictures")
    ]
    assert sets[0].values is None
    for (one, _), (other, _) in zip(*sets, strict=True):
        assert torch.equal(one, other)


def test_arrays_are_cropped_and_resized_within_their_range(tmp_path):
    array = np.zeros((2, 8, 20), np.float32)
    array[:, :, 6:14] = np.linspace(-1, 3, 8)
    for i, image in enumerate((array, np.clip(array, -1, 1) * 2)):
        np.save(tmp_path / f"{i}.npy", image)
    given = {"use_subdirs": False, "image_channels": 2, "image_size": (4, 4)}
    dataset = build_dataset(custom(tmp_path, **given, value_range=(-1, 3)))
    image, _ = dataset[0]
    assert image.shape == (2, 4, 4)
    assert image.min() >= -1
    assert image.max() <= 1
    assert torch.allclose(image[0, 0], -image[0, 0].flip(0), atol=1e-6)  # the centre is a ramp
    wide = np.array([[[0, 255]] * 2] * 5, np.uint8)
    np.save(tmp_path / "0.npy", wide)
    (tmp_path / "1.npy").unlink()
    bytes_of_5 = build_dataset(custom(tmp_path, **given | {"image_channels": 5}))
    assert bytes_of_5.values is None
    assert bytes_of_5[0][0].dtype == torch.uint8


def test_the_train_images_give_the_range_of_all(tmp_path):
    for split, low, high in (("train", -2, 6), ("test", -4, 8)):
        for i, value in enumerate((low, high)):
            path = tmp_path / split / "a" / f"{i}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, np.full((1, 4, 4), value, np.int16))
    config = custom(tmp_path, image_channels=1)
    assert build_dataset(config).values == ("int16", -2, 6)
    test = build_dataset(config, "test")
    assert test.values == ("int16", -2, 6)
    assert [test[i][0].max().item() for i in range(2)] == [-1.5, 1.5]


# --- pictures and metrics


def test_what_pictures_show():
    images = torch.rand(2, 5, 4, 4) * 2 - 1
    assert as_pictures(images).shape == (2, 3, 4, 4)
    assert torch.equal(as_pictures(images, (4,)), as_pictures(images[:, 4:]))
    assert as_pictures(images[:, :2]).shape == (2, 1, 4, 4)
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(as_pictures(pixels), pixels)
    assert torch.equal(as_pictures(pixels, (2, 1, 0)), pixels.flip(1))


def test_copies_of_floats_are_found():
    train = torch.rand(50, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    queries = train[[7, 3]] + torch.tensor([0.0, 1e-2]).view(2, 1, 1, 1)
    options = {"num_neighbours": 2, "left_out": torch.tensor([-1, -1])}
    for split in (50, 7):
        squared, places = nearest_images(
            queries, train.split(split), 50, **options, device=torch.device("cpu")
        )
        assert places[:, 0].tolist() == [7, 3]
        assert squared[0, 0] == 0
        assert squared[1, 0].item() == pytest.approx(256 * (1e-2 * 2040) ** 2, rel=0.05)


# --- scripts


def test_a_run_on_arrays(run, tmp_path):
    write_fields(tmp_path / "data/train")
    write_fields(tmp_path / "data/test", count=6, scale=3)
    code, said = run(check.main, "--config", "run.py", "value_range=-2,2", "--json", "a.json")
    assert code == EXIT_OK
    assert "train values      float32: -2 is -1, 2 is 1" in said
    assert "images leave value_range: the least is" in said
    assert json.loads(Path("a.json").read_text())["splits"]["test"]["values"][0] == "float32"
    device = ("--device", "cpu")
    code, said = run(train.main, "--config", "run.py", "val_interval=2", *device)
    assert code == EXIT_OK, said
    assert said.count("measured on 20 images, float32") == 1
    # as many steps in two parts, with other workers
    parts = ("experiment_name=parts", "resident=false", "resume_path=auto", *device)
    for steps, workers in ((4, 2), (6, 1)):
        more = (f"max_steps={steps}", f"num_workers={workers}")
        code, said = run(train.main, "--config", "run.py", *more, *parts)
        assert code == EXIT_OK, said
    states = [load_any(Path("checkpoints", name, "current_model.pth")) for name in ("run", "parts")]
    assert states[0]["values"] == states[1]["values"]
    for name, weights in states[0]["model_state_dict"].items():
        assert torch.equal(weights, states[1]["model_state_dict"][name])
    checkpoint = ("--checkpoint", "checkpoints/run/current_model.pth", *device)
    to = ("export.py", export.main, "--format", "safetensors", "--output", "a.safetensors")
    assert run(*to[1:], *checkpoint)[0] == EXIT_OK
    drawn = {}
    for name, size, source in (("a", 6, checkpoint), ("b", 1, ("--checkpoint", "a.safetensors"))):
        options = ("--save_images", "--npz", "--output_dir", name, "--batch_size", size, *device)
        code, said = run(sample.main, *source, *options)
        assert code == EXIT_OK, said
        drawn[name] = np.load(f"{name}/samples_6x8x8x5.npz")["arr_0"].transpose(0, 3, 1, 2)
        assert np.array_equal(np.load(f"{name}/images/000003.npy"), drawn[name][3])
        assert Image.open(f"{name}/samples.png").mode == "RGB"
    assert drawn["a"].dtype == np.float32
    assert np.abs(drawn["a"] - drawn["b"]).max() < 1e-3
    assert {path.name for path in Path("a/images").iterdir()} == {
        *(f"{i:06d}.npy" for i in range(6)), "labels.json",
    }  # fmt: skip
    metrics = ("--metrics", "fid,memorization,sanity,lpips", "--save_images_dir", "ev", "--n", 6)
    code, said = run(evaluate.main, *checkpoint, *metrics)
    assert code == EXIT_OK, said
    report = json.loads(Path("checkpoints/run/eval/report.json").read_text())["metrics"]
    assert "8-bit images of 1 or 3 channels" in report["fid"]["reason"]
    assert report["lpips"]["status"] == "skipped"
    assert report["sanity"]["value"] == 1
    assert report["memorization"]["status"] == "unreliable", report["memorization"]  # of 6
    again = ("--images", "ev", "--config", "run.py", "--metrics", "sanity,memorization", *device)
    assert run(evaluate.main, *again)[0] == EXIT_OK
    other = json.loads(Path("ev_eval/report.json").read_text())["metrics"]
    near = [report["memorization"]["generated"], other["memorization"]["generated"]]
    assert near[0]["percentiles"]["p50"] == pytest.approx(near[1]["percentiles"]["p50"], abs=1e-3)
    words = ("--input", "ev", "--save_images", "--box", "0,0,4,4")
    assert run(edit.main, "inpaint", *checkpoint, *words)[0] == EXIT_OK
    kept, before = (np.load(f"{name}/000000.npy") for name in ("samples/inpaint_images", "ev"))
    assert np.abs(kept - before)[:, 4:, 4:].max() < 1e-4
    # other data of the same shape have another range
    write_fields(tmp_path / "other/train", scale=2)
    words = ("resume_path=auto", "data_root=other", "max_steps=8", *device)
    code, said = run(train.main, "--config", "run.py", *words)
    assert code == 1
    assert said.count("\n") == said.count("measured") + 1
    assert "was trained on values" in said
    low, high = states[0]["values"][1:]
    kept = f"value_range={low!r},{high!r}"
    assert run(train.main, "--config", "run.py", kept, *words)[0] == EXIT_OK


def test_16_bit_samples_in_the_units_of_the_data(run, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for i in range(8):
        np.save(tmp_path / f"data/{i}.npy", rng.integers(900, 1200, (8, 8), np.uint16))
    words = ("use_subdirs=false", "conditional=false", "image_channels=1", "max_steps=1")
    assert run(train.main, "--config", "run.py", *words, "--device", "cpu")[0] == EXIT_OK
    checkpoint = ("--checkpoint", "checkpoints/run", "--device", "cpu", "--save_images")
    assert run(sample.main, *checkpoint)[0] == EXIT_OK
    image = np.load("samples/images/000000.npy")
    assert (image.dtype, image.shape) == (np.uint16, (1, 8, 8))
    assert 800 < image.min() < image.max() < 1300
    drawn = read_pictures("samples/images", (), image_channels=1, values=Values("uint16", 0, 65535))
    assert drawn.data.values == ("uint16", 0, 65535)
    # more than 16 bits hold: clipped, in one line
    code, said = run(sample.main, *checkpoint, "threshold=none", "num_inference_steps=2")
    assert code == EXIT_OK, said


def fields(root: Path, **named: object) -> None:
    root.mkdir()
    for name, array in named.items():
        np.save(root / f"{name}.npy", array, allow_pickle=True)


FIELD = np.random.default_rng(0).normal(size=(5, 8, 8)).astype(np.float32)
BAD = {
    "three channels": (dict(a=FIELD[:4]), (), "is it 4?"),
    "ambiguous": (dict(a=FIELD[:, :, :5]), (), "image_channels=5 not just once"),
    "four sides": (dict(a=FIELD[None]), (), "Give (H, W), (C, H, W)"),
    "objects": (dict(a=np.array([{}, 1], object)), (), "could run code"),
    "int32": (dict(a=FIELD.astype(np.int32)), (), "holds int32; use uint8, uint16"),
    "nan": (dict(a=FIELD, b=FIELD * np.nan), (), "b.npy: broken image (it holds NaN"),
    "two types": (dict(a=FIELD, b=FIELD.astype(float)), (), "holds float64, not float32"),
    "two sizes": (dict(a=FIELD, b=FIELD[:, :4]), (), "set image_size"),
    "empty": (dict(a=FIELD[:, :0]), ("image_size=8",), "a.npy: broken image (it holds no values)"),
    "too wide": (dict(a=FIELD), ("value_range=-1e308,1e308",), "goes from -1e+308 to 1e+308"),
    "constant": (dict(a=FIELD * 0), (), "no value_range goes from 0 to 0"),
    "descending": (dict(a=FIELD), ("value_range=3,1",), "goes from 3 to 1"),
    "8 bits": (dict(a=FIELD.astype(np.uint8)), ("value_range=0,9",), "8 bits are 0 to 255"),
    "no such channel": (dict(a=FIELD), ("preview_channels=5",), "name one or three of 0..4"),
    "two channels": (dict(a=FIELD), ("preview_channels=1,2",), "name one or three of 0..4"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arrays_are_one_line(run, tmp_path, case):
    arrays, words, told = BAD[case]
    fields(tmp_path / "data", **arrays)
    words = ("use_subdirs=false", "conditional=false", *words, "--device", "cpu")
    code, said = run(train.main, "--config", "run.py", *words)
    assert code == EXIT_USAGE
    assert told in said
    lines = [line for line in said.splitlines() if "measured on" not in line]
    assert [line[:6] for line in lines] == ["error:"]
    assert not Path("checkpoints").exists()


def test_bad_kinds_of_files_are_one_line(tmp_path, monkeypatch):
    fields(tmp_path / "data", a=FIELD)
    Image.new("RGB", (8, 8)).save(tmp_path / "data/b.png")
    for channels, name, other in ((None, "b.png", ".npy"), (5, "a.npy", ".png")):
        dataset = build_dataset(
            custom(tmp_path / "data", use_subdirs=False, image_channels=channels)
        )
        assert dataset.names == [name]
        assert dataset.listing.passed_over == {other: 1}
    (tmp_path / "data/a.npy").unlink()
    with pytest.raises(DataError, match=r"looked for \.npy \.npz \.tif \.tiff; saw 1 \.png"):
        build_dataset(custom(tmp_path / "data", use_subdirs=False, image_channels=5, image_size=8))
    (tmp_path / "data/b.png").unlink()
    (tmp_path / "data/a.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"a\.npz: broken image"):
        build_dataset(custom(tmp_path / "data", use_subdirs=False, image_channels=5))
    (tmp_path / "data/a.npz").rename(tmp_path / "data/a.tif")
    monkeypatch.setattr("utils.errors.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install tifffile") as caught:
        build_dataset(custom(tmp_path / "data", use_subdirs=False, image_channels=5))
    assert len(str(caught.value).splitlines()) == 1


def test_the_check_finds_the_first_file_of_another_type(run, tmp_path):
    fields(tmp_path / "data", a=np.zeros((8, 8), np.uint8), b=FIELD[0])
    words = ("use_subdirs=false", "conditional=false", "image_channels=1", "image_size=8")
    code, said = run(check.main, "--config", "run.py", *words)
    assert code == EXIT_USAGE
    assert "b.npy: holds float32, not uint8; convert it" in said


def test_pictures_of_arrays_are_arrays_in_their_units(tmp_path):
    fields(tmp_path / "data", a=FIELD, b=2 * FIELD)
    fields(tmp_path / "low", a=FIELD.reshape(5, 4, 2, 4, 2).mean((2, 4)))
    fields(tmp_path / "wrong", a=np.zeros((4, 4, 5)))
    settings = dict(use_subdirs=False, image_channels=5, condition_factor=2)
    config = custom(tmp_path / "data", condition="downsample", **settings)
    dataset = build_dataset(config)
    read = partial(read_inputs, config=config, spec=dataset.spec, copies=1, values=dataset.values)
    ours, theirs = (
        planes_at(config, dataset, [0]),
        planes_at(config, read(str(tmp_path / "low")), [0]),
    )
    assert torch.allclose(ours, theirs, atol=1e-6)
    with pytest.raises(DataError, match=r"holds float64, not float32; convert it"):
        read(str(tmp_path / "wrong/a.npy"))
    with pytest.raises(DataError, match=r"condition='mask': a picture with a hole is a PNG"):
        build_dataset(custom(tmp_path / "data", condition="mask", **settings))


def test_pictures_lie_beside_images_of_any_number_of_channels(tmp_path):
    fields(tmp_path / "data", a=FIELD)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8), (0, 128, 255)).save(tmp_path / "pictures/a.png")
    settings = dict(use_subdirs=False, image_channels=5, condition="folder")
    dataset = build_dataset(
        custom(tmp_path / "data", condition_root=str(tmp_path / "pictures"), **settings)
    )
    assert dataset.partners[0][0][:, 0, 0].tolist() == [0, 128, 255]


def test_what_would_stay_in_a_folder_of_images(tmp_path):
    (tmp_path / "000000.npy").touch()
    check_picture_folder(tmp_path, ["000000"], ".npy")
    with pytest.raises(UserError, match=r"000000\.npy"):
        check_picture_folder(tmp_path, ["000000"], ".png")


def test_a_bad_array_is_replaced(tmp_path):
    fields(tmp_path / "data", a=FIELD * np.nan, b=FIELD, c=2 * FIELD)
    config = custom(tmp_path / "data", use_subdirs=False, image_channels=5, on_bad_image="skip")
    dataset = build_dataset(config)
    assert dataset.names == ["b.npy", "b.npy", "c.npy"]
    assert dataset.values[1:] == pytest.approx((2 * FIELD.min(), 2 * FIELD.max()))


# --- quality

OFFSETS = np.array([1.0, -0.5, 0.0, 0.25, -1.0], np.float32).reshape(5, 1, 1)


def spectral_fields(count: int, label: int, rng: np.random.Generator) -> np.ndarray:
    """Gaussian fields (count, 5, 16, 16), correlated with the channels before; the class decides
    how smooth they are."""
    frequency = np.hypot(*np.meshgrid(*[np.fft.fftfreq(16) * 16] * 2))
    white = np.fft.fft2(rng.normal(size=(count, 5, 16, 16)))
    smooth = np.fft.ifft2(white * (1 + frequency) ** (-0.5 - 0.5 * label)).real
    mixing = np.tril(np.ones((5, 5))) / np.sqrt(np.arange(1, 6))[:, None]
    mixed = np.einsum("ij,njhw->nihw", mixing, smooth / smooth.std())
    return mixed.astype(np.float32) + OFFSETS


def statistics(images: np.ndarray) -> list[np.ndarray]:
    """Means and standard deviations (5,) and correlations (5, 5) of the channels."""
    values = images.transpose(1, 0, 2, 3).reshape(5, -1).astype(np.float64)
    return [values.mean(1), values.std(1), np.corrcoef(values)]


@pytest.mark.slow
def test_samples_have_the_statistics_of_the_data(run, tmp_path):
    """Of 500 samples: standard deviations within 5 %, means within a twentieth of one, correlations
    within 0.05. Most values lie in a small part of their range, which the last steps decide."""
    rng, every = np.random.default_rng(0), []
    for label in (0, 1):
        (tmp_path / f"data/class{label}").mkdir(parents=True)
        every.append(spectral_fields(1000, label, rng))
        for i, image in enumerate(every[-1]):
            np.save(tmp_path / f"data/class{label}/{i}.npy", image)
    words = ("max_steps=1000", "batch_size=32", "learning_rate=2e-3", "horizontal_flip=false")
    words += ("model_params.model_channels=24", "model_params.dropout=0", "save_interval=1000")
    words += ("num_timesteps=1000", "ema_decay=0.995", "use_scheduler=true", "cfg_scale=1")
    words += ("process=flow", "prediction_type=v", "sampling_method=heun")
    assert run(train.main, "--config", "run.py", *words, "--device", "cpu")[0] == EXIT_OK
    options = ("--n", 500, "--batch_size", 100, "--npz", "threshold=none")
    checkpoint = ("--checkpoint", "checkpoints/run/current_model.pth", "--device", "cpu")
    options += ("num_inference_steps=12", "timestep_spacing_shift=0.4")
    assert run(sample.main, *checkpoint, *options)[0] == EXIT_OK
    drawn = np.load("samples/samples_500x16x16x5.npz")["arr_0"].transpose(0, 3, 1, 2)
    (mean, std, correlations), ours = statistics(np.concatenate(every)), statistics(drawn)
    assert np.abs(ours[0] - mean).max() < 0.05 * std.min()
    assert np.abs(ours[1] / std - 1).max() < 0.05
    assert np.abs(ours[2] - correlations).max() < 0.05
