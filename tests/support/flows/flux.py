"""Flux 1 and 2: five heads, a mask, a ControlNet, reference images, text with positions."""
from __future__ import annotations

from typing import Any

import torch
from comfy.ldm.flux.model import Flux

from support.families import FAMILIES, PLACE, STEP, Family, Model, random


def _flux2() -> Model:
    return Flux(in_channels=4, out_channels=4, vec_in_dim=None, context_in_dim=48, hidden_size=192, mlp_ratio=2.0, num_heads=6,
                depth=2, depth_single_blocks=2, axes_dim=[8, 8, 8, 8], theta=2000, patch_size=1, qkv_bias=False,
                guidance_embed=True, txt_ids_dims=[3], global_modulation=True, mlp_silu_act=True, ops_bias=False,
                default_ref_method="index", ref_index_scale=10.0, **PLACE)


def _flux2_call(rows: int = 1, **more: Any) -> Any:
    return lambda model, options: model(random(rows, 4, 7, 9), STEP.repeat(rows), random(rows, 11, 48, seed=2),
                                        guidance=torch.tensor([3.5]), transformer_options=options, **more)


_REFERENCES = {"ref_latents": [random(1, 4, 5, 5, seed=5), random(1, 4, 3, 7, seed=6)]}
_CONTROL = {"input": [random(1, 63, 160, seed=20)], "output": [random(1, 63, 160, seed=21), None]}

CASES = {
    "flux": FAMILIES["flux"],
    "flux with a mask": FAMILIES["flux with a mask"],
    "flux with a control": Family(FAMILIES["flux"].build, lambda model, options: model(
        random(1, 4, 14, 18), STEP, random(1, 13, 48, seed=2), y=random(1, 32, seed=3), guidance=torch.tensor([3.5]),
        control=_CONTROL, transformer_options=options)),
    "flux 2": Family(_flux2, _flux2_call()),
    "flux 2, two rows": Family(_flux2, _flux2_call(2)),
    "flux 2 with references": Family(_flux2, _flux2_call(**_REFERENCES)),
    "flux 2 with references of no time": Family(_flux2, _flux2_call(**_REFERENCES, ref_latents_method="index_timestep_zero")),
}
