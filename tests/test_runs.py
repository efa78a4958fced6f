"""runs.py: what it lists, and the page it makes of runs."""

from __future__ import annotations

import base64
import json
import math
import mmap
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

import runs
from diffusion.process import Process
from reporting import charts
from reporting.charts import draw_chart, draw_lines, legend_of, smoothed
from reporting.pages import NOTHING
from reporting.run_files import (
    METRICS,
    by_name,
    facts_of,
    find_runs,
    parse_row,
    read_series,
    size_text,
)
from reporting.runs import MAX_SIDE, differing_settings, read_picture, render_report
from tests.conftest import ROOT, TINY_CONFIG
from tests.test_html import EVIL, assert_self_contained, find_chromium, open_in_chromium
from tests.test_train import assert_same_training, run, state_of
from training.objective import quartile_of
from training.progress import LossStats, Progress, Schedule, memory_mib
from training.run_dir import locked
from utils.config import Config
from utils.distributed import Runtime
from utils.errors import EXIT_OK, EXIT_USAGE, ConfigError, UserError

PICTURES = ["num_samples=4", "sample_interval=1", "sample_start_epoch=1", "num_inference_steps=1"]


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two finished runs and the losses per example that the first one computed, step by step."""
    folder, seen = tmp_path_factory.mktemp("trained"), []
    (folder / "tiny.py").write_text(TINY_CONFIG, encoding="utf-8")
    honest = Process.loss

    def loss(self, model, x_0, y, t, noise):
        found = honest(self, model, x_0, y, t, noise)
        if found.requires_grad:  # of a step
            seen.append((t.clone(), found.detach().clone()))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(Process, "loss", loss)
        common = ["max_steps=46", "gradient_accumulation_steps=2", *PICTURES]
        assert run(folder / "tiny.py", "first", *common) == EXIT_OK
        losses = list(seen)
        assert run(folder / "tiny.py", "second", "learning_rate=1e-4", *common) == EXIT_OK
    return folder / "checkpoints", losses


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of those runs to spoil."""
    return Path(shutil.copytree(trained[0], tmp_path / "checkpoints"))


# --- loss by timestep quartile, and memory


def test_quartiles_are_those_of_a_direct_computation(trained):
    """46 steps of two micro-batches each; rows at step 1 and at the multiples of 5."""
    runs_dir, losses = trained
    rows, first = [row for row in rows_of(runs_dir / "first") if "train/lr" in row], 0
    assert [row["step"] for row in rows] == [1, *range(5, 46, 5)]
    for row in rows:
        window = losses[2 * first : 2 * row["step"]]
        t, values = (torch.cat(parts) for parts in zip(*window, strict=True))
        assert len(t) == 64 * (row["step"] - first)
        total = 0.0
        for k in range(4):
            here = (t >= 25 * k) & (t < 25 * (k + 1))  # T is 100
            mean = float(values[here].double().mean())
            assert row[f"train/loss_q{k + 1}"] == pytest.approx(mean, rel=1e-6)
            total += row[f"train/loss_q{k + 1}"] * int(here.sum())
        assert total / len(t) == pytest.approx(row["train/loss"], rel=1e-6)
        first = row["step"]


@pytest.mark.parametrize("num_timesteps", [2, 3, 4, 10, 1000])
def test_quartiles_cut_the_timesteps_evenly(num_timesteps):
    found = quartile_of(torch.arange(num_timesteps), num_timesteps)
    assert found.tolist() == [math.floor(4 * k / num_timesteps) for k in range(num_timesteps)]


def test_statistics_leave_out_what_is_not_finite_and_know_empty_buckets():
    stats = LossStats(torch.device("cpu"), ("a", "b", "c"))
    stats.add(torch.tensor(2.0), torch.tensor([1.0, 3.0]), torch.tensor([0, 1]))
    bad = torch.tensor([1.0, math.nan])
    stats.add(bad.mean(), bad, torch.tensor([0, 1]))
    stats.add(torch.tensor(5.0), torch.tensor([5.0, 5.0]), torch.tensor([0, 0]))
    _, loss, found = stats.read(Runtime(torch.device("cpu")))
    assert (loss, found["a"], found["b"]) == (3.5, pytest.approx(11 / 3), 3.0)
    assert math.isnan(found["c"])
    older = LossStats(torch.device("cpu"), ("a", "b", "c"))
    older.restore(stats.values[:4])
    assert older.read(Runtime(torch.device("cpu")))[1] == 3.5
    older.restore(stats.values)
    assert torch.equal(older.values, stats.values)


