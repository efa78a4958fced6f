"""Averages of any width, solved for after training from snapshots of two."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import evaluate
import export
import sample
from generation.run import load_run
from reporting.evaluation import sweep_charts
from tests.test_train import assert_same_training, run, state_of
from training.ema import EMA, WIDEST, WIDTHS, gamma_of, snapshot_name, solve, states_of_widths
from utils.checkpoint import save_checkpoint
from utils.errors import EXIT_OK, CheckpointError, ConfigError, exit_code_of
from utils.labels import save_images

TRACKED = (0.03, 0.08, 0.15)
STEPS, SPACING = 2000, 50
CPU = torch.device("cpu")
SETTINGS = ("save_interval=100", "ema_snapshots=1")


def rms_width(gamma):
    return (gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5


def test_gamma_and_width_are_inverse_to_each_other():
    for width in (0.001, 0.03, *WIDTHS, 0.2, WIDEST):
        assert rms_width(gamma_of(width)) == pytest.approx(width, rel=1e-9)
    assert gamma_of(WIDEST) == pytest.approx(0, abs=1e-6)
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.01)  # Karras et al. 2024
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.01)


def test_a_profile_weighs_step_s_as_s_to_the_gamma():
    """A network whose one weight is the step number is averaged to the mean of the profile."""
    model = nn.Linear(1, 1, bias=False)
    ema = EMA(model, 0.9, WIDTHS)
    for step in range(1, 401):
        nn.init.constant_(model.weight, step)
        ema.update(model)
    for width in WIDTHS:
        gamma = gamma_of(width)
        mean = 400 * (gamma + 1) / (gamma + 2)  # of a step's middle, which is half a step earlier
        assert float(ema.averages[width]["weight"]) - 0.5 == pytest.approx(mean, abs=0.05)


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """A walk of weights: its folder, its last checkpoint's state, averages that were tracked."""
    folder, model = tmp_path_factory.mktemp("walk"), nn.Linear(40, 10)
    generator = torch.Generator().manual_seed(0)
    ema, tracked = EMA(model, 0.9, WIDTHS), EMA(model, 0.9, TRACKED)
    for step in range(1, STEPS + 1):
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.02 * torch.randn(weight.shape, generator=generator)
        for average in (ema, tracked):
            average.update(model)
        if step % SPACING == 0:
            ema.snapshots[step] = 1 / step
            parts = {"step": step, "loss": 1 / step, "averages": ema.averages}
            save_checkpoint(folder / snapshot_name(step), parts)
    state = {"step": STEPS, "model_state_dict": model.state_dict(), **ema.state_dict()}
    return folder, state, tracked.averages


def averages_of(walk, *widths):
    folder, state, _ = walk
    states = states_of_widths(folder / "current_model.pth", state, widths)
    return [states[width]["ema_model_state_dict"] for width in widths]


def distance(ours, theirs):
    a, b = (torch.cat([part[name].flatten() for name in theirs]) for part in (ours, theirs))
    return float((a - b).norm() / b.norm())


def test_other_widths_are_reconstructed_from_snapshots(walk):
    for width, average in zip(TRACKED, averages_of(walk, *TRACKED), strict=True):
        assert distance(average, walk[2][width]) < 1e-3


def test_the_stored_widths_are_what_they_were(walk):
    for width, average in zip(WIDTHS, averages_of(walk, *WIDTHS), strict=True):
        assert distance(average, walk[1]["ema_averages"][width]) < 1e-6


def test_factors_of_other_profiles_add_up_to_one():
    factors, distance = solve([(500, 0.05), (500, 0.1), (1000, 0.05), (1000, 0.1)], 1000, 0.07)
    assert sum(factors) == pytest.approx(1)
    assert 0 < distance < 0.05


@pytest.mark.parametrize("width", [1e-300, 0.01, float("nan")])
def test_a_width_that_cannot_be_solved_for_is_refused_with_those_that_can(walk, width):
    with pytest.raises(ConfigError, match=r"39 snapshots before step 2000 give .* of 0\.0.*\.\.0"):
        averages_of(walk, width)


