"""Trackers: metrics.jsonl is the record, and nothing about a tracker stops a run."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, largest_file
from tests.test_train import assert_same_training, run, state_of
from training import tracking
from training.tracking import (
    Lane,
    MetricsFile,
    SwanlabTracker,
    TrackerGroup,
    WandbTracker,
    start_trackers,
)
from utils.config import Config
from utils.errors import EXIT_OK, ConfigError


@pytest.fixture
def warnings(caplog):
    """The project's warnings so far."""
    logger = logging.getLogger("diffusion")
    was, logger.propagate = logger.propagate, True
    caplog.set_level(logging.WARNING)
    yield lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    logger.propagate = was


def config_in(folder: Path, **values) -> Config:
    (folder / "run").mkdir(exist_ok=True)
    return Config(**{"save_dir": str(folder), "experiment_name": "run", **values})


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]


# --- metrics.jsonl


def test_a_line_per_call(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = MetricsFile(path, 0)
    tracker.append({"train/loss": 0.5}, 1)
    tracker.append({"train/loss": 0.25, "train/lr": 1e-4}, 2)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows == [
        {"step": 1, "train/loss": 0.5},
        {"step": 2, "train/loss": 0.25, "train/lr": 1e-4},
    ]


@pytest.mark.parametrize(
    ("start", "kept"), [(0, []), (15, [10]), (20, [10, 20]), (99, [10, 20, 30])]
)
def test_going_on_drops_what_will_be_made_again(tmp_path, start, kept):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for step in (10, 20, 30):
        first.append({"loss": 1.0}, step)
    lines = path.read_text(encoding="utf-8").splitlines()
    MetricsFile(path, start)
    assert path.read_text(encoding="utf-8").splitlines() == lines[: len(kept)]
    assert steps_in(path) == kept
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "torn",
    [b'{"step": 3, "lo', b'{"step": 3', b"\x00\x00\x00", b"\xff\xfe", b"7", b'{"loss": 1}', b"[]"],
)
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 1.0}\n' + torn)
    tracker = MetricsFile(path, 5)
    tracker.append({"loss": 0.5}, 6)
    assert steps_in(path) == [1, 2, 6]


# --- the group


class Failing:
    """Raises in what is named, and counts the calls."""

    def __init__(self, *names: str, error: BaseException | None = None) -> None:
        self.names, self.calls = names, []
        self.error = error or RuntimeError("no connection\nto the server")

    def _maybe(self, name: str) -> None:
        self.calls.append(name)
        if name in self.names:
            raise self.error

    def log_scalars(self, scalars, step):
        self._maybe("log_scalars")

    def log_image(self, name, image, step):
        self._maybe("log_image")

    def finish(self):
        self._maybe("finish")


IMAGE = torch.zeros(1, 4, 4, dtype=torch.uint8)


@pytest.mark.parametrize("error", [ValueError("bad\nkey"), ImportError("swanlab"), SystemExit(1)])
def test_a_tracker_that_cannot_start_is_a_warning(warnings, error):
    def make():
        raise error

    group = TrackerGroup(lanes=[Lane(make, "SwanLab")])
    group.log_scalars({"x": 1.0}, 1)
    group.finish()
    assert len(warnings()) == 1
    assert warnings()[0].startswith("SwanLab: not started, the run goes on without it")
    assert "\n" not in warnings()[0]


@pytest.mark.parametrize("error", [RuntimeError("down"), SystemExit(2)])
def test_three_failures_in_a_row_drop_a_tracker_and_no_other(warnings, error):
    bad, good = Failing("log_scalars", error=error), Failing()
    group = TrackerGroup(lanes=[Lane(lambda: bad, "bad"), Lane(lambda: good, "good")])
    for step in range(10):
        group.log_scalars({"x": 1.0}, step)
    group.finish()
    assert bad.calls == ["log_scalars"] * 3
    assert good.calls == ["log_scalars"] * 10 + ["finish"]
    assert len(warnings()) == 2
    assert "the run goes on" in warnings()[0]
    assert "dropped" in warnings()[1]


