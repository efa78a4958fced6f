"""Pages that need nothing but themselves, made from the templates in `reporting/templates`.

A page has no script and asks for no address, so it can be mailed, archived and opened without a
network. Names, paths and messages from elsewhere are escaped by jinja2; the page is ASCII.
"""

from __future__ import annotations

import base64
import functools
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from markupsafe import Markup
from PIL import Image

if TYPE_CHECKING:
    from jinja2 import Environment

MAX_SHRINK = 8  # pictures are shown at an eighth of their size before they are left out
MAX_TEXT = 2000  # characters of one value
NOTHING = "\u2013"  # what stands in a table where a value is missing

Table = tuple[list[str], list[list[str]]]  # heads of the columns, and the rows


class Picture(NamedTuple):
    """A picture to show on a page. The last two fields are those of its file, see `render_page`."""

    image: np.ndarray  # uint8 (H, W) or (H, W, 3)
    title: str
    caption: str = ""
    shrink: int = 1  # the sides of the file are those of the image divided by that
    source: Markup = Markup("")  # the file as a data URI; empty if it is left out


Pictures = Mapping[str, Picture]  # in the order to show them


def render_page(
    template: str, context: Mapping[str, Any], pictures: Pictures, *, max_bytes: int
) -> str:
    """Fill a template. It finds the pictures, in their order and with their files, as `figures`.

    As long as the page is longer than `max_bytes`, its largest picture is halved, and left out
    after an eighth of its size; the page says so. What is too long without any picture stays so.
    """
    figures = {name: with_file(picture, 1) for name, picture in pictures.items()}
    page = environment().get_template(template)
    while True:
        text = page.render(context, figures=figures, max_bytes=max_bytes)
        text = text.encode("ascii", "xmlcharrefreplace").decode()
        name = max(figures, key=lambda name: len(figures[name].source), default="")
        if len(text) <= max_bytes or not name or not figures[name].source:
            return text
        figures[name] = with_file(figures[name], 2 * figures[name].shrink)


def with_file(picture: Picture, shrink: int) -> Picture:
    """The picture with a PNG file whose sides are divided by `shrink`; above `MAX_SHRINK` none."""
    if shrink > MAX_SHRINK:
        return picture._replace(shrink=shrink, source=Markup(""))
    file = io.BytesIO()
    Image.fromarray(picture.image).reduce(shrink).save(file, "PNG", optimize=True)
    return picture._replace(shrink=shrink, source=data_uri("image/png", file.getvalue()))


def data_uri(media_type: str, content: bytes) -> Markup:
    """A file as an address that holds the file itself."""
    return Markup(f"data:{media_type};base64,{base64.b64encode(content).decode()}")


def to_text(value: Any) -> Any:
    """A value of a report or config as text; the end of a very long one is left out.

    Whatever a template prints passes through here, and finished HTML (`Markup`) as it is.
    """
    if isinstance(value, Markup):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    if not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False, default=str)
    if len(value) > MAX_TEXT:
        return f"{value[:MAX_TEXT]} ... ({len(value) - MAX_TEXT} more characters)"
    return value


def to_number(value: Any) -> str:
    """A measured value with four decimals, or four digits where decimals would say nothing.

    A mapping (mean, std, min) takes a line for each of its entries; anything else is text.
    """
    if value is None:
        return NOTHING
    if isinstance(value, Mapping):
        return "\n".join(f"{key} {to_number(part)}" for key, part in value.items())
    if not isinstance(value, float):
        return to_text(value)
    return f"{value:.4f}" if 0.001 <= abs(value) < 1e6 else f"{value:.4g}"


@functools.cache
def environment() -> Environment:
    """What fills the templates; made when the first page is, so that no script starts slower."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        finalize=to_text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": to_number, "text": to_text}
    return made
