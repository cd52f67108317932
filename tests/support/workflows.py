"""Stock workflows in ComfyUI's API format, small enough to read."""
from __future__ import annotations

from typing import Any

Workflow = dict[str, dict[str, Any]]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def text_to_latent(model: str, *, clip: str = "clip_l", clip_type: str = "stable_diffusion", seed: int = 1, steps: int = 2,
                   size: int = 64, loras: tuple[tuple[str, float], ...] = (), weight_dtype: str = "default",
                   vae: str | None = None, prefix: str = "out") -> Workflow:
    """Loads a diffusion model and a text encoder, samples, and saves the latents under `prefix`."""
    flow = {
        "model": _loader(model, weight_dtype),
        "clip": node("CLIPLoader", clip_name=_file(clip), type=clip_type),
    }
    return _sample(flow, ["model", 0], ["clip", 0], seed, steps, size, loras, ["vae", 0] if vae else None, prefix,
                   {"vae": node("VAELoader", vae_name=f"{vae}.safetensors")} if vae else {})


def _loader(model: str, weight_dtype: str = "default") -> dict[str, Any]:
    return node("UNETLoader", unet_name=_file(model), weight_dtype=weight_dtype)


def _file(name: str) -> str:
    return name if "." in name else f"{name}.safetensors"


def from_checkpoint(name: str, *, seed: int = 1, steps: int = 2, size: int = 64, prefix: str = "out") -> Workflow:
    """The same with everything from one checkpoint, decoded too."""
    flow = {"checkpoint": node("CheckpointLoaderSimple", ckpt_name=_file(name))}
    return _sample(flow, ["checkpoint", 0], ["checkpoint", 1], seed, steps, size, (), ["checkpoint", 2], prefix, {})


def torch_file(model: str) -> Workflow:
    """The same from a `.pt` file."""
    flow = text_to_latent(model)
    flow["model"]["inputs"]["unet_name"] = f"{model}.pt"
    return flow


def with_controlnet(model: str, control: str, *, prefix: str = "out") -> Workflow:
    """A ControlNet steers the sampling with a plain image."""
    flow = text_to_latent(model, prefix=prefix)
    flow |= {
        "control": node("ControlNetLoader", control_net_name=f"{control}.safetensors"),
        "hint": node("EmptyImage", width=64, height=64, batch_size=1, color=0x4080C0),
        "controlled": node("ControlNetApplyAdvanced", positive=["positive", 0], negative=["negative", 0],
                           control_net=["control", 0], image=["hint", 0], strength=1.0, start_percent=0.0, end_percent=1.0),
    }
    flow["sample"]["inputs"] |= {"positive": ["controlled", 0], "negative": ["controlled", 1]}
    return flow


def two_encoders(model: str, clips: tuple[str, str], *, seed: int = 1, prefix: str = "out") -> Workflow:
    """A diffusion model with two text encoders in one loader."""
    flow = {
        "model": node("UNETLoader", unet_name=f"{model}.safetensors", weight_dtype="default"),
        "clip": node("DualCLIPLoader", clip_name1=_file(clips[0]), clip_name2=_file(clips[1]), type="sd3"),
    }
    return _sample(flow, ["model", 0], ["clip", 0], seed, 2, 64, (), None, prefix, {})


def both(first: str, second: str, *, seed: int = 1, steps: int = 2, prefix: str = "out", size: int = 64) -> Workflow:
    """One prompt that samples with one model and then with another, with one text encoder."""
    flow = text_to_latent(first, seed=seed, steps=steps, size=size, prefix=f"{prefix}_a")
    flow["model2"] = _loader(second)
    flow["sample2"] = {**flow["sample"], "inputs": {**flow["sample"]["inputs"], "model": ["model2", 0],
                                                    "latent_image": ["sample", 0], "denoise": 0.7}}
    flow["save2"] = node("SaveLatent", samples=["sample2", 0], filename_prefix=f"{prefix}_b")
    return flow


