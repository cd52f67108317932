"""A weight over GGUF blocks in a layer of the host's: how it comes in, moves, is patched, and becomes dense."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import ref

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch

from . import is_gguf
from .dense import DenseRoom
from .layout import dense, typed
from .saving import Saved
from .scaled import unscaled

Function = Callable[[torch.Tensor], torch.Tensor]


def as_parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    with torch.inference_mode(tensor.is_inference()):  # what was made in one mode cannot be detached in the other
        return torch.nn.Parameter(tensor, requires_grad=False)


@dataclass(frozen=True)
class AtUse:
    """A LoRA, added to a weight each time that it is used: by the host's own code, as it adds one to a weight that it loads."""

    key: str
    patches: dict[str, Any]
    in_force: Callable[[], bool]  # whether the host still counts it among what is applied: it may end while we are switched off

    def __call__(self, layer: Weighted, weight: torch.Tensor) -> torch.Tensor:
        dense = layer.added_to(weight, comfy.model_management.lora_compute_dtype(weight.device))
        patched = comfy.lora.calculate_weight(self.patches[self.key], dense, self.key)
        seed = comfy.utils.string_to_seed(self.key)
        rounded: torch.Tensor = comfy.float.stochastic_rounding(patched, layer.computes_in, seed=seed)
        return rounded