def test_logging_changes_no_bit_of_the_training(tiny, monkeypatch):
    run(tiny, "often", "max_steps=9", "log_interval=1")
    run(tiny, "never", "max_steps=9", "log_interval=1000")
    honest = LossStats.add

    def without_quartiles(self, loss, losses, _):
        honest(self, loss, losses, torch.full_like(losses, -1))

    with monkeypatch.context() as patch:
        patch.setattr(LossStats, "add", without_quartiles)
        run(tiny, "without", "max_steps=9", "log_interval=1")
    often, *others = map(state_of, ("often", "never", "without"))
    for other in others:
        for key in ("model_state_dict", "ema_model_state_dict"):
            assert all(torch.equal(x, other[key][name]) for name, x in often[key].items())


def test_a_resumed_run_logs_the_same_quartiles(tiny):
    run(tiny, "whole", "max_steps=14")
    run(tiny, "halves", "max_steps=7")
    run(tiny, "halves", "max_steps=14", "resume_path=auto")
    assert_same_training(state_of("whole"), state_of("halves"))
    whole, halves = (rows_of(Path("checkpoints") / name) for name in ("whole", "halves"))
    for row in (*whole, *halves):
        for key in ("train/images_per_sec", "train/memory_mib"):
            assert row.pop(key) > 0
    assert whole == halves


@pytest.mark.slow
@pytest.mark.ci
def test_two_processes_log_the_quartiles_of_one(tiny, script):
    common = ["--config", tiny, "max_steps=5", "model_params.dropout=0"]
    run(tiny, "one", *common[2:])
    done = script("train.py", *common, "experiment_name=two", processes=2)
    assert done.returncode == EXIT_OK, done.output
    one, two = (rows_of(Path("checkpoints") / name) for name in ("one", "two"))
    assert [row["step"] for row in one] == [row["step"] for row in two] == [1, 5]
    for key in ("train/loss", *(f"train/loss_q{k}" for k in (1, 2, 3, 4))):
        assert [row[key] for row in one] == pytest.approx([row[key] for row in two], rel=1e-4)


