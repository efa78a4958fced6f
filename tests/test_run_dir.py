"""A run's folder: one process at a time writes it, and status.json says how the run is."""

import errno
import json
import logging
import multiprocessing
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT, largest_file, start_script
from tests.test_train import children_of, logged, run, state_of, wait_for_step
from training import run_dir
from training.nonfinite import NonFiniteError
from training.run_dir import Status, locked, open_run_dir
from training.trainer import Trainer
from utils.config import Config
from utils.distributed import Runtime
from utils.errors import EXIT_OK, EXIT_PREEMPTED, EXIT_USAGE, ConfigError, UserError

HOST = socket.gethostname()
ALONE = Runtime(torch.device("cpu"))
NOTHING: run_dir.Seen = frozenset()


def status_of(name):
    return json.loads((Path("checkpoints") / name / "status.json").read_text(encoding="utf-8"))


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def locked_elsewhere(folder):
    """Another process has the folder; yields its process id."""
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()

    def hold():
        with locked(folder):
            ready.set()
            done.wait(60)

    process = context.Process(target=hold)
    process.start()
    assert ready.wait(60)
    try:
        yield process.pid
    finally:
        done.set()
        process.join()


# --- the lock


def make_images(folder):
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for i in range(32):
            pixels = np.full((8, 8), 4 * i + 100 * (label == "b"), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i:02d}.png")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_second_run_is_refused_until_the_first_is_killed(tiny, tmp_path):
    """Refused at once, by name; free at once after kill -9, though a loader process lives on."""
    make_images(tmp_path / "images")
    options = ["dataset=custom", "data_root=images", "resident=false", "num_workers=1"]
    options += ["save_interval=1", "resume_path=auto", "epochs=10000"]
    first = start_script(
        "train.py", "--config", tiny, "experiment_name=a", *options, "log_interval=1", cwd=tmp_path
    )
    wait_for_step(first, "a", 2, tmp_path)
    before = Path("checkpoints/a/config.json").read_bytes()

    refused = pytest.raises(ConfigError, match=rf"written by process {first.pid} on {HOST}; wait")
    began = time.monotonic()
    with refused, locked(Path("checkpoints/a")):
        pass
    assert time.monotonic() - began < 2
    began = time.process_time()  # how long it waits for a core is not its fault
    with refused:
        run(tiny, "a", *options)
    assert time.process_time() - began < 2
    assert Path("checkpoints/a/config.json").read_bytes() == before
    assert [status_of("a")[key] for key in ("state", "pid")] == ["running", first.pid]

    [worker] = children_of(first.pid)
    first.kill()
    first.wait()
    try:
        with locked(Path("checkpoints/a")):
            assert is_alive(worker)
    finally:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    # nobody could write what happened: a scheduler finds a process that is no more
    left = status_of("a")
    assert [left[key] for key in ("state", "pid", "host")] == ["running", first.pid, HOST]
    assert not is_alive(first.pid)

    steps = state_of("a")["step"] + 3
    assert run(tiny, "a", *options, f"max_steps={steps}") == EXIT_OK
    assert [status_of("a")[key] for key in ("state", "step")] == ["complete", steps]


RACE = """
import json, multiprocessing, sys, time
from multiprocessing.connection import wait
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import torch._dynamo  # as the next line, so that the jobs find everything imported
import train
from utils.errors import exit_code_of

train.main(["--config", "tiny.py", "--dry_run"])

def job(arguments, start):
    start.wait()
    sys.exit(exit_code_of(lambda: train.main(arguments)))

fork = multiprocessing.get_context("fork")
results = []
for trial in range(3):
    folder = Path(f"checkpoints/race{trial}")
    arguments = ["--config", "tiny.py", f"experiment_name={folder.name}", "log_interval=1"]
    start = fork.Barrier(2)
    jobs = [fork.Process(target=job, args=(arguments, start), daemon=True) for _ in range(2)]
    for process in jobs:
        process.start()
    [ended] = wait([process.sentinel for process in jobs], timeout=60)
    [loser] = [process for process in jobs if process.sentinel == ended]
    [winner] = [process for process in jobs if process.sentinel != ended]
    loser.join()
    steps = folder / "metrics.jsonl"
    while winner.is_alive() and not (steps.is_file() and steps.read_text()):
        time.sleep(0.01)
    winner.terminate()
    winner.join()
    results.append([loser.exitcode, winner.exitcode, winner.pid])
print(json.dumps(results))
"""


