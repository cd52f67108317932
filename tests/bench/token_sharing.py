"""Tokens of a step shared among workers: what it gains here, what is exchanged, and what that would take on cards: a model."""
from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from support import workflows
from support.flows import CASES
from support.ranks import ranks_of
from support.token_ranks import WAYS
from table import ratio, show

SETTINGS = """
policies = ["ray_shard", "hybrid_split", "preload_cache", "zero_copy"]
[ray_shard]
workers = 2
verify = "off"
tokens = {tokens}
"""
PAIRS = 5
# Of published models, as ComfyUI's configurations have them: tokens of a step, width, attentions over all tokens.
REAL = {"Flux, 1024 x 1024": (4096 + 512, 3072, 57), "Qwen-Image, 1328 x 1328": (6889 + 256, 3072, 60),
        "Wan 14B, 81 frames of 832 x 480": (32760, 5120, 40), "LTX-Video 2B, 97 frames of 768 x 512": (4992, 2048, 28)}
# Bytes a second that a card sends, as their makers publish it, one way; and seconds until a collective has begun.
LINKS = {"PCIe 4.0 x16": 25e9, "NVLink of an A100": 300e9}
LATENCY = 20e-6


def run(pair: Callable[..., dict[str, Any]]) -> None:
    """Prints the tables."""
    rows = [_speed(pair, title, tokens) for title, tokens in (("tokens", "true"), ("heads", "false"))]
    show("One row, 10 steps at 512 x 512 (1101 tokens), 148 MB float32 model: two workers on two cores, one thread each",
         ("shared", "alone, s", "plugin, s", "ratio", "upper 95 %", "largest difference", "another seed"), rows)
    show("A prediction of 2880 tokens by processes of one thread on " f"{os.cpu_count()} cores, gloo",
         ("processes", "seconds", "ratio", "largest difference"), _scaling())
    show("Exchanged per prediction, counted on tiny models in float32", ("", "attentions", *(
        f"{head}, {way}" for way in ("two", "three", "four") for head in ("collectives", "sent by all, KB"))), _counted())
    show("A MODEL, not a measurement: 16-bit numbers, milliseconds of exchange per step, nothing hidden behind arithmetic",
         ("", "cards", "sent by each, MB", *LINKS), _modelled())


def _speed(pair: Callable[..., dict[str, Any]], title: str, tokens: str) -> tuple[Any, ...]:
    seconds: dict[str, list[float]] = {"alone": [], "plugin": []}
    with ExitStack() as stack:
        servers = pair(stack, None, SETTINGS.format(tokens=tokens), threads=1)
        for prompt in range(PAIRS + 1):
            flow = workflows.text_to_latent("middle_fp32", steps=10, seed=prompt, size=512)
            flow["sample"]["inputs"]["cfg"] = 1.0
            for name in seconds if prompt % 2 else reversed(seconds):
                took = servers[name].run(flow)
                if prompt:
                    seconds[name].append(took)
        alone, plugin = (servers[name].latents() for name in seconds)
        assert set(servers["plugin"].events("shard.finished")[-1]["calls"]) == {title}
        flow["sample"]["inputs"]["seed"] = PAIRS + 1
        servers["alone"].run(flow)
        largest = alone.abs().max()
        return (title, *map(statistics.median, seconds.values()), *ratio(seconds["plugin"], seconds["alone"]),
                f"{float((alone - plugin).abs().max() / largest):.1e}",
                f"{float((servers['alone'].latents() - plugin).abs().max() / largest):.1e}")


def _scaling() -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    for count in (1, 2, 4):
        os.environ["TOKEN_RANKS"] = str(count)
        found = ranks_of("token_scaling", count, 1)
        seconds = max(rank["seconds"] for rank in found)
        error = max(rank["error"] for rank in found)
        rows.append((count, seconds, seconds / (rows[0][1] if rows else seconds), f"{error:.1e}"))
    return rows


def _counted() -> list[tuple[Any, ...]]:
    found = ranks_of("token_ranks", 4, len(WAYS) + 1)
    rows = []
    for name in CASES:
        numbers: list[Any] = [found[0]["two"][name]["shared"]]
        for way in ("two", "three", "four"):
            numbers += [found[0][way][name]["collectives"], sum(rank[way][name]["sent"] for rank in found if way in rank) / 1e3]
        rows.append((name, *numbers))
    return rows


def _modelled() -> list[tuple[Any, ...]]:
    """What a rank sends: of its part of the tokens, queries, keys, values and results, to all others."""
    rows = []
    for name, (tokens, width, attentions) in REAL.items():
        for cards in (2, 4):
            sent = attentions * 4 * tokens * width * torch.bfloat16.itemsize * (cards - 1) / cards**2
            rows.append((name, cards, sent / 1e6, *(
                (sent / speed + 2 * attentions * LATENCY) * 1e3 for speed in LINKS.values())))
    return rows
