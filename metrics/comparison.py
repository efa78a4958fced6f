"""What changed since an older report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.errors import ConfigError

# A difference in these makes two values of a metric incomparable.
SAME = ("n", "n_real", "num_pairs", "subset_size", "extractor", "classifier", "k")


def read_report(path: str | Path) -> dict[str, Any]:
    """A report.json of this project.

    Raises:
        ConfigError: it is not one.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--compare {path}: cannot be read ({error})") from error
    if not isinstance(report, dict) or not isinstance(report.get("metrics"), dict):
        raise ConfigError(f"--compare {path}: is no report.json of a single evaluation")
    return report


def compare(report: Mapping[str, Any], old: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each metric with a value in both: metric, old, new, delta, better, notes."""
    rows = []
    for name, new in report["metrics"].items():
        before = old["metrics"].get(name, {})
        if new["value"] is None or before.get("value") is None:
            continue
        differing = [key for key in SAME if _essence(new.get(key)) != _essence(before.get(key))]
        rows.append(
            {
                "metric": name,
                "old": before["value"],
                "new": new["value"],
                "delta": new["value"] - before["value"],
                "better": new.get("better"),
                "note": f"not comparable, {', '.join(differing)} differ" if differing else None,
            }
        )
    return rows


def _essence(value: Any) -> Any:
    """Of a network, what identifies it: its key or hash, not where it lies."""
    if isinstance(value, Mapping):
        return value.get("key") or value.get("sha256") or dict(value)
    return value
