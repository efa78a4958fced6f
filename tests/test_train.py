"""Training through train.py: exact resume, equal results on any number of processes, faults."""

import contextlib
import json
import math
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import datasets
import sample
import train
from diffusion import build_process
from generation.in_training import preview
from generation.run import Run
from tests.conftest import start_script
from training import build
from training.nonfinite import NonFiniteError, NonFiniteGuard
from training.optim import build_lr_scheduler, build_optimizer, lr_factor
from training.progress import Schedule
from training.resume import check_backend, find_resume, plan_steps
from training.trainer import Trainer
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.config import Config
from utils.distributed import Runtime
from utils.errors import (
    EXIT_NON_FINITE,
    EXIT_OK,
    EXIT_PREEMPTED,
    CheckpointError,
    ConfigError,
    UserError,
)
from utils.images import ImageSpec
from utils.rng import Stream, derive_seed


def run(config, name, *overrides):
    return train.main(["--config", str(config), f"experiment_name={name}", *overrides])


def state_of(name):
    return load_checkpoint(Path("checkpoints") / name / "current_model.pth")


def logged(name, key="train/loss"):
    lines = (Path("checkpoints") / name / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row[key] for row in map(json.loads, lines)}


def assert_same_training(a, b):
    """Bit for bit: weights, average, optimizer state, loss statistics."""
    assert a["step"] == b["step"]
    assert a["best_loss"] == b["best_loss"]
    assert a["ema_num_updates"] == b["ema_num_updates"]
    assert torch.equal(a["loss_stats"], b["loss_stats"])
    for key in ("model_state_dict", "ema_model_state_dict"):
        assert all(torch.equal(a[key][name], b[key][name]) for name in a[key])
    moments_a, moments_b = (s["optimizer_state_dict"]["state"] for s in (a, b))
    for index, moments in moments_a.items():
        assert all(torch.equal(value, moments_b[index][name]) for name, value in moments.items())


# --- exact resume


def test_resume_in_mid_epoch_is_exact(tiny):
    """2N steps = N + resume + N, bit for bit; digits have 22.5 steps per epoch."""
    assert run(tiny, "whole", "max_steps=30") == EXIT_OK
    for steps in (7, 24, 30):
        assert run(tiny, "parts", f"max_steps={steps}", "resume_path=auto") == EXIT_OK
    assert_same_training(state_of("whole"), state_of("parts"))
    whole, parts = logged("whole"), logged("parts")
    assert {s: parts[s] for s in (10, 20, 30)} == {s: whole[s] for s in (10, 20, 30)}


DIM = ["model_type=dim", "model_params.hidden_size=16", "model_params.depth=3"]


def test_how_a_model_is_computed_may_change_on_resume(tiny, capsys):
    """... and changes nothing: recomputed activations and the named backend are the same bits."""
    assert run(tiny, "whole", *DIM, "max_steps=12") == EXIT_OK
    assert run(tiny, "parts", *DIM, "max_steps=5") == EXIT_OK
    free = ["model_params.activation_checkpointing=true", "model_params.mamba_backend=torch"]
    assert run(tiny, "parts", *DIM, *free, "max_steps=12", "resume_path=auto") == EXIT_OK
    whole, parts = state_of("whole"), state_of("parts")
    for key in ("model_state_dict", "ema_model_state_dict"):
        assert all(torch.equal(whole[key][name], parts[key][name]) for name in whole[key])
    assert parts["backend"] == ["torch", "as configured"]
    assert "DiM:    mixer=mamba1 backend=torch (as configured)" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"model_params\.depth: 3 .* 5 in the config"):
        run(tiny, "parts", *DIM, "model_params.depth=5", "resume_path=auto")


def test_another_backend_on_resume_is_said(tiny, capsys):
    run(tiny, "a", *DIM, "max_steps=1")
    path = Path("checkpoints/a/current_model.pth")
    state = state_of("a")
    save_checkpoint(path, {**state, "backend": ["mamba_ssm 2.3.2 selective_scan_fn", ""]})
    run(tiny, "a", *DIM, "max_steps=2", "resume_path=auto")
    assert "with torch now: the same function" in capsys.readouterr().out


