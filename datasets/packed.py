"""Archives in the place of folders of images: a .zip, .tar or .parquet, or a folder of such shards.

An archive is read as the folder that unpacking would make: its table of contents once, then each
image at its place in the file. So names, labels and fingerprint are those of the folder. (For a
.parquet, which does not tell the sizes of images, the mean of some rows is in the fingerprint.)
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from datasets.decoding import has_image_suffix
from utils.errors import DataError, one_line, show

BLOCK = 512  # of a tar
# A name with parts that are empty, `.` or `..`, or that systems read in ways of their own
UNSAFE = re.compile(r"(^|/)\.{0,2}(/|$)|[\\\0]|^[A-Za-z]:").search
Contents = Iterator[tuple[str, int, int, int, int, int]]  # a name, its bytes, and where they are


class Shard(NamedTuple):
    """An archive file, with its size and time of change when its table of contents was read."""

    path: Path
    state: tuple[int, int]

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def opened(self) -> BinaryIO:
        """The file, open once for all threads and forked processes, which read at offsets."""
        file = self.path.open("rb", buffering=0)
        status = os.fstat(file.fileno())
        if (status.st_size, status.st_mtime_ns) != self.state:
            raise DataError(f"{show(self.path)}: has changed since the start; start again")
        return file

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def column(self, group: int, number: int) -> Any:
        """A column of a row group of a .parquet. No reader of pyarrow's is for several threads."""
        from pyarrow.parquet import ParquetFile

        file = ParquetFile(self.path)
        names = [file.schema_arrow.names[number]]
        return file.read_row_group(group, columns=names, use_threads=False).column(0)


def _zip_contents(shard: Shard) -> Contents:
    with zipfile.ZipFile(shard.path) as archive:
        for info in archive.infolist():
            name, size, packed = info.orig_filename, info.file_size, info.compress_size
            method, offset = info.compress_type, info.header_offset
            if not info.flag_bits & 0x800 and not name.isascii():
                name = os.fsdecode(name.encode("cp437"))  # as the file is called once unpacked
            if info.flag_bits & 1 or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{name} is encrypted, or compressed by method {method}")
            if offset + 30 + packed > archive.start_dir or (packed != size and not method):
                raise ValueError(f"{name} is cut off: its {packed} bytes are not there")
            if not info.is_dir():
                yield name, size, offset, packed, method, info.CRC


