"""The image half of a Qwen-VL encoder: found beside it, and named as ComfyUI's own classes name it."""
from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.ops
import comfy.text_encoders.qwen_vl as qwen_vl
import gguf
import numpy as np
import pytest
import torch
from residency.hooks.gguf_weights import is_gguf
from residency.hooks.host import Formats
from residency.policies.files.bank import Bank
from residency.policies.zero_copy import gguf_mmproj
from residency.policies.zero_copy.gguf import weights
from support.gguf_files import save

Q8 = gguf.GGMLQuantizationType.Q8_0
F32 = gguf.GGMLQuantizationType.F32
MMPROJ = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 8)


def qwen25() -> torch.nn.Module:
    return qwen_vl.Qwen2VLVisionTransformer(patch_size=14, temporal_patch_size=2, hidden_size=64, num_heads=2,
                                            intermediate_size=96, num_layers=3, output_hidden_size=64, dtype=torch.float32,
                                            device="cpu", ops=comfy.ops.manual_cast)


def qwen3() -> torch.nn.Module:
    qwen3vl = pytest.importorskip("comfy.text_encoders.qwen3vl")
    config = {**qwen3vl.QWEN3VL_VISION_COMMON, "hidden_size": 64, "intermediate_size": 96, "depth": 6, "num_heads": 2,
              "deepstack_visual_indexes": [1, 3, 5], "out_hidden_size": 64}
    model: torch.nn.Module = qwen3vl.Qwen3VLVisionModel(config, dtype=torch.float32, device="cpu", ops=comfy.ops.manual_cast)
    return model


def as_converted(key: str, value: np.ndarray, split: bool) -> dict[str, np.ndarray]:
    """What llama.cpp's converter makes of one tensor of the image half."""
    if key == "patch_embed.proj.weight":
        return {"v.patch_embd.weight": value[:, :, 0].copy(), "v.patch_embd.weight.1": value[:, :, 1].copy()}
    for name, host in (("norm", "norm"), ("fc1", "linear_fc1"), ("fc2", "linear_fc2")):
        if key.startswith("deepstack_merger_list.") and f".{host}." in key:
            return {f"v.deepstack.{[1, 3, 5][int(key.split('.')[1])]}.{name}.{key.rsplit('.', 1)[1]}": value}
    for host, name in (("merger.norm", "v.post_ln"), ("merger.linear_fc1", "mm.0"), ("merger.linear_fc2", "mm.2")):
        if key.startswith(f"{host}."):
            return {key.replace(host, name): value}
    if split and ".qkv." in key:
        parts = np.split(value, 3)
        return {MMPROJ.get_name(f"visual.{key.replace('qkv', part)}", (".weight", ".bias")): array
                for part, array in zip("qkv", parts, strict=True)}
    return {MMPROJ.get_name(f"visual.{key}", (".weight", ".bias")): value}


def encoder(folder: Path, name: str = "Qwen2.5-VL-7B-Instruct-Q4_K_M.gguf", architecture: str = "qwen2vl",
            width: int = 3584) -> str:
    return save(folder / name, architecture, {"token_embd.weight": (np.zeros((4, width), np.float16), None)})


def read(path: str) -> dict[str, torch.Tensor]:
    bank = Bank()
    return weights(bank.lease(path), Formats(), bank.lease)


