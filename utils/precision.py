"""Which number format a run computes in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from utils.errors import ConfigError

# Their `allow_tf32`, not the newer `fp32_precision`: who sets that can read no older flag any more,
# and Inductor, `torch.backends.cudnn.flags` and others do.
TF32_FLAGS = (torch.backends.cuda.matmul, torch.backends.cudnn)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(name: str, device: torch.device) -> str:
    """`fp32`, `bf16` or `fp16` for a `precision` of the config.

    `auto` is bf16 on CUDA GPUs with bf16 units, else fp32 (on most CPUs bf16 is emulated and two
    to three times slower). fp16 on a CPU is a ConfigError.
    """
    if name == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if native else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise ConfigError("precision='fp16' needs a GPU; on a CPU use fp32 or auto")
    return name


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """A context whose forward passes compute in `precision`, which `resolve_precision` gave."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


@contextlib.contextmanager
def sampling_autocast(
    precision: str, device: torch.device, *models: torch.nn.Module
) -> Iterator[None]:
    """`autocast` without gradients, for many passes of frozen `models`: what it casts of their
    weights it keeps until the end, as by itself it does only of weights that are trained."""
    if precision == "fp32" and device.type != "cuda":
        with torch.inference_mode():  # where CUDA graphs may not begin (pytorch#135892)
            yield
        return
    frozen = [p for model in models for p in model.parameters() if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with torch.no_grad(), autocast(precision, device):  # nothing is kept in inference mode
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def allow_tf32() -> None:
    """Let NVIDIA GPUs multiply float32 in TF32 from now on: 10-bit mantissas, but much faster."""
    for backend in TF32_FLAGS:
        backend.allow_tf32 = True


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """A context without autocast and TF32: both move a FID by more than a better model does."""
    before = [backend.allow_tf32 for backend in TF32_FLAGS]
    for backend in TF32_FLAGS:
        backend.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, value in zip(TF32_FLAGS, before, strict=True):
            backend.allow_tf32 = value
