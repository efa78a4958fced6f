"""FSDP: it trains what DDP trains, and nobody can tell from the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from tests.test_train import assert_same_training, logged, run, state_of
from tests.test_validation import validations
from training.ema import EMA
from training.sharding import check_processes, copy_with, full_model, snapshot
from utils.config import Config
from utils.errors import EXIT_OK, ConfigError

DIT = ["model_type=dit", "model_params.hidden_size=32", "model_params.depth=3"]
DIT += ["model_params.num_heads=2"]
DIM = ["model_type=dim", "model_params.hidden_size=16", "model_params.depth=3"]
UNET = ["model_params.dropout=0"]

# Several runs in one pair of processes: their start takes longer than the runs.
DRIVER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
import train
from diffusion.process import Process
from generation.run import CONFIG_CHECKS
from training.nonfinite import NonFiniteGuard
from utils.config import load_config
from utils.distributed import distributed_runtime
from utils.logs import setup_logging

honest_loss, make_guard = Process.loss, NonFiniteGuard.__init__

def poison(runtime, bad_call):
    calls = []
    def loss(self, *arguments):
        value = honest_loss(self, *arguments)
        calls.extend([1] * value.requires_grad)  # of a step
        is_bad = runtime.rank == 1 and value.requires_grad and len(calls) == bad_call
        return value * (float("nan") if is_bad else 1.0)
    return loss

def deferred(self, *arguments):  # as on GPUs: the optimizer's kernel leaves out the step
    make_guard(self, *arguments)
    self.on_host = False

with distributed_runtime("cpu") as runtime:
    setup_logging(is_main=runtime.is_main)
    for arguments, bad_call in json.loads(sys.argv[2]):
        Process.loss = poison(runtime, bad_call)
        NonFiniteGuard.__init__ = deferred if bad_call else make_guard
        config = load_config(arguments[0], arguments[1:], checks=CONFIG_CHECKS)
        assert train.train(config, runtime, dry_run=False) == 0
"""


@pytest.fixture
def runs(tiny, tmp_path, script):
    """Train by name: overrides[, the call whose loss is NaN on rank 1], all in two processes."""

    def train_all(plans: dict[str, list[Any]]) -> str:
        driver = tmp_path / "driver.py"
        driver.write_text(DRIVER, encoding="utf-8")
        jobs = []
        for name, overrides in plans.items():
            bad_call = overrides.pop() if isinstance(overrides[-1], int) else 0
            common = [str(tiny), f"experiment_name={name}", "log_interval=1"]
            jobs.append(([*common, *overrides], bad_call))
        done = script(driver, ROOT, json.dumps(jobs), processes=2)
        assert done.returncode == EXIT_OK, done.output
        return done.output

    return train_all


def losses(name: str) -> dict[int, float]:
    path = Path("checkpoints") / name / "metrics.jsonl"
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def assert_same_losses(name: str, reference: str) -> None:
    """Of all steps that `name` logged."""
    found, expected = losses(name), losses(reference)
    assert found
    assert found == pytest.approx({step: expected[step] for step in found}, abs=1e-5)


def layout(value: Any) -> Any:
    """Keys in order, types, shapes, dtypes, strides; also what a tensor drags along."""
    if isinstance(value, dict):
        return type(value), [(key, layout(item)) for key, item in value.items()]
    if isinstance(value, torch.Tensor):
        size = value.untyped_storage().nbytes()
        return type(value), value.shape, value.dtype, value.stride(), size
    return type(value)


def assert_same_file(name: str, reference: str) -> None:
    found, expected = state_of(name), state_of(reference)
    assert list(found) == list(expected)
    for key in found:
        if key != "config":  # in which strategy, resume_path and names differ
            assert layout(found[key]) == layout(expected[key]), key
    for key in ("model_state_dict", "ema_model_state_dict"):
        for parameter, value in expected[key].items():
            torch.testing.assert_close(found[key][parameter], value, atol=1e-3, rtol=0)
    groups = [state["optimizer_state_dict"]["param_groups"] for state in (found, expected)]
    assert groups[0] == groups[1]
    sizes = [os.path.getsize(f"checkpoints/{n}/current_model.pth") for n in (name, reference)]
    assert abs(sizes[0] - sizes[1]) < 512  # the words ddp and fsdp, world sizes


