"""Stable Diffusion 3, two rows; 3.5 medium, whose images attend to themselves too; a ControlNet."""
from __future__ import annotations

from typing import Any

from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

from support.families import FAMILIES, PLACE, STEP, Family, Model, random


def _medium() -> Model:
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 48, "out_features": 192}}
    return OpenAISignatureMMDITWrapper(
        input_size=None, pos_embed_max_size=16, num_patches=256, depth=3, adm_in_channels=32, context_embedder_config=embedder,
        mlp_ratio=1.0, qk_norm="rms", x_block_self_attn_layers=[0, 1], **PLACE)


def _call(**more: Any) -> Any:
    return lambda model, options: model(random(1, 4, 14, 18), STEP * 1000, y=random(1, 32, seed=3),
                                        context=random(1, 13, 48, seed=2), transformer_options=options, **more)


_CONTROL = {"output": [random(1, 63, 192, seed=20), None, random(1, 63, 192, seed=21)]}

CASES = {
    "sd3, two rows": FAMILIES["sd3"],
    "sd3.5 medium": Family(_medium, _call()),
    "sd3.5 medium with a control": Family(_medium, _call(control=_CONTROL)),
}
