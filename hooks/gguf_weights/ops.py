"""Linear and embedding layers over GGUF weights, for the host's `custom_operations`.

Weights stay as they are in the file and become dense for one use. A LoRA is applied to that dense weight, in the dtype that it
is computed in, each time, as the host does with weights that it streams: patched weights kept dense would not fit the device.
Every other kind of layer is the host's own, and gets dense weights when it is filled.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch

from ...policies.files import quants
from . import is_gguf
from .layout import typed
from .saving import Saved
from .scaled import unscaled

SMALL = 2**12  # rows; vocabularies have more


def _parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    with torch.inference_mode(tensor.is_inference()):  # what was made in one mode cannot be detached in the other
        return torch.nn.Parameter(tensor, requires_grad=False)


@dataclass(frozen=True)
class AtUse:
    """A LoRA, added to a weight each time that it is used: by the host's own code, as it adds one to a weight that it loads."""

    key: str
    patches: dict[str, Any]
    in_force: Callable[[], bool]  # whether the host still counts it among what is applied: it may end while we are switched off

    def __call__(self, layer: _Weights, weight: torch.Tensor) -> torch.Tensor:
        dense = layer.added_to(weight, comfy.model_management.lora_compute_dtype(weight.device))
        patched = comfy.lora.calculate_weight(self.patches[self.key], dense, self.key)
        seed = comfy.utils.string_to_seed(self.key)
        rounded: torch.Tensor = comfy.float.stochastic_rounding(patched, layer.computes_in, seed=seed)
        return rounded


