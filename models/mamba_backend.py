"""Who computes Mamba's recurrence: mamba-ssm's CUDA kernels, or PyTorch. The function is the same.

mamba-ssm is optional and breaks in many ways (wheels for another torch, a build without its CUDA
extension, missing triton), so what counts is not its version but whether the one function needed
runs: it is tried once, forward and backward, before a model relies on it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from models.mamba import KERNEL_DEVICES, MIXERS, TORCH, Backend
from utils.errors import ConfigError, one_line

INSTALL_HINT = "docs/dim.md says how to install it"
# mixer: the module and the name of its function
KERNELS = {
    "mamba1": ("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"),
    "mamba2": ("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"),
}
FP32_TOLERANCE, BF16_TOLERANCE = 1e-2, 5e-2  # relative; the kernels' own tests ask for no more

BackendName = Literal["auto", "torch", "mamba_ssm"]


def choose_backend(
    requested: BackendName, mixer: str, device: torch.device, *, d_state: int
) -> Backend:
    """The backend for a model on `device`. Raises a ConfigError if mamba_ssm was demanded and is
    not usable."""
    if requested == "torch":
        return Backend("torch", "as configured")
    if device.type in KERNEL_DEVICES:
        backend = _probe(mixer, device, d_state)
    else:
        backend = Backend("torch", f"mamba-ssm needs a CUDA GPU, this is {device.type}")
    if requested == "mamba_ssm" and backend.kernel is None:
        ways = [backend.reason, "use mamba_backend='torch', the same function"]
        if backend.slow:
            ways.append(INSTALL_HINT)
            if mixer == "mamba1":
                ways.append("mixer='mamba2', another network, has kernels that need no compiler")
        raise ConfigError(f"model_params.mamba_backend='mamba_ssm': {'; '.join(ways)}")
    return backend


@functools.cache
def _probe(mixer: str, device: torch.device, d_state: int) -> Backend:
    """mamba-ssm's function, or PyTorch where that does not work."""
    module_name, name = KERNELS[mixer]
    try:
        module = importlib.import_module(module_name)
        if mixer == "mamba1" and getattr(module, "selective_scan_cuda", None) is None:
            raise RuntimeError("it was built without its CUDA extension selective_scan_cuda")
        # One clean graph break, whatever is inside.
        kernel = torch.compiler.disable(getattr(module, name))
        for bf16, tolerance in ((False, FP32_TOLERANCE), (True, BF16_TOLERANCE)):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                _try_out(mixer, kernel, device, d_state, tolerance)
    except Exception as error:  # a broken extension raises anything: ImportError, OSError, ...
        reason = f"mamba-ssm is unusable: {type(error).__name__}: {one_line(error)}"
        return Backend("torch", reason, slow=True)
    version = "of unknown version"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("mamba_ssm")
    return Backend(f"mamba_ssm {version} {name}", "its kernels work here", kernel)


def _try_out(
    mixer: str, kernel: Callable[..., Tensor], device: torch.device, d_state: int, tolerance: float
) -> None:
    """Run one small mixer forward and backward, with the kernel and with PyTorch. Raises a
    RuntimeError if the results are not finite or differ."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # draws leave no trace
        module = MIXERS[mixer](64, d_state=d_state)
        x = torch.randn(2, 40, 64)
    module, x = module.to(device), x.to(device)
    results = []
    for backend in (TORCH, Backend("probe", kernel=kernel)):
        module.backend = backend
        with torch.enable_grad():
            y = module(x)
            (grad,) = torch.autograd.grad(y.float().square().sum(), module.in_proj.weight)
        results.append((y.detach().float(), grad))
    for ours, theirs in zip(*results, strict=True):
        error = (theirs - ours).norm() / ours.norm()
        if not error <= tolerance:  # NaN too
            raise RuntimeError(f"its results differ from PyTorch's by {float(error):.1e}")
