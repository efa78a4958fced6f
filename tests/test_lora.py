"""Low-rank adapters: they are what peft says they are, and nothing but them is trained."""

import importlib.util
from pathlib import Path

import pytest
import torch

import export
import models
import sample
from generation.run import load_run
from models.dim import DiM
from models.dit import DiT
from models.jit import JiT
from models.layers import LabelEmbedding
from models.lora import add_adapters, merged_weights
from models.unet import UNet
from tests.test_train import assert_same_training, run, state_of
from training.optim import build_optimizer
from training.pretrained import load_initial_weights
from utils.config import Config
from utils.errors import EXIT_OK, CheckpointError, ConfigError, UserError
from utils.images import ImageSpec

SIZES = dict(in_channels=1, num_classes=10)
UNET = dict(image_size=(8, 8), model_channels=8, channel_mult=(1, 2), dropout=0.0, **SIZES)
JIT = dict(img_size=(8, 8), patch_size=2, hidden_size=32, depth=2, num_heads=2, **SIZES)
DIM = dict(img_size=(8, 8), hidden_size=32, depth=3, **SIZES)
BACKBONES = {
    "unet": (UNet, UNET),
    "concat": (UNet, UNET | dict(class_conditioning="concat", use_scale_shift_norm=True)),
    "dit": (DiT, dict(img_size=(8, 8), hidden_size=32, depth=2, num_heads=2, **SIZES)),
    "jit": (JiT, JIT),
    "dim": (DiM, DIM),
    "dim2": (DiM, DIM | dict(mixer="mamba2", mlp_ratio=2, conditioning="adaln_zero")),
}
LORA = ("init_from=checkpoints/base", "lora_rank=2")


@pytest.fixture(params=BACKBONES)
def model(request):
    """A backbone none of whose weights is zero."""
    build, arguments = BACKBONES[request.param]
    torch.manual_seed(0)
    model = build(**arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def outputs(model):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 1, 8, 8, generator=generator)
    return model(x, torch.tensor([0, 500, 999]), torch.tensor([-1, 3, 9]))


def adapted_layers(model):
    from peft.tuners.lora import LoraLayer  # takes seconds, which only those pay who run this

    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def move_adapters(model):
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)


def test_fresh_adapters_change_nothing(model):
    before = outputs(model)
    add_adapters(model, 4)
    assert torch.equal(outputs(model), before)


def test_only_adapters_and_label_tables_are_trained(model):
    tables = {f"{n}.table.weight" for n, m in model.named_modules() if type(m) is LabelEmbedding}
    add_adapters(model, 4)
    move_adapters(model)
    outputs(model).square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if ".lora_" in n} | tables
    assert len(tables) == 1
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
        assert parameter.grad is None or parameter.grad.any(), name
    optimized = [p for g in build_optimizer(model, Config()).param_groups for p in g["params"]]
    assert {id(p) for p in optimized} == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("name", BACKBONES)
def test_merged_weights_compute_the_same(name, alpha):
    """W x + (alpha / r) B A x = (W + (alpha / r) B A) x, in every layer, as peft merges them."""
    build, arguments = BACKBONES[name]
    torch.manual_seed(0)
    model, plain = build(**arguments), build(**arguments)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    before = outputs(model)
    add_adapters(model, 3, alpha)
    move_adapters(model)
    after = outputs(model)
    assert not torch.allclose(after, before, atol=1e-3)

    merged = merged_weights(model.state_dict(), alpha)
    plain.load_state_dict(merged)
    torch.testing.assert_close(outputs(plain), after, rtol=1e-4, atol=1e-5)
    layers = adapted_layers(model)
    assert layers
    for layer_name, layer in layers.items():
        layer.merge()
        theirs = layer.get_base_layer().weight
        torch.testing.assert_close(merged[f"{layer_name}.weight"], theirs, rtol=1e-5, atol=1e-7)


def test_every_dense_layer_but_those_read_directly_has_an_adapter(model):
    dense = {
        name
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear | torch.nn.Conv2d) and getattr(m, "groups", 1) == 1
    }
    add_adapters(model, 2)
    adapted = set(adapted_layers(model))
    left_out = dense - adapted
    assert adapted <= dense
    upsampling = isinstance(model, UNet) and {n for n in left_out if n.startswith("up.")}
    assert left_out == (upsampling or {n for n in left_out if n.endswith(".mixer.dt_proj")})


# --- as a run


@pytest.fixture
def base(tiny):
    """A config file; checkpoints/base was trained by it on the digits 0 to 2."""
    assert run(tiny, "base", "max_steps=3", "classes=[0,1,2]") == EXIT_OK
    return tiny


def test_a_run_leaves_the_weights_it_starts_from(base, capsys):
    assert run(base, "a", *LORA, "classes=9", "max_steps=4") == EXIT_OK
    said = capsys.readouterr().out
    assert "lora:   rank 2, trains 0.0" in said
    before, after = state_of("base")["ema_model_state_dict"], state_of("a")["model_state_dict"]
    rows = "label_embedding.table.weight"
    for name, value in before.items():
        layer, _, leaf = name.rpartition(".")
        kept = after.get(name, after.get(f"{layer}.base_layer.{leaf}"))
        # of the table, the rows that were asked for move: none, and class 9
        still = [i for i in range(11) if i not in (0, 10)] if name == rows else slice(None)
        assert torch.equal(value[still], kept[still]), name
    assert not torch.equal(before[rows][10], after[rows][10])
    moved = [v for n, v in after.items() if ".lora_B." in n]
    assert moved
    assert all(v.any() for v in moved)

    assert sample.main(["--checkpoint", "checkpoints/a"]) == EXIT_OK
    drawn = load_run("checkpoints/a", torch.device("cpu"))
    assert type(drawn.model) is UNet
    assert tuple(drawn.classes) == (9,)
    assert set(drawn.model.state_dict()) == set(before)


