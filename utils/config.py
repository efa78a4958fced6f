"""The configuration of a run: read from files and the command line, checked, and frozen.

`load_config` collects every fault it can find and raises one `ConfigError` with a line for each,
naming where the value was written. Nothing is created or read besides the config files.
"""

from __future__ import annotations

import ast
import difflib
import json
import os
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from utils.config_files import RawConfig, merge, read_config_file
from utils.config_schema import BelowOne, Config, NonNegativeFloat, PositiveFloat, PositiveInt
from utils.errors import ConfigError

__all__ = [
    "BelowOne",
    "Check",
    "Config",
    "NonNegativeFloat",
    "PositiveFloat",
    "PositiveInt",
    "Problem",
    "RawConfig",
    "apply_overrides",
    "did_you_mean",
    "format_config",
    "load_config",
    "read_config_file",
    "reference_table",
    "validate",
    "warnings_of",
]

MAX_NAME_BYTES = 200  # file systems take 255


class Problem(NamedTuple):
    """A fault that involves `keys`; reported at the place where the first of them was written."""

    keys: tuple[str, ...]
    message: str


Check = Callable[[Config], Iterable[Problem]]

# Names that other projects use; for hints only, never accepted.
ALIASES = {
    "lr": "learning_rate",
    "bs": "batch_size",
    "wd": "weight_decay",
    "ema": "use_ema",
    "cfg": "cfg_scale",
    "guidance_scale": "cfg_scale",
    "w": "cfg_scale",
    "label_dropout": "cfg_dropout_prob",
    "timesteps": "num_timesteps",
    "T": "num_timesteps",
    "steps": "num_inference_steps",
    "sampler": "sampling_method",
    "sample_steps": "num_inference_steps",
    "eta": "ddim_eta",
    "model": "model_type",
    "backbone": "model_type",
    "data": "dataset",
    "data_dir": "data_root",
    "data_path": "data_root",
    "img_size": "image_size",
    "resolution": "image_size",
    "num_epochs": "epochs",
    "n_epochs": "epochs",
    "resume": "resume_path",
    "output_dir": "save_dir",
    "name": "experiment_name",
    "accum": "gradient_accumulation_steps",
    "amp": "precision",
    "objective": "prediction_type",
    "schedule": "beta_schedule",
    "workers": "num_workers",
    "device": "gpu_ids",
}


def did_you_mean(word: str, allowed: Iterable[str], aliases: Mapping[str, str] = {}) -> str:
    """`"; did you mean 'x'?"`, or nothing if no allowed word is near."""
    if word in aliases:
        return f"; did you mean {aliases[word]!r}?"
    near = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def load_config(
    path: str | Path, overrides: Iterable[str] = (), *, checks: Iterable[Check] = ()
) -> Config:
    """Read `path`, apply `key=value` overrides, validate.

    Raises:
        ConfigError: with one line per fault.
    """
    raw = read_config_file(Path(path))
    raw.values.setdefault("experiment_name", Path(path).stem)
    problems = apply_overrides(raw, overrides)
    return validate(raw, checks=checks, problems=problems)


def apply_overrides(raw: RawConfig, overrides: Iterable[str]) -> list[str]:
    """Write `key=value` strings into `raw`; later ones win. Returns what could not be read."""
    problems = []
    # A changed model_type drops the model_params of the file, but not those given beside it.
    for override in sorted(overrides, key=lambda text: not text.startswith("model_type=")):
        key, equals, text = override.partition("=")
        if not equals or not key:
            problems.append(f"command line: {override!r}: write key=value")
            continue
        field, _, param = key.partition(".")
        source = f"command line ({_short(override)})"
        if param:
            if field != "model_params":
                problems.append(f"{source}: only model_params has inner keys")
                continue
            params = raw.values.get("model_params") or {}
            if isinstance(params, dict):  # anything else is reported as such
                raw.values["model_params"] = {**params, param: parse_value(text)}
                raw.sources[param] = source
        else:
            top = RawConfig({field: parse_value(text, field)}, {field: source})
            merge(raw, top)
    return problems


