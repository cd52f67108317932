"""ComfyUI's patcher, which leaves GGUF weights in their blocks, as it does in ComfyUI's process with our hooks."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.model_patcher


class Patcher(comfy.model_patcher.ModelPatcher):  # type: ignore[misc]  # the host has no types
    """Layers over blocks add a LoRA to their dense weight at each use, and keep what a scheduled one writes beside the blocks.
    All others are patched as ComfyUI does it."""

    def patch_weight_to_device(self, key: str, *args: Any, **options: Any) -> Any:
        if options.get("return_weight") or not self.patch_at_use(key):
            return super().patch_weight_to_device(key, *args, **options)
        return None

    def patch_at_use(self, key: str) -> bool:
        """Whether this weight is patched at each use, from now on."""
        layer = self._over_blocks(key)
        if layer is None or key not in self.patches:
            return False
        layer.patch_at_use(key, self)
        return True

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            for layer in self.model.modules():
                if hasattr(layer, "patch_at_use"):
                    layer.patch = None  # a LoRA's weights do not outlive it

    def patch_cached_hook_weights(self, cached_weights: Mapping[str, Any], key: str, memory_counter: Any) -> None:
        layer = self._over_blocks(key)
        if layer is None:
            super().patch_cached_hook_weights(cached_weights, key, memory_counter)
            return
        weight, device = cached_weights[key]
        if key not in self.hook_backup:
            self.hook_backup[key] = layer.weight.to(device=self.offload_device, copy=True), layer.weight.device
        layer.write(weight.to(device=device))

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        hooked = set(self.hook_backup)
        super().unpatch_hooks(whitelist_keys_set)
        for key in hooked - set(self.hook_backup):
            layer = self._over_blocks(key)
            if layer is not None:
                layer.written = None

    def _over_blocks(self, key: str) -> Any:
        """The layer of a weight that is in a file's format; None for all others."""
        path, _, leaf = key.rpartition(".")
        layer = self.model.get_submodule(path)
        return layer if leaf == "weight" and getattr(layer, "keeps_file_format", False) else None