def test_of_two_runs_started_together_one_wins(tiny, tmp_path):
    path = tmp_path / "race.py"
    path.write_text(RACE, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, path, ROOT], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *_, results = done.stdout.splitlines()
    results = json.loads(results)
    assert [codes for *codes, _ in results] == 3 * [[EXIT_USAGE, EXIT_PREEMPTED]]
    named = re.findall(rf"being written by process (\d+) on {HOST};", done.stderr)
    assert [int(pid) for pid in named] == [winner for *_, winner in results]


def test_a_lock_ends_with_its_block(tmp_path):
    with locked_elsewhere(tmp_path) as pid, pytest.raises(ConfigError, match=f"process {pid} on"):
        locked(tmp_path).__enter__()
    with locked(tmp_path):
        assert (tmp_path / "run.lock").read_text() == f"process {os.getpid()} on {HOST}\n"


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_dir.fcntl, "lockf", refuse)
    with locked(tmp_path):
        assert "this file system has no locks (No locks available)" in caplog.text


def test_only_the_owner_of_the_lock_sweeps(tmp_path):
    """Process ids mean nothing on another machine that writes to the same folder."""
    config = Config(experiment_name="a", save_dir=str(tmp_path))
    temporary = config.run_dir / "current_model.pth.tmp-999999999"
    config.run_dir.mkdir()
    temporary.write_text("half a checkpoint")
    with locked_elsewhere(config.run_dir), pytest.raises(ConfigError):
        open_run_dir(config, ALONE, NOTHING).__enter__()
    assert temporary.exists()
    with open_run_dir(config, ALONE, NOTHING):
        assert not temporary.exists()


def test_a_folder_that_changed_before_it_was_locked_is_refused(tmp_path):
    """Another run may train and end between this one's choice of a checkpoint and its lock."""
    config = Config(experiment_name="a", save_dir=str(tmp_path))
    config.run_dir.mkdir()
    newest = config.run_dir / "current_model.pth"
    newest.write_bytes(b"step 10")
    seen = run_dir.checkpoints_in(config.run_dir)
    with open_run_dir(config, ALONE, seen):
        pass
    newest.write_bytes(b"step 11")
    with pytest.raises(ConfigError, match=r"written by another process .*resume_path=auto"):
        open_run_dir(config, ALONE, seen).__enter__()
    assert run_dir.checkpoints_in(tmp_path / "absent") == NOTHING
    with open_run_dir(config, ALONE, run_dir.checkpoints_in(config.run_dir)):
        pass


