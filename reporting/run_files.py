"""What the folder of a run, finished or not, tells about it.

Nothing is written, and the files may be anybody's: what is missing or torn is not there.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from training.run_dir import STATUS, is_trained
from utils.errors import ConfigError, show

METRICS, CONFIG = "metrics.jsonl", "config.json"
WRITTEN = (STATUS, METRICS, "log.txt", "*.pth")  # the files that training alone writes
MAX_CELL = 100  # characters of a cell
MAX_JSON, MAX_LINE = 2**24, 2**20  # bytes; what is longer was not written by a run
MAX_ROWS = 100_000  # of training that charts are drawn from
LATEST = 253_402_128_000.0  # seconds; the last day that dates can say
TAIL_BYTES = 65_536  # so much of the end of metrics.jsonl holds the last loss
PREVIEW = re.compile(r"epoch_(\d+)\.png")

Series = dict[str, list[tuple[float, float]]]  # name -> (step, value) by ascending step


class RunFacts(NamedTuple):
    """A line of `python runs.py`; None is what nobody has written down."""

    name: str
    folder: str
    status: str  # a state of status.json, `killed`, or `unknown`
    epoch: float | None  # done so far
    step: float | None
    total_steps: float | None
    best: float | None
    best_metric: str | None
    loss: float | None  # of the newest row that has one
    size: int  # bytes on disk
    changed: str  # UTC


def find_runs(folders: Iterable[str | Path]) -> list[Path]:
    """The runs among `folders`, and those directly inside the others, in order of their names.

    Raises a ConfigError if one of `folders` does not exist.
    """
    runs: list[Path] = []
    for folder in map(Path, folders):
        if not os.path.isdir(folder):
            fault = "no such folder; name a run, or a folder that holds runs"
            raise ConfigError(f"{show(folder)}: {fault}")
        try:
            runs += [folder] if is_run(folder) else sorted(filter(is_run, folder.iterdir()))
        except OSError as error:
            raise ConfigError(f"{show(folder)}: cannot be read ({error.strerror})") from error
    return list(dict.fromkeys(runs))


def is_run(folder: Path) -> bool:
    """Tell whether training has written into this folder."""
    return any(os.path.isfile(folder / name) for name in (STATUS, METRICS))


def by_name(folders: Sequence[Path]) -> dict[str, Path]:
    """The folders by their own names, or by their whole paths where two share a name."""
    names = [folder.resolve().name for folder in folders]
    pairs = zip(names, folders, strict=True)
    return {name if names.count(name) == 1 else str(folder): folder for name, folder in pairs}


def facts_of(folder: Path, name: str) -> RunFacts:
    """Read status.json and the end of metrics.jsonl; the further of both tells step and epoch."""
    status = read_json(folder / STATUS)
    rows = list(filter(None, map(parse_row, _text(folder / METRICS, TAIL_BYTES).splitlines())))
    newest = rows[-1] if rows else {}
    state = str(status.get("state", "unknown"))
    if state == "running" and not is_trained(folder, status):
        state = "killed"
    best = status.get("best")
    score = _largest(best.get("value")) if isinstance(best, dict) else None
    written = _stats(path for name in WRITTEN for path in folder.glob(name))
    changed = min(max((stat.st_mtime for stat in written), default=0.0), LATEST)
    return RunFacts(
        name=name,
        folder=str(folder),
        status=state,
        epoch=_largest(status.get("epoch"), newest.get("epoch")),
        step=_largest(status.get("step"), newest.get("step")),
        total_steps=_largest(status.get("total_steps")),
        best=score,
        best_metric=None if score is None else str(best.get("metric")),
        loss=next((row["train/loss"] for row in reversed(rows) if "train/loss" in row), None),
        size=_size(folder),
        changed=datetime.fromtimestamp(changed, UTC).isoformat(timespec="seconds"),
    )


def texts_of(facts: RunFacts) -> dict[str, str]:
    """The facts as people read them, by the heads of their columns; empty where unknown."""
    total = "" if facts.total_steps is None else f"/{facts.total_steps}"
    texts = {
        "name": facts.name,
        "status": facts.status,
        "epoch": "" if facts.epoch is None else f"{facts.epoch:.1f}",
        "step": "" if facts.step is None else f"{facts.step}{total}",
        "best": "" if facts.best is None else f"{facts.best:.4g} {facts.best_metric}",
        "last loss": "" if facts.loss is None else f"{facts.loss:.4f}",
        "size": size_text(facts.size),
        "last change": f"{datetime.fromisoformat(facts.changed).astimezone():%Y-%m-%d %H:%M}",
    }
    return {head: show(text[:MAX_CELL]) for head, text in texts.items()}


def size_text(size: int) -> str:
    """Bytes in the unit that suits them: `14.3 MiB`."""
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.3g} {units[0]}"


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; an empty one if it is missing or torn."""
    return _mapping(_text(path, MAX_JSON))


