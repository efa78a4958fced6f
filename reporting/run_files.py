"""What the folder of a run, finished or not, tells about it. Whatever is missing or torn is not
there; nothing is written."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from training.run_dir import STATUS, is_trained
from utils.errors import ConfigError

METRICS, CONFIG = "metrics.jsonl", "config.json"
WRITTEN = (STATUS, METRICS, "log.txt", "*.pth")  # by training, and by it alone
TAIL_BYTES = 65_536  # of metrics.jsonl hold the last loss
PREVIEW = re.compile(r"epoch_(\d+)\.png")

Series = dict[str, list[tuple[float, float]]]


class RunFacts(NamedTuple):
    """A line of `python runs.py`; None is what nobody has written down."""

    name: str
    folder: str
    status: str  # a state of status.json, `killed`, or `unknown`
    epoch: float | None  # done so far
    step: int | None
    total_steps: int | None
    best: float | None
    best_metric: str | None
    loss: float | None  # of the newest row that has one
    size: int  # bytes on disk
    changed: str  # UTC


def epoch_text(facts: RunFacts) -> str:
    return "" if facts.epoch is None else f"{facts.epoch:.1f}"


def step_text(facts: RunFacts) -> str:
    """`450/676`, as far as it is known."""
    if facts.step is None:
        return ""
    return str(facts.step) if facts.total_steps is None else f"{facts.step}/{facts.total_steps}"


def size_text(size: int) -> str:
    """Bytes, for people: `14.3 MiB`."""
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.3g} {units[0]}"


def time_text(changed: str) -> str:
    """An ISO time in UTC as local time, to the minute."""
    return f"{datetime.fromisoformat(changed).astimezone():%Y-%m-%d %H:%M}"


def find_runs(folders: Iterable[str | Path]) -> list[Path]:
    """The runs among `folders`, and those directly inside the others, in order of their names.

    Raises:
        ConfigError: one is no folder.
    """
    found: list[Path] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder; name a run, or a folder that holds runs")
        found += [folder] if is_run(folder) else sorted(filter(is_run, folder.iterdir()))
    return list(dict.fromkeys(found))


def is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (STATUS, METRICS))


def names_of(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, or their whole paths where two share a name."""
    names = [folder.resolve().name for folder in folders]
    return [
        name if names.count(name) == 1 else str(folder)
        for name, folder in zip(names, folders, strict=True)
    ]


def facts_of(folder: Path, name: str) -> RunFacts:
    """From status.json and the end of metrics.jsonl, whichever is further."""
    status = read_json(folder / STATUS)
    state = str(status.get("state", "unknown"))
    if state == "running" and not is_trained(folder, status):
        state = "killed"
    rows = [row for row in map(parse_row, _tail(folder / METRICS)) if row is not None]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    steps, epochs = (
        _numbers([status.get(key), *(row.get(key) for row in rows[-1:])])
        for key in ("step", "epoch")
    )
    total = _numbers([status.get("total_steps")])
    best = status["best"] if isinstance(status.get("best"), dict) else {}
    score = _numbers([best.get("value")])
    times = [path.stat().st_mtime for pattern in WRITTEN for path in folder.glob(pattern)]
    return RunFacts(
        name=name,
        folder=str(folder),
        status=state,
        epoch=max(epochs, default=None),
        step=int(max(steps)) if steps else None,
        total_steps=int(total[0]) if total else None,
        best=score[0] if score else None,
        best_metric=str(best.get("metric")) if score else None,
        loss=losses[-1] if losses else None,
        size=_size(folder),
        changed=datetime.fromtimestamp(max(times), UTC).isoformat(timespec="seconds"),
    )


def _numbers(values: Iterable[Any]) -> list[float]:
    """Those that are finite numbers: the files may be anybody's."""
    numbers = (x for x in values if isinstance(x, int | float) and not isinstance(x, bool))
    return [float(x) for x in numbers if math.isfinite(x)]


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; an empty one if it is missing or torn."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def parse_row(line: str) -> dict[str, float] | None:
    """The finite numbers of a line of metrics.jsonl, `step` among them; None if it is torn."""
    try:
        found = json.loads(line)
        numbers = {key: float(value) for key, value in found.items() if _numbers([value])}
    except (ValueError, AttributeError, OverflowError, RecursionError):
        return None
    return numbers if "step" in numbers else None


def read_series(path: Path) -> tuple[Series, int]:
    """Name -> (step, value) by ascending step, and the number of lines that could not be read.

    A row of training that lacks one of its names has NaN there: its loss was not finite. Where
    steps go back, a run was resumed, and what comes later counts.
    """
    columns: dict[str, dict[float, float]] = {}
    steps: dict[float, None] = {}  # of rows of training
    last, num_torn = -math.inf, 0
    for line in _lines(path):
        row = parse_row(line)
        if row is None:
            num_torn += bool(line.strip())
            continue
        step = row.pop("step")
        if step < last:
            for column in (steps, *columns.values()):
                while column and next(reversed(column)) > step:
                    column.popitem()
        last = step
        if any(map(_is_training, row)):
            steps[step] = None
        for key, value in row.items():
            columns.setdefault(key, {})[step] = value
    series = {
        key: [(step, column.get(step, math.nan)) for step in steps]
        if _is_training(key)
        else list(column.items())
        for key, column in columns.items()
    }
    return series, num_torn


def previews(folder: Path, config: Mapping[str, Any]) -> list[tuple[int, Path]]:
    """(epoch, file) of the pictures that training drew, by ascending epoch."""
    place = folder / "samples"
    if config.get("sample_dir"):
        place = Path(str(config["sample_dir"])) / str(config.get("experiment_name", folder.name))
    paths = place.iterdir() if place.is_dir() else ()
    return sorted((int(m[1]), path) for path in paths if (m := PREVIEW.fullmatch(path.name)))


def _is_training(key: str) -> bool:
    return key.startswith("train/")


def _lines(path: Path) -> Iterable[str]:
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as file:
            yield from file


def _tail(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return file.read().decode("utf-8", errors="replace").splitlines()


def _size(folder: Path) -> int:
    """Bytes of all files below; one with several names (best_model.pth has) counts once."""
    sizes = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                stat = os.lstat(os.path.join(parent, name))
            except FileNotFoundError:  # training has just replaced it
                continue
            sizes[stat.st_dev, stat.st_ino] = stat.st_size
    return sum(sizes.values())
