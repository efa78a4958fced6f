"""Steps whose loss or gradient is not finite: kept from the weights, counted, described."""

import contextlib
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import datasets
from diffusion.process import Process
from tests.conftest import ROOT
from tests.test_run_dir import in_step
from tests.test_train import ONE_STEP_PER_EPOCH, assert_same_training, logged, run, state_of
from training.nonfinite import NonFiniteError, NonFiniteGuard
from training.trainer import Trainer
from utils.config import Config
from utils.distributed import Runtime
from utils.errors import EXIT_NON_FINITE, EXIT_OK, EXIT_PREEMPTED
from utils.images import to_float

CPU = torch.device("cpu")
LAST = "current_model.pth, step 2"


def make_guard(limit, folder=None, *, on_host=True):
    """Of a rank other than 0 if there is no folder."""
    rule = dict(on_nonfinite="skip", max_nonfinite_steps=limit) if limit else {}
    name = {} if folder is None else dict(save_dir=str(folder.parent), experiment_name=folder.name)
    guard = NonFiniteGuard(Config(**rule, **name), [], Runtime(CPU, rank=int(folder is None)))
    guard.on_host = on_host
    guard.describe = lambda step: {"step": step + 1, "indices": [step, 7]}
    return guard


def drive(guard, bad_steps, steps, read_interval=1):
    """As the trainer does. Returns the steps taken, and the error if one stopped it."""
    taken = []
    for step in steps:
        skip = guard.add(torch.tensor(step not in bad_steps), step)
        try:
            if guard.on_host or (step + 1) % read_interval == 0:
                guard.read(LAST)
        except NonFiniteError as error:
            return taken, error
        if not skip:
            taken.append(step)
    return taken, None


# --- the guard


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_the_first_bad_step_beyond_the_limit_stops(limit, tmp_path):
    bad = [2, 3, 5, 8]
    guard = make_guard(limit, tmp_path)
    taken, error = drive(guard, bad, range(20))
    last = bad[limit]
    assert taken == [step for step in range(last) if step not in bad]
    assert error.exit_code == EXIT_NON_FINITE
    file = tmp_path / f"nonfinite_step_{last + 1:07d}.json"
    for part in (f"at step {last + 1};", LAST, str(file)):
        assert part in str(error)
    assert (f"({limit} were skipped)" in str(error)) == (limit > 0)
    written = {p.name: json.loads(p.read_text()) for p in tmp_path.iterdir()}
    assert written == {
        f"nonfinite_step_{step + 1:07d}.json": {"step": step + 1, "indices": [step, 7]}
        for step in bad[: limit + 1]
    }


def test_as_many_as_the_limit_are_skipped_and_told(caplog):
    guard = make_guard(2)
    taken, error = drive(guard, [0, 9], range(10))
    assert error is None
    assert taken == list(range(1, 9))
    assert guard.seen == [0, 9]
    assert [record.message for record in caplog.records] == [
        f"loss or gradient is not finite at step {step}: skipped, {count} of at most 2 "
        "(described by rank 0)"
        for count, step in ((1, 1), (2, 10))
    ]


def test_reading_late_takes_the_same_steps(tmp_path):
    """On a GPU the flags are read every so often; no step slips through until then."""
    draws = random.Random(0)
    num_stopped = 0
    for trial in range(200):
        limit, read_interval = draws.randrange(4), draws.randrange(2, 12)
        bad = {step for step in range(36) if draws.random() < 0.08}
        late_folder, folder = tmp_path / f"{trial}a", tmp_path / f"{trial}b"
        folder.mkdir()
        late_folder.mkdir()
        at_once, late = make_guard(limit, folder), make_guard(limit, late_folder, on_host=False)
        taken, error = drive(at_once, bad, range(36))
        late_taken, late_error = drive(late, bad, range(36), read_interval)
        if late_error is None:  # the end of training is a reading, too
            try:
                late.read(LAST)
            except NonFiniteError as found:
                late_error = found
        assert late_taken == taken
        assert late.seen == at_once.seen == sorted(bad)[: limit + 1]
        assert (error is None) == (late_error is None)
        assert str(late_error).replace(str(late_folder), str(folder)) == str(error)
        names = [sorted(p.name for p in f.iterdir()) for f in (folder, late_folder)]
        assert names[0] == names[1]
        num_stopped += error is not None
    assert 20 < num_stopped < 180