def parse_value(text: str, field: str | None = None) -> Any:
    """A command-line value: text fields stay raw, others as Python literals, else text.

    `1,2,4` is a tuple, `fid,is` a tuple of words, `none` and `null` are None unless the field takes
    text but not None (`threshold=none`).
    """
    kinds = _kinds(field)
    is_text = any(kind is str or isinstance(kind, str) for kind in kinds)
    if text.lower() in ("none", "null") and (NoneType in kinds or not is_text):
        return None
    if is_text:
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        words = [word.strip() for word in text.split(",")]
        return tuple(words) if len(words) > 1 else text


def _kinds(field: str | None) -> tuple[Any, ...]:
    """The types a field takes, and the words of a Literal."""
    if field not in Config.model_fields:
        return ()
    annotation = Config.model_fields[field].annotation
    if typing.get_origin(annotation) in (typing.Union, UnionType, Literal):
        return typing.get_args(annotation)
    return (annotation,)


def validate(
    raw: RawConfig, *, checks: Iterable[Check] = (), problems: Iterable[str] = ()
) -> Config:
    """Turn raw values into a Config.

    Raises:
        ConfigError: all faults of the values, and those that `checks` find among the valid ones.
    """
    messages = list(problems)
    values = dict(raw.values)
    bad_keys: set[str] = set()

    def where(key: str) -> str:
        return f"{raw.sources[key]}: " if key in raw.sources else ""

    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        for fault in error.errors():
            key = str(fault["loc"][0])
            bad_keys.add(key)
            messages.append(where(key) + _describe(key, values.get(key), fault))
        remaining = {k: v for k, v in values.items() if isinstance(k, str) and k not in bad_keys}
        config = Config.model_validate(remaining)
    for check in (check_values, *checks):
        for keys, message in check(config):
            if not bad_keys.intersection(keys):
                messages.append(
                    where(next((k for k in keys if k in raw.sources), keys[0])) + message
                )
    if messages:
        raise ConfigError("\n       ".join(dict.fromkeys(messages)))
    return config


def _describe(key: str, value: Any, fault: Mapping[str, Any]) -> str:
    if fault["type"] in ("extra_forbidden", "invalid_key"):
        hint = did_you_mean(key, Config.model_fields, ALIASES)
        return f"{key!r} is not a config key{hint or '; docs/configs.md lists them all'}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "literal_error":
        message = f"use {fault['ctx']['expected']}"
        if isinstance(value, str):
            message += did_you_mean(value, fault["ctx"]["expected"].replace("'", "").split())
    return f"{key}={_short(repr(value))}: {message[0].lower()}{message[1:]}"


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def check_values(config: Config) -> Iterable[Problem]:
    """Combinations that no single field can see."""
    name = config.experiment_name
    if (
        name in ("", ".", "..")
        or any(c in name for c in "/\\")
        or not name.isprintable()
        or len(os.fsencode(name)) > MAX_NAME_BYTES
    ):
        yield Problem(
            ("experiment_name",), f"experiment_name={name!r}: must be usable as a folder name"
        )
    for key in ("resume_path", "init_from", "data_root", "label_file", "save_dir", "sample_dir"):
        if getattr(config, key) == "":
            yield Problem((key,), f"{key}='': give a path, or leave it out")
    if config.beta_start >= config.beta_end and config.beta_schedule != "cosine":
        yield Problem(
            ("beta_start", "beta_end"),
            f"beta_start={config.beta_start} must be below beta_end={config.beta_end}",
        )
    steps = config.num_inference_steps
    if steps is not None and steps > config.num_timesteps:
        yield Problem(
            ("num_inference_steps", "num_timesteps"),
            f"num_inference_steps={steps} exceeds num_timesteps={config.num_timesteps}",
        )
    if config.init_from is not None and config.resume_path not in (None, "auto"):
        yield Problem(
            ("init_from", "resume_path"),
            f"init_from={config.init_from!r} starts a fresh run, but "
            f"resume_path={config.resume_path!r} goes on with one; give one of them",
        )
    if config.lora_rank and config.init_from is None:
        yield Problem(
            ("lora_rank", "init_from"),
            f"lora_rank={config.lora_rank} trains adapters of a trained model; set init_from to "
            "its checkpoint",
        )
    if config.cfg_interval is not None and config.cfg_interval[0] >= config.cfg_interval[1]:
        yield Problem(
            ("cfg_interval",), f"cfg_interval={config.cfg_interval}: low must be below high"
        )
    yield from _check_conditioning(config)


