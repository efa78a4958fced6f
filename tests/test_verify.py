"""`runs.py verify`: steps trained again are those of the record, or it says what differs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import runs
from tests.conftest import TINY_CONFIG
from tests.test_train import run
from utils.errors import EXIT_FAILURE, EXIT_OK, EXIT_USAGE, exit_code_of

FOLDER = Path("checkpoints/a")
# The schedule of the learning rate must be that of the whole run.
OPTIONS = ["max_steps=12", "use_scheduler=true", "log_interval=2", "batch_size=360"]
OPTIONS += ["save_interval=1", "num_workers=0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    config = folder / "tiny.py"
    config.write_text(TINY_CONFIG, encoding="utf-8")
    assert run(config, "a", *OPTIONS, f"save_dir={folder / 'checkpoints'}") == EXIT_OK
    return folder


@pytest.fixture
def trained(finished, tmp_path, monkeypatch):
    """A copy of it, in the working directory."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def files() -> dict[Path, tuple[int, bytes]]:
    paths = [path for path in Path().rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def verify(*arguments: object) -> int:
    return exit_code_of(lambda: runs.main(["verify", str(FOLDER), *map(str, arguments)]))


def set_key(**values) -> None:
    path = FOLDER / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values), encoding="utf-8")


def test_a_run_is_the_same_again_from_any_checkpoint_and_nothing_is_written(trained, capsys):
    before = files()
    assert verify("--steps", 3) == EXIT_OK
    assert capsys.readouterr().out == (
        "checkpoints/a: steps 1 to 4, 3 rows of metrics.jsonl: the same again, bit for bit\n"
    )
    checkpoint = FOLDER / "model_epoch_0001.pth"
    assert verify("--checkpoint", checkpoint) == EXIT_OK
    start = "checkpoints/a: steps 6 to 12, 4 rows of metrics.jsonl"
    assert capsys.readouterr().out == f"{start}: the same again, bit for bit\n"
    assert verify("--checkpoint", checkpoint, "--dry_run") == EXIT_OK
    assert capsys.readouterr().out == f"{start}: not trained again\n"
    assert files() == before


def test_what_differs_is_named(trained, capsys, monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    set_key(learning_rate=2e-3)
    assert verify("--steps", 1) == EXIT_FAILURE
    text = capsys.readouterr().err
    assert "not the same" in text
    assert "train/lr at step 1: " in text
    assert "learning_rate: 0.001 in the checkpoint, 0.002 in the config" in text
    assert "num_threads: was 1, now 3" in text
    assert "data_fingerprint" not in text
    set_key(learning_rate=1e-3, classes=[0, 1, 2, 3, 4, 5, 6, 7])
    assert verify("--steps", 1) == EXIT_FAILURE
    text = capsys.readouterr().err
    assert "train/grad_norm at step 1: " in text  # the loss is that of a network that says 0
    assert "data_fingerprint: was " in text
    assert "classes: None in the checkpoint, [0, 1, 2, 3, 4, 5, 6, 7] in the config" in text


def test_a_name_that_no_table_has_is_one_line(trained, capsys):
    set_key(optimizer="adamwx")
    assert verify("--steps", 1) == EXIT_USAGE
    assert capsys.readouterr().err == (
        "error: 'adamwx': use adam, adamw, muon; did you mean 'adamw'?\n"
    )


def test_one_bit_of_a_loss_is_a_difference(trained, capsys):
    path = FOLDER / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["train/loss"] *= 1 + 2**-52
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert verify("--steps", 1) == EXIT_OK
    assert verify("--steps", 2) == EXIT_FAILURE
    text = capsys.readouterr().err
    assert "train/loss at step 2: " in text
    assert "nothing that the run's checkpoints tell of" in text


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json"])
def test_a_run_that_lacks_its_record_is_refused(trained, capsys, name):
    (FOLDER / name).unlink()
    assert verify() == (EXIT_USAGE if name == "config.json" else EXIT_FAILURE)
    assert name in capsys.readouterr().err
