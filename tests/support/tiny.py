"""A diffusion model of the host's own classes, so small that a step takes milliseconds, and LoRA for it."""
from __future__ import annotations

from typing import Any

import comfy.hooks
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models
import torch

CPU = torch.device("cpu")
KEYS = ("diffusion_model.time_embed.0.weight", "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q.weight")


def model(seed: int = 0) -> Any:
    """Stable Diffusion 1.5's U-Net with 32 channels, in float32."""
    config = comfy.supported_models.SD15({
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
        "channel_mult": [1, 2], "use_spatial_transformer": True, "transformer_depth": [1, 1], "context_dim": 48,
        "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1, "use_linear_in_transformer": False,
        "legacy": False, "adm_in_channels": None, "dtype": torch.float32})
    with torch.inference_mode():
        made = config.get_model({}, "", device=CPU)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in made.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.08
            parameter.data = values + 1 if parameter.ndim == 1 and name.endswith("weight") else values
    return made.eval().requires_grad_(False)


def patcher(seed: int = 0) -> Any:
    return comfy.model_patcher.ModelPatcher(model(seed), load_device=CPU, offload_device=CPU)


def difference(patcher: Any, seed: int) -> dict[str, Any]:
    """A patch for two of its weights, as LoRA make them: what is added."""
    generator = torch.Generator().manual_seed(seed)
    shapes = patcher.model.state_dict()
    return {key: ("diff", (torch.randn(shapes[key].shape, generator=generator) * 0.1,)) for key in KEYS}


def with_lora(patcher: Any, seed: int = 1, strength: float = 1.0) -> Any:
    made = patcher.clone()
    assert set(made.add_patches(difference(patcher, seed), strength)) == set(KEYS)
    return made


def hooked(patcher: Any, seed: int = 3) -> tuple[Any, Any]:
    """(a clone that knows a scheduled LoRA, the group that turns it on)."""
    made = patcher.clone()
    group = comfy.hooks.create_hook_lora({}, 1.0, 0.0)
    made.add_hook_patches(group.hooks[0], difference(patcher, seed), 1.0)
    return made, group


def arguments(rows: int = 2, **options: Any) -> dict[str, Any]:
    """Of a prediction."""
    generator = torch.Generator().manual_seed(7)
    return {"x": torch.randn(rows, 4, 8, 8, generator=generator), "t": torch.full((rows,), 3.0),
            "c_crossattn": torch.randn(rows, 7, 48, generator=generator), "transformer_options": options}


def conditioning(seed: int, **more: Any) -> list[dict[str, Any]]:
    """For one prompt, as the samplers have it."""
    text = torch.randn(1, 7, 48, generator=torch.Generator().manual_seed(seed))
    return [{"model_conds": {"c_crossattn": comfy.conds.CONDCrossAttn(text)}, "uuid": seed, **more}]
