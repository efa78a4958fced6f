"""export.py: what arrives elsewhere computes what it computed here, or it is refused in a line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import export
import models
import sample
import train
from diffusion import SCHEDULES, build_process, make_denoiser, timestep_grid
from diffusion.ddim import ddim
from exporting import diffusers_pipeline
from exporting.diffusers_pipeline import ddim_scheduler_config
from exporting.diffusers_unet import module_names, to_unet2d, unet2d_config
from generation.run import CONFIG_CHECKS, expected_spec, load_run
from generation.sampling import Sampling, sample_steps, sampling_from
from metrics.report import build_report, save_report
from tests.conftest import ROOT
from training.pretrained import load_initial_weights
from utils.checkpoint import load_checkpoint, load_weights, save_checkpoint
from utils.config import Config, load_config
from utils.errors import EXIT_OK, CheckpointError, ConfigError, UserError
from utils.files import file_sha256
from utils.images import ImageSpec, to_uint8
from utils.rng import sample_noise

CPU = torch.device("cpu")
DIGITS = ImageSpec(1, 8, 8, 10)
SMALLEST = dict(model_channels=128, channel_mult=(1,), num_res_blocks=1, num_head_channels=64)
TINY = {
    "unet": dict(model_channels=8, channel_mult=(1, 2), num_res_blocks=1),
    "dit": dict(patch_size=4, hidden_size=16, depth=1, num_heads=2),
    "jit": dict(patch_size=4, hidden_size=16, depth=1, num_heads=2),
    "dim": dict(patch_size=4, hidden_size=16, depth=1, state_size=4),
}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def moved(model, amount=0.02):
    """The model with every parameter off its start: no zeros, no norms that do nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += amount * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def write_checkpoint(spec=DIGITS, *, model_params=SMALLEST, **settings) -> Path:
    """A checkpoint without training, its raw and its averaged weights different ones."""
    options = dict(dataset="digits", image_size=(8, 8), conditional=True, num_timesteps=100)
    options |= dict(experiment_name="made", num_inference_steps=10)
    config = Config(**{**options, "model_params": model_params, **settings})
    state = dict(format_version=1, epoch=2, step=7, config=config.to_dict(), spec=tuple(spec))
    for key, amount in (("model_state_dict", 0.02), ("ema_model_state_dict", 0.03)):
        state[key] = moved(models.build_model(config, spec), amount).state_dict()
    save_checkpoint(Path("made.pth"), state)
    return Path("made.pth")


def run_export(checkpoint, file_format, output, *options) -> int:
    command = ["--checkpoint", checkpoint, "--format", file_format, "--output", output]
    return export.main([str(word) for word in (*command, "--device", "cpu", *options)])


def run_printed(folder: str, monkeypatch, where, name: str, x_T) -> dict:
    """Run the code of the folder's README.md as it is printed, but for its noise, which
    `where.name` draws; returns its variables."""
    (code,) = re.findall(r"```python\n(.*?)```", Path(folder, "README.md").read_text(), re.DOTALL)
    variables: dict = {}
    with monkeypatch.context() as patch:
        patch.setattr(where, name, lambda *_, **__: x_T.clone())
        exec(code, variables)
    return variables


def our_images(run, seeds, labels) -> torch.Tensor:
    """What sample.py draws, before it becomes 8-bit."""
    with torch.inference_mode():
        *_, last = sample_steps(run, seeds, labels, sampling_from(run.config, "ddim"), CPU)
    return last.x


def as_arrays(pictures) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in pictures])


def assert_same_pictures(pictures, images):
    """diffusers rounds where we truncate at x.5: one grey level of 256."""
    ours = to_uint8(images).permute(0, 2, 3, 1).squeeze(-1).numpy().astype(int)
    assert np.abs(ours - as_arrays(pictures)).max() <= 1


# --- the network ---------------------------------------------------------------------------------


