"""A rank of a group on a simulated device of its own, in a process whose arguments are its rank and a port for each mode.

Predicts with the whole model on the device, and with the weights shared out between two ranks, and prints JSON, by mode and in
bytes: the most memory of the device that is in use within a prediction, the weights that lie there, and the blocks that do not.
"""
from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

from support.server import SIMULATED_NPU

os.environ["SIMNPU_EMPTIES"] = "1"
sys.path.insert(0, str(SIMULATED_NPU))

import torch
from residency.hooks.remote import RemoteModel
from residency.policies.ray_shard.parcels import pack
from residency.policies.ray_shard.worker import models
from residency.policies.ray_shard.worker.group import Group
from residency.policies.ray_shard.worker.weights import MODES
from residency.policies.ray_shard.worker.weights.units import weight_of

from support import deep
from support.families import random

DEVICE = torch.device("npu", 0)
SHARED = ("blocks", "pipeline")


def arguments() -> dict[str, Any]:
    """As they come to a worker: on its device. Of a thousand tokens, so that hidden states count too."""
    made = {**deep.arguments("flux"), "x": random(1, 16, 64, 64)}
    return {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in made.items()}


def most(model: models.Model, owned: Any = None) -> int:
    """Bytes in use on the device, beside the arguments, within a prediction like one that was made before."""
    device: Any = torch.get_device_module(DEVICE)
    model.predict(arguments(), owned)
    before = device.memory_allocated()
    given = arguments()
    given_bytes = device.memory_allocated() - before
    device.reset_peak_memory_stats()
    model.predict(given, owned)
    return int(device.max_memory_allocated() - given_bytes)


def main() -> None:
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    rank, *ports = map(int, sys.argv[1:])
    patcher = deep.loaded(deep.flux_weights(hidden=256, depth=2, single=12))
    remote = RemoteModel(patcher)
    with torch.inference_mode():
        model = models.Model(patcher.model, DEVICE, deep.CPU)
        model.patch("plain", pack(remote.patches(), known=remote.known()))
        results: dict[str, Any] = {"whole": {"most": most(model), "share": weight_of(patcher.model), "foreign": []}}
        for mode, port in zip(SHARED, ports, strict=True):
            group = Group(rank, 2, f"127.0.0.1:{port}", device=DEVICE)
            owned = MODES[mode](group, [1.0, 1.0])
            results[mode] = {"most": most(model, owned), "share": owned.bytes_here(), "foreign": sorted(
                unit.bytes for unit, owner in zip(owned.units, owned.owners, strict=True) if owner != rank)}
            model.release()
            group.close()
    print(json.dumps(results))