def test_few_snapshots_give_few_widths(walk, tmp_path, caplog):
    """Of another folder, without its snapshots, only the two averages in the checkpoint are left;
    those that are not there are told."""
    _, state, tracked = walk
    with pytest.raises(ConfigError, match=r"the 0 snapshots .* widths of 0\.045\.\.0\.055, 0\.09"):
        averages_of((tmp_path, state, tracked), 0.2)
    assert "are left out: those of steps [50, 100" in caplog.text
    (average,) = averages_of((tmp_path, state, tracked), 0.1)
    assert distance(average, state["ema_averages"][0.1]) < 1e-6


def test_snapshots_that_are_damaged_or_of_another_run_are_refused(walk, tmp_path):
    folder, state, tracked = walk
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / snapshot_name(SPACING)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{path.name}: damaged .*; remove it"):
        averages_of((tmp_path, state, tracked), 0.08)
    parts = {"step": SPACING, "loss": 0.5, "averages": state["ema_averages"]}
    save_checkpoint(path, parts)
    with pytest.raises(CheckpointError, match=rf"{path.name}: a snapshot of another run"):
        averages_of((tmp_path, state, tracked), 0.08)


def test_resume_is_exact_and_the_usual_average_is_as_without_snapshots(tiny):
    few = "classes=0"  # 143 images: an epoch has 2.2 steps
    assert run(tiny, "plain", few, "max_steps=5") == EXIT_OK
    assert run(tiny, "whole", few, *SETTINGS, "max_steps=5") == EXIT_OK
    for steps in (4, 5):
        options = (few, f"max_steps={steps}", "resume_path=auto")
        assert run(tiny, "parts", *SETTINGS, *options) == EXIT_OK
    plain, whole, parts = map(state_of, ("plain", "whole", "parts"))
    assert_same_training(whole, plain)
    assert_same_training(whole, parts)
    assert not {"ema_averages", "ema_snapshots"} & plain.keys()
    assert list(whole["ema_snapshots"]) == [3, 5]
    assert whole["ema_snapshots"] == parts["ema_snapshots"]
    for name in ("ema_step_00000003.pth", "ema_step_00000005.pth"):
        files = [Path("checkpoints", run, name).read_bytes() for run in ("whole", "parts")]
        assert files[0] == files[1]
    for width, average in whole["ema_averages"].items():
        assert all(torch.equal(x, parts["ema_averages"][width][k]) for k, x in average.items())


def test_only_runs_with_snapshots_and_checkpoints_have_widths(tiny, capsys):
    assert run(tiny, "plain", "max_steps=1") == EXIT_OK
    command = ["--checkpoint", "checkpoints/plain", "--ema_width", "0.1"]
    assert exit_code_of(lambda: sample.main(command)) != EXIT_OK
    assert "takes a checkpoint of a run with ema_snapshots above 0" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.ci
def test_sample_evaluate_and_export_take_a_width(tiny, capsys):
    assert run(tiny, "many", *SETTINGS, "classes=0", "epochs=10") == EXIT_OK
    folder = ["--checkpoint", "checkpoints/many"]
    options = [*folder, "--n", "4", "--ema_width"]
    assert sample.main([*options, "0.08"]) == EXIT_OK
    assert "EMA weights of width 0.08" in capsys.readouterr().out
    for width in ("0.08", "0.5"):
        arguments = [*options, width, "--no_ema"]
        assert exit_code_of(lambda arguments=arguments: sample.main(arguments)) != EXIT_OK
        assert "--no_ema takes raw weights" in capsys.readouterr().err

    widths = ("0.05", "0.08", "0.15")
    images = ["--metrics", "sanity", "--save_images_dir", "drawn"]
    assert evaluate.main([*options, ",".join(widths), *images, "--cfg_scale", "1,2"]) == EXIT_OK
    rows = json.loads(Path("checkpoints/many/eval/report.json").read_text())["sweep"]
    assert [(row["ema_width"], row["cfg_scale"]) for row in rows] == [
        (float(width), scale) for width in widths for scale in (1, 2)
    ]
    charts, legend = sweep_charts(rows)
    assert {chart.x_label for chart in charts if chart} == {"ema_width"}
    assert list(legend) == ["1 cfg_scale, 3 steps", "2 cfg_scale, 3 steps"]
    # each set is drawn with its own weights
    assert evaluate.main([*options, "0.15", *images[:-1], "alone", "--cfg_scale", "2"]) == EXIT_OK
    drawn = [Path(d, "000003.png").read_bytes() for d in ("drawn/width0.15_cfg2_steps3", "alone")]
    assert drawn[0] == drawn[1]
    assert drawn[0] != Path("drawn/width0.05_cfg2_steps3/000003.png").read_bytes()

    export.main(
        [*folder, "--format", "safetensors", "--output", "w.safetensors", *options[-1:], "0.15"]
    )
    exported = load_run("w.safetensors", CPU).model.state_dict()
    averaged = load_run("checkpoints/many", CPU, ema_width=0.15).model.state_dict()
    assert all(torch.equal(value, averaged[name]) for name, value in exported.items())


