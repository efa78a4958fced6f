"""Models that outgrow a device: PyTorch's FSDP2, with the same checkpoint file out and in.

Each rank keeps one slice (a DTensor) of every parameter, and so of its gradient, of the optimizer
state and of the average. Only what runs, one block at a time, is whole.
"""

from __future__ import annotations

import atexit
import copy
import gc
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: nn.Module, device: torch.device, world_size: int, *, precision: str) -> nn.Module:
    """Shard `model` in place over all ranks; it is to be called. Returns what is to be kept.

    That is a twin of the model as it was, of the same slices and buffers but without FSDP's
    hooks: to optimize, average, copy, save and load.

    Args:
        precision: resolved: fp32 or bf16.
    """
    mesh = init_device_mesh(device.type, (world_size,))
    atexit.register(_forget_group, mesh)
    # the twin must not hold on to the whole parameters, which are freed unit by unit
    placeholder = nn.Parameter(torch.empty(0))
    twin = copy_with(model, [placeholder for _ in model.parameters()])
    for unit in _units(model):
        # Autocast computes these layers in bf16 anyway: gathered in bf16 they give the same bits
        # for half the traffic, and nothing whole is kept for backward. Other layers it gives fp32
        # weights (norms, embeddings, a scan's decays), so those are gathered as they are.
        in_bf16 = precision == "bf16" and _has_only_matrices(unit)
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if in_bf16 else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(owner), leaf, parameter)
    return twin


def _units(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a backbone's lists of blocks; the root takes the rest."""
    for blocks in model.children():
        if isinstance(blocks, nn.ModuleList):
            yield from blocks


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
    for old, new in zip(model.parameters(), parameters, strict=True):
        memo[id(old)] = new
    return copy.deepcopy(model, memo)


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def local_parameters(model: nn.Module) -> list[Tensor]:
    """What this rank holds of each parameter: all of it, or its slice."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]


def full_tensor(tensor: Tensor) -> Tensor:
    """`tensor`, or the whole of a sharded one, on its device. A collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_model(model: nn.Module) -> nn.Module:
    """`model`, or if it is sharded (a twin, see `shard`) a whole copy on every rank. A collective.

    To sample: FSDP's own forward is a collective, too, and ranks whose shares of the images differ
    call it unequally often.
    """
    if not is_sharded(model):
        return model
    whole = [nn.Parameter(full_tensor(p.detach()), requires_grad=False) for p in model.parameters()]
    return copy_with(model, whole)


def full_state(state: Any, *, keep: bool) -> Any:
    """`state`, in whose dicts whole tensors on the CPU replace the sharded ones. A collective.

    Args:
        keep: False on ranks that only take part: they get None for those tensors.
    """
    if isinstance(state, DTensor):
        return _full_on_cpu(state, keep)
    if not isinstance(state, dict):
        return state
    whole = copy.copy(state)  # its type and attributes, too: a module's has `_metadata`
    for key, value in state.items():
        whole[key] = full_state(value, keep=keep)
    return whole


def _full_on_cpu(tensor: DTensor, keep: bool) -> Tensor | None:
    whole = tensor.detach().full_tensor()
    if not keep:
        return None
    whole = whole.cpu()
    # uneven slices arrive with padding at their end, which a file would carry along
    is_padded = whole.untyped_storage().nbytes() > whole.nbytes
    return whole.clone() if is_padded else whole


def load_model_state(model: nn.Module, state: dict[str, Any]) -> None:
    """`load_state_dict` of whole tensors, of which a sharded model takes this rank's slices."""
    own, slices = model.state_dict(), copy.copy(state)
    for name, value in state.items():
        slices[name] = _slice_as(own.get(name), value)
    model.load_state_dict(slices)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`load_state_dict` of whole tensors, of which sharded parameters take this rank's slices."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    owners = dict(zip(numbers, parameters, strict=False))  # load_state_dict tells of a mismatch
    slices = {
        number: {name: _slice_as(owners.get(number), value) for name, value in moments.items()}
        for number, moments in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": slices})


def _slice_as(owner: Tensor | None, value: Any) -> Any:
    """This rank's slice of `value`, if its owner is sharded and of the same shape (a step count is
    not). No communication: every rank has the whole."""
    if not isinstance(owner, DTensor) or value.shape != owner.shape:
        return value
    return distribute_tensor(value, owner.device_mesh, owner.placements, src_data_rank=None)