def test_metrics_jsonl_goes_on_when_a_full_disk_has_room_again(tmp_path, warnings):
    """However long it was full; a row that fits in half leaves nothing behind."""
    group = start_trackers(config_in(tmp_path), is_main=True, start_step=0)
    path = tmp_path / "run" / "metrics.jsonl"
    for step in range(1, 10):
        is_full = 3 <= step < 8
        with largest_file(path.stat().st_size + 10) if is_full else nullcontext():
            group.log_scalars({"train/loss": 0.5}, step)
    assert steps_in(path) == [1, 2, 8, 9]
    (warning,) = warnings()
    assert warning.startswith("metrics.jsonl failed: OSError: [Errno 28] No space left")


def test_now_and_then_a_failure_warns_once_and_drops_nothing(warnings):
    flaky = Failing("log_scalars")
    group = TrackerGroup(lanes=[Lane(lambda: flaky, "flaky")])
    for step in range(8):
        group.log_scalars({"x": 1.0}, step)
        group.log_image("samples", IMAGE, step)
    group.finish()
    assert len(flaky.calls) == 17
    assert len(warnings()) == 1


@pytest.mark.parametrize("method", ["log_scalars", "log_image", "finish"])
def test_no_failure_gets_out(warnings, method):
    group = TrackerGroup(lanes=[Lane(lambda: Failing(method), "bad")])
    group.log_scalars({"x": 1.0}, 1)
    group.log_image("samples", IMAGE, 1)
    group.finish()
    assert len(warnings()) == 1
    assert "\n" not in warnings()[0]


def test_numbers_that_are_none_stay_out(tmp_path):
    group = start_trackers(config_in(tmp_path), is_main=True, start_step=0)
    values = {"a": 1, "b": math.nan, "c": math.inf, "d": torch.tensor(2.0)}
    group.log_scalars(values, 1)
    text = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert json.loads(text) == {"step": 1, "a": 1.0, "d": 2.0}


def test_other_ranks_track_nothing(tmp_path):
    config = config_in(tmp_path, use_swanlab=True)
    group = start_trackers(config, is_main=False, start_step=0, earlier={"tracker_run_id": "x"})
    group.log_scalars({"x": 1.0}, 1)
    group.finish()
    assert list((tmp_path / "run").iterdir()) == []


# --- a tracker in the background


class Hanging(Failing):
    """Waits in what is named until it is let go."""

    def __init__(self, *names: str) -> None:
        super().__init__(*names)
        self.let_go = threading.Event()

    def _maybe(self, name: str) -> None:
        self.calls.append(name)
        if name in self.names:
            self.let_go.wait()


@pytest.mark.parametrize("where", ["log_scalars", "log_image", "finish", "start"])
def test_a_tracker_that_hangs_costs_the_training_nothing(tmp_path, warnings, monkeypatch, where):
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "MAX_QUEUED", 20)
    tracker = Hanging(where)

    def make():
        tracker._maybe("start")
        return tracker

    path = config_in(tmp_path).run_dir / "metrics.jsonl"
    group = TrackerGroup(
        MetricsFile(path, 0), [Lane(make, "SwanLab")], earlier_ids={"tracker_run_id": "before"}
    )
    began = time.monotonic()
    for step in range(30):
        group.log_scalars({"x": 1.0}, step)
        group.log_image("samples", IMAGE, step)
    assert group.run_ids == {"tracker_run_id": "before"}
    group.finish()
    assert time.monotonic() - began < 5
    assert steps_in(tmp_path / "run" / "metrics.jsonl") == list(range(30))
    told = warnings()
    assert "SwanLab does not answer" in told[-1]
    if where != "finish":
        assert "SwanLab does not keep up" in told[0]
        assert len(told) == 2
    tracker.let_go.set()


def test_the_background_keeps_the_order(monkeypatch):
    seen = []

    class Recorder(Failing):
        def log_scalars(self, scalars, step):
            seen.append(step)

    group = TrackerGroup(lanes=[Lane(Recorder, "recorder")])
    for step in range(500):
        group.log_scalars({"x": 1.0}, step)
    group.finish()
    assert seen == list(range(500))


# --- SwanLab


