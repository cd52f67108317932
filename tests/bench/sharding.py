"""Workers that Ray starts, on the CPU with one thread each: what they gain, what they cost, what they hold."""
from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from support import workflows
from support.fixtures import make_models
from support.server import MB, Server
from table import ratio, show

NAMES = ("alone", "plugin")
SETTINGS = """
policies = ["ray_shard", "hybrid_split", "preload_cache", "zero_copy"]
[ray_shard]
workers = {workers}
verify = "off"
"""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
PAIRS = 8


def run(comfyui: Path, models: Path) -> None:
    """Prints the tables."""
    make_models(comfyui, models, ("diffusion_models/middle_fp32", "diffusion_models/flux_a_fp32", "diffusion_models/big_fp32",
                                  "text_encoders/clip_l"))
    rows, started = [], []
    with ExitStack() as stack:
        servers = _pair(stack, comfyui, models, 2)
        rows += _speed(servers, started)
        rows.append(_overhead(servers["plugin"]))
    show("Two workers on two cores, one thread each, against ComfyUI alone with one thread", ("", "alone", "plugin", "ratio",
                                                                                           "upper 95 %"), rows)
    held = [_held(comfyui, models, workers, started) for workers in (1, 2, 3, 4)]
    show("A 1692 MB float32 model in the workers", ("workers", "RAM of all, shared pages once, MB", "of the file",
                                                    "private RAM of all, MB"), held)
    show("Start of Ray and the workers", ("workers", "seconds"), started)


def _pair(stack: ExitStack, comfyui: Path, models: Path, workers: int) -> dict[str, Server]:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    return {name: stack.enter_context(Server(comfyui, folder / name, models, plugin=name == "plugin",
                                             settings=SETTINGS.format(workers=workers), env=ONE_THREAD)) for name in NAMES}


def _speed(servers: dict[str, Server], started: list[Any]) -> list[Any]:
    """Two conditionings, one for each worker."""
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for prompt in range(PAIRS + 1):
        flow = workflows.text_to_latent("middle_fp32", steps=10, seed=prompt, size=512)
        for name in NAMES if prompt % 2 else reversed(NAMES):
            took = servers[name].run(flow)
            if prompt:
                seconds[name].append(took)
    started.append((2, servers["plugin"].events("shard.started")[0]["seconds"]))
    alone, plugin = (servers[name].latents() for name in NAMES)
    error = float((alone - plugin).abs().max() / alone.abs().max())
    other = servers["alone"]
    other.run(workflows.text_to_latent("middle_fp32", steps=10, seed=PAIRS + 1, size=512))
    control = float((other.latents() - plugin).abs().max() / alone.abs().max())
    assert torch.isfinite(alone).all()
    return [("10 steps at 512 x 512, cfg 3: seconds, median", *(statistics.median(seconds[name]) for name in NAMES),
             *ratio(seconds["plugin"], seconds["alone"])),
            ("largest difference, of the largest value", "", f"{error:.1e}", "", ""),
            ("control: another seed", "", f"{control:.1e}", "", "")]


def _overhead(server: Server) -> tuple[Any, ...]:
    """What a step costs beside what the workers compute, for latents of 1 MB."""
    flow = workflows.text_to_latent("flux_a_fp32", steps=10, size=1024)
    server.run(flow)
    flow["sample"]["inputs"]["seed"] = 2
    server.run(flow)
    event = server.events("shard.finished")[-1]
    calls, beside = sum(event["calls"].values()), event["dispatch_seconds"] + event["transfer_seconds"]
    return ("milliseconds in dispatch per prediction, latents of 1 MB", "", beside * 1000 / calls, "", "")


def _held(comfyui: Path, models: Path, workers: int, started: list[Any]) -> tuple[Any, ...]:
    with tempfile.TemporaryDirectory() as folder, Server(comfyui, Path(folder), models, env=ONE_THREAD,
                                                         settings=SETTINGS.format(workers=workers)) as server:
        before, after = (_sums(server, model, workers) for model in ("flux_a_fp32", "big_fp32"))
        size = server.events("shard.loaded")[-1]["mapped_bytes"] / MB
        if workers != 2:
            started.append((workers, server.events("shard.started")[0]["seconds"]))
        shared, private = ((after[name] - before[name]) / MB for name in ("shared_bytes", "private_bytes"))
        return workers, shared, shared / size, private


def _sums(server: Server, model: str, batch: int) -> dict[str, int]:
    flow = workflows.text_to_latent(model, steps=1)
    flow["empty"]["inputs"]["batch_size"] = batch
    flow["sample"]["inputs"]["cfg"] = 1.0
    seen = len(server.events("shard.workers"))
    server.run(flow)
    while len(server.events("shard.workers")) == seen:
        time.sleep(0.05)
    event = server.events("shard.workers")[-1]
    return {name: sum(event[name].values()) for name in ("shared_bytes", "private_bytes")}
