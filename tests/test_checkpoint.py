"""Checkpoint files: written whole or not at all, read only if intact, and never executed."""

from __future__ import annotations

import ast
import io
import os
import pickle
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training.resume import newest_checkpoint
from training.run_dir import prepare_run_dir
from training.saving import remove_old_checkpoints
from utils import checkpoint as files
from utils.checkpoint import (
    BEST,
    CURRENT,
    FORMAT_VERSION,
    epoch_name,
    link_checkpoint,
    load_checkpoint,
    resolve_checkpoint,
    save_checkpoint,
)
from utils.config import Config
from utils.errors import CheckpointError

ROOT = Path(__file__).resolve().parent.parent


def make_state(step: int = 0, size: int = 64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "format_version": FORMAT_VERSION,
        "model_state_dict": {
            "w": torch.randn(size, generator=generator),
            "half": torch.randn(5, generator=generator).to(torch.bfloat16),
            "count": torch.tensor(step),
        },
        "epoch": step // 10,
        "step": step,
        "config": Config(experiment_name="x", image_size=8).to_dict(),
        "spec": [1, 8, 8, 10],
        "best_loss": float("inf"),
    }


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- writing


def test_round_trip_is_bitwise(tmp_path):
    path = tmp_path / CURRENT
    save_checkpoint(path, make_state(3))
    assert equal(load_checkpoint(path), make_state(3))
    save_checkpoint(path, make_state(4))
    assert equal(load_checkpoint(path), make_state(4))
    assert names_in(tmp_path) == [CURRENT]


