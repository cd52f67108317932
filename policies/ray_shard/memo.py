"""Conditioning is the same at every step, but the host makes it anew each time: what a worker has is named, not sent again.

A tensor is known again by its bytes. Its identity says nothing, the host joins conditionings anew for each batch, and neither
does its shape: two prompts have the same one.
"""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .parcels import Parcel, pack, unpack

_SMALL = 2**16  # bytes
_MOST = 32
_CHANGING = ("transformer_options", "control")  # made of what is new at every step


@dataclass(frozen=True)
class Known:
    """Stands for a tensor that the other side has."""

    number: int


@dataclass(frozen=True)
class New:
    """A tensor, and the number that it has from now on."""

    number: int
    tensor: torch.Tensor


class Sent:
    """The sending side, of one worker. Each parcel says which numbers are still in use; the worker forgets all others."""

    def __init__(self) -> None:
        self._sent: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._next = 0

    def pack(self, x: torch.Tensor, rest: Mapping[str, Any]) -> Parcel:
        """A prediction's arguments."""
        named = {name: value if name in _CHANGING else self._name(value) for name, value in rest.items()}
        return pack((tuple(self._sent), {"x": x, **named}), files=False)

    def clear(self) -> None:
        """It is not known what the worker has: all is sent anew."""
        self._sent.clear()

    def _name(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value if value.nbytes < _SMALL or not value.is_floating_point() else self._known(value)
        if isinstance(value, dict):
            return {name: self._name(one) for name, one in value.items()}
        return type(value)(map(self._name, value)) if type(value) in (list, tuple) else value

    def _known(self, value: torch.Tensor) -> Known | New:
        for number, sent in reversed(self._sent.items()):
            if _same(value, sent):
                self._sent.move_to_end(number)
                return Known(number)
        self._next += 1
        self._sent[self._next] = value.clone()
        if len(self._sent) > _MOST:
            self._sent.popitem(last=False)
        return New(self._next, value)


class Received:
    """The receiving side."""

    def __init__(self) -> None:
        self._received: dict[int, torch.Tensor] = {}

    def open(self, parcel: Parcel, device: torch.device) -> dict[str, Any]:
        """The arguments, with all tensors on a device, to be written to at will.

        Raises:
            KeyError: the sender takes something for known that is not.
        """
        used, named = unpack(parcel, writable=True)
        opened: dict[str, Any] = self._place(named, device)
        self._received = {number: tensor for number, tensor in self._received.items() if number in used}
        return opened

    def _place(self, value: Any, device: torch.device) -> Any:
        if isinstance(value, New):
            self._received[value.number] = value.tensor.to(device)
            value = Known(value.number)
        if isinstance(value, Known):
            return self._received[value.number].clone()
        if isinstance(value, torch.Tensor):
            return value.to(device)
        if isinstance(value, dict):
            return {name: self._place(one, device) for name, one in value.items()}
        return type(value)(self._place(one, device) for one in value) if type(value) in (list, tuple) else value


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit: 0 and -0 differ."""
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    words = torch.int64 if one.dtype.itemsize == 8 else torch.int32 if one.dtype.itemsize == 4 else \
        torch.int16 if one.dtype.itemsize == 2 else torch.uint8
    return torch.equal(one.contiguous().view(words), other.contiguous().view(words))