def random_network(seed: int):
    """A UNet with a counterpart, and the images it is for."""
    generator = np.random.default_rng(seed)

    def one_of(*values):
        return values[generator.integers(len(values))]

    size = one_of((8, 8), (8, 16), (16, 8))
    levels = one_of(1, 2, 3)
    sides = [8 // 2**level for level in range(levels)]
    spec = ImageSpec(one_of(1, 3), *size, one_of(0, 3))
    params = dict(
        model_channels=128,
        channel_mult=(1, *(int(m) for m in generator.integers(1, 3, levels - 1))),
        num_res_blocks=one_of(1, 2),
        attention_resolutions=tuple(side for side in sides if generator.random() < 0.5),
        use_attention=generator.random() < 0.8,
        num_head_channels=one_of(32, 64, 128, 300),
        use_scale_shift_norm=one_of(False, True),
    )
    return spec, params


@pytest.mark.parametrize("seed", range(10))
def test_networks_are_equal(seed):
    pytest.importorskip("diffusers")
    spec, params = random_network(seed)
    config = Config(experiment_name="x", conditional=spec.num_classes > 0, model_params=params)
    ours = moved(models.build_model(config, spec))
    theirs = to_unet2d(ours, unet2d_config(ours, config, spec))
    t = torch.tensor([0, 1, 500, 999])
    x = torch.randn(len(t), *spec.shape, generator=torch.Generator().manual_seed(seed))
    y = torch.tensor([-1, 0, 1, 2]) if spec.num_classes else None
    with torch.inference_mode():
        expected = ours(x, t, y)
        got = theirs(x, t, None if y is None else y + 1).sample
    assert expected.abs().max() > 0.1, "the comparison would say nothing"
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * max(1, expected.abs().max()))


def test_random_networks_have_every_option():
    drawn = [random_network(seed) for seed in range(10)]
    specs, params = [spec for spec, _ in drawn], [params for _, params in drawn]
    assert {spec.channels for spec in specs} == {1, 3}
    assert {spec.num_classes for spec in specs} == {0, 3}
    assert {spec.height > spec.width for spec in specs} == {True, False}
    assert {spec.height < spec.width for spec in specs} == {True, False}
    assert {len(p["channel_mult"]) for p in params} == {1, 2, 3}
    assert {p["use_scale_shift_norm"] for p in params} == {True, False}
    assert {p["use_attention"] for p in params} == {True, False}
    assert {p["num_res_blocks"] for p in params} == {1, 2}
    assert len({p["num_head_channels"] for p in params}) == 4
    attended = {len(p["attention_resolutions"]) for p in params if p["use_attention"]}
    assert attended >= {0, 1}
    assert max(attended) > 1


def test_no_two_modules_get_one_name():
    names = [name for found in module_names(3, 2).values() for name in found]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("config_file", "overrides", "num_groups"),
    [
        ("cifar10_unet.py", [], 32),
        ("cifar100_unet.py", [], 32),
        ("celeba_unet.py", [], 32),
        ("flowers102_unet.py", [], 32),
        ("digits_unet.py", ["model_params.norm_groups=8"], 8),
        ("mnist_unet.py", ["model_params.norm_groups=8"], 8),
        ("custom_folder.py", ["model_params.norm_groups=8"], 8),
    ],
)
def test_which_configs_have_a_counterpart(config_file, overrides, num_groups):
    path = ROOT / "configs" / config_file
    config = load_config(path, overrides, checks=CONFIG_CHECKS)
    spec = expected_spec(config)
    with torch.device("meta"):
        model = models.build_model(config, spec, torch.device("meta"))
    assert unet2d_config(model, config, spec)["norm_num_groups"] == num_groups


def test_a_narrow_network_with_one_number_of_groups_is_the_same_in_diffusers():
    pytest.importorskip("diffusers")
    params = TINY["unet"] | {"norm_groups": 4}
    config = Config(conditional=True, model_params=params)
    spec = ImageSpec(1, 8, 8, 10)
    ours = moved(models.build_model(config, spec))
    theirs = to_unet2d(ours, unet2d_config(ours, config, spec))
    x, t, y = torch.randn(3, *spec.shape), torch.tensor([0, 3, 9]), torch.tensor([-1, 0, 9])
    with torch.no_grad():
        torch.testing.assert_close(theirs(x, t, y + 1).sample, ours(x, t, y), atol=1e-5, rtol=1e-5)


