"""What a resumed run may change: each setting is refused, warned of, or free."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.image_files import write_image
from tests.test_train import run
from training.optim import build_optimizer
from training.resume import find_resume
from training.sharding import load_model_state, load_optimizer_state
from utils.checkpoint import CURRENT, FORMAT_VERSION, save_checkpoint
from utils.config import Config
from utils.errors import CheckpointError

BEFORE = dict(
    experiment_name="a",
    image_size=8,
    model_type="dit",  # it has an argument that says how it is computed, not what
    model_params={"hidden_size": 16, "activation_checkpointing": False},
    beta_start=1e-4,
    beta_end=0.02,
)

# Key -> another value. The weights mean nothing with it, or the run would be another one.
REFUSED = {
    "model_type": "unet",
    "model_params": {"hidden_size": 32, "activation_checkpointing": False},
    "conditional": True,
    "num_timesteps": 500,
    "beta_start": 2e-4,
    "beta_end": 0.03,
    "beta_schedule": "cosine",
    "prediction_type": "v",
    "process": "flow",
    "noise_scale": 2.0,
    "lora_rank": 4,
    "lora_alpha": 8.0,
    "batch_size": 64,
    "seed": 7,
    "optimizer": "adam",
    "use_ema": False,
    "ema_snapshots": 2,
}
# Key -> another value that a run may go on with, but not silently.
WARNED = {
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "adam_betas": [0.9, 0.95],
    "grad_clip": None,
    "ema_decay": 0.99,
    "loss_type": "l1",
    "loss_space": "x_0",
    "timestep_sampling": "shift",
    "timestep_mean": 0.5,
    "timestep_std": 0.5,
    "timestep_shift": 3.0,
    "loss_weighting": "min_snr",
    "min_snr_gamma": 3.0,
    "cfg_dropout_prob": 0.2,
    "use_scheduler": True,
    "scheduler_type": "step",
    "warmup_epochs": 2,
    "warmup_start_factor": 0.1,
    "step_size": 10,
    "gamma": 0.9,
    "gradient_accumulation_steps": 2,
    "precision": "fp32",
    "dataset": "synthetic",
    "classes": (1, 2),
    "image_size": 16,
    "horizontal_flip": True,
    "on_bad_image": "skip",
}
# Key -> another value that changes nothing of what is trained.
FREE = {
    "model_params": {"hidden_size": 16, "activation_checkpointing": True},
    "epochs": 7,
    "log_interval": 3,
    "num_samples": 4,
    "cfg_scale": 1.0,
    "cfg_rescale": 0.5,
    "sampling_method": "ddpm",
    "timestep_spacing_shift": 2.0,
    "num_workers": 0,
    "strategy": "fsdp",
    "channels_last": True,
}


@pytest.fixture(autouse=True)
def _settings_alone(monkeypatch):
    """The checkpoints here hold no weights: all but the settings is tested elsewhere"""
    monkeypatch.setattr("training.resume.check_goes_on", lambda path, state: None)


def resume_with(folder: Path, *, older_than: str | None = None, **changes: Any) -> int:
    """The step that a run with these settings goes on from, where BEFORE was trained, with a
    project that did not know the key `older_than`."""
    before = Config(save_dir=str(folder), **BEFORE)
    before.run_dir.mkdir()
    state = {
        "format_version": FORMAT_VERSION,
        "model_state_dict": {},
        "optimizer_state_dict": {},
        "scaler_state_dict": {},
        "ema_model_state_dict": {},
        "ema_num_updates": 3,
        "best_loss": 1.0,
        "loss_stats": torch.zeros(4),
        "epoch": 0,
        "step": 3,
        "config": {k: v for k, v in before.to_dict().items() if k != older_than},
        "spec": [1, 8, 8, 10],
    }
    save_checkpoint(before.run_dir / CURRENT, state)
    after = Config(**{**before.model_dump(), "resume_path": "auto", **changes})
    return find_resume(after).step


@pytest.mark.parametrize("key", REFUSED)
def test_a_setting_that_belongs_to_the_weights_or_the_run_is_refused(tmp_path, key):
    with pytest.raises(CheckpointError, match="cannot be continued with changed") as error:
        resume_with(tmp_path, **{key: REFUSED[key]})
    name = "model_params.hidden_size" if key == "model_params" else key
    lines = str(error.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == [name]
    assert " in the checkpoint, " in lines[0]


@pytest.mark.parametrize("key", ["process", "noise_scale"])
def test_a_key_that_is_newer_than_the_checkpoint_had_its_default(tmp_path, key):
    with pytest.raises(CheckpointError, match=f"{key}: .* in the checkpoint"):
        resume_with(tmp_path, older_than=key, **{key: REFUSED[key]})


@pytest.mark.parametrize("key", ["process", "noise_scale", "timestep_sampling"])
def test_a_checkpoint_older_than_a_key_goes_on_silently(tmp_path, caplog, key):
    assert resume_with(tmp_path, older_than=key) == 3
    assert not caplog.records


@pytest.mark.parametrize("key", WARNED)
def test_a_setting_that_changes_the_training_is_told(tmp_path, caplog, key):
    assert resume_with(tmp_path, **{key: WARNED[key]}) == 3
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.startswith(f"{key}: was ")


@pytest.mark.parametrize("key", FREE)
def test_a_setting_that_changes_nothing_of_the_training_is_free(tmp_path, caplog, key):
    assert resume_with(tmp_path, **{key: FREE[key]}) == 3
    assert not caplog.records


def test_other_pictures_of_the_same_shape_are_told(tiny, tmp_path, capsys):
    for folder, seed in (("first", 0), ("second", 1)):
        for name in ("cat/1.png", "dog/1.png"):
            write_image(tmp_path / folder / name, seed=seed)
    write_image(tmp_path / "second" / "dog" / "2.png")
    options = ["dataset=custom", "batch_size=2", "epochs=9", "resume_path=auto"]
    for step, folder in ((1, "first"), (2, "first"), (3, "second")):
        run(tiny, "a", *options, f"data_root={folder}", f"max_steps={step}")
        is_told = "the data set is not the one this run was trained on" in capsys.readouterr().out
        assert is_told == (folder == "second")


@pytest.mark.parametrize("last_before", [False, True])
def test_moments_lie_in_memory_as_their_weights_do(last_before):
    """Or the optimizer's kernel pairs each weight with the moments of another one."""

    def build(is_last: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(8, 1))
        model.to(memory_format=torch.channels_last if is_last else torch.contiguous_format)
        return model, build_optimizer(model, Config(learning_rate=0.1))

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, resumed = build(last_before), build(not last_before)
    train(*whole, range(5))
    load_model_state(resumed[0], whole[0].state_dict())
    load_optimizer_state(resumed[1], copy.deepcopy(whole[1].state_dict()))
    for pair in (whole, resumed):
        train(*pair, range(5, 10))
    for weight, other in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
        torch.testing.assert_close(weight, other)
        assert resumed[1].state[other]["exp_avg"].stride() == other.stride()