@pytest.mark.parametrize("on_host", [True, False])
def test_steps_skipped_before_a_resume_count(on_host):
    guard = make_guard(3, on_host=on_host)
    guard.restore([3, 8])
    taken, error = drive(guard, [12, 15], range(10, 20))
    assert taken == [10, 11, 13, 14]
    assert guard.seen == [3, 8, 12, 15]
    assert "at step 16; the step was not taken (3 were skipped)" in str(error)


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_with_a_lower_limit_after_a_resume_the_next_one_stops(limit):
    """The old ones alone do not: those steps are past, and their weights are good."""
    guard = make_guard(limit)
    guard.restore([3, 8])
    taken, error = drive(guard, [12], range(10, 20))
    assert taken == [10, 11]
    assert "at step 13; the step was not taken (2 were skipped)" in str(error)


def test_a_disk_that_refuses_the_description_is_told(tmp_path, caplog):
    guard = make_guard(1, tmp_path / "missing")
    _, error = drive(guard, [1, 2], range(4))
    assert "(not written, No such file or directory)" in caplog.text
    assert "the batch: not written, No such file or directory" in str(error)


# --- training


def spoil(monkeypatch, bad_steps, seen=None):
    """NaN losses at these steps; `seen`: step -> the images of its batch."""
    honest = Trainer.train

    def spoilt(self):
        loss_fn = self.job.process.loss

        def loss(network, *example):
            if seen is not None:
                seen[self.step] = example[0]
            return loss_fn(network, *example) * (math.nan if self.step in bad_steps else 1.0)

        self.job.process.loss = loss
        return honest(self)

    monkeypatch.setattr(Trainer, "train", spoilt)


def leave_out(monkeypatch, steps):
    """Honest training in which the optimizer does nothing at these steps."""
    honest = Trainer.train

    def without(self):
        take = self.learner.optimizer.step
        self.learner.optimizer.step = lambda: None if self.step in steps else take()
        return honest(self)

    monkeypatch.setattr(Trainer, "train", without)


def read_late(monkeypatch):
    """As on a GPU."""
    honest = NonFiniteGuard.__init__

    def deferred(self, *arguments):
        honest(self, *arguments)
        self.on_host = False

    monkeypatch.setattr(NonFiniteGuard, "__init__", deferred)


SKIP = ["on_nonfinite=skip", "use_scheduler=true", "max_steps=20"]
BAD = {8, 13}


def assert_logged_without(bad_steps):
    """Of `skipped`: the means are those of the other steps' losses, as `without` logged them."""
    losses = logged("without")
    text = Path("checkpoints/skipped/metrics.jsonl").read_text()
    rows = {row["step"]: row for row in map(json.loads, text.splitlines())}
    assert rows.keys() == {1, 5, 10, 15, 20}
    for first, last in ((1, 1), (2, 5), (6, 10), (11, 15), (16, 20)):
        good = [losses[step] for step in range(first, last + 1) if step - 1 not in bad_steps]
        if good:  # what is not finite is not logged
            assert rows[last]["train/loss"] == pytest.approx(sum(good) / len(good), rel=1e-6)
            assert "train/loss_smoothed" in rows[last]
        else:
            assert "train/loss" not in rows[last]


@pytest.mark.filterwarnings("ignore:Seems like", "error:Detected call")
@pytest.mark.parametrize("bad_steps", [BAD, {0, 1}])
@pytest.mark.parametrize("is_late", [False, True])
def test_skipping_leaves_out_the_update_and_nothing_else(tiny, monkeypatch, is_late, bad_steps):
    with monkeypatch.context() as patch:
        leave_out(patch, bad_steps)
        assert run(tiny, "without", *SKIP, "log_interval=1") == EXIT_OK
    with monkeypatch.context() as patch:
        spoil(patch, bad_steps)
        if is_late:
            read_late(patch)
        assert run(tiny, "skipped", *SKIP) == EXIT_OK
    without, skipped = state_of("without"), state_of("skipped")
    for key in ("model_state_dict", "ema_model_state_dict"):
        assert all(torch.equal(without[key][name], skipped[key][name]) for name in without[key])
    assert skipped["ema_num_updates"] == without["ema_num_updates"] == 20
    moments = [state["optimizer_state_dict"]["state"] for state in (without, skipped)]
    for index, wanted in moments[0].items():
        assert wanted["step"] == 18
        assert all(torch.equal(wanted[name], moments[1][index][name]) for name in wanted)
    assert logged("skipped", "train/lr")[20] == logged("without", "train/lr")[20]
    assert skipped["nonfinite_steps"] == sorted(bad_steps)
    assert_logged_without(bad_steps)
    assert math.isfinite(skipped["best_loss"])
    assert torch.isfinite(skipped["loss_stats"]).all()


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
def test_a_run_that_skips_resumes_exactly(tiny, monkeypatch):
    spoil(monkeypatch, BAD)
    assert run(tiny, "whole", *SKIP) == EXIT_OK
    for step in (7, 8, 12):
        with monkeypatch.context() as patch:
            in_step(patch, step, lambda: signal.raise_signal(signal.SIGTERM))
            assert run(tiny, "parts", *SKIP, "resume_path=auto") == EXIT_PREEMPTED
        assert state_of("parts")["step"] == step + 1
    assert run(tiny, "parts", *SKIP, "resume_path=auto") == EXIT_OK
    assert_same_training(state_of("whole"), state_of("parts"))
    assert state_of("parts")["nonfinite_steps"] == sorted(BAD)


