"""report.html: the report as one page that needs nothing but itself, see `reporting.html`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from metrics.charts import bars, matrix
from reporting.html import Picture, figures, number, page, plain, safe, section, table
from reporting.plot import Point, line_chart

MAX_BYTES = 2_000_000  # of the page
MARKS = {"ok": "&#10003;", "unreliable": "&#9650;", "skipped": "&#9675;", "failed": "&#10005;"}
SCHEMA = json.loads(Path(__file__).with_name("report.schema.json").read_text(encoding="utf-8"))

Report = Mapping[str, Any]


def render_html(report: Report, pictures: Mapping[str, Picture]) -> str:
    """The page for a report of `metrics.report.build_report`, any part of which may be absent.

    Args:
        pictures: in the order to show them. Where they do not fit into `MAX_BYTES` they are shrunk,
            the largest first, or left out; the page says so.
    """
    metrics = report.get("metrics") or {}
    items = "".join(f"<li>{safe(text)}</li>" for text in report.get("warnings") or [])
    warnings = section("Warnings", f"<ul>{items}</ul>" if items else "", "warnings")
    before = _facts(report) + warnings + _metrics(metrics)
    before += _classes(metrics.get("class_acc") or {})
    after = _sweep(report.get("sweep") or [])
    after += section("Repeats with other seeds", _runs(report.get("repeats") or []))
    after += _comparison(report.get("comparison") or []) + _provenance(report)
    checkpoint = (report.get("provenance") or {}).get("checkpoint") or "generated images"
    title = f"Evaluation of {'/'.join(Path(str(checkpoint)).parts[-2:])}"
    room = MAX_BYTES - len(page(title, before + after, CSS)) - 100  # 100: the heading of pictures
    shown = "".join(figures(pictures, room, MAX_BYTES).values())
    return page(title, before + section("Pictures", shown) + after, CSS)


def _facts(report: Report) -> str:
    made, rows = report.get("provenance") or {}, report.get("sweep") or []
    facts = {key: made.get(key) for key in ("checkpoint", "step", "sampler", "steps", "cfg_scale")}
    for key, name in (("steps", "num_inference_steps"), ("cfg_scale", "cfg_scale")):
        swept = dict.fromkeys(plain(row[name]) for row in rows if row.get(name) is not None)
        facts[key] = ", ".join(swept) or facts[key]
    facts |= {"images": made.get("n"), "date": made.get("created"), "report": report.get("status")}
    facts = {key: safe(plain(value)) for key, value in facts.items() if value is not None}
    cells = "".join(f"<div><dt>{key}</dt><dd>{value}</dd></div>" for key, value in facts.items())
    return f"<dl>{cells}</dl>\n"


def _metrics(metrics: Mapping[str, Report]) -> str:
    rows = [row for name, found in metrics.items() for row in _metric_rows(name, found)]
    content = table(("metric", "value", "to compare with", "better", "status"), rows, "metrics")
    shown = {"status", "value", "reason", "better", "per_class", "per_class_real", "confusion"}
    for name, found in metrics.items():
        content += _details(f"Details of {name}", {k: found[k] for k in found if k not in shown})
    return section("Metrics", content)


def _metric_rows(name: str, found: Report) -> Iterator[Sequence[str]]:
    """Cells for a metric, then for those of its parts that have a value."""
    status, reason = str(found.get("status", "unknown")), found.get("reason")
    mark = f'<span class="{safe(status)}">{MARKS.get(status, "?")} {safe(status)}</span>'
    if reason or status in ("skipped", "failed"):
        mark += f"<small>{safe(reason or 'no reason was recorded')}</small>"
    texts = SCHEMA["properties"]["metrics"]["properties"]
    yield _metric_cells(found, found.get("name", name), texts.get(name, {}), mark)
    texts = texts["lpips"]["properties"] | SCHEMA["$defs"]["neighbours"]["properties"]
    for part, text in texts.items():
        if "title" in text and (value := found.get(part)) is not None:
            entry = dict(value) if isinstance(value, Mapping) else {"value": value}
            yield _metric_cells({"better": found.get("better")} | entry, name, text, "")


def _metric_cells(found: Report, key: str, text: Report, status: str) -> Sequence[str]:
    name = f"<b>{text.get('title', safe(key))}</b> <code>{safe(key)}</code>"
    name += f"<small>{text.get('description', '')}</small>"
    compared = {
        "&plusmn;": found.get("std", found.get("sem")),
        "real images:": found.get("real_value"),
        "ceiling (real images):": found.get("real_ceiling"),
        "real images not seen:": (found.get("held_out") or {}).get("share_close"),
    }
    lines = [f"{label} {number(x)}" for label, x in compared.items() if x is not None]
    if found.get("ci95"):
        lines.append("95 % interval " + " to ".join(map(number, found["ci95"])))
    if found.get("flagged") is not None:
        lines.append("<b>flagged</b>" if found["flagged"] else "not flagged")
    better = safe(found.get("better") or "")
    return name, f"<b>{number(found.get('value'))}</b>", "<br>".join(lines), better, status


def _classes(accuracy: Report) -> str:
    by_name, counts = accuracy.get("per_class") or {}, accuracy.get("confusion") or []
    names = list(by_name) if len(by_name) == len(counts) else range(len(counts))
    shares = {name: share for name, share in by_name.items() if share is not None}
    shown = bars(shares, accuracy.get("per_class_real") or {}) if shares else ""
    found = section("Accuracy of each class", shown)
    return found + section("Confusion", matrix(counts, names) if counts else "")


def _sweep(rows: Sequence[Report]) -> str:
    line, axis, unit = "num_inference_steps", "cfg_scale", "steps"
    if len({row.get(axis) for row in rows}) == 1:  # then it is the steps that vary
        line, axis, unit = axis, line, axis
    lines: dict[str, dict[str, list[Point]]] = {}
    for row in rows:
        key = "" if row.get(line) is None else f"{plain(row[line])} {unit}"
        for name, y in (row.get("metrics") or {}).items():
            if y is not None and row.get(axis) is not None:
                lines.setdefault(name, {}).setdefault(key, []).append((row[axis], y))
    charts = "".join(line_chart(name, axis, found) for name, found in lines.items())
    return section("Sweep", f'{_runs(rows)}<div class="charts">{charts}</div>' if rows else "")


def _runs(rows: Sequence[Report]) -> str:
    """A table with a row for each setting, its metrics in columns."""
    names = dict.fromkeys(name for row in rows for name in row.get("metrics") or {})
    keys = dict.fromkeys(key for row in rows for key in row)
    head = [name for key in keys for name in (names if key == "metrics" else [key])]
    cells = []
    for row in rows:
        found = {key: number(value) for key, value in (row.get("metrics") or {}).items()}
        found |= {key: safe(plain(value)) for key, value in row.items()}
        cells.append([found.get(name, "") for name in head])
    return table(head, cells, "numbers")


def _comparison(rows: Sequence[Report]) -> str:
    cells = []
    for row in rows:
        delta, better, note = row.get("delta"), row.get("better"), row.get("note") or ""
        change = "&ndash;" if delta is None else f"{'+' if delta > 0 else ''}{number(delta)}"
        if delta and better in ("lower", "higher") and not note:
            good = (delta > 0) == (better == "higher")
            word, mark = ("better", "ok") if good else ("worse", "failed")
            change = f'<span class="{mark}">{change} {word}</span>'
        old, new = number(row.get("old")), number(row.get("new"))
        cells.append([safe(row.get("metric")), old, new, change, safe(note)])
    changes = table(("metric", "old", "new", "change", "note"), cells, "numbers")
    return section("Compared with an older report", changes)


def _provenance(report: Report) -> str:
    made = dict(report.get("provenance") or {})
    command = made.pop("command", None)
    known = SCHEMA["properties"].keys() - {"artifacts"}
    rest = {k: x for k, x in report.items() if k not in known and not k.startswith("fid_")}
    found = section("Provenance", _pairs(made) if made else "") + _details("Further entries", rest)
    repeat = f"<pre>{safe(command, limit=100_000)}</pre>" if command else ""
    return found + section("Run it again", repeat)


def _details(title: str, found: Report) -> str:
    summary = f"<summary>{safe(title)}</summary>"
    return f"<details>{summary}{_pairs(found)}</details>" if found else ""


def _pairs(found: Report) -> str:
    rows = (f"<tr><th>{safe(k)}</th><td>{safe(x)}</td></tr>" for k, x in _flat(found))
    return f'<table class="pairs"><tbody>{"".join(rows)}</tbody></table>'


def _flat(found: Report, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in found.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", plain(value)


CSS = """
:root{--right:40 100 200;--wrong:205 90 10}
@media screen and (prefers-color-scheme:dark){:root{--right:60 120 225;--wrong:225 115 40}}
.unreliable{color:var(--warn)}.full{color:#fff}.metrics,.pairs{width:100%}
.metrics td{width:28%}.metrics td:nth-child(2n){width:7%}.metrics td:nth-child(3){width:20%}
.pairs{font-size:.85rem;overflow-wrap:anywhere}.pairs th{width:30%}
pre{padding:.6rem 1rem;background:var(--soft);white-space:pre-wrap}
.bars{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr));padding:0}
.bars{gap:.2rem 2rem}.bars li{display:grid;grid-template-columns:8rem 1fr 6.5rem;gap:.6rem}
.bars li span:first-child{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.track{position:relative;height:.8rem;margin-top:.35rem;background:var(--line)}
.track i{display:block;height:100%;background:rgb(var(--right))}
.track b{position:absolute;top:-.15rem;height:1.1rem;border-left:2px solid var(--fg)}
.matrix th,.matrix td{padding:.2rem .4rem;text-align:center;border:1px solid var(--line)}
.matrix td{min-width:2.2em}.matrix th{position:sticky;background:var(--bg);white-space:nowrap}
.matrix [scope=col]{top:0}.matrix [scope=row]{left:0}.many{font-size:.65rem}
.upright [scope=col] span{writing-mode:vertical-rl}.right{background:rgb(var(--right)/var(--shade))}
.wrong{background:rgb(var(--wrong)/var(--shade))}
@media screen and (max-width:40rem){.metrics thead{display:none}.metrics td{display:block;padding:0}
.metrics td:nth-child(n){width:auto}.metrics td:empty{display:none}.metrics tr{display:block}
.metrics td+td::before{content:attr(data-label)": ";color:var(--dim)}.metrics tr{padding:.6rem 0}}
@media print{.many{font-size:4pt}.many td,.many th{padding:0;min-width:0}}
"""
