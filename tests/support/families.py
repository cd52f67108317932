"""Families of diffusion models: ComfyUI's own classes at a tiny size, with random weights, and a call for each."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.ops
import torch
from comfy.ldm.chroma.model import Chroma
from comfy.ldm.ernie.model import ErnieImageModel
from comfy.ldm.flux.model import Flux
from comfy.ldm.hunyuan_video.model import HunyuanVideo
from comfy.ldm.lightricks.model import LTXVModel
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.omnigen.omnigen2 import OmniGen2Transformer2DModel
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.ldm.wan.model import WanModel

Model = torch.nn.Module
STEP = torch.tensor([0.6])


@dataclass(frozen=True)
class Family:
    """A model, and what it makes of its inputs with some `transformer_options`."""

    build: Callable[[], Model]
    call: Callable[[Model, dict[str, Any]], torch.Tensor]

    def model(self) -> Model:
        """The same model each time."""
        model = self.build()
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * (0.08 if parameter.ndim > 1 else 0.05)
            norm = parameter.ndim == 1 and (("norm" in name and "weight" in name) or name.endswith("scale"))
            parameter.data = values + 1 if norm else values
        for _, buffer in model.named_buffers():
            if buffer.is_floating_point():  # made empty, for a file to fill
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.05)
        return model.eval().requires_grad_(False)


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PLACE: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.manual_cast}


def _flux() -> Model:
    return Flux(in_channels=4, out_channels=4, vec_in_dim=32, context_in_dim=48, hidden_size=160, mlp_ratio=2.0, num_heads=5,
                depth=1, depth_single_blocks=2, axes_dim=[8, 12, 12], theta=10000, patch_size=2, qkv_bias=True,
                guidance_embed=True, txt_ids_dims=[], **PLACE)


def _flux_call(**more: Any) -> Callable[[Model, dict[str, Any]], torch.Tensor]:
    return lambda model, options: model(random(1, 4, 14, 18), STEP, random(1, 13, 48, seed=2), y=random(1, 32, seed=3),
                                        guidance=torch.tensor([3.5]), transformer_options=options, **more)


def _chroma() -> Model:
    return Chroma(in_channels=16, out_channels=16, context_in_dim=48, hidden_size=128, mlp_ratio=2.0, num_heads=4, depth=1,
                  depth_single_blocks=2, axes_dim=[8, 12, 12], theta=10000, patch_size=2, qkv_bias=True, in_dim=64, out_dim=128,
                  hidden_dim=64, n_layers=2, txt_ids_dims=[], vec_in_dim=32, **PLACE)


def _wan() -> Model:
    return WanModel(model_type="t2v", patch_size=(1, 2, 2), text_len=16, in_dim=4, dim=144, ffn_dim=200, freq_dim=64,
                    text_dim=40, out_dim=4, num_heads=3, num_layers=2, **PLACE)


def _sd3() -> Model:
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 48, "out_features": 128}}
    return MMDiT(input_size=None, pos_embed_max_size=16, num_patches=256, depth=2, adm_in_channels=32,
                 context_embedder_config=embedder, **PLACE)


def _unet() -> Model:
    return UNetModel(image_size=32, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=[1, 1],
                     channel_mult=[1, 2], num_head_channels=16, use_spatial_transformer=True, use_linear_in_transformer=True,
                     transformer_depth=[1, 1], transformer_depth_output=[1, 1, 1, 1], transformer_depth_middle=1,
                     context_dim=48, adm_in_channels=64, num_classes="sequential", **PLACE)


def _qwen() -> Model:
    return QwenImageTransformer2DModel(patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=32,
                                       num_attention_heads=5, joint_attention_dim=48, axes_dims_rope=(8, 12, 12), **PLACE)


def _lumina() -> Model:
    return NextDiT(patch_size=2, in_channels=4, dim=96, n_layers=2, n_refiner_layers=1, n_heads=6, n_kv_heads=3, qk_norm=True,
                   cap_feat_dim=48, axes_dims=[4, 6, 6], axes_lens=[64, 64, 64], **PLACE)


def _omnigen() -> Model:
    return OmniGen2Transformer2DModel(patch_size=2, in_channels=4, hidden_size=96, num_layers=2, num_refiner_layers=1,
                                      num_attention_heads=6, num_kv_heads=3, multiple_of=32, axes_dim_rope=(4, 6, 6),
                                      axes_lens=(64, 64, 64), text_feat_dim=48, **PLACE)


def _ltxv() -> Model:
    return LTXVModel(in_channels=8, cross_attention_dim=64, attention_head_dim=32, num_attention_heads=2, caption_channels=48,
                     num_layers=2, **PLACE)


def _hunyuan() -> Model:
    return HunyuanVideo(in_channels=4, out_channels=4, vec_in_dim=32, context_in_dim=48, hidden_size=128, mlp_ratio=2.0,
                        num_heads=4, depth=1, depth_single_blocks=1, axes_dim=[8, 12, 12], theta=256, patch_size=[1, 2, 2],
                        qkv_bias=True, guidance_embed=True, byt5=False, meanflow=False, use_cond_type_embedding=False,
                        vision_in_dim=None, meanflow_sum=False, **PLACE)


def _ernie() -> Model:
    return ErnieImageModel(hidden_size=96, num_attention_heads=3, num_layers=2, ffn_hidden_size=128, in_channels=4,
                           out_channels=4, text_in_dim=48, rope_axes_dim=(8, 12, 12), **PLACE)


def padded() -> torch.Tensor:
    mask = torch.ones(1, 13, dtype=torch.long)
    mask[:, 9:] = 0
    return mask


FAMILIES = {
    "flux": Family(_flux, _flux_call()),
    "flux with a mask": Family(_flux, _flux_call(attention_mask=(random(1, 1, 76, 76, seed=9) > 0.5).float() * -5)),
    "chroma": Family(_chroma, lambda model, options: model(
        random(1, 4, 14, 18), STEP, random(1, 13, 48, seed=2), torch.tensor([0.0]), transformer_options=options)),
    "wan": Family(_wan, lambda model, options: model(
        random(2, 4, 3, 10, 14), torch.tensor([500., 500.]), random(2, 16, 40, seed=2), transformer_options=options)),
    "sd3": Family(_sd3, lambda model, options: model(
        random(2, 4, 14, 18), torch.tensor([500., 500.]), y=random(2, 32, seed=3), context=random(2, 13, 48, seed=2),
        transformer_options=options)),
    "sdxl": Family(_unet, lambda model, options: model(
        random(2, 4, 16, 16), torch.tensor([500., 500.]), context=random(2, 9, 48, seed=2), y=random(2, 64, seed=3),
        transformer_options=options)),
    "qwen with a mask": Family(_qwen, lambda model, options: model(
        random(1, 4, 1, 14, 18), STEP, random(1, 13, 48, seed=2), attention_mask=padded(), transformer_options=options)),
    "lumina": Family(_lumina, lambda model, options: model(
        random(1, 4, 14, 18), STEP, random(1, 13, 48, seed=2), 13, transformer_options=options)),
    "omnigen, grouped": Family(_omnigen, lambda model, options: model(
        random(1, 4, 14, 18), STEP, random(1, 13, 48, seed=2), 13, transformer_options=options)),
    "ltxv": Family(_ltxv, lambda model, options: model(
        random(1, 8, 3, 5, 7), STEP, random(1, 9, 48, seed=2), torch.ones(1, 9), frame_rate=25, transformer_options=options)),
    "hunyuan": Family(_hunyuan, lambda model, options: model(
        random(1, 4, 2, 8, 10), STEP, random(1, 13, 48, seed=2), y=random(1, 32, seed=3), guidance=torch.tensor([6.0]),
        attention_mask=padded(), transformer_options=options)),
}
# A model whose attention gets no `transformer_options`.
DEAF = {"ernie": Family(_ernie, lambda model, options: model(
    random(1, 4, 7, 9), STEP, random(1, 13, 48, seed=2), transformer_options=options))}
