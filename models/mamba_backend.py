"""Who computes Mamba's recurrence: a CUDA kernel, mamba-ssm's or our own, or PyTorch. The function
is the same.

Kernels depend on what is installed (mamba-ssm: wheels for another torch, a build without its CUDA
extension; Triton: absent, or unable to compile here), so what counts is not a version but whether
the one function needed computes what PyTorch does: it is tried once, forward and backward, before
a model relies on it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from models.mamba import KERNEL_DEVICES, Backend, gated_scan, heads_scan
from utils.errors import ConfigError, one_line

INSTALL_HINT = "docs/dim.md says how to install it"
KERNEL_CHUNK = 256  # the chunk length mamba-ssm's Triton kernels are tuned for
# The largest error of a kernel in each precision, as a norm relative to that of the result.
TOLERANCES = {torch.float32: 1e-2, torch.bfloat16: 3e-2}
PROBE_BATCH, PROBE_LENGTH = 2, 300  # tokens: more than a chunk of any kernel for Mamba-2
PROBE_WIDTH, PROBE_HEADS = 64, 4

BackendName = Literal["auto", "torch", "triton", "mamba_ssm"]
Kernel = Callable[..., Tensor]


def choose_backend(
    requested: BackendName, mixer: str, device: torch.device, *, d_state: int
) -> Backend:
    """The backend for a model on `device`. Raises a ConfigError if a kernel was demanded and is
    not usable."""
    if requested == "torch":
        return Backend("torch", "as configured")
    sources = [name for name in SOURCES[mixer] if requested in ("auto", name)]
    if not sources:
        backend = Backend("torch", f"its kernel is not for mixer='{mixer}'")
    elif device.type in KERNEL_DEVICES:
        backend = _first_usable(sources, mixer, device, d_state)
    else:
        backend = Backend("torch", f"kernels need a CUDA GPU, this is {device.type}")
    if requested != "auto" and backend.kernel is None:
        ways = [backend.reason, "use mamba_backend='torch', the same function"]
        if backend.slow and requested == "mamba_ssm":
            ways.append(INSTALL_HINT)
            if mixer == "mamba1":
                ways.append("mixer='mamba2', another network, has kernels that need no compiler")
        raise ConfigError(f"model_params.mamba_backend='{requested}': {'; '.join(ways)}")
    return backend


def _first_usable(sources: list[str], mixer: str, device: torch.device, d_state: int) -> Backend:
    """The first source with a kernel that works; the reason says what the ones before it lack."""
    reasons = []
    for source in sources:
        backend = _probe(source, mixer, device, d_state)
        reasons.append(backend.reason)
        if backend.kernel is not None:
            break
    return replace(backend, reason="; ".join(reasons))


@functools.cache
def _probe(source: str, mixer: str, device: torch.device, d_state: int) -> Backend:
    """The source's kernel, or PyTorch where that does not work."""
    try:
        name, kernel = SOURCES[mixer][source]()
        for dtype, tolerance in TOLERANCES.items():
            _try_out(mixer, kernel, _probe_inputs(mixer, device, d_state, dtype), tolerance)
    except Exception as error:  # a broken extension raises anything: ImportError, OSError, ...
        label = source.replace("_", "-")
        reason = f"{label} is unusable: {type(error).__name__}: {one_line(error)}"
        return Backend("torch", reason, slow=True)
    return Backend(name, "its kernels work here", kernel)


