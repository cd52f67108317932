"""Where the weights of a model are to lie, by what was measured; and the ways to share a batch that follow."""
from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("ray")

from residency.policies.ray_shard.rows import Share
from residency.policies.ray_shard.settings import Settings
from residency.policies.ray_shard.ways import in_order
from residency.policies.ray_shard.weights import Weights, choose

GB = 10**9


def found(count: int = 2, **more: Any) -> list[dict[str, Any]]:
    """What workers measured of a model of 20 GB."""
    return [{"bytes": 20 * GB, "room": 16 * GB, "link": 10e9, "file": 10e9, "blocks": True, "width": 4096, **more}] * count


@pytest.mark.parametrize(("measured", "shape", "mode"), [
    pytest.param(found(room=24 * GB), (1, 16, 128, 128), "replicate", id="it fits"),
    pytest.param(found(link=100e9), (1, 16, 128, 128), "blocks", id="a fast link"),
    pytest.param(found(link=1e9), (1, 16, 128, 128), "stream", id="a slow link"),
    pytest.param(found(link=1e9), (2, 16, 64, 64), "pipeline, stream", id="a slow link, two rows"),
    pytest.param(found(link=100e9), (2, 16, 64, 64), "pipeline, blocks", id="a fast link, two rows"),
    pytest.param(found(link=1e9), (2, 16, 33, 720, 1280), "stream", id="a slow link, two rows of very many tokens"),
    pytest.param(found(link=100e9, blocks=False), (1, 16, 128, 128), "stream", id="no blocks"),
    pytest.param(found(link=100e9, room=8 * GB), (1, 16, 128, 128), "stream", id="not even a share fits"),
    pytest.param([*found(1, room=24 * GB), *found(1, link=100e9)], (1, 4, 8, 8), "stream", id="one of them is small"),
])
def test_the_mode_that_moves_least(measured: list[dict[str, Any]], shape: tuple[int, ...], mode: str) -> None:
    """And what is next best; a reason is said; the slowest link counts, and the fullest device."""
    chosen, why = choose(measured, shape)
    assert ", ".join(chosen) == mode
    assert why


def shares(count: int) -> list[Share]:
    return [Share(place, (place,), (0,)) for place in range(count)]


@pytest.mark.parametrize(("modes", "apart", "together", "ways"), [
    ([], 2, ("tokens", "heads"), ["rows", "tokens", "heads"]),
    ([], 1, ("tokens", "heads"), ["tokens", "heads", "rows"]),
    ([], 1, (), ["rows"]),
    (["blocks"], 2, ("tokens",), ["rows, blocks", "tokens, blocks", "alike, blocks", "rows"]),
    (["blocks"], 1, ("tokens", "heads"), ["tokens, blocks", "heads, blocks", "alike, blocks", "rows"]),
    (["blocks"], 1, (), ["alike, blocks", "rows"]),
    (["pipeline"], 2, ("tokens", "heads"), ["pipeline", "rows"]),
    (["pipeline", "blocks"], 1, ("heads",), ["pipeline", "heads, blocks", "alike, blocks", "rows"]),
    (["fsdp2", "blocks"], 1, (), ["alike, fsdp2", "alike, blocks", "rows"]),
])
def test_the_ways_in_their_order(modes: list[str], apart: int, together: tuple[str, ...], ways: list[str]) -> None:
    """Weights that are shared out need all workers for each prediction; the last way is that each has all of them."""
    found = list(in_order(modes, shares(apart), shares(2), together))
    assert [way.label for way in found] == ways
    assert all(len(way.shares) == 2 for way in found if way.weights)


@pytest.mark.parametrize(("setting", "count", "modes"), [
    ("replicate", 2, ()), ("stream", 2, ()), ("blocks", 2, ("blocks",)), ("pipeline", 2, ("pipeline", "blocks")),
    ("fsdp2", 3, ("fsdp2", "blocks")), ("blocks", 1, ()),
])
def test_what_a_setting_names_has_a_next_best(setting: str, count: int, modes: tuple[str, ...]) -> None:
    """A pipeline is not for every model, and FSDP2 not for every torch; blocks are. One worker shares with nobody."""
    workers: Any = [None] * count
    unused: Any = None
    assert Weights(Settings(weights=setting), unused).of(unused, (1,), workers) == modes
