"""Freed memory is used again: counted in pages that the system had to map anew."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from tests.conftest import ROOT

COUNT_FAULTS = """
import ctypes
import resource
import torch
from utils.distributed import distributed_runtime

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

PR_SET_THP_DISABLE = 41
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)  # pages of one size, to count them
with distributed_runtime("cpu"):
    for turn in range(10):
        before = faults()
        # as a step does; 36 MiB and more is what glibc never keeps by itself
        blocks = [torch.ones(size * 2**18) for size in (36, 48, 40, 44)]
        del blocks
print(faults() - before)
"""
PAGES = (36 + 48 + 40 + 44) * 2**20 // os.sysconf("SC_PAGE_SIZE")


def faults_of_a_turn(**environment: str) -> int:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")


def test_freed_blocks_are_used_again():
    assert faults_of_a_turn() < PAGES / 100


def test_settings_from_outside_stay():
    assert faults_of_a_turn(MALLOC_MMAP_THRESHOLD_="1000000") > PAGES / 2
