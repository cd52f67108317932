"""Text encoders in GGUF files: under which key the host wants each tensor, and what the converter had done to it.

llama.cpp's converter gives every architecture the same short names, interleaves the rows of Llama's queries and keys for its
own rotation, and adds one to Gemma's norms. Files of other tools keep the model's own names and numbers; so they stay here.

Source: https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py (LlamaModel.permute, T5Model, Gemma2Model,
Gemma3Model) and gguf-py/gguf/constants.py (TENSOR_NAMES).
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..files.gguf_header import GGUFError, Header
from ..files.gguf_rows import apart

_TENSOR = re.compile(r"(?:(?P<blocks>.*blk)\.(?P<index>\d+)\.)?(?P<name>[\w.]+)\.(?P<kind>weight|bias)")


@dataclass(frozen=True)
class Target:
    """Where a tensor goes.

    Attributes:
        key: the host's name for it.
        heads: of attention, whose rows the file has interleaved; None where the rows are in the host's order.
        added: what the file's numbers have too much.
    """

    key: str
    heads: int | None = None
    added: float = 0.0

    def of_numbers(self, tensor: torch.Tensor) -> torch.Tensor:
        """The host's numbers: the mapping itself where they are the file's, else a private copy."""
        if self.added:
            return tensor - self.added
        return tensor if self.heads is None else apart(tensor, self.heads)


@dataclass(frozen=True)
class Family:
    """Architectures with the same names.

    Attributes:
        blocks: how the file names a layer, before its number.
        layers: how the host does, with the number.
        inner, outer: names within a layer and outside, the file's to the host's. Others are nothing the host asks for.
        rotated: queries and keys are interleaved.
        added_to_norms: by the converter.
    """

    blocks: str
    layers: str
    inner: Mapping[str, str]
    outer: Mapping[str, str]
    rotated: bool = False
    added_to_norms: float = 0.0

    def target(self, header: Header, name: str) -> Target | None:
        found = _TENSOR.fullmatch(name)
        if found is None or (found["index"] is not None and found["blocks"] != self.blocks):
            return None
        host = (self.outer if found["index"] is None else self.inner).get(found["name"])
        if host is None:
            return None
        layer = "" if found["index"] is None else self.layers.format(found["index"])
        key = f"{layer}{host}.{found['kind']}"
        heads = None
        if self.rotated and found["name"] in _COUNTS:
            heads = _heads(header, _COUNTS[found["name"]], int(found["index"]))
            rows = header.tensors[name].shape[0]
            if rows % (2 * heads):
                raise GGUFError(f"{header.path}: tensor {name} has {rows} rows, which are not {heads} heads")
        return Target(key, heads, self.added_to_norms if key.endswith("norm.weight") else 0.0)


_COUNTS = {"attn_q": "head_count", "attn_k": "head_count_kv"}
_T5_INNER = {
    "attn_norm": "layer.0.layer_norm", "attn_q": "layer.0.SelfAttention.q", "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v", "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias", "ffn_norm": "layer.1.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0", "ffn_up": "layer.1.DenseReluDense.wi_1", "ffn_down": "layer.1.DenseReluDense.wo",
}
_T5_OUTER = {"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm"}
_INNER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
_GEMMA_INNER = {**_INNER, "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
                "post_ffw_norm": "post_feedforward_layernorm"}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_T5 = Family("enc.blk", "encoder.block.{}.", _T5_INNER, _T5_OUTER)
# The first T5 had no gate, and what goes up has another name there.
_T5_WITHOUT_GATE = Family("enc.blk", "encoder.block.{}.", {**_T5_INNER, "ffn_up": "layer.1.DenseReluDense.wi"}, _T5_OUTER)
_LLAMA = Family("blk", "model.layers.{}.", _INNER, _OUTER, rotated=True)
_QWEN = Family("blk", "model.layers.{}.", _INNER, _OUTER)
_GEMMA = Family("blk", "model.layers.{}.", _GEMMA_INNER, _OUTER, added_to_norms=1.0)

FAMILIES: Mapping[str, Family] = {
    "t5": _T5, "t5encoder": _T5, "llama": _LLAMA, "mistral3": _LLAMA, "qwen2": _QWEN, "qwen2vl": _QWEN, "qwen3": _QWEN,
    "qwen3vl": _QWEN, "gemma2": _GEMMA, "gemma3": _GEMMA,
}


def targets(header: Header) -> dict[str, Target] | None:
    """Where the tensors of a text encoder go, by their names in the file; those that the host has no use for are left out.

    Returns:
        None for a model of another kind, and for a file whose tensors have the host's names already.

    Raises:
        GGUFError: the header does not say what it takes to bring the rows into order.
    """
    family = FAMILIES.get(header.architecture or "")
    if family is None or "token_embd.weight" not in header.tensors:
        return None
    if family is _T5 and not any(".ffn_gate." in name for name in header.tensors):
        family = _T5_WITHOUT_GATE
    found = {name: family.target(header, name) for name in header.tensors}
    return {name: target for name, target in found.items() if target is not None}


def _heads(header: Header, count: str, layer: int) -> int:
    """Of one layer's queries or keys; a header has one number for all layers, or one for each."""
    keys = [f"{header.architecture}.attention.{name}" for name in (count, "head_count")]
    value: Any = next((header.kv[key] for key in keys if key in header.kv), None)
    try:
        heads = int(value if isinstance(value, int) else value[layer])
    except (TypeError, IndexError, ValueError):
        heads = 0
    if heads < 1:
        raise GGUFError(f"{header.path}: {keys[0]} is missing or wrong, and the rows of queries and keys cannot be put into "
                        "order. Convert the model again")
    return heads
