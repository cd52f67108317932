"""Loads the plugin as ComfyUI does, by its path, under the name `residency`; and ComfyUI's own modules."""
from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSIONS = ("0.16.3", "0.18.2", "0.24.0", "0.30.0")
TREES = Path(os.environ.get("COMFYUI_TREES", ROOT / ".venv" / "comfyui"))
COMFYUI = Path(os.environ.get("COMFYUI_PATH") or TREES / VERSIONS[-1])


def load(cpu: bool = True) -> None:
    """Puts ComfyUI at the head of `sys.path` and imports the plugin, not running: callers want its parts.

    Args:
        cpu: ComfyUI computes on the CPU; else on the accelerator that it finds.

    Raises:
        FileNotFoundError: there is no ComfyUI.
    """
    if "residency" in sys.modules:
        return
    if not (COMFYUI / "main.py").exists():
        raise FileNotFoundError(f"no ComfyUI in {COMFYUI}. Run `make setup`, or let COMFYUI_PATH name yours.")
    sys.path.insert(0, str(COMFYUI))
    import comfy.cli_args

    comfy.cli_args.args.cpu = cpu
    spec = importlib.util.spec_from_file_location("residency", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["residency"] = module
    before = os.environ.get("RESIDENCY_DISABLE")
    os.environ["RESIDENCY_DISABLE"] = "1"
    try:
        spec.loader.exec_module(module)
    finally:
        os.environ.pop("RESIDENCY_DISABLE")
        if before is not None:
            os.environ["RESIDENCY_DISABLE"] = before
