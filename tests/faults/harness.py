"""A scratch folder, tiny training runs in it, and how to tell whether one was lost.

Every run is the same 10,000 weights on the same 48 images, so one uninterrupted run is the
reference of all others: `Lab.reference` knows the hash of its state after every step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from training.resume import newest_checkpoint
from utils.checkpoint import CURRENT, load_checkpoint
from utils.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
REFERENCE_STEPS = 200
STEP_LINE = re.compile(rb"^step (\d+)/", re.MULTILINE)
GOING_ON = re.compile(rb"^going on from .*, step (\d+)$", re.MULTILINE)

# 48 images in batches of 20: epochs end in the middle of batches, every second or third step
# completes one, and each of those saves. Dropout and a falling learning rate show what a resumed
# run gets wrong.
CONFIG = """
config = dict(
    dataset="custom",
    data_root={data_root!r},
    save_dir={save_dir!r},
    image_size=8,
    image_channels=1,
    conditional=True,
    model_params=dict(
        model_channels=4, channel_mult=(1, 2), num_res_blocks=1, num_head_channels=4, dropout=0.1
    ),
    batch_size=20,
    epochs=100000,
    max_steps=200,
    learning_rate=1e-3,
    use_scheduler=True,
    scheduler_type="step",
    step_size=10,
    gamma=0.9,
    ema_decay=0.9,
    num_timesteps=100,
    num_inference_steps=2,
    num_samples=6,
    save_interval=1,
    sample_interval=100000,
    sample_start_epoch=100000,
    log_interval=1,
)
"""


class Figure(NamedTuple):
    """One row of the table. `bad` is wanted to be 0; `kind` says what a bad trial is."""

    name: str
    trials: int
    bad: int
    kind: str
    detail: str = ""


class Fault(Exception):  # noqa: N818
    """A run did not do what it must; the message goes into the table."""


class Job:
    """A training run that was started: one process, or several that belong together."""

    def __init__(self, processes: Sequence[subprocess.Popen], folder: Path, output: Path) -> None:
        self.processes, self.folder, self.output = processes, folder, output
        self._mark = 0

    @property
    def process(self) -> subprocess.Popen:
        return self.processes[0]

    def text(self) -> bytes:
        """What was printed since the last `forget`."""
        with open(self.output, "rb") as file:
            file.seek(self._mark)
            return file.read()

    def forget(self) -> None:
        self._mark = self.output.stat().st_size

    def tail(self) -> str:
        """The last lines of the whole output, in one line."""
        lines = self.output.read_text(encoding="utf-8", errors="replace").splitlines()
        return " | ".join(lines[-3:])[-300:]

    def last_step(self) -> int:
        """The last step that was reported; 0 for none."""
        return max(map(int, STEP_LINE.findall(self.text())[-1:]), default=0)

    def resumed_from(self) -> int:
        """The step that the run went on from; 0 for a fresh start."""
        return max(map(int, GOING_ON.findall(self.text())[-1:]), default=0)

    def is_running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def wait_until(self, condition: Callable[[], bool], what: str, timeout: float = 120) -> None:
        """Poll; a process that ends, or takes too long, is a `Fault`."""
        deadline = time.monotonic() + timeout
        while not condition():
            if not self.is_running() and not condition():
                raise Fault(f"ended before {what}: {self.tail()}")
            if time.monotonic() > deadline:
                self.kill_after_traceback()
                raise Fault(f"no {what} in {timeout:.0f} s, see {self.output}")
            time.sleep(0.005)

    def wait_for_steps(self, count: int) -> None:
        """Until `count` steps were reported since the start, or the last `forget`."""
        self.wait_until(lambda: len(STEP_LINE.findall(self.text())) >= count, f"{count} steps")

    def ranks(self) -> dict[int, int]:
        """rank -> process id of the training processes under torchrun."""
        found = {}
        for pid in children_of(self.process.pid):
            try:
                text = Path(f"/proc/{pid}/environ").read_bytes()
            except OSError:
                continue
            if match := re.search(rb"(?:^|\0)RANK=(\d+)", text):
                found[int(match[1])] = pid
        return found

    def kill(self) -> None:
        """kill -9 of everything that belongs to it."""
        roots = [process.pid for process in self.processes]
        for pid in [*roots, *(child for root in roots for child in children_of(root))]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def kill_after_traceback(self) -> None:
        """kill -9 of a process that hangs; first its output gets the stacks of all its threads."""
        for process in self.processes:
            for pid in (*children_of(process.pid), process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGABRT)
        time.sleep(1)
        self.kill()

    def finish(self, timeout: float = 120) -> list[int]:
        """Wait for the end. Returns the exit code of each process."""
        deadline = time.monotonic() + timeout
        try:
            for process in self.processes:
                process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill_after_traceback()
            raise Fault(f"did not end in {timeout:.0f} s, see {self.output}") from None
        return [process.returncode for process in self.processes]


class Lab:
    """The scratch folder: data, a config file, and the runs below `runs/`."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self._references: dict[int, dict[int, str]] = {}
        self._jobs: list[Job] = []
        self._count = 0
        make_images(folder / "data")
        (folder / "runs").mkdir()
        (folder / "outputs").mkdir()
        self.config = folder / "tiny.py"
        text = CONFIG.format(data_root=str(folder / "data"), save_dir=str(folder / "runs"))
        self.config.write_text(text, encoding="utf-8")

    def new_name(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}_{self._count}"

    def run_dir(self, name: str) -> Path:
        return self.folder / "runs" / name

    def start(
        self,
        name: str,
        *overrides: object,
        processes: int = 1,
        torchrun: Sequence[str] | None = None,
        inject: dict[str, Any] | None = None,
        config: Path | None = None,
    ) -> Job:
        """Start train.py, one process or several.

        Args:
            torchrun: its options; None starts the ranks directly, so that each has an exit code.
            inject: start `tests/faults/launcher.py` with these faults instead of train.py.
        """
        script = [str(ROOT / "train.py")]
        if inject is not None:
            script = ["-m", "tests.faults.launcher", json.dumps(inject)]
        arguments = ["--config", str(config or self.config), f"experiment_name={name}"]
        arguments += map(str, overrides)
        command = [sys.executable]
        if torchrun is not None:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc_per_node={processes}", *torchrun]
            places = [{}]
        else:
            places = [{}] if processes == 1 else rank_environments(processes)
        self._count += 1
        output = self.folder / "outputs" / f"{self._count:04d}_{name}.txt"
        started = []
        with open(output, "ab") as file:
            for place in places:
                started.append(
                    subprocess.Popen(
                        [*command, *script, *arguments],
                        cwd=self.folder,
                        env={**environment(), **place},
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        self._jobs.append(Job(started, self.run_dir(name), output))
        return self._jobs[-1]

    def close(self) -> None:
        """Kill what still runs, after an interrupt or an error."""
        for job in self._jobs:
            if job.is_running():
                job.kill()

    def complete(self, name: str, *overrides: object, **options: Any) -> Job:
        """A run to its end.

        Raises:
            Fault: it did not end with code 0.
        """
        job = self.start(name, *overrides, **options)
        if any(codes := job.finish()):
            raise Fault(f"exit codes {codes}: {job.tail()}")
        return job

    def reference(self, processes: int = 1) -> dict[int, str]:
        """step -> state hash of the uninterrupted run of `processes`."""
        if processes not in self._references:
            path = self.folder / f"reference_{processes}.jsonl"
            inject = {"states": {"path": str(path)}}
            name = f"reference_{processes}"
            job = self.complete(name, processes=processes, inject=inject)
            hashes = dict(map(json.loads, path.read_text(encoding="utf-8").splitlines()))
            if hashes[REFERENCE_STEPS] != file_hash(job.folder / CURRENT):
                raise Fault("the reference's checkpoint differs from what was in memory")
            self._references[processes] = hashes
        return self._references[processes]

    def check_newest(self, folder: Path, processes: int = 1) -> int:
        """The step that `resume_path=auto` would go on from; 0 if there is no checkpoint.

        Raises:
            Fault: no checkpoint is readable, or it is not the reference's state of that step.
        """
        try:
            found = newest_checkpoint(folder)
        except CheckpointError as error:
            raise Fault(str(error)) from error
        if found is None:
            return 0
        path, state, _ = found
        if self.reference(processes)[state["step"]] != state_hash(state):
            raise Fault(f"{path.name} of step {state['step']} is not the uninterrupted run's")
        return state["step"]

    def check_final(self, folder: Path, processes: int = 1, steps: int = REFERENCE_STEPS) -> None:
        """As `check_newest`, of a finished run, which has left no temporary files."""
        step = self.check_newest(folder, processes)
        if step != steps:
            raise Fault(f"the finished run has step {step}, not {steps}")
        if left := leftovers(folder):
            raise Fault(f"left behind: {', '.join(left)}")


def environment() -> dict[str, str]:
    """One thread, and nothing of a launcher or tracker that this shell may know."""
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {
        k: v for k, v in os.environ.items() if k not in hidden and not re.match("SWANLAB|WANDB", k)
    }
    ours = {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "PYTHONWARNINGS": "ignore"}
    return {**kept, **ours, "PYTHONPATH": str(ROOT)}


def rank_environments(processes: int) -> list[dict[str, str]]:
    """What torchrun would set, for each rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    own = [{"RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    return [{k: str(v) for k, v in {**shared, **ranks}.items()} for ranks in own]


def make_images(folder: Path) -> None:
    """48 noise images of 8x8 pixels in three classes."""
    generator = np.random.default_rng(0)
    for label in ("a", "b", "c"):
        (folder / label).mkdir(parents=True)
        for i in range(16):
            pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i:02d}.png")


def children_of(pid: int) -> list[int]:
    """All descendants of a process (Linux)."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
    found, level = [], [pid]
    while level := [child for child, parent in parents.items() if parent in level]:
        found += level
    return found


def leftovers(folder: Path) -> list[str]:
    """Temporary files in a run's folder."""
    names = [path.name for path in folder.iterdir()]
    return sorted(n for n in names if ".tmp" in n or n.startswith(".probe"))


def state_hash(state: dict[str, Any]) -> str:
    """SHA-256 over the step, the weights, their average and the optimizer's state."""
    digest = hashlib.sha256()
    for key in ("step", "model_state_dict", "ema_model_state_dict", "optimizer_state_dict"):
        _add(digest, state[key])
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    return state_hash(load_checkpoint(path))


def _add(digest: hashlib._Hash, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=repr):
            digest.update(repr(key).encode())
            _add(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)}]".encode())
        for item in value:
            _add(digest, item)
    else:
        digest.update(repr(value).encode())


def count_bad(trials: Sequence[Callable[[], None]]) -> tuple[int, str]:
    """Run every trial. Returns how many were a `Fault`, and what the first five of them were."""
    problems = []
    for trial in trials:
        try:
            trial()
        except Fault as fault:
            problems.append(str(fault))
    return len(problems), "; ".join(problems[:5])