def hooked_lora(model: str, lora: str, *, strength: float = 1.0, seed: int = 1, prefix: str = "out") -> Workflow:
    """A LoRA that is scheduled by hooks: on for the first half of the steps."""
    flow = text_to_latent(model, seed=seed, steps=4, prefix=prefix)
    flow |= {
        "hook": node("CreateHookLoraModelOnly", lora_name=f"{lora}.safetensors", strength_model=strength),
        "keyframe": node("CreateHookKeyframe", strength_mult=1.0, start_percent=0.0),
        "keyframe2": node("CreateHookKeyframe", strength_mult=0.0, start_percent=0.5, prev_hook_kf=["keyframe", 0]),
        "scheduled": node("SetHookKeyframes", hooks=["hook", 0], hook_kf=["keyframe2", 0]),
        "hooked": node("ConditioningSetProperties", cond_NEW=["positive", 0], strength=1.0, set_cond_area="default",
                       hooks=["scheduled", 0]),
    }
    flow["sample"]["inputs"]["positive"] = ["hooked", 0]
    return flow


def video(model: str, vae: str, *, seed: int = 1, prefix: str = "out") -> Workflow:
    """A Wan-like model on five frames, decoded with a Wan VAE and encoded again."""
    flow = text_to_latent(model, clip_type="sd3", seed=seed, prefix=prefix, vae=vae)
    flow["empty"] = node("EmptyHunyuanLatentVideo", width=64, height=64, length=5, batch_size=1)
    return flow


def ltx_video(model: str, *, prefix: str = "out") -> Workflow:
    """An LTX-like model on nine frames. Its text has a mask, for which the pack `sizing_nodes` has a node."""
    flow = text_to_latent(model, prefix=prefix)
    for text in ("positive", "negative"):
        flow[f"masked_{text}"] = node("MaskText", conditioning=[text, 0], tokens=20)
        flow["sample"]["inputs"][text] = [f"masked_{text}", 0]
    flow["empty"] = node("EmptyLTXVLatentVideo", width=96, height=64, length=9, batch_size=1)
    return flow


def tiled_vae(vae: str, *, width: int = 192, height: int = 128, frames: int = 1, seed: int = 1, tile: int = 64,
              prefix: str = "out") -> Workflow:
    """Noise through a VAE in tiles: encoded, decoded, and encoded again. Nothing clips the first latent (`prefix`)."""
    tiles = {"tile_size": tile, "overlap": 16, "temporal_size": 8, "temporal_overlap": 4}
    loaded = ["vae", 0]
    return {
        "vae": node("VAELoader", vae_name=_file(vae)),
        "grey": node("EmptyImage", width=width, height=height, batch_size=frames, color=0x808080),
        "noise": node("ImageAddNoise", image=["grey", 0], seed=seed, strength=0.5),
        "encode": node("VAEEncodeTiled", pixels=["noise", 0], vae=loaded, **tiles),
        "decode": node("VAEDecodeTiled", samples=["encode", 0], vae=loaded, **tiles),
        "encode_again": node("VAEEncodeTiled", pixels=["decode", 0], vae=loaded, **tiles),
        "save": node("SaveLatent", samples=["encode", 0], filename_prefix=prefix),
        "save_again": node("SaveLatent", samples=["encode_again", 0], filename_prefix=f"{prefix}_again"),
    }


def _sample(flow: Workflow, model: list[Any], clip: list[Any], seed: int, steps: int, size: int,
            loras: tuple[tuple[str, float], ...], vae: list[Any] | None, prefix: str, more: Workflow) -> Workflow:
    flow = {**flow, **more}
    for index, (name, strength) in enumerate(loras):
        flow[f"lora{index}"] = node("LoraLoaderModelOnly", model=model, lora_name=f"{name}.safetensors",
                                    strength_model=strength)
        model = [f"lora{index}", 0]
    flow |= {
        "positive": node("CLIPTextEncode", clip=clip, text="a cat"),
        "negative": node("CLIPTextEncode", clip=clip, text=""),
        "empty": node("EmptySD3LatentImage", width=size, height=size, batch_size=1),
        "sample": node("KSampler", model=model, seed=seed, steps=steps, cfg=3.0, sampler_name="euler", scheduler="simple",
                       positive=["positive", 0], negative=["negative", 0], latent_image=["empty", 0], denoise=1.0),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix=prefix),
    }
    if vae is not None:
        # Random weights saturate pixels, so what the VAE makes is compared before anything clips it: as a latent again.
        flow["decode"] = node("VAEDecode", samples=["sample", 0], vae=vae)
        flow["encode"] = node("VAEEncode", pixels=["decode", 0], vae=vae)
        flow["save_vae"] = node("SaveLatent", samples=["encode", 0], filename_prefix=f"{prefix}_vae")
        flow["preview"] = node("SaveImage", images=["decode", 0], filename_prefix=prefix)
    return flow
