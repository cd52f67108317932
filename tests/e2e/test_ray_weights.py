"""Workers that share out the weights of a model, under a real ComfyUI: the same latents, on the CPU and on simulated devices
that the whole model does not fit.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import COMFYUI
from e2e.conftest import troubles, wait_for
from e2e.test_ray import FLUX, LORA, TOLERANCE, WAN, Pair, cancel_within, pair, patched, sampled, settings
from support import workflows
from support.server import MB, Server
from support.workflows import Workflow

pytest.importorskip("ray")

from residency.policies.ray_shard.weights import choose

pytestmark = pytest.mark.ray

FLUX_LORA = workflows.text_to_latent("flux_a_fp32", loras=LORA)
FLOWS = [
    pytest.param(FLUX, id="Flux"),
    pytest.param(sampled(FLUX, cfg=1.0), id="Flux, one row"),
    pytest.param(FLUX_LORA, id="Flux, LoRA"),
    pytest.param(workflows.text_to_latent("flux_quantised"), id="quantised"),
    pytest.param(workflows.with_controlnet("flux_a_fp32", "flux"), id="ControlNet"),
    pytest.param(patched(FLUX, "ScaleAttention", 0.5), id="a custom attention"),
    pytest.param(sampled(FLUX, batch=3), id="three latents"),
]


@pytest.fixture(scope="module", params=["blocks", "pipeline", "fsdp2"])
def shared(request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with pair(models, tmp_path_factory, settings(2, verify="off", weights=request.param)) as servers:
        found = Pair(*servers)
        found.mode = request.param  # type: ignore[attr-defined]
        yield found
        assert troubles(servers[1]) == []
        assert servers[1].events("worker.lost") == []


def modes(pair: Pair) -> set[str]:
    """In which the weights lay for the last prompt."""
    return {way.rpartition(", ")[2] for way in pair.calls()}


@pytest.mark.parametrize("flow", FLOWS)
def test_latents_are_those_of_comfyui_alone(shared: Pair, flow: Workflow) -> None:
    """And all of it was predicted by workers, none of which has all of the weights."""
    assert shared.error(flow) <= TOLERANCE
    assert modes(shared) == {shared.mode}  # type: ignore[attr-defined]


def test_gguf_weights_are_shared_out(shared: Pair) -> None:
    """In the format that they have in the file; with a LoRA, and without it again."""
    plain, patched = (), (("flux_mixed", 1.0),)
    for loras in (plain, patched, plain):
        flow, twin = (workflows.text_to_latent(name, loras=loras) for name in ("flux_mixed.gguf", "flux_mixed_fp32"))
        assert shared.error(flow, like=twin) <= TOLERANCE
        assert modes(shared) == {shared.mode}  # type: ignore[attr-defined]
    assert shared.error(flow, like=workflows.text_to_latent("flux_mixed_fp32", loras=patched)) > 10 * TOLERANCE


def test_lora_goes_on_and_off(shared: Pair) -> None:
    """The control: what the LoRA changes is seen."""
    for flow in (FLUX_LORA, FLUX, FLUX_LORA):
        assert shared.error(flow) <= TOLERANCE
    assert shared.error(FLUX_LORA, like=FLUX) > 10 * TOLERANCE


def test_a_model_that_is_hardly_blocks_is_not_shared_out(shared: Pair) -> None:
    """This one's text embedding is larger than all of its blocks."""
    assert shared.error(WAN) <= TOLERANCE
    assert set(shared.calls()) == {"rows"}
    assert any("hold most of its weight" in event["reason"] for event in shared.plugin.events("shard.demoted"))


def test_lora_that_hooks_schedule_are_streamed_instead(shared: Pair) -> None:
    """The workers say why."""
    assert shared.error(workflows.hooked_lora("flux_a_fp32", "flux_one")) <= TOLERANCE
    assert any("hooks schedule" in event["reason"] for event in shared.plugin.events("shard.demoted"))


@pytest.mark.parametrize("flow", [
    pytest.param(patched(sampled(FLUX, steps=20, seed=77), "PauseInModel", 3.0), id="before the blocks"),
    pytest.param(sampled(workflows.text_to_latent("flux_a_fp32", size=768), steps=200, seed=77), id="among the blocks"),
])
def test_cancel_ends_the_prompt_at_once(shared: Pair, flow: Workflow) -> None:
    """And nobody is replaced for it: the next prompt has the same workers."""
    cancel_within(shared.plugin, shared.plugin.queue(flow))
    assert shared.error(sampled(FLUX, seed=78)) <= TOLERANCE
    assert modes(shared) == {shared.mode}  # type: ignore[attr-defined]