@pytest.mark.slow
@pytest.mark.ci
def test_two_sharded_processes_train_as_one(tiny, script):
    """Through train.py; then one process goes on from the file, and the other way round."""
    options = [*DIT, "log_interval=1", "save_interval=100"]
    command = ["train.py", "--config", tiny, "strategy=fsdp", *options]
    assert run(tiny, "one", *options, "max_steps=12") == EXIT_OK
    assert run(tiny, "half", *options, "max_steps=6") == EXIT_OK
    done = script(*command, "experiment_name=two", "max_steps=8", processes=2)
    assert done.returncode == EXIT_OK, done.output
    assert_same_losses("two", "one")
    assert run(tiny, "two", *options, "max_steps=12", "resume_path=auto") == EXIT_OK
    assert_same_losses("two", "one")
    assert_same_file("two", "one")
    file = "resume_path=checkpoints/half/current_model.pth"
    done = script(*command, "experiment_name=on", "max_steps=12", file, processes=2)
    assert done.returncode == EXIT_OK, done.output
    assert list(losses("on")) == list(range(7, 13))
    assert_same_losses("on", "one")
    assert_same_file("on", "one")


@pytest.mark.slow
@pytest.mark.ci
def test_sharded_training_is_that_of_ddp(tiny, runs):
    """All backbones, both strategies, from one to the other; accumulation; a bad step; previews
    and evaluations of which the ranks draw unequally many images."""
    fsdp, twelve, split = "strategy=fsdp", "max_steps=12", "gradient_accumulation_steps=4"
    # rank 1 draws no image of a preview, and fewer of an evaluation
    looks = ["sample_interval=1", "sample_start_epoch=1", "num_samples=1", "eval_interval=1"]
    looks += ["eval_num_samples=5", "eval_metrics=sanity", "save_interval=1"]
    looks += ["val_interval=1", "val_num_samples=20"]
    bad = ["max_steps=5", "on_nonfinite=skip", 3]  # the third call's loss
    runs(
        {
            "ddp": [*DIT, "max_steps=30"],
            "fsdp": [*DIT, fsdp, "max_steps=30", *looks],
            "ddp_early": [*DIT, twelve],
            "fsdp_early": [*DIT, fsdp, twelve],
            "fsdp_to_ddp": [*DIT, "max_steps=30", "resume_path=checkpoints/fsdp_early"],
            "ddp_to_fsdp": [*DIT, fsdp, "max_steps=30", "resume_path=checkpoints/ddp_early"],
            "fsdp_to_fsdp": [*DIT, fsdp, "max_steps=30", "resume_path=checkpoints/fsdp_early"],
            "ddp_split": [*DIT, twelve, split],
            "fsdp_split": [*DIT, fsdp, twelve, split],
            "ddp_raw": [*DIT, "max_steps=25", "use_ema=false", *looks],
            "fsdp_raw": [*DIT, fsdp, "max_steps=25", "use_ema=false", *looks],
            "ddp_again": [*DIT, twelve, "model_params.activation_checkpointing=true"],
            "fsdp_again": [*DIT, fsdp, twelve, "model_params.activation_checkpointing=true"],
            "ddp_bf16": [*DIT, twelve, "precision=bf16"],
            "fsdp_bf16": [*DIT, fsdp, twelve, "precision=bf16"],
            "ddp_unet": [*UNET, twelve],
            "fsdp_unet": [*UNET, fsdp, twelve],
            "ddp_dim": [*DIM, twelve],
            "fsdp_dim": [*DIM, fsdp, twelve],
            "ddp_bad": [*DIT, *bad],
            "fsdp_bad": [*DIT, fsdp, *bad],
        }
    )
    for kind in ("", "_split", "_again", "_bf16", "_unet", "_dim"):
        assert_same_losses(f"fsdp{kind}", f"ddp{kind}")
        assert_same_file(f"fsdp{kind}", f"ddp{kind}")
    for name in ("fsdp_to_ddp", "ddp_to_fsdp", "fsdp_to_fsdp"):
        assert list(losses(name)) == list(range(13, 31))
        assert_same_losses(name, "ddp")
        assert_same_file(name, "ddp")
    assert_same_losses("fsdp_raw", "ddp_raw")
    assert validations("ddp_raw").keys() == {23}
    for step, values in validations("ddp_raw").items():
        assert validations("fsdp_raw")[step] == pytest.approx(values, rel=1e-3)
    for name in ("fsdp", "fsdp_raw"):
        folder = Path("checkpoints") / name
        assert (folder / "samples/epoch_0001.png").is_file()
        report = json.loads((folder / "eval/epoch_0001.json").read_text())
        assert report["metrics"]["sanity"]["value"] is not None
    seen = [state_of(f"{strategy}_bad") for strategy in ("ddp", "fsdp")]
    assert [state["nonfinite_steps"] for state in seen] == [[2], [2]]
    assert_same_file("fsdp_bad", "ddp_bad")
    steps = [s["optimizer_state_dict"]["state"][0]["step"] for s in seen]
    assert steps == [4, 4]

    # one process goes on from two sharded ones; dropout is 0, so accumulation is only rounding
    file = "resume_path=checkpoints/fsdp_early"
    assert run(tiny, "alone", *DIT, "log_interval=1", "max_steps=30", file) == EXIT_OK
    assert_same_losses("alone", "ddp")


