"""The report: report.json, report.html beside it, and its summary in text."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from metrics import METRICS
from metrics.base import Entry, Row
from reporting.evaluation import SWEPT, render_html
from reporting.pages import Picture
from utils.errors import ConfigError, one_line, show
from utils.files import write_text

SCHEMA_VERSION, MAX_BYTES = 1, 2**27
LARGEST = 1e300  # no metric has such a value, and a difference of two would be infinite
STATUSES = ("complete", "partial", "empty")  # what a report can be, from best to worst
PACKAGES = ("torch", "torchvision", "torch-fidelity", "lpips", "numpy")
# A difference in these makes two values of a metric incomparable.
SAME = ("n", "n_real", "num_pairs", "subset_size", "extractor", "classifier", "k")
# Keys that other programs read in a report -> the metric and the key of its entry to repeat.
KNOWN_KEYS = {
    "FID": ("fid", "value"),
    "IS_mean": ("is", "value"),
    "IS_std": ("is", "std"),
    "LPIPS_diversity": ("lpips", "value"),
    "class_accuracy": ("class_acc", "value"),
}

Report = dict[str, Any]


def report_path(output: str | None, eval_dir: Path) -> Path:
    """Take `output` if it ends in .json, else report.json in the folder `output` or `eval_dir`."""
    path = eval_dir if output is None else Path(output)
    return path if path.suffix == ".json" else path / "report.json"


def build_report(
    entries: Mapping[str, Entry], *, provenance: Mapping[str, Any], warnings: Sequence[str] = ()
) -> Report:
    """Make the report as plain JSON types, with null and a reason for NaN and infinity.

    Takes the entry of each metric, as `Scoring.score` returns them, and how the images came about.
    """
    ordered = {name: plain(entries[name]) for name in METRICS.ordered(entries)}
    for result in ordered.values():
        if result["value"] is None and result["reason"] is None:
            result["reason"] = "the value is not a finite number"
    report = {key: ordered.get(name, {}).get(part) for key, (name, part) in KNOWN_KEYS.items()}
    report |= {result["name"]: result["value"] for result in ordered.values() if "name" in result}
    there = {result["status"] in ("ok", "unreliable") for result in ordered.values()}
    status = "partial" if len(there) == 2 else "complete" if True in there else "empty"
    return report | {
        "schema_version": SCHEMA_VERSION,
        "status": status,
        "warnings": list(warnings),
        "metrics": ordered,
        "provenance": stamped(provenance),
    }


def plain(value: Any) -> Any:
    """Turn tuples into lists, paths into text, and what JSON cannot say into None."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda name: None)


