"""runs.py: what it lists, and the page it makes of runs."""

from __future__ import annotations

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

import numpy as np
import pytest
import torch
from PIL import Image

import runs
from diffusion.gaussian import GaussianDiffusion
from reporting import plot
from reporting.run_files import METRICS, facts_of, find_runs, names_of, parse_row, read_series
from reporting.run_report import config_differences, evenly, render_report
from tests.conftest import ROOT, TINY_CONFIG
from tests.test_html import EVIL, Page, find_chromium, open_in_chromium
from tests.test_train import assert_same_training, run, state_of
from training.objective import timestep_quartiles
from training.progress import LossStats, memory_mib
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
    honest = GaussianDiffusion.loss

    def loss(self, model, x_0, y, t, noise):
        found = honest(self, model, x_0, y, t, noise)
        seen.append((t.clone(), found.detach().clone()))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(GaussianDiffusion, "loss", loss)
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
    t = torch.arange(num_timesteps)
    example = type("Example", (), {"t": t})
    found = timestep_quartiles(num_timesteps).index_of(example)
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
    with monkeypatch.context() as patch:
        patch.setattr("training.build.timestep_quartiles", lambda _: None)
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
    assert names_of(found) == [str(tmp_path / "a/digits"), str(tmp_path / "b/digits"), "mnist"]
    size = facts_of(found[0], "").size
    (found[0] / "current_model.pth").write_bytes(bytes(1000))
    os.link(found[0] / "current_model.pth", found[0] / "best_model.pth")
    assert facts_of(found[0], "").size == size + 1000


def test_the_list_does_not_wait_for_torch():
    code = "import sys, runs; print('torch' in sys.modules, 'PIL' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False False\n", done.stderr


# --- metrics.jsonl


@pytest.mark.parametrize(
    "line", ["", "{", "[]", "7", '{"train/loss": 1}', '{"step": "x"}', '{"step": NaN}', "\x00"]
)
def test_torn_rows_are_none(line):
    assert parse_row(line) is None


def test_rows_keep_their_finite_numbers():
    line = '{"step": 3, "a": 1.5, "b": NaN, "c": "x", "d": true, "e": null, "f": Infinity}'
    assert parse_row(line) == {"step": 3.0, "a": 1.5}


def test_gaps_and_resumed_runs(tmp_path):
    path = tmp_path / METRICS
    rows = [
        {"step": 1, "train/loss": 4.0, "train/lr": 1.0},
        {"step": 2, "train/lr": 1.0},  # its loss was not finite
        {"step": 3, "train/loss": 2.0, "train/lr": 1.0},
        {"step": 3, "eval/fid": 9.0},
        {"step": 4, "train/loss": 9.0, "train/lr": 9.0},
        {"step": 3, "train/loss": 2.5, "train/lr": 1.0},  # went on from step 2
        {"step": 5, "train/loss": 1.0, "train/lr": 1.0},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text[:60] + "\n\n" + text + '{"step": 6, "tr', encoding="utf-8")
    series, num_torn = read_series(path)
    assert num_torn == 2
    assert str(series["train/loss"]) == "[(1.0, 4.0), (2.0, nan), (3.0, 2.5), (5.0, 1.0)]"
    assert [step for step, _ in series["train/lr"]] == [1, 2, 3, 5]
    assert series["eval/fid"] == [(3.0, 9.0)]
    assert read_series(tmp_path / "missing") == ({}, 0)


# --- curves


def test_smoothing_keeps_lines_means_and_gaps():
    line = [(float(k), 3.0) for k in range(200)]
    assert plot.smoothed(line) == line
    steps = plot.smoothed([(float(k), float(k % 2)) for k in range(1000)])
    assert all(abs(y - 0.5) < 0.05 for _, y in steps[20:])
    assert steps[0] == (0.0, 0.0)
    gap = plot.smoothed([(0.0, 1.0), (1.0, math.nan), (2.0, 5.0)])
    assert [gap[0][1], gap[2][1]] == [1.0, 5.0]
    assert math.isnan(gap[1][1])


def test_thinning_keeps_extremes_and_gaps():
    rng = np.random.default_rng(0)
    ys = rng.normal(size=100_000)
    ys[[70, 99_000]] = 50.0, -50.0
    ys[40_000:42_000] = math.nan
    points = list(enumerate(ys.tolist()))
    axis = plot.Axis(0, 99_999, 58, 346)
    kept = plot.thinned(points, axis)
    assert len(kept) <= 4 * 289
    assert {(70, 50.0), (99_000, -50.0), points[0], points[-1]} <= set(kept)
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert any(math.isnan(y) for _, y in kept)
    assert plot.thinned(points[:500], axis) == points[:500]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.07, 1.02, [0.05, 0.1, 0.2, 0.5, 1, 2]),
        (1, 10, [1, 2, 5, 10]),
        (0.002, 300, [0.001, 0.01, 0.1, 1, 10, 100, 1000]),
        (1e-7, 1e6, [1e-7, 1e-4, 1e-1, 1e2, 1e5, 1e8]),
    ],
)
def test_log_ticks_are_round_and_enclose_the_values(low, high, expected):
    found = plot.log_ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    if len(expected) == len(found):
        assert found == pytest.approx(expected)
    assert len(found) <= plot.MAX_LOG_TICKS


