"""One model on several processes: DDP, or FSDP2 where it outgrows a device.

The checkpoint file is the same either way. Under FSDP2 each rank keeps one slice (a DTensor) of
every parameter, and so of its gradient, of the optimizer state and of the average. Only what runs,
one block at a time, is whole.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import gc
import inspect
import itertools
import logging
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from utils.config import Config, Problem
from utils.distributed import Runtime, from_launcher, world_size

log = logging.getLogger("diffusion")


def check_processes(config: Config) -> Iterator[Problem]:
    """Compare `gpu_ids` and `batch_size` with the number of processes; refuse what `strategy`
    cannot do."""
    if message := check_gpu_ids(config.gpu_ids):
        yield Problem(("gpu_ids",), message)
    count, micro_batches = world_size(), config.gradient_accumulation_steps
    if config.batch_size % (parts := count * micro_batches):
        message = (
            f"batch_size={config.batch_size} cannot be shared evenly by {count} process(es) with "
            f"gradient_accumulation_steps={micro_batches}; use a multiple of {parts}"
        )
        yield Problem(("batch_size", "gradient_accumulation_steps"), message)
    if config.strategy == "fsdp" and config.precision == "fp16":
        message = "precision='fp16' works with strategy='ddp' only; with 'fsdp' use bf16 or fp32"
        yield Problem(("precision", "strategy"), message)
    if config.strategy == "fsdp" and config.channels_last:
        message = "channels_last=True works with strategy='ddp' only"
        yield Problem(("channels_last", "strategy"), message)


def check_gpu_ids(gpu_ids: tuple[int, ...] | None) -> str | None:
    """Say what is wrong with `gpu_ids` for the processes of this node; None if nothing is."""
    if not gpu_ids:
        return None
    given, processes = f"gpu_ids={list(gpu_ids)}", from_launcher("LOCAL_WORLD_SIZE", 1)
    if len(gpu_ids) != processes:
        return (
            f"{given} names {len(gpu_ids)} GPU(s), but this node runs {processes} process(es), one "
            "per GPU; change gpu_ids or start it with `torchrun --standalone "
            f"--nproc_per_node={len(gpu_ids)} train.py ...`"
        )
    if len(set(gpu_ids)) != len(gpu_ids):
        return f"{given}: each GPU serves one process, name it once"
    if torch.cuda.is_available() and max(gpu_ids) >= (count := torch.cuda.device_count()):
        return f"{given}: this node has {count} CUDA device(s), numbered from 0"
    return None


def wrap_for_training(
    model: nn.Module, runtime: Runtime, strategy: str = "ddp", precision: str = "fp32"
) -> tuple[nn.Module, nn.Module]:
    """Make the ranks train one model: under `ddp` they hold it each, under `fsdp` together.

    `precision` is resolved: fp32 or bf16. Returns the module to optimize, average, save and load,
    and the one to call, whose gradients are averaged over the ranks.
    """
    if runtime.world_size == 1:
        if strategy == "fsdp":
            log.info("strategy=fsdp: one process, nothing to shard")
        return model, model
    if strategy == "fsdp":
        return shard(model, runtime, precision), model
    device_ids = [runtime.device] if runtime.device.type == "cuda" else None
    # Buffers are constants. Since torch 2.13 the argument has another name.
    names = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options = {"device_ids": device_ids, "gradient_as_bucket_view": True, sync: False}
    # The gradient of a 1x1 convolution may number its sides of length 1 otherwise: the same layout.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return model, DistributedDataParallel(model, **options)


def no_gradient_sync(network: nn.Module) -> contextlib.AbstractContextManager:
    """Context for all but the last micro-batch: gradients stay local.

    Not under FSDP: unreduced gradients are whole ones, the memory it is there to save.
    """
    if isinstance(network, DistributedDataParallel):
        return network.no_sync()
    return contextlib.nullcontext()


def shard(model: nn.Module, runtime: Runtime, precision: str) -> nn.Module:
    """Shard `model` in place over all ranks; it is to be called. Returns what is to be kept.

    That is a twin of the model as it was, of the same slices and buffers but without FSDP's
    hooks: to optimize, average, copy, save and load.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(runtime.device.type, (runtime.world_size,))
    atexit.register(_forget_group, mesh)
    # the twin must not hold on to the whole parameters, which are freed unit by unit
    placeholder = nn.Parameter(torch.empty(0))
    twin = copy_with(model, [placeholder for _ in model.parameters()])
    # the blocks of a backbone's lists of blocks; the root unit takes the rest
    lists = [blocks for blocks in model.children() if isinstance(blocks, nn.ModuleList)]
    for unit in itertools.chain.from_iterable(lists):
        # Autocast computes these layers in bf16 anyway: gathered in bf16 they give the same bits
        # for half the traffic, and nothing whole is kept for backward. Other layers it gives fp32
        # weights (norms, embeddings, a scan's decays), so those are gathered as they are.
        in_bf16 = precision == "bf16" and _has_only_matrices(unit)
        dtype = torch.bfloat16 if in_bf16 else None
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(owner), leaf, parameter)
    return twin


