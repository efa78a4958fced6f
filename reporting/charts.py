"""Line charts, drawn by matplotlib as SVG.

Titles and legends, which hold names from elsewhere, are not part of the drawing: the page shows
them as text.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from markupsafe import Markup

from reporting.pages import data_uri
from utils.errors import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#2864c8", "#d9600a", "#1a8a44", "#a23fbb", "#c9245c", "#0b8299", "#8a6d1d", "#555b66")
DASHES = ("solid", "dashed", "dotted")  # words of both CSS and matplotlib
SIZE, WIDE_SIZE = (4.2, 2.6), (11.6, 3.4)  # inches, of 96 pixels each
MIN_LOG_RATIO = 5  # values that span less are drawn on a linear axis
MAX_FINE_RATIO = 100  # between the ends of an axis with ticks at 1, 2, 3, 5, 10, 20, ...
MAX_MARKED = 40  # a line of more points is smoothed, and its points are not marked
SMOOTHED_SHARE = 0.02  # of the points, to each side
STYLE = Path(__file__).with_name("chart.mplstyle")

Lines = Mapping[str, Sequence[tuple[float, float]]]  # name -> points (x, y)
Legend = dict[str, tuple[str, str]]  # name of a line -> its colour and its dashes


class Chart(NamedTuple):
    """A drawn chart."""

    title: str
    x_label: str
    source: Markup  # a data URI; empty if it could not be drawn
    note: str  # "log scale", or why it could not be drawn
    is_wide: bool


def legend_of(names: Iterable[str]) -> Legend:
    """The look of each line of a chart, by the order of the lines. It repeats after 24."""
    return dict(zip(names, cycle((c, dash) for dash in DASHES for c in COLORS), strict=False))


def draw_chart(
    title: str, x_label: str, lines: Lines, *, log: bool = False, wide: bool = False
) -> Chart | None:
    """Draw a line for each name; None if there is no finite value to draw.

    A chart that cannot be drawn says why, because a page is not worth losing for it.

    Args:
        lines: points (x, y) by ascending x; a y that is not finite is a gap. A line without points
            keeps its colour for the charts where it has some.
        log: use a logarithmic y axis if all values are positive and far enough apart.
    """
    ys = [y for points in lines.values() for _, y in points if math.isfinite(y)]
    if not ys:
        return None
    log = log and min(ys) > 0 and max(ys) / min(ys) >= MIN_LOG_RATIO
    source, note = Markup(""), "log scale" if log else ""
    try:
        import matplotlib.style
        from matplotlib.figure import Figure

        with matplotlib.style.context(["default", STYLE]):
            figure, file = Figure(WIDE_SIZE if wide else SIZE, layout="constrained"), io.BytesIO()
            draw_lines(figure.add_subplot(xlabel=x_label, yscale="log" if log else "linear"), lines)
            figure.savefig(file, format="svg", metadata={"Date": None})
        source = data_uri("image/svg+xml", file.getvalue())
    except Exception as error:
        note = f"not drawn: {one_line(error)}"
    return Chart(title, x_label, source, note, wide)


def draw_lines(axes: Axes, lines: Lines) -> None:
    """Draw the lines of `draw_chart`, and set the ticks.

    A line of many points is drawn twice: faintly as it is, boldly as a moving average. Of few
    points each is marked; of many only those that stand alone between two gaps.
    """
    for name, (color, dash) in legend_of(lines).items():
        xs, ys = np.array(lines[name], dtype=float).reshape(-1, 2).T
        marked = known = np.isfinite(ys)
        if known.sum() > MAX_MARKED:
            axes.plot(xs, ys, color=color, linewidth=0.8, alpha=0.35)
            ys, beside = smoothed(ys), np.pad(known, 1)
            marked = known & ~beside[:-2] & ~beside[2:]
        places = np.flatnonzero(marked).tolist()
        axes.plot(xs, ys, color=color, linestyle=dash, marker="o", markevery=places)
    if axes.get_yscale() == "log":
        low, high = axes.dataLim.intervaly
        subs = (1, 2, 3, 5) if high < MAX_FINE_RATIO * low else (1,)
        axes.yaxis.get_major_locator().set_params(subs=subs)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter("{x:.8g}")
    axes.yaxis.set_major_formatter("{x:.8g}")
    axes.grid(axis="y")


def smoothed(ys: np.ndarray) -> np.ndarray:
    """Each finite value of `ys` (N,) as the mean of the finite ones around it.

    The window reaches equally far to both sides, and near the start only as far as there are
    values before it. So the start of a steep curve stays where it is.
    """
    known, places = np.isfinite(ys), np.arange(len(ys))
    sums, counts = (np.append(0, np.cumsum(x)) for x in (np.where(known, ys, 0), known))
    reach = np.minimum(places, math.ceil(SMOOTHED_SHARE * len(ys)))
    first, stop = places - reach, np.minimum(places + reach + 1, len(ys))
    means = (sums[stop] - sums[first]) / np.maximum(counts[stop] - counts[first], 1)
    return np.where(known, means, np.nan)
