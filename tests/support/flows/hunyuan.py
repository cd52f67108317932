"""HunyuanVideo: a mask, a ControlNet, a frame that is given, a reference; what 1.5 adds to the text; and HunyuanImage."""
from __future__ import annotations

from typing import Any

import torch
from comfy.ldm.hunyuan_video.model import HunyuanVideo

from support.families import PLACE, STEP, Family, Model, padded, random

_PARTS: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "vec_in_dim": 32, "context_in_dim": 48, "hidden_size": 160, "mlp_ratio": 2.0,
    "num_heads": 5, "depth": 2, "depth_single_blocks": 2, "axes_dim": [8, 12, 12], "theta": 256, "patch_size": [1, 2, 2],
    "qkv_bias": True, "guidance_embed": True, "byt5": False, "meanflow": False, "use_cond_type_embedding": False,
    "vision_in_dim": None, "meanflow_sum": False, **PLACE}


def _hunyuan() -> Model:
    return HunyuanVideo(**_PARTS)


def _hunyuan15() -> Model:
    return HunyuanVideo(**{**_PARTS, "vec_in_dim": None, "guidance_embed": False, "byt5": True, "vision_in_dim": 24,
                           "use_cond_type_embedding": True})


def _image() -> Model:
    return HunyuanVideo(**{**_PARTS, "patch_size": [1, 1], "axes_dim": [16, 16], "vec_in_dim": None, "byt5": True})


def _call(rows: int = 1, shape: tuple[int, ...] = (3, 10, 14), **more: Any) -> Any:
    return lambda model, options: model(
        random(rows, 4, *shape), STEP.repeat(rows), random(rows, 13, 48, seed=2), y=random(rows, 32, seed=3),
        guidance=torch.tensor([6.0]), transformer_options=options, **more)


_CONTROL = {"input": [random(1, 105, 160, seed=20), None], "output": [None, random(1, 105, 160, seed=21)]}
_FRAME = {"guiding_frame_index": torch.tensor([0])}
_REFERENCE = {"ref_latent": random(1, 4, 1, 6, 10, seed=5)}
_GLYPHS = {"txt_byt5": random(1, 5, 1472, seed=6)}

CASES = {
    "hunyuan": Family(_hunyuan, _call()),
    "hunyuan with a mask": Family(_hunyuan, _call(attention_mask=padded())),
    "hunyuan, two rows": Family(_hunyuan, _call(2)),
    "hunyuan with a control": Family(_hunyuan, _call(control=_CONTROL)),
    "hunyuan with a frame": Family(_hunyuan, _call(**_FRAME)),
    "hunyuan with a reference": Family(_hunyuan, _call(**_REFERENCE)),
    "hunyuan with a reference and a frame": Family(_hunyuan, _call(**_REFERENCE, **_FRAME)),
    "hunyuan 1.5": Family(_hunyuan15, _call(**_GLYPHS, clip_fea=random(1, 6, 24, seed=7))),
    "hunyuan image": Family(_image, _call(shape=(9, 11), **_GLYPHS)),
}
