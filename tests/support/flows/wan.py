"""Wan: two rows, images, times that differ from frame to frame, references, poses, a camera, VACE's hints."""
from __future__ import annotations

from typing import Any

import torch
from comfy.ldm.wan.model import CameraWanModel, SCAIL2WanModel, VaceWanModel, WanModel

from support.families import FAMILIES, PLACE, Family, Model, random

TINY: dict[str, Any] = {"patch_size": (1, 2, 2), "text_len": 16, "in_dim": 4, "dim": 144, "ffn_dim": 200, "freq_dim": 64,
                        "text_dim": 40, "out_dim": 4, "num_heads": 3, "num_layers": 2, **PLACE}
ONCE, EACH = torch.tensor([500.]), torch.tensor([[500., 300., 100.]])


def video(times: torch.Tensor = ONCE, channels: int = 4, columns: int = 14, **more: Any) -> Any:
    """Three frames, of 35 tokens, for each row of times."""
    rows = len(times)
    return lambda model, options: model(random(rows, channels, 3, 10, columns), times, random(rows, 16, 40, seed=2),
                                        transformer_options=options, **more)


def _i2v() -> Model:
    return WanModel(model_type="i2v", **{**TINY, "in_dim": 8})


def _with_reference() -> Model:
    return WanModel(model_type="t2v", in_dim_ref_conv=4, **TINY)


def _camera() -> Model:
    return CameraWanModel(model_type="camera", in_dim_control_adapter=2, **TINY)


def _scail() -> Model:
    return SCAIL2WanModel(mask_in_dim=3, **TINY)


def _vace() -> Model:
    return VaceWanModel(vace_layers=2, vace_in_dim=6, **TINY)


_CLIP = {"clip_fea": random(1, 257, 1280, seed=4)}
_POSES = {"pose_latents": random(1, 4, 3, 4, 6, seed=6), "sam_latents": random(1, 3, 3, 4, 6, seed=7),
          "reference_latent": random(1, 4, 1, 10, 14, seed=8), "ref_mask_latents": random(1, 3, 4, 10, 14, seed=9)}

CASES = {
    "wan, two rows": FAMILIES["wan"],
    "wan, image to video": Family(_i2v, video(channels=8, **_CLIP)),
    "wan, a time for each frame": Family(FAMILIES["wan"].build, video(EACH)),
    "wan with a reference": Family(_with_reference, video(reference_latent=random(1, 4, 10, 14, seed=5))),
    "wan in context": Family(FAMILIES["wan"].build, video(context_latents=[random(1, 4, 1, 6, 8, seed=5),
                                                                           random(1, 4, 2, 4, 6, seed=6)])),
    "wan with a camera": Family(_camera, video(camera_conditions=random(1, 2, 3, 80, 112, seed=5), **_CLIP)),
    "wan with poses": Family(_scail, video(**_POSES, **_CLIP)),
    "wan with hints": Family(_vace, video(vace_context=random(1, 2, 6, 3, 10, 14, seed=5), vace_strength=[1.0, 0.6])),
    "wan with hints, two rows": Family(_vace, video(torch.cat([ONCE, ONCE / 2]), vace_strength=[0.8],
                                                    vace_context=random(2, 1, 6, 3, 10, 14, seed=5))),
}
