"""The image half of Qwen2.5-VL and Qwen3-VL, which llama.cpp keeps in a file of its own beside the encoder's, an "mmproj".

Source: https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py (Qwen2VLVisionModel, Qwen3VLVisionModel): the
3D patch convolution is two 2D ones there, fused attention may be three tensors, and a DeepStack merger has its layer's number.
"""
from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...telemetry import log
from ..files import quants
from ..files.bank import Lease
from ..files.gguf_file import PLAIN, GGUFFile
from ..files.gguf_header import GGUFError, Header
from ..host import Formats

Open = Callable[[str], Lease]

_QUANTISATION = re.compile(r"[-_.](?:ud[-_])?(?:i?q\d\w*|tq\d\w*|mxfp4\w*|b?f16|f32|fp16|fp32)$", re.IGNORECASE)
_BLOCK = re.compile(r"v\.blk\.(\d+)\.(\w+)\.(weight|bias)")
_DEEP = re.compile(r"v\.deepstack\.(\d+)\.(\w+)\.(weight|bias)")

_BLOCKS = {"ln1": "norm1", "ln2": "norm2", "attn_out": "attn.proj", "attn_qkv": "attn.qkv"}
_QWEN25 = {**_BLOCKS, "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_QWEN25_OUTER = {"v.patch_embd": "patch_embed.proj", "v.post_ln": "merger.ln_q", "mm.0": "merger.mlp.0", "mm.2": "merger.mlp.2"}
_QWEN3 = {**_BLOCKS, "ffn_up": "mlp.linear_fc1", "ffn_down": "mlp.linear_fc2"}
_QWEN3_OUTER = {"v.patch_embd": "patch_embed.proj", "v.position_embd": "pos_embed", "v.post_ln": "merger.norm",
                "mm.0": "merger.linear_fc1", "mm.2": "merger.linear_fc2"}
_DEEPSTACK = {"norm": "norm", "fc1": "linear_fc1", "fc2": "linear_fc2"}
_SPLIT = ("attn_q", "attn_k", "attn_v")
# The widths for which the host has a class that takes images, and how that class's keys begin.
_PREFIXES = {("qwen2vl", 3584): "visual.", ("qwen3vl", 2560): "model.visual.", ("qwen3vl", 4096): "model.visual.",
             ("qwen3vl", 5120): "visual."}


def of(header: Header, formats: Formats, lease_of: Open) -> dict[str, Any]:
    """The image half's weights, by the host's keys; nothing for an encoder that takes no images.

    A half that is missing or damaged is a warning: prompts without images need none.
    """
    prefix = _PREFIXES.get((header.architecture or "", header.tensors["token_embd.weight"].shape[-1]))
    if prefix is None:
        return {}
    path = find(header.path)
    if path is None:
        _warn(header.path, f"no mmproj file beside it: put {_stem(header.path)}-mmproj-F16.gguf into the same folder")
        return {}
    try:
        lease = lease_of(path)
        architecture = lease.gguf.header.architecture if lease.gguf is not None else None
        if architecture != "clip":
            raise GGUFError(f"{path} is no mmproj file: its architecture is {architecture}")
        found = {prefix + key: value for key, value in _weights(lease, formats, header.architecture == "qwen3vl").items()}
    except (GGUFError, OSError, ValueError) as error:
        _warn(header.path, f"{error}. Download or copy {os.path.basename(path)} again")
        return {}
    log.info("[residency] %s takes images with %s", os.path.basename(header.path), os.path.basename(path))
    return found


def find(path: str) -> str | None:
    """The mmproj file in an encoder's folder with the encoder's name, its quantisation aside; the first of several by name."""
    folder, name = os.path.dirname(path) or ".", _stem(path).lower()
    files = sorted(entry for entry in os.listdir(folder) if entry.lower().endswith(".gguf") and "mmproj" in entry.lower())
    matching = [entry for entry in files if name in entry.lower()]
    if len(matching) > 1:
        log.info("[residency] %s has several mmproj files, of which %s is taken: %s", os.path.basename(path), matching[0],
                 ", ".join(matching))
    return os.path.join(folder, matching[0]) if matching else None


def _stem(path: str) -> str:
    return _QUANTISATION.sub("", os.path.splitext(os.path.basename(path))[0])


def _warn(path: str, cure: str) -> None:
    log.warning("[residency] %s: prompts with images will not work, %s", os.path.basename(path), cure)


def _weights(lease: Lease, formats: Formats, qwen3: bool) -> dict[str, Any]:
    file = lease.gguf
    assert file is not None
    layers = sorted({int(found[1]) for name in lease.tensors if (found := _DEEP.fullmatch(name))})
    parts = _Parts(file, lease.tensors, formats)
    weights = {}
    for name in lease.tensors:
        key = _key(name, _QWEN3 if qwen3 else _QWEN25, _QWEN3_OUTER if qwen3 else _QWEN25_OUTER, layers)
        if key is not None:
            weights[key] = parts.patches(name) if key == "patch_embed.proj.weight" else parts.alone(name)
        elif (found := _BLOCK.fullmatch(name)) and found[2] == _SPLIT[0]:
            three = [f"v.blk.{found[1]}.{part}.{found[3]}" for part in _SPLIT]
            weights[f"blocks.{found[1]}.attn.qkv.{found[3]}"] = parts.fused(three)
    return weights


def _key(name: str, inner: Mapping[str, str], outer: Mapping[str, str], layers: list[int]) -> str | None:
    if found := _BLOCK.fullmatch(name):
        return f"blocks.{found[1]}.{inner[found[2]]}.{found[3]}" if found[2] in inner else None
    if found := _DEEP.fullmatch(name):
        return f"deepstack_merger_list.{layers.index(int(found[1]))}.{_DEEPSTACK[found[2]]}.{found[3]}"
    stem, _, kind = name.rpartition(".")
    return f"{outer[stem]}.{kind}" if stem in outer else None


class _Parts:
    """Tensors of the file, whole or put together. What is put together is a private copy."""

    def __init__(self, file: GGUFFile, tensors: Mapping[str, torch.Tensor], formats: Formats) -> None:
        self._file, self._tensors, self._formats = file, tensors, formats

    def alone(self, name: str) -> torch.Tensor:
        kind = self._file.kind(name)
        return self._tensors[name] if kind in PLAIN else self._formats.gguf(self._tensors[name], kind, self._file.shape(name))

    def fused(self, names: list[str]) -> torch.Tensor:
        """Rows one after the other; blocks stay blocks, as none reaches over the end of a row."""
        kinds = {self._file.kind(name) for name in names}
        shapes = [self._file.shape(name) for name in names]
        if len(kinds) > 1:
            return torch.cat([self._numbers(name) for name in names])
        joined, kind = torch.cat([self._tensors[name] for name in names]), kinds.pop()
        if kind in PLAIN:
            return joined
        return self._formats.gguf(joined, kind, (sum(shape[0] for shape in shapes), *shapes[0][1:]))

    def patches(self, name: str) -> torch.Tensor:
        """(out, in, height, width) for each of two frames, to (out, in, frame, height, width)."""
        second = f"{name}.1"
        return torch.stack([self._numbers(name), self._numbers(second)], dim=2) if second in self._tensors else self.alone(name)

    def _numbers(self, name: str) -> torch.Tensor:
        kind = self._file.kind(name)
        if kind in PLAIN:
            return self._tensors[name].float()
        return quants.dequantize(self._tensors[name].contiguous(), kind, self._file.shape(name), torch.float32)
