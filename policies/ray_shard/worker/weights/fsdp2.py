"""Each worker has a part of every block, all of them as large; they put a block together before it is computed.

By torch's FSDP2 (`torch.distributed.fsdp.fully_shard`). What it shards is a block's bytes in one piece, so that any
format goes: all send at the same time, where a block with one owner comes from that one alone.
"""
from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from . import sheets
from .fetched import Fetched
from .mesh import Gather, mesh_of, why_not
from .units import Unit, Weights

_NOBODY = -1
_NUMBER = torch.float32  # FSDP2 takes floating-point numbers alone; they are moved, and nothing is computed with them


class Fsdp2(Fetched):
    """See `Owned`. Parts are equal, whatever the ranks' shares are."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._parts: dict[int, Any] = {}  # by block: a module that FSDP2 shards

    def bytes_here(self) -> int:
        return super().bytes_here() + sum(int(part.flat.to_local().nbytes) for part in self._parts.values())

    def _taken_off(self) -> None:
        self._parts.clear()

    def _owners(self, sizes: Sequence[int], shares: Sequence[float]) -> list[int]:
        return [_NOBODY] * len(sizes)

    def _beside(self) -> int:
        return -(-sum(unit.bytes for unit in self.units) // self.group.world)

    def _placed(self) -> str | None:
        if reason := why_not():
            return reason
        mesh = mesh_of(self.group, self._patcher.load_device)
        for index, unit in enumerate(self.units):
            weights = self._patched(unit, self._away[index])
            with _outside():
                flat, self._sheets[index] = sheets.write(weights, self._patcher.load_device)
                self._parts[index] = _part(flat, mesh, Gather(self.group))
        return None

    def _patched(self, unit: Unit, weights: Weights) -> Weights:
        """A block's, with what is patched; they are not in the block any more."""
        unit.lay(weights)
        for key in self._patched_in(unit):
            self._patcher.patch_weight_to_device(key, device_to=self._patcher.load_device)
            self._patcher.backup.pop(key, None)  # these go back by `drop`
        made = unit.weights()
        unit.lay(dict.fromkeys({**weights, **made}))
        return made

    def _told(self, rank: int, news: Any) -> None: ...

    def _begin(self, index: int) -> _Whole:
        return _Whole(self._parts[index])

    def _done(self, index: int) -> None:
        self._parts[index].reshard()


class _Whole:
    """A part that becomes the whole."""

    def __init__(self, part: Any) -> None:
        self._part = part
        with _outside():
            self._handle = part.unshard(async_op=True)

    def wait(self) -> torch.Tensor:
        with _outside():
            self._handle.wait()
        whole: torch.Tensor = self._part.flat
        return whole


@contextlib.contextmanager
def _outside() -> Iterator[None]:
    """FSDP2 looks at the versions of tensors, which those of inference mode do not have."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _part(flat: torch.Tensor, mesh: Any, gather: Gather) -> Any:
    """This rank's part of these bytes, which are as many as some numbers have."""
    from torch.distributed.fsdp import fully_shard

    part = torch.nn.Module()
    part.flat = torch.nn.Parameter(flat.view(_NUMBER), requires_grad=False)
    made: Any = fully_shard(part, mesh=mesh, reshard_after_forward=False)
    made.set_custom_all_gather(gather)
    return made
