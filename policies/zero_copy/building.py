"""Building models over a file's mapping.

While the host builds a model, `load_state_dict` gets tensors to *assign* instead of to copy, wherever that changes nothing:
the same dtype and shape, contiguous, on the CPU, from a mapping. Everything else is copied into the parameter first, as
the host would, and then "assigned" to itself.
"""
from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ...telemetry import emit
from ..files.bank import Bank, MappedFile
from ..files.parameters import Homes, is_plain, parts, put
from ..files.subclasses import has_own_memory
from ..policy import Decision, Effect, Proceed
from ..requests import BuildModel, FillModule

NOTABLE = 2**20  # bytes; below this a model is not worth a warning


@dataclass
class _Scope:
    """One model, or several from one file, being built."""

    started: float = field(default_factory=time.perf_counter)
    mapped: Counter[str] = field(default_factory=Counter)
    copied: Counter[str] = field(default_factory=Counter)


_building: ContextVar[_Scope | None] = ContextVar("residency_building", default=None)


class Builder:
    """Decides on `BuildModel` and `FillModule`, and keeps the score of what was mapped."""

    def __init__(self, bank: Bank, homes: Homes, keep_file_dtype: bool) -> None:
        self._bank, self._homes, self._keep_file_dtype = bank, homes, keep_file_dtype
        self._predicted = self._observed = 0
        self._ineffective: set[type[torch.nn.Module]] = set()
        # Modules whose weights stay narrower than the host's, with the dtype the host wanted.
        self._kept: WeakKeyDictionary[torch.nn.Module, dict[str, torch.dtype]] = WeakKeyDictionary()

    def build(self, request: BuildModel) -> Decision | None:
        if _building.get() is not None:  # a checkpoint builds its VAE inside
            return None
        return Decision(f"{request.kind}: parameters are the file's mapping", partial(self._build, request))

    def _build(self, request: BuildModel, proceed: Proceed) -> Any:
        scope = _Scope()
        token = _building.set(scope)
        try:
            return proceed(replace(request, bind_gguf=True) if request.gguf else request)
        finally:
            _building.reset(token)
            seconds = time.perf_counter() - scope.started
            for name in scope.mapped | scope.copied:
                emit("weights.mapped", file=name, bytes=scope.mapped[name], copied_bytes=scope.copied[name], seconds=seconds)

    def fill(self, request: FillModule) -> Decision | None:
        scope = _building.get()
        if scope is None or type(request.module) in self._ineffective:
            return None
        if any(map(has_own_memory, request.state_dict.values())):  # which only the layers that go with them know how to take
            return None
        if not self._mapped(request.state_dict):
            return None
        return Decision("", partial(self._watch if request.assign else self._fill, request, scope))

    def _mapped(self, state_dict: Mapping[str, Any]) -> int:
        """Bytes of its tensors that are a file's mapping."""
        tensors = (part for value in state_dict.values() if isinstance(value, torch.Tensor) for part in parts(value))
        return sum(tensor.nbytes for tensor in tensors if self._bank.file_of(tensor) is not None)

    def _watch(self, request: FillModule, scope: _Scope, proceed: Proceed) -> Any:
        """With dynamic VRAM the host assigns by itself."""
        self._predicted += self._mapped(request.state_dict)
        answer = proceed()
        self._observed += self._score(request.module, {}, scope)
        return answer

    def _fill(self, request: FillModule, scope: _Scope, proceed: Proceed) -> Any:
        plan = _Plan(request, self._bank, self._keep_file_dtype)
        answer = proceed(plan.amended())
        for leaf, name, value in plan.on_device:
            self._homes.note(leaf, name, value)
        for leaf, names in plan.narrow.items():
            self._kept[leaf] = names
            request.cast_at_use(leaf)
        predicted = sum(plan.mapped.values())
        observed = self._score(request.module, plan.copied, scope)
        self._predicted += predicted
        self._observed += min(predicted, observed)
        if predicted > NOTABLE and observed < predicted / 2:
            self._ineffective.add(type(request.module))
            emit("policy.ineffective", policy="zero_copy", predicted_bytes=predicted, observed_bytes=observed,
                 reason=f"{type(request.module).__name__} copies its weights; models of this class are left to ComfyUI")
        return answer

    def _score(self, module: torch.nn.Module, copied: Mapping[MappedFile, int], scope: _Scope) -> int:
        """Counts what really is mapped now, by file, and what was copied from a file."""
        observed = 0
        for parameter in module.parameters():
            for part in parts(parameter):
                file = self._bank.file_of(part)
                if file is not None:
                    observed += part.nbytes
                    scope.mapped[file.name] += part.nbytes
        for file, size in copied.items():
            scope.copied[file.name] += size
        return observed

    def widen(self, module: torch.nn.Module, names: set[str]) -> None:
        """Gives weights that are about to be patched the dtype that the host wanted, so that the patch rounds as there."""
        for full_name in names:
            leaf_name, _, name = full_name.rpartition(".")
            try:
                leaf = module.get_submodule(leaf_name)
            except AttributeError:
                continue
            dtype = self._kept.get(leaf, {}).pop(name, None)
            if dtype is not None:
                put(leaf, name, leaf._parameters[name].detach().to(dtype))  # type: ignore[union-attr]
                self._homes.forget(leaf, name)

    def take_effect(self) -> Effect:
        effect = Effect(self._predicted, self._observed)
        self._predicted = self._observed = 0
        return effect