# --- the sampler ---------------------------------------------------------------------------------


def toy_model(x, t, y=None):
    """A smooth function of everything, out of [-1, 1] here and there."""
    return 1.5 * torch.sin(2 * x + 0.01 * t.reshape(-1, 1, 1, 1)) + 0.1 * x.roll(1, -1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction_type", ["eps", "x_0", "v"])
@pytest.mark.parametrize("threshold", ["static", "dynamic", "none"])
@pytest.mark.parametrize(("spacing", "steps"), [("trailing", 10), ("leading", 7)])
def test_schedulers_take_the_same_steps(schedule, prediction_type, threshold, spacing, steps):
    diffusers = pytest.importorskip("diffusers")
    config = Config(
        num_timesteps=100,
        beta_start=1e-3,
        beta_end=0.1,
        beta_schedule=schedule,
        prediction_type=prediction_type,
    )
    diffusion = build_process(config)
    sampling = Sampling("ddim", steps, 0.5, 1.0, None, threshold, spacing, False)
    scheduler = diffusers.DDIMScheduler(**ddim_scheduler_config(config, sampling))
    scheduler.set_timesteps(steps)
    grid = timestep_grid(100, steps, spacing)
    assert scheduler.timesteps.tolist() == grid

    generator = torch.Generator().manual_seed(0)
    x_T, *noise = torch.randn(steps + 1, 4, 3, 8, 8, generator=generator)
    denoise = make_denoiser(diffusion, toy_model, None, threshold=threshold)
    draws = iter(noise)
    *_, last = ddim(denoise, x_T, diffusion, grid, lambda _: next(draws), eta=0.5)
    x = x_T
    for t, drawn in zip(scheduler.timesteps, noise, strict=True):
        options = dict(eta=0.5, use_clipped_model_output=True, variance_noise=drawn)
        x = scheduler.step(toy_model(x, t), t, x, **options).prev_sample
    scale = last.x.abs().max().clamp(min=1)
    assert (x - last.x).abs().max() / scale < 1e-4


# --- from the command line -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A few steps of training on digits, classes and all, in images twice as wide as high."""
    folder = tmp_path_factory.mktemp("runs")
    settings = [
        "image_size=8,16", "model_params.model_channels=128", "model_params.channel_mult=1,1",
        "model_params.attention_resolutions=4,", "model_params.num_head_channels=32",
        "max_steps=6", "batch_size=16", "num_samples=2", "num_inference_steps=20",
        f"save_dir={folder}", "experiment_name=run",
    ]  # fmt: skip
    config = str(ROOT / "configs/digits_unet.py")
    assert train.main(["--config", config, "--device", "cpu", *settings]) == EXIT_OK
    return folder / "run"


@pytest.mark.slow
@pytest.mark.ci
def test_the_printed_code_draws_our_images(trained, script, monkeypatch):
    pytest.importorskip("diffusers")
    done = script(
        "export.py", "--checkpoint", trained, "--format", "diffusers", "--output", "digits"
    )
    assert done.returncode == EXIT_OK, done.output
    assert sorted(path.name for path in Path().iterdir()) == ["digits"]
    kept = "".join(path.read_text() for path in Path("digits").rglob("*.json"))
    assert str(trained.parent) not in kept, "paths of this machine"

    run = load_run(trained, CPU)
    seeds, labels = list(range(10)), list(range(10))
    x_T = sample_noise(seeds, CPU)((10, *run.spec.shape))
    names = run_printed("digits", monkeypatch, torch, "randn", x_T)
    images = our_images(run, seeds, labels)
    assert (images.abs() < 0.99).float().mean() > 0.2, "the comparison would say little"
    assert (names["x"] - images).abs().max() < 1e-4
    assert_same_pictures(names["images"], images)

    with pytest.raises(ValueError, match="class_labels"):  # as the page says
        names["pipe"]()


def test_the_printed_code_for_models_without_classes(monkeypatch):
    pytest.importorskip("diffusers")
    from diffusers.pipelines.ddim import pipeline_ddim

    path = write_checkpoint(conditional=False, timestep_spacing="leading", num_inference_steps=7)
    assert run_export(path, "diffusers", "out") == EXIT_OK
    run = load_run(path, CPU)
    x_T = sample_noise(list(range(16)), CPU)((16, *run.spec.shape))
    names = run_printed("out", monkeypatch, pipeline_ddim, "randn_tensor", x_T)
    images = our_images(run, list(range(16)), None)
    assert_same_pictures(names["images"], images)
    monkeypatch.setattr(pipeline_ddim, "randn_tensor", lambda *_, **__: x_T)
    options = dict(num_inference_steps=7, batch_size=16, use_clipped_model_output=True)
    theirs = names["pipe"](**options, output_type="pt").images
    assert (theirs - (images / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-4


def test_the_printed_code_guides_in_the_interval(monkeypatch):
    pytest.importorskip("diffusers")
    path = write_checkpoint(cfg_scale=3.0, cfg_interval=(0.2, 0.6), threshold="dynamic")
    assert run_export(path, "diffusers", "out") == EXIT_OK
    run = load_run(path, CPU)
    x_T = sample_noise(list(range(10)), CPU)((10, *run.spec.shape))
    names = run_printed("out", monkeypatch, torch, "randn", x_T)
    assert (names["x"] - our_images(run, list(range(10)), list(range(10)))).abs().max() < 1e-4


def test_the_page_says_when_no_class_was_never_trained():
    pytest.importorskip("diffusers")
    assert run_export(write_checkpoint(cfg_dropout_prob=0.0), "diffusers", "out") == EXIT_OK
    card = Path("out/README.md").read_text()
    assert "leave `scale` at 1" in card
    assert "scale = 1.0\n" in card


@pytest.mark.parametrize("option", [[], ["--no_ema"]])
def test_both_formats_take_the_weights_asked_for(option):
    pytest.importorskip("diffusers")
    from diffusers import UNet2DModel

    path = write_checkpoint()
    state = load_checkpoint(path)["model_state_dict" if option else "ema_model_state_dict"]
    assert run_export(path, "safetensors", "w.safetensors", *option) == EXIT_OK
    assert run_export(path, "diffusers", "out", *option) == EXIT_OK
    theirs = UNet2DModel.from_pretrained("out/unet").state_dict()
    assert torch.equal(theirs["conv_in.weight"], state["stem.weight"])
    loaded = load_run("w.safetensors", CPU)
    assert loaded.ema == (not option)
    assert torch.equal(loaded.model.state_dict()["stem.weight"], state["stem.weight"])


# --- safetensors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", TINY)
def test_weights_come_back_bit_for_bit(model_type, monkeypatch):
    pytest.importorskip("safetensors")
    path = write_checkpoint(model_type=model_type, model_params=TINY[model_type])
    assert run_export(path, "safetensors", "w.safetensors") == EXIT_OK
    before = load_run(path, CPU)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    after = load_run("w.safetensors", CPU)
    old, new = before.model.state_dict(), after.model.state_dict()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert after.config == before.config
    facts = [(run.spec, run.step, run.epoch, run.ema) for run in (before, after)]
    assert facts[0] == facts[1] == (DIGITS, 7, 2, True)
    seeds, labels = [3, 4], [0, 9]
    assert torch.equal(our_images(before, seeds, labels), our_images(after, seeds, labels))


@pytest.mark.parametrize(
    "settings", [{}, {"model_type": "dim"}, {"condition": "downsample", "condition_factor": 2}]
)
def test_16_bit_weights_are_the_rounded_ones_in_half_the_size(settings, capsys):
    safetensors = pytest.importorskip("safetensors")
    model_params = TINY[settings.get("model_type", "unet")]
    path = write_checkpoint(model_params=model_params, **settings)
    for name, options in (("full", []), ("half", ["--dtype", "float16"])):
        assert run_export(path, "safetensors", f"{name}.safetensors", *options) == EXIT_OK
    assert run_export("half.safetensors", "safetensors", "again.safetensors") == EXIT_OK
    full, half, again = (load_run(f"{n}.safetensors", CPU) for n in ("full", "half", "again"))
    for name, weight in half.model.state_dict().items():
        assert torch.equal(weight, full.model.state_dict()[name].half().float())
        assert torch.equal(weight, again.model.state_dict()[name])
    fresh = models.build_model(half.config, half.spec)
    started = half.config.model_copy(update={"init_from": "half.safetensors"})
    load_initial_weights(fresh, started)
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in half.model.state_dict().items())
    with safetensors.safe_open("half.safetensors", framework="pt") as file:
        assert all(file.get_tensor(name).dtype == torch.float16 for name in file.keys())  # noqa: SIM118
        assert json.loads(file.metadata()["dtype"]) == "float16"

    said = re.findall(
        r"([\d.]+) MB, (float\d+); network outputs differ by (\S+) of", capsys.readouterr().out
    )
    assert [dtype for _, dtype, _ in said] == ["float32", "float16", "float32"]
    assert float(said[1][0]) == pytest.approx(float(said[0][0]) / 2, abs=0.01)
    assert said[0][2] == said[2][2] == "0.0e+00"
    assert 1e-5 < float(said[1][2]) < 1e-2
    assert f"by at most {said[1][2]} of" in Path("half.md").read_text()
    assert "16 bits" not in Path("full.md").read_text()

    whole = bytearray(Path("half.safetensors").read_bytes())
    whole[-1] ^= 1
    Path("half.safetensors").write_bytes(whole)
    with pytest.raises(CheckpointError, match="damaged"):
        load_run("half.safetensors", CPU)


def test_what_16_bits_cannot_hold_is_refused():
    path = write_checkpoint(model_params=TINY["unet"])
    half = "--dtype", "float16"
    assert_refused(ConfigError, "^--dtype float16: for --format saf", path, "diffusers", "o", *half)
    state = load_checkpoint(path)
    state["ema_model_state_dict"]["label_embedding.table.weight"][9, 3] = 7e4
    save_checkpoint(path, state)
    message = r"^--dtype float16: label_embedding\.table\.weight has values beyond 65504; leave"
    assert_refused(UserError, message, path, "safetensors", "w.safetensors", *half)


def test_class_names_go_along():
    pytest.importorskip("safetensors")
    path = write_checkpoint(model_params=TINY["unet"])
    names = tuple("abcdefghij")
    save_checkpoint(path, load_checkpoint(path) | {"class_names": names})
    assert run_export(path, "safetensors", "w.safetensors") == EXIT_OK
    assert load_run("w.safetensors", CPU).class_names == names


def test_the_metadata_is_json():
    safetensors = pytest.importorskip("safetensors")
    path = write_checkpoint(model_params=TINY["unet"])
    assert run_export(path, "safetensors", "w.safetensors") == EXIT_OK
    assert Path("w.safetensors").stat().st_mode == path.stat().st_mode
    with safetensors.safe_open("w.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["config"])["experiment_name"] == "made"
    assert json.loads(metadata["spec"]) == [1, 8, 8, 10]
    assert json.loads(metadata["step"]) == 7


def test_sample_draws_from_the_file():
    pytest.importorskip("safetensors")
    path = write_checkpoint(model_params=TINY["unet"])
    assert run_export(path, "safetensors", "w.safetensors") == EXIT_OK
    pictures = []
    for checkpoint in (path, "w.safetensors"):
        command = ["--checkpoint", str(checkpoint), "--num_samples", "4", "--device", "cpu"]
        assert sample.main([*command, "--output_dir", "out"]) == EXIT_OK
        pictures.append(Path("out/samples.png").read_bytes())
    assert pictures[0] == pictures[1]
    for option in ("--no_ema", "use_ema=false"):
        with pytest.raises(CheckpointError, match="holds EMA weights alone"):
            sample.main(["--checkpoint", "w.safetensors", option])


def test_damaged_and_foreign_files_are_refused():
    pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    path = write_checkpoint(model_params=TINY["unet"])
    assert run_export(path, "safetensors", "w.safetensors") == EXIT_OK
    whole = Path("w.safetensors").read_bytes()
    broken = Path("broken.safetensors")
    for position in (-1, len(whole) // 2, whole.index(b"learning_rate")):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        broken.write_bytes(flipped)
        with pytest.raises(CheckpointError, match="damaged"):
            load_weights(broken)
    broken.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_weights(broken)
    save_file({"weight": torch.zeros(2)}, broken)
    with pytest.raises(CheckpointError, match=r"not written by export\.py"):
        load_weights(broken)
    with pytest.raises(CheckpointError, match="no such"):
        load_run("absent.safetensors", CPU)


# --- the model card, and the Hub -----------------------------------------------------------------


def write_report(checkpoint: Path, name: str, **facts) -> None:
    """A report on the EMA weights of a checkpoint, or on what `facts` say instead."""
    made = dict(sha256=file_sha256(checkpoint), ema=True, n=64, sampler="ddim", steps=10, seed=3)
    entries = {
        "fid": dict(status="unreliable", value=12.25, reason="too few | images", name="fid_64"),
        "kid": dict(status="skipped", value=None, reason="no weights"),
    }
    entries = {key: {"better": "lower", "n": 64} | entry for key, entry in entries.items()}
    save_report(Path("eval", name), build_report(entries, provenance=made | facts))


def card_of(path: str) -> tuple[dict, str]:
    """The front matter as the Hub's client reads it, and the text below."""
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard(Path(path).read_text(encoding="utf-8"))
    return card.data.to_dict(), card.text


def test_a_card_has_the_metrics_of_these_weights_alone(capsys):
    path = write_checkpoint(model_params=TINY["unet"], data_root="/home/somebody/pictures")
    write_report(path, "report.json", step=7, command="python evaluate.py --checkpoint made.pth")
    write_report(path, "report_other.json", sha256="0" * 64)
    write_report(path, "report_raw.json", ema=False, steps=25, command="python /home/somebody/x")
    Path("eval/report_cut.json").write_text("{")
    for name, option in (("w", "--use_ema"), ("again", "--use_ema"), ("raw", "--no_ema")):
        assert run_export(path, "safetensors", f"{name}.safetensors", option) == EXIT_OK
    said = capsys.readouterr().out
    assert said.count("report_other.json: it scored other weights") == 3
    assert said.count("leaves out eval/report_cut.json: cannot be read") == 3

    head, text = card_of("w.md")
    assert head["metrics"] == ["fid"]
    assert head["tags"] == ["diffusion", "ddpm", "unet"]
    assert "license" not in head
    assert "None was named." in text
    assert "64 images from seed 3: ddim, 10 steps" in text
    assert r"| fid_64 | 12.25 | lower | unreliable, n 64; too few \| images |" in text
    assert "```bash\npython evaluate.py --checkpoint made.pth\n```" in text
    assert "| kid | none | lower | skipped, n 64 |" in text
    assert "10 classes" in text
    assert 'experiment_name = "made"' in text
    whole = json.loads(re.findall(r"```json\n(.*?)```", text, re.DOTALL)[0])
    shown = load_run(path, CPU).config.to_dict() | {"data_root": ".../pictures"}
    assert whole == shown
    assert "25 steps" not in text
    assert "25 steps" in card_of("raw.md")[1]
    assert "somebody" not in card_of("raw.md")[1]
    same = Path("again.md").read_text().replace("again.safetensors", "w.safetensors")
    assert same == Path("w.md").read_text(), "the same export gives the same bytes"


def test_a_card_quotes_odd_names():
    name = "_a* [x](y) <b>"
    path = write_checkpoint(model_params=TINY["unet"], experiment_name=name)
    assert run_export(path, "safetensors", "it's a.safetensors", "--license", "mit") == EXIT_OK
    head, text = card_of("it's a.md")
    assert head["license"] == "mit"
    assert head["library_name"] == "diffusion-models"
    assert r"# \_a\* \[x\](y) \<b\>" in text
    assert """python sample.py --checkpoint 'it'"'"'s a.safetensors' --num_samples 16\n""" in text
    assert "No metric was measured" in text
    assert "'_a" not in text


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_anything")


class FakeHub:
    """What export.py asks of the Hub's client; `files` are in the repository already."""

    files, error = (".gitattributes",), None

    def create_repo(self, name, *, private, exist_ok):
        assert private
        assert exist_ok

    def list_repo_files(self, name):
        return list(self.files)

    def create_commit(self, name, parts, *, commit_message):
        if self.error is not None:
            raise self.error
        FakeHub.sent = {part.path_in_repo: Path(part.path_or_fileobj) for part in parts}
        return type("Commit", (), {"commit_url": f"https://hub/{name}/commit/1"})


def test_an_export_is_pushed_with_its_card(monkeypatch, capsys, token):
    pytest.importorskip("diffusers")
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    path = write_checkpoint()
    assert run_export(path, "safetensors", "w.safetensors", "--push", "me/w") == EXIT_OK
    assert FakeHub.sent == {"w.safetensors": Path("w.safetensors"), "README.md": Path("w.md")}
    assert "https://hub/me/w/commit/1" in capsys.readouterr().out
    assert run_export(path, "diffusers", "out", "--push", "me/out") == EXIT_OK
    assert FakeHub.sent.keys() >= {"README.md", "model_index.json", "unet/config.json"}
    assert card_of("out/README.md")[0]["library_name"] == "diffusers"
    for name, file in FakeHub.sent.items():
        assert file == Path("out", name)
        assert file.is_file()


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"files": ("README.md",)}, "it has README.md already; remove it there"),
        ({"error": OSError("401 Client Error:\n\nInvalid username")}, "Error: Invalid username"),
        ({"error": RuntimeError("[Errno -3] name resolution")}, "name resolution"),
    ],
)
def test_what_the_hub_refuses_is_a_line_and_the_export_stays(
    attributes, message, monkeypatch, token
):
    pytest.importorskip("huggingface_hub")
    api = type("Hub", (FakeHub,), attributes)
    monkeypatch.setattr("huggingface_hub.HfApi", api)
    path = write_checkpoint(model_params=TINY["unet"])
    with pytest.raises(UserError, match=f"^--push me/w: .*{message}.*; w.safetensors stays$") as it:
        run_export(path, "safetensors", "w.safetensors", "--push", "me/w")
    assert "\n" not in str(it.value)
    assert load_run("w.safetensors", CPU).step == 7
    assert Path("w.md").is_file()


