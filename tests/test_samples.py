"""Images kept for a restart: whatever was drawn is not drawn again, whoever drew it."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from metrics.samples import SampleStore, resumed, sample_key

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


def collect(store, share, sampler, labels=None, warnings=None):
    warn = [].append if warnings is None else warnings.append
    batches = list(resumed(store, share, labels, sampler, warn))
    images = torch.cat([torch.zeros((0, *SHAPE), dtype=torch.uint8), *(b[0] for b in batches)])
    return images, [label for batch in batches for label in batch[1] or []]


def test_an_interrupted_run_draws_only_what_is_missing(tmp_path):
    store = SampleStore(tmp_path / "samples", SHAPE)
    labels = [i % 3 for i in range(23)]
    first = Sampler(limit=12)
    with pytest.raises(KeyboardInterrupt):
        collect(store, range(23), first, labels)
    assert first.drawn == list(range(10))
    second = Sampler(size=4)
    images, seen = collect(store, range(23), second, labels)
    assert second.drawn == list(range(10, 23))
    assert torch.equal(images, torch.stack([image(i) for i in range(23)]))
    assert seen == labels


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_number_of_processes_goes_on(tmp_path, world_size):
    """Two processes drew parts of their shares; others, with other shares, draw the rest."""
    store = SampleStore(tmp_path / "samples", SHAPE)
    for share in (range(0, 7), range(12, 17)):
        collect(store, share, Sampler(size=3))
    bounds = [round(i * 23 / world_size) for i in range(world_size + 1)]
    samplers, parts = [], []
    for start, stop in pairwise(bounds):
        samplers.append(Sampler())
        parts.append(collect(store, range(start, stop), samplers[-1])[0])
    assert torch.equal(torch.cat(parts), torch.stack([image(i) for i in range(23)]))
    drawn = sorted(i for sampler in samplers for i in sampler.drawn)
    assert drawn == [*range(7, 12), *range(17, 23)]


def test_an_empty_share(tmp_path):
    store = SampleStore(tmp_path / "samples", SHAPE)
    assert len(collect(store, range(5, 5), Sampler())[0]) == 0
    assert not store.folder.exists()


def test_damaged_and_foreign_files_are_drawn_again(tmp_path):
    store = SampleStore(tmp_path / "samples", SHAPE)
    collect(store, range(15), Sampler())
    torn = tmp_path / "samples/images_00000005_00000010.npy"
    torn.write_bytes(torn.read_bytes()[:-3])
    np.save(tmp_path / "samples/images_00000010_00000015.npy", np.zeros((5, 3, 4, 4), np.uint8))
    (tmp_path / "samples/notes.txt").write_text("mine")
    sampler = Sampler()
    images, _ = collect(store, range(15), sampler)
    assert sampler.drawn == list(range(5, 15))
    assert torch.equal(images, torch.stack([image(i) for i in range(15)]))
    store.remove()
    assert [path.name for path in store.folder.iterdir()] == ["notes.txt"]
    (store.folder / "notes.txt").unlink()
    store.remove()
    assert not store.folder.exists()


def test_a_full_disk_costs_the_restart_only(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    warnings = []
    images, _ = collect(SampleStore(blocked, SHAPE), range(8), Sampler(), warnings=warnings)
    assert len(images) == 8
    assert len(warnings) == 1
    assert "not kept for a restart" in warnings[0]


def test_the_key_follows_every_setting():
    settings = dict(sha256="abc", seed=0, sampling=dict(steps=50, cfg_scale=2.0))
    others = [
        settings | dict(seed=1),
        settings | dict(sha256="abd"),
        settings | dict(sampling=dict(steps=50, cfg_scale=2.5)),
    ]
    keys = {sample_key(s) for s in (settings, *others)}
    assert len(keys) == 4
    assert sample_key(dict(reversed(settings.items()))) == sample_key(settings)
