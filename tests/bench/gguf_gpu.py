"""A GGUF model on a CUDA card with ComfyUI's defaults (dynamic VRAM): seconds a step, beside ComfyUI-GGUF and bfloat16."""
from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import torch
from support import workflows
from support.fixtures import make_models
from support.server import Server
from table import show

FILE, TWIN = "big_q8_a.gguf", "big_q8_a_bf16"
STEPS, PROMPTS = 20, 6


def flow(way: str, seed: int) -> workflows.Workflow:
    found = workflows.text_to_latent(TWIN if way == "bfloat16 alone" else FILE, steps=STEPS, seed=seed, size=512)
    if way == "ComfyUI-GGUF alone":
        found["model"] = workflows.node("UnetLoaderGGUF", unet_name=FILE)
    return found


def run(comfyui: Path, models: Path, pack: Path | None) -> None:
    """Prints the table. `pack` is ComfyUI-GGUF's folder, or None to leave it out."""
    make_models(comfyui, models, (f"diffusion_models/{FILE}", f"diffusion_models/{TWIN}", "text_encoders/clip_l"))
    ways = ["bfloat16 alone", *(["ComfyUI-GGUF alone"] if pack else []), "with Residency"]
    rows = []
    for room_gb in (None, 1.3):  # a headroom below which the weights do not all stay
        free = torch.cuda.mem_get_info()[0] / 2**30
        args = [] if room_gb is None else ["--reserve-vram", f"{free - room_gb:.2f}"]
        for way in ways:  # one after the other: the room is counted from what is free
            with tempfile.TemporaryDirectory() as folder, Server(comfyui, Path(folder), models, plugin=way == ways[-1],
                                                                 packs=[pack] if pack else [], device_args=args) as server:
                start = server.private_bytes()
                seconds = [server.run(flow(way, seed)) / STEPS for seed in range(PROMPTS)][1:]
                rows.append(("all of the card" if room_gb is None else f"{room_gb} GB", way, statistics.median(seconds),
                             (server.private_bytes() - start) / 1e6, "DynamicVRAM support detected" in server.log()))
    show(f"{torch.cuda.get_device_name()}: a 450 MB Q8_0 model, {STEPS} steps, {PROMPTS - 1} warm prompts",
         ("room", "", "seconds a step", "private RAM MB", "dynamic VRAM"), rows)
