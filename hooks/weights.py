"""A ComfyUI patcher's parameters, as policies see them."""
from __future__ import annotations

from typing import Any

import torch

from .gguf_weights import keeps_file_format


class PatcherWeights:
    """Implements `policies.requests.Weights` over any `ModelPatcher`."""

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
        module: Any
        for module in self.module.modules():
            if keeps_file_format(module):
                setattr(module, "patch", None)  # noqa: B010  torch types every attribute of a module as a tensor or a module

    def keep_mapping(self) -> None:
        # ComfyUI-GGUF and packs that began as copies of it ask this of their patcher, at each load and before page-locking.
        if hasattr(self._patcher, "mmap_released"):
            self._patcher.mmap_released = True

    def size(self) -> int:
        """Bytes of all weights."""
        return int(self._patcher.model_size())

    def on_device(self) -> int:
        """Bytes that the host counts as loaded on the device."""
        return int(self._patcher.loaded_size())

    def load_device(self) -> str:
        return str(self._patcher.load_device)
