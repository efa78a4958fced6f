"""Checkpoints, run folders and options that are not what they say: each ends in one clear line."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import edit
import evaluate
import export
import runs
import sample
import train
from generation.sample_store import resumed
from metrics import classifier
from reporting.run_files import facts_of, find_runs
from reporting.runs import render_report
from tests.conftest import ROOT, TINY_CONFIG
from tests.image_files import png_claiming
from training.run_dir import Status, locked
from training.trainer import Trainer
from utils.checkpoint import BEST, CURRENT, load_checkpoint, read_tensors, save_checkpoint
from utils.errors import EXIT_FAILURE, EXIT_OK, EXIT_USAGE, exit_code_of
from utils.files import write_npz
from utils.images import save_gif, save_image

CONTINUE = ["resume_path=auto", "max_steps=9"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with tiny.py and checkpoints/r, trained for six steps."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.py").write_text(TINY_CONFIG)
    settings = [f"save_dir={folder}/checkpoints", "experiment_name=r", "max_steps=6"]
    assert train.main(["--config", str(folder / "tiny.py"), *settings]) == EXIT_OK
    return folder


@pytest.fixture(autouse=True)
def _quick_classifier(monkeypatch):
    def untrained(images, labels, spec, device):
        return classifier.new_classifier(spec, device)

    monkeypatch.setattr(classifier, "train_classifier", untrained)


@pytest.fixture
def run_dir(trained, tmp_path, monkeypatch) -> Path:
    """A copy of it that a test may spoil; the working directory is its parent's."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "checkpoints" / "r"


@pytest.fixture
def command(capsys):
    """Runs a script's main in this process: its exit code, and its one line."""

    def run(main, *arguments) -> tuple[int, str]:
        capsys.readouterr()
        try:
            code = exit_code_of(lambda: main([str(a) for a in arguments]))
        except SystemExit as error:  # argparse
            code = error.code
        text = capsys.readouterr().err
        assert "Traceback" not in text
        return code, text

    return run


def spoil(path: Path, change) -> None:
    """Write the checkpoint anew, with a right checksum, after `change(state)`."""
    state = load_checkpoint(path)
    change(state)
    for name in (CURRENT, BEST):
        path.with_name(name).unlink(missing_ok=True)
    save_checkpoint(path, state)


def put(*keys, value):
    def change(state):
        for key in keys[:-1]:
            state = state[key]
        last = keys[-1]
        state[last] = value(state[last]) if callable(value) else value

    return change


def nan_like(weights):
    return {k: torch.full_like(v, math.nan) for k, v in weights.items()}


def half(weights):
    return {k: v.half() for k, v in weights.items()}


