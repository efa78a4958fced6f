"""Images to score, and several processes played by threads of one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from datasets.real import RealImages, RealSets
from datasets.storage import InMemoryDataset
from metrics.base import Context, Entry, Generated, Real
from metrics.evaluation import build_parts
from metrics.scoring import Scoring
from metrics.weights import Network
from utils.distributed import Runtime
from utils.images import ImageSpec

CPU = torch.device("cpu")
SINGLE = Runtime(CPU)


def random_images(count: int, shape: tuple[int, int, int] = (1, 16, 16), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)


def real_images_of(
    images: Tensor, labels: Tensor | None = None, *, split: str = "train", size: int = 50
) -> RealImages:
    labels = torch.zeros(len(images)) if labels is None else labels
    names = [str(k) for k in range(int(labels.max()) + 1)]
    dataset = InMemoryDataset(images, labels, names, fingerprint=f"data-{split}")
    return RealImages(dataset, range(len(images)), split, size, num_workers=0)


def real_sets(train: RealImages, test: RealImages | None = None) -> RealSets:
    return RealSets(train, train, test)


def batches_of(images: Tensor, runtime: Runtime = SINGLE, size: int = 8) -> Iterator[Tensor]:
    """The rank's share of the images."""
    share = runtime.share(len(images))
    for start in range(share.start, share.stop, size):
        yield images[start : min(start + size, share.stop)]


def scoring_of(
    names: Iterable[str],
    images: Tensor,
    labels: list[int] | None = None,
    *,
    real: RealSets | None = None,
    networks: Mapping[Network, Any] | None = None,
    runtime: Runtime = SINGLE,
    **options: Any,
) -> Scoring:
    """These metrics, which have seen the real images, for images like these.

    Args:
        options: further fields of the `Context`.
    """
    spec = ImageSpec(*images.shape[1:], 0 if real is None else real.train.dataset.spec.num_classes)
    generated = Generated(spec, len(images), labels)
    context = Context(runtime, generated, Real(real), networks=networks or {}, **options)
    scoring = Scoring(build_parts(tuple(names), context), runtime)
    scoring.update_real(real)
    return scoring


def score(
    names: Iterable[str],
    images: Tensor,
    labels: list[int] | None = None,
    *,
    size: int = 8,
    world_size: int = 1,
    **options: Any,
) -> dict[str, Entry]:
    """Entries, without their seconds, that the main one of so many processes reports.

    Args:
        size: of the batches.
        options: see `scoring_of`.
    """

    def on_rank(runtime: Runtime) -> dict[str, Entry]:
        scoring = scoring_of(names, images, labels, runtime=runtime, **options)
        return scoring.score(batches_of(images, runtime, size), len(images))

    entries, *others = [on_rank(SINGLE)] if world_size == 1 else on_ranks(world_size, on_rank)
    assert not any(others)
    for result in entries.values():
        del result["seconds"]
    json.dumps(entries, allow_nan=False)
    return entries


class Board:
    """Where the threads of one job meet."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=60)
        self.slots: list[Any] = [None] * world_size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        self.slots[rank] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values


@dataclass(frozen=True)
class ThreadRuntime(Runtime):
    """A rank of a job whose processes are threads."""

    board: Board = field(default_factory=lambda: Board(1))

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        stacked = torch.stack(self.board.exchange(self.rank, tensor.clone()))
        return tensor.copy_(stacked.sum(0) if op == "sum" else stacked.amax(0))

    def broadcast_object(self, value: Any) -> Any:
        return self.board.exchange(self.rank, value)[0]

    def broadcast(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(self.board.exchange(self.rank, tensor.clone())[0])

    def gather_objects(self, value: Any) -> list[Any]:
        values = self.board.exchange(self.rank, value)
        return values if self.is_main else []

    def patient_barrier(self) -> None:
        self.board.exchange(self.rank, None)


def on_ranks(world_size: int, call: Callable[[Runtime], Any]) -> list[Any]:
    """What `call` returns on each rank of a job."""
    board = Board(world_size)
    runtimes = [
        ThreadRuntime(torch.device("cpu"), rank, world_size, board=board)
        for rank in range(world_size)
    ]
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(call, runtimes))
