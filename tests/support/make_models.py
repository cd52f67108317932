"""Makes random-weight models that ComfyUI's stock loaders accept: `python make_models.py COMFYUI OUT NAME...`.

OUT is a ComfyUI models folder. Names: see `MODELS`. Files that exist stay; seeds are fixed.
"""
import functools
import itertools
import json
import math
import sys
from pathlib import Path

comfyui, out, *names = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, comfyui)
import comfy.options

comfy.options.enable_args_parsing()
import comfy.clip_model
import comfy.ldm.flux.controlnet
import comfy.ldm.flux.model
import comfy.ldm.lightricks.model
import comfy.ldm.qwen_image.model
import comfy.ldm.wan.model
import comfy.ldm.wan.vae
import comfy.ops
import comfy.taesd.taesd
import comfy.text_encoders.t5
import gguf
import gguf_files
import numpy
import safetensors.torch
import torch
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

# Of models whose sizes ComfyUI does not see in the weights: LTX-Video's come from the metadata, others' with `sizing_nodes`.
SIZES = {
    "diffusion_models/ltxv": {"cross_attention_dim": 96, "attention_head_dim": 32, "num_attention_heads": 3,
                              "caption_channels": 768},
    "diffusion_models/qwen": {"attention_head_dim": 32, "num_attention_heads": 5, "joint_attention_dim": 768,
                              "axes_dims_rope": (8, 12, 12)},
}
OPS = comfy.ops.disable_weight_init
NORMS = ("norm.weight", "norm.scale", "gamma")


def randomize(shapes, dtype, seed, scale=0.5):
    """Random weights of the size that keeps activations from vanishing or exploding."""
    generator = torch.Generator().manual_seed(seed)
    state_dict = {}
    for key, value in shapes.items():
        if not value.dtype.is_floating_point:
            state_dict[key] = value.clone()
        elif key.endswith(NORMS) or (value.ndim == 1 and key.endswith("weight")):
            state_dict[key] = torch.ones(value.shape, dtype=dtype)
        elif value.ndim <= 1:
            state_dict[key] = torch.zeros(value.shape, dtype=dtype)
        else:
            weight = torch.randn(value.shape, generator=generator) * (scale / value[0].numel() ** 0.5)
            state_dict[key] = weight.to(dtype).contiguous()
    return state_dict


def meta(build):
    """The shapes of a model, without its memory."""
    with torch.device("meta"):
        return build().state_dict()


def sd3(seed, dtype=torch.float16, depth=2):
    return randomize(meta(lambda: OpenAISignatureMMDITWrapper(
        input_size=None, patch_size=2, in_channels=16, depth=depth, adm_in_channels=2048,
        context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 64 * depth}},
        num_patches=64 * 64, pos_embed_max_size=64, pos_embed_scaling_factor=None, out_channels=16, qk_norm=None,
        dtype=torch.float32, device="meta", operations=OPS)), dtype, seed)


def flux(seed, dtype=torch.bfloat16, hidden=128, depth=2, single=2):
    return randomize(meta(lambda: comfy.ldm.flux.model.Flux(
        in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=768, hidden_size=hidden, mlp_ratio=4.0,
        num_heads=hidden // 128, depth=depth, depth_single_blocks=single, axes_dim=[16, 56, 56], theta=10000, patch_size=2,
        qkv_bias=True, guidance_embed=True, txt_ids_dims=[], dtype=torch.float32, device="meta", operations=OPS)), dtype, seed)


def flux_controlnet(seed, dtype=torch.bfloat16):
    """In XLabs' format: Flux's own keys, with the norms' scales under their old name."""
    state_dict = randomize(meta(lambda: comfy.ldm.flux.controlnet.ControlNetFlux(
        in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=768, hidden_size=128, mlp_ratio=4.0, num_heads=1,
        depth=2, depth_single_blocks=0, axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True,
        txt_ids_dims=[], dtype=torch.float32, device="meta", operations=OPS)), dtype, seed)
    return {key.replace("_norm.weight", "_norm.scale"): value for key, value in state_dict.items()}


def big_flux(seed, dtype=torch.bfloat16):
    return flux(seed, dtype, hidden=1024, depth=6, single=12)


