"""The recurrences of Mamba and Mamba-2 against a float64 walk over the tokens, one by one."""

import math

import pytest
import torch
from torch import Tensor

from models import selective_scan as scans
from models.selective_scan import chunked_scan, selective_scan

LENGTHS = (1, 7, 16, 64, 366)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
BATCH, WIDTH, STATE, HEADS, CHANNELS = 2, 12, 4, 4, 3


def walk(u, dt, A, B, C, D) -> Tensor:
    """Mamba-1, written from its definition."""
    h, ys = u.new_zeros(len(u), *A.shape), []
    for t in range(u.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt * u)[:, t, :, None] * B[:, t, None, :]
        ys.append((h * C[:, t, None, :]).sum(2) + D * u[:, t])
    return torch.stack(ys, 1)


def walk_heads(x, dt, A, B, C, D) -> Tensor:
    """Mamba-2, written from its definition."""
    share = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(share, 2), C.repeat_interleave(share, 2)
    h, ys = x.new_zeros(len(x), x.shape[2], B.shape[3], x.shape[3]), []
    for t in range(x.shape[1]):
        added = (dt[:, t, :, None] * B[:, t])[..., None] * x[:, t, :, None]
        h = torch.exp(dt[:, t] * A)[..., None, None] * h + added
        ys.append((C[:, t, :, :, None] * h).sum(2) + D[:, None] * x[:, t])
    return torch.stack(ys, 1)


def draw(mixer: str, length: int, dt_scale: float = 1.0, groups: int = 2) -> list[Tensor]:
    """Inputs with step sizes as at initialisation, times dt_scale."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def steps(*shape):
        log = torch.rand(shape, generator=generator, dtype=torch.float64) * math.log(100)
        return 1e-3 * torch.exp(log) * dt_scale

    if mixer == "mamba1":
        A = -torch.arange(1.0, STATE + 1, dtype=torch.float64).repeat(WIDTH, 1)
        u, B, C = (normal(BATCH, length, n) for n in (WIDTH, STATE, STATE))
        return [u, steps(BATCH, length, WIDTH), A, B, C, normal(WIDTH)]
    A = -torch.linspace(1, 16, HEADS, dtype=torch.float64)
    x = normal(BATCH, length, HEADS, CHANNELS)
    B, C = (normal(BATCH, length, groups, STATE) for _ in range(2))
    return [x, steps(BATCH, length, HEADS), A, B, C, normal(HEADS)]


def results(scan, inputs: list[Tensor]) -> list[Tensor]:
    """The output, and the gradient of every input for fixed random weights."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    generator = torch.Generator().manual_seed(0)
    y = scan(*inputs)
    weights = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    return [y.detach(), *torch.autograd.grad(y, inputs, weights)]


def worst_error(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(
        float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30))
        for a, b in zip(found, expected, strict=True)
    )


SCANS = {"mamba1": (selective_scan, walk), "mamba2": (chunked_scan, walk_heads)}


@pytest.fixture(params=["steps", "chunks"])
def device_variant(request, monkeypatch):
    """Mamba-1's two ways through a segment; that of GPUs runs on CPUs too."""
    if request.param == "chunks":
        monkeypatch.setattr(scans, "_segment", lambda tensor: scans.GPU_SEGMENT)
        monkeypatch.setattr(scans, "_chunk", lambda tensor: scans.GPU_CHUNK)
    return request.param


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dt_scale", [1, 30])
@pytest.mark.parametrize("length", LENGTHS)
class TestAgainstTheWalk:
    def test_selective_scan(self, length, dt_scale, dtype, device_variant):
        inputs = draw("mamba1", length, dt_scale)
        found = results(selective_scan, [tensor.to(dtype) for tensor in inputs])
        expected = results(walk, [tensor.to(dtype).double() for tensor in inputs])
        assert worst_error(found, expected) < TOLERANCE[dtype]

    @pytest.mark.parametrize("groups", [1, 2])
    def test_chunked_scan(self, length, dt_scale, dtype, groups):
        inputs = draw("mamba2", length, dt_scale, groups)
        found = results(chunked_scan, [tensor.to(dtype) for tensor in inputs])
        expected = results(walk_heads, [tensor.to(dtype).double() for tensor in inputs])
        assert worst_error(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("chunk_size", [1, 5, 32, 256])
def test_chunk_size_does_not_matter(chunk_size, monkeypatch):
    inputs = draw("mamba2", 70)
    expected = results(chunked_scan, inputs)
    monkeypatch.setattr(scans, "SSD_CHUNK", chunk_size)
    assert worst_error(results(chunked_scan, inputs), expected) < 1e-10


def test_size_of_scratch_does_not_matter(monkeypatch):
    inputs = draw("mamba1", 40)
    expected = results(selective_scan, inputs)
    monkeypatch.setattr(scans, "MAX_SCRATCH", 1)  # one example at a time
    for found, wanted in zip(results(selective_scan, inputs), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mixer", SCANS)
class TestEachScan:
    def test_no_token_sees_a_later_one(self, mixer, device_variant):
        scan, _ = SCANS[mixer]
        inputs = draw(mixer, 40)
        before = scan(*inputs)
        for i in (0, 1, 3, 4):  # what has a length: u or x, dt, B, C
            changed = [tensor.clone() for tensor in inputs]
            changed[i][:, 23] *= 2
            after = scan(*changed)
            assert torch.equal(after[:, :23], before[:, :23])
            assert not torch.equal(after[:, 23:], before[:, 23:])

    def test_gradients_are_those_of_finite_differences(self, mixer, device_variant):
        scan, _ = SCANS[mixer]
        inputs = [tensor[:1] if tensor.dim() > 2 else tensor for tensor in draw(mixer, 9)]
        assert torch.autograd.gradcheck(scan, [tensor.requires_grad_() for tensor in inputs])

    def test_autocast_does_not_reach_inside(self, mixer):
        scan, _ = SCANS[mixer]
        inputs = [tensor.float() for tensor in draw(mixer, 40, dt_scale=30)]
        plain = results(scan, inputs)

        def under_autocast(*inputs):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return scan(*inputs)

        if mixer == "mamba1":  # its backward is one operator, even where autocast surrounds it
            with torch.autocast("cpu", dtype=torch.bfloat16):
                mixed = results(scan, inputs)
        else:
            mixed = results(under_autocast, inputs)
        assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))

    def test_low_precision_inputs_are_widened(self, mixer):
        scan, _ = SCANS[mixer]
        inputs = [tensor.bfloat16() for tensor in draw(mixer, 40)]
        y = scan(*inputs)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, scan(*(tensor.float() for tensor in inputs)))


def test_operators_keep_their_contract():
    """Shapes without data, no hidden writes, and autograd's formula, as torch.compile needs."""
    u, dt, A, B, C, _ = draw("mamba1", 20)
    inputs = [t.requires_grad_() for t in (u, dt, A.t().contiguous(), B, C)]
    torch.library.opcheck(scans._selective_scan, inputs)


def test_backward_keeps_states_of_segments_only():
    kept = {}

    def count(tensor):
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    length = 160
    inputs = [tensor.requires_grad_() for tensor in draw("mamba1", length)]
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        selective_scan(*inputs)
    for tensor in inputs:
        kept.pop(tensor.data_ptr(), None)
    all_states = BATCH * length * WIDTH * STATE * 8
    scaled_decays = WIDTH * STATE * 8
    assert sum(kept.values()) == all_states / scans.CPU_SEGMENT + scaled_decays
