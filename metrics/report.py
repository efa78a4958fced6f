"""report.json and its summary in text."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from metrics import METRICS, fid
from metrics.scoring import Entry

SCHEMA_VERSION = 1
PACKAGES = ("torch", "torchvision", "torch-fidelity", "lpips", "numpy")


def report_path(output: str | None, eval_dir: Path) -> Path:
    """`output` if it ends in .json, else report.json in the folder `output` or `eval_dir`."""
    if output is None:
        return eval_dir / "report.json"
    path = Path(output)
    return path if path.suffix == ".json" else path / "report.json"


def build_report(
    entries: Mapping[str, Entry], *, provenance: Mapping[str, Any], warnings: Sequence[str] = ()
) -> dict[str, Any]:
    """The report as plain JSON types without NaN or infinity (null, with a reason, instead).

    Args:
        entries: metric name -> entry, as `run_scorers` returns them.
        provenance: how the images came about.
    """
    ordered = {name: plain(dict(entries[name])) for name in METRICS if name in entries}
    for found in ordered.values():
        if found["value"] is None and found["reason"] is None:
            found["reason"] = "the value is not a finite number"
    values = {name: found["value"] for name, found in ordered.items()}
    report: dict[str, Any] = {
        "FID": values.get("fid"),
        "IS_mean": values.get("is"),
        "IS_std": ordered.get("is", {}).get("std"),
        "LPIPS_diversity": values.get("lpips"),
        "class_accuracy": values.get("class_acc"),
    }
    if "name" in ordered.get("fid", {}):
        report[ordered["fid"]["name"]] = values["fid"]
    report |= {
        "schema_version": SCHEMA_VERSION,
        "status": overall_status(ordered),
        "warnings": list(warnings),
        "metrics": ordered,
        "provenance": plain({"created": utc_now(), **provenance, "versions": versions()}),
    }
    return report


def overall_status(entries: Mapping[str, Entry]) -> str:
    """complete: every metric has a value; partial: some do; empty: none does."""
    there = [found["status"] in ("ok", "unreliable") for found in entries.values()]
    if all(there):
        return "complete" if there else "empty"
    return "partial" if any(there) else "empty"


def count_warnings(names: Sequence[str], num_images: int, channels: int) -> list[str]:
    """What readers of the numbers have to know."""
    found = []
    if "fid" in names or "is" in names:
        if num_images <= fid.SINGULAR_BELOW:
            found.append(
                f"{num_images} images are too few for FID and IS: the values are unreliable"
            )
        elif num_images < fid.COMPARABLE_FROM:
            found.append(
                f"FID of {num_images} images is biased upward and not comparable with published "
                "values, which use 50,000"
            )
        if channels == 1:
            found.append(
                "FID and IS come from a network that has seen colour photographs: on grey images "
                "read class_acc first"
            )
    return found


def plain(value: Any) -> Any:
    """`value` with tuples as lists, paths as text, and None for what JSON cannot say."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write atomically, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str | None]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def summary(report: Mapping[str, Any]) -> str:
    """Aligned lines: name, value, note; then the accuracy of each class beside the real ceiling."""
    rows = [row for name, found in report["metrics"].items() for row in _rows(name, found)]
    lines = _aligned(rows)
    accuracy = report["metrics"].get("class_acc", {})
    if accuracy.get("per_class"):
        real = accuracy["per_class_real"]
        table = [
            (name, _number(share), f"real {_number(real[name])}")
            for name, share in accuracy["per_class"].items()
        ]
        lines += ["", "requested class, accuracy", *_aligned(table)]
    lines += ["", *(f"note: {warning}" for warning in report["warnings"])]
    return "\n".join(lines).rstrip()


def _rows(name: str, found: Entry) -> list[tuple[str, str, str]]:
    label = {"fid": found.get("name", "fid"), "lpips": "lpips_inter"}.get(name, name)
    if found["status"] in ("skipped", "failed"):
        return [(label, found["status"], found["reason"])]
    notes = [f"{found['status']}: {found['reason']}"] if found["reason"] else []
    more = []
    if name == "is":
        notes.insert(0, f"+- {_number(found['std'])} over {found['num_splits']} splits")
    elif name == "lpips":
        notes.insert(0, _lpips_note(found["lpips_inter"]))
        intra = found["lpips_intra"]
        more = [("lpips_intra", _number(intra["value"]), _lpips_note(intra))] if intra else []
    elif name == "class_acc":
        low, high = found["ci95"]
        notes.insert(
            0,
            f"95 % interval {_number(low)} to {_number(high)}, real images "
            f"{_number(found['real_ceiling'])}, unsure {found['unsure_share']:.1%}",
        )
    return [(label, _number(found["value"]), "; ".join(notes)), *more]


def _lpips_note(found: Mapping[str, Any]) -> str:
    notes = [] if found["sem"] is None else [f"+- {_number(found['sem'])}"]
    if found["real_value"] is not None:
        notes.append(f"real {_number(found['real_value'])}")
    return ", ".join(notes)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _aligned(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
    return [f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in rows]
