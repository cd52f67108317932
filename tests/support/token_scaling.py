"""A rank of a group, in a process of its own with one thread: seconds of a prediction of a larger video model, whose tokens
all ranks share, as JSON. How many ranks there are is told by TOKEN_RANKS."""
from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import time
from typing import Any

import torch
from comfy.ldm.wan.model import WanModel
from residency.policies.ray_shard.worker import attention
from residency.policies.ray_shard.worker.families import family
from residency.policies.ray_shard.worker.group import Group
from residency.policies.ray_shard.worker.tokens import TokenParallel

from support.families import PLACE, Family, random

TOKENS, WIDTH, BLOCKS = 5 * 24 * 24, 512, 6


def _build() -> torch.nn.Module:
    return WanModel(model_type="t2v", patch_size=(1, 2, 2), text_len=64, in_dim=4, dim=WIDTH, ffn_dim=4 * WIDTH, freq_dim=64,
                    text_dim=40, out_dim=4, num_heads=8, num_layers=BLOCKS, **PLACE)


MODEL = Family(_build, lambda model, options: model(
    random(1, 4, 5, 48, 48), torch.tensor([500.]), random(1, 64, 40, seed=2), transformer_options=options))


def main() -> None:
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    rank, port = map(int, sys.argv[1:])
    world = int(os.environ["TOKEN_RANKS"])
    group = Group(rank, world, f"127.0.0.1:{port}")
    model, seconds, error = MODEL.model(), [], 0.0
    flow: Any = family(model)
    with torch.inference_mode():
        alone = MODEL.call(model, {}) if world > 1 else None
        for _ in range(4):
            tokens = TokenParallel(group)
            group.gather(torch.zeros(1, 1), 0, [1] * world)  # nobody starts before the others
            started = time.perf_counter()
            with flow(model, tokens), attention.sharing(tokens):
                made = MODEL.call(model, {"optimized_attention_override": tokens.attention})
            seconds.append(time.perf_counter() - started)
            if alone is not None:
                error = ((made - alone).abs().max() / alone.abs().max()).item()
    print(json.dumps({"seconds": statistics.median(seconds[1:]), "error": error}))
