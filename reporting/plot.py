"""Charts without a script, as inline SVG: lines through a few points, curves through very many.

Their colours are in the style sheet of `reporting.html`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from statistics import fmean
from typing import NamedTuple

from reporting.html import safe

WIDTH, WIDE = 360, 1080  # of a chart, in the units of its viewBox: pixels where there is room
LEFT, RIGHT_MARGIN = 58, 14  # beside the plot
TITLE_HEIGHT, LEGEND_HEIGHT, PLOT_HEIGHT, BOTTOM_HEIGHT = 26, 18, 160, 38
WIDE_PLOT_HEIGHT = 260
LEGEND_COLUMNS, NUM_COLORS = 3, 6
MAX_INTERVALS = 5  # between the ticks of an axis
MAX_LOG_TICKS = 8
MIN_LOG_RATIO = 5  # values that span less are drawn on a linear axis
MAX_MARKED = 40  # a curve of more points is smoothed, and its points are not marked
SMOOTHED_SHARE = 0.02  # of the points, to each side

Point = tuple[float, float]


class Axis(NamedTuple):
    """Values `low` to `high` on pixels `start` to `stop`, evenly or by their logarithm."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool = False

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.stop - self.start)


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


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic axis, from `low` > 0 or less to `high` > `low` or more.

    1, 2 and 5 times the powers of ten where these are few, else powers of ten.
    """
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    fine = [float(f"{m}e{k}") for k in range(first, last + 1) for m in (1, 2, 5)]
    below = [x for x in fine if x <= low * (1 + 1e-9)]
    above = [x for x in fine if x >= high * (1 - 1e-9)]
    found = [below[-1], *(x for x in fine if below[-1] < x < above[0]), above[0]]
    if len(found) <= MAX_LOG_TICKS:
        return found
    step = math.ceil((last - first) / MAX_INTERVALS)
    return [float(f"1e{k}") for k in range(first, last + step, step)]


def line_chart(title: str, x_label: str, lines: Mapping[str, Sequence[Point]]) -> str:
    """An <svg> with a line for each name: through the mean y of its finite points at each x."""
    lines = {
        name: [(x, fmean(y for at, y in points if at == x)) for x in sorted({x for x, _ in points})]
        for name, points in lines.items()
    }
    xs, ys = zip(*(point for points in lines.values() for point in points), strict=True)
    top = TITLE_HEIGHT + LEGEND_HEIGHT * math.ceil(len(lines) / LEGEND_COLUMNS) + 6
    bottom, right = top + PLOT_HEIGHT, WIDTH - RIGHT_MARGIN
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_axis = Axis(x_ticks[0], x_ticks[-1], LEFT, right)
    y_axis = Axis(y_ticks[0], y_ticks[-1], bottom, top)
    parts = _frame(title, x_label, (x_axis, x_ticks), (y_axis, y_ticks))
    for i, (name, points) in enumerate(lines.items()):
        color = f"c{i % NUM_COLORS}"
        places = [(f"{x_axis.at(x):.1f}", f"{y_axis.at(y):.1f}") for x, y in points]
        path = " ".join(map(",".join, places))
        parts.append(f'<polyline class="line {color}" points="{path}"/>')
        parts += _marks(name, color, points, x_axis, y_axis)
        row, column = divmod(i, LEGEND_COLUMNS)
        x, y = LEFT + column * (right - LEFT) / LEGEND_COLUMNS, TITLE_HEIGHT + row * LEGEND_HEIGHT
        parts += [_rule(x, y + 8, x + 20, y + 8, f"line {color}")]
        parts += [_label(x + 26, y + 12, name, "dim")]
    return _svg("chart", WIDTH, bottom + BOTTOM_HEIGHT, title, x_label, parts)


def curve_chart(
    title: str,
    x_label: str,
    curves: Mapping[str, Sequence[Point]],
    *,
    log: bool = False,
    wide: bool = False,
) -> str:
    """An <svg> with a curve for each name, whose colours `legend` explains; nothing without values.

    A curve of many points is drawn twice: faintly as it is, boldly as a moving average.

    Args:
        curves: points by ascending x from 0 on; a y that is not finite is a gap. A curve without
            points keeps its colour for the chart where it has some.
        log: a logarithmic axis, if all values are positive and far enough apart.
    """
    finite = [(x, y) for points in curves.values() for x, y in points if math.isfinite(y)]
    if not finite:
        return ""
    xs, ys = zip(*finite, strict=True)
    log = log and min(ys) > 0 and max(ys) / min(ys) >= MIN_LOG_RATIO
    top, right = TITLE_HEIGHT + 10, (WIDE if wide else WIDTH) - RIGHT_MARGIN
    bottom = top + (WIDE_PLOT_HEIGHT if wide else PLOT_HEIGHT)
    stop = max(xs) or 1.0
    x_ticks = [x for x in ticks(0.0, stop) if x <= stop]
    y_ticks = log_ticks(min(ys), max(ys)) if log else ticks(min(ys), max(ys))
    x_axis = Axis(0.0, stop, LEFT, right)
    y_axis = Axis(y_ticks[0], y_ticks[-1], bottom, top, log)
    parts = _frame(title, x_label, (x_axis, x_ticks), (y_axis, y_ticks))
    if log:
        parts.append(_label(right, 16, "log scale", "dim", "end"))
    for i, (name, points) in enumerate(curves.items()):
        color, count = f"c{i % NUM_COLORS}", sum(math.isfinite(y) for _, y in points)
        if count > MAX_MARKED:
            parts.append(_path(f"curve raw {color}", name, points, x_axis, y_axis))
            points = smoothed(points)
        if count:
            parts.append(_path(f"curve {color}", name, points, x_axis, y_axis))
        if count <= MAX_MARKED:
            known = [(x, y) for x, y in points if math.isfinite(y)]
            parts += _marks(name, color, known, x_axis, y_axis)
    style = "chart wide" if wide else "chart"
    return _svg(style, right + RIGHT_MARGIN, bottom + BOTTOM_HEIGHT, title, x_label, parts)


def legend(names: Iterable[str]) -> str:
    """The colours of `curve_chart`, in the order of its curves."""
    items = (f'<li><i class="c{i % NUM_COLORS}"></i>{safe(x)}</li>' for i, x in enumerate(names))
    return f'<ul class="legend">{"".join(items)}</ul>'


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Each finite y as the mean of its neighbours: as many before it as there are, up to a limit,
    and as many behind it. So the start of a steep curve stays where it is."""
    reach = math.ceil(SMOOTHED_SHARE * len(points))
    known = [y if math.isfinite(y) else 0.0 for _, y in points]
    sums = [0.0, *accumulate(known)]
    counts = [0, *accumulate(math.isfinite(y) for _, y in points)]
    found = []
    for i, (x, y) in enumerate(points):
        near = min(reach, i)
        first, stop = i - near, min(i + near + 1, len(points))
        if math.isfinite(y):
            y = (sums[stop] - sums[first]) / (counts[stop] - counts[first])
        found.append((x, y))
    return found


