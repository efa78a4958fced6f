"""Evaluations while a model trains: they change nothing, and choose best_model.pth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import evaluate
import train
from metrics import METRICS
from tests.test_evaluate import quick_classifier, read  # noqa: F401
from tests.test_train import ONE_STEP_PER_EPOCH, assert_same_training, run, state_of
from utils.checkpoint import load_checkpoint
from utils.errors import EXIT_OK, ConfigError

EVALUATED = [
    "max_steps=50", "batch_size=64", "save_interval=1", "eval_interval=1", "eval_num_samples=12",
    "eval_metrics=class_acc,fd_domain,sanity,memorization",
]  # fmt: skip


def evaluations(name: str) -> dict[int, dict[str, float]]:
    """Step -> the values of its evaluation, from metrics.jsonl."""
    lines = (Path("checkpoints") / name / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {
        row["step"]: {k: v for k, v in row.items() if k.startswith("eval/")}
        for row in rows
        if any(key.startswith("eval/") for key in row)
    }


def test_evaluations_change_no_bit_of_the_training(tiny, quick_classifier):  # noqa: F811
    torch.manual_seed(1)
    assert run(tiny, "without", "max_steps=50", "save_interval=1") == EXIT_OK
    torch.manual_seed(2)
    assert run(tiny, "with", *EVALUATED) == EXIT_OK
    assert_same_training(state_of("without"), state_of("with"))
    found = evaluations("with")
    assert list(found) == [23, 46]  # the steps that complete an epoch of 22.5
    for epoch, (step, values) in enumerate(found.items(), 1):
        report = read(Path(f"checkpoints/with/eval/epoch_{epoch:04d}.json"))
        assert report["provenance"]["step"] == step
        assert report["provenance"]["n"] == 12
        entries = {name: entry["value"] for name, entry in report["metrics"].items()}
        assert values == {f"eval/{name}": value for name, value in entries.items()}
        assert Path(f"checkpoints/with/eval/epoch_{epoch:04d}.html").is_file()
    assert found[23] != found[46]
    assert len(list(Path("checkpoints/with/eval").glob("classifier_*.pth"))) == 1


def test_an_interrupted_run_evaluates_as_the_whole_one(tiny, quick_classifier):  # noqa: F811
    assert run(tiny, "whole", *EVALUATED) == EXIT_OK
    assert run(tiny, "parts", *EVALUATED, "max_steps=30") == EXIT_OK
    assert run(tiny, "parts", *EVALUATED, "resume_path=auto") == EXIT_OK
    assert evaluations("parts") == evaluations("whole")


@pytest.fixture
def scores(monkeypatch):
    """Evaluations that return given values, a call each."""
    given: list[dict[str, float | None]] = []
    monkeypatch.setattr(train, "evaluate", lambda *_: given.pop(0))
    return given


def best(name: str) -> int:
    return load_checkpoint(Path("checkpoints") / name / "best_model.pth")["step"]


@pytest.mark.parametrize(("metric", "step"), [("class_acc", 46), ("fd_domain", 23)])
def test_the_best_model_is_the_one_of_the_best_score(metric, step, tiny, scores):
    scores += [{metric: 0.4}, {metric: 0.9}, {metric: None}, {metric: 0.6}]
    chosen = ["max_steps=95", f"eval_best_metric={metric}", "save_interval=100"]
    assert run(tiny, "a", *EVALUATED, *chosen) == EXIT_OK
    assert best("a") == step
    state = state_of("a")
    assert state["step"] == 95
    assert state["best"] == {"metric": metric, "value": 0.9 if metric == "class_acc" else 0.4}
    assert not scores


def test_the_best_score_outlives_a_resume_but_not_another_metric(tiny, scores):
    scores += [{"class_acc": 0.9}, {"class_acc": 0.5}, {"fd_domain": 7.0, "class_acc": 1.0}]
    options = [*EVALUATED, "eval_best_metric=class_acc"]
    assert run(tiny, "a", *options, "max_steps=30") == EXIT_OK
    assert run(tiny, "a", *options, "max_steps=50", "resume_path=auto") == EXIT_OK
    assert best("a") == 23
    options = [*EVALUATED, "eval_best_metric=fd_domain", "resume_path=auto"]
    assert run(tiny, "a", *options, "max_steps=68") == EXIT_OK
    assert best("a") == 68
    assert state_of("a")["best"] == {"metric": "fd_domain", "value": 7.0}


def test_a_failing_evaluation_does_not_stop_training(tiny, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no more memory")

    monkeypatch.setattr(train, "evaluate", broken)
    assert run(tiny, "a", *EVALUATED, "eval_best_metric=class_acc") == EXIT_OK
    assert "evaluation failed after epoch 1: no more memory" in capsys.readouterr().out
    assert not Path("checkpoints/a/best_model.pth").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["eval_best_metric=fd_domain"], "set eval_interval"),
        (["eval_best_metric=val_loss"], "set val_interval"),
        (["val_interval=1", "eval_best_metric=val_los"], "did you mean 'val_loss'"),
        (["eval_interval=1", "eval_best_metric=lpips"], "must be one of the eval_metrics"),
        (["eval_interval=1", "eval_best_metric=prdc"], "must be one of the eval_metrics"),
        (["eval_interval=1", "eval_best_metric=fd_domian"], "did you mean 'fd_domain'"),
    ],
)
def test_a_best_metric_that_cannot_choose_is_refused(settings, message, tiny):
    with pytest.raises(ConfigError, match=message):
        run(tiny, "a", *settings)
    assert not Path("checkpoints").exists()


def test_a_best_metric_without_weights_is_refused_before_anything_is_written(tiny, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tiny.parent / "hub"))

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ConfigError, match=r"eval_best_metric='fid' cannot run: .*--inception"):
        run(tiny, "a", "eval_interval=1", "eval_metrics=fid,sanity", "eval_best_metric=fid")
    assert not Path("checkpoints").exists()


@pytest.mark.slow
@pytest.mark.ci
def test_two_processes_evaluate_as_one(tiny, script):
    options = ["--config", tiny, *EVALUATED, "max_steps=23", "model_params.dropout=0"]
    for name, processes in (("one", 1), ("two", 2)):
        finished = script("train.py", *options, f"experiment_name={name}", processes=processes)
        assert finished.returncode == EXIT_OK, finished.output
    one, two = evaluations("one")[23], evaluations("two")[23]
    assert one.keys() == two.keys() == {f"eval/{m}" for m in EVALUATED[-1][13:].split(",")}
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-2), name


def test_the_table_says_which_way_is_better(tiny, quick_classifier):  # noqa: F811
    """The entries of a report say the same as the table that `eval_best_metric` goes by."""
    assert run(tiny, "a", *EVALUATED, "max_steps=23") == EXIT_OK
    report = read(Path("checkpoints/a/eval/epoch_0001.json"))
    for name, entry in report["metrics"].items():
        assert entry["better"] == METRICS[name].better


@pytest.mark.parametrize("use_ema", [True, False])
def test_an_evaluation_is_of_what_the_checkpoint_of_its_step_draws(tiny, use_ema):
    """With the averaged weights if there are any, and without dropout: as evaluate.py scores it."""
    options = ["max_steps=3", "eval_interval=3", "eval_metrics=sanity", "learning_rate=1e-2"]
    options += [*ONE_STEP_PER_EPOCH, f"use_ema={use_ema}".lower()]
    assert run(tiny, "a", *EVALUATED, *options) == EXIT_OK
    command = ["--checkpoint", "checkpoints/a/model_epoch_0003.pth", "--output"]
    assert evaluate.main([*command, "after.json"]) == EXIT_OK
    assert evaluate.main([*command, "raw.json", "--no_ema"]) == EXIT_OK
    during, after, raw = (
        {**read(Path(path))["metrics"]["sanity"], "seconds": 0}  # all pixel statistics are in it
        for path in ("checkpoints/a/eval/epoch_0003.json", "after.json", "raw.json")
    )
    assert during == after
    assert (during == raw) == (not use_ema)


@pytest.mark.parametrize("save_interval", [1, 10])
def test_a_best_model_that_the_disk_refused_sets_no_mark(tiny, scores, monkeypatch, save_interval):
    """The next score is compared with the best one that is on disk, also where no save is due."""
    scores += [{"fd_domain": 0.9}, {"fd_domain": 0.4}, {"fd_domain": 0.5}]
    calls = []
    honest = torch.save

    def save(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        honest(*arguments)

    monkeypatch.setattr(torch, "save", save)
    options = [*ONE_STEP_PER_EPOCH, "max_steps=3", "eval_best_metric=fd_domain"]
    options.append(f"save_interval={save_interval}")
    assert run(tiny, "a", *EVALUATED, *options) == EXIT_OK
    assert not Path("checkpoints/a/model_epoch_0002.pth").exists()
    assert best("a") == 3
    assert state_of("a")["best"] == {"metric": "fd_domain", "value": 0.5}
