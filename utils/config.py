"""The configuration of a run: read from files and the command line, checked, and frozen.

`load_config` collects every fault it can find and raises one `ConfigError` with a line for each,
naming where the value was written. Nothing is created or read besides the config files.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from utils.config_files import FOLDERS, RawConfig, merge, parse_value, read_config_file
from utils.config_schema import Config
from utils.config_types import (  # noqa: F401 -- for the arguments of backbones
    BelowOne,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
)
from utils.errors import ConfigError, one_line
from utils.files import is_file_name


class Problem(NamedTuple):
    """A fault that involves `keys`; reported at the place where the first of them was written."""

    keys: tuple[str, ...]
    message: str


Check = Callable[[Config], Iterable[Problem]]

PART = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

NEEDED = {  # by pydantic's name of the fault
    "string_type": "text is needed; put it in quotes",
    "bool_type": "only True or False is allowed",
    "finite_number": "a finite number is needed",
}

# What the schema says of each key, see `key` there.
RULES = {name: field.json_schema_extra or {} for name, field in Config.model_fields.items()}
ALIASES = {alias: name for name, rules in RULES.items() for alias in rules.get("also", ())}


class Parts(dict[str, Any]):
    """A table of parts by name, which also holds those of other packages: `package.module:name`.

    Such a part is imported when it is first asked for: of an installed package, or of a module
    beside a config file that was read. A ConfigError says what is wrong with it, or which names
    there are. It is not listed among them.

    Args:
        rows: the parts of this project, or their places, as "models.dim:DiM", imported likewise.
        accept: takes the object of that name and gives the row of the table. Raises a ValueError
            that says what it has to be.
    """

    def __init__(self, rows: Mapping[str, Any], accept: Callable[[Any], Any]) -> None:
        super().__init__(rows)
        self._accept = accept

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or bool(PART.fullmatch(str(name)))

    def __getitem__(self, name: str) -> Any:
        row = super().__getitem__(name)
        return self[row] if isinstance(row, str) else row

    def __missing__(self, name: str) -> Any:
        if not PART.fullmatch(name):
            hint = did_you_mean(name.lower(), self)
            raise ConfigError(f"{name!r}: use {', '.join(self)}{hint}")
        try:
            return self._accept(_imported(*name.split(":")))
        except Exception as error:  # of a stranger's module
            raise ConfigError(f"{name}: {one_line(error)}") from error

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except ConfigError:
            return default

    def ordered(self, names: Iterable[str]) -> list[str]:
        """These names in the order of the table, those of other packages at the end."""
        names, own = list(names), list(self)
        return [n for n in own if n in names] + [n for n in names if n not in own]


@functools.cache
def _imported(module: str, attribute: str) -> Any:
    """The object, see `Parts`. Raises a ValueError if there is no such module or object."""
    sys.path.extend(FOLDERS)
    try:
        part = importlib.import_module(module)
    except ModuleNotFoundError as error:
        where = "install its package, or give --config with a file beside it"
        raise ValueError(f"no module {error.name!r} here; {where}") from error
    finally:
        del sys.path[len(sys.path) - len(FOLDERS) :]
    if not hasattr(part, attribute):
        names = [name for name in vars(part) if not name.startswith("_")]
        raise ValueError(f"{part.__file__} has no {attribute}{did_you_mean(attribute, names)}")
    return getattr(part, attribute)


def kind_of(kind: type, where: str, *, is_class: bool = False) -> Callable[[Any], Any]:
    """What a table accepts, see `Parts`: objects of this kind, or classes derived from it."""

    def accept(part: Any) -> Any:
        is_right = issubclass if is_class and isinstance(part, type) else isinstance
        if isinstance(part, type) != is_class or not is_right(part, kind):
            expected = "class derived from " * is_class + kind.__name__
            raise ValueError(f"must be a {expected}, see {where} in docs/extending.md")
        return part

    return accept


def function_of(*parameters: str) -> Callable[[Any], Any]:
    """What a table accepts, see `Parts`: plain functions of so many arguments."""

    def accept(part: Any) -> Any:
        known = inspect.signature(part).parameters if inspect.isfunction(part) else ()
        if len(known) != len(parameters):
            raise ValueError(f"must be a function ({', '.join(parameters)})")
        return part

    return accept


def unknown_name(
    key: str, name: str, table: Mapping[str, Any], aliases: Mapping[str, str] = {}
) -> Iterator[Problem]:
    """The fault of a name that a table does not have, or of a part that cannot be imported."""
    try:
        if name in table and table[name] is not None:
            return
        hint = did_you_mean(name.lower(), table, aliases)
        yield Problem((key,), f"{key}={name!r}: use {', '.join(table)}{hint}")
    except ConfigError as error:
        yield Problem((key,), f"{key}={error}")


def keys_by_resume(*kinds: str) -> tuple[str, ...]:
    """The keys whose `resume` in the schema is one of `kinds`."""
    return tuple(name for name, rules in RULES.items() if rules.get("resume") in kinds)


def did_you_mean(word: str, allowed: Iterable[str], aliases: Mapping[str, str] = {}) -> str:
    """The end of a message, "; did you mean 'x'?", or "" if no allowed word is near."""
    near = [aliases[word]] if word in aliases else difflib.get_close_matches(word, allowed, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def load_config(
    path: str | Path, overrides: Iterable[str] = (), *, checks: Iterable[Check] = ()
) -> Config:
    """Read a config file, lay `key=value` overrides over it and check it, as `validate` does."""
    raw = read_config_file(Path(path))
    raw.values.setdefault("experiment_name", Path(path).stem)
    return validate(raw, checks=checks, problems=apply_overrides(raw, overrides))


def apply_overrides(raw: RawConfig, overrides: Iterable[str]) -> list[str]:
    """Write `key=value` strings into `raw`; later ones win. Returns a message for each bad one."""
    problems = []
    # A changed model_type drops the model_params of the file, but not those given beside it.
    for override in sorted(overrides, key=lambda text: not text.startswith("model_type=")):
        key, equals, text = override.partition("=")
        field, dot, param = key.partition(".")
        source = f"command line ({_short(override)})"
        if not equals or not key:
            problems.append(f"command line: {override!r}: write key=value")
        elif not dot:
            merge(raw, RawConfig({field: parse_value(text, field)}, {field: source}))
        elif field != "model_params":
            problems.append(f"{source}: only model_params has inner keys")
        elif isinstance(raw.values.get("model_params") or {}, dict):  # others are faults anyway
            merge(raw, RawConfig({"model_params": {param: parse_value(text)}}, {param: source}))
    return problems


def validate(
    raw: RawConfig, *, checks: Iterable[Check] = (), problems: Iterable[str] = ()
) -> Config:
    """Turn raw values into a Config. `checks` look at all values that are valid on their own.
    Faults, `problems` and others, become one ConfigError with a line for each."""
    faults: list[Problem] = []
    bad_keys: set[str] = set()
    try:
        config = Config.model_validate(raw.values)
    except ValidationError as error:
        told = [(str(fault["loc"][0]), fault) for fault in error.errors()]
        faults = [Problem((k,), _describe(k, raw.values.get(k), fault)) for k, fault in told]
        bad_keys = {key for key, _ in told}
        good_values = {k: v for k, v in raw.values.items() if str(k) not in bad_keys}
        config = Config.model_validate(good_values)
    for check in (check_values, *checks):
        faults += [problem for problem in check(config) if bad_keys.isdisjoint(problem.keys)]
    messages = list(problems)
    for keys, message in faults:
        places = [raw.sources[key] for key in keys if key in raw.sources]
        messages.append(": ".join([*places[:1], message]))
    if messages:
        raise ConfigError("\n       ".join(dict.fromkeys(messages)))
    return config


def _describe(key: str, value: Any, fault: Mapping[str, Any]) -> str:
    if fault["type"] in ("extra_forbidden", "invalid_key"):
        hint = did_you_mean(key, Config.model_fields, ALIASES)
        return f"{key!r} is not a config key{hint or '; docs/configs.md lists them all'}"
    message = NEEDED.get(fault["type"], fault["msg"].removeprefix("Value error, "))
    if fault["type"] == "literal_error":
        message = f"use {fault['ctx']['expected']}"
        if isinstance(value, str):
            message += did_you_mean(value, fault["ctx"]["expected"].replace("'", "").split())
    return f"{key}={_short(repr(value))}: {message[0].lower()}{message[1:]}"


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def check_values(config: Config) -> Iterable[Problem]:
    """What no type in the schema can see, above all the combinations of several keys."""
    if not is_file_name(config.experiment_name):
        message = f"experiment_name={config.experiment_name!r}: must be usable as a folder name"
        yield Problem(("experiment_name",), message)
    if config.beta_start >= config.beta_end and config.beta_schedule != "cosine":
        message = f"beta_start={config.beta_start} must be below beta_end={config.beta_end}"
        yield Problem(("beta_start", "beta_end"), message)
    steps = config.num_inference_steps
    if steps is not None and (message := steps_problem(config, steps)):
        yield Problem(("num_inference_steps", "num_timesteps"), message)
    if config.init_from is not None and config.resume_path not in (None, "auto"):
        message = "init_from starts a fresh run and resume_path goes on with one; give one of them"
        yield Problem(("init_from", "resume_path"), message)
    if config.lora_rank and config.init_from is None:
        message = f"lora_rank={config.lora_rank} trains adapters of a trained model; set init_from"
        yield Problem(("lora_rank", "init_from"), f"{message} to its checkpoint")
    if config.cfg_interval is not None and config.cfg_interval[0] >= config.cfg_interval[1]:
        message = f"cfg_interval={config.cfg_interval}: low must be below high"
        yield Problem(("cfg_interval",), message)
    if message := guidance_problem(config, config.guidance_scale):
        yield Problem(("cfg_scale", "cfg_dropout_prob"), message)
    if config.condition and config.condition_scale != 1 and config.condition_dropout_prob == 0:
        message = f"condition_scale={config.condition_scale:g} needs training with dropped ones, "
        message += "condition_dropout_prob above 0; without them, use 1"
        yield Problem(("condition_scale", "condition_dropout_prob"), message)
    if config.conditional and config.num_classes == 0:
        message = "conditional=True needs classes, but num_classes=0"
        yield Problem(("num_classes", "conditional"), message)


def guidance_problem(config: Config, scale: float) -> str | None:
    """Why a model of this config cannot be sampled with this `cfg_scale`; None if it can.

    All scales but 1 need a model that was trained both with labels and without them.
    """
    if scale == 1 or config.label_dropout > 0:
        return None
    lacking = "cfg_dropout_prob above 0" if config.conditional else "conditional=True"
    without = "dropped labels" if config.conditional else "class labels"
    return f"cfg_scale={scale:g} needs training with {lacking}; without {without}, use 1"


def condition_channels(config: Config, channels: int) -> int:
    """How many channels a network for images of `channels` is given beside them, see `condition`:
    of a picture with a hole, one more says where it is."""
    if config.condition == "folder":
        return len(config.condition_colors or ()) or config.condition_channels or 3
    counts = {None: 0, "downsample": channels, "grey": 1, "mask": channels + 1, "edges": 1}
    return counts[config.condition]


def steps_problem(config: Config, steps: int) -> str | None:
    """Why sampling cannot take this number of steps; None if it can."""
    if 1 <= steps <= config.num_timesteps:
        return None
    return f"num_inference_steps={steps}: must lie in 1..{config.num_timesteps} (num_timesteps)"


def warnings_of(config: Config) -> list[str]:
    """A line for each setting that is allowed but probably not meant."""
    warnings = []
    if 1 < config.sample_start_epoch >= config.epochs and config.max_steps is None:
        given = f"sample_start_epoch={config.sample_start_epoch} with epochs={config.epochs}"
        warnings.append(f"{given}: there will be at most one preview")
    for key, rules in RULES.items():
        words, holds = rules.get("needs") or ("", None)
        given = key in config.model_fields_set and getattr(config, key) is not None
        if holds and given and not holds(config):
            warnings.append(f"{key} has no effect without {words}")
    return warnings


def format_config(config: Config) -> str:
    """The resolved config as JSON text (`--print_config`)."""
    return json.dumps(config.to_dict(), indent=2, ensure_ascii=False)