def test_ranks_must_compute_alike():
    class Ranks:
        rank = 1

        def broadcast_object(self, value):
            return ("mamba_ssm 2.3.2 selective_scan_fn", "its kernels work here")

        def any(self, flag):
            return flag

    with pytest.raises(UserError, match=r"rank 1: torch \(undefined symbol\).*mamba_backend=torch"):
        check_backend(None, ("torch", "undefined symbol"), Ranks())
    check_backend(None, ("mamba_ssm 2.3.2 selective_scan_fn", "its kernels work here"), Ranks())


def test_previews_logging_and_saving_change_nothing(tiny):
    run(tiny, "quiet", "max_steps=26")
    run(
        tiny,
        "busy",
        "max_steps=26",
        "sample_interval=1",
        "sample_start_epoch=1",
        "save_interval=1",
        "log_interval=1",
    )
    quiet, busy = state_of("quiet"), state_of("busy")
    for key in ("model_state_dict", "ema_model_state_dict"):
        assert all(torch.equal(quiet[key][name], busy[key][name]) for name in quiet[key])
    assert Path("checkpoints/busy/samples/epoch_0001.png").is_file()
    assert Path("checkpoints/busy/model_epoch_0001.pth").is_file()


def test_accumulation_changes_nothing_but_rounding(tiny):
    run(tiny, "one", "max_steps=10", "model_params.dropout=0", "log_interval=1")
    run(
        tiny,
        "four",
        "max_steps=10",
        "model_params.dropout=0",
        "log_interval=1",
        "gradient_accumulation_steps=4",
    )
    one, four = logged("one"), logged("four")
    assert one.keys() == four.keys() == set(range(1, 11))
    assert all(four[step] == pytest.approx(one[step], rel=1e-4) for step in one)


def wait_for_step(process, name, step, folder):
    path = folder / "checkpoints" / name / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.is_file() and any(
            json.loads(line)["step"] >= step
            for line in path.read_text().splitlines()
            if "}" in line
        ):
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate()[0])


SLOW = (pytest.mark.slow, pytest.mark.ci)


@pytest.mark.parametrize(
    "stop",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=SLOW),
        pytest.param(signal.SIGKILL, marks=SLOW),
    ],
)
def test_a_stopped_process_goes_on_exactly(tiny, tmp_path, stop):
    options = ["epochs=8", "save_interval=1", "log_interval=1", "learning_rate=2e-3"]
    process = start_script(
        "train.py", "--config", tiny, "experiment_name=parts", *options, cwd=tmp_path
    )
    wait_for_step(process, "parts", 60, tmp_path)
    process.send_signal(stop)
    output, _ = process.communicate(timeout=60)
    if stop == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == EXIT_PREEMPTED, output
        assert state_of("parts")["step"] in logged("parts")
    assert 22 < state_of("parts")["step"] < 180
    assert run(tiny, "parts", *options, "resume_path=auto") == EXIT_OK
    assert run(tiny, "whole", *options) == EXIT_OK
    assert_same_training(state_of("whole"), state_of("parts"))
    assert logged("parts") == logged("whole")


