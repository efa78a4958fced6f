"""Images kept for a restart: whatever was drawn is not drawn again, whoever drew it."""

import logging
from itertools import pairwise

import numpy as np
import pytest
import torch

from generation.sample_store import remove, resumed, saved

SHAPE = (1, 4, 4)


def image(index: int) -> torch.Tensor:
    return torch.full(SHAPE, index % 251, dtype=torch.uint8)


class Sampler:
    """Draws in batches of `size` and notes what it drew; stops after `limit` images."""

    def __init__(self, size: int = 5, limit: int | None = None) -> None:
        self.size, self.limit, self.drawn = size, limit, []

    def __call__(self, indices: range):
        for start in range(indices.start, indices.stop, self.size):
            batch = list(range(start, min(start + self.size, indices.stop)))
            if self.limit is not None and len(self.drawn) + len(batch) > self.limit:
                raise KeyboardInterrupt
            self.drawn += batch
            yield torch.stack([image(i) for i in batch])


def collect(folder, share, sampler):
    images = resumed(folder, SHAPE, share, sampler)
    return torch.cat([torch.zeros((0, *SHAPE), dtype=torch.uint8), *images])


def test_an_interrupted_run_draws_only_what_is_missing(tmp_path):
    folder = tmp_path / "samples"
    first = Sampler(limit=12)
    with pytest.raises(KeyboardInterrupt):
        collect(folder, range(23), first)
    assert first.drawn == list(range(10))
    second = Sampler(size=4)
    images = collect(folder, range(23), second)
    assert second.drawn == list(range(10, 23))
    assert torch.equal(images, torch.stack([image(i) for i in range(23)]))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_number_of_processes_goes_on(tmp_path, world_size):
    """Two processes drew parts of their shares; others, with other shares, draw the rest."""
    folder = tmp_path / "samples"
    for share in (range(0, 7), range(12, 17)):
        collect(folder, share, Sampler(size=3))
    bounds = [round(i * 23 / world_size) for i in range(world_size + 1)]
    samplers, parts = [], []
    for start, stop in pairwise(bounds):
        samplers.append(Sampler())
        parts.append(collect(folder, range(start, stop), samplers[-1]))
    assert torch.equal(torch.cat(parts), torch.stack([image(i) for i in range(23)]))
    drawn = sorted(i for sampler in samplers for i in sampler.drawn)
    assert drawn == [*range(7, 12), *range(17, 23)]


def test_an_empty_share(tmp_path):
    folder = tmp_path / "samples"
    assert len(collect(folder, range(5, 5), Sampler())) == 0
    assert not folder.exists()


def test_damaged_and_foreign_files_are_drawn_again(tmp_path):
    folder = tmp_path / "samples"
    collect(folder, range(15), Sampler())
    torn = folder / "images_00000005_00000010.npy"
    torn.write_bytes(torn.read_bytes()[:-3])
    np.save(folder / "images_00000010_00000015.npy", np.zeros((5, 3, 4, 4), np.uint8))
    (folder / "notes.txt").write_text("mine")
    sampler = Sampler()
    images = collect(folder, range(15), sampler)
    assert sampler.drawn == list(range(5, 15))
    assert torch.equal(images, torch.stack([image(i) for i in range(15)]))
    remove(folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    (folder / "notes.txt").unlink()
    remove(folder)
    assert not folder.exists()


def test_a_full_disk_costs_the_restart_only(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with caplog.at_level(logging.WARNING, "diffusion"):
        images = collect(blocked, range(8), Sampler())
    assert len(images) == 8
    (message,) = caplog.messages
    assert "not kept for a restart" in message


def test_images_are_saved_by_index_until_the_disk_refuses(tmp_path, caplog):
    images = torch.stack([image(i) for i in range(5)])
    written = []
    assert len(list(saved(images.split(2), tmp_path / "a", 3, written, None))) == 3
    assert len(written) == 5
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [f"{i:06d}.png" for i in range(3, 8)]
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, "diffusion"):
        assert len(list(saved(images.split(4), tmp_path / "file", 0, written, None))) == 2
    assert len(written) == 5
    assert len(caplog.messages) == 1
