"""Makes this process a twin of the host's: the same ComfyUI, the same options, the same names of modules."""
from __future__ import annotations

import importlib.util
import os
import pickle
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import psutil

from ...memory import keep_little


class PathNames:
    """Finds modules that ComfyUI named after the path of a node pack, by running what lies there under the same name."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if path is not None or not os.path.isabs(name):
            return None
        for place in (name, name.replace("_x_", ".")):  # dots are written so; a folder may be called so as well
            file = os.path.join(place, "__init__.py")
            if os.path.isfile(file):
                return importlib.util.spec_from_file_location(name, file, submodule_search_locations=[place])
            if os.path.isfile(f"{place}.py"):
                return importlib.util.spec_from_file_location(name, f"{place}.py")
        return None


def become(twin: Mapping[str, Any], device: str, mates: int) -> None:
    """Imports ComfyUI as the host did. `device` is torch's name of the one that is computed on, here; `mates` share cores."""
    sys.argv = sys.argv[:1]
    sys.path.insert(0, twin["root"])
    sys.meta_path.append(PathNames())
    import comfy.cli_args

    vars(comfy.cli_args.args).update(pickle.loads(twin["arguments"]))
    comfy.cli_args.args.cpu = device == "cpu"
    import torch

    torch.set_grad_enabled(False)
    torch.set_num_threads(max(1, (twin["threads"] or torch.get_num_threads()) // mates))
    import comfy.model_management  # with the packages of an accelerator, which torch knows by its name from then on

    kind, _, index = device.partition(":")
    if kind != "cpu":
        keep_little()  # RAM is where bytes pass through
    if kind not in ("cpu", "cuda"):  # of CUDA's devices only one can be seen here
        torch.get_device_module(kind).set_device(int(index or 0))


def end_with(pid: int, started: float) -> None:
    """Ends this process soon after that one, however it ends."""

    def watch() -> None:
        while _lives(pid, started):
            time.sleep(1)
        os._exit(0)

    threading.Thread(target=watch, name="residency-orphan", daemon=True).start()


def _lives(pid: int, started: float) -> bool:
    try:
        host = psutil.Process(pid)
        return abs(host.create_time() - started) < 2 and host.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
