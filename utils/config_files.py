"""Reading config files: .py, .yml, .yaml, and what they start from. Values are not checked here."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from utils.config_schema import Config
from utils.errors import ConfigError

Mapping = list[tuple[Any, int]]  # the keys that one mapping of a file has, with their lines


@dataclass
class RawConfig:
    """Unchecked values, and where each key (`model_params.depth` too) was written."""

    values: dict[str, Any]
    sources: dict[str, str]


def read_config_file(path: Path, *, chain: tuple[Path, ...] = ()) -> RawConfig:
    """The mapping that a file defines, laid over that of its `_base_`; `chain` led to this file.
    Raises a ConfigError if the file or its base is missing, or defines no such mapping."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file{_similar_file(path)}")
    if path.resolve() in chain:
        raise ConfigError(f"{path}: `_base_` refers back to itself")
    if path.suffix not in READERS:
        raise ConfigError(f"{path}: config files end in .py, .yml or .yaml")
    values, mappings = READERS[path.suffix](path)
    sources = {key: f"{path}:{line}" for key, line in _lines_of(mappings, path).items()}
    for key in values:
        if not isinstance(key, str):
            raise ConfigError(f"{path}: {key!r} is not a config key; keys are words")
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
    old, new = base.values.get("model_params"), top.values.get("model_params")
    if not same_model:
        base.values.pop("model_params", None)
    base.values.update(top.values)
    base.sources.update(top.sources)
    if same_model and isinstance(old, dict) and isinstance(new, dict):
        base.values["model_params"] = {**old, **new}


def _lines_of(mappings: Iterable[Mapping], path: Path) -> dict[str, int]:
    """The line of each key: the one in the first of the mappings that have it. Raises a ConfigError
    if a mapping gives a key twice."""
    lines: dict[str, int] = {}
    for keys in mappings:
        for number, (key, line) in enumerate(keys):
            if any(key == earlier for earlier, _ in keys[:number]):
                raise ConfigError(f"{path}:{line}: {key!r} is given twice")
            lines.setdefault(str(key), line)
    return lines


def _read_python(path: Path) -> tuple[dict[str, Any], list[Mapping]]:
    """Run the file in a namespace of its own and take its `config`."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        code = compile(tree, str(path), "exec")
    except SyntaxError as error:
        line = f":{error.lineno}" if error.lineno else ""
        raise ConfigError(f"{path}{line}: not valid Python: {error.msg}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as Python: {error}") from error
    mappings = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            mappings.append([(k.value, k.lineno) for k in node.keys if isinstance(k, ast.Constant)])
        elif isinstance(node, ast.Call):
            mappings.append([(k.arg, k.value.lineno) for k in node.keywords if k.arg])
    namespace: dict[str, Any] = {"__file__": str(path), "__name__": "config_file"}
    try:
        exec(code, namespace)
    except Exception as error:
        raise ConfigError(f"{path}: running it failed: {type(error).__name__}: {error}") from error
    config = namespace.get("config")
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: must define `config = dict(...)`")
    return dict(config), mappings


class _YamlLoader(yaml.SafeLoader):
    """PyYAML's loader, which also notes the keys of every mapping, from the outermost inwards."""

    def __init__(self, source: str) -> None:
        super().__init__(source)
        self.mappings: list[Mapping] = []

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        self.mappings.insert(0, [(key.value, key.start_mark.line + 1) for key, _ in node.value])
        return node


def _read_yaml(path: Path) -> tuple[dict[str, Any], list[Mapping]]:
    try:
        loader = _YamlLoader(path.read_text(encoding="utf-8"))
        values = loader.get_single_data()
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:  # ValueError: bad dates
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping of config keys to values")
    return values, loader.mappings


READERS = {".py": _read_python, ".yml": _read_yaml, ".yaml": _read_yaml}


def _similar_file(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("configs")
    names = sorted(p.name for p in folder.glob("*") if p.suffix in READERS)
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"; did you mean {folder / near[0]}?"
    return f"; {folder} has {', '.join(names)}" if names else ""
