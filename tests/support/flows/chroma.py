"""Chroma: a mask, a ControlNet; and Chroma Radiance, of pixels."""
from __future__ import annotations

from functools import partial
from typing import Any

import torch
from comfy.ldm.chroma_radiance.model import ChromaRadiance

from support.families import FAMILIES, PLACE, STEP, Family, Model, random


def _radiance(tile: int) -> Model:
    return ChromaRadiance(
        in_channels=3, out_channels=3, context_in_dim=48, hidden_size=96, mlp_ratio=2.0, num_heads=3, depth=1,
        depth_single_blocks=2, axes_dim=[8, 12, 12], theta=10000, patch_size=4, qkv_bias=True, in_dim=64, out_dim=96,
        hidden_dim=64, n_layers=2, txt_ids_dims=[], vec_in_dim=32, nerf_hidden_size=16, nerf_mlp_ratio=1, nerf_depth=2,
        nerf_max_freqs=2, nerf_tile_size=tile, nerf_final_head_type="conv", nerf_embedder_dtype=None, use_x0=False,
        use_sequential_txt_ids=True, **PLACE)


def _call(rows: int = 1, **more: Any) -> Any:
    return lambda model, options: model(random(rows, 4, 14, 18), STEP.repeat(rows), random(rows, 13, 48, seed=2),
                                        torch.zeros(rows), transformer_options=options, **more)


def _pixels(rows: int) -> Any:
    return lambda model, options: model(random(rows, 3, 26, 25), STEP.repeat(rows), random(rows, 13, 48, seed=2),
                                        torch.zeros(rows), transformer_options=options)


_BUILD = FAMILIES["chroma"].build
_CONTROL = {"input": [random(1, 63, 128, seed=20)], "output": [random(1, 63, 128, seed=21), None]}

CASES = {
    "chroma, two rows": Family(_BUILD, _call(2)),
    "chroma with a mask": Family(_BUILD, _call(attention_mask=(random(1, 1, 76, 76, seed=9) > 0.5).float() * -5)),
    "chroma with a control": Family(_BUILD, _call(control=_CONTROL)),
    "chroma radiance, two rows": Family(partial(_radiance, 0), _pixels(2)),
    "chroma radiance, some tokens at a time": Family(partial(_radiance, 23), _pixels(1)),
}
