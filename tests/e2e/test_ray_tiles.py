"""Tiles of a VAE by two workers, under a real ComfyUI on the CPU: the same latents as without, bit for bit."""
from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e.conftest import troubles, wait_for
from e2e.test_ray import pair, settings
from support.server import VAE_NODES, PromptFailed, Server
from support.workflows import Workflow, node, tiled_vae

pytestmark = pytest.mark.ray

PREFIXES = ("out", "out_again")
TAESD, WAN = tiled_vae("taesd_fp32"), tiled_vae("wan", width=96, height=96, frames=9)


def changed(flow: Workflow, kind: str, amount: float = 1.0) -> Workflow:
    """The same with a node of a pack between the VAE's loader and all that use it."""
    flow = copy.deepcopy(flow)
    for one in flow.values():
        if one["inputs"].get("vae"):
            one["inputs"]["vae"] = ["change", 0]
    return {**flow, "change": node(kind, vae=["vae", 0], amount=amount)}


class Pair:
    """ComfyUI alone, and the same with two workers."""

    def __init__(self, alone: Server, plugin: Server) -> None:
        self.alone, self.plugin = alone, plugin

    def both(self, flow: Workflow) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(alone, with workers) of what was encoded, and of what was decoded and encoded again."""
        self.alone.run(flow)
        self.plugin.run(flow)
        found = [(self.alone.latents(prefix), self.plugin.latents(prefix)) for prefix in PREFIXES]
        assert all(torch.isfinite(one).all() and one.std() > 0 for pair in found for one in pair)
        return found

    def same(self, flow: Workflow) -> bool:
        return all(torch.equal(*pair) for pair in self.both(flow))

    def calls(self) -> dict[str, int]:
        """Who computed the last prompt's tiles."""
        found: dict[str, int] = self.plugin.events("shard.finished")[-1]["calls"]
        return found


def servers(models: Path, factory: pytest.TempPathFactory, verify: str) -> Any:
    return pair(models, factory, settings(2, verify=verify, heads=False), packs=[VAE_NODES])


@pytest.fixture(scope="module")
def tiles_pair(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with servers(models, tmp_path_factory, "off") as both:
        yield Pair(*both)
        assert troubles(both[1]) == []
        assert both[1].events("worker.lost") == []


@pytest.mark.parametrize("flow", [
    pytest.param(TAESD, id="TAESD"), pytest.param(tiled_vae("taesd"), id="TAESD, an fp16 file"),
    pytest.param(tiled_vae("taesd_fp32", frames=2, seed=2), id="TAESD, two images"),
    pytest.param(tiled_vae("taesd_fp32", width=203, height=131, seed=3), id="TAESD, odd edges"),
    pytest.param(WAN, id="Wan video"),
])
def test_latents_are_those_of_comfyui_alone(tiles_pair: Pair, flow: Workflow) -> None:
    """And the workers computed every tile."""
    assert tiles_pair.same(flow)
    calls = tiles_pair.calls()
    assert set(calls) == {"tiles"}
    assert calls["tiles"] > 10


def test_another_vae_is_seen(tiles_pair: Pair) -> None:
    """The control: latents differ where the files do, and where the seeds do."""
    tiles_pair.plugin.run(tiled_vae("taesd_other"))
    other = tiles_pair.plugin.latents("out"), tiles_pair.plugin.latents("out_again")
    tiles_pair.alone.run(TAESD)
    for prefix, latents in zip(PREFIXES, other, strict=True):
        expected = tiles_pair.alone.latents(prefix)
        assert (latents - expected).abs().max() > 0.01 * expected.abs().max()


def test_weights_travel_as_a_place_in_their_file(tiles_pair: Pair) -> None:
    """Once to each worker, and so do the VAE's attributes. Here the plugin maps what is as the host computes with it."""
    assert tiles_pair.same(tiled_vae("taesd_fp32", seed=10))
    seen = {name: len(tiles_pair.plugin.events(name)) for name in ("shard.loaded", "shard.patched")}
    mapped = [event for event in tiles_pair.plugin.events("shard.loaded") if event["mapped_bytes"]]
    assert all(event["mapped_bytes"] > 100 * event["copied_bytes"] for event in mapped)
    assert sum(event["workers"] for event in mapped) >= 2
    assert tiles_pair.same(tiled_vae("taesd_fp32", seed=11))
    assert {name: len(tiles_pair.plugin.events(name)) for name in seen} == seen


def test_a_packs_copy_of_a_vae_is_its_own(tiles_pair: Pair) -> None:
    """Over the same model, with another function; and the first one is itself again afterwards."""
    assert tiles_pair.same(changed(tiled_vae("taesd_fp32", seed=4), "ScaleInput", 0.5))
    scaled = tiles_pair.plugin.latents()
    assert tiles_pair.same(tiled_vae("taesd_fp32", seed=4))
    assert not torch.equal(tiles_pair.plugin.latents(), scaled)
    assert set(tiles_pair.calls()) == {"tiles"}


def test_what_cannot_travel_is_computed_here(tiles_pair: Pair) -> None:
    """With the same latents, and the reason said once."""
    seen = len(tiles_pair.plugin.events("shard.demoted"))
    finished = len(tiles_pair.plugin.events("shard.finished"))
    assert tiles_pair.same(changed(tiled_vae("taesd_other", seed=5), "Locked"))
    assert len(tiles_pair.plugin.events("shard.finished")) == finished
    told = tiles_pair.plugin.events("shard.demoted")[seen:]
    assert [(event["way"], "cannot be sent" in event["reason"]) for event in told] == [("tiles", True)]


def test_the_answers_are_the_workers(tiles_pair: Pair) -> None:
    """The control: the host's weights are written to, here as in ComfyUI alone, and the workers' are not."""
    fresh = tiled_vae("taesd", seed=6)
    assert tiles_pair.same(fresh)
    assert not tiles_pair.same(changed(fresh, "WriteWeights", 0.9))
    assert tiles_pair.calls()["tiles"] > 10


def test_cancel_ends_the_prompt_soon(tiles_pair: Pair) -> None:
    """And the next prompt has its workers again."""
    patched = len(tiles_pair.plugin.events("shard.patched"))
    prompt = tiles_pair.plugin.queue(changed(tiled_vae("taesd_fp32", seed=7), "SlowInput", 1.0))
    wait_for(lambda: len(tiles_pair.plugin.events("shard.patched")) > patched, 60)
    time.sleep(1.5)
    tiles_pair.plugin.interrupt()
    asked = time.monotonic()
    with pytest.raises(PromptFailed, match="interrupted"):
        tiles_pair.plugin.finish(prompt)
    assert time.monotonic() - asked < 0.5
    assert tiles_pair.same(tiled_vae("taesd_fp32", seed=9))
    assert set(tiles_pair.calls()) == {"tiles"}


def test_vaes_that_differ_are_refused(models: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where every tile is compared; the latents are right all the same, and from then on nothing is asked."""
    with servers(models, tmp_path_factory, "always") as both:
        found = Pair(*both)
        flow = tiled_vae("taesd", seed=1)
        assert found.same(flow)
        assert found.calls()["local"] == found.calls()["tiles"] > 10
        assert found.same(changed(flow, "WriteWeights", 0.9))
        assert found.calls()["tiles"] == 1
        assert [event["reason"].partition(" by ")[0] for event in both[1].events("shard.demoted")] == [
            "a worker's tile differs"]