def _check_conditioning(config: Config) -> Iterable[Problem]:
    if not config.conditional:
        if config.cfg_scale not in (None, 1.0):
            yield Problem(
                ("cfg_scale", "conditional"),
                f"cfg_scale={config.cfg_scale} needs conditional=True (or leave cfg_scale out)",
            )
        if config.cfg_dropout_prob:
            yield Problem(
                ("cfg_dropout_prob", "conditional"),
                f"cfg_dropout_prob={config.cfg_dropout_prob} drops labels, "
                "but conditional=False uses none; set conditional=True or leave it out",
            )
        if config.cfg_interval is not None:
            yield Problem(("cfg_interval", "conditional"), "cfg_interval needs conditional=True")
    elif config.cfg_dropout_prob == 0 and config.cfg_scale not in (None, 1.0):
        yield Problem(
            ("cfg_scale", "cfg_dropout_prob"),
            f"cfg_scale={config.cfg_scale} needs the unconditional prediction, which "
            "cfg_dropout_prob=0 never trains; use cfg_dropout_prob=0.1 or cfg_scale=1",
        )
    if config.num_classes == 0 and config.conditional:
        yield Problem(
            ("num_classes", "conditional"), "conditional=True needs classes, but num_classes=0"
        )


def warnings_of(config: Config) -> list[str]:
    """What is allowed but probably not meant."""
    found = []
    given = config.model_fields_set
    if 1 < config.sample_start_epoch >= config.epochs and config.max_steps is None:
        found.append(
            f"sample_start_epoch={config.sample_start_epoch} with epochs={config.epochs}: "
            "there will be at most one preview"
        )
    scheduler = config.scheduler_type if config.use_scheduler else None
    without_effect = {
        "scheduler_type": (not config.use_scheduler, "use_scheduler=True"),
        "warmup_epochs": (scheduler != "warmup_cosine", "scheduler_type='warmup_cosine'"),
        "warmup_start_factor": (scheduler != "warmup_cosine", "scheduler_type='warmup_cosine'"),
        "step_size": (scheduler != "step", "scheduler_type='step'"),
        "gamma": (scheduler != "step", "scheduler_type='step'"),
        "lora_alpha": (config.lora_rank == 0, "lora_rank above 0"),
        "ema_decay": (not config.use_ema, "use_ema=True"),
        "min_snr_gamma": (config.loss_weighting != "min_snr", "loss_weighting='min_snr'"),
        "ddim_eta": (config.sampling_method != "ddim", "sampling_method='ddim'"),
        "beta_start": (config.beta_schedule == "cosine", "another beta_schedule than 'cosine'"),
        "beta_end": (config.beta_schedule == "cosine", "another beta_schedule than 'cosine'"),
        "cfg_interval": (config.guidance_scale in (0, 1), "cfg_scale above 1"),
        "use_subdirs": (config.dataset != "custom", "dataset='custom'"),
        "swanlab_mode": (not config.use_swanlab, "use_swanlab=True"),
        "max_nonfinite_steps": (config.on_nonfinite == "stop", "on_nonfinite='skip'"),
    }
    for key, (unused, needed) in without_effect.items():
        if unused and key in given:
            found.append(f"{key} has no effect without {needed}")
    return found


def format_config(config: Config) -> str:
    """The resolved config as JSON text (`--print_config`)."""
    return json.dumps(config.to_dict(), indent=2, ensure_ascii=False)


def reference_table() -> str:
    """The table of docs/configs.md, which a test compares with this."""
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for name, field in Config.model_fields.items():
        default = {} if field.default_factory else field.default
        rows.append(f"| `{name}` | `{default!r}` | {field.description} |")
    return "\n".join(rows)