def test_without_a_token_the_export_stays(monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: pytest.fail("asked the Hub"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    path = write_checkpoint(model_params=TINY["unet"])
    with pytest.raises(
        UserError, match=r"no token; log in by `hf auth login`.*w.safetensors stays"
    ):
        run_export(path, "safetensors", "w.safetensors", "--push", "me/w")
    assert {file.name for file in Path().iterdir()} == {"made.pth", "w.safetensors", "w.md"}


def test_a_push_that_cannot_be_is_refused_before_anything_is_written(monkeypatch):
    pytest.importorskip("huggingface_hub")
    path = write_checkpoint(model_params=TINY["unet"])
    export_it = path, "safetensors", "w.safetensors", "--push"
    for name in ("w", "me/", "/w", "me/w/x", "me/a--b", "me/w.git", "me/ w", "me/w\n", ""):
        assert_refused(ConfigError, "^--push .*: give USER/NAME", *export_it, name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert_refused(UserError, "^huggingface_hub: not installed; pip install", *export_it, "me/w")


# --- refusals ------------------------------------------------------------------------------------


def assert_refused(kind, message, *arguments):
    """One line that holds `message`; the folder stays as it was."""
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    with pytest.raises(kind, match=message) as caught:
        run_export(*arguments)
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(model_type="dit", model_params=TINY["dit"]), "^model_type='dit'.*frequencies"),
        (dict(model_type="jit", model_params=TINY["jit"]), "^model_type='jit'.*no such backbone"),
        (dict(model_type="dim", model_params=TINY["dim"]), "^model_type='dim'.*Mamba"),
        (dict(model_params=TINY["unet"]), r"model_channels.*levels of 8, 16 .* 2, 4, 6, 8 groups"),
        (dict(model_params=SMALLEST | {"class_conditioning": "concat"}), "class_conditioning"),
        (dict(model_params=SMALLEST | {"channel_mult": (2,)}), "channel_mult: .*begin with 1"),
        (
            dict(model_params=SMALLEST | {"channel_mult": (1, 3), "num_head_channels": 192}),
            "num_head_channels: the heads have 128, 192 channels",
        ),
        (dict(timestep_spacing="linspace"), "timestep_spacing='linspace'.*trailing or leading"),
        (dict(timestep_spacing="log_snr"), "timestep_spacing='log_snr'.*trailing or leading"),
        (dict(timestep_spacing_shift=2.0), "timestep_spacing_shift=2.0: .*safetensors"),
        (dict(process="flow"), "process='flow': .*safetensors"),
        (dict(process="edm"), "process='edm': .*safetensors"),
        (dict(noise_scale=2.0), "noise_scale=2.0: .*safetensors"),
        (dict(cfg_rescale=0.5), "cfg_rescale=0.5: .*safetensors"),
        (dict(num_inference_steps=30), "num_inference_steps=30.*divides 100"),
        (dict(sampling_method="ddpm", num_timesteps=90), "num_inference_steps=50.*divides 90"),
    ],
)
def test_what_has_no_counterpart_is_refused(settings, message):
    assert_refused(ConfigError, message, write_checkpoint(**settings), "diffusers", "out")


