"""Kinds of files that a folder of images may hold, each with what becomes of it."""

from __future__ import annotations

import functools
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tests.image_files import png_claiming


class Kind(NamedTuple):
    """One kind of file."""

    content: Callable[[], bytes]
    message: str | None  # of the error; None: it is a good image
    name: str | bytes = "b.png"


def picture(mode: str = "RGB", size: tuple[int, int] = (24, 24)) -> Image.Image:
    """A random one; `size` is (height, width)."""
    shape = (*size, len(mode)) if len(mode) > 1 else size
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def cut(kind: str, share: float = 0.6) -> bytes:
    data = encoded(picture(size=(64, 64)), kind)
    return data[: int(len(data) * share)]


def chunk(name: bytes, data: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(name + data))
    return struct.pack(">I", len(data)) + name + data + crc


def png(
    raw: bytes | None, *extra: bytes, side: int = 2, depth: int = 8, colour_type: int = 0
) -> bytes:
    """A PNG of these uncompressed rows (None: no pixel data), with more chunks before them."""
    header = struct.pack(">IIBBBBB", side, side, depth, colour_type, 0, 0, 0)
    pixels = b"" if raw is None else chunk(b"IDAT", zlib.compress(raw, 1))
    parts = (chunk(b"IHDR", header), *extra, pixels, chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


BOMB_BYTES = 200_000_000  # that a small file unpacks to
GREY_ROWS = bytes([0, 7, 7]) * 2  # of `png`: two rows of two pixels


def sixteen_bit_rgb() -> bytes:
    return png((b"\0" + struct.pack(">6H", *[0x1234] * 6)) * 2, depth=16, colour_type=2)


@functools.cache
def text_bomb() -> bytes:
    text = zlib.compress(bytes(BOMB_BYTES), 1)
    return png(GREY_ROWS, chunk(b"zTXt", b"key\0\0" + text))


@functools.cache
def pixel_bomb() -> bytes:
    """Many more rows than the header announces: they are never unpacked."""
    return png(GREY_ROWS + bytes(BOMB_BYTES))


def broken_stream() -> bytes:
    data = bytearray(encoded(picture()))
    middle = data.index(b"IDAT") + len(data) // 2
    data[middle : middle + 20] = bytes(20)
    return bytes(data)


def jpeg_claiming(side: int) -> bytes:
    data = bytearray(encoded(picture(), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", side, side)
    return bytes(data)


def bmp_claiming(side: int) -> bytes:
    data = bytearray(encoded(picture(), "BMP"))
    data[18:26] = struct.pack("<ii", side, side)
    return bytes(data)


def webp_claiming(side: int) -> bytes:
    """An animation whose one frame is small on a huge canvas."""
    still = encoded(picture(), "WEBP", lossless=True)[12:]
    canvas = (side - 1).to_bytes(3, "little")
    frame = bytes(6) + (23).to_bytes(3, "little") * 2 + bytes(4) + still
    parts = [(b"VP8X", b"\x02\0\0\0" + canvas * 2), (b"ANIM", bytes(6)), (b"ANMF", frame)]
    body = b"WEBP" + b"".join(n + struct.pack("<I", len(d)) + d for n, d in parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(size=(20, 30)), "JPEG", exif=exif)


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), (shade,) * 3) for shade in (50, 200)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def transparent_palette() -> bytes:
    return encoded(picture().quantize(8), transparency=bytes(range(0, 256, 32)))


KINDS: dict[str, Kind] = {
    # --- good images, however odd
    "turned by EXIF": Kind(turned, None, "b.jpg"),
    "CMYK": Kind(lambda: encoded(picture("CMYK"), "JPEG"), None, "b.jpg"),
    "progressive": Kind(lambda: encoded(picture(), "JPEG", progressive=True), None, "b.jpg"),
    "16-bit grey": Kind(lambda: encoded(Image.fromarray(np.full((9, 9), 500, np.uint16))), None),
    "16-bit RGB": Kind(sixteen_bit_rgb, None),
    "one bit": Kind(lambda: encoded(picture("L").convert("1")), None),
    "palette with transparency": Kind(transparent_palette, None),
    "grey with alpha": Kind(lambda: encoded(picture("LA")), None),
    "animated PNG": Kind(lambda: animated("PNG"), None),
    "animated WebP": Kind(lambda: animated("WEBP"), None, "b.webp"),
    "two pictures in a JPEG": Kind(lambda: animated("MPO"), None, "b.jpg"),
    "PNG named jpg": Kind(lambda: encoded(picture()), None, "b.jpg"),
    "JPEG named png": Kind(lambda: encoded(picture(), "JPEG"), None),
    "upper-case extension": Kind(lambda: encoded(picture(), "BMP"), None, "b.BMP"),
    "name that differs by case": Kind(lambda: encoded(picture()), None, "A.PNG"),
    "name that is no UTF-8": Kind(lambda: encoded(picture()), None, b"b\xff\xfe.png"),
    "line break in the name": Kind(lambda: encoded(picture()), None, "b\n.png"),
    "one pixel": Kind(lambda: encoded(picture(size=(1, 1))), None),
    "one line": Kind(lambda: encoded(picture(size=(1, 500))), None),
    "garbage behind": Kind(lambda: encoded(picture()) + b"garbage" * 99, None),
    "broken EXIF": Kind(lambda: png(GREY_ROWS, chunk(b"eXIf", b"II*\0garbage")), None),
    "pixel bomb": Kind(pixel_bomb, None),
    "text-bomb": Kind(text_bomb, None),
    # --- no images, or broken ones
    "empty": Kind(bytes, "(0 bytes)"),
    "zero bytes": Kind(lambda: bytes(5000), "not a readable"),
    "text": Kind(lambda: b"this is no image", "not a readable"),
    "error page": Kind(lambda: b"<html>404</html>", "not a readable", "b.jpg"),
    "GIF named png": Kind(lambda: encoded(picture("L"), "GIF"), "not a readable"),
    "TIFF named jpg": Kind(lambda: encoded(picture(), "TIFF"), "not a readable", "b.jpg"),
    "header cut": Kind(lambda: encoded(picture())[:20], "b.png"),
    "truncated PNG": Kind(lambda: cut("PNG"), "broken"),
    "truncated JPEG": Kind(lambda: cut("JPEG"), "broken", "b.jpg"),
    "truncated WebP": Kind(lambda: cut("WEBP"), "b.webp", "b.webp"),
    "truncated BMP": Kind(lambda: cut("BMP"), "broken", "b.bmp"),
    "broken pixels": Kind(broken_stream, "broken"),
    "no pixels": Kind(lambda: png(None), "broken"),
    "no width": Kind(lambda: png(b"", side=0), "not a readable"),
    "PNG bomb": Kind(lambda: png_claiming(60_000, 60_000), "too large"),
    "PNG bomb that Pillow only warns of": Kind(lambda: png_claiming(12_000, 12_000), "too large"),
    "PNG bomb just too large": Kind(lambda: png_claiming(8001, 8001), "too large"),
    "JPEG bomb": Kind(lambda: jpeg_claiming(65_000), "too large", "b.jpg"),
    "BMP bomb": Kind(lambda: bmp_claiming(30_000), "too large", "b.bmp"),
    "WebP bomb": Kind(lambda: webp_claiming(16_000), "too large", "b.webp"),
}
GOOD = [name for name, kind in KINDS.items() if kind.message is None]
BAD = [name for name, kind in KINDS.items() if kind.message is not None]


def write_kind(folder: Path, name: str, prefix: str = "") -> Path:
    """The file, whose name starts with `prefix`."""
    kind = KINDS[name]
    path = folder / (prefix + os.fsdecode(kind.name))
    path.write_bytes(kind.content())
    return path
