"""Contact sheets: grids of images with words above and beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import cache, partial
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from utils.images import GRID_BACKGROUND, GRID_PADDING, make_grid, to_array

if TYPE_CHECKING:
    from PIL import ImageFont

Texts = Sequence[str]
FONT_SIZE = 12  # pixels
LINE_HEIGHT = 16  # pixels
BASELINE = 13  # pixels from the top of a line down to the foot of its letters
MARGIN = 4  # pixels between words and what they stand beside
TEXT_COLOUR = "#ebebeb"  # Pillow reads it as the grey level 235, too
# Pillow's own font has Latin letters only. These have Chinese ones, too; Linux, Windows, macOS.
WIDE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "msyh.ttc",
    "simhei.ttf",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
)


@cache
def wide_font() -> ImageFont.FreeTypeFont | None:
    """The first of `WIDE_FONTS` that is installed, or None."""
    from PIL import ImageFont

    for name in WIDE_FONTS:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, FONT_SIZE)
    return None


def class_captions(labels: Sequence[int], class_names: Sequence[str]) -> list[str]:
    """A caption for each label: the name of its class, or `class 3` if it has no name, or one with
    letters that no installed font has."""
    names = {label: name for label, name in enumerate(class_names) if name.strip()}
    if wide_font() is None:
        names = {label: name for label, name in names.items() if name.isascii()}
    return [names.get(label, f"class {label}") for label in labels]


def contact_sheet(
    images: Tensor, rows: list[list[int]], *, above: Sequence[Texts] = (), left: Texts = ()
) -> Tensor:
    """A picture, uint8 (C, H', W'), of images uint8 (B, C, H, W) with words beside them.

    Args:
        rows: the indices of the images of each row, see `make_grid`.
        above: for each row nothing, or a text for each cell; equal texts side by side are written
            once. What does not fit is cut short.
        left: a text for each row.
    """
    from PIL import ImageDraw, ImageFont

    font = ImageFont.load_default(FONT_SIZE)
    if not all(text.isascii() for texts in (*above, left) for text in texts):
        font = wide_font() or font
    gutter = max([round(font.getlength(text)) + 2 * MARGIN for text in left if text], default=0)
    strips = [make_grid(images, [row]) for row in rows]
    width = max(strip.shape[2] for strip in strips)
    parts = []
    for r, strip in enumerate(strips):
        texts = above[r] if above else ()
        line, middle = LINE_HEIGHT if any(texts) else 0, (strip.shape[1] - LINE_HEIGHT) // 2
        cell = (strip.shape[2] - GRID_PADDING) // len(rows[r])
        around = (gutter, width - strip.shape[2], line, 0)  # left, right, above, below
        strip = strip if r == len(strips) - 1 else strip[:, :-GRID_PADDING]  # the next one has it
        part = Image.fromarray(to_array(F.pad(strip, around, value=GRID_BACKGROUND)))
        write = partial(ImageDraw.Draw(part).text, fill=TEXT_COLOUR, font=font, anchor="ls")
        for text, run in groupby(range(len(texts)), key=texts.__getitem__):
            columns = list(run)
            space = len(columns) * cell - GRID_PADDING
            write((gutter + GRID_PADDING + columns[0] * cell, BASELINE), _fit(text, font, space))
        if left:
            write((MARGIN, line + middle + BASELINE), left[r])
        parts.append(np.array(part))
    sheet = torch.from_numpy(np.concatenate(parts))
    return sheet[None] if sheet.dim() == 2 else sheet.permute(2, 0, 1)


def _fit(text: str, font: ImageFont.ImageFont, space: int) -> str:
    """`text`, cut short with two dots if it is wider than `space` pixels."""
    shown = text
    while shown and font.getlength(shown) > space:
        text = text[:-1]
        shown = text and text + ".."
    return shown