def test_the_limit_holds_across_a_resume(tiny, monkeypatch):
    spoil(monkeypatch, BAD | {17})
    options = [*SKIP, "max_nonfinite_steps=2", "resume_path=auto"]
    with pytest.raises(NonFiniteError, match=r"at step 18; .*\(2 were skipped\)"):
        run(tiny, "whole", *options)
    assert run(tiny, "parts", *options, "max_steps=12") == EXIT_OK
    with pytest.raises(NonFiniteError, match=r"at step 18; .*\(2 were skipped\)"):
        run(tiny, "parts", *options)


def test_a_run_that_skipped_may_go_on_without_skipping(tiny, monkeypatch):
    with monkeypatch.context() as patch:
        spoil(patch, BAD)
        assert run(tiny, "a", *SKIP) == EXIT_OK
        assert run(tiny, "b", *SKIP, "max_steps=10") == EXIT_OK
        with pytest.raises(NonFiniteError, match=r"at step 14; .*\(1 were skipped\)"):
            run(tiny, "b", *SKIP, "resume_path=auto", "on_nonfinite=stop")
    assert run(tiny, "a", *SKIP, "max_steps=25", "resume_path=auto", "on_nonfinite=stop") == EXIT_OK


def test_the_file_names_the_images_of_the_step(tiny, monkeypatch):
    """In mid-epoch and across the end of one, also after a resume."""
    seen = {}
    spoil(monkeypatch, {3, 22, 30}, seen)
    options = ["on_nonfinite=skip", "resume_path=auto"]
    for steps in (25, 32):
        assert run(tiny, "a", *options, f"max_steps={steps}") == EXIT_OK
    files = sorted(Path("checkpoints/a").glob("nonfinite_*.json"))
    assert [p.name for p in files] == [f"nonfinite_step_{n:07d}.json" for n in (4, 23, 31)]
    config = Config(experiment_name="a", dataset="digits", image_size=8)
    images = datasets.build_dataset(config, "train").images
    for path in files:
        found = json.loads(path.read_text())
        assert torch.equal(to_float(images[found["indices"]]), seen[found["step"] - 1])


def test_the_flags_are_read_before_a_checkpoint_is_written(tiny, monkeypatch):
    """On a GPU, where nothing else reads them in time: no file tells of a step that ended a run."""
    spoil(monkeypatch, {1})
    read_late(monkeypatch)
    options = [*ONE_STEP_PER_EPOCH, "save_interval=1", "log_interval=50", "max_steps=4"]
    with pytest.raises(NonFiniteError, match=r"at step 2; .*current_model\.pth, step 1;"):
        run(tiny, "a", *options)  # a checkpoint after every step
    assert state_of("a")["step"] == 1
    assert [path.name for path in Path("checkpoints/a").glob("model_epoch_*")] == [
        "model_epoch_0001.pth"
    ]


@pytest.mark.parametrize("num_parts", [1, 2])
def test_an_infinite_loss_with_a_finite_gradient_is_noticed(tiny, monkeypatch, num_parts):
    """In the first part of the third step: the loss alone tells, the gradient would be taken."""
    calls = []
    honest = Process.loss

    def loss(self, *arguments):
        value = honest(self, *arguments)
        if value.requires_grad:  # of a step
            calls.append(1)
        return value + (math.inf if len(calls) == 2 * num_parts + 1 else 0.0)

    monkeypatch.setattr(Process, "loss", loss)
    options = ["batch_size=8", "max_steps=4", f"gradient_accumulation_steps={num_parts}"]
    assert run(tiny, "skips", *options, "on_nonfinite=skip") == EXIT_OK
    assert state_of("skips")["nonfinite_steps"] == [2]
    assert state_of("skips")["optimizer_state_dict"]["state"][0]["step"] == 3
    calls.clear()
    with pytest.raises(NonFiniteError, match="at step 3; the step was not taken"):
        run(tiny, "stops", *options)