@pytest.mark.slow
def test_a_condition_and_an_optimizer_of_torch_are_sharded_like_all_else(tiny, runs):
    """Previews and scores too, and going on from the file."""
    options = [*DIT, "classes=0", "condition=downsample", "condition_factor=2"]
    options += ["optimizer=torch.optim:NAdam", "sample_interval=1", "sample_start_epoch=1"]
    options += ["num_samples=1", "val_interval=1", "val_num_samples=20", "eval_interval=1"]
    options += ["eval_num_samples=5", "eval_metrics=psnr"]
    fsdp, six, on = "strategy=fsdp", "max_steps=6", "resume_path=checkpoints/early"
    plans = {
        "ddp": [six],
        "fsdp": [fsdp, six],
        "early": [fsdp, "max_steps=3"],
        "on": [fsdp, six, on],
    }
    runs({name: [*options, *own] for name, own in plans.items()})
    for name in ("fsdp", "on"):
        assert_same_losses(name, "ddp")
        assert_same_file(name, "ddp")
    assert list(losses("on")) == [4, 5, 6]
    reports = (Path("checkpoints", name, "eval/epoch_0001.json") for name in ("ddp", "fsdp"))
    scores = [json.loads(path.read_text())["metrics"]["psnr"]["value"] for path in reports]
    assert scores[0] == pytest.approx(scores[1], abs=0.1)
    assert validations("fsdp").keys() == validations("ddp").keys() == {3, 5}
    assert Path("checkpoints/fsdp/samples/epoch_0001.png").is_file()


