"""A ComfyUI patcher's parameters, as policies see them."""
from __future__ import annotations

from typing import Any

import torch

from .gguf_weights import keeps_file_format
from .gguf_weights.dense import DenseRoom
from .shrinking import give_back, place_anew


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
