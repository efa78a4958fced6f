"""Muon for the matrices of a transformer's blocks, AdamW for all else, as one optimizer."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch

from models import skeleton
from models.lora import add_adapters
from tests.test_sharding import DIT, assert_same_losses, layout, losses
from tests.test_sharding import runs as runs  # the fixture
from tests.test_train import assert_same_training, run, state_of
from training.optim import build_optimizer, parameter_groups
from utils.config import Config
from utils.errors import EXIT_OK, EXIT_USAGE, exit_code_of
from utils.images import ImageSpec

SPEC = ImageSpec(1, 8, 8, 10)
SIZES = dict(hidden_size=32, depth=3)
HEADS = dict(num_heads=2, patch_size=2)
MODELS = {"dit": SIZES | HEADS, "jit": SIZES | HEADS, "dim": SIZES}
MUON = [*DIT, "optimizer=muon", "weight_decay=0.1"]


def config_of(model_type: str, **values) -> Config:
    options = {"optimizer": "muon", "conditional": True, "experiment_name": "run", **values}
    return Config(model_type=model_type, model_params=MODELS[model_type], **options)


@pytest.mark.parametrize("kind", [*MODELS, "dit with adapters"])
def test_every_parameter_is_in_one_group_and_matrices_alone_in_the_first(kind):
    model_type, _, lora = kind.partition(" ")
    config = config_of(model_type)
    model = skeleton(config, SPEC)
    if lora:
        pytest.importorskip("peft")
        add_adapters(model, 2)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [[names[id(p)] for p in g["params"]] for g in parameter_groups(model, config)]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(chain.from_iterable(groups)) == sorted(trained)
    modules = dict(model.named_modules())
    for name in groups[0]:
        owner, _, leaf = name.rpartition(".")
        assert owner.startswith("blocks.")
        assert leaf == "weight"
        assert isinstance(modules[owner], torch.nn.Linear)
        assert "modulation" not in owner
    for name in chain.from_iterable(groups[1:]):
        owner = modules[name.rpartition(".")[0]]
        linear = isinstance(owner, torch.nn.Linear) and name.endswith("weight")
        assert not (linear and name.startswith("blocks.") and "modulation" not in name), name
    assert any("mixer" in name or "attention" in name for name in groups[0])


def test_one_step_is_adamw_for_the_others_and_of_its_size_for_matrices():
    """From the same gradients: bit for bit, and 0.2 of the learning rate in the root mean square
    (the singular values of five iterations are 1 to within 0.5)."""
    models = []
    for optimizer in ("muon", "adamw"):
        config = config_of("dit", optimizer=optimizer, weight_decay=0.1, learning_rate=1e-2)
        model = skeleton(config, SPEC).to_empty(device="cpu")
        draws = torch.Generator().manual_seed(0)
        for p in model.parameters():
            p.data.normal_(std=0.02, generator=draws)
            p.grad = torch.randn(p.shape, generator=draws)
        before = [p.detach().clone() for p in model.parameters()]
        build_optimizer(model, config).step()
        models.append(dict(model.named_parameters()))
    matrices = parameter_groups(model, config_of("dit"))[0]["params"]
    is_matrix = {name: any(p is m for m in matrices) for name, p in models[1].items()}
    for (name, p), old in zip(models[0].items(), before, strict=True):
        if is_matrix[name]:
            step = (p.detach() - old * (1 - 1e-2 * 0.1)).square().mean().sqrt()
            assert float(step) == pytest.approx(0.2 * 1e-2, rel=0.3)
        else:
            assert torch.equal(p, models[1][name]), name


def test_a_resumed_run_is_the_uninterrupted_one(tiny):
    """Bit for bit, with accumulation."""
    options = [*MUON, "gradient_accumulation_steps=2"]
    assert run(tiny, "whole", *options, "max_steps=6") == EXIT_OK
    assert run(tiny, "parts", *options, "max_steps=3") == EXIT_OK
    assert run(tiny, "parts", *options, "max_steps=6", "resume_path=auto") == EXIT_OK
    assert_same_training(state_of("whole"), state_of("parts"))
    moments = state_of("parts")["optimizer_state_dict"]["state"].values()
    adam = ("step", "exp_avg", "exp_avg_sq")
    assert {tuple(moment) for moment in moments} == {("momentum_buffer",), adam}


def test_a_model_without_blocks_is_refused_in_one_line(tiny, capsys):
    code = exit_code_of(lambda: run(tiny, "a", "optimizer=muon", "max_steps=1"))
    assert code == EXIT_USAGE
    text = capsys.readouterr().err
    assert "optimizer='muon' trains matrices in blocks, and unet has none" in text
    assert text.count("\n") == 1
    assert not Path("checkpoints").exists()


def test_betas_reach_the_optimizer_and_follow_the_config():
    for optimizer in ("adam", "adamw", "muon"):
        config = config_of("dit", optimizer=optimizer, adam_betas=(0.8, 0.95))
        model = skeleton(config, SPEC).to_empty(device="cpu")
        *_, last = build_optimizer(model, config).param_groups
        assert last["betas"] == (0.8, 0.95)


@pytest.mark.slow
def test_two_processes_train_as_one_and_go_on_with_each_other(tiny, runs):
    options, twelve = [*MUON, "log_interval=1"], "max_steps=12"
    fsdp, on = "strategy=fsdp", "resume_path=checkpoints/fsdp_early"
    assert run(tiny, "one", *options, twelve) == EXIT_OK
    plans = {"ddp": [twelve], "fsdp": [fsdp, twelve], "fsdp_early": [fsdp, "max_steps=6"]}
    plans["ddp_on"] = [twelve, on]
    runs({name: [*MUON, *own] for name, own in plans.items()})
    for name in ("ddp", "fsdp", "ddp_on"):
        assert_same_losses(name, "one")
    assert list(losses("ddp_on")) == list(range(7, 13))
    # Muon's iteration is in bf16: weights may differ by more than the rounding of a loss.
    files = [state_of(name)["optimizer_state_dict"]["state"] for name in ("fsdp", "ddp")]
    assert layout(files[0]) == layout(files[1])
