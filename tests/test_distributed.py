"""The runtime: shares, devices, and a process group that leaves nothing behind."""

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from datasets import build_dataset, loader, storage
from tests.conftest import ROOT, asks_for_a_gpu
from tests.image_files import custom, write_image
from training.progress import LossStats
from training.sharding import check_gpu_ids
from utils.distributed import Runtime, agree_on_name, choose_device
from utils.errors import ConfigError, DataError

CPU = torch.device("cpu")

LEAVE = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
from utils.distributed import distributed_runtime

with distributed_runtime("cpu") as runtime:
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    turns = []
    with runtime.main_first():
        turns.append(runtime.rank)
    rows = torch.full((len(runtime.share(5)), 2), runtime.rank)
    gathered = runtime.gather(rows)
    assert runtime.any(runtime.rank == 1)
    assert not runtime.any(False)
    assert runtime.broadcast_object({"rank": runtime.rank}) == {"rank": 0}
    if runtime.is_main:
        assert gathered[:, 0].tolist() == [0, 0, 0, 1, 1]
names = [open(f"/proc/self/task/{t}/comm").read().strip() for t in os.listdir("/proc/self/task")]
assert not [name for name in names if "gloo" in name], names
"""


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_process_group_leaves_no_threads_behind(tmp_path):
    """A thread that outlives the interpreter aborts the process after all its work is done."""
    path = tmp_path / "leave.py"
    path.write_text(LEAVE, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, path, ROOT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def agree(store, ranks, world_size, seconds):
    with ThreadPoolExecutor() as threads:
        limit = timedelta(seconds=seconds)
        started = [threads.submit(agree_on_name, store, r, world_size, limit) for r in ranks]
    return started


def test_restarted_processes_agree_whatever_dead_ones_left_behind():
    """Of the earlier starts one was complete, one lacked a rank, one had but one."""
    store, names = dist.HashStore(), []
    store.set_timeout(timedelta(seconds=0.3))
    for ranks in ((0, 1, 2), (0, 1), (1, 2), (2,), (0, 1, 2), (0,), (0, 1, 2)):
        started = agree(store, ranks, 3, seconds=10 if len(ranks) == 3 else 0.3)
        if len(ranks) == 3:
            (name,) = {future.result() for future in started}
            names.append(name)
        elif ranks[0] == 0:
            with pytest.raises(TimeoutError, match=r"rank\(s\) \[.*2\] have not come"):
                started[0].result()
    assert len(set(names)) == 3
    assert agree_on_name(store, 0, 1, timedelta(seconds=1))


def of_rank(rank: int, rendezvous: str) -> dict:
    """What a process of two has after each exchange; every rank hands in its own number."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    runtime, mine = Runtime(CPU, rank, 2, rank), torch.full((2,), rank)
    received, of_last = runtime.broadcast(mine), runtime.broadcast(torch.tensor(rank), 1)
    results = {
        "gather_objects": runtime.gather_objects({"rank": rank}),
        "broadcast_object": runtime.broadcast_object({"rank": rank}),
        "broadcast": received.tolist(),
        "in place": received is mine,
        "from rank 1": of_last.item(),
        "sum": runtime.all_reduce(torch.tensor(rank + 1)).item(),
        "max": runtime.all_reduce(torch.tensor(rank + 1), "max").item(),
        "any": [runtime.any(rank == 1), runtime.any(False)],
    }
    dist.destroy_process_group()
    return results


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")
def test_every_rank_receives_what_is_exchanged(tmp_path):
    """What is gathered is for rank 0 alone, all else for every rank."""
    ranks = [(rank, str(tmp_path / "rendezvous")) for rank in range(2)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        first, second = pool.starmap_async(of_rank, ranks, chunksize=1).get(timeout=120)
    assert first.pop("gather_objects") == [{"rank": 0}, {"rank": 1}]
    assert second.pop("gather_objects") == []
    assert first == second
    assert first == {
        "broadcast_object": {"rank": 0},
        "broadcast": [0, 0],
        "in place": True,
        "from rank 1": 1,
        "sum": 3,
        "max": 2,
        "any": [True, False],
    }


def resident_of_rank(rank: int, world_size: int, folder: str) -> list:
    """What a process of several has, and how many images it decoded itself; or an error's text."""
    settings = dict(init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    dist.init_process_group("gloo", **settings, timeout=timedelta(seconds=60))
    loader.DECODE_BATCH_SIZE, runtime, results = 4, Runtime(CPU, rank, world_size, rank), []
    dataset, decoded = build_dataset(custom(Path(folder) / "images", image_size=8)), []
    decode = storage.decode_image
    storage.decode_image = lambda *given: decoded.append(given) or decode(*given)
    for broken in (None, 21, 9):
        runtime.broadcast_object(None)  # all have read what is about to be damaged
        if broken and rank == 0:
            dataset.listing.path(broken).write_text("no image")
        runtime.broadcast_object(None)
        decoded.clear()
        try:
            images = loader.make_resident(dataset, runtime).images.tolist()
            results.append((images, len(decoded)))
        except DataError as error:
            results.append(str(error))
    dist.destroy_process_group()
    return results


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_decode_resident_images_together(tmp_path, world_size):
    """Each image once, in chunks of 4; all end with the line on the first broken one in order."""
    for number in range(22):
        write_image(tmp_path / "images" / "a" / f"{number:02d}.png", seed=number)
    expected = loader.make_resident(
        build_dataset(custom(tmp_path / "images", image_size=8)), Runtime(CPU)
    )
    ranks = [(rank, world_size, str(tmp_path)) for rank in range(world_size)]
    with multiprocessing.get_context("fork").Pool(world_size) as pool:
        results = pool.starmap_async(resident_of_rank, ranks, chunksize=1).get(timeout=120)
    whole, late, early = zip(*results, strict=True)
    assert all(images == expected.images.tolist() for images, _ in whole)
    assert [count for _, count in whole] == {2: [12, 10], 3: [8, 8, 6]}[world_size]
    for texts, name in ((late, "21.png"), (early, "09.png")):
        assert len(set(texts)) == 1
        assert f"a/{name}: not a readable" in texts[0]


def test_a_single_process_exchanges_with_itself():
    runtime, mine = Runtime(CPU), torch.ones(2)
    assert runtime.gather_objects("mine") == ["mine"]
    assert runtime.broadcast_object("mine") == "mine"
    assert runtime.broadcast(mine) is mine
    assert mine.tolist() == [1, 1]


@pytest.mark.parametrize(("num_items", "world_size"), [(10, 3), (2, 4), (0, 2), (7, 1)])
def test_shares_are_contiguous_and_complete(num_items, world_size):
    shares = [Runtime(CPU, rank, world_size).share(num_items) for rank in range(world_size)]
    assert [i for share in shares for i in share] == list(range(num_items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_devices_that_do_not_exist_are_refused(monkeypatch):
    assert choose_device("cpu") == CPU
    for name in ("gpu", "cpus", "meta"):
        with pytest.raises(ConfigError, match=name):
            choose_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(None) == torch.device("cuda:0")
    assert choose_device("cuda", 1) == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="nproc_per_node=2 at most"):
        choose_device(None, 2)
    with pytest.raises(ConfigError, match="several processes"):
        choose_device("cuda:0", several=True)


def test_gpu_ids_fit_the_processes_of_the_node(monkeypatch):
    assert check_gpu_ids(None) is None
    assert check_gpu_ids((0,)) is None
    assert "nproc_per_node=2" in check_gpu_ids((0, 1))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert check_gpu_ids((0, 1)) is None
    assert "name it once" in check_gpu_ids((0, 0))


OF_BUCKETS = {"low": 1.0, "high": 7 / 3}  # means of 1 and of 5, 0, 2


class BesideAnother:
    """A rank whose only fellow reduces `other`."""

    world_size = 2

    def __init__(self, other):
        self.other = other

    def all_reduce(self, tensor):
        return tensor.add_(self.other)


def test_shared_loss_statistics_are_the_mean_over_the_ranks():
    """So that a run resumed on any number of processes goes on from the same numbers."""
    mine, other = (LossStats(CPU, tuple(OF_BUCKETS)) for _ in range(2))
    mine.add(torch.tensor(3.0), torch.tensor([1.0, 5.0]), torch.tensor([0, 1]))
    other.add(torch.tensor(1.0), torch.tensor([0.0, 2.0]), torch.tensor([1, 1]))
    assert mine.read(BesideAnother(other.values)) == (2.0, 2.0, OF_BUCKETS)
    mine.share(BesideAnother(other.values))
    expected = [0.02, 0.01, 2.0, 1.0, 0.5, 3.5, 0.5, 1.5]
    torch.testing.assert_close(mine.values, torch.tensor(expected, dtype=torch.float64))
    assert mine.read(BesideAnother(mine.values.clone())) == (2.0, 2.0, OF_BUCKETS)
    assert mine.read(Runtime(CPU)) == (2.0, 2.0, OF_BUCKETS)


def test_no_test_sees_a_gpu_that_it_does_not_ask_for():
    """Scripts take a GPU where there is one, and bf16 with it: other numbers than expected here."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not torch.cuda.is_available()
    assert all(map(asks_for_a_gpu, ("gpu", "gpu and not slow", "slow or gpu")))
    assert not any(map(asks_for_a_gpu, ("", "slow", "not slow and not gpu and not browser")))
