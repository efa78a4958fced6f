"""What evaluation is given and cannot use: one line that says so, and the rest goes on."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import edit
import evaluate
import sample
import train
from diffusion import SAMPLERS, make_denoiser, timestep_grid
from generation.sampling import sampling_from
from metrics import reference
from tests.test_diffusion import (
    diffusers_run,
    ideal_denoiser,
    last,
    make_diffusion,
    toy_model,
    zeros_like_noise,
)
from utils.config import Config, warnings_of
from utils.errors import EXIT_OK, EXIT_USAGE, ConfigError, exit_code_of
from utils.labels import NULL_LABEL

DIM = 6


@pytest.fixture
def command(tmp_path, capsys, monkeypatch) -> Callable[..., tuple[int, str]]:
    """Runs a script's main; (exit code, all text). Whatever fails leaves no file behind."""
    monkeypatch.chdir(tmp_path)

    def run(main: Callable[[list[str]], int], *arguments: object) -> tuple[int, str]:
        before = set(tmp_path.rglob("*"))
        capsys.readouterr()
        try:
            code = exit_code_of(lambda: main([str(a) for a in arguments]))
        except SystemExit as error:  # argparse
            code = error.code
        text = "\n".join(capsys.readouterr())
        assert "Traceback" not in text
        if code != EXIT_OK:
            assert set(tmp_path.rglob("*")) == before, "something was written"
        return code, text

    return run


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Six images in an .npz, with classes."""
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "p.npz", arr_0=images, arr_1=np.arange(6) % 2)
    return tmp_path / "p.npz"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    settings = [
        "max_steps=2", "batch_size=8", "image_size=8", "model_params.model_channels=8",
        "model_params.channel_mult=1,2", f"save_dir={folder}", "num_samples=2", "experiment_name=r",
    ]  # fmt: skip
    assert train.main(["--config", "configs/digits_unet.py", "--device", "cpu", *settings]) == 0
    return folder / "r"


# --- weights of metrics


class Dangerous:
    def __reduce__(self):
        return os.mkdir, ("code_was_run",)


def saved(content: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def zipped(kind: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def script() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), buffer)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights"))
    return buffer.getvalue()


def alexnet(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """All the names that LPIPS reads."""
    parts = [f"features.{i}.{kind}" for i in (0, 3, 6, 8, 10) for kind in ("weight", "bias")]
    return {name: torch.zeros(shape, dtype=dtype) for name in parts}


def deflated() -> bytes:
    """A state dict of 64 MB whose zeros are compressed, which torch.save never does."""
    with zipfile.ZipFile(io.BytesIO(saved({"a": torch.zeros(2**24)}))) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    return zipped(zipfile.ZIP_DEFLATED, **parts)


WEIGHTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "error code": (lambda: b"error code: 1020", "text ('error code: 1020'"),
    "rate limit": (lambda: b"rate limit exceeded\n", "text ('rate limit exceeded'"),
    "json": (lambda: b'{"message": "Not Found"}', "text ("),
    "digits": (lambda: b"404", "text ("),
    "web page": (lambda: b"\n <!DOCTYPE html><html></html>", "a web page"),
    "LFS pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "empty": (bytes, "cannot be read"),
    "one byte": (lambda: b"\x80", "cannot be read"),
    "zeros": (lambda: bytes(3000), "cannot be read"),
    "random": (lambda: np.random.default_rng(1).bytes(3000), "cannot be read"),
    "UTF-16 text": (lambda: "service unavailable".encode("utf-16"), "cannot be read"),
    "another zip": (lambda: zipped(a=b"text"), "cannot be read"),
    "empty zip": (zipped, "cannot be read"),
    "npz": (lambda: zipped(**{"arr_0.npy": b"\x93NUMPY"}), "cannot be read"),
    "tar": (tarred, "cannot be read"),
    "cut off": (lambda: saved({"a": torch.zeros(999)})[:900], "cannot be read"),
    "code": (lambda: saved(Dangerous()), "more in it than tensors"),
    "code, old format": (lambda: pickle.dumps(Dangerous()), "more in it than tensors"),
    "code among tensors": (
        lambda: saved(
            {"a": torch.zeros(1), "b": Dangerous()}, _use_new_zipfile_serialization=False
        ),
        "more in it than tensors",
    ),
    "TorchScript": (script, "cannot be read"),
    "deflated zeros": (deflated, "compressed"),
    "one number many times": (lambda: saved({"a": torch.zeros(1).expand(2**36)}), "has 4 bytes"),
    "list": (lambda: saved([torch.zeros(2)]), "not a state dict"),
    "one tensor": (lambda: saved(torch.zeros(2)), "not a state dict"),
    "strings": (lambda: saved({"features.0.weight": "abc"}), "not a state dict"),
    "numbers": (lambda: saved({1: 2}), "not a state dict"),
    "nested": (lambda: saved({"state_dict": {"a": torch.zeros(1)}}), "not a state dict"),
    "not finite": (lambda: saved({"a": torch.tensor([0.0, torch.nan])}), "not a state dict"),
    "other names": (lambda: saved({"a": torch.zeros(1)}), "does not fit"),
    "names that are no text": (lambda: saved({7: torch.zeros(1)}), "does not fit"),
    "shapes that would be repeated": (lambda: saved(alexnet(1)), "does not fit"),
    "no shapes": (lambda: saved(alexnet()), "does not fit"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_whatever_is_named_as_weights_costs_its_metrics_alone(name, pictures, command):
    make, message = WEIGHTS[name]
    path = pictures.with_name("w.pth")
    path.write_bytes(make())
    flags = ["--inception_weights", path, "--lpips_weights", path, "--device", "cpu"]
    code, text = command(
        evaluate.main, "--images", pictures, "--metrics", "is,lpips,sanity", *flags
    )
    assert code == EXIT_OK, text
    entries = json.loads((pictures.parent / "p_eval/report.json").read_text())["metrics"]
    assert [entry["status"] for entry in entries.values()] == ["skipped", "skipped", "ok"]
    for kind in ("is", "lpips"):
        reason = entries[kind]["reason"]
        assert message in reason
        assert "\n" not in reason
        assert "weights_only" not in reason, "torch's advice to load it unsafely"
        assert "put it at" in reason
    assert not Path("code_was_run").exists()


@pytest.mark.parametrize("kind", ["folder", "absent", "pipe", "unreadable name"])
def test_what_is_no_file_is_named(kind, pictures, command):
    path = pictures.with_name("w\n.pth" if kind == "unreadable name" else "w.pth")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    arguments = ["--metrics", "is,sanity", "--inception_weights", path]
    code, _ = command(evaluate.main, "--images", pictures, *arguments)
    assert code == EXIT_OK
    reason = json.loads((pictures.parent / "p_eval/report.json").read_text())
    reason = reason["metrics"]["is"]["reason"]
    assert "no such file" in reason
    assert "\n" not in reason


# --- statistics of real images


def gaussian(**changes: object) -> dict[str, object]:
    return {"mu": np.zeros(DIM), "sigma": np.eye(DIM)} | changes


def square(*entries: tuple[int, int, complex], kind: type = float) -> np.ndarray:
    sigma = np.eye(DIM, dtype=kind)
    for row, column, value in entries:
        sigma[row, column] = value
    return sigma


REFERENCES: dict[str, tuple[dict[str, object] | bytes, str]] = {
    "NaN in mu": (gaussian(mu=np.full(DIM, np.nan)), "not finite"),
    "infinity in sigma": (gaussian(sigma=square((2, 2, np.inf))), "not finite"),
    "not symmetric": (gaussian(sigma=square((0, 1, 0.5))), "not symmetric"),
    "antisymmetric": (gaussian(sigma=square((0, 1, 0.5), (1, 0, -0.5))), "not symmetric"),
    "negative variance": (gaussian(sigma=square((3, 3, -1))), "the eigenvalue -1"),
    "negative eigenvalue": (gaussian(sigma=square((0, 1, 2), (1, 0, 2))), "the eigenvalue -1"),
    "a root of it": (gaussian(sigma=np.triu(np.ones((DIM, DIM)))), "not symmetric"),
    "complex": (gaussian(sigma=square(kind=complex)), "no real numbers"),
    "complex mu": (gaussian(mu=np.zeros(DIM, complex)), "no real numbers"),
    "text": (gaussian(mu=np.array(["0"] * DIM)), "no real numbers"),
    "flags": (gaussian(sigma=np.eye(DIM, dtype=bool)), "no real numbers"),
    "dates": (gaussian(mu=np.zeros(DIM, "M8[s]")), "no real numbers"),
    "column": (gaussian(mu=np.zeros((DIM, 1))), "not of 6 features"),
    "one number": (gaussian(mu=np.float64(0)), "not of 6 features"),
    "a deviation each": (gaussian(sigma=np.ones(DIM)), "not of 6 features"),
    "another network": (gaussian(mu=np.zeros(4), sigma=np.eye(4)), "not of 6 features"),
    "meta is a list": (gaussian(meta="[1]"), "no JSON object"),
    "meta is deep": (gaussian(meta="[" * 9999), "cannot be read"),
    "no images": (gaussian(num_images=0), "below 2"),
    "fewer than no images": (gaussian(num_images=-5), "below 2"),
    "infinitely many images": (gaussian(num_images=np.inf), "cannot be read"),
    "several numbers of images": (gaussian(num_images=[5, 6]), "cannot be read"),
    "objects": (gaussian(mu=np.array([{}] * DIM, object)), "could run code"),
    "only mu": ({"mu": np.zeros(DIM)}, "no array sigma"),
    "images": ({"arr_0": np.zeros((2, 8, 8, 1), np.uint8)}, "no array mu or sigma"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "web page": (b"<html>404</html>", "a web page"),
    "text file": (b"rate limit exceeded", "text ("),
    "pickle": (pickle.dumps(Dangerous()), "no .npz file"),
    "empty": (b"", "no .npz file"),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_what_is_no_mean_and_covariance_is_refused(name, pictures, command, monkeypatch):
    content, message = REFERENCES[name]
    path = pictures.with_name("r.npz")
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    monkeypatch.setitem(reference.GIVEN, "fid", (DIM, ""))
    arguments = ["--metrics", "fid,sanity", "--reference", path]
    code, text = command(evaluate.main, "--images", pictures, *arguments)
    assert code == EXIT_USAGE
    (line,) = text.strip().splitlines()
    assert line.startswith(f"error: --reference {path}: ")
    assert message in line
    assert "allow_pickle" not in line


def rounded(sigma: np.ndarray) -> np.ndarray:
    return sigma.astype(np.float32)


@pytest.mark.parametrize(
    "arrays",
    [
        gaussian(mu=np.zeros((1, DIM))),
        gaussian(mu=np.zeros(DIM, ">f8"), sigma=np.eye(DIM, dtype=">f4")),
        gaussian(mu=np.zeros(DIM, int), sigma=np.eye(DIM, dtype=np.float16)),
        gaussian(sigma=np.zeros((DIM, DIM))),
        gaussian(sigma=rounded(np.cov(np.random.default_rng(0).normal(size=(DIM, 3))))),
        gaussian(mu_s=np.zeros(9), sigma_s=np.eye(9), arr_0=np.zeros((2, 4, 4, 3), np.uint8)),
    ],
    ids=["mu (1, D)", "big-endian", "integers", "constant", "singular float32", "ADM's arrays"],
)
def test_others_statistics_are_taken(arrays, tmp_path):
    np.savez(tmp_path / "r.npz", **arrays)
    taken = reference.read_reference(tmp_path / "r.npz", DIM)
    assert taken.mu.shape == (DIM,)
    assert taken.sigma.dtype == torch.float64


# --- an older report


REPORTS = [
    "", "null", "[]", "3", '"text"', "{}", '{"metrics": null}', '{"metrics": []}',
    '{"metrics": {}, "sweep": []}', '{"metrics": {"sanity": null}}', '{"metrics": {"sanity": 1}}',
    '{"metrics": {"sanity": [1]}}', '{"metrics": {"sanity": {"value": "1"}}}',
    '{"metrics": {"sanity": {"value": true}}}', '{"metrics": {"sanity": {"value": [1]}}}',
    '{"metrics": {"sanity": {"value": NaN}}}', '{"metrics": {"sanity": {"value": -Infinity}}}',
    '{"metrics": {"sanity": {"value": 1e308}}}', '{"metrics": {"sanity": {"value": 1' + "0" * 999,
    '{"metrics": {"sanity": {"value": 1' + "0" * 999 + "}}}", "[" * 100_000, "\ufeff{}",
    "<html>404</html>", "\0",
]  # fmt: skip


@pytest.mark.parametrize("text", REPORTS, ids=range(len(REPORTS)))
def test_what_is_no_report_is_refused_before_anything_is_scored(text, pictures, command):
    path = pictures.with_name("old.json")
    path.write_text(text, encoding="utf-8")
    arguments = ["--metrics", "sanity", "--compare", path]
    code, printed = command(evaluate.main, "--images", pictures, *arguments)
    assert code == EXIT_USAGE
    (line,) = printed.strip().splitlines()
    assert line.startswith(f"error: --compare {path}: ")


@pytest.mark.parametrize(
    "entry",
    [
        {"value": None},
        {"value": 1, "n": [1], "n_real": {}, "extractor": {"key": []}, "k": "5"},
        {"value": 0.5, "classifier": 3, "num_pairs": {"key": None}},
    ],
)
def test_odd_but_whole_reports_are_compared(entry, pictures, command):
    path = pictures.with_name("old.json")
    path.write_text(json.dumps({"metrics": {"sanity": entry, "another": {"value": 3}}}))
    arguments = ["--metrics", "sanity", "--compare", path]
    assert command(evaluate.main, "--images", pictures, *arguments)[0] == EXIT_OK


# --- options that have no effect


@pytest.mark.parametrize("method", [name for name, s in SAMPLERS.items() if "eta" not in s.options])
@pytest.mark.parametrize("eta", ["0", "1"])
def test_an_option_that_the_sampler_does_not_take_is_refused(method, eta, run_dir, command):
    sampled = [(sample.main, []), (evaluate.main, ["--num_samples", 2]), (edit.main, ["grid"])]
    for main, first in sampled:
        arguments = [*first, "--checkpoint", run_dir, "--sampling_method", method]
        code, text = command(main, *arguments, "--ddim_eta", eta)
        assert code == EXIT_USAGE
        assert f"error: --ddim_eta {eta}: {method} takes none; use ddim" in text
        assert command(main, *arguments, "--dry_run")[0] == EXIT_OK


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        (["ddim_eta=1", "sampling_method=dpmpp_2m"], True),
        (["ddim_eta=1", "--sampling_method", "ddpm"], True),
        (["--set", "ddim_eta=1", "--set", "sampling_method=ddpm"], True),
        (["ddim_eta=1", "sampling_method=ddpm", "--sampling_method", "ddim"], False),
        (["sampling_method=dpmpp_2m"], False),
        (["cfg_scale=3", "cfg_interval=0.2,0.8"], False),
    ],
)
def test_a_config_key_on_the_command_line_without_effect_is_told(options, warned, run_dir, command):
    code, text = command(sample.main, "--checkpoint", run_dir, *options, "--dry_run")
    assert code == EXIT_OK
    assert ("ddim_eta has no effect without sampling_method='ddim'" in text) == warned
    assert text.count("has no effect") == warned


def test_an_option_without_effect_is_told():
    config = Config(sampling_method="dpmpp_2m", ddim_eta=0.5)
    (warning,) = warnings_of(config)
    assert warning == "ddim_eta has no effect without sampling_method='ddim'"
    with pytest.raises(ConfigError, match="dpmpp_2m takes none; use ddim, or leave it out"):
        sampling_from(config, eta=0.5)
    assert warnings_of(Config(sampling_method="ddim", ddim_eta=0.5)) == []


@pytest.mark.parametrize(
    "metrics", ["", ",", "fid,,is", "FID", "fid is", "all,fid", "fid;is", "\n"]
)
def test_metric_names_that_are_none(metrics, pictures, command):
    code, text = command(evaluate.main, "--images", pictures, "--metrics", metrics)
    assert code == EXIT_USAGE
    assert "is not a metric" in text


def test_metric_names_may_repeat_and_have_spaces(pictures, command):
    code, text = command(evaluate.main, "--images", pictures, "--metrics", " sanity , sanity")
    assert code == EXIT_OK
    assert text.count("sanity: nothing to download") == 1


# --- little to compare with


def write_classes(folder: Path, sizes: list[int], side: int) -> Path:
    rng = np.random.default_rng(0)
    for k, size in enumerate(sizes):
        (folder / f"class{k}").mkdir(parents=True)
        for i in range(size):
            shades = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(shades).save(folder / f"class{k}/{i}.png")
    return folder


@pytest.mark.parametrize(
    ("sizes", "side", "num_real", "message"),
    [
        ([1, 1, 1], 1, None, None),
        ([4, 3], 1, 1, "at least 2 real train images"),
        ([5], 8, None, "only one class"),
        ([1, 1], 8, None, None),
    ],
    ids=["1 x 1 pixels", "one real image", "one class", "an image a class"],
)
def test_few_or_small_images_end_in_a_report(sizes, side, num_real, message, tmp_path, command):
    real = write_classes(tmp_path / "real", sizes, side)
    images = write_classes(tmp_path / "images", sizes, side)
    arguments = ["--images", images, "--reference", real, "--device", "cpu"]
    arguments += ["--metrics", "class_acc,fd_domain,prdc_domain,memorization,sanity"]
    arguments += [] if num_real is None else ["--num_real", num_real]
    code, text = command(evaluate.main, *arguments)
    assert code == EXIT_OK, text
    entries = json.loads((tmp_path / "images_eval/report.json").read_text())["metrics"]
    reasons = [entry["reason"] for entry in entries.values() if entry["reason"]]
    assert not any("Error:" in reason and "ValueError" not in reason for reason in reasons), reasons
    assert message is None or any(message in reason for reason in reasons), reasons
    assert entries["sanity"]["status"] == "ok"


@pytest.mark.parametrize("option", ["--num_real", "--repeats", "--num_samples", "--batch_size"])
@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", ""])
def test_counts_are_counts(option, value, run_dir, command):
    code, text = command(evaluate.main, "--checkpoint", run_dir, option, value)
    assert code == EXIT_USAGE
    assert option in text


@pytest.mark.parametrize("label", [-1, 2, 10**12, 0.5, np.nan])
def test_classes_that_the_real_images_do_not_have(label, tmp_path, command):
    real = write_classes(tmp_path / "real", [3, 3], 8)
    images = np.zeros((4, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "p.npz", arr_0=images, arr_1=np.array([0, 1, 0, label]))
    arguments = ["--images", tmp_path / "p.npz", "--reference", real, "--metrics", "class_acc"]
    code, text = command(evaluate.main, *arguments)
    assert code == EXIT_USAGE
    assert f"error: {tmp_path / 'p.npz'}: " in text


# --- guidance and samplers


@pytest.mark.parametrize("t", [0, 10, 20, 50, 80, 81, 99])
def test_scale_0_is_unconditional_inside_and_outside_an_interval(t):
    diffusion, calls = make_diffusion(), []

    def model(x, times, y):
        calls.append(y.tolist())
        return toy_model(x, times, y)

    x, y = torch.randn(3, 1, 4, 4), torch.tensor([0, 1, 2])
    plain, within = (
        make_denoiser(diffusion, model, y, cfg_scale=0.0, cfg_interval=interval)(x, t)
        for interval in (None, (0.2, 0.8))
    )
    assert torch.equal(plain.x_0, within.x_0)
    assert calls == [[NULL_LABEL] * 3] * 2


def gaussian_error(name: str, spacing: str, steps: int, schedule: str, std: float) -> float:
    """How far from its exact deviation the sampler ends on Gaussian data, from x_T = 1."""
    diffusion = make_diffusion(schedule, 1000)
    grid = timestep_grid(1000, steps, spacing)
    a = diffusion.levels(grid[0])[0] ** 2
    exact = std / (a * std**2 + 1 - a) ** 0.5
    denoise = ideal_denoiser(diffusion, mean=0.0, std=std)
    x_T = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    return abs(last(SAMPLERS[name].run(denoise, x_T, diffusion, grid, None)).item() - exact)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [5, 10, 20, 25, 50])
def test_second_order_is_no_worse_than_ddim_with_any_spacing(spacing, schedule, steps):
    second, first = (
        gaussian_error(name, spacing, steps, schedule, 0.5) for name in ("dpmpp_2m", "ddim")
    )
    assert second < first


def test_a_jump_to_0_is_of_first_order_as_in_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        100, 1e-4, 0.02, timestep_spacing="linspace", final_sigmas_type="sigma_min"
    )
    diffusion = make_diffusion()
    denoise = make_denoiser(diffusion, toy_model, None, threshold="none")
    x_T = torch.randn(4, 1, 4, 4, generator=torch.manual_seed(0))
    expected = diffusers_run(scheduler, toy_model, x_T, 10)  # below 15 steps: lower_order_final
    grid = [*scheduler.timesteps.tolist(), 0]
    steps = SAMPLERS["dpmpp_2m"].run(denoise, x_T, diffusion, grid, zeros_like_noise)
    (at_0,) = [step.x for step in steps if step.t == 0]
    torch.testing.assert_close(at_0, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [3, 7, 20, 50, 67, 75, 100])
def test_trailing_takes_the_second_order_at_every_step_but_two(steps):
    """Also where so many steps end at 0: from 1 or 2 it is no jump."""
    diffusion, weights = make_diffusion(), []
    grid = timestep_grid(100, steps, "trailing")

    def denoise(x, t):  # x_0 is t itself: what a step adds tells which slope it took
        return diffusion.with_x_0(torch.full_like(x, t), x, torch.full((len(x),), t))

    run = SAMPLERS["dpmpp_2m"].run
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for (t, s), step in zip(
        itertools.pairwise(grid), run(denoise, x, diffusion, grid, None), strict=False
    ):
        a_t, a_s = diffusion.levels(t)[0] ** 2, diffusion.levels(s)[0] ** 2
        ratio = ((1 - a_s) / (1 - a_t)) ** 0.5
        slope = (step.x - ratio * x) / (a_s**0.5 - ratio * a_t**0.5)
        weights.append(slope.item() - t)
        x = step.x
    assert weights[0] == pytest.approx(0, abs=1e-6)
    assert all(weight < -0.1 for weight in weights[1:])
