"""Ray itself: started here and ended with ComfyUI, or a cluster of the user's, which is never ended.

On Linux the processes of a Ray that we started are killed by the kernel when the thread that started them ends: whoever calls
`connect` must live as long as ComfyUI.
"""
from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import psutil
import ray

from .settings import Settings

_STORE = 512 * 2**20  # bytes, for steps; weights by value come on top
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_metrics_collection": "0", "RAY_DEDUP_LOGS": "0",
          "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def connect(settings: Settings, namespace: str, by_value: int) -> bool:
    """Starts Ray, or joins a running one. Nothing where this process is in one already, which is somebody else's to leave.

    Args:
        by_value: bytes of weights that no file backs, at most; they are kept in shared memory, once for all workers.

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
                 object_store_memory=_store(by_value), _temp_dir=_folder(), _node_ip_address="127.0.0.1", **common)
    else:
        ray.init(address=settings.address, **common)
    return True


def disconnect() -> None:
    """Ends a Ray that was started here; leaves another one."""
    if ray.is_initialized():
        ray.shutdown()


def environment(device: str) -> tuple[Mapping[str, str], str]:
    """(what a worker's process must find in its environment, what its device is called there)."""
    kind, _, index = device.partition(":")
    alone = {"RESIDENCY_DISABLE": "1"}
    if kind != "cuda":
        return alone, device
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = seen.split(",")[int(index or 0)].strip() if seen else index or "0"
    return {**alone, "CUDA_VISIBLE_DEVICES": chosen}, "cuda:0"


def _store(by_value: int) -> int:
    """Bytes of shared memory that objects may take: as many as are wanted, and at most half of what is there."""
    room = psutil.virtual_memory().available // 2
    if os.path.isdir("/dev/shm"):
        room = min(room, shutil.disk_usage("/dev/shm").free * 9 // 10)
    return max(80 * 2**20, min(_STORE + by_value, room))


def _folder() -> str:
    """A short path: names of UNIX sockets are at most 107 characters long."""
    return os.path.join("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir(), f"ray-{getattr(os, 'getuid', lambda: 0)()}")
