"""Ways to walk a grid of tokens, and the permutations between them.

A path is a permutation of the cells of an (h, w) grid numbered row by row: path[s] is the cell
visited at step s.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

Scan = Literal["cross4", "row", "row_bidir", "zigzag8"]


def scan_paths(scan: Scan, grid: tuple[int, int]) -> list[Tensor]:
    """The cycle of paths (h * w,) that `scan` means.

    cross4: rows forward and backward, columns forward and backward (DiM, arXiv 2405.14224).
    row: rows forward only. row_bidir: rows forward and backward.
    zigzag8: snakes, whose every step goes to a neighbouring cell, from each corner along rows and
    along columns (ZigMa, arXiv 2403.13802).
    """
    cells = torch.arange(grid[0] * grid[1], device="cpu").view(grid)
    rows, columns = cells.flatten(), cells.t().flatten()
    cross = [rows, rows.flip(0), columns, columns.flip(0)]
    corners = [cells, cells.flip(0, 1), cells.flip(1), cells.flip(0)]
    snakes = [_snake(view) for corner in corners for view in (corner, corner.t())]
    return {"row": cross[:1], "row_bidir": cross[:2], "cross4": cross, "zigzag8": snakes}[scan]


def _snake(cells: Tensor) -> Tensor:
    """The cells (h, w) row by row, but every second row backwards: (h * w,)."""
    cells = cells.clone()
    cells[1::2] = cells[1::2].flip(1)
    return cells.flatten()


def mirrored(depth: int, cycle_length: int) -> list[int]:
    """Which path each of `depth` blocks walks: the cycle, then in the second half backwards, so
    that blocks i and depth - 1 - i walk the same one and long skips join equal orders."""
    return [min(i, depth - 1 - i) % cycle_length for i in range(depth)]


def moves(paths: list[Tensor]) -> list[Tensor]:
    """Permutations between consecutive orders, from row by row through all paths and back.

    tokens[moves[i]] brings tokens from the order of path i - 1 into that of path i; the last move
    restores the rows.
    """
    natural = torch.arange(len(paths[0]), device="cpu")
    orders = [natural, *paths, natural]
    return [before.argsort()[after] for before, after in pairwise(orders)]