WORKER = """
import copy, os, sys
sys.path.insert(0, sys.argv[1])
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from models.dit import DiT
from models.jit import JiT
from models.unet import UNet
from training.sharding import no_gradient_sync, wrap_for_training
from utils.distributed import distributed_runtime
from training.ema import EMA
from training.sharding import (
    full_model, snapshot, full_tensor, load_model_state, load_optimizer_state, local_parts
)

SIZES = dict(in_channels=1, num_classes=10)
DIT = dict(img_size=(8, 8), patch_size=2, hidden_size=32, depth=3, num_heads=2, **SIZES)
UNET = dict(image_size=(8, 8), model_channels=8, channel_mult=(1, 2), dropout=0.0, **SIZES)


def gloo_threads():
    folder = "/proc/self/task"
    if not os.path.isdir(folder):
        return []  # not Linux
    names = [open(f"{folder}/{task}/comm").read() for task in os.listdir(folder)]
    return [name for name in names if "gloo" in name]


def held(tensors):
    return sum(t.numel() for t in tensors)


def loss(network, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 1, 8, 8, generator=generator)
    t = torch.randint(100, (4,), generator=generator)
    return (network(x, t, t % 10) - x).square().mean()


def train(network, parameters, optimizer, ema, steps, seed):
    for step in range(steps):
        loss(network, seed + step).backward()
        norm = full_tensor(nn.utils.clip_grad_norm_(parameters, 1.0))
        assert type(norm) is torch.Tensor
        optimizer.step()
        optimizer.zero_grad()
        ema.update(ema.followed)
    return norm


def check(build, arguments, precision, runtime):
    torch.manual_seed(0)
    whole = build(**arguments)
    torch.manual_seed(0)
    model, network = wrap_for_training(build(**arguments), runtime, "fsdp", precision)
    assert type(model) is build and type(network) is not build
    assert not model._forward_pre_hooks and network._forward_pre_hooks
    # before any step: the model is the one that was sharded
    for a, b in zip(whole.parameters(), full_model(model).parameters(), strict=True):
        assert torch.equal(a, b)
    # gradients of two micro-batches are averaged after each, and add up
    with no_gradient_sync(network):
        loss(network, runtime.rank).backward()
    assert all(p.grad.to_local().shape == p.to_local().shape for p in model.parameters())
    loss(network, runtime.rank + 2).backward()
    for seed in range(4):
        (loss(whole, seed) / 2).backward()
    for a, b in zip(whole.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad.full_tensor())
    model.zero_grad()

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ema = EMA(model, 0.9)
    ema.followed = model
    parameters = list(model.parameters())
    train(network, parameters, optimizer, ema, 2, seed=runtime.rank)

    # each rank holds half of everything
    count = held(whole.parameters())
    moments = [m.to_local() for s in optimizer.state.values() for m in s.values() if m.ndim]
    for tensors, copies in (
        (local_parts(model.parameters()), 1), (local_parts(ema.model.parameters()), 1), (moments, 2)
    ):
        assert 0.45 < held(tensors) / (count * copies) < 0.55, held(tensors) / count
    assert all(
        p.untyped_storage().nbytes() == p.nbytes for p in local_parts(ema.model.parameters())
    )

    # out and in again: the same slices, and nothing in common with them
    state = snapshot({"model": model.state_dict(), "ema": ema.model.state_dict(),
                      "optimizer": optimizer.state_dict(), "step": 2})
    kept = snapshot(model.state_dict(), keep=False)
    assert list(kept) == list(state["model"]) and set(kept.values()) == {None}
    assert not any(isinstance(v, DTensor) for v in state["model"].values())
    before = [p.clone() for p in local_parts(model.parameters())]
    norm = train(network, parameters, optimizer, ema, 2, seed=5)
    after = [p.clone() for p in local_parts([*model.parameters(), *ema.model.parameters()])]
    load_model_state(model, state["model"])
    load_model_state(ema.model, state["ema"])
    load_optimizer_state(optimizer, state["optimizer"])
    ema.num_updates = 2
    for a, b in zip(before, local_parts(model.parameters()), strict=True):
        assert torch.equal(a, b)
    again = train(network, parameters, optimizer, ema, 2, seed=5)
    assert torch.equal(norm, again)
    now = local_parts([*model.parameters(), *ema.model.parameters()])
    for a, b in zip(after, now, strict=True):
        assert torch.equal(a, b)

    # what is whole computes what the slices compute together, on one rank alone
    alone = full_model(model)
    assert full_model(alone) is alone
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(2)
    with torch.no_grad():
        together = network(x, t, t)
        if runtime.is_main:
            assert torch.equal(alone(x, t, t), together)
    return model, network


def weight_types(build, arguments, runtime):
    # layer -> what its weights are when it runs, with bf16 asked for
    network, seen = wrap_for_training(build(**arguments), runtime, "fsdp", "bf16")[1], {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.GroupNorm | nn.Embedding):
            note = lambda module, _, name=name: seen.update({name: module.weight.dtype})
            module.register_forward_pre_hook(note)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss(network, 0).backward()
    assert all(p.grad.dtype == torch.float32 for p in network.parameters())
    return seen


def main(runtime):
    model, network = check(DiT, DIT, "fp32", runtime)
    check(UNet, UNET, "fp32", runtime)
    check(JiT, DIT, "fp32", runtime)
    try:
        load_model_state(model, {n: v[:1] for n, v in full_model(model).state_dict().items()})
        raise SystemExit("wrong shapes were taken")
    except RuntimeError as error:
        assert "size mismatch" in str(error)

    # only units that autocast runs in bf16 throughout are put together in bf16
    for name, found in weight_types(DiT, DIT, runtime).items():
        assert found == (torch.bfloat16 if name.startswith("blocks.") else torch.float32), name
    for name, found in weight_types(UNet, UNET, runtime).items():
        is_resize = name.startswith(("down", "up")) and name.count(".") == 2
        assert found == (torch.bfloat16 if is_resize else torch.float32), name

    # compiled blocks, traced as torch.compile does, without its slow code generation
    torch.manual_seed(0)
    plain, compiled = DiT(**DIT), None
    for block in plain.blocks:
        block.compile(backend="aot_eager", dynamic=False)
    kept, compiled = wrap_for_training(plain, runtime, "fsdp", "fp32")
    load_model_state(kept, snapshot(model.state_dict(), keep=True))
    for net in (network, compiled):
        loss(net, 0).backward()
    for a, b in zip(model.parameters(), kept.parameters(), strict=True):
        torch.testing.assert_close(a.grad.to_local(), b.grad.to_local())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


import atexit
atexit.register(lambda: print("left behind:", gloo_threads(), flush=True))
with distributed_runtime("cpu") as runtime:
    main(runtime)
"""


