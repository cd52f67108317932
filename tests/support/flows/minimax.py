"""MiniMax H3: video with sound, from keyframes, from references of each kind, with text of two kinds."""
from __future__ import annotations

from typing import Any

import torch
from comfy.ldm.minimax.model import MiniMaxH3Model

from support.families import PLACE, Family, Model, random


def _build() -> Model:
    return MiniMaxH3Model(
        hidden_size=96, num_layers=2, token_refiner_num_layers=1, num_attention_heads=3, attention_head_dim=32,
        ffn_hidden_size=128, latents_dim=4, audio_latents_dim=6, text_dim=48, timestep_input_dim=16, time_embed_hidden_size=32,
        time_embed_dim=24, rope_inv_freq_len=4, **PLACE)


def _call(**payload: Any) -> Any:
    def call(model: Model, options: dict[str, Any]) -> torch.Tensor:
        made = model([random(1, 4, 3, 6, 10), random(1, 6, 2, 5, seed=2)], torch.tensor([600.]), random(1, 9, 48, seed=3),
                     transformer_options=options, minimax_payload=payload)
        return torch.cat([part.flatten() for part in made])

    return call


_TAGS = torch.tensor([1, 1, 0, 0, 0, 1, 1, 1, 0])

CASES = {
    "minimax": Family(_build, _call()),
    "minimax from keyframes": Family(_build, _call(
        keyframes=[{"resolved_frame_index": 0}, {"resolved_frame_index": 8}], frame_count=9, text_token_tags=_TAGS,
        cond_video_latents=[random(1, 4, 1, 6, 10, seed=4), random(1, 4, 1, 6, 10, seed=5)])),
    "minimax from references": Family(_build, _call(
        refs=[{"kind": "image", "latent_h": 4, "latent_w": 6}, {"kind": "audio", "ref_audio_t": 3},
              {"kind": "video_audio", "ref_audio_t": 2, "latent_t": 2, "latent_h": 6, "latent_w": 4}],
        cond_video_latents=[random(1, 4, 1, 4, 6, seed=4), random(1, 4, 2, 6, 4, seed=5)],
        cond_audio_latents=[random(1, 6, 2, 3, seed=6), random(1, 6, 2, 2, seed=7)])),
}
