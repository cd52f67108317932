"""The most memory that a prediction takes at a time beside the weights, with feed-forwards in one piece and in several.

By torch's own count on the CPU, through ComfyUI's own models with one block of 512 numbers a token, which feed-forwards widen
as many times as the real ones do. Attention is torch's, as on cards: what ComfyUI takes on a CPU holds all scores at once.
"""
from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.lightricks.model import LTXVModel
from comfy.ldm.modules.attention import attention_pytorch
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.ldm.wan.model import WanModel
from residency.policies.chunking import Chunking
from support.families import PLACE, STEP, Family, random
from support.transient import peak_bytes
from table import show

PIECES = (2, 4, 8)
TIMED = 4
ROUNDS = 3
HEAD = ("1024 tokens of 512 numbers, float32, one block", "alone, MB", *(f"{pieces} pieces: ratio" for pieces in PIECES),
        f"{TIMED} pieces: processor time, ratio", "largest difference")


def _wan() -> torch.nn.Module:
    return WanModel(model_type="t2v", patch_size=(1, 2, 2), text_len=64, in_dim=16, dim=512, ffn_dim=2976, freq_dim=256,
                    text_dim=256, out_dim=16, num_heads=4, num_layers=1, **PLACE)


def _ltxv() -> torch.nn.Module:
    return LTXVModel(in_channels=128, cross_attention_dim=512, attention_head_dim=64, num_attention_heads=8,
                     caption_channels=256, num_layers=1, **PLACE)


def _qwen() -> torch.nn.Module:
    return QwenImageTransformer2DModel(patch_size=2, in_channels=64, out_channels=16, num_layers=1, attention_head_dim=128,
                                       num_attention_heads=4, joint_attention_dim=256, axes_dims_rope=(16, 56, 56), **PLACE)


def _flux(single: int) -> Callable[[], torch.nn.Module]:
    return lambda: Flux(in_channels=16, out_channels=16, vec_in_dim=256, context_in_dim=256, hidden_size=512, mlp_ratio=4.0,
                        num_heads=4, depth=1, depth_single_blocks=single, axes_dim=[16, 56, 56], theta=10000, patch_size=2,
                        qkv_bias=True, guidance_embed=True, txt_ids_dims=[], **PLACE)


def _flux_call(model: Any, options: dict[str, Any]) -> torch.Tensor:
    answer: torch.Tensor = model(random(1, 16, 64, 64), STEP, random(1, 64, 256, seed=2), y=random(1, 256, seed=3),
                                 guidance=torch.tensor([3.5]), transformer_options=options)
    return answer


OPTIONS = {"optimized_attention_override": lambda func, *args, **kwargs: attention_pytorch(*args, **kwargs)}
MODELS = {
    "Wan 2.1, a feed-forward alone": Family(lambda: _wan().blocks[0].ffn, lambda module, options: module(random(1, 1024, 512))),
    "Wan 2.1": Family(_wan, lambda model, options: model(
        random(1, 16, 4, 32, 32), torch.tensor([500.]), random(1, 64, 256, seed=2), transformer_options=options)),
    "LTXV": Family(_ltxv, lambda model, options: model(
        random(1, 128, 4, 16, 16), STEP, random(1, 64, 256, seed=2), torch.ones(1, 64), frame_rate=25,
        transformer_options=options)),
    "Qwen-Image": Family(_qwen, lambda model, options: model(
        random(1, 16, 1, 64, 64), STEP, random(1, 64, 256, seed=2), transformer_options=options)),
    "Flux, a double block": Family(_flux(0), _flux_call),
    "Flux, a double block and a single one, which stays whole": Family(_flux(1), _flux_call),
}


def run() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        rows = [_row(name, family) for name, family in MODELS.items()]
    show("Feed-forwards in pieces: largest memory of a moment beside the weights, by ComfyUI's models on the CPU", HEAD, rows)


def _row(name: str, family: Family) -> tuple[object, ...]:
    model = family.model()
    expected = family.call(model, OPTIONS)
    alone = peak_bytes(lambda: family.call(model, OPTIONS))
    peaks, worst = [], 0.0
    for pieces in PIECES:
        with (chunking := Chunking(pieces)).during(model):
            found = family.call(model, OPTIONS)  # and its modules are checked
            worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
            peaks.append(peak_bytes(lambda: family.call(model, OPTIONS)) / alone)
        if pieces == TIMED:
            slower = _ratio(family, model, chunking)
    return name, alone / 1e6, *peaks, slower, worst


def _ratio(family: Family, model: torch.nn.Module, chunking: Chunking) -> float:
    """Of the time that the processor works for a prediction, in turn with the model alone."""
    took: dict[str, list[float]] = {"alone": [], "pieces": []}
    for _ in range(ROUNDS):
        for way, seconds in took.items():
            with chunking.during(model) if way == "pieces" else contextlib.nullcontext():
                started = time.process_time()
                family.call(model, OPTIONS)
                seconds.append(time.process_time() - started)
    return statistics.median(took["pieces"]) / statistics.median(took["alone"])
