"""A rank of a group, in a process of its own with one thread, whose arguments are its rank and a port: seconds of a prediction
of a larger model whose weights the ranks have together, in each mode, as JSON. How many ranks there are is told by RANKS."""
from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import time
from typing import Any

import torch
from residency.hooks.remote import RemoteModel
from residency.policies.ray_shard.parcels import pack
from residency.policies.ray_shard.worker import attention
from residency.policies.ray_shard.worker.group import Group
from residency.policies.ray_shard.worker.models import Model
from residency.policies.ray_shard.worker.weights import MODES
from residency.policies.ray_shard.worker.weights.units import weight_of

from support import deep

ROUNDS = 5


def _seconds(model: Model, group: Group | None, mode: str, alone: torch.Tensor | None) -> tuple[dict[str, Any], torch.Tensor]:
    owned = MODES[mode](group, [1.0] * group.world) if group else None
    seconds, sent = [], 0
    for _ in range(ROUNDS + 1):  # the first one places the weights
        if group:
            sent = group.sent
            group.gather(torch.zeros(1, 1), 0, [1] * group.world)  # nobody starts before the others
        started = time.perf_counter()
        made = model.predict(deep.arguments("flux", 2), owned)
        seconds.append(time.perf_counter() - started)
    here = owned.bytes_here() if owned else weight_of(model.diffusion_model)
    found = {"seconds": statistics.median(seconds[1:]), "here": here, "sent": group.sent - sent if group else 0}
    if alone is not None and (mode != "pipeline" or (group and group.rank == group.world - 1)):
        found["error"] = float((made - alone).abs().max() / alone.abs().max())
    return found, made


def main() -> None:
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    attention.install()
    rank, port = map(int, sys.argv[1:])
    world = int(os.environ["RANKS"])
    patcher = deep.loaded(deep.flux_weights(hidden=1024, depth=2, single=7))
    remote = RemoteModel(patcher)
    model = Model(patcher.model, deep.CPU, deep.CPU)
    with torch.inference_mode():
        model.patch("plain", pack(remote.patches(), known=remote.known()))
        group = Group(rank, world, f"127.0.0.1:{port}")
        group.gather(torch.zeros(1, 1), 0, [1] * world)
        results, alone = {}, None
        results["alone"], alone = _seconds(model, None, "", None)
        for mode in MODES:
            results[mode], _ = _seconds(model, group, mode, alone)
    print(json.dumps(results))
