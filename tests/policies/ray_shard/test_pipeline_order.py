"""A pipeline wants blocks to be computed in the order in which a model defines them; where they are not, all ranks say so."""
from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("ray")

from support.order_ranks import CASES, TURNS, WORLD
from support.ranks import ranks_of

IN_ORDER = {"wan", "lumina 2", "z-image", "chroma"}
PIPELINE = [turn for turn, mode in enumerate(TURNS) if mode == "pipeline"]
BLOCKS = TURNS.index("blocks")


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, dict[str, Any]]]:
    """What two processes found, each started once for all models."""
    return ranks_of("order_ranks", WORLD, len(CASES))


@pytest.mark.parametrize("name", sorted(IN_ORDER))
def test_blocks_in_their_order_are_a_pipeline(ranks: list[dict[str, dict[str, Any]]], name: str) -> None:
    """The last rank has the answer, bit for bit. Short lists in another order (refiners, a small network) all ranks compute."""
    assert [ranks[-1][name]["turns"][turn] for turn in PIPELINE] == [0.0] * len(PIPELINE)
    assert ranks[-1][name]["spread"] > 0.1


@pytest.mark.parametrize(("name", "reason"), [
    pytest.param("z-image with references", "block 2 is computed as number 0", id="two refiners are too much to have twice"),
    pytest.param("vace", "block 4 is computed as number 1", id="blocks of hints take turns with others"),
])
def test_another_order_is_said_alike_by_all(ranks: list[dict[str, dict[str, Any]]], name: str, reason: str) -> None:
    """Each time; nobody waits for what does not come."""
    for of_rank in ranks:
        assert [of_rank[name]["turns"][turn] for turn in PIPELINE] == [reason] * len(PIPELINE)


@pytest.mark.parametrize("name", sorted(CASES))
def test_afterwards_the_same_group_shares_in_another_way(ranks: list[dict[str, dict[str, Any]]], name: str) -> None:
    """Nothing of the pipeline is under way: blocks are passed around, in whatever order they are computed."""
    assert [of_rank[name]["turns"][BLOCKS] for of_rank in ranks] == [0.0] * WORLD


@pytest.mark.parametrize("name", sorted(CASES))
def test_all_goes_back_to_where_it_was(ranks: list[dict[str, dict[str, Any]]], name: str) -> None:
    """Also what a pipeline had placed that was refused."""
    assert [(of_rank[name]["back"], of_rank[name]["left"]) for of_rank in ranks] == [(True, 0)] * WORLD
