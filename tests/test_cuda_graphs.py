"""compile=graphs without a GPU: blocks whose outputs are spoilt where a replay would overwrite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion import SAMPLERS, build_process
from generation.run import Run
from generation.sampling import generate, sampling_from
from models import BACKBONES, build_model, compile_model, usable_mode
from tests.test_counts import CPU, SPEC, make_trainer
from tests.test_models import SMALL
from training.learner import Learner
from utils.cli import COMPILE_MODES
from utils.config import Config
from utils.distributed import Runtime

CUDA = torch.device("cuda")


class Pool:
    """The memory of CUDA graphs at its worst: at every new pass all that blocks returned before,
    and all gradients that they made, becomes NaN."""

    def __init__(self) -> None:
        self.passes, self.modes, self._tensors = 0, [], []

    def compile(self, block: nn.Module, *, mode: str | None, dynamic: bool) -> None:
        self.modes.append(mode)
        assert not dynamic
        block.register_forward_hook(lambda _module, _inputs, output: self.keep(output))
        for parameter in block.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self.keep)

    def keep(self, tensor: Tensor) -> None:
        self._tensors.append(tensor.data)  # the same memory, which autograd knows nothing of

    def begin_pass(self) -> None:
        self.passes += 1
        for tensor in self._tensors:
            tensor.fill_(torch.nan)
        self._tensors.clear()


@pytest.fixture
def pool(monkeypatch) -> Pool:
    """Compiled blocks keep their outputs in here, on a device that has all that they need."""
    pool = Pool()
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: pool.compile(self, **how))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", pool.begin_pass)
    monkeypatch.setattr("training.learner.usable_mode", lambda how, *_: how)
    return pool


def network(name: str) -> tuple[nn.Module, Config]:
    """A backbone none of whose weights are zero, so that a spoilt block cannot go unnoticed."""
    config = Config(conditional=True, model_type=name, model_params=SMALL[name])
    torch.manual_seed(0)
    model = build_model(config, SPEC)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model, config


@pytest.mark.parametrize(
    ("name", "method"), [(name, "ddim") for name in BACKBONES] + [("dit", m) for m in SAMPLERS]
)
def test_sampling_needs_nothing_that_a_later_pass_overwrites(pool, name: str, method: str):
    model, config = network(name)
    more = dict(sampling_method=method, cfg_scale=3.0, num_timesteps=20, num_inference_steps=4)
    config = config.model_copy(update=more)
    run = Run(model.eval().requires_grad_(False), build_process(config), SPEC, config)

    def draw() -> tuple[list[Tensor], list[Tensor]]:
        frames = {0: [], 2: []}
        kept = dict(batch_size=2, runtime=Runtime(CPU), frames=frames)
        images = generate(run, range(3), [0, 1, 2], sampling=sampling_from(config), **kept)
        return list(images), [image for step in frames.values() for image in step]

    expected = draw()
    compile_model(model, "graphs")
    compile_model(model, "graphs")  # as the copy of a compiled model is
    assert set(pool.modes) == {"reduce-overhead"}
    for ours, theirs in zip(draw(), expected, strict=True):
        assert all(map(torch.equal, ours, theirs))
    forwards = 4 * SAMPLERS[method].forwards_per_step - (method == "heun")
    assert pool.passes == 2 * forwards  # two batches; guidance is one pass of both halves


def test_a_model_may_return_what_its_last_block_does(pool):
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.blocks[0](x))

    model, x = Chain(), torch.randn(2, 4)
    expected = model(x)
    compile_model(model, "graphs")
    first = model(x)
    model(-x)
    assert torch.equal(first, expected)


def losses(trainer: Any, num_steps: int) -> list[float]:
    trainer.learner.network.train()
    examples, values, honest = trainer.job.examples(0), [], trainer.job.process.loss
    trainer.job.process.loss = lambda *given: (values.append(honest(*given)), values[-1])[1]
    for _ in range(num_steps):
        trainer._train_step(next(examples))
        trainer.step += 1
    return [value.mean().item() for value in values]


@pytest.mark.parametrize("name", BACKBONES)
def test_training_needs_nothing_that_a_later_pass_overwrites(pool, tmp_path, name: str):
    results = []
    for mode in (None, "graphs"):
        folder = tmp_path / str(mode)
        folder.mkdir()
        trainer = make_trainer(folder, Runtime(CPU), network(name)[0], compile=mode)
        results.append((losses(trainer, 4), list(trainer.learner.ema.model.parameters())))
    assert pool.passes == 4
    assert results[0][0] == results[1][0]
    assert all(map(torch.equal, results[0][1], results[1][1]))


def test_micro_batches_would_be_spoilt(pool, tmp_path):
    """Which is why they fall back, see below: the first part's gradients lie in that memory."""
    settings = dict(compile="graphs", gradient_accumulation_steps=2)
    trainer = make_trainer(tmp_path, Runtime(CPU), network("dit")[0], **settings)
    losses(trainer, 1)
    assert trainer._grad_norm.isnan()


@pytest.mark.parametrize(
    ("world_size", "settings", "checkpoints", "why"),
    [
        (1, {}, False, None),
        (2, {}, False, "several processes"),
        (1, {"gradient_accumulation_steps": 2}, False, "gradient_accumulation_steps"),
        (2, {}, True, "several processes, activation_checkpointing"),
    ],
)
def test_training_takes_blocks_where_graphs_cannot_be_and_says_why(
    monkeypatch, caplog, tmp_path, world_size, settings, checkpoints: bool, why: str | None
):
    modes: list[str] = []
    trainer = make_trainer(tmp_path, Runtime(CPU), network("dit")[0], eval_interval=1)
    trainer.job.model.activation_checkpointing = checkpoints
    monkeypatch.setattr("training.learner.compile_model", lambda _, how: modes.append(how))
    monkeypatch.setattr("training.learner.wrap_for_training", lambda model, *_: (model, model))
    config = trainer.config.model_copy(update={"compile": "graphs", **settings})
    runtime = SimpleNamespace(device=CUDA, world_size=world_size)
    Learner(replace(trainer.job, config=config, runtime=runtime))
    lines = [line for line in caplog.messages if line.startswith("compile=graphs")]
    assert modes == ["graphs" if why is None else "blocks"] * 2
    assert [line.partition("because of: ")[2] for line in lines] == ([why] if why else [])


@pytest.mark.parametrize(("device", "hip"), [("cpu", None), ("mps", None), ("cuda", "6.4")])
def test_other_devices_take_blocks_and_one_line_says_why(monkeypatch, caplog, device, hip):
    monkeypatch.setattr(torch.version, "hip", hip)
    for how in (None, *COMPILE_MODES):
        expected = "blocks" if how == "graphs" else how
        assert usable_mode(how, torch.device(device)) == expected
    (line,) = caplog.messages
    assert line.endswith("because of: no NVIDIA GPU")


def test_blocks_and_graphs_differ_in_the_mode_alone(monkeypatch):
    calls: dict[str, list[dict[str, Any]]] = {"blocks": [], "graphs": []}
    for how, asked in calls.items():
        model, _ = network("unet")
        keep: Callable[..., None] = lambda _, asked=asked, **given: asked.append(given)  # noqa: E731
        monkeypatch.setattr(nn.Module, "compile", keep)
        compile_model(model, how)
        assert len(model._forward_pre_hooks) == (how == "graphs")
    assert [given.pop("mode") for given in calls["blocks"]] == [None] * len(calls["blocks"])
    assert {given.pop("mode") for given in calls["graphs"]} == {"reduce-overhead"}
    assert calls["blocks"] == calls["graphs"]