def test_two_processes_train_as_one(tiny, script):
    """Same losses as one process; accumulation 2 on one is the same bits."""
    options = ["log_interval=1", "max_steps=20", "save_interval=1"]
    whole = script("train.py", "--config", tiny, "experiment_name=ddp", *options, processes=2)
    assert whole.returncode == EXIT_OK, whole.output
    assert run(tiny, "one", *options, "gradient_accumulation_steps=2") == EXIT_OK
    ddp, one = logged("ddp"), logged("one")
    assert list(ddp) == list(one) == list(range(1, 21))
    assert all(ddp[step] == pytest.approx(one[step], rel=1e-4) for step in one)
    weights_ddp, weights_one = (state_of(n)["model_state_dict"] for n in ("ddp", "one"))
    assert all(torch.equal(weights_ddp[name], weights_one[name]) for name in weights_one)
    smoothed_ddp, smoothed_one = (state_of(n)["loss_stats"][:2] for n in ("ddp", "one"))
    torch.testing.assert_close(smoothed_ddp, smoothed_one, rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
def test_two_stopped_processes_go_on_exactly(tiny, tmp_path, script, stop):
    arguments = ["--config", tiny, "log_interval=1", "max_steps=50", "save_interval=1"]
    whole = script("train.py", *arguments, "experiment_name=whole", processes=2)
    assert whole.returncode == EXIT_OK, whole.output
    arguments += ["experiment_name=parts", "resume_path=auto"]
    stopped = start_script("train.py", *arguments, processes=2, cwd=tmp_path)
    wait_for_step(stopped, "parts", 30, tmp_path)
    workers = children_of(stopped.pid) if stop == signal.SIGKILL else []
    for pid in (stopped.pid, *workers):
        os.kill(pid, stop)
    stopped.communicate(timeout=60)
    assert 0 < state_of("parts")["step"] < 50
    again = script("train.py", *arguments, processes=2)
    assert again.returncode == EXIT_OK, again.output
    assert logged("parts", "train/grad_norm") == logged("whole", "train/grad_norm"), again.output
    weights, parts = (state_of(name)["model_state_dict"] for name in ("whole", "parts"))
    assert all(torch.equal(weights[name], parts[name]) for name in weights)


def children_of(pid):
    """Process ids whose parent is `pid` (Linux)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == pid:
                    found.append(int(entry.name))
    return found


# --- one step

ONE_STEP_PER_EPOCH = ["classes=0", "batch_size=143"]  # there are 143 zeros among the digits


@pytest.mark.parametrize("limit", [0.05, 1000.0])
def test_the_step_is_taken_with_gradients_of_at_most_that_norm(tiny, limit):
    """After one step of AdamW the first moment is 0.1 times the gradient it was given."""
    run(tiny, "a", *ONE_STEP_PER_EPOCH, "max_steps=1", "log_interval=1", f"grad_clip={limit}")
    norm = logged("a", "train/grad_norm")[1]
    assert 0.05 < norm < 1000.0  # what is logged is the norm before clipping
    moments = state_of("a")["optimizer_state_dict"]["state"].values()
    gradient = torch.cat([moment["exp_avg"].flatten() for moment in moments]) / 0.1
    assert float(gradient.norm()) == pytest.approx(min(norm, limit), rel=1e-4)


def test_every_micro_batch_has_dropout_masks_of_its_own(tiny, monkeypatch):
    """The masks are keyed by the run's seed, the step and the place of the rows in the batch."""
    masks = []
    honest = torch.nn.functional.dropout

    def dropout(x, p=0.5, training=True, inplace=False):
        mask = honest(torch.ones_like(x), p, training)
        masks.append(mask.detach())
        return x * mask

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    run(tiny, "a", "batch_size=8", "max_steps=2", "gradient_accumulation_steps=2", "seed=5")
    first_masks = masks[:: len(masks) // 4]  # of two micro-batches in each of two steps
    with torch.random.fork_rng(devices=[]):
        for index, mask in enumerate(first_masks):
            torch.manual_seed(derive_seed(5, Stream.MODEL_DROPOUT, index // 2, index % 2))
            assert torch.equal(mask, honest(torch.ones_like(mask), 0.1))
    assert len({mask.numpy().tobytes() for mask in first_masks}) == 4


def test_the_average_takes_in_the_weights_after_each_step_once(tiny):
    """ema <- d ema + (1 - d) weights, with d = min(ema_decay, (1 + n) / (10 + n)), n = 0, 1, ..."""
    options = ["max_steps=5", "save_interval=1", "keep_last=9", "ema_decay=0.25"]
    run(tiny, "a", *ONE_STEP_PER_EPOCH, *options, "learning_rate=1e-2")
    folder = Path("checkpoints/a")
    states = [load_checkpoint(folder / f"model_epoch_{epoch:04d}.pth") for epoch in range(1, 6)]
    assert [state["step"] for state in states] == [1, 2, 3, 4, 5]
    assert [state["ema_num_updates"] for state in states] == [1, 2, 3, 4, 5]
    decays = [2 / 11, 0.25, 0.25, 0.25]
    for before, after, decay in zip(states[:-1], states[1:], decays, strict=True):
        for name, value in before["ema_model_state_dict"].items():
            expected = decay * value + (1 - decay) * after["model_state_dict"][name]
            torch.testing.assert_close(
                after["ema_model_state_dict"][name], expected, rtol=1e-5, atol=1e-7
            )


@pytest.mark.parametrize("use_ema", [True, False])
def test_a_preview_is_what_the_checkpoint_of_its_step_draws(tiny, use_ema):
    """Pixel for pixel: with the averaged weights if there are any, and without dropout."""
    options = ["max_steps=3", "save_interval=1", "sample_interval=1", "sample_start_epoch=1"]
    options += ["learning_rate=1e-2", "num_samples=4", f"use_ema={use_ema}".lower()]
    run(tiny, "a", *ONE_STEP_PER_EPOCH, *options)
    command = ["--checkpoint", "checkpoints/a/model_epoch_0003.pth", "--seeds", "0-3"]
    assert sample.main([*command, "--output_dir", "drawn"]) == EXIT_OK
    assert sample.main([*command, "--output_dir", "raw", "--no_ema"]) == EXIT_OK
    preview = Image.open("checkpoints/a/samples/epoch_0003.png").tobytes()
    assert preview == Image.open("drawn/samples.png").tobytes()
    assert (preview == Image.open("raw/samples.png").tobytes()) == (not use_ema)


def test_previews_of_the_raw_weights_leave_the_dropout_on(tiny):
    options = [*ONE_STEP_PER_EPOCH, "max_steps=3", "use_ema=false", "num_samples=1"]
    for name, start in (("with", 1), ("without", 100)):
        run(tiny, name, *options, "sample_interval=1", f"sample_start_epoch={start}")
    assert len(list(Path("checkpoints/with/samples").iterdir())) == 3
    assert not Path("checkpoints/without/samples").exists()
    weights, undisturbed = (state_of(name)["model_state_dict"] for name in ("with", "without"))
    assert all(torch.equal(weights[name], undisturbed[name]) for name in undisturbed)


# --- what resume refuses, and the epochs rule


def test_an_occupied_folder_is_not_overwritten(tiny):
    run(tiny, "taken", "max_steps=1")
    before = state_of("taken")
    with pytest.raises(ConfigError, match="already holds a run"):
        run(tiny, "taken", "max_steps=1")
    assert_same_training(before, state_of("taken"))


def test_changed_settings_are_refused_all_at_once(tiny):
    run(tiny, "a", "max_steps=1")
    with pytest.raises(CheckpointError) as error:
        run(
            tiny,
            "a",
            "resume_path=auto",
            "batch_size=32",
            "model_params.model_channels=16",
            "use_ema=false",
            "prediction_type=v",
        )
    for key in ("batch_size", "model_params", "use_ema", "prediction_type"):
        assert key in str(error.value)


def test_changed_images_are_refused(tiny):
    run(tiny, "a", "max_steps=1")
    with pytest.raises(CheckpointError, match="channels, height, width"):
        run(tiny, "a", "resume_path=auto", "image_size=16")


def test_weights_of_another_run_are_a_start_and_nothing_more(tiny, capsys):
    assert run(tiny, "source", "max_steps=5") == EXIT_OK
    options = ["init_from=checkpoints/source", "max_steps=1", "learning_rate=1e-30", "seed=7"]
    assert run(tiny, "child", *options, "resume_path=auto") == EXIT_OK
    assert "weights of checkpoints/source/best_model.pth, step 5" in capsys.readouterr().out
    source, child = state_of("source"), state_of("child")
    assert child["step"] == child["ema_num_updates"] == 1
    for name, value in source["ema_model_state_dict"].items():
        assert torch.allclose(child["model_state_dict"][name], value, atol=1e-6)
    assert run(tiny, "child", *options, "max_steps=2", "resume_path=auto") == EXIT_OK
    assert "weights of" not in capsys.readouterr().out  # it goes on instead


def test_weights_of_another_architecture_are_refused_by_name(tiny):
    run(tiny, "source", "max_steps=1")
    with pytest.raises(CheckpointError, match="another architecture") as error:
        run(tiny, "a", "init_from=checkpoints/source", "model_params.model_channels=16")
    assert "(8, 1, 3, 3) in the checkpoint, (16, 1, 3, 3) here" in str(error.value)
    assert not Path("checkpoints/a").exists()
    with pytest.raises(ConfigError, match="give one of them"):
        run(tiny, "a", "init_from=checkpoints/source", "resume_path=checkpoints/source")


def test_learning_rate_follows_the_config_on_resume(tiny):
    run(tiny, "a", "max_steps=2")
    run(tiny, "a", "max_steps=10", "resume_path=auto", "learning_rate=5e-4")
    assert logged("a", "train/lr")[10] == 5e-4


def test_weight_decay_follows_the_config_on_resume(tiny):
    """... for the parameters that are decayed; what the model spares from it stays spared."""
    run(tiny, "a", *DIM, "batch_size=8", "max_steps=1", "weight_decay=0.25")
    run(tiny, "a", *DIM, "batch_size=8", "max_steps=2", "weight_decay=0.5", "resume_path=auto")
    groups = state_of("a")["optimizer_state_dict"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]


def test_auto_starts_afresh_and_ends_when_complete(tiny, capsys):
    assert run(tiny, "a", "resume_path=auto", "epochs=1") == EXIT_OK
    before = state_of("a")
    assert run(tiny, "a", "resume_path=auto", "epochs=1") == EXIT_OK
    assert "complete" in capsys.readouterr().out
    assert_same_training(before, state_of("a"))


def test_a_run_killed_at_its_very_end_is_told_complete(tiny):
    run(tiny, "a", "max_steps=2")
    path = Path("checkpoints/a/status.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"state": "running"}))
    assert (
        run(
            tiny,
            "a",
            "max_steps=2",
            "resume_path=auto",
        )
        == EXIT_OK
    )
    assert json.loads(path.read_text())["state"] == "complete"


def test_a_named_file_extends_a_finished_run_and_says_so(tiny, capsys):
    run(tiny, "a", "epochs=1")
    first = state_of("a")["step"]
    run(tiny, "a", "epochs=1", "resume_path=checkpoints/a/current_model.pth")
    assert "training 1 more, to epoch 2" in capsys.readouterr().out
    assert first == math.ceil(1442 / 64)
    assert state_of("a")["step"] == math.ceil(2 * 1442 / 64)
    with pytest.raises(UserError, match="max_steps"):
        run(tiny, "a", "max_steps=3", "resume_path=checkpoints/a/current_model.pth")


def test_an_interrupted_extension_goes_on_to_its_end(tiny):
    run(tiny, "a", "epochs=1")
    run(tiny, "a", "epochs=1", "resume_path=checkpoints/a/current_model.pth", "save_interval=1")
    end = state_of("a")
    assert end["extended_steps"] == end["step"] == math.ceil(2 * 1442 / 64)
    # as if stopped half-way: the state of step 30 with the plan of the extension
    run(tiny, "b", "epochs=2", "max_steps=30")
    state = {**state_of("b"), "extended_steps": end["extended_steps"]}
    save_checkpoint(Path("checkpoints/b/current_model.pth"), state)
    assert run(tiny, "b", "epochs=1", "resume_path=auto") == EXIT_OK
    assert state_of("b")["step"] == end["step"]


def test_more_epochs_than_an_extension_asked_for_count(tiny):
    options = [*ONE_STEP_PER_EPOCH, "save_interval=1"]
    run(tiny, "a", *options, "epochs=1")
    run(tiny, "a", *options, "epochs=1", "resume_path=checkpoints/a/current_model.pth")
    assert (state_of("a")["step"], state_of("a")["extended_steps"]) == (2, 2)
    run(tiny, "a", *options, "epochs=3", "resume_path=auto")
    assert state_of("a")["step"] == 3


def test_going_back_in_the_same_folder_is_refused(tiny):
    run(tiny, "a", "epochs=2", "save_interval=1")
    early = "resume_path=checkpoints/a/model_epoch_0001.pth"
    with pytest.raises(ConfigError, match="another experiment_name"):
        run(tiny, "a", "epochs=3", early)
    assert run(tiny, "branch", "epochs=2", early) == EXIT_OK
    assert_same_training(state_of("a"), state_of("branch"))


# --- faults


def poisoned_loss(monkeypatch, bad_step):
    """Make the loss of one step NaN."""
    from diffusion.process import Process

    calls = []
    honest = Process.loss

    def loss(self, *arguments):
        value = honest(self, *arguments)
        if value.requires_grad:  # of a step
            calls.append(1)
        return value * float("nan") if len(calls) == bad_step else value

    monkeypatch.setattr(Process, "loss", loss)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_non_finite_loss_stops_before_the_step(tiny, monkeypatch, on_cpu):
    """On other devices the check waits for a log line, but no later step touches the weights."""
    poisoned_loss(monkeypatch, bad_step=9)
    trainers = []
    honest_train = Trainer.train

    def remember(self):
        trainers.append(self)
        return honest_train(self)

    monkeypatch.setattr(Trainer, "train", remember)
    if not on_cpu:
        make_guard = NonFiniteGuard.__init__

        def deferred(self, *arguments):
            make_guard(self, *arguments)
            self.on_host = False

        monkeypatch.setattr(NonFiniteGuard, "__init__", deferred)
    with pytest.raises(NonFiniteError, match="not finite") as error:
        run(tiny, "bad", "max_steps=20", "log_interval=12")
    assert error.value.exit_code == EXIT_NON_FINITE
    batch = json.loads(Path("checkpoints/bad/nonfinite_step_0000009.json").read_text())
    assert batch["step"] == 9
    assert len(set(batch["indices"])) == 64
    status = json.loads(Path("checkpoints/bad/status.json").read_text())
    assert status["state"] == "non_finite"
    assert status["exit_code"] == EXIT_NON_FINITE
    assert "step 9" in status["reason"]
    monkeypatch.undo()
    monkeypatch.chdir(tiny.parent)
    run(tiny, "good", "max_steps=8")
    good = state_of("good")["model_state_dict"]
    for name, value in trainers[0].learner.model.state_dict().items():
        assert torch.equal(value, good[name])


def test_a_full_disk_is_a_warning_and_then_an_error(tiny, monkeypatch, capsys):
    def refuse(path, state):
        raise RuntimeError("unexpected pos")

    monkeypatch.setattr("training.saving.files.save_checkpoint", refuse)
    with pytest.raises(UserError, match="3 checkpoints in a row"):
        run(tiny, "a", "epochs=5", "save_interval=1")
    assert capsys.readouterr().out.count("no checkpoint at step") == 3


def test_a_failing_preview_does_not_stop_training(tiny, monkeypatch, capsys):
    monkeypatch.setattr("train.preview", lambda *_: 1 / 0)
    assert run(tiny, "a", "epochs=1", "sample_interval=1", "sample_start_epoch=1") == EXIT_OK
    assert "preview failed after epoch 1" in capsys.readouterr().out


def test_previews_ask_for_the_classes_that_are_trained_alone(tmp_path):
    asked = set()

    class Network(torch.nn.Module):
        def forward(self, x, t, y):
            asked.update(y.tolist())
            return x

    config = Config(
        conditional=True,
        classes=(2, 7),
        num_samples=6,
        cfg_scale=1.0,
        num_inference_steps=1,
        save_dir=str(tmp_path),
        sample_dir=str(tmp_path),
    )
    run = Run(Network(), build_process(config), ImageSpec(1, 8, 8, 10), config)
    preview(run, Runtime(torch.device("cpu")), 1, 1)
    assert asked == {2, 7}
    (picture,) = tmp_path.rglob("epoch_0001.png")
    width, height = Image.open(picture).size
    assert width > height  # two rows of three images


def test_dry_run_and_print_config_write_nothing(tiny, capsys):
    for flag in ("--dry_run", "--print-config"):
        assert train.main([flag, "--config", str(tiny)]) == EXIT_OK
    output = capsys.readouterr().out
    assert "M parameters" in output
    assert '"batch_size": 64' in output
    assert [p.name for p in Path().iterdir()] == ["tiny.py"]


@pytest.mark.parametrize(
    "options", [["cfg_dropout_prob=0.3"], ["conditional=false"], ["batch_size=3"]]
)
def test_a_dry_run_draws_the_first_batch(tiny, monkeypatch, options):
    seen = []
    honest = build.contact_sheet
    monkeypatch.setattr(
        build, "contact_sheet", lambda *a, **k: seen.append((a, k)) or honest(*a, **k)
    )
    command = ["--config", str(tiny), "--dry_run", "--sheet", "sheet.png", "seed=7"]
    assert train.main([*command, *options]) == EXIT_OK
    (((images, rows), words),) = seen
    shown = [i for row in rows for i in row]
    assert sorted(shown) == list(range(len(images)))
    assert len(images) == (3 if "batch_size=3" in options else 64)
    assert Image.open("sheet.png").width >= 8 * 8
    assert sorted(p.name for p in Path().iterdir()) == ["sheet.png", "tiny.py"]
    names = [name for row in words["above"] for name in row]
    if options != ["cfg_dropout_prob=0.3"]:
        return
    assert names == sorted(names, key=lambda name: "" if name == "none" else name)
    assert 5 < names.count("none") < 35
    dataset = datasets.build_dataset(Config(dataset="digits", image_size=8), "train")
    pairs = {(dataset[i][0].numpy().tobytes(), str(dataset[i][1])) for i in range(len(dataset))}
    labelled = [(images[i].numpy().tobytes(), n) for i, n in zip(shown, names, strict=True)]
    assert all(pair in pairs for pair in labelled if pair[1] != "none")


def test_a_sheet_is_for_dry_runs(tiny, tmp_path):
    with pytest.raises(ConfigError, match="together with --dry_run"):
        train.main(["--config", str(tiny), "--sheet", "sheet.png"])
    with pytest.raises(UserError, match=r"--sheet .*tiny.py/a.png"):
        train.main(["--config", str(tiny), "--dry_run", "--sheet", f"{tiny}/a.png"])


def test_bf16_trains_on_a_cpu_when_asked(tiny):
    for precision in ("bf16", "fp32"):
        settings = ["max_steps=2", "log_interval=1", f"precision={precision}"]
        assert run(tiny, precision, *settings) == EXIT_OK
    half, full = (state_of(name)["model_state_dict"] for name in ("bf16", "fp32"))
    assert all(weight.dtype == torch.float32 for weight in half.values())
    # the same images, noise and dropout: only the rounding of the forward passes differs
    assert any(not torch.equal(half[name], full[name]) for name in full)
    loss = logged("fp32")[2]
    assert logged("bf16")[2] != loss
    assert logged("bf16")[2] == pytest.approx(loss, rel=0.02)


@pytest.mark.parametrize(("epochs", "is_told"), [(2, False), (10**9, True)])
def test_a_run_that_takes_long_on_a_cpu_is_told_so_once(tiny, monkeypatch, capsys, epochs, is_told):
    stopped = Trainer._end_of_step

    def stop(self):
        if self.step == 16:
            signal.raise_signal(signal.SIGTERM)
        stopped(self)

    monkeypatch.setattr(Trainer, "_end_of_step", stop)
    run(tiny, "long", f"epochs={epochs}", "log_interval=5")
    output = capsys.readouterr().out
    assert output.count("to go on this CPU") == int(is_told)
    assert output.count("step ") > 3


def test_loss_falls(tiny):
    run(tiny, "a", "max_steps=120", "log_interval=20")
    losses = logged("a")
    assert losses[120] < 0.6 * losses[1]


# --- schedules


def test_epochs_and_intervals_for_any_batch_size():
    for num_images, batch_size in ((100, 7), (100, 100), (10, 64)):
        schedule = Schedule(num_images, batch_size, 1000)
        epochs = [schedule.epochs_done(step) for step in range(60)]
        assert epochs == [step * batch_size // num_images for step in range(60)]
        due = [step for step in range(1, 60) if schedule.is_due(step, 3, 3)]
        crossed = [s for s in range(1, 60) if epochs[s] // 3 > epochs[s - 1] // 3]
        assert due == crossed


def test_first_preview_comes_at_its_start_epoch():
    schedule = Schedule(100, 50, 1000)
    due = [schedule.epochs_done(step) for step in range(1, 100) if schedule.is_due(step, 10, 4)]
    assert due[:4] == [4, 10, 20, 30]


def test_steps_follow_epochs_and_max_steps():
    config = Config(experiment_name="x", epochs=3, batch_size=64)
    assert plan_steps(config, 1000, None).total_steps == math.ceil(3000 / 64)
    config = Config(experiment_name="x", epochs=3, batch_size=64, max_steps=5)
    assert plan_steps(config, 1000, None).total_steps == 5


def lr_curve(total_steps=100, **options):
    config = Config(experiment_name="x", use_scheduler=True, learning_rate=0.1, **options)
    optimizer = build_optimizer(torch.nn.Linear(1, 1), config)
    scheduler = build_lr_scheduler(optimizer, config, Schedule(10, 1, total_steps))
    values = []
    for _ in range(total_steps):
        values.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return values


def torch_curve(scheduler_class, total_steps=100, **options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = scheduler_class(optimizer, **options)
    values = []
    for _ in range(total_steps):
        values.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return values


def test_learning_rates_equal_those_of_torch():
    schedulers = torch.optim.lr_scheduler
    assert lr_curve(scheduler_type="cosine") == pytest.approx(
        torch_curve(schedulers.CosineAnnealingLR, T_max=100), abs=1e-9
    )
    assert lr_curve(scheduler_type="linear") == pytest.approx(
        torch_curve(schedulers.LinearLR, start_factor=1.0, end_factor=0.0, total_iters=100)
    )
    assert lr_curve(scheduler_type="step", step_size=3, gamma=0.5) == pytest.approx(
        torch_curve(schedulers.StepLR, step_size=30, gamma=0.5)
    )


def test_warm_up_rises_then_follows_the_cosine():
    curve = lr_curve(scheduler_type="warmup_cosine", warmup_epochs=2, warmup_start_factor=0.1)
    assert curve[0] == pytest.approx(0.01)
    assert curve[10] == pytest.approx(0.055)
    assert curve[20] == pytest.approx(0.1)
    assert max(curve) == curve[20]
    assert curve[60] == pytest.approx(0.05)


def test_a_warm_up_longer_than_the_run_ends_with_it():
    config = Config(
        use_scheduler=True,
        scheduler_type="warmup_cosine",
        warmup_epochs=500,
        warmup_start_factor=0.1,
    )
    factor = partial(lr_factor, config, Schedule(1, 1, 100))
    assert factor(0) == pytest.approx(0.1)
    assert factor(50) == pytest.approx(0.55)
    assert factor(100) == pytest.approx(1.0)


def test_old_checkpoints_are_removed_but_the_last(tiny):
    run(tiny, "a", "epochs=5", "save_interval=1", "keep_last=2")
    names = sorted(p.name for p in Path("checkpoints/a").glob("*.pth"))
    assert names == [
        "best_model.pth",
        "current_model.pth",
        "model_epoch_0004.pth",
        "model_epoch_0005.pth",
    ]


def test_find_resume_falls_back_from_a_damaged_file(tiny):
    run(tiny, "a", "epochs=2", "save_interval=1")
    folder = Path("checkpoints/a")
    content = (folder / "current_model.pth").read_bytes()
    (folder / "current_model.pth").unlink()  # the other names are links to the same bytes
    (folder / "current_model.pth").write_bytes(content[: len(content) // 2])
    config = Config(**{**state_of_config(folder), "resume_path": "auto"})
    assert find_resume(config).path.name == "model_epoch_0002.pth"


def state_of_config(folder):
    return json.loads((folder / "config.json").read_text())


def test_checkpoints_hold_the_known_keys(tiny):
    run(tiny, "a", "max_steps=1")
    state = state_of("a")
    for key in (
        "epoch",
        "model_state_dict",
        "optimizer_state_dict",
        "scheduler_state_dict",
        "ema_model_state_dict",
        "best_loss",
        "config",
    ):
        assert key in state
    save_checkpoint(Path("copy.pth"), state)
    assert_same_training(load_checkpoint(Path("copy.pth")), state)
