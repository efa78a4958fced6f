"""Backbones. Each is (x_t (B,C,H,W), t (B,) int64, y (B,) int64 or None) -> (B,C,H,W)."""

from __future__ import annotations

import inspect
import json
import logging
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import nn

from utils.config import (
    Config,
    Parts,
    Problem,
    condition_channels,
    did_you_mean,
    kind_of,
    unknown_name,
)
from utils.config_types import Bool, Float, Int
from utils.errors import ConfigError
from utils.images import ImageSpec

log = logging.getLogger("diffusion")

BACKBONES = Parts(
    {
        "unet": "models.unet:UNet",
        "dit": "models.dit:DiT",
        "jit": "models.jit:JiT",
        "dim": "models.dim:DiM",
    },
    kind_of(nn.Module, "a backbone", is_class=True),
)

# Arguments that follow from the data. A config may repeat them, but not contradict them.
SPEC_ARGUMENTS = ("image_size", "img_size", "in_channels", "out_channels", "num_classes")
# A network's own hints, read as those of the config's schema: 64.0 is an int, True is not.
HINTS = {int: Int, float: Float, bool: Bool}
STRICT = ConfigDict(strict=True, allow_inf_nan=False)


def build_model(
    config: Config,
    spec: ImageSpec,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> nn.Module:
    """The backbone of `config.model_type` for images of `spec`, on `device`.

    Its initial weights are drawn on the CPU, so they do not depend on the device. Raises a
    ConfigError if model_params do not fit the backbone, the images or the device.
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


def usable_mode(
    how: str | None, device: torch.device, obstacles: Mapping[str, bool] = {}
) -> str | None:
    """How to compile on `device`, for `compile_model`: as asked for, but by blocks alone where
    CUDA graphs cannot be, which a line of the log says. `obstacles` are the caller's own: each in
    words, and whether it is there."""
    # with those of ROCm training goes wrong in silence (pytorch#187715)
    is_other = device.type != "cuda" or torch.version.hip is not None
    present = [words for words, there in ({"no NVIDIA GPU": is_other} | obstacles).items() if there]
    if how != "graphs" or not present:
        return how
    log.warning("compile=graphs: computes as compile=blocks, because of: %s", ", ".join(present))
    return "blocks"


def compile_model(model: nn.Module, how: str | None) -> None:
    """Compile a model in place by torch.compile: `model` the whole, `blocks` each of its blocks,
    `graphs` these too, each of them a CUDA graph.

    A replayed graph writes where it wrote before, so what blocks returned in one pass is lost at
    the next one; the model's own output is not.
    """
    from torch._functorch import config as functorch

    if how is not None and hasattr(functorch, "backward_pass_autocast"):
        # As without compile: the backward of what is kept out of autocast stays out of it too.
        functorch.backward_pass_autocast = "off"
    if how == "model":
        model.compile()
    elif how is not None:
        is_graphed = how == "graphs"
        if is_graphed and _begin_pass not in model._forward_pre_hooks.values():  # as in a copy
            model.register_forward_pre_hook(_begin_pass)
            model.register_forward_hook(lambda *given: given[2].clone())  # it may be a block's
        mode = "reduce-overhead" if is_graphed else None
        # blocks of one class share a limit of recompilations, and a UNet's differ in shape, also
        # between training, guided sampling and its last batch
        torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)
        for blocks in model.children():
            if isinstance(blocks, nn.ModuleList):
                for block in blocks:
                    block.compile(dynamic=False, mode=mode)


def _begin_pass(*_: Any) -> None:
    """Tell PyTorch that outputs of blocks may be overwritten from now on. By itself it would take
    each call of a block for a new pass."""
    torch.compiler.cudagraph_mark_step_begin()


def _construct(config: Config, spec: ImageSpec) -> nn.Module:
    backbone = BACKBONES[config.model_type]
    params, problems = _arguments(config, spec)
    if problems:
        raise ConfigError(problems[0].message)
    try:
        return backbone(**params)
    except ValueError as error:
        raise ConfigError(f"model_params of {config.model_type!r}: {error}") from error


def skeleton(config: Config, spec: ImageSpec) -> nn.Module:
    """The model without values, which costs no memory and no time: to compare shapes with."""
    with torch.device("meta"):
        return _construct(config, spec)


def check_config(config: Config, spec: ImageSpec | None) -> Iterator[Problem]:
    """The faults of `model_type` and `model_params`, with a spec also those against the images."""
    if unknown := list(unknown_name("model_type", config.model_type, BACKBONES)):
        yield from unknown
        return
    _, problems = _arguments(config, spec)
    yield from problems
    if spec is None or problems:
        return
    try:
        skeleton(config, spec)
    except ConfigError as error:
        yield Problem(("model_params", "image_size", "dataset"), str(error))


def _arguments(config: Config, spec: ImageSpec | None) -> tuple[dict[str, Any], list[Problem]]:
    """The backbone's arguments, as the types of its signature, and the faults of `model_params`.

    With a spec, those that follow from the data are among the arguments.
    """
    backbone = BACKBONES[config.model_type]
    accepted = inspect.signature(backbone).parameters
    hints = typing.get_type_hints(backbone.__init__, include_extras=True)
    expected: dict[str, Any] = {}
    if spec is not None:
        size, num_channels = (spec.height, spec.width), spec.channels
        expected = dict(image_size=size, img_size=size, num_classes=spec.num_classes)
        given_channels = num_channels + condition_channels(config, num_channels)
        expected |= dict(in_channels=given_channels, out_channels=num_channels)
    params: dict[str, Any] = {}
    faults: dict[str, str] = {}
    for name, value in config.model_params.items():
        if name not in accepted:
            hint = did_you_mean(name, accepted) or f"; it takes {', '.join(accepted)}"
            faults[name] = f": {config.model_type!r} takes no such argument{hint}"
        elif name not in SPEC_ARGUMENTS:
            hint = hints.get(name, Any)
            try:
                adapter = TypeAdapter(HINTS.get(hint, hint), config=STRICT)
                params[name] = adapter.validate_json(json.dumps(value, default=repr))
            except ValidationError as error:
                reason = error.errors()[0]["msg"].removeprefix("Value error, ")
                faults[name] = f"={value!r}: {reason}"
        elif spec is not None and value is not None:
            given = tuple(value) if isinstance(value, list) else value
            if expected[name] not in (given, (given, given)):
                source = f"the data, which has {expected[name]}"
                faults[name] = f"={value} contradicts {source}; leave it out of model_params"
    if not config.conditional:
        expected["num_classes"] = 0
    params |= {name: value for name, value in expected.items() if name in accepted}
    messages = {name: f"model_params.{name}{fault}" for name, fault in faults.items()}
    return params, [Problem((name, "model_params"), text) for name, text in messages.items()]