def save_report(path: Path, report: Report, pictures: Mapping[str, Picture] | None = None) -> None:
    """Write `path`, and the page to read beside it: report.json and report.html."""
    write_text(path, json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(path.with_suffix(".html"), render_html(report, pictures or {}))


def save_sweep(
    path: Path, reports: Sequence[tuple[Any, Path, Report]], facts: Mapping[str, Any]
) -> None:
    """Write one report over several: a row for each, and a summary of repeats.

    Takes (setting, its own report's path, that report) of each, and the provenance they share.
    """
    rows = [
        ({} if setting.ema_width is None else {"ema_width": setting.ema_width})
        | {
            "cfg_scale": setting.sampling.cfg_scale,
            "num_inference_steps": setting.sampling.num_inference_steps,
            "seed": setting.seed,
            "status": report["status"],
            "metrics": columns_of(report["metrics"]),
            "report": single.name,
        }
        for setting, single, report in reports
    ]
    report = {
        "schema_version": SCHEMA_VERSION,
        "status": max((row["status"] for row in rows), key=STATUSES.index),
        "warnings": reports[0][2]["warnings"],
        "metrics": {},
        "sweep": rows,
        "repeats": repeats_of(rows),
        "provenance": stamped(facts),
    }
    save_report(path, report)


def read_report(path: str | Path, option: str = "--compare ") -> Report:
    """Read a report.json of this project. A ConfigError that begins with `option`: it is none."""
    try:
        if not Path(path).is_file() or Path(path).stat().st_size > MAX_BYTES:
            raise ValueError("no such file, or none of a report's size")
        report = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{option}{show(path)}: cannot be read ({one_line(error)})") from error
    entries = report.get("metrics") if isinstance(report, dict) else None
    if not isinstance(entries, dict) or not entries or not all(map(_is_entry, entries.values())):
        raise ConfigError(f"{option}{show(path)}: is no report.json of a single evaluation")
    return report


def _is_entry(result: Any) -> bool:
    value = result.get("value") if isinstance(result, dict) else "none"
    return value is None or (type(value) in (int, float) and abs(value) < LARGEST)


def compare(report: Mapping[str, Any], old: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What changed since an older report: a row for each metric with a value in both."""
    rows = []
    for name, new in report["metrics"].items():
        before = old["metrics"].get(name, {})
        if new["value"] is None or before.get("value") is None:
            continue
        differing = [key for key in SAME if _essence(new.get(key)) != _essence(before.get(key))]
        row = {"metric": name, "old": before["value"], "new": new["value"]}
        row |= {"delta": new["value"] - before["value"], "better": new.get("better")}
        note = f"not comparable, {', '.join(differing)} differ" if differing else None
        rows.append(row | {"note": note})
    return rows


def _essence(value: Any) -> Any:
    """What identifies a network: its key or hash, not where it lies."""
    if isinstance(value, Mapping):
        return value.get("key") or value.get("sha256") or dict(value)
    return value


def columns_of(entries: Mapping[str, Entry]) -> dict[str, float | None]:
    """Each metric's value, and beside a precision its recall: guidance moves one for the other."""
    columns = {}
    for name, result in entries.items():
        columns[name] = result["value"]
        if "recall" in result:
            columns[f"{name} recall"] = result["recall"]
    return columns


def repeats_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean, deviation and minimum of every metric, for each setting that ran with several seeds."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in SWEPT), []).append(row)
    repeats = []
    for group in groups.values():
        if len(group) == 1:
            continue
        spreads, setting = {}, {key: group[0][key] for key in SWEPT if key in group[0]}
        for name in group[0]["metrics"]:
            values = [row["metrics"][name] for row in group]
            if None not in values:
                spreads[name] = {"mean": mean(values), "std": stdev(values), "min": min(values)}
        repeats.append({**setting, "seeds": [row["seed"] for row in group], "metrics": spreads})
    return repeats


def stamped(facts: Mapping[str, Any]) -> dict[str, Any]:
    """`facts` as plain JSON types, between the present time and the versions of packages."""
    installed: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return plain({"created": created, **facts, "versions": installed})


def code_version() -> dict[str, Any] | None:
    """The commit of this code and whether it was changed since; None outside a git clone."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[1])]
    ask = partial(subprocess.check_output, text=True, timeout=10, stderr=subprocess.DEVNULL)
    try:
        commit = ask([*git, "rev-parse", "HEAD"]).strip()
        return {"commit": commit, "dirty": bool(ask([*git, "status", "--porcelain"]).strip())}
    except (OSError, subprocess.SubprocessError):
        return None


def summary(report: Report) -> str:
    """Aligned lines: name, value, note; then the accuracy of each class beside the real ceiling."""
    entries = report["metrics"].items()
    lines = _aligned([row for name, result in entries for row in METRICS[name].rows(name, result)])
    for name, result in entries:
        if table := METRICS[name].table(result):
            heading, rows = table
            lines += ["", heading, *_aligned(rows)]
    lines += ["", *(f"note: {warning}" for warning in report["warnings"])]
    return "\n".join(lines).rstrip()


def _aligned(rows: Sequence[Row]) -> list[str]:
    widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
    return [f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in rows]
