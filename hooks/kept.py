"""A loader's answer, kept to be lent again.

Models and text encoders have clones, which share the weights; a VAE has none, so it is copied as the host's own device node
copies it: the object, with a clone of its patcher.
"""
from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any
from weakref import ref

import comfy.model_management
import torch

from ..policies.files.bank import Bank
from ..policies.files.parameters import parts
from ..policies.memory import Residency
from . import devices
from .answers import kind_of, patcher_of

_SAMPLES = 16
_HOST_MARKS = {"_select_base_load_device", "_select_base_offload_device"}  # what the host's device nodes come back to
_alone: ContextVar[bool] = ContextVar("residency_wanted_alone", default=False)


def wanted_alone() -> bool:
    """Whether the host is making a model that shares its weights with nobody."""
    return _alone.get()


class Reload:
    """The host's factory for a model of its own (`cached_patcher_init`), which a cached one must not answer."""

    def __init__(self, factory: Callable[..., Any]) -> None:
        self.factory = factory

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        token = _alone.set(True)
        try:
            return self.factory(*args, **kwargs)
        finally:
            _alone.reset(token)


def keep(answer: Any, bank: Bank) -> Kept | None:
    """None for an answer that holds something which can be neither cloned nor copied, or no weights at all."""
    parts = answer if isinstance(answer, tuple) else (answer,)
    patchers = [patcher for patcher in map(patcher_of, parts) if patcher is not None]
    copyable = all(part is None or hasattr(part, "clone") or hasattr(part, "patcher") for part in parts)
    return Kept(answer, patchers, bank) if patchers and copyable else None


class Kept:
    """Implements `policies.models.Kept`."""

    def __init__(self, answer: Any, patchers: list[Any], bank: Bank) -> None:
        self._answer, self._patchers, self._bank = answer, patchers, bank
        self._lent: list[ref[Any]] = []
        for patcher in patchers:
            factory = patcher.cached_patcher_init
            if factory is not None and not isinstance(factory[0], Reload):
                patcher.cached_patcher_init = (Reload(factory[0]), *factory[1:])
        layers = _named_layers(patchers)
        self._layers, self._marks, self._weights = _shape(layers), _marks(patchers), _samples(patchers, layers)
        kinds = [kind_of(part) for part in (answer if isinstance(answer, tuple) else (answer,)) if patcher_of(part) is not None]
        self._followed = [kind if _devices(patcher) == devices.role(kind) else None
                          for patcher, kind in zip(patchers, kinds, strict=True)]

    def lend(self) -> Any:
        lent = tuple(map(self._copy, self._answer)) if isinstance(self._answer, tuple) else self._copy(self._answer)
        self._lent += [ref(patcher_of(part)) for part in (lent if isinstance(lent, tuple) else (lent,)) if patcher_of(part)]
        return lent

    def in_use(self) -> bool:
        self._lent = [lent for lent in self._lent if lent() is not None]
        return bool(self._lent)

    def modules(self) -> list[torch.nn.Module]:
        return [patcher.model for patcher in self._patchers]

    def residency(self) -> Mapping[Residency, int]:
        where: Counter[Residency] = Counter()
        pinned = getattr(comfy.model_management, "PINNED_MEMORY", {})
        for module in self.modules():
            for tensor in (*module.parameters(), *module.buffers()):
                for part in parts(tensor):
                    where[self._residency(part, pinned)] += part.nbytes
        return where

    def altered(self) -> str | None:
        layers = _named_layers(self._patchers)
        if _shape(layers) != self._layers:
            return "another pack changed its layers"
        marks = _marks(self._patchers) - self._marks
        if marks:
            return f"another pack set {', '.join(sorted(marks))} on it"
        now = _samples(self._patchers, layers)
        changed = next((name for name, sample in self._weights.items() if now.get(name) != sample), None)
        return None if changed is None and len(now) == len(self._weights) else f"another pack changed the weight {changed}"

    def drop(self) -> None:
        self._answer, self._patchers = None, []

    def place(self) -> None:
        with torch.inference_mode():  # weights that were made inside cannot be moved outside
            comfy.model_management.load_models_gpu(self._patchers, force_full_load=True)

    def follow_devices(self) -> None:
        for patcher, kind in zip(self._patchers, self._followed, strict=True):
            if kind is not None:
                patcher.load_device, patcher.offload_device = devices.role(kind)
        for part in self._answer if isinstance(self._answer, tuple) else (self._answer,):
            if hasattr(part, "first_stage_model"):
                part.device = part.patcher.load_device

    @staticmethod
    def _copy(part: Any) -> Any:
        if part is None or hasattr(part, "clone"):
            return None if part is None else part.clone()
        copied = copy.copy(part)
        copied.patcher = part.patcher.clone()
        return copied

    def _residency(self, tensor: torch.Tensor, pinned: Mapping[int, int]) -> Residency:
        if tensor.device.type != "cpu":
            return Residency.DEVICE
        # The second is dynamic VRAM's mark on a storage that is its own mapping of the file.
        if self._bank.file_of(tensor) is not None or hasattr(tensor.untyped_storage(), "_comfy_tensor_mmap_refs"):
            return Residency.MAPPED
        return Residency.PINNED if tensor.data_ptr() in pinned else Residency.HOST


