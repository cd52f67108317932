"""Wan with a face, a sound or music for each frame: frames that begin and end in the middle of a rank's tokens."""
from __future__ import annotations

import torch
from comfy.ldm.wan.model import AudioProjModel, HumoWanModel, WanModel_S2V
from comfy.ldm.wan.model_animate import AnimateWanModel
from comfy.ldm.wan.model_wandancer import WanDancerModel

from support.families import PLACE, Family, Model, random

from .wan import EACH, TINY, video


class _Faces(torch.nn.Module):
    """Instead of the network that looks at faces of 512 pixels: it comes before the tokens, and is large."""

    def get_motion(self, faces: torch.Tensor) -> torch.Tensor:
        return faces.flatten(1)


def _animate() -> Model:
    model = AnimateWanModel(motion_encoder_dim=32, **{**TINY, "num_layers": 5})
    model.motion_encoder = _Faces()
    return model


def _s2v() -> Model:
    return WanModel_S2V(audio_dim=12, num_audio_token=2, cond_dim=4, audio_inject_layers=[0, 1], **TINY)


def _humo() -> Model:
    model = HumoWanModel(**TINY)
    model.audio_proj = AudioProjModel(seq_len=1, blocks=2, channels=8, intermediate_dim=16, output_dim=1536, **PLACE)
    return model


def _dancer() -> Model:
    return WanDancerModel(audio_inject_layers=[0, 1], music_dim=32, music_heads=2, music_feature_dim=10, music_latent_dim=32,
                          in_dim_ref_conv=4, **TINY)


_CLIP = {"clip_fea": random(1, 257, 1280, seed=4)}
_FACES = {"pose_latents": random(1, 16, 2, 10, 14, seed=5), "face_pixel_values": random(1, 2, 5, 4, 4, seed=6), **_CLIP}
_MOVED = {"reference_latent": random(1, 4, 1, 10, 14, seed=5), "reference_motion": random(1, 16, 19, 10, 14, seed=6)}
_VOICE = {"audio_embed": random(1, 25, 12, 12, seed=7), "control_video": random(1, 4, 3, 10, 14, seed=8)}
_SOUNDS = {"audio_embed": random(1, 3, 1, 2, 8, seed=7)}
_MUSIC = {"audio_embed": random(1, 20, 10, seed=7), "clip_fea_ref": random(1, 257, 1280, seed=8), **_CLIP}


CASES = {
    "wan with a face": Family(_animate, video(**_FACES)),
    "wan with a voice": Family(_s2v, video(**_VOICE)),
    "wan with a voice and what moved": Family(_s2v, video(**_VOICE, **_MOVED)),
    "wan with sounds": Family(_humo, video(EACH, **_SOUNDS)),
    "wan with sounds and a reference": Family(_humo, video(**_SOUNDS, reference_latent=random(1, 4, 1, 10, 14, seed=8))),
    "wan with music": Family(_dancer, video(columns=16, fps=24, **_MUSIC)),
}
