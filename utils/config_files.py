"""Reading config files: .py, .yml, .yaml, and what they start from. Values are not checked here."""

from __future__ import annotations

import ast
import difflib
import os
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal

from utils.cli import PLAIN_NUMBER, plain_name
from utils.config_schema import Config, PathText
from utils.errors import ConfigError, one_line, told_as
from utils.files import expand_home

MAX_BYTES, MAX_VALUES = 2**20, 10_000  # of a config file
# Numbers that look like plain decimals to some readers, and to others do not: 0123, 0x10, 1_0.
ODD_NUMBER = re.compile(r"(?<![\w.])(?<![eE][-+])0[0-9xXoObB_]|[0-9]_[0-9]")

TOO_MANY = f"more than {MAX_VALUES:,} values, counting what aliases repeat"
NUMBER_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp", "value")}

# Where parts of one's own are looked for, too: beside the config files that were read.
FOLDERS: dict[str, None] = {}

Mapping = list[tuple[Any, int]]  # the keys that one mapping of a file has, with their lines


@dataclass
class RawConfig:
    """Unchecked values, and where each key (`model_params.depth` too) was written."""

    values: dict[str, Any]
    sources: dict[str, str]


def read_config_file(path: Path, *, chain: tuple[Path, ...] = ()) -> RawConfig:
    """The mapping that a file defines, laid over that of its `_base_`; `chain` led to this file.
    Raises a ConfigError if the file or its base is missing, or defines no such mapping."""
    if not os.path.isfile(path):  # which raises nothing, whatever the path is
        there = "not a regular file" if os.path.exists(path) else ""
        raise ConfigError(f"{path}: {there or 'no such config file' + _similar_file(path)}")
    if path.resolve() in chain:
        raise ConfigError(f"{path}: `_base_` refers back to itself")
    if path.suffix not in READERS:
        raise ConfigError(f"{path}: config files end in .py, .yml or .yaml")
    FOLDERS[str(path.parent.resolve())] = None
    values, mappings = READERS[path.suffix](path, _source(path))
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
    base = read_config_file(path.parent / expand_home(base_name), chain=(*chain, path.resolve()))
    merge(base, own)
    return base


def merge(base: RawConfig, top: RawConfig) -> None:
    """Lay `top` over `base` in place; `model_params` merge key by key for an unchanged model."""
    old_model = base.values.get("model_type", Config.model_fields["model_type"].default)
    same_model = plain_name(top.values.get("model_type", old_model)) == plain_name(old_model)
    old, new = base.values.get("model_params"), top.values.get("model_params")
    if not same_model:
        base.values.pop("model_params", None)
    base.values.update(top.values)
    base.sources.update(top.sources)
    if same_model and isinstance(old, dict) and isinstance(new, dict):
        base.values["model_params"] = {**old, **new}


def parse_value(text: str, field: str | None = None) -> Any:
    """The value that a text on the command line means for a field.

    Fields of text take it as it is; for others it is a Python literal if it can be one. `1,2,4` is
    a tuple, `fid,is` a tuple of words. `none` and `null` are None, unless the field takes text but
    not None (`threshold=none`). Numbers are plain decimals: 0x10 and 1_0 stay text.
    """
    annotation = Config.model_fields[field].annotation if field in Config.model_fields else None
    is_union = typing.get_origin(annotation) in (typing.Union, UnionType, Literal)
    kinds = typing.get_args(annotation) if is_union else (annotation,)
    is_text = any(kind in (str, PathText) or isinstance(kind, str) for kind in kinds)
    if text.lower() in ("none", "null") and (NoneType in kinds or not is_text):
        return None
    if is_text:
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        if not ODD_NUMBER.search(text):
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    words = [word.strip() for word in text.split(",")]
    return tuple(words) if len(words) > 1 else text


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


def _source(path: Path) -> str:
    """The text of a config file, with or without a byte order mark. Raises a ConfigError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: a config file has at most {MAX_BYTES:,} bytes")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text; save it anew, as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error


def _read_python(path: Path, source: str) -> tuple[dict[str, Any], list[Mapping]]:
    """Run the file in a namespace of its own and take its `config`."""
    try:
        tree = ast.parse(source, filename=str(path))
        code = compile(tree, str(path), "exec")
    except SyntaxError as error:
        line = f":{error.lineno}" if error.lineno else ""
        raise ConfigError(f"{path}{line}: not valid Python: {error.msg}") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{path}: cannot be read as Python: {one_line(error)}") from error
    mappings = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            mappings.append([(k.value, k.lineno) for k in node.keys if isinstance(k, ast.Constant)])
        elif isinstance(node, ast.Call):
            mappings.append([(k.arg, k.value.lineno) for k in node.keywords if k.arg])
    namespace: dict[str, Any] = {"__file__": str(path), "__name__": "config_file"}
    try:
        exec(code, namespace)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigError(f"{path}: running it failed: {reason}") from error
    config = namespace.get("config")
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: must define `config = dict(...)`")
    return dict(config), mappings


def _parse_yaml(source: str) -> tuple[Any, list[Any]]:
    """What a file says, and its nodes, from the outermost inwards, each as often as aliases repeat
    it. Raises a YAMLError for too many, and for numbers that are no plain decimals."""
    import yaml

    class Loader(yaml.SafeLoader):
        num_values = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.num_values += 1
            if self.num_values > MAX_VALUES:
                raise yaml.YAMLError(TOO_MANY)
            return super().compose_node(parent, index)

    nodes = [yaml.compose(source, Loader)]
    for node in nodes:
        if isinstance(node, yaml.CollectionNode):
            for part in node.value:
                nodes += part if isinstance(part, tuple) else [part]
        elif node and node.tag in NUMBER_TAGS and not PLAIN_NUMBER.fullmatch(node.value):
            place = f"line {node.start_mark.line + 1}: {node.value}"
            advice = "write a plain decimal number, or put it in quotes if it is text"
            raise yaml.YAMLError(f"{place} means different things to different readers; {advice}")
        if len(nodes) > MAX_VALUES:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {TOO_MANY}")
    return yaml.safe_load(source), nodes


def _read_yaml(path: Path, source: str) -> tuple[dict[str, Any], list[Mapping]]:
    with told_as(ConfigError, f"{path}: not valid YAML"):  # whatever odd tags' constructors raise
        values, nodes = _parse_yaml(source)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping of config keys to values")
    for mapping in (values, values.get("model_params")):
        for key, text in mapping.items() if isinstance(mapping, dict) else ():
            if isinstance(text, str):  # `16,16`, `(16, 16)` and 1e-4 are no YAML, but meant
                mapping[key] = parse_value(text, key)
                if mapping[key] is None:
                    raise ConfigError(f"{path}: {key}: {text}: write null, as YAML calls it")
    keys = [node.value for node in nodes if node and node.id == "mapping"]
    return values, [[(key.value, key.start_mark.line + 1) for key, _ in pairs] for pairs in keys]


READERS = {".py": _read_python, ".yml": _read_yaml, ".yaml": _read_yaml}


def _similar_file(path: Path) -> str:
    folder = path.parent if os.path.isdir(path.parent) else Path("configs")
    names = sorted(p.name for p in folder.glob("*") if p.suffix in READERS)
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"; did you mean {folder / near[0]}?"
    return f"; {folder} has {', '.join(names)}" if names else ""
