"""What ComfyUI's classic patcher will do with a budget, without doing it.

Follows `ModelPatcher.partially_load`, `load` and `partially_unload`, which are alike in all supported versions: modules are
taken largest first (by what streaming them costs), while they fit together with the buffer that streams the rest.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import comfy.model_management

_MISSING = object()
_GRAIN = 1024  # bytes; no module that matters is smaller


class Piece(NamedTuple):
    """A module.

    Attributes:
        streaming: device bytes that using it takes while it is off the device.
        size: bytes of its weights.
        loaded: whether they are on the device now.
    """

    streaming: int
    size: int
    name: str
    loaded: bool


class LoadPlan:
    """One patcher's modules, listed once. Budgets are bytes beside what the model has on the device, as the host gives them.

    Args:
        patcher: a classic `ModelPatcher`.
    """

    def __init__(self, patcher: Any) -> None:
        model = patcher.model
        self.size, held = int(patcher.model_size()), int(patcher.loaded_size())
        # A change of LoRA takes everything off the device first.
        anew = model.current_weight_patches_uuid not in (None, patcher.patches_uuid)
        self.held = 0 if anew else held
        self._before = held
        self._whole = not model.model_lowvram and self.held > 0
        self._buffer = 0 if anew else int(model.model_offload_buffer_memory)
        self._streams = int(comfy.model_management.NUM_STREAMS)
        self._pieces = sorted((Piece(cost, size, name, not anew and getattr(module, "comfy_patched_weights", False) is True)
                               for cost, size, name, module, _ in _listed(patcher)), reverse=True)

    def foreseen(self, more: float, split: bool = False) -> int:
        """Bytes of weights on the device after the host was given `more`.

        Args:
            split: the host is kept from loading everything at once where the budget with its buffer is as large as the model.
        """
        total = more + self._before
        if total < self.held:
            return self.held - self._taken_off(self.held - total)
        if self._whole:
            return self.held
        return self.size if total > self.size and not split else sum(piece.size for piece in self._put_on(total))

    def left_over(self, more: float, split: bool = False) -> int:
        """Bytes that would stay on the device though the host counts them as off: modules that fitted into another budget."""
        total = more + self._before
        if self._whole or total < self.held or (total > self.size and not split):
            return 0
        fitting = set(self._put_on(total))
        return sum(piece.size for piece in self._pieces if piece.loaded and piece not in fitting)

    def more_for(self, limit: int) -> float:
        """The budget with which most of `limit` bytes of weights are on the device, and not one byte above; `split` then."""
        if limit >= self.size:
            return float(self.size + 1 - self._before)
        if self._whole or self.held > limit:
            return float(limit - self._before)
        # The host keeps room for its buffer within the budget; so the budget is raised by what is still missing.
        lowest, highest = float(limit), float(limit + self._largest_buffer())
        while highest - lowest > _GRAIN:
            middle = (lowest + highest) / 2
            if sum(piece.size for piece in self._put_on(middle)) <= limit:
                lowest = middle
            else:
                highest = middle
        return lowest - self._before

    def _largest_buffer(self) -> int:
        following = sorted((piece.size for piece in self._pieces), reverse=True)[:self._streams]
        return max((piece.streaming for piece in self._pieces), default=0) + sum(following) + 1

    def _put_on(self, total: float) -> list[Piece]:
        buffer = used = 0
        fitting = []
        for index, piece in enumerate(self._pieces):
            streaming = max(buffer, piece.streaming + sum(
                following.size for following in self._pieces[index + 1:index + 1 + self._streams]))
            if used + piece.size + streaming < total:
                used += piece.size
                fitting.append(piece)
            else:
                buffer = streaming
        return fitting

    def _taken_off(self, size: float) -> int:
        ascending = self._pieces[::-1]
        buffer, freed = float(self._buffer), 0
        ahead = [min(buffer / (self._streams + 1), ascending[0].size)] * self._streams if ascending else []
        for piece in ascending:
            if size + buffer - self._buffer < freed:
                break
            if piece.loaded:
                buffer = max(buffer, piece.streaming + sum(ahead))
                freed += piece.size
                ahead = [*ahead, piece.size][1:] if ahead else []
        return freed


def _listed(patcher: Any) -> list[Any]:
    """The host's own list of modules, as it will be: the dtype to compute in, which it asks for, is a patch of the model."""
    model, name = patcher.model, "manual_cast_dtype"
    before = vars(model).get(name, _MISSING)
    if name in patcher.object_patches:
        setattr(model, name, patcher.object_patches[name])
    try:
        return list(patcher._load_list())
    finally:
        if before is _MISSING:
            vars(model).pop(name, None)
        else:
            setattr(model, name, before)