def test_fp16_that_fits_at_no_scale_stops(tiny, monkeypatch):
    """The loss is finite, its gradients never are: the scale of the loss falls and falls."""
    honest = Process.loss

    def loss(self, *arguments):
        value = honest(self, *arguments)
        if value.requires_grad:
            value.register_hook(lambda gradient: gradient * math.inf)
        return value

    monkeypatch.setattr(Process, "loss", loss)
    monkeypatch.setattr("training.job.resolve_precision", lambda *_: "fp16")  # without a GPU
    monkeypatch.setattr("training.trainer.autocast", lambda *_: contextlib.nullcontext())  # slow
    read_late(monkeypatch)
    with pytest.raises(NonFiniteError, match=r"precision=fp16: .*; no such step was taken"):
        run(tiny, "a", "batch_size=4", "log_interval=7", "max_steps=60")
    assert logged("a", "train/loss_scale") == {n: 2.0 ** (16 - n) for n in (1, 7, 14, 21, 28)}


@pytest.mark.parametrize(
    ("overflows", "scale", "is_stuck"),
    [
        (49 * "x", 1.0, False),
        (50 * "x", 1.0, True),
        (50 * "x" + ".", 1.0, True),
        (49 * "x" + ".x", 1.0, False),
        ("x.x", 1.1e-4, False),
        ("x.x", 0.9e-4, True),
    ],
)
def test_one_overflow_in_fp16_is_no_fault(overflows, scale, is_stuck):
    guard = make_guard(0, on_host=False)
    for sign in overflows:
        guard.add_scaled(torch.tensor(sign == "."), torch.tensor(scale))
    with pytest.raises(NonFiniteError) if is_stuck else contextlib.nullcontext():
        guard.read(LAST)


# --- several processes

RANKS = """
import hashlib, json, math, os, sys

sys.path.insert(0, sys.argv[1])
import train
from utils.errors import exit_code_of
from training import job
from training.trainer import Trainer

rank, trainers = int(os.environ["RANK"]), []
honest = Trainer.train

def spoilt(self):
    trainers.append(self)
    loss_fn, calls = self.job.process.loss, []

    def loss(network, *example):
        calls.append(1)
        is_bad = BAD and rank == 1 and len(calls) == BAD
        return loss_fn(network, *example) + (math.inf if is_bad else 0.0)  # the gradient is finite

    self.job.process.loss = loss
    return honest(self)

Trainer.train = spoilt
half = {"auto": "fp32", "fp16": "fp16"}  # without a GPU
job.resolve_precision = lambda precision, device: half[precision]
results = {}
for name, (port, BAD, options) in json.loads(sys.argv[2]).items():
    os.environ["MASTER_PORT"] = str(port)
    arguments = ["--config", "tiny.py", "--device", "cpu", f"experiment_name={name}", *options]
    code = exit_code_of(lambda: train.main(arguments))
    weights = trainers[-1].learner.model.state_dict().values()
    digest = hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights)).hexdigest()
    results[name] = [code, trainers[-1].step, trainers[-1].guard.seen, digest]
with open(f"rank{rank}.json", "w") as file:
    json.dump(results, file)
"""


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def start_rank(rank, *arguments, cwd):
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    environment = {**places, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": 1}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.ci
def test_an_infinite_loss_on_one_rank_stops_all(tiny, tmp_path):
    """Its gradient is finite, so that nothing but the loss itself could tell the other rank."""
    parts = "gradient_accumulation_steps=2"
    runs = {
        "four": (0, ["max_steps=4"]),
        "stop": (5, ["max_steps=9"]),  # the call of the loss that is spoilt
        "skip": (5, ["max_steps=9", "on_nonfinite=skip"]),
        "half": (5, ["max_steps=9", "precision=fp16"]),  # where the norm decides nothing
        "four_parts": (0, ["max_steps=4", parts]),
        "stop_parts": (9, ["max_steps=9", parts]),  # the first half of the fifth step
    }
    ports = free_ports(len(runs))
    runs = {name: (port, *rest) for port, (name, rest) in zip(ports, runs.items(), strict=True)}
    path = tmp_path / "ranks.py"
    path.write_text(RANKS, encoding="utf-8")
    started = [start_rank(rank, path, ROOT, json.dumps(runs), cwd=tmp_path) for rank in (0, 1)]
    outputs = [process.communicate(timeout=200)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    for before, stopped in (("four", "stop"), ("four_parts", "stop_parts")):
        assert ranks[0][before][:3] == [EXIT_OK, 4, []]
        assert ranks[0][stopped] == [EXIT_NON_FINITE, 4, [4], ranks[0][before][3]]
    assert ranks[0]["half"][:3] == [EXIT_NON_FINITE, 4, [4]]
    for output in outputs:
        assert output.count("not finite at step 5; the step was not taken") == 3
    assert ranks[0]["skip"][:3] == [EXIT_OK, 9, [4]]
    assert state_of("skip")["nonfinite_steps"] == [4]
    assert not Path("checkpoints/stop/current_model.pth").exists()
