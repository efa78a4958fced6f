"""report.html: a report of metrics as one page that needs nothing but itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from reporting.charts import Chart, Legend, draw_chart, legend_of
from reporting.pages import Pictures, Table, render_page, to_number, to_text

MAX_BYTES = 2_000_000  # the largest page
MAX_CLASSES, WORST = 100, 20  # with more classes than that, only the worst are shown
# What a sweep goes over, and how the name of a line says it
SWEPT = {"ema_width": "ema_width", "cfg_scale": "cfg_scale", "num_inference_steps": "steps"}
SCHEMA = json.loads(Path(__file__).with_name("report.schema.json").read_text(encoding="utf-8"))

Report = Mapping[str, Any]


def render_html(report: Report, pictures: Pictures) -> str:
    """The page for a report of `metrics.report.build_report`, any part of which may be absent.

    Titles and descriptions of the metrics are those of report.schema.json. Pictures that do not fit
    into `MAX_BYTES` are shrunk or left out, see `render_page`.
    """
    made, sweep = report.get("provenance") or {}, report.get("sweep") or []
    accuracy = (report.get("metrics") or {}).get("class_acc") or {}
    checkpoint = Path(str(made.get("checkpoint") or "generated images"))
    known = SCHEMA["properties"].keys() - {"artifacts"}
    texts = SCHEMA["properties"]["metrics"]["properties"]
    context = {
        "title": f"Evaluation of {'/'.join(checkpoint.parts[-2:])}",
        "report": report,
        "texts": texts,
        "part_texts": texts["lpips"]["properties"] | SCHEMA["$defs"]["neighbours"]["properties"],
        "max_classes": MAX_CLASSES,
        "num_worst": WORST,
        "classes": classes_to_show(accuracy.get("confusion") or []),
        "sweep_table": table_of(sweep),
        "sweep_charts": sweep_charts(sweep),
        "repeats": table_of(report.get("repeats") or []),
        "further": {k: report[k] for k in report if k not in known and not k.startswith("fid_")},
    }
    return render_page("evaluation.html", context, pictures, max_bytes=MAX_BYTES)


def classes_to_show(confusion: Sequence[Sequence[int]]) -> list[int]:
    """The classes whose rows and columns of the matrix are shown: all, or the worst of many.

    Rows are classes that were asked for, columns what the classifier sees, entries are counts.
    """
    classes = range(len(confusion))
    if len(classes) <= MAX_CLASSES:
        return list(classes)
    shares = {k: confusion[k][k] / sum(confusion[k]) for k in classes if sum(confusion[k])}
    return sorted(sorted(shares, key=shares.get)[:WORST])


def sweep_charts(rows: Sequence[Report]) -> tuple[list[Chart | None], Legend]:
    """A chart for each metric with its legend: a line for each number of steps.

    The lines run over the first of `SWEPT` of which several were tried; the others name the line.
    Runs that differ in their seeds alone are one point: their mean.
    """
    axis = next((k for k in SWEPT if len({row.get(k) for row in rows}) > 1), "num_inference_steps")
    parts = [[(row.get(k), unit) for k, unit in SWEPT.items() if k != axis] for row in rows]
    labels = [", ".join(f"{to_text(x)} {unit}" for x, unit in p if x is not None) for p in parts]
    charts = []
    for metric in dict.fromkeys(name for row in rows for name in row.get("metrics") or {}):
        lines: dict[str, dict[float, list[float]]] = {label: {} for label in labels}
        for label, row in zip(labels, rows, strict=True):
            x, y = row.get(axis), (row.get("metrics") or {}).get(metric)
            if x is not None and y is not None:
                lines[label].setdefault(x, []).append(y)
        means = {key: [(x, fmean(ys[x])) for x in sorted(ys)] for key, ys in lines.items()}
        charts.append(draw_chart(metric, axis, means))
    return charts, legend_of(dict.fromkeys(labels))


def table_of(rows: Sequence[Report]) -> Table:
    """A row for each setting, with its metrics in columns."""
    texts = [
        {key: to_text(value) for key, value in row.items() if key != "metrics"}
        | {key: to_number(value) for key, value in (row.get("metrics") or {}).items()}
        for row in rows
    ]
    head = list(dict.fromkeys(key for cells in texts for key in cells))
    return head, [[cells.get(key, "") for key in head] for cells in texts]
