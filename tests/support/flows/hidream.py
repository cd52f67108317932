"""HiDream I1: experts, two rows, an image beside it; O1: grouped heads, text of which keys are kept, a reference."""
from __future__ import annotations

from typing import Any

import torch
from comfy.ldm.hidream.model import HiDreamImageTransformer2DModel
from comfy.ldm.hidream_o1.model import IMAGE_TOKEN_ID, HiDreamO1Transformer

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


def _o1() -> Model:
    text = {"vocab_size": IMAGE_TOKEN_ID + 1, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "rope_dims": [4, 2, 2]}
    vision = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "depth": 1, "num_position_embeddings": 16}
    model = HiDreamO1Transformer(text_config_overrides=text, vision_config_overrides=vision, **PLACE)
    model.tms_token_id = 7
    return model


def _o1_call(steps: int, ids: list[int], after: int = 0, **more: Any) -> Any:
    """Of so many steps the last."""
    places = torch.arange(len(ids) + 15 + after)[None, None].expand(1, 3, -1) // torch.tensor([1, 2, 3])[:, None]

    def call(model: Model, options: dict[str, Any]) -> torch.Tensor:
        for step in range(steps):
            made = model(random(2, 3, 96, 160, seed=step), torch.tensor([600., 600.]), input_ids=torch.tensor([ids, ids]),
                         position_ids=places, ar_len=len(ids) - 1, transformer_options=dict(options), **more)
        return made

    return call


_TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 7]

CASES = {
    "hidream, two rows": Family(_build, _call(2)),
    "hidream with an image": Family(_build, _call(image_cond=random(1, 4, 14, 18, seed=5))),
    "hidream o1": Family(_o1, _o1_call(1, _TEXT)),
    "hidream o1, the second step": Family(_o1, _o1_call(2, _TEXT)),
    "hidream o1 with a reference": Family(_o1, _o1_call(
        2, [3, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, *_TEXT], 4, ref_pixel_values=random(8, 1536, seed=5),
        ref_image_grid_thw=torch.tensor([[1, 2, 4]]), ref_patches=random(2, 4, 3072, seed=6))),
}
