"""Cosmos Predict 2: two rows, times that differ from frame to frame, learned places; and Anima."""
from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import torch
from comfy.ldm.anima import model as anima
from comfy.ldm.cosmos.predict2 import MiniTrainDIT

from support.families import PLACE, Family, Model, random

_SIZES: dict[str, Any] = {
    "max_img_h": 32, "max_img_w": 32, "max_frames": 8, "in_channels": 4, "out_channels": 4, "patch_spatial": 2,
    "patch_temporal": 1, "model_channels": 96, "num_blocks": 2, "num_heads": 3, "mlp_ratio": 2.0,
    "crossattn_emb_channels": 48, "pos_emb_cls": "rope3d", "use_adaln_lora": True, "adaln_lora_dim": 16, **PLACE}


def _cosmos(**more: Any) -> Model:
    return MiniTrainDIT(**_SIZES, **more)


def _anima() -> Model:
    tiny = partial(anima.LLMAdapter, source_dim=32, target_dim=48, model_dim=48, num_layers=1, num_heads=3)
    with mock.patch.object(anima, "LLMAdapter", tiny):
        return anima.Anima(**_SIZES)


def _call(rows: int = 1, times: Any = (500.,)) -> Any:
    return lambda model, options: model(random(rows, 4, 3, 10, 14), torch.tensor([times]).repeat(rows, 1) / 1000,
                                        random(rows, 16, 48, seed=2), fps=24, transformer_options=options)


CASES = {
    "cosmos, two rows": Family(_cosmos, _call(2)),
    "cosmos, a time for each frame": Family(_cosmos, _call(2, (500., 300., 100.))),
    "cosmos, learned places": Family(partial(_cosmos, extra_per_block_abs_pos_emb=True), _call()),
    "anima": Family(_anima, lambda model, options: model(
        random(1, 4, 1, 14, 18), torch.tensor([0.5]), random(1, 9, 32, seed=2), t5xxl_ids=torch.arange(11)[None],
        transformer_options=options)),
}
