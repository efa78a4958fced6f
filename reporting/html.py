"""Parts of a page that needs nothing but itself.

No script and no address outside the page: it can be mailed, archived and opened offline. Whatever
comes from elsewhere (names, paths, messages) is escaped; the page is ASCII.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

MAX_SHRINK = 8  # pictures are shown at an eighth of their size before they are left out
MIN_WIDTH = 320  # narrower pictures are enlarged by a whole factor
MAX_TEXT = 2000  # characters of one value
SECURITY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Picture(NamedTuple):
    image: np.ndarray  # uint8 (H, W) or (H, W, 3)
    title: str
    caption: str = ""


def page(title: str, body: str, style: str = "") -> str:
    """The document: `body` (HTML) under the heading `title` (text), with `style` after `CSS`."""
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{SECURITY}">'
        f"<title>{safe(title)}</title><style>{CSS}{style}</style></head>\n"
        f"<body><h1>{safe(title)}</h1>{body}</body></html>\n"
    )


def safe(value: object, limit: int = MAX_TEXT) -> str:
    """`value` as ASCII text that means nothing to HTML; the end of a long one is left out."""
    text = str(value)
    if len(text) > limit:
        text = f"{text[:limit]} ... ({len(text) - limit} more characters)"
    return escape(text).encode("ascii", "xmlcharrefreplace").decode()


def plain(value: Any) -> str:
    """A value of a report or config as text, not yet escaped."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def number(value: Any) -> str:
    """Four decimals where they say something; safe for anything else."""
    if value is None:
        return "&ndash;"
    if isinstance(value, Mapping):  # mean, std, min
        return "<br>".join(f"{safe(key)} {number(x)}" for key, x in value.items())
    if not isinstance(value, float):
        return safe(plain(value))
    return f"{value:.4f}" if 0.001 <= abs(value) < 1e6 else f"{value:.4g}"


def section(heading: str, content: str, name: str = "") -> str:
    return f'<section class="{name}"><h2>{heading}</h2>{content}</section>\n' if content else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], name: str) -> str:
    """A table of escaped cells; nothing without rows."""
    columns = "".join(f'<th scope="col">{safe(label)}</th>' for label in head)
    body = ""
    for row in rows:
        cells = (f'<td data-label="{safe(k)}">{x}</td>' for k, x in zip(head, row, strict=True))
        body += f"<tr>{''.join(cells)}</tr>"
    found = f"<thead><tr>{columns}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="{name}">{found}</table></div>' if rows else ""


def figures(pictures: Mapping[str, Picture], room: int, max_bytes: int) -> dict[str, str]:
    """A <figure> for each, in `room` bytes together: the largest is halved, at last left out.

    Args:
        max_bytes: of the page, which the captions of such pictures name.
    """
    shrink = dict.fromkeys(pictures, 1)
    found = {name: _figure(name, picture, 1, max_bytes) for name, picture in pictures.items()}
    while sum(map(len, found.values())) > room and any(shrink.values()):
        name = max(found, key=lambda name: (shrink[name] > 0, len(found[name])))
        shrink[name] = 2 * shrink[name] if shrink[name] < MAX_SHRINK else 0
        found[name] = _figure(name, pictures[name], shrink[name], max_bytes)
    return found


def _figure(name: str, picture: Picture, shrink: int, max_bytes: int) -> str:
    caption = f"<b>{safe(picture.title or name)}</b> {safe(picture.caption)}"
    limit = f"to keep this page below {max_bytes / 1e6:g} MB"
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


CSS = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1e23;--dim:#5c6470;--line:#d8dce2;--soft:#f4f5f7;
--ok:#19753a;--warn:#8f5f00;--bad:#c4242f;--c0:#2864c8;--c1:#cd5a0a;--c2:#19753a;--c3:#9b3fb5;
--c4:#c2255c;--c5:#0b7285}
@media screen and (prefers-color-scheme:dark){:root{--bg:#15171b;--fg:#e5e7eb;--dim:#9aa3af;
--line:#343941;--soft:#1f2228;--ok:#5fc47e;--warn:#e3b04b;--bad:#ff7b7b;--c0:#6ea8fe;--c1:#ff9d5c;
--c2:#5fc47e;--c3:#d58bea;--c4:#ff8fb3;--c5:#5cc8d7}}*{box-sizing:border-box}
h1{font-size:1.6rem}tr{vertical-align:top}dd{margin:0}h2{font-size:1.15rem;margin:2rem 0 .5rem}
td small{display:block}body{max-width:72rem;margin:0 auto;padding:1rem;background:var(--bg);
color:var(--fg);font:15px/1.5 system-ui,sans-serif;print-color-adjust:exact}
h1,dd,li,small,pre{overflow-wrap:anywhere}dl{display:flex;flex-wrap:wrap;gap:.4rem 2rem}
dt,.dim,small,th,summary,code{color:var(--dim)}dt,small,.dim,figcaption{font-size:.85rem}
.warnings{padding:.6rem 1rem;background:var(--soft);border-left:4px solid var(--warn)}
.warnings>*{margin:0}.ok{color:var(--ok)}.failed{color:var(--bad)}
.scroll{overflow:auto;max-height:85vh}tbody tr{border-top:1px solid var(--line)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.35rem .8rem .35rem 0;font-weight:400}
.numbers *{white-space:nowrap}.numbers :not(:first-child){text-align:right}
figure,.charts{margin:1.2rem 0}img{max-width:100%;height:auto;image-rendering:pixelated}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(17rem,100%),1fr));gap:1rem}
.chart{width:100%;max-width:30rem;font-size:12px}.chart text{fill:var(--fg)}.title{font-weight:600}
.chart .dim{fill:var(--dim)}.grid{stroke:var(--line)}.axis{stroke:var(--dim)}
polyline,path{fill:none}.line{stroke:currentcolor;stroke-width:2}circle{fill:currentcolor}
.c0{color:var(--c0)}.c1{color:var(--c1);stroke-dasharray:8 3}
.c2{color:var(--c2);stroke-dasharray:2 3}.c3{color:var(--c3);stroke-dasharray:9 3 2 3}
.c4{color:var(--c4);stroke-dasharray:4 3}.c5{color:var(--c5);stroke-dasharray:12 3}
.curve{stroke:currentcolor;stroke-width:2;stroke-dasharray:none;stroke-linecap:round}
.curve{stroke-linejoin:round}.raw{stroke-width:1;opacity:.35}.wide{max-width:none;min-width:60rem}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.5rem;list-style:none;margin:.5rem 0;padding:0}
.legend i{display:inline-block;width:1.6rem;margin-right:.5rem;border-top:3px solid currentcolor;
vertical-align:middle}
@media print{.scroll{overflow:visible;max-height:none}figure,li,tr,svg{break-inside:avoid}}
"""
