"""Wan: two rows, images, times that differ from frame to frame."""
from __future__ import annotations

import torch
from comfy.ldm.wan.model import WanModel

from support.families import FAMILIES, PLACE, Family, Model, random


def _i2v() -> Model:
    return WanModel(model_type="i2v", patch_size=(1, 2, 2), text_len=16, in_dim=8, dim=144, ffn_dim=200, freq_dim=64,
                    text_dim=40, out_dim=4, num_heads=3, num_layers=2, **PLACE)


CASES = {
    "wan, two rows": FAMILIES["wan"],
    "wan, image to video": Family(_i2v, lambda model, options: model(
        random(1, 8, 3, 10, 14), torch.tensor([500.]), random(1, 16, 40, seed=2), clip_fea=random(1, 257, 1280, seed=4),
        transformer_options=options)),
    "wan, a time for each frame": Family(FAMILIES["wan"].build, lambda model, options: model(
        random(1, 4, 3, 10, 14), torch.tensor([[500., 300., 100.]]), random(1, 16, 40, seed=2), transformer_options=options)),
}
