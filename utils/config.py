"""The configuration: one frozen schema, read from .py or .yml files and the command line.

`load_config` collects every fault it can find and raises one `ConfigError` with a line for each,
naming where the value was written. Nothing is created or read besides the config files.
"""

from __future__ import annotations

import ast
import difflib
import json
import math
import os
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from utils.errors import ConfigError

# pydantic's own lax mode takes True for 1, "no" for False and 1 for True. Here a bool is never a
# number, and a number is never a bool; "2e-4" is a float because PyYAML reads it as a string.


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError("a number is needed") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a finite number is needed")
    return value


def _integer(value: Any) -> Any:
    value = _number(value)
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError("a whole number is needed")
        return int(value)
    return value


def _flag(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError("only True or False is allowed")
    return value


def _sequence(value: Any) -> Any:
    return (
        (value,) if isinstance(value, int | float | str) and not isinstance(value, bool) else value
    )


Int = Annotated[int, BeforeValidator(_integer)]
Float = Annotated[float, BeforeValidator(_number)]
Bool = Annotated[bool, BeforeValidator(_flag)]
PositiveInt = Annotated[Int, Field(ge=1)]
NonNegativeInt = Annotated[Int, Field(ge=0)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Probability = Annotated[Float, Field(ge=0, le=1)]
BelowOne = Annotated[Float, Field(ge=0, lt=1)]


def _image_size(value: Any) -> Any:
    if isinstance(value, list | tuple):
        if len(value) != 2:
            raise ValueError("one side or (height, width) is needed")
        return tuple(_integer(side) for side in value)
    side = _integer(value)
    return (side, side)


ImageSize = Annotated[tuple[PositiveInt, PositiveInt], BeforeValidator(_image_size)]


class Config(BaseModel):
    """Every setting of a run. The field descriptions are the reference in docs/configs.md."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    # --- run
    project_name: str = Field("diffusion", description="SwanLab project")
    experiment_name: str = Field(
        "", description="names the run's folder; default: the config file's name"
    )
    resume_path: str | None = Field(
        None,
        description="checkpoint to go on from, or `auto`: the run's newest one if there is any",
    )
    seed: NonNegativeInt = Field(42, description="fixes weights, data order, noise and samples")
    gpu_ids: Annotated[tuple[NonNegativeInt, ...], BeforeValidator(_sequence)] | None = Field(
        None, description="CUDA device of each process on this node; default: all in order"
    )
    port: Annotated[Int, Field(ge=1, le=65535)] | None = Field(
        None, description="rendezvous port, where the launcher sets no MASTER_PORT"
    )

    # --- model
    model_type: str = Field("unet", description="backbone, see the table of backbones")
    model_params: dict[str, Any] = Field(
        default_factory=dict, description="arguments of the backbone, checked against its signature"
    )

    # --- data
    dataset: str = Field("digits", description="see the table of data sets")
    data_root: str = Field("./data", description="folder that holds the data")
    image_size: ImageSize | None = Field(
        None, description="side, or (height, width), in pixels; default: the data set's own"
    )
    image_channels: Annotated[Literal[1, 3], BeforeValidator(_integer)] | None = Field(
        None, description="1 grey or 3 RGB; default: the data set's own (`custom`: 3)"
    )
    conditional: Bool = Field(False, description="condition on the class label")
    num_classes: NonNegativeInt | None = Field(
        None, description="checked against the data set; default: what the data set has"
    )
    use_subdirs: Bool = Field(
        True, description="`custom`: one folder per class; False: flat folder"
    )
    label_file: str | None = Field(
        None, description='`custom`, flat: JSON file `{"img1.jpg": 0}`; without it unlabelled'
    )
    horizontal_flip: Bool | None = Field(
        None, description="random mirroring; default: on, except for digits and shapes"
    )
    num_workers: NonNegativeInt = Field(
        4, description="loader processes of data not held in memory, at most one per core"
    )
    resident: Bool | None = Field(
        None, description="hold all images in device memory as uint8; default: if below 1 GiB"
    )

    # --- diffusion
    num_timesteps: Annotated[Int, Field(ge=2)] = Field(1000, description="T of training")
    beta_start: Annotated[Float, Field(gt=0, lt=1)] = Field(1e-4, description="first beta")
    beta_end: Annotated[Float, Field(gt=0, lt=1)] = Field(0.02, description="last beta")
    beta_schedule: str = Field("linear", description="linear, cosine or quadratic")
    prediction_type: Literal["eps", "x_0", "v"] = Field(
        "eps", description="what the model predicts"
    )
    loss_type: Literal["l1", "l2", "huber"] = Field("l2", description="distance to the target")
    loss_weighting: Literal["uniform", "min_snr"] = Field("uniform", description="weight over t")
    min_snr_gamma: PositiveFloat = Field(5.0, description="cap of the min-SNR weighting")
    cfg_dropout_prob: Probability | None = Field(
        None, description="share of labels dropped in training; default: 0.1 if conditional, else 0"
    )

    # --- sampling
    cfg_scale: NonNegativeFloat | None = Field(
        None,
        description="guidance u + s (c - u): 0 unconditional, 1 conditional, above 1 guided; "
        "default: 2 if conditional, else 1",
    )
    cfg_interval: tuple[Probability, Probability] | None = Field(
        None, description="guide only while t / T lies in (low, high); outside it is conditional"
    )
    sampling_method: str = Field("ddim", description="ddpm, ddim or dpmpp_2m")
    num_inference_steps: PositiveInt | None = Field(
        None, description="sampling steps; default: ddpm T, ddim 50, dpmpp_2m 20"
    )
    ddim_eta: Probability = Field(0.0, description="noise of DDIM: 0 none, 1 as DDPM")
    timestep_spacing: Literal["trailing", "leading", "linspace"] = Field(
        "trailing", description="how sampling steps spread over T"
    )
    threshold: Literal["static", "dynamic", "none"] = Field(
        "static", description="bounds predicted x_0: clamp, 99.5 % quantile, or not at all"
    )

    # --- training
    epochs: PositiveInt = Field(100, description="passes over the data")
    max_steps: PositiveInt | None = Field(
        None, description="stop after so many optimizer steps, if sooner than `epochs`"
    )
    batch_size: PositiveInt = Field(
        128, description="images per optimizer step, over all processes and micro-batches"
    )
    gradient_accumulation_steps: PositiveInt = Field(
        1,
        description="micro-batches a batch is cut into: less memory, the same result up to "
        "rounding and dropout masks",
    )
    optimizer: Literal["adam", "adamw"] = Field("adamw", description="fused where possible")
    learning_rate: PositiveFloat = Field(2e-4, description="peak learning rate")
    weight_decay: NonNegativeFloat = Field(0.0, description="decay of the optimizer")
    grad_clip: PositiveFloat | None = Field(
        1.0, description="largest gradient norm; None: no limit"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 on GPUs that have it, else fp32"
    )
    compile: Bool = Field(False, description="torch.compile the backbone")
    use_ema: Bool = Field(True, description="keep an exponential moving average of the weights")
    ema_decay: BelowOne = Field(0.9999, description="its decay, after a warm-up")
    use_scheduler: Bool = Field(False, description="change the learning rate during training")
    scheduler_type: Literal["cosine", "linear", "step", "warmup_cosine"] = Field(
        "cosine", description="how; stepped per optimizer step"
    )
    warmup_epochs: NonNegativeFloat = Field(5, description="`warmup_cosine`: epochs of warm-up")
    warmup_start_factor: Annotated[Float, Field(gt=0, le=1)] = Field(
        0.01, description="`warmup_cosine`: share of the learning rate to start from"
    )
    step_size: PositiveInt = Field(30, description="`step`: epochs between two drops")
    gamma: Annotated[Float, Field(gt=0, le=1)] = Field(0.1, description="`step`: factor of a drop")

    # --- files
    save_dir: str = Field("checkpoints", description="the run's folder is made in here")
    save_interval: PositiveInt = Field(10, description="epochs between two checkpoints")
    keep_last: PositiveInt = Field(3, description="`model_epoch_*.pth` files kept")
    sample_dir: str | None = Field(
        None,
        description="previews go to its folder of this experiment; default: the run's `samples/`",
    )
    sample_interval: PositiveInt = Field(10, description="epochs between two previews")
    sample_start_epoch: PositiveInt = Field(1, description="epoch of the first preview")
    num_samples: PositiveInt = Field(64, description="images of a preview, or of sample.py")

    # --- evaluation
    eval_metrics: Annotated[tuple[str, ...], BeforeValidator(_sequence)] = Field(
        ("fid", "is", "lpips", "class_acc"), description="what evaluate.py computes"
    )
    eval_num_samples: PositiveInt = Field(50_000, description="images evaluate.py draws")

    # --- tracking
    log_interval: PositiveInt = Field(50, description="optimizer steps between two log lines")
    use_swanlab: Bool = Field(False, description="log to SwanLab as well as to metrics.jsonl")
    swanlab_mode: Literal["auto", "cloud", "local", "offline", "disabled"] = Field(
        "auto", description="auto: cloud with a key, else offline"
    )

    @property
    def run_dir(self) -> Path:
        return Path(self.save_dir) / self.experiment_name

    @property
    def preview_dir(self) -> Path:
        if self.sample_dir is None:
            return self.run_dir / "samples"
        return Path(self.sample_dir) / self.experiment_name

    @property
    def label_dropout(self) -> float:
        """`cfg_dropout_prob` with its default filled in."""
        if self.cfg_dropout_prob is not None:
            return self.cfg_dropout_prob
        return 0.1 if self.conditional else 0.0

    @property
    def guidance_scale(self) -> float:
        """`cfg_scale` with its default filled in."""
        if self.cfg_scale is not None:
            return self.cfg_scale
        return 2.0 if self.conditional and self.label_dropout > 0 else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as stored in checkpoints and config.json."""
        return self.model_dump(mode="json")


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


@dataclass
class RawConfig:
    """Unchecked values, and where each key (`model_params.depth` too) was written."""

    values: dict[str, Any]
    sources: dict[str, str]


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


def read_config_file(path: Path, *, chain: tuple[Path, ...] = ()) -> RawConfig:
    """The mapping a file defines, laid over that of its `_base_`."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file{_similar_file(path)}")
    if path.resolve() in chain:
        raise ConfigError(f"{path}: `_base_` refers back to itself")
    if path.suffix == ".py":
        values, lines = _read_python(path)
    elif path.suffix in (".yml", ".yaml"):
        values, lines = _read_yaml(path)
    else:
        raise ConfigError(f"{path}: config files end in .py, .yml or .yaml")
    for key in values:
        if not isinstance(key, str):
            raise ConfigError(f"{path}: {key!r} is not a config key; keys are words")
    sources = {key: f"{path}:{line}" for key, line in lines.items()}
    own = RawConfig(values, sources)
    base_name = own.values.pop("_base_", None)
    if base_name is None:
        return own
    if not isinstance(base_name, str):
        raise ConfigError(f"{sources.get('_base_', path)}: _base_={base_name!r}: give a file name")
    base = read_config_file(path.parent / base_name, chain=(*chain, path.resolve()))
    _merge(base, own)
    return base


def _merge(base: RawConfig, top: RawConfig) -> None:
    """Lay `top` over `base` in place; `model_params` merge key by key for an unchanged model."""
    old_model = base.values.get("model_type", Config.model_fields["model_type"].default)
    same_model = top.values.get("model_type", old_model) == old_model
    for key, value in top.values.items():
        old = base.values.get(key)
        if (
            key == "model_params"
            and same_model
            and isinstance(old, dict)
            and isinstance(value, dict)
        ):
            value = {**old, **value}
        base.values[key] = value
    if not same_model and "model_params" not in top.values:
        base.values.pop("model_params", None)
    base.sources.update(top.sources)


def _read_python(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Run the file in a namespace of its own and take its `config`."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source, filename=str(path))
        code = compile(tree, str(path), "exec")
    except SyntaxError as error:
        line = f":{error.lineno}" if error.lineno else ""
        raise ConfigError(f"{path}{line}: not valid Python: {error.msg}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as Python: {error}") from error
    lines: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            names = [(k.value, k.lineno) for k in node.keys if isinstance(k, ast.Constant)]
            for name, line in names:
                if [n for n, _ in names].count(name) > 1:
                    raise ConfigError(f"{path}:{line}: {name!r} is given twice")
                lines.setdefault(str(name), line)
        elif isinstance(node, ast.keyword) and node.arg is not None:
            lines.setdefault(node.arg, node.value.lineno)
    namespace: dict[str, Any] = {"__file__": str(path), "__name__": "config_file"}
    try:
        exec(code, namespace)
    except Exception as error:
        raise ConfigError(f"{path}: running it failed: {type(error).__name__}: {error}") from error
    config = namespace.get("config")
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: must define `config = dict(...)`")
    return dict(config), lines


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Load a YAML mapping; unlike PyYAML alone, refuse a key given twice."""
    try:
        source = path.read_text(encoding="utf-8")
        root = yaml.compose(source, Loader=yaml.SafeLoader)
        values = yaml.safe_load(source)
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:  # ValueError: bad dates
        problem = " ".join(str(error).split())
        raise ConfigError(f"{path}: not valid YAML: {problem}") from error
    if not isinstance(root, yaml.MappingNode) or not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping of config keys to values")
    lines: dict[str, int] = {}
    mappings, visited = [root], {id(root)}  # an alias leads to the same node again
    while mappings:
        seen: set[str] = set()
        for key, value in mappings.pop().value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise ConfigError(f"{path}:{line}: {key.value!r} is given twice")
            seen.add(key.value)
            lines.setdefault(key.value, line)
            if isinstance(value, yaml.MappingNode) and id(value) not in visited:
                visited.add(id(value))
                mappings.append(value)
    return values, lines


def _similar_file(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("configs")
    if not folder.is_dir():
        return ""
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".py", ".yml", ".yaml"))
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"; did you mean {folder / near[0]}?"
    return f"; {folder} has {', '.join(names)}" if names else ""


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
            _merge(raw, top)
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
    for key in ("resume_path", "data_root", "label_file", "save_dir", "sample_dir"):
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
        "ema_decay": (not config.use_ema, "use_ema=True"),
        "min_snr_gamma": (config.loss_weighting != "min_snr", "loss_weighting='min_snr'"),
        "ddim_eta": (config.sampling_method != "ddim", "sampling_method='ddim'"),
        "beta_start": (config.beta_schedule == "cosine", "another beta_schedule than 'cosine'"),
        "beta_end": (config.beta_schedule == "cosine", "another beta_schedule than 'cosine'"),
        "cfg_interval": (config.guidance_scale in (0, 1), "cfg_scale above 1"),
        "use_subdirs": (config.dataset != "custom", "dataset='custom'"),
        "swanlab_mode": (not config.use_swanlab, "use_swanlab=True"),
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