def _probe_inputs(
    mixer: str, device: torch.device, d_state: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Inputs by name for which the recurrence is most of the result: steps from 0.1 to 1, decays as
    at initialisation, every other D zero. Those that autocast turns to `dtype` are of it."""
    generator = torch.Generator("cpu").manual_seed(0)
    cpu = dict(generator=generator, device="cpu")
    tokens = (PROBE_BATCH, PROBE_LENGTH)
    if mixer == "mamba1":
        width, sequence, states = PROBE_WIDTH, (*tokens, PROBE_WIDTH), (*tokens, d_state)
        A = -torch.linspace(0.1, 1, width, device="cpu")[:, None] * torch.arange(1, d_state + 1)
    else:
        width, sequence, states = PROBE_HEADS, (*tokens, PROBE_HEADS, 64), (*tokens, 1, d_state)
        A = -torch.logspace(-1, 1.2, width, device="cpu")
    u, z = (torch.randn(sequence, **cpu) for _ in range(2))
    B, C = (torch.randn(states, **cpu) for _ in range(2))
    D, bias = (torch.randn(width, **cpu) for _ in range(2))
    D[::2] = 0
    steps = 0.1 + 0.9 * torch.rand((*tokens, width), **cpu)
    dt = steps + torch.log(-torch.expm1(-steps)) - bias  # before the bias and softplus
    inputs = dict(u=u, dt=dt, A=A, B=B, C=C, D=D)
    inputs |= dict(z=z, bias=bias) if mixer == "mamba1" else dict(bias=bias)
    return {
        name: tensor.to(device, torch.float32 if name in ("A", "D", "bias") else dtype)
        for name, tensor in inputs.items()
    }


def _try_out(mixer: str, kernel: Kernel, inputs: dict[str, Tensor], tolerance: float) -> None:
    """Compare the kernel's output and the gradients of all its inputs with PyTorch's. Raises a
    RuntimeError that names the first which differs.

    The loss is y^2 / 2: gradients of random sums would be small differences of large numbers."""
    results, grad_y = [], None
    for function in (gated_scan if mixer == "mamba1" else heads_scan, kernel):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs.values()]
        with torch.enable_grad():
            y = function(*leaves)
        grad_y = y.detach() if grad_y is None else grad_y
        results.append([y.detach(), *torch.autograd.grad(y, leaves, grad_y.to(y.dtype))])
    names = ["y", *(f"the gradient of {name}" for name in inputs)]
    for name, ours, theirs in zip(names, *results, strict=True):
        error = float((theirs.float() - ours.float()).norm() / ours.float().norm())
        if not error <= tolerance:  # NaN too
            raise RuntimeError(f"its results differ from PyTorch's by {error:.1e} in {name}")


def _ours_in_triton() -> tuple[str, Kernel]:
    import triton

    from models import triton_scan

    return f"triton {triton.__version__}", triton_scan.gated_scan


def _mamba_ssm(module_name: str, name: str, adapt: Callable[..., Tensor]) -> tuple[str, Kernel]:
    """mamba-ssm's function of that name, called as ours is."""
    module = importlib.import_module(module_name)
    if getattr(module, "selective_scan_cuda", module) is None:
        raise RuntimeError("it was built without its CUDA extension selective_scan_cuda")
    version = "of unknown version"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("mamba_ssm")
    # One clean graph break, whatever is inside.
    function = torch.compiler.disable(getattr(module, name))
    return f"mamba_ssm {version} {name}", functools.partial(adapt, function)


def _call_mamba1(function: Kernel, u, dt, A, B, C, D, z, bias) -> Tensor:
    u, dt, B, C = (tensor.to(z.dtype).transpose(1, 2) for tensor in (u, dt, B, C))
    options = dict(z=z.transpose(1, 2), delta_bias=bias, delta_softplus=True)
    return function(u, dt, A, B, C, D, **options).transpose(1, 2)


def _call_mamba2(function: Kernel, u, dt, A, B, C, D, bias) -> Tensor:
    u, B, C = (tensor.to(dt.dtype) for tensor in (u, B, C))
    options = dict(D=D, dt_bias=bias, dt_softplus=True)
    return function(u, dt, A, B, C, chunk_size=KERNEL_CHUNK, **options)


# mixer: who has a kernel for it, the best first, and how to get its name and the function
SOURCES: dict[str, dict[str, Callable[[], tuple[str, Kernel]]]] = {
    "mamba1": {
        "mamba_ssm": functools.partial(
            _mamba_ssm,
            "mamba_ssm.ops.selective_scan_interface",
            "selective_scan_fn",
            _call_mamba1,
        ),
        "triton": _ours_in_triton,
    },
    "mamba2": {
        "mamba_ssm": functools.partial(
            _mamba_ssm,
            "mamba_ssm.ops.triton.ssd_combined",
            "mamba_chunk_scan_combined",
            _call_mamba2,
        ),
    },
}