class _Plan:
    """What each entry of a state dict becomes."""

    def __init__(self, request: FillModule, bank: Bank, keep_file_dtype: bool) -> None:
        self.mapped: Counter[MappedFile] = Counter()
        self.copied: Counter[MappedFile] = Counter()
        self.narrow: dict[torch.nn.Module, dict[str, torch.dtype]] = {}
        self.on_device: list[tuple[torch.nn.Module, str, torch.Tensor]] = []
        self._request, self._bank, self._keep = request, bank, keep_file_dtype

    def amended(self) -> FillModule:
        """The request with tensors that can be assigned. Runs the copies that the host would have run."""
        request = self._request
        # A module may have two names, and torch fills it under both, in this order.
        modules = request.module.named_modules(remove_duplicate=False)
        leaves = [(f"{prefix}." if prefix else "", leaf) for prefix, leaf in modules]
        slots = {prefix + name: (leaf, name, parameter) for prefix, leaf in leaves
                 for name, parameter in leaf._parameters.items() if parameter is not None}
        buffers = {prefix + name: buffer for prefix, leaf in leaves for name, buffer in leaf._buffers.items()
                   if buffer is not None and name not in leaf._non_persistent_buffers_set}
        tied = Counter(id(parameter) for _, _, parameter in slots.values())
        filled: OrderedDict[str, Any] = OrderedDict(request.state_dict)
        for key, (leaf, name, parameter) in slots.items():
            value = filled.get(key)
            if isinstance(value, torch.Tensor) and not (
                    tied[id(parameter)] == 1 and self._assignable(leaf, name, parameter, value)):
                filled[key] = self._copied(parameter, value)
        for key, buffer in buffers.items():
            value = filled.get(key)
            if isinstance(value, torch.Tensor):
                filled[key] = self._copied(buffer, value)
        if hasattr(request.state_dict, "_metadata"):  # torch keeps the modules' versions there
            setattr(filled, "_metadata", request.state_dict._metadata)  # noqa: B010  it is no field of a dict
        return replace(request, state_dict=filled, assign=True)

    def _assignable(self, leaf: torch.nn.Module, name: str, parameter: torch.nn.Parameter, value: torch.Tensor) -> bool:
        file = self._bank.file_of(value) if is_plain(value) and value.is_contiguous() else None
        if file is None or value.shape != parameter.shape or not parameter.is_contiguous():
            return False
        if value.data_ptr() % value.element_size():
            self.copied[file] += parameter.nbytes  # packed without alignment, which some kernels cannot read
            return False
        if value.dtype != parameter.dtype:
            if not (self._keep and _widens(value.dtype, parameter.dtype) and self._request.castable(leaf)):
                self.copied[file] += parameter.nbytes
                return False
            self.narrow.setdefault(leaf, {})[name] = parameter.dtype
        elif parameter.device.type != "cpu":
            # Built on the device: the host's copy goes there, and its home is known for the way back.
            self.on_device.append((leaf, name, value))
            return False
        self.mapped[file] += value.nbytes
        return True

    @staticmethod
    def _copied(target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if not is_plain(target) and not target.is_meta:
            return value  # a second file for one module, as of two text encoders of one kind: the layer takes it anew
        if not is_plain(value) and is_plain(target):
            value = value.dequantize()  # for a layer that the host cannot compute from blocks
        if target.dim() == 0 and value.shape == (1,):
            value = value[0]  # so does load_state_dict, for files of an old torch
        if target.shape != value.shape or target.is_meta:
            return value.to(target.dtype)  # load_state_dict knows what to say about shapes
        with torch.no_grad():
            target.copy_(value)
        return target


def _widens(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Every value of `narrow` is one of `wide`, so that casting at use gives the bits that casting on load gives.

    Eight-bit floats are left out: what they mean is often a scale away."""
    if not (narrow.is_floating_point and wide.is_floating_point and 1 < narrow.itemsize < wide.itemsize):
        return False
    return torch.promote_types(narrow, wide) == wide
