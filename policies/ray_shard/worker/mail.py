"""Bytes that one rank sends to another, or to all, while both go on computing."""
from __future__ import annotations

from collections.abc import Callable

import torch

from .group import Group


class Pending:
    """Bytes on their way.

    Args:
        arrive: waits until they have moved.
        device: that they are wanted on.
    """

    def __init__(self, data: torch.Tensor, arrive: Callable[[], None], device: torch.device) -> None:
        self._data, self._arrive, self._device = data, arrive, device

    def wait(self) -> torch.Tensor:
        """The bytes, where they are wanted; they can be had once.

        Raises:
            PeerLost: another rank did not take part.
        """
        self._arrive()
        data = self._data
        del self._arrive, self._data  # whoever keeps this does not keep what carried them
        return data.to(self._device)


def broadcast(group: Group, root: int, data: torch.Tensor | int, device: torch.device) -> Pending:
    """From one rank to all.

    Args:
        data: the bytes; on other ranks than `root`, how many will come.
        device: that they are wanted on; for `root` a copy stays where it is.
    """
    if isinstance(data, torch.Tensor):
        moving = data.to(group.place(data.device))
        return Pending(data, group.begin("broadcast", moving, root), data.device)
    moving = torch.empty(data, dtype=torch.uint8, device=group.place(device))
    return Pending(moving, group.begin("broadcast", moving, root), device)


def send(group: Group, rank: int, data: torch.Tensor) -> Pending:
    """To one rank, which receives them; what is given may be written to at once."""
    place = group.place(data.device)
    moving = data.clone() if place == data.device else data.to(place)
    return Pending(moving, group.begin("send", moving, rank), place)


def receive(group: Group, rank: int, count: int, device: torch.device) -> Pending:
    """So many bytes, which that rank sends."""
    moving = torch.empty(count, dtype=torch.uint8, device=group.place(device))
    return Pending(moving, group.begin("recv", moving, rank), device)
