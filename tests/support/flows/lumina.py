"""Lumina 2: grouped heads; Z-Image: padded text and image, references that have another time, and their features; pixels."""
from __future__ import annotations

from typing import Any

from comfy.ldm.lumina.model import NextDiT, NextDiTPixelSpace

from support.families import FAMILIES, PLACE, STEP, Family, Model, random

_SIZES: dict[str, Any] = {
    "patch_size": 2, "in_channels": 4, "dim": 288, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 9, "qk_norm": True,
    "cap_feat_dim": 48, "axes_dims": [8, 12, 12], "axes_lens": [64, 64, 64], "z_image_modulation": True, "time_scale": 10.0,
    "pad_tokens_multiple": 8, **PLACE}


def _z_image() -> Model:
    return NextDiT(siglip_feat_dim=24, **_SIZES)


def _pixels() -> Model:
    return NextDiTPixelSpace(decoder_hidden_size=32, decoder_num_res_blocks=1, decoder_max_freqs=2, **_SIZES)


def _call(rows: int = 1, **more: Any) -> Any:
    return lambda model, options: model(random(rows, 4, 14, 18), STEP.repeat(rows), random(rows, 13, 48, seed=2), 13,
                                        transformer_options=options, **more)


_REFERENCES = {"ref_latents": [random(1, 4, 10, 6, seed=5), random(1, 4, 8, 8, seed=6)],
               "ref_contexts": [random(1, 5, 48, seed=7), random(1, 7, 48, seed=8), random(1, 3, 48, seed=9)]}

CASES = {
    "lumina": FAMILIES["lumina"],
    "lumina, two rows": Family(FAMILIES["lumina"].build, _call(2)),
    "z-image": Family(_z_image, _call()),
    "z-image with references": Family(_z_image, _call(**_REFERENCES, siglip_feats=[random(1, 3, 5, 24, seed=10)])),
    "z-image of pixels": Family(_pixels, _call()),
}