@pytest.mark.parametrize("error", [RuntimeError("disk"), OSError(28, "full"), KeyboardInterrupt()])
def test_a_failing_write_leaves_the_old_file_alone(tmp_path, monkeypatch, error):
    path = tmp_path / CURRENT
    save_checkpoint(path, make_state(1))
    before = path.read_bytes()

    def fail(state, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(type(error)):
        save_checkpoint(path, make_state(2))
    assert path.read_bytes() == before
    assert names_in(tmp_path) == [CURRENT]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_no_acknowledged_file_without_fsync_and_rename(tmp_path, monkeypatch, call):
    path = tmp_path / CURRENT
    save_checkpoint(path, make_state(1))

    def fail(*_):
        raise OSError(5, "input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="input/output"):
        save_checkpoint(path, make_state(2))
    monkeypatch.undo()
    assert equal(load_checkpoint(path), make_state(1))
    assert names_in(tmp_path) == [CURRENT]


def test_a_name_is_on_disk_before_its_file_is_told_of(tmp_path, monkeypatch):
    """The file's content is synced under its temporary name, the folder after the renaming."""
    synced = []

    def fsync(descriptor):
        synced.append((os.fstat(descriptor).st_ino, CURRENT in names_in(tmp_path)))

    monkeypatch.setattr(os, "fsync", fsync)
    save_checkpoint(tmp_path / CURRENT, make_state(1))
    file, folder = (tmp_path / CURRENT).stat().st_ino, tmp_path.stat().st_ino
    assert synced == [(file, False), (folder, True)]
    synced.clear()
    link_checkpoint(tmp_path / CURRENT, tmp_path / BEST)
    assert synced == [(folder, True)]


def test_a_full_disk_leaves_the_old_file_alone(tmp_path):
    """A real ENOSPC-like fault: the kernel refuses to let a file grow beyond a limit."""
    code = """
import resource, signal, sys
from pathlib import Path
from tests.test_checkpoint import *
path = Path(sys.argv[1])
save_checkpoint(path, make_state(1))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (0, 1, 4096, 70_000, 250_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save_checkpoint(path, make_state(2, size=100_000))
    except (OSError, RuntimeError):
        print("refused", *names_in(path.parent), load_checkpoint(path)["step"])
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
save_checkpoint(path, make_state(3, size=100_000))
print("written", *names_in(path.parent), load_checkpoint(path)["step"])
"""
    command = [sys.executable, "-c", code, str(tmp_path / CURRENT)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    expected = [f"refused {CURRENT} 1"] * 5 + [f"written {CURRENT} 3"]
    assert done.stdout.splitlines() == expected, done.stderr


def test_second_names(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / CURRENT, make_state(1))
    link_checkpoint(tmp_path / CURRENT, tmp_path / BEST)
    save_checkpoint(tmp_path / CURRENT, make_state(2))
    link_checkpoint(tmp_path / CURRENT, tmp_path / epoch_name(1))
    steps = {path.name: load_checkpoint(path)["step"] for path in tmp_path.iterdir()}
    assert steps == {CURRENT: 2, BEST: 1, "model_epoch_0001.pth": 2}

    def refuse(*_):
        raise OSError(1, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    link_checkpoint(tmp_path / CURRENT, tmp_path / BEST)
    assert load_checkpoint(tmp_path / BEST)["step"] == 2
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no hard links"):
        link_checkpoint(tmp_path / CURRENT, tmp_path / epoch_name(2))
    assert names_in(tmp_path) == [BEST, CURRENT, "model_epoch_0001.pth"]


def test_keep_last_counts_epochs_not_names(tmp_path):
    for epoch in (9, 10, 100, 9999, 10000):
        (tmp_path / epoch_name(epoch)).touch()
    for name in (BEST, CURRENT, "model_epoch_0001.pth.bak", "model_epoch_x.pth"):
        (tmp_path / name).touch()
    remove_old_checkpoints(tmp_path, 2)
    left = [BEST, CURRENT, "model_epoch_0001.pth.bak", "model_epoch_10000.pth"]
    assert names_in(tmp_path) == [*left, "model_epoch_9999.pth", "model_epoch_x.pth"]
    remove_old_checkpoints(tmp_path, 5)
    assert epoch_name(9999) in names_in(tmp_path)


def test_leftovers_of_dead_processes_are_swept(tmp_path):
    config = Config(save_dir=str(tmp_path), experiment_name="run", image_size=8)
    prepare_run_dir(config.run_dir)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    kept = [f"{CURRENT}.tmp-{os.getpid()}", f"{CURRENT}.tmp-abc", f"{CURRENT}.tmp-"]
    for name in (*kept, f"{CURRENT}.tmp-{dead.pid}", f"{CURRENT}.tmp-{10**30}"):
        (config.run_dir / name).touch()
    prepare_run_dir(config.run_dir)
    assert names_in(config.run_dir) == sorted(kept)


# --- reading


def test_every_flipped_bit_is_noticed(tmp_path):
    """Anywhere: in tensors, in the zip's directory and padding, in the checksum."""
    path = tmp_path / CURRENT
    save_checkpoint(path, make_state(1))
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    offsets = [*rng.integers(len(good), size=200).tolist(), *range(len(good) - 40, len(good))]
    for offset in offsets:
        bad = bytearray(good)
        bad[offset] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(path)
        assert str(error.value).startswith(f"{path}: ")
        assert "\n" not in str(error.value)


def test_files_of_the_first_format_are_read(tmp_path):
    """They have no checksum of the whole; those of their tensors are checked."""
    path = tmp_path / CURRENT
    state = {**make_state(1), "format_version": 1}
    torch.save(state, path)
    assert equal(load_checkpoint(path), state)
    torch.save(make_state(1), path)
    with pytest.raises(CheckpointError, match="checksum is wrong, or was cut off"):
        load_checkpoint(path)


def test_a_flipped_bit_in_a_weight_of_the_first_format_is_noticed(tmp_path):
    """By the zip's own checksum of each tensor, as these files have no other."""
    path = tmp_path / CURRENT
    state = {**make_state(1), "format_version": 1}
    torch.save(state, path)
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(state["model_state_dict"]["w"].numpy().tobytes()) + 17] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"damaged \(\S+ is not what was written\)"):
        load_checkpoint(path)


def test_the_checksum_is_that_of_the_file_as_torch_wrote_it(tmp_path):
    path = tmp_path / CURRENT
    save_checkpoint(path, make_state(1))
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        comment = archive.comment
        assert archive.testzip() is None
    plain = data[: -len(comment) - 2] + bytes(2)
    assert comment == b"crc32 %08x" % zlib.crc32(plain)
    assert equal(torch.load(io.BytesIO(plain), weights_only=True), make_state(1))


def test_a_flipped_bit_in_a_weight_is_always_noticed(tmp_path):
    path = tmp_path / CURRENT
    state = make_state(1, size=10_000)
    save_checkpoint(path, state)
    good = path.read_bytes()
    start = good.index(state["model_state_dict"]["w"].numpy().tobytes())
    for offset in range(start, start + 40_000, 997):
        bad = bytearray(good)
        bad[offset] ^= 1
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(path)


def as_zip(content: bytes = b"hello") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", content)
    return buffer.getvalue()


def as_torch(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in make_state().items() if name != key}


BROKEN = {
    "empty": lambda good: b"",
    "first half": lambda good: good[: len(good) // 2],
    "one byte short": lambda good: good[:-1],
    "no first byte": lambda good: good[1:],
    "zero page": lambda good: good[:512] + bytes(512) + good[1024:],
    "zeros": lambda good: bytes(len(good)),
    "garbage": lambda good: np.random.default_rng(0).bytes(5000),
    "text": lambda good: b"version https://git-lfs.github.com/spec/v1\n",
    "another zip": lambda good: as_zip(),
    "plain pickle": lambda good: pickle.dumps(make_state()),
    "a tensor": lambda good: as_torch(torch.zeros(3)),
    "a list": lambda good: as_torch([1, 2]),
    "bare weights": lambda good: as_torch(make_state()["model_state_dict"]),
    "no spec": lambda good: as_torch(without("spec")),
    "no format": lambda good: as_torch(without("format_version")),
    "odd format": lambda good: as_torch({**make_state(), "format_version": "one"}),
    "odd config": lambda good: as_torch({**make_state(), "config": [1]}),
    "odd spec": lambda good: as_torch({**make_state(), "spec": [1, 8, 8]}),
    "odd step": lambda good: as_torch({**make_state(), "step": "ten"}),
    "newer format": lambda good: as_torch({**make_state(), "format_version": FORMAT_VERSION + 1}),
}


def test_a_member_marked_as_a_folder_is_noticed(tmp_path):
    """One bit, of no checksum: torch would leave that tensor as the memory was."""
    path = tmp_path / "a.pth"
    save_checkpoint(path, make_state())
    good = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    for name in names:
        bad = bytearray(good)
        bad[bad.rindex(name.encode()) - 8] ^= 0x10  # external attributes, in the last directory
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match="is not what was written"):
            load_checkpoint(path)


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_and_foreign_files_are_refused_in_a_line(tmp_path, kind):
    path = tmp_path / CURRENT
    save_checkpoint(path, make_state())
    path.write_bytes(BROKEN[kind](path.read_bytes()))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    if kind == "newer format":
        assert "update the project" in str(caught.value)


class Payload:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("place", ["root", "config", "weights", "file of its own"])
@pytest.mark.parametrize("function", [os.system, os.mkdir, eval, exec])
def test_pickled_code_is_not_run(tmp_path, place, function):
    target = tmp_path / "pwned"
    argument = {
        os.system: f"touch {target}",
        os.mkdir: str(target),
        eval: f"open({str(target)!r}, 'w')",
        exec: f"open({str(target)!r}, 'w')",
    }[function]
    payload = Payload(function, argument)
    path = tmp_path / CURRENT
    if place == "file of its own":
        path.write_bytes(pickle.dumps(payload))
    else:
        state: Any = make_state()
        if place == "root":
            state["extra"] = payload
        elif place == "config":
            state["config"]["seed"] = payload
        else:
            state["model_state_dict"]["w"] = payload
        path.write_bytes(as_torch(state))
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        load_checkpoint(path)
    assert not target.exists()


def test_a_folder_or_nothing_is_no_checkpoint(tmp_path):
    for path in (tmp_path, tmp_path / "gone.pth"):
        with pytest.raises(CheckpointError, match="no such checkpoint"):
            load_checkpoint(path)


def test_every_read_is_weights_only():
    """No `torch.load` in the project without `weights_only=True`, nor another way to unpickle."""
    found = 0
    for path in ROOT.rglob("*.py"):
        if ".venv" in path.parts or path.parent.name == "tests":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            where = f"{path}:{node.lineno}"
            assert name not in ("pickle.load", "pickle.loads", "joblib.load", "yaml.load"), where
            assert not name.endswith("set_crc32_options"), where
            if name == "np.load":
                assert "allow_pickle=True" not in ast.unparse(node), where
            if name in ("torch.load", "load_state_dict_from_url", "torch.hub.load"):
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert given.get("weights_only") == "True", where
                found += 1
    assert found >= 1


# --- which file


def test_resolving_a_file_or_a_run_directory(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(CheckpointError, match=f"has neither {BEST} nor {CURRENT}"):
        resolve_checkpoint(run)
    save_checkpoint(run / CURRENT, make_state())
    assert resolve_checkpoint(run) == run / CURRENT
    link_checkpoint(run / CURRENT, run / BEST)
    assert resolve_checkpoint(str(run)) == run / BEST
    assert resolve_checkpoint(run / CURRENT) == run / CURRENT
    with pytest.raises(CheckpointError, match=r"gone: no such checkpoint or run directory"):
        resolve_checkpoint(tmp_path / "gone")


def test_newest_is_none_without_checkpoints(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "gone") is None
    (tmp_path / "other.pth").write_bytes(b"not ours")
    (tmp_path / f"{CURRENT}.tmp-1").write_bytes(b"half")
    assert newest_checkpoint(tmp_path) is None


def test_newest_falls_back_by_the_step_inside(tmp_path):
    save_checkpoint(tmp_path / epoch_name(3), make_state(30))
    save_checkpoint(tmp_path / epoch_name(2), make_state(20))  # written later, yet older
    save_checkpoint(tmp_path / BEST, make_state(25))
    save_checkpoint(tmp_path / CURRENT, make_state(10))

    def newest() -> tuple[str, int, int]:
        path, state, skipped = newest_checkpoint(tmp_path)
        assert all("\n" not in line for line in skipped)
        return path.name, state["step"], len(skipped)

    assert newest() == (CURRENT, 10, 0)
    (tmp_path / CURRENT).write_bytes(b"broken")
    assert newest() == (epoch_name(3), 30, 1)
    (tmp_path / epoch_name(3)).write_bytes(b"broken")
    assert newest() == (BEST, 25, 2)
    (tmp_path / BEST).unlink()
    assert newest() == (epoch_name(2), 20, 2)


def test_all_damaged_is_an_error_that_lists_them(tmp_path):
    names = [BEST, CURRENT, epoch_name(1)]
    for name in names:
        (tmp_path / name).write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="no readable checkpoint") as caught:
        newest_checkpoint(tmp_path)
    assert all(name in str(caught.value) for name in names)


def test_one_state_at_a_time_is_kept(tmp_path, monkeypatch):
    """Falling back over many files must not hold all of them in memory."""
    import weakref

    for epoch in range(1, 6):
        save_checkpoint(tmp_path / epoch_name(epoch), make_state(epoch))
    alive: list[weakref.ref] = []
    most = 0
    original = files.load_checkpoint

    def watch(path):
        nonlocal most
        state = original(path)
        alive.append(weakref.ref(state["model_state_dict"]["w"]))
        most = max(most, sum(ref() is not None for ref in alive))
        return state

    monkeypatch.setattr(files, "load_checkpoint", watch)
    assert newest_checkpoint(tmp_path)[1]["step"] == 5
    assert most <= 3