class Weighted(torch.nn.Module):
    """What the layers share.

    Attributes:
        patch: a LoRA for weights that are loaded; for those that stream the host has its own list.
        written: the dense weight that a scheduled hook put in the place of the file's.
        room: how much the layers of this model may keep dense; None where nobody said.
        weight_comfy_model_dtype, bias_comfy_model_dtype: what dynamic VRAM casts numbers to on their way to the device.
    """

    _parameters: dict[str, Any]
    _lowvram: Function | None = None  # of this process: it is not sent to another

    def empty(self, names: tuple[str, ...], dtype: torch.dtype | None) -> None:
        """Makes no weights: the file's will be assigned, and Windows would charge for memory that nobody uses."""
        torch.nn.Module.__init__(self)
        self.computes_in = self.weight_comfy_model_dtype = self.bias_comfy_model_dtype = dtype or torch.float32
        self._functions: list[Function] = []
        self.patch: AtUse | None = None
        self.written: torch.Tensor | None = None
        self.room: DenseRoom | None = None
        self._kept: tuple[AtUse | None, torch.Tensor] | None = None
        for name in names:
            self.register_parameter(name, None)

    def take(self, state_dict: dict[str, Any], prefix: str, shapes: dict[str, tuple[int, ...]],
              missing: list[str], unexpected: list[str], errors: list[str]) -> None:
        for name, shape in shapes.items():
            value = unscaled(state_dict, prefix + name, self.computes_in)
            if value is None:
                missing.append(prefix + name)
                value = torch.zeros(shape, dtype=self.computes_in)
            elif tuple(value.shape) != shape:
                errors.append(f"{prefix}{name} is {tuple(value.shape)} in the file, and {shape} in the model")
                continue
            elif is_gguf(value):
                value = typed(value, self.computes_in)
            elif name != "weight":
                value = value.to(self.computes_in)
            self._parameters[name] = as_parameter(value)
        unexpected += [key for key in state_dict if key.startswith(prefix) and key[len(prefix):] not in shapes]

    def register_parameter(self, name: str, param: Any) -> None:
        super().register_parameter(name, param)
        self.drop_dense()
        self.written = None  # the host assigns what it backed up, where it undoes a patch without us

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = destination.get(f"{prefix}weight")
        if is_gguf(weight):
            destination[f"{prefix}weight"] = Saved.of(weight, self._final)

    def _final(self) -> torch.Tensor:
        """The weight with everything that is applied to it now."""
        weight: torch.Tensor = self._parameters["weight"]
        if self.weight_function and self.written is None:
            weight = self.added_to(weight, comfy.model_management.lora_compute_dtype(weight.device))
            for function in self.weight_function:
                weight = function(weight)
            weight = weight.to(self.computes_in)
        return self.dense(weight, self.computes_in)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # torch moves the wrapper and leaves the bytes where they are.
        for name, parameter in self._parameters.items():
            if parameter is not None:
                moved = fn(parameter)
                if moved is not parameter:
                    self._parameters[name] = as_parameter(moved)
        self.drop_dense()
        if self.written is not None:
            self.written = fn(self.written)
        return self

    @property
    def weight_lowvram_function(self) -> Function | None:
        """A LoRA, with dynamic VRAM. The host would quantise the patched weight anew, to keep it; blocks cannot be made, so it
        gets the LoRA as a function to be run at each use instead."""
        return None if self._late is not None else self._lowvram

    @weight_lowvram_function.setter
    def weight_lowvram_function(self, function: Function | None) -> None:
        self._lowvram = function

    @property
    def _late(self) -> Function | None:
        return self._lowvram if is_gguf(self._parameters["weight"]) else None

    @property
    def weight_function(self) -> list[Function]:
        """What the host runs over the dense weight before each use."""
        return self._functions if self._late is None else [self._narrowed, self._late, *self._functions]

    @weight_function.setter
    def weight_function(self, functions: list[Function]) -> None:
        self._functions = [self._narrowed, *functions] if functions and self._late is None else functions

    def _narrowed(self, weight: torch.Tensor) -> torch.Tensor:
        """The numbers of the model's dtype, where the host dequantises to a wider one that it computes in."""
        return weight.to(self.computes_in).to(weight.dtype)

    @property
    def keeps_file_format(self) -> bool:
        weight = self._parameters["weight"]
        return weight is not None and (is_gguf(weight) or weight.dtype != self.computes_in)

    # The host patches a weight by itself where a module lacks the next two, and it should for an ordinary weight.
    @property
    def convert_weight(self) -> Callable[..., torch.Tensor]:
        """The host asks for a weight that it can add to."""
        if not self.keeps_file_format:
            raise AttributeError("convert_weight")
        return lambda weight, **options: self.added_to(weight, weight.dtype)

    @property
    def set_weight(self) -> Callable[..., torch.Tensor | None]:
        """The host gives a patched weight back: to be saved, or to compute with until its hook ends."""
        if not self.keeps_file_format:
            raise AttributeError("set_weight")
        return lambda weight, return_weight=False, **options: weight if return_weight else self.write(weight)

    def patch_at_use(self, key: str, patcher: Any) -> None:
        """Adds the LoRA that a patcher of the host's has for this weight at each use, while the host counts it as applied. The
        blocks stay, and no dense weight is kept."""
        model, applied = ref(patcher.model), patcher.patches_uuid
        self.patch = AtUse(key, patcher.patches, lambda: getattr(model(), "current_weight_patches_uuid", None) == applied)

    def added_to(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The dense weight in the dtype in which a LoRA is added, from the numbers that the layer computes with: a file that
        had been dequantised to that dtype before gives the same result."""
        return self._numbers(weight).to(dtype)

    def _numbers(self, weight: Any) -> torch.Tensor:
        """In the model's dtype."""
        return dense(weight._qdata, weight._params, self.computes_in) if is_gguf(weight) else weight.to(self.computes_in)

    def write(self, weight: torch.Tensor) -> None:
        """Computes with this weight from now on; with the file's own if that is what it is."""
        own = self._parameters["weight"]
        restored = is_gguf(weight) or (weight.dtype == own.dtype and torch.equal(weight.to(own.device), own))
        self.written = None if restored else weight.to(self.computes_in)

    def kept(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """As `dense`; weights that are on the device to stay are kept while there is room, and repeated steps find them."""
        stays = is_gguf(weight) and weight.device == self._parameters["weight"].device and self.written is None
        if self.room is None or not stays or not torch.is_inference_mode_enabled() or torch.compiler.is_compiling():
            return self.dense(weight, dtype)
        patch = self.patch if self.patch is not None and self.patch.in_force() else None
        if self._kept is not None and self._kept[0] is patch and self._kept[1].dtype == dtype:
            return self._kept[1]
        self.drop_dense()
        made = self.dense(weight, dtype)
        if self.room.take(made.nbytes):
            self._kept = patch, made
        return made

    def drop_dense(self) -> None:
        if self._kept is not None and self.room is not None:
            self.room.give_back(self._kept[1].nbytes)
        self._kept = None

    def dense(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weight to compute with, from what the host's cast returned."""
        if self.written is not None:
            # The host adds a LoRA to it, in place.
            weight = self.written.to(weight.device, dtype, copy=bool(self.weight_function) or self.patch is not None)
            for function in self.weight_function:
                weight = function(weight)
        # The host may have taken the weight off the device since, and streams it with the LoRA in its own list.
        streams = any(isinstance(function, comfy.model_patcher.LowVramPatch) for function in self.weight_function)
        if self.patch is not None and not streams and self.patch.in_force():
            return self.patch(self, weight).to(dtype)
        # Rounded to the model's dtype first, which the host takes apart from the one it computes in: text encoders are float16
        # and compute in float32.
        if is_gguf(weight):
            return self._numbers(weight).to(dtype)
        return weight if self.weight_function or not self.keeps_file_format else self._numbers(weight).to(dtype)
