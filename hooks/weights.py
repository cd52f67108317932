"""A ComfyUI patcher's parameters, as policies see them."""
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from ..policies.files.parameters import parts
from .answers import origin_of
from .gguf_weights import keeps_file_format
from .gguf_weights.dense import DenseRoom
from .load_plan import LoadPlan
from .shrinking import give_back, place_anew

_PAGE = 32 * 2**20  # of dynamic VRAM


class PatcherWeights:
    """Implements `policies.weights.Weights` over any `ModelPatcher`."""

    def __init__(self, patcher: Any) -> None:
        self._patcher = patcher

    @property
    def name(self) -> str:
        return type(self._patcher.model).__name__

    @property
    def module(self) -> torch.nn.Module:
        module: torch.nn.Module = self._patcher.model
        return module

    @property
    def streamed_by_host(self) -> bool:
        return bool(self._patcher.is_dynamic())

    def restored_by_host(self) -> set[str]:
        return {*self._patcher.backup, *self._patcher.hook_backup}

    def patched(self) -> set[str]:
        hooked = (name for patches in self._patcher.hook_patches.values() for name in patches)
        return {*self._patcher.patches, *hooked}

    def cast_at_use(self) -> list[tuple[str, torch.nn.Module]]:
        return [(name, module) for name, module in self.module.named_modules()
                if getattr(module, "comfy_cast_weights", False) and not getattr(module, "comfy_patched_weights", False)
                and next(module.children(), None) is None]

    def pinned(self) -> set[str]:
        return set(self._patcher.pinned)

    def unpin(self, name: str) -> None:
        self._patcher.unpin_weight(name)

    def end_patches(self) -> None:
        for layer in self._block_layers():
            layer.patch = None

    def dense_room(self) -> DenseRoom | None:
        layers: list[Any] = [] if self.streamed_by_host else self._block_layers()
        if layers and (layers[0].room is None or layers[0].room.device != self.load_device()):
            room = DenseRoom(self.load_device(), layers)
            for layer in layers:
                layer.drop_dense()
                layer.room = room
        return layers[0].room if layers else None

    def drop_dense(self) -> None:
        for layer in self._block_layers():
            layer.drop_dense()

    def _block_layers(self) -> list[Any]:
        return [module for module in self.module.modules() if keeps_file_format(module)]

    def keep_mapping(self) -> None:
        # ComfyUI-GGUF and packs that began as copies of it ask this of their patcher, at each load and before page-locking.
        if hasattr(self._patcher, "mmap_released"):
            self._patcher.mmap_released = True

    def give_back(self, size: float) -> int:
        return give_back(self._patcher, size)

    def place_anew(self) -> None:
        place_anew(self._patcher)

    def size(self) -> int:
        """Bytes of all weights."""
        return int(self._patcher.model_size())

    def on_device(self) -> int:
        """Bytes that the host counts as loaded on the device."""
        return int(self._patcher.loaded_size())

    def load_device(self) -> str:
        return str(self._patcher.load_device)

    @property
    def component(self) -> str:
        return origin_of(self._patcher).component

    @property
    def paths(self) -> tuple[str, ...]:
        return origin_of(self._patcher).paths

    def by_device(self) -> Mapping[str, int]:
        found: Counter[str] = Counter()
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            for part in parts(tensor):
                found[str(part.device)] += part.nbytes
        if self.streamed_by_host:  # its own pages; the parameters stay where they are
            found[self.load_device()] += self.on_device()
        return found

    @cached_property
    def _plan(self) -> LoadPlan | None:
        return None if self.streamed_by_host else LoadPlan(self._patcher)

    def foreseen(self, more: float, split: bool = False) -> int:
        return self._plan.foreseen(more, split) if self._plan is not None else 0

    def left_over(self, more: float, split: bool = False) -> int:
        return self._plan.left_over(more, split) if self._plan is not None else 0

    def more_for(self, limit: int) -> float:
        return self._plan.more_for(limit) if self._plan is not None else 0.0

    def take_off(self) -> None:
        self.__dict__.pop("_plan", None)
        self._patcher.unpatch_model(self._patcher.offload_device, True)

    def cap(self, limit: int) -> bool:
        ranges = getattr(self.module, "dynamic_vbars", {})
        pages = ranges.get(self._patcher.load_device)
        if pages is None or not hasattr(pages, "set_watermark"):
            return False
        pages.set_watermark(limit // _PAGE * _PAGE)  # the library rounds up
        return True