class _Weights(torch.nn.Module):
    """What the layers share: how a weight comes in, moves, is patched and becomes dense.

    Attributes:
        patch: a LoRA for weights that are loaded; for those that stream the host has its own list.
        written: the dense weight that a scheduled hook put in the place of the file's.
    """

    _parameters: dict[str, Any]
    weight_function: list[Callable[[torch.Tensor], torch.Tensor]]

    def _empty(self, names: tuple[str, ...], dtype: torch.dtype | None) -> None:
        """Makes no weights: the file's will be assigned, and Windows would charge for memory that nobody uses."""
        torch.nn.Module.__init__(self)
        self.computes_in = dtype or torch.float32
        self.patch: AtUse | None = None
        self.written: torch.Tensor | None = None
        for name in names:
            self.register_parameter(name, None)

    def _take(self, state_dict: dict[str, Any], prefix: str, shapes: dict[str, tuple[int, ...]],
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
            self._parameters[name] = _parameter(value)
        unexpected += [key for key in state_dict if key.startswith(prefix) and key[len(prefix):] not in shapes]

    def register_parameter(self, name: str, param: Any) -> None:
        super().register_parameter(name, param)
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
                    self._parameters[name] = _parameter(moved)
        if self.written is not None:
            self.written = fn(self.written)
        return self

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

    def added_to(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The dense weight in the dtype in which a LoRA is added, from the numbers that the layer computes with: a file that
        had been dequantised to that dtype before gives the same result."""
        return (typed(weight, self.computes_in).dequantize() if is_gguf(weight) else weight.to(self.computes_in)).to(dtype)

    def write(self, weight: torch.Tensor) -> None:
        """Computes with this weight from now on; with the file's own if that is what it is."""
        own = self._parameters["weight"]
        restored = is_gguf(weight) or (weight.dtype == own.dtype and torch.equal(weight.to(own.device), own))
        self.written = None if restored else weight.to(self.computes_in)

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
            return typed(weight, self.computes_in).dequantize().to(dtype)
        return weight.to(self.computes_in).to(dtype) if self.keeps_file_format else weight


class Ops(comfy.ops.manual_cast):  # type: ignore[misc]  # the host has no types
    """The host's casting layers, with two that take GGUF weights."""

    class Linear(_Weights, comfy.ops.manual_cast.Linear):  # type: ignore[misc]
        def __init__(self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None):
            self._empty(("weight", "bias"), dtype)
            self.in_features, self.out_features = in_features, out_features
            self._shapes = {"weight": (out_features, in_features), **({"bias": (out_features,)} if bias else {})}

        def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: Any,
                                  unexpected_keys: Any, error_msgs: Any) -> None:
            self._take(state_dict, prefix, self._shapes, missing_keys, unexpected_keys, error_msgs)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            comfy.ops.run_every_op()
            return self.forward_comfy_cast_weights(input)

        def forward_comfy_cast_weights(self, input: torch.Tensor) -> torch.Tensor:
            weight, bias, stream = comfy.ops.cast_bias_weight(self, input, offloadable=True)
            output = torch.nn.functional.linear(input, self.dense(weight, input.dtype), bias)
            comfy.ops.uncast_bias_weight(self, weight, bias, stream)
            return output

    class Embedding(_Weights, comfy.ops.manual_cast.Embedding):  # type: ignore[misc]
        def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, max_norm: Any = None,
                     norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False, _weight: Any = None,
                     _freeze: bool = False, device: Any = None, dtype: Any = None):
            self._empty(("weight",), dtype)
            self.bias = None
            self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
            self.rows = num_embeddings
            self.max_norm, self.norm_type = max_norm, norm_type
            self.scale_grad_by_freq, self.sparse = scale_grad_by_freq, sparse

        def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: Any,
                                  unexpected_keys: Any, error_msgs: Any) -> None:
            value = state_dict.get(f"{prefix}weight")
            # llama.cpp's converter leaves out rows that no token has; the model's number of them includes those.
            self.rows = self.num_embeddings if value is None else min(value.shape[0], self.num_embeddings)
            shapes: dict[str, tuple[int, ...]] = {"weight": (self.rows, self.embedding_dim)}
            self._take(state_dict, prefix, shapes, missing_keys, unexpected_keys, error_msgs)
            weight = self._parameters["weight"]
            if self.rows < SMALL and weight is not None:
                # Positions are no lookup: the host reads the whole weight by itself, past this layer.
                self._parameters["weight"] = _parameter(self.added_to(weight, self.computes_in))

        def forward(self, input: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
            comfy.ops.run_every_op()
            return self.forward_comfy_cast_weights(input, out_dtype)

        def forward_comfy_cast_weights(self, input: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
            weight = self._parameters["weight"]
            if not is_gguf(weight) or self.written is not None or self.patch is not None or self.weight_function:
                return self._lookup_dense(input, out_dtype)
            # Only the rows that are asked for: a vocabulary's dense weights are gigabytes.
            blocks, index = weight._qdata.reshape(self.rows, -1), self._within(input)
            rows: torch.Tensor = quants.dequantize_rows(blocks, weight._params.kind, index.to(blocks.device), self.computes_in)
            return self._zeroed(rows.to(input.device, out_dtype), input)

        def _within(self, index: torch.Tensor) -> torch.Tensor:
            return index if self.rows == self.num_embeddings else index.clamp(max=self.rows - 1)

        def _zeroed(self, found: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            """Rows that the file does not have are zero."""
            return found if self.rows == self.num_embeddings else found.masked_fill((index >= self.rows).unsqueeze(-1), 0)

        def _lookup_dense(self, input: torch.Tensor, out_dtype: torch.dtype | None) -> torch.Tensor:
            own = self._parameters["weight"]
            altered = is_gguf(own) or self.written is not None or self.patch is not None or self.weight_function
            # The rows that are found are cast, not the vocabulary; eight-bit rows cannot be found.
            dtype = self.computes_in if altered or own.dtype.itemsize == 1 else own.dtype
            weight, bias, stream = comfy.ops.cast_bias_weight(self, device=input.device, dtype=dtype, offloadable=True)
            found = torch.nn.functional.embedding(self._within(input), self.dense(weight, dtype), self.padding_idx)
            comfy.ops.uncast_bias_weight(self, weight, bias, stream)
            return self._zeroed(found.to(self.computes_in).to(dtype=out_dtype), input)
