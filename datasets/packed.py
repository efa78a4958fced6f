"""Archives in the place of folders of images: .zip, .tar, .parquet, or a folder of such shards.
Names, labels and, but for .parquet, fingerprint are those of the folder that unpacking makes."""

from __future__ import annotations

import contextlib
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

# A name with parts that are empty, `.` or `..`, or that systems read in ways of their own
UNSAFE = re.compile(r"(^|/)\.{0,2}(/|$)|[\\\0]|^[A-Za-z]:").search
# What the folder of a split is called, whatever the case, digits and signs: Test-Set, train2017,
# images_val. The last of each are the Chinese words.
SPLIT_WORDS = {
    "train": "train|training|trn|\u8bad\u7ec3",
    "test": "test|testing|tst|\u6d4b\u8bd5",
    "val": "val|valid|validate|validation|dev|eval|evaluation|holdout|\u9a8c\u8bc1",
}
_AROUND = "(?:data|sets?|images?|imgs?|splits?|pictures|photos|files|samples|folder|\u96c6)*"
_SPLIT_NAME = re.compile(
    _AROUND + "(?:" + "|".join(f"(?P<{k}>{v})" for k, v in SPLIT_WORDS.items()) + ")" + _AROUND
)


def split_of(name: str) -> str | None:
    """The split, a key of `SPLIT_WORDS`, that a folder of this name is; None if it is none."""
    match = _SPLIT_NAME.fullmatch(re.sub(r"[\W\d_]+", "", name.casefold()))
    return match and match.lastgroup


@functools.lru_cache(maxsize=64)
def _opened(path: Path, state: tuple[int, int]) -> BinaryIO:
    """The file, open once for threads and forks, which read at offsets; `state`: size and time."""
    file = path.open("rb", buffering=0)
    status = os.fstat(file.fileno())
    if (status.st_size, status.st_mtime_ns) != state:
        raise DataError(f"{show(path)}: has changed since the start; start again")
    return file


def _zip_contents(path: Path, _: Archive) -> Iterator[tuple[Any, ...]]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name, size, packed = info.orig_filename, info.file_size, info.compress_size
            method, offset = info.compress_type, info.header_offset
            if not info.flag_bits & 0x800 and not name.isascii():
                name = os.fsdecode(name.encode("cp437"))  # as the file is called once unpacked
            if info.flag_bits & 1 or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{name} is encrypted, or compressed by method {method}")
            is_whole = offset + 30 + packed <= archive.start_dir and (method or packed == size)
            if not is_whole or info.comment:  # a false length of one would hide the next files
                raise ValueError(f"{name}: {packed} bytes are not there, or it has a comment")
            if not info.is_dir():
                yield name, size, offset, packed, method, info.CRC


