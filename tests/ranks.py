"""Several processes played by threads of one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from utils.distributed import Runtime


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
        return self.board.exchange(self.rank, value)

    def gather(self, rows: Tensor, num_items: int) -> Tensor | None:
        parts = self.board.exchange(self.rank, rows.cpu())
        assert [len(part) for part in parts] == [
            len(Runtime(self.device, rank, self.world_size).share(num_items))
            for rank in range(self.world_size)
        ]
        return torch.cat(parts) if self.is_main else None

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
