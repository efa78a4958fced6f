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

import yaml

from utils.config_schema import PLAIN_NUMBER, Config
from utils.errors import ConfigError, one_line
from utils.files import expand_home

MAX_BYTES, MAX_NODES = 2**20, 10_000  # of a config file
# Numbers that look like plain decimals to some readers, and to others do not: 0123, 0x10, 1_000.
ODD_NUMBER = re.compile(r"(?<![\w.])(?<![eE][-+])0[0-9xXoObB_]|[0-9]_[0-9]")

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
        if os.path.exists(path):
            raise ConfigError(f"{path}: not a regular file")
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
    try:
        base_path = path.parent / expand_home(base_name)
    except ValueError as error:
        raise ConfigError(f"{sources['_base_']}: _base_={base_name!r}: {error}") from error
    base = read_config_file(base_path, chain=(*chain, path.resolve()))
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


def parse_value(text: str, field: str | None = None) -> Any:
    """The value that a text on the command line means for a field.

    Fields of text take it as it is; for others it is a Python literal if it can be one. `1,2,4` is
    a tuple, `fid,is` a tuple of words. `none` and `null` are None, unless the field takes text but
    not None (`threshold=none`). Numbers are plain decimals: 0x10 and 1_000 stay text.
    """
    annotation = Config.model_fields[field].annotation if field in Config.model_fields else None
    is_union = typing.get_origin(annotation) in (typing.Union, UnionType, Literal)
    kinds = typing.get_args(annotation) if is_union else (annotation,)
    is_text = any(kind is str or isinstance(kind, str) for kind in kinds)
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
        content = path.read_bytes()
        if b"\0" in content:  # as in UTF-16, which Windows calls Unicode
            raise UnicodeDecodeError("utf-8", content, content.index(b"\0"), 0, "null byte")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        fault = f"not UTF-8 text ({error.reason})"
        raise ConfigError(f"{path}:{line}: {fault}; save it anew, as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error


def _read_python(path: Path) -> tuple[dict[str, Any], list[Mapping]]:
    """Run the file in a namespace of its own and take its `config`."""
    source = _source(path)
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


class _YamlLoader(yaml.SafeLoader):
    """PyYAML's loader. It also notes the keys of every mapping, from the outermost inwards, counts
    what aliases multiply, and refuses values that YAML 1.1 reads as others than they look."""

    def __init__(self, source: str, path: Path) -> None:
        super().__init__(source)
        self.path, self.mappings = path, []
        self.num_nodes, self.sizes = 0, {}  # with aliases written out; by the node they stand for

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        before, is_alias = self.num_nodes, self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        size = self.sizes.get(id(node)) if is_alias else self.num_nodes - before + 1
        if size is None or before + size > MAX_NODES:
            cause = "an alias of itself" if size is None else f"more than {MAX_NODES:,} values"
            raise self.fault(node, f"{cause}; a config has no use for that")
        self.sizes[id(node)], self.num_nodes = size, before + size
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        self.mappings.insert(0, [(key.value, key.start_mark.line + 1) for key, _ in node.value])
        return node

    def construct_number(self, node: yaml.Node) -> int | float:
        text = self.construct_scalar(node)
        if not PLAIN_NUMBER.fullmatch(text):
            advice = "write a plain decimal number, or put it in quotes if it is text"
            raise self.fault(node, f"{text}: YAML may read this as another number; {advice}")
        return int(text) if text.lstrip("+-").isdigit() else float(text)

    def construct_date(self, node: yaml.Node) -> Any:
        raise self.fault(node, f"{node.value}: YAML reads this as a date; put it in quotes")

    def fault(self, node: yaml.Node, message: str) -> ConfigError:
        return ConfigError(f"{self.path}:{node.start_mark.line + 1}: {message}")


for name in ("int", "float"):
    _YamlLoader.add_constructor(f"tag:yaml.org,2002:{name}", _YamlLoader.construct_number)
_YamlLoader.add_constructor("tag:yaml.org,2002:timestamp", _YamlLoader.construct_date)


def _read_yaml(path: Path) -> tuple[dict[str, Any], list[Mapping]]:
    source = _source(path)
    try:
        loader = _YamlLoader(source, path)
        values = loader.get_single_data()
    except RecursionError:
        raise ConfigError(f"{path}: not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not valid YAML: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping of config keys to values")
    params = values.get("model_params")
    for mapping, is_inner in ((values, False), (params if isinstance(params, dict) else {}, True)):
        for key, text in mapping.items():
            if isinstance(text, str):  # `16,16`, `(16, 16)` and 1e-4 are no YAML, but meant
                mapping[key] = parse_value(text, None if is_inner else key)
                if mapping[key] is None:
                    raise ConfigError(f"{path}: {key}: {text}: write null, as YAML calls it")
    return values, loader.mappings


READERS = {".py": _read_python, ".yml": _read_yaml, ".yaml": _read_yaml}


def _similar_file(path: Path) -> str:
    folder = path.parent if os.path.isdir(path.parent) else Path("configs")
    names = sorted(p.name for p in folder.glob("*") if p.suffix in READERS)
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"; did you mean {folder / near[0]}?"
    return f"; {folder} has {', '.join(names)}" if names else ""