def _has_only_matrices(unit: nn.Module) -> bool:
    owners = (m for m in unit.modules() if next(m.parameters(recurse=False), None) is not None)
    return all(isinstance(module, nn.Linear | nn.Conv2d) for module in owners)


def _forget_group(mesh: DeviceMesh) -> None:
    """DTensor's caches outlive everything and keep the mesh, which keeps its process group, whose
    threads would then outlive the interpreter and abort at exit."""
    getattr(mesh, "_pg_registry", {}).clear()
    gc.collect()


def copy_with(model: nn.Module, parameters: Iterable[nn.Parameter]) -> nn.Module:
    """A copy of `model` that has these parameters, in its order, and shares its buffers."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    memo |= zip(map(id, model.parameters()), parameters, strict=True)
    return copy.deepcopy(model, memo)


def is_slice(tensor: Tensor) -> bool:
    """Whether it is a DTensor: told without an import that would slow the start of every script."""
    return hasattr(tensor, "full_tensor")


def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """List what this rank holds of each tensor: all of it, or its slice."""
    return [x.to_local() if is_slice(x) else x for x in tensors]


def full_tensor(tensor: Tensor) -> Tensor:
    """Return `tensor`, or the whole of a sharded one, on its device. A collective."""
    return tensor.full_tensor() if is_slice(tensor) else tensor


def full_model(model: nn.Module) -> nn.Module:
    """Return `model`, or of a sharded one (a twin, see `shard`) a whole copy. A collective.

    To sample: FSDP's own forward is a collective, too, and ranks whose shares of the images differ
    call it unequally often.
    """
    if not any(map(is_slice, model.parameters())):
        return model
    whole = [nn.Parameter(full_tensor(p.detach()), requires_grad=False) for p in model.parameters()]
    return copy_with(model, whole)


def snapshot(state: Any, *, keep: bool = True) -> Any:
    """Copy a state dict to the CPU, whole tensors for sharded ones, so that further training does
    not change it. A collective where something is sharded; ranks that only take part do not `keep`
    it: they get None for every tensor."""
    if isinstance(state, Tensor):
        whole = full_tensor(state.detach())
        # a copy leaves behind the padding with which uneven slices arrive
        return whole.to("cpu", copy=True) if keep else None
    if type(state) in (list, tuple):
        return type(state)(snapshot(value, keep=keep) for value in state)
    if not isinstance(state, dict):
        return state
    copied = copy.copy(state)  # its type and attributes, too: a module's has `_metadata`
    for key, value in state.items():
        copied[key] = snapshot(value, keep=keep)
    return copied


def load_model_state(model: nn.Module, state: dict[str, Any]) -> None:
    """`load_state_dict` of whole tensors, of which a sharded model takes this rank's slices."""
    own, slices = model.state_dict(), copy.copy(state)
    for name, value in state.items():
        slices[name] = slice_as(own.get(name), value)
    model.load_state_dict(slices)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`load_state_dict` of whole tensors, of which sharded parameters take this rank's slices. They
    lie in memory as their parameters do, whatever `channels_last` was when they were saved."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    owners = dict(zip(numbers, parameters, strict=False))  # load_state_dict tells of a mismatch
    slices = {
        number: {name: slice_as(owners.get(number), value) for name, value in moments.items()}
        for number, moments in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": slices})


def slice_as(owner: Tensor | None, value: Any) -> Any:
    """Bring `value` into the layout of its owner, if they are of the same shape (a step count is
    not), and cut this rank's slice of it, if the owner is sharded. There is no communication: every
    rank has the whole."""
    if owner is None or getattr(value, "shape", None) != owner.shape:
        return value
    if value.stride() != owner.stride():  # of which fused kernels take no notice on a CPU
        value = value.new_empty_strided(owner.shape, owner.stride()).copy_(value)
    if not is_slice(owner):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, owner.device_mesh, owner.placements, src_data_rank=None)
