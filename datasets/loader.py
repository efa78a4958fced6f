"""From a data set to batches on the device, as a pure function of (seed, step)."""

from __future__ import annotations

import functools
import itertools
import math
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datasets.storage import ImageDataset, InMemoryDataset
from utils.distributed import Runtime
from utils.errors import DataError
from utils.images import to_float
from utils.rng import Stream, numpy_generator

RESIDENT_LIMIT = 2**30  # bytes of images
DECODE_BATCH_SIZE = 256


class Batch(NamedTuple):
    """One rank's rows of a global batch."""

    images: Tensor  # (b, C, H, W) float32 in [-1, 1] on the device
    labels: Tensor  # (b,) int64 in [0, K) on the device


def batches(
    dataset: ImageDataset,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
    rows: slice | range,
    horizontal_flip: bool,
    num_workers: int,
    start_step: int = 0,
) -> Iterator[Batch]:
    """Yield batches without end; what step k yields depends on (seed, k) and the images alone.

    Sample n = step * batch_size + j is image `pos` of the order of `epoch`, where
    `epoch, pos = divmod(n, N)`: batches run across the ends of epochs, so all have the same size
    and no image is left out. Whether row j is mirrored is drawn for the whole global batch. Raises
    a DataError when an image cannot be read.

    Args:
        dataset: made resident before, see `make_resident`, where its images are to be in memory.
        batch_size: global, over all ranks; may exceed N.
        rows: this rank's rows of the global batch, such as `runtime.share(batch_size)`.
        num_workers: processes that decode images which are not in memory.
        start_step: step of the first batch.
    """
    rows = slice(rows.start, rows.stop, rows.step)
    steps = global_indices(len(dataset), batch_size=batch_size, seed=seed, start_step=start_step)
    indices = (index[rows] for index in steps)
    loaded = _load(dataset, indices, num_workers, pin_memory=device.type == "cuda")
    for step, (images, labels) in enumerate(loaded, start=start_step):
        images = images.to(device, non_blocking=True)
        if horizontal_flip:
            flip = numpy_generator(seed, Stream.FLIP, step).random(batch_size) < 0.5
            mask = torch.from_numpy(flip[rows]).to(device, non_blocking=True)
            images = torch.where(mask[:, None, None, None], images.flip(3), images)
        yield Batch(to_float(images), labels.to(device, non_blocking=True))


def make_resident(
    dataset: ImageDataset, runtime: Runtime, *, resident: bool | None = None, num_workers: int = 0
) -> ImageDataset:
    """The data set, the same everywhere, with all its images decoded, on the device.

    A collective: each process decodes a share. Raises a DataError on all if one cannot be read.

    Args:
        resident: True always, False never, None if the images take at most `RESIDENT_LIMIT`.
            Where they are not to be resident the data set is returned as it is.
    """
    shape = (len(dataset), *dataset.spec.shape)
    dtype = torch.float32 if dataset.values else torch.uint8
    fits = math.prod(shape) * dtype.itemsize <= RESIDENT_LIMIT
    if resident is False or (resident is None and not fits):
        return dataset
    if isinstance(dataset, InMemoryDataset):
        images = dataset.images.to(runtime.device)
    else:
        images = torch.empty(shape, dtype=dtype, device=runtime.device)
        size, count = DECODE_BATCH_SIZE, runtime.world_size
        mine = [i for i in range(len(images)) if i // size % count == runtime.rank]
        parts = image_batches(dataset, mine, size, num_workers=num_workers)
        for start in range(0, len(images), size * count):  # each rank decodes one part and sends it
            try:
                part, error = next(parts, (None, None))[0], None
            except Exception as failure:  # the others must not wait for this process
                part, error = None, failure
            faults = runtime.gather_objects(error and (str(error) or repr(error)))
            if fault := runtime.broadcast_object(next(filter(None, faults), None)):
                raise error or DataError(fault)
            for owner, place in enumerate(images[start : start + size * count].split(size)):
                sent = part if owner == runtime.rank else torch.empty_like(place, device="cpu")
                place.copy_(runtime.broadcast(sent, owner))
    labels, class_names = dataset.labels, dataset.class_names
    held = InMemoryDataset(images, labels, class_names, fingerprint=dataset.fingerprint)
    held.values = dataset.values
    if partners := getattr(dataset, "partners", None):
        held.partners = make_resident(partners, runtime, resident=resident, num_workers=num_workers)
    return held


def image_batches(
    dataset: ImageDataset, indices: Sequence[int] | Tensor, batch_size: int, *, num_workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images (b, C, H, W), labels (b,) int64) of `indices`, in order.

    The last batch may be short. The tensors are on the CPU, or on the device of a resident data
    set. Raises a DataError when an image cannot be read.
    """
    order = np.asarray(indices, dtype=np.int64)
    parts = (order[start : start + batch_size] for start in range(0, len(order), batch_size))
    return _load(dataset, parts, num_workers, pin_memory=False)


def global_indices(
    num_images: int, *, batch_size: int, seed: int, start_step: int = 0
) -> Iterator[np.ndarray]:
    """Yield the int64 (batch_size,) image indices of each step from `start_step`, without end."""

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return numpy_generator(seed, Stream.PERMUTATION, epoch).permutation(num_images)

    for step in itertools.count(start_step):
        epochs, places = np.divmod(step * batch_size + np.arange(batch_size), num_images)
        yield np.concatenate([order(e)[places[epochs == e]] for e in np.unique(epochs).tolist()])


def _load(
    dataset: ImageDataset, indices: Iterable[np.ndarray], num_workers: int, *, pin_memory: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the images and the labels of each index array, in order."""
    if isinstance(dataset, InMemoryDataset):
        images = dataset.images
        labels = dataset.labels.to(images.device)
        for index in indices:
            chosen = torch.from_numpy(index).to(images.device, non_blocking=True)
            yield images.index_select(0, chosen), labels.index_select(0, chosen)
        return
    num_workers = min(num_workers, os.cpu_count() or 1)
    # Forked workers start at once and share the file list. They use Pillow and numpy only, never
    # the accelerator, which a forked process could not.
    start_method = "fork" if sys.platform.startswith("linux") else "spawn"
    loader = DataLoader(
        _Rows(dataset),
        sampler=indices,
        batch_size=None,  # each item of the sampler is a batch of indices already
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_survive_signals,
        multiprocessing_context=start_method if num_workers else None,
        # Otherwise the loader draws its base seed from torch's global generator.
        generator=torch.Generator(),
    )
    for item in loader:
        if isinstance(item, str):
            raise DataError(item)
        yield item


def _survive_signals(_worker: int) -> None:
    """Outlive the Ctrl-C or SIGTERM that also reaches the trainer, which must end its step first.

    Only one SIGTERM is passed over: a second is how the interpreter clears up workers at exit.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


class _Rows(Dataset):
    """Maps an array of indices to stacked images and labels.

    A `DataError` is returned as its text: raised in a worker, it would arrive as a long traceback.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: np.ndarray) -> tuple[Tensor, Tensor] | str:
        dtype = torch.float32 if self.dataset.values else torch.uint8
        images = torch.empty((len(index), *self.dataset.spec.shape), dtype=dtype)
        try:
            for row, i in enumerate(index.tolist()):
                images[row] = self.dataset[i][0]
        except DataError as error:
            return str(error)
        return images, self.dataset.labels[torch.from_numpy(index)]