class FakeSwanlab:
    """What `SwanlabTracker` uses of the package, with an optional failure of `init`."""

    def __init__(self, api_key: str | None = None, failing_modes: tuple[str, ...] = ()) -> None:
        self.inits, self.settings, self.failing_modes = [], [], failing_modes
        self.api_key = api_key

    def Settings(self, **options):  # noqa: N802
        self.settings.append(options)
        return type("Settings", (), {"api_key": self.api_key})()

    def init(self, **arguments):
        self.inits.append(arguments)
        if arguments["mode"] in self.failing_modes:
            raise ConnectionError("no route\nto host")
        return type("Run", (), {"id": arguments.get("id", "new id")})()

    def finish(self):
        pass


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.delenv("SWANLAB_MODE", raising=False)

    def install(**options) -> FakeSwanlab:
        module = FakeSwanlab(**options)
        monkeypatch.setitem(sys.modules, "swanlab", module)
        return module

    return install


@pytest.mark.parametrize(
    ("mode", "environment", "key", "used"),
    [
        ("auto", None, None, "offline"),
        ("auto", None, "key", "online"),
        ("auto", "disabled", "key", "disabled"),
        ("auto", "cloud", "key", "online"),
        ("auto", "online", "key", "online"),
        ("cloud", None, "key", "online"),
        ("local", None, None, "local"),
        ("offline", None, "key", "offline"),
        ("disabled", None, "key", "disabled"),
    ],
)
def test_modes(tmp_path, fake, monkeypatch, mode, environment, key, used):
    module = fake(api_key=key)
    if environment:
        monkeypatch.setenv("SWANLAB_MODE", environment)
    SwanlabTracker(config_in(tmp_path, swanlab_mode=mode), None)
    assert [call["mode"] for call in module.inits] == [used]
    assert module.settings == [{"interactive": False}], "it must never ask"


def test_a_run_goes_on_under_its_id(tmp_path, fake, warnings):
    module = fake(api_key="key")
    config = config_in(tmp_path, use_swanlab=True)
    group = start_trackers(config, is_main=True, start_step=3, earlier={"tracker_run_id": "a" * 21})
    group.finish()
    assert group.run_ids["tracker_run_id"] == "a" * 21
    assert (module.inits[0]["id"], module.inits[0]["resume"]) == ("a" * 21, "allow")
    group = start_trackers(config, is_main=True, start_step=0)
    group.finish()
    assert group.run_ids["tracker_run_id"] == "new id"


def test_the_id_survives_a_tracker_that_does_not_start(tmp_path, fake, warnings):
    fake(api_key="key", failing_modes=("online", "offline"))
    config = config_in(tmp_path, use_swanlab=True)
    group = start_trackers(config, is_main=True, start_step=3, earlier={"tracker_run_id": "known"})
    group.finish()
    assert group.run_ids["tracker_run_id"] == "known"
    assert "not started, the run goes on" in warnings()[-1]


def test_no_connection_means_offline_if_the_mode_is_auto(tmp_path, fake, warnings):
    module = fake(api_key="key", failing_modes=("online",))
    SwanlabTracker(config_in(tmp_path), None)
    assert [call["mode"] for call in module.inits] == ["online", "offline"]
    assert len(warnings()) == 1
    assert "logging offline" in warnings()[0]
    with pytest.raises(ConnectionError):
        SwanlabTracker(config_in(tmp_path, swanlab_mode="cloud"), None)


