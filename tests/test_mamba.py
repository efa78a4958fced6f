"""The mixers: equal to their definition and to mamba-ssm's own modules, whoever computes them."""

import functools
import logging
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import models
from models import build_model, mamba, mamba_backend
from models.mamba import TORCH, Mamba, Mamba2
from models.mamba_backend import SOURCES, choose_backend
from models.selective_scan import chunked_scan, selective_scan
from tests.test_selective_scan import LENGTHS, TOLERANCE, walk, walk_heads, worst_error
from utils.config import Config
from utils.errors import ConfigError
from utils.images import ImageSpec

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parent / "data" / "mamba_golden.npz"

# What mamba_ssm.Mamba(384, d_state=16, d_conv=3) and mamba_ssm.Mamba2(384, d_state=64, d_conv=3)
# hold; a checkpoint must not depend on who computes.
MAMBA1_TABLE = {
    "A_log": (768, 16),
    "D": (768,),
    "in_proj.weight": (1536, 384),
    "conv1d.weight": (768, 1, 3),
    "conv1d.bias": (768,),
    "x_proj.weight": (24 + 2 * 16, 768),
    "dt_proj.weight": (768, 24),
    "dt_proj.bias": (768,),
    "out_proj.weight": (384, 768),
}
MAMBA2_TABLE = {
    "dt_bias": (12,),
    "A_log": (12,),
    "D": (12,),
    "in_proj.weight": (2 * 768 + 2 * 64 + 12, 384),
    "conv1d.weight": (768 + 2 * 64, 1, 3),
    "conv1d.bias": (768 + 2 * 64,),
    "norm.weight": (768,),
    "out_proj.weight": (384, 768),
}


def conv_of(x, weight, bias):
    """The convolution as mamba-ssm writes it: padded on both sides, the future cut off."""
    taps = weight.shape[2]
    y = F.conv1d(x.transpose(1, 2), weight, bias, padding=taps - 1, groups=weight.shape[0])
    return y[..., : x.shape[1]].transpose(1, 2)


def mamba1_by_definition(p, x):
    inner, state = p["A_log"].shape
    rank = p["dt_proj.weight"].shape[1]
    xz = x @ p["in_proj.weight"].T
    u, z = xz[..., :inner], xz[..., inner:]
    u = F.silu(conv_of(u, p["conv1d.weight"], p["conv1d.bias"]))
    derived = u @ p["x_proj.weight"].T
    dt = F.softplus(derived[..., :rank] @ p["dt_proj.weight"].T + p["dt_proj.bias"])
    B, C = derived[..., rank : rank + state], derived[..., rank + state :]
    y = walk(u, dt, -torch.exp(p["A_log"]), B, C, p["D"])
    return (y * F.silu(z)) @ p["out_proj.weight"].T


def mamba2_by_definition(p, x):
    inner, heads = p["norm.weight"].shape[0], p["D"].shape[0]
    state = (p["conv1d.bias"].shape[0] - inner) // 2
    projected = x @ p["in_proj.weight"].T
    z, mixed, dt = projected.split((inner, inner + 2 * state, heads), dim=2)
    mixed = F.silu(conv_of(mixed, p["conv1d.weight"], p["conv1d.bias"]))
    u, B, C = mixed.split((inner, state, state), dim=2)
    u = u.reshape(*u.shape[:2], heads, inner // heads)
    dt = F.softplus(dt + p["dt_bias"])
    A = -torch.exp(p["A_log"])
    y = walk_heads(u, dt, A, B[:, :, None], C[:, :, None], p["D"])
    y = y.flatten(2) * F.silu(z)
    y = y / torch.sqrt(y.square().mean(2, keepdim=True) + 1e-5) * p["norm.weight"]
    return y @ p["out_proj.weight"].T


def make_mixer(name, dt_scale=1.0, dtype=torch.float64, width=16):
    """A small mixer whose step sizes at initialisation are multiplied by dt_scale."""
    torch.manual_seed(0)
    mixer = Mamba(width, d_state=4) if name == "mamba1" else Mamba2(width, d_state=4, headdim=8)
    bias = mixer.dt_proj.bias if name == "mamba1" else mixer.dt_bias
    with torch.no_grad():
        dt = F.softplus(bias.double()) * dt_scale
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))
    return mixer.to(dtype)


def outputs_and_gradients(function, parameters, x):
    y = function(x)
    weights = torch.linspace(-1, 1, y.numel()).view_as(y).to(y)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), [x, *parameters])]