@pytest.mark.slow
@pytest.mark.ci
def test_each_rank_holds_a_slice(tmp_path, script):
    """... of everything, puts it together where asked, and leaves no threads at exit."""
    path = tmp_path / "worker.py"
    path.write_text(WORKER, encoding="utf-8")
    done = script(path, ROOT, processes=2)
    assert done.returncode == EXIT_OK, done.output
    assert done.output.count("left behind: []") == 2, done.output


def test_one_process_shards_nothing(tiny, capsys):
    assert run(tiny, "plain", "max_steps=3") == EXIT_OK
    assert "fsdp" not in capsys.readouterr().out
    assert run(tiny, "fsdp", "max_steps=3", "strategy=fsdp") == EXIT_OK
    assert "strategy=fsdp: one process, nothing to shard" in capsys.readouterr().out
    assert_same_training(state_of("plain"), state_of("fsdp"))
    assert logged("plain") == logged("fsdp")


def test_channels_last_needs_ddp(tiny):
    with pytest.raises(ConfigError, match="channels_last=True works with strategy='ddp' only"):
        run(tiny, "a", "strategy=fsdp", "channels_last=true")


def test_fp16_needs_ddp(tiny):
    with pytest.raises(ConfigError, match="precision='fp16' works with strategy='ddp' only"):
        run(tiny, "a", "strategy=fsdp", "precision=fp16")
    for options in ({"precision": "fp16"}, {"strategy": "fsdp", "precision": "bf16"}):
        assert not list(check_processes(Config(experiment_name="a", **options)))


def test_copies_have_their_own_parameters_only():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    other = copy_with(model, [torch.nn.Parameter(p + 1) for p in model.parameters()])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a + 1, b)
    for a, b in zip(model.buffers(), other.buffers(), strict=True):
        assert a is b
    average = EMA(model, 0.9).model
    owned = {id(t) for t in (*model.parameters(), *model.buffers())}
    assert not owned & {id(t) for t in (*average.parameters(), *average.buffers())}
    assert full_model(model) is model


def test_what_is_not_sharded_stays_as_it_is():
    model = torch.nn.BatchNorm1d(2)
    state = {"model": model.state_dict(), "step": 3, "seen": [1], "none": None}
    for keep in (True, False):
        copied = snapshot(state, keep=keep)
        assert copied["model"]._metadata == state["model"]._metadata
        for name, value in state["model"].items():
            assert torch.equal(copied["model"][name], value) if keep else not copied["model"][name]
        assert [copied[key] for key in ("step", "seen", "none")] == [3, [1], None]
