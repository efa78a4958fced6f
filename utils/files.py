"""Writing files whole, and naming what is in them: used wherever something is put on disk."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import re
import socket
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from utils.errors import ConfigError, UserError, one_line, show, told_as

if TYPE_CHECKING:  # the list of runs is there before numpy would be
    import numpy as np

KEY_DIGITS = 12
ARRAY_EXTENSIONS = (".npy", ".npz", ".tif", ".tiff")
PICTURE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp")
IMAGE_EXTENSIONS = (*PICTURE_EXTENSIONS, *ARRAY_EXTENSIONS)
MAX_NAME_BYTES = 200  # file systems take 255, and suffixes follow
# Arrays of pixels or features shrink to a tenth; a file of zeros that fills the memory, to a 1000th
MAX_RATIO, UNCHECKED_BYTES = 100, 2**26
# Images that nothing here reads, whatever their name
FOREIGN = re.compile(
    rb"(?P<GIF>GIF8)|(?P<TIFF>II[*+]\0|MM\0[*+])|(?P<AVIF>.{4}ftypavi)|(?P<SVG><svg)|(?P<PDF>%PDF)|"
    rb"(?P<HEIC>.{4}ftyp(?:hei|hev|mif|msf))|(?P<JPEG_XL>\xff\n|.{4}JXL )|(?P<JPEG_2000>.{4}jP  )|"
    rb"(?P<Photoshop>8BPS)|(?P<video>.{4}ftyp|\x1aE\xdf\xa3)",
    re.DOTALL,
)
# Python 3.11 now and then fails (SystemError) where two threads at a time parse literals, which the
# headers of arrays are.
PARSING = threading.Lock()
MAX_HEADER_BYTES = 10_000  # what numpy reads without a word on files one should trust
LOOKS_LIKE = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: git lfs pull gets it",
    b"<": "a web page, not the file itself: download it again",
    b"\x93NUMPY": "a single array: an .npy file, not an .npz",
}


def expand_home(path: str) -> str:
    """`path` with the home directory for a leading `~` or `~user`, as in a shell. Raises a
    ConfigError if there is no such user, or the path is empty."""
    if not path or "\0" in path:
        raise ConfigError("give a path, or leave it out")
    if (path := os.path.expanduser(path)).startswith("~"):
        raise ConfigError(f"{path}: no such user; write ./{path} if that is its name")
    return path


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the body ends; makes its folder.

    At every moment readers see the old file or the whole new one. If the body raises, `path` stays
    as it was and the temporary file is removed. A killed process leaves a file named
    `*.tmp-PID`, which the next run in that folder sweeps up.
    """
    if path.exists() and not path.is_file():  # a device or a pipe would be gone
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file so that readers see the old or the new one; makes its folder. An
    OSError leaves `path` as it was. Broken bytes of file names are escaped, as in JSON."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def socket_timeout(seconds: float) -> Iterator[None]:
    """Bound how long the body's downloads wait for an answer."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def make_output_dir(path: str | Path, option: str) -> None:
    """Make a folder for results before hours of work, not after. A UserError tells that it cannot
    be made or written to, and the command-line option that named it."""
    refused = f"{option} {show(path)}: cannot be written"
    with told_as(UserError, refused, OSError, ValueError):  # a ValueError: a zero byte in the name
        Path(path).mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise UserError(refused)


def is_writable(folder: Path) -> bool:
    """Whether one may write into a folder, or make it where there is none yet."""
    there = next(path for path in (folder, *folder.parents, Path()) if path.exists())
    return os.access(there, os.W_OK)


def is_file_name(name: str) -> bool:
    """Whether `name` can be that of a file or a folder, with a suffix or without."""
    is_plain = name.isprintable() and not {"/", "\\"} & set(name) and name.strip(". ")
    return bool(is_plain) and len(name.encode()) <= MAX_NAME_BYTES


def output_name(name: str) -> str:
    """What the names of files begin with that `--output_name` names, with or without the suffix of
    one. A ConfigError if no names in a folder can begin like that."""
    name = re.sub(r"(?i)(?<=.)\.(png|gif|npz)$", "", name)
    if not is_file_name(name):
        form = f"give a file name without folders, at most {MAX_NAME_BYTES} bytes"
        raise ConfigError(f"--output_name {one_line(ascii(name), 80)}: {form}")
    return name


def write_each(outputs: Mapping[Path, Callable[[Path], object]]) -> Iterator[Path]:
    """Write what was asked for, and yield each path; one that cannot be written costs no other.
    At the end a UserError tells of those, a line each."""
    failed = []
    for path, write in outputs.items():
        try:
            write(path)
        except Exception as error:  # of disks, and of Pillow and ffmpeg
            failed.append(f"{show(path)}: cannot be written ({one_line(error)})")
        else:
            yield path
    if failed:
        raise UserError("\n       ".join(failed))


def check_inputs_stay(outputs: Iterable[Path], *inputs: str | None) -> None:
    """Raise a ConfigError if an output, a file or (without a suffix) a folder of pictures, would
    replace an input file, or pictures of an input folder, or be added to these as a folder."""
    for path, given in product(outputs, filter(None, inputs)):
        target, source = path.resolve(), Path(given).resolve()
        inside = source in target.parents and (not path.suffix or target.exists())
        if target == source or inside or (source.is_file() and target == source.parent):
            message = f"{show(path)}: the input {show(given)} would not stay as it is"
            raise ConfigError(f"{message}; write to another place")


def numbered(num_images: int) -> list[str]:
    """What picture files are called, without their suffix: 000000, 000001, ..."""
    return [f"{i:06d}" for i in range(num_images)]


def check_picture_folder(folder: Path, stems: Sequence[str], suffix: str) -> None:
    """Raise a UserError if older pictures in `folder` would stay among the new ones, which are
    called `stems` and `suffix`."""
    replaced = {stem + suffix for stem in stems}
    names = {path.name for path in folder.glob("*.*") if path.suffix.lower() in IMAGE_EXTENSIONS}
    if others := sorted(names - replaced):
        older = f"{folder} holds {len(others)} pictures ({others[0]} ...)"
        advice = "choose another folder, or remove them"
        message = f"{older} that these {len(stems)} would not replace; {advice}"
        raise UserError(f"the images are to be saved, but {message}")


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_key(depends_on: Mapping[str, Any] | Sequence[Any]) -> str:
    """12 hex digits for a file name, which change with anything in `depends_on` (as JSON)."""
    content = json.dumps(depends_on, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:KEY_DIGITS]


def looks_like(path: Path) -> str | None:
    """What a file with another content than its name says is known to be: a Git LFS pointer, a web
    page, plain text. None if nothing is known of it; an OSError if it cannot be read."""
    with path.open("rb") as file:
        head = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    if match := FOREIGN.match(head):
        return f"{match.lastgroup} content under another name: convert it"
    for start, what in LOOKS_LIKE.items():
        if head.startswith(start):
            return what
    is_text = head.isascii() and head.decode("ascii", "replace").split() and b"\0" not in head
    return f"text ({one_line(head.decode('ascii'), 40)!r} ...)" if is_text else None


def read_npz(
    path: str | Path, names: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Read the arrays `names` of an .npz, and those of `optional` that it has; no others.

    What an array will take is known from its header before it is read, and code in the file is
    never run. Raises a ValueError that says in one line what is wrong, whatever it is: a missing,
    foreign or damaged file, an absent array, one that grows out of proportion as it is unpacked.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise ValueError("no such file" if not path.exists() else "not a regular file")
        if not zipfile.is_zipfile(path):
            raise ValueError(looks_like(path) or "no .npz file, or cut off")
        with zipfile.ZipFile(path) as archive:
            members = {name.removesuffix(".npy"): name for name in archive.namelist()}
            # A damaged table of contents may lose an array, which would pass for an absent one
            entries = archive.infolist()
            if len(members) < len(entries) or any(entry.comment for entry in entries):
                raise ValueError("its table of arrays is damaged, or has a name twice")
            for entry in entries:  # is each called the same in both places of the file?
                archive.open(entry).close()
            if absent := [name for name in names if name not in members]:
                holds = ", ".join(sorted(members)) or "nothing"
                raise ValueError(f"no array {' or '.join(absent)} in it; it holds {holds}")
            wanted = [name for name in (*names, *optional) if name in members]
            size = path.stat().st_size
            return {name: read_member(archive, members[name], size) for name in wanted}
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds for damaged files
        raise ValueError(show(one_line(error))) from error


def write_npz(path: Path, **arrays: Any) -> None:
    """Write arrays to an .npz, compressed: the whole file, or after an error what was there."""
    import numpy as np

    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_member(archive: zipfile.ZipFile, name: str, archive_bytes: int) -> np.ndarray:
    """The array of that name in an .npz of so many bytes, see `read_npz`."""
    info = archive.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed in a way that numpy does not write")
    packed = min(info.compress_size, archive_bytes)  # a hostile file claims any size
    if info.file_size > max(UNCHECKED_BYTES, MAX_RATIO * packed):
        sizes = f"{packed:,} bytes would become {info.file_size:,}"
        raise ValueError(f"{name}: {sizes}, as no array of pixels or features does")
    with archive.open(info) as file:
        return read_npy(file, name, info.file_size)


def read_npy(file: IO, name: str, size: int, header_only: bool = False) -> np.ndarray:
    """The array of an .npy of `size` bytes, or one of its shape and type without its numbers."""
    import numpy as np
    from numpy.lib import format as npy

    head = io.BytesIO(file.read(MAX_HEADER_BYTES))
    is_first = npy.read_magic(head) == (1, 0)
    read_header = npy.read_array_header_1_0 if is_first else npy.read_array_header_2_0
    with PARSING:
        shape, is_fortran, dtype = read_header(head)
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, which could run code")
    if head.tell() + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{name} says {shape} {dtype}, but has {size} bytes")
    if header_only:
        return np.broadcast_to(np.zeros((), dtype), shape)
    array = np.empty(shape, dtype, order="F" if is_fortran else "C")
    file.seek(head.tell())
    if file.readinto(array.reshape(-1, order="A").view(np.uint8)) != array.nbytes:
        raise ValueError(f"{name} ends too early")
    return array
