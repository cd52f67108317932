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
from collections.abc import Iterable, Mapping
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


def on(node: str) -> NodeAffinitySchedulingStrategy:
    """There, and nowhere else."""
    return NodeAffinitySchedulingStrategy(node, soft=False)


def nodes(hosts: Iterable[str]) -> dict[str, str]:
    """What Ray calls these hosts, of which "" is this machine.

    Args:
        hosts: addresses or names, as `ray status` has them.

    Raises:
        LookupError: the cluster has no such host, or several.
    """
    found, alive = dict[str, str](), list[dict[str, Any]]()
    for host in set(hosts):
        if not host:
            found[host] = ray.get_runtime_context().get_node_id()
            continue
        alive = alive or [node for node in ray.nodes() if node["Alive"]]
        ours = [node for node in alive if node["NodeManagerAddress"] == host] or [
            node for node in alive if host in (node.get("NodeName"), node["NodeManagerHostname"])]
        if len(ours) != 1:
            there = ", ".join(f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']})" for node in alive)
            raise LookupError(f"{'several hosts are' if ours else 'no host is'} called {host!r} in the Ray cluster, whose "
                              f"hosts are {there}")
        found[host] = ours[0]["NodeID"]
    return found


def others(hosts: Iterable[str]) -> dict[str, str]:
    """The addresses of these hosts by their names in the settings; "" of this machine, whatever it is called.

    Raises:
        LookupError: the cluster has no such host, or several.
    """
    hosts = set(hosts)
    if hosts == {""}:
        return {"": ""}
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    addresses[ray.get_runtime_context().get_node_id()] = ""
    return {host: addresses[node] for host, node in nodes(hosts).items()}


def environment(device: str, around: Mapping[str, str] | None = None) -> tuple[Mapping[str, str | None], str]:
    """(what a worker's process must find in its environment, and what not (None), what its device is called there).

    Args:
        around: the environment on the worker's host, where that is another one.

    Raises:
        IndexError: the environment shows no such device.
    """
    kind, _, index = device.partition(":")
    alone = {"RESIDENCY_DISABLE": "1"}
    if kind != "cuda":
        return alone, device
    around = os.environ if around is None else around
    names, below = (_HIP, {_ROCR: around.get(_ROCR)}) if torch.version.hip else (_CUDA, {})
    seen = next(filter(None, map(around.get, names)), None)
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
