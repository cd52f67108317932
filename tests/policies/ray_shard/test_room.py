"""The most memory that a worker's device has in use within a step, on simulated devices, where weights are shared out."""
from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

pytest.importorskip("ray")

from residency.policies.ray_shard.worker.weights.streams import Stage
from support.fixtures import build_simulated_npu, no_simulated_npu
from support.ranks import ranks_of

PAGES = 0.02  # of a share: tensors begin at round addresses
HIDDEN = (64 * 64 // 4 + 9) * 256 * 4  # bytes of what goes from block to block


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, dict[str, Any]]]:
    """What each of two processes found."""
    if reason := no_simulated_npu():
        pytest.skip(reason)
    build_simulated_npu()
    return ranks_of("peak_ranks", 2, 2)


@pytest.mark.parametrize(("mode", "blocks", "states"), [
    pytest.param("blocks", 2, 0, id="blocks: that of another, and the next one"),
    pytest.param("pipeline", 0, 1, id="pipeline: what was handed over"),
])
def test_a_step_takes_a_share_and_what_any_step_takes(ranks: list[dict[str, dict[str, Any]]], mode: str, blocks: int,
                                                      states: int) -> None:
    """And so much more, however many blocks there are: neither the whole model is there, nor what goes between all blocks."""
    for found in ranks:
        whole, shared = found["whole"], found[mode]
        activations = whole["most"] - whole["share"]
        more = sum(shared["foreign"][-blocks:] if blocks else []) + states * HIDDEN
        assert shared["most"] <= (1 + PAGES) * shared["share"] + activations + more
        assert shared["share"] + sum(shared["foreign"]) == whole["share"]
        assert whole["most"] > 1.2 * shared["most"]


def test_a_pipeline_keeps_nothing_of_what_blocks_were_given_and_made() -> None:
    """Another tensor, which may have the same id, is not taken for one that is gone; one that is there is known."""
    stage = Stage([0, 0, 1], None)
    given, kept = torch.zeros(1), torch.zeros(1)
    gone = weakref.ref(given)
    assert stage.enter(0, {"x": given, "text": kept}) == []
    del given
    assert gone() is None
    stage.leave(torch.zeros(1))
    for _ in range(100):  # one of them lies where the first did
        assert stage.enter(1, {"x": torch.zeros(1), "text": kept}) == []
    stage.leave(made := torch.zeros(1))
    assert stage.enter(2, {"x": made, "new": torch.zeros(1), "text": kept}) == [("x", None), ("new", None)]
