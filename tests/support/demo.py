"""`make demo`: the same stock workflow on a real ComfyUI, without the plugin and then with it.

On a machine without an accelerator it runs on the CPU, and, where there is a C++ compiler, on a simulated accelerator too:
a device with a hard memory limit that unmodified ComfyUI takes for an NPU. With an NVIDIA card it runs there: safetensors files
with dynamic VRAM off, because with it the plugin has nothing to do for them, and a GGUF file with ComfyUI's defaults.
"""
from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from support.fixtures import build_simulated_npu, make_models, no_simulated_npu
from support.loading import COMFYUI, ROOT, TREES
from support.server import MB, Server
from support.workflows import Workflow, both, text_to_latent

MODELS = TREES.parent / "residency-models"
SIMULATED = "simulated accelerator, 2200 MB (transfers are counted; seconds are this CPU's)"


@dataclass
class Run:
    seconds: float
    private: int
    storage: int
    to_host: int | None
    latents: torch.Tensor
    image: bytes


def run(name: str, folder: Path, prompts: list[Workflow], device_mb: int | None, device_args: list[str] | None) -> Run:
    """Starts ComfyUI, runs the prompts, and stops it."""
    with Server(COMFYUI, folder / name, MODELS, plugin=name != "alone", device_mb=device_mb, device_args=device_args) as server:
        private, storage = server.private_bytes(), server.storage_bytes()
        seconds = [server.run(prompt) for prompt in prompts]
        images = sorted((server.base / "output").glob("*.png"))
        return Run(sum(seconds), server.private_bytes() - private, server.storage_bytes() - storage,
                   server.device()["to_host"] if server.simulated else None,
                   server.latents("out_b" if "save2" in prompts[-1] else "out"), images[-1].read_bytes() if images else b"")


def compare(title: str, device: str, prompts: list[Workflow], device_mb: int | None = None,
            device_args: list[str] | None = None, alone_prompts: list[Workflow] | None = None) -> None:
    """Prints the table and the plugin's own report of its run.

    Args:
        alone_prompts: what ComfyUI alone gets, where it cannot open the plugin's files.
    """
    print(f"\n=== {title}\n    device: {device}; ComfyUI: {COMFYUI}\n", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        each = {"alone": alone_prompts or prompts, "Residency": prompts}
        runs = {name: run(name, folder, flows, device_mb, device_args) for name, flows in each.items()}
        alone, plugin = runs["alone"], runs["Residency"]
        same = torch.equal(alone.latents, plugin.latents) and alone.image == plugin.image
        rows = [("seconds, all prompts", f"{alone.seconds:.1f}", f"{plugin.seconds:.1f}"),
                ("private RAM, MB more", f"{alone.private / MB:.0f}", f"{plugin.private / MB:.0f}"),
                ("read from storage, MB", f"{alone.storage / MB:.0f}", f"{plugin.storage / MB:.0f}")]
        if alone.to_host is not None and plugin.to_host is not None:
            rows.append(("device to RAM, MB (simulated)", f"{alone.to_host / MB:.0f}", f"{plugin.to_host / MB:.0f}"))
        print(f"{'':32}{'ComfyUI alone':>16}{'with Residency':>16}")
        for label, one, other in rows:
            print(f"{label:32}{one:>16}{other:>16}")
        print(f"{'same latents and image':32}{'':>16}{'yes' if same else 'NO':>16}\n", flush=True)
        report = folder / "Residency" / "user" / "residency" / "telemetry.jsonl"
        subprocess.run([sys.executable, "-m", "telemetry", "report", str(report)], cwd=ROOT, check=True)
        if not same:
            sys.exit("the results differ: please report this with the lines above")


def main() -> None:
    make_models(COMFYUI, MODELS, ("diffusion_models/big_fp32", "diffusion_models/big_a", "diffusion_models/big_b",
                                  "diffusion_models/big_q8_a.gguf", "diffusion_models/big_q8_a_bf16", "text_encoders/clip_l",
                                  "vae/taesd"))
    decoded = [text_to_latent("big_fp32", vae="taesd", seed=seed) for seed in (1, 2)]
    swap = [both("big_a", "big_b", seed=seed) for seed in (1, 2, 3)]
    gguf, twin = ([text_to_latent(model, seed=seed) for seed in (1, 2)] for model in ("big_q8_a.gguf", "big_q8_a_bf16"))
    about_gguf = ("A GGUF file in the stock Load Diffusion Model node, two prompts. ComfyUI alone, which cannot open it, gets "
                  "the same weights dequantised")
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        compare("Two models in one workflow, three prompts", f"{name}, dynamic VRAM off", swap,
                device_args=["--disable-dynamic-vram"])
        compare(about_gguf, f"{name}, ComfyUI's defaults", gguf, device_args=[], alone_prompts=twin)
        return
    compare("A 1.7 GB float32 model, two prompts", "CPU", decoded)
    reason = no_simulated_npu()
    if reason:
        print(f"skipped, {reason}: two models that swap on a device that holds one")
        return
    build_simulated_npu()
    compare("Two 850 MB models in one workflow, three prompts, on a device that holds one",
            SIMULATED, swap, device_mb=2200)
    compare(about_gguf, SIMULATED, gguf, device_mb=2200, alone_prompts=twin)


if __name__ == "__main__":
    main()