def test_memory_is_the_resident_set():
    with mmap.mmap(-1, 64 * 2**20) as block:  # from the system: malloc may have some to spare
        before = memory_mib(torch.device("cpu"))
        block[:: mmap.PAGESIZE] = bytes(len(block) // mmap.PAGESIZE)
        assert 60 < memory_mib(torch.device("cpu")) - before < 70


def test_time_in_a_pause_is_no_training(monkeypatch):
    now = 0.0
    monkeypatch.setattr("training.progress.time", SimpleNamespace(monotonic=lambda: now))
    progress = Progress(Schedule(100, 10, 100), 0, Runtime(torch.device("cpu")))
    speeds = []
    for step, seconds, paused in ((4, 2.0, 5.0), (5, 0.5, 0.0), (9, 4.0, 100.0)):
        now += seconds / 2
        with progress.pause():
            now += paused
        now += seconds / 2
        speeds.append(progress.lap(step))
    assert speeds == pytest.approx([20.0, 20.0, 10.0])


# --- the list


def listed(capsys, *arguments: object) -> list[dict]:
    assert runs.main([*map(str, arguments), "--json"]) == EXIT_OK
    return json.loads(capsys.readouterr().out)


def test_real_runs_are_listed(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder.parent)
    first, second = listed(capsys)
    assert (first["name"], second["name"]) == ("first", "second")
    assert (first["status"], first["step"], first["total_steps"]) == ("complete", 46, 46)
    assert first["epoch"] == 2
    rows = rows_of(folder / "first")
    assert first["loss"] == [row["train/loss"] for row in rows if "train/loss" in row][-1]
    state = torch.load(folder / "first" / "current_model.pth", weights_only=True)
    assert (first["best"], first["best_metric"]) == (state["best"]["value"], "loss")
    assert listed(capsys, folder) == listed(capsys, "--save-dir", folder)
    assert [x["name"] for x in listed(capsys, folder / "second")] == ["second"]


def test_the_table_is_aligned(folder, capsys):
    assert runs.main([str(folder)]) == EXIT_OK
    head, first, second = capsys.readouterr().out.splitlines()
    assert re.split(r"  +", head) == [
        "name", "status", "epoch", "step", "best", "last loss", "size", "last change",
    ]  # fmt: skip
    cells = re.split(r"  +", first)
    assert cells[:4] == ["first", "complete", "2.0", "46/46"]
    assert re.fullmatch(r"0\.\d+ loss", cells[4])
    assert re.fullmatch(r"[\d.]+ [KM]iB", cells[6])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", cells[7])
    assert len(head) == len(first) == len(second)


def with_status(folder: Path, **facts) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "status.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder


def gone() -> int:
    """The number of a process that is no more."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_a_run_whose_process_is_gone_was_killed(tmp_path):
    here = socket.gethostname()
    run_dir = with_status(tmp_path / "a", state="running", pid=gone(), host=here)
    assert facts_of(run_dir, "a").status == "killed"
    # its number belongs to another process by now, which does not hold the lock
    with_status(run_dir, state="running", pid=os.getppid(), host=here)
    assert facts_of(run_dir, "a").status == "killed"
    (run_dir / "run.lock").touch()
    assert facts_of(run_dir, "a").status == "killed"
    # nothing is known of other hosts
    with_status(run_dir, state="running", pid=gone(), host="elsewhere")
    assert facts_of(run_dir, "a").status == "running"


def test_a_run_that_trains_is_running_and_stays_locked(tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from training.run_dir import locked
with locked(Path({str(tmp_path)!r})):
    print("locked", flush=True)
    sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        process.stdout.readline()
        with_status(tmp_path, state="running", pid=process.pid, host=socket.gethostname())
        assert facts_of(tmp_path, "a").status == "running"
        with pytest.raises(ConfigError, match="is being written"), locked(tmp_path):
            pass
        process.kill()
    assert facts_of(tmp_path, "a").status == "killed"


def test_other_states_torn_files_and_foreign_folders(tmp_path, capsys):
    for state in ("failed", "preempted", "non_finite"):
        with_status(tmp_path / state, state=state, step=7, best={"metric": "kid", "value": 0.5})
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "status.json").write_text('{"state": "runn')
    (tmp_path / "torn" / METRICS).write_text('{"step": 4, "train/loss": 0.5}\n{"step": 5, "tr')
    with_status(tmp_path / "odd", state=3, step="x", epoch=None, best=[1], total_steps=True)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text("{}")
    (tmp_path / "a file").touch()
    found = {x["name"]: x for x in listed(capsys, tmp_path)}
    assert list(found) == ["failed", "non_finite", "odd", "preempted", "torn"]
    assert [found[name]["status"] for name in ("failed", "preempted", "torn", "odd")] == [
        "failed", "preempted", "unknown", "3",
    ]  # fmt: skip
    assert (found["failed"]["step"], found["failed"]["best"]) == (7, 0.5)
    assert (found["torn"]["step"], found["torn"]["loss"]) == (4, 0.5)
    assert {found["odd"][key] for key in ("step", "epoch", "best", "total_steps")} == {None}
    assert runs.main([str(tmp_path)]) == EXIT_OK
    assert "0.5 kid" in capsys.readouterr().out


@pytest.mark.parametrize(("saved", "logged"), [(10, 15), (15, 10)])
def test_a_run_is_as_far_as_the_newer_of_its_files_says(tmp_path, saved, logged):
    """A checkpoint is told to status.json, a log line to metrics.jsonl."""
    folder = with_status(tmp_path / "run", state="killed", step=saved, epoch=saved / 10)
    (folder / METRICS).write_text(json.dumps({"step": logged, "epoch": logged / 10}) + "\n")
    facts = facts_of(folder, "run")
    assert (facts.step, facts.epoch) == (15, 1.5)


def test_folders_without_runs(tmp_path, capsys, script):
    assert runs.main([str(tmp_path)]) == EXIT_OK
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"
    assert listed(capsys, tmp_path) == []
    done = script("runs.py")
    assert done.returncode == EXIT_USAGE
    assert done.output.splitlines() == [
        "error: checkpoints: no such folder; name a run, or a folder that holds runs"
    ]


def test_runs_of_one_name_are_told_apart_and_hard_links_count_once(tmp_path):
    for place in ("a", "b"):
        with_status(tmp_path / place / "digits", state="complete")
    with_status(tmp_path / "b" / "mnist", state="complete")
    found = find_runs([tmp_path / "a", tmp_path / "b", tmp_path / "b" / "mnist"])
    assert list(by_name(found)) == [str(tmp_path / "a/digits"), str(tmp_path / "b/digits"), "mnist"]
    size = facts_of(found[0], "").size
    (found[0] / "current_model.pth").write_bytes(bytes(1000))
    os.link(found[0] / "current_model.pth", found[0] / "best_model.pth")
    assert facts_of(found[0], "").size == size + 1000


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (999 * 1024, "999 KiB"),
        (15 * 2**20, "15 MiB"),
        (2**30, "1 GiB"),
    ],
)
def test_a_size_is_in_the_smallest_unit_that_needs_at_most_three_digits(size, text):
    assert size_text(size) == text


def test_the_list_does_not_wait_for_torch():
    late = {"torch", "PIL", "numpy", "jinja2", "matplotlib"}
    code = f"import sys, runs; print({late} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_a_page_without_curves_does_not_need_matplotlib():
    code = "import sys; sys.modules['matplotlib'] = None\n"
    code += "from reporting import evaluation, runs; print(len(evaluation.render_html({}, {})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout) > 1000, done.stderr


# --- metrics.jsonl


@pytest.mark.parametrize(
    "line", ["", "{", "[]", "7", '{"train/loss": 1}', '{"step": "x"}', '{"step": NaN}', "\x00"]
)
def test_torn_rows_are_none(line):
    assert parse_row(line) is None


def test_rows_keep_their_finite_numbers():
    line = '{"step": 3, "a": 1.5, "b": NaN, "c": "x", "d": true, "e": null, "f": Infinity}'
    assert parse_row(line) == {"step": 3.0, "a": 1.5}


def test_values_that_were_not_finite_are_gaps(tmp_path):
    path = tmp_path / METRICS
    rows = [
        {"step": 1, "train/loss": 4.0, "train/lr": 1.0},
        {"step": 2, "train/lr": 1.0},  # its loss was not finite
        {"step": 3, "train/loss": 2.5, "train/lr": 1.0},
        {"step": 3, "eval/fid": 9.0},
        {"step": 5, "train/loss": 1.0, "train/lr": 1.0},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text[:30] + "\n\n" + text + '{"step": 6, "tr', encoding="utf-8")
    series, num_torn, every = read_series(path)
    assert (num_torn, every) == (2, 1)
    assert str(series["train/loss"]) == "[(1, 4.0), (2, nan), (3, 2.5), (5, 1.0)]"
    assert [step for step, _ in series["train/lr"]] == [1, 2, 3, 5]
    assert series["eval/fid"] == [(3, 9.0)]
    assert read_series(tmp_path / "missing") == ({}, 0, 1)


def test_what_a_resumed_run_makes_again_stands_there_once(tiny):
    """`metrics.jsonl` is cut at the checkpoint, so that no reader has to know of it."""
    run(tiny, "run", "max_steps=10")
    path = Path("checkpoints/run") / METRICS
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"step": 15, "train/loss": 9.0}\n{"step": 20, "tr')
    run(tiny, "run", "max_steps=15", "resume_path=auto")
    series, num_torn, _ = read_series(path)
    steps = [step for step, _ in series["train/loss"]]
    assert steps == sorted(set(steps))
    assert (steps[-1], num_torn) == (15, 0)
    assert series["train/loss"][-1][1] < 9.0


# --- curves


def drawn(lines: dict, *, log: bool = False) -> Axes:
    axes = Figure(charts.SIZE).add_subplot(yscale="log" if log else "linear")
    draw_lines(axes, lines)
    return axes


def ticks_of(axes: Axes) -> list[float]:
    """The labels of the vertical axis."""
    axes.figure.draw_without_rendering()
    low, high = axes.get_ylim()
    ticks = [(tick.get_loc(), tick.label1.get_text()) for tick in axes.yaxis.get_major_ticks()]
    return [float(text.replace("\N{MINUS SIGN}", "-")) for y, text in ticks if low <= y <= high]


def test_smoothing_keeps_lines_means_and_gaps():
    line = np.full(200, 3.0)
    np.testing.assert_array_equal(smoothed(line), line)
    steps = smoothed(np.arange(1000) % 2.0)
    assert np.abs(steps[20:] - 0.5).max() < 0.05
    assert steps[0] == 0
    np.testing.assert_array_equal(smoothed(np.array([1.0, math.nan, 5.0])), [1, math.nan, 5])


@pytest.mark.parametrize("num", [1, 7, 300])
def test_smoothing_is_a_mean_of_neighbours(num):
    ys = np.random.default_rng(num).normal(size=num)
    ys[num // 2 :: 3] = math.nan
    for k, y in enumerate(smoothed(ys)):
        reach = min(k, math.ceil(charts.SMOOTHED_SHARE * num))
        mean = np.nanmean(ys[k - reach : k + reach + 1]) if np.isfinite(ys[k]) else math.nan
        assert y == pytest.approx(mean, nan_ok=True)


def test_few_points_are_marked_and_many_are_smoothed():
    few = [(0, 1.0), (1, 10.0), (2, math.nan), (4, 100.0)]
    line, none = drawn({EVIL: few, "none": []}).lines
    np.testing.assert_array_equal(line.get_xydata(), few)
    assert line.get_markevery() == [0, 1, 3]
    assert len(none.get_xydata()) == 0
    many = [(k, float(k % 7)) for k in range(100)]
    many[50:53] = (50, math.nan), (51, 3.0), (52, math.nan)
    raw, bold = drawn({"a": many}).lines
    np.testing.assert_array_equal(raw.get_xydata(), many)
    assert raw.get_alpha() < 0.5
    np.testing.assert_array_equal(bold.get_ydata(), smoothed(np.array(many)[:, 1]))
    assert bold.get_markevery() == [51]  # a line would not show it


def test_lines_are_told_apart():
    names = [f"run {k}" for k in range(24)]
    assert len(set(legend_of(names).values())) == 24
    lines = drawn({name: [(0, 1.0)] for name in names}).lines
    colors = [color for color, _ in legend_of(names).values()]
    assert [line.get_color() for line in lines] == colors
    without = drawn({name: [(0, 1.0)] if k else [] for k, name in enumerate(names)}).lines
    assert without[1].get_color() == colors[1]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.11, 0.9, {0.2, 0.3, 0.5}), (1, 10, {1, 2, 3, 5, 10}), (0.002, 300, {0.01, 1, 100})],
)
def test_ticks_of_logarithmic_axes_are_round_and_few(low, high, expected):
    ticks = ticks_of(drawn({"a": [(0, low), (1, high)]}, log=True))
    assert expected <= set(ticks)
    assert len(ticks) <= 9


@pytest.mark.parametrize("exponent", [-300, -12, -3, 0, 3, 12, 300])
def test_ticks_are_few_at_any_size(exponent):
    ticks = ticks_of(drawn({"a": [(0, -1.2 * 10.0**exponent), (1, 3.4 * 10.0**exponent)]}))
    assert len(set(ticks)) == len(ticks)
    assert 3 <= len(ticks) <= 11


def test_charts_have_a_logarithmic_axis_where_that_says_more():
    points = [(0, 1.0), (1, 10.0), (2, math.nan), (4, 100.0)]
    assert draw_chart("loss", "step", {EVIL: points}, log=True).note == "log scale"
    for ys in ((1.0, 1.5), (0.0, 9.0), (-1.0, 9.0)):
        assert draw_chart("x", "step", {"a": list(enumerate(ys))}, log=True).note == ""
    assert draw_chart("loss", "step", {EVIL: points}).note == ""
    assert draw_chart("x", "step", {"a": [(1, math.nan)], "b": []}) is None
    assert draw_chart("x", "step", {"a": [(0, 7.0)]}).note == ""


def test_equal_curves_make_equal_files():
    lines = {"a": [(k, math.sin(k)) for k in range(100)]}
    first, second = (draw_chart("x", "step", lines) for _ in range(2))
    assert first == second
    assert ">step</text>" in base64.b64decode(first.source.partition(",")[2]).decode()


# --- the page


def test_the_report_of_real_runs_shows_everything(folder, capsys):
    one, two = folder / "first", folder / "second"
    with open(one / METRICS, "a", encoding="utf-8") as file:
        file.write('{"step": 46, "eval/fid": 12.5, "custom": 3}\n{"step": 46, "to')
    assert runs.main(["report", str(one)]) == EXIT_OK
    path = one / "report.html"
    assert capsys.readouterr().out.startswith(f"{path}: ")
    text = path.read_text(encoding="utf-8")
    page = assert_self_contained(text)
    rows = rows_of_valid(one)
    keys = {key for row in rows for key in row} - {"step", "epoch"}
    quartiles = {f"train/loss_q{k}" for k in (1, 2, 3, 4)}
    assert quartiles | {"train/loss", "train/lr", "train/memory_mib", "custom"} <= keys
    titles = {name.removesuffix(" against step") for name in page.charts()}
    assert titles == keys - quartiles | {"train/loss_q1 to q4"}
    assert re.findall(r"</i>(.*?)</li>", text) == ["q1", "q2", "q3", "q4"]
    images = page.pictures()
    assert [image["alt"] for image in images] == ["epoch 1", "epoch 2"]
    assert "1 torn line(s)" in page.text
    assert "Settings that differ from the defaults" in page.text
    assert "model_params.model_channels" in page.text

    assert runs.main(["report", str(one), str(two), f"--output={folder / 'both.html'}"]) == EXIT_OK
    text = (folder / "both.html").read_text(encoding="utf-8")
    page = assert_self_contained(text)
    assert {name.removesuffix(" against step") for name in page.charts()} == keys
    legends = re.findall(r'<ul class="legend">(.*?)</ul>', text, re.DOTALL)
    assert len(legends) == 5  # one for each group of charts
    assert {tuple(re.findall(r"</i>(.*?)</li>", x)) for x in legends} == {("first", "second")}
    assert len(page.pictures()) == 4
    settings = text[text.index("Settings that differ") :]
    assert re.findall(r"<code>(.*?)</code>", settings) == ["learning_rate"]
    assert re.findall(r"<td>(0.*?|1.*?)</td>", settings) == ["0.001", "0.0001"]


def rows_of_valid(folder: Path) -> list[dict]:
    rows = map(parse_row, (folder / METRICS).read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row is not None]


def test_a_run_with_nothing_but_a_status_has_a_page(tmp_path):
    page = assert_self_contained(render_report([with_status(tmp_path / "empty", state="failed")]))
    assert "config.json is missing or torn" in page.text
    assert "metrics.jsonl is missing or has no numbers" in page.text
    assert page.all("img") == []


def test_a_run_that_is_named_twice_is_shown_once(tmp_path):
    folder, pages = with_status(tmp_path / "one", state="complete"), []
    for named in ([folder], [folder, folder]):
        assert runs.main(["report", *map(str, named), "--output", str(tmp_path / "a.html")]) == 0
        pages.append((tmp_path / "a.html").read_text())
    assert "Training of one<" in pages[0]
    assert pages[1] == pages[0]


def test_names_and_settings_from_elsewhere_are_text(tmp_path):
    run_dir = with_status(tmp_path / "run", state=EVIL)
    (run_dir / METRICS).write_text(json.dumps({"step": 1, f"eval/{EVIL}": 1.0}) + "\n")
    (run_dir / "config.json").write_text(json.dumps({"seed": EVIL, "model_params": {"x": EVIL}}))
    text = render_report([run_dir])
    assert EVIL not in text
    assert assert_self_contained(text).text.count(EVIL) >= 4


def test_previews_are_few_small_and_torn_ones_are_named(tmp_path):
    run_dir = with_status(tmp_path / "run", state="complete")
    elsewhere = tmp_path / "pictures" / "name"
    elsewhere.mkdir(parents=True)
    config = {"sample_dir": str(elsewhere.parent), "experiment_name": "name"}
    (run_dir / "config.json").write_text(json.dumps(config))
    for epoch in range(1, 31):
        Image.new("RGB", (1400, 900)).save(elsewhere / f"epoch_{epoch:04d}.png")
    data = (elsewhere / "epoch_0030.png").read_bytes()
    (elsewhere / "epoch_0030.png").write_bytes(data[: len(data) // 2])
    page = assert_self_contained(render_report([run_dir]))
    names = [image["alt"] for image in page.all("img")]
    assert names == [f"epoch {k}" for k in (1, 5, 9, 13, 18, 22, 26)]
    assert "epoch_0030.png cannot be read" in page.text
    assert {image["width"] for image in page.all("img")} == {"467"}
    assert "at 1/3 of its size" in page.text


@pytest.mark.parametrize("size", [(MAX_SIDE, 2 * MAX_SIDE), (2 * MAX_SIDE, MAX_SIDE)])
def test_the_longer_side_of_a_preview_is_what_is_limited(tmp_path, size):
    path = tmp_path / "epoch_0001.png"
    Image.new("RGB", size).save(path)
    picture = read_picture(path, "epoch 1")
    assert picture.image.shape == (size[1] // 2, size[0] // 2, 3)
    assert picture.caption == "at 1/2 of its size"


def test_differing_settings():
    base = Config(experiment_name="a", model_params={"depth": 2}).to_dict()
    other = base | {"experiment_name": "b", "seed": 1, "model_params": {"depth": 3, "new": [1]}}
    other.pop("optimizer")
    assert differing_settings({"a": base, "b": other}) == (
        ["key", "a", "b"],
        [
            ["seed", "42", "1"],
            ["optimizer", "adamw", NOTHING],
            ["model_params.depth", "2", "3"],
            ["model_params.new", NOTHING, "[1]"],
        ],
    )
    assert differing_settings({"a": base, "b": base}) == (["key", "a", "b"], [])
    assert differing_settings({"default": base}) == (["key", "default"], [])


def test_a_long_run_makes_a_small_page_soon(tmp_path):
    run_dir = with_status(tmp_path / "long", state="complete")
    rng = np.random.default_rng(0)
    with open(run_dir / METRICS, "w", encoding="utf-8") as file:
        for step, x in enumerate(np.exp(rng.normal(size=100_000)).tolist()):
            row = {"step": step, "train/loss": x, "train/lr": 1e-3, "train/grad_norm": 2 * x}
            file.write(json.dumps(row if step != 70_000 else row | {"train/loss": 1e6}) + "\n")
    started = time.perf_counter()
    text = render_report([run_dir])
    assert time.perf_counter() - started < 60
    assert len(text) < 1_000_000
    svg = assert_self_contained(text).charts()["train/loss against step"]
    (raw,) = re.findall(r'd="([^"]*)"[^>]*stroke-opacity: 0.35', svg)
    points = [tuple(map(float, point)) for point in re.findall(r"[ML] (\S+) (\S+)", raw)]
    assert len(points) < 10_000
    spike = min(points, key=lambda point: point[1])  # 1e6; the others are below 1e3
    left, right = points[0][0], points[-1][0]
    assert (spike[0] - left) / (right - left) == pytest.approx(0.7, abs=0.01)
    assert sum(y < spike[1] + 50 for _, y in points) <= 3


def test_bad_requests_are_one_line_and_write_nothing(folder, tmp_path):
    (tmp_path / "no run").mkdir()
    (tmp_path / "folder.html").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="not the folder of a run"):
        runs.main(["report", str(folder / "first"), str(tmp_path / "no run")])
    with pytest.raises(ConfigError, match="is not a folder"):
        runs.main(["report", str(folder / "first"), "--output", str(tmp_path / "x" / "y.html")])
    with pytest.raises(UserError, match="cannot be written"):
        runs.main(["report", str(folder / "first"), "--output", str(tmp_path / "folder.html")])
    with pytest.raises(SystemExit):
        runs.main(["report"])
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_line_works_as_printed(folder, script):
    """`train.py` ends with this command."""
    line = (folder / "first" / "log.txt").read_text(encoding="utf-8").splitlines()[-1]
    assert line.endswith("python runs.py report checkpoints/first")
    done = script(*line.partition("python ")[2].split())
    assert done.returncode == EXIT_OK, done.output
    assert (folder / "first" / "report.html").is_file()
    done = script("runs.py")
    assert [row.split()[:2] for row in done.output.splitlines()[1:]] == [
        ["first", "complete"], ["second", "complete"],
    ]  # fmt: skip


@pytest.mark.browser
def test_a_browser_shows_the_page(folder, tmp_path):
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium: apt-get install chromium, or name one in $CHROMIUM")
    one, both = (render_report([folder / n for n in x]) for x in (["first"], ["first", "second"]))
    found, console = open_in_chromium(chromium, tmp_path, [(320, one), (1200, one), (1200, both)])
    assert console == []
    for page in found:
        assert page["content"] == page["width"], "wider than the window"
        assert page["heading"].startswith("Training of first")
        assert all(page["images"])
    num_images = [text.count("<img ") for text in (one, one, both)]
    assert sorted(len(page["images"]) for page in found) == sorted(num_images)
