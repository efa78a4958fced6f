"""Backbones. Each is (x_t (B,C,H,W), t (B,) int64, y (B,) int64 or None) -> (B,C,H,W)."""

from __future__ import annotations

import inspect
import logging
import math
import typing
from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from models.dim import DiM
from models.dit import DiT
from models.unet import UNet
from utils.config import Config, Problem, did_you_mean
from utils.errors import ConfigError
from utils.images import ImageSpec

log = logging.getLogger("diffusion")

BACKBONES: dict[str, type[nn.Module]] = {"unet": UNet, "dit": DiT, "dim": DiM}

# Arguments that follow from the data. A config may repeat them, but not contradict them.
_SPEC_ARGUMENTS = ("image_size", "img_size", "in_channels", "out_channels", "num_classes")


def build_model(
    config: Config,
    spec: ImageSpec,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> nn.Module:
    """The backbone of `config.model_type` for images of `spec`, on `device`.

    Its initial weights are drawn on the CPU, so they do not depend on the device.

    Raises:
        ConfigError: model_params that do not fit the backbone, the images or the device.
    """
    layout = torch.channels_last if config.channels_last else torch.preserve_format
    model = _construct(config, spec).to(device, memory_format=layout)
    if hasattr(model, "choose_backend"):
        model.choose_backend(device)
    if config.precision == "fp16" and getattr(model, "needs_bf16_range", False):
        log.warning("%s often becomes NaN in fp16; use precision=bf16", config.model_type)
    return model


def backend_of(model: nn.Module) -> tuple[str, str] | None:
    """Who computes a model that leaves the choice, and why; None for other models."""
    backend = getattr(model, "backend", None)
    return None if backend is None else (backend.name, backend.reason)


def computing_params(model_type: str) -> tuple[str, ...]:
    """The arguments of a backbone that say how it is computed, not what."""
    return getattr(BACKBONES[model_type], "computing_params", ())


def compile_model(model: nn.Module, how: Literal["model", "blocks"] | None) -> None:
    """Compile a model in place by torch.compile, as one or each of its blocks for itself."""
    if how is not None and hasattr(torch._functorch.config, "backward_pass_autocast"):
        # As without compile: the backward of what is kept out of autocast stays out of it too.
        torch._functorch.config.backward_pass_autocast = "off"
    if how == "model":
        model.compile()
    elif how == "blocks":
        # blocks of one class share a limit of recompilations, and a UNet's differ in shape
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for blocks in model.children():
            if isinstance(blocks, nn.ModuleList):
                for block in blocks:
                    block.compile(dynamic=False)


def _construct(config: Config, spec: ImageSpec) -> nn.Module:
    backbone = BACKBONES[config.model_type]
    if wrong := next(_check_spec(backbone, config, spec), None):
        raise ConfigError(wrong.message)
    num_classes = spec.num_classes if config.conditional else 0
    known = _spec_arguments(spec, num_classes)
    accepted = inspect.signature(backbone).parameters
    derived = {name: value for name, value in known.items() if name in accepted}
    params = _convert(backbone, config.model_params)
    try:
        return backbone(**{**params, **derived})
    except ValueError as error:
        raise ConfigError(f"model_params of {config.model_type!r}: {error}") from error


def _spec_arguments(spec: ImageSpec, num_classes: int) -> dict[str, Any]:
    size = (spec.height, spec.width)
    values = (size, size, spec.channels, spec.channels, num_classes)
    return dict(zip(_SPEC_ARGUMENTS, values, strict=True))


def check_config(config: Config, spec: ImageSpec | None) -> Iterator[Problem]:
    """The faults of `model_type` and `model_params`, with a spec also those against the images."""
    if config.model_type not in BACKBONES:
        hint = did_you_mean(config.model_type, BACKBONES)
        names = ", ".join(BACKBONES)
        yield Problem(("model_type",), f"model_type={config.model_type!r}: use {names}{hint}")
        return
    backbone = BACKBONES[config.model_type]
    problems = list(_check_params(backbone, config))
    if spec is not None:
        problems += _check_spec(backbone, config, spec)
    yield from problems
    if spec is None or problems:
        return
    try:
        with torch.device("meta"):  # shapes only: costs no memory and no time
            _construct(config, spec)
    except ConfigError as error:
        yield Problem(("model_params", "image_size", "dataset"), str(error))


def _check_params(backbone: type[nn.Module], config: Config) -> Iterator[Problem]:
    accepted = inspect.signature(backbone).parameters
    adapters = _adapters(backbone)
    for name, value in config.model_params.items():
        if name not in accepted:
            hint = did_you_mean(name, accepted) or f"; it takes {', '.join(accepted)}"
            yield Problem(
                (name, "model_params"),
                f"model_params.{name}: {config.model_type!r} takes no such argument{hint}",
            )
        elif name in adapters:
            try:
                _to_type(adapters[name], value)
            except ValueError as reason:
                yield Problem((name, "model_params"), f"model_params.{name}={value!r}: {reason}")


def _check_spec(backbone: type[nn.Module], config: Config, spec: ImageSpec) -> Iterator[Problem]:
    accepted = inspect.signature(backbone).parameters
    for name, expected in _spec_arguments(spec, spec.num_classes).items():
        value = config.model_params.get(name, expected)
        if name in ("image_size", "img_size") and isinstance(value, int):
            value = (value, value)
        value = tuple(value) if isinstance(value, list) else value
        if name in accepted and value not in (expected, None):
            yield Problem(
                (name, "model_params"),
                f"model_params.{name}={value} contradicts the data, which has {expected}; "
                "leave it out of model_params",
            )


def _convert(backbone: type[nn.Module], params: dict[str, Any]) -> dict[str, Any]:
    """The arguments as the types of the signature: lists become tuples, 64.0 becomes 64."""
    adapters = _adapters(backbone)
    return {
        name: _to_type(adapters[name], value) if name in adapters else value
        for name, value in params.items()
        if name not in _SPEC_ARGUMENTS
    }


def _to_type(adapter: TypeAdapter, value: Any) -> Any:
    """The value as the adapter's type, by pydantic's lax rules, but true is no number, 1 is not
    true, and NaN and infinity are no numbers either.

    Raises:
        ValueError: the value does not fit; the message says why.
    """
    try:
        converted = adapter.validate_python(value)
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
    for old, new in zip(_leaves(value), _leaves(converted), strict=False):
        if isinstance(new, bool) and not isinstance(old, bool):
            raise ValueError("only True or False is allowed")
        if isinstance(old, bool) and not isinstance(new, bool):
            raise ValueError("true or false does not fit here")
        if isinstance(new, float) and not math.isfinite(new):
            raise ValueError("a finite number is needed")
    return converted


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _adapters(backbone: type[nn.Module]) -> dict[str, TypeAdapter]:
    hints = typing.get_type_hints(backbone.__init__, include_extras=True)
    return {
        name: TypeAdapter(hint)
        for name, hint in hints.items()
        if name != "return" and name not in _SPEC_ARGUMENTS
    }
