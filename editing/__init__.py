"""The commands of `edit.py`, a file each: one more is a file, and a line here."""

from editing import decode, grid, img2img, inpaint, interpolate, invert
from editing.command import Command

COMMANDS: dict[str, Command] = {
    "interpolate": interpolate.COMMAND,
    "img2img": img2img.COMMAND,
    "inpaint": inpaint.COMMAND,
    "invert": invert.COMMAND,
    "decode": decode.COMMAND,
    "grid": grid.COMMAND,
}
