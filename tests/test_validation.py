"""Validation: the loss of held-out images, a number that depends on weights and images alone."""

from __future__ import annotations

import json
import multiprocessing
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import datasets
import training.trainer
from datasets.storage import InMemoryDataset
from diffusion import build_process
from reporting.runs import chart_groups
from tests.image_files import write_image
from tests.test_train import ONE_STEP_PER_EPOCH, run, state_of
from tests.test_training_evaluation import best
from training.validation import VAL_LEVELS, validate, validation_examples
from utils.config import Config
from utils.distributed import Runtime
from utils.errors import EXIT_OK, DataError

CPU = torch.device("cpu")
ALONE = Runtime(CPU)
VALIDATED = [*ONE_STEP_PER_EPOCH, "num_workers=0", "val_interval=1", "val_num_samples=20"]


def images_of(count: int) -> InMemoryDataset:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, 1, 4, 4), dtype=torch.uint8, generator=generator)
    return InMemoryDataset(images, torch.arange(count) % 3, ["a", "b", "c"])


def net(x_t, t, y):
    return x_t * (y[:, None, None, None] - 1) + t[:, None, None, None] / 50


def job_of(count: int, runtime: Runtime = ALONE, **settings) -> SimpleNamespace:
    config = Config(**{"conditional": True, "num_timesteps": 100, **settings})
    parts = dict(process=build_process(config), precision="fp32", held_out=images_of(count))
    return SimpleNamespace(config=config, runtime=runtime, **parts)


def examples_of(job) -> list:
    examples = validation_examples(job.config, job.held_out, job.runtime)
    return [example[:-1] for example in examples]  # without a condition, as there is none


def columns_of(batches) -> list[torch.Tensor]:
    return [torch.cat(column) for column in zip(*batches, strict=True)]


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_the_batches_are_the_same_on_any_number_of_processes(world_size):
    """Whole batches are shared, so that not even the rounding differs; some ranks get none."""
    alone = examples_of(job_of(21))
    ranks = [examples_of(job_of(21, Runtime(CPU, r, world_size))) for r in range(world_size)]
    together = [batch for rank in ranks for batch in rank]
    assert len(together) == len(alone) == 3
    for ours, theirs in zip(together, alone, strict=True):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("num_timesteps", [2, 100])
