"""Reading config files: .py, .yml, .yaml, and what they start from. Values are not checked here."""

from __future__ import annotations

import ast
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from utils.config_schema import Config
from utils.errors import ConfigError


@dataclass
class RawConfig:
    """Unchecked values, and where each key (`model_params.depth` too) was written."""

    values: dict[str, Any]
    sources: dict[str, str]


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
    merge(base, own)
    return base


def merge(base: RawConfig, top: RawConfig) -> None:
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
