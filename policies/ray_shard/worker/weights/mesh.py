"""What FSDP2 wants of a group of ranks: a device mesh, and a way to gather.

A mesh is of torch's global process group. A group here is none (see `group`), so that one is there in name only, and says who
this rank is; bytes go by the group, which is found out and closed when a rank dies, and takes every kind of device.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed

from ..group import Group

dist: Any = torch.distributed
_BACKEND = "residency"
_meshes: WeakKeyDictionary[Group, Any] = WeakKeyDictionary()


class _Named(dist.ProcessGroup):  # type: ignore[misc]  # its C++ half has no types
    """A process group in name only."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__(rank, world)
        self._name = ""

    def getBackendName(self) -> str:
        return _BACKEND

    def _set_group_name(self, name: str) -> None:
        self._name = name

    @property
    def group_name(self) -> str:
        return self._name


def why_not() -> str:
    """Why there can be no mesh in this process; "" if there can."""
    from torch.distributed import fsdp

    kind = getattr(fsdp, "FSDPModule", None)
    if kind is None:
        return f"torch {torch.__version__} has no FSDP2"
    if not hasattr(kind, "set_custom_all_gather"):
        return f"the FSDP2 of torch {torch.__version__} gathers in no other way than its own"
    if dist.is_initialized() and dist.get_backend() != _BACKEND:
        return f"something else here uses torch's global process group, by {dist.get_backend()}"
    return ""


def mesh_of(group: Group, device: torch.device) -> Any:
    """A device mesh of all ranks: one for each group, the last of which is in use."""
    from torch.distributed.device_mesh import DeviceMesh

    if group not in _meshes:
        if dist.is_initialized():  # for a group that was left
            dist.destroy_process_group()
        if _BACKEND not in dist.Backend.backend_list:
            dist.Backend.register_backend(_BACKEND, lambda store, rank, world, patience: _Named(rank, world),
                                          devices=sorted({"cpu", device.type}))
        dist.init_process_group(_BACKEND, store=dist.HashStore(), rank=group.rank, world_size=group.world)
        _meshes[group] = DeviceMesh.from_group(dist.group.WORLD, device.type)
    return _meshes[group]


class Gather:
    """FSDP2's way to gather (`torch.distributed.fsdp`, `set_custom_all_gather`), by a group."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, async_op: bool = False) -> Any:
        arriving = _Arriving(self._group.begin_gather(output_tensor, input_tensor))
        if async_op:
            return arriving
        arriving.wait()
        return None


class _Arriving(dist.Work):  # type: ignore[misc]
    def __init__(self, arrived: Callable[[], None]) -> None:
        super().__init__()
        self._arrived = arrived

    def wait(self, timeout: Any = None) -> bool:
        self._arrived()
        return True
