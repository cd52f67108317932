"""Kandinsky 5: video, two rows; an image."""
from __future__ import annotations

from typing import Any

import torch
from comfy.ldm.kandinsky5.model import Kandinsky5

from support.families import PLACE, Family, Model, random


def _build() -> Model:
    return Kandinsky5(in_visual_dim=4, out_visual_dim=4, in_text_dim=48, in_text_dim2=24, time_dim=32, model_dim=96, ff_dim=128,
                      visual_embed_dim=16, num_text_blocks=1, num_visual_blocks=2, axes_dims=(8, 12, 12), **PLACE)


def _call(*shape: int, **more: Any) -> Any:
    rows = shape[0]
    return lambda model, options: model(random(*shape), torch.full((rows,), 500.), random(rows, 9, 48, seed=2),
                                        random(rows, 24, seed=3), transformer_options=options, **more)


CASES = {
    "kandinsky, two rows": Family(_build, _call(2, 4, 3, 10, 14)),
    "kandinsky, image to video": Family(_build, _call(1, 4, 3, 10, 14, time_dim_replace=random(1, 4, 1, 10, 14, seed=5))),
    "kandinsky, an image": Family(_build, _call(1, 4, 14, 18)),
}
