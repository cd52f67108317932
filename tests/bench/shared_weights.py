"""Weights that processes have together: what that costs in seconds, what each of them holds, and what it sends."""
from __future__ import annotations

import os
from typing import Any

from support.ranks import ranks_of
from table import show


def run() -> None:
    """Prints the tables."""
    for world in (2, 3):
        os.environ["RANKS"] = str(world)
        ranks = ranks_of("weight_scaling", world, 1)
        alone = max(rank["alone"]["seconds"] for rank in ranks)
        show(f"A prediction of two rows by {world} processes of one thread, {os.cpu_count()} cores, gloo, "
             f"{ranks[0]['alone']['here'] / 1e6:.0f} MB of float32 weights: each computes all, or its part of the blocks",
             ("weights", "seconds", "of each alone", "held by each, of the model", "sent by each, MB", "largest difference"),
             [_row(mode, [rank[mode] for rank in ranks], alone, ranks[0]["alone"]["here"]) for mode in ranks[0]])


def _row(mode: str, ranks: list[dict[str, Any]], alone: float, size: int) -> tuple[Any, ...]:
    seconds = max(rank["seconds"] for rank in ranks)
    held, sent = (max(rank[name] for rank in ranks) for name in ("here", "sent"))
    return mode, seconds, seconds / alone, held / size, sent / 1e6, f"{max(rank.get('error', 0.0) for rank in ranks):.1e}"
