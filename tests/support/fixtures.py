"""Where models and the simulated accelerator come from."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock

from support.server import SIMULATED_NPU


def make_models(comfyui: Path, folder: Path, names: Iterable[str]) -> Path:
    """Makes the random-weight models that are not there yet, and returns the models folder. Others may want them meanwhile."""
    with FileLock(f"{folder}.lock"):
        missing = [name for name in names
                   if not (folder / (name if name.endswith((".pt", ".gguf")) else f"{name}.safetensors")).exists()]
        if missing:
            script = Path(__file__).with_name("make_models.py")
            subprocess.run([sys.executable, str(script), str(comfyui), str(folder), *missing], check=True, stdout=sys.stderr)
    return folder


def no_simulated_npu() -> str | None:
    """Why the simulated accelerator cannot run here; None where it can."""
    if shutil.which("g++") is None:
        return "no g++ for the simulated accelerator"
    return None


def build_simulated_npu() -> None:
    """Compiles it once, about half a minute, so that no server's start waits for it."""
    subprocess.run([sys.executable, "-c", "import torch_npu"], check=True,
                   env={**os.environ, "PYTHONPATH": str(SIMULATED_NPU)})
