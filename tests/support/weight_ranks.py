"""A rank of a group, in a process of its own, whose arguments are its rank and a port for each case, in their order.

Predicts alone and with the weights shared out among the ranks, and prints JSON: by case, the largest error relative to the
largest number of the model alone, the bytes of its weights that are here, copies beside them included, what was sent, and
attentions that were shared.
"""
from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from residency.hooks.remote import RemoteModel
from residency.policies.ray_shard.parcels import pack
from residency.policies.ray_shard.worker import attention, models
from residency.policies.ray_shard.worker.group import Group
from residency.policies.ray_shard.worker.pace import Pace
from residency.policies.ray_shard.worker.sharing import sharing
from residency.policies.ray_shard.worker.tokens import Unsuited
from residency.policies.ray_shard.worker.weights import MODES
from residency.policies.ray_shard.worker.weights.units import weight_of

from support import deep


@dataclass(frozen=True)
class Case:
    mode: str
    model: str
    world: int
    shares: tuple[float, ...] = ()
    rows: int = 1
    way: str = ""  # in which attention is shared
    tolerance: float = 0.0
    silent: tuple[str, ...] = ()  # what a rank sends as nothing but zeros: the control


def cases(mode: str, *formats: str) -> dict[str, Case]:
    """Of each format in two ranks; of the first also in three, in unequal ones, and with two rows."""
    found = {f"{mode}, {name}, 2 ranks": Case(mode, name, 2) for name in formats}
    return {**found, f"{mode}, {formats[0]}, 3 ranks": Case(mode, formats[0], 3),
            f"{mode}, {formats[0]}, unequal shares": Case(mode, formats[0], 2, (0.7, 0.3)),
            f"{mode}, two rows": Case(mode, "flux", 2, rows=2, tolerance=2e-6 if mode == "pipeline" else 0.0)}


CASES = {
    **cases("blocks", "flux", "flux in fp8", "flux in GGUF", "unet"),
    **cases("fsdp2", "flux", "flux in fp8", "flux in GGUF", "unet"),
    **cases("pipeline", "flux", "flux in fp8", "flux in GGUF", "wan"),
    "pipeline, two rows of video": Case("pipeline", "wan", 3, rows=2, tolerance=2e-6),
    "pipeline, three rows": Case("pipeline", "flux", 2, rows=3, tolerance=2e-6),
    "pipeline, a model whose blocks take more than the last one makes": Case("pipeline", "unet", 2),
    "pipeline, a rank that sends nothing": Case("pipeline", "wan", 2, silent=("send",)),
    "fsdp2, heads shared": Case("fsdp2", "wan", 2, way="heads"),
    "fsdp2, tokens of a text and an image shared": Case("fsdp2", "flux", 2, (0.7, 0.3), way="tokens", tolerance=2e-6),
    "fsdp2, a rank that sends nothing": Case("fsdp2", "flux", 2, silent=("gather",)),
    "blocks, heads shared": Case("blocks", "wan", 2, way="heads"),
    "blocks, tokens shared, 2 ranks": Case("blocks", "wan", 2, (0.7, 0.3), way="tokens", tolerance=2e-6),
    "blocks, tokens shared, 3 ranks": Case("blocks", "wan", 3, (0.5, 0.2, 0.3), way="tokens", tolerance=2e-6),
    "blocks, tokens of a text and an image shared": Case("blocks", "flux", 2, (0.7, 0.3), way="tokens", tolerance=2e-6),
    "blocks, a rank that sends nothing": Case("blocks", "flux", 2, silent=("broadcast",)),
    "blocks, tokens shared, a rank that sends no blocks": Case("blocks", "wan", 2, way="tokens", silent=("broadcast",)),
    "blocks, tokens shared, a rank that sends no tokens": Case("blocks", "wan", 2, way="tokens", silent=("all_to_all",)),
}


# By model and rows: what one computes alone, plain and with a LoRA.
known: dict[tuple[str, int], dict[str, torch.Tensor]] = {}