def wan(seed, dtype=torch.float16):
    return randomize(meta(lambda: comfy.ldm.wan.model.WanModel(
        model_type="t2v", in_dim=16, out_dim=16, dim=128, ffn_dim=128, num_heads=1, num_layers=2, text_dim=4096,
        device="meta", dtype=torch.float32, operations=OPS)), dtype, seed)


def ltxv(seed, dtype=torch.float32):
    return randomize(meta(lambda: comfy.ldm.lightricks.model.LTXVModel(
        in_channels=128, num_layers=2, **SIZES["diffusion_models/ltxv"], dtype=torch.float32, device="meta",
        operations=OPS)), dtype, seed)


def qwen(seed, dtype=torch.float32):
    return randomize(meta(lambda: comfy.ldm.qwen_image.model.QwenImageTransformer2DModel(
        in_channels=64, num_layers=2, **SIZES["diffusion_models/qwen"], dtype=torch.float32, device="meta",
        operations=OPS)), dtype, seed)


def taesd(seed, dtype=torch.float16):
    state_dict = randomize(comfy.taesd.taesd.TAESD(latent_channels=16).state_dict(), dtype, seed, scale=1.4)
    return {**state_dict, "vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}


def wan_vae(seed, dtype=torch.float16):
    return randomize(comfy.ldm.wan.vae.WanVAE(
        dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[], temperal_downsample=[False, True, True],
        image_channels=3, conv_out_channels=3).state_dict(), dtype, seed, scale=1.0)


def clip_l(seed, dtype=torch.float16):
    config = json.loads((Path(comfy.clip_model.__file__).parent / "sd1_clip_config.json").read_text())
    return randomize(meta(lambda: comfy.clip_model.CLIPTextModel(config, torch.float32, "meta", OPS)), dtype, seed)


def clip_l_fp8(seed):
    return {key: value.to(torch.float8_e4m3fn) if value.ndim == 2 else value for key, value in clip_l(seed).items()}


def clip_l_scaled(seed, dtype):
    """The layers' matrices in fp8 with a scale for each, as the host's older files have them; or in a wider dtype, scaled."""
    state_dict = clip_l(seed)
    for key in [key for key, value in state_dict.items() if value.ndim == 2 and "layers." in key]:
        scale = state_dict[key].abs().max().float() / 448
        narrow = (state_dict[key].float() / scale).to(torch.float8_e4m3fn)
        state_dict[key] = narrow if dtype == narrow.dtype else (narrow.float() * scale).to(dtype)
        if dtype == narrow.dtype:
            state_dict[f"{key.removesuffix('.weight')}.scale_weight"] = scale
    return state_dict | ({"scaled_fp8": torch.empty(2, dtype=dtype)} if dtype == torch.float8_e4m3fn else {})


def quantised_flux(seed):
    """Linear weights in scaled fp8, each with the `comfy_quant` marker that the stock loader looks for."""
    marker = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    state_dict = {}
    for key, value in flux(seed).items():
        layer = key.removesuffix(".weight")
        if key.endswith(".weight") and value.ndim == 2 and "blocks." in key:
            scale = value.abs().max().float() / 448
            state_dict[key] = (value.float() / scale).to(torch.float8_e4m3fn)
            state_dict[f"{layer}.weight_scale"] = scale
            state_dict[f"{layer}.comfy_quant"] = marker.clone()
        else:
            state_dict[key] = value
    return state_dict


def checkpoint(seed, dtype=torch.float16):
    return {**{f"model.diffusion_model.{k}": v for k, v in sd3(seed, dtype).items()},
            **{f"first_stage_model.{k}": v for k, v in taesd(seed, dtype).items()},
            **{f"text_encoders.clip_l.transformer.{k}": v for k, v in clip_l(seed, dtype).items()}}


def lora(seed, weights, rank=4):
    """A LoRA on every other matrix of a model."""
    generator = torch.Generator().manual_seed(seed)
    state_dict = {}
    for key, value in list(weights.items())[::2]:
        if value.ndim == 2 and key.endswith(".weight") and "blocks." in key:
            name = f"diffusion_model.{key.removesuffix('.weight')}"
            state_dict[f"{name}.lora_up.weight"] = torch.randn(value.shape[0], rank, generator=generator) * 0.3
            state_dict[f"{name}.lora_down.weight"] = torch.randn(rank, value.shape[1], generator=generator) * 0.3
            state_dict[f"{name}.alpha"] = torch.tensor(float(rank))
    return state_dict


# Types of blocks that the gguf package reads but does not write: where a block's scales are, and what they are to the first.
SCALES = {"Q4_K": {0: 1.0, 2: 7.5}, "Q6_K": {208: 1.0}, "IQ4_XS": {0: 1.0}}


def random_blocks(kind, shape, std, generator):
    """Blocks of a type whose weights have about this standard deviation."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = torch.randint(0, 256, (math.prod(shape) // elements, size), dtype=torch.uint8, generator=generator).numpy()
    scale = 1.0
    for _ in range(2):  # once to see what a scale of one gives
        for offset, factor in SCALES[kind.name].items():
            blocks[:, offset:offset + 2] = numpy.array([scale * factor], numpy.float16).view(numpy.uint8)
        scale = std / gguf.quants.dequantize(blocks.reshape(-1), kind).std()
    return blocks.reshape(*shape[:-1], -1)


def gguf_of(weights, kinds, seed):
    """(array, type) of each tensor of a model: matrices in the named types by turns, all else in float32."""
    generator = torch.Generator().manual_seed(seed)
    tensors, turns = {}, itertools.cycle(gguf.GGMLQuantizationType[name] for name in kinds)
    for key, value in weights.items():
        array = value.float().numpy()
        if value.ndim != 2 or value.shape[1] % 256 or "blocks." not in key:
            tensors[key] = array, gguf.GGMLQuantizationType.F32
            continue
        kind = next(turns)
        blocks = (random_blocks(kind, value.shape, array.std(), generator) if kind.name in SCALES
                  else gguf.quants.quantize(array, kind))
        tensors[key] = blocks, kind
    return tensors


def dequantised(tensors, dtype):
    """The same weights in a dtype that needs no dequantisation."""
    return {key: torch.from_numpy(array if kind.name == "F32" else gguf.quants.dequantize(array, kind)).to(dtype).contiguous()
            for key, (array, kind) in tensors.items()}


def t5_base(seed):
    """(array, type) by ComfyUI's keys: the vocabulary is quantised too."""
    config = json.loads((Path(comfy.text_encoders.t5.__file__).parent / "t5_config_base.json").read_text())
    weights = randomize(meta(lambda: comfy.text_encoders.t5.T5(config, torch.float32, "meta", OPS)), torch.float32, seed)
    weights["shared.weight"] *= weights["shared.weight"].shape[1] ** 0.5
    return text_blocks(weights, ("Q8_0", "Q4_K", "Q4_0", "Q6_K", "BF16"), seed)


def text_blocks(weights, kinds, seed):
    generator = torch.Generator().manual_seed(seed)
    turns = itertools.cycle(gguf.GGMLQuantizationType[name] for name in kinds)
    tensors = {}
    for key, value in weights.items():
        kind = next(turns) if value.ndim == 2 and value.shape[1] % 256 == 0 else gguf.GGMLQuantizationType.F32
        array = value.numpy()
        tensors[key] = (random_blocks(kind, value.shape, array.std(), generator) if kind.name in SCALES
                        else gguf.quants.quantize(array, kind)), kind
    return tensors


def as_llama_cpp(tensors):
    """The names of llama.cpp's converter."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 12)
    return {names.get_name(key, (".weight",)): value for key, value in tensors.items()}


def save_gguf(tensors, path):
    architecture = "t5encoder" if "token_embd.weight" in tensors else "clip" if "clip_l" in str(path) else "flux"
    gguf_files.save(path, architecture, tensors)


MIX = "Q8_0", "Q4_K", "IQ4_XS", "MXFP4", "Q6_K", "Q5_1", "BF16"


def mixed(seed):
    return gguf_of(flux(seed, torch.float32, hidden=256), MIX, seed)


def q8(seed, **size):
    return gguf_of(flux(seed, torch.float32, **size), ("Q8_0",), seed)


MODELS = {
    "diffusion_models/flux_mixed.gguf": lambda: mixed(2),
    "diffusion_models/flux_mixed_other.gguf": lambda: mixed(12),
    "diffusion_models/flux_mixed_fp32": lambda: dequantised(mixed(2), torch.float32),
    "diffusion_models/flux_mixed_bf16": lambda: dequantised(mixed(2), torch.bfloat16),
    "diffusion_models/middle_q8_a.gguf": lambda: q8(2, hidden=512, depth=2, single=4),
    "diffusion_models/middle_q8_a_bf16": lambda: dequantised(q8(2, hidden=512, depth=2, single=4), torch.bfloat16),
    "diffusion_models/middle_q8_b.gguf": lambda: q8(12, hidden=512, depth=2, single=4),
    "diffusion_models/big_q8_a.gguf": lambda: q8(2, hidden=1024, depth=6, single=12),
    "diffusion_models/big_q8_a_bf16": lambda: dequantised(q8(2, hidden=1024, depth=6, single=12), torch.bfloat16),
    "diffusion_models/big_q8_b.gguf": lambda: q8(12, hidden=1024, depth=6, single=12),
    "diffusion_models/flux_a": lambda: flux(2),
    "diffusion_models/flux_b": lambda: flux(12),
    "diffusion_models/flux_a_fp32": lambda: flux(2, torch.float32),
    "diffusion_models/flux_b_fp32": lambda: flux(12, torch.float32),
    "diffusion_models/flux_quantised": lambda: quantised_flux(2),
    "diffusion_models/sd3": lambda: sd3(1),
    "diffusion_models/wan": lambda: wan(3),
    "diffusion_models/ltxv": lambda: ltxv(4),
    "diffusion_models/qwen": lambda: qwen(5),
    "diffusion_models/big_a": lambda: big_flux(2),
    "diffusion_models/big_b": lambda: big_flux(12),
    "diffusion_models/big_fp32": lambda: big_flux(2, torch.float32),
    "diffusion_models/middle_a": lambda: flux(2, hidden=512, depth=2, single=4),
    "diffusion_models/deep": lambda: flux(2, hidden=512, depth=2, single=60),
    "diffusion_models/middle_b": lambda: flux(12, hidden=512, depth=2, single=4),
    "diffusion_models/middle_fp32": lambda: flux(2, torch.float32, hidden=512, depth=2, single=4),
    "vae/taesd": lambda: taesd(4),
    "vae/taesd_fp32": lambda: taesd(4, torch.float32),
    "vae/taesd_other": lambda: taesd(6),
    "vae/wan": lambda: wan_vae(5),
    "text_encoders/clip_l": lambda: clip_l(6),
    "text_encoders/clip_l_other": lambda: clip_l(16),
    "text_encoders/clip_l_fp8": lambda: clip_l_fp8(6),
    "text_encoders/clip_l_q8.gguf": lambda: text_blocks(clip_l(26, torch.float32), ("Q8_0",), 26),
    "text_encoders/clip_l_q8_fp16": lambda: dequantised(text_blocks(clip_l(26, torch.float32), ("Q8_0",), 26), torch.float16),
    "text_encoders/clip_l_scaled_fp8": lambda: clip_l_scaled(36, torch.float8_e4m3fn),
    "text_encoders/clip_l_scaled_fp16": lambda: clip_l_scaled(36, torch.float16),
    "text_encoders/t5_base.gguf": lambda: as_llama_cpp(t5_base(21)),
    "text_encoders/t5_base_other.gguf": lambda: as_llama_cpp(t5_base(22)),
    "text_encoders/t5_base_fp16": lambda: dequantised(t5_base(21), torch.float16),
    "checkpoints/sd3": lambda: checkpoint(7),
    "checkpoints/sd3_fp32": lambda: checkpoint(7, torch.float32),
    "controlnet/flux": lambda: flux_controlnet(10),
    "diffusion_models/flux_torch.pt": lambda: flux(2, torch.float32),
    "loras/flux_one": lambda: lora(8, flux(2)),
    "loras/flux_two": lambda: lora(9, flux(2)),
    "loras/flux_mixed": lambda: lora(8, flux(2, hidden=256)),
    "loras/middle": lambda: lora(8, flux(2, hidden=512, depth=2, single=4)),
}

for name in names:
    path = Path(out) / (name if name.endswith((".pt", ".gguf")) else f"{name}.safetensors")
    if path.exists():
        continue
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    metadata = {"config": json.dumps({"transformer": SIZES[name]})} if name in SIZES else None
    as_safetensors = functools.partial(safetensors.torch.save_file, metadata=metadata)
    save = {".pt": torch.save, ".gguf": save_gguf}.get(path.suffix, as_safetensors)
    save(MODELS[name](), partial)
    partial.rename(path)
    print(f"{path.name}: {path.stat().st_size / 2**20:.1f} MB", flush=True)