def test_swanlab_for_real_without_key_or_network(tmp_path, monkeypatch):
    """`auto` without a key logs offline, asks nothing, and keeps config, scalars and images."""
    pytest.importorskip("swanlab")
    for name in ("SWANLAB_MODE", "SWANLAB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)

    def ask(*_):
        raise AssertionError("SwanLab asked for input")

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr("getpass.getpass", ask)
    config = config_in(tmp_path, use_swanlab=True, learning_rate=0.0123)
    group = start_trackers(config, is_main=True, start_step=0)
    group.log_scalars({"train/loss": 0.5}, 1)
    group.log_image("samples", torch.zeros(1, 8, 8, dtype=torch.uint8), 1)
    group.log_image("samples", torch.zeros(3, 8, 8, dtype=torch.uint8), 2)
    group.finish()
    assert group.run_ids["tracker_run_id"]
    (folder,) = (tmp_path / "run" / "swanlog").glob("run-*")
    assert "0.0123" in (folder / "files" / "config.yaml").read_text(encoding="utf-8")
    assert b"train/loss" in next(folder.glob("*.swanlab")).read_bytes()
    assert len(list(folder.rglob("*.png"))) == 2
    assert steps_in(tmp_path / "run" / "metrics.jsonl") == [1]
    assert sorted(p.name for p in tmp_path.iterdir()) in (["home", "run"], ["run"])


# --- W&B


class FakeWandb(FakeSwanlab):
    """What `WandbTracker` uses of the package; without a key it refuses to be online."""

    __name__ = "wandb"

    def setup(self, settings):
        self.set_up = settings

    def Settings(self, **options):  # noqa: N802
        self.settings.append(options)
        return options

    def init(self, **arguments):
        assert self.set_up["silent"], "else it asks on a terminal"
        if arguments["mode"] == "online" and self.api_key is None:
            raise ValueError("No API key configured")
        return super().init(**arguments)

    def Image(self, array):  # noqa: N802
        return array.shape

    def log(self, values, step):
        self.inits.append((values, step))


@pytest.fixture
def fake_wandb(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)

    def install(**options) -> FakeWandb:
        module = FakeWandb(**options)
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    return install


@pytest.mark.parametrize(
    ("mode", "environment", "key", "used"),
    [
        ("auto", None, None, "offline"),
        ("auto", None, "key", "online"),
        ("auto", "disabled", "key", "disabled"),
        ("offline", None, "key", "offline"),
        ("offline", "online", "key", "online"),
        ("disabled", None, "key", "disabled"),
        ("online", None, "key", "online"),
    ],
)
def test_modes_of_wandb(tmp_path, fake_wandb, monkeypatch, warnings, mode, environment, key, used):
    module = fake_wandb(api_key=key)
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    config = config_in(tmp_path, wandb_mode=mode, learning_rate=0.0123)
    tracker = WandbTracker(config, None)
    tracker.log_scalars({"train/loss": 0.5}, 1)
    tracker.log_image("samples", IMAGE, 1)
    call, *logged = module.inits
    assert (call["mode"], call["dir"]) == (used, str(tmp_path / "run"))
    assert call["config"]["learning_rate"] == 0.0123
    assert "id" not in call
    assert logged == [({"train/loss": 0.5}, 1), ({"samples": (4, 4)}, 1)]
    assert len(warnings()) == (key is None)


def test_swanlab_and_wandb_keep_their_ids_apart(tmp_path, fake, fake_wandb, warnings):
    """Of a run that is resumed online, in each; also where one of them does not start."""
    modules = fake(api_key="key"), fake_wandb(api_key="key")
    config = config_in(tmp_path, use_swanlab=True, use_wandb=True)
    ids = {"tracker_run_id": "a", "wandb_run_id": "b"}
    group = start_trackers(config, is_main=True, start_step=3, earlier=ids)
    group.finish()
    assert group.run_ids == ids
    assert [module.inits[0]["id"] for module in modules] == ["a", "b"]
    assert [module.inits[0]["resume"] for module in modules] == ["allow"] * 2
    fake_wandb(api_key="key", failing_modes=("online", "offline"))
    group = start_trackers(config, is_main=True, start_step=0, earlier={"wandb_run_id": "b"})
    group.finish()
    assert group.run_ids == {"tracker_run_id": "new id", "wandb_run_id": "b"}
    assert "W&B: not started, the run goes on" in warnings()[-1]


def test_a_run_that_wandb_fails_in_is_the_same_run(tiny, fake_wandb, monkeypatch):
    """... and its checkpoints hold the id."""
    module = fake_wandb(api_key="key")
    monkeypatch.setattr(tracking, "find_spec", lambda name: name)
    monkeypatch.setattr(module, "log", Failing("log_scalars").log_scalars)
    run(tiny, "without", "max_steps=6", "log_interval=1")
    assert run(tiny, "with", "max_steps=6", "log_interval=1", "use_wandb=true") == EXIT_OK
    assert_same_training(state_of("without"), state_of("with"))
    assert state_of("with")["wandb_run_id"] == "new id"
    rows = [rows_in(Path("checkpoints") / name / "metrics.jsonl") for name in ("with", "without")]
    assert rows[0].keys() == rows[1].keys()


def test_wandb_for_real_without_key_or_network(tmp_path, monkeypatch, warnings):
    """`auto` without a key logs offline, asks nothing, and keeps scalars and images."""
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("W&B asked for input"))
    config = config_in(tmp_path, use_wandb=True, learning_rate=0.0123)
    group = start_trackers(config, is_main=True, start_step=0)
    group.log_scalars({"train/loss": 0.5}, 1)
    group.log_image("samples", IMAGE, 1)
    group.finish()
    assert group.run_ids["wandb_run_id"]
    assert "logging offline" in warnings()[0]
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert b"train/loss" in next(folder.glob("*.wandb")).read_bytes()
    assert len(list(folder.rglob("*.png"))) == 1


