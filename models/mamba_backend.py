"""Who computes Mamba's recurrence: a kernel of mamba-ssm, ours, or PyTorch. All the same function.

mamba-ssm is optional and breaks in many ways (wheels for another torch, a build without its CUDA
extension), and Triton may be absent, so what counts is not a version but whether the one function
needed computes what PyTorch does: it is tried once before a model relies on it.
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
SOURCES = {"mamba1": ("mamba_ssm", "triton"), "mamba2": ("mamba_ssm",)}  # the best first
# mixer: the module and the name of mamba-ssm's function
KERNELS = {
    "mamba1": ("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"),
    "mamba2": ("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"),
}
KERNEL_CHUNK = 256  # the chunk length mamba-ssm's Triton kernels are tuned for
TOLERANCES = {torch.float32: 1e-2, torch.bfloat16: 3e-2}  # relative, of a result's norm

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
    backend = Backend("torch", f"kernels need a CUDA GPU, this is {device.type}")
    if not sources:
        backend = Backend("torch", f"its kernel is not for mixer='{mixer}'")
    elif device.type in KERNEL_DEVICES:
        reasons = []
        while sources and backend.kernel is None:
            backend = _probe(sources.pop(0), mixer, device, d_state)
            reasons.append(backend.reason)
        backend = replace(backend, reason="; ".join(reasons))
    if requested != "auto" and backend.kernel is None:
        hint = f"; {INSTALL_HINT}" if backend.slow and requested == "mamba_ssm" else ""
        raise ConfigError(
            f"model_params.mamba_backend='{requested}': {backend.reason}; use "
            f"mamba_backend='auto', the same function{hint}"
        )
    return backend


@functools.cache
def _probe(source: str, mixer: str, device: torch.device, d_state: int) -> Backend:
    """The source's kernel, or PyTorch where that does not work."""
    try:
        name, kernel = _load(source, mixer)
        for dtype, tolerance in TOLERANCES.items():
            _try_out(mixer, kernel, _probe_inputs(mixer, d_state, device, dtype), tolerance)
    except Exception as error:  # a broken extension raises anything: ImportError, OSError, ...
        fault = f"{type(error).__name__}: {one_line(error)}"
        return Backend("torch", f"{source.replace('_', '-')} is unusable: {fault}", slow=True)
    return Backend(name, "its kernels work here", kernel)


def _load(source: str, mixer: str) -> tuple[str, Kernel]:
    """The name of a kernel, and the kernel, called as PyTorch's function for the mixer is."""
    if source == "triton":
        from models import triton_scan

        return f"triton {triton_scan.triton.__version__}", triton_scan.gated_scan
    module_name, name = KERNELS[mixer]
    module = importlib.import_module(module_name)
    if mixer == "mamba1" and getattr(module, "selective_scan_cuda", None) is None:
        raise RuntimeError("it was built without its CUDA extension selective_scan_cuda")
    version = "of unknown version"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("mamba_ssm")
    call = _call_mamba1 if mixer == "mamba1" else _call_mamba2
    # One clean graph break, whatever is inside.
    kernel = torch.compiler.disable(getattr(module, name))
    return f"mamba_ssm {version} {name}", functools.partial(call, kernel)


def _call_mamba1(kernel: Kernel, u, dt, A, B, C, D, z, bias) -> Tensor:
    u, dt, B, C = (tensor.to(z.dtype).transpose(1, 2) for tensor in (u, dt, B, C))
    options = dict(z=z.transpose(1, 2), delta_bias=bias, delta_softplus=True)
    return kernel(u, dt, A, B, C, D, **options).transpose(1, 2)


def _call_mamba2(kernel: Kernel, u, dt, A, B, C, D, bias) -> Tensor:
    u, B, C = (tensor.to(dt.dtype) for tensor in (u, B, C))
    options = dict(D=D, dt_bias=bias, dt_softplus=True)
    return kernel(u, dt, A, B, C, chunk_size=KERNEL_CHUNK, **options)


def _probe_inputs(
    mixer: str, d_state: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Inputs by name for which the recurrence is most of the result: steps from 0.1 to 1, decays as
    at initialisation and slower, every other D zero; in `dtype` what autocast turns to it."""
    width, channels, group = (64, (), ()) if mixer == "mamba1" else (4, (64,), (1,))
    shapes = dict.fromkeys(("dt", "A", "B", "C", "D", "z", "bias"), (width,))
    shapes = dict(u=(width, *channels)) | shapes | dict.fromkeys("BC", (*group, d_state))
    weights, generator = ("A", "D", "bias"), torch.Generator("cpu").manual_seed(0)
    tokens = (2, 300)  # (B, L): longer than any chunk of Mamba-2
    if mixer == "mamba2":
        del shapes["z"]
    with torch.device("cpu"):
        x = {
            name: torch.randn((*(() if name in weights else tokens), *shape), generator=generator)
            for name, shape in shapes.items()
        }
        steps = 0.1 + 0.9 * x["dt"].sigmoid()
        x["dt"] = steps + (-torch.expm1(-steps)).log() - x["bias"]
        x["D"][::2] = 0
        x["A"] = -torch.logspace(-1, 1, width)
        if mixer == "mamba1":
            x["A"] = x["A"].outer(torch.arange(1.0, d_state + 1))
    return {k: v.to(device, torch.float32 if k in weights else dtype) for k, v in x.items()}


def _try_out(mixer: str, kernel: Kernel, inputs: dict[str, Tensor], tolerance: float) -> None:
    """Compare the kernel's output and the gradients by all its inputs, of y^2, with PyTorch's (by a
    random sum they would cancel). Raises a RuntimeError with the first that differs."""
    results = []
    for function in (gated_scan if mixer == "mamba1" else heads_scan, kernel):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs.values()]
        with torch.enable_grad():
            y = function(*leaves)
            results.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    names = ["y", *(f"the gradient of {name}" for name in inputs)]
    for name, ours, theirs in zip(names, *results, strict=True):
        ours, theirs = ours.detach().float(), theirs.detach().float()
        error = float((theirs - ours).norm() / ours.norm())
        if not error <= tolerance:  # NaN too
            raise RuntimeError(f"its results differ from PyTorch's by {error:.1e} in {name}")