def thinned(points: Sequence[Point], axis: Axis) -> list[Point]:
    """Of many points those that show: in each pixel the first, lowest, highest and last one.

    Where a pixel has no finite value, one that is not stays: the gap.
    """
    width = round(axis.stop - axis.start)
    if len(points) <= 2 * width:
        return list(points)
    pixels: dict[int, list[Point]] = {}
    for point in points:
        pixels.setdefault(math.floor(axis.at(point[0])), []).append(point)
    kept: list[Point] = []
    for here in pixels.values():
        known = [point for point in here if math.isfinite(point[1])]
        if known:
            low, high = (choose(known, key=lambda point: point[1]) for choose in (min, max))
            kept += sorted({known[0], low, high, known[-1]})
        else:
            kept.append(here[0])
    return kept


def _path(name: str, title: str, points: Sequence[Point], x_axis: Axis, y_axis: Axis) -> str:
    parts, is_open = [], False
    for x, y in thinned(points, x_axis):
        if math.isfinite(y):
            # a point between two gaps is a line of no length, which round ends make a dot
            move = "L" if is_open else "M"
            parts.append(f"{move}{x_axis.at(x):.1f},{y_axis.at(y):.1f}{'' if is_open else 'h0'}")
        is_open = math.isfinite(y)
    return f'<path class="{name}" d="{"".join(parts)}"><title>{safe(title)}</title></path>'


def _marks(name: str, color: str, points: Sequence[Point], x_axis: Axis, y_axis: Axis) -> list[str]:
    """A dot for each point, which tells its values."""
    found = []
    for x, y in points:
        place = f'cx="{x_axis.at(x):.1f}" cy="{y_axis.at(y):.1f}"'
        told = f"<title>{safe(name)}: {x:.6g}, {y:.6g}</title>"
        found.append(f'<circle class="{color}" {place} r="3">{told}</circle>')
    return found


def _frame(
    title: str, x_label: str, x: tuple[Axis, list[float]], y: tuple[Axis, list[float]]
) -> list[str]:
    """Title, axes, ticks and grid lines."""
    (x_axis, x_ticks), (y_axis, y_ticks) = x, y
    left, right, bottom, top = x_axis.start, x_axis.stop, y_axis.start, y_axis.stop
    parts = [_label(left, 16, title, "title")]
    for value in y_ticks:
        at = y_axis.at(value)
        parts += [_rule(left, at, right, at, "grid")]
        parts += [_label(left - 8, at + 4, f"{value:.8g}", "dim", "end")]
    for value in x_ticks:
        at = x_axis.at(value)
        parts += [_rule(at, bottom, at, bottom + 4, "axis")]
        parts += [_label(at, bottom + 17, f"{value:.8g}", "dim", "middle")]
    parts += [_rule(left, bottom, right, bottom, "axis"), _rule(left, top, left, bottom, "axis")]
    return [*parts, _label((left + right) / 2, bottom + 34, x_label, "", "middle")]


def _svg(
    name: str, width: float, height: float, title: str, x_label: str, parts: Iterable[str]
) -> str:
    box = f'viewBox="0 0 {width} {height}"'
    return (
        f'<svg class="{name}" {box} role="img" aria-label="{safe(title)} against {safe(x_label)}">'
        f"{''.join(parts)}</svg>"
    )


def _rule(x1: float, y1: float, x2: float, y2: float, name: str) -> str:
    return f'<line class="{name}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _label(x: float, y: float, text: str, name: str, anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{name}" {place}>{safe(text)}</text>'
