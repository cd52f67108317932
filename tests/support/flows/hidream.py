"""HiDream I1: experts, two rows, an image beside it."""
from __future__ import annotations

from typing import Any

from comfy.ldm.hidream.model import HiDreamImageTransformer2DModel

from support.families import PLACE, STEP, Family, Model, random


def _build() -> Model:
    return HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=3,
        caption_channels=[40, 48], text_emb_dim=24, num_routed_experts=3, num_activated_experts=2, axes_dims_rope=(16, 8, 8),
        max_resolution=(32, 32), llama_layers=[0, 2, 1, 2], **PLACE)


def _call(rows: int = 1, **more: Any) -> Any:
    return lambda model, options: model(
        random(rows, 4, 14, 18), STEP.repeat(rows) * 1000, y=random(rows, 24, seed=3), context=random(rows, 5, 40, seed=2),
        encoder_hidden_states_llama3=random(rows, 3, 7, 48, seed=4), transformer_options=options, **more)


CASES = {
    "hidream, two rows": Family(_build, _call(2)),
    "hidream with an image": Family(_build, _call(image_cond=random(1, 4, 14, 18, seed=5))),
}