# --- TensorBoard


def events_in(folder: Path) -> dict[int, dict[str, float]]:
    """Step -> name -> value, as TensorBoard shows them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    found: dict[int, dict[str, float]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            row = found.setdefault(event.step, {})
            assert name not in row, "a step stands there twice"
            row[name] = event.value
    for name in events.Tags()["images"]:
        for event in events.Images(name):
            found.setdefault(event.step, {})[f"{name} {event.width}x{event.height}"] = 1.0
    return found


def rows_in(path: Path) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        found.setdefault(row.pop("step"), {}).update(row)
    return found


def test_tensorboard_has_what_metrics_jsonl_has_also_after_a_resume(tmp_path, warnings):
    config = config_in(tmp_path, use_tensorboard=True)
    for start, steps in ((0, range(1, 8)), (4, range(5, 10))):  # killed after 7, went on from 4
        group = start_trackers(config, is_main=True, start_step=start)
        for step in steps:
            group.log_scalars(
                {"train/loss": 1 / step + start, "epoch": step, "nan": math.nan}, step
            )
            if step == 6:
                group.log_image("samples", torch.zeros(1, 8, 10, dtype=torch.uint8), step)
                group.log_image("colour", torch.zeros(3, 8, 10, dtype=torch.uint8), step)
        group.finish()
    assert warnings() == []
    found = events_in(tmp_path / "run" / "tensorboard")
    assert found[6].pop("samples 10x8") == found[6].pop("colour 10x8") == 1.0
    wanted = rows_in(tmp_path / "run" / "metrics.jsonl")
    assert list(found) == list(wanted) == list(range(1, 10))
    assert found == {step: pytest.approx(row, rel=1e-6) for step, row in wanted.items()}


def test_a_real_run_in_tensorboard_and_the_same_weights(tiny):
    options = ["log_interval=2", "sample_start_epoch=1", "sample_interval=1", "num_samples=4"]
    run(tiny, "without", "max_steps=26", "log_interval=2")
    options.append("use_tensorboard=true")
    assert run(tiny, "with", "max_steps=25", *options) == EXIT_OK
    assert run(tiny, "with", "max_steps=26", "resume_path=auto", *options) == EXIT_OK
    assert_same_training(state_of("without"), state_of("with"))
    folder = Path("checkpoints/with")
    found, wanted = events_in(folder / "tensorboard"), rows_in(folder / "metrics.jsonl")
    pictures = [key for row in found.values() for key in row if key.startswith("samples")]
    assert len(pictures) == 1
    for row in found.values():
        row.pop(pictures[0], None)
    found = {step: row for step, row in found.items() if row}
    assert found == {step: pytest.approx(row, rel=1e-6) for step, row in wanted.items()}


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_line_before_anything_is_written(tiny, monkeypatch, package):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        run(tiny, "a", f"use_{package}=true")
    assert f"pip install {package}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("checkpoints").exists()
    assert run(tiny, "a", "max_steps=1") == EXIT_OK


def test_tensorboard_is_loaded_by_those_who_ask_for_it(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from utils.config import Config
from training.tracking import start_trackers
from pathlib import Path
Path("run").mkdir()
config = Config(save_dir=".", experiment_name="run")
start_trackers(config, is_main=True, start_step=0).finish()
print("tensorboard" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "False\n", done.stderr
