"""The report: report.json, its summary in text, and what report.html shows."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets.real import RealSets
from metrics import METRICS, fid
from metrics.class_accuracy import ClassScorer
from metrics.gallery import Gallery
from metrics.memorization import MemorizationScorer
from metrics.scoring import Entry, Scorer
from reporting.evaluation import render_html
from reporting.pages import Picture
from utils.images import grid_rows, make_grid, to_array

SCHEMA_VERSION = 1
PAIRS_PER_ROW = 4  # of a generated image and its neighbours
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
        entries: metric name -> entry, as `Scoring.score` returns them.
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


def write_text(path: Path, text: str) -> None:
    """Write atomically, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_report(
    path: Path, report: Mapping[str, Any], pictures: Mapping[str, Picture] | None = None
) -> None:
    """`path`, and the page to read beside it: report.json and report.html."""
    write_text(path, json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(path.with_suffix(".html"), render_html(report, pictures or {}))


def save_sweep(
    path: Path, reports: Sequence[tuple[Any, Path, Mapping[str, Any]]], facts: Mapping[str, Any]
) -> None:
    """One report over several: a row for each, and mean, deviation and minimum of repeats.

    Args:
        reports: (setting, its own report's path, that report).
        facts: provenance that all share.
    """
    rows = [
        {
            "cfg_scale": setting.sampling.cfg_scale,
            "num_inference_steps": setting.sampling.num_inference_steps,
            "seed": setting.seed,
            "status": report["status"],
            "metrics": columns_of(report["metrics"]),
            "report": single.name,
        }
        for setting, single, report in reports
    ]
    summary = {
        "schema_version": SCHEMA_VERSION,
        "status": worst_status(row["status"] for row in rows),
        "warnings": reports[0][2]["warnings"],
        "metrics": {},
        "sweep": rows,
        "repeats": repeats_of(rows),
        "provenance": plain({"created": utc_now(), **facts, "versions": versions()}),
    }
    save_report(path, summary)


def columns_of(entries: Mapping[str, Entry]) -> dict[str, float | None]:
    """Each metric's value, and beside a precision its recall: guidance moves one for the other."""
    found = {}
    for name, of_metric in entries.items():
        found[name] = of_metric["value"]
        if "recall" in of_metric:
            found[f"{name} recall"] = of_metric["recall"]
    return found


def repeats_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Settings that ran with several seeds: mean, deviation and minimum of every metric."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["cfg_scale"], row["num_inference_steps"]), []).append(row)
    found = []
    for (scale, steps), group in groups.items():
        if len(group) == 1:
            continue
        values = {name: [row["metrics"][name] for row in group] for name in group[0]["metrics"]}
        found.append(
            {
                "cfg_scale": scale,
                "num_inference_steps": steps,
                "seeds": [row["seed"] for row in group],
                "metrics": {
                    name: {
                        "mean": statistics.mean(known),
                        "std": statistics.stdev(known),
                        "min": min(known),
                    }
                    for name, known in values.items()
                    if None not in known
                },
            }
        )
    return found


def worst_status(statuses: Iterable[str]) -> str:
    return max(statuses, key=("complete", "partial", "empty").index)


def pictures_of(
    scorers: Sequence[Scorer], gallery: Gallery, real: RealSets | None
) -> dict[str, Picture]:
    """What the report shows: a grid, near neighbours in the train set, wrong classes."""
    names = real.train.class_names if real is not None else ()
    found = {"samples": Picture(to_array(gallery.grid()), "Samples", "A row per class, if any.")}
    for scorer in scorers:
        if isinstance(scorer, MemorizationScorer) and scorer.pairs:
            rows = torch.stack([_chw(image) for pair in scorer.pairs for image in pair])
            width = len(scorer.pairs[0])
            line = width * PAIRS_PER_ROW
            grid = make_grid(
                rows, [list(range(i, min(i + line, len(rows)))) for i in range(0, len(rows), line)]
            )
            columns = ("generated", "nearest train image", "nearest by LPIPS")[:width]
            found["neighbours"] = Picture(
                to_array(grid), "Closest to the train images", "In turn: " + ", ".join(columns)
            )
        if isinstance(scorer, ClassScorer) and scorer.failures:
            failures = scorer.failures
            grid = make_grid(
                torch.stack([failure.image for failure in failures]), grid_rows(len(failures))
            )
            told = [
                f"{_name(names, failure.requested)} drawn as {_name(names, failure.seen)}"
                for failure in failures
            ]
            found["failures"] = Picture(to_array(grid), "Wrong classes", "; ".join(told))
    return found


def _name(names: Sequence[str], label: int) -> str:
    return names[label] if label < len(names) else str(label)


def _chw(array: np.ndarray) -> Tensor:
    """uint8 (H, W) or (H, W, 3) -> (C, H, W)."""
    image = torch.from_numpy(array)
    return image[None] if image.dim() == 2 else image.permute(2, 0, 1)


def code_version() -> dict[str, Any] | None:
    """The commit of this code and whether it was changed since; None outside a git clone."""
    folder = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


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
    elif name == "kid" and found["value"] is not None:
        notes.insert(0, f"+- {_number(found['std'])} over subsets of {found['subset_size']}")
    elif name in ("prdc", "prdc_domain") and found["value"] is not None:
        label = f"{name} precision"
        more = [
            (f"{name} {part}", _number(found[part]), "")
            for part in ("recall", "density", "coverage")
        ]
    elif name == "fd_domain" and found["value"] is not None:
        notes.insert(0, f"unseen real images {_number(found['real_value'])}")
    elif name == "memorization":
        verdict = "more than held-out images" if found["flagged"] else "no sign of copies"
        notes.insert(0, f"share nearer to the train images than 99 % of held-out ones: {verdict}")
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