def test_a_curve_puts_known_values_at_known_places():
    points = [(0.0, 1.0), (1.0, 10.0), (2.0, math.nan), (4.0, 100.0)]
    text = plot.curve_chart("loss", "step", {EVIL: points, "none": []}, log=True)
    Page(text)
    # x: 0 to 4 on 58 to 346; y: 1 to 100 by its logarithm on 196 up to 36
    assert re.findall(r'<path class="(.*?)" d="(.*?)"', text) == [
        ("curve c0", "M58.0,196.0h0L130.0,116.0M346.0,36.0h0")
    ]
    assert "log scale" in text
    assert text.count("<circle") == 3
    assert "log scale" not in plot.curve_chart("x", "step", {"a": [(0, 1), (1, 1.5)]}, log=True)
    assert plot.curve_chart("x", "step", {"a": [(1, math.nan)]}) == ""
    assert 'd="M' in plot.curve_chart("x", "step", {"a": [(0, 7.0)]})
    many = plot.curve_chart("x", "step", {"a": [(k, k % 7) for k in range(100)]})
    assert re.findall(r'<path class="(.*?)"', many) == ["curve raw c0", "curve c0"]
    assert "<circle" not in many


# --- the page


def charts_in(text: str) -> dict[str, str]:
    return {
        re.search(r'aria-label="(.*?) against step"', svg)[1]: svg
        for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    }


def assert_self_contained(text: str) -> Page:
    page = Page(text)
    assert text.isascii()
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base"}
    for _, attrs in page.tags:
        assert not [key for key in attrs if key.startswith("on") or key in ("href", "srcset")]
        assert attrs.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
    markup = re.sub(r'src="data:[^"]*"', "", re.sub(r">[^<]*<", "><", text))
    assert not re.search(r"https?:|//|url\(|@import", markup)
    return page


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
    charts = charts_in(text)
    assert set(charts) == keys - quartiles | {"train/loss_q1 to q4"}
    assert re.findall(r"<title>(q\d)</title>", charts["train/loss_q1 to q4"]) == [
        "q1", "q2", "q3", "q4",
    ]  # fmt: skip
    assert charts["train/loss"].count("<circle") == sum("train/loss" in row for row in rows)
    images = page.all("img")
    assert [image["alt"] for image in images] == ["epoch 1", "epoch 2"]
    assert "1 torn line(s)" in page.text
    assert "Settings that differ from the defaults" in page.text
    assert "model_params.model_channels" in page.text

    assert runs.main(["report", str(one), str(two), f"--output={folder / 'both.html'}"]) == EXIT_OK
    text = (folder / "both.html").read_text(encoding="utf-8")
    page = assert_self_contained(text)
    assert set(charts_in(text)) == keys
    for key in keys - {"eval/fid", "custom"}:
        assert re.findall(r"<title>(\w+)</title>", charts_in(text)[key]) == ["first", "second"]
    assert len(page.all("img")) == 4
    settings = text[text.index("Settings that differ") :]
    assert re.findall(r"<code>(.*?)</code>", settings) == ["learning_rate"]
    assert re.findall(r'<td data-label="\w+">(0.*?|1.*?)</td>', settings) == ["0.001", "0.0001"]


def rows_of_valid(folder: Path) -> list[dict]:
    rows = map(parse_row, (folder / METRICS).read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row is not None]


def test_a_run_with_nothing_but_a_status_has_a_page(tmp_path):
    page = assert_self_contained(render_report([with_status(tmp_path / "empty", state="failed")]))
    assert "config.json is missing or torn" in page.text
    assert "metrics.jsonl is missing or has no numbers" in page.text
    assert page.all("svg") == page.all("img") == []


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
    assert evenly(range(100), 3) == [0, 50, 99]
    assert evenly([1, 2], 3) == [1, 2]


def test_differing_settings():
    base = Config(experiment_name="a", model_params={"depth": 2}).to_dict()
    other = base | {"experiment_name": "b", "seed": 1, "model_params": {"depth": 3, "new": [1]}}
    other.pop("optimizer")
    _, table = config_differences({"a": base, "b": other})
    cells = re.findall(r'<td data-label="\w+">(.*?)</td>', table)
    assert cells == [
        "<code>seed</code>", "42", "1",
        "<code>optimizer</code>", "adamw", "&ndash;",
        "<code>model_params.depth</code>", "2", "3",
        "<code>model_params.new</code>", "&ndash;", "[1]",
    ]  # fmt: skip
    assert config_differences({"a": base, "b": base}) == ("Settings that differ", "")
    assert config_differences({"a": {}})[1] == ""


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
    (highest,) = set(re.findall(r",(36\.0)", charts_in(text)["train/loss"]))  # 1e6 is on the top
    assert highest == "36.0"


def test_bad_requests_are_one_line_and_write_nothing(folder, tmp_path):
    (tmp_path / "no run").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="not the folder of a run"):
        runs.main(["report", str(folder / "first"), str(tmp_path / "no run")])
    with pytest.raises(ConfigError, match="is not a folder"):
        runs.main(["report", str(folder / "first"), "--output", str(tmp_path / "x" / "y.html")])
    with pytest.raises(UserError, match="cannot be written"):
        runs.main(["report", str(folder / "first"), "--output", str(tmp_path / "no run")])
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
    assert sorted(len(page["images"]) for page in found) == [2, 2, 4]
