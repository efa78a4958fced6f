"""Files written whole, keys of what is in them, and the time-out of downloads."""

from __future__ import annotations

import socket

import pytest

from utils.files import atomic_path, content_key, socket_timeout, write_text


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
