"""The modules that are moved to other devices, their size there, and which of them go where."""
from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch

from ..files.parameters import parts
from .allocation import RAM, normal

_GRAIN = 512  # bytes: torch's allocators round every tensor up to this


def footprint(module: torch.nn.Module) -> int:
    """Bytes of its tensors as a device's allocator counts them."""
    tensors = chain(module.parameters(), module.buffers())
    return sum(-(-part.nbytes // _GRAIN) * _GRAIN for tensor in tensors for part in parts(tensor))


def place_of(module: torch.nn.Module) -> str | None:
    """The device where all its parameters are; None where they are on several, or there are none."""
    places = {normal(str(parameter.device)) for parameter in module.parameters()}
    return places.pop() if len(places) == 1 else None


def by_device(module: torch.nn.Module, own: str) -> dict[str, int]:
    """Bytes of a model's parameters on each device but RAM and its own."""
    found: dict[str, int] = {}
    for leaf in module.modules():
        for parameter in leaf.parameters(recurse=False):
            device = normal(str(parameter.device))
            if device not in (RAM, own):
                size = sum(-(-part.nbytes // _GRAIN) * _GRAIN for part in parts(parameter))
                found[device] = found.get(device, 0) + size
    return found


def fill(sizes: Sequence[int], rooms: Sequence[tuple[str, int]]) -> list[str]:
    """The place of each block, in whole runs.

    A device is full, and the next one begins, with the first block that does not fit what is left of it; so it is short of its
    room by less than that block. A block that is larger than all of a device's room passes it by.

    Args:
        sizes: of the blocks, in the order in which they run.
        rooms: (device, bytes), in the order in which they are filled. What fits nowhere stays in RAM.
    """
    left = [room for _, room in rooms]
    first = 0
    places = []
    for size in sizes:
        at = first
        while at < len(rooms) and size > left[at]:
            if at == first and size <= rooms[at][1]:
                first += 1
            at += 1
        if at < len(rooms):
            left[at] -= size
        places.append(rooms[at][0] if at < len(rooms) else RAM)
    return places
