"""A model that is in use gives device memory back, and computes the same numbers with what is left."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from uuid import uuid4
from weakref import ref

import comfy.utils
import torch

from .gguf_weights import keeps_file_format


def give_back(patcher: Any, size: float) -> int:
    """The host takes weights of about `size` bytes off the device, to cast them at use; 0 where the model cannot do without.

    Returns:
        bytes.
    """
    if patcher.is_dynamic():
        return _pages(patcher, size)
    if not _streams(patcher.model):
        return 0
    patcher.unpatch_hooks()  # they would put weights back on the device later; the next step puts the hooks on again
    if not patcher.patches:
        return int(patcher.partially_unload(patcher.offload_device, size))
    with _patched_as_they_are(patcher):  # what the host patches at each use it rounds otherwise
        freed = int(patcher.partially_unload(patcher.offload_device, size, force_patch_weights=True))
    place_anew(patcher)
    return freed


@contextmanager
def _patched_as_they_are(patcher: Any) -> Iterator[None]:
    """While inside, a weight that the host patches anew off the device is the one that it patched there before, moved.

    Another processor's arithmetic gives other last bits, and its random numbers round fp8 in another way.
    """
    backup, patch = dict(patcher.backup), patcher.patch_weight_to_device
    there = {name: parameter for name, parameter in patcher.model.named_parameters()
             if name in backup and not backup[name].inplace_update}

    def move(key: str, *args: Any, **kwargs: Any) -> Any:
        patched = there.pop(key, None)
        if patched is None:
            return patch(key, *args, **kwargs)
        patcher.backup[key] = backup[key]
        return comfy.utils.set_attr_param(patcher.model, key, patched.to(patcher.offload_device))

    patcher.patch_weight_to_device = move
    try:
        yield
    finally:
        del patcher.patch_weight_to_device


def place_anew(patcher: Any) -> None:
    """At its next placing the host undoes all LoRA, and loads the model from the start.

    It does so where it finds other patches applied than those it wants. Without that, a weight which was patched off the
    device would be patched once more when it moves there.
    """
    model, applied = ref(patcher.model), uuid4()
    patcher.model.current_weight_patches_uuid = applied

    def in_force() -> bool:
        return bool(getattr(model(), "current_weight_patches_uuid", None) == applied)

    for layer in filter(keeps_file_format, patcher.model.modules()):
        if layer.patch is not None:
            layer.patch = replace(layer.patch, in_force=in_force)


def _pages(patcher: Any, size: float) -> int:
    before = patcher.loaded_size()
    patcher.partially_unload(patcher.offload_device, size)
    if not patcher.model.model_loaded_weight_memory:  # small weights went too, and those are not paged back in
        patcher.partially_load(patcher.load_device)
    return int(before - patcher.loaded_size())


def _streams(model: torch.nn.Module) -> bool:
    """The host's layers cast their weights at use, and so do the models' own; torch's do not."""
    return all(hasattr(module, "comfy_cast_weights") or not type(module).__module__.startswith("torch.nn.")
               for module in model.modules() if any(True for _ in module.parameters(recurse=False)))
