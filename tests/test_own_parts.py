"""Parts of other packages, by `package.module:name` in a config outside the repository."""

from __future__ import annotations

import json
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
from utils.config import load_config
from utils.config_files import FOLDERS
from utils.errors import EXIT_OK, EXIT_USAGE, ConfigError, exit_code_of

TABLES = BACKBONES, DATASETS, METRICS, SAMPLERS, SCHEDULES


def forget() -> None:
    """As in a process that has imported none of them."""
    sys.modules.pop("own_parts", None)
    FOLDERS.clear()
    for table in TABLES:
        table._imported.clear()


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