def _tar_contents(path: Path, _: Archive) -> Iterator[tuple[Any, ...]]:
    end, block = 0, tarfile.BLOCKSIZE
    with tarfile.open(path, "r:") as archive:
        for info in archive:
            if info.isreg() and not info.issparse():
                yield info.name.removeprefix("./"), info.size, info.offset_data, info.size, -1, 0
            elif not info.isdir():
                raise ValueError(f"{info.name} is a link, a sparse file or a device")
            end = info.offset_data + -(-info.size // block) * block
            archive.members.clear()  # it keeps all that it reads
        archive.fileobj.seek(end)
        if archive.fileobj.read(block) != bytes(block):  # tarfile takes what it cannot read for it
            raise ValueError("cut off or damaged: no end is there")


def _parquet_contents(path: Path, archive: Archive) -> Iterator[tuple[Any, ...]]:
    """Rows as Hugging Face has them, as files split/class/name: see docs/own_data.md."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        meta, kinds = file.metadata, {field.name: str(field.type) for field in file.schema_arrow}
        images = [name for name, kind in kinds.items() if re.match("struct<.*bytes: ", kind)]
        if len(images) != 1 or not re.match("u?int", kinds.get("label", "int")):
            raise ValueError(f"needs one column {{bytes, path}}, label of integers; has {kinds}")
        table = file.read(columns=[f"{images[0]}.path", "label"], use_threads=False).to_pydict()
    places = [(k, i) for k in range(meta.num_row_groups) for i in range(meta.row_group(k).num_rows)]
    about = json.loads((meta.metadata or {}).get(b"huggingface", "{}")).get("info", {})
    classes = about.get("features", {}).get("label", {}).get("names")
    split, labels = split_of(path.stem.split("-")[0]), table.get("label", [])
    allowed = range(len(classes) if classes else 10**5)  # folders are called by five digits
    if bad := [label for label in labels if label not in allowed]:
        raise ValueError(f"label {bad[0]} is none of 0 to {allowed[-1]}: leave out its rows")
    for label, name in enumerate(map(str, classes or range(max(labels, default=-1) + 1))):
        if archive.class_names.setdefault(f"{label:05d}", name) != name:
            raise ValueError(f"its class {label} is called {name}, that of another file otherwise")
    top, cells = f"{split}/" if split else "", table.get(images[0], [None] * len(places))
    folders = [f"{top}{label:05d}/" for label in labels] or [top] * len(places)
    paths = [os.path.basename((cell or {}).get("path") or "") for cell in cells]
    names = [folder + name for folder, name in zip(folders, paths, strict=True)]
    is_odd = any(UNSAFE(n) or "/." in f"/{n}" or not has_image_suffix(n) for n in names)
    if is_odd or len({*names}) < len(names) or not archive.row_of.keys().isdisjoint(names):
        names = [f"{folder}{path.stem}-{row:07d}.png" for row, folder in enumerate(folders)]
    column, total = [*kinds].index(images[0]), path.stat().st_size  # of all rows, for fingerprints
    for row, (name, place) in enumerate(zip(names, places, strict=True)):
        yield name, (total + row) // len(names), *place, -2, column


@functools.lru_cache(maxsize=4)
def _row_group(path: Path, state: tuple[int, int], group: int, column: int) -> Any:
    """The images of a row group, from a file of its own: no reader is for several threads."""
    from pyarrow.parquet import ParquetFile

    with _opened.__wrapped__(path, state) as file, ParquetFile(file) as reader:
        table = reader.read_row_group(group, [reader.schema_arrow.names[column]], use_threads=False)
    return table.column(0).combine_chunks().field("bytes")


CONTENTS = {".zip": _zip_contents, ".tar": _tar_contents, ".parquet": _parquet_contents}


class Archive:
    """The files in shards. Raises a DataError for a damaged one, and names twice or leading out."""

    def __init__(self, path: Path, shards: tuple[tuple[Path, tuple[int, int]], ...]) -> None:
        self.path, self.shards, rows = path, shards, array("q")
        self.row_of, self.folders = {}, {"": ([], [])}  # by path; folders and files in each folder
        self.class_names: dict[str, str] = {}  # of class folders that are called otherwise
        for number, (shard, _) in enumerate(shards):
            try:
                for name, *place in CONTENTS[shard.suffix.lower()](shard, self):
                    if name in self.row_of or UNSAFE(name):
                        raise ValueError(f"{name} is there twice, or no relative name with '/'")
                    folder, _, file = name.rpartition("/")
                    self._children(folder)[1].append(file)
                    self.row_of[name] = len(self.row_of)
                    rows.extend((number, *place))
            except Exception as error:  # of zipfile, tarfile and pyarrow a dozen kinds
                is_absent = isinstance(error, ImportError)
                advice = "pip install pyarrow" if is_absent else "copy or pack it again"
                fault = f"cannot be read ({show(one_line(error))}); {advice}"
                raise DataError(f"{show(shard)}: {fault}") from error
        for name in self.class_names:  # that of a class without images is empty
            self._children(f"train/{name}" if "train" in self.folders else name)
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
        if method == -2:  # of a .parquet
            content = _row_group(*self.shards[number], offset, crc)[packed].as_py()
            if content is None:
                raise ValueError("null in the place of its bytes")
            return content
        file = _opened(*self.shards[number])  # this name keeps it open
        if method >= 0:  # a zip has the name, and more of its own, before the content
            head = os.pread(file.fileno(), 30 + len(os.fsencode(name)), offset)
            crc = crc if head[30:] == os.fsencode(name) else None
            offset += 30 + sum(struct.unpack("<HH", head[26:30]))
        content = os.pread(file.fileno(), packed, offset)
        if method == zipfile.ZIP_DEFLATED:  # into no more than it claims, and a byte to notice
            with contextlib.suppress(zlib.error):  # what is left has another checksum
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
        if len(content) != size or (method >= 0 and zlib.crc32(content) != crc):
            raise ValueError("its name or checksum in the archive is another")
        return content


class Member(NamedTuple):
    """A file or folder in an archive, with those methods of a `Path` that data sets use."""

    archive: Archive
    inside: str = ""  # its path in there with `/`; empty for all of it

    def __truediv__(self, name: object) -> Member:
        return Member(self.archive, f"{self.inside}/{name}".strip("/"))

    def __str__(self) -> str:
        return f"{self.archive.path}/{self.inside}".rstrip("/")

    def is_dir(self) -> bool:
        return self.inside in self.archive.folders

    def is_file(self) -> bool:
        return self.inside in self.archive.row_of

    def stat(self) -> os.stat_result:
        size = self.archive.rows[self.archive.row_of[self.inside], 1]
        return os.stat_result((stat.S_IFREG, 0, 0, 1, 0, 0, int(size), 0, 0, 0))

    def open(self, _mode: str = "rb") -> BinaryIO:
        return io.BytesIO(self.archive.read(self.inside))

    def walk(self, onerror: object) -> Iterator[tuple[str, list[str], list[str]]]:
        """As `os.walk` does; no error comes up, as all of it is in memory."""
        todo = [self]
        for folder in todo:
            folders, files = map(list.copy, self.archive.folders[folder.inside])
            yield str(folder), folders, files
            todo += [folder / name for name in folders]

    def labels(self) -> tuple[tuple[str, Any], ...]:
        """What the files with this extension, such as `1.cls` beside `1.jpg`, say of images: the
        label itself, or a JSON object with `label`."""
        pairs, files = [], self.archive.row_of
        for name in filter(has_image_suffix, files):
            if (beside := f"{name.rpartition('.')[0]}.{self.inside}") in files:
                label = json.loads(self.archive.read(beside))
                pairs.append((name, label.get("label") if isinstance(label, dict) else label))
        return tuple(pairs)


ImagePath = Path | Member
_archive = functools.lru_cache(maxsize=4)(Archive)


def open_root(path: str | Path) -> ImagePath:
    """The folder `path` itself, or the archive there: a file, or a folder of shards alone."""
    path, names = Path(path), [""]
    if path.is_dir():
        folders, files = next(os.walk(path), ("", [], []))[1:]
        names = sorted(name for name in folders + files if not name.startswith("."))
        if any(name in folders or has_image_suffix(name) for name in names):
            return path
    shards = [path / name for name in names if (path / name).suffix.lower() in CONTENTS]
    if not shards or not all(shard.is_file() for shard in shards):
        return path
    states = [(s.st_size, s.st_mtime_ns) for s in (shard.stat() for shard in shards)]
    return Member(_archive(path, tuple(zip(shards, states, strict=True))))