@pytest.mark.parametrize(("architecture", "width", "prefix", "build", "split"), [
    pytest.param("qwen2vl", 3584, "visual.", qwen25, True, id="Qwen2.5-VL"),
    pytest.param("qwen3vl", 4096, "model.visual.", qwen3, False, id="Qwen3-VL"),
    pytest.param("qwen3vl", 5120, "visual.", qwen3, True, id="the large Qwen3-VL"),
])
def test_every_key_of_comfyuis_class(architecture: str, width: int, prefix: str, build: Callable[[], torch.nn.Module],
                                     split: bool, tmp_path: Path) -> None:
    """No key is missing, none is left over, and every number is there; fused attention stays blocks."""
    dense, tensors = {}, {}
    generator = torch.Generator().manual_seed(1)
    for key, value in build().state_dict().items():
        array = torch.randn(value.shape, generator=generator).numpy()
        kind = Q8 if array.ndim == 2 and array.shape[1] % 32 == 0 and "pos_embed" not in key else F32
        for name, part in as_converted(key, array, split).items():
            assert not name.startswith("None")
            tensors[name] = gguf.quants.quantize(part, kind), kind
        blocks = gguf.quants.quantize(array, kind)
        dense[prefix + key] = torch.from_numpy(gguf.quants.dequantize(blocks, kind).reshape(array.shape))
    save(tmp_path / "mmproj-Qwen-f16.gguf", "clip", tensors)
    found = read(encoder(tmp_path, "Qwen-Q4_K_M.gguf", architecture, width))
    found.pop("model.embed_tokens.weight")

    assert found.keys() == dense.keys()
    for key, value in dense.items():
        assert torch.equal(found[key].dequantize() if is_gguf(found[key]) else found[key], value), key
    assert is_gguf(found[f"{prefix}blocks.0.attn.qkv.weight"])


def test_attention_of_mixed_types_becomes_dense(tmp_path: Path) -> None:
    rows = np.random.default_rng(1).normal(size=(32, 32)).astype(np.float32)
    parts = {f"v.blk.0.attn_{part}.weight": (gguf.quants.quantize(rows, kind), kind)
             for part, kind in zip("qkv", (Q8, F32, Q8), strict=True)}
    save(tmp_path / "Qwen2.5-VL-7B-Instruct-mmproj-BF16.gguf", "clip", parts)
    found = read(encoder(tmp_path))["visual.blocks.0.attn.qkv.weight"]

    assert found.shape == (96, 32)
    assert torch.equal(found[32:64], torch.from_numpy(rows))


@pytest.mark.parametrize(("name", "files", "expected"), [
    ("Qwen2.5-VL-7B-Instruct-Q4_K_M.gguf", ["mmproj-Qwen2.5-VL-7B-Instruct-f16.gguf"], 0),
    ("Qwen2.5-VL-7B-Instruct-UD-Q4_K_XL.gguf", ["Qwen2.5-VL-7B-Instruct-mmproj-BF16.gguf"], 0),
    ("qwen2.5-vl-7b-instruct-iq4_xs.gguf", ["Qwen2.5-VL-7B-Instruct.MMPROJ.gguf"], 0),
    ("Qwen2.5-VL-7B-Instruct.Q8_0.gguf", ["mmproj-Qwen2.5-VL-3B-Instruct-f16.gguf"], None),
    ("Qwen3-VL-8B.gguf", ["a-mmproj-Qwen3-VL-8B.gguf", "b-mmproj-Qwen3-VL-8B.gguf"], 0),
    ("Qwen3-VL-8B-Q4_0.gguf", ["Qwen3-VL-8B-Q8_0.gguf", "Qwen3-VL-8B-mmproj.safetensors"], None),
])
def test_the_file_is_found_by_name(name: str, files: list[str], expected: int | None, tmp_path: Path) -> None:
    for file in (name, *files):
        (tmp_path / file).touch()
    found = gguf_mmproj.find(str(tmp_path / name))

    assert found == (None if expected is None else str(tmp_path / files[expected]))


@pytest.mark.parametrize(("content", "words"), [
    pytest.param(None, "put Qwen2.5-VL-7B-Instruct-mmproj-F16.gguf into the same folder", id="missing"),
    pytest.param(b"nope", "Download or copy", id="damaged"),
])
def test_without_it_one_line_names_the_cure(content: bytes | None, words: str, tmp_path: Path, caplog: Any) -> None:
    if content is not None:
        (tmp_path / "mmproj-Qwen2.5-VL-7B-Instruct.gguf").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        found = read(encoder(tmp_path))

    assert list(found) == ["model.embed_tokens.weight"]
    assert len(caplog.messages) == 1
    assert words in caplog.messages[0]


def test_an_encoder_that_takes_no_images_needs_none(tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        read(encoder(tmp_path, "Qwen2.5-VL-3B.gguf", "qwen2vl", 2048))

    assert caplog.messages == []
