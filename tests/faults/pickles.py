"""Checkpoints that try to run code when they are read."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.faults.checkpoint_files import trained_state
from tests.faults.harness import ROOT, Fault, Figure, Lab, count_bad, environment
from utils import checkpoint as files
from utils.errors import EXIT_FAILURE, CheckpointError

PROTOCOL_2 = b"\x80\x02"
COMMANDS = (
    "train.py experiment_name={name} resume_path=auto",
    "train.py experiment_name={name}_fresh init_from={folder}",
    "sample.py --checkpoint {folder}",
    "evaluate.py --checkpoint {folder}",
)

# Unpickles what a checkpoint holds, as a reader without weights_only=True would.
NAIVE_READER = """
import pickle, sys, zipfile, torch
class Reader(pickle.Unpickler):
    def persistent_load(self, key):
        return torch.zeros(1)
for path, canary in zip(sys.argv[1::2], sys.argv[2::2]):
    if zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        name, = [n for n in archive.namelist() if n.endswith("data.pkl")]
        file = archive.open(name)
    else:
        file = open(path, "rb")
    try:
        Reader(file).load()
    except Exception as error:
        print(path, error)
"""


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def dumped(function: Callable[..., Any], *arguments: Any) -> bytes:
    """The opcodes that call it, without header and end."""
    return pickle.dumps(Call(function, *arguments), 2).removeprefix(PROTOCOL_2)[:-1]


def text(value: str) -> bytes:
    """The opcode that pushes a string."""
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def payloads(canary: Path) -> dict[str, bytes]:
    """Opcodes that make the file `canary` and leave one value on the stack."""
    import os
    import timeit

    import torch.utils.collect_env

    shell, code = f"touch {canary}", f"open({str(canary)!r}, 'w').close()"
    getter = b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(" + text("os") + b"tR" + text("system")
    return {
        "os.system": dumped(os.system, shell),
        "builtins.exec": dumped(exec, code),
        "builtins.eval": dumped(eval, code),
        "subprocess.check_call": dumped(subprocess.check_call, ["touch", str(canary)]),
        "timeit": dumped(timeit.timeit, code, "pass", timeit.default_timer, 1),
        "nested reduce": getter + b"tR(" + text(shell) + b"tR",
        "INST opcode": b"(" + text(shell) + b"ios\nsystem\n",
        "STACK_GLOBAL opcode": text("os") + text("system") + b"\x93(" + text(shell) + b"tR",
        "torch, bytes within": dumped(
            torch.storage._load_from_bytes, legacy(dumped(os.system, shell), {})
        ),
        "torch, a shell helper": dumped(torch.utils.collect_env.run, shell),
    }


def zipped(payload: bytes, state: dict[str, Any]) -> bytes:
    """A good checkpoint whose pickle runs `payload` first."""
    good, bad = io.BytesIO(), io.BytesIO()
    torch.save(state, good)
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(bad, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("/data.pkl"):
                content = before(payload, content)
            target.writestr(name, content)
    return bad.getvalue()


def legacy(payload: bytes, state: dict[str, Any]) -> bytes:
    """The same in the format of old versions of PyTorch, plain pickles one after the other."""
    good = io.BytesIO()
    torch.save(state, good, _use_new_zipfile_serialization=False)
    return before(payload, good.getvalue())


def before(payload: bytes, pickled: bytes) -> bytes:
    """Run `payload`, drop its value, go on with what was there."""
    return PROTOCOL_2 + payload + b"0" + pickled.removeprefix(PROTOCOL_2)


def malicious_files(lab: Lab, trials: int) -> Figure:
    """Every payload in both formats; first a naive reader shows that each of them works."""
    folder = lab.folder / "malicious"
    folder.mkdir()
    state, trial_list = trained_state(lab), []
    for number, form in enumerate((zipped, legacy)):
        for name in payloads(folder):
            canary = folder / f"{name.replace(' ', '_')}_{number}.made"
            path = canary.with_suffix(".pth")
            path.write_bytes(form(payloads(canary)[name], state))
            trial_list.append(partial(read_safely, path, canary, f"{name}, {form.__name__}"))
    bad, detail = count_bad(trial_list)
    harmless = arm(folder)
    if harmless:
        bad, detail = bad + len(harmless), f"no payload at all: {harmless[0]}"
    if trials > len(trial_list):
        scripts = [partial(read_by_command, lab, command) for command in COMMANDS]
        more, problem = count_bad(scripts)
        bad, detail, trial_list = bad + more, detail or problem, trial_list + scripts
    return Figure("malicious pickles", len(trial_list), bad, "executed", detail)


def read_safely(path: Path, canary: Path, label: str) -> None:
    try:
        files.load_checkpoint(path)
        raise Fault(f"{label}: was read")
    except CheckpointError as error:
        if canary.exists():
            raise Fault(f"{label}: executed") from error


def arm(folder: Path) -> list[str]:
    """Names of files whose payload does nothing even if it is let run."""
    pairs = [(path, path.with_suffix(".made")) for path in sorted(folder.glob("*.pth"))]
    command = [sys.executable, "-c", NAIVE_READER, *(str(p) for pair in pairs for p in pair)]
    subprocess.run(command, capture_output=True, check=True)
    return [path.name for path, canary in pairs if not canary.exists()]


def read_by_command(lab: Lab, command: str) -> None:
    """The real command: an error in a line, code 1, nothing run."""
    name, script = lab.new_name("malicious"), command.split()[0]
    folder = lab.run_dir(name)
    folder.mkdir()
    canary = lab.folder / f"{name}.made"
    payload = payloads(canary)["os.system"]
    (folder / files.CURRENT).write_bytes(zipped(payload, trained_state(lab)))
    arguments = ["--config", str(lab.config)] if script == "train.py" else []
    arguments += [part.format(name=name, folder=folder) for part in command.split()[1:]]
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=lab.folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if canary.exists():
        raise Fault(f"{command}: executed")
    if done.returncode != EXIT_FAILURE or "Traceback" in done.stderr:
        raise Fault(f"{command}: exit code {done.returncode}, {done.stderr[-200:]}")