def _tar_contents(shard: Shard) -> Contents:
    end = 0
    with tarfile.open(shard.path, "r:") as archive:
        for info in archive:
            if info.isreg() and not info.issparse():
                yield info.name, info.size, info.offset_data, info.size, -1, 0
            elif not info.isdir():
                raise ValueError(f"{info.name} is a link, a sparse file or a device")
            end = info.offset_data + -(-info.size // BLOCK) * BLOCK
            archive.members.clear()  # it keeps all that it reads
    file = shard.opened()
    if os.pread(file.fileno(), BLOCK, end) != bytes(BLOCK):  # which tarfile takes for the end
        raise ValueError("cut off or damaged")


def _parquet_contents(shard: Shard) -> Contents:
    """Images by their paths, or their numbers if they have none; whole numbers beside them."""
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(shard.path)
    names, types = file.schema_arrow.names, list(map(str, file.schema_arrow.types))
    images = [i for i, kind in enumerate(types) if re.match("struct<.*bytes: ", kind)]
    if len(images) != 1:
        raise ValueError(f"one column of images {{bytes, path}} is needed among {names}")
    for number in range(file.num_row_groups):
        group, fields = file.metadata.row_group(number), [f"{names[images[0]]}.path"]
        paths = file.read_row_group(number, columns=fields, use_threads=False).column(0)
        for row, path in enumerate(paths.to_pylist()):
            name = (path or {}).get("path") or f"{shard.path.stem}-{number}-{row:06d}.png"
            yield name, group.total_byte_size // group.num_rows, number, row, images[0], 0
            for column in (i for i, kind in enumerate(types) if re.match(r"u?int\d", kind)):
                yield f"{os.path.splitext(name)[0]}.{names[column]}", 0, number, row, column, 0


CONTENTS = {".zip": _zip_contents, ".tar": _tar_contents, ".parquet": _parquet_contents}


class Archive:
    """The files in one or several shards. The constructor raises a DataError if one is damaged, or
    a name is there twice or leads out."""

    def __init__(self, path: Path, shards: tuple[Shard, ...]) -> None:
        self.path, self.shards, rows = path, shards, array("q")
        self.row_of: dict[str, int] = {}
        self.folders: dict[str, tuple[list[str], list[str]]] = {"": ([], [])}  # folders and files
        for number, shard in enumerate(shards):
            try:
                for given, *place in CONTENTS[shard.path.suffix.lower()](shard):
                    name = given.removeprefix("./")
                    if name in self.row_of or UNSAFE(name):
                        raise ValueError(f"{given} is there twice, or no relative name with '/'")
                    folder, _, file = name.rpartition("/")
                    self._children(folder)[1].append(file)
                    self.row_of[name] = len(self.row_of)
                    rows.extend((number, *place))
            except Exception as error:  # of zipfile, tarfile and pyarrow a dozen kinds
                advice = "copy or pack it again, or pip install what is missing"
                fault = f"cannot be read ({show(one_line(error))}); {advice}"
                raise DataError(f"{show(shard.path)}: {fault}") from error
        self.rows = np.array(rows, np.int64).reshape(-1, 6)

    def _children(self, folder: str) -> tuple[list[str], list[str]]:
        if folder not in self.folders:
            above, _, name = folder.rpartition("/")
            self._children(above)[0].append(name)
            self.folders[folder] = ([], [])
        return self.folders[folder]

    def read(self, name: str) -> bytes:
        """The content of a file in it. Raises a ValueError if it is damaged."""
        number, size, offset, packed, method, crc = self.rows[self.row_of[name]].tolist()
        shard = self.shards[number]
        file = shard.opened()
        if shard.path.suffix.lower() == ".parquet":
            value = shard.column(offset, method)[packed].as_py()
            return value["bytes"] if isinstance(value, dict) else str(value).encode()
        if method >= 0:  # a zip has the name, and more of its own, before the content
            offset += 30 + sum(struct.unpack("<HH", os.pread(file.fileno(), 4, offset + 26)))
        content = os.pread(file.fileno(), packed, offset)
        if method == zipfile.ZIP_DEFLATED:  # into no more than it claims, and a byte to notice
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
        if len(content) != size or (method >= 0 and zlib.crc32(content) != crc):
            raise ValueError("its checksum in the archive is another")
        return content


class Member(NamedTuple):
    """A file or folder in an archive, with those methods of a `Path` that data sets use."""

    archive: Archive
    inside: str = ""  # its path in there with `/`; empty for all of it

    def __truediv__(self, name: object) -> Member:
        return Member(self.archive, f"{self.inside}/{name}".strip("/"))

    def __str__(self) -> str:
        return f"{self.archive.path}/{self.inside}".rstrip("/")

    @property
    def name(self) -> str:
        return self.inside.rpartition("/")[2]

    def is_dir(self) -> bool:
        return self.inside in self.archive.folders

    def is_file(self) -> bool:
        return self.inside in self.archive.row_of

    def stat(self) -> os.stat_result:
        size = self.archive.rows[self.archive.row_of[self.inside], 1]
        return os.stat_result((stat.S_IFREG, 0, 0, 1, 0, 0, int(size), 0, 0, 0))

    def open(self, _mode: str = "rb") -> BinaryIO:
        return io.BytesIO(self.archive.read(self.inside))

    def walk(self) -> Iterator[tuple[str, list[str], list[str]]]:
        """As `os.walk` from the top: (path, folders, files)."""
        todo = [self]
        for folder in todo:
            folders, files = map(list.copy, self.archive.folders[folder.inside])
            yield str(folder), folders, files
            todo += [folder / name for name in folders]

    def labels(self) -> list[tuple[str, Any]]:
        """What files with this extension, such as `1.cls` beside `1.jpg`, say of images: the label
        itself, or JSON with `label` or `cls`."""
        pairs, files = [], self.archive.row_of
        for name in filter(has_image_suffix, files):
            if (beside := f"{name.rpartition('.')[0]}.{self.inside}") in files:
                label = json.loads(self.archive.read(beside))
                is_object = isinstance(label, dict)
                pairs.append((name, label.get("label", label.get("cls")) if is_object else label))
        return pairs


ImagePath = Path | Member
_archive = functools.lru_cache(maxsize=4)(Archive)


def open_root(path: str | Path) -> ImagePath:
    """The folder `path` itself, or the archive there: one file, or a folder of shards and neither
    images nor folders. Raises a DataError if an archive cannot be read."""
    path = Path(path)
    shards = [path]
    if path.is_dir():
        folders, files = next(os.walk(path), ("", [], []))[1:]
        names = [name for name in folders + files if not name.startswith(".")]
        is_folder = any(name in folders or has_image_suffix(name) for name in names)
        shards = [] if is_folder else [path / name for name in sorted(names)]
    shards = [shard for shard in shards if shard.suffix.lower() in CONTENTS]
    if not shards or not all(shard.is_file() for shard in shards):
        return path
    states = [(s.st_size, s.st_mtime_ns) for s in (shard.stat() for shard in shards)]
    return Member(_archive(path, tuple(map(Shard, shards, states))))
