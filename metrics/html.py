"""report.html: the report as one page that needs nothing but itself.

No script and no address outside the page: it can be mailed, archived and opened offline. Whatever
comes from elsewhere (class names, paths, messages) is escaped; the page is ASCII.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from metrics.charts import Point, bars, line_chart, matrix, safe

MAX_BYTES = 2_000_000  # of the page
MAX_SHRINK = 8  # pictures are shown at an eighth of their size before they are left out
MIN_WIDTH = 320  # narrower pictures are enlarged by a whole factor
MARKS = {"ok": "&#10003;", "unreliable": "&#9650;", "skipped": "&#9675;", "failed": "&#10005;"}
SECURITY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
SCHEMA = json.loads(Path(__file__).with_name("report.schema.json").read_text(encoding="utf-8"))

Report = Mapping[str, Any]


class Picture(NamedTuple):
    image: np.ndarray  # uint8 (H, W) or (H, W, 3)
    title: str
    caption: str = ""


def render_html(report: Report, pictures: Mapping[str, Picture]) -> str:
    """The page for a report of `metrics.report.build_report`, any part of which may be absent.

    Args:
        pictures: in the order to show them. Where they do not fit into `MAX_BYTES` they are shrunk,
            the largest first, or left out; the page says so.
    """
    metrics = report.get("metrics") or {}
    items = "".join(f"<li>{safe(text)}</li>" for text in report.get("warnings") or [])
    warnings = _section("Warnings", f"<ul>{items}</ul>" if items else "", "warnings")
    before = _headline(report) + warnings + _metrics(metrics)
    before += _classes(metrics.get("class_acc") or {})
    after = _sweep(report.get("sweep") or [])
    after += _section("Repeats with other seeds", _runs(report.get("repeats") or []))
    after += _comparison(report.get("comparison") or []) + _provenance(report) + "</body></html>\n"
    figures = _fit(pictures, MAX_BYTES - len(before) - len(after) - 100)  # 100: its heading
    return before + _section("Pictures", figures) + after


def _section(heading: str, content: str, name: str = "") -> str:
    return f'<section class="{name}"><h2>{heading}</h2>{content}</section>\n' if content else ""


def _headline(report: Report) -> str:
    made, rows = report.get("provenance") or {}, report.get("sweep") or []
    facts = {key: made.get(key) for key in ("checkpoint", "step", "sampler", "steps", "cfg_scale")}
    for key, name in (("steps", "num_inference_steps"), ("cfg_scale", "cfg_scale")):
        swept = dict.fromkeys(_plain(row[name]) for row in rows if row.get(name) is not None)
        facts[key] = ", ".join(swept) or facts[key]
    facts |= {"images": made.get("n"), "date": made.get("created"), "report": report.get("status")}
    facts = {key: safe(_plain(value)) for key, value in facts.items() if value is not None}
    cells = "".join(f"<div><dt>{key}</dt><dd>{value}</dd></div>" for key, value in facts.items())
    name = "/".join(Path(str(made.get("checkpoint") or "generated images")).parts[-2:])
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{SECURITY}">'
        f"<title>Evaluation of {safe(name)}</title><style>{CSS}</style></head>\n"
        f"<body><h1>Evaluation of {safe(name)}</h1><dl>{cells}</dl>\n"
    )


def _metrics(metrics: Mapping[str, Report]) -> str:
    rows = [row for name, found in metrics.items() for row in _metric_rows(name, found)]
    table = _table(("metric", "value", "to compare with", "better", "status"), rows, "metrics")
    shown = {"status", "value", "reason", "better", "per_class", "per_class_real", "confusion"}
    for name, found in metrics.items():
        table += _details(f"Details of {name}", {k: found[k] for k in found if k not in shown})
    return _section("Metrics", table)


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
    lines = [f"{label} {_number(x)}" for label, x in compared.items() if x is not None]
    if found.get("ci95"):
        lines.append("95 % interval " + " to ".join(map(_number, found["ci95"])))
    if found.get("flagged") is not None:
        lines.append("<b>flagged</b>" if found["flagged"] else "not flagged")
    better = safe(found.get("better") or "")
    return name, f"<b>{_number(found.get('value'))}</b>", "<br>".join(lines), better, status


def _classes(accuracy: Report) -> str:
    by_name, counts = accuracy.get("per_class") or {}, accuracy.get("confusion") or []
    names = list(by_name) if len(by_name) == len(counts) else range(len(counts))
    shares = {name: share for name, share in by_name.items() if share is not None}
    shown = bars(shares, accuracy.get("per_class_real") or {}) if shares else ""
    found = _section("Accuracy of each class", shown)
    return found + _section("Confusion", matrix(counts, names) if counts else "")


def _fit(pictures: Mapping[str, Picture], room: int) -> str:
    """A <figure> for each, in `room` bytes together: the largest is halved, at last left out."""
    shrink = dict.fromkeys(pictures, 1)
    figures = {name: _figure(name, picture, 1) for name, picture in pictures.items()}
    while sum(map(len, figures.values())) > room and any(shrink.values()):
        name = max(figures, key=lambda name: (shrink[name] > 0, len(figures[name])))
        shrink[name] = 2 * shrink[name] if shrink[name] < MAX_SHRINK else 0
        figures[name] = _figure(name, pictures[name], shrink[name])
    return "".join(figures.values())


def _figure(name: str, picture: Picture, shrink: int) -> str:
    caption = f"<b>{safe(picture.title or name)}</b> {safe(picture.caption)}"
    limit = f"to keep this page below {MAX_BYTES / 1e6:g} MB"
    if shrink == 0:
        return f"<figure><figcaption>{caption} <em>Left out {limit}.</em></figcaption></figure>"
    height, width = picture.image.shape[:2]
    image = Image.fromarray(picture.image)
    if shrink > 1:
        caption += f" <em>Shown at 1/{shrink} of its size {limit}.</em>"
        image = image.reduce(shrink)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    factor = max(1, MIN_WIDTH // width)
    size = f'width="{width * factor}" height="{height * factor}"'
    tag = f'<img alt="{safe(picture.title or name)}" {size} src="{source}">'
    return f"<figure><figcaption>{caption}</figcaption>{tag}</figure>"


def _sweep(rows: Sequence[Report]) -> str:
    line, axis, unit = "num_inference_steps", "cfg_scale", "steps"
    if len({row.get(axis) for row in rows}) == 1:  # then it is the steps that vary
        line, axis, unit = axis, line, axis
    lines: dict[str, dict[str, list[Point]]] = {}
    for row in rows:
        key = "" if row.get(line) is None else f"{_plain(row[line])} {unit}"
        for name, y in (row.get("metrics") or {}).items():
            if y is not None and row.get(axis) is not None:
                lines.setdefault(name, {}).setdefault(key, []).append((row[axis], y))
    charts = "".join(line_chart(name, axis, found) for name, found in lines.items())
    return _section("Sweep", f'{_runs(rows)}<div class="charts">{charts}</div>' if rows else "")


def _runs(rows: Sequence[Report]) -> str:
    """A table with a row for each setting, its metrics in columns."""
    names = dict.fromkeys(name for row in rows for name in row.get("metrics") or {})
    keys = dict.fromkeys(key for row in rows for key in row)
    head = [name for key in keys for name in (names if key == "metrics" else [key])]
    cells = []
    for row in rows:
        found = {key: _number(value) for key, value in (row.get("metrics") or {}).items()}
        found |= {key: safe(_plain(value)) for key, value in row.items()}
        cells.append([found.get(name, "") for name in head])
    return _table(head, cells, "numbers")


def _comparison(rows: Sequence[Report]) -> str:
    cells = []
    for row in rows:
        delta, better, note = row.get("delta"), row.get("better"), row.get("note") or ""
        change = "&ndash;" if delta is None else f"{'+' if delta > 0 else ''}{_number(delta)}"
        if delta and better in ("lower", "higher") and not note:
            good = (delta > 0) == (better == "higher")
            word, mark = ("better", "ok") if good else ("worse", "failed")
            change = f'<span class="{mark}">{change} {word}</span>'
        old, new = _number(row.get("old")), _number(row.get("new"))
        cells.append([safe(row.get("metric")), old, new, change, safe(note)])
    table = _table(("metric", "old", "new", "change", "note"), cells, "numbers")
    return _section("Compared with an older report", table)


def _provenance(report: Report) -> str:
    made = dict(report.get("provenance") or {})
    command = made.pop("command", None)
    known = SCHEMA["properties"].keys() - {"artifacts"}
    rest = {k: x for k, x in report.items() if k not in known and not k.startswith("fid_")}
    found = _section("Provenance", _pairs(made) if made else "") + _details("Further entries", rest)
    repeat = f"<pre>{safe(command, limit=100_000)}</pre>" if command else ""
    return found + _section("Run it again", repeat)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], name: str) -> str:
    """A table of escaped cells. On narrow screens each row of "metrics" becomes a block."""
    columns = "".join(f'<th scope="col">{safe(label)}</th>' for label in head)
    body = ""
    for row in rows:
        cells = (f'<td data-label="{safe(k)}">{x}</td>' for k, x in zip(head, row, strict=True))
        body += f"<tr>{''.join(cells)}</tr>"
    table = f"<thead><tr>{columns}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="{name}">{table}</table></div>' if rows else ""


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
            yield f"{prefix}{key}", _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _number(value: Any) -> str:
    """Four decimals where they say something; safe for anything else."""
    if value is None:
        return "&ndash;"
    if isinstance(value, Mapping):  # mean, std, min
        return "<br>".join(f"{safe(key)} {_number(x)}" for key, x in value.items())
    if not isinstance(value, float):
        return safe(_plain(value))
    return f"{value:.4f}" if 0.001 <= abs(value) < 1e6 else f"{value:.4g}"


CSS = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1e23;--dim:#5c6470;--line:#d8dce2;--soft:#f4f5f7;
--ok:#19753a;--warn:#8f5f00;--bad:#c4242f;--right:40 100 200;--wrong:205 90 10;--c0:#2864c8;
--c1:#cd5a0a;--c2:#19753a;--c3:#9b3fb5}
@media screen and (prefers-color-scheme:dark){:root{--bg:#15171b;--fg:#e5e7eb;--dim:#9aa3af;
--line:#343941;--soft:#1f2228;--ok:#5fc47e;--warn:#e3b04b;--bad:#ff7b7b;--right:60 120 225;
--wrong:225 115 40;--c0:#6ea8fe;--c1:#ff9d5c;--c2:#5fc47e;--c3:#d58bea}}*{box-sizing:border-box}
h1{font-size:1.6rem}tr{vertical-align:top}dd{margin:0}h2{font-size:1.15rem;margin:2rem 0 .5rem}
td small{display:block}body{max-width:72rem;margin:0 auto;padding:1rem;background:var(--bg);
color:var(--fg);font:15px/1.5 system-ui,sans-serif;print-color-adjust:exact}
h1,dd,li,small,pre,.pairs{overflow-wrap:anywhere}dl{display:flex;flex-wrap:wrap;gap:.4rem 2rem}
dt,.dim,small,th,summary,code{color:var(--dim)}dt,small,.dim,figcaption,.pairs{font-size:.85rem}
pre,.warnings{padding:.6rem 1rem;background:var(--soft)}.warnings{border-left:4px solid var(--warn)}
.ok{color:var(--ok)}.unreliable{color:var(--warn)}.failed{color:var(--bad)}.full{color:#fff}
.scroll{overflow:auto;max-height:85vh}tbody tr{border-top:1px solid var(--line)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.35rem .8rem .35rem 0;font-weight:400}.metrics,.pairs{width:100%}
.metrics td{width:28%}.metrics td:nth-child(2n){width:7%}.metrics td:nth-child(3){width:20%}
.pairs th{width:30%}.numbers *{white-space:nowrap}.numbers :not(:first-child){text-align:right}
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
.wrong{background:rgb(var(--wrong)/var(--shade))}figure,.charts{margin:1.2rem 0}
img{max-width:100%;height:auto;image-rendering:pixelated}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(17rem,100%),1fr));gap:1rem}
.chart{width:100%;max-width:30rem;font-size:12px}.chart text{fill:var(--fg)}.title{font-weight:600}
.chart .dim{fill:var(--dim)}.grid{stroke:var(--line)}.axis{stroke:var(--dim)}polyline{fill:none}
.line{stroke:currentcolor;stroke-width:2}circle{fill:currentcolor}.c0{color:var(--c0)}
.c1{color:var(--c1);stroke-dasharray:8 3}.c2{color:var(--c2);stroke-dasharray:2 3}
.c3{color:var(--c3);stroke-dasharray:9 3 2 3}pre{white-space:pre-wrap}.warnings>*{margin:0}
@media screen and (max-width:40rem){.metrics thead{display:none}.metrics td{display:block;padding:0}
.metrics td:nth-child(n){width:auto}.metrics td:empty{display:none}.metrics tr{display:block}
.metrics td+td::before{content:attr(data-label)": ";color:var(--dim)}.metrics tr{padding:.6rem 0}}
@media print{.scroll{overflow:visible;max-height:none}figure,li,tr,svg{break-inside:avoid}
.many{font-size:4pt}.many td,.many th{padding:0;min-width:0}}
"""