def test_an_image_has_a_timestep_in_each_eighth_and_noise_of_its_own(num_timesteps):
    x_0, y, t, noise = columns_of(examples_of(job_of(40, num_timesteps=num_timesteps)))
    assert len(x_0) == 40 * VAL_LEVELS
    first = torch.arange(VAL_LEVELS) * num_timesteps
    assert (t.view(40, -1) >= first // VAL_LEVELS).all()
    assert (t.view(40, -1) <= (first + num_timesteps - 1) // VAL_LEVELS).all()
    assert len(noise.flatten(1).unique(dim=0)) == len(noise)
    assert abs(float(noise.mean())) < 0.05
    assert float(noise.std()) == pytest.approx(1, abs=0.05)
    # a part of the images, another seed and batch size: the same rows of the same images
    other = job_of(40, num_timesteps=num_timesteps, val_num_samples=9, seed=7, batch_size=3)
    few = columns_of(examples_of(other))
    assert len(few[0]) == 9 * VAL_LEVELS
    rows = [int((noise == row).flatten(1).all(1).nonzero()) for row in few[3]]
    assert all(torch.equal(few[i], (x_0, y, t, noise)[i][rows]) for i in range(4))


class Net(torch.nn.Module):
    """Of no weights, and with dropout, which validation leaves out."""

    def __init__(self):
        super().__init__()
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x_t, t, y):
        return self.dropout(net(x_t, t, y))


def test_the_loss_is_the_mean_of_every_single_example():
    job = job_of(21, loss_weighting="min_snr")
    values = validate(job, Net(), 1, 1)
    singles = [
        [x[i : i + 1] for x in batch] for batch in examples_of(job) for i in range(len(batch[2]))
    ]
    losses = torch.cat([job.process.loss(net, *single) for single in singles]).double()
    t = torch.cat([single[2] for single in singles])
    assert values["loss"] == pytest.approx(float(losses.mean()), rel=1e-6)
    for k in range(4):
        mean = float(losses[t // 25 == k].mean())
        assert values[f"loss_q{k + 1}"] == pytest.approx(mean, rel=1e-6)
    few = validate(job_of(5, num_timesteps=2), Net(), 1, 1)
    assert few.keys() == {"loss", "loss_q1", "loss_q3"}  # T = 2 has no others


def of_rank(rank: int, rendezvous: str) -> tuple:
    """What a process of two computes, and what it hears where the network of the other fails."""

    def broken(*_):
        raise RuntimeError("no memory")

    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    runtime, fault = Runtime(CPU, rank, 2, rank), ""
    values = [validate(job_of(count, runtime), Net(), 1, 1) for count in (5, 21, 40)]
    failing = SimpleNamespace(**{**vars(job_of(21, runtime))})
    if rank == 1:
        failing.process = SimpleNamespace(loss=broken)
    try:
        validate(failing, Net(), 1, 1)
    except RuntimeError as error:
        fault = str(error)
    dist.destroy_process_group()
    return values, fault


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")
def test_two_processes_find_the_number_of_one_and_fail_together(tmp_path):
    """Of 5 images, one batch, the second process has none."""
    ranks = [(rank, str(tmp_path / "rendezvous")) for rank in range(2)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        (first, no_fault), (second, fault) = pool.starmap_async(of_rank, ranks, 1).get(timeout=120)
    assert first == second
    alone = [validate(job_of(count), Net(), 1, 1) for count in (5, 21, 40)]
    for ours, theirs in zip(first, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)
    assert (no_fault, fault) == ("it failed on another process", "no memory")


def rows_with(key: str, name: str) -> dict[int, dict[str, float]]:
    """Step -> the row of metrics.jsonl, for the rows that have `key`."""
    rows = map(json.loads, (Path("checkpoints") / name / "metrics.jsonl").read_text().splitlines())
    return {row.pop("step"): row for row in rows if key in row}


validations = partial(rows_with, "val/loss")


@pytest.mark.parametrize("use_ema", ["true", "false"])
def test_validations_change_no_bit_of_the_training_and_outlive_a_resume(tiny, use_ema, capsys):
    options = [*ONE_STEP_PER_EPOCH, "max_steps=3", "log_interval=1", f"use_ema={use_ema}"]
    assert run(tiny, "without", *options) == EXIT_OK
    assert run(tiny, "parts", *options, *VALIDATED, "max_steps=2") == EXIT_OK
    assert run(tiny, "parts", *options, *VALIDATED, "resume_path=auto") == EXIT_OK
    capsys.readouterr()
    assert run(tiny, "with", *options, *VALIDATED) == EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    before, after = state_of("without"), state_of("with")
    assert torch.equal(before["loss_stats"], after["loss_stats"])
    for key in before["model_state_dict"]:
        assert torch.equal(before["model_state_dict"][key], after["model_state_dict"][key])
    values = validations("with")
    assert list(values) == [1, 2, 3]
    assert values[3].keys() == {"val/loss", *(f"val/loss_q{k}" for k in (1, 2, 3, 4))}
    assert validations("parts") == values
    shown = f"{values[1]['val/loss']:.4f}"
    assert any(line.startswith(f"validation: epoch 1, loss {shown}, ") for line in lines)
    assert any(line.startswith("step 2/3") and f"  val {shown}  " in line for line in lines)


def test_the_lowest_validation_loss_chooses_the_best_model(tiny, monkeypatch):
    losses = [0.5, 0.3, float("nan"), 0.4]
    monkeypatch.setattr(training.trainer, "validate", lambda *_: {"loss": losses.pop(0)})
    options = [*VALIDATED, "eval_best_metric=val_loss", "max_steps=4"]
    assert run(tiny, "a", *options) == EXIT_OK
    assert best("a") == 2
    assert state_of("a")["best"] == {"metric": "val_loss", "value": 0.3}
    assert {step: row["val/loss"] for step, row in validations("a").items()} == {
        1: 0.5, 2: 0.3, 4: 0.4,
    }  # fmt: skip


def test_images_without_a_test_split_are_refused_before_anything_is_written(tiny, tmp_path):
    for i in range(3):
        write_image(tmp_path / "images" / f"{i}.png", seed=i)
    options = ["dataset=custom", "data_root=images", "use_subdirs=false", "conditional=false"]
    with pytest.raises(DataError, match=r"no test split, which val_interval needs; make the fold"):
        run(tiny, "a", *options, "val_interval=1")
    assert not Path("checkpoints").exists()


def test_a_failing_validation_does_not_stop_training(tiny, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no more memory")

    monkeypatch.setattr(training.trainer, "validate", broken)
    assert run(tiny, "a", *VALIDATED, "max_steps=1") == EXIT_OK
    assert "validation failed after epoch 1: no more memory" in capsys.readouterr().out


def test_the_page_shows_both_losses_in_one_chart(monkeypatch):
    monkeypatch.setattr("reporting.runs.draw_chart", lambda title, *_, **__: title)
    keys = [
        f"{part}/loss{q}" for part in ("train", "val") for q in ("", "_q1", "_q2", "_q3", "_q4")
    ]
    series = {key: [(1, 2.0), (2, 1.0)] for key in keys}
    charts, legend = chart_groups({"a": series})["Loss"]
    assert charts == ["train/loss and val/loss"]
    assert list(legend) == ["train/loss", "val/loss"]
    charts, legend = chart_groups({"a": series})["Loss by timestep"]
    assert charts == ["train/loss_q1 to q4", "val/loss_q1 to q4"]
    assert list(legend) == ["q1", "q2", "q3", "q4"]
    groups = chart_groups({"a": series, "b": {"train/loss": [(1, 2.0)]}})
    titles = [*groups["Loss"][0], *groups["Loss by timestep"][0]]
    assert sorted(titles) == sorted(keys)


@pytest.mark.slow
def test_of_few_images_the_training_loss_falls_and_the_validation_loss_rises(tiny, monkeypatch):
    """A network that remembers its 50 images knows others no better, and in the end worse."""
    entry = datasets.DATASETS["digits"]

    def few(config, split):
        whole = entry.build(config, split)
        kept = 50 if split == "train" else 200
        return InMemoryDataset(whole.images[:kept], whole.labels[:kept], whole.class_names)

    monkeypatch.setitem(datasets.DATASETS, "digits", entry._replace(build=few))
    options = ["batch_size=50", "epochs=300", "val_interval=100", "log_interval=100"]
    options += ["model_params.dropout=0", "model_params.model_channels=16", "learning_rate=3e-3"]
    assert run(tiny, "a", *options) == EXIT_OK
    trained, held_out = (
        [row[key] for step, row in rows_with(key, "a").items() if step > 1]
        for key in ("train/loss", "val/loss")
    )
    assert trained[0] > 1.5 * trained[1] > 1.5 * trained[2]
    assert held_out[0] < held_out[1] < held_out[2]
    assert held_out[2] > 2 * trained[2]
    assert held_out[0] < 1.5 * trained[0]
