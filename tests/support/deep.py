"""Diffusion models of ComfyUI's own classes with many blocks, as its loaders build them, in several formats; LoRA for them."""
from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import comfy.ldm.flux.model
import comfy.ldm.wan.model
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import gguf
import torch
from residency.hooks.gguf_weights import ops as gguf_ops
from residency.hooks.gguf_weights.layout import wrap

from support import tiny
from support.families import random

CPU = torch.device("cpu")
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def _filled(shapes: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    made = {}
    for key, value in shapes.items():
        values = torch.randn(value.shape, generator=generator) * (0.4 / (value[0].numel() ** 0.5 if value.ndim > 1 else 8))
        made[key] = (values + 1 if value.ndim == 1 and "norm" in key and not key.endswith("bias") else values).to(dtype)
    return made


def flux_weights(dtype: torch.dtype = torch.float32, hidden: int = 128, depth: int = 2, single: int = 7) -> dict[str, Any]:
    with torch.device("meta"):
        shapes = comfy.ldm.flux.model.Flux(
            in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=64, hidden_size=hidden, mlp_ratio=4.0,
            num_heads=hidden // 128, depth=depth, depth_single_blocks=single, axes_dim=[16, 56, 56], theta=10000, patch_size=2,
            qkv_bias=True, guidance_embed=True, txt_ids_dims=[], dtype=torch.float32, device="meta",
            operations=comfy.ops.disable_weight_init).state_dict()
    return _filled(shapes, dtype)


def fp8_weights() -> dict[str, Any]:
    """Each matrix of a block has a scale, and the marker by which ComfyUI makes quantised tensors of it."""
    marker = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    made = {}
    for key, value in flux_weights(torch.bfloat16).items():
        made[key] = value
        if key.endswith(".weight") and value.ndim == 2 and "blocks." in key:
            layer, scale = key.removesuffix(".weight"), value.abs().max().float() / 448
            made |= {key: (value.float() / scale).to(torch.float8_e4m3fn), f"{layer}.weight_scale": scale,
                     f"{layer}.comfy_quant": marker.clone()}
    return made


def gguf_weights() -> dict[str, Any]:
    return {key: wrap(torch.from_numpy(gguf.quants.quantize(value.numpy(), Q8_0)), int(Q8_0), tuple(value.shape))
            if value.ndim == 2 and "blocks." in key else value for key, value in flux_weights().items()}


def wan(layers: int = 7) -> Any:
    """With two heads."""
    config = {"model_type": "t2v", "in_dim": 16, "out_dim": 16, "dim": 256, "ffn_dim": 256, "num_heads": 2,
              "num_layers": layers, "text_dim": 64, "image_model": "wan2.1"}
    made = comfy.supported_models.WAN21_T2V({**config, "dtype": torch.float32}).get_model({}, "", device=CPU)
    filled = _filled(dict(made.diffusion_model.named_parameters()), torch.float32)
    made.diffusion_model.load_state_dict(filled, strict=False, assign=True)
    return comfy.model_patcher.ModelPatcher(made.eval().requires_grad_(False), load_device=CPU, offload_device=CPU)


def loaded(weights: dict[str, Any], **options: Any) -> Any:
    """As ComfyUI's loaders do."""
    made = comfy.sd.load_diffusion_model_state_dict(weights, model_options=options)
    made.model.requires_grad_(False)
    return made


PATCHERS: dict[str, Callable[[], Any]] = {
    "flux": lambda: loaded(flux_weights()),
    "flux in fp8": lambda: loaded(fp8_weights()),
    "flux in GGUF": lambda: loaded(gguf_weights(), custom_operations=gguf_ops.Ops, dtype=torch.float32),
    "wan": wan,
    "unet": tiny.patcher,
}


def lora(patcher: Any, strength: float = 1.0) -> Any:
    """A clone with a difference for a matrix of every block, and for one that is in none."""
    generator = torch.Generator().manual_seed(9)
    names = [name for name, parameter in patcher.model.named_parameters()
             if parameter.ndim == 2 and name.endswith(("linear1.weight", "img_attn.qkv.weight", "ffn.0.weight", "img_in.weight",
                                                       "time_embed.0.weight", "attn1.to_q.weight"))]
    shapes = {name: patcher.model.get_parameter(name).shape for name in names}
    made = patcher.clone()
    made.add_patches({name: ("diff", (torch.randn(shape, generator=generator) * 0.05,)) for name, shape in shapes.items()},
                     strength)
    assert len(names) > 1
    return made


def arguments(name: str, rows: int = 1) -> dict[str, Any]:
    if name == "unet":
        return tiny.arguments(rows)
    if name == "wan":
        return {"x": random(rows, 16, 2, 8, 12), "t": torch.full((rows,), 0.7), "c_crossattn": random(rows, 512, 64, seed=2),
                "transformer_options": {}}
    return {"x": random(rows, 16, 12, 16), "t": torch.full((rows,), 0.7), "c_crossattn": random(rows, 9, 64, seed=2),
            "y": random(rows, 768, seed=3), "guidance": torch.full((rows,), 3.5), "transformer_options": {}}
