"""LTX-Video: times of tokens, keyframes, guides of some strength; LTX-2: audio, times of frames, reference audio."""
from __future__ import annotations

from typing import Any

import torch
from comfy.ldm.lightricks.av_model import LTXAVModel
from comfy.ldm.lightricks.model import LTXVModel

from support.families import FAMILIES, PLACE, STEP, Family, Model, random

FRAMES, KEPT, ROWS, COLUMNS = 5, 3, 3, 5
TOKENS = FRAMES * ROWS * COLUMNS


def _ltxv() -> Model:
    return LTXVModel(in_channels=8, cross_attention_dim=96, attention_head_dim=32, num_attention_heads=3, caption_channels=48,
                     num_layers=2, cross_attention_adaln=True, rope_type="split", **PLACE)


def _guides() -> dict[str, Any]:
    """Two frames at the end are guides, one of them not to be looked at in places."""
    masked = torch.ones(1, 1, FRAMES, ROWS, COLUMNS)
    masked[:, :, KEPT + 1, 0] = -1
    of_frame = ROWS * COLUMNS
    positions = torch.arange(2 * of_frame).float().reshape(1, 1, -1, 1).repeat(1, 3, 1, 2)
    entries = [{"pre_filter_count": of_frame, "strength": 0.4}, {"pre_filter_count": of_frame, "strength": 1.0}]
    return {"keyframe_idxs": positions, "denoise_mask": masked, "guide_attention_entries": entries}


def _call(rows: int = 1, times: Any = STEP, **more: Any) -> Any:
    return lambda model, options: model(random(rows, 8, FRAMES, ROWS, COLUMNS), times, random(rows, 9, 48, seed=2),
                                        torch.ones(rows, 9).long(), transformer_options=options, **more)


def _ltxav() -> Model:
    return LTXAVModel(in_channels=8, cross_attention_dim=96, attention_head_dim=32, num_attention_heads=3, caption_channels=48,
                      audio_cross_attention_dim=80, audio_attention_head_dim=16, audio_num_attention_heads=5, num_layers=2,
                      cross_attention_adaln=True, apply_gated_attention=True, connector_num_attention_heads=1,
                      connector_attention_head_dim=8, connector_num_layers=1, **PLACE)


def _heard(rows: int = 1, times: Any = STEP, audio: int = 11, **more: Any) -> Any:
    def call(model: Any, options: dict[str, Any]) -> torch.Tensor:
        seen = [random(rows, 8, FRAMES, ROWS, COLUMNS), random(rows, 8, audio, 16, seed=3)][:2 if audio else 1]
        made = model(seen, times, random(rows, 9, 96, seed=2), torch.ones(rows, 9).long(), transformer_options=options, **more)
        return torch.cat([part.flatten() for part in made])

    return call


def _by_frame(rows: int = 1) -> torch.Tensor:
    return random(rows, FRAMES, 1, seed=5).abs().repeat_interleave(ROWS * COLUMNS, 1)


_TIMES = random(2, TOKENS, 1, seed=4).abs()
_SOUND_TIMES = random(1, 11, 1, seed=6).abs()
_REFERENCE = {"ref_audio": {"tokens": random(1, 7, 128, seed=8)}}

CASES = {
    "ltxv": FAMILIES["ltxv"],
    "ltxv, a time for each token": Family(_ltxv, _call(2, _TIMES)),
    "ltxv with keyframes": Family(_ltxv, _call(1, _TIMES[:1], **{**_guides(), "guide_attention_entries": None})),
    "ltxv with guides": Family(_ltxv, _call(1, _TIMES[:1], **_guides())),
    "ltxav": Family(_ltxav, _heard()),
    "ltxav, two rows": Family(_ltxav, _heard(2, torch.tensor([0.6, 0.3]))),
    "ltxav, a time for each frame": Family(_ltxav, _heard(1, (_by_frame(), _SOUND_TIMES))),
    "ltxav, a time for each token": Family(_ltxav, _heard(1, (_TIMES[:1], _SOUND_TIMES), denoise_mask=_TIMES[:1].reshape(
        1, 1, FRAMES, ROWS, COLUMNS))),
    "ltxav with guides": Family(_ltxav, _heard(1, (_by_frame(), STEP), **_guides())),
    "ltxav with reference audio": Family(_ltxav, _heard(1, (STEP, _SOUND_TIMES), **_REFERENCE)),
    "ltxav without audio": Family(_ltxav, _heard(audio=0)),
}
