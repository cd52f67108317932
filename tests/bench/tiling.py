"""A VAE's work in tiles: ComfyUI alone against two workers that compute with one thread each."""
from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from support.workflows import tiled_vae
from table import ratio, show

SETTINGS = 'policies = ["zero_copy", "ray_shard"]\n[ray_shard]\nworkers = 2\nheads = false\n'
PROMPTS = 6
PREFIXES = ("out", "out_again")


def run(pair: Callable[..., dict[str, Any]], cores: int) -> None:
    """Both get the same prompts in turn. With a thread for each device ComfyUI alone is one device, and the workers are two."""
    rows = []
    for threads in dict.fromkeys((1, cores)):
        seconds: dict[str, list[float]] = {"alone": [], "plugin": []}
        with ExitStack() as stack:
            servers = pair(stack, None, SETTINGS, threads=threads)
            same = True
            for prompt in range(PROMPTS):
                for name in ("alone", "plugin") if prompt % 2 else ("plugin", "alone"):
                    took = servers[name].run(tiled_vae("taesd_fp32", width=256, height=256, tile=128, seed=prompt))
                    if prompt:
                        seconds[name].append(took)
                same &= all(torch.equal(servers["alone"].latents(one), servers["plugin"].latents(one)) for one in PREFIXES)
            told = servers["plugin"].events("shard.finished")[1:]
        waiting = statistics.median((event["dispatch_seconds"] + event["transfer_seconds"]) / event["calls"]["tiles"]
                                    for event in told)
        rows.append((f"alone with {threads} thread{'s' * (threads > 1)}", *map(statistics.median, seconds.values()),
                     *ratio(seconds["plugin"], seconds["alone"]), waiting * 1000, "yes" if same else "NO"))
    show(f"Tiled VAE, encode, decode and encode of 256x256 by TAESD on the CPU: {PROMPTS - 1} pairs of warm prompts",
         ("", "alone, s", "2 workers, s", "ratio", "upper 95 %", "dispatch, ms a tile", "same latents"), rows)