def test_sampling_can_be_changed_on_the_command_line():
    pytest.importorskip("diffusers")
    path = write_checkpoint(num_inference_steps=30)
    assert run_export(path, "diffusers", "out", "num_inference_steps=25") == EXIT_OK
    assert "set_timesteps(25)" in Path("out/README.md").read_text()


def test_outputs_that_cannot_be_are_refused():
    path = write_checkpoint()
    assert_refused(ConfigError, r"named \*\.safetensors", path, "safetensors", "w.pth")
    assert_refused(ConfigError, "is not a folder", path, "diffusers", "absent/out")
    Path("out").mkdir()
    assert_refused(ConfigError, "exists already", path, "diffusers", "out")
    Path("w.safetensors").touch()
    assert_refused(ConfigError, "exists already", path, "safetensors", "w.safetensors")
    assert_refused(CheckpointError, "no such", "absent", "diffusers", "new")
    Path("digits.md").touch()
    assert_refused(ConfigError, r"digits\.md: exists", path, "safetensors", "digits.safetensors")


@pytest.mark.parametrize("file_format", ["safetensors", "diffusers"])
def test_absent_packages_are_named(file_format, monkeypatch):
    path = write_checkpoint()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    wanted = "diffusers safetensors" if file_format == "diffusers" else "safetensors"
    message = f"^safetensors: not installed; pip install {wanted}$"
    assert_refused(UserError, message, path, file_format, "out.safetensors")


