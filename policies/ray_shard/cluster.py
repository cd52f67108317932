"""Ray itself: started here and ended with ComfyUI, or a cluster of the user's, which is never ended.

On Linux the processes of a Ray that we started are killed by the kernel when the thread that started them ends: whoever calls
`connect` must live as long as ComfyUI.
"""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import psutil
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from . import undertaker
from .settings import Settings

_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_metrics_collection": "0", "RAY_DEDUP_LOGS": "0",
          "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
# What hides devices that torch calls "cuda". AMD's HIP reads the first of these names that is not empty, and counts among the
# devices that its ROCr leaves it, for which an empty list is one too.
_CUDA = ("CUDA_VISIBLE_DEVICES",)
_HIP = ("HIP_VISIBLE_DEVICES", *_CUDA)
_ROCR = "ROCR_VISIBLE_DEVICES"


def connect(settings: Settings, namespace: str) -> bool:
    """Starts Ray, or joins a running one. Nothing where this process is in one already, which is somebody else's to leave.

    Returns:
        Whether it did.

    Raises:
        Exception: Ray cannot be started, or reached.
    """
    if ray.is_initialized():
        return False
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    common: dict[str, Any] = {"namespace": namespace, "log_to_driver": False, "logging_level": "error",
                              "configure_logging": False}
    if settings.is_local:
        ray.init(address="local", include_dashboard=False, num_cpus=max(os.cpu_count() or 1, 1), num_gpus=0,
                 object_store_memory=_store(), _temp_dir=_folder(), **common)
        _outlive()
    else:
        ray.init(address=settings.address, **common)
    return True


def _outlive() -> None:
    """Has somebody look after Ray's processes when this one is gone."""
    here = psutil.Process()
    quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    command = [sys.executable, undertaker.__file__, str(here.pid), str(here.create_time())]
    subprocess.Popen(command, start_new_session=True, **quiet)  # not a Cancel by Ctrl-C ends it


def disconnect() -> None:
    """Ends a Ray that was started here; leaves another one."""
    if ray.is_initialized():
        ray.shutdown()


def on_this_machine() -> NodeAffinitySchedulingStrategy:
    """Where in a cluster a worker has to be: it maps this machine's files."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def environment(device: str) -> tuple[Mapping[str, str | None], str]:
    """(what a worker's process must find in its environment, and what not (None), what its device is called there)."""
    kind, _, index = device.partition(":")
    alone = {"RESIDENCY_DISABLE": "1"}
    if kind != "cuda":
        return alone, device
    names, below = (_HIP, {_ROCR: os.environ.get(_ROCR)}) if torch.version.hip else (_CUDA, {})
    seen = next(filter(None, map(os.environ.get, names)), None)
    chosen = seen.split(",")[int(index or 0)].strip() if seen else index or "0"
    return {**alone, **below, **dict.fromkeys(names, chosen)}, "cuda:0"


def _store() -> int:
    """Bytes of shared memory that objects may take, weights that no file backs among them: half of what is there. They are
    taken when they are used."""
    room = psutil.virtual_memory().available // 2
    if os.path.isdir("/dev/shm"):
        room = min(room, shutil.disk_usage("/dev/shm").free * 9 // 10)
    return max(80 * 2**20, room)


def _folder() -> str:
    """A short path: names of UNIX sockets are at most 107 characters long."""
    return os.path.join("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir(), f"ray-{getattr(os, 'getuid', lambda: 0)()}")
