"""Sharing the weights out changes nothing but where they lie: ComfyUI's models in three processes, in several formats."""
from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("ray")

from residency.policies.ray_shard.worker.tokens import Unsuited
from residency.policies.ray_shard.worker.weights.units import by_turns, in_a_row, long_lists, units_of, weight_of
from support import deep
from support.ranks import ranks_of
from support.weight_ranks import CASES

SILENT = {name for name, case in CASES.items() if case.silent}
UNSUITED = {name for name, case in CASES.items() if (case.mode, case.model) == ("pipeline", "unet")}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, dict[str, Any]]]:
    """What three processes found, each started once for all cases."""
    return ranks_of("weight_ranks", 3, len(CASES), seconds=400)


def found(ranks: list[dict[str, dict[str, Any]]], name: str) -> list[dict[str, Any]]:
    """What each rank of a case found."""
    return [of_rank[name] for of_rank in ranks if name in of_rank]


@pytest.mark.parametrize("name", sorted(set(CASES) - SILENT - UNSUITED))
def test_ranks_compute_what_one_alone_does(ranks: list[dict[str, dict[str, Any]]], name: str) -> None:
    """To the last bit, but for the sums of rows and tokens that are computed apart; with a LoRA, and without it again."""
    case = CASES[name]
    of_ranks = found(ranks, name)
    assert len(of_ranks) == case.world
    for turn in ("plain", "lora"):
        errors = [of_rank[turn]["error"] for of_rank in of_ranks]
        assert max(errors[-1:] if case.mode == "pipeline" else errors) <= case.tolerance
        assert all((of_rank[turn]["shared"] > 0) == bool(case.way) for of_rank in of_ranks)
    assert of_ranks[0]["differs"] > 1e-3


@pytest.mark.parametrize("name", sorted(SILENT))
def test_a_rank_whose_bytes_are_lost_is_found_out(ranks: list[dict[str, dict[str, Any]]], name: str) -> None:
    """The control."""
    assert max(of_rank["plain"]["error"] for of_rank in found(ranks, name)) > 1e-3


@pytest.mark.parametrize("name", sorted(UNSUITED))
def test_what_cannot_be_shared_so_is_said_alike_by_all(ranks: list[dict[str, dict[str, Any]]], name: str) -> None:
    """So that all go another way."""
    said = {of_rank["unsuited"] for of_rank in found(ranks, name)}
    assert len(said) == 1
    assert "what goes from block to block is not clear" in said.pop()


def test_rows_in_a_pipeline_are_sent_apart(ranks: list[dict[str, dict[str, Any]]]) -> None:
    """No more bytes than together; and other ranks than the last have no answer."""
    alone, two, three = (found(ranks, f"pipeline, {name}") for name in ("flux, 2 ranks", "two rows", "three rows"))
    sent = [of_ranks[0]["plain"]["sent"] - of_ranks[0]["plain"]["sent"] % 1000 for of_ranks in (alone, two, three)]
    assert sent == [29000, 58000, 87000]
    assert alone[0]["plain"]["error"] > 0.1


@pytest.mark.parametrize("name", sorted(set(CASES) - UNSUITED))
def test_all_goes_back_to_where_it_was(ranks: list[dict[str, dict[str, Any]]], name: str) -> None:
    """The file's mapping, in which nothing was copied."""
    assert all(of_rank["back"] for of_rank in found(ranks, name))


def test_each_has_its_share_of_the_blocks(ranks: list[dict[str, dict[str, Any]]]) -> None:
    """By the weights that the user gave; what is in no block, everybody has."""
    more, less = (of_rank["plain"]["here"] for of_rank in found(ranks, "blocks, flux, unequal shares"))
    shared = more + less - 1  # the part that both have
    assert 0.6 < (more - shared) / (1 - shared) < 0.8


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.model == "flux in GGUF"])
def test_a_lora_on_gguf_costs_no_weights(ranks: list[dict[str, dict[str, Any]]], name: str) -> None:
    """The blocks lie here, and travel, as they are in the file; whoever computes them adds the LoRA."""
    for of_rank in found(ranks, name):
        plain, lora = of_rank["plain"], of_rank["lora"]
        assert lora["here"] == plain["here"]
        assert lora["sent"] <= 1.01 * plain["sent"]


class TestUnits:
    @pytest.mark.parametrize(("name", "count"), [("flux", 9), ("wan", 7)])
    def test_blocks_are_the_modules_of_the_lists(self, name: str, count: int) -> None:
        """They hold most of the weight, in order."""
        model = deep.PATCHERS[name]().model.diffusion_model
        units = units_of(model)
        assert len(units) == count
        assert sum(unit.bytes for unit in units) > 0.5 * weight_of(model)

    def test_a_chain_whose_members_are_called_is_opened(self) -> None:
        """A U-Net's blocks are never called as such."""
        names = [unit.name for unit in units_of(deep.PATCHERS["unet"]().model.diffusion_model)]
        assert "input_blocks.1.0" in names
        assert "input_blocks.1" not in names

    def test_short_lists_are_left_to_everybody(self) -> None:
        """By their weight; lists within lists count for the outer one."""
        from torch.nn import Linear, Module, ModuleList

        model = Module()
        model.refiner = ModuleList([Linear(8, 8), Linear(8, 8)])
        model.experts = ModuleList(Module() for _ in range(20))
        for block in model.experts:
            block.each = ModuleList([Linear(16, 16), Linear(16, 16)])
        model.layers = ModuleList(Linear(64, 64) for _ in range(4))
        assert {unit.name.partition(".")[0] for unit in units_of(model)} == {"refiner", "experts", "layers"}
        assert len(long_lists(units_of(model))) == 44

    def test_a_model_without_lists_says_so(self) -> None:
        """It cannot be shared out."""
        import torch

        with pytest.raises(Unsuited, match="Linear has no lists of blocks"):
            units_of(torch.nn.Linear(4, 4))

    def test_owners_by_turns_and_in_a_row(self) -> None:
        """Large blocks count for more."""
        assert by_turns([1] * 6, [1, 1, 1]) == [0, 1, 2, 0, 1, 2]
        assert by_turns([4, 1, 1, 1, 1], [1, 1]) == [0, 1, 1, 1, 1]
        assert in_a_row([1] * 6, [1, 1, 1]) == [0, 0, 1, 1, 2, 2]
        assert in_a_row([1] * 4, [3, 1]) == [0, 0, 0, 1]
        assert in_a_row([9, 1, 1, 1], [1, 1]) == [0, 1, 1, 1]