def held(server: Server, flow: Workflow) -> tuple[list[int], list[int]]:
    """Of each worker after a prompt: bytes of RAM of its own, and bytes free on its device."""
    seen = len(server.events("shard.workers"))
    server.run(flow)
    wait_for(lambda: len(server.events("shard.workers")) > seen)
    event = server.events("shard.workers")[-1]
    return list(event["private_bytes"].values()), list(event["free_bytes"].values())


@pytest.mark.parametrize(("mode", "world"), [("blocks", 2), ("pipeline", 2), ("fsdp2", 2), ("blocks", 3), ("fsdp2", 3)])
def test_a_model_that_fits_no_device(models: Path, simulated_npu: None, tmp_path_factory: pytest.TempPathFactory, mode: str,
                                     world: int) -> None:
    """Each worker has its share and at most a tenth of the model more, on its device, and of RAM and device together.

    A simulated device's memory is RAM of its process, and so counts as both. What the first prediction ever brings, as the
    program's own modules, is there before, by a small model.
    """
    size = (models / "diffusion_models" / "deep.safetensors").stat().st_size
    text = settings('"auto"', verify="off", weights=mode).replace("'", "")
    with Server(COMFYUI, tmp_path_factory.mktemp("plugin"), models, settings=text, device_mb=1600,
                env={"SIMNPU_DEVICES": str(world), "SIMNPU_EMPTIES": "1"}) as server:
        before, _ = held(server, FLUX_LORA)
        after, left = held(server, workflows.text_to_latent("deep", loras=(("middle", 1.0),)))
        ways = set(server.events("shard.finished")[-1]["calls"])
        assert {way.rpartition(", ")[2] for way in ways} == {mode}
        assert max(1600 * MB - each for each in left) <= (1 / world + 0.1) * size
        assert max(now - then for now, then in zip(after, before, strict=True)) <= (1 / world + 0.1) * size
        assert troubles(server) == []


def test_auto_chooses_by_what_it_measures(models: Path, simulated_npu: None, tmp_path_factory: pytest.TempPathFactory,
                                          own_model: Callable[[str, str], Path]) -> None:
    """On two simulated devices: a model that fits them, and two that do not, one with two rows at a time and one with one."""
    size = (models / "diffusion_models" / "deep.safetensors").stat().st_size
    one_row = sampled(workflows.text_to_latent(own_model("auto", "deep").stem), cfg=1.0)
    text = settings('"auto"', verify="off", weights="auto").replace("'", "")
    with pair(models, tmp_path_factory, text, device_mb=1600, env={"SIMNPU_DEVICES": "2", "SIMNPU_EMPTIES": "1"}) as servers:
        found = Pair(*servers)
        ways = []
        for flow in (FLUX, workflows.text_to_latent("deep"), one_row):
            assert found.error(flow) <= TOLERANCE
            ways.append(set(found.calls()))
        fits, two, one = found.plugin.events("shard.weights")
        assert (fits["mode"], two["mode"], ways[:2]) == ("replicate", "pipeline", [{"rows"}, {"pipeline"}])
        assert (ways[2] <= {"rows", "tokens"}) == (one["mode"] == "stream")
        for event, rows in ((two, 2), (one, 1)):
            assert 0 < event["room_bytes"] < event["weights_bytes"] <= size
            (mode, *_), why = choose([figures(event)] * 2, (rows, 16, 8, 8))
            assert mode == event["mode"]
            assert seconds(why) == pytest.approx(seconds(event["reason"]), rel=0.05, abs=0.001)
        assert troubles(found.plugin) == []


def figures(event: dict[str, Any]) -> dict[str, Any]:
    """What each worker measured, by what telemetry has of it."""
    assert min(event["link_mb_per_second"], event["file_mb_per_second"]) > 0
    return {"bytes": event["weights_bytes"], "room": event["room_bytes"], "link": event["link_mb_per_second"] * 1e6,
            "file": event["file_mb_per_second"] * 1e6, "blocks": True, "width": 512}


def seconds(reason: str) -> list[float]:
    return list(map(float, re.findall(r"[0-9.]+(?= s)", reason)))