def _devices(patcher: Any) -> tuple[Any, Any]:
    return patcher.load_device, patcher.offload_device


def _named_layers(patchers: list[Any]) -> list[tuple[int, str, torch.nn.Module]]:
    """(which patcher, name, layer) of all layers. Walked once: a large model has thousands."""
    return [(index, name, layer) for index, patcher in enumerate(patchers) for name, layer in patcher.model.named_modules()]


def _shape(layers: list[tuple[int, str, torch.nn.Module]]) -> list[tuple[str, type, bool, int]]:
    """Each layer by name and class, and whether somebody hangs on it."""
    return [(name, type(layer), "forward" in vars(layer), len(layer._forward_hooks) + len(layer._forward_pre_hooks))
            for _, name, layer in layers]


def _marks(patchers: list[Any]) -> set[str]:
    """Private attributes of the models themselves, where packs leave notes for later loads."""
    return {name for patcher in patchers for name in vars(patcher.model) if name.startswith("_")} - _HOST_MARKS


def _originals(patchers: list[Any], layers: list[tuple[int, str, torch.nn.Module]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each weight as it was before LoRA and hooks, which the host has in its backups while they are on."""
    backups = [(patcher.backup, patcher.hook_backup) for patcher in patchers]
    for index, path, layer in layers:
        for key, parameter in layer._parameters.items():
            if parameter is not None:
                name = f"{path}.{key}" if path else key
                backup, hook_backup = backups[index]
                if name in hook_backup:
                    parameter = hook_backup[name][0]
                elif name in backup:
                    parameter = backup[name].weight
                yield f"{index}.{name}", parameter


def _samples(patchers: list[Any], layers: list[tuple[int, str, torch.nn.Module]]) -> dict[str, bytes]:
    """A few elements of each weight, from all over it: a pack that writes into weights writes into whole ones.

    Floats are compared as float32: a weight that is widened is still the same. It runs at each load that is kept, over
    thousands of weights: a call or two of torch's for each is what there is time for.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[str, torch.Tensor]]] = {}
    for name, weight in _originals(patchers, layers):
        for number, part in enumerate(parts(weight.data)):
            count = part.numel()
            if count and part.is_contiguous():
                step = max(1, count // _SAMPLES)
                picked = part.as_strided((min(_SAMPLES, -(-count // step)),), (step,))
                groups.setdefault((part.device, part.dtype), []).append((f"{name}.{number}", picked))
    found: dict[str, bytes] = {}
    for (_, dtype), picks in groups.items():
        # One byte is what it is: fp8 and packed formats have no arithmetic on some devices.
        joined = torch.cat([picked.view(torch.uint8) if dtype.itemsize == 1 else picked for _, picked in picks])
        values = (joined.float() if joined.is_floating_point() else joined).cpu().numpy().tobytes()
        size, start = len(values) // len(joined), 0
        for name, picked in picks:
            end = start + size * picked.shape[0]
            found[name] = values[start:end]
            start = end
    return found
