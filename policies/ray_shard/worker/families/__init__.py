"""How tokens flow through the families of models that ComfyUI has: where they are spread among the ranks, what has a value for
each of them and so follows, and where they are gathered. Nothing of a model's arithmetic is here.

A class of models is known by its module and name, so that a subclass, which may do anything else, is not taken for it.
"""
from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from ..tokens import TokenParallel
from .cosmos import cosmos
from .flux import flux, radiance
from .hidream import hidream
from .hidream_o1 import hidream_o1
from .hunyuan import hunyuan
from .kandinsky import kandinsky
from .ltx import ltxav, ltxv
from .lumina import lumina
from .minimax import minimax
from .qwen import qwen
from .sd3 import sd3
from .wan import vace, wan
from .wan_frames import animate, dancer, humo, s2v

Family = Callable[[Any, TokenParallel], AbstractContextManager[None]]

FAMILIES: dict[tuple[str, str], Family] = {
    ("comfy.ldm.anima.model", "Anima"): cosmos,
    ("comfy.ldm.chroma.model", "Chroma"): flux,
    ("comfy.ldm.chroma_radiance.model", "ChromaRadiance"): radiance,
    ("comfy.ldm.cosmos.predict2", "MiniTrainDIT"): cosmos,
    ("comfy.ldm.flux.model", "Flux"): flux,
    ("comfy.ldm.hidream.model", "HiDreamImageTransformer2DModel"): hidream,
    ("comfy.ldm.hidream_o1.model", "HiDreamO1Transformer"): hidream_o1,
    ("comfy.ldm.hunyuan_video.model", "HunyuanVideo"): hunyuan,
    ("comfy.ldm.kandinsky5.model", "Kandinsky5"): kandinsky,
    ("comfy.ldm.lightricks.av_model", "LTXAVModel"): ltxav,
    ("comfy.ldm.lightricks.model", "LTXVModel"): ltxv,
    ("comfy.ldm.lumina.model", "NextDiT"): lumina,
    ("comfy.ldm.lumina.model", "NextDiTPixelSpace"): lumina,
    ("comfy.ldm.minimax.model", "MiniMaxH3Model"): minimax,
    ("comfy.ldm.modules.diffusionmodules.mmdit", "MMDiT"): sd3,
    ("comfy.ldm.modules.diffusionmodules.mmdit", "OpenAISignatureMMDITWrapper"): sd3,
    ("comfy.ldm.qwen_image.model", "QwenImageTransformer2DModel"): qwen,
    ("comfy.ldm.wan.model", "CameraWanModel"): wan,
    ("comfy.ldm.wan.model", "HumoWanModel"): humo,
    ("comfy.ldm.wan.model", "SCAIL2WanModel"): wan,
    ("comfy.ldm.wan.model", "SCAILWanModel"): wan,
    ("comfy.ldm.wan.model", "VaceWanModel"): vace,
    ("comfy.ldm.wan.model", "WanModel"): wan,
    ("comfy.ldm.wan.model", "WanModel_S2V"): s2v,
    ("comfy.ldm.wan.model_animate", "AnimateWanModel"): animate,
    ("comfy.ldm.wan.model_wandancer", "WanDancerModel"): dancer,
}


def family(model: Any) -> Family | None:
    """Of a diffusion model; None if nobody has said how its tokens flow."""
    return FAMILIES.get((type(model).__module__, type(model).__qualname__))