def test_resume_is_exact(base):
    options = (*LORA, "classes=[8,9]", "save_interval=1")  # 4.4 steps an epoch
    assert run(base, "whole", *options, "max_steps=8") == EXIT_OK
    assert run(base, "halves", *options, "max_steps=5") == EXIT_OK
    assert run(base, "halves", *options, "max_steps=8", "resume_path=auto") == EXIT_OK
    assert_same_training(state_of("whole"), state_of("halves"))
    with pytest.raises(CheckpointError, match="lora_rank: 2 in the checkpoint, 4 in the config"):
        run(base, "halves", *options, "lora_rank=4", "max_steps=9", "resume_path=auto")


@pytest.mark.slow
@pytest.mark.ci
def test_processes_agree(base, script):
    options = ["--config", base, *LORA, "max_steps=4", "model_params.dropout=0"]
    assert run(base, "one", *options[2:]) == EXIT_OK
    one = state_of("one")
    for strategy in ("ddp", "fsdp"):
        arguments = [*options, f"experiment_name={strategy}", f"strategy={strategy}"]
        done = script("train.py", *arguments, processes=2)
        assert done.returncode == EXIT_OK, done.output
        state = state_of(strategy)
        for key in ("model_state_dict", "ema_model_state_dict"):
            torch.testing.assert_close(state[key], one[key], rtol=1e-3, atol=1e-5)


def test_an_exported_file_has_the_adapters_in_it(base):
    assert run(base, "a", *LORA, "classes=9", "max_steps=4") == EXIT_OK
    done = export.main(
        ["--checkpoint", "checkpoints/a", "--format", "safetensors", "--output", "a.safetensors"]
    )
    assert done == EXIT_OK
    cpu = torch.device("cpu")
    a, b = (load_run(p, cpu) for p in ("checkpoints/a", "a.safetensors"))
    assert all(torch.equal(x, b.model.state_dict()[n]) for n, x in a.model.state_dict().items())
    assert (a.config.lora_rank, b.config.lora_rank) == (2, 0)
    # and both are something to start from again, with adapters or without
    options = ("max_steps=1", "learning_rate=1e-30", "use_ema=false")
    for name, start in (("b", "checkpoints/a"), ("c", "a.safetensors")):
        assert run(base, name, f"init_from={start}", *options) == EXIT_OK
        weights = state_of(name)["model_state_dict"]
        assert all(torch.equal(x, weights[n]) for n, x in a.model.state_dict().items())
    assert run(base, "d", "init_from=a.safetensors", "lora_rank=1", "max_steps=1") == EXIT_OK


@pytest.mark.parametrize("num_classes", [4, 10, 12])
def test_other_numbers_of_classes(base, num_classes, caplog):
    """The rows that both tables have are taken over; new ones are those of a fresh model."""
    config = Config(
        conditional=True,
        init_from="checkpoints/base",
        model_params=state_of("base")["config"]["model_params"],
        num_timesteps=100,
    )
    torch.manual_seed(3)
    model = models.build_model(config, ImageSpec(1, 8, 8, num_classes))
    fresh = model.label_embedding.table.weight.detach().clone()
    load_initial_weights(model, config)
    table = model.label_embedding.table.weight
    theirs = state_of("base")["ema_model_state_dict"]["label_embedding.table.weight"]
    shared = min(num_classes, 10) + 1
    assert table.shape == fresh.shape
    assert torch.equal(table[:shared], theirs[:shared])
    assert torch.equal(table[shared:], fresh[shared:])
    warned = f"10 classes there, {num_classes} here" in caplog.text
    assert warned == (num_classes != 10)


def test_other_names_of_the_classes_are_told(base, caplog):
    config = Config(
        conditional=True,
        init_from="checkpoints/base",
        model_params=state_of("base")["config"]["model_params"],
        num_timesteps=100,
    )
    model = models.build_model(config, ImageSpec(1, 8, 8, 10))
    names = [str(number) for number in range(10)]
    load_initial_weights(model, config, names)
    assert "another name" not in caplog.text
    load_initial_weights(model, config, [*names[:8], "cat", "dog", "eel"])
    assert "2 have another name: 8 is now cat, 9 is now dog" in caplog.text


def test_what_cannot_be_is_refused(base, monkeypatch):
    with pytest.raises(ConfigError, match=r"lora_rank=2 trains adapters .* set init_from"):
        run(base, "a", "lora_rank=2")
    with pytest.raises(ConfigError, match="lora_rank=-1"):
        run(base, "a", "lora_rank=-1")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "peft" else find(n))
    with pytest.raises(UserError, match="peft: not installed; pip install peft"):
        run(base, "a", *LORA)
    assert not Path("checkpoints/a").exists()
