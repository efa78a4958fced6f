"""Fixtures shared by the tests."""

from __future__ import annotations

import logging
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# One thread each: the tests' tensors are tiny, and several processes share few cores.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs, which scripts take where there are any, from all tests but those that ask."""
    if not asks_for_a_gpu(config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def asks_for_a_gpu(markers: str) -> bool:
    """Whether the `-m` of a command line picks tests that need one."""
    return re.search(r"(?<!not )\bgpu\b", markers) is not None


TINY_CONFIG = """
config = dict(
    dataset="digits",
    image_size=8,
    conditional=True,
    model_params=dict(model_channels=8, channel_mult=(1, 2), num_res_blocks=1, dropout=0.1),
    batch_size=64,
    epochs=100,
    learning_rate=1e-3,
    ema_decay=0.9,
    num_timesteps=100,
    num_inference_steps=3,
    save_interval=100,
    sample_interval=100,
    sample_start_epoch=100,
    num_samples=20,
    log_interval=5,
)
"""


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond that, as the kernel sees to it: a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(autouse=True)
def logger_as_it_was():
    """The scripts set up the project's logger; every test finds it untouched."""
    _reset_logger()  # fixtures of whole modules may have run scripts, too
    yield
    _reset_logger()


def _reset_logger() -> None:
    logger = logging.getLogger("diffusion")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A config file of a network that trains in milliseconds; the working directory is tmp_path."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.py"
    path.write_text(TINY_CONFIG, encoding="utf-8")
    return path


def run_script(script: str, *arguments: object, processes: int = 1, cwd: Path, **options):
    """Run one of the three scripts as users do; returns the finished process."""
    return start_script(script, *arguments, processes=processes, cwd=cwd).communicate_and_wait()


class Script(subprocess.Popen):
    """A script in a process of its own."""

    def communicate_and_wait(self, timeout: float = 240) -> Script:
        self.output, _ = self.communicate(timeout=timeout)
        return self


def start_script(script: str, *arguments: object, processes: int = 1, cwd: Path) -> Script:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    packages = os.environ.get("GPU_PACKAGES", "")  # what a Python without an environment lacks
    return Script(
        [*command, str(ROOT / script), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": packages},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def script(tmp_path):
    """run_script in tmp_path."""

    def run(name: str, *arguments: object, processes: int = 1) -> Script:
        return run_script(name, *arguments, processes=processes, cwd=tmp_path)

    return run
