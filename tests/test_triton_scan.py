"""Our Triton kernel: in Triton's interpreter, on a CPU, and compiled for GPUs that are not there.

The interpreter is chosen when triton is imported, so those tests run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import mamba
from models.mamba import Backend
from tests.conftest import ROOT
from tests.test_mamba import tiny_dim
from tests.test_selective_scan import walk, worst_error

pytestmark = pytest.mark.slow
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
LENGTHS, STATES, SCALES = (1, 7, 64, 300), (16, 12, 64), (1, 30)
QUICK = [(length, n, scale, 33) for length in LENGTHS[:3] for n in STATES for scale in SCALES]
QUICK += [(300, 16, 1, 5)]
EVERY = [(*case[:3], e) for case in QUICK[:-1] for e in (5, 32)]
EVERY += [(300, n, scale, e) for n in STATES for scale in SCALES for e in (5, 33)]


def inputs_of(length: int, d_state: int, dt_scale: float, width: int, batch: int = 1):
    """In the precision of training: the step sizes before softplus and bias."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    dt = 1e-3 * 100 ** torch.rand(batch, length, width, generator=generator) * dt_scale
    A = -torch.arange(1.0, d_state + 1).repeat(width, 1)
    u, z = (normal(batch, length, width) for _ in range(2))
    B, C = (normal(batch, length, d_state) for _ in range(2))
    D, bias = normal(width), normal(width)
    return u, dt + torch.log(-torch.expm1(-dt)) - bias, A, B, C, D, z, bias


def by_definition(u, dt, A, B, C, D, z, bias):
    return walk(u, F.softplus(dt + bias), A, B, C, D) * F.silu(z)


def results(function, inputs) -> list[Tensor]:
    """The output, and the gradients of all inputs."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    y = function(*leaves)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, weights)]


@pytest.mark.ci
@pytest.mark.timeout(3600)
@compiled
def test_in_the_interpreter(request):
    chosen = "ci" if "ci" in request.config.option.markexpr else "slow"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-m", chosen, "-k", "Interpreted"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, __file__],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@interpreted
class TestInterpreted:
    @pytest.mark.parametrize(
        ("length", "d_state", "dt_scale", "width"),
        [*(pytest.param(*case, marks=pytest.mark.ci) for case in QUICK), *EVERY],
    )
    def test_it_equals_the_walk(self, length, d_state, dt_scale, width):
        from models.triton_scan import gated_scan

        inputs = inputs_of(length, d_state, dt_scale, width)
        expected = results(by_definition, [tensor.double() for tensor in inputs])
        assert worst_error(results(gated_scan, inputs), expected) < 1e-5

    @pytest.mark.ci
    def test_views_and_images_stay_apart(self):
        """Inputs are slices of larger tensors, as in the mixer; two images do not mix."""
        from models.triton_scan import gated_scan

        u, dt, A, B, C, D, z, bias = inputs_of(9, 4, 1, 40, batch=2)
        derived, uz = torch.cat([B, C], 2), torch.cat([u, z], 2)
        views = uz[..., :40], dt, A, *derived.chunk(2, 2), D, uz[..., 40:], bias
        whole = results(gated_scan, views)
        assert all(map(torch.equal, whole, results(gated_scan, (u, dt, A, B, C, D, z, bias))))
        alone = gated_scan(*(t[1:] if t.dim() == 3 else t for t in views))
        assert torch.equal(whole[0][1:], alone)

    @pytest.mark.ci
    def test_two_runs_are_equal_bit_for_bit(self):
        from models.triton_scan import gated_scan

        inputs = inputs_of(70, 16, 30, 33)
        assert all(map(torch.equal, results(gated_scan, inputs), results(gated_scan, inputs)))

    @pytest.mark.ci
    def test_operators_keep_their_contract(self):
        """Shapes without data, no hidden writes, and autograd's formula, as torch.compile needs."""
        from models import triton_scan

        u, dt, A, B, C, D, z, _ = inputs_of(5, 4, 1, 5)
        tensors = (u, F.softplus(dt), A.t().contiguous(), B, C, D, z)
        inputs = [t.requires_grad_() for t in tensors]
        torch.library.opcheck(triton_scan._scan, inputs)
        mixed = [t.detach().bfloat16() if i in (3, 4, 6) else t for i, t in enumerate(inputs)]
        torch.library.opcheck(triton_scan._scan, [t.detach().requires_grad_() for t in mixed])

    @pytest.mark.ci
    def test_to_the_compiler_it_is_one_operator(self):
        from models.triton_scan import gated_scan

        inputs = inputs_of(5, 4, 1, 5)
        graph = torch.compile(gated_scan, backend="aot_eager", fullgraph=True)
        assert worst_error(results(graph, inputs), results(gated_scan, inputs)) < 1e-6

    @pytest.mark.ci
    @pytest.mark.parametrize("bf16", [False, True])
    def test_a_network_computes_the_same(self, monkeypatch, bf16: bool):
        """In both directions, with blocks recomputed in backward, under autocast."""
        from models.triton_scan import gated_scan

        found = []
        for kernel in (None, gated_scan):
            model = tiny_dim(scan="row_bidir", activation_checkpointing=True)
            torch.nn.init.constant_(model.out.weight, 0.1)
            monkeypatch.setattr(mamba, "KERNEL_DEVICES", ("cpu",))
            for block in model.blocks:
                block.mixer.backend = Backend("test", kernel=kernel)
            inputs = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                y = model(inputs, torch.tensor([5]), torch.tensor([1]))
            y.float().square().sum().backward()
            found.append([y, *(p.grad for p in model.parameters() if p.grad is not None)])
        for ours, theirs in zip(*found, strict=True):
            assert (ours - theirs).norm() <= (3e-2 if bf16 else 1e-5) * ours.norm()


class AbsentGPU:
    """What triton asks a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # what is compiled is kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@pytest.fixture
def machine_code(tmp_path, monkeypatch):
    """A list of what is compiled from now on, instead of run, for a GPU of that capability."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    triton = pytest.importorskip("triton")
    from triton.runtime.driver import driver

    built, run = [], triton.JITFunction.run

    def compile_only(self, *args, **options):
        built.append(run(self, *args, **{**options, "warmup": True}).asm)

    def start(capability: int) -> list[dict]:
        driver.set_active(AbsentGPU(capability))
        return built

    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    yield start
    driver.set_active(None)


@pytest.mark.ci
@compiled
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_for_gpus(machine_code, capability: int):
    """Down to machine code; without atomics, so that runs are reproducible."""
    from models.triton_scan import gated_scan

    built = machine_code(capability)
    cases = (366, 16, 1, 768), (1, 12, 1, 33), (9, 64, 1, 64)
    for case, dtype in zip(cases, (torch.bfloat16, torch.float32, torch.float32), strict=True):
        inputs = inputs_of(*case)
        results(gated_scan, [t.to(dtype) if i in (1, 3, 4, 6) else t for i, t in enumerate(inputs)])
    assert len(built) == 3 * 2
    for code in built:
        assert code["cubin"]
        words = {word.partition(".")[0] for word in code["ptx"].split()}
        assert not {"atom", "red"} & words