class Silent(Group):
    """What it sends so is lost: the blocks of rank 1, what goes from block to block, the tokens that attention exchanges."""

    silent: tuple[str, ...] = ()

    def begin(self, how: str, data: torch.Tensor, rank: int) -> Any:
        lost = how in self.silent and (how == "send" or (how == "broadcast" and rank == self.rank == 1 and len(data) > 4096))
        return super().begin(how, torch.zeros_like(data) if lost else data, rank)

    def begin_gather(self, whole: torch.Tensor, part: torch.Tensor) -> Any:
        return super().begin_gather(whole, torch.zeros_like(part) if "gather" in self.silent and self.rank == 1 else part)

    def all_to_all(self, parts: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]]) -> Any:
        lost = "all_to_all" in self.silent and self.rank == 1
        return super().all_to_all([torch.zeros_like(part) for part in parts] if lost else parts, shapes)


def error(made: torch.Tensor, alone: torch.Tensor) -> float:
    return float((made - alone).abs().max() / alone.abs().max())


def beside(model: torch.nn.Module) -> int:
    """Bytes of the tensors that layers keep as attributes, beside their weights."""
    return sum(value.nbytes for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor))


def predict(model: models.Model, case: Case, group: Group, owned: Any, shares: Sequence[float]) -> tuple[torch.Tensor, int]:
    """(the prediction, attentions that were shared)."""
    arguments = deep.arguments(case.model, case.rows)
    if not case.way:
        return model.predict(arguments, owned), 0
    with sharing(case.way, model.diffusion_model, arguments, group, shares, Pace(group, 1)) as parallel, \
            attention.sharing(parallel):
        return model.predict(arguments, owned), parallel.shared


def compare(case: Case, rank: int, port: int, built: Any, parcels: dict[str, Any], alone: dict[str, torch.Tensor]) -> Any:
    model = models.Model(built, deep.CPU, deep.CPU)
    whole, lying = weight_of(built), {name: value.data_ptr() for name, value in built.named_parameters()}
    shares = case.shares or (1.0,) * case.world
    group = Silent(rank, case.world, f"127.0.0.1:{port}")
    group.silent = case.silent
    owned = MODES[case.mode](group, shares)
    found = {}
    try:
        for turn in ("plain", "plain", "lora", "plain"):
            model.patch(turn, parcels[turn])
            sent = group.sent
            made, shared = predict(model, case, group, owned, shares)
            here = owned.bytes_here() + beside(built)
            found[turn] = {"error": error(made, alone[turn]), "here": here / whole, "sent": group.sent - sent, "shared": shared}
    finally:
        model.release()
    assert comfy.model_management.current_loaded_models == []
    found["back"] = {name: value.data_ptr() for name, value in built.named_parameters()} == lying
    found["differs"] = error(alone["lora"], alone["plain"])
    group.close()
    return found


def alone_of(built: Any, case: Case, parcels: dict[str, Any]) -> dict[str, torch.Tensor]:
    if (case.model, case.rows) not in known:
        model, found = models.Model(built, deep.CPU, deep.CPU), {}
        for turn, parcel in parcels.items():
            model.patch(turn, parcel)
            found[turn] = model.predict(deep.arguments(case.model, case.rows))
        model.release()
        known[case.model, case.rows] = found
    return known[case.model, case.rows]


def main() -> None:
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    attention.install()
    rank, *ports = map(int, sys.argv[1:])
    results = {}
    with torch.inference_mode():
        for (name, case), port in zip(CASES.items(), ports, strict=True):
            if rank < case.world:
                patcher = deep.PATCHERS[case.model]()
                remotes = {"plain": RemoteModel(patcher), "lora": RemoteModel(deep.lora(patcher))}
                parcels = {turn: pack(remote.patches(), known=remote.known()) for turn, remote in remotes.items()}
                alone = alone_of(patcher.model, case, parcels)
                try:
                    results[name] = compare(case, rank, port, patcher.model, parcels, alone)
                except Unsuited as unsuited:
                    results[name] = {"unsuited": str(unsuited)}
    print(json.dumps(results))
