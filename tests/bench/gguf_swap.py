"""Two GGUF models in one prompt on a device that holds one: ComfyUI-GGUF alone, and with the plugin by either loader.

"Pack's tensors" is its loader past our hook, as a node would be that cannot be hooked.
"""
from __future__ import annotations

import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

from support import workflows
from support.fixtures import make_models
from support.server import TESTING_NODES, Server
from table import ratio, show

WAYS = ("pack alone", "pack's tensors", "pack's loader", "stock loader")
FILES = ("big_q8_a.gguf", "big_q8_b.gguf")


def flow(way: str, seed: int) -> workflows.Workflow:
    found = workflows.both(*FILES, seed=seed)
    for name, file in zip(("model", "model2"), FILES, strict=True):
        if way == "pack's tensors":
            found[name] = workflows.node("InThePacksWay", loader="UnetLoaderGGUF", name=file)
        elif way != "stock loader":
            found[name] = workflows.node("UnetLoaderGGUF", unet_name=file)
    return found


def run(comfyui: Path, models: Path, pack: Path) -> None:
    """Prints the table. `pack` is ComfyUI-GGUF's folder."""
    make_models(comfyui, models, (*(f"diffusion_models/{file}" for file in FILES), "text_encoders/clip_l"))
    rows, seconds = [], {way: [] for way in WAYS}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {way: stack.enter_context(Server(comfyui, folder / way.replace("'", ""), models, plugin=way != WAYS[0],
                                                   device_mb=1700, packs=[pack, TESTING_NODES])) for way in WAYS}
        start = {way: server.private_bytes() for way, server in servers.items()}
        for prompt in range(1, 14):
            for way in WAYS[prompt % len(WAYS):] + WAYS[:prompt % len(WAYS)]:
                server, before = servers[way], servers[way].device()
                took = server.run(flow(way, prompt))
                now = server.device()
                if prompt > 1:
                    seconds[way].append(took)
                if prompt < 5:
                    rows.append((f"{prompt} {way}", took, (now["to_host"] - before["to_host"]) / 1e6,
                                 (server.private_bytes() - start[way]) / 1e6))
        latents = {way: [servers[way].latents(prefix) for prefix in ("out_a", "out_b")] for way in WAYS}
    show("GGUF swap, simulated: two 450 MB Q8_0 models and CLIP-L on a 1700 MB device, two steps each",
         ("prompt", "seconds", "to host MB", "private RAM MB"), rows)
    summary = []
    for way in WAYS[1:]:
        error = max(float((one - other).norm() / other.norm())
                    for one, other in zip(latents[way], latents[WAYS[0]], strict=True))
        summary.append((way, statistics.median(seconds[WAYS[0]]), statistics.median(seconds[way]),
                        *ratio(seconds[way], seconds[WAYS[0]]), f"{error:.4f}"))
    control = float((latents[WAYS[0]][0] - latents[WAYS[0]][1]).norm() / latents[WAYS[0]][1].norm())
    show(f"GGUF swap, simulated: prompts 2 to 13 (the two models' latents differ by {control:.2f})",
         ("", "pack alone, s", "plugin, s", "ratio", "upper 95 %", "relative error"), summary)
