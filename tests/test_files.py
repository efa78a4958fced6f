"""Files written whole and read, keys of what is in them, and the time-out of downloads."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.lib import format as npy

from utils.files import atomic_path, content_key, read_npy, read_npz, socket_timeout, write_text


@pytest.fixture
def timeout_of_seven():
    socket.setdefaulttimeout(7.0)
    yield
    socket.setdefaulttimeout(None)


def test_a_download_leaves_the_time_out_as_it_was(timeout_of_seven):
    with socket_timeout(3.0):
        assert socket.getdefaulttimeout() == 3.0
    assert socket.getdefaulttimeout() == 7.0
    with pytest.raises(OSError, match="no network"), socket_timeout(3.0):
        raise OSError("no network")
    assert socket.getdefaulttimeout() == 7.0


def test_a_file_whose_writing_fails_is_the_old_one(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write_text(path, "old")

    def interrupted() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            assert path.read_text() == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
    write_text(path, "new")
    assert path.read_text() == "new"


def test_a_key_says_what_a_file_depends_on_and_not_in_which_order():
    key = content_key({"seed": 1, "steps": [2, 3]})
    assert len(key) == 12
    assert key == content_key({"steps": [2, 3], "seed": 1})
    others = [{"seed": 1, "steps": [3, 2]}, {"seed": 2, "steps": [2, 3]}, {"seed": 1}]
    assert len({key, *map(content_key, others)}) == 4


def test_headers_of_arrays_are_parsed_one_at_a_time(tmp_path, monkeypatch):
    """In Python 3.11 two threads that parse literals at a time can get a SystemError."""
    path, parsing, most = tmp_path / "x.npy", [], []
    np.save(path, np.asfortranarray(np.arange(12.0).reshape(3, 4)))
    read_header = npy.read_array_header_1_0

    def slowly(file):
        parsing.append(file)
        time.sleep(0.01)
        most.append(len(parsing))
        parsing.remove(file)
        return read_header(file)

    def read(_):
        with path.open("rb") as file:
            return read_npy(file, "it", path.stat().st_size)

    monkeypatch.setattr(npy, "read_array_header_1_0", slowly)
    with ThreadPoolExecutor(8) as pool:
        arrays = list(pool.map(read, range(16)))
    assert most == [1] * 16
    for array in arrays:
        np.testing.assert_array_equal(array, np.load(path))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(24.0).reshape(2, 3, 4),
        np.asfortranarray(np.arange(24).reshape(2, 3, 4)),
        np.array(5.0),
        np.zeros((0, 3)),
        np.arange(6, dtype=">i2"),
        np.array(["a", "bcd"]),
    ],
    ids=lambda array: f"{array.dtype} {array.shape}",
)
def test_arrays_are_read_as_numpy_reads_them(tmp_path, save, array):
    save(tmp_path / "a.npz", x=array)
    read = read_npz(tmp_path / "a.npz", ["x"])["x"]
    assert (read.dtype, read.strides) == (array.dtype, array.strides)
    assert read.flags.writeable
    np.testing.assert_array_equal(read, array)