def read_series(path: Path) -> tuple[Series, int, int]:
    """The values, how many lines could not be read, and n: every n-th row of training is read, the
    first and the last, and all others.

    Where a row of training lacks a name that earlier ones have, its value was not finite: NaN.
    """
    series, num_torn, every = {}, 0, 1
    with contextlib.suppress(OSError), _opened(path) as file:
        num_rows = sum(1 for _ in iter(partial(file.readline, MAX_LINE), b""))
        every = max(1, -(-num_rows // MAX_ROWS))
        file.seek(0)
        for i, line in enumerate(iter(partial(file.readline, MAX_LINE), b""), 1):
            if i % every and 1 < i < num_rows and b'"train/' in line:
                continue
            row = parse_row(line.decode("utf-8", errors="replace"))
            if row is None:
                num_torn += bool(line.strip())
                continue
            step = row.pop("step")
            if any(key.startswith("train/") for key in row):
                row = {key: math.nan for key in series if key.startswith("train/")} | row
            for key, value in row.items():
                series.setdefault(key, []).append((step, value))
    return series, num_torn, every


def parse_row(line: str) -> dict[str, float] | None:
    """The finite numbers of a line of metrics.jsonl, `step` among them; None if it is torn."""
    row = {key: value for key, value in _mapping(line).items() if _largest(value) is not None}
    return row if "step" in row else None


def previews(folder: Path, config: Mapping[str, Any]) -> list[tuple[int, Path]]:
    """(epoch, file) of the pictures that training drew, by ascending epoch."""
    place = folder / "samples"
    if config.get("sample_dir"):
        place = Path(str(config["sample_dir"])) / str(config.get("experiment_name", folder.name))
    paths = []
    with contextlib.suppress(OSError, ValueError):  # the config may be anybody's, too
        paths += filter(os.path.isfile, place.iterdir())
    return sorted((int(m[1]), path) for path in paths if (m := PREVIEW.fullmatch(path.name)))


def _opened(path: Path) -> BinaryIO:
    if not os.path.isfile(path):  # opening a named pipe would wait for ever
        raise FileNotFoundError(path)
    return open(path, "rb")


def _text(path: Path, num_bytes: int) -> str:
    """The end of a file; empty if it cannot be read."""
    with contextlib.suppress(OSError), _opened(path) as file:
        file.seek(max(0, path.stat().st_size - num_bytes))
        return file.read(num_bytes).decode("utf-8", errors="replace")
    return ""


def _mapping(text: str) -> dict[str, Any]:
    """The mapping that JSON text holds; an empty one if it holds none."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(content := json.loads(text), dict):
            return content
    return {}


def _largest(*values: Any) -> float | None:
    """The largest of those values that are finite numbers; None if none is."""
    numbers = [x for x in values if type(x) in (int, float) and abs(x) <= sys.float_info.max]
    return max(numbers, default=None)


def _size(folder: Path) -> int:
    """Bytes of all files below; one with several names (best_model.pth has) counts once."""
    stats = _stats(Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}.values())


def _stats(paths: Iterable[Path]) -> Iterator[os.stat_result]:
    for path in paths:
        with contextlib.suppress(OSError):  # training has just removed or replaced it
            yield path.lstat()
