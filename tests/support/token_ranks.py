"""A rank of a group, in a process of its own, whose arguments are its rank and a port for each way to share, in their order.

Computes every case of `support.flows` alone and with its tokens shared out, and prints JSON: by way and case, the largest error
relative to the largest number of the model alone, attentions in which tokens were exchanged, and what was sent.
"""
from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from residency.policies.ray_shard.worker import attention
from residency.policies.ray_shard.worker.families import family
from residency.policies.ray_shard.worker.group import Group
from residency.policies.ray_shard.worker.pace import Pace
from residency.policies.ray_shard.worker.tokens import TokenParallel

from support.flows import CASES

# By name: how many ranks, their shares, and in how many lots an attention's heads are exchanged.
WAYS: dict[str, tuple[int, list[float], int]] = {
    "two": (2, [1, 1], 1),
    "three": (3, [1, 1, 1], 1),
    "four": (4, [1, 1, 1, 1], 1),
    "two, unequal": (2, [0.7, 0.3], 1),
    "three, in lots": (3, [1, 1, 1], 2),
}
LONELY = "ranks that see their own tokens only"


class Lonely(TokenParallel):
    """Attention does not leave the rank: the result must be wrong."""

    def attention(self, func: Any, q: Any, k: Any, v: Any, heads: int, mask: Any = None, **kwargs: Any) -> torch.Tensor:
        self.shared += self.spread is not None
        return func(q, k, v, heads, mask=mask if self.spread is None else None, **kwargs)


def compare(group: Group, make: Callable[[], TokenParallel], models: dict[str, torch.nn.Module],
            alone: dict[str, torch.Tensor]) -> dict[str, Any]:
    """By case. All ranks have the result, and so find the same error."""
    results = {}
    for name, case in CASES.items():
        model, tokens = models[name], make()
        flow = family(model)
        assert flow is not None, f"{type(model)} has no family"
        before = group.collectives, group.sent
        with flow(model, tokens), attention.sharing(tokens):
            made = case.call(model, {"optimized_attention_override": tokens.attention})
        assert not any("forward" in vars(module) for module in model.modules())
        results[name] = {"error": ((made - alone[name]).abs().max() / alone[name].abs().max()).item(), "shared": tokens.shared,
                         "collectives": group.collectives - before[0], "sent": group.sent - before[1]}
    return results


def main() -> None:
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    rank, *ports = map(int, sys.argv[1:])
    attention.install()
    results = {}
    with torch.inference_mode():
        models = {name: case.model() for name, case in CASES.items()}
        alone = {name: case.call(models[name], {}) for name, case in CASES.items()}
        for (way, (world, shares, lots)), port in zip({**WAYS, LONELY: WAYS["two"]}.items(), ports, strict=True):
            if rank < world:
                group = Group(rank, world, f"127.0.0.1:{port}")
                kind = Lonely if way == LONELY else TokenParallel
                results[way] = compare(group, partial(kind, group, shares, Pace(group, lots)), models, alone)
                group.close()
    print(json.dumps(results))
