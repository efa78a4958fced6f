"""Charts without a script: lines as inline SVG, bars and a shaded matrix as HTML.

Their colours are in the style sheet of `metrics.html`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean
from typing import NamedTuple

WIDTH = 360  # of a line chart, in the units of its viewBox: pixels where there is room
LEFT, RIGHT = 58, 346  # edges of the plot
TITLE_HEIGHT, LEGEND_HEIGHT, PLOT_HEIGHT, BOTTOM_HEIGHT = 26, 18, 160, 38
LEGEND_COLUMNS, NUM_COLORS = 3, 4
MAX_INTERVALS = 5  # between the ticks of an axis
MAX_TEXT = 2000  # characters of one value; report.json has the rest
MAX_CLASSES, WORST = 100, 20  # with more classes than that, only the worst are shown

Point = tuple[float, float]


class Axis(NamedTuple):
    """Values `low` to `high` on pixels `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from `low` or less to `high` or more."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value: some room around it
        room = abs(low) / 10 or 1.0
        low, high = low - room, high + room
    least = (high - low) / MAX_INTERVALS
    power = 10.0 ** math.floor(math.log10(least))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= least * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def line_chart(title: str, x_label: str, lines: Mapping[str, Sequence[Point]]) -> str:
    """An <svg> with a line for each name: through the mean y of its finite points at each x."""
    lines = {
        name: [(x, fmean(y for at, y in points if at == x)) for x in sorted({x for x, _ in points})]
        for name, points in lines.items()
    }
    xs, ys = zip(*(point for points in lines.values() for point in points), strict=True)
    top = TITLE_HEIGHT + LEGEND_HEIGHT * math.ceil(len(lines) / LEGEND_COLUMNS) + 6
    bottom = top + PLOT_HEIGHT
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_axis = Axis(x_ticks[0], x_ticks[-1], LEFT, RIGHT)
    y_axis = Axis(y_ticks[0], y_ticks[-1], bottom, top)
    parts = [_label(LEFT, 16, title, "title")]
    for value in y_ticks:
        y = y_axis.at(value)
        parts += [_rule(LEFT, y, RIGHT, y, "grid")]
        parts += [_label(LEFT - 8, y + 4, f"{value:.8g}", "dim", "end")]
    for value in x_ticks:
        x = x_axis.at(value)
        parts += [_rule(x, bottom, x, bottom + 4, "axis")]
        parts += [_label(x, bottom + 17, f"{value:.8g}", "dim", "middle")]
    parts += [_rule(LEFT, bottom, RIGHT, bottom, "axis"), _rule(LEFT, top, LEFT, bottom, "axis")]
    parts += [_label((LEFT + RIGHT) / 2, bottom + 34, x_label, "", "middle")]
    for i, (name, points) in enumerate(lines.items()):
        color = f"c{i % NUM_COLORS}"
        places = [(f"{x_axis.at(x):.1f}", f"{y_axis.at(y):.1f}") for x, y in points]
        path = " ".join(map(",".join, places))
        parts.append(f'<polyline class="line {color}" points="{path}"/>')
        for (x, y), (x_value, y_value) in zip(places, points, strict=True):
            told = f"<title>{safe(name)}: {x_value:.6g}, {y_value:.6g}</title>"
            parts.append(f'<circle class="{color}" cx="{x}" cy="{y}" r="3">{told}</circle>')
        row, column = divmod(i, LEGEND_COLUMNS)
        x, y = LEFT + column * (RIGHT - LEFT) / LEGEND_COLUMNS, TITLE_HEIGHT + row * LEGEND_HEIGHT
        parts += [_rule(x, y + 8, x + 20, y + 8, f"line {color}")]
        parts += [_label(x + 26, y + 12, name, "dim")]
    box = f'viewBox="0 0 {WIDTH} {bottom + BOTTOM_HEIGHT}"'
    return (
        f'<svg class="chart" {box} role="img" aria-label="{safe(title)} against {safe(x_label)}">'
        f"{''.join(parts)}</svg>"
    )


def _rule(x1: float, y1: float, x2: float, y2: float, name: str) -> str:
    return f'<line class="{name}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _label(x: float, y: float, text: str, name: str, anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{name}" {place}>{safe(text)}</text>'


def bars(shares: Mapping[str, float], real: Mapping[str, float | None]) -> str:
    """A bar for each share, and an upright line where its value in `real` is."""
    note, items = "Bar: generated images. Upright line: real images, the ceiling.", []
    if len(shares) > MAX_CLASSES:
        note += f" The worst {WORST} of {len(shares)} classes; report.json has all."
        shares = dict(sorted(shares.items(), key=lambda item: item[1])[:WORST])
    for name, share in shares.items():
        label, line, said = safe(name), "", f"{share:.3f}"
        if real.get(name) is not None:
            line = f'<b style="left:{100 * real[name]:.1f}%"></b>'
            said += f" <small>/ {real[name]:.3f}</small>"
        bar = f'<span class="track"><i style="width:{100 * share:.1f}%"></i>{line}</span>'
        items.append(f'<li><span title="{label}">{label}</span>{bar}<span>{said}</span></li>')
    return f'<p class="dim">{note}</p><ul class="bars">{"".join(items)}</ul>'


def matrix(counts: Sequence[Sequence[int]], names: Sequence[object]) -> str:
    """A table of `counts` with each cell shaded by its share of the row."""
    note = "Row: the class that was asked for. Column: the class that the classifier sees."
    note, chosen = f"{note} Shade: share of the row.", list(range(len(counts)))
    if len(counts) > MAX_CLASSES:
        note += f" The worst {WORST} of {len(counts)} classes; report.json has all."
        chosen = sorted(chosen, key=lambda k: counts[k][k] / (sum(counts[k]) or 0.1))
        chosen = sorted([k for k in chosen if sum(counts[k])][:WORST])
    head = "".join(f'<th scope="col"><span>{safe(names[k])}</span></th>' for k in chosen)
    rows = [f"<tr><td></td>{head}</tr>"]
    for k in chosen:
        total = sum(counts[k]) or 1
        cells = "".join(_cell(counts[k][j], total, j == k) for j in chosen)
        rows.append(f'<tr><th scope="row">{safe(names[k])}</th>{cells}</tr>')
    style = "matrix many" if len(chosen) > 30 else "matrix"
    style += " upright" if any(len(str(names[k])) > 3 for k in chosen) else ""
    table = f'<table class="{style}">{"".join(rows)}</table>'
    return f'<p class="dim">{note}</p><div class="scroll">{table}</div>'


def _cell(count: int, total: int, right: bool) -> str:
    if not count:
        return "<td></td>"
    shade = 0.15 + 0.85 * count / total
    name = ("right" if right else "wrong") + (" full" if shade > 0.6 else "")
    return f'<td class="{name}" style="--shade:{shade:.2f}">{count}</td>'


def safe(value: object, limit: int = MAX_TEXT) -> str:
    """`value` as ASCII text that means nothing to HTML; the end of a long one is left out."""
    text = str(value)
    if len(text) > limit:
        text = f"{text[:limit]} ... ({len(text) - limit} more characters in report.json)"
    return escape(text).encode("ascii", "xmlcharrefreplace").decode()
