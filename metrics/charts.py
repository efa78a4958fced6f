"""Charts of classes as HTML: bars, and a shaded matrix.

Their colours are in the style sheet of `metrics.html`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from reporting.html import safe

MAX_CLASSES, WORST = 100, 20  # with more classes than that, only the worst are shown


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