MIXERS = {"mamba1": mamba1_by_definition, "mamba2": mamba2_by_definition}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dt_scale", [1, 30])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", MIXERS)
def test_mixers_equal_their_definition(name, length, dt_scale, dtype):
    mixer = make_mixer(name, dt_scale, dtype)
    x = torch.randn(2, length, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = outputs_and_gradients(mixer, list(mixer.parameters()), x.requires_grad_())
    wide = {k: p.detach().double().requires_grad_() for k, p in mixer.named_parameters()}
    x = x.detach().double().requires_grad_()
    by_definition = functools.partial(MIXERS[name], wide)
    expected = outputs_and_gradients(by_definition, list(wide.values()), x)
    assert worst_error(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", MIXERS)
def test_mixers_equal_mamba_ssm(name):
    """tests/data/mamba_golden.npz holds weights, outputs and gradients of mamba_ssm 2.3.2's Mamba
    and Mamba2 modules, computed on a CPU with that package's reference functions."""
    golden = {
        key.removeprefix(f"{name}/"): torch.from_numpy(values)
        for key, values in np.load(GOLDEN).items()
        if key.startswith(f"{name}/")
    }
    mixer = Mamba(8, d_state=4) if name == "mamba1" else Mamba2(8, d_state=4, headdim=8)
    weights = {k: v for k, v in golden.items() if k.startswith("weights/")}
    mixer.load_state_dict({k.removeprefix("weights/"): v for k, v in weights.items()})
    x = golden["x"].requires_grad_()
    y = mixer(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, golden["y"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad, golden["grad_x"], rtol=1e-4, atol=1e-5)
    for key, parameter in mixer.named_parameters():
        torch.testing.assert_close(parameter.grad, golden[f"grads/{key}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("mixer", "table"), [(Mamba(384), MAMBA1_TABLE), (Mamba2(384), MAMBA2_TABLE)]
)
def test_parameters_are_those_of_mamba_ssm(mixer, table):
    assert {key: tuple(value.shape) for key, value in mixer.state_dict().items()} == table


@pytest.mark.parametrize("name", MIXERS)
def test_no_token_sees_a_later_one(name):
    mixer = make_mixer(name)
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    changed = x.clone()
    changed[:, 17] += 1
    assert torch.equal(mixer(x)[:, :17], mixer(changed)[:, :17])


@pytest.mark.parametrize("name", MIXERS)
def test_autocast_stays_close(name):
    mixer = make_mixer(name, dtype=torch.float32, width=64)
    x = torch.randn(2, 40, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x)
    assert y.dtype == torch.bfloat16
    expected = mixer(x)
    assert (y - expected).norm() < 2e-2 * expected.norm()


def test_initial_step_sizes_and_decays():
    first, second = Mamba(64), Mamba2(256)
    for bias in (first.dt_proj.bias, second.dt_bias):
        steps = F.softplus(bias)
        assert 0.99e-3 < steps.min() < steps.max() < 1.01e-1
    torch.testing.assert_close(first.A_log, torch.arange(1.0, 17).log().expand(128, 16))
    assert 1 <= second.A_log.exp().min() < second.A_log.exp().max() <= 16


def test_heads_must_fit():
    with pytest.raises(ValueError, match="divisible by 64"):
        Mamba2(48)


# --- who computes


@pytest.fixture
def plant(monkeypatch):
    """Put modules in the place of mamba-ssm, and take the CPU for a device with kernels."""
    for module in (mamba, mamba_backend):
        monkeypatch.setattr(module, "KERNEL_DEVICES", ("cpu", "cuda"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
        monkeypatch.delitem(sys.modules, name)
    mamba_backend._probe.cache_clear()

    def plant(contents):
        monkeypatch.setitem(sys.modules, "mamba_ssm", types.ModuleType("mamba_ssm"))
        monkeypatch.setitem(sys.modules, "mamba_ssm.ops", types.ModuleType("mamba_ssm.ops"))
        monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton", types.ModuleType("triton"))
        for path, names in contents.items():
            module = types.ModuleType(path)
            vars(module).update(names)
            monkeypatch.setitem(sys.modules, path, module)
            parent, _, child = path.rpartition(".")
            setattr(sys.modules[parent], child, module)

    yield plant
    mamba_backend._probe.cache_clear()


SCANS = {"mamba1": selective_scan, "mamba2": chunked_scan}


def fake_scan(
    u, delta, A, B, C, D, *, z, delta_bias, delta_softplus, scan=SCANS["mamba1"], off=0.0
):
    """selective_scan_fn's interface, with L last."""
    assert delta_softplus
    u, delta, B, C, z = (tensor.transpose(1, 2) for tensor in (u, delta, B, C, z))
    y = scan(u, F.softplus(delta.float() + delta_bias), A, B, C, D)
    return (y * F.silu(z)).transpose(1, 2).to(z.dtype) + off


def fake_chunk_scan(x, dt, A, B, C, *, chunk_size, D, dt_bias, dt_softplus, scan=SCANS["mamba2"]):
    assert dt_softplus
    return scan(x, F.softplus(dt.float() + dt_bias), A, B, C, D).to(x.dtype)


INTERFACE = "mamba_ssm.ops.selective_scan_interface"
TRITON = "mamba_ssm.ops.triton.ssd_combined"
WORKING = {
    INTERFACE: {"selective_scan_cuda": object(), "selective_scan_fn": fake_scan},
    TRITON: {"mamba_chunk_scan_combined": fake_chunk_scan},
}


def raising(error):
    def function(*args, **kwargs):
        raise error

    return function


BROKEN = {
    "without its extension": {INTERFACE: {"selective_scan_cuda": None}},
    "undefined symbol": {
        INTERFACE: {
            "selective_scan_cuda": object(),
            "selective_scan_fn": raising(OSError("undefined symbol: _ZN3c104")),
        }
    },
    "results differ": {
        INTERFACE: {
            "selective_scan_cuda": object(),
            "selective_scan_fn": lambda *a, **k: fake_scan(*a, **k, off=0.1),
        }
    },
    "nan": {
        INTERFACE: {
            "selective_scan_cuda": object(),
            "selective_scan_fn": lambda *a, **k: fake_scan(*a, **k, off=math.nan),
        }
    },
}


# --- kernels that are wrong, as functions (u, dt, A, B, C, D) -> y


def without_state(scan):
    def skip_only(u, dt, A, B, C, D):
        return 0 * scan(u, dt, A, B, C, D) + D.view(-1, *[1] * (u.dim() - 3)) * u

    return skip_only


def forgetting(scan, every):
    """Starts from a zero state again after `every` tokens."""

    def forget(u, dt, A, B, C, D):
        parts = zip(*(tensor.split(every, 1) for tensor in (u, dt, B, C)), strict=True)
        return torch.cat([scan(u, dt, A, B, C, D) for u, dt, B, C in parts], 1)

    return forget


def tilted(scan, which, factor=1.05):
    """The gradient of one input is too large."""

    def tilt(*inputs):
        inputs = list(inputs)
        inputs[which] = factor * inputs[which] + (1 - factor) * inputs[which].detach()
        return scan(*inputs)

    return tilt


def last_token_wrong(scan):
    def wrong(*inputs):
        y = scan(*inputs)
        return torch.cat([y[:, :-1], y[:, -2:-1]], 1)

    return wrong


INPUTS = ("u", "dt", "A", "B", "C", "D")
# name: where it shows first, and what makes the right scan wrong
FAULTS = {
    "no scan": ("y", without_state),
    "last token": ("y", last_token_wrong),
    "state lost every 16 tokens": ("y", functools.partial(forgetting, every=16)),
    "state lost at token 256": ("y", functools.partial(forgetting, every=256)),
    **{
        name: (f"the gradient of {name}", functools.partial(tilted, which=i))
        for i, name in enumerate(INPUTS)
    },
}


def plant_scan(plant, mixer, scan):
    """A kernel of mamba-ssm that computes `scan`."""
    if mixer == "mamba1":
        kernel = functools.partial(fake_scan, scan=scan)
        plant({INTERFACE: {"selective_scan_cuda": object(), "selective_scan_fn": kernel}})
    else:
        kernel = functools.partial(fake_chunk_scan, scan=scan)
        plant({TRITON: {"mamba_chunk_scan_combined": kernel}})


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_wrong_kernels_are_found_out(plant, mixer, fault):
    place, spoil = FAULTS[fault]
    plant_scan(plant, mixer, spoil(SCANS[mixer]))
    with pytest.raises(ConfigError, match=rf"results differ from PyTorch's by \S+ in {place};"):
        choose_backend("mamba_ssm", mixer, CPU, d_state=16)


@pytest.mark.parametrize("mixer", MIXERS)
def test_right_kernels_are_taken(plant, mixer):
    """Here the walk over the tokens, which rounds what the kernels round."""

    def walked(u, dt, A, B, C, D):
        u, dt, B, C = (tensor.float() for tensor in (u, dt, B, C))
        return (walk if mixer == "mamba1" else walk_heads)(u, dt, A, B, C, D)

    plant_scan(plant, mixer, walked)
    assert choose_backend("mamba_ssm", mixer, CPU, d_state=16).kernel is not None


def tiny_dim(**params):
    config = Config(
        experiment_name="test",
        model_type="dim",
        conditional=True,
        model_params=dict(hidden_size=32, depth=3, **params),
    )
    torch.manual_seed(0)
    return build_model(config, ImageSpec(1, 8, 8, 10))


def kinds_of(model):
    return {type(module).__name__ for module in model.modules()}


def counting(contents, calls):
    """The planted modules, noting every call of a kernel."""

    def counted(function):
        def call(*args, **kwargs):
            calls.append(1)
            return function(*args, **kwargs)

        return call if callable(function) else function

    return {
        path: {name: counted(value) for name, value in names.items()}
        for path, names in contents.items()
    }


@pytest.mark.parametrize("name", MIXERS)
def test_kernels_are_used_and_change_nothing(plant, name, caplog):
    reference = tiny_dim(mixer=name, mamba_backend="torch")
    calls = []
    plant(counting(WORKING, calls))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        model = tiny_dim(mixer=name)
    assert model.backend.name.startswith("mamba_ssm ")
    assert [f"mixer={name} backend=mamba_ssm" in line for line in caplog.messages] == [True]
    assert list(model.state_dict()) == list(reference.state_dict())
    reference.load_state_dict(model.state_dict())  # a checkpoint moves
    inputs = (torch.randn(2, 1, 8, 8), torch.tensor([3, 500]), torch.tensor([1, -1]))
    for network, num_calls in ((model, len(model.blocks)), (reference, 0)):
        with torch.no_grad():
            network.out.weight.fill_(0.1)
        calls.clear()
        network(*inputs).square().sum().backward()
        assert len(calls) == num_calls
    for ours, theirs in zip(reference.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_kernels_are_found_out(plant, fault, caplog):
    expected = tiny_dim(mamba_backend="torch")
    caplog.clear()
    plant(BROKEN[fault])
    model = tiny_dim()
    assert model.backend.name == "torch"
    assert len(caplog.messages) == 1
    assert "same function, slower" in caplog.messages[0]
    assert "docs/dim.md" in caplog.messages[0]
    assert caplog.records[0].levelno == logging.WARNING
    assert list(model.state_dict()) == list(expected.state_dict())
    assert not any("ttention" in kind for kind in kinds_of(model))
    with pytest.raises(ConfigError, match=r"mamba_backend='auto'.*docs/dim.md"):
        tiny_dim(mamba_backend="mamba_ssm")


def test_blocked_mamba_ssm(plant, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    model = tiny_dim()
    assert "backend=torch (mamba-ssm is unusable: ModuleNotFoundError" in caplog.messages[0]
    assert not any("ttention" in kind for kind in kinds_of(model))


def test_the_probe_runs_once_and_draws_no_numbers(plant):
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return fake_scan(*args, **kwargs)

    plant({INTERFACE: {"selective_scan_cuda": object(), "selective_scan_fn": counted}})
    before = torch.get_rng_state()
    first, second = (choose_backend("auto", "mamba1", CPU, d_state=16) for _ in range(2))
    assert first == second
    assert len(calls) == 2  # fp32 and bf16
    assert torch.equal(before, torch.get_rng_state())


def test_a_cpu_needs_no_kernels(caplog):
    with caplog.at_level(logging.INFO):
        tiny_dim()
    expected = "mixer=mamba1 backend=torch (kernels need a CUDA GPU, this is cpu)"
    assert [expected in message for message in caplog.messages] == [True]
    assert caplog.records[0].levelno == logging.INFO
    for name, mixer in (("mamba_ssm", "mamba2"), ("triton", "mamba1")):
        with pytest.raises(ConfigError, match=rf"'{name}': kernels need a CUDA GPU, .*='auto'"):
            choose_backend(name, mixer, CPU, d_state=64)


def test_auto_takes_our_kernel_where_mamba_ssm_does_not_work(plant, monkeypatch, caplog):
    plant(BROKEN["without its extension"])
    load, ours = mamba_backend._load, ("triton 3.8.0", mamba.gated_scan)
    monkeypatch.setattr(
        mamba_backend, "_load", lambda name, mixer: ours if name == "triton" else load(name, mixer)
    )
    with caplog.at_level(logging.INFO):
        model = tiny_dim()
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "backend=triton 3.8.0 (mamba-ssm is unusable: " in record.getMessage()
    assert record.getMessage().endswith("; its kernels work here)")
    assert model.blocks[0].mixer.backend.kernel is mamba.gated_scan
    assert choose_backend("triton", "mamba1", CPU, d_state=16).reason == "its kernels work here"


def test_triton_where_there_is_none(plant, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "models.triton_scan", raising=False)
    monkeypatch.delattr(models, "triton_scan", raising=False)
    with pytest.raises(ConfigError, match=r"'triton': triton is unusable: \S+Error: .*triton"):
        choose_backend("triton", "mamba1", CPU, d_state=16)


def test_triton_is_not_for_mamba2(plant):
    with pytest.raises(ConfigError, match=r"'triton': its kernel is not for mixer='mamba2'; use"):
        tiny_dim(mixer="mamba2", mamba_backend="triton")


@pytest.fixture
def kernels():
    """-> (mixer, source): its backend on this machine's GPU, or the test is skipped."""

    def find(name, source):
        backend = mamba_backend._probe(source, name, torch.device("cuda"), 16)
        if backend.kernel is None:
            pytest.skip(backend.reason)
        return backend

    return find


@pytest.mark.gpu
@pytest.mark.parametrize("name", MIXERS)
def test_pytorch_equals_the_definition_on_a_gpu(name):
    for length in LENGTHS:
        mixer = make_mixer(name, 1.0, torch.float32).cuda()
        x = torch.randn(2, length, 16, device="cuda", requires_grad=True)
        found = outputs_and_gradients(mixer, list(mixer.parameters()), x)
        wide = {k: p.detach().double().requires_grad_() for k, p in mixer.named_parameters()}
        x = x.detach().double().requires_grad_()
        by_definition = functools.partial(MIXERS[name], wide)
        expected = outputs_and_gradients(by_definition, list(wide.values()), x)
        assert worst_error(found, expected) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "source"), [(name, source) for name in MIXERS for source in SOURCES[name]]
)
class TestOnAGpu:
    """Tolerances are those of mamba-ssm's own tests."""

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_kernels_equal_pytorch(self, name, source, precision, kernels):
        backend = kernels(name, source)
        tolerance = (
            dict(rtol=3e-2, atol=5e-2) if precision == "bf16" else dict(rtol=1e-2, atol=3e-3)
        )
        if name == "mamba1" and precision == "fp32":
            tolerance = dict(rtol=6e-4, atol=2e-3)
        torch.manual_seed(0)
        mixer = (Mamba(256) if name == "mamba1" else Mamba2(256)).cuda()
        x = torch.randn(4, 366, 256, device="cuda", requires_grad=True)
        found = []
        for mixer.backend in (TORCH, backend):
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "bf16"):
                found.append(outputs_and_gradients(mixer, list(mixer.parameters()), x))
        torch.testing.assert_close(found[0][0], found[1][0], **tolerance)
        for ours, theirs in zip(found[0][1:], found[1][1:], strict=True):
            limit = 3e-2 if precision == "bf16" else 1e-2
            assert (ours - theirs).norm() < limit * ours.norm()

    def test_a_run_goes_on_under_the_other(self, name, source, kernels):
        """100 optimizer steps with one, 100 with the other: the loss neither jumps nor differs
        from that of a run that stays."""
        backend = kernels(name, source)

        def train(first, second):
            model = tiny_dim(mixer=name, mamba_backend="torch").cuda()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
            generator = torch.Generator("cuda").manual_seed(0)
            losses = []
            for step in range(200):
                for block in model.blocks:
                    block.mixer.backend = first if step < 100 else second
                x = torch.randn(16, 1, 8, 8, device="cuda", generator=generator)
                t = torch.randint(1000, (16,), device="cuda", generator=generator)
                loss = (model(x, t, t % 10) - x).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
            return torch.stack(losses)

        stays, switches = train(TORCH, TORCH), train(TORCH, backend)
        torch.testing.assert_close(stays[100:105], switches[100:105], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(stays[-20:].mean(), switches[-20:].mean(), rtol=0.05, atol=0)
