"""Parts of other packages, by `package.module:name` in a config outside the repository."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

import evaluate
import export
import sample
import train
from datasets import DATASETS
from diffusion import SAMPLERS, SCHEDULES
from generation.run import CONFIG_CHECKS
from metrics import METRICS
from models import BACKBONES
from tests.conftest import ROOT
from tests.test_train import assert_same_training, state_of
from training.optim import OPTIMIZERS
from utils.checkpoint import save_checkpoint
from utils.config import _imported, load_config
from utils.config_files import FOLDERS
from utils.errors import EXIT_FAILURE, EXIT_OK, EXIT_USAGE, ConfigError, exit_code_of

TABLES = BACKBONES, DATASETS, METRICS, OPTIMIZERS, SAMPLERS, SCHEDULES


def forget() -> None:
    """As in a process that has imported none of them."""
    sys.modules.pop("own_parts", None)
    FOLDERS.clear()
    _imported.cache_clear()


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The config of the example, in a folder outside the repository."""
    monkeypatch.chdir(tmp_path)
    forget()
    shutil.copytree(ROOT / "tests" / "own_parts", tmp_path / "elsewhere")
    yield tmp_path / "elsewhere" / "own.py"
    forget()


def code(main, *arguments: object) -> int:
    return exit_code_of(lambda: main(list(map(str, arguments))))