MOMENT = "optimizer_state_dict", "state", 0, "exp_avg"
STATES = {
    "step 2**70": (put("step", value=2**70), "step cannot be 118"),
    "negative step": (put("step", value=-1), "step cannot be -1"),
    "step is true": (put("step", value=True), "step cannot be True"),
    "step of another epoch": (put("step", value=5000), "scheduler_state_dict cannot be"),
    "another epoch": (put("epoch", value=7), "step 6 is of epoch 0, not 7"),
    "empty config": (put("config", value={}), "config cannot be {}"),
    "tensor in the config": (put("config", "seed", value=torch.zeros(2)), "config cannot be"),
    "model_params is a list": (put("config", "model_params", value=[1]), "config cannot be"),
    "model_type of nobody": (put("config", "model_type", value="x"), "'x'"),
    "no such config key": (put("config", "epochs", value="many"), "epochs"),
    "empty optimizer": (put("optimizer_state_dict", value={}), "dict.state is missing"),
    "no moments": (put("optimizer_state_dict", "state", value={}), "state.0 is missing"),
    "float16 moments": (put(*MOMENT, value=torch.Tensor.half), "exp_avg is torch.float16"),
    "moments of another shape": (put(*MOMENT, value=lambda x: x[:1]), "exp_avg is torch.float32"),
    "moments that are not finite": (put(*MOMENT, value=lambda x: x / 0), "exp_avg is not finite"),
    "groups of another size": (
        put("optimizer_state_dict", "param_groups", 0, "params", value=[0]),
        "param_groups cannot be",
    ),
    "average of NaN": (put("ema_model_state_dict", value=nan_like), "is not finite"),
    "average is missing": (
        lambda state: state.pop("ema_model_state_dict"),
        "ema_model_state_dict is missing",
    ),
    "weights of NaN": (put("model_state_dict", value=nan_like), "is not finite"),
    "float16 weights": (put("model_state_dict", value=half), "is torch.float16"),
    "no weights": (put("model_state_dict", value={}), "is missing"),
    "weights of numbers": (put("model_state_dict", value={"a": 1}), "model_state_dict cannot be"),
    "one more weight": (
        lambda state: state["model_state_dict"].update(more=torch.ones(2)),
        "model_state_dict.more is not expected",
    ),
    "scheduler of another type": (
        put("scheduler_state_dict", value={"gamma": 0.1, "step_size": 3, "last_epoch": 6}),
        "scheduler_state_dict cannot be",
    ),
    "updates of the future": (put("ema_num_updates", value=10**9), "ema_num_updates cannot be"),
    "loss is NaN": (put("best_loss", value=math.nan), "best_loss cannot be nan"),
    "best without value": (put("best", value={}), "best.metric is missing"),
    "loss_stats of integers": (put("loss_stats", value=torch.ones(12).long()), "loss_stats"),
    "symptoms of numbers": (put("failures", value=[1]), "failures cannot be"),
    "skipped steps of text": (put("nonfinite_steps", value=["a"]), "nonfinite_steps cannot be"),
    "huge images": (put("spec", value=[1, 2**40, 8, 10]), "spec cannot be"),
    "many classes": (put("spec", value=[1, 8, 8, 2**19]), "table.weight is"),
    "scaler of nothing": (put("scaler_state_dict", value={"scale": 0.0}), "scaler_state_dict"),
    "names of numbers": (put("class_names", value=[1, 2]), "class_names cannot be"),
    "threads of text": (put("num_threads", value="x"), "num_threads cannot be x"),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_does_not_hold_is_refused_at_resume(run_dir, command, name):
    change, message = STATES[name]
    spoil(run_dir / CURRENT, change)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    code, text = command(train.main, "--config", "tiny.py", "experiment_name=r", *CONTINUE)
    assert (code, message in text) == (EXIT_FAILURE, True), text
    assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before


def test_auto_passes_over_it_to_an_older_file(run_dir, command, capsys):
    shutil.copy(run_dir / CURRENT, run_dir / "model_epoch_0000.pth")
    state = load_checkpoint(run_dir / CURRENT)
    (run_dir / BEST).unlink()
    state["optimizer_state_dict"]["state"][0]["exp_avg"] = None
    save_checkpoint(run_dir / CURRENT, state)
    code = train.main(["--config", "tiny.py", "experiment_name=r", *CONTINUE])
    text = capsys.readouterr().out
    assert code == EXIT_OK
    assert "passed over" in text
    assert "exp_avg is None" in text
    assert load_checkpoint(run_dir / CURRENT)["step"] == 9


VALUES = [None, [], {}, "", -1, 2**70, math.nan, torch.zeros(3), torch.ones(2).half()]


@pytest.mark.slow
@pytest.mark.ci
def test_every_entry_of_a_checkpoint_may_be_anything(run_dir, command):
    """Each is harmless, or one line: at resume, and where images are drawn."""
    good = load_checkpoint(run_dir / CURRENT)
    places = [(key,) for key in good] + [("config", "model_params"), ("config", "conditional")]
    places += [("optimizer_state_dict", key) for key in good["optimizer_state_dict"]]
    places += [("optimizer_state_dict", "state", 1), ("optimizer_state_dict", "state", 1, "step")]
    places += [("optimizer_state_dict", "param_groups", 0), ("best", "value"), ("spec", 3)]
    refused = 0
    for i, keys in enumerate(places):
        for value in [VALUES[i % 9], VALUES[(i + 4) % 9]]:
            state = copy.deepcopy(good)
            put(*keys, value=lambda _, value=value: value)(state)
            save_checkpoint(run_dir / CURRENT, state)
            options = ["experiment_name=r", f"resume_path={run_dir / CURRENT}", "--dry_run"]
            code, text = command(train.main, "--config", "tiny.py", *options)
            assert code in (EXIT_OK, EXIT_FAILURE, EXIT_USAGE), (keys, value)
            assert code == EXIT_OK or text.startswith("error: "), (keys, value, text)
            refused += code != EXIT_OK
            options = ["--checkpoint", run_dir / CURRENT, "--dry_run"]
            code, text = command(sample.main, *options)
            assert code == EXIT_OK or text.startswith("error: "), (keys, value, text)
    assert refused > 40


@pytest.mark.parametrize("main", [sample.main, evaluate.main, edit.main, export.main])
@pytest.mark.parametrize("weights", [nan_like, half])
def test_weights_that_are_none_are_not_drawn_from(run_dir, command, main, weights):
    spoil(run_dir / CURRENT, put("ema_model_state_dict", value=weights))
    options = {
        edit.main: ["grid"],
        export.main: ["--format", "safetensors", "--output", "x.safetensors"],
    }.get(main, [])
    code, text = command(main, *options, "--checkpoint", run_dir)
    assert (code, text.count("\n")) == (EXIT_FAILURE, 1)
    assert "does not fit the config: " in text
    assert sorted(os.listdir()) == ["checkpoints", "tiny.py"]


# --- files that are larger than they look


def zeros_packed(path: Path, state: dict) -> None:
    state["more"] = torch.zeros(2**24)
    torch.save(state, path)
    with zipfile.ZipFile(path) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def one_byte_many_times(path: Path, state: dict) -> None:
    state["model_state_dict"]["huge"] = torch.zeros(1).expand(2**40)
    torch.save(state, path)


def longer_than_its_part(path: Path, state: dict) -> None:
    """Says 2**28 floats where the file has four."""
    state["more"] = torch.zeros(7919)
    torch.save(state, path)
    with zipfile.ZipFile(path) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    number = b"M" + (7919).to_bytes(2, "little")  # pickle's 16-bit integer
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            if name.endswith("data.pkl"):
                assert number in content
                content = content.replace(number, b"J" + (2**28).to_bytes(4, "little"))
            archive.writestr(name, content)


def lists_of_lists(path: Path, state: dict) -> None:
    value = ["x" * 1000]
    for _ in range(25):
        value = [value] * 10
    torch.save(state | {"more": value}, path)


def deep(path: Path, state: dict) -> None:
    value: list = []
    for _ in range(200):
        value = [value]
    torch.save(state | {"more": value}, path)


def sparse(path: Path, state: dict) -> None:
    state["more"] = torch.sparse_coo_tensor([[2**39]], [1.0], (2**40,))
    torch.save(state, path)


def on_no_device(path: Path, state: dict) -> None:
    torch.save(state | {"more": torch.zeros(2**50, device="meta")}, path)


HOSTILE = {
    zeros_packed: "compressed",
    one_byte_many_times: "a tensor .1099511627776,. has 4 bytes",
    longer_than_its_part: "does not match expected size|a tensor .268435456",
    lists_of_lists: "nested too deeply, or many times over",
    deep: "nested too deeply, or many times over",
    sparse: "not a plain one",
    on_no_device: "not a plain one",
}


@pytest.mark.parametrize("make", HOSTILE)
def test_a_file_that_would_fill_the_memory_is_refused(run_dir, command, make):
    make(run_dir / CURRENT, load_checkpoint(run_dir / BEST))
    with pytest.raises((ValueError, RuntimeError), match=HOSTILE[make]):
        read_tensors(run_dir / CURRENT)  # as the weights of metrics are read, too
    code, text = command(sample.main, "--checkpoint", run_dir / CURRENT)
    assert (code, text.count("\n")) == (EXIT_FAILURE, 1)
    assert "cannot be read as a checkpoint" in text


@pytest.mark.parametrize("shown", ["2**62", "[]", "not json"])
def test_a_safetensors_file_that_lies_is_refused(run_dir, command, shown):
    pytest.importorskip("safetensors")
    header = {"__metadata__": {"step": "{", "config": "{}"}} if shown == "not json" else {}
    header["w"] = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
    if shown == "not json":
        header["w"] = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    text = b"[]" if shown == "[]" else json.dumps(header).encode()
    size = 2**62 if shown == "2**62" else len(text)
    Path("x.safetensors").write_bytes(size.to_bytes(8, "little") + text + bytes(4))
    code, text = command(sample.main, "--checkpoint", "x.safetensors")
    assert (code, text.count("\n")) == (EXIT_FAILURE, 1)
    assert "cannot be read as safetensors" in text


# --- what is kept for later is checked


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("spoilt", ["bit", "checksum", "old"])
def test_kept_images_that_changed_are_drawn_again(tmp_path, caplog, spoilt):
    asked = []

    def draw(indices):
        asked.extend(indices)
        for i in indices:
            yield torch.full((1, 1, 2, 2), i, dtype=torch.uint8)

    list(resumed(tmp_path, (1, 2, 2), range(4), draw))
    path = tmp_path / "images_00000001_00000002.npy"
    if spoilt == "old":
        np.save(path, np.full((1, 1, 2, 2), 1, np.uint8))
    else:
        flip(path, -1 if spoilt == "checksum" else 128)
    asked.clear()
    with caplog.at_level(logging.INFO, "diffusion"):
        images = torch.cat(list(resumed(tmp_path, (1, 2, 2), range(4), draw)))
    assert (asked, images[:, 0, 0, 0].tolist()) == ([1], [0, 1, 2, 3])
    assert sum("damaged, or has no checksum" in message for message in caplog.messages) == 1
    asked.clear()
    list(resumed(tmp_path, (1, 2, 2), range(4), draw))
    assert asked == []


@pytest.mark.parametrize("spoilt", ["bit", "old"])
def test_a_kept_classifier_that_changed_is_trained_again(run_dir, command, caplog, spoilt):
    options = ["--checkpoint", run_dir, "--metrics", "class_acc", "--num_samples", 10]
    options += ["--num_inference_steps", 1, "--output", "out.json"]
    assert command(evaluate.main, *options)[0] == EXIT_OK
    score = json.loads(Path("out.json").read_text())["metrics"]["class_acc"]["value"]
    (path,) = (run_dir / "eval").glob("classifier_*.pth")
    good = read_tensors(path, needs_checksum=True)
    if spoilt == "old":
        torch.save(good, path)
    else:
        flip(path, path.stat().st_size // 2)
    assert command(evaluate.main, *options)[0] == EXIT_OK
    again = read_tensors(path, needs_checksum=True)
    assert all(torch.equal(again["state_dict"][k], v) for k, v in good["state_dict"].items())
    assert json.loads(Path("out.json").read_text())["metrics"]["class_acc"]["value"] == score


def test_what_serves_later_goes_beside_the_report_where_it_must(run_dir, command, monkeypatch):
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: not str(path).startswith(str(run_dir)) and real(path, mode)
    )
    options = ["--metrics", "class_acc", "--num_samples", 10, "--num_inference_steps", 1]
    assert command(evaluate.main, "--checkpoint", run_dir, *options, "--output", "e")[0] == EXIT_OK
    assert list(Path("e").glob("classifier_*.pth"))
    assert not (run_dir / "eval").exists()


# --- labels


def test_older_labels_do_not_outlive_their_pictures(run_dir, command, monkeypatch):
    folder = Path("samples/images")
    options = ["--checkpoint", run_dir, "--save_images", "--num_inference_steps", 1]
    assert command(sample.main, *options, "--num_samples", 4, "--labels", 3)[0] == EXIT_OK
    assert set(json.loads((folder / "labels.json").read_text()).values()) == {3}

    class KillError(BaseException):
        pass

    def killed(*_):
        raise KillError

    monkeypatch.setattr("utils.labels.save_labels", killed)
    with pytest.raises(KillError):
        sample.main([str(a) for a in [*options, "--num_samples", 4, "--labels", 5]])
    monkeypatch.undo()
    monkeypatch.chdir(run_dir.parents[1])
    assert not (folder / "labels.json").exists()
    compared = ["--images", folder, "--config", "tiny.py", "--metrics", "class_acc"]
    code, _ = command(evaluate.main, *compared)
    assert code == EXIT_OK
    entry = json.loads(Path("samples/images_eval/report.json").read_text())["metrics"]["class_acc"]
    assert (entry["status"], "labels.json" in entry["reason"]) == ("skipped", True)


@pytest.mark.parametrize("end", ["whole", "full disk", "kill"])
def test_saved_images_of_an_evaluation_have_their_labels_at_the_end(run_dir, monkeypatch, end):
    Path("out").mkdir()
    Path("out/labels.json").write_text('{"000000.png": 9}')
    options = ["--checkpoint", run_dir, "--metrics", "class_acc", "--num_samples", 10]
    options += ["--num_inference_steps", 1, "--save_images_dir", "out"]
    real, told = Image.Image.save, []

    def save(self, path, *rest, **options):
        if not str(getattr(path, "name", "")).startswith("out"):  # of the report
            return real(self, path, *rest, **options)
        told.append(path)
        if len(told) == 4 and end != "whole":
            raise KeyboardInterrupt if end == "kill" else OSError(28, "full")
        assert not Path("out/labels.json").exists()
        return real(self, path, *rest)

    monkeypatch.setattr(Image.Image, "save", save)
    try:
        evaluate.main([str(a) for a in options])
    except KeyboardInterrupt:
        assert end == "kill"
    assert Path("out/labels.json").exists() == (end == "whole")
    if end == "whole":
        assert json.loads(Path("out/labels.json").read_text())["000003.png"] == 3


# --- a run whose folder goes away


def away_renamed(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def away_removed(folder: Path) -> None:
    shutil.rmtree(folder)


def another_there(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "run.lock").write_text("process 1 on elsewhere\n")
    (folder / "status.json").write_text("theirs")


def lock_removed(folder: Path) -> None:
    (folder / "run.lock").unlink()


def a_link_there(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("copy"))
    shutil.rmtree(folder)
    folder.symlink_to(folder.with_name("copy"))


@pytest.mark.parametrize(
    "act", [away_renamed, away_removed, another_there, lock_removed, a_link_there]
)
def test_a_run_stops_where_its_folder_is_another_one(trained, tmp_path, command, monkeypatch, act):
    shutil.copy(trained / "tiny.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    folder, step, after = tmp_path / "checkpoints" / "n", Trainer._train_step, {}

    def one_step(self, example):
        step(self, example)
        if self.step == 3:
            self.saver.settle()
            act(folder)
            after.update({p: p.read_bytes() for p in folder.rglob("*") if p.is_file()})

    monkeypatch.setattr(Trainer, "_train_step", one_step)
    options = ["experiment_name=n", "max_steps=20", "log_interval=1"]
    code, text = command(train.main, "--config", "tiny.py", *options)
    assert (code, text.count("\n")) == (EXIT_FAILURE, 1)
    assert "was removed, renamed or replaced while this run wrote there" in text
    now = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "log.txt"}
    after = {path: content for path, content in after.items() if path.name != "log.txt"}
    assert now == after


def test_moved_and_linked_to_is_still_the_same_folder(tmp_path):
    with locked(tmp_path / "run") as is_ours:
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        assert not is_ours()
        (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
        assert is_ours()


def test_a_disk_that_does_not_answer_is_no_sign(tmp_path, monkeypatch):
    with locked(tmp_path / "run") as is_ours:

        def fail(self, **_):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(Path, "stat", fail)
        assert is_ours()


def test_a_full_disk_does_not_leave_a_run_running(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    def ends() -> None:
        with Status(tmp_path / "status.json").of_run():
            monkeypatch.setattr("training.run_dir.write_text", full)
            raise OSError(28, "No space left on device " * 9)

    with pytest.raises(OSError, match="No space"):
        ends()
    told = json.loads((tmp_path / "status.json").read_text())
    assert (told["state"], told["exit_code"]) == ("failed", EXIT_FAILURE)
    assert (tmp_path / "status.json").stat().st_size == 4096


# --- folders of runs, by anybody

ODD = [None, [], {}, "x" * 3000, "\x1b[31m\ud800", -1, 10**400, 1e308, True, [[1]], {"a": None}]


@pytest.mark.parametrize("i", range(len(ODD)))
def test_the_files_of_a_run_may_hold_anything(run_dir, command, i):
    value = ODD[i]
    for name in ("status.json", "config.json"):
        content = json.loads((run_dir / name).read_text())
        changed = {key: ODD[(i + n) % len(ODD)] for n, key in enumerate(content)}
        (run_dir / name).write_text(json.dumps(changed | {"more": value}))
    row = {"step": value, "train/loss": value, "eval/\x1b": 1.0}
    with open(run_dir / "metrics.jsonl", "a") as file:
        for odd in (row, row | {"step": 1e300}, row | {"step": -3, "eval/a": value}, value):
            file.write(json.dumps(odd) + "\n")
        file.write("[" * 5000 + "\n" + '{"step": 1' + "0" * 5000 + "}\n")
    for arguments in (["checkpoints"], ["checkpoints", "--json"], ["report", run_dir]):
        code, text = command(runs.main, *arguments)
        assert code == EXIT_OK, text
    (run_dir / "status.json").write_text(json.dumps(value))
    (run_dir / "config.json").write_text(json.dumps(value))
    assert command(runs.main, "report", run_dir)[0] == EXIT_OK


def test_odd_names_cost_themselves_alone(run_dir, command, capsys):
    (run_dir / "loop.pth").symlink_to("loop.pth")
    (run_dir / "model_epoch_0003.pth").symlink_to("model_epoch_0003.pth")
    (run_dir / "model_epoch_0001.pth").mkdir()
    (run_dir / "samples").mkdir(exist_ok=True)
    os.mkfifo(run_dir / "samples" / "epoch_0001.png")
    (run_dir / "samples" / "epoch_0002.png").write_bytes(png_claiming(60_000, 60_000))
    (run_dir / "samples" / "epoch_0003.png").write_bytes(png_claiming(12_000, 12_000))
    (run_dir / "samples" / "epoch_0004.png").mkdir()
    (run_dir / "config.json").unlink()
    os.mkfifo(run_dir / "config.json")
    os.utime(run_dir / CURRENT, (3e11, 3e11))  # the year 11476
    assert runs.main(["checkpoints"]) == EXIT_OK
    assert "complete" in capsys.readouterr().out
    page = render_report([run_dir])
    assert "epoch_0002.png cannot be read" in page
    assert "epoch_0003.png cannot be read" in page
    (run_dir / "config.json").unlink()
    code, text = command(train.main, "--config", "tiny.py", "experiment_name=r", *CONTINUE)
    assert code == EXIT_OK, text


@pytest.mark.parametrize("name", [BEST, CURRENT])
def test_a_folder_named_as_a_checkpoint_is_none(run_dir, command, name):
    (run_dir / name).unlink()
    (run_dir / name).mkdir()
    assert command(sample.main, "--checkpoint", run_dir, "--dry_run")[0] == EXIT_OK
    assert command(sample.main, "--checkpoint", run_dir / name, "--dry_run")[0] == EXIT_FAILURE


def test_a_checkpoint_removed_during_the_listing(run_dir, monkeypatch):
    real = Path.stat

    def stat(self, **options):
        if self.name == BEST:
            raise FileNotFoundError(self)
        return real(self, **options)

    monkeypatch.setattr(Path, "stat", stat)
    assert facts_of(run_dir, "r").status == "complete"
    assert find_runs([run_dir.parent]) == [run_dir]


def test_a_long_record_is_read_line_by_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with open(path, "w") as file:
        for step in range(1, 300_001):
            file.write(f'{{"step": {step}, "train/loss": 0.5, "train/lr": 0.1}}\n')
            file.write('{"step": 50001, "eval/fid": 3.0}\n' if step == 50_001 else "")
    code = (
        "import resource, sys; from pathlib import Path; import numpy;"
        "from training.tracking import MetricsFile; from reporting.run_files import read_series;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; p = Path(sys.argv[1]);"
        "MetricsFile(p, 299_000); series, torn, every = read_series(p);"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "steps = [step for step, _ in series['train/lr']];"
        "print(after - before, len(steps), steps[0], steps[-1], every, len(series['eval/fid']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, cwd=ROOT, check=True
    )
    grown, *told = map(int, done.stdout.split())
    assert told == [99_668, 1, 299_000, 3, 1]
    assert grown < 60_000  # KiB


# --- options

OPTIONS = {
    "sample --create_gif --gif_final_seconds 656": "--gif_final_seconds 656: must lie in 0..655",
    "sample --create_gif --gif_final_seconds nan": "--gif_final_seconds nan",
    "sample --create_gif --gif_fps 0.001": "--gif_fps 0.001: must lie in 0.0015..1000",
    "sample --create_gif --gif_fps 1e-300": "--gif_fps 1e-300",
    "sample --create_gif --gif_fps 1e300": "--gif_fps 1e+300",
    "sample --create_gif --gif_fps nan": "--gif_fps nan",
    "sample --create_gif --gif_fps=-inf": "--gif_fps -inf",
    "sample --output_name=": "--output_name ''",
    "sample --output_name .": "--output_name '.'",
    "sample --output_name ..": "--output_name '..'",
    "sample --output_name a/b": "--output_name 'a/b'",
    "sample --output_name a\0b": r"--output_name 'a\x00b'",
    "sample --output_dir a\0b": "--output_dir",
    f"sample --output_name {'n' * 256}": "at most 200 bytes",
    f"sample --output_name {chr(0x56FE) * 80}": "at most 200 bytes",
    "sample --seeds 0-9999999999": "more than 1000000 numbers",
    "sample --labels 0-9999999999": "more than 1000000 numbers",
    "sample --seeds 9223372036854775808": "must be at most 9223372036854775807",
    "sample --seed 9223372036854775808": "must be at most 9223372036854775807",
    "sample --seed 1" + "0" * 5000: "give a whole number",
    "sample --num_samples 1000000000000": "must be at most 1000000",
    "sample num_samples=2147483647": "less than or equal to 1000000",
    "sample --num_samples 0": "must be at least 1",
    "sample --batch_size 0": "must be at least 1",
    "sample --batch_size 1000000000000": "must be at most 1000000",
    "evaluate --num_samples 1000000000000": "must be at most 1000000",
    "evaluate eval_num_samples=2147483647": "less than or equal to 1000000",
    "evaluate --seed 9223372036854775808": "must be at most",
    "evaluate --output a\0b": "--output",
    "evaluate --save_images_dir a\0b": "--save_images_dir",
    "evaluate --label_mode " + "1" * 5000: "--label_mode",
    "evaluate --seed -1": "must be at least 0",
    "edit interpolate --labels 1,2 --seed -1": "argument --seed: -1: must be at least 0",
    "edit interpolate --labels 1,2 --batch_size 0": "argument --batch_size: 0: must be at least 1",
    "edit grid --output_name a/b": "--output_name 'a/b'",
    "edit grid --seeds 0-9999999999": "more than 1000000 numbers",
    "edit interpolate --labels 1,2 --final_seconds 656": "--final_seconds 656",
    "edit interpolate --labels 1,2 --fps 1e300": "--fps 1e+300",
    "edit interpolate --labels 1,2 --frames 1000000000000": "must be at most",
}


@pytest.mark.parametrize("line", OPTIONS)
def test_options_that_lead_nowhere_are_refused_before_sampling(run_dir, command, monkeypatch, line):
    monkeypatch.setattr("generation.sampling.run_steps", None)  # drawing would raise
    script, *arguments = line.split(" ")
    main = {"sample": sample.main, "evaluate": evaluate.main, "edit": edit.main}[script]
    given = ["--checkpoint", run_dir]
    place = 1 if script == "edit" else 0
    code, text = command(main, *arguments[:place], *given, *arguments[place:])
    assert code in (EXIT_USAGE, EXIT_FAILURE)
    assert OPTIONS[line] in text
    assert (text.startswith("error: "), text.count("\n")) == (True, 1)
    assert sorted(os.listdir()) == ["checkpoints", "tiny.py"]


@pytest.mark.parametrize("script", ["sample", "interpolate", "img2img"])
def test_one_file_that_cannot_be_written_costs_no_other(run_dir, command, script):
    Path("samples/x.png").mkdir(parents=True)
    given = ["--checkpoint", run_dir, "--output_name", "x", "--num_inference_steps", 2]
    if script == "sample":
        given += ["--create_gif", "--save_images", "--npz", "--num_samples", 2]
        wanted = {"x.gif", "images", "x_2x8x8x1.npz"}
        code, text = command(sample.main, *given)
    elif script == "interpolate":
        given += ["--labels", "1,2", "--frames", 3, "--sampling_method", "ddim"]
        wanted = {"x.gif"}
        code, text = command(edit.main, script, *given)
    else:
        given += ["--real_split", "test", "--num_samples", 2, "--labels", 1, "--save_images"]
        wanted = {"x_images"}
        code, text = command(edit.main, script, *given)
    assert code == EXIT_FAILURE
    assert "error: samples/x.png: cannot be written" in text
    assert {path.name for path in Path("samples").iterdir()} == wanted | {"x.png"}


OVER_INPUTS = {
    "img2img --input samples/x_images --save_images": "samples/x_images",
    "img2img --input samples/x_images/000000.png --save_images": "samples/x_images",
    "img2img --input samples/x.png": "samples/x.png",
    "inpaint --input samples/y.png --mask samples/x.png": "samples/x.png",
    "invert --input samples/x.npz": "samples/x.npz",
    "evaluate --reference p --save_images_dir p": "p",
    "evaluate --reference p --save_images_dir p/new": "p/new",
    "evaluate --reference p --save_images_dir link": "link",
}


@pytest.mark.parametrize("line", OVER_INPUTS)
def test_no_output_takes_the_place_of_an_input(run_dir, command, line):
    picture = torch.full((1, 8, 8), 200, dtype=torch.uint8)
    for name in ("samples/x_images/000000.png", "samples/x.png", "samples/y.png", "p/000000.png"):
        save_image(Path(name), picture)
    np.savez("samples/x.npz", arr_0=np.zeros((1, 8, 8, 1), np.uint8))
    Path("link").symlink_to("p")
    before = {path: path.read_bytes() for path in Path().rglob("*.*") if path.is_file()}
    script, *arguments = line.split()
    given = ["--checkpoint", run_dir, "--num_inference_steps", 1]
    if script == "evaluate":
        code, text = command(evaluate.main, *given, *arguments, "--n", 4, "--metrics", "sanity")
    else:
        given += ["--output_name", "x", *(() if script == "invert" else ("--labels", 1))]
        code, text = command(edit.main, script, *given, *arguments)
    assert code == EXIT_USAGE
    assert text.splitlines()[-1].startswith(f"error: {OVER_INPUTS[line]}: the input ")
    assert before == {path: path.read_bytes() for path in Path().rglob("*.*") if path.is_file()}


@pytest.mark.parametrize("suffix", [".png", ".gif", ".npz"])
def test_an_older_file_outlives_a_full_disk_and_a_linked_one_its_link(
    tmp_path, monkeypatch, suffix
):
    own, path = tmp_path / f"own{suffix}", tmp_path / f"x{suffix}"
    own.write_bytes(b"mine")
    path.symlink_to(own)
    picture = torch.zeros(1, 4, 4, dtype=torch.uint8)

    def write() -> None:
        if suffix == ".npz":
            write_npz(path, arr_0=picture.numpy())
        elif suffix == ".gif":
            save_gif(path, [picture], fps=10, final_seconds=1)
        else:
            save_image(path, picture)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(OSError, match="No space"):
            write()
    assert path.read_bytes() == b"mine"
    write()
    assert not path.is_symlink()
    assert own.read_bytes() == b"mine"
    assert sorted(tmp_path.iterdir()) == [own, path]
