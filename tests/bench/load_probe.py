"""Loads one file through the stock loader and prints what that cost, as JSON: `load_probe.py COMFYUI MODELS FILE [SETTINGS]`.

With SETTINGS (TOML, may be empty) the plugin is loaded first, as ComfyUI would.
"""
from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path

comfyui, models, file, *settings = sys.argv[1:]
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, comfyui)
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import folder_paths  # noqa: E402
import nodes  # noqa: E402
import torch  # noqa: E402


def private_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) / 1024


folder_paths.add_model_folder_path("diffusion_models", str(Path(models) / "diffusion_models"), is_default=True)
if settings:
    import asyncio

    scratch = Path(tempfile.mkdtemp())
    folder_paths.set_user_directory(str(scratch))
    (scratch / "residency").mkdir()
    (scratch / "residency" / "settings.toml").write_text(settings[0])
    root = str(Path(__file__).parents[2])
    with contextlib.redirect_stdout(io.StringIO()):
        assert asyncio.run(nodes.load_custom_node(root)), "the plugin did not load"
    assert sys.modules[root.replace(".", "_x_")].plugin.registry.report()
os.sync()
with torch.inference_mode():
    before, started = private_mb(), time.perf_counter()
    model, = nodes.UNETLoader().load_unet(file, "default")
    seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "private_mb": private_mb() - before}))