def test_a_run_of_own_parts_trains_goes_on_draws_is_scored_and_exported(config, capsys):
    path, before = list(sys.path), ["--config", config]
    assert code(train.main, *before) == EXIT_OK
    assert code(train.main, *before, "epochs=6", "resume_path=auto") == EXIT_OK
    assert code(train.main, *before, "epochs=6", "experiment_name=whole") == EXIT_OK
    assert_same_training(state_of("own"), state_of("whole"))
    steps = [g["steps"] for g in state_of("own")["optimizer_state_dict"]["param_groups"]]
    assert steps == [12]
    run = ["--checkpoint", "checkpoints/own"]
    forget()  # as a later process, whose config file is named again
    assert code(sample.main, *run, *before, "--num_samples", 4) == EXIT_OK
    assert "own_parts:half_ddim, 6 steps" in capsys.readouterr().out
    assert code(evaluate.main, *run, *before) == EXIT_OK
    report = json.loads(Path("checkpoints/own/eval/report.json").read_text())
    assert report["metrics"]["own_parts:Darkness"]["status"] == "ok"
    written = ["--format", "safetensors", "--output", "own.safetensors"]
    assert code(export.main, *run, *before, *written) == EXIT_OK
    assert code(sample.main, "--checkpoint", "own.safetensors", *before) == EXIT_OK
    assert sys.path == path

    shutil.rmtree(config.parent)
    forget()
    capsys.readouterr()
    scripts = (sample.main, []), (evaluate.main, []), (export.main, ["--format", "diffusers"])
    for main, more in scripts:
        assert code(main, *run, *more, *(["--output", "o"] if more else [])) == EXIT_USAGE
        message = capsys.readouterr().err
        assert "model_type=own_parts:Pointwise: no module 'own_parts' here" in message
        assert "Traceback" not in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model_type=own_parts:Pointwize", "has no Pointwize; did you mean 'Pointwise'?"),
        ("model_type=own_parts:levels", "must be a class derived from Module"),
        ("model_params.widht=3", "takes no such argument; did you mean 'width'?"),
        ("dataset=own_parts:build_levels", "must be a DatasetEntry"),
        ("sampling_method=own_parts:every_other", "must be a Sampler"),
        ("beta_schedule=own_parts:every_other", "(num_timesteps, beta_start, beta_end)"),
        ("eval_metrics=own_parts:Pointwise", "must be a class derived from Metric"),
        ("optimizer=own_parts:sign_decent", "has no sign_decent; did you mean 'sign_descent'?"),
        ("optimizer=missing:Sgd", "no module 'missing' here"),
        ("optimizer=AdamW", "use adam, adamw, muon; did you mean 'adamw'?"),
        ("eval_metrics=missing:Metric", "no module 'missing' here"),
        ("dataset=broken:levels", "dataset=broken:levels: division by zero"),
    ],
)
def test_what_is_wrong_with_an_own_part_is_one_line(config, override, message):
    (config.parent / "broken.py").write_text("1 / 0\n", encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        load_config(config, [override], checks=CONFIG_CHECKS)
    assert message in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_the_tables_list_no_own_parts(config):
    load_config(config, checks=CONFIG_CHECKS)
    for table in TABLES:
        assert not any(":" in name for name in table)
    assert METRICS.ordered(["own_parts:Darkness", "sanity", "fid"]) == [
        "fid",
        "sanity",
        "own_parts:Darkness",
    ]


@pytest.mark.parametrize("overrides", [[], ["model_params.width=8"]])
def test_the_last_lines_of_a_run_of_own_parts_are_commands_that_find_them(
    config, capsys, overrides
):
    assert code(train.main, "--config", config, "epochs=1", *overrides) == EXIT_OK
    output = capsys.readouterr().out
    lines = [
        shlex.split(line) for line in re.findall(r"python ((?:sample|evaluate)\.py .*)", output)
    ]
    for main, (script, *words) in zip((sample.main, evaluate.main), lines, strict=True):
        forget()
        assert code(main, *words, "--dry_run") == EXIT_OK, script
        assert words[2:] == ["--config", str(config), "epochs=1", *overrides]


def test_who_samples_needs_no_optimizer(config):
    options = "max_steps=1", "optimizer=torch.optim:SGD"
    assert code(train.main, "--config", config, *options) == EXIT_OK
    state, path = state_of("own"), Path("checkpoints/own/current_model.pth")
    state["config"]["optimizer"] = "missing:Sgd"
    save_checkpoint(path, state)
    assert code(sample.main, "--checkpoint", path, "--dry_run") == EXIT_OK


ODD = """
import torch

class Needy(torch.optim.SGD):
    def step(self, closure):
        super().step(closure)

class Odd(torch.optim.SGD):
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["odd"] = Odd

def not_an_optimizer(params, lr):
    return torch.nn.Identity()

def plain(params, lr):
    return torch.optim.SGD(params, lr)

def averaged(params, lr):
    return torch.optim.ASGD(params, lr)
"""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer=odd:Needy"], "missing 1 required positional argument: 'closure'"),
        (["optimizer=odd:Odd"], "Weights only load failed"),
        (["optimizer=odd:not_an_optimizer"], "'Identity' object has no attribute 'param_groups'"),
        (["optimizer=odd:torch"], "is not a callable object"),
        (["optimizer=own_parts:levels"], "DatasetEntry"),
        (["optimizer=odd:plain", "weight_decay=0.1"], "unexpected keyword argument 'weight_decay'"),
        (["optimizer=odd:plain", "adam_betas=0.8,0.9"], "unexpected keyword argument 'betas'"),
        (["optimizer=torch.optim:LBFGS"], "LBFGS.step() missing 1 required positional argument"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_one_line_before_anything_is_written(
    config, capsys, overrides, message
):
    (config.parent / "odd.py").write_text(ODD, encoding="utf-8")
    assert code(train.main, "--config", config, *overrides) == EXIT_USAGE
    error = capsys.readouterr().err
    assert message in error
    assert overrides[0] in error
    assert error.count("\n") == 1
    assert not Path("checkpoints").exists()
    sys.modules.pop("odd", None)


def test_an_optimizer_of_torch_goes_on_exactly_or_says_in_a_line_why_not(config, capsys):
    """Of a state of numbers, and of tensors of other shapes than the weights."""
    options = ["--config", config, "optimizer=torch.optim:Adafactor", "weight_decay=0.01"]
    for name, steps in (("whole", 5), ("parts", 2), ("parts", 5)):
        more = [f"experiment_name={name}", f"max_steps={steps}", "resume_path=auto"]
        assert code(train.main, *options, *more) == EXIT_OK
    state = state_of("parts")
    assert_same_training(state, state_of("whole"))
    (group,) = state["optimizer_state_dict"]["param_groups"]
    assert group["weight_decay"] == 0.01

    capsys.readouterr()
    state["optimizer_state_dict"]["param_groups"].clear()
    path = Path("checkpoints/parts/current_model.pth")
    save_checkpoint(path, state)
    assert code(train.main, *options, f"resume_path={path}", "max_steps=6") == EXIT_FAILURE
    error = capsys.readouterr().err
    assert "cannot be continued: loaded state dict has a different number of param" in error
    assert error.count("\n") == 1