@pytest.mark.slow
def test_a_model_with_a_condition_has_widths(tiny):
    """Each draws from the pictures with its own weights, and is scored as it is alone."""
    condition = ("condition=downsample", "condition_factor=2")
    assert run(tiny, "many", *SETTINGS, *condition, "classes=0", "epochs=10") == EXIT_OK
    save_images(Path("pictures"), torch.arange(32, dtype=torch.uint8).reshape(2, 1, 4, 4) * 8, None)
    command = ["--checkpoint", "checkpoints/many", "--ema_width"]
    drawn = {}
    for width in ("0.05", "0.15"):
        options = ["--condition", "pictures", "--save_images", "--labels", "0"]
        assert sample.main([*command, width, *options, "--output_dir", width]) == EXIT_OK
        drawn[width] = [path.read_bytes() for path in sorted(Path(width).rglob("*.png"))]
    assert len(drawn["0.05"]) == len(drawn["0.15"]) > 2
    assert drawn["0.05"] != drawn["0.15"]
    scores = ["--n", "4", "--metrics", "psnr"]
    assert evaluate.main([*command, "0.05,0.15", *scores]) == EXIT_OK
    rows = json.loads(Path("checkpoints/many/eval/report.json").read_text())["sweep"]
    assert [row["ema_width"] for row in rows] == [0.05, 0.15]
    of_widths = [row["metrics"]["psnr"] for row in rows]
    assert of_widths[0] != of_widths[1]
    assert evaluate.main([*command, "0.15", *scores, "--output", "alone"]) == EXIT_OK
    alone = json.loads(Path("alone/report.json").read_text())["metrics"]["psnr"]["value"]
    assert alone == of_widths[1]


@pytest.mark.slow
@pytest.mark.ci
def test_adapters_alone_are_averaged_beside_frozen_weights(tiny):
    pytest.importorskip("peft")
    assert run(tiny, "base", "max_steps=5") == EXIT_OK
    lora = ("classes=0", "init_from=checkpoints/base", "lora_rank=2")
    assert run(tiny, "lora", *SETTINGS, *lora, "epochs=3") == EXIT_OK
    state = state_of("lora")
    names, weights = state["ema_averages"][0.1].keys(), state["model_state_dict"]
    sizes = {name: value.numel() for name, value in weights.items()}
    assert sum(sizes[name] for name in names) < 0.5 * sum(sizes.values())
    kinds = (dict(use_ema=False), dict(ema_width=0.1))
    raw, wide = (load_run("checkpoints/lora", CPU, **kind).model.state_dict() for kind in kinds)
    assert any(not torch.equal(value, wide[name]) for name, value in raw.items())
    assert run(tiny, "lora", *SETTINGS, *lora, "epochs=4", "resume_path=auto") == EXIT_OK


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.ci)])
def test_two_processes_keep_the_averages_of_one(tiny, script, strategy):
    """Also where they go on from the file."""
    # the masks of dropout are drawn anew for each process
    options = [*SETTINGS, "classes=0", "model_params.dropout=0"]
    assert run(tiny, "one", *options, "max_steps=5") == EXIT_OK
    for steps in (4, 5):
        plan = [f"max_steps={steps}", f"strategy={strategy}", "resume_path=auto"]
        done = script(
            "train.py", "--config", tiny, "experiment_name=two", *options, *plan, processes=2
        )
        assert done.returncode == EXIT_OK, done.output
    for name in ("current_model.pth", "ema_step_00000005.pth"):
        one, two = (torch.load(f"checkpoints/{run}/{name}") for run in ("one", "two"))
        key = "averages" if name.startswith("ema") else "ema_averages"
        for width in WIDTHS:
            for parameter, value in one[key][width].items():
                torch.testing.assert_close(two[key][width][parameter], value, atol=1e-3, rtol=0)
    load_run("checkpoints/two", CPU, ema_width=0.1)
