"""Linear and embedding layers over GGUF weights, for the host's `custom_operations`.

Weights stay as they are in the file and become dense for one use. A LoRA is applied to that dense weight, in the dtype that it
is computed in, each time, as the host does with weights that it streams: patched weights kept dense would not fit the device.
Every other kind of layer is the host's own, and gets dense weights when it is filled.
"""
from __future__ import annotations

from typing import Any

import comfy.ops
import torch

from ...policies.files import quants
from . import is_gguf
from .weighted import Weighted, as_parameter

SMALL = 2**12  # rows; vocabularies have more


class Ops(comfy.ops.manual_cast):  # type: ignore[misc]  # the host has no types
    """The host's casting layers, with two that take GGUF weights."""

    class Linear(Weighted, comfy.ops.manual_cast.Linear):  # type: ignore[misc]
        def __init__(self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None):
            self.empty(("weight", "bias"), dtype)
            self.in_features, self.out_features = in_features, out_features
            self._shapes = {"weight": (out_features, in_features), **({"bias": (out_features,)} if bias else {})}

        def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: Any,
                                  unexpected_keys: Any, error_msgs: Any) -> None:
            self.take(state_dict, prefix, self._shapes, missing_keys, unexpected_keys, error_msgs)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            comfy.ops.run_every_op()
            return self.forward_comfy_cast_weights(input)

        def forward_comfy_cast_weights(self, input: torch.Tensor) -> torch.Tensor:
            weight, bias, stream = comfy.ops.cast_bias_weight(self, input, offloadable=True)
            output = torch.nn.functional.linear(input, self.kept(weight, input.dtype), bias)
            comfy.ops.uncast_bias_weight(self, weight, bias, stream)
            return output

    class Embedding(Weighted, comfy.ops.manual_cast.Embedding):  # type: ignore[misc]
        def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, max_norm: Any = None,
                     norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False, _weight: Any = None,
                     _freeze: bool = False, device: Any = None, dtype: Any = None):
            self.empty(("weight",), dtype)
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
            self.take(state_dict, prefix, shapes, missing_keys, unexpected_keys, error_msgs)
            weight = self._parameters["weight"]
            if self.rows < SMALL and weight is not None:
                # Positions are no lookup: the host reads the whole weight by itself, past this layer.
                self._parameters["weight"] = as_parameter(self.added_to(weight, self.computes_in))

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