def test_a_dry_run_writes_nothing(capsys, monkeypatch):
    pytest.importorskip("diffusers")
    path = write_checkpoint()
    ask = {"__init__": lambda *_: pytest.fail("asked the Hub")}  # a class: hints are made of it
    monkeypatch.setattr("huggingface_hub.HfApi", type("HfApi", (), ask))
    for file_format in ("diffusers", "safetensors"):
        options = "--dry_run", "--push", "me/digits"
        assert run_export(path, file_format, "out.safetensors", *options) == EXIT_OK
    assert [found.name for found in Path().iterdir()] == [path.name]
    assert "network outputs differ by" in capsys.readouterr().out


def test_another_network_is_noticed(monkeypatch):
    pytest.importorskip("diffusers")

    def wrong(model, arguments):
        unet = to_unet2d(model, arguments)
        unet.conv_out.bias.data += 0.01
        return unet

    monkeypatch.setattr(diffusers_pipeline, "to_unet2d", wrong)
    assert_refused(UserError, "outputs that differ", write_checkpoint(), "diffusers", "out")


@pytest.mark.parametrize("file_format", ["safetensors", "diffusers"])
def test_a_full_disk_leaves_nothing(file_format, monkeypatch):
    pytest.importorskip("diffusers")
    path = write_checkpoint()

    def rename(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", rename)
    monkeypatch.setattr(Path, "rename", rename)
    assert_refused(UserError, "No space left", path, file_format, "out.safetensors")
