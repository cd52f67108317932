"""A rank of a group, in a process of its own, whose arguments are its rank and a port for each model, in their order.

Predicts twice in a pipeline, then with the blocks passed around by the same group, and prints JSON: by model, of each
prediction the largest error relative to the largest number of the model alone, or why it cannot be shared so; and whether all
is back.
"""
from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch
from residency.hooks.remote import RemoteModel
from residency.policies.ray_shard.parcels import pack
from residency.policies.ray_shard.worker.group import Group
from residency.policies.ray_shard.worker.models import Model
from residency.policies.ray_shard.worker.tokens import Unsuited
from residency.policies.ray_shard.worker.weights import MODES

from support.deep import CPU, _filled
from support.families import random

WORLD = 2
TURNS = ("pipeline", "pipeline", "blocks")
LUMINA: dict[str, Any] = {"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 96, "n_layers": 20,
                          "n_refiner_layers": 2, "n_heads": 6, "cap_feat_dim": 48, "axes_dims": [4, 6, 6],
                          "axes_lens": [64, 64, 64], "qk_norm": True}
Z_IMAGE = {**LUMINA, "dim": 288, "n_heads": 9, "axes_dims": [8, 12, 12], "z_image_modulation": True, "pad_tokens_multiple": 8}
WAN: dict[str, Any] = {"image_model": "wan2.1", "in_dim": 16, "out_dim": 16, "dim": 144, "ffn_dim": 200, "freq_dim": 64,
                       "text_dim": 40, "num_heads": 3, "num_layers": 4}
CHROMA: dict[str, Any] = {
    "image_model": "chroma", "in_channels": 64, "out_channels": 64, "context_in_dim": 48, "hidden_size": 128, "mlp_ratio": 2.0,
    "num_heads": 4, "depth": 4, "depth_single_blocks": 6, "axes_dim": [8, 12, 12], "theta": 10000, "patch_size": 2,
    "qkv_bias": True, "in_dim": 64, "out_dim": 128, "hidden_dim": 64, "n_layers": 2, "txt_ids_dims": [], "vec_in_dim": 32}
IMAGE = {"x": random(1, 16, 14, 18), "c_crossattn": random(1, 13, 48, seed=2), "num_tokens": 13}
VIDEO = {"x": random(1, 16, 3, 10, 14), "c_crossattn": random(1, 16, 40, seed=2)}


@dataclass(frozen=True)
class Case:
    """A model of the host's, and what it is asked."""

    config: str
    options: dict[str, Any]
    arguments: dict[str, Any]


CASES = {
    "lumina 2": Case("Lumina2", {**LUMINA, "n_kv_heads": 3}, IMAGE),
    "z-image": Case("Lumina2", Z_IMAGE, IMAGE),
    "z-image with references": Case(
        "Lumina2", {**Z_IMAGE, "siglip_feat_dim": 24},
        {**IMAGE, "ref_latents": [random(1, 16, 10, 6, seed=5)], "siglip_feats": [random(1, 3, 5, 24, seed=10)],
         "ref_contexts": [random(1, 5, 48, seed=7), random(1, 7, 48, seed=8)]}),
    "chroma": Case("Chroma", CHROMA, {"x": random(1, 16, 14, 18), "c_crossattn": random(1, 13, 48, seed=2),
                                      "guidance": torch.tensor([0.0])}),
    "vace": Case("WAN21_Vace", {**WAN, "model_type": "vace", "vace_layers": 2, "vace_in_dim": 6},
                 {**VIDEO, "vace_context": random(1, 1, 6, 3, 10, 14, seed=5), "vace_strength": [0.8]}),
    "wan": Case("WAN21_T2V", {**WAN, "model_type": "t2v"}, VIDEO),
}


def built(case: Case) -> Any:
    made = getattr(comfy.supported_models, case.config)({**case.options, "dtype": torch.float32}).get_model({}, "", device=CPU)
    filled = _filled(dict(made.diffusion_model.named_parameters()), torch.float32)
    made.diffusion_model.load_state_dict(filled, strict=False, assign=True)
    return made.eval().requires_grad_(False)


def arguments(case: Case) -> dict[str, Any]:
    return {"t": torch.full((1,), 0.7), "transformer_options": {}, **case.arguments}


def compare(case: Case, rank: int, port: int) -> dict[str, Any]:
    patcher = comfy.model_patcher.ModelPatcher(built(case), load_device=CPU, offload_device=CPU)
    remote = RemoteModel(patcher)
    model = Model(patcher.model, CPU, CPU)
    model.patch("plain", pack(remote.patches(), known=remote.known()))
    lying = {name: value.data_ptr() for name, value in patcher.model.named_parameters()}
    alone = model.predict(arguments(case))
    group = Group(rank, WORLD, f"127.0.0.1:{port}")
    owned = {mode: MODES[mode](group, (1.0,) * WORLD) for mode in TURNS}
    turns: list[Any] = []
    for mode in TURNS:
        try:
            turns.append(float((model.predict(arguments(case), owned[mode]) - alone).abs().max() / alone.abs().max()))
        except Unsuited as unsuited:
            turns.append(str(unsuited))
    model.release()
    group.close()
    return {"turns": turns, "back": {name: value.data_ptr() for name, value in patcher.model.named_parameters()} == lying,
            "left": len(comfy.model_management.current_loaded_models), "spread": float(alone.std())}


def main() -> None:
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    rank, *ports = map(int, sys.argv[1:])
    with torch.inference_mode():
        print(json.dumps({name: compare(case, rank, port) for (name, case), port in zip(CASES.items(), ports, strict=True)}))
