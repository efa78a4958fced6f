"""Which device and which of how many processes: everything torchrun tells us, in one object."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import platform
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from utils.errors import ConfigError, UserError, one_line, told_as
from utils.precision import allow_tf32

DEFAULT_TIMEOUT_MINUTES = 10.0
POLL_SECONDS = 0.01
QUIET_SECONDS = 5  # of waiting for other processes, before a line says so
PATIENCE_HOURS = 12  # for the longest download, and the longest work of one process alone

# What helps against variables that an earlier job, or a shell, has left behind.
UNSET = "start it by torchrun, or for one process: unset WORLD_SIZE RANK LOCAL_RANK"

# Constants of glibc's malloc.h; see mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
NEVER = -1
BLOCK_SIZES = (2**30, 2**25)  # bytes; not every glibc takes more than the second


@dataclass(frozen=True)
class Runtime:
    """This process's place in the job. Collectives are no-ops in a single process."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, num_items: int) -> range:
        """This rank's contiguous part of `num_items`; parts differ by at most one, may be empty."""
        per_rank, extra = divmod(num_items, self.world_size)
        start = self.rank * per_rank + min(self.rank, extra)
        return range(start, start + per_rank + (self.rank < extra))

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Reduce in place over all ranks (`sum` or `max`) and return the tensor."""
        if self.world_size > 1:
            dist.all_reduce(tensor, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
        return tensor

    def any(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on one. Goes over gloo: no GPU synchronisation."""
        return bool(self.all_reduce(torch.tensor(int(flag)), "max"))

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value` (plain types) on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Overwrite `tensor` in place with the values of rank `source`, and return it."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=source)
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's `value` (plain types, CPU tensors), by rank, on rank 0. The other ranks get
        an empty list."""
        values = [value] * self.world_size if self.is_main else []
        if self.world_size > 1:
            dist.gather_object(value, values or None, dst=0)
        return values

    def gather(self, rows: Tensor) -> Tensor | None:
        """Concatenate every rank's rows, by rank, on rank 0 (CPU). The other ranks get None."""
        parts = self.gather_objects(rows.cpu())
        return torch.cat(parts) if parts else None

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs the body first, then the first process of each node, then the rest.

        So one process alone downloads into a folder, shared or local; the others wait for hours.
        """
        turn = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self.patient_barrier()
        try:
            yield
        finally:
            for _ in range(2 - turn):
                self.patient_barrier()

    @contextlib.contextmanager
    def all_or_none(self, otherwise: str) -> Iterator[None]:
        """If the body raises on one rank, raise on all: nobody waits for one that has given up. A
        collective; ranks whose own body went well raise a RuntimeError of this text."""
        error = None
        try:
            yield
        except Exception as failure:
            error = failure
        if self.any(error is not None):
            raise error or RuntimeError(otherwise)

    def patient_barrier(self) -> None:
        """Wait for hours, where one process alone works: the others' time-out does not run."""
        if self.world_size > 1:
            group = dist.new_group(backend="gloo", timeout=timedelta(hours=PATIENCE_HOURS))
            try:
                dist.barrier(group)
            finally:
                dist.destroy_process_group(group)


def choose_device(name: str | None, index: int = 0, *, several: bool = False) -> torch.device:
    """`name` if given, else cuda, mps, cpu, whichever exists first; a CUDA device without a number
    gets `index`. Raises a ConfigError if the named device does not exist on this machine, or cannot
    serve `several` processes."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available |= {"mps": available["mps"] and not several, "cpu": True}  # gloo carries no MPS
    if name is None:
        name = next(kind for kind, there in available.items() if there)
    if not re.fullmatch(r"(cpu|cuda|mps)(:(0|[1-9]\d?))?", name):
        raise ConfigError(f"--device {name}: not a device; use cpu, cuda, cuda:1 or mps")
    device = torch.device(name)
    if several and (device.type == "mps" or device.index is not None):
        advice = "use cuda or cpu; gpu_ids or CUDA_VISIBLE_DEVICES choose the GPUs"
        raise ConfigError(f"--device {name}: with several processes {advice}")
    if not available[device.type]:
        raise ConfigError(f"--device {name}: this machine has no usable {device.type}; use cpu")
    if device.type == "cuda":
        device = torch.device("cuda", index if device.index is None else device.index)
        count = torch.cuda.device_count()
        if device.index >= count:
            there = f"this machine has {count} CUDA device(s), numbered from 0"
            advice = f"each process needs its own; use --nproc_per_node={count} at most"
            raise ConfigError(f"{device}: {there}, and {advice}")
    return device


def describe_device(device: torch.device) -> str:
    """Name a device for people; of a GPU, its model."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads; slow for large models, but allowed)"
    return str(device)


def world_size() -> int:
    """Count the processes in this job, as the launcher says."""
    return from_launcher("WORLD_SIZE", 1)


def from_launcher(name: str, default: int, least: int = 1, most: int = 10**6) -> int:
    """The whole number in an environment variable that launchers set. Raises a ConfigError for any
    other text in it, and for a number outside `least` ... `most`."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,10}", text) or not least <= int(text) <= most:
        needed = f"a whole number from {least} to {most}" if least < most else str(least)
        raise ConfigError(f"{name}={text!r} in the environment: must be {needed}; {UNSET}")
    return int(text)


def place_in_job(port: int | None = None) -> tuple[int, int, int]:
    """(rank, local rank, number of processes) as the launcher says, or those of a job of one.

    Sets MASTER_ADDR and MASTER_PORT where it did not. Raises a ConfigError for what does not go
    together, and a UserError if the processes cannot meet at that address.
    """
    count = world_size()
    needed = ("RANK", "MASTER_PORT") if port is None else ("RANK",)
    if count > 1 and (missing := [name for name in needed if name not in os.environ]):
        given = f"WORLD_SIZE={count} in the environment"
        raise ConfigError(f"{given}, but no {' and no '.join(missing)}; {UNSET}")
    rank = from_launcher("RANK", 0, 0, count - 1)
    local_count = from_launcher("LOCAL_WORLD_SIZE", count, 1, count)
    local_rank = from_launcher("LOCAL_RANK", 0, 0, local_count - 1)
    if count == 1:
        return 0, local_rank, 1
    os.environ.setdefault("MASTER_PORT", str(port))
    address = os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    port = from_launcher("MASTER_PORT", 0, 1, 65535)
    place = f"MASTER_ADDR={address!r} MASTER_PORT={port}"
    with told_as(UserError, f"{place}: not usable; give others, or {UNSET}", OSError, UnicodeError):
        socket.getaddrinfo(address or "?", port)
        if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            socket.create_server(("", port)).close()
    return rank, local_rank, count


@contextlib.contextmanager
def distributed_runtime(
    device: str | None = None,
    *,
    gpu_ids: tuple[int, ...] | None = None,
    port: int | None = None,
    timeout_minutes: float = DEFAULT_TIMEOUT_MINUTES,
) -> Iterator[Runtime]:
    """Join the job that torchrun's environment describes, or a job of one; leave it at the end.

    Under torchrun each process takes its own GPU: of `gpu_ids` the one at its local rank, or else
    the GPU of that number. `port` is the MASTER_PORT where the launcher has set none.
    """
    rank, local_rank, count = place_in_job(port)
    index = gpu_ids[local_rank] if gpu_ids else local_rank
    chosen = choose_device(device, index, several=count > 1)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        allow_tf32()
    elif chosen.type == "cpu":
        keep_freed_memory()
    runtime = Runtime(chosen, rank, count, local_rank)
    if count == 1:
        yield runtime
        return
    # Optimizers and others import this lazily. Imported while a process group exists it keeps a
    # reference to the group, whose threads then outlive the interpreter and abort at exit.
    importlib.import_module("torch._dynamo")

    # gloo carries CPU tensors (flags, objects, gathered images) beside nccl for the gradients.
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    meet(backend, rank, count, timedelta(minutes=timeout_minutes))
    try:
        yield runtime
        runtime.any(False)  # nobody hangs up while another still listens
    finally:
        dist.destroy_process_group()


def meet(backend: str, rank: int, count: int, timeout: timedelta) -> None:
    """Make the process group of this start. A UserError tells that it could not be made, be it that
    the others did not come; a line on stderr, that they let this process wait."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    place = f"{count} processes at {address}:{port}"
    end = time.monotonic() + timeout.total_seconds()
    text = f"waiting for {place}; this is rank {rank}\n"
    notice = threading.Timer(QUIET_SECONDS, sys.stderr.write, [text])
    notice.daemon = True
    notice.start()
    try:
        while rank > 0:  # torch's own attempts print pages
            try:
                socket.create_connection((address, port), max(end - time.monotonic(), 1)).close()
                break
            except OSError:
                if time.monotonic() > end - 1:
                    raise
            time.sleep(POLL_SECONDS)
        store, *_ = next(rendezvous("env://", rank, count, timeout=timeout))
        store = dist.PrefixStore(agree_on_name(store, rank, count, timeout), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timeout)
    except (RuntimeError, OSError) as error:
        raise UserError(f"the {place} have not met: {one_line(error)}; {UNSET}") from error
    finally:
        notice.cancel()


def agree_on_name(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that the processes of this start share, and none before them.

    Processes that torchrun restarts find in its store what dead ones have left there. Whoever reads
    an address of those waits for an answer until the time-out. So rank 0 invents a name and tells
    it to each rank in reply to a word that this rank has just invented, until all have heard it; a
    TimeoutError tells which ranks did not come.
    """
    word, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank > 0:
        store.set(f"word/{rank}", word)
        name = store.get(f"name/{word}").decode()  # waits for it
        store.set(f"heard/{name}/{rank}", "yes")
        return name
    missing = set(range(1, world_size))
    while missing:
        for other in sorted(missing):
            if store.check([f"word/{other}"]):
                store.set(f"name/{store.get(f'word/{other}').decode()}", word)
        missing = {other for other in missing if not store.check([f"heard/{word}/{other}"])}
        if time.monotonic() > end:
            raise TimeoutError(f"after {timeout} rank(s) {sorted(missing)} have not come")
        time.sleep(POLL_SECONDS)
    return word


def keep_freed_memory() -> bool:
    """Let glibc reuse what is freed, where it would give large blocks back to the system.

    A training step on a CPU frees and asks for the same large tensors as the one before. Given
    back, each of their pages is zeroed and mapped anew. Settings from outside (`MALLOC_...`,
    `GLIBC_TUNABLES`) are left as they are; False if they, or another C library, rule.
    """
    is_set = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if is_set or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Setting one ends glibc's own adjustment of both, so it is both or none.
    taken = any(mallopt(M_MMAP_THRESHOLD, size) for size in BLOCK_SIZES)
    return taken and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