def test_a_refused_folder_is_refused_on_all_ranks(tmp_path):
    config = Config(experiment_name="a", save_dir=str(tmp_path))
    sent = []

    class Rank:
        def __init__(self, rank):
            self.is_main = rank == 0

        def broadcast_object(self, value):
            if self.is_main:
                sent.append(pickle.dumps(value))
            return pickle.loads(sent[-1])

    with locked_elsewhere(config.run_dir) as pid:
        for rank in (0, 1):
            with pytest.raises(ConfigError, match=f"process {pid} on") as error:
                open_run_dir(config, Rank(rank), NOTHING).__enter__()
            assert error.value.exit_code == EXIT_USAGE
    for rank in (0, 1):
        with open_run_dir(config, Rank(rank), NOTHING) as status:
            status.update(rank=rank)
    assert json.loads((config.run_dir / "status.json").read_text())["rank"] == 0


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    config = Config(experiment_name="a", save_dir=str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written .*set save_dir"):
        open_run_dir(config, ALONE, NOTHING).__enter__()


def test_a_full_disk_at_the_start_is_one_line_and_costs_no_file(tmp_path):
    config = Config(experiment_name="a", save_dir=str(tmp_path))
    with open_run_dir(config, ALONE, NOTHING):
        pass
    before = (config.run_dir / "config.json").read_text()
    with largest_file(0), pytest.raises(UserError, match=r"cannot be written .*free some space"):
        open_run_dir(config, ALONE, NOTHING).__enter__()
    assert (config.run_dir / "config.json").read_text() == before
    assert not list(config.run_dir.glob("*.tmp-*"))
    with open_run_dir(config, ALONE, NOTHING):  # it holds no lock of the failed one
        pass


# --- status.json


def test_status_of_a_run_that_ends_by_itself(tiny):
    assert run(tiny, "a", "max_steps=3") == EXIT_OK
    status = status_of("a")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", status.pop("updated"))
    assert status == {
        "state": "complete",
        "exit_code": 0,
        "reason": None,
        "pid": os.getpid(),
        "host": HOST,
        "total_steps": 3,
        "step": 3,
        "epoch": 0,
        "best": state_of("a")["best"],
    }


def in_step(monkeypatch, step, act):
    """Do something in the middle of a training step."""
    honest = Trainer._train_step

    def train_step(self, example):
        if self.step == step:
            act()
        honest(self, example)

    monkeypatch.setattr(Trainer, "_train_step", train_step)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_status_of_a_stopped_run_names_the_signal(tiny, monkeypatch, name):
    with monkeypatch.context() as patch:
        in_step(patch, 4, lambda: os.kill(os.getpid(), signal.Signals[name]))
        assert run(tiny, "a", "max_steps=8") == EXIT_PREEMPTED
    status = status_of("a")
    wanted = {"state": "preempted", "exit_code": 75, "signal": name, "step": 5, "total_steps": 8}
    assert status == status | wanted
    assert state_of("a")["step"] == 5
    assert run(tiny, "a", "max_steps=8", "resume_path=auto") == EXIT_OK
    status = status_of("a")
    assert status == status | {"state": "complete", "exit_code": 0, "step": 8}
    assert "signal" not in status


def test_status_of_a_failed_run_gives_the_reason(tiny, monkeypatch):
    def fail():
        raise RuntimeError("the GPU\n  is on fire")

    in_step(monkeypatch, 2, fail)
    with pytest.raises(RuntimeError, match="on fire"):
        run(tiny, "a", "max_steps=8")
    status = status_of("a")
    wanted = {"state": "failed", "exit_code": 1, "reason": "the GPU is on fire"}
    assert status == status | wanted


@pytest.mark.parametrize(
    ("error", "state", "code", "reason"),
    [
        (NonFiniteError("loss"), "non_finite", 41, "loss"),
        (UserError("disk"), "failed", 1, "disk"),
        (ConfigError("key"), "failed", 2, "key"),
        (KeyboardInterrupt(), "failed", 1, "KeyboardInterrupt"),
        (RuntimeError("x" * 1000), "failed", 1, "x" * 500),
    ],
)
def test_errors_become_states(tmp_path, error, state, code, reason):
    path = tmp_path / "status.json"

    def fail():
        assert json.loads(path.read_text())["state"] == "running"
        raise error

    with pytest.raises(type(error)), Status(path).of_run():
        fail()
    found = json.loads(path.read_text())
    assert [found[key] for key in ("state", "exit_code", "reason")] == [state, code, reason]


def test_readers_of_the_status_never_see_half_of_it(tmp_path):
    path, seen, is_over = tmp_path / "status.json", [], threading.Event()
    status = Status(path)
    status.update(number=0)

    def read():
        while not is_over.is_set():
            found = json.loads(path.read_text(encoding="utf-8"))
            assert found.get("text", "") == found["number"] * "x"
            seen.append(found["number"])

    with ThreadPool(1) as pool:
        reader = pool.apply_async(read)
        for number in range(1, 400):
            status.update(number=number, text=number * "x")
        is_over.set()
        reader.get(60)  # raises what the reader raised
    assert len(set(seen)) > 10
    assert seen == sorted(seen)
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


def test_a_full_disk_keeps_the_old_status_and_is_told_once(tmp_path, caplog):
    path = tmp_path / "status.json"
    status = Status(path)
    status.update(step=1)
    with largest_file(0):
        status.update(step=2)
        status.update(epoch=1)
    assert json.loads(path.read_text())["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "status.json is not written: File too large" in record.message
    status.update(state="complete")
    found = json.loads(path.read_text())
    assert found == found | {"step": 2, "epoch": 1, "state": "complete"}


def test_a_read_only_disk_does_not_stop_a_run(tiny, monkeypatch, capsys):
    """The checkpoint's disk is another one here, or nothing could be trained at all."""
    replace = os.replace

    def refuse(source, target):
        if Path(target).name == "status.json":
            raise OSError(errno.EROFS, "Read-only file system")
        replace(source, target)

    monkeypatch.setattr(run_dir.os, "replace", refuse)
    assert run(tiny, "a", "max_steps=3") == EXIT_OK
    assert capsys.readouterr().out.count("status.json is not written: Read-only file system") == 1
    assert logged("a").keys() == {1}
    assert state_of("a")["step"] == 3
    assert not list(Path("checkpoints/a").glob("status.json*"))


def test_other_ranks_write_no_status(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status = Status(None)
    with status.of_run():
        status.update(step=1)
    status.finish(EXIT_OK)
    assert not list(tmp_path.iterdir())
